"""Fixed patterns: who reads whom, known from positions alone.

  pattern                      | name              | is
  -----------------------------|-------------------|------------------
  causal, sliding window       | pallas_kernels    | rules
  first tokens and a window    | `Sinks`           | a rule
  every d-th of a window       | `Dilated`         | a rule
  slashes, verticals           | `Diagonals`, ...  | rules
  both                         | `stripes`         | a rule
  window and every s-th behind | `Strided`         | a rule
  window and global tokens     | `Longformer`      | a rule
  windows in 1 to 3 dimensions | `Neighborhood`    | a rule
  strided, another a head      | `s2`              | a BlockMask
  window, global, random       | `bigbird`         | a BlockMask
  butterfly                    | `butterfly`       | a BlockMask

A rule says of two positions whether one reads the other, and of two ranges of
positions whether all, some or no pairs are read, in closed form. `mask` lists
the blocks of which it leaves something. Rules join by `&` and `|`, and so do
BlockMasks of equal blocks.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import rules
from pallas_kernels.block_mask import BlockMask

_MOST = 2**31 - 1
_TILES = 2**16  # classified at a time
_PAIRS = 2**22  # of positions, looked at at a time


def _require(condition, message):
  if not condition:
    raise ValueError(message)


def _integer(name, value, least):
  """An int of at least `least`, which int32 holds."""
  whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
  _require(
    whole and value >= least,
    f"{name} is {value!r}; it must be an integer of at least {least}.",
  )
  return min(int(value), _MOST)


def _integers(name, values, least):
  """Ascending, distinct ints of any collection of them."""
  takes = f"{name} is {values!r}; it must hold integers of at least {least}."
  try:
    values = np.asarray(list(values))
  except TypeError as e:
    raise ValueError(takes) from e
  _require(
    values.ndim == 1
    and (not values.size or np.issubdtype(values.dtype, np.integer))
    and (values >= least).all()
    and (values <= _MOST).all(),
    takes,
  )
  return tuple(np.unique(values).astype(int).tolist())


def _set(rule, **fields):
  for name, value in fields.items():
    object.__setattr__(rule, name, value)


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
  low, high = max(-left * step, -_MOST), min(right * step, _MOST)
  inside = (ahead >= low) & (ahead <= high)
  return inside if step == 1 else inside & (ahead % step == 0)


def _meets_band(low, high, left, right, step):
  """Whether some difference of low ... high is in the band."""
  low = jnp.maximum(low, max(-left * step, -_MOST))
  high = jnp.minimum(high, min(right * step, _MOST))
  return (low <= high) & (high // step * step >= low)


def _holds_band(low, high, left, right, step):
  """Whether all differences of low ... high are in the band."""
  inside = (low >= max(-left * step, -_MOST)) & (high <= right * step)
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
    _set(
      self,
      first=_integer("first", self.first, 0),
      local=_integer("local", self.local, 0),
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
    _set(
      self,
      left=_integer("left", self.left, 0),
      right=_integer("right", self.right, 0),
      dilation=_integer("dilation", self.dilation, 1),
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
    _set(self, offsets=_integers("offsets", self.offsets, -_MOST))

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
    _set(self, positions=_integers("positions", self.positions, 0))

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
  ahead = _integers("slashes", slashes, 0)
  return Columns(_integers("verticals", verticals, 0)) | Diagonals(ahead)


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
    _set(
      self,
      local=_integer("local", self.local, 0),
      stride=_integer("stride", self.stride, 1),
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
    _set(
      self,
      left=_integer("left", self.left, 0),
      right=_integer("right", self.right, 0),
      global_tokens=_integers("global_tokens", self.global_tokens, 0),
      dilation=_integer("dilation", self.dilation, 1),
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


@dataclasses.dataclass(frozen=True)
class Neighborhood(rules.Rule):
  """Windows over a grid of 1 to 3 axes, shared by groups of queries.

  Tokens lie in row-major order; a position is the index of a token, and those
  outside of the grid neither read nor are read. Along each axis the queries
  come in groups of `stride`. The leader of a group, which is the one in the
  middle (of an even number the right one), or on a causal axis the last, has a
  window of `window` tokens around it (of an even number one more before it),
  or up to it, and the group reads that. At the border the window is moved
  inward, on a causal axis it is cut. A dilation splits an axis into as many
  axes of equal residue, each with its own groups. A pair is read if every axis
  agrees.

  Numbers hold for every axis, or give one for each.

  Args:
    shape: tokens along each axis.
    window: tokens of a window; a longer one than the axis is cut to it.
    stride: queries that share a window, from 1 (neighborhood attention) to
      `window` (attention within blocks, where it divides the axis).
    dilation: the distance of neighbors in a window.
    is_causal: whether an axis reads nothing ahead.

  Raises:
    ValueError: for other than 1 to 3 axes, a setting that has another number
      of them, and numbers out of range.

  Example:
    >>> rule = Neighborhood((4, 4), window=3)
    >>> [k for k in range(16) if rule(5, k)]
    [0, 1, 2, 4, 5, 6, 8, 9, 10]

  Source: gna, Generalized Neighborhood Attention, sec. 3.
  """

  shape: tuple
  window: int | tuple
  stride: int | tuple = 1
  dilation: int | tuple = 1
  is_causal: bool | tuple = False

  def __post_init__(self):
    shape = self.shape if np.iterable(self.shape) else (self.shape,)
    shape = tuple(_integer("shape", n, 1) for n in shape)
    _require(
      1 <= len(shape) <= 3,
      f"shape is {shape}; it must have from 1 to 3 axes.",
    )

    def each(name):
      value = getattr(self, name)
      value = tuple(value) if np.iterable(value) else (value,) * len(shape)
      _require(
        len(value) == len(shape),
        f"{name} is {value}; it must be one number, or one for each axis of "
        f"{shape}.",
      )
      if name == "is_causal":
        return tuple(bool(x) for x in value)
      return tuple(_integer(name, x, 1) for x in value)

    names = ("window", "stride", "dilation", "is_causal")
    _set(self, shape=shape, **{name: each(name) for name in names})
    for window, stride in zip(self.window, self.stride, strict=True):
      _require(
        stride <= window,
        f"stride is {self.stride}; it must be at most the window, "
        f"{self.window}.",
      )

  def _axes(self):
    """(axis, tokens that a step along it skips, its length)."""
    for axis, length in enumerate(self.shape):
      yield axis, math.prod(self.shape[axis + 1 :]), length

  def _window(self, axis, x, length):
    """The first and last key that coordinate x reads, of `length`."""
    least = min if isinstance(length, int) else jnp.minimum
    size = least(self.window[axis], length)
    stride = self.stride[axis]
    first = x // stride * stride
    if self.is_causal[axis]:
      leader = jnp.minimum(first + stride - 1, length - 1)
      return jnp.maximum(leader - size + 1, 0), x
    leader = jnp.minimum(first + stride // 2, length - 1)
    begin = jnp.clip(leader - size // 2, 0, length - size)
    return begin, begin + size - 1

  def __call__(self, q_position, k_position):
    tokens = math.prod(self.shape)
    q_in = jnp.greater_equal(q_position, 0) & (q_position < tokens)
    k_in = jnp.greater_equal(k_position, 0) & (k_position < tokens)
    found = q_in & k_in
    for axis, inner, length in self._axes():
      q_at = jnp.floor_divide(q_position, inner) % length
      k_at = jnp.floor_divide(k_position, inner) % length
      dilation = self.dilation[axis]
      if dilation > 1:
        residue = q_at % dilation
        found &= k_at % dilation == residue
        length = (length - residue + dilation - 1) // dilation
        q_at, k_at = q_at // dilation, k_at // dilation
      first, last = self._window(axis, q_at, length)
      found &= (k_at >= first) & (k_at <= last)
    return found

  def classify(self, q_min, q_max, k_min, k_max):
    tokens = math.prod(self.shape)
    bounds = q_min, q_max, k_min, k_max
    rank = max(map(jnp.ndim, bounds))  # boxes go in front of all of them
    q_min, q_max, k_min, k_max = (
      jnp.reshape(x, (1,) * (rank - jnp.ndim(x)) + jnp.shape(x)) for x in bounds
    )
    inside = (q_min >= 0) & (k_min >= 0) & (q_max < tokens) & (k_max < tokens)
    (q_there, q_at), (k_there, k_at) = (
      _boxes(jnp.maximum(low, 0), jnp.minimum(high, tokens - 1), self.shape)
      for low, high in ((q_min, q_max), (k_min, k_max))
    )
    there = q_there[:, None] & k_there
    some, whole = there, True
    for axis, _, length in self._axes():
      of_queries = [x[:, None] for x in q_at[axis]]
      found = self._classify_axis(axis, length, of_queries, k_at[axis])
      some, whole = some & found[0], whole & found[1]
    some, whole = some.any((0, 1)), (whole | ~there).all((0, 1))
    return rules.classes(~some, whole & inside)

  def _classify_axis(self, axis, length, q_at, k_at):
    """Whether some and whether all pairs of two ranges are read."""
    dilation = self.dilation[axis]
    some = False
    for residue in range(min(dilation, length)):
      # What has this residue, in its own coordinates. Windows do not go back,
      # so that those of a range are a range.
      of = (length - residue + dilation - 1) // dilation
      q_low, k_low = (
        (x[0] - residue + dilation - 1) // dilation for x in (q_at, k_at)
      )
      q_high, k_high = ((x[1] - residue) // dilation for x in (q_at, k_at))
      first, of_first = self._window(axis, q_low, of)
      of_last, last = self._window(axis, q_high, of)
      there = (q_low <= q_high) & (k_low <= k_high)
      some |= there & (k_low <= last) & (k_high >= first)
    if dilation == 1:
      return some, (k_low >= of_last) & (k_high <= of_first)
    # Neighbors are of two residues.
    return some, some & (q_at[0] == q_at[1]) & (k_at[0] == k_at[1])


def _boxes(low, high, shape):
  """The tokens low ... high of a grid, as boxes.

  Args:
    low: int32, any shape; so is `high`, of that shape too.
    shape: tokens along each axis.

  Returns:
    bool [boxes, ...], which ones have tokens; for each axis, the first and
    last coordinate, int32 [boxes, ...] twice.
  """
  inner = math.prod(shape[1:])
  if len(shape) == 1:
    return (low <= high)[None], [(low[None], high[None])]
  top, bottom = low // inner, high // inner
  one = top == bottom
  # The rest of the first row, the start of the last one, and rows between.
  rest = _boxes(low % inner, jnp.where(one, high % inner, inner - 1), shape[1:])
  start = _boxes(0 * low, jnp.where(one, -1, high % inner), shape[1:])
  there = [rest[0] & (low <= high), start[0] & (low <= high)]
  there = jnp.concatenate([*there, (bottom - top > 1)[None]])
  rows = [
    jnp.broadcast_to(x, y[0].shape) for x, y in ((top, rest), (bottom, start))
  ]
  at = [tuple(jnp.concatenate([*rows, x[None]]) for x in (top + 1, bottom - 1))]
  for n, *ends in zip(shape[1:], rest[1], start[1], strict=True):
    between = (0 * low[None], 0 * low[None] + n - 1)
    at.append(tuple(map(jnp.concatenate, zip(*ends, between, strict=True))))
  return there, at


# From rules to lists


_classify = jax.jit(rules.classify, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def _reads(rule, q_at, k_at):
  """bool [n]: whether some pair of the tiles [n, block] is read."""
  shape = (*q_at.shape, k_at.shape[1])
  found = rule(q_at[:, :, None], k_at[:, None])
  return jnp.broadcast_to(found, shape).any((1, 2))


def _is_tight(rule):
  """Whether the rule calls no tile PARTIAL of which it leaves nothing."""
  if isinstance(rule, rules.Any):
    return all(map(_is_tight, rule.rules))
  return type(rule) in (
    *(rules.Causal, rules.Window),
    *(Sinks, Dilated, Diagonals, Columns, Strided, Longformer, Neighborhood),
  )


def _blocks_of(name, positions, length, block):
  """int32 [blocks, block]: positions, the last one repeated at the end."""
  length = _integer(name[0], length, 1)
  if positions is None:
    positions = np.arange(length)
  _require(
    not isinstance(positions, jax.core.Tracer),
    f"{name[1]} is traced; lists of a rule are made of concrete positions.",
  )
  positions = np.asarray(positions)
  _require(
    positions.shape == (length,) and np.issubdtype(positions.dtype, np.integer),
    f"{name[1]} is {positions.dtype}{list(positions.shape)}; it must hold "
    f"integers, [{length}].",
  )
  positions = np.pad(positions, (0, -length % block), mode="edge")
  return positions.astype(np.int32).reshape(-1, block)


def mask(
  rule, queries, keys, *, block_q, block_kv, q_positions=None, kv_positions=None
) -> BlockMask:
  """The blocks of which a rule leaves something, and the rule itself.

  Lists are made when the function is traced, and hold no block of which nothing
  may be read. No table of tokens is made: memory goes with the listed
  blocks. Of rules without a `classify`, and of those joined by `&`, the blocks
  that may be cut are looked into, which takes time.

  Args:
    rule: a rule of positions.
    queries: how many queries, S.
    keys: how many keys, T.
    block_q: queries of a block, 1 or a power of two from 16 to 512.
    block_kv: keys of a block, a power of two from 16 to 512.
    q_positions: int [S], concrete; default arange(S). A step of decoding over T
      keys has [T - 1]. Give the kernel the same ones.
    kv_positions: int [T], concrete; default arange(T).

  Returns:
    A BlockMask [1, 1, nq, C], C being what the fullest list needs.

  Raises:
    ValueError: for a rule, lengths, blocks or positions that are none.

  Example:
    >>> found = mask(Sinks(first=4, local=20), 80, 80, block_q=16, block_kv=16)
    >>> found.indices[0, 0].tolist(), found.counts.tolist()
    ([[0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 2, 0], [0, 1, 2, 3], [0, 2, 3, 4]],
     [[[1, 2, 3, 4, 4]]])
  """
  # Without lists, for its checks; those made here are in order.
  made = BlockMask(
    np.zeros((1, 1, 0, 1), np.int32),
    block_q=block_q,
    block_kv=block_kv,
    kv_blocks=0,
    rule=rule,
  )
  _require(rule is not None, "rule is None; it must be a rule of positions.")
  q_at = _blocks_of(("queries", "q_positions"), q_positions, queries, block_q)
  k_at = _blocks_of(("keys", "kv_positions"), kv_positions, keys, block_kv)
  with jax.ensure_compile_time_eval():  # constants, inside of jit too
    query, key = _listed(rule, q_at, k_at)
    counts = np.bincount(query, minlength=len(q_at))
    first = np.cumsum(counts) - counts
    indices = np.zeros((len(q_at), max(counts.max(), 1)), np.int32)
    indices[query, np.arange(len(query)) - first[query]] = key
    return made._replace(
      indices=jnp.asarray(indices[None, None]),
      counts=jnp.asarray(counts[None, None], jnp.int32),
      kv_blocks=len(k_at),
    )


def _listed(rule, q_at, k_at):
  """Pairs of blocks in row order: query blocks [n] and key blocks [n]."""
  rows = min(max(_TILES // len(k_at), 1), len(q_at))
  q_low, q_high = q_at.min(1), q_at.max(1)
  bounds_of_keys = (k_at.min(1), k_at.max(1))
  looks = not _is_tight(rule)
  found = []
  for row in range(0, len(q_at), rows):
    at = np.minimum(np.arange(row, row + rows), len(q_at) - 1)
    bounds = (q_low[at, None], q_high[at, None], *bounds_of_keys)
    classes = np.asarray(_classify(rule, *bounds))
    classes = np.broadcast_to(classes, (rows, len(k_at)))
    query, key = np.nonzero(classes[: len(q_at) - row])
    query += row
    if looks:
      cut = classes[query - row, key] == rules.PARTIAL
      kept = ~cut
      kept[cut] = _readable(rule, q_at, k_at, query[cut], key[cut])
      query, key = query[kept], key[kept]
    found.append((query, key))
  return tuple(np.concatenate(x) for x in zip(*found, strict=True))


def _readable(rule, q_at, k_at, query, key):
  """bool [n]: of which tiles some pair may be read, by looking at them all."""
  size = max(_PAIRS // (q_at.shape[1] * k_at.shape[1]), 1)
  size = min(size, 1 << max(len(query) - 1, 0).bit_length())  # few programs
  found = np.zeros(len(query), bool)
  for at in range(0, len(query), size):
    here = np.minimum(np.arange(at, at + size), len(query) - 1)
    reads = np.asarray(_reads(rule, q_at[query[here]], k_at[key[here]]))
    found[at : at + size] = reads[: len(query) - at]
  return found


# Patterns of blocks, by head or drawn


def _count(length, block):
  """How many blocks of `block` tokens `length` makes."""
  return -(-_integer("length", length, 1) // _integer("block", block, 1))


def s2(
  length,
  block,
  *,
  num_heads,
  local,
  stride,
  kv_heads=None,
  step=None,
  first=0,
) -> BlockMask:
  """Local blocks and every stride-th one, from another start in each head.

  Key block j of query block i is read by head h if i - j < local or
  (j + h * step + first) % stride == 0, causal. With a step of 1 and as many
  heads as the stride, the heads together read everything.

  Args:
    length: tokens; queries are keys.
    block: tokens of a block.
    num_heads: query heads.
    local: the last blocks that every head reads, the own one among them.
    stride: blocks from one far block to the next.
    kv_heads: key heads, h being one of them: the query heads of one read the
      same; default num_heads.
    step: blocks that a head starts before the last; default
      max(1, stride // num_heads).
    first: what all heads are moved by (1 in Phi-3-small).

  Returns:
    A BlockMask with the rule Causal, [1, num_heads, n, C].

  Raises:
    ValueError: for numbers out of range, and key heads that do not divide the
      query heads.

  Example:
    >>> found = s2(64, 16, num_heads=2, local=1, stride=2)
    >>> [
    ...   row[: int(n)]
    ...   for row, n in zip(
    ...     found.indices[0, 1].tolist(), found.counts[0, 1], strict=True
    ...   )
    ... ]
    [[0], [1], [1, 2], [1, 3]]

  Source: s2-attention, Efficient LLM Training and Serving with Heterogeneous
  Context Sharding among Attention Heads, sec. 3; the step is that of its
  released kernels.
  """
  blocks, num_heads = _count(length, block), _integer("num_heads", num_heads, 1)
  kv_heads = (
    num_heads if kv_heads is None else _integer("kv_heads", kv_heads, 1)
  )
  _require(
    num_heads % kv_heads == 0,
    f"kv_heads is {kv_heads}; it must divide num_heads, {num_heads}.",
  )
  local = min(_integer("local", local, 0), blocks)
  stride = _integer("stride", stride, 1)
  step = max(1, stride // num_heads) if step is None else step
  step, first = _integer("step", step, 0), _integer("first", first, 0)
  head = np.repeat(np.arange(kv_heads), num_heads // kv_heads)
  row = np.arange(blocks)[:, None]
  near = row - np.arange(local)
  start = -(head * step + first) % stride
  far = start[:, None] + np.arange(0, blocks, stride)
  lists = np.concatenate(
    [
      np.broadcast_to(near, (num_heads, *near.shape)),
      np.where(far[:, None] <= row, far[:, None], -1),
    ],
    axis=-1,
  )
  return BlockMask(
    lists[None],
    block_q=block,
    block_kv=block,
    kv_blocks=blocks,
    rule=rules.Causal(),
  )


def butterfly(length, block, *, max_stride) -> BlockMask:
  """The flat block butterfly: block i reads i and i xor 1, 2, 4 ...

  It is not causal; `butterfly(...) & mask(Causal(), ...)` is. Where the blocks
  are no power of two, partners beyond the end are left out.

  Args:
    length: tokens; queries are keys.
    block: tokens of a block.
    max_stride: a power of two, twice the largest i xor j; 1 is the diagonal.

  Returns:
    A BlockMask without a rule, [1, 1, n, 1 + log2(max_stride)].

  Raises:
    ValueError: for a max_stride that is no power of two.

  Example:
    >>> butterfly(64, 16, max_stride=4).indices[0, 0].tolist()
    [[0, 1, 2], [0, 1, 3], [0, 2, 3], [1, 2, 3]]

  Source: pixelfly, Pixelated Butterfly, sec. 3.2 (flat block butterfly).
  """
  blocks, max_stride = (
    _count(length, block),
    _integer("max_stride", max_stride, 1),
  )
  _require(
    max_stride & (max_stride - 1) == 0,
    f"max_stride is {max_stride}; it must be a power of two.",
  )
  apart = [0, *(1 << m for m in range(max_stride.bit_length() - 1))]
  return BlockMask(
    (np.arange(blocks)[:, None] ^ np.array(apart))[None, None],
    block_q=block,
    block_kv=block,
    kv_blocks=blocks,
  )


def _bigbird_table(blocks, window_blocks, global_blocks):
  """bool [n, n]: the blocks that are read without a draw."""
  window_blocks = _integer("window_blocks", window_blocks, 1)
  global_blocks = _integer("global_blocks", global_blocks, 0)
  _require(
    window_blocks % 2 == 1,
    f"window_blocks is {window_blocks}; it must be odd, the own block being in "
    "the middle.",
  )
  at = np.arange(blocks)
  ends = (at < global_blocks) | (at >= blocks - global_blocks)
  near = abs(at[:, None] - at) <= window_blocks // 2
  return near | ends | ends[:, None]


def bigbird_random(
  key, length, block, *, count=3, window_blocks=3, global_blocks=1
) -> jax.Array:
  """Draws the random blocks of `bigbird`, none twice in a row.

  Only blocks are drawn that are neither in the window nor global. Another draw
  for each head: `jax.vmap` over keys.

  Args:
    key: a PRNG key.
    length: tokens.
    block: tokens of a block.
    count: blocks a query block draws.
    window_blocks: as given to `bigbird`.
    global_blocks: as given to `bigbird`.

  Returns:
    int32 [n, count]; -1 where a row has fewer blocks to draw from, and in the
    rows of global blocks, which read all.

  Raises:
    ValueError: for numbers out of range.

  Example:
    >>> drawn = bigbird_random(jax.random.key(0), 96, 16, count=2)
    >>> drawn.shape, drawn[0].tolist(), drawn[2].tolist()
    ((6, 2), [-1, -1], [4, -1])

  Source: longformer-bigbird, Big Bird, sec. 2 (random attention).
  """
  blocks = _count(length, block)
  read = _bigbird_table(blocks, window_blocks, global_blocks)
  count = _integer("count", count, 0)
  chance = jnp.where(read, -1, jax.random.uniform(key, read.shape))
  chance = jnp.pad(chance, ((0, 0), (0, count)), constant_values=-1)
  best, drawn = jax.lax.top_k(chance, count)
  return jnp.where(best < 0, -1, drawn).astype(jnp.int32)


def bigbird(
  length, block, *, random, window_blocks=3, global_blocks=1
) -> BlockMask:
  """A window of blocks, global blocks at both ends, and random ones.

  The first and last `global_blocks` read and are read by all (the paper's
  internal construction); so some lists have all blocks. Not causal.

  Args:
    length: tokens; queries are keys.
    block: tokens of a block.
    random: int [n, r] or [heads, n, r]: further blocks of each query block,
      as `bigbird_random` draws them; -1 is none.
    window_blocks: how many blocks of the window, an odd number.
    global_blocks: how many blocks at each end are global.

  Returns:
    A BlockMask without a rule, [1, heads or 1, n, C].

  Raises:
    ValueError: for numbers out of range or a `random` of another shape.

  Example:
    >>> found = bigbird(80, 16, random=[[-1]] * 3 + [[1]] + [[-1]])
    >>> found.blocks()[0, 0].astype(int)
    Array([[1, 1, 1, 1, 1],
           [1, 1, 1, 0, 1],
           [1, 1, 1, 1, 1],
           [1, 1, 1, 1, 1],
           [1, 1, 1, 1, 1]], dtype=int32)

  Source: longformer-bigbird, Big Bird, sec. 2 and appendix D (blocks of 64, 3
  in the window, 2 global, 3 random).
  """
  blocks = _count(length, block)
  read = _bigbird_table(blocks, window_blocks, global_blocks)
  random = jnp.asarray(random)
  _require(
    random.ndim in (2, 3)
    and random.shape[-2] == blocks
    and jnp.issubdtype(random.dtype, jnp.integer),
    f"random is {random.dtype}{list(random.shape)}; it must hold integers, "
    f"[{blocks}, r] or [heads, {blocks}, r].",
  )
  drawn = jnp.where((random < 0) | (random >= blocks), blocks, random)
  table = jnp.zeros((*random.shape[:-1], blocks + 1), bool)
  table = jnp.put_along_axis(table, drawn, True, axis=-1, inplace=False)
  return BlockMask.from_blocks(
    table[..., :blocks] | read, block_q=block, block_kv=block
  )
