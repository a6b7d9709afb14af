"""The Transformer, with a mixture of experts as the MLP of each block."""

from collections.abc import Mapping
import dataclasses
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import optax

from experiments import settings
from experiments.models.transformer import Transformer
from sparsejax import routing


def top_k(*, k: int, renormalize: bool = False):
  """Each token goes to the k best; weights may be made to sum to 1."""
  return lambda logits, step, **given: routing.top_k(
    logits, k, renormalize=renormalize, **given
  )


def top_p(*, p: float, k_max: int | None = None, renormalize: bool = False):
  """Each token goes to as few experts as together have a probability of p."""

  def router(logits, step, **given):
    most = logits.shape[1] if k_max is None else k_max
    return routing.top_p(logits, p, most, renormalize=renormalize, **given)

  return router


def dense_to_sparse(
  *, threshold: float, until: int, begin: float = 2.0, end: float = 0.3
):
  """Experts above a threshold; the temperature falls until a step."""
  for name, value in {"begin": begin, "end": end, "until": until}.items():
    if not value > 0:
      raise ValueError(
        f"config.model.router.{name} takes more than 0; got {value}."
      )
  temperature = optax.linear_schedule(begin, end, until)
  return lambda logits, step, **given: routing.dense_to_sparse(
    logits, temperature(step), threshold, **given
  )


ROUTERS = {"top_k": top_k, "top_p": top_p, "dense_to_sparse": dense_to_sparse}


def unbalanced():
  return {}


def auxiliary(*, coefficient: float):
  return {"losses": {routing.load_balance: coefficient}}


def bias(*, rate: float):
  del rate  # the optimizer's
  return {"balance_bias": True}


BALANCES = {"none": unbalanced, "auxiliary": auxiliary, "bias": bias}


@dataclasses.dataclass(frozen=True)
class Experts(routing.FeedForward):
  """Experts that are what a block's MLP is, and begin as it does."""

  out_scale: float = 1.0

  def init(self, key, **shape):
    params = super().init(key, gated=False, **shape)
    return params | {"down": params["down"] * self.out_scale}


class Step(nnx.Variable):
  """The step of training, which whoever calls the model sets."""


class Mixture(routing.MoE):
  """Tells its router the step of training."""

  def __init__(self, *arguments, **settings):
    super().__init__(*arguments, **settings)
    self.step = Step(jnp.zeros((), jnp.int32))

  def __call__(self, x: jax.Array) -> jax.Array:
    router = functools.partial(self.make_assignment, step=self.step[...])
    return super().__call__(x, router=router)


class MoETransformer(Transformer):
  """A Transformer whose MLPs are mixtures of experts.

  Called as the Transformer is. `reported` says what its mixtures did, and adds
  "auxiliary_loss" to the loss.

  Args:
    vocabulary: of tokens.
    width: of the residual stream.
    depth: how many blocks.
    heads: of attention.
    experts: how many in a block; each is an MLP as the Transformer has it.
    hidden: of an expert; k experts of 4 * width / k compute what one MLP does.
    router: one of ROUTERS by "name", and its settings.
    balance: "name" is "none", "auxiliary" (Switch's loss, with a "coefficient")
      or "bias" (of the choice, which the optimizer moves at a "rate").
    capacity_factor: None, or how many times an equal share of the edges an
      expert takes; what is beyond is dropped.
    priority: who goes first where edges are dropped: by "position" in the
      batch, or by "weight".
    rngs: for the initial parameters.

  Attributes:
    balance_rate: None, or the rate at which the optimizer moves the bias.
  """

  def __init__(
    self,
    *,
    vocabulary: int,
    width: int,
    depth: int,
    heads: int,
    experts: int,
    hidden: int,
    router: Mapping[str, Any],
    balance: Mapping[str, Any],
    capacity_factor: float | None = None,
    priority: str = "position",
    rngs: nnx.Rngs,
  ):
    for name, value in {"experts": experts, "hidden": hidden}.items():
      if value < 1:
        raise ValueError(f"config.model.{name} takes 1 or more; got {value}.")
    if capacity_factor is not None and not capacity_factor > 0:
      raise ValueError(
        "config.model.capacity_factor takes more than 0, or None; got "
        f"{capacity_factor}."
      )
    if priority not in ("position", "weight"):
      raise ValueError(
        "config.model.priority takes one of position, weight; got "
        f"{priority!r}."
      )
    if capacity_factor is None and priority != "position":
      raise ValueError(
        f"config.model.priority={priority!r} takes a "
        "config.model.capacity_factor; without one nothing is dropped."
      )
    given = settings.call("model.balance", balance, BALANCES)
    make_assignment = settings.call("model.router", router, ROUTERS)
    if balance["name"] == "bias" and router["name"] != "top_k":
      raise ValueError(
        "config.model.balance.name='bias' takes config.model.router.name="
        f"'top_k', whose choice it shifts; got {router['name']!r}."
      )
    try:  # what the settings cannot be is not first found out in a step
      jax.eval_shape(lambda: make_assignment(jnp.zeros((1, experts)), step=0))
    except ValueError as error:
      raise ValueError(f"config.model.router: {error}.") from error
    self.balance_rate = balance.get("rate")
    bank = Experts(routing.relu2, out_scale=(2 * depth) ** -0.5)
    super().__init__(
      lambda: Mixture(
        width,
        hidden,
        experts,
        router=make_assignment,
        bank=bank,
        capacity_factor=capacity_factor,
        priority=priority,
        rngs=rngs,
        **given,
      ),
      vocabulary=vocabulary,
      width=width,
      depth=depth,
      heads=heads,
      rngs=rngs,
    )


def reported(model: nnx.Module) -> dict[str, jax.Array]:
  """What the mixtures of a model say of its last call, as scalars.

  Names are those of `routing.metrics`, of the losses and "dropped", and
  "active", the edges a token that an expert processes: of each layer as in
  "layer_0_entropy" and "layer_0_load_3", the third expert's, and their means
  over layers. "auxiliary_loss" is the sum to add to the loss. A model without
  mixtures says nothing.
  """
  blocks = getattr(model, "blocks", ())
  layers = [block.mixture for block in blocks if block.mixture is not None]
  if not layers:
    return {}
  values, scalars = {}, []
  for i, layer in enumerate(layers):
    found = layer.metrics.get_value()
    load = found.pop("load")
    found["active"] = found["edges"] * (1 - found.get("dropped", 0))
    scalars.append(found)
    found = found | {f"load_{expert}": x for expert, x in enumerate(load)}
    values |= {f"layer_{i}_{name}": x for name, x in found.items()}
  values |= jax.tree.map(lambda *x: sum(x) / len(x), *scalars)
  return values | {"auxiliary_loss": routing.auxiliary_loss(model)}
