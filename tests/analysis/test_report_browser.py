"""The report in a real browser: hostile names, sorting, finding, keys, a narrow window, dark mode, print, no network.

Skipped where no Chromium is installed, or not the extra `browser` that drives it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spml_fast.analysis.report.page import make_page
from tests.support.browser import find_browser, launched_browser, watched_tab
from tests.support.report import make_large_run, make_recorded_run
from tests.support.review import HOSTILE_CLASSES

playwright = pytest.importorskip("playwright.sync_api", reason="pip install 'spml_fast[browser]' to drive a browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_browser() is None, reason="no Chromium is installed (apt-get install chromium)"),
]
Page = Any
NAMES = [f"class {i}" for i in range(40)]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One browser for all tests, which have a profile each."""
    with launched_browser() as found:
        yield found


@pytest.fixture
def tab(browser: Any) -> Iterator[Page]:
    with watched_tab(browser, viewport={"width": 1280, "height": 800}) as page:
        yield page


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page whose classes, run directory and log are hostile."""
    folder = tmp_path_factory.mktemp("report")
    run = make_recorded_run(folder / '"><img src=x onerror=window.broken=1>', "--method", "an", names=HOSTILE_CLASSES)
    log = run / "metrics.jsonl"
    log.write_text(log.read_text() + '{"kind": "<script>window.broken = 1</script>"\n', encoding="utf-8")
    return written(folder / "page.html", [run])


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of two settings with two seeds each."""
    folder = tmp_path_factory.mktemp("report")
    runs = [
        make_recorded_run(folder / f"{method}-{seed}", "--method", method, names=NAMES, seed=seed)
        for method, seeds in (("an", (1, 2)), ("ll_r", (3, 4)))
        for seed in seeds
    ]
    return written(folder / "page.html", runs)


def written(path: Path, runs: list[Path]) -> Path:
    path.write_text(make_page(runs), encoding="utf-8", errors="backslashreplace")
    return path


def open_page(tab: Page, path: Path) -> None:
    tab.goto(path.as_uri())
    tab.wait_for_selector(".row")


def column(tab: Page, number: int) -> list[str]:
    """Cells of a column in the order in which they are seen."""
    return tab.eval_on_selector_all(
        ".row",
        f"rows => rows.sort((a, b) => a.dataset.place - b.dataset.place).map(row => row.children[{number}].innerText)",
    )


def test_hostile_names_are_text(tab: Page, hostile: Path) -> None:
    """Nothing runs, and names stand there as they are."""
    open_page(tab, hostile)
    seen = "\n".join(column(tab, 0))
    for name in ("<img src=x onerror=", "</script><script>window.broken = 1</script>", "{{ 7 * 7 }}", "été ☃ 漢字"):
        assert name in seen
    # A mark that would turn the text about is spelled out.
    assert "\\u202eevil" in seen and "\u202e" not in tab.inner_text("body")
    for place in range(len(HOSTILE_CLASSES)):
        tab.hover(f".row[data-place='{place}']")
    tab.fill("#find", '"window.broken')
    assert tab.locator(".row").count() == 1
    assert tab.evaluate("window.broken") is None
    assert tab.eval_on_selector_all("img[src=x]", "all => all.length") == 0
    # Had a name become a program, the policy would have stopped it and told the console.
    assert tab.evaluate("document.scripts.length") == 2


def test_sorting_finding_and_undefined_figures(tab: Page, compared: Path) -> None:
    open_page(tab, compared)
    tab.select_option("#second", "")
    values = [float(cell) for cell in column(tab, 1)]
    assert values == sorted(values, reverse=True) and len(values) > 15
    # The class without a positive is last whichever way, and its AP is absent.
    for _ in range(2):
        tab.click("#heads [data-key=ap] button")
        tab.evaluate("document.getElementById('body').scrollTop = 1e6")
        tab.wait_for_selector(".row[data-place='39']")
        last = tab.locator(".row[data-place='39']")
        assert last.locator("bdi").inner_text() == "class 39" and last.locator("[role=cell]").nth(1).inner_text() == "–"
        tab.evaluate("document.getElementById('body').scrollTop = 0")
    tab.click("#heads [data-key=name] button")
    assert tab.get_attribute("#heads [data-key=name]", "aria-sort") == "ascending"
    assert column(tab, 0)[:3] == ["class 0", "class 1", "class 10"]
    tab.fill("#find", "class 3")
    assert tab.inner_text("#found") == "11 of 40 classes"
    tab.fill("#find", "no such class")
    assert tab.locator(".row").count() == 0 and tab.inner_text("#found") == "0 of 40 classes"
    tab.fill("#find", "")
    assert "NaN" not in tab.inner_text("body") and "undefined" not in tab.inner_text("body")


