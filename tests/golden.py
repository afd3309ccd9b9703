"""golden.py: compare the runs of two versions of the code: weights bit for bit, numbers to eight digits.

    python tests/golden.py OLD NEW         # folders that tests/golden.sh filled; exit code 1 if a number moved
"""
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

WEIGHTS = ["toy/model", "bridge/bridge", "regression/bridge", "generator/bridge", "convert/w0/model",
           "convert/w10/model", "convert/block/model", "convert/causal/model", "tasks/toy/model",
           "tasks/w0/model", "edges"]
# What the third edition moved against d080e9e, and why: start of the name -> (tolerance, reason).
ROUNDING = "means in float64, difference of log-softmax: rounding"
MOVED = {
    "geometry, ": (2e-6, "eigenvalues of small matrices in float64"),
    "bridge, ": (1e-6, ROUNDING),
    "regression, ": (1e-6, ROUNDING),
    "generator, ": (1e-6, ROUNDING),
}


def read(folder, name):
    return json.loads((folder / name / "result.json").read_text())


def same_weights(old, new, name):
    """None if all tensors are equal, else what differs."""
    a = load_file(old / f"{name}.safetensors")
    b = load_file(new / f"{name}.safetensors")
    if a.keys() != b.keys():
        return f"other tensors: {sorted(a.keys() ^ b.keys())[:3]}"
    for key in a:
        if not torch.equal(a[key], b[key]):
            return f"{key} differs by {(a[key] - b[key]).abs().max():.1e}"
    return None


def generation(result, second_edition):
    """{method: gen-PPL at temperature 1}, in the words of this edition."""
    rows = {}
    for row in result["rows"]:
        points = {point["temperature"]: point["gen_ppl"] for point in row["frontier"]}
        rows[words(row) if second_edition else row["method"]] = points[1.0]
    return rows


WORDS = {                       # of the second edition -> of this one
    "unigrams": "unigrams",
    "AR, intact model": "AR",
    "Jacobi, intact model, equal calls": "Jacobi",
    "lazy Jacobi, intact model, stay 0.8": "lazy Jacobi",
    "masked twin, entropy order": "converted model, two-way",
    "masked twin, blocks of 16, noisy context, entropy order":
        "converted model, token blocks of 16, noisy context",
}


def words(row):
    """A row's name in the second edition -> in this one. Settings that left keep their names."""
    if row["name"].startswith("blocks at layer"):
        return f"hidden-state diffusion, layer {row['layer']}"
    return WORDS.get(row["name"], row["name"])


def compared(old, new):
    """Yield (what, number of the old side, number of the new side)."""
    a, b = read(old, "geometry"), read(new, "geometry")
    for x, y in zip(a["layers"], b["layers"], strict=True):
        for key in ("score", "curvature", "stiffness", "effective_rank", "score_low", "score_high"):
            yield f"geometry, layer {x['layer']}, {key}", x[key], y[key]
    yield "geometry, margin", a["margin"], b["margin"]
    for name in ("bridge", "regression", "generator"):
        a, b = read(old, name), read(new, name)
        yield f"{name}, validation loss", a["val_loss"], b["val_loss"]
        for calls, row in b["nfe"].items():
            for key in ("fvu", "kl", "ce_gap"):
                yield f"{name}, {calls} calls, {key}", a["nfe"][calls][key], row[key]
    for name in ("w0", "w10", "block", "causal"):
        a, b = read(old, f"convert/{name}"), read(new, f"convert/{name}")
        yield f"convert/{name}, bound", a["bound"][0], b["bound"][0]
    a = generation(read(old, "generate"), "second_edition")
    b = generation(read(new, "generate"), None)
    for name in b:
        yield f"generate, {name}, gen-PPL at T = 1", a[name], b[name]


def allowed(name):
    """(tolerance, reason) of a number; eight digits and no reason where nothing may move."""
    for start, move in MOVED.items():
        if name.startswith(start):
            return move
    return 1e-8, ""


def main(old, new):
    failed = 0
    for name in WEIGHTS:
        difference = same_weights(old, new, name)
        failed += difference is not None
        print(f"{name:24} {difference or 'equal bit for bit'}")
    checked = 0
    for name, x, y in compared(old, new):
        tolerance, reason = allowed(name)
        difference = abs(x - y) / max(1, abs(x))
        checked += 1
        failed += difference > tolerance
        if difference > 1e-8:
            print(f"{name}: {x:.9g} -> {y:.9g}   ({reason if difference <= tolerance else 'MOVED'})")
    print(f"{len(WEIGHTS)} files of weights and {checked} numbers compared, {failed} moved unnamed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
