"""How smoothly a review page scrolls and takes decisions, in a real browser.

    python benchmarks/bench_review.py [--rows 5000] [--page PAGE] [--json OUT]

Needs a Chromium on this machine and `pip install 'spml_fast[browser]'`. The page is made of noise with hostile names
unless one is given. The list is scrolled at every frame for some hundred frames, calmly and fast, and keys are pressed
one after the other. Times of scrolling are those between frames as the page sees them, so 16.7 ms is the least; times
of keys are those of the page's program alone, before the next frame. A list that is at its end, and keys that decide
nothing, are errors.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import machine
from spml_fast.core.errors import UserError, run_command
from spml_fast.core.outputs import add_json_option, json_output
from tests.support.browser import launched_browser
from tests.support.review import make_review_page

# A frame that takes longer is seen as a stutter, in milliseconds.
SLOW = 50.0
SIZES = {"wide": (1280, 800), "narrow": (390, 844)}
# Pixels that each frame scrolls: a turn of the wheel, and dragging the bar.
STEPS = {"calm": 60, "fast": 700}
FRAMES = 400
KEYS = 300

_SCROLL = """async ([step, frames]) => {
  const list = document.getElementById("list");
  list.scrollTop = 0;
  const times = [];
  let last = await new Promise(requestAnimationFrame);
  for (let k = 0; k < frames; k += 1) {
    const before = list.scrollTop;
    list.scrollTop += step;
    if (list.scrollTop === before) throw new Error("the list is at its end; give more --rows");
    const now = await new Promise(requestAnimationFrame);
    times.push(now - last);
    last = now;
  }
  return times;
}"""
_PRESS = """async (count) => {
  const times = [];
  for (let k = 0; k < count; k += 1) {
    const start = performance.now();
    document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key: "ars"[k % 3], bubbles: true }));
    times.push(performance.now() - start);
    await new Promise(requestAnimationFrame);
  }
  return times;
}"""


def summary(times: list[float]) -> dict[str, float]:
    """Median, 95th percentile and longest, ms, and the fraction that is no stutter."""
    values = np.array(times)
    median, high = np.percentile(values, [50, 95])
    smooth = float((values < SLOW).mean())
    return {"median_ms": float(median), "p95_ms": float(high), "longest_ms": float(values.max()), "smooth": smooth}


def measure(browser: Any, page: Path, size: tuple[int, int]) -> dict[str, Any]:
    """Loading, scrolling and deciding in a window of one size."""
    context = browser.new_context(viewport={"width": size[0], "height": size[1]})
    tab = context.new_page()
    tab.goto(page.as_uri())
    tab.wait_for_selector("article")
    loaded = tab.evaluate("performance.now()")
    found: dict[str, Any] = {"loaded_ms": loaded, "cards": tab.locator("article").count()}
    for name, step in STEPS.items():
        found[f"scroll_{name}"] = summary(tab.evaluate(_SCROLL, [step, FRAMES]))
    tab.keyboard.press("Home")
    found["decide"] = summary(tab.evaluate(_PRESS, KEYS))
    if (text := tab.locator("#counts").inner_text()) and not text.startswith(f"{KEYS:,} of "):
        raise UserError(f"{KEYS} keys were pressed, and the page says: {text}")
    context.close()
    return found


def main() -> None:
    """Make the page, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=5000, help="suggestions of the page (default: %(default)s)")
    parser.add_argument("--page", type=Path, help="a page of `suggest --page` instead")
    add_json_option(parser)
    args = parser.parse_args()
    output = json_output(args, "bench_review")
    results: dict[str, Any] = {}
    with launched_browser() as browser, tempfile.TemporaryDirectory() as folder:
        page = args.page or make_review_page(Path(folder) / "review.html", args.rows).path
        page = (page / "index.html" if page.is_dir() else page).resolve()
        results = {"machine": machine(torch.device("cpu")), "bytes": page.stat().st_size, "browser": browser.version}
        print(f"{page.stat().st_size / 1e6:.1f} MB, Chromium {browser.version}")
        for name, size in SIZES.items():
            found = results[name] = measure(browser, page, size)
            print(f"{size[0]} px: first cards after {found['loaded_ms']:.0f} ms, {found['cards']} cards in the page")
            for what in (*(f"scroll_{step}" for step in STEPS), "decide"):
                values = found[what]
                print(
                    f"  {what:<12} median {values['median_ms']:6.1f} ms, 95% {values['p95_ms']:6.1f}, longest "
                    f"{values['longest_ms']:6.1f}; {100 * values['smooth']:.1f}% under {SLOW:g} ms"
                )
    if output is not None:
        output.write_json(results)


if __name__ == "__main__":
    run_command(main)
