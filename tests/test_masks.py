"""Masks in an optimizer's state: packed, found again, enforced."""

import functools

from absl.testing import parameterized
from hypothesis import given
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparsejax import masks
from tests import common

SHAPES = (
  (), (0,), (5,), (64,), (8, 3), (12, 5), (0, 4), (8, 0), (16, 64), (3, 64, 2),
  (24, 8, 5), (2, 3, 40), (8, 8, 8), (32, 1),
)  # fmt: skip
AUTO, EXPLICIT = common.AXIS_TYPES
pack, unpack = jax.jit(masks.pack), jax.jit(masks.unpack)


def random_mask(shape, seed=0):
  return np.random.default_rng(seed).random(shape) < 0.5


class PackTest(parameterized.TestCase):
  @given(shape=st.sampled_from(SHAPES), seed=st.integers(0, 999))
  def test_roundtrip(self, shape, seed):
    mask = random_mask(shape, seed)
    bits = pack(mask)
    weight = np.zeros(shape, np.float32)
    got = unpack(bits, weight)
    self.assertEqual(got.dtype, bool)
    np.testing.assert_array_equal(got, mask)
    self.assertEqual(bits.ndim, mask.ndim)

  @parameterized.parameters(*SHAPES)
  def test_one_bit_a_weight(self, *shape):
    bits = pack(np.ones(shape, bool))
    if any(d % 8 == 0 and d for d in shape[:-1]):
      self.assertEqual((bits.dtype, 8 * bits.size), (jnp.uint8, np.prod(shape)))
      self.assertTrue(np.all(np.asarray(bits) == 255))
    elif bits.size:
      self.assertEqual((bits.dtype, bits.shape), (bool, shape))

  def test_the_first_weight_is_the_lowest_bit(self):
    for axis in (0, 1):
      shape = [2, 2, 3]
      shape[axis] = 16
      mask = random_mask(shape, 1)
      want = np.packbits(mask, axis=axis, bitorder="little")
      np.testing.assert_array_equal(pack(mask), want)

  @parameterized.parameters(
    ((3, 64, 128), 1), ((64, 3, 128), 0), ((8, 64, 32, 5), 1), ((8, 8, 8), 0),
    ((16, 48, 3), 0), ((24, 40, 3), 0), ((4, 128), None), ((128,), None),
    ((), None), ((12, 3), None), ((8, 3), 0),
  )  # fmt: skip
  def test_axis(self, shape, want):
    self.assertEqual(masks.pack_axis(shape), want)

  def test_vmap_and_shape_structs(self):
    mask = random_mask((3, 16, 5))
    got = jax.vmap(masks.pack)(mask)
    np.testing.assert_array_equal(got, [pack(m) for m in mask])
    out = jax.eval_shape(masks.pack, jax.ShapeDtypeStruct((8, 3), bool))
    self.assertEqual((out.shape, out.dtype), ((1, 3), jnp.uint8))

  @parameterized.parameters(
    # Shards of whole bytes: nothing moves, the spec is the weight's.
    (AUTO, (32, 6), jax.P("x", "y"), True),
    (AUTO, (8, 16, 6), jax.P("x", None, "y"), True),
    (AUTO, (12, 4), jax.P("x", "y"), True),
    (EXPLICIT, (32, 6), jax.P("x", "y"), True),
    (EXPLICIT, (64, 3), jax.P(("x", "y")), True),
    (EXPLICIT, (3, 8, 8), jax.P(None, None, ("x", "y")), True),
    (EXPLICIT, (12, 4), jax.P("x", "y"), True),
    (EXPLICIT, (64,), jax.P(("x", "y")), True),
    # A shard splits a byte.
    (AUTO, (16, 6), jax.P("x", "y"), False),
    (AUTO, (24, 8), jax.P(("x", "y")), False),
    (EXPLICIT, (16, 6), jax.P("x", "y"), False),
    (EXPLICIT, (8, 8), jax.P(("x", "y")), False),
    (EXPLICIT, (24, 8), jax.P("x", "y"), False),
  )
  def test_sharded(self, axis_type, shape, spec, whole):
    mesh = common.mesh_of(axis_type)
    mask = random_mask(shape)
    with jax.set_mesh(mesh):
      a = common.place(mask, mesh, spec)
      weight = common.place(mask.astype(np.float32), mesh, spec)
      packs = pack.lower(a).compile()
      bits = packs(a)
      unpacks = unpack.lower(bits, weight).compile()
      got = unpacks(bits, weight)
    np.testing.assert_array_equal(bits, pack(mask))
    np.testing.assert_array_equal(got, mask)
    self.assertEqual(bits.ndim, mask.ndim)
    if whole:
      same = bits.sharding.is_equivalent_to(a.sharding, a.ndim)
      self.assertTrue(same, bits.sharding)
      self.assertEmpty(common.moved(packs) | common.moved(unpacks))
    if whole or axis_type == EXPLICIT:
      self.assertTrue(got.sharding.is_equivalent_to(a.sharding, a.ndim))


