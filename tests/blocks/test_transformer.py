"""The transformer against torch's own, who sees whom, and the U-Net along time."""

import pytest
import torch
from torch import nn

from esscher.errors import UserError
from esscher.nn.transformer import Transformer, TransformerBlock
from esscher.nn.unet1d import SHORT, ConditionalUNet1d, FilmBlock, SameConv1d, sinusoids


@pytest.mark.parametrize("causal", [True, False])
def test_a_block_is_torchs_encoder_layer(causal: bool) -> None:
    torch.manual_seed(0)
    block = TransformerBlock(12, 3, causal=causal)
    theirs = nn.TransformerEncoderLayer(
        12, 3, 48, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    with torch.no_grad():
        for module in (block.attention_norm, block.perceptron_norm):
            module.weight.uniform_(0.5, 1.5)
            module.bias.uniform_(-0.5, 0.5)
        pairs = [
            (theirs.self_attn.in_proj_weight, block.to_qkv.weight),
            (theirs.self_attn.in_proj_bias, block.to_qkv.bias),
            (theirs.self_attn.out_proj.weight, block.from_heads.weight),
            (theirs.self_attn.out_proj.bias, block.from_heads.bias),
        ]
        for there, here in (
            (theirs.linear1, block.widen), (theirs.linear2, block.narrow),
            (theirs.norm1, block.attention_norm), (theirs.norm2, block.perceptron_norm),
        ):  # fmt: skip
            pairs += [(there.weight, here.weight), (there.bias, here.bias)]
        for there, here in pairs:
            there.copy_(here)
    x = torch.randn(2, 5, 12)
    mask = nn.Transformer.generate_square_subsequent_mask(5) if causal else None
    torch.testing.assert_close(block(x), theirs(x, src_mask=mask, is_causal=causal))


@pytest.mark.parametrize("causal", [True, False])
def test_a_token_sees_what_it_may(causal: bool) -> None:
    torch.manual_seed(0)
    stack, x, weight = Transformer(8, 2, 2, causal=causal), torch.randn(1, 4, 8), torch.randn(8)
    # Weighted, for the plain sum of what leaves the last norm never changes.
    jacobian = torch.autograd.functional.jacobian(lambda y: (stack(y) * weight).sum((0, 2)), x)
    sees = jacobian.abs().sum((1, 3)) > 1e-6
    expected = torch.ones(4, 4, dtype=torch.bool)
    assert torch.equal(sees, expected.tril() if causal else expected)


def test_dropout_only_while_training() -> None:
    torch.manual_seed(0)
    stack = Transformer(8, 1, 2, causal=True, attention_dropout=0.5, residual_dropout=0.5)
    x = torch.randn(1, 4, 8)
    assert not torch.equal(stack(x), stack(x))
    stack.eval()
    assert torch.equal(stack(x), stack(x))


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(UserError, match="heads must be a divisor of the width, 8, got 3"):
        TransformerBlock(8, 3, causal=True)


def test_sinusoids_by_hand() -> None:
    # Frequencies 1 and 1e-4 of the number 2.
    expected = [0.9092974, 0.0002, -0.4161468, 1.0]
    torch.testing.assert_close(sinusoids(torch.tensor([2.0]), 4), torch.tensor([expected]))


def test_film_scales_and_shifts_between_the_convolutions() -> None:
    torch.manual_seed(0)
    block = FilmBlock(2, 4, 3, 3, 2)
    x, condition = torch.randn(1, 2, 6), torch.randn(1, 3)
    scale, shift = nn.functional.linear(
        nn.functional.mish(condition), block.film[1].weight, block.film[1].bias
    )[0].chunk(2)

    def convolved(part: nn.Sequential, y: torch.Tensor) -> torch.Tensor:
        y = nn.functional.conv1d(y, part[0].weight, part[0].bias, padding=1)
        y = nn.functional.group_norm(y, 2, part[1].weight, part[1].bias)
        return y * torch.tanh(nn.functional.softplus(y))

    inner = scale[None, :, None] * convolved(block.first, x) + shift[None, :, None]
    past = nn.functional.conv1d(x, block.past.weight, block.past.bias)
    torch.testing.assert_close(block(x, condition), convolved(block.second, inner) + past)


def test_unet_reads_everything_it_is_given() -> None:
    torch.manual_seed(0)
    net = ConditionalUNet1d(2, 3, (8, 16), kernel=3, groups=4, embedding=8)
    x, level, told = torch.randn(2, 8, 2), torch.tensor([3.0, 3.0]), torch.randn(2, 3)
    out = net(x, level, told)
    assert out.shape == x.shape and net.divisor == 2
    for changed in (
        net(x + torch.eye(8)[:, :1], level, told), net(x, level + 1, told), net(x, level, told + 1)
    ):  # fmt: skip
        assert ((changed - out).abs().amax((1, 2)) > 1e-6).all()
    alone = net(x[:1], level[:1], told[:1])
    torch.testing.assert_close(alone, out[:1])
    with pytest.raises(UserError, match="channels must be"):
        ConditionalUNet1d(2, 3, (8, 10), groups=4)
    with pytest.raises(UserError, match="kernel must be odd"):
        ConditionalUNet1d(2, 3, (8, 16), kernel=4)


@pytest.mark.parametrize("time", [1, 3, SHORT, SHORT + 1])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_a_convolution_is_the_same_whether_something_is_learned_or_not(time, kernel):
    torch.manual_seed(0)
    conv, x = SameConv1d(3, 4, kernel), torch.randn(2, 3, time)
    expected = torch.nn.functional.conv1d(x, conv.weight, conv.bias, padding=kernel // 2)
    with torch.no_grad():
        acting = conv(x)
    assert torch.allclose(acting, expected, atol=1e-6)
    assert torch.equal(conv(x), expected)
