"""Which weights are kept, and when a run stops early."""

from __future__ import annotations

import math

from spml_fast.training.selection import BestScore


def test_only_a_higher_score_is_kept():
    score = BestScore()
    assert [score.offer(x) for x in (50.0, 60.0, 60.0, 55.0, 61.0)] == [True, True, False, False, True]
    assert (score.best, score.latest) == (61.0, 61.0)


def test_a_score_that_is_not_defined_is_kept_and_changes_nothing():
    score = BestScore()
    assert score.offer(math.nan) and score.state() == BestScore().state()
    score.offer(60.0)
    score.offer(50.0)
    before = score.state()
    assert score.offer(math.nan) and score.state() == before and (score.best, score.latest) == (60.0, 50.0)


def test_stops_when_the_last_is_far_below_the_best():
    score = BestScore()
    assert not score.has_dropped(1.0), "nothing was validated yet"
    score.offer(60.0)
    score.offer(57.0)
    assert score.has_dropped(2.9) and not score.has_dropped(3.0) and not score.has_dropped(0.0)
    score.offer(59.0)
    assert not score.has_dropped(2.9)


def test_stops_when_the_best_is_some_validations_ago():
    score = BestScore()
    assert not score.has_stalled(1), "nothing was validated yet"
    for value, waited in ((60.0, 0), (60.0, 1), (59.0, 2), (60.5, 0), (math.nan, 0), (60.0, 1)):
        score.offer(value)
        assert score.waited == waited
    assert score.has_stalled(1) and not score.has_stalled(2) and not score.has_stalled(0)
    assert score.stops(0, 1) == "none of 1 validation in a row was the best of the phase"
    assert score.stops(0.4, 1) == "validation mAP is 0.4 points below the best" and score.stops(0.6, 2) is None


def test_a_phase_competes_with_the_one_before_or_not():
    for keep_best, kept in ((False, [True, False, True]), (True, [False, False, True])):
        score = BestScore()
        score.offer(60.0)
        score.next_phase(keep_best)
        assert not score.has_dropped(1.0) and not score.has_stalled(1)
        assert [score.offer(x) for x in (58.0, 57.0, 61.0)] == kept
    score.next_phase(keep_best=True)
    score.offer(50.0)
    score.offer(49.0)
    assert score.best == 61.0 and score.has_dropped(0.5) and not score.has_dropped(1.0), "measured within the phase"
    assert score.has_stalled(1) and not score.has_stalled(2)


def test_state_round_trip():
    score, other = BestScore(), BestScore()
    for value in (60.0, 57.0):
        score.offer(value)
    other.load_state(score.state())
    assert other.state() == score.state() and other.has_stalled(1)
    other.next_phase(keep_best=False)
    assert other.state() == BestScore().state() and other.offer(1.0)
    # As versions before 0.2.0 wrote it.
    other.load_state((60.0, 57.0))
    assert (other.best, other.latest) == (60.0, 57.0) and other.has_dropped(2.0) and not other.has_stalled(1)
