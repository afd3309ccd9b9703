"""INTERFACES: each reader on its own true target, no prediction sees its token, the study runs."""
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import fails, randomise, tiny_model

from core import backbone
from core.diffusion import position_noise
from studies import interfaces


@pytest.fixture(scope="module")
def small():
    lm = backbone.Backbone(tiny_model("qwen3").requires_grad_(False))
    return lm, torch.randint(3, 64, (8, 34), generator=torch.Generator().manual_seed(0))


def intact(lm, rows):
    return lm.head(lm.hidden(rows[:, :-1], lm.L)).log_softmax(-1)


def predictor_of(kind, small):
    lm, rows = small
    torch.manual_seed(0)
    target = interfaces.TARGETS[kind](lm, 2, rows[:, :-1])
    return interfaces.Predictor(lm, target, rows[:, :-1])


@pytest.mark.parametrize("kind", ["hidden", "latent", "bottleneck"])
def test_a_true_state_is_read_as_the_intact_model(small, kind, monkeypatch):
    lm, rows = small
    predictor = predictor_of(kind, small)                   # 32 dimensions are all of them
    z = predictor.target.make(rows)
    assert z.shape == (8, 33, lm.D)
    assert torch.allclose(predictor.read(z), intact(lm, rows), atol=5e-3)
    monkeypatch.setattr(interfaces, "LATENT", 2)
    predictor = predictor_of(kind, small)
    if kind != "hidden":
        z = predictor.target.make(rows)
        assert z.shape == (8, 33, 2)
        assert z.flatten(0, 1).mean(0).abs().max() < 0.2
        assert not torch.allclose(predictor.read(z), intact(lm, rows), atol=0.05)


@pytest.mark.parametrize("kind", ["embedding", "simplex"])
def test_a_true_next_token_is_read_as_itself(small, kind):
    _, rows = small
    predictor = predictor_of(kind, small)
    predictor.width = 0.1
    logp = predictor.read(predictor.target.make(rows))
    assert torch.equal(logp.argmax(-1), rows[:, 1:])
    predictor.width = 1e9                                   # a wide reader knows unigrams alone
    share = interfaces.unigrams(small[0], rows[:, :-1]).log()
    logp = predictor.read(predictor.target.make(rows))
    assert torch.allclose(logp, share.expand_as(logp), atol=1e-3)


def test_the_simplex_reads_a_distribution_as_it_is(small):
    lm, rows = small
    predictor = predictor_of("simplex", small)
    predictor.width = 0.0
    p = intact(lm, rows).exp()
    assert torch.allclose(predictor.read(2 * p - 1).exp(), p, atol=1e-5)


@pytest.mark.parametrize("kind", interfaces.TARGETS)
def test_no_prediction_sees_its_token(small, kind):
    lm, rows = small
    predictor = randomise(predictor_of(kind, small))
    other = rows.clone()
    other[:, 20] = (other[:, 20] + 7) % lm.V
    noise = position_noise(0, range(33), predictor.target.d, rows.device)
    one = predictor.predict(rows, 2, noise)
    two = predictor.predict(other, 2, noise)
    assert torch.equal(one[:, :20], two[:, :20])
    assert not torch.allclose(one[:, 20:], two[:, 20:])
    assert torch.allclose(one.exp().sum(-1), torch.ones(8, 33), atol=1e-4)


def test_samples_are_a_mean_of_probabilities(small):
    lm, rows = small
    p = [torch.full((8, 33, lm.V), 1 / lm.V), torch.full((8, 33, lm.V), 3 / lm.V)]
    nll = interfaces.mean_nll(rows, lambda ids: [values.log() for values in p])
    assert nll == pytest.approx(math.log(lm.V / 2), rel=1e-5)
    nll = interfaces.mean_nll(rows, lambda ids: [intact(lm, ids)])
    want = F.cross_entropy(intact(lm, rows)[:, 4:].flatten(0, 1), rows[:, 5:].flatten())
    assert nll == pytest.approx(want.item(), rel=1e-5)


def test_the_study_runs(runs, tmp_path, capsys, text, monkeypatch):
    small = {"SEQ_LEN": 32, "DEPTH": 1, "SAMPLES": 2, "WINDOWS": 2, "BATCH_SIZE": 2,
             "WIDTHS": [0.5, 1.0]}
    kinds = ["hidden", "simplex", "causal"]
    for name, value in small.items():
        monkeypatch.setattr(interfaces, name, value)
    argv = ["--model", f"{runs}/toy", "--data", str(text), "--layer", "2", "--seeds", "1",
            "--steps", "3", "--nfe", "1", "--kinds", *kinds, "hidden", "--out", f"{tmp_path}/i"]
    result = interfaces.main(argv)
    assert [cell["kind"] for cell in result["cells"]] == kinds
    assert all(cell["nll"] > 0 for cell in result["cells"])
    ceilings = {cell["kind"]: cell["true_targets"] for cell in result["cells"]}
    assert ceilings["hidden"] > 0 and ceilings["causal"] is None and ceilings["simplex"] is None
    shown = capsys.readouterr().out
    assert "| simplex |" in shown and "not known" in shown
    without = {"cells": [cell for cell in result["cells"] if cell["kind"] != "causal"] * 2}
    interfaces.show(without)                                # a target is no control of its own
    shown = capsys.readouterr().out
    assert shown.count("| - |\n") == 2 and "tie" not in shown

    (tmp_path / "i" / "result.json").unlink()               # killed: finished cells stay
    before = (tmp_path / "i" / "hidden_seed0.json").stat().st_mtime_ns
    (tmp_path / "i" / "causal_seed0.json").unlink()
    assert interfaces.main(argv)["cells"] == result["cells"]
    assert (tmp_path / "i" / "hidden_seed0.json").stat().st_mtime_ns == before
    other = ["--model", runs / "toy", "--out", tmp_path / "j"]
    assert "known are hidden" in fails(capsys, interfaces.main, *other, "--kinds", "magic")
    assert "--layer 9" in fails(capsys, interfaces.main, *other, "--layer", "9")
    assert not (tmp_path / "j").exists()
