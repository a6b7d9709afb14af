"""Soft mixtures: experts process mixtures of tokens, and nothing is chosen."""

from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from sparsejax import sharding
from sparsejax.automatic import automatic
from sparsejax.routing.experts import FeedForward

Array = jax.Array

FEED_FORWARD = FeedForward()  # SwiGLU


def soft_mixture(
  x: Array,
  logits: Array,
  bank: Any,
  params: Any,
  *,
  token_valid: Array | None = None,
) -> Array:
  """Slots are mixtures of the tokens, outputs mixtures of the experts' slots.

  Each slot's input is the mean of the tokens under a softmax over tokens; each
  token's output is the mean of all slots' outputs under a softmax over slots.
  All sequences go through the bank at once. A token reads all others of its
  sequence, later ones too: as it stands not for models that generate.

  Args:
    x: floating [..., tokens, d].
    logits: floating [..., tokens, experts, slots], slots of each expert.
    bank: see `dispatchers`; an expert's group has all sequences' slots.
    params: of the bank.
    token_valid: None, or bool [..., tokens]: padding neither gives to a slot
      nor takes from one. Neither does a token whose logits hold NaN or +inf.

  Returns:
    [..., tokens, d of the bank] in the dtype of x; zeros where a token takes
    nothing. Softmaxes are in f32.

  Raises:
    ValueError: for arguments that do not fit each other.

  Example:
    Equal logits: every slot is the mean token, every output the mean slot.

    >>> bank = routing.FeedForward(jax.nn.relu)
    >>> params = {
    ...   "up": jnp.ones((2, 1, 1)),
    ...   "down": jnp.array([[[1.0]], [[3.0]]]),
    ... }
    >>> x = jnp.array([[1.0], [3.0]])
    >>> routing.soft_mixture(x, jnp.zeros((2, 2, 1)), bank, params).tolist()
    [[4.0], [4.0]]

  Source: soft-moe, From Sparse to Soft Mixtures of Experts.
  """
  if (
    x.ndim < 2
    or logits.ndim != x.ndim + 1
    or (logits.shape[:-2] != x.shape[:-1])
  ):
    raise ValueError(
      f"logits must be [..., tokens, experts, slots] of x {list(x.shape)}, got "
      f"{list(logits.shape)}"
    )
  *lead, tokens, experts, slots = logits.shape
  if not experts * slots:
    raise ValueError(
      f"logits must have experts and slots, got {list(logits.shape)}"
    )
  logits = logits.reshape(*lead, tokens, experts * slots).astype(jnp.float32)
  valid = (logits < jnp.inf).all(-1)  # false for NaN, too
  if token_valid is not None:
    if token_valid.shape != x.shape[:-1] or token_valid.dtype != bool:
      raise ValueError(
        f"token_valid must be bool{list(x.shape[:-1])}, got "
        f"{token_valid.dtype}{list(token_valid.shape)}"
      )
    valid &= token_valid
  may = valid[..., None] & (logits > -jnp.inf)
  to_slots = masked_softmax(logits, may, axis=-2).astype(x.dtype)
  from_slots = masked_softmax(logits, may, axis=-1).astype(x.dtype)
  x = jnp.where(valid[..., None], x, 0)
  mixed = jnp.einsum("...ts,...td->...sd", to_slots, x)

  # The bank wants rows expert by expert, whatever their sequence.
  def by_expert(mixed):
    return mixed.reshape(-1, experts, slots, mixed.shape[-1]).swapaxes(0, 1)

  def by_sequence(out):
    out = out.swapaxes(0, 1)
    return out.reshape(*lead, experts * slots, out.shape[-1]).astype(x.dtype)

  def run(params, mixed):
    rows = mixed.reshape(-1, mixed.shape[-1])
    sizes = jnp.full(len(mixed), len(rows) // len(mixed), jnp.int32)
    return bank(params, rows, sizes).reshape(*mixed.shape[:-1], -1)

  if sharding.is_explicit(mixed):
    out = _on_shards(run, params, by_expert, mixed)
  else:
    out = run(params, automatic(by_expert, mixed))
  out = automatic(by_sequence, out, out=mixed)
  return jnp.einsum("...ts,...sd->...td", from_slots, out)


def _on_shards(run, params, by_expert, mixed):
  """run(params, by_expert(mixed)) on Explicit axes, where nothing is gathered.

  Experts are divided as their parameters are, the slots of each as sequences.
  """

  def axes(x, dims):
    parts = jax.typeof(x).sharding.spec[:dims]
    parts = [part if isinstance(part, tuple) else (part,) for part in parts]
    return tuple(name for part in parts for name in part if name is not None)

  of_params = {axes(p, 1) for p in jax.tree.leaves(params)}
  experts = of_params.pop() if len(of_params) == 1 else ()
  rest = (name for name in axes(mixed, mixed.ndim - 2) if name not in experts)
  spec = jax.P(experts, tuple(rest))
  mesh = jax.typeof(mixed).sharding.mesh
  place = jax.NamedSharding(mesh, spec)
  mixed = jax.sharding.auto_axes(by_expert, out_sharding=place)(mixed)
  by_expert = jax.tree.map(lambda _: jax.P(experts), params)
  return jax.shard_map(
    run, mesh=mesh, in_specs=(by_expert, spec), out_specs=spec
  )(params, mixed)


def masked_softmax(logits: Array, may: Array, axis: int = -1) -> Array:
  """Over the entries that may take part; zeros where none may."""
  some = may.any(axis, keepdims=True)
  p = jax.nn.softmax(jnp.where(may, logits, 0), axis, where=may | ~some)
  return jnp.where(may, p, 0)


class SoftMoE(nnx.Module):
  """A soft mixture of experts in the place of a feed-forward network.

  The logits are products of normalized tokens and normalized parameters, times
  a learned scale.

  Args:
    width: of tokens.
    hidden: of an expert.
    experts: how many.
    slots: of each expert and sequence. The cost is that of so many tokens:
      tokens / experts make it that of a dense network.
    bank: has `init` and a call, as `FeedForward` does.
    param_dtype: of the experts' parameters; the others are f32.
    rngs: for the initial parameters.

  Example:
    >>> from flax import nnx
    >>> moe = routing.SoftMoE(4, 8, experts=3, slots=2, rngs=nnx.Rngs(0))
    >>> moe(jnp.ones((2, 5, 4))).shape
    (2, 5, 4)

  Source: soft-moe, From Sparse to Soft Mixtures of Experts.
  """

  def __init__(
    self,
    width: int,
    hidden: int,
    experts: int,
    slots: int,
    *,
    bank: Any = FEED_FORWARD,
    param_dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    normal = jax.nn.initializers.lecun_normal(in_axis=0, out_axis=(1, 2))
    shape = (width, experts, slots)
    self.slots = nnx.Param(normal(rngs.params(), shape, jnp.float32))
    self.scale = nnx.Param(jnp.ones(()))
    params = bank.init(
      rngs.params(),
      experts=experts,
      width=width,
      hidden=hidden,
      dtype=param_dtype,
    )
    self.experts = nnx.data(jax.tree.map(nnx.Param, params))
    self.bank = bank

  def __call__(self, x: Array, *, token_valid: Array | None = None) -> Array:
    """Floating [..., tokens, width], like x; see `soft_mixture`."""
    if token_valid is not None:  # or NaN there would be in gradients
      x = jnp.where(token_valid[..., None], x, 0)
    slots = self.scale[...] * _unit(self.slots[...], axis=0)
    logits = jnp.einsum(
      "...td,des->...tes",
      _unit(x.astype(jnp.float32), axis=-1),
      slots,
      precision="highest",
    )
    params = jax.tree.map(
      lambda p: p[...].astype(x.dtype),
      self.experts,
      is_leaf=lambda p: isinstance(p, nnx.Variable),
    )
    return soft_mixture(x, logits, self.bank, params, token_valid=token_valid)


def _unit(x, axis):
  """Vectors of length 1; of one without length, zeros."""
  squares = jnp.sum(x**2, axis, keepdims=True)
  return x * jax.lax.rsqrt(jnp.maximum(squares, 1e-12))
