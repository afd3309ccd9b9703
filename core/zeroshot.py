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
    nats = 0.0
    for ids in rows.split(8):
        logits = model(ids, use_cache=False).logits[:, :-1].float()                                     # (n, T-1, V)
        nats += F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
    return bits(nats), None


def zero_shot(models, texts, calls, seed):
    """{model: {text: {bits_per_byte, se}}} on texts {title: (windows (N, T), bytes a token)}."""
    bits = {name: {title: dict(zip(("bits_per_byte", "se"), bits_per_byte(model, rows, each, calls, seed), strict=True))
                   for title, (rows, each) in texts.items()} for name, model in models.items()}
    return {"bits": bits, "windows": {title: len(rows) for title, (rows, _) in texts.items()}, "calls": calls}


# ------------------------------------------------------------------------------------------ lm-evaluation-harness
def twin_interface(student, tokenizer, calls, steps, seed):
    """The masked twin as the harness' LM: log-likelihoods are minus the bound."""
    from lm_eval.api.model import LM
    most = student.lm.config.max_position_embeddings

    class Twin(LM):
        def ids(self, context, rest):
            head, both = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (context, context + rest))
            same = next((i for i, (x, y) in enumerate(zip(head, both, strict=False)) if x != y), len(head))
            ids = torch.tensor([tokenizer.eos_token_id or 0, *both], device=student.shift.device)
            cut = max(0, len(ids) - most)                         # a token across the border belongs to the rest
            return ids[cut:], min(max(1, 1 + same - cut), len(ids) - cut - 1)

        def loglikelihood(self, requests):
            """[(log p(rest | context), whether filling the rest greedily, most certain first, gives it)]"""
            out = []
            for i, request in enumerate(requests):
                ids, given = self.ids(*request.args)
                hide = (torch.arange(len(ids), device=ids.device) >= given)[None]
                greedy = masked.fill(student, ids[None], hide, int(hide.sum()), temperature=0.0)[0]
                out.append((-masked.likelihood(student, ids, calls, seed, given, key=i)[0], torch.equal(greedy, ids)))
            return out

        def loglikelihood_rolling(self, requests):
            """[log p(text)], in windows of the model's length; the last token of one is the given first of the next."""
            out = []
            for request in requests:
                rest = tokenizer(request.args[0], add_special_tokens=False)["input_ids"]
                ids = torch.tensor([tokenizer.eos_token_id or 0, *rest], device=student.shift.device)
                windows = [ids[lo:lo + most] for lo in range(0, len(ids) - 1, most - 1)]         # of 2 tokens at least
                out.append(-masked.text_likelihood(student, windows, calls, seed)[0])
            return out

        def generate_until(self, requests):
            """Greedy tokens, most certain first, cut at the first stop string."""
            out = []
            for request in requests:
                context, how = request.args
                new = min(how.get("max_gen_toks", 64), most - 1)
                head = self.ids(context, "")[0][-(most - new):]
                ids = torch.cat([head, head.new_full((new,), student.mask_id)])[None]
                text = tokenizer.decode(masked.fill(student, ids, ids == student.mask_id, min(steps, new),
                                                    temperature=0.0)[0, len(head):])
                stops = [how["until"]] if isinstance(how.get("until"), str) else how.get("until") or []
                out.append(min((text.split(stop)[0] for stop in stops if stop), key=len, default=text))
            return out

    return Twin()


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
