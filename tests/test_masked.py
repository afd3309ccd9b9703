"""A masked diffusion LM: samplers that keep their promises, a likelihood bound that agrees with enumeration."""
import itertools
import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CONVERTIBLE, OF_BLOCKS, ROOT, fails, slow, tiny_model
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import data
import repr_align
from core import backbone, masked, twin_lm
from core.common import UserError
from core.conversion import BIDIRECTIONAL, Arm, corrupt
from core.masked import ORDERS, TAKES_BACK, Student, fill
from studies import twin

IDS = torch.randint(3, 60, (3, 16), generator=torch.Generator().manual_seed(0))
HIDE = corrupt(16, 0, "mask", 0, range(3))


BLOCKS = [Arm("block", 4, context, shift) for context in ("noisy", "clean", "causal") for shift in (True, False)]


def student(family="qwen3", seed=0, arm=BIDIRECTIONAL):
    return Student(backbone.Backbone(tiny_model(family, seed).requires_grad_(False)), 63, arm)


# ------------------------------------------------------------------------------------------------------- samplers
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("how", [{}, {"temperature": 0.0}, {"top_p": 0.5}])
def test_every_sampler_keeps_its_promises(order, how):
    """What was visible stays, no mask is left, the hidden truth plays no part, a row does not depend on its batch."""
    s, seen = student(), []
    for steps in (1, 3, 50):
        out = fill(s, IDS, HIDE, steps, order=order, **how, watch=lambda i, m: seen.append(m.sum().item()))
        assert torch.equal(out[~HIDE], IDS[~HIDE]) and (out != s.mask_id).all()
        changed = torch.where(HIDE, torch.full_like(IDS, 5), IDS)
        assert torch.equal(out, fill(s, changed, HIDE, steps, order=order, **how))
        assert torch.equal(out[:1], fill(s, IDS[:1], HIDE[:1], steps, order=order, **how))
    assert seen[-1] == 0 and seen[1] > 0 and (order in TAKES_BACK or seen[1:4] == sorted(seen[1:4], reverse=True))


def test_the_orders_differ_and_p2_takes_tokens_back():
    s, outs = student(), {}
    for order in ORDERS:
        rounds = []
        outs[order] = fill(s, IDS, HIDE, 6, order=order, watch=lambda i, m, rounds=rounds: rounds.append(m.clone()))
        back = any((later & ~now).any() for now, later in zip(rounds, rounds[1:]))
        assert back == (order in TAKES_BACK), order
    assert len({tuple(o.flatten().tolist()) for o in outs.values()}) >= 4


class Fickle(torch.nn.Module):
    """Shows token 1 at position 1 first; once position 2 is filled, it wants token 2 there."""
    mask_id = 3
    arm = BIDIRECTIONAL
    lm = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=4))

    def states(self, ids, masked, cache=None, **_):
        yield torch.stack([ids.float(), masked.float(), masked[:, 2:3].float().expand_as(ids)], -1)

    def logits(self, normed):
        first = torch.tensor([0.0, 6.0, 0.0, -torch.inf]).expand(len(normed), 4)
        then = torch.tensor([0.0, 0.0, 9.0, -torch.inf]).expand(len(normed), 4)
        other = torch.tensor([1.0, 0.9, 0.8, -torch.inf]).expand(len(normed), 4)
        at_one = (normed[:, 0] == 0)[:, None]                                    # the state of position 0 tells token 1
        return torch.where(at_one, torch.where(normed[:, 2:] > 0, first, then), other)


def test_p2_takes_back_what_the_model_now_rejects():
    """It judges the token that stands there, not a fresh draw: position 1 changes its mind, and so does the text."""
    ids, hide = torch.tensor([[0, 3, 3, 3]]), torch.tensor([[False, True, True, True]])
    assert fill(Fickle(), ids, hide, 3, temperature=0, order="confidence")[0, 1] == 1
    assert fill(Fickle(), ids, hide, 6, temperature=0, order="p2")[0, 1] == 2


def test_nucleus():
    p = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    u = torch.linspace(0, 1, 10001, dtype=torch.float64)[:-1]
    for top_p, want in ((1.0, p), (0.7, torch.tensor([5, 3, 0, 0]) / 8), (0.1, torch.tensor([1, 0, 0, 0]))):
        token = masked.choose(p.log().expand(10000, 4), 1.0, top_p, u)
        assert torch.allclose(torch.bincount(token, minlength=4) / 10000, want.float(), atol=1e-3)


