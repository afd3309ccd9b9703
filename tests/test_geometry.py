"""Every proxy against a closed form: Gaussians of known covariance, a subspace, a lattice, the scaling laws."""
import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import fails, tiny_model

import geometry
from core import backbone, states
from core.metrics import PeakBytes
from core.run import read_section
from core.states import States

RAW = geometry.Config(normalize="raw")


def gaussian(scales, n=20000, seed=0):
    """n draws of N(0, diag(scales^2)), float32."""
    x = np.random.default_rng(seed).standard_normal((n, len(scales)))
    return torch.from_numpy(x * np.asarray(scales)).float()


def spectrum(X):
    X = X - X.mean(0)
    return geometry.eigenvalues(X.T @ X / len(X))


def proxy(name, e=None, spread=None, **flags):
    """One proxy of raw states (nothing is divided, eps = 1e-3 exactly) from what it looks at."""
    e, spread = (torch.ones(1) if x is None else x for x in (e, spread))
    cfg = dataclasses.replace(RAW, eps=1e-3 / e.mean().item(), **flags)
    return geometry.proxies(e, spread, spread[..., None], cfg)[list(geometry.PROXIES).index(name)].item()


def near_of(X, anchors, k, **how):
    distance = torch.cdist(X[anchors], X)
    distance[torch.arange(len(anchors)), anchors] = torch.inf
    return geometry.neighbours(distance, k, **how)


def test_stiffness_of_a_known_covariance():
    e = torch.tensor([4.0, 1.0, 0.25])
    assert proxy("stiffness", e) == pytest.approx(1 / 4.001)
    assert proxy("stiffness", e, stiffness="mean") == pytest.approx((1 / 4.001 + 1 / 1.001 + 1 / 0.251) / 3)
    assert proxy("stiffness", spectrum(gaussian([2, 1, 0.5]))) == pytest.approx(1 / 4.001, rel=0.03)
    S = torch.diag(e)  # it is lambda_min of the regularised precision, as its name says
    smallest = torch.linalg.eigvalsh(torch.linalg.inv(S + 1e-3 * torch.eye(3)))[0].item()
    assert proxy("stiffness", geometry.eigenvalues(S)) == pytest.approx(smallest, rel=1e-5)


def test_effective_rank_of_subspaces():
    assert proxy("effective_rank", torch.ones(16)) == pytest.approx(16, rel=1e-5)
    flat = torch.cat([torch.ones(5), torch.zeros(11)])
    for kind in ("entropy", "participation"):
        assert proxy("effective_rank", flat, rank=kind) == pytest.approx(5, rel=1e-5)
    X = gaussian([1] * 5) @ torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))[0][:5]
    assert proxy("effective_rank", spectrum(X)) == pytest.approx(5, rel=0.01)
    two = torch.tensor([3.0, 1.0])                      # entropy of (3/4, 1/4); (3+1)^2 / (9+1)
    assert proxy("effective_rank", two) == pytest.approx(math.exp(-0.75 * math.log(.75) - .25 * math.log(.25)))
    assert proxy("effective_rank", two, rank="participation") == pytest.approx(1.6)


