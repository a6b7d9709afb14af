"""Which entries of arrays are chosen: singly, in blocks, as a slice, or all."""

import dataclasses
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

from sparsejax import paths
from sparsejax import sharding
from sparsejax.automatic import automatic

Array = jax.Array
PyTree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Entries:
  """Single entries of an array; their part is a vector.

  Attributes:
    index: int32 [n], row-major positions, ascending, none twice.

  >>> x = jnp.arange(6.0).reshape(2, 3)
  >>> Entries(jnp.array([1, 5])).take(x).tolist()
  [1.0, 5.0]
  """

  index: Array

  def take(self, x: Array) -> Array:
    """The chosen entries of x, [n]."""
    # By an index for each axis: nothing of a sharded x is moved but them.
    at = lambda x, index: x[jnp.unravel_index(index, x.shape)]
    return automatic(at, x, self.index)

  def put(self, x: Array, part: Array) -> Array:
    """x with its chosen entries replaced."""

    def at(x, index, part):
      where = x.at[jnp.unravel_index(index, x.shape)]
      return where.set(part, unique_indices=True)

    return automatic(at, x, self.index, part, out=x)

  def check(self, name: str, shape: tuple[int, ...]) -> None:
    """Raises where it is no choice of an array of this shape."""
    index = self.index
    if index.ndim != 1 or not np.issubdtype(index.dtype, np.integer):
      raise ValueError(
        f"chosen[{name!r}] must have an integer vector as its index, got "
        f"{index.dtype}{list(index.shape)}"
      )
    _check_index(name, index, shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Blocks:
  """Blocks of a matrix; their part is [n, rows, columns].

  Attributes:
    index: int32 [n, 2], row and column of each block, counted in blocks, none
      twice.
    block: rows and columns of a block, which divide the matrix.

  >>> x = jnp.arange(8.0).reshape(2, 4)
  >>> Blocks(jnp.array([[0, 1]]), (2, 2)).take(x).tolist()
  [[[2.0, 3.0], [6.0, 7.0]]]
  """

  index: Array
  block: tuple[int, int] = dataclasses.field(metadata={"static": True})

  def _split(self, x):
    (rows, columns), (r, c) = x.shape, self.block
    return x.reshape(rows // r, r, columns // c, c)

  def take(self, x: Array) -> Array:
    """The chosen blocks of x, [n, rows, columns]."""
    at = lambda x, index: self._split(x)[index[:, 0], :, index[:, 1]]
    return automatic(at, x, self.index)

  def put(self, x: Array, part: Array) -> Array:
    """x with its chosen blocks replaced."""

    def at(x, index, part):
      where = self._split(x).at[index[:, 0], :, index[:, 1]]
      return where.set(part, unique_indices=True).reshape(x.shape)

    return automatic(at, x, self.index, part, out=x)

  def check(self, name: str, shape: tuple[int, ...]) -> None:
    """Raises where it is no choice of an array of this shape."""
    index = self.index
    sides = len(shape) == 2 and len(self.block) == 2 and min(self.block) > 0
    if not sides or shape[0] % self.block[0] or shape[1] % self.block[1]:
      raise ValueError(
        f"chosen[{name!r}] must be blocks that divide a matrix, got blocks of "
        f"{tuple(self.block)} for {shape}"
      )
    if index.ndim != 2 or index.shape[1] != 2:
      raise ValueError(
        f"chosen[{name!r}] must have an index [n, 2], got {list(index.shape)}"
      )
    if not np.issubdtype(index.dtype, np.integer):
      raise ValueError(
        f"chosen[{name!r}] must have an integer index, got {index.dtype}"
      )
    grid = shape[0] // self.block[0], shape[1] // self.block[1]
    _check_index(name, index, grid)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slice:
  """Neighbors along an axis; their part is that slice: nothing is gathered.

  Attributes:
    axis: which, counted from the first.
    start: the first.
    stop: one after the last.

  >>> x = jnp.arange(6.0).reshape(2, 3)
  >>> Slice(1, 0, 2).take(x).tolist()
  [[0.0, 1.0], [3.0, 4.0]]
  """

  axis: int = dataclasses.field(metadata={"static": True})
  start: int = dataclasses.field(metadata={"static": True})
  stop: int = dataclasses.field(metadata={"static": True})

  def take(self, x: Array) -> Array:
    """The slice of x, sharded as x along the other axes."""
    at = lambda x: lax.slice_in_dim(x, self.start, self.stop, axis=self.axis)
    if not self._is_divided(x):
      return at(x)
    spec = list(jax.typeof(x).sharding.spec)
    spec[self.axis] = None
    return jax.sharding.reshard(automatic(at, x), jax.P(*spec))

  def put(self, x: Array, part: Array) -> Array:
    """x with the slice replaced."""

    def at(x, part):
      return lax.dynamic_update_slice_in_dim(x, part, self.start, self.axis)

    return automatic(at, x, part, out=x) if self._is_divided(x) else at(x, part)

  def _is_divided(self, x):
    """Whether x is cut along the axis: what straddles shards has no type."""
    spec = jax.typeof(x).sharding.spec if sharding.is_explicit(x) else ()
    return self.axis < len(spec) and spec[self.axis] is not None

  def check(self, name: str, shape: tuple[int, ...]) -> None:
    """Raises where it is no choice of an array of this shape."""
    if not 0 <= self.axis < len(shape) or not (
      0 <= self.start <= self.stop <= shape[self.axis]
    ):
      raise ValueError(
        f"chosen[{name!r}] must be a slice of an array of shape {shape}, got "
        f"{self}"
      )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Whole:
  """All of an array; its part is the array itself."""

  def take(self, x: Array) -> Array:
    """x."""
    return x

  def put(self, x: Array, part: Array) -> Array:
    """The part."""
    del x
    return part

  def check(self, name: str, shape: tuple[int, ...]) -> None:
    """Any array will do."""
    del name, shape


Choice = Entries | Blocks | Slice | Whole
NOTHING = optax.MaskedNode()


def choose(params: PyTree, chosen: PyTree) -> PyTree:
  """What is trained of each parameter, in a form that gathers by index.

  What takes `chosen` calls this; to call it once is worth it where masks are
  large, and makes an argument of a jitted function of it, whose indices are
  then no constants of the program.

  Args:
    params: arrays, or their shapes and dtypes.
    chosen: a tree like `params` or part of it: boolean masks of the parameters'
      shapes, True for all of a parameter, False for none, `Entries`, `Blocks`
      or `Slice`. What it does not name is not trained. Masks must be known:
      they are made outside of `jit`.

  Returns:
    A tree like `params` of `Entries`, `Blocks`, `Slice` and `Whole`;
    `optax.MaskedNode()` where nothing is trained.

  Raises:
    ValueError: a choice of no parameter, of another shape, out of range, not
      known, or of what is not floating.

  >>> params = {"w": jnp.zeros((2, 2)), "b": jnp.zeros(2)}
  >>> masks = {"w": jnp.array([[False, True], [True, False]])}
  >>> choose(params, masks)["w"].index.tolist()
  [1, 2]
  """
  leaves, rebuild = paths.named(params)
  found = by_name(chosen, leaves)
  return rebuild({n: found.get(n, NOTHING) for n in leaves})


def take(params: PyTree, chosen: PyTree) -> PyTree:
  """The trained parts of the parameters.

  Args:
    params: arrays.
    chosen: as in `choose`, or what it returns.

  Returns:
    A tree like `params`: a vector of entries, blocks [n, rows, columns], a
    slice, or the whole array; `optax.MaskedNode()` where nothing is trained.

  Raises:
    ValueError: as `choose`.

  >>> params = {"w": jnp.arange(4.0), "b": jnp.zeros(2)}
  >>> take(params, {"w": Slice(0, 1, 3)})["w"].tolist()
  [1.0, 2.0]
  """
  leaves, rebuild = paths.named(params)
  found = by_name(chosen, leaves)
  return rebuild(taken(found, leaves))


def put(params: PyTree, chosen: PyTree, parts: PyTree) -> PyTree:
  """The parameters with their trained parts replaced.

  A loss of `put(params, chosen, parts)` that is differentiated by the parts
  computes the gradients of no other parameter. (Of a matrix with a chosen part
  XLA computes all of the gradient, then takes the part: see `partial_matmul`.)

  Args:
    params: arrays.
    chosen: as in `choose`, or what it returns.
    parts: as `take` returns them.

  Returns:
    A tree like `params`; what is not trained is the same arrays, or bit-equal.

  Raises:
    ValueError: as `choose`, or parts of other shapes.

  >>> params = {"w": jnp.zeros(3), "b": jnp.zeros(2)}
  >>> chosen = {"w": Slice(0, 1, 3)}
  >>> loss = lambda parts: put(params, chosen, parts)["w"].sum()
  >>> jax.grad(loss)(take(params, chosen))
  {'b': MaskedNode(), 'w': Array([1., 1.], dtype=float32)}
  """
  leaves, rebuild = paths.named(params)
  found, given = by_name(chosen, leaves), paths.named(parts)[0]
  if given.keys() != found.keys():
    raise ValueError(
      f"parts must be of {sorted(found)}, got those of {sorted(given)}"
    )
  return rebuild(leaves | replaced(found, leaves, given))


def taken(found, names, leaves=None):
  """The part of each of `names`, or nothing."""
  leaves = names if leaves is None else leaves
  return {n: found[n].take(leaves[n]) if n in found else NOTHING for n in names}


def replaced(found, leaves, parts):
  """The leaves that have a choice, with those parts replaced."""
  for n, c in found.items():
    want = jax.eval_shape(c.take, leaves[n]).shape
    if parts[n].shape != want:
      raise ValueError(
        f"parts must have the shapes of take, got {parts[n].shape} for {n!r}, "
        f"which takes {want}"
      )
  return {n: c.put(leaves[n], parts[n]) for n, c in found.items()}


def by_name(chosen, params):
  """The choices of `choose` by name, without those of nothing."""
  found, shapes = read(chosen)
  check_fit(found, shapes, paths.named(params)[0])
  return found


def read(chosen):
  """Choices by name, without those of nothing; and the shapes of all masks.

  Only whole masks are read here; an index may be traced, as `choose` made it.
  """
  found, shapes = {}, {}
  flat = jax.tree_util.tree_flatten_with_path(
    chosen, is_leaf=lambda x: isinstance(x, Choice)
  )[0]
  for path, given in flat:
    name = paths.name_of(path)
    shapes[name] = None
    if isinstance(given, Choice):
      if isinstance(given, Slice):
        empty = given.start == given.stop
      else:
        empty = not len(getattr(given, "index", "full"))
      if not empty:
        found[name] = given
      continue
    mask = _known(name, given)
    if mask.dtype != bool:
      raise ValueError(
        f"chosen[{name!r}] must be a boolean mask, a bool, Entries, Blocks or "
        f"Slice, got {given!r}"
      )
    if not isinstance(given, bool | np.bool):
      shapes[name] = mask.shape
    if mask.size >= 2**31:
      raise ValueError(
        f"chosen[{name!r}] must have less than 2^31 entries to be chosen "
        f"singly, got {mask.size}: choose blocks or a slice"
      )
    if mask.size and mask.all():
      found[name] = Whole()
    elif mask.any():
      found[name] = Entries(np.flatnonzero(mask).astype(np.int32))
  return found, shapes


def check_fit(found, shapes, leaves):
  """Raises where choices do not fit the parameters."""
  for n, shape in shapes.items():
    if n not in leaves:
      raise ValueError(
        f"chosen must name parameters, got {n!r}: they are {list(leaves)}"
      )
    if shape is not None and shape != tuple(leaves[n].shape):
      raise ValueError(
        f"chosen[{n!r}] must be a mask of shape {tuple(leaves[n].shape)}, got "
        f"{shape}"
      )
  for n, c in found.items():
    if not jnp.issubdtype(leaves[n].dtype, jnp.floating):
      raise ValueError(
        f"chosen must be floating arrays, got {n!r} of {leaves[n].dtype}"
      )
    c.check(n, tuple(leaves[n].shape))


def _known(name, x):
  if isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct):
    raise ValueError(
      f"chosen[{name!r}] must be known, made outside of jit, got {x}"
    )
  return np.asarray(x)


def _check_index(name, index, shape):
  """Raises for places out of range or twice; not where they are traced."""
  if isinstance(index, jax.core.Tracer | jax.ShapeDtypeStruct):
    return
  index = np.asarray(index)
  bounds = np.array(shape if index.ndim == 2 else np.prod(shape, dtype=int))
  if (index < 0).any() or (index >= bounds).any():
    raise ValueError(
      f"chosen[{name!r}] must have an index below {bounds.tolist()}, got "
      f"{index.tolist()[:9]}"
    )
  if len(np.unique(index, axis=0)) < len(index):
    raise ValueError(f"chosen[{name!r}] must have no place twice")
