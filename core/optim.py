"""optim.py: Muon for the matrices, AdamW for the rest, one schedule of the learning rate.

    optimizers = build(model.named_parameters(), lr=0.02, lr_adam=4e-3, weight_decay=0.1)

On the toy, after the same 1,000 steps, Muon reaches 3.51 nats a token and AdamW 4.19. Muon's own
products cost about 5 W / (tokens a step) of a step: at width 576 AdamW is ahead in equal time.
torch.optim.Muon iterates in bf16, which is 100x slower on many CPUs.
"""
import math
from collections import defaultdict

import torch
import torch.distributed as dist
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from core.common import UserError


def precision(G):
    """The dtype in which G is orthogonalized."""
    return torch.float32 if G.device.type == "cpu" else torch.bfloat16


def orthogonalize(G, steps=5):
    """G (n, r, c) -> nearly the closest semi-orthogonal matrices: singular values in [0.7, 1.2].

    Newton-Schulz with the quintic of Jordan et al. 2024: X <- P X, P = a + b A + c A^2, A = X X^T.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G.to(precision(G))
    tall = X.shape[1] > X.shape[2]
    if tall:
        X = X.mT                                            # now r <= c: products are r x r
    X = X / (torch.linalg.matrix_norm(X, keepdim=True) + 1e-7)
    if X.dtype == torch.float32 and 3 * X.shape[1] < 2 * X.shape[2]:
        # Every A is a polynomial of the first, so all commute and A <- P A P. A wide X is then
        # multiplied once, by the product of all P. bf16 has too few digits for it.
        A = X @ X.mT                                        # (n, r, r)
        product = None
        for step in range(steps):
            P = torch.baddbmm(A, A, A, beta=b, alpha=c)
            P.diagonal(dim1=1, dim2=2).add_(a)
            product = P if product is None else P @ product
            if step < steps - 1:
                A = P @ A @ P
        X = product @ X
    else:
        for _ in range(steps):
            A = X @ X.mT
            X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return (X.mT if tall else X).contiguous()


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalized: every update has about the same spectral norm.

    Each process holds all weights, orthogonalizes its share of the matrices and broadcasts it."""

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0, world=None):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.rank = world.rank if world else 0
        self.size = world.size if world else 1

    def parts(self, params):
        """Lists of matrices of one shape. Part k belongs to process k modulo their number."""
        shapes = defaultdict(list)
        for p in params:
            shapes[p.shape].append(p)
        parts = []
        for matrices in shapes.values():
            count = min(len(matrices), self.size)
            parts += [matrices[i::count] for i in range(count)]
        return parts

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            # 1. Momentum, on every process
            momentum = group["momentum"]
            for p in group["params"]:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                self.state[p]["momentum"].lerp_(p.grad, 1 - momentum)
            # 2. Orthogonalize the parts of this process
            parts = self.parts(group["params"])
            updates = []
            for k, part in enumerate(parts):
                if k % self.size == self.rank:
                    gradients = [p.grad.lerp(self.state[p]["momentum"], momentum) for p in part]
                    updates.append(orthogonalize(torch.stack(gradients)))       # (n, r, c)
                else:
                    shape = (len(part), *part[0].shape)
                    updates.append(part[0].new_empty(shape, dtype=precision(part[0])))
            # 3. Send every part to all processes and apply it
            for k, (part, update) in enumerate(zip(parts, updates)):
                if self.size > 1:
                    dist.broadcast(update, k % self.size)
                rows, columns = part[0].shape
                scale = group["lr"] * max(1, rows / columns) ** 0.5
                for p, matrix in zip(part, update):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(matrix, alpha=-scale)


def build(named_parameters, lr, lr_adam, weight_decay, inside="blocks.", world=None):
    """[Muon, AdamW]. Muon gets the weight matrices whose name contains `inside` (lr = 0: none),
    AdamW the others. Norms, biases and vectors are not decayed."""
    matrices = []
    decayed = []
    plain = []
    for name, p in named_parameters:
        is_weight = p.ndim == 2 and name.endswith("weight")
        if not p.requires_grad:
            continue
        if lr > 0 and inside in name and is_weight:
            matrices.append(p)
        elif is_weight:
            decayed.append(p)
        else:
            plain.append(p)
    groups = [{"params": decayed, "weight_decay": weight_decay},
              {"params": plain, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    optimizers = [torch.optim.AdamW(groups, lr=lr_adam, betas=(0.9, 0.95), fused=True)]
    if matrices:
        optimizers.insert(0, Muon(matrices, lr, weight_decay=weight_decay, world=world))
    return optimizers


def share_at(step, steps, warmup, cooldown=1.0):
    """The share of the peak rate at `step`: linear warm-up, constant, then a linear descent to zero
    over the last `cooldown` share of the run."""
    rise = (step + 1) / max(1, warmup)
    fall = (steps - step) / max(1.0, cooldown * steps)
    return min(1.0, rise) * min(1.0, fall)


def sum_gradients(params, world):
    """Sum the gradients over all processes: one flat all-reduce after backward. Divide the loss by
    the global batch before, so that the sum is the mean."""
    if world.size == 1:
        return
    gradients = []
    for p in params:
        if p.grad is None:                                  # an expert that got no token
            p.grad = torch.zeros_like(p)
        gradients.append(p.grad)
    flat = parameters_to_vector(gradients)
    dist.all_reduce(flat)
    vector_to_parameters(flat, gradients)


def step_all(optimizers, share, norm=0.0, where=""):
    """One step at this share of the peak rates, then zero the gradients. `norm` is the gradient's:
    where it is not finite, every process stops before anything is changed."""
    if not math.isfinite(norm):
        raise UserError(f"the loss or its gradient is not finite at {where}; start anew with lower "
                        "--lr and --lr_adam in another --out")
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("peak_lr", group["lr"]) * share
        optimizer.step()
        optimizer.zero_grad()
