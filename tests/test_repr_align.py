"""Conversion: which positions carry loss, what alignment measures, and a sampler that keeps its promises."""
import json
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import FAMILIES, fails, tiny_model

import repr_align
from core import backbone
from core.masked import MASK, Student, fill, load_converted

IDS = torch.randint(3, 60, (3, 16), generator=torch.Generator().manual_seed(0))


def student(seed=0, family="qwen3"):
    return Student(backbone.Backbone(tiny_model(family, seed).requires_grad_(False)), mask_id=63)


def masks(step=0, slots=range(3), T=16):
    return repr_align.corrupt(T, 0, "mask", step, slots)


def test_masks_are_keyed_by_slot_and_spare_position_zero():
    whole = masks(slots=range(400), T=64)
    assert torch.equal(whole[5:7], masks(slots=[5, 6], T=64)) and not whole[:, 0].any()
    assert not torch.equal(whole, masks(step=1, slots=range(400), T=64))
    share = whole[:, 1:].float().mean(1)                                       # about U(0, 1)
    assert share.mean().item() == pytest.approx(0.5, abs=0.05)
    assert share.std().item() == pytest.approx(12 ** -0.5, abs=0.04)
    fixed = repr_align.corrupt(64, 0, "mask", 0, range(200), r=0.25)[:, 1:].float().mean().item()
    assert fixed == pytest.approx(0.25, abs=0.02)


def test_the_loss_by_hand():
    """CE of token i+1 from the state at i, where token i+1 is masked, and nothing else; then the path term."""
    s, masked = student(), masks()
    each, row, _, ce, _ = repr_align.conversion_loss(s, None, IDS, masked, path=1.0)
    h = s.lm.embed(IDS.masked_fill(masked, 63))
    logits = s.lm.head(s.lm.through(h, 0, s.lm.L, s.lm.side(h, causal=False)))
    logits[..., 63] = -torch.inf
    want = want_path = 0.0
    for b in range(3):
        for i in range(15):
            if masked[b, i + 1]:
                here = F.cross_entropy(logits[b, i], IDS[b, i + 1]).item()
                want += here
                want_path += math.exp(-here) * here
    assert ce.item() == pytest.approx(want, rel=1e-4) and each.sum().item() == pytest.approx(want + want_path, rel=1e-4)
    assert torch.bincount(row, minlength=3).tolist() == masked[:, 1:].sum(1).tolist()


def test_only_masked_inputs_hide_their_token():
    s, masked = student(), masks()
    *_, a = s.states(IDS, masked)
    other = torch.where(masked, (IDS + 7) % 60, IDS)                           # change what is hidden
    *_, b = s.states(other, masked)
    assert torch.equal(a, b)
    *_, c = s.states(torch.where(masked, IDS, (IDS + 7) % 60), masked)         # change what is seen
    assert not torch.equal(a, c)


class Echo(torch.nn.Module):
    """A student that shows the teacher's own states, or their negatives."""
    def __init__(self, lm, sign):
        super().__init__()
        self.lm, self.sign = lm, sign

    def states(self, ids, masked):
        for h in repr_align.teacher_states(self.lm, ids):
            yield self.sign * h

    def logits(self, normed):
        return self.lm.unnormed_head(normed)


@pytest.mark.parametrize("sign, penalty", [(1.0, 0.0), (-1.0, 2.0)])
def test_alignment_is_zero_for_the_teacher_and_two_for_its_negative(sign, penalty):
    teacher, masked = backbone.Backbone(tiny_model("qwen3")), masks()
    for kind, positions in (("cosine", "next-masked"), ("cosine", "all"), ("l2", "masked")):
        _, _, apart, _, cosines = repr_align.conversion_loss(Echo(teacher, sign), teacher, IDS, masked, 1.0, None, kind,
                                                             positions)
        count = repr_align.aligned(positions, masked).sum().item()
        assert apart.item() / count == pytest.approx(penalty ** (2 if kind == "l2" else 1), abs=1e-4)
        assert len(cosines) == teacher.L + 1 and (cosines / count).tolist() == pytest.approx([sign] * 5, abs=1e-4)


