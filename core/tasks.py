"""tasks.py: small tasks with one right answer, generated for the tokenizer at hand. No training, no files.

    python data.py --tasks 0.6                 # mixes lines of them into the training text, never into val
    python circuits.py --model out/tasks/toy --task induction        # compares how two models solve one
    pairs = examples("induction", Pieces(tokenizer), 64, seed=0)     # clean and corrupted prompts of equal length

A line is one document, so a prompt is EOS and a line without its answer. Two tasks are solved by looking back along
the prefix, two only by weighing all of it (the grouping of the mechanism-shift paper, whose own tasks are too hard for
a toy), and two have their answer in the middle, where what stands before it says nothing:

    induction   w1 w2 w3 w4 w5 w6 w1 w2 w3 -> w4              prefix     the word that followed last time
    brackets    ( w1 [ w2 { w3 } -> ]                         prefix     the type that is open
    missing     w1 w2 w3 w4 : w3 w1 w4 -> w2                  global     the word that has not come back yet
    countdown   9 = 3 + 1 + 2 + -> 3                          global     what brings the sum to its target
    infill      w1 w2 w3 _ = w1 w2 w3 w4 -> w4                middle     the word at its place in the copy
    opening     ( w1 _ w2 { w3 } ] ) -> [                     middle     the type that is closed
    names       When A and B went to the store, B gave a drink to -> A      English, never trained on: who is not back

The corrupted prompt, as long, differs in one token, which changes the answer and in middle tasks stands to the right of
it. A masked model reads such a line as it is; an AR model, which sees no right side, is given the same tokens as AR
models are taught to fill gaps (suffix, prefix, middle: Bavarian et al. 2022). Training lines have either order.
"""
from typing import NamedTuple

import numpy as np

from core.common import UserError
from core.draws import generator

SIZE = 6        # of the prompts that are analysed; training lines vary around it
WORDS = 64      # single-token words that the tasks use: the most frequent ones of the vocabulary
LEAST = 16      # fewer than this and the tokenizer cannot pose the tasks
NAMES = ("Mary John James Sarah David Paul Mark Anna Tom Jack Peter Robert Michael Alice Emma Henry George Simon Kate "
         "Lucy Adam Daniel Laura Maria Martin Steven Thomas William Charles Richard").split()


class Pair(NamedTuple):
    """Token ids: the visible tokens of a prompt, the same with one token changed, what is asked for in the one and the
    other, before which of the tokens it stands (their number: at the end), and how the line ends after it."""
    clean: list
    corrupted: list
    answer: int
    wrong: int
    place: int
    rest: list = []


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
        if characters not in self.known:
            ways = [self.tokenizer([space + c for c in characters], add_special_tokens=False)["input_ids"]
                    for space in (" ", "")]
            whole = [ids for ids in ways if all(len(i) == 1 for i in ids)]
            if not whole:
                raise UserError(f"{characters!r} are no single tokens of this tokenizer, so its task cannot be posed")
            self.known[characters] = [i for [i] in whole[0]]
        return self.known[characters]

    def draw(self, gen, count):
        """`count` different words."""
        return [self.words[i] for i in gen.choice(len(self.words), count, replace=False)]


def changed(tokens, place, token):
    return [*tokens[:place], token, *tokens[place + 1:]]


def induction(pieces, gen, size):
    *words, other = pieces.draw(gen, size + 1)
    known = size // 2 if size == SIZE else int(gen.integers(1, size))
    again = words[:known]
    return Pair(words + again, changed(words, known, other) + again, words[known], other, size + known,
                words[known + 1:])


