"""What layers read, its moments, and what modules return."""

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

from experiments.models import bert
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


def nnx_model():
  model = Block(nnx.Rngs(0))
  model.eval()
  return run, model, "twice", "heads"


def linen_model():
  module = Dense()
  variables = module.init(jax.random.key(0), X)
  return module.apply, variables, "first", "heads"


models = pytest.mark.parametrize(
  "make", [nnx_model, linen_model], ids=["nnx", "linen"]
)


def jit(f, call, model, *static):
  """f of this model as a function of its arrays and of x."""
  if not isinstance(model, nnx.Module):
    return jax.jit(lambda v, x: f(call, v, *static, x)), model
  rebuild, state = nnx.split(model)
  return jax.jit(lambda s, x: f(call, nnx.merge(rebuild, s), *static, x)), state


@models
def test_outputs_of_modules(make):
  call, model, first, heads = make()
  read, arrays = jit(capture.outputs, call, model)
  result, found = read(arrays, X)
  np.testing.assert_allclose(result, call(model, X), rtol=1e-6)
  assert {first, heads, ""} <= set(found)
  np.testing.assert_array_equal(found[""], result)
  np.testing.assert_array_equal(found[heads], result)
  ys = found[first]
  if make is nnx_model:  # it runs twice
    assert len(ys) == 2
    np.testing.assert_allclose(ys[0], model.twice(X), rtol=1e-6)
    np.testing.assert_allclose(
      ys[1], model.twice(jnp.tanh(model.twice(X))), rtol=1e-5
    )
    assert type(model.twice) is nnx.Linear
    assert not hasattr(model.twice, "_behind")
  else:
    first = model["params"]["first"]
    want = X @ first["kernel"] + first["bias"]
    np.testing.assert_allclose(ys, want, rtol=1e-5, atol=1e-6)
  _, some = capture.outputs(call, model, X, where=lambda path: path == heads)
  assert set(some) == {heads}


@models
def test_splice(make):
  call, model, first, heads = make()
  want = call(model, X)
  same = capture.splice(call, model, {first: lambda y: y, heads: jnp.copy}, X)
  np.testing.assert_array_equal(same, want)
  np.testing.assert_array_equal(capture.splice(call, model, {}, X), want)
  changes = {first: jnp.zeros_like, heads: lambda y: y + 1}
  change, arrays = jit(capture.splice, call, model, changes)
  zeros = call(model, 0 * X)  # with biases of zero
  np.testing.assert_allclose(change(arrays, X), zeros + 1, rtol=1e-6)
  np.testing.assert_array_equal(call(model, X), want)
  change(arrays, X + 1)
  assert change._cache_size() == 1


@models
def test_gradients_pass_through_what_is_spliced(make):
  call, model, _, heads = make()

  def loss(amount, x):
    steer = {heads: lambda y: y + amount * jnp.arange(3.0)}
    return capture.splice(call, model, steer, x).sum()

  by_amount, by_x = jax.jit(jax.grad(loss, (0, 1)))(0.5, X)
  assert by_amount == 3 * X.size / 4
  want = jax.grad(lambda x: call(model, x).sum())(X)
  np.testing.assert_allclose(by_x, want, rtol=1e-5, atol=1e-6)


def test_gradients_of_the_parameters_of_a_spliced_model():
  model = nnx.Sequential(
    *(nnx.Linear(4, 4, use_bias=False, rngs=nnx.Rngs(i)) for i in range(2))
  )
  loss = lambda model: capture.splice(
    run, model, {"layers/0": lambda y: 2 * y}, X
  ).sum()
  got = nnx.grad(loss)(model)
  plain = nnx.grad(lambda model: run(model, X).sum())(model)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, 2 * b, rtol=1e-5),
    nnx.to_pure_dict(got),
    nnx.to_pure_dict(plain),
  )
  # A call that is compiled itself changes, too.
  inner = nnx.jit(run)
  np.testing.assert_allclose(
    capture.splice(inner, model, {"layers/1": lambda y: y + 1}, X),
    run(model, X) + 1,
    rtol=1e-5,
    atol=1e-6,
  )


@models
def test_the_outer_one_sees_what_the_inner_one_makes(make):
  call, model, first, heads = make()
  zero, one = {first: jnp.zeros_like}, {first: lambda y: y + 1}
  change = functools.partial(spliced, call, zero)
  result, found = capture.outputs(change, model, X)
  assert not np.any(jax.tree.leaves(found[first]))
  np.testing.assert_array_equal(found[heads], result)
  read = functools.partial(capture.outputs, call)
  again, found = capture.splice(read, model, zero, X)
  assert np.any(jax.tree.leaves(found[first]))
  np.testing.assert_array_equal(again, result)
  both = capture.splice(change, model, one, X)
  ones = capture.splice(call, model, {first: jnp.ones_like}, X)
  np.testing.assert_allclose(both, ones, rtol=1e-6)


def spliced(call, changes, model, x):
  return capture.splice(call, model, changes, x)


def test_the_residual_stream_of_an_encoder():
  config = bert.Config(
    vocab_size=9,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=8,
  )
  model = bert.Bert(config, rngs=nnx.Rngs(0))
  tokens = jnp.arange(6).reshape(2, 3)
  _, found = capture.outputs(
    run, model, tokens, where=lambda path: path.startswith("blocks/0")
  )
  assert "blocks/0/attention" in found and "blocks/1" not in found
  stream = found["blocks/0"]
  np.testing.assert_array_equal(
    capture.splice(run, model, {"blocks/0": lambda y: stream}, tokens * 0),
    model(tokens),
  )


@models
def test_modules_that_are_not_there(make):
  call, model, first, heads = make()
  with pytest.raises(ValueError, match=rf"{first}.*{heads}.*got \['none'\]"):
    capture.splice(call, model, {heads: jnp.copy, "none": jnp.copy}, X)
  with pytest.raises(ValueError, match="where must choose a module"):
    capture.outputs(call, model, X, where=lambda path: False)


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
