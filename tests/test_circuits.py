"""attribution.py and circuits.py: completeness, exactness on a linear model, symmetry, and the stage.

`patch` is the reference: the exact effect of an edge, one run an edge. Attribution approximates it
for all edges at once."""
import contextlib
import json

import numpy as np
import pytest
import torch
from conftest import fails, slow, tiny_model
from test_tasks import make_pieces
from torch import nn

import circuits
from core import attribution, backbone, masked, tasks
from core.attribution import LAYOUT, Subject, attribute, metric, record, without, written
from core.common import UserError, generator
from core.report import plus_minus

# Both have grouped keys, qwen3 has norms on q and k
FAMILIES = [pytest.param("llama", marks=slow), "qwen3"]


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
        d = new.shape[-1] // subject.heads[part]
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
    with record(subject) as seen:
        before = metric(answers(subject, batch), batch)
    corrupted = written(subject, batch["corrupted"], batch["last"])                 # (P, T, S, D)
    change = corrupted - written(subject, batch["clean"], batch["last"])
    effects = []
    for s, r in edges:
        with reads(subject, subject.receivers[r], seen, change[:, :, s]):
            after = metric(answers(subject, batch), batch)
        effects.append((after - before).mean())
    return torch.stack(effects).double()


def every_edge(subject):
    return subject.edges.nonzero().tolist()


# -------------------------------------------------------------------------------------------------
# Attribution

@pytest.mark.parametrize("family", LAYOUT)
def test_what_the_parts_write_adds_up_to_the_stream(family):
    """Or a norm, a factor or another order is hidden somewhere, and an edge is not an edge."""
    subject = subject_of(family)
    batch = batch_of()
    with torch.no_grad(), record(subject) as seen:
        answers(subject, batch)
    parts = written(subject, batch["clean"], batch["last"])                         # (P, T, S, D)
    for name in ("m1", "logits"):
        r = subject.receivers.index(name)
        stream = seen["r", 1] if name == "m1" else seen["f", subject.lm.L]
        total = parts[:, :, :subject.before[r]].sum(2)
        for i, block in enumerate(subject.lm.blocks):               # biases belong to no head
            if block.self_attn.o_proj.bias is not None and (name == "logits" or i <= 1):
                total = total + block.self_attn.o_proj.bias
        assert torch.allclose(total, stream, atol=1e-4), name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_edges_that_leave_the_embedding_add_up_to_the_difference(family):
    subject = subject_of(family, num_hidden_layers=2, layer_types=None)
    batch = batch_of()
    want = difference(subject, batch)
    errors = [abs(attribute(subject, batch, steps)[0].sum().item() - want) for steps in (2, 20)]
    assert abs(want) > 1e-2
    assert errors[1] < 2e-2 * abs(want) and errors[1] < errors[0]


def test_midpoints_integrate_better_than_the_corrupted_ends_points():
    """The published code takes k / m, k = 0..m-1, from the corrupted end; ours are (k + 1/2) / m."""
    errors = {"midpoints": 0.0, "published": 0.0}
    for seed in range(2):
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
    edges = every_edge(subject)
    exact = patch(subject, batch, edges[::7])
    scores = attribute(subject, batch, 0)
    guess = torch.stack([scores[tuple(edge)] for edge in edges[::7]])
    assert exact.abs().max() > 1e-2
    assert torch.allclose(exact, guess, atol=2e-4 * float(exact.abs().max()))
    other = subject_of("llama")                         # with attention and norms it is not
    exact = patch(other, batch, edges[::15])
    scores = attribute(other, batch, 0)
    guess = torch.stack([scores[tuple(edge)] for edge in edges[::15]])
    assert not torch.allclose(exact, guess, atol=0.1 * float(exact.abs().max()))


