"""attribution.py: what every edge of a network contributes to a task, by hooks on a model.

    subject = Subject(lm)                                   # or Subject(lm, student): masked model
    scores = attribute(subject, batch, steps=5)             # (S, R), one score an edge
    with without(subject, ["a1.3"]): ...                    # a component writes nothing
    circuit = strongest(scores, edges, k=30)                # the edges with the largest |score|
    jaccard(circuit, other), chance(30, edges.sum())        # overlap, and that of random circuits

Edge attribution patching (EAP, Syed et al. 2023) with integrated gradients (EAP-IG, Hanna et al.
2024). Senders are the embedding, every head `a1.3` and every MLP `m1` (block 1, head 3, from 0).
Receivers are every head's input by q, k and v (`a1.3.q`; with grouped heads one k and v a group),
every MLP's input, and the logits. The edge u -> v is the part of v's input that u wrote.

    score(u -> v) = (u's output on the corrupted prompt - on the clean one)
                    . gradient of the metric at v's input, a mean over points of a line

The line leads from the corrupted embedding (0) to the clean one (1). Our points are the midpoints
(k + 1/2) / m, k = 0..m-1. The published code has k / m, counted from the corrupted end. Midpoints
integrate with a smaller error. The metric is the logit of the right answer less the wrong one's.

Letters: P pairs, T tokens, D hidden width, H heads, d channels a head, S senders, R receivers,
k edges in a circuit, n edges in all.
"""
import contextlib
from itertools import combinations

import torch

from core.common import UserError
from core.masked import one_copy_sees

# Families of the Llama layout, whose heads and MLPs add to the residual stream as they are: no norm
# or factor after them, attention before the MLP.
LAYOUT = ("llama", "qwen2", "qwen3", "mistral", "gemma", "olmo", "smollm3", "starcoder2")


# -------------------------------------------------------------------------------------------------
# The model and its graph

