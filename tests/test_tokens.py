"""Windows of tokens: batches are a function of (seed, step, slot). Text that a model samples."""
import math
import shutil
import threading

import numpy as np
import pytest
import torch
from conftest import fails, tiny_model
from test_data import WORLD, all_ids, make_shards, make_tokenizer, read_meta

import data
from core import backbone, sampled
from core.common import UserError


# -------------------------------------------------------------------------------------------------
# Batches

def test_batches_are_a_function_of_seed_step_slot(shards):
    tokens = data.Tokens(shards, "train", 32)
    whole = tokens.batch(7, 3, range(8), 8)
    assert whole.shape == (8, 33) and whole.dtype == torch.int64
    slots = [tokens.batch(7, 3, [slot], 8) for slot in range(8)]
    assert torch.equal(torch.cat(slots), whole)                         # any split over processes
    assert torch.equal(tokens.batch(7, 3, range(8), 8), whole)          # at any time
    assert not torch.equal(tokens.batch(8, 3, range(8), 8), whole)
    assert not torch.equal(tokens.batch(7, 4, range(8), 8), whole)
    assert isinstance(tokens.ids, np.memmap)                            # nothing is read whole


def test_an_epoch_visits_every_window_once(tmp_path):
    T = 4
    n = 13
    tokens = data.Tokens(make_shards(tmp_path / "s", range(n * (T + 1) + T)), "train", T)
    assert tokens.n == n
    epochs = []
    for epoch in range(3):
        starts = [int(tokens.batch(0, epoch * n + i, [0], 1)[0, 0]) for i in range(n)]
        assert sorted(start // (T + 1) for start in starts) == list(range(n))
        epochs.append(starts)
    assert epochs[0] != epochs[1] != epochs[2]


def test_text_that_is_read_more_than_twenty_times_is_named(tmp_path, capsys):
    """In advance, and by no call for a batch."""
    tokens = data.Tokens(make_shards(tmp_path / "s", range(100)), "train", 4)
    assert tokens.n == 19
    tokens.batch(0, 20 * tokens.n, [0], 1)
    tokens.warn(4 * tokens.n, 5)
    assert capsys.readouterr().out == ""
    tokens.warn(6 * tokens.n, 5)
    assert "the training text will be read 30 times" in capsys.readouterr().out


def test_a_tokenizer_that_adds_bos_begins_every_window_with_it(tmp_path, shards, notes, capsys):
    model = make_tokenizer(tmp_path / "m", shards, eos_token=backbone.EOS, bos=True)
    tokenizer = backbone.load_tokenizer(model)
    bos = tokenizer.bos_token_id
    arguments = ["--data", str(notes), "--model", str(model), "--out"]
    out = tmp_path / "s"
    assert data.main([*arguments, str(out)])["bos"] == read_meta(out)["bos"] == bos == 512
    ids = all_ids(out)
    assert bos not in ids                                       # the files hold the text alone
    assert np.array_equal(ids, all_ids(shards))
    for split in ("train", "val"):
        tokens = data.Tokens(out, split, 32)
        assert tokens.bos == bos
        for windows in (tokens.batch(0, 0, range(4), 4), tokens.windows(3), tokens.windows(3, seed=1)):
            assert windows.shape[1] == 33 and windows.dtype == torch.int64
            assert (windows[:, 0] == bos).all() and not (windows[:, 1:] == bos).any()

    # 1. Without, in other shards only; a stage takes those that are there
    there = fails(capsys, data.main, *arguments, out, "--no-bos")
    assert "holds shards with bos True, but False is asked for" in there
    plain = tmp_path / "plain"
    assert data.main([*arguments, str(plain), "--no-bos"])["bos"] is None
    windows = data.Tokens(plain, "train", 32).windows(3)
    assert torch.equal(windows, data.Tokens(shards, "train", 32).windows(3))
    assert "bos False, but True" in fails(capsys, data.main, *arguments, plain)
    for folder in (out, plain):
        assert data.prepare(str(notes), tokenizer, folder, WORLD)[1] == read_meta(folder)
    # 2. A stage that makes them begins with BOS; our own BPE has none
    assert data.prepare(str(notes), tokenizer, tmp_path / "stage", WORLD)[1]["bos"] == bos
    assert read_meta(shards)["bos"] is None and data.Tokens(shards, "train", 32).bos is None


def test_windows_with_bos_tile_the_text(tmp_path):
    """T tokens of text in each: an epoch still reads each of them once."""
    T = 4
    n = 13
    tokens = data.Tokens(make_shards(tmp_path / "s", range(n * T + T), bos=999), "train", T)
    assert tokens.n == n
    for epoch in range(3):
        windows = [tokens.batch(0, epoch * n + i, [0], 1)[0] for i in range(n)]
        read = sorted(torch.stack(windows)[:, 1:].flatten().tolist())
        assert read == list(range(read[0], read[0] + n * T)) and read[0] < T
    assert tokens.windows(n)[:, 1:].flatten().tolist() == list(range(n * T))


def test_windows_for_evaluation(tmp_path):
    tokens = data.Tokens(make_shards(tmp_path / "s", range(100)), "val", 4)
    assert tokens.windows(5)[:, 0].tolist() == [0, 15, 35, 55, 75]      # 19 tiles of 5, evenly spread
    chosen = tokens.windows(5, seed=1)[:, 0].tolist()
    assert chosen == sorted(set(chosen)) and chosen == tokens.windows(5, seed=1)[:, 0].tolist()
    assert len(tokens.windows(1000)) == tokens.n
    with pytest.raises(UserError, match="has 100 tokens, fewer than two windows of --seq_len 60"):
        data.Tokens(tmp_path / "s", "val", 60)


def test_prefetch_keeps_the_order_and_passes_errors_on():
    assert list(data.prefetch(lambda key: key * key, range(5))) == [0, 1, 4, 9, 16]
    assert list(data.prefetch(lambda key: key, [])) == []
    with pytest.raises(ZeroDivisionError):
        list(data.prefetch(lambda key: 1 / key, [1, 0]))
    before = threading.active_count()
    early = data.prefetch(lambda key: key, range(100))
    assert next(early) == 0 and threading.active_count() == before + 1
    early.close()                                       # a loop that leaves ends the thread
    assert threading.active_count() == before


# -------------------------------------------------------------------------------------------------
# Text sampled from a model

def test_sampled_text_follows_the_model_and_its_entropy_is_exact():
    """All texts of at most 3 tokens of a model of 5, token 0 ends: probabilities by enumeration."""
    model = tiny_model("llama", vocab_size=5, initializer_range=0.3, eos_token_id=0, pad_token_id=0, bos_token_id=0)
    probability = {}
    entropy = 0.0

    @torch.no_grad()
    def walk(text, p):
        nonlocal entropy
        q = model(torch.tensor([[0, *text]])).logits[0, -1].double().softmax(-1)
        entropy += p * torch.special.entr(q).sum().item()
        for token in range(5):
            longer = (*text, token)
            if token == 0 or len(longer) == 3:
                probability[longer] = p * q[token].item()
            else:
                walk(longer, p * q[token].item())
    walk((), 1.0)
    assert sum(probability.values()) == pytest.approx(1)
    counts = dict.fromkeys(probability, 0)
    N = 20_000
    batch = sampled.sample_batch(model, 0, 0, 3, number=0, N=N)
    for ids, length in zip(batch["ids"].tolist(), batch["length"].tolist(), strict=True):
        counts[tuple(ids[:length + 1])] += 1
    for text, p in probability.items():
        assert counts[text] / N == pytest.approx(p, abs=5 * (p * (1 - p) / N) ** 0.5 + 1e-4)
    assert batch["entropy"].mean().item() == pytest.approx(entropy, rel=0.01)
    assert (batch["tokens"] - batch["length"]).sum() == sum(n for text, n in counts.items() if text[-1] == 0)


def test_sampled_shards_resume(tmp_path, shards, monkeypatch, capsys):
    model = make_tokenizer(tmp_path / "m", shards, eos_token=backbone.EOS)
    vocab = len(backbone.load_tokenizer(model))
    tiny_model("llama", vocab_size=vocab, max_position_embeddings=24).save_pretrained(model)
    argv = ["--data", "sampled", "--model", str(model), "--max_tokens", "2000", "--out"]
    meta = data.main([*argv, str(tmp_path / "whole")])
    nats, error = meta["entropy"]
    assert 0.5 * math.log(vocab) < nats < math.log(vocab) and 0 < error < 0.1     # an untrained model
    ids = all_ids(tmp_path / "whole")
    honest = sampled.sample_batch

    def failing(*args):
        if args[-1] == 1:
            raise KeyboardInterrupt
        return honest(*args)
    monkeypatch.setattr(sampled, "sample_batch", failing)
    with pytest.raises(SystemExit):
        data.main([*argv, str(tmp_path / "stopped")])
    assert not (tmp_path / "stopped" / "meta.json").exists()
    monkeypatch.setattr(sampled, "sample_batch", lambda *args: honest(*args) if args[-1] else pytest.fail("again"))
    assert data.main([*argv, str(tmp_path / "stopped")])["entropy"] == meta["entropy"]
    assert np.array_equal(all_ids(tmp_path / "stopped"), ids)
    assert data.main([*argv, str(tmp_path / "whole")]) == meta                    # finished
    other = shutil.copytree(model, tmp_path / "other")
    tiny_model("llama", 1, vocab_size=vocab, max_position_embeddings=24).save_pretrained(other)
    refused = fails(capsys, data.main, *argv[:3], other, *argv[4:], tmp_path / "whole")
    assert "holds shards with source" in refused                                  # another model's samples
    assert "needs the --model" in fails(capsys, data.main, "--data", "sampled", "--out", tmp_path / "x")
