"""Small data sets, made when they are asked for and always the same, for proofs and tests.

Use them like any other: `--data esscher.datasets:corridor`.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray

from esscher.adapters.imports import needed
from esscher.envs import Chain, CombinationLock, Corridor, Dodge, TwoGaps
from esscher.experience import Dataset
from esscher.types import Transitions

Columns = dict[str, NDArray[Any]]


def pendulum() -> Columns:
    """2,000 steps of Pendulum-v1, ten episodes, under uniformly random torques."""
    draw = np.random.default_rng(0)
    env = gymnasium.make("Pendulum-v1")
    return _rows(env, lambda: draw.uniform(-2.0, 2.0, 1), 2_000)


def sums_demonstrated() -> list[dict[str, str]]:
    """5,000 sums of two numbers below 100, with their results: rows of text, prompt and completion."""
    return [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a, b in _sums(5_000, 0)]


def sums_compared() -> list[dict[str, str]]:
    """1,000 such sums, each with its result and a wrong one: rows of prompt, chosen and rejected."""
    draw, rows = np.random.default_rng(1), []
    for a, b in _sums(1_000, 2):
        wrong = a + b + int(draw.choice([-10, -2, -1, 1, 2, 10]))
        rows.append({"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": str(wrong)})
    return rows


def sums_asked() -> list[dict[str, str]]:
    """1,000 such sums to be completed: rows of prompt and answer (esscher.rewards:exact_answer)."""
    return [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in _sums(1_000, 3)]


def empty_prompts() -> list[dict[str, str]]:
    """64 times nothing, to write without being asked: the model starts from its begin token."""
    return [{"prompt": ""}] * 64


def _sums(count: int, seed: int) -> list[tuple[int, int]]:
    pairs = np.random.default_rng(seed).integers(0, 100, (count, 2))
    return [(int(a), int(b)) for a, b in pairs]


def chain() -> Columns:
    """498 steps of esscher.envs:Chain: 99 times through it and a start, the action always 0."""
    return _rows(Chain(), lambda: np.zeros(1), 498)


def corridor() -> Columns:
    """4,000 steps along esscher.envs:Corridor: six in ten go forward, four in ten back."""
    draw, env = np.random.default_rng(0), Corridor()

    def stagger() -> NDArray[Any]:
        action = np.zeros(2)
        action[env.direction] = 1.0 if draw.random() < 0.6 else -1.0
        return action

    return _rows(env, stagger, 4_000)


@cache
def random_game() -> Dataset:
    """100 episodes of 30 steps in esscher.games:RandomGame, by agents in their soft equilibrium."""
    from esscher.games import RandomGame

    return _demonstrations(RandomGame(), 100, 30, "esscher.datasets:random_game")


@cache
def gems() -> Dataset:
    """10 episodes of 15 steps in esscher.games:Gems, by agents in their soft equilibrium."""
    from esscher.games import Gems

    return _demonstrations(Gems(), 10, 15, "esscher.datasets:gems")


def _demonstrations(game: Any, episodes: int, length: int, name: str) -> Dataset:
    """Steps of several agents: observations end to end, one choice an agent, mean rewards."""
    draw = np.random.default_rng(1)
    policies = game.equilibrium.logp.exp().cumsum(-1).numpy()
    game.reset(seed=0)
    states: list[int] = []
    following: list[int] = []
    actions, rewards = [], []
    for _ in range(episodes):
        game.reset()
        for _ in range(length):
            state, levels = game.state_number, draw.random(len(policies))
            chosen = [int((p[state] < u).sum()) for p, u in zip(policies, levels, strict=True)]
            chosen = [min(choice, game.num_actions - 1) for choice in chosen]
            _, reward, *_ = game.step(dict(zip(game.agents, chosen, strict=True)))
            states.append(state)
            following.append(game.state_number)
            actions.append(chosen)
            rewards.append(float(np.mean(list(reward.values()))))
    obs, next_obs = (
        game.observe(torch.tensor(numbers)).repeat(1, len(policies))
        for numbers in (states, following)
    )
    step = torch.arange(len(states)) % length
    transitions = Transitions(
        obs=obs,
        action=torch.tensor(actions),
        reward=torch.tensor(rewards),
        next_obs=next_obs,
        terminated=torch.zeros(len(states), dtype=torch.bool),
        truncated=step == length - 1,
    )
    return Dataset(transitions=transitions, step=step, name=name)


def _rows(
    env: gymnasium.Env[Any, Any], behaviour: Callable[[], NDArray[Any]], count: int
) -> Columns:
    """So many steps, episode after episode; the last episode is cut where they end."""
    names = ("observations", "actions", "rewards", "next_observations")
    rows: dict[str, list[Any]] = {n: [] for n in (*names, "terminations", "truncations")}
    obs, _ = env.reset(seed=0)
    for _ in range(count):
        action = behaviour().astype(np.float32)
        next_obs, reward, terminated, truncated, _ = env.step(action)
        step = (obs, action, np.float32(reward), next_obs, terminated, truncated)
        for column, value in zip(rows.values(), step, strict=True):
            column.append(value)
        obs = env.reset()[0] if terminated or truncated else next_obs
    env.close()
    return {name: np.array(column) for name, column in rows.items()}


def combination_lock_3() -> Columns:
    """200 episodes of esscher.envs:CombinationLock, horizon 3; see `combination_lock`."""
    return combination_lock(3, 200)


def combination_lock_5() -> Columns:
    """5,000 episodes of esscher.envs:CombinationLock, horizon 5; see `combination_lock`."""
    return combination_lock(5, 5_000)


def combination_lock_50() -> Columns:
    """50,000 episodes of esscher.envs:CombinationLock, horizon 50: HNPG's data set, 1.3 GB."""
    return combination_lock(50, 50_000)


