"""Losses, the bias's update and metrics, against the oracle."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsejax import routing
from tests import common
from tests.oracles import routing as oracle
from tests.routing import problem

TOKENS, EXPERTS = 16, 6  # which 8 devices divide
SEGMENTS = np.array([0, 0, 2, 2, 2, 0, 4, 4, 4, 4, 0, 2, 4, 0, 0, 2])
ROUTES = {
  "softmax": lambda z, valid: routing.top_k(z, 2, token_valid=valid),
  "sigmoid": lambda z, valid: routing.top_k(
    z, 2, scores="sigmoid", token_valid=valid
  ),
  "top p": lambda z, valid: routing.top_p(z, 0.6, EXPERTS, token_valid=valid),
  "relu": lambda z, valid: routing.relu(z, token_valid=valid),
  "choice": lambda z, valid: routing.expert_choice(z, 5, token_valid=valid),
}
SAME = {
  "softmax": functools.partial(oracle.top_k, k=2),
  "sigmoid": functools.partial(oracle.top_k, k=2, scores="sigmoid"),
  "top p": functools.partial(oracle.top_p, p=0.6, k_max=EXPERTS),
  "relu": functools.partial(oracle.relu_norm, gain=np.ones(EXPERTS)),
  "choice": functools.partial(oracle.expert_choice, capacity=5),
}
# Of an Assignment, and of the oracle's with its probabilities and logits.
LOSSES = {
  "load_balance": (
    routing.load_balance,
    lambda a, p, z, counted: oracle.load_balance(a, p),
  ),
  "by segment": (
    lambda found: routing.load_balance(
      found, segments=jnp.array(SEGMENTS), num_segments=7
    ),
    lambda a, p, z, counted: oracle.load_balance(a, p, SEGMENTS),
  ),
  "z_loss": (
    routing.z_loss,
    lambda a, p, z, counted: oracle.z(z, token_valid=counted),
  ),
  "importance": (
    routing.importance,
    lambda a, p, z, counted: oracle.importance(a.dense()),
  ),
  "entropy": (
    routing.entropy,
    lambda a, p, z, counted: oracle.entropy(p, counted=counted),
  ),
  "mutual_information": (
    routing.mutual_information,
    lambda a, p, z, counted: oracle.mutual_information(p, counted=counted),
  ),
  "concentration": (
    routing.concentration,
    lambda a, p, z, counted: oracle.concentration(p, counted=counted),
  ),
  "locality": (
    lambda found: routing.locality(found, steepness=2.0),
    lambda a, p, z, counted: oracle.locality(
      z, steepness=2.0, token_valid=counted
    ),
  ),
  "locality by segment": (
    lambda found: routing.locality(
      found, steepness=2.0, segments=jnp.array(SEGMENTS)
    ),
    lambda a, p, z, counted: oracle.locality(
      z, steepness=2.0, segments=SEGMENTS, token_valid=counted
    ),
  ),
  "chunk_sparsity": (
    lambda found: routing.chunk_sparsity(found, 4),
    lambda a, p, z, counted: oracle.chunk_sparsity(
      p, np.arange(TOKENS) // 4, counted=counted
    ),
  ),
}


def everything(route, logits, valid):
  """Losses, their gradients in the logits, and statistics."""

  def losses(logits):
    found = ROUTES[route](logits, valid)
    return {name: of(found) for name, (of, _) in LOSSES.items()}

  found = ROUTES[route](logits, valid)
  return dict(
    losses=losses(logits),
    gradients=jax.jacrev(losses)(logits),
    error=routing.load_error(found),
    metrics=routing.metrics(found),
  )


@problem.jit
def compiled(logits, valid):
  """Of all routers at once: one program is cheaper than many."""
  return {route: everything(route, logits, valid) for route in ROUTES}


def draw(seed=0):
  logits, valid = problem.awkward(seed, TOKENS, EXPERTS)
  # Of one expert alone -inf: a pair of neighbors of which one is not allowed
  # has no finite cross-entropy in the oracle.
  logits[(logits == -np.inf).any(-1) & (logits > -np.inf).any(-1)] = 0.25
  return logits, valid


@pytest.mark.parametrize("route", ROUTES)
def test_against_the_oracle(route):
  logits, valid = draw()
  got = compiled(logits, valid)[route]
  routed = SAME[route](logits, token_valid=valid)

  @functools.cache
  def repeated(logits):  # which all losses differentiate
    z = np.frombuffer(logits).reshape(TOKENS, EXPERTS)
    again = SAME[route](z, token_valid=valid, like=routed)
    return again, oracle.normalized(again.metrics["probabilities"]), z

  def values(name, z):
    again = repeated(z.astype(np.float64).tobytes())
    return LOSSES[name][1](*again, routed.metrics["counted"])

  for name in LOSSES:
    problem.close(got["losses"][name], values(name, logits), err_msg=name)
    want = oracle.numerical_gradient(
      functools.partial(values, name), logits, step=1e-4
    )
    if route == "relu":  # at 0 it has no slope, and numbers a mean of two
      zero = np.isin(logits, [0.0])
      want[zero] = np.asarray(got["gradients"][name])[zero]
    close = functools.partial(problem.close, rtol=1e-4, atol=1e-5)
    close(got["gradients"][name], want, err_msg=name)
  problem.close(got["error"], oracle.load_error(routed))

  counts, metrics = routed.counts(), got["metrics"]
  share = counts / counts.sum()
  tokens = routed.metrics["counted"].sum()
  routed_tokens = sum(map(bool, routed.choices()))
  for name, want in dict(
    load=share,
    max_violation=share.max() * EXPERTS - 1,
    entropy=oracle.row_entropy(share) / math.log(EXPERTS),
    edges=counts.sum() / tokens,
    unrouted=(tokens - routed_tokens) / tokens,
    unsound=routed.metrics["nan_tokens"],
  ).items():
    problem.close(metrics[name], want, err_msg=name)


def test_no_token_counts():
  got = compiled(draw()[0], np.zeros(TOKENS, bool))
  assert not any(np.asarray(x).any() for x in jax.tree.leaves(got))


AUTO, EXPLICIT = common.AXIS_TYPES


@pytest.mark.parametrize(
  "route, axis_type",
  [
    ("sigmoid", EXPLICIT),
    pytest.param("choice", AUTO, marks=pytest.mark.slow),
    pytest.param("sigmoid", AUTO, marks=pytest.mark.slow),
    pytest.param("choice", EXPLICIT, marks=pytest.mark.slow),
  ],
)
def test_eight_devices(route, axis_type):
  logits, valid = draw()
  want = compiled(logits, valid)[route]
  mesh = common.mesh_of(axis_type)
  with jax.set_mesh(mesh):
    got = problem.jit(functools.partial(everything, route))(
      common.place(logits, mesh, jax.P(("x", "y"))),
      common.place(valid, mesh, jax.P(("x", "y"))),
    )
  jax.tree.map(problem.close, got, want)


def test_inside_of_a_shard_map():
  """With axis_names statistics are of all tokens, and so is the bias's."""
  mesh = common.mesh_of(jax.sharding.AxisType.Auto)
  logits, valid = draw()
  names = ("x", "y")
  over = dict(axis_names=names)

  def statistics(logits, valid, bias, segments, **over):
    def route(bias):
      found = routing.top_k(logits, 2, bias=bias, token_valid=valid, **over)
      return found.weight.sum(), found

    _, pull, found = jax.vjp(route, bias, has_aux=True)
    return dict(
      balance=routing.load_balance(found, **over),
      segments=routing.load_balance(
        found, segments=segments, num_segments=7, **over
      ),
      z=routing.z_loss(found, **over),
      importance=routing.importance(found, **over),
      information=routing.mutual_information(found, **over),
      smooth=routing.load(
        jnp.where(jnp.isfinite(logits), logits, 0), 0 * logits, 0.5, 2,
        token_valid=valid, **over,
      ),
      metrics=routing.metrics(found, **over),
      error=routing.load_error(found, **over),
    ), pull(jnp.ones_like(found.weight[0]))[0]  # fmt: skip

  args = logits, valid, np.zeros(EXPERTS, np.float32), SEGMENTS
  want, _ = problem.jit(statistics)(*args)
  rows = jax.P(names)
  got, back = problem.jit(
    jax.shard_map(
      functools.partial(statistics, **over),
      mesh=mesh,
      in_specs=(rows, rows, jax.P(), rows),
      out_specs=jax.P(),
    )
  )(*args)
  jax.tree.map(problem.close, got, want)
  problem.close(back, want["error"])

  def weights(bias):
    def route(logits, valid, bias):
      return routing.top_k(
        logits, 2, bias=bias, token_valid=valid, axis_names=names
      ).weight

    specs = (rows, rows, jax.P())
    return jax.shard_map(route, mesh=mesh, in_specs=specs, out_specs=rows)(
      logits, valid, bias
    ).sum()

  back = problem.jit(jax.grad(weights))(args[2])
  problem.close(back, want["error"])


