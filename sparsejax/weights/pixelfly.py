"""A linear layer of a flat block butterfly and a low-rank term."""

import functools

from flax import nnx
from flax.nnx.nn import dtypes
import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from sparsejax.select import patterns
from sparsejax.weights import rules

Array = jax.Array


class Pixelfly(nnx.Module):
  """`y = gamma x B + (1 - gamma) x U V.T + b`, in the place of `nnx.Linear`.

  B has blocks where `sparsejax.select.flat_block_butterfly` has them: of n x n
  blocks (i, i) and (i, i xor 1), (i, i xor 2), (i, i xor 4) ..., n log n. They
  alone exist, are multiplied and trained. gamma is learned, one scalar.

  How it begins is a choice of this library: gamma at 1/2, and B, U and V such
  that outputs have the variance of `nnx.Linear`'s. (The authors' code has a
  gate for each row of x, or 1/2, in the place of gamma.)

  Sparse as it is, a sparsifier of a whole model should leave it alone: by
  default `where` takes `values`, `down` and `up` for weights like others.

  The paper's attention scores have the same blocks:
  `sparsejax.attention.patterns.butterfly`.

  Attributes:
    values: nnx.Param [blocks, block, block], the blocks of B, block column
      after block column.
    down: nnx.Param [in_features, rank], U.
    up: nnx.Param [rank, out_features], V transposed.
    gamma: nnx.Param [].
    bias: nnx.Param [out_features], or None.

  Args:
    in_features: size of the last axis of x.
    out_features: size of the result's.
    block: rows and columns of a block; it divides both sizes, and the blocks
      along one divide those along the other.
    rank: columns of U and V, 1 or more.
    max_stride: the largest i xor j of blocks, a power of two; None for all.
    use_bias: whether there is b.
    dtype: what is computed in; None for what x and the parameters promote to.
    param_dtype: of the parameters.
    rngs: `nnx.Rngs` with a stream "params".

  Raises:
    ValueError: block or max_stride do not fit, or rank is below 1.

  Source: [pixelfly] Dao et al., Pixelated Butterfly: Simple and Efficient
    Sparse training for Neural Network Models, sec. 3.

  >>> from flax import nnx
  >>> layer = weights.Pixelfly(64, 128, block=8, rank=4, rngs=nnx.Rngs(0))
  >>> layer(jnp.ones((3, 64))).shape, layer.values.shape
  ((3, 128), (64, 8, 8))
  """

  def __init__(
    self,
    in_features: int,
    out_features: int,
    *,
    block: int,
    rank: int,
    max_stride: int | None = None,
    use_bias: bool = True,
    dtype=None,
    param_dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    for name, value in dict(block=block, rank=rank).items():
      rules.check_step(name, value)
    if rank < 1:
      raise ValueError(f"rank must be at least 1, got {rank}")
    self.in_features = in_features
    self.out_features = out_features
    self.block = block
    self.max_stride = max_stride
    self.dtype = dtype
    _, counts, edges = self._lists()

    # Each term has variance 2, of which gamma^2 = (1 - gamma)^2 = 1/4 is left.
    def normal(shape, variance):
      draw = nnx.initializers.normal(variance**0.5)
      return nnx.Param(draw(rngs.params(), shape, param_dtype))

    fan_in = block * counts.mean() if counts.any() else 1.0
    self.values = normal((len(edges), block, block), 2 / fan_in)
    self.down = normal((in_features, rank), 2**0.5 / max(in_features, 1))
    self.up = normal((rank, out_features), 2**0.5 / rank)
    self.gamma = nnx.Param(jnp.asarray(0.5, param_dtype))
    self.bias = nnx.data(None)
    if use_bias:
      self.bias = nnx.Param(jnp.zeros(out_features, param_dtype))

  def _lists(self):
    shape = (self.in_features, self.out_features)
    return _butterfly(shape, self.block, self.max_stride)

  def _weight(self, values):
    indices, counts, edges = self._lists()
    shape = (self.in_features, self.out_features)
    return pallas_kernels.BlockSparseWeight(
      values, indices, counts, shape, edges
    )

  def __call__(self, x: Array) -> Array:
    """The layer's result.

    Args:
      x: floating [..., in_features].

    Returns:
      [..., out_features].

    Raises:
      ValueError: x has another size.
    """
    if not jnp.ndim(x) or jnp.shape(x)[-1] != self.in_features:
      raise ValueError(
        f"x must be [..., {self.in_features}], got {jnp.shape(x)}"
      )
    params = (self.values, self.down, self.up, self.gamma, self.bias)
    params = [None if p is None else p[...] for p in params]
    x, values, down, up, gamma, bias = dtypes.promote_dtype(
      (x, *params), dtype=self.dtype
    )
    sparse = pallas_kernels.block_sparse_matmul(x, self._weight(values))
    low_rank = x @ down @ up
    y = gamma * sparse + (1 - gamma) * low_rank
    return y if bias is None else y + bias

  def dense(self) -> Array:
    """The matrix that x is multiplied by, [in_features, out_features]."""
    gamma = self.gamma[...]
    sparse = self._weight(self.values[...]).dense()
    return gamma * sparse + (1 - gamma) * (self.down[...] @ self.up[...])


@functools.lru_cache(maxsize=64)
def _butterfly(shape, block, max_stride):
  """The lists of `BlockSparseWeight`, in NumPy: indices, counts, edges."""
  if block < 1 or shape[0] % block or shape[1] % block:
    raise ValueError(
      f"block must divide in_features and out_features, got {block} for {shape}"
    )
  blocks = shape[0] // block, shape[1] // block
  mask = patterns.flat_block_butterfly(blocks, 1, max_stride)
  counts = mask.sum(0, dtype=np.int32)
  longest = counts.max(initial=0)
  indices = np.argsort(~mask, axis=0, kind="stable")[:longest].T
  rows = np.nonzero(mask.T)[1]  # of the values, column after column
  edges = np.argsort(rows, kind="stable")
  return indices.astype(np.int32), counts, edges.astype(np.int32)
