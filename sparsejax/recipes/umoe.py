"""UMoE: one bank of experts for the attention and the feed-forward layer."""

from collections.abc import Callable
import dataclasses
from typing import Any, ClassVar

from flax import nnx
import jax
import jax.numpy as jnp

import pallas_kernels
from sparsejax import sharding
from sparsejax.automatic import automatic
from sparsejax.routing import attention_experts as heads
from sparsejax.routing import dispatchers
from sparsejax.routing.assignment import Assignment
from sparsejax.routing.modules import MoE
from sparsejax.routing.soft import masked_softmax

Array = jax.Array


def premixed_experts(
  x: Array,
  found: Assignment,
  bank: dispatchers.Bank,
  params: Any,
  queries: dict[str, Array],
  *,
  causal: bool = True,
  rotate: Callable[[Array, Array], Array] | None = None,
  token_valid: Array | None = None,
) -> Array:
  """Attention whose experts process mixtures of tokens.

  For each of its experts a token mixes the tokens that it may read, as they
  are, under a softmax; the expert, any feed-forward network, processes the
  mixture in the place of values and outputs. Where a token reads itself alone,
  this is `dropless`, of the same parameters.

  Args:
    x: floating [..., tokens, d]; tokens read those of their sequence.
    found: which experts process which tokens, of all sequences in a row. Where
      experts chose, there must be one sequence.
    bank: see `routing.dispatchers`.
    params: of the bank.
    queries: "query" and "key" [d, h], of all experts; "down" [experts, d, r]
      and "up" [experts, r, h], what each adds to its queries.
    causal: whether a token reads none behind it.
    rotate: None, or what is done to queries and keys [batch, n, heads, h] at
      positions int32 [n], such as rotary embedding.
    token_valid: None, or bool [..., tokens], which are read; by default those
      that count in `found`.

  Returns:
    [..., tokens, d of the bank] in the dtype of x. An expert of a token that
    may read nothing gets zeros. Logits are scaled by h ** -0.5, and held for
    all pairs of queries and keys.

  Raises:
    ValueError: for arguments that do not fit each other.

  Example:
    >>> from sparsejax import recipes
    >>> bank = routing.FeedForward()
    >>> params = bank.init(jax.random.key(0), experts=3, width=4, hidden=8)
    >>> queries = {
    ...   "query": jnp.ones((4, 2)),
    ...   "key": jnp.ones((4, 2)),
    ...   "down": jnp.ones((3, 4, 1)),
    ...   "up": jnp.zeros((3, 1, 2)),
    ... }
    >>> found = routing.top_k(jnp.zeros((10, 3)), 2)
    >>> x = jnp.ones((2, 5, 4))
    >>> recipes.premixed_experts(x, found, bank, params, queries).shape
    (2, 5, 4)

  Source: umoe, UMoE: Unifying Attention and FFN with Shared Experts, equations
  9 to 11.
  """
  if set(queries) != {"query", "key", "down", "up"}:
    raise ValueError(
      'queries must have "query", "key", "down" and "up", got '
      f"{sorted(queries)}"
    )
  tokens = heads.in_sequences(x, found)
  readable = heads.readable_tokens(x, found, token_valid)
  batch, length, width = tokens.shape
  tokens = jnp.where(readable[..., None], tokens, 0)  # no NaN of padding
  edges = heads.sorted_edges(found)
  rows = x.reshape(-1, width)

  low = pallas_kernels.grouped_matmul(
    rows, queries["down"], found.sizes, gather=edges.token
  )
  own = pallas_kernels.grouped_matmul(
    low,
    queries["up"],
    found.sizes,
    scatter=edges.order,
    num_rows=len(edges.order),
  )
  shared = jnp.where(found.token_valid[:, None], rows, 0) @ queries["query"]
  shared = automatic(lambda x, token: x[token], shared, found.token)
  k = tokens @ queries["key"]
  q, positions = edges.by_token(own + shared, batch, k[:, :, None])
  if rotate is not None:
    q = rotate(q, positions)
    k = rotate(k[:, :, None], jnp.arange(length))[:, :, 0]

  f32 = dict(preferred_element_type=jnp.float32)
  logits = jnp.einsum("bnhd,btd->bhnt", q, k, **f32) * k.shape[-1] ** -0.5
  may = readable[:, None, None]
  if causal:
    may &= positions[:, None] >= jnp.arange(length)
  weights = masked_softmax(logits, jnp.broadcast_to(may, logits.shape))
  mixed = jnp.einsum("bhnt,btd->bnhd", weights.astype(x.dtype), tokens)
  y = _along(edges.in_a_row(mixed), edges, rows, bank, params)
  return y.reshape(*x.shape[:-1], y.shape[-1])


