"""Conversion: which positions carry loss, what alignment measures, and a sampler that keeps its promises."""
import json
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import FEW, OF_BLOCKS, fails, tiny_model

import repr_align
from core import backbone, conversion, report, run
from core.conversion import BIDIRECTIONAL, Arm, conversion_loss, corrupt, predictors, who_sees, who_sees_cached
from core.masked import MASK, Student, fill, load_converted

IDS = torch.randint(3, 60, (3, 16), generator=torch.Generator().manual_seed(0))


def student(seed=0, family="qwen3", arm=BIDIRECTIONAL):
    return Student(backbone.Backbone(tiny_model(family, seed).requires_grad_(False)), 63, arm)


def masks(step=0, slots=range(3), T=16):
    return corrupt(T, 0, "mask", step, slots)


def test_masks_are_keyed_by_slot_and_spare_position_zero():
    whole = masks(slots=range(400), T=64)
    assert torch.equal(whole[5:7], masks(slots=[5, 6], T=64)) and not whole[:, 0].any()
    assert not torch.equal(whole, masks(step=1, slots=range(400), T=64))
    share = whole[:, 1:].float().mean(1)                                       # about U(0, 1)
    assert share.mean().item() == pytest.approx(0.5, abs=0.05)
    assert share.std().item() == pytest.approx(12 ** -0.5, abs=0.04)
    fixed = corrupt(64, 0, "mask", 0, range(200), r=0.25)[:, 1:].float().mean().item()
    assert fixed == pytest.approx(0.25, abs=0.02)


def test_the_loss_by_hand():
    """CE of token i+1 from the state at i, where token i+1 is masked, and nothing else; then the path term."""
    s, is_mask = student(), masks()
    loss = conversion_loss(s, None, IDS, is_mask, path=1.0)
    h = s.lm.embed(IDS.masked_fill(is_mask, 63))
    logits = s.lm.head(s.lm.through(h, 0, s.lm.L, s.lm.side(h, causal=False)))
    logits[..., 63] = -torch.inf
    want = want_path = 0.0
    for b in range(3):
        for i in range(15):
            if is_mask[b, i + 1]:
                here = F.cross_entropy(logits[b, i], IDS[b, i + 1]).item()
                want += here
                want_path += math.exp(-here) * here
    assert loss.ce.item() == pytest.approx(want, rel=1e-4)
    assert loss.each.sum().item() == pytest.approx(want + want_path, rel=1e-4)
    assert len(loss.each) == is_mask[:, 1:].sum()
    assert loss.apart.item() == 0 and loss.cosines.isnan().all()               # without a teacher


def test_only_masked_inputs_hide_their_token():
    s, is_mask = student(), masks()
    *_, a = s.states(IDS, is_mask)
    other = torch.where(is_mask, (IDS + 7) % 60, IDS)                          # change what is hidden
    *_, b = s.states(other, is_mask)
    assert torch.equal(a, b)
    *_, c = s.states(torch.where(is_mask, IDS, (IDS + 7) % 60), is_mask)       # change what is seen
    assert not torch.equal(a, c)


class Echo(torch.nn.Module):
    """A student that shows the teacher's own states, or their negatives."""
    arm = BIDIRECTIONAL

    def __init__(self, lm, sign):
        super().__init__()
        self.lm, self.sign = lm, sign

    def states(self, ids, is_mask):
        for h in conversion.teacher_states(self.lm, ids):
            yield self.sign * h

    def logits(self, normed):
        return self.lm.unnormed_head(normed)


@pytest.mark.parametrize("sign, penalty", [(1.0, 0.0), (-1.0, 2.0)])
def test_alignment_is_zero_for_the_teacher_and_two_for_its_negative(sign, penalty):
    teacher, is_mask = backbone.Backbone(tiny_model("qwen3")), masks()
    loss, count = conversion_loss(Echo(teacher, sign), teacher, IDS, is_mask, 1.0), is_mask.sum().item()
    assert loss.apart.item() / count == pytest.approx(penalty, abs=1e-4)
    assert (loss.cosines / count).tolist() == pytest.approx([sign] * (teacher.L + 1), abs=1e-4)


