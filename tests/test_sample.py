"""sample.py writes with every kind of model, shows its steps and is a function of the seed."""
import json
import shutil

import pytest
import torch
from conftest import fails
from PIL import Image

import generate
import sample
from core import masked

set_nfe = generate.hybrid.HybridForCausalLM.set_nfe


def write(capsys, runs, folder, *flags):
    """(the text that main returns, what it prints)."""
    capsys.readouterr()
    text = sample.main(["--model", f"{runs}/{folder}", "--new", "12", *flags])
    return text, capsys.readouterr().out


@pytest.fixture
def converted(runs):
    """Name of the folder of a converted model with two-way attention."""
    return sorted(runs.glob("convert/w*/result.json"))[0].parent.relative_to(runs)


def test_greedy_text_is_that_of_generate(runs, capsys):
    """The loop by hand, the library's generate() and the prefix of a longer text agree."""
    text, printed = write(capsys, runs, "hybrid", "--temperature", "0")
    model = generate.hybrid.from_bridge(runs / "hybrid")
    tokenizer = generate.hybrid.load_tokenizer(model)
    ids = tokenizer("def main(args):", return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert tokenizer.decode(out[0]) == text == printed.strip("\n")
    longer, _ = write(capsys, runs, "bridge", "--temperature", "0", "--new", "14")
    assert longer.startswith(text)


def test_a_text_is_a_function_of_the_seed(runs, capsys):
    for folder in ("hybrid", "generator"):
        flags = ["--temperature", "3", "--refinements", "0", "--new", "6"]
        first, _ = write(capsys, runs, folder, *flags)
        assert write(capsys, runs, folder, *flags)[0] == first
        assert write(capsys, runs, folder, *flags, "--seed", "1")[0] != first
        assert first.startswith("def main(args):")


def test_sampling_defaults_of_the_base_do_not_count(runs):
    """A generation_config.json may set top_k, penalties and more; only its end tokens count."""
    model = generate.hybrid.from_bridge(runs / "bridge")
    ids = torch.tensor([[5, 6, 7]])
    cfg = sample.Config(new=8, temperature=1.0)
    texts = []
    for penalty in (1.0, 9.0):
        model.generation_config.repetition_penalty = penalty
        model.generation_config.top_k = 1
        texts.append(sample.write_tokens(model, ids, cfg, lambda *_: None))
    assert torch.equal(*texts)
    model.generation_config.eos_token_id = [1, texts[0][0, 5].item()]
    stopped = sample.write_tokens(model, ids, cfg, lambda *_: None)
    assert stopped[0].tolist() == texts[0][0, :stopped.shape[1]].tolist() and stopped.shape[1] <= 6


def test_token_blocks_one_by_one(runs):
    """sample.py asks for one token block at a time: the same text as all in one call."""
    model = generate.hybrid.from_bridge(runs / "generator")
    prior = generate.token_prior(runs / "data", model.lm.V)
    cfg = sample.Config(model=str(runs / "generator"), new=10, block_size=4, refinements=1)
    ids = torch.tensor([[5, 6, 7]])
    calls = []
    out = sample.write_blocks(model, ids, cfg, lambda ids, hidden: calls.append(hidden.any()))
    want = generate.generate_blocks(model, ids, 10, prior, block_size=4, nfe=4, refinements=1,
                                    temperature=cfg.temperature)
    assert torch.equal(out, want)
    assert calls == 3 * [*(4 + 1) * [True], False]              # estimates, then a finished block


def test_masks_are_filled_before_a_suffix(runs, capsys, converted):
    text, printed = write(capsys, runs, converted, "--suffix", " return x", "--steps", "4",
                          "--show")
    lines = printed.strip("\n").split("\n")
    assert text.endswith(" return x") and masked.MASK not in text
    assert [line.count("_") >= 3 * left for line, left in zip(lines, (3, 2, 1, 0))] == 4 * [True]
    assert lines[-1] == f"  4 {text!r}"


def test_special_tokens_in_a_prompt_are_text(runs, capsys, converted):
    prompt = f"{masked.MASK}{masked.MASK} x"
    text, printed = write(capsys, runs, converted, "--prompt", prompt)
    assert text.startswith(prompt) and text.count(masked.MASK) == 2 and printed == text + "\n"


@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_prompt_begins_as_the_training_text_does(runs, monkeypatch, adds_bos):
    """With BOS where the tokenizer adds it. Else an empty prompt is EOS."""
    from tokenizers.processors import TemplateProcessing
    model, tokenizer, _ = sample.load(runs / "hybrid", "cpu", torch.float32)
    first = [tokenizer.eos_token_id]
    if adds_bos:
        tokenizer.add_special_tokens({"bos_token": "<s>"})
        first = [tokenizer.bos_token_id]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", *first)])
    monkeypatch.setattr(sample, "load", lambda *_: (model, tokenizer, lambda model, ids, *_: ids))
    plain = tokenizer("import os", add_special_tokens=False)["input_ids"]
    for prompt, want in (("", first), ("import os", first * adds_bos + plain)):
        assert sample.main(["--prompt", prompt]) == tokenizer.decode(want)
    text = sample.main(["--prompt", "na\udcc3\udcafve\udcff"])         # bytes that Python could not decode
    assert text.removeprefix("<s>") == "naïve\ufffd"


def test_the_film_has_a_picture_a_step(runs, capsys, converted, tmp_path):
    write(capsys, runs, converted, "--steps", "4", "--temperature", "5", "--gif",
          f"{tmp_path}/film.gif")
    with Image.open(tmp_path / "film.gif") as film:
        assert film.format == "GIF" and film.n_frames == 4
        film.seek(3)
        assert film.info["duration"] == 2000


def test_steps_are_the_calls_of_a_hybrid(runs, monkeypatch):
    calls = []
    monkeypatch.setattr(generate.hybrid.HybridForCausalLM, "set_nfe",
                        lambda self, nfe: calls.append(nfe) or set_nfe(self, nfe))
    for steps in ("2", "0"):
        sample.main(["--model", f"{runs}/hybrid", "--new", "1", "--steps", steps])
    assert calls == [4, 2, 4, 4]                                # when loaded, when used


def test_half_a_character_at_the_end_is_printed(runs, capsys, monkeypatch):
    """Of every kind of text, also one that comes all at once."""
    def write(model, ids, cfg, watch):
        ids = torch.cat([ids, ids.new_tensor([tokenizer.convert_tokens_to_ids(["Ã"])])], 1)
        watch(ids, torch.zeros_like(ids))
        return ids
    model, tokenizer, _ = sample.load(runs / "hybrid", "cpu", torch.float32)
    monkeypatch.setattr(sample, "load", lambda *_: (model, tokenizer, write))
    text = sample.main(["--model", "x", "--prompt", "a"])
    assert text == "a\ufffd" and capsys.readouterr().out == text + "\n"


def test_half_a_character_waits(capsys):
    """A token may end inside a character: it is printed when the rest has come."""
    class Bytes:
        def decode(self, ids):
            return bytes(ids.tolist()).decode(errors="replace")
    screen = sample.Screen(Bytes(), show=False)
    for count in range(1, 5):
        ids = torch.tensor([list("aäb".encode())])[:, :count]
        screen(ids, torch.zeros_like(ids))
    assert capsys.readouterr().out == "aäb"
    assert screen.steps == ["a", "a\ufffd", "aä", "aäb"]


def test_refusals(runs, capsys, converted, tmp_path):
    assert "hybrid.py" in fails(capsys, sample.main, "--model", tmp_path / "nothing")
    assert "no converted model" in fails(capsys, sample.main, "--model", runs / "toy")
    for folder in ("hybrid", converted, "generator"):
        message = fails(capsys, sample.main, "--model", runs / folder, "--new", 10 ** 6)
        assert "positions" in message and "--new" in message
        message = fails(capsys, sample.main, "--model", runs / folder, "--temperature", -1)
        assert "temperature must not be negative" in message
    for folder in ("hybrid", "generator"):
        message = fails(capsys, sample.main, "--model", runs / folder, "--suffix", "x")
        assert "--suffix" in message
    for folder in ("hybrid", converted):
        old = shutil.copytree(runs / folder, tmp_path / folder)
        (old / "config.json").write_text(json.dumps({"dihal": {"config": {}}}))
        (old / "bridge.json").unlink(missing_ok=True)           # the second edition had none
        assert "second edition" in fails(capsys, sample.main, "--model", old)


def test_shards_of_another_tokenizer_are_refused(runs, tmp_path, capsys):
    """Token frequencies of other shards would be a wrong prior, in silence."""
    shutil.copytree(runs / "generator", tmp_path / "generator")
    shutil.copytree(runs / "data", tmp_path / "data")
    meta = json.loads((tmp_path / "data" / "meta.json").read_text())
    (tmp_path / "data" / "meta.json").write_text(json.dumps({**meta, "tokenizer": "0" * 16}))
    assert "tokenized for another model" in fails(capsys, sample.main, "--model", tmp_path / "generator", "--new", "4")
