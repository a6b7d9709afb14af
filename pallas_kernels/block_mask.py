"""BlockMask: for every query block, the list of key blocks that it reads."""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import partitioning
from pallas_kernels import rules

MEMBER_BITS = 32  # query-membership bits in one word


def _require(condition: bool, message: str) -> None:
  if not condition:
    raise ValueError(message)


def _int_array(name: str, value) -> jax.Array:
  """int32; what it does not reach is clipped, and not wrapped."""
  if not isinstance(value, jax.Array):
    try:
      value = np.asarray(value)  # JAX would wrap 64 bits
    except jax.errors.TracerArrayConversionError:  # a list of traced numbers
      value = jnp.asarray(value)
  _require(
    jnp.issubdtype(value.dtype, jnp.integer),
    f"{name} has dtype {value.dtype}; it must hold integers.",
  )
  if value.dtype in (np.int64, np.uint64, np.uint32):
    most = np.iinfo(np.int32)
    low = 0 if value.dtype.kind == "u" else most.min
    value = value.clip(low, most.max)
  return jnp.asarray(value, jnp.int32)


def _is_integer(value) -> bool:
  return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _at_least(name: str, value, least: int) -> None:
  _require(
    _is_integer(value) and value >= least,
    f"{name} is {value!r}; it must be an integer of at least {least}.",
  )


def _power_of_two(name: str, value: int, low: int, high: int) -> None:
  allowed = _is_integer(value)
  allowed = allowed and (
    (value == 1 and low == 1)
    or (16 <= value <= high and value & (value - 1) == 0)
  )
  _require(
    allowed,
    f"{name} is {value!r}; it must be a power of two from 16 to {high}"
    + (", or 1." if low == 1 else "."),
  )


def _static_fields(block_q, block_kv, kv_blocks, rule) -> dict:
  """Fields of a BlockMask that are no arrays, checked; ValueError."""
  _power_of_two("block_q", block_q, 1, 512)
  _power_of_two("block_kv", block_kv, 16, 512)
  _at_least("kv_blocks", kv_blocks, 0)
  if rule is not None:
    rules.check(rule)
  sizes = dict(block_q=block_q, block_kv=block_kv, kv_blocks=kv_blocks)
  return {name: int(size) for name, size in sizes.items()} | {"rule": rule}


