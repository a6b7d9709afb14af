"""What keeps a primitive local to each shard."""

import jax

Array = jax.Array


def power_of_two(size: int) -> int:
  """The largest power of two that divides `size` (0 for 0)."""
  return size & -size


def is_explicit(x: Array) -> bool:
  """Whether `x` is typed with a mesh whose axes are all Explicit."""
  mesh = jax.typeof(x).sharding.mesh
  return not mesh.empty and mesh.are_all_axes_explicit


def splits_by(x: Array, axis: int, size: int) -> bool:
  """Whether groups of `size` along `axis` are known not to straddle shards.

  Under Auto axes the compiler decides the layout later, so nothing is known
  and the answer is only whether `size` divides the axis.
  """
  if is_explicit(x):
    return jax.typeof(x).sharding.shard_shape(x.shape)[axis] % size == 0
  return x.shape[axis] % size == 0


def whole_groups(x: Array, axis: int, size: int) -> Array:
  """`x`, resharded where groups of `size` would straddle explicit shards."""
  if not is_explicit(x) or splits_by(x, axis, size):
    return x
  spec = list(jax.typeof(x).sharding.spec)
  spec[axis] = None
  return jax.sharding.reshard(x, jax.P(*spec))


def like(x: Array, other: Array) -> Array:
  """`x` with the explicit sharding of `other`; the identity under Auto."""
  if not is_explicit(other):
    return x
  return jax.sharding.reshard(x, jax.typeof(other).sharding)
