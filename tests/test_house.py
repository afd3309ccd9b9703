"""The house rules: plain code, imports that only go down, commands that run, errors in one sentence."""
import ast
import contextlib
import importlib
import inspect
import os
import re
import resource
import shlex
import subprocess
import sys

import plainness
import pytest
from conftest import ROOT, fails, slow

from core import common, run

STAGES = ["data", "toy", "geometry", "bridge", "hybrid", "generate", "repr_align", "circuits",
          "evaluate", "sample"]
CORE = {"common", "run", "optim", "report", "backbone", "diffusion", "masked", "attribution",
        "tasks", "sampled"}
STUDIES = ["studies.compare", "studies.induction", "studies.interfaces", "studies.shift",
           "studies.sweep"]
COMMANDS = STAGES + STUDIES
FILES = plainness.files()

# What a stage is understood by: itself and at most two more files (design, section 1).
BEHIND = {
    "geometry": {"core.backbone"},
    "bridge": {"core.diffusion", "core.backbone"},
    "hybrid": {"core.diffusion", "core.backbone"},
    "generate": {"hybrid", "core.diffusion"},
    "repr_align": {"core.masked", "core.backbone"},
    "circuits": {"core.attribution", "core.tasks"},
    "evaluate": {"core.report"},
}
PLUMBING = {"data", "core.common", "core.run", "core.optim", "core.report"}
# Named exceptions: a stage that loads a model to measure it, or a rival to compare with.
ALSO = {
    "hybrid": {"bridge"},                               # its `measure`, the one function for it
    "generate": {"core.backbone", "core.masked"},       # the judge and the converted rivals
    "circuits": {"core.backbone", "core.masked"},       # the two models that are compared
    "evaluate": {"core.backbone", "core.masked", "hybrid"},     # speed and bits per byte
}


def imports(file, top_level=False):
    """Modules of this project that a file imports, as core.run, studies.sweep, bridge."""
    tree = ast.parse(file.read_text())
    for node in tree.body if top_level else ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module in ("core", "studies"):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
        for name in names:
            if name.split(".")[0] in {"core", "studies", *STAGES}:
                yield name


def graph(top_level=False):
    """{module: modules of the project that it imports}."""
    edges = {}
    for file in FILES:
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        edges[name] = set(imports(file, top_level))
    return edges


def test_the_code_is_plain():
    """The table of docs/log/2026-12.md, first entry. These ceilings may only fall."""
    rows = plainness.table()
    total = {name: sum(row[name] for row in rows.values()) for name in next(iter(rows.values()))}
    assert total["tokens"] <= 53_410
    assert total["tokens"] / total["code"] <= 11.5
    assert total["wide"] == total["nested"] == total["walrus"] == 0
    assert total["tuples"] <= 10
    assert total["long"] == total["crowded"] == 0
    assert total["refusals"] <= 45
    for name, row in rows.items():
        assert row["lines"] < 500, name
        assert row["tokens"] <= 13 * row["code"], name


def test_the_house():
    """Ten scripts in reading order, nine modules of core, studies above; no circle."""
    edges = graph()
    assert {file.stem for file in ROOT.glob("*.py")} == set(STAGES)
    assert {file.stem for file in (ROOT / "core").glob("[a-z]*.py")} == CORE
    for name, used in edges.items():
        if name.startswith("core."):
            assert all(module.startswith("core.") for module in used), f"{name} imports {used}"
        elif name in STAGES:
            assert not any(module.startswith("studies") for module in used), name
            assert len(used & set(STAGES) - {"data"}) <= 1, f"{name} imports several stages"
    assert "core.masked" not in edges["core.diffusion"]
    assert "core.diffusion" not in edges["core.masked"]

    finished = set()

    def visit(name, path):
        assert name not in path, f"a circle: {' -> '.join([*path, name])}"
        if name not in finished:
            for module in edges.get(name, ()):
                visit(module, [*path, name])
            finished.add(name)
    for name in edges:
        visit(name, [])


@pytest.mark.parametrize("stage", BEHIND)
def test_a_stage_is_understood_by_three_files(stage):
    assert len(BEHIND[stage]) <= 2
    used = graph()[stage]
    assert used <= BEHIND[stage] | PLUMBING | ALSO.get(stage, set()), used


@pytest.mark.parametrize("stage, most", [("bridge", 9), ("repr_align", 10), ("generate", 12)])
def test_how_many_files_a_stage_loads(stage, most):
    """Itself and all that it imports, directly or not, at the top of a file."""
    edges = graph(top_level=True)
    loaded = set()
    waiting = [stage]
    while waiting:
        name = waiting.pop()
        if name not in loaded:
            loaded.add(name)
            waiting += edges.get(name, ())
    assert len(loaded) <= most, loaded


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_files_start_with_a_docstring(file):
    source = file.read_text()
    assert file.name == "__init__.py" or ast.get_docstring(ast.parse(source))


def test_the_number_of_flags():
    flags = {name: len(importlib.import_module(name).Config.__dataclass_fields__) for name in COMMANDS}
    assert sum(flags.values()) <= 200, flags
    assert flags["bridge"] <= 38
    assert flags["repr_align"] <= 31


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_has_a_help_text(name, capsys):
    module = importlib.import_module(name)
    with pytest.raises(SystemExit) as left:
        module.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert left.value.code == 0
    comments = dict(re.findall(r"^    (\w+): .*?#\s*(.+)$", inspect.getsource(module.Config), re.M))
    for flag in module.Config.__dataclass_fields__:
        assert f"--{flag}" in shown
        assert " ".join(comments[flag].split()) in shown, flag


