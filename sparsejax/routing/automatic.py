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

  >>> automatic(lambda x: jnp.zeros(2).at[x].add(1), jnp.array([1, 1])).tolist()
  [0.0, 2.0]
  """
  meshes = [jax.typeof(x).sharding.mesh for x in jax.tree.leaves(args)]
  explicit = [x for x in meshes if AxisType.Explicit in x.axis_types]
  if not explicit:
    return f(*args)
  spec = jax.P() if out is None else jax.typeof(out).sharding.spec
  axes = tuple(
    name
    for name, kind in zip(explicit[0].axis_names, explicit[0].axis_types)
    if kind == AxisType.Explicit
  )
  return jax.sharding.auto_axes(f, axes=axes, out_sharding=spec)(*args)
