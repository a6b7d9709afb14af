"""Condensed weights against dense masked ones, alone and in models."""

import dataclasses
import functools

from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pallas_kernels
from sparsejax import select
from sparsejax import weights
from tests import common
from tests.kernels.problem import jit

FAN_IN, BLOCK = select.ConstantFanIn(), select.Block((4, 8))
K, N = 24, 16


def problem(structure, lead=(3, 2), seed=0, dtype=np.float32, dead=()):
  """x, w, mask, dy."""
  rng = np.random.default_rng(seed)
  normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
  mask = np.array(structure.mask(normal(K, N).astype(jnp.float32), 0.3))
  mask[:, list(dead)] = False
  return normal(*lead, K), normal(K, N), jnp.asarray(mask), normal(*lead, N)


def condensed(w, mask, structure):
  return weights.condense({"w": w}, {"w": mask}, structure)["w"]


def call(x, weight, dy):
  """The result and gradients by x and the values."""

  def f(x, values):
    w = dataclasses.replace(weight, values=values)
    return weights.condensed_matmul(x, w)

  out, pull = jax.vjp(f, x, weight.values)
  return out, *pull(dy)


run = jit(call)


def compare(x, w, mask, dy, weight, rtol=1e-5):
  out, dx, dvalues = run(x, weight, dy)
  sparse = np.where(mask, common.float64(w), 0)
  x64, dy64 = common.float64(x), common.float64(dy)
  dw = x64.reshape(-1, K).T @ dy64.reshape(-1, N) * np.asarray(mask)
  got_dw = dataclasses.replace(weight, values=dvalues).dense()
  assert dvalues.shape == weight.values.shape
  for a, b in ((out, x64 @ sparse), (dx, dy64 @ sparse.T), (got_dw, dw)):
    assert a.dtype == x.dtype
    np.testing.assert_allclose(common.float64(a), b, rtol, 10 * rtol)


@pytest.mark.parametrize("structure", [FAN_IN, BLOCK], ids=str)
@pytest.mark.parametrize("dead", [(), tuple(range(8, 16))], ids=str)
def test_equals_masked_dense(structure, dead):
  x, w, mask, dy = problem(structure, dead=dead)
  weight = condensed(w, mask, structure)
  np.testing.assert_array_equal(weight.dense(), jnp.where(mask, w, 0))
  compare(x, w, mask, dy, weight)


@pytest.mark.parametrize("lead", [(), (1,), (5,), (6,), (17,), (0,)], ids=str)
def test_rows(lead):
  x, w, mask, dy = problem(FAN_IN, lead)
  compare(x, w, mask, dy, condensed(w, mask, FAN_IN))


@pytest.mark.parametrize("fan_in", [0, 1, 2, 9, K])
def test_any_fan_in(fan_in):
  rng = np.random.default_rng(0)
  mask = rng.random((K, N)).argsort(0) < fan_in
  x, w, _, dy = problem(FAN_IN, (7,))
  weight = condensed(w, jnp.asarray(mask), FAN_IN)
  if fan_in == K:  # a mask that excludes nothing stays dense
    assert weight is w
    weight = weights.CondensedWeight.from_dense(w, mask)
  compare(x, w, mask, dy, weight)


def test_bfloat16_accumulates_in_float32():
  x, w, mask, dy = problem(FAN_IN, (40,), dtype=jnp.bfloat16)
  compare(x, w, mask, dy, condensed(w, mask, FAN_IN), rtol=1e-2)


def test_many_inputs_are_numbered_in_int32():
  w = jnp.zeros((2**16 + 1, 2)).at[-1].set(3.0)
  mask = jnp.zeros(w.shape, bool).at[-1].set(True)
  weight = condensed(w, mask, FAN_IN)
  assert weight.inputs.dtype == jnp.int32
  x = jnp.zeros(len(w)).at[-1].set(2.0)
  assert weights.condensed_matmul(x, weight).tolist() == [6.0, 6.0]


