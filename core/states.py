"""states.py: the hidden states of all layers in one forward pass, and what is measured of such a cloud of points.

    states = collect(lm, windows, skip=4, pool=16384, seed=0, batch_size=16)       # never all states, never on disk
    X, S = states.space(c, dim=False)                # pool (P, D) and covariance (D, D) of layer c + 1
    near, distance = neighbours(torch.cdist(X[anchors], X), k=32)

Letters: B batch, T tokens, S sequences, D hidden width, L blocks, N tokens kept, P pool, A anchors, R resamples,
C = L - 1 candidate layers.
"""
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from core.common import UserError
from core.draws import generator


@dataclass
class States:
    """What is kept of the hidden states of layers 1..L-1: never all of them, never on disk."""
    mean: torch.Tensor          # (C, D)
    cov: torch.Tensor           # (C, D, D), ddof 0, of all N tokens
    pool: torch.Tensor          # (C, P, D), centred; the same P tokens at every layer
    sequence: torch.Tensor      # (P,) which sequence a pool token came from
    token: torch.Tensor         # (P,) its id
    norm: torch.Tensor          # (C,) mean |h[l]|
    moved: torch.Tensor         # (C,) mean |h[l] - h[0]|

    def space(self, c, dim):
        """Pool (P, D) and covariance (D, D) of candidate c; with `dim` each dimension over its standard deviation: what
        the bridge diffuses, with the bridge's floor under a dimension that hardly varies."""
        X, S = self.pool[c].float(), self.cov[c]
        if not dim:
            return X, S
        variance = S.diagonal().clamp_min(0)
        sigma = variance.sqrt().clamp_min(1e-4 * variance.mean().sqrt() + 1e-8)                             # (D,)
        return X / sigma, S / sigma[:, None] / sigma


