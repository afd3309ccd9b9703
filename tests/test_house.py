"""The house rules: small files, imports that only go down, commands that run, errors in one sentence."""
import ast
import contextlib
import importlib
import inspect
import os
import re
import shlex
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, fails

import evaluate
from core import common, draws, report, run

STAGES = ["data", "toy", "geometry", "bridge", "hybrid", "generate", "repr_align", "circuits", "evaluate"]   # in order
STUDIES = [f"studies.{f.stem}" for f in sorted((ROOT / "studies").glob("[a-z]*.py"))]
COMMANDS = STAGES + STUDIES
FILES = sorted(f for folder in (ROOT, ROOT / "core", ROOT / "studies") for f in folder.glob("[a-z]*.py"))


def imports(file):
    """Modules of this project that a file imports, as core.run, studies.sweep, bridge."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            inside = node.module in ("core", "studies")
            names = [f"{node.module}.{a.name}" for a in node.names] if inside else [node.module]
        else:
            continue
        yield from (n for n in names if n.split(".")[0] in {"core", "studies", *STAGES})


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_files_are_short_and_start_with_a_launch_card(file):
    lines = file.read_text().splitlines()
    assert len(lines) < (300 if file.name == "common.py" else 500)
    assert max(map(len, lines)) <= 120
    assert ast.get_docstring(ast.parse(file.read_text())).startswith(f"{file.name}: ")


def test_the_house():
    """Design, section 1: nine stages at the root in reading order; core below, studies above, no circle."""
    assert {f.stem for f in ROOT.glob("*.py")} == set(STAGES)
    graph = {".".join(f.relative_to(ROOT).with_suffix("").parts): set(imports(f)) for f in FILES}
    for name, used in graph.items():
        if name.startswith("core."):
            assert all(n.startswith("core.") for n in used), f"{name} imports {used}"
        elif name in STAGES:
            assert not [n for n in used if n.startswith("studies")], f"{name} imports a study"
            stages = used & set(STAGES) - {"data"}
            assert len(stages) <= 1 and all(STAGES.index(n) < STAGES.index(name) for n in stages), f"{name}: {stages}"
    seen = {}

    def visit(name, path):
        assert name not in path, f"a circle: {' -> '.join([*path, name])}"
        if not seen.get(name):
            seen[name] = [visit(n, [*path, name]) for n in graph.get(name, ())] or True
    for name in graph:
        visit(name, [])


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_has_a_help_text(name, capsys):
    module = importlib.import_module(name)
    with pytest.raises(SystemExit) as left:
        module.main(["--help"])
    shown = capsys.readouterr().out
    assert left.value.code == 0
    comments = dict(re.findall(r"^    (\w+): .*?#\s*(.+)$", inspect.getsource(module.Config), re.M))
    for flag in module.Config.__dataclass_fields__:
        assert f"--{flag}" in shown and " ".join(comments[flag].split()) in " ".join(shown.split()), flag


def test_help_is_quick():
    start = time.perf_counter()
    subprocess.run([sys.executable, "geometry.py", "--help"], cwd=ROOT, check=True, capture_output=True)
    assert time.perf_counter() - start < 6  # 1.5 s on an idle machine; the bound is for a busy one


def test_an_interrupted_stage_says_so(capsys):
    @common.entry
    def main(argv):
        raise KeyboardInterrupt
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 130 and capsys.readouterr().err == "stopped; start it again\n"


def test_every_launch_line_parses(monkeypatch):
    """The commands in the docstrings and in the README name flags that exist."""
    seen = 0
    for file in [*FILES, ROOT / "README.md"]:
        text = file.read_text() if file.suffix == ".md" else ast.get_docstring(ast.parse(file.read_text()))
        for name, rest in re.findall(r"^\s*(?:python|torchrun --nproc_per_node \d+) (\w+\.py|-m studies\.\w+)([^#\n]*)",
                                     text, re.M):
            module = importlib.import_module(name.removesuffix(".py").removeprefix("-m "))
            argv = re.findall(r"--\w+|\"[^\"]*\"|\S+", rest)
            cfg = common.parse(module.Config, [a.strip('"') for a in argv], "", getattr(module, "PRESETS", None),
                               lambda cfg: "toy")
            assert cfg is not None
            seen += 1
    assert seen >= 20


def pipeline(tmp_path, **how):
    """[title or command] that run_all.sh hands to core/stages.py: a stand-in for python prints them."""
    (tmp_path / "python").write_text("#!/bin/sh\ncat\n")
    (tmp_path / "python").chmod(0o755)
    done = subprocess.run(["bash", str(ROOT / "run_all.sh")], cwd=tmp_path, capture_output=True, text=True, check=True,
                          env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", **how})
    return done.stdout.splitlines()


@pytest.mark.parametrize("how", [{}, {"PRESET": "tiny"}, {"MODEL": "some/model", "DATA": "my notes", "OUT": "out/x"}],
                         ids=["default", "tiny", "another model"])
def test_every_command_of_the_pipeline_parses(how, tmp_path):
    lines, seen = pipeline(tmp_path, **how), []
    for line in lines:
        if line.startswith(" "):
            name, *flags = shlex.split(line.strip().removeprefix("-"))
            module = importlib.import_module(name.removesuffix(".py"))
            cfg = common.parse(module.Config, flags, "", getattr(module, "PRESETS", None), lambda cfg: "toy")
            assert cfg.out.startswith(how.get("OUT", "out"))
            assert getattr(cfg, "data", "") in ("", how.get("DATA", "stdlib"))
            seen.append(name.removesuffix(".py"))
    assert set(seen) == set(STAGES) - ({"toy"} if "MODEL" in how else set())
    assert ("(30 s)" in "".join(lines)) == (not how)                          # times of the toy are shown for it only


def test_stages_run_one_after_another_and_stop_at_a_failure(tmp_path):
    def stages(text):
        done = subprocess.run([sys.executable, str(ROOT / "core" / "stages.py")], input=text, cwd=tmp_path,
                              capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr
    code, said, error = stages("ONE\n    data.py --dry_run\n    -data.py --bogus 1\nTWO\n    toy.py --dry_run\n")
    assert code == 0 and said.index("=== ONE") < said.index("max_tokens = ") < said.index("=== TWO") < said.index("MFU")
    assert error.count("unknown argument --bogus") == 1
    code, said, error = stages("ONE\n    data.py --bogus 1\nTWO\n    toy.py --dry_run\n")
    assert code == 2 and "TWO" not in said and "run_all.sh stopped at data.py --bogus 1" in error


@pytest.mark.parametrize("name", COMMANDS)
def test_dry_run_writes_nothing(name, runs, tmp_path, capsys):
    module = importlib.import_module(name)
    fields = module.Config.__dataclass_fields__
    flags = ["--dry_run"] + [f for key, value in (("model", runs / "toy"), ("out", tmp_path / "a" / "b"),
                                                  ("bridge", runs / "bridge"), ("layer", 2))
                             if key in fields for f in (f"--{key}", str(value))]
    with contextlib.suppress(SystemExit):
        module.main(flags)
    assert capsys.readouterr().out and not (tmp_path / "a").exists()


@pytest.mark.parametrize("name", COMMANDS)
def test_an_unknown_flag_names_the_nearest(name, capsys):
    module = importlib.import_module(name)
    assert "did you mean --seed?" in fails(capsys, module.main, "--sead", "1")
    assert "invalid int value" in fails(capsys, module.main, "--seed", "one")


def test_flags_and_presets(capsys):
    import bridge
    known = "", bridge.PRESETS, lambda cfg: "135m"
    cfg = common.parse(bridge.Config, ["--preset", "tiny", "--batch-size", "2", "--no-compile"], *known)
    assert (cfg.steps, cfg.batch_size, cfg.compile) == (20, 2, False)           # preset, flag over preset, default
    cfg = common.parse(bridge.Config, [], *known)                 # auto: by the size
    assert (cfg.preset, cfg.steps, cfg.head_start) == ("135m", 300, "tokens")
    with pytest.raises(common.UserError, match="at least 1"):
        common.parse(bridge.Config, ["--steps", "0"], *known)
    with pytest.raises(common.UserError, match="finite"):
        common.parse(bridge.Config, ["--lr", "nan"], *known)


def test_draws_depend_on_every_part_of_the_key():
    drawn = {draws.generator(*key).random() for key in
             [(0, "a", 1, 2), (0, "a", 2, 1), (0, "b", 1, 2), (1, "a", 1, 2), (0, "a", 1, 3), (0, "a", 1),
              (0, "a", 1, 0), (0, "a", 1, 0, 0), (0, "a", 0), (0, "a")]}
    assert len(drawn) == 10 and draws.generator(0, "a", 1, 2).random() in drawn


def test_every_purpose_of_a_draw_is_listed():
    """core/draws.py lists all random keys with their owner: none is drawn that is not there, none there is dead."""
    called = set()
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            name = node.func.attr if isinstance(getattr(node, "func", None), ast.Attribute) else getattr(
                getattr(node, "func", None), "id", None)
            at = {"generator": 1, "normal": 3}.get(name) if isinstance(node, ast.Call) else None
            if at is not None and len(node.args) > at:
                part = node.args[at]
                called |= {part.value} if isinstance(part, ast.Constant) else {
                    part.values[0].value + "NAME"} if isinstance(part, ast.JoinedStr) else set()
    called.discard("seed")
    assert called <= set(draws.DRAWS), called - set(draws.DRAWS)
    source = "".join(f.read_text() for f in FILES if f.name != "draws.py")
    assert [p for p in draws.DRAWS if f'"{p.removesuffix("NAME")}' not in source] == []


def test_files_appear_whole_or_not_at_all(tmp_path):
    (tmp_path / "f.json").write_text("old")
    with pytest.raises(RuntimeError), run.atomic(tmp_path / "f.json") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert (tmp_path / "f.json").read_text() == "old" and os.listdir(tmp_path) == ["f.json"]
    with pytest.raises(ValueError):
        run.write_json(tmp_path / "f.json", {"x": float("nan")})
    assert (tmp_path / "f.json").read_text() == "old"


def test_two_runs_on_one_folder_are_refused(tmp_path):
    world, cfg = common.World(0, 1, "cpu"), evaluate.Config(out=str(tmp_path / "r"), dtype="fp32")
    first = run.Run(cfg, world, {})
    with pytest.raises(common.UserError, match="in use"):
        run.Run(cfg, world, {})
    first.unlock()
    run.Run(cfg, world, {}).unlock()


def test_out_that_cannot_be_a_run(runs, tmp_path, capsys, text):
    import geometry
    argv = ["--preset", "tiny", "--data", text, "--model", runs / "toy", "--out"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    assert "is no run" in fails(capsys, geometry.main, *argv, tmp_path / "full")
    assert (tmp_path / "full" / "thesis.tex").read_text() == "precious" and len(os.listdir(tmp_path / "full")) == 1
    message = fails(capsys, geometry.main, *argv, tmp_path / "full" / "thesis.tex" / "sub")     # a file in the way
    assert "choose another path" in message
    assert "choose another path" in fails(capsys, geometry.main, *argv, "/proc/nothing/here")   # no write permission


def test_a_full_disk_is_a_sentence(runs, tmp_path, capsys, text, monkeypatch):
    import bridge
    argv = ["--preset", "tiny", "--data", text, "--model", runs / "toy", "--layer", "1", "--out", tmp_path / "b"]

    def full(*_, **__):
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(run.os, "fsync", full)
        assert "No space left" in fails(capsys, bridge.main, *argv)
    save = torch.save
    with monkeypatch.context() as patch:  # torch's writer meets a full device in its own way
        patch.setattr(run.torch, "save", lambda state, path: save(state, "/dev/full"))
        assert "could not be written" in fails(capsys, bridge.main, *argv)
    assert not (tmp_path / "b" / "result.json").exists() and not list((tmp_path / "b").glob("*.pt"))
    assert not list((tmp_path / "b").glob(".*.tmp"))
    calls = []

    def later(state, path):  # the first checkpoint fits, the second does not: the first survives, and is gone on from
        calls.append(state["step"])
        return save(state, path if len(calls) < 2 else "/dev/full")
    argv = [*argv, "--steps", "6", "--save_every", "2"]
    argv[argv.index("--out") + 1] = tmp_path / "c"
    with monkeypatch.context() as patch:
        patch.setattr(run.torch, "save", later)
        assert "could not be written" in fails(capsys, bridge.main, *argv)
    assert calls == [2, 4] and torch.load(tmp_path / "c" / "state.pt", weights_only=True)["step"] == 2
    bridge.main([str(a) for a in argv])
    assert "resuming at step 2" in capsys.readouterr().out


def test_a_damaged_checkpoint_is_a_sentence(runs, tmp_path, capsys, text, monkeypatch):
    import bridge
    argv = ["--preset", "tiny", "--data", str(text), "--model", f"{runs}/toy", "--layer", "1", "--out", f"{tmp_path}/b"]
    with monkeypatch.context() as patch:
        patch.setattr(common.StopSignal, "poll", lambda self: True)
        with pytest.raises(SystemExit):
            bridge.main(argv)
    whole = (tmp_path / "b" / "state.pt").read_bytes()
    for cut in range(0, len(whole), len(whole) // 8):
        (tmp_path / "b" / "state.pt").write_bytes(whole[:cut])
        assert "is damaged" in fails(capsys, bridge.main, *argv)
    (tmp_path / "b" / "state.pt").write_bytes(whole)
    assert bridge.main(argv)["steps"] == 20


def test_tokenizer_of_other_shards(runs, tmp_path, capsys, text):
    import shutil

    import bridge
    import data
    small = tmp_path / "data"
    data.main(["--data", str(text), "--vocab", "300", "--out", str(small)])
    shutil.copytree(runs / "geometry", tmp_path / "geometry")
    assert "tokenizer" in fails(capsys, bridge.main, "--preset", "tiny", "--data", text, "--model", runs / "toy",
                                "--out", tmp_path / "bridge")
    assert not (tmp_path / "bridge").exists()


def test_report(runs, tmp_path, capsys):
    """Sections are joined with their figures, what is not there names its command, unknown runs are joined too."""
    import shutil
    shutil.copytree(runs, tmp_path / "r")
    own = tmp_path / "r" / "mine"                                # a run of a fork, which evaluate.py never heard of
    fork = run.Run(evaluate.Config(out=str(own), dtype="fp32"), common.World(0, 1, torch.device("cpu")), {})
    (own / "mine.png").write_bytes((runs / "geometry" / "geometry.png").read_bytes())
    fork.finish({"headline": [["my own", "42"]], "findings": ["Mine is ahead."]}, "## Mine\n\n![it](mine.png)\n")
    shutil.copytree(own, tmp_path / "r" / "tiny" / "theirs")     # beside a report of its own: another pipeline's
    (tmp_path / "r" / "tiny" / "evaluate").mkdir()
    argv = ["--preset", "tiny", "--runs", str(tmp_path / "r"), "--out", str(tmp_path / "e")]
    result = evaluate.main(argv)
    text = (tmp_path / "e" / "report.md").read_text()
    places = [text.index(t) for t in ("## LOCATE", "## REPLACE: diffusion", "## REPLACE: regression", "## CONVERT",
                                      "## Mine", "## Cost", "## Zero-shot")]
    assert places == sorted(places) and "python circuits.py" in text and "| mine | my own | 42 |" in text
    assert "theirs" not in text
    for figure in re.findall(r"\]\(([^)]+\.png)\)", text):
        assert (tmp_path / "e" / figure).stat().st_size > 5_000
    bridge = run.read_json(runs / "bridge" / "result.json")["nfe"]["4"]
    assert f"{bridge['ce_gap']:+.4f}" in text and f"{bridge['fvu']:.4f}" in text
    assert result["zero_shot"]["windows"]["held-out"] > 1 and "**mine**: Mine is ahead." in result["findings"]
    assert all(row["peak_mb"] > row["weights_mb"] for row in result["cost"])
    assert set(result) >= {"sweep", "interfaces", "generation", "cost", "conversion", "circuits", "zero_shot"}
    assert "_rows" not in (tmp_path / "e" / "result.json").read_text()
    start = time.perf_counter()
    assert evaluate.main(argv)["cost"] == result["cost"]                      # of the same weights: not measured again
    assert time.perf_counter() - start < 5
    (own / "section.md").write_text("## Somebody else's\n")
    assert "was not written by the run beside it" in fails(capsys, evaluate.main, *argv)


def test_the_readme_states_the_published_numbers():
    """Everything between markers is what `evaluate.py --publish` writes: tables and findings."""
    published = run.read_json(ROOT / "results" / "toy" / "result.json")
    readme = (ROOT / "README.md").read_text()
    assert report.fill_markers(readme, evaluate.readme_blocks(ROOT)) == readme
    assert set(published["table"]) == set(evaluate.FIRST)
    assert all(len(value) <= 60 for _, _, value in published["headlines"])
    assert (ROOT / "results" / "toy" / "figure.png").stat().st_size > 20_000


def test_a_reader_who_has_read_enough_is_no_full_disk(capsys):
    @common.entry
    def main(argv):
        raise BrokenPipeError(32, "Broken pipe")
    with pytest.raises(SystemExit) as left:
        main([])
    assert left.value.code == 130 and "space" not in capsys.readouterr().err


def test_lines_of_code():
    """The house is small: a stage has fewer than 400 lines; everything outside tests may shrink, not grow."""
    lines = {f: len(f.read_text().splitlines()) for f in FILES}
    assert all(n < 400 for f, n in lines.items() if f.parent == ROOT)
    assert sum(lines.values()) <= 8994


def test_a_study_started_as_a_file_says_how(tmp_path):
    for file in (ROOT / "studies").glob("[a-z]*.py"):
        done = subprocess.run([sys.executable, str(file)], cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (2, f"error: start it as: python -m studies.{file.stem}\n")


def test_report_refusals(runs, tmp_path, capsys):
    import shutil
    argv = ["--runs", tmp_path / "r", "--out", tmp_path / "e"]
    (tmp_path / "r").mkdir()
    assert "bash run_all.sh" in fails(capsys, evaluate.main, *argv)
    shutil.rmtree(tmp_path / "r")
    shutil.copytree(runs, tmp_path / "r")
    fresh = run.read_json(tmp_path / "r" / "bridge" / "result.json")
    for change, word in (({"base": "0" * 16}, "another backbone"), ({"steps": 21}, "differ in steps")):
        run.write_json(tmp_path / "r" / "bridge" / "result.json", {**fresh, **change})
        assert word in fails(capsys, evaluate.main, *argv)
    run.write_json(tmp_path / "r" / "bridge" / "result.json", fresh)
    config = run.read_json(tmp_path / "r" / "regression" / "config.json")
    changed = {**config["dihal"]["config"], "skip": 9}
    run.write_json(tmp_path / "r" / "regression" / "config.json", {"dihal": {**config["dihal"], "config": changed}})
    assert "differ in skip" in fails(capsys, evaluate.main, *argv)
    run.write_json(tmp_path / "r" / "regression" / "config.json", config)
    for stage in ("bridge", "blocks"):                                        # what hybrid and generate were made of
        weights = (tmp_path / "r" / stage / "bridge.safetensors").read_bytes()
        shutil.copy(runs / "regression" / "bridge.safetensors", tmp_path / "r" / stage / "bridge.safetensors")
        assert "made of other weights" in fails(capsys, evaluate.main, *argv)
        (tmp_path / "r" / stage / "bridge.safetensors").write_bytes(weights)
    assert not (tmp_path / "e").exists()
