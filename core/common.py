"""common.py: the plumbing that every stage shares, and no ideas. Nothing here knows about language or diffusion.

    config -> CLI        parse(Config, argv)        a dataclass field is a flag, its trailing comment is the help
    errors               UserError, @entry          one sentence on stderr and exit code 2, never a traceback
    processes            World, GradientSum, check_replicas         gloo on CPU, NCCL on GPU
    speed                peak_flops, matmul_rate    what MFU is a fraction of
"""
import argparse
import dataclasses
import difflib
import functools
import inspect
import math
import os
import re
import resource
import shutil
import signal
import sys
import textwrap
import threading
import timeit
import typing
from datetime import timedelta

import torch
import torch.distributed as dist

from core.together import give_up, leave_group, stay_together


# ----------------------------------------------------------------------------------------------------- errors
class UserError(Exception):
    """Something the user can mend. The message is one sentence that says what is wrong and what to do."""


def why(error):
    """What another library's error says, on one line."""
    return " ".join(str(error).split())[:200]


def entry(main):
    """Decorate `main(argv)`: a UserError, or an OSError such as a full disk, becomes one sentence and exit code 2."""
    @functools.wraps(main)
    def wrapped(argv=None):
        try:
            result = main(sys.argv[1:] if argv is None else argv)
            leave_group(0)
            return result
        except SystemExit as left:  # a run that was asked to stop
            leave_group(left.code)
            raise
        except (UserError, KeyboardInterrupt, BrokenPipeError) as error:        # the last: | head has read enough
            message, code = (str(error), 2) if isinstance(error, UserError) else ("stopped; start it again", 130)
        except Exception as error:  # a full disk: safetensors and shutil have errors of their own for it
            if dist.is_initialized() and (isinstance(error, dist.DistError) or "gloo" in str(error)):
                give_up()
            from_system = getattr(error, "errno", None) or isinstance(error, shutil.Error)
            if not from_system and type(error).__name__ != "SafetensorError":
                raise  # a bug, so let it be seen whole
            what, where = getattr(error, "strerror", None) or error, getattr(error, "filename", None) or "a file"
            message, code = f"{what} ({where}); free some space or choose another path", 2
        print(f"error: {message}" if code == 2 else message, file=sys.stderr)
        leave_group(code)
        raise SystemExit(code)
    return wrapped


# --------------------------------------------------------------------------------------------- config -> CLI
class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; see --help")


