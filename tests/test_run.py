"""Flags, run folders and the optimizer: the plumbing that every stage shares."""
import importlib
import json
import os
import re
import sys
import types
from dataclasses import dataclass, replace
from typing import Literal

import pytest
import torch
from conftest import fails
from test_house import parse as parse_toy
from test_house import pipeline

from core import common, optim, run
from core.common import UserError, World, entry, parse

WORLD = World(0, 1, torch.device("cpu"))


@dataclass
class Config:
    # run
    preset: Literal["auto", "small", "large"] = "auto"  # by size
    out: str = ""           # folder
    lr: float = 0.1         # rate, at 100% of the peak
    nfes: tuple[int, ...] = (1, 4)  # calls
    seed: int = 0
    skip: int = 4           # first positions (0: none)
    # report
    steps: int = 10         # steps
    on: bool = False        # a switch
    log_every: int = 1
    track: Literal[tuple(run.TRACKERS)] = ""  # tracker


@dataclass
class Forked(Config):
    atom: float = 0.0


PRESETS = {"small": dict(steps=3, nfes=(2,)), "large": dict(steps=1000)}


def read(*argv):
    def choose(cfg):
        return "small" if cfg.preset == "auto" else cfg.preset
    return parse(Config, argv, "A stage.", PRESETS, choose)


# --------------------------------------------------------------------------------------------------
# Flags

def test_field_then_preset_then_flag():
    assert read() == Config(preset="small", steps=3, nfes=(2,))
    assert read("--preset", "large", "--lr", "1e-3").steps == 1000
    cfg = read("--steps", "7", "--nfes", "1", "8", "--on")
    assert cfg.steps == 7 and cfg.nfes == (1, 8) and cfg.on
    assert read("--no-on", "--nfes").nfes == ()
    assert parse(Config, []) == Config()


def test_help_shows_what_the_preset_gives(capsys):
    with pytest.raises(SystemExit) as stopped:
        read("--help", "--lr", "0.5")
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    assert "steps [3 by preset small]" in text and "calls [(2,) by preset small]" in text
    assert "at 100% of the peak [0.5]" in text and "a switch [False]" in text
    _, run_flags, report_flags = re.split(r"\nrun:|\nreport:", text)
    assert "--lr" in run_flags and "--steps" in report_flags


def test_a_plain_dry_run_prints_the_settings(capsys):
    with pytest.raises(SystemExit):
        read("--dry_run", "--lr", "0.5")
    assert "  lr = 0.5\n" in capsys.readouterr().out


@pytest.mark.parametrize("argv, words", [
    (["--step", "3"], "unknown argument --step, did you mean --steps?"),
    (["--dry-run"], "did you mean --dry_run?"),
    (["--zzz"], "unknown argument --zzz; see --help"),
    (["--steps", "0"], "--steps must be at least 1"),       # steps // 0, an empty mean
    (["--log_every", "-1"], "--log_every must be at least 1"),
    (["--seed", "-1"], "--seed must be at least 0"),
    (["--skip", "-1"], "--skip must be at least 0"),
    (["--steps", "x"], "invalid int value"),
    (["--preset", "huge"], "invalid choice"),
])
def test_a_wrong_flag_is_one_sentence(argv, words):
    with pytest.raises(UserError) as refused:
        read(*argv)
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_zero_is_taken_where_it_means_something():
    cfg = read("--skip", "0", "--seed", "0", "--lr", "0")
    assert (cfg.skip, cfg.seed, cfg.lr) == (0, 0, 0.0)


def test_a_batch_splits_or_is_refused():
    world = World(1, 2, torch.device("cpu"))
    assert common.split_batch(8, 2, world) == (range(4, 8), 2)
    assert common.split_batch(8, 0, world) == (range(4, 8), 4)
    for batch_size, micro_batch in ((7, 0), (8, 3)):
        with pytest.raises(UserError, match="does not split over 2 processes"):
            common.split_batch(batch_size, micro_batch, world)


