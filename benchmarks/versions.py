"""Two versions of this repository side by side, in checkouts of their own."""

from __future__ import annotations

import argparse
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.kernel_report import ROOT
from spml_fast.core.errors import UserError


def git(*words: str) -> str:
    """What git prints, without the end of the line. `UserError` where it fails."""
    try:
        done = subprocess.run(("git", *words), cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", "") or str(error)
        raise UserError(f"git {' '.join(words)} failed: {reason.strip()}") from error
    return done.stdout.strip()


def add_versions(parser: argparse.ArgumentParser) -> None:
    """Options that name the two versions, for `resolve`."""
    parser.add_argument("--version", default="HEAD", help="what is measured, as git names it")
    parser.add_argument("--against", default="61ba7a5", help="what it is compared with")


def resolve(version: str, against: str) -> tuple[str, str]:
    """The short hashes of `--version` and `--against`. `UserError` where they are the same commit, or none."""
    newer, older = (git("rev-parse", "--short", name) for name in (version, against))
    if newer == older:
        raise UserError(f"--version {version} and --against {against} are the same commit")
    return newer, older


@contextmanager
def checkout(version: str, folder: Path) -> Iterator[Path]:
    """A version's files in a folder of their own."""
    git("worktree", "add", "--quiet", "--detach", str(folder), version)
    try:
        yield folder
    finally:
        git("worktree", "remove", "--force", str(folder))


def import_path(tree: Path) -> str:
    """The PYTHONPATH with which a checkout imports its own modules."""
    return os.pathsep.join(map(str, (tree, tree / "kernels")))
