"""Runs of bridge.py: functions of their settings, however they are cut, killed or asked again."""
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, fails, slow
from safetensors.torch import load_file

import bridge
import generate
import geometry
import hybrid
import repr_align
import toy
from core import common, diffusion


@pytest.fixture(scope="module")
def home(tmp_path_factory, text):
    """A folder with a toy, its text, and the choice of a layer."""
    out = tmp_path_factory.mktemp("home")
    toy.main(["--preset", "tiny", "--data", str(text), "--out", f"{out}/toy"])
    (out / "geometry").mkdir()
    (out / "geometry" / "result.json").write_text(json.dumps({"best_layer": 2}))
    return out


def command(home, text, name, *more):
    """Eight steps, saved after four. `more` wins over them."""
    return ["--preset", "tiny", "--data", str(text), "--eval_batches", "2", "--steps", "8",
            "--save_every", "4", "--log_every", "2", "--out", f"{home}/{name}", *more]


@pytest.fixture(scope="module")
def result(home, text):
    """Of a run that nobody disturbed, in home/bridge."""
    return bridge.main(command(home, text, "bridge"))


def weights(home, name):
    return load_file(home / name / "bridge.safetensors")


def same(home, a, b):
    """Equal bit for bit."""
    one, two = weights(home, a), weights(home, b)
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def agree(home, a, b):
    """Loss and gradient norm of every step: Muon and Adam would hide a wrong factor."""
    one, two = ([json.loads(line) for line in open(home / name / "log.jsonl")] for name in (a, b))
    for key in ("loss", "gnorm"):
        first, second = ([row[key] for row in rows if key in row] for rows in (one, two))
        assert len(first) >= 3 and second == pytest.approx(first, rel=1e-3)


def test_result_of_a_run(home, text, result, capsys):
    assert set(result["nfe"]) == {"1", "2", "4"} and result["layer"] == 2
    row = result["nfe"]["4"]
    assert 0 < row["fvu"] < 1.1 and row["kl"] > 0 and len(row["kl_rows"]) == 2
    assert not (home / "bridge" / "state.pt").exists()
    info = json.loads((home / "bridge" / "bridge.json").read_text())
    assert info["layer"] == 2 and info["nfe_default"] == 4 and info["bridge"]["depth"] == 2
    assert info["seq_len"] == 32                        # hybrid.py warns far beyond it
    net, again = diffusion.load(home / "bridge", "cpu")
    assert again == info and not any(p.requires_grad for p in net.parameters())

    control = bridge.main(command(home, text, "regression", "--objective", "regression"))
    assert set(control["nfe"]) == {"1"} and control["parameters"] == result["parameters"]
    # The same command prints the result, another run is refused
    before = (home / "bridge" / "result.json").read_text()
    capsys.readouterr()
    assert bridge.main(command(home, text, "bridge")) == json.loads(before)
    assert "NFE 4: FVU" in capsys.readouterr().out
    assert "lr = 0.02 there, 0.5 here" in fails(capsys, bridge.main, *command(home, text, "bridge", "--lr", "0.5"))


def test_a_moved_run_is_the_same_run(home, text, result, tmp_path, monkeypatch, capsys):
    """Model, text and run lie elsewhere and are spelled in another way."""
    for name in ("toy", "geometry", "data", "bridge"):
        shutil.copytree(home / name, tmp_path / "moved" / name)
    shutil.copytree(text, tmp_path / "words")
    monkeypatch.chdir(tmp_path)
    argv = command("moved", "words", "bridge/", "--model", f"{tmp_path}/moved/toy/")
    assert bridge.main(argv) == result
    (tmp_path / "words" / "more.txt").write_text("another text\n")
    assert "holds" in fails(capsys, bridge.main, *argv)         # other text is another run


def test_a_copied_pipeline_is_the_same_runs(runs, text, tmp_path, monkeypatch):
    shutil.copytree(runs, tmp_path / "copy")
    monkeypatch.chdir(tmp_path)
    model = ["--model", f"{tmp_path}/copy/toy/"]
    finished = {
        toy: ("toy", []),
        geometry: ("geometry", model),
        bridge: ("bridge", model),
        hybrid: ("hybrid", ["--bridge", "copy/bridge/", *model]),
        repr_align: ("convert/w0", ["--align_weight", "0", *model]),
        generate: ("generate", ["--bridges", "copy/generator/",
                                "--converted", f"{tmp_path}/copy/convert/w10"])}
    for stage, (name, flags) in finished.items():       # another run would be refused
        argv = ["--preset", "tiny", "--data", f"{text}", "--out", f"copy/{name}/", *flags]
        assert stage.main(argv) == json.loads((runs / name / "result.json").read_text())


