"""The page in a real browser, without a network: as seen, by keyboard, and by a screen reader.

The browser is Chromium with its driver; without them the tests skip.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from synthetic_runs import write_picture, write_run, write_samples

from browser import chromium, darkened, programs, resized
from esscher.report import write_report

CONTRAST = 4.5
"""Least ratio of text to its ground (WCAG 2.2, level AA)."""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of three families, with every kind of section."""
    root = tmp_path_factory.mktemp("browsed")
    for seed in range(2):
        for slug, height in (("sac", 2000), ("td3", 1900), ("ppo", 900)):
            write_run(root / f"{slug}-{seed}", slug, seed=seed, height=height)
        run = write_run(root / f"lite_ppo-{seed}", "lite_ppo", "sums", seed, height=0.9, noise=0.01,
                        measure="reward", distance=9.0)  # fmt: skip
        for step, written in ((0, "before"), (100_000, "after " * 40)):
            write_samples(run, step, {"1+1=": written}, reward=0.5)
        run = write_run(root / f"dragon-{seed}", "dragon", "digits", seed, height=3, noise=0.1,
                        measure="reward of the set", distance=4.0)  # fmt: skip
        write_picture(run, 0, 10)
        write_picture(run, 100_000, 200)
    write_run(root / "going", "td3", seed=7, reached=40_000)
    return write_report([root], root / "report.html")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    pytest.importorskip("selenium", reason="selenium is not installed")
    if None in programs():
        pytest.skip("no Chromium with its driver here (Debian: chromium and chromium-driver)")
    with chromium(tmp_path_factory.mktemp("profile")) as running:
        yield running


def opened(browser: Any, page: Path, width: int = 1100, scheme: str = "light") -> Any:
    darkened(browser, scheme == "dark")
    resized(browser, width)
    browser.get(page.as_uri())
    return browser


def pressed(browser: Any, key: str, times: int = 1) -> None:
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    for _ in range(times):
        ActionChains(browser).send_keys(getattr(Keys, key)).perform()


def test_it_opens_from_disk_without_a_complaint(browser: Any, page: Path) -> None:
    browser.get_log("browser")
    opened(browser, page)
    assert browser.get_log("browser") == []
    asked = browser.execute_script(
        "return performance.getEntriesByType('resource').map(entry => entry.name)"
    )
    assert not [name for name in asked if not name.startswith("data:")]
    broken = "return [...document.images].filter(image => !image.naturalWidth).length"
    assert browser.execute_script(broken) == 0
    assert browser.execute_script("return document.images.length") == 2


@pytest.mark.parametrize("width", [360, 1100])
def test_it_fits_its_window(browser: Any, page: Path, width: int) -> None:
    """What is wider (a table) scrolls in its own place, which the keyboard reaches."""
    opened(browser, page, width)
    browser.execute_script("document.querySelectorAll('details').forEach(part => part.open = true)")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    stuck = browser.execute_script(
        "return [...document.querySelectorAll('*')].filter(e => e.scrollWidth > e.clientWidth + 1"
        " && ['auto', 'scroll'].includes(getComputedStyle(e).overflowX) && e.tabIndex < 0).length"
    )
    assert stuck == 0


def test_before_stands_beside_after_where_there_is_room(browser: Any, page: Path) -> None:
    places = (
        "return [...document.querySelectorAll('.beside img')].map(image => "
        "{ const place = image.getBoundingClientRect(); return [place.x, place.y]; })"
    )
    for width, beside in ((1100, True), (700, True), (360, False)):
        opened(browser, page, width)
        (x, y), (next_x, next_y) = browser.execute_script(places)
        assert (next_y == y and next_x > x) if beside else (next_y > y and next_x == x), width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(browser: Any, page: Path, scheme: str) -> None:
    """Every text against the colour that lies behind it, in the page and in its figures."""
    opened(browser, page, scheme=scheme)
    browser.execute_script("document.querySelectorAll('details').forEach(part => part.open = true)")
    found = browser.execute_script(
        """
        const texts = [...document.querySelectorAll('body *')].filter(e =>
          [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())
          && !['SCRIPT', 'STYLE', 'title', 'desc'].includes(e.tagName) && !e.closest('.skip'));
        return texts.map(e => {
          let ground = e, behind = 'rgba(0, 0, 0, 0)';
          while (ground && behind === 'rgba(0, 0, 0, 0)') {
            behind = getComputedStyle(ground).backgroundColor; ground = ground.parentElement;
          }
          const style = getComputedStyle(e);
          const ink = e instanceof SVGElement ? style.fill : style.color;
          return [e.textContent.trim().slice(0, 40), ink, behind];
        });
        """
    )
    assert len(found) > 200
    weak = [(text, ink, behind) for text, ink, behind in found if contrast(ink, behind) < CONTRAST]
    assert not weak, weak[:5]
    body = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (luminance(body) < 0.1) == (scheme == "dark")


