"""The command line of `spml-fast prepare shard`: options in, summary out."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from spml_fast.core.errors import UserError
from spml_fast.core.invocation import command_line, next_lines
from spml_fast.core.urls import location
from spml_fast.data.manifest import Manifest
from spml_fast.data.shard_check import check_shards
from spml_fast.prepare.pack.options import PackOptions
from spml_fast.prepare.pack.run import pack


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `spml-fast prepare shard`."""
    parser.add_argument("--manifest", type=location, help="Manifest whose images are packed, or its URL")
    parser.add_argument(
        "--out", type=location, help="Manifest to write; the shards lie in its folder shards. A URL, s3://bucket/set"
    )
    parser.add_argument(
        "--check", type=location, metavar="DIR", help="compare the shards of this Manifest with their checksums instead"
    )
    parser.add_argument(
        "--work",
        type=Path,
        metavar="DIR",
        help="folder for the unfinished work of an --out at a URL (default: a cache)",
    )
    parser.add_argument("--image-root", type=location, help="image folder, when it is not where it was at preparation")
    parser.add_argument(
        "--tars", type=Path, metavar="DIR", help="the images are in the tar files (also compressed) of this folder"
    )
    parser.add_argument(
        "--short-side", type=int, metavar="N", help="shrink images to N pixels on their short side (default: copy)"
    )
    parser.add_argument("--quality", type=int, default=90, help="JPEG quality of shrunk images (default: %(default)s)")
    parser.add_argument(
        "--shard-size", type=float, default=256, metavar="MB", help="size of a shard in 10^6 bytes (%(default)s)"
    )
    parser.add_argument("--leave-out", action="store_true", help="leave out images that are missing or damaged")
    parser.add_argument(
        "--verify",
        choices=["decode", "header", "none"],
        help="check every image: decode all of it, its header, or not at all (default: header if preparation has "
        "checked the images, else decode up to 200,000)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the Manifest that is already at --out")
    parser.add_argument("--workers", type=int, help="processes (default: one per core)")


def command(options: argparse.Namespace) -> str:
    """Pack images, or check shards, as the options of `add_options` say; returns the summary.

    Raises:
        UserError: an option is missing or out of range, or as in `pack` and `check`.
    """
    if options.check is not None:
        return check(Manifest(options.check, options.image_root))
    if options.manifest is None or options.out is None:
        raise UserError("give --manifest and --out to pack images, or --check DIR to check shards")
    names = (
        "manifest",
        "out",
        "image_root",
        "work",
        "tars",
        "short_side",
        "quality",
        "leave_out",
        "verify",
        "overwrite",
    )
    chosen = {name: getattr(options, name) for name in names}
    packed = pack(PackOptions(**chosen, shard_size=int(options.shard_size * 1e6), workers=options.workers))
    return _summary(packed)


def check(manifest: Manifest) -> str:
    """Compare all shards with their checksums; returns the summary. Raises `UserError` naming a damaged shard."""
    total, files = 0, 0
    for split in manifest.splits.values():
        if split.shards is None:
            raise UserError(f"the images of {split.folder} are not in shards; there is nothing to check")
        total += check_shards(split.shards)
        files += len(split.shards.files)
    return f"{files:,} shards, {total:,} bytes: every checksum is right"


def _summary(manifest: Manifest) -> str:
    report = json.loads((manifest.folder / "report.json").read_text(encoding="utf-8"))
    made = report["shards"]
    lines = [f"{manifest.name}: {made['bytes']:,} bytes in shards"]
    for name, split in report["splits"].items():
        plural = "s" if split["shards"] != 1 else ""
        lines.append(f"  {name}: {split['samples']:,} images in {split['shards']:,} shard{plural}")
    lines += report["notes"]
    if made["left_out"]:
        lines.append(f"left out: {made['left_out']:,} images (see {manifest.folder / 'report.json'})")
    lines.append(f"Manifest: {manifest.source}")
    commands = [
        command_line("train", "--data.dir", manifest.source),
        command_line("prepare", "shard", "--check", manifest.source),
    ]
    return "\n".join([*lines, next_lines(commands)])
