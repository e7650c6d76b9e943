"""A browser of this machine that shows pages of the program, and tells of everything that goes wrong in them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

# Milliseconds.
TIMEOUT = 180_000


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
