"""attribution.py and circuits.py: completeness, exactness on a linear model, symmetry, and the stage as it is used.

`patch` is the reference: the exact effect of an edge, one run each, that attribution approximates for all at once."""
import contextlib
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import fails, tiny_model
from torch import nn

import circuits
from core import attribution, backbone, masked, tasks
from core.attribution import ADDS_UP, Subject, attribute, metric, record, without, written
from core.common import UserError
from core.draws import generator
from core.run import read_section


def subject_of(family, seed=0, **changes):
    return Subject(backbone.Backbone(tiny_model(family, seed, **changes).requires_grad_(False)))


def batch_of(pairs=5, length=9, seed=0):
    gen = torch.Generator().manual_seed(seed)
    clean = torch.randint(3, 64, (pairs, length), generator=gen)
    corrupted = clean.clone()
    corrupted[:, 4] = (clean[:, 4] + 7) % 61 + 3
    answer = torch.randint(3, 64, (pairs,), generator=gen)
    return {"clean": clean, "corrupted": corrupted, "answer": answer, "wrong": (answer + 5) % 64,
            "place": torch.full((pairs,), length)}


def difference(subject, batch):
    """m(corrupted) - m(clean), mean over pairs."""
    with torch.no_grad():
        there, here = (metric(answer(subject, batch, k), batch) for k in ("corrupted", "clean"))
    return (there - here).mean().item()


def answer(subject, batch, which="clean"):
    return subject.logits(subject.embed(batch[which], batch["place"]), batch["place"])


@contextlib.contextmanager
def instead(subject, name, seen, delta):
    """While open, the receiver `name` reads the stream of `seen` plus `delta` (P, T, D); nobody else does."""
    if name == "logits":
        hook = subject.lm.norm.register_forward_pre_hook(lambda *_: (seen["f"] + delta,))
    elif name.startswith("m"):
        i = int(name[1:])
        y = subject.norm2[i].forward(seen[f"r{i}"] + delta)                     # `forward` goes past every hook
        hook = subject.mlp[i].register_forward_pre_hook(lambda *_: (y,))
    else:
        i, h, part = int(name[1:].split(".")[0]), int(name.split(".")[1]), "qkv".index(name[-1])
        x, module = subject.norm1[i].forward(seen[f"x{i}"] + delta), subject.attention[i]
        new = [getattr(module, n).forward(x) for n in subject.inputs]
        new = (new[0].chunk(3, -1) if subject.joint else new)[part]             # (P, T, heads * d)
        d = new.shape[-1] // (subject.K if part else subject.H)
        first = part * new.shape[-1] if subject.joint else 0                    # of the matrix that hooks see

        def change(_, __, output):
            output = output.clone()
            output[..., first + h * d:first + (h + 1) * d] = new[..., h * d:(h + 1) * d]
            return output
        hook = getattr(module, subject.inputs[0 if subject.joint else part]).register_forward_hook(change)
    with hook:
        yield


@torch.no_grad()
def patch(subject, batch, edges):
    """The exact effect of each edge (sender, receiver) on the metric, mean over pairs: the receiver alone is given a
    stream in which the sender's part is the corrupted one. A list of numbers, as `attribute` scores."""
    effects, change, seen = [], 0, {}
    for which, sign in (("corrupted", 1), ("clean", -1)):
        with record(subject, seen := {}):
            clean = metric(answer(subject, batch, which), batch).mean().item()
        change = change + sign * written(subject, subject.embed(batch[which], batch["place"]), seen)     # (P, T, S, D)
    for s, r in edges:
        with instead(subject, subject.graph().receivers[r], seen, change[:, :, s]):
            effects.append(metric(answer(subject, batch), batch).mean().item() - clean)
    return effects


def every_edge(graph):
    return [(s, r) for r, n in enumerate(graph.before) for s in range(n)]


# -------------------------------------------------------------------------------------------------- attribution
@pytest.mark.parametrize("family", ADDS_UP)
def test_the_edges_that_leave_the_embedding_add_up_to_the_difference(family):
    subject, batch = subject_of(family), batch_of()
    want = difference(subject, batch)
    errors = [abs(attribute(subject, [batch], steps)[0].sum().item() - want) for steps in (3, 100)]
    assert abs(want) > 1e-2 and errors[1] < 2e-2 * abs(want) and errors[1] < errors[0]


class Same(nn.Module):
    """The identity, as a tensor of its own: gradients at its output are not those of the residual stream."""

    def forward(self, x):
        return x * 1