PARAMS = {
  "bias": np.array([1.0, -2.0], np.float32),
  "kernel": np.array([[1.0, -2.0], [-0.0, 3.0], [-1e38, -1e-38]], np.float32),
  "scale": np.float32(2.0),
}
KERNEL = np.array([[True, False], [False, True], [False, False]])


def bits_of(x):
  return np.asarray(x).view(f"uint{8 * x.dtype.itemsize}")


def step_of(tx):
  @jax.jit
  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  return step


class KeepMaskedTest(parameterized.TestCase):
  @parameterized.parameters(
    (jnp.float32, True), (jnp.bfloat16, True), (jnp.float16, True),
    (jnp.bfloat16, False),
  )  # fmt: skip
  def test_masked_weights_are_plus_zero_by_bits(self, dtype, same):
    top = float(jnp.finfo(dtype).max)
    params = jax.tree.map(
      lambda x: jnp.asarray(np.clip(x, -top, top), dtype), PARAMS
    )
    tx = optax.chain(optax.adam(0.1), masks.keep_masked({"kernel": KERNEL}))
    state, step = tx.init(params), step_of(tx)
    grads = jax.tree.map(lambda x: jnp.cos(jnp.asarray(x)), params)
    if not same:
      grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    for _ in range(3):
      params, state = step(params, state, grads)
      self.assertEqual(params["kernel"].dtype, dtype)
      self.assertFalse(np.any(bits_of(params["kernel"])[~KERNEL]))
      self.assertTrue(np.all(np.asarray(params["kernel"])[KERNEL] != 0))

  def test_other_parameters_are_trained_as_without(self):
    params = jax.tree.map(jnp.asarray, PARAMS)
    grads = jax.tree.map(jnp.ones_like, params)
    plain, kept = optax.adam(0.1), masks.keep_masked({"kernel": KERNEL})
    tx = optax.chain(plain, kept)
    want, _ = step_of(plain)(params, plain.init(params), grads)
    got, _ = step_of(tx)(params, tx.init(params), grads)
    want["kernel"] = np.where(KERNEL, want["kernel"], 0)
    for n in PARAMS:  # two programs, fused differently
      np.testing.assert_allclose(got[n], want[n], rtol=1e-6)

  def test_nan_gradients_stay_where_they_are(self):
    tx = optax.chain(optax.sgd(0.1), masks.keep_masked({"kernel": KERNEL}))
    grads = jax.tree.map(lambda x: jnp.full_like(x, np.nan), PARAMS)
    params, _ = step_of(tx)(PARAMS, tx.init(PARAMS), grads)
    self.assertFalse(np.any(bits_of(params["kernel"])[~KERNEL]))

  def test_masks_are_packed_and_found(self):
    params = {"w": jnp.ones((16, 3)), "v": jnp.ones(5)}
    mask = random_mask((16, 3))
    tx = masks.keep_masked({"w": mask})
    state = tx.init(params)
    self.assertEqual(state.masks["w"].dtype, jnp.uint8)
    got = jax.jit(masks.masks)(state, params)
    np.testing.assert_array_equal(got["w"], mask)
    self.assertTrue(np.all(got["v"]))
    sparse = jax.jit(masks.sparse_params)(state, params)
    np.testing.assert_array_equal(sparse["w"], mask)
    np.testing.assert_array_equal(sparse["v"], params["v"])

  def test_sparse_params_are_plus_zero(self):
    state = masks.keep_masked({"kernel": KERNEL}).init(PARAMS)
    bad = {**PARAMS, "kernel": np.full_like(PARAMS["kernel"], -np.inf)}
    got = jax.jit(masks.sparse_params)(state, bad)["kernel"]
    self.assertFalse(np.any(bits_of(got)[~KERNEL]))

  def test_gradients_through_sparse_params_are_those_at_it(self):
    state = masks.keep_masked({"kernel": KERNEL}).init(PARAMS)
    params = jax.tree.map(jnp.asarray, PARAMS)

    def loss(params):
      return jnp.sum(jnp.exp(params["kernel"]))

    def through(params):
      return loss(masks.sparse_params(state, params))

    got = jax.jit(jax.grad(through))(params)
    want = jax.jit(jax.grad(loss))(masks.sparse_params(state, params))
    np.testing.assert_array_equal(got["kernel"], want["kernel"])
    np.testing.assert_array_equal(got["kernel"][~KERNEL], 1)  # exp(0)

  def test_state_and_program_stay(self):
    tx = masks.keep_masked({"kernel": KERNEL})
    state = tx.init(PARAMS)
    step = step_of(tx)
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    params = jax.tree.map(jnp.asarray, PARAMS)
    for _ in range(3):
      before = jax.tree.map(jax.typeof, state)
      params, state = step(params, state, grads)
      self.assertEqual(jax.tree.map(jax.typeof, state), before)
    self.assertEqual(step._cache_size(), 1)
    self.assertEqual(state.count, 3)

  def test_init_of_shapes(self):
    tx = masks.keep_masked({"kernel": KERNEL})
    want = jax.tree.map(jax.typeof, tx.init(PARAMS))
    shapes = jax.eval_shape(tx.init, PARAMS)
    self.assertEqual(jax.tree.map(jax.typeof, shapes), want)

  @parameterized.parameters(
    ({"missing": KERNEL}, r"masks\['missing'\] must be"),
    ({"kernel": KERNEL[:2]}, r"masks\['kernel'\] must be"),
    ({"kernel": KERNEL.astype(np.float32)}, r"masks\['kernel'\] must be"),
    ({"kernel": {"x": KERNEL}}, r"masks\['kernel/x'\] must be"),
  )
  def test_bad_masks(self, bad, message):
    with self.assertRaisesRegex(ValueError, message):
      masks.keep_masked(bad).init(PARAMS)

  def test_missing_params(self):
    tx = masks.keep_masked({"kernel": KERNEL})
    with self.assertRaisesRegex(ValueError, "^params must be given"):
      tx.update(PARAMS, tx.init(PARAMS))


