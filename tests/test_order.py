"""The order in which workers take the tests."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.order import LONGEST, shared
from tests.support.paths import ROOT


def file_of(name, number, slow=()):
    """Tests of a file, of which those with some numbers are slow."""
    return [
        SimpleNamespace(path=Path(name), number=n, get_closest_marker=lambda mark, n=n: mark == "slow" and n in slow)
        for n in range(number)
    ]


def places(items):
    return [(item.path.name, item.number) for item in items]


ITEMS = [*file_of("a.py", 9), *file_of("b.py", 3, {1}), *file_of("c.py", 2, {0, 1}), *file_of("d.py", 5)]
ITEMS += [*file_of("e.py", 2, {0}), *file_of(LONGEST[0], 2, {1}), *file_of("f.py", 4)]


@pytest.mark.parametrize("workers", [1, 2, 3, 40])
def test_every_test_stays_and_files_keep_their_order(workers):
    order = shared(ITEMS, workers)
    assert sorted(places(order)) == sorted(places(ITEMS))
    for name in {item.path.name for item in ITEMS}:
        assert [n for file, n in places(order) if file == name] == sorted(
            n for file, n in places(ITEMS) if file == name
        )


def test_every_worker_begins_with_slow_files_and_ends_with_quick_ones():
    order = [name for name, _ in places(shared(ITEMS, 2))]
    first, second = order[:13], order[13:]
    assert first == [LONGEST[0]] * 2 + ["c.py"] * 2 + ["a.py"] * 9
    assert second == ["b.py"] * 3 + ["e.py"] * 2 + ["d.py"] * 5 + ["f.py"] * 4


def test_more_slow_tests_than_a_workers_part():
    items = [*file_of("a.py", 9, {0}), *file_of("b.py", 1, {0}), *file_of("c.py", 2)]
    assert [name for name, _ in places(shared(items, 2))] == ["a.py"] * 9 + ["b.py"] + ["c.py"] * 2


def test_the_longest_are_there():
    assert {path.name for path in (ROOT / "tests").rglob("test_*.py")} >= set(LONGEST)
