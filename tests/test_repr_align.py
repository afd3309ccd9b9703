"""Conversion: which tokens carry loss, what alignment measures, and a run that neither kills nor processes change."""
import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import FEW, ROOT, fails, slow, tiny_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import data
import repr_align
from core import backbone, common
from core.masked import MASK, TWO_WAY, Arm, Student, fill, load_converted, text_likelihood
from repr_align import conversion_loss, sample_masks

IDS = torch.randint(3, 60, (3, 16), generator=torch.Generator().manual_seed(0))
HIDE, SHARE = sample_masks(16, 16, 0, 0, range(3))
ONE = torch.ones(3, 16)
CPU = torch.device("cpu")


def student(family="qwen3", seed=0, arm=TWO_WAY):
    return Student(backbone.Backbone(tiny_model(family, seed).requires_grad_(False)), 63, arm)


# -------------------------------------------------------------------------------------------------
# Masks and loss

def test_masks_are_keyed_by_slot_and_spare_the_first_token():
    whole, r = sample_masks(64, 64, 0, 0, range(400))
    assert torch.equal(whole[5:7], sample_masks(64, 64, 0, 0, [5, 6])[0]) and not whole[:, 0].any()
    assert not torch.equal(whole, sample_masks(64, 64, 0, 1, range(400))[0])
    share = whole[:, 1:].float().mean(1)                                         # about U(0, 1)
    assert share.mean().item() == pytest.approx(0.5, abs=0.05)
    assert share.std().item() == pytest.approx(12 ** -0.5, abs=0.04)
    fixed, r = sample_masks(64, 64, 0, 0, range(200), "validate", between=(0.25, 0.25))
    assert (r == 0.25).all()
    assert fixed[:, 1:].float().mean().item() == pytest.approx(0.25, abs=0.02)
    share = sample_masks(512, 512, 0, 0, range(400), between=(0.2, 0.4))[0][:, 1:].float().mean(1)
    assert share.mean().item() == pytest.approx(0.3, abs=0.01)                   # clipped: U(0.2, 0.4)
    assert share.std().item() == pytest.approx(0.2 / 12 ** 0.5, abs=0.01)
    assert 0.13 < share.min() and share.max() < 0.47
    by_block = sample_masks(64, 16, 0, 0, range(300))[0].view(300, 4, 16).float().mean(-1)
    assert abs(torch.corrcoef(by_block[:, 1:].T)[0, 1]) < 0.2 and by_block.std().item() > 0.25


def test_the_loss_by_hand():
    """CE of token i+1 from the state at i, where token i+1 is masked, and nothing else; then the path term."""
    s = student()
    loss, alignment, _, total_ce = conversion_loss(s, None, IDS, HIDE, path=ONE)
    h = s.lm.embed(IDS.masked_fill(HIDE, 63))
    logits = s.lm.head(s.lm.through(h, 0, s.lm.L, s.lm.side(h, causal=False)))
    logits[..., 63] = -torch.inf
    want = want_path = 0.0
    for b, i in HIDE[:, 1:].nonzero().tolist():
        ce = F.cross_entropy(logits[b, i], IDS[b, i + 1]).item()
        want += ce
        want_path += math.exp(-ce) * ce
    assert total_ce.item() == pytest.approx(want, rel=1e-4)
    assert loss.item() == pytest.approx(want + want_path, rel=1e-4)
    assert alignment.item() == 0                                                 # without a teacher
    published = conversion_loss(s, None, IDS, HIDE, path=repr_align.PATHS["published"](SHARE))
    r = SHARE[:, 1:][HIDE[:, 1:]]                       # of every masked token
    b, i = HIDE[:, 1:].nonzero().unbind(1)
    ce = F.cross_entropy(logits[b, i], IDS[b, i + 1], reduction="none")
    assert published[0].item() == pytest.approx((ce + torch.exp(-ce) * ce / r).sum().item(), rel=1e-4)


