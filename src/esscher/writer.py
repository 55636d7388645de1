"""A trained language model as its user wants it: prompts in, completions out."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from esscher.adapters.text import encode_prompt
from esscher.distributions.autoregressive import LanguageModel
from esscher.experience.text import collate_prompts
from esscher.runtime.rng import mix
from esscher.samplers.decoding import Decoding
from esscher.types import Completions


class Writer:
    """A language model with its tokenizer.

    Args:
        policy: the model.
        tokenizer: of the transformers library.
        write: how to draw completions, if not from the policy alone (guided decoding).
    """

    def __init__(
        self,
        policy: LanguageModel,
        tokenizer: Any,
        write: Callable[..., Completions] | None = None,
    ):
        self.policy, self.tokenizer = policy, tokenizer
        self._write = policy.generate if write is None else write

    @property
    def model(self) -> Any:
        """Of the transformers library, with its adapters if it has any."""
        return self.policy.model

    @torch.no_grad()
    def complete(
        self,
        prompts: Sequence[str | list[dict[str, str]]],
        *,
        seed: int = 0,
        decoding: Decoding | None = None,
    ) -> list[str]:
        """One completion of each prompt: a string, or a chat as a list of messages.

        Args:
            prompts: at least one.
            seed: of the draws; a completion depends on it, on its own prompt and place in the list.
            decoding: length, temperature and truncation.

        Raises:
            UserError: an empty prompt, one that does not fit the context, or a chat for a tokenizer
                without a template.
        """
        decoding = decoding or Decoding()
        ids = [encode_prompt(self.tokenizer, p, f"prompt {k}") for k, p in enumerate(prompts)]
        limit = self.policy.context_length
        if limit is not None:
            room = max(limit - max(map(len, ids)), 1)
            decoding = replace(decoding, max_new_tokens=min(decoding.max_new_tokens, room))
        batch = collate_prompts(range(len(ids)), ids, self.policy.pad_token)
        batch = batch.to(self.policy.head.weight.device)
        seeds = [mix(seed, number) for number in range(len(ids))]
        self.policy.eval()
        completions = self._write(batch.tokens, batch.mask, seeds, decoding)
        pairs = zip(completions.tokens, completions.completion_mask, strict=True)
        return [self.tokenizer.decode(t[m].tolist(), skip_special_tokens=True) for t, m in pairs]
