"""The bridge: causality that can fail, closed forms, sums of gradients, one measurement."""
from types import SimpleNamespace

import pytest
import torch
from conftest import randomise, slow, tiny_model

import bridge
from core import backbone, common, diffusion
from core.diffusion import Bridge, BridgeConfig

B, T, D = 3, 12, 16


def net(**changes):
    """A bridge whose every weight is random."""
    config = BridgeConfig(**{**dict(D=D, W=32, depth=2, H=2, sink="shared"), **changes})
    return randomise(Bridge(config)).eval()


def states(seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(B, T, D, generator=g), torch.randn(B, T, D, generator=g), torch.rand(B, generator=g)


def small_lm(family="llama", **changes):
    return backbone.Backbone(tiny_model(family, initializer_range=0.3, **changes).requires_grad_(False))


def some_ids(rows, length, seed=0):
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


# -------------------------------------------------------------------------------------------------
# Causality

def leak(model, **context):
    """Largest change of outputs 0..6 when the condition and the noisy state change at position 7."""
    x, c, t = states()
    other, moved = c.clone(), x.clone()
    other[:, 7] += 1.0
    moved[:, 7] += 1.0
    change = model(x, c, t, **context) - model(moved, other, t, **context)
    assert change[:, 7:].abs().max() > 1e-3                     # it does reach what it may reach
    return change[:, :7].abs().max().item()


@torch.no_grad()
def test_the_future_never_changes_the_past():
    assert leak(net()) == 0.0
    assert leak(net(), mask=torch.ones(1, 1, T, T, dtype=torch.bool)) > 1e-4    # the test can fail


@torch.no_grad()
def test_sampling_is_causal_too():
    model, (noise, c, _) = net(), states()
    other = c.clone()
    other[:, 7] += 1.0
    a = diffusion.sample(model, c, 3, noise)
    b = diffusion.sample(model, other, 3, noise)
    assert torch.equal(a[:, :7], b[:, :7]) and not torch.equal(a[:, 7:], b[:, 7:])


@torch.no_grad()
def test_visible_tokens_look_back_and_unknown_ones_everywhere():
    model, (x, c, t) = net(generates=True, bidirectional=True, V=20), states()
    unknown = torch.zeros(B, T, dtype=torch.bool)
    unknown[:, 5] = True
    moved = x.clone()
    moved[:, 9] += 1.0
    change = (model(x, c, t, unknown=unknown) - model(moved, c, t, unknown=unknown)).abs().amax(-1)
    assert (change[:, 5] > 0).all() and (change[:, 9:] > 0).all()
    assert change[:, [0, 1, 2, 3, 4]].max() == 0
    other = c.clone()
    other[:, 5] += 1.0                                          # the condition of an unknown token
    assert torch.equal(model(x, c, t, unknown=unknown), model(x, other, t, unknown=unknown))


@torch.no_grad()
def test_positions_matter_only_by_their_differences():
    model, (x, c, t) = net(), states()
    plain = model(x, c, t)
    assert torch.allclose(plain, model(x, c, t, torch.arange(T)[None] + 9), atol=1e-4)
    assert not torch.allclose(plain, model(x, c, t, torch.arange(T)[None] * 3), atol=1e-3)


@pytest.mark.parametrize("objective", ["diffusion", "regression"])
@torch.no_grad()
def test_a_cache_continues_a_sample(objective):
    """Token by token, with the layers that `cache_layers` counts, equals the whole text at once."""
    from transformers import DynamicCache
    model, (noise, c, _) = net(objective=objective), states()
    whole = diffusion.sample(model, c, 3, noise)
    cache = DynamicCache()
    first = diffusion.sample(model, c[:, :8], 3, noise[:, :8], cache=cache)
    parts = [first]
    for i in range(8, T):
        positions = torch.tensor([[i]])
        mask = torch.ones(1, 1, 1, i + 1, dtype=torch.bool)
        step = diffusion.sample(model, c[:, i:i + 1], 3, noise[:, i:i + 1], cache=cache,
                                positions=positions, mask=mask)
        parts.append(step)
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-4)
    assert len(cache.layers) == model.cache_layers(3) == (6 if objective == "diffusion" else 2)


