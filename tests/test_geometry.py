"""Every proxy against a closed form: Gaussians of known covariance, a subspace, a lattice, the scaling laws."""
import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import fails, tiny_model

import geometry
from core import backbone
from core.metrics import PeakBytes

EPS = torch.tensor(1e-3)


def gaussian(scales, n=20000, seed=0):
    """n draws of N(0, diag(scales^2)), float32."""
    x = np.random.default_rng(seed).standard_normal((n, len(scales)))
    return torch.from_numpy(x * np.asarray(scales)).float()


def spectrum(X):
    X = X - X.mean(0)
    return geometry.eigenvalues(X.T @ X / len(X))


def test_stiffness_of_a_known_covariance():
    e = torch.tensor([4.0, 1.0, 0.25])
    assert geometry.stiffness(e, EPS).item() == pytest.approx(1 / 4.001)
    assert geometry.stiffness(e, EPS, "mean").item() == pytest.approx((1 / 4.001 + 1 / 1.001 + 1 / 0.251) / 3)
    sampled = geometry.stiffness(spectrum(gaussian([2, 1, 0.5])), EPS).item()
    assert sampled == pytest.approx(1 / 4.001, rel=0.03)
    S = torch.diag(torch.tensor([4.0, 1.0, 0.25]))  # it is lambda_min of the regularised precision, as its name says
    smallest = torch.linalg.eigvalsh(torch.linalg.inv(S + EPS * torch.eye(3)))[0].item()
    assert geometry.stiffness(geometry.eigenvalues(S), EPS).item() == pytest.approx(smallest, rel=1e-5)


def test_effective_rank_of_subspaces():
    assert geometry.effective_rank(torch.ones(16)).item() == pytest.approx(16, rel=1e-5)
    flat = torch.cat([torch.ones(5), torch.zeros(11)])
    for kind in ("entropy", "participation"):
        assert geometry.effective_rank(flat, kind).item() == pytest.approx(5, rel=1e-5)
    X = gaussian([1] * 5) @ torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))[0][:5]
    assert geometry.effective_rank(spectrum(X)).item() == pytest.approx(5, rel=0.01)
    two = torch.tensor([3.0, 1.0])                      # entropy of (3/4, 1/4); (3+1)^2 / (9+1)
    assert geometry.effective_rank(two).item() == pytest.approx(math.exp(-0.75 * math.log(.75) - .25 * math.log(.25)))
    assert geometry.effective_rank(two, "participation").item() == pytest.approx(1.6)


@pytest.mark.parametrize("m", [2, 5])
def test_curvature_of_a_lattice(m):
    """On a line of spacing s the 2m neighbours lie at +-s..+-ms: variance s^2 (m+1)(2m+1)/6."""
    s, direction = 0.5, torch.tensor([0.6, 0.8, 0.0])
    X = torch.arange(200)[:, None] * s * direction
    anchors = torch.arange(50, 150, 10)
    near = geometry.neighbours(X, anchors, 2 * m)
    spread = geometry.local_spread(X, near)
    want = s ** 2 * (m + 1) * (2 * m + 1) / 6
    assert torch.allclose(spread, torch.full_like(spread, want), rtol=1e-4)
    value = geometry.curvature(spread, torch.tensor(1.0), EPS).item()
    assert value == pytest.approx(1 / (want + 1e-3), rel=1e-4)
    thin = geometry.local_spread(X, geometry.neighbours(X, anchors, 2 * m, thin=2))
    assert torch.allclose(thin, 4 * spread, rtol=1e-4)  # a pool half as dense reaches twice as far


def test_neighbours_are_the_nearest_and_never_the_anchor():
    X, anchors = gaussian([1, 2, 3], n=300), torch.tensor([3, 77, 299])
    near = geometry.neighbours(X, anchors, 10)
    for a, row in zip(anchors.tolist(), near.tolist()):
        order = (X - X[a]).norm(dim=1).argsort().tolist()
        assert a not in row and set(row) == set(order[1:11])


