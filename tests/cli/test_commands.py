"""`spml-fast COMMAND`: what it accepts before and after the command, what its help says, what it suggests."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spml_fast.cli import common
from spml_fast.cli.main import COMMANDS, main
from spml_fast.cli.parse import parse_config
from spml_fast.cli.relabel import training_words
from spml_fast.core.errors import UserError
from spml_fast.methods import method_names
from spml_fast.methods.base import METHODS
from spml_fast.models.heads import head_names
from spml_fast.models.heads.base import HEADS
from spml_fast.models.heads.query2label import Query2LabelOptions
from spml_fast.prepare.datasets import load_all
from spml_fast.prepare.datasets.base import DATASETS
from spml_fast.runs.recipes import FOLDER, find_recipe, recipe_names
from tests.support.paths import ROOT


def shown(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What a command line that ends the program prints."""
    try:
        assert main(list(argv)) == 0
    except SystemExit as left:
        assert left.code == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What is said of a command line that is wrong."""
    with pytest.raises(SystemExit) as left:
        main(list(argv))
    assert left.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    return captured.err


class TestDispatch:
    def test_a_module_and_a_script_of_launch_for_every_command(self) -> None:
        files = {p.stem for p in (ROOT / "spml_fast" / "cli").glob("*.py")}
        assert files == {*COMMANDS, "__init__", "main", "common", "parse", "completion_script"}
        assert {p.stem for p in (ROOT / "launch").glob("*.py")} == set(COMMANDS)
        for path in (ROOT / "launch").glob("*.py"):
            text = path.read_text(encoding="utf-8")
            assert len(text.splitlines()) <= 10 and f"spml_fast.cli.{path.stem} import main" in text

    def test_without_a_command(self, capsys: pytest.CaptureFixture[str]) -> None:
        for argv in ([], ["--help"], ["-h"], ["--local_rank=0"]):
            text = shown(capsys, *argv)
            for name, what in COMMANDS.items():
                assert re.search(rf"^  {name} +{re.escape(what.split()[0])} ", text, re.M)
                assert what in " ".join(text.split())

    def test_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert re.fullmatch(r"spml_fast \d+\.\d+\.\d+\n", shown(capsys, "--version"))

    def test_unknown_command(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "there is no command 'evalute'; did you mean evaluate?" in refused(capsys, "evalute")
        assert "choose one of train, prepare" in refused(capsys, "xyz")

    @pytest.mark.parametrize("words", [["--local_rank=1"], ["--local-rank", "1"], []])
    def test_launchers_words_before_the_command(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
    ) -> None:
        assert "usage: " in shown(capsys, *words, "report", "--help")

    @pytest.mark.parametrize("command", sorted(set(COMMANDS) - {"train", "prepare"}))
    def test_help_begins_with_examples(self, capsys: pytest.CaptureFixture[str], command: str) -> None:
        lines = shown(capsys, command, "--help").splitlines()
        assert lines[0].startswith("usage: ")
        examples = lines[lines.index("") + 1 :]
        assert examples[0] == "examples:" and any(f" {command}" in line for line in examples[1:4])
        assert any("--plugins MODULE" in line for line in lines) and not any("local_rank" in line for line in lines)

    def test_help_of_the_overview_imports_nothing_heavy(self) -> None:
        heavy = ("torch", "numpy", "jsonargparse", "deepspeed", "nvidia.dali")
        code = "import sys; from spml_fast.cli.main import main; main([]);"
        code += f"print([m for m in {heavy} if m in sys.modules])"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
        assert done.stdout.splitlines()[-1] == "[]"

    @pytest.mark.parametrize("command", sorted(set(COMMANDS) - {"train", "prepare"}))
    def test_the_command_line_is_parsed_before_heavy_imports(self, command: str) -> None:
        code = (
            f"import sys\nfrom spml_fast.cli.main import main\ntry: main([{command!r}, '--help'])\nexcept SystemExit: "
            "print([m for m in ('torch', 'deepspeed', 'nvidia.dali') if m in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
        assert done.stdout.splitlines()[-1] == "[]"

    def test_option_that_does_not_exist(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "did you mean --batch-size?" in refused(capsys, "evaluate", "--run", "x", "--batch_size", "3")
        assert "did you mean --threshold?" in refused(capsys, "predict", "--run", "x", "a.jpg", "--treshold=1")


@pytest.mark.parametrize("columns", [80, 132])
@pytest.mark.parametrize(
    "words",
    [[], *([command] for command in COMMANDS), ["prepare", "csv"], ["train", "--method", "ignore"]],
    ids=" ".join,
)
def test_no_line_of_help_is_wider_than_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int, words: list[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = shown(capsys, *words, "--help").splitlines()
    # A path of a shell's folder is one word, which nothing breaks.
    wide = [line for line in lines if len(line) > columns and len(line.split()) > 2]
    assert not wide


def test_examples_of_help_can_be_copied(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """At every width a shell reads the same words; what an example does is a comment to it."""

    def commands(columns: int) -> list[list[str]]:
        monkeypatch.setenv("COLUMNS", str(columns))
        text = shown(capsys, "relabel", "--help").split("examples:\n")[1].split("\n\n")[0]
        lines = text.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]

    assert commands(60) == commands(80) == commands(100)
    assert len(commands(60)) == 3 and all("--decisions" in words for words in commands(60))


class TestTrainHelp:
    def test_begins_with_examples_and_sections(self, capsys: pytest.CaptureFixture[str]) -> None:
        lines = shown(capsys, "train", "--help").splitlines()
        assert lines[0].startswith("usage: ") and lines[3] == "examples:"
        assert [line[:4] == "  # " for line in lines[4:10]] == [True, False] * 3
        sections = re.findall(r"^  --(\w+)\.\* ", "\n".join(lines), re.M)
        assert sections == ["data", "model", "train", "eval", "deepspeed", "run", "method"]

    @pytest.mark.parametrize("words", [[], ["--method", "an"], ["--model.head", "query2label"]])
    def test_names_methods_heads_and_recipes(self, capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
        text = " ".join(shown(capsys, "train", *words, "--help").split())
        assert f"methods: {', '.join(method_names())} heads: {', '.join(head_names())} (" in text
        assert f"recipes: {', '.join(recipe_names())} general:" in text

    def test_says_a_type_once(self, capsys: pytest.CaptureFixture[str]) -> None:
        text = shown(capsys, "train", "--help")
        assert "type:" not in text and "Literal" not in text and "Optional" not in text
        assert re.search(r"^  --train\.batch_size INT\n", text, re.M)
        assert re.search(r"^  --train\.schedule \{constant,one_cycle,cosine\}\n", text, re.M)
        assert re.search(r"^  --train\.linear_lr NUMBER\|null\n", text, re.M)

    def test_shows_the_options_of_the_method_and_the_head(self, capsys: pytest.CaptureFixture[str]) -> None:
        text = shown(capsys, "train", "--method", "ignore", "--model.head", "query2label", "--help")
        assert "Options of method ignore:" in text and "--method.warm_up INT" in text
        assert "Options of head query2label:" in text
        assert "--model.head_options.preset {paper,small,tiny}" in text and "--method.delta_rel" not in text
        assert "Options of head" not in shown(capsys, "train", "--help")


def test_prepare_help_names_the_data_sets(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "prepare", "--help")
    assert text.splitlines()[2] == "examples:"
    assert all(re.search(rf"^ +{name}\b", text, re.M) for name in [*load_all(), "shard"])


class TestSuggestions:
    @pytest.mark.parametrize(
        ("words", "wanted"),
        [
            (["--batch-size", "3"], "did you mean --train.batch_size?"),
            (["--batch_size=3"], "did you mean --train.batch_size?"),
            (["--train.bach_size", "3"], "did you mean --train.batch_size?"),
            (["--lr", "3"], "did you mean --train.lr?"),
            (["--data.image-size", "3"], "did you mean --data.image_size?"),
            (["--epoch", "3"], "did you mean --train.epochs?"),
            (["--model.lr", "3"], "did you mean --"),
            (
                ["--method", "an", "--method.delta_rel", "3"],
                "it is an option of methods ll_cp, ll_ct, ll_r, not of method an",
            ),
            (
                ["--method", "an", "--k_rule", "3"],
                "--method.k_rule is an option of methods ll_cp, ll_ct, ll_r, not of method an",
            ),
            (["--model.head_options.hidden", "3"], "it is an option of heads ml_decoder, query2label, not of head cam"),
        ],
    )
    def test_of_options(self, capsys: pytest.CaptureFixture[str], words: list[str], wanted: str) -> None:
        assert wanted in refused(capsys, "train", *words)

    def test_of_methods_and_recipes(self) -> None:
        with pytest.raises(UserError, match=r"no method 'llr'.*did you mean ll_r\?"):
            parse_config(["--method", "llr"])
        with pytest.raises(UserError, match=r"recipe digitz is neither .*; did you mean digits\?"):
            parse_config(["--config", "digitz"])


class TestRecipes:
    def test_names_and_paths(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert find_recipe("digits") == find_recipe("digits.yaml") == FOLDER / "digits.yaml"
        (tmp_path / "digits").mkdir()
        assert find_recipe("digits") == FOLDER / "digits.yaml"
        assert find_recipe("./digits") == Path("./digits")
        (tmp_path / "digits.yaml").write_text("train: {lr: 7}")
        assert parse_config(["--config", "digits.yaml"]).train.lr == 7
        assert parse_config(["--config", "digits"]).train.lr == 3e-3

    def test_launch_has_links_to_them(self) -> None:
        links = {p.name: p for p in (ROOT / "launch" / "configs").glob("*.yaml")}
        assert {p.name for p in FOLDER.glob("*.yaml")} == set(links) and len(links) > 20
        for path in links.values():
            assert path.is_symlink() and not path.readlink().is_absolute() and path.resolve() == FOLDER / path.name


class TestHeadOptions:
    def test_every_form(self, tmp_path: Path) -> None:
        wanted = Query2LabelOptions(preset="tiny", heads=2)
        head = ["--model.head", "query2label"]
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text("model: {head: query2label, head_options: {preset: tiny, heads: 2}}")
        lines: list[list[str]] = [
            [*head, "--model.head_options.preset", "tiny", "--model.head_options.heads=2"],
            [*head, "--model.head_options", "{preset: tiny, heads: 2}"],
            ["--config", str(recipe)],
        ]
        for words in lines:
            assert parse_config(words).model.head_options == wanted
        assert parse_config([*lines[2], "--model.head_options.heads", "8"]).model.head_options.heads == 8  # type: ignore[union-attr]

    def test_another_head_on_the_command_line_drops_the_recipes(self) -> None:
        config = parse_config(["--config", "digits_q2l", "--model.head", "cam"])
        assert config.model.head == "cam" and vars(config.model.head_options) == {}

    @pytest.mark.parametrize(
        ("words", "wanted"),
        [
            (["--model.head_options.preset", "huge"], "Expected one of"),
            (["--model.head_options.heads", "x"], "Expected a int"),
        ],
    )
    def test_wrong_values(self, capsys: pytest.CaptureFixture[str], words: list[str], wanted: str) -> None:
        assert wanted in refused(capsys, "train", "--model.head", "query2label", *words)


PLUGIN = '''
from dataclasses import dataclass
from typing import ClassVar

from spml_fast.methods.assume_negative import AssumeNegative
from spml_fast.methods.base import MethodOptions, register


@dataclass(frozen=True)
class StrangerOptions(MethodOptions):
    """Stranger.

    Attributes:
        weight: of the loss.
    """

    weight: float = 2.0


@register("stranger{0}")
class Stranger(AssumeNegative):
    """A method of somebody else."""

    Options: ClassVar[type[MethodOptions]] = StrangerOptions
'''


class TestPlugins:
    @pytest.fixture(autouse=True)
    def registries(self) -> Iterator[None]:
        """What plugins register goes again: other tests look at every method."""
        kept = [(registry, dict(registry._classes)) for registry in (METHODS, HEADS, DATASETS)]
        yield
        for registry, classes in kept:
            registry._classes = classes

    @pytest.fixture
    def plugin(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
        """A module of the working directory that registers a method; a new name for every test, as imports last."""
        name = re.sub(r"\W", "_", request.node.name)
        monkeypatch.chdir(tmp_path)
        (tmp_path / f"plugin_{name}.py").write_text(PLUGIN.replace("{0}", name))
        return f"plugin_{name}", f"stranger{name}"

    def test_named_before_and_after_the_command(self, plugin: Any, capsys: pytest.CaptureFixture[str]) -> None:
        module, method = plugin
        for words in (["--plugins", module, "train"], ["train", f"--plugins={module}"]):
            text = shown(capsys, *words, "--method", method, "--help")
            assert f"Options of method {method}:" in text and "--method.weight NUMBER" in text

    def test_a_run_names_what_it_needs(self, plugin: Any, tmp_path: Path) -> None:
        from spml_fast.runs.recipe import load_config, to_yaml

        module, method = plugin
        config = parse_config(["--plugins", module, "--method", method, "--method.weight", "3"])
        assert config.run.plugins == [module]
        path = tmp_path / "config.yaml"
        path.write_text(to_yaml(config))
        assert load_config(path) == parse_config(["--config", str(path)]) == config
        path.write_text(to_yaml(config).replace(module, "another_plugin"))
        for read in (lambda: load_config(path), lambda: parse_config(["--config", str(path)])):
            with pytest.raises(UserError, match=r"needs the plugin another_plugin, which is code; give --plugins"):
                read()

    @pytest.mark.parametrize("asked", [False, True])
    def test_a_run_imports_nothing_that_was_not_asked_for(self, plugin: Any, tmp_path: Path, asked: bool) -> None:
        from spml_fast.runs.recipe import to_yaml

        module, method = plugin
        config = parse_config(["--plugins", module, "--method", method, "--method.weight", "3"])
        (tmp_path / "config.yaml").write_text(to_yaml(config))
        # Whoever made the run may have changed what its plugin does.
        with (tmp_path / f"{module}.py").open("a") as file:
            file.write("\nopen('executed', 'w').close()\n")
        code = "from spml_fast.runs.plugins import load_plugins; from spml_fast.runs.recipe import load_config\n"
        code += f"from pathlib import Path\nif {asked}: load_plugins([{module!r}])\n"
        code += "print(load_config(Path('config.yaml')).method)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
        assert (tmp_path / "executed").exists() is asked
        assert ("weight=3.0" in done.stdout) is asked and ("which is code" in done.stderr) is not asked

    def test_a_file(self, plugin: Any, tmp_path: Path) -> None:
        module, method = plugin
        config = parse_config(["--plugins", f"{module}.py", "--method", method])
        assert config.run.plugins == [str(tmp_path / f"{module}.py")]

    def test_runs_without_plugins_do_not_mention_them(self) -> None:
        from spml_fast.runs.recipe import to_yaml

        assert "plugins" not in to_yaml(parse_config([]))

    def test_a_plugin_that_fails(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "plugin_fails.py").write_text("\n1 / 0\n")
        (tmp_path / "plugin_lacks.py").write_text("import no_such_module\n")
        with pytest.raises(
            UserError, match=r"plugin_fails cannot be imported: ZeroDivisionError: .*plugin_fails\.py, line 2"
        ):
            parse_config(["--plugins", "plugin_fails"])
        with pytest.raises(
            UserError, match="plugin_lacks cannot be imported: ModuleNotFoundError: No module named 'no_s"
        ):
            parse_config(["--plugins", "plugin_lacks"])
        with pytest.raises(UserError, match=r"there is no plugin file .*nowhere"):
            parse_config(["--plugins", "nowhere.py"])

    def test_data_sets(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "plugin_data.py").write_text(
            "from spml_fast.prepare.datasets import Dataset, register\n"
            '@register("strangers_data")\nclass Strangers(Dataset):\n    """Images of somebody else."""\n'
        )
        assert "strangers_data" in shown(capsys, "--plugins", "plugin_data", "prepare", "--help")


def test_one_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="export works in one process; start it without a launcher"):
        common.check_one_process("export")


def test_what_to_try_after_a_training(monkeypatch: pytest.MonkeyPatch) -> None:
    from spml_fast.cli.train import commands_after

    monkeypatch.setattr(sys, "argv", ["/venv/bin/spml-fast", "train"])
    assert commands_after("my runs/a", ["losses.py"]) == [
        "spml-fast evaluate --run 'my runs/a' --per-class --plugins losses.py",
        "spml-fast report 'my runs/a' --out 'my runs/a/report.html' --plugins losses.py",
        "spml-fast explain --run 'my runs/a' --plugins losses.py",
        "spml-fast suggest --run 'my runs/a' --plugins losses.py",
    ]
    for line in commands_after("runs/a"):
        name, *words = shlex.split(line)[1:]
        parse: Any = importlib.import_module(f"spml_fast.cli.{name}").parse
        assert str(parse(words).run if name != "report" else parse(words).runs[0]) == "runs/a"


def test_relabel_goes_on_as_the_run_was_trained(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("{}\n", encoding="utf-8")
    run, plain = str(tmp_path), ["--data.dir", "b"]
    assert training_words("b", 2, [run]) == ["--config", f"{run}/config.yaml", *plain, "--run.dir", f"{run}-2"]
    # Of two runs nobody knows which is meant, and a table may name one that is gone, or none.
    for runs in ([run, "other"], [f"{run}/gone"], [""], []):
        assert training_words("b", 2, runs) == plain
