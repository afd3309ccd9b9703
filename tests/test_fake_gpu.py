"""The 8B loops on eight fake GPUs (fake_gpu.py): their memory, FLOPs, host waits and collectives,
against --dry_run."""
import json
import os
import shutil
import subprocess
import sys

import pytest
import roofline
import torch
from conftest import ROOT, slow

LLAMA_8B = dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                num_attention_heads=32, num_key_value_heads=8, vocab_size=128256,
                max_position_embeddings=8192, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """What fake_scenes.py noted, from one process. A mix of devices or dtypes would have ended it
    with a traceback."""
    from transformers import LlamaConfig
    if shutil.which("g++") is None:
        pytest.skip("g++ is missing: without it torch cannot be told of fake GPUs")
    folder = tmp_path_factory.mktemp("8b")
    LlamaConfig(**LLAMA_8B).save_pretrained(folder)
    done = subprocess.run(
        [sys.executable, "tests/fake_scenes.py", str(folder)], cwd=ROOT, capture_output=True,
        text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    noted = [json.loads(line) for line in done.stdout.splitlines()]
    return {scene["scene"]: scene for scene in noted}


@slow
@pytest.mark.parametrize("name, tolerance", [
    ("bridge 6", 0.1),                  # one pass: gradients come while activations go
    ("bridge 3, generate", 0.05), ("bridge 2", 0.05), ("bridge 2, eager", 0.05),
    ("bridge 2, recomputed", 0.05), ("convert 2, sharded", 0.05), ("convert 4, sharded", 0.05)])
def test_memory_is_that_of_the_dry_run(scenes, name, tolerance):
    peaks = scenes[name]["peaks"]
    assert peaks["train"] == pytest.approx(scenes[name]["forecast"]["gigabytes"], rel=tolerance)
    assert max(peaks["save"], peaks["optimizer"], peaks["validate"]) < peaks["train"]
    assert max(peaks.values()) < 80


@slow
@pytest.mark.parametrize("name", ["bridge 6", "bridge 3, generate", "convert 2"])
def test_flops_are_those_of_the_formula(scenes, name):
    flops = scenes[name]["flops"] / scenes[name]["tokens"]
    assert flops == pytest.approx(scenes[name]["forecast"]["flops_per_token"], rel=0.03)


@slow
@pytest.mark.parametrize("name", ["bridge 6", "bridge 3, generate", "bridge 2", "convert 2",
                                  "convert 4, sharded"])
def test_the_host_waits_a_few_times_a_step(scenes, name):
    """For the norm, the signal and twice for the log, whatever the number of micro-batches."""
    assert len(scenes[name]["waits"]) <= 4, scenes[name]["waits"]


@slow
def test_the_headline_step_keeps_an_h100_busy(scenes):
    """By the roofline, an upper bound, with the all-reduce behind the backward pass: 48% of 989
    TFLOP/s. Muon is a twentieth of the step."""
    scene = scenes["bridge 6"]
    parts = scene["parts"]
    all_reduce = parts.pop("allreduce")
    assert set(parts) == {"lower blocks", "network", "Muon", "AdamW", "EMA", "broadcast", "rest"}
    seconds = sum(parts.values())
    assert scene["flops"] / seconds > 0.48 * 989e12
    assert parts["Muon"] < 0.06 * seconds
    assert all_reduce < parts["network"] / 2            # one micro-batch, two thirds backward


def test_the_roofline_knows_a_kernel_and_a_fusion():
    """A product is bound by arithmetic, a sum by memory. A fused kernel moves its ends only."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    product = torch.ops.aten.mm.default
    add = torch.ops.aten.add.Tensor
    memory = roofline.RATES["memory"]
    with FakeTensorMode():
        wide = torch.empty(4096, 4096)
        half = torch.empty(4096, 4096, dtype=torch.bfloat16)
        flops = roofline.work(product, (half, half), {}, half)
        assert flops == 2 * 4096 ** 3
        assert roofline.work(add, (wide, wide), {}, wide) == 0
        seconds = roofline.roof(product, flops, (half, half, half))
        assert seconds == pytest.approx(roofline.LAUNCH + flops / roofline.RATES[2])
        once = roofline.roof(add, 0, (wide, wide))      # one in, one out
        assert once == pytest.approx(roofline.LAUNCH + 2 * 4 * 4096 ** 2 / memory)
        chain = make_fx(lambda x: ((x + 1) * 2).exp())(wide)
        assert roofline.roof_of_graph(chain.graph) == pytest.approx(once)
        three = make_fx(lambda x: ((x + 1) @ x) * 2)(half)      # two sums, a product between them
        sums = 2 * roofline.roof(add, 0, (half, half))
        assert roofline.roof_of_graph(three.graph) == pytest.approx(seconds + sums)


@slow
def test_stages_without_training_run_too(scenes):
    """No device or dtype is mixed, and each phase computes."""
    used = scenes["use"]["used"]
    for phase in ("locate", "measure", "rivals", "hybrid", "generate"):
        assert used[phase] > 1e9, phase


@slow
def test_nothing_is_compiled_again(scenes):
    """Validation compiles one graph more, once: the lower blocks on a single row."""
    for name, scene in scenes.items():
        phases = [graph["phase"] for graph in scene["graphs"]]
        steps = [graph["step"] for graph in scene["graphs"] if graph["phase"] == "train"]
        assert max(steps, default=0) == 0, name
        assert phases.count("validate") <= 1, name
    assert scenes["bridge 2"]["graphs"]


@slow
@pytest.mark.parametrize("name", ["bridge 2", "convert 2, sharded"])
def test_all_processes_send_the_same_in_the_same_order(scenes, name):
    """The first and the last of eight: else a real group would hang. Rank 0 alone writes."""
    first = scenes[name]["collectives"]
    assert len(first) > 30
    assert first == scenes[f"{name}, rank 7"]["collectives"]
