"""Generation: what is unknown stays unknown, what is visible stays as it is, and the sampler follows known laws."""

import numpy as np
import pytest
import torch
from conftest import FEW, randomise, tiny_model
from transformers import DynamicCache

import generate
import hybrid
from core import backbone, denoiser, diffusion, frontier, masked, metrics
from core.common import UserError
from core.draws import generator

B, T, D, V = 3, 12, 16, 40


def net(**changes):
    """A bridge that has met unknown tokens, every weight random."""
    return randomise(denoiser.Bridge(**{**dict(D=D, W=32, blocks=2, H=2, visible="mix", V=V), **changes})).eval()


def states(seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(B, T, D, generator=g), torch.randn(B, T, D, generator=g), torch.rand(B, generator=g)


def tail(first):
    return (torch.arange(T) >= first).expand(B, T)


# ------------------------------------------------------------------------------------------------- what is hidden
def test_what_is_hidden_is_keyed_by_slot():
    for mode in ("prefix", "span", "mix"):
        u = diffusion.hide(mode, 64, 0, 3, range(400))
        assert not u[:, 0].any() and torch.equal(u[5:7], diffusion.hide(mode, 64, 0, 3, [5, 6]))
        ends = (u[:, 1:] != u[:, :-1]).sum(1)                                   # at most one stretch is unknown
        assert ends.max() <= 2 and (mode != "prefix" or (u[:, -1].all() and ends.max() == 1))
        share = u.any(1).float().mean().item()
        assert share == pytest.approx(0.75, abs=0.08) if mode == "mix" else share == 1
    assert diffusion.hide("full", 64, 0, 3, range(4)) is None


@torch.no_grad()
def test_an_unknown_token_never_influences_anything():
    """Changing the hidden truth changes nothing, through the network and through the path's far end."""
    x, c, t = states()
    other = c.clone()
    other[:, 5:] += torch.randn(B, T - 5, D)
    for source in ("noise", "embedding"):
        for bidirectional in (False, True):
            model = net(source=source, bidirectional=bidirectional)
            assert torch.equal(model(x, c, t, unknown=tail(5)), model(x, other, t, unknown=tail(5)))
            a, b = (diffusion.sample(model, k, 3, x, unknown=tail(5)) for k in (c, other))
            assert torch.equal(a, b)
            assert not torch.equal(model(x, c, t), model(x, other, t))          # the broken twin: it is visible


@pytest.mark.parametrize("bidirectional", [False, True])
@torch.no_grad()
def test_full_mode_keeps_exact_causality(bidirectional):
    """A bridge of mixed training, all tokens visible: the future never changes the past. And where tokens are unknown,
    visible ones before them still see nothing of them; a bidirectional bridge's unknown ones see each other."""
    model, (x, c, t) = net(bidirectional=bidirectional), states()
    later = x.clone()
    later[:, 7:] += 1
    ahead = c.clone()
    ahead[:, 7:] += 1
    assert torch.equal(model(x, c, t)[:, :7], model(later, ahead, t)[:, :7])
    a, b = model(x, c, t, unknown=tail(4)), model(later, c, t, unknown=tail(4))
    assert torch.equal(a[:, :4], b[:, :4])
    assert torch.equal(a[:, 4:7], b[:, 4:7]) != bidirectional


def test_the_readout_never_touches_the_bridge():
    model, (z, c, t), alone = net(), states(), {}
    ids = torch.randint(0, V, (B, T))
    for joint in (False, True):
        model.zero_grad()
        loss, z_hat = diffusion.token_loss(model, z, c, t, z.flip(0), 2, unknown=tail(4))
        total = loss.sum() + joint * diffusion.readout_loss(model, z_hat, ids).sum()
        total.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and "readout" not in n}
        if joint:
            assert all(torch.equal(grads[n], alone[n]) for n in alone) and model.readout.weight.grad.abs().sum() > 0
        alone = alone or grads
    assert alone["null"].abs().sum() > 0


