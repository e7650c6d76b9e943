"""Ranks that die, fail or hang: the others end, and one sentence says why."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from spml_fast.training import peers as of_ranks
from spml_fast.training.peers import INTERVAL, PATIENCE, Line, Peers, sentence
from tests.support import warm
from tests.support.paths import ROOT
from tests.support.runs import Run, environment, rank_variables, read_metrics
from tests.training.test_training import options, succeed


def start_ranks(words: list[str], ranks: int, folder: Path) -> list[subprocess.Popen[str]]:
    """Ranks without a launcher, so that nobody but they themselves can end them."""
    started = []
    for rank, variables in enumerate(rank_variables(ranks)):
        out = (folder / f"rank{rank}.txt").open("w")
        words_of_rank = [sys.executable, str(ROOT / "launch" / "train.py"), *words]
        env = environment(**variables)
        started.append(subprocess.Popen(words_of_rank, env=env, cwd=ROOT, stdout=out, stderr=out, text=True))
        out.close()
    return started


def wait_for_updates(run: Path, number: int, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not (run / "metrics.jsonl").exists() or len(read_metrics(run, "update")) < number:
        assert time.monotonic() < end, "the training did not start"
        time.sleep(0.05)


@pytest.mark.parametrize(("victim", "number"), [(1, signal.SIGKILL), (0, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_a_rank_that_dies_or_hangs_ends_the_others(
    victim: int, number: int, small_digits: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = options(small_digits, run, train__epochs=5000, run__timeout_minutes=0.1)
    ranks = start_ranks(words, 2, tmp_path)
    try:
        wait_for_updates(run, 3)
        # Ranks tell each other once a second where they are.
        time.sleep(3 * INTERVAL)
        ranks[victim].send_signal(number)
        assert ranks[1 - victim].wait(60) == 1
        said = (tmp_path / f"rank{1 - victim}.txt").read_text()
        (line,) = [line for line in said.splitlines() if "error:" in line]
        where = f"rank {victim} (on {socket.gethostname()}, process {ranks[victim].pid}, last update "
        assert where in line and " of epoch " in line, said
        assert ("has ended unexpectedly" in line) == (number == signal.SIGKILL), said
        assert "Traceback" not in said and "gloo" not in said
    finally:
        for process in ranks:
            process.kill()
            process.wait()


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_rank_is_one_sentence(rank: int, small_digits: Path, run_script: Run, tmp_path: Path) -> None:
    """The rank with the image that cannot be read names it; the other leaves without a word."""
    from spml_fast.data.manifest import Manifest
    from spml_fast.data.sampler import TrainSampler

    data = tmp_path / "digits"
    shutil.copytree(small_digits, data)
    train = Manifest(data).split("train")
    # The last image that this rank sees in the first epoch.
    *_, last = TrainSampler(len(train), 32, 1, 2, rank, 0).epoch(1)
    path = Path(train.path(int(last[0].index[-1])))
    path.write_bytes(b"")
    done = run_script("train.py", *options(data, tmp_path / "run"), ranks=2)
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and "error: " in lines[0] and path.name in lines[0], done.stderr
    assert lines[0].startswith("rank 1: error:") == (rank == 1)


# Rank 1 of an evaluation dies once both ranks know each other.
DIES = """
import os, signal, time
from spml_fast.runs import open

make_eval_loader = open.make_eval_loader

def dies(*given):
    if os.environ["RANK"] == "1":
        time.sleep(2.5)
        os.kill(os.getpid(), signal.SIGKILL)
    return make_eval_loader(*given)

open.make_eval_loader = dies
"""


# A rank of an evaluation comes to its weights so many seconds after the others.
LATE = """
import os, time
from spml_fast.runs import open

check_weights = open.check_weights

def late(*given):
    if os.environ["RANK"] == "RANK":
        time.sleep(SECONDS)
    return check_weights(*given)