def test_the_keyboard_reaches_everything_and_shows_where_it_is(browser: Any, page: Path) -> None:
    opened(browser, page)
    pressed(browser, "TAB")
    first = browser.switch_to.active_element
    assert first.text == "Skip to the results" and first.rect["x"] >= 0
    pressed(browser, "ENTER")
    assert browser.execute_script("return document.activeElement.id") == "content"
    reached = set()
    for _ in range(60):
        pressed(browser, "TAB")
        tag, outline, style = browser.execute_script(
            "const e = document.activeElement, s = getComputedStyle(e);"
            "return [e.tagName, parseFloat(s.outlineWidth), s.outlineStyle]"
        )
        if tag == "BODY":
            break
        assert outline >= 2 and style != "none", tag
        reached.add(tag)
    assert {"BUTTON", "DIV", "A", "SUMMARY"} <= reached


def test_a_table_is_sorted_by_keyboard_and_says_so(browser: Any, page: Path) -> None:
    from selenium.webdriver.common.by import By

    opened(browser, page)
    table = browser.find_element(By.CSS_SELECTOR, "table.sortable")
    button = table.find_elements(By.CSS_SELECTOR, "thead button")[1]

    def names() -> list[str]:
        rows = table.find_elements(By.CSS_SELECTOR, "tbody th .name")
        return [row.text for row in rows]

    browser.execute_script("arguments[0].focus()", button)
    pressed(browser, "ENTER")
    assert names() == ["ppo", "sac", "td3"]
    head = table.find_elements(By.CSS_SELECTOR, "thead th")[1]
    assert head.get_attribute("aria-sort") == "ascending"
    pressed(browser, "ENTER")
    assert names() == ["td3", "sac", "ppo"]
    assert head.get_attribute("aria-sort") == "descending"


def test_a_screen_reader_is_told_what_there_is(browser: Any, page: Path) -> None:
    """The browser's own tree of accessible names: landmarks, headings, images, tables, links."""
    from selenium.webdriver.support.wait import WebDriverWait

    def whole_tree(browser: Any) -> Any:
        """None while the browser is still at it."""
        nodes = browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
        roles = {node.get("role", {}).get("value") for node in nodes if not node.get("ignored")}
        return nodes if "contentinfo" in roles else None

    opened(browser, page)
    browser.execute_cdp_cmd("Accessibility.enable", {})
    nodes = WebDriverWait(browser, 30).until(whole_tree)
    told: dict[str, list[str]] = {}
    levels = []
    for node in nodes:
        role = node.get("role", {}).get("value")
        if node.get("ignored") or role is None:
            continue
        told.setdefault(role, []).append(node.get("name", {}).get("value", ""))
        if role == "heading":
            properties = {p["name"]: p["value"].get("value") for p in node.get("properties", [])}
            levels.append(properties["level"])
    for landmark in ("banner", "navigation", "main", "contentinfo"):
        assert len(told.get(landmark, [])) == 1, (landmark, {r: len(told[r]) for r in told})
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    for role in ("image", "img", "table", "region", "link", "button", "navigation"):
        assert all(name.strip() for name in told.get(role, [])), role
    assert "table" in told and len(told.get("image", told.get("img", []))) > 6
    drawn = [name for name in told.get("image", told.get("img", [])) if "drew on digits" in name]
    assert len(drawn) == 2
    links = [name for name in told["link"] if re.search(" as (PNG|CSV)$", name)]
    assert len(links) == len(set(links)) > 10


def luminance(colour: str) -> float:
    """Relative luminance of a CSS colour, as WCAG defines it."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(ink: str, behind: str) -> float:
    """21 of black on white."""
    low, high = sorted((luminance(ink), luminance(behind)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_by_hand() -> None:
    assert contrast("rgb(0, 0, 0)", "rgb(255, 255, 255)") == pytest.approx(21)
    assert contrast("rgb(119, 119, 119)", "rgb(255, 255, 255)") == pytest.approx(4.48, abs=0.005)
