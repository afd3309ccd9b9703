"""sweep.py: statistics with known answers, bridges without training, who counts, the sweep on a tiny backbone."""
import importlib
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, fails, slow

import data
from core import regret, run, stats
from studies import sweep


# ----------------------------------------------------------------------------------------------------- statistics
def test_exact_permutation_p():
    assert stats.permutation_p([1, 2, 3, 4, 5], [2, 4, 6, 8, 10]) == pytest.approx(1 / 120)
    assert stats.permutation_p([1, 2, 3, 4], [4, 3, 2, 1]) == 1
    a, b = list(range(10)), [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
    assert 0 < stats.permutation_p(a, b) < 0.2                                # drawn, not enumerated
    assert stats.permutation_p(range(12), range(12)) == pytest.approx(1 / 20001)


def geometry_of(scores, noise=0.01):
    gen = np.random.default_rng(0)
    return {"replicates": (np.array(scores) + noise * gen.standard_normal((200, len(scores)))).tolist(),
            "trivial": [{"name": "-layer", "values": [-float(i) for i in range(len(scores))]}],
            "variants": [{"name": "default", "scores": scores}, {"name": "flipped", "scores": [-s for s in scores]}]}


def rows_of(scores, fvu, table=1.0, layers=None):
    """Rows of a backbone: one score and one FVU per seed (seeds, C) a layer; KL and CE gap as the FVU."""
    errors = np.array(fvu).T.tolist()
    return [{"layer": i, "score": s, **dict.fromkeys(sweep.ERRORS, f),
             "untrained": {"token mean": dict.fromkeys(sweep.ERRORS, table)}}
            for i, s, f in zip(layers or range(1, 1 + len(scores)), scores, errors, strict=True)]


def backbone_of(scores, fvu, **how):
    """The entry of a backbone in the result, as collect() makes it."""
    rows = rows_of(scores, [fvu], **how)
    b = {"layers": rows, "trained_steps": 500, "predictors": {"score": scores, "-layer": [-r["layer"] for r in rows]}}
    return {**b, "excluded": [why for why, holds in sweep.RULES.items() if holds(b)]}


def test_a_predictor_that_is_right_wins_over_one_that_is_not():
    fvu = np.array([[0.1, 0.5, 0.2, 0.4, 0.3], [0.11, 0.52, 0.19, 0.41, 0.33]])
    scores = (-fvu.mean(0)).tolist()
    found = sweep.correlations(geometry_of(scores), rows_of(scores, fvu))
    score, depth, flipped = (found[name] for name in ("score", "-layer", "score, flipped"))
    assert score["rho"] == pytest.approx(1) and score["interval"][0] > 0.8 and score["p"] == pytest.approx(1 / 120)
    assert score["by_seed"] == pytest.approx([1, 1]) and flipped["rho"] == pytest.approx(-1)
    assert depth["score_minus"][0] > 0 and depth["rho"] < 0.5
    assert depth["score_minus"][1] == pytest.approx(1 - depth["rho"])
    mixed = np.array([[0.1, 0.2, 0.3], [0.3, 0.2, 0.1]])                       # two seeds that disagree
    seeds = sweep.correlations(geometry_of([3., 2., 1.]), rows_of([3., 2., 1.], mixed))["-layer"]
    assert seeds["interval"] == pytest.approx([-1, 1]) and seeds["by_seed"] == pytest.approx([1, -1])
    noisy = geometry_of([5., 4., 3., 2., 1.], 5.0)
    some = sweep.correlations(noisy, rows_of([4., 2., 1.], fvu[:, [1, 3, 4]], layers=[2, 4, 5]))["score"]
    assert some["interval"][0] < -0.4 < some["interval"][1]                    # a score that is all noise says nothing


def test_the_best_of_many_predictors_is_corrected_for_their_number():
    gen, fvu = np.random.default_rng(5), np.linspace(0.1, 0.7, 7)
    b = backbone_of((-fvu).tolist(), fvu)
    alone = {**b, "predictors": {"score": b["predictors"]["score"]}}
    b["predictors"] |= {f"random {i}": gen.permutation(7).tolist() for i in range(40)}
    one, many = sweep.corrected([alone]), sweep.corrected([b])
    assert one["score"]["rho"] == pytest.approx(1) and one["score"]["p"] < 0.002
    assert many["score"]["p"] == pytest.approx(41 / 5040, abs=0.004)           # any of 41 orders, of 7! each
    lucky = max((n for n in many if "random" in n), key=lambda n: many[n]["rho"])
    assert many[lucky]["p"] > 0.1 and stats.permutation_p(b["predictors"][lucky], -fvu) < 0.05   # chance, and seen so
    both = sweep.corrected([b, backbone_of((-fvu).tolist(), fvu)])             # only what every backbone has
    assert set(both) == {"score", "-layer"} and both["score"]["p"] < 1e-3


def test_degenerate_backbones_are_left_out_by_rule():
    trained, no_table = sweep.RULES
    scores, fvu = [4., 3., 2., 1.], [0.1, 0.2, 0.3, 0.4]
    assert backbone_of(scores, fvu)["excluded"] == []
    assert backbone_of(scores, fvu, table=0.15)["excluded"] == [no_table]      # below it at one of four layers
    assert backbone_of(scores, fvu, table=0.25)["excluded"] == []              # at two of four
    young = {**backbone_of(scores, fvu), "trained_steps": 299}
    assert [why for why, holds in sweep.RULES.items() if holds(young)] == [trained]


def test_the_score_against_depth_over_backbones():
    fvu, right, wrong = [0.1, 0.2, 0.3, 0.4], [4., 3., 2., 1.], [1., 2., 3., 4.]
    same = {str(i): backbone_of(right, fvu) for i in range(5)}
    found = sweep.against_depth(same, "fvu")
    assert found["verdict"].startswith("ties within 0.1 rho") and found["median"] == found["depth"] - 1 == 0
    young = {**same, "young": backbone_of(right[::-1], fvu[::-1])}             # one backbone, where deeper is better
    found = sweep.against_depth(young, "kl")
    assert found["gaps"]["young"] == pytest.approx(2) and found["rho"] - found["depth"] == pytest.approx(1 / 3)
    assert found["median"] == 0 and found["verdict"].startswith("not known (95%")        # the outlier decides nothing
    lost = sweep.against_depth({str(i): backbone_of(wrong, fvu) for i in range(3)}, "fvu")
    assert lost["verdict"].startswith("behind by 2 rho") and lost["interval"] == pytest.approx([-2, -2])
    assert sweep.against_depth({"one": backbone_of(wrong, fvu)}, "fvu")["verdict"].startswith("not known (n = 1")


def test_the_manual_is_a_corpus(tmp_path):
    folder = sweep.manual(tmp_path / "text")
    assert len(list(folder.glob("*.txt"))) > 50
    documents = list(data.documents(data.resolve(str(folder))))
    held = [data.held_out(d, i == 0) for i, d in enumerate(documents)]
    assert 1 < sum(held) < len(held) / 3 and sum(map(len, documents)) > 300_000


CURVES = {1: {10: 5., 20: 3., 40: 1.}, 2: {10: 3., 20: 2., 40: 2.}, 3: {10: 4., 20: 4., 40: 4.},
          4: {10: 2., 20: 5., 40: 5.}}


def test_halving_by_hand():
    kl = regret.WORTH["KL"]
    # after 10: 4 and 2 stay (1 and 3 cost 10 each); after 20: 2 (4 cost 20); 2 trains to the end
    assert regret.halving(CURVES, [1, 2, 3, 4], 10, kl) == (2, 10 + 10 + 20 + 40)
    assert regret.halving(CURVES, [1, 2, 3, 4], 20, kl) == (1, 20 + 20 + 40 + 40)      # the better end is seen
    assert regret.halving(CURVES, [1, 2, 3, 4], 40, kl) == (1, 4 * 40)                 # all of them, whole
    assert regret.halving(CURVES, [3], 10, kl) == (3, 40)
    assert regret.halving(CURVES, [1, 2, 3], 10, kl) == (2, 10 + 10 + 40)
    assert regret.halving(CURVES, [1, 4], 40, regret.WORTH["KL per replaced block"]) == (1, 80)
    assert regret.halving(CURVES, [2, 3], 20, regret.WORTH["KL per replaced block"]) == (2, 60)     # 1 against 4 / 3


def test_regret_by_hand():
    kl, choosers = {1: .1, 2: .2, 3: .4, 4: .5}, {"depth": {1: 4, 2: 3, 3: 2, 4: 1}, "bad": {1: 1, 2: 2, 3: 3, 4: 4}}
    found = regret.regrets(CURVES, kl, choosers, regret.WORTH["KL"])
    assert found["random layer"] == [[1, pytest.approx(.2)]] and found["all layers"] == [[4, 0]]
    assert found["depth"] == [[1, 0]] and found["bad"] == [[1, pytest.approx(.4)]]
    assert found["halving"] == [[2, pytest.approx(.1)], [3, 0], [4, 0]]
    assert found["bad's half, halving"] == [[1.25, pytest.approx(.4)], [1.5, pytest.approx(.3)], [2, pytest.approx(.3)]]
    assert found["depth's half, halving"] == [[1.25, pytest.approx(.1)], [1.5, pytest.approx(.1)], [2, 0]]
    per_block = regret.regrets(CURVES, kl, choosers, regret.WORTH["KL per replaced block"])   # .1 .1 .133 .125
    assert per_block["bad"] == [[1, pytest.approx(.025)]] and per_block["depth"] == [[1, 0]]


def test_worth_of_locate_from_logs():
    """Two seeds whose best layers differ; losses of a window are weighted by their counts, validation is skipped."""
    def log(*losses):
        return [*(json.dumps({"step": 10 * 2 ** i, "loss": 9, "loss_by_t": [loss, 7.0], "count_by_t": [4, 0]})
                  for i, loss in enumerate(losses)), '{"step": 20, "val_loss": 0.5}']
    assert regret.losses_at(['{"step": 5, "loss_by_t": [1.0, 4.0], "count_by_t": [2, 1]}']) == {5: 2.0}
    assert regret.losses_at(log(3., 2.)) == {10: 3., 20: 2.}
    rows = [{"layer": 2, "kl": [.1, .3]}, {"layer": 5, "kl": [.2, .2]}]
    logs = {(2, 0): log(1, 1), (5, 0): log(2, 2, 2), (2, 1): log(1, 3), (5, 1): log(2, 2)}
    found = regret.worth_of_locate(rows, {"score": [1., 2.], "-layer": [-2, -5]}, logs)["KL"]
    assert found["score"] == [[1, pytest.approx(.05), pytest.approx(.05)]]
    assert found["depth"] == [[1, pytest.approx(.05), pytest.approx(.05)]] and "conditional (ridge)" not in found
    assert found["halving"] == [[1.5, pytest.approx(.05), pytest.approx(.05)], [2, 0, 0]]


# ------------------------------------------------------------------------------------------------------ the study
@slow
def test_the_sweep_runs(runs, tmp_path, monkeypatch, capsys):
    started = []

    def in_process(work, jobs, threads=1):
        for _, (_, script, *argv) in work:
            assert Path(script).parent == ROOT and Path(script).exists()
            started.append(script)
            if "bridge" in script and "/toy/" in argv[-1]:                       # one pass has been made for all layers
                assert all((out / f"toy/states{seed}/h{layer}").exists() for seed in (0, 1) for layer in (1, 2, 3))
            importlib.import_module(Path(script).stem).main([*argv, "--preset", "tiny"])
    monkeypatch.setattr(sweep, "execute", in_process)
    monkeypatch.setattr(sweep, "POOL", {"again": lambda cfg, home: (runs / "toy", runs / "data")})
    out = tmp_path / "s"
    argv = ["--model", f"{runs}/toy", "--out", str(out), "--seeds", "2", "--steps", "3", "--blocks", "1", "--pool",
            "--batch_size", "4", "--eval_batches", "4", "--cache_states"]
    result = sweep.main(argv)
    toy, text = result["backbones"]["toy"], (out / "section.md").read_text()
    assert [r["layer"] for r in toy["layers"]] == [1, 2, 3] and all(len(r["fvu"]) == 2 for r in toy["layers"])
    assert set(toy["correlations"]) >= {"score", "-layer", "score, curvature only", "-FVU, ridge", "-FVU, token mean",
                                        "-FVU, one-block probe", "score of the residual", "curvature of the residual"}
    assert toy["predictors"]["-FVU, ridge"] == [-r["untrained"]["ridge"]["fvu"] for r in toy["layers"]]
    assert {"score", "-FVU, ridge"} <= set(result["against_depth"]) and "| -FVU, ridge | KL |" in text
    assert result["kept"] == [] and all(len(b["excluded"]) >= 1 for b in result["backbones"].values())
    assert text.startswith("## Does the score foretell bridgeability?\n") and text == run.read_section(out)
    assert "| -layer |" in text and "![" in text and "**again**: left out, not as 300" in text
    assert all(len(value) <= 60 for _, value in result["headline"]) and len(result["headline"]) == 2
    assert (out / "sweep.png").stat().st_size > 5000
    assert toy["regret"]["KL"]["all layers"] == [[3, 0, 0]] and "| toy | KL | halving |" in text
    assert "(seeds: 2; 3 steps of 4 x 128, 1 blocks; 4 held-out sequences)" in text
    fewer = {**result, "backbones": {"toy": toy}}                              # an older result, a newer POOL
    assert "**again**" not in sweep.section(fewer)
    count = len(started)
    assert sweep.main(argv)["backbones"] == result["backbones"] and len(started) == count      # nothing is started
    monkeypatch.setattr(sweep, "POOL", {**sweep.POOL, "untrained": lambda cfg, home: (runs / "toy", runs / "data")})
    assert set(sweep.main(argv)["backbones"]) == {"toy", "again", "untrained"}          # a new entry: only it is run
    other = tmp_path / "other.json"                                            # a sweep published elsewhere
    far = {key: value for key, value in toy.items() if key != "budget"}        # as an older sweep left it
    how = {"steps": 7, "batch_size": 2, "blocks": 0}
    other.write_text(json.dumps({"sweep": {"backbones": {"far": far}, **how}}))
    more = sweep.main([*argv, "--beside", str(other)])
    assert set(more["backbones"]) == {"toy", "again", "untrained", "far"} and len(started) > count
    begun, a = len(started), more["against_depth"]["score"]["kl"]
    assert set(a["gaps"]) == set(more["backbones"])
    assert sweep.main([*argv, "--beside", str(other)])["backbones"] == more["backbones"] and len(started) == begun
    assert "7 steps of 2 x 128, as many blocks" in sweep.section(more)
    for content in ({"sweep": None}, {"layers": []}, {"sweep": {"backbones": {"toy": far}, **how}}):
        (tmp_path / "wrong.json").write_text(json.dumps(content))              # nothing, another stage's, the same name
        assert "holds no sweep of other backbones" in fails(capsys, sweep.main, *argv[:2], "--out", tmp_path / "u",
                                                            "--beside", tmp_path / "wrong.json")
    assert not (tmp_path / "u").exists()
    assert "that holds one" in fails(capsys, sweep.main, *argv, "--beside", tmp_path / "none.json")
    assert "numbers" in fails(capsys, sweep.main, *argv[:2], "--out", tmp_path / "t", "--layers", "1,,3")
    assert "1 to 3" in fails(capsys, sweep.main, *argv[:2], "--out", tmp_path / "t", "--layers", "9")
    assert "toy.py" in fails(capsys, sweep.main, "--model", tmp_path / "none", "--out", tmp_path / "t")


def test_a_predictor_against_depth():
    right = backbone_of([2., 4., 3., 1.], [0.3, 0.1, 0.2, 0.4])
    found = sweep.against_depth({"a": right, "b": right}, "kl", "-layer")
    assert found["gaps"] == {"a": 0, "b": 0} and found["depth"] == pytest.approx(0.4)