def _along(mixed, edges, rows, bank, params):
  """The bank's outputs for a row an edge, added up by token."""
  found = edges.found
  if getattr(bank, "fuses", False):
    y = bank(
      params,
      mixed,
      found.sizes,
      gather=edges.order,
      scatter=edges.token,
      num_rows=len(rows),
      row_scale=edges.weight,
    )
    return sharding.like(y, rows)
  valid = found.valid[edges.order]
  out = jnp.where(valid[:, None], mixed[edges.order], 0)
  token = jnp.where(valid, edges.token, len(rows))
  return dispatchers.combined(
    rows, bank(params, out, found.sizes), token, edges.weight
  )


@dataclasses.dataclass(frozen=True)
class _Borrowed:
  """A bank whose parameters are another's."""

  bank: Any

  def init(self, key, **shapes):
    del key, shapes
    return {}


class UMoE(MoE):
  """Attention whose experts are those of a feed-forward layer.

  It has a router, queries and keys of its own; the experts are the very
  parameters of `ffn`, which gets gradients of both. Routers, losses, biases,
  capacities and metrics are as of `MoE`.

  Args:
    ffn: the mixture whose experts it uses.
    head: size of queries and keys.
    rank: of what an expert adds to its queries, which is zero at first.
    causal: whether a token reads none behind it.
    rotate: see `premixed_experts`.
    param_dtype: of queries and keys.
    rngs: for the initial parameters.
    **options: others of `MoE`, but for `bank` and `dispatch`.

  Example:
    >>> from flax import nnx
    >>> from sparsejax import recipes
    >>> rngs = nnx.Rngs(0)
    >>> ffn = routing.MoE(4, 8, experts=3, rngs=rngs)
    >>> attention = recipes.UMoE(ffn, head=2, rank=1, rngs=rngs)
    >>> x = jnp.ones((2, 5, 4))
    >>> x += attention(x)
    >>> (x + ffn(x)).shape
    (2, 5, 4)

  Source: umoe, UMoE: Unifying Attention and FFN with Shared Experts.
  """

  borrows_experts: ClassVar[bool] = True

  def __init__(
    self,
    ffn: MoE,
    *,
    head: int,
    rank: int,
    causal: bool = True,
    rotate: Callable[[Array, Array], Array] | None = None,
    param_dtype=jnp.float32,
    rngs: nnx.Rngs,
    **options: Any,
  ):
    width, experts = ffn.router.in_features, ffn.router.out_features
    super().__init__(
      width, 0, experts, bank=_Borrowed(ffn.bank), rngs=rngs, **options
    )
    self.bank = ffn.bank
    self.experts = ffn.experts
    normal = jax.nn.initializers.lecun_normal
    draw = lambda init, *shape: nnx.Param(
      init(rngs.params(), shape, param_dtype)
    )
    of_experts = normal(in_axis=1, out_axis=2, batch_axis=0)
    self.queries = nnx.data(
      {
        "query": draw(normal(), width, head),
        "key": draw(normal(), width, head),
        "down": draw(of_experts, experts, width, rank),
        "up": draw(jax.nn.initializers.zeros, experts, rank, head),
      }
    )
    self.causal = causal
    self.rotate = rotate

  def mix(self, x: Array, found: Assignment) -> Array:
    """The experts' outputs along an assignment."""
    dtype = self.dtype or x.dtype
    params, queries = jax.tree.map(
      lambda p: p[...].astype(dtype),
      (self.experts, self.queries),
      is_leaf=lambda p: isinstance(p, nnx.Variable),
    )
    y = premixed_experts(
      x.astype(dtype),
      found,
      self.bank,
      params,
      queries,
      causal=self.causal,
      rotate=self.rotate,
    ).astype(x.dtype)
    return y if self.shared is None else y + self.shared(x)
