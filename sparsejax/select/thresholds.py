"""The exact k-th largest score without a sort.

A float's bit pattern, with the sign folded in, is an unsigned integer in the
same order: its key. The k-th largest key is found bit by bit: 32 rounds of
"how many are at least this?", each a count. Counts are sums of scalars over
shards, so nothing is gathered, and a whole tree is ranked without being
concatenated.
"""

from collections.abc import Callable, Sequence
import math
import numbers
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from sparsejax import sharding

Array = jax.Array
Axis = int | tuple[int, ...] | None


def ordered_keys(scores: Array) -> Array:
  """Unsigned integers in the order of floating `scores`.

  NaN comes lowest (key 1, below -inf) and -0.0 equals +0.0. The keys 0 and
  all-ones are used by no score: see `never` and `always`.
  """
  if not jnp.issubdtype(scores.dtype, jnp.floating):
    raise ValueError(f"scores must be floating, got {scores.dtype}")
  bits = scores.dtype.itemsize * 8
  uint = jnp.dtype(f"uint{bits}").type
  sign = uint(1 << (bits - 1))
  raw = lax.bitcast_convert_type(scores, uint)
  # By bits: `scores == 0` would also hold for subnormals, flushed to zero.
  raw = jnp.where(raw == sign, uint(0), raw)
  keys = jnp.where(raw < sign, raw | sign, ~raw)
  return lax.stop_gradient(jnp.where(jnp.isnan(scores), uint(1), keys))


def _scores_of(keys: Array, dtype) -> Array:
  """The inverse of `ordered_keys`, for the keys that scores have."""
  sign = jnp.asarray(1 << (keys.dtype.itemsize * 8 - 1), keys.dtype)
  raw = jnp.where(keys >= sign, keys ^ sign, ~keys)
  return jnp.where(keys <= 1, jnp.nan, lax.bitcast_convert_type(raw, dtype))


def never(keys: Array, at: Array) -> Array:
  """Keys that no budget selects where `at`, however large it is."""
  return jnp.where(at, jnp.zeros((), keys.dtype), keys)


def always(keys: Array, at: Array) -> Array:
  """Keys above every score where `at`."""
  return jnp.where(at, ~jnp.zeros((), keys.dtype), keys)


def _byte_axis(flags: Array, axes: Sequence[int]) -> int | None:
  """The axis to count along in bytes first; None where none is worth it.

  128 is asked for so that groups of eight stay whole on up to 16 shards whose
  number is not known while tracing.
  """
  sizes = {a: sharding.power_of_two(flags.shape[a]) for a in axes}
  sizes = {
    a: s
    for a, s in sizes.items()
    if s >= 128 and sharding.splits_by(flags, a, 8)
  }
  last = flags.ndim - 1  # strided adds are slower: the last resort
  return max(sizes, key=lambda a: (a != last, sizes[a]), default=None)


