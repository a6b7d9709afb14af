"""Soft mixtures against the definition, and at their limits."""

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

TOKENS, EXPERTS, SLOTS, WIDTH = 5, 3, 2, 3
BANK = routing.FeedForward()
VALID = np.array([True, True, False, True, True])


def arrays_of(seed=0, lead=()):
  return {
    "x": pieces.draw(seed, *lead, TOKENS, WIDTH),
    "logits": pieces.draw(seed + 1, *lead, TOKENS, EXPERTS, SLOTS),
    **pieces.bank(seed + 2, EXPERTS, WIDTH, 2),
  }


def soft(arrays, token_valid=None):
  arrays = dict(arrays)
  x, logits = arrays.pop("x"), arrays.pop("logits")
  return routing.soft_mixture(x, logits, BANK, arrays, token_valid=token_valid)


def want(arrays, token_valid=None):
  logits = arrays["logits"].reshape(*arrays["x"].shape[:-1], EXPERTS * SLOTS)
  return oracle.soft_mixture(
    arrays["x"], logits, EXPERTS, oracle.ffn, arrays, token_valid=token_valid
  )


run = pieces.jit(pieces.with_gradients(soft))
masked = functools.partial(soft, token_valid=VALID)
run_masked = pieces.jit(pieces.with_gradients(masked))


def test_equals_the_definition():
  _, gradients = pieces.compare(soft, want, arrays_of(), run)
  # No token is dropped: all give to slots and take from them.
  assert (np.abs(gradients["x"]).max(-1) > 0).all()
  assert (gradients["logits"] != 0).all()


def test_padding_and_unsound_tokens():
  arrays = arrays_of(10)
  arrays["logits"][0, 1] = -np.inf  # no part of an expert's slots
  oracle_of = functools.partial(want, token_valid=VALID)
  y, gradients = run_masked(arrays)
  pieces.close(y, oracle_of(jax.tree.map(common.float64, arrays)))
  assert not y[2].any() and not gradients["x"][2].any()
  # Whatever stands in padding stays there.
  arrays["x"][2] = np.nan
  arrays["logits"][2] = np.nan
  again = run_masked(arrays)
  jax.tree.map(np.testing.assert_array_equal, again, (y, gradients))
  # So it does in a token with NaN or +inf among its logits.
  for value in (np.nan, np.inf):
    arrays["logits"][2] = [[0.0, 1.0], [2.0, value], [0.0, 0.0]]
    y, _ = run(arrays)
    pieces.close(y, want(jax.tree.map(common.float64, arrays)))


def test_slot_that_no_token_gives_to():
  arrays = arrays_of(20)
  arrays["logits"][:, 2, 0] = -np.inf
  y, gradients = run(arrays)
  pieces.close(y, want(jax.tree.map(common.float64, arrays)))
  assert all(np.isfinite(g).all() for g in gradients.values())
  y, gradients = run({**arrays, "logits": np.full((5, 3, 2), -np.inf, "f")})
  assert not y.any() and not any(np.any(g) for g in gradients.values())


def test_sequences_do_not_mix():
  arrays = arrays_of(30, lead=(2, 2))
  y = pieces.jit(soft)(arrays)
  for at in np.ndindex(2, 2):
    alone = {**arrays, "x": arrays["x"][at], "logits": arrays["logits"][at]}
    pieces.close(y[at], want(jax.tree.map(common.float64, alone)))


def test_sharp_logits_choose():
  # Token t fills slot t alone: each token goes through one expert.
  arrays = arrays_of(40)
  logits = 1e4 * np.eye(TOKENS, EXPERTS * SLOTS, dtype=np.float32)
  logits[:, -1] = -np.inf  # a slot without a token
  y, _ = run({**arrays, "logits": logits.reshape(TOKENS, EXPERTS, SLOTS)})
  rows = [
    oracle.ffn(arrays, t // SLOTS, row) for t, row in enumerate(arrays["x"])
  ]
  pieces.close(y, np.array(rows))


def test_low_precision():
  arrays = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), arrays_of(50))
  y = pieces.jit(soft)(arrays)
  assert y.dtype == jnp.bfloat16
  pieces.close(y, want(jax.tree.map(common.float64, arrays)), 0.1, 0.1)