def test_lookups_and_devices():
    assert common.pick({"a": 1}, "a", "--x") == 1
    with pytest.raises(UserError, match="--x b is unknown; known are a"):
        common.pick({"a": 1}, "b", "--x")
    with pytest.raises(UserError, match="--device gpu is unknown"):
        common.setup("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="torch sees no GPU"):
            common.setup("cuda")


@pytest.mark.parametrize("error, code, words", [
    (UserError("no text; pass --data"), 2, "error: no text; pass --data"),
    (AssertionError("--skip is\ntoo large"), 2, "error: --skip is too large\n"),
    (OSError(28, "No space left on device", "x.pt"), 2, "error: [Errno 28] No space left on device"),
    (KeyboardInterrupt(), 130, "the same command starts again"),
])
def test_entry_turns_an_expected_error_into_a_sentence(capsys, error, code, words):
    @entry
    def main(argv):
        raise error
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == code and words in capsys.readouterr().err


@pytest.mark.parametrize("bug", [KeyError("a bug"), AssertionError()])
def test_a_bug_is_seen_whole(bug):
    @entry
    def main(argv):
        raise bug
    with pytest.raises(type(bug)):
        main([])


def test_the_message_of_a_library_stays_whole():
    url = "https://huggingface.co/" + "a-long-name/" * 40 + "resolve/main/config.json"
    assert common.why(OSError(f"Not found:\n  {url}.\n")) == f"Not found: {url}."


BARE = ["toy", "geometry", "bridge", "bridge --objective regression", "bridge --generate", "hybrid",
        "repr_align", "repr_align --align_weight 0", "generate", "circuits"]


def test_a_bare_command_asks_for_a_run_that_run_all_made(tmp_path):
    """So it prints the finished result. The folders of an empty --out have their own tests."""
    made = [line.rstrip("\t").split("\t") for line in pipeline(tmp_path) if ".py\t" in line]
    for command in BARE:
        name, *flags = command.split()
        stage = importlib.import_module(name)
        asked = replace(parse_toy(stage, flags), out="")
        runs = [parse_toy(stage, argv) for script, *argv in made if script == f"{name}.py"]
        assert asked in [replace(cfg, out="") for cfg in runs], command


def test_random_numbers_are_functions_of_their_keys():
    a = common.normal((3,), WORLD.device, 0, "noise", 1, 2)
    assert torch.equal(a, common.normal((3,), WORLD.device, 0, "noise", 1, 2))
    assert a.tolist() == pytest.approx([-0.216754, 0.273201, 0.278012], abs=1e-5)
    others = [(1, "noise", 1, 2), (0, "t", 1, 2), (0, "noise", 2, 1), (0, "noise", 1, 2, 0)]
    assert all(not torch.equal(a, common.normal((3,), WORLD.device, *key)) for key in others)


# --------------------------------------------------------------------------------------------------
# The same run, or another

def make(cfg, result=None, identity=None):
    """A run in cfg.out with a state at step 3; finished if there is a result."""
    started = run.Run(cfg, WORLD, identity or {"base": "b"})
    started.clock = run.Clock()
    for _ in started.steps(0, 1):
        started.save(True, 3, [torch.nn.Linear(1, 1)], [], curve=[1.0])
    if result:
        started.finish(result)
    else:
        started.unlock()


def test_some_flags_never_make_another_run(tmp_path):
    cfg = Config(out=str(tmp_path / "r"))
    make(cfg, {"x": 1})
    for change in ({}, {"log_every": 7}, {"track": "wandb"}, {"preset": "small"}):
        assert run.finished(replace(cfg, **change), {"base": "b"})["x"] == 1
    assert run.finished(replace(cfg, lr=0.2), {"base": "b"}) is None
    assert run.finished(cfg, {"base": "other"}) is None
    assert run.finished(cfg, {}) is None
    assert run.finished(Config(out=str(tmp_path / "none")), {"base": "b"}) is None
    assert not (tmp_path / "none").exists()
    os.rename(tmp_path / "r", tmp_path / "moved")
    assert run.finished(replace(cfg, out=str(tmp_path / "moved")), {"base": "b"})["x"] == 1


def test_another_run_is_refused(tmp_path):
    cfg = Config(out=str(tmp_path / "r"))
    make(cfg)
    words = r"another run \(lr = 0.1 there, 0.2 here; steps = 10 there, 5 here\)"
    with pytest.raises(UserError, match=words):
        run.Run(replace(cfg, lr=0.2, steps=5), WORLD, {"base": "b"})
    run.Run(cfg, WORLD, {"base": "b"}).unlock()                 # the refusal holds no lock


def test_a_flag_that_one_side_does_not_know_counts_as_its_default(tmp_path):
    out = str(tmp_path / "r")
    make(Config(out=out), {"x": 1})
    assert run.finished(Forked(out=out), {"base": "b"})["x"] == 1
    assert run.finished(Forked(out=out, atom=0.5), {"base": "b"}) is None
    fork = str(tmp_path / "fork")
    make(Forked(out=fork, atom=0.5), {"x": 2})
    assert run.finished(Config(out=fork), {"base": "b"}) is None
    plain = str(tmp_path / "plain")
    make(Forked(out=plain), {"x": 3})
    assert run.finished(Config(out=plain), {"base": "b"})["x"] == 3


def test_a_folder_of_the_second_edition_is_refused(tmp_path, capsys):
    run.write_json(tmp_path / "config.json", {"dihal": {"config": {"lr": 0.1}, "defaults": {}}})
    run.write_json(tmp_path / "result.json", {"x": 1})

    @entry
    def main(argv):
        run.finished(Config(out=str(tmp_path)), {})
    message = fails(capsys, main)
    assert "was written by the second edition (commit d080e9e)" in message
    with pytest.raises(UserError, match="second edition"):
        run.Run(Config(out=str(tmp_path)), WORLD, {})


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="is missing; .*full is not a run"):
        run.Run(Config(out=str(tmp_path / "full")), WORLD, {})
    assert (tmp_path / "full" / "thesis.tex").read_text() == "precious"
    killed = tmp_path / "killed"                                # before config.json was whole
    killed.mkdir()
    (killed / ".config.json.7.tmp").write_text("{")
    run.Run(Config(out=str(killed)), WORLD, {}).unlock()
    assert sorted(os.listdir(killed)) == [".lock", "config.json"]


