"""A robot that sees, in a plane, with a known right answer, for proofs and tests.

Use it like any other: `--data esscher.scenes:round_obstacle`, played as esscher.scenes:RoundObstacle.
"""

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from esscher.adapters.robots import Outcome
from esscher.errors import UserError
from esscher.experience.scenes import SceneData
from esscher.types import RobotSpec


class RoundObstacle:
    """A point goes round a disc on either side, and on to where it wants to be, in 8 steps.

    It begins at (x, y), x in [-0.8, -0.4], y in [-0.15, 0.15], and the disc, of radius 0.2, stands at
    (0, b), b in [-0.15, 0.15]. An action is a velocity, of which 0.2 are gone in a step. Experts fly
    the side m = +-1, either with probability 1/2: in 4 equal steps to (0, b + 0.45 m), in 4 more to
    (|x|, 0). The state is (x, y); where the disc stands, the picture alone says. It is solved by x >=
    0.35 after 8 steps without a touch.
    """

    name = "esscher.scenes:RoundObstacle"
    instruction = "go round the obstacle"
    cameras = ("above",)
    image_size = (16, 16)
    state_dim = 2
    action_low, action_high = (-1.0, -1.0), (1.0, 1.0)
    max_steps = 8

    stride, radius, clearance, finish = 0.2, 0.2, 0.45, 0.35

    def __init__(self) -> None:
        self.place, self.height = np.zeros(2), 0.0
        self.start, self.side, self.steps, self.touched = np.zeros(2), 1.0, 0, False

    def reset(self, seed: int) -> None:
        draw = np.random.default_rng(seed)
        self.start = np.array([draw.uniform(-0.8, -0.4), draw.uniform(-0.15, 0.15)])
        self.place, self.height = self.start.copy(), float(draw.uniform(-0.15, 0.15))
        self.side = float(draw.choice([-1.0, 1.0]))
        self.steps, self.touched = 0, False

    def images(self) -> NDArray[np.uint8]:
        """The disc in red and the point in green, from above, [-1, 1] in both directions."""
        rows, columns = self.image_size
        x = (np.arange(columns) + 0.5) / columns * 2 - 1
        y = 1 - (np.arange(rows) + 0.5) / rows * 2
        picture = np.zeros((rows, columns, 3))
        for colour, (at, size) in enumerate(
            [((0.0, self.height), self.radius), (tuple(self.place), 0.1)]
        ):
            distance = np.hypot(x[None] - at[0], y[:, None] - at[1])
            # Edges fade over a pixel, so that places between two pixels show.
            picture[..., colour] = np.clip((size - distance) / (2 / columns) + 0.5, 0, 1)
        return (picture * 255).astype(np.uint8)[None]

    def state(self) -> NDArray[np.float32]:
        return self.place.astype(np.float32)

    def step(self, action: NDArray[np.float64]) -> Outcome:
        before, self.steps = self.place, self.steps + 1
        self.place = before + self.stride * np.clip(np.asarray(action, np.float64), -1, 1)
        way = np.linspace(before, self.place, 11)[1:]
        self.touched |= bool((np.hypot(way[:, 0], way[:, 1] - self.height) < self.radius).any())
        over = self.steps == self.max_steps
        solved = over and not self.touched and bool(self.place[0] >= self.finish)
        return Outcome(
            reward=float(solved), success=solved, terminated=self.touched or over, truncated=False
        )

    def expert(self) -> NDArray[np.float32]:
        """The side was chosen with the episode's seed."""
        if self.steps >= self.max_steps:
            raise UserError(f"{self.name} is over after {self.max_steps} steps")
        return self.plan(self.side)[self.steps].astype(np.float32)

    def plan(self, side: float) -> NDArray[np.float64]:
        """The 8 velocities of a side."""
        way = np.array([0.0, self.height + self.clearance * side])
        end = np.array([abs(self.start[0]), 0.0])
        half = self.max_steps // 2
        legs = [(way - self.start) / half, (end - way) / half]
        return np.repeat(legs, half, axis=0) / self.stride

    def close(self) -> None:
        pass


def round_obstacle(episodes: int = 2_000) -> SceneData:
    """Episodes of RoundObstacle's expert."""
    task = RoundObstacle()
    images, states, actions = [], [], []
    for seed in range(episodes):
        task.reset(seed)
        for _ in range(task.max_steps):
            images.append(task.images())
            states.append(task.state())
            actions.append(task.expert())
            task.step(actions[-1])
    spec = RobotSpec(
        cameras=task.cameras,
        image_size=task.image_size,
        state_dim=task.state_dim,
        action_low=task.action_low,
        action_high=task.action_high,
        instructions=(task.instruction,),
        tasks=(task.name,),
    )
    return SceneData(
        images=torch.from_numpy(np.stack(images)),
        state=torch.from_numpy(np.stack(states)),
        action=torch.from_numpy(np.stack(actions)),
        episode=torch.arange(episodes).repeat_interleave(task.max_steps),
        task=torch.zeros(episodes, dtype=torch.long),
        spec=spec,
        name="esscher.scenes:round_obstacle",
    )


def few_round_obstacle() -> SceneData:
    """The first 50 of these episodes."""
    return round_obstacle(50)


def rounds_obstacle(
    tasks: list[RoundObstacle], chunk: Float[Tensor, "n 8 2"], tolerance: float = 0.15
) -> Bool[Tensor, "n"]:
    """Whether each chunk, executed from the start of its task, arrives without a touch, and stays
    within `tolerance` of one and the same side's plan at every step.
    """
    found = []
    for task, actions in zip(tasks, chunk.double().cpu().numpy(), strict=True):
        flown = task.stride * actions.cumsum(0)
        away = [
            float(np.abs(flown - task.stride * task.plan(side).cumsum(0)).max())
            for side in (-1.0, 1.0)
        ]
        copy = RoundObstacle()
        copy.start, copy.place, copy.height = task.start, task.start.copy(), task.height
        solved = False
        for action in actions:
            outcome = copy.step(action)
            solved = outcome.success
            if outcome.terminated:
                break
        found.append(solved and min(away) <= tolerance)
    return torch.tensor(found)