# --- The smooth load.


def test_load():
  clean, noise = problem.grid(0, 7, EXPERTS), problem.normal(1, 7, EXPERTS)
  scale = np.float32(0.3) + problem.uniform(2, 7, EXPERTS)
  valid = np.arange(7) != 3
  clean[3], noise[3] = np.nan, np.nan
  clean[4, 1:3] = -np.inf
  clean[5, 2] = np.inf
  clean[6] = -np.inf
  cases = [(t, k) for t in ("excluding", "kth") for k in (1, 2, EXPERTS)]

  @problem.jit
  def everything(clean, scale):
    def loss(clean, scale, threshold, k):
      return routing.load(
        clean, noise, scale, k, threshold=threshold, token_valid=valid
      )

    both = jax.value_and_grad(loss, (0, 1))
    return [both(clean, scale, *case) for case in cases]

  def want(clean, scale, threshold, k):
    noisy = clean + noise * scale
    return oracle.load(
      clean, noisy, scale, k, threshold=threshold, token_valid=valid
    )

  wide = functools.partial(problem.close, rtol=1e-4, atol=1e-5)
  for case, (got, back) in zip(cases, everything(clean, scale)):
    problem.close(got, want(clean, scale, *case), err_msg=str(case))
    of_clean = lambda x, case=case: want(x, scale, *case)
    of_scale = lambda x, case=case: want(clean, x, *case)
    wide(back[0], oracle.numerical_gradient(of_clean, clean, 1e-4))
    wide(back[1], oracle.numerical_gradient(of_scale, scale, 1e-4))