# -------------------------------------------------------------------------------------------------
# Loss and sampler

class Gaussian(torch.nn.Module):
    """The exact denoiser E[z | x_t] of z ~ N(m, s^2): what a perfect network would predict."""
    config = BridgeConfig(D=8, W=8, depth=1, H=1)

    def __init__(self, m, s):
        super().__init__()
        self.m, self.s, self.calls = m, s, 0

    def cache_layers(self, calls):
        return calls

    def forward(self, x, c, t, **context):
        self.calls += 1
        t = t[:, None, None]
        variance = (1 - t) ** 2 * self.s ** 2 + t ** 2
        return self.m + (1 - t) * self.s ** 2 / variance * (x - (1 - t) * self.m)


def test_the_sampler_samples_a_known_gaussian():
    model, c = Gaussian(1.5, 0.5), torch.zeros(64, 64, 8)
    noise = torch.randn(64, 64, 8, generator=torch.Generator().manual_seed(0))
    z = diffusion.sample(model, c, 64, noise)
    assert z.mean().item() == pytest.approx(1.5, abs=0.02)
    assert z.std().item() == pytest.approx(0.5, rel=0.03)
    assert model.calls == 64
    one = diffusion.sample(model, c, 1, noise)                  # one call can only give the mean
    assert one.std().item() < 1e-5 and one.mean().item() == pytest.approx(1.5, abs=1e-5)


def test_a_refinement_starts_on_the_path():
    model, z = Gaussian(0.0, 1.0), torch.full((2, 4, 8), 0.3)
    noise, seen = torch.ones(2, 4, 8), []
    out = diffusion.sample(model, z, 4, noise, z=z, done=3, watch=seen.append)
    assert model.calls == len(seen) == 1
    expected = Gaussian(0.0, 1.0)(diffusion.path(z, noise, 0.25), None, torch.full((2,), 0.25))
    assert torch.allclose(out, expected) and torch.equal(seen[0], out)


def test_the_control_answers_at_once_and_without_noise():
    (z, c, _), once = states(), net(objective="regression")
    answer = once(torch.zeros_like(z), c, torch.ones(B))
    assert torch.equal(diffusion.sample(once, c, 9, None), answer)


def test_loss_weights_sinks_by_their_own_size():
    z, c, t = states()
    z[:, 0] *= 1000                                             # a massive activation
    model = net(objective="regression")
    loss, z_hat = diffusion.bridge_loss(model, z, c, t, None, skip=1)
    error = (model(torch.zeros_like(z), c, torch.ones_like(t)) - z).square().mean(-1)
    assert torch.allclose(loss[:, 1:], error[:, 1:]) and not z_hat.requires_grad
    assert torch.allclose(loss[:, 0], error[:, 0] / z[:, 0].square().mean(-1)) and loss[:, 0].max() < 2


def test_unknown_tokens_are_the_task():
    (z, c, t), model = states(), net(generates=True, bidirectional=True, V=20)
    unknown = torch.zeros(B, T, dtype=torch.bool)
    unknown[0, 6:] = True
    loss, z_hat = diffusion.bridge_loss(model, z, c, t, z, 0, unknown=unknown)
    error = (z_hat - z).square().mean(-1)
    assert torch.allclose(loss[0, :6], 0.1 * error[0, :6]) and torch.allclose(loss[0, 6:], error[0, 6:])
    assert torch.allclose(loss[1:], error[1:])                  # a text without unknown ones counts fully


def test_golden_numbers():
    """Computed with the second edition (d080e9e): the loss, a gradient and a sample."""
    z, c, t = states()
    model = net(generates=True, bidirectional=True, self_condition=True, V=20)
    ids = torch.zeros(B, T)
    unknown = diffusion.hidden_tokens("mix", ids, 0, 3, range(B))
    noise = torch.stack([common.normal((T, D), torch.device("cpu"), 0, "noise", 3, i) for i in range(B)])
    coins = torch.tensor([1.0, 0.0, 1.0])
    loss, _ = diffusion.bridge_loss(model, z, c, t, noise, 4, coins, unknown)
    loss.mean().backward()
    sampled = diffusion.sample(model, c, 3, noise, unknown=unknown)
    numbers = [loss.mean().item(), model.blocks[1].up.weight.grad.norm().item(), sampled.std().item()]
    assert numbers == pytest.approx(GOLDEN, rel=1e-4)
    assert unknown.sum(1).tolist() == HIDDEN