def linear(family):
    """A model that is linear in its embeddings: even attention, no norms, a matrix in place of each MLP."""
    subject = subject_of(family)
    torch.manual_seed(1)
    for block in subject.lm.blocks:
        block.mlp = nn.Linear(32, 32).requires_grad_(False)
    with torch.no_grad():
        for a in subject.attention:
            if subject.joint:
                a.c_attn.weight[:, :64] = 0
                a.c_attn.bias[:64] = 0
            else:
                a.q_proj.weight.zero_()
                a.k_proj.weight.zero_()
    norm1, _, _, norm2 = ADDS_UP[family]
    for block in subject.lm.blocks:
        setattr(block, norm1, Same())
        setattr(block, norm2, Same())
    setattr(subject.lm.stack, subject.lm.last, Same())
    return Subject(backbone.Backbone(subject.lm.model))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_on_a_linear_model_eap_is_exact_patching(family):
    subject, batch = linear(family), batch_of()
    graph = subject.graph()
    scores, edges = attribute(subject, [batch], 0), every_edge(graph)[::2]
    exact = torch.tensor(patch(subject, batch, edges))
    guess = torch.tensor([scores[e] for e in edges], dtype=exact.dtype)
    assert exact.abs().max() > 1e-2 and torch.allclose(exact, guess, atol=2e-4 * float(exact.abs().max()))
    other = subject_of(family)                                                  # with attention and norms it is not
    exact, scores = torch.tensor(patch(other, batch, edges[::5])), attribute(other, [batch], 0)
    guess = torch.tensor([scores[e] for e in edges[::5]], dtype=exact.dtype)
    assert not torch.allclose(exact, guess, atol=0.1 * float(exact.abs().max()))


def test_patching_every_edge_into_a_receiver_is_the_corrupted_run_there():
    """The logits' edges, patched one by one on a model that is linear behind them, add up to the whole difference."""
    subject, batch = linear("llama"), batch_of()
    graph = subject.graph()
    last = len(graph.receivers) - 1
    total = sum(patch(subject, batch, [(s, last) for s in range(graph.before[last])]))
    assert total == pytest.approx(difference(subject, batch), rel=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_small_changes_are_patched_as_attributed(family):
    """Where the corrupted prompt is near the clean one, first order is exact: at every kind of receiver."""
    subject, batch = subject_of(family), batch_of()
    table = subject.lm.model.get_input_embeddings().weight
    with torch.no_grad():
        old, new = batch["clean"][:, 4], torch.arange(5)
        batch["clean"][:, 4], batch["corrupted"][:, 4] = 10 + new, 20 + new
        table[20 + new] = table[10 + new] + 1e-3 * table[old]
    graph = subject.graph()
    edges = every_edge(graph)[::3]
    scores, exact = attribute(subject, [batch], 0), torch.tensor(patch(subject, batch, edges)).double()
    guess = torch.stack([scores[e] for e in edges])
    for part in ("q", "k", "v", "m", "logits"):                                 # of the right size at each of them
        mine = [i for i, (_, r) in enumerate(edges) if graph.receivers[r].split(".")[-1] == part
                or part == "m" and graph.receivers[r].startswith("m")]
        slope = (exact[mine] @ guess[mine]) / (guess[mine] @ guess[mine])
        assert len(mine) > 3 and slope == pytest.approx(1, abs=0.1), part


def test_permuted_heads_have_permuted_scores():
    one, two = (subject_of("llama", num_key_value_heads=4) for _ in range(2))
    batch = batch_of()
    order = [2, 0, 3, 1]
    with torch.no_grad():
        a, b = one.attention[1], two.attention[1]
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(b, name).weight.copy_(getattr(a, name).weight.view(4, 8, 32)[order].reshape(32, 32))
        b.o_proj.weight.copy_(a.o_proj.weight.view(32, 4, 8)[:, order].reshape(32, 32))
    first, second, graph = attribute(one, [batch], 2), attribute(two, [batch], 2), one.graph()
    rows, columns = list(range(len(graph.senders))), list(range(len(graph.receivers)))
    for new, old in enumerate(order):
        rows[graph.senders.index(f"a1.{new}")] = graph.senders.index(f"a1.{old}")
        for part in "qkv":
            columns[graph.receivers.index(f"a1.{new}.{part}")] = graph.receivers.index(f"a1.{old}.{part}")
    assert torch.allclose(second, first[rows][:, columns], atol=1e-5)
    assert not torch.allclose(second, first, atol=1e-3)


def test_an_untouched_component_has_no_attribution():
    subject, batch = subject_of("llama"), batch_of()
    graph = subject.graph()
    with torch.no_grad():
        subject.attention[2].o_proj.weight[:, 8:16] = 0                         # head a2.1 writes nothing
        subject.lm.blocks[1].mlp.down_proj.weight.zero_()                       # neither does m1
    scores = attribute(subject, [batch], 3)
    for name in ("a2.1", "m1"):
        s = graph.senders.index(name)
        assert scores[s].abs().max() == 0
        assert all(e == pytest.approx(0, abs=1e-5) for e in patch(subject, batch, [(s, r) for r in range(
            len(graph.receivers)) if graph.before[r] > s]))
    assert scores[:, graph.receivers.index("m1")].abs().max() == 0                      # nor does what it reads matter
    assert scores[:, graph.receivers.index("a2.1.q")].abs().max() == 0
    assert scores[:, graph.receivers.index("a2.0.q")].abs().max() > 0


def test_scores_do_not_depend_on_how_pairs_are_batched():
    subject, batch = subject_of("qwen3"), batch_of(6)
    whole = attribute(subject, [batch], 2)
    assert torch.allclose(whole, attribute(subject, circuits.slices(batch, 2), 2), atol=1e-6)


def test_the_masked_model_looks_both_ways_and_at_a_mask(runs):
    student, tokenizer = masked.load_converted(runs / "repr_align" / "w0", torch.device("cpu"), torch.float32)
    subject = Subject(student.lm, student, "twin", "twin")
    ids = torch.randint(0, 200, (3, 7))
    mask = torch.cat([ids, ids.new_full((3, 1), student.mask_id)], 1)
    *_, last = student.states(mask, mask == student.mask_id)
    batch = {"clean": ids, "corrupted": ids.roll(1, 0), "answer": torch.tensor([5, 6, 7]),
             "wrong": torch.tensor([8, 9, 10]), "place": torch.full((3,), 7)}
    with torch.no_grad():
        assert torch.allclose(answer(subject, batch), student.logits(last)[:, 6], atol=1e-5)
    want = difference(subject, batch)
    assert attribute(subject, [batch], 60)[0].sum().item() == pytest.approx(want, rel=0.05, abs=1e-3)


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "olmo2", "gpt_neox"])
def test_models_whose_heads_do_not_add_up_are_refused_by_name(family):
    name = {"gemma3": "gemma3_text"}.get(family, family)
    with pytest.raises(UserError, match=name):
        subject_of(family)


