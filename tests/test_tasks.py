"""tasks.py: every prompt has the one answer it claims, as an independent reader finds it."""
import numpy as np
import pytest

import data
from core import tasks
from core.common import UserError
from core.tasks import Pieces


@pytest.fixture(scope="module")
def pieces(text):
    return Pieces(data.train_tokenizer(data.resolve(str(text)), 1024))


def solve(name, pieces, left, right):
    """The token between `left` and `right`, worked out by hand."""
    digits = tasks.signs(pieces, "0123456789")
    signs = tasks.signs(pieces, "([{)]}")
    if name == "induction":
        assert left.count(left[-1]) == 2
        return left[left.index(left[-1]) + 1]
    if name == "missing":
        cut = left.index(tasks.signs(pieces, ":")[0])
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
    for clean, corrupted in tasks.examples(name, pieces, 20, seed=3):
        assert clean.answer != corrupted.answer
        assert (len(clean.left), len(clean.right)) == (len(corrupted.left), len(corrupted.right))
        both = zip(clean.left + clean.right, corrupted.left + corrupted.right, strict=True)
        assert sum(a != b for a, b in both) == 1
        assert bool(clean.right) == (group == "middle")
        if group == "middle":                           # what decides is to the right
            assert clean.left == corrupted.left
        for prompt in (clean, corrupted):
            assert solve(name, pieces, prompt.left, prompt.right) == prompt.answer


@pytest.mark.parametrize("name", tasks.TRAINED)
def test_prompts_are_many_and_a_function_of_the_seed(name, pieces):
    pairs = tasks.examples(name, pieces, 2000, seed=0)
    assert len({(*clean.left, -1, *clean.right) for clean, _ in pairs}) >= 500
    assert pairs[:5] == tasks.examples(name, pieces, 5, seed=0)
    assert pairs[:5] != tasks.examples(name, pieces, 5, seed=1)
    lengths = {len(clean.left + clean.right) for clean, _ in pairs}
    assert len(lengths) == 1                            # so they fit in one tensor


def test_training_lines_take_turns_and_hold_middle_tasks_in_both_orders(pieces):
    stream = tasks.lines(pieces.tokenizer)
    [equals] = tasks.signs(pieces, "=")
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


def test_names_asks_for_the_one_who_has_not_come_back(pieces, tmp_path):
    sentence = "When went to the store, gave a drink to and"
    (tmp_path / "x.txt").write_text(f"{sentence} {' '.join(tasks.NAMES.split())}\n\n" * 2000)
    tokenizer = data.train_tokenizer(data.resolve(str(tmp_path / "x.txt")), 600)
    english = Pieces.__new__(Pieces)                    # a text without 16 other words
    english.tokenizer = tokenizer
    pairs = tasks.examples("names", english, 600, seed=0)
    assert len({tuple(clean.left) for clean, _ in pairs}) >= 300
    for clean, corrupted in pairs[:20]:
        [(there, here)] = [(a, b) for a, b in zip(clean.left, corrupted.left) if a != b]
        assert (there, here) == (corrupted.answer, clean.answer) and not clean.right
        assert clean.left.count(clean.answer) == 1 and clean.left.count(corrupted.answer) == 2
        a = tokenizer.decode(clean.answer)
        b = tokenizer.decode(corrupted.answer)
        said = f"When{a} and{b} went to the store,{b} gave a drink to"
        assert tokenizer.decode(clean.left) == said
    with pytest.raises(UserError, match="16 English names"):        # of one token: here are none
        tasks.examples("names", pieces, 1, seed=0)


def test_a_tokenizer_without_words_cannot_pose_the_tasks():
    class Poor:
        eos_token_id = 0

        def __len__(self):
            return 3

        def convert_ids_to_tokens(self, ids):
            return ["abc"[i] for i in ids]
    with pytest.raises(UserError, match="16 lower-case words of one token"):
        Pieces(Poor())
