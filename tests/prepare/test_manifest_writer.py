"""A Manifest is written whole or not at all, and nothing else is ever overwritten."""

from __future__ import annotations

import multiprocessing

import pytest

from spml_fast.core.errors import UserError
from spml_fast.data.manifest import LOCK, Manifest
from spml_fast.prepare.manifest_writer import ManifestWriter
from tests.support.data import ODD_PATHS, small_labels, write_manifest


def test_nothing_is_a_manifest_until_it_is_finished(tmp_path):
    writer = ManifestWriter(tmp_path / "m", "mine", ["ant", "bee", "cat"], tmp_path / "images")
    writer.add_split("train", known=small_labels(), width=[1] * 5, height=[1] * 5, paths=ODD_PATHS)
    assert not (tmp_path / "m").exists()
    with pytest.raises(UserError, match="not a Manifest"):
        Manifest(writer.staging)
    # What a killed preparation left behind does not hinder the next one.
    write_manifest(tmp_path / "m", tmp_path / "images")
    assert not writer.staging.exists()


def test_overwrite(tmp_path):
    write_manifest(tmp_path / "m", tmp_path / "p")
    with pytest.raises(UserError, match="--overwrite"):
        write_manifest(tmp_path / "m", tmp_path / "p")
    assert write_manifest(tmp_path / "m", tmp_path / "p", ["x", "y", "z"], overwrite=True).classes == ["x", "y", "z"]


def test_foreign_folders_and_files_are_left_alone(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("dear")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="not a Manifest"):
        write_manifest(tmp_path / "thesis", tmp_path / "p", overwrite=True)
    with pytest.raises(UserError, match="is a file"):
        write_manifest(tmp_path / "file", tmp_path / "p", overwrite=True)
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "dear"
    with pytest.raises(UserError, match="cannot be written"):
        write_manifest(tmp_path / "file" / "below", tmp_path / "p")


def test_images_are_never_deleted_by_overwriting(tmp_path):
    write_manifest(tmp_path / "m", tmp_path / "p")
    (tmp_path / "m" / "images").mkdir()
    with pytest.raises(UserError, match="images lie inside"):
        write_manifest(tmp_path / "m", tmp_path / "m" / "images", overwrite=True)
    assert (tmp_path / "m" / "images").is_dir() and not (tmp_path / "m.partial").exists()


def test_two_commands_never_write_one_manifest(tmp_path):
    ours, theirs = multiprocessing.Pipe()

    def other() -> None:
        writer = ManifestWriter(tmp_path / "m", "mine", ["ant"], tmp_path / "p")
        theirs.send("begun")
        theirs.recv()
        assert writer.staging.exists()

    process = multiprocessing.get_context("fork").Process(target=other)
    process.start()
    assert ours.recv() == "begun"
    with pytest.raises(UserError, match=r"another command is writing .*m; wait for it"):
        write_manifest(tmp_path / "m", tmp_path / "p")
    ours.send("end")
    process.join()
    assert process.exitcode == 0 and (tmp_path / "m.partial").exists()
    # It is gone, and left its work unfinished.
    assert len(write_manifest(tmp_path / "m", tmp_path / "p").split("train")) == 5
    assert not list(tmp_path.rglob("*.lock")) and not list(tmp_path.rglob(".lock"))


def test_a_manifest_that_is_read_is_not_replaced(tmp_path):
    """By a process that reads it when the command starts, or since the command started."""
    manifest = write_manifest(tmp_path / "m", tmp_path / "p")
    ours, theirs = multiprocessing.Pipe()

    def other() -> None:
        for _ in range(2):
            theirs.recv()
            try:
                manifest.register_reader()
                theirs.send("")
            except UserError as error:
                theirs.send(str(error))

    process = multiprocessing.get_context("fork").Process(target=other)
    process.start()
    writer = ManifestWriter(tmp_path / "m", "mine", ["x", "y", "z"], tmp_path / "p", overwrite=True)
    writer.add_split("train", known=small_labels(), width=[1] * 5, height=[1] * 5, paths=ODD_PATHS)
    ours.send(0)
    assert ours.poll(60)
    assert "is being prepared anew by another command" in ours.recv()
    (writer.staging / LOCK).rename(writer.staging / "elsewhere")
    ours.send(0)
    assert ours.poll(60)
    assert ours.recv() == ""
    (writer.staging / "elsewhere").rename(writer.staging / LOCK)
    process.kill()
    readers = tmp_path / "m" / ".readers"
    (left,) = readers.iterdir()
    process.join()
    # It was killed: its file says nothing.
    assert writer.finish({}).classes == ["x", "y", "z"] and not left.exists()


def test_a_reader_that_lives_is_named(tmp_path):
    manifest = write_manifest(tmp_path / "m", tmp_path / "p")
    ours, theirs = multiprocessing.Pipe()

    def other() -> None:
        manifest.register_reader()
        theirs.send("registered")
        theirs.recv()

    process = multiprocessing.get_context("fork").Process(target=other)
    process.start()
    assert ours.recv() == "registered"
    with pytest.raises(UserError, match=f"m is being read by process {process.pid} on "):
        write_manifest(tmp_path / "m", tmp_path / "p", overwrite=True)
    assert Manifest(tmp_path / "m").classes == manifest.classes
    process.kill()
    process.join()
    write_manifest(tmp_path / "m", tmp_path / "p", overwrite=True)


@pytest.mark.parametrize("classes", [["a", "a"], ["a", ""], ["a", "b\nc"], ["a", "b\rc"]])
def test_class_names(tmp_path, classes):
    with pytest.raises(UserError, match="class"):
        ManifestWriter(tmp_path / "m", "mine", classes, tmp_path)
    assert not (tmp_path / "m").exists() and not (tmp_path / "m.partial").exists()


def test_columns_must_have_one_value_a_sample(tmp_path):
    writer = ManifestWriter(tmp_path / "m", "mine", ["ant", "bee", "cat"], tmp_path / "p")
    with pytest.raises(ValueError, match="5 expected"):
        writer.add_split("train", known=small_labels(), width=[1] * 4, height=[1] * 5, paths=ODD_PATHS)
    with pytest.raises(ValueError, match="either paths"):
        writer.add_split("val", known=small_labels(), width=[1] * 5, height=[1] * 5)
    with pytest.raises(ValueError, match="observed"):
        writer.add_split(
            "test", known=small_labels(), observed=small_labels(3), width=[1] * 5, height=[1] * 5, paths=ODD_PATHS
        )
