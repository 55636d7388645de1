"""Diffusion tree sampling and search: every path ever drawn is kept, and its reward told to the steps
that led to it.

A node is a state of the reverse chain, its children are draws of the next state from the model, and
its value is a soft estimate of what reward lies below:

    V(x) = (1 / lambda) log E[exp(lambda r(x0)) | x]
    v(x) = (1 / lambda) log( (1 / |C(x)|) sum_{c in C(x)} exp(lambda v(c)) ),  v(x0) = r(x0)

Children are independent draws, so their plain mean stands for the expectation, and a walk from the root
that takes a child with probability proportional to exp(lambda v(c)) ends in p(x0) exp(lambda r(x0)) / Z
as the tree grows (DTS). With the rule of upper confidence bounds instead the tree looks for one good
sample (DTS*). Drawing from a tree costs no evaluation of the network.

| here | paper |
|---|---|
| depth 0, the root; depth k, at `Process.levels[k - 1]` | T + 1; t |
| inverse_temperature | lambda |
| widening_scale, widening_exponent | C, alpha |
| visits: 1 and the iterations that came through, of every node | N |
| exploration | c_uct |

Source: Jain et al. 2025, Diffusion Tree Sampling (arXiv 2506.20701), algorithms 1 and 2.
"""

import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from esscher.errors import UserError, require
from esscher.functional.diffusion import over, reverse_kernel
from esscher.runtime.rng import mix
from esscher.samplers.denoisers import Condition, Denoiser, repeated
from esscher.samplers.particles import Reward, judge, one_row
from esscher.samplers.solvers import checked_sigmas, level_pairs

CHOICE, NOISE = 0, 1
"""What a random number of (seed, iteration, depth) is for."""
PATIENCE = 100_000
"""Paths in turn that lead to leaves which are known, after which a tree is taken not to widen."""


@runtime_checkable
class Process(Protocol):
    """A chain of random states from noise to samples: what a tree is grown on."""

    @property
    def levels(self) -> Sequence[float]:
        """One for each state of the chain, of the prior's first and of the samples last."""
        ...

    @property
    def evaluations(self) -> int:
        """How often the network has been asked so far."""
        ...

    def prior(self, seeds: Sequence[int]) -> Float[Tensor, "b *d"]:
        """Draws at levels[0], each from its own seed."""
        ...

    def transition(
        self, x: Float[Tensor, "b *d"], level: int, seeds: Sequence[int]
    ) -> Float[Tensor, "b *d"]:
        """Draws at levels[level + 1] given states at levels[level], each from its own seed."""
        ...


