"""The distribution that tokens are drawn from, against transformers' own warpers and by hand."""

import math

import pytest
import torch

from esscher.errors import UserError
from esscher.samplers import Decoding, decoding_log_probs, draw, uniforms


def warped(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    from transformers.generation import logits_process as warpers

    if temperature != 1:
        logits = warpers.TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        logits = warpers.TopKLogitsWarper(top_k)(None, logits)
    if top_p < 1:
        logits = warpers.TopPLogitsWarper(top_p)(None, logits)
    return logits.softmax(-1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [0, 1, 5, 50])
@pytest.mark.parametrize("top_p", [0.1, 0.6, 0.95, 1.0])
def test_it_is_what_transformers_samples_from(temperature: float, top_k: int, top_p: float) -> None:
    logits = 3 * torch.randn(16, 40, generator=torch.Generator().manual_seed(1))
    decoding = Decoding(temperature=temperature, top_k=top_k, top_p=top_p)
    expected = warped(logits, temperature, min(top_k, 40), top_p)
    torch.testing.assert_close(decoding_log_probs(logits, decoding).exp(), expected)


def test_top_p_by_hand() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    kept = decoding_log_probs(logits, Decoding(top_p=0.7)).exp()
    torch.testing.assert_close(kept, torch.tensor([[5 / 8, 3 / 8, 0.0, 0.0]]))
    kept = decoding_log_probs(logits, Decoding(top_p=0.81)).exp()
    torch.testing.assert_close(kept, torch.tensor([[50 / 95, 30 / 95, 15 / 95, 0.0]]))


def test_temperature_zero_takes_the_likeliest() -> None:
    logp = decoding_log_probs(torch.tensor([[0.1, 0.3, 0.2]]), Decoding(temperature=0.0))
    assert logp.tolist() == [[-math.inf, 0.0, -math.inf]]


def test_draws_invert_the_cumulative_distribution() -> None:
    logp = torch.tensor([0.2, 0.0, 0.5, 0.3]).log().expand(6, -1)
    uniform = torch.tensor([0.0, 0.1999, 0.2001, 0.6999, 0.7001, 1 - 2**-24])
    assert draw(logp, uniform).tolist() == [0, 0, 2, 2, 3, 3]


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    logp = torch.tensor([0.0, 0.4, 0.6, 0.0]).log().expand(2, -1)
    assert draw(logp, torch.tensor([0.0, 1 - 2**-24])).tolist() == [1, 2]


def test_frequencies_are_the_probabilities() -> None:
    logp = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    count = 40_000
    drawn = draw(logp.expand(count, -1), uniforms(range(count), 1)[:, 0]).bincount(minlength=4)
    spread = 4 * (logp.exp() * (1 - logp.exp()) / count).sqrt()
    assert ((drawn / count - logp.exp()).abs() < spread).all()


def test_rows_of_noise_depend_on_their_own_seed_alone() -> None:
    together = uniforms([3, 5, 7], 6)
    assert torch.equal(together[1], uniforms([5], 9)[0, :6])
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_new_tokens", 0), ("temperature", -0.1), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.1)],
)
def test_bad_settings_are_refused(field: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{field} must be"):
        Decoding(**{field: value})
