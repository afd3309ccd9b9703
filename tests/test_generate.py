"""Generation: what is unknown stays unknown, what is visible stays as it is, and the sampler follows known laws."""
import json
import shutil

import pytest
import torch
from conftest import FAMILIES, fails, randomise, tiny_model
from transformers import DynamicCache

import bridge
import generate
import hybrid
from core import backbone, denoiser, diffusion, masked, metrics
from core.common import UserError
from core.stats import paired

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
    assert torch.allclose(out[0, :6], diffusion.SEEN_WEIGHT * plain[0, :6]) and torch.allclose(out[1:], plain[1:])


# ------------------------------------------------------------------------------------------------- the sampler's law
class Process(torch.nn.Module):
    """The exact denoiser of a Gaussian process z over T positions (one channel), some of whose values are known: the
    condition holds them. E[z | x_t, known z] in closed form."""
    shape = dict(prediction="x", objective="diffusion", source="noise", blocks=1, sampler="euler", shift=1.0)

    def __init__(self, mean, K, sampler):
        super().__init__()
        self.mean, self.K, self.shape = mean, K, {**self.shape, "sampler": sampler}

    def forward(self, x, c, t, positions, mask, last, cache, slot, unknown):
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


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_a_gaussian_process_is_sampled_with_its_conditional_law(sampler):
    """Prefix and span: mean and covariance of the unknown given the known; one call gives the mean and no spread."""
    n, positions = 6000, torch.arange(8, dtype=torch.float64)
    K = torch.exp(-(positions[:, None] - positions).abs() / 3) + 0.1 * torch.eye(8, dtype=torch.float64)
    mean, noise = torch.sin(positions), torch.randn(n, 8, 1, generator=torch.Generator().manual_seed(0))
    truth = torch.tensor([1.0, -0.5, 0.8, 0.1, -1.0, 0.4, 1.2, -0.2])
    for u in (positions >= 3, (positions >= 2) & (positions < 6)):
        m, C = condition(mean, K, truth.double(), u)
        model, c = Process(mean, K, sampler), truth[None, :, None].expand(n, 8, 1)
        z = diffusion.sample(model, c, 100, noise, unknown=u.expand(n, 8))[:, u, 0].double()
        assert torch.allclose(z.mean(0), m, atol=0.05)
        assert torch.allclose(torch.cov(z.T), C, atol=0.06) and (C - C.diag().diag()).abs().max() > 0.2
        one = diffusion.sample(model, c, 1, noise, unknown=u.expand(n, 8))[:, u, 0].double()
        assert torch.allclose(one.mean(0), m, atol=1e-4) and one.std(0).max() < 1e-4


@torch.no_grad()
def test_going_back_up_the_path():
    """From `done` calls on, the rest of the same grid is run; from z itself carried up by the same noise it comes back
    to what an exact denoiser knows."""
    calls = []

    class Known(torch.nn.Module):
        shape = dict(prediction="x", objective="diffusion", source="noise", blocks=3, sampler="euler", shift=1.0)

        def forward(self, x, c, t, positions, mask, last, cache, slot, unknown):
            calls.append((t[0].item(), slot))
            return c
    x, z, _ = states()
    assert torch.allclose(diffusion.sample(Known(), z, 8, x, z=z, done=5), z, atol=1e-6)
    assert [slot for _, slot in calls] == [15, 18, 21]
    assert [t for t, _ in calls] == pytest.approx([3 / 8, 2 / 8, 1 / 8])
    Known.shape, calls[:] = {**Known.shape, "shift": 3.0}, []
    diffusion.sample(Known(), z, 2, x)
    assert [t for t, _ in calls] == pytest.approx([1, 3 / 4])                    # 3 u / (1 + 2 u) at u = 1, 1/2


