"""Signals: the run saves and ends, at once the second time, and is what an undisturbed run is once it has resumed."""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from spml_fast.training.signals import StopSignals
from tests.support.paths import ROOT
from tests.support.runs import Run, command, environment, rank_variables, read_metrics
from tests.training.test_training import options, weights


def in_python() -> None:
    """Wait where Python's own handlers run."""
    time.sleep(1)


def in_c() -> None:
    """Wait for a pipe to which nobody writes, in a C function that Python's handlers cannot interrupt."""
    ctypes.CDLL(None).read(os.pipe()[0], ctypes.create_string_buffer(1), 1)


class Waiting:
    """A fork that waits with `StopSignals` around it, ready for signals.

    Args:
        wait: what it does.
        seconds: that it has to end.
        before: called first.
    """

    def __init__(self, wait: Callable[[], None] = in_python, seconds: float = 25, before: Any = None) -> None:
        self.output = os.memfd_create("stderr")
        self.ready = multiprocessing.get_context("fork").Event()
        self.process = multiprocessing.get_context("fork").Process(target=self._main, args=(wait, seconds, before))
        self.process.start()
        assert self.ready.wait(60) and self.process.pid is not None
        self.pid = self.process.pid

    def _main(self, wait: Callable[[], None], seconds: float, before: Any) -> None:
        os.dup2(self.output, 2)
        sys.stderr = os.fdopen(2, "w")
        # The tests themselves may run under nohup, or behind a shell's `&`.
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if before is not None:
            before()
        with StopSignals(seconds, program=True) as signals:
            signals.kept = "epoch 3 is saved"
            self.ready.set()
            wait()
        print("after", signals.number, file=sys.stderr, flush=True)

    def send(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def end(self) -> tuple[int | None, str]:
        """Exit status and standard error."""
        self.process.join(60)
        return self.process.exitcode, os.pread(self.output, 1 << 16, 0).decode()


def test_one_signal_is_noted_and_nothing_is_interrupted() -> None:
    fork = Waiting()
    fork.send(signal.SIGUSR1)
    status, told = fork.end()
    assert status == 0 and told.startswith("SIGUSR1: saving at the next update") and told.endswith("\nafter 10\n")


def test_two_signals_within_three_seconds_are_one() -> None:
    """What `deepspeed` makes of a Ctrl-C."""
    fork = Waiting()
    fork.send(signal.SIGINT)
    fork.send(signal.SIGTERM)
    status, told = fork.end()
    assert status == 0 and told.count("saving at the next") == 1 and told.endswith(("after 2\n", "after 15\n"))


def test_a_later_signal_ends_at_once_even_in_c() -> None:
    fork = Waiting(in_c)
    fork.send(signal.SIGTERM)
    time.sleep(3.2)
    fork.send(signal.SIGINT)
    status, told = fork.end()
    assert status == 130 and "stopped by SIGINT: a second signal" in told and told.endswith("; epoch 3 is saved\n")


def test_the_time_for_saving_has_an_end() -> None:
    fork = Waiting(in_c, seconds=0.5)
    fork.send(signal.SIGTERM)
    status, told = fork.end()
    assert status == 143
    assert "it did not end within 0.5 seconds (run.stop_seconds); epoch 3 is saved" in told


def test_what_was_ignored_stays_ignored() -> None:
    """`nohup` ignores SIGHUP before the program starts."""
    fork = Waiting(before=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    fork.send(signal.SIGHUP)
    assert fork.end() == (0, "after 0\n")


def test_a_pipe_that_goes_with_the_terminal_is_no_error() -> None:
    """`train | tee log` in a terminal that closes: what is printed afterwards goes nowhere."""

    def cut() -> None:
        reader, writer = os.pipe()
        os.dup2(writer, 1)
        os.close(reader)
        os.close(writer)

    def write() -> None:
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(1)
        os.write(1, b"a line")

    status, told = Waiting(write, before=cut).end()
    assert status == 0 and told.endswith("after 1\n")


def test_a_notebook_gets_an_exception_for_the_second_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spml_fast.training.signals.SAME_REQUEST_SECONDS", 0.05)
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.getsignal(signal.SIGINT)
    with StopSignals(0.01, program=False) as signals:
        os.kill(os.getpid(), signal.SIGINT)
        # Nothing ends it however long it takes.
        time.sleep(0.3)
        assert signals.number == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
    assert signal.getsignal(signal.SIGINT) is before and signal.set_wakeup_fd(-1) == -1
    signal.signal(signal.SIGINT, ignored)


def test_another_thread_changes_no_handlers() -> None:
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: StopSignals(1, program=True).__enter__()._before).result() == {}


def wait_for(run: Path, updates: int, processes: Sequence[subprocess.Popen[str]]) -> None:
    """Wait until a run has logged so many updates."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and all(process.poll() is None for process in processes):
        if (run / "metrics.jsonl").exists() and len(read_metrics(run, "update")) >= updates:
            return
        time.sleep(0.02)
    raise AssertionError([process.communicate() for process in processes])


def start(words: Sequence[str], ranks: int = 1) -> list[subprocess.Popen[str]]:
    """Start a run, one process per rank, without a launcher."""
    return [
        subprocess.Popen(
            [*command("train.py", 1, "python"), *words],
            env=environment(**variables),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for variables in rank_variables(ranks)
    ]


def test_a_signal_to_one_rank_saves_on_both_and_resumes_bit_for_bit(
    small_digits: Path, run_script: Run, tmp_path: Path
) -> None:
    """With live BatchNorm, whose statistics differ from rank to rank within an epoch, and saves that change nothing."""
    more = {"train__ema_decay": 0.9, "train__batch_size": 16, "train__epochs": 1, "data__test_split": "null"}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = run_script("train.py", *options(small_digits, whole, **more), ranks=2)
    assert done.returncode == 0, done.stderr
    more["run__save_updates"] = 2
    processes = start(options(small_digits, cut, **more), 2)
    wait_for(cut, 3, processes)
    processes[1].send_signal(signal.SIGUSR1)
    told = [process.communicate(timeout=200)[1] for process in processes]
    assert [process.returncode for process in processes] == [138, 138], told
    assert told[0].splitlines()[-1].startswith("stopped by SIGUSR1: epoch ") and "Traceback" not in "".join(told)
    assert f"is saved, and the same command with --run.dir {cut} resumes there (exit status 138)" in told[0]
    mark = json.loads((cut / "checkpoints" / "newest.json").read_text())
    assert mark["epoch"] == 0 and 3 <= mark["update"] < 12
    done = run_script("train.py", *options(small_digits, cut, **more), ranks=2)
    assert done.returncode == 0 and f"resuming at epoch 1, update {mark['update'] + 1}" in done.stdout, done.stderr
    first, second = weights(whole), weights(cut)
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert read_metrics(whole, "epoch")[-1]["val_map"] == read_metrics(cut, "epoch")[-1]["val_map"]


@pytest.mark.parametrize("minutes", [0, 1e-9])
def test_saving_by_time(minutes: float, small_digits: Path, run_script: Run, tmp_path: Path) -> None:
    """So little time that it is always over, or none."""
    run = tmp_path / "run"
    more = {"train__epochs": 1, "train__batch_size": 48, "run__save_minutes": minutes, "run__keep": 9}
    more |= {"data__test_split": "null"}
    done = run_script("train.py", *options(small_digits, run, **more))
    assert done.returncode == 0, done.stderr
    kept = [path.name for path in (run / "checkpoints").iterdir() if path.is_dir()]
    # By the clock an update waits while the one before is being written.
    assert ("finetune-e0000-u000001-w1" in kept) == bool(minutes) and "finetune-e0001-u000000-w1" in kept
    assert minutes or len(kept) == 1
