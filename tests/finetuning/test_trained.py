import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from sparsejax import finetuning
from tests import common
from tests.oracles import finetuning as oracle

RNG = np.random.default_rng(0)
SHAPES = {"a": (6, 5), "b": (4, 6), "c": (7,), "d": (3, 2, 5), "e": ()}


def drawn(dtype=np.float32):
  return {
    n: jnp.asarray(RNG.normal(size=s).astype(dtype)) for n, s in SHAPES.items()
  }


def bits(x, where=()):
  return np.asarray(x)[where].tobytes()


MASKS = {n: RNG.random(s) < 0.4 for n, s in SHAPES.items()}
MASKS["e"] = np.array(True)
BLOCKS = finetuning.Blocks(np.array([[1, 0], [0, 2]]), (2, 2))


def blocks_mask():
  mask = np.zeros((4, 6), bool)
  mask[2:4, 0:2] = mask[0:2, 4:6] = True
  return mask


def slice_mask(shape, axis, start, stop):
  mask = np.zeros(shape, bool)
  mask[(slice(None),) * axis + (slice(start, stop),)] = True
  return mask


MIXED = {
  "a": finetuning.Slice(1, 1, 4),
  "b": BLOCKS,
  "c": False,
  "d": finetuning.Slice(0, 2, 3),
  "e": True,
}
MIXED_MASKS = {
  "a": slice_mask((6, 5), 1, 1, 4),
  "b": blocks_mask(),
  "c": np.zeros(7, bool),
  "d": slice_mask((3, 2, 5), 0, 2, 3),
  "e": np.array(True),
}


@pytest.mark.parametrize(
  ("chosen", "masks"), [(MASKS, MASKS), (MIXED, MIXED_MASKS)]
)
def test_adamw_of_the_chosen_alone(chosen, masks):
  params, grads = drawn(), [drawn() for _ in range(3)]
  tx = finetuning.train_only(optax.adamw(0.1, weight_decay=0.3), chosen)
  state = jax.jit(tx.init)(params)

  @jax.jit
  def step(grads, state, params):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  new = params
  for g in grads:
    new, state = step(g, state, new)
  wide = lambda tree: [np.asarray(tree[n], np.float64) for n in SHAPES]
  want, (mu, nu) = oracle.masked_adamw(
    wide(params),
    [masks[n] for n in SHAPES],
    [wide(g) for g in grads],
    0.1,
    weight_decay=0.3,
  )
  for n, w in zip(SHAPES, want, strict=True):
    # Three steps of f32 arithmetic on numbers of about 1.
    np.testing.assert_allclose(new[n], w, rtol=1e-5, atol=1e-5)
    outside = ~masks[n]
    assert bits(new[n], outside) == bits(params[n], outside)
  adam = state.inner[0]
  count = oracle.trained_count([masks[n] for n in SHAPES])
  assert sum(x.size for x in jax.tree.leaves(adam.mu)) == count == len(mu)
  got = np.sort(np.concatenate([x.ravel() for x in jax.tree.leaves(adam.nu)]))
  np.testing.assert_allclose(got, np.sort(nu), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("chosen", [MASKS, MIXED])
def test_take_and_put(chosen):
  params, other = drawn(), drawn()
  parts = finetuning.take(params, chosen)
  back = finetuning.put(params, chosen, parts)
  for n in params:
    assert bits(back[n]) == bits(params[n])
  moved = finetuning.put(params, chosen, finetuning.take(other, chosen))
  masks = MASKS if chosen is MASKS else MIXED_MASKS
  for n in params:
    np.testing.assert_array_equal(
      moved[n], np.where(masks[n], other[n], params[n])
    )


def test_order_is_row_major_and_blocks_are_the_oracles():
  x = np.arange(24.0).reshape(4, 6)
  mask = RNG.random((4, 6)) < 0.5
  chosen = finetuning.choose({"b": jnp.asarray(x)}, {"b": mask})
  np.testing.assert_array_equal(chosen["b"].take(jnp.asarray(x)), x[mask])
  where = [(1, 0), (0, 2)]
  part = BLOCKS.take(jnp.asarray(x))
  np.testing.assert_array_equal(part, oracle.gather_blocks(x, where, (2, 2)))
  np.testing.assert_array_equal(
    BLOCKS.put(jnp.asarray(x), -part),
    oracle.scatter_blocks(x, where, -np.asarray(part)),
  )


def test_gradient_by_parts_is_that_part_of_the_gradient():
  params = drawn()
  choices = finetuning.choose(params, MIXED)

  def loss(p):
    return sum(jnp.sum(jnp.sin(x) * (1 + i)) for i, x in enumerate(p.values()))

  @jax.jit  # choices are an argument: no index is a constant
  def by_parts(choices, params, parts):
    of = lambda parts: loss(finetuning.put(params, choices, parts))
    return jax.grad(of)(parts)

  got = by_parts(choices, params, finetuning.take(params, choices))
  want = finetuning.take(jax.grad(loss)(params), choices)
  # Fused and unfused cosines differ by an ulp.
  jax.tree.map(
    lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-6), got, want
  )


