"""What a run says about its cost."""

from __future__ import annotations

import re

import pytest
import torch

from spml_fast.core.config import TrainConfig
from spml_fast.training import pace
from spml_fast.training.logs import Meter
from spml_fast.training.pace import Pace, clock, duration
from spml_fast.training.setup import Phase

LINEAR, FINETUNE = Phase("linear", 2), Phase("finetune", 4)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands until it is set."""
    time = [0.0]
    monkeypatch.setattr(pace.time, "perf_counter", lambda: time[0])
    return time


def make(phases: list[Phase], eval_images: int = 0) -> Pace:
    return Pace(phases, 100, TrainConfig(batch_size=16), range(eval_images), torch.device("cpu"))


def test_the_first_update_does_not_count_and_the_line_comes_once(now: list[float]):
    run = make([FINETUNE])
    run.begin(FINETUNE)
    now[0] = 1000.0
    assert run.update(1, 1) is None and run.seconds_left(1, 1) is None
    lines = []
    for done in range(2, 30):
        now[0] += 2.0
        lines.append(run.update(1, done))
    (line,) = [text for text in lines if text is not None]
    # Five updates in the ten seconds after the first: 8 images/s, 200 s an epoch, of which 3.94 are left.
    assert lines.index(line) == 4 and run.rate == pytest.approx(8.0)
    assert re.fullmatch(r"8 images/s: about 3 min an epoch; training ends in about 13 min, at \d\d:\d\d( on .*)?", line)
    assert run.seconds_left(1, 50) == pytest.approx(3.5 * 200)
    assert run.seconds_left(4, 100) == pytest.approx(0.0)


def test_time_that_is_no_update_s_changes_no_rate(now: list[float]):
    """Such as that of writing a profile."""
    run, meter = make([FINETUNE]), Meter()
    run.begin(FINETUNE)
    run.update(1, 1)
    for done in range(2, 7):
        now[0] += 2.0
        if done == 4:
            now[0] += 500.0
            run.leave_out(500.0)
            meter.leave_out(500.0)
        run.update(1, done)
    meter.samples = 80
    assert run.rate == pytest.approx(8.0) and meter.seconds == 10 and meter.rate == pytest.approx(8.0)


def test_many_fast_updates_are_enough(now: list[float]):
    run = make([FINETUNE])
    run.begin(FINETUNE)
    lines = []
    for done in range(1, pace.ENOUGH_UPDATES + 3):
        now[0] += 0.001
        lines.append(run.update(1, min(done, 100)))
    assert [i for i, line in enumerate(lines) if line] == [pace.ENOUGH_UPDATES]


def test_validation_and_the_phase_to_come_are_part_of_it(now: list[float]):
    run = make([LINEAR, FINETUNE], eval_images=800)
    run.begin(LINEAR)
    for done in range(1, 5):
        run.update(1, done)
        now[0] += 4.0
    # 4 images/s of a forward alone: 400 s of training and 200 s of validation; then 1,200 and 200 s an epoch.
    assert run.rate == pytest.approx(4.0) and run.epoch_seconds == pytest.approx(600)
    assert run.seconds_left(2, 50) == pytest.approx(0.5 * 600 + 4 * 1400)
    assert run.end_epoch(1, 8.0) is None
    assert run.epoch_seconds == pytest.approx(300)
    run.begin(FINETUNE)
    assert run.seconds_left(1, 0) is None, "a phase is measured anew"


def test_an_epoch_that_is_too_short_to_measure_tells_at_its_end(now: list[float]):
    run = make([Phase("finetune", 3)], eval_images=160)
    run.begin(run.phases[0])
    for done in range(1, 6):
        now[0] += 1.0
        assert run.update(1, done) is None
    # 16 images/s of training: 100 s, and 160 images of validation at three times that rate.
    line = run.end_epoch(1, 16.0)
    assert line is not None and line.startswith("16 images/s: about 2 min an epoch; training ends in about 3 min")
    # The time of the validation is no update's.
    now[0] += 500.0
    assert run.update(2, 1) is None and run.rate == 16.0
    short = make([Phase("finetune", 1)])
    short.begin(short.phases[0])
    assert short.end_epoch(1, 16.0) is None, "nothing is left to be told"


def test_a_rate_that_was_measured_elsewhere():
    run = make([LINEAR, FINETUNE], eval_images=800)
    run.begin(LINEAR)
    line = run.measured(4.0, 320)
    # As after the 20 updates that are as many images.
    assert line.startswith("4 images/s: about 10 min an epoch of the head alone; ") and run.rate == 4.0
    assert run.seconds_left(1, 20) == pytest.approx(1.8 * 600 + 4 * 1400)
    assert line == run.line(1, 20)


def test_a_phase_that_is_solved_says_what_its_time_leaves_out():
    solved = Phase("linear", 1, solved=True)
    run = make([solved, FINETUNE], eval_images=800)
    run.begin(solved)
    line = run.measured(4.0, 320)
    # 400 s for the training images, 200 s for the features of the validation images, 200 s for their scores.
    assert run.epoch_seconds == pytest.approx(800) and line.startswith("4 images/s: about 13 min for the features and ")
    assert line.endswith(", plus the time to solve for the head")
    run.begin(FINETUNE)
    assert "solve" not in run.measured(4.0, 0)


def test_validation_now_and_then_costs_its_share():
    train = TrainConfig(batch_size=16)
    run = Pace([FINETUNE], 100, train, range(4800), torch.device("cpu"), every=5)
    run.begin(FINETUNE)
    run.end_epoch(1, 16.0)
    assert run.epoch_seconds == pytest.approx(100 + 960 / 48)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (99, "99 s"), (100, "2 min"), (5400, "90 min"), (7200, "2.0 h"), (200_000, "2.3 days")],
)
def test_durations(seconds: float, text: str):
    assert duration(seconds) == text


def test_the_time_of_day_has_a_date_on_another_day():
    assert re.fullmatch(r"\d\d:\d\d on \d\d \w+", clock(3 * 86400))