class Subject:
    """A model under study. `student` is set for a masked model, whose prompt holds a mask. Subjects
    of one `kind` differ in their training seed.

    senders, receivers: names (S), (R). before (R): a receiver reads the senders up to this number.
    edges: (S, R) bool, which edges exist."""

    def __init__(self, lm, student=None, name="AR", kind="AR"):
        if lm.config.model_type not in LAYOUT:
            raise UserError(f"circuits need a model whose heads add to its residual stream as they "
                            f"are ({', '.join(LAYOUT)}); this one is a {lm.config.model_type}")
        self.lm = lm
        self.student = student
        self.by_blocks = student is not None and student.arm.attention == "block"
        self.name = name
        self.kind = kind
        key_heads = lm.config.num_key_value_heads
        self.heads = {"q": lm.config.num_attention_heads, "k": key_heads, "v": key_heads}
        self.senders = ["embed"]
        self.receivers = []
        self.before = []
        for i in range(lm.L):
            for part, heads in self.heads.items():
                self.receivers += [f"a{i}.{head}.{part}" for head in range(heads)]
                self.before += [len(self.senders)] * heads
            self.senders += [f"a{i}.{head}" for head in range(self.heads["q"])]
            self.receivers.append(f"m{i}")
            self.before.append(len(self.senders))
            self.senders.append(f"m{i}")
        self.receivers.append("logits")
        self.before.append(len(self.senders))
        self.edges = torch.arange(len(self.senders))[:, None] < torch.tensor(self.before)

    def see(self, T):
        """(1, 1, T, T) bool for a model that writes by token blocks: who sees whom while it writes
        the last one. None for the others."""
        if not self.by_blocks:
            return None
        size = self.student.arm.block_size
        see = one_copy_sees(self.student.arm, T)
        see[(T - 1) // size * size:] = True
        return see[None, None].to(self.lm.model.device)

    def logits(self, h, last):
        """h[0] (P, T, D) -> logits (P, V) of the answer, from the states at the tokens `last`."""
        side = self.lm.side(h, causal=self.student is None, see=self.see(h.shape[1]))
        h = self.lm.norm(self.lm.through(h, 0, self.lm.L, side))
        h = h[torch.arange(len(h), device=h.device), last]                          # (P, D)
        if self.student is None:
            return self.lm.unnormed_head(h).float()
        return self.student.logits(h)


# What `record` keeps of a block: a name, and the module whose output it is, or input for INPUTS
RECORDED = {
    "x": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "z": "self_attn.o_proj",
    "r": "post_attention_layernorm",
    "y": "mlp",
    "m": "mlp"}
INPUTS = "xzryf"


@contextlib.contextmanager
def record(subject):
    """While open, a forward pass fills the yielded dict {(name, block): tensor}.

    x, r: residual stream before attention and MLP. q, k, v: projections. z: all heads, joined.
    y, m: normed input and output of the MLP. ("f", L): the stream before the final norm."""
    seen = {}
    with contextlib.ExitStack() as hooks:
        def keep(name, i, module):
            def hook(_, args, output):
                seen[name, i] = args[0] if name in INPUTS else output
            hooks.enter_context(module.register_forward_hook(hook))

        for i, block in enumerate(subject.lm.blocks):
            for name, path in RECORDED.items():
                keep(name, i, block.get_submodule(path))
        keep("f", subject.lm.L, subject.lm.norm)
        yield seen


# -------------------------------------------------------------------------------------------------
# Attribution

def metric(logits, batch):
    """Logit of the right answer less that of the wrong one, (P,)."""
    rows = torch.arange(len(logits), device=logits.device)
    return logits[rows, batch["answer"]] - logits[rows, batch["wrong"]]


def split_heads(x, weight, heads):
    """Each head's part of x (P, T, H * d) times its rows of weight (H * d, D): (P, T, H, D)."""
    weight = weight.unflatten(0, (heads, -1))                                       # (H, d, D)
    return torch.einsum("pthd,hde->pthe", x.unflatten(-1, (heads, -1)), weight)


@torch.no_grad()
def written(subject, ids, last):
    """What every sender writes into the stream on prompts ids (P, T): (P, T, S, D)."""
    h0 = subject.lm.embed(ids)
    with record(subject) as seen:
        subject.logits(h0, last)
    parts = [h0[:, :, None]]
    for i, block in enumerate(subject.lm.blocks):
        weight = block.self_attn.o_proj.weight.T                                    # (H * d, D)
        parts.append(split_heads(seen["z", i], weight, subject.heads["q"]))
        parts.append(seen["m", i][:, :, None])
    return torch.cat(parts, 2)


def through_norm(norm, x, gradient):
    """Gradients (P, T, n, D) at the output of a norm of x (P, T, D) -> at its input."""
    x = x.detach()[:, :, None].expand_as(gradient).clone().requires_grad_()
    return torch.autograd.grad(norm.forward(x), x, gradient)[0]


def receiver_gradients(subject, h0, batch):
    """Yield the metric's gradients at the receivers' inputs in the residual stream, (P, T, n, D)
    for n receivers at a time, in their order."""
    with record(subject) as seen:
        total = metric(subject.logits(h0, batch["last"]), batch).sum()
    keys = [key for key in seen if key[0] in "qkvyf"]
    values = torch.autograd.grad(total, [seen[key] for key in keys])
    gradients = dict(zip(keys, values))
    for i, block in enumerate(subject.lm.blocks):
        inputs = []
        for part, heads in subject.heads.items():
            weight = block.get_submodule(RECORDED[part]).weight                     # (H * d, D)
            inputs.append(split_heads(gradients[part, i], weight, heads))
        yield through_norm(block.input_layernorm, seen["x", i], torch.cat(inputs, 2))
        inputs = gradients["y", i][:, :, None]
        yield through_norm(block.post_attention_layernorm, seen["r", i], inputs)
    yield gradients["f", subject.lm.L][:, :, None]


def attribute(subject, batch, steps, micro_batch=16):
    """Scores (S, R), mean over pairs: the change of the metric, to first order, when the edge alone
    carries what it carries on the corrupted prompt. steps = 0 is EAP: the gradient at the clean
    prompt. Memory holds `micro_batch` pairs."""
    scores = torch.zeros(subject.edges.shape, dtype=torch.float64)
    points = [(k + 0.5) / steps for k in range(steps)] or [1.0]
    count = len(batch["clean"])
    for i in range(0, count, micro_batch):
        part = {name: x[i:i + micro_batch] for name, x in batch.items()}
        # 1. What every sender writes, corrupted less clean
        corrupted = written(subject, part["corrupted"], part["last"])               # (P, T, S, D)
        clean = written(subject, part["clean"], part["last"])
        change = corrupted - clean
        # 2. Times the gradient at every receiver, at each point of the line
        start = corrupted[:, :, 0]                                                  # (P, T, D)
        line = clean[:, :, 0] - start
        for point in points:
            h0 = (start + point * line).requires_grad_()
            column = 0
            for gradient in receiver_gradients(subject, h0, part):                  # (P, T, n, D)
                end = column + gradient.shape[2]
                senders = subject.before[column]
                product = torch.einsum("ptsd,ptrd->sr", change[:, :, :senders], gradient)
                scores[:senders, column:end] += product.double().cpu() / len(points)
                column = end
    return scores / count


@contextlib.contextmanager
def without(subject, components):
    """While open, these senders write nothing: heads `a1.3` and MLPs `m1`."""
    with contextlib.ExitStack() as stack:
        for name in components:
            i, _, head = name[1:].partition(".")
            block = subject.lm.blocks[int(i)]
            if head:
                weight = block.self_attn.o_proj.weight.unflatten(1, (subject.heads["q"], -1))
                part = weight[:, int(head)]             # (D, d), a view
                stack.callback(part.copy_, part.clone())
                part.zero_()
            else:
                hook = block.mlp.register_forward_hook(lambda *args: torch.zeros_like(args[-1]))
                stack.enter_context(hook)
        yield


# -------------------------------------------------------------------------------------------------
# Circuits

def strongest(scores, edges, k):
    """The k edges with the largest |score|, as a set of flat indices into (S, R)."""
    size = scores.abs().masked_fill(~edges, -1)
    return set(size.flatten().topk(k).indices.tolist())


def jaccard(a, b):
    return len(a & b) / len(a | b)


def chance(k, n):
    """Jaccard index of two random sets of k out of n, to first order: k^2/n in common."""
    return k / (2 * n - k)


def depth_of(name, L):
    """Part of the network that a sender or receiver belongs to: the first quarter of the blocks,
    at least one block, is early; the last one is late."""
    if name in ("embed", "logits"):
        return name
    block = int(name[1:].partition(".")[0])
    quarter = max(1, L // 4)
    if block < quarter:
        return "early"
    return "late" if block >= L - quarter else "middle"


def profile(scores, subject, k):
    """Where the attribution enters the network: the share of all |score| at early, middle and late
    receivers, and the share of the k strongest edges (`concentration`)."""
    size = scores.abs() * subject.edges                                             # (S, R)
    total = size.sum()
    shares = {"early": 0.0, "middle": 0.0, "late": 0.0, "logits": 0.0}
    for name, share in zip(subject.receivers, (size.sum(0) / total).tolist()):
        shares[depth_of(name, subject.lm.L)] += share
    return {**shares, "concentration": (size.flatten().topk(k).values.sum() / total).item()}


def overlaps(circuits, kinds):
    """{kind: {comparison: Jaccard indices}} of circuits {(model, set of prompts): edges}.

    kinds: {model: kind}, the AR model first. Comparisons are "ar": with the AR model, same prompts;
    "prompts": with itself, other prompts; "seeds": with another training seed, same prompts."""
    result = {kind: {"ar": [], "prompts": [], "seeds": []} for kind in kinds.values()}
    for (a, s), (b, t) in combinations(circuits, 2):
        index = jaccard(circuits[a, s], circuits[b, t])
        if a == b:
            result[kinds[b]]["prompts"].append(index)
        elif s == t and kinds[a] == "AR":
            result[kinds[b]]["ar"].append(index)
        elif s == t and kinds[a] == kinds[b]:
            result[kinds[b]]["seeds"].append(index)
    return result


def other_tasks(circuits):
    """Jaccard indices of every two tasks, set by set, of circuits {(task, set): edges}."""
    return [jaccard(circuits[a], circuits[b])
            for a, b in combinations(circuits, 2) if a[1] == b[1]]