def pack_members(bits: jax.Array) -> jax.Array:
  """Membership bits, bool [..., C, block_q] -> uint32 [..., W, block_q].

  W is C / 32 rounded up; slot c is bit c % 32 of word c // 32.
  """
  slots = bits.shape[-2]
  words = -(-slots // MEMBER_BITS)
  pad = [(0, 0)] * bits.ndim
  pad[-2] = (0, words * MEMBER_BITS - slots)
  bits = jnp.pad(bits, pad).reshape(
    *bits.shape[:-2], words, MEMBER_BITS, bits.shape[-1]
  )
  weight = jnp.uint32(1) << jnp.arange(MEMBER_BITS, dtype=jnp.uint32)
  return (bits * weight[:, None]).sum(-2, dtype=jnp.uint32)


def unpack_members(words: jax.Array, slots: int) -> jax.Array:
  """The inverse: uint32 [..., W, block_q] -> bool [..., slots, block_q]."""
  slot = jnp.arange(slots, dtype=jnp.uint32)
  picked = jnp.take(words, slot // MEMBER_BITS, axis=-2)
  return (picked >> (slot % MEMBER_BITS)[:, None]) & 1 == 1


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, init=False, eq=False)
class BlockMask:
  """Lists of key blocks, one a query block: the argument of every kernel.

  Leading dimensions are batch and query head; either may be 1, which shares
  the lists. The constructor takes lists in any order and makes them canonical:
  entries outside [0, kv_blocks) and repetitions are dropped, the rest is
  sorted, slots past the count hold 0.

  Attributes:
    indices: int32 [B | 1, H | 1, nq, C]: listed key blocks, ascending.
    counts: int32 [B | 1, H | 1, nq]: how many are listed. More than C says
      that `from_blocks` met its capacity: `dropped` counts what is missing.
    members: None, or uint32 [B | 1, H | 1, nq, W, block_q]: which query of the
      block reads which listed block (`pack_members`).
    columns: None, or int32 [B | 1, H | 1, nq, Ct]: single keys that all queries
      of the block read besides; ascending, then -1. A key inside a listed
      block is not repeated: there `members` alone say who reads it.
    level: None, or int8 [B | 1, H | 1, nq, C]: 0 reads the block's keys, l > 0
      the means of runs of 2**l of them, each counting 2**l times.
    edges: None, or int32 [B | 1, Hkv | 1, E]: the lists by key block, which
      `with_transpose` makes and the backward pass on TPU reads.
    by_query: None, or int32 [B | 1, H | Hkv | 1, nq, block_q, K]: the blocks
      that each query reads, then -1. `from_queries` keeps them for where tiles
      that list all of them would run much that nobody reads.
    block_q, block_kv: queries and keys of a block.
    kv_blocks: the number of key blocks there are, listed or not.
    rule: None, or a rule of `pallas_kernels.rules`: which pairs of positions of
      a listed block may be read.
    max_level: the largest level that `level` may hold.
    edges_of: how many query blocks `edges` tell of, or 0. A shard of the mask
      has fewer: edges that tell of others are not used.

  Raises:
    ValueError: for block sizes that are no powers of two in range, arrays
      whose shapes do not fit each other, or no integers, and a rule that holds
      arrays (it is traced once, here).

  Example:
    >>> mask = pallas_kernels.BlockMask(
    ...   [[[[2, 0, 0], [1, 9, 0]]]],
    ...   [[[3, 1]]],
    ...   block_q=64,
    ...   block_kv=64,
    ...   kv_blocks=4,
    ... )
    >>> mask.indices.tolist(), mask.counts.tolist()
    ([[[[0, 2, 0], [1, 0, 0]]]], [[[2, 1]]])
    >>> float(mask.sparsity())
    0.625
  """

  indices: jax.Array
  counts: jax.Array
  members: jax.Array | None
  columns: jax.Array | None
  level: jax.Array | None
  edges: jax.Array | None
  by_query: jax.Array | None
  block_q: int
  block_kv: int
  kv_blocks: int
  rule: Callable[[Any, Any], Any] | None
  max_level: int
  edges_of: int

  _ARRAYS = (
    "indices",
    "counts",
    "members",
    "columns",
    "level",
    "edges",
    "by_query",
  )
  _STATIC = (
    "block_q",
    "block_kv",
    "kv_blocks",
    "rule",
    "max_level",
    "edges_of",
  )

  def __init__(
    self,
    indices,
    counts=None,
    *,
    block_q: int,
    block_kv: int,
    kv_blocks: int,
    rule=None,
    members=None,
    columns=None,
    level=None,
    max_level: int | None = None,
  ):
    static = _static_fields(block_q, block_kv, kv_blocks, rule)
    if max_level is not None:
      _at_least("max_level", max_level, 0)
    indices = _int_array("indices", indices)
    _require(
      indices.ndim == 4,
      f"indices has shape {indices.shape}; it must be [batch or 1, heads or 1, "
      "query blocks, capacity].",
    )
    *lead, capacity = indices.shape
    if counts is None:
      counts = jnp.full(lead, capacity)
    counts = _int_array("counts", counts)
    _require(
      counts.shape == tuple(lead),
      f"counts has shape {counts.shape}; with indices {indices.shape} it must "
      f"be {tuple(lead)}.",
    )
    if members is not None:
      members = jnp.asarray(members)
      words = -(-capacity // MEMBER_BITS)
      _require(
        members.shape == (*lead, words, block_q)
        and members.dtype == jnp.uint32,
        f"members is {members.dtype}{list(members.shape)}; it must be uint32"
        f"{[*lead, words, block_q]} (see pack_members).",
      )
      members = unpack_members(members, capacity)
    _require(
      level is not None or max_level in (None, 0),
      f"max_level is {max_level} without level; give both or neither.",
    )
    if level is not None:
      level = _int_array("level", level)
      deepest = block_kv.bit_length() - 1
      max_level = deepest if max_level is None else max_level
      _require(
        level.shape == indices.shape and 0 <= max_level <= deepest,
        f"level has shape {level.shape} and max_level is {max_level}; level "
        f"must be of the shape of indices, {indices.shape}, and max_level from "
        f"0 to log2(block_kv) = {deepest}.",
      )
    if columns is not None:
      columns = _int_array("columns", columns)
      _require(
        columns.ndim == 4 and columns.shape[:3] == tuple(lead),
        f"columns has shape {columns.shape}; it must be {(*lead, 'Ct')}.",
      )
    valid = jnp.arange(capacity) < counts[..., None]
    indices, counts, members, level = _canonical(
      indices, valid, kv_blocks, members, level
    )
    if level is not None:
      level = jnp.clip(level, 0, max_level).astype(jnp.int8)
    if columns is not None:
      columns = _canonical_columns(
        columns, indices, counts, block_kv, kv_blocks
      )
    self._set(
      indices=indices,
      counts=counts,
      members=None if members is None else pack_members(members),
      columns=columns,
      level=level,
      edges=None,
      by_query=None,
      **static,
      max_level=int(max_level or 0),
      edges_of=0,
    )

  @classmethod
  def _of_canonical(cls, indices, counts, static, members=None, by_query=None):
    """The mask of lists that are canonical, which are not sorted again."""
    made = object.__new__(cls)
    made._set(
      indices=indices,
      counts=counts,
      members=members,
      columns=None,
      level=None,
      edges=None,
      by_query=by_query,
      **static,
      max_level=0,
      edges_of=0,
    )
    return made

  def _set(self, **fields):
    for name, value in fields.items():
      object.__setattr__(self, name, value)

  def _replace(self, **fields):
    """A copy with other fields, which must be canonical."""
    made = object.__new__(type(self))
    if {"indices", "counts"} & fields.keys():
      fields = {"edges": None, "edges_of": 0, "by_query": None, **fields}
    made._set(**{**vars(self), **fields})
    return made

  def tree_flatten_with_keys(self):
    children = [
      (jax.tree_util.GetAttrKey(name), getattr(self, name))
      for name in self._ARRAYS
    ]
    return children, tuple(getattr(self, name) for name in self._STATIC)

  @classmethod
  def tree_unflatten(cls, static, children):
    made = object.__new__(cls)
    made._set(
      **dict(zip(cls._ARRAYS, children, strict=True)),
      **dict(zip(cls._STATIC, static, strict=True)),
    )
    return made

  @classmethod
  def from_blocks(
    cls, blocks, *, block_q, block_kv, capacity=None, rule=None
  ) -> "BlockMask":
    """The mask that lists the true entries of a dense table of blocks.

    Args:
      blocks: bool [..., nq, nk] with at most two leading dimensions (head, or
        batch and head).
      block_q: queries of a block, 1 or a power of two from 16 to 512.
      block_kv: keys of a block, a power of two from 16 to 512.
      capacity: slots of a list; by default what the fullest list needs where
        `blocks` is concrete, else nk. Of a list that has more, the first are
        kept: concrete blocks raise, traced ones show in `dropped`.
      rule: which positions of a listed block may be read.

    Returns:
      A BlockMask with counts [B | 1, H | 1, nq] and C = capacity.

    Raises:
      ValueError: for blocks that are not bool or have too few or too many
        dimensions, or that are concrete and exceed the capacity.

    Example:
      >>> blocks = jnp.tril(jnp.ones((4, 4), bool))
      >>> mask = pallas_kernels.BlockMask.from_blocks(
      ...   blocks, block_q=64, block_kv=64, rule=pallas_kernels.Causal()
      ... )
      >>> mask.counts.tolist()
      [[[1, 2, 3, 4]]]
    """
    blocks = jnp.asarray(blocks)
    _require(
      blocks.dtype == bool and 2 <= blocks.ndim <= 4,
      f"blocks is {blocks.dtype}{list(blocks.shape)}; it must be bool "
      "[nq, nk], [heads, nq, nk] or [batch, heads, nq, nk].",
    )
    blocks = blocks.reshape((1,) * (4 - blocks.ndim) + blocks.shape)
    kv_blocks = blocks.shape[-1]
    static = _static_fields(block_q, block_kv, kv_blocks, rule)
    counts = blocks.sum(-1, dtype=jnp.int32)
    concrete = not isinstance(counts, jax.core.Tracer)
    needed = int(counts.max(initial=0)) if concrete else kv_blocks
    if capacity is None:
      capacity = max(needed, 1)
    _at_least("capacity", capacity, 1)
    _require(
      not (concrete and capacity < needed),
      f"capacity is {capacity}; the fullest list holds {needed} blocks.",
    )
    order = jnp.argsort(~blocks, axis=-1, stable=True)[..., :capacity]
    short = max(capacity - kv_blocks, 0)
    order = jnp.pad(order.astype(jnp.int32), [(0, 0)] * 3 + [(0, short)])
    listed = jnp.arange(capacity) < counts[..., None]
    return cls._of_canonical(jnp.where(listed, order, 0), counts, static)

  @classmethod
  def from_queries(
    cls,
    indices,
    counts=None,
    *,
    block_q,
    block_kv,
    kv_blocks,
    capacity,
    rule=None,
  ) -> "BlockMask":
    """The mask of lists that every query has for itself: tiles and members.

    A tile lists the union of its queries' blocks, and `members` keeps who
    chose what, so that nothing is pooled. The memory it takes grows with S * K
    and with tiles times kv_blocks.

    Args:
      indices: int32 [B | 1, H | 1, S, K]: key blocks of each query, in any
        order. Entries outside [0, kv_blocks) are ignored.
      counts: int32 [B | 1, H | 1, S], how many of them count; default all.
      block_q: queries of a tile.
      block_kv: keys of a block.
      kv_blocks: how many key blocks there are.
      capacity: slots of a tile's list. Of a larger union the blocks chosen by
        the most queries are kept, and `dropped` counts the others; the union
        never exceeds min(block_q * K, kv_blocks).
      rule: which positions of a listed block may be read.

    Returns:
      A BlockMask of ceil(S / block_q) query blocks with members.

    Raises:
      ValueError: for arrays that do not fit each other.

    Example:
      >>> mask = pallas_kernels.BlockMask.from_queries(
      ...   [[[[0], [3]] * 8]], block_q=16, block_kv=16, kv_blocks=4, capacity=2
      ... )
      >>> mask.indices.tolist()
      [[[[0, 3]]]]
    """
    indices = _int_array("indices", indices)
    _require(
      indices.ndim == 4,
      f"indices has shape {indices.shape}; it must be [batch or 1, heads or 1, "
      "queries, blocks of a query].",
    )
    _at_least("kv_blocks", kv_blocks, 1)
    static = _static_fields(block_q, block_kv, kv_blocks, rule)
    _at_least("capacity", capacity, 1)
    b, h, queries, width = indices.shape
    if counts is not None:
      counts = _int_array("counts", counts)
      _require(
        counts.shape == (b, h, queries),
        f"counts has shape {counts.shape}; it must be {(b, h, queries)}.",
      )
      valid = jnp.arange(width) < counts[..., None]
      indices = jnp.where(valid, indices, -1)
    nq = -(-queries // block_q)
    pad = nq * block_q - queries
    indices = jnp.pad(
      indices, ((0, 0), (0, 0), (0, pad), (0, 0)), constant_values=-1
    )
    indices = jnp.where(
      (indices >= 0) & (indices < kv_blocks), indices, kv_blocks
    )
    chosen = _without_repetition(jnp.sort(indices, axis=-1), kv_blocks)
    chosen = chosen.reshape(b, h, nq, block_q, width)
    slots = min(capacity, kv_blocks)
    words = -(-slots // MEMBER_BITS)
    listed, counts, members = partitioning.per_shard(
      lambda axes, chosen: _unions(chosen, kv_blocks, slots),
      [chosen],
      ["b h n q k"],
      ["b h n s", "b h n", "b h n w q"],
      dict(b=b, h=h, n=nq, q=block_q, k=width, s=slots, w=words),
      cut="bhn",
    )
    by_query = None
    if slots == min(block_q * width, kv_blocks):  # nothing can be dropped
      by_query = jnp.where(chosen < kv_blocks, chosen, -1)
    return cls._of_canonical(listed, counts, static, members, by_query)

  @property
  def capacity(self) -> int:
    """Slots of a list, C."""
    return self.indices.shape[-1]

  @property
  def listed(self) -> jax.Array:
    """bool [B | 1, H | 1, nq, C]: the slots in use."""
    return jnp.arange(self.capacity) < self.counts[..., None]

  @property
  def dropped(self) -> jax.Array:
    """int32 [B | 1, H | 1, nq]: blocks that the capacity had no slot for."""
    return jnp.maximum(self.counts - self.capacity, 0)

  def blocks(self) -> jax.Array:
    """The dense table, bool [B | 1, H | 1, nq, kv_blocks]."""
    table = jnp.zeros((*self.counts.shape, self.kv_blocks + 1), bool)
    where = jnp.where(self.listed, self.indices, self.kv_blocks)
    table = jnp.put_along_axis(table, where, True, axis=-1, inplace=False)
    return table[..., : self.kv_blocks]

  def sparsity(self) -> jax.Array:
    """The fraction of (query block, key block) pairs that are not listed."""
    pairs = max(math.prod(self.counts.shape) * self.kv_blocks, 1)
    kept = jnp.minimum(self.counts, self.capacity).sum(dtype=jnp.float32)
    return 1 - kept / pairs

  def transpose(self) -> jax.Array:
    """The table by key block, as one sorted list of edges a head.

    Returns:
      int32 [B | 1, H | 1, nq * C]: edges (query block * C + slot), those of
      key block 0 first, within a key block by query block; unused ones last.
    """
    heads = self.counts.shape[1]
    return self.with_transpose(heads, heads).edges

  def with_transpose(self, num_heads: int, num_kv_heads: int) -> "BlockMask":
    """The mask with its lists by key block made, for many backward passes.

    The backward pass on TPU needs them and makes them where they are missing.
    A mask that many layers or steps share has them made once. They tell of
    query blocks by number: where the queries are sharded each shard makes its
    own, in each backward pass; inside a `jax.shard_map`, call this there.

    Args:
      num_heads: query heads of the calls.
      num_kv_heads: key heads of the calls; the query heads of one are one list.

    Returns:
      The mask with `edges` [B | 1, Hkv | 1, H // Hkv * nq * C].

    Raises:
      ValueError: for heads that do not fit the mask or each other.
    """
    b, h, nq, capacity = self.indices.shape
    _at_least("num_heads", num_heads, 1)
    _at_least("num_kv_heads", num_kv_heads, 1)
    _require(
      h in (1, num_heads) and num_heads % num_kv_heads == 0,
      f"num_heads is {num_heads} and num_kv_heads {num_kv_heads}; the mask has "
      f"{h} heads, and the query heads must be a multiple of the key heads.",
    )
    group = num_heads // num_kv_heads
    key = jnp.where(self.listed, self.indices, self.kv_blocks)
    if h == 1:
      key = jnp.broadcast_to(key, (b, group, nq, capacity))
    key = key.reshape(b, -1, group * nq * capacity)
    return self._replace(edges=sorted_edges(key, self.kv_blocks), edges_of=nq)

  def __or__(self, other: "BlockMask") -> "BlockMask":
    """Reads what either lists. Block sizes and rules must be equal.

    What the capacity of one of them dropped is not known to the union.
    """
    _check_pair("|", self, other)
    both = [m for m in (self, other) if m.members is not None]
    _require(
      not both or (self.columns is None and other.columns is None),
      "| of masks with members and columns is not defined: a column inside a "
      "block that only some queries read cannot be told.",
    )
    _require(
      self.rule == other.rule,
      f"| of masks with the rules {self.rule} and {other.rule}: a listed block "
      "has one rule, so they must be equal.",
    )
    left, right = _share_lists(self, other)
    indices = jnp.concatenate([m.indices for m in (left, right)], -1)
    valid = jnp.concatenate([m.listed for m in (left, right)], -1)
    members = None
    if left.members is not None or right.members is not None:
      members = jnp.concatenate([_bits(m) for m in (left, right)], -2)
    indices, counts, members, _ = _canonical(
      indices, valid, self.kv_blocks, members, None
    )
    columns = [m.columns for m in (left, right) if m.columns is not None]
    if columns:
      columns = _canonical_columns(
        jnp.concatenate(columns, -1),
        indices,
        counts,
        self.block_kv,
        self.kv_blocks,
      )
    size = min(indices.shape[-1], max(self.kv_blocks, 1))
    return left._replace(
      indices=indices[..., :size],
      counts=counts,
      members=None if members is None else pack_members(members[..., :size, :]),
      columns=columns if isinstance(columns, jax.Array) else None,
    )

  def __and__(self, other: "BlockMask") -> "BlockMask":
    """Reads what both list; the rules are joined by `&`."""
    _check_pair("&", self, other)
    _require(
      self.columns is None and other.columns is None,
      "& of masks with columns is not defined; take the union, or drop them.",
    )
    left, right = _share_lists(self, other)
    same = left.indices[..., :, None] == right.indices[..., None, :]
    same &= right.listed[..., None, :]
    members = None
    if left.members is not None or right.members is not None:
      theirs = _joined(same, _bits(right))
      members = _bits(left) & theirs
    indices, counts, members, _ = _canonical(
      left.indices, left.listed & same.any(-1), self.kv_blocks, members, None
    )
    found = [m.rule for m in (left, right) if m.rule is not None]
    rule = (
      rules.All(tuple(found)) if len(set(found)) > 1 else (found or [None])[0]
    )
    return left._replace(
      indices=indices,
      counts=counts,
      members=None if members is None else pack_members(members),
      rule=rule,
    )


def sorted_edges(key: jax.Array, end: int) -> jax.Array:
  """A stable argsort of int32 [..., E] in [0, end], int32 [..., E]."""
  edges = key.shape[-1]
  if (end + 1) * edges >= 2**31:
    return jnp.argsort(key, axis=-1, stable=True)
  # Key and place in one number sort and compile faster than side by side.
  packed = key * edges + jnp.arange(edges, dtype=jnp.int32)
  return jnp.sort(packed, axis=-1) % edges


def _bits(mask):
  """Membership as bool [..., C, block_q], where there is none as well."""
  if mask.members is not None:
    bits = unpack_members(mask.members, mask.capacity)
    return bits & mask.listed[..., None]
  shape = (*mask.indices.shape, mask.block_q)
  return jnp.broadcast_to(mask.listed[..., None], shape)


def _check_pair(sign, left, right):
  _require(
    isinstance(right, BlockMask),
    f"{sign} of a BlockMask and a {type(right).__name__}; both must be "
    "BlockMasks (from_blocks makes one of a dense table).",
  )
  for name in ("block_q", "block_kv", "kv_blocks"):
    ours, theirs = getattr(left, name), getattr(right, name)
    _require(
      ours == theirs,
      f"{sign} of masks with {name} {ours} and {theirs}; they must be equal.",
    )
  nq = (left.counts.shape[-1], right.counts.shape[-1])
  _require(nq[0] == nq[1], f"{sign} of masks with {nq} query blocks.")
  _require(
    left.level is None and right.level is None,
    f"{sign} of masks with level is not defined.",
  )


def _share_lists(*masks):
  """The masks with leading dimensions broadcast against each other."""
  leads = [m.counts.shape[:2] for m in masks]
  for name, sizes in zip(("batch", "heads"), zip(*leads), strict=True):
    _require(
      len({*sizes} - {1}) < 2,
      f"masks with {name} {sizes}; they must be equal, or one of them 1.",
    )
  lead = jnp.broadcast_shapes(*leads)

  def spread(x):
    return None if x is None else jnp.broadcast_to(x, (*lead, *x.shape[2:]))

  return [
    m._replace(
      **{
        name: spread(getattr(m, name)) for name in m._ARRAYS if name != "edges"
      }
    )
    for m in masks
  ]


def _canonical(indices, valid, kv_blocks, members, level):
  """Sorted, distinct lists; members are joined over repetitions.

  Args:
    indices: int32 [..., C].
    valid: bool [..., C], the entries that count.
    kv_blocks: entries outside [0, kv_blocks) are dropped.
    members: None or bool [..., C, block_q].
    level: None or int32 [..., C]; of a repeated block the first one's holds.

  Returns:
    indices, counts, members, level.
  """
  valid &= (indices >= 0) & (indices < kv_blocks)
  key = jnp.where(valid, indices, kv_blocks)
  if members is not None:
    same = (key[..., :, None] == key[..., None, :]) & valid[..., None]
    members = _joined(same, members)
  if members is None and level is None:
    key = jnp.sort(key, axis=-1)
    key = jnp.sort(_without_repetition(key, kv_blocks), axis=-1)
  else:
    for _ in range(2):  # the second brings what was repeated to the end
      order = jnp.argsort(key, axis=-1, stable=True)
      key = jnp.take_along_axis(key, order, -1)
      key = _without_repetition(key, kv_blocks)
      if members is not None:
        members = jnp.take_along_axis(members, order[..., None], -2)
      if level is not None:
        level = jnp.take_along_axis(level, order, -1)
  listed = key < kv_blocks
  if members is not None:
    members &= listed[..., None]
  if level is not None:
    level = jnp.where(listed, level, 0)
  counts = listed.sum(-1, dtype=jnp.int32)
  return jnp.where(listed, key, 0), counts, members, level


def _joined(same, bits):
  """bool [..., C, block_q]: whether any slot that is the same has the bit.

  Args:
    same: bool [..., C, D].
    bits: bool [..., D, block_q].
  """
  same, bits = (x.astype(jnp.bfloat16) for x in (same, bits))
  count = jnp.einsum(
    "...cd,...dr->...cr", same, bits, preferred_element_type=jnp.float32
  )
  return count > 0


def _unions(chosen, kv_blocks, slots):
  """The blocks that the queries of each tile list together, and who lists them.

  Args:
    chosen: int32 [B, H, nq, block_q, K], ascending; kv_blocks for none.
    kv_blocks: how many key blocks there are.
    slots: of a tile's list.

  Returns:
    The lists [B, H, nq, slots], their counts, and members.
  """
  b, h, nq, block_q, _ = chosen.shape
  # A table has a row for every tile. Its entries are counted through, which
  # makes one number of each choice and not two.
  tile = jnp.arange(b * h * nq, dtype=jnp.int32).reshape(b, h, nq)
  table = (b, h, nq, kv_blocks + 1)
  entry = tile[..., None, None] * table[-1] + chosen
  votes = jnp.zeros(math.prod(table), jnp.int32).at[entry].add(1)
  votes = votes.reshape(table)[..., :kv_blocks]
  counts = (votes > 0).sum(-1, dtype=jnp.int32)
  _, listed = jax.lax.top_k(votes, slots)
  listed = jnp.where(jnp.arange(slots) < counts[..., None], listed, kv_blocks)
  listed = jnp.sort(listed, axis=-1)
  words = -(-slots // MEMBER_BITS)
  slot_of = jnp.full(table, slots, jnp.int32)
  slot_of = jnp.put_along_axis(
    slot_of, listed, jnp.arange(slots, dtype=jnp.int32), -1, inplace=False
  )
  slot = slot_of.at[..., kv_blocks].set(slots).reshape(-1)[entry]
  # Each query chose a block once, so that adding its bits joins them.
  word = tile[..., None, None] * words + slot // MEMBER_BITS
  word = word * block_q + jnp.arange(block_q, dtype=jnp.int32)[:, None]
  bit = jnp.uint32(1) << (slot % MEMBER_BITS).astype(jnp.uint32)
  members = jnp.zeros((b, h, nq, words, block_q), jnp.uint32)
  flat = members.reshape(-1).at[word].add(jnp.where(slot < slots, bit, 0))
  listed = jnp.where(listed < kv_blocks, listed, 0)
  return listed, counts, flat.reshape(members.shape)


def _without_repetition(key, nothing):
  # Written to a new array: XLA on CPU may update key in place and then
  # compare with what it has written.
  repeated = key[..., 1:] == key[..., :-1]
  repeated = jnp.pad(repeated, [(0, 0)] * (key.ndim - 1) + [(1, 0)])
  return jnp.where(repeated, nothing, key)


@functools.partial(jnp.vectorize, signature="(t),(c)->(t)")
def _among(x, ascending):
  """Which entries of x are among the others."""
  if not ascending.size:
    return jnp.zeros_like(x, dtype=bool)
  at = jnp.searchsorted(ascending, x)
  return ascending[jnp.minimum(at, ascending.size - 1)] == x


def _canonical_columns(columns, indices, counts, block_kv, kv_blocks):
  """Ascending, distinct, outside the listed blocks; then -1."""
  end = kv_blocks * block_kv
  listed = jnp.arange(indices.shape[-1]) < counts[..., None]
  blocks = jnp.where(listed, indices, kv_blocks)
  inside = _among(columns // block_kv, blocks)
  valid = (columns >= 0) & (columns < end) & ~inside
  key = jnp.sort(jnp.where(valid, columns, end), axis=-1)
  key = jnp.sort(_without_repetition(key, end), axis=-1)
  return jnp.where(key < end, key, -1)
