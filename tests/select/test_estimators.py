"""Estimators: exact values forward, the stated derivative backward."""

from absl.testing import parameterized
from hypothesis import given
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.select import estimators

X = jnp.array([-2.0, -0.5, -0.3, -0.0, 0.0, 0.2, 0.5, 3.0])


class StraightThroughTest(parameterized.TestCase):
  def test_value_is_hard_and_gradient_soft(self):
    def loss(x):
      hard = jnp.round(x) + 1e-3  # soft + (hard - soft) would not be exact
      return estimators.straight_through(hard, x**3)

    value, pull = jax.vjp(jax.jit(loss), X)
    np.testing.assert_array_equal(value, jnp.round(X) + 1e-3)
    np.testing.assert_allclose(pull(jnp.ones_like(X))[0], 3 * X**2)
    _, out = jax.jvp(loss, (X,), (jnp.ones_like(X),))
    np.testing.assert_allclose(out, 3 * X**2)

  def test_hard_has_no_gradient(self):
    got = jax.grad(lambda h: estimators.straight_through(h, X).sum())(X)
    np.testing.assert_array_equal(got, np.zeros(8))

  @parameterized.parameters(bool, jnp.int32, jnp.float32)
  def test_hard_of_any_type(self, dtype):
    soft = X.astype(jnp.bfloat16)

    @jax.jit
    def run(x):
      hard = (x > 0).astype(dtype)
      return estimators.straight_through(hard, x)

    got = run(soft)
    self.assertEqual(got.dtype, jnp.bfloat16)
    np.testing.assert_array_equal(got, X > 0)
    grad = jax.grad(lambda x: run(x).sum().astype(jnp.float32))(soft)
    np.testing.assert_array_equal(grad, np.ones(8))

  def test_vmap_and_second_derivative(self):
    f = lambda x: estimators.straight_through(jnp.round(x), x**3)
    np.testing.assert_allclose(jax.vmap(jax.grad(jax.grad(f)))(X), 6 * X)

  def test_shapes_must_agree(self):
    with self.assertRaisesRegex(ValueError, "^hard must have the shape"):
      estimators.straight_through(jnp.ones(3), jnp.ones((1, 3)))
    with self.assertRaisesRegex(ValueError, "^hard must have the shape"):
      jax.grad(lambda x: estimators.straight_through(jnp.ones(()), x).sum())(X)


class StepTest(parameterized.TestCase):
  @parameterized.parameters(0.5, 1.0, 4.0)
  def test_value_and_rectangle(self, bandwidth):
    f = lambda x: estimators.step(x, bandwidth)
    np.testing.assert_array_equal(jax.jit(f)(X), X > 0)
    got = jax.jit(jax.vmap(jax.grad(f)))(X)
    want = np.where(np.abs(X) < bandwidth / 2, 1 / bandwidth, 0)
    np.testing.assert_allclose(got, want)

  @parameterized.parameters(0.5, 2.0)
  def test_derivative_has_mass_one(self, bandwidth):
    x = jnp.linspace(-3, 3, 6001)
    slope = jax.vmap(jax.grad(lambda x: estimators.step(x, bandwidth)))(x)
    self.assertAlmostEqual(float(jnp.mean(slope) * 6), 1, delta=0.01)

  @parameterized.parameters(jnp.bfloat16, jnp.float16, jnp.float32)
  def test_types(self, dtype):
    x = X.astype(dtype)
    value, pull = jax.vjp(estimators.step, x)
    (slope,) = pull(jnp.ones_like(value))
    self.assertEqual((value.dtype, slope.dtype), (dtype, dtype))

  @parameterized.parameters(0, -1.0)
  def test_bad_bandwidth(self, bandwidth):
    with self.assertRaisesRegex(ValueError, "^bandwidth must be positive"):
      estimators.step(X, bandwidth)


class SmoothStepTest(parameterized.TestCase):
  @given(x=st.floats(-4, 4, width=32), width=st.sampled_from([0.5, 1.0, 3.0]))
  def test_values(self, x, width):
    got = estimators.smooth_step(jnp.float32(x), width)
    if abs(x) >= width / 2:  # exactly
      self.assertEqual(got, float(x > 0))
    else:  # Hazimeh et al., eq. (4), gamma = width
      want = -2 / width**3 * x**3 + 3 / (2 * width) * x + 0.5
      self.assertAlmostEqual(float(got), want, delta=1e-5)

  @parameterized.parameters(0.5, 3.0)
  def test_derivative(self, width):
    x = jnp.array([-2.0, -0.2, 0.0, 0.1, 0.24, 2.0])
    f = lambda x: estimators.smooth_step(x, width)
    got = jax.jit(jax.vmap(jax.grad(f)))(x)
    inside = np.abs(x) < width / 2
    want = np.where(inside, 1.5 / width - 6 / width**3 * np.square(x), 0)
    np.testing.assert_allclose(got, want, atol=1e-5)

  def test_type_is_kept(self):
    got = jax.jit(estimators.smooth_step)(X.astype(jnp.bfloat16))
    self.assertEqual(got.dtype, jnp.bfloat16)

  @parameterized.parameters(0, -1.0)
  def test_bad_width(self, width):
    with self.assertRaisesRegex(ValueError, "^width must be positive"):
      estimators.smooth_step(X, width)


class GumbelSoftmaxTest(parameterized.TestCase):
  @parameterized.parameters(True, False)
  def test_sums_to_one(self, hard):
    logits = jax.random.normal(jax.random.key(0), (3, 5))
    draw = jax.jit(estimators.gumbel_softmax, static_argnames="hard")
    got = draw(jax.random.key(1), logits, 0.5, hard=hard)
    np.testing.assert_allclose(got.sum(-1), np.ones(3), rtol=1e-6)
    if hard:
      self.assertEqual(set(np.ravel(got).tolist()), {0.0, 1.0})
      soft = draw(jax.random.key(1), logits, 0.5, hard=False)
      np.testing.assert_array_equal(got.argmax(-1), soft.argmax(-1))

  def test_draws_follow_the_distribution(self):
    logits = jnp.log(jnp.array([0.1, 0.2, 0.7]))
    rows = jnp.broadcast_to(logits, (20_000, 3))
    got = estimators.gumbel_softmax(jax.random.key(2), rows, 0.1, hard=True)
    np.testing.assert_allclose(got.mean(0), [0.1, 0.2, 0.7], atol=0.02)

  def test_hard_has_the_gradient_of_soft(self):
    logits = jax.random.normal(jax.random.key(3), (4, 5))
    weight = jnp.arange(20.0).reshape(4, 5)

    def loss(logits, temperature, hard):
      draw = estimators.gumbel_softmax(
        jax.random.key(4), logits, temperature, hard=hard
      )
      return jnp.sum(draw * weight)

    grads = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)
    hard, soft = (grads(logits, 0.7, h) for h in (True, False))
    np.testing.assert_allclose(hard[0], soft[0], rtol=1e-5)
    np.testing.assert_allclose(hard[1], soft[1], rtol=1e-5)
    self.assertGreater(np.abs(soft[0]).max(), 0)

  def test_type_is_kept(self):
    got = estimators.gumbel_softmax(
      jax.random.key(5), jnp.zeros(4, jnp.bfloat16), 1.0, hard=True
    )
    self.assertEqual(got.dtype, jnp.bfloat16)
