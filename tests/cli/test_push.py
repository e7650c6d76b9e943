"""`spml-fast push`: the model card, the same files in a folder and on a stand-in of the Hub, and loading them back."""

from __future__ import annotations

import html
import json
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image

import spml_fast
from spml_fast.analysis.model_card import CardSource, model_card
from spml_fast.cli import push as push_command
from spml_fast.core.errors import UserError
from spml_fast.core.io import file_record
from spml_fast.data.manifest import Manifest
from spml_fast.evaluation.calibration import Calibration
from spml_fast.evaluation.decisions import DecisionOptions, Decisions
from spml_fast.runs import hub as hub_module
from spml_fast.runs.decisions import SavedDecisions
from spml_fast.runs.hub import check_name
from spml_fast.runs.open import load_for_export
from tests.support.exports import logits_of, make_run
from tests.support.hub import TOKEN, Hub, running_hub

NAME = "owner/birds"
HOSTILE = [
    "<script>alert(1)</script>",
    "a | b",
    "[x](javascript:alert(1))",
    "![i](http://evil/x.png)",
    "---",
    "`code` **bold** _it_ $x$ www.evil.com @user :smile:",
    "tag: !!python/object:os.system",
    "\x1b[31mred",
    "&lt;b&gt;",
    "plain name_1",
]
RESULTS = {
    "split": "test",
    "best_epoch": 3,
    "best_val_map": 41.25,
    "alpha": {
        alpha: {
            "map": value,
            "map_skipping": value + 1,
            "OF1": None,
            "CF1": 12.5,
            "num_positives": 1234,
            "num_negatives": 5,
            "num_classes": 10,
            "definition": "sklearn",
            "empty_classes": "skip_unlabelled",
            "threshold_probability": 0.5,
            "per_class_ap": [value, None, *[value] * 8],
        }
        for alpha, value in (("1", 50.0), ("5", 60.0))
    },
}


