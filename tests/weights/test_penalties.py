"""HyperSparse against its closed form, and what training with it does."""

import math
import re

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsejax import weights
from tests import common
from tests.oracles import methods_rest as oracle
from tests.weights import problem
from tests.weights.problem import SPARSE

SPARSITY = 0.7


def quantile(params, sparsity, names=SPARSE):
  sizes = np.concatenate([np.abs(params[n]).ravel() for n in names])
  return np.sort(sizes)[math.floor(sparsity * sizes.size)]


def closed_form(params, sparsity, names=SPARSE):
  """The gradient as the paper gives it, in f64."""
  arrays = [common.float64(params[n]) for n in names]
  slopes = oracle.hypersparse_gradient(arrays, sparsity)
  return dict(zip(names, slopes, strict=True))


def published(params, sparsity):
  """The penalty as it is written: its value is 0, its gradient is not."""
  w = jnp.concatenate([params[n].ravel() for n in SPARSE])
  size = jnp.abs(w)
  s = 0.6585 / lax.stop_gradient(
    jnp.sort(size)[math.floor(sparsity * size.size)]
  )
  bent = jnp.tanh(s * size).sum()
  return (size * bent).sum() / lax.stop_gradient(bent) - size.sum()


@pytest.mark.parametrize("sparsity", [0.02, 0.29, 0.7, 0.99])
def test_gradient_is_the_closed_form(sparsity):
  params = problem.start()
  slope = jax.grad(weights.hypersparse)(params, sparsity=sparsity)
  want = closed_form(params, sparsity)
  # 320 tanh are summed in f32 and the largest slope is that of w = 0.
  most = max(np.abs(want[n]).max() for n in SPARSE)
  for n in SPARSE:
    np.testing.assert_allclose(slope[n], want[n], 1e-5, 1e-6 * most)
  assert not slope["bias"].any()
  total = sum(np.abs(params[n]).sum() for n in SPARSE)
  value = weights.hypersparse(params, sparsity=sparsity)
  assert value.dtype == jnp.float32
  np.testing.assert_allclose(value, total, 1e-5)


def test_gradient_is_that_of_the_published_penalty():
  params = {n: problem.start()[n] for n in SPARSE}
  got = jax.grad(weights.hypersparse)(params, sparsity=SPARSITY)
  want = jax.grad(published)(params, SPARSITY)
  for n in SPARSE:
    np.testing.assert_allclose(got[n], want[n], 1e-4, 1e-6)


def test_it_is_steeper_below_the_quantile_than_above():
  params = problem.start()
  slope = jax.grad(weights.hypersparse)(params, sparsity=SPARSITY)
  at = quantile(params, SPARSITY)
  size = np.concatenate([np.abs(params[n]).ravel() for n in SPARSE])
  steep = np.concatenate([np.abs(slope[n]).ravel() for n in SPARSE])
  assert steep[size < at].min() > steep[size > at].max()
  order = np.argsort(size)
  assert (np.diff(steep[order]) <= 1e-6).all()
  signs = [np.sign(slope[n]) == np.sign(params[n]) for n in SPARSE]
  # Far above the quantile the slope may round to zero.
  assert all((s | (slope[n] == 0)).all() for s, n in zip(signs, SPARSE))


@pytest.mark.parametrize(
  ("kernel", "sparsity"),
  [
    (np.zeros((3, 4)), 0.5),
    (np.full((2, 2), 1e-38), 0.5),  # smaller than 1 / the largest f32
    (np.ones((2, 2)), 1.0),
    (np.zeros((0, 4)), 0.5),
  ],
)
def test_it_stays_finite(kernel, sparsity):
  params = {"kernel": jnp.asarray(kernel, jnp.float32)}
  value, slope = jax.value_and_grad(weights.hypersparse)(
    params, sparsity=sparsity
  )
  assert jnp.isfinite(value) and jnp.isfinite(slope["kernel"]).all()
  if sparsity < 1:
    assert jnp.abs(slope["kernel"]).max(initial=0) < 1e31


def test_it_does_nothing_where_enough_weights_are_zero():
  slope = jax.grad(weights.hypersparse)({"w": jnp.eye(4)}, sparsity=0.5)
  assert not slope["w"].any()


def test_where_and_dtypes():
  params = problem.start()
  slope = jax.grad(weights.hypersparse)(params, sparsity=0.5, where="^b$")
  assert not slope["a"].any()
  want = closed_form(params, 0.5, "b")
  np.testing.assert_allclose(slope["b"], want["b"], 1e-5, 1e-5)
  half = {n: jnp.asarray(p, jnp.bfloat16) for n, p in params.items()}
  slope = jax.grad(weights.hypersparse)(half, sparsity=0.5)
  assert slope["a"].dtype == jnp.bfloat16
  want = closed_form(
    {n: np.asarray(p, np.float32) for n, p in half.items()}, 0.5
  )
  np.testing.assert_allclose(slope["a"].astype(np.float32), want["a"], 2.0**-7)


