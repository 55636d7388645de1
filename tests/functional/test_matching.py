import math

import pytest
import torch
from scipy.spatial.distance import jensenshannon

from esscher.functional.divergences import GENERATORS, alpha, by_name, divergence_terms
from esscher.functional.matching import (
    divergence_estimates,
    finite_at_zero_target,
    fit_tilt,
    log_density_ratio,
    log_partition_update,
    matching_terms,
    pseudo_reward,
)

INFINITY = float("inf")
# The six divergences of f_dpg.md, written out in pi and p.
DIVERGENCES = {
    "reverse_kl": lambda pi, p: (p * (p / pi).log()).sum(),
    "kl": lambda pi, p: (pi * (pi / p).log()).sum(),
    "total_variation": lambda pi, p: (pi - p).abs().sum() / 2,
    "js": lambda pi, p: (pi * (2 * pi / (pi + p)).log() + p * (2 * p / (pi + p)).log()).sum(),
    "neyman_chi2": lambda pi, p: ((pi - p) ** 2 / pi).sum(),
    "pearson_chi2": lambda pi, p: ((pi - p) ** 2 / p).sum(),
}
every = pytest.mark.parametrize("name", DIVERGENCES)


def double(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


@pytest.fixture
def softmax():
    """Policy logits, an unnormalised target and a proposal over 7 outcomes."""
    torch.manual_seed(0)
    logits, log_target, proposal = torch.randn(3, 7, dtype=torch.float64)
    return logits.requires_grad_(), log_target + 2, proposal.log_softmax(-1)


@every
def test_gradient_identity(softmax, name):
    logits, log_target, proposal = softmax
    exact = DIVERGENCES[name](logits.softmax(-1), log_target.softmax(-1))
    (expected,) = torch.autograd.grad(exact, logits)
    assert expected.abs().max() > 0.01
    logp, log_z = logits.log_softmax(-1), log_target.exp().sum().log()
    reward = pseudo_reward(log_density_ratio(logp, log_target, log_z), by_name(name))
    # sum_x pi f'(t) grad log pi; no baseline and no proposal changes it.
    for log_q, baseline in [(logp, 0.0), (logp, 3.0), (proposal, 0.0), (proposal, -1.7)]:
        log_q = log_q.detach()
        terms = matching_terms(logp, reward - baseline, logp.detach() - log_q)
        (found,) = torch.autograd.grad((log_q.exp() * terms).sum(), logits, retain_graph=True)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_pseudo_rewards_by_hand():
    # t = 1/2 (too rare, to be rewarded) and t = 2: -1/t, log t + 1, sign / 2 and so on, negated.
    expected = {
        "reverse_kl": (2.0, 0.5),
        "kl": (math.log(2) - 1, -math.log(2) - 1),
        "total_variation": (0.5, -0.5),
        "js": (math.log(1.5), -math.log(4 / 3)),
        "neyman_chi2": (3.0, -0.75),
        "pearson_chi2": (1.0, -2.0),
    }
    logp = double(0.25, 0.25).log()
    log_target = double(1.0, 0.25).log()
    for name, rewards in expected.items():
        ratio = log_density_ratio(logp, log_target, math.log(2))
        assert ratio.tolist() == pytest.approx([-math.log(2), math.log(2)])
        found = pseudo_reward(ratio, by_name(name))
        assert found.tolist() == pytest.approx(list(rewards), rel=1e-12)
        assert found[0] > found[1]


def test_where_the_target_is_zero():
    expected = {
        "reverse_kl": 0.0,
        "total_variation": -0.5,
        "js": -math.log(2),
        "neyman_chi2": -1.0,
        "squared_hellinger": -1.0,
        "kl": -INFINITY,
        "pearson_chi2": -INFINITY,
        "jeffreys": -INFINITY,
        "softened_kl": -INFINITY,
        "softened_reverse_kl": math.log(2),
    }
    assert set(expected) == set(GENERATORS)
    for dtype in (torch.float32, torch.float64):
        log_target = torch.tensor([-INFINITY, 0.0], dtype=dtype)
        logp = torch.tensor([-3.0, -3.0], dtype=dtype, requires_grad=True)
        for log_z in (torch.tensor(1.0, dtype=dtype), torch.tensor([1.0, -2.0], dtype=dtype)):
            ratio = log_density_ratio(logp, log_target, log_z)
            assert ratio[0] == INFINITY and ratio[1] == -3 + log_z.flatten()[-1]
            for name, value in expected.items():
                f = by_name(name)
                reward = pseudo_reward(ratio, f)
                assert reward[0].item() == pytest.approx(value)
                assert finite_at_zero_target(f) == math.isfinite(value)
                assert not reward.requires_grad and not ratio.requires_grad
    assert finite_at_zero_target(alpha(0.5)) and not finite_at_zero_target(alpha(0.0))
    # No satisfying sample yet, so Z = 0: every reward is the same, and its baseline leaves none.
    nothing = torch.full((3,), -INFINITY)
    ratio = log_density_ratio(torch.tensor([-1.0, -2.0, -3.0]), nothing, torch.tensor(-INFINITY))
    reward = pseudo_reward(ratio, by_name("js"))
    assert (reward - reward.mean()).tolist() == [0.0, 0.0, 0.0]


def test_matching_terms_by_hand():
    logp = double(-1.0, -2.0).requires_grad_()
    advantage = double(3.0, -0.5).requires_grad_()
    log_weight = double(0.0, math.log(4)).requires_grad_()
    terms = matching_terms(logp, advantage, log_weight)
    assert terms.tolist() == pytest.approx([3.0, -4.0])
    terms.sum().backward()
    # Descent raises log pi where the advantage is positive.
    assert logp.grad.tolist() == pytest.approx([-3.0, 2.0])
    assert advantage.grad is None and log_weight.grad is None


def test_running_partition_by_hand():
    state = torch.tensor(-INFINITY), torch.tensor(0)
    state = log_partition_update(*state, torch.full((2,), -INFINITY))
    assert state[0] == -INFINITY and state[1] == 2
    state = log_partition_update(*state, torch.tensor([math.log(4), -INFINITY]))
    assert state[0].exp().item() == pytest.approx(1.0) and state[1] == 4
    state = log_partition_update(*state, torch.tensor([math.log(11)]))
    assert state[0].exp().item() == pytest.approx(3.0) and state[1] == 5
    assert log_partition_update(*state, torch.zeros(0)) == state
    # Nothing seen: whatever the mean was initialised to does not count.
    for start in (-INFINITY, 0.0, INFINITY, float("nan")):
        found, _ = log_partition_update(
            torch.tensor(start), torch.tensor(0.0), torch.tensor([0.5, 0.5])
        )
        assert found.item() == pytest.approx(0.5)
        found, count = log_partition_update(torch.tensor(start), torch.tensor(0), torch.zeros(0))
        assert found == -INFINITY and count == 0


def test_samples_that_are_not_valid_are_as_if_not_drawn():
    mean, count = log_partition_update(
        torch.zeros(2),
        torch.tensor([0, 2]),
        torch.tensor([[math.log(3), 9.0, float("nan")], [math.log(4), math.log(6), INFINITY]]),
        torch.tensor([[True, False, False], [True, True, False]]),
    )
    # The second had a mean of 1 over two samples: (2 + 4 + 6) / 4.
    assert mean.exp().tolist() == pytest.approx([3.0, 3.0]) and count.tolist() == [1, 4]
    nothing = torch.tensor([[False, False, False]])
    mean, count = log_partition_update(mean[:1], count[:1], torch.ones(1, 3), nothing)
    assert mean.exp().item() == pytest.approx(3.0) and count.tolist() == [1]


def test_running_partition_in_pieces_per_context_and_far_from_one():
    torch.manual_seed(0)
    log_weight = 3 * torch.randn(2, 60, dtype=torch.float64) + double(800.0, -800.0)[:, None]
    expected = log_weight - double(800.0, -800.0)[:, None]
    expected = expected.exp().mean(1).log() + double(800.0, -800.0)
    mean, count = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.long)
    for piece in log_weight.split([1, 9, 20, 30], dim=1):
        mean, count = log_partition_update(mean, count, piece)
    torch.testing.assert_close(mean, expected)
    assert count.tolist() == [60, 60]


