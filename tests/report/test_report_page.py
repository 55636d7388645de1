"""The page as a reader, a parser and a screen reader meet it."""

import base64
import csv
import itertools
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest
from synthetic_runs import write_picture, write_run, write_samples

from esscher.report import write_report

VOID = {"meta", "link", "br", "hr", "img", "input", "wbr"}


class Page(HTMLParser):
    """Collects the tags, ids, references and text of a page; every tag must be closed in order."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.ids, self.references, self.words = [], [], [], [], []
        self.feed(html)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        self.ids += [attributes["id"]] if "id" in attributes else []
        for name in ("href", "src", "action", "data", "poster", "srcset"):
            self.references += [attributes[name]] if name in attributes else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def report(folder, **options):
    html = write_report([folder], folder / "report.html", **options).read_text()
    return html, Page(html)


def write_comparison(folder, still_going):
    """Two finished methods, and perhaps one that is still going, on two tasks."""
    for env in ("Hopper-v5", "Walker2d-v5"):
        for seed in range(3):
            options = {"env": env, "seed": seed, "noise": 10}
            write_run(folder / f"{env}-d{seed}", "dsac_t", label="DSAC-T", height=2300,
                      method={"lr": 1e-4, "bias": 50.0}, **options)  # fmt: skip
            write_run(folder / f"{env}-s{seed}", "sac", height=2000, **options)
    if still_going:
        write_run(folder / "going", "td3", reached=40_000, half_line=True)
    return folder


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    """A folder, and what its page says: for many tests, which only read it."""
    folder = write_comparison(tmp_path_factory.mktemp("comparison"), still_going=True)
    return folder, *report(folder, title="Which one?", notes="First.\n\nSecond <script>.")


def test_page_is_well_formed_and_needs_nothing_from_elsewhere(comparison):
    folder, html, page = comparison
    assert "http://" not in html and "https://" not in html and "//cdn" not in html
    assert "@import" not in html and "esscher-title" not in html
    assert len(page.ids) == len(set(page.ids)), "an id occurs twice"
    inner = [reference[1:] for reference in page.references if reference.startswith("#")]
    inner += re.findall(r"url\(#([^)]*)\)", html)
    assert inner and set(inner) <= set(page.ids)
    outer = [reference for reference in page.references if not reference.startswith("#")]
    assert all((folder / unquote(name)).is_file() for name in outer)
    beside = [name for name in outer if "/" not in name]
    assert beside == ["report_curves.csv", "report_ranking.csv", "report_curves.png"]
    in_folder = {path.name for path in (folder / "report_figures").iterdir()}
    assert {unquote(name.rpartition("/")[2]) for name in outer if "/" in name} == in_folder


def test_page_can_be_read_without_sight_and_without_a_mouse(comparison):
    _, html, page = comparison
    (root,) = page.all("html")
    assert root["lang"] == "en"
    assert {"header", "main", "nav", "footer"} <= {tag for tag, _ in page.tags}
    assert page.references[0] == "#content" and "content" in page.ids
    assert len(page.all("caption")) == len(page.all("table"))
    assert all("scope" in header for header in page.all("th"))
    for figure in page.all("svg"):
        assert figure["role"] == "img"
        assert set(figure["aria-labelledby"].split()) <= set(page.ids)
    headings = [tag for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == "h1" and headings.count("h1") == 1 and set(headings[1:]) == {"h2"}
    named = [link["aria-label"] for link in page.all("a") if "aria-label" in link]
    assert len(named) == len(set(named)), "two links of one name lead to different places"
    assert "currentColor" in html and "prefers-color-scheme: dark" in html
    assert "#23272e" not in html, "ink that would vanish on a dark page"


def test_page_says_what_was_found(comparison):
    folder, _, page = comparison
    text = page.text
    assert "Over 2 tasks" not in text, "td3 has no score on one of them"
    assert "On Hopper-v5 after 100,000 steps DSAC-T ranks first: 2," in text
    assert "(IQM of 3 seeds, 95% interval); the probability that a run of DSAC-T beats" in text
    assert "unfinished at step 40,000" in text
    assert "With as few as 3 seeds" in text
    assert "Second <script>." in text and len(page.all("script")) == 1
    for name in ("critic_loss", "method.lr", "method.bias", "esscher 0.1.0", "device cpu"):
        assert name in text
    assert f"esscher resume {folder / 'going'}" in text
    assert "--to onnx" in text and "esscher eval" in text


def test_numbers_lie_beside_the_page(comparison):
    folder, _, _ = comparison
    with (folder / "report_ranking.csv").open() as file:
        rows = list(csv.DictReader(file))
    first = next(row for row in rows if row["task"] == "Hopper-v5")
    assert (first["method"], first["rank"], first["seeds"]) == ("DSAC-T", "1", "3")
    assert float(first["low"]) <= float(first["iqm"]) <= float(first["high"])
    with (folder / "report_curves.csv").open() as file:
        curves = list(csv.DictReader(file))
    assert len(curves) == 12 * 20 + 8
    assert {row["world"] for row in curves} == {"control"}
    assert (folder / "report_curves.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.glob(".*part")), "a temporary file was left behind"


def test_equal_runs_give_an_equal_page(comparison):
    names = ("report.html", "report_curves.csv", "report_ranking.csv", "report_curves.png")
    folder, _, _ = comparison
    before = [(folder / name).read_bytes() for name in names]
    report(folder, title="Which one?", notes="First.\n\nSecond <script>.")
    assert [(folder / name).read_bytes() for name in names] == before


def test_one_seed_claims_no_order(tmp_path):
    write_run(tmp_path / "a", "dsac_t", height=3000)
    write_run(tmp_path / "b", "sac", height=1000)
    _, page = report(tmp_path)
    assert "dsac_t is ahead but not separated from sac (1 seed cannot tell;" in page.text
    assert (
        "(1 seed: no interval)" in page.text and "With one seed there is no interval" in page.text
    )
    assert "nan" not in page.text.replace("finance", "")


def test_overlapping_intervals_claim_no_order(tmp_path):
    for seed in range(4):
        write_run(tmp_path / f"a{seed}", "one", seed=seed, noise=400)
        write_run(tmp_path / f"b{seed}", "two", seed=seed, noise=400)
    _, page = report(tmp_path)
    assert "not separated from" in page.text and "(their intervals overlap)" in page.text


def test_a_run_alone_a_run_by_training_returns_and_a_run_without_rows(tmp_path):
    write_run(tmp_path / "alone" / "a")
    assert "On Hopper-v5 after 100,000 steps sac reaches" in report(tmp_path / "alone")[1].text
    write_run(tmp_path / "training" / "a", evaluated=False)
    text = report(tmp_path / "training")[1].text
    assert "sac: some runs were never evaluated" in text and "training return" in text
    write_run(tmp_path / "empty" / "a", reached=0)
    text = report(tmp_path / "empty")[1].text
    assert "no run has recorded a return yet" in text and "unfinished at step 0" in text


def test_unequal_conditions_and_mixed_names_are_told(tmp_path):
    write_run(tmp_path / "a", "sac", steps=100_000, method={"tau": 0.01})
    write_run(tmp_path / "b", "sac", seed=0, steps=100_000)
    write_run(tmp_path / "c", "td3", steps=200_000)
    text = report(tmp_path)[1].text
    assert "Runs called sac on Hopper-v5 differ in method.tau" in text
    assert "did not run under equal conditions: stages.0.steps and evaluation.every" in text
    assert "several runs of seed 0" in text
    assert "end at different steps; all are compared at step 100,000" in text


def test_names_cannot_break_the_page(tmp_path):
    write_run(tmp_path / "a b'c", "sac", label='<b>&"$x$_1', env="A<i>&B")
    _, page = report(tmp_path)
    assert '<b>&"$x$_1' in page.text and "A<i>&B" in page.text
    assert not page.all("b") and not page.all("i")
    assert "'\"'\"'" in page.text  # the shell command quotes the folder


def test_pictures_that_runs_drew_are_shown(tmp_path):
    """Inside the page, with words for those who cannot see them; a dozen at most."""
    write_run(tmp_path / "a", "sac")
    assert "pictures" not in report(tmp_path)[1].ids
    figures = tmp_path / "a" / "figures"
    figures.mkdir()
    for number in range(14):
        (figures / f"archive{number:02}.png").write_bytes(b"\x89PNG picture %d" % number)
    _, page = report(tmp_path)
    shown = page.all("img")
    assert "pictures" in page.ids and len(shown) == 12
    data = base64.b64encode(b"\x89PNG picture 3").decode()
    assert shown[3]["src"] == f"data:image/png;base64,{data}"
    assert shown[3]["alt"] == "archive03 of sac on Hopper-v5, seed 0"
    assert "2 more pictures of these runs in their own folders" in page.text


def test_no_picture_of_the_start_is_left_alone(tmp_path):
    """Where there is room for one more of two, there is room for none."""
    for number in range(11):
        task = "digits" if number < 10 else "letters"
        run = write_run(tmp_path / str(number), "dragon", task, label=f"variant {number}")
        write_picture(run, 0, 10)
        write_picture(run, 100_000, 100 + number)
    _, page = report(tmp_path, figures=False)
    alts = [picture["alt"] for picture in page.all("img")]
    assert len(alts) == 11 and not any("letters" in alt for alt in alts)
    assert "11 more pictures" in page.text


def test_settings_and_lengths_of_other_worlds_are_left_out(tmp_path):
    """A run records the settings of every world; a drawing is no episode of several steps."""
    worlds = {"sac": "env.id", "lite_ppo": "text.task", "dragon": "image.reward", "gde": "sets.size",
              "discrete_diffusion_vla": "robot.tasks"}  # fmt: skip
    for slug, own in worlds.items():
        run = write_run(tmp_path / slug, slug, "things")
        config = json.loads((run / "config.json").read_text())
        for name in ("model.source", *worlds.values()):
            part, _, setting = name.partition(".")
            config["stages"][0].setdefault(part, {})[setting] = "something"
        (run / "config.json").write_text(json.dumps(config))
        length = 150 if slug == "sac" else 1
        rows = (run / "metrics.jsonl").read_text().replace("{", f'{{"length": {length}, ')
        (run / "metrics.jsonl").write_text(rows)
        text = report(run)[1].text
        shown = {name for name in worlds.values() if f"stages.0.{name}" in text}
        assert shown == {own}
        of_a_model = slug in ("lite_ppo", "dragon", "discrete_diffusion_vla")
        assert ("stages.0.model.source" in text) == of_a_model
        for common in ("stages.0.steps", "method.tau", "evaluation.every", "log.every"):
            assert common in text
        metrics = (run / "report_figures" / "diagnostics_things.csv").read_text()
        assert ("length" in metrics) == (slug == "sac") and "critic_loss" in metrics


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """Controllers on two tasks, writers by reward, painters by two measures: folder and page."""
    tmp_path = tmp_path_factory.mktemp("families")
    for seed in range(2):
        for env in ("Hopper-v5", "Walker2d-v5"):
            for slug, height in (("sac", 2000), ("td3", 1000)):
                write_run(
                    tmp_path / f"{env}-{slug}-{seed}", slug, env, seed, height=height, noise=5
                )
        for slug, height in (("lite_ppo", 0.9), ("f_dpg", 0.4)):
            run = write_run(tmp_path / f"{slug}-{seed}", slug, "sums", seed, height=height,
                            noise=0.01, measure="reward", distance=height * 10)  # fmt: skip
            write_samples(run, 0, {"1+1=": "before", "2+2=": ""}, finished=True, reward=0.0)
            write_samples(run, 50_000, {"1+1=": "halfway", "2+2=": "halfway"}, reward=0.5)
            write_samples(run, 100_000, {"1+1=": f"2 <{slug}>", "2+2=": "5"}, reward=1.0)
        for slug, measure in (("b2_diffurl", "reward"), ("dragon", "reward of the set")):
            run = write_run(tmp_path / f"{slug}-{seed}", slug, "digits", seed, height=3,
                            measure=measure, distance=4.0, noise=0.1)  # fmt: skip
            write_picture(run, 0, 10)
            write_picture(run, 50_000, 20)
            write_picture(run, 100_000, 30)
    return tmp_path, *report(tmp_path)


def test_families_and_measures_have_sections_of_their_own(families):
    folder, _, page = families
    headings = [tag for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == "h1" and headings.count("h1") == 1
    levels = [int(heading[1]) for heading in headings]
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    parts = ["Controllers, by return", "Language models, by reward", "Diffusion models, by reward",
             "Diffusion models, by reward of the set"]  # fmt: skip
    places = [page.text.rindex(f"{title} {start}") for title, start in
              zip(parts, ("Over 2 tasks", *["On "] * 3), strict=True)]  # fmt: skip
    assert places == sorted(places)
    assert "4 parts, measured differently" in page.text
    assert "Over 2 tasks, returns normalised per task, sac is ahead" in page.text
    assert page.text.count("normalised per task") == 1
    assert "On sums after 100,000 steps lite_ppo" in page.text
    with (folder / "report_ranking.csv").open() as file:
        rows = list(csv.DictReader(file))
    together = {(row["world"], row["measure"], row["task"]): set() for row in rows}
    for row in rows:
        together[row["world"], row["measure"], row["task"]].add(row["method"])
    assert together == {
        ("control", "return", "2 tasks"): {"sac", "td3"},
        ("control", "return", "Hopper-v5"): {"sac", "td3"},
        ("control", "return", "Walker2d-v5"): {"sac", "td3"},
        ("language", "reward", "sums"): {"lite_ppo", "f_dpg"},
        ("diffusion", "reward", "digits"): {"b2_diffurl"},
        ("diffusion", "reward of the set", "digits"): {"dragon"},
    }


def test_commands_fit_the_family(families):
    commands = families[2].text.partition("How to go on")[2]
    for run, form in (("lite_ppo", "transformers"), ("dragon", "diffusers"), ("sac", "onnx")):
        assert re.search(rf"esscher export \S*{run}\S* --to {form}", commands), run
    assert re.search(r"esscher sample \S*lite_ppo\S* --prompt TEXT", commands)
    assert "esscher resume" not in commands  # There is nothing to resume.


def test_samples_stand_beside_those_of_the_model_of_before(families):
    text = families[2].text
    start = text.index("sums, seed 0 Prompt The model of before")
    assert text[start : text.index("Diagnostics", start)] == (
        "sums, seed 0 Prompt The model of before lite_ppo, after 100,000 steps f_dpg, after 100,000 "
        "steps 1+1= before reward 0.000 2 <lite_ppo> reward 1.00 2 <f_dpg> reward 1.00 2+2= nothing, "
        "reward 0.000 5 reward 1.00 5 reward 1.00 "
    )
    assert "halfway" not in text


def test_methods_that_began_otherwise_have_samples_of_their_own(tmp_path):
    for slug in ("lite_ppo", "f_dpg"):
        run = write_run(tmp_path / slug, slug, "sums", measure="reward")
        write_samples(run, 0, {"1+1=": f"before {slug}"})
        write_samples(run, 100_000, {"1+1=": "2"})
    text = report(tmp_path, figures=False)[1].text
    for slug in ("lite_ppo", "f_dpg"):
        head = f"{slug} on sums, seed 0 Prompt The model of before After 100,000 steps 1+1="
        assert f"{head} before {slug} 2" in text


def test_reward_is_shown_against_the_distance(families):
    folder, html, _ = families
    assert "Reward on sums, against the distance from the model of before" in html
    assert "Reward of the set on digits, against the distance" in html
    with (folder / "report_figures" / "language_reward_distance_sums.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 20
    last = [row for row in rows if row["method"] == "lite_ppo" and row["step"] == "100000"]
    assert [row["kl_to_reference"] for row in last] == ["9.0", "9.0"]
    assert not any("distance_Hopper" in path.name for path in (folder / "report_figures").iterdir())


def test_pictures_before_and_after_of_the_first_seed_of_each_method(families):
    """Beside each other, under one heading, which says of what."""
    _, html, page = families
    assert [picture["alt"] for picture in page.all("img")] == [
        f"What {slug} drew on digits, seed 0, {when}"
        for slug in ("b2_diffurl", "dragon")
        for when in ("before training", "after 100,000 steps")
    ]
    for slug in ("b2_diffurl", "dragon"):
        said = (
            f"Pictures What {slug} drew on digits, seed 0 Each was drawn from the same noise. "
            "before: step 0 PNG after: step 100,000 PNG"
        )
        assert said in page.text
    rows = html.split('<div class="figures beside">')[1:]
    assert [row.partition("</section>")[0].count("<img") for row in rows] == [2, 2]
    assert page.text.count("more pictures of these runs in their own folders") == 2


def test_what_the_model_of_before_drew_is_shown_once_where_methods_begin_alike(tmp_path):
    slugs = ("b2_diffurl", "adaptive_guidance")
    for slug in slugs:
        run = write_run(tmp_path / slug, slug, "digits", measure="reward")
        write_picture(run, 0, 10)
        write_picture(run, 100_000, 20 if slug == "b2_diffurl" else 200)
    shown = [picture["alt"] for picture in report(tmp_path, figures=False)[1].all("img")]
    assert sum("What every method drew on digits, seed 0, before training" in s for s in shown) == 1
    assert len(shown) == 3
    text = report(tmp_path, figures=False)[1].text
    assert "What every method drew on digits, seed 0 Each was drawn from the same noise." in text
    captions = ("before: step 0, every method", *(f"after: step 100,000, {slug}" for slug in slugs))
    assert all(text.count(caption) == 1 for caption in captions)
    write_picture(tmp_path / "b2_diffurl", 0, 11)
    shown = [picture["alt"] for picture in report(tmp_path, figures=False)[1].all("img")]
    assert not any("every method" in alt for alt in shown) and len(shown) == 4


def test_finished_runs_are_summed_up_first_with_every_figure_beside_the_page(tmp_path):
    comparison = write_comparison(tmp_path, still_going=False)
    folder = comparison / "report_figures"
    folder.mkdir()
    (folder / "of_last_time.png").write_bytes(b"old")
    (folder / "notes.txt").write_text("mine")
    _, page = report(comparison)
    assert "Over 2 tasks, returns normalised per task, DSAC-T ranks first: 0.9" in page.text
    assert "Performance profiles" in page.text
    names = sorted(path.stem for path in folder.glob("*.png"))
    assert names == sorted(path.stem for path in folder.glob("*.csv"))
    assert len(names) == len(page.all("svg")) and "of_last_time" not in names
    assert (folder / "notes.txt").read_text() == "mine"
    for path in folder.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG"), path
    with (folder / "performance_profile.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["method"] == "DSAC-T"]
    assert [float(row["score"]) for row in rows[::50]] == [0.0, 0.5, 1.0]
    assert [float(row["fraction_above"]) for row in rows[::50]] == [1.0, 1.0, 0.0]
    with (folder / "curves_Hopper-v5.csv").open() as file:
        last = {row["method"]: row for row in csv.DictReader(file)}
    with (comparison / "report_ranking.csv").open() as file:
        final = {r["method"]: r for r in csv.DictReader(file) if r["task"] == "Hopper-v5"}
    assert float(last["sac"]["iqm"]) == pytest.approx(float(final["sac"]["iqm"]))
    # Not asked for: no folder, and no links into one.
    write_report([comparison], comparison / "bare" / "report.html", figures=False)
    assert not (comparison / "bare" / "report_figures").exists()
    assert "report_figures" not in (comparison / "bare" / "report.html").read_text()


def test_three_methods_are_held_against_each_other_in_pairs(tmp_path):
    for seed in range(3):
        for slug, height in (("low", 100), ("middle", 200), ("high", 300)):
            write_run(tmp_path / f"{slug}{seed}", slug, seed=seed, height=height, noise=1)
    html, _ = report(tmp_path)
    assert "Probability of improvement on Hopper-v5" in html
    assert "high over middle 1.00; high over low 1.00; middle over low 1.00." in html
    with (tmp_path / "report_figures" / "improvement_Hopper-v5.csv").open() as file:
        rows = {
            (row["method"], row["over"]): float(row["probability"]) for row in csv.DictReader(file)
        }
    assert len(rows) == 6 and rows["low", "high"] == 0.0 and rows["middle", "low"] == 1.0


def test_out_may_be_a_folder_and_errors_leave_nothing(tmp_path):
    write_run(tmp_path / "a")
    assert write_report([tmp_path], tmp_path / "new") == tmp_path / "new" / "report.html"
    with pytest.raises(ValueError, match="does not exist"):
        write_report([tmp_path / "nothing"], tmp_path / "other" / "page.html")
    assert not (tmp_path / "other").exists()


def test_importing_the_package_is_light():
    code = (
        "import sys, esscher; before = set(sys.modules)\n"
        "import esscher.report as r; dir(r)\n"
        "heavy = {'matplotlib', 'jinja2', 'torch', 'numpy'} & (set(sys.modules) - before)\n"
        "assert not heavy, heavy\n"
        "r.write_report, r.write_proof_figure\n"
        "assert not {'matplotlib', 'jinja2', 'torch'} & (set(sys.modules) - before)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
