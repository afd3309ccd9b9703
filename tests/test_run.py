"""A run folder: what makes two runs the same, what a longer run may go on from, what a kill leaves behind."""
import dataclasses
import json
import os
import sys
import types

import pytest
import torch
from conftest import fails
from safetensors.torch import load_file

import toy
from core import backbone, common, run
from core.common import UserError, World

WORLD = World(0, 1, torch.device("cpu"))


@dataclasses.dataclass
class Config:
    out: str
    device: str = "auto"
    dtype: str = "fp32"
    lr: float = 0.1
    steps: int = 10
    cooldown: float = 0.0
    nfe: int = 4
    log_every: int = 1
    keep_state: bool = True
    track: str = ""
    MEASURES = ("nfe",)


@dataclasses.dataclass
class Forked(Config):
    atom: float = 0.0


def make(cfg, result=None, identity=None):
    """A run in cfg.out with a state of cfg.steps; finished if there is a result."""
    started = run.Run(cfg, WORLD, identity or {"base": "b"})
    started.save(cfg.steps, run.Clock(), [torch.nn.Linear(1, 1)], [])
    if result:
        started.finish(result, "## A\n\ntext\n")
    else:
        started.unlock()
    return started


# ------------------------------------------------------------------------------------------- the same run, or not
def test_flags_that_are_no_part_of_a_run(tmp_path, capsys):
    out = str(tmp_path / "r")
    make(Config(out), {"x": 1})
    same = [{}, dict(device="cuda"), dict(log_every=7), dict(keep_state=False), dict(track="wandb")]
    assert all(run.finished(Config(out, **more), {"base": "b"})["x"] == 1 for more in same)
    assert capsys.readouterr().out == ""
    assert run.finished(Config(out, nfe=8), {"base": "b"})["x"] == 1               # only measured otherwise: said
    assert "measured otherwise (nfe = 4 there, 8 here)" in capsys.readouterr().out
    assert run.finished(Config(out, lr=0.2), {"base": "b"}) is None
    assert run.finished(Config(out), {"base": "other"}) is None and run.finished(Config(out), {}) is None
    assert run.finished(Config(str(tmp_path / "none")), {"base": "b"}) is None
    again = run.Run(Config(out, nfe=8), WORLD, {"base": "b"})                      # measured again, by other flags
    again.finish({"x": 2})
    assert run.finished(Config(out, nfe=8), {"base": "b"})["x"] == 2 and capsys.readouterr().out == ""
    assert run.finished(Config(out), {"base": "b"})["x"] == 2
    assert "nfe = 8 there, 4 here" in capsys.readouterr().out
    (tmp_path / "r" / "result.json").unlink()
    assert run.finished(Config(out), {"base": "b"}) is None


def test_a_forks_new_flag_leaves_finished_runs_valid(tmp_path):
    out = str(tmp_path / "r")
    make(Config(out), {"x": 1})
    assert run.finished(Forked(out), {"base": "b"})["x"] == 1
    assert run.differences(Forked(out, atom=0.5), {"base": "b"}) == {"atom": (0.0, 0.5)}
    with pytest.raises(UserError, match=r"another run \(atom = 0.0 there, 0.5 here\)"):
        run.Run(Forked(out, atom=0.5), WORLD, {"base": "b"})
    run.Run(Forked(out), WORLD, {"base": "b"}).unlock()                            # and the refusal held no lock


def test_a_flag_taken_out_leaves_runs_valid_that_did_not_use_it(tmp_path):
    make(Forked(str(tmp_path / "plain")), {"x": 1})
    assert run.finished(Config(str(tmp_path / "plain")), {"base": "b"})["x"] == 1
    make(Forked(str(tmp_path / "fork"), atom=0.5), {"x": 2})
    assert run.differences(Config(str(tmp_path / "fork")), {"base": "b"}) == {"atom": (0.5, 0.0)}
    about = run.read_json(tmp_path / "fork" / "config.json")                       # as a run before defaults were kept
    del about["dihal"]["defaults"]
    run.write_json(tmp_path / "fork" / "config.json", about)
    assert run.differences(Config(str(tmp_path / "fork")), {"base": "b"}) == {"atom": (0.5, None)}


