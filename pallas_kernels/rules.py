"""Rules: which query may read which key, told by their positions alone.

A rule is any hashable callable `rule(q_position, k_position) -> bool` on
broadcasting int32 arrays; make it once, since a new function is a new program.
It may hold numbers, but no arrays (segment ids are for documents).
It may offer `classify(q_min, q_max, k_min, k_max)`, which says of a whole
tile of positions whether no pair, some pairs or all pairs may be read. Without
it every listed block is masked element by element.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

SKIP, PARTIAL, WHOLE = (
  0,
  1,
  2,
)  # ordered: `&` takes the minimum, `|` the maximum


def classes(skip: jax.Array, whole: jax.Array) -> jax.Array:
  """The classes of tiles of which these are true."""
  return jnp.where(skip, SKIP, jnp.where(whole, WHOLE, PARTIAL))


def _rule(sign, rule):
  if not callable(rule) or isinstance(rule, type):
    raise ValueError(
      f"{sign} of a rule and {rule!r}; it must be a rule as well.{_hint(rule)}"
    )
  return rule


def _hint(rule):
  """For a class that was meant to be called."""
  return f" Did you mean {rule.__name__}()?" if isinstance(rule, type) else ""


class Rule:
  """A rule that combines with `&` and `|`."""

  def __and__(self, other):
    return All((self, _rule("&", other)))

  def __or__(self, other):
    return Any((self, _rule("|", other)))


@dataclasses.dataclass(frozen=True)
class Causal(Rule):
  """A query reads the keys at its own position and before.

  Example:
    >>> rule = pallas_kernels.Causal()
    >>> bool(rule(3, 3)), bool(rule(3, 4))
    (True, False)
  """

  def __call__(self, q_position, k_position):
    return jnp.greater_equal(q_position, k_position)

  def classify(self, q_min, q_max, k_min, k_max):
    return classes(q_max < k_min, q_min >= k_max)


@dataclasses.dataclass(frozen=True)
class Window(Rule):
  """A query at p reads the keys at p - left to p + right, both included.

  Args:
    left: how many positions before the query's own, at least 0.
    right: how many after it, at least 0.

  Raises:
    ValueError: for a negative `left` or `right`.

  Example:
    >>> rule = pallas_kernels.Window(left=2)
    >>> [bool(rule(5, k)) for k in (2, 3, 5, 6)]
    [False, True, True, False]
  """

  left: int
  right: int = 0

  def __post_init__(self):
    for name in ("left", "right"):
      value = getattr(self, name)
      whole = isinstance(value, int | np.integer)
      if not whole or isinstance(value, bool) or value < 0:
        raise ValueError(
          f"{name} is {value!r}; it must be an integer of at least 0."
        )
      # Differences of positions reach this, and int32 no further.
      object.__setattr__(self, name, min(int(value), 2**31 - 1))

  def __call__(self, q_position, k_position):
    ahead = jnp.subtract(k_position, q_position)
    return (ahead >= -self.left) & (ahead <= self.right)

  def classify(self, q_min, q_max, k_min, k_max):
    skip = (q_min - k_max > self.left) | (k_min - q_max > self.right)
    whole = (q_max - k_min <= self.left) & (k_max - q_min <= self.right)
    return classes(skip, whole)


@dataclasses.dataclass(frozen=True)
class All(Rule):
  """Every one of `rules` must allow a pair; what `&` makes."""

  rules: tuple

  def __call__(self, q_position, k_position):
    allowed = [rule(q_position, k_position) for rule in self.rules]
    return functools.reduce(jnp.logical_and, allowed)

  def classify(self, *bounds):
    return functools.reduce(
      jnp.minimum, [classify(rule, *bounds) for rule in self.rules]
    )


@dataclasses.dataclass(frozen=True)
class Any(Rule):
  """One of `rules` must allow a pair; what `|` makes."""

  rules: tuple

  def __call__(self, q_position, k_position):
    allowed = [rule(q_position, k_position) for rule in self.rules]
    return functools.reduce(jnp.logical_or, allowed)

  def classify(self, *bounds):
    return functools.reduce(
      jnp.maximum, [classify(rule, *bounds) for rule in self.rules]
    )


def check(rule) -> None:
  """ValueError for what is no rule. Traces it once.

  A kernel's body has no place for arrays that a rule closes over, traced ones
  too.
  """
  if not callable(rule) or isinstance(rule, type):
    raise ValueError(
      f"rule is {rule!r}; it must be callable, or None.{_hint(rule)}"
    )
  try:
    hash(rule)
  except TypeError as e:
    raise ValueError(f"rule is {rule!r}; it must be hashable ({e}).") from e
  at = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  takes = "rule(q_position, k_position) of int32 arrays must give bools"
  try:
    traced = jax.make_jaxpr(rule)(at, at)
  except jax.errors.TracerBoolConversionError as e:
    raise ValueError(
      f"rule is {rule!r}, which takes the truth of an array (by `if`, `and`, "
      f"`or` or `not`); {takes}, by jnp.where, `&`, `|` or `~`."
    ) from e
  except TypeError as e:
    raise ValueError(f"rule is {rule!r}; {takes}: {e}") from e
  if [x.dtype for x in traced.out_avals] != [bool]:
    got = ", ".join(str(x.dtype) for x in traced.out_avals)
    raise ValueError(f"rule is {rule!r}, which gives {got}; {takes}.")
  if traced.consts:
    raise ValueError(
      f"rule holds arrays, {[x.shape for x in traced.consts]}; it may hold "
      "numbers only (segment ids tell documents apart)."
    )


def classify(rule, q_min, q_max, k_min, k_max) -> jax.Array:
  """SKIP, PARTIAL or WHOLE for tiles with these extreme positions.

  Args:
    rule: a rule; one without a method `classify` leaves every tile PARTIAL.
    q_min: int32, any shape that broadcasts with the others; so are `q_max`,
      `k_min` and `k_max`.

  Returns:
    int32 of the broadcast shape.
  """
  own = getattr(rule, "classify", None)
  if own is None:
    shape = jnp.broadcast_shapes(*map(jnp.shape, (q_min, q_max, k_min, k_max)))
    return jnp.full(shape, PARTIAL, jnp.int32)
  return own(q_min, q_max, k_min, k_max).astype(jnp.int32)
