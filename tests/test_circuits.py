"""attribution.py and circuits.py: completeness, exactness on a linear model, symmetry, and the stage.

`patch` is the reference: the exact effect of an edge, one run each, that attribution approximates for
all edges at once."""
import contextlib
import json
from itertools import product

import numpy as np
import pytest
import torch
from conftest import fails, tiny_model
from torch import nn

import circuits
import data
from core import attribution, backbone, masked, tasks
from core.attribution import LAYOUT, Subject, attribute, metric, record, without, written
from core.common import UserError, generator
from core.report import plus_minus

CPU = torch.device("cpu")
FEW = ("llama", "qwen3")        # grouped keys; norms on q and k


def subject_of(family, seed=0, **changes):
    lm = backbone.Backbone(tiny_model(family, seed, **changes).requires_grad_(False))
    return Subject(lm)


def batch_of(pairs=5, length=9, seed=0):
    gen = torch.Generator().manual_seed(seed)
    clean = torch.randint(3, 64, (pairs, length), generator=gen)
    corrupted = clean.clone()
    corrupted[:, 4] = (clean[:, 4] + 7) % 61 + 3
    answer = torch.randint(3, 64, (pairs,), generator=gen)
    return {"clean": clean, "corrupted": corrupted, "answer": answer, "wrong": (answer + 5) % 64,
            "last": torch.full((pairs,), length - 1)}


def answers(subject, batch, name="clean"):
    return subject.logits(subject.lm.embed(batch[name]), batch["last"])


def difference(subject, batch):
    """m(corrupted) - m(clean), mean over pairs."""
    with torch.no_grad():
        corrupted = metric(answers(subject, batch, "corrupted"), batch)
        clean = metric(answers(subject, batch), batch)
    return (corrupted - clean).mean().item()


@contextlib.contextmanager
def reads(subject, name, seen, delta):
    """While open, the receiver `name` reads the stream in `seen` plus `delta` (P, T, D). Nobody else
    does. `forward` goes past every hook."""
    if name == "logits":
        stream = seen["f", subject.lm.L] + delta
        hook = subject.lm.norm.register_forward_pre_hook(lambda *_: (stream,))
    elif name.startswith("m"):
        i = int(name[1:])
        block = subject.lm.blocks[i]
        y = block.post_attention_layernorm.forward(seen["r", i] + delta)
        hook = block.mlp.register_forward_pre_hook(lambda *_: (y,))
    else:
        i, head, part = name[1:].split(".")
        block = subject.lm.blocks[int(i)]
        x = block.input_layernorm.forward(seen["x", int(i)] + delta)
        projection = getattr(block.self_attn, f"{part}_proj")
        new = projection.forward(x)                                 # (P, T, heads * d)
        d = new.shape[-1] // (subject.heads if part == "q" else subject.key_heads)
        rows = slice(int(head) * d, int(head) * d + d)

        def change(_, __, output):
            output = output.clone()
            output[..., rows] = new[..., rows]
            return output
        hook = projection.register_forward_hook(change)
    with hook:
        yield


@torch.no_grad()
def patch(subject, batch, edges):
    """The exact effects of edges (sender, receiver) on the metric, mean over pairs: the receiver
    alone reads a stream in which the sender's part is the corrupted one."""
    outputs = {}
    for name in ("corrupted", "clean"):
        with record(subject) as seen:
            before = metric(answers(subject, batch, name), batch)
        outputs[name] = written(subject, subject.lm.embed(batch[name]), seen)       # (P, T, S, D)
    change = outputs["corrupted"] - outputs["clean"]
    effects = []
    for s, r in edges:
        with reads(subject, subject.graph().receivers[r], seen, change[:, :, s]):
            after = metric(answers(subject, batch), batch)
        effects.append((after - before).mean())
    return torch.stack(effects).double()


def every_edge(graph):
    return [(s, r) for r, n in enumerate(graph.before) for s in range(n)]


# -------------------------------------------------------------------------------------------------
# Attribution

