import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esscher.functional.reductions import (
    aggregate,
    aggregation_denominator,
    masked_mean,
    masked_sum,
    masked_whiten,
)

VALUES = torch.tensor([[1.0, 2.0, 6.0], [4.0, 8.0, 100.0]])
MASK = torch.tensor([[True, True, False], [True, True, False]])


def test_hand_worked_numbers_where_an_inverted_mask_would_give_106():
    assert masked_sum(VALUES, MASK).item() == 15.0  # 1 + 2 + 4 + 8; inverted: 6 + 100
    assert masked_sum(VALUES, MASK, dim=1).tolist() == [3.0, 12.0]
    assert masked_sum(VALUES, MASK, dim=(0, 1)).item() == 15.0
    assert masked_mean(VALUES, MASK).item() == 3.75  # 15 / 4
    assert masked_mean(VALUES, MASK, dim=-1).tolist() == [1.5, 6.0]
    assert masked_mean(VALUES, MASK, denominator=10.0).item() == 1.5


def test_nan_in_padding_reaches_neither_result_nor_gradient():
    values = VALUES.masked_fill(~MASK, float("nan")).requires_grad_()
    loss = masked_mean(values, MASK) + masked_whiten(values, MASK).square().sum()
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(values.grad).all()
    assert (values.grad[~MASK] == 0).all()
    assert (masked_whiten(values, MASK)[~MASK] == 0).all()


def test_all_masked_rows_give_zero_with_zero_gradient():
    values = VALUES.clone().requires_grad_()
    mask = torch.tensor([[False] * 3, [True] * 3])
    result = masked_mean(values, mask, dim=1)
    assert result[0].item() == 0.0
    assert masked_mean(values, torch.zeros_like(mask)).item() == 0.0
    assert (masked_whiten(values, torch.zeros_like(mask)) == 0).all()
    (result.sum() + masked_whiten(values, mask, dim=1)[0].sum()).backward()
    assert values.grad[0].tolist() == [0.0, 0.0, 0.0]
    torch.testing.assert_close(values.grad[1], torch.full((3,), 1 / 3))


def test_one_denominator_makes_micro_batches_sum_to_the_full_batch():
    torch.manual_seed(0)
    values, mask = torch.randn(6, 5, dtype=torch.float64), torch.rand(6, 5) < 0.6
    parts = [
        masked_mean(values[rows], mask[rows], denominator=mask.sum())
        for rows in (slice(0, 1), slice(1, 5), slice(5, 6))
    ]
    torch.testing.assert_close(sum(parts), masked_mean(values, mask))
    # The mean of per-micro-batch means is another number: why the denominator is an argument.
    naive = sum(masked_mean(values[i : i + 1], mask[i : i + 1]) for i in range(6)) / 6
    assert (naive - masked_mean(values, mask)).abs() > 1e-3


@pytest.mark.parametrize("denominator", [0.0, -1.0, float("nan")])
def test_a_number_that_is_not_positive_is_refused_as_denominator(denominator):
    with pytest.raises(ValueError, match="denominator must be positive"):
        masked_mean(VALUES, MASK, denominator=denominator)


def test_a_zero_tensor_denominator_is_not_finite():
    assert not masked_mean(VALUES, MASK, denominator=torch.tensor(0.0)).isfinite()


def test_whitening_by_hand():
    # Row 1: 1, 2 have mean 1.5, std 0.5; row 2: 4, 8 have mean 6, std 2.
    expected = torch.tensor([[-1.0, 1.0, 0.0], [-1.0, 1.0, 0.0]])
    torch.testing.assert_close(masked_whiten(VALUES, MASK, dim=1), expected)
    # With epsilon 0.5 row 1 becomes 0.5 / (0.5 + 0.5) and row 2 becomes 2 / (2 + 0.5).
    expected = torch.tensor([[-0.5, 0.5, 0.0], [-0.8, 0.8, 0.0]])
    torch.testing.assert_close(masked_whiten(VALUES, MASK, dim=1, epsilon=0.5), expected)
    # Unbiased: std of (1, 2) is sqrt(1/2).
    first = masked_whiten(VALUES, MASK, dim=1, correction=1)[0, 1].item()
    assert first == pytest.approx(0.5 / math.sqrt(0.5), rel=1e-6)
    # Over all axes: 1, 2, 4, 8 have mean 3.75 and variance 85/4 - 3.75^2 = 7.1875.
    assert masked_whiten(VALUES, MASK)[1, 1].item() == pytest.approx(4.25 / math.sqrt(7.1875))


@pytest.mark.parametrize("value", [0.1, 1e-3, 100.1, -7.3])
@pytest.mark.parametrize("correction", [0, 1])
def test_equal_values_and_single_values_whiten_to_exactly_zero(value, correction):
    # In float32 the mean of three times 0.1 is not 0.1, so without care noise is blown up.
    values = torch.full((2, 3), value, requires_grad=True)
    mask = torch.tensor([[True, True, True], [False, True, False]])
    white = masked_whiten(values, mask, dim=1, correction=correction)
    assert (white == 0).all()
    white.sum().backward()
    assert torch.isfinite(values.grad).all()


