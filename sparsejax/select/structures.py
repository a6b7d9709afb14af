"""Which shapes a selection may take.

A structure cuts a weight into units (single weights, blocks, channels) and
the units into groups that share a budget. It is a frozen dataclass: hashable,
printable, equal by value.

A weight has stacked-layer, input, output and kernel axes, named by `Axes`.
Every layer of a stack is on its own, as if it were an array of its own.
"""

from collections.abc import Sequence
import dataclasses
import math

import jax
import jax.numpy as jnp

from sparsejax import sharding
from sparsejax.select import budgets
from sparsejax.select import thresholds
from sparsejax.select import top_k

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Axes:
  """Dimension numbers of a weight, as in `jax.nn` and `flax`: `[..., in, out]`.

  Attributes:
    stack: axes that count layers (a scanned stack): each has its own budget.
    input: axes that a matrix multiplication sums over.
    output: axes that index output neurons.

  Axes named by none of them are kernel (spatial) axes.

  >>> Axes(stack=(0,)).layer_shape((12, 512, 2048))
  (512, 2048)
  """

  stack: tuple[int, ...] = ()
  input: tuple[int, ...] = (-2,)
  output: tuple[int, ...] = (-1,)

  def of(self, ndim: int) -> "Axes":
    """The same with nonnegative numbers, checked against `ndim`."""
    for name in ("stack", "input", "output"):
      if not isinstance(getattr(self, name), tuple):
        raise ValueError(
          f"{name} must be a tuple of axes, got {getattr(self, name)!r}"
        )
    if self == Axes() and ndim < 2:  # the default, for biases and scalars
      return Axes((), (), tuple(range(ndim)))
    parts = [
      thresholds.normal_axis(tuple(part), ndim)
      for part in (self.stack, self.input, self.output)
    ]
    if len({a for part in parts for a in part}) < sum(map(len, parts)):
      raise ValueError(f"axes must name each axis once, got {self}")
    return Axes(*parts)

  def layer(self, ndim: int) -> tuple[int, ...]:
    """All axes but the stack's."""
    stack = self.of(ndim).stack
    return tuple(a for a in range(ndim) if a not in stack)

  def fan_in(self, ndim: int) -> tuple[int, ...]:
    """The axes that feed one output: input and kernel axes."""
    output = self.of(ndim).output
    return tuple(a for a in self.layer(ndim) if a not in output)

  def stack_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
    """How many layers, along each stack axis."""
    return tuple(shape[a] for a in self.of(len(shape)).stack)

  def layer_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape a budget sees: `(*kernel, inputs, outputs)` of one layer."""
    at = self.of(len(shape))
    named = {*at.stack, *at.input, *at.output}
    kernel = [d for a, d in enumerate(shape) if a not in named]
    parts = [at.input] * bool(at.input) + [at.output] * bool(at.output)
    return (*kernel, *(math.prod(shape[a] for a in part) for part in parts))


class Structure:
  """Units, their groups, and how a budget selects among them.

  Methods take the `axes` of the weight; scores and masks of units have the
  weight's rank, so its sharding carries over.
  """

  #: Whether every group keeps the same number by definition (n:m, fan-in).
  #: Otherwise a layer is one group, and a budget may give it any number.
  rigid = False

  def check(self, shape: Sequence[int], axes: Axes) -> None:
    """Raises a ValueError where the structure does not fit `shape`."""

  def unit_size(self, shape: Sequence[int], axes: Axes) -> int:
    """Weights in a unit."""
    del shape, axes
    return 1

  def group_axes(self, ndim: int, axes: Axes) -> tuple[int, ...]:
    """The axes of the unit array that a group spans."""
    return axes.layer(ndim)

  def group_size(self, shape: Sequence[int], axes: Axes) -> int:
    """Units in a group."""
    over = self.group_axes(len(shape), axes)
    units = math.prod(shape[a] for a in over)
    return units // (self.unit_size(shape, axes) or 1)

  def group_count(
    self, shape: Sequence[int], axes: Axes, density: float
  ) -> int:
    """Units that each group keeps at `density`, rounded half to even."""
    return round(density * self.group_size(shape, axes))

  def target_count(
    self, shape: Sequence[int], density: float, axes: Axes = Axes()
  ) -> int:
    """Weights that a selection at `density` keeps, exactly."""
    self.check(shape, axes)
    budgets.check_share("density", density)
    kept = self.group_count(shape, axes, density)
    groups = math.prod(shape) // (
      self.group_size(shape, axes) * self.unit_size(shape, axes) or 1
    )
    return kept * groups * self.unit_size(shape, axes)

  def pool(self, scores: Array, axes: Axes) -> Array:
    """Scores of units from scores of weights."""
    del axes
    return scores

  def spread(self, mask: Array, shape: Sequence[int], axes: Axes) -> Array:
    """A mask of weights from a mask of units."""
    del shape, axes
    return mask

  def select(self, keys: Array, count: Array | int, axes: Axes) -> Array:
    """The `count` largest keys of each group; `count` may be one a layer."""
    (mask,) = top_k.top_k_keys([keys], count, self.group_axes(keys.ndim, axes))
    return mask

  def exchange(
    self,
    on: Array,
    stay: Array,
    grow: Array,
    drops: Array | int,
    count: Array | int,
    axes: Axes,
  ) -> Array:
    """Drops units of each layer and grows others.

    Args:
      on: the units that are active now.
      stay: keys by which active units stay; the `drops` lowest go.
      grow: keys by which groups are then filled, the dropped ones' included.
      drops: units to drop in each layer.
      count: units that each group has afterwards.
      axes: dimension numbers.

    Returns:
      The units active afterwards.
    """
    layer = axes.layer(on.ndim)
    left = thresholds.count([on], layer) - drops
    if not self.rigid:  # the budget may have fallen by more than the drops
      left = jnp.minimum(left, count)
    kept = _best(stay, on, left, layer)
    if self.rigid:  # a group may have kept more than it may have
      kept = self.select(thresholds.never(stay, ~kept), count, axes)
    return self.select(thresholds.always(grow, kept), count, axes)

  def mask(
    self, scores: Array, density: float | None = None, axes: Axes = Axes()
  ) -> Array:
    """A boolean mask of `scores`: the structure, used alone.

    Args:
      scores: a floating array `[..., inputs, outputs]`.
      density: share of weights to keep, in [0, 1]; n:m has its own.
      axes: dimension numbers.

    Returns:
      A boolean array shaped and sharded as `scores`.

    Raises:
      ValueError: the structure does not fit, or density is missing or wrong.

    >>> NM(2, 4).mask(jnp.arange(8.0).reshape(8, 1)).ravel().tolist()
    [False, False, True, True, False, False, True, True]
    """
    self.check(scores.shape, axes)
    if density is None:
      if not isinstance(self, NM):
        raise ValueError(f"density must be given for {self}, got None")
      density = self.n / self.m
    budgets.check_share("density", density)
    count = self.group_count(scores.shape, axes, density)
    if not scores.size:
      return jnp.zeros(scores.shape, bool)
    keys = thresholds.ordered_keys(self.pool(scores, axes))
    mask = self.spread(self.select(keys, count, axes), scores.shape, axes)
    return jnp.ones_like(scores, bool) & mask  # sharded as the scores are


def _check_layer_axis(name: str, axis: int, ndim: int, axes: Axes) -> None:
  if axis not in axes.layer(ndim):
    raise ValueError(
      f"{name} must choose within a layer, got axis {axis}, which stacks "
      f"layers: {axes}"
    )


@dataclasses.dataclass(frozen=True)
class Unstructured(Structure):
  """Any weight of the layer."""


@dataclasses.dataclass(frozen=True)
class NM(Structure):
  """Keeps n of every m consecutive weights along `axis`.

  SparseGPT's and Wanda's code count the pruned ones; here `NM(1, 4)` is 75%
  sparse.

  Attributes:
    n: weights kept of each group.
    m: weights in a group.
    axis: the axis that groups lie along; None for the last input axis, the
      one that a matrix multiplication sums over.
  """

  n: int
  m: int
  axis: int | None = None
  rigid = True

  def __post_init__(self):
    whole = isinstance(self.n, int) and isinstance(self.m, int)
    if not whole or not 0 <= self.n <= self.m or self.m < 1:
      raise ValueError(
        "n must be an integer in [0, m], and m one above 0, got "
        f"n={self.n}, m={self.m}"
      )

  def along(self, ndim: int, axes: Axes) -> int:
    """The axis that groups lie along."""
    if self.axis is not None:
      return thresholds.normal_axis(self.axis, ndim)[0]
    inputs = axes.of(ndim).input or axes.of(ndim).output
    return inputs[-1]

  def check(self, shape, axes):
    axis = self.along(len(shape), axes) if shape else None
    if axis is None or shape[axis] % self.m:
      raise ValueError(
        f"m must divide axis {axis} of the weight, got m={self.m} for shape "
        f"{tuple(shape)}"
      )
    _check_layer_axis("NM", axis, len(shape), axes)

  def group_axes(self, ndim, axes):
    return (self.along(ndim, axes),)

  def group_size(self, shape, axes):
    return self.m

  def group_count(self, shape, axes, density):
    if abs(density * self.m - self.n) > 1e-6:
      raise ValueError(
        f"density must be n/m = {self.n / self.m} for {self}, got {density}"
      )
    return self.n

  def select(self, keys, count, axes):
    a = self.along(keys.ndim, axes)
    whole = sharding.whole_groups(keys, a, self.m)
    groups = (*keys.shape[:a], keys.shape[a] // self.m, self.m)
    groups = whole.reshape(*groups, *keys.shape[a + 1 :])
    if jnp.ndim(count):
      count = jnp.expand_dims(count, a + 1)
    if self.m > 32:
      (chosen,) = top_k.top_k_keys([groups], count, (a + 1,))
      return sharding.like(chosen.reshape(keys.shape), keys)
    # Each weight's rank in its small group is counted pairwise: thirty times
    # faster than bisecting or sorting.
    rows = jnp.split(groups, self.m, a + 1)
    ranks = [
      sum(
        (
          ((other >= row) if j < i else (other > row)).astype(jnp.uint8)
          for j, other in enumerate(rows)
          if j != i
        ),
        start=jnp.zeros_like(row, jnp.uint8),
      )
      for i, row in enumerate(rows)
    ]
    chosen = (jnp.concatenate(ranks, a + 1) < count) & (groups != 0)
    return sharding.like(chosen.reshape(keys.shape), keys)


@dataclasses.dataclass(frozen=True)
class Block(Structure):
  """Whole blocks of the last two axes; a block's score is its mean.

  Attributes:
    shape: rows and columns of a block; both must divide the weight's.
  """

  shape: tuple[int, int]

  def __post_init__(self):
    pair = isinstance(self.shape, (tuple, list)) and len(self.shape) == 2
    if not pair or not all(isinstance(d, int) and d > 0 for d in self.shape):
      raise ValueError(f"shape must be two positive integers, got {self.shape}")
    object.__setattr__(self, "shape", tuple(self.shape))  # hashable

  def check(self, shape, axes):
    fits = len(shape) >= 2 and not (
      shape[-2] % self.shape[0] or shape[-1] % self.shape[1]
    )
    if not fits:
      raise ValueError(
        f"Block shape {self.shape} must divide the last two axes of the "
        f"weight, got shape {tuple(shape)}"
      )
    for axis in (len(shape) - 2, len(shape) - 1):
      if axis not in axes.layer(len(shape)):
        raise ValueError(
          f"Block must lie within a layer, but of the last two axes {axis} "
          f"stacks layers: {axes}"
        )

  def unit_size(self, shape, axes):
    return math.prod(self.shape)

  # One axis at a time: explicit sharding splits and merges no two at once.

  def pool(self, scores, axes):
    r, c = self.shape
    x = sharding.whole_groups(_f32(scores), scores.ndim - 2, r)
    *lead, rows, columns = x.shape
    x = jnp.mean(x.reshape(*lead, rows // r, r, columns), -2)
    x = sharding.whole_groups(x, x.ndim - 1, c)
    return jnp.mean(x.reshape(*lead, rows // r, columns // c, c), -1)

  def spread(self, mask, shape, axes):
    r, c = self.shape
    *lead, rows, columns = mask.shape
    x = jnp.broadcast_to(mask[..., None], (*mask.shape, c))
    x = x.reshape(*lead, rows, columns * c)[..., None, :]
    x = jnp.broadcast_to(x, (*lead, rows, r, columns * c))
    return x.reshape(shape)


@dataclasses.dataclass(frozen=True)
class Channel(Structure):
  """Whole slices along `axis`, the output neurons by default.

  A channel's score is the mean over its weights.

  Attributes:
    axis: the axis that numbers the channels; None for the last output axis.
  """

  axis: int | None = None

  def along(self, ndim: int, axes: Axes) -> int:
    """The axis that numbers the channels."""
    if self.axis is not None:
      return thresholds.normal_axis(self.axis, ndim)[0]
    return axes.of(ndim).output[-1]

  def check(self, shape, axes):
    if not shape:
      raise ValueError("Channel must have an axis to choose from, got shape ()")
    axis = self.along(len(shape), axes)
    _check_layer_axis("Channel", axis, len(shape), axes)

  def unit_size(self, shape, axes):
    keep = self.along(len(shape), axes)
    others = (a for a in axes.layer(len(shape)) if a != keep)
    return math.prod(shape[a] for a in others)

  def pool(self, scores, axes):
    keep = self.along(scores.ndim, axes)
    over = tuple(a for a in axes.layer(scores.ndim) if a != keep)
    return jnp.mean(_f32(scores), over, keepdims=True)

  def spread(self, mask, shape, axes):
    return jnp.broadcast_to(mask, shape)


@dataclasses.dataclass(frozen=True)
class ConstantFanIn(Structure):
  """The same number of inputs for every output neuron.

  Attributes:
    ablate: SRigL's gamma: when weights are regrown, neurons with fewer than
      `ablate * fan_in` salient weights are removed, and the others share what
      they had. 0 removes none.
  """

  ablate: float = 0.0
  rigid = True

  def __post_init__(self):
    budgets.check_share("ablate", self.ablate)

  def check(self, shape, axes):
    if len(shape) < 2:
      raise ValueError(
        "ConstantFanIn needs a weight with input and output axes, got shape "
        f"{tuple(shape)}"
      )

  def group_axes(self, ndim, axes):
    return axes.fan_in(ndim)

  def group_count(self, shape, axes, density):
    fan_in = round(density * self.group_size(shape, axes))
    return max(1, fan_in) if density > 0 else 0

  def exchange(self, on, stay, grow, drops, count, axes):
    ndim = on.ndim
    inputs, layer = self.group_axes(ndim, axes), axes.layer(ndim)
    fan_in = self.group_size(on.shape, axes)
    outputs = math.prod(on.shape[a] for a in layer) // max(1, fan_in)
    budget = count * outputs
    # Salient: survivors of the drop, and the best candidates of the layer.
    left = thresholds.count([on], layer) - drops
    kept = _best(stay, on, left, layer)
    salient = thresholds.count(
      [kept | _best(grow, ~kept, drops, layer)], inputs
    ).astype(jnp.float32)
    # Neurons that are needed to hold the budget stay, whatever they count.
    needed = jnp.minimum(budget // max(1, fan_in), outputs - 1) + 1
    last = thresholds.kth_largest(salient, needed, axis=layer)
    alive = salient >= jnp.minimum(self.ablate * count - 1e-4, last)
    neurons = thresholds.count([alive], layer)
    count = jnp.minimum(budget // jnp.maximum(neurons, 1), fan_in) * alive
    kept = _best(stay, on & alive, left, layer)
    kept = self.select(thresholds.never(stay, ~kept), count, axes)
    return self.select(thresholds.always(grow, kept), count, axes)


def _f32(scores: Array) -> Array:
  """Half-precision scores in f32: means are not rounded to less."""
  if not jnp.issubdtype(scores.dtype, jnp.floating):
    raise ValueError(f"scores must be floating, got {scores.dtype}")
  return scores.astype(jnp.promote_types(scores.dtype, jnp.float32))


def _best(keys, among, k, axes):
  """The k largest keys `among` those, or all of them where they are fewer."""
  (mask,) = top_k.top_k_keys([thresholds.never(keys, ~among)], k, axes)
  return mask
