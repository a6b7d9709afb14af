"""Attention heads as experts, against a loop over edges and over keys."""

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

TOKENS, EXPERTS, WIDTH, HEAD = 6, 3, 4, 2
VALID = np.array([False, True, True, True, False, True])
PARAMS = ("query", "output", "key", "value")


def arrays_of(seed=0, lead=()):
  return {
    "x": pieces.draw(seed, *lead, TOKENS, WIDTH),
    "logits": pieces.draw(seed + 1, *lead, TOKENS, EXPERTS),
    "query": pieces.draw(seed + 2, EXPERTS, WIDTH, HEAD),
    "output": pieces.draw(seed + 3, EXPERTS, HEAD, WIDTH),
    "key": pieces.draw(seed + 4, WIDTH, HEAD),
    "value": pieces.draw(seed + 5, WIDTH, HEAD),
  }


def route(logits, k, token_valid=None):
  logits = logits.reshape(-1, EXPERTS)
  if k is None:
    return routing.expert_choice(logits, 3, token_valid=token_valid)
  return routing.top_k(logits, k, renormalize=True, token_valid=token_valid)


def same(arrays, like, k, token_valid=None):
  given = dict(token_valid=token_valid, like=like)
  if k is None:
    return oracle.expert_choice(arrays["logits"], 3, **given)
  return oracle.top_k(arrays["logits"], k, renormalize=True, **given)


def layer(arrays, k=2, kind="softmax", causal=True, token_valid=None):
  params = {name: arrays[name] for name in PARAMS}
  found = route(arrays["logits"], k, token_valid)
  return routing.attention_mixture(
    arrays["x"], found, params, attention=kind, causal=causal
  )


@functools.lru_cache
def run(masked, *settings):
  valid = VALID if masked else None
  f = lambda arrays: layer(arrays, *settings, token_valid=valid)
  return pieces.jit(pieces.with_gradients(f))


@pytest.mark.parametrize(
  "k,kind,causal,masked",
  [
    (2, "softmax", True, True),
    (1, "softmax", False, False),
    (2, "stick_breaking", True, True),
    (None, "softmax", True, True),
  ],
)
def test_equals_a_loop(k, kind, causal, masked):
  arrays, valid = arrays_of(), VALID if masked else None
  y, gradients = run(masked, k, kind, causal)(arrays)
  want, numeric = oracle.layer_gradients(
    lambda arrays, like: same(arrays, like, k, valid),
    lambda arrays, found, kept: oracle.attention_experts(
      arrays["x"],
      found,
      arrays,
      kept,
      kind=kind,
      causal=causal,
      token_valid=valid,
    ),
    jax.tree.map(common.float64, arrays),
  )
  pieces.close(y, want)
  for name, gradient in gradients.items():
    scale = max(1, np.abs(numeric[name]).max())
    pieces.close(gradient / scale, numeric[name] / scale)


@pytest.mark.parametrize("kind", ["softmax", "stick_breaking"])
def test_padding_holds_anything(kind):
  arrays, call = arrays_of(10), run(True, 2, kind, True)
  want = call(arrays)
  arrays["x"][~VALID] = np.nan
  arrays["logits"][~VALID] = np.nan
  jax.tree.map(np.testing.assert_array_equal, call(arrays), want)
  assert not want[0][~VALID].any()


def test_sequences_do_not_mix():
  arrays = arrays_of(20, lead=(2,))
  y = pieces.jit(layer)(arrays)
  for i in range(2):
    one = {**arrays, "x": arrays["x"][i], "logits": arrays["logits"][i]}
    found = same(one, None, 2)
    pieces.close(y[i], oracle.attention_experts(one["x"], found, one))


def test_all_heads_with_equal_weights():
  arrays = arrays_of(30)
  arrays["logits"][:] = 0
  y = pieces.jit(functools.partial(layer, k=3))(arrays)
  keys, values = (arrays["x"] @ arrays[name] for name in ("key", "value"))
  want = np.zeros((TOKENS, WIDTH))
  for head in range(EXPERTS):
    logits = (arrays["x"] @ arrays["query"][head]) @ keys.T / np.sqrt(HEAD)
    a = [oracle.softmax(row[: t + 1]) for t, row in enumerate(logits)]
    mixed = np.array([row @ values[: len(row)] for row in a])
    want += mixed @ arrays["output"][head] / EXPERTS
  pieces.close(y, want)


def test_heads_that_nobody_chooses_have_no_gradient():
  arrays = arrays_of(40)
  arrays["logits"][:, 1] = -20
  _, gradients = run(True, 2, "softmax", True)(arrays)
  for name in ("query", "output"):
    assert not gradients[name][1].any()
    assert all(np.any(gradients[name][e]) for e in (0, 2))


def test_head_that_may_read_nothing():
  arrays = arrays_of(50)

  @pieces.jit
  def call(arrays, readable):
    params = {name: arrays[name] for name in PARAMS}
    found = route(arrays["logits"], 2)
    return routing.attention_mixture(
      arrays["x"], found, params, token_valid=readable
    )

  readable = np.arange(TOKENS) > 1
  y = call(arrays, readable)
  assert not y[:2].any() and np.any(y[2:], axis=-1).all()
  want = oracle.attention_experts(
    arrays["x"], same(arrays, None, 2), arrays, token_valid=readable
  )
  pieces.close(y, want)


def turned(x, positions, xp=np):
  """Rotary embedding of two dimensions."""
  angle = (positions * 0.3)[:, None]
  a, b = x[..., 0], x[..., 1]
  cos, sin = xp.cos(angle), xp.sin(angle)
  return xp.stack([a * cos - b * sin, a * sin + b * cos], -1)


