"""Diffusion models from where users keep them, and back: pipelines of the diffusers library in folders
or under hub names, functions of the user's own; adapters of peft on top.

Weights are read from safetensors only, and no code that comes with a model is run.

| pipeline | draws by | sample |
|---|---|---|
| StableDiffusionPipeline | `prompt` | latent |
| DiTPipeline | `label` | latent; image where it has no autoencoder (`vae`) |
| DDPMPipeline, DDIMPipeline (UNet2DModel) | `label` where it has classes, else nothing | image |

Where samples are drawn, clean estimates are clipped as the scheduler says (clip_sample). Dynamic
thresholding is refused.
"""

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from esscher.adapters.imports import made, needed
from esscher.adapters.own_denoiser import model_of
from esscher.adapters.pretrained import check_is_there, without_progress_bars, written_whole
from esscher.distributions.diffusion import DiffusionModel
from esscher.errors import UserError, nearest, require
from esscher.experiment import ModelConfig
from esscher.files import readable
from esscher.functional.diffusion import (
    BetaSchedule,
    Prediction,
    alpha_bars,
    denoised_of,
    input_scale,
    over,
    sigma_of_alpha_bar,
)
from esscher.samplers.denoisers import Between, Condition, Discrete, whole_steps

Levels = Callable[[int], Float[Tensor, "k"]]
"""Number of steps -> noise levels, falling, and the last one below them."""

NETWORKS = {
    "StableDiffusionPipeline": "unet",
    "DiTPipeline": "transformer",
    "DDPMPipeline": "unet",
    "DDIMPipeline": "unet",
}
STEPS_OF_TRAINING = ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler")
CLIPPING = ("DDIMScheduler", "DDPMScheduler")
SIGMAS = (
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "UniPCMultistepScheduler",
)
WHOLE_STEPS = (
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
)
"""Those of them that tell the network whole steps alone; besides, they begin and end in its own
coordinates, of unit variance."""
FLOWS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
OTHER_SPACINGS = (
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_lu_lambdas",
)
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
OWN = "esscher.json"
"""Beside a pipeline, what its own files do not say."""
LEAST_SIGNAL = 2.0**-24
"""Share of the signal's variance at a last step that has none; diffusers takes the same of schedulers
that go by sigma."""
LESS_SIGNAL = 2.0**-40
"""That of the others, which have none there: in place of 0, which has no finite noise level."""
LATEST = 1 - 1e-6
"""Time at which a flow begins; at 1 there would be noise alone, and no finite noise level."""


def load_diffusion(config: ModelConfig, device: torch.device) -> DiffusionModel:
    """The model to be trained, or only drawn from.

    A function of the user's own returns a pipeline of diffusers, a `DiffusionModel`, or a denoiser
    D(x, sigma, condition) with the attribute `shape` of one sample; of a denoiser the attributes
    `levels`, `most_steps`, `null`, `encode`, `decode`, `invert` and `columns` are read if they are
    there, as they are told to a `DiffusionModel`. Its default levels are those of Karras et al., from
    80 to 0.002, then 0.

    Whatever it is, it is in evaluation mode from here on, in training too: a sample depends on its
    condition, its seed and the weights alone.

    Args:
        config: `source` says where; kwargs go to a module:function, else they may hold null_class,
            the class that stands for none (of a UNet2DModel: a DiT says so itself).
        device: where to put it.

    The safety checker of a pipeline is neither read nor saved.

    Raises:
        UserError: no such model, weights that would have to be unpickled, a pipeline, network or
            scheduler of a kind that is not listed here, or one whose noise levels are not finite.
    """
    assert config.source is not None
    own = ":" in config.source and not Path(config.source).exists()
    if own:
        with torch.enable_grad():  # Such a function may train what it returns.
            found = made(config.source, "model", **config.kwargs)
    else:
        found = _pretrained(config.source)
    if type(found).__name__ in NETWORKS:
        return _of_pipeline(found, config, device, _null_class(found, config, own))
    if config.lora_rank or config.gradient_checkpointing:
        field = "lora_rank" if config.lora_rank else "gradient_checkpointing"
        raise UserError(
            f"model.{field} is for pipelines of diffusers, and {config.source} is a module of your "
            "own: do it there"
        )
    whole = found if isinstance(found, DiffusionModel) else model_of(found, config.source)
    return whole.to(device).eval()