# ------------------------------------------------------------------------------------------------------ blocks
def random_hybrid(family="qwen3", layer=2, bidirectional=False, **more):
    net = denoiser.Bridge(32, 32, 2, 2, visible="mix", bidirectional=bidirectional, V=64, **more)
    config = hybrid.HybridConfig(layer=layer, nfe=3, bridge=net.settings, vocab_size=64, hidden_size=32,
                                 eos_token_id=None, pad_token_id=0, max_position_embeddings=64)
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
    out = model.generate_blocks(IDS, 10, block=5, nfe=3, rounds=0, temperature=0, seed=1, watch=states.append)
    model.set_nfe(3)
    unknown = (torch.arange(24) >= 19).expand(2, 24)
    seen = model.noise_at(torch.arange(19)).expand(2, 19, 32)
    drawn = torch.stack([diffusion.normal((5, 32), torch.device("cpu"), 1, "block", 19, 0, b) for b in range(2)])
    c = model.net.standard_c(model.lm.embed(out.masked_fill(unknown, 7)))
    z = diffusion.sample(model.net, c, 3, torch.cat([seen, drawn], 1), unknown=unknown)
    assert torch.allclose(states[-1], z[:, 19:], atol=1e-4)                      # the last estimate is the sample
    upper = model.lm.head(model.lm.through(model.net.hidden(z), 2, 4)).log_softmax(-1)
    both = upper[:, 18:23] + model.net.readout(z)[:, 19:].log_softmax(-1)
    assert torch.equal(both.argmax(-1), out[:, 19:])
    shifted = upper[:, 19:24] + model.net.readout(z)[:, 19:].log_softmax(-1)      # the broken twin: one token off
    assert len(out[:, 19:].unique()) > 1 and (both - shifted).abs().max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_in_every_family(family):
    """Visible tokens are never changed, a row does not depend on its neighbours, blocks continue one another."""
    for layer, more in ((0, {"self_condition": True}), (2, {"prediction": "v", "sampler": "heun"})):
        model = random_hybrid(family, layer, **more)
        how = dict(max_new_tokens=20, block=7, nfe=3, rounds=int("sampler" not in more), seed=3)
        out = model.generate_blocks(IDS, **how)
        assert out.shape == (2, 34) and torch.equal(out[:, :14], IDS) and model.config.nfe == 3
        assert torch.equal(model.generate_blocks(IDS[:1], **how)[0], out[0])
        assert torch.equal(model.generate_blocks(IDS, **{**how, "max_new_tokens": 14})[:, :28], out[:, :28])
        assert not torch.equal(model.generate_blocks(IDS, **{**how, "seed": 4}), out)


def test_a_gap_is_filled_and_its_sides_stay():
    model, suffix = random_hybrid(bidirectional=True), torch.randint(3, 64, (2, 6))
    out = model.generate_blocks(IDS, 5, nfe=3, rounds=1, suffix_ids=suffix)
    assert torch.equal(out[:, :14], IDS) and torch.equal(out[:, 19:], suffix)
    changed = suffix.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 61 + 3
    states = []
    for end in (suffix, changed):
        model.generate_blocks(IDS, 5, nfe=3, rounds=0, suffix_ids=end, watch=states.append)
    assert not torch.equal(states[2][0, 14:19], states[5][0, 14:19]) and torch.equal(states[2][1], states[5][1])
    with pytest.raises(UserError, match="--bidirectional"):
        random_hybrid().generate_blocks(IDS, 5, suffix_ids=suffix)


@torch.no_grad()
def test_the_two_experts():
    """alpha = 0 is the upper blocks alone; a token is foretold at the position before it, the first by the prompt."""
    model = random_hybrid()
    z, last = torch.randn(2, 5, 32), torch.randn(2, 1, 64)
    positions = torch.arange(5)[None]
    how = dict(seed=0, temperature=0, top_p=1.0, alpha=0.0, expert="both")
    upper = model.lm.head(model.lm.through(model.net.hidden(z), 2, 4))
    want = torch.cat([last, upper[:, :-1]], 1)
    assert torch.equal(model._decode(z, positions, None, last, how, (0, 0)), want.argmax(-1))
    both = want.double().log_softmax(-1) + 0.7 * model.net.readout(z).double().log_softmax(-1)
    assert torch.equal(model._decode(z, positions, None, last, {**how, "alpha": 0.7}, (0, 0)), both.argmax(-1))
    read = model._decode(z, positions, None, last, {**how, "expert": "readout"}, (0, 0))
    assert torch.equal(read, model.net.readout(z).argmax(-1))


def test_tokens_are_drawn_from_their_law():
    p = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    u = torch.linspace(0, 1, 20001, dtype=torch.float64)[:-1]
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.6)):
        want = p ** (1 / temperature)
        want = want * torch.tensor([1, 1, 0, 0]) if top_p < 1 else want
        drawn = masked.choose(p.log().expand(20000, 4), temperature, top_p, 0, u)
        assert torch.allclose(torch.bincount(drawn, minlength=4).double() / 20000, want / want.sum(), atol=1e-3)
    assert masked.choose(p.log()[None], 0, 1.0, 0, u[:1]).item() == 0


