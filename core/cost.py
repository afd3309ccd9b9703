"""cost.py: what a token costs, in time, blocks run and memory: the intact model, the hybrid, the masked twin.

    rows = cost(hybrid, intact, student, repeats=2, new=64)
    lines = section(rows, "cost.png")                          # Markdown; draws the figure
"""
import torch

from core import masked, report
from core.metrics import PeakBytes, seconds_of


def cost(model, intact, student, repeats, new):
    """Latency of cached greedy generation of `new` tokens after as many, batch 1: the intact model, the hybrid by NFE,
    the masked model by steps (no cache). `blocks` is the ratio of transformer blocks run a token: a toy's time is in
    the calls, not in the arithmetic. Memory is that of the weights a model needs and, at the peak, of the tensors it
    makes."""
    base = intact.model
    ids = torch.randint(1, intact.V, (1, new), generator=torch.Generator().manual_seed(0), device=base.device)
    how = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0,
               attention_mask=torch.ones_like(ids))
    rows = []

    def measure(what, call, blocks, weights, modules, **more):
        ms = 1e3 * seconds_of(repeats, call) / more.pop("tokens", new)
        with PeakBytes([t for m in modules for t in (*m.parameters(), *m.buffers())]) as peak:
            call()
        ratio = ms / rows[0]["ms"] if rows else 1.0
        rows.append({"what": what, "ms": ms, "tokens_per_s": 1e3 / ms, "ratio": ratio,
                     "blocks": blocks, "weights_mb": weights / 1e6, "peak_mb": (weights + peak.most) / 1e6, **more})
    whole = sum(p.numel() * p.element_size() for p in base.parameters())
    measure("intact model", lambda: base.generate(ids, **how), 1.0, whole, [base])

    layer, default, deep = model.config.layer, model.config.nfe, model.net.settings["blocks"]
    kept = sum(p.numel() * p.element_size() for p in (*model.lm.model.parameters(), *model.net.parameters()))
    for nfe in (1, 4, 16):
        model.set_nfe(nfe)
        measure(f"hybrid at layer {layer}, NFE {nfe}", lambda: model.generate(ids, **how),
                (nfe * deep + intact.L - layer) / intact.L, kept, [model, model.lm], layer=layer, nfe=nfe)
    model.set_nfe(default)
    wide = 4 * new                                                                  # no cache: all tokens in each step
    text = torch.cat([ids, ids.new_full((1, wide), student.mask_id)], 1) if student else None
    for steps in (new // 4, new) if student else ():
        measure(f"masked twin, {wide} tokens in {steps} steps",
                lambda steps=steps: masked.fill(student, text, text == student.mask_id, steps),
                steps / wide, whole, [student], steps=steps, tokens=wide)
    return rows


def section(cost, path):
    """Latency of each model beside what the number of blocks foretells, and its figure."""
    hybrids = [r for r in cost if r["what"].startswith("hybrid")]           # an older result has others with calls
    near = sum(abs(r["ratio"] / r["blocks"] - 1) <= 0.25 for r in hybrids)
    still = [r["nfe"] for r in hybrids if r["ratio"] <= 1]
    with report.figure(path, width=4) as axes:
        ax = axes[0, 0]
        for name, style, label in (("ratio", "o-", "measured"), ("blocks", "--", "by blocks run")):
            ax.plot([r["nfe"] for r in hybrids], [r[name] for r in hybrids], style, color=report.BLUE, label=label)
        ax.axhline(1, color=report.RED, linewidth=1)
        ax.set(xlabel="network calls (NFE)", ylabel="time a token over the intact model", ylim=(0, None))
    return ["## Cost", "", "Cached greedy generation, batch 1 (the twin: all tokens at once, no cache); ratios to the "
            "intact model's stock generate(). Peak: weights and the tensors made on the way.", "",
            report.table(["model", "ms a token", "tokens/s", "ratio", "blocks ratio", "weights (MB)", "peak (MB)"],
                         [[r["what"], f"{r['ms']:.2f}", f"{r['tokens_per_s']:.0f}", f"{r['ratio']:.2f}",
                           f"{r['blocks']:.2f}", f"{r['weights_mb']:.1f}", f"{r['peak_mb']:.1f}"] for r in cost]), "",
            f"Break-even: {f'NFE {max(still)}' if still else 'none'}. Of {len(hybrids)} numbers of calls, {near} "
            "are within 25% of the ratio of blocks run.", "",
            "![latency by NFE](cost.png)", ""]
