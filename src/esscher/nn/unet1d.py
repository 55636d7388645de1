"""A U-Net along time, for sequences of actions that depend on what was observed."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from esscher.errors import require

SHORT = 8
"""Steps of a sequence up to which a convolution is faster as a matrix product."""


def sinusoids(level: Float[Tensor, "b"], width: int) -> Float[Tensor, "b w"]:
    """Sines and cosines of a number at width / 2 frequencies from 1 to 1e-4.

    Source: Vaswani et al. 2017, sec. 3.5, as diffusion models use it for noise levels.
    Raises: ValueError if width is not even and at least 4.
    """
    half = width // 2
    if width % 2 or half < 2:
        raise ValueError(f"width must be even and at least 4, got {width}")
    place = torch.arange(half, device=level.device)
    angle = level.float().unsqueeze(-1) * (-math.log(10_000) / (half - 1) * place).exp()
    return torch.cat([angle.sin(), angle.cos()], -1)


class SameConv1d(nn.Conv1d):
    """A convolution that keeps the length of its input; as one matrix product where nothing is learned
    and the input is short, which takes a third of the time then (weights are not reordered).
    """

    def __init__(self, into: int, out: int, kernel: int):
        super().__init__(into, out, kernel, padding=kernel // 2)

    def forward(self, input: Float[Tensor, "b i t"]) -> Float[Tensor, "b j t"]:  # noqa: A002 (torch's name)
        count, channels, time = input.shape
        if torch.is_grad_enabled() or time > SHORT or input.is_cuda:
            return super().forward(input)
        kernel = self.weight.shape[-1]
        seen = nn.functional.pad(input, (kernel // 2, kernel // 2)).unfold(-1, kernel, 1)
        rows = seen.transpose(1, 2).reshape(count * time, channels * kernel)
        assert self.bias is not None
        out = torch.addmm(self.bias, rows, self.weight.flatten(1).t())
        return out.view(count, time, -1).transpose(1, 2)


class _Convolved(nn.Sequential):
    """Convolution along time, group normalisation, Mish."""

    def __init__(self, into: int, out: int, kernel: int, groups: int):
        conv = SameConv1d(into, out, kernel)
        super().__init__(conv, nn.GroupNorm(groups, out), nn.Mish())


class FilmBlock(nn.Module):
    """Two convolutions; the condition scales and shifts every channel between them (FiLM)."""

    def __init__(self, into: int, out: int, condition: int, kernel: int, groups: int):
        super().__init__()
        self.first, self.second = (
            _Convolved(into, out, kernel, groups),
            _Convolved(out, out, kernel, groups),
        )
        self.film = nn.Sequential(nn.Mish(), nn.Linear(condition, 2 * out))
        self.past = nn.Conv1d(into, out, 1) if into != out else nn.Identity()

    def forward(
        self, x: Float[Tensor, "b i t"], condition: Float[Tensor, "b c"]
    ) -> Float[Tensor, "b j t"]:
        scale, shift = self.film(condition).unsqueeze(-1).chunk(2, 1)
        return self.second(scale * self.first(x) + shift) + self.past(x)


class ConditionalUNet1d(nn.Module):
    """From a noisy chunk of actions, its noise level and a condition to the noise in it.

    Each level has two blocks and halves the time, but the last; on the way up the same, with what went
    down joined on.

    Args:
        action_dim: a.
        condition_dim: c.
        channels: of each level.
        kernel: of the convolutions, odd.
        groups: of the normalisation, a divisor of all channels.
        embedding: width of the noise level's embedding, even.

    Source: Chi et al. 2023 (Diffusion Policy, arXiv 2303.04137), its convolutional network.
    """

    def __init__(
        self,
        action_dim: int,
        condition_dim: int,
        channels: Sequence[int] = (256, 512, 1024),
        *,
        kernel: int = 5,
        groups: int = 8,
        embedding: int = 256,
    ):
        super().__init__()
        require("kernel", kernel, kernel % 2 == 1, "odd")
        fit = len(channels) >= 1 and all(c >= 1 and c % groups == 0 for c in channels)
        require("channels", tuple(channels), fit, f"one or more multiples of groups, {groups}")
        self.embedding = embedding
        self.of_level = nn.Sequential(
            nn.Linear(embedding, 4 * embedding), nn.Mish(), nn.Linear(4 * embedding, embedding)
        )
        told = embedding + condition_dim
        widths = (action_dim, *channels)
        last = len(channels) - 1

        def blocks(into: int, out: int) -> nn.ModuleList:
            return nn.ModuleList(
                [
                    FilmBlock(into, out, told, kernel, groups),
                    FilmBlock(out, out, told, kernel, groups),
                ]
            )

        self.down, self.shrink = nn.ModuleList(), nn.ModuleList()
        for level, (into, out) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
            self.down.append(blocks(into, out))
            halve = nn.Conv1d(out, out, 3, stride=2, padding=1)
            self.shrink.append(halve if level < last else nn.Identity())
        self.middle = blocks(channels[-1], channels[-1])
        self.up, self.grow = nn.ModuleList(), nn.ModuleList()
        for level in range(last, 0, -1):
            self.up.append(blocks(2 * channels[level], channels[level - 1]))
            self.grow.append(nn.ConvTranspose1d(channels[level - 1], channels[level - 1], 4, 2, 1))
        self.head = nn.Sequential(
            _Convolved(channels[0], channels[0], kernel, groups),
            nn.Conv1d(channels[0], action_dim, 1),
        )
        self.divisor = 2**last

    def forward(
        self,
        x: Float[Tensor, "b h a"],
        level: Float[Tensor, "b"],
        condition: Float[Tensor, "b c"],
    ) -> Float[Tensor, "b h a"]:
        """The horizon h must be a multiple of `divisor`."""
        told = torch.cat([self.of_level(sinusoids(level, self.embedding)), condition], -1)
        hidden, kept = x.transpose(1, 2), []
        for blocks, shrink in zip(self.down, self.shrink, strict=True):
            hidden = self._through(blocks, hidden, told)
            kept.append(hidden)
            hidden = shrink(hidden)
        hidden = self._through(self.middle, hidden, told)
        for blocks, grow in zip(self.up, self.grow, strict=True):
            hidden = grow(self._through(blocks, torch.cat([hidden, kept.pop()], 1), told))
        return self.head(hidden).transpose(1, 2)

    def _through(self, blocks: nn.Module, x: Tensor, told: Tensor) -> Tensor:
        assert isinstance(blocks, nn.ModuleList)
        for block in blocks:
            x = block(x, told)
        return x
