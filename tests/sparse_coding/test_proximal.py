"""Penalties: values, proximal operators and their gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import sparse_coding
from tests.kernels import problem
from tests.oracles import recovery as oracle

L1, L0, Lq = sparse_coding.L1, sparse_coding.L0, sparse_coding.Lq
CEL0, Group = sparse_coding.CEL0, sparse_coding.Group

# Ours, and the oracle's settings.
PENALTIES = {
  "l1": (L1, {}),
  "l0": (L0, {}),
  "lq": (functools.partial(Lq, q=0.4), dict(q=0.4)),
  "cel0": (functools.partial(CEL0, norm=1.3), dict(norm=1.3)),
  "group": (functools.partial(Group, size=2), dict(size=2)),
}
NAMES = list(PENALTIES)
MIXED = np.array([3.0, -1.2, 0.7, -0.9, 0.0, -4.0, 0.05, 1.6])

prox = problem.jit(lambda penalty, v, step: penalty.prox(v, step))
value = problem.jit(lambda penalty, z: penalty.value(z))


def both(name, weight, nonnegative=False):
  make, given = PENALTIES[name]
  want = oracle.penalty(name, weight, nonnegative=nonnegative, **given)
  return make(weight, nonnegative=nonnegative), want


@pytest.mark.parametrize(
  "nonnegative", [False, pytest.param(True, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", NAMES)
def test_prox_is_the_smallest_by_search(name, nonnegative):
  # Search finds minimizers to half of float64's digits.
  mine, want = both(name, 0.7, nonnegative)
  groups = MIXED.reshape(-1, 2)[:2] if name == "group" else MIXED[:3, None]
  step = 1.1 if nonnegative else 0.3
  with jax.enable_x64(True):
    got = prox(mine, jnp.array(groups.ravel()), step)
  found = [
    oracle.prox_by_search(want.value, v, step, nonnegative) for v in groups
  ]
  np.testing.assert_allclose(got, np.ravel(found), atol=1e-6)


@pytest.mark.parametrize("nonnegative", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_closed_forms(name, nonnegative):
  v = np.random.default_rng(0).normal(size=(30, 8)) * 3
  for weight, step in ((0.0, 1.0), (0.2, 0.5), (1.5, 0.4), (0.3, 5.0)):
    mine, want = both(name, weight, nonnegative)
    expected = np.array([want.prox(row, step) for row in v])
    with jax.enable_x64(True):
      got = prox(mine, jnp.array(v), step)
      cost = value(mine, got), value(mine, jnp.array(v))
    got = np.asarray(got)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)
    assert ((got == 0) == (expected == 0)).all()
    for z, c in zip((expected, v), cost, strict=True):
      costs = [want.value(row) for row in z]
      np.testing.assert_allclose(c, costs, rtol=1e-12, atol=1e-12)
    got = prox(mine, jnp.array(v, jnp.float32), step)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("q", [1e-3, 0.3, 0.5, 0.9, 0.999])
def test_lq_right_at_its_jump(q):
  threshold, jump = oracle.lq_threshold(0.6, q)
  v = threshold * (1 + np.array([-1e-9, 1e-9, 1e-3, 1e3]))
  with jax.enable_x64(True):
    got = np.asarray(prox(Lq(0.6, q), jnp.array(v), 1.0))
  np.testing.assert_allclose(got, oracle.lq(v, 0.6, q), rtol=1e-12)
  assert got[0] == 0 and got[1] >= jump
  if q == 0.5:
    np.testing.assert_allclose(got, oracle.half(v, 0.6), rtol=1e-12)


def test_limits():
  v = jnp.array(np.random.default_rng(1).normal(size=(20, 6)), jnp.float32)
  near = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
  same = np.testing.assert_array_equal
  near(prox(Lq(0.2, 1 - 1e-6), v, 1.0), prox(L1(0.2), v, 1.0))
  near(prox(Lq(0.2, 1e-6), v, 1.0), prox(L0(0.2), v, 1.0))
  same(prox(Group(0.2, 1), v, 1.0) != 0, prox(L1(0.2), v, 1.0) != 0)
  near(prox(Group(0.2, 1), v, 1.0), prox(L1(0.2), v, 1.0))
  for step in (1.0, 3.0):  # CEL0 is hard from step * norm**2 = 1 on
    same(prox(CEL0(0.2), v, step), prox(L0(0.2), v, step))
  assert (value(CEL0(0.2), v) < value(L0(0.2), v)).all()
  same(value(CEL0(0.2), 9 * jnp.sign(v)), value(L0(0.2), jnp.sign(v)))
  # Ties: what is worth as much as zero is zero.
  same(prox(L0(0.5), jnp.array([1.0, -1.0]), 1.0), [0, 0])
  same(prox(CEL0(0.5), jnp.array([1.0, -1.0]), 1.0), [0, 0])


@pytest.mark.parametrize("name", NAMES)
def test_gradients(name):
  # Away from jumps; central differences in float64.
  make, _ = PENALTIES[name]
  v = np.array([2.5, -3.0, 0.1, 0.05, -1.7, 2.2])
  scale = np.cos(np.arange(6.0))

  @problem.jit
  @functools.partial(jax.value_and_grad, argnums=(0, 1, 2))
  def loss(v, weight, step):
    return (make(weight).prox(v, step) * scale).sum()

  with jax.enable_x64(True):
    at = [v, np.array(0.3), np.array(0.5)]
    _, got = loss(*at)
    for i, x in enumerate(at):
      for j in np.ndindex(*x.shape):
        sides = []
        for move in (1e-6, -1e-6):
          moved = x.copy()
          moved[j] += move
          sides.append(loss(*at[:i], moved, *at[i + 1 :])[0])
        want = (sides[0] - sides[1]) / 2e-6
        np.testing.assert_allclose(got[i][j], want, atol=1e-8)
    _, (slope, *_) = loss(np.zeros(6), 1.0, 1.0)
    np.testing.assert_array_equal(slope, 0)


@pytest.mark.parametrize("name", NAMES)
def test_nan_and_dtypes(name):
  v = np.full((2, 4), 3.0)
  v[0, 1] = np.nan
  for nonnegative in (False, True):
    penalty, _ = both(name, 0.1, nonnegative)
    got = np.asarray(prox(penalty, jnp.array(v, jnp.float32), 1.0))
    assert np.isnan(got[0, 1])
    assert np.isfinite(got).sum() == (6 if name == "group" else 7)
    # To L0 it is an active latent like others.
    assert np.isnan(value(penalty, jnp.array(v[0]))) == (name != "l0")
  low = jnp.array(v[1], jnp.bfloat16)
  assert prox(penalty, low, 1.0).dtype == value(penalty, low).dtype == low.dtype


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_leaves(name):
  make, _ = PENALTIES[name]
  v = jnp.array(MIXED, jnp.float32)
  weights = jnp.array([0.1, 0.5, 2.0])
  got = problem.jit(jax.vmap(lambda w: make(w).prox(v, 1.0)))(weights)
  before = prox._cache_size()
  for w, row in zip(weights.tolist(), got, strict=True):
    np.testing.assert_allclose(prox(make(w), v, 1.0), row, rtol=1e-6)
  assert prox._cache_size() <= before + 1
  assert hash(make(0.5)) == hash(make(0.5)) and make(0.5) == make(0.5)
  # One of each latent, or of each group.
  of = jnp.arange(1.0, 9.0)[: 4 if name == "group" else 8]
  parts = v.reshape(len(of), -1)
  want = [prox(make(w), u, 1.0) for w, u in zip(of, parts, strict=True)]
  got = prox(make(of), v, 1.0)
  np.testing.assert_allclose(got, np.ravel(want), rtol=1e-6)


def test_norms_of_atoms():
  v = np.random.default_rng(3).normal(size=(9, 4))
  norms = np.array([0.0, 0.5, 1.0, 4.0])
  with jax.enable_x64(True):
    penalty = CEL0(0.2, jnp.array(norms))
    got, cost = prox(penalty, jnp.array(v), 0.3), value(penalty, jnp.array(v))
  np.testing.assert_allclose(got, oracle.cel0(v, 0.3, 0.2, norms), rtol=1e-12)
  want = oracle.cel0_value(v, 0.2, norms).sum(-1)
  np.testing.assert_allclose(cost, want, rtol=1e-12)


@pytest.mark.parametrize(
  "make,message",
  [
    (lambda: L1(-1), "weight must be at least 0, got -1"),
    (lambda: L0(float("nan")), "weight must be at least 0, got nan"),
    (lambda: CEL0(np.float32(-1)), "weight must be at least 0"),
    (lambda: CEL0(1.0, -1.0), "norm must be at least 0"),
    (lambda: Lq(1.0, 0), "q must be between 0 and 1, got 0"),
    (lambda: Lq(1.0, 1.0), "q must be between 0 and 1, got 1.0"),
    (lambda: Group(1.0, 0), "size must be a positive integer, got 0"),
    (lambda: Group(1.0, 2.0), "size must be a positive integer, got 2.0"),
    (lambda: Group(1.0, 3).prox(jnp.ones(4), 1), "size must divide the 4 lat"),
    (lambda: Group(1.0, 3).value(jnp.ones(4)), "size must divide the 4 lat"),
  ],
)
def test_bad_input(make, message):
  with pytest.raises(ValueError, match=message):
    make()
