"""SiRA: a sparse mixture of low-rank changes beside a frozen kernel."""

import dataclasses
from typing import Any

from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp

from sparsejax.finetuning import layers
from sparsejax.finetuning import LoRABank
from sparsejax.routing import balancing
from sparsejax.routing import dispatchers
from sparsejax.routing import routers
from sparsejax.routing.assignment import Assignment
from sparsejax.routing.modules import AuxiliaryLoss

Array = jax.Array


def sira_route(
  logits: Array, k: int, *, keep: Array | None = None, size: int | None = None
) -> tuple[Assignment, Array]:
  """The k largest gates of those that are not dropped, within a capacity.

  Gates are a softmax over all experts. A dropped one is never chosen, and the
  others are as large as without; so a token may have fewer than k.

  Args:
    logits: floating [tokens, experts].
    k: experts a token goes to.
    keep: None, or bool [tokens, experts]: False where a gate is dropped.
    size: None, or how many tokens an expert takes: first choices before second
      ones, then earlier tokens.

  Returns:
    The assignment, and the share of its edges beyond the capacity, f32.

  Raises:
    ValueError: for arguments that do not fit.

  >>> from sparsejax import recipes
  >>> logits = jnp.array([[1.0, 0.0], [1.0, 0.0]])
  >>> found, dropped = recipes.sira_route(logits, 1, size=1)
  >>> found.valid.tolist(), dropped.item()
  ([True, False], 0.5)

  Source: [sira] Zhu et al., SiRA: Sparse Mixture of Low Rank Adaptation. The
    order in which a capacity is filled is settled here.
  """
  found = routers.top_k(logits, k, allowed=keep)
  counts = found.token_valid[:, None]
  p = jnp.where(counts, jax.nn.softmax(jnp.asarray(logits, jnp.float32)), 0)
  weight = jnp.where(found.valid, p[found.token, found.expert], 0)
  found = dataclasses.replace(found, weight=weight, probabilities=p)
  if size is None:
    return found, jnp.float32(0)
  return dispatchers.limit(found, size)


