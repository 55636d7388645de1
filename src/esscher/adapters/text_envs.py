"""Games of several turns that a language model plays by writing.

| name | what it is |
|---|---|
| module:function | your own: called with the game's settings, it returns an environment |
| textworld:FILE | a game of TextWorld or of interactive fiction (.z8, .z5, .ulx, ...) |
| textarena:NAME | a game of TextArena for one player |

An environment has two methods; a gymnasium.Env whose observations and actions are strings will do.

    reset(seed) -> observation
    step(action) -> (observation, reward, terminated, truncated)

An observation is a string: the whole state (--text.history observation), or what is new (then the
model is shown the dialogue so far). All that is random must follow from the seed of the reset. The
global generators of Python and NumPy may be used for it: each copy of a game finds them as it left
them. `terminated` is an end that belongs to the game, a limit of turns that it states included;
`truncated` is a mere interruption.
"""

import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from esscher.adapters.imports import needed, users_own
from esscher.adapters.text import Row, encode, encode_prompt, pick
from esscher.errors import UserError
from esscher.experience.text import collate_prompts
from esscher.experience.turns import Played, Turn, Turns
from esscher.types import Completions, Prompts

# Other people's games draw from these. Imported by name, because nothing else here may.
GLOBAL_RANDOM = [importlib.import_module(name) for name in ("random", "numpy.random")]


class TextEnv(Protocol):
    """A game; see the module."""

    def reset(self, seed: int) -> str: ...

    def step(self, action: str) -> tuple[str, float, bool, bool]: ...


class TextGames:
    """Copies of a game, played together so that the model writes in batches.

    Args:
        source: see the module.
        settings: of the game.
        tokenizer: turns texts into tokens, and back.
        max_length: most tokens of what is seen and said together; what is seen loses its beginning.
        max_turns: a longer episode is cut.
        history: what the model is shown: the last observation, or the dialogue so far as lines or
            as a chat.
        pad_token: fills up prompts.
        device: where prompts go.

    Raises:
        UserError: no such game, or its library is not installed.
    """

    def __init__(
        self,
        source: str,
        settings: Mapping[str, Any],
        tokenizer: Any,
        *,
        max_length: int,
        max_turns: int,
        history: str,
        pad_token: int,
        device: torch.device,
    ):
        self._source, self._settings, self._tokenizer = source, settings, tokenizer
        self._max_length, self._max_turns, self._history = max_length, max_turns, history
        self._pad_token, self._device = pad_token, device
        self._copies = [self._make()]

    def __call__(
        self, write: Callable[[Prompts], Completions], seeds: Sequence[int], room: int
    ) -> Played:
        """Play an episode from each seed.

        Args:
            write: utterances for prompts, one each; `row` says which episode a prompt belongs to.
            seeds: of the resets.
            room: most tokens of an utterance.

        Raises:
            UserError: the game returns something else than it should.
        """
        limit = self._max_length - room
        if limit < 1:
            raise UserError(
                f"max_new_tokens {room} leaves no room for a prompt: {self._max_length} tokens fit "
                "(--text.max-length, or the model's context)"
            )
        while len(self._copies) < len(seeds):
            self._copies.append(self._make())
        episodes = [
            _Episode(copy, self, seed, limit)
            for copy, seed in zip(self._copies, seeds, strict=False)
        ]
        running = list(range(len(seeds)))
        for _ in range(self._max_turns):
            prompts = collate_prompts(
                running, [episodes[number].prompt for number in running], self._pad_token
            )
            completions = write(prompts.to(self._device))
            tokens, masks = completions.tokens.cpu(), completions.completion_mask.cpu()
            for number, said, mask in zip(running, tokens, masks, strict=True):
                episodes[number].say(said[mask].tolist())
            running = [number for number in running if not episodes[number].over]
            if not running:
                break
        for number in running:
            episodes[number].cut()
        return Played(
            turns=Turns.of([turn for episode in episodes for turn in episode.turns]),
            returns=[episode.total for episode in episodes],
            lengths=[len(episode.turns) for episode in episodes],
            dialogues=[episode.dialogue for episode in episodes],
            shortened=sum(e.num_shortened for e in episodes) / sum(len(e.turns) for e in episodes),
        )

    def close(self) -> None:
        for copy in self._copies:
            copy.close()

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True).strip()

    def prompt(self, dialogue: Sequence[str], limit: int) -> tuple[list[int], bool]:
        """What the model is shown after observations and utterances in turn; whether it was cut."""
        seen: str | list[dict[str, str]]
        if self._history == "observation":
            seen = dialogue[-1]
        elif self._history == "chat":
            roles = ("user", "assistant")
            seen = [{"role": roles[k % 2], "content": text} for k, text in enumerate(dialogue)]
        else:
            seen = "".join(f"{text}\n" for text in dialogue)
        ids = encode_prompt(self._tokenizer, seen, f"{self._source}: an observation")
        if len(ids) <= limit:
            return ids, False
        first = ids[:1] if ids[0] == self._tokenizer.bos_token_id else []
        return first + ids[len(ids) - limit + len(first) :], True

    def _make(self) -> "_Copy":
        return _Copy(self._source, make_text_env(self._source, self._settings))


