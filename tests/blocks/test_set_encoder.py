"""Encoders of sets: what must not change them, what does, and each of them written out once."""

import math
import typing

import pytest
import torch

from esscher.nn.set_encoder import SetEncoder, SetEncoderKind, median_over

KINDS = [kind for kind in typing.get_args(SetEncoderKind) if kind != "sum_pooled"]


def encoder(kind, dim=3, latent=6, **options):
    torch.manual_seed(0)
    options = {"width": 16, "heads": 2, "bandwidth": 0.7} | options
    return SetEncoder(kind, dim, latent, **options)


def sets(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- invariances


@pytest.mark.parametrize("kind", [*KINDS, "sum_pooled"])
def test_the_order_of_samples_does_not_matter(kind):
    x, model = sets(4, 11, 3), encoder(kind)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(1))
    assert (model(x) - model(x[:, order])).abs().max() < 1e-5
    assert (model(x) - model(x + 1)).abs().max() > 0.01, "but the samples do"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("times", [2, 5])
@pytest.mark.parametrize("size", [7, 8])
def test_repeating_every_sample_does_not_matter(kind, times, size):
    x, model = sets(4, size, 3), encoder(kind)
    assert (model(x) - model(x.repeat(1, times, 1))).abs().max() < 1e-5
    assert (model(x) - model(x.repeat_interleave(times, 1))).abs().max() < 1e-5


def test_a_sum_fails_where_a_mean_does_not():
    x, model = sets(4, 8, 3), encoder("sum_pooled")
    assert (model(x) - model(x.repeat(1, 2, 1))).abs().max() > 1
    assert (model(x) - model(x[:, :4].repeat(1, 2, 1))).abs().max() > 0.1


def test_repeating_one_sample_alone_does_matter():
    x = sets(4, 8, 3)
    for kind in KINDS:
        model = encoder(kind)
        assert (model(x) - model(torch.cat([x, x[:, :3]], 1))).abs().max() > 1e-3, kind


# ---- masks


@pytest.mark.parametrize("kind", [*KINDS, "sum_pooled"])
def test_a_padded_set_is_the_set(kind):
    """Whatever stands where no sample is, and a set next to it of another size."""
    model = encoder(kind)
    x = sets(2, 9, 3)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, [0, 4, 7, 8]] = False
    padded = torch.where(mask.unsqueeze(-1), x, torch.nan)
    found = model(padded, mask)
    assert (found[0] - model(x[:1])[0]).abs().max() < 1e-5
    assert (found[1] - model(x[1:, mask[1]])[0]).abs().max() < 1e-5
    if found.requires_grad:  # That of kind mean has nothing to learn.
        found.square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_the_median_of_what_is_there_against_sorting():
    h = sets(3, 8, 5)
    mask = torch.rand(3, 8, generator=torch.Generator().manual_seed(2)) < 0.6
    mask[:, 0] = True
    found = median_over(h, mask)
    for k in range(3):
        values = h[k, mask[k]].sort(0).values
        assert torch.equal(found[k], values[(len(values) - 1) // 2])
    assert torch.equal(median_over(h, None), h.sort(1).values[:, 3])


# ---- chunks


@pytest.mark.parametrize("kind", ["mean", "kernel_mean"])
def test_chunks_are_exact_where_a_set_is_pooled_once(kind):
    x, model = sets(50, 3), encoder(kind)
    for size in (10, 13, 50):
        assert (model.in_chunks(x, size) - model(x.unsqueeze(0))[0]).abs().max() < 1e-5


def test_chunks_are_refused_where_they_would_be_another_vector():
    x, model = sets(40, 3), encoder("residual")
    halves = (model(x[None, :20]) + model(x[None, 20:]))[0] / 2
    assert (halves - model(x[None])[0]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="residual pools in every block"):
        model.in_chunks(x, 20)


# ---- what they compute


def test_the_mean_is_a_projection_of_the_mean():
    x, model = sets(2, 5, 3), encoder("mean")
    assert list(model.parameters()) == []
    torch.testing.assert_close(model(x), x.mean(1) @ model.body.weight)


def test_the_kernel_mean_estimates_the_kernel():
    """2 / l times the inner product of two samples' features is exp(-|x - y|^2 / (2 g^2))."""
    model = encoder("kernel_mean", latent=40_000, bandwidth=0.7)
    x, y = sets(1, 1, 3), sets(1, 1, 3, seed=5) * 0.5
    found = (model(x) * model(y)).sum().item() * 2 / 40_000
    assert found == pytest.approx(math.exp(-(x - y).square().sum().item() / (2 * 0.49)), abs=0.02)
    assert [name for name, _ in model.named_parameters()] == ["body.bandwidth"]


def by_hand(mlp, x):
    *hidden, last = list(zip(mlp.weights, mlp.biases, strict=True))
    for weight, bias in hidden:
        x = torch.selu(x @ weight + bias)
    return x @ last[0] + last[1]


def normed(norm, x):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


def test_the_residual_encoder_written_out():
    x, model = sets(2, 5, 3), encoder("residual", blocks=1)
    body = model.body
    h = normed(body.norms[0], by_hand(body.first, x) + x @ body.skips[0].weight.T)
    pooled = torch.stack([torch.stack([s.sum(0) / 5] * 5) for s in h])
    inner = by_hand(body.blocks[0], torch.cat([h, pooled], -1)) + h + x @ body.skips[1].weight.T
    z = normed(body.norms[1], inner).sum(1) / 5 @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(x), z)


def test_blocks_see_the_whole_set():
    """Without pooling inside, a vector of one component would be a sum of a function of each sample."""
    x = sets(1, 2, 3)
    for kind in ("residual", "mean_pooled", "median_pooled", "attention"):
        model = encoder(kind)
        a, b = x[:, :1], x[:, 1:]
        apart = (model(a) + model(b)) / 2
        assert (model(x) - apart).abs().max() > 1e-3, kind


def test_what_cannot_be_built_is_refused():
    with pytest.raises(ValueError, match="even latent size, got 5"):
        SetEncoder("kernel_mean", 3, 5)
    with pytest.raises(ValueError, match="heads must divide the width 16, got 3"):
        SetEncoder("attention", 3, 4, width=16, heads=3)
