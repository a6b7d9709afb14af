"""The public functions, and their derivatives to any order in reverse mode.

With values v of block row r and column c let

  T(x, v, y) = sum over values p and rows i of x[i, r[p]] @ v[p] @ y[i, c[p]].

The matmul is T's derivative by y, the sampled one that by v, and the gradient
by x is the matmul by the transpose. T is linear in each argument, so that their
derivatives are among them again.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from pallas_kernels import partitioning
from pallas_kernels.block_sparse_matmul import checks
from pallas_kernels.block_sparse_matmul import dispatch
from pallas_kernels.block_sparse_matmul import reference
from pallas_kernels.block_sparse_matmul.weight import BlockSparseWeight


def block_sparse_matmul(
  x: jax.Array,
  weight: BlockSparseWeight,
  *,
  preferred_element_type=None,
  backend: str | None = None,
  interpret=False,
) -> jax.Array:
  """x @ weight, of which only the listed blocks are read and multiplied.

  Products accumulate in f32. A NaN in x reaches the columns that list its
  block row, and no others; columns without blocks are zero. Differentiable in
  x and weight.values at the cost of what is listed, in reverse mode to any
  order: `jax.grad` of `jax.grad` works, `jax.jvp` and so `jax.hessian` do not.
  The lists have no gradient (see BlockSparseWeight for how to differentiate by
  it).

  Under `jit` on a mesh the first two dimensions of x may be sharded, block
  columns (the lists of the weight) where they divide, and values along their
  first dimension, whose partial results are then summed; of x [b, t, K] nothing
  is gathered but the last dimension. Under `vmap` the rows of all calls with
  one weight run together.

  Args:
    x: floating [..., K].
    weight: BlockSparseWeight of shape (K, N), its values in the dtype of x.
    preferred_element_type: dtype of the result, by default that of x.
    backend: "tpu" (a Pallas kernel, for blocks that are multiples of 128 and
      that VMEM has room for, bf16 of 2048 x 2048 at the most or so),
      "xla", "reference" or None: what the platform has, xla for other blocks.
    interpret: runs the Pallas kernel where there is no such device: True, or
      `jax.experimental.pallas.tpu.InterpretParams(...)`.

  Returns:
    [..., N].

  Raises:
    ValueError: for shapes, dtypes or options that do not fit, naming the
      argument, and for an explicit backend that lacks what is asked.

  Example:
    >>> weight = pallas_kernels.BlockSparseWeight(
    ...   jnp.ones((1, 2, 2)), indices=[[1], [0]], counts=[1, 0], shape=(4, 4)
    ... )
    >>> pallas_kernels.block_sparse_matmul(jnp.arange(4.0), weight).tolist()
    [5.0, 5.0, 0.0, 0.0]

  Source: pixelfly, Pixelated Butterfly: block-sparse weights, which hardware
  multiplies as fast as dense ones of their size.
  """
  x = jnp.asarray(x)
  options = (preferred_element_type, backend, interpret)
  checks.check(weight, [("x", x, "K", _size(weight, 0))], *options)
  return _matmul(x, weight, _settings(weight, x, *options))


def sampled_matmul(
  x: jax.Array,
  y: jax.Array,
  weight: BlockSparseWeight,
  *,
  preferred_element_type=None,
  backend: str | None = None,
  interpret=False,
) -> jax.Array:
  """The blocks of x.T @ y that a weight lists (SDD).

  The gradient of `block_sparse_matmul` by the values, with y that of its
  result; with a list of candidates, the scores of blocks that might grow.
  Differentiable in x and y, in reverse mode; sharding and backends as
  `block_sparse_matmul`.

  Args:
    x: floating [..., K].
    y: floating [..., N]; all leading dimensions are summed over.
    weight: BlockSparseWeight of shape (K, N); of its values only the shape and
      dtype count, which is that of x and y.
    preferred_element_type: dtype of the result, by default that of x.
    backend: see `block_sparse_matmul`.
    interpret: see `block_sparse_matmul`.

  Returns:
    [nnz, bk, bn], zeros for values that are not used, and for what hangs over
    the edge of the matrix.

  Raises:
    ValueError: as `block_sparse_matmul`.

  Example:
    >>> weight = pallas_kernels.BlockSparseWeight(
    ...   jnp.ones((1, 2, 2)), indices=[[1], [0]], counts=[1, 0], shape=(4, 4)
    ... )
    >>> x, y = jnp.arange(4.0), jnp.arange(4.0)
    >>> pallas_kernels.sampled_matmul(x, y, weight).tolist()
    [[[0.0, 2.0], [0.0, 3.0]]]

  Source: pixelfly, Pixelated Butterfly.
  """
  x, y = jnp.asarray(x), jnp.asarray(y)
  options = (preferred_element_type, backend, interpret)
  sides = [("x", x, "K", _size(weight, 0)), ("y", y, "N", _size(weight, 1))]
  checks.check(weight, sides, *options)
  return _sampled_matmul(x, y, weight, _settings(weight, x, *options))


def _size(weight, axis):
  return getattr(weight, "shape", (0, 0))[axis]


def _settings(weight, x, dtype, backend, interpret):
  return dispatch.Settings(
    shape=weight.shape,
    values=weight.values.shape,
    dtype=jnp.dtype(dtype or x.dtype),
    backend=backend or "auto",
    interpret=interpret,
  )


# Jitted, so that a call outside of jit does not trace its loops again.
@functools.partial(jax.jit, static_argnames="settings")
def _matmul(x, weight, settings):
  lead, size = x.shape[:-1], weight.shape[1]
  if 0 in (*x.shape, *weight.shape, weight.values.size, weight.indices.size):
    return jnp.zeros((*lead, size), settings.dtype)
  x = _rows(x, weight, 0)
  if settings.backend == "reference":
    out = reference.product(x, weight, settings.dtype)
  else:
    out = _product(x, weight.values, _lists(weight), settings, False)
  return out[..., :size].reshape(*lead, size)


@functools.partial(jax.jit, static_argnames="settings")
def _sampled_matmul(x, y, weight, settings):
  if 0 in (*x.shape, *y.shape, weight.values.size, weight.indices.size):
    return jnp.zeros(weight.values.shape, settings.dtype)
  x, y = _rows(x, weight, 0), _rows(y, weight, 1)
  if settings.backend == "reference":
    return reference.sampled(x, y, weight, settings.dtype)
  return _sampled(x, y, weight.values, _lists(weight), settings)


def _rows(x, weight, axis):
  """[..., K or N] -> [b, t, whole blocks]: the first axis, all others."""
  x = x[None] if x.ndim == 1 else x
  x = x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])
  return jnp.pad(x, [(0, 0), (0, 0), (0, -x.shape[-1] % weight.block[axis])])


def _lists(weight):
  return weight.indices, weight.counts, weight.edges


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _product(x, values, lists, settings, transpose):
  return dispatch.product(x, values, lists, settings, transpose)


def _product_fwd(x, values, lists, settings, transpose):
  out = _product(x, values, lists, settings, transpose)
  return out, (x, values, lists)


def _product_bwd(settings, transpose, residuals, dout):
  x, values, lists = residuals
  settings = dataclasses.replace(settings, dtype=x.dtype)
  dout = dout.astype(x.dtype)
  dx = _product(dout, values, lists, settings, not transpose)
  sides = (dout, x) if transpose else (x, dout)
  dvalues = _sampled(*sides, values, lists, settings)
  return *_like((dx, dvalues), (x, values)), None


_product.defvjp(_product_fwd, _product_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _sampled(x, y, like, lists, settings):
  """Of `like` only shape and sharding count: those of the result."""
  return dispatch.sampled(x, y, like, lists, settings)


def _sampled_fwd(x, y, like, lists, settings):
  return _sampled(x, y, like, lists, settings), (x, y, lists)


def _sampled_bwd(settings, residuals, dvalues):
  x, y, lists = residuals
  settings = dataclasses.replace(settings, dtype=x.dtype)
  dvalues = dvalues.astype(x.dtype)
  dx = _product(y, dvalues, lists, settings, True)
  dy = _product(x, dvalues, lists, settings, False)
  return *_like((dx, dy), (x, y)), None, None


_sampled.defvjp(_sampled_fwd, _sampled_bwd)


def _like(grads, primals):
  """Gradients as shard_map wants them: equal where their primals are."""
  return jax.tree.map(partitioning.sum_like, grads, primals)
