"""Every code block of the documentation: run here, run by the test that its comment names, or marked with a reason.

Shell lines are not run but parsed by the commands' own parsers, so that an option that does not exist is found; the
tutorial's are run.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib
import json
import re
import shutil
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from spml_fast.cli.main import COMMANDS
from spml_fast.cli.parse import default_recipe_of, parse_config
from spml_fast.data.manifest import Manifest
from spml_fast.prepare.datasets.csv_table import read_table
from spml_fast.runs.recipe import check_keys
from tests.support.docs import PAGES, SMALL, Block, code_blocks, run_steps, shell_commands
from tests.support.paths import ROOT

TUTORIAL = ROOT / "docs" / "tutorial.md"
BLOCKS = [block for page in PAGES for block in code_blocks(page)]
# What stands for a file or a number in documentation, and what the parser gets instead.
STAND_INS = {"RECIPE.yaml": "digits", "RUN/config.yaml": "digits", "R": "0", "A": "5", "HOST": "node1"}
EXTRAS = re.compile(r"\.\[([\w,]+)\]")
# Programs of others, whose options are theirs.
OTHERS = {"docker", "mkdocs", "pre-commit", "just", "source", "sbatch", "."}


def ids(block: Block) -> str:
    return block.where


def of(*languages: str) -> list[Block]:
    return [b for b in BLOCKS if b.language in languages]


class Parsed(Exception):
    """A command line was parsed to its end; holds the words that the parser left to others."""

    def __init__(self, rest: list[str]) -> None:
        super().__init__()
        self.rest = rest


def parse_only(command: str, words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Have a command parse its command line and stop there; returns what it leaves to `train`.

    Raises:
        SystemExit: the command line is wrong.
    """
    depth = 0

    def stopping(name: str) -> Any:
        original = getattr(argparse.ArgumentParser, name)

        def parse(self: argparse.ArgumentParser, *args: Any, **more: Any) -> Any:
            nonlocal depth
            depth += 1
            try:
                result = original(self, *args, **more)
            finally:
                depth -= 1
            if depth == 0:
                raise Parsed(result[1] if isinstance(result, tuple) else [])
            return result

        return parse

    with monkeypatch.context() as patch:
        for name in ("parse_args", "parse_known_args", "parse_intermixed_args", "parse_known_intermixed_args"):
            patch.setattr(argparse.ArgumentParser, name, stopping(name))
        try:
            importlib.import_module(f"spml_fast.cli.{command}").main(list(words))
        except Parsed as parsed:
            return parsed.rest
    raise AssertionError(f"{command} went on without a parser")


