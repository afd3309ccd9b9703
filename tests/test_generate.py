"""GENERATE: how token blocks are sampled, what the rivals are, how texts are judged."""
import math
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import FEW, randomise, slow, tiny_model
from transformers import GenerationConfig

import generate
import hybrid
from core import backbone, diffusion, masked
from core.common import generator, normal

QUICK = [pytest.param(f, marks=[] if f in ("qwen3", "gpt2") else slow) for f in FEW]
PRIOR = torch.randn(64, generator=torch.Generator().manual_seed(9)).double().log_softmax(0)
IDS = torch.randint(3, 64, (2, 14), generator=torch.Generator().manual_seed(5))


def random_hybrid(family="qwen3", layer=2, **settings):
    """A bridge that generates, every weight random, on a random base of 4 blocks."""
    settings = dict(D=32, W=32, depth=2, H=2, V=64, generates=True, bidirectional=True) | settings
    net = randomise(diffusion.Bridge(diffusion.BridgeConfig(**settings))).eval()
    info = {"layer": layer, "nfe_default": 3, "seq_len": 64, "bridge": asdict(net.config)}
    lm = backbone.Backbone(tiny_model(family).requires_grad_(False))
    model = hybrid.HybridForCausalLM(hybrid.HybridConfig(info, vocab_size=64), net, lm).eval()
    with torch.no_grad():
        net.leave.bias.zero_()                          # else one token wins everywhere
        net.readout.bias.zero_()
        net.readout.weight.mul_(0.1)
    return model


def context(new=6, calls=4, seed=3):
    return generate.Context(generate.Config(new=new, seed=seed), PRIOR, calls)


def write(method, lm, prompts=IDS, temperature=1.0, stay=None, **settings):
    """The ids that a method writes."""
    more = {} if stay is None else {"stay": stay}
    return method(context(**settings), lm, prompts, temperature, **more)[0]


# -------------------------------------------------------------------------------------------------
# Token blocks

@torch.no_grad()
@pytest.mark.parametrize("alpha", [0.0, 0.7])
def test_the_second_token_block_equals_a_joint_pass(alpha):
    """Greedy, without refinement: prompt and first token block known, the second one unknown, in
    one pass without a cache. Both experts name the tokens, and the prior is divided out."""
    model = random_hybrid(self_condition=True)
    estimates = []
    out = generate.generate_blocks(model, IDS, 10, PRIOR, estimates.append, block_size=5, nfe=3,
                                   refinements=0, temperature=0, alpha=alpha, seed=1)
    unknown = (torch.arange(24) >= 19).expand(2, 24)
    noise = [normal((5, 32), torch.device("cpu"), 1, "block", 19, 0, row) for row in range(2)]
    known_noise = model.noise_at(torch.arange(19)).expand(2, 19, 32)
    noise = torch.cat([known_noise, torch.stack(noise)], 1)
    h0 = model.lm.embed(out.masked_fill(unknown, 7))    # the bridge cannot tell which token it is
    c = model.net.condition(h0, out)
    z = diffusion.sample(model.net, c, 3, noise, unknown=unknown)
    assert torch.allclose(estimates[-1], z[:, 19:], atol=1e-4)
    exact = model.lm.through(model.lm.embed(out), 0, 2)
    h = torch.where(unknown[..., None], model.net.restore(h0, z), exact)
    upper = model.lm.head(model.lm.through(h, 2, 4))[:, 18:23]
    logits = generate.product(upper, model.net.readout(z)[:, 19:], alpha, PRIOR)
    assert torch.equal(logits.argmax(-1), out[:, 19:])
    assert len(out[:, 19:].unique()) > 1


@torch.no_grad()
def test_what_a_visible_token_knows_of_later_ones():
    """In the first block nothing; after it what an unknown token before it has seen there."""
    later = IDS.clone()
    later[:, 9] += 1 - 2 * (IDS[:, 9] == 63)
    unknown = (torch.arange(14) == 4).expand(2, 14)
    t = torch.full((2,), 0.5)
    x = torch.randn(2, 14, 32, generator=torch.Generator().manual_seed(0))
    for depth in (1, 2):
        model = random_hybrid(depth=depth)
        z = [model.net(x, model.net.condition(model.lm.embed(ids), ids), t, unknown=unknown)
             for ids in (IDS, later)]
        changed = (z[0] != z[1]).any(-1)[0].tolist()
        assert changed[:4] == [False] * 4 and changed[4]
        assert changed[5:9] == [depth > 1] * 4


