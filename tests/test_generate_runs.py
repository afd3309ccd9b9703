"""GENERATE: runs of generate.py."""
import json
import shutil

import pytest
import torch
from conftest import fails

import generate


@pytest.fixture(scope="module")
def argv(runs, text):
    """A tiny run with one bridge and one converted model."""
    return ["--preset", "tiny", "--data", str(text), "--texts", "3", "--bridges",
            f"{runs}/generator", "--converted", f"{runs}/convert/w0", "--out"]


def test_the_stage_runs(runs, text, capsys, monkeypatch):
    out = runs / "generate"
    result = json.loads((out / "result.json").read_text())
    rows = {row["method"]: row for row in result["rows"]}
    layer = json.loads((runs / "generator" / "result.json").read_text())["layer"]
    ours = rows[f"hidden-state diffusion, layer {layer}"]
    assert list(rows)[:5] == ["unigrams", "AR", "Jacobi", "lazy Jacobi", "converted model, two-way"]
    assert len({tuple(row) for row in rows.values()}) == 1              # the same keys everywhere
    assert ours["layer"] == layer and ours["seed"] == 0
    assert ours["calls"] == 4                                               # 2, and 1 + 1 to refine
    assert all(row["calls"] <= ours["calls"] for name, row in rows.items() if name != "AR")
    assert rows["AR"]["calls"] == 12 and rows["AR"]["layer"] is None
    assert rows["converted model, two-way"]["folder"] == f"{runs}/convert/w10"
    for row in rows.values():
        for point in row["frontier"]:
            assert point["gen_ppl"] > 1 and 0 < point["entropy"] < 2.5
        assert row["matched"] == generate.at_entropy(row["frontier"], result["real"]["entropy"])
    assert (out / "generation.png").stat().st_size > 5000
    assert all(len(row["texts"]) == 4 for row in rows.values())
    # The same command prints the finished result, also where a fork has added a method.
    capsys.readouterr()
    monkeypatch.setattr(generate, "METHODS", {"new": None})
    argv = ["--preset", "tiny", "--data", str(text), "--bridges", f"{runs}/generator",
            "--converted", f"{runs}/convert/w10", "--out", str(out)]
    assert generate.main(argv) == result
    assert generate.table(result) in capsys.readouterr().out


def test_a_method_is_a_function_and_an_entry(argv, tmp_path, monkeypatch):
    """Nobody is shown the text that is to be written, and it is judged like real text."""
    prompts = []

    def repeat(cx, lm, ids, temperature):
        prompts.append(ids)
        return torch.cat([ids, ids[:, :cx.cfg.new]], 1), 0
    monkeypatch.setattr(generate, "METHODS", {"prompt again": repeat})
    result = generate.main([*argv, str(tmp_path / "r")])
    assert [row["method"] for row in result["rows"]] == ["prompt again"]
    assert {ids.shape for ids in prompts} == {(3, 16), (1, 16)}


def test_refusals(runs, argv, text, tmp_path, capsys):
    argv = [*argv, str(tmp_path / "x")]
    message = fails(capsys, generate.main, *argv, "--bridges", f"{runs}/bridge")
    assert "trained with hidden tokens" in message and "bridge.py --generate" in message
    for folder in ("toy", "convert/w0", "hybrid"):              # no bridge, or none that generates
        message = fails(capsys, generate.main, *argv, "--bridges", f"{runs}/{folder}")
        assert "hidden tokens" in message or "several backbones" in message
    assert "--bridges is empty" in fails(capsys, generate.main, *argv, "--bridges")
    old = shutil.copytree(runs / "convert" / "w0", tmp_path / "old")
    (old / "config.json").write_text(json.dumps({"dihal": {"config": {}}}))
    message = fails(capsys, generate.main, *argv, "--converted", str(old))
    assert "second edition" in message
    other = shutil.copytree(runs / "generator", tmp_path / "other")
    result = json.loads((other / "result.json").read_text())
    (other / "result.json").write_text(json.dumps({**result, "base": "another"}))
    message = fails(capsys, generate.main, *argv, "--bridges", f"{runs}/generator", str(other))
    assert "several backbones" in message
    message = fails(capsys, generate.main, *argv, "--converted", tmp_path / "none")
    assert "result.json is missing" in message
    assert "positions" in fails(capsys, generate.main, *argv, "--new", "99999")
    assert not (tmp_path / "x").exists()                                    # refused before a write
