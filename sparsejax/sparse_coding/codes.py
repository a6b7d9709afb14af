"""Sparse codes: of each row the latents that are active, and what they make."""

from collections.abc import Callable
import dataclasses

import jax
from jax import lax
import jax.numpy as jnp

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Code:
  """The active latents of rows, as lists of equal length.

  Attributes:
    values: [..., k]; a latent whose value is 0 is not active.
    indices: int32 [..., k], none twice in a row.
    latents: how many there are.
  """

  values: Array
  indices: Array
  latents: int = dataclasses.field(metadata={"static": True})

  def dense(self) -> Array:
    """All latents, [..., latents], zeros included.

    >>> code = Code(jnp.array([[2.0, 3.0]]), jnp.array([[3, 0]]), 4)
    >>> code.dense().tolist()
    [[3.0, 0.0, 0.0, 2.0]]
    """
    shape = (*self.values.shape[:-1], self.latents)
    zeros = jnp.zeros(shape, self.values.dtype)
    return jnp.put_along_axis(
      zeros, self.indices, self.values, axis=-1, inplace=False
    )


def top_k(
  pre: Array, k: int, *, scores: Callable[[Array], Array] | None = None
) -> Code:
  """Keeps the k latents with the largest scores of each row, if positive.

  Args:
    pre: pre-activations, floating [..., latents].
    k: how many of a row are kept, static, from 0 to all.
    scores: function of `pre` that gives scores of its shape, default `pre`
      itself; equal ones go to the lower index. It carries no gradient.

  Returns:
    A Code whose values are what is positive of `pre`.

  Raises:
    ValueError: for a k that does not fit, or pre-activations not floating.

  Example:
    >>> top_k(jnp.array([1.0, -2.0, 3.0]), 1).dense().tolist()
    [0.0, 0.0, 3.0]

  Source: topk-sae, Scaling and evaluating sparse autoencoders, section 2.3.
  """
  if not jnp.issubdtype(pre.dtype, jnp.floating):
    raise ValueError(f"pre must be floating, got {pre.dtype}")
  check_k(k, pre.shape[-1])
  ranked = lax.stop_gradient(pre)
  if scores is not None:
    ranked = lax.stop_gradient(scores(ranked))
  _, indices = lax.top_k(ranked, k)
  values = jax.nn.relu(jnp.take_along_axis(pre, indices, axis=-1))
  return Code(values, indices.astype(jnp.int32), pre.shape[-1])


def encode_top_k(
  x: Array,
  kernel: Array,
  bias: Array,
  k: int,
  *,
  scores: Callable[[Array], Array] | None = None,
) -> Code:
  """`top_k` of `x @ kernel.T + bias`.

  Args:
    x: [..., width].
    kernel: [latents, width].
    bias: [latents].
    k: as `top_k` takes it.
    scores: likewise.

  Returns:
    The Code.

  Raises:
    ValueError: for a k that does not fit.

  Example:
    >>> code = encode_top_k(jnp.ones(2), jnp.eye(2), jnp.array([0.0, 1.0]), 1)
    >>> code.dense().tolist()
    [0.0, 2.0]
  """
  return top_k(x @ kernel.T + bias, k, scores=scores)


def decode(code: Code | Array, dictionary: Array) -> Array:
  """The sum of the atoms that a code names, each by its value.

  Args:
    code: a Code, or dense latents [..., latents].
    dictionary: [latents, width], an atom a row.

  Returns:
    [..., width].

  Example:
    >>> code = Code(jnp.array([2.0, 1.0]), jnp.array([2, 0]), 3)
    >>> decode(code, jnp.array([[1.0, 0.0], [5.0, 5.0], [0.0, 1.0]])).tolist()
    [1.0, 2.0]
  """
  if isinstance(code, Code):
    return jnp.einsum("...k,...kd->...d", code.values, dictionary[code.indices])
  return code @ dictionary


def check_k(k: int, latents: int) -> None:
  """ValueError for a k that is no number of latents."""
  if isinstance(k, bool) or not isinstance(k, int) or not 0 <= k <= latents:
    raise ValueError(f"k must be an integer from 0 to {latents}, got {k!r}")
