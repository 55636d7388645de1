"""Games of several turns: their rules and optima, how they are played, and what is kept of them."""

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import esscher
from esscher.adapters.text_envs import TextGames, make_text_env, read_turns
from esscher.errors import UserError
from esscher.experience.turns import Turn, TurnReplay, Turns
from esscher.loops.converse import converse
from esscher.loops.online import LoopState
from esscher.models import byte_tokenizer, character_tokenizer
from esscher.runtime.rng import Phase, mix
from esscher.text_envs import Doors, Secret, novice
from esscher.types import Completions, Prompts

END = 2
TOKENIZER = byte_tokenizer()


# ---- the games of our own


def test_doors_pay_for_their_passwords() -> None:
    game = Doors(noise=0.0)
    assert len({game.password(door) for door in range(6)}) == 6
    for say, worth in ((game.password, 6.0), (lambda door: "ax", 1.0), (lambda door: "zz", 0.0)):
        obs, rewards, over = game.reset(0), [], False
        while not over:
            obs, reward, over, truncated = game.step(say(int(obs)))
            rewards.append(reward)
            assert not truncated
        assert len(rewards) == 6 and sum(rewards) == worth
    assert game.optimal_return() == 6.0


def test_noise_comes_from_the_seed_alone() -> None:
    game, rewards = Doors(), []
    for seed in (3, 4, 3):
        game.reset(seed)
        rewards.append([game.step("ax")[1] for _ in range(6)])
    assert rewards[0] == rewards[2] != rewards[1]
    noise = []
    for seed in range(2000):
        game.reset(seed)
        noise.append(game.step("")[1])
    assert np.mean(noise) == pytest.approx(0, abs=0.07)
    assert np.std(noise) == pytest.approx(1, abs=0.05)


def secret_worth(policy: Callable[[list[tuple[str, str]]], str], bits: int, turns: int) -> float:
    """Mean return over all numbers, each met once, by playing."""
    total = 0.0
    for number in range(2**bits):
        game = Secret(bits, turns)
        game.reset(0)
        game.number = number
        told: list[tuple[str, str]] = []
        over = False
        while not over:
            action = policy(told)
            answer, reward, over, _ = game.step(action)
            told.append((action, answer))
            total += reward
    return total / 2**bits


def ask_then_guess(told: list[tuple[str, str]]) -> str:
    """Ask for the bits from the lowest on, and guess between the two numbers that are left."""
    bits = {int(a[1]): int(b) for a, b in told if a[0] == "a"}
    wrong = {int(a[1]) for a, b in told if a[0] == "s" and b == "n"}
    if len(bits) < 2:
        return f"a{len(bits)}"
    left = [n for n in range(8) if all(n >> k & 1 == b for k, b in bits.items())]
    return f"s{min(n for n in left if n not in wrong)}"


def test_the_secret_has_the_value_of_its_sheet() -> None:
    """V(8) = -1 + V(4), V(4) = -1 + V(2), V(2) = -1/2; reached by playing."""
    assert Secret(1).optimal_return() == -0.5
    assert Secret(2).optimal_return() == -1.5
    assert Secret(3).optimal_return() == -2.5
    assert secret_worth(ask_then_guess, 3, 8) == -2.5
    assert secret_worth(lambda told: "a0", 3, 8) == -8.0


def test_no_way_to_play_beats_the_value() -> None:
    """All deterministic policies of two bits and two turns, one by one."""
    moves = ["a0", "a1", "s0", "s1", "s2", "s3"]
    answers = ["0", "1", "n"]
    best = -np.inf
    for first in moves:
        for then in itertools.product(moves, repeat=len(answers)):
            table = dict(zip(answers, then, strict=True))

            def policy(told: Any, first: str = first, table: Any = table) -> str:
                return table[told[-1][1]] if told else first

            best = max(best, secret_worth(policy, 2, 2))
    assert Secret(2, 2).optimal_return() == best


def test_the_secret_answers() -> None:
    game = Secret()
    assert game.reset(1) == "?"
    game.number = 6  # 110
    said = ["a0", "a1", "a2", "a3", "s9", "hello", "s5", "s6"]
    told = [game.step(action) for action in said]
    assert [t[0] for t in told] == ["0", "1", "1", "?", "?", "?", "n", "y"]
    assert [t[1] for t in told] == [-1.0] * 7 + [0.0]
    assert [t[2] for t in told] == [False] * 7 + [True]


