"""studies/shift.py on planted circuits, studies/induction.py on a planted model."""
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file, save_file
from test_tasks import make_pieces

from core import backbone, masked
from studies import induction, shift


def planted(edges):
    """Scores (10, 10) whose strongest edges are these."""
    scores = torch.rand(100, generator=torch.Generator().manual_seed(0)).double() / 10
    scores[list(edges)] = 5.0
    return scores.view(10, 10)


def write_run(folder, kept):
    """An AR model, an untrained one with half of its circuit, and converted models that keep
    `kept[group]` of 4 edges of every task."""
    tasks = {"induction": "prefix", "missing": "global", "countdown": "global"}
    scores = {}
    result = {"base": folder.name, "tasks": {}, "subjects": [{"name": "AR", "kind": "AR"},
                                        {"name": "untrained", "kind": "untrained"}]}
    for number, (task, group) in enumerate(tasks.items()):
        first = 10 * number
        scores[f"AR/0/{task}"] = planted(range(first, first + 4))
        scores[f"untrained/0/{task}"] = planted([first, first + 1, 90, 91])
        shares = {part: 0.25 for part in ("early", "middle", "late", "concentration")}
        names = ["AR", "untrained"]
        for seed, by_group in enumerate(kept):
            same = by_group[group]
            name = f"converted, seed {seed}"
            names.append(name)
            edges = [*range(first, first + same), *range(80, 84 - same)]
            scores[f"{name}/0/{task}"] = planted(edges)
        result["tasks"][task] = {"group": group, "pairs": 8, "profile": dict.fromkeys(names, shares),
                                 "zeroing": {name: {"early": [0.5], "random": [0.9, 1.0]}
                                             for name in names if name != "untrained"}}
    result["subjects"] += [{"name": f"converted, seed {seed}", "kind": "converted"}
                           for seed in range(len(kept))]
    folder.mkdir()
    save_file(scores, folder / "scores.safetensors")
    (folder / "result.json").write_text(json.dumps(result))


def test_a_planted_shift_is_seen(tmp_path, capsys):
    write_run(tmp_path / "a", [{"prefix": 4, "global": 2}, {"prefix": 4, "global": 2},
                               {"prefix": 3, "global": 2}])
    write_run(tmp_path / "b", [{"prefix": 3, "global": 2}])
    gaps = shift.main([str(tmp_path / "a"), str(tmp_path / "b"), "--k", "4", "--out",
                       str(tmp_path / "out")])
    half = 2 / 6                                        # Jaccard index of 2 of 4 edges
    want = [[1 - half, 1 - half, 0.6 - half], [0.6 - half]]
    assert gaps == {"converted": [pytest.approx(x) for x in want]}
    table = shift.collect(tmp_path / "a", 4)
    assert list(table["converted", "global"]["change"].values()) == pytest.approx([0, 0, 0])
    assert table["AR", "prefix"]["overlap"] == {"AR": 1}
    assert table["AR", "prefix"]["specific"] == {"AR": 1}       # other tasks share no edge
    assert set(table["converted", "prefix"]["without random"].values()) == {0.95}
    assert "+0.53 [" in capsys.readouterr().out         # their mean
    assert (tmp_path / "out" / "shift.png").stat().st_size > 5000

    # A model that solves only a part of a group is left out of it, and of the difference
    scores = load_file(tmp_path / "a" / "scores.safetensors")
    del scores["converted, seed 0/0/missing"]
    save_file(scores, tmp_path / "a" / "scores.safetensors")
    table = shift.collect(tmp_path / "a", 4)
    assert len(table["converted", "global"]["change"]) == 2
    assert shift.gap_of_groups(table, "converted", "change") == pytest.approx(want[0][1:])


class Planted:
    """Logits that gain 2 nats for the word after the left neighbour and 3 for the one before the
    right neighbour. The vocabulary is so large that its log-sum does not move."""
    student = object()

    def __init__(self, V):
        self.V = V
        self.lm = SimpleNamespace(embed=lambda ids: ids)

    def logits(self, ids, last):
        logits = torch.zeros(len(ids), self.V)
        for row, tokens in enumerate(ids.tolist()):
            shown = tokens[1:9]
            left = tokens[induction.BEFORE - 1]
            right = tokens[induction.BEFORE + 1]
            if left in shown[:7]:
                logits[row, shown[shown.index(left) + 1]] += 2
            if right in shown[1:]:
                logits[row, shown[shown.index(right) - 1]] += 3
        return logits


def test_planted_sides_add_up(tmp_path):
    pieces = make_pieces(tmp_path)
    sample = induction.make_lines(pieces, 32, 0, mask_id=9999)
    gains = induction.evidence(Planted(200_000), *sample)
    assert gains["left"] == pytest.approx(2, abs=0.01)
    assert gains["right"] == pytest.approx(3, abs=0.01)
    assert gains["both"] == pytest.approx(5, abs=0.01)
    assert gains["conflict"] == pytest.approx(2, abs=0.01)
    assert gains["conflict, right"] == pytest.approx(3, abs=0.01)


def test_the_probe_reads_a_planted_rate(tmp_path):
    """States that hold the share of masks are read, those that hold noise are not."""
    pieces = make_pieces(tmp_path)

    class Student:
        def states(self, ids, is_mask):
            gen = torch.Generator().manual_seed(0)
            noise = torch.randn(*ids.shape, 4, generator=gen)
            yield noise
            yield noise + is_mask.float().mean(1)[:, None, None] * torch.arange(4.)

    before, after = induction.probe(Student(), pieces.tokenizer, 0)
    assert abs(before) < 0.05 and after > 0.3


def test_the_study_runs(tmp_path, capsys):
    pieces = make_pieces(tmp_path)
    vocab = len(pieces.tokenizer)
    for name, size in (("toy", vocab), ("w0", vocab + 1)):
        model = tiny_model("llama", vocab_size=size, pad_token_id=0, bos_token_id=0,
                           eos_token_id=0, num_hidden_layers=2)
        model.save_pretrained(tmp_path / name)
        pieces.tokenizer.save_pretrained(tmp_path / name)
    info = {"base": backbone.identity(tmp_path / "toy"), "mask_id": vocab, "seed": 0,
            "attention": "bidirectional", "block_size": 16, "context": "noisy", "align_weight": 0}
    (tmp_path / "w0" / "result.json").write_text(json.dumps(info))
    assert masked.load_converted(tmp_path / "w0", "cpu", torch.float32)
    rows = induction.main(["--model", str(tmp_path / "toy"), "--converted", str(tmp_path / "w0"),
                           "--count", "8"])
    assert [row[0] for row in rows] == ["AR", "w0"] and len(rows[1]) == 9
    assert "lost without a head" in capsys.readouterr().out