def test_patching_every_edge_into_the_logits_is_the_corrupted_run_there():
    subject = linear()
    batch = batch_of()
    last = len(subject.receivers) - 1
    edges = [(s, last) for s in range(subject.before[last])]
    total = patch(subject, batch, edges).sum().item()
    assert total == pytest.approx(difference(subject, batch), rel=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
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
    edges = every_edge(subject)[::4]
    scores = attribute(subject, batch, 0)
    exact = patch(subject, batch, edges)
    guess = torch.stack([scores[tuple(edge)] for edge in edges])
    kinds = [name[0] if name[0] in "ml" else name[-1] for name in subject.receivers]
    for kind in "qkvml":
        mine = [i for i, (s, r) in enumerate(edges) if kinds[r] == kind]
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
    first = attribute(one, batch, 2)
    second = attribute(two, batch, 2)
    rows = list(range(len(one.senders)))
    columns = list(range(len(one.receivers)))
    for new, old in enumerate(order):
        rows[one.senders.index(f"a1.{new}")] = one.senders.index(f"a1.{old}")
        for part in "qkv":
            there = one.receivers.index(f"a1.{new}.{part}")
            columns[there] = one.receivers.index(f"a1.{old}.{part}")
    assert torch.allclose(second, first[rows][:, columns], atol=1e-5)
    assert not torch.allclose(second, first, atol=1e-3)


def test_an_untouched_component_has_no_attribution():
    subject = subject_of("llama")
    batch = batch_of()
    with torch.no_grad():
        subject.lm.blocks[2].self_attn.o_proj.weight[:, 8:16] = 0       # head a2.1 writes nothing
        subject.lm.blocks[1].mlp.down_proj.weight.zero_()               # neither does m1
    scores = attribute(subject, batch, 3)
    for name in ("a2.1", "m1"):
        s = subject.senders.index(name)
        assert scores[s].abs().max() == 0
        edges = [edge for edge in every_edge(subject) if edge[0] == s][::3]
        assert patch(subject, batch, edges).abs().max() < 1e-5
    for receiver in ("m1", "a2.1.q"):                   # what they read does not matter either
        assert scores[:, subject.receivers.index(receiver)].abs().max() == 0
    assert scores[:, subject.receivers.index("a2.0.q")].abs().max() > 0


def test_scores_do_not_depend_on_how_pairs_are_batched():
    subject = subject_of("qwen3")
    batch = batch_of(6)
    whole = attribute(subject, batch, 2)
    assert torch.allclose(whole, attribute(subject, batch, 2, micro_batch=4), atol=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "granite"])
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
        batch = circuits.make_batch([line], ar, 0)
        assert batch["clean"].tolist() == [turned]
        assert batch["answer"].tolist() == [5] and batch["wrong"].tolist() == [7]
        with torch.no_grad():
            want = ar.lm.head(ar.lm.through(ar.lm.embed(batch["clean"]), 0, ar.lm.L))[:, -1]
            assert torch.allclose(answers(ar, batch), want, atol=1e-5)

        batch = circuits.make_batch([line], converted, 0)
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


def test_models_with_token_blocks_are_asked_what_they_solve_but_not_analysed(pieces, monkeypatch):
    """One token block as long as the text is two-way attention."""
    ar, converted = pair_of_models(pieces)
    lines = tasks.examples("infill", pieces, 8, seed=0)
    batch = circuits.make_batch(lines, converted, 0)
    arm = masked.Arm("block", 32)
    student = masked.Student(converted.lm, converted.student.mask_id, arm)
    blocks = Subject(converted.lm, student, "blocks", "blocks")
    with torch.no_grad():
        want = answers(converted, batch).argmax(-1)
        for subject in (converted, blocks):
            choice = circuits.first_choice(subject, batch["clean"], batch["last"])
            assert torch.equal(choice, want)
    monkeypatch.setattr(circuits, "solved", all_solved)
    result, _ = circuits.study("infill", [ar, converted, blocks], pieces, CONFIG)
    assert result["solved"]["blocks"] == 1 and set(result["overlap"]) == {"AR", "masked"}


def test_a_masked_model_is_attributed_as_it_is_patched(pieces):
    _, subject = pair_of_models(pieces)
    batch = circuits.make_batch(tasks.examples("brackets", pieces, 6, seed=0), subject, 0)
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


def test_zeroed_components_carry_the_circuit_and_controls_exist():
    subject = subject_of("llama", num_hidden_layers=2)
    scores = torch.zeros(subject.edges.shape).double()
    for name in ("m0", "m1", "a0.0"):
        scores[subject.senders.index(name), -1] = 5.0
    zeroed = circuits.zeroing(subject, batch_of(), scores, circuits.Config(k=3))
    assert set(zeroed["components"]) == {"m0", "m1", "a0.0"}
    assert len(zeroed["random"]) == circuits.SAMPLES
    assert all(0 <= x <= 1 for x in zeroed["strongest"] + zeroed["random"])


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
        assert len(task["zeroing"]["AR"]["components"]) == 3
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
