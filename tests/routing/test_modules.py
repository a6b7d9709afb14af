"""The Flax module: what it computes, that it trains, and where it stands."""

import functools

from flax import nnx
from flax.nnx import bridge
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from sparsejax import routing
from tests import common
from tests.oracles import routing as oracle
from tests.routing import problem

BATCH, LENGTH, WIDTH, HIDDEN, EXPERTS = 3, 5, 4, 6, 5
LOSSES = {routing.load_balance: 0.01, routing.z_loss: 1e-3}


def inputs(seed=0, *, padding=False):
  x = problem.normal(seed, BATCH, LENGTH, WIDTH)
  valid = np.ones((BATCH, LENGTH), bool)
  if padding:
    valid[1, 3:], x[1, 3:] = False, np.nan
  return x, valid


def make(seed=0, **options):
  return routing.MoE(WIDTH, HIDDEN, EXPERTS, rngs=nnx.Rngs(seed), **options)


def by_loop(moe, x, valid, route, bank="silu", size=None, **capacity):
  """What a mixture gives, from its parameters, and the assignment."""
  rows = np.float64(x).reshape(-1, WIDTH)
  params = {n: np.float64(p[...]) for n, p in moe.experts.items()}
  clean = np.where(valid.reshape(-1, 1), rows, 0)
  logits = clean @ np.float64(moe.router.kernel[...])
  routed = route(logits, token_valid=valid.reshape(-1))
  kept = oracle.keep(routed, size, **capacity)
  run = functools.partial(oracle.ffn, activation=bank)
  y = oracle.dispatch(clean, routed, run, params, kept)
  return y.reshape(x.shape), routed, kept


@nnx.jit
def outputs(moe, x, valid):
  """y, and the gradients of the sum of its squares and of the losses."""

  def loss(moe):
    y = moe(x, token_valid=valid)
    return (y**2).sum() + routing.auxiliary_loss(moe), y

  return nnx.grad(loss, has_aux=True)(moe)


TOP_2 = functools.partial(oracle.top_k, k=2, renormalize=True)


def test_against_the_oracle():
  moe = make(losses=LOSSES, balance_bias=True)
  bias = np.arange(EXPERTS, dtype=np.float32) / 10
  moe.balance_bias[...] = jnp.array(bias)
  x, valid = inputs(padding=True)
  grads, y = outputs(moe, x, valid)
  route = functools.partial(TOP_2, bias=bias)
  want, routed, _ = by_loop(moe, x, valid, route)
  problem.close(y, want, atol=1e-5)
  assert not np.asarray(y)[~valid].any()
  metrics = {n: np.asarray(x) for n, x in moe.metrics.get_value().items()}
  problem.close(metrics["load"], routed.counts() / routed.counts().sum())
  balance = oracle.load_balance(routed, routed.metrics["probabilities"])
  problem.close(metrics["load_balance"], balance, rtol=1e-4)
  total = sum(c * metrics[of.__name__] for of, c in LOSSES.items())
  problem.close(routing.auxiliary_loss(moe), total)
  problem.close(moe.loss[...], total)

  # NaN in padding is in no gradient; and they are those of the loop.
  for leaf in jax.tree.leaves(grads):
    assert np.isfinite(leaf).all()
  arrays = {n: np.float64(p[...]) for n, p in moe.experts.items()}
  clean = np.where(valid[..., None], x, 0).reshape(-1, WIDTH)
  flat = valid.reshape(-1)

  def loss(kernel):
    again = route(clean @ kernel, token_valid=flat, like=routed)
    y = oracle.dispatch(clean, again, oracle.ffn, arrays)
    p = again.metrics["probabilities"]
    balance = oracle.load_balance(again, p)
    z = oracle.z(clean @ kernel, token_valid=flat)
    return (y**2).sum() + 0.01 * balance + 1e-3 * z

  kernel = np.float64(moe.router.kernel[...])
  want = oracle.numerical_gradient(loss, kernel)
  problem.close(grads["router"]["kernel"][...], want, rtol=1e-4, atol=1e-5)

  # The bias has the load error, and a kind of its own for an optimizer.
  problem.close(grads["balance_bias"][...], oracle.load_error(routed))
  assert isinstance(moe.balance_bias, nnx.Param)
  assert len(jax.tree.leaves(nnx.state(moe, routing.BalanceBias))) == 1


