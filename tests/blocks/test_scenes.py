"""Windows over demonstrations with images: which rows they hold, and what counts."""

import pytest
import torch

from esscher.errors import UserError
from esscher.experience.scenes import SceneData, SceneWindows
from esscher.types import RobotSpec

SPEC = RobotSpec(
    cameras=("front",),
    image_size=(1, 1),
    state_dim=1,
    action_low=(-2.0,),
    action_high=(6.0,),
    instructions=("lift", "push"),
    tasks=("", ""),
)
TOKENS = torch.tensor([[7, 8], [9, 0]]), torch.tensor([[True, True], [True, False]])


def demonstrations() -> SceneData:
    """Episodes of 3, 2 and 4 rows; state k, action k / 10, and every image byte k, in row k."""
    rows = torch.arange(9)
    return SceneData(
        images=rows.to(torch.uint8).view(9, 1, 1, 1, 1).expand(9, 1, 1, 1, 3).contiguous(),
        state=rows.float().unsqueeze(1),
        action=rows.float().unsqueeze(1) / 10,
        episode=torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2]),
        task=torch.tensor([1, 0, 1]),
        spec=SPEC,
        name="nine rows",
    )


def test_a_window_repeats_the_last_action_beyond_its_episode_and_does_not_count_it():
    windows = SceneWindows(demonstrations(), 2, 3, TOKENS)
    batch = windows.at([1, 2, 4, 5])
    assert torch.allclose(
        10 * batch.action[..., 0], torch.tensor([[1.0, 2], [2, 2], [4, 4], [5, 6]])
    )
    assert batch.mask.tolist() == [[True, True], [True, False], [True, False], [True, True]]
    assert batch.scenes.images.flatten(1)[:, 0].tolist() == [1, 2, 4, 5]
    assert batch.scenes.state[:, 0].tolist() == [1, 2, 4, 5]


def test_a_window_carries_the_instruction_of_its_episode():
    batch = SceneWindows(demonstrations(), 1, 1, TOKENS).at([0, 3, 8])
    assert batch.scenes.instruction.tolist() == [[9, 0], [7, 8], [9, 0]]
    assert batch.scenes.instruction_mask.tolist() == [[True, False], [True, True], [True, False]]


def test_every_row_begins_a_window_and_all_are_drawn_alike():
    torch.manual_seed(0)
    windows = SceneWindows(demonstrations(), 2, 1, TOKENS)
    drawn = windows.sample(9_000).scenes.state[:, 0].long()
    counts = torch.bincount(drawn, minlength=9)
    assert len(windows) == 9
    assert (counts - 1_000).abs().max() < 130  # Four standard deviations of a binomial count.


def test_some_episodes_alone_keep_their_rows_and_instructions():
    some = demonstrations().of_episodes([2, 0])
    assert some.state[:, 0].tolist() == [5, 6, 7, 8, 0, 1, 2]
    assert some.episode.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert some.task.tolist() == [1, 1]
    assert some.images.flatten(1)[:, 0].tolist() == [5, 6, 7, 8, 0, 1, 2]


@pytest.mark.parametrize("horizon, told", [(3, "2"), (4, "2")])
def test_a_chunk_longer_than_the_shortest_episode_is_refused(horizon, told):
    with pytest.raises(UserError, match=f"longer than the shortest episode .* has {told}"):
        SceneWindows(demonstrations(), horizon, 1, TOKENS)


@pytest.mark.parametrize("field", ["horizon", "batch_size"])
def test_settings_out_of_range_are_named(field):
    settings = {"horizon": 1, "batch_size": 1} | {field: 0}
    with pytest.raises(UserError, match=field):
        SceneWindows(demonstrations(), instruction=TOKENS, **settings)


def test_other_demonstrations_are_refused_when_a_run_is_resumed():
    data = demonstrations()
    windows = SceneWindows(data, 1, 1, TOKENS)
    windows.load_state_dict({"digest": windows.digest})
    data.images[4] += 1
    changed = SceneWindows(data, 1, 1, TOKENS)
    with pytest.raises(UserError, match="has changed since the run was saved"):
        changed.load_state_dict({"digest": windows.digest})


def test_actions_return_to_the_tasks_own_box():
    native = SPEC.native(torch.tensor([[-1.0], [0.0], [0.5], [3.0]]).numpy())
    assert native[:, 0].tolist() == [-2, 2, 4, 6]
