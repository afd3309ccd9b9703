"""overlap.py: from the scores of edges to circuits, and what two circuits share.

    circuit = strongest(scores, edges, k=30)             # flat indices of the edges with the largest |score|
    jaccard(circuit, other), chance(30, edges.sum())     # what they share, and what two random ones would

Letters: L blocks, S senders, R receivers, k edges in a circuit, n edges in all.
"""
import itertools
import statistics
from collections import Counter

import torch


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
