"""Kill a training run at random moments until it is done, and compare it with one that was left alone.

    python tests/kill_and_resume.py --model out/toy --kills 20          # about 4 minutes on 2 cores

Each kill is SIGKILL or SIGTERM at a random moment, start-up and saving included. Exits 1 unless the final weights are
equal bit for bit. (.ci/run does the same with two kills.)
"""
import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent


def start(out, model, steps, data):
    command = [sys.executable, "bridge.py", "--preset", "tiny", "--layer", "2", "--model", model, "--data", data,
               "--steps", steps, "--save_every", "20", "--log_every", "100000", "--eval_every", "100000", "--out", out]
    command = list(map(str, command))
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def torture(out, model, steps, data, kills, seed):
    """Run to the end through `kills` kills; returns how many of them hit a living run."""
    chance, hits = random.Random(seed), 0
    for _ in range(kills):
        run = start(out, model, steps, data)
        time.sleep(chance.uniform(0.5, 6.0))
        if run.poll() is None:
            run.send_signal(chance.choice([signal.SIGKILL, signal.SIGTERM]))
            hits += 1
        assert "Traceback" not in run.communicate()[1]
    run = start(out, model, steps, data)
    error = run.communicate()[1]
    assert run.returncode == 0, error
    return hits


def equal(a, b):
    a, b = load_file(Path(a) / "bridge.safetensors"), load_file(Path(b) / "bridge.safetensors")
    return a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="out/toy")
    parser.add_argument("--data", default="stdlib")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        quiet = start(f"{folder}/quiet", Path(args.model).resolve(), args.steps, args.data)
        assert quiet.wait() == 0, quiet.stderr.read()
        hits = torture(f"{folder}/killed", Path(args.model).resolve(), args.steps, args.data, args.kills, args.seed)
        same = equal(f"{folder}/quiet", f"{folder}/killed")
    print(f"{hits} of {args.kills} kills hit a living run; final weights {'equal bit for bit' if same else 'DIFFER'}")
    raise SystemExit(not same)
