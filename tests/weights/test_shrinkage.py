"""ISS-P against its definition and its two limits, and the weights it keeps."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from sparsejax import weights
from sparsejax.select import structures
from tests.oracles import methods_rest as oracle
from tests.weights import problem
from tests.weights.problem import LR
from tests.weights.problem import SPARSE

STEPS, UNTIL = 14, 9
KEPT = {"a": 6, "b": 10}  # 5% of 128 and of 192, rounded


def make(factor, inner=None, **settings):
  settings = dict(sparsity=0.95, until=UNTIL, factor=factor) | settings
  return weights.iss_p(inner or optax.sgd(LR), **settings)


@functools.cache
def run(factor, **settings):
  tx = make(factor, optax.adam(0.02), **settings)
  return problem.Run(tx, STEPS, enforced=False)


def largest(x):
  """The mask of the 5% that are not shrunk."""
  return oracle.iss_p_mask(np.asarray(x), 0.95)


@pytest.mark.parametrize("every", [1, 3])
def test_training_follows_the_definition(every):
  factor = 0.5
  got = problem.Run(make(factor, every=every), STEPS, enforced=False)
  w = problem.f64(got.params[0])
  mask = {n: largest(w[n]) for n in SPARSE}
  for t in range(1, STEPS + 1):
    grads = problem.oracle_gradient(w)
    for n in SPARSE:
      if t > UNTIL:
        w[n] = np.where(mask[n], w[n] - LR * grads[n], 0)
      elif t % every:
        w[n] = w[n] - LR * grads[n]
      else:
        left = factor if t < UNTIL else 0.0
        w[n], mask[n] = oracle.iss_p_step(w[n], -LR * grads[n], 0.95, left)
      np.testing.assert_array_equal(got.masks[t][n], mask[n])
    w["bias"] = w["bias"] - LR * grads["bias"]
    for n in w:
      # Weights of order 1, of which each step rounds a few: in test_methods.
      np.testing.assert_allclose(got.params[t][n], w[n], 0, 40 * 32 * 2.0**-24)


def test_a_run_of_given_updates():
  """The oracle counts steps from 0, so that its last ranking is `until - 1`."""
  w = problem.numbers(6, 5)
  updates = [0.3 * problem.numbers(6, 5, seed=t) for t in range(1, 8)]
  want, masks = oracle.iss_p_run(w, updates, 0.7, 0.8, 4)
  tx = weights.iss_p(optax.identity(), sparsity=0.7, until=5, factor=0.8)
  params = {"w": jnp.asarray(w)}
  state, update = tx.init(params), problem.jit(tx.update)
  for t, given in enumerate(updates):
    ups, state = update({"w": given}, state, params)
    params = optax.apply_updates(params, ups)
    np.testing.assert_allclose(params["w"], want[t], 1e-5, 1e-6)
    np.testing.assert_array_equal(weights.masks(state, params)["w"], masks[t])


def test_factor_0_is_iterative_hard_thresholding():
  """To the bit: an optimizer's step, then all but the largest are +0.0."""
  got = run(0.0)
  tx = optax.adam(0.02)

  @problem.jit
  def step(params, state, old, fixed):
    grads = jax.grad(problem.loss)(params)
    train = {n: jnp.where(fixed & ~old[n], 0, grads[n]) for n in SPARSE}
    updates, state = tx.update(grads | train, state, params)
    return optax.apply_updates(params, updates), state

  params = problem.start()
  state, masks = tx.init(params), got.masks[0]
  for t in range(STEPS):
    params, state = step(params, state, masks, t >= UNTIL)
    if t < UNTIL:
      masks = {n: largest(params[n]) for n in SPARSE}
    for n in SPARSE:
      params[n] = np.where(masks[n], params[n], np.float32(0))
      np.testing.assert_array_equal(got.masks[t + 1][n], masks[n])
    problem.assert_bits(got.params[t + 1], problem.copied(params))


def test_factor_1_is_dense_training_then_one_pruning():
  got, tx = run(1.0), optax.adam(0.02)

  @problem.jit
  def step(params, state):
    grads = jax.grad(problem.loss)(params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  params = problem.start()
  state = tx.init(params)
  for t in range(1, UNTIL + 1):
    params, state = step(params, state)
    if t == UNTIL:
      for n in SPARSE:
        mask = largest(params[n])
        params[n] = np.where(mask, params[n], np.float32(0))
    problem.assert_bits(got.params[t], problem.copied(params))


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0])
def test_masked_weights_are_zero_from_until_on(factor):
  got = run(factor)
  for t in range(STEPS + 1):
    for n in SPARSE:
      assert got.masks[t][n].sum() == KEPT[n]
    if t < UNTIL:  # the forward pass sees all there is
      problem.assert_bits(got.seen[t], got.params[t])
  for t in range(UNTIL, STEPS + 1):
    problem.assert_zeros(got.params[t], got.masks[t])
    problem.assert_bits(got.seen[t], got.params[t])
    problem.assert_bits(got.masks[t], got.masks[UNTIL])
  moved = got.params[STEPS]["a"] != got.params[UNTIL]["a"]
  np.testing.assert_array_equal(moved, got.masks[UNTIL]["a"])  # fine-tuned