def test_indices_are_no_constants_and_outside_updates_change_no_bit():
  params = {"w": jnp.array([[-0.0, 0.0, 1e-30], [jnp.inf, -1.0, 3.0]])}
  masks = {"w": np.array([[0, 0, 0], [0, 1, 0]], bool)}
  tx = finetuning.train_only(optax.adam(0.1), masks)
  state = tx.init(params)
  assert state.index["w"].tolist() == [4]
  updates, _ = tx.update(params, state, params)
  new = optax.apply_updates(params, updates)
  outside = ~masks["w"]
  assert bits(new["w"], outside) == bits(params["w"], outside)
  # Another index in the state, another entry: the program reads it there.
  state = state._replace(index={"w": jnp.array([5], jnp.int32)})
  moved = tx.update(params, state, params)[0]["w"]
  assert moved[1, 2] != 0 and not moved.at[1, 2].set(0).any()


@pytest.mark.parametrize(
  "inner",
  [
    optax.sgd(0.1, momentum=0.9),
    optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1)),
    optax.lion(0.1),
    optax.inject_hyperparams(optax.adamw)(0.1),
    optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
  ],
  ids=["sgd", "clip", "lion", "inject", "multi"],
)
def test_any_optimizer_and_inside_a_chain(inner):
  params, grads = drawn(), drawn()
  tx = optax.chain(finetuning.train_only(inner, MASKS), optax.scale(0.5))
  alone = optax.chain(inner, optax.scale(0.5))
  parts = finetuning.take(params, MASKS)
  g, state, alone_state = grads, tx.init(params), alone.init(parts)
  for _ in range(2):
    updates, state = tx.update(g, state, params)
    part_updates, alone_state = alone.update(
      finetuning.take(g, MASKS), alone_state, parts
    )
    params = optax.apply_updates(params, updates)
    parts = optax.apply_updates(parts, part_updates)
  got = finetuning.take(params, MASKS)
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y), got, parts)


def test_several_models_at_once():
  tx = finetuning.train_only(optax.adam(0.1), MIXED)
  both = [drawn(), drawn()]
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *both)
  got, state = jax.vmap(lambda p: tx.update(p, tx.init(p), p))(stacked)
  assert state.index["b"].shape == (2, 2, 2)
  for i, params in enumerate(both):
    want, _ = tx.update(params, tx.init(params), params)
    for n, w in want.items():
      # Adam's root and quotient differ by an ulp where they are fused.
      np.testing.assert_allclose(got[n][i], w, atol=1e-6)


def test_all_and_nothing():
  params, grads = drawn(), drawn()
  every = jax.tree.map(lambda p: np.ones(p.shape, bool), params)
  tx, plain = finetuning.train_only(optax.adam(0.1), every), optax.adam(0.1)
  got = tx.update(grads, tx.init(params), params)[0]
  want = plain.update(grads, plain.init(params), params)[0]
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y), got, want)
  for chosen in ({}, {"a": np.zeros((6, 5), bool), "c": False}):
    tx = finetuning.train_only(optax.adam(0.1), chosen)
    state = tx.init(params)
    assert not jax.tree.leaves(state.inner[0].mu)
    updates, _ = tx.update(grads, state, params)
    new = optax.apply_updates(params, updates)
    assert all(bits(new[n]) == bits(params[n]) for n in params)


