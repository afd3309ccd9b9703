"""Kill a training at random moments until it is done, and compare it with one that was left alone.

    python tests/kill_and_resume.py --model out/toy --kills 20      # about 4 minutes on 2 cores

Each kill is a SIGKILL or SIGTERM at a random moment, start-up and saving included. Exits with 1
unless the final weights are equal bit for bit. (.ci/run does the same with two kills.)
"""
import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent


def start(out, args):
    command = [sys.executable, "bridge.py", "--preset", "tiny", "--layer", "2", "--save_every", "20",
               "--model", Path(args.model).resolve(), "--data", args.data, "--steps", args.steps,
               "--out", out]
    return subprocess.Popen(list(map(str, command)), cwd=ROOT, text=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def torture(out, args):
    """Run to the end through all kills. Returns how many of them hit a living run."""
    chance = random.Random(args.seed)
    hits = 0
    for _ in range(args.kills):
        run = start(out, args)
        time.sleep(chance.uniform(0.5, 6.0))
        if run.poll() is None:
            run.send_signal(chance.choice([signal.SIGKILL, signal.SIGTERM]))
            hits += 1
        _, error = run.communicate()
        assert "Traceback" not in error, error
    finish(out, args)
    return hits


def finish(out, args):
    run = start(out, args)
    _, error = run.communicate()
    assert run.returncode == 0, error


def equal(first, second):
    a = load_file(f"{first}/bridge.safetensors")
    b = load_file(f"{second}/bridge.safetensors")
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="out/toy")
    parser.add_argument("--data", default="stdlib")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        finish(f"{folder}/quiet", args)
        hits = torture(f"{folder}/killed", args)
        same = equal(f"{folder}/quiet", f"{folder}/killed")
    words = "equal bit for bit" if same else "DIFFER"
    print(f"{hits} of {args.kills} kills hit a living run; final weights {words}")
    return 0 if same else 1


if __name__ == "__main__":
    raise SystemExit(main())
