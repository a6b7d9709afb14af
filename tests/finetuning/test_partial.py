from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsejax import finetuning
from tests import common
from tests.oracles import finetuning as oracle

RNG = np.random.default_rng(0)
CHOICES = {
  "rows": finetuning.Slice(0, 1, 4),
  "columns": finetuning.Slice(1, 2, 8),
  "nothing": finetuning.Slice(0, 2, 2),
  "blocks": finetuning.Blocks(np.array([[2, 1], [0, 3]]), (2, 2)),
  "entries": finetuning.Entries(np.array([1, 8, 47])),
  "whole": finetuning.Whole(),
}


def drawn(*shape):
  return jnp.asarray(RNG.normal(size=shape), jnp.float32)


@pytest.mark.parametrize("leading", [(), (5,), (2, 3)])
@pytest.mark.parametrize("name", CHOICES)
def test_matmul_and_its_gradients(name, leading):
  choice = CHOICES[name]
  x, kernel, dy = drawn(*leading, 6), drawn(6, 8), drawn(*leading, 8)
  part = 2 * choice.take(kernel)

  @jax.jit
  def ours(x, kernel, part, choice):
    f = lambda *args: finetuning.partial_matmul(*args, choice)
    y, pullback = jax.vjp(f, x, kernel, part)
    return y, pullback(dy)

  def plain(x, part):
    return x @ choice.put(kernel, part)

  y, (dx, d_kernel, d_part) = ours(x, kernel, part, choice)
  want, pullback = jax.vjp(plain, x, part)
  near = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
  near(y, want)  # f32 sums of up to eight terms of size one
  near(dx, pullback(dy)[0])
  near(d_part, pullback(dy)[1])
  assert not d_kernel.any()
  full = jax.grad(lambda w: (x @ w * dy).sum())(choice.put(kernel, part))
  near(d_part, choice.take(full))
  if name == "blocks" and len(leading) == 1:
    blocks = [(2, 1), (0, 3)]
    near(
      d_part, oracle.block_gradients(*map(np.asarray, (x, dy)), blocks, (2, 2))
    )


def test_gradients_of_slices_are_the_oracles():
  x, gate, up, down = drawn(5, 4), drawn(4, 6), drawn(4, 6), drawn(6, 3)
  dy = drawn(5, 3)
  columns, rows = finetuning.Slice(1, 0, 3), finetuning.Slice(0, 2, 4)

  def run(up_part, down_part):
    h = finetuning.partial_matmul(x, up, up_part, columns)
    h = jax.nn.silu(x @ gate) * h
    return (finetuning.partial_matmul(h, down, down_part, rows) * dy).sum()

  got = jax.jit(jax.grad(run, (0, 1)))(columns.take(up), rows.take(down))
  arrays = [np.asarray(a) for a in (x, gate, up, down, dy)]
  sliced = oracle.s2ft_gradients(*arrays, (0, 3), (2, 4))
  full = oracle.gated_ffn_gradients(*arrays)
  for g, s, f in zip(got, sliced, (full[0][:, :3], full[1][2:4]), strict=True):
    np.testing.assert_allclose(g, s, rtol=1e-4, atol=1e-5)  # f32 sums
    np.testing.assert_allclose(g, f, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["rows", "blocks", "entries"])
def test_vmap_and_second_derivatives(name):
  choice, x, kernel = CHOICES[name], drawn(3, 5, 6), drawn(6, 8)
  part = choice.take(kernel)

  def penalty(product):
    loss = lambda part, x: (product(x, part) ** 2).sum()
    square = lambda part, x: (jax.grad(loss)(part, x) ** 2).sum()
    return jax.jit(jax.vmap(jax.grad(square), (None, 0)))(part, x)

  got = penalty(lambda x, p: finetuning.partial_matmul(x, kernel, p, choice))
  want = penalty(lambda x, p: x @ choice.put(kernel, p))
  # f32 sums of products of four numbers, up to some thousands.
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-2)


def test_a_frozen_kernel_has_no_gradient_of_any_order():
  rows, part = finetuning.Slice(0, 1, 2), drawn(1, 2)

  def slope(kernel):
    loss = lambda x: (
      finetuning.partial_matmul(x, kernel, part, rows) ** 2
    ).sum()
    return (jax.grad(loss)(jnp.ones(3)) ** 2).sum()

  assert not jax.grad(slope)(drawn(3, 2)).any()


@pytest.mark.parametrize("axis", [0, 1])
def test_the_backward_pass_is_as_small_as_the_slice(axis):
  x, kernel = drawn(64, 40), drawn(40, 80)
  choice = finetuning.Slice(axis, 0, 2)

  def loss(part, x):
    return finetuning.partial_matmul(x, kernel, part, choice).sum()

  part = choice.take(kernel)
  step = jax.jit(jax.grad(loss)).lower(part, x).compile()
  # Only the slice's product: the forward one is not needed for a sum.
  flops = step.cost_analysis()["flops"]
  assert flops < 2.2 * 64 * 40 * 80 * 2 / kernel.shape[axis]


@pytest.mark.parametrize("axis_type", common.AXIS_TYPES)
def test_sharded(axis_type):
  mesh = common.mesh_of(axis_type)
  x, kernel, dy = drawn(8, 16), drawn(16, 32), drawn(8, 32)
  choices = {
    "rows": finetuning.Slice(0, 2, 5),
    "columns": finetuning.Slice(1, 3, 10),  # a sharded axis, cut anywhere
    "blocks": finetuning.Blocks(np.array([[0, 1], [3, 4]]), (4, 4)),
    "entries": finetuning.Entries(np.array([3, 100])),
  }

  def run(x, kernel, dy):
    def loss(parts):
      products = [
        finetuning.partial_matmul(x, kernel, parts[n], c)
        for n, c in choices.items()
      ]
      return sum((y * dy).sum() for y in products)

    return jax.grad(loss)({n: c.take(kernel) for n, c in choices.items()})

  want = {n: c.take(x.T @ dy) for n, c in choices.items()}
  with jax.set_mesh(mesh):
    x, dy = (common.place(a, mesh, jax.P("x")) for a in (x, dy))
    got = jax.jit(run)(x, common.place(kernel, mesh, jax.P(None, "y")), dy)
  for n, w in want.items():
    # f32 sums of eight terms of size one, in another order.
    np.testing.assert_allclose(got[n], w, rtol=1e-5, atol=1e-5)