@pytest.mark.parametrize("family", QUICK)
def test_rows_and_token_blocks_in_families(family):
    """The prompt stays, a row does not depend on the others, token blocks continue one another, and
    the model goes back to its own number of calls."""
    for layer in (0, 2):
        model = random_hybrid(family, layer, self_condition=layer == 0)
        settings = dict(block_size=4, nfe=2, refinements=1)

        def write(ids, new, seed, model=model, settings=settings):
            return generate.generate_blocks(model, ids, new, PRIOR, seed=seed, **settings)
        out = write(IDS, 10, 3)
        assert out.shape == (2, 24) and torch.equal(out[:, :14], IDS) and model.config.nfe == 3
        assert torch.equal(write(IDS[:1], 10, 3)[0], out[0])
        assert torch.equal(write(IDS, 8, 3), out[:, :22])
        assert not torch.equal(write(IDS, 10, 4), out)


@torch.no_grad()
def test_a_refinement_reads_the_tokens_by_the_intact_model(monkeypatch):
    """The upper blocks' prediction is then the intact model's own, and the sampler starts from the
    true h[l] of the tokens."""
    model = random_hybrid()
    uppers, texts, starts = [], [], []
    product, choose, sample = generate.product, masked.choose, diffusion.sample

    def watched_product(upper, *rest):
        uppers.append(upper)
        return product(upper, *rest)

    def watched_choose(*args):
        texts.append(choose(*args))
        return texts[-1]

    def watched_sample(*args, **context):
        starts.append(context.get("z"))
        return sample(*args, **context)
    monkeypatch.setattr(generate, "product", watched_product)
    monkeypatch.setattr(masked, "choose", watched_choose)
    monkeypatch.setattr(diffusion, "sample", watched_sample)
    generate.generate_blocks(model, IDS, 10, PRIOR, block_size=5, nfe=3, refinements=1, seed=1)
    text = torch.cat([IDS, texts[1], texts[2]], 1)      # when the second token block is refined
    h = model.lm.through(model.lm.embed(text), 0, 2)
    whole = model.lm.head(model.lm.through(h, 2, 4)).double()
    assert torch.allclose(uppers[3], whole[:, 18:23], atol=1e-4)
    assert not torch.allclose(uppers[2], whole[:, 18:23], atol=1e-2)
    target = model.net.target(model.lm.embed(text), h)[:, 19:]
    assert torch.allclose(starts[-1], target, atol=1e-4)


def test_the_product_of_two_experts_is_the_posterior():
    """x, and a, b independent given x, enumerated: p(x | a) p(x | b) / p(x) is p(x | a, b). With
    the prior left in it is not."""
    gen = torch.Generator().manual_seed(0)
    prior, a_of_x, b_of_x = (torch.randn(shape, generator=gen).double().softmax(-1)
                             for shape in (6, (6, 3), (6, 4)))
    joint = prior[:, None, None] * a_of_x[:, :, None] * b_of_x[:, None]         # (x, a, b)
    given_a = joint.sum(2) / joint.sum((0, 2))
    given_b = joint.sum(1) / joint.sum((0, 1))
    for a in range(3):
        for b in range(4):
            experts = given_a[:, a].log(), given_b[:, b].log()
            truth = joint[:, a, b] / joint[:, a, b].sum()
            right = generate.product(*experts, 1.0, prior.log()).softmax(-1)
            assert torch.allclose(right, truth, atol=1e-12)
            wrong = generate.product(*experts, 1.0, torch.zeros(6)).softmax(-1)
            assert not torch.allclose(wrong, truth, atol=1e-3)