def combination_lock(horizon: int, episodes: int, **settings: Any) -> Columns:
    """Steps of a policy that knows the combination, and acts at random once in `horizon` steps.

    The right choice is 1 in its component and 0 in the others; a random action is uniform in
    [0, 1]^10, and right one time in ten. So (1 - 0.9 / horizon)^horizon of the episodes open the
    lock, but for the softmax: 37% of those of horizon 5.
    """
    draw, env = np.random.default_rng(0), CombinationLock(horizon, **settings)

    def knowing() -> NDArray[Any]:
        if draw.random() < 1 / horizon:
            return draw.random(env.num_latent_actions)
        state = min(env.state, env.dead - 1)  # What one does when dead does not matter.
        return np.eye(env.num_latent_actions)[env.right[env.time, state]]

    return _rows(env, knowing, horizon * episodes)


def two_gaps() -> Columns:
    """400 episodes of play in esscher.envs:TwoGaps, through either gap at random, to any goal.

    Straight to the gap, through it, and straight to the goal, with noise of 0.1 on the velocity.
    """
    draw, env = np.random.default_rng(0), TwoGaps()
    side = 1.0

    def play() -> NDArray[Any]:
        nonlocal side
        if env.time == 0:
            side = float(draw.choice([-1.0, 1.0]))
        x, _ = env.place
        gap = side * env.gap
        if x < -0.1:
            aim = np.array([-0.05, gap])
        elif x < 0.05:
            aim = np.array([x + 1.0, gap])
        else:
            aim = np.array([env.finish, env.goal])
        way = aim - env.place
        return np.clip(way / np.linalg.norm(way) + 0.1 * draw.standard_normal(2), -1, 1)

    return _episodes(env, play, 400)


def dodge() -> Columns:
    """500 episodes of an expert in esscher.envs:Dodge, to either side; see `_dodging`."""
    return _dodging(Dodge())


def dodge_and_grip() -> Columns:
    """The same with the gripper, which is -1 up to x = 0.5 and 1 from there on."""
    return _dodging(Dodge(gripper=True))


def dodge_and_grip_scaled() -> Columns:
    """The same with a tenth of the gripper's values, as RTI-DP-scale wants them."""
    columns = dodge_and_grip()
    columns["actions"][:, 1] /= 10
    return columns


def _dodging(env: Dodge) -> Columns:
    """The velocity clip(4 (0.6 m - y), -1, 1) for a side m = +-1 of each episode, with noise of 0.05.

    They begin anywhere in 0 <= x <= 0.5, |y| < 0.3, so that wherever one is, both sides were chosen.
    """
    draw = np.random.default_rng(0)
    side = 1.0

    def steer() -> NDArray[Any]:
        nonlocal side
        if env.fresh:
            side = float(draw.choice([-1.0, 1.0]))
        wanted = np.clip(env.drift * (env.target * side - env.height), -1, 1)
        velocity = np.clip(wanted + 0.05 * draw.standard_normal(), -1, 1)
        grip = 1.0 if env.stride * env.steps >= env.closing - 1e-6 else -1.0
        return np.array([velocity, grip] if env.gripper else [velocity])

    starts = [
        {"steps": int(draw.integers(11)), "height": float(draw.uniform(-0.3, 0.3))}
        for _ in range(500)
    ]
    return _episodes(env, steer, 500, starts)


