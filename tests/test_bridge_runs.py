"""Runs of bridge.py: pure functions of their config, however they are cut, killed or asked again."""
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, fails, slow, tiny_model
from safetensors.torch import load_file
from test_bridge import B, T, net, states

import bridge
import data
from core import backbone, common, denoiser, diffusion, measure


# ----------------------------------------------------------------------------------------------------- the runs
def command(runs, text, out, *more):
    return ["--preset", "tiny", "--model", f"{runs}/toy", "--data", str(text), "--layer", "2", "--eval_batches", "2",
            "--noise_seeds", "2", "--out", str(out), *more]


def test_result_of_a_run(runs):
    result = json.loads((runs / "bridge" / "result.json").read_text())
    assert set(result["nfe"]) == {"1", "2", "4", "8"} and set(result["nfe"]["4"]) >= {"fvu", "kl", "ce_gap", "agree"}
    info = json.loads((runs / "bridge" / "bridge.json").read_text())
    assert info["layer"] == result["layer"] == json.loads((runs / "geometry" / "result.json").read_text())["best_layer"]
    control = json.loads((runs / "regression" / "result.json").read_text())
    assert set(control["nfe"]) == {"1"} and control["parameters"] == result["parameters"]
    assert 0 < result["nfe"]["4"]["fvu"] < 1.0                                     # better than predicting the mean
    log = [json.loads(line) for line in (runs / "bridge" / "log.jsonl").read_text().splitlines()]
    assert len(log[0]["loss_by_t"]) == 8 and sum(log[0]["count_by_t"]) == 10 * 4
    assert not (runs / "bridge" / "state.pt").exists()


def test_a_better_bridge_measures_better(runs):
    """`measure` on the exact z gives zero; on a constant it gives FVU about 1."""
    from core import backbone
    lm = backbone.load(f"{runs}/toy", torch.device("cpu"), torch.float32)
    rows = data.Tokens(runs / "data", "val", 32).windows(4)
    model, info = denoiser.load(runs / "bridge", torch.device("cpu"))
    layer = info["layer"]

    class Fixed(torch.nn.Module):
        def __init__(self, answer):
            super().__init__()
            self.answer, self.settings = answer, {**model.settings, "objective": "regression"}
            self.standard_z, self.standard_c, self.hidden = model.standard_z, model.standard_c, model.hidden

        def forward(self, x, c, t, *_, **__):
            return self.answer(c)
    cfg = bridge.Config(noise_seeds=1)
    perfect, _ = measure.measure(lm, Fixed(lambda c: model.standard_z(lm.through(
        c * model.sigma_c + model.mu_c, 0, layer))), rows, layer, (1,), cfg)
    assert perfect["1"]["fvu"] < 1e-6 and abs(perfect["1"]["ce_gap"]) < 1e-4 and perfect["1"]["agree"] == 1
    mean, _ = measure.measure(lm, Fixed(torch.zeros_like), rows, layer, (1,), cfg)
    assert mean["1"]["fvu"] == pytest.approx(1, abs=1e-5) and mean["1"]["kl"] > 0
    assert sum(mean["1"]["kl_rows"]) / 4 == pytest.approx(mean["1"]["kl"]) and len(mean["1"]["ce_gap_rows"]) == 4