def test_nan_reaches_what_reads_it():
  x, w, mask, dy = problem(FAN_IN)
  weight = condensed(w, mask, FAN_IN)
  out, _, dvalues = run(x.at[..., 5].set(jnp.nan), weight, dy)
  np.testing.assert_array_equal(jnp.isnan(out[0, 0]), mask[5])
  np.testing.assert_array_equal(jnp.isnan(dvalues), weight.inputs == 5)


def test_second_order():
  x, w, mask, dy = problem(FAN_IN)
  weight = condensed(w, mask, FAN_IN)

  def penalty(f, x, w):
    dx, dw = jax.grad(lambda x, w: (f(x, w) * dy).sum(), (0, 1))(x, w)
    return (dx**2).sum() + (dw**3).sum()

  with_values = lambda v: dataclasses.replace(weight, values=v)
  ours = lambda x, v: weights.condensed_matmul(x, with_values(v))
  theirs = lambda x, v: x @ with_values(v).dense()
  got, want = (
    jit(jax.grad(functools.partial(penalty, f), (0, 1)))(x, weight.values)
    for f in (ours, theirs)
  )
  for a, b in zip(got, want):
    np.testing.assert_allclose(a, b, 1e-4, 1e-3)


def test_vmap():
  x, w, mask, dy = problem(FAN_IN, (4, 3))
  weight = condensed(w, mask, FAN_IN)
  got = jit(jax.vmap(call, (0, None, 0)))(x, weight, dy)
  for i in range(4):
    for a, b in zip(got, run(x[i], weight, dy[i]), strict=True):
      np.testing.assert_allclose(a[i], b, 1e-5, 1e-5)


def test_wild_inputs_stay_in_bounds():
  x, w, mask, dy = problem(FAN_IN)
  weight = condensed(w, mask, FAN_IN)
  wild = dataclasses.replace(weight, inputs=weight.inputs + 60_000)
  out, dx, _ = run(x, wild, dy)  # all read the last row
  np.testing.assert_allclose(out, x @ wild.dense(), 1e-5, 1e-4)
  np.testing.assert_allclose(dx, dy @ wild.dense().T, 1e-5, 1e-4)


@pytest.mark.parametrize("axis_type", common.AXIS_TYPES, ids=str)
def test_sharded(axis_type):
  x, w, mask, dy = problem(FAN_IN, (8, 3))
  weight = condensed(w, mask, FAN_IN)
  want = run(x, weight, dy)
  mesh = common.mesh_of(axis_type)
  on = lambda a, *spec: common.place(a, mesh, jax.P(*spec))
  with jax.set_mesh(mesh):
    cut = dataclasses.replace(
      weight,
      values=on(weight.values, None, "y"),
      inputs=on(weight.inputs, None, "y"),
    )
    args = on(x, "x"), cut, on(dy, "x", None, "y")
    f = jit(call).lower(*args).compile()
    got = f(*args)
  assert common.moved(f) == set()
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, 1e-5, 1e-4)
  shards = [a.sharding.shard_shape(a.shape) for a in got]
  assert shards == [(2, 3, 8), (2, 3, K), (weight.values.shape[0], 8)]


def test_condense_takes_what_an_optimizer_chose():
  params = {"mlp": {"kernel": problem(FAN_IN)[1], "bias": jnp.ones(N)}}
  params["out"] = {"kernel": jnp.arange(float(N * 8)).reshape(N, 8)}
  structures = {"mlp": FAN_IN, "out": select.Block((8, 4))}
  tx = weights.sparsify(
    optax.sgd(0.1),
    weights.Rule(sparsity=0.5, structure=structures, distribution="uniform"),
    key=jax.random.key(0),
  )
  state = jit(tx.init)(params)
  params = jit(weights.sparse_params)(state, params)
  masks = weights.masks(state, params)
  found = weights.condense(params, masks, structures)
  assert isinstance(found["mlp"]["kernel"], weights.CondensedWeight)
  assert isinstance(found["out"]["kernel"], pallas_kernels.BlockSparseWeight)
  assert found["mlp"]["bias"] is params["mlp"]["bias"]
  for layer in ("mlp", "out"):
    dense = found[layer]["kernel"].dense()
    np.testing.assert_array_equal(dense, params[layer]["kernel"])


