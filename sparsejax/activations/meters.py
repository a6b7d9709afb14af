"""How many neurons fire, of one array and over batches."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from sparsejax.automatic import automatic

Array = jax.Array


def density(
  x: Array, axis: int | tuple[int, ...] | None = None, *, threshold: float = 0.0
) -> Array:
  """The share of entries that are above a threshold in size.

  Args:
    x: floating, of any shape.
    axis: what the share is of: None, all entries; -1, each token's neurons; the
      axes of tokens, each neuron's tokens.
    threshold: at least 0; 0 counts what is not zero. NaN does not count.

  Returns:
    f32, x's shape without the axes.

  Raises:
    ValueError: x is not floating, there is nothing along the axes, or the
      threshold is negative.

  Example:
    >>> x = jnp.array([[0.0, 2.0, -1.0, 0.0], [0.0, 1.0, 0.0, 0.0]])
    >>> density(x).item(), density(x, -1).tolist()
    (0.375, [0.5, 0.25])

  Source: lazy-neuron-topk, The Lazy Neuron Phenomenon: On Emergence of
  Activation Sparsity in Transformers, section 2.
  """
  _check(x, threshold)
  fires = jnp.abs(x.astype(jnp.float32)) > threshold
  if x.size == 0:
    raise ValueError(f"x must not be empty, got shape {x.shape}")
  return fires.mean(axis, dtype=jnp.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Activity:
  """What is counted of neurons over any number of batches.

  Attributes:
    tokens: uint32 scalar, how many so far; below 2^32.
    fired: uint32 [neurons], at how many of them each neuron fired.
    magnitude: f32 [neurons], the mean size of each one's activation.
  """

  tokens: Array
  fired: Array
  magnitude: Array

  @classmethod
  def zeros(cls, neurons: int) -> "Activity":
    """That of no tokens."""
    count = jnp.zeros((), jnp.uint32)
    fired = jnp.zeros(neurons, jnp.uint32)
    return cls(count, fired, jnp.zeros(neurons, jnp.float32))

  def add(
    self, x: Array, valid: Array | None = None, *, threshold: float = 0.0
  ) -> "Activity":
    """With further tokens.

    Args:
      x: floating [..., neurons].
      valid: None, or bool of the leading dimensions of x: which tokens count.
      threshold: above which size a neuron fires; see `density`.

    Returns:
      The activity at all tokens; on Explicit axes it lies whole on every
      device.

    >>> activity = Activity.zeros(2).add(jnp.array([[0.0, 2.0], [0.0, -4.0]]))
    >>> activity.density.tolist(), activity.magnitude.tolist()
    ([0.0, 1.0], [0.0, 3.0])
    """
    _check(x, threshold)
    check_tokens(x, self.fired.shape[0], valid)

    def count(x, valid):
      axes = tuple(range(x.ndim - 1))
      tokens = jnp.uint32(math.prod(x.shape[:-1]))
      size = jnp.abs(x.astype(jnp.float32))
      if valid is not None:
        tokens = valid.sum(dtype=jnp.uint32)
        size = jnp.where(valid[..., None], size, 0)
      fired = (size > threshold).sum(axes, dtype=jnp.uint32)
      return tokens, fired, size.sum(axes)

    tokens, fired, total = automatic(count, x, valid)
    return self.merge(Activity(tokens, fired, total / jnp.maximum(tokens, 1)))

  def merge(self, other: "Activity") -> "Activity":
    """That at the tokens of both.

    >>> one = Activity.zeros(1).add(jnp.array([[2.0]]))
    >>> one.merge(Activity.zeros(1).add(jnp.zeros((3, 1)))).density.tolist()
    [0.25]
    """
    tokens = self.tokens + other.tokens
    share = other.tokens / jnp.maximum(tokens, 1).astype(jnp.float32)
    return Activity(
      tokens=tokens,
      fired=self.fired + other.fired,
      magnitude=self.magnitude + share * (other.magnitude - self.magnitude),
    )

  @property
  def density(self) -> Array:
    """f32 [neurons]: at which share of the tokens each fired; 0 of none."""
    return self.fired / jnp.maximum(self.tokens, 1).astype(jnp.float32)


def check_tokens(x: Array, neurons: int, valid: Array | None) -> None:
  """Refuses what is not [..., neurons], with `valid` of what is before."""
  if x.shape[-1:] != (neurons,) or (
    valid is not None and valid.shape != x.shape[:-1]
  ):
    given = None if valid is None else valid.shape
    raise ValueError(
      f"x must be [..., {neurons}] and valid of its leading dimensions, got "
      f"{x.shape} and {given}"
    )


def _check(x, threshold):
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(f"x must be floating, got {x.dtype}")
  if not threshold >= 0:
    raise ValueError(f"threshold must be at least 0, got {threshold}")
