"""MInference: columns and diagonals, blocks by their means, a kind for a head.

The third kind of head, the A-shape, is the rule `patterns.Sinks`.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import rules
from pallas_kernels.block_mask import BlockMask
from pallas_kernels.block_sparse_attention import block_sparse_attention
from sparsejax.attention import choices
from sparsejax.attention import compressed
from sparsejax.attention import scores
from sparsejax.automatic import automatic

Array = jax.Array

CAUSAL = rules.Causal()


def vertical_slash_lines(
  q: Array,
  k: Array,
  *,
  verticals: int | Sequence[int],
  slashes: int | Sequence[int],
  last_q: int = 64,
  first: int = 30,
  recent: int = 100,
  q_positions: Array | None = None,
  scale: float | None = None,
) -> tuple[Array, Array]:
  """The keys and the distances that get the most of the last queries.

  A key's mass is the probability that it gets from the last queries; that of a
  distance is what they give to the keys so far before them. The choice has no
  gradient.

  Args:
    q: floating [B, S, H, D].
    k: floating [B, T, Hkv, D], H a multiple of Hkv; key t stands at position t.
    verticals: how many keys, forced ones among them: one number, or one for
      each head.
    slashes: how many distances, likewise.
    last_q: how many of the last queries.
    first: how many of the first keys are forced.
    recent: how many of the smallest distances are. Distance 0 is the query's
      own key.
    q_positions: int32 [S] or [B, S], default arange(S).
    scale: of the logits, default D ** -0.5.

  Returns:
    bool [B, H, T] of keys, and bool [B, H, T] of distances 0 to T - 1.

  Raises:
    ValueError: for arguments that do not fit.

  Example:
    >>> q = jnp.ones((1, 4, 1, 1))
    >>> k = jnp.array([0.0, 9, 0, 0])[None, :, None, None]
    >>> lines = vertical_slash_lines(
    ...   q, k, verticals=1, slashes=2, last_q=1, first=0, recent=1
    ... )
    >>> [x[0, 0].nonzero()[0].tolist() for x in lines]
    [[1], [0, 2]]

  Source: minference, MInference 1.0: Accelerating Pre-filling for Long-Context
  LLMs via Dynamic Sparse Attention, Algorithm 2. The paper forces nothing.
  """
  scores.group_size(q, k)
  choices.check_integers(1, last_q=last_q)
  choices.check_integers(0, first=first, recent=recent)
  verticals = _numbers("verticals", verticals, q.shape[2])
  slashes = _numbers("slashes", slashes, q.shape[2])
  at = scores.positions(q_positions, q.shape[1])[:, -last_q:]
  q, k = lax.stop_gradient((q[:, -last_q:], k))
  masses = functools.partial(_line_masses, scale=scale)
  by_key, by_distance = automatic(masses, q, k, at, out=q[:, 0])
  n = jnp.arange(k.shape[1])
  return (
    choices.top_k(by_key, verticals, forced=n < first),
    choices.top_k(by_distance, slashes, forced=n < recent),
  )


def _numbers(name, value, heads):
  """int32 [H, 1]; ValueError for what is no number, or one for each head."""
  if isinstance(value, int | np.integer):
    value = [value] * heads
  if isinstance(value, jax.core.Tracer) or np.shape(value) != (heads,):
    raise ValueError(
      f"{name} is {value!r}; it must be an integer, or {heads} of them that "
      "are known when the function is traced, one for each head."
    )
  value = np.asarray(value)
  if value.dtype.kind not in "iu" or (value < 0).any():
    raise ValueError(f"{name} is {value}; it must hold integers from 0 on.")
  return value.astype(np.int32)[:, None]


def _line_masses(q, k, at, scale):
  """Probability by key and by distance, f32 [B, H, T] both.

  Args:
    q: [B, n, H, D], the last queries; k: [B, T, Hkv, D].
    at: int32 [1 or B, n], where they stand.
    scale: of the logits, or None.
  """
  (b, queries, heads, d), keys = q.shape, k.shape[1]
  n = jnp.arange(keys)
  scale = d**-0.5 if scale is None else scale

  def add(sums, some):
    q, at = some
    away = at[:, None, :, None] - n
    logits = scores.products(q, k, scale)
    p = scores.probabilities(logits, away >= 0)
    # Backwards, and turned by where a query stands: [B, H, n, distance].
    turn = lambda p, at: jnp.roll(p, at + 1, axis=-1)
    turned = jax.vmap(jax.vmap(turn, (-2, 0), -2))(p[..., ::-1], at)
    turned = jnp.where((away >= 0) & (away < keys), turned, 0)
    return (sums[0] + p.sum(-2), sums[1] + turned.sum(-2)), None

  # Some queries at a time; those that fill up stand before all keys.
  size = min(max(scores.CHUNK // (b * heads * keys), 8), queries)
  short = -queries % size
  q = jnp.pad(q, ((0, 0), (0, short), (0, 0), (0, 0)))
  at = jnp.broadcast_to(at, (b, queries))
  at = jnp.pad(at, ((0, 0), (0, short)), constant_values=-1)
  parts = [
    jnp.moveaxis(x.reshape(b, -1, size, *x.shape[2:]), 1, 0) for x in (q, at)
  ]
  none = jnp.zeros((b, heads, keys))
  return lax.scan(add, (none, none), parts)[0]


def vertical_slash_select(
  q: Array,
  k: Array,
  *,
  verticals: int | Sequence[int],
  slashes: int | Sequence[int],
  last_q: int = 64,
  first: int = 30,
  recent: int = 100,
  block: int = 64,
  q_positions: Array | None = None,
  scale: float | None = None,
  capacity: int | None = None,
) -> BlockMask:
  """The blocks that diagonals touch, and single keys besides.

  Lines are those of `vertical_slash_lines`. A tile of queries lists every key
  block in which one of them has a key at a chosen distance, and reads it whole,
  as far as each query. Chosen keys outside of these are the mask's columns.
  Without any line nothing is read.

  Args:
    q: floating [B, S, H, D].
    k: floating [B, T, Hkv, D], H a multiple of Hkv; key t stands at position t.
    verticals: how many keys are columns, one number or one for each head.
    slashes: how many diagonals, likewise.
    last_q: how many of the last queries the lines are chosen by.
    first: how many of the first keys are always among them.
    recent: how many of the smallest distances are.
    block: queries and keys of a block, a power of two from 16 to 512.
    q_positions: int32 [S] or [B, S], default arange(S). Those of a tile are
      taken for a run without gaps.
    scale: of the logits, default D ** -0.5.
    capacity: slots of a tile's list, without columns, by default what any tile
      may need; see `BlockMask.from_blocks`. Few are faster.

  Returns:
    A causal BlockMask with columns, [B, H, nq, the largest of verticals].

  Raises:
    ValueError: for arguments that do not fit.

  Example:
    >>> q, k = jax.random.normal(jax.random.key(0), (2, 1, 64, 1, 8))
    >>> few = dict(verticals=2, slashes=1, first=2, recent=1, block=16)
    >>> select = jax.jit(functools.partial(vertical_slash_select, **few))
    >>> mask = select(q, k)
    >>> mask.indices[0, 0, :, 0].tolist(), mask.columns[0, 0, :2].tolist()
    ([0, 1, 2, 3], [[-1, -1], [0, 1]])

  Source: minference, MInference 1.0: Accelerating Pre-filling for Long-Context
  LLMs via Dynamic Sparse Attention, Algorithm 2. Its kernel lays blocks along
  the diagonals, where here they begin at multiples of `block`: both read all of
  the lines, and other neighbors.
  """
  columns, distances = vertical_slash_lines(
    q,
    k,
    verticals=verticals,
    slashes=slashes,
    last_q=last_q,
    first=first,
    recent=recent,
    q_positions=q_positions,
    scale=scale,
  )
  low, high = _bounds(scores.positions(q_positions, q.shape[1]), block)
  touched = functools.partial(_touched, block=block)
  table = automatic(touched, distances, low, high, out=distances)
  if capacity is None and q_positions is None:
    # The recent ones lie side by side, and others touch two blocks each.
    others = _numbers("slashes", slashes, q.shape[2]).max(initial=0) - recent
    near = (recent + 2 * block - 3) // block + 1 if recent else 0
    most = near + 2 * max(int(others), 0)
    capacity = max(min(most, table.shape[3]), 1)
  mask = BlockMask.from_blocks(
    table, block_q=block, block_kv=block, capacity=capacity, rule=CAUSAL
  )
  most = int(_numbers("verticals", verticals, q.shape[2]).max(initial=0))
  width = min(max(most, first), k.shape[1])
  if not width:
    return mask
  return mask._replace(columns=_columns(columns, table, high, width, block))


def _bounds(positions, block):
  """The smallest and largest position of each tile, int32 [1 or B, nq]."""
  choices.check_blocks(block, block)
  pad = ((0, 0), (0, -positions.shape[1] % block))
  tiles = jnp.pad(positions, pad, mode="edge").reshape(
    len(positions), -1, block
  )
  return tiles.min(-1), tiles.max(-1)


def _touched(distances, low, high, block):
  """Which tiles have a key of a diagonal in which block, bool [B, H, nq, nk].

  These are tiles and blocks with a chosen distance between the nearest and the
  farthest of their pairs; how many there are, running sums tell.
  """
  b, _, keys = distances.shape
  first = jnp.arange(0, keys, block)
  last = jnp.minimum(first + block, keys) - 1
  before = jnp.cumsum(distances, -1, dtype=jnp.int32)
  before = jnp.pad(before, ((0, 0), (0, 0), (1, 0)))

  def count(distance):  # of those that are less
    at = jnp.clip(distance, 0, keys)
    at = jnp.broadcast_to(at, (b, *at.shape[1:]))
    return jax.vmap(lambda x, at: x[:, at])(before, at)

  nearest, farthest = low[..., None] - last, high[..., None] - first
  return count(farthest + 1) > count(nearest)


def _columns(chosen, table, high, width, block):
  """Columns of each tile, int32 [B, H, nq, width]: ascending, then -1."""
  b, h, keys = chosen.shape
  nq = table.shape[2]
  # Those that are not chosen stand behind the others.
  key = jnp.sort(jnp.where(chosen, jnp.arange(keys), keys), -1)[..., :width]
  key = jnp.broadcast_to(key[:, :, None], (b, h, nq, width))
  of_block = jnp.minimum(key // block, table.shape[3] - 1)
  inside = jnp.take_along_axis(table, of_block, -1)
  ahead = key > high[:, None, :, None]
  key = jnp.sort(jnp.where(inside | ahead, keys, key), -1)
  return jnp.where(key < keys, key, -1).astype(jnp.int32)


def mean_pool_select(
  q: Array,
  k: Array,
  *,
  top_k: int,
  block: int = 64,
  q_positions: Array | None = None,
) -> BlockMask:
  """The blocks of which the mean key is nearest to a tile's mean query.

  A tile chooses among the blocks that begin no later than its first query.
  Nothing is forced, not even its own block; a `top_k` of 0 reads nothing. The
  choice has no gradient.

  Args:
    q: floating [B, S, H, D].
    k: floating [B, T, Hkv, D], H a multiple of Hkv; key t stands at position t.
    top_k: how many blocks a tile reads.
    block: queries and keys of a block, a power of two from 16 to 512.
    q_positions: int32 [S] or [B, S], default arange(S).

  Returns:
    A causal BlockMask, [B, H, nq, top_k].

  Raises:
    ValueError: for arguments that do not fit.

  Example:
    >>> k = jnp.array([1.0, 2.0, 0.0]).repeat(16)[None, :, None, None]
    >>> mask = mean_pool_select(jnp.ones_like(k), k, top_k=2, block=16)
    >>> mask.indices.tolist()
    [[[[0, 0], [0, 1], [0, 1]]]]

  Source: minference, MInference 1.0: Accelerating Pre-filling for Long-Context
  LLMs via Dynamic Sparse Attention, Algorithm 3. A short last block has the
  mean of its tokens; the paper's code adds zeros.
  """
  scores.group_size(q, k)
  choices.check_integers(0, top_k=top_k)
  low, _ = _bounds(scores.positions(q_positions, q.shape[1]), block)
  q, k = (scores.pooled(x, block) for x in lax.stop_gradient((q, k)))
  blocks = k.shape[1]

  def choose(arrays):
    q, low = arrays
    found = choices.top_k_lists(
      scores.products(q, k),
      top_k,
      candidates=jnp.arange(blocks) * block <= low[:, None, :, None],
    )
    return jnp.swapaxes(found, 1, 2)

  low = jnp.broadcast_to(low, q.shape[:2])
  found = scores.in_chunks(choose, (q, low), q.shape[0] * q.shape[2] * blocks)
  return BlockMask(
    jnp.swapaxes(found, 1, 2),
    block_q=block,
    block_kv=block,
    kv_blocks=blocks,
    rule=CAUSAL,
  )


class PatternSearch(NamedTuple):
  """What `minference_search` finds.

  Attributes:
    names: of the candidates.
    best: int32 [H], the candidate of least damage, the first of equals.
    damage: f32 [candidates, H].
    read: f32 [candidates, H]: the share of all keys that a tile lists, in
      blocks and columns, mean over tiles.
  """

  names: tuple
  best: Array
  damage: Array
  read: Array


def minference_search(
  q: Array,
  k: Array,
  v: Array,
  candidates: Mapping[str, Callable[[Array, Array], BlockMask]],
  *,
  criterion: str = "output",
  skip: int = 0,
  scale: float | None = None,
) -> PatternSearch:
  """Which pattern serves which head best, found on an example, offline.

  One candidate is tried after the other, against dense causal attention, and no
  table of tokens is made. Candidates should cost about the same; `read` says
  what they list.

  Args:
    q: floating [B, S, H, D].
    k: floating [B, T, Hkv, D], H a multiple of Hkv.
    v: as k.
    candidates: functions of q and k by name, each giving a causal BlockMask.
    criterion: "output" is the sum of squares of what a head's output differs
      from that of dense attention; "mass" is the probability of dense attention
      that is not read, mean over queries.
    skip: how many of the first queries do not count.
    scale: of the logits of attention, default D ** -0.5.

  Returns:
    A PatternSearch. `per_head` makes one mask of its `best`.

  Raises:
    ValueError: for no candidates, another criterion, or arguments that do not
      fit.

  Example:
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 32, 2, 8))
    >>> lists = dict(own=[[0, 0], [1, 1]], all=[[0, 1], [0, 1]])
    >>> sizes = dict(block_q=16, block_kv=16, kv_blocks=2, rule=CAUSAL)
    >>> kinds = {
    ...   name: lambda q, k, lists=lists: BlockMask([[lists]], **sizes)
    ...   for name, lists in lists.items()
    ... }
    >>> minference_search(q, k, v, kinds).best.tolist()
    [1, 1]

  Source: minference, MInference 1.0: Accelerating Pre-filling for Long-Context
  LLMs via Dynamic Sparse Attention, Algorithm 1. The criterion "mass" is that
  of its code, which skips 2500 queries.
  """
  scores.group_size(q, k)
  choices.check_integers(0, skip=skip)
  if not isinstance(candidates, Mapping) or not candidates:
    raise ValueError(
      f"candidates is {candidates!r}; it must be a dict of one function of q "
      "and k or more, by name."
    )
  if criterion not in ("output", "mass"):
    raise ValueError(
      f"criterion is {criterion!r}; it must be 'output' or 'mass'."
    )
  if skip >= q.shape[1]:
    raise ValueError(f"skip is {skip}; there are {q.shape[1]} queries.")
  everything = compressed.causal_mask(q, k.shape[1], None, 128, 128, None)
  dense = block_sparse_attention(
    q, k, v, everything, scale=scale, return_lse=True
  )
  figures = []
  for make in candidates.values():
    settings = dict(criterion=criterion, skip=skip, scale=scale)
    figures.append(_figures(q, k, v, make(q, k), dense, **settings))
  damage, read = map(jnp.stack, zip(*figures, strict=True))
  best = jnp.argmin(damage, axis=0).astype(jnp.int32)
  return PatternSearch(tuple(candidates), best, damage, read)


@functools.partial(jax.jit, static_argnames=("criterion", "skip", "scale"))
def _figures(q, k, v, mask, dense, *, criterion, skip, scale):
  """Damage and share of keys of each head, f32 [H] both."""
  out, lse = block_sparse_attention(q, k, v, mask, scale=scale, return_lse=True)
  if criterion == "mass":
    damage = 1 - jnp.exp(lse - dense[1])[:, skip:].mean((0, 1))
  else:
    away = out.astype(jnp.float32) - dense[0].astype(jnp.float32)
    damage = (away[:, skip:] ** 2).sum((0, 1, 3))
  read = mask.listed.sum(-1) * mask.block_kv
  if mask.columns is not None:
    read += (mask.columns >= 0).sum(-1)
  read = read.mean((0, 2)) / (mask.kv_blocks * mask.block_kv)
  return damage, jnp.broadcast_to(read, damage.shape)


def per_head(
  masks: Sequence[BlockMask],
  which: Array | Sequence[int],
  *,
  rule: rules.Rule | None = None,
) -> BlockMask:
  """One mask in which each head has the lists of a mask of its own choice.

  Lists are padded to those of the mask with the most slots.

  Args:
    masks: of equal blocks, with or without columns, of one head or H.
    which: int [H], may be traced: the number of each head's mask.
    rule: the rule of the result, by default that of the masks. A mask has one
      rule: where they differ, name one, such as Causal(), which reads the
      blocks of an A-shape whole, as far as the query.

  Returns:
    A BlockMask of H heads. What a capacity dropped is not known to it.

  Raises:
    ValueError: for masks that do not fit each other or have members or levels,
      for different rules without `rule`, and for numbers that are none.

  Example:
    >>> q, k = jax.random.normal(jax.random.key(0), (2, 1, 64, 2, 8))
    >>> choose = lambda n: mean_pool_select(q, k, top_k=n, block=16)
    >>> masks = jax.jit(lambda: [choose(1), choose(4)])()
    >>> per_head(masks, [1, 0]).counts.tolist()
    [[[1, 2, 3, 4], [1, 1, 1, 1]]]

  Source: minference, MInference 1.0: Accelerating Pre-filling for Long-Context
  LLMs via Dynamic Sparse Attention, sec. 3.
  """
  masks = list(masks)
  which = jnp.asarray(which)
  if which.ndim != 1 or not jnp.issubdtype(which.dtype, jnp.integer):
    raise ValueError(
      f"which is {which.dtype}{list(which.shape)}; it must hold integers, [H]."
    )
  _check_masks(masks, which, rule)
  batch = max((m.counts.shape[0] for m in masks), default=1)
  tiles = masks[0].counts.shape[2]

  def pick(arrays, fill=0):
    width = max(x.shape[-1] for x in arrays)
    found = jnp.full((batch, len(which), tiles, width), fill, jnp.int32)
    for i, x in enumerate(arrays):
      pad = [(0, 0)] * 3 + [(0, width - x.shape[-1])]
      x = jnp.pad(x, pad, constant_values=fill)
      found = jnp.where((which == i)[:, None, None], x, found)
    return found

  columns = None
  if any(m.columns is not None for m in masks):
    none = jnp.zeros((1, 1, tiles, 0), jnp.int32)
    columns = pick(
      [none if m.columns is None else m.columns for m in masks], fill=-1
    )
  counts = [jnp.minimum(m.counts, m.capacity)[..., None] for m in masks]
  return masks[0]._replace(
    indices=pick([m.indices for m in masks]),
    counts=pick(counts)[..., 0],
    columns=columns,
    rule=masks[0].rule if rule is None else rule,
  )


def _check_masks(masks, which, rule):
  if not masks or not all(isinstance(m, BlockMask) for m in masks):
    raise ValueError(
      f"masks is {[type(m).__name__ for m in masks]}; it must hold BlockMasks."
    )
  stray = (which < 0) | (which >= len(masks))
  if not isinstance(which, jax.core.Tracer) and stray.any():
    raise ValueError(
      f"which is {which.tolist()}; of {len(masks)} masks the numbers are 0 to "
      f"{len(masks) - 1}."
    )
  for name in ("members", "level"):
    if any(getattr(m, name) is not None for m in masks):
      raise ValueError(f"masks has one with {name}; it must have none.")
  sizes = [(m.block_q, m.block_kv, m.kv_blocks, m.counts.shape) for m in masks]
  batches = {x[3][0] for x in sizes} - {1}
  blocks = {(*x[:3], x[3][2]) for x in sizes}
  heads = {x[3][1] for x in sizes} - {1, len(which)}
  if len(batches) > 1 or len(blocks) > 1 or heads:
    raise ValueError(
      "masks has block_q, block_kv, kv_blocks and lists [batch, heads, tiles] "
      f"of {sizes}; they must be equal but for a batch or heads of 1, and the "
      f"heads {len(which)}, as which says."
    )
  if rule is None and len({m.rule for m in masks}) > 1:
    raise ValueError(
      f"masks has the rules {[m.rule for m in masks]}; they must be equal, or "
      "rule say what all of them get."
    )
