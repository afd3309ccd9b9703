"""evaluate.py: sentences from numbers whose answer is known, and what it measures itself."""
import json
import shutil

import pytest
import torch
from conftest import fails, slow
from transformers import GenerationMixin

import evaluate
from core import masked
from core.run import write_json

CFG = evaluate.Config(margin=0.02)


def said(section, **results):
    sentences, rows, _ = section(results, CFG)
    assert rows
    return sentences


# --------------------------------------------------------------------------------------------------
# Findings

def bridge(kl):
    numbers = {"kl_rows": kl, "kl": sum(kl) / len(kl), "ce_gap": 0.1234, "ce_gap_se": 0.01}
    return {"nfe": {"1": numbers, "4": numbers}, "nfe_default": 4, "layer": 2, "parameters": 9,
            "steps": 3}


def test_locate():
    layers = [{"chosen": 0.25}, {"chosen": 0.75}]
    variants = [{"best_layer": 2}, {"best_layer": 1}, {"best_layer": 2}]
    result = {"best_layer": 2, "layers": layers, "variants": variants,
              "trivial": [{"name": "-layer", "spearman_with_score": -1.0}]}
    first, second = said(evaluate.locate, geometry=result)
    assert "chooses layer 2 of 2 candidates, and does so in 75%" in first
    assert "2 of 3 variants" in second and "correlation with depth is +1.00" in second
    copied = {**result, "equal_windows": 9, "at_ceiling": [1, 2]}
    third = said(evaluate.locate, geometry=copied)[2]
    assert third.startswith("9 windows of the text were left out as copies")
    assert third.endswith("near its ceiling 1/eps at layers [1, 2].")
    clean = {**result, "equal_windows": 0, "at_ceiling": []}
    assert len(said(evaluate.locate, geometry=clean)) == 2


@pytest.mark.parametrize("control, words", [
    ([0.30, 0.31, 0.30, 0.29], "better by 0.2 nats (95%"),
    ([0.101, 0.109, 0.091, 0.1], "tie within 0.02 nats"),
    ([0.3, 0.01, 0.2, 0.02], "not known (95%"),
])
def test_replace(control, words):
    ours = bridge([0.1, 0.11, 0.09, 0.1])
    first, second = said(evaluate.replace, bridge=ours, regression=bridge(control))
    assert "blocks 1..2 (4 calls) changes the next-token loss by +0.1234 nats" in first
    assert words in second and "one training of each" in second
    assert len(said(evaluate.replace, bridge=ours)) == 1
    for other in (bridge([0.1]), {**bridge(control), "layer": 1}, {**bridge(control), "steps": 4}):
        assert "is no rival" in said(evaluate.replace, bridge=ours, regression=other)[1]


def method(name, calls, *levels, layer=None, seeds=None, folder="f"):
    """A row a level; each is another training seed unless `seeds` says otherwise."""
    row = {"method": name, "calls": calls, "layer": layer}
    seeds = seeds or range(len(levels))
    return [{**row, "matched": level, "seed": seed, "folder": f"{folder}{i}"}
            for i, (level, seed) in enumerate(zip(levels, seeds))]


def test_generate_takes_the_best_rival_at_no_more_calls():
    ours = method("hidden-state diffusion, layer 1", 32, 40.0, 42.0, 41.0, layer=1)
    deep = method("hidden-state diffusion, layer 4", 32, 90.0, layer=4)
    rivals = method("AR", 64, 12.0) + method("Jacobi", 32, 80.0) + method("lazy", 30, 60.0, 61.0)
    never = method("converted", 32, None)
    result = {"rows": ours + deep + rivals + never, "real": {"gen_ppl": 33.6}}
    first, second = said(evaluate.generate, generate=result)
    assert "hidden-state diffusion, layer 1 (32 calls) has gen-PPL 41.0; real text has 33.6" in first
    assert "Against lazy, the best rival" in second and "better by 0.389 nats" in second
    result["rows"] = rivals + method("ours", 32, None, layer=1)
    assert "does not reach the entropy" in said(evaluate.generate, generate=result)[0]


def test_two_models_of_one_seed_are_two_methods_and_show_their_folders():
    """They would pass for two seeds of one method, and their rows would look alike."""
    rows = method("bridge, layer 1", 32, 40.0, 44.0, layer=1, seeds=[0, 0])
    rows += method("converted", 32, 90.0, 91.0)
    first, second = said(evaluate.generate, generate={"rows": rows, "real": {"gen_ppl": 33.6}})
    assert [row["method"] for row in rows] == [
        "bridge, layer 1 (f0)", "bridge, layer 1 (f1)", "converted", "converted"]
    assert "bridge, layer 1 (f0) (32 calls) has gen-PPL 40.0" in first
    assert "not known" in second and "n = 1" in second


