"""Precision of suggested label errors: judged by the run that was trained on them, and by runs that were not.

    python benchmarks/label_errors.py --out FOLDER [--images 2000] [--epochs 12] [--folds 5] [--flipped 0.1]

Digit scenes with all labels; of a fraction of the training images one positive is moved to a class that the image does
not have, so that each of them has a wrong positive and a wrong negative. A run with assumed negatives is trained on
these, and `suggest` ranks the observed positives and negatives that it contradicts, with and without `--folds`.
Precision is over as many suggestions as there are wrong labels of the kind. What is there already is not done again.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from pathlib import Path

import numpy as np

from spml_fast.data.labels import SparseLabels
from spml_fast.data.manifest import Manifest
from spml_fast.prepare.datasets.digits import prepare_digits
from spml_fast.prepare.manifest_writer import ManifestWriter


def with_wrong_labels(clean: Manifest, folder: Path, fraction: float) -> Manifest:
    """The digit scenes with observed labels some of which are wrong; the known ones stay the truth."""
    writer = ManifestWriter(folder, "digits", clean.classes, clean.image_root)
    split = clean.split("train")
    codes = split.known.rows(range(len(split)))
    rng = np.random.default_rng(0)
    for row in rng.choice(len(split), round(fraction * len(split)), replace=False):
        codes[row, rng.choice(np.flatnonzero(codes[row] == 1))] = 0
        codes[row, rng.choice(np.flatnonzero(split.known.rows([row])[0] == 0))] = 1
    writer.add_split(
        "train",
        known=split.known,
        observed=SparseLabels.from_dense(codes, 0),
        width=split.width,
        height=split.height,
        paths=[split.relative_path(row) for row in range(len(split))],
    )
    writer.copy_split(clean.split("val"), clean.meta["splits"]["val"])
    return writer.finish({})


def command(*words: object) -> None:
    """One command of ours."""
    subprocess.run([sys.executable, "-m", "spml_fast", *map(str, words)], check=True)


def precision(table: Path, data: Manifest) -> dict[str, tuple[int, int]]:
    """Of each kind of observed label: right ones among the first suggestions, as many as there are wrong labels."""
    split = data.split("train")
    row_of = {split.relative_path(row): row for row in range(len(split))}
    truth, seen = (labels.rows(range(len(split))) for labels in (split.known, split.observed))
    out = {}
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for kind, code in (("positive", 1), ("negative", 0)):
        wrong = int(((seen == code) & (truth != code)).sum())
        first = [r for r in rows if r["known"] == kind][:wrong]
        out[kind] = sum(truth[row_of[r["path"]], int(r["class"])] != code for r in first), wrong
    return out


def main() -> None:
    """Make the data, train, suggest twice, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--flipped", type=float, default=0.1)
    parser.add_argument("--image-size", type=int, default=64)
    args = parser.parse_args()
    if not 0 < args.flipped <= 1:
        parser.error("--flipped is a fraction greater than 0")
    sizes = {"train": args.images, "val": max(args.images // 5, 50), "test": 50}
    clean = prepare_digits(args.out / f"clean_{args.images}", sizes=sizes, observe="all")
    # What was made with other numbers is not taken for these.
    out = args.out / f"{args.images}_{args.flipped}_{args.image_size}_{args.epochs}"
    data = out / "wrong"
    if not data.exists():
        with_wrong_labels(clean, data, args.flipped)
    run = out / "run"
    method = ["--method", "an", "--model.alpha_train", "1", "--model.alpha_eval", "1"]
    method += ["--train.epochs", str(args.epochs), "--data.image_size", str(args.image_size)]
    command("train", "--config", "digits", *method, "--data.dir", data, "--run.dir", run)
    for name, more in (("in fold", []), ("out of fold", ["--folds", args.folds])):
        table = out / f"{name.replace(' ', '_')}.csv"
        command("suggest", "--run", run, "--csv", table, "--top", 100_000, "--min-probability", 0, *more)
        for kind, (right, wrong) in precision(table, Manifest(data)).items():
            print(f"{name}: wrong {kind}s: {right} of the first {wrong} suggestions ({right / wrong:.1%})", flush=True)


if __name__ == "__main__":
    main()
