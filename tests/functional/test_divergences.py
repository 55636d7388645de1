import math

import mpmath
import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.special import rel_entr

from esscher.functional.divergences import (
    GENERATORS,
    FDivergence,
    alpha,
    by_name,
    divergence,
    jeffreys,
    js,
    kl,
    neyman_chi2,
    pearson_chi2,
    reverse_kl,
    softened_kl,
    softened_reverse_kl,
    squared_hellinger,
    total_variation,
)

INFINITY = float("inf")
ALPHAS = [-2.0, -1.0, -0.3, 0.0, 1e-7, 0.3, 0.5, 0.7, 1 - 1e-7, 1.0, 1.4, 2.0, 3.0]
SMOOTH = [kl(), reverse_kl(), js(), pearson_chi2(), neyman_chi2(), squared_hellinger()]
SMOOTH += [jeffreys(), softened_kl(), softened_reverse_kl()]
SMOOTH += [alpha(a) for a in ALPHAS]
EVERY = [*SMOOTH, total_variation()]
LOG_U = torch.linspace(-4, 4, 33, dtype=torch.float64)

smooth = pytest.mark.parametrize("f", SMOOTH, ids=lambda f: f.name)
every = pytest.mark.parametrize("f", EVERY, ids=lambda f: f.name)


def textbook(name, u):
    """The generator written in u, in whatever arithmetic u has."""
    log = mpmath.log if isinstance(u, mpmath.mpf) else torch.log
    if name.startswith("alpha"):
        a = mpmath.mpf(float(name[6:-1])) if isinstance(u, mpmath.mpf) else float(name[6:-1])
        if a == 0:
            return u * log(u) - u + 1
        if a == 1:
            return u - 1 - log(u)
        return (u ** (1 - a) - (1 - a) * u - a) / (a * (a - 1))
    return {
        "kl": lambda: u * log(u),
        "reverse_kl": lambda: -log(u),
        "js": lambda: u * log(u) - (u + 1) * log((u + 1) / 2),
        "pearson_chi2": lambda: (u - 1) ** 2,
        "neyman_chi2": lambda: (u - 1) ** 2 / u,
        "squared_hellinger": lambda: (u**0.5 - 1) ** 2,
        "total_variation": lambda: abs(u - 1) / 2,
        "jeffreys": lambda: (u - 1) * log(u),
        "softened_kl": lambda: (u + 1) * log((u + 1) / 2),
        "softened_reverse_kl": lambda: (u + 1) * log((u + 1) / (2 * u)),
    }[name]()


@every
def test_the_generator_is_the_textbook_formula_to_high_precision(f):
    with mpmath.workdps(60):
        for log_u in LOG_U.tolist():
            exact = float(textbook(f.name, mpmath.exp(mpmath.mpf(log_u))))
            found = f.f(torch.tensor(log_u, dtype=torch.float64)).item()
            assert found == pytest.approx(exact, rel=1e-9, abs=1e-13)


@smooth
def test_derivatives_are_those_of_the_generator(f):
    with mpmath.workdps(60):
        for log_u in LOG_U[::4].tolist():
            u, at = mpmath.exp(mpmath.mpf(log_u)), torch.tensor(log_u, dtype=torch.float64)

            def generator(x):
                return textbook(f.name, x)

            slope, bend = (float(mpmath.diff(generator, u, k)) for k in (1, 2))
            assert f.df(at).item() == pytest.approx(slope, rel=1e-10, abs=1e-12)
            assert f.d2f(at).item() == pytest.approx(bend, rel=1e-10)
            assert f.curvature(at).item() == pytest.approx(float(u**2) * bend, rel=1e-10)


@every
def test_autograd_through_log_u_is_u_times_the_derivative(f):
    log_u = LOG_U[LOG_U != 0].requires_grad_()
    (slope,) = torch.autograd.grad(f.f(log_u).sum(), log_u)
    torch.testing.assert_close(slope, log_u.exp() * f.df(log_u), rtol=1e-9, atol=1e-12)


