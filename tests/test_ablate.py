"""The studies' tables, from results whose answer is known."""
import json

import pytest
import torch
from conftest import ROOT, fails

from core import backbone
from core.tasks import Pieces, examples
from studies import ablate


def write(folder, **result):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps({"eval_sequences": 512, **result}))


def shown(cfg):
    """The study's section, and its verdicts as {(layer, variant, column): words}."""
    rows, verdicts = ablate.collect(cfg, list(ablate.cells(cfg)))
    text = ablate.section({"study": cfg.study, "seeds": cfg.seeds, "seed": 0, "steps": cfg.steps, "batch_size": 8,
                           "margin": cfg.margin, "rows": rows, "verdicts": verdicts,
                           **({"flags": cfg.flags} if cfg.flags else {})})             # an older study has none
    return text, {(layer, name, by): words for layer, name, _, by, words in verdicts}, verdicts


def bridge(kl, calls=("1",)):
    return {"nfe": {n: {"fvu": 0.1, "kl": kl, "ce_gap": kl - 0.01} for n in calls}, "size_ratio": 1.0}


def test_the_verdict_follows_the_numbers(tmp_path):
    """Layer 1: diffusion better by 0.010 +- 0.001 on every seed; layer 4: equal up to noise; layer 7: worse."""
    cfg = ablate.Config(study="objective", out=str(tmp_path / "objective"))
    gaps = {1: (0.010, 0.011, 0.009), 4: (0.010, -0.012, 0.001), 7: (-0.02, -0.021, -0.019)}
    for name, layer, seed, folder, _ in ablate.cells(cfg):
        mine = name == "diffusion"
        write(folder, **bridge(0.05 - (gaps[layer][seed] if mine else 0), ("1", "2", "4", "8") if mine else ("1",)))
    text, said, verdicts = shown(cfg)
    assert said[1, "diffusion", "KL"].startswith("ahead by 0.01 nats (95%")
    assert said[4, "diffusion", "CE gap"].startswith("not known (95%")
    assert said[7, "diffusion", "KL"].startswith("behind by 0.02 nats") and "| 7 | regression | 1.00 | 1 |" in text
    assert "| 1 | diffusion | 1.00 | 4 | 0.1000 | 0.0400 +- 0.0010 |" in text
    loose = {(layer, by): words for layer, name, _, by, words in ablate.collect(
        ablate.Config(study="objective", out=cfg.out, margin=0.05), list(ablate.cells(cfg)))[1]}
    assert loose[4, "KL"].startswith("ties within 0.05")


def test_each_objective_has_its_own_learning_rate(tmp_path):
    """The rival is the regression of lowest KL over rates; one seed is never enough."""
    cfg = ablate.Config(out=str(tmp_path / "r"), seeds=1, layers="4", flags="--seq_len 64")
    kl = {"regression": 0.05, "regression, lr x 2": 0.04, "diffusion, lr x 2": 0.01}
    commands = {}
    for name, _, _, folder, command in ablate.cells(cfg):
        write(folder, **bridge(kl.get(name, 0.045)))
        commands[name] = " ".join(command)
    assert "--t_mean 0" in commands["diffusion, t_mean 0"]
    assert "--lr 0.04 --lr_adam 4e-3 --seq_len 64" in commands["regression, lr x 2"]       # these flags are the last
    text, said, verdicts = shown(cfg)
    assert {rival for _, _, rival, _, _ in verdicts} == {"regression, lr x 2"} and len(verdicts) == 2 * 4
    assert "sequences, `--seq_len 64`,\n" in text
    assert said[4, "diffusion, lr x 2", "KL"] == "not known (n = 1, lower by 0.03 nats)"


def test_acceleration_is_read_off_the_curves(tmp_path):
    assert ablate.steps_to([[0, 6.0, None], [10, 5.0, None]], 5.5) == pytest.approx(5)
    assert ablate.steps_to([[0, 6.0, None], [10, 5.0, None]], 4.0) is None
    cfg = ablate.Config(study="align", out=str(tmp_path / "align"), seeds=2, steps=100)
    for name, _, _, folder, command in ablate.cells(cfg):
        assert command[1] == str(ROOT / "repr_align.py") and "--layer" not in command
        end = 4.0 if name.startswith("w = 10") else 5.5 if name.startswith("w = 3") else 5.0
        write(folder, curve=[[0, 6.0, None], [100, end, None]], val_loss=end, cosine=None if "w = 0" in name else 0.9,
              seconds=20.0 if "w = 10" in name else 10.0)
    text, said, _ = shown(cfg)
    rows = {line.split(" | ")[1]: line for line in text.split("Paired")[0].splitlines() if line.startswith("| - | w")}
    assert "| 2.00 | 1.00 | 0.900 |" in rows["w = 10"]                          # half the steps, twice the price of one
    assert "| never in 2 of 2 | never in 2 of 2 | 0.900 |" in rows["w = 3"]
    assert rows["w = 0"].endswith("| 1.00 | 1.00 | - |")
    commands = {cell.variant: " ".join(cell.command) for cell in ablate.cells(cfg)}
    assert "--align_until 25" in commands["w = 10, off after a quarter"] and "--align_until" not in commands["w = 10"]
    assert said[None, "w = 10", "best on the way"].startswith("ahead by 1 nats")


