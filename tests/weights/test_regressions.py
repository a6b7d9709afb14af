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

  def test_an_empty_model(self):
    tx = weights.rigl(optax.adam(1e-3), sparsity=0.5, until=100, key=KEY)
    updates, _ = tx.update({}, tx.init({}), {})
    self.assertEqual(updates, {})


if __name__ == "__main__":
  absltest.main()
