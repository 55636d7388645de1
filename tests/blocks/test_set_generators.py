"""Generators: losses by hand, ancestral steps as in the textbook, and what masks leave out."""

import math

import pytest
import torch
from torch import nn

from esscher.nn.set_generators import (
    DiffusionGenerator,
    DirectGenerator,
    VariationalGenerator,
    mean_of_sets,
)


def diffusion(steps=6, dim=2, latent=3):
    torch.manual_seed(0)
    return DiffusionGenerator(dim, latent, 16, 2, steps, (0.05, 0.4))


def direct(distance, **options):
    torch.manual_seed(0)
    options = {"code": 2, "projections": 200, "epsilon": 0.05, "iterations": 100} | options
    return DirectGenerator(2, 3, 16, 2, distance=distance, **options)


class Told(nn.Module):
    """Remembers what it was told, and says what it was given to say."""

    def __init__(self, says):
        super().__init__()
        self.says, self.seen = says, []

    def forward(self, x):
        self.seen.append(x)
        return self.says(x)


def test_a_mean_is_over_what_is_there():
    terms = torch.tensor([[1.0, 2.0, 9.0], [4.0, 5.0, 6.0]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    assert mean_of_sets(terms, mask).tolist() == [1.5, 5.0]
    assert mean_of_sets(terms, None).tolist() == [4.0, 5.0]
    assert mean_of_sets(torch.tensor([[1.0, math.nan]]), mask[:1, 1:]).tolist() == [1.0]


# ---- diffusion


def test_a_network_that_says_nothing_is_off_by_the_noise():
    model = diffusion()
    model.network = Told(lambda x: torch.zeros(*x.shape[:2], 2))
    x, z = torch.randn(4, 5_000, 2), torch.randn(4, 3)
    assert model.terms(x, z, None).mean().item() == pytest.approx(1, abs=0.03)


def test_what_the_network_is_told():
    """sqrt(abar) x + sqrt(1 - abar) eps, t / T with t from 1 to T, and the set's own vector."""
    model = diffusion(steps=4)
    model.network = Told(lambda x: torch.zeros(*x.shape[:2], 2))
    z = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    x = torch.full((2, 4_000, 2), 10.0)
    model.terms(x, z, None)
    seen = model.network.seen[0]
    assert (seen[0, :, 3:] == z[0]).all() and (seen[1, :, 3:] == z[1]).all()
    place = seen[..., 2]
    assert sorted(place.unique().tolist()) == [0.25, 0.5, 0.75, 1.0]
    kept = 1.0
    for step, beta in enumerate((0.05, 0.05 + 0.35 / 3, 0.05 + 0.7 / 3, 0.4), 1):
        kept *= 1 - beta
        noisy = seen[..., :2][place == step / 4]
        assert noisy.mean().item() == pytest.approx(10 * math.sqrt(kept), abs=0.1)
        assert noisy.std().item() == pytest.approx(math.sqrt(1 - kept), rel=0.1)


def test_the_right_noise_costs_nothing_and_masked_samples_do_not_count():
    model = diffusion()
    x, z = torch.zeros(2, 50, 2), torch.zeros(2, 3)
    table = model.alpha_bar

    def right(told):  # Of x = 0 the noise is the input over its own scale.
        step = (told[..., 2] * 6).round().long() - 1
        noise = told[..., :2] / (1 - table[step]).sqrt().unsqueeze(-1)
        return torch.where(
            (told[..., :1].detach() * 0 + bad) > 0, torch.full_like(noise, 1e3), noise
        )

    bad = torch.zeros(2, 50, 1)
    model.network = Told(right)
    assert model.terms(x, z, None).max() < 1e-9
    bad[1, 20:] = 1
    mask = torch.ones(2, 50, dtype=torch.bool)
    assert model.terms(x, z, mask)[1] > 1e3
    mask[1, 20:] = False
    assert model.terms(x, z, mask).max() < 1e-9


def test_ancestral_steps_are_those_of_the_textbook():
    """A step is (z - beta / sqrt(1 - abar) eps) / sqrt(alpha) + sqrt(beta) n, the last without n."""
    model, steps = diffusion(steps=6), 6
    z = torch.randn(2, 3)
    noise = torch.randn(steps, 2, 7, 2, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        found = model.draw(z, lambda step: noise[step])
        betas = torch.linspace(0.05, 0.4, steps)
        kept = (1 - betas).cumprod(0)
        x = noise[0]
        for place, t in enumerate(range(steps - 1, -1, -1), 1):
            told = torch.cat(
                [x, torch.full((2, 7, 1), (t + 1) / steps), z.unsqueeze(1).expand(2, 7, 3)], -1
            )
            eps = model.network(told)
            x = (x - betas[t] / (1 - kept[t]).sqrt() * eps) / (1 - betas[t]).sqrt()
            if t:
                x = x + betas[t].sqrt() * noise[place]
    torch.testing.assert_close(found, x, atol=1e-4, rtol=1e-4)


def test_the_exact_noise_of_a_gaussian_draws_that_gaussian():
    """Of N(m, s^2) the expected noise is sqrt(1 - abar) (z - sqrt(abar) m) / (abar s^2 + 1 - abar)."""
    model = DiffusionGenerator(1, 1, 4, 1, 200, (1e-3, 0.08))

    def exact(told):
        step = (told[..., 1] * 200).round().long() - 1
        kept = model.alpha_bar[step].unsqueeze(-1)
        mean, spread = told[..., 2:], 0.5
        return (
            (1 - kept).sqrt() * (told[..., :1] - kept.sqrt() * mean) / (kept * spread**2 + 1 - kept)
        )

    model.network = Told(exact)
    torch.manual_seed(0)
    drawn = model.draw(torch.tensor([[1.5], [-1.0]]), lambda _: torch.randn(2, 4_000, 1))
    assert drawn.mean((1, 2)).tolist() == pytest.approx([1.5, -1.0], abs=0.05)
    assert drawn.std(1).flatten().tolist() == pytest.approx([0.5, 0.5], abs=0.04)


# ---- variational


def test_error_and_kl_by_hand():
    """-1/2 mean(1 + log v - mu^2 - v); with mu = (1, 0) and v = (1, e) it is (1 + e - 2) / 4."""
    model = VariationalGenerator(2, 3, 8, 1, 2)
    told = torch.tensor([1.0, 0.0, 0.0, 1.0])
    model.encoder = Told(lambda x: told + 9.0 * (x[..., :1] > 6))  # Far off where nothing is.
    model.decoder = Told(lambda x: torch.zeros(*x.shape[:2], 2))
    x = torch.tensor([[[1.0, 2.0], [0.0, 0.0]], [[3.0, 1.0], [7.0, 7.0]]])
    mask = torch.tensor([[True, True], [True, False]])
    z = torch.arange(6.0).view(2, 3)
    error, kl = model.parts(x, z, mask)
    assert error.tolist() == [1.25, 5.0]  # Means over components: (1 + 4) / 2 and 0; (9 + 1) / 2.
    assert kl.tolist() == pytest.approx([(math.e - 1) / 4] * 2)
    law = torch.distributions.Normal(
        torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]).div(2).exp()
    )
    expected = torch.distributions.kl_divergence(law, torch.distributions.Normal(0, 1)).mean()
    assert kl[0].item() == pytest.approx(expected.item())
    assert torch.equal(model.encoder.seen[0][1, 0], torch.cat([x[1, 0], z[1]]))
    assert torch.equal(model.decoder.seen[0][1, 1, 2:], z[1])


def test_codes_are_drawn_from_their_law():
    model = VariationalGenerator(1, 1, 8, 1, 1)
    model.encoder = Told(lambda x: torch.tensor([2.0, math.log(9.0)]).expand(*x.shape[:2], 2))
    model.decoder = Told(lambda x: x[..., :1])
    model.parts(torch.zeros(1, 20_000, 1), torch.zeros(1, 1), None)
    code = model.decoder.seen[0][0, :, 0]
    assert code.mean().item() == pytest.approx(2, abs=0.1)
    assert code.std().item() == pytest.approx(3, rel=0.03)


# ---- direct


@pytest.mark.parametrize("distance", ["sliced_w2", "mmd", "sinkhorn"])
def test_a_distance_is_low_for_the_same_law_and_gradients_flow_through_samples(distance):
    model = direct(distance)
    z = torch.zeros(1, 3)
    with torch.no_grad():
        own = model.draw(z, lambda _: torch.randn(1, 400, 2))
    torch.manual_seed(1)
    same = model.terms(own, z, None)
    far = model.terms(own + 2, z, None)
    assert same.item() < 0.1 * far.item()
    if distance == "sliced_w2":  # |s|^2 / d
        assert far.item() == pytest.approx(4, rel=0.2)
    if distance == "sinkhorn":  # |s|^2 / 2
        assert far.item() == pytest.approx(4, rel=0.2)
    gradient = torch.autograd.grad(far.sum(), list(model.parameters()))
    bias = gradient[-1]
    assert (bias < 0).all(), "the bias of the last layer must go up to where the samples are"


def test_what_is_drawn_depends_on_vector_and_noise():
    for model in (diffusion(), VariationalGenerator(2, 3, 16, 1, 2), direct("mmd")):
        shape = model.noise_shape(5)
        noise = torch.randn(10, 2, *shape)
        z = torch.randn(2, 3)
        with torch.no_grad():
            one = model.draw(z, lambda step, noise=noise: noise[step])
            two = model.draw(z.flip(0), lambda step, noise=noise: noise[step])
            three = model.draw(z, lambda step, noise=noise: noise[step].flip(0))
        assert one.shape == (2, 5, 2)
        assert not torch.allclose(one, two) and not torch.allclose(one, three)
