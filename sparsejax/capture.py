"""What the parts of a model read and return, as a pure function.

A layer is whatever multiplies its input by a `kernel`: `nnx.Linear` and
`nnx.LinearGeneral`, Linen's `Dense` and `DenseGeneral`. A layer goes by its
kernel's name, as in `masks`.

  outputs, xs = capture.inputs(lambda model, x: model(x), model, x)  # NNX
  outputs, xs = capture.inputs(module.apply, variables, x)  # Linen

A module goes by its path, such as "blocks/2", and may be any that is called:

  outputs, ys = capture.outputs(run, model, x)
  outputs = capture.splice(run, model, {"blocks/2": lambda y: 0 * y}, x)
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import functools
import math
import types
from typing import Any

from flax import linen
from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp

from sparsejax.automatic import automatic

Array = jax.Array
Where = Callable[[str], bool] | None

_WHOLE = 512  # columns of a table that is computed at once


def inputs(
  call: Callable[..., Any], model: Any, *args: Any, where: Where = None
) -> tuple[Any, dict[str, Array]]:
  """What `call(model, *args)` returns, and the input of each layer.

  The model is a copy in which the layers record, so that nothing of `model`
  changes, nor do counters of its own advance. To be used under `jit`: what is
  not returned is then not computed. Layers inside of a transformation over
  layers (`nnx.scan`, `linen.scan`, remat) cannot be seen from outside; JAX
  says that a tracer leaks.

  Args:
    call: function of the model and `args`, such as `lambda model, x: model(x)`,
      or a Linen module's `apply`.
    model: an `nnx.Module`, or the variables of a Linen module.
    *args: whatever `call` takes besides.
    where: which layers, by the kernel's name; default all.

  Returns:
    The outputs of the call, and by name an array [..., K] whose last dimensions
    are those that the kernel contracts, as one. The inputs of a layer that is
    called several times are [rows, K], one call's behind the other's.

  Raises:
    ValueError: no layer was recorded.

  Example:
    >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), jnp.tanh)
    >>> x = jnp.ones((4, 2))
    >>> outputs, found = inputs(lambda model, x: model(x), model, x)
    >>> outputs.shape, {name: x.shape for name, x in found.items()}
    ((4, 3), {'layers/0/kernel': (4, 2)})
  """
  found: dict[str, list[Array]] = {}

  def record(name, x, contracted):
    if where is None or where(name):
      lead = x.shape[: x.ndim - contracted]
      found.setdefault(name, []).append(
        x.reshape(*lead, math.prod(x.shape[x.ndim - contracted :]))
      )

  if isinstance(model, nnx.Module):
    outputs = call(_recording(model, record), *args)
  else:
    with linen.intercept_methods(_interceptor(record)):
      outputs = call(model, *args)
  if not found:
    raise ValueError(
      "where must choose a layer with a kernel that the call runs, got none "
      f"for a {type(model).__name__}"
    )
  return outputs, {name: _joined(xs) for name, xs in found.items()}


def _joined(xs):
  if len(xs) == 1:
    return xs[0]
  return jnp.concatenate([x.reshape(-1, x.shape[-1]) for x in xs])


def _recording(model, record):
  """A copy of an NNX model whose layers record."""
  model = nnx.clone(model)
  for path, layer in nnx.iter_graph(model):
    if hasattr(layer, "kernel") and hasattr(layer, "dot_general"):
      name = "/".join(map(str, (*path, "kernel")))
      layer.dot_general = _recorder(name, layer.dot_general, record)
  return model


def _recorder(name, dot_general, record):
  dot_general = dot_general or lax.dot_general

  def dot(x, kernel, dimension_numbers, *args, **options):
    (axes, _), _ = dimension_numbers
    record(name, jnp.moveaxis(x, axes, range(-len(axes), 0)), len(axes))
    return dot_general(x, kernel, dimension_numbers, *args, **options)

  return dot


def _interceptor(record):
  def intercept(call, args, kwargs, context):
    layer = context.module
    if context.method_name == "__call__" and isinstance(
      layer, linen.Dense | linen.DenseGeneral
    ):
      (x,) = args
      axes = getattr(layer, "axis", -1)
      axes = axes if isinstance(axes, tuple) else (axes,)
      x = jnp.moveaxis(jnp.asarray(x), axes, range(-len(axes), 0))
      record("/".join((*layer.path, "kernel")), x, len(axes))
    return call(*args, **kwargs)

  return intercept


def outputs(
  call: Callable[..., Any], model: Any, *args: Any, where: Where = None
) -> tuple[Any, dict[str, Any]]:
  """What `call(model, *args)` returns, and what each module in it returned.

  As `inputs`, and with the same limits: a module inside of a transformation
  over layers cannot be seen. A module is seen where it is called, not where
  another method of it is, and one that lies at several paths goes by the first.

  Args:
    call: function of the model and `args`; see `inputs`.
    model: an `nnx.Module`, or the variables of a Linen module.
    *args: whatever `call` takes besides.
    where: which modules, by their path, that of the model being ""; default
      all.

  Returns:
    The outputs of the call, and by path what the module returned. Of a module
    that was called several times that is a list, an entry for each call.

  Raises:
    ValueError: no module was called.

  Example:
    >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), jnp.tanh)
    >>> run = lambda model, x: model(x)
    >>> _, found = outputs(run, model, jnp.ones((4, 2)))
    >>> {path: y.shape for path, y in found.items()}
    {'layers/0': (4, 3), '': (4, 3)}
  """
  found: dict[str, list[Any]] = {}

  def record(path, y):
    if where is None or where(path):
      found.setdefault(path, []).append(y)
    return y

  result = _through(call, model, args, record)
  if not found:
    raise ValueError(
      "where must choose a module that the call runs, got none for a "
      f"{type(model).__name__}"
    )
  return result, {p: ys[0] if len(ys) == 1 else ys for p, ys in found.items()}


def splice(
  call: Callable[..., Any],
  model: Any,
  changes: Mapping[str, Callable[[Any], Any]],
  *args: Any,
) -> Any:
  """`call(model, *args)`, with functions put behind some of its modules.

  Nothing of `model` changes, and gradients pass through the functions. Where
  one of `splice` and `outputs` calls another, the outer one sees what the inner
  one makes.

  Args:
    call: function of the model and `args`; see `inputs`.
    model: an `nnx.Module`, or the variables of a Linen module.
    changes: by a module's path, as `outputs` names it, a function of what the
      module returned that gives what takes its place. It goes through every
      call of the module.
    *args: whatever `call` takes besides.

  Returns:
    The outputs of the call.

  Raises:
    ValueError: a path at which the call runs no module.

  Example:
    >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), jnp.tanh)
    >>> run = lambda model, x: model(x)
    >>> ablated = {"layers/0": jnp.zeros_like}
    >>> splice(run, model, ablated, jnp.ones((1, 2))).tolist()
    [[0.0, 0.0, 0.0]]
  """
  ran = {}  # in the order of the calls

  def change(path, y):
    ran[path] = None
    return changes[path](y) if path in changes else y

  result = _through(call, model, args, change)
  if unknown := [path for path in changes if path not in ran]:
    raise ValueError(
      f"changes must name modules that the call runs, {[*ran]}, got {unknown}"
    )
  return result


def _through(call, model, args, change):
  """The call, in which change(path, y) takes the place of each module's y."""
  if isinstance(model, nnx.Module):
    model = nnx.clone(model)
    for path, module in nnx.iter_modules(model):
      if callable(module):
        _put_behind(module, functools.partial(change, "/".join(map(str, path))))
    return call(model, *args)

  def intercept(method, args, kwargs, context):
    y = method(*args, **kwargs)
    if context.method_name != "__call__":
      return y
    return change("/".join(context.module.path), y)

  with linen.intercept_methods(intercept):
    return call(model, *args)