def model_of(rngs):
  return nnx.Sequential(
    nnx.Linear(5, 8, rngs=rngs),
    nnx.relu,
    nnx.Linear(8, 4, use_bias=False, param_dtype=jnp.bfloat16, rngs=rngs),
  )


CHOSEN = {
  "layers": {
    0: {"kernel": finetuning.Slice(1, 2, 5)},
    2: {"kernel": RNG.random((8, 4)) < 0.3},
  }
}


@pytest.mark.parametrize("whole", [True, finetuning.Slice(0, 0, 6)])
def test_a_whole_kernel_can_be_donated(whole):
  tuned = finetuning.add_parts(
    nnx.Linear(6, 8, rngs=nnx.Rngs(0)), {"kernel": whole}
  )
  run = nnx.jit(lambda model, x: (model(x), model), donate_argnums=0)
  x = drawn(2, 6)
  want = np.asarray(tuned(x))
  np.testing.assert_allclose(run(tuned, x)[0], want, rtol=1e-5, atol=1e-6)


def test_layers_of_parts():
  model = model_of(nnx.Rngs(0))
  before = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  tuned = finetuning.add_parts(model, CHOSEN)
  x, wanted = drawn(7, 5), drawn(7, 4)
  np.testing.assert_array_equal(tuned(x), model(x))

  kind = finetuning.TrainedPart
  optimizer = nnx.Optimizer(tuned, optax.adam(0.1), wrt=kind)
  trained = sum(p.size for p in jax.tree.leaves(nnx.state(tuned, kind)))
  assert trained == 15 + CHOSEN["layers"][2]["kernel"].sum()
  moments = jax.tree.leaves(nnx.state(optimizer, nnx.OptState))
  assert sum(p.size for p in moments) <= 2 * trained + 2  # and two counts

  loss = lambda model: ((model(x) - wanted) ** 2).mean()
  reference = nnx.grad(loss)(model)
  grads = nnx.grad(loss, argnums=nnx.DiffState(0, kind))(tuned)
  for i, name in ((0, "Slice"), (2, "Entries")):
    choice = tuned.layers[i].dot_general.choice
    assert type(choice).__name__ == name
    want = choice.take(reference["layers"][i]["kernel"][...])
    got = grads["layers"][i]["dot_general"]["part"][...]
    assert got.dtype == want.dtype
    # bf16 products of the two forms are summed in another order.
    np.testing.assert_allclose(
      *(np.asarray(a, np.float32) for a in (got, want)), rtol=0.02, atol=0.01
    )

  @nnx.jit
  def step(model, optimizer):
    value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, kind))(
      model
    )
    optimizer.update(model, grads)
    return value

  losses = [step(tuned, optimizer) for _ in range(10)]
  assert losses[-1] < losses[0]
  merged = finetuning.merge_parts(tuned)
  np.testing.assert_array_equal(merged(x), tuned(x))
  after = nnx.to_pure_dict(nnx.state(merged, nnx.Param))
  assert jax.tree.structure(after) == jax.tree.structure(before)
  choices = finetuning.choose(before, CHOSEN)
  back = finetuning.put(after, choices, finetuning.take(before, choices))
  for b, a in zip(jax.tree.leaves(before), jax.tree.leaves(back), strict=True):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
  assert (
    np.asarray(after["layers"][0]["kernel"] != before["layers"][0]["kernel"])
  ).any()
  assert model.layers[0].dot_general is jax.lax.dot_general


def test_bad_input():
  x, kernel, rows = drawn(3, 6), drawn(6, 8), CHOICES["rows"]
  with pytest.raises(ValueError, match=r"part must be \(3, 8\), got \(2, 8\)"):
    finetuning.partial_matmul(x, kernel, kernel[:2], rows)
  with pytest.raises(ValueError, match=r"kernel must be \[inputs, outputs\]"):
    finetuning.partial_matmul(x, kernel.T, kernel, rows)
  with pytest.raises(ValueError, match="must be a slice of an array of shape"):
    finetuning.partial_matmul(x, kernel, kernel, finetuning.Slice(0, 3, 7))
  model = model_of(nnx.Rngs(0))
  with pytest.raises(ValueError, match=r"kernels of nnx.Linear, got.*bias"):
    finetuning.add_parts(model, {"layers": {0: {"bias": True}}})
  with pytest.raises(ValueError, match="must name parameters"):
    finetuning.add_parts(model, {"kernel": True})
  tuned = finetuning.add_parts(model, CHOSEN)
  with pytest.raises(ValueError, match=r"dot_general must be lax.dot_general"):
    finetuning.add_parts(tuned, CHOSEN)
  precise = nnx.Linear(6, 8, precision="highest", rngs=nnx.Rngs(0))
  precise = finetuning.add_parts(precise, {"kernel": rows})
  with pytest.raises(ValueError, match=r"takes no .*precision.*highest"):
    precise(x)
  with pytest.raises(ValueError, match="model must have trained parts"):
    finetuning.merge_parts(model)
  with pytest.raises(ValueError, match=r"model must be an nnx.Module"):
    finetuning.merge_parts({})
