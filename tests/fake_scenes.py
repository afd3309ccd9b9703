"""The stages at the shape of an 8B model, as one of eight processes with fake H100s (fake_gpu.py).

    python tests/fake_scenes.py FOLDER [SCENE ...]

FOLDER/config.json is the shape of the backbone. Prints a line of JSON a scene: what was noted.
The weights of the backbone, its tokenizer and the text are stand-ins; the stages run as they are.
"""
import contextlib
import copy
import json
import sys
import tempfile
import time
import types
from pathlib import Path
from unittest import mock

from fake_gpu import FakeGPU, eight_gpus  # before torch

import torch  # noqa: I001


# -------------------------------------------------------------------------------------------------
# Stand-ins

class BlankText:
    """In place of data.Tokens: there is text without end, all of it token 0."""

    def __init__(self, folder, split, seq_len):
        self.T = seq_len

    def batch(self, seed, step, slots, batch_size):
        return torch.zeros(len(slots), self.T + 1, dtype=torch.int64)

    def warn(self, steps, batch_size):
        pass

    def windows(self, count, seed=None):
        return torch.zeros(count, self.T + 1, dtype=torch.int64)


def load_shape(folder, device, dtype, blocks=None):
    """In place of core.backbone.load: made of config.json alone, on the fake device."""
    from transformers import AutoModelForCausalLM
    from core import backbone
    config = backbone.read_config(folder)
    L = config.num_hidden_layers
    if blocks is not None:
        backbone.shorten(config, blocks)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return backbone.Backbone(model.eval().requires_grad_(False), L)


def load_tokenizer(folder):
    return types.SimpleNamespace(mask_token_id=128255)


def made_on_gpu(function):
    def made(*args, **kwargs):
        with torch.device("cuda"):
            return function(*args, **kwargs)
    return made


def patch_inputs(stack):
    """Weights, tokenizer and text of every stage."""
    import data
    from core import backbone
    patch(stack, backbone, load=load_shape, load_tokenizer=load_tokenizer,
          tokenizer_hash=lambda tokenizer: "")
    patch(stack, data, Tokens=BlankText, prepare=lambda *_, **__: (None, {}),
          prefetch=lambda function, keys: map(function, keys))


def patch(stack, target, **values):
    for name, value in values.items():
        stack.enter_context(mock.patch.object(target, name, value))


# -------------------------------------------------------------------------------------------------
# Training

class Marks:
    """Where the steps end in the notes of a FakeGPU."""

    def __init__(self, gpu):
        self.gpu = gpu
        self.waits = []
        self.flops = []
        self.seconds = []

    def set(self):
        self.waits.append(len(self.gpu.waits))
        self.flops.append(self.gpu.flops["train"])
        self.seconds.append(copy.copy(self.gpu.seconds))

    def last_step(self):
        seconds = self.seconds[-1] - self.seconds[-2]
        return {"waits": self.gpu.waits[self.waits[-2]:self.waits[-1]],
                "flops": self.flops[-1] - self.flops[-2], "parts": seconds}


def patch_steps(stack, gpu, marks):
    """Note the ends of steps. Run.steps makes a StopSignal just before the loop, asks it at the end
    of every step and is done with it after the loop."""
    from core import optim, run
    honest_build = optim.build

    class StopSignal(run.StopSignal):
        def __init__(self, world):
            super().__init__(world)
            gpu.phase = "train"
            marks.set()

        def poll(self):
            leaving = super().poll()
            gpu.step += 1
            marks.set()
            return leaving

        def done(self):
            super().done()
            gpu.phase = "result"

    def build(*args, **kwargs):
        """With moments, as every step but the first one finds them."""
        optimizers = honest_build(*args, **kwargs)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad = torch.zeros_like(p)
            optimizer.step()
            optimizer.zero_grad()
        return optimizers

    patch(stack, run, StopSignal=StopSignal)
    patch(stack, optim, build=build, step_all=gpu.as_phase(optim.step_all, "optimizer"))


