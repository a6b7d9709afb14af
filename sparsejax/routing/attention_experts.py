"""Attention heads as experts: a token is read by the heads that it chooses."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from sparsejax import sharding
from sparsejax.automatic import automatic
from sparsejax.routing import routers
from sparsejax.routing.assignment import Assignment
from sparsejax.routing.modules import MoE

Array = jax.Array

TOP_2 = functools.partial(routers.top_k, k=2, renormalize="detached")


def attention_mixture(
  x: Array,
  found: Assignment,
  params: dict[str, Array],
  *,
  attention: str = "softmax",
  causal: bool = True,
  rotate: Callable[[Array, Array], Array] | None = None,
  token_valid: Array | None = None,
) -> Array:
  """Heads with queries and outputs of their own, and shared keys and values.

  Queries and outputs are computed along the edges alone, by grouped matmul.

  Args:
    x: floating [..., tokens, d]; tokens read those of their sequence.
    found: which heads read for which tokens, of all sequences in a row. Where
      experts chose, there must be one sequence.
    params: "query" [experts, d, h], "output" [experts, h, d2], "key" and
      "value" [d, h].
    attention: "softmax"; or "stick_breaking": from its own position backwards,
      each key takes a sigmoid's share of what is left. That needs no other
      notion of position, and memory for all pairs of queries and keys.
    causal: whether a token reads none behind it.
    rotate: None, or what is done to queries and keys [batch, n, heads, h] at
      positions int32 [n], such as rotary embedding.
    token_valid: None, or bool [..., tokens], which are read; by default those
      that count in `found`.

  Returns:
    [..., tokens, d2] in the dtype of x: sums of the heads' outputs times the
    weights of the edges. A head that may read nothing gives zeros. Logits are
    scaled by h ** -0.5.

  Raises:
    ValueError: for arguments that do not fit each other.

  Example:
    >>> x = jnp.arange(3.0)[:, None]
    >>> one = jnp.ones((2, 1, 1))
    >>> params = {
    ...   "query": 0 * one,
    ...   "output": one,
    ...   "key": one[0],
    ...   "value": one[0],
    ... }
    >>> found = routing.top_k(jnp.zeros((3, 2)), 1)
    >>> routing.attention_mixture(x, found, params).tolist()
    [[0.0], [0.25], [0.5]]

  Source: mixture-of-attention-heads, Mixture of Attention Heads: Selecting
  Attention Heads Per Token; stick-breaking: moduleformer, ModuleFormer.
  """
  if attention not in ("softmax", "stick_breaking"):
    raise ValueError(
      f'attention must be "softmax" or "stick_breaking", got {attention!r}'
    )
  if attention == "stick_breaking" and not causal:
    raise ValueError("causal must be True with stick-breaking, got False")
  sequences = in_sequences(x, found)
  batch, length, width = sequences.shape
  if set(params) != {"query", "output", "key", "value"}:
    raise ValueError(
      'params must have "query", "output", "key" and "value", got '
      f"{sorted(params)}"
    )
  readable = readable_tokens(x, found, token_valid)
  sequences = jnp.where(readable[..., None], sequences, 0)  # no NaN of padding
  keys = (sequences @ params["key"])[:, :, None]
  values = (sequences @ params["value"])[:, :, None]
  edges = sorted_edges(found)
  rows = x.reshape(-1, width)
  queries = pallas_kernels.grouped_matmul(
    rows,
    params["query"],
    found.sizes,
    gather=edges.token,
    scatter=edges.order,
    num_rows=len(edges.order),
  )
  queries, positions = edges.by_token(queries, batch, keys)
  if rotate is not None:
    queries = rotate(queries, positions)
    keys = rotate(keys, jnp.arange(length))
  if attention == "softmax":
    of = None if found.choices is not None else positions
    mixed = _softmax(queries, keys, values, of, readable, causal)
  else:
    mixed = _stick_breaking(queries, keys, values, positions, readable)
  y = pallas_kernels.grouped_matmul(
    edges.in_a_row(mixed),
    params["output"],
    found.sizes,
    gather=edges.order,
    scatter=edges.token,
    num_rows=len(rows),
    row_scale=edges.weight,
  )
  y = sharding.like(y, rows)
  return y.reshape(*x.shape[:-1], y.shape[-1])


def stick_breaking(logits: Array, readable: Array) -> Array:
  """What the keys take of a stick, the last one first.

  Each takes its sigmoid's part of what is left. What is left behind the first
  key belongs to nobody, so that the sum is below 1.

  Args:
    logits: floating [..., keys].
    readable: bool [..., keys]; others take nothing.

  Returns:
    f32 [..., keys].

  >>> routing.stick_breaking(jnp.zeros(3), jnp.ones(3, bool)).tolist()
  [0.125, 0.25, 0.5]

  Source: moduleformer, ModuleFormer.
  """
  logits = logits.astype(jnp.float32)
  stays = jnp.where(readable, jax.nn.log_sigmoid(-logits), 0)
  # Of all later keys: a sum from the end without the key itself.
  later = jnp.flip(jnp.cumsum(jnp.flip(stays, -1), -1), -1) - stays
  return jnp.where(readable, jnp.exp(jax.nn.log_sigmoid(logits) + later), 0)


@dataclasses.dataclass(frozen=True)
class SortedEdges:
  """The edges of an assignment by expert, those that are not valid last.

  Attributes:
    order: int32 [edges], their places in the assignment.
    token: int32 [edges].
    weight: f32 [edges].
    found: the assignment.
  """

  order: Array
  token: Array
  weight: Array
  found: Assignment

  def by_token(self, rows, batch, like):
    """Rows of edges as [batch, n, heads, h], and the n positions.

    They are sharded as `like` is, which has as many dimensions.
    """
    if self.found.choices is None:
      return rows[None, :, None], self.found.token
    length = self.found.num_tokens // batch
    shape = (batch, length, self.found.choices, rows.shape[-1])
    rows = automatic(lambda x: x.reshape(shape), rows, out=like)
    return rows, jnp.arange(length)

  def in_a_row(self, rows):
    """The reverse."""
    return automatic(lambda x: x.reshape(-1, x.shape[-1]), rows)


def sorted_edges(found: Assignment) -> SortedEdges:
  def by_expert(found):
    group = jnp.where(found.valid, found.expert, found.num_experts)
    order = jnp.argsort(group)
    return order, found.token[order], found.weight[order]

  return SortedEdges(*automatic(by_expert, found), found)


def in_sequences(x: Array, found: Assignment) -> Array:
  """x as [batch, tokens, d]."""
  if x.ndim < 2 or x.size // max(x.shape[-1], 1) != found.num_tokens:
    raise ValueError(
      f"x must be [..., tokens, d] of the assignment's {found.num_tokens} "
      f"tokens, got {list(x.shape)}"
    )
  sequences = x.reshape(-1, *x.shape[-2:])
  if found.choices is None and len(sequences) > 1:
    raise ValueError(
      "found must be by token choice for several sequences, got one by expert "
      f"choice for {len(sequences)}"
    )
  return sequences


def readable_tokens(
  x: Array, found: Assignment, token_valid: Array | None
) -> Array:
  """bool [batch, tokens]."""
  if token_valid is None:
    token_valid = found.token_valid
  elif token_valid.shape != x.shape[:-1] or token_valid.dtype != bool:
    raise ValueError(
      f"token_valid must be bool{list(x.shape[:-1])}, got {token_valid.dtype}"
      f"{list(token_valid.shape)}"
    )
  return token_valid.reshape(-1, x.shape[-2])


def _softmax(q, k, v, positions, readable, causal):
  """Positions are None where they are those of the queries' places."""
  size = min(max(16, 1 << (k.shape[1] - 1).bit_length()), 128)
  blocks = np.ones((-(-q.shape[1] // size), -(-k.shape[1] // size)), bool)
  if causal and positions is None:
    blocks = np.tril(blocks)
  mask = pallas_kernels.BlockMask.from_blocks(
    blocks,
    block_q=size,
    block_kv=size,
    rule=pallas_kernels.Causal() if causal else None,
  )
  return pallas_kernels.block_sparse_attention(
    q,
    k,
    v,
    mask,
    q_positions=positions,
    q_segment_ids=jnp.zeros(q.shape[:2], jnp.int32),
    kv_segment_ids=(~readable).astype(jnp.int32),
  )


def _stick_breaking(q, k, v, positions, readable):
  k, v = k[:, :, 0], v[:, :, 0]
  f32 = dict(preferred_element_type=jnp.float32)
  logits = jnp.einsum("bnhd,btd->bhnt", q, k, **f32) * q.shape[-1] ** -0.5
  may = positions[:, None] >= jnp.arange(k.shape[1])
  weights = stick_breaking(logits, may & readable[:, None, None])
  return jnp.einsum("bhnt,btd->bnhd", weights.astype(v.dtype), v)


@dataclasses.dataclass(frozen=True)
class AttentionHeads:
  """What belongs to each head: "query" [experts, d, h], "output" reversed."""

  def init(self, key, *, experts, width, hidden, dtype=jnp.float32):
    normal = jax.nn.initializers.lecun_normal(
      in_axis=1, out_axis=2, batch_axis=0
    )
    query, output = jax.random.split(key)
    return {
      "query": normal(query, (experts, width, hidden), dtype),
      "output": normal(output, (experts, hidden, width), dtype),
    }


class MoA(MoE):
  """A mixture of attention heads in the place of multi-head attention.

  A `MoE` whose experts are heads: its routers, losses, biases, capacities and
  metrics are that one's. Tokens [..., tokens, width] read those of their
  sequence. Weights are divided by a sum without a gradient, as in the paper; in
  its authors' code they are not divided. No noise is added to the logits.

  Args:
    width: of tokens.
    head: of queries, keys and values.
    experts: how many heads there are to choose among.
    attention: see `attention_mixture`.
    causal: whether a token reads none behind it.
    rotate: see `attention_mixture`.
    router: as of `MoE`; default the two best, of weights as above.
    rngs: for the initial parameters.
    **options: others of `MoE`, but for `bank` and `dispatch`.

  Example:
    >>> from flax import nnx
    >>> moa = routing.MoA(8, 4, experts=6, rngs=nnx.Rngs(0))
    >>> moa(jnp.ones((2, 5, 8))).shape, moa.metrics["load"].shape
    ((2, 5, 8), (6,))

  Source: mixture-of-attention-heads, Mixture of Attention Heads: Selecting
  Attention Heads Per Token; with attention="stick_breaking" and
  `routing.mutual_information` as a loss: moduleformer, ModuleFormer, whose
  router has a hidden layer.
  """

  def __init__(
    self,
    width: int,
    head: int,
    experts: int,
    *,
    attention: str = "softmax",
    causal: bool = True,
    rotate: Callable[[Array, Array], Array] | None = None,
    router: Callable[..., Assignment] = TOP_2,
    param_dtype=jnp.float32,
    rngs: nnx.Rngs,
    **options: Any,
  ):
    super().__init__(
      width,
      head,
      experts,
      router=router,
      bank=AttentionHeads(),
      param_dtype=param_dtype,
      rngs=rngs,
      **options,
    )
    normal = jax.nn.initializers.lecun_normal()
    draw = lambda: normal(rngs.params(), (width, head), param_dtype)
    self.key, self.value = nnx.Param(draw()), nnx.Param(draw())
    self.attention = attention
    self.causal = causal
    self.rotate = rotate

  def mix(self, x: Array, found: Assignment) -> Array:
    """The heads' outputs along an assignment."""
    dtype = self.dtype or x.dtype
    of = {**self.experts, "key": self.key, "value": self.value}
    y = attention_mixture(
      x.astype(dtype),
      found,
      {name: p[...].astype(dtype) for name, p in of.items()},
      attention=self.attention,
      causal=self.causal,
      rotate=self.rotate,
    ).astype(x.dtype)
    return y if self.shared is None else y + self.shared(x)
