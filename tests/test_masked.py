"""A masked diffusion LM: nobody sees what they must not, samplers keep their promises, the bound is exact."""
import itertools
import json
import math

import numpy as np
import pytest
import torch
from conftest import CONVERTIBLE, tiny_model
from transformers import AutoModelForCausalLM, DynamicCache

import data
from core import backbone, masked
from core.common import UserError
from core.masked import (ORDERS, TWO_WAY, Arm, Sampling, Student, fill, fill_steps, one_copy_sees, predictors,
                         who_sees)

IDS = torch.randint(3, 60, (3, 16), generator=torch.Generator().manual_seed(0))
HIDE = torch.rand(3, 16, generator=torch.Generator().manual_seed(1)) < torch.tensor([[0.3], [0.5], [0.8]])
HIDE[:, 0] = False
BLOCKS = [Arm("block", 4, "noisy"), Arm("block", 4, "causal")]
ARMS = [Arm(), *BLOCKS]


def student(family="qwen3", seed=0, arm=TWO_WAY):
    return Student(backbone.Backbone(tiny_model(family, seed).requires_grad_(False)), 63, arm)


def left_after_calls(s, ids, is_mask, steps, order="confidence"):
    """Numbers of masks (calls, B) that are left after every network call."""
    filling = fill_steps(s, ids, is_mask, steps, Sampling(order=order))
    return [left.sum(1).tolist() for _, left in filling]


# -------------------------------------------------------------------------------------------------
# Who sees whom

def test_who_sees_whom_by_hand():
    def matrix(rows):
        return torch.tensor([[c == "1" for c in row] for row in rows.split()])
    noisy, causal = Arm("block", 2, "noisy"), Arm("block", 2, "causal")
    assert torch.equal(who_sees(noisy, 4, False), matrix("1100 1100 1111 1111"))
    assert torch.equal(who_sees(noisy, 3, False), matrix("110 110 111"))         # the last token block may be shorter
    assert torch.equal(who_sees(noisy, 4, True), matrix(
        "11000000 11000000 11110000 11110000 00001100 00001100 11000011 11000011"))
    for known in (False, True):
        assert torch.equal(who_sees(causal, 4, known), matrix(
            "10000000 11000000 11100000 11110000 00001100 00001100 11000011 11000011"))
    assert torch.equal(one_copy_sees(causal, 3), matrix("100 110 111"))
    assert predictors(noisy, 4, False).tolist() == predictors(Arm(), 4, True).tolist() == [0, 1, 2]
    assert predictors(noisy, 4, True).tolist() == predictors(causal, 4, False).tolist() == [4, 1, 6]


@pytest.mark.parametrize("family", CONVERTIBLE)
@torch.no_grad()
def test_nothing_leaks(family):
    """What predicts a token block knows neither its masked tokens, which the clean copy holds, nor later ones."""
    place = torch.arange(16)

    def same(a, b):                                                              # experts may group tokens differently
        return torch.allclose(a, b, atol=1e-5)
    for arm in BLOCKS:
        s = student(family, arm=arm)
        for known in (False, True):
            at = predictors(arm, 16, known)

            def states(changed, s=s, known=known, at=at):
                *_, normed = s.states(torch.where(changed, 5, IDS), HIDE, known)
                return normed[:, at]
            want = states(torch.zeros_like(HIDE))
            hidden = states(HIDE & (place >= 4) | (place >= 8))                  # masks of block 4..7, all later tokens
            assert same(hidden[:, :7], want[:, :7]) and not same(hidden, want)
            given = states(~HIDE & (place >= 4) & (place < 8))                   # but its visible tokens are seen
            assert same(given[:, :3], want[:, :3]) and not same(given[:, 3:7], want[:, 3:7])
            earlier = states(HIDE & (place < 4))                                 # and clean text before it
            assert same(earlier[:, 4:], want[:, 4:]) != arm.has_copy(known)


@torch.no_grad()
def test_two_way_attention_sees_the_future_but_never_a_hidden_token():
    s, visible = student(), torch.zeros_like(HIDE)
    *_, a = s.states(IDS, visible)
    *_, b = s.states(torch.cat([IDS[:, :-1], IDS[:, -1:] - 1], 1), visible)
    assert ((a - b).abs().amax(-1) > 1e-6).all()
    *_, a = s.states(IDS, HIDE)
    *_, b = s.states(torch.where(HIDE, 5, IDS), HIDE)
    assert torch.equal(a, b)


# -------------------------------------------------------------------------------------------------
# The mask's embedding

