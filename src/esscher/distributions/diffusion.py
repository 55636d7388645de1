"""A diffusion model as a distribution over samples: a denoiser, and what it takes to draw from it."""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from esscher.errors import UserError, require
from esscher.functional.diffusion import Prediction, input_scale
from esscher.nn.sharding import Sharding, shard
from esscher.nn.trained import TrainedState
from esscher.samplers.denoisers import Condition, Denoiser, classifier_free, clipped, placed
from esscher.samplers.solvers import Solver, seeded_noise, solve


class DiffusionModel(TrainedState):
    """Draws samples by solving from noise, in coordinates x = x0 + sigma eps.

    Args:
        denoiser: D(x, sigma, condition); trained where it is a module.
        shape: of one sample as the denoiser sees it (a latent's, where there is an autoencoder).
        levels: number of steps -> as many noise levels and the last one below them, falling; or these
            levels themselves, of a model that takes one number of steps alone.
        null: the condition of no condition, one row; None: the model has none, and takes no guidance.
        encode: rows of the data (a label, a prompt) -> their condition; None: there are no conditions.
        decode: denoised samples -> what is shown and judged (images "b c h w" in [0, 1], or the
            samples themselves).
        invert: the way back from those, for real samples; None: they are what the denoiser sees.
        columns: what `encode` reads of a row.
        clip: bound of a clean sample's components, to which estimates are clipped where samples are
            drawn, not where the model learns; None: there is none.
        keeps_noise: how ddim without noise of its own clips; see `Stepper`.
        unit_start: whether chains begin with an input of the network of deviation 1, as in diffusers,
            and so with x of sqrt(1 + sigma^2), or 1 + sigma of a flow; else with x of deviation sigma.
        unit_end: whether a sample that has noise left is the network's input too; else it is x.
        most_steps: that `levels` can be asked for, >= 1.
        frozen_dtype: of the weights of copies that are not trained; other than float32 only where the
            denoiser turns its inputs into it.
    """

    pipeline: Any = None
    """What it was read from, and what it is saved as; None: a module of the user's own."""
    one_step_at: float | None = None
    """Noise level at which one evaluation draws a sample, of a distilled model; else None."""
    _is_frozen = _is_average = False

    def __init__(
        self,
        denoiser: Denoiser,
        shape: Sequence[int],
        levels: Callable[[int], Float[Tensor, "k"]] | Float[Tensor, "k"],
        *,
        null: Condition = None,
        encode: Callable[[Sequence[Mapping[str, Any]]], Condition] | None = None,
        decode: Callable[[Tensor], Tensor] | None = None,
        invert: Callable[[Tensor], Tensor] | None = None,
        columns: Sequence[str] = (),
        clip: float | None = None,
        keeps_noise: bool = False,
        unit_start: bool = False,
        unit_end: bool = False,
        most_steps: int = 1_000,
        frozen_dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.denoiser: Any = denoiser
        self.shape, self._levels, self._null = tuple(shape), levels, null
        self._most_steps = most_steps
        self.columns, self.frozen_dtype = tuple(columns), frozen_dtype
        self.clip, self.keeps_noise = clip, keeps_noise
        self._unit_start, self._unit_end = unit_start, unit_end
        self._prediction: Prediction = getattr(denoiser, "prediction", "epsilon")
        self._encode, self._decode, self._invert = encode, decode, invert

    @property
    def trained(self) -> list[nn.Parameter]:
        """What an optimiser moves."""
        return [] if self._is_frozen else [p for p in self.parameters() if p.requires_grad]

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    @property
    def null(self) -> Condition:
        """The condition of no condition, one row, where the weights are; None: the model has none."""
        return placed(self._null, self.device)

    def frozen(self) -> "DiffusionModel":
        """This model without its training, as a reference.

        With adapters of peft it shares all weights and switches the adapters off, so that it is the
        model that they were put on, and no gradient flows through it; else it is a copy of the model
        as it is now, and the only gradient is the one to its input.
        """
        twin = copy.copy(self)
        twin._modules, twin._is_frozen = dict(self._modules), True
        if not isinstance(self.denoiser, nn.Module):
            return twin
        if adapted := _adapted(self.denoiser):
            twin.denoiser = _AdaptersOff(self.denoiser, adapted)
            return twin
        twin.denoiser = copy.deepcopy(self.denoiser).requires_grad_(False).eval()
        # Weights alone: a denoiser's table of noise levels must stay exact.
        for parameter in twin.denoiser.parameters():
            parameter.data = parameter.data.to(self.frozen_dtype)
        return twin

    def compiled(self, *, final: bool = False) -> "DiffusionModel":
        """This model with its network compiled, at the first call with each shape of a batch: tens of
        seconds, and then less time a step. Copies made later are not compiled.

        Args:
            final: whether the weights will not change any more, which saves more where no gradient is
                asked for, and takes memory for a copy of them; what they change to is ignored.
        """
        from esscher.nn.compiling import compile_network  # Seconds, for the compiler.

        if isinstance(self.denoiser, nn.Module):
            network = getattr(self.denoiser, "network", self.denoiser)
            inner: Any = getattr(network, "inner", network)
            compile_network(inner, final=final)
        return self

    def shard(self, device: torch.device, sharding: Sharding) -> None:
        """Leave this process its part of the weights (see nn/sharding.py), when all copies are made.

        Raises:
            UserError: the network has no blocks of the classes that are to be sharded.
        """
        denoiser: Any = self.denoiser
        if isinstance(denoiser, _AdaptersOff):
            denoiser = denoiser.denoiser
        network = getattr(denoiser, "network", denoiser)
        network = getattr(network, "inner", network)
        if hasattr(network, "get_base_model"):  # Of peft.
            network = network.get_base_model()
        # An average is moved part by part, so parts it must be again after it was asked.
        if self._is_average:
            sharding = replace(sharding, reshard_after_forward=True)
        shard(denoiser, network, device, sharding, _listed_in(network))

    def averaged(self) -> "DiffusionModel":
        """A copy for a running average of the weights: no optimiser moves it, `polyak` does."""
        twin = copy.copy(self)
        twin._modules, twin._is_average = dict(self._modules), True
        twin.denoiser = copy.deepcopy(self.denoiser)
        return twin

    def levels(self, steps: int) -> Float[Tensor, "k"]:
        """Noise levels of drawing in so many steps, and the last one below them, falling.

        Raises:
            UserError: the model cannot be drawn from in so many steps.
        """
        if not isinstance(self._levels, Tensor):
            told = f"in [1, {self._most_steps}], the most that this model takes"
            require("draw_steps", steps, 1 <= steps <= self._most_steps, told)
            return self._levels(steps)
        own = len(self._levels) - 1
        require("draw_steps", steps, steps == own, f"{own}, the steps that this model takes")
        return self._levels

    def levels_up_to(self, steps: int) -> Float[Tensor, "k"]:
        """The same in at most so many steps, for what does not depend on how samples are drawn."""
        if not isinstance(self._levels, Tensor):
            return self.levels(min(steps, self._most_steps))
        places = torch.linspace(0, len(self._levels) - 1, min(steps + 1, len(self._levels)))
        return self._levels[places.round().long()]

    def training_levels(self) -> Float[Tensor, "t"]:
        """Noise levels to learn at: those that the model was trained at where it has a table of them,
        else up to a thousand between its first and its last.
        """
        table = getattr(self.denoiser, "sigmas", None)
        if table is None:
            table = self.levels_up_to(1_000)
        return table[table > 0]

    def noise_levels(self, count: int) -> Float[Tensor, "b"]:
        """Uniformly drawn from `training_levels`."""
        table = self.training_levels()
        place = torch.randint(len(table), (count,), device=self.device)
        return table.to(self.device)[place].float()

    def encode(self, rows: Sequence[Mapping[str, Any]]) -> Condition:
        """The condition of rows of data, one sample each, where the weights are."""
        return None if self._encode is None else placed(self._encode(rows), self.device)

    def key(self, row: Mapping[str, Any]) -> str:
        """What the model is told of a row: the same of rows that it cannot tell apart. Of a model that
        says no columns, all that the row holds.
        """
        return repr([row.get(name) for name in self.columns] or sorted(row.items()))

    def check(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Look through all rows of data, where the model's `encode` has a `check` that does.

        Raises:
            UserError: a row, which it names, says nothing that the model can be told.
        """
        if (check := getattr(self._encode, "check", None)) is not None:
            check(rows)

    def decode(self, x0: Float[Tensor, "b *d"]) -> Float[Tensor, "b *s"]:
        """What is shown and judged."""
        return x0 if self._decode is None else self._decode(x0)

    def invert(self, shown: Float[Tensor, "b *s"]) -> Float[Tensor, "b *d"]:
        """Real samples as the denoiser sees them: what `decode` shows as these."""
        return shown if self._invert is None else self._invert(shown)

    def guided(self, scale: float) -> Denoiser:
        """The denoiser under classifier-free guidance (scale 1 is none), its estimates clipped if they
        are to be.

        Raises:
            UserError: the model has no null condition.
        """
        found = self._unclipped(scale)
        return found if self.clip is None else clipped(found, self.clip)

    def _unclipped(self, scale: float) -> Denoiser:
        null = self.null
        if scale == 1:
            return self.denoiser
        if null is None:
            raise UserError(
                f"scale must be 1, which is no guidance, got {scale:g}: this model was trained without "
                "a null condition, so guidance has nothing to compare with (--method.scale 1, or a "
                "model with a null condition; of a UNet2DModel, say which class stands for none: "
                "--model.kwargs null_class 10)"
            )
        return classifier_free(self.denoiser, null, scale)

    def start(self, levels: Float[Tensor, "k"]) -> float:
        """Standard deviation of x where a chain begins."""
        return 1 / self._input_scale(levels[0]) if self._unit_start else float(levels[0])

    def end(self, levels: Float[Tensor, "k"]) -> float:
        """What x is multiplied by where a chain has ended, to be a sample; 1 at noise level 0."""
        return self._input_scale(levels[-1]) if self._unit_end else 1.0

    def _input_scale(self, sigma: Tensor) -> float:
        return float(input_scale(self._prediction, sigma))

    @torch.no_grad()
    def draw(
        self,
        condition: Condition,
        seeds: Sequence[int],
        *,
        steps: int,
        scale: float = 1.0,
        solver: Solver = "ddim",
        eta: float = 0.0,
    ) -> Float[Tensor, "b *d"]:
        """Samples, not yet decoded; each depends on its condition, its seed and the weights alone."""
        levels = self.levels(steps)
        start, noise = seeded_noise(seeds, self.shape, self.device)
        keeps = self.keeps_noise and solver == "ddim" and eta == 0
        x = solve(
            self._unclipped(scale) if keeps else self.guided(scale),
            start * self.start(levels),
            levels,
            condition,
            solver=solver,
            eta=eta,
            noise=noise,
            clip=self.clip if keeps else None,
            keeps_noise=keeps,
        )
        return x * self.end(levels)


class _AdaptersOff(nn.Module):
    """A denoiser with the adapters inside it switched off, for as long as a call lasts."""

    def __init__(self, denoiser: nn.Module, adapted: Sequence[Any]):
        super().__init__()
        self.denoiser, self._adapted = denoiser, tuple(adapted)

    # Activations that are computed again in the backward pass would find the adapters on.
    @torch.no_grad()
    def forward(
        self, x: Float[Tensor, "b *d"], sigma: Float[Tensor, "b"], condition: Condition = None
    ) -> Float[Tensor, "b *d"]:
        with ExitStack() as stack:
            for module in self._adapted:
                stack.enter_context(module.disable_adapter())
            return self.denoiser(x, sigma, condition)


def _listed_in(network: nn.Module) -> tuple[str, ...]:
    """Classes of what a network has lists of: its blocks."""
    lists = (part for part in network.children() if isinstance(part, nn.ModuleList))
    return tuple({type(block).__name__ for blocks in lists for block in blocks})


def _adapted(denoiser: nn.Module) -> list[Any]:
    """What peft has put adapters into."""
    return [
        module
        for module in denoiser.modules()
        if hasattr(module, "peft_config") and hasattr(module, "disable_adapter")
    ]


@dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """What a method of diffusion models is made for."""

    model: DiffusionModel
    of_sets: bool = False
    """Whether its reward judges sets of samples."""
    num_agents: int = 1