def test_capacity():
  key = jax.random.key(3)
  moe = make(capacity_factor=0.8, priority="random")
  x, valid = inputs(padding=True)
  y = nnx.jit(lambda moe: moe(x, token_valid=valid, key=key))(moe)
  size = oracle.capacity_of(2 * BATCH * LENGTH, EXPERTS, 0.8)
  want, routed, kept = by_loop(
    moe,
    x,
    valid,
    TOP_2,
    size=size,
    priority="random",
    uniform=jax.random.uniform(key, (BATCH * LENGTH,)),
  )
  problem.close(y, want, atol=1e-5)
  dropped = oracle.dropped(routed, kept)
  assert dropped > 0
  problem.close(moe.metrics["dropped"], dropped)


def test_what_can_be_replaced():
  """Router, bank, dispatcher; and the router of a single call."""
  shared = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(1))
  moe = make(
    router=functools.partial(routing.expert_choice, capacity=4),
    bank=routing.FeedForward(jax.nn.relu),
    dispatch=functools.partial(routing.capacity, size=4),
    shared=shared,
  )
  x, valid = inputs()
  y = nnx.jit(lambda moe: moe(x))(moe)
  choose = functools.partial(oracle.expert_choice, capacity=4)
  want, *_ = by_loop(moe, x, valid, choose, bank="relu")
  of_shared = x @ np.asarray(shared.kernel[...])
  problem.close(y, want + of_shared, atol=1e-5)

  switch = functools.partial(routing.top_k, k=1)
  moe = make()
  y = nnx.jit(lambda moe: moe(x, router=switch))(moe)
  want, *_ = by_loop(moe, x, valid, functools.partial(oracle.top_k, k=1))
  problem.close(y, want, atol=1e-5)


def test_mixed_precision():
  """Outputs are as the tokens are; routers choose in float32."""
  x, valid = inputs()
  x = x.astype(jnp.bfloat16)
  moe = make(param_dtype=jnp.bfloat16, losses=LOSSES)
  assert moe.router.kernel.dtype == jnp.float32
  assert {p.dtype for p in moe.experts.values()} == {jnp.dtype("bfloat16")}

  @nnx.jit
  def f(moe, x):
    return moe(x), moe.route(x)[0]

  y, found = f(moe, x)
  assert y.dtype == jnp.bfloat16
  assert moe.loss.dtype == found.weight.dtype == jnp.float32
  want, routed, _ = by_loop(moe, x, valid, TOP_2)
  problem.close(np.float32(y), want, rtol=0.05, atol=0.02)
  np.testing.assert_array_equal(found.expert, routed.expert)


# --- In models.


class Layer(nnx.Module):
  def __init__(self, rngs):
    losses = {routing.load_balance: 0.01}
    self.moe = routing.MoE(WIDTH, HIDDEN, EXPERTS, losses=losses, rngs=rngs)

  def __call__(self, x):
    return x + self.moe(x)


class Model(nnx.Module):
  """A regression through two mixtures; `how` says how layers are called."""

  def __init__(self, rngs, how="plainly"):
    self.how = how
    if how == "scan":
      make = nnx.split_rngs(splits=2)(nnx.vmap(Layer, in_axes=(0,)))
      self.layers = make(rngs)
    else:
      self.layers = nnx.List([Layer(rngs) for _ in range(2)])
    self.head = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

  def __call__(self, x):
    if self.how == "scan":
      carry = nnx.scan(
        lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
      )
      x = carry(x, self.layers)
    else:
      call = lambda layer, x: layer(x)
      call = nnx.remat(call) if self.how == "remat" else call
      for layer in self.layers:
        x = call(layer, x)
    return self.head(x)