@pytest.mark.parametrize("family", LAYOUT)
def test_what_the_parts_write_adds_up_to_the_stream(family):
    """Or a norm, a factor or another order is hidden somewhere, and an edge is not an edge."""
    subject = subject_of(family)
    batch = batch_of()
    with torch.no_grad(), record(subject) as seen:
        answers(subject, batch)
        parts = written(subject, subject.lm.embed(batch["clean"]), seen)            # (P, T, S, D)
    graph = subject.graph()
    for name in ("m1", "logits"):
        r = graph.receivers.index(name)
        stream = seen["r", 1] if name == "m1" else seen["f", subject.lm.L]
        total = parts[:, :, :graph.before[r]].sum(2)
        for i, block in enumerate(subject.lm.blocks):               # biases belong to no head
            if block.self_attn.o_proj.bias is not None and (name == "logits" or i <= 1):
                total = total + block.self_attn.o_proj.bias
        assert torch.allclose(total, stream, atol=1e-4), name


@pytest.mark.parametrize("family", FEW)
def test_the_edges_that_leave_the_embedding_add_up_to_the_difference(family):
    subject = subject_of(family)
    batch = batch_of()
    want = difference(subject, batch)
    errors = [abs(attribute(subject, [batch], steps)[0].sum().item() - want) for steps in (2, 40)]
    assert abs(want) > 1e-2
    assert errors[1] < 2e-2 * abs(want) and errors[1] < errors[0]


def test_midpoints_integrate_better_than_the_corrupted_ends_points():
    """The published code takes k / m, k = 0..m-1, from the corrupted end; ours are (k + 1/2) / m."""
    errors = {"midpoints": 0.0, "published": 0.0}
    for seed in range(4):
        subject = subject_of("llama", seed)
        batch = batch_of(seed=seed)
        want = difference(subject, batch)
        corrupted = subject.lm.embed(batch["corrupted"])
        line = subject.lm.embed(batch["clean"]) - corrupted
        for name, points in (("midpoints", [0.1, 0.3, 0.5, 0.7, 0.9]),
                             ("published", [0.0, 0.2, 0.4, 0.6, 0.8])):
            total = 0.0
            for point in points:
                h0 = (corrupted + point * line).requires_grad_()
                m = metric(subject.logits(h0, batch["last"]), batch).mean()
                total -= (torch.autograd.grad(m, h0)[0] * line).sum().item() / len(points)
            errors[name] += abs(total - want)
    assert errors["midpoints"] < errors["published"]


class Same(nn.Module):
    """The identity, as a new tensor: gradients at its output are not those of the stream."""

    def forward(self, x):
        return x * 1


def linear():
    """A model that is linear in its embeddings: even attention, no norms, matrices for MLPs."""
    lm = backbone.Backbone(tiny_model("llama").requires_grad_(False))
    torch.manual_seed(1)
    for block in lm.blocks:
        block.mlp = nn.Linear(32, 32).requires_grad_(False)
        block.input_layernorm = Same()
        block.post_attention_layernorm = Same()
        with torch.no_grad():
            block.self_attn.q_proj.weight.zero_()
            block.self_attn.k_proj.weight.zero_()
    lm.stack.norm = Same()
    return Subject(backbone.Backbone(lm.model))


def test_on_a_linear_model_eap_is_exact_patching():
    subject = linear()
    batch = batch_of()
    edges = every_edge(subject.graph())
    exact = patch(subject, batch, edges[::2])
    scores = attribute(subject, [batch], 0)
    guess = torch.stack([scores[edge] for edge in edges[::2]])
    assert exact.abs().max() > 1e-2
    assert torch.allclose(exact, guess, atol=2e-4 * float(exact.abs().max()))
    other = subject_of("llama")                         # with attention and norms it is not
    exact = patch(other, batch, edges[::5])
    scores = attribute(other, [batch], 0)
    guess = torch.stack([scores[edge] for edge in edges[::5]])
    assert not torch.allclose(exact, guess, atol=0.1 * float(exact.abs().max()))


def test_patching_every_edge_into_the_logits_is_the_corrupted_run_there():
    subject = linear()
    batch = batch_of()
    last = len(subject.graph().receivers) - 1
    edges = [(s, last) for s in range(subject.graph().before[last])]
    total = patch(subject, batch, edges).sum().item()
    assert total == pytest.approx(difference(subject, batch), rel=1e-3)


