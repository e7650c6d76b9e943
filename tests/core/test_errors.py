"""Errors of a user: who says them, and when."""

from __future__ import annotations

import pytest

from spml_fast.core import errors


@pytest.mark.parametrize(
    ("local_rank", "met", "waits"), [("0", False, False), ("1", False, True), ("1", True, False), (None, False, False)]
)
def test_who_leaves_an_error_to_the_first_rank(
    local_rank: str | None, met: bool, waits: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is lost where no launcher ends the others: they say it too, and later."""
    said_before: list[str] = []
    monkeypatch.setattr(errors.time, "sleep", lambda seconds: said_before.append(capsys.readouterr().err))
    monkeypatch.setattr(errors, "ranks_met", errors.threading.Event())
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
        if local_rank is not None:
            monkeypatch.setenv(name, local_rank)
    if met:
        errors.ranks_met.set()
    with pytest.raises(SystemExit) as left:
        errors.fail("no", status=3)
    assert left.value.code == 3 and said_before == ([""] if waits else [])
    assert capsys.readouterr().err == ("rank 1: " if local_rank == "1" else "") + "error: no\n"


def test_a_second_interruption_ends_the_wait(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(errors.time, "sleep", interrupted)
    monkeypatch.setattr(errors, "ranks_met", errors.threading.Event())
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(SystemExit):
        errors.fail("interrupted", status=130)
    assert capsys.readouterr().err == "rank 2: error: interrupted\n"
