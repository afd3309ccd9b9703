"""The README's lm-evaluation-harness snippet, on a local task. Skipped unless lm-eval is installed."""
import json

import pytest
import torch

lm_eval = pytest.importorskip("lm_eval", reason="pip install lm-eval[hf]")

TASK = """
task: bracket
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


def local_task(folder):
    rows = [{"text": f"x = ({i}", "choices": [")", "]"], "label": 0} for i in range(6)]
    (folder / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    (folder / "task.yaml").write_text(TASK.format(file=folder / "rows.json"))


def test_all_three_models_in_the_harness(runs, tmp_path):
    from lm_eval.api.instance import Instance

    import hybrid
    from core import backbone, masked, zeroshot
    from core.common import UserError
    local_task(tmp_path)
    student, tokenizer = masked.load_converted(runs / "repr_align" / "w0", torch.device("cpu"), torch.float32)
    models = {"AR": backbone.load(runs / "toy", torch.device("cpu"), torch.float32).model,
              "hybrid": hybrid.from_bridge(runs / "bridge"), "twin": student}
    found = zeroshot.harness(models, data_tokenizer(runs), ["bracket"], str(tmp_path), 0, 8, 0)
    assert set(found) == set(models) and all(0 <= f["bracket"]["acc,none"] <= 1 for f in found.values())
    with pytest.raises(UserError, match="knows no such task"):
        zeroshot.harness(models, tokenizer, ["chess"], str(tmp_path), 0, 8, 0)

    face = zeroshot.twin_interface(student, tokenizer, 64, 8, 0)
    context, rest = "x = (1", ")"
    (got, greedy), = face.loglikelihood([Instance("loglikelihood", {}, (context, rest), 0)])
    head, both = (tokenizer(t)["input_ids"] for t in (context, context + rest))
    assert len(both) == len(head) + 1                            # one token: the bound is its exact probability
    ids = torch.tensor(both)
    hidden = torch.arange(len(ids))[None] == len(ids) - 1
    assert got == pytest.approx(-masked.masked_ce(student, ids, hidden).item(), rel=1e-5)
    *_, normed = student.states(ids[None], hidden)
    assert greedy == (student.logits(normed[0, -2]).argmax().item() == both[-1])
    text, = face.generate_until([Instance("generate_until", {}, ("import", {"until": ["\n"], "max_gen_toks": 6}), 0)])
    assert isinstance(text, str) and "\n" not in text
    rolling, = face.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("import os\nimport sys\n",), 0)])
    assert rolling < 0


def data_tokenizer(runs):
    from core import backbone
    return backbone.load_tokenizer(runs / "toy")


def test_the_hybrid_in_the_harness(runs, tmp_path):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoTokenizer

    import hybrid
    model = hybrid.HybridForCausalLM.from_pretrained(runs / "hybrid")
    tokenizer = AutoTokenizer.from_pretrained(runs / "hybrid")
    harness = HFLM(pretrained=model, tokenizer=tokenizer)

    pairs = [("import os\nimport", " sys"), ("def main(", "args):\n    return")]
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    for (context, rest), (got, _) in zip(pairs, harness.loglikelihood(asked), strict=True):
        head, ids = (tokenizer(t, return_tensors="pt")["input_ids"] for t in (context, context + rest))
        p = torch.log_softmax(model(ids).logits[0, :-1], -1).gather(-1, ids[0, 1:, None])[head.shape[1] - 1:]
        assert got == pytest.approx(p.sum().item(), rel=1e-3)

    local_task(tmp_path)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = lm_eval.simple_evaluate(harness, tasks=["bracket"], task_manager=manager, bootstrap_iters=0)
    assert 0 <= found["results"]["bracket"]["acc,none"] <= 1 and found["n-samples"]["bracket"]["effective"] == 6
