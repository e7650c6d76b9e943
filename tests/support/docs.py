"""The documentation's pages and their code blocks."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.paths import ROOT
from tests.support.runs import environment

PAGES = [*(ROOT / n for n in ("README.md", "CONTRIBUTING.md", "SECURITY.md")), *sorted((ROOT / "docs").rglob("*.md"))]
# What a block without a language is, by its first word.
SHELL = ("pip", "python", "deepspeed", "torchrun", "spml-fast", "pytest", "srun", "sbatch", "mkdocs", "just")
MARK = re.compile(r"<!-- (not run|run by): (.+?) -->")


@dataclass(frozen=True)
class Block:
    """A code block of a page.

    Attributes:
        page: path within the repository.
        line: where it begins, counted from 1.
        language: as the fence says; of an indented block bash or text, by its first word.
        title: the fence's title, the name of a file that the block is.
        text: without indentation.
        not_run: why it is not run here; empty where it is.
        run_by: the test that runs it, where it is not one of tests/docs; empty else.
    """

    page: str
    line: int
    language: str
    title: str
    text: str
    not_run: str = ""
    run_by: str = ""

    @property
    def where(self) -> str:
        """For messages."""
        return f"{self.page}:{self.line}"


def code_blocks(path: Path) -> list[Block]:
    """All code blocks of a page, fenced and indented ones, in order."""
    page = str(path.relative_to(ROOT))
    lines = path.read_text(encoding="utf-8").splitlines()
    blocks: list[Block] = []
    i = 0
    while i < len(lines):
        start = i
        mark = MARK.fullmatch(lines[i - 1]) if i else None
        reasons = {"not_run": "", "run_by": ""}
        if mark is not None:
            reasons[mark[1].replace(" ", "_")] = mark[2]
        fence = re.fullmatch(r"( *)```(\w*)(?: title=\"(.+)\")?", lines[i])
        if fence is not None:
            end = next((j for j in range(i + 1, len(lines)) if lines[j].strip() == "```"), None)
            assert end is not None, f"{page}:{i + 1}: the block has no end"
            text = textwrap.dedent("\n".join(lines[i + 1 : end]))
            blocks.append(Block(page, start + 1, fence[2], fence[3] or "", text, **reasons))
            i = end + 1
        elif lines[i].startswith("    ") and (i == 0 or not lines[i - 1] or mark is not None):
            while i < len(lines) and (lines[i].startswith("    ") or not lines[i]):
                i += 1
            text = textwrap.dedent("\n".join(lines[start:i])).strip("\n")
            language = "bash" if text.split()[0] in SHELL else "text"
            blocks.append(Block(page, start + 1, language, "", text, **reasons))
        else:
            i += 1
    return blocks


def block_with(path: Path, beginning: str) -> Block:
    """The block of a page whose text starts so."""
    return next(b for b in code_blocks(path) if b.text.startswith(beginning))


def files_of(path: Path) -> dict[str, str]:
    """Name -> text of the files that a page shows."""
    return {b.title: b.text + "\n" for b in code_blocks(path) if b.title.endswith(".py")}


def shell_commands(text: str) -> list[list[str]]:
    """The commands of a shell block as words, comments dropped, lines that end in a backslash joined."""
    commands: list[list[str]] = []
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word and set(word) <= set("&|;"):
                if words:
                    commands.append(words)
                words = []
            else:
                words.append(word)
    return commands


# The documented training, small: what is given last counts.
SMALL = [
    *("--model.backbone", "test_resnet", "--model.pretrained", "false", "--model.output_stride", "8"),
    *("--data.image_size", "64", "--data.hflip", "0", "--train.epochs", "1", "--train.lr", "3e-3"),
]
# A process for each step, as a user's commands are, but forked from one that has imported the libraries: most of
# a small command's time is its imports.
DRIVER = """
import json, os, sys, traceback
from spml_fast.training.cluster import set_environment
set_environment()
from spml_fast.cli.main import main
import spml_fast.analysis.explain, spml_fast.analysis.suggest, spml_fast.training.trainer
for kind, content in json.load(open(sys.argv[1])):
    print("::", content if kind == "command" else "python", flush=True)
    if (child := os.fork()) == 0:
        status = 1
        try:
            status = exec(content, {}) if kind == "python" else main(content)
        except SystemExit as end:
            status = end.code
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status or 0)
    assert os.waitpid(child, 0)[1] == 0, content
"""


def run_steps(folder: Path, steps: Sequence[tuple[str, Any]]) -> str:
    """Run commands and Python code in a folder, in order; returns what they print."""
    (folder / "steps.json").write_text(json.dumps(steps), encoding="utf-8")
    return run_python(folder, "-c", DRIVER, "steps.json")


def run_python(folder: Path, *words: str, **variables: str) -> str:
    """Run Python in a folder, whose modules it finds, and return what it prints; a failure shows the rest."""
    path = os.pathsep.join([str(folder), str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=environment(PYTHONPATH=path, **variables),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout
