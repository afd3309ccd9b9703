"""attribution.py: what each edge of a network contributes to a task, by hooks on an ordinary model.

    subject = Subject(lm)                                   # or Subject(lm, student) for a masked model
    scores = attribute(subject, batches, steps=5)           # EAP-IG: every edge at once, a few backward passes
    with without(subject, ["a1.3"]): ...                    # what the model does when a component writes nothing
    circuit = strongest(scores, edges, k=30)                # flat indices of the edges with the largest |score|
    jaccard(circuit, other), chance(30, edges.sum())        # what they share, and what two random ones would

Edge attribution patching (EAP, Syed et al. 2023) and its integrated-gradients form (EAP-IG, Hanna et al. 2024). Senders
are the embedding, each head `a1.3` and each MLP `m1` (block 1, head 3, from 0 on); receivers each head's input by q, k
and v (`a1.3.q`; grouped heads' once), each MLP's, and the logits. An edge u -> v is what of v's input u wrote.

Letters: P pairs, T tokens, D hidden width, H heads, K key heads, d channels a head, S senders, R receivers,
L blocks, k edges in a circuit, n edges in all.
"""
import contextlib
import itertools
import statistics
from collections import Counter
from typing import NamedTuple

import torch

from core.common import UserError

# model_type -> norm, attention, its output matrix and second norm in a block, where what a head or an MLP puts out
# joins the residual stream as it is: no norm or factor after it, and attention before the MLP. A test says so.
PRE_NORM = ("input_layernorm", "self_attn", "o_proj", "post_attention_layernorm")
ADDS_UP = {**dict.fromkeys(("llama", "qwen2", "qwen3", "mistral", "gemma", "olmo", "smollm3", "starcoder2"), PRE_NORM),
           "gpt2": ("ln_1", "attn", "c_proj", "ln_2")}


# ------------------------------------------------------------------------------------------------------ the graph
class Graph(NamedTuple):
    """Names of S senders and R receivers; `before` (R,) says how many senders, from the first, feed each receiver."""
    senders: list
    receivers: list
    before: list

    def edges(self):
        """(S, R) bool: which edges exist."""
        return torch.arange(len(self.senders))[:, None] < torch.tensor(self.before)[None]


