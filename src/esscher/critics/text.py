"""Value networks that read text: an encoder of the transformers library, and perceptrons on it."""

import copy
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from esscher.critics import Values
from esscher.nn.mlp import MLP
from esscher.nn.sharding import Sharding, shard
from esscher.nn.trained import TrainedState

Module = TypeVar("Module", bound=nn.Module)


def twin_of(module: Module) -> Module:
    """A copy that shares what is not trained (the weights under adapters) and owns the rest."""
    shared: dict[int, Any] = {id(p): p for p in module.parameters() if not p.requires_grad}
    return copy.deepcopy(module, shared)


def body_of(model: Any) -> nn.Module:
    """A causal language model without its output matrix, with the adapters inside if it has any."""
    causal = model.get_base_model() if hasattr(model, "peft_config") else model
    return causal.base_model


class NotedState(TrainedState):
    """Its state is what was to be trained when it was made, also in copies that nothing trains."""

    def __init__(self) -> None:
        super().__init__()
        self._left_out: set[str] = set()

    def note_what_is_trained(self) -> None:
        """To be called once all parts are there; copies keep the note."""
        self._left_out = {n for n, p in self.named_parameters() if not p.requires_grad}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        state = nn.Module.state_dict(self, *args, **kwargs)
        return {name: value for name, value in state.items() if name not in self._left_out}


class TextEncoder(nn.Module):
    """Token sequences as vectors: the encoder's pooled output, else the state of one token.

    That is the last one where states only look back, and the first one where they look both ways.

    Args:
        model: whose output has last_hidden_state, and maybe pooler_output.
        tokenizer: that the tokens come from.
        own_tokenizer: of the encoder, if it reads other tokens than these; None if the same.
    """

    def __init__(self, model: nn.Module, tokenizer: Any = None, own_tokenizer: Any = None):
        super().__init__()
        self.model: Any = model
        self._tokenizers = (tokenizer, own_tokenizer)
        self.model.config.use_cache = False
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        self.width: int = self.model.config.hidden_size
        self._looks_back = _looks_back(self.model)

    def forward(
        self, tokens: Int[Tensor, "b t"], mask: Bool[Tensor, "b t"]
    ) -> Float[Tensor, "b d"]:
        """Vectors of texts that are padded on the right; every one has a token."""
        if self._tokenizers[1] is not None:
            tokens, mask = self._translated(tokens, mask)
        output = self.model(input_ids=tokens, attention_mask=mask.long())
        pooled = getattr(output, "pooler_output", None)
        if pooled is not None:
            return pooled.float()
        states = output.last_hidden_state
        place = mask.sum(-1) - 1 if self._looks_back else torch.zeros_like(mask[:, 0].long())
        return states[torch.arange(len(states), device=states.device), place].float()

    def _translated(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        theirs, own = self._tokenizers
        pairs = zip(tokens.tolist(), mask.tolist(), strict=True)
        rows = [[t for t, kept in zip(row, keep, strict=True) if kept] for row, keep in pairs]
        texts = theirs.batch_decode(rows, skip_special_tokens=True)
        limit = min(own.model_max_length, self.model.config.max_position_embeddings)
        own.truncation_side, own.padding_side = "left", "right"
        rows = own(texts, truncation=True, max_length=limit)["input_ids"]
        # A text without a token would have no state to take.
        marks = (own.eos_token_id, own.sep_token_id, own.pad_token_id, 0)
        mark = next(token for token in marks if token is not None)
        found = own.pad(
            {"input_ids": [row or [mark] for row in rows]}, padding=True, return_tensors="pt"
        ).to(tokens.device)
        return found["input_ids"], found["attention_mask"].bool()


class TwinTextCritic(NotedState):
    """Two Q of (what was seen, what was said) and two V of what was seen, on one encoder.

    The two texts are encoded apart, and their vectors put side by side for Q.
    """

    def __init__(self, encoder: TextEncoder):
        super().__init__()
        width = encoder.width
        self.encoder = encoder
        self.q = MLP((2 * width, width, width, 1), "relu", ensemble=2)
        self.v = MLP((width, width, width, 1), "relu", ensemble=2)
        device = next(encoder.parameters()).device
        self.q.to(device)
        self.v.to(device)
        self.note_what_is_trained()

    @property
    def trained(self) -> list[nn.Parameter]:
        """What an optimiser moves."""
        return [p for p in self.parameters() if p.requires_grad]

    def forward(
        self,
        seen: tuple[Int[Tensor, "b t"], Bool[Tensor, "b t"]],
        said: tuple[Int[Tensor, "b u"], Bool[Tensor, "b u"]],
    ) -> tuple[Values, Values]:
        """Q of what was said, and V."""
        state, utterance = self.encoder(*seen), self.encoder(*said)
        return self._of(self.q, torch.cat([state, utterance], -1)), self._of(self.v, state)

    def value(self, tokens: Int[Tensor, "b t"], mask: Bool[Tensor, "b t"]) -> Values:
        """V alone."""
        return self._of(self.v, self.encoder(tokens, mask))

    def _of(self, head: MLP, x: Float[Tensor, "b d"]) -> Values:
        return Values(mean=head(x).squeeze(-1))


class TokenValue(NotedState):
    """A value of every token of a text, from what stands before it.

    Args:
        model: whose last_hidden_state looks back only.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model: Any = model
        self.model.config.use_cache = False
        width = self.model.config.hidden_size
        self.head = MLP((width, width, 1), "relu").to(next(model.parameters()).device)
        self.note_what_is_trained()

    @property
    def trained(self) -> list[nn.Parameter]:
        """What an optimiser moves."""
        return [p for p in self.parameters() if p.requires_grad]

    def shard(self, device: torch.device, sharding: Sharding) -> None:
        """Leave this process its part of the model's weights (see nn/sharding.py), not of the head's.

        Raises:
            UserError: the model has no blocks of the classes that are to be sharded.
        """
        shard(self.model, self.model, device, sharding)
        self.head.to(device)

    def forward(
        self, tokens: Int[Tensor, "b t"], mask: Bool[Tensor, "b t"]
    ) -> Float[Tensor, "b t"]:
        """Of the tokens before each one; that of the first, before which nothing stands, is 0.

        Padding on the right.
        """
        return nn.functional.pad(self.after(tokens, mask)[:, :-1], (1, 0))

    def after(self, tokens: Int[Tensor, "b t"], mask: Bool[Tensor, "b t"]) -> Float[Tensor, "b t"]:
        """Of the tokens up to each one and with it."""
        states = self.model(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        return self.head(states.float()).squeeze(-1)


@torch.no_grad()
def _looks_back(model: Any) -> bool:
    """Whether the state of a token ignores what comes after it."""
    device = next(model.parameters()).device
    pair = torch.arange(2, device=device).unsqueeze(0)
    one, both = (model(input_ids=x).last_hidden_state[0, 0] for x in (pair[:, :1], pair))
    return torch.allclose(one, both, rtol=1e-3, atol=1e-3)
