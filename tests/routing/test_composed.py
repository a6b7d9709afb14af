"""Composed experts against the loop over all pairs, and their gates."""

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

TOKENS, HEADS, KEYS, WIDTH, HIDDEN = 3, 2, 4, 4, 2
VALID = np.array([True, False, True, True, True])
KINDS = {
  "horizontal": (routing.monet_horizontal, oracle.monet_horizontal),
  "vertical": (routing.monet_vertical, oracle.monet_vertical),
}


def parameters(kind, keys=KEYS, seed=0):
  d, m, half = WIDTH, HIDDEN, WIDTH // 2
  shapes = {
    "horizontal": {
      "up": (d, m),
      "up_bias": (m,),
      "down": (m, d),
      "bias": (d,),
    },
    "vertical": {
      **dict.fromkeys(("up1", "up2"), (d, m)),
      **dict.fromkeys(("up_bias1", "up_bias2"), (m,)),
      **dict.fromkeys(("down11", "down12", "down21", "down22"), (m, half)),
      **dict.fromkeys(("bias1", "bias2"), (half,)),
    },
  }[kind]
  return {
    name: pieces.draw(seed + i, keys, *shape)
    for i, (name, shape) in enumerate(shapes.items())
  }


def gates(seed, tokens=TOKENS, keys=KEYS):
  draw = np.random.default_rng(seed).random((tokens, HEADS, keys))
  return np.where(draw < 0.4, 0, draw).astype(np.float32)


@functools.lru_cache
def run(kind):
  def f(arrays, removed):
    arrays = dict(arrays)
    given = [arrays.pop(name) for name in ("x", "gates1", "gates2")]
    return KINDS[kind][0](*given, arrays, removed=removed)

  def with_gradients(arrays, removed):
    square = lambda arrays: (f(arrays, removed) ** 2).sum()
    return f(arrays, removed), jax.grad(square)(arrays)

  return pieces.jit(with_gradients)


NOTHING = np.full((3, 2), -1)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_loop_over_pairs(kind):
  arrays = {
    "x": pieces.draw(20, TOKENS, WIDTH),
    "gates1": gates(21),
    "gates2": gates(22),
    **parameters(kind),
  }

  def want(arrays, removed=()):
    of = functools.partial(oracle.monet, expert=KINDS[kind][1], params=arrays)
    return of(arrays["x"], arrays["gates1"], arrays["gates2"], removed=removed)

  pieces.compare(None, want, arrays, lambda a: run(kind)(a, NOTHING))
  # Some pairs less, one of them named twice, and one that does not exist.
  pairs = np.array([[1, 2], [1, 2], [3, KEYS]])
  pieces.compare(
    None,
    functools.partial(want, removed=[(1, 2)]),
    arrays,
    lambda a: run(kind)(a, pairs),
  )


@pytest.mark.parametrize("kind", KINDS)
def test_sixty_four_experts(kind):
  params, x = parameters(kind, keys=8), pieces.draw(30, TOKENS, WIDTH)
  both = gates(31, keys=8), gates(32, keys=8)
  f = functools.partial(KINDS[kind][0], activation=jax.nn.relu)
  expert = functools.partial(KINDS[kind][1], activation="relu")
  got = pieces.jit(f)(x, *both, params)
  pieces.close(got, oracle.monet(x, *both, expert, params))
  sizes = [
    sum(v.size for v in parameters(kind, keys=keys).values()) for keys in (4, 8)
  ]
  assert sizes[1] == 2 * sizes[0]  # of four times the experts


def test_gates_equal_the_oracle():
  scores = pieces.draw(40, 5, HEADS, KEYS)
  scores[3, 0] = 7  # far above: others of the token may be below all
  scores[4, 1, 2] = -np.inf
  for k in (1, 2, 4):
    got = routing.monet_gates(jnp.asarray(scores), k)
    finite = np.where(scores > -np.inf, scores, 0)
    mean, variance = routing.monet_statistics(jnp.asarray(scores))
    kept = np.ones(scores.shape, bool)
    kept[4, 1, 2] = False
    for h in range(HEADS):
      seen = finite[:, h][kept[:, h]].astype(np.float64)
      np.testing.assert_allclose(mean[h], seen.mean(), rtol=1e-5)
      np.testing.assert_allclose(variance[h], seen.var(), rtol=1e-5)
    want = oracle.monet_gates(
      scores, k, mean=common.float64(mean), variance=common.float64(variance)
    )
    pieces.close(got, want, 1e-5, 1e-6)
    np.testing.assert_allclose(got.sum(-1), 1, rtol=1e-5)


