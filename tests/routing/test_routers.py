"""Each router against the oracle: edges, weights, gradients, refusals."""

import fractions
import functools
import math

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import routing
from tests import common
from tests.oracles import routing as oracle
from tests.routing import problem

ROUTERS = problem.ROUTERS


def one(name, given, valid, cotangent):
  """An assignment, and gradients by name."""

  def weight(given):
    found = ROUTERS[name].route(given, valid)
    return found.weight, found

  _, pull, found = jax.vjp(weight, given, has_aux=True)
  return found, pull(cotangent)[0]


@functools.cache
def compiled(edges):
  """All routers of a kind at once: one program is cheaper than many."""
  return problem.jit(
    lambda args: {name: one(name, *args[name]) for name in args}
  )


@functools.cache
def results(edges, seed, fill=None):
  """What routers return, by name; perhaps with padding filled."""
  args = {}
  for name, router in ROUTERS.items():
    if router.edges == edges:
      given, valid = router.draw(seed)
      routed = router.oracle(given, valid, None)
      if fill is not None:
        logits = given["logits"]
        logits[~valid] = fill
      cotangent = problem.normal(seed, len(routed.weight))
      args[name] = given, valid, cotangent
  return args, compiled(edges)(args)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", ROUTERS)
def test_against_the_oracle(name, seed):
  router = ROUTERS[name]
  args, outs = results(router.edges, seed)
  (given, valid, cotangent), (found, back) = args[name], outs[name]
  routed = router.oracle(given, valid, None)
  problem.same(found, routed)
  if name != "by id":
    assert found.unsound == routed.metrics["nan_tokens"]
    p = oracle.normalized(routed.metrics["probabilities"])
    problem.close(found.probabilities, p)
  for learned in ("logits", *router.learned):

    def weighted(array, learned=learned):
      changed = {**given, learned: array}
      return router.oracle(changed, valid, routed).weight @ cotangent

    want = oracle.numerical_gradient(weighted, given[learned])
    problem.close(back[learned], want, err_msg=learned)
  if "bias" in given:
    problem.close(back["bias"], oracle.load_error(routed))

  # What stands in padding changes no bit of anything.
  for fill in (np.inf, -np.inf, 1e30):
    _, again = results(router.edges, seed, fill)
    jax.tree.map(np.testing.assert_array_equal, again[name], outs[name])
  assert compiled(router.edges)._cache_size() == 1


@pytest.mark.parametrize("tokens, experts", [(1, 6), (11, 1), (0, 6)])
def test_one_and_none(tokens, experts):
  logits = problem.grid(0, tokens, experts)
  gain = np.ones(experts, np.float32)
  found = problem.jit(
    lambda logits: (
      routing.top_k(logits, experts, renormalize=True),
      routing.top_p(logits, 0.7, experts),
      routing.dense_to_sparse(logits, 0.7, 0.1),
      routing.relu(logits),
      routing.expert_choice(logits, tokens) if tokens else None,
    )
  )(logits)
  if not tokens:
    assert all(x.num_tokens == 0 and not x.sizes.any() for x in found[:-1])
    return
  for x, want in zip(
    found,
    (
      oracle.top_k(logits, experts, renormalize=True),
      oracle.top_p(logits, 0.7, experts),
      oracle.gumbel_threshold(logits, 0 * logits, 0.7, 0.1),
      oracle.relu_norm(logits, gain),
      oracle.expert_choice(logits, tokens),
    ),
  ):
    problem.same(x, want)


# --- Where f32 cannot tell scores apart that logits can.


def test_choices_where_probabilities_round():
  """Probabilities of 0 and of 1 in f32 are not ties."""
  logits = np.array(
    [[-300.0, -299.0, 0.0, -298.0], [30.0, 33.0, 31.0, 32.0]], np.float32
  )
  options = [
    dict(scores=scores, renormalize=renormalize)
    for scores in ("softmax", "sigmoid")
    for renormalize in (False, True)
  ]
  got = problem.jit(lambda x: [routing.top_k(x, 3, **o) for o in options])
  for found, o in zip(got(logits), options):
    problem.same(found, oracle.top_k(logits.astype(np.float64), 3, **o))
    assert found.expert.reshape(2, 3).tolist() == [[2, 3, 1], [1, 3, 2]]