def test_interrupted_and_resumed_equals_uninterrupted(runs, tmp_path, text, monkeypatch):
    bridge.main(command(runs, text, tmp_path / "straight"))
    steps = iter([False] * 6 + [True])
    with monkeypatch.context() as patch:
        patch.setattr(common.StopSignal, "poll", lambda self: next(steps))
        with pytest.raises(SystemExit) as left:
            bridge.main(command(runs, text, tmp_path / "broken"))
    assert left.value.code == 143 and (tmp_path / "broken" / "state.pt").exists()
    # how often it validates, logs and saves is free to change, and changes nothing
    bridge.main(command(runs, text, tmp_path / "broken", "--eval_every", "3", "--log_every", "2", "--save_every", "5"))
    a, b = (load_file(tmp_path / name / "bridge.safetensors") for name in ("straight", "broken"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_micro_batches_add_up(runs, tmp_path, text):
    whole = bridge.main(command(runs, text, tmp_path / "whole", "--steps", "3", "--log_every", "1"))
    more = ["--steps", "3", "--log_every", "1", "--micro_batch", "1"]
    parts = bridge.main(command(runs, text, tmp_path / "parts", *more))
    assert parts["val_loss"] == pytest.approx(whole["val_loss"], rel=1e-4)
    agree(tmp_path / "whole", tmp_path / "parts")


def same(a, b):
    """Equal bit for bit."""
    one, two = (load_file(folder / "bridge.safetensors") for folder in (a, b))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def agree(a, b):
    """Loss and gradient norm of every step: Muon and Adam would hide a gradient that is off by a factor."""
    one, two = ([json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] for folder in (a, b))
    for key in ("loss", "gnorm"):
        first, second = ([row[key] for row in rows if key in row] for rows in (one, two))
        assert len(first) >= 3 and second == pytest.approx(first, rel=1e-3)


@slow
def test_four_processes_go_on_as_one_would(runs, tmp_path, text, monkeypatch):
    """Started by one process, stopped at step 1 and finished by four, which send their gradients in small buckets
    during backward; against one process that was left alone."""
    bridge.main(command(runs, text, tmp_path / "1", "--steps", "5", "--log_every", "1"))
    one = load_file(tmp_path / "1" / "bridge.safetensors")
    argv = command(runs, text, tmp_path / "4", "--steps", "5", "--save_every", "2", "--log_every", "1", "--overlap",
                   "on", "--bucket_mb", "0.01")
    with monkeypatch.context() as patch:
        patch.setattr(common.StopSignal, "poll", lambda self: True)
        with pytest.raises(SystemExit):
            bridge.main(argv)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "4",
                           "bridge.py", *argv], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    four = load_file(tmp_path / "4" / "bridge.safetensors")
    assert all(torch.allclose(one[k], four[k], atol=2e-5, rtol=1e-4) for k in one)
    assert "on 4 processes instead of 1: equal up to rounding" in done.stdout
    assert json.loads((tmp_path / "4" / "result.json").read_text())["processes"] == 4
    agree(tmp_path / "1", tmp_path / "4")


def test_objectives_and_predictions_train(runs, tmp_path, text):
    for flags in (["--prediction", "v", "--source", "embedding", "--times", "uniform", "--sampler", "ab2"],
                  ["--self_condition", "--t_mean", "1", "--recompute"],
                  ["--objective", "regression", "--head_start", "tokens"], ["--head_start", "ridge"],
                  ["--cooldown", "0.25"]):
        result = bridge.main(command(runs, text, tmp_path / flags[-1], "--steps", "4", *flags))
        assert result["nfe"][max(result["nfe"])]["fvu"] > 0


def test_a_finished_run_prints_and_another_is_refused(runs, tmp_path, capsys, text):
    argv = ["--preset", "tiny", "--data", str(text), "--out", f"{runs}/bridge"]
    capsys.readouterr()
    before = (runs / "bridge" / "result.json").read_text()
    bridge.main(argv)
    assert "is finished" in capsys.readouterr().out and (runs / "bridge" / "result.json").read_text() == before
    assert "lr = 0.02 there, 0.5 here" in fails(capsys, bridge.main, *argv, "--lr", "0.5")


def test_a_finished_run_says_how_it_was_measured(runs, tmp_path, capsys, text):
    """Another sampler, other calls: the run stays as it is; hybrid.py takes other numbers of it."""
    bridge.main(command(runs, text, tmp_path / "a"))
    before = (tmp_path / "a" / "result.json").read_text()
    capsys.readouterr()
    bridge.main(command(runs, text, tmp_path / "a", "--sampler", "ab2", "--nfe", "3"))
    assert "sampler = euler there, ab2 here" in (said := capsys.readouterr().out) and "is finished" in said
    assert (tmp_path / "a" / "result.json").read_text() == before


def test_a_run_may_grow_where_its_schedule_is_constant(runs, tmp_path, capsys, text):
    flat, falling = ["--keep_state"], ["--keep_state", "--cooldown", "1"]
    bridge.main(command(runs, text, tmp_path / "straight", *flat))
    bridge.main(command(runs, text, tmp_path / "grown", *flat, "--steps", "8"))
    bridge.main(command(runs, text, tmp_path / "grown", *flat))
    same(tmp_path / "straight", tmp_path / "grown")
    assert json.loads((tmp_path / "grown" / "result_8.json").read_text())["steps"] == 8
    assert "--steps 4" in fails(capsys, bridge.main, *command(runs, text, tmp_path / "grown", *flat, "--steps", "4"))
    bridge.main(command(runs, text, tmp_path / "ended", *falling, "--steps", "4"))
    assert "--cooldown 0" in fails(capsys, bridge.main, *command(runs, text, tmp_path / "ended", *falling))


def test_the_state_is_saved_before_the_numbers_are_taken(runs, tmp_path, text, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(bridge, "numbers", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            bridge.main(command(runs, text, tmp_path / "a", "--save_every", "999"))
    assert torch.load(tmp_path / "a" / "state.pt", weights_only=True)["step"] == 20
    bridge.main(command(runs, text, tmp_path / "a"))
    bridge.main(command(runs, text, tmp_path / "b"))
    same(tmp_path / "a", tmp_path / "b")


def test_bad_input(runs, tmp_path, capsys, text):
    good = command(runs, text, tmp_path / "x")
    assert "must lie in 1..4" in fails(capsys, bridge.main, *good, "--layer", "5")
    for more in (["--prediction", "v"], ["--source", "embedding"]):
        assert "choose --head_start none" in fails(capsys, bridge.main, *good, "--head_start", "tokens", *more)
    assert "must lie in 1..4" in fails(capsys, bridge.main, *good, "--layer", "0")
    assert "must be auto or a number" in fails(capsys, bridge.main, *good, "--layer", "six")
    assert "--calibration 1" in fails(capsys, bridge.main, *good, "--head_start", "tokens", "--calibration", "1")
    assert "--nfe" in fails(capsys, bridge.main, *good, "--nfe", "0")
    assert "use --micro_batch from [1, 2, 4]" in fails(capsys, bridge.main, *good, "--micro_batch", "3")
    assert "run python geometry.py" in fails(capsys, bridge.main, *good, "--layer", "auto")
    assert "longer than the" in fails(capsys, bridge.main, *good, "--seq_len", "99999")


def test_a_loss_that_is_not_finite(runs, tmp_path, capsys, text, monkeypatch):
    """NaN in slot 2 of step 6, or a finite loss whose gradient is infinite: named, and the last good state stays."""
    honest = bridge.token_loss
    for name in ("nan", "gradient"):
        seen = []

        def broken(net, z, *rest, name=name, seen=seen, **more):
            seen.append(1)
            loss, z_hat = honest(net, z, *rest, **more)
            if len(seen) == 7 and name == "nan":
                return loss * torch.tensor([1, 1, torch.nan, 1])[:, None], z_hat
            if len(seen) == 7:
                return loss + (net.leave.bias.sum() - net.leave.bias.sum().detach()).abs().sqrt(), z_hat  # d sqrt(0)
            return loss, z_hat
        with monkeypatch.context() as patch:
            patch.setattr(bridge, "token_loss", broken)
            message = fails(capsys, bridge.main, *command(runs, text, tmp_path / name, "--save_every", "4"))
        assert "finite at step 6" in message and ("slot 2" in message) == (name == "nan")
        state = torch.load(tmp_path / name / "state.pt", weights_only=True)
        assert state["step"] == 4 and all(v.isfinite().all() for v in state["modules"][0].values())


@pytest.mark.parametrize("family, layers, ffn, vocab, block", [("Llama", 32, 14336, 128256, 218.1e6),
                                                                ("Qwen3", 36, 12288, 151936, 192.9e6)])
def test_dry_run_at_8b_shape(family, layers, ffn, vocab, block, tmp_path, capsys):
    """The design card's command, from a config alone: it fits 80 GB, and no 8B tensor is made."""
    import transformers
    config = getattr(transformers, f"{family}Config")(
        hidden_size=4096, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, vocab_size=vocab, tie_word_embeddings=False)
    config.save_pretrained(tmp_path / "8b")
    argv = f"--preset 8b --layer 6 --random_init --dry_run --dtype bf16 --model {tmp_path}/8b".split()
    size = bridge.main(argv)
    out = capsys.readouterr().out
    assert size["gigabytes"] < 80 and "which fits 80 GB" in out and f"bridge at layer 6 of {layers}" in out
    assert size["parameters"] == pytest.approx(6 * 10 * 4096 ** 2 + 3 * 4096 ** 2, rel=0.01)
    assert size["flops_per_token"] == pytest.approx(6 * size["parameters"] + 2 * 6 * block, rel=0.05)
    assert "GB on one GPU at 32 sequences a pass" in out                         # of eight processes' 256
    assert bridge.main([*argv, "--recompute"])["gigabytes"] < size["gigabytes"]
    bridge.main([*argv, "--batch_size", "32", "--micro_batch", "32"])            # as studies/gpu.sh: of one process
    assert "at 32 sequences a pass" in capsys.readouterr().out


def test_activation_formula_against_a_count():
    """Bytes saved for backward, by hooks, against the 100 W a token and block of the dry run in fp32."""
    def saved(blocks, recompute=False):
        model, held = net(W=64, D=16, H=2, blocks=blocks), {}
        model.recompute = recompute
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                held[storage.data_ptr()] = storage.nbytes()
            return tensor
        z, c, t = states()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            diffusion.token_loss(model, z, c, t, z, 0)
        return sum(held.values())
    assert (saved(3) - saved(2)) / (B * T * 64) == pytest.approx(100, rel=0.1)
    assert (saved(3, True) - saved(2, True)) / (B * T * 64) == pytest.approx(4, rel=0.1)


def test_random_init_needs_only_a_config(tmp_path):
    """Throughput without a download: a bare config.json, no tokenizer, no text."""
    tiny_model("llama").config.save_pretrained(tmp_path / "bare")
    argv = f"--preset tiny --layer 2 --random_init --steps 3 --model {tmp_path}/bare --out {tmp_path}/b"
    result = bridge.main(argv.split())
    assert result["tokens_per_s"] > 0 and result["layer"] == 2




def test_what_fits_is_chosen(runs, text, tmp_path, capsys, monkeypatch):
    """--micro_batch 0: as many sequences as fit, recomputed only where not even one does, else refused by name; a run
    on a CPU, or one that says how many, is left as it is."""
    asked, taken, sizes = [], [0], measure.sizes

    def gigabytes(cfg, net, shape, layer, world, micro, dtype, recompute):
        asked.append((micro, recompute))
        found = sizes(cfg, net, shape, layer, world, micro, dtype, recompute)
        train = taken[-1] + micro * (5 if recompute else 20)
        return found | {"peaks": {**found["peaks"], "train": train}, "gigabytes": train}
    monkeypatch.setattr(measure, "sizes", gigabytes)
    argv = ["--preset", "tiny", "--model", runs / "toy", "--data", text, "--layer", "2", "--batch_size", "12",
            "--out", tmp_path / "b"]
    for gb, chosen in ((0, (3, False)), (50, (1, False)), (60, (2, True)), (66, (1, True))):
        taken.append(gb)
        bridge.main(list(map(str, [*argv, "--dry_run"])))
        assert asked[-1] == chosen and f"at {chosen[0]} sequences a pass" in (said := capsys.readouterr().out)
        assert ("recomputed" in said) == chosen[1]
    taken.append(70)
    bridge.main(list(map(str, [*argv, "--dry_run"])))
    assert asked[-1] == (1, True) and "does NOT fit" not in capsys.readouterr().out      # 75 GB: above nine tenths
    taken.append(80)
    bridge.main(list(map(str, [*argv, "--dry_run"])))
    assert "does NOT fit" in capsys.readouterr().out
    cfg, shape = bridge.Config(preset="tiny"), backbone.read_config(str(runs / "toy"))
    with pytest.raises(common.UserError, match="fewer --blocks"):
        measure.most_that_fits(cfg, bridge.build(cfg, shape, 2), shape, 2, common.World(0, 1, torch.device("cpu")), 12,
                               torch.float32)
    bridge.main(list(map(str, [*argv, "--dry_run", "--micro_batch", "4"])))
    assert asked[-1] == (4, False)
    asked.clear()
    bridge.main(list(map(str, [*argv, "--steps", "1"])))
    assert asked == [] and (tmp_path / "b" / "result.json").exists()
