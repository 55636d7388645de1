"""Small language models with rows for them, which the tests of several methods share."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from esscher.types import Pairs


def llama(
    vocabulary: int,
    dtype: torch.dtype = torch.float64,
    adapters: bool = False,
    size: float = 0.3,
    **changes: Any,
) -> Any:
    """Random weights, far from uniform, so that mistakes show; adapters in the weights' precision."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **{
            "vocab_size": vocabulary,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
        }
        | changes
    )
    model = transformers.LlamaForCausalLM(config).to(dtype).train()
    shaken(model.parameters(), size)
    if not adapters:
        return model
    import peft

    lora = peft.LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(model, lora, autocast_adapter_dtype=False)


def shaken(parameters: Iterable[torch.Tensor], size: float) -> None:
    """Noise of this size on every weight."""
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(size * torch.randn_like(parameter))


def padded_pairs(pairs: Sequence[Any], pad: int, left: int = 0, right: int = 0) -> Pairs:
    """(prompt, chosen, rejected) each, padded to the longest and beyond."""
    rows = [(prompt, answer) for prompt, *answers in pairs for answer in answers]
    width = max(len(p) + len(c) for p, c in rows) + left + right
    tokens = torch.full((len(rows), width), pad)
    token_mask, completion_mask = (torch.zeros(len(rows), width, dtype=torch.bool) for _ in "ab")
    for k, (prompt, completion) in enumerate(rows):
        start, end = left + len(prompt), left + len(prompt) + len(completion)
        tokens[k, left:end] = torch.tensor(prompt + completion)
        token_mask[k, left:end], completion_mask[k, start:end] = True, True
    return Pairs(
        tokens=tokens.view(len(pairs), 2, width),
        token_mask=token_mask.view(len(pairs), 2, width),
        completion_mask=completion_mask.view(len(pairs), 2, width),
        row=torch.arange(len(pairs)),
    )


def rates_and_norms(method: Any, batch: Any, updates: int) -> tuple[list[float], list[float]]:
    """The learning rate, and the norm of the gradient that the optimiser is given, of each update."""
    rates, norms = [], []

    def step(gradients: list[torch.Tensor]) -> None:
        rates.append(method.opt.learning_rate)
        norms.append(torch.cat([g.flatten() for g in gradients]).norm().item())

    method.opt._fused_step = step
    for number in range(updates):
        method.update(batch, number)
    return rates, norms
