"""Block-sparse attention on TPU in Pallas: forward, dq, and dk with dv.

The lists lie in SMEM, where the index maps of K and V read them. A grid step
takes `fuse` listed blocks at once, each an operand of its own, so that small
blocks fill the MXU as large ones do. Each kernel has two bodies: for steps
whose blocks are all whole, and for the others, which are masked.

Arrays are [batch, sequence, heads * head_dim] in HBM: a head is a column block,
and nothing is transposed there. Row statistics are [..., 1, block_q] in HBM and
[block_q, 128] with equal lanes in VMEM. Exponentials and logarithms are to
base 2: the queries come multiplied by log2(e).
"""

import dataclasses
import functools
import math

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from pallas_kernels import block_mask
from pallas_kernels import partitioning
from pallas_kernels import rules
from pallas_kernels.block_sparse_attention import lists as lists_lib

LANES = 128
ROWS = 16  # the least queries of a tile, two sublanes of bf16
LOG2E = math.log2(math.e)
NEVER = -1e30  # finite: exp2(NEVER - NEVER) is 1, exp2(-inf - NEVER) is 0
FUSED_KEYS = 512
MAX_FUSE = 8
WHOLE = 1 << 8  # a step's code: a bit a block that is run, and these flags
FIRST, LAST = 1 << 9, 1 << 10  # of the steps of one key block, in dk and dv
SMEM = 2**20 - 2**16  # bytes that prefetched lists may take
HEAD_SHIFT = 20  # an edge of dk and dv: query head << 20 | query block
f32 = jnp.float32


def _nt(a, b):  # a @ b.T
  return lax.dot_general(
    a, b, (((1,), (1,)), ((), ())), preferred_element_type=f32
  )


def _nn(a, b):
  return jnp.dot(a, b, preferred_element_type=f32)


