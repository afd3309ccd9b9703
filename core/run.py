"""run.py: a run is a folder that explains itself, resumes when the same command is given again, and loses nothing.

    config.json    before step 1: every flag, the command, the versions
    log.jsonl      one JSON line per log step
    state.pt       while training: loadable with weights_only=True, gone when finished (kept with --keep_state)
    section.md     its own section of the report, with its figures beside it
    result.json    last: its presence means finished (result_N.json: what it was at N steps, before it went on to more)

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
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map_only

from core.common import UserError, memory_gib, peak_flops, pick, why


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


def write_text(path, text):
    with atomic(path) as temporary:
        temporary.write_text(text)


def write_json(path, value):
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


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
    return {"command": command(), "python": platform.python_version(), "torch": torch.__version__,
            "transformers": version("transformers"), "device": str(world.device), "threads": torch.get_num_threads(),
            "processes": world.size}


def beside(out, name):
    """The folder `name` beside --out, or beside its parent (out/repr_align/w10 belongs to out)."""
    near, far = Path(out).parent / name, Path(out).parent.parent / name
    return far if not near.exists() and far.exists() else near


FREE = {"device", "compile", "eval_every", "log_every", "save_every", "micro_batch", "recompute", "overlap", "jobs",
        "bucket_mb", "cache_states", "dry_run", "out", "publish", "track", "keep_state",  # none changes a run's result,
        "model", "runs",  # nor does a path: the weights it leads to are part of a run's identity,
        "preset"}  # nor a name for values that are compared themselves
SHOWN = {"lr": ".1e", "mfu": ".0%", "tok/s": ",.0f"}  # in a line of the log


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


def measures(cfg):
    """{flag: value} of the flags that only sample, measure or report: kept in result.json, beside what they shaped."""
    return {name: getattr(cfg, name) for name in getattr(cfg, "MEASURES", ())}


def defaults(cfg):
    return {f.name: f.default for f in dataclasses.fields(cfg) if f.default is not dataclasses.MISSING}


def differences(cfg, identity):
    """{name: (there, here)}: what the run in cfg.out was started with otherwise; None if there is no run.

    A flag that only one of the two knows counts as its default, so that a fork's new flag, or one it took out, leaves
    finished runs valid. Flags in FREE and in the Config's own MEASURES do not count at all."""
    if not (Path(cfg.out) / "config.json").exists():
        return None
    about = read_json(Path(cfg.out) / "config.json").get("dihal", {})      # Hugging Face folders share the file
    there = {**defaults(cfg), **about.get("config", {})}
    here = {**about.get("defaults", {}), **dataclasses.asdict(cfg), **identity}
    names = sorted({*there, *here} - FREE - set(measures(cfg)))
    return {k: (there.get(k), here.get(k)) for k in names if there.get(k) != here.get(k)}


def _words(differ):
    return ", ".join(f"{k} = {there} there, {here} here" for k, (there, here) in differ.items())


def finished(cfg, identity, quiet=False):
    """The result of a finished run of exactly this config, or None: a stage can leave before it loads anything. Says so
    where that run was measured by other flags than these, unless `quiet`. Of several processes the first one looks."""
    if not dist.is_initialized():
        return look(cfg, identity, quiet)
    found = [look(cfg, identity, quiet) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found, 0)
    if found[0] is None and not getattr(cfg, "dry_run", False):
        refuse_unshared(Path(cfg.out))
    return found[0]


def look(cfg, identity, quiet):
    """What this process finds in cfg.out: see `finished`."""
    if differences(cfg, identity) != {} or not (Path(cfg.out) / "result.json").exists():
        return None
    result = read_json(Path(cfg.out) / "result.json")
    here, there = measures(cfg), result.get("measures", {})
    if not quiet and (otherwise := {k: (there[k], here[k]) for k in there if k in here and there[k] != here[k]}):
        print(f"{cfg.out} was measured otherwise ({_words(otherwise)}): its numbers are shown")
    return result


def refuse_unshared(out, patience=20):
    """Raise UserError on every process where one does not see, within `patience` seconds, what the first one writes
    into `out`: on several nodes it would neither resume from the same state nor find the weights at the end."""
    name, main = [f".seen{time.time_ns()}.tmp"], dist.get_rank() == 0
    if main:
        out.mkdir(parents=True, exist_ok=True)
        (out / name[0]).touch()
    dist.broadcast_object_list(name, 0)
    deadline = time.monotonic() + patience
    while not (seen := (out / name[0]).exists()) and time.monotonic() < deadline:      # network disks take a moment
        time.sleep(0.5)
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, seen)
    if main:
        (out / name[0]).unlink()
    if not all(everyone):
        raise UserError(f"process {everyone.index(False)} does not see what process 0 writes in {out}; on several "
                        "nodes --out must be on a disk that all of them share")


