"""Sparse layers that run as such: kernels without what their masks exclude.

While a mask changes, weights are dense and masked. Once it stays, a kernel of
whole blocks becomes a `pallas_kernels.BlockSparseWeight`, and one with constant
fan-in a `CondensedWeight`; both cost what is left. On a CPU they are faster
than dense ones from moderate sparsities on, up to some batch:
`python -m experiments.bench --only=condensed` prints where.
"""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from pallas_kernels import partitioning
from sparsejax import paths
from sparsejax.select import structures as structures_lib

Array = jax.Array
PyTree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class CondensedWeight:
  """A K x N matrix whose columns have equally many entries, or none.

  Attributes:
    values: floating [fan_in, columns].
    inputs: uint16 (int32 where K needs it) [fan_in, columns]: the row of each
      value; what is out of range reads the last row.
    outputs: int32 [columns], the columns that have entries, or None for all.
    shape: (K, N), static.
  """

  values: Array
  inputs: Array
  outputs: Array | None
  shape: tuple[int, int] = dataclasses.field(metadata=dict(static=True))

  @classmethod
  def from_dense(cls, w: Array, mask: Array) -> "CondensedWeight":
    """The entries of `w` [K, N] in a concrete bool mask of constant fan-in.

    Raises:
      ValueError: columns of the mask have neither equally many entries nor
        none.

    >>> mask = jnp.array([[True, False], [False, True], [True, True]])
    >>> w = weights.CondensedWeight.from_dense(jnp.ones((3, 2)), mask)
    >>> w.inputs.tolist(), w.dense().tolist()
    ([[0, 1], [2, 2]], [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    """
    mask = np.asarray(mask)
    counts = mask.sum(0)
    (outputs,) = np.nonzero(counts)
    fan_in = int(counts.max(initial=0))
    if (counts[outputs] != fan_in).any():
      raise ValueError(
        f"mask must have constant fan-in, got columns of {counts.min()} to "
        f"{fan_in} entries"
      )
    inputs = np.argsort(~mask[:, outputs], axis=0, kind="stable")[:fan_in]
    narrow = mask.shape[0] <= 2**16
    alive = None if outputs.size == mask.shape[1] else outputs
    return cls(
      values=jnp.asarray(w)[inputs, outputs],
      inputs=jnp.asarray(inputs.astype(np.uint16 if narrow else np.int32)),
      outputs=None if alive is None else jnp.asarray(alive, jnp.int32),
      shape=mask.shape,
    )

  def dense(self) -> Array:
    """The matrix, [K, N]."""
    outputs = self.outputs
    if outputs is None:
      outputs = jnp.arange(self.shape[1])
    matrix = jnp.zeros(self.shape, self.values.dtype)
    at = jnp.minimum(self.inputs.astype(jnp.int32), self.shape[0] - 1)
    return matrix.at[at, outputs].add(self.values)


