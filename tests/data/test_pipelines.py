"""Processes that are forked while pipelines run."""

from __future__ import annotations

import gc
import multiprocessing

import pytest

from spml_fast.data.manifest import Split
from tests.support.loading import data_config, make_photos, train_loader


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Split:
    return make_photos(tmp_path_factory.mktemp("photos"))


def _drop(held: list) -> None:
    held.clear()
    gc.collect()


CONFIGS = {
    "in memory": data_config(),
    "anew": data_config(keep_decoded=0),
    "reduced": data_config(decode="reduced", strong_from="resized"),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_fork_may_drop_a_loader(config, photos):
    """Before, it crashed or waited for ever."""
    # Nobody else refers to them: the fork has this frame, too.
    held: list = [train_loader(photos, config)]
    held.append(held[0].epoch(0))
    next(held[1])
    process = multiprocessing.get_context("fork").Process(target=_drop, args=(held,))
    process.start()
    process.join(60)
    try:
        assert process.exitcode == 0
    finally:
        process.kill()
    # The one who has the threads goes on.
    assert sum(len(update) for update in held[1]) == held[0].updates_per_epoch - 1
