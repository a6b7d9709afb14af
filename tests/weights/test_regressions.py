"""What once went wrong, each as small as it can be."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsejax import select
from sparsejax import weights

KEY = jax.random.key(0)


def updated(tx, params, grads, steps, masked=True):
  """Parameters and state after some steps of equal gradients."""
  state = jax.jit(tx.init)(params)
  if masked:
    params = weights.sparse_params(state, params)

  @jax.jit
  def step(params, state):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  for _ in range(steps):
    params, state = step(params, state)
  return params, state


class RegressionTest(parameterized.TestCase):
  @parameterized.parameters("uniform", "global")
  def test_a_falling_budget_keeps_the_largest(self, distribution):
    params = {"w": jnp.arange(1.0, 65).reshape(8, 8)}
    rule = weights.Rule(
      sparsity=select.linear(0.0, 0.5, 0, 4),
      distribution=distribution,
      initial=weights.magnitude,
      grow=weights.gradient,
      drop_fraction=0.0,
      every=4,
      until=4,
    )
    tx = weights.sparsify(optax.sgd(0.0), rule)
    _, state = updated(tx, params, jax.tree.map(jnp.zeros_like, params), 5)
    mask = weights.masks(state, params)["w"]
    np.testing.assert_array_equal(mask, params["w"] > 32)

  def test_grown_weights_begin_as_new_ones_do(self):
    # rprop's step sizes begin above zero: one of zero would never move again.
    params = {"w": jnp.ones((8, 8))}
    grads = {"w": jnp.arange(64.0).reshape(8, 8) + 1}
    tx = weights.rigl(
      optax.rprop(1e-2),
      sparsity=0.5,
      every=2,
      until=2,
      drop_fraction=select.constant(0.3),
      key=KEY,
    )
    before, state = updated(tx, params, grads, 2)
    after, _ = updated(tx, params, grads, 6)
    first = weights.masks(state, params)["w"]
    _, state = updated(tx, params, grads, 3)
    grown = weights.masks(state, params)["w"] & ~first
    self.assertGreater(grown.sum(), 0)
    self.assertTrue(jnp.all(after["w"][grown] != before["w"][grown]))

  def test_fan_in_of_a_stack_takes_one_density(self):
    params = {"w": jnp.ones((4, 16, 16))}
    tx = weights.srigl(
      optax.sgd(0.1),
      sparsity=0.5,
      until=100,
      distribution="erk_plus",
      axes=select.Axes(stack=(0,)),
      key=KEY,
    )
    with pytest.raises(ValueError, match="distribution must give all layers"):
      tx.init(params)

  def test_keys_of_other_kinds(self):
    params = {"w": jnp.ones((8, 8))}
    for key in jax.random.key(0, impl="rbg"), jax.random.PRNGKey(0):
      tx = weights.static(optax.sgd(0.1), sparsity=0.5, key=key)
      total = weights.summary(tx.init(params), params).total
      self.assertEqual(total.nonzero, 32)
    for key in jax.random.split(KEY), jnp.ones(2):
      with pytest.raises(ValueError, match="key must be a PRNG key"):
        weights.static(optax.sgd(0.1), sparsity=0.5, key=key)

  def test_drop_and_grow_draw_apart(self):
    params = {"w": jnp.ones((64, 64))}
    rule = weights.Rule(
      sparsity=0.5,
      drop=weights.random,
      grow=weights.random,
      drop_fraction=0.5,
      every=1,
      until=None,
    )
    tx = weights.sparsify(optax.sgd(0.0), rule, key=KEY)
    zero = jax.tree.map(jnp.zeros_like, params)
    _, state = updated(tx, params, zero, 2)
    # 1,024 of 2,048 are dropped; of the 3,072 that may then grow a third was
    # just dropped, so about 683 weights are exchanged (sd 15).
    flipped = weights.summary(state, params).total.flipped / 2
    self.assertBetween(flipped, 683 - 75, 683 + 75)

  @parameterized.parameters(
    dict(until=5, every=10),
    dict(until=0),
    dict(until=7.5),
    dict(until=100, every=10.0),
  )
  def test_times_that_never_come(self, **times):
    with pytest.raises(ValueError, match=r"(until|every) must"):
      weights.rigl(
        optax.sgd(0.1), sparsity=0.5, key=KEY, drop_fraction=0.3, **times
      )

  def test_a_custom_budget_is_checked(self):
    params = {"w": jnp.ones((8, 8))}
    for budget in (lambda shapes, density: {}, lambda s, d: {"w": 1.5}):
      tx = weights.static(
        optax.sgd(0.1), sparsity=0.5, key=KEY, distribution=budget
      )
      with pytest.raises(ValueError, match="distribution must give 'w'"):
        tx.init(params)

  def test_arguments_in_the_wrong_order(self):
    params = {"w": jnp.ones((8, 8))}
    state = weights.static(optax.sgd(0.1), sparsity=0.5, key=KEY).init(params)
    with pytest.raises(ValueError, match="opt_state comes first"):
      weights.masks(params, state)

  def test_gradients_with_a_leaf_missing(self):
    params = {"w": jnp.ones((8, 8)), "v": jnp.ones((8, 8))}
    tx = weights.sr_ste(optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"grads must .*no \['v'\]"):
      tx.update({"w": params["w"]}, tx.init(params), params)

  def test_not_an_optimizer(self):
    with pytest.raises(ValueError, match="inner must be an Optax optimizer"):
      weights.sr_ste(1e-3)

  def test_differentiating_through_sparse_params_is_the_same(self):
    params = {"w": jnp.arange(64.0).reshape(8, 8) / 64}
    tx = weights.sr_ste(optax.sgd(0.1), decay=0.0)
    state = tx.init(params)
    loss = lambda p: jnp.sum(jnp.sin(p["w"]))
    seen = lambda p: weights.sparse_params(state, p)
    at = jax.grad(loss)(seen(params))
    through = jax.grad(lambda p: loss(seen(p)))(params)
    np.testing.assert_array_equal(at["w"], through["w"])

  @parameterized.parameters(
    (weights.rigl, dict(until=None), "until must be an integer, got None"),
    (weights.rigl, dict(drop_fraction="x"), "drop_fraction must .*got 'x'"),
    (weights.rigl, dict(drop_fraction=None), "drop_fraction must .*got None"),
    (weights.set_, dict(drop_fraction=None), "drop_fraction must .*got None"),
    (weights.rigl, dict(structure="nm"), "structure must be .*got 'nm'"),
    (weights.rigl, dict(structure={"w": "nm"}), "structure must .*got 'nm'"),
    (weights.rigl, dict(structure=select.Unstructured), "structure must be"),
    (weights.rigl, dict(distribution=3), "distribution must be .*got 3"),
    (weights.rigl, dict(sparsity=jnp.float32(0.5)), "sparsity .*Python number"),
    (weights.rigl, dict(axes=0), "axes must be .*got 0"),
    (weights.rigl, dict(axes={"w": 0}), "axes must be .*got {'w': 0}"),
    (
      weights.rigl,
      dict(sparsity=0.99, distribution="erk_plus"),
      "distribution='erk_plus': density is too low",
    ),
  )
  def test_arguments_of_a_wrong_type(self, make, given, message):
    settings = dict(sparsity=0.5, key=KEY, until=200) | given
    with pytest.raises(ValueError, match=message):
      make(optax.sgd(0.1), **settings).init({"w": jnp.ones((8, 8))})

  @parameterized.parameters(
    (dict(until=None), "until must be an integer, got None"),
    (dict(begin=None), "begin must be an integer, got None"),
    (dict(sparsity={"w": 0.5}), "sparsity must be a Python number .*got {'w'"),
    (dict(sparsity=select.constant(0.5)), "sparsity must be a Python number"),
    (dict(initial_sparsity="x"), "initial_sparsity must .*got 'x'"),
  )
  def test_gradual_magnitude_takes_numbers(self, given, message):
    settings = dict(sparsity=0.5, begin=0, until=100) | given
    with pytest.raises(ValueError, match=message):
      weights.gradual_magnitude(optax.sgd(0.1), **settings)

  @parameterized.parameters(
    (dict(sparsity={"w": 0.5}), "^sparsity must be a Python number .*got {'w'"),
    (dict(backward_sparsity=None), "backward_sparsity must .*got None"),
    (dict(decay=-1.0), "decay must be .*got -1.0"),
  )
  def test_top_kast_takes_numbers(self, given, message):
    settings = dict(sparsity=0.5, backward_sparsity=0.2) | given
    with pytest.raises(ValueError, match=message):
      weights.top_kast(optax.sgd(0.1), **settings)

  def test_nm_methods_take_numbers(self):
    for decay in "x", -0.1, None:
      with pytest.raises(ValueError, match="decay must be a number of 0"):
        weights.sr_ste(optax.sgd(0.1), decay=decay)
    for make in weights.mask_decay, weights.structure_decay:
      with pytest.raises(ValueError, match=r"until must .*got None"):
        make(optax.sgd(0.1), until=None)
    for n in 9, -1:
      with pytest.raises(ValueError, match="n must be an integer in"):
        weights.decay_patterns(n, 8, "stepwise")
    with pytest.raises(ValueError, match="stages must all be n:m"):
      weights.Rule(structure=(2, 4))

  def test_choices_of_a_wrong_type(self):
    scores = jnp.ones((4, 4))
    for k in "x", None, [1]:
      with pytest.raises(ValueError, match="k must be an integer, got"):
        select.top_k_mask(scores, k)
    for axis in "x", 1.5, ("x",):
      with pytest.raises(ValueError, match=r"axis must be in \[-2, 2\), got"):
        select.top_k_mask(scores, 1, axis=axis)
    for structure in select.Block((2, 2)), select.Channel():
      with pytest.raises(ValueError, match="scores must be floating, got int"):
        structure.mask(scores.astype(int), 0.5)
      with pytest.raises(ValueError, match=r"density must be .* got 'x'"):
        structure.mask(scores, "x")
    for budget in select.BUDGETS.values():
      with pytest.raises(ValueError, match=r"density must be .* got 'x'"):
        budget({"w": (4, 4)}, "x")
    for every in 0, "x":
      with pytest.raises(ValueError, match="every must be a number above 0"):
        select.exponential(1.0, 0.5, every)

  def test_gradients_of_another_shape(self):
    params = {"w": jnp.ones((8, 8))}
    tx = weights.sr_ste(optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"grads must .*\(8,\) for 'w'"):
      tx.update({"w": jnp.ones(8)}, tx.init(params), params)

  def test_sad_of_masks_that_differ_in_more_than_values(self):
    mask = jnp.ones((4, 4), bool)
    for other in {"v": mask}, {"w": mask[:1]}, {}:
      with pytest.raises(ValueError, match="after must be a tree like before"):
        weights.sad({"w": mask}, other)

  def test_a_summary_has_flops_and_the_neurons_of_each_layer(self):
    params = {"w": jnp.ones((3, 8, 16))}
    mask = np.ones((3, 8, 16), bool)
    mask[:, :, 5], mask[1, :, 6] = False, False
    state = weights.keep_masked({"w": mask}).init(params)
    summary = weights.summary(state, params, axes=select.Axes(stack=(0,)))
    self.assertEqual(summary.total.outputs, 3 * 16)
    self.assertEqual(summary.total.dead_outputs, 4)
    head, *_, total, _ = str(summary).splitlines()
    self.assertIn("FLOPs", head)
    self.assertIn(f" {2 * 8 * (3 * 16 - 4)} ", total)
    with pytest.raises(ValueError, match=r"axes must be .*got 0"):
      weights.summary(state, params, axes=0)

  def test_an_empty_model(self):
    for budget in (None, "global"):
      tx = weights.rigl(
        optax.adam(1e-3),
        sparsity=0.5,
        distribution=budget,
        until=100,
        key=KEY,
      )
      updates, _ = tx.update({}, tx.init({}), {})
      self.assertEqual(updates, {})
    self.assertEqual(weights.choose_masks({}, sparsity=0.5), {})

  def test_a_state_made_outside_of_jit_can_be_donated(self):
    params = {"w": jnp.arange(1.0, 65).reshape(8, 8)}
    kept = weights.keep_masked({"w": jnp.eye(8, dtype=bool)})
    for tx in (
      optax.chain(optax.sgd(0.1), kept),
      weights.rigl(optax.sgd(0.1), sparsity=0.5, until=100, key=KEY),
    ):
      state = tx.init(params)
      arrays = [x for x in jax.tree.leaves(state) if isinstance(x, jax.Array)]
      self.assertLen({x.unsafe_buffer_pointer() for x in arrays}, len(arrays))


if __name__ == "__main__":
  absltest.main()
