"""Which latents of a batch stay: the choices that are no top-k of rows.

NaN is never dropped: it stays NaN in every code here.
"""

from collections.abc import Callable
import functools
import math

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

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
  return kept(select.top_k_mask(lax.stop_gradient(z), total), z)


def feature_choice(pre: Array, counts: Array) -> Array:
  """Keeps of each latent the rows in which it is largest.

  Args:
    pre: pre-activations, floating [..., latents].
    counts: int [latents], how many rows each latent is given, at most all
      there are; see `zipf_counts`.

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
  counts = jnp.minimum(counts, len(z))[None]
  mask = select.top_k_mask(lax.stop_gradient(z), counts, axis=0)
  return kept(mask, z).reshape(pre.shape)


def zipf_counts(
  total: int, latents: int, *, exponent: float, offset: float = 0.0, most: int
) -> np.ndarray:
  """How many rows each latent is given, falling as a power of its rank.

  The shares go with `(rank + offset) ** -exponent`. What a latent cannot take
  goes to the others, and what rounding leaves to the largest remainders.

  Args:
    total: how many there are to give, such as k times the rows of a batch.
    latents: how many.
    exponent: 0 is an even choice.
    offset: above -1.
    most: of a latent, such as the rows of a batch.

  Returns:
    int32 [latents], of the sum min(total, latents * most).

  Raises:
    ValueError: for a number that is negative or no integer where it counts,
      or an offset that does not fit.

  Example:
    >>> zipf_counts(11, 3, exponent=1.0, most=4).tolist()
    [4, 4, 3]

  Source: mutual-feature-choice-sae, Adaptive Sparse Allocation with Mutual
  Choice & Feature Choice Sparse Autoencoders, section 3.
  """
  for name, value in dict(total=total, latents=latents, most=most).items():
    if not isinstance(value, int) or value < 0:
      raise ValueError(f"{name} must be an integer >= 0, got {value!r}")
  total = min(total, latents * most)
  shares = total * zipf_shares(latents, exponent, offset)
  for _ in range(latents):
    full = shares >= most
    free = shares[~full].sum()
    if not (shares > most).any() or not free:
      break
    shares = np.where(full, most, shares * (total - most * full.sum()) / free)
  # A share that is whole but for rounding is whole.
  counts = np.floor(np.minimum(shares, most) + 1e-9).astype(np.int32)
  left = np.argsort(counts - shares.round(9), kind="stable")
  counts[left[: total - counts.sum()]] += 1
  return counts


def zipf_shares(latents: int, exponent: float, offset: float) -> np.ndarray:
  """f64 [latents] of the sum 1: (rank + offset) ** -exponent."""
  if not exponent >= 0:
    raise ValueError(f"exponent must be at least 0, got {exponent}")
  if not offset > -1:
    raise ValueError(f"offset must be above -1, got {offset}")
  shares = (np.arange(1, latents + 1) + float(offset)) ** -float(exponent)
  return shares / shares.sum()


def kept(mask: Array, z: Array) -> Array:
  """What a mask keeps of codes, and NaN."""
  return jnp.where(mask | jnp.isnan(z), z, 0)


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
  return above(pre, threshold)


def above(pre: Array, threshold: Array) -> Array:
  """What is above a threshold, and NaN."""
  return jnp.where(pre <= threshold, 0, pre)


def _jump_relu_forward(pre, threshold, bandwidth):
  return jump_relu(pre, threshold, bandwidth), (pre, threshold)


def _jump_relu_backward(bandwidth, kept, given):
  pre, threshold = kept
  near = _near(pre, threshold, bandwidth)
  to_threshold = jnp.where(near, -given * threshold / bandwidth, 0)
  to_pre = jnp.where(pre <= threshold, 0, given)
  return to_pre, _summed(to_threshold, threshold)


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
  near = _near(pre, threshold, bandwidth)
  to_threshold = jnp.where(near, -given / bandwidth, 0)
  return jnp.zeros_like(pre), _summed(to_threshold, threshold)


step.defvjp(_step_forward, _step_backward)


def _near(pre, threshold, bandwidth):
  return jnp.abs(pre - threshold) < bandwidth / 2


def _summed(x, like):
  """Over the leading axes, which `like` was broadcast along."""
  axes = tuple(range(x.ndim - like.ndim))
  return x.astype(jnp.float32).sum(axes).astype(like.dtype)


def norm_aware(
  dictionary: Array, gradient: None = None
) -> Callable[[Array], Array]:
  """Scores by what a latent adds: its value times the norm of its atom.

  To be the `score` of an `Autoencoder`, or the `scores` of `top_k`: the choice
  then stays where an atom is scaled and its encoder row by the inverse.

  Args:
    dictionary: [latents, width].
    gradient: None; it is here because the scores of others look at one.

  Returns:
    A function of pre-activations.

  Raises:
    ValueError: for a gradient.

  Example:
    >>> score = norm_aware(jnp.array([[1.0, 0.0], [3.0, 4.0]]))
    >>> score(jnp.array([2.0, 1.0])).tolist()
    [2.0, 5.0]

  Source: llama-scope, Llama Scope: Extracting Millions of Features from
  Llama-3.1-8B with Sparse Autoencoders, section 3.
  """
  if gradient is not None:
    raise ValueError("gradient must be None: only the norms of atoms count")
  del gradient  # as `score` of an Autoencoder it is given one
  norms = jnp.linalg.norm(dictionary, axis=-1)
  return lambda pre: jax.nn.relu(pre) * norms


def gradient_aware(
  dictionary: Array, gradient: Array | None, beta: float
) -> Callable[[Array], Array]:
  """Scores that also see how an atom would change the loss downstream.

  Args:
    dictionary: [latents, width].
    gradient: [..., width], of the loss in what is to be reconstructed; None,
      as after training, is `top_k` of the values.
    beta: how much that counts; 0 is `top_k` of the values.

  Returns:
    A function of pre-activations, to be the `scores` of `top_k`.

  Example:
    >>> score = gradient_aware(jnp.eye(2), jnp.array([0.0, 2.0]), 1.0)
    >>> score(jnp.array([2.0, 1.0])).tolist()
    [2.0, 3.0]

  Source: g-sae, Features that Make a Difference: Leveraging Gradients for
  Improved Dictionary Learning, section 3.
  """
  if gradient is None:
    return jax.nn.relu
  pull = jnp.abs(gradient @ dictionary.T)

  def score(pre):
    z = jax.nn.relu(pre)
    return z + beta * z * pull

  return score
