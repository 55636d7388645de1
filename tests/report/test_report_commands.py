"""The commands at the foot of a page, given back to the command line."""

import json
import shlex
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from esscher.cli import many_runs, run_command
from esscher.experiment import EnvConfig, EvaluationConfig, Experiment, ModelConfig
from esscher.registry import catalogue, recipes
from esscher.report.commands import FOOTING, more_seeds
from esscher.report.runs import RunRecord, read_run
from esscher.runtime import sweep
from esscher.runtime.sweep import comparison


def recorded(folder: Path, experiment: Experiment) -> RunRecord:
    """A run folder of which nothing but the settings is there."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(experiment.resolved().to_json()))
    return read_run(folder)


def smoke(slug: str) -> Experiment:
    return recipes(slug)["smoke"]()


def understood(line: str, monkeypatch: pytest.MonkeyPatch) -> list[Experiment]:
    """The runs that a command would start."""
    taken: list[Experiment] = []

    def take(experiments: list[Experiment], *_: Any, **__: Any) -> list[Any]:
        taken.extend(experiments)
        return []

    monkeypatch.setattr(sweep, "sweep", take)
    program, *words = shlex.split(line)
    assert program == "esscher" and run_command(words) == 0, line
    return taken


def settings(experiment: Experiment) -> dict[str, Any]:
    """All that decides the numbers of a run but its seed, and the machine's own choices."""
    alike = replace(experiment, seed=0, label=None).resolved()
    runtime = replace(alike.runtime, threads=1)
    return replace(alike, runtime=runtime).to_json()


CHANGED = {
    "dragon": lambda e: replace(
        e,
        method=replace(e.method, beta=5.0, loss="kto", pairing="unpaired"),
        stages=(
            replace(
                e.stages[0],
                steps=6,
                model=replace(
                    e.stages[0].model,
                    kwargs={"radius": 2.0, "std": 1e-05, "deep": True, "shift": -1.5},
                ),
            ),
        ),
        log=replace(e.log, to=()),
    ),
    "b2_diffurl": lambda e: replace(
        e, stages=(replace(e.stages[0], image=replace(e.stages[0].image, labels=(3, 5))),)
    ),
    "sac": lambda e: replace(
        e,
        stages=(replace(e.stages[0], env=EnvConfig(id="Pendulum-v1", kwargs={"g": 9.0})),),
        evaluation=EvaluationConfig(every=200, episodes=2, deterministic=False),
    ),
    "lite_ppo": lambda e: replace(
        e, stages=(replace(e.stages[0], model=replace(e.stages[0].model, lora_rank=2)),)
    ),
    "gde": lambda e: replace(e, stages=(replace(e.stages[0], steps=7),)),
}
"""How a recipe is varied, so that no recipe says it."""


