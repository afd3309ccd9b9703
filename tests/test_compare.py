"""studies/compare.py, from results whose answer is known."""
import shutil

from conftest import fails

from core.run import write_json
from studies import compare


def finish(folder, result, base="b", **config):
    folder.mkdir(parents=True)
    record = {"edition": 3, "config": {"out": str(folder), **config}, "identity": {"base": base}}
    write_json(folder / "config.json", {"dihal": record})
    write_json(folder / "result.json", result)


def arms(tmp_path):
    """Three seeds each: w = 10 is better by 0.1, w = 1 is equal up to noise; one seed of w = 2."""
    bounds = {0: (5.0, 5.1, 5.2), 10: (4.9, 5.01, 5.09), 1: (5.01, 5.09, 5.2), 2: (4.0,)}
    for w, values in bounds.items():
        for seed, bound in enumerate(values):
            finish(tmp_path / f"w{w}_{seed}", {"bound": [bound, 0.01], "val_loss": 2 * bound},
                   seed=seed, align_weight=w)
    return [str(tmp_path / f"w{w}_{seed}") for w in bounds for seed in range(len(bounds[w]))]


def rows(text):
    cells = [line.strip("| ").split(" | ") for line in text.splitlines()]
    return {row[0]: row for row in cells}


def test_variants_over_seeds(tmp_path):
    text = compare.main([*arms(tmp_path), "--keys", "bound"])
    found = rows(text)
    assert found["variant"] == ["variant", "runs", "bound", "bound against align_weight 0"]
    assert found["align_weight 0"][1:] == ["3", "5.1000 +- 0.1000", "-"]
    assert found["align_weight 10"][3].startswith("better by 0.1 (95% [-0.125, -0.0752], 3 seeds)")
    assert found["align_weight 1"][3].startswith("not known (95%")
    assert found["align_weight 2"][3] == "not known (-1, n = 1)"


def test_a_copy_of_a_folder_is_no_other_seed(tmp_path):
    runs = arms(tmp_path)
    shutil.copytree(tmp_path / "w2_0", tmp_path / "copy")
    found = rows(compare.main([*runs, str(tmp_path / "copy"), f"{tmp_path}/w2_0/"]))
    assert found["align_weight 2"][1:] == ["1", "4.0000", "not known (-1, n = 1)"]


def test_another_rival_and_the_keys_of_the_stage(tmp_path):
    runs = [f"{folder}/" for folder in arms(tmp_path)]          # as a shell completes them
    text = compare.main([*runs, "--against", str(tmp_path / "w10_1"), "--margin", "9"])
    found = rows(text)
    assert found["align_weight 10"][3] == "-" and found["align_weight 0"][3].startswith("tie")
    assert found["variant"][2::2] == ["bound"]


def test_bridges_are_compared_at_their_default_number_of_calls(tmp_path):
    for seed in (0, 1):
        for objective, n in (("diffusion", 4), ("regression", 1)):
            numbers = {"kl": 0.1 * n + 0.01 * seed * n, "ce_gap": 0.1, "fvu": 0.2}
            finish(tmp_path / f"{objective}_{seed}", {"nfe": {str(n): numbers}, "nfe_default": n},
                   seed=seed, objective=objective)
    found = rows(compare.main(sorted(map(str, tmp_path.iterdir()))))
    assert found["objective diffusion"][2] == "0.4200 +- 0.0283"
    assert found["objective regression"][3].startswith("better by 0.3")


def test_seeds_of_two_base_models_are_pairs_of_their_own(tmp_path):
    for base in "ab":
        for w in (0, 1):
            finish(tmp_path / f"{base}{w}", {"bound": [w + 1.0 + 0.01 * w * (base == "a")]}, base=base, seed=0, w=w)
    found = rows(compare.main([*map(str, sorted(tmp_path.iterdir())), "--keys", "bound"]))
    assert found["w 1"][1] == "2" and found["w 1"][3].startswith("worse by 1 (95%")


def test_refusals(tmp_path, capsys):
    runs = arms(tmp_path)
    assert "holds no number agree" in fails(capsys, compare.main, *runs, "--keys", "agree")
    assert "--against elsewhere is unknown" in fails(capsys, compare.main, *runs, "--against", "elsewhere")
    write_json(tmp_path / "w0_0" / "config.json", {"dihal": {"config": {}}})
    assert "by the second edition" in fails(capsys, compare.main, *runs)
    (tmp_path / "empty").mkdir()
    assert "finish that run first" in fails(capsys, compare.main, tmp_path / "empty")


def test_more_solved_is_better():
    runs = [{"pair": (seed, ""), "folder": "x", "result": {"tasks": {"a": {"solved": {"AR": 0.5 + 0.1 * seed}}}}}
            for seed in range(3)]
    better = [{**run, "result": {"tasks": {"a": {"solved": {"AR": 0.8 + 0.11 * run["pair"][0]}}}}} for run in runs]
    assert compare.difference(better, runs, "tasks.a.solved.AR", 0.0).startswith("better")
