"""Llama, a decoder-only Transformer, as Hugging Face's checkpoints hold it."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import math
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from experiments.models import checkpoints


@dataclasses.dataclass(frozen=True)
class Rope:
  """How fast pairs of features turn with the position.

  `rope_type` is "default", "linear" (all pairs turn `factor` times slower) or
  "llama3": pairs that turn less than `low_freq_factor` times in
  `original_max_position_embeddings` do, those that turn more than
  `high_freq_factor` times do not, and the rest is interpolated.
  """

  rope_type: str = "default"
  rope_theta: float = 10_000.0
  factor: float = 1.0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_max_position_embeddings: int = 8192

  @classmethod
  def read(cls, settings: Mapping[str, Any]) -> "Rope":
    """Of a config.json: `rope_parameters`, or the older `rope_scaling`."""
    given = {}
    for name in ("rope_scaling", "rope_parameters"):
      part = settings.get(name)
      if not isinstance(part, Mapping | None):
        raise ValueError(f"{name} must be an object; got {part!r}")
      given |= part or {}
    if "type" in given:
      given.setdefault("rope_type", given["type"])
    given.setdefault("rope_theta", settings.get("rope_theta", cls.rope_theta))
    types = ("default", "linear", "llama3")
    checkpoints.refuse(given, rope_type=types, partial_rotary_factor=(1, 1.0))
    needs = {"linear": ("factor",), "llama3": [f.name for f in _SCALED]}
    for name in needs.get(given.get("rope_type", "default"), ()):
      if name not in given:
        raise ValueError(
          f"{name} is missing beside rope_type={given['rope_type']!r}"
        )
    rope = checkpoints.fields(cls, given)
    if rope.high_freq_factor <= rope.low_freq_factor:
      raise ValueError(
        "high_freq_factor must be above low_freq_factor; got "
        f"{rope.high_freq_factor} and {rope.low_freq_factor}"
      )
    return rope

  def frequencies(self, head_dim: int) -> np.ndarray:
    """Radians a position, f32 [head_dim / 2]."""
    half = head_dim // 2
    frequency = self.rope_theta ** -(np.arange(half) / half)
    if self.rope_type == "linear":
      frequency = frequency / self.factor
    if self.rope_type == "llama3":
      turns = self.original_max_position_embeddings * frequency / (2 * math.pi)
      low, high = self.low_freq_factor, self.high_freq_factor
      # 1 where a pair turns often (as it was), 0 where seldom (scaled).
      kept = np.clip((turns - low) / (high - low), 0, 1)
      frequency = frequency * (kept + (1 - kept) / self.factor)
    return frequency.astype(np.float32)


_SCALED = [
  field
  for field in dataclasses.fields(Rope)
  if field.name not in ("rope_type", "rope_theta")
]


@dataclasses.dataclass(frozen=True)
class Config:
  """What this module reads of a config.json, under its names there.

  `num_key_value_heads` and `head_dim` may be missing or null there: as many
  as `num_attention_heads`, and an equal share of `hidden_size`.
  """

  vocab_size: int
  hidden_size: int
  num_hidden_layers: int
  num_attention_heads: int
  intermediate_size: int
  num_key_value_heads: int
  head_dim: int
  max_position_embeddings: int = 2048
  rms_norm_eps: float = 1e-6
  tie_word_embeddings: bool = False
  attention_bias: bool = False
  mlp_bias: bool = False
  rope: Rope = Rope()

  @classmethod
  def read(cls, settings: Mapping[str, Any]) -> "Config":
    """The config of a model; ValueError where it isn't one for this module."""
    checkpoints.refuse(
      settings,
      hidden_act=("silu",),
      sliding_window=(None,),
      partial_rotary_factor=(1, 1.0),
      quantization_config=(None,),
    )
    settings = {name: x for name, x in settings.items() if x is not None}
    settings["rope"] = Rope.read(settings)
    width, heads = (
      settings.get(name) for name in ("hidden_size", "num_attention_heads")
    )
    # Where these are wrong, `fields` says so below.
    if all(type(size) is int and size > 0 for size in (width, heads)):
      settings.setdefault("num_key_value_heads", heads)
      if "head_dim" not in settings:
        checkpoints.check_multiple(hidden_size=width, num_attention_heads=heads)
        settings["head_dim"] = width // heads
    config = checkpoints.fields(cls, settings)
    checkpoints.check_multiple(
      num_attention_heads=config.num_attention_heads,
      num_key_value_heads=config.num_key_value_heads,
    )
    if config.head_dim % 2:
      raise ValueError(
        "head_dim must be even (rotary positions turn pairs of features); got "
        f"{config.head_dim}"
      )
    return config


