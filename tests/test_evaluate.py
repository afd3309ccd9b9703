"""evaluate.py and sweep.py: statistics with known answers, what is asked and counted, the sweep on a tiny backbone."""
import importlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import fails, slow, tiny_model

import data
import evaluate
from core import backbone, denoiser, masked, report, run
from studies import sweep


# ----------------------------------------------------------------------------------------------------- statistics
def test_exact_permutation_p():
    assert sweep.permutation_p([1, 2, 3, 4, 5], [2, 4, 6, 8, 10]) == pytest.approx(1 / 120)
    assert sweep.permutation_p([1, 2, 3, 4], [4, 3, 2, 1]) == 1
    a, b = list(range(10)), [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
    assert 0 < sweep.permutation_p(a, b) < 0.2                                # drawn, not enumerated
    assert sweep.permutation_p(range(12), range(12)) == pytest.approx(1 / 20001)


def geometry_of(scores, noise=0.01):
    gen = np.random.default_rng(0)
    return {"layers": [{"layer": i + 1, "score": s} for i, s in enumerate(scores)],
            "replicates": (np.array(scores) + noise * gen.standard_normal((200, len(scores)))).tolist(),
            "trivial": [{"name": "-layer", "values": [-float(i) for i in range(len(scores))]}],
            "variants": [{"name": "default", "scores": scores}, {"name": "flipped", "scores": [-s for s in scores]}]}


def test_a_predictor_that_is_right_wins_over_one_that_is_not():
    fvu = np.array([[0.1, 0.5, 0.2, 0.4, 0.3], [0.11, 0.52, 0.19, 0.41, 0.33]])
    score, depth, flipped = sweep.correlations(geometry_of((-fvu.mean(0)).tolist()), [1, 2, 3, 4, 5], fvu)
    assert score["rho"] == pytest.approx(1) and score["interval"][0] > 0.8 and score["p"] == pytest.approx(1 / 120)
    assert flipped["rho"] == pytest.approx(-1)
    assert depth["score_minus"][0] > 0 and depth["rho"] < 0.5
    assert depth["score_minus"][1] == pytest.approx(1 - depth["rho"])
    mixed = np.array([[0.1, 0.2, 0.3], [0.3, 0.2, 0.1]])                       # two seeds that disagree
    seeds = sweep.correlations(geometry_of([3., 2., 1.]), [1, 2, 3], mixed)[1]
    assert seeds["interval"] == pytest.approx([-1, 1])
    some = sweep.correlations(geometry_of([5., 4., 3., 2., 1.], 5.0), [2, 4, 5], fvu[:, [1, 3, 4]])
    assert some[0]["interval"][0] < -0.4 < some[0]["interval"][1]              # a score that is all noise says nothing


def test_the_manual_is_a_corpus(tmp_path):
    folder = sweep.manual(tmp_path / "text")
    assert len(list(folder.glob("*.txt"))) > 50
    documents = list(data.documents(data.resolve(str(folder))))
    held = [data.held_out(d, i == 0) for i, d in enumerate(documents)]
    assert 1 < sum(held) < len(held) / 3 and sum(map(len, documents)) > 300_000


def test_what_is_meant_by_bridgeability_is_shown():
    rows = [(1, 0.0, 0.3), (2, 1.0, 0.2), (3, 0.5, 0.1)]                       # score: 2, 3 before 1; 2 before 3
    assert sweep.disagreements(rows) == {"pairs": 2, "score_right": 2}
    layers = [{"layer": i, "score": s, "fvu": [f], "kl": [k], "ce_gap": [k, k]} for (i, s, f), k in
              zip(rows, (0.1, 0.2, 0.3), strict=True)]                         # by KL depth is right
    found = sweep.by_measure({"one": {"layers": layers}, "two": {"layers": layers}})
    assert (found["fvu"]["pairs"], found["fvu"]["score_right"]) == (4, 4) and found["kl"]["score_right"] == 0
    assert found["kl"]["-layer"] == pytest.approx(1) and found["fvu"]["-layer"] == pytest.approx(-1)
    assert found["fvu"]["score"] == pytest.approx(0.5) and found["ce_gap"]["score"] == pytest.approx(-0.5)


def test_bridges_without_training_have_the_error_they_must(runs):
    lm = backbone.load(runs / "toy", torch.device("cpu"), torch.float32)
    net, info = denoiser.load(runs / "bridge", torch.device("cpu"))
    rows = data.Tokens(runs / "data", "val", 33).windows(6)[:, :-1]
    with torch.no_grad():
        net.mu_z.copy_(net.mu_c)
        net.sigma_z.copy_(net.sigma_c)
        found = sweep.untrained(lm, net, rows, rows, 0, 4)                     # layer 0: z = c, given the token
        assert found["identity"] == pytest.approx(0, abs=1e-9) and found["ridge"] < 0.02
        assert 0 < found["token mean"] < 0.5                                   # shrunk by one pseudo-count
        deeper = sweep.untrained(lm, net, rows, rows, 3, 4)
    assert deeper["ridge"] < deeper["identity"]


def test_altered_backbones(runs, tmp_path):
    whole = backbone.load(runs / "toy", torch.device("cpu"), torch.float32)
    for how in ("shuffle", "untrain", "middle"):
        sweep.altered(str(runs / "toy"), how, tmp_path / how, 1)
        other = backbone.load(tmp_path / how, torch.device("cpu"), torch.float32)
        same = [[torch.equal(a.mlp.down_proj.weight, b.mlp.down_proj.weight) for b in whole.blocks]
                for a in other.blocks]
        if how == "shuffle":
            assert sorted(map(tuple, same)) == sorted(tuple(i == j for j in range(4)) for i in range(4))
            assert not all(same[i][i] for i in range(4))
        else:
            assert [any(row) for row in same] == ([False] * 4 if how == "untrain" else [True, False, False, True])
        assert torch.equal(whole.model.get_input_embeddings().weight, other.model.get_input_embeddings().weight)
        assert backbone.identity(tmp_path / how) != backbone.identity(runs / "toy")


@slow
def test_the_sweep_runs(runs, tmp_path, monkeypatch, capsys):
    def in_process(work, jobs, threads=1):
        for _, (_, script, *argv) in work:
            if script.endswith("bridge.py"):
                argv += ["--preset", "tiny"]
            importlib.import_module(Path(script).stem).main([*argv, *(["--preset", "tiny"] if "geometry" in script
                                                                      else [])])
    monkeypatch.setattr(sweep, "execute", in_process)
    monkeypatch.setattr(sweep, "POOL", {"shuffled": "shuffle"})
    out = tmp_path / "s"
    argv = ["--model", f"{runs}/toy", "--out", str(out), "--seeds", "2", "--steps", "3", "--blocks", "1", "--pool",
            "--batch_size", "4", "--eval_batches", "4"]
    result = sweep.main(argv)
    toy = result["backbones"]["toy"]
    assert [r["layer"] for r in toy["layers"]] == [1, 2, 3] and all(len(r["fvu"]) == 2 for r in toy["layers"])
    assert set(result["pooled"]) >= {"score", "-layer", "score, curvature only"}
    assert len(result["pooled"]["score"]) == 2
    assert result["verdict"].startswith("on the model the score orders layers 1, 2, 3 by bridgeability with rho =")
    assert "| -layer |" in (out / "sweep.md").read_text() and (out / "sweep.png").stat().st_size > 5000
    assert "numbers" in fails(capsys, sweep.main, *argv[:2], "--out", tmp_path / "t", "--layers", "1,,3")
    assert "1 to 3" in fails(capsys, sweep.main, *argv[:2], "--out", tmp_path / "t", "--layers", "9")
    assert "toy.py" in fails(capsys, sweep.main, "--model", tmp_path / "none", "--out", tmp_path / "t")


# ---------------------------------------------------------------------------------------------------- evaluate.py
def test_questions_ask_for_what_they_say(runs):
    tokenizer = backbone.load_tokenizer(runs / "toy")
    for kind in ("brackets", "imports", "indentation"):
        asked = evaluate.questions(tokenizer, kind, 12, 0)
        assert len(asked) == 12 and asked == evaluate.questions(tokenizer, kind, 12, 0)
        for ids, right, wrong in asked:
            text, one, two = tokenizer.decode(ids[1:]), tokenizer.decode([right]), tokenizer.decode([wrong])
            assert one != two
            if kind == "imports":
                assert f"import {one.strip()}" in text and f"import {two.strip()}" not in text.replace(
                    f"import {one.strip()}", "")
            if kind == "brackets":
                assert one[0] == ("]" if "[" in text else ")")
            elif kind == "indentation":
                assert (" " in one) == ("return" not in text)           # "\n    " after the head of a function
    assert len({right for _, right, _ in evaluate.questions(tokenizer, "brackets", 12, 0)}) > 1


def test_bits_per_byte_and_choices_of_a_known_model(runs):
    lm = backbone.Backbone(tiny_model("llama"))
    rows = torch.randint(3, 64, (5, 12))
    nats = torch.nn.functional.cross_entropy(lm.model(rows).logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
    bits, error = evaluate.bits_per_byte(lm.model, rows, 4.0, 4, 0)
    assert bits == pytest.approx(nats.item() / np.log(2) / 4, rel=1e-5) and error is None
    twin, _ = masked.load_converted(runs / "repr_align" / "w0", torch.device("cpu"), torch.float32)
    bits, error = evaluate.bits_per_byte(twin, rows[:2, :2], 4.0, 4, 0)         # one token to guess: exact
    exact = masked.masked_ce(twin, rows[0, :2], torch.tensor([[False, True]])) + masked.masked_ce(
        twin, rows[1, :2], torch.tensor([[False, True]]))
    assert bits == pytest.approx(exact.item() / 2 / np.log(2) / 4, rel=1e-5) and error == pytest.approx(0, abs=1e-9)
    ids = rows[:1]
    assert torch.equal(evaluate.next_logits(lm.model, ids), lm.model(ids).logits[0, -1])
    student, _ = masked.load_converted(runs / "repr_align" / "w0", torch.device("cpu"), torch.float32)
    logits = evaluate.next_logits(student, ids)
    hidden = torch.cat([torch.zeros_like(ids, dtype=torch.bool), torch.ones(1, 1, dtype=torch.bool)], 1)
    for token in (5, 9):
        want = masked.masked_ce(student, torch.cat([ids[0], torch.tensor([token])]), hidden)
        assert -torch.log_softmax(logits, -1)[token].item() == pytest.approx(want.item(), rel=1e-4)


def test_the_verdict_is_what_the_numbers_say():
    def of(gap, rows):
        return {"nfe": {"1": {"ce_gap": gap, "fvu": 0.1, "ce_gap_rows": rows}}, "nfe_default": 1, "layer": 2}
    low, high = of(0.1, [0.1, 0.11, 0.09, 0.1]), of(0.3, [0.3, 0.31, 0.3, 0.29])
    assert "is ahead of" in report.verdict({"bridge": low, "regression": high})
    assert "is behind" in report.verdict({"bridge": high, "regression": low})
    assert "ties with" in report.verdict({"bridge": low, "regression": of(0.1, [0.09, 0.1, 0.11, 0.1])})
    assert "cannot be told from" in report.verdict({"bridge": of(0.1, [0.1]), "regression": of(0.2, [0.2])})


def test_flops_are_counted(runs):
    lm = backbone.load(runs / "toy", torch.device("cpu"), torch.float32)
    net, info = denoiser.load(runs / "bridge", torch.device("cpu"))
    layer = info["layer"]
    whole = evaluate.forward_flops(lm, None, 0, 0, 0)
    assert whole == 2 * (sum(p.numel() for p in lm.blocks.parameters()) + lm.V * lm.D)
    one, four = (evaluate.forward_flops(lm, net, n, layer, 10) for n in (1, 4))
    inside = sum(p.numel() for n, p in net.named_parameters() if p.ndim == 2 and not n.startswith("time"))
    assert (four - one) == 3 * (2 * inside + 4 * 10 * net.settings["W"] * net.settings["blocks"])
    assert evaluate.forward_flops(lm, None, 0, 0, 10) > whole


def test_peak_memory_counts_what_is_held_at_once():
    weight = torch.ones(1000)
    with evaluate.PeakBytes([weight]) as peak:
        a = weight * 2                                                         # 4,000 bytes
        b = a.view(10, 100) + 1                                                # and as many again; the view is free
        del a
        c = weight[:500].clone() + b[0, 0]                                     # b, the clone and the sum: 8,000
        del b, c
    assert peak.most == 8000 and peak.now == 0


def test_evaluate_refuses_what_it_cannot_measure(runs, tmp_path, capsys):
    argv = ["--runs", runs, "--out", tmp_path / "e"]
    assert "no such file" in fails(capsys, evaluate.main, *argv, "--text", tmp_path / "none.txt", "--texts", "2",
                                   "--calls", "4", "--cloze", "2")
    assert "at least 2" in fails(capsys, evaluate.main, *argv, "--texts", "1")
    (tmp_path / "short.txt").write_text("import os")
    assert "128 tokens" in fails(capsys, evaluate.main, *argv, "--text", tmp_path / "short.txt")
    assert "positions" in fails(capsys, evaluate.main, *argv, "--new", "400")
    assert not (tmp_path / "e").exists()
    foreign = tmp_path / "r"
    shutil.copytree(runs, foreign)
    old = run.read_json(foreign / "repr_align" / "w0" / "result.json")
    run.write_json(foreign / "repr_align" / "w0" / "result.json", {**old, "steps": 21})
    assert "differ in steps" in fails(capsys, evaluate.main, "--runs", foreign, "--out", tmp_path / "e")
    if importlib.util.find_spec("lm_eval") is None:
        assert "pip install 'lm-eval" in fails(capsys, evaluate.main, *argv, "--harness", "lambada_openai")