def nested(pieces, gen, size):
    """Brackets that open, a word after each: the kinds drawn, [opening, word, opening, word, ...], and a function that
    draws another kind than a given one."""
    signs = pieces.signs("([{)]}")
    kinds = list(zip(signs[:3], signs[3:]))
    chosen = [kinds[i] for i in gen.integers(0, 3, size // 2)]
    words = pieces.draw(gen, len(chosen))

    def another(kind):
        return kinds[(kinds.index(kind) + int(gen.integers(1, 3))) % 3]
    return chosen, [token for kind, word in zip(chosen, words, strict=True) for token in (kind[0], word)], another


def brackets(pieces, gen, size):
    chosen, opened, another = nested(pieces, gen, size)
    target, place = chosen[-2], 2 * len(chosen) - 4
    other, prompt = another(target), [*opened, chosen[-1][1]]
    return Pair(prompt, changed(prompt, place, other[0]), target[1], other[1], len(prompt),
                [kind[1] for kind in chosen[:-2]][::-1])


def missing(pieces, gen, size):
    words = pieces.draw(gen, max(3, size - 2))
    *shown, answer = [words[i] for i in gen.permutation(len(words))]
    place, left = int(gen.integers(len(shown))), [*words, *pieces.signs(":")]
    return Pair(left + shown, left + changed(shown, place, answer), answer, shown[place], len(left + shown))


def countdown(pieces, gen, size):
    digits, (equals, plus) = pieces.signs("0123456789"), pieces.signs("=+")
    while (terms := gen.integers(0, 9, 3)).sum() > 8:                            # 165 triples, all equally likely
        pass
    a, c = gen.choice(np.arange(terms.sum(), 10), 2, replace=False)              # two targets: 660 prompts
    sums = [equals, *(token for t in terms for token in (digits[t], plus))]
    return Pair([digits[a], *sums], [digits[c], *sums], digits[a - terms.sum()], digits[c - terms.sum()], 8)


def infill(pieces, gen, size):
    *words, other = pieces.draw(gen, max(3, size - 2) + 1)
    gap, left = len(words) - 1, [*words[:-1], *pieces.signs("=")]
    return Pair(left + words, left + changed(words, gap, other), words[gap], other, gap)


def opening(pieces, gen, size):
    chosen, opened, another = nested(pieces, gen, size)
    gap = 2 * int(gen.integers(len(chosen)))                                     # the bracket that is not shown
    target, closed = chosen[gap // 2], [kind[1] for kind in chosen][::-1]
    other, place = another(target), len(chosen) - 1 - gap // 2
    left = opened[:gap] + opened[gap + 1:]
    return Pair(left + closed, left + changed(closed, place, other[1]), target[0], other[0], gap)


def names(pieces, gen, size):
    """Indirect object identification (Wang et al. 2022)."""
    known = pieces.tokenizer([f" {name}" for name in NAMES], add_special_tokens=False)["input_ids"]
    known = [ids[0] for ids in known if len(ids) == 1]
    if len(known) < LEAST:
        raise UserError(f"this tokenizer writes {len(known)} of {len(NAMES)} English names as one token, and the "
                        f"task needs {LEAST}")
    a, b = (int(i) for i in gen.choice(known, 2, replace=False))
    place, thing = gen.choice(["store", "park", "school", "office"]), gen.choice(["drink", "book", "ring", "letter"])
    when, went, gave = pieces.tokenizer(["When", f" went to the {place},", f" gave a {thing} to"],
                                        add_special_tokens=False)["input_ids"]
    prompt = [*when, a, *pieces.tokenizer(" and", add_special_tokens=False)["input_ids"], b, *went, b, *gave]
    return Pair(prompt, changed(prompt, len(prompt) - len(gave) - 1, a), a, b, len(prompt))


# name -> (group, function of (pieces, gen, size) that returns a Pair). A new task is a function and a line here.
MIXED = {"induction": ("prefix", induction), "brackets": ("prefix", brackets), "missing": ("global", missing),
         "countdown": ("global", countdown), "infill": ("middle", infill), "opening": ("middle", opening)}
TASKS = {**MIXED, "names": ("prefix", names)}    # English: mixed into no training text


def examples(name, pieces, count, seed):
    """`count` Pairs of one length, every prompt beginning with EOS."""
    gen, (_, make) = generator(seed, f"task {name}"), TASKS[name]
    pairs = [make(pieces, gen, SIZE) for _ in range(count)]
    return [p._replace(clean=[pieces.eos, *p.clean], corrupted=[pieces.eos, *p.corrupted], place=p.place + 1)
            for p in pairs]


def lines(tokenizer):
    """Endless training lines as token ids (without EOS): the tasks in turn, of varying size."""
    pieces, gen = Pieces(tokenizer), generator(0, "task lines")
    while True:
        for _, make in MIXED.values():
            pair = make(pieces, gen, int(gen.integers(4, 9)))
            left, right = pair.clean[:pair.place], pair.clean[pair.place:]
            first = bool(right) and gen.random() < 0.5                           # in the order of an AR model
            yield np.array([*right, *left, pair.answer] if first else [*left, pair.answer, *right, *pair.rest])