def rotate(x: jax.Array, frequencies: jax.Array) -> jax.Array:
  """Turns pairs of features by the position; feature i is paired with i + half.

  Args:
    x: queries or keys [batch, sequence, heads, head_dim].
    frequencies: radians a position, f32 [head_dim / 2].

  Returns:
    An array of x's shape and dtype.
  """
  angle = jnp.arange(x.shape[1])[:, None, None] * frequencies
  cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
  a, b = jnp.split(x, 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


class Attention(nnx.Module):
  """Causal self-attention on [batch, sequence, width]; queries share keys."""

  def __init__(
    self, config: Config, *, attention_fn: Callable, param_dtype, rngs: nnx.Rngs
  ):
    self.head_dim, self.rope = config.head_dim, config.rope
    self.attention_fn = attention_fn
    linear = functools.partial(
      nnx.Linear,
      use_bias=config.attention_bias,
      param_dtype=param_dtype,
      rngs=rngs,
    )
    width = config.hidden_size
    inner = config.num_attention_heads * config.head_dim
    shared = config.num_key_value_heads * config.head_dim
    self.query, self.out = linear(width, inner), linear(inner, width)
    self.key, self.value = linear(width, shared), linear(width, shared)

  def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
    heads = (*x.shape[:2], -1, self.head_dim)
    q, k, v = (
      layer(x).reshape(heads) for layer in (self.query, self.key, self.value)
    )
    frequencies = self.rope.frequencies(self.head_dim)
    q, k = rotate(q, frequencies), rotate(k, frequencies)
    y = self.attention_fn(q, k, v, mask=mask)
    return self.out(y.reshape(*x.shape[:2], -1))


class Block(nnx.Module):
  """Attention, then a gated MLP, each added to the residual stream."""

  def __init__(
    self, config: Config, *, attention_fn: Callable, param_dtype, rngs: nnx.Rngs
  ):
    width, inner = config.hidden_size, config.intermediate_size
    given = {"param_dtype": param_dtype, "rngs": rngs}
    self.attention_norm = _norm(config, **given)
    self.attention = Attention(config, attention_fn=attention_fn, **given)
    self.mlp_norm = _norm(config, **given)
    linear = functools.partial(nnx.Linear, use_bias=config.mlp_bias, **given)
    self.gate, self.up = linear(width, inner), linear(width, inner)
    self.down = linear(inner, width)

  def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
    x = x + self.attention(self.attention_norm(x), mask)
    y = self.mlp_norm(x)
    return x + self.down(jax.nn.silu(self.gate(y)) * self.up(y))


class Llama(nnx.Module):
  """Logits of each next token.

  Called with tokens [batch, sequence] of integers, it returns logits [batch,
  sequence, vocabulary]. `valid`, bools like the tokens, is False at padding,
  which no token reads.

  Args:
    config: what the checkpoint's config.json says.
    attention_fn: (q, k, v, mask=) on [batch, sequence, heads, head_dim], with
      fewer heads in k and v, as jax.nn.dot_product_attention is.
    param_dtype: of the parameters, in which it also computes.
    rngs: for the initial parameters.
  """

  NAMES = checkpoints.Names(
    modules={
      "embed": "model.embed_tokens",
      "blocks/*/attention_norm": "model.layers.*.input_layernorm",
      "blocks/*/attention/query": "model.layers.*.self_attn.q_proj",
      "blocks/*/attention/key": "model.layers.*.self_attn.k_proj",
      "blocks/*/attention/value": "model.layers.*.self_attn.v_proj",
      "blocks/*/attention/out": "model.layers.*.self_attn.o_proj",
      "blocks/*/mlp_norm": "model.layers.*.post_attention_layernorm",
      "blocks/*/gate": "model.layers.*.mlp.gate_proj",
      "blocks/*/up": "model.layers.*.mlp.up_proj",
      "blocks/*/down": "model.layers.*.mlp.down_proj",
      "norm": "model.norm",
      "readout": "lm_head",
    },
    # Older checkpoints keep the frequencies that the config tells.
    unused=r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
    # Where embeddings are tied, a checkpoint may hold the same array again.
    tied={"lm_head.weight": "model.embed_tokens.weight"},
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
    self.blocks = nnx.List(
      Block(config, attention_fn=attention_fn, **given)
      for _ in range(config.num_hidden_layers)
    )
    self.norm = _norm(config, **given)
    self.tied = config.tie_word_embeddings
    if not self.tied:
      self.readout = nnx.Linear(
        width, config.vocab_size, use_bias=False, **given
      )

  def __call__(
    self, tokens: jax.Array, valid: jax.Array | None = None
  ) -> jax.Array:
    sequence = tokens.shape[1]
    mask = jnp.tri(sequence, dtype=bool)[None, None]
    if valid is not None:
      mask = mask & valid[:, None, None, :]
    x = self.embed(tokens)
    for block in self.blocks:
      x = block(x, mask)
    x = self.norm(x)
    return self.embed.attend(x) if self.tied else self.readout(x)


def _norm(config: Config, **given) -> nnx.RMSNorm:
  return nnx.RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, **given)
