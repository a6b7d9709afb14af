"""Choosing blocks or keys by their scores: masks of them, or lists.

Every function takes scores [..., n], chooses in each row for itself, and
knows three kinds of entries: those that are no candidates (ahead of the query,
say) are never chosen, forced ones (such as a query's own block) always are and
count in the budget, and the rest go by score. Larger scores come first, then
lower indices; NaN comes last. Arithmetic is f32, and no choice has a gradient.
"""

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import partitioning
from pallas_kernels.block_mask import BlockMask

Array = jax.Array


def _check(scores, **flags):
  scores = jnp.asarray(scores)
  if not jnp.issubdtype(scores.dtype, jnp.floating) or not scores.ndim:
    raise ValueError(
      f"scores is {scores.dtype}{list(scores.shape)}; it must be floating "
      "[..., n]."
    )
  for name, flag in flags.items():
    if flag is None:
      continue
    flag = jnp.asarray(flag)
    try:
      fits = jnp.broadcast_shapes(flag.shape, scores.shape) == scores.shape
    except ValueError:
      fits = False
    if flag.dtype != bool or not fits:
      raise ValueError(
        f"{name} is {flag.dtype}{list(flag.shape)}; it must be bool and "
        f"broadcast to scores, {list(scores.shape)}."
      )
  return lax.stop_gradient(scores.astype(jnp.float32))


def _flags(scores, candidates, forced):
  """Both as bool arrays of the shape of scores; what is forced may be."""
  full = lambda x, value: jnp.broadcast_to(
    jnp.asarray(value if x is None else x), scores.shape
  )
  candidates = full(candidates, True)
  return candidates, full(forced, False) & candidates


def _ranked(scores, candidates, forced):
  """+inf where forced, -inf where no candidate, finite elsewhere."""
  most = jnp.finfo(jnp.float32).max
  scores = jnp.where(jnp.isnan(scores), -most, jnp.clip(scores, -most, most))
  # Or -0 would rank below +0; by bits, since == also holds for subnormals.
  bits = lax.bitcast_convert_type(scores, jnp.uint32)
  scores = jnp.where(bits == jnp.uint32(1 << 31), 0.0, scores)
  scores = jnp.where(forced, jnp.inf, scores)
  return jnp.where(candidates, scores, -jnp.inf)


def _largest(ranked, k):
  """`lax.top_k` of each row where it lies: XLA would gather all of them."""
  *rows, n = ranked.shape
  if not rows:
    return lax.top_k(ranked, k)
  letters = "abcdefghijklm"[: len(rows)]
  words = " ".join(letters)
  return partitioning.per_shard(
    lambda axes, x: tuple(lax.top_k(x, k)),
    [ranked],
    [f"{words} n"],
    [f"{words} k"] * 2,
    dict(zip(letters, rows), n=n, k=k),
    cut=letters,
    batch="a",
  )


def _best(ranked, k):
  """bool: the k largest that are no -inf; k is static, or int [..., 1]."""
  n = ranked.shape[-1]
  if not n:
    return jnp.zeros(ranked.shape, bool)
  if isinstance(k, int):
    kth = _largest(ranked, min(max(k, 1), n))[0][..., -1:]
  else:
    falling = jnp.sort(ranked, axis=-1, descending=True)
    at = jnp.broadcast_to(jnp.clip(k, 1, n) - 1, (*ranked.shape[:-1], 1))
    kth = jnp.take_along_axis(falling, at, -1)
  over, equal = ranked > kth, ranked == kth
  spare = k - over.sum(-1, keepdims=True, dtype=jnp.int32)
  chosen = over | (equal & (jnp.cumsum(equal, -1, dtype=jnp.int32) <= spare))
  return chosen & (ranked > -jnp.inf) & (jnp.asarray(k) > 0)


def top_k(
  scores: Array,
  k: Array | int,
  *,
  candidates: Array | None = None,
  forced: Array | None = None,
) -> Array:
  """The k best of each row, forced ones first.

  Args:
    scores: floating [..., n].
    k: how many, an int, or an int array that broadcasts against scores
      [..., :1], such as budgets of heads, [H, 1, 1]. Where more are forced, all
      of these stay; where fewer are candidates, all of those. Larger than n
      is n.
    candidates: None for all, or bool that broadcasts to scores.
    forced: None, or bool that broadcasts to scores; of those that are no
      candidates none is forced.

  Returns:
    bool like scores.

  Raises:
    ValueError: for a negative k, or arguments that do not fit each other.

  Example:
    >>> scores = jnp.array([1.0, 3.0, 3.0, 2.0])
    >>> top_k(scores, 2, forced=jnp.arange(4) == 0).tolist()
    [True, True, False, False]
  """
  scores = _check(scores, candidates=candidates, forced=forced)
  k = _check_k(scores, k)
  candidates, forced = _flags(scores, candidates, forced)
  return _best(_ranked(scores, candidates, forced), k) | forced


