from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.models import transformer
from sparsejax import finetuning
from tests.oracles import finetuning as oracle

RNG = np.random.default_rng(0)


def drawn(*shape):
  return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def tuned(dropout=0.0, **options):
  """A layer [5, 4] with a LoRA of rank 3 that changes something."""
  layer = nnx.Linear(5, 4, use_bias=False, rngs=nnx.Rngs(0), **options)
  layer = finetuning.add_lora(
    layer, rank=3, alpha=2.0, dropout=dropout, rngs=nnx.Rngs(1)
  )
  layer.dot_general.b[...] = drawn(3, 4).astype(layer.kernel.dtype)
  return layer


def arrays(layer):
  lora = layer.dot_general
  return [np.asarray(v[...]) for v in (layer.kernel, lora.a, lora.b)]


def near(got, want):
  # f32 sums of a few terms of size one.
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("leading", [(6,), (), (2, 3)])
def test_layer_and_gradients(leading):
  layer, x, dy = tuned(), drawn(*leading, 5), drawn(*leading, 4)
  w, a, b = arrays(layer)
  rows, cotangent = np.reshape(x, (-1, 5)), np.reshape(dy, (-1, 4))
  near(layer(x).reshape(-1, 4), oracle.lora(rows, w, a, b, 2.0))

  @nnx.jit
  def gradients(layer, x):
    loss = lambda layer, x: (layer(x) * dy).sum()
    kinds = (nnx.DiffState(0, nnx.LoRAParam), 1)
    return nnx.grad(loss, argnums=kinds)(layer, x)

  found, dx = gradients(layer, x)
  want = oracle.lora_gradients(rows, w, a, b, 2.0, cotangent)
  near(dx.reshape(-1, 5), want[0])
  near(found["dot_general"]["a"][...], want[1])
  near(found["dot_general"]["b"][...], want[2])
  assert len(jax.tree.leaves(found)) == 2


def test_merged_equals_unmerged():
  layer, x = tuned(), drawn(6, 5)
  merged = finetuning.merge_lora(layer)
  near(merged.kernel[...], oracle.lora_merge(*arrays(layer), 2.0))
  near(merged(x), layer(x))
  assert merged.dot_general is jax.lax.dot_general
  assert isinstance(layer.dot_general, finetuning.LoRA)  # a copy was merged
  near(layer.dot_general.delta(), oracle.lora_delta(*arrays(layer)[1:], 2.0))


def test_bf16():
  layer = tuned(param_dtype=jnp.bfloat16, dtype=jnp.bfloat16)
  assert layer.dot_general.a.dtype == jnp.bfloat16
  x = drawn(6, 5)
  y = layer(x)
  merged = finetuning.merge_lora(layer)
  assert y.dtype == merged.kernel.dtype == jnp.bfloat16
  # bf16 has eight bits; sums of size about five.
  np.testing.assert_allclose(
    np.asarray(y, np.float32), np.asarray(merged(x), np.float32), atol=0.1
  )


def test_of_a_transformer_the_factors_alone_train():
  model = transformer.Transformer(
    vocabulary=11, width=8, depth=2, heads=2, rngs=nnx.Rngs(0)
  )
  tokens = jnp.asarray(RNG.integers(0, 11, (2, 6)))
  lora = finetuning.add_lora(
    model, where=r"out|up", rank=2, alpha=4.0, rngs=nnx.Rngs(1)
  )
  np.testing.assert_array_equal(lora(tokens), model(tokens))
  kind = nnx.LoRAParam
  # Of each block: out [8, 8] and up [8, 32]; the readout is [8, 11].
  size = 2 * (2 * 16 + 2 * 40) + 2 * 19
  assert sum(p.size for p in jax.tree.leaves(nnx.state(lora, kind))) == size
  optimizer = nnx.Optimizer(lora, optax.adamw(0.1), wrt=kind)
  moments = jax.tree.leaves(nnx.state(optimizer, nnx.OptState))
  assert sum(p.size for p in moments) <= 2 * size + 2  # and two counts

  def loss(model):
    logits = model(tokens)[:, :-1]
    of = optax.softmax_cross_entropy_with_integer_labels
    return of(logits, tokens[:, 1:]).mean()

  @nnx.jit
  def step(model, optimizer):
    value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, kind))(
      model
    )
    optimizer.update(model, grads)
    return value

  losses = [step(lora, optimizer) for _ in range(5)]
  assert losses[-1] < losses[0]
  frozen = lambda m: nnx.to_pure_dict(
    nnx.state(
      m, lambda path, v: isinstance(v, nnx.Param) and type(v) is not kind
    )
  )
  jax.tree.map(np.testing.assert_array_equal, frozen(lora), frozen(model))
  merged = finetuning.merge_lora(lora)
  # Logits of f32 models of two layers, from kernels rounded differently.
  np.testing.assert_allclose(merged(tokens), lora(tokens), rtol=1e-4, atol=1e-4)
  changed = finetuning.update_masks(
    nnx.state(model, nnx.Param), nnx.state(merged, nnx.Param), tolerance=0
  )
  changed = nnx.to_pure_dict(changed)
  assert changed["blocks"][0]["up"]["kernel"].any()
  assert not changed["blocks"][0]["down"]["kernel"].any()


