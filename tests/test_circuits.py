"""circuits.py: measures, the study of one task, and the stage."""
import json

import numpy as np
import pytest
import torch
from conftest import fails, slow, tiny_model
from test_attribution import answers, batch_of, difference, every_edge, patch, subject_of
from test_tasks import make_pieces

import circuits
from core import attribution, backbone, masked, tasks
from core.attribution import Subject, attribute
from core.common import generator
from core.report import plus_minus


# -------------------------------------------------------------------------------------------------
# Circuits

def test_measures_have_known_answers():
    scores = torch.tensor([[5., -9., 1.], [0., 2., -7.]]).double()
    edges = torch.tensor([[True, True, True], [False, True, True]])
    assert attribution.strongest(scores, edges, 2) == {1, 5}
    assert attribution.jaccard({1, 2, 3}, {2, 3, 4}) == 0.5
    assert attribution.chance(50, 100) == pytest.approx(1 / 3)
    gen = generator(0, "test")
    n, k = 200, 50
    values = []
    for _ in range(400):
        a = set(gen.choice(n, k, replace=False).tolist())
        b = set(gen.choice(n, k, replace=False).tolist())
        values.append(attribution.jaccard(a, b))
    assert np.mean(values) == pytest.approx(attribution.chance(k, n), abs=0.01)


def test_overlaps_compare_what_they_say():
    kinds = {"AR": "AR", "a": "w = 0", "b": "w = 0"}
    circuit = {("AR", 0): {1, 2}, ("AR", 1): {1, 3}, ("a", 0): {1, 2}, ("a", 1): {4, 5},
               ("b", 0): {2, 3}, ("b", 1): {1, 3}}
    overlap = attribution.overlaps(circuit, kinds)
    assert overlap["AR"] == {"ar": [], "prompts": [1 / 3], "seeds": []}
    assert overlap["w = 0"] == {"ar": [1, 1 / 3, 0, 1], "prompts": [0, 1 / 3], "seeds": [1 / 3, 0]}
    others = attribution.other_tasks({("x", 0): {1}, ("x", 1): {1}, ("y", 0): {1}, ("y", 1): {2}})
    assert others == [1, 0]                             # set 0, set 1


# -------------------------------------------------------------------------------------------------
# The stage

@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    return make_pieces(tmp_path_factory.mktemp("words"))


def size_of(pieces, mask=1):
    vocab = len(pieces.tokenizer) + mask
    return dict(vocab_size=vocab, pad_token_id=0, bos_token_id=0, eos_token_id=0,
                initializer_range=0.1, num_hidden_layers=2)


ALONE = [([0], [])]     # before and after a lone prompt


def pair_of_models(pieces):
    """An AR model and a masked one of other weights, for a vocabulary with a mask."""
    size = size_of(pieces)
    lm = backbone.Backbone(tiny_model("llama", 1, **size).requires_grad_(False))
    student = masked.Student(lm, len(pieces.tokenizer))
    return subject_of("llama", **size), Subject(lm, student, "masked, seed 0", "masked")


def test_each_model_reads_a_prompt_in_its_way(pieces):
    """An AR model the right side first; a masked one finds a mask at the answer's place."""
    ar, converted = pair_of_models(pieces)
    M = converted.student.mask_id
    middle = tasks.Line([11, 12, 5, 13, 14], [11, 12, 7, 13, 15], 2)
    ending = tasks.Line([21, 22, 23, 24, 5], [21, 22, 23, 25, 7], 4)
    for line, turned, whole in ((middle, [0, 13, 14, 11, 12], [0, 11, 12, M, 13, 14]),
                                (ending, [0, 21, 22, 23, 24], [0, 21, 22, 23, 24, M])):
        batch = circuits.make_batch([line], ar, ALONE)
        assert batch["clean"].tolist() == [turned]
        assert batch["answer"].tolist() == [5] and batch["wrong"].tolist() == [7]
        with torch.no_grad():
            want = ar.lm.head(ar.lm.through(ar.lm.embed(batch["clean"]), 0, ar.lm.L))[:, -1]
            assert torch.allclose(answers(ar, batch), want, atol=1e-5)

        batch = circuits.make_batch([line], converted, ALONE)
        assert batch["clean"].tolist() == [whole]
        ids = torch.tensor([whole])
        with torch.no_grad():
            *_, normed = converted.student.states(ids, ids == M)
            want = converted.student.logits(normed)[:, whole.index(M) - 1]  # the state before it
            got = answers(converted, batch)
            assert torch.allclose(got, want, atol=1e-5)
            other = answers(converted, {**batch, "clean": batch["corrupted"]})  # both sides are seen
            assert not torch.allclose(other[0, :5], got[0, :5], atol=1e-4)


def all_solved(subject, batch):
    return torch.ones(len(batch["clean"]), dtype=torch.bool)