def condense(
  params: PyTree,
  masks: PyTree,
  structures: structures_lib.Structure | Mapping[str, structures_lib.Structure],
) -> PyTree:
  """Kernels without what their masks exclude.

  Args:
    params: the parameters.
    masks: their masks, as `masks(opt_state, params)` gives them: a tree of
      bool arrays like the parameters, or part of that tree. Masks are read
      here, so this is not for `jit`.
    structures: what the masks were chosen by: `select.Block(...)` or
      `select.ConstantFanIn()`, for all kernels or by patterns of their names.

  Returns:
    A tree like `params`. A kernel [inputs, outputs] that a mask excludes
    something of is a `pallas_kernels.BlockSparseWeight` under `Block` and a
    `CondensedWeight` under `ConstantFanIn`; all else is as it was. Multiply by
    either with `condensed_matmul`; `condense_layers` does it to a model.

  Raises:
    ValueError: naming the parameter, for a mask that is not of its structure,
      and for what is no kernel [inputs, outputs].

  Example:
    >>> params = {"w": jnp.arange(1.0, 9.0).reshape(4, 2), "b": jnp.zeros(2)}
    >>> masks = {"w": jnp.array([[1, 0], [1, 0], [0, 1], [0, 1]], bool)}
    >>> condensed = weights.condense(params, masks, select.Block((2, 1)))
    >>> condensed["w"].values.tolist()
    [[[1.0], [3.0]], [[6.0], [8.0]]]
    >>> weights.condensed_matmul(jnp.ones(4), condensed["w"]).tolist()
    [4.0, 14.0]

  Source: srigl, SRigL: the condensed representation of constant fan-in.
  """
  leaves, rebuild = paths.named(params)
  wanted = paths.named(masks)[0]
  for name, mask in wanted.items():
    if isinstance(mask, jax.core.Tracer):
      raise ValueError(f"masks[{name!r}] must be concrete, got {mask}")
    got = leaves[name].shape if name in leaves else None
    if got != mask.shape or mask.dtype != bool:
      raise ValueError(
        f"masks[{name!r}] must be a boolean mask of a parameter, got "
        f"{mask.dtype}{list(mask.shape)} for a parameter of shape {got}"
      )
  sparse = [n for n, mask in wanted.items() if not np.all(mask)]
  found = dict.fromkeys(sparse, structures)
  if isinstance(structures, Mapping):
    found = paths.matching("structures", structures, sparse)
  for name in sparse:
    try:
      leaves[name] = _condensed(
        leaves[name], np.asarray(wanted[name]), found.get(name)
      )
    except ValueError as error:
      raise ValueError(f"{name}: {error}") from error
  return rebuild(leaves)


def _condensed(w, mask, structure):
  if w.ndim != 2:
    raise ValueError(f"must be a kernel [inputs, outputs], got {w.shape}")
  axes = structures_lib.Axes()
  if isinstance(structure, structures_lib.Block):
    structure.check(w.shape, axes)
    (rows, columns), (bk, bn) = w.shape, structure.shape
    blocks = mask.reshape(rows // bk, bk, columns // bn, bn)
    listed = blocks.any((1, 3))
    if (blocks.all((1, 3)) != listed).any():
      raise ValueError(f"its mask must be of whole blocks for {structure}")
    made = pallas_kernels.BlockSparseWeight.from_dense(w, listed, (bk, bn))
    return made.with_transpose()
  if isinstance(structure, structures_lib.ConstantFanIn):
    return CondensedWeight.from_dense(w, mask)
  raise ValueError(
    f"structures must give it Block or ConstantFanIn, got {structure}"
  )


def condensed_matmul(x: Array, weight: PyTree) -> Array:
  """x @ weight, for whatever `condense` returns.

  Products accumulate in f32, also their sums. Differentiable in x and in
  weight.values.

  Args:
    x: floating [..., K].
    weight: a CondensedWeight, a BlockSparseWeight, an array [K, N], or an
      `nnx.Variable` that holds one of these.

  Returns:
    [..., N] in the dtype of x.

  Raises:
    ValueError: shapes or dtypes do not fit each other.

  >>> mask = jnp.array([[True, False], [False, True], [False, False]])
  >>> w = weights.CondensedWeight.from_dense(jnp.ones((3, 2)), mask)
  >>> weights.condensed_matmul(jnp.array([1.0, 2.0, jnp.nan]), w).tolist()
  [1.0, 2.0]
  """
  x = jnp.asarray(x)
  if isinstance(weight, nnx.Variable):
    weight = weight.get_value()
  if isinstance(weight, pallas_kernels.BlockSparseWeight):
    return pallas_kernels.block_sparse_matmul(x, weight)
  if not isinstance(weight, CondensedWeight):
    return x @ weight
  if not x.ndim or x.shape[-1] != weight.shape[0]:
    raise ValueError(
      f"x must be [..., {weight.shape[0]}] for a weight of shape "
      f"{weight.shape}, got {x.shape}"
    )
  if x.dtype != weight.values.dtype:
    raise ValueError(
      f"x must have the dtype of the weight's values, "
      f"{weight.values.dtype}, got {x.dtype}"
    )
  lead = x.shape[:-1]
  if 0 in (*x.shape, *weight.values.shape):
    return jnp.zeros((*lead, weight.shape[1]), x.dtype)
  x = x[None] if x.ndim == 1 else x
  x = x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])
  y = _gathered(x, weight.values, weight.inputs)
  if weight.outputs is not None:
    all_of_them = jnp.zeros((*y.shape[:-1], weight.shape[1]), y.dtype)
    y = all_of_them.at[..., weight.outputs].set(y)
  return y.reshape(*lead, weight.shape[1])