def save_diffusion(model: DiffusionModel, folder: Path, *, adapters_only: bool = False) -> Path:
    """Write a folder that DiffusionPipeline.from_pretrained opens, whole or not at all.

    Adapters are written into the weights that they change. Of a module of the user's own the state is
    written, as model.safetensors, under the module's own names: `load_state_dict` takes it. A model
    that draws in one step gets a scheduler whose one step that is (num_inference_steps=1). Which class
    stands for none, which a U-Net does not say, is written to esscher.json for `load_diffusion`.

    Args:
        model: from `load_diffusion`.
        folder: replaced if it is there.
        adapters_only: only the adapters, as pytorch_lora_weights.safetensors, which
            pipeline.load_lora_weights opens.

    Raises:
        UserError: adapters_only of a model without, or whose pipeline cannot open them.
    """
    pipeline: Any = model.pipeline
    network: Any = None if pipeline is None else model.denoiser.network.inner
    adapted = hasattr(network, "merge_and_unload")
    if adapters_only and not (adapted and hasattr(pipeline, "load_lora_weights")):
        kind = "a model of your own" if pipeline is None else type(pipeline).__name__
        raise UserError(
            f"adapters can be saved alone where a pipeline has them and can open them, and this is "
            f"{kind} {'with' if adapted else 'without'} adapters: save the whole model"
        )
    with written_whole(folder) as writing:
        if pipeline is None:
            _save_state(model.denoiser, writing)
        elif adapters_only:
            layers = _adapter_state(network)
            type(pipeline).save_lora_weights(writing, unet_lora_layers=layers)
        else:
            whole = _whole(pipeline, network)
            if model.one_step_at is not None and not _is_flow(pipeline.scheduler):
                whole.register_modules(
                    scheduler=_of_one_step(pipeline.scheduler, model.one_step_at)
                )
            with without_progress_bars(*_libraries_of(type(pipeline).__name__)):
                whole.save_pretrained(writing, safe_serialization=True)
            if isinstance(null := model.null, Tensor) and "label" in model.columns:
                (writing / OWN).write_text(json.dumps({"null_class": int(null)}) + "\n")
    return folder


def _of_one_step(scheduler: Any, sigma: float) -> Any:
    """A scheduler whose training ends at this noise level, where its one step begins.

    The levels below it, and what the network is told of each, stay the scheduler's.
    """
    diffusers: Any = needed("diffusers", "a model of one step", "diffusion")
    table = noise_table(scheduler)
    count = int((sigma_of_alpha_bar(table) - sigma).abs().argmin()) + 1
    kept = table[:count]
    betas = 1 - kept / torch.cat([table.new_ones(1), kept[:-1]])
    return diffusers.DDIMScheduler(
        num_train_timesteps=count,
        trained_betas=betas.tolist(),
        timestep_spacing="trailing",
        prediction_type=scheduler.config.prediction_type,
        clip_sample=False,
    )


# ---- noise levels


def noise_table(scheduler: Any) -> Float[Tensor, "t"]:
    """Share of the signal's variance after each training step, in float64.

    Betas rescaled to leave no signal (Lin et al. 2024, arXiv 2305.08891, algorithm 1) keep a little of
    it at the last step (`LEAST_SIGNAL`, `LESS_SIGNAL`), or half of what the step before has if that is
    less, so that its noise level is finite: 4096 or more.

    Raises:
        UserError: the signal is lost and the network predicts the noise, which then says nothing.
    """
    config = scheduler.config
    betas = config.get("trained_betas")
    if betas is not None:
        table = (1 - torch.as_tensor(list(betas), dtype=torch.float64)).cumprod(0)
    elif config.beta_schedule in get_args(BetaSchedule):
        steps, ends = config.num_train_timesteps, (config.beta_start, config.beta_end)
        try:
            table = alpha_bars(config.beta_schedule, steps, *ends)
        except ValueError as error:
            raise UserError(f"{type(scheduler).__name__}: {error}") from error
    else:
        return scheduler.alphas_cumprod.double().clone()
    if config.get("rescale_betas_zero_snr", False):
        if config.prediction_type == "epsilon":
            raise UserError(
                "the scheduler rescales its betas so that the last step has no signal "
                "(rescale_betas_zero_snr), and the network predicts the noise, from which no image "
                "follows there: set rescale_betas_zero_snr to false in scheduler_config.json"
            )
        root = table.sqrt()
        table = ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()
        if len(table) < 2:
            raise UserError(
                f"{type(scheduler).__name__} has {len(table)} training step, and "
                "rescale_betas_zero_snr needs num_train_timesteps of 2 or more: set it to false in "
                "scheduler_config.json"
            )
        least = LESS_SIGNAL if type(scheduler).__name__ in STEPS_OF_TRAINING else LEAST_SIGNAL
        before = float(table[-2])
        table[-1] = least if before > least else before / 2
    return table


