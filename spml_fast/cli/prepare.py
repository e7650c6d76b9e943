"""`spml-fast prepare DATASET --out DIR ...`: turn raw data into a Manifest, or pack its images into tar shards."""

from __future__ import annotations

import argparse
import sys

from spml_fast.cli.common import Parser, split_plugins, without_launcher_words
from spml_fast.core import help_text
from spml_fast.core.invocation import program
from spml_fast.core.text import without_controls

EXAMPLES = [
    ("csv --table labels.csv --images . --out data/mine", "a table of your own"),
    ("voc --root VOCdevkit/VOC2012 --out data/voc", "an official data set"),
    ("shard --manifest data/mine --out data/mine-shards", "many small files into tar files"),
]
ABOUT = """Turn raw annotations and images into a Manifest, which training reads. `{prog} DATASET --help` explains the
options of a data set."""


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, prepare, print what was found."""
    from spml_fast.prepare.build import summary
    from spml_fast.prepare.datasets import load_all
    from spml_fast.prepare.datasets.base import add_common_options
    from spml_fast.prepare.pack import command as pack
    from spml_fast.runs.plugins import load_plugins

    # What they register is part of the command line, so they come before it is parsed.
    words, plugins = split_plugins(without_launcher_words(sys.argv[1:] if argv is None else argv))
    load_plugins(plugins)
    prog = program("prepare")
    examples = help_text.example_lines([(f"{prog} {words}", what) for words, what in EXAMPLES])
    parser = Parser(
        prog=prog,
        usage=f"{prog} DATASET --out DIR [OPTIONS]",
        description="\n".join(examples) + "\n\n" + help_text.paragraphs(ABOUT.format(prog=prog)),
        epilog=help_text.paragraphs(
            f"{prog} --plugins MODULE ... imports a module (or FILE.py) first, which registers data sets."
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    subparsers = parser.add_subparsers(dest="dataset", required=True, metavar="DATASET", prog=prog)
    datasets = load_all()
    for name, candidate in datasets.items():
        text = (candidate.__doc__ or "").strip().splitlines()[0]
        subparser = subparsers.add_parser(name, help=text, description=text, allow_abbrev=False)
        candidate.add_options(subparser)
        add_common_options(subparser, candidate)
    text = "Pack the images of a Manifest into tar shards, or check shards."
    pack.add_options(subparsers.add_parser("shard", help=text, description=text, allow_abbrev=False))
    options = parser.parse_args(words)
    if options.dataset == "shard":
        print(without_controls(pack.command(options)))
        return 0
    dataset = datasets[options.dataset]
    print(without_controls(summary(dataset().prepare(options), dataset.train_options)))
    return 0
