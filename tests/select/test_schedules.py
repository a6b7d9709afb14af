"""Schedules: against the oracles in Python numbers, traced, and in Optax."""

import math

from absl.testing import parameterized
from hypothesis import given
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparsejax.select import schedules
from tests.oracles import select as oracle

# name: the schedule, and the oracle of one step
CASES = {
  "linear": (
    schedules.linear(0.1, 0.8, 10, 37),
    lambda t: oracle.linear(t, 0.1, 0.8, 10, 37),
  ),
  "linear_down": (
    schedules.linear(1.0, 0.25, 0, 3),
    lambda t: oracle.linear(t, 1.0, 0.25, 0, 3),
  ),
  "cubic": (
    schedules.cubic(0.0, 0.9, 10, 37),
    lambda t: oracle.cubic(t, 0.0, 0.9, 10, 37),
  ),
  "cosine": (
    schedules.cosine(0.3, 37),
    lambda t: oracle.cosine(t, 0.3, 37),
  ),
  "cosine_late": (
    schedules.cosine(0.3, 37, begin=7),
    lambda t: oracle.cosine(max(t - 7, 0), 0.3, 30),
  ),
  "exponential": (
    schedules.exponential(0.5, math.exp(-0.25)),
    lambda t: oracle.exponential(t, 0.5, 0.25),
  ),
  "exponential_every": (
    schedules.exponential(0.5, 0.9, every=10),
    lambda t: 0.5 * 0.9 ** (t / 10),
  ),
  "stepwise": (
    schedules.stepwise([0.0, 0.5, 0.9], [13, 16]),
    lambda t: oracle.stepwise(t, [0.0, 0.5, 0.9], 10, 20),
  ),
  "stepwise_one": (schedules.stepwise([0.7], []), lambda t: 0.7),
  "constant": (schedules.constant(0.3), lambda t: 0.3),
}
TRACED = {name: jax.jit(schedule) for name, (schedule, _) in CASES.items()}
STEPS = st.integers(0, 60)


class SchedulesTest(parameterized.TestCase):
  @parameterized.parameters(*CASES)
  @given(step=STEPS)
  def test_equals_oracle(self, name, step):
    schedule, want = CASES[name]
    for t in (step, np.int64(step)):
      got = schedule(t)
      self.assertIsInstance(got, float)  # NumPy's float64 is one
      self.assertAlmostEqual(got, want(step), delta=1e-15)

  @parameterized.parameters(*CASES)
  @given(step=STEPS)
  def test_equals_oracle_when_traced(self, name, step):
    got = TRACED[name](jnp.int32(step))
    self.assertEqual((got.shape, got.dtype), ((), jnp.float32))
    want = CASES[name][1](step)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)

  @parameterized.parameters(*CASES)
  def test_many_steps_at_once(self, name):
    steps = jnp.arange(45)
    got = jax.jit(jax.vmap(CASES[name][0]))(steps)
    want = [CASES[name][1](t) for t in range(45)]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)

  def test_held_outside_exactly(self):
    for make in (schedules.linear, schedules.cubic):
      schedule = make(0.1, 0.9, 10, 30)
      for t in (0, 10):
        self.assertAlmostEqual(schedule(t), 0.1, delta=1e-16)
      for t in (30, 10**9):
        self.assertEqual(schedule(t), 0.9)
    self.assertEqual(schedules.cosine(0.3, 30)(0), 0.3)
    self.assertEqual(schedules.cosine(0.3, 30)(31), 0.0)
    self.assertEqual(TRACED["cosine"](jnp.int32(37)), 0.0)
    self.assertEqual(TRACED["cubic"](jnp.int32(37)), np.float32(0.9))

  @given(step=STEPS)
  def test_a_step_further_is_no_less_sparse(self, step):
    for name in ("linear", "cubic", "stepwise"):
      schedule, _ = CASES[name]
      self.assertLessEqual(schedule(step), schedule(step + 1))
    for name in ("cosine", "exponential"):
      schedule, _ = CASES[name]
      self.assertGreaterEqual(schedule(step), schedule(step + 1))

  @parameterized.parameters(
    (lambda: schedules.linear(0.0, 1.0, 5, 5)(0), "^end must be after begin"),
    (lambda: schedules.cubic(0.0, 1.0, 5, 4)(9), "^end must be after begin"),
    (lambda: schedules.cosine(0.3, 0)(0), "^end must be after begin"),
    (lambda: schedules.stepwise([0.1, 0.2], []), "^values must be"),
    (lambda: schedules.stepwise([0.1], [3]), "^values must be"),
    (lambda: schedules.stepwise([1, 2, 3], [4, 3]), "^values must be"),
  )
  def test_bad_settings(self, make, message):
    with self.assertRaisesRegex(ValueError, message):
      make()

  def test_bad_settings_are_refused_when_traced(self):
    with self.assertRaisesRegex(ValueError, "^end must be after begin"):
      jax.jit(schedules.cubic(0.0, 1.0, 5, 5))(0)


class OptaxTest(parameterized.TestCase):
  @parameterized.parameters("cubic", "cosine", "stepwise", "exponential")
  def test_as_a_learning_rate(self, name):
    schedule, want = CASES[name]
    tx = optax.sgd(schedule)

    @jax.jit
    def step(params, state):
      updates, state = tx.update(jnp.ones(()), state, params)
      return optax.apply_updates(params, updates), state

    params = jnp.zeros(())
    state, expected = tx.init(params), 0.0
    for t in range(20):
      params, state = step(params, state)
      expected -= want(t)
    np.testing.assert_allclose(params, expected, rtol=1e-5)

  def test_in_inject_hyperparams(self):
    schedule, want = CASES["cubic"]
    tx = optax.inject_hyperparams(optax.sgd)(learning_rate=schedule)
    params = jnp.zeros(())
    state = tx.init(params)
    update = jax.jit(tx.update)
    for t in range(30):
      _, state = update(jnp.ones(()), state, params)
      rate = state.hyperparams["learning_rate"]
      np.testing.assert_allclose(rate, want(t), rtol=1e-5, atol=1e-7)

  def test_joined_with_optax(self):
    joined = optax.join_schedules(
      [optax.constant_schedule(0.0), schedules.cubic(0.0, 0.9, 0, 10)], [5]
    )
    got = jax.jit(jax.vmap(joined))(jnp.arange(20))
    want = [oracle.cubic(t, 0.0, 0.9, 5, 15) for t in range(20)]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)
