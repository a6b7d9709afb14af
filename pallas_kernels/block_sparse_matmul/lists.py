"""What backends read of a weight's lists: a block row and column a value."""

import jax
import jax.numpy as jnp


def clipped(indices: jax.Array, counts: jax.Array) -> jax.Array:
  """Counts that no list is too short for, int32 [n_n]."""
  return jnp.clip(counts, 0, indices.shape[1])


def places(indices, counts, number, columns, first, block_rows):
  """Where values lie.

  Args:
    indices: int32 [n, C], the lists of block columns first .. first + n - 1.
    counts: int32 [all block columns], `clipped`.
    number: int32 [p], of the values that are asked for.
    columns: n.
    first: int32 scalar.
    block_rows: how many there are.

  Returns:
    int32 [p] each: the block row, `block_rows` where the value is not used, and
    the block column less `first`, which grows with the number; `columns` where
    it is none of these.
  """
  if not indices.size:
    none = jnp.zeros_like(number)
    return none + block_rows, none + columns
  ends = jnp.cumsum(counts)
  column = jnp.searchsorted(ends, number, side="right").astype(jnp.int32)
  slot = number - jnp.take(ends - counts, column, mode="clip")
  column -= first
  column = jnp.where((column >= 0) & (column < columns), column, columns)
  row = indices.at[column, slot].get(mode="fill", fill_value=block_rows)
  row = jnp.where((row >= 0) & (row < block_rows), row, block_rows)
  return row.astype(jnp.int32), column


def inside(values, row, column, shape):
  """Values with zeros in what hangs over the edge of a matrix of this shape."""
  for axis, (size, at) in enumerate(zip(shape, (row, column))):
    block = values.shape[1 + axis]
    if size % block:
      within = at[:, None] * block + jnp.arange(block) < size
      values = jnp.where(jnp.expand_dims(within, 2 - axis), values, 0)
  return values
