"""The page as a reader, a parser and a screen reader meet it."""

import base64
import csv
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from synthetic_runs import write_run

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


@pytest.fixture
def comparison(tmp_path):
    """Two finished methods, one that is still going, two tasks."""
    for env in ("Hopper-v5", "Walker2d-v5"):
        for seed in range(3):
            options = {"env": env, "seed": seed, "noise": 10}
            write_run(tmp_path / f"{env}-d{seed}", "dsac_t", label="DSAC-T", height=2300,
                      method={"lr": 1e-4, "bias": 50.0}, **options)  # fmt: skip
            write_run(tmp_path / f"{env}-s{seed}", "sac", height=2000, **options)
    write_run(tmp_path / "going", "td3", reached=40_000, half_line=True)
    return tmp_path


def test_page_is_well_formed_and_needs_nothing_from_elsewhere(comparison):
    html, page = report(comparison)
    assert "http://" not in html and "https://" not in html and "//cdn" not in html
    assert "@import" not in html and "esscher-title" not in html
    assert len(page.ids) == len(set(page.ids)), "an id occurs twice"
    inner = [reference[1:] for reference in page.references if reference.startswith("#")]
    inner += re.findall(r"url\(#([^)]*)\)", html)
    assert inner and set(inner) <= set(page.ids)
    outer = [reference for reference in page.references if not reference.startswith("#")]
    assert all((comparison / name).is_file() for name in outer) and len(outer) == 3


def test_page_can_be_read_without_sight_and_without_a_mouse(comparison):
    html, page = report(comparison)
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
    assert "currentColor" in html and "prefers-color-scheme: dark" in html
    assert "#23272e" not in html, "ink that would vanish on a dark page"


def test_page_says_what_was_found(comparison):
    _, page = report(comparison, title="Which one?", notes="First.\n\nSecond <script>.")
    text = page.text
    assert "Over 2 tasks" not in text, "td3 has no score on one of them"
    assert "On Hopper-v5 after 100,000 steps DSAC-T ranks first: 2," in text
    assert "(IQM of 3 seeds, 95% interval); the probability that a run of DSAC-T beats" in text
    assert "unfinished at step 40,000" in text
    assert "With as few as 3 seeds" in text
    assert "Second <script>." in text and len(page.all("script")) == 1
    for name in ("critic_loss", "method.lr", "method.bias", "esscher 0.1.0", "device cpu"):
        assert name in text
    assert f"esscher resume {comparison / 'going'}" in text
    assert "esscher compare dsac_t sac td3 --env.id Hopper-v5 --steps 100000 --seeds 10" in text
    assert "--to onnx" in text and "esscher eval" in text


def test_tasks_shared_by_all_methods_are_summed_up_first(comparison):
    (comparison / "going" / "config.json").unlink()
    _, page = report(comparison)
    assert "Over 2 tasks, returns normalised per task, DSAC-T ranks first: 0.9" in page.text
    assert "Performance profiles" in page.text


def test_numbers_lie_beside_the_page(comparison):
    report(comparison)
    with (comparison / "report_ranking.csv").open() as file:
        rows = list(csv.DictReader(file))
    first = next(row for row in rows if row["task"] == "Hopper-v5")
    assert (first["method"], first["rank"], first["seeds"]) == ("DSAC-T", "1", "3")
    assert float(first["low"]) <= float(first["iqm"]) <= float(first["high"])
    with (comparison / "report_curves.csv").open() as file:
        curves = list(csv.DictReader(file))
    assert len(curves) == 12 * 20 + 8
    assert (comparison / "report_curves.png").read_bytes().startswith(b"\x89PNG")
    assert not list(comparison.glob(".*part")), "a temporary file was left behind"


def test_equal_runs_give_an_equal_page(comparison):
    names = ("report.html", "report_curves.csv", "report_ranking.csv", "report_curves.png")
    report(comparison)
    before = [(comparison / name).read_bytes() for name in names]
    report(comparison)
    assert [(comparison / name).read_bytes() for name in names] == before


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
    assert "2 more lie in the runs' figures folders" in page.text


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