def _put_behind(module, change):
  """Makes an NNX module return change(y) in place of its y."""
  before = getattr(module, "_behind", None)
  if before is None:
    object.__setattr__(module, "__class__", _changed_class(type(module)))
    module._behind = change
  else:
    module._behind = lambda y: before(change(y))


# NNX keeps every class that there ever was: one for each is enough.
@functools.cache
def _changed_class(cls):
  """A subclass: Python looks for `__call__` in the class alone."""

  def __call__(self, *args, **kwargs):
    return self._behind(cls.__call__(self, *args, **kwargs))

  return types.new_class(
    cls.__name__,
    (cls,),
    {"pytree": cls._pytree__is_pytree},
    lambda body: body.update(__call__=__call__),
  )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments:
  """Moments of the rows that a layer read, over any number of batches.

  Attributes:
    count: f32 scalar, rows so far.
    mean: f32 [K].
    squares: f32 [K], the mean of the squares.
    second: None, or f32 [K, K], the mean of x.T @ x. The Hessian of a layer's
      squared error is twice that.
  """

  count: Array
  mean: Array
  squares: Array
  second: Array | None

  @classmethod
  def zeros(cls, k: int, *, second: bool = True) -> "Moments":
    """Those of no rows."""
    zeros = jnp.zeros(k, jnp.float32)
    table = jnp.zeros((k, k), jnp.float32) if second else None
    return cls(jnp.zeros((), jnp.float32), zeros, zeros, table)

  def add(self, x: Array, valid: Array | None = None) -> "Moments":
    """With further rows.

    Args:
      x: [..., K], floating.
      valid: None, or bool of the leading dimensions of x: which rows count.

    Returns:
      The moments of all rows, accumulated in f32; on Explicit axes they lie
      whole on every device.

    >>> moments = Moments.zeros(2).add(jnp.array([[1.0, 2.0], [3.0, 2.0]]))
    >>> moments.mean.tolist(), moments.second.tolist()
    ([2.0, 2.0], [[5.0, 4.0], [4.0, 4.0]])
    """
    if x.shape[-1] != self.mean.shape[0] or (
      valid is not None and valid.shape != x.shape[:-1]
    ):
      given = None if valid is None else valid.shape
      raise ValueError(
        f"x must be [..., {self.mean.shape[0]}] and valid of its leading "
        f"dimensions, got {x.shape} and {given}"
      )
    return automatic(_added, self, x, valid)

  @property
  def variance(self) -> Array:
    """f32 [K]."""
    return jnp.maximum(self.squares - self.mean**2, 0)


