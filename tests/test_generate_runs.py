"""GENERATE: metrics with known answers, and runs of generate.py."""
import json
import shutil

import pytest
import torch
from PIL import Image
from conftest import fails, tiny_model
from test_generate import IDS, PRIOR, random_hybrid

import bridge
import generate
import hybrid
import repr_align
from core import backbone, frontier, masked, metrics
from core.common import UserError


# ------------------------------------------------------------------------------------------------------ metrics
def test_metrics_have_known_answers():
    ids = torch.tensor([[1, 2, 3, 4], [1, 1, 1, 1]])
    assert metrics.entropy(ids) == pytest.approx(torch.tensor(4.0).log().item() / 2)
    assert metrics.repetition(ids, 2) == pytest.approx(1 - 4 / 6)              # 12 23 34 11, twice again 11
    assert metrics.repetition(ids[:1], 4) == 0
    lm = backbone.Backbone(tiny_model("llama"))
    own = metrics.measure(lm, IDS, 6)
    assert own["gen_ppl"] == pytest.approx(metrics.judge(lm, IDS, 6).mean().exp().item())

    class Letters:                                                              # one character a token, both ways
        eos_token_id = 0

        def decode(self, ids):
            return "".join(chr(97 + i) for i in ids)

        def __call__(self, text, add_special_tokens=False):
            return {"input_ids": [ord(c) - 97 for c in text]}
    nll = metrics.judge(lm, IDS, 6)
    theirs = metrics.judge_text(lm, Letters(), Letters(), IDS, 6)
    assert torch.allclose(torch.stack(theirs), nll, atol=1e-5)
    assert metrics.gen_ppl(theirs) == pytest.approx(own["gen_ppl"])
    want = torch.nn.functional.cross_entropy(lm.model(IDS).logits[:, 5:-1].flatten(0, 1), IDS[:, 6:].flatten())
    assert nll.shape == (2, 8) and nll.mean().item() == pytest.approx(want.item(), rel=1e-5)
    points = [{"temperature": t, "entropy": h, "gen_ppl": y} for t, h, y in ((0.5, 3.0, 10.0), (1.0, 4.0, 1000.0))]
    assert metrics.at_entropy(points, 3.5) == pytest.approx(100)
    assert metrics.at_entropy(points, 4.0) == pytest.approx(1000) and metrics.at_entropy(points, 4.05) is None
    assert metrics.at_entropy(points, 2.9) == pytest.approx(10)                  # above it even when cold: a bound
    dip = [*points, {"temperature": 0.7, "entropy": 2.8, "gen_ppl": 20.0}]       # crossed twice: the dearest counts
    assert metrics.at_entropy(dip, 2.9) == pytest.approx(20 * 50 ** (0.1 / 1.2))


# ------------------------------------------------------------------------------------------------------ the runs
@pytest.fixture(scope="module")
def causal(runs, text):
    """A bridge of mixed training at layer 0, causal among unknown tokens, beside the pipeline's bidirectional one."""
    bridge.main(["--preset", "tiny", "--model", f"{runs}/toy", "--data", str(text), "--visible", "mix", "--blocks", "2",
                 "--layer", "0", "--out", f"{runs}/blocks0"])
    return runs / "blocks0"


