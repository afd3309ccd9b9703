"""LOCATE against closed forms: Gaussians of known covariance, a lattice, scaling, exact spectra."""
import dataclasses
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import fails, slow, tiny_model

import geometry
from core import backbone
from geometry import States

SMALL = geometry.Config(pool=240, anchors=60, k=6, resamples=10, skip=4, batch_size=3)


def gaussian(scales, n=20000, seed=0):
    """n samples of N(0, diag(scales^2))."""
    x = np.random.default_rng(seed).standard_normal((n, len(scales)))
    return torch.from_numpy(x * np.asarray(scales)).float()


def spectrum(X):
    X = X - X.mean(0)
    return geometry.eigenvalues(X.T @ X / len(X))


def proxy(name, e=None, spread=None):
    """One proxy of raw states, with eps = 1e-3."""
    e = torch.ones(1) if e is None else e
    spread = torch.ones(1) if spread is None else spread
    cfg = geometry.Config(normalize="raw", eps=1e-3 / e.mean().item())
    values = geometry.proxies([geometry.Measured(e, spread, spread[..., None], cfg)])
    return values[0, list(geometry.PROXIES).index(name)].item()


def located(states, cfg):
    return geometry.proxies(geometry.locate(states, cfg))


def states_of(clouds, anchors=None):
    """States whose pool is all there is: clouds (C, P, D), from four sequences."""
    X = clouds - clouds.mean(1, keepdim=True)
    C, P, _ = X.shape
    anchors = np.arange(P) if anchors is None else np.array(anchors)
    return States(X.mT @ X / P, list(X), torch.arange(P) * 4 // P, anchors,
                  X.norm(dim=-1).mean(1), torch.ones(C))


def test_stiffness_of_a_known_covariance():
    e = torch.tensor([4.0, 1.0, 0.25])
    assert proxy("stiffness", e) == pytest.approx(1 / 4.001)
    assert proxy("stiffness", spectrum(gaussian([2, 1, 0.5]))) == pytest.approx(1 / 4.001, rel=0.03)
    S = torch.diag(e)                                   # lambda_min of the regularised precision
    smallest = torch.linalg.eigvalsh(torch.linalg.inv(S + 1e-3 * torch.eye(3)))[0].item()
    assert proxy("stiffness", geometry.eigenvalues(S)) == pytest.approx(smallest, rel=1e-5)


def test_effective_rank_of_subspaces():
    assert proxy("effective_rank", torch.ones(16)) == pytest.approx(16, rel=1e-5)
    flat = torch.cat([torch.ones(5), torch.zeros(11)])
    assert proxy("effective_rank", flat) == pytest.approx(5, rel=1e-5)
    noise = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    X = gaussian([1] * 5) @ torch.linalg.qr(noise)[0][:5]
    assert proxy("effective_rank", spectrum(X)) == pytest.approx(5, rel=0.01)
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert proxy("effective_rank", torch.tensor([3.0, 1.0])) == pytest.approx(math.exp(entropy))