def test_rotation():
  # Where experts chose, positions are those of the tokens that they chose.
  arrays = arrays_of(60)

  @pieces.jit
  def call(arrays):
    params = {name: arrays[name] for name in PARAMS}
    return routing.attention_mixture(
      arrays["x"],
      route(arrays["logits"], None),
      params,
      attention="stick_breaking",
      rotate=functools.partial(turned, xp=jnp),
    )

  x, at = common.float64(arrays["x"]), np.arange(TOKENS)
  keys = turned((x @ arrays["key"])[:, None], at)[:, 0]
  queries = turned(np.einsum("td,edh->teh", x, arrays["query"]), at)
  want = np.zeros((TOKENS, WIDTH))
  for _, t, e, weight in same(arrays, None, None).edges():
    logits = keys[: t + 1] @ queries[t, e] / np.sqrt(HEAD)
    mixed = oracle.stick_breaking(logits) @ (x[: t + 1] @ arrays["value"])
    want[t] += weight * (mixed @ arrays["output"][e])
  pieces.close(call(arrays), want)


def test_stick():
  logits, readable = (
    pieces.draw(70, 4, 7),
    np.random.default_rng(0).random((4, 7)),
  )
  readable = readable < 0.7
  got = np.asarray(routing.stick_breaking(jnp.asarray(logits), readable))
  for i in range(4):
    want = np.zeros(7)
    want[readable[i]] = oracle.stick_breaking(logits[i][readable[i]])
    pieces.close(got[i], want, 1e-6, 1e-7)
  assert (got.sum(-1) < 1).all()
  # Far logits: the last key takes all, and gradients are finite.
  far = jnp.array([0.0, 300.0, -300.0])
  weights, pull = jax.vjp(
    lambda x: routing.stick_breaking(x, jnp.ones(3, bool)), far
  )
  np.testing.assert_allclose(weights, [0, 1, 0], atol=1e-6)
  assert np.isfinite(pull(jnp.ones(3))[0]).all()


def test_module():
  moa = pieces.made(
    lambda: routing.MoA(
      WIDTH,
      HEAD,
      EXPERTS,
      losses={routing.mutual_information: 0.5},
      rngs=nnx.Rngs(0),
    )
  )

  @pieces.module_jit
  def call(moa, x, valid):
    y = moa(x, token_valid=valid)
    return y, moa.metrics.get_value(), routing.auxiliary_loss(moa)

  x = pieces.draw(80, 2, TOKENS, WIDTH)
  valid = np.stack([VALID, ~VALID])
  y, metrics, loss = call(moa, x, valid)
  arrays = {
    name: common.float64(p[...])
    for name, p in [
      *moa.experts.items(),
      ("key", moa.key),
      ("value", moa.value),
    ]
  }
  assert set(arrays) == set(PARAMS)
  for i in range(2):
    logits = common.float64(x[i]) @ common.float64(moa.router.kernel[...])
    found = same({"logits": logits}, None, 2, valid[i])
    want = oracle.attention_experts(x[i], found, arrays, token_valid=valid[i])
    pieces.close(y[i], want)
  np.testing.assert_allclose(metrics["load"].sum(), 1, rtol=1e-6)
  np.testing.assert_allclose(loss, metrics["mutual_information"] / 2)
  call(moa, x + 1, ~valid)
  assert call.compilations() == 1


def test_pruned_module():
  moa = pieces.made(lambda: routing.MoA(WIDTH, HEAD, EXPERTS, rngs=nnx.Rngs(0)))
  pruned = routing.prune_experts(moa, np.array([2, 0]))
  assert pruned.experts["query"].shape == (2, WIDTH, HEAD)
  assert pruned.key.shape == moa.key.shape
  y = nnx.eval_shape(lambda moa, x: moa(x), pruned, jnp.ones((5, WIDTH)))
  assert y.shape == (5, WIDTH)
  y = pieces.module_jit(lambda moa, x: moa(x))(pruned, pieces.draw(0, 5, WIDTH))
  assert y.shape == (5, WIDTH)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["softmax", "stick_breaking"])
@pytest.mark.parametrize("axis_type", common.AXIS_TYPES)
def test_eight_devices(axis_type, kind):
  arrays, weights = arrays_of(90), pieces.draw(91, WIDTH, EXPERTS)

  def f(x):
    logits = jnp.einsum("btd,de->bte", x, weights)
    return layer({**arrays, "x": x, "logits": logits}, kind=kind)

  x = pieces.draw(92, 8, TOKENS, WIDTH)
  pieces.compare_on_eight_devices(f, x, axis_type)


def test_bad_input():
  arrays = arrays_of(lead=(2,))
  params = {name: arrays[name] for name in PARAMS}
  found = route(arrays["logits"], 2)
  call = functools.partial(
    routing.attention_mixture, arrays["x"], found, params
  )
  with pytest.raises(ValueError, match='attention must be "softmax" or'):
    call(attention="linear")
  with pytest.raises(ValueError, match="causal must be True with stick"):
    call(attention="stick_breaking", causal=False)
  with pytest.raises(ValueError, match=r"token_valid must be bool\[2, 6\]"):
    call(token_valid=VALID)
  of = lambda **given: routing.attention_mixture(
    **{"x": arrays["x"], "found": found, "params": params, **given}
  )
  with pytest.raises(ValueError, match=r"x must be \[..., tokens, d\]"):
    of(x=arrays["x"][0])
  with pytest.raises(ValueError, match='params must have "query"'):
    of(params={**params, "up": params["key"]})
  with pytest.raises(ValueError, match="found must be by token choice"):
    of(found=route(arrays["logits"], None))