def test_zeroing_is_what_it_says():
    subject, batch = subject_of("llama"), batch_of()
    with torch.no_grad():
        before = answer(subject, batch)
        with without(subject, ["a1.2", "m3"]):
            now = answer(subject, batch)
        again = answer(subject, batch)
        subject.attention[1].o_proj.weight[:, 16:24] = 0
        subject.lm.blocks[3].mlp.down_proj.weight.zero_()
        want = answer(subject, batch)
    assert torch.equal(before, again) and torch.allclose(now, want, atol=1e-5) and not torch.allclose(now, before)


# --------------------------------------------------------------------------------------------------- comparison
def test_measures_have_known_answers():
    scores = torch.tensor([[5., -9., 1.], [0., 2., -7.]]).double()
    edges = torch.tensor([[True, True, True], [False, True, True]])
    assert attribution.strongest(scores, edges, 2) == {1, 5}
    assert attribution.jaccard({1, 2, 3}, {2, 3, 4}) == 0.5 and attribution.chance(50, 100) == pytest.approx(1 / 3)
    gen, n, k = generator(0, "test"), 200, 50
    drawn = [attribution.jaccard(*(set(gen.choice(n, k, replace=False).tolist()) for _ in "ab")) for _ in range(400)]
    assert sum(drawn) / 400 == pytest.approx(attribution.chance(k, n), abs=0.01)
    assert attribution.gini(torch.ones(5)) == pytest.approx(0)
    assert attribution.gini(torch.eye(4)[0]) == pytest.approx(0.75)
    graph = attribution.Graph(["embed", "a0.0", "a0.1", "m0"],
                              ["a0.0.q", "a0.1.q", "a0.0.k", "a0.0.v", "m0", "logits"], [1, 1, 1, 1, 3, 4])
    one = torch.zeros(4, 6).double()
    one[0, 2], one[1, 4] = 4.0, -2.0                                           # embed -> shared key, a0.0 -> m0
    assert attribution.components(one, graph.edges(), 2, graph).tolist() == [4, 2 + 2, 2, 2]
    assert attribution.by_depth(one, graph, 1).tolist() == pytest.approx([4 / 6, 2 / 6])


