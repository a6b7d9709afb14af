"""Windows over a grid, in one to three dimensions."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from pallas_kernels import rules
from sparsejax.attention.patterns import checks


@dataclasses.dataclass(frozen=True)
class Neighborhood(rules.Rule):
  """Windows over a grid of 1 to 3 axes, shared by groups of queries.

  Tokens lie in row-major order; a position is the index of a token, and those
  outside of the grid neither read nor are read. Along each axis the queries
  come in groups of `stride`. The leader of a group, which is the one in the
  middle (of an even number the right one), or on a causal axis the last, has a
  window of `window` tokens around it (of an even number one more before it),
  or up to it, and the group reads that. At the border the window is moved
  inward, on a causal axis it is cut. A dilation splits an axis into as many
  axes of equal residue, each with its own groups. A pair is read if every axis
  agrees.

  Numbers hold for every axis, or give one for each.

  Args:
    shape: tokens along each axis.
    window: tokens of a window; a longer one than the axis is cut to it.
    stride: queries that share a window, from 1 (neighborhood attention) to
      `window` (attention within blocks, where it divides the axis).
    dilation: the distance of neighbors in a window.
    is_causal: whether an axis reads nothing ahead.

  Raises:
    ValueError: for other than 1 to 3 axes, a setting that has another number
      of them, and numbers out of range.

  Example:
    >>> rule = Neighborhood((4, 4), window=3)
    >>> [k for k in range(16) if rule(5, k)]
    [0, 1, 2, 4, 5, 6, 8, 9, 10]

  Source: gna, Generalized Neighborhood Attention, sec. 3.
  """

  shape: tuple
  window: int | tuple
  stride: int | tuple = 1
  dilation: int | tuple = 1
  is_causal: bool | tuple = False

  def __post_init__(self):
    shape = self.shape if np.iterable(self.shape) else (self.shape,)
    shape = tuple(checks.integer("shape", n, 1) for n in shape)
    checks.require(
      1 <= len(shape) <= 3,
      f"shape is {shape}; it must have from 1 to 3 axes.",
    )

    def each(name):
      value = getattr(self, name)
      value = tuple(value) if np.iterable(value) else (value,) * len(shape)
      checks.require(
        len(value) == len(shape),
        f"{name} is {value}; it must be one number, or one for each axis of "
        f"{shape}.",
      )
      if name == "is_causal":
        return tuple(bool(x) for x in value)
      return tuple(checks.integer(name, x, 1) for x in value)

    names = ("window", "stride", "dilation", "is_causal")
    checks.set_fields(self, shape=shape, **{name: each(name) for name in names})
    for window, stride in zip(self.window, self.stride, strict=True):
      checks.require(
        stride <= window,
        f"stride is {self.stride}; it must be at most the window, "
        f"{self.window}.",
      )

  def _axes(self):
    """(axis, tokens that a step along it skips, its length)."""
    for axis, length in enumerate(self.shape):
      yield axis, math.prod(self.shape[axis + 1 :]), length

  def _window(self, axis, x, length):
    """The first and last key that coordinate x reads, of `length`."""
    least = min if isinstance(length, int) else jnp.minimum
    size = least(self.window[axis], length)
    stride = self.stride[axis]
    first = x // stride * stride
    if self.is_causal[axis]:
      leader = jnp.minimum(first + stride - 1, length - 1)
      return jnp.maximum(leader - size + 1, 0), x
    leader = jnp.minimum(first + stride // 2, length - 1)
    begin = jnp.clip(leader - size // 2, 0, length - size)
    return begin, begin + size - 1

  def __call__(self, q_position, k_position):
    tokens = math.prod(self.shape)
    q_in = jnp.greater_equal(q_position, 0) & (q_position < tokens)
    k_in = jnp.greater_equal(k_position, 0) & (k_position < tokens)
    found = q_in & k_in
    for axis, inner, length in self._axes():
      q_at = jnp.floor_divide(q_position, inner) % length
      k_at = jnp.floor_divide(k_position, inner) % length
      dilation = self.dilation[axis]
      if dilation > 1:
        residue = q_at % dilation
        found &= k_at % dilation == residue
        length = (length - residue + dilation - 1) // dilation
        q_at, k_at = q_at // dilation, k_at // dilation
      first, last = self._window(axis, q_at, length)
      found &= (k_at >= first) & (k_at <= last)
    return found

  def classify(self, q_min, q_max, k_min, k_max):
    tokens = math.prod(self.shape)
    bounds = q_min, q_max, k_min, k_max
    rank = max(map(jnp.ndim, bounds))  # boxes go in front of all of them
    q_min, q_max, k_min, k_max = (
      jnp.reshape(x, (1,) * (rank - jnp.ndim(x)) + jnp.shape(x)) for x in bounds
    )
    inside = (q_min >= 0) & (k_min >= 0) & (q_max < tokens) & (k_max < tokens)
    (q_there, q_at), (k_there, k_at) = (
      _boxes(jnp.maximum(low, 0), jnp.minimum(high, tokens - 1), self.shape)
      for low, high in ((q_min, q_max), (k_min, k_max))
    )
    there = q_there[:, None] & k_there
    some, whole = there, True
    for axis, _, length in self._axes():
      of_queries = [x[:, None] for x in q_at[axis]]
      found = self._classify_axis(axis, length, of_queries, k_at[axis])
      some, whole = some & found[0], whole & found[1]
    some, whole = some.any((0, 1)), (whole | ~there).all((0, 1))
    return rules.classes(~some, whole & inside)

  def _classify_axis(self, axis, length, q_at, k_at):
    """Whether some and whether all pairs of two ranges are read."""
    dilation = self.dilation[axis]
    some = False
    for residue in range(min(dilation, length)):
      # What has this residue, in its own coordinates. Windows do not go back,
      # so that those of a range are a range.
      of = (length - residue + dilation - 1) // dilation
      q_low, k_low = (
        (x[0] - residue + dilation - 1) // dilation for x in (q_at, k_at)
      )
      q_high, k_high = ((x[1] - residue) // dilation for x in (q_at, k_at))
      first, of_first = self._window(axis, q_low, of)
      of_last, last = self._window(axis, q_high, of)
      there = (q_low <= q_high) & (k_low <= k_high)
      some |= there & (k_low <= last) & (k_high >= first)
    if dilation == 1:
      return some, (k_low >= of_last) & (k_high <= of_first)
    # Neighbors are of two residues.
    return some, some & (q_at[0] == q_at[1]) & (k_at[0] == k_at[1])


def _boxes(low, high, shape):
  """The tokens low ... high of a grid, as boxes.

  Args:
    low: int32, any shape; so is `high`, of that shape too.
    shape: tokens along each axis.

  Returns:
    bool [boxes, ...], which ones have tokens; for each axis, the first and
    last coordinate, int32 [boxes, ...] twice.
  """
  inner = math.prod(shape[1:])
  if len(shape) == 1:
    return (low <= high)[None], [(low[None], high[None])]
  top, bottom = low // inner, high // inner
  one = top == bottom
  # The rest of the first row, the start of the last one, and rows between.
  rest = _boxes(low % inner, jnp.where(one, high % inner, inner - 1), shape[1:])
  start = _boxes(0 * low, jnp.where(one, -1, high % inner), shape[1:])
  there = [rest[0] & (low <= high), start[0] & (low <= high)]
  there = jnp.concatenate([*there, (bottom - top > 1)[None]])
  rows = [
    jnp.broadcast_to(x, y[0].shape) for x, y in ((top, rest), (bottom, start))
  ]
  at = [tuple(jnp.concatenate([*rows, x[None]]) for x in (top + 1, bottom - 1))]
  for n, *ends in zip(shape[1:], rest[1], start[1], strict=True):
    between = (0 * low[None], 0 * low[None] + n - 1)
    at.append(tuple(map(jnp.concatenate, zip(*ends, between, strict=True))))
  return there, at
