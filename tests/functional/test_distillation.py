"""Distribution matching: by hand, and its gradient against quadrature of the divergences themselves."""

import math

import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, Normal

from esscher.functional.distillation import (
    approximate_r1_terms,
    bin_of,
    density_ratio,
    discriminator_terms,
    generator_terms,
    matching_direction,
    moved_bin_means,
    over_mean,
    pseudo_target_terms,
)
from esscher.functional.divergences import by_name


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


# ---- the ratio


def test_the_ratio_is_the_exponential_of_the_mean_logit_in_bounds():
    logits = torch.tensor([[math.log(2), math.log(8)], [0.0, 0.0], [50.0, 50.0], [-9.0, -9.0]])
    ratio = density_ratio(logits, 10.0, 0.1, 20.0)
    # exp((log 2 + log 8) / 2) = 4: the geometric mean of the heads.
    assert ratio.tolist() == pytest.approx([4.0, 1.0, 20.0, 0.1])
    # The limit of the logit comes first: exp(2) lies inside the bounds.
    assert density_ratio(logits, 2.0, 0.1, 20.0)[2].item() == pytest.approx(math.exp(2))
    assert density_ratio(logits, 2.0, 0.01, 20.0)[3].item() == pytest.approx(math.exp(-2))


def test_half_precision_does_not_overflow_and_no_gradient_flows():
    logits = torch.tensor([[12.0]], dtype=torch.float16, requires_grad=True)
    ratio = density_ratio(logits, 15.0, 0.1, 1e6)
    assert ratio.dtype == torch.float32 and ratio.item() == pytest.approx(math.exp(12), rel=1e-5)
    assert not ratio.requires_grad


@pytest.mark.parametrize("bounds", [(0.0, 0.1, 20.0), (10.0, 0.0, 1.0), (10.0, 2.0, 1.0)])
def test_bounds_of_the_ratio_must_be_an_interval(bounds):
    with pytest.raises(ValueError, match="0 < low < high"):
        density_ratio(torch.zeros(1, 1), *bounds)


def test_the_ratio_is_teacher_over_student():
    """Where real samples are more frequent, the best discriminator says log(p / q) > 0."""
    real, fake = double(0.75, 0.25), double(0.25, 0.75)
    logits = torch.zeros(2, 1, dtype=torch.float64, requires_grad=True)
    for _ in range(400):
        terms = discriminator_terms(logits, logits.detach() * 0 - 100)
        wrong = discriminator_terms(logits.detach() * 0 + 100, logits)
        (slope,) = torch.autograd.grad((real * terms + fake * wrong).sum(), logits)
        logits = (logits - 2 * slope).detach().requires_grad_()
    ratio = density_ratio(logits, 10.0, 0.1, 20.0)
    assert ratio.tolist() == pytest.approx([3.0, 1 / 3], rel=1e-4)


# ---- bins


def test_bins_by_hand():
    value = torch.tensor([-1.0, 0.0, 0.49, 0.5, 1.99, 2.0, 7.0])
    assert bin_of(value, 0.0, 2.0, 4).tolist() == [0, 0, 0, 1, 3, 3, 3]
    for low, high, count in ((0.0, 2.0, 0), (1.0, 1.0, 3)):
        with pytest.raises(ValueError, match="num_bins"):
            bin_of(value, low, high, count)


def test_means_of_bins_by_hand():
    means = torch.ones(3)
    ratio, bins = torch.tensor([2.0, 4.0, 5.0]), torch.tensor([0, 0, 2])
    # Of the first bin (2 + 4) / 2, of the second none, of the third 5.
    assert moved_bin_means(means, ratio, bins, 0.0).tolist() == [3.0, 1.0, 5.0]
    assert moved_bin_means(means, ratio, bins, 0.75).tolist() == [1.5, 1.0, 2.0]
    assert means.tolist() == [1.0, 1.0, 1.0]


def test_weights_over_their_mean():
    assert over_mean(double(1.0, 3.0)).tolist() == pytest.approx([0.5, 1.5], rel=1e-5)


# ---- h


@pytest.mark.parametrize(
    ("name", "h"),
    [
        ("reverse_kl", lambda r: 1.0),
        ("softened_reverse_kl", lambda r: 1 / (r + 1)),
        ("js", lambda r: r / (r + 1)),
        ("squared_hellinger", lambda r: 0.5 * math.sqrt(r)),  # The sheet's, of f / 2, is half.
        ("kl", lambda r: r),
        ("jeffreys", lambda r: r + 1),
        ("neyman_chi2", lambda r: 2 / r),
        ("pearson_chi2", lambda r: 2 * r**2),
    ],
)
def test_the_weight_of_each_divergence_by_hand(name, h):
    for r in (0.1, 0.5, 1.0, 3.0, 20.0):
        found = by_name(name).curvature(double(math.log(r)))
        assert found.item() == pytest.approx(h(r), rel=1e-12)