class ViolationsTest(parameterized.TestCase):
  def run_with(self, tx, steps=102):
    state, step = tx.init(PARAMS), step_of(tx)
    params = masks.sparse_params(state, jax.tree.map(jnp.asarray, PARAMS))
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    for _ in range(steps):
      params, state = step(params, state, grads)
    return params, state

  def test_none(self):
    tx = optax.chain(optax.sgd(1e-3), masks.keep_masked({"kernel": KERNEL}))
    params, state = self.run_with(tx)
    self.assertEqual(masks.find_states(state)[0].violations, 0)
    masks.masks(state, params)

  def test_a_link_that_hides(self):
    """What the chain's order does not show, the count of violations does."""
    kept = masks.keep_masked({"kernel": KERNEL})

    def update(updates, state, params=None):
      updates, state = kept.update(updates, state, params)
      return jax.tree.map(lambda u: u - 1e-3, updates), state

    params, state = self.run_with(
      optax.GradientTransformation(kept.init, update)
    )
    self.assertEqual(masks.find_states(state)[0].violations, np.sum(~KERNEL))
    with self.assertRaisesRegex(ValueError, "^4 masked weights are not zero"):
      masks.masks(state, params)
    jax.jit(masks.masks)(state, params)  # silent: values are not known
    got = masks.sparse_params(state, params)["kernel"]
    self.assertFalse(np.any(bits_of(got)[~KERNEL]))

  def test_parameters_that_were_replaced(self):
    tx = optax.chain(optax.sgd(1e-3), masks.keep_masked({"kernel": KERNEL}))
    _, state = self.run_with(tx, steps=100)
    dense = jax.tree.map(jnp.ones_like, PARAMS)
    _, state = step_of(tx)(dense, state, dense)
    with self.assertRaisesRegex(ValueError, "^4 masked weights are not zero"):
      masks.masks(state, dense)

  def test_count_nonzero(self):
    params = [np.array([0.0, -0.0, 1.0, np.nan, -2.0]), np.ones((), np.float32)]
    mask = [np.array([False, False, True, False, False]), np.array(False)]
    self.assertEqual(jax.jit(masks.count_nonzero)(params, mask), 3)


