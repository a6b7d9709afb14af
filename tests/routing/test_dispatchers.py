"""Dispatchers against a loop over edges: outputs, gradients, drops."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import routing
from tests import common
from tests.oracles import routing as oracle
from tests.routing import problem

SIZE = 3  # of which some experts get more and some fewer
PRIORITIES = ("position", "weight", "random")
ROUTERS = (
  "switch",
  "Mixtral",
  "all, renormalized",
  "DeepSeek-V3",
  "allowed",
  "forced by token",
  "top p",
  "EvoMoE, two",
  "BlockFFN, two",
  "expert choice",
  "by id",
)
# Shapes of edges that are rarer than two a token: one bank of each.
BANK_OF = {
  "1": "GELU",
  "all": "plain",
  "choice": "SwiGLU",
  "one expert": "SwiGLU",
}


@functools.cache
def layer(dispatch, edges, experts):
  """Of all banks for a shape of edges; one program is cheaper than many."""
  del experts
  options = {"size": SIZE} if dispatch == "capacity" else {}
  run = functools.partial(getattr(routing, dispatch), **options)
  banks = [BANK_OF[edges]] if edges in BANK_OF else problem.UNBIASED
  layers = {bank: problem.layer(run, bank) for bank in banks}

  def f(x, found, params, cotangent):
    return {
      bank: layers[bank](x, found, params[bank], cotangent) for bank in banks
    }

  return problem.jit(f), banks


@functools.cache
def limited(priority, size):
  def f(found, uniform):
    given = {"uniform": uniform} if priority == "random" else {}
    return routing.limit(found, size, priority=priority, **given)

  return problem.jit(f)


def check(routed, edges, priority, turn=0):
  """One assignment through every dispatcher, with a limit or without."""
  found = problem.found_of(routed, edges)
  x = problem.tokens_of(routed.metrics["counted"], routed)
  uniform = problem.uniform(11, len(x))
  kept, dispatchers = routed.valid, ["dropless"]
  if priority is not None:
    dispatchers += ["capacity"] if edges != "all" else []
    kept = oracle.keep(routed, SIZE, priority, uniform)
    found, dropped = limited(priority, SIZE)(found, uniform)
    found = jax.tree.map(
      np.asarray, found
    )  # as without a limit: no new program
    np.testing.assert_array_equal(found.valid, kept)
    problem.close(dropped, oracle.dropped(routed, kept))
    assert not np.asarray(found.weight)[~kept].any()
  experts = routed.num_experts
  params = {name: problem.parameters(name, experts) for name in problem.BANKS}
  cotangent = problem.normal(5, *x.shape)
  want = {}
  for dispatch in dispatchers:
    run, banks = layer(dispatch, edges, experts)
    got = run(x, found, params, cotangent)
    bank = banks[turn % len(banks)]
    want = want or problem.layer_of(
      x, routed, bank, params[bank], cotangent, kept
    )
    problem.same_layer(got[bank], want)
    assert run._cache_size() == 1


@pytest.mark.parametrize("name", ROUTERS)
def test_routers_dispatchers_and_banks(name):
  """Every router with every priority, every bank with every dispatcher."""
  router = problem.ROUTERS[name]
  given, valid = router.draw(1)
  routed = router.oracle(given, valid, None)
  for turn, priority in enumerate((None, *PRIORITIES)):
    check(routed, router.edges, priority, turn + ROUTERS.index(name))


@pytest.mark.parametrize("load", ["all to one", "one token", "nowhere"])
def test_extreme_loads(load):
  ids = {
    "all to one": np.full(problem.TOKENS, 4),
    "one token": np.where(np.arange(problem.TOKENS) == 7, 5, -1),
    "nowhere": np.full(problem.TOKENS, -1),
  }[load]
  routed = oracle.by_modality(ids, problem.EXPERTS)
  check(routed, "1", None)
  check(routed, "1", "weight")


def test_one_expert_of_some_tokens():
  """Mixture of depths."""
  router = problem.ROUTERS["depths"]
  given, valid = router.draw(2)
  routed = router.oracle(given, valid, None)
  check(routed, "one expert", None)


def test_gradients_of_the_logits_through_a_limit():
  """From the loss to logits, the bias, tokens and parameters, at once."""
  router = problem.ROUTERS["DeepSeek-V3"]
  given, valid = router.draw(0)
  bank = "SwiGLU"
  params = problem.parameters(bank)
  x = problem.tokens_of(valid, router.oracle(given, valid, None))

  @problem.jit
  def loss(given, x, params):
    def f(given, x, params):
      found = router.route(given, valid)
      kept, _ = routing.limit(found, SIZE, priority="weight")
      y = routing.dropless(x, kept, problem.BANKS[bank][1], params)
      return (y**2).sum(), y

    grads, y = jax.grad(f, (0, 1, 2), has_aux=True)(given, x, params)
    return y, grads

  y, (of_given, of_x, of_params) = loss(given, x, params)
  clean = np.where(np.isnan(x), 0, x)
  want_y, want = oracle.layer_gradients(
    lambda arrays, like: router.oracle(
      {"logits": arrays["logits"], "bias": given["bias"]}, valid, like
    ),
    lambda arrays, routed, kept: oracle.dispatch(
      arrays["x"], routed, problem.BANKS[bank][2], arrays, kept
    ),
    dict(logits=given["logits"], x=clean, **params),
    capacity=SIZE,
    priority="weight",
  )
  problem.close(y, want_y)
  got = dict(logits=of_given["logits"], x=of_x, **of_params)
  for name in want:
    scale = np.abs(want[name]).max()
    problem.close(got[name] / scale, want[name] / scale, atol=2e-5)
  # Of all the edges, before any was dropped.
  error = oracle.load_error(router.oracle(given, valid, None))
  problem.close(of_given["bias"], error)


def test_beyond_a_buffer_edges_count_for_nothing():
  """Without a limit, in the order of the list."""
  routed = oracle.by_modality(np.zeros(problem.TOKENS, int), problem.EXPERTS)
  run, (bank,) = layer("capacity", "1", problem.EXPERTS)
  x = problem.normal(0, problem.TOKENS, problem.WIDTH)
  params = {bank: problem.parameters(bank)}
  y, _ = run(x, problem.found_of(routed, "1"), params, x)[bank]
  assert np.asarray(y)[:SIZE].any(-1).all() and not y[SIZE:].any()


@pytest.mark.parametrize("priority", PRIORITIES)
def test_limits_of_a_limit(priority):
  """One so large drops nothing; of equal priority the earlier token stays."""
  routed = oracle.by_modality(np.zeros(problem.TOKENS, int), problem.EXPERTS)
  found = problem.found_of(routed, "1")
  uniform = np.zeros(problem.TOKENS, np.float32)
  kept, dropped = limited(priority, problem.TOKENS)(found, uniform)
  assert kept.valid.all() and dropped == 0
  kept, _ = limited(priority, SIZE)(found, uniform)
  assert np.flatnonzero(kept.valid).tolist() == list(range(SIZE))


def test_weights_below_zero_have_an_order():
  """BlockFFN's gain may be negative: largest is then what is closest to 0."""
  routed = oracle.by_modality(np.zeros(problem.TOKENS, int), problem.EXPERTS)
  routed.weight[:] = -1 - np.arange(problem.TOKENS)[::-1]
  kept, _ = limited("weight", SIZE)(problem.found_of(routed, "1"), 0)
  want = oracle.keep(routed, SIZE, "weight")
  np.testing.assert_array_equal(kept.valid, want)
  assert np.flatnonzero(want).tolist() == [8, 9, 10]