def test_the_stage_runs(runs, causal, text, tmp_path, capsys, monkeypatch):
    result = json.loads((runs / "blocks" / "result.json").read_text())
    assert 0 < result["readout_accuracy"] < 1 and set(result["nfe"]) == {"1", "2", "4", "8"}
    argv = ["--preset", "tiny", "--bridges", f"{runs}/blocks,{causal}", "--data", str(text), "--texts", "3",
            "--twin", f"{runs}/repr_align/w10,{runs}/repr_align/w0", "--alphas", "1", "--betas", "1,0",
            "--out", str(tmp_path / "g")]
    found = generate.main(argv)
    twins = {f"masked twin, {order} order" for order in masked.ORDERS}
    names = [r["name"] for r in found["rows"]]
    assert names[:3] == ["unigrams", "AR, intact model", "Jacobi, intact model, equal calls and block passes"]
    assert names[3].startswith("lazy Jacobi, intact model, stay 0.") and names[4] == names[5] in twins
    assert [n.split(", ")[0] for n in names[6:]] == ["blocks at layer 2", "blocks at layer 0"]
    assert all(p["gen_ppl"] > 1 and 0 < p["entropy"] < 2.5 for r in found["rows"] for p in r["frontier"])
    assert {r["calls"] for r in found["rows"] if "layer" in r} == {4}              # 2, and 1 + 1 to refine
    # 3 calls of the bridge's 2 blocks, the retained ones, and all 4 blocks for the refinement; a Jacobi call
    # takes 4 blocks of the tokens that are not final: 4 x (1 + 11/12 + 10/12) is still less
    passes = {r["layer"]: r["passes"] for r in found["rows"] if "layer" in r}
    assert passes[2] == 3 * 2 + 2 + 4 and passes[0] == 3 * 2 + 4 + 4 and found["rows"][2]["calls"] == 4
    settings = found["tuned"]["masked twin"]["settings"]
    assert set(settings) == twins and all(len(s["matched"]) == 2 for s in settings.values())
    assert set(found["tuned"]["blocks at layer 2"]["settings"]) == {
        f"blocks at layer 2, {s}" for s in ("alpha 1, beta 1", "alpha 1, beta 0")}
    for group in found["tuned"].values():
        assert group["chosen"] in group["settings"] and group["chosen"] in names
    assert (tmp_path / "g" / "generation.png").stat().st_size > 5000
    assert len((tmp_path / "g" / "samples.jsonl").read_text().splitlines()) == 8 * 3
    section = (tmp_path / "g" / "section.md").read_text()
    assert section.startswith("## GENERATE\n") and section == generate.section(found) and "chosen" in section
    capsys.readouterr()
    monkeypatch.setitem(generate.METHODS, "nothing", None)                     # a new method leaves finished runs valid
    assert generate.main(argv) == found and "real text" in capsys.readouterr().out


def test_a_second_judge_and_a_new_method(runs, text, tmp_path, capsys, monkeypatch):
    """It stands beside the first one, in rows of a method added by one entry; nothing is chosen without other texts."""
    def copy(cx):
        yield "prompt again", {"calls": 0}, lambda prompts, _, t: torch.cat([prompts, prompts[:, :cx.cfg.new]], 1)
    monkeypatch.setitem(generate.METHODS, "copy", copy)
    found = generate.main(["--preset", "tiny", "--bridges", f"{runs}/blocks", "--data", str(text), "--twin", "",
                           "--methods", "copy,blocks", "--tune_texts", "0", "--alphas", "1", "--betas", "1",
                           "--second_judge", f"{runs}/repr_align/w0", "--out", str(tmp_path / "j")])
    assert [r["name"] for r in found["rows"]] == ["prompt again", "blocks at layer 2, alpha 1, beta 1"]
    assert found["tuned"] == {}
    assert found["real"]["second_ppl"] != found["real"]["gen_ppl"] and "second judge" in generate.section(found)
    assert all({"second_ppl", "gen_ppl"} <= set(p) for r in found["rows"] for p in r["frontier"])
    message = fails(capsys, generate.main, "--methods", "copy,magic")
    assert "magic" in message and "there are unigram, ar, jacobi, twin, blocks, copy" in message
    shutil.copytree(runs / "toy", tmp_path / "mute", ignore=shutil.ignore_patterns("tokenizer*"))
    argv = ["--preset", "tiny", "--bridges", runs / "blocks", "--twin", "", "--data", text, "--out", tmp_path / "k"]
    assert "tokenizer" in fails(capsys, generate.main, *argv, "--second_judge", tmp_path / "mute")
    assert not (tmp_path / "k").exists()


