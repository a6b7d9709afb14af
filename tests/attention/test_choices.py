"""Choices of blocks: the oracle's, ties, forced entries, budgets, NaN."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.attention import choices
from tests.oracles import selection as oracle

N, ROWS = 9, 60
F = np.float32


def rows(seed):
  """Scores with ties, candidates and forced entries, one row each."""
  rng = np.random.default_rng(seed)
  scores = rng.integers(0, 5, (ROWS, N)).astype(F) / 4
  candidates = rng.random((ROWS, N)) < 0.8
  candidates[0] = False
  forced = rng.random((ROWS, N)) < 0.2
  return scores, candidates, forced


def chosen(choose, scores, candidates, forced):
  """The oracle's choice as bool [ROWS, N]."""
  out = np.zeros(scores.shape, bool)
  for i in range(len(scores)):
    given = {j: float(scores[i, j]) for j in np.flatnonzero(candidates[i])}
    out[i, choose(given, np.flatnonzero(forced[i]), i)] = True
  return out


@functools.cache
def compiled(name, **static):
  return jax.jit(functools.partial(getattr(choices, name), **static))


@pytest.mark.parametrize("k", [0, 1, 3, N, N + 4])
def test_top_k(k):
  scores, candidates, forced = rows(k)
  want = chosen(lambda s, f, _: oracle.top(s, k, f), scores, candidates, forced)
  given = dict(candidates=candidates, forced=forced)
  np.testing.assert_array_equal(compiled("top_k", k=k)(scores, **given), want)
  lists = compiled("top_k_lists", k=k, most_forced=N)(scores, **given)
  found = np.zeros((ROWS, N + 1), bool)
  np.put_along_axis(found, np.asarray(lists), True, -1)
  np.testing.assert_array_equal(found[:, :N], want)
  assert ((np.asarray(lists) >= 0).sum(-1) == want.sum(-1)).all()


def test_budgets_of_rows():
  scores, candidates, forced = rows(1)
  k = np.arange(ROWS) % (N + 3)
  want = chosen(
    lambda s, f, i: oracle.top(s, k[i], f), scores, candidates, forced
  )
  got = compiled("top_k")(
    scores, k=k[:, None], candidates=candidates, forced=forced
  )
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("share", [-1.0, 0.0, 0.25, 0.5, 0.9375, 1.0, 2.0])
def test_top_mass(share):
  scores, candidates, forced = rows(3)
  scores /= 4  # powers of two, whose sums are exact
  want = chosen(
    lambda s, f, _: oracle.prefix(s, share, f), scores, candidates, forced
  )
  got = compiled("top_mass")(
    scores, share=share, candidates=candidates, forced=forced
  )
  np.testing.assert_array_equal(got, want)


def test_top_mass_of_heads():
  masses = np.random.default_rng(0).dirichlet(np.ones(8), (2, 3, 4)).astype(F)
  share = F([0.2, 0.7, 0.95])[:, None, None]
  got = np.asarray(compiled("top_mass")(masses, share=share))
  held = np.where(got, masses, 0).sum(-1)
  least = np.where(got, masses, np.inf).min(-1)
  assert (held >= share[..., 0] - 1e-6).all()
  assert (held - least < share[..., 0] + 1e-6).all()


def test_above():
  scores, candidates, forced = rows(4)
  threshold = np.linspace(-0.5, 1.5, ROWS, dtype=F)[:, None]
  got = compiled("above")(
    scores, threshold=threshold, candidates=candidates, forced=forced
  )
  want = candidates & ((scores > threshold) | forced)
  np.testing.assert_array_equal(got, want)


def test_order_of_unusual_numbers():
  inf, nan = np.inf, np.nan
  scores = F([nan, -inf, -0.0, 0.0, -1.0, inf, 3e38])
  forced = np.arange(7) == 4
  lists = choices.top_k_lists(jnp.array(scores), 7, forced=jnp.array(forced))
  assert lists.tolist() == [4, 5, 6, 2, 3, 0, 1]  # nan as the lowest number
  for k in range(1, 8):
    got = choices.top_k(jnp.array(scores), k, forced=jnp.array(forced))
    assert np.flatnonzero(got).tolist() == sorted(lists.tolist()[:k])


def test_choices_carry_no_gradient():
  scores = jnp.arange(8.0).reshape(2, 4)

  def loss(scores):
    kept = choices.top_k(scores, 2) & choices.above(scores, scores.mean())
    return jnp.where(kept & choices.top_mass(scores, 0.5), 1.0, 0).sum()

  assert not jax.jit(jax.grad(loss))(scores).any()


def test_per_group():
  scores = np.arange(24.0).reshape(2, 4, 3)
  split = scores.reshape(2, 2, 2, 3)
  for how in ("sum", "mean", "max"):
    want = getattr(split, how)(axis=2)
    got = choices.per_group(jnp.array(scores), 2, how)
    np.testing.assert_array_equal(got, want)
    assert got.dtype == jnp.float32


def test_near():
  for first, local in ((0, 1), (1, 2), (2, 0), (9, 9)):
    got = choices.near(jnp.arange(8), 6, first=first, local=local)
    for own in range(8):
      want = {j for j in range(6) if j <= own and j < first}
      want |= {j for j in range(6) if own - local < j <= own}
      assert set(np.flatnonzero(got[own])) == want


def test_nothing_to_choose_from():
  empty = jnp.zeros((3, 0))
  assert choices.top_k(empty, 2).shape == (3, 0)
  assert choices.top_mass(empty, 0.5).shape == (3, 0)
  assert choices.top_k_lists(empty, 2).shape == (3, 0)


@pytest.mark.parametrize(
  "function,message",
  [
    (lambda s: choices.top_k(s, -1), "k is -1"),
    (lambda s: choices.top_k(s, 1.0), "k is 1.0"),
    (lambda s: choices.top_k(s, jnp.ones((2, 2), int)), "k has shape"),
    (lambda s: choices.top_k_lists(s, jnp.array(1)), "k is"),
    (lambda s: choices.top_k(jnp.arange(3), 1), "scores is int32"),
    (lambda s: choices.top_k(s, 1, forced=jnp.ones(4, bool)), "forced is"),
    (lambda s: choices.above(s, 0, candidates=s), "candidates is float32"),
    (lambda s: choices.above(s, jnp.zeros(4)), "threshold has shape"),
    (lambda s: choices.top_mass(s, jnp.zeros(3)), "share has shape"),
    (lambda s: choices.per_group(s, 2), "group is 2"),
    (lambda s: choices.per_group(s, 1, "min"), "how is 'min'"),
  ],
)
def test_bad_input(function, message):
  with pytest.raises(ValueError, match=message):
    function(jnp.zeros((2, 3)))
