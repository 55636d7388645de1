"""Networks, critics and moments against plain loops, autograd and NumPy."""

import math

import numpy as np
import pytest
import torch

from esscher.critics import GaussianCritic, QuantileCritic, ScalarCritic, Values, target_of
from esscher.nn.mlp import ACTIVATIONS, MLP
from esscher.nn.moments import RunningMoments


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_ensemble_equals_a_loop_over_its_members(activation: str) -> None:
    torch.manual_seed(0)
    many = MLP((3, 7, 5, 2), activation, ensemble=4)
    x = torch.randn(6, 3, requires_grad=True)
    together = many(x)
    for k in range(4):
        one = MLP((3, 7, 5, 2), activation)
        for name in ("weights", "biases"):
            for mine, theirs in zip(getattr(one, name), getattr(many, name), strict=True):
                mine.data.copy_(theirs[k].reshape(mine.shape))
        torch.testing.assert_close(together[k], one(x))
        one(x).square().sum().backward()
        torch.autograd.backward(
            together[k].square().sum(), retain_graph=True, inputs=list(many.parameters())
        )
        for mine, theirs in zip(one.parameters(), many.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad[k].reshape(mine.shape))
            others = [j for j in range(4) if j != k]
            assert not theirs.grad[others].any()
        many.zero_grad()


def test_ensemble_takes_an_input_a_member() -> None:
    torch.manual_seed(0)
    many = MLP((3, 4, 2), ensemble=2)
    x = torch.randn(2, 6, 3)
    torch.testing.assert_close(many(x)[1], many(x[1])[1])
    assert not torch.allclose(many(x)[0], many(x[1])[0])


def test_mlp_equals_torch_linear_layers() -> None:
    torch.manual_seed(0)
    ours = MLP((3, 7, 2), "tanh")
    first, last = torch.nn.Linear(3, 7), torch.nn.Linear(7, 2)
    for layer, weight, bias in zip((first, last), ours.weights, ours.biases, strict=True):
        layer.weight.data.copy_(weight.T)
        layer.bias.data.copy_(bias)
    x = torch.randn(5, 3)
    torch.testing.assert_close(ours(x), last(torch.tanh(first(x))))


def test_members_differ_and_stay_in_their_bounds() -> None:
    torch.manual_seed(0)
    many = MLP((9, 400, 1), ensemble=3)
    for weight, fan_in in zip(many.weights, (9, 400), strict=True):
        assert not torch.equal(weight[0], weight[1])
        assert weight.abs().max() <= 1 / math.sqrt(fan_in)
        assert weight.std().item() == pytest.approx(1 / math.sqrt(3 * fan_in), rel=0.1)


