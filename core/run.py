"""run.py: a run is a folder that explains itself, resumes when the same command is given again, and loses nothing.

    config.json    before step 1: every flag, the command, the versions
    log.jsonl      one JSON line per log step
    state.pt       while training: loadable with weights_only=True, gone when finished (kept with --keep_state)
    section.md     its own section of the report, with its figures beside it
    result.json    last: its presence means finished

Every file is written under a temporary name, fsynced and renamed. What makes two runs the same run stands in
`differences`; a Config that names flags in `MEASURES` says that they only sample, measure or report.
"""
import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.util
import json
import math
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

from core.common import UserError, memory_gib, peak_flops


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


def command():
    return " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])


def provenance(world):
    """What a number must carry to be repeated."""
    return {"command": command(), "python": platform.python_version(),
            "torch": torch.__version__, "transformers": version("transformers"), "device": str(world.device),
            "threads": torch.get_num_threads(), "processes": world.size}


def beside(out, name):
    """The folder `name` beside --out, or beside its parent (out/repr_align/w10 belongs to out)."""
    near, far = Path(out).parent / name, Path(out).parent.parent / name
    return far if not near.exists() and far.exists() else near


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
        "bucket_mb", "dry_run", "out", "publish", "track", "keep_state",  # none of it changes the result of a run,
        "model", "runs"}  # nor does a path: the weights it leads to are part of a run's identity


def differences(cfg, identity):
    """{name: (there, here)}: what the run in cfg.out was started with otherwise; None if there is no run.

    A flag that the older run does not know counts as its default, so that a fork's new flag leaves finished runs valid.
    Flags in FREE and in the Config's own MEASURES do not count at all."""
    if not (Path(cfg.out) / "config.json").exists():
        return None
    about = read_json(Path(cfg.out) / "config.json").get("dihal", {})      # Hugging Face folders share the file
    there = {**{f.name: f.default for f in dataclasses.fields(cfg)}, **about.get("config", {})}
    here = {**dataclasses.asdict(cfg), **identity}
    if there.get("dtype") == "auto":                                       # then it depended on the device
        there["dtype"] = "bf16" if "cuda" in about.get("device", "") else "fp32"
    return {k: (there.get(k), here.get(k)) for k in sorted({*there, *here} - FREE - set(getattr(cfg, "MEASURES", ())))
            if there.get(k) != here.get(k)}


def finished(cfg, identity):
    """The result of a finished run of exactly this config, or None: a stage can leave before it loads anything."""
    if differences(cfg, identity) == {} and (Path(cfg.out) / "result.json").exists():
        return read_json(Path(cfg.out) / "result.json")
    return None


def grows(cfg, differ):
    """Whether the run in cfg.out may go on to more steps: every step so far was taken as the longer run takes it.
    Raises UserError saying why not, where steps are all that differs."""
    if set(differ) != {"steps"}:
        return False
    (there, here), where = differ["steps"], f"{cfg.out} holds a run of {differ['steps'][0]} steps"
    if here < there:
        raise UserError(f"{where}, more than --steps {here}; choose another --out")
    if getattr(cfg, "schedule", "wsd") != "wsd" or getattr(cfg, "cooldown", 1.0) > 0:
        raise UserError(f"{where} whose learning rate was to end there; only a constant one (--cooldown 0) can go on, "
                        "so choose another --out")
    if not (Path(cfg.out) / "state.pt").exists():
        raise UserError(f"{where} and kept no state to go on from (--keep_state does); choose another --out")
    return True


