"""Leaves shardings to the compiler, on axes where they are types as well."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType


def automatic(f: Callable, *args: Any, out: Any = None) -> Any:
  """f(*args), whose shardings the compiler chooses.

  What follows indices that only the data know, a scatter or a sort, has no
  sharding that a type could state: on Explicit axes JAX raises an error.

  Args:
    f: pure function of arrays.
    *args: its arguments, pytrees of arrays.
    out: None, where results lie whole on every device; or an array, as which
      all of them are sharded, on Explicit axes.

  Returns:
    f(*args).

  >>> from sparsejax.automatic import automatic
  >>> automatic(lambda x: jnp.zeros(2).at[x].add(1), jnp.array([1, 1])).tolist()
  [0.0, 2.0]
  """
  meshes = [jax.typeof(x).sharding.mesh for x in jax.tree.leaves(args)]
  meshes = [mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types]
  if not meshes:
    return f(*args)
  mesh = meshes[0]
  if out is None:
    sharding = jax.NamedSharding(mesh, jax.P())
  else:
    sharding = jax.typeof(out).sharding
  axes = [
    name
    for name, kind in zip(mesh.axis_names, mesh.axis_types)
    if kind == AxisType.Explicit
  ]
  run = jax.sharding.auto_axes(f, axes=tuple(axes), out_sharding=sharding)
  return run(*args)
