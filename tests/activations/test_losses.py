"""Losses against loops, and what the density loss does to a network."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsejax import activations
from tests.activations import pieces
from tests.oracles import activations as oracle

LAYERS = [np.maximum(pieces.draw(0, 3, 5), 0), pieces.draw(1, 2, 2, 4)]


@pytest.mark.parametrize(
  "options,want",
  [
    ({}, {"form": "square"}),
    ({"eps": 0.5}, {"form": "square", "eps": 0.5}),
    ({"sharpness": 3.0}, {"form": "tanh", "sharpness": 3.0}),
  ],
)
def test_density_loss_equals_a_loop(options, want):
  f = lambda layers: activations.density_loss(layers, **options)
  loss, gradient = pieces.jit(jax.value_and_grad(f))(LAYERS)
  pieces.close(loss, oracle.density_loss(LAYERS, **want))
  jax.tree.map(
    pieces.close, gradient, oracle.density_loss_gradient(LAYERS, **want)
  )


def test_sharp_losses_are_the_density():
  layer = LAYERS[0]
  exact = oracle.density(layer)
  assert abs(activations.density_loss([layer], eps=1e-12) - exact) < 1e-3
  assert abs(activations.density_loss([layer], sharpness=1e5) - exact) < 1e-3


@pytest.mark.parametrize("kl", [False, True])
def test_rate_loss_equals_a_loop(kl):
  p = 1 / (1 + np.exp(-pieces.draw(2, 6, 3)))
  f = lambda p: activations.rate_loss(p, 0.3, kl=kl)
  loss, gradient = pieces.jit(jax.value_and_grad(f))(p)
  form = "kl" if kl else "square"
  pieces.close(loss, oracle.rate_penalty(p, 0.3, form))
  moved = p.astype(np.float64)
  moved[1, 2] += 1e-6
  slope = oracle.rate_penalty(moved, 0.3, form)
  slope = (slope - oracle.rate_penalty(p, 0.3, form)) / 1e-6
  np.testing.assert_allclose(gradient[1, 2], slope, 1e-2)
  same = jnp.full((2, 3), 0.3)
  assert abs(f(same)) < 1e-6
  assert np.isfinite(f(jnp.zeros((2, 3))))


def test_low_rank_tuning_with_the_loss_is_sparser():
  # A frozen ReLU network whose first layer has a trained product of low rank.
  x, target = pieces.draw(3, 64, 6), pieces.draw(4, 64, 2) / 4
  x[:, 0] = 2  # with it a neuron can be silent
  up, down = pieces.draw(5, 6, 32) / 2, pieces.draw(6, 32, 2) / 6
  start = {"a": pieces.draw(7, 6, 2) / 2, "b": np.zeros((2, 32), np.float32)}
  tx = optax.adam(0.02)

  def forward(params):
    hidden = jax.nn.relu(x @ (up + params["a"] @ params["b"]))
    return hidden, ((hidden @ down - target) ** 2).mean()

  @pieces.jit
  def train(params, weight):
    def loss(params):
      hidden, error = forward(params)
      return error + weight * activations.density_loss(hidden, eps=0.05)

    def step(carry, _):
      params, state = carry
      updates, state = tx.update(jax.grad(loss)(params), state)
      return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=300)
    hidden, error = forward(params)
    return activations.density(hidden), error

  plain, error = train(start, 0.0)
  sparse, sparse_error = train(start, 0.3)
  assert sparse < plain / 3
  assert sparse_error < 1.2 * error


def test_bad_input():
  with pytest.raises(ValueError, match="eps or sharpness must be None"):
    activations.density_loss(LAYERS, eps=1.0, sharpness=1.0)
  with pytest.raises(ValueError, match="eps must be positive, got 0"):
    activations.density_loss(LAYERS, eps=0)
  with pytest.raises(ValueError, match="sharpness must be positive"):
    activations.density_loss(LAYERS, sharpness=-1.0)
  for layers in ([], [jnp.arange(3)], [jnp.ones((0, 3))]):
    with pytest.raises(ValueError, match="activations must be floating"):
      activations.density_loss(layers)
  with pytest.raises(ValueError, match="target must be above 0 and below 1"):
    activations.rate_loss(jnp.ones((2, 3)), 1.0)
  with pytest.raises(ValueError, match="probabilities must be floating"):
    activations.rate_loss(jnp.arange(3), 0.5)