def test_weights_that_are_too_small_for_f32_still_have_a_sum():
  logits = np.array([[0.0, -200.0, -201.0, -200.5]], np.float32)
  first = np.array([1, 0, 0, 0], bool)
  # Chosen for their bias, not their probability, which is exp(-200).
  bias = np.array([-2.0, 0.5, 0.0, 0.25], np.float32)

  @problem.jit
  def f(logits):
    return (
      routing.top_k(logits, 2, bias=bias, renormalize=True),
      routing.top_k(
        logits, 2, scores="sigmoid", allowed=~first, renormalize=True
      ),
    )

  share = 1 / (1 + math.exp(-0.5))
  for found in f(logits):
    assert found.expert.tolist() == [1, 3]
    np.testing.assert_allclose(found.weight, [share, 1 - share], rtol=1e-5)


def test_expert_choice_where_probabilities_round():
  logits = np.array([[30.0], [33.0], [31.0], [-200.0], [-199.0]], np.float32)
  choose = lambda logits, scores: (
    routing.expert_choice(logits, 4, scores=scores).token
  )
  for token in problem.jit(
    lambda x: [choose(x, "sigmoid"), choose(x, "identity")]
  )(logits):
    assert token.tolist() == [1, 2, 0, 4]


def test_top_p_of_equal_probabilities():
  """Sums that are exact in decimal numbers give the smallest number."""
  cases = [
    (experts, tenth) for experts in (3, 10, 64) for tenth in (1, 3, 6, 7, 9, 10)
  ]

  @problem.jit
  def numbers(logit):
    return [
      routing.top_p(
        jnp.full((1, experts), logit), tenth / 10, experts
      ).valid.sum()
      for experts, tenth in cases
    ]

  for (experts, tenth), got in zip(cases, numbers(0.3)):
    want = math.ceil(fractions.Fraction(tenth, 10) * experts)
    assert got == want, (experts, tenth)


@hypothesis.given(st.integers(0, 2**32 - 1), st.floats(0.01, 1.0))
def test_top_p_takes_the_smallest_prefix(seed, p):
  """Its sum reaches p, to a millionth, and without the last does not."""
  logits = 3 * problem.normal(seed, 16, 8)
  found = routing.top_p(logits, p, 8)
  valid = np.asarray(found.valid).reshape(16, 8)
  mass = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
  mass = -np.sort(-mass, -1)
  sums = np.cumsum(mass, -1) / mass.sum(-1, keepdims=True)
  taken = valid.sum(-1)
  assert (valid == (np.arange(8) < taken[:, None])).all()
  rows = np.arange(16)
  assert (sums[rows, taken - 1] >= p * (1 - 2e-6)).all()
  before = np.where(taken > 1, sums[rows, taken - 2], 0)
  assert (before < p).all()


# --- Limits: at which settings a router is another.


def test_limits():
  logits = problem.grid(4, 9, 6)
  top_2, *others, mixtral, thresholds, sums = problem.jit(
    lambda logits: (
      routing.top_k(logits, 2),
      routing.top_k(logits, 2, groups=(3, 3)),
      routing.top_k(logits, 2, allowed=np.ones(6, bool), scale=1.0),
      routing.top_k(logits, 2, forced=np.zeros((9, 6), bool)),
      routing.top_k(logits, 2, renormalize=True),
      routing.dense_to_sparse(logits, 1.0, 0.0),
      routing.top_p(logits, 1.0, 6),
    )
  )(logits)
  equal = functools.partial(jax.tree.map, np.testing.assert_array_equal)
  for other in others:
    equal(other, top_2)
  equal(thresholds, sums)
  # A softmax over the chosen.
  best = np.exp(-np.sort(-logits, -1)[:, :2])
  share = best / best.sum(-1, keepdims=True)
  problem.close(mixtral.weight.reshape(9, 2), share)


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_sum_without_a_gradient(scores):
  """The same weights, bit for bit; and gradients as if sums were numbers."""
  logits, valid = problem.awkward(0)
  cotangent = problem.normal(3, 2 * len(logits))

  @problem.jit
  def run(logits):
    def weight(how):
      of = lambda logits: routing.top_k(
        logits, 2, scores=scores, renormalize=how, scale=2.0, token_valid=valid
      )
      found, pull = jax.vjp(lambda x: of(x).weight, logits)
      return found, pull(cotangent)[0]

    return weight(True), weight("detached")

  (want, _), (got, back) = run(logits)
  np.testing.assert_array_equal(got, want)
  route = functools.partial(oracle.top_k, k=2, scores=scores, token_valid=valid)
  plain = route(logits)
  sums = plain.weight.reshape(-1, 2).sum(1).repeat(2)
  fixed = 2 * cotangent / np.where(sums > 0, sums, 1)
  numeric = oracle.numerical_gradient(
    lambda x: route(x, like=plain).weight @ fixed, logits
  )
  problem.close(back, numeric)
  assert np.any(back)