def levels_of(scheduler: Any) -> Levels:
    """Steps -> the noise levels that a scheduler would take, by its spacing and its last level.

    A step that would not change the noise level is left out.

    Raises:
        UserError: from the levels, if the scheduler's own steps are none that can be taken.
    """
    name = type(scheduler).__name__
    flow = _is_flow(scheduler)
    table = torch.ones(0) if flow else sigma_of_alpha_bar(noise_table(scheduler))
    other = any(scheduler.config.get(spacing, False) for spacing in OTHER_SPACINGS)
    other = other or scheduler.config.get("interpolation_type", "linear") != "linear"
    if name in STEPS_OF_TRAINING:
        ends_clean = scheduler.config.get("set_alpha_to_one", True)
        if name == "PNDMScheduler":
            # Its own steps come twice; those of DDIM are the same without.
            diffusers: Any = needed("diffusers", name, "diffusion")
            scheduler = diffusers.DDIMScheduler.from_config(scheduler.config)
    else:
        ends_clean = scheduler.config.get("final_sigmas_type", "zero") == "zero"

    def levels(steps: int) -> Float[Tensor, "k"]:
        asked = copy.deepcopy(scheduler)
        asked.set_timesteps(steps)
        if flow:
            time = asked.sigmas.double().clamp(max=LATEST)
            found = time / (1 - time)
        elif other:
            found = asked.sigmas.double()
        else:
            last = table.new_zeros(1) if ends_clean else table[:1]
            found = torch.cat([_between(table, asked.timesteps.double()), last])
        changes = torch.ones(len(found), dtype=torch.bool)
        changes[1:] = found[1:] != found[:-1]
        if int(changes.sum()) < 2:
            raise UserError(
                f"draw_steps must be >= 2 with this {name}, got {steps}: its only step would be at its "
                f"last noise level, {float(found[0]):g} (or set timestep_spacing to trailing in "
                "scheduler_config.json)"
            )
        return found[changes]

    return levels


def _between(table: Tensor, place: Tensor) -> Tensor:
    """A table's value at places between its rows."""
    if float(place.max()) > len(table) - 1:
        raise UserError(
            f"the scheduler begins at step {float(place.max()):g} of 0 to {len(table) - 1}: take "
            "fewer steps, or set steps_offset to 0 in scheduler_config.json"
        )
    low = place.floor().long()
    high = place.ceil().long()
    return table[low] + (place - low) * (table[high] - table[low])


def _is_flow(scheduler: Any) -> bool:
    config = scheduler.config
    return type(scheduler).__name__ in FLOWS or bool(config.get("use_flow_sigmas", False))


def _denoiser(network: nn.Module, scheduler: Any) -> nn.Module:
    name, config = type(scheduler).__name__, scheduler.config
    known = (*STEPS_OF_TRAINING, *SIGMAS, *FLOWS)
    if name not in known:
        raise UserError(
            f"the noise levels of {name} are not known here ({nearest(name, known)}): save the "
            "pipeline with the scheduler that the model was trained with"
        )
    if config.get("thresholding", False):
        raise UserError(
            f"{name} thresholds clean estimates by their quantiles (thresholding), which is not "
            "supported: set thresholding to false in scheduler_config.json"
        )
    if config.get("timestep_type", "discrete") != "discrete":
        raise UserError(f"{name} has continuous steps (timestep_type), which are not supported")
    if _is_flow(scheduler):
        if config.get("use_dynamic_shifting", False) or config.get("invert_sigmas", False):
            raise UserError(
                f"{name} shifts its steps by the size of the image, or counts them backwards "
                "(use_dynamic_shifting, invert_sigmas), which is not supported"
            )
        return FlowMatching(network, config.num_train_timesteps, _between_steps(scheduler))
    predictions = get_args(Prediction)
    if config.prediction_type not in predictions[:-1]:
        raise UserError(
            f"{name} has prediction_type {config.prediction_type!r}: "
            f"{nearest(config.prediction_type, predictions[:-1])}"
        )
    between = _between_steps(scheduler)
    return Discrete(network, noise_table(scheduler), config.prediction_type, between)


