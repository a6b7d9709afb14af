"""A sharded run goes on from its checkpoint, there and on another mesh."""

import functools
import tempfile

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

from sparsejax import weights
from tests import common
from tests.weights import problem

SPECS = {"a": jax.P("x", "y"), "b": jax.P("x", "y"), "bias": jax.P("y")}
SAVED, STEPS = 3, 8
AUTO, EXPLICIT = common.AXIS_TYPES


def start():
  """Masks of `a` are packed along its shards, those of `b` stay bool."""
  return {
    "a": problem.numbers(32, 24, seed=1),
    "b": problem.numbers(4, 8, seed=2),
    "bias": problem.numbers(8, seed=3),
  }


def gradient(step):
  """The same on every mesh."""
  seeds = {"a": 0, "b": 1, "bias": 2}
  return {
    n: problem.numbers(*p.shape, seed=100 + 7 * step + seeds[n])
    for n, p in start().items()
  }


def rarely_active(seen):
  """Draws, and needs the memory of which weights were active."""
  return weights.random(seen) - seen.memory.astype(jnp.float32)


def drawing():
  """Everything in its state decides how it goes on: the key, the memory, the
  place in the schedules of the drop fraction and of the learning rate."""
  return weights.rigl(
    optax.adam(optax.linear_schedule(0.1, 0.01, STEPS)),
    sparsity=0.75,
    every=2,
    until=7,
    key=jax.random.key(0),
    grow=rarely_active,
    memory=lambda p: jnp.zeros_like(p, jnp.int32),
    remember=lambda seen: seen.memory + seen.mask,
    track_explored=True,
  )


def with_backward_masks():
  """Its state has dense weights and masks of what they receive."""
  return weights.top_kast(
    optax.adam(0.05), sparsity=0.75, backward_sparsity=0.5, every=2
  )


MAKE = {"drawing": drawing, "top_kast": with_backward_masks}


class Run:
  """A run of one rule on one mesh."""

  def __init__(self, name, mesh):
    self.mesh, self.tx = mesh, MAKE[name]()
    self._step = problem.jit(self._stepped)

  def _stepped(self, params, state, grads):
    updates, state = self.tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  def _place(self, params):
    return {n: common.place(p, self.mesh, SPECS[n]) for n, p in params.items()}

  def begun(self):
    """Parameters and state before the first step."""

    @problem.jit
    def begin(params):
      state = self.tx.init(params)
      return weights.sparse_params(state, params), state

    return begin(self._place(start()))

  def trained(self, now, begin, end):
    """Parameters and state after the steps from `begin` up to `end`."""
    for step in range(begin, end):
      now = self._step(*now, self._place(gradient(step)))
    return now


def abstract(state):
  """Shapes, dtypes and shardings."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
  )


def shardings(state):
  return jax.tree.map(lambda x: x.sharding, state)


def restored(folder, like):
  with ocp.StandardCheckpointer() as checkpointer:
    return checkpointer.restore(folder + "/checkpoint", abstract(like))


@functools.cache
def saved(name, axis_type):
  """A folder of the state after some steps, that state, and the last one."""
  folder = tempfile.TemporaryDirectory()
  mesh = common.mesh_of(axis_type)
  with jax.set_mesh(mesh), ocp.StandardCheckpointer() as checkpointer:
    run = Run(name, mesh)
    middle = run.trained(run.begun(), 0, SAVED)
    checkpointer.save(folder.name + "/checkpoint", middle)
    checkpointer.wait_until_finished()
    end = problem.copied(run.trained(middle, SAVED, STEPS))
  return folder, run, middle, end


class ResumeShardedTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ("drawing_explicit", "drawing", EXPLICIT),
    ("top_kast_auto", "top_kast", AUTO),
  )
  def test_goes_on_bit_for_bit(self, name, axis_type):
    folder, run, middle, end = saved(name, axis_type)
    with jax.set_mesh(run.mesh):
      now = restored(folder.name, middle)
      problem.assert_bits(problem.copied(now), problem.copied(middle))
      assert shardings(now) == shardings(middle)
      assert jax.tree.map(jax.typeof, now) == jax.tree.map(jax.typeof, middle)
      # What was sharded is: a mask lies where its weights do.
      masks = now[1].masks["a"]
      assert len(masks.sharding.device_set) == 8
      assert not masks.sharding.is_fully_replicated
      if axis_type == EXPLICIT:
        assert masks.sharding.spec == SPECS["a"]
      problem.assert_bits(problem.copied(run.trained(now, SAVED, STEPS)), end)
      assert run._step._cache_size() <= 2  # the second is of an Auto layout

  def test_moves_to_another_mesh(self):
    folder, _, middle, end = saved("drawing", EXPLICIT)
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(EXPLICIT,) * 2)
    with jax.set_mesh(mesh):
      run = Run("drawing", mesh)
      now = restored(folder.name, run.begun())
      problem.assert_bits(problem.copied(now), problem.copied(middle))
      masks = weights.masks(now[1], now[0])
      want = np.asarray(weights.masks(problem.copied(middle[1]), start())["a"])
      np.testing.assert_array_equal(masks["a"], want)
      assert masks["a"].sharding.spec == SPECS["a"]
      problem.assert_bits(problem.copied(run.trained(now, SAVED, STEPS)), end)


if __name__ == "__main__":
  absltest.main()
