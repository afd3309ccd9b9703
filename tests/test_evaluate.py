"""evaluate.py: sentences from numbers whose answer is known, and what it measures itself."""
import json
import math
import shutil

import pytest
import torch
from conftest import fails, tiny_model

import evaluate
from core import masked
from core.run import read_json, write_json

CFG = evaluate.Config(margin=0.02)


def said(find, **results):
    return list(find(results, CFG))


# --------------------------------------------------------------------------------------------------
# Findings

def bridge(kl):
    numbers = {"kl_rows": kl, "kl": sum(kl) / len(kl), "ce_gap": 0.1234, "ce_gap_se": 0.01}
    return {"nfe": {"1": numbers, "4": numbers}, "nfe_default": 4, "layer": 2}


def test_locate():
    layers = [{"chosen": 0.25}, {"chosen": 0.75}]
    variants = [{"best_layer": 2}, {"best_layer": 1}, {"best_layer": 2}]
    result = {"best_layer": 2, "layers": layers, "variants": variants,
              "trivial": [{"name": "-layer", "spearman_with_score": -1.0}]}
    first, second = said(evaluate.find_locate, geometry=result)
    assert "chooses layer 2 of 2 candidates, and does so in 75%" in first
    assert "2 of 3 variants" in second and "depth alone is -1.00" in second


@pytest.mark.parametrize("control, words", [
    ([0.30, 0.31, 0.30, 0.29], "better by 0.2 nats (95%"),
    ([0.101, 0.109, 0.091, 0.1], "tie within 0.02 nats"),
    ([0.3, 0.01, 0.2, 0.02], "not known (95%"),
])
def test_replace(control, words):
    ours = bridge([0.1, 0.11, 0.09, 0.1])
    first, second = said(evaluate.find_replace, bridge=ours, regression=bridge(control))
    assert "blocks 1..2 (4 calls) changes the next-token loss by +0.1234 nats" in first
    assert words in second and "one training of each" in second
    assert len(said(evaluate.find_replace, bridge=ours)) == 1


def method(name, calls, *levels, layer=None):
    return [{"method": name, "calls": calls, "layer": layer, "matched": level} for level in levels]


def test_generate_takes_the_best_rival_at_no_more_calls():
    ours = method("hidden-state diffusion, layer 1", 32, 40.0, 42.0, 41.0, layer=1)
    deep = method("hidden-state diffusion, layer 4", 32, 90.0, layer=4)
    rivals = method("AR", 64, 12.0) + method("Jacobi", 32, 80.0) + method("lazy", 30, 60.0, 61.0)
    never = method("converted", 32, None)
    result = {"rows": ours + deep + rivals + never, "real": {"gen_ppl": 33.6}}
    first, second = said(evaluate.find_generate, generate=result)
    assert "hidden-state diffusion, layer 1 (32 calls) has gen-PPL 41.0; real text has 33.6" in first
    assert "Against lazy, the best rival" in second and "better by 0.389 nats" in second
    result["rows"] = rivals + method("ours", 32, None, layer=1)
    assert "does not reach the entropy" in said(evaluate.find_generate, generate=result)[0]


def test_convert_and_one_training_is_never_enough():
    results = {f"convert/{arm}": {"bound": [bound, 0.01], "steps": 120}
               for arm, bound in (("w0", 5.0), ("w10", 4.9), ("block", 5.2))}
    first, second, third = said(evaluate.find_convert, **results)
    assert "After 120 steps" in first and "at most 5.000" in first
    assert "Alignment of hidden states: at most 4.900; against w0 not known (-0.1 nats" in second
    assert "token blocks: at most 5.200" in third


def test_compare():
    overlap = {"AR": {"ar": [], "prompts": [0.8, 0.9]}, "untrained": {"ar": [0.75]},
               "converted, w = 0": {"ar": [0.5, 0.6]}}
    tasks = {"brackets": {"pairs": 8, "overlap": overlap}, "missing": {"pairs": 0, "overlap": {}}}
    first, second = said(evaluate.find_compare, circuits={"tasks": tasks})
    assert "both solve 1 of 2 tasks (brackets)" in first
    assert "converted, w = 0 has overlap (Jaccard) 0.55" in second
    assert "before training it has 0.75, and the AR model on other prompts 0.85" in second