# Of constant fan-in: y[., o] = sum over slots s of x[., inputs[s, o]] *
# values[s, o]. Rows of the batch lie side by side, so that a gathered input is
# a run of them; for each slot they are gathered, scaled and added in one pass.


@jax.custom_vjp
def _gathered(x, values, inputs):
  """[b, t, K] -> [b, t, columns]."""
  names = ("b t k", "s n", "s n")
  (y,) = _on_shards(_forward, (x, values, inputs), names, ["b t n"], {})
  return y


def _gathered_fwd(x, values, inputs):
  return _gathered(x, values, inputs), (x, values, inputs)


def _gathered_bwd(residuals, dy):
  x, values, inputs = residuals
  dx, dvalues = _on_shards(
    _backward,
    (x, dy, values, inputs),
    ("b t k", "b t n", "s n", "s n"),
    ["b t k", "s n"],
    {0: "n", 1: "b"},
  )
  sum_like = partitioning.sum_like
  return sum_like(dx, x), sum_like(dvalues, values), None


_gathered.defvjp(_gathered_fwd, _gathered_bwd)


def _on_shards(f, args, names, outs, summed):
  """f(*args), on shards of the rows and of the columns."""
  args = partitioning.vary_alike(args)[0]
  if jax.typeof(args[0]).sharding.mesh.empty:
    return f(*args)
  sizes = {}
  for x, words in zip(args, names, strict=True):
    sizes |= dict(zip(words.split(), x.shape, strict=True))
  call = lambda *args: partitioning.per_shard(
    lambda axes, *args: f(*args),
    args,
    names,
    outs,
    sizes,
    cut="bn",
    summed=summed,
    follow=len(args),
    batch=None,
  )
  return jax.custom_batching.sequential_vmap(call)(*args)


def _forward(x, values, inputs):
  (b, t, k), (slots, columns) = x.shape, values.shape
  rows, x = b * t, x.reshape(b * t, k)
  # Found by trial: XLA:CPU makes the best of 16 rows, and of so many slots.
  at_once = 2 if rows == 1 else 4
  if rows > 5:
    x = jnp.pad(x, [(0, -rows % 16), (0, 0)])
    at_once = 8 if len(x) == 16 else 4
  x = x.astype(jnp.float32).T if rows > 1 else x[0].astype(jnp.float32)

  def some(first, many, y):
    for slot in range(many):
      of_slot = lambda a: lax.dynamic_index_in_dim(a, first + slot, 0, False)  # noqa: B023
      scale = of_slot(values).astype(jnp.float32)
      y += _rows(x, of_slot(inputs)) * (scale if rows == 1 else scale[:, None])
    return y

  y, _ = partitioning.vary_alike(jnp.zeros((columns, *x.shape[1:])), x)
  y = lax.fori_loop(
    0, slots // at_once, lambda i, y: some(i * at_once, at_once, y), y
  )
  y = some(slots - slots % at_once, slots % at_once, y)
  y = y[None] if rows == 1 else y.T[:rows]
  return (y.reshape(b, t, columns).astype(values.dtype),)


def _backward(x, dy, values, inputs):
  (b, t, k), columns = x.shape, values.shape[1]
  across = lambda a, size: a.reshape(b * t, size).astype(jnp.float32).T
  x, dy = across(x, k), across(dy, columns)

  def slot(dx, at):
    values, inputs = at
    add = values.astype(jnp.float32)[:, None] * dy
    dx = dx.at[inputs.astype(jnp.int32)].add(add, mode="clip")
    return dx, (_rows(x, inputs) * dy).sum(1).astype(values.dtype)

  dx, _ = partitioning.vary_alike(jnp.zeros(x.shape), x)
  dx, dvalues = lax.scan(slot, dx, (values, inputs))
  return dx.T.reshape(b, t, k).astype(values.dtype), dvalues