def test_folders_that_are_no_run(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="is no run"):
        run.Run(Config(str(tmp_path / "full")), WORLD, {})
    assert os.listdir(tmp_path / "full") == ["thesis.tex"]
    (tmp_path / "killed").mkdir()                                                  # before config.json was whole
    (tmp_path / "killed" / ".config.json.7.tmp").write_text("{")
    run.Run(Config(str(tmp_path / "killed")), WORLD, {}).unlock()
    assert sorted(os.listdir(tmp_path / "killed")) == [".lock", "config.json"]     # what was left is swept up


def test_one_run_at_a_time(tmp_path):
    first = run.Run(Config(str(tmp_path / "r")), WORLD, {})
    leftover = tmp_path / "r" / ".state.pt.1.tmp"                                  # the first is writing it
    leftover.write_text("half")
    for more in ({}, dict(lr=0.2)):
        with pytest.raises(UserError, match="in use"):
            run.Run(Config(str(tmp_path / "r"), **more), WORLD, {})
    assert leftover.exists()
    first.unlock()
    run.Run(Config(str(tmp_path / "r")), WORLD, {}).unlock()
    assert not leftover.exists()


# -------------------------------------------------------------------------------------------------- more steps
def test_a_finished_run_goes_on_to_more_steps(tmp_path):
    out = tmp_path / "r"
    make(Config(str(out)), {"x": 1})
    run.write_json(out / "config.json", {"model_type": "qwen3", **run.read_json(out / "config.json")})
    longer = Config(str(out), steps=30)
    assert run.finished(longer, {"base": "b"}) is None
    grown = run.Run(longer, WORLD, {"base": "b"})
    assert not (out / "result.json").exists() and run.read_json(out / "result_10.json")["x"] == 1
    config = run.read_json(out / "config.json")
    assert config["model_type"] == "qwen3" and config["dihal"]["config"]["steps"] == 30    # a saved model stays one
    assert grown.resume([torch.nn.Linear(1, 1)], [])["step"] == 10
    grown.finish({"x": 3}, "## A\n")
    assert run.finished(longer, {"base": "b"})["x"] == 3 and run.finished(Config(str(out)), {"base": "b"}) is None


@pytest.mark.parametrize("first, more, state, words", [
    (dict(), dict(steps=5), True, "10 steps, which is more than --steps 5"),
    (dict(cooldown=0.5), dict(steps=20, cooldown=0.5), True, "learning rate was to end there"),
    (dict(), dict(steps=20), False, "kept no state"),
    (dict(), dict(steps=20, lr=0.2), True, r"another run \(lr = 0.1 there, 0.2 here, steps = 10 there, 20 here\)"),
    (dict(cooldown=0.5), dict(steps=20), True, "another run"),                     # and not: constant from here on
])
def test_what_may_not_go_on(tmp_path, first, more, state, words):
    out = tmp_path / "r"
    make(Config(str(out), **first), {"x": 1})
    if not state:
        (out / "state.pt").unlink()
    before = {f.name: f.read_bytes() for f in out.iterdir()}
    with pytest.raises(UserError, match=words):
        run.Run(Config(str(out), **more), WORLD, {"base": "b"})
    assert {f.name: f.read_bytes() for f in out.iterdir()} == before


def test_a_run_without_a_state_of_its_own_is_another_at_other_steps(tmp_path):
    @dataclasses.dataclass
    class Study:
        out: str
        steps: int = 10
    run.Run(Study(str(tmp_path / "s")), WORLD, {}).finish({"x": 1})
    with pytest.raises(UserError, match=r"another run \(steps = 10 there, 20 here\)"):
        run.Run(Study(str(tmp_path / "s"), steps=20), WORLD, {})


def test_a_run_that_was_stopped_goes_on_too(tmp_path):
    make(Config(str(tmp_path / "r")))
    run.Run(Config(str(tmp_path / "r"), steps=20), WORLD, {"base": "b"}).unlock()
    (tmp_path / "r" / "state.pt").unlink()                                         # killed before its first save
    run.Run(Config(str(tmp_path / "r"), steps=40), WORLD, {"base": "b"}).unlock()
    assert not list((tmp_path / "r").glob("result*"))