# ------------------------------------------------------------------------------------------------------ metrics
def test_metrics_have_known_answers():
    ids = torch.tensor([[1, 2, 3, 4], [1, 1, 1, 1]])
    assert metrics.entropy(ids) == pytest.approx(torch.tensor(4.0).log().item() / 2)
    assert metrics.repetition(ids, 2) == pytest.approx(1 - 4 / 6)              # 12 23 34 11, twice again 11
    assert metrics.repetition(ids[:1], 4) == 0
    with pytest.raises(UserError, match="5-grams"):
        metrics.repetition(ids, 5)
    assert metrics.self_bleu(torch.tensor([[1, 2, 3, 4, 5]] * 3)) == pytest.approx(1)
    assert metrics.self_bleu(torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])) == 0
    half = torch.tensor([[1, 2, 3, 4, 5], [1, 2, 3, 4, 9]])                     # 4/5, 3/4, 2/3 and 1/2 in common
    assert metrics.self_bleu(half) == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    assert metrics.self_bleu(torch.tensor([[1, 1, 1, 1, 2], [1, 2, 1, 2, 1]]), 1) == pytest.approx(0.8)
    with pytest.raises(UserError, match="two texts"):
        metrics.self_bleu(half[:1])
    lm = backbone.Backbone(tiny_model("llama"))
    own = metrics.measure(lm, IDS, 6)
    assert own["distinct_1"] == pytest.approx(sum(len(set(r[6:])) for r in IDS.tolist()) / IDS[:, 6:].numel())
    each = metrics.judge(lm, IDS, 6).mean(1).exp()
    assert own["gen_ppl_mean"] == pytest.approx(each.mean().item()) and own["gen_ppl"] <= own["gen_ppl_mean"]

    class Letters:                                                              # one character a token, both ways
        eos_token_id = 0

        def decode(self, ids):
            return "".join(chr(97 + i) for i in ids)

        def __call__(self, text, add_special_tokens=False):
            return {"input_ids": [ord(c) - 97 for c in text]}
    nll = metrics.judge(lm, IDS, 6)
    theirs = metrics.judge_text(lm, Letters(), Letters(), IDS, 6)
    assert torch.allclose(torch.stack(theirs), nll, atol=1e-5)
    assert metrics.measure(lm, IDS, 6, theirs)["gen_ppl"] == pytest.approx(own["gen_ppl"])
    want = torch.nn.functional.cross_entropy(lm.model(IDS).logits[:, 5:-1].flatten(0, 1), IDS[:, 6:].flatten())
    assert nll.shape == (2, 8) and nll.mean().item() == pytest.approx(want.item(), rel=1e-5)
    points = [{"entropy": 3.0, "gen_ppl": 10.0}, {"entropy": 4.0, "gen_ppl": 1000.0}]
    assert metrics.at_entropy(points, 3.5) == pytest.approx(100)
    assert metrics.at_entropy(points, 4.0) == pytest.approx(1000) and metrics.at_entropy(points, 4.05) is None
    assert paired([3.0], [1.0]) == (2.0, None)
    assert paired([1.0, 2.0, 3.0], [0.0, 0.0, 0.0]) == (2.0, pytest.approx(4.30 / 3 ** 0.5))


def test_mauve_tells_texts_apart():
    pytest.importorskip("mauve", reason="pip install mauve-text")
    lm = backbone.Backbone(tiny_model("llama"))
    gen = torch.Generator().manual_seed(0)
    one, two, other = (torch.randint(lo, hi, (40, 12), generator=gen) for lo, hi in ((3, 64), (3, 64), (3, 9)))
    assert metrics.mauve(lm, one, two, 4) > metrics.mauve(lm, one, other, 4) + 0.1


# ------------------------------------------------------------------------------------------------------ the runs
@pytest.fixture(scope="module")
def causal(runs, text):
    """A bridge of mixed training at layer 0, causal among unknown tokens, beside the pipeline's bidirectional one."""
    bridge.main(["--preset", "tiny", "--model", f"{runs}/toy", "--data", str(text), "--visible", "mix", "--blocks", "2",
                 "--layer", "0", "--out", f"{runs}/blocks0"])
    return runs / "blocks0"