@pytest.mark.parametrize(("game", "prompt", "legal"), [
    ("doors", "3", {"ax", "ay", "bx", "by", "cx", "cy"}),
    ("secret", "?\n", {*(f"a{k}" for k in range(3)), *(f"s{k}" for k in range(8))}),
])  # fmt: skip
def test_a_novice_says_what_is_legal_about_equally_often(
    game: Any, prompt: str, legal: set[str]
) -> None:
    torch.manual_seed(0)
    model, tokenizer = novice(game=game)
    start = tokenizer(prompt)["input_ids"]
    mass = 0.0
    for said in sorted(legal):
        ids = start + tokenizer(said)["input_ids"] + [tokenizer.eos_token_id]
        logp = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        places = range(len(start), len(ids))
        probability = sum(logp[k - 1, ids[k]] for k in places).exp().item()
        first = 3 if game == "doors" else 2
        second = 2 if game == "doors" else 3 if said[0] == "a" else 8
        assert probability == pytest.approx(1 / (first * second), rel=0.25), said
        mass += probability
    assert 0.93 < mass < 1


# ---- playing


class Echo:
    """Says what was said, and draws from the global generators of Python and NumPy."""

    def __init__(self, length: int = 3, kind: str = "end"):
        self.length, self.kind = length, kind

    def reset(self, seed: int) -> str:
        self.turn = 0
        return "start"

    def step(self, action: str) -> Any:
        import random

        self.turn += 1
        reward = random.random() + float(np.random.rand())
        over = self.turn == self.length
        ends = (over, False) if self.kind == "end" else (False, over)
        return f"[{action}]", reward, *ends


class Gym:
    """As Gymnasium has it."""

    def reset(self, *, seed: int) -> tuple[str, dict[str, Any]]:
        return f"seed {seed}", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        return "bye", 1.5, True, False, {}


class Broken:
    def __init__(self, what: str):
        self.what = what

    def reset(self, seed: int) -> Any:
        return 7 if self.what == "obs" else "go"

    def step(self, action: str) -> Any:
        if self.what == "short":
            return "go", 1.0, True
        reward = {"nan": float("nan"), "text": "much"}.get(self.what, 1.0)
        return "go", reward, False, False


def games(source: str, tokenizer: Any = TOKENIZER, **changes: Any) -> TextGames:
    settings = changes.pop("settings", {})
    options = {
        "max_length": 200,
        "max_turns": 5,
        "history": "transcript",
        "pad_token": 0,
        "device": torch.device("cpu"),
    }
    return TextGames(source, settings, tokenizer, **{**options, **changes})


def here(name: str) -> str:
    return f"{__name__}:{name}"


def speaker(texts: Sequence[str], tokenizer: Any = TOKENIZER) -> Callable[[Prompts], Completions]:
    """Says the texts in turn, the same to everyone, with what it was shown in `seen`."""
    turn = itertools.count()
    seen: list[list[str]] = []

    def write(prompts: Prompts) -> Completions:
        shown = zip(prompts.tokens, prompts.mask, strict=True)
        seen.append([tokenizer.decode(t[m].tolist()) for t, m in shown])
        said = torch.tensor([*tokenizer(texts[next(turn) % len(texts)])["input_ids"], END])
        count, width = prompts.tokens.shape
        pad = torch.nn.functional.pad
        return Completions(
            tokens=torch.cat([prompts.tokens, said.expand(count, -1)], 1),
            prompt_mask=pad(prompts.mask, (0, len(said)), value=False),
            completion_mask=pad(torch.zeros_like(prompts.mask), (0, len(said)), value=True),
            logp=torch.zeros(count, width + len(said)),
            group=torch.arange(count),
            finished=torch.ones(count, dtype=torch.bool),
        )

    write.seen = seen  # type: ignore[attr-defined]
    return write


def text_of(turns: Turns, row: int) -> tuple[str, str, str]:
    """What was seen, said and seen next."""
    start, end = int(turns.prompt_length[row]), int(turns.length[row])
    tokens, following = turns.tokens[row], turns.next_tokens[row, : int(turns.next_length[row])]
    parts = (tokens[:start], tokens[start:end], following)
    return tuple(TOKENIZER.decode(part.tolist()) for part in parts)  # type: ignore[return-value]


