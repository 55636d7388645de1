"""Populations of networks against networks one at a time."""

import math

import pytest
import torch
from torch import nn

from esscher.errors import UserError
from esscher.nn.mlp import MLP
from esscher.nn.population import PopulationMLP, draw_weights_


def one_by_one(genotype: torch.Tensor, sizes: tuple[int, ...]) -> nn.Sequential:
    """A network of torch's own layers, filled number by number."""
    layers: list[nn.Module] = []
    numbers = iter(genotype.tolist())
    for inputs, outputs in zip(sizes[:-1], sizes[1:], strict=True):
        layer = nn.Linear(inputs, outputs)
        with torch.no_grad():
            for j in range(outputs):
                for i in range(inputs):
                    layer.weight[j, i] = next(numbers)
            for j in range(outputs):
                layer.bias[j] = next(numbers)
        layers += [layer, nn.ReLU()]
    assert next(numbers, None) is None
    return nn.Sequential(*layers[:-1])


@pytest.mark.parametrize("sizes", [(3, 2), (3, 5, 4, 2)])
def test_all_at_once_is_each_alone(sizes):
    population = PopulationMLP(sizes)
    draw = torch.Generator().manual_seed(0)
    genotype = torch.randn(4, population.size, generator=draw)
    for count in (6, 1):
        x = torch.randn(4, count, 3, generator=draw)
        together = population(genotype, x)
        assert together.shape == (4, count, 2)
        for k in range(4):
            alone = one_by_one(genotype[k], sizes)(x[k])
            torch.testing.assert_close(together[k], alone, rtol=1e-5, atol=1e-6)


def test_gradients_stay_with_their_own_network():
    population = PopulationMLP((3, 4, 2))
    genotype = torch.randn(3, population.size, requires_grad=True)
    x = torch.randn(3, 5, 3)
    population(genotype, x)[1].sum().backward()
    assert genotype.grad is not None
    assert genotype.grad[1].abs().sum() > 0
    assert torch.equal(genotype.grad[[0, 2]], torch.zeros(2, population.size))


def test_to_one_network_and_back():
    population, network = PopulationMLP((3, 4, 2)), MLP((3, 4, 2))
    genotype = torch.randn(1, population.size)
    population.load_into(network, genotype)
    assert torch.equal(population.genotype_of(network), genotype)
    x = torch.randn(5, 3)
    torch.testing.assert_close(network(x), population(genotype, x[None])[0])
    assert torch.equal(population.join(population.split(genotype)), genotype)


@pytest.mark.parametrize("how", ["lecun", "uniform"])
def test_first_weights(how):
    population = PopulationMLP((100, 50, 25))
    network = draw_weights_(MLP((100, 50, 25)), how)
    drawn = population.split(population.random(40, how))
    for index, inputs in enumerate((100, 50)):
        weight, bias = drawn[index]
        variance = 1 / inputs if how == "lecun" else 1 / (3 * inputs)
        limit = math.sqrt(3 * variance)
        for w, b in ((weight, bias), (network.weights[index], network.biases[index])):
            assert w.var().item() == pytest.approx(variance, rel=0.08)
            assert 0.98 * limit < w.abs().max() <= limit * (1 + 1e-6)
            assert (b == 0).all() if how == "lecun" else 0.5 * limit < b.abs().max() <= limit
    assert not torch.equal(drawn[0][0][0], drawn[0][0][1])


def test_sizes_are_checked():
    with pytest.raises(UserError, match="policy_hidden"):
        PopulationMLP((3, 0, 2))