def test_dropout_masks_inputs_and_outputs_of_all_ranks():
  rate = 0.4
  layer, x = tuned(rate), drawn(6, 5)
  w, a, b = arrays(layer)
  seen = []
  sample = nnx.jit(lambda layer: layer.dot_general.factors())
  for _ in range(20):
    da, db = map(np.asarray, sample(layer))
    inputs, outputs = (da != 0).any(1), (db != 0).any(0)
    # A whole input or output, or none of it: the rank stays.
    np.testing.assert_allclose(da, a * inputs[:, None] / (1 - rate), rtol=1e-6)
    np.testing.assert_allclose(db, b * outputs / (1 - rate), rtol=1e-6)
    want = oracle.lora_dropout_delta(a, b, 2.0, inputs, outputs, rate)
    near(layer.dot_general.scale * da @ db, want)
    seen.append((tuple(inputs), tuple(outputs)))
  assert len(set(seen)) > 10
  kept = np.mean([np.concatenate(s) for s in seen])
  assert abs(kept - (1 - rate)) < 0.15  # four deviations of 180 draws
  layer.eval()
  near(layer(x), oracle.lora(np.asarray(x), w, a, b, 2.0))
  layer.train()
  assert not np.allclose(layer(x), layer(x))
  plain = tuned(0.0)
  plain.train()
  np.testing.assert_array_equal(plain(x), plain(x))


def test_the_ensemble_is_no_worse_than_its_members():
  layer, x, y = tuned(0.5), drawn(6, 5), drawn(6, 4)
  outputs = [layer(x) for _ in range(8)]
  loss = lambda out: float(((out - y) ** 2).mean())
  members = [loss(out) for out in outputs]
  # Jensen: the squared error is convex.
  assert loss(sum(outputs) / 8) < np.mean(members)


def test_layers_of_a_scan():
  make = nnx.vmap(lambda key: nnx.Linear(4, 4, rngs=nnx.Rngs(key)))
  model = make(jax.random.split(jax.random.key(0), 3))
  with pytest.raises(ValueError, match=r"add inside of nnx\.vmap"):
    finetuning.add_lora(model, rank=1, rngs=nnx.Rngs(0))

  @nnx.vmap
  def add(layer, key):
    return finetuning.add_lora(layer, rank=1, rngs=nnx.Rngs(key))

  tuned = add(model, jax.random.split(jax.random.key(1), 3))
  assert tuned.dot_general.a.shape == (3, 4, 1)
  tuned.dot_general.b[...] += 1.0
  scan = nnx.scan(
    lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
  )
  x = jnp.ones((2, 4))
  merged = nnx.vmap(finetuning.merge_lora)(tuned)
  # Three f32 products of sums of four.
  np.testing.assert_allclose(scan(x, merged), scan(x, tuned), rtol=1e-4)


def test_bad_input():
  layer = nnx.Linear(5, 4, rngs=nnx.Rngs(0))
  add = lambda layer, **options: finetuning.add_lora(
    layer, rngs=nnx.Rngs(1), **options
  )
  with pytest.raises(ValueError, match="rank must be 1 or more, got 0"):
    add(layer, rank=0)
  for rate in (-0.1, 1.0):
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\)"):
      add(layer, rank=1, dropout=rate)
  with pytest.raises(ValueError, match="where"):
    add(layer, rank=1, where="nothing")
  with pytest.raises(ValueError, match="where"):
    add(nnx.LayerNorm(3, rngs=nnx.Rngs(0)), rank=1)
  with pytest.raises(ValueError, match=r"dot_general must be lax.dot_general"):
    add(add(layer, rank=1), rank=1)
  with pytest.raises(ValueError, match="model must have a LoRA"):
    finetuning.merge_lora(layer)
  with pytest.raises(ValueError, match=r"model must be an nnx.Module"):
    finetuning.merge_lora(None)