class Run:
    """The folder --out, locked. The same command again resumes it; a folder that holds another run is refused.

    `identity` is anything beside the config that must not change under a run, e.g. the hash of the base's weights."""
    def __init__(self, cfg, world, identity):
        self.out, self.world, self.result = Path(cfg.out), world, None
        if world.main:
            track = getattr(cfg, "track", "")
            if track and importlib.util.find_spec(track) is None:
                raise UserError(f"--track {track} needs a package; install it with: pip install {track}")
            differ = differences(cfg, identity)
            if differ and not grows(cfg, differ):
                shown = ", ".join(f"{k} = {there} there, {here} here" for k, (there, here) in differ.items())
                raise UserError(f"{self.out} holds another run ({shown}); choose another --out or delete the folder")
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
            if differ and (self.out / "result.json").exists():  # it goes on to more steps: what it had stays
                os.replace(self.out / "result.json", self.out / f"result_{differ['steps'][0]}.json")
            if differ or differ is None:
                config = {**dataclasses.asdict(cfg), **identity}
                write_json(self.out / "config.json", {"dihal": {"config": config, **provenance(world)}})
            self.track = TRACKERS[track](cfg)
        self.keep_state = getattr(cfg, "keep_state", False)
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
        self.track(step, {k: v for k, v in finite.items() if isinstance(v, (int, float))})

    def progress(self, step, steps, clock, tokens, flops, **values):
        """`log` with the speed of `tokens` a step at `flops` a token: tok/s, MFU, peak memory, seconds to go."""
        seconds, done = clock.seconds(), max(1, step)
        speed = tokens * done / seconds
        self.log(step, steps, **values, **{"tok/s": speed}, mfu=speed * flops / (peak_flops(self.world.device)
                 * self.world.size), mem=memory_gib(self.world.device), eta=round((steps - step) * seconds / done))

    def save(self, step, clock, modules, optimizers, **more):
        """state.pt: all that a step depends on. Data and noise are functions of the step: no generator is in it."""
        state = {"step": step, "processes": self.world.size, "seconds": clock.seconds(), "device": self.world.device.type,
                 **more, "modules": [m.state_dict() for m in modules],
                 "optimizers": [o.state_dict() for o in optimizers]}
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
        if state.get("device", self.world.device.type) != self.world.device.type:
            self.say(f"on {self.world.device.type} instead of {state['device']}: noise drawn from here on is another")
        return state

    def leave(self, step):
        """After a save that a signal asked for."""
        self.say(f"stopped at step {step}; the same command resumes")
        self.unlock()
        raise SystemExit(143)

    def finish(self, result, section=""):
        """section.md, then result.json: the last one's presence means that everything else is there. A section begins
        with its heading and shows figures by their names in this folder."""
        self.result = {**result, "section": digest(section), **provenance(self.world)}
        if self.world.main:
            with atomic(self.out / "section.md") as temporary:
                temporary.write_text(section)
            write_json(self.out / "result.json", self.result)
            if not self.keep_state:
                (self.out / "state.pt").unlink(missing_ok=True)
        self.unlock()
        self.world.barrier()

    def unlock(self):
        if self.world.main:
            self.lock.close()


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_section(folder):
    """The section that the finished run in `folder` wrote. Raises UserError for one of another run."""
    file, result = Path(folder) / "section.md", read_json(Path(folder) / "result.json", "finish that run first")
    text = file.read_text() if file.exists() else ""
    if digest(text) != result.get("section"):
        raise UserError(f"{file} was not written by the run beside it; delete {folder} and run that stage again")
    return text


# ------------------------------------------------------------------------------------------------------- tracking
def _wandb(cfg):
    import wandb
    wandb.init(project="nanodihal", name=str(cfg.out), config=dataclasses.asdict(cfg))
    return lambda step, values: wandb.log(values, step=step)


def _tensorboard(cfg):
    from torch.utils.tensorboard import SummaryWriter
    writer = SummaryWriter(Path(cfg.out) / "tensorboard")

    def track(step, values):
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()
    return track


TRACKERS = {"": lambda cfg: lambda step, values: None, "wandb": _wandb, "tensorboard": _tensorboard}  # of --track


def card(out, title, base, about):
    """README.md of a saved model, as Hub users expect it: base_model, what it is, numbers, the command."""
    numbers = "\n".join(f"- {name}: {value:.4g}" for name, value in about.items() if isinstance(value, (int, float)))
    base = f"base_model: {base}\n" if base else ""
    with atomic(Path(out) / "README.md") as temporary:
        temporary.write_text(
            f"---\n{base}library_name: transformers\npipeline_tag: text-generation\ntags: [nanodihal, diffusion]\n---\n\n"
            f"# {title}\n\nMade by `{command()}`.\n\n{numbers}\n")


def _show(key, value):
    if key == "lr":
        return f"{value:.1e}"
    if key == "mfu":
        return f"{100 * value:.0f}%" if math.isfinite(value) else "-"
    if key == "tok/s":
        return f"{value:,.0f}"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