def _count_one(flags: Array, axis: tuple[int, ...] | None) -> Array:
  axes = tuple(range(flags.ndim)) if axis is None else axis

  def plain(flags):
    return jnp.sum(flags, axes, dtype=jnp.int32, keepdims=axis is not None)

  byte = _byte_axis(flags, axes)
  if byte is None:
    return plain(flags)

  def by_bytes(flags):
    # XLA:CPU sums int32 one by one, but adds rows of bytes in vectors: ten
    # times faster. (The TPU's compiler aborts on such a sum.)
    shape = flags.shape
    groups = (*shape[:byte], shape[byte] // 8, 8, *shape[byte + 1 :])
    return plain(jnp.sum(flags.reshape(groups), byte + 1, dtype=jnp.uint8))

  return lax.platform_dependent(flags, cpu=by_bytes, default=plain)


def count(flags: Sequence[Array], axis: tuple[int, ...] | None = None) -> Array:
  """How many are True: over all of `flags`, or per row along `axis` (int32)."""
  return sum((_count_one(f, axis) for f in flags), start=jnp.int32(0))


def descend(fits: Callable[[Array], Array], like: Array) -> Array:
  """The largest t, of the dtype and shape of `like`, for which `fits(t)`.

  `fits` is monotone: true up to some t, and false above it.
  """
  bits = jnp.iinfo(like.dtype).bits

  def body(i, t):
    trial = t | (jnp.ones_like(t) << (bits - 1 - i).astype(t.dtype))
    return jnp.where(fits(trial), trial, t)

  # Outside of jit `zeros_like` forgets a sharding that is a type.
  begin = sharding.like(jnp.zeros_like(like), like)
  return lax.fori_loop(0, bits, body, begin)


def kth_key(
  keys: Sequence[Array], k: Array | int, axis: tuple[int, ...] | None = None
) -> Array:
  """The largest t with `count(keys >= t) >= k`; 0 where there are fewer."""
  like = count([x != 0 for x in keys], axis).astype(keys[0].dtype)
  return descend(lambda t: count([x >= t for x in keys], axis) >= k, like)


def normal_axis(axis: Axis, ndim: int) -> tuple[int, ...] | None:
  """`axis` as a tuple of nonnegative axes, or None."""
  if axis is None:
    return None
  axes = tuple(axis) if isinstance(axis, (tuple, list)) else (axis,)
  for a in axes:
    if not isinstance(a, numbers.Integral) or not -ndim <= a < ndim:
      raise ValueError(f"axis must be in [{-ndim}, {ndim}), got {axis!r}")
  return tuple(a % ndim for a in axes)


def check_k(k: Array | int, size: int, scalar: bool = False) -> Array | int:
  """`k`, refused where it is known to be out of range, else clamped."""
  if size >= 2**31:
    raise ValueError(
      f"scores must hold fewer than 2**31 entries to be ranked, got {size}"
    )
  number = isinstance(k, (numbers.Number, np.ndarray, jax.Array))
  if not number or not jnp.issubdtype(jnp.result_type(k), jnp.integer):
    raise ValueError(f"k must be an integer, got {k!r}")
  if scalar and jnp.ndim(k):
    raise ValueError(
      f"k must be a scalar where axis is None, got shape {jnp.shape(k)}"
    )
  if isinstance(k, jax.core.Tracer):
    return jnp.clip(k, 0, size)
  values = np.asarray(k)
  if np.any((values < 0) | (values > size)):
    raise ValueError(f"k must be in [0, {size}], got {k}")
  return k


def score_leaves(scores: Any) -> tuple[list[Array], Any]:
  """The leaves of a tree as arrays of one floating type, and its structure."""
  leaves, treedef = jax.tree.flatten(scores)
  if not leaves:
    raise ValueError("scores must have at least one array, got an empty tree")
  leaves = [jnp.asarray(x) for x in leaves]
  for x in leaves:
    if not jnp.issubdtype(x.dtype, jnp.floating):
      raise ValueError(f"scores must be floating, got {x.dtype}")
  dtype = jnp.result_type(*leaves)
  return [x.astype(dtype) for x in leaves], treedef


def kth_largest(scores: Any, k: Array | int, *, axis: Axis = None) -> Array:
  """The k-th largest score, exactly, without sorting or gathering.

  Args:
    scores: a floating array (bf16, f16, f32), or a pytree of them, which is
      ranked as one without being concatenated. Fewer than 2^31 entries.
    k: how many scores are at least the result: an integer in [0, size],
      static or traced (a traced k is clamped). With `axis`, it may also be an
      array that broadcasts against the result.
    axis: the axis or axes to rank along; each leaf is then on its own. None
      ranks everything.

  Returns:
    A scalar of the scores' dtype; with `axis`, an array (or tree) in which
    those axes have size 1. +inf for k = 0. NaN scores rank below -inf, so the
    result is NaN only where k exceeds the number of other scores. It carries
    no gradient.

  Raises:
    ValueError: scores are not floating, or k or axis is out of range.

  >>> kth_largest(jnp.array([3.0, 1.0, 2.0]), 2)
  Array(2., dtype=float32)
  """
  leaves, treedef = score_leaves(scores)
  if axis is None:
    k = check_k(k, sum(x.size for x in leaves), scalar=True)
    return _kth_score(leaves, k, None)
  out = []
  for x in leaves:
    axes = normal_axis(axis, x.ndim)
    k_x = check_k(k, math.prod(x.shape[a] for a in axes))
    out.append(_kth_score([x], k_x, axes))
  return treedef.unflatten(out)


def _kth_score(leaves, k, axis):
  t = kth_key([ordered_keys(x) for x in leaves], k, axis)
  value = _scores_of(t, leaves[0].dtype)
  return jnp.where(jnp.asarray(k) == 0, jnp.inf, value).astype(value.dtype)
