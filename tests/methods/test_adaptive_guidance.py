"""Adaptive guidance as a method: what it saves, counts, fits and keeps."""

import warnings
from typing import Any

import pytest
import torch

from esscher.distributions.diffusion import DiffusionModel, ImageSpec
from esscher.errors import UserError
from esscher.methods.diffusion.adaptive_guidance import AdaptiveGuidance, Config
from esscher.runtime.device import Runtime
from esscher.types import Asked
from support import RUNTIME


def levels(steps: int) -> torch.Tensor:
    return torch.cat([torch.logspace(1, -1, steps, dtype=torch.float64), torch.zeros(1).double()])


def two_gaussians(x: Any, sigma: Any, condition: Any = None) -> torch.Tensor:
    """Of N(2, 1) with a condition above 0, of N(0, 1) without: the answers differ by 2 (1 - share)."""
    share = (1 / (1 + sigma.square())).view(-1, 1)
    mean = torch.where(condition.view(-1, 1) >= 0, 2.0, 0.0)
    return share * x + (1 - share) * mean


def model(null: Any = -1) -> DiffusionModel:
    without = None if null is None else torch.tensor([null])
    return DiffusionModel(two_gaussians, [3], levels, null=without)


def method(**options: Any) -> AdaptiveGuidance:
    spec = ImageSpec(model=options.pop("model", None) or model())
    return AdaptiveGuidance(Config(**{"scale": 3.0, **options}), spec, Runtime(RUNTIME))


def asked(count: int) -> Asked:
    return Asked(row=[0] * count, rows=[{}] * count, condition=torch.ones(count).long())


SEEDS = list(range(6))


@pytest.mark.parametrize(
    ("options", "evaluations"),
    [
        ({"policy": "full"}, 40),
        ({"policy": "cut_off", "guided_steps": 7}, 27),
        ({"policy": "interleaved", "guided_steps": 10}, 25),
        ({"threshold": 1.0}, 40),
        ({"threshold": -0.999, "min_guided_steps": 4}, 24),
        ({"threshold": -0.999}, 40),  # No cosine is ever below, and so says nothing.
    ],
)
def test_evaluations_of_every_policy(options: Any, evaluations: int) -> None:
    told = method(**options).draw(asked(6), SEEDS).told
    assert told["evaluations"].tolist() == [evaluations] * 6
    torch.testing.assert_close(told["evaluations_saved"], torch.full((6,), 1 - evaluations / 40))


def test_a_cosine_that_is_never_low_is_spoken_of_and_ends_no_guidance() -> None:
    learner = method(threshold=0.5, draw_steps=4)
    found = learner._drawn(asked(6), SEEDS, learner._policy)
    assert float(found.cosine.min()) > 0.5
    with pytest.warns(
        UserWarning, match="never below the threshold 0.5 .at least 0.*keep full guid"
    ):
        told, _ = learner.improve(asked(6), None, 1)
    assert float(told["error"]) == 0 and float(told["evaluations"]) == 8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learner.improve(asked(6), None, 2)  # It is said once.
    plain = method(threshold=0.5, min_guided_steps=1, draw_steps=4)
    with pytest.warns(UserWarning, match="samples leave guidance whatever it does"):
        told, _ = plain.improve(asked(6), None, 1)
    assert float(told["evaluations"]) == 5


def test_a_model_without_a_null_condition_has_no_guidance_to_save_on() -> None:
    with pytest.raises(UserError, match="needs a model with a null condition, and this one was tr"):
        method(model=model(null=None))


def test_out_of_reach_it_is_guidance_as_it_always_was() -> None:
    """Guidance of two Gaussians is the exact denoiser of N(2 s, 1), whose samples are known."""
    learner = method(threshold=1.0)
    x = learner.draw(asked(6), SEEDS).x
    sigma, z = (
        levels(20)[0],
        torch.stack(
            [torch.randn(3, generator=torch.Generator().manual_seed(seed)) for seed in SEEDS]
        ),
    )
    x0 = z.double() * sigma
    for sigma, following in zip(levels(20)[:-1], levels(20)[1:], strict=True):
        share = 1 / (1 + sigma**2)
        denoised = share * x0 + (1 - share) * 6.0
        x0 = denoised + following / sigma * (x0 - denoised)
    torch.testing.assert_close(x.double(), x0, rtol=1e-4, atol=1e-4)


