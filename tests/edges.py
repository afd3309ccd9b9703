"""edges.py: EAP-IG scores of one task, for golden.sh to compare two versions of the code.

    python tests/edges.py TREE MODEL OUT

TREE is a checkout, MODEL a model of toy.py --tasks, OUT the file to write. Both versions may read
one MODEL.

The task is brackets, with 4 pairs and 2 points. The AR model and the untrained converted one are
scored, whether they solve it or not. The scores (senders, receivers) go to a safetensors file.
"""
import sys
from pathlib import Path

TASK = "brackets"
PAIRS = 4
POINTS = 2
SEED = 0


def second_edition(model):
    """{model: scores} by the API of commit d080e9e."""
    import circuits
    import torch
    from core import backbone, tasks
    cpu = torch.device("cpu")
    pieces = tasks.Pieces(backbone.load_tokenizer(model))
    batch = circuits.stack(tasks.examples(TASK, pieces, PAIRS, SEED), cpu)
    scores = {}
    for subject in circuits.load_subjects(model, [], backbone.identity(model), cpu):
        name = subject.name.removesuffix(" twin")
        scores[name] = circuits.attribute(subject, [batch], POINTS)
    return scores


def third_edition(model):
    """{model: scores} by the API of this commit."""
    import circuits
    import torch
    from core import backbone, tasks
    pieces = tasks.Pieces(backbone.load_tokenizer(model))
    lines = tasks.examples(TASK, pieces, PAIRS, SEED)
    scores = {}
    for subject in circuits.load_subjects(model, {}, torch.device("cpu")):
        batch = circuits.make_batch(lines, subject, pieces.tokenizer.eos_token_id)
        scores[subject.name] = circuits.attribute(subject, batch, POINTS)
    return scores


def main(tree, model, out):
    sys.path.insert(0, str(Path(tree).resolve()))
    from safetensors.torch import save_file
    is_second = (Path(tree) / "core" / "draws.py").exists()
    scores = second_edition(model) if is_second else third_edition(model)
    save_file(scores, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