# --- A bias without a loss.


@pytest.mark.parametrize("rule", ["sign", "proportional"])
def test_bias_update(rule):
  logits, valid = draw()
  proportional = rule == "proportional"
  tx = routing.balance_bias(
    optax.linear_schedule(0.5, 0.0, 10), proportional=proportional
  )

  @problem.jit
  def step(bias, state, logits):
    route = lambda bias: routing.top_k(logits, 2, bias=bias, token_valid=valid)
    error = jax.grad(lambda bias: route(bias).weight.sum())(bias)
    updates, state = tx.update(error, state, bias)
    return optax.apply_updates(bias, updates), state

  bias = jnp.zeros(EXPERTS)
  state = tx.init(bias)
  for i in range(3):
    routed = oracle.top_k(logits, 2, bias=bias, token_valid=valid)
    rate = 0.5 * (1 - i / 10) * (EXPERTS if proportional else 1)
    want = oracle.update_bias(bias, routed, rate, rule)
    bias, state = step(bias, state, logits)
    problem.close(bias, want)


def test_equal_loads_move_no_bias():
  """The error is exactly 0 at an equal share, whatever the numbers are."""
  found = [
    problem.found_of(
      oracle.by_modality(np.arange(tokens) % experts, experts), "1"
    )
    for experts, tokens in ((3, 3), (7, 14), (49, 98), (10, 30))
  ]
  errors = problem.jit(lambda found: [routing.load_error(x) for x in found])
  assert not any(error.any() for error in errors(found))