CONFIG = circuits.Config(pairs=4, resamples=1, ig_steps=1, k=20)


def test_a_model_with_token_blocks_writes_the_answer_last(pieces):
    """Its answers are those of Student.predict; the tokens of other token blocks come before."""
    _, converted = pair_of_models(pieces)
    lines = tasks.examples("infill", pieces, 4, seed=0)
    for size, context in ((4, "causal"), (3, "noisy"), (32, "causal")):
        student = masked.Student(converted.lm, converted.student.mask_id,
                                 masked.Arm("block", size, context))
        subject = Subject(converted.lm, student, "blocks", "blocks")
        batch = circuits.make_batch(lines, subject, ALONE * 4)
        ids = batch["clean"]
        line = lines[0]
        assert ids[0].tolist() == [0, *line.tokens[line.place + 1:], *line.tokens[:line.place],
                                   student.mask_id]
        with torch.no_grad():
            normed = student.predict(ids, ids == student.mask_id)[:, -1]
            assert torch.allclose(answers(subject, batch), student.logits(normed), atol=1e-4)


def test_a_window_puts_other_lines_around_a_prompt(pieces):
    ar, converted = pair_of_models(pieces)
    sides = circuits.surroundings(pieces, 3, 0, start=0, eos=0)
    assert sides[0] != sides[1]
    lines = tasks.examples("infill", pieces, 3, seed=0)
    W = circuits.WINDOW
    for subject in (ar, converted):
        batch = circuits.make_batch(lines, subject, sides)
        alone = circuits.make_batch(lines, subject, [([0], [])] * 3)
        length = alone["clean"].shape[1] - 1
        assert torch.equal(batch["clean"][:, W:W + length], alone["clean"][:, 1:])
        assert (batch["clean"][:, 0] == 0).all() and (batch["clean"][:, W - 1] == 0).all()
        state = batch["last"] % batch["clean"].shape[1]
        assert torch.equal(state - (W - 1), alone["last"] % (length + 1))
    assert batch["clean"].shape[1] == 2 * W + length    # two-way: lines after it, too


def test_a_masked_model_is_attributed_as_it_is_patched(pieces):
    _, subject = pair_of_models(pieces)
    lines = tasks.examples("brackets", pieces, 6, seed=0)
    batch = circuits.make_batch(lines, subject, ALONE * 6)
    fine = attribute(subject, batch, 10)
    want = difference(subject, batch)
    assert fine[0].sum().item() == pytest.approx(want, rel=0.05, abs=1e-3)
    circuit = attribution.strongest(fine, subject.edges, 4)
    edges = sorted(divmod(e, len(subject.receivers)) for e in circuit)
    edges += every_edge(subject)[::6]
    guess = [fine[tuple(edge)] for edge in edges]
    assert np.corrcoef(patch(subject, batch, edges), guess)[0, 1] > 0.5


def test_a_study_uses_what_all_able_models_solve(pieces, monkeypatch):
    """Of 16 pairs a set the AR model solves 1 to 5, a converted one 0 to 4, a second of its kind all,
    a third model none."""
    ar, _ = pair_of_models(pieces)
    subjects = [ar, Subject(ar.lm, None, "a", "w = 0"), Subject(ar.lm, None, "b", "w = 0"),
                Subject(ar.lm, None, "poor", "poor")]
    rows = {"AR": slice(1, 6), "a": slice(0, 5), "b": slice(0, 16), "poor": slice(0, 0)}

    def solved(subject, batch):
        right = torch.zeros(len(batch["clean"]), dtype=torch.bool)
        right[rows[subject.name]] = True
        return right
    monkeypatch.setattr(circuits, "solved", solved)
    monkeypatch.setattr(circuits, "LEAST", 0.3)
    cfg = circuits.Config(pairs=4, resamples=2, ig_steps=1, k=20)
    result, scores = circuits.study("missing", subjects, pieces, cfg)
    assert result["pairs"] == 4 and set(result["overlap"]) == {"AR", "w = 0"}
    assert len(scores) == 6 and result["solved"]["poor"] == 0
    assert all(score.abs().sum() > 0 for score in scores.values())
    overlap = result["overlap"]["w = 0"]
    assert overlap["seeds"] == [1, 1] and overlap["ar"] == [1, 1, 1, 1]
    assert result["overlap"]["AR"]["prompts"][0] < 1
    rows["a"] = slice(0, 5)
    rows["AR"] = slice(2, 7)                            # 3 pairs are left in common
    assert circuits.study("missing", subjects, pieces, cfg)[0]["pairs"] == 0


