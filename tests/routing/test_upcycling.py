"""Mixtures that begin as a dense network, and as two mixtures side by side."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import routing
from tests.routing import pieces
from tests.routing import problem

BANK = routing.FeedForward()
WIDTH, HIDDEN, EXPERTS, TOKENS = 4, 6, 3, 5
X = pieces.draw(0, TOKENS, WIDTH)
DENSE = {k: v[0] for k, v in pieces.bank(1, 1, WIDTH, HIDDEN).items()}


@functools.partial(pieces.jit, static_argnames=("k", "renormalize", "scale"))
def mixture(x, logits, params, allowed=None, **options):
  found = routing.top_k(logits, allowed=allowed, **options)
  y = routing.dropless(x, found, BANK, params)
  return y, found.weight.reshape(len(x), -1).sum(-1, keepdims=True)


def dense(x, network=None):
  bank = {k: v[None] for k, v in (network or DENSE).items()}
  return np.array([problem.biased_ffn(bank, 0, row, "silu") for row in x])


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("renormalize", [True, False])
def test_copies_equal_the_dense_network(renormalize, k):
  params = routing.upcycle(DENSE, EXPERTS)
  shapes = {name: x.shape for name, x in params.items()}
  assert shapes == {name: (EXPERTS, *x.shape) for name, x in DENSE.items()}
  logits = pieces.draw(2, TOKENS, EXPERTS)
  y, share = mixture(X, logits, params, k=k, renormalize=renormalize)
  # Of softmax weights that are not renormalized, it is a part.
  pieces.close(y, share * dense(X))
  if renormalize or k == EXPERTS:
    pieces.close(share, np.ones((TOKENS, 1)))


BIASED = {
  **DENSE,
  "up_bias": pieces.draw(11, HIDDEN),
  "gate_bias": pieces.draw(12, HIDDEN),
  "down_bias": pieces.draw(13, WIDTH),
}


@pytest.mark.parametrize("network", [DENSE, BIASED], ids=["plain", "biased"])
def test_copies_in_a_module(network):
  moe = pieces.made(
    lambda: routing.MoE(WIDTH, HIDDEN, EXPERTS, rngs=nnx.Rngs(0))
  )
  params = routing.upcycle(network, EXPERTS)
  moe.experts = nnx.data(jax.tree.map(nnx.Param, params))
  y = pieces.module_jit(lambda moe, x: moe(x))(moe, jnp.asarray(X))
  pieces.close(y, dense(X, network))


masked = pieces.jit(
  functools.partial(routing.masked_copies, DENSE), static_argnums=(0, 1)
)


def test_masked_copies():
  key = jax.random.key(0)
  params = masked(EXPERTS, 0.6, key)
  for name, x in params.items():
    kept = np.asarray(x) != 0
    assert (kept.sum((1, 2)) == round(0.6 * WIDTH * HIDDEN)).all()
    np.testing.assert_array_equal(x, np.where(kept, DENSE[name], 0))
    assert (kept[0] != kept[1]).any() and (kept[1] != kept[2]).any()
  assert (np.equal(params["up"], 0) != np.equal(params["gate"], 0)).any()
  again = masked(EXPERTS, 0.6, key)
  jax.tree.map(np.testing.assert_array_equal, params, again)


def test_masked_copies_of_all_and_of_nothing():
  whole = masked(2, 1.0, jax.random.key(0))
  copies = routing.upcycle(DENSE, 2)
  jax.tree.map(np.testing.assert_array_equal, whole, copies)
  nothing = masked(2, 0.0, jax.random.key(0))
  assert not any(np.any(x) for x in jax.tree.leaves(nothing))


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("kind", ["plain", "gated", "biased"])
def test_split_neurons_together_are_the_dense_network(kind, shuffled):
  params = BIASED if kind == "biased" else DENSE
  params = {k: v for k, v in params.items() if kind != "plain" or k != "gate"}
  order = np.random.default_rng(0).permutation(HIDDEN) if shuffled else None
  experts = routing.neuron_split(params, EXPERTS, order=order)
  assert experts["up"].shape == (EXPERTS, WIDTH, HIDDEN // EXPERTS)
  assert experts["down"].shape == (EXPERTS, HIDDEN // EXPERTS, WIDTH)
  equal, scale = np.zeros((TOKENS, EXPERTS), np.float32), float(EXPERTS)
  y, _ = mixture(X, equal, experts, k=EXPERTS, renormalize=True, scale=scale)
  pieces.close(y, dense(X, params))
  # Each neuron is in one expert.
  columns = np.asarray(experts["up"]).swapaxes(1, 2).reshape(HIDDEN, WIDTH)
  order = np.arange(HIDDEN) if order is None else order
  np.testing.assert_array_equal(columns, params["up"].T[order])


def test_aggregation():
  one, two = pieces.bank(3, 2, WIDTH, HIDDEN), pieces.bank(6, 3, WIDTH, HIDDEN)
  kernels = pieces.draw(9, WIDTH, 2), pieces.draw(10, WIDTH, 3)
  params, kernel = routing.aggregate([one, two], kernels)
  logits = X @ kernel
  pieces.close(logits[:, :2], X @ kernels[0])
  first = np.arange(5) < 2
  for allowed, bank, own in ((first, one, 0), (~first, two, 1)):
    y, _ = mixture(X, logits, params, allowed, k=2)
    alone, _ = mixture(X, X @ kernels[own], bank, k=2)
    np.testing.assert_allclose(y, alone, 1e-5, 1e-5)


def test_bad_input():
  with pytest.raises(ValueError, match="experts must be 1 or more, got 0"):
    routing.upcycle(DENSE, 0)
  with pytest.raises(ValueError, match=r"density must be in \[0, 1\], got 1.5"):
    routing.masked_copies(DENSE, 2, 1.5, jax.random.key(0))
  split = routing.neuron_split
  with pytest.raises(ValueError, match="divide the 6 hidden neurons, got 4"):
    split(DENSE, 4)
  with pytest.raises(ValueError, match='must have "up", "down" and perhaps'):
    split({**DENSE, "bias": jnp.ones(3)}, 2)
  with pytest.raises(
    ValueError, match=r"must have gate \[4, 6\], got \[6, 4\]"
  ):
    split({**DENSE, "gate": DENSE["gate"].T}, 2)
  with pytest.raises(ValueError, match=r"order must be integer\[6\]"):
    split(DENSE, 2, order=jnp.arange(5))
  bank, kernel = routing.upcycle(DENSE, 2), jnp.ones((WIDTH, 2))
  with pytest.raises(ValueError, match="routers must be as many as banks"):
    routing.aggregate([bank], [kernel, kernel])
  with pytest.raises(ValueError, match=r"routers must be \[d, experts\]"):
    routing.aggregate([bank, bank], [kernel, jnp.ones((WIDTH, 3))])
  other = {k: v for k, v in bank.items() if k != "gate"}
  with pytest.raises(ValueError, match="banks must be alike"):
    routing.aggregate([bank, other], [kernel, kernel])
