"""Which latents of a batch stay: the choices that are no top-k of rows."""

from collections.abc import Callable
import functools
import math

import jax
from jax import lax
import jax.numpy as jnp

from sparsejax import select

Array = jax.Array


def batch_top_k(pre: Array, k: float) -> Array:
  """Keeps k latents a row on average: the largest of all rows together.

  Args:
    pre: pre-activations, floating [..., latents].
    k: from 0 to all of a row, static; floor(k * rows) are kept.

  Returns:
    Like pre: what is kept and positive, else 0. Equal ones go to the first.

  Raises:
    ValueError: for a k that does not fit.

  Example:
    >>> batch_top_k(jnp.array([[3.0, 2.0], [1.0, -1.0]]), 1).tolist()
    [[3.0, 2.0], [0.0, 0.0]]

  Source: batch-topk-sae, BatchTopK Sparse Autoencoders, section 3.
  """
  if not 0 <= k <= pre.shape[-1]:
    raise ValueError(f"k must be from 0 to {pre.shape[-1]}, got {k}")
  return mutual_choice(pre, math.floor(k * (pre.size // pre.shape[-1])))


def mutual_choice(pre: Array, total: int) -> Array:
  """Keeps `total` of all pairs of a row and a latent: the largest.

  Args:
    pre: pre-activations, floating [..., latents].
    total: how many are kept, static or traced.

  Returns:
    Like pre: what is kept and positive, else 0. Equal ones go to the first.

  Raises:
    ValueError: for a total that does not fit.

  Example:
    >>> mutual_choice(jnp.array([[3.0, 2.0], [1.0, -1.0]]), 3).tolist()
    [[3.0, 2.0], [1.0, 0.0]]

  Source: mutual-feature-choice-sae, Adaptive Sparse Allocation with Mutual
  Choice & Feature Choice Sparse Autoencoders, section 3.
  """
  z = jax.nn.relu(pre)
  return jnp.where(select.top_k_mask(lax.stop_gradient(z), total), z, 0)


def feature_choice(pre: Array, counts: Array) -> Array:
  """Keeps of each latent the rows in which it is largest.

  Args:
    pre: pre-activations, floating [..., latents].
    counts: int [latents], how many rows each latent is given; see
      `zipf_counts`.

  Returns:
    Like pre: what is kept and positive, else 0. Equal ones go to the first row.

  Raises:
    ValueError: for counts of another number of latents.

  Example:
    >>> pre = jnp.array([[3.0, 2.0], [1.0, 4.0]])
    >>> feature_choice(pre, jnp.array([2, 1])).tolist()
    [[3.0, 0.0], [1.0, 4.0]]

  Source: mutual-feature-choice-sae, Adaptive Sparse Allocation with Mutual
  Choice & Feature Choice Sparse Autoencoders, section 3.
  """
  counts = jnp.asarray(counts)
  if counts.shape != pre.shape[-1:]:
    raise ValueError(
      f"counts must be [{pre.shape[-1]}], got {list(counts.shape)}"
    )
  z = jax.nn.relu(pre).reshape(-1, pre.shape[-1])
  kept = select.top_k_mask(lax.stop_gradient(z), counts[None], axis=0)
  return jnp.where(kept, z, 0).reshape(pre.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def jump_relu(pre: Array, threshold: Array, bandwidth: float) -> Array:
  """What is above the threshold, as it is; else 0.

  The gradient of the threshold is that of a smoothed step: what lies nearer to
  it than half the bandwidth counts.

  Args:
    pre: pre-activations, floating [..., latents].
    threshold: [latents], positive.
    bandwidth: of the rectangle that smooths, positive and static.

  Returns:
    Like pre.

  Example:
    >>> jump_relu(jnp.array([0.1, 0.3]), jnp.array([0.2, 0.2]), 0.5).tolist()
    [0.0, 0.30000001192092896]

  Source: jumprelu-sae, Jumping Ahead: Improving Reconstruction Fidelity with
  JumpReLU Sparse Autoencoders, equation 11; gemma-scope, Gemma Scope.
  """
  return jnp.where(pre > threshold, pre, 0)


def _jump_relu_forward(pre, threshold, bandwidth):
  return jump_relu(pre, threshold, bandwidth), (pre, threshold)


def _jump_relu_backward(bandwidth, kept, given):
  pre, threshold = kept
  near = _near(pre, threshold, bandwidth)
  to_threshold = -(threshold / bandwidth) * near * given
  return (
    jnp.where(pre > threshold, given, 0),
    _summed(to_threshold, threshold),
  )


jump_relu.defvjp(_jump_relu_forward, _jump_relu_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def step(pre: Array, threshold: Array, bandwidth: float) -> Array:
  """1 above the threshold, else 0; the sum over latents is L0.

  Args:
    pre: pre-activations, floating [..., latents]; they get no gradient.
    threshold: [latents], whose gradient is that of a smoothed step.
    bandwidth: of the rectangle that smooths, positive and static.

  Returns:
    Like pre.

  Example:
    >>> step(jnp.array([0.1, 0.3]), jnp.array([0.2, 0.2]), 0.5).tolist()
    [0.0, 1.0]

  Source: jumprelu-sae, Jumping Ahead: Improving Reconstruction Fidelity with
  JumpReLU Sparse Autoencoders, equation 12.
  """
  return (pre > threshold).astype(pre.dtype)


def _step_forward(pre, threshold, bandwidth):
  return step(pre, threshold, bandwidth), (pre, threshold)


def _step_backward(bandwidth, kept, given):
  pre, threshold = kept
  to_threshold = -_near(pre, threshold, bandwidth) * given / bandwidth
  return jnp.zeros_like(pre), _summed(to_threshold, threshold)


step.defvjp(_step_forward, _step_backward)


def _near(pre, threshold, bandwidth):
  return jnp.abs(pre - threshold) < bandwidth / 2


def _summed(x, like):
  """Over the leading axes, which `like` was broadcast along."""
  axes = tuple(range(x.ndim - like.ndim))
  return x.astype(jnp.float32).sum(axes).astype(like.dtype)


def norm_aware(dictionary: Array) -> Callable[[Array], Array]:
  """Scores by what a latent adds: its value times the norm of its atom.

  To be the `scores` of `top_k`: the choice then stays where an atom is scaled
  and its encoder row by the inverse.

  >>> score = norm_aware(jnp.array([[1.0, 0.0], [3.0, 4.0]]))
  >>> score(jnp.array([2.0, 1.0])).tolist()
  [2.0, 5.0]

  Source: llama-scope, Llama Scope: Extracting Millions of Features from
  Llama-3.1-8B with Sparse Autoencoders, section 3.
  """
  norms = jnp.linalg.norm(dictionary, axis=-1)
  return lambda pre: jax.nn.relu(pre) * norms


def gradient_aware(
  dictionary: Array, gradient: Array, beta: float
) -> Callable[[Array], Array]:
  """Scores that also see how an atom would change the loss downstream.

  Args:
    dictionary: [latents, width].
    gradient: [..., width], of the loss in what is to be reconstructed.
    beta: how much that counts; 0 is `top_k` of the values.

  Returns:
    A function of pre-activations, to be the `scores` of `top_k`.

  >>> score = gradient_aware(jnp.eye(2), jnp.array([0.0, 2.0]), 1.0)
  >>> score(jnp.array([2.0, 1.0])).tolist()
  [2.0, 3.0]

  Source: g-sae, Features that Make a Difference: Leveraging Gradients for
  Improved Dictionary Learning, section 3.
  """
  pull = jnp.abs(gradient @ dictionary.T)

  def score(pre):
    z = jax.nn.relu(pre)
    return z + beta * z * pull

  return score
