"""How quickly a report makes and shows its table of classes, in a real browser.

    python benchmarks/bench_report.py [--classes 9668] [--runs 2] [--page PAGE] [--json OUT]

Needs a Chromium on this machine and `pip install 'spml_fast[browser]'`. Runs are made up, of so many classes of which
about 20 images each are known, unless a page is given. Times are those of the page's program alone: sorting by another
column, finding, going from row to row with the keys; scrolling is the time between frames, so 16.7 ms is the least.
What `evaluation.json` costs is the time to make the record from scores that are there.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bench_review import SIZES, summary
from benchmarks.machine import machine
from spml_fast.core.errors import UserError, run_command
from spml_fast.core.outputs import add_json_option, json_output
from tests.support.browser import launched_browser
from tests.support.report import make_large_run

_SCROLL = """async (frames) => {
  const list = document.getElementById("body");
  list.scrollTop = 0;
  const times = [];
  let last = await new Promise(requestAnimationFrame);
  for (let k = 0; k < frames; k += 1) {
    const before = list.scrollTop;
    list.scrollTop += 120;
    if (list.scrollTop === before) throw new Error("the table is at its end; give more --classes");
    const now = await new Promise(requestAnimationFrame);
    times.push(now - last);
    last = now;
  }
  return times;
}"""
_SORT = """async (count) => {
  const times = [];
  const heads = document.querySelectorAll("#heads button");
  for (let k = 0; k < count; k += 1) {
    const start = performance.now();
    heads[k % heads.length].click();
    times.push(performance.now() - start);
    await new Promise(requestAnimationFrame);
  }
  return times;
}"""
_FIND = """async (count) => {
  const times = [];
  const field = document.getElementById("find");
  for (let k = 0; k < count; k += 1) {
    field.value = String(k);
    const start = performance.now();
    field.dispatchEvent(new Event("input"));
    times.push(performance.now() - start);
    await new Promise(requestAnimationFrame);
  }
  field.value = "";
  field.dispatchEvent(new Event("input"));
  return times;
}"""
_KEYS = """async (count) => {
  const times = [];
  document.querySelector(".row").focus();
  for (let k = 0; k < count; k += 1) {
    const start = performance.now();
    document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowDown", bubbles: true }));
    times.push(performance.now() - start);
    await new Promise(requestAnimationFrame);
  }
  return times;
}"""


def measure(browser: Any, page: Path, size: tuple[int, int]) -> dict[str, Any]:
    """Loading, scrolling, sorting, finding and keys in a window of one size."""
    context = browser.new_context(viewport={"width": size[0], "height": size[1]})
    tab = context.new_page()
    tab.goto(page.as_uri())
    tab.wait_for_selector(".row")
    found: dict[str, Any] = {
        "loaded_ms": tab.evaluate("performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd"),
        "rows": tab.locator(".row").count(),
        "scroll": summary(tab.evaluate(_SCROLL, 200)),
        "sort": summary(tab.evaluate(_SORT, 24)),
        "find": summary(tab.evaluate(_FIND, 40)),
        "keys": summary(tab.evaluate(_KEYS, 100)),
    }
    context.close()
    return found


def main() -> None:
    """Make the page, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=9668, help="of each run (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=2, help="settings that are compared (default: %(default)s)")
    parser.add_argument("--page", type=Path, help="a page of `report` instead")
    add_json_option(parser)
    args = parser.parse_args()
    output = json_output(args, "bench_report")
    if args.classes < 300 or args.runs < 1:
        raise UserError("--classes must be at least 300, of which something scrolls, and --runs at least 1")
    results: dict[str, Any] = {"machine": machine(torch.device("cpu"))}
    with launched_browser() as browser, tempfile.TemporaryDirectory() as folder:
        page = args.page or _made(Path(folder), args.classes, args.runs, results)
        results |= {"bytes": page.stat().st_size, "browser": browser.version}
        print(f"{page.stat().st_size / 1e6:.1f} MB, Chromium {browser.version}")
        for name, size in SIZES.items():
            found = results[name] = measure(browser, page.resolve(), size)
            print(f"{size[0]} px: page read after {found['loaded_ms']:.0f} ms, {found['rows']} rows in the page")
            for what in ("scroll", "sort", "find", "keys"):
                values = found[what]
                print(
                    f"  {what:<7} median {values['median_ms']:6.1f} ms, 95% {values['p95_ms']:6.1f}, "
                    f"longest {values['longest_ms']:6.1f}"
                )
    if output is not None:
        output.write_json(results)


def _made(folder: Path, classes: int, runs: int, results: dict[str, Any]) -> Path:
    """A page of made-up runs; notes what it took."""
    from spml_fast.analysis.report.page import make_page

    methods = ("an", "ll_r", "ignore", "em", "asl", "splc")
    seconds = [
        make_large_run(folder / f"run-{k}", "--method", methods[k % len(methods)], classes=classes, seed=k)
        for k in range(runs)
    ]
    start = time.perf_counter()
    text = make_page([folder / f"run-{k}" for k in range(runs)])
    results |= {"page_seconds": time.perf_counter() - start, "record_seconds": seconds}
    size = (folder / "run-0" / "evaluation.json").stat().st_size
    print(f"record of a run: {seconds[0]:.1f} s from its scores, {size / 1e6:.1f} MB; ", end="")
    print(f"page: {results['page_seconds']:.1f} s, ", end="")
    path = folder / "report.html"
    path.write_text(text, encoding="utf-8")
    return path


if __name__ == "__main__":
    run_command(main)
