"""Grouped matmul on TPU in Pallas.

Rows are cut into tiles. A tile in which groups meet is visited once for each of
them, and each visit writes the rows of its own group. Lists of visits, made by
XLA, lie in SMEM, where the index maps read them; how many there are is known
only when it runs, and the grid is as long as that. Every kernel has two bodies:
for tiles that are of one group as a whole, and for the others, which are
masked.

Rows are gathered and scattered by XLA, before and after the kernel. A kernel
can copy row by row, but takes 20 bundles to issue each copy: for a tile of 512
rows nine times what its products with 1024 x 512 weights take.
"""

import dataclasses

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from pallas_kernels import partitioning

LANES = 128
ROWS = 16  # the least rows of a tile, two sublanes of bf16
# Of a visit: all of its tile, the first and the last of its tile or group, or
# of no group.
WHOLE, FIRST, LAST, EMPTY = 1, 2, 4, 8
FLAGS, BITS = 4, 14  # bits of the flags, and of a row within a tile
VMEM = 12 * 2**20  # bytes of a step; XLA allows a kernel 16 MiB on every TPU
f32 = jnp.float32


@dataclasses.dataclass(frozen=True)
class Tiling:
  """Rows, contracted and other columns of a step; None chooses them."""

  m: int
  k: int
  n: int


def lacks(lhs):
  """What the kernels cannot do of a call, or None."""
  if lhs.dtype not in (jnp.bfloat16, jnp.float32):
    return f"products of {lhs.dtype}"
  return None


def product(lhs, weights, scale, edges, *, transpose_rhs, combine, dtype,
            dots_with=None, interpret=False, tiling=None):  # fmt: skip
  """See `xla.product`."""
  pick = lambda x, index: (
    x if index is None else x.at[index].get(mode="fill", fill_value=0)
  )
  plain = scale is None and edges.target is None and dots_with is None
  y = _rows_by_weights(
    pick(lhs, edges.source),
    weights,
    edges,
    transpose_rhs,
    combine,
    dtype if plain else f32,
    interpret,
    tiling,
  )
  dots = None
  if dots_with is not None:
    other = pick(dots_with, edges.target).astype(f32)
    inside = edges.in_a_group()[:, None]  # beside a 0 there may be a NaN
    dots = jnp.where(inside, y * other, 0).sum(-1)
  if scale is not None:
    y = jnp.where(edges.in_a_group()[:, None], y * scale[:, None], 0)
  if edges.target is not None:
    sums = jnp.zeros((edges.targets, y.shape[1]), f32)
    sums, y = partitioning.vary_alike(sums, y)
    y = sums.at[edges.target].add(y, mode="drop")
  y = y.astype(dtype)
  return (y,) if dots is None else (y, dots)


def outer(lhs, rhs, scale, edges, *, dtype, interpret=False, tiling=None):
  """See `xla.outer`."""
  pick = lambda x, index: (
    x if index is None else x.at[index].get(mode="fill", fill_value=0)
  )
  lhs, rhs = pick(lhs, edges.source), pick(rhs, edges.target)
  if scale is not None:
    rhs = (rhs * scale[:, None]).astype(rhs.dtype)
  return _rows_by_rows(lhs, rhs, edges, dtype, interpret, tiling)