def options_of(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The options that the help of a command (or of `prepare DATASET`) names."""
    shown: list[str] = []
    with monkeypatch.context() as patch, contextlib.suppress(SystemExit):
        patch.setattr(argparse.ArgumentParser, "_print_message", lambda self, text, file=None: shown.append(text))
        importlib.import_module(f"spml_fast.cli.{words[0]}").main([*words[1:], "--help"])
    assert shown, f"{words} has no help"
    return set(re.findall(r"--[\w.-]+", "".join(shown)))


def check_command(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A command of ours, without the program's name; brackets mark what may be left out, dots what is not shown."""
    command, *given_words = words
    assert command in COMMANDS, f"there is no command {command}"
    if "--plugins" in given_words:
        return  # test_extending.py runs these
    plain = [STAND_INS.get(w, w) for word in given_words if (w := word.strip("[]")) not in ("...", "")]
    if "..." in " ".join(given_words):
        given = {word for word in plain if word.startswith("--")}
        known = options_of([command, *plain[: command == "prepare"]], monkeypatch) if given else set()
        assert given <= known, f"{command} has no {', '.join(given - known)}"
        return
    try:
        if command == "train":
            parse_config(plain, default_recipe_of(plain))
        elif rest := parse_only(command, plain, monkeypatch):
            parse_config(rest, default_recipe_of(rest))
    except SystemExit as end:
        assert end.code == 0, f"spml-fast {command} {' '.join(plain)}"


def check_script(path: str, words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A program of benchmarks/ or tests/."""
    assert (ROOT / path).is_file(), path
    source = (ROOT / path).read_text(encoding="utf-8")
    for word in words:
        if word.startswith("--"):
            assert f'"{word}"' in source, f"{path} has no {word}"


def check_line(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One command of a shell block, or of a line of text."""
    words = [w for w in words if not re.fullmatch(r"[A-Z_]+=\S*", w)]
    while words and words[0] in ("/usr/bin/time", "-v", "srun"):
        words = words[1:]
    if not words or words[0] in OTHERS:
        return
    program, *rest = words
    if program == "pip":
        asked = {e for word in rest for e in ((EXTRAS.search(word) or [0, ""])[1]).split(",") if e}
        declared = (ROOT / "setup.py").read_text(encoding="utf-8")
        optional = tomllib.loads((ROOT / "stacks.toml").read_text(encoding="utf-8"))["optional"].values()
        known = {entry["extra"] for entry in optional}
        assert all(extra in known or f'"{extra}":' in declared for extra in asked), asked
    elif program == "pytest":
        paths = [w for w in rest if w.startswith("tests")]
        assert all((ROOT / path.split("::")[0]).exists() for path in paths), paths
    elif program == "spml-fast":
        check_command(rest, monkeypatch)
    else:
        assert program in ("python", "deepspeed", "torchrun"), f"{program} is not a program that is known here"
        script = next((i for i, w in enumerate(rest) if w.endswith(".py")), None)
        module = next((i for i, w in enumerate(rest) if w == "spml_fast"), None)
        if module is not None:
            assert rest[module - 1] in ("-m", "--module")
            check_command(rest[module + 1 :], monkeypatch)
        elif rest[0] == "-m" and rest[1].startswith("spml_kernels."):
            check_script(f"kernels/{rest[1].replace('.', '/')}.py", rest[2:], monkeypatch)
        elif script is None:
            assert "..." in rest or rest[:2] == ["-m", "venv"], " ".join(words)
        elif rest[script].startswith("launch/"):
            check_command([Path(rest[script]).stem, *rest[script + 1 :]], monkeypatch)
        else:
            check_script(rest[script], rest[script + 1 :], monkeypatch)


def test_the_pages_have_blocks():
    assert {"bash", "python", "csv", "json", "yaml", "toml", "text"} == {b.language for b in BLOCKS}
    assert len(of("python")) >= 10 and len(of("bash")) >= 25


def test_what_others_run_is_run():
    for block in of("python"):
        if block.run_by:
            test = (ROOT / block.run_by).read_text(encoding="utf-8")
            assert block.text.splitlines()[0] in test, f"{block.where}: {block.run_by} does not name its first line"


@pytest.mark.parametrize("block", of("bash"), ids=ids)
def test_shell_lines_are_accepted(block, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    if block.not_run or "my_loss_fused.py" in block.text:
        return  # the second is run by test_extending.py
    for words in shell_commands(block.text):
        try:
            check_line(words, monkeypatch)
        except (SystemExit, AssertionError) as error:
            pytest.fail(f"{block.where}: {' '.join(words)}: {error}; {capsys.readouterr().err}")


def inline_commands(page: Path) -> list[str]:
    """Commands with options within a page's sentences and tables; what they need besides is not shown there."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    found = re.findall(r"`((?:spml-fast|python launch/|deepspeed |torchrun |python -m spml_fast)[^`\n]*)`", text)
    return [f"{line} ..." for line in found if "--" in line and not re.search(r"\b(NAME|COMMAND|X)\b", line)]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_in_sentences_are_accepted(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for line in inline_commands(page):
        for words in shell_commands(line):
            try:
                check_line(words, monkeypatch)
            except (SystemExit, AssertionError) as error:
                pytest.fail(f"{page.name}: {line}: {error}")


def test_a_wrong_line_is_found(monkeypatch, capsys):
    """The checks above do fail."""
    for line in (
        "spml-fast evaluate --run RUN --alfa 5",
        "spml-fast train --train.epoch 3",
        "spml-fast trian",
        "deepspeed launch/predict.py --run RUN photos/ --top many",
        "spml-fast reproduce --train.epoch 3",
        "python launch/prepare.py csv --table labels.csv",
        "python benchmarks/bench_kernels.py --fast",
        "pip install -e '.[tests]'",
        "pytest tests/nowhere",
    ):
        with pytest.raises((SystemExit, AssertionError)):
            check_line(shell_commands(line)[0], monkeypatch)


@pytest.mark.parametrize("block", of("csv", "json"), ids=ids)
def test_tables_are_read(block, tmp_path):
    path = tmp_path / ("labels.csv" if block.language == "csv" else "labels.jsonl")
    path.write_text(block.text + "\n", encoding="utf-8")
    assert len(read_table(path, "error").rows) == len(block.text.splitlines()) - (block.language == "csv")


@pytest.mark.parametrize("block", of("yaml", "toml"), ids=ids)
def test_configurations_are_read(block):
    if block.language == "toml":
        assert tomllib.loads(block.text)
    else:
        check_keys(yaml.safe_load(block.text), block.where, None)


NAMES = ["cat", "dog", *(f"digit {c}" for c in range(2, 10))]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory, small_digits: Path) -> Path:
    """A folder as the tutorial begins with: labels.csv, photos/, new/; the photos are digit scenes."""
    folder = tmp_path_factory.mktemp("tutorial")
    manifest = Manifest(small_digits)
    rows = []
    for name, count in (("train", 48), ("val", 20), ("test", 24)):
        split = manifest.split(name)
        labels = split.observed if name == "train" else split.known
        (folder / "photos" / name).mkdir(parents=True)
        for i in range(count):
            shutil.copy(split.path(i), folder / "photos" / name / f"{i}.jpg")
            codes = labels.rows([i])[0]
            rows.append((f"photos/{name}/{i}.jpg", ";".join(NAMES[c] for c in (codes == 1).nonzero()[0]), "", name))
    with (folder / "labels.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("path", "positives", "negatives", "split"), *rows])
    shutil.copytree(folder / "photos" / "test", folder / "new")
    return folder


AGREE = """
import csv
with open("suggestions.csv", newline="") as file:
    rows = list(csv.DictReader(file))
with open("decisions.csv", "w", newline="") as file:
    out = csv.DictWriter(file, [*rows[0], "decision"])
    out.writeheader()
    out.writerows({**row, "decision": "accept"} for row in rows)
"""


def test_the_tutorial_runs_as_written(photos):
    steps: list[tuple[str, Any]] = []
    for block in code_blocks(TUTORIAL):
        if block.language == "python":
            steps.append(("python", block.text))
        elif block.language == "bash":
            for program, *words in shell_commands(block.text):
                assert program == "spml-fast"
                more = {"train": SMALL, "suggest": ["--min-probability", "0.05", "--folds", "2"]}.get(words[0], [])
                steps.append(("command", [*words, *more]))
                if words[0] == "suggest":
                    # Somebody has looked at the suggestions and agreed with all of them.
                    steps.append(("python", AGREE))
    shown = run_steps(photos, steps)
    with (photos / "decisions.csv").open(encoding="utf-8", newline="") as file:
        accepted = list(csv.DictReader(file))
    positives = sum(row["suggestion"] == "positive" for row in accepted)
    assert positives, "something was suggested"
    before, after = (Manifest(photos / "data" / name).split("train").known for name in ("photos", "photos-2"))
    doubted = len(accepted) - positives
    assert int((after.codes == 1).sum()) == int((before.codes == 1).sum()) + positives - doubted
    assert "starting from runs/first" in shown
    assert before.default == -1 and Manifest(photos / "data" / "photos").split("test").known.default == 0
    for name in ("first.html", "mistakes.png", "first.json", "review.html", "both.html", "classes.csv"):
        assert (photos / name).stat().st_size > 0, name
    assert "runs/second/export.safetensors" in shown
    assert {"1", "2", "5"} == set(json.loads((photos / "first.json").read_text(encoding="utf-8"))["alpha"])


# The tutorial's blocks stand between its commands; files of docs/extending are run by test_extending.py.
RUN_HERE = [b for b in of("python") if not (b.run_by or b.not_run or b.title or b.page == "docs/tutorial.md")]


def test_python_blocks_run(tmp_path, small_digits):
    """A page's blocks in order, in a process of its own, where data/mine is a Manifest."""
    pages = sorted({block.page for block in RUN_HERE})
    assert {"docs/data.md", "docs/methods.md", "docs/api/spml_fast.md"} <= set(pages)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine").symlink_to(small_digits)
    texts = ["\n".join(block.text for block in RUN_HERE if block.page == page) for page in pages]
    run_steps(tmp_path, [("python", text) for text in texts])