def reentries(factor):
  """How often a weight came back into the kept set, from eight starts."""
  tx = make(factor, sparsity=0.8, until=60)
  step = problem.step_of(tx)

  def of(params):
    state = tx.init(params)

    def one(now, _):
      params, state, _, masks = step(*now[:2])
      back = sum((masks[n] & ~now[2][n]).sum() for n in SPARSE)
      return (params, state, masks), back

    now = params, state, weights.masks(state, params)
    return jax.lax.scan(one, now, length=60)[1].sum()

  starts = jax.tree.map(
    lambda x: jnp.stack([problem.numbers(*x.shape, seed=s) for s in range(8)]),
    problem.start(),
  )
  return problem.jit(jax.vmap(of))(starts)


def test_more_weights_come_back_than_under_hard_thresholding():
  soft, hard = reentries(0.95), reentries(0.0)
  assert (soft > hard).all() and soft.sum() > 1.5 * hard.sum(), (soft, hard)


def test_bfloat16_weights_shrink_by_the_factor():
  """From a difference of rounded numbers: within two roundings of bf16."""
  params = {"w": jnp.asarray(problem.numbers(8, 16), jnp.bfloat16)}
  tx = weights.iss_p(optax.sgd(0.0), sparsity=0.5, until=4, factor=0.75)
  state = tx.init(params)
  updates, state = tx.update(params, state, params)
  after = optax.apply_updates(params, updates)["w"]
  assert after.dtype == jnp.bfloat16
  w, mask = params["w"].astype(np.float32), weights.masks(state, params)["w"]
  want = np.where(mask, w, 0.75 * w)
  np.testing.assert_allclose(after.astype(np.float32), want, 2.0**-7)


def test_other_structures_and_tracking():
  tx = make(
    0.5,
    sparsity=0.75,
    structure=structures.Block((4, 4)),
    where="^a$",
    track_explored=True,
  )
  got = problem.Run(tx, UNTIL + 1, enforced=False)
  assert got.masks[-1]["b"].all()
  blocks = got.masks[-1]["a"].reshape(4, 4, 2, 4)
  np.testing.assert_array_equal(blocks.all((1, 3)), blocks.any((1, 3)))
  state, params = got.states[-1], got.params[-1]
  report = weights.summary(state, params)
  assert report.total.nonzero == 32 + 8 * 24 + 24
  assert "a" in str(report)
  explored = problem.unpacked(state.explored, params)["a"]
  assert all((explored | ~m).all() for m in got.sparse("a"))


def test_a_run_goes_on_from_a_checkpoint(tmp_path):
  got = run(0.5)
  at = UNTIL - 2
  saved = {"params": got.params[at], "state": got.states[at]}
  with ocp.StandardCheckpointer() as saver:
    saver.save(tmp_path / "saved", saved)
    saver.wait_until_finished()
    saved = saver.restore(tmp_path / "saved", saved)
  params, state = saved["params"], saved["state"]
  for _ in range(at, STEPS):
    params, state, *_ = got.step(params, state)
  problem.assert_bits(problem.copied(params), got.params[-1])
  problem.assert_bits(problem.copied(state), got.states[-1])


def test_sparsity_by_path_and_n_of_m():
  """As every other method takes them, so also `weights.sparsities(masks)`."""
  params = problem.start()
  for settings, counts in (
    (dict(sparsity={"^a$": 0.75}), {"a": 32, "b": 192}),
    (dict(sparsity=None, structure=structures.NM(2, 4)), {"a": 64, "b": 96}),
  ):
    masks = weights.masks(make(0.5, **settings).init(params), params)
    assert {n: int(masks[n].sum()) for n in SPARSE} == counts


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    (dict(factor=1.5), "factor must be in [0, 1]"),
    (dict(sparsity=-1), "sparsity must be in [0, 1]"),
    (dict(until=0), "until must be a multiple of every=1 above 0, got 0"),
    (dict(until=7, every=2), "until must be a multiple of every=2"),
    (dict(until=2.5), "until must be an integer"),
    (dict(every=0), "every must be at least 1"),
  ],
)
def test_bad_settings(settings, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    make(**dict(factor=0.5) | settings)


def test_shrinking_needs_weights_that_are_kept():
  with pytest.raises(ValueError, match="shrink must come with dense=True"):
    weights.Rule(sparsity=0.5, shrink=lambda step: 0.5)
