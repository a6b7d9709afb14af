"""BERT and Llama made narrower by SliceGPT.

  found = sliced.slice_(model, batches, sparsity=0.25)
  hidden = found.model(tokens, valid)

A signal is what attention and MLPs add to. Number k is read by sublayer k (the
attention and the MLP of each block, in turn) by way of norm k, and the last one
by the readout. Each is cut to directions of its own, found in order: on what
the sublayers before put out once they are cut. Heads stay as wide as they are,
and so do MLPs inside.

In BERT norms are behind the sum, which the paper does not treat: a residual has
the gain of the norm that it comes from.
"""

from collections.abc import Iterable, Sequence
import dataclasses
import functools
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from experiments.models import bert
from experiments.models import llama
from sparsejax import capture
from sparsejax import weights


@dataclasses.dataclass(frozen=True)
class Norm:
  """An RMS norm of a signal that had `width` directions before it was cut."""

  width: int
  epsilon: float

  def __call__(self, x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    mean = (wide**2).sum(-1, keepdims=True) / self.width
    return (wide * jax.lax.rsqrt(mean + self.epsilon)).astype(x.dtype)


class Attention(nnx.Module):
  """That of BERT or Llama, from one cut signal to the next."""

  def __init__(self, dense: bert.Attention | llama.Attention, parts, k: int):
    self.attention_fn = dense.attention_fn
    self.rope = getattr(dense, "rope", None)
    self.head_dim = (
      dense.query.out_features // dense.heads
      if self.rope is None
      else dense.head_dim
    )
    self.query = parts.reading(k, dense.query)
    self.key = parts.reading(k, dense.key)
    self.value = parts.reading(k, dense.value)
    self.out = parts.writing(k, dense.out)

  def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
    heads = (*x.shape[:2], -1, self.head_dim)
    q, k, v = (
      layer(x).reshape(heads) for layer in (self.query, self.key, self.value)
    )
    if self.rope is not None:
      frequencies = self.rope.frequencies(self.head_dim)
      q, k = llama.rotate(q, frequencies), llama.rotate(k, frequencies)
    y = self.attention_fn(q, k, v, mask=mask)
    return self.out(y.reshape(*x.shape[:2], -1))


def _mlp(block, x):
  """The MLP of a block, cut or not."""
  if hasattr(block, "gate"):
    return block.down(jax.nn.silu(block.gate(x)) * block.up(x))
  return block.down(bert.ACTIVATIONS[block.hidden_act](block.up(x)))


class Block(nnx.Module):
  """Attention and MLP, and what takes the signal past each of them."""

  def __init__(self, dense: bert.Block | llama.Block, parts, k: int):
    self.post, self.norm = parts.post, parts.norm
    self.attention = Attention(dense.attention, parts, k)
    self.attention_residual = parts.residual(k)
    if hasattr(dense, "gate"):
      self.gate = parts.reading(k + 1, dense.gate)
    else:
      self.hidden_act = dense.hidden_act
    self.up = parts.reading(k + 1, dense.up)
    self.down = parts.writing(k + 1, dense.down)
    self.mlp_residual = parts.residual(k + 1)

  def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
    norm = self.norm
    if self.post:
      x = norm(self.attention_residual(x) + self.attention(x, mask))
      return norm(self.mlp_residual(x) + _mlp(self, x))
    x = self.attention_residual(x) + self.attention(norm(x), mask)
    return self.mlp_residual(x) + _mlp(self, norm(x))


class Bert(nnx.Module):
  """Hidden states as wide as those of `bert.Bert`, called as that is."""

  def __init__(self, dense: bert.Bert, parts):
    self.norm = parts.norm
    self.embed = parts.embedding(dense.embed)
    self.embed_positions = parts.embedding(dense.embed_positions)
    self.embed_types = parts.embedding(dense.embed_types)
    self.blocks = nnx.List(
      Block(block, parts, 2 * i) for i, block in enumerate(dense.blocks)
    )
    self.readout = parts.readout(jnp.eye(parts.norm.width))

  def __call__(
    self,
    tokens: jax.Array,
    valid: jax.Array | None = None,
    types: jax.Array | None = None,
  ) -> jax.Array:
    x, mask = _start(self, tokens, valid, types)
    x = self.norm(x)
    for block in self.blocks:
      x = block(x, mask)
    return self.readout(x)


class Llama(nnx.Module):
  """Logits of each next token, called as `llama.Llama` is."""

  def __init__(self, dense: llama.Llama, parts):
    self.norm = parts.norm
    self.embed = parts.embedding(dense.embed)
    self.blocks = nnx.List(
      Block(block, parts, 2 * i) for i, block in enumerate(dense.blocks)
    )
    # Tied to the embedding no more: the two are in other directions.
    tied = dense.embed.embedding[...].T if dense.tied else None
    self.readout = parts.readout(
      dense.readout.kernel[...] if tied is None else tied
    )

  def __call__(
    self, tokens: jax.Array, valid: jax.Array | None = None
  ) -> jax.Array:
    x, mask = _start(self, tokens, valid)
    for block in self.blocks:
      x = block(x, mask)
    return self.readout(self.norm(x))


def _start(model, tokens, valid=None, types=None):
  """The first signal of a model, cut or not, and who sees whom."""
  mask = None if valid is None else valid[:, None, None, :]
  if not hasattr(model, "embed_positions"):
    causal = jnp.tri(tokens.shape[1], dtype=bool)[None, None]
    return model.embed(tokens), causal if mask is None else causal & mask
  sequence, longest = tokens.shape[1], model.embed_positions.num_embeddings
  if sequence > longest:
    raise ValueError(
      f"tokens must have at most {longest} positions (the model learned no "
      f"more); got {sequence}."
    )
  types = jnp.zeros_like(tokens) if types is None else types
  x = model.embed(tokens) + model.embed_positions(jnp.arange(sequence))
  return x + model.embed_types(types), mask


class Sliced(NamedTuple):
  """A sliced model, and what it was sliced by.

  Attributes:
    model: of this module.
    widths: how many directions each signal has left.
    energies: the share that they have of each signal's energy.
    rows: how many tokens they were found on.
  """

  model: Bert | Llama
  widths: tuple[int, ...]
  energies: tuple[float, ...]
  rows: int


def slice_(
  model: bert.Bert | llama.Llama,
  batches: Iterable[Sequence[Any]],
  sparsity: float,
  *,
  multiple: int = 8,
  readout: bool = True,
) -> Sliced:
  """A model whose signals have fewer directions.

  Args:
    model: a BERT or a Llama.
    batches: what the model is called with: tokens, and `valid` where there is
      padding, which does not count.
    sparsity: share of the directions to cut; see `weights.slice_width`.
    multiple: what is left is whole multiples of it.
    readout: whether the last signal is cut too. The authors' code leaves it.

  Returns:
    The model, and what it was sliced by. With a sparsity of 0 it computes what
    it did.

  Raises:
    ValueError: an argument is out of range; there are no batches, or fewer
      tokens than directions to keep; or a signal, which is then named, is not
      finite.

  Source: slicegpt, SliceGPT: Compress Large Language Models by Deleting Rows
  and Columns, algorithm 1.
  """
  norms = _norms(model)
  full = model.embed.features
  widths = [weights.slice_width(full, sparsity, multiple)] * len(norms)
  if not readout:
    widths[-1] = full
  found, rows = rotations(model, batches, widths)
  shares = [
    float(energies[:width].sum() / energies.sum())
    for (_, energies), width in zip(found, widths)
  ]
  qs = [q[:, :width] for (q, _), width in zip(found, widths)]
  return Sliced(rebuild(model, qs), tuple(widths), tuple(shares), rows)


def rotations(
  model: bert.Bert | llama.Llama,
  batches: Iterable[Sequence[Any]],
  widths: Sequence[int],
) -> tuple[list[tuple[jax.Array, jax.Array]], int]:
  """What `weights.rotation` gives of each signal, and of how many tokens.

  Each signal is that of the model with the signals before cut to their widths:
  projected, which is the same function. It is decomposed as its norm puts it
  out, without gain and shift.
  """
  norms = _norms(model)
  if len(widths) != len(norms):
    raise ValueError(
      f"widths must be {len(norms)}, one a norm, got {len(widths)}"
    )
  blocks = [block for block in model.blocks for _ in range(2)]
  signals = []
  for batch in batches:
    valid = batch[1] if len(batch) > 1 else None
    signals.append((*_start(model, *batch), valid))
  if not signals:
    raise ValueError("batches must hold at least one batch, got none")
  settings = (isinstance(model, bert.Bert), _norm_of(model))
  found = []
  for k, ((name, norm), width) in enumerate(zip(norms.items(), widths)):
    moments = capture.Moments.zeros(model.embed.features)
    for x, _, valid in signals:
      moments = _add(settings, moments, x, valid)
    _check(name, moments, width)
    q, energies = weights.rotation(moments)
    found.append((q, energies))
    if k < len(blocks):
      # Zeros, for widths of one shape: what is compiled serves them all.
      kept = jnp.where(jnp.arange(len(q)) < width, q, 0)
      cut = (kept, norm.scale[...], getattr(norm, "bias", None))
      signals = [
        (_advance(blocks[k], k % 2 == 0, settings, cut, x, mask), mask, valid)
        for x, mask, valid in signals
      ]
  return found, int(moments.count)


@functools.partial(jax.jit, static_argnums=0)
def _add(settings, moments, x, valid):
  """With what the norm puts out of x."""
  post, norm = settings
  return moments.add(norm(_centered(x) if post else x), valid)


@functools.partial(nnx.jit, static_argnums=(1, 2))
def _advance(block, attention, settings, cut, x, mask):
  """The next signal: what a sublayer adds to this one, which is cut."""
  post, norm = settings
  q, gain, shift = cut
  wide = (_centered(x) if post else x).astype(jnp.float32)
  wide = jnp.matmul(
    jnp.matmul(wide, q, precision="highest"), q.T, precision="highest"
  )
  x = wide.astype(x.dtype)
  read = norm(x) * gain
  if post:
    x = read = read + shift
  return x + (block.attention(read, mask) if attention else _mlp(block, read))


def _centered(x):
  return x - x.mean(-1, keepdims=True)


def _check(name, moments, width):
  rows = int(moments.count)
  if width < moments.mean.shape[0] and rows < width:
    raise ValueError(
      f"batches must hold as many tokens as directions to keep: {width}, got "
      f"{rows}"
    )
  if not jnp.isfinite(moments.second).all():
    raise ValueError(f"the signal ahead of {name} has NaN or infinity")


def _norms(model):
  """The norms by name, in the order of the signals that they read."""
  if not isinstance(model, bert.Bert | llama.Llama):
    raise ValueError(
      f"model must be a Bert or a Llama, got a {type(model).__name__}"
    )
  inside = {
    f"blocks/{i}/{name}": getattr(block, name)
    for i, block in enumerate(model.blocks)
    for name in ("attention_norm", "mlp_norm")
  }
  if isinstance(model, bert.Bert):
    return {"embed_norm": model.embed_norm} | inside
  return inside | {"norm": model.norm}


def _norm_of(model):
  first = next(iter(_norms(model).values()))
  return Norm(model.embed.features, first.epsilon)


def rebuild(
  model: bert.Bert | llama.Llama, qs: Sequence[jax.Array]
) -> Bert | Llama:
  """The model, with signal k in the directions qs[k] [width, r_k] alone.

  Pure: under `nnx.eval_shape` it gives the shapes.
  """
  parts = _Parts(model, qs)
  return Bert(model, parts) if parts.post else Llama(model, parts)


class _Parts:
  """Layers of a model, for cut signals."""

  def __init__(self, model, qs):
    norms = _norms(model)
    if len(qs) != len(norms):
      raise ValueError(f"qs must be {len(norms)}, one a norm, got {len(qs)}")
    self.post = isinstance(model, bert.Bert)
    self.norm = _norm_of(model)
    self.qs, self.dtype = qs, model.embed.param_dtype
    self.gains = [norm.scale[...] for norm in norms.values()]
    self.shifts = [
      norm.bias[...] if self.post else None for norm in norms.values()
    ]

  def reading(self, k, layer):
    """A layer that reads norm k."""
    return self._linear(
      *weights.slice_inputs(
        layer.kernel[...],
        None if layer.bias is None else layer.bias[...],
        self.qs[k],
        self.gains[k],
        self.shifts[k],
      )
    )

  def readout(self, kernel):
    return self._linear(
      *weights.slice_inputs(
        kernel, None, self.qs[-1], self.gains[-1], self.shifts[-1]
      )
    )

  def writing(self, k, layer):
    """The last layer of sublayer k, with what its residual adds as a bias."""
    bias = None if layer.bias is None else layer.bias[...]
    if self.post:
      bias = bias + self.shifts[k]
    return self._linear(
      self._written(k + 1, layer.kernel[...]),
      None if bias is None else self._written(k + 1, bias),
    )

  def residual(self, k):
    gain = self.gains[k] if self.post else None
    q, then = self.qs[k], self.qs[k + 1]
    return self._linear(
      weights.slice_residual(q, then, gain, centered=self.post), None
    )

  def embedding(self, layer):
    table = self._written(0, layer.embedding[...])
    return nnx.Embed(
      *table.shape,
      param_dtype=self.dtype,
      embedding_init=lambda *_: table.astype(self.dtype),
      rngs=nnx.Rngs(0),
    )

  def _written(self, k, table):
    return weights.slice_outputs(table, self.qs[k], centered=self.post)

  def _linear(self, kernel, bias):
    return nnx.Linear(
      *kernel.shape,
      use_bias=bias is not None,
      param_dtype=self.dtype,
      kernel_init=lambda *_: kernel.astype(self.dtype),
      bias_init=lambda *_: bias.astype(self.dtype),
      rngs=nnx.Rngs(0),
    )