def top_k_lists(
  scores: Array,
  k: int,
  *,
  candidates: Array | None = None,
  forced: Array | None = None,
  most_forced: int = 0,
) -> Array:
  """The same choice as a list: what `BlockMask` and `from_queries` take.

  Args:
    scores: floating [..., n].
    k: how many, static.
    candidates: as in `top_k`.
    forced: as in `top_k`.
    most_forced: how many are forced in a row at the most; of more, the first
      are kept.

  Returns:
    int32 [..., min(max(k, most_forced), n)]: indices, the best first, then -1.

  Raises:
    ValueError: as `top_k`.

  Example:
    >>> scores = jnp.array([[1.0, 3.0, 3.0], [1.0, 2.0, 3.0]])
    >>> before = jnp.array([[True, False, False], [True, True, False]])
    >>> top_k_lists(scores, 2, candidates=before).tolist()
    [[0, -1], [1, 0]]
  """
  scores = _check(scores, candidates=candidates, forced=forced)
  k = _check_k(scores, k, static=True)
  candidates, forced = _flags(scores, candidates, forced)
  ranked = _ranked(scores, candidates, forced)
  n = scores.shape[-1]
  best, index = _largest(ranked, min(max(k, most_forced), n))
  # Beyond k there are forced ones only.
  chosen = (best == jnp.inf) | (jnp.arange(best.shape[-1]) < k)
  return jnp.where(chosen & (best > -jnp.inf), index, -1).astype(jnp.int32)


def top_mass(
  masses: Array,
  share: Array | float,
  *,
  candidates: Array | None = None,
  forced: Array | None = None,
) -> Array:
  """The fewest of each row that hold a share of its mass.

  Entries are taken as they fall, forced ones first, until what they hold is at
  least `share` times the mass of all candidates. Sums are in f32: where they
  come within rounding of the share, one more or less may be kept.

  Args:
    masses: floating [..., n], at least 0, such as probabilities; they need not
      sum to 1. NaN counts as 0.
    share: a number, or an array that broadcasts against masses [..., :1]. 1 or
      more keeps every candidate, 0 or less the forced ones.
    candidates: None for all, or bool that broadcasts to masses.
    forced: None, or bool that broadcasts to masses; of those that are no
      candidates none is forced.

  Returns:
    bool like masses.

  Raises:
    ValueError: for arguments that do not fit each other.

  Example:
    >>> top_mass(jnp.array([0.5, 0.125, 0.25, 0.125]), 0.75).tolist()
    [True, False, True, False]
  """
  masses = _check(masses, candidates=candidates, forced=forced)
  share = _broadcast("share", jnp.asarray(share, jnp.float32), masses)
  candidates, forced = _flags(masses, candidates, forced)
  free = candidates & ~forced
  # -1 sorts behind every mass, and is none.
  amount = jnp.maximum(jnp.where(jnp.isnan(masses), 0, masses), 0)
  falling = jnp.sort(jnp.where(free, amount, -1), axis=-1, descending=True)
  held = jnp.where(forced, amount, 0).sum(-1, keepdims=True)
  after = held + jnp.cumsum(jnp.maximum(falling, 0), -1)
  before = jnp.concatenate([held, after[..., :-1]], -1)
  wanted = share * after[..., -1:]
  k = ((before < wanted) & (falling >= 0)).sum(-1, keepdims=True)
  chosen = _best(_ranked(amount, free, jnp.zeros_like(free)), k) | forced
  return jnp.where(share >= 1, candidates, chosen)


def above(
  scores: Array,
  threshold: Array | float,
  *,
  candidates: Array | None = None,
  forced: Array | None = None,
) -> Array:
  """Those with a score above a threshold, and the forced ones.

  Args:
    scores: floating [..., n].
    threshold: a number, or an array that broadcasts to scores.
    candidates: None for all, or bool that broadcasts to scores.
    forced: None, or bool that broadcasts to scores.

  Returns:
    bool like scores; NaN is not above anything.

  Raises:
    ValueError: for arguments that do not fit each other.

  Example:
    >>> above(jnp.array([0.5, 1.0, 1.5]), 1.0).tolist()
    [False, False, True]
  """
  scores = _check(scores, candidates=candidates, forced=forced)
  threshold = _broadcast(
    "threshold", lax.stop_gradient(jnp.asarray(threshold)), scores, last=True
  )
  candidates, forced = _flags(scores, candidates, forced)
  return (candidates & (scores > threshold)) | forced