@torch.no_grad()
def collect(lm, windows, skip, pool, seed, batch_size, view=None, layers=None):
    """One forward pass for all layers at once, or for `layers`. windows (S, T) int64 -> States; with a `view` those of
    view(l, h[l], h[0]) instead of h[l].

    Second moments are taken about the first batch's mean: a state's mean can be large beside its spread."""
    layers = layers or range(1, lm.L)
    C, D, per_row = len(layers), lm.D, windows.shape[1] - skip
    device = lm.model.device
    pick = torch.from_numpy(np.sort(generator(seed, "pool").choice(len(windows) * per_row, pool, replace=False)))
    shift, total = torch.zeros(C, D, device=device), torch.zeros(C, D, device=device)
    second = torch.zeros(C, D, D, device=device)
    kept = torch.empty(C, pool, D, dtype=next(lm.parameters()).dtype, device=device)
    norm, moved, seen, filled = torch.zeros(C), torch.zeros(C), 0, 0
    for ids in tqdm(windows.split(batch_size), desc="hidden states", unit="batch", leave=False, disable=None):
        n = len(ids) * per_row
        here = pick[(pick >= seen) & (pick < seen + n)] - seen               # pool members in this batch
        for c, (layer, h, h0, _) in enumerate(lm.at(ids.to(device), layers)):              # h[l], h[0] (B, T, D)
            # The first positions are attention sinks: a few states of huge norm, which would by themselves be the first
            # eigenvalue of the covariance and the scale of the layer.
            seen_as = h if view is None else view(layer, h, h0)
            X = seen_as[:, skip:].flatten(0, 1)                              # (B (T - skip), D)
            kept[c, filled:filled + len(here)] = X[here]
            X = X.float()
            norm[c] += X.norm(dim=-1).sum().cpu()
            moved[c] += (X - h0[:, skip:].flatten(0, 1)).norm(dim=-1).sum().cpu()
            if seen == 0:
                shift[c] = X.mean(0)
            X = X - shift[c]
            total[c] += X.sum(0)
            second[c].addmm_(X.T, X)
        seen, filled = seen + n, filled + len(here)
    if not torch.isfinite(second).all():
        bad = layers[int((~torch.isfinite(second).flatten(1).all(1)).nonzero()[0])]
        raise UserError(f"the hidden states of layer {bad} are not finite; try --dtype fp32, or another model")
    total /= seen                                                            # mean about the shift
    second /= seen
    for c in range(C):                                                       # in place: second moment -> covariance
        second[c].addr_(total[c], total[c], alpha=-1)
    mean = shift + total
    kept -= mean[:, None].to(kept.dtype)
    token = windows[:, skip:].flatten()[pick]
    return States(mean, second, kept, (pick // per_row).to(device), token.to(device), norm / seen, moved / seen)


def cost(shape, cfg, itemsize):
    """(bytes beside the weights, forward FLOPs a token) of a model with config `shape`. Bytes: what `collect` keeps and
    the larger of one forward pass and one layer's analysis."""
    L, D, P, A, T = shape.num_hidden_layers, shape.hidden_size, cfg.pool, cfg.anchors, cfg.seq_len * cfg.batch_size
    ffn = getattr(shape, "intermediate_size", None) or 4 * D
    kept = (L - 1) * (4 * D * D + 8 * D + itemsize * P * D)
    forward = T * (5 * D + 3 * ffn) * itemsize + 12 * T * D                 # residual, attention, MLP; fp32 copies of h
    spectra = 4 * (2 * min(D, P) ** 2 + 2 * P * D if cfg.exact_resamples else 3 * P * min(D, P) + P * D)
    analysis = 4 * (2 * P * D + A * (2 * P + D) + 3 * 64 * cfg.k * D) + A * P + max(spectra, 12 * D * D)
    return kept + max(forward, analysis), 2 * L * (4 * D * D + 3 * D * ffn)


def resampled_spectra(X, sequence, weights, exact=False):
    """Spectra (R, D) of the pool X (P, D) when whole sequences are drawn with replacement: weights (R, S) counts.

    Tokens of one sequence are dependent, so sequences are the units. One eigendecomposition serves all replicates: the
    eigenvalue i of a replicate's covariance S_r is u_i^T S_r u_i to first order in S_r - S, the variance of the states
    along the pool's own eigenvector u_i, and so a weighted sum of what each sequence adds to it. `exact`: one
    decomposition a replicate; with D > P that of the P x P Gram matrix, which has the same nonzero eigenvalues."""
    (P, D), (R, S) = X.shape, weights.shape
    count = weights @ torch.bincount(sequence, minlength=S).to(X)                            # (R,)

    def mean(Y):                                                             # (P, n) -> its mean in each replicate
        return weights @ Y.new_zeros(S, Y.shape[1]).index_add_(0, sequence, Y) / count[:, None]              # (R, n)
    if not exact:
        e, U = torch.linalg.eigh(X @ X.T if D > P else X.T @ X)
        Y = U * e.clamp_min(0).sqrt() if D > P else X @ U                    # (P, min(D, P)) along the eigenvectors
        spectra = (mean(Y.square()) - mean(Y).square()).clamp_min(0).sort(descending=True).values
        return torch.nn.functional.pad(spectra, (0, D - spectra.shape[1]))
    middle, spectra = mean(X), X.new_zeros(R, D)                             # (R, D) each
    for r in range(R):
        rows = weights[r, sequence].sqrt()[:, None] * (X - middle[r])        # (P, D)
        spectra[r, :min(D, P)] = eigenvalues((rows @ rows.T if D > P else rows.T @ rows) / count[r])
    return spectra


def eigenvalues(S):
    """Covariance (..., D, D) -> its eigenvalues (..., D), largest first, clamped at zero."""
    return torch.linalg.eigvalsh(S).flip(-1).clamp_min(0)


def neighbours(distance, k, thin=1, avoid=None):
    """Each anchor's k nearest in the pool: indices and distances, nearest first, both (A, k). distance (A, P), infinite
    from an anchor to itself.

    With `thin` only every so many-th member of the pool may be a neighbour: a sparser pool reaches further. Those that
    `avoid` (A, P) marks come after all others: only an anchor with fewer than k others meets them."""
    ranked = distance if avoid is None else torch.add(distance, avoid, alpha=1e30)           # (A, P)
    near = ranked[:, ::thin].topk(k, largest=False).indices * thin                           # (A, k)
    return near, distance.gather(1, near)


def local_spread(X, near):
    """lambda_max of the covariance (ddof 0) of each anchor's neighbours. X (P, D), near (A, k) -> (A,).

    The k x k Gram matrix of the centred neighbours has the same nonzero eigenvalues as their D x D covariance."""
    spread = []
    for some in near.split(64):                                              # 64 k D numbers at a time
        Y = X[some]                                                          # (64, k, D)
        Y = Y - Y.mean(1, keepdim=True)
        spread.append(eigenvalues(Y @ Y.mT / Y.shape[1])[:, 0])              # (64,)
    return torch.cat(spread)
