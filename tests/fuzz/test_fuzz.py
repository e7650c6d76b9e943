"""The short form of tests/fuzz/run.py: what was found before, and a few hundred new inputs for every parser."""

from __future__ import annotations

import json

import pytest

from tests.fuzz.run import RECORD, corpus, run_case, run_target
from tests.fuzz.targets import Target, make_targets

NAMES = [
    *("csv_table", "jsonl_table", "parquet_table", "id_list", "class_lists", "coco", "boxes", "voc_xml", "voc_flags"),
    *("openimages", "cub", "nuswide", "tar", "shards", "manifest", "recipe", "run_files", "images"),
    *("yolo", "coco_detection", "fiftyone", "labelstudio", "hub_metadata", "hub_parquet", "hub_saved"),
]


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    return make_targets(tmp_path_factory.mktemp("fuzz"))


def test_every_target_is_run(targets):
    assert list(targets) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_no_exception_but_one_sentence(targets, name, tmp_path):
    assert not run_target(targets[name], 150, 0, tmp_path, keep=False)


@pytest.mark.parametrize("name", NAMES)
def test_seeds_reach_the_parser(targets, name, tmp_path):
    """The first seed is right, so that mutations of it get beyond the first line."""
    (tmp_path / "seed").mkdir()
    targets[name].parse(tmp_path / "seed", targets[name].seeds[0])


def test_a_finding_is_reported(tmp_path):
    def parse(folder, data):
        if b"\xff" in data:
            raise KeyError("found")

    target = Target("made_up", [b"abcdefgh"], parse)
    assert run_case(target, b"abc", tmp_path / "case") is None
    findings = run_target(target, 400, 0, tmp_path, keep=False)
    assert len(findings) == 1 and "KeyError" in findings[0]
    assert corpus(target) == [b"abcdefgh"]


def test_the_record():
    record = json.loads(RECORD.read_text())
    assert set(record["targets"]) == set(NAMES)
    assert record["cases"] == sum(run["cases"] for t in record["targets"].values() for run in t["runs"])
    # What was found was mended, and its inputs are in the corpus.
    assert all(t["runs"][-1]["findings"] == 0 for t in record["targets"].values())
