"""fake_scenes.py: the stages at the shape of an 8B model, as one of eight processes with fake H100s (fake_gpu.py).

    python tests/fake_scenes.py FOLDER [SCENE...]      # FOLDER/config.json: the shape. One line of JSON on stdout
"""
import contextlib
import json
import sys
import tempfile
import types
from pathlib import Path
from unittest import mock

from fake_gpu import FakeGPU, eight_gpus

import torch  # noqa: I001


def phases(gpu, stack, module, **names):
    """Functions of `module` that are phases of their own: name = phase."""
    for name, phase in names.items():
        stack.enter_context(mock.patch.object(module, name, gpu.timed(getattr(module, name), phase)))


def made_on_gpu(function):
    def made(*args, **kwargs):
        with torch.device("cuda"):
            return function(*args, **kwargs)
    return made


def train(stage, argv, rank, tokens, validates, patches):
    """Run stage.main(argv) as process `rank` of eight, `tokens` a step each; unless it `validates` that is left out, to
    save time. Returns what was noted (flops and waits of the last step), and what --dry_run foretells."""
    import data
    from core import backbone, optim, run
    gpu, marks, step_all = FakeGPU(), [], optim.step_all

    def mark():
        marks.append((len(gpu.waits), gpu.flops["train"], gpu.seconds.copy()))

    def average(*args, honest=torch._foreach_lerp_):
        """The running mean of the weights ends a step, where there is one."""
        gpu.part_of_step(honest, "EMA")(*args)
        if gpu.step:
            marks.pop()
            mark()

    def stepped(*args):
        with gpu.during("optimizer"):
            step_all(*args)
        gpu.step += 1
        mark()

    def build(*args, honest=optim.build, **kwargs):
        """With moments, as every step but the first one finds them."""
        optimizers = honest(*args, **kwargs)
        params = [p for o in optimizers for group in o.param_groups for p in group["params"]]
        with gpu.during("set-up"):
            for p in params:
                p.grad = torch.zeros_like(p)
            for optimizer in optimizers:
                optimizer.step()
            for p in params:
                p.grad = None
        return optimizers

    def before_the_loop(world, honest=stage.StopSignal):
        mark()
        return honest(world)

    with eight_gpus(gpu, rank) as stack, tempfile.TemporaryDirectory() as out:
        argv = [*argv, "--random_init", "--eval_batches", "8", "--eval_every", "100", "--log_every", "100"]
        with contextlib.redirect_stdout(sys.stderr):
            foretold = stage.main.__wrapped__([*argv, "--dry_run", "--out", f"{out}/run"])
            patches = {**patches, (optim, "step_all"): stepped, (stage, "StopSignal"): before_the_loop,
                       (torch, "_foreach_lerp_"): average, (optim, "build"): build,
                       (backbone, "load"): made_on_gpu(backbone.load),
                       (data, "prefetch"): lambda make, keys: map(make, keys)}
            if not validates:
                patches[stage, "validate"] = lambda *_: [0.0, 0.0]
            for (module, name), value in patches.items():
                stack.enter_context(mock.patch.object(module, name, value))
            phases(gpu, stack, run.Run, save="save")
            phases(gpu, stack, stage, validate="validate")
            for thing, name, part in ((stage, "targets", "prefix"), (stage, "token_loss", "network"),
                                      (torch.Tensor, "backward", "network"), (optim.Muon, "step", "Muon"),
                                      (torch.optim.AdamW, "step", "AdamW")):
                if hasattr(thing, name):
                    stack.enter_context(mock.patch.object(thing, name, gpu.part_of_step(getattr(thing, name), part)))
            if hasattr(stage, "check_replicas"):
                phases(gpu, stack, stage, check_replicas="save")
            with gpu:
                gpu.phase = "train"
                stage.main.__wrapped__([*argv, "--out", f"{out}/run"])
    return {"foretold": foretold, "peaks": {k: n / 1e9 for k, n in gpu.peaks.items()}, "graphs": gpu.graphs,
            "flops": marks[-1][1] - marks[-2][1], "parts": marks[-1][2] - marks[-2][2],
            "waits": gpu.waits[marks[-2][0]:marks[-1][0]], "tokens": tokens, "collectives": gpu.collectives}


def bridge_run(folder, rank, *flags, validates=False):
    import bridge
    from core import denoiser
    argv = ["--preset", "8b", "--model", folder, "--steps", "1", "--batch_size", "128", "--calibration", "8", *flags]
    batch = int(flags[flags.index("--batch_size") + 1]) if "--batch_size" in flags else 128
    return train(bridge, argv, rank, batch // 8 * 1024, validates, {
        (bridge, "build"): made_on_gpu(bridge.build), (denoiser, "save"): lambda *_: None})


