"""Grouped matmul as plain XLA: the fast path on CPU.

A loop over the groups copies a weight once and runs over the tiles of rows that
belong to it. What remains of a group behind its whole tiles takes one tile of a
fitting size, in which the rows of other groups are masked. So little more is
computed than is needed, however uneven the groups are.
"""

from jax import lax
import jax.numpy as jnp

from pallas_kernels import partitioning

ROWS = 256  # of a tile at most
OUTER_ROWS = 512  # the same, of what is contracted over the rows
LEAST = 16  # rows of a tile that are worth a body of their own
f32 = jnp.float32


def product(lhs, weights, scale, edges, *, transpose_rhs, combine, dtype,
            dots_with=None):  # fmt: skip
  """Adds scale * combine(lhs[source] @ weight, ...) to each target.

  Args:
    lhs: [sources, k].
    weights: tuple of [g, k, n], or [g, n, k] with `transpose_rhs`.
    scale: None or f32 [count].
    edges: Edges.
    transpose_rhs: see weights.
    combine: function of one [rows, n] a weight.
    dtype: of the result.
    dots_with: None, or [targets, n].

  Returns:
    [targets, n] and, with `dots_with`, f32 [count]: each edge's product,
    not scaled, times the row of dots_with at its target, summed.
  """
  groups, n = weights[0].shape[0], weights[0].shape[1 if transpose_rhs else 2]
  # Sums want f32; rows that are written once can be rounded at once.
  kept = dtype if edges.target is None else f32
  out = _zeros((edges.targets, n), kept, lhs)
  dots = None if dots_with is None else _zeros((edges.count,), f32, lhs)

  def group(i, carry):
    # The barrier keeps the copy out of the loop over tiles.
    slices = lax.optimization_barrier([w[i] for w in weights])
    slices = [(w.T if transpose_rhs else w).astype(f32) for w in slices]

    def tile(carry, at, size, mine):
      out, dots = carry
      rows = _rows(lhs, edges.source, at, size).astype(f32)
      y = combine(*(rows @ w for w in slices))
      if dots is not None:
        other = _rows(dots_with, edges.target, at, size).astype(f32)
        here = (y * other).sum(-1)
        dots = _put(dots, here, at, mine)
      if scale is not None:
        y *= lax.dynamic_slice_in_dim(scale, at, size)[:, None]
      if edges.target is None:
        return _put(out, y.astype(kept), at, mine), dots
      to = lax.dynamic_slice_in_dim(edges.target, at, size)
      to = jnp.where(mine, to, edges.targets)
      return out.at[to].add(y, mode="drop"), dots

    tiles = _tiles(edges.count, groups, ROWS)
    return _over(tile, carry, edges.starts[i], edges.ends[i], tiles, edges)

  out, dots = lax.fori_loop(0, groups, group, (out, dots))
  out = out.astype(dtype)
  return (out,) if dots is None else (out, dots)


def outer(lhs, rhs, scale, edges, *, dtype):
  """For each group the sum of scale * lhs[source].T @ rhs[target].

  Args:
    lhs: [sources, k].
    rhs: [targets, n].
    scale: None or f32 [count].
    edges: Edges.
    dtype: of the result.

  Returns:
    [g, k, n].
  """
  groups, k, n = edges.starts.shape[0], lhs.shape[1], rhs.shape[1]

  def group(i, out):
    def tile(total, at, size, mine):
      x = _rows(lhs, edges.source, at, size).astype(f32)
      y = _rows(rhs, edges.target, at, size).astype(f32)
      if scale is not None:
        y *= lax.dynamic_slice_in_dim(scale, at, size)[:, None]
      # Both, or a NaN of one would meet a 0 of the other.
      x, y = (jnp.where(mine[:, None], a, 0) for a in (x, y))
      # Copied, for a product whose left side is transposed takes up to twice
      # the time of a plain one.
      return total + lax.optimization_barrier(x.T) @ y

    tiles = _tiles(edges.count, groups, OUTER_ROWS)
    total = _over(
      tile,
      _zeros((k, n), f32, lhs),
      edges.starts[i],
      edges.ends[i],
      tiles,
      edges,
    )
    return lax.dynamic_update_index_in_dim(out, total.astype(dtype), i, 0)

  return lax.fori_loop(0, groups, group, _zeros((groups, k, n), dtype, lhs))


def _zeros(shape, dtype, like):
  """What a loop carries varies along the manual axes that its turns do."""
  return partitioning.vary(jnp.zeros(shape, dtype), partitioning.varying(like))


def _rows(x, index, at, size):
  """The rows of a tile; those that do not exist are zeros."""
  if index is None:
    return lax.dynamic_slice_in_dim(x, at, size)
  index = lax.dynamic_slice_in_dim(index, at, size)
  return x.at[index].get(mode="fill", fill_value=0)


def _put(x, rows, at, mine):
  """Writes the rows of a tile that belong to its group."""
  mine = mine.reshape(-1, *(1,) * (x.ndim - 1))
  before = lax.dynamic_slice_in_dim(x, at, rows.shape[0])
  rows = jnp.where(mine, rows, before)
  return lax.dynamic_update_slice_in_dim(x, rows, at, 0)


def _tiles(rows, groups, most):
  """Sizes of tiles, falling: one above the mean group's size, and smaller ones.

  Most groups of about the mean size are then a single tile.
  """
  mean = min(-(-rows // groups), most)
  sizes = (
    LEAST * round(x * mean / LEAST) for x in (9 / 8, 1, 3 / 4, 1 / 2, 1 / 4)
  )
  return tuple(dict.fromkeys(min(max(x, LEAST), most, rows) for x in sizes))


def _over(tile, carry, start, end, tiles, edges):
  """carry = tile(carry, first edge, size, which are of the group), for all.

  Loops of no or one turn are used as `if`: their carry is changed in place.
  Their bodies read the turn, or XLA would take the products out of the loop
  and compute those of every size.
  """
  whole, rest = (end - start) // tiles[0], (end - start) % tiles[0]
  for size, smaller in zip(tiles, tiles[1:] + (0,), strict=True):
    first = start + whole * tiles[0]
    turns = ((rest > smaller) & (rest <= size)).astype(jnp.int32)
    if size == tiles[0]:
      first, turns = start, whole + turns

    def turn(j, carry, first=first, size=size):
      own = first + j * size
      at = jnp.minimum(own, edges.count - size)
      of_tile = at + jnp.arange(size)
      mine = (of_tile >= own) & (of_tile < end)
      return tile(carry, at, size, mine)

    carry = lax.fori_loop(0, turns, turn, carry)
  return carry