def test_module():
  moe = pieces.made(
    lambda: routing.SoftMoE(WIDTH, 2, EXPERTS, SLOTS, rngs=nnx.Rngs(0))
  )
  moe.scale[...] = jnp.full((), 1.5)
  x = pieces.draw(60, 2, TOKENS, WIDTH)
  x[1, 2] = np.nan
  valid = np.stack([np.ones(5, bool), VALID])
  slots = common.float64(moe.slots[...])
  slots /= np.sqrt((slots**2).sum(0))
  params = {k: common.float64(v[...]) for k, v in moe.experts.items()}

  @pieces.module_jit
  def call(moe, x, valid):
    square = lambda moe: (moe(x, token_valid=valid) ** 2).sum()
    return moe(x, token_valid=valid), nnx.grad(square)(moe)

  y, gradients = call(moe, x, valid)
  for i in range(2):
    rows = common.float64(x[i])
    rows /= np.sqrt((rows**2).sum(-1, keepdims=True))
    logits = 1.5 * np.einsum("td,des->tes", rows, slots).reshape(TOKENS, -1)
    logits[~valid[i]] = 0
    of = oracle.soft_mixture(
      x[i], logits, EXPERTS, oracle.ffn, params, token_valid=valid[i]
    )
    pieces.close(y[i], of)
  leaves = jax.tree.leaves(gradients)
  assert len(leaves) == 5
  assert all(np.isfinite(g).all() and np.any(g) for g in leaves)
  call(moe, x + 1, valid[::-1])
  assert call.compilations() == 1


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", common.AXIS_TYPES)
def test_eight_devices(axis_type):
  arrays = arrays_of(70)
  arrays["x"] = pieces.draw(71, 8, TOKENS, WIDTH)
  weights = pieces.draw(72, WIDTH, EXPERTS, SLOTS)

  def f(x):
    logits = jnp.einsum("btd,des->btes", x, weights)
    return soft({**arrays, "x": x, "logits": logits})

  pieces.compare_on_eight_devices(f, arrays["x"], axis_type)


@pytest.mark.parametrize(
  "sequences", [pytest.param("x", marks=pytest.mark.slow), ("x", "y")]
)
def test_slots_go_to_their_experts(sequences):
  """Experts divided over an axis, that of sequences or another."""
  mesh = common.mesh_of(jax.sharding.AxisType.Explicit)
  x, weights = pieces.draw(75, 8, TOKENS, WIDTH), pieces.draw(76, WIDTH, 4, 2)
  params, seen = pieces.bank(77, 4, WIDTH, 2), []

  def bank(params, rows, sizes):
    seen.append(rows.shape)
    return BANK(params, rows, sizes)

  def f(x, params):
    logits = jnp.einsum("btd,des->btes", x, weights)
    return routing.soft_mixture(x, logits, bank, params)

  def run(x, params):
    loss = lambda *args: (f(*args) ** 2).sum()
    return f(x, params), jax.grad(loss, (0, 1))(x, params)

  want = pieces.jit(run)(x, params)
  place = lambda x, spec: common.place(x, mesh, spec)
  divided = jax.tree.map(lambda p: place(p, jax.P("y")), params)
  args = place(x, jax.P(sequences)), divided
  seen.clear()
  with jax.set_mesh(mesh):
    got = pieces.jit(run)(*args)
  jax.tree.map(lambda a, b: pieces.close(a, common.float64(b)), got, want)
  # A device has an eighth of the 8 x 4 x 2 slots.
  assert set(seen) == {(8, WIDTH)}
  y, (of_x, of_params) = got
  for given, found in zip(args, (of_x, of_params), strict=True):
    for a, b in zip(*map(jax.tree.leaves, (given, found)), strict=True):
      assert a.sharding.is_equivalent_to(b.sharding, 3)
  assert y.sharding.is_equivalent_to(args[0].sharding, 3)


def test_bad_input():
  x, bank = jnp.ones((2, 5, 3)), lambda params, rows, sizes: rows
  call = lambda x, logits, **given: routing.soft_mixture(
    x, logits, bank, {}, **given
  )
  for shape in [(5, 3, 2), (2, 5, 6), (2, 4, 3, 2)]:
    with pytest.raises(ValueError, match=r"logits must be \[..., tokens, exp"):
      call(x, jnp.ones(shape))
  with pytest.raises(ValueError, match="logits must have experts and slots"):
    call(x, jnp.ones((2, 5, 0, 2)))
  with pytest.raises(ValueError, match=r"token_valid must be bool\[2, 5\]"):
    call(x, jnp.ones((2, 5, 3, 2)), token_valid=jnp.ones((2, 5)))
