"""Patterns along diagonals and columns: bands and single lines."""

import dataclasses
import functools

import jax.numpy as jnp

from pallas_kernels import rules
from sparsejax.attention.patterns import checks

# Sets of integers are runs (first, last) that do not touch each other.


@functools.cache
def _runs(values):
  """The runs of ascending integers: few comparisons for many neighbors."""
  runs = []
  for value in values:
    if runs and value == runs[-1][1] + 1:
      runs[-1] = (runs[-1][0], value)
    else:
      runs.append((value, value))
  return tuple(runs)


def _any_run(of_run, runs, x):
  found = jnp.not_equal(x, x)  # False, and no array that a rule would hold
  for first, last in runs:
    found |= of_run(first, last)
  return found


def _among(x, runs):
  """Whether x is in a run."""
  return _any_run(lambda a, b: jnp.greater_equal(x, a) & (x <= b), runs, x)


def _meets(low, high, runs):
  """Whether some integer of low ... high is in a run."""
  found = _any_run(lambda a, b: (high >= a) & (low <= b), runs, low + high)
  return found & (low <= high)


def _holds(low, high, runs):
  """Whether all integers of low ... high are in a run."""
  return _any_run(lambda a, b: (low >= a) & (high <= b), runs, low + high)


# Bands: every `step`-th difference k - q from -left * step to right * step.


def _in_band(ahead, left, right, step):
  low, high = max(-left * step, -checks.MOST), min(right * step, checks.MOST)
  inside = (ahead >= low) & (ahead <= high)
  return inside if step == 1 else inside & (ahead % step == 0)


