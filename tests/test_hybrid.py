"""The hybrid is an ordinary causal LM: it saves, loads, generates, ignores padding and never sees the future."""
import json
import shutil
import signal

import pytest
import torch
from conftest import FEW, MOST, fails, randomise, tiny_model
from transformers import AutoModelForCausalLM, DynamicCache

import hybrid
from core import backbone, denoiser, diffusion
from core.common import UserError

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
    noise = diffusion.position_noise(0, range(20), lm.D, "cpu")
    z = diffusion.sample(model.net, model.net.standard_c(lm.embed(IDS)), model.config.nfe, noise)
    assert (model.config.sampler, model.config.shift) == ("euler", 1.0)
    want = lm.head(lm.through(model.net.hidden(z), model.config.layer, lm.L))
    assert torch.equal(model(IDS).logits, want)
    loss = torch.nn.functional.cross_entropy(want[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    assert model(IDS, labels=IDS).loss.item() == pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.parametrize("nfe", [1, 2, 4])
@torch.no_grad()
def test_the_future_never_changes_past_logits(model, nfe):
    model.set_nfe(nfe)
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
def test_how_states_are_sampled_is_no_part_of_the_network(runs, tmp_path):
    """Flags over bridge.json's defaults; a saved hybrid keeps them."""
    for name, value, key in (("sampler", "ab2", "sampler"), ("shift", 3.0, "shift"), ("nfe", 2, "nfe_default")):
        made = hybrid.from_bridge(runs / "bridge", **{name: value})
        assert getattr(made.config, name) == value
        other = shutil.copytree(runs / "bridge", tmp_path / name)
        info = json.loads((other / "bridge.json").read_text())
        (other / "bridge.json").write_text(json.dumps({**info, key: value}))                # as the bridge's default
        assert torch.equal(hybrid.from_bridge(other)(IDS).logits, made(IDS).logits)
        assert not torch.equal(hybrid.from_bridge(runs / "bridge")(IDS).logits, made(IDS).logits)
        made.save_pretrained(tmp_path / "new")
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "new")(IDS).logits, made(IDS).logits)
    with pytest.raises(UserError, match="there are euler, ab2"):
        hybrid.from_bridge(runs / "bridge", sampler="leap")


# ------------------------------------------------------------------------------------------------ cached generation
def random_hybrid(family, objective="diffusion", sampler="euler", layer=2, nfe=3, **more):
    """A hybrid of a random base and a random bridge: 2 bridge blocks of width 32 at a layer of 4."""
    net = denoiser.Bridge(32, 32, 2, 2, objective, **more)
    config = hybrid.HybridConfig(layer=layer, nfe=nfe, sampler=sampler, bridge=net.settings, vocab_size=64,
                                 hidden_size=32, eos_token_id=None, pad_token_id=0)
    lm = backbone.Backbone(tiny_model(family).requires_grad_(False))
    return hybrid.HybridForCausalLM(config, randomise(net), lm).eval()


TOKENS = torch.randint(3, 64, (2, 26), generator=torch.Generator().manual_seed(5))


def cached_logits(model, ids, first, mask=None):
    """Logits of ids (B, T) when the first `first` tokens go in at once and the rest one by one."""
    cache, out = DynamicCache(config=model.config), []
    for lo, hi in [(0, first), *((i, i + 1) for i in range(first, ids.shape[1]))]:
        step = model(ids[:, lo:hi], past_key_values=cache, use_cache=True,
                     attention_mask=None if mask is None else mask[:, :hi])
        out.append(step.logits)
    return torch.cat(out, 1)