# ---- the pseudo-target


def test_direction_by_hand():
    x, teacher = double([1.0, 3.0], [0.0, 0.0]), double([0.0, 0.0], [2.0, 2.0])
    fake = double([1.0, 0.0], [2.0, 4.0])
    found = matching_direction(x, teacher, fake, double(4.0, 3.0))
    # |x - teacher| is 2 on average in both rows: 4 / 2 (1, 0) and 3 / 2 (0, 2).
    torch.testing.assert_close(found, double([2.0, 0.0], [0.0, 3.0]), rtol=1e-5, atol=1e-9)


def test_gradient_is_the_direction_over_the_number_of_elements():
    torch.manual_seed(0)
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    teacher, fake, weight = (
        torch.randn(*s, dtype=torch.float64) for s in ([5, 2, 3],) * 2 + ([5],)
    )
    for given in (teacher, fake, weight):
        given.requires_grad_()
    direction = matching_direction(x, teacher, fake, weight)
    loss = pseudo_target_terms(x, direction).mean()
    found = torch.autograd.grad(loss, [x, teacher, fake, weight], allow_unused=True)
    torch.testing.assert_close(found[0], direction / x.numel(), rtol=1e-12, atol=1e-15)
    assert found[1:] == (None, None, None)
    # Nor through a direction that carries a graph.
    carried = fake * 1.0
    (slope,) = torch.autograd.grad(
        pseudo_target_terms(x, carried).sum(), carried, allow_unused=True
    )
    assert slope is None


def test_descent_moves_towards_the_teacher_and_away_from_the_fake():
    x = double([0.0]).requires_grad_()
    direction = matching_direction(x.detach(), double([1.0]), double([-1.0]), double(1.0))
    (slope,) = torch.autograd.grad(pseudo_target_terms(x, direction).sum(), x)
    assert slope.item() == pytest.approx(-2.0, rel=1e-5)


# ---- the GAN


def test_gan_losses_by_hand():
    real, fake = double([math.log(3), 0.0]), double([math.log(3), -math.log(3)])
    # softplus(log 3) = log 4, softplus(-log 3) = log 4/3, softplus(0) = log 2.
    of_real = (math.log(4 / 3) + math.log(2)) / 2
    of_fake = (math.log(4) + math.log(4 / 3)) / 2
    assert discriminator_terms(real, fake).item() == pytest.approx(of_real + of_fake)
    assert generator_terms(fake).item() == pytest.approx(of_fake)
    assert generator_terms(double([math.log(3)])).item() == pytest.approx(math.log(4 / 3))


def test_approximate_r1_by_hand():
    found = approximate_r1_terms(double([1.0, 2.0]), double([0.0, 5.0]))
    assert found.item() == pytest.approx((1 + 9) / 2)


# ---- the exact gradient: two Gaussians for the teacher, one for the student


# -E[h(r) (s_p - s_q) dx/d(m, s)] by quadrature, at m = 1 and s = 2, with the sheet's h.
EXACT = {
    "reverse_kl": (-0.136967, -0.594589),
    "js": (0.007062, -0.245687),
    "kl": (0.250000, -0.875000),
    "squared_hellinger": (2 * 0.007995, 2 * -0.147380),  # h here is twice the sheet's.
}


def two_modes(weight, place):
    means, ones = double(-place, place), double(1.0, 1.0)
    return MixtureSameFamily(Categorical(double(weight, 1 - weight)), Normal(means, ones))


def scores(x, p, m, s):
    at = x.detach().clone().requires_grad_()
    (of_p,) = torch.autograd.grad(p.log_prob(at).sum(), at)
    return of_p, -(x - m) / s**2


def quadrature(name, m, s, weight=0.5, place=3.0):
    """D_f on a grid, with the textbook generator."""
    grid = torch.linspace(-30, 30, 60_001, dtype=torch.float64)
    p, q = two_modes(weight, place).log_prob(grid), Normal(m, s).log_prob(grid)
    r = (p - q).exp()
    f = {
        "reverse_kl": lambda: q - p,
        "js": lambda: r * (p - q) - (r + 1) * ((r + 1) / 2).log(),
        "kl": lambda: r * (p - q),
        "squared_hellinger": lambda: (r.sqrt() - 1) ** 2,
        "jeffreys": lambda: (r - 1) * (p - q),
        "softened_reverse_kl": lambda: (r + 1) * ((r + 1) / (2 * r)).log(),
    }[name]()
    return torch.trapezoid(q.exp() * f, grid)