@functools.partial(pieces.jit, static_argnums=1)
def gates_and_gradient(scores, k):
  f = functools.partial(routing.monet_gates, k=k, token_valid=VALID)
  gates, pull = jax.vjp(f, scores)
  return gates, pull(jnp.square(gates))[0]


def test_gates_of_batches_with_padding():
  scores = pieces.draw(50, 5, HEADS, 8)
  got, gradient = gates_and_gradient(scores, 3)
  want = oracle.monet_gates(scores, 3, token_valid=VALID)
  pieces.close(got, want, 1e-5, 1e-6)
  assert not got[1].any() and not gradient[1].any()
  # The softmax alone has a gradient.
  flat = lambda x: common.float64(x).reshape(-1, 8)
  closed = oracle.softmax_gradient(flat(got), flat(got) ** 2)
  pieces.close(flat(gradient), closed, 1e-4, 1e-5)
  scores[1] = np.nan
  again = gates_and_gradient(scores, 3)
  jax.tree.map(np.testing.assert_array_equal, again, (got, gradient))


def losses_of(gates, valid):
  """Token by token, head by head."""
  uniformity, ambiguity = [], []
  for of in gates:
    of = common.float64(of)[valid]
    mean = sum(of) / len(of)
    uniformity += [-np.log(p) for p in mean.ravel()]
    ambiguity += [1 - max(head) for token in of for head in token]
  return np.mean(uniformity), np.mean(ambiguity)


def test_losses():
  both = [np.random.default_rng(s).random((5, HEADS, KEYS)) for s in (65, 66)]
  both = [x.astype(np.float32) for x in both]

  @pieces.jit
  def run(gates1, gates2):
    of = lambda *gates: routing.monet_losses(*gates, token_valid=VALID)
    return of(gates1, gates2), jax.jacrev(of)(gates1, gates2)

  got, gradients = run(*both)
  pieces.close(got, losses_of(both, VALID), 1e-5, 1e-6)
  for i, gradient in enumerate(gradients):
    of = lambda x, i=i: losses_of((x, both[1]), VALID)[i]
    numeric = oracle.numerical_gradient(of, both[0])
    pieces.close(gradient, numeric, 1e-4, 1e-6)
  # Padding, and a token whose gates are all 0, count for nothing.
  for gates in both:
    gates[~VALID] = np.nan
    gates[3] = 0
  got, gradients = run(*both)
  pieces.close(got, losses_of(both, VALID & (np.arange(5) != 3)), 1e-5, 1e-6)
  assert all(np.isfinite(g).all() for g in gradients)
  # The best and the worst of both; keys without a token are no infinity.
  even, sure = np.full((6, 1, 3), 1 / 3, "f"), np.eye(3, dtype="f")[:, None]
  pieces.close(routing.monet_losses(even, even), [np.log(3), 2 / 3])
  pieces.close(routing.monet_losses(sure, sure), [np.log(3), 0])
  one = np.broadcast_to(sure[:1], (6, 1, 3))
  pieces.close(routing.monet_losses(one, one), [2 / 3 * np.log(1e6), 0])


def test_losses_of_a_module_and_a_shared_router():
  make = lambda weight: routing.Monet(
    *(WIDTH, HIDDEN, KEYS),
    heads=HEADS,
    k=2,
    loss_weight=weight,
    rngs=nnx.Rngs(0),
  )
  first = pieces.made(lambda: make(0.5))
  second = pieces.made(lambda: make(None))
  x = jnp.asarray(pieces.draw(67, 5, WIDTH))
  gates = first.gates(x, token_valid=VALID)
  first(x, token_valid=VALID)
  want = 0.5 * sum(routing.monet_losses(*gates, token_valid=VALID))
  pieces.close(routing.auxiliary_loss(first), want, 1e-5)
  params = {name: p[...] for name, p in second.experts.items()}
  y = second(x, gates=gates)
  pieces.close(y, routing.monet_horizontal(x, *gates, params), 1e-5, 1e-6)
  assert not routing.auxiliary_loss(second)