@nnx.jit
def step(model, optimizer, x, target):
  def loss(model):
    error = ((model(x) - target) ** 2).mean()
    return error + routing.auxiliary_loss(model), error

  grads, error = nnx.grad(loss, has_aux=True)(model)
  optimizer.update(model, grads)
  return error, routing.auxiliary_loss(model)


def train(model, steps):
  x, _ = inputs()
  optimizer = nnx.Optimizer(model, optax.sgd(0.3), wrt=nnx.Param)
  return np.array([step(model, optimizer, x, x[::-1]) for _ in range(steps)])


def test_it_trains():
  model = Model(nnx.Rngs(0))
  before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
  seen = train(model, 40)
  assert seen[-1, 0] < 0.3 * seen[0, 0]
  assert (seen[:, 1] > 0).all()
  after = nnx.state(model, nnx.Param)
  moved = jax.tree.map(lambda x, y: (x != y).any(), before, after)
  assert all(jax.tree.leaves(moved))
  metrics = model.layers[1].moe.metrics
  assert metrics["load"].sum() == pytest.approx(1)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["remat", "scan"])
def test_remat_and_scan_over_layers(how):
  """The same losses, step for step, and the same metrics."""
  plain, other = Model(nnx.Rngs(0)), Model(nnx.Rngs(0), how)
  layers = [nnx.state(layer) for layer in plain.layers]
  if how == "scan":
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *layers)
    nnx.update(other.layers, stacked)
  nnx.update(other.head, nnx.state(plain.head))
  problem.close(train(other, 5), train(plain, 5), rtol=1e-4)
  want = plain.layers[1].moe.metrics["load"]
  if how == "scan":
    load = other.layers.moe.metrics["load"][1]
  else:
    load = other.layers[1].moe.metrics["load"]
  problem.close(load, want)


@pytest.mark.slow
def test_linen(tmp_path):
  """Ten steps through the bridge, saved and restored halfway."""
  x, _ = inputs()
  target = x[::-1]
  tx = optax.sgd(0.1, momentum=0.9)
  linen = bridge.to_linen(routing.MoE, WIDTH, HIDDEN, EXPERTS, losses=LOSSES)
  params = jax.jit(linen.init)(jax.random.key(0), x)["params"]
  moe = make(losses=LOSSES)
  # The same parameters to begin with.
  state = nnx.state(moe, nnx.Param)
  assert nnx.to_pure_dict(state).keys() == params.keys()
  leaves = jax.tree.leaves(params)
  nnx.update(moe, jax.tree.unflatten(jax.tree.structure(state), leaves))

  @jax.jit
  def linen_step(params, opt_state):
    def loss(params):
      y, new = linen.apply(
        {"params": params}, x, mutable=["AuxiliaryLoss", "RoutingMetrics"]
      )
      extra = new["AuxiliaryLoss"]["loss"]
      load = new["RoutingMetrics"]["metrics"]["load"]
      return ((y - target) ** 2).mean() + extra, load

    (value, load), grads = jax.value_and_grad(loss, has_aux=True)(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, value, load

  @nnx.jit
  def nnx_step(moe, optimizer):
    def loss(moe):
      return ((moe(x) - target) ** 2).mean() + routing.auxiliary_loss(moe)

    value, grads = nnx.value_and_grad(loss)(moe)
    optimizer.update(moe, grads)
    return value

  optimizer = nnx.Optimizer(moe, tx, wrt=nnx.Param)
  opt_state = tx.init(params)
  for i in range(10):
    params, opt_state, value, load = linen_step(params, opt_state)
    problem.close(value, nnx_step(moe, optimizer), rtol=1e-5)
    problem.close(load, moe.metrics["load"])
    if i == 4:
      saved = {
        "linen": (params, opt_state),
        "nnx": nnx.state((moe, optimizer)),
      }
      with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "saved", saved)
        saver.wait_until_finished()
        saved = saver.restore(tmp_path / "saved", saved)
      params, opt_state = saved["linen"]
      moe = make(seed=7, losses=LOSSES)
      optimizer = nnx.Optimizer(moe, tx, wrt=nnx.Param)
      nnx.update((moe, optimizer), saved["nnx"])


