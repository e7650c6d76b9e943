"""What Tab shows, asked of the shells themselves; zsh and fish where they are installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from spml_fast.cli import completion, completion_script
from spml_fast.cli.common import Parser, parser_of
from spml_fast.cli.main import COMMANDS
from spml_fast.methods import method_names
from spml_fast.prepare.datasets import load_all
from spml_fast.runs.recipes import recipe_names


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The script of each shell."""
    folder = tmp_path_factory.mktemp("completion")
    tables = completion_script.make_tables()
    paths = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(completion_script, "make_tables", lambda: tables)
        for shell in ("bash", "zsh", "fish"):
            paths[shell] = folder / shell
            paths[shell].write_text(completion_script.script(shell), encoding="utf-8")
    return paths


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, a data set, folders that are neither, and files."""
    folder = tmp_path_factory.mktemp("place")
    for name in ("runs/first", "runs/with blank", "data/mine", "photos"):
        (folder / name).mkdir(parents=True)
    for name in ("runs/first/config.yaml", "runs/with blank/config.yaml", "data/mine/manifest.json", "photos/1.jpg"):
        (folder / name).touch()
    (folder / "recipe.yaml").touch()
    return folder


def ask(command: list[str], place: Path) -> list[str]:
    """Lines that a shell prints, which knows nothing of this machine's settings and where nothing of ours can run."""
    clean = {"PATH": "/usr/bin:/bin", "HOME": str(place), "LANG": "C.UTF-8"}
    done = subprocess.run(command, cwd=place, env=clean, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout.splitlines()


BASH = """
source "$1"; shift
complete -p spml-fast > /dev/null || exit 3
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
_spml_fast_complete
printf '%s\\n' "${COMPREPLY[@]}"
"""


def bash(scripts: dict[str, Path], place: Path, *words: str) -> list[str]:
    """What bash offers after these words, `=` being one as for bash, the last one at the cursor."""
    lines = ask(["bash", "--norc", "-c", BASH, "bash", str(scripts["bash"]), "spml-fast", *words], place)
    return [line for line in lines if line]


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["ex"], ["explain", "export"]),
        (["--vers"], ["--version"]),
        (["--plugins", "mine", "rep"], ["report", "reproduce"]),
        (["export", "--form"], ["--format"]),
        (["export", "--format", "o"], ["onnx"]),
        (["export", "--format", "=", "o"], ["onnx"]),
        (["export", "--overwrite", "--out"], ["--out"]),
        (["predict", "--orientation", ""], ["exif", "ignore"]),
        (["predict", "--top", ""], []),
        (["report", "--images", ""], []),
        (["predict", "--run", ""], ["data/", "photos/", "runs/"]),
        (["predict", "--run", "runs/"], ["runs/first", r"runs/with\ blank"]),
        (["predict", "--run", r"runs/with\ "], [r"runs/with\ blank"]),
        (["predict", "--run", "=", "runs/f"], ["runs/first"]),
        (["report", "runs/first", "runs/f"], ["runs/first"]),
        (["predict", "--run", "runs/first", "ph"], ["photos/"]),
        (["predict", "--run", "runs/first", "photos/"], ["photos/1.jpg"]),
        (["train", "--data.dir", "data/"], ["data/mine"]),
        (["train", "--config", "coco_ig"], ["coco_ignore", "coco_ignore_q2l"]),
        (["train", "--config", "rec"], ["recipe.yaml"]),
        (["train", "--method", "ig"], ["ignore"]),
        (["train", "--model.pretrained", ""], ["true", "false"]),
        (["train", "--train.optimizer", "=", "adam"], ["adam", "adamw"]),
        (["train", "--method.delta"], ["--method.delta_rel"]),
        (["train", "--method", "ignore", "--method.delta"], []),
        (["train", "--method", "=", "ignore", "--method.gap_l"], ["--method.gap_lambda"]),
        (["train", "--model.head", "query2label", "--model.head_options.hi"], ["--model.head_options.hidden"]),
        (["train", "--model.head_options.hi"], []),
        (["reproduce", "--train.epo"], ["--train.epochs"]),
        (["prepare", "vo"], ["voc"]),
        (["prepare", "voc", "--val-fraction", ""], ["published", "0"]),
        (["prepare", "voc", "co"], []),
        (["prepare", "shard", "--manifest", "data/m"], ["data/mine"]),
        (["completion", ""], ["bash", "zsh", "fish"]),
        (["nonsense", "--"], []),
        (["train", "--run.dir", "~/ru"], ["PLACE/runs/"]),
    ],
    ids=" ".join,
)
def test_bash(scripts: dict[str, Path], place: Path, words: list[str], offered: list[str]) -> None:
    assert bash(scripts, place, *words) == [line.replace("PLACE", str(place)) for line in offered]


