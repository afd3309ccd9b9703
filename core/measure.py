"""measure.py: what a bridge is worth, measured through the retained blocks, and what it costs, counted before it runs.

    table, ce = measure(lm, net, rows, layer, nfes, cfg)      # FVU, KL, CE gap at each number of calls
    flops = train_flops(net, replaced, layer, T)              # of a training token
    micro, recompute = most_that_fits(cfg, ...)               # of sizes(cfg, ...), which report_size prints

NFE: calls of the network a sample takes. FVU, fraction of variance unexplained: E|z_hat - z|^2 / E|z|^2. KL: of the
hybrid's next-token law from the intact model's. CE gap: what its next-token loss loses over theirs, in nats.

Letters: N sequences, B batch, T tokens, D hidden width, V vocabulary, l the replaced layer, z the standardised h[l].
"""
import collections
import dataclasses

import torch

from core import backbone
from core.common import UserError
from core.denoiser import produce
from core.diffusion import position_noise, sample
from core.metrics import LOGITS, against
from core.report import table

NOISE_ROWS = 64  # sequences on which the spread over sampler noises is measured


@torch.no_grad()
def measure(lm, net, rows, layer, nfes, cfg):
    """(numbers at each NFE, CE of the intact model) on held-out rows (N, T+1), positions >= cfg.skip, at sampler noise
    0: fvu, kl(original || hybrid), ce_gap, agree (top-1), fvu_sinks (the positions left out). *_rows: per sequence;
    *_se: standard error over them; *_noise_sd: spread over cfg.noise_seeds noises on the first NOISE_ROWS sequences."""
    T, skip, found = rows.shape[1] - 1, cfg.skip, collections.defaultdict(list)        # (nfe, noise, what) -> (b,) each
    noises = [position_noise(s, range(T), net.settings["D"], rows.device) for s in range(cfg.noise_seeds)]
    batch = max(1, min(8, LOGITS // (T * lm.V)))
    for first, ids in zip(range(0, len(rows), batch), rows.split(batch)):
        token = ids[:, 1:, None]
        h0 = lm.embed(ids[:, :-1])
        side = lm.side(h0)
        hl = produce(lm, h0, layer, side)
        z, c = net.standard_z(hl), net.standard_c(h0, ids[:, :-1])
        intact = lm.head(lm.through(hl, layer, lm.L, side))                            # (b, T, V)
        ce, gaps = against(intact, token)                                              # (b, T)
        found["ce"].append(ce[:, skip:].mean(1).cpu())
        found["energy"].append(torch.stack([z[:, skip:].square().sum((1, 2)), z[:, :skip].square().sum((1, 2))]).cpu())
        for n in nfes:
            for s, noise in enumerate(noises if first < NOISE_ROWS else noises[:1]):
                z_hat = sample(net, c, n, noise, sampler=cfg.sampler, shift=cfg.shift)
                upper = lm.through(net.hidden(z_hat).to(hl.dtype), layer, lm.L, side)
                logits = lm.head(upper)                                                # (b, T, V)
                kl, gap = gaps(logits)                                                 # (b, T) each
                error = (z_hat - z).square().sum(-1)                                   # (b, T)
                for what, value in (
                        ("error", error[:, skip:].sum(1)), ("sinks", error[:, :skip].sum(1)),
                        ("kl", kl[:, skip:].mean(1)), ("ce_gap", gap[:, skip:].mean(1)),
                        ("agree", (logits.argmax(-1) == intact.argmax(-1))[:, skip:].float().mean(1))):
                    found[n, s, what].append(value.double().cpu())
    energy, sinks = torch.cat(found["energy"], 1).double()                             # (N,) each
    out, few = {}, min(len(rows), NOISE_ROWS)
    for n in nfes:
        row = {what: torch.cat(found[n, 0, what]) for what in ("error", "sinks", "kl", "ce_gap", "agree")}    # (N,)
        gaps = [torch.cat(found[n, s, "ce_gap"])[:few].mean().item() for s in range(cfg.noise_seeds)]
        out[str(n)] = {
            "fvu": (row["error"].sum() / energy.sum()).item(), "kl": row["kl"].mean().item(),
            "ce_gap": row["ce_gap"].mean().item(), "agree": row["agree"].mean().item(),
            "fvu_sinks": (row["sinks"].sum() / sinks.sum().clamp_min(1e-12)).item(),
            "ce_gap_se": (row["ce_gap"].std() / len(rows) ** 0.5).item() if len(rows) > 1 else 0.0,
            "ce_gap_noise_sd": torch.tensor(gaps).std().item() if len(gaps) > 1 else 0.0,
            "kl_rows": row["kl"].tolist(), "ce_gap_rows": row["ce_gap"].tolist()}
    return out, torch.cat(found["ce"]).mean().item()


# ----------------------------------------------------------------------------------------------------- the report
def summary(result):
    if not result["nfe"]:
        return f"{result['tokens_per_s']:,.0f} tokens/s at random weights"
    n = str(result["nfe_default"]) if str(result["nfe_default"]) in result["nfe"] else "1"
    return (f"layer {result['layer']}, {result['objective']}, NFE {n}: FVU {result['nfe'][n]['fvu']:.4f}, KL "
            f"{result['nfe'][n]['kl']:.4f}, CE gap {result['nfe'][n]['ce_gap']:+.4f} nats, {result['parameters']:,} "
            "parameters")


def section(result):
    """This run's part of the report."""
    size = f", {result['size_ratio']:.2f}x the {result['replaced_parameters']:,} it replaces" if result["layer"] else ""
    size += f"; head start: {result['head_start']}" + (
        f", a table of {result['table']:,} numbers" if result.get("table") else "")
    raw = {f"{n}, last weights, {NOISE_ROWS} texts": r for n, r in result["raw_nfe"].items()}  # else: running mean
    rows = [[n, f"{r['fvu']:.4f}", f"{r['kl']:.4f}", f"{r['ce_gap']:+.4f} +- {r['ce_gap_se']:.4f}",
             f"{r['ce_gap_noise_sd']:.5f}", f"{r['agree']:.1%}"] for n, r in {**result["nfe"], **raw}.items()]
    return "\n".join([
        f"## REPLACE: {result['objective']} at layer {result['layer']}", "",
        f"{result['parameters']:,} parameters{size}; tokens known: {result['visible']}; {result['steps']} steps, "
        f"{result['tokens']:,} tokens, {result['seconds']:.0f} s, seed {result['seed']}; sampler {result['sampler']}; "
        f"{result['eval_sequences']} held-out sequences.", "",
        table(["NFE", "FVU", "KL", "CE gap +- se", "sd over noises", "same first choice"], rows), ""])


def numbers(lm, net, raw, rows, layer, cfg):
    """What is measured of a trained bridge. `net` has the running mean of its weights, `raw` the last ones or None."""
    nfes = sorted({*map(int, cfg.nfes.split(",")), cfg.nfe}) if cfg.objective == "diffusion" else [1]
    of_mean, ce = measure(lm, net, rows, layer, nfes, cfg)
    few, n = dataclasses.replace(cfg, noise_seeds=1), str(cfg.nfe if cfg.objective == "diffusion" else 1)
    of_raw = measure(lm, raw, rows[:NOISE_ROWS], layer, nfes, few)[0] if raw is not None else {}
    return {"nfe": of_mean, "raw_nfe": of_raw, "ce_intact": ce, "eval_sequences": len(rows), "nfe_default": cfg.nfe,
            "noise_seeds": cfg.noise_seeds, "sampler": cfg.sampler, "shift": cfg.shift,
            "headline": [[f"what the hybrid at layer {layer} loses, {cfg.objective}",
                          f"{of_mean[n]['ce_gap']:+.4f} nats, KL {of_mean[n]['kl']:.4f}"]]}


# ------------------------------------------------------------------------------------------------- what it costs
def train_flops(net, replaced, layer, T):
    """FLOPs a training token: forward and backward of the bridge (6 a parameter), forward only of the `layer` blocks of
    the frozen prefix (2 a parameter), and causal attention (6 and 2 per attended key and channel)."""
    own = sum(p.numel() for n, p in net.named_parameters() if p.ndim == 2 and not n.startswith(("time", "readout")))
    blocks, W, D = net.settings["blocks"], net.settings["W"], net.settings["D"]
    passes = 8 if net.settings["self_condition"] else 6                      # one more forward for the first estimate
    readout = 4 * D * net.settings["V"] if net.generates else 0                 # its input needs no gradient
    return passes * (own + blocks * W * T) + readout + 2 * (replaced + layer * D * T)


def sizes(cfg, net, shape, layer, world, micro, dtype, recompute):
    """What a training takes: parameters by group, GB on one GPU by component and at each phase's peak, FLOPs a token.
    Bytes per width, token and block that wait for backward, by traces at 8B shape (tests/fake_scenes.py): 38 compiled,
    62 not, 100 in fp32; recomputed 4, and one block in full. Beside them 41 at the ends, and a bf16 copy of weights."""
    from transformers import AutoModelForCausalLM
    with torch.device("meta"):
        lm = backbone.Backbone(AutoModelForCausalLM.from_config(shape))
    count = {name: sum(p.numel() for p in module.parameters()) for name, module in net.named_children()}
    size, replaced = sum(count.values()), sum(p.numel() for b in lm.blocks[:layer] for p in b.parameters())
    whole = sum(p.numel() for p in lm.parameters())
    upper = sum(p.numel() for b in lm.blocks[layer:] for p in b.parameters())
    flops = train_flops(net, *(0, 0) if cfg.cache_states else (replaced, layer), cfg.seq_len)
    matrices = [p.numel() for p in net.blocks.parameters() if p.ndim == 2 and cfg.lr > 0]
    W, D, blocks = (net.settings[k] for k in ("W", "D", "blocks"))
    each = 100 if dtype == torch.float32 else 38 if cfg.compile else 62
    saved = W * (4 * blocks + each if recompute else each * blocks) + 41 * D
    saved += 8 * net.settings["V"] * net.generates                                  # the readout's logits
    copy = 4 * (size + sum(b.numel() for b in net.buffers()))
    held = {"frozen prefix": dtype.itemsize * (whole - upper), "weights": copy, "EMA": copy,
            "optimizer": 4 * sum(matrices) + 8 * (size - sum(matrices))}
    gigabytes = {**held, "gradients": 4 * size, "activations": micro * cfg.seq_len * saved + (
        2 * size * (dtype == torch.bfloat16 and not recompute))}
    muon = 10 * max(matrices, default=0) * -(-blocks // world.size) + dtype.itemsize * sum(matrices) / world.size
    del held["frozen prefix"]
    peaks = {"train": sum(gigabytes.values()), "optimizer": sum(gigabytes.values()) - gigabytes["activations"] + muon,
             "final numbers": sum(held.values()) + dtype.itemsize * whole  # rank 0: the whole backbone, five logits
             + 5 * 4 * max(LOGITS, cfg.seq_len * shape.vocab_size)}
    peaks = {phase: n / 1e9 for phase, n in peaks.items()}
    return {"count": count, "parameters": size, "replaced": replaced, "flops_per_token": flops, "peaks": peaks,
            "gigabytes": max(peaks.values()), "parts": {name: n / 1e9 for name, n in gigabytes.items()}}


def most_that_fits(cfg, net, shape, layer, world, share, dtype):
    """(sequences a pass, whether to recompute) of --micro_batch 0: the most of this process's `share` that train within
    nine tenths of the GPU, 80 GB where there is none; recomputed, a third more compute, only if not even one fits."""
    gpu = world.device.type == "cuda" and torch.cuda.get_device_properties(world.device).total_memory
    limit = 0.9e-9 * (gpu or 80e9)
    for recompute in sorted({cfg.recompute, True}):
        for micro in [m for m in range(share, 0, -1) if share % m == 0]:
            most = sizes(cfg, net, shape, layer, world, micro, dtype, recompute)["peaks"]["train"]
            if most < limit or cfg.dry_run and recompute and micro == 1:           # which says that it does not fit
                return micro, recompute
    raise UserError(f"a bridge at layer {layer} needs {most:.0f} GB to train even with --recompute, one sequence a "
                    f"pass: more than {limit:.0f}; choose a lower --layer, fewer --blocks or a smaller --width")


def report_size(cfg, net, shape, layer, world, micro, dtype, recompute):
    """--dry_run: print what is foretold, and the speed at 50% MFU on an H100."""
    found = sizes(cfg, net, shape, layer, world, micro, dtype, recompute)
    size, flops, most = found["parameters"], found["flops_per_token"], found["gigabytes"]
    print("\n".join(f"  {k} = {v}" for k, v in dataclasses.asdict(cfg).items()))
    print(f"bridge at layer {layer} of {shape.num_hidden_layers}: {size:,} parameters, "
          f"{size / max(1, found['replaced']):.2f}x the blocks it replaces: "
          + ", ".join(f"{name} {n:,}" for name, n in found["count"].items()))
    print(f"GB on one GPU at {micro} sequences a pass{', recomputed' * recompute}: "
          + ", ".join(f"{name} {n:.2f}" for name, n in found["parts"].items()) + "; at most "
          + ", ".join(f"{name} {n:.1f}" for name, n in found["peaks"].items())
          + f", which {'fits' if most < 80 else 'does NOT fit'} 80 GB")
    print(f"{flops:.3e} FLOPs a token: {0.5 * 989e12 / flops:,.0f} tokens/s a GPU at 50% of 989 TFLOP/s")
    return found
