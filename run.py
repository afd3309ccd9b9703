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
from pathlib import Path

import torch

from common import UserError


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
    import transformers
    return {"command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]), "python": platform.python_version(),
            "torch": torch.__version__, "transformers": transformers.__version__, "device": str(world.device),
            "threads": torch.get_num_threads(), "processes": world.size}


FREE = {"device", "compile", "eval_every", "log_every", "save_every", "micro_batch", "dry_run", "out"}


class Run:
    """The folder --out. The same command again resumes it; a finished one gives back its result; another is refused.

    `identity` is anything beside the config that must not change under a run, e.g. the hash of the base's weights."""
    def __init__(self, cfg, world, identity=None):
        self.out, self.world = Path(cfg.out), world
        config = {**dataclasses.asdict(cfg), **(identity or {})}
        if world.main:
            self.out.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.out / ".lock", "w")  # flock dies with its process: a killed run leaves no stale lock
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{self.out} is in use by another run; wait for it or choose another --out") from None
            if (self.out / "config.json").exists():  # a stage that writes a Hugging Face folder shares the file
                old = read_json(self.out / "config.json").get("dihal", {}).get("config", {})
                differ = [k for k in sorted({*config, *old} - FREE) if config.get(k) != old.get(k)]
                if differ:
                    said = ", ".join(f"{k} = {old.get(k)} there, {config.get(k)} here" for k in differ)
                    raise UserError(f"{self.out} holds another run ({said}); choose another --out or delete the folder")
            elif set(os.listdir(self.out)) - {".lock"}:
                raise UserError(f"{self.out} holds files but no config.json, so it is no run; choose another --out")
            else:
                write_json(self.out / "config.json", {"dihal": {"config": config, **provenance(world)}})
        world.barrier()
        done = (self.out / "result.json").exists()
        self.result = read_json(self.out / "result.json") if done else None
        self.started = time.time()

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

    def save(self, **state):
        if self.world.main:
            with atomic(self.out / "state.pt") as temporary:
                torch.save(state, temporary)
        self.world.barrier()

    def load(self):
        """The saved state on the CPU (the model may fill the GPU), or None. Never unpickles code."""
        if not (self.out / "state.pt").exists():
            return None
        try:
            return torch.load(self.out / "state.pt", map_location="cpu", weights_only=True)
        except Exception:
            raise UserError(f"{self.out}/state.pt is damaged; delete it to start this run again") from None

    def finish(self, result):
        """result.json last: its presence means that everything else is there."""
        self.result = {**result, **provenance(self.world)}
        if self.world.main:
            write_json(self.out / "result.json", self.result)
            (self.out / "state.pt").unlink(missing_ok=True)
        self.world.barrier()


def _show(key, value):
    if key == "lr":
        return f"{value:.1e}"
    if key == "mfu":
        return f"{100 * value:.0f}%" if math.isfinite(value) else "-"
    if key == "tok/s":
        return f"{value:,.0f}"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
