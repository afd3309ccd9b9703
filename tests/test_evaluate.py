"""evaluate.py: what is asked and counted, and what is refused."""
import importlib
import shutil

import numpy as np
import pytest
import torch
from conftest import fails, tiny_model

import evaluate
from core import backbone, cost, masked, report, run, zeroshot


# ---------------------------------------------------------------------------------------------------- evaluate.py
def test_bits_per_byte_of_a_known_model(runs):
    lm = backbone.Backbone(tiny_model("llama"))
    rows = torch.randint(3, 64, (5, 12))
    nats = torch.nn.functional.cross_entropy(lm.model(rows).logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
    bits, error = zeroshot.bits_per_byte(lm.model, rows, 4.0, 4, 0)
    assert bits == pytest.approx(nats.item() / np.log(2) / 4, rel=1e-5) and error is None
    twin, _ = masked.load_converted(runs / "repr_align" / "w0", torch.device("cpu"), torch.float32)
    bits, error = zeroshot.bits_per_byte(twin, rows[:2, :2], 4.0, 4, 0)         # one token to guess: exact
    exact = masked.masked_ce(twin, rows[0, :2], torch.tensor([[False, True]])) + masked.masked_ce(
        twin, rows[1, :2], torch.tensor([[False, True]]))
    assert bits == pytest.approx(exact.item() / 2 / np.log(2) / 4, rel=1e-5) and error == pytest.approx(0, abs=1e-9)


def test_the_verdict_is_what_the_numbers_say():
    def of(rows):
        return {"nfe": {"1": {"kl_rows": rows, "ce_gap_rows": rows, "ce_gap": sum(rows) / len(rows)}},
                "nfe_default": 1, "layer": 2}
    low, high = of([0.1, 0.11, 0.09, 0.1]), of([0.3, 0.31, 0.3, 0.29])

    def said(bridge, regression):
        return evaluate.against_regression({"bridge": bridge, "regression": regression}, 0.02)
    assert said(low, high)[1] == "CE gap +0.1000 nats, by plain regression +0.3000"
    assert "by KL ahead by 0.2 nats" in said(low, high)[0] and "by CE ahead" in said(low, high)[0]
    assert all("not known (n = 1 training seed each)" in said(x, y)[0] for x in (low, high) for y in (low, high))
    assert "by KL behind by 0.2 nats" in said(high, low)[0]
    assert "ties within 0.02 nats" in said(low, of([0.101, 0.109, 0.091, 0.1]))[0]
    assert "by KL not known" in said(low, of([0.3, 0.01, 0.2, 0.02]))[0] and "n = 1," in said(of([0.1]), of([0.2]))[0]
    assert all(len(said(x, y)[1]) <= 60 for x in (low, high) for y in (low, high))


def test_markers_are_filled_and_nothing_else_is_touched():
    text = "a\n<!-- x -->\nold\n<!-- /x -->\nb <!-- y -->\n<!-- /y -->\n"
    once = report.fill_markers(text, {"x": "new\nlines", "y": "\\1"})
    assert once == "a\n<!-- x -->\nnew\nlines\n<!-- /x -->\nb <!-- y -->\n\\1\n<!-- /y -->\n"
    assert report.fill_markers(once, {"x": "new\nlines", "y": "\\1"}) == once


def test_peak_memory_counts_what_is_held_at_once():
    weight = torch.ones(1000)
    with cost.PeakBytes([weight]) as peak:
        a = weight * 2                                                         # 4,000 bytes
        b = a.view(10, 100) + 1                                                # and as many again; the view is free
        del a
        c = weight[:500].clone() + b[0, 0]                                     # b, the clone and the sum: 8,000
        del b, c
    assert peak.most == 8000 and peak.now == 0


def test_evaluate_refuses_what_it_cannot_measure(runs, tmp_path, capsys):
    argv = ["--runs", runs, "--out", tmp_path / "e"]
    assert "at least 2" in fails(capsys, evaluate.main, *argv, "--texts", "1")
    assert "positions" in fails(capsys, evaluate.main, *argv, "--new", "400")
    assert not (tmp_path / "e").exists()
    foreign = tmp_path / "r"
    shutil.copytree(runs, foreign)
    old = run.read_json(foreign / "repr_align" / "w0" / "result.json")
    run.write_json(foreign / "repr_align" / "w0" / "result.json", {**old, "steps": 21})
    assert "differ in steps" in fails(capsys, evaluate.main, "--runs", foreign, "--out", tmp_path / "e")
    if importlib.util.find_spec("lm_eval") is None:
        assert "pip install 'lm-eval" in fails(capsys, evaluate.main, *argv, "--harness", "lambada_openai")


def test_an_answer_is_the_strongest_evidence_with_its_verdict_in_bold():
    found = ["**generate**: ours against lazy: not known (n = 1, higher by 2 nats).",
             "**generate_seeds/equal**: ours against lazy: behind by 0.3 nats (95% [+0.1, +0.5] nats, 3 seeds).",
             "**sweep**: KL: behind at 6, not known at 1 of 7 layers (+0.1 at layer 1)."]
    sources = (("generate_seeds/equal", " against "), ("generate", " against "))
    assert report.answer(found, sources) == "ours against lazy: **behind** by 0.3 nats (3 seeds)."
    assert report.answer(found[:1], sources) == "ours against lazy: **not known** (n = 1, higher by 2 nats)."
    both = "KL: **behind** at 6, **not known** at 1 of 7 layers (+0.1 at layer 1)."
    assert report.answer(found, (("sweep", "KL"),)) == both
    assert report.answer(found, (("span", "KL"),)) == "not run"
