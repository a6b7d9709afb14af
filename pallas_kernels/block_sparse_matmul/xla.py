"""Block-sparse matmul as plain XLA: the fast path on CPU.

The source block of each value is gathered, all are multiplied in one batched
product, and what comes out is added to its target block. So exactly what is
listed is computed, however it is distributed. A step takes as many values as
keep what it holds in the cache.
"""

from jax import lax
import jax.numpy as jnp

from pallas_kernels import partitioning

STEP_BYTES = 2**22  # of gathered blocks and of products, together
f32 = jnp.float32


def product(x, values, source, target, sources, targets, *, transpose, dtype,
            share=1.0):  # fmt: skip
  """Adds x[source] @ value to the target, for each value.

  Args:
    x: [rows, sources * width].
    values: [nnz, bk, bn].
    source: int32 [nnz], the block of x; `sources` for none.
    target: int32 [nnz], the block of the result; `targets` for none.
    sources: blocks of x.
    targets: blocks of the result.
    transpose: whether to multiply by the transposed values.
    dtype: of the result.
    share: of the values that are used, probably.

  Returns:
    [rows, targets * width].
  """
  rows = x.shape[0]
  x = x.reshape(rows, sources, -1).swapaxes(0, 1)
  form = "pbj,pij->pbi" if transpose else "pbi,pij->pbj"

  def step(out, cut, mine):
    blocks = _take(x, cut(source))
    y = jnp.einsum(form, blocks, cut(values), preferred_element_type=f32)
    to = jnp.where(mine, cut(target), targets)
    return out.at[to].add(y, mode="drop")

  out = jnp.zeros((targets, rows, values.shape[1 if transpose else 2]), f32)
  out, *_ = partitioning.vary_alike(out, x, values, source, target)
  used = (source < sources) & (target < targets)
  size = _size(rows, values.shape, share)
  out = _in_steps(step, out, used, size)
  return out.swapaxes(0, 1).reshape(rows, -1).astype(dtype)


def sampled(x, y, row, column, rows, columns, *, dtype, share=1.0):
  """x[row].T @ y[column] for each value, summed over the leading axis.

  Args:
    x: [b, rows * bk].
    y: [b, columns * bn].
    row: int32 [nnz], the block of x; `rows` for none.
    column: int32 [nnz], the block of y; `columns` for none.
    rows: blocks of x.
    columns: blocks of y.
    dtype: of the result.
    share: of the values that are used, probably.

  Returns:
    [nnz, bk, bn]; zeros where there is no block.
  """
  b = x.shape[0]
  x = x.reshape(b, rows, -1).swapaxes(0, 1)
  y = y.reshape(b, columns, -1).swapaxes(0, 1)
  number = jnp.arange(row.size)

  def step(out, cut, mine):
    found = jnp.einsum(
      "pbi,pbj->pij",
      _take(x, cut(row)),
      _take(y, cut(column)),
      preferred_element_type=f32,
    )
    found = jnp.where(mine[:, None, None], found, 0).astype(dtype)
    to = jnp.where(mine, cut(number), row.size)
    return out.at[to].set(found, mode="drop")

  out = jnp.zeros((row.size, x.shape[2], y.shape[2]), dtype)
  out, *_ = partitioning.vary_alike(out, x, y, row, column)
  used = (row < rows) & (column < columns)
  return _in_steps(step, out, used, _size(b, out.shape, share))


def _take(x, index):
  """Blocks of x; any block where there is none."""
  return x.at[index].get(mode="clip", wrap_negative_indices=False)


def _size(rows, values, share):
  """How many values a step takes."""
  nnz, bk, bn = values
  return min(STEP_BYTES // (4 * rows * (bk + bn)), int(share * nnz)) or 1


def _in_steps(step, out, used, size):
  """out = step(out, cut, mine) over runs of `size` values.

  `cut` takes an array's part of the run, `mine` says which of it are used and
  not done before. Runs at the ends of which nothing is used are left out.
  """
  nnz = used.size
  if size >= nnz:
    return step(out, lambda x: x, used)
  first, last = jnp.argmax(used), nnz - jnp.argmax(used[::-1])

  def one(i, out):
    at = jnp.minimum(i * size, nnz - size)
    cut = lambda x: lax.dynamic_slice_in_dim(x, at, size)
    mine = cut(used) & (at + jnp.arange(size) >= i * size)
    return step(out, cut, mine)

  return lax.fori_loop(first // size, -(-last // size), one, out)
