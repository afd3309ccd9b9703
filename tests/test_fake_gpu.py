"""The 8B loops on eight fake GPUs (fake_gpu.py): what they hold, compute, wait for and send, against --dry_run."""
import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, slow

LLAMA_8B = dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192, tie_word_embeddings=False)
FULL = ("bridge 6", "bridge 16, mix", "convert, sharded")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What fake_gpu.py printed, from one process: a device or dtype mix would have ended it with a traceback."""
    from transformers import LlamaConfig
    if shutil.which("g++") is None:
        pytest.skip("g++ is missing: without it torch cannot be told of GPUs that are not there")
    folder = tmp_path_factory.mktemp("8b")
    LlamaConfig(**LLAMA_8B).save_pretrained(folder)
    done = subprocess.run([sys.executable, "tests/fake_gpu.py", str(folder)], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@slow
def test_memory_is_what_the_dry_run_foretells(found):
    for name in FULL:
        peaks, foretold = found[name]["peaks"], found[name]["foretold"]["peaks"]
        for phase in peaks.keys() & foretold.keys() - ({"optimizer"} if "sharded" in name else set()):
            assert peaks[phase] == pytest.approx(foretold[phase], rel=0.1), (name, phase)
        assert peaks["save"] < peaks["train"], name                              # saving needs nothing of its own
    assert found["bridge 6"]["peaks"]["train"] < 35 and found["convert, sharded"]["peaks"]["train"] < 62


@slow
def test_flops_are_those_of_the_formula(found):
    for name in FULL:
        scene = found[name]
        assert scene["flops"] == pytest.approx(scene["tokens"] * scene["foretold"]["flops_per_token"], rel=0.03), name


@slow
def test_the_host_waits_a_few_times_a_step(found):
    """Whatever the number of micro-batches: two of them here, four and twelve in the presets."""
    for name in (*FULL, "convert 2"):
        assert len(found[name]["waits"]) <= 4, (name, found[name]["waits"])


@slow
def test_nothing_is_compiled_again(found):
    assert found["bridge 2"]["graphs"] and all(step < 2 for scene in found.values() for step in scene["graphs"])


@slow
def test_all_processes_send_the_same_in_the_same_order(found):
    """Of the first and the last of eight; else a real group would hang. Rank 0 alone reports and writes."""
    for name in ("bridge 2", "convert 2, sharded"):
        first, last = found[name]["collectives"], found[f"{name}, rank 7"]["collectives"]
        assert len(first) > 30 and first == last