def test_only_the_chosen_layers_are_aligned():
    assert repr_align.depth("all", 8) == set(range(9)) and repr_align.depth("lower", 8) == {0, 1, 2}
    assert repr_align.depth("middle", 8) == {3, 4, 5} and repr_align.depth("upper", 8) == {6, 7, 8}
    s, teacher, masked = student(), backbone.Backbone(tiny_model("qwen3", 1)), masks()
    parts = [repr_align.conversion_loss(s, teacher, IDS, masked, 1.0, {i})[2].item() for i in range(5)]
    some = repr_align.conversion_loss(s, teacher, IDS, masked, 1.0, {1, 3})[2].item()
    assert some == pytest.approx((parts[1] + parts[3]) / 2, rel=1e-5) and len(set(parts)) == 5
    s.requires_grad_(True)                                                     # and nothing above them is pulled
    repr_align.conversion_loss(s, teacher, IDS, masked, 1.0, {2})[2].backward()
    pulled = [any(p.grad is not None and p.grad.any() for p in b.parameters()) for b in s.lm.blocks]
    assert pulled == [True, True, False, False]


def test_weights_of_the_two_weightings():
    masked = masks(slots=range(50))
    mean, ratio = (repr_align.row_weights(kind, masked) for kind in ("mean", "1/t"))
    k = masked.sum(1).clamp_min(1)
    assert (mean * k).sum().item() == pytest.approx(1, abs=0.05)
    assert (ratio * k * 50).tolist() == pytest.approx([1] * 50)


def test_micro_batches_add_up_exactly():
    s, teacher, masked = student(), backbone.Backbone(tiny_model("qwen3", 1)), masks()
    whole = repr_align.conversion_loss(s, teacher, IDS, masked, 1.0)
    parts = [repr_align.conversion_loss(s, teacher, IDS[i:i + 1], masked[i:i + 1], 1.0) for i in range(3)]
    for n in (0, 2, 3):                                                        # loss, alignment, CE
        assert sum(p[n].sum().item() for p in parts) == pytest.approx(whole[n].sum().item(), rel=1e-5)


def test_the_future_changes_the_past_after_conversion():
    s = student()
    masked = torch.zeros(3, 16, dtype=torch.bool)
    other = IDS.clone()
    other[:, -1] = (other[:, -1] + 1) % 60
    *_, a = s.states(IDS, masked)
    *_, b = s.states(other, masked)
    assert ((a - b).abs().amax(-1) > 1e-6).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("steps", [1, 3, 50])
def test_filling(steps, temperature):
    s, masked = student(), masks()
    out = fill(s, IDS, masked, steps, temperature, seed=0)
    assert torch.equal(out[~masked], IDS[~masked])                             # what was visible stays
    assert (out != s.mask_id).all()                                            # and no mask is left
    assert torch.equal(out, fill(s, IDS, masked, steps, temperature, seed=0))
    if temperature == 0:
        assert torch.equal(out[1:2], fill(s, IDS[1:2], masked[1:2], steps, 0.0, seed=0))
    changed = torch.where(masked, torch.full_like(IDS, 5), IDS)                # the hidden truth plays no part
    assert torch.equal(out, fill(s, changed, masked, steps, temperature, seed=0))


def test_filling_in_bf16():
    """What a GPU does by default: bf16 weights beside the fp32 mask vector."""
    s = student().bfloat16()
    s.shift.data = s.shift.data.float() + 0.5
    assert (fill(s, IDS, masks(), 3, 1.0, seed=0) != s.mask_id).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_converts(family, runs, tmp_path, text):
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
    masked = torch.zeros(3, 16, dtype=torch.bool)
    *_, a = s.states(IDS, masked)
    *_, b = s.states(torch.cat([IDS[:, :-1], (IDS[:, -1:] + 1) % 60], 1), masked)
    assert ((a - b).abs().amax(-1) > 1e-6).all()


