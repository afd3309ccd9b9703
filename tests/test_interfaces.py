"""interfaces.py: each way reads its own true target as it should, nobody sees the future, the stage runs."""
import pytest
import torch
import torch.nn.functional as F
from conftest import fails, randomise

import data
from core import backbone
from core.denoiser import Bridge
from studies import interfaces


@pytest.fixture(scope="module")
def toy(runs):
    lm = backbone.load(runs / "toy", torch.device("cpu"), torch.float32)
    return lm, data.Tokens(runs / "data", "val", 33).windows(8)                            # (8, 34)


@pytest.mark.parametrize("kind", ["hidden", "embedding", "latent", "bottleneck", "simplex"])
def test_a_true_target_is_read_as_it_should(toy, kind):
    lm, rows = toy
    way = interfaces.Way(kind, lm, 2, rows[:, :-1], latent=lm.D)
    z = way.target(rows)
    assert z.shape == (8, 33, lm.V if kind == "simplex" else lm.D)
    intact = F.log_softmax(lm.head(lm.through(lm.embed(rows[:, :-1]), 0, lm.L)), -1)
    way.width = 0.1
    if kind in ("hidden", "latent", "bottleneck"):                     # all dimensions kept: the model's own prediction
        assert torch.allclose(way.read(z), intact, atol=2e-3)
    else:                                                # the next token itself, and nothing else
        assert torch.equal(way.read(z).argmax(-1), rows[:, 1:])
    few = interfaces.Way("bottleneck" if kind == "bottleneck" else "latent", lm, 2, rows[:, :-1], latent=2)
    assert not torch.allclose(few.read(few.target(rows)), intact, atol=0.05)
    if kind != "simplex":
        assert z.flatten(0, 1)[:, :lm.D].mean().abs() < 0.2


@pytest.mark.parametrize("kind", interfaces.WAYS)
def test_no_prediction_sees_its_token(toy, kind):
    lm, rows = toy
    way = interfaces.Way(kind, lm, 2, rows[:, :-1], latent=4)
    net = randomise(interfaces.Causal(lm.D, 2, 2, lm.V) if kind == "causal" else Bridge(way.d, lm.D, 2, 2))
    other = rows[:, :-1].clone()
    other[:, 20] = (other[:, 20] + 7) % lm.V
    noise = interfaces.position_noise(0, range(33), way.d, rows.device)
    one, two = (interfaces.estimate(way, net, ids, 2, noise) for ids in (rows[:, :-1], other))
    assert torch.equal(one[:, :20], two[:, :20]) and not torch.allclose(one[:, 20:], two[:, 20:])
    assert torch.allclose(one.exp().sum(-1), torch.ones(8, 33), atol=1e-4)


def test_more_draws_are_a_mean_of_probabilities(toy, monkeypatch):
    lm, rows = toy
    way, cfg = interfaces.Way("hidden", lm, 2, rows[:, :-1], 4), interfaces.Config()
    p = [torch.full((8, 33, lm.V), 1 / lm.V), torch.full((8, 33, lm.V), 3 / lm.V)]
    monkeypatch.setattr(interfaces, "position_noise", lambda s, *_: s)
    monkeypatch.setattr(interfaces, "estimate", lambda way, net, ids, nfe, s: p[s].log())
    found = interfaces.next_token_nll(way, None, rows, cfg, 2)
    assert found == pytest.approx(-torch.tensor(2 / lm.V).log().item(), rel=1e-5)


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
    unigram = -interfaces.right(way.unigrams.log().expand(*logp.shape), rows).mean().item()
    assert interfaces.ceiling(way, rows, 4, 0) == pytest.approx(unigram, rel=1e-3)
    net = randomise(Bridge(way.d, lm.D, 1, 2))                                 # says nothing: unigrams are all there is
    interfaces.fit_width(way, net, rows, interfaces.Config(draws=2, nfe=1))
    assert interfaces.next_token_nll(way, net, rows, interfaces.Config(nfe=1), 2) < unigram + 0.1


def test_the_stage_runs(runs, tmp_path, capsys, text):
    argv = ["--model", f"{runs}/toy", "--data", str(text), "--layer", "2", "--seeds", "1", "--steps", "3", "--blocks",
            "1", "--nfe", "1", "--draws", "2", "--windows", "2", "--texts", "2", "--new", "4", "--temperatures", "1",
            "--latent", "4", "--batch_size", "2", "--out", f"{tmp_path}/i"]
    result = interfaces.main(argv)
    assert {c["kind"] for c in result["cells"]} == set(interfaces.WAYS)
    assert all(0 < c["nll"] <= c["nll_one_draw"] + 0.3 for c in result["cells"])
    assert "Hidden at layer 2" in result["verdict"] and "| simplex |" in (tmp_path / "i" / "interfaces.md").read_text()
    assert "there are hidden" in fails(capsys, interfaces.main, "--kinds", "magic", "--out", tmp_path / "j")
    assert "--layer 9" in fails(capsys, interfaces.main, *argv[:-1], tmp_path / "j", "--layer", "9")
    for flag, value, word in (("--temperatures", "warm", "numbers"), ("--temperatures", "0", "numbers"),
                              ("--seq_len", "60", "--seq_len must"), ("--texts", "9", "--texts")):
        assert word in fails(capsys, interfaces.main, *argv[:-1], tmp_path / "j", flag, value)
    assert not (tmp_path / "j").exists()