class FindStatesTest(parameterized.TestCase):
  kept = staticmethod(masks.keep_masked({"kernel": KERNEL}))

  @parameterized.named_parameters(
    ("alone", lambda tx: tx),
    ("last", lambda tx: optax.chain(optax.clip(1.0), optax.adam(1e-3), tx)),
    ("chain_of_chain", lambda tx: optax.chain(optax.chain(optax.sgd(1.0), tx))),
    ("inner_chain", lambda tx: optax.chain(tx)),
    ("multi_steps", lambda tx: optax.MultiSteps(optax.chain(tx), 2)),
    ("if_finite", lambda tx: optax.apply_if_finite(tx, 2)),
    (
      "injected",
      lambda tx: optax.inject_hyperparams(
        lambda learning_rate: optax.chain(optax.sgd(learning_rate), tx)
      )(learning_rate=0.1),
    ),
    (
      "partition",
      lambda tx: optax.partition(
        {"sparse": optax.chain(optax.sgd(1.0), tx), "rest": optax.adam(1.0)},
        {"bias": "rest", "kernel": "sparse", "scale": "rest"},
      ),
    ),
    (
      "masked",
      lambda tx: optax.masked(tx, jax.tree.map(lambda p: True, PARAMS)),
    ),
  )
  def test_nested(self, wrap):
    tx = wrap(self.kept)
    state = tx.init(PARAMS)
    self.assertLen(masks.find_states(state), 1)
    got = masks.masks(state, PARAMS)
    np.testing.assert_array_equal(got["kernel"], KERNEL)
    self.assertTrue(np.all(got["bias"]) and np.all(got["scale"]))

  @parameterized.named_parameters(
    ("after", lambda tx: optax.chain(tx, optax.add_decayed_weights(0.1))),
    ("between", lambda tx: optax.chain(optax.sgd(1.0), tx, optax.scale(1.0))),
    ("outside", lambda tx: optax.chain(optax.chain(tx), optax.scale(1.0))),
    (
      "within",
      lambda tx: optax.MultiSteps(optax.chain(tx, optax.scale(1.0)), 2),
    ),
    ("two", lambda tx: optax.chain(tx, tx)),
  )
  def test_a_link_that_follows(self, wrap):
    state = wrap(self.kept).init(PARAMS)
    for look in (masks.masks, masks.sparse_params, jax.jit(masks.masks)):
      with self.assertRaisesRegex(ValueError, "must be the last link"):
        look(state, PARAMS)
    with self.assertRaisesRegex(ValueError, "must be the last link"):
      masks.find_states(state)

  def test_none_there(self):
    state = optax.adam(1e-3).init(PARAMS)
    self.assertEqual(masks.find_states(state), [])
    for look in (masks.masks, masks.sparse_params):
      with self.assertRaisesRegex(ValueError, "^opt_state must hold"):
        look(state, PARAMS)

  def test_several(self):
    labels = {"bias": "a", "kernel": "b", "scale": "b"}
    bias = masks.keep_masked({"bias": np.array([True, False])})
    tx = optax.partition({"a": bias, "b": self.kept}, labels)
    state = tx.init(PARAMS)
    self.assertLen(masks.find_states(state), 2)
    got = masks.masks(state, PARAMS)
    np.testing.assert_array_equal(got["bias"], [True, False])
    np.testing.assert_array_equal(got["kernel"], KERNEL)

  @parameterized.parameters(
    {"kernel": np.ones((2, 2), np.float32)},
    {"kernel": np.ones((3, 2, 1), np.float32)},
    {"kernel": np.ones((24, 2), np.float32)},  # packed, it is [3, 2] too
    {"other": np.ones((3, 2), np.float32)},
  )
  def test_another_model(self, **other):
    state = self.kept.init(PARAMS)
    params = {n: p for n, p in PARAMS.items() if n != "kernel"} | other
    for look in (masks.masks, masks.sparse_params):
      with self.assertRaisesRegex(ValueError, "^opt_state is of another model"):
        look(state, params)


class ShardedTest(parameterized.TestCase):
  @parameterized.parameters(*common.AXIS_TYPES)
  def test_training_keeps_shardings_and_moves_nothing(self, axis_type):
    mesh = common.mesh_of(axis_type)
    mask = random_mask((32, 6))
    rng = np.random.default_rng(3)
    weight = rng.normal(size=(32, 6)).astype(np.float32)
    tx = optax.chain(optax.sgd(0.1), masks.keep_masked({"w": mask}))
    step = step_of(tx)
    plain = {"w": weight}
    want, _ = step(plain, tx.init(plain), plain)
    with jax.set_mesh(mesh):
      params = {"w": common.place(weight, mesh, jax.P("x", "y"))}
      state = tx.init(params)
      compiled = step.lower(params, state, params).compile()
      got, after = compiled(params, state, params)
    self.assertEmpty(common.moved(compiled))
    np.testing.assert_array_equal(got["w"], want["w"])
    sharding = params["w"].sharding
    self.assertTrue(got["w"].sharding.is_equivalent_to(sharding, 2))
    for s in (state, after):
      bits = masks.find_states(s)[0].masks["w"]
      self.assertEqual(bits.shape, (4, 6))
      self.assertTrue(
        bits.sharding.is_equivalent_to(sharding, 2), bits.sharding
      )


def test_enforced_is_exact_for_every_half():
  """p + (-p) is +0.0 for all finite values of a type."""
  every = jnp.arange(2**16, dtype=jnp.uint16)
  for dtype in (jnp.bfloat16, jnp.float16):
    p = jax.lax.bitcast_convert_type(every, dtype)
    p = jnp.where(jnp.isfinite(p), p, 0)
    run = jax.jit(functools.partial(masks.enforced, mask=False))
    new = optax.apply_updates(p, run(jnp.ones_like(p), p))
    assert not np.any(bits_of(new))
