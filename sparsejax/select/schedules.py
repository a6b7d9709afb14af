"""How a budget changes in time.

A schedule is a function of the step, as in Optax. These also take Python
integers and then compute in double precision, so that the counts that follow
from them are exact. Any Optax schedule may be used in their place.
"""

from collections.abc import Callable, Sequence
import math
import numbers

import jax
import jax.numpy as jnp
import numpy as np

Schedule = Callable[[int | jax.Array], float | jax.Array]


def _progress(step, begin: int, end: int):
  """From 0 at `begin` to 1 at `end`."""
  if end <= begin:
    raise ValueError(f"end must be after begin, got {end} <= {begin}")
  xp = jnp if isinstance(step, jax.Array) else np
  return xp.clip((step - begin) / (end - begin), 0, 1), xp


def constant(value: float) -> Schedule:
  """The same at every step."""
  return lambda step: value


def linear(initial: float, final: float, begin: int, end: int) -> Schedule:
  """A straight line from `initial` at `begin` to `final` at `end`."""

  def schedule(step):
    x, _ = _progress(step, begin, end)
    return initial + (final - initial) * x

  return schedule


def cubic(initial: float, final: float, begin: int, end: int) -> Schedule:
  """Fast first, slow at the end: `final + (initial - final) (1 - x)^3`.

  Source: [gradual-magnitude-pruning] Zhu and Gupta, To prune, or not to
  prune, eq. (1).

  >>> round(float(cubic(0.0, 0.8, 0, 10)(5)), 6)
  0.7
  """

  def schedule(step):
    x, _ = _progress(step, begin, end)
    return final + (initial - final) * (1 - x) ** 3

  return schedule


def cosine(initial: float, end: int, begin: int = 0) -> Schedule:
  """From `initial` to 0 at `end` along half a cosine.

  Source: [rigl] Evci et al., Rigging the Lottery, sec. 3 (2).
  """

  def schedule(step):
    x, xp = _progress(step, begin, end)
    return initial / 2 * (1 + xp.cos(math.pi * x))

  return schedule


def exponential(initial: float, rate: float, every: int = 1) -> Schedule:
  """`initial * rate ** (step / every)`."""
  if not isinstance(every, numbers.Real) or not every > 0:
    raise ValueError(f"every must be a number above 0, got {every!r}")
  return lambda step: initial * rate ** (step / every)


def stepwise(values: Sequence[float], boundaries: Sequence[int]) -> Schedule:
  """`values[i]` from `boundaries[i - 1]` on: one more value than boundaries.

  >>> [stepwise([0.0, 0.5, 0.9], [10, 20])(t) for t in (0, 9, 10, 25)]
  [0.0, 0.0, 0.5, 0.9]
  """
  if len(values) != len(boundaries) + 1 or list(boundaries) != sorted(
    boundaries
  ):
    raise ValueError(
      "values must be one more than the ascending boundaries, got "
      f"{len(values)} values and boundaries {list(boundaries)}"
    )

  def schedule(step):
    if isinstance(step, jax.Array):
      at = jnp.searchsorted(jnp.asarray(boundaries), step, side="right")
      return jnp.asarray(values)[at]
    return values[sum(step >= b for b in boundaries)]

  return schedule
