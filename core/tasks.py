"""tasks.py: small tasks with one right answer, generated for the tokenizer at hand. No training, no files.

    python data.py --tasks 0.6                 # mixes lines of them into the training text, never into val
    python circuits.py --model out/tasks/toy --task induction        # compares how two models solve one
    pairs = examples("induction", Pieces(tokenizer), 64, seed=0)    # clean and corrupted prompts of equal length

A line is one document, so a prompt is EOS and the beginning of a line. Two tasks are solved by looking back along the
prefix, two only by weighing all of it (the grouping of the mechanism-shift paper; its tasks are too hard for a toy):

    induction   w1 w2 w3 w4 w5 w6 w1 w2 w3 -> w4              prefix     the word that followed last time
    brackets    ( w1 [ w2 { w3 } -> ]                         prefix     the type that is open
    missing     w1 w2 w3 w4 : w3 w1 w4 -> w2                  global     the word that has not come back yet
    countdown   7 = 3 + -> 4                                  global     what brings the sum to its target

The corrupted prompt differs in one token, which changes the answer. Both prompts have the same length.
"""
from typing import NamedTuple

import numpy as np

from core.common import UserError
from core.draws import generator

TASKS = ("induction", "brackets", "missing", "countdown")
GLOBAL = ("missing", "countdown")
WORDS = 64      # single-token words that the tasks use: the most frequent ones of the vocabulary
LEAST = 16      # fewer than this and the tokenizer cannot pose the tasks


class Pair(NamedTuple):
    """Token ids: a prompt, the same with one token changed, what follows the one and the other, and how the line ends
    after the clean prompt's answer."""
    clean: list
    corrupted: list
    answer: int
    wrong: int
    rest: list


class Pieces:
    """The single tokens that the tasks are written with."""

    def __init__(self, tokenizer):
        self.tokenizer, self.eos = tokenizer, tokenizer.eos_token_id
        self.known = {}
        # a leading space is shown as one of two signs, by byte-level and by sentencepiece tokenizers
        vocabulary = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        self.words = [i for i, text in enumerate(vocabulary) if text and text[0] in "\u0120\u2581" and len(text) > 3
                      and text[1:].isalpha() and text[1:].isascii() and text[1:].islower()][:WORDS]
        if len(self.words) < LEAST or self.eos is None:
            raise UserError(f"this tokenizer has {len(self.words)} single-token words and end-of-text token "
                            f"{self.eos}; the tasks need {LEAST} words and such a token")

    def signs(self, characters):
        """Their ids: all with a space before them, or none. Raises UserError when neither way each is one token."""
        if characters in self.known:
            return self.known[characters]
        for space in (" ", ""):
            ids = [self.tokenizer(space + c, add_special_tokens=False)["input_ids"] for c in characters]
            if all(len(i) == 1 for i in ids):
                self.known[characters] = [i[0] for i in ids]
                return self.known[characters]
        raise UserError(f"{characters!r} are no single tokens of this tokenizer, so its task cannot be posed")

    def draw(self, gen, count):
        """`count` different words."""
        return [self.words[i] for i in gen.choice(len(self.words), count, replace=False)]


# ---------------------------------------------------------------------------------------------------- the tasks
def induction(pieces, gen, size):
    *words, other = pieces.draw(gen, size + 1)
    known = size // 2 if size == 6 else int(gen.integers(1, size))
    changed = [*words[:known], other, *words[known + 1:]]
    return Pair(words + words[:known], changed + words[:known], words[known], other, words[known + 1:])


def brackets(pieces, gen, size):
    signs = pieces.signs("([{)]}")
    kinds = list(zip(signs[:3], signs[3:]))
    depth = max(2, size // 2)
    chosen = [kinds[i] for i in gen.integers(0, 3, depth)]
    words = pieces.draw(gen, depth)
    target = chosen[-2]
    other = kinds[(kinds.index(target) + int(gen.integers(1, 3))) % 3]
    prompt = [token for kind, word in zip(chosen, words, strict=True) for token in (kind[0], word)] + [chosen[-1][1]]
    changed = [*prompt[:2 * depth - 4], other[0], *prompt[2 * depth - 3:]]
    return Pair(prompt, changed, target[1], other[1], [kind[1] for kind in chosen[:-2]][::-1])


def missing(pieces, gen, size):
    count = max(3, size - 2)
    words = pieces.draw(gen, count)
    *shown, answer = [words[i] for i in gen.permutation(count)]
    place, [colon] = int(gen.integers(count - 1)), pieces.signs(":")
    changed = [*shown[:place], answer, *shown[place + 1:]]
    return Pair([*words, colon, *shown], [*words, colon, *changed], answer, shown[place], [])


def countdown(pieces, gen, size):
    digits, (equals, plus) = pieces.signs("0123456789"), pieces.signs("=+")
    b = int(gen.integers(7))
    a, c = gen.choice(np.arange(b, 10), 2, replace=False)
    rest = [equals, digits[b], plus]
    return Pair([digits[a], *rest], [digits[c], *rest], digits[a - b], digits[c - b], [])


def make(name, pieces, gen, size=6):
    """One Pair of the task `name`. `size` sets the length; 6 is the one that is analysed."""
    return {"induction": induction, "brackets": brackets, "missing": missing,
            "countdown": countdown}[name](pieces, gen, size)


def examples(name, pieces, count, seed):
    """`count` Pairs of one length, every prompt beginning with EOS. A small task (countdown) has few different ones."""
    gen = generator(seed, f"task {name}")
    pairs = [make(name, pieces, gen) for _ in range(count)]
    pairs = [p._replace(clean=[pieces.eos, *p.clean], corrupted=[pieces.eos, *p.corrupted]) for p in pairs]
    if len({len(ids) for p in pairs for ids in (p.clean, p.corrupted)}) > 1:
        raise UserError(f"the prompts of task {name} differ in length under this tokenizer")
    return pairs


def lines(tokenizer, seed=0):
    """Endless training lines as token ids (without EOS): the tasks in turn, of varying size."""
    pieces, gen = Pieces(tokenizer), generator(seed, "task lines")
    while True:
        for name in TASKS:
            pair = make(name, pieces, gen, int(gen.integers(4, 9)))
            yield np.array([*pair.clean, pair.answer, *pair.rest])
