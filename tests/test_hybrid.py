"""The hybrid is an ordinary causal LM: it saves, loads, generates and never sees the future."""
import json
import shutil
import warnings
from dataclasses import asdict

import pytest
import torch
from conftest import FEW, MOST, fails, randomise, slow, tiny_model
from transformers import AutoModelForCausalLM, DynamicCache

import hybrid
from core import backbone, diffusion
from core.common import UserError

QUICK = [pytest.param(f, marks=[] if f in ("qwen3", "gpt2") else slow) for f in FEW]
TOKENS = torch.randint(3, 64, (2, 26), generator=torch.Generator().manual_seed(5))
PLAIN = dict(do_sample=False, pad_token_id=0)


def random_bridge(kind=diffusion.Bridge, **settings):
    """2 blocks of width 32, every weight random."""
    net = randomise(kind(diffusion.BridgeConfig(D=32, W=32, depth=2, H=2, V=64, **settings)))
    for name in ("mu_z", "mu_c", "sigma_z", "sigma_c"):
        getattr(net, name).uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(1))
    return net.eval()


def random_hybrid(family="qwen3", layer=2, nfe=3, kind=diffusion.Bridge, **settings):
    """A random bridge on a random base of 4 blocks."""
    net = random_bridge(kind, **settings)
    info = {"layer": layer, "nfe_default": nfe, "seq_len": 64, "bridge": asdict(net.config)}
    lm = backbone.Backbone(tiny_model(family).requires_grad_(False))
    model = hybrid.HybridForCausalLM(hybrid.HybridConfig(info, vocab_size=64), net, lm).eval()
    model.generation_config.eos_token_id = None
    return model


def cached_logits(model, ids, first, mask=None):
    """Logits of ids (B, T): the first `first` tokens at once, the last four one by one."""
    cache = DynamicCache(config=model.config)
    parts = []
    T = ids.shape[1]
    for lo, hi in [(0, first), (first, T - 4), *((i, i + 1) for i in range(T - 4, T))]:
        so_far = None if mask is None else mask[:, :hi]
        parts.append(model(ids[:, lo:hi], past_key_values=cache, attention_mask=so_far).logits)
    return torch.cat(parts, 1)


def left_padded(ids, count=3):
    """(ids, attention mask) with padding in front."""
    mask = torch.ones(len(ids), ids.shape[1] + count, dtype=torch.long)
    mask[:, :count] = 0
    return torch.cat([ids.new_zeros(len(ids), count), ids], 1), mask


def near(a, b, tolerance=1e-4):
    return torch.allclose(a, b, atol=tolerance, rtol=tolerance)


# -------------------------------------------------------------------------------------------------
# What it computes

