"""A causal language model of the transformers library as a distribution over completions.

Log-probabilities are taken from hidden states and the output matrix, in chunks, so that no tensor of
batch x time x vocabulary is ever held. Generation keeps a key-value cache, drops rows that are done,
and gives every sequence its own random numbers.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from esscher.errors import UserError
from esscher.functional.sequences import (
    shifted,
    token_log_probs,
    token_log_probs_and_entropy,
)
from esscher.nn.sharding import Sharding, held_whole, put_together, shard
from esscher.nn.trained import TrainedState
from esscher.samplers.decoding import Decoding
from esscher.samplers.generation import complete
from esscher.samplers.key_values import roomy
from esscher.types import Completions


@dataclass(frozen=True, kw_only=True)
class TextSpec:
    """What a language method has to know of its task."""

    model: "LanguageModel"
    """To be trained; the method's policy."""
    tokenizer: Any
    """Of the transformers library."""
    max_length: int
    """Most tokens of a prompt and its completion together."""
    num_agents: int = 1


class LanguageModel(TrainedState):
    """Scores and draws completions of token sequences.

    Dropout is switched off, also in training: the probabilities of a completion must not depend on
    who asks.

    Args:
        model: an AutoModelForCausalLM, or one with adapters of peft around it.
        end_tokens: any of them ends a completion, and counts as a part of it.
        pad_token: fills up rows; never scored.
        frozen_dtype: of copies that are not trained.

    Raises:
        UserError: the model's logits are not its last hidden states times its output matrix.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        end_tokens: Sequence[int],
        pad_token: int,
        frozen_dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.model: Any = model
        self.end_tokens, self.pad_token = tuple(end_tokens), pad_token
        self._adapters_off = self._no_gradient = False
        self.frozen_dtype = frozen_dtype
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        parameters = inspect.signature(self._causal.forward).parameters
        self._takes_positions = "position_ids" in parameters
        # transformers has renamed it.
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"
        self._check_head()

    def frozen(self) -> "LanguageModel":
        """This model as it is now (that is: before training), without gradients.

        With adapters it shares all weights and switches the adapters off; else it is a copy, in
        `frozen_dtype`.
        """
        twin = copy.copy(self)
        twin._modules = dict(self._modules)
        if hasattr(self.model, "peft_config"):
            twin._adapters_off = True
        else:
            twin.model = copy.deepcopy(self.model).requires_grad_(False).to(self.frozen_dtype)
            twin.model.eval()
        twin._no_gradient = True
        return twin

    @property
    def trained(self) -> list[nn.Parameter]:
        """What an optimiser moves."""
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def _causal(self) -> Any:
        """The model without what peft wraps around it; its adapters, which lie inside, stay."""
        return self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model

    @property
    def head(self) -> nn.Linear:
        """The output matrix, one row a token of the vocabulary."""
        return self._causal.get_output_embeddings()

    @property
    def context_length(self) -> int | None:
        """Most tokens of a prompt and its completion together; None where there is no limit."""
        return getattr(self._causal.config, "max_position_embeddings", None)

    @property
    def vocabulary(self) -> int:
        return self.head.weight.shape[0]

    def log_prob(
        self,
        tokens: Int[Tensor, "b t"],
        token_mask: Bool[Tensor, "b t"],
        completion_mask: Bool[Tensor, "b t"],
        *,
        temperature: float = 1.0,
    ) -> Float[Tensor, "b t"]:
        """Log-probability, in nats, of each token of the completions given all before it; else 0.

        Args:
            tokens: prompts and completions; padding on either side.
            token_mask: what is no padding.
            completion_mask: what is scored; never the first token.
            temperature: logits are divided by this, > 0.

        Gradient: to the model's parameters.
        """
        asked = (token_log_probs, tokens, token_mask, completion_mask, temperature)
        return nn.functional.pad(self._ask(self._of_tokens, *asked), (1, 0))

    def log_prob_and_entropy(
        self,
        tokens: Int[Tensor, "b t"],
        token_mask: Bool[Tensor, "b t"],
        completion_mask: Bool[Tensor, "b t"],
        *,
        temperature: float = 1.0,
    ) -> tuple[Float[Tensor, "b t"], Float[Tensor, "b t"]]:
        """`log_prob`, and the entropy of the distribution that each token was drawn from, nats.

        Gradient: to the model's parameters; none through the entropy.
        """
        asked = (token_log_probs_and_entropy, tokens, token_mask, completion_mask, temperature)
        logp, entropy = (nn.functional.pad(x, (1, 0)) for x in self._ask(self._of_tokens, *asked))
        return logp, entropy

    def hidden(
        self, tokens: Int[Tensor, "b t"], token_mask: Bool[Tensor, "b t"]
    ) -> Float[Tensor, "b t d"]:
        """Last hidden states, for a head of one's own.

        Gradient: to the model's parameters.
        """
        return self._ask(self._hidden, tokens, token_mask)

    def next_logits(
        self, tokens: Int[Tensor, "b t"], mask: Bool[Tensor, "b s"], cache: Any = None
    ) -> tuple[Float[Tensor, "b v"], Any]:
        """Logits of the token after each row (padded on the left), and the cache to go on with.

        Args:
            tokens: all of them, or with a cache only those that it has not seen.
            mask: of all tokens so far, the cached ones included.
        """
        output = self._ask(self._step, tokens, mask, cache)
        cache = getattr(output, self._cache_name)
        return output.logits[:, -1], cache if torch.is_grad_enabled() else roomy(cache)

    def generate(
        self,
        prompts: Int[Tensor, "p t"],
        prompt_mask: Bool[Tensor, "p t"],
        seeds: Sequence[int],
        decoding: Decoding,
    ) -> Completions:
        """Completions of prompts, equally many of each: as many in all as there are seeds.

        Args:
            prompts: padded on the left.
            prompt_mask: what is no padding.
            seeds: one a completion, those of the first prompt first. A completion depends on its
                prompt, its seed and the weights (up to rounding, which depends on the batch).
            decoding: how to draw.

        Raises:
            UserError: prompts and completions do not fit the model's context, a prompt is empty, or
                the seeds cannot be shared equally among the prompts.
        """
        with self.writing():
            return complete(
                self.next_logits,
                prompts,
                prompt_mask,
                seeds,
                decoding,
                end_tokens=self.end_tokens,
                pad_token=self.pad_token,
                context_length=self.context_length,
            )

    @contextmanager
    def writing(self) -> Iterator[None]:
        """A model that recomputes activations keeps no cache while it is in training mode; one whose
        weights are sharded is put together once and not for each token.
        """
        training = self.model.training
        self.model.eval()
        try:
            with held_whole(self.model):
                yield
        finally:
            self.model.train(training)

    def shard(self, device: torch.device, sharding: Sharding) -> None:
        """Leave this process its part of the weights (see nn/sharding.py), when all copies are made.

        Raises:
            UserError: the model has no blocks of the classes that are to be sharded.
        """
        shard(self.model, self._causal, device, sharding)

    def _ask(self, piece: Callable[..., Any], *args: Any) -> Any:
        with self._as_configured():
            return put_together(self.model, piece, *args)

    def _as_configured(self) -> AbstractContextManager[Any]:
        if self._adapters_off:
            return _both(self.model.disable_adapter(), torch.no_grad())
        return torch.no_grad() if self._no_gradient else nullcontext()

    def _of_tokens(
        self,
        formula: Callable[..., Any],
        tokens: Int[Tensor, "b t"],
        token_mask: Bool[Tensor, "b t"],
        completion_mask: Bool[Tensor, "b t"],
        temperature: float,
    ) -> Any:
        """What a formula makes of hidden states and the output matrix, at each token but the first."""
        hidden = self._hidden(tokens, token_mask)
        head, (targets, mask) = self.head, shifted(tokens, completion_mask)
        return formula(
            hidden[:, :-1], head.weight, targets, mask, bias=head.bias, temperature=temperature
        )

    def _hidden(
        self, tokens: Int[Tensor, "b t"], mask: Bool[Tensor, "b t"]
    ) -> Float[Tensor, "b t d"]:
        options = self._inputs(tokens, mask)
        return self._causal.base_model(**options, use_cache=False).last_hidden_state

    def _step(self, tokens: Int[Tensor, "b t"], mask: Bool[Tensor, "b s"], cache: Any) -> Any:
        options = self._inputs(tokens, mask)
        options[self._cache_name] = cache
        return self._causal(**options, use_cache=True, logits_to_keep=1)

    def _inputs(self, tokens: Int[Tensor, "b t"], mask: Bool[Tensor, "b s"]) -> dict[str, Any]:
        """Positions count what is no padding, so that padding on the left changes nothing."""
        options: dict[str, Any] = {"input_ids": tokens, "attention_mask": mask.long()}
        if self._takes_positions:
            positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
            options["position_ids"] = positions[:, -tokens.shape[1] :]
        return options

    @torch.no_grad()
    def _check_head(self) -> None:
        device = self.head.weight.device
        tokens = torch.arange(2, device=device).remainder(self.vocabulary).unsqueeze(0)
        mask = torch.ones_like(tokens, dtype=torch.bool)
        logits = self._causal(**self._inputs(tokens, mask), use_cache=False).logits
        ours = nn.functional.linear(self._hidden(tokens, mask), self.head.weight, self.head.bias)
        if not torch.allclose(ours.float(), logits.float(), rtol=1e-2, atol=1e-2):
            raise UserError(
                f"{type(self._causal).__name__} changes its logits after the output matrix (such as "
                "by soft-capping or scaling), which log-probabilities in chunks do not support yet"
            )


@contextmanager
def _both(*contexts: AbstractContextManager[Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield
