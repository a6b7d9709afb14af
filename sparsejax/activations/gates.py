"""Gates that are drawn, with gradients."""

import jax
from jax import lax
import jax.numpy as jnp

from sparsejax import select

Array = jax.Array


def bernoulli_gate(
  key: Array, logits: Array, *, gradient: str = "identity"
) -> Array:
  """1 with the probability sigmoid(logits), else 0.

  Args:
    key: a PRNG key.
    logits: floating, of any shape.
    gradient: "identity" copies a gate's gradient to its logit (straight
      through); "sigmoid" multiplies it by the sigmoid's derivative; "none" has
      none, as `reinforce` needs it.

  Returns:
    Like logits, of zeros and ones.

  Raises:
    ValueError: logits are not floating, or for another gradient.

  Example:
    >>> gate = bernoulli_gate(jax.random.key(0), jnp.array([-99.0, 99.0]))
    >>> gate.tolist()
    [0.0, 1.0]

  Source: ste-conditional, Estimating or Propagating Gradients Through
  Stochastic Neurons for Conditional Computation, its straight-through
  estimator.
  """
  _check(logits)
  p = jax.nn.sigmoid(logits.astype(jnp.float32))
  hard = (jax.random.uniform(key, logits.shape) < p).astype(logits.dtype)
  if gradient == "none":
    return hard
  if gradient == "identity":
    return select.straight_through(hard, logits)
  if gradient == "sigmoid":
    return select.straight_through(hard, jax.nn.sigmoid(logits))
  raise ValueError(
    f"gradient must be identity, sigmoid or none, got {gradient!r}"
  )


def reinforce(
  logits: Array, gates: Array, loss: Array, baseline: float | Array = 0.0
) -> Array:
  """Zeros, to be added to a loss: the gradient that gates drawn cannot pass.

  That of each logit is (gate - sigmoid(logit)) * (loss - baseline), whose mean
  is the gradient of the expected loss for any baseline that does not depend on
  the gate. loss and baseline receive no gradient.

  Args:
    logits: floating [..., gates].
    gates: the same shape, zeros and ones, of `bernoulli_gate(...,
      gradient="none")`.
    loss: of each draw, [...], or one number.
    baseline: a number, or one for each gate; see `best_baseline`.

  Returns:
    f32 [...]: 0 for each draw.

  Raises:
    ValueError: for shapes that do not fit.

  Example:
    >>> term = lambda a: reinforce(a, jnp.array([1.0]), jnp.array(5.0), 1.0)
    >>> jax.value_and_grad(term)(jnp.array([0.0]))
    (Array(0., dtype=float32), Array([2.], dtype=float32))

  Source: ste-conditional, Estimating or Propagating Gradients Through
  Stochastic Neurons for Conditional Computation, its unbiased estimator.
  """
  _check(logits)
  baseline = jnp.asarray(baseline, jnp.float32)
  if (
    gates.shape != logits.shape
    or jnp.shape(loss) not in ((), logits.shape[:-1])
    or baseline.shape not in ((), logits.shape[-1:])
  ):
    raise ValueError(
      "logits, gates, loss and baseline must be [..., gates], the same, [...] "
      "or a number, and a number or [gates], got "
      f"{logits.shape}, {gates.shape}, {jnp.shape(loss)} and {baseline.shape}"
    )
  logits, gates = logits.astype(jnp.float32), gates.astype(jnp.float32)
  # The derivative of the log probability is gate - sigmoid(logit).
  log_p = gates * logits - jax.nn.softplus(logits)
  advantage = jnp.asarray(loss, jnp.float32)[..., None] - baseline
  term = (log_p * lax.stop_gradient(advantage)).sum(-1)
  return select.straight_through(jnp.zeros_like(term), term)


def best_baseline(logits: Array, gates: Array, loss: Array) -> Array:
  """The baseline of each gate whose `reinforce` varies least, of draws.

  The mean of the losses, weighted by (gate - sigmoid(logit)) ** 2. To be made
  of other draws than those it is used for: it depends on their gates.

  Args:
    logits: floating [..., gates].
    gates: the same shape, zeros and ones.
    loss: of each draw, [...].

  Returns:
    f32 [gates]; 0 where no draw has a weight. It carries no gradient.

  Raises:
    ValueError: for shapes that do not fit.

  Example:
    >>> gates, loss = jnp.array([[1.0], [0.0]]), jnp.array([3.0, 0.0])
    >>> best_baseline(jnp.zeros((2, 1)), gates, loss).tolist()
    [1.5]

  Source: ste-conditional, Estimating or Propagating Gradients Through
  Stochastic Neurons for Conditional Computation, its baseline of least
  variance.
  """
  _check(logits)
  if gates.shape != logits.shape or loss.shape != logits.shape[:-1]:
    raise ValueError(
      "logits, gates and loss must be [..., gates], the same, and [...], got "
      f"{logits.shape}, {gates.shape} and {loss.shape}"
    )
  p = jax.nn.sigmoid(logits.astype(jnp.float32))
  weight = (gates - p) ** 2
  axes = tuple(range(logits.ndim - 1))
  total = weight.sum(axes)
  above = (weight * loss.astype(jnp.float32)[..., None]).sum(axes)
  found = jnp.where(total > 0, above / jnp.where(total > 0, total, 1), 0)
  return lax.stop_gradient(found)


def stochastic_times_smooth(key: Array, logits: Array) -> Array:
  """sqrt(p) with the probability sqrt(p), else 0, where p = sigmoid(logits).

  Its mean is p. Gradients pass through the smooth factor alone, so that their
  mean is half of p's.

  Args:
    key: a PRNG key.
    logits: floating, of any shape.

  Returns:
    Like logits.

  Raises:
    ValueError: logits are not floating.

  Example:
    >>> stochastic_times_smooth(jax.random.key(0), jnp.array([-99.0])).tolist()
    [0.0]

  Source: ste-conditional, Estimating or Propagating Gradients Through
  Stochastic Neurons for Conditional Computation, its stochastic times smooth
  neuron.
  """
  _check(logits)
  root = jnp.exp(jax.nn.log_sigmoid(logits.astype(jnp.float32)) / 2)
  on = jax.random.uniform(key, logits.shape) < lax.stop_gradient(root)
  return jnp.where(on, root, 0).astype(logits.dtype)


def noisy_rectifier(key: Array, x: Array, *, scale: float = 1.0) -> Array:
  """max(0, x + noise): a gate that is often 0, with a gradient where it is not.

  Args:
    key: a PRNG key.
    x: floating, of any shape.
    scale: the standard deviation of the noise, at least 0.

  Returns:
    Like x.

  Raises:
    ValueError: x is not floating, or the scale is negative.

  Example:
    >>> noisy_rectifier(jax.random.key(0), jnp.array([-9.0, 9.0]), scale=0.0)
    Array([0., 9.], dtype=float32)

  Source: ste-conditional, Estimating or Propagating Gradients Through
  Stochastic Neurons for Conditional Computation. The noise is normal; which one
  the paper takes could not be read.
  """
  _check(x, "x")
  if not scale >= 0:
    raise ValueError(f"scale must be at least 0, got {scale}")
  noise = scale * jax.random.normal(key, x.shape, jnp.float32)
  return jax.nn.relu(x.astype(jnp.float32) + noise).astype(x.dtype)


def _check(x, name="logits"):
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(f"{name} must be floating, got {x.dtype}")