def test_the_stage_runs(runs, causal, text, tmp_path, capsys):
    result = json.loads((runs / "blocks" / "result.json").read_text())
    assert 0 < result["readout_accuracy"] < 1 and set(result["nfe"]) == {"1", "2", "4", "8"}
    argv = ["--bridges", f"{runs}/blocks,{causal}", "--twin", f"{runs}/repr_align/w10", "--data",
            str(text), "--texts", "3", "--prefix", "16", "--new", "12", "--nfe", "2", "--rounds", "1",
            "--temperatures", "0.8,1", "--out", str(tmp_path / "g")]
    found = generate.main(argv)
    names = ["unigram", "AR, intact model", "masked twin, random order", "masked twin, confidence order"]
    assert [r["name"] for r in found["rows"]] == [*names, *["blocks"] * 6]
    assert all(p["gen_ppl"] > 1 and 0 < p["entropy"] < 2.5 for r in found["rows"] for p in r["frontier"])
    assert {r["calls"] for r in found["rows"] if r["name"] == "blocks"} == {4}   # 2, and 1 + 1 to refine
    assert (tmp_path / "g" / "generation.png").stat().st_size > 5000
    assert len((tmp_path / "g" / "samples.jsonl").read_text().splitlines()) == 10 * 2 * 3
    judged = generate.main([*argv[:-1], str(tmp_path / "j"), "--judge", f"{runs}/repr_align/w0", "--no-experts"])
    assert judged["real"]["gen_ppl"] != found["real"]["gen_ppl"]
    assert judged["real"]["entropy"] == found["real"]["entropy"]
    shutil.copytree(runs / "toy", tmp_path / "mute", ignore=shutil.ignore_patterns("tokenizer*"))
    assert "tokenizer" in fails(capsys, generate.main, *argv[:-1], tmp_path / "k", "--judge", tmp_path / "mute")
    assert not (tmp_path / "k").exists()
    capsys.readouterr()
    generate.main(argv)                                                        # finished: prints its table
    assert "real text" in capsys.readouterr().out


def test_the_command_line_writes_blocks(runs, capsys):
    argv = ["--bridge", f"{runs}/blocks", "--prompt", "import os", "--block", "8", "--max_new_tokens", "12",
            "--nfe", "3"]
    hybrid.main(argv)
    plain = capsys.readouterr().out
    assert plain.startswith("import os") and len(plain) > 12
    hybrid.main([*argv, "--show"])
    assert len(capsys.readouterr().out.splitlines()) >= 7                       # a line a call, and the text
    hybrid.main([*argv, "--suffix", "return x"])
    assert capsys.readouterr().out.rstrip().endswith("return x")


def test_bad_input(runs, causal, text, tmp_path, capsys):
    ask = ["--bridge", f"{runs}/blocks", "--prompt", "import os"]
    assert "must fit" in fails(capsys, hybrid.main, *ask, "--block", "8", "--max_new_tokens", "99999")
    assert "alpha" in fails(capsys, hybrid.main, *ask, "--block", "8", "--alpha", "-1")
    assert "--nfe" in fails(capsys, hybrid.main, *ask, "--block", "8", "--nfe", "-1")
    full = ["--bridge", f"{runs}/bridge", "--prompt", "import os"]
    assert "never met an unknown token" in fails(capsys, hybrid.main, *full, "--block", "8")
    forward = ["--bridge", str(causal), "--prompt", "import os", "--block", "8", "--suffix", "x"]
    assert "--bidirectional" in fails(capsys, hybrid.main, *forward)
    train = ["--preset", "tiny", "--model", f"{runs}/toy", "--data", str(text), "--out", str(tmp_path / "x")]
    assert "would let the replaced layer see" in fails(capsys, bridge.main, *train, "--layer", "2", "--bidirectional")
    assert "must lie in 0..4" in fails(capsys, bridge.main, *train, "--layer", "5", "--visible", "mix")
    sample = ["--bridges", f"{runs}/bridge", "--data", str(text), "--out", str(tmp_path / "y"), "--texts", "2"]
    assert "never met an unknown token" in fails(capsys, generate.main, *sample, "--twin", "", "--prefix", "8",
                                                 "--new", "8")
    assert not (tmp_path / "y").exists()                                          # refused before anything is written
    assert "--texts" in fails(capsys, generate.main, "--texts", "1")
    assert "--temperatures" in fails(capsys, generate.main, "--temperatures", "warm")
    assert "--block" in fails(capsys, hybrid.main, "--bridge", runs / "blocks", "--show", "--prompt", "x")
    heun = random_hybrid(sampler="heun")
    with pytest.raises(UserError, match="Heun"):
        heun.generate_blocks(IDS, 4)
