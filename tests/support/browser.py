"""A browser of this machine that shows pages of the program, and tells of everything that goes wrong in them."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from typing import Any

from spml_fast.core.errors import UserError

# Milliseconds.
TIMEOUT = 180_000
# Without a network, and without what a desktop's browser does besides.
OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def find_browser() -> str | None:
    """A Chromium of this machine; None where there is none."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextlib.contextmanager
def launched_browser() -> Iterator[Any]:
    """A browser of playwright's, as long as it is needed.

    Raises:
        UserError: there is none on this machine, or not the package that drives it.
    """
    program = find_browser()
    if program is None:
        raise UserError("there is no Chromium on this machine; install one (apt-get install chromium)")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise UserError("the package that drives a browser is missing: pip install 'spml_fast[browser]'") from error
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=OPTIONS, timeout=TIMEOUT)
        try:
            yield browser
        finally:
            browser.close()


def _outside(url: str) -> bool:
    return not url.startswith(("file:", "data:", "blob:", "http://127.0.0.1:"))


@contextlib.contextmanager
def watched_tab(browser: Any, **options: Any) -> Iterator[Any]:
    """A tab of a new profile, in which no program may fail and nothing may ask the network.

    What goes wrong is listed in its `expected_problems`, from which a test takes what it expects.

    Args:
        browser: of playwright.
        options: of the profile.
    """
    context = browser.new_context(**options)
    # Enough on a machine that is busy with other things.
    context.set_default_timeout(TIMEOUT)
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: problems.append(request.url) if _outside(request.url) else None)
    page.expected_problems = problems
    yield page
    context.close()
    assert problems == []
