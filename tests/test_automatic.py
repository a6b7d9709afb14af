"""Shardings that the compiler chooses where types would have to state them."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
import numpy as np
import pytest

from sparsejax.automatic import automatic
from tests import common


def count(rows, chosen):
  return jnp.zeros_like(rows).at[chosen].add(rows[chosen])


@pytest.mark.parametrize("kind", common.AXIS_TYPES, ids=lambda x: x.name)
def test_what_types_cannot_state(kind):
  mesh, rows, chosen = common.mesh_of(kind), np.arange(8.0), np.arange(8) // 2
  with jax.set_mesh(mesh):
    placed = common.place(rows, mesh, jax.P("x"))
    whole = jax.jit(lambda *args: automatic(count, *args))(placed, chosen)
    like = jax.jit(lambda *args: automatic(count, *args, out=args[0]))(
      placed, chosen
    )
  np.testing.assert_array_equal(whole, count(rows, chosen))
  np.testing.assert_array_equal(like, count(rows, chosen))
  if kind == AxisType.Explicit:
    assert whole.sharding.is_fully_replicated
    assert like.sharding == placed.sharding
