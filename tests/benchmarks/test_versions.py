"""Two versions of a repository side by side."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import versions
from benchmarks.versions import checkout, git, resolve
from spml_fast.core.errors import UserError
from tests.support.repository import repository


def test_a_version_that_is_none_is_said() -> None:
    with pytest.raises(UserError, match="git rev-parse --verify no-such-version failed: "):
        git("rev-parse", "--verify", "no-such-version")


def test_two_versions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    root = repository(tmp_path / "repository", {"a.txt": "one"}, {"a.txt": "two", "b.txt": "new"})
    monkeypatch.setattr(versions, "ROOT", root)
    newer, older = resolve("HEAD", "HEAD~1")
    with pytest.raises(UserError, match=r"^--version HEAD and --against main are the same commit$"):
        resolve("HEAD", "main")
    with checkout(older, tmp_path / "old") as old, checkout(newer, tmp_path / "new") as new:
        assert (old / "a.txt").read_text() == "one" and not (old / "b.txt").exists()
        assert (new / "a.txt").read_text() == "two"
    assert not (tmp_path / "old").exists() and not (tmp_path / "new").exists()
    assert git("worktree", "list").count("\n") == 0


def test_a_checkout_is_removed_when_what_uses_it_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(versions, "ROOT", repository(tmp_path / "repository", {"a.txt": "one"}))
    with pytest.raises(RuntimeError, match="it fails"), checkout("HEAD", tmp_path / "tree") as tree:
        (tree / "left.txt").write_text("behind")
        raise RuntimeError("it fails")
    assert not (tmp_path / "tree").exists()