def test_a_dialogue_as_lines() -> None:
    write = speaker(["a", "bc", "d"])
    played = games(here("Echo"))(write, [1, 2], 4)
    seen = ["start\n", "start\na\n[a]\n", "start\na\n[a]\nbc\n[bc]\n"]
    assert write.seen == [[text, text] for text in seen]
    turns = played.turns
    assert played.lengths == [3, 3] and len(turns) == 6 and played.shortened == 0
    assert text_of(turns, 0) == (seen[0], "a</s>", seen[1])
    assert text_of(turns, 1) == (seen[1], "bc</s>", seen[2])
    assert text_of(turns, 5)[:2] == (seen[2], "d</s>") and int(turns.next_length[5]) == 1
    assert turns.terminated.tolist() == [False, False, True] * 2
    assert not turns.truncated.any()
    total = turns.reward.view(2, 3).sum(1)
    torch.testing.assert_close(turns.episode_return, total.repeat_interleave(3))
    assert played.returns == pytest.approx(total.tolist())
    assert played.dialogues[0] == ["start", "a", "[a]", "bc", "[bc]", "d", "[d]"]


def test_a_dialogue_as_a_chat_and_as_the_last_observation_alone() -> None:
    write = speaker(["a", "b"])
    games(here("Echo"), history="chat", settings={"length": 2})(write, [1], 4)
    assert write.seen[1] == ["<user>start<assistant>a</s><user>[a]<assistant>"]
    write = speaker(["a", "b"])
    games(here("Echo"), history="observation", settings={"length": 2})(write, [1], 4)
    assert write.seen == [["start"], ["[a]"]]


def test_what_is_too_long_loses_its_beginning() -> None:
    write = speaker(["abcdef"])
    played = games(here("Echo"), max_length=24)(write, [1], 8)
    assert write.seen[1] == ["abcdef\n[abcdef]\n"]
    assert played.shortened == pytest.approx(2 / 3)
    assert int(played.turns.prompt_length.max()) == 16

    begin = TOKENIZER.bos_token_id
    reader = byte_tokenizer()
    plain = reader.__class__.__call__

    class Beginning(reader.__class__):
        def __call__(self, text: str, add_special_tokens: bool = True, **options: Any) -> Any:
            ids = plain(self, text, add_special_tokens=False)["input_ids"]
            return {"input_ids": [begin, *ids] if add_special_tokens else ids}

    reader.__class__ = Beginning
    ids, cut = games(here("Echo"), tokenizer=reader).prompt(["0123456789"], 4)
    assert cut and ids == [begin, *plain(reader, "89\n")["input_ids"]]


def test_an_episode_is_cut_after_its_turns() -> None:
    played = games(here("Echo"), settings={"length": 9}, max_turns=4)(speaker(["a"]), [1], 4)
    assert played.turns.truncated.tolist() == [False] * 3 + [True]
    assert not played.turns.terminated.any()
    assert text_of(played.turns, 3)[2].endswith("[a]\n"), "what follows a cut is kept"
    told = games(here("Echo"), settings={"kind": "cut"})(speaker(["a"]), [1], 4).turns
    assert told.truncated.tolist() == [False, False, True] and not told.terminated.any()


def test_an_episode_depends_on_its_seed_and_not_on_its_neighbours() -> None:
    """Though the game draws from generators that all copies, and everybody else, share."""
    play = games(here("Echo"))
    np.random.seed(0)
    together = play(speaker(["a"]), [11, 12, 13], 4)
    apart = [play(speaker(["a"]), [seed], 4).returns[0] for seed in (13, 11, 12)]
    assert together.returns == [apart[1], apart[2], apart[0]]
    assert len(set(together.returns)) == 3
    outside = np.random.rand()
    np.random.seed(0)
    assert outside == np.random.rand(), "what others draw is left alone"