def _added(moments, x, valid):
  """The moments with those of further rows."""
  x = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
  rows = jnp.float32(x.shape[0])
  if valid is not None:
    valid = valid.reshape(-1)
    x, rows = jnp.where(valid[:, None], x, 0), valid.sum(dtype=jnp.float32)
  count = moments.count + rows
  weight = 1 / jnp.maximum(count, 1)
  join = lambda mean, total: mean + weight * (total - rows * mean)
  table = moments.second
  return Moments(
    count=count,
    mean=join(moments.mean, x.sum(0)),
    squares=join(moments.squares, (x**2).sum(0)),
    second=None if table is None else join(table, _products(x)),
  )


def _products(x: Array) -> Array:
  """x.T @ x, of which what lies below the diagonal is not computed again."""
  k = x.shape[1]
  if k <= _WHOLE:
    return jnp.matmul(x.T, x, precision="highest")
  # XLA would compute x again for each part.
  x = lax.optimization_barrier(x)
  left, right = x[:, : k // 2], x[:, k // 2 :]
  across = jnp.matmul(left.T, right, precision="highest")
  return jnp.block([[_products(left), across], [across.T, _products(right)]])


def moments(
  call: Callable[..., Any],
  model: Any,
  batches: Iterable[Any],
  *,
  where: Where = None,
  valid: Callable[[Any], Array] | None = None,
  second: bool = True,
) -> dict[str, Moments]:
  """The moments of each layer's inputs over batches, one batch at a time.

  One compiled step, which runs the model no further than the last layer that is
  asked for, and keeps no inputs; calls with the same functions share it. Where
  batches are sharded, so is the work.

  Args:
    call: function of the model and a batch; see `inputs`.
    model: an `nnx.Module`, or the variables of a Linen module.
    batches: pytrees of arrays, of equal shapes.
    where: which layers, by the kernel's name; default all.
    valid: None, or a function of a batch: bool, of the leading dimensions of
      the inputs: which rows count (padding does not).
    second: whether to keep the [K, K] table.

  Returns:
    Moments by the kernel's name.

  Raises:
    ValueError: there are no batches, or no layers.

  Example:
    >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    >>> batches = jnp.arange(12.0).reshape(3, 2, 2)
    >>> found = moments(lambda model, x: model(x), model, batches)
    >>> found["kernel"].count.item(), found["kernel"].mean.tolist()
    (6.0, [5.0, 6.0])
  """
  rebuild, model = _split(model)
  static = (call, rebuild, where, valid, second)
  found = None
  for batch in batches:
    if found is None:
      shapes = _add.eval_shape(static, model, None, batch)
      found = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    found = _add(static, model, found, batch)
  if found is None:
    raise ValueError("batches must hold at least one batch, got none")
  return found


def in_order(
  call: Callable[..., Any],
  blocks: Sequence[Any],
  batches: Iterable[Any],
  update: Callable[[int, Any, dict[str, Moments]], tuple[Any, Any]],
  *,
  where: Where = None,
  valid: Callable[[Any], Array] | None = None,
  second: bool = True,
) -> tuple[list[Any], list[Any]]:
  """Updates blocks, each by its moments on what the updated ones before give.

  Layer-sequential calibration: a block runs twice on each batch, for its
  moments and then, updated, for what the next one reads. That is kept for all
  batches, sharded as they are. Blocks of one kind share what is compiled. The
  blocks given do not change, nor do counters of theirs advance.

  Args:
    call: function of a block and a batch that returns the next block's batch.
      What goes with the hidden states, such as a mask, it hands on.
    blocks: what runs one after the other: NNX modules, or variables of Linen
      modules.
    batches: of the first block, as `moments` takes them.
    update: function of a block's number, its parameters and its moments by the
      kernel's name in the block. Returns the new parameters and anything else,
      as `weights.prune` does. Parameters are an `nnx.State`, of what is
      `nnx.Param` in the module, or the variables.
    where: as `moments` takes it.
    valid: likewise.
    second: likewise.

  Returns:
    The new blocks, and what else `update` returned for each.

  Raises:
    ValueError: there are no blocks, no batches, or a block has no layers.

  Example:
    >>> blocks = [nnx.Linear(2, 2, rngs=nnx.Rngs(i)) for i in range(2)]
    >>> def halve(number, params, moments):
    ...   halved = jax.tree.map(lambda x: x / 2, params)
    ...   return halved, moments["kernel"].count.item()
    >>> run = lambda block, x: block(x)
    >>> halved, counts = in_order(run, blocks, [jnp.ones((4, 2))], halve)
    >>> bool(jnp.all(halved[1].kernel[...] == blocks[1].kernel[...] / 2))
    True
    >>> counts
    [4.0, 4.0]
  """
  if not blocks:
    raise ValueError("blocks must hold at least one, got none")
  batches, updated, extras = list(batches), [], []
  options = {"where": where, "valid": valid, "second": second}
  for number, block in enumerate(blocks):
    found = moments(call, block, batches, **options)
    if isinstance(block, nnx.Module):
      rebuild, params, rest = nnx.split(block, nnx.Param, ...)
      params, extra = update(number, params, found)
      block = nnx.merge(rebuild, params, rest)
    else:
      block, extra = update(number, block, found)
    updated.append(block)
    extras.append(extra)
    if len(updated) < len(blocks):
      rebuild, block = _split(block)
      # One by one, so that what was read is freed.
      for i, batch in enumerate(batches):
        batches[i] = _run((call, rebuild), block, batch)
  return updated, extras


def _split(model):
  """What is static of an NNX model, None of another, and its arrays."""
  return nnx.split(model) if isinstance(model, nnx.Module) else (None, model)


# Calls with the same functions compile once.
@functools.partial(jax.jit, static_argnums=0)
def _run(static, model, batch):
  """What the call returns."""
  call, rebuild = static
  return call(model if rebuild is None else nnx.merge(rebuild, model), batch)


@functools.partial(jax.jit, static_argnums=0)
def _add(static, model, found, batch):
  """The moments with those of a batch."""
  call, rebuild, where, valid, second = static
  model = model if rebuild is None else nnx.merge(rebuild, model)
  _, xs = inputs(call, model, batch, where=where)
  rows = None if valid is None else valid(batch)
  if found is None:
    found = {
      name: Moments.zeros(x.shape[-1], second=second) for name, x in xs.items()
    }
  return {name: found[name].add(x, rows) for name, x in xs.items()}
