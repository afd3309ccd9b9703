"""Which stages work in which family, tried with random weights.

    python tests/test_families.py               # prints a table"""
import pytest
import torch
from conftest import CAUSAL_ONLY, FAMILIES, randomise, slow, tiny_model
from transformers import DynamicCache

from core import backbone
from core.attribution import LAYOUT, Subject
from core.common import UserError
from core.diffusion import Bridge, BridgeConfig
from core.masked import Arm, Student
from hybrid import HybridConfig, HybridForCausalLM

IDS = torch.randint(3, 64, (2, 20), generator=torch.Generator().manual_seed(0))


def hybrid(lm):
    """Build a hybrid at layer 2. Its cached logits are those of one pass, beyond any window."""
    net = randomise(Bridge(BridgeConfig(D=32, W=32, depth=1, H=2)))
    model = HybridForCausalLM(HybridConfig(info={"layer": 2, "seq_len": 32}, nfe=1), net, lm).eval()
    cache = DynamicCache(config=model.config)
    parts = [model(part, past_key_values=cache).logits for part in IDS.split([12, 7, 1], 1)]
    plain = model(IDS, use_cache=False).logits
    if not torch.allclose(torch.cat(parts, 1), plain, atol=1e-4, rtol=1e-4):
        raise UserError("its cached logits differ")


STAGES = {"cut at a layer": backbone.check,
          "converted": lambda lm: Student(lm, 63),
          "to token blocks": lambda lm: Student(lm, 63, Arm("block")),
          "circuits": Subject,
          "hybrid": hybrid}             # the last one: it takes the lower blocks away


@torch.no_grad()
def works(family):
    """{stage: "yes", or why not}."""
    lm = backbone.Backbone(tiny_model(family).requires_grad_(False))
    answers = {}
    for stage, attempt in STAGES.items():
        try:
            attempt(lm)
            answers[stage] = "yes"
        except UserError as error:
            answers[stage] = str(error)
    return answers


@pytest.mark.parametrize("family", [
    "qwen3", "falcon", *[pytest.param(name, marks=slow) for name in FAMILIES
                         if name not in ("qwen3", "falcon")]])
def test_what_works(family):
    model_type = tiny_model(family).config.model_type
    answers = works(family)
    expected = set()
    if family in CAUSAL_ONLY:
        expected |= {"converted", "to token blocks"}
    if model_type not in LAYOUT:
        expected.add("circuits")
    refused = {stage for stage, answer in answers.items() if answer != "yes"}
    assert refused == expected, answers
    for stage in refused:
        assert model_type in answers[stage]             # by name


if __name__ == "__main__":
    print(f"| family | {' | '.join(STAGES)} |")
    print(f"|---{'|---' * len(STAGES)}|")
    for name in FAMILIES:
        cells = ["yes" if answer == "yes" else "no" for answer in works(name).values()]
        print(f"| {name} | {' | '.join(cells)} |")
