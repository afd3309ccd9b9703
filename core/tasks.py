"""tasks.py: small tasks with one right answer, generated for any tokenizer. No training, no files.

    python data.py --tasks 0.8                              # mixes lines of them into training text
    examples("induction", Pieces(tokenizer), 64, seed=0)    # 64 Lines, clean and corrupted

A line is one document. A prompt is a line without its answer. There are three groups of tasks. In
the first two (after the Mechanism Shift paper) the answer follows the prompt. In the last it stands
in the middle, and the tokens before it say nothing:

    induction   w1 w2 w3 w4 w5 w6 w1 w2 w3 -> w4       prefix   the word that followed last time
    brackets    ( w1 [ w2 { w3 } -> ]                  prefix   the type that is open
    missing     w1 w2 w3 w4 : w3 w1 w4 -> w2           global   the word that has not come back yet
    countdown   9 = 3 + 1 + 2 + -> 3                   global   the rest of the sum
    infill      w1 w2 w3 _ = w1 w2 w3 w4 -> w4         middle   the word at its place in the copy
    opening     ( w1 _ w2 { w3 } ] ) -> [              middle   the type that is closed
    names       When A and B went to the store, B gave a drink to -> A           prefix, English

The corrupted prompt differs in one token, which changes the answer. In middle tasks that token is
to the right of the answer. A masked model reads the line as it is. An AR model reads the right side
first, as AR models are taught to fill gaps (suffix, prefix, middle: Bavarian et al. 2022). Training
lines come in both orders. `names` is indirect object identification (Wang et al. 2022). It is for
models of English and is never trained on.
"""
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
    """Token ids with the answer at `place`."""
    tokens: list
    corrupted: list     # differ in one token and in the answer
    place: int


def corrupt(tokens, place, changed, token, wrong):
    """The Line whose corrupted side has `token` at `changed` and the answer `wrong`."""
    corrupted = list(tokens)
    corrupted[changed] = token
    corrupted[place] = wrong
    return Line(tokens, corrupted, place)


class Pieces:
    """The single tokens that tasks are written with."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        vocabulary = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        words = [i for i, text in enumerate(vocabulary) if WORD.fullmatch(text or "")]
        if len(words) < LEAST:
            raise UserError(f"the tasks need {LEAST} lower-case words of one token; the tokenizer "
                            f"has {len(words)}")
        self.words = words[:WORDS]
        self.brackets = self.signs("([{)]}")
        self.digits = self.signs("0123456789")
        self.sum = self.signs("=+")
        self.equals = self.signs("=")
        self.colon = self.signs(":")

    def ids(self, texts):
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]

    def signs(self, characters):
        """Their ids, all with a space before them or all without."""
        ids = self.ids([f" {c}" for c in characters])
        if max(map(len, ids)) > 1:
            ids = self.ids(list(characters))
        return [parts[-1] for parts in ids]             # some tokenizers split off a space

    def sample(self, gen, count):
        """`count` different words."""
        return gen.choice(self.words, count, replace=False).tolist()


# -------------------------------------------------------------------------------------------------
# The tasks: (pieces, gen, size) -> Line

def induction(pieces, gen, size):
    *words, other = pieces.sample(gen, size + 1)
    known = size // 2
    if size != SIZE:
        known = int(gen.integers(1, size))
    return corrupt(words + words, place=size + known, changed=known, token=other, wrong=other)


def nested(pieces, gen, size):
    """(tokens of a line of brackets, their types 0 to 2 from the outermost one in)."""
    types = gen.integers(0, 3, size // 2).tolist()
    words = pieces.sample(gen, len(types))
    tokens = []
    for i, word in zip(types, words):
        tokens += [pieces.brackets[i], word]
    tokens += [pieces.brackets[3 + i] for i in reversed(types)]
    return tokens, types


def another(gen, i):
    """A type of brackets that is not type i."""
    return (i + int(gen.integers(1, 3))) % 3


def brackets(pieces, gen, size):
    tokens, types = nested(pieces, gen, size)
    other = another(gen, types[-2])
    last = 2 * len(types)                               # its first closing bracket is shown
    return corrupt(tokens, place=last + 1, changed=last - 4, token=pieces.brackets[other],
                   wrong=pieces.brackets[3 + other])


def missing(pieces, gen, size):
    words = pieces.sample(gen, max(3, size - 2))
    again = gen.permutation(words).tolist()
    i = int(gen.integers(len(words) - 1))
    tokens = [*words, *pieces.colon, *again]
    return corrupt(tokens, place=len(tokens) - 1, changed=len(words) + 1 + i, token=again[-1],
                   wrong=again[i])


def countdown(pieces, gen, size):
    digits = pieces.digits
    equals, plus = pieces.sum
    terms = gen.integers(0, 9, 3)
    while terms.sum() > 8:                              # 165 triples, all equally likely
        terms = gen.integers(0, 9, 3)
    total = terms.sum()
    a, b = gen.choice(np.arange(total, 10), 2, replace=False)           # two targets: 660 prompts
    tokens = [digits[a], equals]
    for term in [*terms, a - total]:
        tokens += [digits[term], plus]
    return corrupt(tokens[:-1], place=8, changed=0, token=digits[b], wrong=digits[b - total])


def infill(pieces, gen, size):
    *words, other = pieces.sample(gen, max(3, size - 2) + 1)
    tokens = [*words, *pieces.equals, *words]
    return corrupt(tokens, place=len(words) - 1, changed=len(tokens) - 1, token=other, wrong=other)


def opening(pieces, gen, size):
    tokens, types = nested(pieces, gen, size)
    place = int(gen.integers(len(types)))
    other = another(gen, types[place])
    return corrupt(tokens, place=2 * place, changed=len(tokens) - 1 - place,
                   token=pieces.brackets[3 + other], wrong=pieces.brackets[other])


def names(pieces, gen, size):
    texts = [f" {name}" for name in NAMES.split()]
    known = [ids[0] for ids in pieces.ids(texts) if len(ids) == 1]
    if len(known) < 2:
        raise UserError("the task `names` needs English names of one token; the tokenizer has none")
    a, b = gen.choice(known, 2, replace=False).tolist()
    when, both, went, gave = pieces.ids(["When", " and", " went to the store,", " gave a drink to"])
    start = [*when, a, *both, b, *went]
    tokens = [*start, b, *gave, a]
    return corrupt(tokens, place=len(tokens) - 1, changed=len(start), token=a, wrong=b)


# name -> (group, function). To add a task, write a function and add a line.
TRAINED = {                         # mixed into training text by data.py --tasks
    "induction": ("prefix", induction),
    "brackets": ("prefix", brackets),
    "missing": ("global", missing),
    "countdown": ("global", countdown),
    "infill": ("middle", infill),
    "opening": ("middle", opening)}
TASKS = {**TRAINED, "names": ("prefix", names)}


def examples(name, pieces, count, seed):
    """`count` Lines of one length. They end with their answer, unless it is in the middle."""
    group, make = TASKS[name]
    gen = generator(seed, f"task {name}")
    result = []
    for _ in range(count):
        line = make(pieces, gen, SIZE)
        end = None if group == "middle" else line.place + 1
        result.append(Line(line.tokens[:end], line.corrupted[:end], line.place))
    return result


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
