"""The bridge: causality that can fail, samplers against closed forms, runs that are pure functions of their config."""
import threading
import time

import pytest
import torch
from conftest import randomise, slow, tiny_model

import data
from core import backbone, common, denoiser, diffusion, optim

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
    for kind, out in (("x", z), ("v", e - z)):
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


@pytest.mark.parametrize("sampler, prediction", [("euler", "x"), ("ab2", "x"), ("euler", "v")])
def test_the_sampler_draws_from_a_known_gaussian(sampler, prediction):
    model, c = Gaussian(1.5, 0.5, prediction), torch.zeros(64, 64, 8)
    noise = torch.randn(64, 64, 8, generator=torch.Generator().manual_seed(0))
    z = diffusion.sample(model, c, 64, noise, sampler=sampler)
    assert z.mean().item() == pytest.approx(1.5, abs=0.02) and z.std().item() == pytest.approx(0.5, rel=0.03)
    assert model.calls == 64
    one = diffusion.sample(model, c, 1, noise, sampler=sampler)                   # a single call can only give the mean
    assert one.std().item() < 1e-5 and one.mean().item() == pytest.approx(1.5, abs=1e-5)


def test_ab2_is_more_exact_than_euler_at_equal_calls():
    noise, c = torch.linspace(-2, 2, 64).view(1, 8, 8), torch.zeros(1, 8, 8)
    error = {}
    for sampler in ("euler", "ab2"):
        for nfe in (1, 2, 3, 8, 9):
            model = Gaussian(0.0, 0.5)
            z = diffusion.sample(model, c, nfe, noise, sampler=sampler)
            assert model.calls == nfe
            error[sampler, nfe] = (z - 0.5 * noise).abs().max().item()           # the flow maps e to s e exactly
    assert error["ab2", 9] < error["euler", 9] / 2 and error["ab2", 3] < error["euler", 3] < error["euler", 2]


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(common.UserError, match="there are euler, ab2"):
        diffusion.sample(Gaussian(0.0, 1.0), torch.zeros(1, 2, 3), 2, torch.zeros(1, 2, 3), sampler="magic")
    with pytest.raises(common.UserError, match="there are logit-normal, uniform"):
        diffusion.times("beta", 0.0, 0, 0, [0])


def test_the_control_answers_at_once_and_without_noise():
    (z, c, _), once = states(), net(objective="regression")
    assert torch.equal(diffusion.sample(once, c, 9, None), once(torch.zeros_like(z), c, torch.ones(B)))


@torch.no_grad()
def test_an_untrained_bridge_answers_by_its_head_start():
    """h[1] of a block without attention is a function of the token alone: its mean state knows it, a linear map of h[0]
    does not. An unknown token gives neither away."""
    lm = backbone.Backbone(tiny_model("llama", initializer_range=0.3).requires_grad_(False))
    lm.blocks[0].self_attn.o_proj.weight.zero_()
    rows, fvu = torch.randint(3, 64, (200, 33), generator=torch.Generator().manual_seed(0)), {}
    for start in ("none", "ridge", "tokens"):
        model = denoiser.Bridge(lm.D, 32, 1, 1, "regression", visible="mix", V=lm.V, head_start=start)
        denoiser.calibrate(lm, model, rows[:160, :-1], 1, 4)
        z, c = denoiser.targets(lm, model, rows[160:, :-1], 1)
        fvu[start] = ((diffusion.sample(model, c, 1, None) - z).square().sum() / z.square().sum()).item()
    assert fvu["tokens"] < 0.02 < 0.1 < fvu["ridge"] < 0.9 < fvu["none"]
    seen = model.standard_z(lm.through(lm.embed(rows[:160:2, :-1]), 0, 1))[:, 4:][rows[:160:2, 4:-1] == 9]
    assert torch.allclose(model.means[9], seen.sum(0) / (1 + len(seen)), atol=1e-5)
    ids = rows[160:162, :-1]
    other, unknown = ids.clone(), torch.arange(32).expand(2, 32) >= 20
    other[:, 20:] = (ids[:, 20:] + 1) % 64
    both = [diffusion.sample(model, model.standard_c(lm.embed(i), i), 1, None, unknown=unknown) for i in (ids, other)]
    assert torch.equal(*both)


