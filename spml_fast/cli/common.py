"""What every command shares: its parser, the options that several have, and how they are checked."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import io
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from spml_fast.core import env, help_text
from spml_fast.core.errors import UserError, fail
from spml_fast.core.invocation import program
from spml_fast.core.outputs import Kind, OutputFile
from spml_fast.core.text import in_whole_words, without_controls

if TYPE_CHECKING:
    import torch

PLUGINS_HELP = (
    "import this module (or FILE.py) first, which registers methods, heads or data sets; may be given several times"
)


class ParserFound(Exception):
    """Ends a command at the point where it would read its command line; holds the parser."""

    def __init__(self, parser: Parser) -> None:
        super().__init__()
        self.parser = parser


class Parser(argparse.ArgumentParser):
    """Says what is wrong with a command line in one sentence, with the closest option; exit status 2.

    Attributes:
        asked: hand the parser over (`ParserFound`) instead of parsing; for `parser_of`.
    """

    asked: ClassVar[bool] = False

    def parse_known_args(self, *args: Any, **more: Any) -> Any:
        """As argparse's, which all its ways to parse go through."""
        if Parser.asked:
            raise ParserFound(self)
        return super().parse_known_args(*args, **more)

    def error(self, message: str) -> NoReturn:
        """Print the message on one line and leave."""
        text = " ".join(message.split())
        prefix = "unrecognized arguments: "
        hint = ""
        if text.startswith(prefix):
            hint = suggestion(text.removeprefix(prefix).split()[0], self._option_string_actions)
        fail(f"{text}{hint} (--help lists every option)", status=2)


def parser_of(command: str) -> Parser:
    """The parser of a command, any but `train`, whose options depend on each other."""
    module = importlib.import_module(f"spml_fast.cli.{command}")
    Parser.asked = True
    try:
        module.main([])
    except ParserFound as found:
        return found.parser
    finally:
        Parser.asked = False
    raise AssertionError(f"{command} reads no command line")


def suggestion(word: str, options: Iterable[str]) -> str:
    """`; did you mean --X?` for an option that does not exist and is like another, else an empty string."""
    shown = [o for o in options if o.startswith("--") and o not in ("--local_rank", "--local-rank")]
    plain = {o.replace("_", "-"): o for o in shown}
    name = word.partition("=")[0].replace("_", "-")
    close = difflib.get_close_matches(name, plain, n=1)
    return f"; did you mean {plain[close[0]]}?" if close else ""


def command_parser(command: str, arguments: str, description: str, examples: Sequence[tuple[str, str]]) -> Parser:
    """The parser of a command; its help begins with the examples.

    Args:
        command: its name.
        arguments: what the usage line shows after the name.
        description: what the command does; paragraphs are separated by an empty line.
        examples: (words after the command's name, what they do).
    """
    prog = program(command)
    lines = help_text.example_lines([(f"{prog} {words}", what) for words, what in examples])
    parser = Parser(
        prog=prog,
        usage=help_text.usage(f"{prog} {arguments}"),
        description="\n".join(lines) + "\n\n" + help_text.paragraphs(description),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--plugins", action="append", default=[], metavar="MODULE", help=PLUGINS_HELP)
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line, whose options may stand between its other arguments, and import the plugins it names."""
    args = parser.parse_intermixed_args(argv)
    load_named_plugins(args)
    return args


def load_named_plugins(args: argparse.Namespace) -> None:
    """Import the modules of `--plugins`."""
    if args.plugins:
        # What they extend is slow to import, and most command lines name none.
        from spml_fast.runs.plugins import load_plugins

        load_plugins(args.plugins)


def add_run(parser: argparse.ArgumentParser) -> None:
    """`--run`."""
    parser.add_argument("--run", type=Path, required=True, help="run directory; its best weights are used")


def add_alpha(parser: argparse.ArgumentParser) -> None:
    """`--alpha` for commands that use one."""
    parser.add_argument(
        "--alpha", type=float, metavar="A", help="BoostLU factor, 1 for none; default the run's model.alpha_eval"
    )


def add_batch_size(parser: argparse.ArgumentParser) -> None:
    """`--batch-size`."""
    parser.add_argument("--batch-size", type=int, metavar="N", help="images a forward; default the run's")


def add_orientation(parser: argparse.ArgumentParser) -> None:
    """`--orientation` of images that are named on the command line."""
    parser.add_argument(
        "--orientation",
        choices=("exif", "ignore"),
        default="exif",
        help="of the images given. exif: turn them as their EXIF data say; ignore: take the pixels as they are "
        "stored (default: %(default)s)",
    )


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    """`--overwrite` of commands that write a file that the user names."""
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the output file even if this command did not write it"
    )


def output_file(args: argparse.Namespace, option: str, kind: Kind, mark: str) -> OutputFile | None:
    """The file that an option names, checked; None where the option was not given.

    Args:
        args: the command line, with `--overwrite`.
        option: name of the option without dashes.
        kind: of the file.
        mark: what tells that the command wrote it.

    Raises:
        UserError: the file must not be written.
    """
    path = getattr(args, option)
    if path is None:
        return None
    output = OutputFile(path, kind, mark, f"--{option}", args.overwrite)
    output.check()
    return output


def check_at_least_one(args: argparse.Namespace, *names: str) -> None:
    """Raise `UserError` for counts below 1; options that were not given (None) pass."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")


def check_alpha(alpha: float | None) -> None:
    """Raise `UserError` for a factor that is not positive and finite."""
    if alpha is not None and not 0 < alpha < float("inf"):
        raise UserError(f"--alpha is {alpha:g}; it must be greater than 0 and finite (1 turns boosting off)")


def check_one_process(command: str, more: str = "") -> None:
    """Raise `UserError` under a launcher that started several processes.

    Args:
        command: its name.
        more: what else to say of the way to start it.
    """
    if env.world_size() > 1:
        raise UserError(f"{command} works in one process; start it without a launcher{more}")


def say(text: str) -> None:
    """A line on standard error, without the control characters that names may bring along."""
    print(in_whole_words(without_controls(text), sys.stderr), file=sys.stderr, flush=True)


@contextlib.contextmanager
def ranks() -> Iterator[torch.device]:
    """Join the other ranks, if a launcher started any, and leave them in the end; gives this rank's device.

    What one rank meets, or that it is gone, ends all of them with one sentence.
    """
    from spml_fast.training.engine import init_distributed, shutdown_distributed
    from spml_fast.training.peers import reporting

    device = init_distributed()
    with reporting():
        yield device
    shutdown_distributed()


def print_any_text() -> None:
    """Have standard output escape what the terminal's encoding lacks, such as characters of a class name."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def default_device() -> torch.device:
    """The first GPU, or the CPU where there is none."""
    import torch

    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def write_failed(path: Path, error: OSError) -> UserError:
    """The error to raise for a file that cannot be written."""
    return UserError(f"{path} cannot be written: {error.strerror}")


def without_launcher_words(argv: Sequence[str]) -> list[str]:
    """The command line without the `--local_rank` that launchers add."""
    out: list[str] = []
    words = iter(argv)
    for word in words:
        if word in ("--local_rank", "--local-rank"):
            next(words, None)
        elif not word.startswith(("--local_rank=", "--local-rank=")):
            out.append(word)
    return out


def split_plugins(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the command line without `--plugins`, the modules it names)."""
    rest: list[str] = []
    names: list[str] = []
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name != "--plugins":
            rest.append(word)
        elif equals:
            names.append(value)
        else:
            following: Any = next(words, None)
            if following is None:
                fail("argument --plugins: expected one argument (--help lists every option)", status=2)
            names.append(following)
    return rest, names
