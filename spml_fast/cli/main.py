"""`spml-fast COMMAND ...` and `python -m spml_fast COMMAND ...`: chooses the command, and imports nothing else."""

from __future__ import annotations

import importlib
import sys
from typing import NoReturn

from spml_fast import __version__
from spml_fast.cli.common import split_plugins, suggestion, without_launcher_words
from spml_fast.core import help_text
from spml_fast.core.errors import fail, run_command

COMMANDS = {
    "train": "train a classifier on partly labelled images; without options on embedded digit scenes",
    "prepare": "turn images and their annotations (a table, VOC, COCO, YOLO and others) into a data set, or pack it",
    "evaluate": "metrics of a trained run on a split",
    "calibrate": "thresholds of the classes and calibrated probabilities, from a validation split",
    "predict": "the classes of new images",
    "explain": "images with the class activation maps of their classes",
    "suggest": "labels that are probably missing or wrong",
    "review": "a page of suggestions on this machine, whose decisions are written to a file at once",
    "relabel": "a new version of a data set's labels, from decisions about suggestions",
    "diagnose": "what a run's class activation maps show, in figures",
    "export": "a trained run as ONNX, as safetensors, or as a folder for timm",
    "push": "a trained run with its model card on the Hugging Face Hub, or in a folder",
    "report": "an HTML page about one run or several",
    "checkpoints": "what a run can resume from, and whether it is whole",
    "reproduce": "the papers' comparison, and which of their statements hold",
    "completion": "a script with which bash, zsh or fish completes these command lines",
}


def overview() -> str:
    """The commands, a line each."""
    lines = ["usage: spml-fast COMMAND [OPTIONS]", "", "commands:", *help_text.table_lines(COMMANDS.items(), 11), ""]
    lines += help_text.example_lines(
        [
            ("spml-fast train", "the digit scenes, a minute or two"),
            ("spml-fast prepare csv --table labels.csv --images . --out data/mine", "a table of your own"),
            ("spml-fast train --data.dir data/mine --method ll_r", "your own images"),
        ]
    )
    about = """`spml-fast COMMAND --help` explains a command's options; `spml-fast train --help` names the methods,
    heads and recipes, and `spml-fast prepare --help` the data sets. Several GPUs or machines:
    `deepspeed --module spml_fast train ...` or `torchrun -m spml_fast train ...`."""
    lines += ["", help_text.paragraphs(about)]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit status.

    Args:
        argv: the command line without the program's name. Options that launchers add, and `--plugins`, may stand before
            the command.
    """
    words = without_launcher_words(sys.argv[1:] if argv is None else argv)
    at = 0
    while at < len(words) and words[at].startswith("--plugins"):
        at += 1 if "=" in words[at] else 2
    before, rest = words[:at], words[at:]
    if not rest or rest[0] in ("-h", "--help"):
        print(overview())
        return 0
    if rest[0] == "--version":
        print(f"spml_fast {__version__}")
        return 0
    command = rest[0]
    if command not in COMMANDS:
        hint = suggestion(f"--{command}", [f"--{name}" for name in COMMANDS]).replace("--", "")
        fail(f"there is no command {command!r}{hint or '; choose one of ' + ', '.join(COMMANDS)}", status=2)
    plugins = [word for name in split_plugins(before)[1] for word in ("--plugins", name)]
    status: int = importlib.import_module(f"spml_fast.cli.{command}").main([*plugins, *rest[1:]])
    return status


def entry() -> NoReturn:
    """The console script `spml-fast`."""
    run_command(main)