class SiRA(nnx.Module):
  """The `dot_general` of a layer: x @ kernel + a mixture of LoRA experts.

  Attributes:
    router: nnx.LoRAParam, f32 [inputs, experts].
    a: nnx.LoRAParam [experts, inputs, rank].
    b: nnx.LoRAParam [experts, rank, outputs], 0 at the start.
    loss: routing.AuxiliaryLoss, f32, of the last call: `balance` times the load
      balance loss; `routing.auxiliary_loss(model)` sums those of a model.

  Args:
    inputs: of the layer.
    outputs: of the layer.
    experts: how many.
    rank: of each.
    k: experts a token goes to.
    alpha: what scales their outputs, over the rank.
    capacity_factor: None, or how many times its equal share an expert takes.
    dropout: the share of gates dropped in training; `model.eval()` turns it
      off.
    balance: weight of the load balance loss.
    param_dtype: of a and b.
    rngs: for the initial parameters ("params") and dropped gates ("dropout").

  Raises:
    ValueError: a setting is out of range.

  >>> from sparsejax import recipes
  >>> mixture = recipes.SiRA(
  ...   4,
  ...   2,
  ...   experts=3,
  ...   rank=1,
  ...   alpha=1.0,
  ...   capacity_factor=1.0,
  ...   rngs=nnx.Rngs(0),
  ... )
  >>> found = mixture.route(jnp.ones((6, 4)))  # six alike, to two of three
  >>> found.sizes.tolist().count(4)
  2

  Source: [sira] Zhu et al., SiRA: Sparse Mixture of Low Rank Adaptation;
    without capacity, dropout and loss [lora-moe] a top-k mixture of LoRA.
  """

  def __init__(
    self,
    inputs: int,
    outputs: int,
    *,
    experts: int,
    rank: int,
    k: int = 2,
    alpha: float,
    capacity_factor: float | None = None,
    dropout: float = 0.0,
    balance: float = 0.0,
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
  ):
    if not 1 <= k <= experts:
      raise ValueError(f"k must be in [1, {experts}], got {k}")
    if not 0 <= dropout < 1:
      raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    if capacity_factor is not None and not capacity_factor > 0:
      raise ValueError(
        f"capacity_factor must be positive, got {capacity_factor}"
      )
    self.bank = LoRABank(alpha)
    params = self.bank.init(
      rngs.params(),
      experts=experts,
      inputs=inputs,
      outputs=outputs,
      rank=rank,
      dtype=param_dtype,
    )
    self.a, self.b = nnx.LoRAParam(params["a"]), nnx.LoRAParam(params["b"])
    draw = jax.nn.initializers.lecun_normal()
    self.router = nnx.LoRAParam(draw(rngs.params(), (inputs, experts)))
    self.k, self.capacity_factor, self.balance = k, capacity_factor, balance
    self.drop = nnx.data(nnx.Dropout(dropout, rngs=rngs) if dropout else None)
    self.loss = AuxiliaryLoss(jnp.zeros(()))

  def route(self, rows: Array) -> Assignment:
    """The experts of tokens [tokens, inputs]; in training gates are dropped."""
    experts = self.b.shape[0]
    logits = jnp.matmul(
      rows.astype(jnp.float32),
      self.router[...].astype(jnp.float32),
      precision=lax.Precision.HIGHEST,
    )
    keep = size = None
    if self.drop is not None:
      keep = self.drop(jnp.ones_like(logits)) != 0
    if self.capacity_factor is not None:
      edges = len(rows) * self.k
      size = dispatchers.capacity_of(edges, experts, self.capacity_factor)
    return sira_route(logits, self.k, keep=keep, size=size)[0]

  def __call__(
    self, x: Array, kernel: Array, dimension_numbers: Any, **options: Any
  ) -> Array:
    y = lax.dot_general(x, kernel, dimension_numbers, **options)
    rows = x.reshape(-1, x.shape[-1])
    found = self.route(rows)
    if self.balance:
      self.loss[...] = self.balance * balancing.load_balance(found)
    params = {
      n: v[...].astype(x.dtype) for n, v in (("a", self.a), ("b", self.b))
    }
    mixed = dispatchers.dropless(rows, found, self.bank, params)
    return y + mixed.reshape(y.shape).astype(y.dtype)


def add_sira(
  model: nnx.Module, *, where: str = "", rngs: nnx.Rngs, **options: Any
) -> nnx.Module:
  """A copy of a model whose linear layers have a mixture of LoRA beside them.

  Differentiate and optimize the Variables of kind `nnx.LoRAParam`.

  Args:
    model: any module that holds `nnx.Linear`.
    where: a regular expression, searched for in the paths of its linear layers;
      by default all of them.
    rngs: see `SiRA`.
    **options: the others of `SiRA`.

  Returns:
    The copy, the same function as the model: a `SiRA` is the `dot_general` of
    those layers.

  Raises:
    ValueError: as `SiRA`; `where` matches no layer, or one that has a
      `dot_general` of its own.

  >>> from flax import nnx
  >>> from sparsejax import recipes
  >>> layer = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
  >>> tuned = recipes.add_sira(
  ...   layer, experts=3, rank=1, alpha=1.0, rngs=nnx.Rngs(1)
  ... )
  >>> x = jnp.ones((3, 4))
  >>> bool((tuned(x) == layer(x)).all())
  True

  Source: [sira] Zhu et al., SiRA: Sparse Mixture of Low Rank Adaptation.
  """
  model = nnx.clone(model)
  for name, layer in layers.matching(model, where).items():
    mixture = SiRA(
      layer.in_features,
      layer.out_features,
      param_dtype=layer.kernel.dtype,
      rngs=rngs,
      **options,
    )
    layers.set_dot(name, layer, mixture)
  return model
