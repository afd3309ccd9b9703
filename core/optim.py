"""optim.py: Muon for the matrices, AdamW for the rest, one learning-rate schedule.

    optimizers = build(named_parameters, lr=0.02, lr_adam=4e-3, weight_decay=0.1)

Why not AdamW alone: on the toy, after the same 1,000 steps, Muon reaches 3.51 nats a token where AdamW reaches 4.19
(LOG.md). torch.optim.Muon iterates in bf16, which is about 100x slower on CPUs without AVX512-BF16; this one iterates
in fp32 there and stacks matrices of one shape into one product.
"""
from collections import defaultdict

import torch


def orthogonalize(G, steps=5):
    """G (n, r, c) -> the nearest semi-orthogonal matrices, roughly: every singular value ends in about [0.7, 1.2].

    Newton-Schulz with the quintic of Jordan et al. 2024 (Muon): X <- a X + (b A + c A^2) X with A = X X^T."""
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G if G.device.type == "cpu" else G.bfloat16()
    tall = X.shape[1] > X.shape[2]
    X = X.mT if tall else X                                                  # wide: the small side is multiplied
    X = X / (torch.linalg.matrix_norm(X, keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT                                                         # (n, r, r)
        X = a * X + (b * A + c * A @ A) @ X
    return (X.mT if tall else X).to(G.dtype)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalized: each update has about the same spectral norm whatever the gradient's scale."""

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = defaultdict(list)
            for p in group["params"]:
                shapes[p.shape].append(p)
            for (rows, columns), params in shapes.items():
                for p in params:
                    m = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    m.lerp_(p.grad, 1 - group["momentum"])
                ahead = [p.grad.lerp(self.state[p]["momentum"], group["momentum"]) for p in params]
                updates = orthogonalize(torch.stack(ahead)) * max(1, rows / columns) ** 0.5
                for p, update in zip(params, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])


def build(named, lr, lr_adam, weight_decay, inside="blocks."):
    """[Muon, AdamW] over named parameters: the weight matrices whose name contains `inside` go to Muon, all others to
    AdamW, without decay on what is no weight matrix (norms, biases, vectors such as a block's modulation). Every
    trainable parameter is in exactly one; lr = 0 gives all to AdamW."""
    named = [(n, p) for n, p in named if p.requires_grad]
    weight = {n: p.ndim == 2 and n.endswith("weight") for n, p in named}
    matrix = {n: lr > 0 and inside in n and weight[n] for n, p in named}
    matrices, rest = [p for n, p in named if matrix[n]], [(n, p) for n, p in named if not matrix[n]]
    adam = [{"params": [p for n, p in rest if weight[n]], "weight_decay": weight_decay},
            {"params": [p for n, p in rest if not weight[n]], "weight_decay": 0.0}]
    optimizers = [torch.optim.AdamW([g for g in adam if g["params"]], lr=lr_adam, betas=(0.9, 0.95), fused=True)]
    if matrices:
        optimizers.insert(0, Muon(matrices, lr, weight_decay=weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def share_at(step, steps, warmup, cooldown=1.0):
    """The share of the peak learning rate at `step`: a linear warm-up, constant, then a linear descent to zero over the
    last `cooldown` share of the run."""
    return min(1.0, (step + 1) / max(1, warmup)) * min(1.0, (steps - step) / max(1.0, cooldown * steps))


def step_all(optimizers, share):
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * share
        optimizer.step()