def test_one_run_at_a_time(tmp_path):
    cfg = Config(out=str(tmp_path))
    first = run.Run(cfg, WORLD, {})
    with pytest.raises(UserError, match="in use"):
        run.Run(cfg, WORLD, {})
    first.unlock()
    run.Run(cfg, WORLD, {}).unlock()


def test_beside(tmp_path):
    (tmp_path / "geometry").mkdir()
    (tmp_path / "geometry" / "result.json").write_text("{}")
    assert run.nearby(tmp_path / "bridge", "geometry") == tmp_path / "geometry"
    assert run.nearby(tmp_path / "convert" / "w0", "geometry") == tmp_path / "geometry"
    assert run.nearby(tmp_path / "bridge", "data") == tmp_path / "data"


# --------------------------------------------------------------------------------------------------
# State

def train(cfg, steps):
    """A tiny training that uses the run as every stage does. Returns the weights."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"blocks": torch.nn.Linear(8, 4), "head": torch.nn.Linear(4, 2)})
    optimizers = optim.build(model.named_parameters(), 0.02, 1e-3, 0.1)
    started = run.Run(cfg, WORLD, {})
    state = started.resume([model], optimizers)
    for step in started.steps(state["step"], steps):
        x = common.normal((16, 8), WORLD.device, 0, "batch", step)
        loss = model["head"](model["blocks"](x)).square().mean()
        loss.backward()
        optim.step_all(optimizers, optim.share_at(step, cfg.steps, 2), 1.0)
        started.log(step + 1, cfg.steps, loss=loss.item(), bins=[1, 2])
        started.save(step + 1 == steps, step + 1, [model], optimizers)
    if steps == cfg.steps:
        result = started.finish({"steps": steps, "loss": loss.item()})
        assert result == run.read_json(started.out / "result.json")
    else:
        started.unlock()
    return model.state_dict()


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, capsys):
    whole = train(Config(out=str(tmp_path / "whole")), 10)
    train(Config(out=str(tmp_path / "parts")), 4)
    parts = train(Config(out=str(tmp_path / "parts")), 10)
    assert "resuming at step 4" in capsys.readouterr().out
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert not (tmp_path / "parts" / "state.pt").exists()
    lines = (tmp_path / "parts" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 11))
    assert json.loads(lines[0])["bins"] == [1, 2]


def test_every_number_of_a_log_line_has_a_unit(tmp_path, capsys):
    started = run.Run(Config(out=str(tmp_path)), WORLD, {})
    started.clock = run.Clock(2.0)
    started.progress(5, 10, tokens=100, flops=1.0, loss=0.5)
    started.unlock()
    words = re.findall(r"\| (\w+) ([\d.]+)", capsys.readouterr().out)
    assert [name for name, _ in words] == ["loss", "tokens_per_s", "mem_gib", "eta_s"]
    numbers = {name: float(number) for name, number in words}
    assert numbers["tokens_per_s"] == pytest.approx(250, rel=0.1)       # 5 steps in 2 seconds
    assert numbers["eta_s"] == pytest.approx(2, rel=0.1) and numbers["mem_gib"] > 0


def test_the_state_keeps_what_save_was_given(tmp_path):
    cfg = Config(out=str(tmp_path))
    make(cfg)
    started = run.Run(cfg, WORLD, {"base": "b"})
    assert started.resume([torch.nn.Linear(1, 1)], [])["curve"] == [1.0]
    started.unlock()


def test_a_damaged_state_is_a_sentence(tmp_path):
    cfg = Config(out=str(tmp_path))
    make(cfg)
    whole = (tmp_path / "state.pt").read_bytes()
    started = run.Run(cfg, WORLD, {"base": "b"})
    for damaged in (b"", b"text", whole[:len(whole) // 2]):
        (tmp_path / "state.pt").write_bytes(damaged)
        with pytest.raises(UserError, match="state.pt is damaged; delete it"):
            started.resume([torch.nn.Linear(1, 1)], [])
    started.unlock()


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    run.write_text(tmp_path / "a", "old")
    with pytest.raises(ValueError), run.atomic(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise ValueError
    assert (tmp_path / "a").read_text() == "old" and os.listdir(tmp_path) == ["a"]
    for text in ("{", None):
        file = tmp_path / ("damaged" if text else "missing")
        if text:
            file.write_text(text)
        with pytest.raises(UserError, match=f"is {file.name}; train first"):
            run.read_json(file, "train first")


def test_a_full_disk_keeps_the_last_state(tmp_path, monkeypatch, capsys):
    cfg = Config(out=str(tmp_path))
    make(cfg)
    before = (tmp_path / "state.pt").read_bytes()

    honest = torch.save

    def full(state, file):
        with open("/dev/full", "wb") as device:
            honest(state, device)

    @entry
    def main(argv):
        for _ in started.steps(0, 1):
            started.save(True, 5, [torch.nn.Linear(200, 200)], [])
    started = run.Run(cfg, WORLD, {"base": "b"})
    started.clock = run.Clock()
    monkeypatch.setattr(run.torch, "save", full)
    assert "No space left on device; free some space" in fails(capsys, main)
    started.unlock()
    assert (tmp_path / "state.pt").read_bytes() == before
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize("number, code", [(15, 143), (2, 130)])
def test_a_signal_saves_and_leaves_and_a_second_one_is_ignored(tmp_path, number, code):
    started = run.Run(Config(out=str(tmp_path)), WORLD, {})
    started.resume([], [])
    with pytest.raises(SystemExit) as stopped:
        for step in started.steps(0, 10):
            started.save(False, step, [], [])
            for _ in range(3 * (step == 5)):
                common.signal.raise_signal(number)
    started.stop.done()
    assert stopped.value.code == code
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 6
    assert common.signal.getsignal(common.signal.SIGINT) is common.signal.default_int_handler


# --------------------------------------------------------------------------------------------------
# Tracking, cost

def test_wandb_continues_the_same_run_and_gets_the_final_numbers(tmp_path, monkeypatch):
    calls = []

    def init(**options):
        calls.append(options)
        return types.SimpleNamespace(log=lambda numbers, step: calls.append((step, numbers)),
                                     finish=lambda: calls.append("finished"))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    cfg = Config(out=str(tmp_path / "r"), track="wandb")
    first = run.Run(cfg, WORLD, {})
    first.log(5, 10, loss=0.25, bins=[1])
    with pytest.raises(SystemExit):
        first.leave(5)
    measured = {"4": {"kl": 0.125, "kl_rows": [0.125]}}
    run.Run(cfg, WORLD, {}).finish({"val_loss": 0.5, "steps": 10, "nfe": measured})
    assert calls[0]["id"] == calls[3]["id"] and calls[0]["resume"] == "allow"
    assert calls[1:3] == [(5, {"loss": 0.25}), "finished"]
    assert calls[4:] == [(10, {"val_loss": 0.5, "nfe.4.kl": 0.125}), "finished"]


def test_a_missing_package_is_a_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)

    @entry
    def main(argv):
        run.Run(Config(out=str(tmp_path), track="wandb"), WORLD, {})
    assert "install it with: pip install wandb" in fails(capsys, main)


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard", reason="an optional package: pip install tensorboard")
    tracked = run.Run(Config(out=str(tmp_path), track="tensorboard"), WORLD, {})
    tracked.log(5, 10, loss=0.25)
    tracked.unlock()
    assert list((tmp_path / "tensorboard").iterdir())


def test_plan(capsys):
    memory = {"weights": 4e9, "optimizer": 2e9, "activations": 1e9}
    cost = run.plan(Config(), World(0, 8, WORLD.device), parameters=10 ** 9, flops_per_token=6e9,
                    tokens=10 ** 9, memory=memory)
    assert cost == {"gigabytes": 7.0, "flops_per_token": 6e9}
    text = capsys.readouterr().out
    assert "7.0 GB (weights 4.00, optimizer 2.00, activations 1.00)" in text
    assert "0.53 hours on 8 H100" in text                       # 6e18 / (0.4 * 989e12 * 8) seconds


# --------------------------------------------------------------------------------------------------
# Optimizers

def test_muons_singular_values():
    for rows, columns in ((24, 64), (64, 24), (48, 48)):        # wide, tall, square
        G = common.normal((3, rows, columns), WORLD.device, 0, "matrix")
        values = torch.linalg.svdvals(optim.orthogonalize(G))
        assert 0.6 < values.min() and values.max() < 1.25


def test_the_short_path_of_wide_matrices_is_the_plain_iteration():
    """By the product of all polynomials, and one product after another in float64."""
    G = common.normal((2, 16, 64), WORLD.device, 0, "matrix")
    X = G.double() / torch.linalg.matrix_norm(G.double(), keepdim=True)
    for _ in range(5):
        A = X @ X.mT
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    assert torch.allclose(optim.orthogonalize(G).double(), X, atol=2e-3)


def test_every_trainable_parameter_is_in_one_optimizer():
    model = torch.nn.ModuleDict({"blocks": torch.nn.Linear(8, 4), "head": torch.nn.Linear(4, 2)})
    frozen = torch.nn.Parameter(torch.zeros(2, 2), requires_grad=False)
    named = [*model.named_parameters(), ("blocks.frozen.weight", frozen)]
    muon, adam = optim.build(named, 0.02, 1e-3, 0.1)
    assert muon.param_groups[0]["params"] == [model["blocks"].weight]
    assert [len(group["params"]) for group in adam.param_groups] == [1, 2]
    assert [group["weight_decay"] for group in adam.param_groups] == [0.1, 0.0]
    assert len(optim.build(named, 0.0, 1e-3, 0.1)) == 1


def test_the_schedule():
    assert [optim.share_at(step, 10, 4, 0.5) for step in (0, 3, 5, 6, 9)] == [0.25, 1.0, 1.0, 0.8, 0.2]
    assert optim.share_at(9, 10, 0, 0.0) == 1.0


def test_a_gradient_that_is_not_finite_changes_nothing():
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.full((2,), float("nan"))
    with pytest.raises(UserError, match="not finite at step 3"):
        optim.step_all([torch.optim.AdamW([p])], 1.0, float("nan"), "step 3")
    assert p.tolist() == [1.0, 1.0]


def test_a_left_over_world_size_is_one_sentence(tmp_path, capsys, monkeypatch):
    """Clusters leave WORLD_SIZE behind in a shell."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    import toy
    monkeypatch.setenv("RANK", "1")
    assert "unset WORLD_SIZE" in fails(capsys, toy.main, "--preset", "tiny", "--out", tmp_path / "t")
    assert not (tmp_path / "t").exists()
    monkeypatch.delenv("WORLD_SIZE")
    assert common.setup("cpu").main                     # RANK alone makes no second process