class Subject:
    """A model under study, cut into the parts that the graph names. `student` is set for a masked model, whose
    attention is bidirectional and whose prompt holds a mask: its state before the mask predicts the mask's token.
    Several subjects of one `kind` differ in their training seed."""

    def __init__(self, lm, student=None, name="AR", kind="AR"):
        if lm.config.model_type not in ADDS_UP:
            raise UserError(f"the heads of a {lm.config.model_type} model are not known to simply add up in its "
                            f"residual stream (output norms? parallel blocks?); circuits are for {', '.join(ADDS_UP)}")
        self.lm, self.student, self.name, self.kind = lm, student, name, kind
        self.H = lm.config.num_attention_heads
        self.K = getattr(lm.config, "num_key_value_heads", None) or self.H
        norm1, attention, out, norm2 = ADDS_UP[lm.config.model_type]
        self.norm1, self.attention, self.norm2, self.mlp = (
            [getattr(block, part) for block in lm.blocks] for part in (norm1, attention, norm2, "mlp"))
        self.out = [getattr(a, out) for a in self.attention]
        self.joint = hasattr(self.attention[0], "c_attn")                    # one matrix for q, k, v, stored (in, out)
        self.inputs = ("c_attn",) if self.joint else ("q_proj", "k_proj", "v_proj")

    def graph(self):
        senders, receivers, before = ["embed"], [], []
        for i in range(self.lm.L):
            inputs = [f"a{i}.{h}.{part}" for part, count in (("q", self.H), ("k", self.K), ("v", self.K))
                      for h in range(count)]
            receivers, before = receivers + inputs, before + [len(senders)] * len(inputs)
            senders += [f"a{i}.{h}" for h in range(self.H)]
            receivers, before = [*receivers, f"m{i}"], [*before, len(senders)]
            senders.append(f"m{i}")
        return Graph(senders, [*receivers, "logits"], [*before, len(senders)])

    def inward(self, i, grads):
        """Gradients at q, k, v (P, T, heads * d) -> at the normed input, apart for each head: (P, T, H + 2K, D)."""
        weights, parts = [getattr(self.attention[i], name).weight for name in self.inputs], []
        weights = weights[0].T.chunk(3) if self.joint else weights
        for g, w, heads in zip(grads, weights, (self.H, self.K, self.K), strict=True):
            parts.append(torch.einsum("pthd,hde->pthe", g.unflatten(-1, (heads, -1)), w.unflatten(0, (heads, -1))))
        return torch.cat(parts, 2)

    def outward(self, i, z):
        """What the heads of block i, concatenated in z (P, T, H * d), write into the residual stream: (P, T, H, D)."""
        w = self.out[i].weight if self.joint else self.out[i].weight.T                          # (H * d, D)
        return torch.einsum("pthd,hde->pthe", z.unflatten(-1, (self.H, -1)), w.unflatten(0, (self.H, -1)))

    def embed(self, ids, place):
        """Prompts (P, T) whose answer stands before token `place` (P,) -> h[0] (P, T [+ 1], D). A masked model gets a
        mask there; an AR model what follows that place right after the first token (EOS)."""
        T, place = ids.shape[1], place[:, None]                                                # (P, 1)
        if self.student is None:
            j = torch.arange(T - 1, device=ids.device)
            turned = 1 + (j + place - 1) % (T - 1)                                             # (P, T - 1)
            return self.lm.embed(torch.cat([ids[:, :1], ids.gather(1, turned)], 1))
        j = torch.arange(T + 1, device=ids.device)[None]                                       # (1, T + 1)
        hidden_at = j == place
        return self.student.embed(ids.gather(1, (j - (j > place).long()).clamp_max(T - 1)), hidden_at)

    def logits(self, h, place):
        """h[0] (P, T, D) -> logits (P, V) of the answer: from the state before its place."""
        h = self.lm.norm(self.lm.through(h, 0, self.lm.L, self.lm.side(h, causal=self.student is None)))
        if self.student is None:
            return self.lm.unnormed_head(h[:, -1]).float()
        return self.student.logits(h[torch.arange(len(h), device=h.device), place - 1])


@contextlib.contextmanager
def record(subject, seen):
    """While open, a forward pass leaves in `seen`: x{i} and r{i}, the residual stream before block i's attention and
    MLP; q_proj{i}, k_proj{i}, v_proj{i} (GPT-2: c_attn{i}) and y{i}, the MLP's normed input, where gradients arrive;
    z{i} and m{i}, the heads side by side and the MLP's output; f, the stream before the final norm."""
    with contextlib.ExitStack() as hooks:
        def take(module, name, output=False):
            def hook(_, args, *more):
                value = more[-1] if output else args[0]
                seen[name] = value[0] if isinstance(value, tuple) else value
            register = module.register_forward_hook if output else module.register_forward_pre_hook
            hooks.enter_context(register(hook))

        for i in range(subject.lm.L):
            take(subject.norm1[i], f"x{i}")
            for name in subject.inputs:
                take(getattr(subject.attention[i], name), f"{name}{i}", output=True)
            take(subject.out[i], f"z{i}")
            take(subject.norm2[i], f"r{i}")
            take(subject.mlp[i], f"y{i}")
            take(subject.mlp[i], f"m{i}", output=True)
        take(subject.lm.norm, "f")
        yield seen


# ---------------------------------------------------------------------------------------------------- attribution
def metric(logits, batch):
    """Logit of the right answer over the wrong one, (P,)."""
    return (logits.gather(1, batch["answer"][:, None]) - logits.gather(1, batch["wrong"][:, None]))[:, 0]