def test_visible_tokens_weigh_little_beside_unknown_ones():
    model, (z, c, t) = net(), states()
    plain, _ = diffusion.token_loss(model, z, c, t, z.flip(0), 0)
    none = torch.zeros(B, T, dtype=torch.bool)
    assert torch.equal(plain, diffusion.token_loss(model, z, c, t, z.flip(0), 0, unknown=none)[0])
    mixed = none.clone()
    mixed[0, 6:] = True
    out, _ = diffusion.token_loss(model, z, c, t, z.flip(0), 0, unknown=mixed)
    assert torch.allclose(out[0, :6], diffusion.VISIBLE_WEIGHT * plain[0, :6]) and torch.allclose(out[1:], plain[1:])


# ------------------------------------------------------------------------------------------------- the sampler's law
class Process(torch.nn.Module):
    """The exact denoiser of a Gaussian process z over T positions (one channel), some of whose values are known: the
    condition holds them. E[z | x_t, known z] in closed form."""
    settings = dict(prediction="x", objective="diffusion", source="noise", blocks=1)

    def __init__(self, mean, K):
        super().__init__()
        self.mean, self.K = mean, K

    def forward(self, x, c, t, positions, mask, last, cache, layer, unknown):
        t, u = t[0].double(), unknown[0]
        m, C = condition(self.mean, self.K, c[0, :, 0].double(), u)
        gain = (1 - t) * C @ torch.linalg.inv((1 - t) ** 2 * C + t ** 2 * torch.eye(len(m), dtype=torch.float64))
        z = c.double().clone()
        z[:, u, 0] = m + (x[:, u, 0].double() - (1 - t) * m) @ gain.T
        return z.float()


def condition(mean, K, z, u):
    """Mean and covariance of the unknown values of a Gaussian vector given the known ones."""
    gain = K[u][:, ~u] @ torch.linalg.inv(K[~u][:, ~u])
    return mean[u] + gain @ (z[~u] - mean[~u]), K[u][:, u] - gain @ K[~u][:, u]


@pytest.mark.parametrize("sampler", ["euler", "ab2"])
def test_a_gaussian_process_is_sampled_with_its_conditional_law(sampler):
    """Prefix and span: mean and covariance of the unknown given the known; one call gives the mean and no spread."""
    n, positions = 6000, torch.arange(8, dtype=torch.float64)
    K = torch.exp(-(positions[:, None] - positions).abs() / 3) + 0.1 * torch.eye(8, dtype=torch.float64)
    mean, noise = torch.sin(positions), torch.randn(n, 8, 1, generator=torch.Generator().manual_seed(0))
    truth = torch.tensor([1.0, -0.5, 0.8, 0.1, -1.0, 0.4, 1.2, -0.2])
    for u in (positions >= 3, (positions >= 2) & (positions < 6)):
        m, C = condition(mean, K, truth.double(), u)
        model, c = Process(mean, K), truth[None, :, None].expand(n, 8, 1)
        z = diffusion.sample(model, c, 100, noise, sampler=sampler, unknown=u.expand(n, 8))[:, u, 0].double()
        assert torch.allclose(z.mean(0), m, atol=0.05)
        assert torch.allclose(torch.cov(z.T), C, atol=0.06) and (C - C.diag().diag()).abs().max() > 0.2
        one = diffusion.sample(model, c, 1, noise, sampler=sampler, unknown=u.expand(n, 8))[:, u, 0].double()
        assert torch.allclose(one.mean(0), m, atol=1e-4) and one.std(0).max() < 1e-4


