"""attribution.py: what each edge of a network contributes to a task, by hooks on an ordinary model.

    subject = Subject(lm)                                   # or Subject(lm, student): masked model
    scores = attribute(subject, batches, steps=5)           # (S, R), one score an edge
    with without(subject, ["a1.3"]): ...                    # a component writes nothing
    circuit = strongest(scores, edges, k=30)                # the edges with the largest |score|
    jaccard(circuit, other), chance(30, edges.sum())        # overlap, and that of random circuits

Edge attribution patching (EAP, Syed et al. 2023) with integrated gradients (EAP-IG, Hanna et al.
2024). Senders are the embedding, every head `a1.3` and every MLP `m1` (block 1, head 3, from 0).
Receivers are every head's input by q, k and v (`a1.3.q`; with grouped heads one k and v a group),
every MLP's input, and the logits. The edge u -> v is what of v's input u wrote.

    score(u -> v) = (u's output on the corrupted prompt - on the clean one)
                    . gradient of the metric at v's input, a mean over points of a line

The line leads from the corrupted embedding (0) to the clean one (1). Our points are the midpoints
(k + 1/2) / m, k = 0..m-1. The published code has k / m, counted from the corrupted end; midpoints
integrate with a smaller error. The metric is the logit of the right answer less the wrong one's.

Letters: P pairs, T tokens, D hidden width, H heads, d channels a head, S senders, R receivers,
k edges in a circuit, n edges in all.
"""
import contextlib
import itertools
from typing import NamedTuple

import torch

from core.common import UserError

# Families of the Llama layout, whose heads and MLPs add to the residual stream as they are: no norm
# or factor after them, attention before the MLP.
LAYOUT = ("llama", "qwen2", "qwen3", "mistral", "gemma", "olmo", "smollm3", "starcoder2")


# -------------------------------------------------------------------------------------------------
# The graph

class Graph(NamedTuple):
    senders: list       # S names
    receivers: list     # R names
    before: list        # (R,) how many senders, from the first on, feed a receiver

    def edges(self):
        """(S, R) bool: which edges exist."""
        return torch.arange(len(self.senders))[:, None] < torch.tensor(self.before)


class Subject:
    """A model under study. `student` is set for a masked model: its attention is two-way, and its
    prompt holds a mask. Subjects of one `kind` differ in their training seed."""

    def __init__(self, lm, student=None, name="AR", kind="AR"):
        if lm.config.model_type not in LAYOUT:
            raise UserError(f"circuits need a model whose heads add to its residual stream as they "
                            f"are ({', '.join(LAYOUT)}); this one is a {lm.config.model_type}")
        self.lm = lm
        self.student = student
        self.name = name
        self.kind = kind
        self.heads = lm.config.num_attention_heads
        self.key_heads = lm.config.num_key_value_heads

    def graph(self):
        senders = ["embed"]
        receivers = []
        before = []
        for i in range(self.lm.L):
            for part, heads in (("q", self.heads), ("k", self.key_heads), ("v", self.key_heads)):
                receivers += [f"a{i}.{head}.{part}" for head in range(heads)]
                before += [len(senders)] * heads
            senders += [f"a{i}.{head}" for head in range(self.heads)]
            receivers.append(f"m{i}")
            before.append(len(senders))
            senders.append(f"m{i}")
        return Graph(senders, [*receivers, "logits"], [*before, len(senders)])

    def logits(self, h, last):
        """h[0] (P, T, D) -> logits (P, V) of the answer, from the states at the tokens `last`."""
        side = self.lm.side(h, causal=self.student is None)
        h = self.lm.norm(self.lm.through(h, 0, self.lm.L, side))
        h = h[torch.arange(len(h), device=h.device), last]                          # (P, D)
        if self.student is None:
            return self.lm.unnormed_head(h).float()
        return self.student.logits(h)


