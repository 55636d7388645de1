"""A stack of transformer blocks that normalise before each part, causal or not."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import dropout, gelu, scaled_dot_product_attention

from esscher.errors import require


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + perceptron(norm(x)).

    Args:
        width: of a token.
        heads: that share the width.
        causal: a token sees itself and those before it; else all.
        attention_dropout: of attention weights while training, in [0, 1).
        residual_dropout: of what is added to x while training, in [0, 1).

    Raises:
        UserError: the heads do not divide the width.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        causal: bool,
        attention_dropout: float = 0.0,
        residual_dropout: float = 0.0,
    ):
        super().__init__()
        divides = heads >= 1 and width % heads == 0
        require("heads", heads, divides, f"a divisor of the width, {width}")
        self.heads, self.causal = heads, causal
        self.attention_dropout, self.residual_dropout = attention_dropout, residual_dropout
        self.attention_norm, self.perceptron_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_qkv, self.from_heads = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Float[Tensor, "b t h"]) -> Float[Tensor, "b t h"]:
        x = x + dropout(self._attend(self.attention_norm(x)), self.residual_dropout, self.training)
        inner = self.narrow(gelu(self.widen(self.perceptron_norm(x))))
        return x + dropout(inner, self.residual_dropout, self.training)

    def _attend(self, x: Float[Tensor, "b t h"]) -> Float[Tensor, "b t h"]:
        queries, keys, values = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.to_qkv(x).chunk(3, -1)
        )
        mixed = scaled_dot_product_attention(
            queries,
            keys,
            values,
            dropout_p=self.attention_dropout if self.training else 0.0,
            is_causal=self.causal,
        )
        return self.from_heads(mixed.transpose(1, 2).flatten(-2))


class Transformer(nn.Module):
    """Blocks one after the other, and a last normalisation.

    Weights are drawn from N(0, 0.02^2) and biases are 0, as GPT-2 has them.

    Args:
        width: of a token.
        layers: number of blocks, >= 1.
        heads: that share the width.
        causal: a token sees itself and those before it; else all.
        attention_dropout: see the block.
        residual_dropout: see the block.
    """

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        *,
        causal: bool,
        attention_dropout: float = 0.0,
        residual_dropout: float = 0.0,
    ):
        super().__init__()
        require("layers", layers, layers >= 1, ">= 1")
        self.blocks = nn.ModuleList(
            TransformerBlock(
                width,
                heads,
                causal=causal,
                attention_dropout=attention_dropout,
                residual_dropout=residual_dropout,
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.apply(draw_small)

    def forward(self, tokens: Float[Tensor, "b t h"]) -> Float[Tensor, "b t h"]:
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)


@torch.no_grad()
def draw_small(module: nn.Module) -> None:
    """GPT-2's first weights, for `module.apply`."""
    if isinstance(module, nn.Linear):
        module.weight.normal_(0.0, 0.02)
        if module.bias is not None:
            module.bias.zero_()
