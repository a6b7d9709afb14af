"""What is known about shards while tracing."""

from absl.testing import parameterized
import jax
import jax.numpy as jnp

from sparsejax import sharding
from tests import common

AUTO, EXPLICIT = common.AXIS_TYPES


class ShardingTest(parameterized.TestCase):
  def test_power_of_two(self):
    got = [sharding.power_of_two(n) for n in (0, 1, 2, 3, 12, 64, 96, 1025)]
    self.assertEqual(got, [0, 1, 2, 1, 4, 64, 32, 1])

  @parameterized.parameters((AUTO, False), (EXPLICIT, True))
  def test_is_explicit(self, axis_type, want):
    mesh = common.mesh_of(axis_type)
    with jax.set_mesh(mesh):
      x = common.place(jnp.ones((8, 4)), mesh, jax.P("x"))
      seen = []
      jax.jit(lambda x: seen.append(sharding.is_explicit(x)))(x)
    self.assertEqual(seen, [want])
    self.assertEqual(sharding.is_explicit(x), want)
    self.assertFalse(sharding.is_explicit(jnp.ones(3)))

  @parameterized.parameters(
    (AUTO, (24, 8), jax.P("x", "y"), [True, True]),
    (AUTO, (12, 8), jax.P("x", "y"), [False, True]),
    (EXPLICIT, (24, 8), jax.P("x", "y"), [False, False]),  # 6 and 4 a shard
    (EXPLICIT, (32, 16), jax.P("x", "y"), [True, True]),
    (EXPLICIT, (24, 8), jax.P(), [True, True]),
    (EXPLICIT, (32, 16), jax.P(("x", "y")), [False, True]),
    (EXPLICIT, (64, 12), jax.P(("x", "y")), [True, False]),
  )
  def test_splits_by_eight(self, axis_type, shape, spec, want):
    mesh = common.mesh_of(axis_type)
    with jax.set_mesh(mesh):
      x = common.place(jnp.ones(shape), mesh, spec)
      got = []
      jax.jit(
        lambda x: got.extend(sharding.splits_by(x, a, 8) for a in (0, 1))
      )(x)
    self.assertEqual(got, want)

  def test_splits_by_within_a_shard(self):
    mesh = common.mesh_of(EXPLICIT)
    with jax.set_mesh(mesh):
      x = common.place(jnp.ones((32, 6)), mesh, jax.P("x"))
      seen = []

      def local(x):
        seen.append((sharding.is_explicit(x), sharding.splits_by(x, 0, 8)))
        return sharding.like(x, x)

      out = jax.jit(
        jax.shard_map(
          local, in_specs=jax.P("x", None), out_specs=jax.P("x", None)
        )
      )(x)
    self.assertEqual(seen[-1], (False, True))
    self.assertEqual(out.sharding.spec, jax.P("x", None))

  def test_like(self):
    mesh = common.mesh_of(EXPLICIT)
    with jax.set_mesh(mesh):
      x = common.place(jnp.ones((8, 4)), mesh, jax.P())
      other = common.place(jnp.zeros((8, 4)), mesh, jax.P("x", "y"))
      got = jax.jit(sharding.like)(x, other)
      self.assertEqual(jax.typeof(got).sharding, jax.typeof(other).sharding)
    mesh = common.mesh_of(AUTO)
    with jax.set_mesh(mesh):
      other = common.place(jnp.zeros((8, 4)), mesh, jax.P("x", "y"))
      self.assertIs(sharding.like(got, other), got)
    self.assertIs(sharding.like(got, jnp.ones((8, 4))), got)