AUTO, EXPLICIT = common.AXIS_TYPES


def over_devices(mesh, **options):
  """A mixture whose experts are divided by metadata and dispatched there."""
  with jax.set_mesh(mesh):
    return routing.MoE(
      WIDTH,
      HIDDEN,
      8,
      rngs=nnx.Rngs(0),
      expert_metadata={"out_sharding": ("expert",)},
      dispatch=routing.over_devices(
        routing.expert_parallel, tokens=("data", "expert"), experts="expert"
      ),
      **options,
    )


def mesh_of(axis_type):
  return jax.make_mesh((2, 4), ("data", "expert"), axis_types=(axis_type,) * 2)


@pytest.mark.slow
def test_experts_over_devices():
  mesh = mesh_of(EXPLICIT)
  moe = over_devices(mesh)
  up = moe.experts["up"][...]
  assert up.sharding.shard_shape(up.shape) == (2, WIDTH, HIDDEN)
  x, valid = problem.normal(0, 8, 4, WIDTH), np.ones((8, 4), bool)
  with jax.set_mesh(mesh):
    placed = common.place(x, mesh, jax.P(("data", "expert")))
    y = nnx.jit(lambda moe, x: moe(x))(moe, placed)
  assert y.sharding.is_equivalent_to(placed.sharding, 3)
  want, routed, _ = by_loop(moe, x, valid, TOP_2)
  problem.close(y, want, atol=1e-5)
  share = routed.counts() / routed.counts().sum()
  problem.close(moe.metrics["load"], share)


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", common.AXIS_TYPES)
def test_gradients_over_devices(axis_type):
  """The same as on one device."""
  x, valid = problem.normal(0, 8, 4, WIDTH), np.ones((8, 4), bool)
  options = dict(
    losses=LOSSES,
    balance_bias=True,
    router=functools.partial(routing.top_k, k=2),
  )
  one = routing.MoE(WIDTH, HIDDEN, 8, rngs=nnx.Rngs(0), **options)
  want = outputs(one, x, valid)
  mesh = mesh_of(axis_type)
  many = over_devices(mesh, **options)
  with jax.set_mesh(mesh):
    rows = jax.P(("data", "expert"))
    got = outputs(
      many, common.place(x, mesh, rows), common.place(valid, mesh, rows)
    )
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    problem.close(a, b, rtol=1e-4, atol=1e-5)
  problem.close(many.loss[...], one.loss[...])
  problem.close(many.metrics["load"], one.metrics["load"])


@pytest.mark.parametrize(
  "argument, call",
  [
    ("k", lambda x, v: routing.MoE(WIDTH, 2, 1, rngs=nnx.Rngs(0))(x)),
    ("capacity_factor", lambda x, v: make(capacity_factor=0.0)),
    ("experts", lambda x, v: routing.MoE(WIDTH, 2, 0, rngs=nnx.Rngs(0))),
    ("x", lambda x, v: make()(x[..., 1:])),
    ("key", lambda x, v: make(priority="random")(x)),
    ("key", lambda x, v: make()(x, key=jax.random.key(0))),
    ("token_valid", lambda x, v: make()(x, token_valid=v[0])),
    ("token_valid", lambda x, v: make()(x, token_valid=v * 1)),
    ("losses", lambda x, v: make(losses={routing.entropy: 1.0})),
  ],
)
def test_errors_name_the_argument(argument, call):
  with pytest.raises(ValueError, match=rf"^{argument}\b.*got"):
    jax.eval_shape(lambda: call(*inputs()))