def visits_by_tile(edges, size):
  """Visits of `product`: flat lists and how many of them count.

  Every tile has a visit, so that all of the result is written. A visit begins
  where its tile does or a group in it.

  Returns:
    (tiles, groups, codes), each int32 [most visits], and the number of visits.
  """
  tiles, groups = -(-edges.count // size), edges.starts.shape[0]
  far = tiles * size
  begins = jnp.where(edges.ends > edges.starts, edges.starts, far)
  at = jnp.sort(jnp.concatenate([jnp.arange(tiles) * size, begins]))
  again = jnp.concatenate([jnp.zeros(1, bool), at[1:] == at[:-1]])
  at = jnp.sort(jnp.where(again, far, at))
  number = jnp.sum(at < far)
  tile = jnp.minimum(at // size, tiles - 1)
  group = jnp.minimum(_passed(edges.ends, at), groups - 1)
  ours = (at >= edges.starts[group]) & (at < edges.ends[group])
  begin = at - tile * size
  end = jnp.where(
    ours, jnp.minimum(edges.ends[group] - tile * size, size), begin
  )
  rows = jnp.minimum(edges.count - tile * size, size)
  whole = (begin == 0) & (end >= rows)
  code = _code(begin, end, WHOLE * whole + FIRST * (begin == 0))
  return tuple(x.astype(jnp.int32) for x in (tile, group, code)), number


def visits_by_group(edges, size):
  """Visits of `outer`, as of `visits_by_tile`; every group has one."""
  tiles, groups = -(-edges.count // size), edges.starts.shape[0]
  filled = edges.ends > edges.starts
  first = jnp.minimum(edges.starts // size, tiles - 1)
  many = jnp.where(filled, (edges.ends - 1) // size - first + 1, 1)
  stop = jnp.cumsum(many)
  visit = jnp.arange(tiles + groups)
  group = jnp.minimum(_passed(stop, visit), groups - 1)
  within = visit - (stop - many)[group]
  tile = jnp.minimum(first[group] + within, tiles - 1)
  begin = jnp.clip(edges.starts[group] - tile * size, 0, size)
  end = jnp.clip(edges.ends[group] - tile * size, begin, size)
  flags = WHOLE * ((begin == 0) & (end == size))
  flags += FIRST * (within == 0) + LAST * (within == many[group] - 1)
  code = _code(begin, end, flags)
  return tuple(x.astype(jnp.int32) for x in (tile, group, code)), stop[-1]


def _passed(ends, at):
  """How many of the ends are at or before each number."""
  # jnp.searchsorted fails where only some axes of a mesh are manual.
  return (ends[None] <= at[:, None]).sum(1)


def _code(begin, end, flags):
  flags += EMPTY * (begin >= end)
  return flags + (begin << FLAGS) + (end << (FLAGS + BITS))


def _mine(code, shape):
  """bool: which rows of a tile a visit is for."""
  row = lax.broadcasted_iota(jnp.int32, shape, 0)
  begin, end = (code >> FLAGS) & (1 << BITS) - 1, code >> (FLAGS + BITS)
  return (row >= begin) & (row < end)


def _has(code, flag):
  return (code & flag) > 0


def _divisor(size, most):
  """The largest multiple of LANES up to `most` that divides size."""
  return max(x for x in range(LANES, most + 1, LANES) if size % x == 0)


def _tiling(count, groups, k, n, vmem):
  """Tiles that keep the MXU busy: about as many rows as a group has.

  `vmem` says how many bytes a step takes; columns are halved until it fits.
  """
  rows = 128
  while rows < 512 and 2 * rows <= count // groups:
    rows *= 2
  rows = min(rows, -(-count // ROWS) * ROWS)
  most = {"k": 1024, "n": 1024}
  while True:
    tile = Tiling(rows, _divisor(k, most["k"]), _divisor(n, most["n"]))
    wider = max(("n", tile.n), ("k", tile.k), key=lambda x: x[1])
    if vmem(tile) <= VMEM or wider[1] == LANES:
      return tile
    most[wider[0]] = wider[1] // 2 // LANES * LANES or LANES


def _pad(x, axes):
  """Whole lanes along axes: what is added is zeros."""
  widths = [(0, -size % LANES if axis in axes else 0)
            for axis, size in enumerate(x.shape)]  # fmt: skip
  return jnp.pad(x, widths) if any(w for _, w in widths) else x


def _call(body, name, grid, prefetch, inputs, in_specs, output, out_spec,
          scratch, interpret, flops):  # fmt: skip
  """A pallas_call with prefetched lists; its output varies as the inputs do."""
  number, prefetch, inputs = partitioning.vary_alike(grid[1], prefetch, inputs)
  axes = partitioning.varying(inputs[0])
  output = jax.ShapeDtypeStruct(
    output.shape,
    output.dtype,
    manual_axis_type=jax.sharding.ManualAxisType(varying=axes),
  )
  # As if all rows were of a group, and everything were read once.
  moved = sum(x.size * x.dtype.itemsize for x in (*inputs, output))
  cost = pl.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=moved)
  return pl.pallas_call(
    body,
    name=name,
    out_shape=output,
    interpret=interpret,
    cost_estimate=cost,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(prefetch),
      grid=(grid[0], number, grid[2]),
      in_specs=in_specs,
      out_specs=out_spec,
      scratch_shapes=scratch,
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary", "arbitrary"),
      disable_bounds_checks=True,  # lists of visits are made within bounds
    ),
  )(*prefetch, *inputs)


def _rows_by_weights(lhs, weights, edges, transpose_rhs, combine, dtype,
                     interpret, tiling):  # fmt: skip
  """combine(row @ weight of its group, ...), [count, n]."""
  n = weights[0].shape[1 if transpose_rhs else 2]
  lhs = _pad(lhs, (1,))
  weights = [_pad(w, (1, 2)) for w in weights]
  (count, k), groups = lhs.shape, weights[0].shape[0]
  wide = weights[0].shape[1 if transpose_rhs else 2]

  def vmem(tile):
    """Blocks that come and go, sums, and products before they are stored."""
    wide, tall = tile.m * tile.n, tile.k * (tile.m + len(weights) * tile.n)
    item, out = lhs.dtype.itemsize, jnp.dtype(dtype).itemsize
    sums = len(weights) * (2 if k > tile.k else 1)
    return 2 * tall * item + wide * (2 * out + 4 * sums)

  tile = tiling or _tiling(count, groups, k, wide, vmem)
  lists, number = visits_by_tile(edges, tile.m)
  turns = k // tile.k
  contract = ((1,), (1,) if transpose_rhs else (0,))

  def body(tiles_ref, groups_ref, codes_ref, lhs_ref, *refs):
    del tiles_ref, groups_ref
    many = len(weights)
    weight_refs, out_ref, sums = refs[:many], refs[many], refs[many + 1 :]
    code, turn = codes_ref[pl.program_id(1)], pl.program_id(2)

    def products(more):
      found = []
      for i, ref in enumerate(weight_refs):
        y = lax.dot_general(
          lhs_ref[...], ref[...], (contract, ((), ())),
          preferred_element_type=f32,
        )  # fmt: skip
        found.append(y + sums[i][...] if more else y)
      return found

    def keep(more):
      for ref, y in zip(sums, products(more), strict=True):
        ref[...] = y

    def finish(whole):
      y = combine(*products(turns > 1)).astype(dtype)
      if not whole:
        before = jnp.where(_has(code, FIRST), jnp.zeros_like(y), out_ref[...])
        y = jnp.where(_mine(code, y.shape), y, before)
      out_ref[...] = y

    def last():
      pl.when(_has(code, WHOLE))(lambda: finish(True))
      pl.when(~_has(code, WHOLE | EMPTY))(lambda: finish(False))

      @pl.when(_has(code, EMPTY))
      def _():
        out_ref[...] = jnp.zeros_like(out_ref)

    def earlier():
      pl.when(turn == 0)(lambda: keep(False))
      if turns > 2:
        pl.when(turn > 0)(lambda: keep(True))

    if turns == 1:
      last()
    else:
      pl.when(turn == turns - 1)(last)
      pl.when((turn < turns - 1) & ~_has(code, EMPTY))(earlier)

  block = (None, tile.n, tile.k) if transpose_rhs else (None, tile.k, tile.n)

  def of_weight(n, v, k, tiles, groups, codes):
    return (groups[v], n, k) if transpose_rhs else (groups[v], k, n)

  out = _call(
    body,
    "grouped_matmul",
    (wide // tile.n, number, turns),
    lists,
    [lhs, *weights],
    [pl.BlockSpec((tile.m, tile.k), lambda n, v, k, tiles, *_: (tiles[v], k))]
    + [pl.BlockSpec(block, of_weight)] * len(weights),
    jax.ShapeDtypeStruct((count, wide), dtype),
    pl.BlockSpec((tile.m, tile.n), lambda n, v, k, tiles, *_: (tiles[v], n)),
    [pltpu.VMEM((tile.m, tile.n), f32)] * (len(weights) if turns > 1 else 0),
    interpret,
    2 * count * k * wide * len(weights),
  )
  return out[:, :n]


def _rows_by_rows(lhs, rhs, edges, dtype, interpret, tiling):
  """For each group the sum of its rows' lhs.T @ rhs, [g, k, n]."""
  (count, k), n, groups = lhs.shape, rhs.shape[1], edges.starts.shape[0]
  lhs, rhs = _pad(lhs, (1,)), _pad(rhs, (1,))
  tall, wide = lhs.shape[1], rhs.shape[1]

  def vmem(tile):
    """Blocks that come and go, the sum, a product, and lhs transposed."""
    item, out = lhs.dtype.itemsize, jnp.dtype(dtype).itemsize
    rows = tile.m * (3 * tile.k + 2 * tile.n)
    return rows * item + tile.k * tile.n * (2 * out + 8)

  tile = tiling or _tiling(count, groups, tall, wide, vmem)
  lists, number = visits_by_group(edges, tile.m)

  def body(tiles_ref, groups_ref, codes_ref, lhs_ref, rhs_ref, out_ref, total):
    del tiles_ref, groups_ref
    code = codes_ref[pl.program_id(1)]

    def add(whole):
      x, y = lhs_ref[...], rhs_ref[...]
      if not whole:  # both, or a NaN of one would meet a 0 of the other
        x, y = (
          jnp.where(_mine(code, a.shape), a, jnp.zeros_like(a)) for a in (x, y)
        )
      total[...] += lax.dot_general(
        x, y, (((0,), (0,)), ((), ())), preferred_element_type=f32
      )

    @pl.when(_has(code, FIRST))
    def _():
      total[...] = jnp.zeros_like(total)

    pl.when(_has(code, WHOLE))(lambda: add(True))
    pl.when(~_has(code, WHOLE | EMPTY))(lambda: add(False))

    @pl.when(_has(code, LAST))
    def _():
      out_ref[...] = total[...].astype(dtype)

  # The tiles of the result are the outer dimensions: k first, for the one that
  # is innermost reads the same rows of rhs again.
  down = tall // tile.k
  out = _call(
    body,
    "grouped_matmul_outer",
    (down * (wide // tile.n), number, 1),
    lists,
    [lhs, rhs],
    [
      pl.BlockSpec(
        (tile.m, tile.k), lambda i, v, _, tiles, *__: (tiles[v], i % down)
      ),
      pl.BlockSpec(
        (tile.m, tile.n), lambda i, v, _, tiles, *__: (tiles[v], i // down)
      ),
    ],
    jax.ShapeDtypeStruct((groups, tall, wide), dtype),
    pl.BlockSpec(
      (None, tile.k, tile.n),
      lambda i, v, _, tiles, groups, codes: (groups[v], i % down, i // down),
    ),
    [pltpu.VMEM((tile.k, tile.n), f32)],
    interpret,
    2 * count * tall * wide,
  )
  return out[:, :k, :n]
