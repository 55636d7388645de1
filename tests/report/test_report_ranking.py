"""Who is scored, at which step, and when an order is claimed."""

import numpy as np
import pytest
from synthetic_runs import write_run

from esscher.report import read_run
from esscher.report.ranking import improvements, rank_groups, rank_task, rank_tasks


@pytest.fixture
def make(tmp_path):
    def write(slug="sac", env="Hopper-v5", seed=0, **options):
        folder = tmp_path / f"{env}-{slug}-{seed}-{len(list(tmp_path.iterdir()))}"
        return read_run(write_run(folder, slug, env, seed, **options))

    return write


def test_methods_far_apart_are_separated_with_three_seeds_and_not_with_two(make):
    for seeds, separated in ((3, True), (2, False)):
        runs = [make("low", seed=seed, height=500, noise=10) for seed in range(seeds)]
        runs += [make("high", seed=seed, height=900, noise=10) for seed in range(seeds)]
        first, second = rank_task(runs).entries
        assert (first.method, second.method) == ("high", "low")
        assert second.over_first.point == 0.0 and np.isnan(first.over_first.point)
        assert second.separated is separated and second.num_seeds == seeds
        assert first.final.low <= first.final.point <= first.final.high


def test_methods_alike_are_not_separated(make):
    runs = [make(slug, seed=seed, noise=300) for slug in ("one", "two") for seed in range(4)]
    assert not rank_task(runs).entries[1].separated


def test_runs_are_compared_where_every_finished_one_arrived(make):
    runs = [make("long", steps=200_000), make("short", steps=100_000)]
    runs += [make("short", seed=1, reached=50_000), make("going", steps=200_000, reached=150_000)]
    ranking = rank_task(runs)
    entries = {entry.method: entry for entry in ranking.entries}
    assert ranking.step == 100_000
    assert len(entries["short"].counted) == 1 and len(entries["short"].runs) == 2
    assert entries["going"].num_seeds == 1  # unfinished, but far enough
    at = np.interp(100_000, runs[0].steps, runs[0].returns)
    assert entries["long"].scores.tolist() == [[at]]


def test_unfinished_runs_alone_are_compared_where_all_arrived(make):
    ranking = rank_task([make("one", reached=40_000), make("two", reached=60_000)])
    assert ranking.step == 40_000 and len(ranking.scored) == 2


def test_a_method_without_a_score_comes_last(make):
    ranking = rank_task([make("aaa", reached=10_000), make("zzz"), make("none", reached=0)])
    assert ranking.entries[0].method == "zzz"
    assert [entry.method for entry in ranking.scored] == ["zzz"]
    assert np.isnan(ranking.entries[1].final.point)


def test_several_tasks_are_normalised_and_combined(make):
    runs = [
        make(slug, env, seed, height=height * scale, noise=5)
        for env, scale in (("Hopper-v5", 1), ("Walker2d-v5", 100))
        for slug, height in (("low", 500), ("high", 900))
        for seed in range(3)
    ]
    rankings, overall = rank_tasks(runs)
    assert [ranking.name for ranking in rankings] == ["Hopper-v5", "Walker2d-v5"]
    assert overall.tasks == ("Hopper-v5", "Walker2d-v5")
    high, low = overall.entries
    assert high.method == "high" and high.scores.shape == (3, 2) and low.separated
    pooled = np.concatenate([high.scores, low.scores])
    assert pooled.min(axis=0).tolist() == [0, 0] and pooled.max(axis=0).tolist() == [1, 1]


def test_tasks_that_methods_do_not_share_are_not_combined(make):
    rankings, overall = rank_tasks([make("one", "Hopper-v5"), make("two", "Walker2d-v5")])
    assert len(rankings) == 2 and overall is None
    with pytest.raises(ValueError, match="one task"):
        rank_task([make("one", "Hopper-v5"), make("two", "Walker2d-v5")])


def test_measures_and_families_are_never_ranked_together(make):
    runs = [
        make("sac", "same"),
        make("lite_ppo", "same", measure="reward"),
        make("f_dpo", "same", measure="preference accuracy"),
        make("dragon", "same", measure="reward"),
        make("f_dpg", "other", measure="reward"),
        make("lite_ppo", "other", measure="reward"),
        make("f_dpg", "same", measure="reward"),
    ]
    groups = rank_groups(runs)
    assert [(group.world, group.measure) for group in groups] == [
        ("control", "return"),
        ("language", "preference accuracy"),
        ("language", "reward"),
        ("diffusion", "reward"),
    ]
    assert sum(len(group.runs) for group in groups) == len(runs)
    writers = groups[2]
    assert [ranking.name for ranking in writers.rankings] == ["other", "same"]
    assert writers.overall is not None and writers.overall.tasks == ("other", "same")
    assert {entry.method for entry in writers.overall.entries} == {"f_dpg", "lite_ppo"}
    assert all(group.overall is None for group in groups if group is not writers)
    with pytest.raises(ValueError, match="different measures"):
        rank_tasks([runs[0], make("f_dpo", "third", measure="preference accuracy")])
    with pytest.raises(ValueError, match="different measures"):
        rank_task(runs[:3])


def test_a_run_not_judged_yet_goes_with_the_others_of_its_task(make):
    judged = [make("lite_ppo", "sums", seed, measure="reward") for seed in range(2)]
    (group,) = rank_groups([*judged, make("lite_ppo", "sums", 2, measure="reward", reached=0)])
    assert group.measure == "reward" and len(group.runs) == 3
    (entry,) = group.rankings[0].entries
    assert len(entry.counted) == 2 and len(entry.runs) == 3
    # Alone it has no other name for what it would be judged by.
    (group,) = rank_groups([make("lite_ppo", "sums", 3, measure="reward", reached=0)])
    assert group.measure == "return"


def test_improvements_of_every_pair(make):
    heights = {"one": (100, 300), "two": (200, 200), "three": (50, 50)}
    runs = [
        make(slug, seed=seed, height=height, noise=0)
        for slug, pair in heights.items()
        for seed, height in enumerate(pair)
    ]
    chance = {(p.one.method, p.other.method): p.chance.point for p in improvements(rank_task(runs))}
    # one wins one of its two against two; three loses all.
    assert chance == {
        ("one", "two"): 0.5, ("two", "one"): 0.5, ("one", "three"): 1.0, ("three", "one"): 0.0,
        ("two", "three"): 1.0, ("three", "two"): 0.0,
    }  # fmt: skip
