"""launch/prepare.py as a user runs it, and data sets that register themselves."""

from __future__ import annotations

import numpy as np
import pytest

from spml_fast.data.labels import SparseLabels
from spml_fast.data.manifest import Manifest
from spml_fast.prepare import raw
from spml_fast.prepare.datasets import base, load_all
from spml_fast.prepare.observed_labels import published_split
from tests.support import data as make
from tests.support.prepare import make_table, run_prepare

TRAIN = {9: [7, 1], 10: [1], 100: [90, 90, 1], 11: [], 2: [7], 30: [90]}


def test_every_data_set_has_a_subcommand_and_help(capsys):
    assert {"coco", "csv", "digits", "voc"} <= set(load_all())
    for name in load_all():
        with pytest.raises(SystemExit) as stop:
            run_prepare(*[name, "--help"])
        text = capsys.readouterr().out
        assert stop.value.code == 0
        assert all(
            option in text for option in ("--out", "--observe", "--seed", "--verify", "--orientation", "--overwrite")
        )


@pytest.mark.parametrize("words", [[], ["imagenet"], ["digits"], ["digits", "--ou", "x"], ["csv", "--out", "x"]])
def test_command_line_mistakes(words, capsys):
    with pytest.raises(SystemExit) as stop:
        run_prepare(*words)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.startswith("error: ") and message.count("\n") == 1
    assert "--help lists every option" in message


def test_a_new_data_set_is_one_class(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "DATASETS", base.DATASETS.copy())
    make.write_files(tmp_path, {f"images/{i:x}.jpg": make.encoded() for i in range(10)})

    @base.register("numbered")
    class Numbered(base.Dataset):
        """Ids and a template, and nothing else."""

        def read(self, options):
            known = SparseLabels.from_positives([[i % 2] for i in range(10)], 2, -1)
            split = raw.RawSplit("train", known, ids=np.arange(10), template="images/{id:x}.jpg")
            return raw.RawDataset("numbered", ["even", "odd"], tmp_path, [split], carve=("train", "val"))

    import argparse

    parser = argparse.ArgumentParser()
    base.add_common_options(parser, Numbered)
    manifest = Numbered().prepare(parser.parse_args(["--out", str(tmp_path / "m")]))
    train, val = manifest.split("train"), manifest.split("val")
    assert (len(train), len(val)) == (8, 2)
    assert [train.relative_path(i) for i in range(8)] == [f"images/{i:x}.jpg" for i in published_split(10)[0]]
    with pytest.raises(ValueError, match="registered twice"):
        base.register("numbered")(Numbered)
    # It is a subcommand, although it lies outside of the package.
    assert load_all()["numbered"] is Numbered and {"coco", "csv"} <= set(load_all())
    with pytest.raises(SystemExit) as stop:
        run_prepare("numbered", "--help")
    assert stop.value.code == 0


def test_commands_as_a_user_runs_them(tmp_path, run_script):
    voc = make.make_voc(tmp_path / "VOC 2012")
    (voc / "JPEGImages" / "2009_000001.jpg").write_bytes(b"")
    train, images = make.make_coco(tmp_path, "train", TRAIN)
    table, folder = make_table(tmp_path, "path,positives,split\na.jpg,cat,train\nb.jpg,dog,train\n")
    commands = {
        "digits": ["digits", "--train", "30", "--val", "5", "--test", "5"],
        "voc": ["voc", "--root", voc],
        "coco": ["coco", "--annotations", train, "--images", images, "--observe", "keep=0.5"],
        "csv": ["csv", "--table", table, "--images", folder],
    }
    for name, arguments in commands.items():
        out = tmp_path / f"out {name}"
        done = run_script("prepare.py", *arguments, "--out", out)
        assert done.returncode == 0, done.stderr
        manifest = Manifest(out)
        assert f"Manifest: {out}" in done.stdout and f"--data.dir '{out}'" in done.stdout
        assert all(len(split) for split in manifest.splits.values())
        if name == "voc":
            assert "left out: 1 images" in done.stdout and "1  empty file" in done.stdout
    assert not list(tmp_path.glob("*.partial"))
    failed = run_script("prepare.py", "csv", "--table", table, "--images", images, "--out", images)
    assert failed.returncode == 1 and "Traceback" not in failed.stderr
    assert failed.stderr.startswith("error: ") and failed.stderr.count("\n") == 1
