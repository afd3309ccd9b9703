"""A cut changes nothing: lower blocks + upper blocks is the model, bit for bit, for every family and
at every layer."""
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import CAUSAL_ONLY, CONVERTIBLE, FAMILIES, MOST, fails, slow, tiny_model

import data
import geometry
from core import backbone
from core.common import UserError
from core.run import training_flops

CPU = torch.device("cpu")
IDS = torch.randint(3, 64, (2, 28), generator=torch.Generator().manual_seed(0))
# One family for each way to prepare a block: rotary tables, two kinds of windows, scales, positions
# that are learned, ALiBi, blocks that return tuples, experts.
MECHANISMS = ["llama", "qwen3", "gemma3", "granite", "gpt2", "opt", "gpt_neo", "bloom", "mpt", "falcon",
              "mixtral", "gpt_oss"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama with its tokenizer, as a model folder."""
    out = tmp_path_factory.mktemp("model")
    tiny_model("llama", vocab_size=512).save_pretrained(out)
    data.train_tokenizer(data.resolve(__file__), 300).save_pretrained(out)
    return out


@pytest.mark.parametrize("family", [
    *MECHANISMS, *[pytest.param(name, marks=slow) for name in FAMILIES if name not in MECHANISMS]])
@torch.no_grad()
def test_lower_and_upper_blocks_equal_the_model(family):
    model = tiny_model(family)
    state = torch.get_rng_state()
    lm = backbone.Backbone(model)
    backbone.check(lm)
    assert torch.equal(torch.get_rng_state(), state)            # training stays reproducible
    output = model(IDS, output_hidden_states=True)
    want = output.logits
    h0 = lm.embed(IDS)
    for layer in range(lm.L + 1):
        hl = lm.through(h0, 0, layer)
        normed = lm.norm(hl) if layer == lm.L else hl           # the library norms the last one
        assert torch.equal(normed, output.hidden_states[layer]), f"h[{layer}]"
        assert torch.equal(lm.head(lm.through(hl, layer, lm.L)), want), f"cut at {layer}"


@slow
@pytest.mark.parametrize("family", FAMILIES)
def test_windows_matter(family):
    """The text is longer than a window, so the test above shows that windows are kept."""
    for window in {"sliding_window", "window_size"} & set(FAMILIES[family][1]):
        wide = tiny_model(family, **{window: 64})
        assert not torch.equal(wide(IDS).logits, tiny_model(family)(IDS).logits)


@pytest.mark.parametrize("family", MOST)
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


@pytest.mark.parametrize("family", [*MOST, *CAUSAL_ONLY[:1]])
@torch.no_grad()
def test_two_way_attention_lets_the_future_change_the_past(family):
    """As a causal model, a future token changes no past logit. With causal=False it changes all,
    beyond any window, and the logits are those of the whole model under the same mask. A family
    where that cannot be is refused by name."""
    lm = backbone.Backbone(tiny_model(family))
    other = IDS.clone()
    other[:, -1] = (other[:, -1] + 1) % 60 + 3

    def logits(ids, causal):
        return lm.head(lm.hidden(ids, lm.L, causal=causal))
    assert torch.equal(logits(IDS, True)[:, :-1], logits(other, True)[:, :-1])
    if family in CAUSAL_ONLY:
        with pytest.raises(UserError, match=f"{family}' cannot be converted"):
            backbone.check_wide(lm)
        return
    backbone.check_wide(lm)
    mask = torch.zeros(1, 1, 28, 28)
    want = lm.model(IDS, attention_mask=mask, position_ids=torch.arange(28)[None]).logits
    assert torch.equal(logits(IDS, False), want)
    changed = (logits(IDS, False) - logits(other, False)).abs().amax(-1)        # (B, T)
    assert (changed > 1e-5).all()


@pytest.mark.parametrize("family", CONVERTIBLE)
@torch.no_grad()
def test_two_copies_of_a_text_in_one_pass(family):
    """A token of the second copy sees itself and what is before it in the first: both copies have
    the states of the plain causal pass, sliding windows included."""
    lm = backbone.Backbone(tiny_model(family))
    T = IDS.shape[1]
    causal = torch.ones(T, T).tril()
    first = torch.cat([causal, torch.zeros(T, T)], 1)
    second = torch.cat([causal - torch.eye(T), torch.eye(T)], 1)
    see = torch.cat([first, second])[None, None] > 0
    positions = torch.arange(T).repeat(2)[None]
    both = lm.hidden(IDS.repeat(1, 2), lm.L, positions, see=see)
    plain = lm.hidden(IDS, lm.L)
    assert torch.allclose(both[:, :T], plain, atol=1e-4, rtol=1e-4)
    assert torch.allclose(both[:, T:], plain, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_head_of_one_state_and_the_cache_of_one_layer():
    from transformers import DynamicCache
    lm = backbone.Backbone(tiny_model("llama"))
    normed = lm.norm(lm.hidden(IDS, lm.L))                                  # (B, T, D)
    one = lm.unnormed_head(normed[0, 3])
    assert torch.allclose(one, lm.unnormed_head(normed)[0, 3], atol=1e-5)       # (V,)
    assert lm.unnormed_head(normed[:0]).shape == (0, 28, lm.V)
    cache = DynamicCache()
    cache.update(normed[:, None], normed[:, None], 1)
    backbone.trim(cache, 5)                             # layer 0 has no keys
    assert cache.layers[1].keys.shape == cache.layers[1].values.shape == (2, 1, 5, lm.D)


def test_what_cannot_be_cut_is_refused_with_the_reason():
    import transformers
    size = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2)
    leaks = tiny_model("llama")
    leaks.model.layers[1].mlp.register_forward_hook(lambda _, args, out: out + args[0].flip(1))
    for model, reason in (
            (transformers.MambaForCausalLM(transformers.MambaConfig(**size)), "mamba.*its cache does not give"),
            (transformers.CTRLLMHeadModel(transformers.CTRLConfig(n_head=4, dff=48, **size)), "ctrl.*its own logits"),
            (transformers.XLMWithLMHeadModel(transformers.XLMConfig(
                vocab_size=64, emb_dim=32, n_layers=2, n_heads=4, causal=True)), "xlm.*be cut"),
            (leaks, "llama.*a later token changes")):
        with pytest.raises(UserError, match=reason):
            backbone.check(backbone.Backbone(model.eval()))
        assert not model.training


@pytest.mark.parametrize("family", [
    "smollm3", *[pytest.param(name, marks=slow) for name in (
        "llama", "gemma3", "gpt2", "gpt_neo", "gpt_oss", "mpt")]])
@torch.no_grad()
def test_loading_a_prefix(tmp_path, family):
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    whole = backbone.load(str(tmp_path), CPU, torch.float32)
    part = backbone.load(str(tmp_path), CPU, torch.float32, blocks=2)
    assert len(part.blocks) == 2 and part.L == 4
    assert torch.equal(part.through(part.embed(IDS), 0, 2), whole.through(whole.embed(IDS), 0, 2))


def test_refusals(tmp_path, capsys):
    common = ["--preset", "tiny", "--out", tmp_path / "g"]
    nowhere = fails(capsys, geometry.main, *common, "--model", tmp_path / "nowhere/at/all")
    assert "no model could be opened" in nowhere
    (tmp_path / "empty").mkdir()
    assert "config.json" in fails(capsys, geometry.main, *common, "--model", tmp_path / "empty")

    from transformers import BertConfig, BertModel
    BertModel(BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
                         intermediate_size=8)).save_pretrained(tmp_path / "bert")
    refused = fails(capsys, geometry.main, *common, "--model", tmp_path / "bert")
    assert "'bert' cannot be cut" in refused or "could not be read" in refused

    (tmp_path / "strange").mkdir()                      # its own code is never run, so it is unknown
    (tmp_path / "strange" / "config.json").write_text(json.dumps({
        "model_type": "strange",
        "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}))
    (tmp_path / "strange" / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    strange = fails(capsys, geometry.main, *common, "--model", tmp_path / "strange")
    assert "no model could be opened" in strange
    assert not (tmp_path / "ran").exists()

    tiny_model("llama").save_pretrained(tmp_path / "short")         # 64 positions
    with pytest.raises(UserError, match="longer than the 64 positions"):
        backbone.read_config(tmp_path / "short", 65)
    with pytest.raises(UserError, match="no tokenizer"):
        backbone.load_tokenizer(tmp_path / "short")
    with pytest.raises(UserError, match="make it with: python toy.py"):
        backbone.resolve("toy", tmp_path / "g")
    (tmp_path / "short" / "config.json").write_text(json.dumps({"model_type": backbone.TWIN}))
    with pytest.raises(UserError, match="not an AR model"):
        backbone.resolve(str(tmp_path / "short"), tmp_path / "g")
    assert not (tmp_path / "g").exists()


def test_an_error_of_the_hub_is_shown_whole(monkeypatch):
    from transformers import PretrainedConfig
    address = "https://huggingface.co/" + "long/" * 100

    def fails(name):
        raise OSError(f"nothing there,\nsee {address}.")
    monkeypatch.setattr(PretrainedConfig, "get_config_dict", fails)
    with pytest.raises(UserError) as refused:
        backbone.read_config("some/model")
    assert f"(nothing there, see {address}.)" in str(refused.value)


def test_damaged_weights_are_refused(folder, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    whole = (broken / "model.safetensors").read_bytes()
    command = [geometry.main, "--preset", "tiny", "--out", tmp_path / "g", "--model", broken]
    for size in (0, 5, len(whole) // 2, len(whole) - 1):
        (broken / "model.safetensors").write_bytes(whole[:size])
        assert "could not be read" in fails(capsys, *command)
        assert not (tmp_path / "g").exists()
    from safetensors.torch import load_file, save_file
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "layers.1.mlp" not in k}, broken / "model.safetensors",
              metadata={"format": "pt"})
    assert "3 tensors are missing" in fails(capsys, *command)


def test_the_token_before_every_text(folder):
    """Only a tokenizer that adds its BOS has one: GPT-2 names a BOS and adds none."""
    from tokenizers.processors import TemplateProcessing
    tokenizer = backbone.load_tokenizer(folder)
    assert backbone.bos_id(tokenizer) is None
    tokenizer.bos_token = tokenizer.eos_token
    assert backbone.bos_id(tokenizer) is None
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    for single, bos in (("<s> $A", tokenizer.bos_token_id), ("$A <s>", None)):
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=single, special_tokens=[("<s>", tokenizer.bos_token_id)])
        assert backbone.bos_id(tokenizer) == bos


def test_a_tokenizer_with_more_ids_than_the_model_has_rows(folder, tmp_path):
    """Refused with both numbers. Special tokens without a row are left alone: no text has them."""
    tokenizer = backbone.load_tokenizer(folder)
    largest = max(tokenizer.get_vocab().values())
    other = shutil.copytree(folder, tmp_path / "model")
    config = json.loads((other / "config.json").read_text())

    def load(rows):
        config["vocab_size"] = rows
        (other / "config.json").write_text(json.dumps(config))
        return backbone.load_tokenizer(other)
    with pytest.raises(UserError, match=f"ids up to {largest}, but the model has only {largest} rows"):
        load(largest)
    assert backbone.tokenizer_hash(load(largest + 1)) == backbone.tokenizer_hash(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(other)
    assert load(largest + 1).pad_token_id == largest + 1
    tokenizer.eos_token = "<pad>"                       # but every document ends with this one
    tokenizer.save_pretrained(other)
    with pytest.raises(UserError, match=f"ids up to {largest + 1}"):
        load(largest + 1)
    from tokenizers.processors import TemplateProcessing
    tokenizer.eos_token = backbone.EOS
    tokenizer.bos_token = "<pad>"                       # or every text begins with it
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<pad> $A", special_tokens=[("<pad>", largest + 1)])
    tokenizer.save_pretrained(other)
    with pytest.raises(UserError, match=f"ids up to {largest + 1}"):
        load(largest + 1)


def test_identity_tells_models_of_one_shape_apart(tmp_path):
    for seed in (0, 1):
        tiny_model("llama", seed).save_pretrained(tmp_path / str(seed))
    shutil.copytree(tmp_path / "0", tmp_path / "copy")
    assert backbone.identity(tmp_path / "0") == backbone.identity(tmp_path / "copy")
    assert backbone.identity(tmp_path / "0") != backbone.identity(tmp_path / "1")


def test_a_hub_model_is_known_by_its_commit(tmp_path, monkeypatch):
    """A cache folder as huggingface_hub leaves it; nothing is fetched."""
    from huggingface_hub import constants
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "models--some--model"
    tiny_model("llama").save_pretrained(folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert backbone.resolve("some/model", tmp_path) == "some/model"
    assert backbone.identity("some/model") == commit[:16]
    assert backbone.load("some/model", CPU, torch.float32).L == 4
    assert backbone.preset_of(SimpleNamespace(model="some/model", out=tmp_path)) == "toy"


def test_presets_go_by_the_size_of_the_model(tmp_path):
    from transformers import Qwen3Config
    sizes = {"toy": (8, 128, 2048), "135m": (30, 576, 49152), "0.6b": (28, 1024, 151936),
             "8b": (36, 4096, 151936)}
    cfg = SimpleNamespace(model=str(tmp_path), out="")
    for preset, (L, D, V) in sizes.items():
        Qwen3Config(num_hidden_layers=L, hidden_size=D, vocab_size=V).save_pretrained(tmp_path)
        assert backbone.preset_of(cfg) == preset
    (tmp_path / "bridge.json").write_text(json.dumps({"model": str(tmp_path)}))
    assert backbone.preset_of(None, bridge=tmp_path) == "8b"
    cfg.model = "no/such/model"
    assert backbone.preset_of(cfg) == "toy"


def test_a_converted_model_is_no_ar_model_to_the_library(tmp_path, folder):
    """Its model_type is its own, its weights and config are read back here."""
    from transformers import AutoConfig
    lm = backbone.load(folder, CPU, torch.float32)
    (tmp_path / "config.json").write_text('{"dihal": {"edition": 3}}')
    tokenizer = backbone.load_tokenizer(folder)
    backbone.save_model(lm.model, tokenizer, tmp_path, converted=True)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == backbone.TWIN and saved["dihal"] == {"edition": 3}
    assert saved["load_with"].startswith("import core.masked")
    assert not (tmp_path / ".saving").exists()
    again = backbone.load(tmp_path, CPU, torch.float32)
    ids = IDS[:, :8]
    assert torch.equal(again.model(ids).logits, lm.model(ids).logits)
    assert backbone.tokenizer_hash(backbone.load_tokenizer(tmp_path)) == backbone.tokenizer_hash(
        tokenizer)
    assert type(backbone.read_config(tmp_path)) is type(lm.config)
    try:
        other = AutoConfig.from_pretrained(tmp_path)
    except ValueError:
        return                                          # unknown to the library
    assert other.model_type == backbone.TWIN            # core/masked.py was imported


def test_flops_of_training():
    """Matrix products of a forward pass, counted by torch, times three (forward and backward). Torch
    counts all pairs of tokens, we count the causal half."""
    from torch.utils.flop_counter import FlopCounterMode
    model = tiny_model("llama", tie_word_embeddings=True, attn_implementation="eager")
    T = IDS.shape[1]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(IDS[:1])
    counted = 3 * counter.get_total_flops() / T
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    attention = training_flops(0, 0, 4, model.config, T)
    trained = training_flops(matrices, 0, 4, model.config, T)
    assert trained + attention == pytest.approx(counted)
    assert training_flops(0, matrices, 4 / 3, model.config, T) == pytest.approx(trained / 3)