@pytest.mark.parametrize("family", FEW)
def test_small_changes_are_patched_as_attributed(family):
    """Where the corrupted prompt is near the clean one, first order is exact, at every receiver."""
    subject = subject_of(family)
    batch = batch_of()
    table = subject.lm.model.get_input_embeddings().weight
    with torch.no_grad():
        old = batch["clean"][:, 4].clone()
        new = torch.arange(5)
        batch["clean"][:, 4] = 10 + new
        batch["corrupted"][:, 4] = 20 + new
        table[20 + new] = table[10 + new] + 1e-3 * table[old]
    graph = subject.graph()
    edges = every_edge(graph)[::3]
    scores = attribute(subject, [batch], 0)
    exact = patch(subject, batch, edges)
    guess = torch.stack([scores[edge] for edge in edges])
    kinds = [name[0] if name[0] in "ml" else name[-1] for name in graph.receivers]
    for kind in "qkvml":
        mine = [i for i, (_, r) in enumerate(edges) if kinds[r] == kind]
        slope = (exact[mine] @ guess[mine]) / (guess[mine] @ guess[mine])
        assert len(mine) > 3 and slope == pytest.approx(1, abs=0.1), kind


def test_permuted_heads_have_permuted_scores():
    one, two = [subject_of("llama", num_key_value_heads=4) for _ in range(2)]
    batch = batch_of()
    order = [2, 0, 3, 1]
    a = one.lm.blocks[1].self_attn
    b = two.lm.blocks[1].self_attn
    with torch.no_grad():
        for name in ("q_proj", "k_proj", "v_proj"):
            rows = getattr(a, name).weight.view(4, 8, 32)[order]
            getattr(b, name).weight.copy_(rows.reshape(32, 32))
        b.o_proj.weight.copy_(a.o_proj.weight.view(32, 4, 8)[:, order].reshape(32, 32))
    first = attribute(one, [batch], 2)
    second = attribute(two, [batch], 2)
    graph = one.graph()
    rows = list(range(len(graph.senders)))
    columns = list(range(len(graph.receivers)))
    for new, old in enumerate(order):
        rows[graph.senders.index(f"a1.{new}")] = graph.senders.index(f"a1.{old}")
        for part in "qkv":
            there = graph.receivers.index(f"a1.{new}.{part}")
            columns[there] = graph.receivers.index(f"a1.{old}.{part}")
    assert torch.allclose(second, first[rows][:, columns], atol=1e-5)
    assert not torch.allclose(second, first, atol=1e-3)


def test_an_untouched_component_has_no_attribution():
    subject = subject_of("llama")
    batch = batch_of()
    graph = subject.graph()
    with torch.no_grad():
        subject.lm.blocks[2].self_attn.o_proj.weight[:, 8:16] = 0       # head a2.1 writes nothing
        subject.lm.blocks[1].mlp.down_proj.weight.zero_()               # neither does m1
    scores = attribute(subject, [batch], 3)
    for name in ("a2.1", "m1"):
        s = graph.senders.index(name)
        assert scores[s].abs().max() == 0
        edges = [edge for edge in every_edge(graph) if edge[0] == s]
        assert patch(subject, batch, edges).abs().max() < 1e-5
    for receiver in ("m1", "a2.1.q"):                   # what they read does not matter either
        assert scores[:, graph.receivers.index(receiver)].abs().max() == 0
    assert scores[:, graph.receivers.index("a2.0.q")].abs().max() > 0


def test_scores_do_not_depend_on_how_pairs_are_batched():
    subject = subject_of("qwen3")
    batch = batch_of(6)
    whole = attribute(subject, [batch], 2)
    assert torch.allclose(whole, attribute(subject, circuits.split(batch, 4), 2), atol=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "gemma3", "olmo2", "gpt_neox", "granite"])
def test_models_whose_heads_do_not_add_up_are_refused_by_name(family):
    model_type = {"gemma3": "gemma3_text"}.get(family, family)
    with pytest.raises(UserError, match=f"this one is a {model_type}"):
        subject_of(family)