class DenoisingProcess:
    """The stochastic reverse kernel of a denoiser, several steps between two levels.

    Args:
        denoiser: D(x, sigma, condition).
        sigmas: noise levels, falling; the last is 0 or what noise is to be left.
        shape: of one sample.
        branch: steps, counted from 0, before which a state is a level; the first is 0. So
            (0, 20, 40, 60, 80) of 100 steps has draws of the prior and four levels more.
        eta: share of the ancestral noise, in (0, 1].
        condition: one row; None: none.
        calls: evaluations of the network for each row that the denoiser is asked about; 2 under
            classifier-free guidance.
        start: standard deviation of the prior's draws; None: sigmas[0].
        end: what x is multiplied by at the last level, to be a sample; see `DiffusionModel`.
        device, dtype: of the states that it makes.

    Raises:
        UserError: sigmas do not fall; eta is 0, where all children of a state would be alike; branch
            does not rise from 0, or has a state from which no random step is left.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        sigmas: Sequence[float] | Float[Tensor, "k"],
        shape: Sequence[int],
        branch: Sequence[int],
        *,
        eta: float = 1.0,
        condition: Condition = None,
        calls: int = 1,
        start: float | None = None,
        end: float = 1.0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        sigma = checked_sigmas(sigmas)
        require("eta", eta, 0 < eta <= 1, "in (0, 1]: without noise all children would be alike")
        require("calls", calls, calls >= 1, ">= 1")
        steps, branch = len(sigma) - 1, tuple(branch)
        rising = branch[:1] == (0,) and all(a < b for a, b in zip(branch, branch[1:], strict=False))
        require("branch", branch, rising, "steps that rise from 0")
        last = steps - 1 - int(float(sigma[-1]) == 0)
        require(
            "the last of branch",
            branch[-1],
            branch[-1] <= last,
            f"at most {last} of {steps} steps: a step to noise level 0 is not random",
        )
        self.levels = [float(sigma[k]) for k in (*branch, steps)]
        self.evaluations, self.path_evaluations = 0, steps * calls
        self._denoiser, self._condition = denoiser, one_row(condition)
        self._shape, self._eta, self._calls = tuple(shape), eta, calls
        self._start, self._end = float(sigma[0]) if start is None else start, end
        self._device, self._dtype = torch.device(device), dtype
        pairs = list(level_pairs(sigma, torch.empty(0, dtype=dtype, device=self._device)))
        ends = (*branch, steps)
        self._steps = [pairs[a:b] for a, b in zip(ends, ends[1:], strict=False)]

    def prior(self, seeds: Sequence[int]) -> Float[Tensor, "b *d"]:
        """Noise to begin with."""
        return self._noise(seeds, 1)[:, 0] * self._start

    @torch.no_grad()
    def transition(
        self, x: Float[Tensor, "b *d"], level: int, seeds: Sequence[int]
    ) -> Float[Tensor, "b *d"]:
        """The steps from one level to the next."""
        x = x.to(device=self._device, dtype=self._dtype)
        condition = repeated(self._condition, len(x))
        steps = self._steps[level]
        noise = self._noise(seeds, len(steps))
        for step, (sigma, following) in enumerate(steps):
            denoised = self._denoiser(x, sigma.expand(len(x)), condition)
            mean, std = reverse_kernel(x, denoised, sigma, following, self._eta)
            x = mean + over(std, x) * noise[:, step]
        self.evaluations += len(x) * len(steps) * self._calls
        return x * self._end if level == len(self._steps) - 1 else x

    def _noise(self, seeds: Sequence[int], steps: int) -> Float[Tensor, "b k *d"]:
        generator, size = torch.Generator(), (steps, *self._shape)
        drawn = [
            torch.randn(size, generator=generator.manual_seed(seed), dtype=self._dtype)
            for seed in seeds
        ]
        return torch.stack(drawn).to(self._device)


@dataclass(frozen=True, kw_only=True)
class TreeSettings:
    """How a tree grows. Defaults are the paper's for images."""

    inverse_temperature: float = 1.0
    """lambda > 0, nats a unit of reward."""
    selection: Literal["softmax", "uct"] = "softmax"
    """softmax: by exp(lambda v), which samples (DTS); uct: the highest v + c sqrt(log N(x) / N(c)),
    which searches (DTS*)."""
    backup: Literal["soft", "max"] = "soft"
    """soft: log-mean-exp over children; max: its limit as lambda grows."""
    widening_scale: float = 2.0
    """C >= 1: a node takes another child while it has fewer than C N^alpha."""
    widening_exponent: float = 0.8
    """alpha in [0, 1]; at 0 a node has at most ceil(C) children."""
    exploration: float = 1.0
    """c of uct, >= 0, in units of reward."""
    batch: int = 1
    """Most paths that are chosen before any of them is drawn, >= 1; 1 is the paper's."""

    def __post_init__(self) -> None:
        lam = self.inverse_temperature
        require("inverse_temperature", lam, 0 < lam < math.inf, "positive and finite")
        named = self.selection in ("softmax", "uct")
        require("selection", self.selection, named, "softmax or uct")
        require("backup", self.backup, self.backup in ("soft", "max"), "soft or max")
        scale, exponent = self.widening_scale, self.widening_exponent
        require("widening_scale", scale, 1 <= scale < math.inf, ">= 1")
        require("widening_exponent", exponent, 0 <= exponent <= 1, "in [0, 1]")
        require("exploration", self.exploration, 0 <= self.exploration < math.inf, ">= 0")
        require("batch", self.batch, self.batch >= 1, ">= 1")


@dataclass(frozen=True, kw_only=True)
class Leaves:
    """Samples that a tree holds."""

    node: Int[Tensor, "n"]
    x: Float[Tensor, "n *d"]
    reward: Float[Tensor, "n"]


