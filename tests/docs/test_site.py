"""The documentation site: whole, without a network, and in a real browser.

Built once. What needs Chromium and its driver is skipped where they are not installed.
"""

import dataclasses
import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from documents import ROOT

from browser import chromium, darkened, programs, resized, served
from esscher.registry import catalogue, load_module
from esscher.report.catalogue import families, pages, relocated

PAPERS = [slug for slug, entry in catalogue().items() if not entry.baseline]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The built site; `strict` in mkdocs.yml makes a broken link an error."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    out = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(out)))
    yield out


def words(path: Path) -> str:
    """What a page says, without its tags."""
    text = re.sub(r"<(script|style|svg)\b.*?</\1>|<[^>]+>", "", path.read_text(), flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(text))


def test_nothing_is_fetched_from_a_network(site: Path) -> None:
    loaded = re.compile(
        r'<(?:link|script|img|iframe|source)\b[^>]*?(?:href|src)="?(https?:)?//', re.IGNORECASE
    )
    written = list(site.rglob("*.html"))
    assert len(written) > len(catalogue()) + 15
    for path in written:
        assert not loaded.search(path.read_text()), path
    for path in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//|@import", path.read_text()), path
    assert not list(site.rglob("*fonts.googleapis*"))


@pytest.mark.parametrize("slug", catalogue())
def test_a_card_tells_everything(site: Path, slug: str) -> None:
    said, entry = words(site / f"methods/{slug}.html"), catalogue()[slug]
    for told in (entry.paper["title"], entry.paper["purpose"], entry.paper["claim"]):
        assert " ".join(told.split()).replace("`", "") in said, told
    for field in dataclasses.fields(load_module(slug).Config):
        assert f" {field.name} " in said, field.name
    assert f"esscher run {slug}:smoke" in said
    assert ("Papers compare with it" in said) is entry.baseline
    assert "arithmatex" not in (site / f"methods/{slug}.html").read_text()
    assert "$$" not in said and "\\" not in said


@pytest.mark.parametrize("slug", PAPERS)
def test_a_claim_stands_beside_what_was_measured(site: Path, slug: str) -> None:
    record = json.loads((ROOT / f"proofs/{slug}.json").read_text())
    page, said = (site / f"methods/{slug}.html").read_text(), words(site / f"methods/{slug}.html")
    assert f"Verdict: {record['verdict']}" in said
    for claim in record["claims"]:
        assert f"{claim['name']}: {claim['verdict']}" in said
        for check in claim["checks"]:
            assert " ".join(check["rule"].split()) in said, check["rule"]
    assert f'src="../proofs/{slug}.png"' in page and f'href="../proofs/{slug}.json"' in page
    for ending in ("png", "json"):
        kept = (ROOT / f"proofs/{slug}.{ending}").read_bytes()
        assert (site / f"proofs/{slug}.{ending}").read_bytes() == kept


def test_equations_are_mathml(site: Path) -> None:
    page = (site / "methods/f_dpo.html").read_text()
    assert page.count('display="block"') == 2
    assert "&#x1D53C;" in page and "<code>log_ratio</code>" in page
    assert (site / "concepts/tilt.html").read_text().count("<svg viewBox") == 1


def test_what_falls_short_stands_on_the_card(site: Path) -> None:
    assert "Known to fall short" in words(site / "methods/mamql.html")
    assert "Known to fall short" not in words(site / "methods/td3.html")


def test_families_are_complete_and_every_card_has_its_tags(site: Path) -> None:
    grouped = families()
    assert sorted(e.slug for entries in grouped.values() for e in entries) == sorted(catalogue())
    index = (site / "methods/index.html").read_text()
    for name, entries in grouped.items():
        (part,) = re.findall(rf'id="{name}-methods".*?</section>', index, re.DOTALL)
        linked = re.findall(r'<td><a href="([a-z0-9_]+)\.html"', part)
        assert linked == [entry.slug for entry in entries]
    tags = words(site / "families.html")
    for tag in (*grouped, "reproduced", "not reproduced", "baseline"):
        assert f" {tag} " in tags


def test_everything_can_be_searched(site: Path) -> None:
    index = json.loads((site / "search/search_index.json").read_text())
    places = {entry["location"].partition("#")[0] for entry in index["docs"]}
    assert {f"methods/{slug}.html" for slug in catalogue()} <= places
    assert {"manual.html", "data.html", "design.html", "contributing.html"} <= places