def test_draws_follow_the_law():
    """One masked token after a fixed prefix: frequencies over many rows against the softmax."""
    s = student()
    ids = IDS[:1, :6].repeat(4000, 1)
    masked = torch.zeros_like(ids, dtype=torch.bool)
    masked[:, 5] = True
    *_, normed = s.states(ids[:1], masked[:1])
    p = torch.softmax(s.logits(normed[:, 4]).double() / 3, -1)[0].detach()
    drawn = fill(s, ids, masked, 1, 3.0, seed=0)[:, 5]
    frequency = torch.bincount(drawn, minlength=64).double() / 4000
    assert (frequency - p).abs().max() < 5 * (p * (1 - p) / 4000).sqrt().max()


def test_arms_see_the_same_start_and_alignment_pulls(runs):
    w0, w10 = (json.loads((runs / "repr_align" / n / "result.json").read_text()) for n in ("w0", "w10"))
    assert w0["curve"][0][1] == pytest.approx(w10["curve"][0][1], abs=1e-6)    # same weights, batches and masks
    assert [row[0] for row in w0["curve"]] == [row[0] for row in w10["curve"]] == [0, 10, 20]
    assert w10["curve"][-1][2] > w10["curve"][0][2] and w0["cosine"] is None   # the cosine rises when it is asked to


def test_the_folder_opens_as_an_ordinary_model(runs):
    from transformers import AutoModelForCausalLM
    folder = runs / "repr_align" / "w10"
    model = AutoModelForCausalLM.from_pretrained(folder)
    s, tokenizer = load_converted(folder, torch.device("cpu"), torch.float32)
    assert tokenizer.mask_token == MASK and s.mask_id == tokenizer.mask_token_id < model.config.vocab_size
    toy = AutoModelForCausalLM.from_pretrained(runs / "toy")
    mine, theirs = model.get_input_embeddings().weight, toy.get_input_embeddings().weight
    assert torch.equal(mine[:len(theirs)], theirs)                             # embeddings were frozen
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, toy.model.layers[0].mlp.up_proj.weight)
    settings = json.loads((folder / "config.json").read_text())["dihal"]
    assert settings["config"]["align_weight"] == 10


def test_folding_the_mask_row_changes_nothing():
    for family in ("qwen3", "gemma3"):
        s, masked = student(family=family), masks()
        with torch.no_grad():
            s.shift.normal_()
            *_, before = s.states(IDS, masked)
            s.fold()
            *_, after = s.states(IDS, masked)
        assert torch.allclose(before, after, atol=1e-4) and not s.shift.any()


def test_interrupted_and_resumed_equals_uninterrupted(runs, tmp_path, text, monkeypatch):
    from safetensors.torch import load_file

    from core import common
    argv = f"--preset tiny --model {runs}/toy --steps 8 --data".split() + [str(text), "--out"]
    whole = repr_align.main([*argv, f"{tmp_path}/a/whole"])
    polls = iter([False] * 4 + [True])
    with monkeypatch.context() as patch:
        patch.setattr(common.StopSignal, "poll", lambda self: next(polls))
        with pytest.raises(SystemExit):
            repr_align.main([*argv, f"{tmp_path}/a/parts"])
    parts = repr_align.main([*argv, f"{tmp_path}/a/parts"])
    assert parts["curve"] == whole["curve"]
    a, b = (load_file(tmp_path / "a" / n / "model.safetensors") for n in ("whole", "parts"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_sampling_from_the_command_line(runs, capsys, tmp_path):
    text = repr_align.main(f"--load {runs}/repr_align/w10 --prompt import --max_new_tokens 9 --sample_steps 4".split())
    assert text.startswith("import") and MASK not in text
    assert "no converted model" in fails(capsys, repr_align.main, "--load", runs / "toy")
    long = ["--load", runs / "repr_align" / "w10", "--max_new_tokens", "5000"]
    assert "shorten one" in fails(capsys, repr_align.main, *long)
    assert "negative" in fails(capsys, repr_align.main, "--align_weight", "-1", "--out", tmp_path / "x/y")
