"""How the program was started, and so how its other commands are."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

from spml_fast.core.text import printable


def is_script() -> bool:
    """Whether a script of a checkout's launch/ was started."""
    path = Path(sys.argv[0])
    return path.suffix == ".py" and path.parent.absolute().name == "launch"


def program(command: str) -> str:
    """How a command is called, for usage lines: `spml-fast train`, or `train.py` from a script of launch/."""
    name = Path(sys.argv[0]).name
    if name == f"{command}.py":
        return name
    return f"python -m spml_fast {command}" if name == "__main__.py" else f"spml-fast {command}"


def command_line(command: str, *words: object) -> str:
    """A command to type or copy, as this one was started: a script of launch/ where that was one, else `spml-fast`.

    Args:
        command: its name.
        words: what follows; each is quoted for a shell.
    """
    if is_script():
        # Without the launcher's own lines.
        start = "deepspeed --quiet" if command == "train" else "python"
        first = f"{start} {_quoted(Path(sys.argv[0]).with_name(f'{command}.py'))}"
    else:
        first = program(command)
    return " ".join([first, *map(_quoted, words)])


def _quoted(word: object) -> str:
    """A word for a shell; what a terminal would obey is escaped, and then the word is not the same any more."""
    return shlex.quote(printable(str(word)))


def next_lines(commands: Iterable[str]) -> str:
    """What to try next, one below the other."""
    return "\n".join(f"{'next:' if number == 0 else '     '} {line}" for number, line in enumerate(commands))
