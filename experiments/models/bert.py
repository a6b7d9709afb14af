"""BERT, an encoder of text, as Hugging Face's checkpoints hold it."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from experiments.models import checkpoints

# By the name that a config.json has for them.
ACTIVATIONS = {
  "gelu": functools.partial(jax.nn.gelu, approximate=False),
  "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
  "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
  "relu": jax.nn.relu,
}


@dataclasses.dataclass(frozen=True)
class Config:
  """What this module reads of a config.json, under its names there."""

  vocab_size: int
  hidden_size: int
  num_hidden_layers: int
  num_attention_heads: int
  intermediate_size: int
  max_position_embeddings: int = 512
  type_vocab_size: int = 2
  layer_norm_eps: float = 1e-12
  hidden_act: str = "gelu"

  @classmethod
  def read(cls, settings: Mapping[str, Any]) -> "Config":
    """The config of a model; ValueError where it isn't one for this module."""
    checkpoints.refuse(
      settings,
      hidden_act=ACTIVATIONS,
      position_embedding_type=("absolute",),
      is_decoder=(False,),
      add_cross_attention=(False,),
      quantization_config=(None,),
    )
    config = checkpoints.fields(cls, settings)
    checkpoints.check_multiple(
      hidden_size=config.hidden_size,
      num_attention_heads=config.num_attention_heads,
    )
    return config


class Attention(nnx.Module):
  """Self-attention on [batch, sequence, width]."""

  def __init__(
    self, config: Config, *, attention_fn: Callable, param_dtype, rngs: nnx.Rngs
  ):
    width, self.heads = config.hidden_size, config.num_attention_heads
    self.attention_fn = attention_fn
    linear = functools.partial(
      nnx.Linear, width, width, param_dtype=param_dtype, rngs=rngs
    )
    self.query, self.key, self.value = linear(), linear(), linear()
    self.out = linear()

  def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
    heads = (*x.shape[:2], self.heads, x.shape[2] // self.heads)
    q, k, v = (
      layer(x).reshape(heads) for layer in (self.query, self.key, self.value)
    )
    return self.out(self.attention_fn(q, k, v, mask=mask).reshape(x.shape))


class Block(nnx.Module):
  """Attention, then a two-layer MLP, a norm after each is added."""

  def __init__(
    self, config: Config, *, attention_fn: Callable, param_dtype, rngs: nnx.Rngs
  ):
    width, inner = config.hidden_size, config.intermediate_size
    given = {"param_dtype": param_dtype, "rngs": rngs}
    self.attention = Attention(config, attention_fn=attention_fn, **given)
    self.attention_norm = _norm(config, **given)
    self.up = nnx.Linear(width, inner, **given)
    self.down = nnx.Linear(inner, width, **given)
    self.mlp_norm = _norm(config, **given)
    self.hidden_act = config.hidden_act

  def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
    x = self.attention_norm(x + self.attention(x, mask))
    inner = ACTIVATIONS[self.hidden_act](self.up(x))
    return self.mlp_norm(x + self.down(inner))


class Bert(nnx.Module):
  """The last hidden states of tokens that all see each other.

  Called with tokens [batch, sequence] of integers, it returns [batch,
  sequence, width]. `valid`, bools like the tokens, is False at padding, which
  no token reads; `types` are integers like the tokens, zeros by default.

  Args:
    config: what the checkpoint's config.json says.
    attention_fn: (q, k, v, mask=) on [batch, sequence, heads, head_dim], as
      jax.nn.dot_product_attention is.
    param_dtype: of the parameters, in which it also computes.
    rngs: for the initial parameters.
  """

  NAMES = checkpoints.Names(
    modules={
      "embed": "embeddings.word_embeddings",
      "embed_positions": "embeddings.position_embeddings",
      "embed_types": "embeddings.token_type_embeddings",
      "embed_norm": "embeddings.LayerNorm",
      "blocks/*/attention/query": "encoder.layer.*.attention.self.query",
      "blocks/*/attention/key": "encoder.layer.*.attention.self.key",
      "blocks/*/attention/value": "encoder.layer.*.attention.self.value",
      "blocks/*/attention/out": "encoder.layer.*.attention.output.dense",
      "blocks/*/attention_norm": "encoder.layer.*.attention.output.LayerNorm",
      "blocks/*/up": "encoder.layer.*.intermediate.dense",
      "blocks/*/down": "encoder.layer.*.output.dense",
      "blocks/*/mlp_norm": "encoder.layer.*.output.LayerNorm",
    },
    # The hidden states need neither the pooler (of the first token) nor the
    # heads that BERT was trained with.
    unused=r"embeddings\.position_ids|pooler\..*|cls\..*",
    prefix="bert.",
    # As the first checkpoints call them.
    older={"LayerNorm.gamma": "LayerNorm.weight"}
    | {"LayerNorm.beta": "LayerNorm.bias"},
  )

  def __init__(
    self,
    config: Config,
    *,
    attention_fn: Callable = jax.nn.dot_product_attention,
    param_dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    width = config.hidden_size
    given = {"param_dtype": param_dtype, "rngs": rngs}
    self.embed = nnx.Embed(config.vocab_size, width, **given)
    self.embed_positions = nnx.Embed(
      config.max_position_embeddings, width, **given
    )
    self.embed_types = nnx.Embed(config.type_vocab_size, width, **given)
    self.embed_norm = _norm(config, **given)
    self.blocks = nnx.List(
      Block(config, attention_fn=attention_fn, **given)
      for _ in range(config.num_hidden_layers)
    )

  def __call__(
    self,
    tokens: jax.Array,
    valid: jax.Array | None = None,
    types: jax.Array | None = None,
  ) -> jax.Array:
    sequence, longest = tokens.shape[1], self.embed_positions.num_embeddings
    if sequence > longest:
      raise ValueError(
        f"tokens must have at most {longest} positions (the model learned no "
        f"more); got {sequence}."
      )
    types = jnp.zeros_like(tokens) if types is None else types
    x = self.embed(tokens) + self.embed_positions(jnp.arange(sequence))
    x = self.embed_norm(x + self.embed_types(types))
    mask = None if valid is None else valid[:, None, None, :]
    for block in self.blocks:
      x = block(x, mask)
    return x


def mean_embedding(hidden: jax.Array, valid: jax.Array) -> jax.Array:
  """The mean of the valid hidden states, scaled to length 1.

  The pooling of all-MiniLM-L6-v2 and its relatives.

  Args:
    hidden: [batch, sequence, width].
    valid: bool [batch, sequence], False at padding.

  Returns:
    f32 [batch, width]; zeros where nothing is valid.
  """
  kept = jnp.where(valid[..., None], hidden.astype(jnp.float32), 0)
  mean = kept.sum(1) / jnp.maximum(valid.sum(1, keepdims=True), 1)
  norm = jnp.sqrt((mean**2).sum(-1, keepdims=True))
  return mean / jnp.maximum(norm, 1e-12)


def _norm(config: Config, **given) -> nnx.LayerNorm:
  return nnx.LayerNorm(
    config.hidden_size,
    epsilon=config.layer_norm_eps,
    use_fast_variance=False,
    **given,
  )
