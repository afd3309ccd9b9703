"""interfaces.py: each way reads its own true target as it should, nobody sees the future, the stage runs."""
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import fails, randomise

import data
from core import backbone, run
from studies import interfaces


@pytest.fixture(scope="module")
def toy(runs):
    lm = backbone.load(runs / "toy", torch.device("cpu"), torch.float32)
    return lm, data.Tokens(runs / "data", "val", 33).windows(8)                            # (8, 34)


@pytest.mark.parametrize("kind", ["hidden", "embedding", "latent", "bottleneck", "simplex"])
def test_a_true_target_is_read_as_it_should(toy, kind):
    lm, rows = toy
    way = interfaces.Way(kind, lm, 2, rows[:, :-1], lm.D)
    z = way.goal.target(rows)
    assert z.shape == (8, 33, lm.V if kind == "simplex" else lm.D)
    intact = F.log_softmax(lm.head(lm.through(lm.embed(rows[:, :-1]), 0, lm.L)), -1)
    way.width = 0.1
    if kind in ("hidden", "latent", "bottleneck"):                     # all dimensions kept: the model's own prediction
        assert torch.allclose(way.read(z), intact, atol=2e-3)
    else:                                                # the next token itself, and nothing else
        assert torch.equal(way.read(z).argmax(-1), rows[:, 1:])
    few = interfaces.Way("bottleneck" if kind == "bottleneck" else "latent", lm, 2, rows[:, :-1], 2)
    assert few.goal.target(rows).shape == (8, 33, 2)
    assert not torch.allclose(few.read(few.goal.target(rows)), intact, atol=0.05)
    if kind != "simplex":
        assert z.flatten(0, 1)[:, :lm.D].mean().abs() < 0.2


@pytest.mark.parametrize("kind", interfaces.TARGETS)
def test_no_prediction_sees_its_token(toy, kind):
    lm, rows = toy
    way = interfaces.Way(kind, lm, 2, rows[:, :-1], 4)
    net = randomise(way.network(2))
    other = rows[:, :-1].clone()
    other[:, 20] = (other[:, 20] + 7) % lm.V
    noise = interfaces.position_noise(0, range(33), way.d, rows.device)
    one, two = (way.law(net, ids, 2, noise) for ids in (rows[:, :-1], other))
    assert torch.equal(one[:, :20], two[:, :20]) and not torch.allclose(one[:, 20:], two[:, 20:])
    assert torch.allclose(one.exp().sum(-1), torch.ones(8, 33), atol=1e-4)


def test_more_draws_are_a_mean_of_probabilities(toy, monkeypatch):
    lm, rows = toy
    way, cfg = interfaces.Way("hidden", lm, 2, rows[:, :-1], 4), interfaces.Config(draws=2)
    p = [torch.full((8, 33, lm.V), 1 / lm.V), torch.full((8, 33, lm.V), 3 / lm.V)]
    monkeypatch.setattr(interfaces, "position_noise", lambda s, *_: s)
    way.law = lambda net, ids, nfe, s: p[s].log()
    assert interfaces.next_token_nll(way, None, rows, cfg) == pytest.approx(math.log(lm.V / 2), rel=1e-5)


