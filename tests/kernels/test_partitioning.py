"""What shards a kernel runs on."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import partitioning


def test_arrays_that_lie_on_no_mesh():
  """Their shardings have no names, if something is computed before."""
  mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))

  def multiply(x, w):
    names = ("n d", "d m")
    sizes = {"n": 8, "d": 2, "m": 2}
    return partitioning.per_shard(
      lambda axes, x, w: (x @ w,), (x, w), names, ("n m",), sizes, "n"
    )[0]

  x, w = jnp.arange(16.0).reshape(8, 2), jnp.array([[1.0, 2.0], [3.0, 4.0]])
  with jax.set_mesh(mesh):
    out = jax.jit(lambda x, w: multiply(x + 1, w))(x, w)
  np.testing.assert_array_equal(out, (np.asarray(x) + 1) @ np.asarray(w))