def make_text_env(source: str, settings: Mapping[str, Any]) -> Any:
    """The environment of a name; see the module.

    Raises:
        UserError: no such game, or its library is not installed.
    """
    kind, _, name = source.partition(":")
    if kind == "textworld":
        return TextWorld(name, settings)
    if kind == "textarena":
        return TextArena(name, settings)
    make = users_own(source, "game")
    try:
        env = make(**settings)
    except TypeError as error:
        raise UserError(f"game {source} cannot be made: {error} (--text.game-kwargs)") from error
    for method in ("reset", "step"):
        if not callable(getattr(env, method, None)):
            raise UserError(f"game {source} made a {type(env).__name__}, which has no {method}")
    return env


def read_turns(
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    name: str,
    columns: Mapping[str, str],
    max_length: int,
) -> Turns:
    """Logged turns, those of an episode one after the other.

    Columns observation, action, reward, next_observation and done, or terminated and truncated;
    observations are text or chats, as the model is to be shown them.

    Raises:
        UserError: which row, and what is wrong with it.
    """
    turns: list[Turn] = []
    episode: list[Turn] = []
    for number, row in enumerate(rows):
        place = f"{name}, row {number}"
        told = [pick(row, column, columns, place) for column in ("observation", "action", "reward")]
        text, action, reward = told
        said = encode(tokenizer, text, action, place)
        if len(said) > max_length:
            raise UserError(
                f"{place} has {len(said)} tokens, and {max_length} fit: raise --text.max-length"
            )
        terminated, truncated = _ends(row, columns, place)
        following = [] if terminated else _following(row, tokenizer, columns, place, max_length)
        reward = _number(reward, place)
        episode.append(Turn(said.prompt, said.completion, reward, following, terminated, truncated))
        if terminated or truncated:
            turns += _with_returns(episode)
            episode = []
    if episode:
        raise UserError(f"{name}: the last row does not end its episode: set done, or truncated")
    return Turns.of(turns)


class TextWorld:
    """A game file of TextWorld, or of interactive fiction; its points are the rewards."""

    def __init__(self, path: str, settings: Mapping[str, Any]):
        library: Any = needed("textworld", f"textworld:{path}", "language")
        if settings:
            raise UserError(f"textworld:{path} has no settings, got {sorted(settings)}")
        file = Path(path).expanduser()
        if not file.is_file():
            raise UserError(f"textworld:{path}: there is no such file")
        try:
            self._env = library.start(str(file), library.EnvInfos(feedback=True))
        except Exception as error:
            raise UserError(f"textworld:{path} cannot be opened: {error}") from error
        self._score = 0.0

    def reset(self, seed: int) -> str:
        self._env.seed(seed)
        self._score = 0.0
        return _tidied(self._env.reset().feedback)

    def step(self, action: str) -> tuple[str, float, bool, bool]:
        state, score, done = self._env.step(action)
        reward, self._score = score - self._score, score
        return _tidied(state.feedback), reward, done, False

    def close(self) -> None:
        self._env.close()


class TextArena:
    """A game of TextArena for one player; its reward comes at the end."""

    def __init__(self, name: str, settings: Mapping[str, Any]):
        library: Any = needed("textarena", f"textarena:{name}", "language")
        self._name = name
        try:
            # Raw: the dialogue so far is kept by us.
            raw = library.make(name if name.endswith("-raw") else f"{name}-raw", **settings)
        except (ValueError, ImportError, TypeError) as error:
            raise UserError(f"textarena:{name} cannot be made: {error}") from error
        self._env = library.wrappers.ActionFormattingWrapper(raw)
        self._game = library.GAME_ID

    def reset(self, seed: int) -> str:
        try:
            self._env.reset(num_players=1, seed=seed)
        except AssertionError as error:
            raise UserError(f"textarena:{self._name} is no game for one player: {error}") from error
        return self._news()

    def step(self, action: str) -> tuple[str, float, bool, bool]:
        done, _ = self._env.step(action)
        reward = float(self._env.close()[0][0]) if done else 0.0
        return self._news(), reward, bool(done), False

    def _news(self) -> str:
        _, messages = self._env.get_observation()
        return "\n".join(text for sender, text, _ in messages if sender == self._game)