@smooth
def test_legendre_identities(f):
    u, y = LOG_U.exp(), f.df(LOG_U)
    torch.testing.assert_close(f.dconj(y), u, rtol=1e-6, atol=0)
    torch.testing.assert_close(f.conj(y), u * y - f.f(LOG_U), rtol=1e-7, atol=1e-9)
    y = y[2:-2].clone().requires_grad_()
    (slope,) = torch.autograd.grad(f.conj(y).sum(), y)
    torch.testing.assert_close(slope, f.dconj(y).detach(), rtol=1e-6, atol=0)
    low, high = f.domain
    assert ((y > low) & (y < high)).all()
    # The domain is the range of f': approached, never left, at extreme ratios.
    edges = f.df(torch.tensor([-1e12, 1e12], dtype=torch.float64))
    for edge, bound in zip(edges.tolist(), (low, high), strict=True):
        if math.isfinite(bound):
            assert edge == pytest.approx(bound, rel=1e-6, abs=1e-12)
        else:
            assert edge * math.copysign(1, bound) > 90


@every
def test_positive_conjugate_against_a_search_over_ratios(f):
    grid = torch.linspace(-40, 10, 200001, dtype=torch.float64)
    values = f.f(grid)
    low, high = f.domain
    top = min(high, f.df(torch.tensor(4.0, dtype=torch.float64)).item())
    bottom = max(low, f.df(torch.tensor(-3.0, dtype=torch.float64)).item())
    points = torch.linspace(bottom, top, 9, dtype=torch.float64)[1:-1].tolist()
    if math.isfinite(low):
        points += [low - 3.0, low - 0.5]
    for y in points:
        score = grid.exp() * y - values
        best = int(score.argmax())
        at = torch.tensor(y, dtype=torch.float64, requires_grad=True)
        conj, dconj = f.conj_positive(at), f.dconj_positive(at)
        assert conj.item() == pytest.approx(score[best].item(), rel=1e-5, abs=1e-6)
        if f.name != "total_variation":
            assert dconj.item() == pytest.approx(grid[best].exp().item(), rel=1e-2, abs=1e-3)
        (slope,) = torch.autograd.grad(conj, at)
        assert slope.item() == pytest.approx(dconj.item(), rel=1e-9, abs=1e-12)


def test_positive_part_of_pearson_by_hand():
    y = torch.tensor([-5.0, -2.0, 0.0, 2.0])
    # y + y^2/4 from -2 on, -1 below; ratio max(0, y/2 + 1).
    assert pearson_chi2().conj_positive(y).tolist() == [-1.0, -1.0, 0.0, 3.0]
    assert pearson_chi2().dconj_positive(y).tolist() == [0.0, 0.0, 1.0, 2.0]
    assert pearson_chi2().conj(y).tolist() == [1.25, -1.0, 0.0, 3.0]


