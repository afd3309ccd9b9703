"""tasks.py: every prompt has the one answer it claims, as an independent reader finds it."""
import numpy as np
import pytest

import data
from core import tasks
from core.common import UserError
from core.tasks import Pieces


LOWER = tasks.NAMES.lower()


def make_pieces(folder, names=LOWER):
    """Pieces of a tokenizer that knows these names and the signs of the tasks."""
    words = " ".join(names.split())
    line = f"When went to the store, gave a drink to and {words} ( [ {{ }} ] ) : = + "
    line += " ".join("0123456789")
    file = folder / "words.txt"
    file.write_text(f"{line}\n\n" * 300)
    return Pieces(data.train_tokenizer(data.resolve(str(file)), 700))


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    return make_pieces(tmp_path_factory.mktemp("words"))


def solve(name, pieces, left, right):
    """The token between `left` and `right`, worked out by hand."""
    digits = pieces.digits
    signs = pieces.brackets
    if name == "induction":
        assert left.count(left[-1]) == 2
        return left[left.index(left[-1]) + 1]
    if name == "missing":
        cut = left.index(pieces.colon[0])
        [answer] = set(left[:cut]) - set(left[cut + 1:])
        return answer
    if name == "countdown":
        target, *terms = [digits.index(i) for i in left if i in digits]
        return digits[target - sum(terms)]
    if name == "infill":
        return right[1 + len(left)]
    stack = []                                          # brackets and opening: kinds still open
    from_left = name == "brackets"
    for token in left if from_left else right[::-1]:
        if token not in signs:
            continue
        opens = (token in signs[:3]) == from_left
        if opens:
            stack.append(signs.index(token) % 3)
        else:
            assert signs.index(token) % 3 == stack.pop()
    return signs[stack[-1] + 3] if from_left else signs[stack[-1]]


@pytest.mark.parametrize("name", tasks.TRAINED)
def test_prompts_have_the_answer_they_claim_and_differ_in_one_token(name, pieces):
    group, _ = tasks.TRAINED[name]
    for line in tasks.examples(name, pieces, 20, seed=3):
        both = zip(line.tokens, line.corrupted, strict=True)
        changed = [i for i, (a, b) in enumerate(both) if a != b]
        assert len(changed) == 2 and line.place in changed
        assert (line.place == len(line.tokens) - 1) == (group != "middle")
        if group == "middle":                           # what decides is to the right
            assert changed[0] == line.place
        for tokens in (line.tokens, line.corrupted):
            left = tokens[:line.place]
            right = tokens[line.place + 1:]
            assert solve(name, pieces, left, right) == tokens[line.place]


@pytest.mark.parametrize("name", tasks.TRAINED)
def test_prompts_are_many_and_a_function_of_the_seed(name, pieces):
    lines = tasks.examples(name, pieces, 1000, seed=0)
    assert len({(line.place, *line.tokens) for line in lines}) >= 400
    assert lines[:5] == tasks.examples(name, pieces, 5, seed=0)
    assert lines[:5] != tasks.examples(name, pieces, 5, seed=1)
    assert len({len(line.tokens) for line in lines}) == 1           # so they fit in one tensor


def test_training_lines_take_turns_and_hold_middle_tasks_in_both_orders(pieces):
    stream = tasks.lines(pieces.tokenizer)
    [equals] = pieces.equals
    lengths = {name: set() for name in tasks.TRAINED}
    orders = set()
    for _ in range(40):
        group = {name: next(stream) for name in tasks.TRAINED}
        for name, line in group.items():
            assert isinstance(line, np.ndarray)
            lengths[name].add(len(line))
        line = group["infill"].tolist()
        half = len(line) // 2
        if line[0] == equals:
            orders.add("right side first")
            assert line[1:1 + half] == line[1 + half:]
        else:
            orders.add("as it is")
            assert line[:half] == line[half + 1:]
        line = group["induction"].tolist()
        assert line[:len(line) // 2] == line[len(line) // 2:]
    assert orders == {"right side first", "as it is"}
    assert all(len(sizes) > 1 for name, sizes in lengths.items() if name != "countdown")


def test_names_asks_for_the_one_who_has_not_come_back(tmp_path):
    english = make_pieces(tmp_path, tasks.NAMES + LOWER)
    tokenizer = english.tokenizer
    lines = tasks.examples("names", english, 600, seed=0)
    assert len({tuple(line.tokens) for line in lines}) >= 300
    for line in lines[:20]:
        assert line.place == len(line.tokens) - 1
        a = tokenizer.decode(line.tokens[-1])
        b = tokenizer.decode(line.corrupted[-1])
        start = f"When{a} and{b} went to the store,"
        assert tokenizer.decode(line.tokens) == f"{start}{b} gave a drink to{a}"
        assert tokenizer.decode(line.corrupted) == f"{start}{a} gave a drink to{b}"


def test_a_tokenizer_without_words_cannot_pose_the_tasks():
    class Poor:
        eos_token_id = 0

        def __len__(self):
            return 3

        def convert_ids_to_tokens(self, ids):
            return ["abc"[i] for i in ids]
    with pytest.raises(UserError, match="16 lower-case words of one token"):
        Pieces(Poor())
