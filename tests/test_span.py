"""Where diffusion can win: estimates on cases that can be summed or integrated, and the study on a tiny pipeline."""
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import fails, randomise, slow, tiny_model

import data
from core import backbone
from core.backbone import Backbone
from core.denoiser import Bridge
from studies import span


def test_a_mixture_beats_the_mean_where_z_has_two_modes():
    """z = +-1 at even odds says which of two tokens all n positions hold; its mean says neither."""
    n, z = 3, torch.tensor([1.0, -1.0]).repeat(8)                                        # (S,)
    logits = torch.stack([9 * z, -9 * z, torch.zeros(16)], -1)[:, None, None].expand(-1, 2, n, -1)     # (S, B, n, V)
    target = torch.tensor([[0] * n, [1] * n])
    each = span.log_p(logits, target)
    assert torch.allclose(-span.mixture(each, 16), torch.full((2, n), math.log(2)), atol=1e-3)
    assert torch.allclose(-span.mixture(each.sum(-1), 16), torch.full((2,), math.log(2)), atol=1e-3)  # one bit in all
    mean = span.log_p(logits.mean(0, keepdim=True), target)                              # the head is linear in z here
    assert torch.allclose(-mean, torch.full((1, 2, n), math.log(3)))
    # where z is a function of c all states are alike, and nothing is gained
    alike = span.log_p(logits[:1].expand(16, -1, -1, -1), target)
    assert torch.allclose(span.mixture(alike, 16), alike[0]) and torch.allclose(span.mixture(alike, 4), alike[0])


def test_a_mixture_estimates_the_integral_from_below():
    """z ~ N(m, v), p(x = 1 | z) = Phi(z): the integral is Phi(m / sqrt(1 + v)). The log of a mean of few is too low."""
    phi = torch.distributions.Normal(0.0, 1.0).cdf
    z = 0.5 + 2 * torch.randn(4096, 1, 1, generator=torch.Generator().manual_seed(0))
    each, exact = phi(z).log(), phi(torch.tensor(0.5 / 5 ** 0.5)).log()
    few = [span.mixture(each, size).item() for size in (1, 4, 16, 4096)]
    assert few == sorted(few) and few[0] < few[2] - 0.2 and few[3] == pytest.approx(exact.item(), abs=0.02)


def test_a_row_of_the_table():
    """Every fourth text chooses the temperature; x_P stands apart; the joint is of a whole text."""
    each = torch.log(torch.tensor([[0.5, 0.25], [0.25, 0.5]]))[:, :, None, None].repeat(1, 1, 8, 3)       # (2, 2, 8, 3)
    each[1, :, ::4] += 1.0                                                # warmer is better where it only chooses
    each[:, :, :, 0] = -7.0
    values, texts = span.summary(each)
    assert values["S = 1"] == pytest.approx(1.5 * math.log(2)) and values["x_P"] == pytest.approx(7.0)
    assert values["used"] == values["tempered"] == pytest.approx(-math.log(0.375)) and len(texts) == 6
    assert values["jointly"] == pytest.approx(-math.log((0.25 + 0.0625) / 2) / 2) and "S = 4" not in values


def test_states_know_nothing_of_the_gap():
    lm, gap = Backbone(tiny_model("qwen3")), slice(6, 10)
    ids = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(0))
    other, unknown = ids.clone(), torch.zeros(2, 12, dtype=torch.bool)
    other[:, gap], unknown[:, gap] = 5, True
    cfg = span.Config(samples=4, nfe=2)
    for objective, draws in (("diffusion", 4), ("regression", 1)):
        net = randomise(Bridge(32, 32, 1, 2, objective, visible="prefix", bidirectional=True, V=64))
        z = span.states(net, {}, lm, ids, unknown, cfg, 0)
        assert z.shape == (draws, 2, 12, 32) and torch.equal(z, span.states(net, {}, lm, other, unknown, cfg, 0))
        assert draws == 1 or not torch.allclose(z[0], z[1])
        logits = span.decode(net, lm, 2, z, gap)                          # the law of token 6 is read off position 5
        assert torch.allclose(logits[-1], lm.head(lm.through(net.hidden(z[-1]), 2, lm.L))[:, 5:9], atol=1e-5)


