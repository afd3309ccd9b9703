"""The hybrid is an ordinary causal LM: it saves, loads, generates, ignores padding and never sees the future."""
import json
import shutil

import pytest
import torch
from conftest import fails, randomise
from transformers import AutoModelForCausalLM

import backbone
import bridge
import hybrid
from common import UserError

IDS = torch.randint(3, 200, (2, 20), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def model(runs):
    """A hybrid of the tiny pipeline with every weight of its bridge random."""
    made = hybrid.from_bridge(runs / "bridge")
    randomise(made.net)
    return made


@torch.no_grad()
def test_logits_are_bridge_then_upper_blocks(runs, model):
    lm = backbone.load(f"{runs}/toy", torch.device("cpu"), torch.float32)
    noise = bridge.position_noise(0, range(20), lm.D, "cpu")
    z = bridge.sample(model.net, model.net.standard_c(lm.embed(IDS)), model.config.nfe, noise)
    want = lm.head(lm.run(model.net.hidden(z), model.config.layer, lm.L))
    assert torch.equal(model(IDS).logits, want)
    loss = torch.nn.functional.cross_entropy(want[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    assert model(IDS, labels=IDS).loss.item() == pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.parametrize("nfe", [1, 2, 4])
@torch.no_grad()
def test_the_future_never_changes_past_logits(model, nfe):
    model.config.nfe = nfe
    other = IDS.clone()
    other[:, 12] += 1
    before, after = model(IDS).logits, model(other).logits
    assert torch.equal(before[:, :12], after[:, :12]) and not torch.equal(before[:, 12:], after[:, 12:])


@torch.no_grad()
def test_padding_and_batching_change_nothing(model):
    whole = model(IDS).logits
    assert torch.allclose(model(IDS[:1]).logits, whole[:1], atol=1e-5)
    pad = torch.zeros(2, 3, dtype=torch.long)
    for side in ("left", "right"):
        order = [pad, IDS] if side == "left" else [IDS, pad]
        ids, mask = torch.cat(order, 1), torch.cat([torch.full_like(p, p is not pad) for p in order], 1)
        logits = model(ids, attention_mask=mask).logits
        kept = logits[:, 3:] if side == "left" else logits[:, :-3]
        assert torch.allclose(kept, whole, atol=1e-4, rtol=1e-4), side


@torch.no_grad()
def test_save_and_load_by_the_auto_class(runs, model, tmp_path):
    model.save_pretrained(tmp_path / "h")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "h")
    assert isinstance(again, hybrid.HybridForCausalLM) and torch.equal(again(IDS).logits, model(IDS).logits)
    names = {p.name for p in (tmp_path / "h").iterdir()}
    assert names == {"config.json", "hybrid.safetensors"}                      # the base's weights are not copied
    saved = AutoModelForCausalLM.from_pretrained(runs / "hybrid")              # and what the stage saved loads too
    assert saved.config.layer == json.loads((runs / "hybrid" / "result.json").read_text())["layer"]


@torch.no_grad()
def test_generate(model):
    out = model.generate(IDS, max_new_tokens=5, do_sample=False, use_cache=False)
    ids = IDS
    for _ in range(5):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(out, ids)


def test_the_stage_reports_the_gap_of_what_it_saved(runs):
    result = json.loads((runs / "hybrid" / "result.json").read_text())
    near = json.loads((runs / "bridge" / "result.json").read_text())["nfe"]["4"]["ce_gap"]
    assert {"layer", "base", "nfe_default", "ce_gap"} <= set(result) and abs(result["ce_gap"] - near) < 0.05


def test_prompt_prints_text(runs, capsys):
    hybrid.main(["--bridge", f"{runs}/bridge", "--prompt", "import os", "--max_new_tokens", "4", "--compare"])
    out = capsys.readouterr().out
    assert out.startswith("import os") and "--- the intact model:" in out


def test_refusals(runs, model, tmp_path, capsys):
    assert "train a bridge" in fails(capsys, hybrid.main, "--bridge", tmp_path / "none")
    toy = tmp_path / "toy"                                                     # same shape, other weights
    shutil.copytree(runs / "toy", toy)
    other = AutoModelForCausalLM.from_pretrained(toy)
    randomise(other)
    other.save_pretrained(toy)
    message = fails(capsys, hybrid.main, "--bridge", runs / "bridge", "--model", toy, "--prompt", "x")
    assert "not those this bridge was trained under" in message
    assert "--nfe" in fails(capsys, hybrid.main, "--bridge", runs / "bridge", "--nfe", "-1")
    moved = tmp_path / "moved"
    model.config.base_model = str(tmp_path / "gone")
    model.save_pretrained(moved)
    with pytest.raises(UserError, match="not at"):
        AutoModelForCausalLM.from_pretrained(moved)
    assert hybrid.HybridForCausalLM.from_pretrained(moved, base_model=f"{runs}/toy").config.layer
    short = tmp_path / "short"
    shutil.copytree(runs / "bridge", short)
    (short / "bridge.safetensors").write_bytes((short / "bridge.safetensors").read_bytes()[:500])
    assert "could not be read" in fails(capsys, hybrid.main, "--bridge", short, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
