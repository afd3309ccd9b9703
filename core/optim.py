"""optim.py: Muon for the matrices, AdamW for the rest, one learning-rate schedule.

    optimizers = build(named_parameters, lr=0.02, lr_adam=4e-3, weight_decay=0.1)

On the toy, after the same 1,000 steps, Muon reaches 3.51 nats a token where AdamW reaches 4.19. But it costs some 5 W /
(tokens a step) of a step's own products: at width 576 AdamW is ahead in the same seconds (LOG.md). torch.optim.Muon
iterates in bf16, 100x slower on many CPUs; this one in fp32 there, and it shares matrices out over the processes.
"""
import math
from collections import defaultdict

import torch
import torch.distributed as dist

from core.common import UserError


def digits(G):
    """The dtype in which G is orthogonalized."""
    return torch.float32 if G.device.type == "cpu" else torch.bfloat16


def orthogonalize(G, steps=5):
    """G (n, r, c) -> the nearest semi-orthogonal matrices, roughly: every singular value ends in about [0.7, 1.2].

    Newton-Schulz with the quintic of Jordan et al. 2024 (Muon): X <- P X with P = a + b A + c A^2 and A = X X^T. In
    fp32 a wide X is multiplied once, by the product of all P: every A is a polynomial of the first, so they commute,
    and A <- P A P needs r x r products only. bf16 has too few digits for that."""
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G.to(digits(G))
    tall = X.shape[1] > X.shape[2]
    X = X.mT if tall else X                                                  # wide: the small side is multiplied
    X = X / (torch.linalg.matrix_norm(X, keepdim=True) + 1e-7)
    if X.dtype == torch.float32 and 3 * X.shape[1] < 2 * X.shape[2]:        # where that is cheaper
        A, product = X @ X.mT, None                                          # (n, r, r)
        for left in range(steps)[::-1]:
            P = torch.baddbmm(A, A, A, beta=b, alpha=c)
            P.diagonal(dim1=1, dim2=2).add_(a)
            product = P if product is None else P @ product
            A = P @ A @ P if left else None
        X = product @ X
    else:
        for _ in range(steps):
            A = X @ X.mT                                                     # (n, r, r)
            X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return (X.mT if tall else X).contiguous()


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalized: each update has about the same spectral norm whatever the gradient's scale.

    Every process holds all weights and momenta, but orthogonalizes only its part of the matrices and sends it round."""

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0, world=None):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.rank, self.size = (world.rank, world.size) if world else (0, 1)

    def parts(self, params):
        """[(rank, matrices of one shape)]: each shape in as many parts as there are processes, or matrices; the
        costliest first, each to the process that has least to do."""
        shapes, load, parts = defaultdict(list), [0] * self.size, []
        for p in params:
            shapes[p.shape].append(p)
        for some in shapes.values():
            ways = min(len(some), self.size)
            parts += [(len(some[i::ways]) * some[0].numel() * min(some[0].shape), some[i::ways]) for i in range(ways)]
        for cost, part in sorted(parts, key=lambda pair: -pair[0]):
            rank = load.index(min(load))
            load[rank] += cost
            yield rank, part

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                self.state[p]["momentum"].lerp_(p.grad, 1 - group["momentum"])
            parts, mine = list(self.parts(group["params"])), {}
            for i, (rank, part) in enumerate(parts):
                if rank == self.rank:
                    mine[i] = orthogonalize(torch.stack(                                       # (n, r, c)
                        [p.grad.lerp(self.state[p]["momentum"], group["momentum"]) for p in part]))
            for i, (rank, part) in enumerate(parts):
                (rows, columns), like = part[0].shape, part[0]
                updates = mine.pop(i) if i in mine else like.new_empty(len(part), rows, columns, dtype=digits(like))
                if self.size > 1:
                    dist.broadcast(updates, rank)
                scale = group["lr"] * max(1, rows / columns) ** 0.5
                for p, update in zip(part, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-scale)


def build(named, lr, lr_adam, weight_decay, inside="blocks.", world=None):
    """[Muon, AdamW] over named parameters: the weight matrices whose name contains `inside` go to Muon, all others to
    AdamW, without decay on what is no weight matrix (norms, biases, vectors such as a block's modulation). Every
    trainable parameter is in exactly one; lr = 0 gives all to AdamW. The processes of `world` share Muon's work."""
    named = [(n, p) for n, p in named if p.requires_grad]
    weight = {n: p.ndim == 2 and n.endswith("weight") for n, p in named}
    matrix = {n: lr > 0 and inside in n and weight[n] for n, p in named}
    matrices, rest = [p for n, p in named if matrix[n]], [(n, p) for n, p in named if not matrix[n]]
    adam = [{"params": [p for n, p in rest if weight[n]], "weight_decay": weight_decay},
            {"params": [p for n, p in rest if not weight[n]], "weight_decay": 0.0}]
    optimizers = [torch.optim.AdamW([g for g in adam if g["params"]], lr=lr_adam, betas=(0.9, 0.95), fused=True)]
    if matrices:
        optimizers.insert(0, Muon(matrices, lr, weight_decay=weight_decay, world=world))
    return optimizers


def share_at(step, steps, warmup, cooldown=1.0):
    """The share of the peak learning rate at `step`: a linear warm-up, constant, then a linear descent to zero over the
    last `cooldown` share of the run."""
    return min(1.0, (step + 1) / max(1, warmup)) * min(1.0, (steps - step) / max(1.0, cooldown * steps))


def step_all(optimizers, share, norm=0.0, where=""):
    """One step at this share of the peak rates, then no gradients. Raises UserError where the gradient's norm is not
    finite, on every process alike, before anything is changed."""
    if not math.isfinite(norm):
        raise UserError(f"the loss or its gradient stopped being finite at {where}; lower --lr and --lr_adam and run "
                        "again (the last good state is kept)")
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("peak_lr", group["lr"]) * share
        optimizer.step()
        optimizer.zero_grad()