def test_the_error_is_measured_against_full_guidance_from_the_same_noise() -> None:
    torch.manual_seed(0)
    told, rewards = method(policy="cut_off", guided_steps=2).improve(asked(6), None, 1)
    assert len(rewards) == 0 and float(told["error"]) > 0.01
    torch.manual_seed(0)
    seeds = torch.randint(2**62, (6,)).tolist()
    ours = method(policy="cut_off", guided_steps=2).draw(asked(6), seeds).x
    whole = method(policy="full").draw(asked(6), seeds).x
    apart = (ours - whole).square().mean(-1).double()
    assert float(told["error"]) == pytest.approx(float(apart.mean()), rel=1e-5)
    assert float(told["median_error"]) == pytest.approx(float(apart.median()), rel=1e-5)
    told, _ = method(policy="full").improve(asked(6), None, 1)
    assert float(told["error"]) == 0 and float(told["saved"]) == 0


def test_between_two_gaussians_the_estimate_is_exact() -> None:
    """There eps_u is eps_c and what two entries of the path say of a constant, so that ten steps with
    five estimates are ten guided steps.
    """
    learner = method(policy="linear", linear_paths=64)
    assert learner.draw(asked(2), [0, 1]).told["evaluations"].tolist() == [40, 40]
    told, _ = learner.improve(asked(6), None, 1)
    assert float(told["evaluations"]) == 25 and float(learner.unexplained[1:].max()) < 1e-6
    ten = method(policy="cut_off", guided_steps=10).draw(asked(6), SEEDS).x
    torch.testing.assert_close(learner.draw(asked(6), SEEDS).x, ten, rtol=1e-4, atol=1e-4)
    left_out = method(policy="interleaved", guided_steps=10).draw(asked(6), SEEDS).x
    assert float((left_out - ten).abs().min()) > 0.1


def test_a_fit_is_kept() -> None:
    one, two = (method(policy="linear", linear_paths=64) for _ in range(2))
    one.improve(asked(6), None, 1)
    two.load_state_dict(one.state_dict())
    assert two.is_fitted
    assert torch.equal(one.draw(asked(3), [7, 8, 9]).x, two.draw(asked(3), [7, 8, 9]).x)
    weights = two.conditional_weights.clone()
    two.improve(asked(6), None, 2)
    assert torch.equal(two.conditional_weights, weights), "fitted once"


def test_cosines_are_of_the_steps_where_both_were_asked_for() -> None:
    learner = method(threshold=-0.999, min_guided_steps=3)
    learner.improve(asked(6), None, 1)
    assert learner.cosine_count.tolist() == [6.0] * 3 + [0.0] * 17
    mean = learner.cosine_sum[:3] / learner.cosine_count[:3]
    assert bool(((mean > -1) & (mean <= 1)).all())
    assert len(learner.figures()["cosine_by_step"].axes[0].lines) == 2


def test_rewards_of_both_are_told() -> None:
    class FirstComponent:
        of_sets = False

        def __call__(self, x: Any, rows: Any) -> torch.Tensor:
            return x[:, 0]

    judge: Any = FirstComponent()
    told, rewards = method(policy="cut_off", guided_steps=1).improve(asked(6), judge, 1)
    assert rewards.shape == (6,) and float(told["reward_of_full"]) > float(rewards.mean())


def test_a_model_that_cannot_be_guided_is_refused() -> None:
    with pytest.raises(UserError, match="this one was trained without"):
        method(model=model(None))
    with pytest.raises(UserError, match="no conditions"):
        method().draw(Asked(row=[0], rows=[{}], condition=None), [0])
    with pytest.raises(UserError, match="scale"):
        Config(scale=1.0)
    with pytest.raises(UserError, match="eta"):
        Config(policy="linear", eta=0.5)


def test_full_guidance_is_what_the_model_draws() -> None:
    """Chains begin and end in the network's coordinates, with noise left, and clip as it says."""
    left = torch.linspace(5, 0.5, 6, dtype=torch.float64)
    for clip in ({}, {"clip": 2.5}, {"clip": 2.5, "keeps_noise": True}):
        options: Any = {"null": torch.tensor([-1]), "unit_start": True, "unit_end": True, **clip}
        drawn_by = DiffusionModel(two_gaussians, [3], left, **options)
        learner = method(model=drawn_by, policy="full", draw_steps=5)
        expected = drawn_by.draw(asked(6).condition, SEEDS, steps=5, scale=3.0)
        torch.testing.assert_close(learner.draw(asked(6), SEEDS).x, expected)
