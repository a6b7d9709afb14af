"""What weights are ranked by: functions of what a rule sees of one parameter.

A score is any function of `Seen` to an array shaped as the parameter; larger
is kept first.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class Seen(NamedTuple):
  """What a score or a gradient rule may look at, for one parameter.

  Attributes:
    param: the weights as the optimizer has them.
    grad: the raw gradient, at masked weights too; None at `init`.
    mask: boolean, the weights that are active now.
    backward: boolean, the weights that receive updates, or None (`mask`).
    memory: the rule's own buffer of this parameter, or None.
    key: a PRNG key of this parameter and step, or None.
    step: updates made so far (int32 scalar).
    leak: what share of a masked weight the forward pass saw (f32), or None.
  """

  param: Array
  grad: Array | None
  mask: Array
  backward: Array | None
  memory: Array | None
  key: Array | None
  step: Array
  leak: Array | None


Score = Callable[[Seen], Array]


def magnitude(seen: Seen) -> Array:
  """Absolute weights in f32."""
  return jnp.abs(seen.param).astype(jnp.float32)


def gradient(seen: Seen) -> Array:
  """Absolute gradients in f32, of masked weights too."""
  return jnp.abs(seen.grad).astype(jnp.float32)


def random(seen: Seen) -> Array:
  """Uniform in [0, 1): every choice is equally likely."""
  if seen.key is None:
    raise ValueError("key must be given to a rule that draws, got None")
  return jax.random.uniform(seen.key, seen.param.shape)


def masked_gradient(seen: Seen) -> Array:
  """The gradient of active weights, 0 elsewhere: what most rules train on."""
  return jnp.where(seen.mask, seen.grad, jnp.zeros((), seen.grad.dtype))


def passed_gradient(seen: Seen) -> Array:
  """The gradient at the masked weights, passed on to all of them."""
  return seen.grad


def leaky_gradient(seen: Seen) -> Array:
  """The gradient of `param * (mask + leak * ~mask)`."""
  leaked = (seen.leak * seen.grad).astype(seen.grad.dtype)
  return jnp.where(seen.mask, seen.grad, leaked)