def test_folding_the_shift_changes_nothing():
    for family in ("qwen3", "gemma3", "gpt2", "granite"):
        s = student(family)
        with torch.no_grad():
            s.shift.normal_()
            *_, before = s.states(IDS, HIDE)
            s.fold()
            *_, after = s.states(IDS, HIDE)
        assert torch.allclose(before, after, atol=1e-4) and not s.shift.any()


class Tokenizer:
    def __init__(self, mask_token_id=None):
        self.mask_token_id = mask_token_id

    def add_special_tokens(self, names):
        self.mask_token_id = 64


@torch.no_grad()
def test_the_mask_row_is_the_mean_row():
    for family in ("qwen3", "gpt2"):                                             # two tables, and one for both
        lm = backbone.Backbone(tiny_model(family).requires_grad_(False))
        rows = lm.model.get_input_embeddings().weight.clone()
        assert masked.add_mask(lm, Tokenizer()) == 64 and lm.V == 65
        table = lm.model.get_input_embeddings().weight
        assert torch.equal(table[:64], rows) and torch.equal(table[64], rows.mean(0))
    lm = backbone.Backbone(tiny_model("qwen3").requires_grad_(False))            # a spare row
    lm.model.get_input_embeddings().weight[63] = 0                               # which was never trained
    rows = lm.model.get_input_embeddings().weight.clone()
    assert masked.add_mask(lm, Tokenizer(63)) == 63 and lm.V == 64
    assert torch.equal(lm.model.get_input_embeddings().weight[63], rows.mean(0))


# -------------------------------------------------------------------------------------------------
# Filling masks

@pytest.mark.parametrize("order, settings", [
    ("random", {}), ("confidence", {"temperature": 0.0}), ("entropy", {"top_p": 0.5})])
def test_every_order_keeps_its_promises(order, settings):
    """Visible tokens stay, no mask is left, hidden tokens play no part, rows do not depend on their batch."""
    s = student()
    for steps in (1, 3, 50):
        out = fill(s, IDS, HIDE, steps, order=order, **settings)
        assert torch.equal(out[~HIDE], IDS[~HIDE]) and (out != s.mask_id).all()
        left = torch.tensor(left_after_calls(s, IDS, HIDE, steps, order))
        assert len(left) == min(steps, HIDE.sum(1).max()) and not left[-1].any() and (left.diff(dim=0) <= 0).all()
    assert torch.equal(out, fill(s, torch.where(HIDE, 5, IDS), HIDE, 50, order=order, **settings))
    assert torch.equal(out[:1], fill(s, IDS[:1], HIDE[:1], 50, order=order, **settings))


def test_an_order_is_a_function_and_an_entry(monkeypatch):
    """The orders differ. A new one gets the masks in reading order."""
    s = student()
    outs = {tuple(fill(s, IDS, HIDE, 6, order=order).flatten().tolist()) for order in ORDERS}
    assert len(outs) == 3
    monkeypatch.setitem(ORDERS, "left", lambda logits, token, u: -torch.arange(len(u), dtype=torch.float64))
    for _, is_mask in fill_steps(s, IDS, HIDE, 4, Sampling(order="left")):
        for row in range(3):
            places = HIDE[row].nonzero()[:, 0].tolist()
            left = is_mask[row].nonzero()[:, 0].tolist()
            assert left == places[len(places) - len(left):]


def test_the_surest_masks_within_a_bound():
    """Entropies 0.1, 0.3, 0.5 and 0.2: sorted and without the largest they add up to 0, .1, .3, .6."""
    is_mask = torch.tensor([[False, True, True, True, True], [False, False, True, False, False]])
    entropy = torch.tensor([0.1, 0.5, 0.3, 0.2, 9.0]).double()
    for bound, places in ((0, [1]), (0.09, [1]), (0.11, [1, 4]), (0.31, [1, 3, 4]), (1, [1, 2, 3, 4])):
        revealed = masked.within(entropy, is_mask, bound)
        assert revealed[0].nonzero()[:, 0].tolist() == places and revealed[1].tolist() == is_mask[1].tolist()