def test_links_are_turned_from_the_repository_to_the_site() -> None:
    text = "[a](../CONTRIBUTING.md) [b](proofs/sac.json) [c](https://x.org/y) [d](data.md#play) [e](#f)"
    assert relocated(text, "docs/design.md", "design.md") == (
        "[a](contributing.md) [b](proofs/sac.json) [c](https://x.org/y) [d](data.md#play) [e](#f)"
    )
    assert relocated("[a](docs/data.md)", "README.md", "methods/x.md") == "[a](../data.md)"


def test_pages_are_made_of_what_the_repository_keeps() -> None:
    made = pages(ROOT)
    assert "## Kill it, resume it" in made["manual.md"] and "| `sac` |" not in made["manual.md"]
    assert made["contributing.md"].startswith("# Contributing")
    assert not [path for path in made if (ROOT / "docs" / path).exists()], "never committed"


# ---- in a browser

PLACES = ("index.html", "methods/index.html", "methods/sac.html", "methods/dragon.html",
          "concepts/divergences.html", "manual.html", "large_models.html")  # fmt: skip


@pytest.fixture(scope="module")
def browser(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, str]]:
    if not all(programs()):
        pytest.skip("needs Chromium and its driver: apt-get install chromium chromium-driver")
    with served(site) as address, chromium(tmp_path_factory.mktemp("profile")) as page:
        page.set_page_load_timeout(60)
        yield page, address


def until(page: Any, script: str, seconds: float = 30) -> Any:
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(page, seconds).until(lambda page: page.execute_script(script))


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_pages_load_in_any_light_and_width(
    browser: tuple[Any, str], width: int, dark: bool
) -> None:
    page, address = browser
    resized(page, width)
    darkened(page, dark)
    page.get(f"{address}/search/search_index.json")  # a page without the theme's script,
    page.execute_script("localStorage.clear()")  # which remembers the colours that it began with
    page.get_log("browser")  # it has no icon, which the browser deplores
    for place in PLACES:
        page.get(f"{address}/{place}")
        assert "Esscher" in page.title
        assert page.execute_script("return document.documentElement.scrollWidth") <= width, place
        colours = "const c = getComputedStyle(document.body); return [c.color, c.backgroundColor]"
        ink, paper = (brightness(colour) for colour in page.execute_script(colours))
        assert (ink > paper) is dark, "text and page of the theme"
        assert abs(ink - paper) > 120, "legible"
        missing = "return [...document.images].filter(i => i.complete && !i.naturalWidth).length"
        assert page.execute_script(missing) == 0
    assert page.get_log("browser") == []


def brightness(colour: str) -> float:
    """Mean of red, green and blue of an opaque or translucent colour of CSS."""
    red, green, blue = [float(part) for part in re.findall(r"[\d.]+", colour)[:3]]
    return (red + green + blue) / 3


def test_search_finds_what_was_asked(browser: tuple[Any, str]) -> None:
    page, address = browser
    resized(page, 1280)
    page.get(f"{address}/index.html")
    field = page.find_element("css selector", "input.md-search__input")
    field.click()
    field.send_keys("offline diffusion")
    found = "return [...document.querySelectorAll('.md-search-result__link')].map(a => a.href)"
    links = until(page, found)
    assert any("/methods/" in link or "/manual" in link for link in links)
    page.get(links[0])
    shown = page.find_element("css selector", "article").text.lower()
    assert "offline" in shown or "diffusion" in shown
    assert page.get_log("browser") == []


def test_one_family_can_be_shown_alone(browser: tuple[Any, str]) -> None:
    page, address = browser
    resized(page, 1280)
    page.get(f"{address}/methods/index.html")
    visible = """return [...document.querySelectorAll('section.family')]
        .filter(s => s.offsetHeight > 0).map(s => s.id)"""
    assert len(page.execute_script(visible)) == len(families())
    page.find_element("css selector", 'input[value="language"]').click()
    assert page.execute_script(visible) == ["language-methods"]
    page.find_element("css selector", 'input[value="all"]').click()
    assert len(page.execute_script(visible)) == len(families())


def test_formulas_have_a_size_and_scroll_in_their_own_box(browser: tuple[Any, str]) -> None:
    page, address = browser
    resized(page, 400)
    page.get(f"{address}/methods/dragon.html")
    sizes = page.execute_script(
        "return [...document.querySelectorAll('.formula')].map(f => [f.clientWidth, f.scrollWidth, "
        "f.querySelector('math').getBoundingClientRect().height])"
    )
    assert len(sizes) == 3
    assert all(height > 15 and width < 400 for width, _, height in sizes)
    assert any(scrolled > width for width, scrolled, _ in sizes)
