"""shard.py: blocks spread over the processes (FSDP2) for models whose training state one GPU cannot hold.

    shard([student.lm, teacher], world, dtype)          # before the optimizer is built
    thing = Whole(student, world)                       # state_dict() with whole tensors: any number of processes
    norm = clip(params, 1.0, world)                     # of all shards together
    report_size(cfg, config, world, micro, dtype)       # what one GPU would hold

Without --shard nothing here changes a model: every function takes whole tensors as they are.
"""
import math

import torch
from torch import nn

from core import backbone
from core.common import UserError
from core.conversion import flops_per_token


def shard(models, world, dtype):
    """Spread every block over the processes. What is not in a block stays whole: norms, embeddings, head."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    if world.size == 1:
        raise UserError("--shard spreads weights over processes; start it with torchrun --nproc_per_node 2 or more")
    mesh = init_device_mesh(world.device.type, (world.size,))
    how = {"mesh": mesh, "reshard_after_forward": True}                      # a block's weights go when it has run
    if dtype != torch.float32:
        how["mp_policy"] = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for lm in models:
        for block in lm.blocks:
            fully_shard(block, **how)
            block.set_gradient_divide_factor(1.0)                            # a sum: losses are scaled for that
            block.set_force_sum_reduction_for_comms(True)
        for block, following in zip(lm.blocks, lm.blocks[1:]):
            block.set_modules_to_forward_prefetch([following])               # while this one computes
        # One root that holds no weights, so that blocks share streams and fetch each other ahead in backward, too. Its
        # forward is never called (we run the blocks ourselves): without this line each block would become a root.
        outside = {p for p in lm.stack.parameters() if not is_sharded(p)}
        fully_shard(lm.stack, ignored_params=outside, **how)._get_fsdp_state()._lazy_init()


def is_sharded(tensor):
    return hasattr(tensor, "full_tensor")


def clip(params, limit, world):
    """Scale gradients down to a joint norm of `limit`; returns the norm before."""
    if not any(map(is_sharded, params)):
        return nn.utils.clip_grad_norm_(params, limit).item()
    mine = [p.grad.to_local() if is_sharded(p) else p.grad for p in params]
    squares = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64).square() for g in mine]).cpu().tolist()
    shares = sum(square for p, square in zip(params, squares, strict=True) if is_sharded(p))
    rest = sum(square for p, square in zip(params, squares, strict=True) if not is_sharded(p))
    norm = math.sqrt(world.sum([shares])[0] + rest)
    torch._foreach_mul_(mine, min(1.0, limit / (norm + 1e-6)))
    return norm


def whole(tensors, world):
    """{name: tensor} with every shard gathered, kept on the CPU of rank 0 alone: one tensor at a time, so that a GPU
    never holds more than its share. Collective: every process calls it."""
    gathered = {}
    for name, t in tensors.items():
        t = t.full_tensor() if is_sharded(t) else t
        if world.main:
            gathered[name] = t.cpu() if torch.is_tensor(t) else t
    return gathered


def distribute(t, like):
    """A whole tensor as the shard of it that `like` holds here; anything else as it is."""
    if not (is_sharded(like) and torch.is_tensor(t) and t.shape == like.shape):
        return t
    from torch.distributed.tensor import distribute_tensor  # a second of imports that few runs need
    return distribute_tensor(t.to(like.device), like.device_mesh, like.placements)


class Whole:
    """A module or an optimizer whose state is saved as whole tensors: a run may change its number of processes."""

    def __init__(self, thing, world):
        self.thing, self.world = thing, world
        self.params = [p for group in getattr(thing, "param_groups", []) for p in group["params"]]

    def state_dict(self):
        if not self.params:  # a module, each tensor once: a Backbone holds its blocks under several names
            return whole({n: p.detach() for n, p in self.thing.named_parameters()}, self.world)
        state = self.thing.state_dict()
        return {**state, "state": {i: whole(s, self.world) for i, s in state["state"].items()}}

    def load_state_dict(self, saved):
        if not self.params:
            with torch.no_grad():
                for name, p in self.thing.named_parameters():
                    p.copy_(distribute(saved[name], p))
            return
        state = {i: {k: distribute(t, self.params[i]) for k, t in s.items()} for i, s in saved["state"].items()}
        self.thing.load_state_dict({**saved, "state": state})


def report_size(cfg, config, world, micro, dtype):
    """--dry_run: parameters, gigabytes on one GPU by component (with --shard: one of 8, unless torchrun says)."""
    from transformers import AutoModelForCausalLM
    print("\n".join(f"  {k} = {v}" for k, v in vars(cfg).items()))
    with torch.device("meta"):
        lm = backbone.Backbone(AutoModelForCausalLM.from_config(config))
    inside = sum(p.numel() for p in lm.blocks.parameters())
    outside = sum(p.numel() for p in lm.parameters()) - inside
    ways = (world.size if world.size > 1 else 8) if cfg.shard else 1
    copies, teacher = (2 if cfg.context != "noisy" else 1), cfg.align_weight > 0
    tokens = micro * cfg.seq_len
    wide = getattr(config, "intermediate_size", 4 * lm.D)
    moments = 4 if cfg.lr > 0 and not cfg.shard else 8                      # bytes: Muon keeps one, AdamW two
    gb = {"student": 4 * (inside / ways + outside), "gradients": 4 * inside / ways,
          "optimizer": moments * inside / ways,
          "teacher": dtype.itemsize * (inside / ways + outside) * teacher,
          "gathered blocks": dtype.itemsize * 2 * inside / lm.L * (ways > 1),
          "copies for autocast": dtype.itemsize * inside * (ways == 1 and dtype != torch.float32),
          "activations": copies * tokens * lm.L * (16 * lm.D + 4 * wide) * dtype.itemsize,   # for backward, roughly
          "logits": 13 * tokens * lm.V}                                            # as if every token were masked
    total, flops = sum(gb.values()) / 1e9, flops_per_token(lm, cfg.seq_len, teacher, copies)
    parts = ", ".join(f"{k} {v / 1e9:.2f}" for k, v in gb.items())
    print(f"{inside + outside:,} parameters, {inside:,} of them in {lm.L} blocks; {flops:.3e} FLOPs a token\n"
          f"GB on one GPU, {ways}-way shards: {parts}; together {total:.1f}, which "
          f"{'fits' if total < 80 else 'does NOT fit'} 80 GB")
    return {"gigabytes": total, "peaks": {"train": total}, "flops_per_token": flops}