def test_the_curve_follows_pointer_and_keys(tab: Page, compared: Path) -> None:
    open_page(tab, compared)
    tab.hover(".row[data-place='4']")
    name = tab.inner_text(".row[data-place='4'] bdi")
    assert tab.inner_text("#curve h3") == name
    # Both settings, with a mark each where their thresholds are.
    assert tab.locator("#curve path.line").count() == 2 and tab.locator("#curve circle.mark").count() == 2
    # From the field by Tab to the row, then on by arrows.
    tab.mouse.move(5, 5)
    tab.focus(".row[tabindex='0']")
    for key, place in (("ArrowDown", 5), ("ArrowUp", 4), ("End", 39), ("Home", 0), ("PageDown", 13)):
        tab.keyboard.press(key)
        assert tab.evaluate("document.activeElement.dataset.place") == str(place)
        assert tab.inner_text("#curve h3") == tab.inner_text(f".row[data-place='{place}'] bdi")


def test_points_of_the_curve_are_those_of_the_record(tab: Page, compared: Path) -> None:
    """The bytes that the program reads: the last point has every positive, at the precision of predicting all."""
    open_page(tab, compared)
    found = tab.evaluate(
        """() => {
          const data = JSON.parse(document.getElementById("class-data").textContent);
          const curves = makeCurves(data, makeFigures(data));
          const one = data.groups[1];
          return data.names.map((_, row) => [one.positives[row], curves.points(one, row)]);
        }"""
    )
    for positives, points in found:
        assert len(points) == min(positives, 32) if positives else points == []
        assert all(0 <= value <= 1 for point in points for value in point)
        if positives:
            assert points[-1][0] == 1


def test_the_difference_of_two_settings(tab: Page, compared: Path) -> None:
    open_page(tab, compared)
    first, second, gain = (column(tab, k) for k in (1, 2, 3))
    for a, b, difference in zip(first, second, gain, strict=True):
        assert float(difference) == pytest.approx(float(b) - float(a), abs=0.11)
    tab.select_option("#first", "1")
    assert column(tab, 1) != first


@pytest.mark.parametrize("dark", [False, True])
def test_a_narrow_window_cuts_nothing_off(browser: Any, compared: Path, hostile: Path, dark: bool) -> None:
    scheme = "dark" if dark else "light"
    for path in (compared, hostile):
        with watched_tab(browser, viewport={"width": 390, "height": 844}, color_scheme=scheme) as tab:
            open_page(tab, path)
            assert tab.evaluate("document.documentElement.scrollWidth") <= 390
            wider = tab.evaluate(
                """() => [...document.querySelectorAll("main *")].filter(one => {
                  const style = getComputedStyle(one);
                  return one.clientWidth && one.scrollWidth > one.clientWidth + 1 && style.overflowX !== "visible"
                    && style.textOverflow !== "ellipsis";
                }).map(one => one.outerHTML.slice(0, 80))"""
            )
            assert wider == []
            outside = tab.evaluate(
                """() => [...document.querySelectorAll("main td, main dd, main p, main h3, main svg, main .card")]
                  .filter(one => one.getClientRects().length && one.getBoundingClientRect().right > 390.5)
                  .map(one => one.outerHTML.slice(0, 80))"""
            )
            assert outside == []


def test_cards_are_dark_in_dark_mode(browser: Any, compared: Path) -> None:
    brightness = {}
    for scheme in ("light", "dark"):
        with watched_tab(browser, viewport={"width": 1280, "height": 800}, color_scheme=scheme) as tab:
            open_page(tab, compared)
            brightness[scheme] = [
                sum(int(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3]) / 3
                for colour in tab.evaluate(
                    """["body", ".card", "table", "input", "#heads"].map(
                      what => getComputedStyle(document.querySelector(what)).backgroundColor)"""
                )
            ]
    assert min(brightness["light"]) > 200 and max(brightness["dark"]) < 60


def test_all_rows_are_printed(tab: Page, compared: Path) -> None:
    open_page(tab, compared)
    assert tab.locator(".row").count() < 40
    tab.emulate_media(media="print")
    tab.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert tab.locator(".row").count() == 40
    boxes = tab.evaluate("[...document.querySelectorAll('.row')].map(row => row.getBoundingClientRect().top)")
    assert boxes == sorted(boxes) and len(set(boxes)) == 40
    assert not tab.is_visible("nav") and not tab.is_visible(".tools")
    tab.evaluate("dispatchEvent(new Event('afterprint'))")
    assert tab.locator(".row").count() < 40


def test_thousands_of_classes_have_few_rows_in_the_page(tab: Page, tmp_path: Path) -> None:
    make_large_run(tmp_path / "run", classes=9668)
    path = written(tmp_path / "page.html", [tmp_path / "run"])
    assert path.stat().st_size < 2_500_000
    open_page(tab, path)
    assert tab.inner_text("#found") == "9,668 classes" and tab.locator(".row").count() < 40
    tab.focus(".row[tabindex='0']")
    tab.keyboard.press("End")
    assert tab.evaluate("document.activeElement.dataset.place") == "9667" and tab.locator(".row").count() < 60
    tab.fill("#find", "class 123")
    assert tab.inner_text("#found") == "11 of 9,668 classes"