def test_vmap():
  router = problem.ROUTERS["Mixtral"]
  routed = [router.oracle(*router.draw(seed), None) for seed in range(3)]
  found = [problem.found_of(x, "2") for x in routed]
  many = jax.tree.map(lambda *x: np.stack(x), *found)
  x = problem.normal(0, 3, problem.TOKENS, problem.WIDTH)
  params = problem.parameters("SwiGLU")

  def one(x, found):
    kept, dropped = routing.limit(found, SIZE, priority="weight")
    bank = problem.BANKS["SwiGLU"][1]
    return routing.dropless(x, kept, bank, params), dropped

  y, dropped = problem.jit(jax.vmap(one))(x, many)
  for i in range(3):
    kept = oracle.keep(routed[i], SIZE, "weight")
    run = problem.BANKS["SwiGLU"][2]
    problem.close(y[i], oracle.dispatch(x[i], routed[i], run, params, kept))
    problem.close(dropped[i], oracle.dropped(routed[i], kept))


def test_bfloat16_is_summed_in_float32():
  """A token's many small outputs do not vanish in their sum."""
  experts = 512
  bank = lambda params, rows, sizes: rows

  @problem.jit
  def f(logits, x):
    found = routing.top_k(logits, experts, scores="sigmoid")
    return (
      routing.dropless(x, found, bank, None),
      routing.capacity(x, found, bank, None, size=1),
    )

  for y in f(np.zeros((1, experts)), jnp.ones((1, 2), jnp.bfloat16)):
    assert y.dtype == jnp.bfloat16
    assert y.tolist() == [[experts / 2] * 2]


