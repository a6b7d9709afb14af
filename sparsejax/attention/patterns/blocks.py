"""Patterns of blocks, by head or drawn."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import rules
from pallas_kernels.block_mask import BlockMask
from sparsejax.attention.patterns import checks


def _count(length, block):
  """How many blocks of `block` tokens `length` makes."""
  return -(
    -checks.integer("length", length, 1) // checks.integer("block", block, 1)
  )


def s2(
  length,
  block,
  *,
  num_heads,
  local,
  stride,
  kv_heads=None,
  step=None,
  first=0,
) -> BlockMask:
  """Local blocks and every stride-th one, from another start in each head.

  Key block j of query block i is read by head h if i - j < local or
  (j + h * step + first) % stride == 0, causal. With a step of 1 and as many
  heads as the stride, the heads together read everything.

  Args:
    length: tokens; queries are keys.
    block: tokens of a block.
    num_heads: query heads.
    local: the last blocks that every head reads, the own one among them.
    stride: blocks from one far block to the next.
    kv_heads: key heads, h being one of them: the query heads of one read the
      same; default num_heads.
    step: blocks that a head starts before the last; default
      max(1, stride // num_heads).
    first: what all heads are moved by (1 in Phi-3-small).

  Returns:
    A BlockMask with the rule Causal, [1, num_heads, n, C].

  Raises:
    ValueError: for numbers out of range, and key heads that do not divide the
      query heads.

  Example:
    >>> found = s2(64, 16, num_heads=2, local=1, stride=2)
    >>> [
    ...   row[: int(n)]
    ...   for row, n in zip(
    ...     found.indices[0, 1].tolist(), found.counts[0, 1], strict=True
    ...   )
    ... ]
    [[0], [1], [1, 2], [1, 3]]

  Source: s2-attention, Efficient LLM Training and Serving with Heterogeneous
  Context Sharding among Attention Heads, sec. 3; the step is that of its
  released kernels.
  """
  blocks, num_heads = (
    _count(length, block),
    checks.integer("num_heads", num_heads, 1),
  )
  kv_heads = (
    num_heads if kv_heads is None else checks.integer("kv_heads", kv_heads, 1)
  )
  checks.require(
    num_heads % kv_heads == 0,
    f"kv_heads is {kv_heads}; it must divide num_heads, {num_heads}.",
  )
  local = min(checks.integer("local", local, 0), blocks)
  stride = checks.integer("stride", stride, 1)
  step = max(1, stride // num_heads) if step is None else step
  step, first = (
    checks.integer("step", step, 0),
    checks.integer("first", first, 0),
  )
  head = np.repeat(np.arange(kv_heads), num_heads // kv_heads)
  row = np.arange(blocks)[:, None]
  near = row - np.arange(local)
  start = -(head * step + first) % stride
  far = start[:, None] + np.arange(0, blocks, stride)
  lists = np.concatenate(
    [
      np.broadcast_to(near, (num_heads, *near.shape)),
      np.where(far[:, None] <= row, far[:, None], -1),
    ],
    axis=-1,
  )
  return BlockMask(
    lists[None],
    block_q=block,
    block_kv=block,
    kv_blocks=blocks,
    rule=rules.Causal(),
  )


def butterfly(length, block, *, max_stride) -> BlockMask:
  """The flat block butterfly: block i reads i and i xor 1, 2, 4 ...

  It is not causal; `butterfly(...) & mask(Causal(), ...)` is. Where the blocks
  are no power of two, partners beyond the end are left out.

  Args:
    length: tokens; queries are keys.
    block: tokens of a block.
    max_stride: a power of two, twice the largest i xor j; 1 is the diagonal.

  Returns:
    A BlockMask without a rule, [1, 1, n, 1 + log2(max_stride)].

  Raises:
    ValueError: for a max_stride that is no power of two.

  Example:
    >>> butterfly(64, 16, max_stride=4).indices[0, 0].tolist()
    [[0, 1, 2], [0, 1, 3], [0, 2, 3], [1, 2, 3]]

  Source: pixelfly, Pixelated Butterfly, sec. 3.2 (flat block butterfly).
  """
  blocks, max_stride = (
    _count(length, block),
    checks.integer("max_stride", max_stride, 1),
  )
  checks.require(
    max_stride & (max_stride - 1) == 0,
    f"max_stride is {max_stride}; it must be a power of two.",
  )
  apart = [0, *(1 << m for m in range(max_stride.bit_length() - 1))]
  return BlockMask(
    (np.arange(blocks)[:, None] ^ np.array(apart))[None, None],
    block_q=block,
    block_kv=block,
    kv_blocks=blocks,
  )


def _bigbird_table(blocks, window_blocks, global_blocks):
  """bool [n, n]: the blocks that are read without a draw."""
  window_blocks = checks.integer("window_blocks", window_blocks, 1)
  global_blocks = checks.integer("global_blocks", global_blocks, 0)
  checks.require(
    window_blocks % 2 == 1,
    f"window_blocks is {window_blocks}; it must be odd, the own block being in "
    "the middle.",
  )
  at = np.arange(blocks)
  ends = (at < global_blocks) | (at >= blocks - global_blocks)
  near = abs(at[:, None] - at) <= window_blocks // 2
  return near | ends | ends[:, None]


def bigbird_random(
  key, length, block, *, count=3, window_blocks=3, global_blocks=1
) -> jax.Array:
  """Draws the random blocks of `bigbird`, none twice in a row.

  Only blocks are drawn that are neither in the window nor global. Another draw
  for each head: `jax.vmap` over keys.

  Args:
    key: a PRNG key.
    length: tokens.
    block: tokens of a block.
    count: blocks a query block draws.
    window_blocks: as given to `bigbird`.
    global_blocks: as given to `bigbird`.

  Returns:
    int32 [n, count]; -1 where a row has fewer blocks to draw from, and in the
    rows of global blocks, which read all.

  Raises:
    ValueError: for numbers out of range.

  Example:
    >>> drawn = bigbird_random(jax.random.key(0), 96, 16, count=2)
    >>> drawn.shape, drawn[0].tolist(), drawn[2].tolist()
    ((6, 2), [-1, -1], [4, -1])

  Source: longformer-bigbird, Big Bird, sec. 2 (random attention).
  """
  blocks = _count(length, block)
  read = _bigbird_table(blocks, window_blocks, global_blocks)
  count = checks.integer("count", count, 0)
  chance = jnp.where(read, -1, jax.random.uniform(key, read.shape))
  chance = jnp.pad(chance, ((0, 0), (0, count)), constant_values=-1)
  best, drawn = jax.lax.top_k(chance, count)
  return jnp.where(best < 0, -1, drawn).astype(jnp.int32)


def bigbird(
  length, block, *, random, window_blocks=3, global_blocks=1
) -> BlockMask:
  """A window of blocks, global blocks at both ends, and random ones.

  The first and last `global_blocks` read and are read by all (the paper's
  internal construction); so some lists have all blocks. Not causal.

  Args:
    length: tokens; queries are keys.
    block: tokens of a block.
    random: int [n, r] or [heads, n, r]: further blocks of each query block,
      as `bigbird_random` draws them; -1 is none.
    window_blocks: how many blocks of the window, an odd number.
    global_blocks: how many blocks at each end are global.

  Returns:
    A BlockMask without a rule, [1, heads or 1, n, C].

  Raises:
    ValueError: for numbers out of range or a `random` of another shape.

  Example:
    >>> found = bigbird(80, 16, random=[[-1]] * 3 + [[1]] + [[-1]])
    >>> found.blocks()[0, 0].astype(int)
    Array([[1, 1, 1, 1, 1],
           [1, 1, 1, 0, 1],
           [1, 1, 1, 1, 1],
           [1, 1, 1, 1, 1],
           [1, 1, 1, 1, 1]], dtype=int32)

  Source: longformer-bigbird, Big Bird, sec. 2 and appendix D (blocks of 64, 3
  in the window, 2 global, 3 random).
  """
  blocks = _count(length, block)
  read = _bigbird_table(blocks, window_blocks, global_blocks)
  random = jnp.asarray(random)
  checks.require(
    random.ndim in (2, 3)
    and random.shape[-2] == blocks
    and jnp.issubdtype(random.dtype, jnp.integer),
    f"random is {random.dtype}{list(random.shape)}; it must hold integers, "
    f"[{blocks}, r] or [heads, {blocks}, r].",
  )
  drawn = jnp.where((random < 0) | (random >= blocks), blocks, random)
  table = jnp.zeros((*random.shape[:-1], blocks + 1), bool)
  table = jnp.put_along_axis(table, drawn, True, axis=-1, inplace=False)
  return BlockMask.from_blocks(
    table[..., :blocks] | read, block_q=block, block_kv=block
  )