def test_the_models_own_continuations_give_its_marginals():
    """Second token after the prompt: the sum over all first tokens, against the mean over 2,000 drawn ones."""
    lm, prompt = Backbone(tiny_model("llama")), torch.tensor([[7, 3, 9]])
    logits = span.continuations(lm, prompt, 2, 2000, 0, 0)                               # (S, 1, 2, V)
    both = torch.cat([prompt.repeat(64, 1), torch.arange(64)[:, None]], 1)               # every first token
    with torch.no_grad():
        out = lm.model(both).logits.softmax(-1)
    exact = (out[0, 2, :, None] * out[:, 3]).sum(0)                                      # (V,)
    assert torch.allclose(logits[:, 0, 0].softmax(-1), out[0, 2].expand(2000, -1), atol=1e-5)
    assert torch.allclose(logits[:, 0, 1].softmax(-1).mean(0), exact, atol=0.02) and exact.max() > 0.05


def test_verdicts_and_words():
    def row(name, nats):
        return {"layer": 2, "name": name, "values": {c: [nats, nats + 0.001, nats - 0.001] for c in (
            "S = 1", "used", "tempered", "jointly", "x_P")}, "texts": [[nats, nats + 0.002]] * 3}
    nats = {"sampled states": 5.0, "mean state": 5.2, span.AVERAGED: 5.0, "sampled states, readout": 5.5,
            "mean state, readout": 4.9}
    rows = [{"layer": None, "name": "unigrams", "values": {"used": [6.0], "S = 1": [6.0], "tempered": [5.004]},
             "texts": [[6.0, 6.0]]},
            *(row(name, value) for name, value in nats.items())]
    verdicts = span.compare(rows, 0.01)
    assert verdicts[0][1:4] == ["sampled states", "mean state", "tempered"] and "2 texts" in verdicts[3][5]
    assert verdicts[3][1:4] == ["sampled states", "mean state", "used"] and "ahead by 0.2 nats" in verdicts[3][4]
    assert "ties within 0.01" in verdicts[5][4] and "behind by 0.6" in verdicts[6][4]
    assert [v[4].split(" (")[0] for v in verdicts if v[2] == "unigrams"] == ["ahead by 1 nats", "ties within 0.01 nats"]
    asked = {"hidden": 16, "prefix": 64, "seeds": 3, "nfe": 8, "margin": 0.01}
    text = span.section({"measured": asked, "blocks": 2, "steps": 1, "batch_size": 8, "seed": 0, "judged": 2,
                         "rows": rows, "verdicts": verdicts})
    assert text.startswith("## ") and "| - | unigrams | 6.000 | 5.004 | - |" in text
    (what, value), = span.headline(span.Config(), verdicts)
    assert value == "ahead by 0.2 nats" and "layer 2" in what and "both tempered" in what


@slow
def test_the_study_on_a_tiny_pipeline(runs, text, capsys):
    argv = ["--data", str(text), "--out", str(runs / "span"), "--layers", "2", "--seeds", "1", "--steps", "4",
            "--texts", "8", "--prefix", "16", "--hidden", "4", "--samples", "4", "--nfe", "2", "--blocks", "1"]
    result = span.main(argv)
    by = {row["name"]: row["values"] for row in result["rows"]}
    visible = [by[f"intact model, {what}"]["x_P"][0] for what in ("true tokens", "its own continuations")]
    assert visible[0] == pytest.approx(visible[1], rel=1e-4)              # x_P follows from visible tokens only
    rows = data.Tokens(runs / "data", "val", 19).windows(8)
    judged = rows[[i for i in range(8) if i % 4]]                         # the others choose temperatures
    logits = backbone.load(f"{runs}/toy", torch.device("cpu"), torch.float32).model(judged).logits
    assert visible[0] == pytest.approx(F.cross_entropy(logits[:, 15], judged[:, 16]).item(), rel=1e-4)
    assert set(by) >= {"sampled states", "mean state", span.AVERAGED} and (runs / "span" / "section.md").exists()
    assert all(words.startswith("not known (n = 1") for *_, words, _ in result["verdicts"])
    before = (runs / "span" / "result.json").stat().st_mtime_ns
    span.main(argv)
    assert (runs / "span" / "result.json").stat().st_mtime_ns == before
    again = span.main([*argv, "--hidden", "3"])                           # measured again, trained once
    assert again["measured"]["hidden"] == 3
    assert "--layers" in fails(capsys, span.main, "--layers", "all")