def parse(Config, argv, doc="", presets=None, size=None):
    """Fill the dataclass `Config` from `argv`: field default < preset < flag. `size` says which preset `auto` stands
    for, given the Config without one.

    Types are int, float, str, bool (--flag / --no-flag) and Literal (a choice). Raises UserError naming the nearest
    flag for one it does not know. A Config without a --dry_run of its own, which tells more, gets one that prints it.
    """
    argv = [re.sub(r"^--[\w-]+", lambda m: "--" + m[0][2:].replace("-", "_"), a) for a in argv]
    argv = ["--no-" + a[5:] if a.startswith("--no_") else a for a in argv]
    comments = dict(re.findall(r"^    (\w+):.*?#\s*(.*)$", inspect.getsource(Config), re.M))
    parser = Parser(description=textwrap.dedent(doc), allow_abbrev=False, argument_default=argparse.SUPPRESS,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    fields = dataclasses.fields(Config)
    for f in fields:
        help_text = f"{comments.get(f.name, '')} [{f.default}]".replace("%", "%%")
        if f.type is bool:
            how = dict(action=argparse.BooleanOptionalAction)
        elif typing.get_origin(f.type) is typing.Literal:
            how = dict(choices=typing.get_args(f.type))
        else:
            how = dict(type=f.type, metavar=f.type.__name__.upper())
        parser.add_argument(f"--{f.name}", help=help_text, **how)
    if dry := "dry_run" not in {f.name for f in fields}:
        parser.add_argument("--dry_run", action="store_true", help="print all settings, then leave")
    given, unknown = parser.parse_known_args(argv)
    dry = dry and vars(given).pop("dry_run", False)
    if unknown:
        name = unknown[0].lstrip("-").split("=")[0]
        near = difflib.get_close_matches(name, ["dry_run", *(f.name for f in fields)], n=1, cutoff=0.5)
        raise UserError(f"unknown argument {unknown[0]}; " + (f"did you mean --{near[0]}?" if near else "see --help"))
    if getattr(given, "preset", getattr(Config, "preset", None)) == "auto":
        given.preset = size(Config(**vars(given)))
    cfg = Config(**{**(presets or {}).get(getattr(given, "preset", None), {}), **vars(given)})
    for f in fields:
        value = getattr(cfg, f.name)
        least = 0 if "(0:" in comments.get(f.name, "") else min(f.default, 1) if f.type is int else None
        if f.type is int and value < least:  # a count makes no sense below 1, unless its help says what 0 means
            raise UserError(f"--{f.name} must be at least {least}, not {value}")
        if f.type is float and not math.isfinite(value):
            raise UserError(f"--{f.name} must be a finite number, not {value}")
    if dry:
        print("\n".join(f"  {k} = {v}" for k, v in vars(cfg).items()))
        raise SystemExit(0)
    return cfg


def pick(table, name, flag):
    """table[name]. Raises UserError that lists the known names: the lookup of every extension point."""
    if name not in table:
        raise UserError(f"{flag} {name}: there is no such one; there are {', '.join(map(str, table))}")
    return table[name]


# ------------------------------------------------------------------------------------------------- processes
@dataclasses.dataclass
class World:
    """Who this process is: `rank` of `size`, and the device it computes on."""
    rank: int
    size: int
    device: torch.device

    @property
    def main(self):
        return self.rank == 0

    def barrier(self):
        self.sum([0.0])

    def sum(self, values):
        """Sum a list of floats over all processes (one small all-reduce)."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()


def setup(device="auto"):
    """Join the process group that torchrun describes in the environment (if any) and pick the device by LOCAL_RANK."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("--device cuda was asked for but torch sees no GPU; use --device cpu")
    try:
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device == "cuda" else device)
    except RuntimeError:
        raise UserError(f"--device {device} is not a torch device; use auto, cpu or cuda") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=6))
        threading.Thread(target=stay_together, daemon=True).start()
    return World(rank, size, device)


def pick_dtype(cfg, device):
    """The torch dtype of --dtype. auto is bf16 on a GPU, fp32 on a CPU (bf16 products are ~100x slower on CPUs without
    AVX512-BF16), and is replaced in cfg: a run that moves to another device must not change its dtype unnoticed."""
    if cfg.dtype == "auto":
        cfg.dtype = "bf16" if device.type == "cuda" else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[cfg.dtype]


def split_batch(batch_size, micro_batch, world):
    """The global batch never depends on the process count. Returns (this rank's slots, sequences per micro-batch)."""
    per_rank, left = divmod(batch_size, world.size)
    micro, refusal = micro_batch or per_rank, f"--batch_size {batch_size} does not split over {world.size} processes"
    if left:
        raise UserError(f"{refusal}: use a multiple of {world.size}")
    if per_rank % micro:
        legal = [m for m in range(1, per_rank + 1) if per_rank % m == 0]
        raise UserError(f"{refusal} in micro-batches of {micro}: use --micro_batch from {legal}")
    return range(world.rank * per_rank, (world.rank + 1) * per_rank), micro