def test_bias_balances_what_a_loss_is_not_asked_to():
  logits = problem.normal(0, 64, 4) + np.array([2.0, 1.0, 0.0, -1.0])
  tx = routing.balance_bias(0.02)

  @problem.jit
  def step(bias, state):
    found = routing.top_k(logits, 1, scores="sigmoid", bias=bias)
    updates, state = tx.update(routing.load_error(found), state)
    bias = optax.apply_updates(bias, updates)
    return bias, state, routing.metrics(found)["max_violation"]

  bias, seen = jnp.zeros(4), []
  state = tx.init(bias)
  for _ in range(80):
    bias, state, violation = step(bias, state)
    seen.append(violation.item())
  assert seen[0] > 1.5 and np.mean(seen[-10:]) < 0.3


# --- BlockFFN, Sigma-MoE.


def test_chunk_sparsity_has_a_gradient_at_a_single_expert():
  """Where 1 - share is 0 a logarithm would not do."""
  logits = np.array([[1.0, -1.0], [2.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])

  def loss(p):
    found = routing.relu(jnp.asarray(logits, jnp.float32))
    found = dataclasses.replace(found, probabilities=p)
    return routing.chunk_sparsity(found, 4)

  p = oracle.normalized(np.maximum(logits, 0))
  want = oracle.numerical_gradient(
    lambda p: oracle.chunk_sparsity(p, np.zeros(4, int)), p
  )
  back = problem.jit(jax.grad(loss))(p.astype(np.float32))
  problem.close(back, want, atol=1e-6)


def test_locality_falls_as_neighbors_grow_alike():
  alike = jnp.tile(jnp.array([[1.0, -1.0, -1.0]]), (4, 1))
  other = alike.at[1::2].set(jnp.array([-1.0, 1.0, -1.0]))
  of = problem.jit(lambda logits: routing.locality(routing.relu(logits)))
  assert of(alike) < 1e-6 < 10 < of(other)


def test_progressive_k():
  schedule = functools.partial(
    routing.progressive_k, early=(4, 2), late=1, at=10
  )
  assert [schedule(i, 9) for i in range(3)] == [4, 2, 1]
  assert [schedule(i, 10) for i in range(3)] == [1, 1, 1]
  logits = problem.grid(0, 9, EXPERTS)

  @jax.jit
  def edges(step):
    found = routing.top_k(logits, 4)
    return found.where(found.rank < schedule(0, step)).valid.sum()

  assert [edges(step).item() for step in (0, 9, 10, 99)] == [36, 36, 9, 9]
  assert edges._cache_size() == 1


FOUND = problem.found_of(oracle.by_modality(np.zeros(6, int), 2), "1")


@pytest.mark.parametrize(
  "argument, call",
  [
    ("num_segments", lambda: routing.load_balance(FOUND, num_segments=1)),
    ("num_segments", lambda: routing.load_balance(FOUND, segments=FOUND.token)),
    ("k", lambda: routing.load(FOUND.logits, FOUND.logits, 1.0, 0)),
    ("k", lambda: routing.load(FOUND.logits, FOUND.logits, 1.0, 3)),
    ("noise", lambda: routing.load(FOUND.logits, FOUND.logits[0], 1.0, 1)),
    (
      "threshold",
      lambda: routing.load(
        FOUND.logits, FOUND.logits, 1.0, 1, threshold="third"
      ),
    ),
    ("size", lambda: routing.chunk_sparsity(FOUND, 4)),
    ("size", lambda: routing.chunk_sparsity(FOUND, 0)),
  ],
)
def test_errors_name_the_argument(argument, call):
  with pytest.raises(ValueError, match=rf"^{argument}\b.*got"):
    call()