@pytest.mark.parametrize("arm", ARMS, ids=str)
def test_an_entropy_bound_reveals_one_mask_or_all(arm):
    s = student(arm=arm)
    hide = HIDE if arm == TWO_WAY else torch.arange(16).expand(3, 16) > 5
    counts = {bound: [left.sum(1) for _, left in fill_steps(s, IDS, hide, 1, Sampling(bound=bound))]
              for bound in (1e-9, 1e9)}
    assert len(counts[1e-9]) == hide.sum(1).max()                                # one mask a call
    assert len(counts[1e9]) == (1 if arm == TWO_WAY else 3)                      # one call a token block
    assert not counts[1e-9][-1].any() and not counts[1e9][-1].any()
    with pytest.raises(AssertionError, match="bound of the entropy"):
        fill(s, IDS, hide, 1, bound=-0.1)


def test_sampled_tokens_follow_the_distribution():
    """One masked token after a fixed prompt: frequencies over many rows against the softmax."""
    s, ids = student(), IDS[:1, :6].repeat(2000, 1)
    is_mask = (torch.arange(6) == 5).expand(2000, 6)
    *_, normed = s.states(ids[:1], is_mask[:1])
    p = torch.softmax(s.logits(normed[:, 4]).double() / 3, -1)[0].detach()
    tokens = fill(s, ids, is_mask, 1, temperature=3.0)[:, 5]
    frequency = torch.bincount(tokens, minlength=64).double() / 2000
    assert (frequency - p).abs().max() < 5 * (p * (1 - p) / 2000).sqrt().max()


def test_nucleus():
    p = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    u = torch.linspace(0, 1, 10001, dtype=torch.float64)[:-1]
    for top_p, want in ((1.0, p), (0.7, torch.tensor([5, 3, 0, 0]) / 8), (0.1, torch.tensor([1, 0, 0, 0]))):
        token = masked.choose(p.log().expand(10000, 4), 1.0, top_p, u)
        assert torch.allclose(torch.bincount(token, minlength=4) / 10000, want.float(), atol=1e-3)
    assert masked.choose(p.log(), 1.0, 0.0, u[-1]) == 0                          # the most likely one
    with pytest.raises(AssertionError, match="negative"):
        masked.choose(p.log(), -1.0, 1.0, u[-1])


def test_one_joint_float32_sample_is_biased_and_two_samples_are_not():
    """Reveal with probability a = 1/1024 over V = 32768 tokens. One float32 Gumbel sample over {tokens, mask} reveals
    too few: uniforms live on a grid of 2^-24, so the best token's noise is cut off. Ours counts the reveals."""
    a, V, n = 1 / 1024, 32768, 1_000_000
    gen = np.random.default_rng(0)
    top = np.ceil(2 ** 24 * gen.random(n) ** (1 / V)).clip(max=2 ** 24) - 1   # the largest of V uniforms
    best = -np.log(-np.log(np.maximum(top, 1) / 2 ** 24)) + math.log(a / V)
    mask = -np.log(-np.log(gen.random(n))) + math.log(1 - a)
    assert (best > mask).mean() / a < 0.9
    hide = torch.arange(64)[None] > 0
    left = left_after_calls(student(), IDS[:1].repeat(1, 4), hide, 7, "random")
    assert left == [[54], [45], [36], [27], [18], [9], [0]]


def test_filling_in_bf16():
    """As on a GPU: bf16 weights, an fp32 shift."""
    for arm in ARMS:
        s = student(arm=arm).bfloat16()
        s.shift.data = s.shift.data.float() + 0.5
        hide = torch.arange(16).expand(3, 16) >= 6
        assert (fill(s, IDS, hide, 3, temperature=1.0) != s.mask_id).all()


# -------------------------------------------------------------------------------------------------
# Token block after token block

@pytest.mark.parametrize("family", CONVERTIBLE)
@torch.no_grad()
def test_cached_token_blocks_equal_recomputed_ones(family):
    """The states that predict a token block, from the cache as `fill` has it and from one pass over the whole text;
    some layers see a window of 8."""
    for arm in BLOCKS:
        s, cache = student(family, arm=arm), DynamicCache()
        for lo, hi in ((4, 8), (8, 12), (12, 16)):
            hide = torch.zeros(3, 16, dtype=torch.bool)
            hide[:, lo:hi] = HIDE[:, lo:hi]
            known = cache.get_seq_length()
            see = one_copy_sees(arm, lo)[known:]
            before = s.extend(cache, IDS[:, known:lo], hide[:, known:lo], see)[:, -1:]
            got = s.extend(cache, IDS[:, lo:hi], hide[:, lo:hi], torch.ones(hi - lo, hi, dtype=torch.bool))
            backbone.trim(cache, lo)
            got = torch.cat([before, got[:, :-1]], 1)
            assert torch.allclose(got, s.predict(IDS, hide)[:, lo - 1:hi - 1], atol=1e-4), (arm, lo)
        wrong = student(family, arm=Arm("block", 8, arm.context))
        assert not torch.allclose(got, wrong.predict(IDS, hide)[:, 11:15], atol=1e-3)


