"""Language models from where users keep them, and back: folders of the transformers library, hub names,
functions of their own; adapters of peft on top.

Weights are read from safetensors only, and no code that comes with a model is run.
"""

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from esscher.adapters.imports import made, needed
from esscher.adapters.pretrained import check_is_there, without_progress_bars, written_whole
from esscher.distributions.autoregressive import LanguageModel
from esscher.distributions.vision_language import VisionLanguage
from esscher.errors import UserError
from esscher.experiment import ModelConfig
from esscher.files import readable
from esscher.runtime.rng import Phase, seed_phase

READ_FROM = (
    " (a folder with config.json, tokenizer and *.safetensors, a Hugging Face name, or "
    "module:function)"
)


def load_model(config: ModelConfig, device: torch.device) -> tuple[LanguageModel, Any]:
    """The model to be trained and its tokenizer.

    Raises:
        UserError: no such model, weights that would have to be unpickled, a tokenizer with more
            tokens than the model, or one without an end token.
    """
    assert config.source is not None
    if ":" in config.source and not Path(config.source).exists():
        with torch.enable_grad():  # Such a function may train what it returns.
            found = made(config.source, "model", **config.kwargs)
        model, tokenizer = _pair(found, config.source, "--model")
    else:
        model, tokenizer = pretrained(config.source)
    _check(model, tokenizer, config.source)
    policy = _wrapped(to_be_trained(model, config, device), tokenizer)
    policy.frozen_dtype = getattr(torch, config.dtype)
    return policy, tokenizer


def to_be_trained(model: Any, config: ModelConfig, device: torch.device) -> Any:
    """The model on its device with what is trained of it: all weights, or adapters around it."""
    if config.lora_rank:
        model = _with_adapters(model, config)
    else:
        model.to(torch.float32).requires_grad_(True)
    model.to(device).train()
    if config.gradient_checkpointing:
        _checkpoint_activations(model)
    return model


def frozen_model(source: str, device: torch.device, setting: str) -> tuple[LanguageModel, Any]:
    """A model that is only ever asked, in the precision of its file, and its tokenizer.

    Args:
        source: as of a ModelConfig, or an earlier run's RUN/model with its adapters, which are
            merged. A function that draws weights draws them from one fixed seed.
        device: where to put it.
        setting: that named it, for messages.

    Raises:
        UserError: as `load_model` does.
    """
    if ":" in source and not Path(source).exists():
        with torch.random.fork_rng(), torch.enable_grad():
            seed_phase(0, 0, Phase.INITIALISE)
            found = made(source, setting)
        model, tokenizer = _pair(found, source, setting)
    elif (Path(source) / "adapter_config.json").exists():
        model, tokenizer = _merged(source, setting)
    else:
        model, tokenizer = pretrained(source, setting)
    _check(model, tokenizer, source, setting)
    return _wrapped(model.requires_grad_(False).to(device).eval(), tokenizer), tokenizer


def load_encoder(source: str, device: torch.device, setting: str) -> tuple[nn.Module, Any]:
    """A network that turns text into states, to be trained, and its tokenizer.

    Args:
        source: a folder or Hugging Face name that transformers' AutoModel opens, or module:function
            for your own (returns both).
        device: where to put it.
        setting: that named it, for messages.

    Raises:
        UserError: it cannot be read.
    """
    transformers: Any = needed("transformers", source, "language")
    if ":" in source and not Path(source).exists():
        model, tokenizer = _pair(made(source, setting), source, setting)
    else:
        with readable(f"{setting} {source} cannot be read", READ_FROM):
            tokenizer = transformers.AutoTokenizer.from_pretrained(source)
            with without_progress_bars("transformers"):
                model, found = transformers.AutoModel.from_pretrained(
                    source, dtype="float32", use_safetensors=True, output_loading_info=True
                )
            # Models of masked tokens come without their pooler, which is then learned from nothing.
            _all_there(name for name in found["missing_keys"] if not name.startswith("pooler"))
    return model.to(torch.float32).requires_grad_(True).to(device), tokenizer


