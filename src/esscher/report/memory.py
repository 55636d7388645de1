"""How much memory training a language model takes, by calculation.

Frozen weights: 2 bytes each in bfloat16. Trained weights: 4 bytes, and 12 more for the gradient and
the two moments of AdamW. Activations with gradient checkpointing: the input of every layer, and all
that one layer keeps while its gradient is taken.
"""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Shape:
    """Of a Llama-like model."""

    layers: int
    width: int
    inner: int
    """Of the feed-forward layers."""
    heads: int
    key_value_heads: int
    vocabulary: int

    @property
    def linear(self) -> int:
        """Weights of the linear layers that low-rank adapters are put on."""
        return self.layers * sum(into * out for into, out in self._linears())

    @property
    def weights(self) -> int:
        """Of the whole model, embeddings and output matrix apart."""
        return self.linear + 2 * self.vocabulary * self.width

    def adapters(self, rank: int) -> int:
        """Weights of low-rank adapters on every linear layer."""
        return self.layers * sum(rank * (into + out) for into, out in self._linears())

    def _linears(self) -> list[tuple[int, int]]:
        keys = self.width // self.heads * self.key_value_heads
        attention = [(self.width, self.width)] * 2 + [(self.width, keys)] * 2
        return attention + [(self.width, self.inner)] * 2 + [(self.inner, self.width)]


LLAMA_7B = Shape(32, 4096, 11008, 32, 32, 32_000)


@dataclass(frozen=True)
class Need:
    """Bytes."""

    frozen: float
    """Weights that are not trained, and the reference's."""
    trained: float
    """Trained weights, gradients and moments."""
    activations: float

    @property
    def total(self) -> float:
        return self.frozen + self.trained + self.activations


def need(
    shape: Shape, *, lora_rank: int, rows: int, tokens: int, chunk: int = 512, width: int = 2
) -> Need:
    """Of an update with gradient checkpointing and bfloat16 compute.

    Args:
        shape: of the model.
        lora_rank: of adapters on frozen bfloat16 weights, the reference being the model without them;
            0: all weights are trained in float32, beside a frozen reference in bfloat16.
        rows: sequences whose activations are held at once (of pairs, two each).
        tokens: a sequence.
        chunk: positions whose logits are held at a time.
        width: bytes of a number in the hidden states.
    """
    trained = shape.adapters(lora_rank) if lora_rank else shape.weights
    frozen = 2 * shape.weights
    layer_inputs = shape.layers * rows * tokens * shape.width * width
    # Kept by one layer, as measured (benchmarks/language_7b.py): about 16 tensors as wide as the model
    # and 6 as wide as its inner layer, adapters' float32 inputs among them.
    one_layer = rows * tokens * width * (16 * shape.width + 6 * shape.inner)
    logits = chunk * shape.vocabulary * (4 + width)
    return Need(frozen, 16 * trained, layer_inputs + one_layer + logits)


def memory_rows() -> list[tuple[str, ...]]:
    """For a table: adapters and whole models, in GiB."""
    ways = [
        ("LoRA of rank 16, 8 sequences of 1,024 tokens", 16, 8),
        ("LoRA of rank 16, 1 sequence of 1,024 tokens", 16, 1),
        ("all weights, 8 sequences of 1,024 tokens", 0, 8),
    ]
    rows = []
    for name, rank, count in ways:
        found = need(LLAMA_7B, lora_rank=rank, rows=count, tokens=1_024)
        parts = (found.frozen, found.trained, found.activations, found.total)
        rows.append((name, *[f"{part / GIB:.1f} GiB" for part in parts]))
    return rows