def convert_run(folder, rank, *flags, validates=False):
    import data
    import repr_align
    from core import backbone

    class Text(data.RandomTokens):
        def __init__(self, shards, split, T, *_):
            super().__init__(128000, T)

        def windows(self, count):
            return super().windows(count, 0)
    argv = ["--preset", "8b", "--model", folder, "--steps", "1", "--batch_size", "16", *flags]
    return train(repr_align, argv, rank, 2 * 4096, validates, {
        (backbone, "load_tokenizer"): lambda name: types.SimpleNamespace(mask_token_id=128255),
        (data, "shards_beside"): lambda *_: (None, {}), (data, "Tokens"): Text,
        (repr_align, "tokens_a_call"): lambda *_: 1.0,                    # by fake laws no token is ever revealed
        (repr_align, "publish"): lambda run, *_: setattr(run, "result", None),
        (repr_align, "summary"): lambda result: ""})


def shallow(folder, blocks=2):
    """The same shape with so many blocks, beside it."""
    config = json.loads((Path(folder) / "config.json").read_text())
    other = Path(f"{folder}_{blocks}")
    other.mkdir(exist_ok=True)
    (other / "config.json").write_text(json.dumps({**config, "num_hidden_layers": blocks}))
    return str(other)


def use_run(folder):
    """What needs no training: LOCATE, a hybrid's forward and a cached step, blocks and gaps drawn, lazy Jacobi and the
    judge of GENERATE. Returns how many FLOPs each phase took."""
    import bridge
    import generate
    import geometry
    from core import backbone, hybrid_lm, metrics, states
    gpu, where = FakeGPU(), torch.device("cuda")
    with eight_gpus(gpu, 0), gpu:
        lm = made_on_gpu(backbone.load)(folder, where, torch.bfloat16, random_init=True)
        ids = torch.zeros(2, 64, dtype=torch.int64, device=where)
        with gpu.during("locate"), mock.patch.object(torch, "isfinite", lambda x: torch.tensor(True)):
            cfg = geometry.Config(seq_len=64, skip=4, pool=64, anchors=16, k=4, thin=2, batch_size=2, resamples=4)
            geometry.analyse(states.collect(lm, ids, cfg.skip, cfg.pool, cfg.seed, cfg.batch_size), cfg)
        cfg = bridge.Config(preset="8b", visible="mix", bidirectional=True, self_condition=True, blocks=2)
        net = made_on_gpu(bridge.build)(cfg, lm.config, 1).eval()
        config = hybrid_lm.HybridConfig(layer=1, bridge=net.settings)
        config.vocab_size, config.hidden_size, config.max_position_embeddings = lm.V, lm.D, 8192
        prior = torch.zeros(lm.V, device=where)
        with gpu.during("rivals"):                             # first: a hybrid gives its blocks other numbers
            generate.jacobi(lm, ids, 8, 3, 1.0, 0, prior, 0.5)
            metrics.judge(lm, ids, 32)
        model = made_on_gpu(hybrid_lm.HybridForCausalLM)(config, net, lm).eval()
        with gpu.during("hybrid"), torch.no_grad():
            model(ids, labels=ids)
            cache = model(ids, use_cache=True).past_key_values              # generate() would never see its end
            model(ids[:, :1], past_key_values=cache, attention_mask=torch.ones_like(ids[:, :1]).expand(2, 65))
        with gpu.during("generate"):
            model.generate_blocks(ids, 8, 4, 2, prior=prior, refinements=1)
            model.generate_blocks(ids, 8, 8, 2, prior=prior, refinements=1, suffix_ids=ids)
    return {"used": dict(gpu.flops), "graphs": gpu.graphs}


FEW = ["--layer", "2", "--steps", "3", "--batch_size", "64"]
SCENES = {  # name -> function of the folder. Three steps, validation and two ranks only where the models are small
    "bridge 6": lambda folder: bridge_run(folder, 0, "--layer", "6", "--batch_size", "256"),
    "bridge 6, 8 a pass": lambda folder: bridge_run(folder, 0, "--layer", "6", "--micro_batch", "8"),
    "bridge 16, mix": lambda folder: bridge_run(folder, 0, "--layer", "16", "--visible", "mix"),
    "bridge 2, eager": lambda folder: bridge_run(folder, 0, "--layer", "2", "--no-compile"),
    "bridge 2, recomputed": lambda folder: bridge_run(folder, 0, "--layer", "2", "--recompute"),
    "bridge 2": lambda folder: bridge_run(folder, 0, *FEW, validates=True),
    "bridge 2, rank 7": lambda folder: bridge_run(folder, 7, *FEW, validates=True),
    "convert, sharded": lambda folder: convert_run(folder, 0, "--shard"),
    "convert 2": lambda folder: convert_run(shallow(folder), 0),
    "convert 2, sharded": lambda folder: convert_run(shallow(folder), 0, "--shard", validates=True),
    "use": lambda folder: use_run(shallow(folder, 4)),
    "convert 2, sharded, rank 7": lambda folder: convert_run(shallow(folder), 7, "--shard", validates=True),
}

if __name__ == "__main__":
    import time
    torch.set_num_threads(1)
    found = {}
    for name in sys.argv[2:] or SCENES:
        start = time.process_time()
        found[name] = SCENES[name](sys.argv[1])
        found[name]["seconds"] = time.process_time() - start
    print(json.dumps(found))