@contextlib.contextmanager
def record(subject):
    """While open, a forward pass fills the yielded dict {(name, block): tensor}.

    x, r: residual stream before attention and MLP. q, k, v: projections. z: heads, side by side.
    y, m: normed input and output of the MLP. ("f", L): the stream before the final norm."""
    seen = {}
    with contextlib.ExitStack() as hooks:
        def note(key, register):
            def hook(_, args, output=None):
                seen[key] = args[0] if output is None else output
            hooks.enter_context(register(hook))

        for i, block in enumerate(subject.lm.blocks):
            attention = block.self_attn
            note(("x", i), block.input_layernorm.register_forward_pre_hook)
            note(("q", i), attention.q_proj.register_forward_hook)
            note(("k", i), attention.k_proj.register_forward_hook)
            note(("v", i), attention.v_proj.register_forward_hook)
            note(("z", i), attention.o_proj.register_forward_pre_hook)
            note(("r", i), block.post_attention_layernorm.register_forward_pre_hook)
            note(("y", i), block.mlp.register_forward_pre_hook)
            note(("m", i), block.mlp.register_forward_hook)
        note(("f", subject.lm.L), subject.lm.norm.register_forward_pre_hook)
        yield seen


# -------------------------------------------------------------------------------------------------
# Attribution

def metric(logits, batch):
    """Logit of the right answer less that of the wrong one, (P,)."""
    right = logits.gather(1, batch["answer"][:, None])
    return (right - logits.gather(1, batch["wrong"][:, None]))[:, 0]


def split_heads(x, weight, heads):
    """Each head's part of x (P, T, H * d) times its rows of weight (H * d, D): (P, T, H, D)."""
    weight = weight.unflatten(0, (heads, -1))                                       # (H, d, D)
    return torch.einsum("pthd,hde->pthe", x.unflatten(-1, (heads, -1)), weight)


def written(subject, h0, seen):
    """What each sender wrote into the stream: (P, T, S, D)."""
    parts = [h0[:, :, None]]
    for i, block in enumerate(subject.lm.blocks):
        weight = block.self_attn.o_proj.weight.T                                    # (H * d, D)
        parts.append(split_heads(seen["z", i], weight, subject.heads))
        parts.append(seen["m", i][:, :, None])
    return torch.cat(parts, 2)


def through_norm(norm, x, gradient):
    """Gradients (P, T, n, D) at the output of a norm of x (P, T, D) -> at its input."""
    x = x.detach()[:, :, None].expand_as(gradient).clone().requires_grad_()
    return torch.autograd.grad(norm.forward(x), x, gradient)[0]


def receiver_gradients(subject, h0, batch):
    """Yield the metric's gradients at the receivers' inputs in the residual stream, (P, T, n, D)
    for n receivers at a time, in the order of the graph."""
    with record(subject) as seen:
        total = metric(subject.logits(h0, batch["last"]), batch).sum()
    keys = [key for key in seen if key[0] in "qkvyf"]
    values = torch.autograd.grad(total, [seen[key] for key in keys])
    gradients = dict(zip(keys, values, strict=True))
    for i, block in enumerate(subject.lm.blocks):
        attention = block.self_attn
        inputs = torch.cat([
            split_heads(gradients["q", i], attention.q_proj.weight, subject.heads),
            split_heads(gradients["k", i], attention.k_proj.weight, subject.key_heads),
            split_heads(gradients["v", i], attention.v_proj.weight, subject.key_heads)], 2)
        yield through_norm(block.input_layernorm, seen["x", i], inputs)
        inputs = gradients["y", i][:, :, None]
        yield through_norm(block.post_attention_layernorm, seen["r", i], inputs)
    yield gradients["f", subject.lm.L][:, :, None]