@pytest.fixture(scope="module")
def run(small_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with class names that mean something everywhere, whose data set exists."""
    options = ["--model.backbone", "test_resnet", "--model.alpha_eval", "5", "--method", "ll_r"]
    folder = make_run(tmp_path_factory.mktemp("push") / "run", *options, data=small_digits)
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in HOSTILE), encoding="utf-8")
    (folder / "results.json").write_text(json.dumps(RESULTS), encoding="utf-8")
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    with running_hub(tmp_path / "cache", monkeypatch) as made:
        yield made


def push(*words: object) -> None:
    assert push_command.main([str(w) for w in words]) == 0


def front_matter(card: str) -> dict[str, Any]:
    assert card.startswith("---\n")
    header = card.split("\n---\n", 1)[0].removeprefix("---\n")
    values: dict[str, Any] = yaml.safe_load(header)
    return values


def test_the_card(run: Path, small_digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    push("--folder", folder, run, NAME)
    assert f"what push sends to {NAME}; nothing was sent" in capsys.readouterr().out
    assert {p.name for p in folder.iterdir()} == {"README.md", "config.json", "model.safetensors", "spml_fast.json"}
    card = (folder / "README.md").read_text(encoding="utf-8")
    values = front_matter(card)
    assert values["library_name"] == "timm" and values["pipeline_tag"] == "image-classification"
    assert "license" not in values and "ll_r" in values["tags"]
    (result,) = values["model-index"][0]["results"]
    assert [m["value"] for m in result["metrics"]] == [50.0, 60.0]
    assert "<!-- written by spml_fast push -->" in card and f'spml_fast.load("hf-hub:{NAME}")' in card
    assert "| BoostLU, alpha 5 | 60.00 | 61.00 |  | 12.50 |" in card
    assert "1,234 known positives and 5 known negatives of 10 classes" in card
    assert "classes without any known label are left out" in card and "41.25 in epoch 3" in card
    assert "no thresholds of its own" in card and "No licence is given" in card
    train = Manifest(small_digits).split("train")
    share = 100 * float((train.observed.codes == 1).sum()) / (len(train) * 10)
    assert f"trained on train: {len(train)} images; of all labels {share:.3g}% positive" in card
    assert "timm's model gives the logits at alpha 1. spml_fast uses BoostLU's alpha 5" in card
    # Nothing of this machine.
    for path in folder.iterdir():
        content = path.read_bytes()
        assert not any(str(place).encode() in content for place in (run, small_digits, run.parents[1]))


def test_names_mean_nothing_in_the_card(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    push(run, NAME, "--folder", folder)
    card = (folder / "README.md").read_text(encoding="utf-8")
    table = card.partition("## Classes")[2].strip().splitlines()
    assert len(table) == 2 + len(HOSTILE) and all(row.count("|") == table[0].count("|") for row in table)
    text = "\n".join(table[2:])
    assert not re.search(r"[<>\[\]`*$@\x1b!]", text) and "www." not in text and "javascript:" not in text
    assert "| plain name_1 | 50.00 | 60.00 |" in text and text.splitlines()[1].endswith("|  |  |")
    # Readers of Markdown show the references as the characters that they stand for.
    cells = [html.unescape(row.split(" | ")[0].removeprefix("| ")) for row in table[2:]]
    assert cells == [name.replace("\x1b", "\\x1b") for name in HOSTILE]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["label_names"] == HOSTILE
    assert spml_fast.load(folder, "cpu").classes == HOSTILE


def test_thresholds_and_missing_data(run: Path, tmp_path: Path) -> None:
    gone = make_run(tmp_path / "run", "--model.backbone", "test_resnet", "--model.alpha_eval", "1")
    config, classes, classifier = load_for_export(gone)
    decisions = Decisions(1.0, np.array([0.25, *[np.inf] * 9]), Calibration("temperature", np.ones(10), np.zeros(10)))
    saved = SavedDecisions(decisions, DecisionOptions("precision", 0.9), "val", {})
    card = model_card(CardSource("birds", gone, config, classifier, classes, saved, False), "spml_fast push")
    assert "| 0 | 0.2500 |" in card and "| 1 | never |" in card
    assert "of precision 0.9 or more on split val at alpha 1" in card and "Probabilities are calibrated" in card
    assert "The data set was not there" in card and "The run has no test figures" in card
    assert "import timm" not in card and front_matter(card)["library_name"] == "spml_fast"
    assert "model-index" not in front_matter(card) and "a score to rank by" not in card


def test_a_head_that_timm_lacks(tmp_path: Path) -> None:
    options = ["--model.backbone", "test_resnet", "--model.head", "query2label", "--model.head_options"]
    run = make_run(tmp_path / "run", *options, "{preset: tiny}")
    push(run, "queries", "--folder", tmp_path / "model")
    assert {p.name for p in (tmp_path / "model").iterdir()} == {"README.md", "model.safetensors", "spml_fast.json"}
    assert spml_fast.load(tmp_path / "model", "cpu").config.model.head == "query2label"


def test_a_card_that_was_edited_stays(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    push(run, NAME, "--folder", folder)
    push(run, NAME, "--folder", folder)
    card = folder / "README.md"
    card.write_text(card.read_text(encoding="utf-8") + "\nMore.\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"README\.md was edited since it was written"):
        push(run, NAME, "--folder", folder)
    assert card.read_text(encoding="utf-8").endswith("More.\n")
    push(run, NAME, "--folder", folder, "--overwrite")
    assert not card.read_text(encoding="utf-8").endswith("More.\n")
    other = tmp_path / "other"
    other.mkdir()
    (other / "README.md").write_text("# mine\n")
    with pytest.raises(UserError, match=r"README\.md exists and was not written by this command"):
        push(run, NAME, "--folder", other)


@pytest.mark.parametrize("name", ["", "a/b/c", "a b", "../x", "a/..", "a--b", "a/b.git", "a/b.", "a@b", "é"])
def test_names_that_can_be_none(name: str) -> None:
    with pytest.raises(UserError, match="is no name of a model on the Hub"):
        check_name(name)
    assert check_name("Owner_1/a.b-c") == "Owner_1/a.b-c"


def test_what_users_get_wrong(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="is no name of a model"):
        push(run, "a b", "--folder", tmp_path / "model")
    with pytest.raises(UserError, match="is not a run directory"):
        push(tmp_path, NAME)
    with pytest.raises(UserError, match="--public is about the Hub"):
        push(run, NAME, "--folder", tmp_path / "model", "--public")
    monkeypatch.setattr(hub_module.importlib.util, "find_spec", lambda name: None)
    for act in (lambda: push(run, NAME), lambda: spml_fast.load(f"hf-hub:{NAME}")):
        with pytest.raises(UserError, match=r"huggingface_hub is not installed; run pip install 'spml_fast\[hub\]'"):
            act()


class TestHub:
    def test_there_and_back(
        self, run: Path, small_digits: Path, hub: type[Hub], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        push(run, NAME)
        out = capsys.readouterr().out
        assert f"/{NAME}: sent (private, if it was not there before); spml_fast.load('hf-hub:{NAME}') loads it" in out
        assert hub.private == {NAME: True} and hub.commits == {NAME: 1}, "one commit"
        push(run, NAME, "--folder", tmp_path / "model")
        wanted = {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()}
        assert hub.models[NAME] == wanted
        predictor = spml_fast.load(f"hf-hub:{NAME}", "cpu")
        split = Manifest(small_digits).split("test")
        paths = [split.path(i) for i in range(3)]
        # Only what is needed was fetched.
        fetched = {c.rpartition("/")[2] for c in hub.calls if c.startswith("GET") and "/resolve/" in c}
        assert fetched == {"spml_fast.json", "model.safetensors"}
        own = spml_fast.load(run, "cpu").predict(paths, top=10)
        found = predictor.predict(paths, top=10)
        assert predictor.alpha == 5 and found["class"].to_pylist() == own["class"].to_pylist()
        assert np.allclose(found["probability"].to_pylist(), own["probability"].to_pylist(), atol=1e-6)
        # What the card says to those who have timm alone.
        model = timm.create_model(f"hf-hub:{NAME}", pretrained=True).eval()
        transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
        with torch.no_grad():
            logits = model(torch.stack([transform(Image.open(p).convert("RGB")) for p in paths])).numpy()
        expected, _ = logits_of(run, 1.0, paths)
        assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()
        assert not any(TOKEN in str(p.read_bytes()) for p in tmp_path.rglob("*") if p.is_file())

    def test_a_second_push_is_another_commit_and_public_is_asked_for(
        self, run: Path, hub: type[Hub], capsys: pytest.CaptureFixture[str]
    ) -> None:
        push(run, "birds", "--public")
        assert "owner/birds: sent (for everybody to see" in capsys.readouterr().out and hub.private == {NAME: False}
        hub.models[NAME]["README.md"] += b"\nMore.\n"
        push(run, NAME)
        assert f"the model card of {NAME} is not as this command wrote it, and stays" in capsys.readouterr().err
        assert hub.commits == {NAME: 2} and hub.private == {NAME: False}
        assert hub.models[NAME]["README.md"].endswith(b"More.\n")
        push(run, NAME, "--overwrite")
        assert not hub.models[NAME]["README.md"].endswith(b"More.\n")

    def test_what_timm_does_not_have_leaves_no_model_of_timm(self, run: Path, hub: type[Hub], tmp_path: Path) -> None:
        push(run, NAME)
        assert "config.json" in hub.models[NAME]
        options = ["--model.backbone", "test_resnet", "--model.head", "query2label", "--model.head_options"]
        push(make_run(tmp_path / "run", *options, "{preset: tiny}"), NAME)
        assert "config.json" not in hub.models[NAME] and "model.safetensors" in hub.models[NAME]

    def test_what_others_have_there_stays(self, run: Path, hub: type[Hub]) -> None:
        hub.models[NAME], hub.private[NAME], hub.commits[NAME] = {"model.safetensors": b"mine"}, True, 0
        with pytest.raises(UserError, match=r"has model\.safetensors that this command did not write"):
            push(run, NAME)
        assert hub.models[NAME] == {"model.safetensors": b"mine"}
        with pytest.raises(UserError, match=r"is no model that spml-fast push wrote \(it lacks spml_fast\.json"):
            spml_fast.load(f"hf-hub:{NAME}")

    def test_nobody_logged_in(self, run: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("HF_TOKEN")
        with pytest.raises(UserError, match=rf"{NAME} cannot be made on the Hub: .*hf auth login"):
            push(run, NAME)
        assert hub.models == {}
        with pytest.raises(UserError, match=r"hf-hub:owner/none cannot be fetched"):
            spml_fast.load("hf-hub:owner/none")

    def test_damaged_and_hostile_weights(self, run: Path, hub: type[Hub], tmp_path: Path) -> None:
        push(run, NAME)
        files, marker = hub.models[NAME], tmp_path / "ran"

        class Runs:
            def __reduce__(self) -> Any:
                return Path.touch, (marker,)

        for content, message in (
            (files["model.safetensors"][:-1] + b"\0\0", "is damaged"),
            (pickle.dumps(Runs()), "is damaged"),
        ):
            hub.models[NAME] = {**files, "model.safetensors": content, "pytorch_model.bin": pickle.dumps(Runs())}
            hub.commits[NAME] += 1
            with pytest.raises(UserError, match=message):
                spml_fast.load(f"hf-hub:{NAME}", "cpu")
        # A record that fits does not make a pickle run either.
        evil = tmp_path / "evil"
        evil.write_bytes(pickle.dumps(Runs()))
        record = json.loads(files["spml_fast.json"])
        record["files"]["model.safetensors"] = vars(file_record(evil))
        hub.models[NAME] = {
            **files,
            "model.safetensors": evil.read_bytes(),
            "spml_fast.json": json.dumps(record).encode(),
        }
        hub.commits[NAME] += 1
        with pytest.raises(UserError, match="is no safetensors file"):
            spml_fast.load(f"hf-hub:{NAME}", "cpu")
        assert not marker.exists()
        with pytest.raises(UserError, match="cannot be fetched"):
            spml_fast.load(f"hf-hub:{NAME}@{'0' * 40}", "cpu")