@pytest.mark.parametrize("moment", ["before the result moves", "before the config", "after both"])
def test_a_kill_while_a_run_grows_loses_nothing(tmp_path, monkeypatch, moment):
    """At no moment does the shorter run's result stand for the longer one, and both can go on afterwards."""
    out = tmp_path / "r"
    make(Config(str(out)), {"x": 1})

    class Kill(BaseException):
        pass

    def kill(*_):
        raise Kill
    with monkeypatch.context() as patch:
        if moment == "before the result moves":
            patch.setattr(run.os, "replace", kill)
        elif moment == "before the config":
            patch.setattr(run, "write_json", kill)
        else:
            patch.setitem(run.TRACKERS, "", kill)
        with pytest.raises(Kill):
            run.Run(Config(str(out), steps=30), WORLD, {"base": "b"})
    results = [f for f in out.glob("result*.json") if run.read_json(f)["x"] == 1]
    assert len(results) == 1 and (out / "state.pt").exists()                       # what it had is there, once
    assert run.finished(Config(str(out), steps=30), {"base": "b"}) is None
    short = run.finished(Config(str(out)), {"base": "b"})
    assert (short == run.read_json(out / "result.json")) if moment == "before the result moves" else short is None
    if moment == "before the config":                                              # it is the shorter run, unfinished
        run.Run(Config(str(out)), WORLD, {"base": "b"}).finish({"x": 1}, "")
        assert run.finished(Config(str(out)), {"base": "b"})["x"] == 1
    grown = run.Run(Config(str(out), steps=30), WORLD, {"base": "b"})
    assert grown.resume([torch.nn.Linear(1, 1)], [])["step"] == 10
    grown.finish({"x": 3})
    assert run.finished(Config(str(out), steps=30), {"base": "b"})["x"] == 3
    assert run.read_json(out / "result_10.json")["x"] == 1


# ------------------------------------------------------------------------------------------ sections, resuming
def test_a_section_of_another_run_is_refused(tmp_path):
    out = tmp_path / "r"
    make(Config(str(out)), {"x": 1})
    assert run.read_section(out) == "## A\n\ntext\n"
    (out / "section.md").write_text("## A\n\nother text\n")
    with pytest.raises(UserError, match="was not written by the run beside it"):
        run.read_section(out)
    (out / "section.md").unlink()
    with pytest.raises(UserError, match="is missing"):
        run.read_section(out)
    (out / "result.json").unlink()
    with pytest.raises(UserError, match="finish that run first"):
        run.read_section(out)


def test_another_device_or_number_of_processes_is_said(tmp_path, capsys):
    out, model = tmp_path / "r", torch.nn.Linear(2, 2)
    make(Config(str(out)))
    state = torch.load(out / "state.pt", weights_only=True)
    torch.save({**state, "device": "cuda", "processes": 2, "modules": [model.state_dict()]}, out / "state.pt")
    resumed, into = run.Run(Config(str(out)), WORLD, {"base": "b"}), torch.nn.Linear(2, 2)
    assert resumed.resume([into], [])["step"] == 10 and torch.equal(into.weight, model.weight)
    said = capsys.readouterr().out
    assert "on cpu instead of cuda: noise drawn from here on is another" in said
    assert "on 1 processes instead of 2" in said
    (out / "state.pt").write_bytes(b"not a state")
    with pytest.raises(UserError, match="damaged"):
        resumed.resume([into], [])
    (out / "state.pt").unlink()
    assert resumed.resume([into], []) == {"step": 0, "seconds": 0.0}
    resumed.unlock()