def test_the_token_prior(tmp_path, monkeypatch):
    windows = torch.arange(384).view(3, 128) % 4        # 0..3 equally often
    tokens = SimpleNamespace(windows=lambda count: windows, bos=None)
    monkeypatch.setattr(generate.data, "Tokens", lambda folder, split, T: tokens)
    p = generate.token_prior(tmp_path, 6).exp()
    assert p.tolist() == pytest.approx([97 / 390] * 4 + [1 / 390] * 2)
    tokens.bos = 5                                      # the first token of every window
    windows[:, 0] = 5
    p = generate.token_prior(tmp_path, 6).exp()
    assert p[5].item() == pytest.approx(1 / 387)


def test_network_calls_are_counted():
    """8 calls, 8 refinements of 1 + 2; a second token block needs the first one read by 8 calls."""
    cfg = generate.Config(new=64, block_size=64, nfe=8, refinements=8)
    assert generate.count_calls(cfg) == 32
    cfg.block_size = 32
    assert generate.count_calls(cfg) == 2 * 32 + 8
    assert generate.count_calls(generate.Config()) == 32


# -------------------------------------------------------------------------------------------------
# Rivals

@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
@torch.no_grad()
def test_jacobi_decoding_becomes_sampling(family):
    """With a call for every new token it gives the text that sampling token by token gives.
    After i calls the first i tokens are final."""
    lm = backbone.Backbone(tiny_model(family))
    u = torch.tensor(np.stack([generator(3, "jacobi", row).random(9) for row in range(2)]))
    want = IDS
    for i in range(9):
        logits = lm.head(lm.through(lm.embed(want), 0, lm.L))[:, -1].double()
        token = masked.choose(logits, 0.9, 1.0, u[:, i].contiguous())
        want = torch.cat([want, token[:, None]], 1)
    texts = {calls: write(generate.jacobi, lm, temperature=0.9, new=9, calls=calls)
             for calls in (0, 1, 4, 9, 12)}
    assert torch.equal(texts[9], want) and torch.equal(texts[12], want)
    assert not torch.equal(texts[0], want) and not torch.equal(texts[4], want)
    assert torch.equal(texts[1][:, :15], want[:, :15])
    assert torch.equal(texts[4][:, :18], want[:, :18])
    other = write(generate.jacobi, lm, temperature=0.9, new=9, calls=9, seed=4)
    assert not torch.equal(other, want)


@torch.no_grad()
def test_lazy_jacobi_stays_by_bayes_rule(monkeypatch):
    """p(x | before, last) is p(x | before) p(last | x) over its sum, where last is x itself with
    probability 0.7, else a sample of the prior."""
    lm = backbone.Backbone(tiny_model("qwen3"))
    choose = masked.choose
    logits = []

    def watched(given, *rest):
        logits.append(given.clone())
        return choose(given, *rest)
    monkeypatch.setattr(masked, "choose", watched)
    first = write(generate.jacobi, lm, calls=1, stay=0.7)
    logits.clear()
    write(generate.jacobi, lm, calls=2, stay=0.7)
    upper = lm.head(lm.through(lm.embed(first), 0, lm.L))[:, 13:-1].double().softmax(-1)
    last = first[:, 14:]
    likelihood = 0.3 * PRIOR.exp()[last][..., None] + 0.7 * torch.nn.functional.one_hot(last, 64)
    posterior = upper * likelihood
    posterior = posterior / posterior.sum(-1, keepdim=True)
    assert torch.allclose(logits[2].softmax(-1), posterior, atol=1e-6)
    stubborn = write(generate.jacobi, lm, calls=9, stay=1 - 1e-12)
    assert torch.equal(stubborn, first)
    lazy = write(generate.jacobi, lm, stay=0.5)
    alone = write(generate.jacobi, lm, IDS[:1], stay=0.5)
    assert torch.equal(lazy[:1], alone) and torch.equal(lazy[:, :14], IDS)


def test_the_ar_rival_sets_every_sampling_field():
    """The generation_config.json of a base does not leak into the rival."""
    lm = backbone.Backbone(tiny_model("qwen3"))
    plain = write(generate.autoregressive, lm, new=12)
    leaking = dict(top_p=0.1, top_k=2, min_p=0.5, repetition_penalty=9.0, no_repeat_ngram_size=1,
                   suppress_tokens=plain[0, 14:].tolist(), temperature=0.01, do_sample=True)
    lm.model.generation_config = GenerationConfig(**leaking)
    assert torch.equal(write(generate.autoregressive, lm, new=12), plain)
    lm.model.generation_config = GenerationConfig(**leaking)
    torch.manual_seed(3)
    leaked = lm.model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=12)
    assert not torch.equal(leaked, plain)
    assert plain.shape == (2, 26) and torch.equal(plain[:, :14], IDS)


