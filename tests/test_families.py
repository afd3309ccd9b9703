"""What works in which family, tried with random weights: `python tests/test_families.py` prints it as a table."""
import pytest
import torch
from conftest import BY_PLACE, CAUSAL_ONLY, FAMILIES, randomise, tiny_model
from transformers import DynamicCache

from core import backbone, denoiser
from core.attribution import ADDS_UP, Subject
from core.common import UserError
from core.conversion import Arm
from core.hybrid_lm import HybridConfig, HybridForCausalLM
from core.masked import Student

IDS = torch.randint(3, 64, (2, 20), generator=torch.Generator().manual_seed(0))


def hybrid(lm):
    """A hybrid at layer 2 whose cached logits, past any window, are those of one pass."""
    net = randomise(denoiser.Bridge(32, 32, 1, 2))
    model = HybridForCausalLM(HybridConfig(layer=2, nfe=1, bridge=net.settings, vocab_size=64, hidden_size=32), net, lm)
    cache = DynamicCache(config=model.config)
    parts = [model(part, past_key_values=cache).logits for part in IDS.split([12, 7, 1], 1)]
    if not torch.allclose(torch.cat(parts, 1), model.eval()(IDS, use_cache=False).logits, atol=1e-4, rtol=1e-4):
        raise UserError("its cached logits differ")


STAGES = {"cut at a layer": backbone.check, "converted": lambda lm: Student(lm, 63),
          "to blocks": lambda lm: Student(lm, 63, Arm("block")), "circuits": Subject,
          "hybrid": hybrid}             # the last one: it takes the lower blocks away


@torch.no_grad()
def works(family):
    """{what: "yes", or why not}."""
    found, lm = {}, backbone.Backbone(tiny_model(family).requires_grad_(False))
    for what, attempt in STAGES.items():
        try:
            attempt(lm)
            found[what] = "yes"
        except UserError as error:
            found[what] = str(error)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_what_works(family):
    kind, found = tiny_model(family).config.model_type, works(family)
    refused = {what for what, said in found.items() if said != "yes"}
    assert ("converted" in refused) == (family in CAUSAL_ONLY) and ("circuits" in refused) == (kind not in ADDS_UP)
    assert ("to blocks" in refused) == (family in CAUSAL_ONLY + BY_PLACE)
    assert refused <= {"converted", "to blocks", "circuits"}, found
    assert all(kind in found[what] for what in refused)                        # by name


if __name__ == "__main__":
    print(f"| family | {' | '.join(STAGES)} |\n|---{'|---' * len(STAGES)}|")
    for each in FAMILIES:
        print(f"| {each} | " + " | ".join("yes" if said == "yes" else "no" for said in works(each).values()) + " |")
