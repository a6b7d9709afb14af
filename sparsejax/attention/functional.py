"""Sparse attention in the modules that Flax has."""

import jax.numpy as jnp

from pallas_kernels import block_sparse_attention
from pallas_kernels import rules
from pallas_kernels.block_mask import BlockMask
from sparsejax.attention import patterns


def as_attention_fn(method, *, block=None):
  """A method as `attention_fn=` of Flax's multi-head attention.

  Fits `flax.nnx.MultiHeadAttention` and
  `flax.linen.MultiHeadDotProductAttention`. What the method reads is all its
  own: masks, biases, `is_causal`, dropout of probabilities and weights to sow
  are errors, as is the cache of `decode=True`, which comes as a mask. The
  softmax is always of f32. Further batch dimensions, or none, are one for the
  method.

  Args:
    method: `method(q, k, v)` on [B, S, H, D], [B, T, Hkv, D] twice, giving
      [B, S, H, D]; or a BlockMask, or a rule (of `patterns`, say), with which
      `pallas_kernels.block_sparse_attention` runs. `input_positions` of NNX, if
      given, are passed on as q_positions and kv_positions: those that a
      BlockMask's rule sees. A rule's lists are made of indices, so that it
      takes none.
    block: queries and keys of a block of a rule's lists; default 128.

  Returns:
    A function of query, key, value and the keywords of Flax.

  Raises:
    ValueError: for a method that is none of these, or `block` without a rule;
      the function raises it for what a method cannot do.

  Example:
    >>> from flax import nnx
    >>> layer = nnx.MultiHeadAttention(
    ...   num_heads=2,
    ...   in_features=16,
    ...   decode=False,
    ...   attention_fn=as_attention_fn(patterns.Sinks(first=4, local=32)),
    ...   rngs=nnx.Rngs(0),
    ... )
    >>> layer(jnp.ones((1, 100, 16))).shape
    (1, 100, 16)
  """
  is_rule = isinstance(method, rules.Rule)
  if not isinstance(method, BlockMask) and (
    not callable(method) or isinstance(method, type)
  ):
    raise ValueError(
      f"method is {method!r}; it must be a function of q, k and v, a BlockMask "
      "or a rule."
    )
  if block is not None and not is_rule:
    raise ValueError(f"block is {block}; it is of rules, whose lists it makes.")
  block = 128 if block is None else block

  def run(q, k, v, **positions):
    if not is_rule and not isinstance(method, BlockMask):
      return method(q, k, v, **positions)
    mask = method
    if is_rule:
      lengths = q.shape[1], k.shape[1]
      mask = patterns.mask(method, *lengths, block_q=block, block_kv=block)
    return block_sparse_attention(q, k, v, mask, **positions)

  def attention_fn(
    query,
    key,
    value,
    bias=None,
    mask=None,
    broadcast_dropout=True,
    dropout_rng=None,
    dropout_rate=0.0,
    deterministic=False,
    dtype=None,
    precision=None,
    module=None,
    is_causal=False,
    input_positions=None,
    force_fp32_for_softmax=True,
    qk_attn_weights_einsum=None,
    attn_weights_value_einsum=None,
  ):
    # Linen passes what is named here, and NNX all that it has.
    del broadcast_dropout, dropout_rng, force_fp32_for_softmax
    for name, value_of, instead in (
      ("bias", bias, "a method adds none"),
      ("mask", mask, "let the method say what is read"),
      ("precision", precision, "a method has its own"),
      ("module", module, "there are no weights to sow"),
      ("qk_attn_weights_einsum", qk_attn_weights_einsum, "there is no einsum"),
      (
        "attn_weights_value_einsum",
        attn_weights_value_einsum,
        "there is no einsum",
      ),
    ):
      if value_of is not None:
        got = type(value_of).__name__
        raise ValueError(f"{name} is a {got}; it must be None: {instead}.")
    if is_causal:
      raise ValueError(
        "is_causal is True; give a method that is causal, with the rule "
        "pallas_kernels.Causal(), say."
      )
    if dropout_rate and not deterministic:
      raise ValueError(
        f"dropout_rate is {dropout_rate}; it must be 0, or deterministic True: "
        "probabilities are not dropped."
      )
    positions = {}
    if input_positions is not None:
      if is_rule or query.shape[-3] != key.shape[-3]:
        raise ValueError(
          "input_positions is given; it must be None for a rule (make a "
          "BlockMask), and for keys of another number than the queries."
        )
      at = input_positions.reshape(-1, query.shape[-3])
      positions = dict(q_positions=at, kv_positions=at)
    dtype = jnp.result_type(query, key, value) if dtype is None else dtype
    q, k, v = (
      x.astype(dtype).reshape(-1, *x.shape[-3:]) for x in (query, key, value)
    )
    out = run(q, k, v, **positions)
    return out.reshape(*query.shape[:-1], out.shape[-1])

  return attention_fn