@pytest.mark.parametrize("arm", BLOCKS, ids=str)
@torch.no_grad()
def test_the_cached_fill_equals_a_fill_without_cache(arm):
    """The greedy text of one token a call, against whole passes over clean text and one masked token block."""
    s, hide = student(arm=arm), torch.arange(16).expand(3, 16) >= 6
    out = fill(s, IDS, hide, 10, temperature=0.0)
    ids, left = IDS.clone(), hide.clone()
    for lo, hi in ((4, 8), (8, 12), (12, 16)):
        while left[:, lo:hi].any():
            here = left.clone()
            here[:, hi:] = False
            logits = s.logits(s.predict(ids, here))[:, lo - 1:hi - 1].double()   # (B, S, V)
            p, token = logits.softmax(-1).max(-1)
            i = p.where(left[:, lo:hi], -1.0).argmax(1, keepdim=True) + lo       # the most certain one
            ids.scatter_(1, i, token.gather(1, i - lo))
            left.scatter_(1, i, False)
    assert torch.equal(out, ids)


@pytest.mark.parametrize("arm", BLOCKS, ids=str)
def test_token_blocks_are_filled_from_left_to_right(arm):
    """A prompt may end inside one. Rows do not depend on their batch, nor token blocks on later ones."""
    s, hide = student(arm=arm), torch.arange(16).expand(3, 16) >= 6
    out = fill(s, IDS, hide, 5)
    assert torch.equal(out[:, :6], IDS[:, :6]) and (out != 63).all()
    assert left_after_calls(s, IDS, hide, 5) == [[8] * 3, [6] * 3, [4] * 3, [2] * 3, [0] * 3]
    assert torch.equal(out[:1], fill(s, IDS[:1], hide[:1], 5))
    assert torch.equal(out[:, :12], fill(s, IDS[:, :12], hide[:, :12], 3))
    assert torch.equal(out, fill(s, torch.where(hide, 5, IDS), hide, 5))
    ragged = torch.arange(16) >= torch.tensor([[6], [3], [9]])                   # prompts of unequal lengths
    out = fill(s, IDS, ragged, 8)
    assert torch.equal(out[~ragged], IDS[~ragged]) and (out != 63).all()
    with pytest.raises(AssertionError, match="first token must be visible"):
        fill(s, IDS, torch.ones_like(hide), 6)
    with pytest.raises(UserError, match="sees nothing after it"):
        fill(s, IDS, hide & (torch.arange(16) < 9), 6)


# -------------------------------------------------------------------------------------------------
# Likelihood

def by_orders(s, ids, blocks):
    """The bound as a mean over all orders of revealing the tokens of each block one by one: no mask counts."""
    total = 0.0
    for block in blocks:
        orders = list(itertools.permutations(block))
        for order in orders:
            for j, place in enumerate(order):
                hide = torch.zeros(1, len(ids), dtype=torch.bool)
                hide[0, list(order[j:])] = True
                logits = s.logits(s.predict(ids[None], hide))[0, place - 1]
                total -= torch.log_softmax(logits, -1)[ids[place]].item() / len(orders)
    return total


@pytest.mark.parametrize("arm, given", [(Arm(), 2), (Arm("block", 2, "noisy"), 1),
                                        (Arm("block", 2, "causal"), 1)], ids=str)
@torch.no_grad()
def test_the_bound_equals_its_enumeration(arm, given):
    s, ids = student(arm=arm), IDS[0, :5]
    blocks = [range(given, 5)] if arm == Arm() else [[1], [2, 3], [4]]
    want = by_orders(s, ids, blocks)
    bounds = [masked.likelihood(s, ids, 8, seed, given) for seed in range(40)]
    values, errors = np.array(bounds).T
    assert abs(values.mean() - want) < 4 * values.std(ddof=1) / 40 ** 0.5
    assert (errors ** 2).mean() ** 0.5 == pytest.approx(values.std(ddof=1), rel=0.35)
    if arm == Arm():
        exact = 0.0                                                              # all counts and subsets, equally often
        for k in range(1, len(blocks[0]) + 1):
            subsets = list(itertools.combinations(blocks[0], k))
            weight = torch.zeros(len(subsets), 5, dtype=torch.float64)
            for row, subset in zip(weight, subsets, strict=True):
                row[list(subset)] = 1 / k
            exact += masked.masked_ce(s, ids, weight).mean().item()
        assert exact == pytest.approx(want, rel=1e-5)