def test_what_is_tuned_on_is_not_reported(runs, text, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(generate, "METHODS", {"spy": lambda cx: iter([
        (f"spy {i}", {"group": "spy"}, lambda prompts, _, t, i=i: seen.append((i, prompts)) or torch.cat(
            [prompts, prompts[:, :12].flip(1)], 1)) for i in range(2)])})
    found = generate.main(["--preset", "tiny", "--bridges", f"{runs}/blocks", "--data", str(text), "--twin", "",
                           "--out", str(tmp_path / "s")])
    tuning, reported = ({tuple(row) for _, p in seen if len(p) == n for row in p.tolist()} for n in (2, 4))
    assert len(tuning) == 2 and len(reported) == 4 and not tuning & reported
    assert [r["name"] for r in found["rows"]] == ["spy 0"]                     # no setting ever there: the first


def test_a_gap_is_filled_by_both_sides(runs, causal, text, tmp_path, capsys, monkeypatch):
    """Nobody is shown the gap; blocks and the bidirectional twin see what follows it, a block twin cannot; the AR
    model's best guess is the one that makes what follows likeliest. All is judged with what follows."""
    shown, made, fill, methods = [], {}, masked.fill, dict(generate.METHODS)
    draw = hybrid.HybridForCausalLM.generate_blocks

    def spy(cx):
        def copy(prompts, after, t):
            made.update({"lm": cx.lm, "prompts": prompts, "after": after} if len(prompts) > 1 else {})
            return torch.cat([prompts, after[:, :cx.cfg.new]], 1)
        yield "spy", {"calls": 0}, copy

    def ar(cx):
        for name, about, write in methods["ar"](cx):
            yield name, about, lambda *a, name=name, write=write: made.setdefault(name, write(*a))
    monkeypatch.setattr(generate, "METHODS", {**methods, "ar": ar, "spy": spy})
    monkeypatch.setattr(masked, "fill", lambda model, ids, *a: shown.append((
        model.arm.attention, ids[:, 16:].tolist())) or fill(model, ids, *a))
    monkeypatch.setattr(hybrid.HybridForCausalLM, "generate_blocks", lambda model, ids, *a, suffix_ids, **how: (
        shown.append(("ours", suffix_ids.tolist())) or draw(model, ids, *a, suffix_ids=suffix_ids, **how)))
    repr_align.main(["--preset", "tiny", "--model", f"{runs}/toy", "--data", str(text), "--attention", "block",
                     "--block_size", "8", "--align_weight", "0", "--steps", "3", "--out", str(tmp_path / "block")])
    argv = ["--preset", "tiny", "--bridges", str(runs / "blocks"), "--data", str(text), "--suffix", "12", "--new", "4",
            "--tune_texts", "0", "--twin", f"{runs}/repr_align/w0,{tmp_path}/block", "--methods", "spy,ar,twin,blocks"]
    found = generate.main([*argv, "--out", str(tmp_path / "gap")])
    before, after = made["prompts"], made["after"]
    assert before.shape == (4, 16) and after.shape == (4, 12)
    for kind, ids in (some for some in shown if len(some[1]) > 1):             # one alone is timed
        masks, end = [ids[0][0]] * 4 * (kind != "ours"), [[]] * 4 if kind == "block" else after.tolist()
        assert ids == [[*masks, *row] for row in end]
    assert {kind for kind, _ in shown} == {"ours", "block", "bidirectional"}
    one, best = "AR, intact model", f"AR, best of {generate.CHOICE} by what comes after"
    nats = {row: metrics.judge(made["lm"], torch.cat([made[row], after], 1), 20).sum() for row in (one, best)}
    assert nats[best] < nats[one]
    rows = {r["name"]: r for r in found["rows"]}
    ours = rows["blocks at layer 2, alpha 0.8, beta 0.8"]
    assert rows[best]["calls"] == 5 and ours["passes"] == (3 * 2 + 2 + 4 + 4) * 8        # 4 of 32 tokens are new
    assert "| gaps right |" in generate.section(found) and "before 12 that are known" in generate.section(found)
    assert all(r["tokens_per_s"] > 0 and p["exact"] <= p["right"] for r in found["rows"] for p in r["frontier"])
    argv[3] = str(causal)
    assert "without --bidirectional" in fails(capsys, generate.main, *argv, "--out", str(tmp_path / "c"))
    assert "must be at least --new" in fails(capsys, generate.main, "--suffix", "4", "--block_size", "8")


def test_gaps_of_whole_lines(runs, text, tmp_path, capsys, monkeypatch):
    """Every gap is one line; a copy of the truth has all of them right, and one whose first token is wrong none."""
    real = []

    def honest(write, judged, text, gap, *more):
        real.append((text, gap))
        return frontier.frontier(write, judged, text, gap, *more)

    def know(cx):
        for name, shift in (("all but one", 1), ("all", 0)):
            def write(before, after, t, shift=shift):
                text, gap = real[-1]
                new = text[:, gap].clone()
                new[:, 0] += shift
                return torch.cat([before, new], 1) if len(before) == len(text) else text[:1, :gap.stop]
            yield name, {}, write
    monkeypatch.setattr(generate, "frontier", honest)
    monkeypatch.setattr(generate, "METHODS", {"know": know})
    argv = ["--preset", "tiny", "--bridges", runs / "blocks", "--data", text, "--twin", "", "--tune_texts", "0",
            "--suffix", "8", "--lines", "--texts", "3", "--out", tmp_path / "lines"]
    found = generate.main(list(map(str, [*argv, "--new", "5"])))
    tokenizer, (rows, gap) = backbone.load_tokenizer(str(runs / "toy")), real[0]
    for row in rows:
        breaks = ["\n" in tokenizer.decode(i) for i in row]
        assert breaks[gap.start - 1] and breaks[gap.stop] and not any(breaks[gap]) and gap.stop - gap.start == 5
    shares = {r["name"]: [(p["right"], p["exact"]) for p in r["frontier"]] for r in found["rows"]}
    assert set(shares["all"]) == {(1.0, 1.0)} and set(shares["all but one"]) == {(0.8, 0.0)}
    assert "one whole line" in generate.section(found)
    argv[-1] = tmp_path / "none"
    long = ["--new", "80", "--block_size", "80"]
    assert "has 0 lines of --new tokens" in fails(capsys, generate.main, *argv, *long)
    assert "go with --suffix" in fails(capsys, generate.main, "--lines")


def test_the_command_line_writes_blocks(runs, capsys, tmp_path, monkeypatch):
    argv = ["--bridge", f"{runs}/blocks", "--prompt", "import os", "--block_size", "8", "--max_new_tokens", "12",
            "--nfe", "3"]
    hybrid.main(argv)
    plain = capsys.readouterr().out
    assert plain.startswith("import os") and len(plain) > 12
    hybrid.main([*argv, "--show"])
    assert len(capsys.readouterr().out.splitlines()) >= 7                       # a line a call, and the text
    hybrid.main([*argv, "--suffix", "return x"])
    assert capsys.readouterr().out.rstrip().endswith("return x")
    made, film, draw = [], hybrid.film, hybrid.HybridForCausalLM.generate_blocks
    monkeypatch.setattr(hybrid, "film", lambda path, frames: made.append(frames) or film(path, frames))
    monkeypatch.setattr(hybrid.HybridForCausalLM, "generate_blocks", lambda model, ids, *a, watch, **how: draw(
        model, ids, *a, watch=lambda z: made.append((ids, model.net.readout(z[0]).argmax(-1))) or watch(z), **how))
    for more in ([], ["--suffix", "return x"]):
        made.clear()
        text = hybrid.main([*argv, *more, "--max_new_tokens", "8", "--refinements", "0", "--gif", f"{tmp_path}/f.gif"])
        *seen, frames = made
        decode = backbone.load_tokenizer(str(runs / "toy")).decode
        assert len(frames) == len(seen) + 1 == 4                                # an estimate a call, and the text
        for (ids, read), frame in zip(seen, frames):
            gap = read[ids.shape[1]:ids.shape[1] + 8] if more else read         # with a suffix z is of the whole text
            assert frame == [(decode(i), False) for i in [*ids[0], *gap]]
        assert text.startswith("".join(word for word, _ in frames[-1]).rstrip("\ufffd"))
        with Image.open(tmp_path / "f.gif") as gif:
            assert len({gif.seek(n) or gif.convert("L").tobytes() for n in range(gif.n_frames)}) >= 3
    assert "shows one block" in fails(capsys, hybrid.main, *argv, "--gif", "film.gif")


def test_bad_input(runs, causal, text, tmp_path, capsys):
    ask = ["--bridge", f"{runs}/blocks", "--prompt", "import os"]
    assert "must fit" in fails(capsys, hybrid.main, *ask, "--block_size", "8", "--max_new_tokens", "99999")
    assert "alpha" in fails(capsys, hybrid.main, *ask, "--block_size", "8", "--alpha", "-1")
    assert "--nfe" in fails(capsys, hybrid.main, *ask, "--block_size", "8", "--nfe", "-1")
    full = ["--bridge", f"{runs}/bridge", "--prompt", "import os"]
    assert "never met an unknown token" in fails(capsys, hybrid.main, *full, "--block_size", "8")
    forward = ["--bridge", str(causal), "--prompt", "import os", "--block_size", "8", "--suffix", "x"]
    assert "--bidirectional" in fails(capsys, hybrid.main, *forward)
    train = ["--preset", "tiny", "--model", f"{runs}/toy", "--data", str(text), "--out", str(tmp_path / "x")]
    assert "would let the replaced layer see" in fails(capsys, bridge.main, *train, "--layer", "2", "--bidirectional")
    assert "must lie in 0..4" in fails(capsys, bridge.main, *train, "--layer", "5", "--visible", "mix")
    sample = ["--bridges", f"{runs}/bridge", "--data", str(text), "--out", str(tmp_path / "y"), "--twin", ""]
    assert "never met an unknown token" in fails(capsys, generate.main, *sample)
    assert not (tmp_path / "y").exists()                                          # refused before anything is written
    assert "--texts" in fails(capsys, generate.main, "--texts", "1")
    for flag, value in (("--temperatures", "warm"), ("--temperatures", "0"), ("--betas", "-1"), ("--tune_texts", "1"),
                        ("--tune_texts", "99"), ("--prefix", "1")):
        assert flag in fails(capsys, generate.main, flag, value)
    many = ["--bridges", runs / "blocks", "--data", text, "--out", tmp_path / "y", "--twin", "", "--texts", "99999"]
    assert "fewer than twice --texts" in fails(capsys, generate.main, *many) and not (tmp_path / "y").exists()
    alone = shutil.copytree(runs / "blocks", tmp_path / "alone" / "in" / "blocks")   # no shards beside this bridge
    ask[1], block = str(alone), ["--block_size", "8", "--max_new_tokens", "8", "--nfe", "2"]
    assert "--beta 0" in fails(capsys, hybrid.main, *ask, *block)
    assert hybrid.main([*ask, *block, "--beta", "0"]).startswith("import os")
    assert "--block_size" in fails(capsys, hybrid.main, "--bridge", runs / "blocks", "--show", "--prompt", "x")
    model = random_hybrid()
    for name, value in (("block_size", 0), ("max_new_tokens", 0), ("refinements", -1), ("beta", -0.5), ("back", 1.0),
                        ("temperature", -1), ("top_p", 0.0)):
        with pytest.raises(UserError, match=name):
            model.generate_blocks(IDS, **{"prior": PRIOR, name: value})
