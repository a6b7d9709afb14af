"""BlockMask from and to the formats that other libraries have.

  format                     | from              | to
  ---------------------------|-------------------|------------------
  bool [B, H, S, T]          | `from_dense`      | `to_dense`
  FlexAttention's lists      | `from_flex`       | `to_flex`
  splash attention, MaskInfo | `from_splash`     |
  NSA, blocks of each query  | `from_nsa`        | `to_nsa`
  MInference, lines          | `from_minference` | `to_minference`
  BSR, indptr and indices    | `from_bsr`        | `to_bsr`
  cuDNN BSA                  | `from_cudnn`      | `to_cudnn`
  FlashMoBA, rows by block   |                   | `to_flash_moba`

Every function is pure. Those whose shapes do not depend on values also run
under `jit`; there, what cannot be seen cannot be checked, and each docstring
says what happens instead. Where a format has no word for something that a mask
has (members, columns, level, a rule), the function raises or its docstring says
what to give beside the lists.

A `capacity` is the slots of a list, as in `BlockMask.from_blocks`: by default
what the fullest list needs, or under `jit` what any list may need. Concrete
lists that need more raise, traced ones show in `mask.dropped`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import block_mask
from pallas_kernels import rules
from pallas_kernels.block_mask import BlockMask

CAUSAL = rules.Causal()
_TILES = 256  # on which a rule is evaluated at a time


class FlexLists(NamedTuple):
  """The four arrays of FlexAttention's BlockMask, int32.

  Attributes:
    kv_num_blocks: [B | 1, H | 1, nq]: blocks on which mask_mod is evaluated.
    kv_indices: [B | 1, H | 1, nq, nk]: which; slots past the number hold 0.
    full_kv_num_blocks: [B | 1, H | 1, nq]: blocks that are read whole.
    full_kv_indices: [B | 1, H | 1, nq, nk].
  """

  kv_num_blocks: jax.Array
  kv_indices: jax.Array
  full_kv_num_blocks: jax.Array
  full_kv_indices: jax.Array


def _require(condition, message):
  if not condition:
    raise ValueError(message)


def _is_concrete(*arrays):
  return not any(isinstance(x, jax.core.Tracer) for x in arrays)


def _integers(name, value, *dims):
  """An int32 array of as many dimensions as `dims` names."""
  value = jnp.asarray(value)
  _require(
    value.ndim == len(dims) and jnp.issubdtype(value.dtype, jnp.integer),
    f"{name} is {value.dtype}{list(value.shape)}; it must hold integers, "
    f"[{', '.join(dims)}].",
  )
  return value.astype(jnp.int32)


def _positions(name, value, length):
  """int32 [B | 1, length]; None is arange."""
  value = jnp.arange(length) if value is None else jnp.asarray(value)
  _require(
    value.ndim in (1, 2)
    and value.shape[-1] == length
    and jnp.issubdtype(value.dtype, jnp.integer),
    f"{name} is {value.dtype}{list(value.shape)}; it must hold integers, "
    f"[{length}] or [batch, {length}].",
  )
  return jnp.atleast_2d(value.astype(jnp.int32))


def _check_lengths(mask, **lengths):
  """q_len and kv_len must make the blocks that the mask has."""
  sizes = dict(
    q_len=(mask.block_q, mask.counts.shape[-1]),
    kv_len=(mask.block_kv, mask.kv_blocks),
  )
  for name, length in lengths.items():
    block, blocks = sizes[name]
    _require(
      -(-length // block) == blocks,
      f"{name} is {length}; the mask has {blocks} blocks of {block}, so it "
      f"must be from {max((blocks - 1) * block + 1, 0)} to {blocks * block}.",
    )


def _refuse(target, mask, *names, causal=None):
  """Raises for what a format cannot say.

  Args:
    target: the name of the format.
    mask: a BlockMask.
    names: the fields that must be None.
    causal: None takes any rule, "always" only the causal one, "maybe" the
      causal one or none.
  """
  _require(
    isinstance(mask, BlockMask),
    f"mask is a {type(mask).__name__}; it must be a BlockMask.",
  )
  for name in names:
    _require(
      getattr(mask, name) is None,
      f"mask has {name}, for which {target} has no word; convert a mask "
      "without.",
    )
  takes = {None: (mask.rule,), "always": (CAUSAL,), "maybe": (CAUSAL, None)}
  _require(
    mask.rule in takes[causal],
    f"mask has the rule {mask.rule}; {target} takes {takes[causal]}.",
  )


def _numpy(function, mask):
  _require(
    _is_concrete(*jax.tree.leaves(mask)),
    f"{function} makes arrays whose size depends on the mask, so it takes a "
    "concrete one; call it outside of jit.",
  )
  return jax.tree.map(np.asarray, mask)


def _used(mask):
  """int32 [..., nq]: slots in use, without those that were dropped."""
  return jnp.minimum(mask.counts, mask.capacity)


def _table(indices, valid, kv_blocks):
  """Lists [..., C] as bool [..., kv_blocks]; others than these are ignored."""
  valid = valid & (indices >= 0) & (indices < kv_blocks)
  table = jnp.zeros((*indices.shape[:-1], kv_blocks + 1), bool)
  where = jnp.where(valid, indices, kv_blocks)
  table = jnp.put_along_axis(table, where, True, axis=-1, inplace=False)
  return table[..., :kv_blocks]


def _lists(table):
  """bool [..., nk] as counts [...] and ascending lists [..., nk], then 0."""
  counts = table.sum(-1, dtype=jnp.int32)
  order = jnp.argsort(~table, axis=-1, stable=True)
  used = jnp.arange(table.shape[-1]) < counts[..., None]
  return counts, jnp.where(used, order, 0).astype(jnp.int32)


def _rows(mask):
  """bool [B | 1, H | 1, nq, block_q, nk]: which query reads which block."""
  b, h, nq, capacity = mask.indices.shape
  if mask.members is None:
    blocks = mask.blocks()[:, :, :, None]
    return jnp.broadcast_to(blocks, (b, h, nq, mask.block_q, mask.kv_blocks))
  bits = block_mask.unpack_members(mask.members, capacity)
  bits = jnp.swapaxes(bits & mask.listed[..., None], -1, -2)
  where = jnp.broadcast_to(mask.indices[..., None, :], bits.shape)
  return _table(where, bits, mask.kv_blocks)


def _bounds(positions, block):
  """The extreme positions of each block, int32 [B | 1, blocks]."""
  pad = ((0, 0), (0, -positions.shape[-1] % block))
  blocks = jnp.pad(positions, pad, mode="edge" if positions.size else "empty")
  blocks = blocks.reshape(len(positions), blocks.shape[-1] // block, block)
  return blocks.min(-1), blocks.max(-1)


def _classes(rule, q_positions, kv_positions, block_q, block_kv):
  """rules.SKIP, PARTIAL or WHOLE, int32 [B | 1, nq, nk]."""
  q_low, q_high = (x[:, :, None] for x in _bounds(q_positions, block_q))
  k_low, k_high = (x[:, None] for x in _bounds(kv_positions, block_kv))
  if rule is None:
    shape = jnp.broadcast_shapes(q_low.shape, k_low.shape)
    return jnp.full(shape, rules.WHOLE)
  found = rules.classify(rule, q_low, q_high, k_low, k_high)
  return jnp.broadcast_to(found, jnp.broadcast_shapes(q_low.shape, k_low.shape))


def _check_full(rule, full, block_q, block_kv):
  """Raises where the rule cuts a block that is to be read whole.

  `full` is bool [..., nq, nk], and positions are indices. The rule is evaluated
  only on blocks that it does not classify.
  """
  if rule is None or not _is_concrete(full):
    return
  full = np.asarray(full).reshape(-1, *full.shape[-2:]).any(0)
  nq, nk = full.shape
  classes = _classes(
    rule,
    jnp.arange(nq * block_q)[None],
    jnp.arange(nk * block_kv)[None],
    block_q,
    block_kv,
  )
  unsure = np.argwhere(full & (np.asarray(classes[0]) != rules.WHOLE))
  for at in range(0, len(unsure), _TILES):
    i, j = unsure[at : at + _TILES].T
    q_at = (i[:, None] * block_q + np.arange(block_q))[:, :, None]
    k_at = (j[:, None] * block_kv + np.arange(block_kv))[:, None]
    ok = jnp.broadcast_to(rule(q_at, k_at), (len(i), block_q, block_kv))
    whole = np.asarray(ok.all((1, 2)))
    _require(
      whole.all(),
      f"the rule {rule} cuts key block {j[~whole][:1]} of query block "
      f"{i[~whole][:1]}, which is listed as full; a BlockMask has one rule for "
      "all its blocks.",
    )


def from_dense(
  dense,
  block_q,
  block_kv,
  *,
  rule=None,
  q_positions=None,
  kv_positions=None,
  capacity=None,
) -> BlockMask:
  """The mask of a table of tokens: lists each block with a true entry.

  A block is read by whole rows: a query reads all of its keys that the rule
  allows, or, by its bit in `members`, none. Members are made where some row
  needs them (under `jit` always). What is cut otherwise than by the rule, such
  as every third key, is not representable.

  Args:
    dense: bool [B | 1, H | 1, S, T], true where a query reads a key.
    block_q: queries of a block.
    block_kv: keys of a block.
    rule: a rule that `dense` obeys already, such as Causal() for a causal
      table: rows that it alone cuts count as whole. It becomes the mask's.
    q_positions: int32 [S] or [B, S], what the rule sees; default arange(S).
    kv_positions: int32 [T] or [B, T]; default arange(T).
    capacity: slots of a list.

  Returns:
    A BlockMask that reads exactly the true entries. Of a traced table that is
    not representable, a row with a true entry in a block reads all of that
    block that the rule allows.

  Raises:
    ValueError: for a table that is not bool of four dimensions; and for a
      concrete one that is true where the rule is not, or not representable.

  Example:
    >>> dense = jnp.tril(jnp.ones((1, 1, 40, 40), bool))
    >>> mask = from_dense(dense, 16, 16, rule=pallas_kernels.Causal())
    >>> mask.indices.tolist(), mask.members
    ([[[[0, 0, 0], [0, 1, 0], [0, 1, 2]]]], None)
  """
  dense = jnp.asarray(dense)
  _require(
    dense.dtype == bool and dense.ndim == 4,
    f"dense is {dense.dtype}{list(dense.shape)}; it must be bool [batch or 1, "
    "heads or 1, queries, keys].",
  )
  queries, keys = dense.shape[2:]
  q_at = _positions("q_positions", q_positions, queries)[:, None, :, None]
  k_at = _positions("kv_positions", kv_positions, keys)[:, None, None, :]
  allowed = jnp.ones((), bool) if rule is None else rule(q_at, k_at)
  shape = jnp.broadcast_shapes(dense.shape, allowed.shape)
  dense = jnp.broadcast_to(dense, shape)
  concrete = _is_concrete(dense, allowed)
  if concrete:
    stray = np.argwhere(np.asarray(dense & ~allowed))
    _require(
      not len(stray),
      f"dense is true where the rule {rule} is not, first at {stray[:1]}.",
    )
  pad = [(0, 0)] * 2 + [(0, -queries % block_q), (0, -keys % block_kv)]

  def some(x):  # bool [b, h, nq, block_q, nk]
    x = jnp.pad(x, pad)
    nq, nk = x.shape[2] // block_q, x.shape[3] // block_kv
    return x.reshape(*shape[:2], nq, block_q, nk, block_kv).any(-1)

  read, missing = some(dense & allowed), some(allowed & ~dense)
  if concrete:
    torn = np.argwhere(np.asarray(read & missing))
    _require(
      not len(torn),
      "dense reads a part of some key blocks that is no rule's: a query reads "
      "all that the rule allows of a block, or nothing. The first are, as "
      f"[batch, head, query block, query, key block], {torn[:3].tolist()}.",
    )
  blocks = read.any(-2)
  mask = BlockMask.from_blocks(
    blocks, block_q=block_q, block_kv=block_kv, capacity=capacity, rule=rule
  )
  if concrete and not (blocks[..., None, :] & missing & ~read).any():
    return mask
  where = jnp.minimum(mask.indices, max(mask.kv_blocks - 1, 0))[..., None, :]
  bits = jnp.take_along_axis(read, where, axis=-1)
  bits = jnp.swapaxes(bits, -1, -2) & mask.listed[..., None]
  return mask._replace(members=block_mask.pack_members(bits))


def to_dense(
  mask, q_len, kv_len, *, q_positions=None, kv_positions=None
) -> jax.Array:
  """The table of tokens: which query reads which key.

  Args:
    mask: a BlockMask without level.
    q_len: queries, S.
    kv_len: keys, T.
    q_positions: int32 [S] or [B, S], what the rule sees; default arange(S).
    kv_positions: int32 [T] or [B, T]; default arange(T).

  Returns:
    bool [B | 1, H | 1, S, T]; the batch is that of the mask or the positions.

  Raises:
    ValueError: for lengths that do not make the mask's blocks, or a mask with
      level: a mean of keys is no key.

  Example:
    >>> mask = pallas_kernels.BlockMask(
    ...   [[[[1]]]], block_q=16, block_kv=16, kv_blocks=2, columns=[[[[3]]]]
    ... )
    >>> dense = to_dense(mask, 5, 18)
    >>> dense.shape, jnp.flatnonzero(dense[0, 0, 0]).tolist()
    ((1, 1, 5, 18), [3, 16, 17])
  """
  _refuse("a table of tokens", mask, "level")
  _check_lengths(mask, q_len=q_len, kv_len=kv_len)
  b, h, nq = mask.counts.shape
  shape = (b, h, nq * mask.block_q, mask.kv_blocks)
  rows = _rows(mask).reshape(shape)[:, :, :q_len]
  dense = jnp.repeat(rows, mask.block_kv, axis=-1)[..., :kv_len]
  if mask.columns is not None:
    single = _table(mask.columns, True, kv_len)
    dense |= jnp.repeat(single, mask.block_q, axis=2)[:, :, :q_len]
  if mask.rule is not None:
    q_at = _positions("q_positions", q_positions, q_len)[:, None, :, None]
    k_at = _positions("kv_positions", kv_positions, kv_len)[:, None, None, :]
    dense &= mask.rule(q_at, k_at)
  return dense


def from_flex(
  kv_num_blocks,
  kv_indices,
  full_kv_num_blocks=None,
  full_kv_indices=None,
  *,
  block_q,
  block_kv,
  kv_blocks=None,
  rule=None,
  capacity=None,
) -> BlockMask:
  """The mask of FlexAttention's lists.

  Args:
    kv_num_blocks: int32 [B | 1, H | 1, nq]: partial blocks, on which
      FlexAttention evaluates its mask_mod.
    kv_indices: int32 [B | 1, H | 1, nq, nk]: which; what is past the number is
      ignored.
    full_kv_num_blocks: None, or as `kv_num_blocks`: blocks read whole.
    full_kv_indices: None, or as `kv_indices`.
    block_q: queries of a block, the first of BLOCK_SIZE.
    block_kv: keys of a block.
    kv_blocks: how many key blocks there are; default the last dimension of
      `kv_indices`.
    rule: mask_mod as a rule of positions; None where there is none.
    capacity: slots of a list.

  Returns:
    A BlockMask that lists partial and full blocks.

  Raises:
    ValueError: for arrays that do not fit each other; and, where they are
      concrete, for a full block that the rule cuts, which FlexAttention would
      read whole: a BlockMask has one rule for all its blocks. Under `jit` the
      rule cuts it.

  Example:
    >>> mask = from_flex(
    ...   [[[1, 1]]],
    ...   [[[[0, 0], [1, 0]]]],
    ...   [[[0, 1]]],
    ...   [[[[0, 0], [0, 0]]]],
    ...   block_q=128,
    ...   block_kv=128,
    ...   rule=pallas_kernels.Causal(),
    ... )
    >>> mask.indices.tolist(), mask.counts.tolist()
    ([[[[0, 0], [0, 1]]]], [[[1, 2]]])
  """
  _require(
    (full_kv_num_blocks is None) == (full_kv_indices is None),
    "full_kv_num_blocks and full_kv_indices must be given together.",
  )

  def table(prefix, counts, indices):
    nonlocal kv_blocks
    dims = ("batch", "heads", "query blocks")
    counts = _integers(f"{prefix}kv_num_blocks", counts, *dims)
    indices = _integers(f"{prefix}kv_indices", indices, *dims, "key blocks")
    _require(
      indices.shape[:3] == counts.shape,
      f"{prefix}kv_indices has shape {indices.shape}; with "
      f"{prefix}kv_num_blocks {counts.shape} it must begin with it.",
    )
    kv_blocks = indices.shape[-1] if kv_blocks is None else kv_blocks
    valid = jnp.arange(indices.shape[-1]) < counts[..., None]
    return _table(indices, valid, kv_blocks)

  blocks = table("", kv_num_blocks, kv_indices)
  if full_kv_indices is not None:
    full = table("full_", full_kv_num_blocks, full_kv_indices)
    _check_full(rule, full, block_q, block_kv)
    blocks |= full
  return BlockMask.from_blocks(
    blocks, block_q=block_q, block_kv=block_kv, capacity=capacity, rule=rule
  )


def to_flex(
  mask, q_len, kv_len, *, q_positions=None, kv_positions=None
) -> FlexLists:
  """FlexAttention's lists: partial blocks, and those that are read whole.

  The mask_mod to go with them says what the rule says, of positions. Blocks
  that hold the end of the queries or keys are partial, as FlexAttention has
  them; listed blocks that the rule cuts whole are left out.

  Args:
    mask: a BlockMask without members, columns and level.
    q_len: queries, S.
    kv_len: keys, T.
    q_positions: int32 [S] or [B, S], what the rule sees; default arange(S).
    kv_positions: int32 [T] or [B, T]; default arange(T).

  Returns:
    FlexLists.

  Raises:
    ValueError: for lengths that do not make the mask's blocks, or a mask with
      members, columns or level.

  Example:
    >>> mask = pallas_kernels.BlockMask.from_blocks(
    ...   jnp.ones((2, 2), bool),
    ...   block_q=64,
    ...   block_kv=64,
    ...   rule=pallas_kernels.Causal(),
    ... )
    >>> lists = to_flex(mask, 128, 128)
    >>> lists.kv_num_blocks.tolist(), lists.full_kv_num_blocks.tolist()
    ([[[1, 1]]], [[[0, 1]]])
  """
  _refuse("FlexAttention", mask, "members", "columns", "level")
  _check_lengths(mask, q_len=q_len, kv_len=kv_len)
  classes = _classes(
    mask.rule,
    _positions("q_positions", q_positions, q_len),
    _positions("kv_positions", kv_positions, kv_len),
    mask.block_q,
    mask.block_kv,
  )
  inside = (jnp.arange(classes.shape[1]) < q_len // mask.block_q)[:, None]
  inside &= jnp.arange(classes.shape[2]) < kv_len // mask.block_kv
  blocks, classes = mask.blocks(), classes[:, None]
  full = blocks & (classes == rules.WHOLE) & inside
  partial = blocks & (classes != rules.SKIP) & ~full
  return FlexLists(*_lists(partial), *_lists(full))


def from_splash(
  data_next, block_mask, *, block_q, block_kv, kv_blocks, rule=None
) -> BlockMask:
  """The mask of splash attention's MaskInfo, of its forward kernel.

  Args:
    data_next: integers [H | 1, nq, steps], concrete: the key block of a step,
      where the step is run. A shrunk grid has fewer steps than key blocks.
    block_mask: integers of this shape: 0 is not run, 1 is partial, 2 is full.
    block_q: queries of a block.
    block_kv: keys of a block.
    kv_blocks: how many key blocks there are.
    rule: the rule that the partial blocks obey, in place of
      `partial_mask_blocks`, for which a BlockMask has no place; a table of
      tokens that is no rule goes through `from_dense`.

  Returns:
    A BlockMask of the leading dimensions [1, H | 1].

  Raises:
    ValueError: for arrays that do not fit each other, partial blocks without a
      rule, or a full block that the rule cuts.

  Example:
    >>> mask = from_splash(
    ...   [[[0, 0], [0, 1]]],
    ...   [[[1, 0], [2, 1]]],
    ...   block_q=128,
    ...   block_kv=128,
    ...   kv_blocks=2,
    ...   rule=pallas_kernels.Causal(),
    ... )
    >>> mask.counts.tolist()
    [[[1, 2]]]
  """
  dims = ("heads", "query blocks", "steps")
  data_next = _integers("data_next", data_next, *dims)
  kinds = _integers("block_mask", block_mask, *dims)
  _require(
    data_next.shape == kinds.shape,
    f"data_next has shape {data_next.shape} and block_mask {kinds.shape}; "
    "they must be equal.",
  )
  _require(
    rule is not None or not (kinds == 1).any(),
    "block_mask has partial blocks; give the rule that they obey.",
  )
  _check_full(rule, _table(data_next, kinds == 2, kv_blocks), block_q, block_kv)
  return BlockMask.from_blocks(
    _table(data_next, kinds > 0, kv_blocks),
    block_q=block_q,
    block_kv=block_kv,
    rule=rule,
  )


def from_nsa(
  block_indices,
  block_counts=None,
  *,
  block_q,
  block_kv,
  kv_len=None,
  group=1,
  rule=CAUSAL,
  capacity=None,
) -> BlockMask:
  """The mask of native sparse attention's blocks of each query and key head.

  Args:
    block_indices: int32 [B | 1, S, Hkv, K]: key blocks of each query. Those
      outside of the keys, such as -1 or S, are padding.
    block_counts: how many of them count: an int, int32 [B | 1, S, Hkv], or None
      for all.
    block_q: queries of a tile; their union is listed, and `members` keeps who
      chose what.
    block_kv: keys of a block, NSA's block_size.
    kv_len: keys, T; default S.
    group: query heads of a key head. They share its lists.
    rule: what is read of a listed block; NSA's own kernels are causal.
    capacity: slots of a tile's list; default what any tile may need,
      min(block_q * K, key blocks). See `BlockMask.from_queries` for less.

  Returns:
    A BlockMask of Hkv * group heads (1 for a single key head), with members.

  Raises:
    ValueError: for arrays that do not fit each other.

  Example:
    >>> chosen = jnp.array([[0, -1]] * 16 + [[0, 1]] * 16)[None, :, None]
    >>> mask = from_nsa(chosen, block_q=32, block_kv=16)
    >>> mask.indices.tolist(), mask.capacity
    ([[[[0, 1]]]], 2)
  """
  dims = ("batch", "queries", "key heads", "blocks of a query")
  indices = _integers("block_indices", block_indices, *dims)
  queries, width = indices.shape[1], indices.shape[3]
  if block_counts is not None:
    if jnp.ndim(block_counts) == 0:
      block_counts = jnp.full(indices.shape[:3], block_counts)
    block_counts = _integers("block_counts", block_counts, *dims[:3])
    block_counts = jnp.swapaxes(block_counts, 1, 2)
  kv_blocks = -(-(queries if kv_len is None else kv_len) // block_kv)
  if capacity is None:
    capacity = max(min(block_q * width, kv_blocks), 1)
  mask = BlockMask.from_queries(
    jnp.swapaxes(indices, 1, 2),
    block_counts,
    block_q=block_q,
    block_kv=block_kv,
    kv_blocks=kv_blocks,
    capacity=capacity,
    rule=rule,
  )
  if indices.shape[2] == 1:
    return mask

  def repeat(x):  # as jnp.repeat, which asks for shardings that are types
    b, h, *rest = x.shape
    x = jnp.broadcast_to(x[:, :, None], (b, h, group, *rest))
    return x.reshape(b, h * group, *rest)

  repeated = jax.tree.map(repeat, mask)
  # Which heads share a list is known there.
  return repeated._replace(by_query=mask.by_query)


def to_nsa(mask, q_len, *, group=1) -> jax.Array:
  """Native sparse attention's blocks of each query and key head.

  Args:
    mask: a causal BlockMask without columns and level.
    q_len: queries, S.
    group: query heads of a key head, which must have equal lists.

  Returns:
    int32 [B | 1, S, H // group | 1, C]: ascending, then -1.

  Raises:
    ValueError: for another rule, columns or level; for heads that are no
      multiple of the group; and, where the mask is concrete, for lists that
      differ in a group. Under `jit` those of its first head are taken.

  Example:
    >>> mask = pallas_kernels.BlockMask(
    ...   [[[[0, 0], [1, 0]]]],
    ...   [[[1, 2]]],
    ...   block_q=1,
    ...   block_kv=16,
    ...   kv_blocks=2,
    ...   rule=pallas_kernels.Causal(),
    ... )
    >>> to_nsa(mask, 2).tolist()
    [[[[0, -1]], [[0, 1]]]]
  """
  _refuse("NSA", mask, "columns", "level", causal="always")
  _check_lengths(mask, q_len=q_len)
  b, h, nq, capacity = mask.indices.shape
  _require(
    h == 1 or h % group == 0,
    f"group is {group}; it must divide the {h} heads of the mask.",
  )
  bits = mask.listed[..., None, :]
  if mask.members is not None:
    members = block_mask.unpack_members(mask.members, capacity)
    bits &= jnp.swapaxes(members, -1, -2)
  indices = jnp.where(bits, mask.indices[..., None, :], mask.kv_blocks)
  shape = (b, h, nq, mask.block_q, capacity)
  indices = jnp.broadcast_to(jnp.sort(indices, axis=-1), shape)
  indices = indices.reshape(b, h, nq * mask.block_q, capacity)[:, :, :q_len]
  indices = jnp.where(indices < mask.kv_blocks, indices, -1)
  if h > 1:
    grouped = indices.reshape(b, h // group, group, q_len, capacity)
    indices = grouped[:, :, 0]
    if _is_concrete(grouped):
      _require(
        (grouped == indices[:, :, None]).all(),
        f"the {group} heads of a group list different blocks; NSA has lists of "
        "key heads.",
      )
  return jnp.swapaxes(indices, 1, 2)


def from_minference(
  v_idx,
  s_idx,
  *,
  q_len,
  kv_len=None,
  block_q=64,
  block_kv=64,
  rule=CAUSAL,
  capacity=None,
) -> BlockMask:
  """The mask of MInference's vertical and slash lines.

  Each slash lists the key blocks that it passes in a query block; verticals
  become `columns`. Here blocks begin at multiples of `block_kv`. MInference's
  own kernel begins them where the lines do, and so reads other neighbors of
  a slash; both read all of the lines.

  Args:
    v_idx: int32 [B | 1, H | 1, V]: keys that every query reads. Those outside
      of the keys, such as -1, are padding.
    s_idx: int32 [B | 1, H | 1, L]: diagonals: a query at p reads the key p - s.
      Negative ones are padding.
    q_len: queries, S.
    kv_len: keys, T; default S.
    block_q: queries of a block.
    block_kv: keys of a block.
    rule: what may be read; MInference is causal.
    capacity: slots of a list, without columns.

  Returns:
    A BlockMask with columns, [B | 1, H | 1, nq, V].

  Raises:
    ValueError: for arrays that are no integers or have other dimensions.

  Example:
    >>> mask = from_minference(
    ...   [[[3]]], [[[0]]], q_len=48, block_q=16, block_kv=16
    ... )
    >>> mask.indices.tolist(), mask.columns.tolist()
    ([[[[0], [1], [2]]]], [[[[-1], [3], [3]]]])
  """
  kv_len = q_len if kv_len is None else kv_len
  v_idx = _integers("v_idx", v_idx, "batch", "heads", "lines")
  s_idx = _integers("s_idx", s_idx, "batch", "heads", "lines")
  lead = jnp.broadcast_shapes(v_idx.shape[:2], s_idx.shape[:2])
  nq, nk = -(-q_len // block_q), -(-kv_len // block_kv)
  first = jnp.arange(nq, dtype=jnp.int32)[:, None] * block_q
  last = jnp.minimum(first + block_q, q_len) - 1
  # Of a slash, the first and last key that the query block reads on it.
  slash = s_idx[:, :, None]
  low = jnp.maximum(first - slash, 0)
  high = jnp.minimum(last - slash, kv_len - 1)
  passed = (block_q + block_kv - 2) // block_kv + 1
  block = low[..., None] // block_kv + jnp.arange(passed, dtype=jnp.int32)
  valid = (slash >= 0) & (low <= high)
  valid = valid[..., None] & (block <= high[..., None] // block_kv)
  shape = (*block.shape[:3], -1)
  table = _table(block.reshape(shape), valid.reshape(shape), nk)
  mask = BlockMask.from_blocks(
    jnp.broadcast_to(table, (*lead, nq, nk)),
    block_q=block_q,
    block_kv=block_kv,
    capacity=capacity,
    rule=rule,
  )
  columns = jnp.broadcast_to(v_idx[:, :, None], (*lead, nq, v_idx.shape[-1]))
  columns = jnp.where(columns < kv_len, columns, -1)
  if rule is not None:  # query blocks that may not read a column do without
    found = rules.classify(rule, first, last, columns, columns)
    columns = jnp.where(found == rules.SKIP, -1, columns)
  with_columns = BlockMask(
    mask.indices,
    mask.counts,
    block_q=block_q,
    block_kv=block_kv,
    kv_blocks=nk,
    rule=rule,
    columns=columns,
  )
  return with_columns._replace(counts=mask.counts)


class MInferenceLists(NamedTuple):
  """What MInference's sparse kernel reads, int32.

  Attributes:
    block_count: [B | 1, H | 1, nq]: how many key blocks.
    block_offset: [B | 1, H | 1, nq, C]: the first key of each; then 0.
    column_count: [B | 1, H | 1, nq]: how many single keys.
    column_index: [B | 1, H | 1, nq, Ct]: which; then 0.
  """

  block_count: jax.Array
  block_offset: jax.Array
  column_count: jax.Array
  column_index: jax.Array


def to_minference(mask) -> MInferenceLists:
  """MInference's lists of key blocks and columns, as its kernel reads them.

  The lines themselves are not found again: blocks need not lie on lines.

  Args:
    mask: a causal BlockMask without members and level.

  Returns:
    MInferenceLists; Ct is 1 for a mask without columns.

  Raises:
    ValueError: for another rule, members or level.

  Example:
    >>> mask = from_minference([[[3]]], [[[0]]], q_len=128)
    >>> to_minference(mask).block_offset.tolist()
    [[[[0], [64]]]]
  """
  _refuse("MInference", mask, "members", "level", causal="always")
  offsets = jnp.where(mask.listed, mask.indices * mask.block_kv, 0)
  columns = mask.columns
  if columns is None:
    columns = jnp.full((*mask.counts.shape, 1), -1, jnp.int32)
  return MInferenceLists(
    _used(mask),
    offsets,
    (columns >= 0).sum(-1, dtype=jnp.int32),
    jnp.maximum(columns, 0),
  )


def from_bsr(
  indptr, indices, *, block_q, block_kv, kv_blocks, rule=None, capacity=None
) -> BlockMask:
  """The mask of a block-sparse matrix in compressed rows.

  The arrays are those of flashinfer's plan and of scipy.sparse.bsr_array, whose
  `data` a mask has not.

  Args:
    indptr: int32 [nq + 1]: row i holds the entries indptr[i] to indptr[i + 1].
    indices: int32 [entries]: key blocks, in any order.
    block_q: queries of a block.
    block_kv: keys of a block.
    kv_blocks: how many key blocks there are.
    rule: which positions of a listed block may be read.
    capacity: slots of a list.

  Returns:
    A BlockMask that all heads share, [1, 1, nq, C].

  Raises:
    ValueError: for arrays that are no integers or have other dimensions.

  Example:
    >>> mask = from_bsr(
    ...   [0, 1, 3], [0, 2, 1], block_q=16, block_kv=16, kv_blocks=3
    ... )
    >>> mask.indices.tolist(), mask.counts.tolist()
    ([[[[0, 0], [1, 2]]]], [[[1, 2]]])
  """
  indptr = _integers("indptr", indptr, "query blocks + 1")
  indices = _integers("indices", indices, "entries")
  _require(len(indptr) > 0, "indptr is empty; it must hold a 0 at least.")
  rows = len(indptr) - 1
  at = jnp.arange(len(indices))
  row = jnp.searchsorted(indptr, at, side="right") - 1
  valid = (row >= 0) & (row < rows) & (indices >= 0) & (indices < kv_blocks)
  table = jnp.zeros((rows + 1, kv_blocks + 1), bool)
  table = table.at[
    jnp.where(valid, row, rows), jnp.where(valid, indices, kv_blocks)
  ].set(True)
  return BlockMask.from_blocks(
    table[:rows, :kv_blocks],
    block_q=block_q,
    block_kv=block_kv,
    capacity=capacity,
    rule=rule,
  )


def to_bsr(mask, *, batch=0, head=0) -> tuple[np.ndarray, np.ndarray]:
  """Compressed rows of the lists of one head.

  The rule is not said: flashinfer takes `causal` beside the lists.

  Args:
    mask: a concrete BlockMask without members, columns and level.
    batch: which batch element; 0 where it is shared.
    head: which head; 0 where it is shared.

  Returns:
    indptr, int32 [nq + 1], and indices, int32 [entries], ascending in a row.

  Raises:
    ValueError: for a traced mask, or one with members, columns or level.

  Example:
    >>> mask = pallas_kernels.BlockMask.from_blocks(
    ...   jnp.tril(jnp.ones((3, 3), bool)), block_q=16, block_kv=16
    ... )
    >>> indptr, indices = to_bsr(mask)
    >>> indptr.tolist(), indices.tolist()
    ([0, 1, 3, 6], [0, 0, 1, 0, 1, 2])
  """
  _refuse("BSR", mask, "members", "columns", "level")
  mask = _numpy("to_bsr", mask)
  listed, indices = np.asarray(mask.listed), mask.indices
  lead = listed.shape[:2]
  _require(
    0 <= batch < lead[0] and 0 <= head < lead[1],
    f"batch is {batch} and head is {head}; the mask has {lead} of them.",
  )
  listed = listed[batch, head]
  indptr = np.r_[0, np.cumsum(listed.sum(-1))].astype(np.int32)
  return indptr, indices[batch, head][listed]


def from_cudnn(
  q2k_block_index,
  q2k_block_nums=None,
  *,
  kv_blocks,
  block_q=128,
  block_kv=128,
) -> BlockMask:
  """The mask of cuDNN's block-sparse attention.

  Args:
    q2k_block_index: int32 [B | 1, H | 1, nq, C]: key blocks.
    q2k_block_nums: int32 [B | 1, H | 1, nq]: how many; default all.
    kv_blocks: how many key blocks there are.
    block_q: queries of a block; cuDNN has 128.
    block_kv: keys of a block.

  Returns:
    A BlockMask of capacity C, without a rule.

  Raises:
    ValueError: for arrays that do not fit each other.

  Example:
    >>> mask = from_cudnn([[[[1, 0]]]], [[[1]]], kv_blocks=2)
    >>> mask.indices.tolist(), mask.counts.tolist()
    ([[[[1, 0]]]], [[[1]]])
  """
  return BlockMask(
    q2k_block_index,
    q2k_block_nums,
    block_q=block_q,
    block_kv=block_kv,
    kv_blocks=kv_blocks,
  )


def to_cudnn(mask) -> tuple[jax.Array, jax.Array]:
  """The lists of cuDNN's block-sparse attention, which reads whole blocks.

  Args:
    mask: a BlockMask without rule, members, columns and level.

  Returns:
    q2k_block_index, int32 [B | 1, H | 1, nq, C], and q2k_block_nums, int32
    [B | 1, H | 1, nq].

  Raises:
    ValueError: for a mask with a rule, members, columns or level.

  Example:
    >>> mask = pallas_kernels.BlockMask.from_blocks(
    ...   jnp.ones((1, 2), bool), block_q=128, block_kv=128
    ... )
    >>> [x.tolist() for x in to_cudnn(mask)]
    [[[[[0, 1]]]], [[[2]]]]
  """
  _refuse("cuDNN", mask, "rule", "members", "columns", "level")
  return mask.indices, _used(mask)


def to_flash_moba(mask, q_len) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """FlashMoBA's compressed columns: of each key block the queries that read it.

  Args:
    mask: a concrete BlockMask without columns and level, causal or without a
      rule: FlashMoBA takes `causal` beside the lists.
    q_len: queries, S.

  Returns:
    col_offsets, int64 [B | 1, H | 1, nk]: where a block's queries begin;
    col_nnz, int32 [B | 1, H | 1, nk]: how many there are; and row_indices,
    int32 [entries]: the queries, those of one block ascending.

  Raises:
    ValueError: for a traced mask, another rule, columns or level, or queries
      that do not make the mask's blocks.

  Example:
    >>> mask = pallas_kernels.BlockMask(
    ...   [[[[0, 1], [1, 0]]]],
    ...   [[[2, 1]]],
    ...   block_q=1,
    ...   block_kv=16,
    ...   kv_blocks=2,
    ... )
    >>> [x.tolist() for x in to_flash_moba(mask, 2)]
    [[[[0, 1]]], [[[1, 2]]], [0, 0, 1]]
  """
  _refuse("FlashMoBA", mask, "columns", "level", causal="maybe")
  _check_lengths(mask, q_len=q_len)
  rows = np.asarray(_rows(_numpy("to_flash_moba", mask)))
  b, h, nq, block_q, nk = rows.shape
  rows = rows.reshape(b, h, nq * block_q, nk)[:, :, :q_len]
  by_key = np.swapaxes(rows, -1, -2)
  counts = by_key.sum(-1)
  ends = np.cumsum(counts).reshape(counts.shape)
  return (
    (ends - counts).astype(np.int64),
    counts.astype(np.int32),
    by_key.nonzero()[-1].astype(np.int32),
  )
