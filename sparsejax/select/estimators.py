"""Gradients through a choice."""

import functools

import jax
import jax.numpy as jnp

Array = jax.Array


@jax.custom_jvp
def straight_through(hard: Array, soft: Array) -> Array:
  """The value of `hard`, exactly, with the gradient of `soft`.

  Args:
    hard: what the forward pass sees; it receives no gradient.
    soft: an array of the same shape that stands in for it in derivatives.

  Returns:
    `hard`, in the dtype of `soft`.

  Source: Bengio et al., Estimating or Propagating Gradients Through
    Stochastic Neurons, sec. 4.

  >>> jax.grad(lambda x: straight_through(jnp.round(x), x**2))(1.5).item()
  3.0
  """
  if hard.shape != soft.shape:
    raise ValueError(
      f"hard must have the shape of soft, got {hard.shape} and {soft.shape}"
    )
  return hard.astype(soft.dtype)


@straight_through.defjvp
def _straight_through_jvp(primals, tangents):
  return straight_through(*primals), tangents[1]


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def step(x: Array, bandwidth: float = 1.0) -> Array:
  """1 where x > 0 and 0 elsewhere, with a rectangle for a derivative.

  The derivative is `1 / bandwidth` where `|x| < bandwidth / 2`, that of the
  step smoothed by a box.

  Args:
    x: a floating array.
    bandwidth: width of the box, above 0.

  Returns:
    An array like `x`.

  Source: [gemma-scope] Rajamanoharan et al., Jumping Ahead, eq. (9).

  >>> jax.grad(step)(jnp.float32(0.2)).item()
  1.0
  """
  if bandwidth <= 0:
    raise ValueError(f"bandwidth must be positive, got {bandwidth}")
  return (x > 0).astype(x.dtype)


@step.defjvp
def _step_jvp(bandwidth, primals, tangents):
  (x,), (dx,) = primals, tangents
  inside = jnp.abs(x) < bandwidth / 2
  return step(x, bandwidth), jnp.where(inside, dx / bandwidth, 0)


def smooth_step(x: Array, width: float = 1.0) -> Array:
  """A cubic from exactly 0 to exactly 1, with a continuous derivative.

  0 where `x <= -width / 2`, 1 where `x >= width / 2`: gates that really close.

  Args:
    x: a floating array.
    width: where the cubic rises, above 0.

  Returns:
    An array like `x`, in [0, 1].

  Source: Hazimeh et al., The Tree Ensemble Layer, eq. (4).

  >>> smooth_step(jnp.array([-1.0, 0.0, 1.0]))
  Array([0. , 0.5, 1. ], dtype=float32)
  """
  if width <= 0:
    raise ValueError(f"width must be positive, got {width}")
  t = jnp.clip(x / width + 0.5, 0, 1)
  return t * t * (3 - 2 * t)


def gumbel_softmax(
  key: Array, logits: Array, temperature: float | Array, *, hard: bool = False
) -> Array:
  """A relaxed draw from a categorical distribution over the last axis.

  Args:
    key: a PRNG key.
    logits: unnormalized log probabilities `[..., choices]`, floating.
    temperature: above 0; near 0 the draw is nearly one-hot.
    hard: return the one-hot choice, with the gradient of the relaxed one.

  Returns:
    Weights like `logits` that sum to 1 over the last axis.

  Source: Jang et al., Categorical Reparameterization with Gumbel-Softmax,
    eq. (2).

  >>> w = gumbel_softmax(jax.random.key(0), jnp.zeros(3), 1.0, hard=True)
  >>> float(w.sum()), float(w.max())
  (1.0, 1.0)
  """
  if not isinstance(temperature, jax.core.Tracer) and temperature <= 0:
    raise ValueError(f"temperature must be positive, got {temperature}")
  noise = jax.random.gumbel(key, logits.shape, jnp.float32)
  noisy = logits.astype(jnp.float32) + noise
  soft = jax.nn.softmax(noisy / temperature, axis=-1).astype(logits.dtype)
  if not hard:
    return soft
  choice = jnp.argmax(noisy, axis=-1)
  one_hot = jax.nn.one_hot(choice, logits.shape[-1], dtype=soft.dtype)
  return straight_through(one_hot, soft)