def test_who_sees_whom_by_hand():
    def matrix(rows):
        return torch.tensor([[c == "1" for c in row] for row in rows.split()])
    assert torch.equal(who_sees(4, 2, "noisy"), matrix("1100 1100 1111 1111"))
    assert torch.equal(who_sees(3, 2, "noisy"), matrix("110 110 111"))           # the last block may be shorter
    assert torch.equal(who_sees(4, 2, "clean"), matrix(
        "11000000 11000000 11110000 11110000 00001100 00001100 11000011 11000011"))
    assert torch.equal(who_sees(4, 2, "causal"), matrix(
        "10000000 11000000 11100000 11110000 00001100 00001100 11000011 11000011"))
    assert torch.equal(who_sees_cached(1, 2, 4, 2, "clean"), matrix("1100 1111 1111"))
    assert torch.equal(who_sees_cached(0, 2, 4, 2, "causal"), matrix("1000 1100 1111 1111"))
    for context, shift, want in (("noisy", True, [0, 1, 2]), ("noisy", False, [1, 2, 3]), ("clean", False, [5, 6, 7]),
                                 ("causal", True, [4, 1, 6])):                   # token 2 opens a block: clean state 1
        assert predictors(4, 2, context, shift).tolist() == want


@pytest.mark.parametrize("family", OF_BLOCKS)
@torch.no_grad()
def test_nothing_leaks(family):
    """What predicts a block knows neither the block's own masked tokens, which the clean copy holds, nor later ones."""
    is_mask = masks()
    for arm in (Arm("block", 4, context, shift) for context in ("noisy", "clean", "causal") for shift in (True, False)):
        s = student(family=family, arm=arm)
        for judging in (False, True):
            at = predictors(16, *arm.plan(16, judging), arm.shift)

            def states(changed, s=s, judging=judging, at=at):
                *_, h = s.states(torch.where(changed, 5, IDS), is_mask, judging=judging)
                return h[:, at]
            want, place = states(torch.zeros_like(is_mask)), torch.arange(16)
            own = states(is_mask & (place >= 4) | (place >= 8))                  # masked ones of block 4..7, all later
            assert torch.equal(own[:, :7], want[:, :7]) and not torch.equal(own, want)
            given = states(~is_mask & (place >= 4) & (place < 8))                # but what it shows is seen
            assert torch.equal(given[:, :3], want[:, :3]) and not torch.equal(given[:, 3:7], want[:, 3:7])
            earlier = states(is_mask & (place < 4))                              # and clean text before it
            known = arm.context != "noisy" or judging
            assert torch.equal(earlier[:, 4:], want[:, 4:]) != known


@pytest.mark.parametrize("family", OF_BLOCKS)
@torch.no_grad()
def test_blocks_of_one_after_clean_text_are_the_ar_model(family):
    """The predictor of a block's first token is the clean state before it; windows of 8 are kept."""
    s, everything = student(family=family), torch.arange(16).expand(3, 16) > 0
    logits = s.lm.model(IDS, use_cache=False).logits[:, :-1]
    logits[..., 63] = -torch.inf
    want = F.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten(), reduction="sum").item()
    for context in ("clean", "causal"):
        s.arm = Arm("block", 1, context)
        loss = conversion_loss(s, s.lm, IDS, everything, 0.0, ar=True)
        assert loss.ce.item() == pytest.approx(want, rel=1e-5) == loss.ar.item()
        assert loss.apart.item() == pytest.approx(0, abs=1e-3)
    s.arm = Arm("block", 4, "causal")                                            # the clean copy is the AR model still
    loss = conversion_loss(s, s.lm, IDS, everything, 0.0, ar=True)
    assert loss.ar.item() == pytest.approx(want, rel=1e-5) and loss.ce.item() != pytest.approx(want, rel=1e-4)


def test_alignment_ends(runs, text, tmp_path, monkeypatch):
    taught = []

    def spied(student, teacher, *more, **how):
        taught.append(teacher is not None) if torch.is_grad_enabled() else None         # validation always has it
        return conversion_loss(student, teacher, *more, **how)
    monkeypatch.setattr(repr_align, "conversion_loss", spied)
    repr_align.main(f"--preset tiny --model {runs}/toy --data {text} --steps 4 --align_until 2 --micro_batch 4 "
                    f"--out {tmp_path}/until/w10".split())
    assert taught == [True, True, False, False]


def test_masks_by_blocks():
    many = dict(T=64, seed=0, purpose="mask", step=0, slots=range(300))
    assert torch.equal(corrupt(**many), corrupt(**many, block_size=64))
    by_block = corrupt(**many, block_size=16).view(300, 4, 16).float().mean(-1)
    assert abs(torch.corrcoef(by_block[:, 1:].T)[0, 1]) < 0.2 and by_block.std().item() > 0.25


