"""Dense weights that multiply as n:m ones, forward and backward alike."""

import dataclasses
import functools

import jax
from jax import lax
import jax.numpy as jnp

from sparsejax.select import structures

Array = jax.Array


def bidirectional_matmul(x: Array, w: Array, n: int, m: int) -> Array:
  """`x @ w` under n:m masks, one for each direction.

  Forward, every m consecutive weights along the inputs keep their n largest
  magnitudes: `y = x @ in(w)`. The gradient by x keeps n of every m along the
  outputs: `dx = dy @ out(w).T`. So both multiply by weights that are n:m along
  the axis they sum over. The gradient by w is that of the dense product, `x.T @
  dy`, and trains dense weights, whose masks are chosen anew in every call; of
  equal magnitudes the first are kept. n = m is dense. Zeros are computed: only
  hardware for n:m weights would save them.

  Args:
    x: floating [..., inputs].
    w: floating [inputs, outputs], of the dtype of x.
    n: weights kept of each group.
    m: weights in a group; it divides inputs and outputs.

  Returns:
    [..., outputs], of the dtype of x. Differentiable in reverse mode.

  Raises:
    ValueError: shapes or dtypes do not fit, m does not divide both axes of w,
      or n is not in [0, m].

  Source: [bdwp] Fang et al., Efficient N:M Sparse DNN Training Using Algorithm,
    Architecture, and Dataflow Co-Design, bidirectional weight pruning.

  >>> w = jnp.array([[1.0, 4.0], [3.0, 2.0]])
  >>> weights.bidirectional_matmul(jnp.ones(2), w, 1, 2).tolist()
  [3.0, 4.0]
  >>> y = lambda x: weights.bidirectional_matmul(x, w, 1, 2).sum()
  >>> jax.grad(y)(jnp.ones(2)).tolist()
  [4.0, 3.0]
  """
  x, w = jnp.asarray(x), jnp.asarray(w)
  if x.ndim < 1 or w.ndim != 2 or x.shape[-1] != w.shape[0]:
    raise ValueError(
      "x must be [..., inputs] and w [inputs, outputs], got shapes "
      f"{x.shape} and {w.shape}"
    )
  if x.dtype != w.dtype or not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(
      f"x and w must have one floating dtype, got {x.dtype} and {w.dtype}"
    )
  return BidirectionalDot(n, m)(x, w, (((x.ndim - 1,), (0,)), ((), ())))


@dataclasses.dataclass(frozen=True)
class BidirectionalDot:
  """`bidirectional_matmul` as the `dot_general` of a dense layer.

  For `nnx.Linear(dot_general=...)` and `flax.linen.Dense(dot_general=...)`: a
  product of the last axis of x with the first of a kernel [inputs, outputs].

  Attributes:
    n: weights kept of each group.
    m: weights in a group; it divides inputs and outputs.

  Raises:
    ValueError: n is not in [0, m]; when called, dimension numbers or shapes of
      another product, or m does not divide both axes of the kernel.

  Source: [bdwp] as `bidirectional_matmul`.

  >>> from flax import nnx
  >>> dot = weights.BidirectionalDot(2, 8)
  >>> layer = nnx.Linear(16, 8, dot_general=dot, rngs=nnx.Rngs(0))
  >>> layer(jnp.ones((3, 16))).shape
  (3, 8)
  """

  n: int
  m: int

  def __post_init__(self):
    structures.NM(self.n, self.m)  # refuses what is no pattern

  def __call__(self, x, w, dimension_numbers, precision=None, **options):
    (over, batch) = jax.tree.map(
      int, tuple(tuple(map(tuple, part)) for part in dimension_numbers)
    )
    if w.ndim != 2 or over != ((x.ndim - 1,), (0,)) or batch != ((), ()):
      raise ValueError(
        "dimension_numbers must be of the last axis of x and the first of a "
        f"kernel [inputs, outputs], got {dimension_numbers} for shapes "
        f"{x.shape} and {w.shape}"
      )
    for axis in (0, 1):
      structures.NM(self.n, self.m, axis).check(w.shape, structures.Axes())
    options = {k: v for k, v in options.items() if v is not None}
    dot = functools.partial(
      lax.dot_general,
      dimension_numbers=dimension_numbers,
      precision=precision,
      **options,
    )

    # With the vjp of the dense product, so that n = m is it to the bit.
    @jax.custom_vjp
    def product(x, w):
      return dot(x, self._kept(w, 0))

    def backward(residuals, dy):
      x, w = residuals
      return jax.vjp(dot, x, self._kept(w, 1))[1](dy)

    product.defvjp(lambda x, w: (product(x, w), (x, w)), backward)
    return product(x, w)

  def _kept(self, w, axis):
    if self.n == self.m:
      return w
    size = jnp.abs(w).astype(jnp.float32)
    mask = structures.NM(self.n, self.m, axis).mask(size)
    return jnp.where(mask, w, jnp.zeros((), w.dtype))