class _Copy:
    """One environment, whose answers are checked, with global generators of its own."""

    def __init__(self, source: str, env: Any):
        self._source, self._env = source, env
        self._states: list[Any] | None = None

    def reset(self, seed: int) -> str:
        self._states = None
        with self._own_random():
            for module in GLOBAL_RANDOM:
                module.seed(seed % 2**32)
            obs = self._env.reset(seed=seed)
        return self._text(obs[0] if isinstance(obs, tuple) else obs)

    def step(self, action: str) -> tuple[str, float, bool, bool]:
        with self._own_random():
            told = self._env.step(action)
        if not isinstance(told, tuple) or len(told) not in (4, 5):
            raise UserError(
                f"game {self._source}: step must return (observation, reward, terminated, "
                f"truncated), got {told!r:.80}"
            )
        obs, reward, terminated, truncated = told[:4]
        number = _number(reward, f"game {self._source}")
        return self._text(obs), number, bool(terminated), bool(truncated)

    def close(self) -> None:
        close = getattr(self._env, "close", None)
        if callable(close):
            close()

    def _text(self, obs: Any) -> str:
        if not isinstance(obs, str):
            raise UserError(f"game {self._source}: observations must be text, got {obs!r:.80}")
        return obs

    @contextmanager
    def _own_random(self) -> Iterator[None]:
        get, put = zip(*map(_state_of, GLOBAL_RANDOM), strict=True)
        outside = [read() for read in get]
        if self._states is not None:
            for write, state in zip(put, self._states, strict=True):
                write(state)
        try:
            yield
        finally:
            self._states = [read() for read in get]
            for write, state in zip(put, outside, strict=True):
                write(state)


class _Episode:
    """A dialogue with one copy of the game."""

    def __init__(self, copy: _Copy, games: TextGames, seed: int, limit: int):
        self._copy, self._games, self._limit = copy, games, limit
        self.dialogue = [copy.reset(seed)]
        self.turns: list[Turn] = []
        self.over = False
        self.num_shortened = 0
        self.prompt = self._look()

    @property
    def total(self) -> float:
        return sum(turn.reward for turn in self.turns)

    def say(self, tokens: list[int]) -> None:
        """Hand an utterance to the game, and take in what it answers."""
        seen, text = self.prompt, self._games.decode(tokens)
        obs, reward, terminated, truncated = self._copy.step(text)
        self.dialogue += [text, obs]
        self.over = terminated or truncated
        if not terminated:
            self.prompt = self._look()
        following = [] if terminated else self.prompt
        self.turns.append(Turn(seen, tokens, reward, following, terminated, truncated))
        if self.over:
            self.turns = _with_returns(self.turns)

    def cut(self) -> None:
        """End the episode where it is."""
        self.turns[-1] = self.turns[-1]._replace(truncated=True)
        self.turns = _with_returns(self.turns)

    def _look(self) -> list[int]:
        prompt, shortened = self._games.prompt(self.dialogue, self._limit)
        self.num_shortened += shortened
        return prompt


def _state_of(module: Any) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    if hasattr(module, "getstate"):
        return module.getstate, module.setstate
    return module.get_state, module.set_state


def _with_returns(turns: Sequence[Turn]) -> list[Turn]:
    total = sum(turn.reward for turn in turns)
    return [turn._replace(episode_return=total) for turn in turns]


def _tidied(feedback: str) -> str:
    """Without the prompt and the status line, the logo, and blank lines."""
    lines = feedback.rsplit("\n>", 1)[0].splitlines()
    return "\n".join(line.strip() for line in lines if any(map(str.isalnum, line)))


def _number(reward: Any, place: str) -> float:
    try:
        number = float(reward)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{place}: a reward must be a finite number, got {reward!r:.80}")
    return number


def _ends(row: Row, columns: Mapping[str, str], place: str) -> tuple[bool, bool]:
    if columns.get("done", "done") in row:
        return bool(pick(row, "done", columns, place)), False
    return tuple(bool(pick(row, name, columns, place)) for name in ("terminated", "truncated"))  # type: ignore[return-value]


def _following(
    row: Row, tokenizer: Any, columns: Mapping[str, str], place: str, max_length: int
) -> list[int]:
    ids = encode_prompt(tokenizer, pick(row, "next_observation", columns, place), place)
    if len(ids) > max_length:
        raise UserError(
            f"{place}: next_observation has {len(ids)} tokens, and {max_length} fit: raise "
            "--text.max-length"
        )
    return ids