def test_micro_batches_add_up_exactly():
    s, teacher, is_mask = student(), backbone.Backbone(tiny_model("qwen3", 1)), masks()
    whole = conversion_loss(s, teacher, IDS, is_mask, 1.0)
    parts = [conversion_loss(s, teacher, IDS[i:i + 1], is_mask[i:i + 1], 1.0) for i in range(3)]
    for name in ("each", "apart", "ce", "cosines"):
        assert sum(getattr(p, name).sum().item() for p in parts) == pytest.approx(
            getattr(whole, name).sum().item(), rel=1e-5), name


def test_the_future_changes_the_past_after_conversion():
    s = student()
    is_mask = torch.zeros(3, 16, dtype=torch.bool)
    other = IDS.clone()
    other[:, -1] = (other[:, -1] + 1) % 60
    *_, a = s.states(IDS, is_mask)
    *_, b = s.states(other, is_mask)
    assert ((a - b).abs().amax(-1) > 1e-6).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("steps", [1, 3, 50])
def test_filling(steps, temperature):
    s, is_mask = student(), masks()
    out = fill(s, IDS, is_mask, steps, temperature, seed=0)
    assert torch.equal(out[~is_mask], IDS[~is_mask])                           # what was visible stays
    assert (out != s.mask_id).all()                                            # and no mask is left
    assert torch.equal(out, fill(s, IDS, is_mask, steps, temperature, seed=0))
    if temperature == 0:
        assert torch.equal(out[1:2], fill(s, IDS[1:2], is_mask[1:2], steps, 0.0, seed=0))
    changed = torch.where(is_mask, torch.full_like(IDS, 5), IDS)               # the hidden truth plays no part
    assert torch.equal(out, fill(s, changed, is_mask, steps, temperature, seed=0))


def test_filling_in_bf16():
    """What a GPU does by default: bf16 weights beside the fp32 mask vector."""
    s = student().bfloat16()
    s.shift.data = s.shift.data.float() + 0.5
    assert (fill(s, IDS, masks(), 3, 1.0, seed=0) != s.mask_id).all()


@pytest.mark.parametrize("family", FEW)
def test_families_convert(family, runs, tmp_path, text):
    """Three steps of a whole conversion, saved and loaded again; the loaded model still sees the future."""
    tiny_model(family, vocab_size=512, bos_token_id=0, eos_token_id=0).save_pretrained(tmp_path / "base")
    backbone.load_tokenizer(runs / "toy").save_pretrained(tmp_path / "base")
    (tmp_path / "some").mkdir()
    for name in ("ast.py", "bdb.py", "cmd.py"):
        shutil.copy(text / name, tmp_path / "some")
    argv = f"--preset tiny --steps 3 --model {tmp_path}/base --out {tmp_path}/twin --data {tmp_path}/some"
    result = repr_align.main(argv.split())
    assert 0 < result["val_loss"] < 100
    s, _ = load_converted(tmp_path / "twin", torch.device("cpu"), torch.float32)
    is_mask = torch.zeros(3, 16, dtype=torch.bool)
    *_, a = s.states(IDS, is_mask)
    *_, b = s.states(torch.cat([IDS[:, :-1], (IDS[:, -1:] + 1) % 60], 1), is_mask)
    assert ((a - b).abs().amax(-1) > 1e-6).all()


def test_draws_follow_the_law():
    """One masked token after a fixed prefix: frequencies over many rows against the softmax."""
    s = student()
    ids = IDS[:1, :6].repeat(4000, 1)
    is_mask = torch.zeros_like(ids, dtype=torch.bool)
    is_mask[:, 5] = True
    *_, normed = s.states(ids[:1], is_mask[:1])
    p = torch.softmax(s.logits(normed[:, 4]).double() / 3, -1)[0].detach()
    drawn = fill(s, ids, is_mask, 1, 3.0, seed=0)[:, 5]
    frequency = torch.bincount(drawn, minlength=64).double() / 4000
    assert (frequency - p).abs().max() < 5 * (p * (1 - p) / 4000).sqrt().max()


def test_arms_see_the_same_start_and_alignment_pulls(runs):
    w0, w10 = (json.loads((runs / "repr_align" / n / "result.json").read_text()) for n in ("w0", "w10"))
    assert w0["curve"][0][1] == pytest.approx(w10["curve"][0][1], abs=1e-6)    # same weights, batches and masks
    assert [row[0] for row in w0["curve"]] == [row[0] for row in w10["curve"]] == [0, 10, 20]
    assert w10["curve"][-1][2] > w10["curve"][0][2] and w0["cosine"] is None   # the cosine rises when it is asked to


