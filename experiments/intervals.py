"""Means of a few runs, and how sure one can be of them."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import numpy as np
from scipy import stats

# What the verdict on one effect is called.
WORDS = {
  "reproduced": "holds",
  "not reproduced": "does not hold",
  "undecided": "undecided",
}


@dataclasses.dataclass(frozen=True)
class Interval:
  """A mean, and where the true mean lies with 95% confidence."""

  mean: float
  low: float
  high: float

  @classmethod
  def of(cls, fields: Mapping[str, Any]) -> "Interval":
    """The interval that has been kept as fields, among others."""
    return cls(*(fields[name] for name in ("mean", "low", "high")))

  def __str__(self) -> str:
    return f"{self.mean:.4f} [{self.low:.4f}, {self.high:.4f}]"


def of_mean(values: Sequence[float]) -> Interval:
  """Student's t-interval of at least two values.

  >>> print(of_mean([1.0, 2.0, 3.0]))
  2.0000 [-0.4841, 4.4841]
  """
  if len(values) < 2:
    raise ValueError(f"an interval takes two values or more; got {values}.")
  mean, error = np.mean(values), stats.sem(values)
  half = stats.t.ppf(0.975, len(values) - 1) * error
  return Interval(float(mean), float(mean - half), float(mean + half))


def of_effect(better: Sequence[float], worse: Sequence[float]) -> Interval:
  """The interval of the mean difference of paired values.

  >>> print(of_effect([3.0, 4.0], [1.0, 2.0]))
  2.0000 [2.0000, 2.0000]
  """
  pairs = zip(better, worse, strict=True)
  return of_mean([a - b for a, b in pairs])


def verdict(effects: Sequence[Interval]) -> str:
  """What intervals of effects, each claimed to be positive, say together.

  "reproduced" where all of them lie above zero, "not reproduced" where one
  lies below, and "undecided" otherwise.

  >>> verdict([Interval(1, 0.5, 1.5), Interval(1, -0.5, 2.5)])
  'undecided'
  """
  if all(effect.low > 0 for effect in effects):
    return "reproduced"
  if any(effect.high < 0 for effect in effects):
    return "not reproduced"
  return "undecided"