@every
def test_swapping(f):
    other = f.swapped()
    torch.testing.assert_close(other.f(LOG_U), LOG_U.exp() * f.f(-LOG_U), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(other.swapped().f(LOG_U), f.f(LOG_U), rtol=1e-7, atol=1e-11)
    assert f.f(torch.zeros(1)).item() == 0.0
    torch.manual_seed(0)
    p, q = torch.randn(2, 3, 6, dtype=torch.float64)
    torch.testing.assert_close(divergence(p, q, other), divergence(q, p, f))


def test_swapped_pairs_by_name():
    pairs = {"kl": "reverse_kl", "js": "js", "pearson_chi2": "neyman_chi2"}
    pairs |= {"jeffreys": "jeffreys", "softened_kl": "softened_reverse_kl"}
    for one, two in pairs.items():
        assert by_name(one).swapped() == by_name(two)
        assert by_name(two).swapped() == by_name(one)
    assert alpha(0.25).swapped() == alpha(0.75)
    assert alpha(0.25) != alpha(0.75)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_ratios_never_give_nan(f, dtype):
    log_u = torch.tensor([-INFINITY, -1e5, -1e3, -200.0, -90.0, 90.0, 200.0, 1e3, 1e5], dtype=dtype)
    for function in (f.f, f.df, f.d2f, f.curvature):
        assert not function(log_u).isnan().any()
    # Those whose slope at u = 1 is not 0 fall for ever on one side; -log u does too.
    if f.name not in ("reverse_kl", "softened_kl", "softened_reverse_kl"):
        assert (f.f(log_u) >= -1e-6).all()
    # Where a value is in range its gradient is a number, whatever the branch not taken does.
    at = log_u[1:].clone().requires_grad_()
    for function in (f.f, f.df):
        values = function(at)
        (slope,) = torch.autograd.grad(values.sum(), at, allow_unused=True, materialize_grads=True)
        assert not slope[values.isfinite()].isnan().any()


@every
def test_large_ratios_against_high_precision(f):
    with mpmath.workdps(400):
        for log_u in (-300.0, -60.0, 60.0, 300.0):
            exact = textbook(f.name, mpmath.exp(mpmath.mpf(log_u)))
            found = f.f(torch.tensor(log_u, dtype=torch.float64)).item()
            if mpmath.fabs(exact) < mpmath.mpf(10) ** 300:
                assert found == pytest.approx(float(exact), rel=1e-7)
            else:
                assert found == math.copysign(INFINITY, exact) or found > 1e299


def test_alpha_limits_and_relations():
    u = LOG_U.exp()
    # Up to the affine term u - 1, which vanishes in expectation under Q.
    torch.testing.assert_close(alpha(0.0).f(LOG_U), kl().f(LOG_U) - (u - 1))
    torch.testing.assert_close(alpha(1.0).f(LOG_U), reverse_kl().f(LOG_U) + (u - 1))
    torch.testing.assert_close(alpha(0.0).df(LOG_U), kl().df(LOG_U) - 1)
    torch.testing.assert_close(alpha(1.0).df(LOG_U), reverse_kl().df(LOG_U) + 1)
    torch.testing.assert_close(alpha(-1.0).f(LOG_U), pearson_chi2().f(LOG_U) / 2)
    torch.testing.assert_close(alpha(2.0).f(LOG_U), neyman_chi2().f(LOG_U) / 2)
    torch.testing.assert_close(alpha(0.5).f(LOG_U), 2 * squared_hellinger().f(LOG_U))
    for limit in (0.0, 1.0):
        for step in (-1e-6, -1e-12, 1e-12, 1e-6):
            near, at = alpha(limit + step), alpha(limit)
            for name in ("f", "df", "d2f", "curvature"):
                torch.testing.assert_close(
                    getattr(near, name)(LOG_U), getattr(at, name)(LOG_U), rtol=2e-5, atol=1e-12
                )
            y = at.df(LOG_U)[4:-4]
            torch.testing.assert_close(near.conj(y), at.conj(y), rtol=5e-4, atol=1e-9)
    # The two limits are different divergences: an exchanged convention would pass neither.
    p, q = torch.tensor([[0.9, 0.1], [0.5, 0.5]], dtype=torch.float64).log()
    assert divergence(p, q, alpha(1e-9)).item() == pytest.approx(
        divergence(p, q, kl()).item(), rel=1e-6
    )
    assert divergence(p, q, alpha(1 - 1e-9)).item() == pytest.approx(
        divergence(q, p, kl()).item(), rel=1e-6
    )


def test_divergences_against_scipy_and_by_hand():
    torch.manual_seed(0)
    p_logits, q_logits = 2 * torch.randn(2, 5, 8, dtype=torch.float64)
    p, q = p_logits.softmax(-1).numpy(), q_logits.softmax(-1).numpy()
    expected = {
        "kl": rel_entr(p, q).sum(-1),
        "reverse_kl": rel_entr(q, p).sum(-1),
        "js": 2 * jensenshannon(p, q, axis=-1) ** 2,
        "pearson_chi2": ((p - q) ** 2 / q).sum(-1),
        "neyman_chi2": ((p - q) ** 2 / p).sum(-1),
        "squared_hellinger": ((p**0.5 - q**0.5) ** 2).sum(-1),
        "total_variation": abs(p - q).sum(-1) / 2,
        "jeffreys": ((p - q) * np.log(p / q)).sum(-1),
        "softened_kl": 2 * rel_entr((p + q) / 2, q).sum(-1),
        "softened_reverse_kl": 2 * rel_entr((p + q) / 2, p).sum(-1),
        "alpha(0.3)": (1 - (p**0.7 * q**0.3).sum(-1)) / 0.21,
    }
    assert set(GENERATORS) < set(expected)
    for name, numbers in expected.items():
        found = divergence(p_logits, q_logits, by_name(name))
        torch.testing.assert_close(found, torch.from_numpy(numbers), rtol=1e-10, atol=1e-12)
    # p = (3/4, 1/4), q = (1/2, 1/2): chi2 = 2 * (1/16) / (1/2) = 1/4, TV = 1/4.
    p, q = torch.tensor([[0.75, 0.25], [0.5, 0.5]]).log()
    assert divergence(p, q, pearson_chi2()).item() == pytest.approx(0.25, rel=1e-5)
    assert divergence(p, q, total_variation()).item() == pytest.approx(0.25, rel=1e-5)


@every
def test_divergence_gradient(f):
    torch.manual_seed(0)
    p, q = (x.clone().requires_grad_() for x in torch.randn(2, 2, 5, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda a, b: divergence(a, b, f), (p, q))
    # The gradient theorem of f-DPG: sum_x p f'(p/q) grad log p.
    (found,) = torch.autograd.grad(divergence(p, q, f).sum(), p)
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    weight = (log_p.exp() * f.df(log_p - log_q)).detach()
    (expected,) = torch.autograd.grad((weight * log_p).sum(), p)
    torch.testing.assert_close(found, expected)


@every
def test_divergence_with_impossible_outcomes(f):
    # Outcome 2 only under Q (adds q f(0)), outcome 3 only under P (adds p f'(inf)), 4 never.
    p = torch.tensor([0.5, 0.2, 0.0, 0.3, 0.0], dtype=torch.float64)
    q = torch.tensor([0.3, 0.5, 0.2, 0.0, 0.0], dtype=torch.float64)
    at_zero = f.f(torch.tensor(-INFINITY, dtype=torch.float64)).item()
    shared = (q[:2] * f.f((p / q)[:2].log())).sum().item()
    slope = f.domain[1]
    expected = shared + 0.2 * at_zero + 0.3 * slope
    if f.name == "reverse_kl":  # f'(inf) = 0, but f(0) = inf
        assert expected == INFINITY
    assert divergence(p.log(), q.log(), f).item() == pytest.approx(expected, rel=1e-6)


@every
def test_equal_and_far_apart_distributions(f):
    logits = torch.tensor([0.3, -1.0, 2.0, -INFINITY], requires_grad=True)
    zero = divergence(logits, logits.detach(), f)
    assert zero.item() == pytest.approx(0.0, abs=1e-6)
    zero.backward()
    assert not logits.grad.isnan().any()
    far = torch.tensor([400.0, 0.0, -400.0], requires_grad=True)
    result = divergence(far, far.detach().flip(0), f)
    assert not result.isnan() and result > 0.9


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(ValueError, match="'pearson'; did you mean pearson_chi2"):
        by_name("pearson")
    with pytest.raises(ValueError, match="reverse_kl"):
        by_name("reverse-kl")
    with pytest.raises(ValueError, match=r"alpha\(0.5\)"):
        by_name("alpha")
    for name in ("alpha(x)", "alpha(nan)", "alpha(inf)"):
        with pytest.raises(ValueError, match="finite number"):
            by_name(name)
    with pytest.raises(ValueError, match="finite"):
        alpha(INFINITY)


def test_records_are_found_by_their_own_name():
    for f in EVERY:
        assert isinstance(f, FDivergence)
        assert by_name(f.name) == f
    assert by_name("alpha(1)") == alpha(1.0)
