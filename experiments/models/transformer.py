"""A small decoder-only Transformer: pre-norm, rotary positions."""

from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from experiments import attention_methods
from experiments import settings

ACTIVATIONS = {
  "relu": nnx.relu,
  # As good as a GELU, at a third of its time on CPU.
  "squared_relu": lambda x: nnx.relu(x) ** 2,
}


def rotary(x: jax.Array, base: float = 10_000.0) -> jax.Array:
  """Rotates pairs of features by angles that grow with the position.

  Args:
    x: queries or keys [batch, sequence, heads, head_dim], head_dim even.
    base: the wavelengths, in positions, reach from 2 pi to 2 pi * base.

  Returns:
    An array of x's shape and dtype.
  """
  half = x.shape[-1] // 2
  frequency = base ** -(jnp.arange(half) / half)
  angle = jnp.arange(x.shape[1])[:, None, None] * frequency
  cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
  a, b = x[..., :half], x[..., half:]
  return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def shifted_sum(x: jax.Array, taps: jax.Array) -> jax.Array:
  """A causal convolution of each feature for itself.

  Args:
    x: [batch, sequence, width].
    taps: [taps, width]; the first is of the token itself.

  Returns:
    An array like x: the sum over i of taps[i] * x[:, t - i].
  """
  padded = jnp.pad(x, ((0, 0), (len(taps) - 1, 0), (0, 0)))
  return sum(
    tap * padded[:, len(taps) - 1 - i :][:, : x.shape[1]]
    for i, tap in enumerate(taps)
  )


class Attention(nnx.Module):
  """Causal self-attention on [batch, sequence, width].

  `attend` is called with x, which queries, keys and values are made of, and
  with these; it may be a module. With `taps` above 0 they are made of what a
  convolution of so many tokens adds to x.
  """

  def __init__(
    self,
    width: int,
    heads: int,
    *,
    out_init,
    attend: Callable,
    taps: int = 0,
    rngs: nnx.Rngs,
  ):
    self.heads, self.attend = heads, attend
    drawn = lambda: jax.random.normal(rngs.params(), (taps, width))
    self.taps = nnx.Param(drawn() * taps**-0.5) if taps else None
    self.qkv = nnx.Linear(width, 3 * width, use_bias=False, rngs=rngs)
    self.out = nnx.Linear(
      width, width, use_bias=False, kernel_init=out_init, rngs=rngs
    )

  def __call__(self, x: jax.Array) -> jax.Array:
    if self.taps is not None:
      x = x + shifted_sum(x, self.taps[...])
    batch, sequence, width = x.shape
    heads = (batch, sequence, self.heads, width // self.heads)
    q, k, v = (y.reshape(heads) for y in jnp.split(self.qkv(x), 3, axis=-1))
    y = self.attend(x, rotary(q), rotary(k), v)
    return self.out(y.reshape(x.shape))


class Block(nnx.Module):
  """Attention, then a two-layer MLP, each added to the residual stream.

  A module that is given as `mixture` stands in the place of the MLP.
  """

  def __init__(
    self,
    width: int,
    heads: int,
    *,
    out_init,
    mixture: nnx.Module | None = None,
    hidden: int,
    activation: str,
    attend: Callable = attention_methods.dense,
    taps: int = 0,
    rngs: nnx.Rngs,
  ):
    self.attention_norm = nnx.RMSNorm(width, rngs=rngs)
    self.attention = Attention(
      width, heads, out_init=out_init, attend=attend, taps=taps, rngs=rngs
    )
    self.mlp_norm = nnx.RMSNorm(width, rngs=rngs)
    self.mixture, self.activation = mixture, activation
    if mixture is not None:
      return
    self.up = nnx.Linear(width, hidden, use_bias=False, rngs=rngs)
    self.down = nnx.Linear(
      hidden, width, use_bias=False, kernel_init=out_init, rngs=rngs
    )

  def __call__(self, x: jax.Array) -> jax.Array:
    x = x + self.attention(self.attention_norm(x))
    if self.mixture is not None:
      return x + self.mixture(self.mlp_norm(x))
    activation = ACTIVATIONS[self.activation]
    return x + self.down(activation(self.up(self.mlp_norm(x))))


class Transformer(nnx.Module):
  """Logits of each next token.

  Called with tokens [batch, sequence] of integers below `vocabulary`, it
  returns logits [batch, sequence, vocabulary].

  Args:
    mixture: which a config cannot set, makes what stands in the place of each
      block's MLP.
    vocabulary: of tokens.
    width: of the residual stream.
    depth: how many blocks.
    heads: of attention.
    hidden: neurons of each MLP; 0 for 4 * width.
    activation: of the MLPs, one of ACTIVATIONS.
    attention: one of `attention_methods.LAYERS` by "name", and its settings;
      default "dense".
    taps: of a convolution before each attention; 0 for none.
    rngs: for the initial parameters.
  """

  def __init__(
    self,
    mixture: Callable[[], nnx.Module] | None = None,
    *,
    vocabulary: int,
    width: int,
    depth: int,
    heads: int,
    hidden: int = 0,
    activation: str = "squared_relu",
    attention: Mapping[str, Any] | None = None,
    taps: int = 0,
    rngs: nnx.Rngs,
  ):
    if width % (2 * heads):
      raise ValueError(
        "width must be a multiple of 2 * heads (rotary positions turn pairs "
        f"of features); got width={width}, heads={heads}."
      )
    if activation not in ACTIVATIONS:
      raise ValueError(
        f"config.model.activation takes one of {', '.join(ACTIVATIONS)}; got "
        f"{activation!r}."
      )
    if hidden < 0:
      raise ValueError(f"config.model.hidden takes 0 or more; got {hidden}.")
    self.width, self.depth = width, depth
    # Each block adds two terms to the residual stream: the sum of all of
    # them starts with the variance of one.
    out_init = nnx.initializers.variance_scaling(
      1 / (2 * depth), "fan_in", "truncated_normal"
    )
    self.embed = nnx.Embed(
      vocabulary, width, embedding_init=nnx.initializers.normal(1), rngs=rngs
    )
    self.blocks = nnx.List(
      Block(
        width,
        heads,
        out_init=out_init,
        mixture=mixture and mixture(),
        hidden=hidden or 4 * width,
        activation=activation,
        attend=settings.call(
          "model.attention",
          attention or {"name": "dense"},
          attention_methods.LAYERS,
          attention_methods.Shape(width, heads, rngs),
        ),
        taps=taps,
        rngs=rngs,
      )
      for _ in range(depth)
    )
    self.norm = nnx.RMSNorm(width, rngs=rngs)
    self.readout = nnx.Linear(width, vocabulary, use_bias=False, rngs=rngs)

  def __call__(self, tokens: jax.Array) -> jax.Array:
    x = self.embed(tokens.astype(jnp.int32))
    for block in self.blocks:
      x = block(x)
    return self.readout(self.norm(x))

  def other_flops(self, tokens: int) -> float:
    """Operations on a sequence beyond the weights: scores and mixtures."""
    layers = [block.attention for block in self.blocks]
    return sum(
      attention_methods.flops(
        layer.attend, tokens, layer.heads, self.width // layer.heads
      )
      for layer in layers
    )
