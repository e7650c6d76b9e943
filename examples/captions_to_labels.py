"""A table for `spml-fast prepare csv` from captions: mentioned is positive, mentioned once is unknown.

captions.csv has a row per caption with the columns `path` and `caption`, several rows for an image. words.txt has a
line per class: `dog: dog, dogs, puppy`. A class is positive if two captions of an image name it (or the one that there
is), unknown if one of several does, for that may be a slip or a guess; if none does, it is absent. Images are spread
over train, val and test by their names, so that more captions never move an image.
"""

import argparse
import csv
import hashlib
import re
import sys
from collections import defaultdict


def read_words(path):
    """Class -> pattern of its words; whole words, any case."""
    classes = {}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            name, colon, words = line.partition(":")
            listed = [re.escape(word.strip()) for word in words.split(",") if word.strip()]
            if line.strip() and not (colon and name.strip() and listed):
                sys.exit(f"error: {path}, line {number}: write `class: word, word, ...`")
            if name.strip() in classes:
                sys.exit(f"error: {path}, line {number}: class {name.strip()} has a line already")
            if line.strip():
                classes[name.strip()] = re.compile(rf"\b({'|'.join(listed)})\b", re.IGNORECASE)
    return classes


def split_of(path, val, test):
    """The split of an image, from its name alone."""
    place = int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") / 2**64
    return "test" if place < test else "val" if place < test + val else "train"


def main():
    """Read captions and words, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("captions", help="CSV with the columns path and caption")
    parser.add_argument("words", help="a line per class, `class: word, word, ...`")
    parser.add_argument("out", help="the table to write")
    parser.add_argument("--any", action="store_true", help="one caption is enough; nothing is unknown")
    parser.add_argument("--val", type=float, default=0.1, help="fraction of the images (default: %(default)s)")
    parser.add_argument("--test", type=float, default=0.3, help="fraction of the images (default: %(default)s)")
    args = parser.parse_args()
    captions = defaultdict(list)
    with open(args.captions, encoding="utf-8-sig", newline="") as file:
        for row in csv.DictReader(file):
            captions[row["path"]].append(row["caption"])
    classes = read_words(args.words)
    with open(args.out, "w", encoding="utf-8", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(["path", "positives", "unknowns", "split"])
        for path, texts in sorted(captions.items()):
            counts = {name: sum(bool(pattern.search(text)) for text in texts) for name, pattern in classes.items()}
            enough = 1 if args.any else min(2, len(texts))
            positive = [name for name, count in counts.items() if count >= enough]
            unknown = [name for name, count in counts.items() if 0 < count < enough]
            out.writerow([path, ";".join(positive), ";".join(unknown), split_of(path, args.val, args.test)])


if __name__ == "__main__":
    main()