def test_refusals(capsys):
    assert "none of the layers 3" in fails(capsys, ablate.main, "--study", "objective", "--layers", "3")
    assert "variants w = 7" in fails(capsys, ablate.main, "--study", "align", "--variants", "w = 7")
    assert "needs 'w = 0' too" in fails(capsys, ablate.main, "--study", "align", "--variants", "w = 3")
    some = list(ablate.cells(ablate.Config(study="align", variants="w = 0; w = 3")))
    assert [cell.variant for cell in some] == ["w = 0", "w = 3"] * 3


def test_a_study_grows(tmp_path, monkeypatch, capsys):
    """A finished study asked for another seed or variant goes on; asked the same again, it prints what it has."""
    work = []
    monkeypatch.setattr(ablate, "execute", lambda some, *_: work.append([command for _, command in some]) or [
        write(cell.folder, **bridge(0.1)) for cell in ablate.cells(cfg)])
    monkeypatch.setattr(ablate.data, "shards_beside", lambda *_: None)
    monkeypatch.setattr(ablate.backbone, "load_tokenizer", lambda *_: None)
    monkeypatch.setattr(ablate.backbone, "identity", lambda *_: "base")
    argv = ["--model", str(tmp_path), "--out", str(tmp_path / "out" / "objective"), "--layers", "1",
            "--variants", "diffusion; regression"]
    for seeds, ran in ((1, 2), (1, None), (2, 4)):
        cfg = ablate.Config(seeds=seeds, layers="1", variants="diffusion; regression", out=argv[3])
        result = ablate.main([*argv, "--seeds", str(seeds)])
        assert ran is None or len(work.pop()) == ran
        assert not work and len(result["rows"][0]["values"]["KL"]) == seeds
    assert (tmp_path / "out" / "objective" / "section.md").read_text().startswith("## Study: objective")
    assert "steps = 200 there" in fails(capsys, ablate.main, *argv, "--steps", "7")


def test_arms_are_compared_by_their_bounds(tmp_path):
    """A masked CE is of an arm's own task; the bound on -log p is of the same text for all."""
    cfg = ablate.Config(study="arms", out=str(tmp_path / "arms"), seeds=2)
    for name, _, seed, folder, command in ablate.cells(cfg):
        assert ("--context causal" in " ".join(command)) == ("causal" in name)
        write(folder, bound=[4.0 - (name == "blocks, causal context") + 0.01 * seed, 0.1], val_loss=9.0, infilled=0.25,
              tokens_a_call=1.5, seconds=7.0)
    text, said, verdicts = shown(cfg)
    rivals = {name: rival for _, name, rival, *_ in verdicts}                    # what an arm adds something to
    assert rivals["blocks, causal context, w = 10"] == "blocks, causal context" and rivals["blocks"] == "bidirectional"
    assert rivals["blocks, causal context"] == "blocks" and rivals["blocks, clean context"] == "blocks"
    assert said[None, "blocks, causal context", "bound, nats a token"].startswith("ahead by 1 nats (95%")
    assert "tasks solved" not in text and "| 0.250 | 1.500 | 7.000 |" in text
    assert "tasks solved" not in {column for *_, column in said}
    assert "bidirectional" not in {name for _, name, _ in said} and "| - | bidirectional | 4.005 +- 0.007 |" in text


def test_more_tasks_are_better(tmp_path, monkeypatch):
    cfg = ablate.Config(study="arms", out=str(tmp_path / "arms"), seeds=2, variants="blocks; blocks, causal context")
    for *_, folder, _ in ablate.cells(cfg):
        write(folder, bound=[4.0, 0.1], val_loss=9.0, infilled=0.25, tokens_a_call=1.5, seconds=7.0, tasks=0.8)
    monkeypatch.setattr(ablate, "tasks_solved", lambda folder: 0.5 + 0.25 * ("causal" in str(folder)))
    _, said, _ = shown(cfg)
    assert said[None, "blocks, causal context", "tasks solved"].startswith("ahead by 0.25 of the prompts")
    for name, *_, folder, _ in ablate.cells(cfg):                              # beside cells that say nothing of tasks
        if name == "blocks":
            write(folder, bound=[4.0, 0.1], val_loss=9.0, infilled=0.25, seconds=7.0)
    assert {column for *_, column in shown(cfg)[1]} == {"bound, nats a token"}


def test_tasks_solved_by_a_twin(runs, monkeypatch):
    """The token after all that is visible, by one call; one that knows the answers solves all, this twin hardly any."""
    asked = []

    def oracle(model, ids, is_mask, steps, **how):
        assert steps == 1 and is_mask[:, -1].all() and is_mask.sum() == len(ids) and how == {"temperature": 0}
        asked.append(len(ids))
        answers = [p.answer for p in examples(ablate.AT_END[len(asked) - 1], pieces, len(ids), seed=0)]
        return torch.cat([ids[:, :-1], torch.tensor(answers)[:, None]], 1)
    pieces = Pieces(backbone.load_tokenizer(runs / "toy"))
    assert 0 <= ablate.tasks_solved(runs / "repr_align" / "w0") < 0.5
    monkeypatch.setattr(ablate.masked, "fill", oracle)
    assert ablate.tasks_solved(runs / "repr_align" / "w0") == 1 and asked == [128] * 4