open.check_weights = late
"""


@pytest.fixture(scope="module")
def trained(small_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run."""
    run = tmp_path_factory.mktemp("peers") / "run"
    succeed(warm.run_script("train.py", *options(small_digits, run, train__epochs=1, data__test_split="null")))
    return run


@pytest.fixture
def damaged(trained: Path, tmp_path: Path) -> Path:
    """A run whose weights are damaged."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    weights = run / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    return run


def test_ranks_of_an_evaluation_watch_each_other(trained: Path, run_script: Run, tmp_path: Path) -> None:
    """One sentence where one of them is killed."""
    (tmp_path / "dies.py").write_text(DIES)
    words = ["--run", trained, "--split", "test"]
    done = run_script("evaluate.py", "--plugins", tmp_path / "dies.py", *words, ranks=2)
    assert done.returncode != 0 and "gloo" not in done.stderr
    (line,) = done.stderr.splitlines()
    assert re.fullmatch(
        rf"error: rank 1 \(on {re.escape(socket.gethostname())}, process \d+\) has ended unexpectedly, so the command "
        r"ends; start it again",
        line,
    )


@pytest.mark.parametrize("script", ["evaluate.py", "suggest.py", "diagnose.py"])
def test_an_error_that_all_ranks_meet_is_one_sentence(script: str, damaged: Path, run_script: Run) -> None:
    done = run_script(script, "--run", damaged, "--split", "test", ranks=2)
    (line,) = done.stderr.splitlines()
    # On a busy machine rank 0 may come so late that rank 1 says it.
    said = line.removeprefix("rank 1: ")
    assert done.returncode == 1 and said.startswith(f"error: {damaged / 'model.safetensors'} is damaged (")


@pytest.mark.parametrize(
    ("late", "seconds"), [(0, 0.8), (0, 1.6), (0, PATIENCE + 0.6), (1, 1.5), (2, 0.8), (2, PATIENCE + 0.6)]
)
def test_an_error_that_ranks_meet_one_after_the_other_is_one_sentence(
    late: int, seconds: float, damaged: Path, run_script: Run, tmp_path: Path
) -> None:
    (tmp_path / "late.py").write_text(LATE.replace('"RANK":', f'"{late}":').replace("SECONDS", str(seconds)))
    words = ["--plugins", tmp_path / "late.py", "--run", damaged, "--split", "test"]
    done = run_script("evaluate.py", *words, ranks=3)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert f"error: {damaged / 'model.safetensors'} is damaged (" in line


def test_a_wrong_option_is_said_once(run_script: Run, tmp_path: Path) -> None:
    """Ranks that have not met have the same command line, and the launcher ends them when the first has said it."""
    done = run_script("train.py", "--model.head", "gap", "--run.dir", tmp_path / "run", ranks=3, launcher="deepspeed")
    said = [line for line in (done.stdout + done.stderr).splitlines() if "error: " in line]
    assert done.returncode == 1 and said == [
        "error: model.head: there is no head 'gap'; choose one of cam, ml_decoder, query2label"
    ]


def test_a_port_that_is_taken_is_said() -> None:
    variables = rank_variables(2)[0]
    with socket.socket() as other:
        other.bind(("", int(variables["MASTER_PORT"])))
        other.listen()
        words = [sys.executable, str(ROOT / "launch" / "train.py")]
        done = subprocess.run(
            words, env=environment(**variables), cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
        )
    assert done.returncode == 1
    assert f"error: port {variables['MASTER_PORT']}, where the ranks meet, is taken" in done.stderr
    assert "--master_port" in done.stderr and "Traceback" not in done.stderr


class Store(dict[str, str]):
    """A store of one process."""

    def set_timeout(self, timeout: object) -> None:
        pass

    def set(self, key: str, value: str) -> None:
        self[key] = value

    def multi_get(self, keys: list[str]) -> list[str]:
        self.calls = getattr(self, "calls", 0) + 1
        return [self[key] for key in keys]

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)


@pytest.fixture
def three() -> list[Peers]:
    """Three ranks of this process, whose threads are ended."""
    store = Store()
    ranks = [Peers(store, rank, 3, 60.0) for rank in range(3)]
    for peers in ranks:
        peers.stop()
        peers.thread.join()
    return ranks


def read_all(ranks: list[Peers]) -> None:
    for peers in ranks:
        peers._write()
    for peers in ranks:
        peers.read()


def late(peers: Peers) -> Peers:
    """As after the limit without a move."""
    peers.moved -= 2 * peers.limit
    return peers


def test_who_hangs(three: list[Peers]) -> None:
    read_all(three)
    assert all(late(peers)._hanging() == {} for peers in three), "between updates all may wait"
    for peers in three:
        peers.moved_to(None)
        peers.moved_to(("finetune", 1, 1))
    for peers in three[:2]:
        peers.moved_to(None)
    read_all(three)
    assert three[0]._hanging() == {}, "not yet"
    for peers in three:
        assert list(late(peers)._hanging()) == [2]
    three[2].moved_to(None)
    read_all(three)
    assert sorted(late(three[0])._hanging()) == [0, 1, 2], "nobody moves within an update"
    assert [peers._is_first_but({2: peers.own}) for peers in three] == [True, False, False]
    assert [peers._is_first_but({0: peers.own, 1: peers.own}) for peers in three] == [False, False, True]


def test_who_is_gone(three: list[Peers]) -> None:
    read_all(three)
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    three[1].own.pid = child.pid
    three[0].lines.clear()
    read_all(three)
    assert list(three[0].gone(60)) == [1]
    three[1].own.pid = os.getpid()
    three[0].lines.clear()
    read_all(three)
    three[0].lines[2].seen -= 100
    assert list(three[0].gone(60)) == [2]
    three[0].read()
    assert list(three[0].gone(60)) == [2], "a line that is read again has not changed"
    three[2]._write()
    three[0].read()
    assert three[0].gone(60) == {}


def test_all_lines_are_read_in_one_call(three: list[Peers]) -> None:
    """Of the ranks that have written one; a store without the others' would wait for them."""
    store = three[0].store
    del store["spml_fast/rank/2"]
    three[0].read()
    assert sorted(three[0].lines) == [1]
    read_all(three)
    before = store.calls
    checks: list[object] = []
    store.check = checks.append
    three[0].read()
    assert sorted(three[0].lines) == [1, 2] and store.calls == before + 1 and not checks