@torch.no_grad()
def test_logits_are_bridge_then_upper_blocks():
    model = random_hybrid()
    lm = backbone.Backbone(tiny_model("qwen3"))
    h0 = lm.embed(TOKENS)
    noise = diffusion.position_noise(0, range(26), 32, "cpu")
    z = diffusion.sample(model.net, model.net.condition(h0, TOKENS), 3, noise)
    want = lm.head(lm.through(model.net.restore(h0, z), 2, lm.L))
    assert torch.equal(model(TOKENS).logits, want)
    loss = torch.nn.functional.cross_entropy(want[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    assert model(TOKENS, labels=TOKENS).loss.item() == pytest.approx(loss.item(), rel=1e-6)
    assert torch.equal(model(TOKENS, logits_to_keep=2).logits, want[:, -2:])


@pytest.mark.parametrize("family", MOST)
@torch.no_grad()
def test_prefix_and_suffix_are_the_intact_model(family, monkeypatch):
    """With the true h[l] the logits are those of the intact model, bit for bit."""
    model = random_hybrid(family)
    intact = backbone.Backbone(tiny_model(family))
    h0 = intact.embed(TOKENS)
    hl = intact.through(h0, 0, 2)
    want = intact.model(TOKENS, use_cache=False).logits
    side = model.lm.side(h0)
    monkeypatch.setattr(model, "hidden", lambda *_: (hl, side))
    assert torch.equal(model(TOKENS).logits, want)
    reader = random_hybrid(family, generates=True)              # it keeps the lower blocks
    h, states = reader.read(TOKENS, torch.arange(26)[None], DynamicCache())
    assert near(h, hl) and near(reader.lm.head(states), want)


@pytest.mark.parametrize("fork", [False, True])
@torch.no_grad()
def test_a_bridge_may_generate_another_state(fork, monkeypatch):
    """A perfect bridge gives the intact logits, also one that predicts h[l] - h[0]."""
    if fork:
        monkeypatch.setattr(diffusion, "produce", lambda h0, hl: hl - h0)
        monkeypatch.setattr(diffusion, "recover", lambda h0, state: state + h0)
    model = random_hybrid()
    intact = backbone.Backbone(tiny_model("qwen3"))
    h0 = intact.embed(TOKENS)
    z = model.net.target(h0, intact.through(h0, 0, 2))
    monkeypatch.setattr(diffusion, "sample", lambda *_, **__: z)
    assert near(model(TOKENS).logits, intact.model(TOKENS).logits)


def leaks(model):
    """Does a changed token at 15 change a logit before it? (It must change some after it.)"""
    other = TOKENS.clone()
    other[:, 15] = (other[:, 15] + 1) % 60 + 3
    before = model(TOKENS).logits
    after = model(other).logits
    assert not torch.equal(before[:, 15:], after[:, 15:])
    return not torch.equal(before[:, :15], after[:, :15])


@pytest.mark.parametrize("family", FEW)
@torch.no_grad()
def test_the_future_never_changes_the_past_in_any_family(family):
    assert not leaks(random_hybrid(family))


@pytest.mark.parametrize("layer", [1, 4])
@torch.no_grad()
def test_the_future_never_changes_the_past_at_any_layer_and_nfe(layer, monkeypatch):
    for nfe, again in ((1, False), (2, True), (8, True)):
        assert not leaks(random_hybrid(layer=layer, nfe=nfe, self_condition=again))
    assert not leaks(random_hybrid(layer=layer, generates=True, bidirectional=True))
    honest = diffusion.Bridge.forward

    def sees_all(self, *args, mask=None, **context):            # the test must notice it
        return honest(self, *args, mask=torch.ones(1, 1, 26, 26, dtype=torch.bool), **context)
    monkeypatch.setattr(diffusion.Bridge, "forward", sees_all)
    assert leaks(random_hybrid(layer=layer))


@pytest.mark.parametrize("family", QUICK)
@torch.no_grad()
def test_padding_and_batching_change_nothing(family):
    model = random_hybrid(family)
    want = model(TOKENS).logits
    assert near(model(TOKENS[:1]).logits, want[:1], 1e-5)
    ids, mask = left_padded(TOKENS)
    assert near(model(ids, attention_mask=mask).logits[:, 3:], want)
    right = torch.cat([TOKENS, TOKENS.new_zeros(2, 3)], 1)
    assert near(model(right, attention_mask=mask.flip(1)).logits[:, :-3], want)
    assert not near(model(right, position_ids=torch.arange(1, 30)[None]).logits[:, :-3], want, 1e-3)


# -------------------------------------------------------------------------------------------------
# Its cache

@pytest.mark.parametrize("family", MOST)
@torch.no_grad()
def test_cached_logits_equal_recomputed_ones(family):
    """Past the window of 8, left-padded or not; without the mask the padding must be seen."""
    model = random_hybrid(family)
    want = model(TOKENS, use_cache=False).logits
    assert near(cached_logits(model, TOKENS, 10), want)
    ids, mask = left_padded(TOKENS)
    assert near(cached_logits(model, ids, 10, mask)[:, 3:], want)
    assert not near(cached_logits(model, ids, 10)[:, 3:], want, 1e-2)


@pytest.mark.parametrize("layer,nfe,settings", [
    (1, 4, dict(objective="regression")), (1, 1, {}), (4, 4, {}),
    (4, 2, dict(self_condition=True)), (1, 2, dict(head_start="tokens")),
    (1, 2, dict(generates=True)), (4, 1, dict(generates=True))])
@torch.no_grad()
def test_cached_logits_at_every_nfe_and_layer(layer, nfe, settings):
    model = random_hybrid(layer=layer, nfe=nfe, **settings)
    if settings.get("head_start"):
        model.net.means.normal_(generator=torch.Generator().manual_seed(0))
    want = model(TOKENS, use_cache=False).logits
    assert near(cached_logits(model, TOKENS, 20), want)
    model.set_nfe(nfe + 1)                                      # other cache layers
    other = model(TOKENS, use_cache=False).logits
    assert near(other, want, 1e-3) == (settings.get("objective") == "regression")
    assert near(cached_logits(model, TOKENS, 1), other)


@torch.no_grad()
def test_a_cache_of_the_user():
    """One that grows by itself, without the config of the model."""
    model = random_hybrid()
    cache = DynamicCache()
    for part in TOKENS.split([12, 13, 1], dim=1):
        logits = model(part, past_key_values=cache).logits
    assert cache.get_seq_length() == 26
    assert near(logits, model(TOKENS).logits[:, -1:])


@torch.no_grad()
def test_broken_caches_and_positions_are_noticed():
    model = random_hybrid()
    want = model(TOKENS, use_cache=False).logits[:, 12:]
    for broken in (None, "rolled", "positions"):
        cache = DynamicCache(config=model.config)
        model(TOKENS[:, :12], past_key_values=cache)
        assert len(cache.layers) == 1 + 2 + 3 * 2 == model.config.num_hidden_layers
        if broken == "rolled":
            for layer in cache.layers:
                layer.keys = layer.keys.roll(1, dims=2)
        positions = torch.arange(12, 26)[None] + (broken == "positions")
        logits = model(TOKENS[:, 12:], past_key_values=cache, position_ids=positions).logits
        assert near(logits, want) == (broken is None)


class PerToken(diffusion.Bridge):
    """A fork: an MLP per token. It has no keys and values, so it fills no layer of the cache."""

    def __init__(self, config):
        super().__init__(config)
        self.blocks = torch.nn.Sequential(torch.nn.Linear(config.W, config.W), torch.nn.GELU())

    def forward(self, x, c, t, positions=None, last=None, unknown=None, **context):
        return self.leave(self.blocks(self.enter(torch.cat([x, c], -1)))).float()


@torch.no_grad()
def test_a_bridge_without_cache_layers():
    """The length of the cache is that of the retained blocks, whatever the bridge is made of."""
    model = random_hybrid(kind=PerToken)
    want = model(TOKENS, use_cache=False).logits
    assert near(cached_logits(model, TOKENS, 10), want)
    ids, mask = left_padded(TOKENS)
    assert near(cached_logits(model, ids, 10, mask)[:, 3:], want)
    out = model.generate(TOKENS, max_new_tokens=4, **PLAIN)
    assert torch.equal(out, model.generate(TOKENS, max_new_tokens=4, use_cache=False, **PLAIN))


# -------------------------------------------------------------------------------------------------
# As transformers' own

@pytest.mark.parametrize("family", ["qwen3", pytest.param("gemma3", marks=slow), "gpt2"])
@torch.no_grad()
def test_generate(family):
    """generate() writes what plain recomputation would: greedy, left-padded, beams, sampled."""
    model = random_hybrid(family)
    out = model.generate(TOKENS, max_new_tokens=6, **PLAIN)
    ids = TOKENS
    for _ in range(6):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(out, ids)
    alone = model.generate(TOKENS[:1, :20], max_new_tokens=6, **PLAIN)
    padded, _ = left_padded(TOKENS[:1, :20], 6)
    both = torch.cat([padded, TOKENS[1:]])
    mask = torch.ones_like(both)
    mask[0, :6] = 0
    together = model.generate(both, attention_mask=mask, max_new_tokens=6, **PLAIN)
    assert torch.equal(together[0, 6:], alone[0]) and torch.equal(together[1], out[1])
    sampled = dict(do_sample=True, temperature=3.0, pad_token_id=0)
    for settings in (dict(num_beams=3, **PLAIN), sampled):
        texts = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            texts.append(model.generate(TOKENS, max_new_tokens=5, use_cache=use_cache, **settings))
        assert torch.equal(*texts)


@torch.no_grad()
def test_the_end_tokens_of_the_base_end_a_text():
    """Also a list of them, which only its generation_config has."""
    base = tiny_model("qwen3").requires_grad_(False)
    model = random_hybrid()
    written = model.generate(TOKENS[:1], max_new_tokens=6, **PLAIN)[0, 26:].tolist()
    base.generation_config.eos_token_id = [1, written[2]]
    made = hybrid.HybridForCausalLM(model.config, model.net, backbone.Backbone(base)).eval()
    out = made.generate(TOKENS[:1], max_new_tokens=6, **PLAIN)[0, 26:].tolist()
    assert out == written[:written.index(written[2]) + 1]
    with pytest.raises(AssertionError, match="static cache"):
        made.generate(TOKENS, max_new_tokens=3, cache_implementation="static", **PLAIN)


@torch.no_grad()
def test_beyond_the_training_length_and_the_positions():
    """A warning beyond twice the length, one sentence beyond the positions that the base has."""
    model = random_hybrid()
    model.config.info["seq_len"] = 10
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(TOKENS[:, :20])
    with pytest.warns(UserWarning, match="trained on texts of 10 tokens"):
        model.generate(TOKENS[:, :20], max_new_tokens=2, **PLAIN)
    model = random_hybrid("gpt2")                       # a table of 64 learned positions
    model.config.max_position_embeddings = 64           # as `assemble` sets it
    model(TOKENS.repeat(1, 3)[:, :64])
    with pytest.raises(AssertionError, match="only 64 positions"):
        model.generate(TOKENS.repeat(1, 3)[:, :62], max_new_tokens=6, **PLAIN)


def test_the_embedding_is_that_of_the_base():
    model = random_hybrid()
    assert model.get_input_embeddings() is model.lm.model.get_input_embeddings()
    with pytest.raises(NotImplementedError, match="vocabulary"):
        model.resize_token_embeddings(70)


def test_casts_are_for_the_upper_blocks():
    for dtype in (torch.bfloat16, torch.float16):
        model = random_hybrid().to(dtype)
        assert model(TOKENS).logits.dtype == dtype and model(TOKENS).logits.isfinite().all()
        assert {p.dtype for p in model.lm.blocks[2:].parameters()} == {dtype}
        assert {p.dtype for p in model.net.parameters()} == {torch.float32}
    model = random_hybrid()
    weights = model.net.enter.weight.clone()
    assert torch.equal(model.bfloat16().float().net.enter.weight, weights)     # not rounded


@pytest.fixture
def folder(tmp_path):
    """A random base and a random bridge in folders: base, bridge."""
    base = tmp_path / "base"
    tiny_model("qwen3").save_pretrained(base)
    (tmp_path / "bridge").mkdir()
    info = {"layer": 2, "base": backbone.identity(base), "nfe_default": 2, "seq_len": 64,
            "model": str(base), "tokenizer": None}
    diffusion.save(random_bridge(), tmp_path / "bridge", info)
    return tmp_path


@torch.no_grad()
def test_save_and_load_by_the_auto_class(folder):
    load = AutoModelForCausalLM.from_pretrained
    model = hybrid.from_bridge(folder / "bridge")
    two = model(TOKENS).logits
    model.save_pretrained(folder / "hybrid")
    again = load(folder / "hybrid")
    assert isinstance(again, hybrid.HybridForCausalLM) and torch.equal(again(TOKENS).logits, two)
    saved = json.loads((folder / "hybrid" / "config.json").read_text())
    assert saved["load_with"].startswith("import hybrid")
    names = {path.name for path in (folder / "hybrid").iterdir()}
    assert names == {"config.json", "bridge.json", "bridge.safetensors"}    # no weights of the base

    three = load(folder / "hybrid", nfe=3)(TOKENS).logits
    assert not torch.equal(three, two)
    model.set_nfe(3)                                            # a saved model keeps it
    assert torch.equal(model(TOKENS).logits, three)
    model.save_pretrained(folder / "three")
    assert torch.equal(load(folder / "three")(TOKENS).logits, three)
    assert torch.equal(hybrid.from_bridge(folder / "three")(TOKENS).logits, three)


@torch.no_grad()
def test_arguments_of_from_pretrained(folder):
    """Obeyed, or refused by name."""
    hybrid.from_bridge(folder / "bridge").save_pretrained(folder / "hybrid")
    load = AutoModelForCausalLM.from_pretrained
    values = {torch.bfloat16: torch.bfloat16, "float16": torch.float16, "auto": torch.float32}
    for value, dtype in values.items():
        assert load(folder / "hybrid", dtype=value).lm.model.dtype == dtype
    refused = {"attn_implementation": "eager", "device_map": "auto", "torch_dtype": torch.float16,
               "quantization_config": {"bits": 4}}
    for name, value in refused.items():
        for cls in (AutoModelForCausalLM, hybrid.HybridForCausalLM):
            with pytest.raises((AssertionError, TypeError), match=name):
                cls.from_pretrained(folder / "hybrid", **{name: value})


@torch.no_grad()
def test_the_base_must_be_the_one_of_the_training(folder):
    model = hybrid.from_bridge(folder / "bridge")
    want = model(TOKENS).logits
    model.save_pretrained(folder / "hybrid")
    moved = folder / "moved"
    shutil.move(folder / "base", moved)
    for load in (AutoModelForCausalLM.from_pretrained, hybrid.HybridForCausalLM.from_pretrained):
        with pytest.raises(UserError, match="no model could be opened"):
            load(folder / "hybrid")
        model = load(folder / "hybrid", base_model=str(moved))
        assert torch.equal(model(TOKENS).logits, want)
    assert torch.equal(hybrid.from_bridge(folder / "bridge", moved)(TOKENS).logits, want)
    randomise(tiny_model("qwen3"), seed=1).save_pretrained(moved)       # other weights
    with pytest.raises(UserError, match="not those this bridge was trained on"):
        hybrid.from_bridge(folder / "bridge", moved)


# -------------------------------------------------------------------------------------------------
# The stage

def test_the_stage_measures_as_bridge_does(runs):
    result = json.loads((runs / "hybrid" / "result.json").read_text())
    there = json.loads((runs / "bridge" / "result.json").read_text())
    calls = str(there["nfe_default"])
    for name in ("fvu", "kl", "ce_gap", "ce_gap_se", "ce_intact", "agree"):
        assert result[name] == there["nfe"][calls][name], name
    assert result["layer"] == there["layer"]
    saved = AutoModelForCausalLM.from_pretrained(runs / "hybrid")
    want = hybrid.from_bridge(runs / "bridge")(TOKENS).logits
    assert torch.equal(saved(TOKENS).logits, want)


def test_a_finished_run_prints_its_result(runs, capsys, monkeypatch):
    monkeypatch.setattr(hybrid, "from_bridge", None)            # nothing is loaded
    settings = json.loads((runs / "hybrid" / "config.json").read_text())["dihal"]["config"]
    flags = [f"--{name}={settings[name]}" for name in ("preset", "data")]
    result = hybrid.main(["--bridge", f"{runs}/bridge", "--out", f"{runs}/hybrid", *flags])
    assert f"CE gap {result['ce_gap']:+.4f} nats" in capsys.readouterr().out


def test_refusals(runs, tmp_path, capsys):
    out = ["--out", tmp_path / "out"]
    assert "train a bridge" in fails(capsys, hybrid.main, "--bridge", tmp_path / "none", *out)
    message = fails(capsys, hybrid.main, "--bridge", runs / "bridge", "--seq_len", 10 ** 6, *out)
    assert "positions" in message
    named = shutil.copytree(runs / "toy", tmp_path / "named")           # another tokenizer
    spec = json.loads((named / "tokenizer.json").read_text())
    vocab = spec["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (named / "tokenizer.json").write_text(json.dumps(spec))
    message = fails(capsys, hybrid.main, "--bridge", runs / "bridge", "--model", named, *out)
    assert "is not the one this bridge was trained with" in message
    cfg = hybrid.Config(model=str(named), bridge=f"{tmp_path}/none")
    assert hybrid.choose(cfg) == "toy"                          # by --model where it is given
    short = shutil.copytree(runs / "bridge", tmp_path / "short")
    whole = (short / "bridge.safetensors").read_bytes()
    (short / "bridge.safetensors").write_bytes(whole[:len(whole) // 2])
    assert "damaged" in fails(capsys, hybrid.main, "--bridge", short, *out)
    assert not (tmp_path / "out").exists()
