"""A page as the documentation shows it: wide and light, and parts of it narrow and dark beside that.

    python benchmarks/page_picture.py PAGE --out PICTURE.png [--height 900] [--wide ID] [--narrow ID ...] [--keys K ..]

Needs a Chromium on this machine and `pip install 'spml_fast[browser]'`. docs/report.png and docs/review.png are of
digit scenes:

    spml-fast train --config digits --run.dir runs/digits
    spml-fast report runs/digits --out report.html
    python benchmarks/page_picture.py report.html --out docs/report.png --wide classes --narrow figures mistakes
    spml-fast suggest --run runs/digits --top 200 --page review.html
    python benchmarks/page_picture.py review.html --out docs/review.png --narrow '' --keys a a r
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from spml_fast.core.errors import UserError, run_command
from tests.support.browser import TIMEOUT, launched_browser

WIDE, NARROW, GAP = 1180, 390, 16


def shot(
    browser: Any, page: Path, width: int, height: int, dark: bool, section: str | None, keys: Sequence[str] = ()
) -> Image.Image:
    """The window from a section on, as an image.

    Args:
        browser: of playwright.
        page: file.
        width: of the window.
        height: of the window.
        dark: its mode.
        section: id of an element at its top; None, or an empty one, for the beginning.
        keys: pressed before, as playwright calls them.
    """
    scheme = "dark" if dark else "light"
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    context.set_default_timeout(TIMEOUT)
    tab = context.new_page()
    tab.goto(page.resolve().as_uri())
    for key in keys:
        tab.keyboard.press(key)
    if section:
        if not tab.evaluate("id => document.getElementById(id) !== null", section):
            raise UserError(f"{page} has no part with the id {section}")
        tab.evaluate("id => scrollTo(0, document.getElementById(id).getBoundingClientRect().top)", section)
    tab.wait_for_timeout(200)
    picture = Image.open(io.BytesIO(tab.screenshot())).convert("RGB")
    context.close()
    return picture


def main() -> None:
    """Take the shots and put them beside each other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, help="an HTML file")
    parser.add_argument("--out", type=Path, required=True, help="the picture, PNG")
    parser.add_argument("--height", type=int, default=900, help="of the window (default: %(default)s)")
    parser.add_argument("--wide", help="id of what the wide window begins with")
    parser.add_argument(
        "--narrow", nargs="*", default=[], help="ids of what narrow windows begin with, '' for the page"
    )
    parser.add_argument("--keys", nargs="*", default=[], help="keys pressed before, such as those of a review")
    args = parser.parse_args()
    if not args.page.is_file() or args.out.suffix.lower() != ".png":
        raise UserError(f"give a page that is there, not {args.page}, and a picture named .png, not {args.out}")
    with launched_browser() as browser:
        shots = [shot(browser, args.page, WIDE, args.height, False, args.wide, args.keys)]
        shots += [shot(browser, args.page, NARROW, args.height, True, part, args.keys) for part in args.narrow]
    width = sum(one.width for one in shots) + GAP * (len(shots) - 1)
    picture = Image.new("RGB", (width, args.height), (128, 132, 138))
    at = 0
    for one in shots:
        picture.paste(one, (at, 0))
        at += one.width + GAP
    # A palette is a third of the size, and nobody sees it.
    picture.quantize(256, kmeans=1).save(args.out, optimize=True)
    print(f"{args.out}: {picture.width} x {picture.height}, {args.out.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    run_command(main)