def test_convert_and_one_training_is_never_enough():
    """Flags say what an arm is. Its folder is only a name, here one that lies."""
    plain = {"bound": [5.0, 0.01], "steps": 120, "attention": "bidirectional", "align_weight": 0.0,
             "block_size": 16, "context": "noisy", "ar_weight": 0.0}
    aligned = {**plain, "bound": [4.9, 0.01], "align_weight": 10.0}
    causal = {"bound": [5.2, 0.01], "attention": "block", "context": "causal", "ar_weight": 1.0}
    arms = {"block": aligned, "w10": plain, "w0": {**plain, **causal}}
    first, second, third, last = said(evaluate.convert, convert=arms)
    assert first.startswith("After 120 steps with no alignment, -log p")
    assert first.endswith("at most 5.000 nats a token (w10).")
    assert "with alignment of hidden states (w = 10)" in second
    assert second.endswith("4.900 nats a token (block): -0.100 against plain conversion (w10).")
    assert "token blocks of 16 in causal context and the next-token loss (weight 1)" in third
    assert third.endswith("(w0): +0.200 against plain conversion (w10).")
    assert "is not known" in last
    longer = {**aligned, "steps": 800}          # trained for other steps: no comparison
    assert "against" not in said(evaluate.convert, convert={"a": plain, "b": longer})[1]
    assert len(said(evaluate.convert, convert={"b": longer})) == 1
    clipped = {**plain, "mask_min": 0.0, "mask_max": 0.2}       # not plain conversion: no rival
    arms = {"clipped": clipped, "w0": {**aligned, "mask_min": 0.0, "mask_max": 1.0}}
    first, second, _ = said(evaluate.convert, convert=arms)
    assert "shares of masks in [0.0, 0.2]" in second and "against" not in first


def test_compare():
    overlap = {"AR": {"ar": [], "prompts": [0.8, 0.9]}, "untrained": {"ar": [0.75]},
               "converted, w = 0": {"ar": [0.5, 0.6]}}
    tasks = {"brackets": {"pairs": 8, "overlap": overlap, "solved": {"AR": 1.0},
                          "solved_in_window": {"AR": 0.9}},
             "missing": {"pairs": 0, "overlap": {}, "solved": {"AR": 0.0},
                         "solved_in_window": {"AR": 0.0}}}
    first, second = said(evaluate.compare, circuits={"tasks": tasks})
    assert "both solve 1 of 2 tasks (brackets)" in first
    assert "converted, w = 0 has overlap (Jaccard) 0.55" in second
    assert "before training it has 0.75, and the AR model on other prompts 0.85" in second
    rows = evaluate.compare({"circuits": {"tasks": tasks}}, CFG)[1]
    assert rows[0] == {"task": "brackets", "model": "AR", "solved": 1.0, "solved in a window": 0.9}
    overlap["AR"]["prompts"] = []               # circuits.py --resamples 1
    assert "on other prompts not measured" in said(evaluate.compare, circuits={"tasks": tasks})[1]


def test_names_with_commas_stay_readable():
    rows = [{"model": "intact", "ms": 2.0, "bits": 1.5}, {"model": "hybrid, NFE 4", "ms": 3.0, "bits": 1.6}]
    bits, time = said(evaluate.cost, measured=rows)
    assert bits.endswith("intact: 1.500; hybrid, NFE 4: 1.600.") and time.endswith("hybrid, NFE 4: 1.50.")


@pytest.mark.parametrize("rows", [{}, {"LOCATE": [{"layer": 1, "score": 0.5}]}, {
    "REPLACE": [{"model": "regression", "kl": 0.1}], "CONVERT": [{"arm": "w0", "bound": 5.0}]}])
def test_the_figure_of_few_points(rows, tmp_path):
    evaluate.overview(rows, tmp_path / "f.png")
    assert (tmp_path / "f.png").exists()


# --------------------------------------------------------------------------------------------------
# Measurement

class Letters:
    """A tokenizer whose token n is the letter n."""
    def batch_decode(self, rows, skip_special_tokens):
        return ["".join(map(chr, row)) for row in rows.tolist()]


def test_bytes_are_those_of_the_windows_less_the_given_token():
    rows = torch.tensor([list(map(ord, window)) for window in ("abcd", "éaéa", "aéaa")])
    assert evaluate.data.count_bytes(Letters(), rows) == 3 + 4 + 4


# --------------------------------------------------------------------------------------------------
# The report

@slow
def test_speed_is_measured_without_the_settings_of_the_base(runs, tmp_path, monkeypatch):
    """A base's generation_config.json may hold penalties, which cost time."""
    shutil.copytree(runs, tmp_path / "out")
    settings = tmp_path / "out" / "toy" / "generation_config.json"
    values = json.loads(settings.read_text())
    settings.write_text(json.dumps({**values, "repetition_penalty": 1.5, "num_beams": 2}))
    seen = []
    generate = GenerationMixin.generate

    def spy(self, *args, **kwargs):
        seen.append(self.generation_config)
        text = generate(self, *args, **kwargs)
        assert text.shape == (1, 8)
        return text
    monkeypatch.setattr(GenerationMixin, "generate", spy)
    out = tmp_path / "out"
    evaluate.main(["--preset", "tiny", "--runs", str(out), "--out", str(tmp_path / "e")])
    assert len(seen) == 8
    assert all(config.repetition_penalty is config.num_beams is None for config in seen)