def _between_steps(scheduler: Any) -> Between:
    """What step a scheduler tells the network of a level that is none of training's."""
    config = scheduler.config
    if type(scheduler).__name__ not in WHOLE_STEPS:
        return "log" if any(config.get(spacing, False) for spacing in OTHER_SPACINGS) else "linear"
    rounded = config.get("use_karras_sigmas", False) or config.get("use_lu_lambdas", False)
    # Others are cut off where they are stored as whole numbers.
    return "nearest" if rounded and config.beta_schedule != "squaredcos_cap_v2" else "below"


class FlowMatching(nn.Module):
    """A network trained to predict the flow eps - x0 of z = (1 - t) x0 + t eps.

    Args:
        network: (z "b *d", T t "b", condition) -> output "b *d".
        train_steps: T, what times are multiplied by.
        between: as in `Discrete`, of T t.
    """

    prediction: Prediction = "flow_prediction"

    def __init__(
        self,
        network: Callable[[Tensor, Tensor, Condition], Tensor],
        train_steps: int,
        between: Between = "linear",
    ):
        super().__init__()
        self.network, self.train_steps = network, train_steps
        self.between: Between = between

    def timestep(self, sigma: Float[Tensor, "b"]) -> Float[Tensor, "b"]:
        """T t of a noise level."""
        return whole_steps(sigma / (1 + sigma) * self.train_steps, self.between)

    def forward(
        self, x: Float[Tensor, "b *d"], sigma: Float[Tensor, "b"], condition: Condition = None
    ) -> Float[Tensor, "b *d"]:
        z = x * over(input_scale("flow_prediction", sigma), x)
        output = self.network(z, self.timestep(sigma), condition)
        return denoised_of("flow_prediction", output, x, sigma)


# ---- the parts of a pipeline


class Network(nn.Module):
    """A U-Net or transformer of diffusers, called alike; never in training mode.

    What a step's probability is must not depend on who asks, so nothing is dropped at random (a DiT
    would drop labels). Of outputs with twice the channels the second half, learned variances, is left
    out.

    Args:
        inner: of diffusers, with adapters around it or not.
        told_as: the argument that takes the condition; None: it takes none.
        column: what the condition is made of, for messages.
    """

    def __init__(self, inner: nn.Module, told_as: str | None, column: str | None):
        super().__init__()
        self.inner, self.told_as, self.column = inner, told_as, column
        self.train(False)

    def train(self, mode: bool = True) -> "Network":
        return super().train(False)

    def forward(
        self, z: Float[Tensor, "b *d"], timestep: Float[Tensor, "b"], condition: Condition
    ) -> Float[Tensor, "b *d"]:
        if (condition is None) != (self.told_as is None) or isinstance(condition, Mapping):
            raise UserError(
                "this model draws without conditions: leave them out"
                if self.told_as is None
                else f"this model draws by {self.column}: give it the condition that encode makes"
            )
        weights = next(self.inner.parameters()).dtype
        told = {}
        if isinstance(condition, Tensor) and self.told_as is not None:
            whole = not condition.is_floating_point()
            told = {self.told_as: condition if whole else condition.to(weights)}
        # A step found from its noise level is whole up to rounding.
        nearby = timestep.round()
        timestep = torch.where((timestep - nearby).abs() < 1e-3, nearby, timestep)
        output = self.inner(z.to(weights), timestep, return_dict=False, **told)[0]
        return output[:, : z.shape[1]].to(z.dtype)