def test_whitening_gradient_and_bad_epsilon():
    torch.manual_seed(0)
    mask = torch.rand(3, 4) < 0.7
    values = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: masked_whiten(x, mask, epsilon=0.1), values)
    with pytest.raises(ValueError, match="epsilon"):
        masked_whiten(VALUES, MASK, epsilon=0.0)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(-50, 50), min_size=3, max_size=8, unique_by=lambda x: round(x, 2)),
    st.floats(0.1, 10),
    st.floats(-100, 100),
)
def test_whitening_ignores_shift_and_positive_scale(numbers, scale, shift):
    values = torch.tensor(numbers, dtype=torch.float64)
    mask = torch.ones(len(numbers), dtype=torch.bool)
    white = masked_whiten(values, mask)
    torch.testing.assert_close(
        masked_whiten(scale * values + shift, mask), white, atol=1e-4, rtol=0
    )
    assert white.mean().abs() < 1e-6
    assert abs(white.std(correction=0).item() - 1) < 1e-4
    assert (white.argsort() == values.argsort()).all()


HOW = [
    "token_mean",
    "sequence_mean_token_mean",
    "sequence_mean_token_sum",
    "constant_length",
]
# Three responses of 1, 3 and 2 tokens, and one that is masked everywhere.
TERMS = torch.tensor([[6.0, 99, 99], [1, 2, 6], [5, 7, 99], [99, 99, 99]], dtype=torch.float64)
TOKENS = torch.tensor([[1, 0, 0], [1, 1, 1], [1, 1, 0], [0, 0, 0]]).bool()


@pytest.mark.parametrize(
    ("how", "denominator", "loss"),
    [
        ("token_mean", 6, 27 / 6),
        ("sequence_mean_token_mean", 4, (6 + 3 + 6) / 4),
        ("sequence_mean_token_sum", 4, 27 / 4),
        ("constant_length", 40, 27 / 40),
    ],
)
def test_aggregations_by_hand_count_the_masked_row_as_a_sequence(how, denominator, loss):
    found = aggregation_denominator(TOKENS, how, max_length=10)
    assert found.item() == denominator
    assert aggregate(TERMS, TOKENS, how, found).item() == pytest.approx(loss, rel=1e-12)
    assert aggregate(TERMS, TOKENS, how, denominator).item() == pytest.approx(loss, rel=1e-12)
    # Leaving the masked row out, as ROLL does, is a matter of the denominator.
    if how == "sequence_mean_token_mean":
        found = aggregate(TERMS, TOKENS, how, TOKENS.any(1).sum())
        assert found.item() == pytest.approx(5.0)


@pytest.mark.parametrize("how", HOW)
def test_micro_batches_under_one_denominator_add_up_to_the_full_batch(how):
    torch.manual_seed(0)
    lengths = torch.tensor([1, 9, 2, 7, 0, 5, 9, 3])
    mask = torch.arange(9) < lengths[:, None]
    terms = torch.randn(8, 9, dtype=torch.float64).masked_fill(~mask, float("nan"))
    terms.requires_grad_()
    denominator = aggregation_denominator(mask, how, max_length=12)
    full = aggregate(terms, mask, how, denominator)
    (gradient,) = torch.autograd.grad(full, terms)

    parts = [slice(0, 1), slice(1, 4), slice(4, 5), slice(5, 8)]
    losses = [aggregate(terms[rows], mask[rows], how, denominator) for rows in parts]
    (found,) = torch.autograd.grad(sum(losses), terms, retain_graph=True)
    torch.testing.assert_close(sum(losses), full, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(found, gradient, atol=1e-12, rtol=1e-12)
    assert (found[~mask] == 0).all()
    # The denominators of the parts add up too, so that processes can sum theirs.
    counts = [aggregation_denominator(mask[rows], how, max_length=12) for rows in parts]
    assert sum(counts).item() == denominator.item()
    # The mean of the parts' own means is another number (parts of 1, 3, 1 and 3 rows).
    means = [
        aggregate(terms[rows], mask[rows], how, count)
        for rows, count in zip(parts, counts, strict=True)
    ]
    assert (sum(means) / 4 - full).abs() > 1e-2


@pytest.mark.parametrize("how", ["sequence_mean_token_mean", "token_mean"])
def test_equal_micro_batches_forgive_means_of_means_for_sequences_but_not_for_tokens(how):
    halves = [slice(0, 2), slice(2, 4)]
    means = [
        aggregate(TERMS[rows], TOKENS[rows], how, aggregation_denominator(TOKENS[rows], how))
        for rows in halves
    ]
    full = aggregate(TERMS, TOKENS, how, aggregation_denominator(TOKENS, how))
    difference = abs((sum(means) / 2 - full).item())
    assert difference < 1e-12 if how == "sequence_mean_token_mean" else difference > 0.1


@pytest.mark.parametrize("how", HOW)
def test_a_batch_that_is_all_masked_is_worth_zero(how):
    mask = torch.zeros_like(TOKENS)
    terms = torch.full_like(TERMS, float("nan")).requires_grad_()
    loss = aggregate(terms, mask, how, aggregation_denominator(mask, how, max_length=3))
    loss.backward()
    assert loss.item() == 0.0
    assert (terms.grad == 0).all()


@pytest.mark.usefixtures("unchecked")
def test_unknown_aggregations_and_impossible_denominators_are_refused():
    for function in (aggregation_denominator, lambda mask, how: aggregate(TERMS, mask, how, 1.0)):
        with pytest.raises(ValueError, match="how must be one of token_mean"):
            function(TOKENS, "mean")
    for length in (None, 0):
        with pytest.raises(ValueError, match="max_length"):
            aggregation_denominator(TOKENS, "constant_length", length)
    for number in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="denominator must be positive"):
            aggregate(TERMS, TOKENS, "token_mean", number)