# --------------------------------------------------------------------------------------------------------- stage
def test_a_study_uses_what_all_able_models_solve(runs, monkeypatch):
    """Six prompts a set: the AR model solves 1 to 5, one twin 0 to 4, a second of its kind all, a third model none."""
    lm = backbone.load(runs / "toy", torch.device("cpu"), torch.float32)
    subjects = [Subject(lm), *(Subject(lm, None, f"twin, seed {i}", "twin") for i in range(2)),
                Subject(lm, None, "poor, seed 0", "poor")]
    which = {"AR": slice(1, 6), "twin, seed 0": slice(0, 5), "twin, seed 1": slice(0, 8), "poor, seed 0": slice(0, 0)}

    def solved(subject, batch, part="clean"):
        right = torch.zeros(len(batch["clean"]), dtype=torch.bool)
        right[which[subject.name]] = True
        return right
    monkeypatch.setattr(circuits, "solved", solved)
    cfg = circuits.Config(pairs=2, resamples=2, ig_steps=1, k=20)                # draws 4 x 2 prompts a set
    found, scores = circuits.study("missing", subjects, tasks.Pieces(backbone.load_tokenizer(runs / "toy")), cfg,
                                   torch.device("cpu"))
    assert found["usable"] and found["pairs"] == 2 and set(found["models"]) == {"AR", "twin"}
    assert len(scores) == 6 and found["solved"]["poor, seed 0"] == 0
    row = found["overlap"]["20"]
    assert row["twin, other seed"] == {"mean": 1.0, "values": [1.0, 1.0]} and len(row["AR and twin"]["values"]) == 4
    assert row["AR and twin"]["mean"] == 1 > row["AR, other prompts"]["mean"] and "AR and poor" not in row


def test_only_what_lies_below_the_untrained_twin_is_trainings_doing():
    def result(before, *trained):
        row = {"chance": 0.05, **{f"AR and {kind}": {"mean": sum(v) / len(v), "values": v} for kind, v in (
            (circuits.UNTRAINED, before), ("masked, w = 0", [x for seed in trained for x in seed]))}}
        return {"k": 30, "tasks": {"opening": {"usable": True, "group": "middle", "overlap": {"30": row},
                                               "models": {"AR": {}, circuits.UNTRAINED: {}, "masked, w = 0": {}}}}}
    [line] = circuits.verdicts(result([0.6, 0.62, 0.58], [0.3, 0.33, 0.29], [0.28, 0.31, 0.3]))
    assert "behind by 0.298" in line and "training moved it away" in line and "2 seeds" in line
    assert "by k -0.30 at 30;" in line
    [line] = circuits.verdicts(result([0.6, 0.62, 0.58], [0.6, 0.61, 0.59]))
    assert "not known (n = 1, equal)" in line and "no difference is known to be training's doing" in line
    [line] = circuits.verdicts(result([0.6, 0.6, 0.6], [0.4, 0.42, 0.41]))    # three sets of prompts, one training
    assert "not known (n = 1, lower by 0.19)" in line and "no difference is known" in line


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_study_of_other_families(family, runs, monkeypatch):
    tokenizer = backbone.load_tokenizer(runs / "toy")
    size = dict(vocab_size=len(tokenizer) + 1, pad_token_id=0, bos_token_id=0, eos_token_id=0, initializer_range=0.1)
    student = masked.Student(backbone.Backbone(tiny_model(family, 1, **size).requires_grad_(False)), len(tokenizer))
    subjects = [subject_of(family, **size), Subject(student.lm, student, "masked, seed 0", "masked")]
    monkeypatch.setattr(circuits, "solved", lambda x, b, which="clean": torch.ones(len(b["clean"])).bool())
    cfg = circuits.Config(pairs=4, resamples=2, ig_steps=1, k=20)
    found, scores = circuits.study("brackets", subjects, tasks.Pieces(tokenizer), cfg, torch.device("cpu"))
    assert len(scores) == 4 and all(s.abs().sum() > 0 for s in scores.values())
    assert 0 <= found["overlap"]["20"]["AR and masked"]["mean"] < 1
    batch = circuits.stack(tasks.examples("brackets", tasks.Pieces(tokenizer), 8, seed=0), torch.device("cpu"))
    fine = attribute(subjects[1], [batch], 10)                                  # 10 points, of the masked model
    edges = sorted(attribution.strongest(fine, subjects[1].graph().edges(), 4))
    edges = [divmod(e, fine.shape[1]) for e in edges] + every_edge(subjects[1].graph())[::20]
    assert np.corrcoef(patch(subjects[1], batch, edges), [fine[e] for e in edges])[0, 1] > 0.5