@torch.no_grad()
def test_going_back_up_the_path():
    """From `done` calls on, the rest of the same grid is run; from z itself carried up by the same noise it comes back
    to what an exact denoiser knows."""
    calls = []

    class Known(torch.nn.Module):
        settings = dict(prediction="x", objective="diffusion", source="noise", blocks=3)

        def forward(self, x, c, t, positions, mask, last, cache, layer, unknown):
            calls.append((t[0].item(), layer))
            return c
    x, z, _ = states()
    assert torch.allclose(diffusion.sample(Known(), z, 8, x, z=z, done=5), z, atol=1e-6)
    assert [layer for _, layer in calls] == [15, 18, 21]
    assert [t for t, _ in calls] == pytest.approx([3 / 8, 2 / 8, 1 / 8])
    calls.clear()
    diffusion.sample(Known(), z, 2, x, shift=3.0)
    assert [t for t, _ in calls] == pytest.approx([1, 3 / 4])                    # 3 u / (1 + 2 u) at u = 1, 1/2


# ------------------------------------------------------------------------------------------------------ blocks
PRIOR = torch.randn(64, generator=torch.Generator().manual_seed(9)).double().log_softmax(0)


def random_hybrid(family="qwen3", layer=2, bidirectional=False, sampler="euler", **more):
    net = denoiser.Bridge(32, 32, 2, 2, visible="mix", bidirectional=bidirectional, V=64, **more)
    config = hybrid.HybridConfig(layer=layer, nfe=3, sampler=sampler, bridge=net.settings, vocab_size=64,
                                 hidden_size=32, eos_token_id=None, pad_token_id=0, max_position_embeddings=64)
    lm = backbone.Backbone(tiny_model(family).requires_grad_(False))
    return hybrid.HybridForCausalLM(config, randomise(net), lm).eval()