def test_one_joint_float32_draw_is_biased_and_two_draws_are_not():
    """Reveal with probability a = 1/1024 over V = 32768 tokens. By one float32 Gumbel draw over {tokens, mask} too few
    are revealed: uniforms live on a grid of 2^-24, so the best token's noise is cut off. (The largest of V uniforms is
    drawn by inverting its distribution function on that grid.) Ours counts the reveals; nothing is left to chance."""
    a, V, n = 1 / 1024, 32768, 3_000_000
    draw = np.random.default_rng(0)
    top = np.ceil(2 ** 24 * draw.random(n) ** (1 / V)).clip(max=2 ** 24) - 1
    best = -np.log(-np.log(np.maximum(top, 1) / 2 ** 24)) + math.log(a / V)
    mask = -np.log(-np.log(draw.random(n))) + math.log(1 - a)
    assert (best > mask).mean() / a < 0.9
    exact = -np.log(-np.log(draw.random(n) ** (1 / V))) + math.log(a / V)
    assert (exact > mask).mean() / a == pytest.approx(1, abs=0.06)
    ids, hide = IDS[:1].repeat(1, 4), torch.ones(1, 64, dtype=torch.bool)
    hide[0, 0] = False
    left = []
    fill(student(), ids, hide, 7, order="random", watch=lambda i, m: left.append(m.sum().item()))
    assert left == [54, 45, 36, 27, 18, 9, 0]


@pytest.mark.parametrize("family", CONVERTIBLE)
@torch.no_grad()
def test_a_cached_prefix_equals_block_causal_attention(family):
    s, none = student(family), torch.zeros(3, 16, dtype=torch.bool)
    hide = none.clone()
    hide[:, 11:] = True
    cache = DynamicCache()
    for _ in s.states(IDS[:, :10], none[:, :10], cache=cache):
        pass
    *_, got = s.states(IDS[:, 10:], hide[:, 10:], cache=cache)
    h = s.embed(IDS, hide)
    wall = torch.zeros(1, 1, 16, 16)
    wall[..., :10, 10:] = torch.finfo(torch.float32).min
    want = s.lm.norm(s.lm.through(h, 0, s.lm.L, s.lm.side(h, attention_mask=wall)))
    assert torch.allclose(got, want[:, 10:], atol=1e-4)
    want = s.lm.norm(s.lm.through(h, 0, s.lm.L, s.lm.side(h, attention_mask=0 * wall)))       # the broken twin: no wall
    assert not torch.allclose(got, want[:, 10:], atol=1e-3)