@pytest.mark.parametrize("family", MOST)
@torch.no_grad()
def test_cached_logits_equal_recomputed_ones(family):
    """Past the window of 8, one token at a time, left-padded or not; and a cache one position off must fail."""
    model = random_hybrid(family)
    want = model(TOKENS, use_cache=False).logits
    assert torch.allclose(cached_logits(model, TOKENS, 10), want, atol=1e-4, rtol=1e-4)
    ids, mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), TOKENS], 1), torch.ones(2, 29, dtype=torch.long)
    mask[:, :3] = 0
    assert torch.allclose(cached_logits(model, ids, 10, mask)[:, 3:], want, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(cached_logits(model, ids, 10)[:, 3:], want, atol=1e-2)      # the broken twin: no mask


@pytest.mark.parametrize("nfe", [1, 2, 4, 8])
@pytest.mark.parametrize("layer", [1, 4])
@torch.no_grad()
def test_cached_logits_at_every_nfe_and_layer(nfe, layer):
    model = random_hybrid("qwen3", "regression", layer=layer, nfe=nfe)
    want = model(TOKENS, use_cache=False).logits
    assert torch.allclose(cached_logits(model, TOKENS, 20), want, atol=1e-4, rtol=1e-4)
    for sampler, again in (("euler", False), ("ab2", False), ("euler", True)):
        model = random_hybrid("qwen3", sampler=sampler, layer=layer, nfe=nfe, self_condition=again)
        want = model(TOKENS, use_cache=False).logits
        assert torch.allclose(cached_logits(model, TOKENS, 1), want, atol=1e-4, rtol=1e-4)
        model.set_nfe(nfe + 1)
        other = model(TOKENS, use_cache=False).logits
        assert not torch.allclose(other, want, atol=1e-3)
        assert torch.allclose(cached_logits(model, TOKENS, 20), other, atol=1e-4, rtol=1e-4)
    model = random_hybrid("qwen3", layer=layer, nfe=nfe, V=64, head_start="tokens", sink="own")
    model.net.means.normal_(generator=torch.Generator().manual_seed(0))
    model.net.mu_0.fill_(30.0)
    want = model(TOKENS, use_cache=False).logits
    assert torch.allclose(cached_logits(model, TOKENS, 20), want, atol=1e-4, rtol=1e-4)
    model.net.means[TOKENS[0, 3]] += 1                                         # what a token is counts from there on
    moved = (model(TOKENS, use_cache=False).logits != want).any(-1)[0]
    assert moved[3] and not moved[:3].any()
    sunk = model(TOKENS, use_cache=False).logits
    model.net.mu_0 += 1                                                        # the sink counts for all that look at it
    moved = (model(TOKENS, use_cache=False).logits != sunk).any(-1)[0]
    assert moved[0] and moved[1:].all() == (layer == 1) and moved[1:].any() == (layer == 1)


def leaks(model):
    """Does a changed token at 15 change any logit before it? (It must change some from there on.)"""
    other = TOKENS.clone()
    other[:, 15] = (other[:, 15] + 1) % 60 + 3
    before, after = model(TOKENS).logits, model(other).logits
    assert not torch.equal(before[:, 15:], after[:, 15:])
    return not torch.equal(before[:, :15], after[:, :15])


@pytest.mark.parametrize("family", MOST)
@torch.no_grad()
def test_the_future_never_changes_the_past_in_any_family(family):
    assert not leaks(random_hybrid(family))


@pytest.mark.parametrize("layer", [1, 2, 3, 4])
@torch.no_grad()
def test_the_future_never_changes_the_past_at_any_layer_and_nfe(layer, monkeypatch):
    for nfe, sampler, again in ((1, "euler", False), (2, "ab2", False), (4, "euler", True), (8, "ab2", True)):
        assert not leaks(random_hybrid("qwen3", sampler=sampler, layer=layer, nfe=nfe, self_condition=again))
    honest = denoiser.Bridge.forward

    def open_mask(self, x, c, t, positions=None, mask=None, *rest, **more):       # the broken twin: bidirectional
        return honest(self, x, c, t, positions, torch.ones(1, 1, 26, 26, dtype=torch.bool), *rest, **more)
    monkeypatch.setattr(denoiser.Bridge, "forward", open_mask)
    assert leaks(random_hybrid("qwen3", layer=layer))


@torch.no_grad()
def test_broken_caches_and_positions_are_noticed():
    """The same assertion as in the caching tests, with a cache one token off and with positions one off."""
    model = random_hybrid("qwen3")
    want = model(TOKENS, use_cache=False).logits[:, 12:]
    for broken in (None, "rolled", "positions"):
        cache = DynamicCache(config=model.config)
        model(TOKENS[:, :12], past_key_values=cache, use_cache=True)
        positions = torch.arange(12, 26)[None] + (broken == "positions")
        for layer in cache.layers if broken == "rolled" else []:
            layer.keys = layer.keys.roll(1, dims=2)
        got = model(TOKENS[:, 12:], past_key_values=cache, use_cache=True, position_ids=positions).logits
        assert torch.allclose(got, want, atol=1e-4, rtol=1e-4) == (broken is None)


@torch.no_grad()
def test_a_shifted_position_is_noticed():
    model = random_hybrid("llama")
    want = model(TOKENS).logits
    shifted = model(TOKENS, position_ids=torch.arange(1, 27)[None]).logits                # other noise, other rotation
    assert not torch.allclose(shifted, want, atol=1e-3)


@pytest.mark.parametrize("family", FEW)
@torch.no_grad()
def test_families_by_the_public_interface(family, tmp_path):
    """A base folder and a bridge folder -> from_bridge -> save_pretrained -> AutoModelForCausalLM: the same logits."""
    tiny_model(family).save_pretrained(tmp_path / "base")
    net = randomise(denoiser.Bridge(32, 32, 2, 2))
    for name in ("mu_z", "mu_c", "sigma_z", "sigma_c"):
        getattr(net, name).uniform_(0.5, 2.0)
    denoiser.save(net, tmp_path, {"layer": 2, "base": backbone.identity(f"{tmp_path}/base"), "nfe_default": 2,
                                  "model": f"{tmp_path}/base", "tokenizer": None})
    made = hybrid.from_bridge(tmp_path)
    lm, noise = backbone.Backbone(tiny_model(family)), diffusion.position_noise(0, range(26), 32, "cpu")
    z = diffusion.sample(net, net.standard_c(lm.embed(TOKENS)), 2, noise)
    assert torch.equal(made(TOKENS).logits, lm.head(lm.through(net.hidden(z), 2, 4)))
    made.save_pretrained(tmp_path / "hybrid")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "hybrid")
    assert torch.equal(again(TOKENS).logits, made(TOKENS).logits)
    out = again.generate(TOKENS, max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=63)
    assert torch.equal(out[:, 26], made(TOKENS).logits[:, -1].argmax(-1))


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "gpt2"])
@torch.no_grad()
def test_generate(family):
    """generate() with its cache gives the tokens of plain recomputation: greedy, batched with left padding, beams."""
    model = random_hybrid(family)
    out = model.generate(TOKENS, max_new_tokens=6, do_sample=False)
    ids = TOKENS
    for _ in range(6):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(out, ids)
    short = TOKENS[:1, :20]
    alone = model.generate(short, max_new_tokens=6, do_sample=False)
    both = torch.cat([torch.cat([torch.zeros(1, 6, dtype=torch.long), short], 1), TOKENS[1:]])
    mask = torch.ones_like(both)
    mask[0, :6] = 0
    padded = model.generate(both, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert torch.equal(padded[0, 6:], alone[0]) and torch.equal(padded[1], out[1])
    beams = dict(num_beams=3, max_new_tokens=5, do_sample=False)
    assert torch.equal(model.generate(TOKENS, **beams), model.generate(TOKENS, use_cache=False, **beams))
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        drawn.append(model.generate(TOKENS, max_new_tokens=5, do_sample=True, temperature=3.0, use_cache=use_cache))
    assert torch.equal(*drawn)


def test_the_stage_reports_the_gap_of_what_it_saved(runs):
    result = json.loads((runs / "hybrid" / "result.json").read_text())
    near = json.loads((runs / "bridge" / "result.json").read_text())["nfe"]["4"]["ce_gap"]
    assert {"layer", "base", "nfe_default", "ce_gap"} <= set(result) and abs(result["ce_gap"] - near) < 0.05
    text = (runs / "hybrid" / "section.md").read_text()
    assert text.startswith("## HYBRID\n") and f"{result['ce_gap']:+.4f} +- " in text and "4 held-out sequences" in text
    assert all(len(value) <= 60 for _, value in result["headline"])
    card = (runs / "hybrid" / "README.md").read_text()
    assert "ce_gap" in card and str(runs) not in card.split("Made by")[0]


def test_compare_knows_the_intact_model(runs):
    """A hybrid that gives back the true h[l] has no gap at all; a random one has."""
    intact = backbone.load(f"{runs}/toy", torch.device("cpu"), torch.float32)
    model = hybrid.from_bridge(runs / "bridge")
    found = hybrid.compare(model, intact, IDS)
    assert found["ce_gap_se"] > 0 and found["kl"] > 0

    def truth(ids, positions, attention_mask=None, cache=None):
        h0 = intact.embed(ids, positions)
        side = intact.side(h0)
        return intact.through(h0, 0, model.config.layer, side), side
    model.hidden = truth
    found = hybrid.compare(model, intact, IDS)
    assert abs(found["ce_gap"]) < 1e-6 and abs(found["kl"]) < 1e-6 and found["agree"] == 1
    want = torch.nn.functional.cross_entropy(intact.model(IDS[:, :-1]).logits.flatten(0, 1), IDS[:, 1:].flatten())
    assert found["ce_intact"] == pytest.approx(want.item(), rel=1e-5)


def test_prompt_prints_text(runs, capsys):
    hybrid.main(["--bridge", f"{runs}/bridge", "--prompt", "import os", "--max_new_tokens", "4", "--compare"])
    out = capsys.readouterr().out
    assert out.startswith("import os") and "--- the intact model:" in out and "CE gap" in out


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
    named = tmp_path / "named"                                                 # same weights, another tokenizer
    shutil.copytree(runs / "toy", named)
    spec = json.loads((named / "tokenizer.json").read_text())
    vocab = spec["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (named / "tokenizer.json").write_text(json.dumps(spec))
    for flags in (["--out", tmp_path / "out"], ["--prompt", "x"]):
        message = fails(capsys, hybrid.main, "--bridge", runs / "bridge", "--model", named, *flags)
        assert "is not the one this bridge was trained with" in message and not (tmp_path / "out").exists()
    other = tmp_path / "other"                                                 # a bridge.json of another layer, or torn
    shutil.copytree(runs / "bridge", other)
    info = json.loads((other / "bridge.json").read_text())
    (other / "bridge.json").write_text(json.dumps({**info, "layer": info["layer"] % 4 + 1}))
    assert "was trained for layer" in fails(capsys, hybrid.main, "--bridge", other, "--prompt", "x")
    (other / "bridge.json").write_text(json.dumps({**info, "D": 64}))
    assert "size mismatch" in fails(capsys, hybrid.main, "--bridge", other, "--prompt", "x")
    (other / "bridge.json").write_text(json.dumps({**info, "prediction": "eps"}))   # as an older version could
    assert "eps has left the code" in fails(capsys, hybrid.main, "--bridge", other, "--prompt", "x")
    del info["layer"]
    (other / "bridge.json").write_text(json.dumps(info))
    assert "layer" in fails(capsys, hybrid.main, "--bridge", other, "--prompt", "x")
    with pytest.raises(UserError, match="at least 1"):
        model.set_nfe(0)
    moved = tmp_path / "moved"
    model.config.base_model = str(tmp_path / "gone")
    model.save_pretrained(moved)
    with pytest.raises(UserError, match="not at"):
        AutoModelForCausalLM.from_pretrained(moved)
    assert hybrid.HybridForCausalLM.from_pretrained(moved, base_model=f"{runs}/toy").config.layer
    short = tmp_path / "short"
    shutil.copytree(runs / "bridge", short)
    for name in ("bridge.safetensors", "bridge.json"):                         # cut at any byte
        whole = (short / name).read_bytes()
        for cut in range(0, len(whole) - 2, max(1, len(whole) // 12)):
            (short / name).write_bytes(whole[:cut])
            message = fails(capsys, hybrid.main, "--bridge", short, "--out", tmp_path / "out")
            assert "could not be read" in message or "not valid JSON" in message
        (short / name).write_bytes(whole)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_while_saving(runs, tmp_path, capsys):
    """safetensors has an error of its own; files may not grow past 20 kB here."""
    import resource
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        message = fails(capsys, hybrid.main, "--bridge", runs / "bridge", "--out", tmp_path / "out", "--seq_len", "32")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "space" in message and not (tmp_path / "out" / "result.json").exists()