def test_bf16_and_missing_gradients():
  params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), drawn())
  params["step"] = jnp.int32(3)
  tx = finetuning.train_only(optax.adam(0.1), {"a": MASKS["a"]})
  state = tx.init(params)
  grads = jax.tree.map(lambda _: None, params) | {"a": params["a"]}
  updates, state = tx.update(grads, state, params)
  new = optax.apply_updates(params, updates)
  assert updates["a"].dtype == state.inner[0].mu["a"].dtype == jnp.bfloat16
  assert new["step"] == 3 and bits(new["b"]) == bits(params["b"])
  assert (np.asarray(new["a"] != params["a"]) == MASKS["a"]).all()


def test_a_donated_state_takes_nothing_with_it():
  params = {"w": jnp.ones((3, 2))}
  chosen = finetuning.choose(params, {"w": np.eye(3, 2, dtype=bool)})
  chosen = jax.tree.map(jnp.asarray, chosen)
  tx = finetuning.train_only(optax.sgd(1.0), chosen)
  update = jax.jit(tx.update, donate_argnums=1)
  update(params, tx.init(params), params)
  update(params, tx.init(params), params)
  assert finetuning.take(params, chosen)["w"].tolist() == [1, 1]


@pytest.mark.parametrize(
  "inner",
  [
    optax.MultiSteps(optax.adamw(0.1), 2).gradient_transformation(),
    optax.contrib.schedule_free_adamw(0.1),
    optax.apply_if_finite(optax.adamw(0.1), 2),
    optax.inject_hyperparams(optax.adamw)(learning_rate=0.1),
    optax.adafactor(0.1),
  ],
)
def test_wrappers_inside_leave_every_bit(inner):
  params = jnp.array([[-0.0, 0.3, 1.0], [np.pi, -0.7, -0.0]])
  mask = np.array([[False, False, True], [False, True, False]])
  tx = finetuning.train_only(inner, mask)

  @jax.jit
  def step(params, state):
    updates, state = tx.update(jnp.ones_like(params), state, params)
    return optax.apply_updates(params, updates), state

  tuned, state = params, tx.init(params)
  for _ in range(3):
    tuned, state = step(tuned, state)
  same = np.asarray(tuned).view(np.uint32) == np.asarray(params).view(np.uint32)
  np.testing.assert_array_equal(same, ~mask)


def test_state_is_saved(tmp_path):
  params = {"w": jnp.arange(6.0).reshape(3, 2), "b": jnp.ones(2)}
  chosen = {"w": np.eye(3, 2, dtype=bool)}
  tx = finetuning.train_only(optax.adamw(0.1), chosen)
  state = tx.update(params, tx.init(params), params)[1]
  with ocp.StandardCheckpointer() as saver:
    saver.save(tmp_path / "state", state)
    saver.wait_until_finished()
    back = saver.restore(tmp_path / "state", tx.init(params))
  jax.tree.map(np.testing.assert_array_equal, back, state)
  updates = tx.update(params, back, params)[0]
  want = tx.update(params, state, params)[0]
  jax.tree.map(np.testing.assert_array_equal, updates, want)


def test_nnx_optimizer():
  model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
  mask = RNG.random((4, 3)) < 0.5
  before = jnp.copy(model.kernel[...])
  tx = finetuning.train_only(optax.adam(0.1), {"kernel": mask})
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

  @nnx.jit
  def step(model, optimizer):
    loss = lambda model: (model(jnp.ones((2, 4))) ** 2).sum()
    optimizer.update(model, nnx.grad(loss)(model))

  step(model, optimizer)
  np.testing.assert_array_equal(model.kernel[...] != before, mask)
  assert not model.bias[...].any()


