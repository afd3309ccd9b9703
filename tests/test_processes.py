"""Processes of one run that fail, freeze or sit on different disks: the others say so, and the same command goes on."""
import os
import signal
import socket
import subprocess
import sys
import time

import torch
from conftest import ROOT, slow, tiny_model
from safetensors.torch import load_file

QUICKER = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from core import run, together
together.stay_together.__defaults__ = 1, 20        # seconds; in earnest 5 and 40
run.refuse_unshared.__defaults__ = 2,            # in earnest 20
import bridge
bridge.main(sys.argv[1:])
"""


def pair(folders, out, model, steps=200):
    """Two gloo processes as torchrun would start them on two nodes, but with nobody watching over them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    argv = f"--preset tiny --layer 2 --random_init --model {model} --steps {steps} --save_every 20 --out {out}".split()
    return [subprocess.Popen(
        [sys.executable, "-c", QUICKER, str(ROOT), *argv], cwd=folder, stderr=subprocess.PIPE, text=True,
        stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank), "WORLD_SIZE": "2",
                                        "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
        for rank, folder in enumerate(folders)]


@slow
def test_a_process_that_fails_ends_the_others_and_the_rerun_is_exact(tmp_path):
    tiny_model("llama").config.save_pretrained(tmp_path / "bare")
    for process in pair([tmp_path] * 2, "straight", tmp_path / "bare"):
        assert process.wait(300) == 0, process.stderr.read()
    for end in (signal.SIGKILL, signal.SIGSTOP):                                   # dead; as if its machine were gone
        out = tmp_path / end.name
        first, second = pair([tmp_path] * 2, out.name, tmp_path / "bare", 200 if end is signal.SIGKILL else 10 ** 5)
        while not (out / "state.pt").exists():
            time.sleep(0.1)
        second.send_signal(end)
        message = first.communicate(timeout=60)[1]
        second.kill()
        assert first.returncode == 1 and "error: another process of this run failed or cannot be reached" in message
        assert "Traceback" not in message
        assert 0 < torch.load(out / "state.pt", weights_only=True)["step"] and not (out / "result.json").exists()
    for process in pair([tmp_path] * 2, "SIGKILL", tmp_path / "bare"):
        assert process.wait(300) == 0, process.stderr.read()
    a, b = (load_file(tmp_path / name / "bridge.safetensors") for name in ("straight", "SIGKILL"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@slow
def test_an_out_that_is_not_shared_is_refused(tmp_path):
    tiny_model("llama").config.save_pretrained(tmp_path / "bare")
    for name in "ab":
        (tmp_path / name).mkdir()
    for process in pair([tmp_path / "a", tmp_path / "b"], "out", tmp_path / "bare"):
        message = process.communicate(timeout=300)[1]
        assert process.returncode == 2 and "process 1 does not see what process 0 writes in out" in message, message
    assert os.listdir(tmp_path / "b") == []
