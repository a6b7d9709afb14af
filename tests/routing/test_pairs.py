"""Routers, dispatchers and banks in pairs, from logits to gradients.

Every router meets every dispatcher that takes it and every bank, and every
dispatcher every bank. Logits have ties, padding and NaN, no count divides
another, some experts get no edge and some more than they take.
"""

import functools
import itertools

import jax
import numpy as np
import pytest

from sparsejax import routing
from tests import common
from tests.oracles import routing as oracle
from tests.routing import problem
from tests.routing import test_routers

SIZE = 3  # of which some experts get more and some fewer
MANY = 16  # tokens that eight devices divide: the last of them are padding
KINDS = ("1", "2", "all", "choice")
DISPATCHERS = {
  "dropless": (routing.dropless, None),
  "capacity": (functools.partial(routing.capacity, size=SIZE), None),
  "data": (routing.dropless, ("data", "model")),
  "expert": (routing.expert_parallel, ("data", "expert")),
  "expert, sized": (
    functools.partial(routing.expert_parallel, size=SIZE),
    ("expert", "data"),
  ),
  "ring": (routing.ring_of_experts, ("data", "expert")),
}


def banks_of(dispatcher, kind):
  """One for the routers of a kind, two for the many of two edges a token.

  So few are compiled, and every pair is there.
  """
  first = list(DISPATCHERS).index(dispatcher) + KINDS.index(kind)
  banks = list(problem.BANKS)
  return [
    banks[at % len(banks)] for at in (first, first + 2)[: 1 + (kind == "2")]
  ]


def takes(dispatcher, kind):
  return kind != "choice" or DISPATCHERS[dispatcher][1] is None


def rows():
  """(router, dispatcher, bank)."""
  for dispatcher, kind in itertools.product(DISPATCHERS, KINDS):
    if takes(dispatcher, kind):
      banks = banks_of(dispatcher, kind)
      of_kind = [n for n, r in problem.ROUTERS.items() if r.edges == kind]
      for i, name in enumerate(of_kind):
        yield name, dispatcher, banks[i % len(banks)]


def test_every_pair_is_there():
  table = list(rows())
  token_choice = [n for n, r in problem.ROUTERS.items() if r.edges in KINDS[:3]]
  pairs = {(name, dispatcher) for name, dispatcher, _ in table}
  assert pairs >= set(itertools.product(token_choice, DISPATCHERS))
  pairs = {(dispatcher, bank) for _, dispatcher, bank in table}
  assert pairs >= set(itertools.product(DISPATCHERS, problem.BANKS))
  pairs = {(name, bank) for name, _, bank in table}
  assert pairs >= set(itertools.product(token_choice, problem.BANKS))


@functools.cache
def mesh_of(names):
  axis_type = common.AXIS_TYPES[names[0] == "data"]
  # The axis of experts, of which there are six, has two devices.
  shape = tuple(2 if name in ("expert", "model") else 4 for name in names)
  return jax.make_mesh(shape, names, axis_types=(axis_type,) * 2)


@functools.cache
def compiled(dispatcher, kind, bank):
  """A layer with what is dropped before it."""
  del kind  # another shape
  run, names = DISPATCHERS[dispatcher]
  if names is not None:
    run = routing.over_devices(
      run, tokens=names, experts="expert" if "expert" in names else None
    )

  def dispatch(x, found, bank, params):
    if limited(dispatcher):
      found, _ = routing.limit(found, SIZE, priority="weight")
    return run(x, found, bank, params)

  return problem.jit(problem.layer(dispatch, bank))


def limited(dispatcher):
  return dispatcher in ("capacity", "expert, sized")


@functools.cache
def expected(name, bank, limit, seed):
  """Of the oracle: y, and gradients by name, the logits' among them."""
  router = problem.ROUTERS[name]
  given, valid = router.draw(seed)
  routed = router.oracle(given, valid, None)
  kept = oracle.keep(routed, SIZE, "weight") if limit else routed.valid
  x = problem.tokens_of(valid, routed)
  cotangent = problem.normal(4, *x.shape)
  params = problem.parameters(bank)
  y, grads = problem.layer_of(x, routed, bank, params, cotangent, kept)

  def weighted(logits):
    again = router.oracle({**given, "logits": logits}, valid, routed)
    return again.weight @ grads["weight"]

  logits = oracle.numerical_gradient(weighted, given["logits"])
  return x, cotangent, (y, grads), logits


def padded(found):
  """As many edges of tokens that are padding as `MANY` needs."""
  more = MANY - found.num_tokens

  def pad(x, fill=0):
    if np.ndim(x) == 0:
      return x
    number = more * (len(x) // found.num_tokens)
    return np.concatenate([x, np.full((number, *x.shape[1:]), fill, x.dtype)])

  token = np.repeat(np.arange(MANY, dtype=np.int32), found.choices)
  return problem.changed(jax.tree.map(pad, found), token=token)


def through(dispatcher, kind, bank, x, found, cotangent):
  """What `problem.layer` returns, on the devices of the dispatcher."""
  run, params = compiled(dispatcher, kind, bank), problem.parameters(bank)
  names = DISPATCHERS[dispatcher][1]
  if names is None:
    return run(x, found, params, cotangent)
  tokens, edges = len(x), len(found.token)
  rows = np.full((MANY - tokens, x.shape[1]), np.nan, np.float32)
  x, cotangent = (np.concatenate([a, rows]) for a in (x, cotangent))
  mesh = mesh_of(names)
  put = lambda spec: (
    lambda a: common.place(a, mesh, spec if np.ndim(a) else jax.P())
  )
  by_token = put(jax.P(names))
  by_expert = put(jax.P("expert" if "expert" in names else None))
  with jax.set_mesh(mesh):
    y, grads = run(
      by_token(x),
      jax.tree.map(by_token, padded(found)),
      jax.tree.map(by_expert, params),
      by_token(np.where(np.isnan(cotangent), 1, cotangent)),
    )
  y, grads = jax.tree.map(np.asarray, (y, grads))
  assert not y[tokens:].any() and not grads["x"][tokens:].any()
  cut = dict(x=grads["x"][:tokens], weight=grads["weight"][:edges])
  return y[:tokens], {**grads, **cut}


# Each kind of dispatcher and bank; the others take minutes to compile.
QUICK = [("dropless", "2"), ("capacity", "choice"), ("expert", "1")]
TABLE = [
  pytest.param(*pair, marks=[] if pair in QUICK else pytest.mark.slow)
  for pair in itertools.product(DISPATCHERS, KINDS)
  if takes(*pair)
]


@pytest.mark.parametrize("dispatcher, kind", TABLE)
def test_against_the_oracle(dispatcher, kind, seed=0):
  args, outs = test_routers.results(kind, seed)
  args, limit = dict(args), limited(dispatcher)
  banks = {name: bank for name, of, bank in rows() if of == dispatcher}
  for name in args:
    bank = banks[name]
    x, cotangent, want, _ = expected(name, bank, limit, seed)
    found = jax.tree.map(np.asarray, outs[name][0])
    got = through(dispatcher, kind, bank, x, found, cotangent)
    problem.same_layer(got, want, name)
    assert compiled(dispatcher, kind, bank)._cache_size() == 1
    args[name] = *args[name][:2], np.asarray(got[1]["weight"])
  # And on, through all routers at once.
  for name, (_, back) in test_routers.compiled(kind)(args).items():
    logits = expected(name, banks[name], limit, seed)[3]
    scale = max(1, np.abs(logits).max())
    problem.close(back["logits"] / scale, logits / scale, err_msg=name)