class _Part(nn.Module):
    """A part of a pipeline that is not trained."""

    def __init__(self, part: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.part: Any = _in(dtype, part).requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> "_Part":
        return super().train(False)


class TextEncoder(_Part):
    """Prompts -> states of a text encoder, cut and filled up as the pipeline does it."""

    def __init__(self, pipeline: Any, dtype: torch.dtype):
        super().__init__(pipeline.text_encoder, dtype)
        self._pipeline = pipeline

    def check(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Raise where a row has no prompt."""
        for number, row in enumerate(rows):
            if not isinstance(prompt := row.get("prompt"), str):
                raise UserError(f"row {number}: prompt must be text, got {prompt!r}")

    @torch.no_grad()
    def forward(self, rows: Sequence[Mapping[str, Any]]) -> Float[Tensor, "b l d"]:
        self.check(rows)
        prompts = [row["prompt"] for row in rows]
        places = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompts))}
        device = self.part.device
        states = self._pipeline.encode_prompt(list(places), device, 1, False)[0].float()
        return states[torch.tensor([places[prompt] for prompt in prompts], device=device)]


class Decoder(_Part):
    """Latents -> images in [0, 1]."""

    def __init__(self, autoencoder: Any, dtype: torch.dtype):
        super().__init__(autoencoder, dtype)
        self._scale = float(autoencoder.config.scaling_factor)

    def forward(self, x0: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k i j"]:
        latent = (x0 / self._scale).to(self.part.dtype)
        return _image(self.part.decode(latent, return_dict=False)[0].float())


class Labels:
    """Class labels, as numbers or by name -> numbers.

    Args:
        count: of classes.
        names: of classes that have one.
        null: a number that stands for no class, beside `count` of them or among them.
    """

    def __init__(self, count: int, names: Mapping[str, int], null: int | None):
        self._count, self._names, self._null = count, dict(names), null

    def check(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Raise where a row has no such label."""
        self(rows)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Int[Tensor, "b"]:
        for number, row in enumerate(rows):
            if "label" not in row:
                known = ", ".join(map(str, row)) or "nothing"
                raise UserError(
                    f"row {number} has no label, which this model draws by (it has {known})"
                )
        numbers = [self._number(number, row["label"]) for number, row in enumerate(rows)]
        return torch.tensor(numbers, dtype=torch.long)

    def _number(self, row: int, label: Any) -> int:
        if isinstance(label, str) and label not in self._names:
            known = nearest(label, self._names) if self._names else "this model's have no names"
            raise UserError(f"row {row}: label {label!r} is no class of this model: {known}")
        found = self._names[label] if isinstance(label, str) else label
        whole = isinstance(found, int) and not isinstance(found, bool)
        if not whole or not (0 <= found < self._count or found == self._null):
            raise UserError(f"row {row}: label must be in [0, {self._count}), got {label!r}")
        return found


class Inverter(_Part):
    """Images in [0, 1] -> latents, the mean of what the autoencoder says."""

    def __init__(self, autoencoder: Any, dtype: torch.dtype):
        super().__init__(autoencoder, dtype)
        self._scale = float(autoencoder.config.scaling_factor)

    @torch.no_grad()
    def forward(self, shown: Float[Tensor, "b k i j"]) -> Float[Tensor, "b c h w"]:
        found = self.part.encode((2 * shown - 1).to(self.part.dtype)).latent_dist
        return found.mode().float() * self._scale


def _in(dtype: torch.dtype, module: Any) -> Any:
    """A part with its weights in another precision; diffusers' own `to` warns without a reason."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    return module


def _image(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    return (x / 2 + 0.5).clamp(0, 1)


def _from_image(shown: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    return 2 * shown - 1


# ---- from a pipeline, and from what is the user's own


def _of_pipeline(
    pipeline: Any, config: ModelConfig, device: torch.device, null_class: int | None
) -> DiffusionModel:
    name, dtype = type(pipeline).__name__, getattr(torch, config.dtype)
    network: Any = getattr(pipeline, NETWORKS[name])
    _check_network(name, network.config)
    size, channels = network.config.sample_size, network.config.in_channels
    shape = (channels, size, size) if isinstance(size, int) else (channels, *size)
    if config.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    if config.lora_rank:
        network = _with_adapters(network, config)
    else:
        _in(torch.float32, network).requires_grad_(True)
    told: Any = {}
    decode: Any = _image
    invert: Any = _from_image
    if name == "StableDiffusionPipeline":
        encode = TextEncoder(pipeline, dtype).to(device)
        told = {"encode": encode, "columns": ["prompt"], "null": encode([{"prompt": ""}])}
        wrapped = Network(network, "encoder_hidden_states", "prompt")
    elif (classes := _classes(name, network.config, null_class)) is not None:
        count, null_class = classes
        encode = Labels(count, getattr(pipeline, "labels", {}), null_class)
        null = None if null_class is None else torch.tensor([null_class])
        told = {"encode": encode, "columns": ["label"], "null": null}
        wrapped = Network(network, "class_labels", "label")
    else:
        wrapped = Network(network, None, None)
    if getattr(pipeline, "vae", None) is not None:
        if config.gradient_checkpointing:
            pipeline.vae.enable_gradient_checkpointing()
        decode, invert = Decoder(pipeline.vae, dtype), Inverter(pipeline.vae, dtype)
    model = DiffusionModel(
        _denoiser(wrapped, pipeline.scheduler),
        shape,
        levels_of(pipeline.scheduler),
        clip=_clip_of(pipeline.scheduler),
        keeps_noise=type(pipeline.scheduler).__name__ == "DDIMScheduler",
        unit_start=_unit_start(pipeline.scheduler),
        unit_end=type(pipeline.scheduler).__name__ in (*STEPS_OF_TRAINING, *WHOLE_STEPS),
        most_steps=pipeline.scheduler.config.num_train_timesteps,
        decode=decode,
        invert=invert,
        frozen_dtype=dtype,
        **told,
    ).to(device)
    model.eval()
    model.pipeline = pipeline
    return model


def _unit_start(scheduler: Any) -> bool:
    """Whether a scheduler begins with the network's input of unit variance."""
    name = type(scheduler).__name__
    if name in SIGMAS and name not in WHOLE_STEPS and not _is_flow(scheduler):
        return scheduler.config.timestep_spacing == "leading"
    return True


def _clip_of(scheduler: Any) -> float | None:
    """To what a scheduler clips clean estimates; None: it does not."""
    config = scheduler.config
    clips = type(scheduler).__name__ in CLIPPING and config.get("clip_sample", True)
    return float(config.get("clip_sample_range", 1.0)) if clips else None


def _classes(name: str, config: Any, null: int | None) -> tuple[int, int | None] | None:
    """How many classes there are, and what stands for none of them; None: there are no classes."""
    if name == "DiTPipeline":
        return config.num_embeds_ada_norm, config.num_embeds_ada_norm
    count = config.num_class_embeds
    if null is not None:
        most = 0 if count is None else count
        require("null_class", null, 0 <= null < most, f"one of this model's {most} classes")
    if count is None:
        return None
    # A null class behind the others is not one of them.
    return count - (null == count - 1), null


def _null_class(pipeline: Any, config: ModelConfig, own: bool) -> int | None:
    """The class that stands for none, where the user says so."""
    if own:
        return getattr(pipeline, "null_class", None)
    takes = type(pipeline).__name__ in ("DDPMPipeline", "DDIMPipeline")
    for key in config.kwargs:
        if key != "null_class" or not takes:
            raise UserError(
                f"model.kwargs {key}: {type(pipeline).__name__} takes "
                f"{'null_class alone' if takes else 'none'}"
            )
    found = config.kwargs.get("null_class", _said(config.source))
    if found is None or (isinstance(found, int) and not isinstance(found, bool)):
        return found
    raise UserError(f"model.kwargs null_class must be a whole number, got {found!r}")


def _said(source: str | None) -> int | None:
    """The class that stands for none, by the file that `save_diffusion` leaves beside a pipeline."""
    path = Path(source or "") / OWN
    if not path.is_file():
        return None
    with readable(f"{path} cannot be read"):
        return json.loads(path.read_text(encoding="utf-8")).get("null_class")


def _check_network(name: str, config: Any) -> None:
    """Raise where a network asks for more than it is told here."""
    if config.out_channels not in (None, config.in_channels, 2 * config.in_channels):
        raise UserError(
            f"the network of this {name} reads {config.in_channels} channels and writes "
            f"{config.out_channels}: only those that write as many as they read, or learned variances "
            "beside them, are supported"
        )
    if config.sample_size is None:
        raise UserError(f"the network of this {name} has no sample_size: set it in its config.json")
    extra = {
        "addition_embed_type": None,
        "class_embed_type": None,
        "encoder_hid_dim_type": None,
        "time_cond_proj_dim": None,
        "time_embedding_type": "positional",
    }
    if name == "StableDiffusionPipeline":
        extra["num_class_embeds"] = None
    for key, plain in extra.items():
        if config.get(key, plain) != plain:
            raise UserError(
                f"the network of this {name} has {key} {config.get(key)!r}, which is not supported"
            )


def _pretrained(source: str) -> Any:
    diffusers: Any = needed("diffusers", source, "diffusion")
    check_is_there(source, "--model")
    if (Path(source) / "pytorch_lora_weights.safetensors").exists():
        raise UserError(
            f"--model {source} holds adapters alone: load them into their pipeline, call "
            "pipeline.fuse_lora() and save it whole"
        )
    with (
        readable(
            f"--model {source} cannot be read",
            " (a folder with model_index.json and *.safetensors, a Hugging Face name, or "
            "module:function)",
        ),
        ExitStack() as stack,
    ):
        index = diffusers.DiffusionPipeline.load_config(source)
        name = index.get("_class_name")
        stack.enter_context(without_progress_bars(*_libraries_of(name)))
        if isinstance(name, str) and name in NETWORKS:  # A list names code that comes with it.
            none: Any = {"vae": None} if index.get("vae") == [None, None] else {}
            if name == "StableDiffusionPipeline":
                none |= {"safety_checker": None, "feature_extractor": None}
                none["requires_safety_checker"] = False
            pipeline = diffusers.DiffusionPipeline.from_pretrained(
                source, use_safetensors=True, **none
            )
            for part, weights in getattr(pipeline, NETWORKS[name]).named_parameters():
                if weights.is_meta:  # The library leaves them without values.
                    raise ValueError(f"its files lack the weights {part}")
            return pipeline
    raise UserError(f"--model {source} is a {name}, and only these are read: {', '.join(NETWORKS)}")


def _libraries_of(name: Any) -> tuple[str, ...]:
    """What reads and writes a pipeline; transformers takes seconds to import."""
    return ("diffusers", "transformers") if name == "StableDiffusionPipeline" else ("diffusers",)


def _with_adapters(network: Any, config: ModelConfig) -> Any:
    peft: Any = needed("peft", "model.lora_rank", "diffusion")
    _in(getattr(torch, config.dtype), network)
    adapters = peft.LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=0.0,
        target_modules=ATTENTION,
    )
    try:
        wrapped = peft.get_peft_model(network, adapters)
    except ValueError as error:
        raise UserError(
            f"model.lora_rank {config.lora_rank}: {type(network).__name__} has no attention to put "
            "adapters on: train all weights (lora_rank 0)"
        ) from error
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return wrapped


def _whole(pipeline: Any, network: Any) -> Any:
    """The pipeline with this network; adapters are written into the weights they change, in float32."""
    whole, merged = copy.copy(pipeline), network
    if hasattr(network, "merge_and_unload"):
        merged = copy.deepcopy(network).float().merge_and_unload()
    whole.register_modules(**{NETWORKS[type(pipeline).__name__]: merged})
    return whole


def _adapter_state(network: Any) -> dict[str, Tensor]:
    """As diffusers names it, with alpha / rank in the weights: not every reader knows another place."""
    peft: Any = needed("peft", "adapters", "diffusion")
    utils: Any = needed("diffusers.utils", "adapters", "diffusion")
    config = network.peft_config["default"]
    scale = config.lora_alpha / config.r
    state = {
        name.removeprefix("base_model.model."): value * scale if "lora_B" in name else value
        for name, value in peft.get_peft_model_state_dict(network).items()
    }
    return utils.convert_state_dict_to_diffusers(state)


def _save_state(module: nn.Module, folder: Path) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    state = {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}
    save_file(state, folder / "model.safetensors")
