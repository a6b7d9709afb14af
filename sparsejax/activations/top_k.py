"""The k largest activations of each token, exactly and by statistics."""

import statistics

import jax
from jax import lax
import jax.numpy as jnp

from sparsejax import select

Array = jax.Array


def top_k(x: Array, k: int, *, by_magnitude: bool = False) -> Array:
  """Keeps the k largest of each token, zeroes the others.

  Gradients pass through what is kept alone.

  Args:
    x: floating [..., neurons], after a ReLU in the paper, so that at most k are
      not zero.
    k: from 0 to all, static.
    by_magnitude: whether sizes are compared, instead of values.

  Returns:
    Like x. Of equal ones the first are kept. NaN comes last.

  Raises:
    ValueError: x is not floating, or k out of range.

  Example:
    >>> top_k(jnp.array([[1.0, 3.0, 3.0, 2.0]]), 2).tolist()
    [[0.0, 3.0, 3.0, 0.0]]

  Source: lazy-neuron-topk, The Lazy Neuron Phenomenon: On Emergence of
  Activation Sparsity in Transformers, section 4.
  """
  ranked = lax.stop_gradient(jnp.abs(x) if by_magnitude else x)
  return jnp.where(select.top_k_mask(ranked, k, axis=-1), x, 0)


def statistical_top_k(x: Array, k: float) -> Array:
  """What exceeds a threshold that about k of each token exceed, less it.

  The threshold is mean + std * quantile(1 - k / neurons), of the standard
  normal distribution: about k are above where activations are normal (of one
  token give or take 13% of 16 of 128, or 3.6% of 328 of 4096), fewer where
  tails are heavy. Nothing is sorted, and the result is continuous. Gradients
  pass through the mean and the deviation, too.

  Args:
    x: floating [..., neurons].
    k: how many are about to be kept, above 0 and below all, static.

  Returns:
    Like x: max(x - threshold, 0), computed in f32. A token whose activations
    are all equal gives zeros.

  Raises:
    ValueError: x is not floating, or k out of range.

  Example:
    >>> statistical_top_k(jnp.array([1.0, 2.0, 3.0, 4.0]), 2).tolist()
    [0.0, 0.0, 0.5, 1.5]

  Source: spark-transformer, Spark Transformer: Reactivating Sparsity in FFN and
  Attention, section 3. The variance is divided by the number of neurons, as
  Gemma 3n's code does; what the paper divides by could not be read.
  """
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(f"x must be floating, got {x.dtype}")
  neurons = x.shape[-1]
  if not 0 < k < neurons:
    raise ValueError(f"k must be above 0 and below {neurons}, got {k}")
  values = x.astype(jnp.float32)
  mean = values.mean(-1, keepdims=True)
  variance = ((values - mean) ** 2).mean(-1, keepdims=True)
  # The root has no slope at 0, and what is equal has no order.
  varies = variance > 0
  std = jnp.where(varies, jnp.sqrt(jnp.where(varies, variance, 1)), 0)
  quantile = -statistics.NormalDist().inv_cdf(k / neurons)
  return jax.nn.relu(values - mean - std * quantile).astype(x.dtype)
