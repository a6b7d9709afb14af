"""Sparse attention as `attention_fn` of Flax's modules."""

from flax import nnx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pallas_kernels as pk
from sparsejax.attention import as_attention_fn
from sparsejax.attention import patterns
from tests.kernels import problem

S = 40
SIZES = dict(num_heads=2, qkv_features=16)
CAUSAL = patterns.mask(pk.Causal(), S, S, block_q=16, block_kv=16)
X = jax.random.normal(jax.random.key(0), (2, S, 12))


def nnx_layer(**options):
  return nnx.MultiHeadAttention(
    in_features=12, decode=False, rngs=nnx.Rngs(0), **SIZES, **options
  )


def step(call):
  """Two steps of SGD of call(params, x), with their losses."""
  loss = lambda params, x: ((call(params, x) - 1) ** 2).mean()

  @problem.jit
  def train(params, x):
    losses = []
    for _ in range(2):
      value, grads = jax.value_and_grad(loss)(params, x)
      params = optax.tree.add_scale(params, -0.1, grads)
      losses.append(value)
    return params, jnp.stack(losses), call(params, x)

  return train


def assert_same_training(of_ours, of_theirs, params):
  got, want = (step(call)(params, X) for call in (of_ours, of_theirs))
  assert got[1][1] < got[1][0]
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, atol=3e-6)


def test_nnx():
  def split(**options):
    graph, params = nnx.split(nnx_layer(**options))
    return lambda params, x, **kw: nnx.merge(graph, params)(x, **kw), params

  ours, params = split(attention_fn=as_attention_fn(CAUSAL))
  theirs, _ = split()
  dense = lambda params, x: theirs(params, x, is_causal=True)
  assert_same_training(ours, dense, params)


def test_linen():
  ours = nn.MultiHeadDotProductAttention(
    attention_fn=as_attention_fn(CAUSAL), **SIZES
  )
  theirs = nn.MultiHeadDotProductAttention(**SIZES)
  params = ours.init(jax.random.key(1), X)
  mask = nn.make_causal_mask(jnp.ones((2, S)))
  dense = lambda params, x: theirs.apply(params, x, mask=mask)
  assert_same_training(ours.apply, dense, params)


def test_rules_and_grouped_heads():
  """Lists made of a rule, inside of jit, are those made before."""
  q = jax.random.normal(jax.random.key(0), (2, S, 2, 8))
  k, v = q[:, ::-1, :1], q[:, :, 1:]
  of_rule = as_attention_fn(pk.Causal(), block=16)
  got = problem.jit(of_rule)(q, k, v)
  np.testing.assert_array_equal(
    got, problem.jit(as_attention_fn(CAUSAL))(q, k, v)
  )
  want = nnx.dot_product_attention(q, k, v, is_causal=True)
  np.testing.assert_allclose(got, want, atol=2e-6)


def test_functions():
  """One's own method, under other batch dimensions and dtypes."""
  seen = []

  def method(q, k, v, **positions):
    seen.append((q.shape, k.shape, q.dtype, v.dtype, sorted(positions)))
    return q + v.sum(1, keepdims=True)

  fn = as_attention_fn(method)
  q, k = jnp.ones((2, 3, S, 2, 8), jnp.bfloat16), jnp.ones((2, 3, 9, 1, 8))
  assert fn(q, k, k).shape == q.shape
  assert fn(q[0, 0], k[0, 0], k[0, 0]).shape == (S, 2, 8)
  at = jnp.zeros((2, 3, S), jnp.int32)
  assert fn(q, q, q, input_positions=at).dtype == jnp.bfloat16
  fn(q, k, k, dtype=jnp.bfloat16, dropout_rate=0.5, deterministic=True)
  f32, bf16 = jnp.dtype("float32"), jnp.dtype("bfloat16")
  assert seen == [
    ((6, S, 2, 8), (6, 9, 1, 8), f32, f32, []),
    ((1, S, 2, 8), (1, 9, 1, 8), f32, f32, []),
    ((6, S, 2, 8), (6, S, 2, 8), bf16, bf16, ["kv_positions", "q_positions"]),
    ((6, S, 2, 8), (6, 9, 1, 8), bf16, bf16, []),
  ]


def test_positions():
  """Those of NNX are what the rule sees."""
  one = pk.BlockMask(
    [[[[0]]]], block_q=16, block_kv=16, kv_blocks=1, rule=pk.Causal()
  )
  fn = problem.jit(as_attention_fn(one))
  q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 16, 2, 8))
  at = jnp.arange(16)[None]
  got = fn(q, k, v, input_positions=at[:, ::-1])
  back = fn(q[:, ::-1], k[:, ::-1], v[:, ::-1], input_positions=at)
  np.testing.assert_allclose(got, back[:, ::-1], atol=1e-6)


def test_bad_methods():
  for method in (None, 3, patterns.Sinks):
    with pytest.raises(ValueError, match="method is"):
      as_attention_fn(method)
  with pytest.raises(ValueError, match="block is 16"):
    as_attention_fn(CAUSAL, block=16)
  with pytest.raises(ValueError, match="block_q is 24"):
    as_attention_fn(pk.Causal(), block=24)(*[jnp.ones((1, 8, 1, 8))] * 3)


@pytest.mark.parametrize(
  "name,value",
  [
    ("mask", jnp.ones((1, 1, S, S), bool)),
    ("bias", jnp.ones((1, 1, S, S))),
    ("is_causal", True),
    ("dropout_rate", 0.5),
    ("precision", jax.lax.Precision.HIGHEST),
    ("module", nn.Dense(3)),
    ("qk_attn_weights_einsum", jnp.einsum),
    ("attn_weights_value_einsum", jnp.einsum),
    ("input_positions", jnp.arange(S)[None]),
  ],
)
def test_what_a_method_cannot_do(name, value):
  q = jnp.ones((1, S, 2, 8))
  with pytest.raises(ValueError, match=f"{name} is"):
    as_attention_fn(pk.Causal())(q, q, q, **{name: value})


def test_modules_are_told():
  """What the modules ask of it, decoding too, and not silently left out."""
  layer = nnx_layer(attention_fn=as_attention_fn(CAUSAL))
  with pytest.raises(ValueError, match="is_causal is True"):
    layer(X, is_causal=True)
  with pytest.raises(ValueError, match="module is"):
    layer(X, sow_weights=True)
  layer.init_cache(X.shape)
  with pytest.raises(ValueError, match="mask is"):
    layer(X[:, :1], decode=True)
  linen = nn.MultiHeadDotProductAttention(
    attention_fn=as_attention_fn(CAUSAL), dropout_rate=0.5, **SIZES
  )
  params = linen.init(jax.random.key(1), X, deterministic=True)
  with pytest.raises(ValueError, match="dropout_rate is"):
    linen.apply(
      params, X, deterministic=False, rngs={"dropout": jax.random.key(0)}
    )