@pytest.mark.parametrize("name", EXACT)
def test_the_sheets_values_are_gradients_of_the_divergence(name):
    m, s = double(1.0)[0].requires_grad_(), double(2.0)[0].requires_grad_()
    found = torch.autograd.grad(quadrature(name, m, s), (m, s))
    assert [g.item() for g in found] == pytest.approx(EXACT[name], abs=2e-6)


@pytest.mark.parametrize("name", EXACT)
def test_gradient_by_samples(name):
    """The library's weight and pseudo-target, with true scores and logits; no noise on top."""
    torch.manual_seed(0)
    n = torch.randn(1_000_000, 1, dtype=torch.float64)
    m, s = (double(v)[0].requires_grad_() for v in (1.0, 2.0))
    x, p = m + s * n, two_modes(0.5, 3.0)
    s_p, s_q = scores(x.detach(), p, 1.0, 2.0)
    logits = (p.log_prob(x) - Normal(1.0, 2.0).log_prob(x)).detach()
    ratio = density_ratio(logits, 50.0, 1e-20, 1e20)
    weight = by_name(name).curvature(ratio.double().log())
    # Denoised estimates at sigma 1 are x + score; undo DMD's denominator, which is no part of it.
    teacher, fake = x.detach() + s_p, x.detach() + s_q
    weight = weight * (s_p.abs().mean(-1) + 1e-6)
    loss = pseudo_target_terms(x, matching_direction(x, teacher, fake, weight)).mean()
    found = torch.autograd.grad(loss, (m, s), retain_graph=True)
    assert [g.item() for g in found] == pytest.approx(EXACT[name], abs=1e-2)
    # With r the wrong way round it is another divergence's gradient.
    if name == "kl":
        inverted = by_name(name).curvature(-ratio.double().log()) * (s_p.abs().mean(-1) + 1e-6)
        loss = pseudo_target_terms(x, matching_direction(x, teacher, fake, inverted)).mean()
        other = torch.autograd.grad(loss, (m, s))
        assert max(abs(g.item() - e) for g, e in zip(other, EXACT[name], strict=True)) > 0.1


@pytest.mark.parametrize(
    ("name", "start", "limit"),
    [
        ("kl", 0.5, (2.0, 4.6904)),
        ("jeffreys", 0.5, (4.1751, 2.5810)),
        ("reverse_kl", 0.5, (5.0, 1.0)),
        ("softened_reverse_kl", 0.5, (5.0, 1.0)),
        # These have two optima, and the one that holds both modes is the worse.
        ("js", 4.0, (5.0, 1.0)),
        ("js", 0.5, (2.1729, 4.5724)),
        ("squared_hellinger", 4.0, (5.0, 1.0)),
        ("squared_hellinger", 0.5, (2.1865, 4.5027)),
    ],
)
def test_where_a_gaussian_student_ends(name, start, limit):
    """0.3 N(-5, 1) + 0.7 N(5, 1), from N(start, 1): down the weighted scores, by quadrature."""
    f, n = by_name(name), torch.linspace(-14, 14, 561, dtype=torch.float64).unsqueeze(-1)
    share = (-0.5 * n.square()).exp() * 0.05 / math.sqrt(2 * math.pi)
    m, s = double(start)[0], double(1.0)[0]
    for _ in range(1_500):
        x = m + s * n
        near = torch.sigmoid(math.log(7 / 3) + 10 * x)  # Probability of the mode at 5.
        s_p, s_q = 10 * near - 5 - x, -n / s
        log_p = torch.logaddexp(
            math.log(0.3) - 0.5 * (x + 5).square(), math.log(0.7) - 0.5 * (x - 5).square()
        )
        weight = f.curvature(log_p + 0.5 * n.square() + s.log()).squeeze(-1)
        weight = weight * (s_p.abs().mean(-1) + 1e-6)
        direction = share * matching_direction(x, x + s_p, x + s_q, weight)
        m, s = m - 0.5 * direction.sum(), s - 0.5 * (direction * n).sum()
    assert (m.item(), s.item()) == pytest.approx(limit, abs=0.05)