def _episodes(
    env: gymnasium.Env[Any, Any],
    behaviour: Callable[[], NDArray[Any]],
    count: int,
    options: Sequence[dict[str, Any]] = (),
) -> Columns:
    """So many whole episodes, each with its options of the reset, if there are any."""
    names = ("observations", "actions", "rewards", "next_observations")
    rows: dict[str, list[Any]] = {n: [] for n in (*names, "terminations", "truncations")}
    for episode in range(count):
        own = options[episode] if options else None
        obs, _ = env.reset(seed=0 if episode == 0 else None, options=own)
        ended = False
        while not ended:
            action = behaviour().astype(np.float32)
            next_obs, reward, terminated, truncated, _ = env.step(action)
            step = (obs, action, np.float32(reward), next_obs, terminated, truncated)
            for column, value in zip(rows.values(), step, strict=True):
                column.append(value)
            obs, ended = next_obs, terminated or truncated
    env.close()
    return {name: np.array(column) for name, column in rows.items()}


def digits() -> dict[str, Any]:
    """1,797 handwritten digits of 8 x 8 (scikit-learn's copy of the UCI set), with their labels."""
    sklearn: Any = needed("sklearn.datasets", "esscher.datasets:digits", "diffusion")
    found = sklearn.load_digits()
    return {"image": (found.images / 16).astype("float32"), "label": found.target}


RING_WEIGHTS = (0.25, 0.2, 0.15, 0.12, 0.1, 0.08, 0.06, 0.04)


def ring() -> Columns:
    """50,000 points of eight Gaussians on a circle of radius 3, std 0.25, weights RING_WEIGHTS: what
    esscher.images:mixture draws with components 8, radius 3, std 0.25 and these weights.
    """
    draw = np.random.default_rng(0)
    angle = draw.choice(8, 50_000, p=RING_WEIGHTS) * (np.pi / 4)
    means = 3 * np.stack([np.cos(angle), np.sin(angle)], -1)
    return {"sample": (means + 0.25 * draw.standard_normal(means.shape)).astype(np.float32)}


def gaussian_populations() -> Columns:
    """4,000 Gaussians in the plane, 128 samples of each: means uniform on [0, 5]^2, covariances
    A A^T + 0.1 I with A of independent normals of deviation 0.6.
    """
    draw = np.random.default_rng(0)
    means, covariances = gaussian_parameters(draw, 4_000)
    roots = np.linalg.cholesky(covariances)
    noise = draw.standard_normal((4_000, 128, 2))
    x = means[:, None] + noise @ roots.transpose(0, 2, 1)
    return {"sample": x.reshape(-1, 2).astype(np.float32), "set_id": np.arange(4_000).repeat(128)}


def gaussian_parameters(
    draw: np.random.Generator, count: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Means and covariances of `gaussian_populations`."""
    means = draw.uniform(0, 5, (count, 2))
    factor = 0.6 * draw.standard_normal((count, 2, 2))
    return means, factor @ factor.transpose(0, 2, 1) + 0.1 * np.eye(2)


def poisson_populations() -> Columns:
    """20,000 Poisson distributions, 40 counts of each: rates from Gamma(4, rate 2)."""
    draw = np.random.default_rng(0)
    rates = draw.gamma(4.0, 0.5, 20_000)
    counts = draw.poisson(rates[:, None], (20_000, 40))
    return {"count": counts.reshape(-1), "set_id": np.arange(20_000).repeat(40)}


def three_digits() -> Columns:
    """The 537 handwritten digits 0, 1 and 2 of 8 x 8, each digit a population: to be mixed
    (--sets.mixed 3).
    """
    found = digits()
    kept = found["label"] < 3
    return {"image": found["image"][kept], "set_id": found["label"][kept]}


def tumours() -> Columns:
    """569 breast tumours (scikit-learn's copy of the Wisconsin diagnostic set): seven measures of the
    nuclei's texture and outline. Populations are 24 classes of equally many by mean radius (`set_id`);
    the radius itself is the column `label`. What follows from the radius, perimeter and area, is left
    out.
    """
    sklearn: Any = needed("sklearn.datasets", "esscher.datasets:tumours", "applied")
    found = sklearn.load_breast_cancer()
    radius = found.data[:, 0]
    rank = radius.argsort(kind="stable").argsort(kind="stable")
    names = [name.removeprefix("mean ").replace(" ", "_") for name in found.feature_names[:10]]
    columns = {
        name: found.data[:, number]
        for number, name in enumerate(names)
        if name not in ("radius", "perimeter", "area")
    }
    return {**columns, "set_id": rank * 24 // len(radius), "label": radius}
