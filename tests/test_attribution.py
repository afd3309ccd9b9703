"""core/attribution.py: completeness, exactness on a linear model, symmetry, refusals.

`patch` is the reference: the exact effect of an edge, one run an edge. Attribution approximates it
for all edges at once."""
import contextlib

import pytest
import torch
from conftest import slow, tiny_model
from torch import nn

from core import backbone
from core.attribution import LAYOUT, Subject, attribute, metric, record, without, written
from core.common import UserError

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
