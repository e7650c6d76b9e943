"""Jobs over worker processes that share what they need without copying it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from spml_fast.core.errors import UserError
from spml_fast.core.workers import worker_pool

State = TypeVar("State")
Result = TypeVar("Result")

# The state of each running `run_jobs`. Set before the worker processes are forked, which inherit it.
_states: list[Any] = []


def _call(function: Callable[[State, int], Result], job: int) -> Result:
    return function(_states[-1], job)


def run_jobs(
    function: Callable[[State, int], Result], jobs: Sequence[int], state: State, workers: int | None
) -> Iterator[Result]:
    """Results of `function(state, job)` for all jobs, in any order, over worker processes.

    Args:
        function: defined in a module.
        jobs: numbers of the jobs.
        state: what the function needs; worker processes see it as it is now, and their changes are lost.
        workers: processes; None for all cores.

    Raises:
        UserError: a process died.
    """
    workers = min(workers or len(os.sched_getaffinity(0)), len(jobs))
    _states.append(state)
    try:
        if workers <= 1:
            for job in jobs:
                yield function(state, job)
            return
        with worker_pool(workers) as pool:
            try:
                for future in as_completed([pool.submit(_call, function, job) for job in jobs]):
                    yield future.result()
            except BrokenProcessPool as error:
                raise UserError(
                    "a process that was packing images died (out of memory?); repeat the command with fewer "
                    "--workers to resume from the shards that are whole"
                ) from error
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    finally:
        _states.pop()