def test_readers_and_their_ceilings(toy):
    lm, rows = toy
    logp = F.log_softmax(lm.head(lm.through(lm.embed(rows[:, :-1]), 0, lm.L)), -1)
    intact = -interfaces.right(logp, rows).mean().item()
    way = interfaces.Way("hidden", lm, 2, rows[:, :-1], 4)
    assert interfaces.ceiling(way, rows, 3, 0) == pytest.approx(intact, rel=1e-4)
    way = interfaces.Way("simplex", lm, 2, rows[:, :-1], 4)
    way.width = 0.0
    assert torch.allclose(way.read(2 * logp.exp() - 1), logp, atol=1e-3)       # a law in, the same law out
    way.width = 1e-3
    few, many = (interfaces.ceiling(way, rows, draws, 0) for draws in (4, 64))
    assert intact < many < few                                                 # drawn tokens tell the law slowly
    way.width = 1e9
    unigram = -interfaces.right(interfaces.unigrams(lm, rows[:, :-1]).log().expand(*logp.shape), rows).mean().item()
    assert interfaces.ceiling(way, rows, 4, 0) == pytest.approx(unigram, rel=1e-3)
    net = randomise(way.network(1))                                            # says nothing: unigrams are all there is
    interfaces.fit_width(way, net, rows, interfaces.Config(draws=2, nfe=1))
    assert interfaces.next_token_nll(way, net, rows, interfaces.Config(draws=2, nfe=1)) < unigram + 0.1


def test_verdicts_pair_the_seeds_that_both_have():
    cells = [{"kind": k, "seed": s, "nll": n} for k, s, n in (
        ("hidden", 0, 3.0), ("hidden", 1, 3.2), ("hidden", 2, 3.1), ("latent", 1, 4.2), ("latent", 2, 4.1001),
        ("latent", 0, 4.0), ("causal", 2, 3.0), ("simplex", 7, 1.0))]
    latent, causal, control = interfaces.verdicts(interfaces.by_kind(cells))  # none for a seed that nothing shares
    assert control == "next token, latent against causal: not known (n = 1, higher by 1.1 nats)"
    assert latent.startswith("next token, hidden against latent: ahead by 1 nats (95%") and "3 seeds" in latent
    assert causal == "next token, hidden against causal: not known (n = 1, higher by 0.1 nats)"


def test_the_study_runs(runs, tmp_path, capsys, text, monkeypatch):
    argv = ["--model", f"{runs}/toy", "--data", str(text), "--layer", "2", "--seeds", "1", "--steps", "3", "--blocks",
            "1", "--nfe", "1", "--draws", "2", "--windows", "2", "--latent", "4", "--batch_size", "2", "--out",
            f"{tmp_path}/i"]
    result, out = interfaces.main(argv), tmp_path / "i"
    shown = (out / "section.md").read_text()
    assert {c["kind"] for c in result["cells"]} == set(interfaces.TARGETS)
    assert all(c["nll"] > 0 and c["seconds"] > 0 for c in result["cells"])
    assert shown == run.read_section(out) and shown.startswith("## Interfaces at equal budget\n")
    assert "| simplex |" in shown and "hidden against simplex: not known (n = 1" in shown
    assert all(len(value) <= 60 for _, value in result["headline"])

    def logits(lm, layer, rows, latent):
        """the intact model's logits"""
        return interfaces.Target(lm.V, "nothing", lambda ids: lm.head(interfaces.state(lm, ids[:, :-1], lm.L)),
                                 lambda z, width: z)
    before = (out / "hidden_seed0.json").stat().st_mtime_ns
    monkeypatch.setitem(interfaces.TARGETS, "logits", logits)
    again = interfaces.main(argv)                                              # a fork's target: its cell and no other
    assert again["cells"][:-1] == result["cells"] and (out / "hidden_seed0.json").stat().st_mtime_ns == before
    assert again["cells"][-1]["kind"] == "logits" and "| logits |" in (out / "section.md").read_text()
    with pytest.raises(SystemExit):
        interfaces.main(["--help"])
    assert "logits      the intact model's logits" in capsys.readouterr().out
    monkeypatch.delitem(interfaces.TARGETS, "logits")
    assert interfaces.main(argv)["cells"] == again["cells"]                    # an unknown name in a stored result
    assert "there are hidden" in fails(capsys, interfaces.main, "--kinds", "magic", "--out", tmp_path / "j")
    assert "--layer 9" in fails(capsys, interfaces.main, *argv[:-1], tmp_path / "j", "--layer", "9")
    assert not (tmp_path / "j").exists()
