"""Dispatchers for experts that are divided over devices.

`over_devices` makes dispatchers of whole arrays of them. Themselves they are
called inside of a `shard_map`: x and the assignment are of the tokens
of this device, whose experts are numbered over all devices, and params are of
the experts of this device, which follow those of the devices before it along
the axis. Results and gradients are those of `dropless` over all tokens.

`expert_parallel` sends rows to their experts and back; `ring_of_experts`
gathers all rows on all devices and adds up what comes out, which moves less
where a token has about as many experts as there are devices.
"""

from collections.abc import Callable
import dataclasses
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AxisType

from pallas_kernels import partitioning
from sparsejax.routing import dispatchers
from sparsejax.routing import exchange
from sparsejax.routing.assignment import Assignment

Array = jax.Array
Bank = Callable[..., Array]


def expert_parallel(
  x: Array,
  found: Assignment,
  bank: Bank,
  params: Any,
  *,
  axis_name: str,
  size: int | None = None,
) -> Array:
  """Sends rows to the devices of their experts, and what comes out back.

  Args:
    x: floating [tokens, d], of this device.
    found: where they go; experts are numbered over all devices.
    bank: see `dispatchers`.
    params: of this device's experts.
    axis_name: the mesh axis over which experts are divided.
    size: None, where a device must be able to take all edges of all others; or
      the most edges that an expert gets from a device: buffers are smaller
      then. What is beyond must have been dropped by `limit`: as in `capacity`
      it counts for nothing here.

  Returns:
    [tokens, d of the bank] in the dtype of x.

  Raises:
    ValueError: devices do not divide the experts, x is not of the assignment's
      tokens, or size is not positive.

  Source: tutel, Tutel: Adaptive Mixture-of-Experts at Scale.
  """
  local = _local_experts(x, found, axis_name)
  devices, edges = found.num_experts // local, found.expert.shape[0]
  room = edges
  if size is not None:
    if size < 1:
      raise ValueError(f"size must be 1 or more, got {size}")
    room = min(edges, size * local)
    found = found.where(dispatchers.places(found, jnp.arange(edges)) < size)
  order = jnp.argsort(jnp.where(found.valid, found.expert, found.num_experts))
  token = jnp.where(found.valid, found.token, found.num_tokens)[order]
  weight = found.weight[order]
  rows = dispatchers.rows_of(x, token)

  # Rows from each device for each expert; where slices begin on both sides.
  sizes = lax.all_gather(found.sizes, axis_name).reshape(
    devices, devices, local
  )
  me = lax.axis_index(axis_name)
  between = sizes.sum(-1)  # [from, to]
  before = lambda x, axis: jnp.cumsum(x, axis) - x
  starts, lands = before(between, 1), before(between, 0)
  send = (starts[me], between[me], lands[me], between[:, me])
  back = (lands[:, me], between[:, me], starts[:, me], between[me])

  empty = jnp.zeros((devices * room, x.shape[1]), x.dtype)
  empty, rows = partitioning.vary_alike(empty, rows)
  arrived = exchange.ragged_all_to_all(rows, empty, *send, axis_name=axis_name)
  # They came device by device; the bank wants them expert by expert.
  mine = sizes[:, me]
  expert = jnp.tile(jnp.arange(local), devices)
  expert = jnp.repeat(
    jnp.append(expert, local),
    jnp.append(mine.reshape(-1), len(arrived) - mine.sum()),
    total_repeat_length=len(arrived),
  )
  out = dispatchers.run(
    arrived,
    jnp.arange(len(arrived)),
    expert,
    None,
    mine.sum(0),
    bank,
    params,
  )
  returned = jnp.zeros((edges, out.shape[1]), out.dtype)
  returned, out = partitioning.vary_alike(returned, out)
  returned = exchange.ragged_all_to_all(
    out, returned, *back, axis_name=axis_name
  )
  return dispatchers.combined(x, returned, token, weight)