def test_the_folder_holds_an_ordinary_model(runs):
    """Under a type of its own (core/twin_lm.py): whoever asks for the AR architecture gets it, but must ask."""
    from transformers import AutoModelForCausalLM
    folder = runs / "repr_align" / "w10"
    model = backbone.load(folder, torch.device("cpu"), torch.float32).model
    s, tokenizer = load_converted(folder, torch.device("cpu"), torch.float32)
    assert tokenizer.mask_token == MASK and s.mask_id == tokenizer.mask_token_id < model.config.vocab_size
    toy = AutoModelForCausalLM.from_pretrained(runs / "toy")
    mine, theirs = model.get_input_embeddings().weight, toy.get_input_embeddings().weight
    assert torch.equal(mine[:len(theirs)], theirs)                             # embeddings were frozen
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, toy.model.layers[0].mlp.up_proj.weight)
    saved = json.loads((folder / "config.json").read_text())
    assert saved["dihal"]["config"]["align_weight"] == 10
    assert model.config.model_type == toy.config.model_type == saved["backbone_type"] != saved["model_type"]


def test_folding_the_mask_row_changes_nothing():
    for family in ("qwen3", "gemma3", "gpt2", "granite"):
        s, is_mask = student(family=family), masks()
        with torch.no_grad():
            s.shift.normal_()
            *_, before = s.states(IDS, is_mask)
            s.fold()
            *_, after = s.states(IDS, is_mask)
        assert torch.allclose(before, after, atol=1e-4) and not s.shift.any()


def argv_of(runs, text, steps, out, more=""):
    return f"--preset tiny --model {runs}/toy --steps {steps} --data {text} {more} --out {out}".split()