class MLP(nnx.Module):
  def __init__(self, rngs):
    self.up = nnx.Linear(K, N, rngs=rngs)
    self.more = nnx.List([nnx.Linear(N, 8, rngs=rngs)])
    self.norm = nnx.LayerNorm(8, rngs=rngs)

  def __call__(self, x):
    return self.norm(self.more[0](nnx.relu(self.up(x))))


def test_a_model_trains_as_the_masked_one():
  x, _, mask, _ = problem(FAN_IN)
  model = MLP(nnx.Rngs(0))
  masks = {
    "up": {"kernel": mask},
    "more": {0: {"kernel": jnp.kron(jnp.eye(2), jnp.ones((8, 4))) > 0}},
  }
  structures = {"up": FAN_IN, "more": BLOCK}
  structures["more"] = select.Block((8, 4))
  fast = weights.condense_layers(model, masks, structures)
  assert model.up.kernel.shape == (K, N)
  assert fast.up.kernel.shape == (7, N)
  assert fast.more[0].kernel.shape == (2, 8, 4)

  @nnx.jit
  def step(model, optimizer):
    loss, grads = nnx.value_and_grad(lambda m: (m(x)[..., 0] ** 2).sum())(model)
    optimizer.update(model, grads)
    return loss

  tx = weights.keep_masked(masks)
  masked = nnx.Optimizer(
    model, optax.chain(optax.adam(1e-2), tx), wrt=nnx.Param
  )
  for layer, at in ((model.up, "up"), (model.more[0], "more")):
    here = masks[at]["kernel"] if at == "up" else masks[at][0]["kernel"]
    layer.kernel[...] = jnp.where(here, layer.kernel[...], 0)
  condensed = nnx.Optimizer(fast, optax.adam(1e-2), wrt=nnx.Param)
  losses = [(step(model, masked), step(fast, condensed)) for _ in range(3)]
  np.testing.assert_allclose(*zip(*losses, strict=True), rtol=1e-4)
  assert losses[-1][0] < losses[0][0]


@pytest.mark.parametrize("structure", [FAN_IN, BLOCK], ids=str)
def test_a_state_of_variables(structure):
  x, _, mask, _ = problem(structure)
  model = nnx.Linear(K, N, rngs=nnx.Rngs(0))
  params = nnx.state(model, nnx.Param)
  found = weights.condense(params, {"kernel": mask}, structure)
  got = weights.condensed_matmul(x, found["kernel"])
  want = x @ jnp.where(mask, model.kernel[...], 0)
  np.testing.assert_allclose(got, want, 1e-5, 1e-5)
  plain = weights.condensed_matmul(x, model.kernel)
  np.testing.assert_allclose(plain, x @ model.kernel[...], 1e-5, 1e-5)


def test_layers_keep_what_their_kernels_say():
  mask = problem(FAN_IN)[2]

  class Frozen(nnx.Param):
    pass

  model = nnx.Linear(K, N, rngs=nnx.Rngs(0))
  model.kernel = Frozen(model.kernel[...], note="mine")
  fast = weights.condense_layers(model, {"kernel": mask}, FAN_IN)
  assert type(fast.kernel) is Frozen and fast.kernel.note == "mine"
  assert fast.kernel.shape == (7, N) and model.kernel.shape == (K, N)


