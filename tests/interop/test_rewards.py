"""Rewards run in a process of their own: what they return, and every way in which they fail."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from esscher.adapters.rewards import RewardJudge, made_prompts
from esscher.errors import UserError
from esscher.models import byte_tokenizer
from esscher.rewards import digits, exact_answer, given_answer, math_answer, reasoning_gym_answer
from esscher.types import Completions, Prompts

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process must find users_rewards as a user's own is found: from the working folder."""
    monkeypatch.chdir(HERE)
    monkeypatch.setenv("PYTHONPATH", f"{HERE}:{HERE.parents[1] / 'src'}")


def judge(source: str | None, rows: Any = None, seconds: float = 5.0) -> RewardJudge:
    rows = [{"answer": "4"}, {"answer": "5"}] if rows is None else rows
    return RewardJudge(source, rows, byte_tokenizer(), seconds=seconds, needed_by="lite_ppo")


def written(texts: list[str], groups: list[int]) -> tuple[Completions, Prompts]:
    """Completions of the prompt "?"; group g answers row g."""
    tokenizer = byte_tokenizer()
    ids = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
    width = 1 + max(map(len, ids))
    tokens = torch.zeros(len(ids), width, dtype=torch.long)
    completion = torch.zeros(len(ids), width, dtype=torch.bool)
    tokens[:, 0] = tokenizer("?")["input_ids"][0]
    for row, part in enumerate(ids):
        tokens[row, 1 : 1 + len(part)] = torch.tensor(part)
        completion[row, 1 : 1 + len(part)] = True
    prompt = torch.zeros_like(completion)
    prompt[:, 0] = True
    count = max(groups) + 1
    return (
        Completions(
            tokens=tokens,
            prompt_mask=prompt,
            completion_mask=completion,
            logp=torch.zeros(tokens.shape),
            group=torch.tensor(groups),
            finished=torch.ones(len(ids), dtype=torch.bool),
        ),
        Prompts(
            tokens=tokens[:count, :1],
            mask=torch.ones(count, 1, dtype=torch.bool),
            row=torch.arange(count),
        ),
    )


@pytest.fixture
def opened() -> Iterator[Any]:
    judges: list[RewardJudge] = []

    def open_(*args: Any, **options: Any) -> RewardJudge:
        judges.append(judge(*args, **options))
        return judges[-1]

    yield open_
    for one in judges:
        one.close()


# ---- what they return


def test_a_number_is_the_reward(opened: Any) -> None:
    scored = opened("users_rewards:length")(*written(["", "ab", "é"], [0, 1, 1]))
    assert scored.reward.tolist() == [0, 2, 1]
    assert scored.valid.tolist() == [True] * 3
    assert scored.parts["reward"].tolist() == [0, 2, 1]


def test_components_are_named_and_add_up_and_every_row_is_its_own(opened: Any) -> None:
    scored = opened("users_rewards:components")(*written(["4", "5", "4", "5"], [0, 0, 1, 1]))
    assert scored.parts["right"].tolist() == [1, 0, 0, 1]
    assert scored.reward.tolist() == [1.5, 0.5, 0.5, 1.5]


def test_a_component_called_reward_is_the_reward(opened: Any) -> None:
    scored = opened("users_rewards:weighed")(*written(["4"], [0]))
    assert scored.reward.tolist() == [10] and scored.parts["right"].tolist() == [1]


def test_a_lambda_of_another_data_set_is_given_its_rows(opened: Any) -> None:
    rows = [{"answer": "9"}]
    scored = opened("users_rewards:components")(*written(["9"], [0]), rows)
    assert scored.parts["right"].tolist() == [1]


