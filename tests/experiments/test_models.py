"""The models: causality, relative positions, what they refuse."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import models
from experiments.models import transformer


def small(**settings):
  defaults = {"vocabulary": 7, "width": 16, "depth": 2, "heads": 2}
  return models.Transformer(**defaults | settings, rngs=nnx.Rngs(0))


def test_a_transformer_does_not_see_what_comes():
  tokens = jax.random.randint(jax.random.key(0), (2, 12), 0, 7)
  other = tokens.at[:, 8].set((tokens[:, 8] + 1) % 7)
  logits, others = (jax.jit(small())(t) for t in (tokens, other))
  assert logits.shape == (2, 12, 7)
  assert logits.dtype == jnp.float32
  np.testing.assert_array_equal(logits[:, :8], others[:, :8])
  assert (logits[:, 8:] != others[:, 8:]).any(axis=-1).all()


def test_a_transformer_starts_near_the_uniform_guess():
  model = small(vocabulary=256, width=64, heads=4)
  tokens = jax.random.randint(jax.random.key(0), (4, 32), 0, 256)
  spread = np.std(jax.jit(model)(tokens))
  assert 0.3 < spread < 2


def test_scores_of_rotated_queries_and_keys_depend_on_distance():
  q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
  rotate = lambda x: transformer.rotary(jnp.broadcast_to(x, (1, 6, 1, 8)))
  scores = jnp.einsum("bqhd,bkhd->qk", rotate(q), rotate(k))
  for distance in range(-5, 6):
    diagonal = np.diagonal(scores, distance)
    np.testing.assert_allclose(diagonal, diagonal[0], rtol=1e-4, atol=1e-5)


def test_a_transformer_refuses_heads_that_cannot_turn():
  with pytest.raises(ValueError, match=r"width=18, heads=4"):
    small(width=18, heads=4)


def test_an_mlp_gives_logits():
  settings = {"inputs": 5, "classes": 3, "width": 8, "depth": 2}
  model = models.MLP(**settings, rngs=nnx.Rngs(0))
  assert jax.jit(model)(jnp.ones((4, 5))).shape == (4, 3)
