import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.routing.automatic import automatic
from tests import common
from tests.routing import problem


def counts(ids, x):
  """Sums of x by id, for which a type could state no sharding."""
  return jnp.zeros(3).at[ids].add(x)


IDS, X = np.array([0, 2, 2, 1, 0, 2, 9, 1]), np.arange(8.0, dtype=np.float32)
WANT = [4.0, 10.0, 8.0]


@pytest.mark.parametrize("set_mesh", [False, True])
@pytest.mark.parametrize("axis_type", common.AXIS_TYPES)
def test_values_and_gradients(axis_type, set_mesh):
  mesh = common.mesh_of(axis_type)
  ids, x = (common.place(x, mesh, jax.P(("x", "y"))) for x in (IDS, X))

  def f(ids, x):
    pull = lambda x: automatic(counts, ids, x)
    out, back = jax.vjp(pull, x)
    return out, *back(jnp.arange(3.0))

  if set_mesh:
    with jax.set_mesh(mesh):
      out, back = problem.jit(f)(ids, x)
  else:
    out, back = problem.jit(f)(ids, x)
  np.testing.assert_array_equal(out, WANT)
  np.testing.assert_array_equal(back, [0, 2, 2, 1, 0, 2, 0, 1])


def test_results_are_sharded_as_asked():
  mesh = common.mesh_of(jax.sharding.AxisType.Explicit)
  ids, x = (common.place(x, mesh, jax.P("x")) for x in (IDS, X))
  sort = lambda x: automatic(jnp.sort, x, out=x)
  assert jax.typeof(jax.jit(sort)(x)).sharding.spec == jax.P("x")
  whole = lambda ids, x: automatic(counts, ids, x)
  assert jax.typeof(jax.jit(whole)(ids, x)).sharding.spec == jax.P(None)
