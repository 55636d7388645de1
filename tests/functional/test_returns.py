import math

import pytest
import torch

from esscher.functional.returns import (
    gae,
    lambda_returns,
    monte_carlo_returns,
    n_step_returns,
    td_target,
    vtrace,
)


def column(*numbers):
    return torch.tensor(numbers, dtype=torch.float64).unsqueeze(-1)


def flags(*numbers):
    return torch.tensor(numbers, dtype=torch.bool).unsqueeze(-1)


NEVER = flags(0, 0, 0)


def random_rollout(seed, num_rows=9, num_envs=4):
    """Both kinds of ends, some rows with both, next_value consistent with value inside episodes."""
    generator = torch.Generator().manual_seed(seed)

    def draw():
        return torch.randn(num_rows, num_envs, generator=generator, dtype=torch.float64)

    terminated, truncated = draw() > 0.9, draw() > 0.9
    reward, value, next_value = draw(), draw(), draw()
    inside = ~(terminated | truncated)[:-1]
    next_value[:-1][inside] = value[1:][inside]
    return reward, value, next_value, terminated, truncated


def rows_left(terminated, truncated, t, n):
    """Rows from t to the end of its episode or of the rollout."""
    count = 1
    while t + count < len(terminated) and not (terminated | truncated)[t + count - 1, n]:
        count += 1
    return count


def slow_n_step(reward, next_value, terminated, truncated, discount, num_steps, t, n):
    steps = min(num_steps, rows_left(terminated, truncated, t, n))
    total = sum(discount**k * reward[t + k, n].item() for k in range(steps))
    last = t + steps - 1
    if not terminated[last, n]:
        total += discount**steps * next_value[last, n].item()
    return total


def table(like, entry):
    rows = [[entry(t, n) for n in range(like.shape[1])] for t in range(like.shape[0])]
    return torch.tensor(rows, dtype=like.dtype)


def test_td_target_by_hand():
    reward, next_value = torch.tensor([1.0, 1.0]), torch.tensor([10.0, float("nan")])
    terminated = torch.tensor([False, True])
    # 1 + 0.9 * 10 = 10; the terminal row ignores its next value, even a NaN.
    assert td_target(reward, next_value, terminated, 0.9).tolist() == [10.0, 1.0]


def test_td_target_gradient_and_explicit_broadcast():
    next_value = torch.zeros(2, 3, requires_grad=True)
    terminated = torch.tensor([[False], [True]])
    target = td_target(torch.ones(2, 1), next_value, terminated, 0.5)
    assert target.shape == (2, 3)
    target.sum().backward()
    assert next_value.grad.tolist() == [[0.5] * 3, [0.0] * 3]


def test_td_target_refuses_silent_outer_products_and_bad_discounts():
    # TypeError: jaxtyping's, if its hook is on.
    with pytest.raises((ValueError, TypeError), match=r"axes|Type-check"):
        td_target(torch.ones(3), torch.ones(3, 1), torch.zeros(3, 1, dtype=torch.bool), 0.9)
    for discount in (-0.1, 1.2, float("nan")):
        with pytest.raises(ValueError, match=r"discount must be in \[0, 1\], got"):
            td_target(torch.ones(3), torch.ones(3), torch.zeros(3, dtype=torch.bool), discount)


def test_monte_carlo_by_hand():
    reward, next_value = column(1, 2, 4), column(100, 100, 8)
    # Uncut: 4 + 8/2 = 8, then 2 + 8/2 = 6, then 1 + 6/2 = 4.
    returns = monte_carlo_returns(reward, next_value, NEVER, NEVER, 0.5)
    assert returns.squeeze().tolist() == [4.0, 6.0, 8.0]
    # Terminated in the middle: 2, then 1 + 2/2 = 2; the last row is another episode.
    returns = monte_carlo_returns(reward, next_value, flags(0, 1, 0), NEVER, 0.5)
    assert returns.squeeze().tolist() == [2.0, 2.0, 8.0]
    # Truncated in the middle: 2 + 100/2 = 52, then 1 + 52/2 = 27.
    returns = monte_carlo_returns(reward, next_value, NEVER, flags(0, 1, 0), 0.5)
    assert returns.squeeze().tolist() == [27.0, 52.0, 8.0]
    # Both: terminated wins.
    returns = monte_carlo_returns(reward, next_value, flags(0, 1, 0), flags(0, 1, 0), 0.5)
    assert returns.squeeze().tolist() == [2.0, 2.0, 8.0]


