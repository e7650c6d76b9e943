"""The order of tests that workers share: long ones first, so that no worker waits at the end for another's last one.

pytest-xdist (`--dist worksteal`) hands each worker an equal part of the list, and who is done takes the last half of
what another has left. So every part begins with the files whose tests are slow and ends with quick ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest

# Of slow files those with the longest tests, the longest first.
LONGEST = ("test_notebooks.py", "test_interpreter.py", "test_compile.py", "test_compile_choice.py")


def shared(items: Sequence[pytest.Item], workers: int) -> list[pytest.Item]:
    """The same tests in another order; those of a file stay together where they can, for they share fixtures.

    Args:
        items: marked, in the order of their files.
        workers: that share them.
    """
    files = [list(group) for _, group in itertools.groupby(items, lambda item: item.path)]
    slow, quick = [], []
    for file in files:
        if any(item.get_closest_marker("slow") for item in file):
            slow.append(file)
        else:
            quick += file
    slow.sort(key=lambda file: (*LONGEST, file[0].path.name).index(file[0].path.name))
    order: list[pytest.Item] = []
    for worker in range(workers):
        order += [item for file in slow[worker::workers] for item in file]
        left = max(0, len(items) * (worker + 1) // workers - len(order))
        order += quick[:left]
        del quick[:left]
    return order + quick
