"""Attention of few channels a head, against softmax in float64 and torch's own."""

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from esscher.nn import attention as module
from esscher.nn.attention import CHANNELS, attention, thin_attention
from esscher.nn.compiling import compile_network


def heads_of(
    batch: int, heads: int, rows: int, channels: int, dtype: torch.dtype, seed: int
) -> Tensor:
    """As a network has them: heads side by side in one row."""
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(batch, rows, heads * channels, generator=generator).to(dtype)
    return flat.view(batch, rows, heads, channels).transpose(1, 2)


def by_numpy(query: Tensor, key: Tensor, value: Tensor, scale: float) -> np.ndarray:
    q, k, v = (t.double().numpy() for t in (query, key, value))
    scores = scale * np.einsum("bhnd,bhmd->bhnm", q, k)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhnm,bhmd->bhnd", weights, v)


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("queries", "keys"), [(64, 64), (1, 1), (5, 77), (33, 2)])
def test_it_is_softmax_of_products(
    channels: int, dtype: torch.dtype, queries: int, keys: int
) -> None:
    query = heads_of(2, 3, queries, channels, dtype, 0)
    key, value = (heads_of(2, 3, keys, channels, dtype, seed) for seed in (1, 2))
    for scale in (None, 1.7):
        found = attention(query, key, value, scale=scale)
        assert found.dtype == dtype and found.shape == query.shape
        expected = by_numpy(query, key, value, channels**-0.5 if scale is None else scale)
        # Sums are in float32; of bfloat16 half a unit in the last of 8 places is lost, not a whole one.
        lost = 0.0 if dtype == torch.float32 else 2**-8
        np.testing.assert_allclose(found.float().numpy(), expected, rtol=lost, atol=2e-6)


@pytest.mark.parametrize("layout", ["as rows", "contiguous", "channels apart"])
def test_any_layout_in_memory(layout: str) -> None:
    query, key, value = (heads_of(2, 3, 20, 8, torch.float32, seed) for seed in range(3))
    expected = by_numpy(query, key, value, 8**-0.5)
    if layout == "contiguous":
        query, key = query.contiguous(), key.contiguous()
    elif layout == "channels apart":
        query, value = (t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in (query, value))
    found = thin_attention(query, key, value, 8**-0.5)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=2e-6)
    assert found.transpose(1, 2).is_contiguous()


def test_scores_of_any_size() -> None:
    """A key 4,000 nats ahead is all that counts, wherever the scores lie; equal ones share."""
    value = torch.arange(24.0).view(1, 1, 3, 8)
    query = torch.zeros(1, 1, 1, 8)
    query[..., 0] = 1.0
    key = torch.zeros(1, 1, 3, 8)
    for offset in (-1e6, 0.0, 1e6):
        key[..., 0] = torch.tensor([0.0, 4000.0, -4000.0]) + offset
        torch.testing.assert_close(attention(query, key, value, scale=1.0), value[:, :, 1:2])
        key[..., 0] = offset
        found = attention(query, key, value, scale=1.0)
        torch.testing.assert_close(found, value.mean(2, keepdim=True))


def test_weights_of_known_odds() -> None:
    """Scores log 1, log 2 and log 5 with values 0, 1, 0: two eighths."""
    key = torch.zeros(1, 1, 3, 4)
    key[0, 0, :, 2] = torch.tensor([1.0, 2.0, 5.0]).log()
    value = torch.zeros(1, 1, 3, 4)
    value[0, 0, 1] = torch.tensor([1.0, -1.0, 2.0, 4.0])
    query = torch.full((1, 1, 1, 4), 2.0)
    found = attention(query, key, value, scale=0.5)
    torch.testing.assert_close(found[0, 0, 0], torch.tensor([0.25, -0.25, 0.5, 1.0]))


