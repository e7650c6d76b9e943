"""The page in a real browser: keys are pressed, files saved, hostile names shown, and only what is in view is there.

Skipped where no Chromium is installed, or not the extra `browser` that drives it.
"""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spml_fast.analysis.review.decisions import DecisionTable, read_table
from spml_fast.cli import relabel
from spml_fast.core.outputs import DECISION_COLUMNS, OutputFile
from spml_fast.core.text import formula_safe_path
from spml_fast.data.manifest import Manifest
from tests.support.browser import find_browser, launched_browser, watched_tab
from tests.support.review import HOSTILE_CLASSES, MadePage, make_review_page
from tests.support.runs import environment

playwright = pytest.importorskip("playwright.sync_api", reason="pip install 'spml_fast[browser]' to drive a browser")
expect = playwright.expect
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_browser() is None, reason="no Chromium is installed (apt-get install chromium)"),
]
Page = Any


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One browser for all tests, which have a profile each."""
    with launched_browser() as found:
        yield found


@pytest.fixture
def tab(browser: Any) -> Iterator[Page]:
    """A tab of a new profile, in which no program may fail and nothing may ask the network."""
    with watched_tab(browser, viewport={"width": 1280, "height": 800}, accept_downloads=True) as page:
        yield page


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadePage:
    """A page of 60 suggestions as one file."""
    return make_review_page(tmp_path_factory.mktemp("review") / "review.html")


def open_page(tab: Page, made: MadePage) -> None:
    file = made.path if made.path.is_file() else made.path / "index.html"
    tab.goto(file.as_uri())
    tab.wait_for_selector("article")


def counts(tab: Page) -> str:
    return tab.inner_text("#counts")


def focused(tab: Page) -> int:
    """Place of the card that has the focus."""
    return int(tab.evaluate("document.activeElement.dataset.place"))


def shown_decisions(tab: Page) -> list[str]:
    return tab.eval_on_selector_all("article", "cards => cards.map(card => card.dataset.decision)")


def save(tab: Page, path: Path) -> Path:
    """The file that Export saves."""
    with tab.expect_download() as download:
        tab.keyboard.press("e")
    assert download.value.suggested_filename == "decisions.csv"
    download.value.save_as(path)
    return path


def test_keys_decide_undo_and_export(tab: Page, made: MadePage, tmp_path: Path) -> None:
    """The exported table is byte for byte what Python writes, and makes the labels that were decided."""
    open_page(tab, made)
    assert focused(tab) == 0
    tab.click("text=Name and files")
    tab.fill("#who", '=eva "the" first')
    tab.press("#who", "Tab")
    tab.click("article >> nth=0", position={"x": 5, "y": 5})
    for key in "arsa":
        tab.keyboard.press(key)
    assert focused(tab) == 4 and shown_decisions(tab)[:5] == ["accept", "reject", "skip", "accept", ""]
    assert "4 of 60 decided: 2 accepted, 1 rejected, 1 skipped" in counts(tab)
    tab.keyboard.press("u")
    assert focused(tab) == 3 and shown_decisions(tab)[:4] == ["accept", "reject", "skip", ""]
    # A decision that was changed goes back to what it was before.
    for key in ("Home", "r", "Control+z"):
        tab.keyboard.press(key)
    assert shown_decisions(tab)[0] == "accept" and focused(tab) == 0
    tab.keyboard.press("End")
    assert focused(tab) == 59
    # All others, so that every hostile name is in the table.
    tab.keyboard.press("Home")
    for number in range(60):
        tab.keyboard.press("ar"[number % 2])
    table = save(tab, tmp_path / "decisions.csv")
    rows = read_table(table)
    assert len(rows) == 60 and {row[8] for row in rows} == {'\'=eva "the" first'}
    assert [row[7] for row in rows].count("accept") == 30
    # Python's own table of the same decisions.
    twin = DecisionTable(OutputFile(tmp_path / "twin.csv", "csv", ",".join(DECISION_COLUMNS), "--out"), made.data)
    twin.apply({place: (row[7], row[9], '=eva "the" first') for place, row in enumerate(rows)})
    assert table.read_bytes() == (tmp_path / "twin.csv").read_bytes()


def test_exported_decisions_relabel(tab: Page, tmp_path: Path) -> None:
    """What was decided in the browser is what the new Manifest holds."""
    made = make_review_page(tmp_path / "review.html", rows=30)
    open_page(tab, made)
    tab.select_option("#order", "sure")
    tab.evaluate("document.activeElement.blur()")
    for key in "arararararar":
        tab.keyboard.press(key)
    table = save(tab, tmp_path / "decisions.csv")
    rows = read_table(table)
    assert len(rows) == 12
    relabel.main(["--manifest", str(made.manifest.folder), "--decisions", str(table), "--out", str(tmp_path / "new")])
    new = Manifest(tmp_path / "new").split("train")
    row_of = {formula_safe_path(new.relative_path(i)): i for i in range(len(new))}
    for path, name, *_, suggestion, _, _, decision, _, _ in rows:
        class_id = HOSTILE_CLASSES.index(name.removeprefix("'") if name.startswith("'=") else name)
        expected = int((suggestion == "positive") == (decision == "accept"))
        assert new.observed.codes_at([row_of[path]], [class_id]).tolist() == [expected]


def test_decisions_stay_in_the_browser(tab: Page, made: MadePage) -> None:
    """A page that is closed and opened again goes on; another page of the same run has its own."""
    open_page(tab, made)
    for key in "ar":
        tab.keyboard.press(key)
    tab.reload()
    tab.wait_for_selector("article")
    assert "2 of 60 decided: 1 accepted, 1 rejected" in counts(tab)
    names = tab.evaluate("Object.keys(localStorage)")
    assert any(made.data["id"] in name and made.data["run"] in name for name in names)


def test_a_browser_that_refuses_to_store_is_told(tab: Page, made: MadePage) -> None:
    tab.add_init_script("Storage.prototype.setItem = () => { throw new DOMException('no', 'QuotaExceededError'); };")
    open_page(tab, made)
    assert "does not keep your decisions (QuotaExceededError); export them" in tab.inner_text("#problem")
    tab.keyboard.press("a")
    assert "1 of 60 decided" in counts(tab) and tab.is_visible("#problem")


def test_a_table_is_loaded(tab: Page, made: MadePage, tmp_path: Path) -> None:
    """What was exported comes back in another browser, and rows of other pages are counted."""
    open_page(tab, made)
    for key in "arsar":
        tab.keyboard.press(key)
    table = save(tab, tmp_path / "decisions.csv")
    before = shown_decisions(tab)
    tab.evaluate("localStorage.clear()")
    tab.reload()
    tab.wait_for_selector("article")
    assert "0 of 60 decided" in counts(tab)
    with table.open("a", encoding="utf-8") as file:
        file.write("elsewhere.jpg,cat,unknown,0.9,positive,train,r,accept,,\n")
    tab.set_input_files("#file", table)
    expect(tab.locator("#problem")).to_contain_text("1 rows of decisions.csv are not on this page")
    assert (
        "5 of 60 decided: 2 accepted, 2 rejected, 1 skipped" in counts(tab) and shown_decisions(tab)[:5] == before[:5]
    )
    (tmp_path / "other.csv").write_text("path,positives\na,b\n")
    tab.set_input_files("#file", tmp_path / "other.csv")
    expect(tab.locator("#problem")).to_contain_text("other.csv is no table of decisions: it has no column class")


def test_filters(tab: Page, made: MadePage) -> None:
    open_page(tab, made)
    rows = made.data["rows"]

    def shown() -> str:
        return tab.inner_text("#shown")

    tab.select_option("#kind", "wrong")
    wrong = sum(known != 0 for known in rows["known"])
    assert shown() == f"{wrong} of 60 shown"
    tab.select_option("#kind", "")
    tab.select_option("#class", "2")
    assert shown() == f"{rows['class'].count(2)} of 60 shown"
    tab.select_option("#class", "")
    tab.fill("#low", "0.9")
    tab.press("#low", "Tab")
    assert shown() == f"{sum(float(p) >= 0.9 for p in rows['probability'])} of 60 shown"
    tab.fill("#low", "0.9999999")
    tab.press("#low", "Tab")
    assert tab.is_visible("#empty")
    tab.fill("#low", "0")
    tab.press("#low", "Tab")
    tab.select_option("#decision", "open")
    tab.evaluate("document.activeElement.blur()")
    tab.keyboard.press("a")
    # Nothing jumps away under the hand; the list is put in order on request.
    assert shown() == "all shown"
    tab.click("#again")
    assert shown() == "59 of 60 shown"


CHOOSE = """pointed => {
  const kind = document.getElementById("kind");
  kind.focus();
  kind.dispatchEvent(new Event(pointed ? "pointerdown" : "keydown"));
  kind.value = "missing";
  kind.dispatchEvent(new Event("change"));
}"""


def test_keys_decide_again_after_a_filter(tab: Page, made: MadePage) -> None:
    """Esc leaves a field, and a choice by pointer goes back to the cards; by keyboard the field stays, to go on in."""
    open_page(tab, made)
    tab.keyboard.press("f")
    assert tab.evaluate("document.activeElement.id") == "class"
    tab.keyboard.press("Escape")
    tab.keyboard.press("a")
    assert counts(tab).startswith("1 of 60 decided")
    tab.evaluate(CHOOSE, False)
    assert tab.evaluate("document.activeElement.id") == "kind"
    tab.evaluate(CHOOSE, True)
    assert tab.evaluate("document.activeElement.id") == "list"
    tab.keyboard.press("r")
    assert counts(tab).startswith("2 of 60 decided")


def test_precision_against_hidden_labels(tab: Page, made: MadePage, tmp_path: Path) -> None:
    open_page(tab, made)
    truth = made.data["truth"]
    right, judged = truth.count("1"), 60 - truth.count("?")
    tab.click("[data-panel=truth]")
    assert f"{right} of {judged}" in tab.inner_text("#precision tr:last-child")
    assert f"model {100 * right / judged:.1f}% right" in tab.inner_text("#truth-line")
    tab.check("#reveal")
    assert {text for text in tab.locator(".truth").all_inner_texts()} <= {"suggestion right", "suggestion wrong"}
    # Nothing is hidden, and the head has no maps.
    plain = make_review_page(tmp_path / "plain.html", hides=False, maps=False)
    open_page(tab, plain)
    assert not tab.is_visible("[data-panel=truth]") and tab.locator("article canvas").count() == 0
    tab.keyboard.press("Enter")
    assert tab.locator("#details img:visible").count() == 1 and not tab.is_visible("#map")


def test_hostile_names_are_text(tab: Page, made: MadePage) -> None:
    """Every card, the larger view and the list of classes; nothing runs, and all names can be read."""
    open_page(tab, made)
    seen: set[str] = set()
    for _ in range(60):
        seen.add(tab.inner_text(f"article[data-place='{focused(tab)}'] .claim bdi"))
        tab.keyboard.press("Enter")
        assert tab.is_visible("#details dl")
        tab.keyboard.press("Escape")
        tab.keyboard.press("ArrowRight")
    assert tab.evaluate("window.broken") is None and tab.locator("article img[src=x]").count() == 0
    assert HOSTILE_CLASSES[0] in seen and HOSTILE_CLASSES[1] in seen and HOSTILE_CLASSES[7] in seen
    assert "\\u202eevil\\u2066" in seen, "marks of direction are spelled out"
    assert tab.title() == "Review: <b>first"
    options = tab.locator("#class option").all_inner_texts()
    assert len(options) == 1 + len(HOSTILE_CLASSES)


def test_only_what_is_in_view_is_there(tab: Page, tmp_path: Path) -> None:
    """5,000 suggestions of a folder: few cards at the beginning, in the middle and at the end, each at its place."""
    made = make_review_page(tmp_path / "many", rows=5000)
    open_page(tab, made)
    total = len(made.data["rows"]["image"])
    assert total == 5000
    tab.select_option("#order", "sure")
    for part, place in ((0, 0), (0.5, 2499), (1, 4999)):
        tab.locator("#list").evaluate("(list, part) => { list.scrollTop = part * list.scrollHeight; }", part)
        expect(tab.locator(f"article[data-place='{place}']")).to_be_visible()
        assert tab.locator("article").count() < 40
    tab.evaluate("document.activeElement.blur()")
    tab.keyboard.press("End")
    assert focused(tab) == 4999
    tab.keyboard.press("a")
    assert "1 of 5,000 decided" in counts(tab)
    # Pictures of a folder are shown as well.
    expect(tab.locator("article img").first).to_have_js_property("complete", True)
    assert tab.evaluate("[...document.querySelectorAll('article img')].some(i => i.naturalWidth > 0)")


def test_narrow_and_by_touch(browser: Any, made: MadePage) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True, color_scheme="dark")
    page = context.new_page()
    open_page(page, made)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.tap("article >> nth=0 >> text=Accept")
    assert "1 of 60 decided: 1 accepted" in counts(page)
    page.tap("article >> nth=0 >> text=Accept")
    assert "0 of 60 decided" in counts(page)
    sizes = page.eval_on_selector_all("button", "all => all.filter(b => b.offsetParent).map(b => b.offsetHeight)")
    assert min(sizes) >= 44
    context.close()


@contextlib.contextmanager
def serving(page: Path) -> Iterator[subprocess.Popen[str]]:
    """`spml-fast review`, which takes a Ctrl-C even where what started the tests ignores it; gone in the end."""
    words = [sys.executable, "-m", "spml_fast", "review", str(page)]
    server = subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    with server:
        try:
            yield server
        finally:
            server.kill()


def test_served_with_autosave(tab: Page, tmp_path: Path) -> None:
    """Every decision reaches the file; a server that is started again goes on; one that is gone is told of."""
    made = make_review_page(tmp_path / "folder", rows=30)
    for before in (0, 3):
        with serving(made.path) as server:
            assert server.stdout is not None
            tab.goto(server.stdout.readline().strip())
            tab.wait_for_selector("article")
            assert f"{before} of 30 decided" in counts(tab)
            expect(tab.locator("#counts")).to_have_text(re.compile("saved$"))
            if before == 0:
                tab.click("[data-panel=more]")
                tab.fill("#who", "eva\tk")
                tab.evaluate("document.activeElement.blur()")
            for key in "ars" if before == 0 else ["End", "a", "u"]:
                tab.keyboard.press(key)
            expect(tab.locator("#counts")).to_have_text(re.compile("3 of 30 decided.* saved$"))
            rows = read_table(made.path / "decisions.csv")
            assert sorted(row[7] for row in rows) == ["accept", "reject", "skip"] and rows[0][8] == "eva k"
            # A picture comes over the same address.
            expect(tab.locator("article img").first).to_have_js_property("complete", True)
            assert tab.evaluate("[...document.querySelectorAll('article img')].some(i => i.naturalWidth > 0)")
            server.send_signal(signal.SIGINT)
            assert server.wait(30) == 0 and "next: python -m spml_fast relabel --manifest" in server.stdout.read()
    assert not tab.is_visible("#problem")
    tab.keyboard.press("a")
    expect(tab.locator("#problem")).to_contain_text("Not saved: spml-fast review does not answer. Export")
    # What the browser itself says of a refused connection.
    assert all("ERR_CONNECTION_REFUSED" in text for text in tab.expected_problems)
    tab.expected_problems.clear()
