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

    rows = [{"text": f"x = ({i}", "choices": [")", "]"], "label": 0} for i in range(6)]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "task.yaml").write_text(TASK.format(file=tmp_path / "rows.json"))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = lm_eval.simple_evaluate(harness, tasks=["bracket"], task_manager=manager, bootstrap_iters=0)
    assert 0 <= found["results"]["bracket"]["acc,none"] <= 1 and found["n-samples"]["bracket"]["effective"] == 6
