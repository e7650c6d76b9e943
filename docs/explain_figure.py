"""Makes the figures of maps: docs/explain.png, one run on digit scenes, and docs/compare.png, several runs.

    python docs/explain_figure.py --work FOLDER [--only full "LL-R + BoostLU"]

Four trainings of a minute or two on two cores; those that are already in the folder are taken as they are. The pages
are written with a palette, which is a third of the bytes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from PIL import Image

DOCS = Path(__file__).resolve().parent
# Of the pictures.
COLOURS = 256

# Folders are the titles of columns; each with its recipe and options.
RUNS = {
    "full": ("digits", "--method", "full", "--model.alpha_train", "1"),
    "AN": ("digits", "--method", "an", "--model.alpha_train", "1"),
    "LL-R + BoostLU": ("digits", "--method", "ll_r"),
    "IGNORE": ("digits_ignore",),
}


# The run of docs/explain.png.
SINGLE = "LL-R + BoostLU"


def command(folder: Path, *words: object) -> None:
    """Run `spml-fast` with these words in a folder, which the titles of pages then leave out."""
    subprocess.run([sys.executable, "-m", "spml_fast", *map(str, words)], check=True, cwd=folder)


def explain(work: Path, picture: Path, *words: object) -> None:
    """Draw a page of `explain` as a picture with a palette.

    Args:
        work: folder of the runs.
        picture: PNG file to write.
        words: of the command.
    """
    page = (work / picture.name).resolve()
    command(work, "explain", *words, "--split", "test", "--overwrite", "--out", page)
    with Image.open(page) as image:
        image.convert("RGB").quantize(COLOURS, kmeans=1).save(picture, optimize=True)


def main() -> None:
    """Train what is missing and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the data set and the runs")
    parser.add_argument("--train", type=int, default=4000, help="training images (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=12, help="of each run (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=[*RUNS], default=[*RUNS], help="runs that are compared")
    args = parser.parse_args()
    if args.only == ["full"]:
        parser.error("--only full alone has nothing to be compared with; name another run too")
    args.work.mkdir(parents=True, exist_ok=True)
    if not (args.work / "digits" / "manifest.json").is_file():
        command(args.work, "prepare", "digits", "--train", args.train, "--out", "digits")
    for name in dict.fromkeys([*args.only, SINGLE]):
        recipe, *options = RUNS[name]
        if not (args.work / name / "results.json").is_file():
            words = ["--data.dir", "digits", "--train.epochs", args.epochs, "--run.dir", name, *options]
            command(args.work, "train", "--config", recipe, *words)
    explain(args.work, DOCS / "explain.png", "--run", SINGLE, "--count", 4)
    # What the others are compared with comes first; the next one has a column more for its map with BoostLU.
    own, *others = [name for name in args.only if name != "full"]
    against = [name for name in args.only if name == "full"] + others
    words = ["--count", 3, "--top", 1, "--boosted", "--against", *against]
    explain(args.work, DOCS / "compare.png", "--run", own, *words)


if __name__ == "__main__":
    main()