def test_unigrams_have_their_frequencies():
    for temperature in (1.0, 0.5):
        new = write(generate.unigrams, None, temperature=temperature, new=5000)[:, 14:]
        counts = torch.bincount(new.flatten(), minlength=64).double() / new.numel()
        want = (PRIOR / temperature).softmax(0)
        assert (counts - want).abs().max() < 0.02


# -------------------------------------------------------------------------------------------------
# Metrics

def test_metrics_by_hand():
    assert generate.entropy(torch.tensor([1, 2, 3, 4])) == pytest.approx(math.log(4))
    assert generate.entropy(torch.tensor([7, 7, 7, 7])) == 0
    lm = backbone.Backbone(tiny_model("llama"))
    logits = lm.model(IDS).logits[:, 5:-1].flatten(0, 1)
    nll = torch.nn.functional.cross_entropy(logits, IDS[:, 6:].flatten())
    measured = generate.measure(lm, IDS, 6)
    assert measured["gen_ppl"] == pytest.approx(nll.exp().item(), rel=1e-5)
    entropies = [generate.entropy(ids) for ids in IDS[:, 6:]]
    assert measured["entropy"] == pytest.approx(sum(entropies) / 2)


def points(*values):
    return [{"entropy": entropy, "gen_ppl": ppl} for entropy, ppl in values]


def test_at_entropy():
    colder = points((4.0, 1000.0), (3.0, 10.0))
    assert generate.at_entropy(colder, 3.5) == pytest.approx(100)
    assert generate.at_entropy(colder, 3.0) == pytest.approx(10)
    assert generate.at_entropy(colder[::-1], 4.0) == pytest.approx(1000)
    assert generate.at_entropy(colder, 2.9) == pytest.approx(10)        # above it even when cold
    assert generate.at_entropy(colder[::-1], 4.1) is None                   # below it even when hot
    assert generate.at_entropy(points((3.0, 7.0)), 3.0) == 7
    assert generate.at_entropy(points((2.0, 5.0), (3.0, 10.0), (4.0, 1000.0)), 3.5) == (
        pytest.approx(100))


def test_a_frontier_goes_on_until_the_entropy_is_reached(monkeypatch):
    def search(entropy_of):
        def measure(lm, texts, prefix):
            return {"entropy": entropy_of(texts.item()), "gen_ppl": 7.0}

        def write(prompts, temperature):
            return torch.tensor(temperature), 1
        monkeypatch.setattr(generate, "measure", measure)
        frontier, last = generate.frontier(write, None, IDS, 3.0)
        temperatures = [point["temperature"] for point in frontier]
        assert last.item() == pytest.approx(temperatures[-1])
        return temperatures
    assert search(lambda t: 2 + t / 2) == pytest.approx([1, 1.25, 1.5625, 1.9531, 2.4414])
    assert search(lambda t: 2.3 + t) == pytest.approx([1, 0.8, 0.64])
    assert search(lambda t: 3.3 + t / 10)[-1] == pytest.approx(0.4096)      # it gives up when cold
    assert search(lambda t: t / 10)[-1] == pytest.approx(3.8146)            # and when hot
    assert search(lambda t: 3.0) == [1.0]


def test_the_table_takes_what_was_not_reached():
    row = {"method": "lazy Jacobi", "layer": None, "seed": None, "calls": 8, "matched": None,
           "tokens_per_s": 10.2}
    ours = {**row, "method": "hidden-state diffusion, layer 2", "layer": 2, "seed": 1,
            "matched": 8.04}
    result = {"real": {"gen_ppl": 4.0}, "rows": [row, ours]}
    text = generate.table(result)
    assert "| lazy Jacobi | - | 8 | 10.2 | - |" in text
    assert "| hidden-state diffusion, layer 2 | 1 | 8 | 10.2 | 8.04 |" in text