class Echo(torch.nn.Module):
    """A student that shows the teacher's own states, or their negatives."""
    arm = Arm()

    def __init__(self, lm, sign):
        super().__init__()
        self.lm, self.sign = lm, sign

    def states(self, ids, is_mask):
        for h in self.lm.trace(self.lm.embed(ids)):
            yield self.sign * h

    def logits(self, normed):
        return self.lm.unnormed_head(normed)


@pytest.mark.parametrize("sign, penalty", [(1.0, 0.0), (-1.0, 2.0)])
def test_alignment_is_zero_for_the_teacher_and_two_for_its_negative(sign, penalty):
    teacher = backbone.Backbone(tiny_model("qwen3"))
    _, alignment, _, _ = conversion_loss(Echo(teacher, sign), teacher, IDS, HIDE, ONE)
    assert alignment.item() / HIDE.sum().item() == pytest.approx(penalty, abs=1e-4)


@pytest.mark.parametrize("arm", [Arm(), Arm("block", 4, "noisy"), Arm("block", 4, "causal")], ids=str)
def test_micro_batches_add_up(arm):
    s, teacher = student(arm=arm), backbone.Backbone(tiny_model("qwen3", 1))
    whole = conversion_loss(s, teacher, IDS, HIDE, ONE, arm.context == "causal")
    parts = [conversion_loss(s, teacher, IDS[i:i + 1], HIDE[i:i + 1], ONE[:1], arm.context == "causal")
             for i in range(3)]
    for value, shares in zip(whole, zip(*parts, strict=True), strict=True):
        assert sum(share.item() for share in shares) == pytest.approx(value.item(), rel=1e-5)


@pytest.mark.parametrize("family", FEW)
@torch.no_grad()
def test_token_blocks_of_one_after_a_causal_copy_are_the_ar_model(family):
    """Also where layers see a window of 8."""
    s = student(family)
    everything = torch.arange(16).expand(3, 16) > 0
    logits = s.lm.model(IDS, use_cache=False).logits[:, :-1]
    logits[..., 63] = -torch.inf
    want = F.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten(), reduction="sum").item()
    s.arm = Arm("block", 1, "causal")
    _, alignment, ar, ce = conversion_loss(s, s.lm, IDS, everything, 0 * ONE, with_ar=True)
    assert ce.item() == pytest.approx(want, rel=1e-5) == ar.item()
    assert alignment.item() == pytest.approx(0, abs=1e-3)
    s.arm = Arm("block", 4, "causal")                                            # the clean copy is the AR model still
    _, _, ar, ce = conversion_loss(s, s.lm, IDS, everything, 0 * ONE, with_ar=True)
    assert ar.item() == pytest.approx(want, rel=1e-5) and ce.item() != pytest.approx(want, rel=1e-4)


# -------------------------------------------------------------------------------------------------
# Runs

@pytest.fixture(scope="session")
def base(runs):
    return runs / "toy"


@pytest.fixture(scope="session")
def convert(runs, text):
    """convert(name, flags) -> (result, folder): a conversion of the toy."""
    def run(name, flags=""):
        out = runs / "arms" / name
        argv = f"--preset tiny --model {runs}/toy --data {text} --out {out} {flags}".split()
        return repr_align.main(argv), out
    return run


@pytest.fixture(scope="session")
def arms(runs, convert):
    """{name: (result, folder)}"""
    arms = {name: (json.loads((runs / "convert" / name / "result.json").read_text()), runs / "convert" / name)
            for name in ("w0", "w10")}
    arms["causal"] = convert("causal", "--attention block --block_size 8 --context causal --ar_weight 1")
    return arms


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_arms_start_alike_and_alignment_pulls(arms):
    w0, w10, causal = (arms[name][0] for name in ("w0", "w10", "causal"))
    assert w0["curve"][0][1] == pytest.approx(w10["curve"][0][1], abs=1e-6)      # same weights, batches and masks
    assert [row[0] for row in w0["curve"]] == [row[0] for row in w10["curve"]] == [0, 10, 20]
    assert w10["curve"][-1][2] < w10["curve"][0][2] and w0["curve"][0][2] is None
    assert all(row[3] > 0 for row in causal["curve"]) and w0["curve"][0][3] is None      # the AR mode
    assert causal["attention"] == "block" and causal["block_size"] == 8 and causal["context"] == "causal"


