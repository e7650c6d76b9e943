"""Which weights are kept, and when a run stops early."""

from __future__ import annotations

import math

from spml_fast.training.selection import BestScore


def test_only_a_higher_score_is_kept():
    score = BestScore()
    assert [score.offer(x) for x in (50.0, 60.0, 60.0, 55.0, 61.0)] == [True, True, False, False, True]
    assert score.state() == (61.0, 61.0)


def test_a_score_that_is_not_defined_is_kept_and_changes_nothing():
    score = BestScore()
    assert score.offer(math.nan) and score.state() == (-math.inf, -math.inf)
    score.offer(60.0)
    score.offer(50.0)
    assert score.offer(math.nan) and score.state() == (60.0, 50.0)


def test_stops_when_the_last_is_far_below_the_best():
    score = BestScore()
    assert not score.has_dropped(1.0), "nothing was validated yet"
    score.offer(60.0)
    score.offer(57.0)
    assert score.has_dropped(2.9) and not score.has_dropped(3.0) and not score.has_dropped(0.0)
    score.offer(59.0)
    assert not score.has_dropped(2.9)


def test_state_round_trip_and_reset():
    score, other = BestScore(), BestScore()
    score.offer(60.0)
    score.offer(57.0)
    other.load_state(score.state())
    assert (other.best, other.latest) == (60.0, 57.0)
    other.reset()
    assert other.state() == BestScore().state() and other.offer(1.0)
