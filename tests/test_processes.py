"""Several processes are one run: equal weights, and a clean end whatever happens to one of them."""
import os
import signal
import socket
import subprocess
import sys
import time

import torch
from conftest import ROOT, slow

# A training as the stages write it: slots of a batch, summed gradients, Muon shared, a run folder.
TRAINING = """
from dataclasses import dataclass
import time
import torch
from core import optim
from core.common import entry, normal, parse, setup, split_batch
from core.run import Run, finished

@dataclass
class Config:
    out: str = ""
    steps: int = 10
    batch_size: int = 8
    pause: float = 0.0
    fail_at: int = -1

@entry
def main(argv):
    cfg = parse(Config, argv)
    world = setup("cpu")
    if finished(cfg, {}):
        return print("finished", flush=True)
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"head": torch.nn.Linear(16, 2)})
    model["blocks"] = torch.nn.ModuleList([torch.nn.Linear(16, 16) for _ in range(3)])
    optimizers = optim.build(model.named_parameters(), 0.02, 1e-3, 0.1, world=world)
    run = Run(cfg, world, {})
    step = run.resume([model], optimizers)["step"]
    slots, _ = split_batch(cfg.batch_size, 0, world)
    run.say("training")
    for step in run.steps(step, cfg.steps):
        if step == cfg.fail_at and not world.main:
            raise OSError(28, "No space left on device")
        x = torch.stack([normal((16,), world.device, 0, "batch", step, slot) for slot in slots])
        for block in model["blocks"]:
            x = x + block(x).tanh()
        (model["head"](x).square().sum() / cfg.batch_size).backward()
        optim.sum_gradients(model.parameters(), world)
        optim.step_all(optimizers, optim.share_at(step, cfg.steps, 2))
        time.sleep(cfg.pause)
        run.save(True, step + 1, [model], optimizers)
    torch.save(model.state_dict(), f"{cfg.out}/weights{world.rank}.pt")
    run.finish({"steps": cfg.steps})
"""

# One interpreter forks them, which saves the seconds of importing torch again. Optimizers load _dynamo.
FORKED = """
import os, sys
from pathlib import Path
import torch._dynamo
folder, port = sys.argv[1:]
children = []
for name, rank, size in (("one", 0, 1), ("two", 0, 2), ("two", 1, 2)):
    child = os.fork()
    if child == 0:
        if size > 1:
            os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                              MASTER_PORT=port)
        main(["--out", str(Path(folder) / name)])
        os._exit(0)
    children.append(child)
sys.exit(max(os.waitpid(child, 0)[1] for child in children) > 0)
"""


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def start(size, folder, *argv):
    """`size` processes, as torchrun would start them."""
    port = free_port()
    script = folder.with_suffix(".py")
    script.write_text(TRAINING + "\nmain()\n")
    command = [sys.executable, script, "--out", folder, *argv]
    processes = []
    for rank in range(size):
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        if size > 1:
            env.update(RANK=str(rank), WORLD_SIZE=str(size))
            env.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        processes.append(subprocess.Popen(list(map(str, command)), env=env, text=True,
                                          stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    return processes


def end(processes):
    """[(exit code, stderr)]"""
    errors = [process.communicate(timeout=120)[1] for process in processes]
    return [(process.returncode, error) for process, error in zip(processes, errors)]


def weights(folder, rank=0):
    return torch.load(folder / f"weights{rank}.pt", weights_only=True)


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@slow
def test_two_processes_train_what_one_trains(tmp_path):
    script = tmp_path / "forked.py"
    script.write_text(TRAINING + FORKED)
    command = [sys.executable, script, tmp_path, free_port()]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    one = weights(tmp_path / "one")
    two = weights(tmp_path / "two")
    assert equal(two, weights(tmp_path / "two", rank=1))
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)
    assert not equal(one, {name: torch.zeros_like(p) for name, p in one.items()})


@slow
def test_a_signal_to_one_process_saves_and_ends_both(tmp_path):
    straight = start(2, tmp_path / "straight")
    stopped = start(2, tmp_path / "stopped", "--pause", "0.2")
    assert stopped[0].stdout.readline() == "training\n"
    time.sleep(0.5)
    stopped[1].send_signal(signal.SIGTERM)
    time.sleep(0.05)
    stopped[1].send_signal(signal.SIGTERM)                  # ignored: the save must end
    assert end(stopped) == [(143, ""), (143, "")]
    state = torch.load(tmp_path / "stopped" / "state.pt", weights_only=True)
    assert 0 < state["step"] < 10
    assert end(straight) == [(0, ""), (0, "")]
    assert end(start(2, tmp_path / "stopped", "--pause", "0.2")) == [(0, ""), (0, "")]
    assert equal(weights(tmp_path / "straight"), weights(tmp_path / "stopped"))
    again = start(2, tmp_path / "straight")                 # finished: all agree and leave
    assert end(again) == [(0, ""), (0, "")]


@slow
def test_a_process_that_fails_ends_the_other_with_a_sentence(tmp_path):
    first, second = end(start(2, tmp_path / "r", "--fail_at", "3"))
    assert second == (2, "error: [Errno 28] No space left on device; free some space or choose "
                         "another path\n")
    assert first[0] == 1 and first[1].startswith("error: another process of this run failed")
    assert "Traceback" not in first[1]
    assert torch.load(tmp_path / "r" / "state.pt", weights_only=True)["step"] == 3
