"""tasks.py: every prompt has the one answer it claims, as an independent reader finds; training lines hold them."""
import shutil
from types import SimpleNamespace

import pytest
import torch

import data
from core import backbone, masked, tasks
from core.attribution import Subject
from core.common import UserError


def solve(name, pieces, left, right):
    """What stands between `left` and `right`, worked out by hand."""
    digit, signs = pieces.signs("0123456789"), pieces.signs("([{)]}")
    if name == "induction":
        assert left.count(left[-1]) == 2
        return left[left.index(left[-1]) + 1]
    if name == "missing":
        cut = left.index(pieces.signs(":")[0])
        return (set(left[:cut]) - set(left[cut + 1:])).pop()
    if name == "countdown":
        a, *terms = (digit.index(i) for i in left if i in digit)
        return digit[a - sum(terms)]
    if name == "infill":
        return right[1 + len(left)]
    stack = []
    for i in left if name == "brackets" else right[::-1]:                       # from the side of the open ones
        if i in signs and (i in signs[:3]) == (name == "brackets"):
            stack.append(signs.index(i) % 3)
        elif i in signs:
            assert signs.index(i) % 3 == stack.pop()
    return signs[stack[-1] + 3] if name == "brackets" else signs[stack[-1]]


def test_pairs_differ_in_one_token_and_have_the_answer_they_claim(runs):
    tokenizer = backbone.load_tokenizer(runs / "toy")
    pieces = tasks.Pieces(tokenizer)
    for name, (group, _) in tasks.MIXED.items():
        for p in tasks.examples(name, pieces, 20, seed=3):
            assert len(p.clean) == len(p.corrupted) and p.answer != p.wrong and p.clean[0] == tokenizer.eos_token_id
            changed = [i for i, (a, b) in enumerate(zip(p.clean, p.corrupted, strict=True)) if a != b]
            assert len(changed) == 1 and (p.place < len(p.clean)) == (group == "middle")
            assert group != "middle" or changed[0] >= p.place                  # what decides stands on the right
            for ids, answer in ((p.clean, p.answer), (p.corrupted, p.wrong)):
                assert solve(name, pieces, ids[1:p.place], ids[p.place:]) == answer, name


def test_prompts_are_many_and_the_left_side_of_a_middle_task_says_nothing(runs):
    pieces = tasks.Pieces(backbone.load_tokenizer(runs / "toy"))
    for name, (group, _) in tasks.MIXED.items():
        assert len({(p.place, *p.clean) for p in tasks.examples(name, pieces, 2000, seed=0)}) >= 500, name
        if group == "middle":
            for p in tasks.examples(name, pieces, 50, seed=4):
                assert p.clean[:p.place] == p.corrupted[:p.place] and p.answer != p.wrong


def test_an_ar_model_reads_the_right_side_first_and_a_masked_one_in_its_place(runs):
    student, tokenizer = masked.load_converted(runs / "repr_align" / "w0", torch.device("cpu"), torch.float32)
    seen, place = torch.tensor([[0, 11, 12, 13, 14], [0, 21, 22, 23, 24]]), torch.tensor([3, 5])
    ar, twin = Subject(backbone.load(runs / "toy", torch.device("cpu"), torch.float32)), Subject(student.lm, student)
    turned = torch.tensor([[0, 13, 14, 11, 12], [0, 21, 22, 23, 24]])
    M = student.mask_id
    whole = torch.tensor([[0, 11, 12, M, 13, 14], [0, 21, 22, 23, 24, M]])
    with torch.no_grad():
        assert torch.equal(ar.embed(seen, place), ar.lm.embed(turned))
        want = ar.lm.head(ar.lm.through(ar.lm.embed(turned), 0, ar.lm.L))[:, -1]
        assert torch.allclose(ar.logits(ar.embed(seen, place), place), want, atol=1e-5)
        *_, last = student.states(whole, whole == M)
        want = student.logits(last)[torch.arange(2), place - 1]
        got = twin.logits(twin.embed(seen, place), place)
        assert torch.allclose(got, want, atol=1e-5)
        other = seen.clone()
        other[0, 4] = 99                                                        # the right side is seen
        assert not torch.allclose(twin.logits(twin.embed(other, place), place)[0], got[0], atol=1e-4)


def test_training_lines_hold_middle_tasks_in_both_orders(runs):
    tokenizer = backbone.load_tokenizer(runs / "toy")
    [equals], stream, orders = tasks.Pieces(tokenizer).signs("="), tasks.lines(tokenizer), set()
    for _ in range(20):
        group = {name: next(stream).tolist() for name in tasks.MIXED}
        line = group["infill"]
        orders.add("right first" if line[0] == equals else "as it is")
        cut = len(line) // 2
        assert line[:cut] == line[cut + 1:] if line[0] != equals else line[1:1 + cut] == line[1 + cut:]
    assert orders == {"right first", "as it is"}


def test_names_asks_for_the_one_who_has_not_come_back(runs, tmp_path):
    english = "When went to the store park school office , gave a drink book ring letter and"
    (tmp_path / "x.txt").write_text(f"{english} {' '.join(tasks.NAMES)}\n\n" * 2000)
    tokenizer = data.train_tokenizer(data.resolve(str(tmp_path / "x.txt")), 600)
    pieces = SimpleNamespace(tokenizer=tokenizer, eos=tokenizer.eos_token_id)
    drawn = tasks.examples("names", pieces, 600, seed=0)
    assert len({tuple(p.clean) for p in drawn}) >= 500
    for p in drawn[:20]:
        [changed] = [i for i, (a, b) in enumerate(zip(p.clean, p.corrupted, strict=True)) if a != b]
        assert p.clean.count(p.answer) == 1 and p.clean.count(p.wrong) == 2 and p.place == len(p.clean)
        assert p.corrupted.count(p.answer) == 2 and p.clean[changed] == p.wrong
        a, b = tokenizer.decode(p.answer), tokenizer.decode(p.wrong)
        assert tokenizer.decode(p.clean[1:]).startswith(f"When{a} and{b} went to the ")
    with pytest.raises(UserError, match="English names"):                     # the toy's tokenizer knows none
        tasks.examples("names", tasks.Pieces(backbone.load_tokenizer(runs / "toy")), 1, seed=0)


def test_a_tokenizer_without_words_cannot_pose_the_tasks(runs):
    class Poor:
        eos_token_id = 0

        def __len__(self):
            return 3

        def convert_ids_to_tokens(self, ids):
            return ["abc"[i] for i in ids]
    with pytest.raises(UserError, match="single-token words"):
        tasks.Pieces(Poor())


def test_lines_make_up_their_share_of_the_training_text_and_none_of_the_held_out(text, tmp_path, runs):
    tokenizer, some = backbone.load_tokenizer(runs / "toy"), tmp_path / "text"
    some.mkdir()
    for file in sorted(text.glob("a*.py")):
        shutil.copy(file, some)
    for name in "ab":
        (tmp_path / name).mkdir()
    plain, mixed = (data.write_shards(data.resolve(str(some)), tokenizer, tmp_path / name, share=share)
                    for name, share in (("a", 0.0), ("b", 0.3)))
    with pytest.raises(UserError, match="share"):
        data.prepare(str(some), None, tmp_path / "c", tasks=1.0)
    assert mixed["sha256"]["val"] == plain["sha256"]["val"]
    assert 1 - plain["tokens"]["train"] / mixed["tokens"]["train"] == pytest.approx(0.3, abs=0.01)