def test_forced_beyond_k_and_not_allowed():
  forced = np.array([0, 1, 0, 1, 1, 0], bool)

  @problem.jit
  def chosen(logits, allowed):
    return routing.top_k(logits, 2, forced=forced, allowed=allowed).expert

  logits = np.arange(6.0)[None]
  assert chosen(logits, np.ones(6, bool)).tolist() == [1, 3]
  assert chosen(logits, ~forced).tolist() == [5, 2]


def test_ids_beyond_a_table_go_nowhere():
  table, ids = np.array([1, 0, 2]), np.array([2, 0, 3, 9])

  @problem.jit
  def f(table, ids):
    experts = table.at[ids].get(mode="fill", fill_value=-1)
    return routing.by_id(experts, 3)

  found = f(table, ids)
  problem.same(found, oracle.hash_(ids, table, 3))
  assert found.unsound == 2


def test_chosen_experts_of_a_mean():
  """One choice a sample: all of its tokens go to the same experts."""

  @problem.jit
  def chosen(logits):
    logits = routing.per_chunk(logits, jnp.arange(12) // 4, 3)
    return routing.top_k(logits, 2).expert

  expert = np.asarray(chosen(problem.grid(0, 12, 6))).reshape(3, 4, 2)
  assert (expert == expert[:, :1]).all()


def test_bias_has_the_load_error_as_gradient_whatever_the_loss():
  logits, bias = problem.grid(1, 9, 6), jnp.zeros(6)

  def loss(bias, by):
    found = routing.top_k(logits, 2, bias=bias)
    return by * (found.weight**3).sum(), routing.load_error(found)

  back = problem.jit(jax.grad(loss, has_aux=True))
  for by in (0.0, 1.0, -7.0):
    np.testing.assert_array_equal(*back(bias, by))


# --- Under transformations, in other dtypes, on several devices.


MANY = ("DeepSeek-V3", "top p", "expert choice", "per chunk")


def test_vmap():
  args = [
    {name: results(ROUTERS[name].edges, seed)[0][name] for name in MANY}
    for seed in range(2)
  ]
  stacked = jax.tree.map(lambda *x: np.stack(x), *args)
  f = lambda args: {name: one(name, *args[name]) for name in args}
  got = problem.jit(jax.vmap(f))(stacked)
  for seed in range(2):
    for name in MANY:
      want = results(ROUTERS[name].edges, seed)[1][name]
      mine = jax.tree.map(lambda x, seed=seed: x[seed], got[name])
      jax.tree.map(problem.close, mine, want)


def test_other_dtypes():
  """Quarters are exact in them, and arithmetic is in f32."""
  logits = problem.grid(2, 9, 6)
  dtypes = (jnp.float32, jnp.bfloat16, jnp.float16)
  each = problem.jit(lambda xs: [routing.top_k(x, 2) for x in xs])
  want, *got = each([logits.astype(dtype) for dtype in dtypes])
  for found in got:
    jax.tree.map(np.testing.assert_array_equal, found, want)


AUTO, EXPLICIT = common.AXIS_TYPES


# Those whose masks are of eleven tokens cannot be divided.
REST = [n for n in ROUTERS if n not in MANY and "by token" not in n]


@pytest.mark.parametrize(
  "axis_type, names",
  [
    (EXPLICIT, MANY),
    pytest.param(AUTO, MANY, marks=pytest.mark.slow),
    pytest.param(EXPLICIT, REST, marks=pytest.mark.slow),
    pytest.param(AUTO, REST, marks=pytest.mark.slow),
  ],
)
def test_eight_devices(axis_type, names):
  mesh = common.mesh_of(axis_type)
  rows = jax.P(("x", "y"))

  def draw(name):
    router = ROUTERS[name]
    given, valid = router.draw(0, tokens=16)
    edges = len(router.oracle(given, valid, None).weight)
    return given, valid, problem.normal(0, edges)

  def put(name, given, valid, cotangent):
    by_expert = ROUTERS[name].edges in ("choice", "one expert")
    by_edge = jax.P() if by_expert else rows
    return (
      {
        n: common.place(x, mesh, rows if x.ndim == 2 else jax.P())
        for n, x in given.items()
      },
      common.place(valid, mesh, rows),
      common.place(cotangent, mesh, by_edge),
    )

  args = {name: draw(name) for name in names}
  f = lambda args: {name: one(name, *args[name]) for name in args}
  want = problem.jit(f)(args)
  with jax.set_mesh(mesh):
    got = problem.jit(f)({name: put(name, *args[name]) for name in names})
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    problem.close(x, y)


# --- What is refused.

L = jnp.zeros((4, 6))


@pytest.mark.parametrize(
  "argument, call",
  [
    ("logits", lambda: routing.top_k(L[0], 1)),
    ("logits", lambda: routing.top_k(L.astype(int), 1)),
    ("logits", lambda: routing.top_k(L[:, :0], 1)),
    ("k", lambda: routing.top_k(L, 0)),
    ("k", lambda: routing.top_k(L, 7)),
    ("scores", lambda: routing.top_k(L, 1, scores="tanh")),
    ("renormalize", lambda: routing.top_k(L, 1, renormalize="all")),
    ("bias", lambda: routing.top_k(L, 1, bias=jnp.zeros(4))),
    ("bias", lambda: routing.top_k(L, 1, bias=jnp.zeros(6, jnp.bfloat16))),
    ("allowed", lambda: routing.top_k(L, 1, allowed=jnp.ones(6))),
    ("allowed", lambda: routing.top_k(L, 1, allowed=jnp.ones(4, bool))),
    ("forced", lambda: routing.top_k(L, 1, forced=jnp.ones((6, 4), bool))),
    ("groups", lambda: routing.top_k(L, 1, groups=(4, 1))),
    ("groups", lambda: routing.top_k(L, 1, groups=(3, 4))),
    ("groups", lambda: routing.top_k(L, 1, groups=(3, 0))),
    ("groups", lambda: routing.top_k(L, 1, groups=(0, 0))),
    ("group_best", lambda: routing.top_k(L, 1, groups=(3, 1), group_best=0)),
    ("token_valid", lambda: routing.top_k(L, 1, token_valid=jnp.ones(4))),
    ("token_valid", lambda: routing.top_k(L, 1, token_valid=L[0] == 0)),
    ("p", lambda: routing.top_p(L, 0.0, 2)),
    ("p", lambda: routing.top_p(L, 1.1, 2)),
    ("k_max", lambda: routing.top_p(L, 0.5, 7)),
    ("threshold", lambda: routing.dense_to_sparse(L, 1.0, 1.0)),
    ("threshold", lambda: routing.dense_to_sparse(L, 1.0, -0.1)),
    ("temperature", lambda: routing.dense_to_sparse(L, 0.0, 0.1)),
    ("temperature", lambda: routing.dense_to_sparse(L, math.nan, 0.1)),
    ("gumbel", lambda: routing.dense_to_sparse(L, 1.0, 0.1, gumbel=L[0])),
    ("k_max", lambda: routing.dense_to_sparse(L, 1.0, 0.1, k_max=0)),
    ("gain", lambda: routing.relu(L, jnp.ones(4))),
    ("epsilon", lambda: routing.relu(L, epsilon=0.0)),
    ("k_max", lambda: routing.relu(L, k_max=7)),
    ("capacity", lambda: routing.expert_choice(L, 0)),
    ("capacity", lambda: routing.expert_choice(L, 5)),
    ("scores", lambda: routing.expert_choice(L, 1, scores="tanh")),
    ("ids", lambda: routing.by_id(L[0], 6)),
    ("num_experts", lambda: routing.by_id(jnp.zeros(4, int), 0)),
    ("chunk", lambda: routing.per_chunk(L, L[:, 0], 2)),
    ("chunk", lambda: routing.per_chunk(L, jnp.zeros(6, int), 2)),
    ("num_chunks", lambda: routing.per_chunk(L, jnp.zeros(4, int), 0)),
  ],
)
def test_errors_name_the_argument(argument, call):
  with pytest.raises(ValueError, match=rf"^{argument}\b.*got"):
    call()