class GradientSum:
    """Sums gradients over processes: data parallelism with no wrapper, so parameter names stay clean; losses are scaled
    for it. Gradients are views of flat buckets, which hold parameters from the last to the first and travel whole: with
    `overlap` a full one while backward still works on the layers before it, else a single one at the end. `arm` comes
    before the last micro-batch's backward (needed to overlap), `finish` after it."""

    def __init__(self, params, world, overlap, bucket_bytes=25e6):
        self.overlap, self.armed, self.sent, self.buckets, self.views, parts, size = overlap, False, [], [], {}, [[]], 0
        for p in reversed(list(params)) if world.size > 1 else ():
            if overlap and parts[-1] and size + p.nbytes > bucket_bytes:
                parts.append([])
                size = 0
            parts[-1].append(p)
            size += p.nbytes
        for home, part in enumerate(parts) if parts[0] else ():
            flat = part[0].new_zeros(sum(p.numel() for p in part))
            self.buckets.append((flat, part))
            for p, view in zip(part, flat.split([p.numel() for p in part]), strict=True):
                self.views[p] = view.view_as(p)
                p.register_post_accumulate_grad_hook(functools.partial(self._ready, home))

    def arm(self):
        self.armed, self.missing = self.overlap, [len(part) for _, part in self.buckets]

    def _ready(self, home, p):
        if p.grad is not self.views[p]:                                    # of the first micro-batch
            p.grad = self.views[p].copy_(p.grad)
        if self.armed:
            self.missing[home] -= 1
            while len(self.sent) < len(self.buckets) and self.missing[len(self.sent)] == 0:
                flat, _ = self.buckets[len(self.sent)]                     # in order: the same on every rank
                self.sent.append(dist.all_reduce(flat, async_op=True))

    def finish(self):
        for flat, part in self.buckets[len(self.sent):]:
            for p in part:
                if p.grad is not self.views[p]:                            # as of an expert that no token went to
                    p.grad = self.views[p].zero_()
            self.sent.append(dist.all_reduce(flat, async_op=True))
        for work in self.sent:
            work.wait()
        self.armed, self.sent = False, []


def check_replicas(params, world, chunk=2 ** 22):
    """Raise unless every process holds the same tensors: a float64 checksum of each chunk, which knows sign and place.
    By chunks, since a GPU's dot takes no more than 2^31 - 1 elements, and a float64 copy of a model is too large."""
    if world.size > 1:
        sums = [part.double() @ torch.linspace(1, 2, len(part), dtype=torch.float64, device=part.device)
                for p in params for part in p.detach().flatten().split(chunk)]
        both = torch.stack([torch.stack(sums), -torch.stack(sums)], 1)                    # (chunks, 2)
        dist.all_reduce(both, dist.ReduceOp.MAX)
        if both.sum(1).any():                                                             # the largest - the smallest
            raise UserError("the processes no longer hold the same weights; run again from the last good state")


class StopSignal:
    """SIGTERM and SIGINT ask the loop to save and leave; `poll` makes all processes leave at the same step. A second
    signal, or one after the loop (`done`), acts at once."""
    def __init__(self, world):
        self.world, self.asked = world, False
        self.before = {sig: signal.signal(sig, self._ask) for sig in (signal.SIGTERM, signal.SIGINT)}

    def _ask(self, *_):
        self.asked = True
        self.done()

    def done(self):
        for sig, handler in self.before.items():
            signal.signal(sig, handler)

    def poll(self):
        return self.world.sum([float(self.asked)])[0] > 0


# ------------------------------------------------------------------------------------------------------ speed
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}  # dense bf16, from the vendors' data sheets


@functools.cache
def matmul_rate(n=2048):
    """FLOP/s of torch.mm at n x n in fp32 on this CPU: the best of five, about half a second."""
    a, b = torch.randn(n, n), torch.randn(n, n)
    return 2 * n ** 3 / min(timeit.repeat(lambda: torch.mm(a, b), number=1, repeat=5))


def peak_flops(device):
    """The denominator of MFU: the data sheet on a known GPU, the measured rate on a CPU, NaN when unknown."""
    if device.type == "cpu":
        return matmul_rate()
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), math.nan)


def memory_gib(device):
    """Peak memory so far: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (20 if sys.platform != "darwin" else 30)