@pytest.mark.parametrize("m", [2, 5])
def test_curvature_of_a_lattice(m):
    """On a line of spacing s the 2m neighbours lie at +-s..+-ms: variance s^2 (m+1)(2m+1)/6."""
    s = 0.5
    X = torch.arange(200)[:, None] * s * torch.tensor([0.6, 0.8, 0.0])
    states = states_of(X[None], range(50, 150, 10))
    cfg = dataclasses.replace(SMALL, k=2 * m)
    _, spread, distance, _ = geometry.measure(states, 0, cfg)
    want = (torch.arange(2 * m) // 2 + 1.0) * s         # s, s, 2s, 2s, ...: the anchor is left out
    assert torch.allclose(distance, want.expand_as(distance), atol=1e-3)
    want = s ** 2 * (m + 1) * (2 * m + 1) / 6
    assert torch.allclose(spread, torch.full_like(spread, want), rtol=1e-4)
    assert proxy("curvature", spread=spread) == pytest.approx(1 / (want + 1e-3), rel=1e-4)


def test_neighbours_are_the_nearest_and_spread_is_that_of_their_covariance():
    X = gaussian(np.linspace(2, 0.1, 12), n=300)
    anchors = [3, 77, 299]
    cfg = dataclasses.replace(SMALL, k=10)
    _, spread, distance, _ = geometry.measure(states_of(X[None], anchors), 0, cfg)
    for i, a in enumerate(anchors):
        order = (X - X[a]).norm(dim=1).argsort()
        near = X[order[1:11]]                           # the first one is the anchor
        assert torch.allclose(distance[i], (near - X[a]).norm(dim=1), atol=1e-3)
        largest = torch.linalg.eigvalsh(torch.cov(near.T, correction=0))[-1]
        assert spread[i].item() == pytest.approx(largest.item(), rel=1e-4)


def test_equal_neighbours_have_no_spread():
    """Repeated text gives Gram matrices of 1e-14: the fp32 solver answers NaN for some."""
    X = gaussian(np.linspace(1, 0.1, 8), n=240)
    X[:200] = X[0] + 1e-7 * gaussian([1] * 8, n=200)
    states = states_of(torch.stack([X, X, X]))
    result = geometry.analyse(states, SMALL)
    assert all(math.isfinite(row[name]) for row in result["layers"] for name in row)
    assert result["at_ceiling"] == [1, 2, 3]            # 1/eps at every layer, and so it is said
    spread = geometry.measure(states, 0, SMALL).spread
    assert spread.min() >= 0 and spread.median() < 1e-10


def test_small_matrices_are_solved_in_fp64(monkeypatch):
    """This one is NaN in fp32."""
    gram = torch.full((1, 16, 16), 5.68e-14)
    solved = []

    def eigenvalues(S):
        solved.append(S.dtype)
        return torch.linalg.eigvalsh(S).flip(-1)
    assert eigenvalues(gram.double()).isfinite().all()
    monkeypatch.setattr(geometry, "eigenvalues", eigenvalues)
    spread = geometry.local_spread(gaussian([1] * 4, n=9), torch.arange(8)[None])
    assert solved == [torch.float64] * 2 and spread.dtype == torch.float32


def test_a_number_that_is_not_finite_is_named_with_its_layer_and_proxy():
    clouds = torch.stack([gaussian([1] * 8, n=240)] * 3)
    clouds[1] = 0.0
    with pytest.raises(geometry.UserError, match="curvature of layer 2 is not finite"):
        geometry.analyse(states_of(clouds), SMALL)


def test_scaling():
    """States times a: raw curvature and stiffness fall by a^2, all under rms and the rank stay."""
    a = 7.0
    X = gaussian(np.linspace(3, 0.2, 8), n=1000)

    def values(X, normalize):
        cfg = dataclasses.replace(SMALL, normalize=normalize)
        return located(states_of(X[None], range(64)), cfg)[0]
    assert torch.allclose(values(a * X, "rms"), values(X, "rms"), rtol=1e-3)
    fall = torch.tensor([a * a, a * a, 1.0])
    assert torch.allclose(values(a * X, "raw"), values(X, "raw") / fall, rtol=1e-3)


def test_dim_is_what_the_bridge_diffuses():
    """Under `dim` the unit of a dimension has no effect, under `rms` it has."""
    clouds = [gaussian(np.linspace(1, 1 + c, 8), n=240, seed=c) for c in range(4)]
    clouds = torch.stack(clouds)
    stretched = clouds * torch.logspace(-1, 1, 8)
    dim = dataclasses.replace(SMALL, normalize="dim")
    assert torch.allclose(located(states_of(clouds), dim), located(states_of(stretched), dim),
                          rtol=1e-3)
    assert not torch.allclose(located(states_of(clouds), SMALL),
                              located(states_of(stretched), SMALL), rtol=0.1)
    result = geometry.analyse(states_of(stretched), SMALL)
    row = next(v for v in result["variants"] if v["name"] == "normalize dim")
    alone = geometry.analyse(states_of(stretched), dim)     # a variant = the run with that flag
    assert row["scores"] == [r["score"] for r in alone["layers"]]


def test_score_is_the_signed_sum_of_z():
    x = torch.tensor([[1.0, 5, 3], [2, 5, 1], [3, 5, 2]])   # stiffness is constant: it drops out
    root = 1.5 ** 0.5
    cfg = geometry.Config()
    log = geometry.Config(transform="log")
    assert torch.allclose(geometry.score(x, cfg), torch.tensor([-2 * root, root, root]), atol=1e-5)
    assert torch.allclose(geometry.score(x.exp(), log), geometry.score(x, cfg), atol=1e-5)
    far = torch.ones(7, 3)
    far[2, 0] = 1e6                                     # z saturates at sqrt(C - 1)
    assert geometry.z_scores(far, cfg)[2, 0].item() == pytest.approx(6 ** 0.5, rel=1e-5)


def two_nn(m):
    """Intrinsic dimension (Facco et al. 2017)."""
    return 1 / (m.distance[..., 1] / m.distance[..., 0]).log().mean(-1)


def test_a_proxy_is_a_function_and_a_line(monkeypatch):
    """It is in rows and variants, and in the score by its sign."""
    clouds = [gaussian([1] * d + [0.01] * (8 - d), n=240, seed=d) for d in (2, 4, 6, 8)]
    states = states_of(torch.stack(clouds))
    before = geometry.analyse(states, SMALL)
    monkeypatch.setitem(geometry.PROXIES, "two_nn", (0, two_nn))
    shown = geometry.analyse(states, SMALL)
    assert [r["score"] for r in shown["layers"]] == [r["score"] for r in before["layers"]]
    assert [r["two_nn"] for r in shown["layers"]] == pytest.approx([2, 4, 6, 8], rel=0.4)
    alone = next(v for v in shown["variants"] if v["name"] == "two_nn only")["scores"]
    assert alone == sorted(alone) and alone[0] < alone[-1]
    monkeypatch.setitem(geometry.PROXIES, "two_nn", (-1, two_nn))
    scored = geometry.analyse(states, SMALL)
    for a, b, z in zip(scored["layers"], before["layers"], alone):
        assert a["score"] == pytest.approx(b["score"] - z, abs=1e-5)


@pytest.mark.parametrize("D, P", [(24, 2000), (120, 100)])
def test_bootstrap_spectra_against_exact_eigenvalues(D, P):
    """Counts of one give the spectrum itself; over resamples the effective rank has the spread and
    the order that exact eigenvalues give. Also where D > P."""
    X = gaussian(1 / np.arange(1, D + 1), n=P)
    X = X - X.mean(0)
    sequence = torch.arange(P) * 50 // P
    plain = geometry.resampled_spectra(X, sequence, np.ones((1, 50)))[0]
    assert torch.allclose(plain, spectrum(X), atol=1e-3)
    counts = np.random.default_rng(3).multinomial(50, np.ones(50) / 50, 100)
    fast = geometry.resampled_spectra(X, sequence, counts)
    exact = []
    for row in torch.from_numpy(counts):
        exact.append(spectrum(X.repeat_interleave(row[sequence], 0)))
    exact = torch.stack(exact)
    assert torch.allclose(fast.sum(1), exact.sum(1), rtol=1e-3)
    assert (fast[:, :-1] >= fast[:, 1:]).all()
    one = torch.ones(1, 8)

    def ranks_of(e):
        measured = geometry.Measured(e, one, one[..., None], geometry.Config())
        return geometry.effective_rank(measured).log()
    ranks = ranks_of(fast)
    want = ranks_of(exact)
    assert 0.8 < (ranks.std() / want.std()).item() < 1.2
    assert np.corrcoef(ranks, want)[0, 1] > 0.9


def test_the_interval_is_centred_on_the_score():
    clouds = [gaussian(np.linspace(1, 1 + c, 8), n=240, seed=c) for c in range(3)]
    states = states_of(torch.stack(clouds))
    result = geometry.analyse(states, SMALL)
    measured = geometry.locate(states, SMALL)
    assert result["at_ceiling"] == []
    again = geometry.score(geometry.bootstrap(states, measured, SMALL), SMALL)  # (R, C)
    assert again.shape == (10, 3)
    for c, row in enumerate(result["layers"]):
        assert row["score_low"] <= row["score"] <= row["score_high"]
        width = again[:, c].quantile(0.975) - again[:, c].quantile(0.025)
        assert row["score_high"] - row["score_low"] == pytest.approx(width.item(), abs=1e-4)
        share = (again.argmax(1) == c).float().mean().item()
        assert row["chosen"] == pytest.approx(share)


@pytest.fixture(scope="module")
def model_and_windows():
    lm = backbone.Backbone(tiny_model("qwen3").requires_grad_(False))
    windows = torch.randint(3, 64, (16, 20), generator=torch.Generator().manual_seed(1))
    return lm, windows


def test_one_pass_equals_layer_by_layer(model_and_windows):
    """Against all states of a layer in float64: moments, norms, and a pool that is part of them."""
    lm, windows = model_and_windows
    states = geometry.collect(lm, windows, SMALL)
    h0 = lm.embed(windows)
    for c in range(3):
        h = lm.through(h0, 0, c + 1)[:, 4:]
        X = h.flatten(0, 1).double()
        assert torch.allclose(states.cov[c].double(), torch.cov(X.T, correction=0), atol=1e-3)
        assert states.norm[c].item() == pytest.approx(X.norm(dim=-1).mean().item(), rel=1e-5)
        moved = (h - h0[:, 4:]).norm(dim=-1).mean().item()
        assert states.moved[c].item() == pytest.approx(moved, rel=1e-5)
        member = torch.cdist(states.pool[c].double() + X.mean(0), X).min(1)
        assert member.values.max() < 1e-3
        assert torch.equal(member.indices // 16, states.sequence)      # 20 - 4 states a sequence
    assert len(states.pool[0]) == 240


def test_states_that_are_not_finite_are_refused_with_their_layer(model_and_windows):
    lm, windows = model_and_windows
    broken = backbone.Backbone(tiny_model("qwen3").requires_grad_(False))
    broken.block = lambda h, i, side: lm.block(h, i, side) * (math.inf if i == 1 else 1)
    with pytest.raises(geometry.UserError, match="covariance of layer 2 is not finite"):
        geometry.collect(broken, windows, SMALL)


def test_the_result_of_a_run(runs):
    result = json.loads((runs / "geometry" / "result.json").read_text())
    rows = result["layers"]
    assert [row["layer"] for row in rows] == [1, 2, 3]      # L = 4: candidates 1..L-1
    scores = [row["score"] for row in rows]
    assert result["best_layer"] == 1 + int(np.argmax(scores))
    first, second, _ = sorted(scores, reverse=True)
    assert result["margin"] == pytest.approx(first - second, abs=1e-5)
    assert {variant["name"] for variant in result["variants"]} == {
        "default", "normalize raw", "normalize dim", "transform log", "k 4", "k 16",
        "curvature only", "stiffness only", "effective_rank only"}
    assert {t["name"] for t in result["trivial"]} == {"-layer", "-log mean norm", "-|h[l]-h[0]|"}
    assert (runs / "geometry" / "geometry.png").stat().st_size > 10_000


def test_the_same_seed_gives_the_same_scores(runs, tmp_path, text, capsys):
    argv = [*f"--preset tiny --model {runs}/toy --out {tmp_path}/g --data".split(), str(text)]
    again = geometry.main(argv)
    first = json.loads((runs / "geometry" / "result.json").read_text())
    assert again["layers"] == first["layers"] and again["variants"] == first["variants"]
    shown = capsys.readouterr().out
    assert geometry.main(argv)["layers"] == first["layers"]
    assert capsys.readouterr().out in shown             # finished: only printed
    assert f"layer {first['best_layer']} is chosen by default" in shown


def test_equal_windows_are_counted_and_left_out(runs, tmp_path, text, monkeypatch, capsys):
    """With 90% copies the neighbours of a state are its copies, and curvature is 1/eps."""
    (tmp_path / "data").symlink_to(runs / "data")
    windows = geometry.data.Tokens.windows
    monkeypatch.setattr(geometry.data.Tokens, "windows", lambda self, count, seed:
                        windows(self, count, seed).repeat(10, 1))
    argv = [*f"--preset tiny --model {runs}/toy --out {tmp_path}/g --data".split(), str(text)]
    often = geometry.main(argv)
    once = json.loads((runs / "geometry" / "result.json").read_text())
    assert once["equal_windows"] == 0 and often["equal_windows"] == 9 * 19
    assert often["layers"] == once["layers"] and often["tokens"] == once["tokens"]
    assert "171 windows were left out as copies" in capsys.readouterr().out


@pytest.mark.parametrize("gain, warned", [(0.05, False), (1.97, True)])
def test_a_model_that_misses_its_bos(gain, warned, capsys):
    lm = SimpleNamespace(config=SimpleNamespace(bos_token_id=2))
    windows = torch.full((8, 6), 7)

    def model(ids, labels, use_cache):
        assert ids is labels and (ids[:, 1:] == 7).all()        # the same tokens are predicted
        return SimpleNamespace(loss=6.70 - gain * (ids[0, 0] == 2))
    lm.model = model
    geometry.warn_of_missing_bos(lm, windows)
    assert (windows == 7).all()
    shown = capsys.readouterr().out
    assert ("6.70 nats a token without BOS, 4.73 after BOS" in shown) == warned == bool(shown)


def test_a_random_model_misses_no_bos(model_and_windows, capsys):
    geometry.warn_of_missing_bos(*model_and_windows)
    assert not capsys.readouterr().out


@slow
def test_a_small_text_shrinks_the_pool(runs, tmp_path, text):
    (tmp_path / "some").mkdir()
    for name in ("ast.py", "bdb.py"):
        shutil.copy(text / name, tmp_path / "some")
    flags = (f"--preset tiny --model {runs}/toy --out {tmp_path}/g --tokens 999999 --pool 500000 "
             f"--data {tmp_path}/some")
    assert 500 < geometry.main(flags.split())["tokens"] < 500000


def test_what_cannot_be_scored(runs, tmp_path, text, capsys):
    assert "toy.py" in fails(capsys, geometry.main, "--out", tmp_path / "g")
    argv = ["--preset", "tiny", "--model", f"{runs}/toy", "--out", f"{tmp_path}/g", "--data",
            str(text)]
    (tmp_path / "data").symlink_to(runs / "data")
    longer = fails(capsys, geometry.main, *argv, "--seq_len", "2000")
    assert "longer than the 1024 positions" in longer
    assert "--skip must be below" in fails(capsys, geometry.main, *argv, "--skip", "32")
    assert "--k must be below half" in fails(capsys, geometry.main, *argv, "--k", "128")
    assert not (tmp_path / "g").exists()
    two = tiny_model("qwen3", num_hidden_layers=2, layer_types=["full_attention"] * 2)
    two.save_pretrained(tmp_path / "two")
    assert "three blocks" in fails(capsys, geometry.main, *argv, "--model", tmp_path / "two")
