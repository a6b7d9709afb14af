"""Penalties of codes, each with its proximal operator."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

_static = functools.partial(dataclasses.field, metadata={"static": True})
_penalty = lambda cls: jax.tree_util.register_dataclass(
  dataclasses.dataclass(frozen=True)(cls)
)


class Penalty:
  """What a code costs. Weights are leaves of a pytree, and may be traced.

  With `nonnegative` no latent may be negative: `prox` then gives none that
  are, and `value` is infinite where there is one.
  """

  weight: Any
  nonnegative: bool

  def __post_init__(self):
    check("weight", self.weight, "at least 0", lambda x: x >= 0)

  def value(self, z: Array) -> Array:
    """The cost of codes [..., latents]: [...]."""
    cost = self._cost(z).sum(-1)
    if self.nonnegative:
      cost = jnp.where((z < 0).any(-1), jnp.inf, cost)
    return cost

  def prox(self, z: Array, step: Array | float) -> Array:
    """argmin over u of half the squared distance from z, + step * value(u).

    Args:
      z: floating [..., latents].
      step: a positive number.

    Returns:
      As z. NaN stays NaN. Where two u are as good, the one with fewer latents.
    """
    # With no cost that differs between u and -u, signs go by themselves.
    z = jax.nn.relu(z) if self.nonnegative else z
    return self._prox(z, jnp.asarray(step, z.dtype))

  def _weight(self, z):
    return jnp.asarray(self.weight, z.dtype)

  def _cost(self, z):
    raise NotImplementedError

  def _prox(self, z, step):
    raise NotImplementedError


@_penalty
class L1(Penalty):
  """Magnitudes: weight * sum of abs(z). Its prox is the soft threshold.

  Args:
    weight: at least 0; a scalar, or what broadcasts to the latents.
    nonnegative: whether only codes of at least 0 are allowed.

  Raises:
    ValueError: for a weight that is a negative number.

  Example:
    >>> L1(1.0).prox(jnp.array([3.0, -2.0, 0.5]), step=1.0).tolist()
    [2.0, -1.0, 0.0]

  Source: prox-lq-v1, Beyond l1 sparse coding in V1; also ista-fista.
  """

  weight: Array | float
  nonnegative: bool = _static(default=False, kw_only=True)

  def _cost(self, z):
    return self._weight(z) * jnp.abs(z)

  def _prox(self, z, step):
    return jnp.sign(z) * jax.nn.relu(jnp.abs(z) - step * self._weight(z))


@_penalty
class L0(Penalty):
  """How many are active: weight * sum of [z != 0]. Its prox keeps or zeroes.

  Args:
    weight: at least 0; a scalar, or what broadcasts to the latents.
    nonnegative: whether only codes of at least 0 are allowed.

  Raises:
    ValueError: for a weight that is a negative number.

  Example:
    >>> L0(1.0).prox(jnp.array([3.0, -2.0, 1.0]), step=1.0).tolist()
    [3.0, -2.0, 0.0]

  Source: prox-lq-v1, Beyond l1 sparse coding in V1.
  """

  weight: Array | float
  nonnegative: bool = _static(default=False, kw_only=True)

  def _cost(self, z):
    return self._weight(z) * (z != 0)

  def _prox(self, z, step):
    return jnp.where(jnp.abs(z) <= jnp.sqrt(2 * step * self._weight(z)), 0, z)


@_penalty
class Lq(Penalty):
  """Between both: weight * sum of abs(z)**q, 0 < q < 1.

  Its prox is exact: 0 up to a threshold, and beyond it the larger root of the
  stationary equation.

  Args:
    weight: at least 0; a scalar, or what broadcasts to the latents.
    q: between 0 and 1, neither of them; may be traced, too.
    nonnegative: whether only codes of at least 0 are allowed.

  Raises:
    ValueError: for a weight that is a negative number, or another q.

  Example:
    >>> print(Lq(1.0, 0.5).prox(jnp.array([4.0, -1.5]), step=1.0).round(3))
    [3.742 0.   ]

  Source: prox-lq-v1, Beyond l1 sparse coding in V1.
  """

  weight: Array | float
  q: Array | float
  nonnegative: bool = _static(default=False, kw_only=True)

  def __post_init__(self):
    super().__post_init__()
    check("q", self.q, "between 0 and 1", lambda x: (x > 0) & (x < 1))

  def _cost(self, z):
    return self._weight(z) * jnp.abs(z) ** jnp.asarray(self.q, z.dtype)

  def _prox(self, z, step):
    q = jnp.asarray(self.q, z.dtype)
    t, size = step * self._weight(z), jnp.abs(z)
    # There the larger root costs as much as 0; the slope is at least 1/2 from
    # it on, so that Newton's method falls from `size` to the root.
    root = (2 * t * (1 - q)) ** (1 / (2 - q))
    zero = size <= root * (2 - q) / (2 * (1 - q))
    size = jnp.where(zero, 1 + root, size)

    def newton(u):
      force = t * q * u ** (q - 1)
      return u - (u + force - size) / (1 - (1 - q) * force / u)

    u = size
    for _ in range(5):  # enough for float64, whatever q is
      u = newton(u)
    # The step from the root has the root's own derivatives.
    u = newton(jax.lax.stop_gradient(u))
    return jnp.where(zero, 0, jnp.sign(z) * u)


@_penalty
class CEL0(Penalty):
  """A continuous penalty with the global minima of L0.

  weight - (sqrt(2 weight) - norm * abs(z))**2 / 2 for each latent up to where
  the square is 0, and the weight beyond.

  Args:
    weight: that of the L0 it stands for, at least 0; a scalar, or what
      broadcasts to the latents.
    norm: norms of the atoms, a scalar or [latents].
    nonnegative: whether only codes of at least 0 are allowed.

  Raises:
    ValueError: for a weight or norm that is a negative number.

  Example:
    >>> CEL0(0.5).prox(jnp.array([0.25, 0.625, -2.0]), step=0.25).tolist()
    [0.0, 0.5, -2.0]

  Source: prox-lq-v1, Beyond l1 sparse coding in V1; the penalty is from A
  continuous exact l0 penalty (CEL0) for least squares regularized problem.
  """

  weight: Array | float
  norm: Array | float = 1.0
  nonnegative: bool = _static(default=False, kw_only=True)

  def __post_init__(self):
    super().__post_init__()
    check("norm", self.norm, "at least 0", lambda x: x >= 0)

  def _cost(self, z):
    weight, norm = self._weight(z), jnp.asarray(self.norm, z.dtype)
    short = jax.nn.relu(jnp.sqrt(2 * weight) - norm * jnp.abs(z))
    return weight - short**2 / 2

  def _prox(self, z, step):
    norm, size = jnp.asarray(self.norm, z.dtype), jnp.abs(z)
    # From step * norm**2 = 1 on it is the hard threshold.
    share = jnp.minimum(norm * jnp.sqrt(step), 1)
    threshold = jnp.sqrt(2 * step * self._weight(z)) * share
    slope = jnp.maximum(1 - share**2, jnp.finfo(z.dtype).eps)
    u = jnp.minimum(size, jax.nn.relu(size - threshold) / slope)
    return jnp.sign(z) * u


@_penalty
class Group(Penalty):
  """Norms of groups: weight * sum of the norm of each `size` neighbors.

  Its prox shortens each group, or zeroes it as a whole.

  Args:
    weight: at least 0; a scalar, or what broadcasts to the groups.
    size: latents of a group, which divides all.
    nonnegative: whether only codes of at least 0 are allowed.

  Raises:
    ValueError: for a weight that is a negative number, or a size that is no
      positive integer or, when used, does not divide the latents.

  Example:
    >>> Group(2.5, 2).prox(jnp.array([3.0, -4.0, 1.0, 1.0]), step=1.0).tolist()
    [1.5, -2.0, 0.0, 0.0]

  Source: prox-lq-v1, Beyond l1 sparse coding in V1, has single latents only;
  the block soft threshold is that of the group lasso.
  """

  weight: Array | float
  size: int = _static()
  nonnegative: bool = _static(default=False, kw_only=True)

  def __post_init__(self):
    super().__post_init__()
    if type(self.size) is not int or self.size < 1:
      raise ValueError(f"size must be a positive integer, got {self.size!r}")

  def _groups(self, z):
    """z [..., groups, size], and norms [..., groups], 1 where all are 0."""
    if z.shape[-1] % self.size:
      raise ValueError(
        f"size must divide the {z.shape[-1]} latents, got {self.size}"
      )
    z = z.reshape(*z.shape[:-1], -1, self.size)
    squares = (z * z).sum(-1)
    empty = squares == 0
    return z, empty, jnp.sqrt(jnp.where(empty, 1, squares))

  def _cost(self, z):
    _, empty, norms = self._groups(z)
    return self._weight(z) * jnp.where(empty, 0, norms)

  def _prox(self, z, step):
    groups, _, norms = self._groups(z)
    left = jax.nn.relu(1 - step * self._weight(z) / norms)
    return (groups * left[..., None]).reshape(z.shape)


def check(name: str, value: Any, takes: str, fits: Any) -> None:
  """ValueError for a number that does not fit; arrays are not looked at."""
  if isinstance(value, int | float | np.generic) and not fits(value):
    raise ValueError(f"{name} must be {takes}, got {value!r}")
