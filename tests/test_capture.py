"""What layers read, and its moments."""

import contextlib
import functools

from flax import linen
from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
import numpy as np
import pytest

from sparsejax import capture
from tests import common


class Block(nnx.Module):
  """A layer that runs twice, one of several dimensions, and a dropout."""

  def __init__(self, rngs):
    self.twice = nnx.Linear(4, 4, rngs=rngs)
    self.heads = nnx.LinearGeneral((2, 2), 3, axis=(-2, -1), rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)

  def __call__(self, x):
    x = self.twice(jnp.tanh(self.twice(x)))
    return self.heads(self.dropout(x).reshape(*x.shape[:-1], 2, 2))


class Dense(linen.Module):
  """Two layers, in Linen."""

  @linen.compact
  def __call__(self, x):
    x = jnp.tanh(linen.Dense(4, name="first")(x))
    return linen.DenseGeneral(3, axis=(-2, -1), name="heads")(
      x.reshape(*x.shape[:-1], 2, 2)
    )


def run(model, x):
  return model(x)


LAYER = linen.Dense(4)


def masked(block, batch):
  """A block, or variables of a Linen layer, on x and what goes with it."""
  x, valid = batch
  x = LAYER.apply(block, x) if isinstance(block, dict) else block(x)
  return jnp.tanh(x), valid


def halve(number, params, moments):
  return jax.tree.map(lambda x: x / 2, params), (number, moments)


X = np.random.default_rng(0).standard_normal((3, 5, 4)).astype(np.float32)
VALID = np.arange(15).reshape(3, 5) % 4 > 0


def test_inputs_of_nnx_layers():
  model = Block(nnx.Rngs(0, dropout=1))
  model.eval()
  params = lambda: nnx.to_pure_dict(nnx.state(model, nnx.Param))
  before = jax.tree.map(np.asarray, params())
  outputs, found = nnx.jit(functools.partial(capture.inputs, run))(model, X)
  np.testing.assert_allclose(outputs, model(X), rtol=1e-6)
  assert set(found) == {"twice/kernel", "heads/kernel"}
  middle = jnp.tanh(model.twice(X))
  both = jnp.concatenate([X.reshape(-1, 4), middle.reshape(-1, 4)])
  np.testing.assert_allclose(found["twice/kernel"], both, rtol=1e-6)
  heads = model.twice(middle)
  np.testing.assert_allclose(found["heads/kernel"], heads, rtol=1e-5)
  jax.tree.map(np.testing.assert_array_equal, params(), before)
  assert model.twice.dot_general is lax.dot_general


def test_counters_do_not_advance():
  model = Block(nnx.Rngs(0, dropout=1))  # drops at random
  count = model.dropout.rngs.count[...].item()
  capture.inputs(run, model, X)
  assert model.dropout.rngs.count[...].item() == count


def test_inputs_of_linen_layers():
  module = Dense()
  variables = module.init(jax.random.key(0), X)
  outputs, found = jax.jit(functools.partial(capture.inputs, module.apply))(
    variables, X
  )
  np.testing.assert_allclose(outputs, module.apply(variables, X), rtol=1e-6)
  assert set(found) == {"first/kernel", "heads/kernel"}
  np.testing.assert_array_equal(found["first/kernel"], X)
  first = variables["params"]["first"]
  middle = jnp.tanh(X @ first["kernel"] + first["bias"])
  np.testing.assert_allclose(found["heads/kernel"], middle, rtol=1e-5)


def test_what_is_not_asked_for_is_not_computed():
  model = Block(nnx.Rngs(0))
  model.eval()
  rebuild, state = nnx.split(model)

  def first(state, x):
    model = nnx.merge(rebuild, state)
    return capture.inputs(run, model, x, where=lambda n: "twice" in n)[1]

  text = jax.jit(first).lower(state, X).compile().as_text()
  assert text.count("dot(") <= 1  # the second call reads the first one's


@pytest.mark.parametrize("second", [True, False])
def test_moments_are_those_of_all_valid_rows(second):
  module = Dense()
  variables = module.init(jax.random.key(0), X)
  batches = [dict(x=X + i, valid=np.arange(15).reshape(3, 5) % (i + 2) > 0)
             for i in range(3)]  # fmt: skip
  found = capture.moments(
    lambda variables, batch: module.apply(variables, batch["x"]),
    variables,
    batches,
    where=lambda name: name.startswith("first"),
    valid=lambda batch: batch["valid"],
    second=second,
  )
  (moments,) = found.values()
  rows = np.concatenate([b["x"][b["valid"]] for b in batches]).astype(float)
  assert moments.count == len(rows)
  np.testing.assert_allclose(moments.mean, rows.mean(0), rtol=1e-5)
  np.testing.assert_allclose(moments.squares, (rows**2).mean(0), rtol=1e-5)
  np.testing.assert_allclose(moments.variance, rows.var(0), rtol=1e-4)
  if second:
    table = rows.T @ rows / len(rows)
    np.testing.assert_allclose(moments.second, table, rtol=1e-5, atol=1e-6)
  else:
    assert moments.second is None


