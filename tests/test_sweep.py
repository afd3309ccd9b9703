"""sweep.py: statistics with known answers, bridges without training, who counts, the sweep on a tiny backbone."""
import importlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, fails, slow

import data
from core import backbone, denoiser, measure, run, stats
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
    trained, no_table, flat = sweep.RULES
    scores, fvu = [4., 3., 2., 1.], [0.1, 0.2, 0.3, 0.4]
    assert backbone_of(scores, fvu)["excluded"] == []
    assert backbone_of(scores, fvu, table=0.15)["excluded"] == [no_table]      # below it at one of four layers
    assert backbone_of(scores, fvu, table=0.25)["excluded"] == []              # at two of four
    assert backbone_of(scores, [0.1, 0.101, 0.102, 0.1])["excluded"] == [flat]
    assert backbone_of(scores, [0.1, 0.103, 0.1, 0.1])["excluded"] == []       # two values that are 3% apart
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


def test_bridges_without_training_have_the_error_they_must(runs, monkeypatch):
    monkeypatch.setattr(sweep, "DECODED", ("identity", "token mean"))
    lm = backbone.load(runs / "toy", torch.device("cpu"), torch.float32)
    nets = {layer: denoiser.load(runs / "bridge", torch.device("cpu"))[0] for layer in (0, 3)}
    held_out = data.Tokens(runs / "data", "val", 33).windows(6)
    with torch.no_grad():
        for net in nets.values():
            net.mu_z.copy_(net.mu_c)
            net.sigma_z.copy_(net.sigma_c)
    found = sweep.untrained(lm, nets, held_out[:, :-1].split(4), held_out)     # layer 0: z = c, given the token
    exact = found[0]["identity"]
    assert list(exact.values()) == pytest.approx([0, 0, 0], abs=1e-6) and found[0]["ridge"]["fvu"] < 0.02
    assert 0 < found[0]["token mean"]["fvu"] < 0.5                             # shrunk by one pseudo-count
    assert found[0]["token mean"]["kl"] > 1e-4 and set(found[0]["ridge"]) == {"fvu"}
    assert found[3]["ridge"]["fvu"] < found[3]["identity"]["fvu"]
    more = sweep.fit(lm, nets, [held_out[:, :-1]] * 50)[0]                     # often enough, and nothing is shrunk
    known = held_out[:1, sweep.SKIP:-1]
    assert torch.allclose(more.mean[known], nets[0].standard_c(lm.embed(known)), atol=0.1)
    some, whole = (sweep.fit(lm, nets, held_out[:, :-1].split(n))[3] for n in (1, 6))     # sums, however they are cut
    assert torch.allclose(some.mean, whole.mean, atol=1e-5) and torch.allclose(some.weights, whole.weights, atol=1e-5)


def test_untrained_errors_are_those_of_a_bridge(runs, monkeypatch):
    monkeypatch.setattr(sweep, "DECODED", ("identity",))
    class Identity(torch.nn.Module):
        """h[0] as the regression bridge that it is."""

        def __init__(self, net):
            super().__init__()
            self.settings = {**net.settings, "objective": "regression"}
            self.net, self.standard_z, self.standard_c, self.hidden = net, net.standard_z, net.standard_c, net.hidden

        def forward(self, x, c, t, *_, **__):
            guess = sweep.UNTRAINED["identity"](self, c, None)
            return torch.cat([self.z[:, :sweep.SKIP], guess[:, sweep.SKIP:]], 1)          # true first positions
    lm = backbone.load(runs / "toy", torch.device("cpu"), torch.float32)
    net, info = denoiser.load(runs / "bridge", torch.device("cpu"))
    rows, stand_in = data.Tokens(runs / "data", "val", 33).windows(6), Identity(net)
    stand_in.z = net.standard_z(lm.through(lm.embed(rows[:, :-1]), 0, info["layer"]))
    how = SimpleNamespace(skip=sweep.SKIP, noise_seeds=1, sampler="euler", shift=1.0)
    theirs = measure.measure(lm, stand_in, rows, info["layer"], (1,), how)[0]["1"]
    mine = sweep.untrained(lm, {info["layer"]: net}, [rows[:, :-1]], rows)[info["layer"]]["identity"]
    assert mine == pytest.approx({key: theirs[key] for key in sweep.ERRORS}, rel=1e-4)


# ------------------------------------------------------------------------------------------------------ the study
@slow
def test_the_sweep_runs(runs, tmp_path, monkeypatch, capsys):
    started = []

    def in_process(work, jobs, threads=1):
        for _, (_, script, *argv) in work:
            assert Path(script).parent == ROOT and Path(script).exists()
            started.append(script)
            importlib.import_module(Path(script).stem).main([*argv, "--preset", "tiny"])
    monkeypatch.setattr(sweep, "execute", in_process)
    monkeypatch.setattr(sweep, "POOL", {"again": lambda cfg, home: (runs / "toy", runs / "data")})
    out = tmp_path / "s"
    argv = ["--model", f"{runs}/toy", "--out", str(out), "--seeds", "2", "--steps", "3", "--blocks", "1", "--pool",
            "--batch_size", "4", "--eval_batches", "4"]
    result = sweep.main(argv)
    toy, text = result["backbones"]["toy"], (out / "section.md").read_text()
    assert [r["layer"] for r in toy["layers"]] == [1, 2, 3] and all(len(r["fvu"]) == 2 for r in toy["layers"])
    assert set(toy["correlations"]) >= {"score", "-layer", "score, curvature only"}
    assert result["kept"] == [] and all(len(b["excluded"]) >= 1 for b in result["backbones"].values())
    assert text.startswith("## Does the score foretell bridgeability?\n") and text == run.read_section(out)
    assert "| -layer |" in text and "![" in text and "**again**: left out, not as 300" in text
    assert all(len(value) <= 60 for _, value in result["headline"]) and len(result["headline"]) == 2
    assert (out / "sweep.png").stat().st_size > 5000
    fewer = {**result, "backbones": {"toy": toy}}                              # an older result, a newer POOL
    assert "**again**" not in sweep.section(fewer)
    count = len(started)
    assert sweep.main(argv)["backbones"] == result["backbones"] and len(started) == count      # nothing is started
    monkeypatch.setattr(sweep, "POOL", {**sweep.POOL, "untrained": lambda cfg, home: (runs / "toy", runs / "data")})
    assert set(sweep.main(argv)["backbones"]) == {"toy", "shuffled", "untrained"}          # a new entry: only it is run
    assert "numbers" in fails(capsys, sweep.main, *argv[:2], "--out", tmp_path / "t", "--layers", "1,,3")
    assert "1 to 3" in fails(capsys, sweep.main, *argv[:2], "--out", tmp_path / "t", "--layers", "9")
    assert "toy.py" in fails(capsys, sweep.main, "--model", tmp_path / "none", "--out", tmp_path / "t")