def test_orthogonal_gain() -> None:
    torch.manual_seed(0)
    net = MLP((6, 6, 6), orthogonal_gain=0.01)
    for weight, gain in zip(net.weights, (math.sqrt(2), 0.01), strict=True):
        torch.testing.assert_close(weight @ weight.T, gain**2 * torch.eye(6), atol=1e-5, rtol=1e-4)
    assert not any(bias.any() for bias in net.biases)
    many = MLP((6, 6, 1), ensemble=2, orthogonal_gain=1.0)
    for member in many.weights[0]:
        torch.testing.assert_close(member @ member.T, 2 * torch.eye(6), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("sizes", [(3,), (3, 0, 1), ()])
def test_mlp_refuses_impossible_sizes(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="sizes"):
        MLP(sizes)


# ---- moments


def test_moments_equal_numpy_over_uneven_batches() -> None:
    draw = np.random.default_rng(0)
    data = draw.normal(3.0, 5.0, size=(517, 4)) * np.array([1.0, 0.1, 10.0, 0.02])
    moments = RunningMoments((4,))
    for piece in np.split(data, [1, 2, 40, 41, 300]):
        moments.observe(torch.from_numpy(piece).float())
    # The prior of weight 1e-4 is what keeps an empty recursion defined.
    np.testing.assert_allclose(moments.mean.numpy(), data.mean(0), rtol=1e-4)
    np.testing.assert_allclose(moments.variance.numpy(), data.var(0), rtol=1e-3)
    assert moments.count.item() == pytest.approx(517, rel=1e-4)


def test_moments_normalise_and_clip() -> None:
    moments = RunningMoments((2,), clip=2.0)
    moments.observe(torch.tensor([[0.0, 10.0], [2.0, 30.0]] * 500))
    x = torch.tensor([[1.0, 20.0], [2.0, 10.0], [1e6, -1e6]])
    expected = torch.tensor([[0.0, 0.0], [1.0, -1.0], [2.0, -2.0]])
    torch.testing.assert_close(moments(x), expected, atol=1e-3, rtol=1e-3)


def test_moments_are_saved_and_carry_no_gradient() -> None:
    moments = RunningMoments((2,))
    moments.observe(torch.randn(8, 2, requires_grad=True))
    assert set(moments.state_dict()) == {"mean", "variance", "count"}
    assert not any(value.requires_grad for value in moments.state_dict().values())
    other = RunningMoments((2,))
    other.load_state_dict(moments.state_dict())
    x = torch.randn(3, 2)
    assert torch.equal(other(x), moments(x))


# ---- critics


def test_values_aggregate_row_by_row() -> None:
    mean = torch.tensor([[1.0, 5.0, 2.0], [3.0, 4.0, 2.0]])
    std = torch.tensor([[0.1, 0.2, 0.3], [1.1, 1.2, 1.3]])
    values = Values(mean=mean, std=std)
    assert torch.equal(values.lower("min"), torch.tensor([1.0, 4.0, 2.0]))
    assert torch.equal(values.lower("mean"), torch.tensor([2.0, 4.5, 2.0]))
    assert torch.equal(values.lower("first"), torch.tensor([1.0, 5.0, 2.0]))
    smallest, its_std = values.smallest()
    assert torch.equal(smallest, torch.tensor([1.0, 4.0, 2.0]))
    assert torch.equal(its_std[:2], torch.tensor([0.1, 1.2]))
    assert its_std[2] in (0.3, 1.3)
    with pytest.raises(Exception, match="must be min, mean or first|Type-check"):
        values.lower("max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="standard deviation"):
        Values(mean=mean).smallest()


def test_smallest_sends_gradient_to_the_smaller_critic_only() -> None:
    mean = torch.tensor([[1.0, 5.0], [3.0, 4.0]], requires_grad=True)
    Values(mean=mean, std=torch.ones(2, 2)).smallest()[0].sum().backward()
    assert torch.equal(mean.grad, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))


def test_critics_give_the_shapes_that_they_name() -> None:
    torch.manual_seed(0)
    obs, action = torch.randn(5, 3), torch.randn(5, 2)
    assert ScalarCritic(3, 2, (8,), ensemble=4)(obs, action).mean.shape == (4, 5)
    assert ScalarCritic(3, 0, (8,), ensemble=1)(obs).mean.shape == (1, 5)
    gaussian = GaussianCritic(3, 2, (8,))(obs, action)
    assert gaussian.std.shape == (2, 5) and (gaussian.std > 0).all()
    quantile = QuantileCritic(3, 2, (8,), 7)(obs, action)
    assert quantile.quantiles.shape == (2, 5, 7)
    torch.testing.assert_close(quantile.mean, quantile.quantiles.mean(-1))


def test_critic_reads_obs_and_action() -> None:
    torch.manual_seed(0)
    critic = ScalarCritic(3, 2, (8,))
    obs = torch.randn(5, 3, requires_grad=True)
    action = torch.randn(5, 2, requires_grad=True)
    critic(obs, action).mean.sum().backward()
    assert obs.grad.abs().sum() > 0 and action.grad.abs().sum() > 0


def test_target_is_an_independent_copy() -> None:
    critic = ScalarCritic(3, 2, (8,))
    target = target_of(critic)
    assert not any(p.requires_grad for p in target.parameters())
    assert all(p.requires_grad for p in critic.parameters())
    for mine, theirs in zip(target.parameters(), critic.parameters(), strict=True):
        assert torch.equal(mine, theirs) and mine.data_ptr() != theirs.data_ptr()