@pytest.mark.parametrize("slug", CHANGED)
def test_a_sweep_repeats_every_setting(
    slug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers below zero and tiny ones, switches, tables, lists and empty ones among them."""
    experiment = replace(CHANGED[slug](smoke(slug)), label="one of mine")
    line = more_seeds([recorded(tmp_path / "run", experiment)])
    assert line.startswith(f"esscher sweep {slug} --")
    found = understood(line, monkeypatch)
    assert [e.seed for e in found] == list(range(10)) and {e.label for e in found} == {
        "one of mine"
    }
    assert all(settings(e) == settings(experiment) for e in found)


def test_a_sweep_says_no_more_than_it_must(tmp_path: Path) -> None:
    """Only what is not the method's own choice; of a recipe, its name. A sweep's own label counts as
    none.
    """
    plain = Experiment.of("b2_diffurl", model=ModelConfig(source="mine:model", lora_rank=4))
    plain = replace(
        plain, stages=(replace(plain.stages[0], image=smoke("dragon").stages[0].image),)
    )
    assert more_seeds([recorded(tmp_path / "plain", plain)]) == (
        "esscher sweep b2_diffurl --model mine:model --model.lora-rank 4 --image.reward "
        "esscher.image_rewards:Frechet --image.reward-kwargs exemplars "
        "esscher.exemplars:three_of_eight --image.at-once 512 --seeds 10 --engine processes"
    )
    whole = "esscher sweep b2_diffurl:smoke --seeds 10 --engine processes"
    for number, label in enumerate((None, "b2_diffurl")):
        run = recorded(tmp_path / f"smoke{number}", replace(smoke("b2_diffurl"), label=label))
        assert more_seeds([run]) == whole


@pytest.mark.parametrize("as_published", [False, True])
@pytest.mark.parametrize(
    "slugs", [("sac", "td3"), ("b2_diffurl", "dragon"), ("divergence_ppo", "lite_ppo")]
)
def test_a_comparison_is_suggested_where_it_repeats_the_runs(
    slugs: tuple[str, ...], as_published: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = smoke(slugs[0])
    stage = replace(begun.stages[0], steps=9_000)
    footing: dict[str, Any] = {"hidden": (32, 32)} if slugs[0] == "sac" else {"batch_size": 4}
    made = comparison(
        slugs,
        stage=stage,
        seeds=[0],
        **({} if as_published else {"updates_per_step": 1.0, **footing}),
        evaluation=begun.evaluation,
        runtime=begun.runtime,
        log=begun.log,
    )
    line = more_seeds([recorded(tmp_path / e.slug, e) for e in made])
    assert line.startswith(f"esscher compare {' '.join(slugs)} --")
    # Controllers and writers here have published what is made equal alike, so both ways say the same.
    assert ("--as-published" in line) == (as_published and slugs[0] == "b2_diffurl")
    assert ("--hidden 32 32" in line) == (not as_published and slugs[0] == "sac")
    assert "--method" not in line and "--updates-per-step" not in line
    found = understood(line, monkeypatch)
    assert [e.slug for e in found] == [slug for slug in slugs for _ in range(10)]
    assert [settings(e) for e in found[::10]] == [settings(e) for e in made]


def test_methods_with_settings_of_their_own_have_a_sweep_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As have variants of one method."""
    sac, td3 = smoke("sac"), smoke("td3")
    tuned = replace(sac, method=replace(sac.method, tau=0.5), label="sac tau=0.5")
    runs = [recorded(tmp_path / str(n), e) for n, e in enumerate((sac, td3, tuned))]
    lines = more_seeds(runs).split("\n")
    assert [line.split()[2] for line in lines] == ["sac:smoke", "td3:smoke", "sac"]
    assert "--label 'sac tau=0.5'" in lines[2]
    for line, experiment in zip(lines, (sac, td3, tuned), strict=True):
        assert settings(understood(line, monkeypatch)[0]) == settings(experiment)


def test_nothing_is_suggested_that_this_version_cannot_do(tmp_path: Path) -> None:
    run = recorded(tmp_path / "run", smoke("sac"))
    run.config["method"]["of_another_version"] = 1
    assert more_seeds([run]) == ""
    run.config["slug"] = "of_another_catalogue"
    assert more_seeds([run]) == ""


def test_every_recipe_is_named_by_its_sweep(tmp_path: Path) -> None:
    for slug in catalogue():
        for name, recipe in recipes(slug).items():
            if name == "smoke":
                run = recorded(tmp_path / slug, recipe())
                assert more_seeds([run]).startswith(f"esscher sweep {slug}:smoke --seeds"), slug


def test_what_commands_take_is_known_here() -> None:
    """The report lies below the commands, so it cannot ask them."""
    for world, kind in (
        ("control", many_runs._compare_options()),
        ("language", many_runs._compare_writers_options()),
        ("diffusion", many_runs._compare_painters_options()),
    ):
        usual = {field.name: field.default for field in fields(kind)}
        assert {name: usual[name] for name in FOOTING[world]} == FOOTING[world]
