"""The bridge: causality that can fail, samplers against closed forms, runs that are pure functions of their config."""
import json
import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import ROOT, fails, randomise, slow, tiny_model
from safetensors.torch import load_file

import bridge
import data
from core import common, denoiser, diffusion, measure, optim

B, T, D = 3, 12, 16


def net(**changes):
    """A bridge whose every weight is random."""
    return randomise(denoiser.Bridge(**{**dict(D=D, W=32, blocks=2, H=2), **changes})).eval()


def states(seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(B, T, D, generator=g), torch.randn(B, T, D, generator=g), torch.rand(B, generator=g)


# ------------------------------------------------------------------------------------------------------ causality
def leak(model, **more):
    """Largest change of outputs 0..6 when the condition and the noisy state change at position 7."""
    x, c, t = states()
    other = c.clone()
    other[:, 7] += 1.0
    moved = x.clone()
    moved[:, 7] += 1.0
    before, after = model(x, c, t, **more), model(moved, other, t, **more)
    assert (before - after)[:, 7:].abs().max() > 1e-3            # the change does reach what it may reach
    return (before - after)[:, :7].abs().max().item()


@torch.no_grad()
def test_the_future_never_changes_the_past():
    assert leak(net()) == 0.0


@torch.no_grad()
def test_a_bidirectional_twin_fails_that_test():
    assert leak(net(), mask=torch.ones(1, 1, T, T, dtype=torch.bool)) > 1e-4


@pytest.mark.parametrize("nfe", [1, 2, 5])
@torch.no_grad()
def test_sampling_is_causal_too(nfe):
    model, (noise, c, _) = net(), states()
    other = c.clone()
    other[:, 7] += 1.0
    a, b = diffusion.sample(model, c, nfe, noise), diffusion.sample(model, other, nfe, noise)
    assert torch.equal(a[:, :7], b[:, :7]) and not torch.equal(a[:, 7:], b[:, 7:])


@torch.no_grad()
def test_positions_matter_only_by_their_differences():
    model, (x, c, t) = net(), states()
    shifted = model(x, c, t, torch.arange(T)[None] + 9)
    assert torch.allclose(model(x, c, t), shifted, atol=1e-4)
    assert not torch.allclose(model(x, c, t), model(x, c, t, torch.arange(T)[None] * 3), atol=1e-3)


# ------------------------------------------------------------------------------------------- objective and sampler
def test_predictions_agree_about_z():
    z, e, t = states()
    x = (1 - t[:, None, None]) * z + t[:, None, None] * e
    for kind, out in (("x", z), ("v", e - z), ("eps", e)):
        assert torch.allclose(diffusion.to_z(out, x, t, kind), z, atol=1e-3)


class Gaussian(torch.nn.Module):
    """The exact denoiser E[z | x_t] of z ~ N(m, s^2): what a perfect network would output."""
    settings = dict(prediction="x", objective="diffusion", source="noise", blocks=1)

    def __init__(self, m, s, prediction="x"):
        super().__init__()
        self.m, self.s, self.settings = m, s, {**self.settings, "prediction": prediction}
        self.calls = 0

    def forward(self, x, c, t, *_):
        self.calls += 1
        t = t[:, None, None]
        variance = (1 - t) ** 2 * self.s ** 2 + t ** 2
        z = self.m + (1 - t) * self.s ** 2 / variance * (x - (1 - t) * self.m)
        return z if self.settings["prediction"] == "x" else (x - z) / t


@pytest.mark.parametrize("sampler, prediction", [("euler", "x"), ("heun", "x"), ("euler", "v")])
def test_the_sampler_draws_from_a_known_gaussian(sampler, prediction):
    model, c = Gaussian(1.5, 0.5, prediction), torch.zeros(64, 64, 8)
    noise = torch.randn(64, 64, 8, generator=torch.Generator().manual_seed(0))
    z = diffusion.sample(model, c, 64, noise, sampler=sampler)
    assert z.mean().item() == pytest.approx(1.5, abs=0.02) and z.std().item() == pytest.approx(0.5, rel=0.03)
    assert model.calls == 64
    one = diffusion.sample(model, c, 1, noise, sampler=sampler)                   # a single call can only give the mean
    assert one.std().item() < 1e-5 and one.mean().item() == pytest.approx(1.5, abs=1e-5)


def test_heun_is_more_exact_than_euler_at_equal_calls():
    noise, c = torch.linspace(-2, 2, 64).view(1, 8, 8), torch.zeros(1, 8, 8)
    error = {}
    for sampler in ("euler", "heun"):
        for nfe in (1, 2, 3, 8, 9):
            model = Gaussian(0.0, 0.5)
            z = diffusion.sample(model, c, nfe, noise, sampler=sampler)
            assert model.calls == nfe
            error[sampler, nfe] = (z - 0.5 * noise).abs().max().item()           # the flow maps e to s e exactly
    assert error["heun", 9] < error["euler", 9] < error["euler", 3]


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(common.UserError, match="there are euler, heun"):
        diffusion.sample(Gaussian(0.0, 1.0), torch.zeros(1, 2, 3), 2, torch.zeros(1, 2, 3), sampler="magic")
    with pytest.raises(common.UserError, match="there are logit-normal, uniform"):
        diffusion.times("beta", 0.0, 0, 0, [0])


def test_a_looped_control_answers_from_its_own_answer():
    z, c, t = states()
    once, twice = net(objective="regression"), net(objective="regression", loops=2)
    first = once(torch.zeros_like(z), c, torch.ones(B))
    assert torch.equal(diffusion.sample(once, c, 9, None), first)
    assert torch.equal(diffusion.sample(twice, c, 9, None), twice(first, c, torch.ones(B)))
    assert not torch.allclose(diffusion.sample(twice, c, 9, None), first, atol=1e-3)


def test_the_atom_is_a_share_of_ones_and_moves_no_other_draw():
    plain, some = (diffusion.times("logit-normal", 0.0, 0, 3, range(2000), atom) for atom in (0.0, 0.25))
    ones = some == 1
    assert 0.2 < ones.float().mean() < 0.3 and torch.equal(plain[~ones], some[~ones]) and not (plain == 1).any()
    assert (diffusion.times("uniform", 0.0, 0, 3, range(9), 1.0) == 1).all()


def test_target_and_condition_may_differ_in_width():
    model, (x, _, t) = net(C=5), states()
    assert model(x, torch.randn(B, T, 5), t).shape == (B, T, D) and model.mu_c.shape == (5,)


def test_loss_weights_sinks_by_their_own_size():
    z, c, t = states()
    z[:, 0] *= 1000                                                               # a massive activation
    model = net(objective="regression")
    loss = diffusion.token_loss(model, z, c, t, None, skip=1)[0]
    out = model(torch.zeros_like(z), c, torch.ones_like(t))
    want = (out - z).square().mean(-1)
    assert torch.allclose(loss[:, 1:], want[:, 1:])
    assert torch.allclose(loss[:, 0], want[:, 0] / z[:, 0].square().mean(-1)) and loss[:, 0].max() < 2


def test_noise_levels_are_keyed_by_slot():
    for law in ("logit-normal", "uniform"):
        t = diffusion.times(law, 0.0, 0, 5, range(4000))
        assert 0 < t.min() and t.max() < 1 and t.mean().item() == pytest.approx(0.5, abs=0.02)
        assert torch.equal(t[7:9], diffusion.times(law, 0.0, 0, 5, [7, 8]))
    assert t.std().item() == pytest.approx(12 ** -0.5, abs=0.01)


def test_position_noise_is_a_table():
    table = diffusion.position_noise(0, range(6), D, "cpu")
    assert torch.equal(table[3:5], diffusion.position_noise(0, [3, 4], D, "cpu"))
    assert not torch.equal(table, diffusion.position_noise(1, range(6), D, "cpu"))


# ----------------------------------------------------------------------------------------------------- optimizer
def test_orthogonalize():
    G = torch.randn(3, 8, 20, generator=torch.Generator().manual_seed(0)) * 50
    for X in (G, G.mT):
        s = torch.linalg.svdvals(optim.orthogonalize(X))
        assert 0.6 < s.min() and s.max() < 1.3


def test_every_parameter_has_exactly_one_optimizer():
    model = net()
    optimizers = optim.build(model.named_parameters(), 0.02, 1e-3, 0.1)
    held = [id(p) for o in optimizers for g in o.param_groups for p in g["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    assert len(optimizers[0].param_groups[0]["params"]) == 2 * 4                  # qkv, out, up, down per block
    plain = {id(p) for g in optimizers[1].param_groups if g["weight_decay"] == 0 for p in g["params"]}
    assert plain == {id(p) for n, p in model.named_parameters() if not n.endswith("weight")}     # mod among them
    assert len(optim.build(model.named_parameters(), 0, 1e-3, 0.1)) == 1          # lr 0: AdamW for all


# --------------------------------------------------------------------------------------------- gradients, memory
class Work:
    def wait(self):
        pass


@pytest.mark.parametrize("overlap", [True, False])
def test_the_first_bucket_leaves_early(monkeypatch, overlap):
    """With overlap the first bucket is sent before 60% of the gradients exist; each gradient is sent exactly once."""
    model, sent = net(W=64, blocks=6), []
    params = list(model.parameters())

    def all_reduce(flat, async_op):
        have = sum(p.grad is not None for p in params) / len(params)
        sent.append((have, flat.numel()))
        flat.mul_(2)                                                          # as if another process had the same
        return Work()
    monkeypatch.setattr(common.dist, "all_reduce", all_reduce)
    gradients = common.GradientSum(params, common.World(0, 2, torch.device("cpu")), overlap, bucket_bytes=100_000)
    x, c, t = states()
    for part in range(2):                                                     # only the last micro-batch sends
        if part == 1:
            alone = [p.grad.clone() for p in params]
            for p in params:
                p.grad = None
            gradients.arm()
        model(x, c, t).square().mean().backward()
        assert part == 1 or not sent
    gradients.finish()
    assert sum(n for _, n in sent) == sum(p.numel() for p in params)
    assert all(torch.allclose(p.grad, 2 * a) for p, a in zip(params, alone, strict=True))
    if overlap:
        assert len(sent) > 5 and sent[0][0] < 0.6
    else:
        assert len(sent) == 1 and sent[0][0] == 1


def test_replicas_that_differ_are_noticed(monkeypatch):
    world, model = common.World(0, 2, torch.device("cpu")), net()
    monkeypatch.setattr(common.dist, "all_reduce", lambda both, op: None)     # the other process agrees
    common.check_replicas(list(model.parameters()), world)

    def differ(both, op):
        both += torch.tensor([1e-6, 0.0])
    monkeypatch.setattr(common.dist, "all_reduce", differ)
    with pytest.raises(common.UserError, match="no longer hold the same weights"):
        common.check_replicas(list(model.parameters()), world)


def test_recomputing_activations_changes_no_gradient():
    a, b, (x, c, t) = net(), net(), states()
    b.recompute = True
    for model in (a, b):
        model(x, c, t).square().mean().backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@slow
def test_compiled_blocks_equal_eager_ones():
    """bf16 autocast and torch.compile, block by block in place, on a tiny case: names stay, numbers agree."""
    a, b, (x, c, t) = net(blocks=1), net(blocks=1), states()
    b.blocks[0].compile(dynamic=False)
    assert list(a.state_dict()) == list(b.state_dict())
    exact = a(x, c, t).detach()
    for model in (a, b):
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x, c, t)
        assert out.dtype == torch.float32 and (out - exact).norm() < 0.05 * exact.norm()
        out.square().mean().backward()
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert (p.grad - q.grad).norm() < 0.05 * p.grad.norm() + 1e-3


def test_prefetch_keeps_the_order_and_passes_errors_on():
    assert list(data.prefetch(lambda k: k * k, range(5))) == [0, 1, 4, 9, 16]
    before, early = threading.active_count(), data.prefetch(lambda k: k, range(100))
    assert next(early) == 0 and threading.active_count() == before + 1
    early.close()                                                              # a loop that leaves ends the thread
    for _ in range(100):
        if threading.active_count() == before:
            break
        time.sleep(0.01)
    assert threading.active_count() == before
    assert list(data.prefetch(lambda k: k, [])) == []
    with pytest.raises(ZeroDivisionError):
        list(data.prefetch(lambda k: 1 / k, [1, 0]))


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
    for flags in (["--prediction", "v", "--source", "embedding", "--times", "uniform", "--sampler", "heun"],
                  ["--prediction", "eps"], ["--self_condition", "--t_mean", "1", "--recompute", "--atom", "0.5"],
                  ["--objective", "regression", "--loops", "2"],
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


def test_a_finished_run_is_measured_again_when_asked(runs, tmp_path, text):
    """Another sampler, other calls: the weights stay, and the numbers are those of a run that had asked at once."""
    first = bridge.main(command(runs, text, tmp_path / "a"))
    weights = (tmp_path / "a" / "bridge.safetensors").read_bytes()
    again = bridge.main(command(runs, text, tmp_path / "a", "--sampler", "heun", "--nfe", "3", "--shift", "2"))
    fresh = bridge.main(command(runs, text, tmp_path / "b", "--sampler", "heun", "--nfe", "3", "--shift", "2"))
    assert (tmp_path / "a" / "bridge.safetensors").read_bytes() == weights
    assert again["nfe"] == fresh["nfe"] != first["nfe"] and "3" in again["nfe"]
    assert json.loads((tmp_path / "a" / "bridge.json").read_text()) == json.loads(
        (tmp_path / "b" / "bridge.json").read_text())
    assert bridge.main(command(runs, text, tmp_path / "a"))["nfe"] == first["nfe"]


def test_a_run_may_grow_where_its_schedule_is_constant(runs, tmp_path, capsys, text):
    flat = ["--cooldown", "0", "--keep_state"]
    bridge.main(command(runs, text, tmp_path / "straight", *flat))
    bridge.main(command(runs, text, tmp_path / "grown", *flat, "--steps", "8"))
    bridge.main(command(runs, text, tmp_path / "grown", *flat))
    same(tmp_path / "straight", tmp_path / "grown")
    assert json.loads((tmp_path / "grown" / "result_8.json").read_text())["steps"] == 8
    assert "--steps 4" in fails(capsys, bridge.main, *command(runs, text, tmp_path / "grown", *flat, "--steps", "4"))
    bridge.main(command(runs, text, tmp_path / "ended", "--keep_state", "--steps", "4"))
    assert "--cooldown 0" in fails(capsys, bridge.main, *command(runs, text, tmp_path / "ended", "--keep_state"))


def test_the_state_is_saved_before_the_numbers_are_taken(runs, tmp_path, text, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(bridge, "measure", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            bridge.main(command(runs, text, tmp_path / "a", "--save_every", "999"))
    assert torch.load(tmp_path / "a" / "state.pt", weights_only=True)["step"] == 20
    bridge.main(command(runs, text, tmp_path / "a"))
    bridge.main(command(runs, text, tmp_path / "b"))
    same(tmp_path / "a", tmp_path / "b")


def test_bad_input(runs, tmp_path, capsys, text):
    good = command(runs, text, tmp_path / "x")
    assert "must lie in 1..4" in fails(capsys, bridge.main, *good, "--layer", "5")
    assert "must lie in 1..4" in fails(capsys, bridge.main, *good, "--layer", "0")
    assert "auto, all or a number" in fails(capsys, bridge.main, *good, "--layer", "six")
    assert "--nfe" in fails(capsys, bridge.main, *good, "--nfe", "0")
    assert "--loops goes with" in fails(capsys, bridge.main, *good, "--loops", "3")
    assert "--atom" in fails(capsys, bridge.main, *good, "--atom", "1.5")
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
    assert bridge.main([*argv, "--recompute"])["gigabytes"] < size["gigabytes"]


def test_activation_formula_against_a_count():
    """Bytes saved for backward, by hooks, against the 100 W a token and block of the dry run."""
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


@slow
def test_layer_all_makes_one_run_a_layer(runs, tmp_path, text):
    argv = command(runs, text, tmp_path / "all", "--steps", "1")
    argv[argv.index("--layer") + 1] = "all"
    results = bridge.main(argv)
    assert [r["layer"] for r in results] == [1, 2, 3, 4]
    (tmp_path / "all_l2" / "result.json").unlink()                             # as if killed there: that one is redone
    file = tmp_path / "all_l3" / "bridge.safetensors"
    kept = file.stat().st_mtime_ns
    assert bridge.main(argv)[1]["layer"] == 2 and file.stat().st_mtime_ns == kept
    assert (tmp_path / "all_l3" / "bridge.safetensors").exists()