@pytest.mark.parametrize("structure", [FAN_IN, BLOCK], ids=str)
def test_layers_keep_the_axis_of_their_outputs(structure):
  x, _, mask, _ = problem(structure)
  mesh = common.mesh_of(jax.sharding.AxisType.Auto)
  init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("x", "y"))
  with jax.set_mesh(mesh):
    model = nnx.Linear(K, N, kernel_init=init, rngs=nnx.Rngs(0))
    fast = weights.condense_layers(model, {"kernel": mask}, structure)
    want = (None, "y") if structure is FAN_IN else (None, None, None)
    assert fast.kernel.get_metadata()["out_sharding"] == want
    masked = x @ jnp.where(mask, model.kernel[...], 0)
    np.testing.assert_allclose(fast(x), masked, 1e-5, 1e-5)


def test_layers_with_a_dot_general_of_their_own_are_refused():
  mask = problem(FAN_IN)[2]
  mine = lambda *args, **options: jax.lax.dot_general(*args, **options)
  model = nnx.Sequential(nnx.Linear(K, N, dot_general=mine, rngs=nnx.Rngs(0)))
  masks = {"layers": {0: {"kernel": mask}}}
  with pytest.raises(ValueError, match="layers/0/kernel: its layer must"):
    weights.condense_layers(model, masks, FAN_IN)


def test_in_linen():
  # Linen checks a kernel's shape, so the layer is intercepted instead.
  x, w, mask, _ = problem(FAN_IN)
  params = {"Dense_0": {"kernel": w * mask, "bias": jnp.arange(float(N))}}
  model = nn.Sequential([nn.Dense(N)])
  params = {"layers_0": params["Dense_0"]}
  masks = {"layers_0": {"kernel": mask}}
  found = weights.condense(params, masks, FAN_IN)

  def condensed_dense(following, args, kwargs, context):
    layer = context.module
    if not isinstance(layer, nn.Dense):
      return following(*args, **kwargs)
    here = layer.variables["params"]
    return weights.condensed_matmul(args[0], here["kernel"]) + here["bias"]

  want = model.apply({"params": params}, x)
  with nn.intercept_methods(condensed_dense):
    got = model.apply({"params": found}, x)
  np.testing.assert_allclose(got, want, 1e-5, 1e-5)


def condense(mask, structure, w=None):
  w = jnp.ones((4, 4)) if w is None else w
  return weights.condense({"a": {"b": w}}, {"a": {"b": mask}}, structure)


HALF = jnp.eye(4, dtype=bool)
MATMUL = functools.partial(
  weights.condensed_matmul,
  weight=weights.CondensedWeight.from_dense(jnp.ones((4, 4)), HALF),
)


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: condense(HALF.at[0, 1].set(True), FAN_IN), "a/b: mask must have"),
    (lambda: condense(HALF, select.Block((2, 2))), "a/b: its mask must be of"),
    (lambda: condense(HALF, select.Block((3, 2))), "a/b: Block shape"),
    (lambda: condense(HALF, select.NM(1, 4)), "a/b: structures must give"),
    (lambda: condense(HALF[:2], FAN_IN), r"masks\['a/b'\] must be a boolean"),
    (lambda: condense(HALF * 1, FAN_IN), r"masks\['a/b'\] must be a boolean"),
    (lambda: condense(HALF, {"c": FAN_IN}), "structures has a pattern"),
    (
      lambda: condense(HALF[None], FAN_IN, jnp.ones((1, 4, 4))),
      "a/b: must be a kernel",
    ),
    (
      lambda: jax.jit(lambda m: condense(m, FAN_IN))(HALF),
      r"masks\['a/b'\] must be concrete",
    ),
    (lambda: MATMUL(jnp.ones(3)), r"x must be \[..., 4\]"),
    (lambda: MATMUL(jnp.ones(4, jnp.bfloat16)), "x must have the dtype"),
    (
      lambda: weights.condense_layers(
        nnx.Embed(4, 4, rngs=nnx.Rngs(0)), {"embedding": HALF}, FAN_IN
      ),
      "masks must be of kernels of nnx.Linear, got .'embedding'",
    ),
  ],
)
def test_errors(call, message):
  with pytest.raises(ValueError, match=message):
    call()