# f_dpg.md (b): a Gaussian policy cannot cover both pieces that the reward asks for.
# Its row of TV (sd 2.21, E[r] 0.824, entropy 2.210, 4.138, 0.179, 0.217, 0.445) stopped short of
# the minimum, which lies on a kink; here is that of a search without gradients.
TRADE_OFF = {
    "reverse_kl": [22.05, 6.53, 0.340, 3.280, 0.969, 0.496, 0.616, 1.496],
    "total_variation": [24.155, 2.2166, 0.8225, 2.2149, 4.1025, 0.1799, 0.2170, 0.4487],
    "js": [24.29, 1.72, 0.920, 1.963, 7.031, 0.156, 0.252, 0.303],
    "kl": [24.33, 1.56, 0.948, 1.865, 8.670, 0.160, 0.274, 0.289],
}


def test_trade_off_under_a_misspecified_policy():
    x = torch.arange(41, dtype=torch.float64)

    def gaussian(mean, log_std):
        return (-0.5 * ((x - mean) / log_std.exp()) ** 2).log_softmax(0)

    reward = (((x >= 22) & (x <= 27)) | ((x >= 3) & (x <= 6))).double()
    log_target = gaussian(torch.tensor(20.0), torch.tensor(8.0).log()) + reward / 0.25
    partition = log_target.exp().sum()
    assert partition.item() == pytest.approx(16.318, abs=1e-3)
    p = log_target.exp() / partition
    assert (p * reward).sum().item() == pytest.approx(0.9562, abs=1e-4)
    rows = {}
    for name, row in TRADE_OFF.items():
        policy = torch.tensor([20.0, math.log(8)], dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.Adam([policy], lr=0.1)
        decay = torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda k: 0.001 ** (max(0, k - 150) / 350)
        )
        for _ in range(500):
            logp = gaussian(*policy)
            ratio = log_density_ratio(logp, log_target, partition.log())
            terms = matching_terms(
                logp, pseudo_reward(ratio, by_name(name)), torch.zeros_like(logp)
            )
            optimiser.zero_grad()
            (logp.detach().exp() * terms).sum().backward()
            optimiser.step()
            decay.step()
        mean, log_std = policy.detach()
        pi = gaussian(mean, log_std).exp()
        rows[name] = [mean, log_std.exp(), (pi * reward).sum(), -(pi * pi.log()).sum()]
        order = ("reverse_kl", "js", "total_variation", "kl")
        rows[name] += [DIVERGENCES[other](pi, p) for other in order]
        rows[name] = [number.item() for number in rows[name]]
        assert rows[name][:2] == pytest.approx(row[:2], abs=0.006)
        assert rows[name][2:] == pytest.approx(row[2:], abs=6e-4)
    table = torch.tensor(list(rows.values()))
    # Every divergence is smallest where it is trained on, and reward is bought with entropy.
    assert table[:, 4:].argmin(0).tolist() == [0, 2, 1, 3]
    assert (table[:, 2].diff() > 0).all() and (table[:, 3].diff() < 0).all()