def grows(cfg, differ):
    """Whether the run in cfg.out may go on to more steps: every step so far was taken as the longer run takes it.
    Raises UserError saying why not, where steps are all that differs."""
    if set(differ) != {"steps"} or not hasattr(cfg, "keep_state"):         # a study's steps are those of its bridges
        return False
    out, (there, here) = Path(cfg.out), differ["steps"]
    if here < there:
        reason = f"which is more than --steps {here}"
    elif cfg.cooldown > 0:
        reason = "whose learning rate was to end there: only a constant one (--cooldown 0) can go on"
    elif (out / "result.json").exists() and not (out / "state.pt").exists():
        reason = "which kept no state to go on from (--keep_state does)"
    else:
        return True
    raise UserError(f"{out} holds a run of {there} steps, {reason}; choose another --out")


def claim(out):
    """The folder `out`, made if missing, locked. Raises UserError for a folder that is no run or is in use."""
    out.mkdir(parents=True, exist_ok=True)
    names = {f for f in os.listdir(out) if f != ".lock" and not f.endswith(".tmp")}
    if names and "config.json" not in names:
        raise UserError(f"{out} holds files but no config.json, so it is no run; choose another --out")
    lock = open(out / ".lock", "w")                # flock dies with its process: a killed run leaves no stale lock
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise UserError(f"{out} is in use by another run; wait for it or choose another --out") from None
    return lock


def begin(cfg, world, identity):
    """Check that the run in the locked folder cfg.out is this one, and write config.json where it is new or grows."""
    out, differ = Path(cfg.out), differences(cfg, identity)
    if differ and not grows(cfg, differ):
        raise UserError(f"{out} holds another run ({_words(differ)}); choose another --out or delete the folder")
    for left in out.glob(".*.tmp"):                # by a run that was killed while it wrote
        left.unlink()
    if differ == {}:
        return
    # A run that grows: the result goes first. Killed before config.json follows, the folder holds the shorter run,
    # unfinished at its last step, and either length goes on from there; the other order would leave the shorter run's
    # result as that of the longer one. What a saved model has in config.json stays: its weights are still there.
    if differ and (out / "result.json").exists():
        os.replace(out / "result.json", out / f"result_{differ['steps'][0]}.json")
    before = read_json(out / "config.json") if differ else {}
    about = {"config": {**dataclasses.asdict(cfg), **identity}, "defaults": defaults(cfg), **provenance(world)}
    write_json(out / "config.json", {**before, "dihal": about})