def patch_phases(stack, gpu, table):
    """table: (target, name of its function, phase)."""
    for target, name, phase in table:
        patch(stack, target, **{name: gpu.as_phase(getattr(target, name), phase)})


def patch_parts(stack, gpu, table):
    for target, name, part in table:
        patch(stack, target, **{name: gpu.as_part(getattr(target, name), part)})


def train(stage, argv, rank, prepare):
    """Run stage.main(argv) as process `rank` of eight. `prepare(stack, gpu)` patches the rest.
    Returns what was noted, and what --dry_run foretells."""
    from core import run
    gpu = FakeGPU()
    marks = Marks(gpu)
    with eight_gpus(gpu, rank) as stack, tempfile.TemporaryDirectory() as folder:
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        argv = [*argv, "--eval_batches", "8", "--out", f"{folder}/run"]
        forecast = stage.main.__wrapped__([*argv, "--dry_run"])
        patch_inputs(stack)
        patch_steps(stack, gpu, marks)
        prepare(stack, gpu)
        patch_phases(stack, gpu, [(run.Run, "save", "save"), (stage, "validate", "validate")])
        with gpu:
            stage.main.__wrapped__(argv)
    peaks = {phase: size / 1e9 for phase, size in gpu.peaks.items()}
    return {**marks.last_step(), "forecast": forecast, "peaks": peaks, "graphs": gpu.graphs,
            "collectives": gpu.collectives}