class Tree:
    """A search tree over a process. What it holds is a function of seed and iterations.

    Args:
        process: what draws states.
        reward: of samples, as the process leaves them; asked once a sample.
        settings: the rules of growth.
        seed: of everything that is drawn while it grows.
        storage: where states are kept; they are moved to the process as they are needed.
    """

    def __init__(
        self,
        process: Process,
        reward: Reward,
        settings: TreeSettings | None = None,
        *,
        seed: int,
        storage: torch.device | str = "cpu",
    ):
        require("seed", seed, 0 <= seed < 2**63, "in [0, 2^63)")
        self.process, self.reward = process, reward
        self.settings = settings or TreeSettings()
        self.seed = seed
        self.iterations = 0
        """Paths taken so far."""
        self.evaluations = 0
        """Of the network, for this tree."""
        self._depth = len(process.levels)
        self._storage = torch.device(storage)
        self._state: Tensor | None = None  # row of a node: index - 1, for the root has no state
        self._size = 1
        self._level = np.zeros(64, dtype=np.int64)
        self._parent = np.full(64, -1, dtype=np.int64)
        self._value = np.zeros(64)
        self._visits = np.ones(64, dtype=np.int64)
        self._children = [array("q")]  # follows from _parent; growing it costs less than finding it

    # ---- growing

    def grow(self, iterations: int | None = None, *, evaluations: int | None = None) -> None:
        """Take more paths, until there are `iterations` more or `evaluations` in all are reached.

        Growing in several calls is the same as in one if each ends at a multiple of the batch. The
        last path may exceed the evaluations. Where a reward is refused the tree stays as it was
        before that batch.

        Raises: UserError if neither bound is given or one is below 0, or only evaluations for a tree
            that does not widen any more and so may never use them; as `judge` does for rewards.
        """
        if iterations is None and evaluations is None:
            raise UserError("growing needs a number of iterations, of evaluations, or both")
        if iterations is None and self.settings.widening_exponent == 0:
            raise UserError("with widening_exponent 0 a tree can be complete: give iterations too")
        whole = iterations is None or (isinstance(iterations, int) and iterations >= 0)
        require("iterations", iterations, whole, "a whole number >= 0")
        require("evaluations", evaluations, evaluations is None or evaluations >= 0, ">= 0")
        end = math.inf if iterations is None else self.iterations + iterations
        budget = math.inf if evaluations is None else evaluations
        idle = self.iterations
        while self.iterations < end and self.evaluations < budget:
            # Batches end at multiples of their size, so that stopping at one changes nothing; near the
            # end of a budget they are as small as it is.
            full = self.settings.batch - self.iterations % self.settings.batch
            before = self.evaluations
            left = (budget - before) / getattr(self.process, "path_evaluations", 1)
            self._iterate(int(min(full, max(1, left), end - self.iterations)))
            idle = self.iterations if self.evaluations > before else idle
            if iterations is None and self.iterations - idle > PATIENCE:
                raise UserError(
                    f"{PATIENCE:,} paths found no room for another child, so that {evaluations:,} "
                    f"evaluations will not be used: widening_exponent must be larger, got "
                    f"{self.settings.widening_exponent:g} (or give iterations)"
                )

    def _iterate(self, count: int) -> None:
        """A batch of at most `count`: choose paths, draw what continues them, and tell their rewards
        to all above.
        """
        # Visits and children that this batch has promised, so that its paths spread.
        visits, pending = np.zeros((2, self._size), dtype=np.int64)
        paths: list[list[int]] = []
        for number in range(self.iterations, self.iterations + count):
            path = self._select(number, visits, pending)
            if path is None:
                break
            paths.append(path)
        new = [k for k, path in enumerate(paths) if self._level[path[-1]] < self._depth]
        if new:
            self._expand([paths[k] for k in new], [self.iterations + k for k in new])
        for path in paths:
            for node in path:
                self._visits[node] += 1
        self._back_up({node for path in paths for node in path})
        self.iterations += len(paths)

    def _select(self, number: int, visits: np.ndarray, pending: np.ndarray) -> list[int] | None:
        """From the root to a node that takes another child, or to a leaf.

        None where that needs a choice among children that are all still to be drawn: the batch waits.
        """
        scale, exponent = self.settings.widening_scale, self.settings.widening_exponent
        node, path = 0, [0]
        while self._level[node] < self._depth:
            children = self._children[node]
            seen = int(self._visits[node] + visits[node])
            if len(children) + int(pending[node]) < scale * seen**exponent:
                pending[node] += 1
                break
            if not children:
                return None
            node = self._choose(children, seen, number, len(path), visits)
            path.append(node)
        for node in path:
            visits[node] += 1
        return path

    def _choose(
        self, children: "array[int]", seen: int, number: int, depth: int, visits: np.ndarray
    ) -> int:
        if len(children) == 1:
            return children[0]
        index = np.frombuffer(children, dtype=np.int64)
        value = self._value[index]
        if self.settings.selection == "uct":
            own = self._visits[index] + visits[index]
            value = value + self.settings.exploration * np.sqrt(math.log(seen) / own)
            return children[int(value.argmax())]
        share = np.exp(self.settings.inverse_temperature * (value - value.max())).cumsum()
        uniform = mix(self.seed, number, depth, CHOICE) / 2**63
        place = int(share.searchsorted(uniform * share[-1], side="right"))
        return children[min(place, len(children) - 1)]

    def _expand(self, paths: list[list[int]], numbers: list[int]) -> None:
        """Draw each path down to a sample, in one batch a level, and append what it passed."""
        starts = [int(self._level[path[-1]]) for path in paths]
        drawn: list[list[Tensor]] = [[] for _ in paths]
        before, x = self.process.evaluations, torch.empty(0)
        for depth in range(min(starts) + 1, self._depth + 1):
            going = [k for k, start in enumerate(starts) if start < depth]
            seeds = [mix(self.seed, numbers[k], depth, NOISE) for k in going]
            if depth == 1:
                x = self.process.prior(seeds)
            else:
                states = [drawn[k][-1] if drawn[k] else self._state_of(paths[k][-1]) for k in going]
                x = self.process.transition(torch.stack(states), depth - 2, seeds)
            for k, state in zip(going, x.to(self._storage), strict=True):
                drawn[k].append(state)
        # Of the samples as the process left them: `x` is all of them, for all paths end together.
        told = judge(self.reward, x).double().tolist()
        self.evaluations += self.process.evaluations - before
        self._reserve(sum(map(len, drawn)), drawn[0][0])
        assert self._state is not None
        first = self._size
        for path, states, value in zip(paths, drawn, told, strict=True):
            for _ in states:
                path.append(self._append(path[-1]))
            self._value[path[-1]] = value
        self._state[first - 1 : self._size - 1] = torch.stack([s for part in drawn for s in part])

    def _append(self, parent: int) -> int:
        node = self._size
        self._size += 1
        self._parent[node], self._level[node] = parent, self._level[parent] + 1
        self._value[node], self._visits[node] = 0.0, 1
        self._children.append(array("q"))
        self._children[parent].append(node)
        return node

    def _back_up(self, nodes: set[int]) -> None:
        """New values, from below: children before their parents."""
        lam, depth = self.settings.inverse_temperature, self._depth
        for node in sorted(nodes, key=self._level.__getitem__, reverse=True):
            if self._level[node] == depth:
                continue
            children = self._children[node]
            if len(children) == 1:
                self._value[node] = self._value[children[0]]
                continue
            value = self._value[np.frombuffer(children, dtype=np.int64)]
            top = value.max()
            if self.settings.backup == "soft":
                top = top + math.log(np.exp(lam * (value - top)).mean()) / lam
            self._value[node] = top

    def _state_of(self, node: int) -> Tensor:
        assert self._state is not None
        return self._state[node - 1]

    def _reserve(self, more: int, like: Tensor) -> None:
        """Room for `more` nodes, by doubling."""
        if self._state is None:
            rows = (len(self._level), *like.shape)
            self._state = torch.empty(rows, dtype=like.dtype, device=self._storage)
        while self._size + more > len(self._level):
            self._level = np.concatenate([self._level, np.zeros_like(self._level)])
            self._parent = np.concatenate([self._parent, np.full_like(self._parent, -1)])
            self._value = np.concatenate([self._value, np.zeros_like(self._value)])
            self._visits = np.concatenate([self._visits, np.ones_like(self._visits)])
            self._state = torch.cat([self._state, torch.empty_like(self._state)])

    # ---- what it has found

    def __len__(self) -> int:
        """Nodes, the root included."""
        return self._size

    @property
    def value(self) -> float:
        """Of the root: an estimate of (1 / lambda) log E[exp(lambda r(x0))], in units of reward."""
        return float(self._value[0])

    def leaf_log_probs(self) -> tuple[Int[Tensor, "n"], Float[Tensor, "n"]]:
        """All leaves, and the log-probability of each under walks by exp(lambda v), in nats.

        Raises: UserError if the tree has not grown.
        """
        self._check_grown()
        parent, level = self._tensor(self._parent)[1:], self._tensor(self._level)
        scaled = self.settings.inverse_temperature * self._tensor(self._value)[1:]
        top = torch.full((self._size,), -torch.inf, dtype=torch.float64)
        top = top.scatter_reduce(0, parent, scaled, "amax")
        above = scaled - top[parent]
        total = torch.zeros_like(top).index_add(0, parent, above.exp())
        step = torch.cat([above.new_zeros(1), above - total[parent].log()])
        # A node's parent was there before it, and lies one level above.
        logp = torch.zeros_like(step)
        for depth in range(1, self._depth + 1):
            at = (level == depth).nonzero().squeeze(-1)
            logp[at] = logp[parent[at - 1]] + step[at]
        leaves = (level == self._depth).nonzero().squeeze(-1)
        return leaves, logp[leaves]

    def draw(self, count: int, seed: int) -> Leaves:
        """Independent walks from the root by exp(lambda v), as `count` leaves: no evaluations (DTS).

        All walks to a leaf at once: by the product of its steps' probabilities, which is the same.

        Raises: UserError if the tree has not grown, or count < 1.
        """
        require("count", count, count >= 1, ">= 1")
        generator = torch.Generator().manual_seed(seed)
        return self.drawn_by(torch.rand(count, generator=generator, dtype=torch.float64))

    def drawn_by(self, uniform: Float[Tensor, "n"]) -> Leaves:
        """The leaves that walks end in, by a uniform number in [0, 1) for each; see `draw`."""
        leaves, logp = self.leaf_log_probs()
        cumulative = logp.exp().cumsum(0)
        place = torch.searchsorted(cumulative, uniform * cumulative[-1], right=True)
        return self.leaves(leaves[place.clamp(max=len(leaves) - 1)])

    def greedy(self) -> Leaves:
        """The one leaf that a walk to the child of the highest value ends in (DTS*).

        Raises: UserError if the tree has not grown.
        """
        self._check_grown()
        node = 0
        while self._level[node] < self._depth:
            children = self._children[node]
            node = children[int(self._value[np.frombuffer(children, dtype=np.int64)].argmax())]
        return self.leaves(torch.tensor([node]))

    def best(self) -> Leaves:
        """The one leaf of the highest reward, wherever it hangs; the first of several.

        Raises: UserError if the tree has not grown.
        """
        self._check_grown()
        leaves = (self._tensor(self._level) == self._depth).nonzero().squeeze(-1)
        return self.leaves(leaves[self._tensor(self._value)[leaves].argmax()].unsqueeze(0))

    def leaves(self, node: Int[Tensor, "n"]) -> Leaves:
        """Samples and rewards of leaves."""
        assert self._state is not None
        rows = (node - 1).to(self._state.device)
        return Leaves(node=node, x=self._state[rows], reward=self._tensor(self._value)[node])

    # ---- state

    def state_dict(self) -> dict[str, Tensor]:
        """Copies, of which a tree over the same process, reward and settings goes on exactly.

        state "n-1 *d": of all nodes but the root, which is first in the others. level "n" (depth),
        parent "n" (-1: none), value "n" (reward), visits "n"; iterations, evaluations, seed and
        inverse_temperature are numbers. A tree that has not grown has no state.
        """
        held = {
            "level": self._tensor(self._level).clone(),
            "parent": self._tensor(self._parent).clone(),
            "value": self._tensor(self._value).clone(),
            "visits": self._tensor(self._visits).clone(),
            "iterations": torch.tensor(self.iterations),
            "evaluations": torch.tensor(self.evaluations),
            "seed": torch.tensor(self.seed),
            "inverse_temperature": torch.tensor(
                self.settings.inverse_temperature, dtype=torch.float64
            ),
        }
        if self._state is not None:
            held["state"] = self._state[: self._size - 1].clone()
        return held

    def load_state_dict(self, held: Mapping[str, Tensor]) -> None:
        """Become the tree that a state was taken of.

        Raises: UserError if it was grown with another seed, inverse temperature or number of levels.
        """
        if (
            missing := {"level", "parent", "value", "visits", "iterations", "evaluations"}
            - held.keys()
        ):
            raise UserError(f"this is not the state of a tree: it lacks {sorted(missing)}")
        for name, own in (
            ("seed", self.seed),
            ("inverse_temperature", self.settings.inverse_temperature),
        ):
            if (found := held[name].item()) != own:
                raise UserError(
                    f"the tree was grown with {name} {found}, not {own}: go on with the same"
                )
        deepest = int(held["level"].max())
        if deepest not in (0, self._depth):
            raise UserError(
                f"the tree was grown on {deepest} levels, and this process has {self._depth}"
            )
        self._size = len(held["level"])
        self._level = held["level"].cpu().numpy().copy()
        self._parent = held["parent"].cpu().numpy().copy()
        self._value = held["value"].cpu().numpy().copy()
        self._visits = held["visits"].cpu().numpy().copy()
        self._children = [array("q") for _ in range(self._size)]
        for node, parent in enumerate(self._parent[1:].tolist(), 1):
            self._children[parent].append(node)
        self._state = None
        if "state" in held:
            state = held["state"].to(self._storage)
            self._state = torch.cat([state, torch.empty_like(state[:1])])
        self.iterations = int(held["iterations"])
        self.evaluations = int(held["evaluations"])

    def _tensor(self, values: np.ndarray) -> Tensor:
        """Of the nodes that there are, sharing memory."""
        return torch.from_numpy(values[: self._size])

    def _check_grown(self) -> None:
        if self._size == 1:
            raise UserError("the tree has no leaves yet: let it grow first")
