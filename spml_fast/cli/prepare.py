#!/usr/bin/env python
"""Turn raw data into a Manifest: `python launch/prepare.py DATASET --out DIR ...`.

`python launch/prepare.py shard --manifest DIR --out DIR` packs the images of a Manifest into tar shards.
"""

from __future__ import annotations

import argparse

from spml_fast.core.errors import run_command
from spml_fast.prepare import pack
from spml_fast.prepare.build import summary
from spml_fast.prepare.datasets import load_all
from spml_fast.prepare.datasets.base import add_common_options


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, prepare, print what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    subparsers = parser.add_subparsers(dest="dataset", required=True, metavar="DATASET")
    datasets = load_all()
    for name, candidate in datasets.items():
        text = (candidate.__doc__ or "").strip().splitlines()[0]
        subparser = subparsers.add_parser(name, help=text, description=text, allow_abbrev=False)
        candidate.add_options(subparser)
        add_common_options(subparser, candidate)
    text = "Pack the images of a Manifest into tar shards, or check shards."
    pack.add_options(subparsers.add_parser("shard", help=text, description=text, allow_abbrev=False))
    options = parser.parse_args(arguments)
    if options.dataset == "shard":
        print(pack.command(options))
        return 0
    dataset = datasets[options.dataset]
    print(summary(dataset().prepare(options), dataset.train_options))
    return 0


if __name__ == "__main__":
    run_command(main)