def written(subject, h0, seen):
    """What each sender wrote into the stream: (P, T, S, D)."""
    parts = [h0[:, :, None]]
    for i in range(subject.lm.L):
        parts += [subject.outward(i, seen[f"z{i}"]), seen[f"m{i}"][:, :, None]]
    return torch.cat(parts, 2)


def through_norm(norm, x, g):
    """Gradients g (P, T, n, D) at the output of a norm whose input is x (P, T, D) -> at its input, for each of n."""
    x = x.detach()[:, :, None].expand_as(g).clone().requires_grad_()
    return torch.autograd.grad(norm.forward(x), x, g)[0]


def attribute(subject, batches, steps):
    """Scores (S, R), mean over pairs: the change of the metric, to first order, when the edge alone carries what it
    carries on the corrupted prompt. steps = 0 is EAP: gradients at the clean prompt. Otherwise EAP-IG: their mean at
    `steps` midpoints of the line between the corrupted embedding and the clean one.

    1 what every sender writes, corrupted minus clean  2 gradient at every receiver's input, along the line
    3 a score is the product of the two, summed over positions. Memory holds one batch of pairs."""
    graph = subject.graph()
    scores, count = torch.zeros(len(graph.senders), len(graph.receivers), dtype=torch.float64), 0
    for batch in batches:
        place, change = batch["place"], 0
        with torch.no_grad():
            clean, corrupted = (subject.embed(batch[which], place) for which in ("clean", "corrupted"))
            for h0, sign in ((corrupted, 1), (clean, -1)):
                with record(subject, {}) as seen:
                    subject.logits(h0, place)
                change = change + sign * written(subject, h0, seen)                            # (P, T, S, D)
        for way in [1.0] if not steps else [(k + 0.5) / steps for k in range(steps)]:
            h0 = (corrupted + way * (clean - corrupted)).detach().requires_grad_()
            with record(subject, {}) as seen:
                total = metric(subject.logits(h0, place), batch).sum()
            names = [f"{n}{i}" for i in range(subject.lm.L) for n in (*subject.inputs, "y")] + ["f"]
            grads = dict(zip(names, torch.autograd.grad(total, [seen[n] for n in names]), strict=True))
            column = 0
            for i in range(subject.lm.L):
                qkv = [grads[f"{n}{i}"] for n in subject.inputs]
                qkv = qkv[0].chunk(3, -1) if subject.joint else qkv
                for g, norm, x in ((subject.inward(i, qkv), subject.norm1[i], seen[f"x{i}"]),
                                   (grads[f"y{i}"][:, :, None], subject.norm2[i], seen[f"r{i}"])):
                    g, n = through_norm(norm, x, g), graph.before[column]                      # (P, T, n_r, D)
                    scores[:n, column:column + g.shape[2]] += torch.einsum(
                        "ptsd,ptrd->sr", change[:, :, :n], g).double().cpu() / max(steps, 1)
                    column += g.shape[2]
            scores[:, column] += torch.einsum("ptsd,ptd->s", change, grads["f"]).double().cpu() / max(steps, 1)
        count += len(batch["clean"])
    return scores / count


@contextlib.contextmanager
def without(subject, components):
    """While open, these senders write nothing: heads `a1.3` and MLPs `m1`."""
    with contextlib.ExitStack() as hooks:
        for name in components:
            i, _, h = name[1:].partition(".")

            def zero_head(_, args, h=h):
                z = args[0].unflatten(-1, (subject.H, -1)).clone()
                z[..., int(h), :] = 0
                return (z.flatten(-2),)
            hooks.enter_context(subject.out[int(i)].register_forward_pre_hook(zero_head) if h else
                                subject.mlp[int(i)].register_forward_hook(lambda _, __, y: torch.zeros_like(y)))
        yield


