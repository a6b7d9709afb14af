"""Block-sparse matmul on TPU in Pallas: the product, and the sampled product.

The lists lie in SMEM, where the index maps read them. A grid step multiplies
one value by a tile of rows. In the product the steps of a target block follow
each other, and every target block has at least one, so that all of the result
is written; their number is static, that of the worst case.
"""

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from pallas_kernels import partitioning

LANES = 128
ROWS = 16  # the least rows of a tile, two sublanes of bf16
TILE = 512  # rows of a tile at most
SMEM = 2**20 - 2**16  # bytes that prefetched lists may take
VMEM = 44 * 2**20  # bytes that a step's blocks may take; v5p has 64 MiB
UNASKED = 16 * 2**20  # bytes of VMEM that every TPU gives unasked
SLACK = 8 * 2**20  # bytes of VMEM for what the compiler adds
FIRST, LAST, RUN = 1, 2, 4  # flags of a step
f32 = jnp.float32


def product_room(values, size, out, transpose):
  """Bytes of VMEM for each row of a product's tile, and besides.

  Blocks that are read or written lie there twice, what accumulates once.

  Args:
    values: (nnz, bk, bn).
    size: bytes of a number of x and of the values.
    out: bytes of a number of the result.
    transpose: as in `product`.
  """
  _, bk, bn = values
  wide, out_wide = (bn, bk) if transpose else (bk, bn)
  return 2 * wide * size + out_wide * (2 * out + 4), 2 * bk * bn * size


def sampled_room(values, size, out):
  """The same for the sampled product."""
  _, bk, bn = values
  return 2 * (bk + bn) * size, bk * bn * (2 * out + 4)