def test_the_log_has_a_line_for_people_and_one_for_programs(tmp_path, capsys):
    cfg, seen = Config(str(tmp_path / "r")), []
    run.TRACKERS["memory"] = lambda cfg: (lambda step, values: seen.append((step, values)), lambda: seen.append("end"))
    sys.modules["memory"] = types.ModuleType("memory")
    try:
        logged = run.Run(dataclasses.replace(cfg, track="memory"), WORLD, {})
        logged.log(3, 10, loss=0.5, lr=1e-3, bad=float("nan"), bins=[1, 2])
        logged.finish({"x": 1})
    finally:
        del run.TRACKERS["memory"], sys.modules["memory"]
    assert "step 00003/00010 | loss 0.5000 | lr 1.0e-03 | bad nan" in capsys.readouterr().out
    line = json.loads((tmp_path / "r" / "log.jsonl").read_text())
    assert line == {"step": 3, "loss": 0.5, "lr": 1e-3, "bad": None, "bins": [1, 2]}
    assert seen == [(3, {"loss": 0.5, "lr": 1e-3}), "end"]                         # numbers only, and it was closed


# ---------------------------------------------------------------------------------------------------- tracking
def test_wandb_gets_the_values_of_the_log(tmp_path, monkeypatch):
    calls = []
    stub = types.ModuleType("wandb")
    stub.init = lambda **how: calls.append(how) or types.SimpleNamespace(
        log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("finished"))
    monkeypatch.setitem(sys.modules, "wandb", stub)
    tracked = run.Run(Config(str(tmp_path / "r"), track="wandb"), WORLD, {})
    tracked.log(5, 10, loss=0.25, bins=[1])
    with pytest.raises(SystemExit):
        tracked.leave(5)
    assert calls[0]["project"] == "nanodihal" and calls[0]["config"]["lr"] == 0.1
    assert calls[1:] == [(5, {"loss": 0.25}), "finished"]


def test_a_missing_tracker_is_a_sentence_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)                                # as if it were not installed
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None)
    for name, words in (("wandb", "pip install wandb"), ("mlflow", "there are , wandb, tensorboard")):
        with pytest.raises(UserError, match=words):
            run.Run(Config(str(tmp_path / "r"), track=name), WORLD, {})
    assert not (tmp_path / "r").exists()


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard", reason="an optional package: pip install tensorboard")
    tracked = run.Run(Config(str(tmp_path / "r"), track="tensorboard"), WORLD, {})
    tracked.log(5, 10, loss=0.25)
    tracked.unlock()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(tmp_path / "r" / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(5, 0.25)]


def test_a_model_card(tmp_path):
    run.card(tmp_path, "A bridge", "Qwen/Qwen3-0.6B", {"fvu": 0.01925, "parameters": 1_234_567})
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("---\nbase_model: Qwen/Qwen3-0.6B\nlibrary_name: transformers\n")
    assert "\n# A bridge\n" in text
    assert "- fvu: 0.01925\n- parameters: 1,234,567\n" in text and f"`{run.command()}`" in text
    run.card(tmp_path, "A bridge", str(tmp_path), {})
    assert "base_model" not in (tmp_path / "README.md").read_text()                # a local folder is no id of the Hub


# ---------------------------------------------------------------------------------------------------- replicas
@pytest.mark.parametrize("change", ["sign", "place", "tensors", "last bit", "nan", None])
def test_replicas_are_compared_by_tensor_and_chunk(monkeypatch, change):
    """Two processes one after the other: the second meets the largest checksums of both."""
    torch.manual_seed(0)
    first = [torch.randn(7, 5), torch.randn(()), torch.randn(40).to(torch.bfloat16), torch.randn(7, 5).T]
    second, met = [p.clone() for p in first], []
    if change == "sign":
        second[0][1, :2] = torch.tensor([-1.0, 1.0]) * first[0][1, :2]
    elif change == "place":                                                        # across a border of chunks
        second[2][[7, 9]] = first[2][[9, 7]]
    elif change == "tensors":
        second[0], second[3] = first[3].T.clone(), first[0].T.clone()
    elif change == "last bit":
        second[3][0, 6] = torch.nextafter(first[3][0, 6], torch.tensor(9.0))
    elif change == "nan":
        second[1].fill_(torch.nan)

    def all_reduce(both, op):
        assert op == common.dist.ReduceOp.MAX and both.dtype == torch.float64
        met.append(both.clone())
        both.copy_(torch.maximum(met[0], both))
    monkeypatch.setattr(common.dist, "all_reduce", all_reduce)
    world = World(0, 2, torch.device("cpu"))
    common.check_replicas(first, world, chunk=8)
    assert len(met[0]) == 5 + 1 + 5 + 5
    if change is None:
        common.check_replicas(second, world, chunk=8)
    else:
        with pytest.raises(UserError, match="no longer hold the same weights"):
            common.check_replicas(second, world, chunk=8)


