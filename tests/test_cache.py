"""core/cache.py: states on disk change no weight; what is of something else, cut short or damaged is refused."""
import shutil
from pathlib import Path

import pytest
import torch
from conftest import fails
from safetensors.torch import load_file

import bridge
from core import cache
from core.run import read_json


@pytest.fixture
def argv(runs, text):
    return ["--preset", "tiny", "--model", f"{runs}/toy", "--data", str(text), "--steps", "6", "--eval_batches", "2"]


def weights(folder):
    return load_file(Path(folder) / "bridge.safetensors")


def test_the_weights_are_those_without_a_cache(argv, tmp_path, monkeypatch):
    argv += ["--head_start", "tokens", "--calibration", "20"]
    monkeypatch.setattr(cache, "CHUNK", 8)                                    # several files of either kind
    for layer in ("1", "3"):
        bridge.main([*argv, "--layer", layer, "--out", f"{tmp_path}/plain{layer}"])
    bridge.main([*argv, "--layer", "3", "--cache_states", f"{tmp_path}/states", "--out", f"{tmp_path}/kept3"])
    bridge.main([*argv, "--layer", "1", "--cache_states", f"{tmp_path}/states", "--out", f"{tmp_path}/kept1"])
    for layer in (1, 3):
        plain, kept = weights(tmp_path / f"plain{layer}"), weights(tmp_path / f"kept{layer}")
        assert all(torch.equal(plain[name], kept[name]) for name in plain)
        a, b = (read_json(tmp_path / f"{way}{layer}/result.json") for way in ("plain", "kept"))
        saved = 2 * (a["replaced_parameters"] + layer * 32 * 32)                         # the prefix's pass is not made
        assert a["flops_per_token"] - b["flops_per_token"] == saved


def test_only_what_is_missing_is_written(argv, tmp_path, monkeypatch):
    kept = ["--cache_states", f"{tmp_path}/states"]
    monkeypatch.setattr(cache, "CHUNK", 8)
    bridge.main([*argv, *kept, "--layer", "2", "--out", f"{tmp_path}/a"])
    files = sorted((tmp_path / "states/h2").glob("*.safetensors"))
    assert len(files) == 4                        # 6 steps x 4 sequences in eights, then the calibration's 8 windows
    files[1].unlink()                                                         # as if it had been killed there
    before = [f.stat().st_mtime_ns for f in (files[0], *files[2:])]
    bridge.main([*argv, *kept, "--layer", "2", "--out", f"{tmp_path}/b"])
    assert files[1].exists() and before == [f.stat().st_mtime_ns for f in (files[0], *files[2:])]
    assert all(torch.equal(a, b) for a, b in zip(weights(tmp_path / "a").values(), weights(tmp_path / "b").values()))


def test_refusals(argv, tmp_path, capsys, monkeypatch):
    states = tmp_path / "states"
    kept = ["--cache_states", states, "--layer", "1", "--out"]
    bridge.main([*map(str, [*argv, *kept, tmp_path / "a"])])
    assert "seed = 0 there, 1 here" in fails(capsys, bridge.main, *argv, *kept, tmp_path / "b", "--seed", "1")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 9))
    assert "its disk has" in fails(capsys, bridge.main, *argv, "--cache_states", states, "--layer", "2", "--out",
                                   tmp_path / "c")
    for name in ("calibration*", "0*"):                        # both are read
        [file] = (states / "h1").glob(name)
        whole = file.read_bytes()
        file.write_bytes(whole[:-4] + b"\1\2\3\4")
        assert f"{file} is damaged" in fails(capsys, bridge.main, *argv, *kept, tmp_path / "d")
        file.write_bytes(whole[:100])
        assert f"{file} could not be read" in fails(capsys, bridge.main, *argv, *kept, tmp_path / "e")
        file.write_bytes(whole)