def test_the_end_waits_for_an_answer_of_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """The store goes with the process group, right after it."""
    asked, asks = threading.Event(), threading.Event()

    class Slow(Store):
        def check(self, keys: list[str]) -> bool:
            asks.set()
            asked.set()
            time.sleep(0.5)
            asks.clear()
            return False

    monkeypatch.setattr(of_ranks, "INTERVAL", 0.01)
    watch = Peers(Slow(), 0, 1, 60.0)
    monkeypatch.setattr(of_ranks, "_peers", watch)
    assert asked.wait(10)
    of_ranks.stop()
    assert not asks.is_set() and not watch.thread.is_alive() and of_ranks._peers is None


def test_the_sentence_names_rank_machine_and_update() -> None:
    line = Line("node7", 41, ("finetune", 2, 30), 60)
    assert sentence({3: line}, None).startswith(
        "rank 3 (on node7, process 41, last update 30 of epoch 2 (finetune)) has ended unexpectedly"
    )
    both = sentence({3: line, 4: Line("node8", 5)}, 600.0)
    assert "rank 4 (on node8, process 5, before its first update) have not moved for 10 minutes (run.t" in both
    assert sentence({4: Line("node8", 5)}, 600.0, trains=False) == (
        "rank 4 (on node8, process 5) has not moved for 10 minutes, so the command ends; start it again"
    )