GOLDEN = [2.1129396, 1.2189775, 1.9742081]
HIDDEN = [0, 3, 3]


def test_random_choices_are_keyed_by_slot():
    t = diffusion.noise_levels(0, 5, range(2000))
    logits = torch.logit(t.double())
    assert logits.mean().item() == pytest.approx(0.7, abs=0.07)
    assert logits.std().item() == pytest.approx(1.0, abs=0.07)
    assert torch.equal(t[7:9], diffusion.noise_levels(0, 5, [7, 8]))
    ids = torch.zeros(400, 20)
    assert diffusion.hidden_tokens("full", ids, 0, 0, range(400)) is None
    unknown = diffusion.hidden_tokens("mix", ids, 0, 2, range(400))
    assert torch.equal(unknown[7:9], diffusion.hidden_tokens("mix", ids[:2], 0, 2, [7, 8]))
    assert not unknown[:, 0].any()
    cuts = (unknown[:, 1:] != unknown[:, :-1]).sum(1)
    assert cuts.max() == 2
    assert (cuts == 0).float().mean().item() == pytest.approx(0.25, abs=0.07)
    assert (cuts == 1).float().mean().item() == pytest.approx(0.5, abs=0.09)   # and a span at the end
    table = diffusion.position_noise(0, range(6), D, "cpu")
    assert torch.equal(table[3:5], diffusion.position_noise(0, [3, 4], D, "cpu"))


# -------------------------------------------------------------------------------------------------
# Calibration

@torch.no_grad()
def test_calibration_in_closed_form():
    """h[1] of a block without attention is a function of the token alone: its mean state knows it, a
    linear map of h[0] does not. An unknown token gives neither away."""
    lm = small_lm()
    lm.blocks[0].self_attn.o_proj.weight.zero_()
    ids = some_ids(200, 32)
    h0, hl = bridge.both_ends(lm, 1, ids)
    fvu = {}
    for start in ("none", "tokens"):
        model = Bridge(BridgeConfig(lm.D, 32, 1, 1, lm.V, "regression", start, generates=True, sink="shared"))
        bridge.set_units(lm, model, 1, ids[:160], 4)
        z = model.target(h0[160:], hl[160:])
        z_hat = diffusion.sample(model, model.condition(h0[160:], ids[160:]), 1, None)
        fvu[start] = ((z_hat - z).square().sum() / z.square().sum()).item()
    assert fvu["tokens"] < 0.02 and fvu["none"] > 0.9

    flat = hl[:160, 4:].flatten(0, 1).double()
    assert torch.allclose(model.mu_z.double(), flat.mean(0), atol=1e-6)
    assert torch.allclose(model.sigma_z.double(), flat.std(0, correction=0), rtol=1e-4)
    z = model.target(h0, hl)[:160, 4:]
    of_token = z[::2][ids[:160:2, 4:] == 9]
    assert torch.allclose(model.means[9], of_token.sum(0) / (1 + len(of_token)), atol=1e-5)
    c = model.condition(h0, ids)[:160, 4:][1::2].flatten(0, 1).double()
    penalty = diffusion.RIDGE * c.square().sum(0).mean() * torch.eye(c.shape[1])
    ridge = torch.linalg.solve(c.T @ c + penalty, c.T @ z[1::2].flatten(0, 1).double()).T
    assert torch.allclose(model.ridge.double(), ridge, atol=1e-5)

    other, unknown = ids[160:162].clone(), torch.arange(32).expand(2, 32) >= 20
    other[:, 20:] = (other[:, 20:] + 1) % 64
    a, b = (diffusion.sample(model, model.condition(lm.embed(i), i), 1, None, unknown=unknown)
            for i in (ids[160:162], other))
    assert torch.equal(a, b)


