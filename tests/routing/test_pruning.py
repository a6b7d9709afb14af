"""The saliency of experts against a loop, and mixtures without some of them."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import routing
from tests import common
from tests.oracles import routing as oracle
from tests.routing import pieces

BANK = routing.FeedForward()
WIDTH, HIDDEN, EXPERTS, TOKENS = 3, 4, 5, 8
PARAMS = pieces.bank(0, EXPERTS, WIDTH, HIDDEN)
X = pieces.draw(5, TOKENS, WIDTH)
# Expert 2 is chosen by no token, and one token is padding.
LOGITS = pieces.draw(6, TOKENS, EXPERTS) - 20 * (np.arange(EXPERTS) == 2)
VALID = np.arange(TOKENS) != 3


def plain(params, rows, sizes):
  """A bank that gathers nothing itself."""
  return BANK(params, rows, sizes)


def route(logits, **options):
  return routing.top_k(logits, 2, token_valid=VALID, **options)


@functools.partial(pieces.jit, static_argnums=(3, 4))
def saliency(x, logits, params, bank=BANK, renormalize=False):
  found = route(logits, renormalize=renormalize)
  return routing.reap(x, found, bank, params), found.sizes


@pytest.mark.parametrize(
  "bank,renormalize", [(BANK, False), (BANK, True), (plain, False)]
)
def test_saliency_equals_a_loop(bank, renormalize):
  got, sizes = saliency(X, LOGITS, PARAMS, bank, renormalize)
  found = oracle.top_k(LOGITS, 2, renormalize=renormalize, token_valid=VALID)
  pieces.close(got, oracle.reap(X, found, oracle.ffn, PARAMS))
  assert sizes[2] == got[2] == 0 and got.dtype == jnp.float32


def test_saliency_of_several_batches():
  one, size_one = saliency(X, LOGITS, PARAMS)
  two, size_two = saliency(X[::-1], LOGITS, PARAMS)
  total = one * size_one + two * size_two
  found = oracle.top_k(
    np.concatenate([LOGITS, LOGITS]), 2, token_valid=np.tile(VALID, 2)
  )
  both = np.concatenate([X, X[::-1]])
  want = oracle.reap(both, found, oracle.ffn, PARAMS)
  pieces.close(total / np.maximum(size_one + size_two, 1), want)


def test_saliency_of_what_was_dropped():
  @pieces.jit
  def run(x, keep):
    found, _ = routing.limit(route(jnp.asarray(LOGITS)), 1)
    found = found.where(jnp.full(len(found.token), keep))
    return routing.reap(x, found, BANK, PARAMS)

  assert (run(X, True) > 0).sum() == EXPERTS - 1
  assert not run(X, False).any()


def test_best_experts():
  best = lambda *args: routing.best_experts(*args).tolist()
  assert best(jnp.array([0.0, 2.0, 2.0, 2.0, 1.0]), 2) == [1, 2]
  assert best(jnp.array([5, 1, 7]), 3) == [0, 1, 2]
  assert best(jnp.array([jnp.nan, 1.0, -2.0]), 2) == [1, 2]


def make(**options):
  return pieces.made(
    lambda: routing.MoE(
      WIDTH, HIDDEN, EXPERTS, rngs=nnx.Rngs(0), balance_bias=True, **options
    )
  )


@pieces.module_jit
def call(moe, x):
  found, _ = moe.route(x)
  y = moe(x)
  return y, found.expert, moe.metrics.get_value()["load"]


def unused(moe):
  """The mixture with an expert 1 that no token chooses."""
  moe.balance_bias[...] = jnp.where(jnp.arange(EXPERTS) == 1, -99.0, 0.5)
  return moe


def test_removal_of_an_unused_expert_changes_nothing():
  moe = unused(make())
  y, expert, load = call(moe, X)
  kept = np.array([0, 2, 3, 4])
  pruned = routing.prune_experts(moe, kept)
  got, renamed, new_load = call(pruned, X)
  np.testing.assert_allclose(got, y, 1e-5, 1e-6)
  np.testing.assert_array_equal(kept[np.asarray(renamed)], expert)
  np.testing.assert_array_equal(new_load, load[kept])
  assert load[1] == 0 and moe.router.kernel.shape == (WIDTH, EXPERTS)
  assert pruned.experts["down"].shape == (4, HIDDEN, WIDTH)
  # Of the state, all has lost an expert and nothing its kind.
  shapes = lambda moe: jax.tree.map(
    lambda x: tuple(4 if d == EXPERTS else d for d in x.shape), nnx.state(moe)
  )
  assert shapes(moe) == shapes(pruned)


def test_gates_renormalize():
  # Without an expert, the softmax is over the others.
  kernel = pieces.draw(7, WIDTH, EXPERTS)
  kept = np.array([4, 0, 2])
  left = X @ np.asarray(routing.keep_experts(kernel, kept, axis=-1))
  found = pieces.jit(functools.partial(routing.top_k, k=3))(left)
  p = np.array([oracle.softmax(row) for row in common.float64(X @ kernel)])
  want = p[:, kept] / p[:, kept].sum(-1, keepdims=True)
  pieces.close(found.probabilities, want)


def test_order_is_that_of_kept():
  moe = make()
  pruned = routing.prune_experts(moe, np.array([3, 1]))
  of = lambda moe: (moe.experts["up"][...], moe.router.kernel[...].T)
  for got, all_of_them in zip(of(pruned), of(moe), strict=True):
    np.testing.assert_array_equal(got, np.asarray(all_of_them)[[3, 1]])


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", common.AXIS_TYPES)
def test_eight_devices(axis_type):
  weights = pieces.draw(8, WIDTH, EXPERTS)

  def f(x):
    return routing.reap(x, routing.top_k(x @ weights, 2), BANK, PARAMS)

  pieces.compare_on_eight_devices(f, pieces.draw(9, 16, WIDTH), axis_type)


def test_bad_input():
  with pytest.raises(ValueError, match="count must be 1 to 3, got 4"):
    routing.best_experts(jnp.ones(3), 4)
  with pytest.raises(ValueError, match=r"saliency must be \[experts\]"):
    routing.best_experts(jnp.ones((3, 2)), 1)
  with pytest.raises(ValueError, match="x must be"):
    routing.reap(X[1:], route(LOGITS), BANK, PARAMS)
  soft = routing.SoftMoE(2, 2, 2, 1, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match=r"^moe must be a MoE .* got a SoftMoE"):
    routing.prune_experts(soft, np.array([0]))
  moe = make()
  for kept in ([0, 5], [1, 1], [-1], [], [0.5], [[0]]):
    with pytest.raises(ValueError, match="different experts in 0 to 4"):
      routing.prune_experts(moe, np.array(kept))
