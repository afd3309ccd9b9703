"""common.py: flags, errors, processes and random numbers. Every stage imports it.

    cfg = parse(Config, argv, __doc__, PRESETS)      # a dataclass field is a flag
    world = setup(cfg.device)                        # this process, of one or of many
    generator(seed, "t", step, slot).random()        # the same number in any process
"""
import argparse
import dataclasses
import difflib
import functools
import inspect
import os
import re
import resource
import signal
import sys
import textwrap
import typing
import zlib
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError


# --------------------------------------------------------------------------------------------------
# Errors

class UserError(Exception):
    """The user can mend this. The message is one sentence: what is wrong and what to do."""


def why(error):
    """The message of another library's error, on one line."""
    return " ".join(str(error).split())


def entry(main):
    """Decorator of every `main(argv)`: an expected error becomes one sentence and an exit code."""
    @functools.wraps(main)
    def wrapped(argv=None):
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")    # a terminal without Unicode
        try:
            result = main(sys.argv[1:] if argv is None else argv)
            leave_group(0)
            return result
        except SystemExit as stop:
            leave_group(stop.code or 0)
            raise
        except (UserError, AssertionError) as error:
            if not error.args:
                raise                           # an assert without a message is a bug
            return fail(f"error: {why(error)}", 2)
        except KeyboardInterrupt:
            return fail("stopped; the same command starts again", 130)
        except BrokenPipeError:                 # `| head` has read enough
            return fail("", 130)
        except (OSError, SafetensorError) as error:
            if not getattr(error, "errno", 1):
                raise                           # a library's own error, not the system's
            return fail(f"error: {why(error)}; free some space or choose another path", 2)
        except ModuleNotFoundError as error:
            return fail(f"error: {error}; install it with: pip install {error.name}", 2)
        except RuntimeError as error:
            if "gloo" not in str(error) and not isinstance(error, dist.DistError):
                raise
            return fail("error: another process of this run failed; run the command again", 1)
    return wrapped


def fail(message, code):
    print(message, file=sys.stderr)
    leave_group(code)
    raise SystemExit(code)


def leave_group(code):
    """End one process of several at once: gloo's threads can abort a normal exit of Python."""
    if dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


# --------------------------------------------------------------------------------------------------
# Flags

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; see --help")


def read_comments(Config):
    """{field: (heading, comment)}, read from the source of a dataclass."""
    comments = {}
    heading = "options"
    for line in inspect.getsource(Config).splitlines():
        title = re.match(r"    # (.*)", line)
        field = re.match(r"    (\w+):(?:.*?#\s*(.*))?", line)
        if title:
            heading = title[1]
        elif field:
            comments[field[1]] = (heading, field[2] or "")
    return comments


def flag_options(kind):
    """The arguments of add_argument for a field of this type."""
    inner = typing.get_args(kind)
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(kind) is typing.Literal:
        return {"choices": inner}
    if typing.get_origin(kind) is tuple:        # tuple[int, ...]
        return {"nargs": "*", "type": inner[0]}
    return {"type": kind}


def make_parser(Config, doc):
    """One flag per field, grouped under the comment headings of the dataclass."""
    parser = Parser(description=textwrap.dedent(doc), allow_abbrev=False, add_help=False,
                    argument_default=argparse.SUPPRESS,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-h", "--help", action="store_true", help="print this text")
    groups = {}
    comments = read_comments(Config)
    for field in dataclasses.fields(Config):
        heading, comment = comments[field.name]
        if heading not in groups:
            groups[heading] = parser.add_argument_group(heading)
        text = comment.replace("%", "%%") + " [%(default)s]"
        groups[heading].add_argument(f"--{field.name}", help=text, **flag_options(field.type))
    if "dry_run" not in comments:
        parser.add_argument("--dry_run", action="store_true", help="print the settings and leave")
    return parser


def parse(Config, argv, doc="", presets=None, choose=None):
    """Fill the dataclass `Config` from `argv`: field default < preset < flag.

    A field may be int, float, str, bool (--x, --no-x), Literal (choices) or tuple[int, ...].
    An int is at least 1, unless its default is lower or its comment says what 0 means: (0: none).
    For the preset `auto`, `choose` gets the Config of the flags alone and returns another name."""
    # 1. The flags alone
    parser = make_parser(Config, doc)
    names = list(vars(Config()))
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0].lstrip("-"), [*names, "dry_run"], 1, 0.5)
        hint = f", did you mean --{near[0]}?" if near else ""
        parser.error(f"unknown argument {unknown[0]}{hint}")
    given = vars(namespace)
    for name, value in given.items():
        if isinstance(value, list):
            given[name] = tuple(value)
    show_help = given.pop("help", False)
    leave = "dry_run" not in names and given.pop("dry_run", False)

    # 2. The preset
    cfg = Config(**given)
    settings = {}
    if presets:
        preset = cfg.preset
        if choose and preset == "auto":
            preset = choose(cfg)
        settings = presets.get(preset, {})
        cfg = Config(**{**settings, **given})
        cfg.preset = preset

    # 3. Help, check, settings
    if show_help:
        parser.set_defaults(**vars(cfg))
        for name in settings.keys() - given.keys():
            parser.set_defaults(**{name: f"{settings[name]} by preset {cfg.preset}"})
        parser.print_help()
        raise SystemExit(0)
    for name, (_, comment) in read_comments(Config).items():
        value = getattr(cfg, name)
        if type(value) is int:
            lowest = min(getattr(Config, name), 0 if "(0: " in comment else 1)
            if value < lowest:
                parser.error(f"--{name} must be at least {lowest}")
    if leave:
        show_settings(cfg)
        raise SystemExit(0)
    return cfg