def test_what_is_not_a_number_stays_in_its_row() -> None:
    query, key, value = (heads_of(1, 2, 20, 8, torch.float32, seed) for seed in range(3))
    query[0, 1, 7, 3] = math.nan
    lost = attention(query, key, value).isnan().any(-1)
    assert lost.nonzero().tolist() == [[0, 1, 7]]
    key[0, 0, 4, 0] = math.nan
    assert attention(query, key, value)[0, 0].isnan().all()


@pytest.mark.parametrize(
    "other",
    [
        "mask",
        "causal",
        "wide",
        "of doubles",
        "wider values",
        "fewer heads of keys",
        "no keys",
        "not the same type",
    ],
)
def test_all_else_is_torchs(other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_kernel", lambda: pytest.fail("this is not for the kernel"))
    channels = 32 if other == "wide" else 8
    query, key, value = (heads_of(2, 4, 9, channels, torch.float32, seed) for seed in range(3))
    options: dict[str, Any] = {}
    if other == "mask":
        options["attn_mask"] = torch.rand(9, 9, generator=torch.Generator().manual_seed(3)) > 0.3
    elif other == "causal":
        options["is_causal"] = True
    elif other == "of doubles":
        query, key, value = query.double(), key.double(), value.double()
    elif other == "wider values":
        value = heads_of(2, 4, 9, 16, torch.float32, 2)
    elif other == "fewer heads of keys":
        key, value, options["enable_gqa"] = key[:, ::2], value[:, ::2], True
    elif other == "no keys":
        key, value = key[:, :, :0], value[:, :, :0]
    elif other == "not the same type":
        key = key.double()
        with pytest.raises(RuntimeError, match="dtype"):
            attention(query, key, value)
        return
    found = attention(query, key, value, **options)
    expected = scaled_dot_product_attention(query, key, value, **options)
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_what_has_no_kernel() -> None:
    with pytest.raises(ValueError, match="channels a head must be one of"):
        thin_attention(*(torch.zeros(1, 1, 2, 6) for _ in range(3)), 1.0)
    with pytest.raises(ValueError, match="type must be one of"):
        thin_attention(*(torch.zeros(1, 1, 2, 8).double() for _ in range(3)), 1.0)


class Attentive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(16, 48)

    def forward(self, rows: Tensor) -> Tensor:
        split = self.into(rows).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("unchecked")
def test_compiled_networks_have_it_where_no_gradient_is_asked_for(
    final: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    kernel = module._kernel()

    @functools.cache
    def counted() -> Any:
        return lambda *args: calls.append(1) or kernel(*args)

    monkeypatch.setattr(module, "_kernel", counted)
    torch.manual_seed(0)
    plain = Attentive().requires_grad_(not final)
    compiled = Attentive().requires_grad_(not final)
    compiled.load_state_dict(plain.state_dict())
    compile_network(compiled, final=final)
    rows = torch.randn(2, 10, 16)
    low = functools.partial(torch.autocast, "cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
    tolerance = {"rtol": 0, "atol": 1e-6 if dtype == torch.float32 else 0.02}
    with torch.no_grad(), low():
        found, expected = compiled(rows), plain(rows)
    assert found.dtype == dtype and len(calls) == 1
    torch.testing.assert_close(found, expected, **tolerance)
    # Final weights are laid out anew, once: what they change to afterwards is not seen.
    with torch.no_grad(), low():
        for weight in (compiled.into.weight, plain.into.weight):
            weight.mul_(2)
        changed, expected = compiled(rows), plain(rows)
    torch.testing.assert_close(changed, found if final else expected, **tolerance)
    calls.clear()
    slopes = []
    for network in (compiled, plain):
        at = rows.clone().requires_grad_()
        with low():
            result = network(at).float()
        slopes.append(torch.autograd.grad(result.pow(3).sum(), at)[0])
    assert not calls
    torch.testing.assert_close(*slopes, rtol=0, atol=1e-6 if dtype == torch.float32 else 0.05)
