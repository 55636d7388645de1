"""Heads of discriminators: what they begin with, and what they are told."""

import pytest
import torch

from esscher.nn.discriminator import FeatureHead, NoisySampleHead


@pytest.mark.parametrize("shape", [(16, 4, 4), (18, 2, 3), (3, 2, 2), (6, 16)])
def test_a_head_of_features_begins_at_0_and_learns(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    head, features = FeatureHead(shape, 8), torch.randn(32, *shape)
    features[16:] += 1
    sign = torch.ones(32, 1)
    sign[16:] = -1
    assert head(features).tolist() == [[0.0]] * 32
    optimizer = torch.optim.Adam(head.parameters(), 1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        torch.nn.functional.softplus(-sign * head(features)).mean().backward()
        optimizer.step()
    assert ((head(features) * sign) > 0).float().mean() > 0.9


def test_channels_last_features_that_need_no_gradient() -> None:
    """Group norm alone would crash in its backward pass (torch 2.13 on a CPU)."""
    head = FeatureHead((16, 4, 4), 8)
    features = torch.randn(4, 16, 4, 4).to(memory_format=torch.channels_last)
    found = torch.autograd.grad(head(features).mean(), list(head.parameters()))
    assert all(g.isfinite().all() for g in found)


def test_a_head_of_samples_is_told_level_and_condition() -> None:
    torch.manual_seed(0)
    x, sigma = torch.ones(4, 2), torch.tensor([1.0, 1.0, 3.0, 1.0])
    label = torch.tensor([0, 5, 0, -1])
    head = NoisySampleHead(2, (16,), torch.tensor([-1]))
    assert head(x, sigma, label).tolist() == [[0.0]] * 4
    with torch.no_grad():
        head.network.weights[-1].normal_()
    logits = head(x, sigma, label).flatten()
    assert len(set(logits.tolist())) == 4
    numbers = NoisySampleHead(2, (16,), torch.zeros(1, 2, 3))
    assert numbers(x, sigma, torch.randn(4, 2, 3)).shape == (4, 1)
    assert NoisySampleHead(2, (16,), None)(x, sigma).shape == (4, 1)


def test_classes_up_to_500_are_told_apart() -> None:
    torch.manual_seed(0)
    head = NoisySampleHead(1, (16,), torch.tensor([0]))
    with torch.no_grad():
        head.network.weights[-1].normal_()
    logits = head(torch.zeros(501, 1), torch.ones(501), torch.arange(-1, 500)).flatten()
    assert logits.unique().numel() > 495  # Rounding may let two of them meet.
