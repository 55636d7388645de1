"""Rewards of completions: users' functions and verifiers, run in a process of their own.

A reward is called as reward(prompt, completion, row): two strings and the row of the data. It returns
a number, or named components: their sum is the reward, unless one is called reward. A call that
raises, takes too long or is not finite is shown, and its row is no evidence: never a reward of 0.
"""

import json
import os
import pickle
import selectors
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from itertools import compress
from typing import Any

import torch

from esscher.adapters.imports import needed
from esscher.errors import UserError, nearest
from esscher.types import Completions, Prompts, Scored

START_SECONDS = 120
"""For the imports of a reward."""

Item = tuple[str, str, Mapping[str, Any]]


class RewardJudge:
    """Scores completions.

    Args:
        source: module:function, or the task that brings its own verifier.
        rows: that the prompts were made of.
        tokenizer: turns completions into text.
        seconds: for one completion.
        needed_by: the method, for the message where there is no reward.

    Raises:
        UserError: no reward, or one that cannot be imported.
    """

    def __init__(
        self,
        source: str | None,
        rows: Sequence[Mapping[str, Any]],
        tokenizer: Any,
        *,
        seconds: float,
        needed_by: str = "this method",
    ):
        if source is None:
            raise UserError(
                f"{needed_by} needs a reward: give --reward module:function, called with (prompt, "
                "completion, row), or --task reasoning_gym:NAME, which brings its verifier"
            )
        self._source, self._rows, self._tokenizer = source, rows, tokenizer
        self._seconds = seconds
        self._worker = _Worker(source)

    def __call__(
        self,
        completions: Completions,
        prompts: Prompts,
        rows: Sequence[Mapping[str, Any]] | None = None,
    ) -> Scored:
        """The reward of each completion.

        Args:
            completions: of the prompts.
            prompts: whose `row` says which row of `rows` each one is.
            rows: by default those of training.
        """
        rows = self._rows if rows is None else rows
        of_group, decode = prompts.row.tolist(), self._tokenizer.decode
        # All at once, so that a device is waited for a few times and not for every row.
        columns = (
            completions.tokens,
            completions.prompt_mask,
            completions.completion_mask,
            completions.group,
        )
        items: list[Item] = []
        for tokens, asked, written, group in zip(*(x.tolist() for x in columns), strict=True):
            prompt, completion = (
                decode(list(compress(tokens, part)), skip_special_tokens=True)
                for part in (asked, written)
            )
            items.append((prompt, completion, rows[of_group[group]]))
        return _scored(completions, self._answers(items))

    def close(self) -> None:
        """End the process."""
        self._worker.close()

    def _answers(self, items: Sequence[Item]) -> list[dict[str, Any]]:
        answers: list[dict[str, Any]] = []
        while len(answers) < len(items):
            rest = items[len(answers) :]
            self._worker.ask(rest)
            for _ in rest:
                answer = self._worker.answer(self._seconds)
                if answer is not None:
                    answers.append(answer)
                    continue
                answers.append({"error": f"it {self._worker.ended(self._seconds)}"})
                self._worker = _Worker(self._source)
                break
        for text in dict.fromkeys(a["error"] for a in answers if "error" in a):
            warnings.warn(f"reward {self._source} failed: {text}", stacklevel=4)
        return answers


class _Worker:
    """The process, and the two pipes to it."""

    def __init__(self, source: str):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "esscher.adapters.reward_worker", source],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._selector = selectors.DefaultSelector()
        self._unread = b""
        assert self._process.stdout is not None
        self._selector.register(self._process.stdout, selectors.EVENT_READ)
        hello = self.answer(START_SECONDS)
        if hello is None or "refused" in hello:
            self.close()
            told = f"reward {source!r} did not start" if hello is None else hello["refused"]
            raise UserError(str(told))

    def ask(self, items: Sequence[Item]) -> None:
        assert self._process.stdin is not None
        try:
            pickle.dump(list(items), self._process.stdin)
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # It has ended: the answers will say so.

    def answer(self, seconds: float) -> dict[str, Any] | None:
        """The next answer; None if it takes longer than this, or never comes."""
        assert self._process.stdout is not None
        until = time.monotonic() + seconds
        # Lines that came together are kept here: the selector knows only of what is in the pipe.
        while b"\n" not in self._unread:
            # More than a day at once is more than some systems can wait for.
            left = min(until - time.monotonic(), 86_400.0)
            if not self._selector.select(max(0.0, left)):
                if time.monotonic() < until:
                    continue
                return None
            piece = os.read(self._process.stdout.fileno(), 1 << 16)
            if not piece:
                return None
            self._unread += piece
        line, _, self._unread = self._unread.partition(b"\n")
        return json.loads(line)

    def ended(self, seconds: float) -> str:
        """Why an answer did not come; ends the process."""
        try:
            status = self._process.wait(0.5)
        except subprocess.TimeoutExpired:
            status = None
        self.close()
        if status is None:
            return f"took longer than --text.reward-seconds {seconds:g}"
        return f"ended its process with status {status}"

    def close(self) -> None:
        self._selector.close()
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:
                pass
        self._process.wait()


def made_prompts(task: str, size: int, seed: int) -> list[dict[str, Any]]:
    """Rows of a task that makes its own prompts: columns prompt, answer, entry and task.

    Raises:
        UserError: no such task, or its library is not installed.
    """
    kind, _, name = task.partition(":")
    if kind != "reasoning_gym" or not name:
        raise UserError(f"--task must be reasoning_gym:NAME, got {task!r}")
    gym: Any = needed("reasoning_gym", task, "language")
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        raise UserError(f"reasoning_gym has no task {name!r}: {nearest(name, DATASETS)}")
    entries = gym.create_dataset(name, size=size, seed=seed % 2**31)
    return [
        {"prompt": e["question"], "answer": e["answer"], "entry": e, "task": name} for e in entries
    ]


def _scored(completions: Completions, answers: Sequence[dict[str, Any]]) -> Scored:
    device = completions.tokens.device
    names = list(dict.fromkeys(name for a in answers for name in a.get("parts", ())))
    missing = float("nan")
    parts = {
        name: torch.tensor([a.get("parts", {}).get(name, missing) for a in answers], device=device)
        for name in names
    }
    totals = [_total(a["parts"]) if "parts" in a else 0.0 for a in answers]
    return Scored(
        completions=completions,
        reward=torch.tensor(totals, dtype=torch.float32, device=device),
        valid=torch.tensor(["parts" in a for a in answers], device=device),
        parts=parts,
    )


def _total(parts: Mapping[str, float]) -> float:
    return parts["reward"] if "reward" in parts else sum(parts.values())
