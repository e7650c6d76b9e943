"""What became of mutants: kept line by line, counted, and written as a table."""

from __future__ import annotations

import json
import tomllib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.mutation.operators import Mutant

DEAD = ("killed", "timeout")


@dataclass(frozen=True)
class Equivalent:
    """A mutant that no test can kill.

    Attributes:
        file: path in the repository.
        line: text of the line.
        operator: of the mutant.
        change: of the mutant; empty for every one of that operator on the line.
        reason: why nothing changes.
    """

    file: str
    line: str
    operator: str
    reason: str
    change: str = ""

    def matches(self, mutant: Mutant) -> bool:
        """Whether it speaks of this mutant."""
        same = (self.file, self.line, self.operator) == (mutant.file, mutant.text, mutant.operator)
        return same and self.change in ("", mutant.change)


def read_equivalents(path: Path) -> list[Equivalent]:
    """Entries of equivalent.toml, none where there is no such file."""
    if not path.exists():
        return []
    return [Equivalent(**entry) for entry in tomllib.loads(path.read_text(encoding="utf-8")).get("equivalent", [])]


class Results:
    """Verdicts in a file that grows by a line a mutant.

    Args:
        folder: of that file.
        equivalents: mutants that need not die.
    """

    def __init__(self, folder: Path, equivalents: list[Equivalent]) -> None:
        self.folder, self.equivalents = folder, equivalents
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "results.jsonl"
        self.known: dict[tuple[str, str], dict[str, Any]] = {}
        self.place = 0
        self.read()

    def read(self) -> set[tuple[str, str]]:
        """Read what this or another process has added; returns key and digest of each mutant that it speaks of."""
        if not self.path.exists():
            return set()
        with self.path.open("rb") as file:
            file.seek(self.place)
            entries = [json.loads(line) for line in file]
            self.place = file.tell()
        news = {(e["key"], e["digest"]): e for e in entries}
        self.known |= news
        return set(news)

    def wanted(self, mutant: Mutant, retry: bool) -> bool:
        """Whether a mutant is to be run: it has no result, or one that a new test may have changed."""
        verdict = self.verdict(mutant)
        return verdict in ("", "error") or (retry and verdict in ("survived", "timeout"))

    def verdict(self, mutant: Mutant) -> str:
        """killed, timeout, survived, equivalent, error, or nothing."""
        entry = self.known.get((mutant.key, mutant.digest))
        result = str(entry["result"]) if entry else ""
        if result not in DEAD and any(e.matches(mutant) for e in self.equivalents):
            return "equivalent"
        return result

    def add(self, mutant: Mutant, result: str, by: str, seconds: float) -> None:
        """Keep a verdict."""
        entry = {"key": mutant.key, "digest": mutant.digest, "result": result, "by": by, "seconds": round(seconds, 2)}
        self.known[mutant.key, mutant.digest] = entry
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        if result not in DEAD:
            print(f"{result} ({seconds:.0f} s{', ' + by if by else ''}): {describe(mutant)}", flush=True)


def describe(mutant: Mutant) -> str:
    """A line for people."""
    return f"{mutant.file}:{mutant.line} {mutant.operator} [{mutant.change}] `{mutant.text}`"


def summary(mutants: list[Mutant], found: Results) -> str:
    """One line of counts."""
    counts = Counter(found.verdict(m) or "not run" for m in mutants)
    ran = counts["killed"] + counts["timeout"] + counts["survived"]
    rate = (counts["killed"] + counts["timeout"]) / max(ran, 1)
    return ", ".join(f"{n} {name}" for name, n in sorted(counts.items())) + f"; {rate:.1%} of those that can die did"


def table(mutants: list[Mutant], found: Results) -> str:
    """Counts of every file and every survivor, as Markdown."""
    names = ("killed", "timeout", "survived", "equivalent", "not run")
    files: dict[str, Counter[str]] = {}
    for mutant in mutants:
        verdict = found.verdict(mutant)
        counts = files.setdefault(mutant.file, Counter())
        counts["not run" if verdict in ("", "error") else verdict] += 1
    whole = sum(files.values(), Counter())
    lines = [
        "# Mutants and what became of them",
        "",
        "Written by `python -m tests.mutation.run --report`. A timeout counts as killed. The score is of those",
        "that were run and are not equivalent (explained in equivalent.toml). The next run goes on with the others.",
        "",
        "| file | mutants | " + " | ".join(names) + " | score |",
        "|---|" + "--:|" * (len(names) + 2),
    ]
    for file, counts in [*files.items(), ("all", whole)]:
        dead = counts["killed"] + counts["timeout"]
        ran = dead + counts["survived"]
        score = f"{dead / ran:.1%}" if ran else ""
        lines.append(f"| {file} | {counts.total()} | " + " | ".join(str(counts[n]) for n in names) + f" | {score} |")
    survivors = [m for m in mutants if found.verdict(m) == "survived"]
    lines += ["", "## Survivors", ""]
    lines += [f"- {m.file}, {m.function or 'module'}: `{m.text}`, {m.operator}: {m.change}" for m in survivors]
    return "\n".join([*lines, *(["None."] if not survivors else [])]) + "\n"
