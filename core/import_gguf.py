"""import_gguf.py: an ordinary Hugging Face folder, dequantised to fp32, of a GGUF file: a real model without a hub.

    python -m core.import_gguf --import_gguf smollm2.gguf --out out/smollm2     # 135M parameters: half a minute
    MODEL=out/smollm2 bash run_all.sh

Needs two more packages: pip install gguf accelerate. The library's reader drops what it does not know, so a file whose
rope scaling, head size, window or rotation speed would be lost is refused, as is one that lacks tensors.
"""
import contextlib
import importlib.util
import io
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from core import backbone
from core.common import UserError, entry, parse, why


@dataclass
class Config:
    import_gguf: str = ""       # the GGUF file
    out: str = "out/gguf"       # the model folder to write; must not exist


def rope(config):
    return getattr(config, "rope_parameters", None) or {}


KEPT = {  # key of the file, after its architecture -> what the config made of it
    "attention.key_length": backbone.head_size,
    "attention.sliding_window": lambda c: getattr(c, "sliding_window", None),
    "rope.freq_base": lambda c: rope(c).get("rope_theta"),
    "rope.dimension_count": lambda c: int(backbone.head_size(c) * rope(c).get("partial_rotary_factor", 1.0)),
}


def lost(file, config):
    """What the file says and the config would not, in words; empty when nothing is lost."""
    from gguf import GGUFReader
    reader = GGUFReader(file)
    fields = {key.partition(".")[2]: field.contents() for key, field in reader.fields.items()}
    scaled = fields.get("rope.scaling.type", "none") != "none" or fields.get("rope.scaling.factor", 1.0) != 1.0
    if scaled or any(t.name.startswith("rope_") for t in reader.tensors):
        return "its rope scaling"
    return next((f"{key} = {fields[key]:g} (it would become {value(config)})" for key, value in KEPT.items()
                 if key in fields and fields[key] != value(config)), "")


@entry
def main(argv):
    cfg = parse(Config, argv, __doc__)
    file, out = Path(cfg.import_gguf), Path(cfg.out)
    if not cfg.import_gguf or not file.is_file():
        raise UserError(f"--import_gguf {cfg.import_gguf!r} is no file")
    if out.exists():
        raise UserError(f"{out} exists already; pass another --out")
    if not all(map(importlib.util.find_spec, ("gguf", "accelerate"))):
        raise UserError("a GGUF file is read with two more packages: pip install gguf accelerate")
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    where = dict(pretrained_model_name_or_path=file.parent, gguf_file=file.name)
    try:
        with backbone.quiet(), contextlib.redirect_stderr(io.StringIO()):              # the reader's progress bar
            what = lost(file, AutoConfig.from_pretrained(**where))
            if not what:
                tokenizer = AutoTokenizer.from_pretrained(**where)
                model, report = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32,
                                                                     output_loading_info=True)
                what = ", ".join(sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))[:3])
    except Exception as error:  # an unknown architecture, a truncated file: the reader has many ways to say no
        raise UserError(f"{file} could not be read ({type(error).__name__}: {why(error)})") from None
    if what:
        raise UserError(f"{file} would not be the same model: the library's reader does not get {what}")
    # The loaded model counts as quantised and refuses to be saved: its weights move into a fresh one.
    config = {k: float(f"{v:.7g}") if isinstance(v, float) else v for k, v in model.config.to_dict().items()
              if k not in ("quantization_config", "_name_or_path")}                    # a file's floats are fp32
    whole = type(model)(type(model.config)(**config))
    whole.load_state_dict(model.state_dict())
    backbone.check(backbone.Backbone(whole.eval()))
    apart = out.with_name(out.name + ".saving")
    shutil.rmtree(apart, ignore_errors=True)
    with backbone.quiet():
        whole.save_pretrained(apart)
        tokenizer.save_pretrained(apart)
    os.replace(apart, out)
    print(f"{out}: a {whole.config.model_type} of {whole.config.num_hidden_layers} blocks, {whole.num_parameters():,} "
          f"parameters; pass it as --model {out}")


if __name__ == "__main__":
    main()