def _meets_band(low, high, left, right, step):
  """Whether some difference of low ... high is in the band."""
  low = jnp.maximum(low, max(-left * step, -checks.MOST))
  high = jnp.minimum(high, min(right * step, checks.MOST))
  return (low <= high) & (high // step * step >= low)


def _holds_band(low, high, left, right, step):
  """Whether all differences of low ... high are in the band."""
  inside = (low >= max(-left * step, -checks.MOST)) & (high <= right * step)
  return inside if step == 1 else inside & (low == high) & (low % step == 0)


@dataclasses.dataclass(frozen=True)
class Sinks(rules.Rule):
  """The first tokens and the last ones, causal: an A-shape.

  Args:
    first: how many tokens at the start every later query reads.
    local: how many of the last tokens, the query's own among them.

  Raises:
    ValueError: for a negative `first` or `local`.

  Example:
    >>> rule = Sinks(first=1, local=2)
    >>> [bool(rule(5, k)) for k in range(7)]
    [True, False, False, False, True, True, False]

  Source: streaming-llm, Efficient Streaming Language Models with Attention
  Sinks, sec. 3.2 (4 first tokens); minference, MInference 1.0 (A-shape).
  """

  first: int
  local: int

  def __post_init__(self):
    checks.set_fields(
      self,
      first=checks.integer("first", self.first, 0),
      local=checks.integer("local", self.local, 0),
    )

  def __call__(self, q_position, k_position):
    back = jnp.subtract(q_position, k_position)
    near = (back < self.local) | (k_position < self.first)
    return near & (back >= 0)

  def classify(self, q_min, q_max, k_min, k_max):
    low, high = q_min - k_max, q_max - k_min
    first = (k_min < self.first) & (high >= 0)
    near = (high >= 0) & (jnp.maximum(low, 0) < self.local)
    farthest = q_max - jnp.maximum(k_min, self.first)
    whole = (k_max < self.first) | (farthest < self.local)
    return rules.classes(~(first | near), whole & (low >= 0))


@dataclasses.dataclass(frozen=True)
class Dilated(rules.Rule):
  """Every `dilation`-th key around the query, whose own is one of them.

  Args:
    left: how many keys before the query's own.
    right: how many after it.
    dilation: the distance from one to the next, at least 1.

  Raises:
    ValueError: for numbers below 0, or a dilation below 1.

  Example:
    >>> rule = Dilated(left=2, right=1, dilation=3)
    >>> [k for k in range(20) if rule(10, k)]
    [4, 7, 10, 13]

  Source: longformer-bigbird, Longformer, sec. 3.1 (dilated sliding window).
  """

  left: int
  right: int = 0
  dilation: int = 1

  def __post_init__(self):
    checks.set_fields(
      self,
      left=checks.integer("left", self.left, 0),
      right=checks.integer("right", self.right, 0),
      dilation=checks.integer("dilation", self.dilation, 1),
    )

  def __call__(self, q_position, k_position):
    ahead = jnp.subtract(k_position, q_position)
    return _in_band(ahead, self.left, self.right, self.dilation)

  def classify(self, q_min, q_max, k_min, k_max):
    band = (self.left, self.right, self.dilation)
    low, high = k_min - q_max, k_max - q_min
    skip = ~_meets_band(low, high, *band)
    return rules.classes(skip, _holds_band(low, high, *band))


@dataclasses.dataclass(frozen=True)
class Diagonals(rules.Rule):
  """A query at p reads the keys at p - o: slashes.

  Neighboring offsets are one band, and each band is a comparison in the
  kernel's body; for very many, or others in each head, see
  `formats.from_minference`.

  Args:
    offsets: integers; 0 is the query's own key, a negative one is ahead.

  Raises:
    ValueError: for what are no integers.

  Example:
    >>> rule = Diagonals((0, 1, 4))
    >>> [k for k in range(10) if rule(6, k)]
    [2, 5, 6]

  Source: minference, MInference 1.0 (slashes).
  """

  offsets: tuple

  def __post_init__(self):
    checks.set_fields(
      self, offsets=checks.integers("offsets", self.offsets, -checks.MOST)
    )

  def __call__(self, q_position, k_position):
    back = jnp.subtract(q_position, k_position)
    return _among(back, _runs(self.offsets))

  def classify(self, q_min, q_max, k_min, k_max):
    low, high, runs = q_min - k_max, q_max - k_min, _runs(self.offsets)
    return rules.classes(~_meets(low, high, runs), _holds(low, high, runs))


@dataclasses.dataclass(frozen=True)
class Columns(rules.Rule):
  """Single keys that every query at or behind them reads: verticals.

  Runs of neighbors are a comparison each in the kernel's body, and the blocks
  around a single key are read for it alone: many scattered ones are better as
  `columns` of a BlockMask (`formats.from_minference`).

  Args:
    positions: integers of at least 0.

  Raises:
    ValueError: for what are no such integers.

  Example:
    >>> rule = Columns((0, 3))
    >>> [[k for k in range(5) if rule(q, k)] for q in (2, 3)]
    [[0], [0, 3]]

  Source: minference, MInference 1.0 (verticals).
  """

  positions: tuple

  def __post_init__(self):
    checks.set_fields(
      self, positions=checks.integers("positions", self.positions, 0)
    )

  def __call__(self, q_position, k_position):
    behind = jnp.less_equal(k_position, q_position)
    return behind & _among(k_position, _runs(self.positions))

  def classify(self, q_min, q_max, k_min, k_max):
    runs = _runs(self.positions)
    some = _meets(k_min, jnp.minimum(k_max, q_max), runs)
    return rules.classes(~some, (k_max <= q_min) & _holds(k_min, k_max, runs))


def stripes(verticals, slashes) -> rules.Rule:
  """Verticals and slashes, causal: the same in every head.

  Where heads have lines of their own, `formats.from_minference` makes a
  BlockMask, which reads whole blocks along the slashes.

  Args:
    verticals: positions of keys, integers of at least 0.
    slashes: distances to the keys, integers of at least 0.

  Returns:
    The rule `Columns(verticals) | Diagonals(slashes)`.

  Raises:
    ValueError: for what are no such integers.

  Example:
    >>> rule = stripes([0], [0, 2])
    >>> [k for k in range(8) if rule(6, k)]
    [0, 4, 6]

  Source: minference, MInference 1.0, Algorithm 2 (vertical-slash).
  """
  ahead = checks.integers("slashes", slashes, 0)
  return Columns(checks.integers("verticals", verticals, 0)) | Diagonals(ahead)


@dataclasses.dataclass(frozen=True)
class Strided(rules.Rule):
  """The last `local` keys, and behind them every `stride`-th, causal.

  The stride is counted from the query, so that its keys are on diagonals.

  Args:
    local: how many of the last keys, the query's own among them.
    stride: the distance from one far key to the next, at least 1.

  Raises:
    ValueError: for a negative `local` or a stride below 1.

  Example:
    >>> rule = Strided(local=2, stride=4)
    >>> [k for k in range(12) if rule(10, k)]
    [2, 6, 9, 10]

  Source: Generating Long Sequences with Sparse Transformers, sec. 4.2
  (strided: both of its heads at once where local is the stride).
  """

  local: int
  stride: int

  def __post_init__(self):
    checks.set_fields(
      self,
      local=checks.integer("local", self.local, 0),
      stride=checks.integer("stride", self.stride, 1),
    )

  def __call__(self, q_position, k_position):
    back = jnp.subtract(q_position, k_position)
    return (back >= 0) & ((back < self.local) | (back % self.stride == 0))

  def classify(self, q_min, q_max, k_min, k_max):
    low, high = q_min - k_max, q_max - k_min
    nearest = jnp.maximum(low, 0)
    far = high // self.stride * self.stride >= nearest
    some = (high >= 0) & ((nearest < self.local) | far)
    # Of what is no longer near, at most one key, and that on the stride.
    rest = jnp.maximum(low, self.local)
    alone = (rest == high) & (high % self.stride == 0)
    whole = (high < self.local) | alone | (self.stride == 1)
    return rules.classes(~some, whole & (low >= 0))


@dataclasses.dataclass(frozen=True)
class Longformer(rules.Rule):
  """A window, and global tokens that read and are read by everything.

  The list of a global token's block has all blocks, so that every list has as
  many slots.

  Args:
    left: keys before the query's own; the paper's window w has w // 2.
    right: keys after it.
    global_tokens: positions, integers of at least 0. Each run of neighbors is
      two comparisons in the kernel's body.
    dilation: the distance from a key of the window to the next.
    is_causal: whether nothing ahead is read, by global tokens neither.

  Raises:
    ValueError: for numbers below 0, or a dilation below 1.

  Example:
    >>> rule = Longformer(left=1, right=1, global_tokens=(0,))
    >>> [[k for k in range(5) if rule(q, k)] for q in (0, 3)]
    [[0, 1, 2, 3, 4], [0, 2, 3, 4]]

  Source: longformer-bigbird, Longformer, sec. 3.1.
  """

  left: int
  right: int
  global_tokens: tuple = ()
  dilation: int = 1
  is_causal: bool = False

  def __post_init__(self):
    checks.set_fields(
      self,
      left=checks.integer("left", self.left, 0),
      right=checks.integer("right", self.right, 0),
      global_tokens=checks.integers("global_tokens", self.global_tokens, 0),
      dilation=checks.integer("dilation", self.dilation, 1),
      is_causal=bool(self.is_causal),
    )

  def __call__(self, q_position, k_position):
    ahead = jnp.subtract(k_position, q_position)
    runs = _runs(self.global_tokens)
    near = _in_band(ahead, self.left, self.right, self.dilation)
    found = near | _among(q_position, runs) | _among(k_position, runs)
    return found & (ahead <= 0) if self.is_causal else found

  def classify(self, q_min, q_max, k_min, k_max):
    runs = _runs(self.global_tokens)
    band = (self.left, self.right, self.dilation)
    last, begin, nearest = k_max, q_min, k_max - q_min
    if self.is_causal:  # nor is a key read that is ahead of all queries
      last, begin = jnp.minimum(k_max, q_max), jnp.maximum(q_min, k_min)
      nearest = jnp.minimum(nearest, 0)
    some = _meets_band(k_min - q_max, nearest, *band)
    some |= _meets(k_min, last, runs) | _meets(begin, q_max, runs)
    # All is read if the tokens that are not global are in the window; between
    # the outermost ones a dilation may hit by chance, which is not looked for.
    (q_min, q_low), (q_max, q_high) = _outermost(q_min, q_max, runs)
    (k_min, k_low), (k_max, k_high) = _outermost(k_min, k_max, runs)
    whole = _holds_band(k_low - q_high, k_high - q_low, *band)
    whole |= (q_low > q_high) | (k_low > k_high)
    if self.is_causal:
      whole &= k_max <= q_min
    return rules.classes(~some, whole)


def _outermost(low, high, runs):
  """((low, the first from low on in no run), (high, the last up to high))."""
  first, last = low, high
  for a, b in runs:
    first = jnp.where((low >= a) & (low <= b), b + 1, first)
    last = jnp.where((high >= a) & (high <= b), a - 1, last)
  return (low, first), (high, last)