@torch.no_grad()
def test_position_0_has_units_of_its_own():
    h0, hl = torch.zeros(64, T, D), torch.randn(64, T, D, generator=torch.Generator().manual_seed(0))
    hl[:, 0] = 100 + hl[:, 0]                                   # an attention sink
    own, shared = net(sink="own"), net(sink="shared")
    for model in (own, shared):
        diffusion.calibrate(model, h0, hl, torch.zeros(64, T, dtype=torch.long), 4)
    z = own.target(h0, hl)
    assert z[:, 0].mean(0).abs().max() < 1e-3 and (z[:, 0].std(0) - 1).abs().max() < 0.02
    assert shared.target(h0, hl)[:, 0].abs().mean() > 20
    assert torch.equal(z[:, 1:], shared.target(h0, hl)[:, 1:])
    assert torch.allclose(own.restore(h0, z), hl, rtol=1e-4, atol=1e-3)
    fifth = torch.full((64, 1), 5)                              # a token that comes alone, from a cache
    assert torch.equal(own.target(h0[:, :1], hl[:, 5:6], fifth), z[:, 5:6])
    assert torch.equal(own.restore(h0[:, :1], z[:, 5:6], fifth), own.restore(h0, z)[:, 5:6])


# -------------------------------------------------------------------------------------------------
# Measurement

def held_out():
    return some_ids(10, 25, seed=1)


CFG = SimpleNamespace(skip=4)


def test_measure_against_a_direct_computation():
    lm, rows, layer = small_lm(), held_out(), 2
    model = net(D=lm.D, W=32)
    result = bridge.measure(lm, model, layer, rows, 3, CFG)

    ids, targets = rows[:, :-1], rows[:, 1:]
    h0 = lm.embed(ids)
    hl = lm.through(h0, 0, layer)
    noise = diffusion.position_noise(0, range(24), lm.D, torch.device("cpu"))
    z_hat = diffusion.sample(model, model.condition(h0, ids), 3, noise)
    z = model.target(h0, hl)
    p, q = (lm.head(lm.through(h, layer, lm.L)).double().log_softmax(-1)[:, 4:]
            for h in (hl, model.restore(h0, z_hat)))
    loss = [torch.nn.functional.nll_loss(x.flatten(0, 1), targets[:, 4:].flatten()).item() for x in (p, q)]
    assert result["ce_intact"] == pytest.approx(loss[0], rel=1e-5)
    assert result["ce_gap"] == pytest.approx(loss[1] - loss[0], rel=1e-4)
    assert result["kl"] == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)
    assert result["agree"] == pytest.approx((p.argmax(-1) == q.argmax(-1)).float().mean().item())
    error, energy = ((x[:, 4:] ** 2).sum() for x in (z_hat - z, z))
    assert result["fvu"] == pytest.approx((error / energy).item(), rel=1e-5)
    assert sum(result["kl_rows"]) / 10 == pytest.approx(result["kl"])


class Fixed(torch.nn.Module):
    """A bridge that knows z, or always answers with the mean."""

    def __init__(self, model, lm, layer, perfect):
        super().__init__()
        self.config = BridgeConfig(D=model.config.D, W=1, depth=1, H=1, objective="regression")
        self.model, self.lm, self.layer, self.perfect = model, lm, layer, perfect
        self.target, self.restore, self.condition = model.target, model.restore, model.condition

    def forward(self, x, c, t):
        if not self.perfect:
            return torch.zeros_like(x)
        h0 = c * self.model.sigma_c + self.model.mu_c
        return self.target(h0, self.lm.through(h0, 0, self.layer))


def test_a_perfect_bridge_loses_nothing():
    lm, model = small_lm(), net(D=32, W=32)
    bridge.set_units(lm, model, 2, some_ids(64, 24), 4)
    perfect = bridge.measure(lm, Fixed(model, lm, 2, True), 2, held_out(), 1, CFG)
    assert perfect["fvu"] < 1e-6 and abs(perfect["ce_gap"]) < 1e-4 and perfect["agree"] == 1
    mean = bridge.measure(lm, Fixed(model, lm, 2, False), 2, held_out(), 1, CFG)
    assert mean["fvu"] == pytest.approx(1, abs=0.1) and mean["kl"] > 0.1