# ---- how they fail


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("raise", "ZeroDivisionError: of its own"),
        ("nan", "its component reward is nan"),
        ("inf", "its component reward is inf"),
        ("none", "TypeError"),
        ("empty", "it returned no component"),
        ("hang", "took longer than --text.reward-seconds 0.5"),
        ("exit", "ended its process with status 7"),
    ],
)
def test_a_failure_is_said_and_is_no_evidence(opened: Any, text: str, said: str) -> None:
    judge = opened("users_rewards:difficult", seconds=0.5 if text == "hang" else 10)
    with pytest.warns(UserWarning, match=said):
        scored = judge(*written(["fine", text, "fine"], [0, 0, 1]))
    assert scored.valid.tolist() == [True, False, True]
    assert scored.reward.tolist() == [1, 0, 1]
    assert torch.isnan(scored.parts["reward"]).tolist() == [False, True, False]
    again = judge(*written(["fine"], [0]))  # The process is there, or there again.
    assert again.valid.tolist() == [True]


def test_what_cannot_be_a_reward_is_refused_before_anything_starts() -> None:
    with pytest.raises(UserError, match="lite_ppo needs a reward: give --reward module:function"):
        judge(None)
    with pytest.raises(UserError, match="reward 'users_rewards:missing' cannot be imported"):
        judge("users_rewards:missing")
    with pytest.raises(UserError, match="is a int, not a function"):
        judge("users_rewards:not_a_function")


# ---- verifiers


def test_the_answer_is_what_stands_between_the_last_tags() -> None:
    assert given_answer(" 4 ") == "4"
    assert given_answer("I think <answer>3</answer>, no: <answer> 4\n</answer>.") == "4"


def test_exact_answers() -> None:
    assert exact_answer("", " 4", {"answer": 4}) == {"correct": 1.0}
    assert exact_answer("", "4.0", {"answer": 4}) == {"correct": 0.0}


@pytest.mark.parametrize(
    ("text", "count", "first"), [("", 0, 0), ("a12", 2, 0), ("3+4", 2, 1), ("abc", 0, 0)]
)
def test_digits_are_counted(text: str, count: int, first: int) -> None:
    assert digits("7", text, {}) == {"reward": count, "begins_with_a_digit": first}


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("1/2", "0.5", 1),
        (r"$\frac{1}{2}$", "0.5", 1),
        ("the result is $x^2 + 2x + 1$", "(x+1)^2", 1),
        ("3", "0.5", 0),
        ("", "0.5", 0),
        ("no idea", "0.5", 0),
    ],
)
def test_answers_equal_as_mathematics(text: str, answer: str, right: int) -> None:
    assert math_answer("", text, {"answer": answer}) == {"correct": right}


def test_tasks_of_reasoning_gym_bring_their_verifier(opened: Any) -> None:
    rows = made_prompts("reasoning_gym:chain_sum", 5, seed=3)
    assert rows == made_prompts("reasoning_gym:chain_sum", 5, seed=3)
    assert rows != made_prompts("reasoning_gym:chain_sum", 5, seed=4)
    for row in rows:  # The sum, worked out from the text.
        terms = row["prompt"].split(":")[1].strip(" =")
        assert eval(terms) == int(row["answer"])
        assert reasoning_gym_answer("", row["answer"], row) == {"correct": 1.0}
        assert reasoning_gym_answer("", "nonsense", row)["correct"] < 0.1
    right = opened("reasoning_gym:chain_sum", rows)(*written([rows[0]["answer"]], [0]))
    assert right.parts["correct"].tolist() == [1]
    with pytest.raises(UserError, match="reasoning_gym has no task 'chain_sums': did you mean"):
        made_prompts("reasoning_gym:chain_sums", 5, seed=3)
    with pytest.raises(UserError, match="--task must be reasoning_gym:NAME, got 'chain_sum'"):
        made_prompts("chain_sum", 5, seed=3)


def test_waiting_for_ever_is_not_too_long(opened: Any) -> None:
    """Of 1e30 seconds some systems say that they cannot."""
    scored = opened("users_rewards:length", seconds=1e30)(*written(["ab"], [0]))
    assert scored.reward.tolist() == [2]
