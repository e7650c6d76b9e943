"""Ranks act on the same numbers at the same update."""

from __future__ import annotations

import torch.distributed as dist
import torch.multiprocessing as mp

from spml_fast.training.agreement import Agreement
from tests.support.runs import free_port


def test_one_rank_has_its_own_numbers_at_once():
    agreement = Agreement(2)
    assert agreement.exchange([3, 0]) == [3, 0] and agreement.agree([0, 4]) == [0, 4]
    agreement.close()


def rank_main(rank: int, port: int) -> None:
    """Two ranks whose numbers differ."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    agreement = Agreement(2)
    own = [[0, 0], [15 * rank, 1 - rank], [0, 0], [rank, 7]]
    assert [agreement.exchange(numbers) for numbers in own] == [[0, 0], [0, 0], [15, 1], [0, 0]]
    # What was under way counts too.
    assert agreement.agree([0, 9 * rank]) == [1, 9]
    agreement.close()
    dist.destroy_process_group()


def test_two_ranks_agree_on_the_largest_an_update_later():
    # Not forks: a training that a test before this one ran in its own process leaves that a process group.
    mp.start_processes(rank_main, args=(free_port(),), nprocs=2, start_method="spawn")