def test_a_converted_model_is_loaded_as_it_was_saved(arms, base, capsys, tmp_path):
    for name, arm in (("w0", Arm()), ("w10", Arm()), ("causal", Arm("block", 8, "causal"))):
        result, folder = arms[name]
        s, tokenizer = load_converted(folder, CPU, torch.float32)
        assert s.arm == arm and s.mask_id == tokenizer.mask_token_id == result["mask_id"]
        assert tokenizer.mask_token == MASK
        rows = data.Tokens(base.parent / "data", "val", 32).windows(4)[:, :-1]
        bound = [value * rows[:, 1:].numel() for value in result["bound"]]
        assert bound == pytest.approx(text_likelihood(s, rows, 4), rel=1e-4)
    before, after = weights(base), weights(arms["w10"][1])
    name = "model.embed_tokens.weight"
    assert torch.equal(after[name][:len(before[name])], before[name])            # embeddings were frozen
    assert not torch.equal(after["model.layers.0.mlp.up_proj.weight"], before["model.layers.0.mlp.up_proj.weight"])
    settings = json.loads((arms["w10"][1] / "config.json").read_text())
    assert settings["dihal"]["config"]["align_weight"] == 10 and settings["model_type"] == backbone.TWIN
    with pytest.raises(common.UserError, match="is no converted model"):
        load_converted(base, CPU, torch.float32)
    assert "converted model" in fails(capsys, repr_align.main, "--model", arms["w10"][1], "--out", base.parent / "x/y")
    shared = shutil.copytree(arms["w10"][1], tmp_path / "shared")
    (shared / "result.json").unlink()                                            # config.json says what it is
    with pytest.raises(common.UserError, match="converted model"):
        backbone.resolve(str(shared), "out/x")


@slow
def test_transformers_alone_does_not_take_it_for_an_ar_model(arms):
    folder = arms["causal"][1]
    alone = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", alone], capture_output=True, text=True)
    assert done.returncode == 1 and backbone.TWIN in done.stderr


def test_through_transformers(arms):
    """Load, forward and generate, and what it does not take."""
    folder = arms["causal"][1]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    s, _ = load_converted(folder, CPU, torch.float32)
    batch = tokenizer(["import os", "import os"], return_tensors="pt")
    prompts = batch["input_ids"]
    out = model.generate(**batch, max_new_tokens=9, steps=4, seed=1)
    ids = F.pad(prompts, (0, 9), value=s.mask_id)
    assert torch.equal(out, fill(s, ids, ids == s.mask_id, 4, seed=1)) and torch.equal(out[:, :-9], prompts)
    logits = s.logits(s.predict(ids, ids == s.mask_id))
    assert torch.allclose(model(input_ids=ids).logits, logits)
    with pytest.raises(AssertionError, match="one length"):
        model.generate(prompts, torch.zeros_like(prompts))
    with pytest.raises(AssertionError, match="one length"):                      # padding is not ignored
        model(prompts, attention_mask=torch.zeros_like(prompts))
    with pytest.raises(TypeError, match="labels"):
        model(prompts, labels=prompts)
    with pytest.raises(AssertionError, match="1024 positions"):
        model.generate(prompts, max_new_tokens=1024)
    with pytest.raises(TypeError, match="device_map"):
        AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")
    with pytest.raises(NotImplementedError, match="copy the folder"):
        model.save_pretrained(folder.parent / "copy")


@pytest.mark.parametrize("family", ["gpt2", *(pytest.param(f, marks=slow) for f in FEW if f != "gpt2")])
def test_families_convert(family, base, convert, tmp_path):
    """Steps of a whole conversion, saved and loaded again; the loaded model still sees the future."""
    tiny_model(family, vocab_size=512, bos_token_id=0, eos_token_id=0).save_pretrained(tmp_path / "base")
    backbone.load_tokenizer(base).save_pretrained(tmp_path / "base")
    result, folder = convert(family, f"--steps 3 --model {tmp_path}/base")
    assert 0 < result["val_loss"] < 100
    s, _ = load_converted(folder, CPU, torch.float32)
    visible = torch.zeros_like(HIDE)
    *_, a = s.states(IDS, visible)
    *_, b = s.states(torch.cat([IDS[:, :-1], IDS[:, -1:] - 1], 1), visible)
    assert ((a - b).abs().amax(-1) > 1e-6).all()


