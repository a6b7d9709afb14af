"""BlockSparseWeight: the blocks of a matrix that exist, and where they lie."""

import dataclasses
import operator

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_sparse_matmul import lists


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class BlockSparseWeight:
  """A K x N matrix of which some blocks of [bk, bn] exist; the rest is zero.

  The matrix is cut into n_k x n_n blocks, rounded up; what hangs over its edge
  is never read. The values of a column's blocks follow each other, column after
  column, so that blocks may be distributed in any way.

  Lists are data, so they may change while a program runs. What they hold can
  hurt nobody: what int32 cannot hold is clipped to it, and counts to [0, C]; a
  value whose block row is outside [0, n_k), or that no count reaches, is not
  used, and has no gradient; blocks listed twice add up; counts that ask for
  more than nnz values get what there is. Values that are not used may be
  anything, NaN too.

  Attributes:
    values: floating [nnz, bk, bn].
    indices: int32 [n_n, C], block rows of each block column.
    counts: int32 [n_n], how many of them are listed.
    shape: (K, N), static.
    edges: None, or int32 [nnz]: the numbers of the values by block row, which
      `with_transpose` makes and the gradient by x on TPU reads. Where they are
      not those of the lists, this is found and the values are sorted again.

  Raises:
    ValueError: for arrays whose shapes or dtypes do not fit each other.

  Example:
    >>> weight = pallas_kernels.BlockSparseWeight(
    ...   values=jnp.array([[[1.0, 2.0]], [[3.0, 4.0]]]),
    ...   indices=[[1], [0]],
    ...   counts=[1, 1],
    ...   shape=(2, 4),
    ... )
    >>> weight.dense().tolist()
    [[0.0, 0.0, 3.0, 4.0], [1.0, 2.0, 0.0, 0.0]]

    Lists have no gradient. So differentiate by the values, and train these:

    >>> import dataclasses
    >>> def loss(values):
    ...   w = dataclasses.replace(weight, values=values)
    ...   return pallas_kernels.block_sparse_matmul(jnp.ones(2), w).sum()
    >>> jax.grad(loss)(weight.values).tolist()
    [[[1.0, 1.0]], [[1.0, 1.0]]]

    or by the weight with `jax.grad(..., allow_int=True)`.
  """

  values: jax.Array
  indices: jax.Array
  counts: jax.Array
  shape: tuple[int, int]
  edges: jax.Array | None = None

  def __post_init__(self):
    shape = _integers(self.shape)
    _require(
      shape is not None and len(shape) == 2 and min(shape) >= 0,
      f"shape is {self.shape!r}; it must be (K, N).",
    )
    values = jnp.asarray(self.values)
    _require(
      values.ndim == 3
      and jnp.issubdtype(values.dtype, jnp.floating)
      and 0 not in values.shape[1:],
      f"values is {values.dtype}{list(values.shape)}; it must be floating "
      "[nnz, bk, bn].",
    )
    columns = -(-shape[1] // values.shape[2])
    found = dict(values=values, shape=shape)
    for name, rank, first in (("indices", 2, columns), ("counts", 1, columns),
                              ("edges", 1, len(values))):  # fmt: skip
      x = getattr(self, name)
      if name == "edges" and x is None:
        continue
      x = _narrow(x)
      _require(
        jnp.issubdtype(x.dtype, jnp.integer)
        and x.ndim == rank
        and x.shape[0] == first,
        f"{name} is {x.dtype}{list(x.shape)}; it must be integers "
        f"[{first}{', C' if rank == 2 else ''}] for values of shape "
        f"{values.shape} and shape {shape}.",
      )
      found[name] = x.astype(jnp.int32)
    self._set(**found)

  def _set(self, **fields):
    for name, value in fields.items():
      object.__setattr__(self, name, value)

  def tree_flatten_with_keys(self):
    names = ("values", "indices", "counts", "edges")
    children = [
      (jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in names
    ]
    return children, self.shape

  @classmethod
  def tree_unflatten(cls, shape, children):
    made = object.__new__(cls)
    values, indices, counts, edges = children
    made._set(
      values=values, indices=indices, counts=counts, shape=shape, edges=edges
    )
    return made

  @classmethod
  def from_dense(cls, w, mask, block, *, capacity=None) -> "BlockSparseWeight":
    """The blocks of a dense matrix in which a mask has anything.

    Args:
      w: floating [K, N].
      mask: bool, of blocks [n_k, n_n] or of weights [K, N]; weights that it
        excludes are zero.
      block: (bk, bn); what hangs over the edge of w is zero.
      capacity: how many blocks there is room for (nnz): programs stay compiled
        for masks of different blocks. By default those of the mask, which then
        must be concrete. What a traced mask has beyond it is left out.

    Returns:
      A BlockSparseWeight, differentiable by w. Its lists have room for the
      longest, or with `capacity` for any.

    Raises:
      ValueError: for shapes and dtypes that do not fit each other, and a
        concrete mask of more than `capacity` blocks.

    Example:
      >>> mask = jnp.array([[True, False], [False, True]])
      >>> weight = pallas_kernels.BlockSparseWeight.from_dense(
      ...   jnp.ones((4, 6)), mask, (2, 3)
      ... )
      >>> weight.values.shape, weight.indices.tolist(), float(weight.density)
      ((2, 2, 3), [[0], [1]], 0.5)
    """
    w, mask = jnp.asarray(w), jnp.asarray(mask)
    _require(
      w.ndim == 2 and jnp.issubdtype(w.dtype, jnp.floating),
      f"w is {w.dtype}{list(w.shape)}; it must be floating [K, N].",
    )
    sizes = _integers(block)
    _require(
      sizes is not None and len(sizes) == 2 and min(sizes) > 0,
      f"block is {block!r}; it must be two positive integers.",
    )
    bk, bn = sizes
    if capacity is not None:
      room = _integers((capacity,))
      _require(
        room is not None and room[0] >= 0,
        f"capacity is {capacity!r}; it must be None or a number of blocks.",
      )
      (capacity,) = room
    n_k, n_n = -(-w.shape[0] // bk), -(-w.shape[1] // bn)
    _require(
      mask.dtype == bool and mask.shape in ((n_k, n_n), w.shape),
      f"mask is {mask.dtype}{list(mask.shape)}; it must be bool {(n_k, n_n)}, "
      f"one a block, or {w.shape}.",
    )
    blocks = _blocks(w, bk, bn)
    if mask.shape != (n_k, n_n):
      of_weights = _blocks(mask, bk, bn)
      blocks = jnp.where(of_weights, blocks, 0)
      mask = of_weights.any((2, 3))
    concrete = not isinstance(mask, jax.core.Tracer)
    _require(
      concrete or capacity is not None,
      "capacity is None and mask is traced; give one of them statically.",
    )
    longest = n_k
    if concrete:
      many = int(np.sum(mask))
      if capacity is None:
        capacity, longest = many, int(np.max(np.sum(mask, 0), initial=0))
      _require(
        many <= capacity,
        f"capacity is {capacity}; the mask has {many} blocks.",
      )
    # Listed rows first, in order.
    indices = jnp.argsort(~mask, axis=0, stable=True)[:longest].T
    counts = mask.sum(0, dtype=jnp.int32)
    made = cls(jnp.zeros((capacity, bk, bn), w.dtype), indices, counts, w.shape)
    row, column = made.places()
    values = blocks.at[row, column].get(mode="fill", fill_value=0)
    return dataclasses.replace(made, values=values)

  @property
  def block(self) -> tuple[int, int]:
    """(bk, bn)."""
    return self.values.shape[1:]

  @property
  def blocks(self) -> tuple[int, int]:
    """(n_k, n_n), how many blocks the matrix has each way."""
    return tuple(
      -(-size // block) for size, block in zip(self.shape, self.block)
    )

  @property
  def density(self) -> jax.Array:
    """The share of blocks that are listed and used (f32 scalar)."""
    used = (self.places()[0] < self.blocks[0]).sum()
    return used / max(self.blocks[0] * self.blocks[1], 1)

  def places(self) -> tuple[jax.Array, jax.Array]:
    """Block row and column of each value, int32 [nnz].

    The block row is n_k where a value is not used.
    """
    n_k, n_n = self.blocks
    counts = lists.clipped(self.indices, self.counts)
    number = jnp.arange(len(self.values), dtype=jnp.int32)
    return lists.places(self.indices, counts, number, n_n, 0, n_k)

  def dense(self) -> jax.Array:
    """The matrix, [K, N], differentiable by the values."""
    (bk, bn), (n_k, n_n) = self.block, self.blocks
    blocks = jnp.zeros((n_k, n_n, bk, bn), self.values.dtype)
    blocks = blocks.at[self.places()].add(self.values, mode="drop")
    matrix = blocks.swapaxes(1, 2).reshape(n_k * bk, n_n * bn)
    return matrix[: self.shape[0], : self.shape[1]]

  def with_transpose(self) -> "BlockSparseWeight":
    """The same weight with `edges`, which are then not sorted at each step.

    Worth it where lists stay for many steps. Where they change call it again:
    old edges change no result, but cost more than none.
    """
    edges = jnp.argsort(self.places()[0], stable=True)
    return dataclasses.replace(self, edges=edges)


def _require(condition: bool, message: str) -> None:
  if not condition:
    raise ValueError(message)


def _integers(x) -> tuple[int, ...] | None:
  """x as a tuple of integers, NumPy's too, or None where it is none."""
  try:
    return tuple(map(operator.index, x))
  except TypeError:
    return None


def _narrow(x) -> jax.Array:
  """Integers as an array; what int32 cannot hold is clipped before it wraps."""
  ours = lambda x: isinstance(x, jax.Array) or hasattr(x, "__jax_array__")
  if not any(map(ours, jax.tree.leaves(x, is_leaf=ours))):
    x = np.asarray(x)  # jnp.asarray makes 32 bits of it
  xnp = np if isinstance(x, np.ndarray) else jnp
  x = xnp.asarray(x)
  limits = jnp.iinfo(jnp.int32)
  if jnp.issubdtype(x.dtype, jnp.integer):
    info = jnp.iinfo(x.dtype)
    low, high = max(info.min, limits.min), min(info.max, limits.max)
    x = xnp.clip(x, low, high)
  return jnp.asarray(x)


def _blocks(x: jax.Array, bk: int, bn: int) -> jax.Array:
  """[K, N] -> [n_k, n_n, bk, bn], padded by zeros."""
  x = jnp.pad(x, [(0, -x.shape[0] % bk), (0, -x.shape[1] % bn)])
  return x.reshape(-1, bk, x.shape[1] // bn, bn).swapaxes(1, 2)