def test_every_command_and_option_is_offered(scripts: dict[str, Path], place: Path) -> None:
    assert bash(scripts, place, "") == [*COMMANDS, "--help", "--version"]
    for command in sorted(set(COMMANDS) - {"train", "prepare"}):
        offered = set(bash(scripts, place, command, "--"))
        actions = [a for a in parser_of(command)._actions if a.option_strings and a.help != "==SUPPRESS=="]
        assert all(offered & set(action.option_strings) for action in actions), command
    assert bash(scripts, place, "train", "--method", "") == method_names()
    assert set(recipe_names()) < set(bash(scripts, place, "train", "--config", ""))
    assert bash(scripts, place, "prepare", "") == [*load_all(), "shard"]


def test_the_script_is_posix_and_says_its_version(scripts: dict[str, Path]) -> None:
    for shell in ("sh", "bash"):
        engine = scripts["bash"].read_text(encoding="utf-8").partition("_spml_fast_complete() {")[0]
        done = subprocess.run([shell, "-n"], input=engine, capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr, done.stderr
    assert "spml-fast 0." in scripts["fish"].read_text(encoding="utf-8").splitlines()[0]
    assert scripts["zsh"].read_text(encoding="utf-8").startswith("#compdef spml-fast\n")


ZSH = """
compdef() { print -r -- "compdef $@" }
source "$1"; shift
compadd() { while [[ $1 == -* && $1 != -- ]]; do shift; [[ $1 == '' ]] && shift; done; shift; print -rl -- "$@" }
_describe() { print -rl -- "${(@P)argv[-1]}" }
words=("$@"); CURRENT=$#
_spml_fast_complete
"""


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["export", "--form"], ["--format:what to write"]),
        (["export", "--format=o"], ["--format=onnx"]),
        (["predict", "--run", "runs/"], ["runs/first", "runs/with blank"]),
        (["predict", "--run", r"runs/with\ "], ["runs/with blank"]),
        (["predict", "--run", "nothing"], []),
        (["train", "--data.dir", "d"], ["data/"]),
    ],
    ids=" ".join,
)
def test_zsh(scripts: dict[str, Path], place: Path, words: list[str], offered: list[str]) -> None:
    zsh = shutil.which("zsh") or ""
    lines = ask([zsh, "-f", "-c", ZSH, "zsh", str(scripts["zsh"]), "spml-fast", *words], place)
    assert lines == ["compdef _spml_fast_complete spml-fast", *offered]


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("export --form", ["--format\twhat to write"]),
        ("export --format=o", ["--format=onnx"]),
        ("predict --run runs/", ["runs/first", "runs/with blank"]),
        ("train --method ignore --method.gap_l", ["--method.gap_lambda"]),
        ("train --data.dir d", ["data/"]),
    ],
)
def test_fish(scripts: dict[str, Path], place: Path, line: str, offered: list[str]) -> None:
    fish = shutil.which("fish") or ""
    code = f"source '{scripts['fish']}'; complete -C 'spml-fast {line}'"
    lines = [text for text in ask([fish, "--no-config", "-c", code], place) if text]
    assert [text.partition("\t")[0] for text in lines] == [text.partition("\t")[0] for text in offered]
    assert all("\t" in text for text in lines) == all("\t" in text for text in offered)


def test_what_is_beside_a_candidate() -> None:
    first = completion_script.first_sentence
    assert first("what to write; or not") == "what to write"
    assert first("of 100 %% (default: %(default)s)") == "of 100 %"
    assert first("weights.\n    More of them.") == "weights"
    assert len(first("word " * 60)) <= completion_script.WORDS_OF_HELP + 4


def test_a_parser_is_handed_over_and_nothing_else_changes(capsys: pytest.CaptureFixture[str]) -> None:
    assert {a.dest for a in parser_of("export")._actions} > {"run", "format"}
    assert Parser.asked is False
    with pytest.raises(SystemExit):
        completion.main(["tcsh"])
    assert "choose from" in capsys.readouterr().err