def test_gae_by_hand():
    reward, value, next_value = column(1, 1, 1), column(2, 4, 6), column(4, 6, 8)
    # delta = 1 + 0.5 * (4, 6, 8) - (2, 4, 6) = (1, 0, -1); decay 0.5 * 0.5 = 1/4:
    # A3 = -1, A2 = 0 - 1/4, A1 = 1 - 1/16.
    advantage = gae(reward, value, next_value, NEVER, NEVER, 0.5, 0.5)
    assert advantage.squeeze().tolist() == [0.9375, -0.25, -1.0]
    # Truncated in the middle: the same delta, no trace: A2 = 0, A1 = 1.
    advantage = gae(reward, value, next_value, NEVER, flags(0, 1, 0), 0.5, 0.5)
    assert advantage.squeeze().tolist() == [1.0, 0.0, -1.0]
    # Terminated in the middle: delta2 = 1 - 4 = -3, A1 = 1 - 3/4.
    advantage = gae(reward, value, next_value, flags(0, 1, 0), NEVER, 0.5, 0.5)
    assert advantage.squeeze().tolist() == [0.25, -3.0, -1.0]


@pytest.mark.parametrize("discount", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("end", ["truncated", "terminated"])
def test_geometric_series(discount, end):
    """Reward 1 forever is worth 1/(1-discount), however often the recording is cut."""
    worth = 1 / (1 - discount)
    reward, value = torch.ones(12, 2), torch.full((12, 2), worth)
    cut = torch.zeros(12, 2, dtype=torch.bool)
    cut[3::4], never = True, torch.zeros_like(cut)
    terminated, truncated = (cut, never) if end == "terminated" else (never, cut)
    ends = (terminated, truncated, discount)
    results = [
        monte_carlo_returns(reward, value, *ends),
        lambda_returns(reward, value, *ends, 0.7),
        n_step_returns(reward, value, *ends, 3),
        gae(reward, value, value, *ends, 0.7) + value,
        vtrace(torch.zeros_like(reward), reward, value, value, *ends)[0],
    ]
    for returns in results:
        if end == "truncated":
            torch.testing.assert_close(returns, value, rtol=1e-5, atol=0)
        else:  # Row 3 sees one reward only.
            assert returns[3].tolist() == pytest.approx([1.0, 1.0], rel=1e-5)
            assert (returns[3] < 0.7 * worth).all()


def test_a_value_learned_from_cut_episodes_is_that_of_the_endless_task():
    cut, never = torch.tensor([[False], [False], [True]]), torch.zeros(3, 1, dtype=torch.bool)
    reward, learned, wrong = torch.ones(3, 1), torch.zeros(3, 1), torch.zeros(3, 1)
    for _ in range(200):
        learned[:] = monte_carlo_returns(reward, learned, never, cut, 0.9).mean()
        wrong[:] = monte_carlo_returns(reward, wrong, cut, never, 0.9).mean()
    assert learned[0].item() == pytest.approx(10.0, rel=1e-5)
    # Mean of 1, 1.9 and 2.71, what treating truncation as termination gives.
    assert wrong[0].item() == pytest.approx(1.87, rel=1e-5)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_steps", [1, 2, 3, 50])
def test_n_step_returns_against_forward_sums(seed, num_steps):
    reward, _, next_value, terminated, truncated = random_rollout(seed)
    next_value = next_value + torch.randn(reward.shape, dtype=torch.float64)
    expected = table(
        reward,
        lambda t, n: slow_n_step(reward, next_value, terminated, truncated, 0.8, num_steps, t, n),
    )
    found = n_step_returns(reward, next_value, terminated, truncated, 0.8, num_steps)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("lambda_", [0.0, 0.6, 1.0])
def test_lambda_returns_are_the_mixture_of_n_step_returns(seed, lambda_):
    reward, _, next_value, terminated, truncated = random_rollout(seed)
    arguments = (reward, next_value, terminated, truncated, 0.8)

    def mixture(t, n):
        longest = rows_left(terminated, truncated, t, n)
        total = lambda_ ** (longest - 1) * slow_n_step(*arguments, longest, t, n)
        for steps in range(1, longest):
            weight = (1 - lambda_) * lambda_ ** (steps - 1)
            total += weight * slow_n_step(*arguments, steps, t, n)
        return total

    found = lambda_returns(*arguments, lambda_)
    torch.testing.assert_close(found, table(reward, mixture))


@pytest.mark.parametrize("seed", range(4))
def test_gae_is_the_discounted_sum_of_residuals(seed):
    reward, value, next_value, terminated, truncated = random_rollout(seed)
    discount, lambda_ = 0.9, 0.7

    def residual_sum(t, n):
        total = 0.0
        for k in range(rows_left(terminated, truncated, t, n)):
            bootstrap = 0.0 if terminated[t + k, n] else next_value[t + k, n].item()
            delta = reward[t + k, n].item() + discount * bootstrap - value[t + k, n].item()
            total += (discount * lambda_) ** k * delta
        return total

    found = gae(reward, value, next_value, terminated, truncated, discount, lambda_)
    torch.testing.assert_close(found, table(reward, residual_sum))
    returns = lambda_returns(reward, next_value, terminated, truncated, discount, lambda_)
    torch.testing.assert_close(found + value, returns)


@pytest.mark.parametrize("seed", range(4))
def test_vtrace_against_its_definition(seed):
    reward, value, next_value, terminated, truncated = random_rollout(seed)
    log_ratio = 0.5 * torch.randn(reward.shape, dtype=torch.float64)
    discount, lambda_, rho_clip, c_clip = 0.9, 0.8, 1.5, 1.1

    def bootstrap(t, n, number):
        return 0.0 if terminated[t, n] else number

    def target(t, n):
        total, product = value[t, n].item(), 1.0
        for k in range(rows_left(terminated, truncated, t, n)):
            ratio = math.exp(log_ratio[t + k, n].item())
            following = bootstrap(t + k, n, next_value[t + k, n].item())
            delta = reward[t + k, n].item() + discount * following - value[t + k, n].item()
            total += discount**k * product * min(rho_clip, ratio) * delta
            product *= lambda_ * min(c_clip, ratio)
        return total

    def advantage(t, n):
        ends = rows_left(terminated, truncated, t, n) == 1
        following = next_value[t, n].item() if ends else target(t + 1, n)
        rho = min(rho_clip, math.exp(log_ratio[t, n].item()))
        following = bootstrap(t, n, following)
        return rho * (reward[t, n].item() + discount * following - value[t, n].item())

    found = vtrace(
        log_ratio, reward, value, next_value, terminated, truncated, discount, lambda_,
        rho_clip, c_clip,
    )  # fmt: skip
    torch.testing.assert_close(found[0], table(reward, target))
    torch.testing.assert_close(found[1], table(reward, advantage))


def test_vtrace_on_policy_is_monte_carlo_and_carries_no_gradient():
    reward, value, next_value, terminated, truncated = random_rollout(7)
    log_ratio = torch.zeros_like(reward, requires_grad=True)
    found, advantage = vtrace(log_ratio, reward, value, next_value, terminated, truncated, 0.9)
    expected = monte_carlo_returns(reward, next_value, terminated, truncated, 0.9)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(advantage, expected - value)
    assert not found.requires_grad and not advantage.requires_grad
    with pytest.raises(ValueError, match="c_clip"):
        vtrace(
            log_ratio, reward, value, next_value, terminated, truncated, 0.9, rho_clip=1.0,
            c_clip=2.0,
        )  # fmt: skip


def test_gradients_of_returns():
    reward, next_value = column(0, 0, 0).requires_grad_(), column(0, 0, 0).requires_grad_()
    truncated = flags(0, 1, 0)
    monte_carlo_returns(reward, next_value, NEVER, truncated, 0.5)[0].sum().backward()
    assert reward.grad.squeeze().tolist() == [1.0, 0.5, 0.0]
    assert next_value.grad.squeeze().tolist() == [0.0, 0.25, 0.0]


def test_nothing_of_the_next_episode_leaks_back():
    reward, value, next_value, _, _ = random_rollout(1)
    for which in range(2):
        cut = torch.zeros(2, *reward.shape, dtype=torch.bool)
        cut[which, 4] = True
        other = reward.clone()
        other[5:] += 100.0
        for lambda_ in (0.3, 1.0):
            one = gae(reward, value, next_value, *cut, 0.9, lambda_)
            two = gae(other, value, next_value, *cut, 0.9, lambda_)
            assert torch.equal(one[:5], two[:5])
            one = lambda_returns(reward, next_value, *cut, 0.9, lambda_)
            two = lambda_returns(other, next_value, *cut, 0.9, lambda_)
            assert torch.equal(one[:5], two[:5])


def test_bad_numbers_are_refused():
    rollout = random_rollout(0)
    with pytest.raises(ValueError, match=r"lambda_ must be in \[0, 1\], got 1.5"):
        gae(*rollout, 0.9, 1.5)
    with pytest.raises(ValueError, match="discount"):
        gae(*rollout, 1.01, 0.5)
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        n_step_returns(rollout[0], *rollout[2:], 0.9, 0)


@pytest.mark.skipif(hasattr(gae, "__wrapped__"), reason="jaxtyping's hook does not compile")
def test_everything_compiles_into_one_graph():
    reward, value, next_value, terminated, truncated = random_rollout(3)

    def all_of_them(reward, value, next_value, terminated, truncated):
        return (
            gae(reward, value, next_value, terminated, truncated, 0.9, 0.8),
            lambda_returns(reward, next_value, terminated, truncated, 0.9, 0.8),
            n_step_returns(reward, next_value, terminated, truncated, 0.9, 3),
            *vtrace(0.1 * value, reward, value, next_value, terminated, truncated, 0.9),
        )

    arguments = (reward, value, next_value, terminated, truncated)
    compiled = torch.compile(all_of_them, backend="eager", fullgraph=True)
    for fast, plain in zip(compiled(*arguments), all_of_them(*arguments), strict=True):
        torch.testing.assert_close(fast, plain)
