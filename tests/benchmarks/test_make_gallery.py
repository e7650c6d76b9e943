"""The gallery's page is what the script writes; pictures are small, and of the digit scenes alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from benchmarks import make_gallery
from spml_fast.core.errors import UserError
from spml_fast.prepare.datasets.digits import prepare_digits
from tests.support.exports import make_run
from tests.support.paths import ROOT


def test_the_page_is_what_the_script_writes() -> None:
    assert (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8") == make_gallery.page()
    files = [name for caption in make_gallery.CAPTIONS for name in make_gallery.shown(caption)]
    assert len(files) >= 4 and all((ROOT / "docs" / name).stat().st_size <= make_gallery.LARGEST for name in files)
    made = {p.name for p in (ROOT / "docs" / "gallery").glob("*")}
    assert made <= {Path(name).name for caption in make_gallery.CAPTIONS for name in caption.files}


def test_a_newer_picture_takes_the_place_of_an_older(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_gallery, "DOCS", tmp_path)
    caption = make_gallery.Caption(("gallery/a-light.png", "gallery/a-dark.png", "a.png"), "A", "")
    assert make_gallery.shown(caption) == []
    (tmp_path / "a.png").touch()
    assert make_gallery.shown(caption) == ["a.png"]
    (tmp_path / "gallery").mkdir()
    (tmp_path / "gallery" / "a-dark.png").touch()
    assert make_gallery.shown(caption) == ["gallery/a-dark.png"]


def test_a_terminal_loads_nothing_from_elsewhere() -> None:
    svg = make_gallery.terminal("$ spml-fast train\nepoch 1/2 | \x1b[31mloss\x1b[0m 0.5", "train")
    assert "epoch" in svg and "loss" in svg and svg.startswith("<svg")
    assert "@font-face" not in svg and "url(http" not in svg
    widths = [
        float(make_gallery.terminal(text, "x").split('viewBox="0 0 ')[1].split()[0]) for text in ("a" * 40, "a" * 80)
    ]
    assert widths[1] > 1.7 * widths[0], "no wider than its text"


def test_a_large_picture_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.effect_noise((200, 200), 100)
    make_gallery.save(image, tmp_path / "fine.png")
    assert Image.open(tmp_path / "fine.png").mode == "P"
    monkeypatch.setattr(make_gallery, "LARGEST", 1000)
    with pytest.raises(UserError, match=r"noise\.png has \d+ kB; at most 1 are shown"):
        make_gallery.save(image, tmp_path / "noise.png")


def test_other_images_than_digits_are_refused(tmp_path: Path) -> None:
    data = prepare_digits(tmp_path / "digits", sizes={"train": 4, "val": 2, "test": 2}).folder
    run = make_run(tmp_path / "run", "--model.backbone", "test_resnet", data=data)
    assert make_gallery.require_digits(Path("run"), tmp_path).name == "digits"
    manifest = data / "manifest.json"
    manifest.write_text(manifest.read_text(encoding="utf-8").replace('"digits"', '"photos"'), encoding="utf-8")
    with pytest.raises(UserError, match="is of data set photos; pictures are made of the digit scenes alone"):
        make_gallery.require_digits(run, tmp_path)


def test_a_failed_command_is_one_sentence(tmp_path: Path) -> None:
    studio = make_gallery.Studio(tmp_path, Path("no/such/run"), tmp_path, tmp_path)
    with pytest.raises(UserError, match="spml-fast evaluate failed: error: "):
        studio.command("evaluate", "--run", studio.run)


def test_a_kept_run_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands run in the folder that keeps it, so that pictures name no path of the machine."""
    data = prepare_digits(tmp_path / "data", sizes={"train": 4, "val": 2, "test": 2}).folder
    (tmp_path / "runs").mkdir()
    run = make_run(tmp_path / "runs" / "digits", "--model.backbone", "test_resnet", data=data)
    (run / "results.json").touch()
    made: list[make_gallery.Studio] = []
    monkeypatch.setattr(make_gallery, "DOCS", tmp_path)
    monkeypatch.setattr(make_gallery, "PICTURES", {"maps": made.append})
    monkeypatch.setattr(make_gallery, "train", lambda studio: pytest.fail("trained again"))
    assert make_gallery.main(["--work", str(tmp_path), "--only", "maps"]) == 0
    assert [(studio.where, studio.run) for studio in made] == [(tmp_path, Path("runs/digits"))]
    with pytest.raises(UserError, match="leave it out, or --run"):
        make_gallery.main(["--work", str(tmp_path), "--run", str(run)])