def test_the_strongest_components_of_each_part_are_zeroed(monkeypatch):
    subject = subject_of("llama", num_hidden_layers=4)
    scores = torch.zeros(subject.edges.shape).double()
    for name in ("m0", "m1", "a2.1", "m3"):
        scores[subject.senders.index(name), -1] = 5.0
    silenced = []
    honest = circuits.without

    def spied(subject, components):
        silenced.append(list(components))
        return honest(subject, components)
    monkeypatch.setattr(circuits, "without", spied)
    zeroed = circuits.zeroing(subject, batch_of(), scores, circuits.Config(k=3))
    early, middle, late = silenced[:3]
    assert early[0] == "m0" and set(middle[:2]) == {"m1", "a2.1"} and late[0] == "m3"
    assert len(silenced) == 3 + circuits.SAMPLES == 3 + len(zeroed["random"])
    assert all(0 <= x <= 1 for x in zeroed["early"] + zeroed["random"])
    subject = subject_of("llama", num_hidden_layers=2)
    scores = torch.zeros(subject.edges.shape).double()
    for name in ("m0", "m1", "a0.0"):
        scores[subject.senders.index(name), -1] = 5.0
    profile = attribution.profile(scores, subject, k=3)
    assert profile["logits"] == 1 and profile["concentration"] == 1 and profile["early"] == 0
    assert [attribution.depth_of(x, 8) for x in ("a1.0.q", "m2", "m5", "a6.1", "embed")] == \
        ["early", "middle", "middle", "late", "embed"]


@pytest.fixture(scope="module")
def folders(pieces, tmp_path_factory):
    """An AR model and two of other weights that claim to be converted from it."""
    out = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("toy", "w0", "w10")):
        model = tiny_model("llama", seed, **size_of(pieces, mask=seed > 0))
        model.save_pretrained(out / name)
        pieces.tokenizer.save_pretrained(out / name)
    info = {"base": backbone.identity(out / "toy"), "mask_id": len(pieces.tokenizer), "seed": 0,
            "attention": "bidirectional", "block_size": 16, "context": "noisy"}
    for w in (0, 10):
        text = json.dumps({**info, "align_weight": w})
        (out / f"w{w}" / "result.json").write_text(text)
    return out


FLAGS = ["--pairs", "4", "--resamples", "2", "--ig_steps", "1", "--k", "20"]


def test_the_stage(folders, tmp_path, capsys, monkeypatch):
    argv = ["--model", str(folders / "toy"), "--converted", str(folders / "w0"),
            str(folders / "w10"), *FLAGS]
    monkeypatch.setattr(circuits, "solved", all_solved)
    out = tmp_path / "c"
    argv += ["--tasks", "induction", "missing", "--out", str(out)]
    result = circuits.main(argv)
    kinds = ["AR", "untrained", "converted, w = 0", "converted, w = 10"]
    assert [x["kind"] for x in result["subjects"]] == kinds
    for task in result["tasks"].values():
        assert len(task["overlap"]["converted, w = 0"]["ar"]) == 2
        assert task["overlap"]["untrained"]["ar"]
        assert set(task["zeroing"]["AR"]) == {"early", "middle", "late", "random"}
        assert set(task["solved"]) == {x["name"] for x in result["subjects"]}
    assert len(result["other_tasks"]) == 2 and 0 < result["chance"] < 1
    assert (out / "circuits.png").stat().st_size > 5000
    capsys.readouterr()
    assert circuits.main(argv) == json.loads((out / "result.json").read_text())     # finished
    table = capsys.readouterr().out
    values = result["tasks"]["induction"]["overlap"]["converted, w = 10"]["ar"]
    assert f"| {plus_minus(values, '.2f')} |" in table and "| untrained |" in table


def test_the_stage_refuses(folders, tmp_path, capsys):
    out = tmp_path / "e"
    argv = ["--model", folders / "toy", "--converted", folders / "w0", "--out", out]
    assert "is unknown" in fails(capsys, circuits.main, *argv, "--tasks", "chess")
    refused = fails(capsys, circuits.main, *argv, "--tasks", "names")
    assert "English names" in refused
    argv[3] = tmp_path / "nothing"
    assert "repr_align.py" in fails(capsys, circuits.main, *argv)
    tiny_model("llama").save_pretrained(tmp_path / "other")         # nothing was made of this one
    argv[1:4] = [tmp_path / "other", "--converted", folders / "w0"]
    refused = fails(capsys, circuits.main, *argv)
    assert str(folders / "w0") in refused and "repr_align.py" in refused


@slow
def test_the_stage_on_a_real_conversion(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(circuits, "solved", all_solved)
    result = circuits.main(["--model", str(runs / "toy"), "--converted", str(runs / "convert" / "w0"),
                            *FLAGS, "--out", str(tmp_path / "c")])
    for task in result["tasks"].values():
        assert 0 <= min(task["overlap"]["converted, w = 0"]["ar"]) < 1
