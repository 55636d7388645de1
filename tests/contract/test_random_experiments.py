"""Experiments with settings at random: each is an experiment, or is refused in one clear sentence."""

import json
import os
import random
import re
from pathlib import Path
from typing import Any

import pytest
from random_experiments import changed, known_settings

import esscher
from esscher.errors import UserError
from esscher.registry import catalogue
from support import parts_after, smoke

SLUGS = list(catalogue())
COUNT = int(os.environ.get("ESSCHER_RANDOM_EXPERIMENTS", "500"))
"""More for those who search; each has a number of its own, so that fewer are a part of more."""


def experiment_of(data: Any) -> esscher.Experiment:
    return esscher.Experiment.from_json(json.loads(json.dumps(data)))


def is_clear(sentence: str, slug: str) -> bool:
    """One line that names a setting or a flag, or says how to name what is the user's own."""
    names = {str(path[-1]) for part in known_settings(slug) for path, _ in part}
    words = set(re.findall(r"\w+", sentence.replace("-", "_")))
    return "\n" not in sentence and bool(
        names & words or re.search(r"--\w+|module:function", sentence)
    )


@pytest.mark.filterwarnings("ignore:runtime.precision is bfloat16")
def test_random_experiments_survive_or_are_refused_by_name() -> None:
    refused = 0
    smokes = {slug: smoke(slug) for slug in SLUGS}
    for number in range(COUNT):
        slug = SLUGS[number % len(SLUGS)]
        data, names = changed(smokes[slug], random.Random(number))
        try:
            resolved = experiment_of(data).resolved()
            assert resolved.resolved() == resolved
            assert experiment_of(resolved.to_json()) == resolved
        except UserError as error:
            refused += 1
            assert is_clear(str(error), slug), (number, slug, names, str(error))
        except Exception as error:
            raise AssertionError(f"{number}, {slug} with {names}: {error!r}") from error
    assert COUNT / 4 < refused < 3 * COUNT / 4, "both kinds must be among them"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("slug", SLUGS)
def test_what_is_an_experiment_runs_or_is_refused(
    slug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For two updates; the first experiment of those drawn for a method that is one."""
    monkeypatch.chdir(tmp_path)  # Figures and the like.
    before, draw = smoke(slug), random.Random(slug)
    experiment = before
    while experiment.method == before.method or experiment.runtime.graph == "compile":
        try:
            experiment = experiment_of(changed(before, draw, few=2, largest=3)[0]).resolved()
        except UserError:
            continue
    try:
        parts_after(experiment, 2).close()
    except UserError as error:
        assert is_clear(str(error), slug), str(error)


def not_a_pair() -> Any:
    return 3


@pytest.mark.parametrize(
    ("slug", "model", "message"),
    [
        ("sft", {"kwargs": {"key": 1}}, "cannot be called so: .*unexpected keyword argument 'key'"),
        (
            "ddpm",
            {"kwargs": {"key": 1}},
            "cannot be called so: .*unexpected keyword argument 'key'",
        ),
        ("sft", {"source": f"{__name__}:not_a_pair", "kwargs": {}}, "a model and its tokenizer"),
    ],
)
def test_functions_of_the_user_that_do_not_fit(slug: str, model: Any, message: str) -> None:
    data = smoke(slug).to_json()
    data["stages"][0]["model"].update(model)
    with pytest.raises(UserError, match=message):
        parts_after(experiment_of(data), 1)
