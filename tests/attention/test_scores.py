"""Scores: pooling of short blocks, windows, products, and chunks of queries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.attention import scores
from tests.oracles import selection as oracle
from tests.oracles import selection_trainable as trainable

X = np.random.default_rng(0).normal(size=(2, 37, 2, 4)).astype(np.float32)
close = lambda got, want: np.testing.assert_allclose(
  got, want, rtol=1e-6, atol=1e-6
)


@pytest.mark.parametrize("block", [1, 16, 37, 50])
def test_pooled(block):
  want = np.stack([oracle.means(x, block) for x in X])
  close(scores.pooled(X, block), want)
  runs = [list(run) for run in oracle.cut(37, block)]
  for how in ("max", "min"):
    want = np.stack([getattr(X[:, run], how)(axis=1) for run in runs], 1)
    np.testing.assert_array_equal(scores.pooled(X, block, how), want)


@pytest.mark.parametrize("length,stride", [(8, 4), (8, 3), (5, 7), (37, 1)])
def test_windows(length, stride):
  want = np.stack(
    [trainable.nsa_compress(x, length=length, stride=stride) for x in X]
  )
  close(scores.window_means(X, length, stride), want)
  close(scores.windows(X, length, stride).mean(2), want)


def test_no_window():
  assert scores.window_means(X, 38, 2).shape == (2, 0, 2, 4)
  assert scores.windows(X, 38, 2).shape == (2, 0, 38, 2, 4)


def test_products():
  q = np.random.default_rng(1).normal(size=(2, 3, 6, 4)).astype(np.float32)
  got = scores.products(jnp.array(q), jnp.array(X), 0.5)
  keys = np.repeat(X, 3, axis=2)
  close(got, 0.5 * np.einsum("bnhd,bmhd->bhnm", q, keys))


@pytest.mark.parametrize("size", [5, 99])
def test_in_chunks(size):
  def f(arrays):
    x, y = arrays
    return {"sum": (x * y[..., None, None]).sum(-1), "y": y}

  y = jnp.arange(74.0).reshape(2, 37) / 74
  got = scores.in_chunks(f, (jnp.array(X), y), 1, size=size)
  close(got["sum"], f((X, y))["sum"])
  np.testing.assert_array_equal(got["y"], y)
  grad = jax.grad(
    lambda x: (scores.in_chunks(f, (x, y), 1, size=size)["sum"] ** 2).sum()
  )
  want = jax.grad(lambda x: (f((x, y))["sum"] ** 2).sum())
  close(grad(jnp.array(X)), want(jnp.array(X)))


@pytest.mark.parametrize(
  "function,message",
  [
    (lambda: scores.pooled(X, 0), "block is 0"),
    (lambda: scores.pooled(X, 4, "sum"), "how is 'sum'"),
    (lambda: scores.windows(X, 4, 0), "stride is 0"),
    (lambda: scores.window_means(X, 2.0, 1), "length is 2.0"),
    (lambda: scores.products(X[:, :, :1], X), "H a multiple of Hkv"),
    (lambda: scores.products(X[:1], X), "q has shape"),
    (lambda: scores.positions(jnp.zeros(3), 3), "q_positions is float32"),
    (lambda: scores.positions(jnp.zeros(4, int), 3), "q_positions is int32"),
  ],
)
def test_bad_input(function, message):
  with pytest.raises(ValueError, match=message):
    function()