def enumerated(counts):
    """Samples whose means are expectations under q = counts / sum of counts, and log q."""
    counts = torch.tensor(counts)
    x = torch.repeat_interleave(torch.arange(len(counts)), counts)
    return x, (counts.double() / counts.sum()).log()[x]


def test_estimates_are_exact_where_the_samples_are_the_proposal():
    torch.manual_seed(0)
    x, log_q = enumerated([1, 5, 2, 3, 4, 1])
    pi, target = torch.rand(2, 6, dtype=torch.float64)
    pi, p = pi / pi.sum(), target / target.sum()
    features = torch.randn(6, 2, dtype=torch.float64)
    found = divergence_estimates(
        pi.log()[x], (7 * p).log()[x], log_q, torch.tensor(7.0).double().log(), features[x]
    )
    assert found.kl_policy_target.item() == pytest.approx(DIVERGENCES["kl"](pi, p).item())
    assert found.kl_target_policy.item() == pytest.approx(DIVERGENCES["kl"](p, pi).item())
    assert found.total_variation.item() == pytest.approx((pi - p).abs().sum().item() / 2)
    assert found.jensen_shannon.item() == pytest.approx(jensenshannon(pi, p) ** 2)
    torch.testing.assert_close(found.moments, pi @ features)
    for name, exact in DIVERGENCES.items():
        terms = divergence_terms(pi.log()[x] - log_q, p.log()[x] - log_q, by_name(name))
        assert terms.mean().item() == pytest.approx(exact(pi, p).item())
    assert divergence_estimates(pi.log()[x], p.log()[x], log_q, 0.0).moments.shape == (0,)


