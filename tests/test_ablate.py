"""The studies' tables, from results whose answer is known."""
import json

import pytest
from conftest import fails

from studies import ablate


def write(folder, **result):
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result))


def test_the_verdict_follows_the_numbers(tmp_path):
    """Layer 1: diffusion better by 0.010 +- 0.001 on every seed; layer 4: equal up to noise; layer 7: worse."""
    cfg = ablate.Config(study="objective", out=str(tmp_path))
    gaps = {1: (0.010, 0.011, 0.009), 4: (0.010, -0.012, 0.001), 7: (-0.02, -0.021, -0.019)}
    for name, layer, seed, folder, _ in ablate.cells(cfg):
        gap = 0.05 - (gaps[layer][seed] if name == "diffusion" else 0)
        row = {"fvu": 0.1, "ce_gap": gap}
        table = {n: row for n in ("1", "4", "8")} if name == "diffusion" else {"1": row}
        write(folder, nfe=table, raw_nfe=table, size_ratio=1.0, eval_sequences=64)
    text = ablate.table(cfg)
    assert "layer 1: diffusion beats regression: its CE gap is lower by +0.0100 +- 0.0025" in text
    assert "layer 4: diffusion ties with" in text and "layer 7: diffusion loses to" in text
    assert "| 1 | diffusion | 1.00 | 0.1000 +- 0.0000" in text and "| 7 | regression |" in text


def test_acceleration_is_read_off_the_curves(tmp_path):
    assert ablate.steps_to([[0, 6.0, None], [10, 5.0, None]], 5.5) == pytest.approx(5)
    assert ablate.steps_to([[0, 6.0, None], [10, 5.0, None]], 4.0) is None
    cfg = ablate.Config(study="align", out=str(tmp_path), seeds=2, steps=100)
    for name, _, _, folder, command in ablate.cells(cfg):
        assert command[1].endswith("repr_align.py") and "--layer" not in command
        end = 4.0 if name.startswith("w = 10") else 5.5 if name.startswith("w = 3") else 5.0
        write(folder, curve=[[0, 6.0, None], [100, end, None]], val_loss=end, cosine=None if "w = 0" in name else 0.9,
              seconds=20.0 if "w = 10" in name else 10.0)
    rows = {line.split(" | ")[0][2:]: line for line in ablate.alignment_table(cfg).splitlines() if "| w" in line}
    assert "| 2.00 +- 0.00 | 1.00 +- 0.00 | 0.900" in rows["w = 10"]            # half the steps, twice the price of one
    assert "not reached in 2 of 2" in rows["w = 3"] and rows["w = 0"].endswith("| 1.00 +- 0.00 | 1.00 +- 0.00 | - |")


def test_an_arm_is_compared_with_its_own_rival(tmp_path):
    cfg = ablate.Config(study="regimes", out=str(tmp_path), seeds=1, steps=100)
    ends = {"w = 0": 5.0, "w = 0, AdamW 3e-4": 5.8, "w = 3, AdamW 3e-4": 5.6, "w = 3, upper layers": 4.0}
    for name, _, _, folder, _ in ablate.cells(cfg):
        end = ends.get(name, 5.9)
        write(folder, curve=[[0, 6.0, None], [100, end, None]], val_loss=end, cosine=None, seconds=10.0)
    rows = {line.split(" | ")[0][2:]: line for line in ablate.alignment_table(cfg).splitlines() if "| w" in line}
    assert "| -0.200 | 2.00 | 2.00 |" in rows["w = 3, AdamW 3e-4"]
    assert "| -1.000 | 2.00 | 2.00 |" in rows["w = 3, upper layers"]
    assert "not reached in 1 of 1" in rows["w = 3, lower layers"] and "| 1.00" in rows["w = 0, 15k tokens"]


def test_no_such_layer(capsys):
    assert "none of the layers 3" in fails(capsys, ablate.main, "--study", "objective", "--layers", "3")
    assert "variants w = 7" in fails(capsys, ablate.main, "--study", "align", "--variants", "w = 7")
    assert "needs 'w = 0' too" in fails(capsys, ablate.main, "--study", "align", "--variants", "w = 3")
    some = list(ablate.cells(ablate.Config(study="align", variants="w = 0; w = 3")))
    assert [name for name, *_ in some] == ["w = 0", "w = 3"] * 3
