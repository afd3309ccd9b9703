"""A cut changes nothing: prefix + suffix is the model, bit for bit, for every family and at every layer."""
import json
import shutil

import pytest
import torch
from conftest import CAUSAL_ONLY, FAMILIES, fails, tiny_model

import geometry
from core import backbone
from core.common import UserError

IDS = torch.randint(3, 64, (2, 28), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_prefix_and_suffix_equal_the_model(family):
    model, drawn = tiny_model(family), torch.get_rng_state()
    lm = backbone.Backbone(model)
    backbone.check(lm)
    assert torch.equal(torch.get_rng_state(), drawn)                             # training stays reproducible
    want = model(IDS).logits
    for window in {"sliding_window", "window_size"} & set(FAMILIES[family][1]):          # or this test shows nothing
        assert not torch.equal(tiny_model(family, **{window: 64})(IDS).logits, want)
    h0 = lm.embed(IDS)
    for cut in range(lm.L + 1):
        hl = lm.through(h0, 0, cut)
        assert torch.equal(lm.head(lm.through(hl, cut, lm.L)), want), f"cut at {cut}"


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_which_hidden_state_it_is(family):
    """h[l] is the library's hidden_states[l], but for the last: there theirs is after the final norm."""
    lm = backbone.Backbone(tiny_model(family))
    states = lm.model(IDS, output_hidden_states=True).hidden_states
    h = lm.embed(IDS)
    for layer in range(lm.L + 1):
        assert torch.equal(lm.norm(h) if layer == lm.L else h, states[layer]), f"h[{layer}]"
        h = lm.through(h, layer, min(layer + 1, lm.L))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_left_padding_changes_nothing(family):
    lm = backbone.Backbone(tiny_model(family))
    ids = torch.cat([torch.zeros(2, 5, dtype=torch.long), IDS], 1)
    mask = torch.ones_like(ids)
    mask[:, :5] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    h = lm.embed(ids, positions)
    padded = lm.head(lm.through(h, 0, lm.L, lm.side(h, positions, mask)))[:, 5:]
    plain = lm.head(lm.through(lm.embed(IDS), 0, lm.L))
    assert torch.allclose(padded, plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_bidirectional_lets_the_future_change_the_past(family):
    """Before conversion a future token changes no past logit; after it, it changes all, beyond any window, and the
    logits are those of the whole model under the same mask. Where that cannot be, it is refused by name."""
    lm = backbone.Backbone(tiny_model(family))
    other = IDS.clone()
    other[:, -1] = (other[:, -1] + 1) % 60 + 3

    def logits(ids, causal):
        h = lm.embed(ids)
        return lm.head(lm.through(h, 0, lm.L, lm.side(h, causal=causal)))
    assert torch.equal(logits(IDS, True)[:, :-1], logits(other, True)[:, :-1])
    if family in CAUSAL_ONLY:
        with pytest.raises(UserError, match=f"{family}' cannot be made bidirectional"):
            backbone.check_wide(lm)
        return
    want = lm.model(IDS, attention_mask=torch.zeros(1, 1, 28, 28), position_ids=torch.arange(28)[None]).logits
    assert torch.equal(logits(IDS, False), want)
    changed = (logits(IDS, False) - logits(other, False)).abs().amax(-1)      # (B, T)
    assert (changed > 1e-5).all()


def test_what_cannot_be_cut_is_refused_with_the_reason():
    import transformers
    size = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2)
    leaks = tiny_model("llama")
    leaks.model.layers[1].mlp.register_forward_hook(lambda _, args, out: out + args[0].flip(1))
    for model, reason in (
            (transformers.MambaForCausalLM(transformers.MambaConfig(**size)), "mamba.*its cache does not give"),
            (transformers.CTRLLMHeadModel(transformers.CTRLConfig(n_head=4, dff=48, **size)), "ctrl.*its own logits"),
            (transformers.XLMWithLMHeadModel(transformers.XLMConfig(
                vocab_size=64, emb_dim=32, n_layers=2, n_heads=4, causal=True)), "xlm.*no single final norm"),
            (leaks, "llama.*a later token changes")):
        with pytest.raises(UserError, match=reason):
            backbone.check(backbone.Backbone(model.eval()))
        assert not model.training


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "smollm3", "gpt_neo", "gpt_oss", "mpt"])
@torch.no_grad()
def test_loading_a_prefix(tmp_path, family):
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    whole = backbone.load(str(tmp_path), torch.device("cpu"), torch.float32)
    part = backbone.load(str(tmp_path), torch.device("cpu"), torch.float32, blocks=2)
    assert len(part.blocks) == 2 and part.L == 4
    assert torch.equal(part.through(part.embed(IDS), 0, 2), whole.through(whole.embed(IDS), 0, 2))