def bridge_run(folder, rank, *flags, validates=False, batch_size=128):
    """bridge.py with the preset 8b. Without `validates` there is no validation, to save time."""
    import bridge
    from core import diffusion, optim
    argv = ["--preset", "8b", "--model", folder, "--steps", "1", "--calibration", "8",
            "--batch_size", str(batch_size), *flags]

    def prepare(stack, gpu):
        patch(stack, bridge, build=made_on_gpu(bridge.build), measure=lambda *_: {},
              show=lambda result: result)
        patch(stack, diffusion, save=lambda *_: None)
        if not validates:
            patch(stack, bridge, validate=lambda *_: 0.0)
        patch_parts(stack, gpu, [
            (bridge, "both_ends", "lower blocks"), (bridge, "bridge_loss", "network"),
            (torch.Tensor, "backward", "network"), (optim.Muon, "step", "Muon"),
            (torch.optim.AdamW, "step", "AdamW"), (bridge, "update_ema", "EMA")])

    noted = train(bridge, argv, rank, prepare)
    return {**noted, "tokens": batch_size // 8 * 1024}


def convert_run(folder, rank, *flags, masked=1.0, validates=False):
    """repr_align.py with the preset 8b. `masked` is the share of masked tokens."""
    import repr_align
    from core import backbone
    argv = ["--preset", "8b", "--model", folder, "--steps", "1", "--batch_size", "16", *flags]

    def prepare(stack, gpu):
        patch(stack, backbone, save_model=lambda *_, **__: None)
        honest = repr_align.text_likelihood
        honest_masks = repr_align.sample_masks

        def sample_masks(*args, **kwargs):
            return honest_masks(*args, **{**kwargs, "between": (masked, masked)})
        patch(stack, repr_align, sample_masks=sample_masks,
              text_likelihood=lambda student, rows, *rest: honest(student, rows[:2], *rest))
        if not validates:
            patch(stack, repr_align, validate=lambda *_: [0.0, 0.0], publish=lambda *_: None,
                  text_likelihood=lambda *_: (0.0, 0.0))
        patch_phases(stack, gpu, [(repr_align, "publish", "save"),
                                  (repr_align, "text_likelihood", "validate")])

    noted = train(repr_align, argv, rank, prepare)
    return {**noted, "tokens": 2 * 4096}


def shallow(folder, blocks):
    """A folder next to it: the same shape with fewer blocks."""
    config = json.loads((Path(folder) / "config.json").read_text())
    config["num_hidden_layers"] = blocks
    other = Path(f"{folder}_{blocks}")
    other.mkdir(exist_ok=True)
    (other / "config.json").write_text(json.dumps(config))
    return str(other)


# -------------------------------------------------------------------------------------------------
# Without training

def use_run(folder):
    """LOCATE, what a bridge is worth, rivals, a hybrid's forward and a cached step, token blocks.
    Returns the FLOPs of each phase."""
    import bridge
    import generate
    import geometry
    import hybrid
    gpu = FakeGPU()
    device = torch.device("cuda")
    with eight_gpus(gpu, 0) as stack, gpu:
        # A number that the host asks for is 0, but these must not be
        patch(stack, torch, isfinite=lambda x: torch.tensor(True))
        patch(stack, bridge, mean=lambda column: 1.0)
        lm = load_shape(folder, device, torch.bfloat16)
        ids = torch.zeros(2, 64, dtype=torch.int64, device=device)

        with gpu.during("locate"):
            cfg = geometry.Config(pool=64, anchors=16, k=4, resamples=4)
            geometry.analyse(geometry.collect(lm, ids, cfg), cfg)

        cfg = bridge.Config(visible="mix", self_condition=True, depth=2)
        net = made_on_gpu(bridge.build)(cfg, lm.config, 1).eval()
        with gpu.during("measure"):
            bridge.measure(lm, net, 1, ids, 2, cfg)

        cfg = generate.Config(new=8, block_size=4, nfe=2, refinements=1)
        prior = torch.zeros(lm.V, device=device, dtype=torch.float64)
        cx = generate.Context(cfg, prior, calls=3)
        with gpu.during("rivals"):              # first: a hybrid gives its blocks other numbers
            generate.METHODS["lazy Jacobi"](cx, lm, ids, 1.0)
            generate.gen_ppl(lm, ids, 32)

        info = {"layer": 1, "model": folder, "seq_len": 1024, "nfe_default": 4}
        model = made_on_gpu(hybrid.HybridForCausalLM)(hybrid.HybridConfig(info), net, lm).eval()
        with gpu.during("hybrid"), torch.no_grad():
            model(ids, labels=ids)
            cache = model(ids, use_cache=True).past_key_values      # generate() would never end
            following = ids[:, :1]
            see = torch.ones_like(following).expand(2, 65)
            model(following, past_key_values=cache, attention_mask=see)
        with gpu.during("generate"):
            generate.METHODS["hidden-state diffusion"](cx, model, ids, 1.0)
    return {"used": dict(gpu.flops), "graphs": gpu.graphs}


# -------------------------------------------------------------------------------------------------
# Scenes: name -> function of the folder. Two ranks and validation where the models are small

THREE_STEPS = ["--layer", "2", "--steps", "3", "--save_every", "2"]

SCENES = {
    "bridge 6": lambda folder: bridge_run(
        folder, 0, "--layer", "6", "--micro_batch", "32", batch_size=256),
    "bridge 3, generate": lambda folder: bridge_run(folder, 0, "--layer", "3", "--generate"),
    "bridge 2, eager": lambda folder: bridge_run(folder, 0, "--layer", "2", "--no-compile"),
    "bridge 2, recomputed": lambda folder: bridge_run(folder, 0, "--layer", "2", "--recompute"),
    "bridge 2": lambda folder: bridge_run(folder, 0, *THREE_STEPS, validates=True),
    "bridge 2, rank 7": lambda folder: bridge_run(folder, 7, *THREE_STEPS, validates=True),
    "convert 4, sharded": lambda folder: convert_run(shallow(folder, 4), 0, "--shard"),
    "convert 2": lambda folder: convert_run(shallow(folder, 2), 0, masked=0.5),
    "convert 2, sharded": lambda folder: convert_run(
        shallow(folder, 2), 0, "--shard", validates=True),
    "convert 2, sharded, rank 7": lambda folder: convert_run(
        shallow(folder, 2), 7, "--shard", validates=True),
    "use": lambda folder: use_run(shallow(folder, 3)),
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[2:] or SCENES:
        start = time.process_time()
        noted = SCENES[name](sys.argv[1])
        noted["seconds"] = time.process_time() - start
        print(json.dumps({"scene": name, **noted}), flush=True)