@slow
def test_help_is_quick():
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    subprocess.run([sys.executable, "geometry.py", "--help"], cwd=ROOT, check=True,
                   capture_output=True)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 6   # 1.5 s when idle


def parse(module, argv):
    """The Config of a command line; the preset `auto` stands for the toy."""
    presets = getattr(module, "PRESETS", None)
    if module.__name__ == "studies.compare":
        argv = ["--runs", *argv]                    # as its main does

    def choose(cfg):
        name = getattr(cfg, "preset", "toy")
        return "toy" if name == "auto" else name
    return common.parse(module.Config, argv, "", presets, choose)


def test_every_launch_line_parses():
    """The commands in the docstrings, in README and in docs name flags that exist."""
    texts = [ast.get_docstring(ast.parse(file.read_text())) or "" for file in FILES]
    texts += [(ROOT / "README.md").read_text(), (ROOT / "docs" / "findings.md").read_text()]
    text = "\n".join(texts).replace("\\\n", " ")
    line = r"^\s*(?:\w+=\S+ )*(?:python|torchrun --nproc_per_node \d+) (\w+\.py|-m studies\.\w+)([^#\n`]*)"
    seen = 0
    for name, rest in re.findall(line, text, re.M):
        if "$" in rest:                             # a loop of a shell
            continue
        module = importlib.import_module(name.removesuffix(".py").removeprefix("-m "))
        assert parse(module, shlex.split(rest)) is not None
        seen += 1
    assert seen >= 20


def pipeline(folder, **environment):
    """The lines that run_all.sh prints, with a stand-in for python that echoes its arguments."""
    stand_in = folder / "python"
    stand_in.write_text('#!/bin/sh\nfor a in "$@"; do printf "%s\\t" "$a"; done\necho\n')
    stand_in.chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"
    done = subprocess.run(["bash", str(ROOT / "run_all.sh")], cwd=folder, capture_output=True,
                          text=True, check=True, env={**os.environ, "PATH": path, **environment})
    return done.stdout.splitlines()


@pytest.mark.parametrize("environment", [
    {}, {"PRESET": "tiny"}, {"MODEL": "some/model", "DATA": "my notes", "OUT": "out/x"},
], ids=["default", "tiny", "another model"])
def test_every_command_of_the_pipeline_parses(environment, tmp_path):
    stages = set()
    for line in pipeline(tmp_path, **environment):
        if ".py\t" not in line:
            continue
        name, *argv = line.rstrip("\t").split("\t")
        module = importlib.import_module(name.removesuffix(".py"))
        cfg = parse(module, argv)
        assert cfg.out.startswith(environment.get("OUT", "out"))
        assert getattr(cfg, "data", "") in ("", environment.get("DATA", "stdlib"))
        stages.add(name.removesuffix(".py"))
    without = {"sample"} if "MODEL" not in environment else {"sample", "toy"}
    assert stages == set(STAGES) - without


def test_ci_knows_the_number_of_steps_on_a_gpu():
    steps = re.findall(r"^run \w+", (ROOT / "studies" / "gpu.sh").read_text(), re.M)
    assert f'"{len(steps)} of {len(steps)} steps ended well"' in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("name", COMMANDS)
def test_dry_run_writes_nothing(name, runs, tmp_path, capsys):
    module = importlib.import_module(name)
    fields = module.Config.__dataclass_fields__
    values = {"model": runs / "toy", "out": tmp_path / "a" / "b", "bridge": runs / "bridge", "layer": 2}
    argv = ["--dry_run"]
    for key, value in values.items():
        if key in fields and not (name == "sample" and key == "model"):
            argv += [f"--{key}", str(value)]
    with contextlib.suppress(SystemExit):
        module.main(argv)
    assert capsys.readouterr().out
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("name", COMMANDS)
def test_an_unknown_flag_names_the_nearest(name, capsys):
    module = importlib.import_module(name)
    assert "did you mean --dry_run?" in fails(capsys, module.main, "--dryrun")


def test_a_value_of_the_wrong_type_is_refused(capsys):
    import bridge
    assert "invalid int value" in fails(capsys, bridge.main, "--seed", "one")


def test_random_numbers_depend_on_every_part_of_the_key():
    keys = [(0, "a", 1, 2), (0, "a", 2, 1), (0, "b", 1, 2), (1, "a", 1, 2), (0, "a", 1, 3),
            (0, "a", 1), (0, "a", 1, 0), (0, "a", 1, 0, 0), (0, "a", 0), (0, "a")]
    values = {common.generator(*key).random() for key in keys}
    assert len(values) == len(keys)
    assert common.generator(0, "a", 1, 2).random() in values


def test_files_appear_whole_or_not_at_all(tmp_path):
    (tmp_path / "f.json").write_text("old")
    with pytest.raises(RuntimeError), run.atomic(tmp_path / "f.json") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert (tmp_path / "f.json").read_text() == "old"
    assert os.listdir(tmp_path) == ["f.json"]
    with pytest.raises(ValueError):
        run.write_json(tmp_path / "f.json", {"x": float("nan")})
    assert (tmp_path / "f.json").read_text() == "old"


def test_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 1_700
    assert len(text.splitlines()) <= 220


BANNED = r"\b(beside|apart|so many|as ever|as many|what it makes of|law of)\b"


def test_the_habits_that_a_reader_stumbled_over_are_gone():
    """Words that design and plain prose ban, counted in README, docstrings, comments and errors."""
    texts = {file: file.read_text() for file in [*FILES, ROOT / "README.md"]}
    hits = {str(f.relative_to(ROOT)): re.findall(BANNED, text) for f, text in texts.items()}
    assert not {name: words for name, words in hits.items() if words}