AUTO, EXPLICIT = common.AXIS_TYPES


@pytest.mark.parametrize(
  "axis_type, bank",
  [
    (EXPLICIT, "SwiGLU"),
    pytest.param(EXPLICIT, "plain", marks=pytest.mark.slow),
    pytest.param(EXPLICIT, "biased", marks=pytest.mark.slow),
    (AUTO, "plain"),
    pytest.param(AUTO, "SwiGLU", marks=pytest.mark.slow),
  ],
)
def test_eight_devices(axis_type, bank):
  router = problem.ROUTERS["DeepSeek-V3"]
  given, valid = router.draw(0, tokens=16)
  routed = router.oracle(given, valid, None)
  kept = oracle.keep(routed, SIZE, "weight")
  x = problem.tokens_of(valid, routed)
  params, cotangent = problem.parameters(bank), problem.normal(1, *x.shape)

  def both(x, found, bank, params):
    found, _ = routing.limit(found, SIZE, priority="weight")
    y = routing.dropless(x, found, bank, params)
    # As much again, from buffers.
    z = routing.capacity(x, found, bank, params, size=SIZE)
    return (y + z) / 2

  mesh = common.mesh_of(axis_type)
  put = lambda x: common.place(
    x, mesh, jax.P(("x", "y")) if np.ndim(x) else jax.P()
  )
  with jax.set_mesh(mesh):
    got = problem.jit(problem.layer(both, bank))(
      put(x),
      jax.tree.map(put, problem.found_of(routed, "2")),
      jax.tree.map(lambda x: common.place(x, mesh, jax.P()), params),
      put(cotangent),
    )
  rows = jax.NamedSharding(mesh, jax.P(("x", "y")))
  if axis_type == EXPLICIT:
    assert got[0].sharding.is_equivalent_to(rows, 2)
    assert got[1]["x"].sharding.is_equivalent_to(rows, 2)
  want = problem.layer_of(x, routed, bank, params, cotangent, kept)
  problem.same_layer(got, want)


def test_capacity_of():
  for edges, experts, factor in itertools.product(
    (1, 7, 100, 8192), (1, 3, 8, 64), (0.1, 0.7, 1.0, 1.1, 1.25, 2.3, 3)
  ):
    want = oracle.capacity_of(edges, experts, factor)
    assert routing.capacity_of(edges, experts, factor) == max(1, want)


X = np.ones((4, 2), np.float32)
FOUND = problem.found_of(oracle.by_modality(np.zeros(4, int), 2), "1")
SAME = lambda params, rows, sizes: rows


@pytest.mark.parametrize(
  "argument, call",
  [
    ("x", lambda: routing.dropless(X[:3], FOUND, SAME, None)),
    ("x", lambda: routing.dropless(X[None], FOUND, SAME, None)),
    ("x", lambda: routing.capacity(X[:3], FOUND, SAME, None, size=1)),
    ("size", lambda: routing.capacity(X, FOUND, SAME, None, size=0)),
    ("size", lambda: routing.limit(FOUND, 0)),
    ("priority", lambda: routing.limit(FOUND, 1, priority="first")),
    ("uniform", lambda: routing.limit(FOUND, 1, priority="random")),
    ("uniform", lambda: routing.limit(FOUND, 1, uniform=X[:, 0])),
    (
      "uniform",
      lambda: routing.limit(FOUND, 1, priority="random", uniform=X[0]),
    ),
    ("num_experts", lambda: routing.capacity_of(4, 0, 1.0)),
    ("num_experts and factor", lambda: routing.capacity_of(4, 2, 0.0)),
    ("num_experts and factor", lambda: routing.capacity_of(4, 2, np.nan)),
  ],
)
def test_errors_name_the_argument(argument, call):
  with pytest.raises(ValueError, match=rf"^{argument}\b.*got"):
    call()