def test_zeroing_is_what_it_says():
    subject = subject_of("llama")
    batch = batch_of()
    with torch.no_grad():
        before = answers(subject, batch)
        with without(subject, ["a1.2", "m3"]):
            now = answers(subject, batch)
        again = answers(subject, batch)
        subject.lm.blocks[1].self_attn.o_proj.weight[:, 16:24] = 0
        subject.lm.blocks[3].mlp.down_proj.weight.zero_()
        want = answers(subject, batch)
    assert torch.equal(before, again)
    assert torch.allclose(now, want, atol=1e-5) and not torch.allclose(now, before)


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


class Named:
    def __init__(self, name, kind):
        self.name = name
        self.kind = kind


def test_overlaps_compare_what_they_say():
    subjects = [Named("AR", "AR"), Named("a", "w = 0"), Named("b", "w = 0")]
    circuit = {("AR", 0): {1, 2}, ("AR", 1): {1, 3}, ("a", 0): {1, 2}, ("a", 1): {4, 5},
               ("b", 0): {2, 3}, ("b", 1): {1, 3}}
    found = attribution.overlaps(circuit, subjects)
    assert found["AR"] == {"ar": [], "prompts": [1 / 3], "seeds": []}
    assert found["w = 0"] == {"ar": [1, 0, 1 / 3, 1], "prompts": [0, 1 / 3], "seeds": [1 / 3, 0]}


def test_other_tasks_are_compared_on_the_same_set_in_the_ar_model_alone():
    edges = torch.ones(2, 2, dtype=torch.bool)
    scores = {}
    for name, s, task in product(("AR", "a"), range(2), ("x", "y")):
        score = torch.zeros(2, 2)
        score[0, 0 if task == "x" else s] = 1.0
        scores[name, s, task] = score
    assert attribution.other_tasks(scores, edges, 1) == [1, 0]      # set 0, set 1


# -------------------------------------------------------------------------------------------------
# The stage

@pytest.fixture(scope="module")
def tokenizer(text):
    return data.train_tokenizer(data.resolve(str(text)), 1024)


def pair_of_models(tokenizer, family="llama"):
    """An AR model and a masked one of other weights, for a vocabulary with a mask."""
    size = dict(vocab_size=len(tokenizer) + 1, pad_token_id=0, bos_token_id=0, eos_token_id=0,
                initializer_range=0.1)
    lm = backbone.Backbone(tiny_model(family, 1, **size).requires_grad_(False))
    student = masked.Student(lm, len(tokenizer))
    return subject_of(family, **size), Subject(lm, student, "masked, seed 0", "masked")


def test_each_model_reads_a_prompt_in_its_way(tokenizer):
    """An AR model the right side first; a masked one finds a mask at the answer's place."""
    ar, twin = pair_of_models(tokenizer)
    M = twin.student.mask_id
    middle = tasks.Prompt([11, 12], [13, 14], 5)
    ending = tasks.Prompt([21, 22, 23, 24], [], 6)
    for prompt, turned, whole in ((middle, [0, 13, 14, 11, 12], [0, 11, 12, M, 13, 14]),
                                  (ending, [0, 21, 22, 23, 24], [0, 21, 22, 23, 24, M])):
        pair = [(prompt, prompt._replace(answer=7))]
        batch = circuits.make_batch(pair, ar, 0)
        assert batch["clean"].tolist() == [turned] and batch["wrong"].tolist() == [7]
        with torch.no_grad():
            want = ar.lm.head(ar.lm.through(ar.lm.embed(batch["clean"]), 0, ar.lm.L))[:, -1]
            assert torch.allclose(answers(ar, batch), want, atol=1e-5)

        batch = circuits.make_batch(pair, twin, 0)
        assert batch["clean"].tolist() == [whole] and batch["answer"].tolist() == [prompt.answer]
        ids = torch.tensor([whole])
        with torch.no_grad():
            *_, normed = twin.student.states(ids, ids == M)
            want = twin.student.logits(normed)[:, whole.index(M) - 1]   # the state before the mask
            got = answers(twin, batch)
            assert torch.allclose(got, want, atol=1e-5)
            changed = batch["clean"].clone()
            changed[0, -1 if prompt.right else 1] = 99                  # both sides are seen
            other = answers(twin, {**batch, "clean": changed})
            assert not torch.allclose(other[0, :5], got[0, :5], atol=1e-4)