def tile_of(rows, room):
  """Rows of a tile and its bytes of VMEM, those of the least where none fit."""
  of_row, besides = room
  tile = min(TILE, -(-rows // ROWS) * ROWS)
  while tile > LANES and tile * of_row + besides > VMEM:
    tile = max(LANES, tile // 2 // ROWS * ROWS)
  return tile, tile * of_row + besides


def lacks(rows, values, targets, room):
  """What the kernels cannot do for so many rows and these values, or None.

  Args:
    rows: of x.
    values: (nnz, bk, bn).
    targets: blocks of the result, 0 for the sampled product.
    room: `product_room` or `sampled_room`.
  """
  nnz, bk, bn = values
  if bk % LANES or bn % LANES:
    return f"blocks of {bk} x {bn} (both must be multiples of {LANES})"
  taken = 4 * 4 * (nnz + targets)
  if taken > SMEM:
    return f"room for lists of {taken} bytes (SMEM holds {SMEM})"
  _, taken = tile_of(rows, room)
  if taken > VMEM:
    return f"room for blocks of {bk} x {bn}: {taken} bytes of VMEM (of {VMEM})"
  return None


def checked_edges(edges, target):
  """The values by target: `edges` where they are that, or else sorted anew.

  Sorted values grow in their target, and in their number where it is the same;
  nothing but each of them once can grow so.
  """
  nnz = target.size
  key = jnp.take(target, edges, mode="clip")
  grows = (key[1:] > key[:-1]) | (
    (key[1:] == key[:-1]) & (edges[1:] > edges[:-1])
  )
  good = grows.all() & ((edges >= 0) & (edges < nnz)).all()
  again = lambda: jnp.argsort(target, stable=True).astype(jnp.int32)
  return lax.cond(good, lambda: edges, again)


def steps_of(source, target, order, sources, targets):
  """Flat lists of a product's steps: source, target, value, code.

  Args:
    source: int32 [nnz]; `sources` for none.
    target: int32 [nnz]; `targets` for none.
    order: int32 [nnz], the values by target.
    sources: blocks of x.
    targets: blocks of the result.

  Returns:
    int32 [nnz + targets] each.
  """
  nnz = order.size
  key = jnp.take(target, order, mode="clip")
  bounds = jnp.searchsorted(key, jnp.arange(targets + 1)).astype(jnp.int32)
  begin, end = bounds[:-1], bounds[1:]
  needed = jnp.maximum(end - begin, 1)
  stop = jnp.cumsum(needed)
  step = jnp.arange(nnz + targets, dtype=jnp.int32)
  block = jnp.searchsorted(stop, step, side="right")
  block = jnp.minimum(block, targets - 1).astype(jnp.int32)
  within = step - (stop - needed)[block]
  place = begin[block] + within
  value = jnp.take(order, jnp.clip(place, 0, nnz - 1))
  value = jnp.clip(value, 0, nnz - 1)
  from_ = source[value]
  run = (place < end[block]) & (from_ < sources)
  code = FIRST * (within == 0) + LAST * (within == needed[block] - 1)
  return jnp.minimum(from_, sources - 1), block, value, code + RUN * run


def product(x, values, source, target, *, sources, targets, transpose, edges,
            dtype, interpret):  # fmt: skip
  """See `xla.product`; `edges` is None or, transposed, those of the weight."""
  rows, (_, bk, bn) = x.shape[0], values.shape
  wide, out_wide = (bn, bk) if transpose else (bk, bn)
  sizes = x.dtype.itemsize, jnp.dtype(dtype).itemsize
  room = product_room(values.shape, *sizes, transpose)
  tile, taken = tile_of(rows, room)
  x = _tiled(x, tile)
  if not transpose:
    order = jnp.arange(len(target), dtype=jnp.int32)  # column after column
  elif edges is None:
    order = jnp.argsort(target, stable=True).astype(jnp.int32)
  else:
    order = checked_edges(edges, target)
  prefetch = steps_of(source, target, order, sources, targets)
  contract = (((1,), (1 if transpose else 0,)), ((), ()))

  def body(sources_ref, targets_ref, values_ref, codes_ref, x_ref, value_ref,
           out_ref, acc_ref):  # fmt: skip
    code = codes_ref[pl.program_id(1)]

    @pl.when(code & FIRST > 0)
    def _():
      acc_ref[...] = jnp.zeros_like(acc_ref)

    @pl.when(code & RUN > 0)
    def _():
      acc_ref[...] += lax.dot_general(
        x_ref[...], value_ref[...], contract, preferred_element_type=f32
      )

    @pl.when(code & LAST > 0)
    def _():
      out_ref[...] = acc_ref[...].astype(out_ref.dtype)

  out = _call(
    body,
    "block_sparse_matmul_t" if transpose else "block_sparse_matmul",
    (len(x) // tile, prefetch[0].size),
    prefetch,
    (x, values),
    [
      pl.BlockSpec((tile, wide), lambda i, j, s, t, v, c: (i, s[j])),
      pl.BlockSpec((None, bk, bn), lambda i, j, s, t, v, c: (v[j], 0, 0)),
    ],
    jax.ShapeDtypeStruct((len(x), targets * out_wide), dtype),
    pl.BlockSpec((tile, out_wide), lambda i, j, s, t, v, c: (i, t[j])),
    pltpu.VMEM((tile, out_wide), f32),
    taken,
    interpret,
  )
  return out[:rows]


def sampled(x, y, row, column, *, rows, columns, dtype, interpret):
  """See `xla.sampled`."""
  bk, bn = x.shape[1] // rows, y.shape[1] // columns
  sizes = x.dtype.itemsize, jnp.dtype(dtype).itemsize
  tile, taken = tile_of(len(x), sampled_room((row.size, bk, bn), *sizes))
  x, y = _tiled(x, tile), _tiled(y, tile)
  used = (row < rows) & (column < columns)
  prefetch = (
    jnp.minimum(row, rows - 1),
    jnp.minimum(column, columns - 1),
    used.astype(jnp.int32),
  )
  tiles = len(x) // tile

  def body(rows_ref, columns_ref, used_ref, x_ref, y_ref, out_ref, acc_ref):
    p, i = pl.program_id(0), pl.program_id(1)

    @pl.when(i == 0)
    def _():
      acc_ref[...] = jnp.zeros_like(acc_ref)

    @pl.when(used_ref[p] > 0)
    def _():
      acc_ref[...] += lax.dot_general(
        x_ref[...],
        y_ref[...],
        (((0,), (0,)), ((), ())),
        preferred_element_type=f32,
      )

    @pl.when(i == tiles - 1)
    def _():
      out_ref[...] = acc_ref[...].astype(out_ref.dtype)

  return _call(
    body,
    "block_sparse_sampled",
    (row.size, tiles),
    prefetch,
    (x, y),
    [
      pl.BlockSpec((tile, bk), lambda p, i, r, c, u: (i, r[p])),
      pl.BlockSpec((tile, bn), lambda p, i, r, c, u: (i, c[p])),
    ],
    jax.ShapeDtypeStruct((row.size, bk, bn), dtype),
    pl.BlockSpec((None, bk, bn), lambda p, i, r, c, u: (p, 0, 0)),
    pltpu.VMEM((bk, bn), f32),
    taken,
    interpret,
  )


def _tiled(x, tile):
  """x with zeros behind its rows, so that tiles fill it."""
  return jnp.pad(x, [(0, -len(x) % tile), (0, 0)])


def _call(body, name, grid, prefetch, inputs, in_specs, output, out_spec,
          scratch, taken, interpret):  # fmt: skip
  """A pallas_call with prefetched lists; the output varies as the inputs do.

  `taken` is what its blocks take of VMEM. More than is given unasked has to be
  asked for.
  """
  limit = taken + SLACK if taken + SLACK > UNASKED else None
  arrays = partitioning.vary_alike(*prefetch, *inputs)
  axes = partitioning.varying(arrays[0])
  return pl.pallas_call(
    body,
    name=name,
    out_shape=jax.ShapeDtypeStruct(
      output.shape,
      output.dtype,
      manual_axis_type=jax.sharding.ManualAxisType(varying=axes),
    ),
    interpret=interpret,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(prefetch),
      grid=grid,
      in_specs=in_specs,
      out_specs=out_spec,
      scratch_shapes=[scratch],
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=limit
    ),
  )(*arrays)
