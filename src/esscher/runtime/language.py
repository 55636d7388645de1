"""The world of language models: a model, rows of text, a reward where completions are judged."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from esscher.adapters.models import load_model, save_model
from esscher.adapters.pretrained import digest_of
from esscher.adapters.rewards import RewardJudge, made_prompts
from esscher.adapters.text import read_rows, read_text
from esscher.adapters.text_envs import TextGames, read_turns
from esscher.distributions.autoregressive import LanguageModel, TextSpec
from esscher.experience.text import (
    Text,
    collate_demonstrations,
    collate_pairs,
    collate_prompts,
)
from esscher.experiment import Experiment, TextConfig
from esscher.loops.converse import converse
from esscher.loops.generate import generate
from esscher.loops.offline import offline
from esscher.loops.online import LoopState, Progress
from esscher.nn.sharding import whole_on_cpu
from esscher.registry import load_method
from esscher.runtime.checkpoint import require_unchanged
from esscher.runtime.device import Runtime
from esscher.runtime.evaluate import Evaluation
from esscher.runtime.rng import Phase, mix, numpy_generator, seed_phase
from esscher.runtime.state import State, under
from esscher.samplers.decoding import Decoding
from esscher.types import Completions, Prompts

SAMPLES_SHOWN = 16
"""Completions that an evaluation keeps for the report."""

JUDGED_AT_ONCE = 32
"""Rows in one pass of an evaluation."""

COLLATE: dict[str, Any] = {
    "pairs": collate_pairs,
    "demonstrations": collate_demonstrations,
    "prompts": collate_prompts,
}


class LanguageWorld:
    """A model with its tokenizer, rows to learn from, rows held out, and a reward if there is one.

    Args:
        experiment: its last stage is used.
        runtime: where to put the model.
        with_text: read the rows; without them the world only serves to open a finished run.
    """

    inexact_because: str | None = None
    judged_before: bool = True

    def __init__(self, experiment: Experiment, runtime: Runtime, *, with_text: bool = True):
        self.experiment, self.runtime = experiment, runtime
        self.stage, self.method_class = experiment.stages[-1], load_method(experiment.slug)
        self.kind = self.method_class.loop
        seed_phase(experiment.seed, 0, Phase.INITIALISE)  # For models that are made, not read.
        model, tokenizer = load_model(self.stage.model, runtime.reading_device)
        if runtime.config.precision == "float32":
            model.frozen_dtype = torch.float32  # A reference is the model that training began with.
        self.digest = digest_of(model)
        self.spec = TextSpec(
            model=model, tokenizer=tokenizer, max_length=_fitting(self.stage.text, model)
        )
        self.judge: RewardJudge | None = None
        self.games: TextGames | None = None
        if with_text and self.kind == "converse":
            self.text = self._logged_turns()
            self.games, self.judged_games = self._new_games(), self._new_games()
        elif with_text:
            self.text = self._read()
            if self.method_class.rows == "prompts":
                self.judge = self._judge(self.text.rows, experiment.seed)

    def experience(self, method: Any) -> Any:
        return method.experience(self.text)

    def begin(self) -> torch.Tensor:
        return torch.zeros(0)

    def iterations(
        self, method: Any, experience: Any, state: LoopState, barrier_every: int
    ) -> Iterator[Progress]:
        limits = {"seed": self.experiment.seed, "steps": self.stage.steps}
        if self.games is not None:
            return converse(method, self.games, experience, state, **limits)
        if self.kind == "generate":
            assert self.judge is not None
            return generate(method, experience, self.judge, state, **limits)
        return offline(method, experience, state, **limits)

    def evaluate(self, method: Any, step: int) -> Evaluation:
        """Judge the model on rows held out, and let it write; or by whole episodes of its game."""
        if self.games is not None:
            return self._played(method)
        held_out = self.text.held_out or self.text.train
        rows = self.text.held_out_rows if self.text.held_out else self.text.rows
        count = min(self.experiment.evaluation.episodes, len(held_out))
        policy = method.policy
        policy.eval()
        try:
            with torch.no_grad():
                if self.method_class.rows == "prompts":
                    return self._rewarded(method, held_out[:count], rows[:count])
                return self._judged(method, held_out[:count])
        finally:
            policy.train()

    def pictures(self) -> dict[str, Any]:
        return {}

    def score(self, evaluation: Evaluation) -> float | None:
        return None

    def describe(self) -> dict[str, Any]:
        return {"model": self.stage.model.source, "digest": self.digest}

    def check(self, described: Mapping[str, Any]) -> None:
        """Raise unless the model is still the one that a run began with.

        Raises:
            UserError: its weights have changed.
        """
        what = f"the model {self.stage.model.source}"
        require_unchanged(what, "has other weights", described["digest"], self.digest)

    def state_dict(self) -> State:
        return {}

    def load_state_dict(self, state: State, step: int) -> None:
        assert not state

    def finish(self, method: Any, folder: Path) -> None:
        first = self.runtime.rank == 0
        state = None
        if self.runtime.sharding is not None:  # All processes give their parts.
            state = whole_on_cpu(under("model", method.policy.state_dict()), keep=first)
        if first:
            save_model(method.policy, self.spec.tokenizer, folder / "model", state=state)

    def close(self) -> None:
        if self.judge is not None:
            self.judge.close()
        if self.games is not None:
            self.games.close()
            self.judged_games.close()

    def _new_games(self) -> TextGames:
        config = self.stage.text
        assert config.game is not None
        return TextGames(
            config.game,
            config.game_kwargs,
            self.spec.tokenizer,
            max_length=self.spec.max_length,
            max_turns=config.max_turns,
            history=config.history,
            pad_token=self.spec.model.pad_token,
            device=self.runtime.device,
        )

    def _logged_turns(self) -> Any:
        data, config = self.stage.data, self.stage.text
        if data is None:
            return None
        return read_turns(
            read_rows(data, split=config.split),
            self.spec.tokenizer,
            name=Path(data).name,
            columns=config.columns,
            max_length=self.spec.max_length,
        )

    def _played(self, method: Any) -> Evaluation:
        """Episodes of the game from fixed seeds."""
        config, seed = self.experiment.evaluation, self.experiment.seed
        decoding, turn = method.decoding, itertools.count()
        if config.deterministic:
            decoding = replace(decoding, temperature=0.0)

        def write(prompts: Prompts) -> Completions:
            number = next(turn)
            rows = prompts.row.tolist()
            seeds = [mix(seed, 0, Phase.EVALUATE, row, number) for row in rows]
            return method.write(prompts.tokens, prompts.mask, seeds, decoding)

        starts = [mix(seed, 0, Phase.EVALUATE, row) for row in range(config.episodes)]
        method.policy.eval()
        try:
            played = self.judged_games(write, starts, decoding.max_new_tokens)
        finally:
            method.policy.train()
        shown = zip(played.dialogues[:SAMPLES_SHOWN], played.returns, strict=False)
        samples = [
            {"prompt": texts[0], "completion": "\n".join(texts[1:]), "reward": total}
            for texts, total in shown
        ]
        extras = {"shortened_prompts": played.shortened}
        return Evaluation(played.returns, played.lengths, "return", extras, samples)

    def _read(self) -> Text[Any]:
        stage, seed, kind = self.stage, self.experiment.seed, self.method_class.rows
        config, tokenizer = stage.text, self.spec.tokenizer
        options = {
            "columns": config.columns,
            "max_length": self.spec.max_length,
            "too_long": config.too_long,
        }
        if config.task is not None:
            name = config.task
            rows = made_prompts(config.task, config.task_size, mix(seed, 0))
        else:
            assert stage.data is not None
            name = Path(stage.data).name
            rows = read_rows(stage.data, split=config.split)
        items, rows = read_text(kind, rows, tokenizer, name=name, **options)
        text = Text(
            name=name,
            train=items,
            held_out=(),
            pad_token=self.spec.model.pad_token,
            seed=seed,
            rank=self.runtime.rank,
            world=self.runtime.world,
            rows=rows,
        )
        if config.held_out is not None:
            other = read_rows(config.held_out, split=config.split)
            place = Path(config.held_out).name
            items, rows = read_text(kind, other, tokenizer, name=place, **options)
            return replace(text, held_out=items, held_out_rows=rows)
        return _split(text, config.held_out_share)

    def _judge(self, rows: Sequence[Any], seed: int) -> RewardJudge:
        config = self.stage.text
        return RewardJudge(
            config.reward or config.task,
            rows,
            self.spec.tokenizer,
            seconds=config.reward_seconds,
            needed_by=self.experiment.slug,
        )

    def _judged(self, method: Any, items: Sequence[Any]) -> Evaluation:
        """What the method itself says of rows held out, and completions of their prompts."""
        found: dict[str, list[float]] = {}
        lengths: list[int] = []
        device, pad = self.runtime.device, self.spec.model.pad_token
        for start in range(0, len(items), JUDGED_AT_ONCE):
            part = items[start : start + JUDGED_AT_ONCE]
            batch = COLLATE[self.method_class.rows](range(len(part)), part, pad).to(device)
            for name, values in method.judge(batch).items():
                found.setdefault(name, []).extend(values.double().tolist())
            lengths += [len(item[0] if isinstance(item, tuple) else item) for item in part]
        prompts = [(item[0] if isinstance(item, tuple) else item).prompt for item in items]
        completions, _ = self._write(method, prompts[:SAMPLES_SHOWN])
        (measure, returns), *others = found.items()
        return Evaluation(
            returns,
            lengths,
            measure.replace("_", " "),
            {f"{name}_mean": sum(values) / len(values) for name, values in others}
            | self._divergence(method, completions),
            self._shown(completions),
        )

    def _rewarded(self, method: Any, prompts: Sequence[Any], rows: Sequence[Any]) -> Evaluation:
        """The reward of one completion of each prompt held out."""
        completions, batch = self._write(method, prompts)
        assert self.judge is not None
        scored = self.judge(completions, batch, rows)
        lengths = completions.completion_mask.sum(-1).tolist()
        parts = {
            f"{name}_mean": float(values[scored.valid].mean())
            for name, values in scored.parts.items()
            if bool(scored.valid.any())
        }
        extras = {
            "failed_rewards": float((~scored.valid).float().mean()),
            "finished": float(completions.finished.float().mean()),
            **parts,
            **self._divergence(method, completions),
        }
        samples = self._shown(completions)
        for sample, reward in zip(samples, scored.reward.tolist(), strict=False):
            sample["reward"] = reward
        return Evaluation(scored.reward.tolist(), lengths, "reward", extras, samples)

    def _write(self, method: Any, prompts: Sequence[list[int]]) -> tuple[Completions, Prompts]:
        device, seed = self.runtime.device, self.experiment.seed
        decoding = getattr(method, "decoding", Decoding(max_new_tokens=64))
        if self.experiment.evaluation.deterministic and self.method_class.rows == "prompts":
            decoding = replace(decoding, temperature=0.0)
        longest = max(map(len, prompts))
        limit = self.spec.model.context_length
        if limit is not None and longest + decoding.max_new_tokens > limit:
            decoding = replace(decoding, max_new_tokens=max(1, limit - longest))
        batch = collate_prompts(range(len(prompts)), prompts, self.spec.model.pad_token)
        batch = batch.to(device)
        seeds = [mix(seed, 0, Phase.EVALUATE, number) for number in range(len(prompts))]
        write = getattr(method, "write", method.policy.generate)
        return write(batch.tokens, batch.mask, seeds, decoding), batch

    def _divergence(self, method: Any, completions: Completions) -> dict[str, float]:
        """KL to the model of before, nats a completion, estimated on these; and how varied they are."""
        told = _variety(completions)
        reference: LanguageModel | None = getattr(method, "_reference", None)
        if reference is None:
            return told
        where = (completions.tokens, completions.token_mask, completions.completion_mask)
        difference = method.policy.log_prob(*where) - reference.log_prob(*where)
        return told | {"kl_to_reference": float(difference.sum(-1).mean())}

    def _shown(self, completions: Completions) -> list[dict[str, Any]]:
        decode = self.spec.tokenizer.decode
        shown = []
        for row in range(min(SAMPLES_SHOWN, len(completions.tokens))):
            tokens = completions.tokens[row]
            asked, written = completions.prompt_mask[row], completions.completion_mask[row]
            shown.append(
                {
                    "prompt": decode(tokens[asked].tolist(), skip_special_tokens=True),
                    "completion": decode(tokens[written].tolist(), skip_special_tokens=True),
                    "finished": bool(completions.finished[row]),
                }
            )
        return shown


def _fitting(config: TextConfig, model: LanguageModel) -> int:
    limit = model.context_length
    return config.max_length if limit is None else min(config.max_length, limit)


def _split(text: Text[Any], share: float) -> Text[Any]:
    """Keep a share of the rows out of training, at least one where any is asked for."""
    total = len(text.train)
    count = min(max(1, round(total * share)), total - 1) if share > 0 else 0
    if count == 0:
        return text
    order = numpy_generator(text.seed, -1, Phase.ORDER).permutation(total)
    kept, out = sorted(order[count:].tolist()), sorted(order[:count].tolist())
    return replace(
        text,
        train=[text.train[row] for row in kept],
        rows=[text.rows[row] for row in kept],
        held_out=[text.train[row] for row in out],
        held_out_rows=[text.rows[row] for row in out],
    )


def _variety(completions: Completions) -> dict[str, float]:
    """Share of distinct single tokens and pairs of them among all that were written."""
    words = [
        tokens[mask].tolist()
        for tokens, mask in zip(completions.tokens, completions.completion_mask, strict=True)
    ]
    told = {}
    for size in (1, 2):
        grams = [tuple(w[k : k + size]) for w in words for k in range(len(w) - size + 1)]
        told[f"distinct_{size}"] = len(set(grams)) / max(len(grams), 1)
    return told
