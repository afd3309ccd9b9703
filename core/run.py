"""run.py: a run is a folder. The same command resumes it; another run in the folder is refused.

    config.json    before step 1: every flag, the command, the versions
    log.jsonl      one JSON line per log step
    state.pt       while training: weights and optimizers
    result.json    last: its presence means finished

Every file is written under a temporary name, synced and renamed, so a killed run loses nothing.
"""
import contextlib
import dataclasses
import fcntl
import json
import os
import sys
import time
import uuid
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist

from core.common import PEAK_FLOPS, StopSignal, UserError, memory_gib, peak_flops, show_settings

EDITION = 3

# Flags that never make another run. Paths are free: their weights are part of `identity`.
FREE = {"device", "compile", "eval_every", "log_every", "save_every", "micro_batch", "recompute",
        "dry_run", "out", "track", "model", "runs", "bridge", "bridges", "converted", "preset"}


# --------------------------------------------------------------------------------------------------
# Files

@contextlib.contextmanager
def atomic(path):
    """Yield a temporary path; on success sync and rename it to `path`, on failure remove it."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path, value):
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path, remedy="delete it and run again"):
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        fault = "damaged" if path.exists() else "missing"
        raise UserError(f"{path} is {fault}; {remedy}") from None


def nearby(out, name):
    """The folder `name` next to `out`, or next to its parent: out/convert/w10 belongs to out."""
    near = Path(out).parent / name
    far = Path(out).parent.parent / name
    mark = "meta.json" if name == "data" else "result.json"     # a folder of ours, not ./data
    return far if (far / mark).exists() and not near.exists() else near


def provenance(world):
    """What a reader needs to repeat a number."""
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return {"command": command, "torch": torch.__version__,
            "transformers": version("transformers"), "device": str(world.device),
            "threads": torch.get_num_threads(), "processes": world.size}


class Clock:
    """Seconds of training. Validation is left out, earlier sessions of the run are included."""

    def __init__(self, seconds=0.0):
        self.start = time.perf_counter() - seconds

    def seconds(self):
        return time.perf_counter() - self.start

    @contextlib.contextmanager
    def paused(self):
        now = time.perf_counter()
        yield
        self.start += time.perf_counter() - now


# --------------------------------------------------------------------------------------------------
# The same run, or another

def recorded(out):
    """The part of config.json that this project wrote in the folder `out`; None: new folder."""
    out = Path(out)
    if not list(out.glob("[!.]*")):
        return None
    record = read_json(out / "config.json", f"{out} is not a run, choose another --out")
    record = record.get("dihal", {})            # a Hugging Face model shares the file
    if record.get("edition") != EDITION:
        raise UserError(f"{out} was written by the second edition (commit d080e9e) or by another "
                        "program; choose another --out or delete the folder")
    return record


def differences(cfg, identity):
    """["lr = 0.1 there, 0.2 here", ...] against the run in cfg.out; None where there is no run.

    A flag that only one of the two knows counts as its default, so a fork's new flag leaves
    finished runs valid."""
    record = recorded(cfg.out)
    if record is None:
        return None
    there = {**defaults(cfg), **record["config"], **record["identity"]}
    here = {**record["defaults"], **dataclasses.asdict(cfg), **identity}
    here, there = json.loads(json.dumps([here, there]))         # a tuple becomes a list
    free = FREE - {*identity, *record["identity"]}
    return [f"{name} = {there.get(name)} there, {here.get(name)} here"
            for name in sorted({*there, *here} - free) if there.get(name) != here.get(name)]


def defaults(cfg):
    return dataclasses.asdict(type(cfg)())


def finished(cfg, identity):
    """The result of a finished run of exactly this config, or None. Rank 0 looks, all agree."""
    result = None
    file = Path(cfg.out) / "result.json"
    if int(os.environ.get("RANK", 0)) == 0 and file.exists() and not differences(cfg, identity):
        result = read_json(file)
    if dist.is_initialized():
        results = [result]
        dist.broadcast_object_list(results, 0)
        result = results[0]
    return result


def numbers_of(values, prefix=""):
    """The numbers of a log line or of a result, by names such as nfe.4.kl."""
    numbers = {}
    for name, value in values.items():
        if isinstance(value, dict):
            numbers |= numbers_of(value, f"{prefix}{name}.")
        elif isinstance(value, float):
            numbers[prefix + name] = value
    return numbers


class Run:
    """The folder --out, locked. `identity` is what must not change under a run beyond its flags,
    such as the hash of the base model's weights."""

    def __init__(self, cfg, world, identity):
        self.out = Path(cfg.out)
        self.world = world
        if world.main:
            self.out.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.out / ".lock", "w")       # released when the process ends
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{self.out} is in use by another run; wait for it or choose "
                                "another --out") from None
            self.begin(cfg, identity)
            self.track, self.untrack = TRACKERS[getattr(cfg, "track", "")](cfg)
        world.barrier()

    def begin(self, cfg, identity):
        """Refuse another run; write config.json for a new one."""
        changes = differences(cfg, identity)
        if changes:
            raise UserError(f"{self.out} holds another run ({'; '.join(changes)}); choose another "
                            "--out or delete the folder")
        for leftover in self.out.glob(".*.tmp"):            # of a run that was killed
            leftover.unlink()
        if changes is None:
            record = {"edition": EDITION, "config": dataclasses.asdict(cfg), "identity": identity,
                      "defaults": defaults(cfg), **provenance(self.world)}
            write_json(self.out / "config.json", {"dihal": record})

    def say(self, text):
        if self.world.main:
            print(text, flush=True)

    # --- log

    def log(self, step, steps, **values):
        """One line for people, one JSON line for programs."""
        if not self.world.main:
            return
        numbers = numbers_of(values)
        shown = [f"{name} {value:.5g}" for name, value in numbers.items()]
        print(" | ".join([f"step {step:05d}/{steps:05d}", *shown]), flush=True)
        with open(self.out / "log.jsonl", "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        self.track(numbers, step)

    def progress(self, step, steps, tokens, flops, **values):
        """`log` with the speed of `tokens` a step at `flops` a token. mfu: share of the peak."""
        seconds = self.clock.seconds()
        speed = tokens * step / seconds
        peak = peak_flops(self.world.device)
        mfu = speed * flops / (peak * self.world.size) if peak else None
        self.log(step, steps, **values, tokens_per_s=speed, mfu=mfu,
                 mem_gib=memory_gib(self.world.device), eta_s=(steps - step) * seconds / step)

    # --- state

    def steps(self, first, last):
        """range(first, last). Meanwhile a signal makes `save` the last act of the process."""
        self.stop = StopSignal(self.world)
        yield from range(first, last)
        self.stop.done()

    def save(self, is_due, step, modules, optimizers, **more):
        """Write state.pt, if it is due or a signal came; the signal also ends the process. Data and
        noise are functions of the step, so the file holds no generator."""
        leaving = self.stop.poll()
        if not (is_due or leaving):
            return
        state = {**more, "step": step, "seconds": self.clock.seconds(),
                 "modules": [module.state_dict() for module in modules],
                 "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
        if self.world.main:
            with atomic(self.out / "state.pt") as temporary, open(temporary, "wb") as file:
                torch.save(state, file)         # by its name, torch hides that the disk is full
        if leaving:
            self.leave(step)

    def resume(self, modules, optimizers):
        """Load state.pt, if there is one, and start the clock. Returns the state: step, seconds and
        what `save` got."""
        state = {"step": 0, "seconds": 0.0}
        file = self.out / "state.pt"
        if file.exists():
            try:
                state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except Exception:           # torch, pickle and zip have an error each for it
                raise UserError(f"{file} is damaged; delete it to start this run again") from None
            parts = [*modules, *optimizers]
            for part, saved in zip(parts, state["modules"] + state["optimizers"], strict=True):
                part.load_state_dict(saved)
            self.say(f"resuming at step {state['step']}")
        self.clock = Clock(state["seconds"])
        return state

    def leave(self, step):
        """End the process after a save that a signal asked for."""
        self.world.barrier()                    # torchrun ends the others when the first leaves
        self.say(f"stopped at step {step}; the same command resumes")
        self.unlock()
        raise SystemExit(128 + (StopSignal.received or 15))

    def finish(self, result):
        """Write result.json, remove state.pt. Returns the result with its provenance."""
        result = {**result, **provenance(self.world)}
        if self.world.main:
            self.track(numbers_of(result), result.get("steps", 0))
            write_json(self.out / "result.json", result)
            (self.out / "state.pt").unlink(missing_ok=True)
        self.unlock()
        self.world.barrier()
        return result

    def unlock(self):
        if self.world.main:
            self.untrack()
            self.lock.close()


# --------------------------------------------------------------------------------------------------
# Tracking: a tracker is a function of the config that returns (log(numbers, step), close())

def no_tracker(cfg):
    return lambda numbers, step: None, lambda: None


def wandb_tracker(cfg):
    import wandb
    file = Path(cfg.out) / "wandb_id"           # a restarted run continues the same curve
    if not file.exists():
        write_text(file, uuid.uuid4().hex)
    session = wandb.init(project="nanodihal", name=str(cfg.out), id=file.read_text(),
                         resume="allow", config=dataclasses.asdict(cfg))
    return session.log, session.finish


def tensorboard_tracker(cfg):
    from torch.utils.tensorboard import SummaryWriter
    writer = SummaryWriter(Path(cfg.out) / "tensorboard")

    def log(numbers, step):
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
    return log, writer.close


TRACKERS = {"": no_tracker, "wandb": wandb_tracker, "tensorboard": tensorboard_tracker}


# --------------------------------------------------------------------------------------------------
# The cost of a training, and --dry_run

def training_flops(trained, frozen, layers, config, T):
    """FLOPs a token of training. The whole project counts them here.

    A trained parameter costs 6 (forward 2, backward 4), a frozen one 2. Attention costs 12 per
    channel and visible key in each of the `layers` that are trained (two products), and a causal
    token sees T / 2 keys. A frozen layer counts as 1/3, a layer with two-way attention as 2."""
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 6 * trained + 2 * frozen + 6 * layers * heads * head_size * T


def plan(cfg, world, parameters, flops_per_token, tokens, memory):
    """Print the settings and the cost of a training: `tokens` in all, memory = {part: bytes}."""
    gigabytes = {part: size / 1e9 for part, size in memory.items()}
    total = sum(gigabytes.values())
    speed = 0.4 * PEAK_FLOPS["H100"] * world.size / flops_per_token
    if world.main:
        show_settings(cfg)
        parts = ", ".join(f"{part} {size:.2f}" for part, size in gigabytes.items())
        print(f"{parameters:,} parameters are trained on {tokens:,} tokens")
        print(f"memory of one process: {total:.1f} GB ({parts})")
        print(f"{flops_per_token:.3e} FLOPs a token: {tokens / speed / 3600:.2f} hours on "
              f"{world.size} H100 at 40% MFU")
    return {"gigabytes": total, "flops_per_token": flops_per_token}
