"""Banks of experts and the shared one, against loops over rows."""

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
from tests.routing import problem

ACTIVATIONS = {
  "relu": jax.nn.relu,
  "relu2": routing.relu2,
  "gelu": jax.nn.gelu,
  "silu": jax.nn.silu,
}
SIZES = np.array([3, 0, 2], np.int32)  # two rows of seven belong to nobody


@pytest.mark.parametrize(
  "name,gated",
  [("relu", True), ("relu2", False), ("gelu", False), ("silu", True)],
)
def test_rows_in_groups(name, gated):
  arrays = {"x": pieces.draw(0, 7, 3), **pieces.bank(1, 3, 3, 4, 2, gated)}
  bank = routing.FeedForward(ACTIVATIONS[name])

  def f(arrays):
    params = {k: v for k, v in arrays.items() if k != "x"}
    return bank(params, arrays["x"], SIZES)

  def want(arrays):
    one = functools.partial(oracle.ffn, activation=name)
    return oracle.bank_rows(one, arrays, arrays["x"], SIZES)

  y, gradients = pieces.compare(f, want, arrays)
  assert not y[5:].any() and not gradients["x"][5:].any()
  assert not gradients["up"][1].any()  # of the expert without rows


@pytest.mark.parametrize(
  "names",
  [
    "up gate down",
    "down",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("up", "gate")),
  ],
)
def test_biases(names):
  """Each in its place; scattered and scaled as the products are."""
  params = pieces.bank(1, 3, 3, 4, 2, "gate" in names)
  for i, name in enumerate(names.split()):
    params[f"{name}_bias"] = pieces.draw(5 + i, 3, params[name].shape[-1])
  arrays = {"x": pieces.draw(0, 4, 3), "scale": pieces.draw(9, 7), **params}
  gather, scatter = np.array([3, 0, 0, 1, 2, 2, 1]), np.array([0, 1] * 3 + [3])
  bank = routing.FeedForward(jax.nn.relu)

  def f(arrays):
    params = {k: v for k, v in arrays.items() if k not in ("x", "scale")}
    return bank(
      params,
      arrays["x"],
      SIZES,
      gather=gather,
      scatter=scatter,
      num_rows=5,
      row_scale=arrays["scale"],
    )

  def want(arrays):
    y = np.zeros((5, 2))
    rows = oracle.bank_rows(
      problem.biased_ffn, arrays, arrays["x"][gather[:5]], SIZES
    )
    np.add.at(y, scatter[:5], rows * arrays["scale"][:5, None])
    return y

  pieces.compare(f, want, arrays)


def test_names_of_parameters():
  params, x = pieces.bank(1, 3, 3, 4), pieces.draw(0, 7, 3)
  bank = routing.FeedForward()
  for more in ("bias", "gate_bias", "kernel"):
    wrong = {**params, more: params["up"]}
    wrong.pop("gate")
    with pytest.raises(ValueError, match=r'^params must have "up", "down"'):
      bank(wrong, x, SIZES)
  with pytest.raises(ValueError, match=r"^params must .* got \['gate', 'up'\]"):
    bank({k: params[k] for k in ("up", "gate")}, x, SIZES)


def test_rows_are_gathered_and_scattered():
  x, params = pieces.draw(0, 4, 3), pieces.bank(1, 3, 3, 4)
  gather = np.array([3, 0, 0, 1, 2])
  scale = pieces.draw(4, 5)
  bank = routing.FeedForward()
  y = bank(
    params,
    x,
    SIZES,
    gather=gather,
    scatter=gather,
    num_rows=4,
    row_scale=jnp.asarray(scale),
  )
  rows = oracle.bank_rows(oracle.ffn, params, x[gather], SIZES)
  want = np.zeros((4, 3))
  np.add.at(want, gather, rows * scale[:, None])
  pieces.close(y, want)


def test_initial_parameters():
  bank = routing.FeedForward()
  init = functools.partial(bank.init, experts=3, width=64, hidden=32)
  params = jax.eval_shape(
    functools.partial(init, dtype=jnp.bfloat16), jax.random.key(0)
  )
  assert {k: v.shape for k, v in params.items()} == {
    "up": (3, 64, 32),
    "gate": (3, 64, 32),
    "down": (3, 32, 64),
  }
  assert {v.dtype for v in params.values()} == {jnp.dtype(jnp.bfloat16)}
  assert set(
    jax.eval_shape(functools.partial(init, gated=False), jax.random.key(0))
  ) == {
    "up",
    "down",
  }
  for gated in (False, True):
    bank = routing.FeedForward(gated=gated, biased=True)
    make = lambda bank=bank: routing.MoE(64, 32, 3, bank=bank, rngs=nnx.Rngs(0))
    of = nnx.eval_shape(make).experts
    biases = {"up_bias": (3, 32), "down_bias": (3, 64)}
    biases |= {"gate_bias": (3, 32)} if gated else {}
    assert {k: v.shape for k, v in of.items() if "bias" in k} == biases
    assert ("gate" in of) == gated
  params = pieces.jit(init)(jax.random.key(1))
  np.testing.assert_allclose(params["up"].std(), 64**-0.5, rtol=0.05)
  np.testing.assert_allclose(params["down"].std(), 32**-0.5, rtol=0.05)


@pytest.mark.parametrize("output_gate", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_shared_expert(gated, output_gate):
  options = dict(gated=gated, output_gate=output_gate)
  shared = pieces.made(
    lambda: routing.SharedExpert(3, 4, rngs=nnx.Rngs(0), **options)
  )
  x = pieces.draw(0, 2, 5, 3)
  params = {k: common.float64(v[...])[None] for k, v in shared.params.items()}
  want = np.array([oracle.ffn(params, 0, row) for row in x.reshape(-1, 3)])
  if output_gate:
    gate = common.float64(shared.output_gate[...])
    want *= oracle.sigmoid(x.reshape(-1, 3) @ gate)
  pieces.close(shared(x), want.reshape(x.shape))
  assert shared(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_shared_expert_in_a_mixture():
  def make():
    rngs = nnx.Rngs(0)
    shared = routing.SharedExpert(3, 4, output_gate=True, rngs=rngs)
    return routing.MoE(3, 4, 2, shared=shared, rngs=rngs)

  @pieces.module_jit
  def call(moe, x):
    found, _ = moe.route(x)
    nowhere = found.where(jnp.zeros(len(found.token), bool))
    routed = routing.dropless(x, found, moe.bank, nnx.as_pure(moe.experts))
    return moe.mix(x, nowhere), moe.shared(x), moe(x) - routed

  alone, shared, rest = call(
    pieces.made(make), jnp.asarray(pieces.draw(0, 5, 3))
  )
  pieces.close(alone, shared)
  pieces.close(rest, shared)
