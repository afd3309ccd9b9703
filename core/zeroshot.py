"""zeroshot.py: how well a model finds text it was not trained on: bits per byte, and which of two tokens comes next.

    found = zero_shot(models, tokenizer, texts, calls=8, count=60, seed=0, device=device)

A model is a transformers causal LM, or a masked.Student, whose likelihood is a bound.

Letters: N windows, T tokens, V vocabulary.
"""
import math
from pathlib import Path

import torch
import torch.nn.functional as F

from core import masked
from core.common import UserError
from core.draws import generator
from core.report import table

NAMES = ("value", "name", "path", "data", "line", "item", "result", "index", "key", "text")
MODULES = ("os", "sys", "re", "json", "time", "math", "random", "string", "types", "copy", "socket", "struct")


def questions(tokenizer, kind, count, seed):
    """[(context ids, right id, wrong id)]: which of two tokens comes next. Three kinds: the bracket that is open, the
    module that was imported, whether a line is indented. Each answer is right about as often as it is wrong."""
    draw, out = generator(seed, f"cloze {kind}"), []
    while len(out) < count:
        a, b, f = (NAMES[i] for i in draw.choice(len(NAMES), 3, replace=False))
        m, n = (MODULES[i] for i in draw.choice(len(MODULES), 2, replace=False))
        if kind == "brackets":
            inner = bool(draw.integers(2))
            context, right, wrong = (f"{a} = {f}({b}[0", "]", ")") if inner else (f"{a} = {f}({b}", ")", "]")
        elif kind == "imports":
            context, right, wrong = f"import {m}\n\ndef {f}({a}):\n    return {m}.{b}({a})\n\n{b} = ", m, n
        else:
            opened = bool(draw.integers(2))
            context = f"def {f}({a}):\n    {b} = {a}\n    return {b}\n" if not opened else f"def {f}({a}):\n"
            right, wrong = ("    ", "\n") if opened else ("\n", "    ")
        head = tokenizer(context, add_special_tokens=False)["input_ids"]
        first = [tokenizer(context + end + "x", add_special_tokens=False)["input_ids"] for end in (right, wrong)]
        n = len(head)
        if any(ids[:n] != head or len(ids) == n for ids in first):  # merged with the context: the first that differs
            n = next((i for i, (x, y) in enumerate(zip(*first, strict=False)) if x != y), 0)
        one, two = first[0][n], first[1][n]
        if one != two:
            out.append(([tokenizer.eos_token_id or 0, *first[0][:n]], one, two))
    return out


@torch.no_grad()
def next_logits(model, ids):
    """Logits (V,) of the token after ids (1, T), from a causal LM or a masked student."""
    if not isinstance(model, masked.Student):
        return model(ids).logits[0, -1]
    ids = torch.cat([ids, ids.new_full((1, 1), model.mask_id)], 1)
    return model.logits(model.foretell(ids, ids == model.mask_id)[:, -1])[0]


def cloze(models, tokenizer, count, seed, device):
    """{model: {kind: accuracy}} over `count` questions a kind."""
    asked = {kind: questions(tokenizer, kind, count, seed) for kind in ("brackets", "imports", "indentation")}

    def right(model, ids, one, two):
        logits = next_logits(model, torch.tensor([ids], device=device))                                       # (V,)
        return bool(logits[one] > logits[two])
    return {name: {kind: sum(right(model, *item) for item in items) / len(items) for kind, items in asked.items()}
            for name, model in models.items()}


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


def windows_of(file, tokenizer, device):
    """(windows (N, 128), bytes a token) of a text file. Raises UserError if it does not fill one window."""
    text = Path(file).read_text(encoding="utf-8", errors="replace")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) < 128:
        raise UserError(f"--text {file} has fewer than 128 tokens; use a longer text")
    return torch.tensor(ids[:len(ids) // 128 * 128], device=device).view(-1, 128), len(text.encode()) / len(ids)


def zero_shot(models, tokenizer, texts, calls, count, seed, device):
    """{model: {text: {bits_per_byte, se}}} on texts {title: (windows (N, T), bytes a token)}, and the cloze suite."""
    bits = {name: {title: dict(zip(("bits_per_byte", "se"), bits_per_byte(model, rows, each, calls, seed), strict=True))
                   for title, (rows, each) in texts.items()} for name, model in models.items()}
    return {"bits": bits, "windows": {title: len(rows) for title, (rows, _) in texts.items()},
            "cloze": cloze(models, tokenizer, count, seed, device), "questions": count, "calls": calls}


def section(some, tasks):
    """Bits per byte, cloze accuracy, and the harness' tasks where they were asked for."""
    kinds = list(next(iter(some["cloze"].values())))
    windows = ", ".join(f"{n} of {title}" for title, n in some["windows"].items())
    rows = [[name, *(f"{t['bits_per_byte']:.3f}" + (f" +- {t['se']:.3f}" if t["se"] is not None else "")
                     for t in texts.values()), *(f"{v:.0%}" for v in some["cloze"][name].values())]
            for name, texts in some["bits"].items()]
    return ["## Zero-shot", "", f"Bits per byte over windows of 128 tokens ({windows}; a twin's is an upper bound, "
            f"{some['calls']} calls a window, +- standard error of the estimate), and which of two tokens comes next "
            f"({some['questions']} questions a kind, half of them right by chance).", "",
            table(["model", *some["windows"], *kinds], rows), "",
            *(f"- lm-evaluation-harness, {name}, {task}: " + ", ".join(f"{k} {v:.4g}" for k, v in row.items())
              for name, found in tasks.items() for task, row in found.items()), ""]
