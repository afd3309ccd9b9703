"""sampled.py: documents sampled from a causal LM, and their entropy, for data.py --data sampled.

Text sampled from a model follows the model's own distribution. So no model has a lower loss on it
than its entropy, and what a conversion loses is measured from a known zero.

Shapes: N texts, T tokens, V vocabulary.
"""
from itertools import count

import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

from core import backbone
from core.common import generator
from core.masked import choose
from core.run import atomic


@torch.no_grad()
def sample_batch(model, start, end, T, number, N=64):
    """N texts of at most T tokens, sampled at temperature 1 after the token `start`.

    ids (N, T'), length (N,) without the final EOS, tokens (N,) with it, and entropy (N,): the sum
    over these tokens of the entropy of the model's distribution, in nats."""
    ids = torch.full((N, 1), start)
    alive = torch.ones(N, dtype=torch.bool)
    length = torch.zeros(N, dtype=torch.int64)
    tokens = torch.zeros(N, dtype=torch.int64)
    entropy = torch.zeros(N, dtype=torch.float64)
    cache = DynamicCache()
    for t in range(T):
        logits = model(ids[:, -1:], past_key_values=cache).logits[:, -1].double()   # (N, V)
        u = torch.tensor(generator(0, "sampled text", number, t).random(N))
        token = choose(logits, 1.0, 1.0, u)                                         # (N,)
        entropy += alive * torch.special.entr(logits.softmax(-1)).sum(-1)
        tokens += alive
        alive = alive & (token != end)
        length += alive
        ids = torch.cat([ids, token[:, None]], dim=1)
        if not alive.any():
            break
    return {"ids": ids[:, 1:].contiguous(), "length": length, "tokens": tokens, "entropy": entropy}


def documents(tokenizer, folder):
    """Yield (text, ids) without end. `folder` keeps the batches: a stopped command goes on."""
    lm = backbone.load(tokenizer.name_or_path, torch.device("cpu"), torch.float32)
    bos = backbone.bos_id(tokenizer)
    start = tokenizer.eos_token_id if bos is None else bos
    T = min(512, lm.config.max_position_embeddings)
    folder.mkdir(exist_ok=True)
    for number in count():
        file = folder / f"{number:04d}.safetensors"
        if not file.exists():
            batch = sample_batch(lm.model, start, tokenizer.eos_token_id, T, number)
            with atomic(file) as temporary:
                save_file(batch, temporary)
        batch = load_file(file)
        for ids, length in zip(batch["ids"].tolist(), batch["length"].tolist()):
            yield tokenizer.decode(ids[:length]), ids[:length]


def entropy(folder):
    """[nats a token, standard error over texts] of the sampled batches."""
    batches = [load_file(file) for file in sorted(folder.iterdir())]
    nats = torch.cat([batch["entropy"] for batch in batches])
    tokens = torch.cat([batch["tokens"] for batch in batches])
    mean = nats.sum() / tokens.sum()
    error = (nats - mean * tokens).norm() / tokens.sum()
    return [mean.item(), error.item()]
