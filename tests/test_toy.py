"""The toy: an ordinary model folder, the same weights on any number of processes, killed or not."""
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from conftest import ROOT, slow
from safetensors.torch import load_file

import data
import toy
from core import common


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A little real text, in place of the session's."""
    folder = tmp_path_factory.mktemp("text")
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-b]*.py")):
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def folder(text, tmp_path_factory):
    """out/ with a tiny toy and its shards."""
    out = tmp_path_factory.mktemp("toy") / "out"
    train(text, out / "toy")
    return out


def train(text, out, *flags):
    return toy.main(["--preset", "tiny", "--data", str(text), "--out", str(out), *flags])


def weights(out):
    return load_file(out / "model.safetensors")


def assert_equal(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_it_is_an_ordinary_model_folder(folder, text, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    result = train(text, folder / "toy")
    assert "is finished" in capsys.readouterr().out         # the same command prints the result
    model = AutoModelForCausalLM.from_pretrained(folder / "toy")
    tokenizer = AutoTokenizer.from_pretrained(folder / "toy")
    assert len(tokenizer) == model.config.vocab_size == 512
    rows = data.Tokens(folder / "data", "val", 32).windows(512)
    loss = model(rows, labels=rows).loss.item()
    assert loss == pytest.approx(result["val_loss"], rel=1e-5)
    code = "import os\n\ndef f(x):\n\treturn x + 1  # é\n"
    assert tokenizer.decode(tokenizer(code)["input_ids"]) == code
    assert result["parameters"] == sum(p.numel() for p in model.parameters())
    assert not (folder / "toy" / "state.pt").exists()


def test_a_stopped_run_resumes_to_the_same_weights(folder, text, monkeypatch):
    polls = []
    with monkeypatch.context() as patch:
        patch.setattr(common.StopSignal, "poll", lambda self: polls.append(1) or len(polls) == 7)
        with pytest.raises(SystemExit) as stopped:
            train(text, folder / "stopped")
    assert stopped.value.code == 143
    assert torch.load(folder / "stopped" / "state.pt", weights_only=True)["step"] == 7
    train(text, folder / "stopped")
    assert_equal(weights(folder / "stopped"), weights(folder / "toy"))


@slow
def test_two_processes_train_the_same_weights(folder, text):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "toy.py",
               "--preset", "tiny", "--data", str(text), "--out", str(folder / "two")]
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    one = weights(folder / "toy")
    two = weights(folder / "two")
    for name in one:
        assert torch.allclose(one[name], two[name], atol=1e-5), name