def test_controls_exist_even_where_the_strongest_take_all_of_a_kind():
    subject, batch = subject_of("llama", num_hidden_layers=2), batch_of()
    graph = subject.graph()
    scores = torch.zeros(len(graph.senders), len(graph.receivers)).double()
    for s in ("m0", "m1", "a0.0"):
        scores[graph.senders.index(s), -1] = 5.0
    found = circuits.zeroing(subject, batch, scores, graph, circuits.Config(k=3))
    assert set(found["components"]) == {"m0", "m1", "a0.0"} and 0 <= found["matched"] <= 1


def test_the_stage_runs_and_refuses(runs, tmp_path, capsys, monkeypatch):
    argv = ["--model", f"{runs}/toy", "--twins", f"{runs}/repr_align/w0,{runs}/repr_align/w10", "--pairs", "4",
            "--resamples", "2", "--ig_steps", "2", "--k", "20", "--out", f"{tmp_path}/c"]
    result = circuits.main([*argv, "--task", "countdown"])                      # a tiny model solves nothing
    assert not result["tasks"]["countdown"]["usable"] and "not analysed" in result["verdicts"][0]
    section = read_section(tmp_path / "c")
    assert "| untrained twin |" in section and "| masked, w = 10, seed 0 |" in section   # solved, though not analysed
    monkeypatch.setattr(circuits, "solved", lambda x, b, which="clean": torch.ones(len(b["clean"])).bool())
    argv[-1] = f"{tmp_path}/d"
    result = circuits.main(argv)
    for found in result["tasks"].values():
        row = found["overlap"]["20"]
        assert set(row) >= {"chance", "AR, other prompts", "AR and masked, w = 0", "AR and masked, w = 10",
                            "AR and untrained twin"}
        assert 0 <= row["AR and masked, w = 0"]["mean"] <= 1 and len(row["AR and masked, w = 0"]["values"]) == 2
        assert sum(found["models"]["AR"]["by_depth"]) == pytest.approx(1)
        assert len(found["zeroing"]["AR"]["components"]) == 3 and 0 <= found["zeroing"]["AR"]["matched"] <= 1
    assert 0 < result["other_tasks"]["20"]["mean"] < 1 and len(result["other_tasks"]["20"]["values"]) == 2 * 15
    section = read_section(tmp_path / "d")
    assert section.startswith("## COMPARE\n") and " by chance" in section
    assert "| every two tasks | AR |" in section and "| opening | untrained twin |" in section
    assert "not known (n = 1" in section and "; by k " in section and "![" in section
    assert all(len(value) <= 60 for _, value in result["headline"]) and "(w = 10)" in result["headline"][0][1]
    stored = json.loads(json.dumps(result))                                     # of a fork with a task we do not know
    stored["tasks"] = {"chess": stored["tasks"]["missing"]}
    stored["tasks"]["chess"]["models"].pop("masked, w = 10")
    assert "| chess | masked, w = 0 |" in circuits.section(stored) and len(circuits.headline(stored)) == 1
    assert (tmp_path / "d" / "circuits.png").stat().st_size > 5000
    assert json.loads((tmp_path / "d" / "result.json").read_text())["edges"] == result["edges"]
    capsys.readouterr()
    circuits.main(argv)                                                         # finished: prints its table
    assert "| induction | AR |" in capsys.readouterr().out
    argv[-1] = f"{tmp_path}/e"
    twice = f"{runs}/repr_align/w0,{runs}/repr_align/w0"
    assert "second twin" in fails(capsys, circuits.main, *argv, "--twins", twice)
    assert "edges of this model" in fails(capsys, circuits.main, *argv, "--k", "100000")
    assert "there is no such one" in fails(capsys, circuits.main, *argv, "--task", "chess")
    shutil.copytree(runs / "toy", tmp_path / "alone" / "toy")
    argv = ["--model", tmp_path / "alone" / "toy", "--out", tmp_path / "e"]
    assert "repr_align.py" in fails(capsys, circuits.main, *argv)
    assert not (tmp_path / "e").exists()
