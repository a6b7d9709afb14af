"""Intervals and verdicts on numbers that are known."""

import numpy as np
import pytest

from experiments import intervals


def test_interval_of_known_numbers():
  # t(0.975, 4 degrees) = 2.776; the sample deviation of 1..5 is 1.5811.
  interval = intervals.of_mean([1, 2, 3, 4, 5])
  assert interval.mean == 3
  half = 2.7764451 * 1.5811388 / np.sqrt(5)
  assert interval.low == pytest.approx(3 - half)
  assert interval.high == pytest.approx(3 + half)


def test_effects_are_paired():
  noise = np.array([10.0, -20.0, 35.0, 0.0, 7.0])
  effect = intervals.of_effect(noise + 1 + 0.01 * noise, noise)
  assert 0 < effect.low < 1.064 < effect.high < 2
  with pytest.raises(ValueError, match="zip"):
    intervals.of_effect([1.0, 2.0], [1.0])


def test_an_interval_takes_two_values():
  with pytest.raises(ValueError, match=r"two values or more; got \[1\]"):
    intervals.of_mean([1])


@pytest.mark.parametrize(
  ("bounds", "verdict"),
  [
    ([(0.1, 0.2)], "reproduced"),
    ([(0.1, 0.2), (0.3, 0.4)], "reproduced"),
    ([(0.1, 0.2), (-0.1, 0.4)], "undecided"),
    ([(0.0, 0.2)], "undecided"),
    ([(0.1, 0.2), (-0.4, -0.1)], "not reproduced"),
    ([(-0.1, 0.1), (-0.4, -0.1)], "not reproduced"),
  ],
)
def test_verdict(bounds, verdict):
  effects = [intervals.Interval((a + b) / 2, a, b) for a, b in bounds]
  assert intervals.verdict(effects) == verdict


def test_means_cover_the_truth_as_often_as_they_say():
  generator = np.random.default_rng(0)
  found = [
    intervals.of_mean(generator.normal(2.0, 3.0, size=6)) for _ in range(2_000)
  ]
  covered = np.mean([i.low < 2 < i.high for i in found])
  assert covered == pytest.approx(0.95, abs=0.015)
