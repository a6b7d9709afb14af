"""Pruning in rounds, tickets and soups: exact counts, resets and zeros."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.procedures import under_masks
from tests.oracles import methods_rest as oracle

SHAPES = {"a": {"kernel": (5, 7), "bias": (7,)}, "b": {"kernel": (7, 3)}}
STEPS, ROWS = 6, 4


@functools.cache
def params(seed=0):
  keys = iter(jax.random.split(jax.random.key(seed), 3))
  draw = lambda shape: jax.random.normal(next(keys), shape)
  return jax.tree.map(draw, SHAPES, is_leaf=lambda x: type(x) is tuple)


@functools.cache
def data():
  x = np.random.default_rng(0).normal(size=(11, 5)).astype(np.float32)
  return {"x": x, "y": x[:, :3] - x[:, 2:]}


def loss(params, batch):
  hidden = jnp.tanh(batch["x"] @ params["a"]["kernel"] + params["a"]["bias"])
  return jnp.mean((hidden @ params["b"]["kernel"] - batch["y"]) ** 2)


def optimizer(learning_rate, weight_decay=0.0):
  return optax.chain(
    optax.add_decayed_weights(weight_decay),
    optax.trace(0.9),
    optax.scale_by_learning_rate(learning_rate),
  )


compiled = under_masks.trainer(loss, optimizer)


def order(seed=0, steps=STEPS):
  return np.random.default_rng(seed).integers(0, 11, (steps, ROWS))


def train(params, masks, begin=0, end=None):
  rows = order()[begin:end]
  return compiled(params, masks, data(), rows, learning_rate=0.1)[0]


def flat(tree):
  return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def host(tree):
  return jax.tree.map(np.asarray, tree)


def random_masks(seed=1):
  keys = iter(jax.random.split(jax.random.key(seed), 3))
  draw = lambda p: jax.random.bernoulli(next(keys), 0.4, p.shape)
  return jax.tree.map(draw, params()) | {
    "a": {
      "kernel": jax.random.bernoulli(jax.random.key(seed), 0.4, (5, 7)),
      "bias": jnp.ones(7, bool),
    }
  }


def test_training_under_masks_is_sgd_on_masked_gradients():
  masks, rows = random_masks(), order()
  got, losses = compiled(
    params(), masks, data(), rows, learning_rate=0.1, weight_decay=0.01
  )
  w = under_masks.masked(params(), masks)
  momentum = jax.tree.map(np.zeros_like, w)
  grad = jax.jit(jax.value_and_grad(loss))
  for i, row in enumerate(rows):
    value, g = grad(w, jax.tree.map(lambda x, r=row: x[r], data()))
    # Sums in another order than those of the compiled loop: some ulps.
    np.testing.assert_allclose(losses[i], value, rtol=1e-5)
    momentum = jax.tree.map(
      lambda v, g, p: 0.9 * v + g + 0.01 * p, momentum, g, w
    )
    w = under_masks.masked(
      jax.tree.map(lambda p, v: p - 0.1 * v, w, momentum), masks
    )
  np.testing.assert_allclose(flat(got), flat(w), rtol=1e-4, atol=1e-6)
  zeros = flat(got)[~flat(masks)]
  assert len(zeros) and (zeros == 0).all() and not np.signbit(zeros).any()


def test_masks_settings_and_seeds_compile_once():
  run = under_masks.trainer(loss, optimizer)
  for seed, rate in ((1, 0.1), (2, 0.2), (3, 0.05)):
    run(
      params(seed), random_masks(seed), data(), order(seed), learning_rate=rate
    )
  assert run._cache_size() == 1


@pytest.mark.parametrize("fraction", [0.5, 0.9, 1.0, 0.0])
def test_pruning_takes_the_smallest_that_are_left(fraction):
  masks = under_masks.prune(params(), under_masks.dense_masks(params()), 0.4)
  got = under_masks.prune(params(), masks, fraction)
  for name in ("a", "b"):
    w, m = params()[name]["kernel"], masks[name]["kernel"]
    wanted = oracle.imp_prune(np.asarray(w), np.asarray(m), fraction)
    np.testing.assert_array_equal(got[name]["kernel"], wanted)
  both = under_masks.prune(params(), masks, fraction, scope="global")
  # All together are one layer, the kernels one behind the other.
  of = lambda t: np.concatenate([np.ravel(t[n]["kernel"]) for n in ("a", "b")])
  wanted = oracle.imp_prune(of(params()), of(masks), fraction)
  np.testing.assert_array_equal(of(both), wanted)
  assert got["a"]["bias"].all() and both["a"]["bias"].all()


def test_equal_magnitudes_keep_the_first():
  tree = {"w": jnp.array([[1.0, -2.0, 2.0], [2.0, 1.0, -1.0]])}
  masks = under_masks.prune(tree, under_masks.dense_masks(tree), 2 / 3)
  assert masks["w"].tolist() == [[False, True, True], [False] * 3]


@pytest.mark.parametrize("scope", under_masks.SCOPES)
@pytest.mark.parametrize("rewind", [0, 2])
def test_rounds_have_their_density_and_go_back_exactly(scope, rewind):
  fraction, number = 0.3, 4
  rounds = list(
    under_masks.imp(
      train,
      params(),
      fraction=fraction,
      rounds=number,
      scope=scope,
      rewind=rewind,
    )
  )
  dense = under_masks.dense_masks(params())
  start = train(params(), dense, 0, rewind) if rewind else params()
  equal(rounds[0].masks, dense)
  equal(rounds[0].ticket, start)
  slack = oracle.imp_count_slack(fraction, number)
  for n, (last, this) in enumerate(itertools.pairwise(rounds), 1):
    layers = 1 if scope == "global" else 2
    left = (1 - fraction) ** n
    assert abs(this.density - left) * 56 <= slack * layers
    assert not (flat(this.masks) & ~flat(last.masks)).any()
    kept = flat(this.masks)
    equal(
      this.ticket, jax.tree.map(oracle.rewind, host(start), host(this.masks))
    )
    assert (flat(this.ticket)[~kept] == 0).all()
    equal(this.trained, train(this.ticket, this.masks, rewind, None))
    assert (flat(this.trained)[~kept] == 0).all()
  if scope == "layer":
    for name, size in (("a", 35), ("b", 21)):
      trained = [np.asarray(r.trained[name]["kernel"]) for r in rounds[:-1]]
      masks = [r.masks[name]["kernel"] for r in rounds[1:]]
      equal(masks, oracle.imp_run(trained, fraction))
      counts = oracle.imp_counts(size, fraction, number)
      assert [int(m.sum()) for m in masks] == counts


def test_shuffled_masks_keep_as_many_in_each_layer():
  masks = under_masks.prune(params(), under_masks.dense_masks(params()), 0.7)
  found = [under_masks.shuffled(jax.random.key(s), masks) for s in range(2)]
  for other in found:
    equal(
      jax.tree.map(lambda m: m.sum(), other),
      jax.tree.map(lambda m: m.sum(), masks),
    )
    assert (flat(other) != flat(masks)).any()
  assert (flat(found[0]) != flat(found[1])).any()
  equal(found[0], under_masks.shuffled(jax.random.key(0), masks))
  assert under_masks.density(masks) == pytest.approx(
    (10 + 6) / 56
  )  # 24.5 of 35, 14.7 of 21 go


def test_a_soup_has_the_zeros_of_its_mask_and_the_mean_of_its_members():
  def member(params, masks, phase, copy):
    rows = order(10 * phase + copy)
    decay = (0.0, 0.1, 0.01)[copy]
    return compiled(
      params, masks, data(), rows, learning_rate=0.1, weight_decay=decay
    )[0]

  phases = list(
    under_masks.soups(member, params(), fractions=(0.5, 0.6), copies=3)
  )
  before, masks = params(), under_masks.dense_masks(params())
  for number, (phase, fraction) in enumerate(zip(phases, (0.5, 0.6))):
    masks = under_masks.prune(before, masks, fraction, scope="global")
    equal(phase.masks, masks)
    start = under_masks.masked(before, masks)
    for copy, found in enumerate(phase.members):
      equal(found, member(start, masks, number, copy))
    mean = oracle.soup([flat(m) for m in phase.members])
    # Sums of three in single precision.
    np.testing.assert_allclose(flat(phase.params), mean, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(flat(phase.params) != 0, flat(masks))
    assert phase.density == (28 - 17 * number) / 56  # 28 go, then 16.8
    before = phase.params


def test_a_soup_of_one_is_its_member():
  member = lambda params, masks, phase, copy: train(params, masks)
  (phase,) = under_masks.soups(member, params(), fractions=(0.6,), copies=1)
  equal(phase.params, phase.members[0])


def test_averages_keep_the_dtype():
  tree = {"w": jnp.array([1, 2], jnp.bfloat16)}
  found = under_masks.average([tree, {"w": jnp.array([2, 4], jnp.bfloat16)}])
  assert found["w"].dtype == jnp.bfloat16 and found["w"].tolist() == [1.5, 3]


def test_what_makes_no_sense_is_refused():
  dense = under_masks.dense_masks(params())
  with pytest.raises(ValueError, match=r"fraction must be in \[0, 1\], got 2"):
    under_masks.prune(params(), dense, 2)
  with pytest.raises(ValueError, match=r"scope must be one of .*'row'"):
    under_masks.prune(params(), dense, 0.5, scope="row")
  for given, name in (
    ({"fraction": 1.0}, "fraction must be between 0 and 1, got 1.0"),
    ({"fraction": 0.2, "rewind": -1}, "rewind must be 0 or more, got -1"),
  ):
    with pytest.raises(ValueError, match=name):
      next(under_masks.imp(train, params(), rounds=1, **given))
  with pytest.raises(ValueError, match="copies must be 1 or more, got 0"):
    next(under_masks.soups(train, params(), fractions=(0.5,), copies=0))
