"""tasks.py: small tasks with one right answer, generated for any tokenizer. No training, no files.

    python data.py --tasks 0.8                              # mixes lines of them into training text
    pairs = examples("induction", Pieces(tokenizer), 64, seed=0)    # [(clean, corrupted)] Prompts

A line is one document. A prompt is a line without its answer. Two tasks are solved by
looking back along the prefix, two by weighing all of it (the two groups of the Mechanism Shift
paper), and two have their answer in the middle, where the tokens before it say nothing:

    induction   w1 w2 w3 w4 w5 w6 w1 w2 w3 -> w4       prefix   the word that followed last time
    brackets    ( w1 [ w2 { w3 } -> ]                  prefix   the type that is open
    missing     w1 w2 w3 w4 : w3 w1 w4 -> w2           global   the word that has not come back yet
    countdown   9 = 3 + 1 + 2 + -> 3                   global   what brings the sum to its target
    infill      w1 w2 w3 _ = w1 w2 w3 w4 -> w4         middle   the word at its place in the copy
    opening     ( w1 _ w2 { w3 } ] ) -> [              middle   the type that is closed
    names       When A and B went to the store, B gave a drink to -> A           prefix, English

The corrupted prompt differs in one token, which changes the answer. In middle tasks that token is
to the right of the answer. A masked model reads the line as it is. An AR model reads the right side
first, as AR models are taught to fill gaps (suffix, prefix, middle: Bavarian et al. 2022). Training
lines come in both orders. `names` is indirect object identification (Wang et al. 2022): for models
of English, never trained on.
"""
import functools
import re
from typing import NamedTuple

import numpy as np

from core.common import UserError, generator

SIZE = 6        # of the prompts that are analysed; training lines vary around it
WORDS = 64      # the tasks use the most frequent words that are one token
LEAST = 16      # a tokenizer with fewer words cannot pose the tasks
WORD = re.compile("[\u0120\u2581][a-z]{3,}")     # the two signs that tokenizers show a space by
NAMES = """Mary John James Sarah David Paul Mark Anna Tom Jack Peter Robert Michael Alice Emma Henry
    George Simon Kate Lucy Adam Daniel Laura Maria Martin Steven Thomas William Charles Richard"""


class Line(NamedTuple):
    """A line of a task. With `token` at `changed`, its answer would be `wrong`."""
    tokens: list
    place: int          # of the answer
    changed: int
    token: int
    wrong: int

    def corrupted(self):
        tokens = list(self.tokens)
        tokens[self.changed] = self.token
        tokens[self.place] = self.wrong
        return tokens


class Prompt(NamedTuple):
    """Token ids before and after the answer. `right` is empty but for tasks of the middle."""
    left: list
    right: list
    answer: int