def test_estimates_with_weights():
    """Each outcome once, weighted by how likely the proposal is; what has no weight may be inf."""
    torch.manual_seed(0)
    pi, p, q = torch.randn(3, 6, dtype=torch.float64).softmax(-1)
    features = torch.randn(6, 2, dtype=torch.float64)
    beyond = double(INFINITY)
    found = divergence_estimates(
        torch.cat([pi.log(), double(-1.0)]),
        torch.cat([p.log(), -beyond]),
        torch.cat([q.log(), double(-1.0)]),
        0.0,
        torch.cat([features, torch.ones(1, 2, dtype=torch.float64)]),
        torch.cat([q, double(0.0)]),
    )
    assert found.kl_policy_target.item() == pytest.approx(DIVERGENCES["kl"](pi, p).item())
    assert found.kl_target_policy.item() == pytest.approx(DIVERGENCES["kl"](p, pi).item())
    assert found.jensen_shannon.item() == pytest.approx(jensenshannon(pi, p) ** 2)
    torch.testing.assert_close(found.moments, pi @ features)


def test_estimates_where_target_or_policy_is_zero():
    x, log_q = enumerated([2, 1, 1, 1])
    pi, p = double(0.5, 0.3, 0.2, 0.0), double(0.6, 0.4, 0.0, 0.0)
    found = divergence_estimates(pi.log()[x], p.log()[x], log_q, 0.0)
    assert found.kl_policy_target == INFINITY
    expected = 0.6 * math.log(0.6 / 0.5) + 0.4 * math.log(0.4 / 0.3)
    assert found.kl_target_policy.item() == pytest.approx(expected)
    assert found.total_variation.item() == pytest.approx(0.2)
    assert found.jensen_shannon.item() == pytest.approx(jensenshannon(pi, p) ** 2)
    other = divergence_estimates(p.log()[x], pi.log()[x], log_q, 0.0)
    assert other.kl_target_policy == INFINITY
    assert other.kl_policy_target.item() == pytest.approx(expected)
    assert other.jensen_shannon.item() == pytest.approx(found.jensen_shannon.item())


def test_estimates_from_samples():
    torch.manual_seed(0)
    pi, target, q = torch.randn(3, 8, dtype=torch.float64).softmax(-1)
    x = torch.multinomial(q, 100_000, replacement=True)
    found = divergence_estimates(pi.log()[x], 3 + target.log()[x], q.log()[x], 3.0)
    assert found.kl_target_policy.item() == pytest.approx(
        DIVERGENCES["kl"](target, pi).item(), abs=0.02
    )
    assert found.kl_policy_target.item() == pytest.approx(
        DIVERGENCES["kl"](pi, target).item(), abs=0.02
    )