@pytest.mark.parametrize("m", [2, 5])
def test_curvature_of_a_lattice(m):
    """On a line of spacing s the 2m neighbours lie at +-s..+-ms: variance s^2 (m+1)(2m+1)/6."""
    s, direction = 0.5, torch.tensor([0.6, 0.8, 0.0])
    X = torch.arange(200)[:, None] * s * direction
    anchors = torch.arange(50, 150, 10)
    near, distance = near_of(X, anchors, 2 * m)
    assert torch.allclose(distance, (torch.arange(2 * m) // 2 + 1.0) * s, atol=1e-3)   # s, s, 2s, 2s, ...
    spread = geometry.local_spread(X, near)
    want = s ** 2 * (m + 1) * (2 * m + 1) / 6
    assert torch.allclose(spread, torch.full_like(spread, want), rtol=1e-4)
    assert proxy("curvature", spread=spread) == pytest.approx(1 / (want + 1e-3), rel=1e-4)
    thin = geometry.local_spread(X, near_of(X, anchors, 2 * m, thin=2)[0])
    assert torch.allclose(thin, 4 * spread, rtol=1e-4)  # a pool half as dense reaches twice as far


def test_neighbours_are_the_nearest_and_never_the_anchor():
    X, anchors = gaussian([1, 2, 3], n=300), torch.tensor([3, 77, 299])
    token = torch.arange(300) % 7
    near, distance = near_of(X, anchors, 10)
    other, _ = near_of(X, anchors, 10, avoid=token[anchors][:, None] == token)
    for i, a in enumerate(anchors.tolist()):
        order = [j for j in (X - X[a]).norm(dim=1).argsort().tolist() if j != a]
        assert set(near[i].tolist()) == set(order[:10])
        assert torch.allclose(distance[i], (X[near[i]] - X[a]).norm(dim=1), atol=1e-3)
        assert set(other[i].tolist()) == set([j for j in order if token[j] != token[a]][:10])
    few, _ = near_of(X[:20], torch.tensor([3]), 5, avoid=torch.ones(1, 20, dtype=torch.bool))
    assert 3 not in few[0]                              # all of its own token: then these, and still not itself


def test_local_spread_equals_the_covariance_route():
    X = gaussian(np.linspace(2, 0.1, 24), n=500)
    near, _ = near_of(X, torch.arange(40), 12)
    want = [torch.linalg.eigvalsh(torch.cov(X[row].T, correction=0))[-1] for row in near]
    assert torch.allclose(geometry.local_spread(X, near), torch.stack(want), rtol=1e-4)


def test_scaling_laws():
    """States times a: raw curvature and stiffness fall by a^2, everything under rms and the rank stay as they are."""
    a, X = 7.0, gaussian(np.linspace(3, 0.2, 8), n=1000)
    anchors = torch.arange(64)

    def of(X, how):
        near, distance = near_of(X, anchors, 8)
        return geometry.proxies(spectrum(X), geometry.local_spread(X, near), distance, geometry.Config(normalize=how))
    assert torch.allclose(of(a * X, "rms"), of(X, "rms"), rtol=1e-3)
    assert torch.allclose(of(a * X, "raw"), of(X, "raw") / torch.tensor([a * a, a * a, 1.0]), rtol=1e-3)


def test_score_is_the_signed_sum_of_z():
    x = torch.tensor([[1.0, 5, 3], [2, 5, 1], [3, 5, 2]])  # stiffness constant: it drops out
    root, cfg = 1.5 ** 0.5, geometry.Config()
    one, log = geometry.Config(score_by="curvature"), geometry.Config(transform="log")
    assert torch.allclose(geometry.score(x, cfg), torch.tensor([-root - root, 0 + root, root - 0]), atol=1e-5)
    assert torch.allclose(geometry.score(x, one), torch.tensor([-root, 0, root]), atol=1e-5)
    assert torch.allclose(geometry.score(x.exp(), log), geometry.score(x, cfg), atol=1e-5)
    far = torch.ones(7, 3)
    far[2, 0] = 1e6                                     # z saturates: a layer that stands alone has sqrt(C - 1)
    assert geometry.terms(far, cfg)["curvature"][2].item() == pytest.approx(6 ** 0.5, rel=1e-5)


def test_spearman_with_ties():
    assert geometry.spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert geometry.spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert geometry.spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(3 / 10 ** 0.5)   # ranks 0, 1.5, 1.5, 3
    assert geometry.spearman([1, 1, 1], [1, 2, 3]) == 0


def states_of(clouds, tokens=None):
    """States whose pool holds all there is: clouds (C, P, D), four sequences."""
    X = clouds - clouds.mean(1, keepdim=True)
    P = X.shape[1]
    return States(clouds.mean(1), X.mT @ X / P, X, torch.arange(P) * 4 // P,
                           torch.arange(P) if tokens is None else tokens, X.norm(dim=-1).mean(1), torch.ones(len(X)))


SMALL = geometry.Config(pool=240, tokens=240, anchors=60, k=6, resamples=10)


def test_normalize_dim_is_what_the_bridge_diffuses():
    """Under `dim` the unit of each dimension is of no consequence, under `rms` it is; the spectrum is the correlation
    matrix', distances are taken anew, and the variant's row is the run with that flag."""
    clouds = torch.stack([gaussian(np.linspace(1, 1 + c, 8), n=240, seed=c) for c in range(4)])
    stretched = clouds * torch.logspace(-1, 1, 8)
    dim = dataclasses.replace(SMALL, normalize="dim")
    plain, other = (geometry.analyse(states_of(x), dim) for x in (clouds, stretched))
    for a, b in zip(plain["layers"], other["layers"]):
        for name in geometry.PROXIES:
            assert a[name] == pytest.approx(b[name], rel=1e-3)
    rms = geometry.analyse(states_of(stretched), SMALL)
    assert rms["layers"][0]["curvature"] != pytest.approx(plain["layers"][0]["curvature"], rel=0.1)
    row = next(v for v in rms["variants"] if v["name"] == "normalize dim")
    assert row["scores"] == pytest.approx([r["score"] for r in other["layers"]], abs=1e-4)
    X, S = states_of(stretched).space(1, dim=True)
    assert torch.allclose(S, torch.corrcoef(stretched[1].T), atol=1e-4)
    assert torch.allclose(X.square().mean(0), torch.ones(8), atol=1e-4)


def test_neighbours_of_the_same_token_can_be_left_out():
    """Five of six tokens are the same one, at layer 1 a tight cluster, at the others mixed with the rest: without
    neighbours of the anchor's own token the cluster is gone, and layer 1 with its saturated z."""
    tokens = torch.arange(240).clamp_min(199)
    clouds = torch.stack([gaussian([1] * 6, n=240, seed=seed) for seed in range(3)])
    clouds[0, :200] *= 0.01
    states = states_of(clouds, tokens)
    result = geometry.analyse(states, SMALL)
    apart = geometry.analyse(states, dataclasses.replace(SMALL, same_token=False))
    assert result["layers"][0]["same_token"] == pytest.approx(5 / 6, abs=0.1)
    assert all(0.5 < r["same_token"] < 0.8 for r in result["layers"][1:])
    assert [r["same_token"] for r in apart["layers"]] == [0, 0, 0]
    before, after = ([r["curvature"] for r in found["layers"]] for found in (result, apart))
    assert after[0] < before[0] / 10 and after[1] > before[1] / 3 and after[2] > before[2] / 3
    rows = {v["name"]: v for v in result["variants"]}
    assert rows["no same-token neighbours"]["scores"] == pytest.approx([r["score"] for r in apart["layers"]], abs=1e-5)
    assert "no same-token neighbours" not in {v["name"] for v in apart["variants"]}
    saturated = result["saturation"]                    # layer 1's curvature is far beyond the others'
    assert saturated["proxy"] == "curvature" and saturated["limit"] == pytest.approx(2 ** 0.5)
    assert 0.99 * saturated["limit"] < saturated["z"] <= saturated["limit"] + 1e-5
    text = geometry.section({**result, "tokens": 240, "sequences": 4})
    assert "saturated" in text and f"{saturated['z']:.3f} of at most sqrt(C - 1) = 1.414 over C = 3" in text


def test_a_proxy_is_a_function_and_a_line(monkeypatch, tmp_path):
    """Another proxy, from the distances: it is in table, figure, correlation and variants, in the score by its sign;
    what is drawn of a stored result is what that holds."""
    states = states_of(torch.stack([gaussian([1] * d + [0.01] * (8 - d), n=240, seed=d) for d in (2, 4, 6, 8)]))
    before = geometry.analyse(states, SMALL)

    def twonn(m):  # Facco et al. 2017
        return 1 / (m.distance[..., 1] / m.distance[..., 0]).log().mean(-1)
    monkeypatch.setitem(geometry.PROXIES, "twonn", (0, twonn))
    shown = geometry.analyse(states, SMALL)
    assert [r["score"] for r in shown["layers"]] == [r["score"] for r in before["layers"]]
    assert shown["replicates"] == before["replicates"] and len(shown["proxy_correlation"]) == 4
    assert [r["twonn"] for r in shown["layers"]] == pytest.approx([2, 4, 6, 8], rel=0.4)
    alone = next(v for v in shown["variants"] if v["name"] == "twonn only")["scores"]
    assert alone == sorted(alone) and alone[0] < alone[-1]
    monkeypatch.setitem(geometry.PROXIES, "twonn", (-1, twonn))
    scored = geometry.analyse(states, SMALL)
    for a, b, z in zip(scored["layers"], before["layers"], alone):
        assert a["score"] == pytest.approx(b["score"] - z, abs=1e-5)
    monkeypatch.delitem(geometry.PROXIES, "twonn")      # a fork's finished run is drawn by whoever has another dict
    text = geometry.section({**scored, "tokens": 240, "sequences": 4})
    assert "| twonn |" in text and f"| {scored['layers'][0]['twonn']:.4g} |" in text and "| twonn only |" in text
    geometry.plot(scored, tmp_path / "five.png")
    geometry.plot(before, tmp_path / "four.png")
    assert (tmp_path / "five.png").stat().st_size > (tmp_path / "four.png").stat().st_size > 10_000


@pytest.mark.parametrize("D", [6, 200])
def test_exact_resamples(D):
    """Weights of one give the plain spectrum, a weight of two the sequence written twice. D > P goes by Gram matrix."""
    X = gaussian(np.linspace(2, 0.1, D), n=120) + 3.0
    sequence = torch.arange(120) // 30
    weights = torch.tensor([[1.0, 1, 1, 1], [2, 0, 1, 1]])
    got = geometry.resampled_spectra(X, sequence, weights, exact=True)
    twice = torch.cat([X[:30], X[:30], X[60:]])
    for row, want in zip(got, (spectrum(X), spectrum(twice))):
        assert torch.allclose(row, want, atol=2e-3 * want[0].item())


@pytest.mark.parametrize("D, P", [(24, 2000), (120, 100)])
def test_first_order_resamples(D, P):
    """The plain spectrum from weights of one; over replicates the spread and the order of the exact ones, centred on
    the point. Also where D > P."""
    X = gaussian(1 / np.arange(1, D + 1), n=P)
    X, sequence = X - X.mean(0), torch.arange(P) * 50 // P
    assert torch.allclose(geometry.resampled_spectra(X, sequence, torch.ones(1, 50))[0], spectrum(X), atol=1e-3)
    weights = torch.from_numpy(np.random.default_rng(3).multinomial(50, np.ones(50) / 50, 100)).float()
    fast, exact = (geometry.resampled_spectra(X, sequence, weights, how) for how in (False, True))
    assert torch.allclose(fast.sum(1), exact.sum(1), rtol=1e-3) and (fast[:, :-1] >= fast[:, 1:]).all()
    one = torch.ones(1, 8)
    ranks, other, point = (geometry.proxies(e, one, one[..., None], geometry.Config())[..., 2].log()
                           for e in (fast, exact, spectrum(X)[None]))
    assert 0.8 < (ranks.std() / other.std()).item() < 1.2
    assert np.corrcoef(ranks, other)[0, 1] > 0.9
    assert abs(ranks.mean() - point) < 0.3 * other.std()


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
    estimate, _ = states.cost(lm.config, cfg, itemsize=4)
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
    replicates = np.array(result["replicates"])                   # (R, C)
    times = np.bincount(replicates.argmax(1), minlength=3)
    assert [r["chosen"] for r in rows] == pytest.approx((times / len(replicates)).tolist())
    assert [r["rank"] for r in rows] == [1 + sum(q["score"] > r["score"] for q in rows) for r in rows]
    by_log = sorted(next(v["scores"] for v in result["variants"] if v["name"] == "transform log"), reverse=True)
    assert result["margin_log"] == pytest.approx(by_log[0] - by_log[1], abs=1e-5)
    assert rows[result["best_layer_log"] - 1]["rank_log"] == 1
    assert all(len(value) <= 60 for _, value in result["headline"])
    names = {v["name"] for v in result["variants"]}
    assert {"normalize raw", "transform log", "rank participation", "curvature only", "k 4", "k 16", "pool / 2",
            "stiffness mean, eps 0.1", "normalize dim", "no same-token neighbours"} <= names
    assert "normalize rms" not in names                           # it is the default
    assert {t["name"] for t in result["trivial"]} == {"-layer", "-log mean norm", "-|h[l]-h[0]|"}
    assert (runs / "geometry" / "geometry.png").stat().st_size > 10_000
    section = read_section(runs / "geometry")
    assert section == geometry.section(result) and section.startswith("## LOCATE\n") and "geometry.png" in section
    assert f"| **{result['best_layer']}** |" in section and "\\|h[l]-h[0]\\|" in section


def test_the_same_seed_gives_the_same_scores(runs, tmp_path, text, capsys):
    argv = [*f"--preset tiny --model {runs}/toy --out {tmp_path}/g --data".split(), str(text)]
    again = geometry.main(argv)
    first = json.loads((runs / "geometry" / "result.json").read_text())
    assert again["layers"] == first["layers"] and again["replicates"] == first["replicates"]
    capsys.readouterr()
    assert geometry.main(argv)["seconds"] == again["seconds"]       # finished: nothing is measured
    assert geometry.section(again) in capsys.readouterr().out


def test_refusals(runs, tmp_path, capsys, text):
    common = ["--preset", "tiny", "--data", text, "--model", runs / "toy", "--out", tmp_path / "g"]
    assert "tokens >= pool" in fails(capsys, geometry.main, *common, "--pool", "100000")
    assert "--skip" in fails(capsys, geometry.main, *common, "--skip", "32")
    assert "--eps" in fails(capsys, geometry.main, *common, "--eps", "0")
    assert "--thin" in fails(capsys, geometry.main, *common, "--thin", "9")
    message = fails(capsys, geometry.main, *common, "--score_by", "twonn")
    assert all(name in message for name in ("twonn", *geometry.PROXIES))
    assert "use more text" in fails(capsys, geometry.main, *common, *"--k 99999 --pool 999999 --tokens 999999".split())
    assert not (tmp_path / "g").exists()


def test_a_small_corpus_shrinks_the_pool(runs, tmp_path, text, capsys):
    (tmp_path / "some").mkdir()
    for name in ("ast.py", "bdb.py"):
        shutil.copy(text / name, tmp_path / "some")
    flags = f"--preset tiny --model {runs}/toy --out {tmp_path}/g --tokens 999999 --pool 500000 --data {tmp_path}/some"
    result = geometry.main(flags.split())
    assert result["flags"]["pool"] == result["tokens"] < 500000 and "note: held-out" in capsys.readouterr().out