@torch.no_grad()
def test_position_0_has_units_of_its_own():
    """A sink a hundred times as large as the rest is of size 1 in its own units; no other position's units move, and a
    token that comes alone, from a cache, is taken for what its position says."""
    lm, nets = backbone.Backbone(tiny_model("llama", initializer_range=0.3).requires_grad_(False)), {}
    rows, massive = torch.randint(3, 64, (64, 12), generator=torch.Generator().manual_seed(0)), torch.zeros(12, 1)
    massive[0] = 100.0
    through = lm.through
    lm.through = lambda h0, *_: through(h0, 0, 2) * (1 + massive)
    for sink in ("own", "shared"):
        nets[sink] = denoiser.Bridge(lm.D, 32, 1, 1, sink=sink)
        denoiser.calibrate(lm, nets[sink], rows, 2, 4)
    h = lm.through(lm.embed(rows))                                               # (64, 12, D)
    own, shared = (nets[sink].standard_z(h) for sink in ("own", "shared"))
    assert torch.allclose(own[:, 0].mean(0), torch.zeros(lm.D), atol=1e-3) and (own[:, 0].std(0) - 1).abs().max() < 0.02
    assert shared[:, 0].abs().mean() > 20 and torch.equal(own[:, 1:], shared[:, 1:])
    assert torch.allclose(nets["own"].hidden(own), h, rtol=1e-4, atol=1e-3)
    fifth = torch.full((64, 1), 5)
    assert torch.equal(nets["own"].standard_z(h[:, 5:6], fifth), shared[:, 5:6])
    assert torch.equal(nets["own"].hidden(own[:, 5:6], fifth), nets["shared"].hidden(shared[:, 5:6]))


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
    # By r x r products alone, as wide matrices are done: the polynomial itself, on singular values over four decades.
    X = torch.linalg.qr(torch.randn(40, 16, generator=torch.Generator().manual_seed(1)))[0] * torch.logspace(-4, 0, 16)
    s = torch.logspace(-4, 0, 16, dtype=torch.float64)
    s = s / s.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s ** 3 + 2.0315 * s ** 5
    assert torch.allclose(torch.linalg.vector_norm(optim.orthogonalize(X[None])[0].double(), dim=0), s, rtol=1e-3)


def test_the_matrices_are_shared_out():
    params = list(net(blocks=6).blocks.parameters())
    params = [p for p in params if p.ndim == 2 and len(p) > 6]
    parts = list(optim.Muon(params, 0.1, world=common.World(1, 8, torch.device("cpu"))).parts(params))
    assert sorted(id(p) for _, part in parts for p in part) == sorted(map(id, params))     # each exactly once
    cost = [sum(p.numel() * min(p.shape) for rank, part in parts for p in part if rank == r) for r in range(8)]
    assert max(cost) < 1.2 * sum(cost) / 8
    alone = list(optim.Muon(params, 0.1).parts(params))
    assert len(alone) == len({p.shape for p in params}) and {rank for rank, _ in alone} == {0}


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
    model, sent, done = net(W=64, blocks=6), [], []
    params = list(model.parameters())

    def all_reduce(flat, async_op):
        sent.append((len(done) / len(params), flat.numel()))
        flat.mul_(2)                                                          # as if another process had the same
        return Work()
    monkeypatch.setattr(common.dist, "all_reduce", all_reduce)
    x, c, t = states()
    unused = torch.nn.Parameter(torch.ones(7))                                # an expert that no token goes to
    gradients = common.GradientSum([unused, *params], common.World(0, 2, torch.device("cpu")), overlap,
                                   bucket_bytes=100_000)
    alone = torch.autograd.grad(model(x, c, t).square().mean(), params)
    for p in params:
        p.register_post_accumulate_grad_hook(done.append)
    for _ in range(2):                                                        # the second step finds full buckets
        sent.clear()
        for part in range(2):                                                 # only the last micro-batch sends
            if part == 1:
                gradients.arm()
                done.clear()
            model(x, c, t).square().mean().backward()
            assert part == 1 or not sent
        gradients.finish()
        assert sum(n for _, n in sent) == sum(p.numel() for p in (*params, unused)) and not unused.grad.any()
        assert all(torch.allclose(p.grad, 4 * a) for p, a in zip(params, alone, strict=True))
        model.zero_grad()
        unused.grad = torch.ones(7)                                           # what an optimizer must never see again
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
