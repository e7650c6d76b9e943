"""The table of the papers' statements: judged from means, made by real runs, resumable."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from spml_fast.cli.parse import parse_config
from spml_fast.cli.reproduce import show_line, train
from spml_fast.core import progress
from spml_fast.core.errors import UserError
from spml_fast.models.heads import get_head
from spml_fast.reproduction.presets import PRESETS, Entry, choose_entries, get_preset
from spml_fast.reproduction.reproduce import Row, as_json, check_claims, check_options, note_options, plot
from spml_fast.runs.read import read_epochs
from tests.support.paths import ROOT
from tests.support.runs import Run


def rows(**means: float) -> list[Row]:
    """Rows from `name_alpha=mean`."""
    out = []
    for key, value in means.items():
        name, alpha = key.rsplit("_", 1)
        out.append(Row(Entry(name, name, "digits.yaml"), "cam", alpha, [value - 1, value + 1], 1.0))
    return out


GOOD = {"full_1": 99, "full_5": 99, "an_1": 90, "an_5": 93, "an_boost_1": 90, "an_boost_5": 92, "ll_r_1": 91}
GOOD |= {"ll_r_5": 93, "ll_r_boost_1": 95, "ll_r_boost_5": 98, "ignore_1": 94, "ignore_5": 95, "em_1": 96, "em_5": 97}


def test_every_statement_is_judged_and_can_fail() -> None:
    preset = get_preset("digits")
    held = check_claims(preset, rows(**GOOD))
    assert len(held) == len(preset.statements) and all(s["holds"] for s in held)
    for spoiled in ({"an_5": 89.0}, {"an_boost_5": 93.5}, {"ll_r_5": 93, "ll_r_boost_5": 90.5}, {"ignore_1": 91.0}):
        assert not all(s["holds"] for s in check_claims(preset, rows(**{**GOOD, **spoiled})))
    assert [s["holds"] for s in check_claims(preset, rows(**{**GOOD, "em_1": 99.5}))].count(False) == 1


def test_half_of_the_gap_on_photographs() -> None:
    preset = get_preset("photos")
    means = GOOD | {"gr_1": 91, "gr_5": 91, "ll_r_boost_1": 93, "ll_r_boost_5": 94.5}
    means |= {"ignore_5": 94, "em_1": 92, "em_5": 93}
    held = check_claims(preset, rows(**means))
    assert len(held) == len(preset.statements) and all(s["holds"] for s in held)
    # Between 90 and 99, half of the way is 94.5.
    spoiled = check_claims(preset, rows(**means | {"ll_r_boost_5": 94.4}))
    assert [s["holds"] for s in spoiled] == [True] * (len(held) - 1) + [False]


def test_statements_without_their_methods_are_left_out() -> None:
    kept = check_claims(get_preset("digits"), rows(an_1=90, an_5=93))
    assert [s["text"] for s in kept] == ["BoostLU at inference improves a trained assumed-negative model"]


def test_mean_and_deviation() -> None:
    row = rows(an_1=90)[0]
    assert row.mean == 90 and row.std == pytest.approx(2**0.5)
    assert as_json([row], [])["rows"][0]["map_std"] == row.std


def test_presets_name_recipes_that_exist() -> None:
    for preset in PRESETS.values():
        for entry in preset.entries:
            assert (ROOT / "launch" / "configs" / entry.recipe).is_file(), entry


@pytest.mark.parametrize("preset", ["digits", "photos", pytest.param("cub", marks=pytest.mark.slow)])
def test_every_entry_is_a_valid_run(preset: str) -> None:
    for entry in PRESETS[preset].entries:
        arguments = [
            "--config",
            str(ROOT / "launch" / "configs" / entry.recipe),
            "--method",
            entry.method,
            *entry.options,
        ]
        config = parse_config(arguments)
        assert config.method.name == entry.method
        # Heads without a map have nothing to boost.
        assert get_head(config.model.head).supports_boostlu == (5 in entry.alphas)
        for name, value in zip(entry.options[::2], entry.options[1::2], strict=True):
            section, _, field = name.removeprefix("--").partition(".")
            assert str(getattr(getattr(config, section), field)).lower() in (value, str(float_or(value)).lower()), name


def float_or(text: str) -> float | str:
    """A number where the text is one."""
    try:
        return float(text)
    except ValueError:
        return text


def test_papers_hyper_parameters() -> None:
    entries = {e.name: e for e in PRESETS["cub"].entries}
    apl = entries["em_apl"]
    assert apl.published == {"1": 21.84} and entries["an"].published == {"1": 18.31}
    for arguments in (
        ("--method.beta", "0.4"),
        ("--method.warm_up", "3"),
        ("--train.lr", "1e-4"),
        ("--method.alpha", "0.01"),
    ):
        place = apl.options.index(arguments[0])
        assert apl.options[place + 1] == arguments[1]
    assert entries["ll_ct_2022_li"].published == {"1": 21.8} and entries["q2l_ignore"].published == {"1": 23.4}
    assert next(e for e in PRESETS["voc"].entries if e.name == "an").published == {"5": 87.31, "1": 85.89}


def test_runs_of_other_options_are_not_taken_over(tmp_path: Path) -> None:
    run = tmp_path / "an-s0"
    note_options(run, ["--train.epochs", "2"])
    # Not begun: its options may still change.
    check_options(run, ["--train.epochs", "3"])
    (run / "results.json").touch()
    check_options(run, ["--train.epochs", "2"])
    with pytest.raises(
        UserError, match=r"an-s0 was made with other options \(--train\.epochs 2\); delete it or choose"
    ):
        check_options(run, [])


def test_epochs_of_runs_that_were_cut_off_or_stopped_early(tmp_path: Path) -> None:
    runs = []
    for name, epochs in (("a", [1, 2, 2, 3]), ("b", [1, 2])):
        (tmp_path / name).mkdir()
        fractions = {"selection_precision": 0.5, "selection_recall": 0.5}
        lines = [{"kind": "epoch", "phase": "finetune", "epoch": e, "at": i, **fractions} for i, e in enumerate(epochs)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        runs.append(tmp_path / name)
    assert [(e["epoch"], e["at"]) for e in read_epochs(runs[0])] == [(1, 0), (2, 2), (3, 3)]
    plot(tmp_path / "table.png", rows(an_1=90), {"an": runs})
    assert (tmp_path / "table.png").stat().st_size > 10_000


def test_photographs_must_be_given(run_script: Run) -> None:
    done = run_script("reproduce.py", "--preset", "photos")
    assert done.returncode == 1 and "preset photos needs --data.dir: a Manifest of photographs" in done.stderr


def test_unknown_names() -> None:
    with pytest.raises(UserError, match="no preset 'cub2'"):
        get_preset("cub2")
    with pytest.raises(UserError, match="no method 'nope'; it has full"):
        choose_entries(get_preset("digits"), ["an", "nope"])


def test_runs_once_and_writes_everything(small_digits: Path, run_script: Run, tmp_path: Path) -> None:
    out, report = tmp_path / "out", tmp_path / "report.json"
    arguments = ["--methods", "an,ll_r_boost", "--seeds", 1, "--data.dir", small_digits, "--out", out, "--json", report]
    arguments += ["--train.epochs", 2, "--deepspeed.tensorboard", "false"]
    done = run_script("reproduce.py", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(report.read_text())
    assert {(r["method"], r["alpha"]) for r in result["rows"]} == {
        (m, a) for m in ("an", "ll_r_boost") for a in (1.0, 5.0)
    }
    assert len(result["statements"]) == 1
    with (out / "table.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 4
    assert "| an | cam | 1 |" in (out / "table.md").read_text()
    assert (out / "table.png").stat().st_size > 10_000
    again = run_script("reproduce.py", *arguments)
    assert again.returncode == 0 and "run 1 of" not in again.stdout
    (out / "table.md").write_text("my notes\n")
    refused = run_script("reproduce.py", *arguments)
    assert refused.returncode == 1 and "table.md exists and was not written by this command" in refused.stderr
    assert (out / "table.md").read_text() == "my notes\n"


def test_a_failed_run_is_one_sentence(small_digits: Path, run_script: Run, tmp_path: Path) -> None:
    arguments = ["--methods", "an", "--seeds", 1, "--data", small_digits, "--out", tmp_path / "out", "--train.epocs", 2]
    done = run_script("reproduce.py", *arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("error: a run failed") and "--train.epocs" in done.stderr


def test_a_run_shows_what_it_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every line of its output goes to the log and to what is shown; an earlier attempt is over."""
    (tmp_path / "train.log").write_text("error: of yesterday\n")
    with pytest.raises(UserError, match=r"a run failed \(.*--train\.epocs"):
        seen = list[str]()
        train(tmp_path, ["--config", "digits", "--train.epocs", "2"], 1, seen.append)
    assert any("--train.epocs" in line for line in seen)
    log = (tmp_path / "train.log").read_text()
    assert log.startswith("error: of yesterday\n") and all(line in log for line in seen)
    monkeypatch.setattr(progress, "_display", progress.Display())
    for name in ("FIRST", "EVERY"):
        monkeypatch.setattr(progress, name, 0.0)
    with progress.under_way(progress.Task("run 2 of 4: an, seed 1", 4, "", 1, (), 600.0)) as task:
        show_line(task, "epoch 2/8 | loss 0.1")
    assert capsys.readouterr().err == "run 2 of 4: an, seed 1 | 25% done | 10 min left | epoch 2/8 | loss 0.1\n"
