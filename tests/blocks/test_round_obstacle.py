"""The robot that goes round an obstacle: experts arrive, data show both sides, mixtures fail."""

import math

import numpy as np
import pytest
import torch

from esscher.errors import UserError
from esscher.scenes import RoundObstacle, few_round_obstacle, round_obstacle, rounds_obstacle


def begun(count: int) -> list[RoundObstacle]:
    tasks = [RoundObstacle() for _ in range(count)]
    for seed, task in enumerate(tasks):
        task.reset(seed)
    return tasks


def test_experts_arrive_on_their_side_by_both_sides() -> None:
    tasks = begun(200)
    for task in tasks:
        touched, rewards = [], []
        for step in range(8):
            outcome = task.step(task.expert())
            rewards.append(outcome.reward)
            touched.append(outcome.terminated and step < 7)
            if step == 3:
                np.testing.assert_allclose(
                    task.place, [0, task.height + 0.45 * task.side], atol=1e-6
                )
        assert outcome.success and outcome.terminated and not any(touched)
        assert rewards == [0.0] * 7 + [1.0]
        np.testing.assert_allclose(task.place, [-task.start[0], 0], atol=1e-6)
        with pytest.raises(UserError, match="is over after 8 steps"):
            task.expert()
    assert 0.4 < sum(task.side > 0 for task in tasks) / 200 < 0.6


def test_straight_on_it_touches_and_is_over() -> None:
    task = RoundObstacle()
    task.reset(0)
    task.place, task.height = np.array([-0.5, 0.0]), 0.05
    found = [task.step(np.array([1.0, 0.0])) for _ in range(2)]
    # From -0.5 by -0.3 to -0.1: the disc begins at -sqrt(0.04 - 0.0025) = -0.194.
    assert [x.terminated for x in found] == [False, True] and not found[1].success


def test_chunks_are_valid_on_either_side_and_no_mixture_is() -> None:
    tasks = begun(100)
    sides = [torch.tensor(np.stack([t.plan(m) for t in tasks])).float() for m in (-1.0, 1.0)]
    for plans in sides:
        assert rounds_obstacle(tasks, plans).all()
        assert rounds_obstacle(tasks, plans + 0.01 * torch.randn(plans.shape)).all()
    mixed = torch.where(torch.arange(8).view(1, 8, 1) % 2 == 0, *sides)
    assert not rounds_obstacle(tasks, mixed).any()
    # Far out it arrives without a touch, but as nobody does.
    wide = sides[1].clone()
    wide[:, 0, 1], wide[:, 7, 1] = 1.0, -1.0
    wide[:, 1, 1] = 1.0
    assert rounds_obstacle(tasks, wide, tolerance=math.inf).float().mean() > 0.9
    assert not rounds_obstacle(tasks, wide).all()
    assert tasks[0].steps == 0, "tasks stay as they are"


def test_pictures_show_where_things_are() -> None:
    task = RoundObstacle()
    task.reset(3)
    picture = task.images()
    assert picture.shape == (1, 16, 16, 3) and picture.dtype == np.uint8
    x = (np.arange(16) + 0.5) / 8 - 1
    for colour, (at, tolerance) in enumerate([((0.0, task.height), 0.01), (task.place, 0.03)]):
        weight = picture[0, ..., colour] / picture[0, ..., colour].sum()
        centre = (weight.sum(0) @ x, weight.sum(1) @ -x)
        np.testing.assert_allclose(centre, at, atol=tolerance)
    assert picture[..., 2].max() == 0


def test_data_are_the_experts_steps() -> None:
    data = few_round_obstacle()
    assert len(data) == 400 and data.lengths().tolist() == [8] * 50
    assert data.digest() == round_obstacle(50).digest()
    assert data.spec.tasks == ("esscher.scenes:RoundObstacle",) and data.action.abs().max() <= 1
    for episode in range(50):
        task = RoundObstacle()
        task.reset(episode)
        rows = slice(8 * episode, 8 * episode + 8)
        torch.testing.assert_close(
            data.action[rows].double(), torch.from_numpy(task.plan(task.side)), atol=1e-6, rtol=0
        )
        assert torch.equal(data.images[8 * episode], torch.from_numpy(task.images()))
