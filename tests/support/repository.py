"""Git repositories with a few commits."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path


def repository(folder: Path, *commits: Mapping[str, str]) -> Path:
    """A repository on branch main: each commit has these files alone, texts by path."""

    def git(*words: str) -> None:
        who = ("-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false")
        subprocess.run(("git", *who, *words), cwd=folder, check=True, capture_output=True)

    folder.mkdir()
    git("init", "--quiet", "--initial-branch", "main")
    for number, files in enumerate(commits):
        if number:
            git("rm", "-r", "--quiet", ".")
        for name, text in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        git("add", "--all")
        git("commit", "--quiet", "--message", f"commit {number}")
    return folder