def weights(folder):
    from safetensors.torch import load_file
    return load_file(folder / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_interrupted_and_resumed_equals_uninterrupted(runs, tmp_path, text, monkeypatch):
    from core import common
    whole = repr_align.main(argv_of(runs, text, 8, tmp_path / "a/whole"))
    polls = iter([False] * 4 + [True])
    with monkeypatch.context() as patch:
        patch.setattr(common.StopSignal, "poll", lambda self: next(polls))
        with pytest.raises(SystemExit):
            repr_align.main(argv_of(runs, text, 8, tmp_path / "a/parts"))
    parts = repr_align.main(argv_of(runs, text, 8, tmp_path / "a/parts"))
    assert parts["curve"] == whole["curve"] and same(weights(tmp_path / "a/whole"), weights(tmp_path / "a/parts"))


def test_the_last_step_is_saved_before_it_is_measured(runs, tmp_path, text, monkeypatch):
    """A failing final measurement loses nothing: the same command trains no step again."""
    done = repr_align.main(argv_of(runs, text, 7, tmp_path / "a/whole"))
    out, honest, calls = tmp_path / "a/late", repr_align.validate, []

    def fails_at_the_end(*args):
        calls.append(args)
        if len(calls) > 1:                                                     # the first is that of step 0
            raise RuntimeError("the measurement failed")
        return honest(*args)
    with monkeypatch.context() as patch:
        patch.setattr(repr_align, "validate", fails_at_the_end)
        with pytest.raises(RuntimeError):
            repr_align.main(argv_of(runs, text, 7, out))
    assert torch.load(out / "state.pt", weights_only=True)["step"] == 7 and not (out / "result.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr(repr_align, "corrupt", lambda *key, r=None: corrupt(*key, r=r) if r else pytest.fail("a step"))
        again = repr_align.main(argv_of(runs, text, 7, out))
    assert again["curve"] == done["curve"] and same(weights(tmp_path / "a/whole"), weights(out))
    assert not (out / "state.pt").exists()


def test_more_steps_of_a_finished_run(runs, tmp_path, text, capsys):
    """10 steps kept and raised to 20 equal 20 straight, bit for bit, where the learning rate is constant."""
    constant = "--cooldown 0 --keep_state"
    straight = repr_align.main(argv_of(runs, text, 20, tmp_path / "a/straight", constant))
    out = tmp_path / "a/grown"
    short = repr_align.main(argv_of(runs, text, 10, out, constant))
    assert not same(weights(out), weights(tmp_path / "a/straight"))
    grown = repr_align.main(argv_of(runs, text, 20, out, constant))
    assert "resuming at step 10" in capsys.readouterr().out and grown["steps"] == 20
    assert grown["curve"] == straight["curve"] and same(weights(out), weights(tmp_path / "a/straight"))
    assert run.read_json(out / "result_10.json")["curve"] == short["curve"]
    assert "choose another --out" in fails(capsys, repr_align.main, *argv_of(runs, text, 10, out, constant))
    falling = tmp_path / "a/falling"
    repr_align.main(argv_of(runs, text, 2, falling, "--keep_state"))
    before = weights(falling)
    assert "--cooldown 0" in fails(capsys, repr_align.main, *argv_of(runs, text, 4, falling, "--keep_state"))
    forgotten = tmp_path / "a/forgotten"
    repr_align.main(argv_of(runs, text, 2, forgotten, "--cooldown 0"))
    assert "--keep_state" in fails(capsys, repr_align.main, *argv_of(runs, text, 4, forgotten, "--cooldown 0"))
    assert same(before, weights(falling)) and run.read_json(falling / "result.json")["steps"] == 2


def test_a_finished_run_prints_what_it_found(runs, text, capsys, monkeypatch):
    """The stored sample is printed without loading anything, and it is what the saved model writes."""
    folder = runs / "repr_align/w10"
    argv = f"--preset tiny --data {text} --out {folder}".split()
    sample = json.loads((folder / "result.json").read_text())["sample"]
    with monkeypatch.context() as patch:
        patch.setattr(backbone, "load", lambda *_, **__: pytest.fail("loaded"))
        assert repr_align.main(argv)["sample"] == sample
    assert "is finished" in (shown := capsys.readouterr().out) and sample in shown
    s, tokenizer = load_converted(folder, torch.device("cpu"), torch.float32)
    assert repr_align.sample(s, tokenizer, 0) == sample and sample.startswith(repr_align.PROMPT) and MASK not in sample
    assert "align_weight" in fails(capsys, repr_align.main, *argv, "--align_weight", "3")


def test_the_section_and_the_card(runs):
    for name, w in (("w0", 0), ("w10", 10)):
        folder = runs / "repr_align" / name
        result, text = run.read_json(folder / "result.json"), run.read_section(folder)
        assert text == repr_align.section(result) and text.startswith(f"## CONVERT, w = {w}\n")
        assert "![" in text and "(convert.png)" in text and (folder / "convert.png").stat().st_size > 5_000
        for step, ce, cosine in result["curve"]:
            assert f"| {step} | {ce:.3f} | {'-' if cosine is None else f'{cosine:.3f}'} |" in text
        (what, value), = result["headline"]
        assert f"w = {w}" in what and f"{result['val_loss']:.3f}" in value and len(value) <= 60
        assert f"- val_loss: {result['val_loss']:.4g}" in (folder / "README.md").read_text()


def test_two_arms_compared():
    """By what they say of texts, never by masked CE: blocks have another task."""
    w0 = dict(w=0, val_loss=5.0, bound=[4.5, 0.01], steps=20, seconds=10)
    arm = dict(w=0, val_loss=9.0, bound=[4.3, 0.01], steps=20, seconds=30)
    text = report.compare_arms(w0, arm, "by blocks")
    assert "not known (n = 1, lower by 0.2 nats a token)" in text and "by blocks" in text and "3.00x" in text
    assert "higher by 0.1 nats" in report.compare_arms(w0, {**arm, "bound": [4.6, 0.01]}, "by blocks")


def test_refusals(capsys, tmp_path):
    assert "negative" in fails(capsys, repr_align.main, "--align_weight", "-1", "--out", tmp_path / "x/y")
    assert "at least 3" in fails(capsys, repr_align.main, "--seq_len", "2", "--out", tmp_path / "x/y")
    for word, flags in (("--attention block", "--context clean"),
                        ("--block_size 24 must divide --seq_len 128", "--attention block --block_size 24"),
                        ("--block_size 256 must divide", "--attention block --block_size 256"),
                        ("--context causal", "--ar_weight 1 --attention block --context clean"),
                        ("beyond --steps 200", "--align_until 201"), ("negative", "--ar_weight -1"),
                        ("invalid choice", "--attention causal")):
        assert word in fails(capsys, repr_align.main, *flags.split(), "--out", tmp_path / "x/y"), flags
