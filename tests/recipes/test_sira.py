from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsejax import finetuning
from sparsejax import recipes
from sparsejax import routing
from tests.oracles import finetuning as oracle

RNG = np.random.default_rng(0)


def drawn(*shape):
  return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def dense(found):
  gates = np.zeros((found.num_tokens, found.num_experts))
  np.add.at(gates, (found.token, found.expert), np.asarray(found.weight))
  return gates


@pytest.mark.parametrize("size", [None, 1, 2, 5])
@pytest.mark.parametrize("dropped", [False, True])
def test_routes(size, dropped):
  logits = drawn(7, 4)
  keep = RNG.random((7, 4)) < 0.6 if dropped else None
  if dropped:
    keep[0] = False  # a token without any gate
  found, share = recipes.sira_route(logits, 2, keep=keep, size=size)
  want = oracle.sira_gates(np.asarray(logits), 2, size, keep)
  np.testing.assert_allclose(dense(found), want, rtol=1e-5)  # f32 softmaxes
  if size is not None:
    assert (dense(found) > 0).sum(0).max() <= size
  if dropped:
    assert not dense(found)[~keep].any()
  assert (share > 0) == (size in (1, 2))


def tuned(**options):
  """A layer [5, 4] with four experts of rank 3 that change something."""
  layer = nnx.Linear(5, 4, use_bias=False, rngs=nnx.Rngs(0))
  options = dict(experts=4, rank=3, alpha=2.0) | options
  layer = recipes.add_sira(layer, rngs=nnx.Rngs(1), **options)
  layer.dot_general.b[...] = drawn(*layer.dot_general.b.shape)
  return layer


def arrays(layer):
  mixture = layer.dot_general
  kinds = (layer.kernel, mixture.a, mixture.b, mixture.router)
  return [np.asarray(v[...]) for v in kinds]


@pytest.mark.parametrize("factor", [None, 0.5])
def test_layer(factor):
  layer, x = tuned(capacity_factor=factor), drawn(2, 3, 5)
  w, a, b, router = arrays(layer)
  rows = np.reshape(x, (-1, 5))
  # Half of 6 tokens x 2 over 4 experts, rounded up.
  gates = oracle.sira_gates(rows @ router, 2, None if factor is None else 2)
  want = oracle.lora_moe(rows, w, a, b, 2.0, gates)
  got = layer(x).reshape(-1, 4)
  # f32 sums of a few terms of size one.
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_one_expert_is_lora():
  layer, x = tuned(experts=1, k=1), drawn(6, 5)
  w, a, b, _ = arrays(layer)
  want = oracle.lora(np.asarray(x), w, a[0], b[0], 2.0)
  np.testing.assert_allclose(layer(x), want, rtol=1e-5, atol=1e-5)


def test_dropped_gates_are_for_training_alone():
  layer, x = tuned(dropout=0.5), drawn(40, 5)
  route = lambda: layer.dot_general.route(x)
  _, _, _, router = arrays(layer)
  plain = oracle.sira_gates(np.asarray(x) @ router, 2)
  gates = dense(route())
  best = plain.argmax(1)
  chosen = gates[np.arange(40), best] > 0
  assert 0.2 < chosen.mean() < 0.8  # half of them: four deviations of 40 draws
  assert (gates > 0).sum(1).max() <= 2
  layer.eval()
  np.testing.assert_allclose(dense(route()), plain, rtol=1e-5)
  layer.train()
  assert not np.array_equal(dense(route()), dense(route()))


def test_it_trains_and_all_else_stays():
  layer = tuned(dropout=0.2, balance=0.1, capacity_factor=2.0)
  x, y = drawn(12, 5), drawn(12, 4)
  kernel = np.asarray(layer.kernel[...])
  kind = nnx.LoRAParam
  optimizer = nnx.Optimizer(layer, optax.adam(0.03), wrt=kind)

  @nnx.jit
  def step(layer, optimizer):
    def loss(layer):
      error = ((layer(x) - y) ** 2).mean()
      return error + routing.auxiliary_loss(layer), error

    grads, error = nnx.grad(loss, argnums=nnx.DiffState(0, kind), has_aux=True)(
      layer
    )
    optimizer.update(layer, grads)
    return error, grads

  errors, grads = zip(*[step(layer, optimizer) for _ in range(30)], strict=True)
  assert errors[-1] < errors[0] / 2
  assert all(jnp.any(g != 0) for g in jax.tree.leaves(grads[0]))
  np.testing.assert_array_equal(layer.kernel[...], kernel)
  assert routing.auxiliary_loss(layer) >= 0.05


def test_the_bank_with_a_router_is_a_mixture_of_lora():
  bank, x = finetuning.LoRABank(3.0), drawn(6, 5)
  params = {"a": drawn(4, 5, 2), "b": drawn(4, 2, 3)}
  logits = drawn(6, 4)
  found = routing.top_k(logits, 2, renormalize=True)
  got = routing.dropless(x, found, bank, params)
  gates = oracle.top_k_gates(np.asarray(logits), 2, normalize=True)
  a, b = map(np.asarray, params.values())
  want = oracle.lora_moe(np.asarray(x), np.zeros((5, 3)), a, b, 3.0, gates)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
  with pytest.raises(ValueError, match="rank must be 1 or more, got 0"):
    bank.init(jax.random.key(0), experts=1, inputs=2, outputs=2, rank=0)


@pytest.mark.parametrize(
  ("options", "match"),
  [
    ({"k": 5}, r"k must be in \[1, 4\], got 5"),
    ({"k": 0}, r"k must be in \[1, 4\], got 0"),
    ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
    ({"capacity_factor": 0.0}, "capacity_factor must be positive"),
    ({"rank": 0}, "rank must be 1 or more"),
    ({"where": "nothing"}, "where"),
  ],
)
def test_bad_input(options, match):
  with pytest.raises(ValueError, match=match):
    tuned(**options)