def test_one_block_is_two_way_and_blocks_of_one_are_autoregressive():
    """Of a family without windows: two-way attention lifts them, token blocks keep them."""
    for given in (1, 5):
        want = masked.likelihood(student("llama"), IDS[0], 8, given=given)
        for context in ("noisy", "causal"):
            got = masked.likelihood(student("llama", arm=Arm("block", 16, context)), IDS[0], 8, given=given)
            assert got == pytest.approx(want, rel=1e-5)
        s = student("llama", arm=Arm("block", 1, "causal"))
        logits = s.lm.model(IDS[:1], use_cache=False).logits.index_fill(-1, torch.tensor([63]), -torch.inf)
        log_p = torch.log_softmax(logits[0, :-1], -1).gather(-1, IDS[0, 1:, None])
        want = -log_p[given - 1:].sum().item()
        assert masked.likelihood(s, IDS[0], 4, given=given) == (pytest.approx(want, rel=1e-5), 0.0)


def test_a_bound_needs_pairs_of_calls_and_visible_masks_do_not_count():
    s, ids = student(), IDS[0].clone()
    weight = torch.zeros(1, 16).double()
    weight[0, 9] = 1
    assert masked.masked_ce(s, ids, weight) > 0
    ids[3] = s.mask_id                                                           # its CE is infinite
    assert masked.masked_ce(s, ids, weight).isfinite()
    for calls in (2, 5):
        with pytest.raises(AssertionError, match="even number, at least 4"):
            masked.likelihood(s, ids, calls)


def test_mask_counts_are_uniform():
    counts = np.concatenate([masked.mask_counts([7, 7], 6, seed, 0).flatten() for seed in range(1000)])
    assert np.abs(np.bincount(counts, minlength=8)[1:] / 12000 - 1 / 7).max() < 0.015
    for seed in range(20):
        slices, _ = np.histogram(masked.mask_counts([60], 6, seed, 0), [1, 21, 41, 61])
        assert slices.tolist() == [2, 2, 2]


# -------------------------------------------------------------------------------------------------
# As a model of transformers

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A converted model, as repr_align.py leaves it."""
    out = tmp_path_factory.mktemp("converted")
    lm = backbone.Backbone(tiny_model("llama", vocab_size=300, max_position_embeddings=90).requires_grad_(False))
    tokenizer = data.train_tokenizer(data.resolve(__file__), 280)
    mask_id = masked.add_mask(lm, tokenizer)
    (out / "config.json").write_text('{"dihal": {"edition": 3}}')
    backbone.save_model(lm.model, tokenizer, out, converted=True)
    result = {"mask_id": mask_id, "attention": "bidirectional", "block_size": 16, "context": "noisy"}
    (out / "result.json").write_text(json.dumps(result))
    return out


def test_arguments_of_from_pretrained(folder):
    """Obeyed, or refused by name, also through the Auto class."""
    for load in (AutoModelForCausalLM.from_pretrained, masked.ConvertedForCausalLM.from_pretrained):
        assert load(folder, dtype=torch.bfloat16).student.lm.model.dtype == torch.bfloat16
        refused = {"attn_implementation": "eager", "device_map": "auto", "torch_dtype": torch.float16,
                   "quantization_config": {"bits": 4}}
        for name, value in refused.items():
            with pytest.raises((AssertionError, TypeError), match=name):
                load(folder, **{name: value})


def test_arguments_of_generate(folder):
    """max_new_tokens, max_length and 64 new tokens, as in transformers. The rest is refused by name."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    out = model.generate(IDS, max_new_tokens=4)
    assert out.shape == (3, 20) and torch.equal(out, model.generate(IDS, max_length=20))
    assert torch.equal(out, model.generate(IDS, max_new_tokens=4, max_length=99))
    assert model.generate(IDS, steps=2).shape == (3, 80)
    for length in (16, 91):
        with pytest.raises(AssertionError, match=f"16 [+] {length - 16} tokens do not fit 90 positions"):
            model.generate(IDS, max_length=length)
    for name in ("num_beams", "top_k", "do_sample"):
        with pytest.raises(TypeError, match=name):
            model.generate(IDS, **{name: 2})
    with pytest.raises(TypeError, match="labels: a masked model has no next-token loss"):
        model(IDS, labels=IDS)
