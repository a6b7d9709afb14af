"""Gates against loops: draws, gradients, and means over all outcomes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsejax import activations
from tests import common
from tests.activations import pieces
from tests.oracles import activations as oracle

KEY = jax.random.key(0)
LOGITS = pieces.draw(0, 4, 3)
COTANGENT = pieces.draw(1, 4, 3)
UNIFORM = np.asarray(jax.random.uniform(KEY, LOGITS.shape))


def pulled(f, *args):
  def run(x, cotangent):
    y, back = jax.vjp(f, x)
    return y, back(cotangent)[0]

  return pieces.jit(run)(*args)


@pytest.mark.parametrize("gradient", ["identity", "sigmoid", "none"])
def test_bernoulli_gate_equals_a_loop(gradient):
  f = lambda a: activations.bernoulli_gate(KEY, a, gradient=gradient)
  gate, got = pulled(f, LOGITS, COTANGENT)
  np.testing.assert_array_equal(gate, oracle.bernoulli_gate(LOGITS, UNIFORM))
  if gradient == "none":
    assert not got.any()
  else:
    slope = gradient == "sigmoid"
    pieces.close(got, oracle.straight_through(LOGITS, COTANGENT, slope))
  assert f(jnp.asarray(LOGITS, jnp.bfloat16)).dtype == jnp.bfloat16


def test_stochastic_times_smooth_equals_a_loop():
  f = lambda a: activations.stochastic_times_smooth(KEY, a)
  got, gradient = pulled(f, LOGITS, COTANGENT)
  want, slope = oracle.stochastic_times_smooth(LOGITS, UNIFORM)
  pieces.close(got, want)
  pieces.close(gradient, slope * COTANGENT)


def test_mean_of_stochastic_times_smooth():
  a = jnp.full(20_000, -0.5)
  p = oracle.sigmoid(-0.5)
  f = lambda a: activations.stochastic_times_smooth(KEY, a)
  # Standard errors below 0.004.
  assert abs(f(a).mean() - p) < 0.015
  slope = jax.grad(lambda a: f(a).sum())(a).mean()
  assert abs(slope - p * (1 - p) / 2) < 0.01


def test_noisy_rectifier_equals_a_loop():
  noise = 0.5 * np.asarray(jax.random.normal(KEY, LOGITS.shape))
  f = lambda a: activations.noisy_rectifier(KEY, a, scale=0.5)
  got, gradient = pulled(f, LOGITS, COTANGENT)
  want, slope = oracle.noisy_rectifier(LOGITS, noise)
  pieces.close(got, want)
  pieces.close(gradient, slope * COTANGENT)


def quadratic(h):
  """A loss of three gates."""
  return 2 * h[0] - h[1] * h[2] + 3 * (h.sum() - 1) ** 2 + 4


@pieces.jit
def estimates(a, outcomes, losses, baseline):
  """What every outcome's gradient is."""

  def one(a, gates, loss):
    term = lambda a: activations.reinforce(a, gates, loss, baseline)
    return jax.value_and_grad(term)(a)

  return jax.vmap(one, (None, 0, 0))(a, outcomes, losses)


def test_reinforce_is_unbiased_and_the_best_baseline_varies_least():
  a = LOGITS[0]
  gates, p = zip(*oracle.outcomes(a), strict=True)
  gates, p = np.array(gates, np.float32), np.array(p)
  losses = np.array([quadratic(h) for h in gates], np.float32)
  exact = oracle.exact_gradient(quadratic, a)
  best = oracle.optimal_baseline(quadratic, a)
  variances = []
  for baseline in (np.zeros(3), best, best + 1, np.full(3, losses.mean())):
    zero, got = estimates(a, gates, losses, baseline)
    assert not zero.any()
    for g, h, loss in zip(got, gates, losses, strict=True):
      pieces.close(g, oracle.reinforce(a, h, loss, baseline), 1e-4)
    mean = p @ common.float64(got)
    pieces.close(mean, exact, 1e-4)
    variances.append(p @ (common.float64(got) - mean) ** 2)
  assert all((variances[1] <= v + 1e-6).all() for v in variances)
  assert (variances[1] < variances[0]).any()


def test_best_baseline_of_draws():
  draws = 4000
  a = np.broadcast_to(LOGITS[0], (draws, 3))
  gates = activations.bernoulli_gate(KEY, jnp.asarray(a), gradient="none")
  losses = np.array([quadratic(h) for h in np.asarray(gates)], np.float32)
  got = activations.best_baseline(jnp.asarray(a), gates, jnp.asarray(losses))
  # Losses spread by about 5: a standard error of about 0.1.
  best = oracle.optimal_baseline(quadratic, LOGITS[0])
  np.testing.assert_allclose(got, best, atol=0.5)
  nothing = activations.best_baseline(
    jnp.full((2, 1), 200.0), jnp.ones((2, 1)), jnp.ones(2)
  )
  assert nothing.tolist() == [0.0]


def test_gates_learn_a_rate_and_are_really_zero():
  blocks, target = 4, 0.25
  x, wanted = pieces.draw(2, 32, 5), pieces.draw(3, 32)
  params = {"gate": 0.1 * pieces.draw(4, 5, blocks), "w": np.ones(blocks)}
  tx = optax.adam(0.05)

  def loss(params, key):
    logits = x @ params["gate"]
    gates = activations.bernoulli_gate(key, logits)
    y = (gates * jnp.tanh(x[:, :blocks]) * params["w"]).sum(-1)
    rate = activations.rate_loss(jax.nn.sigmoid(logits), target)
    return ((y - wanted) ** 2).mean() + 500 * rate, gates

  @jax.jit
  def train(params):
    def step(carry, key):
      params, state = carry
      gradients, gates = jax.grad(loss, has_aux=True)(params, key)
      updates, state = tx.update(gradients, state)
      return (optax.apply_updates(params, updates), state), gates

    keys = jax.random.split(KEY, 300)
    (params, _), gates = jax.lax.scan(step, (params, tx.init(params)), keys)
    return params, gates

  params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)
  _, gates = train(params)
  last = np.asarray(gates[-100:])
  assert set(np.unique(last)) == {0.0, 1.0}
  # The task pulls a little against the penalty.
  assert abs(last.mean() - target) < 0.04


def test_bad_input():
  with pytest.raises(ValueError, match="logits must be floating, got int32"):
    activations.bernoulli_gate(KEY, jnp.arange(3))
  with pytest.raises(ValueError, match="gradient must be identity"):
    activations.bernoulli_gate(KEY, LOGITS, gradient="all")
  with pytest.raises(ValueError, match="logits, gates, loss and baseline"):
    activations.reinforce(LOGITS, LOGITS[0], jnp.ones(4))
  with pytest.raises(ValueError, match="logits, gates and loss must be"):
    activations.best_baseline(LOGITS, LOGITS, jnp.ones(3))
  with pytest.raises(ValueError, match="scale must be at least 0, got -1"):
    activations.noisy_rectifier(KEY, LOGITS, scale=-1)
  with pytest.raises(ValueError, match="x must be floating"):
    activations.noisy_rectifier(KEY, jnp.arange(3))
