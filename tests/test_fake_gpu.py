"""The 8B loops on eight fake GPUs (fake_gpu.py): what they hold, compute, wait for and send, against --dry_run."""
import json
import os
import shutil
import subprocess
import sys

import pytest
import roofline
import torch
from conftest import ROOT, slow

LLAMA_8B = dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192, tie_word_embeddings=False)
FULL = ("bridge 6", "bridge 6, 8 a pass", "bridge 16, mix", "convert, sharded")
LIGHT = ("bridge 2, eager", "bridge 2, recomputed")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What fake_scenes.py printed, from one process; a device or dtype mix would have ended it with a traceback."""
    from transformers import LlamaConfig
    if shutil.which("g++") is None:
        pytest.skip("g++ is missing: without it torch cannot be told of GPUs that are not there")
    folder = tmp_path_factory.mktemp("8b")
    LlamaConfig(**LLAMA_8B).save_pretrained(folder)
    done = subprocess.run([sys.executable, "tests/fake_scenes.py", str(folder)], cwd=ROOT, capture_output=True,
                          text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@slow
def test_memory_is_what_the_dry_run_foretells(found):
    for name in (*FULL, *LIGHT):
        peaks, foretold = found[name]["peaks"], found[name]["foretold"]["peaks"]
        for phase in peaks.keys() & foretold.keys() - ({"optimizer"} if "sharded" in name else set()):
            near = 0.1 if "convert" in name else 0.05
            assert peaks[phase] == pytest.approx(foretold[phase], rel=near), (name, phase)
        assert name in LIGHT or peaks["save"] < peaks["train"], name             # saving needs nothing of its own
    assert found["bridge 6, 8 a pass"]["peaks"]["train"] < 35 and found["convert, sharded"]["peaks"]["train"] < 62
    assert all(found[name]["peaks"]["train"] < 80 for name in FULL)              # two of them chose how much at once


@slow
def test_flops_are_those_of_the_formula(found):
    for name in FULL:
        scene = found[name]
        assert scene["flops"] == pytest.approx(scene["tokens"] * scene["foretold"]["flops_per_token"], rel=0.03), name


@slow
def test_the_host_waits_a_few_times_a_step(found):
    """Whatever the number of micro-batches: one to sixteen of them here, twelve in CONVERT's preset."""
    for name in (*FULL, "convert 2"):
        assert len(found[name]["waits"]) <= 4, (name, found[name]["waits"])


@slow
def test_the_headline_step_keeps_an_h100_busy(found):
    """By the roofline, an upper bound, all-reduce behind backward: 48% of 989 TFLOP/s; Muon a twentieth of it."""
    scene = found["bridge 6"]
    parts = {name: seconds for name, seconds in scene["parts"].items() if name != "allreduce"}
    assert set(parts) == {"prefix", "network", "Muon", "AdamW", "EMA", "broadcast", "rest"}
    assert scene["flops"] / sum(parts.values()) > 0.48 * 989e12 and parts["Muon"] < 0.06 * sum(parts.values())
    assert scene["parts"]["allreduce"] < parts["network"] / 2                    # one micro-batch, two thirds backward


def test_the_roofline_knows_a_kernel_and_a_fusion():
    """A product is bound by arithmetic, a sum by memory; what a compiler fuses moves its ends only."""
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch._subclasses.fake_tensor import FakeTensorMode
    with FakeTensorMode():
        big, low = torch.empty(4096, 4096), torch.empty(4096, 4096, dtype=torch.bfloat16)
        product, total = torch.ops.aten.mm.default, torch.ops.aten.add.Tensor
        flops = roofline.work(product, (low, low), {}, low)
        assert flops == 2 * 4096 ** 3 and roofline.work(total, (big, big), {}, big) == 0
        seconds = roofline.roof(product, flops, (low, low, low))
        assert seconds == pytest.approx(roofline.LAUNCH + flops / roofline.RATES[2])
        once = roofline.roof(total, 0, (big, big))                               # one in, one out
        assert once == pytest.approx(roofline.LAUNCH + 2 * 4 * 4096 ** 2 / roofline.RATES["memory"])
        chain = make_fx(lambda x: ((x + 1) * 2).exp())(big)
        assert roofline.roof_of_graph(chain.graph) == pytest.approx(once)
        three = make_fx(lambda x: ((x + 1) @ x) * 2)(low)                        # the product keeps the two apart
        half = roofline.roof(total, 0, (low, low))
        assert roofline.roof_of_graph(three.graph) == pytest.approx(seconds + 2 * half)


@slow
def test_what_needs_no_training_runs_too(found):
    """LOCATE, the hybrid, blocks and gaps, rivals: no device or dtype is mixed, and each of them computes."""
    assert all(found["use"]["used"][phase] > 1e9 for phase in ("locate", "rivals", "hybrid", "generate"))


@slow
def test_nothing_is_compiled_again(found):
    assert found["bridge 2"]["graphs"] and all(step < 2 for scene in found.values() for step in scene["graphs"])


@slow
def test_all_processes_send_the_same_in_the_same_order(found):
    """Of the first and the last of eight; else a real group would hang. Rank 0 alone reports and writes."""
    for name in ("bridge 2", "convert 2, sharded"):
        first, last = found[name]["collectives"], found[f"{name}, rank 7"]["collectives"]
        assert len(first) > 30 and first == last