def ring_of_experts(
  x: Array, found: Assignment, bank: Bank, params: Any, *, axis_name: str
) -> Array:
  """Gathers all rows, and adds up what the devices' experts make of them.

  Args:
    x: floating [tokens, d], of this device.
    found: where they go; experts are numbered over all devices.
    bank: see `dispatchers`.
    params: of this device's experts.
    axis_name: the mesh axis over which experts are divided.

  Returns:
    [tokens, d of the bank] in the dtype of x.

  Raises:
    ValueError: devices do not divide the experts, or x is not of the
      assignment's tokens.
  """
  local = _local_experts(x, found, axis_name)
  first = lax.axis_index(axis_name) * local
  gather = lambda x: lax.all_gather(x, axis_name, tiled=True)
  number = lax.axis_index(axis_name) * found.num_tokens
  token = gather(found.token + number)
  expert = gather(jnp.where(found.valid, found.expert, -1)) - first
  expert = jnp.where((expert >= 0) & (expert < local), expert, local)
  sizes = jnp.zeros(local, jnp.int32).at[expert].add(1, mode="drop")
  y = dispatchers.run(
    gather(x), token, expert, gather(found.weight), sizes, bank, params
  )
  return lax.psum_scatter(y, axis_name, scatter_dimension=0, tiled=True)


def over_devices(
  dispatch: Callable[..., Array],
  *,
  tokens: str | tuple[str, ...],
  experts: str | None,
) -> Callable[..., Array]:
  """A dispatcher of whole arrays, which runs on shards of them.

  The mesh is the one that `jax.set_mesh` set.

  Args:
    dispatch: `expert_parallel` or `ring_of_experts`, perhaps with settings of
      its own; with experts=None one for a single device, such as `dropless`.
    tokens: mesh axes over which tokens are divided, `experts` among them.
    experts: the mesh axis over which experts and the leading dimension of their
      parameters are divided; None, where every device has all of them.

  Returns:
    A function of x [tokens, d], an Assignment by token choice, a bank and the
    parameters of all experts. It raises a ValueError where devices do not
    divide the tokens or the experts, or where experts chose: those choose on
    each device alone, in a `shard_map` of yours.

  Example:
    >>> mesh = jax.make_mesh((2,), ("expert",))
    >>> dispatch = routing.over_devices(
    ...   routing.expert_parallel, tokens="expert", experts="expert"
    ... )
    >>> bank = routing.FeedForward()
    >>> params = bank.init(jax.random.key(0), experts=4, width=8, hidden=8)
    >>> found = routing.top_k(jnp.zeros((6, 4)), 2)
    >>> with jax.set_mesh(mesh):
    ...   run = jax.jit(lambda x: dispatch(x, found, bank, params))
    ...   y = run(jnp.ones((6, 8)))
    >>> y.shape
    (6, 8)
  """
  tokens = (tokens,) if isinstance(tokens, str) else tuple(tokens)
  if experts is not None and experts not in tokens:
    raise ValueError(f"tokens must have {experts!r} among them, got {tokens}")

  def whole(x: Array, found: Assignment, bank: Bank, params: Any) -> Array:
    dispatchers.of_tokens(x, found)
    if found.choices is None:
      raise ValueError(
        "found must be by token choice, got one by expert choice"
      )
    mesh = jax.sharding.get_abstract_mesh()
    shape = dict(mesh.shape)
    missing = [name for name in tokens if name not in shape]
    if missing:
      raise ValueError(f"mesh must have axes {tokens}, got {shape}")
    parts = math.prod(shape[name] for name in tokens)
    if experts is not None and found.num_experts % shape[experts]:
      raise ValueError(
        f"experts must have a size that divides the {found.num_experts} "
        f"experts, got {experts!r} of {shape[experts]} devices"
      )
    if found.num_tokens % parts:
      raise ValueError(
        f"tokens must have sizes that divide the {found.num_tokens} tokens, "
        f"got {tokens} of {parts} devices"
      )

    def local(x, found, params):
      first = lax.axis_index(tokens) * found.num_tokens
      found = dataclasses.replace(found, token=found.token - first)
      along = {} if experts is None else {"axis_name": experts}
      return dispatch(x, found, bank, params, **along)

    by_token = jax.P(tokens)
    args = (x, found, params)
    specs = (
      by_token,
      jax.tree.map(lambda x: by_token if x.ndim else jax.P(), found),
      jax.tree.map(lambda x: jax.P(experts) if experts else jax.P(), params),
    )
    if AxisType.Explicit in mesh.axis_types:
      args = jax.tree.map(jax.sharding.reshard, args, specs)
    run = jax.shard_map(
      local,
      in_specs=specs,
      out_specs=by_token,
      axis_names=set(tokens),
    )
    return run(*args)

  return whole


def _local_experts(x, found, axis_name):
  dispatchers.of_tokens(x, found)
  devices = lax.axis_size(axis_name)
  if found.num_experts % devices:
    raise ValueError(
      f"axis_name must have a size that divides the {found.num_experts} "
      f"experts, got {axis_name!r} of size {devices}"
    )
  return found.num_experts // devices