def show_settings(cfg):
    for name, value in vars(cfg).items():
        print(f"  {name} = {value}")


def pick(table, name, flag):
    """table[name]: the lookup of every extension point."""
    if name not in table:
        raise UserError(f"{flag} {name} is unknown; known are {', '.join(map(str, table))}")
    return table[name]


# --------------------------------------------------------------------------------------------------
# Processes

@dataclasses.dataclass
class World:
    """This process: its rank, the number of processes, and the device it computes on."""
    rank: int
    size: int
    device: torch.device

    @property
    def main(self):
        return self.rank == 0

    def barrier(self):
        self.sum([0.0])

    def sum(self, values):
        """Sum a list of floats over all processes."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()


def setup(device="auto"):
    """Join the processes that torchrun started, if any, and pick this process's device."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0)) if size > 1 else 0
    pick(dict.fromkeys(["auto", "cpu", "cuda"]), device.split(":")[0], "--device")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {device} is not available: torch sees no GPU; use --device cpu")
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if size > 1 and not dist.is_initialized():
        assert "MASTER_ADDR" in os.environ, "unset WORLD_SIZE, or start this with torchrun"
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=6))    # rank 0 measures alone
    return World(rank, size, device)


Dtype = typing.Literal["auto", "fp32", "bf16"]      # of the flag --dtype


def pick_dtype(cfg, device):
    """The torch dtype of --dtype. `auto` is replaced in cfg: another device is another run."""
    if cfg.dtype == "auto":
        cfg.dtype = "bf16" if device.type == "cuda" else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[cfg.dtype]


def split_batch(batch_size, micro_batch, world):
    """(slots of this process, sequences a micro-batch). The global batch stays the same."""
    share = batch_size // world.size
    micro_batch = micro_batch or share
    if batch_size % world.size or share % micro_batch:
        raise UserError(f"--batch_size {batch_size} does not split over {world.size} processes "
                        f"in micro-batches of {micro_batch}; change --batch_size or --micro_batch")
    return range(world.rank * share, (world.rank + 1) * share), micro_batch


class StopSignal:
    """SIGTERM and Ctrl-C ask a training loop to save and leave. Further signals are ignored: the
    save must end. `poll` makes all processes leave at the same step."""
    received = 0                                # number of the signal

    def __init__(self, world):
        StopSignal.received = 0
        self.world = world
        signal.signal(signal.SIGTERM, self.receive)
        signal.signal(signal.SIGINT, self.receive)

    def receive(self, number, frame):
        StopSignal.received = self.received or number

    def poll(self):
        return self.world.sum([float(self.received)])[0] > 0

    def done(self):
        """Signals act at once again. Call it after the loop."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)


# --------------------------------------------------------------------------------------------------
# Random numbers
#
# All purposes, their keys after the seed, and where they are used:
#   epoch (epoch), windows ()                       data.py: order and choice of text windows
#   t, noise, self, visible (step, slot)            bridge.py: noise level, noise, coin of the self-
#                                                   conditioning, hidden tokens; slot = place of a
#                                                   sequence in the global batch
#   validate (0, row) or (row)                      the same for held-out rows; masks of CONVERT
#   sampler (position), always with seed 0          a hybrid's noise: its logits are deterministic
#   block, decode (start, turn, row)                generate.py: noise and tokens of a token block
#   unigram (), jacobi (row), drift (call, row)     generate.py: tokens of the rivals
#   mask (step, slot)                               repr_align.py: which tokens are masked
#   fill (token block, step, row)                   core/masked.py: tokens and random order
#   count (text), subset (text, call)               core/masked.py: masks of the bound
#   pool, anchors, resamples ()                     geometry.py
#   task NAME, task lines, controls ()              core/tasks.py, circuits.py: prompts, components
#   sample (token), permutations ()                 sample.py; core/report.py
# Untrained weights and the library's generate() are the exceptions: torch.manual_seed(seed).

def generator(seed, purpose, *key):
    """A numpy generator that is a function of (seed, purpose, step, slot, ...), never of the rank
    or of the past: the same in any process, in any order.

    Philox from a SeedSequence: torch's CPU generator keeps only 32 bits of its seed, so hashed keys
    would collide. The key's length is part of it, since SeedSequence pads with zeros: (a, 0) would
    equal (a, 0, 0)."""
    words = [seed, zlib.crc32(purpose.encode()), len(key), *key]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))


def normal(shape, device, seed, purpose, *key):
    """Standard normal float32 tensor of `shape`, a function of the key. CPU and GPU differ."""
    numbers = generator(seed, purpose, *key)
    if device.type == "cpu":
        return torch.from_numpy(numbers.standard_normal(shape, dtype=np.float32))
    on_device = torch.Generator(device).manual_seed(int(numbers.integers(2 ** 63)))
    return torch.randn(shape, generator=on_device, device=device)


# --------------------------------------------------------------------------------------------------
# Speed and memory

PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}       # dense bf16, data sheets


def peak_flops(device):
    """FLOP/s of the device by its data sheet; None if unknown."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    for gpu, peak in PEAK_FLOPS.items():
        if gpu in name:
            return peak
    return None


def memory_gib(device):
    """Peak memory so far: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20         # Linux: KiB
