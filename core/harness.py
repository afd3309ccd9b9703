"""harness.py: lm-evaluation-harness on the intact model, the hybrid and the masked twin (optional package).

    pip install "lm-eval[hf]"                                                  # this file has no command of its own
    python evaluate.py --harness lambada_openai,hellaswag --limit 100
    python evaluate.py --harness my_task --harness_path tasks/                 # a task described in a local yaml file

The first two go through the harness' own interface for transformers models; the twin has a likelihood of another kind,
a bound with a standard error (masked.likelihood), and its own sampler.
"""
import torch

from core import masked
from core.common import UserError


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


def evaluate_models(models, tokenizer, tasks, path, limit, calls, seed):
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
