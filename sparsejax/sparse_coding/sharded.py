"""Codes whose latents are divided over devices, inside a `jax.shard_map`.

Each device has consecutive rows of the kernel, of the bias and of the
dictionary, and all of the activations. Only scores of latents that may be kept
go to other devices, k of a row and device, and sums that make up the rows.
"""

from collections.abc import Callable

import jax
from jax import lax
import jax.numpy as jnp

from sparsejax.sparse_coding import codes

Array = jax.Array


def encode_top_k(
  x: Array,
  kernel: Array,
  bias: Array,
  k: int,
  *,
  axis_name: str,
  scores: Callable[[Array], Array] | None = None,
) -> codes.Code:
  """The device's part of `sparse_coding.encode_top_k` of all latents.

  Args:
    x: [..., width], equal along the axis.
    kernel: [latents / n, width], the device's rows.
    bias: [latents / n], likewise.
    k: how many of all latents are kept in a row, static.
    axis_name: the mesh axis over which latents are divided, of n devices.
    scores: as `sparse_coding.top_k` takes it, for the latents of the device.

  Returns:
    A Code of the device's latents, with min(k, latents / n) of a row; those
    that others exceed have a value of 0. Differentiable.

  Raises:
    ValueError: for an axis that is not bound, or a k that does not fit.

  Example:
    >>> from sparsejax.sparse_coding import sharded
    >>> def reconstruct(x, kernel, bias):
    ...   code = sharded.encode_top_k(x, kernel, bias, 2, axis_name="latents")
    ...   return sharded.decode(code, kernel, axis_name="latents")
    >>> auto = jax.sharding.AxisType.Auto
    >>> run = jax.shard_map(
    ...   reconstruct,
    ...   mesh=jax.make_mesh((2,), ("latents",), axis_types=(auto,)),
    ...   in_specs=(jax.P(), jax.P("latents"), jax.P("latents")),
    ...   out_specs=jax.P(),
    ... )
    >>> x = jnp.array([1.0, 4.0, 3.0, 2.0])
    >>> jax.jit(run)(x, jnp.eye(4), jnp.zeros(4)).tolist()
    [0.0, 4.0, 3.0, 0.0]

  Source: topk-sae, Scaling and evaluating sparse autoencoders (its sharding of
  latents).
  """
  codes.check_k(k, len(kernel) * _devices(axis_name))
  own = min(k, len(kernel))
  ranked, values, indices = codes.chosen(x, kernel, bias, own, scores)
  # Equal ones stand in the order of their devices, and so of their indices.
  every = lax.all_gather(ranked, axis_name, axis=ranked.ndim - 1, tiled=True)
  _, best = lax.top_k(every, k)
  mine = best // max(own, 1) == lax.axis_index(axis_name)
  kept = jnp.arange(own) < mine.sum(-1, keepdims=True)
  values = jnp.where(kept, values, 0)
  values = codes.with_gradients(values, indices, x, kernel, bias)
  return codes.Code(values, indices, len(kernel))


def decode(
  code: codes.Code | Array, dictionary: Array, *, axis_name: str
) -> Array:
  """`sparse_coding.decode`, summed over the devices' latents.

  Args:
    code: of the device's latents, a Code or dense [..., latents / n].
    dictionary: [latents / n, width], the device's rows.
    axis_name: the mesh axis over which latents are divided, of n devices.

  Returns:
    [..., width], equal along the axis.

  Raises:
    ValueError: for an axis that is not bound.
  """
  _devices(axis_name)
  dtype = jnp.result_type(*jax.tree.leaves((code, dictionary)))
  wide = jnp.promote_types(dtype, jnp.float32)
  part = codes.decode(code, dictionary.astype(wide))
  return lax.psum(part, axis_name).astype(dtype)


def _devices(axis_name):
  try:
    return lax.axis_size(axis_name)
  except NameError as e:
    raise ValueError(
      f"axis_name is {axis_name!r}, which is bound to no axis here; call this "
      "inside a jax.shard_map over that axis."
    ) from e
