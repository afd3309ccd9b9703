"""run.py: a run is a folder that explains itself, resumes when the same command is given again, and loses nothing.

    config.json    before step 1: every flag, the command, the versions
    log.jsonl      one JSON line per log step
    state.pt       while training: loadable with weights_only=True, gone when finished
    result.json    last: its presence means finished

Every file is written under a temporary name, fsynced and renamed.
"""
import contextlib
import dataclasses
import fcntl
import json
import math
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

from common import UserError, memory_gib, peak_flops


@contextlib.contextmanager
def atomic(path):
    """Yield a temporary path beside `path`; on success fsync and rename it, on failure remove it."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    text = json.dumps(value, indent=1, allow_nan=False)
    with atomic(path) as temporary:
        temporary.write_text(text + "\n")


def read_json(path, remedy="delete it and run again"):
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is missing; {remedy}") from None
    except ValueError:
        raise UserError(f"{path} is not valid JSON; {remedy}") from None


def provenance(world):
    """What a number must carry to be repeated."""
    return {"command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]), "python": platform.python_version(),
            "torch": torch.__version__, "transformers": version("transformers"), "device": str(world.device),
            "threads": torch.get_num_threads(), "processes": world.size}


class Clock:
    """Seconds of training: validation is left out, earlier sessions of the same run are counted in."""

    def __init__(self, seconds=0.0):
        self.start = time.perf_counter() - seconds

    def seconds(self):
        return time.perf_counter() - self.start

    @contextlib.contextmanager
    def paused(self):
        now = time.perf_counter()
        yield
        self.start += time.perf_counter() - now


FREE = {"device", "compile", "eval_every", "log_every", "save_every", "micro_batch", "recompute", "overlap", "jobs",
        "bucket_mb", "dry_run", "out", "publish",  # may differ when a run goes on: none of it changes the result,
        "model", "runs"}  # nor does a path: the weights it leads to are part of a run's identity


def differences(out, config):
    """What the run in `out` was started with otherwise, as text; "" if nothing; None if there is no run."""
    if not (Path(out) / "config.json").exists():
        return None
    old = read_json(Path(out) / "config.json").get("dihal", {}).get("config", {})  # Hugging Face folders share the file
    return ", ".join(f"{k} = {old.get(k)} there, {config.get(k)} here" for k in sorted({*config, *old} - FREE)
                     if config.get(k) != old.get(k))


def finished(cfg, identity):
    """The result of a finished run of exactly this config, or None: a stage can leave before it loads anything."""
    if differences(cfg.out, {**dataclasses.asdict(cfg), **identity}) == "" and (Path(cfg.out) / "result.json").exists():
        return read_json(Path(cfg.out) / "result.json")
    return None


class Run:
    """The folder --out, locked. The same command again resumes it; a folder that holds another run is refused.

    `identity` is anything beside the config that must not change under a run, e.g. the hash of the base's weights."""
    def __init__(self, cfg, world, identity):
        self.out, self.world, self.result = Path(cfg.out), world, None
        config = {**dataclasses.asdict(cfg), **identity}
        if world.main:
            differ = differences(self.out, config)
            if differ:
                raise UserError(f"{self.out} holds another run ({differ}); choose another --out or delete the folder")
            self.out.mkdir(parents=True, exist_ok=True)
            if differ is None and [f for f in os.listdir(self.out) if f != ".lock" and not f.endswith(".tmp")]:
                raise UserError(f"{self.out} holds files but no config.json, so it is no run; choose another --out")
            self.lock = open(self.out / ".lock", "w")  # flock dies with its process: a killed run leaves no stale lock
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{self.out} is in use by another run; wait for it or choose another --out") from None
            for left in self.out.glob(".*.tmp"):  # by a run that was killed while it wrote
                left.unlink()
            if differ is None:
                write_json(self.out / "config.json", {"dihal": {"config": config, **provenance(world)}})
        world.barrier()

    def say(self, text):
        if self.world.main:
            print(text, flush=True)

    def log(self, step, steps, **values):
        """One aligned line for people, one JSON line for programs."""
        if not self.world.main:
            return
        print(" | ".join([f"step {step:05d}/{steps:05d}", *(f"{k} {_show(k, v)}" for k, v in values.items()
                                                            if not isinstance(v, (list, dict)))]), flush=True)
        with open(self.out / "log.jsonl", "a") as f:
            finite = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in values.items()}
            f.write(json.dumps({"step": step, **finite}) + "\n")

    def progress(self, step, steps, clock, tokens, flops, **values):
        """`log` with the speed of `tokens` a step at `flops` a token: tok/s, MFU, peak memory, seconds to go."""
        seconds, done = clock.seconds(), max(1, step)
        speed = tokens * done / seconds
        self.log(step, steps, **values, **{"tok/s": speed}, mfu=speed * flops / (peak_flops(self.world.device)
                 * self.world.size), mem=memory_gib(self.world.device), eta=round((steps - step) * seconds / done))

    def save(self, step, clock, modules, optimizers, **more):
        """state.pt: all that a step depends on. Data and noise are functions of the step: no generator is in it."""
        state = {"step": step, "processes": self.world.size, "seconds": clock.seconds(), **more,
                 "modules": [m.state_dict() for m in modules], "optimizers": [o.state_dict() for o in optimizers]}
        if self.world.main:
            with atomic(self.out / "state.pt") as temporary:
                try:
                    torch.save(state, temporary)
                except RuntimeError as error:  # torch's own writer does not say OSError when the disk is full
                    reason = str(error).splitlines()[0]
                    raise UserError(f"{self.out}/state.pt could not be written ({reason}); free some space and run "
                                    "again: the last good state is kept") from None
        self.world.barrier()

    def resume(self, modules, optimizers):
        """Load state.pt, if there is one, into the modules and optimizers. Returns the state: step, seconds, ..."""
        if not (self.out / "state.pt").exists():
            return {"step": 0, "seconds": 0.0}
        try:  # on the CPU first, since the model may fill the GPU; never unpickles code
            state = torch.load(self.out / "state.pt", map_location="cpu", weights_only=True)
        except Exception:
            raise UserError(f"{self.out}/state.pt is damaged; delete it to start this run again") from None
        for thing, saved in zip([*modules, *optimizers], [*state["modules"], *state["optimizers"]], strict=True):
            thing.load_state_dict(saved)
        self.say(f"resuming at step {state['step']}")
        if state["processes"] != self.world.size:
            self.say(f"on {self.world.size} processes instead of {state['processes']}: equal up to rounding")
        return state

    def leave(self, step):
        """After a save that a signal asked for."""
        self.say(f"stopped at step {step}; the same command resumes")
        self.unlock()
        raise SystemExit(143)

    def finish(self, result):
        """result.json last: its presence means that everything else is there."""
        self.result = {**result, **provenance(self.world)}
        if self.world.main:
            write_json(self.out / "result.json", self.result)
            (self.out / "state.pt").unlink(missing_ok=True)
        self.unlock()
        self.world.barrier()

    def unlock(self):
        if self.world.main:
            self.lock.close()


def _show(key, value):
    if key == "lr":
        return f"{value:.1e}"
    if key == "mfu":
        return f"{100 * value:.0f}%" if math.isfinite(value) else "-"
    if key == "tok/s":
        return f"{value:,.0f}"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