def test_models_with_token_blocks_are_asked_what_they_solve_but_not_analysed(tokenizer, monkeypatch):
    """One token block as long as the text is two-way attention."""
    ar, twin = pair_of_models(tokenizer)
    pieces = tasks.Pieces(tokenizer)
    pairs = tasks.examples("infill", pieces, 8, seed=0)
    batch = circuits.make_batch(pairs, twin, 0)
    blocks = masked.Student(twin.lm, twin.student.mask_id, masked.Arm("block", 32))
    blocks = Subject(twin.lm, blocks, "blocks", "blocks")
    with torch.no_grad():
        want = answers(twin, batch).argmax(-1)
        for subject in (twin, blocks):
            choice = circuits.first_choice(subject, batch["clean"], batch["last"])
            assert torch.equal(choice, want)
    monkeypatch.setattr(circuits, "solved", all_solved)
    cfg = circuits.Config(pairs=4, resamples=1, ig_steps=1, k=20)
    result, _ = circuits.study("infill", [ar, twin, blocks], pieces, 0, cfg)
    assert result["solved"]["blocks"] == 1 and set(result["overlap"]) == {"AR", "masked"}


def test_attribution_of_a_masked_model_is_complete(tokenizer):
    _, twin = pair_of_models(tokenizer)
    pairs = tasks.examples("infill", tasks.Pieces(tokenizer), 6, seed=0)
    batch = circuits.make_batch(pairs, twin, 0)
    want = difference(twin, batch)
    total = attribute(twin, [batch], 30)[0].sum().item()
    assert total == pytest.approx(want, rel=0.05, abs=1e-3)


def all_solved(subject, batch):
    return torch.ones(len(batch["clean"]), dtype=torch.bool)


@pytest.mark.parametrize("family", FEW)
def test_a_study(family, tokenizer, monkeypatch):
    monkeypatch.setattr(circuits, "solved", all_solved)
    subjects = pair_of_models(tokenizer, family)
    cfg = circuits.Config(pairs=4, resamples=2, ig_steps=1, k=20)
    pieces = tasks.Pieces(tokenizer)
    result, scores = circuits.study("brackets", subjects, pieces, 0, cfg)
    assert result["pairs"] == 4 and len(scores) == 4
    assert all(score.abs().sum() > 0 for score in scores.values())
    assert 0 <= min(result["overlap"]["masked"]["ar"]) < 1
    batch = circuits.make_batch(tasks.examples("brackets", pieces, 8, seed=0), subjects[1], 0)
    fine = attribute(subjects[1], [batch], 10)
    graph = subjects[1].graph()
    edges = [divmod(e, fine.shape[1]) for e in attribution.strongest(fine, graph.edges(), 4)]
    edges = sorted(edges) + every_edge(graph)[::20]
    guess = [fine[edge] for edge in edges]
    assert np.corrcoef(patch(subjects[1], batch, edges), guess)[0, 1] > 0.5


def test_a_study_uses_what_all_able_models_solve(tokenizer, monkeypatch):
    """Of eight prompts a set the AR model solves 1 to 5, one twin 0 to 4, a second of its kind all,
    a third model none."""
    ar, _ = pair_of_models(tokenizer)
    subjects = [ar, Subject(ar.lm, None, "a", "twin"), Subject(ar.lm, None, "b", "twin"),
                Subject(ar.lm, None, "poor", "poor")]
    rows = {"AR": slice(1, 6), "a": slice(0, 5), "b": slice(0, 8), "poor": slice(0, 0)}

    def solved(subject, batch):
        right = torch.zeros(len(batch["clean"]), dtype=torch.bool)
        right[rows[subject.name]] = True
        return right
    monkeypatch.setattr(circuits, "solved", solved)
    cfg = circuits.Config(pairs=2, resamples=2, ig_steps=1, k=20)
    pieces = tasks.Pieces(tokenizer)
    result, scores = circuits.study("missing", subjects, pieces, 0, cfg)
    assert result["pairs"] == 2 and set(result["overlap"]) == {"AR", "twin"}
    assert len(scores) == 6 and result["solved"]["poor"] == 0
    overlap = result["overlap"]["twin"]
    assert overlap["seeds"] == [1, 1] and overlap["ar"] == [1, 1, 1, 1]
    assert result["overlap"]["AR"]["prompts"][0] < 1
    rows["AR"] = slice(2, 6)                            # 3 prompts are left in common
    assert circuits.study("missing", subjects, pieces, 0, cfg)[0]["pairs"] == 0


