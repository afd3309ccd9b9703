"""SWEEP: the statistics by hand, and the study itself."""
import json

import pytest
from conftest import fails, slow

from studies import sweep


def test_correlation_by_hand():
    """Three layers, two seeds. rho of the mean; depth is better in the second seed only."""
    errors = [[0.1, 0.3], [0.2, 0.2], [0.4, 0.5]]           # means 0.2, 0.2, 0.45
    row = sweep.correlation([3.0, 2.0, 1.0], [2.0, 3.0, 1.0], errors)
    assert row["rho"] == pytest.approx(3 ** 0.5 / 2)        # ranks 1.5, 1.5, 3 against 1, 2, 3
    assert row["p"] == pytest.approx(2 / 6)                 # of 6 orders two are as good
    assert row["minus_depth"] == pytest.approx(0)
    assert row["half"] == pytest.approx(12.71 * 0.5)        # t(1) x sd / sqrt(2) of 0.5 and -0.5
    errors = [[0.1, 0.3], [0.2, 0.1], [0.4, 0.2]]           # the centre is that of the interval
    row = sweep.correlation([3.0, 2.0, 1.0], [2.0, 3.0, 1.0], errors)
    assert row["minus_depth"] == pytest.approx((1.0 - 0.5 + -0.5 - 0.5) / 2)
    errors = [[0.1, 0.3], [0.2, 0.2], [0.4, 0.5]]
    one = sweep.correlation([3.0, 2.0, 1.0], [2.0, 3.0, 1.0], [[e] for e, _ in errors])
    assert one["rho"] == pytest.approx(1) and one["half"] is None
    assert one["p"] == pytest.approx(1 / 6)


def test_predictors_are_the_score_its_variants_and_the_rivals():
    located = {"variants": [{"name": "default", "scores": [1, 2]},
                            {"name": "transform log", "scores": [3, 4]}],
               "trivial": [{"name": "-layer", "scores": [-1, -2]}]}
    assert sweep.predictors(located, [2]) == {"default": [2], "transform log": [4], "-layer": [-2]}
    assert sweep.predictors(located, [2, 1])["default"] == [2, 1]


@slow
def test_the_study_runs_and_resumes(runs, tmp_path, text, capsys):
    argv = ["--preset", "tiny", "--model", f"{runs}/toy", "--data", str(text), "--out",
            f"{tmp_path}/sweep", "--layers", "3", "1", "3", "--seeds", "1", "--steps", "3",
            "--depth", "1"]
    result = sweep.main(argv)
    assert [row["layer"] for row in result["layers"]] == [1, 3]
    for row in result["layers"]:
        assert len(row["diffusion"]["kl"]) == len(row["regression"]["fvu"]) == 1
        assert row[sweep.TABLE]["kl"][0] > 0 and 0 < row[sweep.TABLE]["fvu"][0] < 1.5
    one = json.loads((tmp_path / "sweep" / "l3_regression_s0" / "result.json").read_text())
    assert result["layers"][1]["regression"]["kl"][0] == one["nfe"]["1"]["kl"]
    depth = [row for row in result["correlations"] if row["predictor"] == "-layer"]
    assert len(depth) == 4 and all(row["minus_depth"] == 0 for row in depth)
    assert (tmp_path / "sweep" / "sweep.png").stat().st_size > 5000
    capsys.readouterr()
    (tmp_path / "sweep" / "result.json").unlink()           # killed: finished bridges stay
    again = sweep.main(argv)
    assert again["correlations"] == result["correlations"]
    assert "step 0" not in capsys.readouterr().out
    another = fails(capsys, sweep.main, "--preset", "toy", *argv[2:])
    assert "preset = tiny there, toy here" in another
    other = ["--model", runs / "toy", "--out", tmp_path / "other"]
    assert "1 to 3" in fails(capsys, sweep.main, *other, "--layers", "1", "4")