class Pieces:
    """The single tokens that tasks are written with."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        vocabulary = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        words = [i for i, text in enumerate(vocabulary) if WORD.fullmatch(text or "")]
        self.words = enough(words, "lower-case words")[:WORDS]

    def ids(self, texts):
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]

    def sample(self, gen, count):
        """`count` different words."""
        return [self.words[i] for i in gen.choice(len(self.words), count, replace=False)]


@functools.cache
def signs(pieces, characters):
    """Their ids, all with a space before them or all without."""
    ids = pieces.ids([f" {c}" for c in characters])
    if max(map(len, ids)) > 1:
        ids = pieces.ids(list(characters))
    single = [piece[0] for piece in ids if len(piece) == 1]
    return enough(single, f"signs {characters}", len(characters))


def enough(ids, kind, least=LEAST):
    if len(ids) < least:
        raise UserError(f"the task needs {least} {kind} of one token; the tokenizer has {len(ids)}")
    return ids


# -------------------------------------------------------------------------------------------------
# The tasks: (pieces, gen, size) -> Line

def induction(pieces, gen, size):
    *words, other = pieces.sample(gen, size + 1)
    known = size // 2
    if size != SIZE:
        known = int(gen.integers(1, size))
    return Line(words + words, place=size + known, changed=known, token=other, wrong=other)


def nested(pieces, gen, size):
    """(a line of brackets, their kinds [(opening, closing)], a function that gives another)."""
    ids = signs(pieces, "([{)]}")
    kinds = list(zip(ids[:3], ids[3:]))
    chosen = [kinds[i] for i in gen.integers(0, 3, size // 2)]
    tokens = []
    for kind, word in zip(chosen, pieces.sample(gen, len(chosen))):
        tokens += [kind[0], word]
    tokens += [kind[1] for kind in reversed(chosen)]

    def another(kind):
        return kinds[(kinds.index(kind) + int(gen.integers(1, 3))) % 3]
    return tokens, chosen, another


def brackets(pieces, gen, size):
    tokens, chosen, another = nested(pieces, gen, size)
    other = another(chosen[-2])
    last = 2 * len(chosen)                              # its first closing bracket is shown
    return Line(tokens, place=last + 1, changed=last - 4, token=other[0], wrong=other[1])


def missing(pieces, gen, size):
    words = pieces.sample(gen, max(3, size - 2))
    again = [words[i] for i in gen.permutation(len(words))]
    changed = int(gen.integers(len(words) - 1))
    tokens = [*words, *signs(pieces, ":"), *again]
    return Line(tokens, place=len(tokens) - 1, changed=len(words) + 1 + changed, token=again[-1],
                wrong=again[changed])


def countdown(pieces, gen, size):
    digits = signs(pieces, "0123456789")
    equals, plus = signs(pieces, "=+")
    terms = gen.integers(0, 9, 3)
    while terms.sum() > 8:                              # 165 triples, all equally likely
        terms = gen.integers(0, 9, 3)
    total = terms.sum()
    a, b = gen.choice(np.arange(total, 10), 2, replace=False)           # two targets: 660 prompts
    tokens = [digits[a], equals]
    for term in [*terms, a - total]:
        tokens += [digits[term], plus]
    return Line(tokens[:-1], place=8, changed=0, token=digits[b], wrong=digits[b - total])


def infill(pieces, gen, size):
    *words, other = pieces.sample(gen, max(3, size - 2) + 1)
    tokens = [*words, *signs(pieces, "="), *words]
    return Line(tokens, place=len(words) - 1, changed=len(tokens) - 1, token=other, wrong=other)


def opening(pieces, gen, size):
    tokens, chosen, another = nested(pieces, gen, size)
    place = int(gen.integers(len(chosen)))
    other = another(chosen[place])
    return Line(tokens, place=2 * place, changed=len(tokens) - 1 - place, token=other[1],
                wrong=other[0])


def names(pieces, gen, size):
    texts = [f" {name}" for name in NAMES.split()]
    known = [ids[0] for ids in pieces.ids(texts) if len(ids) == 1]
    a, b = gen.choice(enough(known, "English names"), 2, replace=False).tolist()
    when, both, went, gave = pieces.ids(["When", " and", " went to the store,", " gave a drink to"])
    start = [*when, a, *both, b, *went]
    tokens = [*start, b, *gave, a]
    return Line(tokens, place=len(tokens) - 1, changed=len(start), token=a, wrong=b)


# name -> (group, function). To add a task, write a function and add a line.
TRAINED = {                         # mixed into training text by data.py --tasks
    "induction": ("prefix", induction), "brackets": ("prefix", brackets),
    "missing": ("global", missing), "countdown": ("global", countdown),
    "infill": ("middle", infill), "opening": ("middle", opening)}
TASKS = {**TRAINED, "names": ("prefix", names)}


def examples(name, pieces, count, seed):
    """`count` pairs (clean Prompt, corrupted Prompt) of one length."""
    group, make = TASKS[name]
    gen = generator(seed, f"task {name}")
    pairs = []
    for _ in range(count):
        line = make(pieces, gen, SIZE)
        pair = []
        for tokens in (line.tokens, line.corrupted()):
            right = tokens[line.place + 1:] if group == "middle" else []
            pair.append(Prompt(tokens[:line.place], right, tokens[line.place]))
        pairs.append(pair)
    return pairs


def lines(tokenizer):
    """Endless training lines as token ids, without EOS: the tasks in turn, of varying size."""
    pieces = Pieces(tokenizer)
    gen = generator(0, "task lines")
    while True:
        for group, make in TRAINED.values():
            line = make(pieces, gen, int(gen.integers(4, 9)))
            tokens = line.tokens
            if group == "middle" and gen.random() < 0.5:        # the order of an AR model
                tokens = tokens[line.place + 1:] + tokens[:line.place + 1]
            yield np.array(tokens)