def test_text_that_is_read_often_is_said_at_the_start(home, text, monkeypatch, capsys):
    size = json.loads((home / "data" / "meta.json").read_text())["tokens"]["train"]
    steps = 25 * size // (4 * 33)                               # 4 windows of 33 tokens a step
    monkeypatch.setattr(common.StopSignal, "poll", lambda self: True)
    with pytest.raises(SystemExit):
        bridge.main(command(home, text, "often", "--steps", str(steps)))
    assert "will be read 25 times" in capsys.readouterr().out


def test_generate_turns_on_what_generation_needs(home, text):
    result = bridge.main(command(home, text, "generator", "--generate", "--layer", "0", "--steps", "2"))
    assert result["visible"] == "mix" and set(result["nfe"]) == {"8"}
    net, _ = diffusion.load(home / "generator", "cpu")
    assert net.config.generates and net.config.bidirectional and net.config.self_condition
    assert bridge.GENERATE_PRESETS.keys() == bridge.PRESETS.keys()


def test_default_folders(monkeypatch, tmp_path):
    folders = []

    def stop(model, out):
        folders.append(out)
        raise SystemExit(0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bridge.backbone, "resolve", stop)
    monkeypatch.setattr(bridge.backbone, "preset_of", lambda *_: "toy")
    for flags in ("", "--objective regression", "--generate", "--layer 3"):
        with pytest.raises(SystemExit):
            bridge.main(flags.split())
    assert folders == ["out/bridge", "out/regression", "out/generator", "out/bridge_l3"]


def test_interrupted_and_resumed_equals_uninterrupted(home, text, result, monkeypatch):
    steps = iter([False] * 2 + [True])
    with monkeypatch.context() as patch:
        patch.setattr(common.StopSignal, "poll", lambda self: next(steps))
        with pytest.raises(SystemExit) as left:
            bridge.main(command(home, text, "broken"))
    assert left.value.code == 143 and (home / "broken" / "state.pt").exists()
    # How often it logs and saves may change, and changes nothing
    bridge.main(command(home, text, "broken", "--log_every", "3", "--save_every", "5"))
    assert same(home, "bridge", "broken")