def test_blocks_fill_from_left_to_right():
    s, hide, filled = student(), torch.zeros(3, 16, dtype=torch.bool), []
    hide[:, 4:] = True
    out = fill(s, IDS, hide, 6, block_size=4, watch=lambda i, m: filled.append(m))
    assert torch.equal(out[:, :4], IDS[:, :4]) and (out != s.mask_id).all()
    assert [m.sum().item() for m in filled] == [30, 24, 18, 12, 6, 0]                   # of three rows
    assert all(m[:, 8 + 4 * (call // 2):].all() for call, m in enumerate(filled))        # later blocks: all hidden yet
    assert torch.equal(out[:1], fill(s, IDS[:1], hide[:1], 6, block_size=4))
    shorter = fill(s, IDS[:, :12], hide[:, :12], 4, block_size=4)                # a later block changes no earlier one
    assert torch.equal(out[:, :12], shorter)
    with pytest.raises(UserError, match="see nothing after"):
        fill(s, IDS, HIDE & (torch.arange(16) < 9), 6, block_size=4)


def test_an_order_is_a_function_and_a_line(monkeypatch):
    """Positions come to it in reading order; an unknown name lists the known ones."""
    monkeypatch.setitem(ORDERS, "left", lambda logits, token, u: -torch.arange(len(u)))
    s, seen = student(), []
    fill(s, IDS, HIDE, 4, order="left", watch=lambda ids, is_mask: seen.append(is_mask))
    for row in range(3):
        where = HIDE[row].nonzero()[:, 0].tolist()
        assert len(seen) == 4 and [m[row].nonzero()[:, 0].tolist() for m in seen] == [
            where[len(where) - n:] for m in seen for n in [m[row].sum().item()]]
    with pytest.raises(UserError, match="--order best: there is no such one; there are random, .*p2, left"):
        fill(s, IDS, HIDE, 4, order="best")


# --------------------------------------------------------------------------------------------------- block models
@pytest.mark.parametrize("family", OF_BLOCKS)
@torch.no_grad()
def test_cached_blocks_equal_recomputed_ones(family):
    """A block's predictors on the cache, its finished neighbours read by the same call, against one pass over all; with
    layers that see a window of 8."""
    for arm in BLOCKS:
        s, cache, before = student(family, arm=arm), DynamicCache(), None
        for lo, hi in ((4, 8), (8, 12), (12, 16)):
            for _ in range(2):                                                   # the first call also reads what is new
                hide = torch.zeros(3, 16, dtype=torch.bool)
                hide[:, lo:hi] = HIDE[:, lo:hi]
                got, before = masked.foretell_cached(s, IDS[:, :hi], hide[:, lo:hi], cache, before)
                assert torch.allclose(got, s.foretell(IDS, hide)[:, lo - 1:hi - 1], atol=1e-4), (arm, lo)
            assert cache.get_seq_length() == lo
        wrong = student(family, arm=arm._replace(block_size=8))
        assert not torch.allclose(got, wrong.foretell(IDS, hide)[:, 11:15], atol=1e-3)


@pytest.mark.parametrize("arm", BLOCKS, ids=str)
def test_a_block_model_writes_block_by_block(arm):
    """From a prompt that ends inside a block too; a row does not depend on its batch, nor a block on those after it."""
    s, seen = student(arm=arm), []
    hide = torch.arange(16).expand(3, 16) >= 6
    for order in ORDERS:
        seen.clear()
        out = fill(s, IDS, hide, 5, order=order, watch=lambda i, m: seen.append(m[0].sum().item()))
        assert torch.equal(out[:, :6], IDS[:, :6]) and (out != 63).all() and seen == [8, 6, 4, 2, 0]
        assert torch.equal(out[:1], fill(s, IDS[:1], hide[:1], 5, order=order))
        assert torch.equal(out[:, :12], fill(s, IDS[:, :12], hide[:, :12], 3, order=order))
        assert torch.equal(out, fill(s, torch.where(hide, 5, IDS), hide, 5, order=order, block_size=4))
    ragged = torch.arange(16) >= torch.tensor([[6], [3], [9]])                   # prompts of unequal lengths
    out = fill(s, IDS, ragged, 8)
    assert torch.equal(out[~ragged], IDS[~ragged]) and (out != 63).all()
    for wrong, how in (("leave --block_size 8 out", dict(block_size=8)), ("see nothing after", {})):
        with pytest.raises(UserError, match=wrong):
            fill(s, IDS, hide if how else hide & (torch.arange(16) < 9), 6, **how)


@pytest.mark.parametrize("arm", [BIDIRECTIONAL, *BLOCKS[2:4]], ids=str)
def test_a_threshold_reveals_what_is_certain_enough(arm):
    s, seen, hide = student(arm=arm), [], torch.arange(16).expand(3, 16) >= 4

    def calls(threshold, order="confidence"):
        seen.clear()
        out = fill(s, IDS, hide, 1, 1.0, order=order, threshold=threshold, watch=lambda i, m: seen.append(m.sum(1)))
        assert (out != 63).all() and torch.equal(out[:, :4], IDS[:, :4])
        return len(seen)
    parts = 1 if arm.attention == "bidirectional" else 3
    assert calls(1e-9) == parts and calls(1.0) == 12                             # all at once; one at a time
    assert parts < calls(0.05, "entropy") <= 12
    for threshold, order in ((-0.1, "random"), (1.1, "random"), (0.5, "p2")):
        with pytest.raises(UserError, match="--threshold"):
            calls(threshold, order)


@pytest.mark.parametrize("family", OF_BLOCKS)
@pytest.mark.parametrize("drafts", [1, 3])
@torch.no_grad()
def test_drafts_never_change_the_greedy_text(family, drafts):
    """The AR mode's text token for token, whatever was drafted; by no call more than tokens, the last one included."""
    s, ids, seen = student(family, arm=Arm("block", 4, "causal")), IDS[:1, :9], []
    out = masked.speculate(s, ids, 12, drafts, lambda i, m: seen.append((~m).sum().item()))
    greedy = ids
    for _ in range(12):
        law = s.lm.model(greedy).logits[:, -1].index_fill(-1, torch.tensor([s.mask_id]), -torch.inf)
        greedy = torch.cat([greedy, law.argmax(-1, keepdim=True)], 1)
    assert torch.equal(out, greedy) and seen[0] == 10 and seen[-1] == 21 and len(seen) <= 12
    assert all(1 <= b - a <= 1 + drafts for a, b in zip(seen, seen[1:]))

    def oracle(normed, own=s.logits):  # drafts that are right, but for those of every fourth place
        logits, groups = own(normed), len(normed) // (1 + drafts)      # rows: the text's, then the drafts after each
        for row in range(groups, len(normed)):
            place = seen[-1] + 1 + (row - groups) // drafts + (row - groups) % drafts
            token = (greedy[0, min(place, 20)] + (place % 4 == 0)) % s.mask_id
            logits[row] = torch.nn.functional.one_hot(token, s.lm.V).float()
        return logits
    s.logits, seen[:] = oracle, [9]
    out = masked.speculate(s, ids, 12, drafts, lambda i, m: seen.append((~m).sum().item()))
    assert torch.equal(out, greedy) and len(seen) - 1 <= (9, 9, 6, 5)[drafts]      # and they were taken


@torch.no_grad()
def test_right_drafts_are_all_taken_and_others_refused():
    s, seen = student(arm=Arm("block", 4, "causal")), []
    s.lm.unnormed_head = lambda normed: torch.zeros(*normed.shape[:-1], s.lm.V).index_fill(-1, torch.tensor([7]), 9.0)
    out = masked.speculate(s, IDS[:1, :5], 9, 2, lambda i, m: seen.append(m.sum().item()))
    assert seen == [8, 5, 2, 0] and (out[0, 5:] == 7).all()                      # first one token, then 3 a call
    for wrong, how in (("4 drafts need larger blocks", (IDS[:1], 4, 4)), ("one text at a time", (IDS, 4, 2)),
                       ("shorten one", (IDS[:1], 9999, 2))):
        with pytest.raises(UserError, match=wrong):
            masked.speculate(s, *how)
    for arm in (BIDIRECTIONAL, Arm("block", 4, "noisy"), Arm("block", 4, "causal", False)):
        with pytest.raises(UserError, match="and an AR mode"):
            masked.speculate(student(arm=arm), IDS[:1], 4, 2)


@pytest.mark.parametrize("arm", [Arm("block", 2, "noisy"), Arm("block", 2, "causal"), Arm("block", 2, "clean", False)],
                         ids=str)
@torch.no_grad()
def test_the_bound_of_blocks_equals_its_enumeration(arm):
    """Over the orders inside each block of two, what is before a block known: the law that it is written by."""
    s, ids, want, orders = student(arm=arm), IDS[0, :6], 0.0, [[[1]], [[2, 3], [3, 2]], [[4, 5], [5, 4]]]
    for block in orders:
        for order in block:
            for j, place in enumerate(order):
                hide = torch.zeros(1, 6, dtype=torch.bool)
                hide[0, order[j:]] = True
                logits = s.logits(s.foretell(ids[None], hide)[0, place - 1])
                want -= torch.log_softmax(logits, -1)[ids[place]].item() / len(block)
    found = [masked.likelihood(s, ids, 8, seed) for seed in range(60)]
    values, errors = np.array(found).T
    assert abs(values.mean() - want) < 4 * values.std(ddof=1) / 60 ** 0.5
    assert (errors ** 2).mean() ** 0.5 == pytest.approx(values.std(ddof=1), rel=0.35)


def test_one_block_is_bidirectional_and_blocks_of_one_are_autoregressive():
    """Of a family without windows: bidirectional attention lifts them, blocks keep them."""
    for given in (1, 5):
        want = masked.likelihood(student("llama"), IDS[0], 8, given=given)
        for context in ("noisy", "clean", "causal"):
            got = masked.likelihood(student("llama", arm=Arm("block", 16, context)), IDS[0], 8, given=given)
            assert got == pytest.approx(want, rel=1e-5)
        s = student("llama", arm=Arm("block", 1, "causal"))
        logits = s.lm.model(IDS[:1], use_cache=False).logits.index_fill(-1, torch.tensor([63]), -torch.inf)
        law = torch.log_softmax(logits[0, :-1], -1).gather(-1, IDS[0, 1:, None])
        want = -law[given - 1:].sum().item()
        assert masked.likelihood(s, IDS[0], 4, given=given) == (pytest.approx(want, rel=1e-5), 0.0)


# ----------------------------------------------------------------------------------------------------- likelihood
def by_orders(s, ids, context):
    """The ELBO as an average over all orders of revealing tokens one by one: a definition without mask counts."""
    places, total = range(context, len(ids)), 0.0
    orders = list(itertools.permutations(places))
    for order in orders:
        for j, place in enumerate(order):
            hide = torch.zeros(1, len(ids), dtype=torch.bool)
            hide[0, list(order[j:])] = True
            *_, normed = s.states(ids[None], hide)
            total -= torch.log_softmax(s.logits(normed[0, place - 1]), -1)[ids[place]].item()
    return total / len(orders)


@pytest.mark.parametrize("context", [1, 2])
@torch.no_grad()
def test_the_bound_equals_its_enumeration(context):
    s, ids = student(), IDS[0, :5]
    want, N = by_orders(s, ids, context), 5 - context
    exact = 0.0                                                                  # all counts and subsets, equally often
    for k in range(1, N + 1):
        subsets = list(itertools.combinations(range(context, 5), k))
        hide = torch.zeros(len(subsets), 5, dtype=torch.bool)
        for row, subset in zip(hide, subsets, strict=True):
            row[list(subset)] = True
        exact += masked.masked_ce(s, ids, hide).mean().item() / k
    assert exact == pytest.approx(want, rel=1e-5)
    found = [masked.likelihood(s, ids, 8, seed, context) for seed in range(60)]
    values, errors = np.array(found).T
    assert abs(values.mean() - want) < 4 * values.std(ddof=1) / 60 ** 0.5
    assert (errors ** 2).mean() ** 0.5 == pytest.approx(values.std(ddof=1), rel=0.35)


def test_mask_counts_are_uniform():
    counts = np.concatenate([masked.strata([7, 7], 6, seed, "count", 0).flatten() for seed in range(3000)])
    assert np.abs(np.bincount(counts, minlength=8)[1:] / 36000 - 1 / 7).max() < 0.01
    assert all(np.histogram(masked.strata([60], 6, s, "count", 0), [1, 21, 41, 61])[0].tolist() == [2, 2, 2]
               for s in range(20))


def test_likelihood_refuses():
    with pytest.raises(UserError, match="even number"):
        masked.likelihood(student(), IDS[0], 5)
    with pytest.raises(UserError, match="one to judge"):
        masked.likelihood(student(), IDS[0, :1], 4)


# ------------------------------------------------------------------------------------------- as one of transformers'
@pytest.fixture(scope="session")
def block_twin(runs, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("twin") / "arms" / "blocks"
    repr_align.main(f"--preset tiny --model {runs}/toy --data {text} --steps 3 --attention block --block_size 8 "
                    f"--context causal --align_weight 0 --out {out}".split())
    return out


def test_the_twin_as_a_model_of_transformers(runs, block_twin, capsys):
    """One that the library does not know without us, and never takes for an AR model; batches, padding, streaming."""
    lonely = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(block_twin)!r})"
    done = subprocess.run([sys.executable, "-c", lonely], capture_output=True, text=True)
    assert done.returncode == 1 and "nanodihal_twin" in done.stderr
    for folder in (block_twin, runs / "repr_align" / "w0"):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        assert isinstance(model, twin_lm.TwinForCausalLM)
        s, _ = masked.load_converted(folder, torch.device("cpu"), torch.float32)
        tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
        texts = ["import os", "def f(x):\n    return x", "import os"]
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        out = model.generate(**batch, max_new_tokens=9, sample_steps=4)
        P = batch["input_ids"].shape[1]
        assert torch.equal(out[:, :P], batch["input_ids"]) and out.shape == (3, P + 9) and (out != s.mask_id).all()
        alone = tokenizer(texts[1], return_tensors="pt")["input_ids"]
        hide = torch.cat([alone, alone.new_full((1, 9), s.mask_id)], 1)
        assert torch.equal(out[1:2], fill(s, hide, hide == s.mask_id, 4))                  # padding is never seen
        assert torch.allclose(model(hide).logits, s.logits(s.foretell(hide, hide == s.mask_id)))

        class Streamer:
            heard, ended = [], 0

            def put(self, value):
                self.heard = [*self.heard, *value.flatten().tolist()]

            def end(self):
                self.ended += 1
        for pads in (0, 3):
            streamer, padded = Streamer(), torch.cat([alone.new_full((1, pads), tokenizer.pad_token_id), alone], 1)
            seen = torch.arange(padded.shape[1])[None] >= pads
            said = model.generate(padded, seen, max_new_tokens=9, threshold=0.3, streamer=streamer)
            assert streamer.heard == said[0].tolist() and streamer.ended == 1
        for how, words in ((dict(streamer=streamer, attention_mask=batch["attention_mask"]), "one text at a time"),
                           (dict(attention_mask=batch["attention_mask"].flip(1)), "padded on the left"),
                           (dict(max_new_tokens=9999), "shorten one"), (dict(num_beams=2), "knows no num_beams"),
                           (dict(max_new_tokens=0), "needs a prompt")):
            with pytest.raises(UserError, match=words):
                model.generate(batch["input_ids"], **how)
        with pytest.raises(UserError, match="no padding"):
            model(**batch)
    assert "is a converted model, no AR model" in fails(capsys, repr_align.main, "--model", block_twin)


# ------------------------------------------------------------------------------------------------ the command line
def test_filling_and_filming(runs, capsys, tmp_path):
    load = ["--load", f"{runs}/repr_align/w10", "--sample_steps", "3"]
    between = twin.main([*load, "--prompt", "def f(", "--suffix", "return x", "--middle", "5", "--show"])
    assert between.startswith("def f(") and between.endswith("return x") and masked.MASK not in between
    assert len(capsys.readouterr().out.splitlines()) >= 4
    for more in ("--order random", "--order p2", "--block_size 16", "--threshold 0.5",
                 "--max_new_tokens 9 --temperature 0"):
        text = twin.main([*load, "--prompt", "import", *more.split()])
        assert text.startswith("import") and len(text) > 6 and masked.MASK not in text
    twin.main([*load, "--prompt", "import", "--max_new_tokens", "6", "--gif", f"{tmp_path}/film.gif"])
    with Image.open(tmp_path / "film.gif") as film:                     # the masks, then three calls
        assert film.n_frames >= 4 and len({film.seek(n) or film.convert("L").tobytes() for n in range(4)}) == 4


def test_refusals_of_the_twin(runs, capsys):
    load = ["--load", f"{runs}/repr_align/w10"]
    for word, flags in (("mask token itself", ["--prompt", f"a{masked.MASK}b"]), ("--middle", "--suffix x --middle 0"),
                        ("--sample_steps", "--sample_steps 0"), ("--top_p", "--top_p 0"),
                        ("--temperature", "--temperature -1"),
                        ("shorten one", "--max_new_tokens 5000"), ("--threshold", "--threshold 1.5"),
                        ("invalid choice", "--order best"),
                        ("leave --suffix", "--prompt a --suffix b --block_size 4")):
        flags = flags.split() if isinstance(flags, str) else flags
        assert word in fails(capsys, twin.main, *load, *flags), flags
    assert "no converted model" in fails(capsys, twin.main, "--load", runs / "toy")
    started = subprocess.run([sys.executable, "studies/twin.py"], cwd=ROOT, capture_output=True, text=True)
    assert started.returncode == 2 and started.stderr == "error: start it as: python -m studies.twin\n"


def test_flags_of_the_arms(runs, text, tmp_path, capsys):
    argv = f"--preset tiny --model {runs}/toy --steps 3 --data {text}".split()
    flags = ["--freeze", "none", "--cooldown", "0", "--out", f"{tmp_path}/arms/constant"]
    assert 0 < repr_align.main([*argv, *flags])["val_loss"] < 20
    for context in ("noisy", "causal"):
        out = tmp_path / "arms" / context
        more = f"--attention block --block_size 8 --context {context} --out {out}".split()
        more += ["--no-shift"] if context == "noisy" else "--ar_weight 1 --align_until 2".split()
        result = repr_align.main([*argv, *more])
        s, tokenizer = masked.load_converted(out, torch.device("cpu"), torch.float32, "block")
        assert s.arm == Arm("block", 8, context, context != "noisy")             # its folder says what it is
        assert "blocks of 8" in result["headline"][0][0]
        assert [len(row) for row in result["curve"]] == [3 + (context == "causal")] * 2
        rows = data.Tokens(runs / "data", "val", 32).windows(4)[:, :-1]
        nats, se = masked.text_likelihood(s, rows, 4)                            # the saved model, judged again
        assert [n * rows[:, 1:].numel() for n in result["bound"]] == pytest.approx([nats, se], rel=1e-4)
        assert result["infilled"] == repr_align.infilled(s, rows, 0)
        gap = torch.full((4, 20), s.mask_id)                                     # what follows is not seen, nor is what
        gap[:, :12] = rows[:, :12]                                               # the gap held
        filled = masked.fill(s, gap, gap == s.mask_id, 4, temperature=0.0)
        assert result["infilled"] == (filled == rows[:, :20])[:, 12:].double().mean().item()
        with pytest.raises(UserError, match="bidirectional attention is needed"):
            masked.load_converted(out, torch.device("cpu"), torch.float32, "bidirectional")
        load = ["--load", str(out), "--prompt", "import os"]
        assert "leave --block_size 4 out" in fails(capsys, twin.main, *load, "--block_size", 4)
        assert twin.main([*load, "--threshold", "0.2"]).startswith("import os")
        assert " a call" in capsys.readouterr().out
        if context == "causal":
            ids = tokenizer("import os", return_tensors="pt")["input_ids"]
            both = dict(input_ids=ids, max_new_tokens=9, drafts=3)
            wrote = AutoModelForCausalLM.from_pretrained(out).generate(**both, do_sample=False)
            assert torch.equal(wrote, masked.speculate(s, ids, 9, 1)) and wrote.shape == (1, ids.shape[1] + 9)
            assert twin.main([*load, "--drafts", "2", "--max_new_tokens", "9"]) == tokenizer.decode(wrote[0])
            assert "leave --suffix, --thr" in fails(capsys, twin.main, *load, "--drafts", 2, "--suffix", "x")
            with pytest.raises(UserError, match="do_sample=False"):
                AutoModelForCausalLM.from_pretrained(out).generate(**both)
        else:
            assert "and an AR mode" in fails(capsys, twin.main, *load, "--drafts", 2)
        assert "holds another run (a" in fails(capsys, repr_align.main, *argv, "--out", out)
    x = [*argv, "--out", tmp_path / "x" / "y"]
    assert "invalid choice" in fails(capsys, repr_align.main, *x, "--freeze", "head")
    assert "torchrun" in fails(capsys, repr_align.main, *x, "--shard")


@slow
def test_shards_equal_the_whole(runs, text, tmp_path):
    """Two gloo processes with student and teacher spread over them, against one process with both whole."""
    from safetensors.torch import load_file
    argv = f"--preset tiny --model {runs}/toy --steps 4 --lr 0 --log_every 1 --save_every 2 --eval_batches 3".split()
    argv += ["--data", str(text), "--out"]
    one = repr_align.main([*argv, f"{tmp_path}/a/one"])
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                           "repr_align.py", *argv, f"{tmp_path}/a/two", "--shard"], cwd=ROOT, capture_output=True,
                          text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    a, b = (load_file(tmp_path / "a" / n / "model.safetensors") for n in ("one", "two"))
    assert a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=2e-5) for k in a)
    assert f"masked val CE {one['curve'][0][1]:.3f} -> {one['val_loss']:.3f}" in done.stdout
    logs = [[json.loads(line) for line in (tmp_path / "a" / n / "log.jsonl").read_text().splitlines()]
            for n in ("one", "two")]
    for key in ("ce", "gnorm"):  # Adam would hide a gradient that is off by a factor
        first, second = ([row[key] for row in log if key in row] for log in logs)
        assert len(first) == 4 and second == pytest.approx(first, rel=1e-3)


def test_dry_run_at_8b_shape(tmp_path, capsys):
    from transformers import LlamaConfig
    LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192,
                tie_word_embeddings=False).save_pretrained(tmp_path / "8b")
    argv = f"--preset 8b --shard --dry_run --random_init --dtype bf16 --model {tmp_path}/8b".split()
    size = repr_align.main(argv)
    out = capsys.readouterr().out
    assert "8-way shards" in out and "which fits 80 GB" in out and size["gigabytes"] < 80
    assert size["flops_per_token"] == pytest.approx(6 * 8.03e9 * 4 / 3, rel=0.1)