# ------------------------------------------------------------------------------------- circuits, and what they share
def strongest(scores, edges, k):
    """The k edges with the largest |score|, as a set of flat indices into (S, R)."""
    return set(scores.abs().masked_fill(~edges, -1).flatten().topk(k).indices.tolist())


def jaccard(a, b):
    return len(a & b) / len(a | b)


def chance(k, n):
    """Jaccard index of two random sets of k out of n: k^2/n in common, of 2k - k^2/n (to first order)."""
    return (k / n) / (2 - k / n)


def components(scores, edges, k, graph):
    """Per sender (S,) the sum of |score| over those of the k strongest edges that leave it or enter it. A key head that
    serves several heads is shared out among them."""
    kept = torch.zeros(scores.numel(), dtype=torch.bool)
    kept[list(strongest(scores, edges, k))] = True
    weight = scores.abs() * kept.view_as(scores)                                         # (S, R)
    total, place = weight.sum(1), {name: j for j, name in enumerate(graph.senders)}      # (S,)
    heads = Counter(name[-1] for name in graph.receivers if name.startswith("a0."))      # q: H, k and v: K
    for r, name in enumerate(graph.receivers[:-1]):                                      # the logits are no component
        block, *head = name.split(".")                                                   # m1 or a1.3.q
        group = heads["q"] // heads[head[1]] if head else 1
        owners = [f"{block}.{int(head[0]) * group + j}" for j in range(group)] if head else [block]
        for owner in owners:
            total[place[owner]] += weight[:, r].sum() / group
    return total


def gini(x):
    """Inequality of x (n,): 0 when all are equal, 1 - 1/n when one has all."""
    x, n = x.double().sort().values, len(x)
    return float(((2 * torch.arange(1, n + 1) - n - 1) * x).sum() / (n * x.sum().clamp_min(1e-30)))


def by_depth(scores, graph, L):
    """Share of |score| by the sender's block: (L + 1,), the embedding first."""
    weight, share = scores.abs().sum(1), torch.zeros(L + 1, dtype=torch.float64)
    for s, name in enumerate(graph.senders):
        share[0 if name == "embed" else 1 + int(name[1:].split(".")[0])] += weight[s]
    return share / share.sum().clamp_min(1e-30)


def shared(circuits):
    """Mean and every value of the Jaccard index over pairs of circuits [(a, b), ...]."""
    values = [jaccard(a, b) for a, b in circuits]
    return {"mean": statistics.mean(values), "values": values}


def overlaps(scores, subjects, edges, k):
    """{what: chance, or what two circuits of k edges share}, from scores {(subject, set of prompts): (S, R)}.
    The values of "AR and KIND" come twin by twin, set by set within each."""
    top, sets = {key: strongest(value, edges, k) for key, value in scores.items()}, sorted({s for _, s in scores})
    two = list(itertools.combinations(sets, 2))
    rows = {"AR, other prompts": [(top["AR", s], top["AR", t]) for s, t in two]}
    for kind in dict.fromkeys(x.kind for x in subjects if x.kind != "AR"):
        own = [x.name for x in subjects if x.kind == kind]
        rows[f"AR and {kind}"] = [(top["AR", s], top[n, s]) for n in own for s in sets]
        rows[f"{kind}, other prompts"] = [(top[n, s], top[n, t]) for n in own for s, t in two]
        rows[f"{kind}, other seed"] = [(top[n, s], top[m, s]) for n, m in itertools.combinations(own, 2) for s in sets]
    return {"chance": chance(k, int(edges.sum())), **{what: shared(pairs) for what, pairs in rows.items() if pairs}}


def other_tasks(scores, edges, k):
    """What the AR model's circuits of different tasks share, from {(subject, set, task): scores}; None for one task."""
    top = {(s, task): strongest(value, edges, k) for (name, s, task), value in scores.items() if name == "AR"}
    pairs = [(top[a], top[b]) for a, b in itertools.combinations(top, 2) if a[0] == b[0]]
    return shared(pairs) if pairs else None