def test_a_gymnasium_environment_will_do() -> None:
    write = speaker(["hello"])
    played = games(here("Gym"))(write, [5], 6)
    assert write.seen == [["seed 5\n"]] and played.returns == [1.5]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("obs", "observations must be text, got 7"),
        ("short", "step must return"),
        ("nan", "a reward must be a finite number, got nan"),
        ("text", "a reward must be a finite number, got 'much'"),
    ],
)
def test_a_broken_game_is_refused(what: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        games(here("Broken"), settings={"what": what})(speaker(["a"]), [1], 4)


def test_a_game_that_cannot_be_made_is_refused() -> None:
    with pytest.raises(UserError, match="game 'nowhere:Game' cannot be imported"):
        make_text_env("nowhere:Game", {})
    with pytest.raises(UserError, match=r"cannot be made.*--text.game-kwargs"):
        make_text_env(here("Echo"), {"size": 3})
    with pytest.raises(UserError, match="has no reset"):
        make_text_env("builtins:dict", {})
    with pytest.raises(UserError, match="max_new_tokens 200 leaves no room for a prompt"):
        games(here("Echo"))(speaker(["a"]), [1], 200)


def test_games_of_libraries() -> None:
    for source, library in (("textworld:x.z8", "textworld"), ("textarena:Hangman-v0", "textarena")):
        try:
            __import__(library)
        except ImportError:
            with pytest.raises(UserError, match=rf"{library}.*pip install"):
                make_text_env(source, {})


def test_textarena(tmp_path: Path) -> None:
    pytest.importorskip("textarena")
    source = "textarena:GuessTheNumber-v0"
    write = speaker(["10", "[5]", "3"])
    played = games(source, max_length=4000, max_turns=30)(write, [1, 1, 2], 8)
    assert "guess the number between 1 and 20" in write.seen[0][0]
    assert "The target number is" in write.seen[1][0] and "\n10\n" in write.seen[1][0]
    assert played.returns[0] == played.returns[1]
    with pytest.raises(UserError, match="no game for one player"):
        games("textarena:TicTacToe-v0")(write, [1], 8)
    with pytest.raises(UserError, match="cannot be made"):
        make_text_env("textarena:Nothing-v0", {})


def test_textworld() -> None:
    pytest.importorskip("textworld")
    with pytest.raises(UserError, match="there is no such file"):
        make_text_env("textworld:nowhere.z8", {})


# ---- what is kept


def turn(seen: Sequence[int], said: Sequence[int], reward: float = 0.0, **more: Any) -> Turn:
    fields = {"next_prompt": [9], "terminated": False, "truncated": False} | more
    return Turn(list(seen), list(said), reward, **fields)


TURNS = Turns.of([turn([5], [6, 7]), turn([5, 6, 7, 8], [4]), turn([3, 9], [8, 7, 6, 5])])


def test_the_views_of_a_turn() -> None:
    assert TURNS.tokens.tolist() == [[5, 6, 7, 0, 0, 0], [5, 6, 7, 8, 4, 0], [3, 9, 8, 7, 6, 5]]
    assert TURNS.said_mask.int().tolist() == [
        [0, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 1, 0],
        [0, 0, 1, 1, 1, 1],
    ]
    seen, mask = TURNS.seen()
    assert [t[m].tolist() for t, m in zip(seen, mask, strict=True)] == [[5], [5, 6, 7, 8], [3, 9]]
    assert seen.shape[1] == 4 and mask[:, 0].all()
    prompts, mask = TURNS.prompts()
    assert mask.int().tolist() == [[0, 0, 0, 1], [1, 1, 1, 1], [0, 0, 1, 1]]
    assert [t[m].tolist() for t, m in zip(prompts, mask, strict=True)] == [
        [5],
        [5, 6, 7, 8],
        [3, 9],
    ]
    said, mask = TURNS.said()
    assert [t[m].tolist() for t, m in zip(said, mask, strict=True)] == [[6, 7], [4], [8, 7, 6, 5]]
    assert said.shape[1] == 4 and mask[:, 0].all()


def test_other_answers_to_the_same_prompts() -> None:
    prompts, mask = TURNS.prompts()
    said = torch.tensor([[1, 0], [2, 3], [4, 0]])
    whole = torch.tensor([[True, False], [True, True], [True, False]])
    completions = Completions(
        tokens=torch.cat([prompts, said], 1),
        prompt_mask=torch.nn.functional.pad(mask, (0, 2), value=False),
        completion_mask=torch.nn.functional.pad(whole, (4, 0), value=False),
        logp=torch.zeros(3, 6),
        group=torch.arange(3),
        finished=whole[:, 0],
    )
    other = TURNS.answered(completions)
    rows = [t[m].tolist() for t, m in zip(other.tokens, other.token_mask, strict=True)]
    assert rows == [[5, 1], [5, 6, 7, 8, 2, 3], [3, 9, 4]]
    said, mask = other.said()
    assert [t[m].tolist() for t, m in zip(said, mask, strict=True)] == [[1], [2, 3], [4]]
    assert torch.equal(other.reward, TURNS.reward)


def numbered(first: int, count: int, last: bool = True) -> Turns:
    """One episode, its rewards counted on."""
    numbers = range(first, first + count)
    total = float(sum(numbers))
    return Turns.of(
        [
            turn([k + 1], [3] * (k % 3 + 1), k, terminated=k == numbers[-1], episode_return=total)
            for k in numbers
        ]
    )


def test_the_replay_keeps_the_last_turns() -> None:
    replay = TurnReplay(5, 8)
    replay.add(numbered(0, 3))
    assert replay.latest().reward.tolist() == [0, 1, 2]
    replay.add(numbered(3, 4))
    assert len(replay) == 5 and replay.num_added == 7
    assert replay.latest().reward.tolist() == [3, 4, 5, 6]
    torch.manual_seed(0)
    batch = replay.sample(400)
    assert set(batch.reward.tolist()) == {2, 3, 4, 5, 6}
    assert batch.tokens.shape[1] == int(batch.length.max()) == 4
    assert torch.equal(batch.tokens[:, 0], batch.reward.long() + 1)
    assert torch.equal(batch.length - batch.prompt_length, batch.reward.long() % 3 + 1)
    with pytest.raises(UserError, match="buffer_size 5 is less than the 6 turns"):
        replay.add(numbered(0, 6))


def test_the_best_episodes_are_drawn() -> None:
    replay = TurnReplay(100, 8)
    for first in range(10):  # Returns 3 first + 3, of three turns each.
        replay.add(numbered(first, 3))
    torch.manual_seed(0)
    returns = replay.sample_best(300, 0.1).episode_return
    assert set(returns.tolist()) == {30.0}
    assert set(replay.sample_best(300, 0.3).episode_return.tolist()) == {30.0, 27.0, 24.0}
    # A long episode counts once: of these two, the better tenth is the second.
    replay = TurnReplay(100, 40)
    replay.add(numbered(0, 30))
    replay.add(numbered(500, 1))
    assert set(replay.sample_best(50, 0.1).episode_return.tolist()) == {500.0}


def test_rows_go_to_files_and_back() -> None:
    one, two = TurnReplay(5, 8), TurnReplay(5, 8)
    one.add(numbered(0, 3))
    one.add(numbered(3, 4))
    start = one.num_added - len(one)
    for piece in one.rows(start, one.num_added):
        two.put_rows(start, piece)
        start += len(piece["reward"])
    two.load_state_dict(one.state_dict())
    drawn = []
    for replay in (one, two):
        torch.manual_seed(1)
        drawn.append(replay.sample(50).fields())
    assert drawn[0]["reward"].min() == 2
    for name, value in drawn[0].items():
        assert torch.equal(value, drawn[1][name]), name
    assert one.latest().reward.tolist() == two.latest().reward.tolist() == [3, 4, 5, 6]


ROWS = [
    {"observation": "hi", "action": "a", "reward": 1, "next_observation": "ho", "done": False},
    {"observation": "ho", "action": "bc", "reward": 2.5, "done": True},
    {"observation": "x", "action": "y", "reward": -1, "next_observation": "z", "terminated": False,
     "truncated": True},
]  # fmt: skip


def read(rows: list[dict[str, Any]], **options: Any) -> Turns:
    options = {"name": "log", "columns": {}, "max_length": 50} | options
    return read_turns(rows, TOKENIZER, **options)


def test_logged_turns_are_read() -> None:
    turns = read(ROWS)
    assert [text_of(turns, k)[:2] for k in range(3)] == [
        ("hi", "a</s>"), ("ho", "bc</s>"), ("x", "y</s>"),
    ]  # fmt: skip
    assert text_of(turns, 0)[2] == "ho" and text_of(turns, 2)[2] == "z"
    assert turns.reward.tolist() == [1, 2.5, -1]
    assert turns.episode_return.tolist() == [3.5, 3.5, -1]
    assert turns.terminated.tolist() == [False, True, False]
    assert turns.truncated.tolist() == [False, False, True]
    renamed = read([{**ROWS[1], "utterance": "bc"}], columns={"action": "utterance"})
    assert text_of(renamed, 0)[1] == "bc</s>"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (ROWS[:1], "log: the last row does not end its episode"),
        ([{**ROWS[1], "reward": None}], "log, row 0 has no column 'reward'"),
        ([{**ROWS[1], "reward": float("inf")}], "log, row 0: a reward must be a finite number"),
        ([{**ROWS[1], "action": " "}], "log, row 0: the completion is empty"),
        ([{**ROWS[1], "action": "x" * 60}], "log, row 0 has 63 tokens, and 50 fit"),
        ([{**ROWS[0], "next_observation": "x" * 60}, ROWS[1]], "next_observation has 60 tokens"),
        ([{"observation": "a", "action": "b", "reward": 0}], "no column 'terminated'"),
    ],
)
def test_logged_turns_that_do_not_fit_are_refused(rows: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(rows)


# ---- the loop


class Recorder:
    """Remembers what the loop hands to it."""

    num_episodes = 3
    decoding = SimpleNamespace(max_new_tokens=4)

    def __init__(self) -> None:
        self.drawn: list[float] = []
        self.updates: list[tuple[int, int, float]] = []
        self._write = speaker(["a"])

    def propose(self, prompts: Prompts, step: int) -> Completions:
        self.drawn.append(float(torch.rand(())))
        return self._write(prompts)

    def update(self, replay: TurnReplay, step: int) -> dict[str, torch.Tensor]:
        self.updates.append((step, replay.num_added, float(torch.rand(()))))
        return {"x": torch.tensor(float(step))}


def looped(steps: int, state: LoopState, replay: TurnReplay, seeds: list[int]) -> Any:
    method, play = Recorder(), games(here("Echo"))

    def noting(write: Any, found: Sequence[int], room: int) -> Any:
        seeds.extend(found)
        assert room == 4
        return play(write, found, room)

    done = list(converse(method, noting, replay, state, seed=5, steps=steps))  # type: ignore[arg-type]
    return method, done


def test_the_loop_depends_on_seed_and_step_alone() -> None:
    state, replay, seeds = LoopState(torch.zeros(0)), TurnReplay(100, 64), []
    method, done = looped(4, state, replay, seeds)
    assert [p.step for p in done] == [1, 2, 3, 4] and state.num_updates == 4
    assert [u[:2] for u in method.updates] == [(0, 9), (1, 18), (2, 27), (3, 36)]
    assert seeds == [mix(5, step, Phase.RESET, k) for step in (1, 2, 3, 4) for k in range(3)]
    assert len(set(method.drawn)) == 12
    assert [len(p.episodes) for p in done] == [3] * 4 and done[0].episodes[0][1] == 3
    later, replay_2 = LoopState(torch.zeros(0)), TurnReplay(100, 64)
    first, _ = looped(2, later, replay_2, [])
    torch.rand(7)
    second, rest = looped(4, later, replay_2, [])
    assert first.drawn + second.drawn == method.drawn
    assert first.updates + second.updates == method.updates
    assert [p.episodes for p in rest] == [p.episodes for p in done[2:]]


def test_without_episodes_it_learns_from_what_is_there() -> None:
    replay = TurnReplay(100, 64)
    replay.add(numbered(0, 3))
    method = Recorder()
    method.num_episodes = 0
    state = LoopState(torch.zeros(0))
    (progress,) = converse(method, None, replay, state, seed=0, steps=1)  # type: ignore[arg-type]
    assert progress.episodes == [] and method.updates[0][:2] == (0, 3)


# ---- what an experiment says of its game


def experiment(**text: Any) -> esscher.Experiment:
    from esscher.registry import recipes

    found = recipes("archer")["smoke"]()
    stage = found.stages[-1]
    return replace(found, stages=(replace(stage, text=replace(stage.text, **text)),))


def test_a_game_is_needed_and_only_where_one_talks() -> None:
    from esscher.registry import recipes

    with pytest.raises(UserError, match="archer talks with a game: give --text.game"):
        experiment(game=None).resolved()
    sft = recipes("sft")["smoke"]()
    stage = replace(sft.stages[-1], text=replace(sft.stages[-1].text, game="a:b"))
    with pytest.raises(UserError, match="sft writes one completion of each prompt: leave out"):
        replace(sft, stages=(stage,)).resolved()
    with pytest.raises(UserError, match="text.max_turns must be >= 1"):
        experiment(max_turns=0)
    assert experiment().subject == "esscher.text_envs:Doors"
    assert json.loads(json.dumps(experiment().to_json()))["stages"][0]["text"]["history"]


def test_the_tokenizer_of_a_game_keeps_its_lines() -> None:
    reader = character_tokenizer("a\n")
    assert reader.decode(reader("a\na")["input_ids"]) == "a\na"
