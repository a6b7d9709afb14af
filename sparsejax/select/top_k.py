"""Masks of the k largest."""

from collections.abc import Sequence
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from sparsejax import sharding
from sparsejax.select import thresholds

Array = jax.Array


def _positions(x: Array, axis: tuple[int, ...] | None, start: int) -> Array:
  """Row-major position of each entry within `axis`, without a reshape."""
  index, stride = jnp.uint32(start), 1
  for a in reversed(range(x.ndim) if axis is None else sorted(axis)):
    iota = lax.broadcasted_iota(jnp.uint32, x.shape, a)
    index += iota * jnp.uint32(stride)
    stride *= x.shape[a]
  return jnp.broadcast_to(index, x.shape)


def top_k_keys(
  keys: Sequence[Array], k: Array | int, axis: tuple[int, ...] | None = None
) -> list[Array]:
  """`top_k_mask` on ordered keys: over all of `keys`, or rows along `axis`.

  A key of 0 (`thresholds.never`) is not selected even where k asks for more.
  """
  t = thresholds.kth_key(keys, k, axis)
  over = [x > t for x in keys]
  equal = [(x == t) & (x != 0) for x in keys]
  spare = k - thresholds.count(over, axis)
  starts = np.cumsum([0] + [x.size for x in keys])
  if axis is not None:
    starts = np.zeros_like(starts)
  index = [
    _positions(x, axis, int(o)) for x, o in zip(keys, starts, strict=False)
  ]

  def first(m):
    return [e & (i < m) for e, i in zip(equal, index, strict=True)]

  def cut():
    return thresholds.descend(
      lambda m: thresholds.count(first(m), axis) <= spare,
      t.astype(jnp.uint32),
    )

  # Ties beyond the budget are rare: only then is the index bisected as well.
  fits = jnp.all(thresholds.count(equal, axis) <= spare)
  every = sharding.like(~jnp.zeros_like(t, jnp.uint32), t)
  m = lax.cond(fits, lambda: every, cut)
  return [o | f for o, f in zip(over, first(m), strict=True)]


def top_k_mask(
  scores: Any,
  k: Array | int,
  *,
  axis: thresholds.Axis = None,
) -> Any:
  """True at exactly the k largest scores; ties go to the lowest index.

  The same choice as a stable descending argsort, but by bisection: no sort,
  and on sharded scores only sums cross the devices. For many short rows
  `jax.lax.top_k` is faster; this is for one huge row, a whole tree, or a
  sharded axis.

  Args:
    scores: a floating array, or a pytree of them, ranked as one (earlier
      leaves and lower row-major indices win ties).
    k: how many to select, an integer in [0, size], static or traced (a traced
      k is clamped). With `axis` it may broadcast against the kept-dims shape.
    axis: the axis or axes to rank along, each leaf on its own.

  Returns:
    A boolean array, or tree of them, shaped and sharded as `scores`. NaN ranks
    below -inf: it is selected only where k exceeds the number of other scores,
    so k = size selects everything.

  Raises:
    ValueError: scores are not floating, or k or axis is out of range.

  >>> top_k_mask(jnp.array([3.0, 1.0, 3.0, 3.0]), 2)
  Array([ True, False,  True, False], dtype=bool)
  """
  leaves, treedef = thresholds.score_leaves(scores)
  keys = [thresholds.ordered_keys(x) for x in leaves]
  if axis is None:
    k = thresholds.check_k(k, sum(x.size for x in leaves), scalar=True)
    return treedef.unflatten(top_k_keys(keys, k))
  out = []
  for x in keys:
    axes = thresholds.normal_axis(axis, x.ndim)
    k_x = thresholds.check_k(k, math.prod(x.shape[a] for a in axes))
    out += top_k_keys([x], k_x, axes)
  return treedef.unflatten(out)