def test_alignment_ends_and_text_is_limited(convert, monkeypatch):
    taught = []
    starts = []
    cut = data.Tokens.cut

    def spied(student, teacher, *more, **flags):
        if torch.is_grad_enabled():                                              # validation always has the teacher
            taught.append(teacher is not None)
        return conversion_loss(student, teacher, *more, **flags)
    monkeypatch.setattr(repr_align, "conversion_loss", spied)
    monkeypatch.setattr(data.Tokens, "cut", lambda self, places: starts.extend(places) or cut(self, places))
    convert("until", "--steps 4 --align_until 2 --micro_batch 2 --train_tokens 200 --eval_batches 1")
    assert taught == [True] * 4 + [False] * 4
    assert max(starts) + 33 <= 200 + 33 and len(set(starts)) > 4
    convert("more", "--steps 1 --train_tokens 999999999 --eval_batches 1")       # more than there are


def test_killed_and_resumed_equals_uninterrupted(arms, convert, monkeypatch):
    """Stopped after seven steps; then the measurement fails after the last step, which is saved before."""
    def failing(*args):
        raise RuntimeError("the measurement failed")
    polls = iter([False] * 6 + [True])
    with monkeypatch.context() as patch:
        patch.setattr(common.StopSignal, "poll", lambda self: next(polls))
        with pytest.raises(SystemExit):
            convert("killed")
    with monkeypatch.context() as patch:
        patch.setattr(repr_align, "text_likelihood", failing)
        with pytest.raises(RuntimeError):
            convert("killed")
    folder = arms["w10"][1].parent.parent / "arms" / "killed"
    assert torch.load(folder / "state.pt", weights_only=True)["step"] == 20 and not (folder / "result.json").exists()
    result, _ = convert("killed")
    assert result["curve"] == arms["w10"][0]["curve"] and same(folder, arms["w10"][1])
    assert not (folder / "state.pt").exists()


GROWING = "--attention block --context causal --steps 4 --eval_batches 1 --eval_every 2"


def test_token_blocks_grow_and_a_killed_run_grows_on(convert, monkeypatch):
    """Two steps at size 2, two at size 4. Where the sizes agree the losses do."""
    seen = []

    def spied(student, *more, **flags):
        values = conversion_loss(student, *more, **flags)
        if torch.is_grad_enabled():
            seen.append((student.arm.block_size, values[0].item()))
        return values
    monkeypatch.setattr(repr_align, "conversion_loss", spied)
    result, folder = convert("growing", f"{GROWING} --grow_blocks 2 4")
    grown = list(seen)
    seen.clear()
    convert("fixed", f"{GROWING} --block_size 2")
    assert [size for size, _ in grown] == [2, 2, 4, 4] and grown[:2] == seen[:2]
    assert result["block_size"] == 4 and load_converted(folder, CPU, torch.float32)[0].arm.block_size == 4
    polls = iter([False, True])
    with monkeypatch.context() as patch:
        patch.setattr(common.StopSignal, "poll", lambda self: next(polls))
        with pytest.raises(SystemExit):
            convert("grown_on", f"{GROWING} --grow_blocks 2 4")
    resumed, other = convert("grown_on", f"{GROWING} --grow_blocks 2 4")
    assert resumed["curve"] == result["curve"] and same(folder, other)


def test_text_that_holds_the_mask_is_refused_before_training(convert, capsys, monkeypatch):
    """A Unigram tokenizer does not split special tokens that the text spells out."""
    monkeypatch.setattr(repr_align, "validate", lambda *_: [math.inf, None, None])
    with pytest.raises(SystemExit):
        convert("infinite", "--steps 2")
    assert "does the text hold the mask token" in capsys.readouterr().err