def test_local_spread_equals_the_covariance_route():
    X = gaussian(np.linspace(2, 0.1, 24), n=500)
    near = geometry.neighbours(X, torch.arange(40), 12)
    want = [torch.linalg.eigvalsh(torch.cov(X[row].T, correction=0))[-1] for row in near]
    assert torch.allclose(geometry.local_spread(X, near), torch.stack(want), rtol=1e-4)


def test_scaling_laws():
    """States times a: raw curvature and stiffness fall by a^2, everything under rms and the rank stay as they are."""
    a, X = 7.0, gaussian(np.linspace(3, 0.2, 8), n=1000)
    anchors = torch.arange(64)

    def of(X, how):
        return geometry.proxies(spectrum(X), geometry.local_spread(X, geometry.neighbours(X, anchors, 8)), how)
    assert torch.allclose(of(a * X, "rms"), of(X, "rms"), rtol=1e-3)
    assert torch.allclose(of(a * X, "raw"), of(X, "raw") / torch.tensor([a * a, a * a, 1.0]), rtol=1e-3)


def test_score_is_the_signed_sum_of_z():
    x = torch.tensor([[1.0, 5, 3], [2, 5, 1], [3, 5, 2]])  # stiffness constant: it drops out
    root = 1.5 ** 0.5
    assert torch.allclose(geometry.score(x), torch.tensor([-root - root, 0 + root, root - 0]), atol=1e-5)
    assert torch.allclose(geometry.score(x, only=0), torch.tensor([-root, 0, root]), atol=1e-5)
    assert torch.allclose(geometry.score(x.exp(), "log"), geometry.score(x), atol=1e-5)


def test_spearman_with_ties():
    assert geometry.spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert geometry.spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert geometry.spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(3 / 10 ** 0.5)   # ranks 0, 1.5, 1.5, 3
    assert geometry.spearman([1, 1, 1], [1, 2, 3]) == 0


@pytest.mark.parametrize("D", [6, 200])
def test_resampled_spectra(D):
    """Weights of one give the plain spectrum, a weight of two the sequence written twice. D > P goes by Gram matrix."""
    X = gaussian(np.linspace(2, 0.1, D), n=120) + 3.0
    sequence = torch.arange(120) // 30
    weights = torch.tensor([[1.0, 1, 1, 1], [2, 0, 1, 1]])
    got = geometry.resampled_spectra(X, sequence, weights)
    twice = torch.cat([X[:30], X[:30], X[60:]])
    for row, want in zip(got, (spectrum(X), spectrum(twice))):
        assert torch.allclose(row, want, atol=2e-3 * want[0].item())


def test_collect_gives_exact_moments():
    """Against all states at once in float64: mean, covariance, norms; the pool is a subset of them, centred."""
    lm = backbone.Backbone(tiny_model("qwen3").requires_grad_(False))
    windows = torch.randint(3, 64, (10, 20), generator=torch.Generator().manual_seed(1))
    states = geometry.collect(lm, windows, skip=4, pool=60, seed=0, batch_size=3)
    h = h0 = lm.embed(windows)
    for c in range(3):
        h = lm.through(h, c, c + 1)
        X = h[:, 4:].flatten(0, 1).double()
        assert torch.allclose(states.mean[c].double(), X.mean(0), atol=1e-4)
        assert torch.allclose(states.cov[c].double(), torch.cov(X.T, correction=0), atol=1e-3)
        assert states.norm[c].item() == pytest.approx(X.norm(dim=-1).mean().item(), rel=1e-5)
        moved = (X - h0[:, 4:].flatten(0, 1)).norm(dim=-1).mean().item()
        assert states.moved[c].item() == pytest.approx(moved, rel=1e-5)
        nearest = torch.cdist(states.pool[c].double() + states.mean[c].double(), X).min(1).values
        assert nearest.max() < 1e-3
    assert states.sequence.min() == 0 and states.sequence.max() == 9


