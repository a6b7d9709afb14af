"""Losses that fall as fewer neurons fire."""

from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


def density_loss(
  activations: Any,
  *,
  eps: float | None = None,
  sharpness: float | None = None,
) -> Array:
  """A smooth share of the activations that are not zero.

  The mean over layers of each one's mean of a ** 2 / (a ** 2 + eps), or, with
  a sharpness, of tanh(sharpness * abs(a)). A neuron at 0 has no gradient. The
  slope of the first is steepest near sqrt(eps): where few activations are as
  small, a larger eps trains faster.

  Args:
    activations: floating arrays, of a layer each, in any pytree, such as
      `capture.outputs` gives.
    eps: positive, default 1e-7 where no sharpness is given.
    sharpness: positive, in the place of eps.

  Returns:
    f32 scalar, in [0, 1]. Padding counts, as in the authors' code.

  Raises:
    ValueError: for both numbers, one that is not positive, no activations, or
      such that are not floating or empty.

  Example:
    >>> density_loss([jnp.array([0.0, 1.0])], eps=1.0).item()
    0.25

  Source: deft, From PEFT to DEFT: Parameter Efficient Finetuning for Reducing
  Activation Density in Transformers. With eps as the authors' code has it; the
  form with tanh is in none of its files.
  """
  if eps is not None and sharpness is not None:
    raise ValueError(
      f"eps or sharpness must be None, got {eps} and {sharpness}"
    )
  eps = 1e-7 if eps is None else eps
  for name, value in dict(eps=eps, sharpness=sharpness).items():
    if value is not None and not value > 0:
      raise ValueError(f"{name} must be positive, got {value}")
  layers = jax.tree.leaves(activations)
  if not layers or any(
    not jnp.issubdtype(a.dtype, jnp.floating) or not a.size for a in layers
  ):
    raise ValueError(
      "activations must be floating arrays, none of them empty, got "
      f"{[(a.shape, str(a.dtype)) for a in layers]}"
    )

  def share(a):
    a = a.astype(jnp.float32)
    if sharpness is None:
      return (a**2 / (a**2 + eps)).mean()
    # jnp.abs has a slope at 0.
    sign = jax.lax.stop_gradient(jnp.sign(a))
    return (sign * jnp.tanh(sharpness * a)).mean()

  return sum(share(a) for a in layers) / len(layers)


def rate_loss(
  probabilities: Array, target: float, *, kl: bool = False
) -> Array:
  """How far the mean rate of each gate is from a target, summed over gates.

  Args:
    probabilities: floating [..., gates], that a gate is open.
    target: above 0 and below 1.
    kl: the divergence of the rate from the target, in the place of the square
      of their difference.

  Returns:
    f32 scalar, 0 where all rates are the target.

  Raises:
    ValueError: for a target out of range, or probabilities not floating.

  Example:
    >>> rate_loss(jnp.array([[0.25, 0.5], [0.75, 0.0]]), 0.25).item()
    0.0625

  Source: ste-conditional, Estimating or Propagating Gradients Through
  Stochastic Neurons for Conditional Computation, which trains gates to a target
  sparsity; the form of its penalty could not be read.
  """
  if not 0 < target < 1:
    raise ValueError(f"target must be above 0 and below 1, got {target}")
  if not jnp.issubdtype(probabilities.dtype, jnp.floating):
    raise ValueError(
      f"probabilities must be floating, got {probabilities.dtype}"
    )
  axes = tuple(range(probabilities.ndim - 1))
  rate = probabilities.astype(jnp.float32).mean(axes)
  if not kl:
    return ((rate - target) ** 2).sum()
  # Rates of 0 and 1 have an infinite divergence, and gradients that are not.
  rate = jnp.clip(rate, 1e-6, 1 - 1e-6)
  on = target * jnp.log(target / rate)
  return (on + (1 - target) * jnp.log((1 - target) / (1 - rate))).sum()
