"""zeroshot.py: how well a model finds text it was not trained on: bits per byte, and lm-evaluation-harness' tasks.

    found = zero_shot(models, texts, calls=8, seed=0)
    python evaluate.py --harness my_task --harness_path tasks/     # a local yaml file; needs pip install "lm-eval[hf]"

A model is a transformers causal LM, or a masked.Student, whose likelihood is a bound with a standard error: the harness
sees the first through its own interface, the second through one made here.

Letters: N windows, T tokens.
"""
import math

import torch
import torch.nn.functional as F

from core import masked
from core.common import UserError
from core.report import table


@torch.no_grad()
def bits_per_byte(model, rows, bytes_per_token, calls, seed):
    """(bits per byte, its standard error over estimator draws or None) of windows (N, T), first tokens given. A masked
    student's is an upper bound."""
    def bits(nats):
        return nats / (rows.shape[0] * (rows.shape[1] - 1)) / math.log(2) / bytes_per_token
    if isinstance(model, masked.Student):
        return tuple(map(bits, masked.text_likelihood(model, list(rows), calls, seed)))
    nats = (model(ids, labels=ids, use_cache=False).loss.item() * ids[:, 1:].numel() for ids in rows.split(8))
    return bits(sum(nats)), None


def zero_shot(models, texts, calls, seed):
    """{model: {text: {bits_per_byte, se}}} on texts {title: (windows (N, T), bytes a token)}."""
    bits = {name: {title: dict(zip(("bits_per_byte", "se"), bits_per_byte(model, rows, each, calls, seed), strict=True))
                   for title, (rows, each) in texts.items()} for name, model in models.items()}
    return {"bits": bits, "windows": {title: len(rows) for title, (rows, _) in texts.items()}, "calls": calls}


# ------------------------------------------------------------------------------------------ lm-evaluation-harness
def twin_interface(student, tokenizer, calls, steps, seed):
    """The harness' own interface to a transformers model, with the masked twin's likelihood, minus the bound, and its
    sampler instead."""
    from lm_eval.models.huggingface import HFLM

    class Twin(HFLM):
        def _loglikelihood_tokens(self, requests, **_):
            """[(log p(rest | context), whether filling the rest greedily, most certain first, gives it)] of [(strings,
            context, rest)]; a window of a rolled text has no strings, and its first number alone is asked for."""
            out = []
            for strings, context, rest in requests:
                ids = torch.tensor([*context, *rest][-self.max_length - 1:], device=self.device)
                given = max(1, len(ids) - len(rest))
                hide = (torch.arange(len(ids), device=ids.device) >= given)[None]
                nats, _ = masked.likelihood(student, ids, calls, seed, given, key=int(ids.sum()))
                out.append((-nats, strings is not None and torch.equal(ids, masked.fill(
                    student, ids[None], hide, int(hide.sum()), temperature=0.0)[0])))
            return out

        def _model_generate(self, context, max_length, **_):
            """Greedy tokens, most certain first, none after the end of text; the harness cuts at its stop strings."""
            ids = F.pad(context, (0, max_length - context.shape[1]), value=student.mask_id)
            out = masked.fill(student, ids, ids == student.mask_id, steps, temperature=0.0)
            over = (out == self.eot_token_id)[:, context.shape[1]:].cumsum(1) > 0      # (1, new)
            return torch.cat([context, out[:, context.shape[1]:].masked_fill(over, self.eot_token_id)], 1)

    return Twin(pretrained=student.lm.model, tokenizer=tokenizer,                      # a rolled window is one longer
                max_length=student.lm.config.max_position_embeddings - 1)


def known(tasks, path):
    """The harness' TaskManager. Raises UserError where the package or a task is not there."""
    try:
        import lm_eval.models.huggingface  # noqa: F401
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(f"--harness needs a package ({error}); install it with: pip install 'lm-eval[hf]'") from None
    manager = TaskManager(include_path=path or None, include_defaults=not path)
    unknown = [t for t in tasks if t not in manager.all_tasks]
    if unknown:
        raise UserError(f"--harness {unknown[0]}: lm-evaluation-harness knows no such task; describe it in a yaml file "
                        "and pass its folder as --harness_path")
    return manager


def harness(models, tokenizer, tasks, path, limit, calls, seed):
    """models: name -> a transformers model or a masked.Student. Returns {name: {task: {metric: value}}}."""
    manager, out = known(tasks, path), {}
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    for name, model in models.items():
        face = twin_interface(model, tokenizer, calls, 64, seed) if isinstance(model, masked.Student) else HFLM(
            pretrained=model, tokenizer=tokenizer)
        found = simple_evaluate(face, tasks=list(tasks), task_manager=manager, limit=limit or None, bootstrap_iters=0)
        out[name] = {task: {k: v for k, v in row.items() if isinstance(v, (int, float))}
                     for task, row in found["results"].items()}
    return out


def section(some, tasks):
    """Bits per byte, and the harness' tasks where they were asked for."""
    windows = ", ".join(f"{n} of {title}" for title, n in some["windows"].items())
    rows = [[name, *(f"{t['bits_per_byte']:.3f}" + (f" +- {t['se']:.3f}" if t["se"] is not None else "")
                     for t in texts.values())] for name, texts in some["bits"].items()]
    return ["## Zero-shot", "", f"Bits per byte over windows of 128 tokens ({windows}; a twin's is an upper bound, "
            f"{some['calls']} calls a window, +- standard error of the estimate).", "",
            table(["model", *some["windows"]], rows), "",
            *(f"- lm-evaluation-harness, {name}, {task}: " + ", ".join(f"{k} {v:.4g}" for k, v in row.items())
              for name, found in tasks.items() for task, row in found.items()), ""]