def test_share_that_stays():
  scores = jnp.asarray(pieces.draw(60, 2000, 1, 64))
  for k in (4, 16):
    stays = (routing.monet_gates(scores, k) > 0).mean()
    np.testing.assert_allclose(stays, k / 64, rtol=0.05)
  assert (routing.monet_gates(scores, 64) > 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_module(kind):
  model = pieces.made(
    lambda: routing.Monet(
      WIDTH, HIDDEN, KEYS, heads=HEADS, k=2, kind=kind, rngs=nnx.Rngs(0)
    )
  )
  x = pieces.draw(70, 5, WIDTH)
  x[1] = np.nan

  @pieces.module_jit
  def call(model, x):
    square = lambda model: (model(x, token_valid=VALID) ** 2).sum()
    return model(x, token_valid=VALID), nnx.grad(square)(model)

  y, gradients = call(model, x)
  kernel = common.float64(model.router[...])
  plain = np.where(VALID[:, None], x, 0).astype(np.float64)
  scores = np.einsum("td,dchn->cthn", plain, kernel)
  both = [oracle.monet_gates(s, 2, token_valid=VALID) for s in scores]
  params = {name: common.float64(p[...]) for name, p in model.experts.items()}
  pieces.close(y, oracle.monet(plain, *both, KINDS[kind][1], params))
  leaves = jax.tree.leaves(gradients)
  assert all(np.isfinite(g).all() and np.any(g) for g in leaves)
  call(model, x + 1)
  assert call.compilations() == 1


def test_running_statistics():
  model = pieces.made(
    lambda: routing.Monet(
      WIDTH, HIDDEN, 8, heads=HEADS, k=2, momentum=0.75, rngs=nnx.Rngs(0)
    )
  )
  x = jnp.asarray(pieces.draw(80, 5, WIDTH))
  scores = jnp.einsum("td,dchn->cthn", x, model.router[...])
  now = [routing.monet_statistics(s) for s in scores]
  model.gates(x)
  for c in range(2):
    pieces.close(model.mean[...][c], now[c][0] / 4)
    pieces.close(model.variance[...][c], 0.75 + now[c][1] / 4)
  model.eval()
  frozen = model.mean[...]
  found = model.gates(x)
  np.testing.assert_array_equal(model.mean[...], frozen)
  for c in range(2):
    want = oracle.monet_gates(
      scores[c],
      2,
      mean=common.float64(model.mean[...][c]),
      variance=common.float64(model.variance[...][c]),
    )
    pieces.close(found[c], want)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("axis_type", common.AXIS_TYPES)
def test_eight_devices(axis_type, kind):
  params, weights = parameters(kind), pieces.draw(90, WIDTH, HEADS, KEYS)

  def f(x):
    scores = jnp.einsum("td,dhn->thn", x, weights)
    gates = routing.monet_gates(scores, 2)
    pair = jnp.array([[1, 2]])
    return KINDS[kind][0](x, gates, gates, params, removed=pair)

  pieces.compare_on_eight_devices(f, pieces.draw(91, 16, WIDTH), axis_type)


def test_bad_input():
  scores = jnp.ones((3, 2, 4))
  with pytest.raises(ValueError, match="k must be 1 to 4, got 5"):
    routing.monet_gates(scores, 5)
  with pytest.raises(ValueError, match="variance must be given with mean"):
    routing.monet_gates(scores, 2, mean=jnp.zeros(2))
  with pytest.raises(ValueError, match=r"mean must be \[2\], got \[3\]"):
    routing.monet_gates(scores, 2, mean=jnp.zeros(3), variance=jnp.ones(2))
  with pytest.raises(ValueError, match=r"scores must be floating \[..., heads"):
    routing.monet_gates(jnp.ones(4), 2)
  with pytest.raises(ValueError, match=r"token_valid must be bool\[3\]"):
    routing.monet_gates(scores, 2, token_valid=jnp.ones(3))
  with pytest.raises(ValueError, match=r"gates2 must be \[3, 2, 4\] as gates1"):
    routing.monet_losses(scores, scores[:2])
  with pytest.raises(ValueError, match=r"gates1 must be floating"):
    routing.monet_losses(jnp.ones(4), jnp.ones(4))
  x, g = jnp.ones((3, WIDTH)), jnp.ones((3, 2, KEYS))
  params = parameters("horizontal")
  call = lambda *args, **given: routing.monet_horizontal(*args, **given)
  with pytest.raises(ValueError, match="params must have bias, down, up, up_b"):
    call(x, g, g, parameters("vertical"))
  with pytest.raises(ValueError, match=r"gates2 must be \[..., heads, 4\]"):
    call(x, g, g[:, :1], params)
  with pytest.raises(ValueError, match=r"removed must be integer\[n, 2\]"):
    call(x, g, g, params, removed=jnp.ones((1, 2)))
  make = functools.partial(routing.Monet, heads=1, k=1, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match='kind must be "horizontal" or'):
    make(4, 2, 4, kind="diagonal")
  with pytest.raises(ValueError, match="width must be even"):
    make(5, 2, 4, kind="vertical")