IDS = torch.randint(3, 64, (2, 14), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("bidirectional", [False, True])
@torch.no_grad()
def test_the_cache_of_the_prefix_changes_nothing(bidirectional):
    """Hidden states of a block on the prefix's cache = one joint run over prefix and block; a mask that is one token
    off must fail."""
    model, (noise, c, _) = random_hybrid(bidirectional=bidirectional), torch.randn(3, 2, 14, 32)
    unknown = (torch.arange(14) >= 9).expand(2, 14)
    joint = diffusion.sample(model.net, c, 3, noise, unknown=unknown)
    mask = torch.ones(5, 14, dtype=torch.bool)
    mask = mask if bidirectional else mask.tril(9)
    for broken in (False, True):
        cache = DynamicCache(config=model.config)
        seen = diffusion.sample(model.net, c[:, :9], 3, noise[:, :9], cache=cache)
        positions = torch.arange(9, 14)[None]
        if broken:
            mask = mask.clone()
            mask[:, 3] = False
        block = diffusion.sample(model.net, c[:, 9:], 3, noise[:, 9:], positions, mask, cache, unknown=unknown[:, 9:])
        assert torch.allclose(seen, joint[:, :9], atol=1e-5)
        assert torch.allclose(block, joint[:, 9:], atol=1e-4) != broken


@pytest.mark.parametrize("bidirectional", [False, True])
@torch.no_grad()
def test_the_second_block_equals_a_joint_pass(bidirectional):
    """Greedy, without refinement: prompt and first block visible, second unknown, all in one run without a cache."""
    model = random_hybrid(bidirectional=bidirectional)
    model.net.leave.bias.zero_()                                                  # else one token wins everywhere
    model.net.readout.bias.zero_()
    model.net.readout.weight.mul_(0.1)
    states = []
    out = model.generate_blocks(IDS, 10, block_size=5, nfe=3, refinements=0, temperature=0, seed=1, prior=PRIOR,
                                alpha=1.0, beta=0.1, watch=states.append)
    model.set_nfe(3)
    unknown = (torch.arange(24) >= 19).expand(2, 24)
    seen = model.noise_at(torch.arange(19)).expand(2, 19, 32)
    drawn = torch.stack([diffusion.normal((5, 32), torch.device("cpu"), 1, "block", 19, 0, b) for b in range(2)])
    c = model.net.standard_c(model.lm.embed(out.masked_fill(unknown, 7)))
    z = diffusion.sample(model.net, c, 3, torch.cat([seen, drawn], 1), unknown=unknown)
    assert torch.allclose(states[-1], z[:, 19:], atol=1e-4)                      # the last estimate is the sample
    known = model.lm.through(model.lm.embed(out), 0, 2)                           # exact where the token is known
    h = torch.where(unknown[..., None], model.net.hidden(z), known)
    upper = model.lm.head(model.lm.through(h, 2, 4)).log_softmax(-1)
    both = upper[:, 18:23] + model.net.readout(z)[:, 19:].log_softmax(-1) - 0.1 * PRIOR
    assert torch.equal(both.argmax(-1), out[:, 19:])
    shifted = both - upper[:, 18:23] + upper[:, 19:24]                           # the broken twin: one token off
    assert len(out[:, 19:].unique()) > 1 and (both - shifted).abs().max() > 0.1


@pytest.mark.parametrize("family", FEW)
def test_blocks_in_families(family):
    """Visible tokens are never changed, a row does not depend on its neighbours, blocks continue one another."""
    for layer, more in ((0, {"self_condition": True}), (2, {"prediction": "v", "sampler": "ab2"})):
        model = random_hybrid(family, layer, **more)
        how = dict(max_new_tokens=20, block_size=7, nfe=3, prior=PRIOR, refinements=1, seed=3)
        out = model.generate_blocks(IDS, **how)
        assert out.shape == (2, 34) and torch.equal(out[:, :14], IDS) and model.config.nfe == 3
        assert torch.equal(model.generate_blocks(IDS[:1], **how)[0], out[0])
        assert torch.equal(model.generate_blocks(IDS, **{**how, "max_new_tokens": 14})[:, :28], out[:, :28])
        assert not torch.equal(model.generate_blocks(IDS, **{**how, "seed": 4}), out)


def test_a_gap_is_filled_and_its_sides_stay():
    model, suffix = random_hybrid(bidirectional=True), torch.randint(3, 64, (2, 6))
    out = model.generate_blocks(IDS, 5, nfe=3, refinements=1, suffix_ids=suffix, prior=PRIOR)
    assert torch.equal(out[:, :14], IDS) and torch.equal(out[:, 19:], suffix)
    changed = suffix.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 61 + 3
    states = []
    for end in (suffix, changed):
        model.generate_blocks(IDS, 5, nfe=3, refinements=0, suffix_ids=end, prior=PRIOR, watch=states.append)
    assert not torch.equal(states[2][0, 14:19], states[5][0, 14:19]) and torch.equal(states[2][1], states[5][1])
    with pytest.raises(UserError, match="--bidirectional"):
        random_hybrid().generate_blocks(IDS, 5, suffix_ids=suffix, prior=PRIOR)


@torch.no_grad()
def test_the_two_experts():
    """alpha = 0 is the upper blocks alone."""
    model = random_hybrid()
    z, upper = torch.randn(2, 5, 32), torch.randn(2, 5, 64)
    how = dict(seed=0, temperature=0, top_p=1.0, alpha=0.0, beta=0.0, prior=None)
    assert torch.equal(model._decode(z, upper, how, (0, 0)), upper.argmax(-1))
    both = upper.double().log_softmax(-1) + 0.7 * model.net.readout(z).double().log_softmax(-1)
    assert torch.equal(model._decode(z, upper, {**how, "alpha": 0.7}, (0, 0)), both.argmax(-1))
    less = {**how, "alpha": 0.7, "beta": 5.0, "prior": PRIOR}
    without = model._decode(z, upper, less, (0, 0))
    assert torch.equal(without, (both - 5 * PRIOR).argmax(-1)) and not torch.equal(without, both.argmax(-1))
    with pytest.raises(UserError, match="twice"):
        model.generate_blocks(IDS, 4)


@torch.no_grad()
def test_a_refinement_asks_the_intact_model(monkeypatch):
    """After a block is drawn, the retained blocks' law is the intact model's own, given the tokens drawn last, and what
    goes back up the path is their true h[l]: on a cache as in one joint pass."""
    model, laws, starts = random_hybrid(), [], []
    decode, sample = model._decode, diffusion.sample
    monkeypatch.setattr(model, "_decode", lambda z, upper, *rest: laws.append((upper, decode(z, upper, *rest)))
                        or laws[-1][1])
    monkeypatch.setattr(diffusion, "sample", lambda *a, **k: starts.append(k.get("z")) or sample(*a, **k))
    model.generate_blocks(IDS, 10, block_size=5, nfe=3, refinements=1, seed=1, prior=PRIOR)
    text = torch.cat([IDS, laws[1][1], laws[2][1]], 1)                           # as it was when block two was refined
    h = model.lm.through(model.lm.embed(text), 0, 2)
    whole = model.lm.head(model.lm.through(h, 2, 4))
    assert torch.allclose(laws[3][0], whole[:, 18:23], atol=1e-4)
    assert not torch.allclose(laws[2][0], whole[:, 18:23], atol=1e-2)            # the first law is that of drawn states
    assert torch.allclose(starts[-1], model.net.standard_z(h)[:, 19:], atol=1e-4)


@torch.no_grad()
def test_a_bridge_that_generates_is_a_causal_lm_too():
    """Its cache has layers for the blocks it replaces, which stock generate() never fills: greedy and by beams it
    writes what it writes without a cache."""
    model = random_hybrid("qwen3", bidirectional=True)
    model.net.leave.bias.zero_()                                                  # else one token wins everywhere
    for how in ({}, {"num_beams": 3}):
        texts = [model.generate(IDS, max_new_tokens=6, do_sample=False, use_cache=cached, pad_token_id=0, **how,
                                attention_mask=torch.ones_like(IDS)) for cached in (True, False)]
        assert torch.equal(*texts) and len(texts[0][:, 14:].unique()) > 1


def test_the_product_of_two_experts_is_the_posterior():
    """x, and a, b independent given it, all enumerated: p(x | a) p(x | b) / p(x) is p(x | a, b). With the prior left in
    (the broken twin, beta = 0) it is not, and with half of it neither."""
    gen = torch.Generator().manual_seed(0)
    prior, a_of_x, b_of_x = (torch.randn(shape, generator=gen).double().softmax(-1) for shape in (6, (6, 3), (6, 4)))
    joint = prior[:, None, None] * a_of_x[:, :, None] * b_of_x[:, None]                                # (x, a, b)
    given_a, given_b = joint.sum(2) / joint.sum((0, 2)), joint.sum(1) / joint.sum((0, 1))              # (x, a), (x, b)
    for a in range(3):
        for b in range(4):
            truth = joint[:, a, b] / joint[:, a, b].sum()
            for beta in (1.0, 0.5, 0.0):
                law = hybrid.product(given_a[:, a].log(), given_b[:, b].log(), 1.0, beta, prior.log()).softmax(-1)
                assert torch.allclose(law, truth, atol=1e-12) == (beta == 1)


def test_the_token_prior(tmp_path):
    ids = np.arange(512, dtype=np.uint16) % 4                                  # every one of 0..3 equally often
    (tmp_path / "train.bin").write_bytes(ids.tobytes())
    (tmp_path / "meta.json").write_text('{"dtype": "uint16", "sha256": {"train": "t"}}')
    p = hybrid.token_prior(tmp_path, 6).exp()                                  # 3 windows of 128 fit
    assert p.tolist() == pytest.approx([97 / 390] * 4 + [1 / 390] * 2) and p.sum().item() == pytest.approx(1)


def test_what_drawing_costs():
    """8 calls, 8 refinements of 1 + 2; a second block needs the first one encoded, by 8 calls on half of the tokens."""
    info = {"objective": "diffusion", "blocks": 4, "layer": 2}
    cfg = generate.Config(new=64, block_size=64, nfe=8, refinements=8, back=0.25)
    assert generate.cost(cfg, info, 8) == (32, 24 * 4 + 6 + 8 * 8)
    cfg.block_size = 32
    assert generate.cost(cfg, info, 8) == (2 * 32 + 8, 24 * 4 + 6 + 8 * 8 + (8 * 4 + 8) // 2)
    assert generate.cost(cfg, {**info, "objective": "regression"}, 8) == (2 + 1, 4 + 6 + (4 + 8) // 2)


# ------------------------------------------------------------------------------------------------------- rivals
@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
@torch.no_grad()
def test_parallel_decoding_becomes_sampling(family):
    """With as many calls as new tokens: what drawing one by one at the same u gives. One call less can differ in the
    last token only; one call makes the first one right."""
    lm = backbone.Backbone(tiny_model(family))
    u = torch.stack([torch.from_numpy(generator(3, "jacobi", row).random(9)) for row in range(2)])
    want = IDS
    for i in range(9):
        logits = lm.head(lm.through(lm.embed(want), 0, lm.L))[:, -1].double()
        want = torch.cat([want, masked.choose(logits, 0.9, 1.0, u[:, i].contiguous())[:, None]], 1)
    found = [generate.jacobi(lm, IDS, 9, calls, 0.9, 3, PRIOR) for calls in (0, 1, 4, 9, 20)]
    assert torch.equal(found[3], want) and torch.equal(found[4], want)
    assert not torch.equal(found[0], want) and torch.equal(found[1][:, :15], want[:, :15])
    assert torch.equal(found[2][:, :18], want[:, :18]) and not torch.equal(found[2], want)
    assert not torch.equal(generate.jacobi(lm, IDS, 9, 9, 0.9, 4, PRIOR), want)                        # other draws


@torch.no_grad()
def test_a_lazy_rival_stays_by_bayes_rule(monkeypatch):
    """The law of a token given those before it and what it was: p(x | before) p(old | x) / sum, where old is x itself
    with probability 0.7, else drawn from the prior. Nearly always staying changes nothing after the first call."""
    lm, laws = backbone.Backbone(tiny_model("qwen3")), []
    choose = masked.choose
    monkeypatch.setattr(masked, "choose", lambda law, *rest: laws.append(law.clone()) or choose(law, *rest))

    def write(calls, stay, prompts=IDS):
        return generate.jacobi(lm, prompts, 6, calls, 1.0, 3, PRIOR, stay)
    before = write(1, 0.7)
    laws.clear()                                                    # then the first guess is drawn, from the prior
    write(2, 0.7)
    upper = lm.head(lm.through(lm.embed(before), 0, lm.L))[:, 13:-1].double().softmax(-1)
    seen = 0.3 * PRIOR.exp()[before[:, 14:]][..., None] + 0.7 * torch.nn.functional.one_hot(before[:, 14:], 64)
    assert torch.allclose(laws[2].softmax(-1), (upper * seen) / (upper * seen).sum(-1, keepdim=True), atol=1e-9)
    assert torch.equal(write(9, 1 - 1e-12), before) and not torch.equal(write(9, 0.0), before)
    assert torch.equal(write(3, 0.5)[:1], write(3, 0.5, IDS[:1])) and torch.equal(write(3, 0.5)[:, :14], IDS)


def test_a_frontier_goes_on_until_the_entropy_is_there():
    def search(law, start, target=3.0):
        text = torch.zeros(2, 5, dtype=torch.long)
        points, ids = frontier.frontier(
            lambda prompts, after, t: torch.cat([prompts, torch.full((2, 2), 100 * t).long()], 1),
            lambda ids: {"entropy": law(ids[0, -1].item() / 100), "gen_ppl": 7.0}, text, slice(3, 5), target, start)
        assert list(ids) and set(ids) == set(points) == {p["temperature"] for p in points.values()}
        return list(points), metrics.at_entropy(points.values(), target)
    up, there = search(lambda t: 2 + t / 2, [1.0])
    assert up == pytest.approx([1, 1.25, 1.5625, 1.9531, 2.4414], abs=1e-3) and there == pytest.approx(7)
    assert search(lambda t: 3.3 + t / 10, [0.5, 1.0]) == (pytest.approx([0.4, 0.5, 1.0]), pytest.approx(7))   # a bound
    hot, never = search(lambda t: t / 10, [1.0, 2.0])
    assert hot[-1] == pytest.approx(3.9062, abs=1e-3) and never is None                            # gives up when hot
    assert search(lambda t: 3 * t, [0.5, 1.0, 2.0])[0] == [0.5, 1.0, 2.0]                           # it lies between


def test_a_frontier_around_a_gap():
    """What is written is put before what follows, and compared with what the text had there."""
    text, seen = torch.arange(14).view(2, 7), []

    def write(prompts, after, t):
        seen.append(torch.cat([prompts, after], 1).tolist())
        return torch.cat([prompts, text[:, 3:4], 0 * text[:, 4:5]], 1)
    points, ids = frontier.frontier(write, lambda ids: {"entropy": 1.0, "gen_ppl": 7.0}, text, slice(3, 5), 1.0, [1.0])
    assert seen == [[[0, 1, 2, 5, 6], [7, 8, 9, 12, 13]]] and points[1.0]["right"] == 0.5
    assert ids[1.0].tolist() == [[0, 1, 2, 3, 0, 5, 6], [7, 8, 9, 10, 0, 12, 13]]


def rows_of(**named):
    """A result with rows of such names: name -> (matched of every seed, what else is known of them)."""
    points = [{"temperature": 1.0, "entropy": 3.0, "gen_ppl": 9.0, **dict.fromkeys(metrics.SHAPE[1:], 0.5)}]
    return {"real": {**points[0], "gen_ppl": 4.0}, "rows": [
        {"name": name, "matched": m, "frontier": points, "seed": seed, **about}
        for name, (values, about) in named.items() for seed, m in enumerate(values)]}


def test_the_report_takes_whatever_is_there(tmp_path):
    """A method that nobody knows, seeds averaged, the best rival at no more calls; one seed is never a verdict."""
    mine = {"layer": 2, "group": "blocks", "calls": 8, "steps": 10, "parameters": 5}
    found = rows_of(blocks=([8.0, 8.4, 8.2], mine), AR=([2.0], {"calls": 12}),
                    telepathy=([16.0, 17.0, 16.5], {"calls": 4}), unigrams=([None], {"calls": 0}))
    text = frontier.table(found)
    assert "| blocks | 8 | - | 8.2 +- 0.2 | 2.05 |" in text and "| unigrams | 0 | - | never there | - |" in text
    assert "| telepathy | 4 | - | 16.5 +- 0.5 |" in text
    lines = list(frontier.verdicts(found))
    assert len(lines) == 1 and lines[0].startswith("- blocks against telepathy: ahead by 0.699 nats a token (95% [")
    values = [value for _, value in frontier.headline(found)]
    assert values == ["8.2 +- 0.2 (ahead), rival 16.5 +- 0.5, real text 4"]
    found["rows"] = [r for r in found["rows"] if r["seed"] == 0]
    assert frontier.headline(found)[0][1].startswith("8.0 (not known), rival 16.0")
    assert "not known (n = 1" in next(frontier.verdicts(found))
    frontier.figure(found, tmp_path / "f.png")
    assert (tmp_path / "f.png").stat().st_size > 5000
    other = rows_of(blocks=([None], mine), AR=([2.0], {"calls": 12}))
    assert frontier.headline(other) == [["text drawn in hidden space", "never at real text's entropy"]]


def test_tokens_are_drawn_from_their_law():
    p = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    u = torch.linspace(0, 1, 20001, dtype=torch.float64)[:-1]
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.6)):
        want = p ** (1 / temperature)
        want = want * torch.tensor([1, 1, 0, 0]) if top_p < 1 else want
        drawn = masked.choose(p.log().expand(20000, 4), temperature, top_p, u)
        assert torch.allclose(torch.bincount(drawn, minlength=4).double() / 20000, want / want.sum(), atol=1e-3)
    assert masked.choose(p.log()[None], 0, 1.0, u[:1]).item() == 0