def test_memory_formula_against_a_measurement():
    """Peak bytes of live tensors while collecting and analysing, by watching every allocation of a small case."""
    lm = backbone.Backbone(tiny_model("llama", hidden_size=64, intermediate_size=128).requires_grad_(False))
    cfg = geometry.Config(tokens=4096, seq_len=32, batch_size=32, skip=4, pool=2048, anchors=256, k=16, resamples=20)
    windows = torch.randint(3, 64, (147, 32), generator=torch.Generator().manual_seed(1))
    with PeakBytes() as peak:
        geometry.analyse(geometry.collect(lm, windows, 4, cfg.pool, 0, cfg.batch_size), cfg)
    estimate = geometry.memory_bytes(4, 64, 128, cfg, itemsize=4)
    assert 0.6 * estimate < peak.most < 1.1 * estimate, (peak.most, estimate)


def test_memory_at_llama_8b_shape(tmp_path, capsys):
    from transformers import LlamaConfig
    LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                num_key_value_heads=8, vocab_size=128256).save_pretrained(tmp_path / "8b")
    argv = f"--preset 8b --dtype bf16 --dry_run --random_init --model {tmp_path}/8b --out {tmp_path}/g".split()
    assert geometry.main(argv) <= 6.0                            # GB beside the weights, 32k tokens
    assert "32 blocks of width 4096" in capsys.readouterr().out and not (tmp_path / "g").exists()


def test_result_of_a_run(runs):
    result = json.loads((runs / "geometry" / "result.json").read_text())
    rows = result["layers"]
    assert [r["layer"] for r in rows] == [1, 2, 3]                # L = 4: candidates 1..L-1
    assert result["best_layer"] == 1 + int(np.argmax([r["score"] for r in rows]))
    ranked = sorted((r["score"] for r in rows), reverse=True)
    assert result["margin"] == pytest.approx(ranked[0] - ranked[1], abs=1e-5)
    assert all(r["score_low"] <= r["score"] <= r["score_high"] for r in rows)
    assert sum(r["chosen"] for r in rows) == pytest.approx(1)
    names = {v["name"] for v in result["variants"]}
    assert {"normalize raw", "transform log", "rank participation", "curvature only", "k 4", "k 16", "pool / 2",
            "stiffness mean, eps 0.1"} <= names
    assert {t["name"] for t in result["trivial"]} == {"-layer", "-log mean norm", "-|h[l]-h[0]|"}
    assert (runs / "geometry" / "geometry.png").stat().st_size > 10_000


def test_the_same_seed_gives_the_same_scores(runs, tmp_path, text):
    again = geometry.main([*f"--preset tiny --model {runs}/toy --out {tmp_path}/g --data".split(), str(text)])
    first = json.loads((runs / "geometry" / "result.json").read_text())
    assert again["layers"] == first["layers"] and again["replicates"] == first["replicates"]


def test_refusals(runs, tmp_path, capsys, text):
    common = ["--preset", "tiny", "--data", text, "--model", runs / "toy", "--out", tmp_path / "g"]
    assert "tokens >= pool" in fails(capsys, geometry.main, *common, "--pool", "100000")
    assert "--skip" in fails(capsys, geometry.main, *common, "--skip", "32")
    assert "--eps" in fails(capsys, geometry.main, *common, "--eps", "0")
    assert "use more text" in fails(capsys, geometry.main, *common, *"--k 99999 --pool 999999 --tokens 999999".split())
    assert not (tmp_path / "g").exists()


def test_a_small_corpus_shrinks_the_pool(runs, tmp_path, text, capsys):
    (tmp_path / "some").mkdir()
    for name in ("ast.py", "bdb.py"):
        shutil.copy(text / name, tmp_path / "some")
    flags = f"--preset tiny --model {runs}/toy --out {tmp_path}/g --tokens 999999 --pool 500000 --data {tmp_path}/some"
    result = geometry.main(flags.split())
    assert result["pool"] == result["tokens"] < 500000 and "note: held-out" in capsys.readouterr().out