# --------------------------------------------------------------------------------------------------
# Measurement

def test_bits_per_byte_of_a_known_model():
    model = tiny_model("llama")
    rows = torch.randint(3, 64, (5, 12))
    logits = model(rows).logits[:, :-1].flatten(0, 1)
    nats = torch.nn.functional.cross_entropy(logits, rows[:, 1:].flatten(), reduction="sum")
    bits, error = evaluate.bits_per_byte(model, rows, 100, CFG)
    assert bits == pytest.approx(nats.item() / math.log(2) / 100, rel=1e-5) and error == 0


def test_the_bound_of_one_token_is_exact(runs):
    student, _ = masked.load_converted(runs / "convert" / "w0", torch.device("cpu"), torch.float32)
    rows = torch.randint(3, 64, (2, 2))
    weight = torch.tensor([[0.0, 1.0]])
    nats = sum(masked.masked_ce(student, ids, weight).item() for ids in rows)
    bits, error = evaluate.bits_per_byte(student, rows, 8, CFG)
    assert bits == pytest.approx(nats / math.log(2) / 8, rel=1e-5)
    assert error == pytest.approx(0, abs=1e-9)


# --------------------------------------------------------------------------------------------------
# The report

def test_a_report(runs, tmp_path, monkeypatch, capsys):
    argv = ["--preset", "tiny", "--runs", str(runs), "--out", str(tmp_path / "e")]
    result = evaluate.main(argv)
    text = (tmp_path / "e" / "report.md").read_text()
    before, *sections = text.split("\n## ")
    assert before.count("\n- ") == len(result["findings"]) >= 9
    names = [section.split("\n")[0] for section in sections]
    assert names[:4] == ["LOCATE", "REPLACE", "GENERATE", "CONVERT"] and names[-1] == "COST"
    for name in ("figure.png", "geometry_geometry.png", "generate_generation.png"):
        assert (tmp_path / "e" / name).exists() and f"({name})" in text
    assert set(result["own"]["measured"]["ms"]) >= {"intact", "hybrid, NFE 1", "converted, w0"}
    saved = json.loads((tmp_path / "e" / "result.json").read_text())
    assert saved == json.loads(json.dumps(result))

    monkeypatch.setattr(evaluate, "measure", None)      # the same weights are not measured again
    assert evaluate.main(argv)["own"] == saved["own"]


def test_stages_that_did_not_run_are_left_out(runs, tmp_path):
    shutil.copytree(runs / "geometry", tmp_path / "r" / "geometry")
    evaluate.main(["--runs", str(tmp_path / "r"), "--out", str(tmp_path / "e")])
    text = (tmp_path / "e" / "report.md").read_text()
    assert "## LOCATE" in text and "## REPLACE" not in text


def test_runs_of_two_models_are_refused(runs, tmp_path, capsys):
    for name in ("geometry", "bridge"):
        shutil.copytree(runs / name, tmp_path / "r" / name)
    file = tmp_path / "r" / "geometry" / "result.json"
    write_json(file, {**read_json(file), "base": "another"})
    argv = ["--runs", tmp_path / "r", "--out", tmp_path / "e"]
    assert "of one base model" in fails(capsys, evaluate.main, *argv)
    assert "of one base model" in fails(capsys, evaluate.main, "--runs", tmp_path / "none")
    file = tmp_path / "r" / "geometry" / "config.json"
    write_json(file, {"dihal": {"config": {}}})
    assert "second edition" in fails(capsys, evaluate.main, *argv)


# --------------------------------------------------------------------------------------------------
# lm-evaluation-harness

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
    rows = evaluate.harness({"intact": lm.model, "converted": student}, tokenizer, cfg)
    assert {row["model"] for row in rows} == {"intact", "converted"}
    assert all(0 <= row["value"] <= 1 for row in rows if row["metric"].startswith("acc,"))