def test_the_intact_model_does_not_depend_on_the_target(monkeypatch):
    """A fork that predicts h[l] - h[0] changes two functions, and the intact model not at all."""
    lm, model = small_lm(), net(D=32, W=32)
    before = bridge.measure(lm, model, 2, held_out(), 2, CFG)
    monkeypatch.setattr(diffusion, "produce", lambda h0, hl: hl - h0)
    monkeypatch.setattr(diffusion, "recover", lambda h0, state: state + h0)
    bridge.set_units(lm, model, 2, some_ids(64, 24), 4)
    after = bridge.measure(lm, model, 2, held_out(), 2, CFG)
    assert after["ce_intact"] == before["ce_intact"] and after["kl"] != before["kl"]
    perfect = bridge.measure(lm, Fixed(model, lm, 2, True), 2, held_out(), 1, CFG)
    assert perfect["fvu"] < 1e-6 and abs(perfect["ce_gap"]) < 1e-4


# -------------------------------------------------------------------------------------------------
# Gradients, memory

class Work:
    def wait(self):
        pass


def test_gradients_are_summed(monkeypatch):
    """Only the last micro-batch sends. The first gradient is sent before 60% of them exist."""
    model, sent, made = net(depth=6), [], []
    params = list(model.parameters())

    def all_reduce(gradient, async_op):
        sent.append((len(made) / len(params), gradient.numel()))
        gradient.mul_(2)                                        # as if another process had the same
        return Work()
    monkeypatch.setattr(bridge.dist, "all_reduce", all_reduce)
    x, c, t = states()
    alone = torch.autograd.grad(model(x, c, t).square().mean(), params)
    for p in params:
        p.register_post_accumulate_grad_hook(made.append)
    gradients = bridge.GradientSum(params, common.World(0, 2, torch.device("cpu")))
    for _ in range(2):                                          # two steps of two micro-batches
        sent.clear()
        for part in range(2):
            gradients.sending = part == 1
            made.clear()
            model(x, c, t).square().mean().backward()
            assert part == 1 or not sent
        gradients.wait()
        assert sum(n for _, n in sent) == sum(p.numel() for p in params) and sent[0][0] < 0.6
        assert all(torch.allclose(p.grad, 4 * a) for p, a in zip(params, alone, strict=True))
        model.zero_grad()


def test_one_process_sums_nothing(monkeypatch):
    monkeypatch.setattr(bridge.dist, "all_reduce", lambda *_, **__: 1 / 0)
    model, (x, c, t) = net(), states()
    gradients = bridge.GradientSum(model.parameters(), common.World(0, 1, torch.device("cpu")))
    gradients.sending = True
    model(x, c, t).square().mean().backward()
    gradients.wait()
    assert all(p.grad is not None for p in model.parameters())


def test_recomputing_activations_changes_no_gradient():
    a, b, (x, c, t) = net(), net(), states()
    b.recompute = True
    for model in (a, b):
        model(x, c, t).square().mean().backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_activations_are_what_the_dry_run_says():
    """Bytes kept for backward, by hooks, against 100 a channel, token and block in fp32."""
    def kept(depth, recompute=False):
        model, held = net(W=64, depth=depth), {}
        model.recompute = recompute
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                held[storage.data_ptr()] = storage.nbytes()
            return tensor
        z, c, t = states()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            diffusion.bridge_loss(model, z, c, t, z, 0)
        return sum(held.values())
    assert (kept(3) - kept(2)) / (B * T * 64) == pytest.approx(100, rel=0.1)
    assert (kept(3, True) - kept(2, True)) / (B * T * 64) == pytest.approx(4, rel=0.1)


@slow
def test_compiled_blocks_equal_eager_ones():
    """bf16 autocast and torch.compile, block by block in place: names stay, numbers agree."""
    a, b, (x, c, t) = net(depth=1), net(depth=1), states()
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