def _wide(x, n):
  """[rows, 128] with equal lanes -> [rows, n]."""
  return x if n == LANES else jnp.tile(x, (1, n // LANES))


def _fold(x):
  """Sums lane groups, [rows, n] -> [rows, 128], with no work across lanes."""
  groups = [x[:, i : i + LANES] for i in range(0, x.shape[1], LANES)]
  return functools.reduce(jnp.add, groups)


def _column(row):
  """[1, rows] -> [rows, 128] with equal lanes."""
  return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def _stack(refs, axis=0):
  blocks = [r[...] for r in refs]
  return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis)


def _lay(values, width):
  """Scalars -> [1, len * width], each repeated `width` times along lanes."""
  shape = (1, len(values) * width)
  run = lax.broadcasted_iota(jnp.int32, shape, 1) // width
  laid = jnp.full(shape, values[-1], jnp.int32)
  for r, value in enumerate(values[:-1]):
    laid = jnp.where(run == r, value, laid)
  return laid


@dataclasses.dataclass(frozen=True)
class _Shape:
  """Static sizes of a call."""

  batch: int
  heads: int
  kv_heads: int
  dim: int
  nq: int
  nk: int
  slots: int
  block_q: int
  block_kv: int
  fuse: int
  list_batch: int  # 1 or batch
  list_heads: int  # 1 or heads

  @property
  def group(self):
    return self.heads // self.kv_heads

  @property
  def list_kv_heads(self):
    return self.kv_heads if self.list_heads > 1 else 1

  @property
  def steps(self):
    return -(-self.slots // self.fuse)

  @property
  def width(self):
    return self.fuse * self.block_kv

  def cost(self, products, block, dtype, settings):
    """What XLA is told of a kernel, which cannot know how many are listed.

    As if every list were full: flops and transcendentals, and the bytes of two
    blocks of `block` rows for each pair.
    """
    pairs = self.batch * self.heads * self.nq * self.slots
    logits = pairs * self.block_q * self.block_kv
    of_each = 1 if settings.softcap is None else 2
    rows = pairs * block * self.dim * jnp.dtype(dtype).itemsize
    return products * 2 * self.dim * logits, of_each * logits, 2 * rows

  @classmethod
  def of(cls, q, k, lists, settings):
    b, s, h, d = q.shape
    list_b, list_h, nq, slots = lists.classes.shape
    fuse = _fused(settings, settings.block_kv)
    least = max(LANES // settings.block_kv, 1)
    while fuse > least and fuse >= 2 * slots:
      fuse //= 2
    return cls(
      batch=b,
      heads=h,
      kv_heads=k.shape[2],
      dim=d,
      nq=nq,
      nk=k.shape[1] // settings.block_kv,
      slots=slots,
      block_q=s // nq if nq else settings.block_q,
      block_kv=settings.block_kv,
      fuse=fuse,
      list_batch=list_b,
      list_heads=list_h,
    )


# Lists, made by XLA. Prefetched lists are flat: of an array of more dimensions
# every row would be padded in SMEM.


def smem_bytes(q, k, lists, settings) -> tuple[int, int]:
  """What the lists of a kernel take: of forward and dq, and of dk and dv.

  Args:
    q: anything that has its shape; so are k and what is in lists.
    lists: prepared Lists.
    settings: Settings.
  """
  shape = _Shape.of(q, k, lists, settings)
  tiles = shape.list_batch * shape.list_heads * shape.nq
  by_query = tiles * shape.steps * (shape.fuse + 1)
  fuse = _fused(settings, max(settings.block_q, ROWS))
  edges = shape.group * shape.nq * shape.slots
  steps = -(-edges // fuse) + shape.nk
  lists_of_a_step = 2 + fuse * (2 if lists.members is not None else 1)
  by_key = shape.list_batch * shape.list_kv_heads * steps * lists_of_a_step
  return 4 * by_query, 4 * by_key


def _fused(settings, block) -> int:
  """Blocks of so many rows that a step takes: small ones fill the lanes."""
  fuse = settings.fuse or min(FUSED_KEYS // block, MAX_FUSE)
  if fuse not in (1, 2, 4, MAX_FUSE):
    raise ValueError(f"fuse is {fuse}; it takes 1, 2, 4 or {MAX_FUSE}.")
  return max(fuse, LANES // block)


def by_query(lists, shape, settings):
  """Flat (blocks, codes) for the forward and dq kernels.

  Slots that are not run repeat the block before, whose copy is then there.
  Whole blocks come first, so that few steps need a mask; with members the order
  stays, since their bits are counted by slot, and with a skip_threshold, which
  asks what came before.
  """
  classes = lists.classes  # of more batches and heads than a shared list
  indices = jnp.broadcast_to(lists.indices, classes.shape)
  run = classes > rules.SKIP
  in_order = lists.members is not None or settings.skip_threshold
  if shape.fuse > 1 and not in_order:
    order = jnp.argsort(-classes, axis=-1, stable=True)
    indices, classes, run = (
      jnp.take_along_axis(x, order, -1) for x in (indices, classes, run)
    )
  slot = jnp.arange(shape.slots, dtype=jnp.int32)
  last_run = lax.cummax(jnp.where(run, slot, 0), axis=3)
  blocks = jnp.take_along_axis(indices, last_run, -1)
  pad = [(0, 0)] * 3 + [(0, shape.steps * shape.fuse - shape.slots)]
  blocks = jnp.pad(blocks, pad, mode="edge")
  of_step = lambda x: jnp.pad(x, pad).reshape(
    *x.shape[:3], shape.steps, shape.fuse
  )
  bits = of_step(run) << jnp.arange(shape.fuse)
  whole = of_step(classes == rules.WHOLE).all(-1)
  codes = bits.sum(-1, dtype=jnp.int32) + WHOLE * whole
  return blocks.reshape(-1), codes.reshape(-1).astype(jnp.int32)


def by_key(lists, shape):
  """Flat (key blocks, codes, edges, slots) for the dk, dv kernel, and steps.

  A step holds up to `fuse` edges of one key block; an edge is a query
  block of a query head. Every key block has a step, so that all of dk and dv
  is written. The number of steps is static, that of the worst case. Key heads
  that share their lists count the query heads from their own first.
  """
  b, hkv, group = shape.list_batch, shape.list_kv_heads, shape.group
  edges = group * shape.nq * shape.slots
  spread = lambda x: jnp.broadcast_to(
    x, (b, hkv * group, shape.nq, shape.slots)
  ).reshape(b * hkv, edges)
  indices, classes = spread(lists.indices), spread(lists.classes)
  if lists.edges is None:
    key = jnp.where(classes > rules.SKIP, indices, shape.nk)
    order = block_mask.sorted_edges(key, shape.nk)
    key = jnp.take_along_axis(key, order, -1)
  else:
    order = jnp.broadcast_to(lists.edges, (b, hkv, edges)).reshape(-1, edges)
    # Unlisted slots hold block 0 and come last.
    key = jnp.take_along_axis(indices, order, -1)
    key = jnp.where(key < lax.cummax(key, axis=1), shape.nk, key)
  classes = jnp.take_along_axis(classes, order, -1)
  steps = -(-edges // shape.fuse) + shape.nk

  def one(key, classes, order, first_head):
    bounds = jnp.searchsorted(key, jnp.arange(shape.nk + 1))
    begin, end = bounds[:-1], bounds[1:]
    needed = jnp.maximum(-(-(end - begin) // shape.fuse), 1)
    stop = jnp.cumsum(needed)
    step = jnp.arange(steps)
    block = jnp.searchsorted(stop, step, side="right")
    block = jnp.minimum(block, shape.nk - 1)
    within = step - (stop - needed)[block]
    places = (begin[block] + within * shape.fuse)[:, None]
    places += jnp.arange(shape.fuse)
    mine = (places < end[block][:, None]) & (step < stop[-1])[:, None]
    places = jnp.clip(places, 0, jnp.maximum(end[block] - 1, 0)[:, None])
    run = mine & (classes[places] > rules.SKIP)
    whole = (mine & (classes[places] == rules.WHOLE)).all(-1)
    code = (run << jnp.arange(shape.fuse)).sum(-1) + WHOLE * whole
    code += FIRST * (within == 0) + LAST * (within == needed[block] - 1)
    edge = order[places]
    head = first_head + edge // (shape.slots * shape.nq)
    slot = edge % shape.slots
    edge = (head << HEAD_SHIFT) + edge // shape.slots % shape.nq
    return block, code, edge, slot

  # Alone in its group a query head is the key head, which the kernel knows.
  first_head = jnp.arange(hkv, dtype=jnp.int32) * (group if group > 1 else 0)
  found = jax.vmap(one)(key, classes, order, jnp.tile(first_head, b))
  return *(x.reshape(-1).astype(jnp.int32) for x in found), steps


# What a body asks of positions and segments. Each is an operand of its own,
# present only where the call needs it.


def _needs(lists, settings, shape):
  """Which integers the bodies read: names of optional operands."""
  names = []
  if settings.masked:
    if settings.rule is not None and not settings.arange:
      names.append("q_positions")
    if not settings.arange and (settings.rule is not None or settings.padded):
      names.append("kv_positions")
    if lists.q_segments is not None:
      names += ["q_segments", "kv_segments"]
    if lists.members is not None:
      names.append("members")
  if settings.skip_threshold and "q_positions" not in names:
    names.append("q_positions")  # which rows are padding
  return names


def _as_rows(x, block):
  """[..., S] -> [..., blocks, 1, block]: a block is then any size."""
  return x.reshape(*x.shape[:-1], -1, 1, block)


def _allowed(q_at, k_at, q_in, k_in, bits, settings):
  """What may be read; each argument broadcasts to the scores, or is None."""
  ok = k_at != lists_lib.NOWHERE
  if settings.rule is not None:
    ok &= settings.rule(q_at, k_at)
  if q_in is not None:
    ok &= q_in == k_in
  if bits is not None:
    ok &= (bits & 1) == 1
  return ok


class _Operands:
  """Arrays that a kernel reads by blocks: their specs, and refs by name."""

  def __init__(self):
    self.arrays, self.specs, self.counts = [], [], {}

  def add(self, name, array, specs):
    """An array with one spec, or a list of them: a ref each."""
    specs = specs if isinstance(specs, list) else [specs]
    self.arrays += [array] * len(specs)
    self.specs += specs
    self.counts[name] = len(specs)

  def split(self, refs):
    """Lists of refs by name, and the refs behind those of the operands."""
    found = {}
    for name, count in self.counts.items():
      found[name], refs = refs[:count], refs[count:]
    return found, refs


def _integers(lists, settings, shape):
  """What `_needs` names: (name, array, block, index) of each operand.

  `index` takes b, a head and a block: of queries and a query head, or, where
  the name begins with kv, of keys and a key head.
  """
  for name in _needs(lists, settings, shape):
    x = getattr(lists, name)
    if name == "members":
      x = lax.bitcast_convert_type(x, jnp.int32)
    elif name.startswith("q_"):
      x = _as_rows(x, shape.block_q)[:, None]
    else:
      x = _as_rows(x, shape.block_kv)

    def index(b, h, i, lead=x.shape[:2]):
      return _pick(b, lead[0]), _pick(h, lead[1]), i, 0, 0

    yield name, x, (None, None, None, *x.shape[3:]), index


def _call(body, name, grid, prefetch, operands, outputs, out_specs, scratch,
          parallel, settings, cost):  # fmt: skip
  """A pallas_call with prefetched lists; outputs vary as the inputs do.

  `cost` is flops, transcendentals and bytes of the blocks of all pairs.
  """
  arrays = partitioning.vary_alike(*prefetch, *operands.arrays)
  axes = partitioning.varying(arrays[0])
  for_all = jax.sharding.ManualAxisType(varying=axes)
  outputs = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=for_all),
    outputs,
  )
  each = {id(x): x for x in (*arrays, *jax.tree.leaves(outputs))}
  once = sum(x.size * x.dtype.itemsize for x in each.values())
  flops, transcendentals, moved = cost
  estimate = pl.CostEstimate(
    flops=flops, transcendentals=transcendentals, bytes_accessed=moved + once
  )
  order = ("parallel",) * parallel
  order += ("arbitrary",) * (len(grid) - parallel)
  return pl.pallas_call(
    body,
    name=name,
    out_shape=outputs,
    interpret=settings.interpret,
    cost_estimate=estimate,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(prefetch),
      grid=grid,
      in_specs=operands.specs,
      out_specs=out_specs,
      scratch_shapes=scratch,
    ),
    compiler_params=pltpu.CompilerParams(dimension_semantics=order),
  )(*arrays)


def _flat(x):
  return x.reshape(*x.shape[:2], -1)


def _pick(index, size):
  """Along a shared dimension every program reads the one there is."""
  return index if size > 1 else 0


class _ByQuery:
  """Specs and the mask of the kernels of the grid (b, h, query block, step)."""

  def __init__(self, lists, settings, shape):
    self.settings, self.shape = settings, shape
    self.blocks, self.codes = by_query(lists, shape, settings)
    self.grid = (shape.batch, shape.heads, shape.nq, shape.steps)
    self.query = self.at_query(
      (None, shape.block_q, shape.dim), lambda b, h, i: (b, i, h)
    )
    self.keys = self.at_keys(
      (None, shape.block_kv, shape.dim), lambda b, h, i: (b, i, h)
    )
    self.integers = list(_integers(lists, settings, shape))

  def row(self, b, h, i):
    """Which list: the index of its first step."""
    s = self.shape
    which = _pick(b, s.list_batch) * s.list_heads + _pick(h, s.list_heads)
    return (which * s.nq + i) * s.steps

  def at_query(self, block, index):
    """`index` takes b, query head, query block."""
    return pl.BlockSpec(block, lambda b, h, i, j, *_: index(b, h, i))

  def at_keys(self, block, index):
    """A spec for each fused block; `index` takes b, key head, key block."""
    s = self.shape

    def of(r):
      def at(b, h, i, j, blocks, codes):
        which = blocks[(self.row(b, h, i) + j) * s.fuse + r]
        return index(b, h // s.group, which)

      return pl.BlockSpec(block, at)

    return [of(r) for r in range(s.fuse)]

  def statistics(self, rows):
    """Of f32 [B, H, nq, rows, block_q]."""
    return self.at_query(
      (None, None, None, rows, self.shape.block_q),
      lambda b, h, i: (b, h, i, 0, 0),
    )

  def add_keys(self, operands, k, v):
    """Adds keys, values, and integers."""
    operands.add("k", _flat(k), self.keys)
    operands.add("v", _flat(v), self.keys)
    for name, x, *spec in self.integers:
      at = self.at_keys if name.startswith("kv_") else self.at_query
      operands.add(name, x, at(*spec))

  def mask(self, refs, blocks_ref, code, first, i, j):
    """bool [block_q, width]: what the step's queries may read."""
    s = self.shape
    run = [(code >> r) & 1 == 1 for r in range(s.fuse)]
    if "kv_positions" in refs:
      k_at = _stack(refs["kv_positions"], 1)
      here = _lay([x.astype(jnp.int32) for x in run], s.block_kv) == 1
      k_at = jnp.where(here, k_at, lists_lib.NOWHERE)
    else:  # positions are indices
      starts = [
        jnp.where(x, blocks_ref[first + r] * s.block_kv, lists_lib.NOWHERE)
        for r, x in enumerate(run)
      ]
      lane = lax.broadcasted_iota(jnp.int32, (1, s.width), 1) % s.block_kv
      start = _lay(starts, s.block_kv)
      k_at = jnp.where(start == lists_lib.NOWHERE, start, start + lane)
      if self.settings.padded:
        k_at = jnp.where(k_at < self.settings.kv_len, k_at, lists_lib.NOWHERE)
    shape = (s.block_q, s.width)
    q_at = q_in = k_in = bits = None
    if "q_positions" in refs:
      q_at = _wide(_column(refs["q_positions"][0][...]), s.width)
    elif self.settings.rule is not None:
      q_at = i * s.block_q + lax.broadcasted_iota(jnp.int32, shape, 0)
    if "q_segments" in refs:
      q_in = _wide(_column(refs["q_segments"][0][...]), s.width)
      k_in = _stack(refs["kv_segments"], 1)
    if "members" in refs:
      slot = j * s.fuse  # fuse divides 32: one word holds a step's bits
      word = refs["members"][0][pl.ds(slot // block_mask.MEMBER_BITS, 1), :]
      run_of_lane = (
        lax.broadcasted_iota(jnp.int32, (1, s.width), 1) // s.block_kv
      )
      shift = slot % block_mask.MEMBER_BITS + run_of_lane
      bits = lax.shift_right_logical(
        _wide(_column(word), s.width), jnp.broadcast_to(shift, shape)
      )
    return jnp.broadcast_to(
      _allowed(q_at, k_at, q_in, k_in, bits, self.settings), shape
    )

  def kept(self, s, refs, top, j):
    """Scalars: whether BLASST keeps each block of a step.

    Args:
      s: base-2 logits, [block_q, width], -inf where unreadable.
      refs: of the operands.
      top: the maximum of each row so far, [block_q, 128] with equal lanes.
      j: the number of the step.
    """
    shape, settings = self.shape, self.settings
    padding = _column(refs["q_positions"][0][...])[:, :1] == lists_lib.NOWHERE
    lane = lax.broadcasted_iota(jnp.int32, (1, shape.width), 1)
    best, found = top[:, :1], []
    for r in range(shape.fuse):
      mine = s
      if shape.fuse > 1:
        mine = jnp.where(lane // shape.block_kv == r, s, -jnp.inf)
      highest = mine.max(1, keepdims=True)
      best = jnp.maximum(best, highest)  # a skipped block does not change it
      low = highest - best < math.log2(settings.skip_threshold)
      some = jnp.max(jnp.where(low | padding, 0.0, 1.0)) > 0
      found.append(some | (j * shape.fuse + r >= settings.skippable))
    return found


def _logits(q, keys, settings):
  """Base-2 logits of scaled queries, and the tanh of a soft cap."""
  s = _nt(q, keys)
  if settings.softcap is None:
    return s, None
  tanh = jnp.tanh(s)
  return tanh * (settings.softcap * LOG2E), tanh


def _scaled(q, settings):
  """Queries whose products with keys are what `_logits` takes."""
  factor = settings.scale * LOG2E
  if settings.softcap is not None:
    factor = settings.scale / settings.softcap
  return (q.astype(f32) * factor).astype(q.dtype)


def _widen(x, to):
  """Zeros behind the head dimension."""
  return jnp.pad(x, [(0, 0)] * 3 + [(0, to - x.shape[-1])])


def _tall(x, nq, rows, fill=0):
  """Tiles of fewer than `rows` queries are filled up, [B, S, ...]."""
  tiles = x.reshape(x.shape[0], nq, -1, *x.shape[2:])
  pad = [(0, 0)] * tiles.ndim
  pad[2] = (0, rows - tiles.shape[2])
  tiles = jnp.pad(tiles, pad, constant_values=fill)
  return tiles.reshape(x.shape[0], nq * rows, *x.shape[2:])


def _short(x, nq, rows):
  """The inverse of `_tall`."""
  tiles = x.reshape(x.shape[0], nq, -1, *x.shape[2:])[:, :, :rows]
  return tiles.reshape(x.shape[0], nq * rows, *x.shape[2:])


def _fit(lists, settings):
  """Lists and settings for tiles of at least ROWS queries."""
  if settings.block_q >= ROWS:
    return lists, settings
  nq = lists.indices.shape[2]
  members, segments = lists.members, lists.q_segments
  if members is not None:
    pad = [(0, 0)] * 4 + [(0, ROWS - settings.block_q)]
    members = jnp.pad(members, pad)
  lists = dataclasses.replace(
    lists,
    members=members,
    q_positions=_tall(lists.q_positions, nq, ROWS, lists_lib.NOWHERE),
    q_segments=None if segments is None else _tall(segments, nq, ROWS),
  )
  # Positions are no longer indices.
  return lists, dataclasses.replace(settings, block_q=ROWS, arange=False)


def _of_rows(x, shape):
  """f32 [B, S, H] -> [B, H, nq, 1, block_q]."""
  x = jnp.swapaxes(x, 1, 2)
  return x.reshape(shape.batch, shape.heads, shape.nq, 1, shape.block_q)


def forward(q, k, v, lists, settings):
  """Output, natural log-sum-exp, and what was kept; as xla.forward."""
  nq, rows, dim = lists.indices.shape[2], settings.block_q, q.shape[-1]
  lists, settings = _fit(lists, settings)
  lanes = -(-dim // LANES) * LANES
  q, k, v = (_widen(x, lanes) for x in (q, k, v))
  q = _tall(q, nq, settings.block_q)
  out, lse, kept = _forward(_scaled(q, settings), k, v, lists, settings)
  out = _short(out[..., :dim], nq, rows)
  return out, _short(lse, nq, rows), kept


def _forward(q, k, v, lists, settings):
  shape = _Shape.of(q, k, lists, settings)
  on, operands = _ByQuery(lists, settings, shape), _Operands()
  operands.add("q", _flat(q), on.query)
  on.add_keys(operands, k, v)
  width, dim = shape.width, shape.dim
  skipping = settings.skip_threshold

  def body(blocks_ref, codes_ref, *refs):
    refs, (out_ref, lse_ref, *rest) = operands.split(refs)
    *kept_ref, top_ref, total_ref, acc_ref = rest
    b, h, i, j = (pl.program_id(axis) for axis in range(4))
    step = on.row(b, h, i) + j
    code = codes_ref[step]

    @pl.when(j == 0)
    def _():
      top_ref[...] = jnp.full_like(top_ref, NEVER)
      total_ref[...] = jnp.zeros_like(total_ref)
      acc_ref[...] = jnp.zeros_like(acc_ref)

    if skipping:
      kept_ref[0][0, j] = 0

    def attend(cut):
      s, _ = _logits(refs["q"][0][...], _stack(refs["k"]), settings)
      if cut:
        ok = on.mask(refs, blocks_ref, code, step * shape.fuse, i, j)
        s = jnp.where(ok, s, -jnp.inf)
      if not skipping:
        return accumulate(s)
      kept = on.kept(s, refs, top_ref[...], j)
      ones = [x.astype(jnp.int32) for x in kept]
      bits = functools.reduce(jnp.add, [x << r for r, x in enumerate(ones)])
      kept_ref[0][0, j] = bits
      if shape.fuse > 1:
        s = jnp.where(_lay(ones, shape.block_kv) == 1, s, -jnp.inf)
      pl.when(bits > 0)(lambda: accumulate(s))

    def accumulate(s):
      old = top_ref[...]
      new = jnp.maximum(old, s.max(1, keepdims=True))
      decay = jnp.exp2(old - new)
      p = jnp.exp2(s - _wide(new, width))
      top_ref[...] = new
      total_ref[...] = total_ref[...] * decay + _fold(p)
      acc_ref[...] = acc_ref[...] * _wide(decay, dim) + _nn(
        p.astype(v.dtype), _stack(refs["v"])
      )

    pl.when(code >= WHOLE)(lambda: attend(False))
    pl.when((code > 0) & (code < WHOLE))(lambda: attend(True))

    @pl.when(j == shape.steps - 1)
    def _():
      total = total_ref[...].sum(1, keepdims=True)
      some = total != 0
      safe = jnp.where(some, total, 1.0)
      inverse = jnp.where(some, 1.0 / safe, 0.0)
      out_ref[...] = (acc_ref[...] * inverse).astype(out_ref.dtype)
      lse = (top_ref[...] + jnp.log2(safe)) * (1 / LOG2E)
      lse_ref[...] = jnp.where(some, lse, -jnp.inf).T[:1]

  s = shape
  outputs = [
    jax.ShapeDtypeStruct(_flat(q).shape, q.dtype),
    jax.ShapeDtypeStruct((s.batch, s.heads, s.nq, 1, s.block_q), f32),
  ]
  specs = [on.query, on.statistics(1)]
  if skipping:  # a word a step, a bit a block
    words = (1, s.steps)
    outputs.append(
      jax.ShapeDtypeStruct((s.batch, s.heads, s.nq, *words), jnp.int32)
    )
    at = lambda b, h, i, j, *_: (b, h, i, 0, 0)
    specs.append(
      pl.BlockSpec((None, None, None, *words), at, memory_space=pltpu.SMEM)
    )
  out, lse, *kept = _call(
    body,
    "block_sparse_attention_forward",
    on.grid,
    (on.blocks, on.codes),
    operands,
    outputs,
    specs,
    [pltpu.VMEM((s.block_q, n), f32) for n in (LANES, LANES, dim)],
    3,
    settings,
    s.cost(2, s.block_kv, k.dtype, settings),
  )
  lse = jnp.swapaxes(lse.reshape(s.batch, s.heads, -1), 1, 2)
  if skipping:
    bits = (kept[0].mT >> jnp.arange(s.fuse)) & 1
    kept = [bits.reshape(*bits.shape[:3], -1)[..., : s.slots] == 1]
  return out.reshape(q.shape), lse, kept[0] if kept else None


def backward(q, k, v, lists, lse, delta, dout, settings):
  """Gradients of q, k and v; as xla.backward."""
  nq, rows, dim = lists.indices.shape[2], settings.block_q, q.shape[-1]
  # What was skipped is not in the lists.
  settings = dataclasses.replace(settings, skip_threshold=None)
  lists, settings = _fit(lists, settings)
  lanes = -(-dim // LANES) * LANES
  k, v = (_widen(x, lanes) for x in (k, v))
  q, dout = (_tall(_widen(x, lanes), nq, settings.block_q) for x in (q, dout))
  shape = _Shape.of(q, k, lists, settings)
  # A row that read nothing has probabilities of zero against this.
  lse = jnp.where(lse == -jnp.inf, -NEVER, lse * LOG2E)
  # Both statistics are one operand, [B, H, nq, 2, block_q].
  lse, delta = (
    _of_rows(_tall(x, nq, settings.block_q), shape) for x in (lse, delta)
  )
  statistics = jnp.concatenate([lse, delta], 3)
  q = _scaled(q, settings)
  dout = dout.astype(q.dtype)
  dq = _backward_q(q, k, v, dout, statistics, lists, settings)
  dk, dv = _backward_kv(q, k, v, dout, statistics, lists, settings)
  return _short(dq[..., :dim], nq, rows), dk[..., :dim], dv[..., :dim]


def _backward_q(q, k, v, dout, statistics, lists, settings):
  shape = _Shape.of(q, k, lists, settings)
  on, operands = _ByQuery(lists, settings, shape), _Operands()
  operands.add("q", _flat(q), on.query)
  operands.add("dout", _flat(dout), on.query)
  operands.add("statistics", statistics, on.statistics(2))
  on.add_keys(operands, k, v)
  width, dim = shape.width, shape.dim

  def body(blocks_ref, codes_ref, *refs):
    refs, (dq_ref, lse_ref, delta_ref, acc_ref) = operands.split(refs)
    b, h, i, j = (pl.program_id(axis) for axis in range(4))
    step = on.row(b, h, i) + j
    code = codes_ref[step]

    @pl.when(j == 0)
    def _():
      (statistics_ref,) = refs["statistics"]
      lse_ref[...] = _column(statistics_ref[:1])
      delta_ref[...] = _column(statistics_ref[1:])
      acc_ref[...] = jnp.zeros_like(acc_ref)

    def attend(cut):
      picked = _stack(refs["k"])
      s, tanh = _logits(refs["q"][0][...], picked, settings)
      p = jnp.exp2(s - _wide(lse_ref[...], width))
      if cut:
        ok = on.mask(refs, blocks_ref, code, step * shape.fuse, i, j)
        p = jnp.where(ok, p, 0.0)
      dp = _nt(refs["dout"][0][...], _stack(refs["v"]))
      ds = p * (dp - _wide(delta_ref[...], width))
      if tanh is not None:
        ds *= 1 - tanh * tanh
      acc_ref[...] += _nn(ds.astype(k.dtype), picked)

    pl.when(code >= WHOLE)(lambda: attend(False))
    pl.when((code > 0) & (code < WHOLE))(lambda: attend(True))

    @pl.when(j == shape.steps - 1)
    def _():
      dq_ref[...] = (acc_ref[...] * settings.scale).astype(dq_ref.dtype)

  dq = _call(
    body,
    "block_sparse_attention_dq",
    on.grid,
    (on.blocks, on.codes),
    operands,
    jax.ShapeDtypeStruct(_flat(q).shape, q.dtype),
    on.query,
    [pltpu.VMEM((shape.block_q, n), f32) for n in (LANES, LANES, dim)],
    3,
    settings,
    shape.cost(3, shape.block_kv, k.dtype, settings),
  )
  return dq.reshape(q.shape)


def _backward_kv(q, k, v, dout, statistics, lists, settings):
  """Scores are transposed, [keys, queries]: row statistics lie along lanes.

  The heads of a group are edges of the same key block, and summed here.
  """
  fuse = _fused(settings, settings.block_q)
  shape = dataclasses.replace(_Shape.of(q, k, lists, settings), fuse=fuse)
  s = shape
  blocks, codes, edges, slots, steps = by_key(lists, shape)
  members = lists.members is not None
  prefetch = (blocks, codes, edges) + ((slots,) if members else ())
  width = fuse * s.block_q

  def row(b, h, j):
    which = _pick(b, s.list_batch) * s.list_kv_heads
    return (which + _pick(h, s.list_kv_heads)) * steps + j

  def at_key(block, index):
    """`index` takes b, key head, key block."""
    return pl.BlockSpec(
      block, lambda b, h, j, blocks, *_: index(b, h, blocks[row(b, h, j)])
    )

  def at_query(block, index):
    """A spec for each fused edge; `index` takes b, query head, query block."""

    def of(r):
      def at(b, h, j, blocks, codes, edges, *_):
        edge = edges[row(b, h, j) * fuse + r]
        if s.group == 1:
          return index(b, h, edge)
        head, q_block = edge >> HEAD_SHIFT, edge & ((1 << HEAD_SHIFT) - 1)
        if s.list_kv_heads < s.kv_heads:
          head += h * s.group
        return index(b, head, q_block)

      return pl.BlockSpec(block, at)

    return [of(r) for r in range(fuse)]

  operands, along = _Operands(), lambda b, h, i: (b, i, h)
  key = at_key((None, s.block_kv, s.dim), along)
  query = at_query((None, s.block_q, s.dim), along)
  operands.add("k", _flat(k), key)
  operands.add("v", _flat(v), key)
  operands.add("q", _flat(q), query)
  operands.add("dout", _flat(dout), query)
  rows = (None, None, None, 2, s.block_q)
  of_rows = at_query(rows, lambda b, h, i: (b, h, i, 0, 0))
  operands.add("statistics", statistics, of_rows)
  for name, x, *spec in _integers(lists, settings, shape):
    at = at_key if name.startswith("kv_") else at_query
    operands.add(name, x, at(*spec))

  def body(*refs):
    prefetched, refs = refs[: len(prefetch)], refs[len(prefetch) :]
    blocks_ref, codes_ref, edges_ref = prefetched[:3]
    refs, (dk_ref, dv_ref, dk_acc, dv_acc) = operands.split(refs)
    (k_ref,), (v_ref,) = refs["k"], refs["v"]
    b, h, j = (pl.program_id(axis) for axis in range(3))
    step = row(b, h, j)
    code = codes_ref[step]

    def mask():
      run = [(code >> r) & 1 for r in range(fuse)]
      full = (s.block_kv, width)
      here = _lay(run, s.block_q) == 1
      column = lambda x: _wide(_column(x), width)
      if "kv_positions" in refs:
        k_at = column(refs["kv_positions"][0][...])
      else:
        k_at = blocks_ref[step] * s.block_kv
        k_at += lax.broadcasted_iota(jnp.int32, full, 0)
        if settings.padded:
          k_at = jnp.where(k_at < settings.kv_len, k_at, lists_lib.NOWHERE)
      q_at = q_in = k_in = bits = None
      if "q_positions" in refs:
        q_at = _stack(refs["q_positions"], 1)
      elif settings.rule is not None:
        low = (1 << HEAD_SHIFT) - 1
        starts = [
          (edges_ref[step * fuse + r] & low) * s.block_q for r in range(fuse)
        ]
        lane = lax.broadcasted_iota(jnp.int32, (1, width), 1) % s.block_q
        q_at = _lay(starts, s.block_q) + lane
      if "q_segments" in refs:
        q_in = _stack(refs["q_segments"], 1)
        k_in = column(refs["kv_segments"][0][...])
      if "members" in refs:
        found = []
        for r, ref in enumerate(refs["members"]):
          slot = prefetched[3][step * fuse + r]
          word = ref[pl.ds(slot // block_mask.MEMBER_BITS, 1), :]
          shift = jnp.full(word.shape, slot % block_mask.MEMBER_BITS)
          found.append(lax.shift_right_logical(word, shift))
        bits = found[0] if fuse == 1 else jnp.concatenate(found, 1)
      ok = _allowed(q_at, k_at, q_in, k_in, bits, settings)
      return jnp.broadcast_to(ok & here, full)

    @pl.when((code & FIRST) > 0)
    def _():
      dk_acc[...] = jnp.zeros_like(dk_acc)
      dv_acc[...] = jnp.zeros_like(dv_acc)

    def attend(cut):
      queries, grads = _stack(refs["q"]), _stack(refs["dout"])
      line = lambda n: (
        refs["statistics"][0][n : n + 1]
        if fuse == 1
        else jnp.concatenate([r[n : n + 1] for r in refs["statistics"]], 1)
      )
      scores, tanh = _logits(k_ref[...], queries, settings)
      p = jnp.exp2(scores - line(0))
      if cut:
        p = jnp.where(mask(), p, 0.0)
      dv_acc[...] += _nn(p.astype(dout.dtype), grads)
      ds = p * (_nt(v_ref[...], grads) - line(1))
      if tanh is not None:
        ds *= 1 - tanh * tanh
      dk_acc[...] += _nn(ds.astype(q.dtype), queries)

    some = (code & (WHOLE - 1)) > 0
    pl.when((code & WHOLE) > 0)(lambda: attend(False))
    pl.when(((code & WHOLE) == 0) & some)(lambda: attend(True))

    @pl.when((code & LAST) > 0)
    def _():
      # The queries came multiplied by more than scale.
      cap = settings.softcap
      dk = dk_acc[...] * (1 / LOG2E if cap is None else cap)
      dk_ref[...] = dk.astype(dk_ref.dtype)
      dv_ref[...] = dv_acc[...].astype(dv_ref.dtype)

  dk, dv = _call(
    body,
    "block_sparse_attention_dkv",
    (s.batch, s.kv_heads, steps),
    prefetch,
    operands,
    [jax.ShapeDtypeStruct(_flat(x).shape, x.dtype) for x in (k, v)],
    [key, key],
    [pltpu.VMEM((s.block_kv, s.dim), f32)] * 2,
    2,
    settings,
    s.cost(4, s.block_q, q.dtype, settings),
  )
  return dk.reshape(k.shape), dv.reshape(v.shape)