def test_the_state_is_saved_before_the_bridge_is_measured(home, text, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(bridge, "measure", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            bridge.main(command(home, text, "unmeasured", "--steps", "2", "--nfes", "1"))
    assert torch.load(home / "unmeasured" / "state.pt", weights_only=True)["step"] == 2
    result = bridge.main(command(home, text, "unmeasured", "--steps", "2", "--nfes", "1"))
    assert result["nfe"]["1"]["fvu"] > 0


def test_micro_batches_add_up(home, text):
    more = ["--steps", "3", "--log_every", "1", "--nfes", "1"]
    whole = bridge.main(command(home, text, "whole", *more))
    parts = bridge.main(command(home, text, "parts", *more, "--micro_batch", "1"))
    assert parts["val_loss"] == pytest.approx(whole["val_loss"], rel=1e-4)
    agree(home, "whole", "parts")


@slow
@pytest.mark.parametrize("flags", [[], ["--generate"]])
def test_two_processes_go_on_as_one_would(home, text, monkeypatch, flags):
    """Started by one process, stopped at step 1, finished by two; against one process alone."""
    name = "".join(flags)
    argv = [*flags, "--layer", "2", "--steps", "5", "--save_every", "2", "--log_every", "1"]
    bridge.main(command(home, text, f"one{name}", *argv))
    argv = command(home, text, f"two{name}", *argv)
    with monkeypatch.context() as patch:
        patch.setattr(common.StopSignal, "poll", lambda self: True)
        with pytest.raises(SystemExit):
            bridge.main(argv)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           "--nproc_per_node", "2", "bridge.py", *argv], cwd=ROOT, capture_output=True,
                          text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    one, two = weights(home, f"one{name}"), weights(home, f"two{name}")
    assert all(torch.allclose(one[k], two[k], atol=2e-5, rtol=1e-4) for k in one)
    result = json.loads((home / f"two{name}" / "result.json").read_text())
    assert result["processes"] == 2
    agree(home, f"one{name}", f"two{name}")


@pytest.mark.parametrize("flags", [
    "--self_condition --recompute --cooldown 0.25 --lr 0 --depth 1",
    pytest.param("--head_start tokens --sink shared", marks=slow),
    pytest.param("--objective regression --head_start tokens", marks=slow),
    pytest.param("--visible mix --layer 0 --head_start tokens", marks=slow)])
def test_settings_train(home, text, flags):
    name = flags.replace(" ", "")
    result = bridge.main(command(home, text, name, "--steps", "2", "--nfes", "2", *flags.split()))
    assert result["nfe"][str(result["nfe_default"])]["fvu"] > 0


def test_bad_input(home, text, tmp_path, capsys):
    good = command(home, text, "x")
    assert "lie in 1..4" in fails(capsys, bridge.main, *good, "--layer", "5")
    assert "lie in 1..4" in fails(capsys, bridge.main, *good, "--layer", "0")
    assert "lie in 0..4" in fails(capsys, bridge.main, *good, "--layer", "six", "--visible", "mix")
    assert "--nfes" in fails(capsys, bridge.main, *good, "--nfes", "0")
    assert "--skip must be below" in fails(capsys, bridge.main, *good, "--skip", "32")
    assert "two held-out sequences" in fails(capsys, bridge.main, *good, "--eval_batches", "1")
    assert "--calibration must be" in fails(capsys, bridge.main, *good, "--calibration", "1")
    assert "--batch_size must be" in fails(capsys, bridge.main, *good, "--batch_size", "0")
    assert "--micro_batch" in fails(capsys, bridge.main, *good, "--micro_batch", "3")
    assert "longer than the" in fails(capsys, bridge.main, *good, "--seq_len", "99999")
    elsewhere = [*good, "--out", f"{home}/far/off/x", "--model", f"{home}/toy"]
    assert "run python geometry.py" in fails(capsys, bridge.main, *elsewhere)


def test_a_bridge_that_cannot_be_loaded_is_one_sentence(home, text, tmp_path):
    with pytest.raises(common.UserError, match="python bridge.py"):
        diffusion.load(tmp_path, "cpu")
    (tmp_path / "bridge.json").write_text(json.dumps({"D": 32, "W": 32, "blocks": 2, "layer": 2}))
    with pytest.raises(common.UserError, match="second edition"):
        diffusion.load(tmp_path, "cpu")


def test_a_loss_that_is_not_finite(home, text, capsys, monkeypatch):
    """NaN at step 6: named, and the last good state, of step 4, stays."""
    calls = []

    def broken(*args, **more):
        calls.append(1)
        loss, z_hat = diffusion.bridge_loss(*args, **more)
        return loss * (torch.nan if len(calls) == 7 + 2 else 1), z_hat
    monkeypatch.setattr(bridge, "bridge_loss", broken)
    argv = command(home, text, "nan")                           # two calls validate at step 4
    assert "finite at step 6" in fails(capsys, bridge.main, *argv)
    state = torch.load(home / "nan" / "state.pt", weights_only=True)
    assert state["step"] == 4 and all(v.isfinite().all() for v in state["modules"][0].values())


@pytest.mark.parametrize("family, layers, ffn, vocab, block", [
    ("Llama", 32, 14336, 128256, 218.1e6),
    pytest.param("Qwen3", 36, 12288, 151936, 192.9e6, marks=slow)])
def test_dry_run_at_8b_shape(family, layers, ffn, vocab, block, tmp_path, capsys):
    """The command of the launch card, from a config alone: it fits 80 GB, no 8B tensor is made."""
    import transformers
    config = getattr(transformers, f"{family}Config")(
        hidden_size=4096, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, vocab_size=vocab, tie_word_embeddings=False)
    config.save_pretrained(tmp_path / "8b")
    argv = f"--preset 8b --layer 6 --dry_run --model {tmp_path}/8b --out {tmp_path}/b".split()
    size = bridge.main(argv)
    out = capsys.readouterr().out
    parameters = 6 * 10 * 4096 ** 2 + 3 * 4096 ** 2
    assert 20 < size["gigabytes"] < 80 and "1 H100" in out
    assert size["flops_per_token"] == pytest.approx(6 * parameters + 2 * 6 * block, rel=0.05)
    assert bridge.main([*argv, "--recompute"])["gigabytes"] < size["gigabytes"]
    assert not (tmp_path / "b").exists()
