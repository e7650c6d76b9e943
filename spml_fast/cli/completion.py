"""`spml-fast completion {bash,zsh,fish}`: a script with which a shell completes command lines."""

from __future__ import annotations

import argparse

from spml_fast.cli import common

DESCRIPTION = """Print a script that has your shell complete commands, options, their values, run directories, data sets
and recipes when you press Tab. The script asks no Python, so it answers at once; print it again after an upgrade, and
with --plugins for what your plugins register."""
EXAMPLES = [
    ("bash > ~/.local/share/bash-completion/completions/spml-fast", "bash, with the package bash-completion"),
    ("zsh > ~/.zfunc/_spml-fast", "zsh, where ~/.zfunc is in $fpath before compinit"),
    ("fish > ~/.config/fish/completions/spml-fast.fish", "fish"),
]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = common.command_parser("completion", "{bash,zsh,fish}", DESCRIPTION, EXAMPLES)
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="the shell that reads the script")
    return common.parse(parser, argv)


def main(argv: list[str] | None = None) -> int:
    """Print the script."""
    args = parse(argv)
    from spml_fast.cli.completion_script import script

    print(script(args.shell), end="")
    return 0