def test_rows_that_do_not_count_may_hold_anything():
  x = jnp.array([[1.0, 2.0], [jnp.nan, jnp.inf]])
  moments = capture.Moments.zeros(2).add(x, jnp.array([True, False]))
  assert moments.mean.tolist() == [1, 2] and moments.count == 1
  none = capture.Moments.zeros(2).add(x, jnp.array([False, False]))
  assert not jnp.any(none.second) and none.count == 0


def test_large_tables_are_made_of_parts():
  x = np.random.default_rng(0).standard_normal((3, 1101)).astype(np.float32)
  table = np.asarray(capture.Moments.zeros(1101).add(jnp.asarray(x)).second)
  np.testing.assert_allclose(table, x.T @ x / 3, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(table, table.T)


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_blocks_in_order(kind):
  if kind == "nnx":
    blocks = [nnx.Linear(4, 4, rngs=nnx.Rngs(i)) for i in range(3)]
    kernel_of = lambda block: np.asarray(block.kernel[...])
  else:
    blocks = [LAYER.init(jax.random.key(i), X) for i in range(3)]
    kernel_of = lambda block: np.asarray(block["params"]["kernel"])
  kernels = [kernel_of(block) for block in blocks]
  batches = [(X, VALID), (X[::-1] + 1, VALID)]
  updated, extras = capture.in_order(
    masked, blocks, iter(batches), halve, valid=lambda batch: batch[1]
  )
  assert len(updated) == len(extras) == 3
  read = np.concatenate([x[valid] for x, valid in batches])
  for i, (number, moments) in enumerate(extras):
    (moments,) = moments.values()
    assert number == i and moments.count == len(read)
    np.testing.assert_allclose(moments.mean, read.mean(0), rtol=1e-4, atol=1e-6)
    table = read.T @ read / len(read)
    np.testing.assert_allclose(moments.second, table, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(kernel_of(updated[i]), kernels[i] / 2)
    np.testing.assert_array_equal(kernel_of(blocks[i]), kernels[i])
    read = np.tanh(read @ kernels[i] / 2)  # biases are 0


def test_sharded_blocks_in_order():
  mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
  x = np.random.default_rng(0).standard_normal((16, 4)).astype(np.float32)
  placed = jax.device_put(x, NamedSharding(mesh, jax.P("x")))
  blocks = [nnx.Linear(4, 4, rngs=nnx.Rngs(i)) for i in range(2)]
  keep = lambda number, params, moments: (params, moments)
  shardings = []

  def call(block, x):
    jax.debug.inspect_array_sharding(x, callback=shardings.append)
    return block(x)

  _, got = capture.in_order(call, blocks, [placed], keep)
  assert shardings  # of what each block read
  assert all(s.is_equivalent_to(placed.sharding, 2) for s in shardings)
  _, want = capture.in_order(run, blocks, [x], keep)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
    got,
    want,
  )


@pytest.mark.parametrize("axis_type", common.AXIS_TYPES, ids=lambda x: x.name)
def test_sharded_batches(axis_type):
  mesh = jax.make_mesh((8,), ("x",), axis_types=(axis_type,))
  x = np.random.default_rng(0).standard_normal((16, 4)).astype(np.float32)
  model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
  with jax.set_mesh(mesh):
    placed = jax.device_put(x, NamedSharding(mesh, jax.P("x")))
    (got,) = capture.moments(run, model, [placed] * 2).values()
  (want,) = capture.moments(run, model, [x] * 2).values()
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
    got,
    want,
  )


@pytest.mark.parametrize(
  "spec", [("x",), (None, "x"), ("y", "x"), ("x", None, "y")]
)
@pytest.mark.parametrize("run", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_explicit_rows(run, spec):
  """Rows, and inputs too, divided over devices by their type."""
  mesh = common.mesh_of(AxisType.Explicit)
  x = np.random.default_rng(0).standard_normal((8, 4, 6)).astype(np.float32)
  valid = np.arange(32).reshape(8, 4) % 3 > 0
  add = run(lambda moments, x, valid: moments.add(x, valid))
  want = capture.Moments.zeros(6).add(x, valid)
  for mesh_set in (False, True):
    with jax.set_mesh(mesh) if mesh_set else contextlib.nullcontext():
      placed = common.place(x, mesh, jax.P(*spec))
      rows = common.place(valid, mesh, jax.P(*spec[:2]))
      got = add(capture.Moments.zeros(6), placed, rows)
      again = add(got, placed, rows)
    assert again.second.sharding.is_fully_replicated
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
      got,
      want,
    )
    assert again.count == 2 * want.count
    np.testing.assert_allclose(again.second, want.second, rtol=1e-5, atol=1e-6)


def test_errors():
  model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="where must choose a layer"):
    capture.inputs(run, model, X, where=lambda name: False)
  with pytest.raises(ValueError, match="batches"):
    capture.moments(run, model, [])
  with pytest.raises(ValueError, match="blocks must hold"):
    capture.in_order(run, [], [X], halve)
  with pytest.raises(ValueError, match="x must be"):
    capture.Moments.zeros(3).add(X)
  with pytest.raises(ValueError, match="valid"):
    capture.Moments.zeros(4).add(X, jnp.ones(3, bool))