@pytest.mark.parametrize("axis_type", common.AXIS_TYPES)
def test_sharded(axis_type):
  mesh = common.mesh_of(axis_type)
  shape = (16, 24)
  w = RNG.normal(size=shape).astype(np.float32)
  masks = {
    "w": RNG.random(shape) < 0.1,
    "b": finetuning.Blocks(np.array([[0, 1], [3, 2]]), (4, 4)),
    "s": finetuning.Slice(0, 4, 12),
    "t": finetuning.Slice(1, 3, 10),
  }
  tx = finetuning.train_only(optax.adam(0.1), masks)

  def step(params, state, tx=tx):
    updates, state = tx.update(params, state, params)
    return optax.apply_updates(params, updates), state

  plain = {n: jnp.asarray(w) for n in masks}
  want = step(plain, tx.init(plain))
  with jax.set_mesh(mesh):
    specs = [jax.P("x", "y"), jax.P("x", "y"), jax.P("x", "y"), jax.P("x")]
    params = {
      n: common.place(w, mesh, s) for n, s in zip(masks, specs, strict=True)
    }
    got = jax.jit(step)(params, jax.jit(tx.init)(params))
    # Adam's root and quotient differ by an ulp where they are fused.
    near = lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6)
    jax.tree.map(near, jax.device_get(got), jax.device_get(want))
    for n in params:
      assert got[0][n].sharding.is_equivalent_to(params[n].sharding, 2)

    # Of entries only the chosen ones cross devices, summed up: nothing is
    # gathered, and no all-reduce is longer than they are.
    entries = finetuning.train_only(optax.adam(0.1), {"w": masks["w"]})
    one = {"w": params["w"]}
    state = jax.jit(entries.init)(one)
    run = jax.jit(functools.partial(step, tx=entries))
    compiled = run.lower(one, state).compile()
    assert not common.moved(compiled)
    assert common.reduced(compiled) <= {1, int(masks["w"].sum())}


@pytest.mark.parametrize(
  ("chosen", "match"),
  [
    ({"z": True}, "must name parameters, got 'z'"),
    ({"a": np.ones((5, 6), bool)}, r"mask of shape \(6, 5\), got \(5, 6\)"),
    ({"a": np.zeros((5, 6), bool)}, r"mask of shape \(6, 5\), got \(5, 6\)"),
    ({"a": np.ones((6, 5))}, "must be a boolean mask"),
    ({"i": True}, "must be floating arrays, got 'i'"),
    ({"a": finetuning.Slice(2, 0, 1)}, "must be a slice of an array of shape"),
    ({"a": finetuning.Slice(0, 3, 9)}, "must be a slice of an array of shape"),
    ({"a": BLOCKS}, "blocks that divide a matrix"),
    ({"d": BLOCKS}, "blocks that divide a matrix"),
    ({"b": finetuning.Blocks(np.array([[0, 3]]), (2, 2))}, "index below"),
    ({"b": finetuning.Blocks(np.array([[0, 1]] * 2), (2, 2))}, "twice"),
    ({"b": finetuning.Blocks(np.array([0, 1]), (2, 2))}, r"an index \[n, 2\]"),
    ({"b": finetuning.Entries(np.array([24]))}, "index below 24"),
    ({"b": finetuning.Entries(np.array([-1]))}, "index below 24"),
    ({"b": finetuning.Entries(np.array([0.5]))}, "integer"),
  ],
)
def test_bad_choices(chosen, match):
  params = drawn() | {"i": jnp.arange(3)}
  for call in (
    functools.partial(finetuning.choose, params),
    functools.partial(finetuning.take, params),
    lambda chosen: finetuning.train_only(optax.sgd(1), chosen).init(params),
  ):
    with pytest.raises(ValueError, match=match):
      call(chosen)


def test_other_bad_input():
  params = drawn()
  with pytest.raises(ValueError, match="inner must be an Optax optimizer"):
    finetuning.train_only(1e-3, MASKS)
  with pytest.raises(ValueError, match="made outside of jit"):
    jax.jit(lambda m: finetuning.choose(params, {"a": m}))(MASKS["a"])
  parts = finetuning.take(params, MIXED)
  with pytest.raises(ValueError, match=r"parts must be of \['a', 'b'"):
    finetuning.put(params, MIXED, parts | {"b": None})
  with pytest.raises(ValueError, match="parts must have the shapes of take"):
    finetuning.put(params, MIXED, parts | {"a": params["a"]})
  tx = finetuning.train_only(optax.sgd(1), MASKS)
  state = tx.init(params)
  with pytest.raises(ValueError, match="grads must be of what is trained"):
    tx.update(params | {"a": None}, state, params)
  more = MASKS | {"a": ~MASKS["a"] | (RNG.random((6, 5)) < 0.5)}
  with pytest.raises(ValueError, match="opt_state is of another choice"):
    finetuning.train_only(optax.sgd(1), more).update(params, state, params)