def save_model(
    policy: LanguageModel | VisionLanguage,
    tokenizer: Any,
    folder: Path,
    *,
    merged: bool = False,
    state: dict[str, Any] | None = None,
) -> Path:
    """Write a folder that from_pretrained opens (of AutoModelForCausalLM, say), whole or not at all.

    Args:
        policy: with adapters, the adapters alone are written (the folder names their base model).
        tokenizer: saved beside it.
        folder: replaced if it is there.
        merged: write adapters into the weights that they change.
        state: the model's whole weights; None: it holds them itself.
    """
    model = policy.model
    if merged and hasattr(model, "peft_config"):
        import copy

        model = copy.deepcopy(model).merge_and_unload()
    with written_whole(folder) as writing:
        with without_progress_bars("transformers"):
            model.save_pretrained(writing, safe_serialization=True, state_dict=state)
        tokenizer.save_pretrained(writing)
    return folder


def _wrapped(model: Any, tokenizer: Any) -> LanguageModel:
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    ends = {end, *_as_list(getattr(model.generation_config, "eos_token_id", None))}
    # Padding is masked wherever it is read, so that any token can stand for it.
    return LanguageModel(model, end_tokens=sorted(ends), pad_token=end if pad is None else pad)


def _merged(source: str, setting: str) -> tuple[Any, Any]:
    """A folder of adapters, written into the weights that they change."""
    transformers: Any = needed("transformers", source, "language")
    peft: Any = needed("peft", source, "language")
    with (
        readable(f"{setting} {source} holds adapters, and they or their model cannot be read"),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("error", "Found missing adapter keys")  # They would be 0.
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        with without_progress_bars("transformers"):
            model = peft.AutoPeftModelForCausalLM.from_pretrained(source, dtype="auto")
    return model.merge_and_unload(), tokenizer


def pretrained(
    source: str,
    setting: str = "--model",
    *,
    model_class: str = "AutoModelForCausalLM",
    reader: str = "AutoTokenizer",
) -> tuple[Any, Any]:
    """A model and what reads for it, from a folder or a Hugging Face name.

    Args:
        source: folder or name.
        setting: that named it, for messages.
        model_class: of transformers.
        reader: likewise, of the tokenizer or processor.

    Raises:
        UserError: it cannot be read, or holds adapters.
    """
    transformers: Any = needed("transformers", source, "language")
    check_is_there(source, setting)
    with (
        readable(f"{setting} {source} cannot be read", READ_FROM),
        without_progress_bars("transformers"),
    ):
        tokenizer = getattr(transformers, reader).from_pretrained(source)
        model, found = getattr(transformers, model_class).from_pretrained(
            source, dtype="auto", use_safetensors=True, output_loading_info=True
        )
        _all_there(found["missing_keys"])
    if hasattr(model, "peft_config"):
        raise UserError(f"{setting} {source} holds adapters: merge them first (esscher export RUN)")
    return model, tokenizer


def _pair(found: Any, source: str, setting: str) -> tuple[Any, Any]:
    """What a function of the user's must return."""
    if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], nn.Module)):
        raise UserError(
            f"{setting} {source} must return a model and its tokenizer, got a {type(found).__name__}"
        )
    return found


def _all_there(missing: Iterable[str]) -> None:
    """Raise where the library would draw weights at random."""
    for name in sorted(missing):
        raise ValueError(f"its files lack the weights {name}")


def check_vocabulary(model: Any, tokenizer: Any, source: str, setting: str = "--model") -> None:
    """Refuse a tokenizer that writes tokens which the model does not have.

    Raises:
        UserError: it does.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(
            f"{setting} {source}: the tokenizer has {len(tokenizer)} tokens and the model {rows}: they "
            "do not belong together (or call model.resize_token_embeddings and save it again)"
        )


def _check(model: Any, tokenizer: Any, source: str, setting: str = "--model") -> None:
    check_vocabulary(model, tokenizer, source, setting)
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{setting} {source}: the tokenizer has no end token, so that no completion would end: "
            "set tokenizer.eos_token and save it again"
        )


def _with_adapters(model: Any, config: ModelConfig) -> Any:
    peft: Any = needed("peft", "model.lora_rank", "language")
    model.to(getattr(torch, config.dtype))
    adapters = peft.LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    wrapped = peft.get_peft_model(model, adapters)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return wrapped


def _as_list(ids: Any) -> list[int]:
    return [] if ids is None else list(ids) if isinstance(ids, list | tuple) else [int(ids)]


def _checkpoint_activations(model: Any) -> None:
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # transformers has renamed it.
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    model.enable_input_require_grads()
