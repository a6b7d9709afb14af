"""The public function, and its derivatives to any order.

With x the rows of lhs that the edges read, y rows at their targets and s their
scales, let

  T(x, w, y, s) = sum over edges i of s[i] * x[i] @ w[group of i] @ y[i].

The grouped matmul is T's derivative by y, and its gradients are those by x,
by w and by s: `_forward` (along the edges, or back), `_outer` and `_dots`.
T is linear in each argument, so that their derivatives are among them again.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from pallas_kernels import partitioning
from pallas_kernels.grouped_matmul import checks
from pallas_kernels.grouped_matmul import dispatch
from pallas_kernels.grouped_matmul import edges as edges_lib
from pallas_kernels.grouped_matmul import reference


def grouped_matmul(
  lhs,
  rhs,
  group_sizes,
  *,
  rhs_gate=None,
  activation=None,
  gather=None,
  scatter=None,
  num_rows=None,
  row_scale=None,
  transpose_rhs=False,
  group_offset=None,
  preferred_element_type=None,
  backend=None,
  interpret=False,
):
  """Multiplies each row by the weight of its group.

  The edges 0 .. m - 1 belong to the groups in turn: the first group_sizes[0]
  to group 0, the next group_sizes[1] to group 1, and so on. Edge i reads row
  gather[i] of lhs, computes

    activation(row @ rhs_gate[group]) * (row @ rhs[group]) * row_scale[i]

  and adds it to row scatter[i] of the result. Each part but `row @ rhs[group]`
  is optional; without rhs_gate the activation is that of the product. Neither
  rows that were gathered nor rows before they are scattered are ever held all
  at once (on TPU they are, for now).

  Edges behind the last group give zeros, in the result and in all gradients,
  whatever their rows, scales and cotangents hold. Differentiable in lhs, rhs,
  rhs_gate and row_scale, in reverse mode, to any order. Under differentiation a
  call with an activation or rhs_gate keeps its products, [m, n] in the dtype of
  lhs. Under `vmap` calls run one after the other.

  Args:
    lhs: [rows, k], floating.
    rhs: [groups, k, n] in the dtype of lhs, or [groups, n, k] with
      `transpose_rhs`.
    group_sizes: int32 [groups]. Below 0 counts as 0; beyond m is cut.
    rhs_gate: None, or as rhs.
    activation: None, or an elementwise function such as jax.nn.silu, which may
      hold no arrays; one object for all calls, since each new one is compiled
      anew.
    gather: None, where edge i reads row i and m is the number of rows; or int32
      [m]. Rows that do not exist read as zeros.
    scatter: None, where edge i is row i of the result; or int32 [m]. Rows that
      do not exist are dropped.
    num_rows: int, how many rows the result has; given together with `scatter`.
    row_scale: None, or floating [m].
    transpose_rhs: see rhs.
    group_offset: None, or an int32 scalar: rhs holds the weights of the groups
      from this one on, of more that group_sizes has; edges of other groups give
      zeros. So experts are divided over a mesh axis inside of `jax.shard_map`,
      and the results summed over it.
    preferred_element_type: dtype of the result, default that of lhs. Products
      accumulate in f32.
    backend: None chooses by platform: "tpu" (Pallas) on TPU, "xla" elsewhere.
      "reference" is the dense definition. A backend named here runs or raises.
    interpret: run the Pallas kernel in the interpreter, on any platform: True,
      or `jax.experimental.pallas.tpu.InterpretParams(...)`.

  Returns:
    [m, n], or [num_rows, n] with `scatter`.

  Raises:
    ValueError: for shapes, dtypes or options that do not fit, naming the
      argument, and for an explicit backend that lacks what is asked.

  Example:
    >>> lhs = jnp.array([[1.0], [2.0], [3.0]])
    >>> rhs = jnp.array([[[10.0]], [[100.0]]])
    >>> pallas_kernels.grouped_matmul(lhs, rhs, jnp.array([2, 1])).tolist()
    [[10.0], [20.0], [300.0]]

    Two experts on four tokens, two edges a token:

    >>> x, up = jnp.ones((4, 8)), jnp.ones((2, 8, 16))
    >>> token, sizes = jnp.array([0, 1, 2, 3, 0, 1, 2, 3]), jnp.array([4, 4])
    >>> h = pallas_kernels.grouped_matmul(
    ...   x, up, sizes, rhs_gate=up, activation=jax.nn.silu, gather=token
    ... )
    >>> pallas_kernels.grouped_matmul(
    ...   h, up, sizes, transpose_rhs=True, scatter=token, num_rows=4
    ... ).shape
    (4, 8)

  Source: scattermoe, ScatterMoE: rows are gathered and scattered by the product
  itself. megablocks, MegaBlocks: groups of any size, without padding.
  """
  as_array = lambda x: None if x is None else jnp.asarray(x)
  lhs, rhs, rhs_gate, row_scale = map(as_array, (lhs, rhs, rhs_gate, row_scale))
  group_sizes, gather, scatter, group_offset = map(
    as_array, (group_sizes, gather, scatter, group_offset)
  )
  checks.check(
    lhs,
    rhs,
    group_sizes,
    rhs_gate,
    activation,
    gather,
    scatter,
    num_rows,
    row_scale,
    transpose_rhs,
    group_offset,
    preferred_element_type,
    backend,
    interpret,
  )
  settings = dispatch.Settings(
    dtype=jnp.dtype(preferred_element_type or lhs.dtype),
    transpose_rhs=bool(transpose_rhs),
    combine=dispatch.Combine(activation),
    backend=backend or "auto",
    interpret=interpret,
  )
  return _apply(
    lhs,
    (rhs,) if rhs_gate is None else (rhs_gate, rhs),
    group_sizes,
    group_offset,
    gather,
    scatter,
    row_scale,
    num_rows=num_rows,
    settings=settings,
  )


# Jitted, so that a call outside of jit does not trace its loops again.
@functools.partial(jax.jit, static_argnames=("num_rows", "settings"))
def _apply(
  lhs, weights, sizes, offset, gather, scatter, scale, *, num_rows, settings
):
  if settings.combine.activation is not None:  # here it is traced only once
    checks.check_activation(settings.combine.activation)
  sizes, offset, gather, scatter = jax.tree.map(
    _int32, (sizes, offset, gather, scatter)
  )
  sizes = partitioning.replicated(sizes)
  groups, n = (
    weights[0].shape[0],
    weights[0].shape[1 + (not settings.transpose_rhs)],
  )
  count = lhs.shape[0] if gather is None else gather.shape[0]
  rows = count if scatter is None else num_rows
  if 0 in (*lhs.shape, groups, n, count, rows, sizes.shape[0]):
    return jnp.zeros((rows, n), settings.dtype)
  edges = edges_lib.make(
    sizes, groups, offset, gather, lhs.shape[0], scatter, num_rows
  )
  if scale is not None:
    scale = scale.astype(jnp.float32)
  if settings.backend == "reference":
    return reference.product(
      lhs,
      weights,
      scale,
      edges,
      transpose_rhs=settings.transpose_rhs,
      combine=settings.combine,
      dtype=settings.dtype,
    )
  if len(weights) == 1 and settings.combine == dispatch.Combine():
    return _forward(lhs, weights[0], scale, edges, settings)
  return _combined(lhs, weights, scale, edges, settings)


def _int32(x):
  """x in 32 bits; clipped before the cast, or larger numbers would wrap."""
  far, info = 2**30, jnp.iinfo(x.dtype)
  return jnp.clip(x, max(info.min, -far), min(info.max, far)).astype(jnp.int32)


def _back(settings, dtype):
  """The settings of the product in the other direction."""
  return dataclasses.replace(
    settings, transpose_rhs=not settings.transpose_rhs, dtype=dtype
  )


def _like(grads, primals):
  """Gradients as shard_map wants them: equal where their primals are."""
  return jax.tree.map(partitioning.sum_like, grads, primals)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _forward(lhs, rhs, scale, edges, settings):
  """T by y: [targets, n]."""
  return dispatch.product(lhs, (rhs,), scale, edges, settings)[0]


def _forward_fwd(lhs, rhs, scale, edges, settings):
  return _forward(lhs, rhs, scale, edges, settings), (lhs, rhs, scale, edges)


def _forward_bwd(settings, residuals, dout):
  lhs, rhs, scale, edges = residuals
  dout = dout.astype(lhs.dtype)
  back = _back(settings, lhs.dtype)
  if scale is None:
    dlhs, dscale = _forward(dout, rhs, None, edges.reversed(), back), None
  else:
    dlhs, dscale = _dots(dout, rhs, scale, lhs, edges.reversed(), back)
  drhs = _outer(lhs, dout, scale, edges, rhs, settings)
  return *_like((dlhs, drhs, dscale), (lhs, rhs, scale)), None


_forward.defvjp(_forward_fwd, _forward_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _dots(lhs, rhs, scale, other, edges, settings):
  """T by y and by s: the product, and its dots with other, f32 [count]."""
  return dispatch.product(lhs, (rhs,), scale, edges, settings, other)


def _dots_fwd(lhs, rhs, scale, other, edges, settings):
  out = _dots(lhs, rhs, scale, other, edges, settings)
  return out, (lhs, rhs, scale, other, edges)


def _dots_bwd(settings, residuals, cotangents):
  lhs, rhs, scale, other, edges = residuals
  dout, ddots = cotangents
  dout = dout.astype(lhs.dtype)
  back, here = _back(settings, lhs.dtype), edges.reversed()
  dlhs, dscale = _dots(dout, rhs, scale, lhs, here, back)
  dlhs += _forward(other, rhs, ddots, here, back)
  drhs = _outer(lhs, dout, scale, edges, rhs, settings)
  drhs += _outer(lhs, other, ddots, edges, rhs, settings)
  same = dataclasses.replace(settings, dtype=other.dtype)
  dother = _forward(lhs, rhs, ddots, edges, same)
  found = _like((dlhs, drhs, dscale, dother), (lhs, rhs, scale, other))
  return *found, None


_dots.defvjp(_dots_fwd, _dots_bwd)


def _outer(lhs, rhs, scale, edges, like, settings):
  """T by w, as the weights `like` are: [g, k, n] or [g, n, k]."""
  settings = dataclasses.replace(settings, dtype=like.dtype)
  like = jax.lax.stop_gradient(like)
  if settings.transpose_rhs:
    lhs, rhs, edges = rhs, lhs, edges.reversed()
  plain = dataclasses.replace(settings, transpose_rhs=False)
  return _outer_of(lhs, rhs, scale, edges, like, plain)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _outer_of(lhs, rhs, scale, edges, like, settings):
  return dispatch.outer(lhs, rhs, scale, edges, settings, like)


def _outer_fwd(lhs, rhs, scale, edges, like, settings):
  out = _outer_of(lhs, rhs, scale, edges, like, settings)
  return out, (lhs, rhs, scale, edges)


def _outer_bwd(settings, residuals, dout):
  lhs, rhs, scale, edges = residuals
  dout = dout.astype(lhs.dtype)
  here, back = edges.reversed(), _back(settings, lhs.dtype)
  if scale is None:
    dlhs, dscale = _forward(rhs, dout, None, here, back), None
  else:
    dlhs, dscale = _dots(rhs, dout, scale, lhs, here, back)
  along = dataclasses.replace(settings, dtype=rhs.dtype)
  drhs = _forward(lhs, dout, scale, edges, along)
  return *_like((dlhs, drhs, dscale), (lhs, rhs, scale)), None, None


_outer_of.defvjp(_outer_fwd, _outer_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _combined(lhs, weights, scale, edges, settings):
  """A product with an activation, a gate or both, in one pass."""
  return dispatch.product(lhs, weights, scale, edges, settings)[0]


def _in_steps(lhs, weights, scale, edges, settings):
  """The same, by linear products whose results are kept."""
  each = dataclasses.replace(
    settings, combine=dispatch.Combine(), dtype=lhs.dtype
  )
  rows = dataclasses.replace(edges, target=None, targets=edges.count)
  products = [_forward(lhs, w, None, rows, each) for w in weights]

  def finish(products, scale, edges):
    y = settings.combine(*(x.astype(jnp.float32) for x in products))
    # All is masked before and after, or a NaN behind the groups would reach
    # what is multiplied by it, here or in the gradient.
    inside = edges.in_a_group()
    if scale is not None:
      y *= jnp.where(inside, scale, 0)[:, None]
    y = jnp.where(inside[:, None], y, 0)
    if edges.target is not None:
      sums = jnp.zeros((edges.targets, y.shape[1]), y.dtype)
      y = sums.at[edges.target].add(y, mode="drop")
    return y.astype(settings.dtype)

  sharding = jax.typeof(products[0]).sharding
  if AxisType.Explicit in sharding.mesh.axis_types:
    edge, n = sharding.spec
    edge = edge if edges.target is None else None
    spec = jax.NamedSharding(sharding.mesh, jax.P(edge, n))
    finish = jax.sharding.auto_axes(finish, out_sharding=spec)
  return finish(products, scale, edges)


def _combined_fwd(lhs, weights, scale, edges, settings):
  call = lambda *primals: _in_steps(*primals, edges, settings)
  return jax.vjp(call, lhs, weights, scale)


def _combined_bwd(settings, pull, dout):
  del settings
  return *pull(dout), None


_combined.defvjp(_combined_fwd, _combined_bwd)
