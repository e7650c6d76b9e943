"""Suggested labels: the ranking held against a dense one, the truth, the table, and what users get wrong."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spml_fast.analysis import suggest
from spml_fast.analysis.suggest import BestPairs, hidden_positives, precision_at
from spml_fast.cli import suggest as suggest_command
from spml_fast.cli.parse import parse_config
from spml_fast.core import distributed
from spml_fast.core.errors import UserError
from spml_fast.data.labels import NEGATIVE, POSITIVE, UNKNOWN, SparseLabels
from spml_fast.evaluation.evaluate import score_split
from spml_fast.models.classifier import Classifier
from spml_fast.models.weights import save_weights
from spml_fast.runs.open import load_run, make_eval_loader
from spml_fast.runs.recipe import to_yaml
from tests.support.paths import ROOT

CPU = torch.device("cpu")


def call(*arguments: object) -> None:
    """Run the command in this process; a user error stays an exception."""
    suggest_command.main([str(a) for a in arguments])


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a table of suggestions."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="module")
def run(small_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with random weights: its suggestions are random, but their ranking is defined."""
    made = tmp_path_factory.mktemp("suggest") / "run"
    made.mkdir()
    arguments = ["--config", str(ROOT / "launch" / "configs" / "digits.yaml"), "--data.dir", str(small_digits)]
    config = parse_config([*arguments, "--train.precision", "fp32", "--eval.batch_size", "50"])
    (made / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    torch.manual_seed(3)
    classifier = Classifier(config.model, 10, config.data.image_size)
    with torch.no_grad():
        # Probabilities on both sides of one half.
        classifier.head.weight *= 30
    save_weights(made / "model.safetensors", classifier, {})
    return made


@pytest.fixture(scope="module")
def dense(run: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Probabilities and observed codes [N, C] of the training split, and its paths."""
    config, manifest, classifier, _ = load_run(run, CPU)
    split = manifest.split("train")
    scores = score_split(classifier, make_eval_loader(config, split, classifier, CPU), split.known, [5], None)
    assert scores is not None and config.model.alpha_eval == 5
    probability = 1 / (1 + np.exp(-scores.at_alpha(5).astype(np.float64)))
    return probability, split.observed.rows(range(len(split))), [split.relative_path(i) for i in range(len(split))]


class TestBestPairs:
    """The bounded list."""

    # Few distinct scores, so that ties decide often.
    @settings(max_examples=60, deadline=None)
    @given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.booleans(), st.integers(1, 3), st.integers(2, 40))
    def test_same_as_sorting_everything(self, seed: int, size: int, per_class: bool, ranks: int, levels: int) -> None:
        rng = np.random.default_rng(seed)
        rows, classes, batch = 23, 5, 4
        scores = rng.integers(0, levels, (rows, classes)).astype(np.float32)
        wanted = rng.random((rows, classes)) < 0.7
        parts = [BestPairs(size, classes, per_class, CPU) for _ in range(ranks)]
        for number, start in enumerate(range(0, rows, batch)):
            chosen = slice(start, start + batch)
            index = torch.arange(start, min(rows, start + batch))
            parts[number % ranks].add(index, torch.from_numpy(scores[chosen]), torch.from_numpy(wanted[chosen]))
            limit = size * classes if per_class else size
            assert all(len(p.key) <= limit for p in parts)
        # What gathering would bring to rank 0.
        whole = parts[0]
        whole.key, whole.score = (torch.cat([getattr(p, name) for p in parts]) for name in ("key", "score"))
        whole.seen = sum((p.seen for p in parts), torch.tensor(0))
        key, score, seen = whole.gather()
        every = sorted((-scores[i, c], i, c) for i, c in np.argwhere(wanted))
        if per_class:
            every = sorted(e for c in range(classes) for e in [x for x in every if x[2] == c][:size])
        else:
            every = every[:size]
        assert key.tolist() == [i * classes + c for _, i, c in every]
        assert score.tolist() == [-s for s, _, _ in every]
        assert seen == wanted.sum()


class TestRanking:
    """The command's table against dense figures."""

    @pytest.mark.parametrize("options", [["--top", 40], ["--per-class", 3], ["--per-class", 5, "--top", 20]])
    def test_csv(self, run: Path, dense: tuple, tmp_path: Path, options: list[object]) -> None:
        probability, observed, paths = dense
        call("--run", run, "--csv", tmp_path / "out.csv", *options)
        rows = read(tmp_path / "out.csv")
        assert list(rows[0]) == ["path", "class", "known", "probability", "suggestion", "split", "run"]
        assert {(r["split"], r["run"]) for r in rows} == {("train", str(run))}
        top = options[options.index("--top") + 1] if "--top" in options else 10**6
        each = options[options.index("--per-class") + 1] if "--per-class" in options else 10**6
        expected = []
        for known, code, sign in (("unknown", UNKNOWN, 1), ("positive", POSITIVE, -1)):
            sure = np.argwhere((observed == code) & (sign * probability > sign * 0.5))
            order = sorted(sure.tolist(), key=lambda pair: -sign * probability[tuple(pair)])
            seen: dict[int, int] = {}
            kept = []
            for i, c in order:
                seen[c] = seen.get(c, 0) + 1
                if seen[c] <= int(each):  # type: ignore[call-overload]
                    kept.append((paths[i], str(c), known, "positive" if sign == 1 else "negative"))
            expected += kept[: int(top)]  # type: ignore[call-overload]
        assert [(r["path"], r["class"], r["known"], r["suggestion"]) for r in rows] == expected
        assert {r["known"] for r in rows} == {"unknown", "positive"}, "both lists must be there"
        row = {p: i for i, p in enumerate(paths)}
        truth = [probability[row[r["path"]], int(r["class"])] for r in rows]
        np.testing.assert_allclose([float(r["probability"]) for r in rows], truth, atol=1e-6)

    def test_screen_and_precision(
        self, run: Path, dense: tuple, small_digits: Path, capsys: pytest.CaptureFixture
    ) -> None:
        probability, observed, _ = dense
        call("--run", run, "--top", 30, "--min-probability", 0.6)
        output = capsys.readouterr().out
        sure = (observed == UNKNOWN) & (probability >= 0.6)
        assert f"unknown labels that look positive, {min(30, sure.sum())} of {sure.sum()}" in output
        assert output.count(": positive?  train/") == 30
        _, manifest, _, _ = load_run(run, CPU)
        truth = manifest.split("train").known.rows(range(192))
        best = sorted(np.argwhere(sure).tolist(), key=lambda p: -probability[tuple(p)])
        for depth in (10, 30):
            hits = sum(truth[i, c] == POSITIVE for i, c in best[:depth])
            assert f"precision of the first {depth}" in output and f"({hits} of {depth})" in output
        hidden = int((truth == POSITIVE).sum() - (observed == POSITIVE).sum())
        assert f"({hidden} of {(observed == UNKNOWN).sum()} hidden labels)" in output

    def test_nothing_sure_enough(self, run: Path, capsys: pytest.CaptureFixture) -> None:
        call("--run", run, "--min-probability", 0.9999999999, "--split", "val")
        assert "no suggestion of probability 1 or more; lower --min-probability" in capsys.readouterr().out


class TestTruth:
    """Precision and its parts."""

    def test_precision_at(self) -> None:
        right = np.array([True, True, False, True, True])
        judged = np.array([True, False, True, True, True])
        assert precision_at(right, judged, (1, 2, 4, 100)) == [(1, 1, 1), (2, 1, 1), (4, 2, 3), (5, 3, 4)]
        assert precision_at(right[:0], judged[:0]) == []

    def test_hidden_positives(self) -> None:
        class Both:
            known = SparseLabels.from_positives([[0, 1], [2], []], 3, NEGATIVE)
            observed = SparseLabels.from_positives([[0], [2], []], 3, UNKNOWN)

        assert hidden_positives(Both()) == (1, 7)  # type: ignore[arg-type]
        Both.known = SparseLabels.from_entries([0, 0, 1, 2], [0, 1, 2, 0], [1, 1, 1, 0], 3, 3)
        assert hidden_positives(Both()) == (1, 2), "pairs without ground truth do not count"  # type: ignore[arg-type]


def test_the_users_own_table_is_not_replaced(run: Path, tmp_path: Path) -> None:
    """`--csv labels.csv` beside the table that the data set was made of; nothing is computed before the answer."""
    labels = tmp_path / "labels.csv"
    labels.write_text("path,positives\na.jpg,cat\n")
    with pytest.raises(UserError, match=r"labels\.csv exists and was not written by this command; .*--overwrite"):
        call("--run", tmp_path / "no run", "--csv", labels)
    assert labels.read_text() == "path,positives\na.jpg,cat\n"
    call("--run", run, "--csv", labels, "--top", 2, "--overwrite")
    call("--run", run, "--csv", labels, "--top", 3)
    assert len(read(labels)) > 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--run RUN --top 0", "--top is 0; it must be at least 1"),
        ("--run RUN --per-class -1", "--per-class is -1"),
        ("--run RUN --min-probability 1", "--min-probability is 1; it must be at least 0 and less than 1"),
        ("--run RUN --min-probability nan", "--min-probability is nan"),
        ("--run RUN --alpha 0", "--alpha is 0"),
        ("--run RUN --csv TMP", "is a directory; give the name of a file"),
        ("--run RUN --csv TMP/no/out.csv", "out.csv cannot be written: there is no directory"),
        ("--run RUN --split nowhere", "has no split 'nowhere'; it has test, train, val"),
        ("--run TMP", "is not a run directory"),
    ],
)
def test_what_users_get_wrong(arguments: str, message: str, run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        call(*arguments.replace("RUN", str(run)).replace("TMP", str(tmp_path)).split())
    assert not list(tmp_path.iterdir())


def test_diverged_run_is_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, manifest, classifier, _ = load_run(run, CPU)
    split = manifest.split("val")
    with torch.no_grad():
        classifier.head.bias[3] = float("nan")
    with pytest.raises(UserError, match=r"score of class 3 is not a number for .*val.00000\.jpg"):
        suggest.find_suggestions(
            classifier,
            make_eval_loader(config, split, classifier, CPU),
            split.observed,
            alpha=1,
            precision="fp32",
            classes=manifest.classes,
            top=3,
        )
    assert distributed.world_size() == 1