def test_refusals(tmp_path, capsys, text):
    common = ["--preset", "tiny", "--data", text, "--out", tmp_path / "g"]
    assert "no model" in fails(capsys, geometry.main, *common, "--model", tmp_path / "nowhere/at/all")
    (tmp_path / "empty").mkdir()
    assert "no config.json" in fails(capsys, geometry.main, *common, "--model", tmp_path / "empty")

    from transformers import BertConfig, BertModel
    BertModel(BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
                         intermediate_size=8)).save_pretrained(tmp_path / "bert")
    assert "'bert' cannot be cut" in fails(capsys, geometry.main, *common, "--model", tmp_path / "bert")
    (tmp_path / "strange").mkdir()                                        # code of its own: never run, so it is unknown
    (tmp_path / "strange" / "config.json").write_text(json.dumps({
        "model_type": "strange", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}))
    (tmp_path / "strange" / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    assert "no model could be opened" in fails(capsys, geometry.main, *common, "--model", tmp_path / "strange")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "g").exists()


def test_a_model_larger_than_memory_is_refused(runs, tmp_path, capsys, text, monkeypatch):
    """By its own count, before anything is read or written; of a cut model only the blocks that stay count."""
    lm = backbone.load(runs / "toy", torch.device("cpu"), torch.float32)
    whole, one = (4 * sum(p.numel() for p in backbone.load(
        runs / "toy", torch.device("cpu"), torch.float32, blocks=n).parameters()) for n in (None, 1))
    monkeypatch.setattr(backbone, "free_bytes", lambda device: whole - 1)
    said = fails(capsys, geometry.main, "--model", runs / "toy", "--data", text, "--preset", "tiny", "--out",
                 tmp_path / "g")
    assert "GB more than cpu has free" in said and "--dtype bf16" in said and not (tmp_path / "g").exists()
    assert one < whole and backbone.load(runs / "toy", torch.device("cpu"), torch.float32, blocks=1).L == lm.L
    monkeypatch.undo()
    assert 1e6 < backbone.free_bytes(torch.device("cpu"))


def test_damaged_weights_are_refused(runs, tmp_path, capsys, text):
    broken = tmp_path / "broken"
    shutil.copytree(runs / "toy", broken)
    whole = (broken / "model.safetensors").read_bytes()
    command = [geometry.main, "--preset", "tiny", "--data", text, "--out", tmp_path / "g", "--model", broken]
    for size in (0, 5, len(whole) // 2, len(whole) - 1):
        (broken / "model.safetensors").write_bytes(whole[:size])
        assert "could not be read" in fails(capsys, *command)
        assert not (tmp_path / "g").exists()
    from safetensors.torch import load_file, save_file
    weights = load_file(runs / "toy" / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "layers.1.mlp" not in k}, broken / "model.safetensors",
              metadata={"format": "pt"})
    assert "lack 3 tensors" in fails(capsys, *command)


def test_identity_tells_models_of_one_shape_apart(tmp_path):
    for seed in (0, 1):
        tiny_model("llama", seed).save_pretrained(tmp_path / str(seed))
    shutil.copytree(tmp_path / "0", tmp_path / "copy")
    assert backbone.identity(str(tmp_path / "0")) == backbone.identity(str(tmp_path / "copy"))
    assert backbone.identity(str(tmp_path / "0")) != backbone.identity(str(tmp_path / "1"))
    assert backbone.identity(str(tmp_path / "0")) != backbone.identity(str(tmp_path / "0"), random_init=True)


def test_the_toy_is_an_ordinary_model_folder(runs):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained(runs / "toy")
    tokenizer = AutoTokenizer.from_pretrained(runs / "toy")
    code = "import os\n\ndef f(x):\n\treturn x + 1  # é\n"
    assert tokenizer.decode(tokenizer(code)["input_ids"]) == code
    assert model.config.vocab_size >= len(tokenizer)
    assert model.config.model_type == "qwen3"