class Run:
    """The folder --out, locked. The same command again resumes it; a folder that holds another run is refused.

    `identity` is anything beside the config that must not change under a run, e.g. the hash of the base's weights."""

    def __init__(self, cfg, world, identity):
        self.out, self.world, self.result, self.saving = Path(cfg.out), world, None, None
        self.keep_state, self.measures = getattr(cfg, "keep_state", False), measures(cfg)
        if world.main:
            start = pick(TRACKERS, name := getattr(cfg, "track", ""), "--track")
            if name and sys.modules.get(name) is None and importlib.util.find_spec(name) is None:
                raise UserError(f"--track {name} needs a package; install it with: pip install {name}")
            self.lock = claim(self.out)
            try:
                begin(cfg, world, identity)
                self.track, self.untrack = start(cfg)
            except BaseException:
                self.lock.close()
                raise
        world.barrier()

    def say(self, text):
        if self.world.main:
            print(text, flush=True)

    def log(self, step, steps, **values):
        """One aligned line for people, one JSON line for programs."""
        if not self.world.main:
            return
        numbers = {k: v for k, v in values.items() if isinstance(v, (int, float))}
        shown = (f"{k} {v:{SHOWN.get(k, '.4f' if isinstance(v, float) else '')}}" for k, v in numbers.items())
        print(" | ".join([f"step {step:05d}/{steps:05d}", *shown]), flush=True)
        lost = {k: None for k, v in numbers.items() if not math.isfinite(v)}        # JSON has no NaN
        with open(self.out / "log.jsonl", "a") as f:
            f.write(json.dumps({"step": step, **values, **lost}) + "\n")
        self.track(step, {k: v for k, v in numbers.items() if k not in lost})

    def progress(self, step, steps, clock, tokens, flops, **values):
        """`log` with the speed of `tokens` a step at `flops` a token: tok/s, MFU, peak memory, seconds to go."""
        seconds, device = clock.seconds(), self.world.device
        speed = tokens * step / seconds
        self.log(step, steps, **values, **{"tok/s": speed}, mfu=self.mfu(speed, flops), mem=memory_gib(device),
                 eta=round((steps - step) * seconds / step))

    def mfu(self, speed, flops):
        """The share of the devices' peak that `speed` tokens a second at `flops` each are; None if it is not known."""
        share = speed * flops / (peak_flops(self.world.device) * self.world.size)
        return share if math.isfinite(share) else None

    def save(self, step, clock, modules, optimizers, wait=False, **more):
        """state.pt: all that a step depends on. Data and noise are functions of the step: no generator is in it. Copied
        to the CPU here and written by a thread: training waits for the copy only, or for the save before this one."""
        self.saved()
        state = {"step": step, "processes": self.world.size, "seconds": clock.seconds(), **more,
                 "device": self.world.device.type, "modules": [m.state_dict() for m in modules],
                 "optimizers": [o.state_dict() for o in optimizers]}
        if self.world.main:
            on_cpu = self.world.device.type == "cpu"                              # from a GPU it is a copy anyway
            state = tree_map_only(torch.Tensor, lambda t: t.detach().to("cpu", copy=on_cpu), state)
            self.saving = ThreadPoolExecutor(1, "saving").submit(self.write, state)
        if wait:                                                                  # before what may fail
            self.saved()

    def write(self, state):
        with atomic(self.out / "state.pt") as temporary:
            try:
                torch.save(state, temporary)
            except RuntimeError as error:  # torch's own writer does not say OSError when the disk is full
                raise UserError(f"{self.out}/state.pt could not be written ({why(error)}); free some space and run "
                                "again: the last good state is kept") from None

    def saved(self):
        """Wait until state.pt is written; an error of that thread is raised here."""
        future, self.saving = self.saving, None
        try:
            if future:
                future.result()
        finally:
            del future                             # else its error would hold this run, and so the folder's lock

    def resume(self, modules, optimizers):
        """Load state.pt, if there is one, into the modules and optimizers. Returns the state: step, seconds, ..."""
        if not (self.out / "state.pt").exists():
            return {"step": 0, "seconds": 0.0}
        try:  # on the CPU, as the model may fill the GPU; mapped, so that processes share pages; never unpickles code
            state = torch.load(self.out / "state.pt", map_location="cpu", weights_only=True, mmap=True)
        except Exception:
            raise UserError(f"{self.out}/state.pt is damaged; delete it to start this run again") from None
        for thing, saved in zip([*modules, *optimizers], [*state["modules"], *state["optimizers"]], strict=True):
            thing.load_state_dict(saved)
        self.say(f"resuming at step {state['step']}")
        if state["processes"] != self.world.size:
            self.say(f"on {self.world.size} processes instead of {state['processes']}: equal up to rounding")
        if state["device"] != self.world.device.type:
            self.say(f"on {self.world.device.type} instead of {state['device']}: noise drawn from here on is another")
        return state

    def leave(self, step):
        """After a save that a signal asked for."""
        self.saved()
        self.world.barrier()                           # the first process to leave makes torchrun end the others
        self.say(f"stopped at step {step}; the same command resumes")
        self.unlock()
        raise SystemExit(143)

    def finish(self, result, section=""):
        """section.md, then result.json: the last one's presence means that everything else is there."""
        self.saved()
        self.result = {**result, "section": digest(section), "measures": self.measures, **provenance(self.world)}
        if self.world.main:
            write_text(self.out / "section.md", section)
            write_json(self.out / "result.json", self.result)
            if not self.keep_state:
                (self.out / "state.pt").unlink(missing_ok=True)
        self.unlock()
        self.world.barrier()

    def unlock(self):
        self.saved()
        if self.world.main:
            self.untrack()
            self.lock.close()


# ------------------------------------------------------------------------------------------------------- sections
def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_section(folder):
    """The section that the finished run in `folder` wrote. Raises UserError for one of another run."""
    file, result = Path(folder) / "section.md", read_json(Path(folder) / "result.json", "finish that run first")
    if not file.exists() or digest(file.read_text()) != result.get("section"):
        what = "was not written by the run beside it" if file.exists() else "is missing"
        raise UserError(f"{file} {what}; delete {folder} and run that stage again")
    return file.read_text()


# ------------------------------------------------------------------------------------------------------- tracking
def _wandb(cfg):
    import wandb
    session = wandb.init(project="nanodihal", name=str(cfg.out), group=str(cfg.out), config=dataclasses.asdict(cfg))
    return lambda step, values: session.log(values, step=step), session.finish


def _tensorboard(cfg):
    from torch.utils.tensorboard import SummaryWriter
    writer = SummaryWriter(Path(cfg.out) / "tensorboard")
    return lambda step, values: [writer.add_scalar(k, v, step) for k, v in values.items()], writer.close


# --track, which is also the package's name -> a function of the config that gives two: (step, {name: number}), the end
TRACKERS = {"": lambda cfg: (lambda step, values: None, lambda: None), "wandb": _wandb, "tensorboard": _tensorboard}


def card(out, title, base, about):
    """README.md of a saved model, as the Hub expects it: base_model (if a Hub id), the command, `about`'s numbers."""
    base = f"base_model: {base}\n" if base and not Path(base).exists() else ""
    form = {int: ",", float: ".4g"}
    numbers = "".join(f"- {k}: {v:{form[type(v)]}}\n" for k, v in about.items() if type(v) in form)
    write_text(Path(out) / "README.md", f"---\n{base}library_name: transformers\npipeline_tag: text-generation\n"
               f"tags: [nanodihal]\n---\n\n# {title}\n\nMade by `{command()}`.\n\n{numbers}")