def _rows(x, index):
  """x[index]; XLA's gather clips what is out of range."""
  return x.at[index.astype(jnp.int32)].get(
    mode="promise_in_bounds", wrap_negative_indices=False
  )


class Lists(nnx.Variable):
  """The integers of a condensed kernel, which no optimizer changes."""


class CondensedDot(nnx.Module):
  """The `dot_general` of a layer whose kernel holds a weight's values.

  Attributes:
    lists: Lists, the weight's arrays but for the values.
  """

  def __init__(self, weight):
    (_, *lists), structure = jax.tree.flatten(weight)
    self.lists = Lists(tuple(lists))
    self.structure = structure

  def __call__(self, x, values, dimension_numbers, precision=None, **options):
    del dimension_numbers, precision, options  # those of Linear, for a kernel
    weight = self.structure.unflatten((values, *self.lists.get_value()))
    return condensed_matmul(x, weight)


def _kernel_like(kernel, weight):
  """The kernel's Variable with its metadata, which holds a weight's values.

  Of mesh axes the outputs' stays where values have such a dimension.
  """
  updates = {}
  if kernel.get_metadata().get("out_sharding") is not None:
    spec = [None] * weight.values.ndim
    if getattr(weight, "outputs", 0) is None:
      spec[-1] = tuple(kernel.get_metadata()["out_sharding"])[-1]
    updates["out_sharding"] = tuple(spec)
  return kernel.copy(weight.values, **updates)


def condense_layers(
  model: nnx.Module,
  masks: PyTree,
  structures: structures_lib.Structure | Mapping[str, structures_lib.Structure],
) -> nnx.Module:
  """A copy of a model whose sparse `nnx.Linear` layers run condensed.

  The kernels of these hold the values alone, [nnz, bk, bn] or [fan_in, out],
  and train as any parameter does; the lists are Variables of the kind `Lists`.
  A kernel keeps its kind and metadata; of the mesh axes in it, the outputs' is
  kept under `ConstantFanIn` where all outputs have entries, and no other.

  Args:
    model: any module that holds `nnx.Linear`.
    masks: as in `condense`, for `nnx.state(model, nnx.Param)`.
    structures: as in `condense`.

  Returns:
    The copy. It shares no arrays that are written.

  Raises:
    ValueError: as `condense`, and for a sparse parameter that is not the kernel
      of an `nnx.Linear`, or of one that has a `dot_general` of its own.

  Example:
    >>> from flax import nnx
    >>> model = nnx.Sequential(nnx.Linear(4, 2, rngs=nnx.Rngs(0)), nnx.relu)
    >>> mask = jnp.array([[1, 0], [1, 0], [0, 1], [0, 1]], bool)
    >>> masks = {"layers": {0: {"kernel": mask}}}
    >>> fast = weights.condense_layers(model, masks, select.ConstantFanIn())
    >>> fast.layers[0].kernel.shape, fast(jnp.ones((3, 4))).shape
    ((2, 2), (3, 2))
  """
  model = nnx.clone(model)
  params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  found = condense(params, masks, structures)
  is_weight = lambda x: isinstance(
    x, CondensedWeight | pallas_kernels.BlockSparseWeight
  )
  found, _ = jax.tree_util.tree_flatten_with_path(found, is_leaf=is_weight)
  sparse = {paths.name_of(path): x for path, x in found if is_weight(x)}
  for path, layer in nnx.iter_graph(model):
    name = "/".join(map(str, (*path, "kernel")))
    if isinstance(layer, nnx.Linear) and name in sparse:
      weight = sparse.pop(name)
      if layer.dot_general is not lax.dot_general:
        raise ValueError(
          f"{name}: its layer must have lax.dot_general as its dot_general, "
          f"got {layer.dot_general}"
        )
      layer.kernel = _kernel_like(layer.kernel, weight)
      layer.dot_general = nnx.data(CondensedDot(weight))
  if sparse:
    raise ValueError(
      f"masks must be of kernels of nnx.Linear, got {sorted(sparse)}"
    )
  return model
