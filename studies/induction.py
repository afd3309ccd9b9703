"""induction.py: does a converted model copy from the left side, from the right side, or from both?

    python -m studies.induction --converted out/tasks/w0            # one or several training seeds

A line shows eight words, then the same words again. A mask hides the fourth word of the copy:

    both        w1 .. w8   w1 w2 w3 [mask] w5 w6 w7
    left        w1 .. w8   w1 w2 w3 [mask] x  y  z          other words on the right
    right       w1 .. w8   x  y  z  [mask] w5 w6 w7
    conflict    w1 .. w8   w1 w2 w3 [mask] w6 w7 w8         the left side says w4, the right one w5

The evidence of a side is log p(w4), in nats, less that with other words on both sides. The heads
that carry it are found by silencing each. A linear probe asks whether single states tell the share
r of masked tokens. After arXiv 2607.15893, which trained small models from scratch.
"""
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from core import backbone, masked, report
from core.attribution import Subject, without
from core.common import entry, generator, parse
from core.tasks import Pieces, lines

SIDES = {"neither": ("other", "other"), "left": ("copy", "other"), "right": ("other", "copy"),
         "both": ("copy", "copy"), "conflict": ("copy", "next")}
BEFORE = 1 + 8 + 3      # tokens before the mask


@dataclass
class Config:
    model: str = "out/tasks/toy"                        # the AR model
    converted: tuple[str, ...] = ("out/tasks/w0",)      # models converted from it, two-way
    count: int = 256                                    # lines
    seed: int = 0                                       # of the lines


def make_lines(pieces, count, seed, mask_id):
    """{condition: prompts (N, 16)}, the words w4 (N,) and the words w5 (N,)."""
    gen = generator(seed, "two sides")
    prompts = {name: [] for name in SIDES}
    answers = []
    rivals = []
    for _ in range(count):
        words = pieces.sample(gen, 14)
        left = {"copy": words[:3], "other": words[8:11]}
        right = {"copy": words[4:7], "other": words[11:], "next": words[5:8]}
        answers.append(words[3])
        rivals.append(words[4])
        for name, (a, b) in SIDES.items():
            start = pieces.tokenizer.eos_token_id
            prompts[name].append([start, *words[:8], *left[a], mask_id, *right[b]])
    prompts = {name: torch.tensor(ids) for name, ids in prompts.items()}
    return prompts, torch.tensor(answers), torch.tensor(rivals)


@torch.no_grad()
def evidence(subject, prompts, answers, rivals):
    """{condition: mean log p(w4) less that of `neither`}, nats. In conflict also that of w5."""
    log_p = {}
    for name, ids in prompts.items():
        if subject.student is None:
            ids = ids[:, :BEFORE]
        states = subject.lm.embed(ids)
        place = torch.full_like(answers, BEFORE - 1)
        log_p[name] = subject.logits(states, place).log_softmax(-1)                     # (N, V)

    def gain(name, words):
        difference = log_p[name] - log_p["neither"]
        return difference.gather(1, words[:, None]).mean().item()

    gains = {name: gain(name, answers) for name in SIDES if name != "neither"}
    gains["conflict, right"] = gain("conflict", rivals)
    return gains


def heads(subject, sample):
    """{head: left and right evidence that is lost when it writes nothing}, as text."""
    whole = evidence(subject, *sample)
    lost = {}
    for name in subject.senders:
        if name.startswith("a"):
            with without(subject, [name]):
                rest = evidence(subject, *sample)
            lost[name] = " / ".join(f"{whole[side] - rest[side]:.1f}" for side in ("left", "right"))
    return lost


@torch.no_grad()
def probe(student, tokenizer, seed, T=64, N=256):
    """R^2 of a ridge from single visible states to r, on other windows: at h[0] and at h[1]."""
    text = []
    for line in lines(tokenizer):
        text += [*line.tolist(), tokenizer.eos_token_id]
        if len(text) >= N * T:
            break
    ids = torch.tensor(text[:N * T]).view(N, T)
    gen = generator(seed, "probe")
    share = gen.random(N)
    is_mask = torch.tensor(gen.random((N, T)) < share[:, None])
    scores = []
    for h, _ in zip(student.states(ids, is_mask), range(2)):
        x = h[~is_mask].double().numpy()
        y = share[(~is_mask).nonzero()[:, 0].numpy()]
        half = int((~is_mask[:N // 2]).sum())           # the first windows train
        x = np.c_[x, np.ones(len(x))]
        ridge = np.linalg.solve(x[:half].T @ x[:half] + 1e-2 * np.eye(x.shape[1]),
                                x[:half].T @ y[:half])
        error = ((x[half:] @ ridge - y[half:]) ** 2).mean()
        scores.append(1 - error / y[half:].var())
    return scores


@entry
def main(argv):
    cfg = parse(Config, argv, __doc__)
    tokenizer = backbone.load_tokenizer(cfg.model)
    subjects = [Subject(backbone.load(cfg.model, "cpu", torch.float32))]
    for folder in cfg.converted:
        student, _ = masked.load_converted(folder, "cpu", torch.float32)
        subjects.append(Subject(student.lm, student, Path(folder).name))
    mask_id = subjects[-1].student.mask_id
    sample = make_lines(Pieces(tokenizer), cfg.count, cfg.seed, mask_id)
    rows = []
    for subject in subjects:
        gains = evidence(subject, *sample)
        gains["left + right"] = gains["left"] + gains["right"]
        if subject.student:
            gains["r from h[0], R^2"], gains["r from h[1], R^2"] = probe(
                subject.student, tokenizer, cfg.seed)
            print(f"{subject.name}, lost without a head (left / right): {heads(subject, sample)}")
        rows.append([subject.name, *gains.values()])
    numbers = [row[1:] for row in rows[1:]]
    means = [report.plus_minus(values, ".2f") for values in zip(*numbers)]
    rows[0] += [None, None]                             # the AR model sees no masks
    print(report.table(["model", *gains], [*rows, ["converted", *means]]))
    return rows


if __name__ == "__main__":
    main()