def per_group(scores: Array, group: int, how: str = "sum") -> Array:
  """Scores of query heads to scores of the groups that share a key head.

  Args:
    scores: [B, H, ...].
    group: query heads of a group, which divides H.
    how: "sum", "mean" or "max".

  Returns:
    [B, H // group, ...] in f32.

  Raises:
    ValueError: for a group that does not divide the heads, or another `how`.

  Example:
    >>> per_group(jnp.arange(4.0)[None], 2).tolist()
    [[1.0, 5.0]]
  """
  reductions = {"sum": jnp.sum, "mean": jnp.mean, "max": jnp.max}
  if how not in reductions:
    raise ValueError(f"how is {how!r}; it must be one of {[*reductions]}.")
  if scores.ndim < 2 or group < 1 or scores.shape[1] % group:
    raise ValueError(
      f"group is {group}; it must divide the heads, dimension 1 of scores "
      f"{list(scores.shape)}."
    )
  b, h, *rest = scores.shape
  scores = scores.astype(jnp.float32).reshape(b, h // group, group, *rest)
  return reductions[how](scores, axis=2)


def near(own: Array, blocks: int, *, first: int = 0, local: int = 1) -> Array:
  """The first blocks, and the last ones up to the own one: what is forced.

  Args:
    own: int32 [...], the block of each query.
    blocks: how many there are.
    first: how many from the start; none is ahead of the own one.
    local: how many up to the own one, which is among them.

  Returns:
    bool [..., blocks].

  Example:
    >>> near(jnp.array(3), 5, first=1, local=2).tolist()
    [True, False, True, True, False]
  """
  at = jnp.arange(blocks, dtype=jnp.int32)
  own = jnp.asarray(own)[..., None]
  return (at <= own) & ((at < first) | (at > own - local))


def blocks_of_mask(lists: Array, block: int) -> tuple[Array, int]:
  """Lists of blocks of any size as lists of blocks that a mask may have.

  Args:
    lists: int32 [..., K], -1 where there is none.
    block: keys of a block, a multiple of 16.

  Returns:
    int32 [..., K * block // block_kv], and block_kv: the largest of 16, 32, ...
    512 that divides the block.

  Raises:
    ValueError: for a block that is no multiple of 16.

  Example:
    >>> lists, block_kv = blocks_of_mask(jnp.array([2, -1]), 1024)
    >>> lists.tolist(), block_kv
    ([4, 5, -2, -1], 512)
  """
  block_kv = size_in_mask(block)
  parts = block // block_kv
  lists = lists[..., None] * parts + jnp.arange(parts, dtype=jnp.int32)
  return lists.reshape(*lists.shape[:-2], -1), block_kv


def check_integers(least: int, **settings: int) -> None:
  """ValueError for a setting that is no integer of at least `least`."""
  for name, value in settings.items():
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < least:
      raise ValueError(
        f"{name} is {value!r}; it must be an integer of at least {least}."
      )


def check_blocks(block_q: int, block_kv: int) -> None:
  """ValueError for sizes of blocks that no BlockMask has."""
  BlockMask(
    np.zeros((1, 1, 0, 1), int),
    block_q=block_q,
    block_kv=block_kv,
    kv_blocks=0,
  )


def size_in_mask(block: int) -> int:
  """The largest of 16, 32, ... 512 that divides a block; or a ValueError."""
  size = min(block & -block, 512) if isinstance(block, int) else 0
  if size < 16:
    raise ValueError(
      f"block is {block!r}; it must be a positive multiple of 16."
    )
  return size


def _broadcast(name, value, scores, last=False):
  """The value, which must broadcast against scores [..., :1], or with `last`
  to scores."""
  shape = scores.shape if last else (*scores.shape[:-1], 1)
  try:
    fits = jnp.broadcast_shapes(value.shape, shape) == shape
  except ValueError:
    fits = False
  if not fits:
    raise ValueError(
      f"{name} has shape {list(value.shape)}; it must broadcast to "
      f"{list(shape)}."
    )
  return value


def _check_k(scores, k, static=False):
  whole = isinstance(k, int | np.integer) and not isinstance(k, bool)
  if whole and k >= 0:
    return min(int(k), scores.shape[-1])
  traced = isinstance(k, jax.Array | np.ndarray) and k.dtype.kind in "iu"
  if static or not traced:
    raise ValueError(
      f"k is {k!r}; it must be an integer of at least 0"
      + ("." if static else ", or an array of them.")
    )
  return _broadcast("k", jnp.asarray(k, jnp.int32), scores)
