"""docs/gallery.md and its pictures, made again from the digit scenes.

    python benchmarks/make_gallery.py [--work FOLDER | --run RUN] [--only NAME ...]
    python benchmarks/make_gallery.py --page-only

Needs a Chromium on this machine and `pip install 'spml_fast[browser]'` for the pages; the terminal goes without.
Without `--run` the recipe `digits` is trained first, a minute or two, so that the terminal can be shown, too; `--work`
keeps that run, which then is not trained again. Commands run in that folder, so that pictures name the run as
`runs/digits`, and never a path of the machine. Each picture is made by the command that its caption names, and by
nothing else: a command that fails costs its picture alone, which is named, and the exit status is then 1. The page
shows the pictures that there are. No photograph can come in: another data set than the digit scenes is refused.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image
from rich.console import Console
from rich.text import Text

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.page_picture import shot
from spml_fast.core.errors import UserError, run_command
from spml_fast.core.progress import fitting
from tests.support.browser import launched_browser

if TYPE_CHECKING:
    from spml_fast.data.manifest import Manifest

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
# The run of the digit scenes, in the folder where commands run.
RUN = Path("runs/digits")
# Columns of a terminal at most, those of the one in which a training is shown, and pixels of a window.
COLUMNS, TERMINAL = 150, 110
WINDOW = (1180, 760)
# Colours of a picture's palette, and its most bytes.
COLOURS, LARGEST = 128, 250_000
# Fonts of others, which an image in a page never loads.
FOREIGN_FONTS = re.compile(r"@font-face\s*\{.*?\}", re.DOTALL)


@dataclass(frozen=True)
class Studio:
    """What pictures are made of.

    Attributes:
        where: folder in which commands run.
        run: of the digit scenes, as commands there name it.
        out: where pictures go.
        scratch: for what commands write.
    """

    where: Path
    run: Path
    out: Path
    scratch: Path

    def command(self, *words: str | Path) -> str:
        """What `spml-fast WORDS` prints. Raises `UserError` with its last line where it fails."""
        # What it names in the commands to try next.
        program = Path(sys.executable).with_name("spml-fast")
        start = [str(program)] if program.is_file() else [sys.executable, "-m", "spml_fast"]
        line = [*start, *(str(word) for word in words)]
        paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        done = subprocess.run(line, capture_output=True, text=True, cwd=self.where, env=environment)
        if done.returncode:
            last = (done.stderr or done.stdout).strip().splitlines()[-1:]
            raise UserError(f"spml-fast {words[0]} failed: {''.join(last)}")
        return done.stdout


def terminal(text: str, title: str) -> str:
    """Lines of a terminal as SVG, without foreign fonts.

    Args:
        text: the lines, with colours as terminals have them.
        title: of the window.
    """
    lines = Text.from_ansi(text)
    # As wide as its longest line: half of a picture need not be empty.
    width = min(COLUMNS, max(line.cell_len for line in lines.split()) + 2)
    console = Console(record=True, file=io.StringIO(), width=width)
    console.print(lines, soft_wrap=False)
    drawn = FOREIGN_FONTS.sub("", console.export_svg(title=title))
    # Its own size: a page would stretch it over its whole width.
    return re.sub(r'viewBox="0 0 (\S+) (\S+)"', r'width="\1" height="\2" \g<0>', drawn, count=1)


def save(image: Image.Image, path: Path) -> None:
    """Write a PNG with a palette. Raises `UserError` where it is too large for a page."""
    image.convert("RGB").quantize(COLOURS, kmeans=1).save(path, optimize=True)
    if path.stat().st_size > LARGEST:
        raise UserError(f"{path.name} has {path.stat().st_size / 1e3:.0f} kB; at most {LARGEST / 1e3:.0f} are shown")


def both(page: Path, out: Path, name: str, section: str | None = None) -> None:
    """A page in light and in dark, as two files.

    Args:
        page: an HTML file.
        out: folder of the pictures.
        name: of the pictures, without `-light.png`.
        section: id of what the window begins with; None for the page's beginning.
    """
    with launched_browser() as browser:
        for scheme in ("light", "dark"):
            save(shot(browser, page, *WINDOW, scheme == "dark", section), out / f"{name}-{scheme}.png")


def shoot_report(studio: Studio) -> None:
    """`spml-fast report RUN`."""
    page = studio.scratch / "report.html"
    studio.command("report", studio.run, "--out", page)
    # From its classes on: its speed is that of the machine on which the picture was made.
    both(page, studio.out, "report", "classes")


def shoot_review(studio: Studio) -> None:
    """`spml-fast suggest --page`."""
    page = studio.scratch / "review.html"
    studio.command("suggest", "--run", studio.run, "--top", "200", "--page", page)
    both(page, studio.out, "review")


def shoot_commands(studio: Studio) -> None:
    """`spml-fast evaluate`, on a terminal."""
    text = studio.command("evaluate", "--run", studio.run, "--alpha", "1", "5")
    svg = terminal(f"$ spml-fast evaluate --run RUN --alpha 1 5\n{text}", "evaluate")
    (studio.out / "evaluate.svg").write_text(svg, encoding="utf-8")


PICTURES: dict[str, Callable[[Studio], None]] = {
    "evaluate": shoot_commands,
    "report": shoot_report,
    "review": shoot_review,
}


@dataclass(frozen=True)
class Caption:
    """A picture of the page.

    Attributes:
        files: below docs/; where there are two, light and dark.
        title: of its section.
        text: what is seen.
    """

    files: tuple[str, ...]
    title: str
    text: str


CAPTIONS = [
    Caption(
        ("gallery/train.svg",),
        "Training",
        "`spml-fast train`: what is trained, how long it will take, a line an epoch, the test figures and commands to "
        "try next. A wider terminal also says which labels the method left out, and how many were hidden positives.",
    ),
    Caption(
        ("gallery/evaluate.svg",),
        "Evaluation",
        "`spml-fast evaluate --run RUN --alpha 1 5`: BoostLU can be chosen at inference, from one pass.",
    ),
    Caption(
        ("digits.png",),
        "Methods compared",
        "`spml-fast reproduce`: test mAP of the methods, plain (alpha 1) and with BoostLU x5, and precision and recall "
        "of the labels that they reject, over epochs. [The figures](results.md).",
    ),
    Caption(
        ("gallery/report-light.png", "gallery/report-dark.png"),
        "The report",
        "`spml-fast report RUN --out report.html`: one page without a network, about a run or several. "
        "[What is in it](operations.md#a-report-of-runs).",
    ),
    Caption(
        ("explain.png",),
        "What the model looks at",
        "`spml-fast explain --run RUN`: the regions that spoke for a class in red, against it in blue. "
        "[More](operations.md#what-the-model-looks-at).",
    ),
    Caption(
        ("compare.png",),
        "Runs side by side",
        "`spml-fast explain --run RUN --against FULL ... --boosted`: the maps of several runs for the same labels, and "
        "the run's map with BoostLU. [More](operations.md#what-the-model-looks-at).",
    ),
    Caption(
        ("gallery/review-light.png", "gallery/review-dark.png", "review.png"),
        "Missing labels, decided by keyboard",
        "`spml-fast suggest --run RUN --page review.html`: a page in one file. "
        "[How it is used](operations.md#a-page-to-decide-on).",
    ),
    Caption(
        ("maps.png",),
        "Maps in figures",
        "`spml-fast diagnose --run RUN --against FULL --plot maps.png`: rank correlations, highest and lowest cells. "
        "[How to read it](methods.md).",
    ),
]


def shown(caption: Caption) -> list[str]:
    """The files of a picture that there are; of an older single one (without a folder) none beside newer ones."""
    there = [name for name in caption.files if (DOCS / name).is_file()]
    newer = [name for name in there if name.startswith("gallery/")]
    return newer or there


def page() -> str:
    """The text of docs/gallery.md."""
    lines = ["# Gallery", "", "How it looks, on the [digit scenes](data.md); made by `benchmarks/make_gallery.py`.", ""]
    for caption in CAPTIONS:
        if names := shown(caption):
            lines += [f"## {caption.title}", "", caption.text, ""]
            lines += [line for name in names for line in (f"![{caption.title}]({name})", "")]
    lines += ["## Make them again", "", "```bash", "python benchmarks/make_gallery.py", "```", ""]
    lines += [
        "trains the recipe `digits` and makes the pictures of its commands (`--run RUN` takes a run of yours,",
        "`--only` some pictures, `--page-only` none). It wants a Chromium and `pip install -e '.[browser]'`. The maps",
        "of images come from `docs/explain_figure.py`.",
    ]
    return "\n".join(lines) + "\n"


def train(studio: Studio) -> None:
    """Train the recipe `digits`, and show the terminal."""
    text = studio.command("train", "--config", "digits", "--run.dir", studio.run)
    # Into a pipe a line has all of its fields; the picture is of a terminal.
    lines = [" | ".join(fitting(line.split(" | "), TERMINAL)) for line in text.splitlines()]
    svg = terminal("\n".join(["$ spml-fast train", *lines]), "train")
    (studio.out / "train.svg").write_text(svg, encoding="utf-8")


def require_digits(run: Path, where: Path) -> Manifest:
    """The data set of a run. Raises `UserError` where it is another than the digit scenes: pictures are published.

    Args:
        run: its directory.
        where: folder from which it and its data set are named.
    """
    from spml_fast.runs.open import load_run_config, open_data

    with contextlib.chdir(where):
        manifest = open_data(load_run_config(run))
    if manifest.name != "digits":
        raise UserError(f"{run} is of data set {manifest.name}; pictures are made of the digit scenes alone")
    return manifest


def main(argv: list[str] | None = None) -> int:
    """Make the pictures; 1 where one could not be made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a run of the recipe digits; default: train one")
    parser.add_argument(
        "--work", type=Path, metavar="FOLDER", help="keep the run that is trained, or take it from there"
    )
    parser.add_argument("--only", nargs="+", choices=[*PICTURES], default=[*PICTURES], help="these pictures")
    parser.add_argument("--page-only", action="store_true", help="write the page about the pictures that there are")
    args = parser.parse_args(argv)
    if args.run is not None and args.work is not None:
        raise UserError("--work is for the run that is trained; leave it out, or --run")
    failed = 0 if args.page_only else make_pictures(args)
    (DOCS / "gallery.md").write_text(page(), encoding="utf-8")
    return int(failed > 0)


def make_pictures(args: argparse.Namespace) -> int:
    """Make them; returns how many could not be made."""
    out = DOCS / "gallery"
    out.mkdir(exist_ok=True)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        where = Path.cwd() if args.run is not None else args.work or scratch
        where.mkdir(parents=True, exist_ok=True)
        studio = Studio(where, args.run or RUN, out, scratch)
        if args.run is None and not (where / RUN / "results.json").is_file():
            train(studio)
        require_digits(studio.run, where)
        for name in args.only:
            try:
                PICTURES[name](studio)
                print(f"{name}: {PICTURES[name].__doc__}")
            except UserError as error:
                failed += 1
                print(f"{name}: not made: {error}", file=sys.stderr)
    return failed


if __name__ == "__main__":
    run_command(main)