def test_half_of_the_texts_by_hand():
    # A feature seen once in ten, wanted in half: its odds have to rise ninefold.
    feature = (torch.arange(10) == 0).double().unsqueeze(1)
    found = fit_tilt(torch.zeros(10), feature.float(), torch.tensor([0.5]))
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(math.log(9))
    found = fit_tilt(torch.zeros(10), feature, double(0.01))
    assert found.item() == pytest.approx(math.log(9 / 99), rel=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_a_known_tilt_is_found_again(seed):
    torch.manual_seed(seed)
    counts = torch.randint(1, 9, (24,)).tolist()
    x, log_q = enumerated(counts)
    log_a = torch.randn(24, dtype=torch.float64).log_softmax(0)
    features = torch.randn(24, 3, dtype=torch.float64) * double(1.0, 30.0, 0.02)
    features[:, 0] = (features[:, 0] > 0.5).double()
    tilt = 1.5 * torch.randn(3, dtype=torch.float64) / double(1.0, 30.0, 0.02)
    p = (log_a + features @ tilt).softmax(0)
    found = fit_tilt(log_a[x] - log_q, features[x], p @ features, tolerance=1e-10)
    torch.testing.assert_close(found, tilt, rtol=1e-5, atol=1e-6)


def test_each_group_is_normalised_by_itself():
    """Odds 1 to 1 and 1 to 4, of which half are wanted: those of both rise by the factor u = 2,
    since 2/3 + 2/6 = 1. Weights per group do not count, nor does a group without any.
    """
    one = torch.tensor([[1.0, 0, 0, 0, 0], [1.0, 0, 0, 0, 0], [1.0, 0, 0, 0, 0]]).double()
    log_weight = torch.tensor([[1.0, 1, -INFINITY, -INFINITY, -INFINITY], [7.0] * 5, [0.0] * 5])
    log_weight[2] = -INFINITY
    found = fit_tilt(log_weight, one.unsqueeze(-1), double(0.5))
    assert found.item() == pytest.approx(math.log(2))
    # As one group they would be 2 to 5, or whatever the weights make of them.
    flat = fit_tilt(log_weight[:2].flatten(), one[:2].reshape(-1, 1), double(0.5))
    assert abs(flat.item() - math.log(2)) > 0.1
    with pytest.raises(ValueError, match=r"range.*\(0, 0.5\), got 0.6"):
        never = one.clone()
        never[1] = 0
        fit_tilt(log_weight, never.unsqueeze(-1), double(0.6))


def test_tolerance_is_in_the_units_of_the_moments():
    length = torch.arange(1001, dtype=torch.float64).unsqueeze(1)
    found = fit_tilt(torch.zeros(1001), length, double(300.0), tolerance=0.5)
    assert ((length @ found).softmax(0) @ length).item() == pytest.approx(300.0, abs=0.5)


def test_samples_that_the_base_never_draws_do_not_count():
    feature = double(0.0, 1.0, 5.0).unsqueeze(1)
    log_weight = double(0.0, 0.0, -INFINITY)
    assert fit_tilt(log_weight, feature, double(0.75)).item() == pytest.approx(math.log(3))
    with pytest.raises(ValueError, match=r"moments\[0\].*\(0, 1\), got 2"):
        fit_tilt(log_weight, feature, double(2.0))
    with pytest.raises(ValueError, match="samples with a > 0"):
        fit_tilt(double(-INFINITY), double(1.0)[None], double(1.0))


def test_moments_that_cannot_be_had():
    weights = torch.zeros(4)
    features = torch.tensor([[0.0, 0, 1], [0, 1, 1], [0, 1, 1], [0, 0, 1]])
    with pytest.raises(ValueError, match="feature 2 is 1 in every sample"):
        fit_tilt(weights, features[:, [1, 1, 2]], torch.ones(3) / 2)
    with pytest.raises(ValueError, match="feature 0 is 0 in every sample: draw more"):
        fit_tilt(weights, features, torch.ones(3) / 2)
    for moment in (0.0, 1.0, 1.5, -1.0, float("nan")):
        with pytest.raises(ValueError, match=r"moments\[1\].*range.*\(0, 1\)"):
            fit_tilt(weights, features[:, [1, 1]], torch.tensor([0.5, moment]))
    # Whatever has the first has the second too.
    both = torch.tensor([[0.0, 0], [0, 1], [1, 1], [0, 0]])
    with pytest.raises(ValueError, match="contradict"):
        fit_tilt(weights, both, torch.tensor([0.6, 0.4]))
    with pytest.raises(ValueError, match="finite"):
        fit_tilt(weights, both * float("nan"), torch.tensor([0.6, 0.4]))
    # The same feature twice is no contradiction.
    twice = fit_tilt(weights, both[:, [0, 0]], torch.tensor([0.5, 0.5]))
    assert twice.sum().item() == pytest.approx(math.log(3))


def test_nothing_but_the_fit_waits_for_the_device():
    numbers = torch.zeros(3, device="meta")
    scalar = torch.zeros((), device="meta")
    for name in GENERATORS:
        ratio = log_density_ratio(numbers, numbers, scalar)
        assert matching_terms(numbers, pseudo_reward(ratio, by_name(name)), numbers).is_meta
    assert log_partition_update(scalar, scalar, numbers)[0].is_meta
    assert divergence_estimates(numbers, numbers, numbers, scalar).jensen_shannon.is_meta
