"""Gates of each head behind attention, from the layer's input."""

from flax import nnx
import jax
import jax.numpy as jnp

Array = jax.Array


def output_gate(
  y: Array, x: Array, kernel: Array, bias: Array | None = None
) -> Array:
  """y * sigmoid(x @ kernel + bias), of what attention returns for each head.

  Args:
    y: floating [..., heads, head_dim], before the output projection.
    x: floating [..., width], the layer's input, as the queries read it.
    kernel: [width, heads, head_dim], or [width, heads]: one gate for a head.
    bias: None, or of the kernel's shape without width.

  Returns:
    Like y. The sigmoid is of f32.

  Raises:
    ValueError: for shapes that do not fit.

  Example:
    >>> y, x = jnp.array([[2.0, 4.0]]), jnp.array([1.0])
    >>> output_gate(y, x, jnp.zeros((1, 1))).tolist()
    [[1.0, 2.0]]

  Source: gated-attention, Gated Attention for Large Language Models:
  Non-linearity, Sparsity, and Attention-Sink-Free, equation 5.
  """
  of_gates = kernel.shape[1:]
  if (
    of_gates not in (y.shape[-2:], y.shape[-2:-1])
    or x.shape != (*y.shape[:-2], *kernel.shape[:1])
    or (bias is not None and bias.shape != of_gates)
  ):
    given = None if bias is None else bias.shape
    raise ValueError(
      "y, x, kernel and bias must be [..., heads, head_dim], [..., width], "
      "[width, heads(, head_dim)] and the kernel's without width, got "
      f"{y.shape}, {x.shape}, {kernel.shape} and {given}"
    )
  scores = jnp.tensordot(x, kernel, 1).astype(jnp.float32)
  scores = scores if bias is None else scores + bias.astype(jnp.float32)
  gate = jax.nn.sigmoid(scores).astype(y.dtype)
  return y * (gate if kernel.ndim == 3 else gate[..., None])


class OutputGate(nnx.Module):
  """`output_gate` with parameters of its own.

  Goes between any attention and its output projection. Parameters begin at
  zero, so that every gate is one half.

  Args:
    in_features: width of the layer's input.
    heads: of the queries.
    head_dim: of each head, for a gate an entry; None is one gate a head.
    use_bias: whether gates have a bias; the authors' have none.
    param_dtype: of the parameters.
    rngs: as other modules take it; nothing is drawn.

  Example:
    >>> from flax import nnx
    >>> gate = OutputGate(16, 2, rngs=nnx.Rngs(0))
    >>> gate(jnp.ones((1, 5, 2, 8)), jnp.ones((1, 5, 16)))[0, 0, 0, 0].item()
    0.5

  Source: gated-attention, Gated Attention for Large Language Models:
  Non-linearity, Sparsity, and Attention-Sink-Free, equation 5. The authors draw
  the kernel as other projections.
  """

  def __init__(
    self,
    in_features: int,
    heads: int,
    head_dim: int | None = None,
    *,
    use_bias: bool = False,
    param_dtype: jnp.dtype = jnp.float32,
    rngs: nnx.Rngs,
  ):
    del rngs
    gates = (heads,) if head_dim is None else (heads, head_dim)
    self.kernel = nnx.Param(jnp.zeros((in_features, *gates), param_dtype))
    bias = nnx.Param(jnp.zeros(gates, param_dtype)) if use_bias else None
    self.bias = bias

  def __call__(self, y: Array, x: Array) -> Array:
    """Gated y [..., heads, head_dim], for inputs x [..., in_features]."""
    bias = None if self.bias is None else self.bias[...]
    return output_gate(y, x, self.kernel[...], bias)