# -------------------------------------------------------------------------------------------------- with the toy
@pytest.fixture(scope="module")
def small(tmp_path_factory, text):
    """Flags of the smallest toy; its shards are made once."""
    folder = tmp_path_factory.mktemp("toys")
    return folder, ["--preset", "tiny", "--data", str(text), "--layers", "1", "--log_every", "5", "--eval_every", "100"]


def test_the_toy_grown_equals_the_toy_trained_at_once(small):
    """Bit for bit, and its card, section and log stay with it."""
    folder, flags = small
    constant = [*flags, "--cooldown", "0"]
    toy.main([*constant, "--steps", "12", "--out", f"{folder}/once"])
    first = toy.main([*constant, "--steps", "7", "--keep_state", "--out", f"{folder}/grown"])
    grown = toy.main([*constant, "--steps", "12", "--out", f"{folder}/grown"])
    once, twice = (load_file(folder / name / "model.safetensors") for name in ("once", "grown"))
    assert once.keys() == twice.keys() and all(torch.equal(once[k], twice[k]) for k in once)
    assert run.read_json(folder / "grown" / "result_7.json")["val_loss"] == first["val_loss"] != grown["val_loss"]
    assert not (folder / "grown" / "state.pt").exists()                            # not asked for this time
    assert run.read_section(folder / "grown") == toy.section(grown) != toy.section(first)
    assert f"{grown['bits_per_byte']:.4g}" in (folder / "grown" / "README.md").read_text()
    steps = [json.loads(line)["step"] for line in (folder / "grown" / "log.jsonl").read_text().splitlines()]
    assert steps == [5, 7, 10, 12]


def test_the_toys_default_schedule_does_not_grow(small, capsys):
    folder, flags = small
    argv = [*flags, "--steps", "5", "--keep_state", "--out", f"{folder}/cooled"]
    result = toy.main(argv)
    assert "learning rate was to end there" in fails(capsys, toy.main, *argv, "--steps", "9")
    assert "in [0, 1]" in fails(capsys, toy.main, *argv, "--cooldown", "1.5")
    assert toy.main(argv) == result                                                # the run is as it was


def test_a_failing_last_validation_loses_no_step(small, monkeypatch, capsys):
    folder, flags = small
    argv = [*flags, "--steps", "8", "--save_every", "100", "--out", f"{folder}/failed"]

    def fail(*_):
        raise UserError("out of memory")
    with monkeypatch.context() as patch:
        patch.setattr(toy, "evaluate", fail)
        assert "out of memory" in fails(capsys, toy.main, *argv)
    assert torch.load(folder / "failed" / "state.pt", weights_only=True)["step"] == 8
    toy.main(argv)
    assert "resuming at step 8" in capsys.readouterr().out
    toy.main([*argv[:-1], f"{folder}/whole"])
    a, b = (load_file(folder / name / "model.safetensors") for name in ("failed", "whole"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_saving_a_model_leaves_its_card_alone(small):
    folder, flags = small
    toy.main([*flags, "--steps", "1", "--out", f"{folder}/carded"])
    card, config = (folder / "carded" / "README.md").read_text(), run.read_json(folder / "carded" / "config.json")
    lm = backbone.load(f"{folder}/carded", torch.device("cpu"), torch.float32)
    backbone.save_model(lm.model, backbone.load_tokenizer(f"{folder}/carded"), folder / "carded")
    assert (folder / "carded" / "README.md").read_text() == card and "base_model" not in card
    assert run.read_json(folder / "carded" / "config.json")["dihal"] == config["dihal"]
    assert toy.main([*flags, "--steps", "1", "--out", f"{folder}/carded"])["seed"] == 0     # and it is a run still
