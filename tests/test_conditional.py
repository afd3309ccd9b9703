"""conditional.py: guesses with the error they must have, as measure.py has it, and cut into batches however."""
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_model

import geometry
from core import backbone, conditional, denoiser, diffusion, measure
from core.conditional import GUESSES

SKIP = 4


@pytest.fixture(scope="module")
def toy():
    """(lm, training rows (200, 32), held-out rows (6, 33))"""
    lm = backbone.Backbone(tiny_model("llama", initializer_range=0.1).requires_grad_(False))
    rows = torch.randint(3, 64, (206, 33), generator=torch.Generator().manual_seed(0))
    return lm, rows[6:, :-1], rows[:6]


def known_of(lm, train, wanted, layers=(0, 3), probe_steps=1):
    return conditional.fit(lm, layers, train[:16], train, wanted, SKIP, probe_steps=probe_steps)


def numbers_of(lm, known, held_out, decoded=()):
    """layer -> guess -> its numbers, from two sets of rows."""
    asked = conditional.guesses(known, decoded, SKIP)
    return conditional.joined([conditional.errors(lm, asked, rows, SKIP) for rows in held_out.split([2, 4])])


def test_guesses_have_the_error_they_must(toy):
    """Layer 0 is the condition itself: identity, ridge and, but for one pseudo-count, the token's mean all know it."""
    lm, train, held_out = toy
    known = known_of(lm, held_out[:, :-1], held_out)
    found = numbers_of(lm, known, held_out, ("identity", "token mean"))
    assert list(found[0]["identity"].values()) == pytest.approx([0, 0, 0], abs=1e-6) and found[0]["ridge"]["fvu"] < 0.02
    assert 0 < found[0]["token mean"]["fvu"] < 0.5                             # shrunk by one pseudo-count
    assert found[0]["token mean"]["kl"] > 1e-4 and set(found[0]["ridge"]) == {"fvu"}
    assert found[3]["ridge"]["fvu"] < found[3]["identity"]["fvu"]
    more = known_of(lm, held_out[:, :-1].repeat(50, 1), held_out, (0,), 0)[0]  # often enough, and nothing is shrunk
    rows = held_out[:1, SKIP:-1]
    assert torch.allclose(GUESSES["token mean"](more, None, rows), more.standard_c(lm.embed(rows)), atol=0.1)


def test_the_ridge_is_that_of_the_normal_equations(toy):
    """In float64 and at once, at a layer in the middle; the gram of c serves every layer."""
    lm, train, held_out = toy
    known = known_of(lm, train, held_out, (1, 3))
    h0 = lm.embed(train)
    for layer, at in known.items():
        z = at.standard_z(lm.through(h0, 0, layer))[:, SKIP:].flatten(0, 1).double()
        one = conditional.with_one(at.standard_c(h0))[:, SKIP:].flatten(0, 1).double()
        gram = one.T @ one
        want = torch.linalg.solve(gram + conditional.SHARE * gram.diagonal().mean() * torch.eye(len(gram)), one.T @ z)
        assert torch.allclose(at.weights.double(), want, atol=1e-3)
        token = int(held_out[0, 9])
        mine = (train[:, SKIP:] == token).flatten()
        mean = (z[mine].sum(0) + z.mean(0)) / (mine.sum() + 1)
        assert torch.allclose(at.mean[at.place[token]].double(), mean, atol=1e-4)


def test_the_probe_begins_as_the_ridge_and_learns(toy):
    lm, train, held_out = toy
    none, some = (numbers_of(lm, known_of(lm, train, held_out, (1,), steps), held_out)[1]
                  for steps in (0, 25))
    assert none["one-block probe"]["fvu"] == pytest.approx(none["ridge"]["fvu"], rel=1e-5)
    assert some["ridge"]["fvu"] == pytest.approx(none["ridge"]["fvu"], rel=1e-5)
    assert some["one-block probe"]["fvu"] < 0.98 * some["ridge"]["fvu"]


@pytest.mark.parametrize("objective", ["diffusion", "regression"])
def test_errors_are_those_of_a_bridge(toy, objective):
    """A trained bridge among the guesses has the numbers that measure.py gives it."""
    lm, train, held_out = toy
    net = denoiser.Bridge(lm.D, 32, 1, 1, objective)
    denoiser.calibrate(lm, net, train[:16], 3, SKIP)
    how = SimpleNamespace(skip=SKIP, noise_seeds=1, sampler="euler", shift=1.0)
    theirs = measure.measure(lm, net, held_out, 3, (2,), how)[0]["2"]
    noise = diffusion.position_noise(0, range(held_out.shape[1] - 1), lm.D, "cpu")
    asked = {3: {"mine": (net, lambda z, c, ids: diffusion.sample(net, c, 2, noise), True)}}
    mine = conditional.joined([conditional.errors(lm, asked, rows, SKIP) for rows in held_out.split([5, 1])])[3]["mine"]
    assert mine == pytest.approx({key: theirs[key] for key in mine}, rel=1e-4) and len(mine) == 3


def test_units_are_those_of_a_bridge(toy):
    lm, train, held_out = toy
    at, net = known_of(lm, train, held_out)[3], denoiser.Bridge(lm.D, 32, 1, 1)
    denoiser.calibrate(lm, net, train[:16], 3, SKIP)
    for name in ("mu_z", "sigma_z", "mu_c", "sigma_c"):
        assert torch.equal(getattr(at, name), getattr(net, name))


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_the_residual_is_what_the_ridge_leaves(family):
    """Published proxies see h[l] less the ridge: where the ridge knows all, at layer 1 of a model whose first block
    adds nothing, hardly anything is left, and that layer has the stiffest residual."""
    model = tiny_model(family)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if (".h.0." in name or ".layers.0." in name) and (
                    "c_proj" in name or name.endswith(("o_proj.weight", "down_proj.weight"))):
                p.zero_()
    lm = backbone.Backbone(model.requires_grad_(False))
    rows = torch.randint(3, 64, (40, 21), generator=torch.Generator().manual_seed(1))
    cfg = geometry.Config(tokens=600, seq_len=20, pool=400, anchors=50, k=6, batch_size=8)
    known = conditional.fit(lm, range(1, lm.L), rows[:8, :-1], rows[:, :-1], rows, cfg.skip, probe_steps=0)
    found = geometry.residual(lm, known, rows[:, :-1], cfg)
    some = geometry.residual(lm, {layer: known[layer] for layer in list(known)[:-1]}, rows[:, :-1], cfg)
    raw = "stiffness of the residual"
    assert all(len(values) == len(known) - 1 for values in some.values())       # only the layers it is asked for
    assert some[raw].argmax() == 0 and len(found[raw]) == len(known)
    assert int(found["stiffness of the residual"].argmax()) == int(found["curvature of the residual"].argmax()) == 0
    assert set(found) == {"score of the residual", "score of the residual, raw", *(
        f"{name} of the residual" for name in geometry.PROXIES)}