def test_zeroed_components_carry_the_circuit_and_controls_exist():
    subject = subject_of("llama", num_hidden_layers=2)
    batch = batch_of()
    graph = subject.graph()
    scores = torch.zeros(len(graph.senders), len(graph.receivers)).double()
    for name in ("m0", "m1", "a0.0"):
        scores[graph.senders.index(name), -1] = 5.0
    found = circuits.zeroing(subject, batch, scores, circuits.Config(k=3))
    assert set(found["components"]) == {"m0", "m1", "a0.0"}
    assert all(0 <= found[name] <= 1 for name in ("intact", "strongest", "random"))


def test_the_stage_runs_and_refuses(runs, tmp_path, capsys, monkeypatch):
    argv = ["--model", runs / "toy", "--converted", runs / "convert" / "w0", runs / "convert" / "w10",
            "--pairs", 4, "--resamples", 2, "--ig_steps", 2, "--k", 20]
    argv = [str(a) for a in argv]
    out = tmp_path / "c"
    result = circuits.main([*argv, "--tasks", "countdown", "--out", str(out)])
    task = result["tasks"]["countdown"]                 # a tiny model solves nothing
    assert task["pairs"] == 0 and task["overlap"] == {} and set(task["solved"]) == {
        x["name"] for x in result["subjects"]}
    assert not (out / "circuits.png").exists()          # there is nothing to plot

    monkeypatch.setattr(circuits, "solved", all_solved)
    out = tmp_path / "one"
    result = circuits.main([*argv, "--tasks", "missing", "--out", str(out)])
    assert result["other_tasks"] == [] and (out / "circuits.png").stat().st_size > 5000

    out = tmp_path / "d"
    result = circuits.main([*argv, "--out", str(out)])
    assert [x["kind"] for x in result["subjects"]] == ["AR", "untrained", "converted, w = 0",
                                                       "converted, w = 10"]
    for task in result["tasks"].values():
        overlap = task["overlap"]
        assert len(overlap["converted, w = 0"]["ar"]) == 2 and overlap["untrained"]["ar"]
        assert len(task["zeroing"]["AR"]["components"]) == 3
    assert len(result["other_tasks"]) == 2 * 15 and 0 < np.mean(result["other_tasks"]) < 1
    assert (out / "circuits.png").stat().st_size > 5000
    assert json.loads((out / "result.json").read_text())["edges"] == result["edges"]
    capsys.readouterr()
    assert circuits.main([*argv, "--out", str(out)]) == json.loads(
        (out / "result.json").read_text())              # finished: it prints its table
    table = capsys.readouterr().out
    values = result["tasks"]["induction"]["overlap"]["converted, w = 10"]["ar"]
    assert f"| {plus_minus(values, '.2f')} |" in table and "| untrained |" in table

    out = tmp_path / "e"
    argv = ["--model", runs / "toy", "--out", out]
    assert "is unknown" in fails(capsys, circuits.main, *argv, "--tasks", "chess")
    twins = ["--converted", runs / "convert" / "w0"]
    other = runs / "convert" / "w0"                     # a model that no twin was made of
    tiny_model("llama").save_pretrained(tmp_path / "other")
    refused = fails(capsys, circuits.main, "--model", tmp_path / "other", "--out", out, *twins)
    assert str(other) in refused and "repr_align.py" in refused
    refused = fails(capsys, circuits.main, "--model", tmp_path / "other", "--out", out)
    assert "repr_align.py" in refused
    assert not out.exists()


def test_converted_models_are_found_near_the_model(runs):
    cfg = circuits.Config()
    model = str(runs / "toy")
    twins = circuits.find_converted(cfg, model, backbone.identity(model))
    assert [folder.name for folder, _ in twins] == ["w0", "w10"]
