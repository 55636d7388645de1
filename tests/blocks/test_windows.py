"""Windows and goals counted exhaustively on a data set small enough to list them by hand."""

from collections import Counter

import pytest
import torch

from esscher.errors import UserError
from esscher.experience import Dataset
from esscher.experience.windows import WindowBatch, Windows, later
from esscher.types import Transitions


def dataset(*lengths: int) -> Dataset:
    """Observations (episode, time) and actions episode + time / 10."""
    step = torch.cat([torch.arange(length) for length in lengths])
    episode = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).float()
    ended = torch.cat([torch.arange(length) == length - 1 for length in lengths])
    obs = torch.stack([episode, step.float()], -1)
    return Dataset(
        transitions=Transitions(
            obs=obs,
            action=(episode + step / 10).unsqueeze(-1),
            reward=torch.zeros(len(step)),
            next_obs=obs + torch.tensor([0.0, 1.0]),
            terminated=ended,
            truncated=torch.zeros_like(ended),
        ),
        step=step,
        name="tiny",
    )


def every(windows: Windows, levels: int) -> list[WindowBatch]:
    """Each window once with each of so many uniform numbers, evenly spread."""
    index = torch.arange(len(windows))
    uniform = (torch.arange(levels) + 0.5) / levels
    return [windows.at(index, torch.full((len(index),), float(u))) for u in uniform]


def test_all_windows_of_all_episodes_and_no_other() -> None:
    windows = Windows(dataset(3, 5), 2, 1)
    assert len(windows) == 2 + 4
    batch = windows.at(torch.arange(6), torch.zeros(6))
    assert batch.obs[..., 0].tolist() == [[0, 0], [0, 0], [1, 1], [1, 1], [1, 1], [1, 1]]
    assert batch.obs[..., 1].tolist() == [[0, 1], [1, 2], [0, 1], [1, 2], [2, 3], [3, 4]]
    torch.testing.assert_close(batch.action[..., 0], batch.obs[..., 0] + batch.obs[..., 1] / 10)
    assert bool(batch.mask.all())


def test_goals_are_uniform_over_what_comes_strictly_after() -> None:
    windows = Windows(dataset(3, 5), 2, 1, about=(1,))
    counts: list[Counter[float]] = [Counter() for _ in range(6)]
    for batch in every(windows, 6):  # 6 is a multiple of all numbers of choices: 1, 2 and 3.
        for window in range(6):
            counts[window][float(batch.goal[window, 0, 0])] += 1
        assert batch.has_goal.tolist() == [True, False, True, True, True, False]
    assert counts[0] == {2: 6}  # Window (0, 1) of the episode of three: only time 2 is left.
    assert counts[2] == {2: 2, 3: 2, 4: 2}
    assert counts[3] == {3: 3, 4: 3}
    assert counts[4] == {4: 6}
    assert counts[1] == counts[5] == {0: 6}, "no goal is zeros"


def test_goals_that_come_sooner_are_drawn_more_often() -> None:
    uniform = (torch.arange(7_000, dtype=torch.float64) + 0.5) / 7_000
    # In proportion to 1, 1/2 and 1/4: four, two and one in seven.
    counts = Counter(later(uniform, torch.full((7_000,), 3), 0.5).tolist())
    assert counts == {0: 4_000, 1: 2_000, 2: 1_000}
    assert Counter(later(uniform, torch.full((7_000,), 1), 0.5).tolist()) == {0: 7_000}
    windows = Windows(dataset(3, 5), 2, 1, about=(1,), goal_discount=0.5)
    found = Counter(float(batch.goal[2, 0, 0]) for batch in every(windows, 700))
    assert found == {2: 400, 3: 200, 4: 100}
    with pytest.raises(UserError, match=r"goal_discount must be in \(0, 1\], got 0"):
        Windows(dataset(3, 5), 2, 1, about=(1,), goal_discount=0.0)


def test_goals_of_several_observations_stay_in_the_episode() -> None:
    windows = Windows(dataset(3, 5), 1, 1, goal_length=2, about=(1, 0))
    found = {
        (window, tuple(batch.goal[window].flatten().tolist()))
        for batch in every(windows, 6)
        for window in range(len(windows))
        if batch.has_goal[window]
    }
    # (time, episode) of both observations; the first one after the window, the second within.
    assert found == {
        (0, (1, 0, 2, 0)),
        (3, (1, 1, 2, 1)), (3, (2, 1, 3, 1)), (3, (3, 1, 4, 1)),
        (4, (2, 1, 3, 1)), (4, (3, 1, 4, 1)),
        (5, (3, 1, 4, 1)),
    }  # fmt: skip


def test_the_largest_uniform_number_still_chooses_a_goal() -> None:
    windows = Windows(dataset(9), 1, 1, about=(1,))
    batch = windows.at(torch.tensor([0]), torch.tensor([1 - 2**-24]))
    assert batch.goal.flatten().tolist() == [8]


def test_padding_repeats_the_nearest_step_and_is_masked() -> None:
    windows = Windows(dataset(3), 3, 1, before=1, after=2)
    batch = windows.at(torch.arange(len(windows)), torch.zeros(len(windows)))
    assert batch.obs[..., 1].tolist() == [[0, 0, 1], [0, 1, 2], [1, 2, 2], [2, 2, 2]]
    assert batch.mask.tolist() == [
        [False, True, True],
        [True, True, True],
        [True, True, False],
        [True, False, False],
    ]
    torch.testing.assert_close(batch.action[..., 0], batch.obs[..., 1] / 10)


def test_batches_follow_from_the_seed_alone() -> None:
    windows = Windows(dataset(3, 5, 8), 2, 13, about=(0, 1))
    batches = []
    for _ in range(2):
        torch.manual_seed(7)
        batches += list(windows.batches(3))
    assert torch.equal(batches[0].obs, batches[1].obs)
    assert torch.equal(batches[0].goal, batches[1].goal)
    torch.manual_seed(8)
    assert not torch.equal(windows.sample(13).obs, batches[0].obs)
    assert len(windows.sample(300).obs.unique(dim=0)) == 13, "all of them are drawn"


def test_other_data_are_refused_on_resume() -> None:
    one, other = Windows(dataset(3, 5), 2, 1), Windows(dataset(3, 6), 2, 1)
    one.load_state_dict(one.state_dict())
    with pytest.raises(UserError, match="tiny has changed"):
        other.load_state_dict(one.state_dict())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 4}, "window of 4 steps does not fit into the shortest episode of tiny.* has 3"),
        (
            {"length": 6, "after": 2, "what": "chunk"},
            "chunk of 6 steps with up to 2 steps outside .* has 3: shorten the chunk",
        ),
        ({"length": 2, "batch_size": 0}, r"batch_size must be in \[1, 6\]"),
        ({"length": 2, "batch_size": 7}, r"batch_size must be in \[1, 6\]"),
        ({"length": 2, "before": 2}, "before must be in"),
        ({"length": 2, "goal_length": 0}, "goal_length must be >= 1"),
    ],
)
def test_bad_windows_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Windows(dataset(3, 5), **{"batch_size": 1, **settings})  # type: ignore[arg-type]