def test_a_finished_run_prints_its_result(arms, text, capsys, monkeypatch):
    monkeypatch.setattr(backbone, "load", lambda *_, **__: pytest.fail("loaded"))
    folder = arms["w10"][1]
    result = repr_align.main(f"--preset tiny --data {text} --out {folder}".split())
    assert result["curve"] == arms["w10"][0]["curve"]
    said = capsys.readouterr().out
    assert "w = 10: masked CE" in said and (folder / "convert.png").stat().st_size > 5_000


def test_default_folders():
    for flags, folder in (({}, "out/convert/w10"), ({"align_weight": 0.5}, "out/convert/w0.5"),
                          ({"attention": "block"}, "out/convert/block"), ({"out": "x"}, "x")):
        assert repr_align.out_folder(repr_align.Config(**flags)) == folder


def test_refusals(capsys, base, text, tmp_path):
    argv = f"--preset tiny --model {base} --data {text} --out {tmp_path}/a/b".split()
    for word, flags in (("needs --context causal", "--ar_weight 1"), ("needs --attention block", "--context causal"),
                        ("mask_min < mask_max", "--mask_max 0"), ("mask_min < mask_max", "--mask_min -0.1"),
                        ("sizes that grow", "--attention block --context causal --grow_blocks 4 2"),
                        ("sizes that grow", "--attention block --context causal --grow_blocks 2 3"),
                        ("needs --context causal", "--attention block --grow_blocks 2 4"),
                        ("start it with torchrun", "--shard"), ("invalid choice", "--attention causal"),
                        ("unknown argument --no_shift", "--no_shift")):
        assert word in fails(capsys, repr_align.main, *argv, *flags.split()), flags


def test_dry_run_at_8b_shape(tmp_path, capsys):
    from transformers import LlamaConfig
    LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192,
                tie_word_embeddings=False).save_pretrained(tmp_path / "8b")
    size = repr_align.main(f"--preset 8b --shard --dry_run --dtype bf16 --model {tmp_path}/8b".split())
    assert "hours" in capsys.readouterr().out and 20 < size["gigabytes"] < 80
    assert size["flops_per_token"] == pytest.approx(6 * 8.03e9 * 4 / 3, rel=0.15)


STOPPED = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from core import common
polls = iter([0] * 6 + [1])
common.StopSignal.poll = lambda self: next(polls)
import repr_align
repr_align.main(sys.argv[1:])
"""


@slow
def test_two_processes_and_shards_equal_one(base, text, convert, tmp_path):
    """Gloo processes that share the batch, with whole weights and with blocks spread over them; the latter stopped
    after seven of ten steps, too: the same weights, bit for bit."""
    flags = "--lr 0 --steps 10 --eval_every 5 --eval_batches 3"
    one, folder = convert("one", flags)
    (tmp_path / "stopped.py").write_text(STOPPED)

    def two(name, more="", script=("repr_align.py",)):
        argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *script]
        argv += f"--preset tiny --model {base} --data {text} --out {folder.parent / name} {flags} {more}".split()
        return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=300,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})

    def last_line(name):
        return json.loads((folder.parent / name / "log.jsonl").read_text().splitlines()[-1])
    for name, more in (("two", ""), ("shards", "--shard")):
        done = two(name, more)
        assert done.returncode == 0, done.stderr[-2000:]
        a, b = weights(folder), weights(folder.parent / name)
        assert a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=2e-5) for k in a)
        result = json.loads((folder.parent / name / "result.json").read_text())
        assert result["curve"][-1][1:3] == pytest.approx(one["curve"][-1][1:3], rel=1e-5)
        for key in ("ce", "gnorm", "alignment"):         # Adam would hide a gradient that is off by a factor
            assert last_line(name)[key] == pytest.approx(last_line("one")[key], rel=1e-3)

    two("stopped", "--shard", (tmp_path / "stopped.py", ROOT))
    state = torch.load(folder.parent / "stopped/state.pt", weights_only=True)
    assert state["step"] == 7 and not (folder.parent / "stopped/result.json").exists()
    done = two("stopped", "--shard")
    assert done.returncode == 0 and "resuming at step 7" in done.stdout, done.stderr[-2000:]
    assert same(folder.parent / "shards", folder.parent / "stopped")