@slow
def test_a_report(runs, tmp_path, monkeypatch, capsys):
    argv = ["--preset", "tiny", "--runs", str(runs), "--out", str(tmp_path / "e")]
    result = evaluate.main(argv)
    text = (tmp_path / "e" / "report.md").read_text()
    before, *sections = text.split("\n## ")
    assert before.count("\n- ") == len(result["findings"]) >= 9
    names = [section.split("\n")[0] for section in sections]
    assert names[:4] == ["LOCATE", "REPLACE", "GENERATE", "CONVERT"] and names[-1] == "COST"
    assert "\n\n\n" not in text
    for name in ("figure.png", "geometry_geometry.png", "generate_generation.png",
                 "convert_w0_convert.png", "convert_w10_convert.png"):
        assert (tmp_path / "e" / name).exists() and f"({name})" in text
    measured = {row["model"]: row for row in result["own"]["measured"]}
    assert set(measured) >= {"intact", "hybrid, NFE 1", "converted, w0"}
    assert all(row["ms"] > 0 and 0 < row["bits"] < 16 for row in measured.values())
    saved = json.loads((tmp_path / "e" / "result.json").read_text())
    assert saved == json.loads(json.dumps(result))

    monkeypatch.setattr(evaluate, "measure", None)      # the same weights are not measured again
    assert evaluate.main(argv)["own"] == saved["own"]


def finish(folder, result, edition=3):
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", {"dihal": {"edition": edition}})
    write_json(folder / "result.json", result)


def test_stages_that_did_not_run_are_left_out(tmp_path):
    row = {"score_low": 1.0, "score_high": 2.0, "curvature": 1.0, "stiffness": 1.0,
           "effective_rank": 12.3456, "chosen": 1.0}
    layers = [{"layer": 1, "score": 4.0, **row}, {"layer": 2, "score": 3.0, **row}]
    finish(tmp_path / "geometry", {
        "base": "b", "best_layer": 1, "layers": layers, "variants": [{"best_layer": 1}],
        "trivial": [{"name": "-layer", "spearman_with_score": 1.0}]})
    (tmp_path / "geometry" / "geometry.png").write_bytes(b"figure")
    out = tmp_path / "evaluate"
    out.mkdir()
    write_json(out / "result.json", {"findings": []})   # of the second edition
    result = evaluate.main(["--preset", "tiny", "--runs", str(tmp_path), "--out", str(out)])
    text = (out / "report.md").read_text()
    assert result["findings"][0].startswith("LOCATE. The geometry score chooses layer 1 of 2")
    assert text.index(result["findings"][1]) < text.index("## LOCATE") < text.index("| 12.35 |")
    assert "## REPLACE" not in text and "(geometry_geometry.png)" in text
    assert (out / "geometry_geometry.png").exists() and (out / "figure.png").exists()


def test_runs_of_two_models_are_refused(tmp_path, capsys):
    argv = ["--runs", tmp_path, "--out", tmp_path / "evaluate"]
    assert "of 0 base models" in fails(capsys, evaluate.main, *argv)
    finish(tmp_path / "geometry", {"base": "a"})
    finish(tmp_path / "bridge", {"base": "b"})
    assert "of 2 base models instead of one" in fails(capsys, evaluate.main, *argv)
    finish(tmp_path / "bridge", {"base": "a"}, edition=2)
    assert "second edition" in fails(capsys, evaluate.main, *argv)


def test_the_preset():
    assert evaluate.choose(evaluate.Config(runs="none")) == "toy"


# --------------------------------------------------------------------------------------------------
# lm-evaluation-harness

@slow
def test_the_harness(runs, tmp_path):
    pytest.importorskip("lm_eval", reason='an optional package: pip install "lm-eval[hf]"')
    from core import backbone
    lines = [{"text": "x = (1", "right": ")"}, {"text": "y = [1", "right": "]"}]
    (tmp_path / "bracket.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    (tmp_path / "bracket.yaml").write_text(f"""
task: bracket
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/bracket.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: [")", "]"]
doc_to_target: "{{{{[')', ']'].index(right)}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}]
""")
    tokenizer = backbone.load_tokenizer(runs / "toy")
    student, _ = masked.load_converted(runs / "convert" / "w0", torch.device("cpu"), torch.float32)
    lm = backbone.load(runs / "toy", torch.device("cpu"), torch.float32)
    cfg = evaluate.Config(harness=(str(tmp_path / "bracket.yaml"),), calls=4)
    rows = evaluate.run_harness({"intact": lm.model}, {"converted": student}, tokenizer, cfg)
    assert {row["model"] for row in rows} == {"intact", "converted"}
    assert all(0 <= row["value"] <= 1 for row in rows if row["metric"].startswith("acc,"))