def attribute(subject, batches, steps):
    """Scores (S, R), mean over pairs: the change of the metric, to first order, when the edge alone
    carries what it carries on the corrupted prompt. steps = 0 is EAP: the gradient at the clean
    prompt. Memory holds one batch of pairs."""
    graph = subject.graph()
    scores = torch.zeros(len(graph.senders), len(graph.receivers), dtype=torch.float64)
    points = [(k + 0.5) / steps for k in range(steps)] or [1.0]
    count = 0
    for batch in batches:
        # 1. What every sender writes, corrupted less clean
        outputs = []
        with torch.no_grad():
            for ids in (batch["corrupted"], batch["clean"]):
                h0 = subject.lm.embed(ids)
                with record(subject) as seen:
                    subject.logits(h0, batch["last"])
                outputs.append(written(subject, h0, seen))                          # (P, T, S, D)
            change = outputs[0] - outputs[1]
            corrupted = outputs[0][:, :, 0]
            clean = outputs[1][:, :, 0]
        # 2. Times the gradient at every receiver, at each point of the line
        for point in points:
            h0 = (corrupted + point * (clean - corrupted)).requires_grad_()
            column = 0
            for gradient in receiver_gradients(subject, h0, batch):                 # (P, T, n, D)
                n = gradient.shape[2]
                senders = graph.before[column]
                product = torch.einsum("ptsd,ptrd->sr", change[:, :, :senders], gradient)
                scores[:senders, column:column + n] += product.double().cpu() / len(points)
                column += n
        count += len(batch["clean"])
    return scores / count


@contextlib.contextmanager
def without(subject, components):
    """While open, these senders write nothing: heads `a1.3` and MLPs `m1`."""
    with contextlib.ExitStack() as hooks:
        for name in components:
            i, _, head = name[1:].partition(".")
            block = subject.lm.blocks[int(i)]

            def zero_head(_, args, head=head):
                z = args[0].unflatten(-1, (subject.heads, -1)).clone()              # (P, T, H, d)
                z[:, :, int(head)] = 0
                return (z.flatten(-2),)

            def zero_output(_, args, output):
                return torch.zeros_like(output)

            if head:
                hooks.enter_context(block.self_attn.o_proj.register_forward_pre_hook(zero_head))
            else:
                hooks.enter_context(block.mlp.register_forward_hook(zero_output))
        yield


# -------------------------------------------------------------------------------------------------
# Circuits

def strongest(scores, edges, k):
    """The k edges with the largest |score|, as a set of flat indices into (S, R)."""
    return set(scores.abs().masked_fill(~edges, -1).flatten().topk(k).indices.tolist())


def jaccard(a, b):
    return len(a & b) / len(a | b)


def chance(k, n):
    """Jaccard index of two random sets of k out of n, to first order: k^2/n in common."""
    return (k / n) / (2 - k / n)


def overlaps(circuits, subjects):
    """{kind: {comparison: Jaccard indices}} of circuits {(subject's name, set of prompts): edges}.

    ar: the AR model, same prompts. prompts: itself, other prompts. seeds: another training seed,
    same prompts. The values come subject by subject, set by set."""
    sets = sorted({s for _, s in circuits})
    result = {}
    for kind in dict.fromkeys(subject.kind for subject in subjects):
        names = [subject.name for subject in subjects if subject.kind == kind]
        pairs = {"ar": [], "prompts": [], "seeds": []}
        for name in names:
            if kind != "AR":
                pairs["ar"] += [(("AR", s), (name, s)) for s in sets]
            pairs["prompts"] += [((name, s), (name, t)) for s, t in itertools.combinations(sets, 2)]
        for name, other in itertools.combinations(names, 2):
            pairs["seeds"] += [((name, s), (other, s)) for s in sets]
        result[kind] = {}
        for comparison, keys in pairs.items():
            result[kind][comparison] = [jaccard(circuits[a], circuits[b]) for a, b in keys]
    return result


def other_tasks(scores, edges, k):
    """Jaccard indices of the AR model's circuits of every two tasks, same set of prompts, from
    scores {(subject's name, set, task): (S, R)}."""
    circuits = {}
    for (name, s, task), value in scores.items():
        if name == "AR":
            circuits[s, task] = strongest(value, edges, k)
    pairs = itertools.combinations(circuits, 2)
    return [jaccard(circuits[a], circuits[b]) for a, b in pairs if a[0] == b[0]]