def test_the_link_adds_the_gradient_times_the_strength():
  """As a penalty in the loss does, under SGD; a schedule sees the step."""
  strength = optax.linear_schedule(0.0, 0.02, 2)
  tx = optax.chain(
    weights.add_hypersparse(strength, sparsity=SPARSITY), optax.sgd(0.5)
  )
  params = problem.start()
  state = tx.init(params)

  @problem.jit
  def step(params, state):
    grads = jax.grad(problem.loss)(params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  for t in range(4):
    w = problem.f64(params)
    want = problem.oracle_gradient(w)
    for n, slope in closed_form(problem.copied(params), SPARSITY).items():
      want[n] = want[n] + min(t, 2) / 2 * 0.02 * slope
    params, state = step(params, state)
    for n in w:
      np.testing.assert_allclose(params[n], w[n] - 0.5 * want[n], 1e-4, 1e-5)


def test_the_link_keeps_dtypes_and_other_parameters():
  params = {n: jnp.asarray(p, jnp.bfloat16) for n, p in problem.start().items()}
  tx = weights.add_hypersparse(0.1, sparsity=0.5)
  updates, state = tx.update(params, tx.init(params), params)
  assert {u.dtype for u in updates.values()} == {jnp.dtype(jnp.bfloat16)}
  problem.assert_bits(updates["bias"], params["bias"])
  assert state.count == 1


def test_slopes_of_half_precision_weights_are_those_of_float32():
  """Steep ones too: s alone is beyond float16 here."""
  w = jnp.asarray([[6e-8, 6e-8, 1.0, 2.0]], jnp.float16)
  tx = weights.add_hypersparse(1e-3, sparsity=0.25)
  narrow, wide = {"kernel": w}, {"kernel": w.astype(jnp.float32)}
  zeros = jax.tree.map(jnp.zeros_like, wide)
  got, want = (tx.update(zeros, tx.init(p), p)[0] for p in (narrow, wide))
  assert np.isfinite(got["kernel"]).all()
  problem.assert_bits(got["kernel"], want["kernel"])


def test_the_strength_may_be_an_injected_hyperparameter():
  inject = optax.inject_hyperparams(
    weights.add_hypersparse, static_args=("sparsity",)
  )
  params = problem.start()
  zeros = jax.tree.map(jnp.zeros_like, params)
  for strength in (0.25, np.float32(0.25), lambda step: 0.25):
    plain = weights.add_hypersparse(strength, sparsity=SPARSITY)
    tx = inject(strength, sparsity=SPARSITY)
    got = problem.jit(lambda p, tx=tx: tx.update(zeros, tx.init(p), p)[0])
    want = problem.jit(lambda p, tx=plain: tx.update(zeros, tx.init(p), p)[0])
    problem.assert_bits(got(params)["a"], want(params)["a"])


@pytest.mark.parametrize("axis_type", common.AXIS_TYPES, ids=str)
def test_sharded(axis_type):
  """Nothing but scalars crosses devices, and gradients lie where weights do."""
  mesh, params = common.mesh_of(axis_type), problem.start()
  specs = {"a": jax.P("x", "y"), "b": jax.P("x", "y"), "bias": jax.P()}
  placed = {n: common.place(p, mesh, specs[n]) for n, p in params.items()}
  slope = jax.grad(lambda p: weights.hypersparse(p, sparsity=SPARSITY))
  with jax.set_mesh(mesh):
    compiled = problem.jit(slope).lower(placed).compile()
    got = compiled(placed)
  assert not common.moved(compiled) and common.reduced(compiled) == {1}
  for n, want in closed_form(params, SPARSITY).items():
    np.testing.assert_allclose(got[n], want, 1e-4, 1e-5)
    assert got[n].sharding.spec == specs[n]


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (
      lambda p: weights.hypersparse(p, sparsity=1.1),
      "sparsity must be in [0, 1]",
    ),
    (
      lambda p: weights.hypersparse({"bias": p["bias"]}, sparsity=0.5),
      "where must select at least one weight",
    ),
    (
      lambda p: weights.add_hypersparse(-1.0, sparsity=0.5),
      "strength must be a number of 0 or more",
    ),
    (
      lambda p: weights.add_hypersparse(1.0, sparsity=2),
      "sparsity must be in [0, 1]",
    ),
    (
      lambda p: weights.add_hypersparse(1.0, sparsity=0.5).update(p, (), None),
      "params must be given to update",
    ),
  ],
)
def test_bad_settings(call, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    call(problem.start())


@pytest.mark.slow
def test_the_stronger_the_less_pruning_changes():
  """And, where it is strong, less than after an L1 penalty as strong."""

  def l1(params, sparsity):
    del sparsity
    return sum(jnp.abs(params[n]).sum() for n in SPARSE)

  def trained(penalty, params, strength):
    def step(_, params):
      total = lambda p: problem.loss(p) + strength * penalty(p, sparsity=0.5)
      grads = jax.grad(total)(params)
      return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

    params = lax.fori_loop(0, 400, step, params)
    sizes = jnp.concatenate([jnp.abs(params[n]).ravel() for n in SPARSE])
    at = jnp.sort(sizes)[math.floor(0.5 * sizes.size)]
    pruned = params | {
      n: jnp.where(jnp.abs(params[n]) >= at, params[n], 0) for n in SPARSE
    }
    return problem.loss(pruned) - problem.loss(params)

  strengths = jnp.asarray([0.0, 0.003, 0.01, 0.03])
  starts = jax.tree.map(
    lambda x: jnp.stack(
      [0.5 * problem.numbers(*x.shape, seed=s) for s in range(6)]
    ),
    problem.start(),
  )
  change = {}
  for name, penalty in dict(hypersparse=weights.hypersparse, l1=l1).items():
    one = lambda p, s, penalty=penalty: trained(penalty, p, s)
    each = jax.vmap(jax.vmap(one, (None, 0)), (0, None))
    change[name] = np.asarray(jax.jit(each)(starts, strengths))
  mean = change["hypersparse"].mean(0)
  assert (np.diff(mean) < 0).all(), mean
  less = (change["l1"] - change["hypersparse"])[:, -1]
  assert (less > 0).all(), less
