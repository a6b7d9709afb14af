"""A mixture of experts as a Flax module."""

from collections.abc import Callable, Mapping
import functools
from typing import Any, ClassVar

from flax import nnx
import jax
import jax.numpy as jnp

from sparsejax.routing import balancing
from sparsejax.routing import dispatchers
from sparsejax.routing import routers
from sparsejax.routing.assignment import Assignment
from sparsejax.routing.experts import FeedForward

Array = jax.Array

TOP_2 = functools.partial(routers.top_k, k=2, renormalize=True)
FEED_FORWARD = FeedForward()  # SwiGLU


class BalanceBias(nnx.Param):
  """A bias of the choice, whose gradient is the load error."""


class AuxiliaryLoss(nnx.Variable):
  """What the last call adds to the loss, f32 scalar."""


class RoutingMetrics(nnx.Variable):
  """What the last call reports: `routing.metrics`, the losses, the drops."""


class MoE(nnx.Module):
  """A mixture of experts in the place of a feed-forward network.

  A linear router in f32, whichever `router` makes an assignment of its logits,
  and whichever `dispatch` runs the bank of experts along it. A call returns the
  output alone; what it adds to the loss is in the Variables of the kind
  `AuxiliaryLoss`, for `auxiliary_loss(model)` to sum up, and what it reports in
  those of the kind `RoutingMetrics`. `route` and `mix` are its two halves as
  pure functions.

  Args:
    width: of tokens.
    hidden: of an expert.
    experts: how many.
    router: of logits, with `token_valid`; default the two best, renormalized.
    dispatch: see `dispatchers`.
    bank: has `init` and a call, as `FeedForward` does.
    losses: coefficients of functions of an Assignment, such as
      `{routing.load_balance: 0.01, routing.z_loss: 1e-3}`.
    balance_bias: whether the router is given a `bias`; for `top_k` and an
      optimizer with `routing.balance_bias`.
    capacity_factor: None, or how many times an equal share of the edges an
      expert takes at most; what is dropped is in the metrics.
    priority: who goes first where edges are dropped; see `limit`.
    shared: None, or a module of tokens whose output is added.
    expert_metadata: of the experts' parameters, as Flax's layers take
      `kernel_metadata`: {"out_sharding": ("expert",)} divides experts over that
      axis of the mesh.
    param_dtype: of the experts' parameters; the router's are f32.
    dtype: to compute in, default that of the tokens.
    rngs: for the initial parameters.

  Example:
    >>> from flax import nnx
    >>> moe = routing.MoE(4, 8, experts=3, rngs=nnx.Rngs(0))
    >>> moe(jnp.ones((2, 5, 4))).shape, moe.metrics["load"].shape
    ((2, 5, 4), (3,))
  """

  borrows_experts: ClassVar[bool] = False  # True where they are another's

  def __init__(
    self,
    width: int,
    hidden: int,
    experts: int,
    *,
    router: Callable[..., Assignment] = TOP_2,
    dispatch: Callable[..., Array] = dispatchers.dropless,
    bank: Any = FEED_FORWARD,
    losses: Mapping[Callable[[Assignment], Array], float] | None = None,
    balance_bias: bool = False,
    capacity_factor: float | None = None,
    priority: str = "position",
    shared: nnx.Module | None = None,
    expert_metadata: Mapping[str, Any] | None = None,
    param_dtype=jnp.float32,
    dtype=None,
    rngs: nnx.Rngs,
  ):
    for name, value in dict(
      width=width, experts=experts, capacity_factor=capacity_factor
    ).items():
      if value is not None and not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")
    self.router = nnx.Linear(
      width,
      experts,
      use_bias=False,
      dtype=jnp.float32,
      precision="highest",
      rngs=rngs,
    )
    params = bank.init(
      rngs.params(),
      experts=experts,
      width=width,
      hidden=hidden,
      dtype=param_dtype,
    )
    metadata = dict(expert_metadata or {})
    self.experts = nnx.data(
      jax.tree.map(lambda x: nnx.Param(x, **metadata), params)
    )
    self.balance_bias = (
      BalanceBias(jnp.zeros(experts)) if balance_bias else None
    )
    self.shared = shared
    self.make_assignment = router
    self.dispatch = dispatch
    self.bank = bank
    self.losses = tuple((losses or {}).items())
    self.capacity_factor = capacity_factor
    self.priority = priority
    self.dtype = dtype
    self.loss = AuxiliaryLoss(jnp.zeros(()))
    # Of the names and shapes that calls give, so that none compiles anew.
    metrics = jax.eval_shape(
      lambda: balancing.metrics(routers.top_k(jnp.zeros((1, experts)), 1))
    )
    metrics = {n: jnp.zeros(x.shape, x.dtype) for n, x in metrics.items()}
    names = [_name(function) for function, _ in self.losses]
    names += [] if capacity_factor is None else ["dropped"]
    if len({*names, *metrics}) < len(names) + len(metrics):
      raise ValueError(
        "losses must have names of their own, which are no metrics', got "
        f"{names}"
      )
    metrics |= dict.fromkeys(names, jnp.zeros(()))
    self.metrics = RoutingMetrics(metrics)

  def __call__(
    self,
    x: Array,
    *,
    token_valid: Array | None = None,
    router: Callable[..., Assignment] | None = None,
    key: Array | None = None,
  ) -> Array:
    """The experts' outputs for tokens.

    Args:
      x: floating [..., width].
      token_valid: None, or bool of the leading dimensions: padding goes
        nowhere.
      router: in place of the module's own, for settings that change from call
        to call, such as noise or a temperature.
      key: for priority="random" alone.

    Returns:
      Like x; zeros (and what `shared` gives) for tokens that go nowhere.

    Raises:
      ValueError: for arguments that do not fit each other.
    """
    found, metrics = self.route(
      x, token_valid=token_valid, router=router, key=key
    )
    loss = jnp.zeros(())
    for function, coefficient in self.losses:
      value = function(found)
      metrics[_name(function)] = value
      loss += coefficient * value
    self.loss[...] = loss
    self.metrics.set_value(metrics)
    return self.mix(x, found)

  def route(
    self,
    x: Array,
    *,
    token_valid: Array | None = None,
    router: Callable[..., Assignment] | None = None,
    key: Array | None = None,
  ) -> tuple[Assignment, dict[str, Array]]:
    """Which experts process which of the tokens, as one row of them."""
    if (key is not None) != (self.priority == "random"):
      raise ValueError(
        f'key must be given with priority="random" alone, got {key} with '
        f"{self.priority!r}"
      )
    if not x.ndim or x.shape[-1] != self.router.in_features:
      raise ValueError(
        f"x must be [..., {self.router.in_features}], got {list(x.shape)}"
      )
    rows = x.reshape(-1, x.shape[-1])
    given = {}
    if token_valid is not None:
      if token_valid.shape != x.shape[:-1] or token_valid.dtype != bool:
        raise ValueError(
          f"token_valid must be bool{list(x.shape[:-1])}, got "
          f"{token_valid.dtype}{list(token_valid.shape)}"
        )
      given["token_valid"] = token_valid = token_valid.reshape(-1)
      # Or NaN in padding would be NaN in the gradient of the router.
      rows = jnp.where(token_valid[:, None], rows, 0)
    if self.balance_bias is not None:
      given["bias"] = self.balance_bias[...]
    logits = self.router(rows.astype(jnp.float32))
    found = (router or self.make_assignment)(logits, **given)
    metrics = balancing.metrics(found)
    if self.capacity_factor is not None:
      size = dispatchers.capacity_of(
        found.expert.shape[0], found.num_experts, self.capacity_factor
      )
      uniform = None
      if self.priority == "random":
        uniform = jax.random.uniform(key, (len(rows),))
      found, metrics["dropped"] = dispatchers.limit(
        found, size, priority=self.priority, uniform=uniform
      )
    return found, metrics

  def mix(self, x: Array, found: Assignment) -> Array:
    """The experts' outputs along an assignment."""
    dtype = self.dtype or x.dtype
    rows = x.reshape(-1, x.shape[-1]).astype(dtype)
    params = jax.tree.map(
      lambda x: x[...].astype(dtype),
      self.experts,
      is_leaf=lambda x: isinstance(x, nnx.Variable),
    )
    y = self.dispatch(rows, found, self.bank, params).astype(x.dtype)
    y = y.reshape(*x.shape[:-1], y.shape[-1])
    return y if self.shared is None else y + self.shared(x)


def auxiliary_loss(model: nnx.Module) -> Array:
  """The sum of what the mixtures in a model add to the loss, after a call.

  >>> from flax import nnx
  >>> moe = routing.MoE(
  ...   4, 8, experts=3, losses={routing.load_balance: 0.5}, rngs=nnx.Rngs(0)
  ... )
  >>> _ = moe(jnp.zeros((2, 4)))
  >>> routing.auxiliary_loss(moe).round(3).item()
  0.5
  """
  losses = jax.tree.leaves(nnx.state(model, AuxiliaryLoss))
  # Of layers that were scanned over there is one array.
  return sum((jnp.sum(x) for x in losses), start=jnp.zeros(()))


def _name(function):
  function = getattr(function, "func", function)  # of functools.partial
  return getattr(function, "__name__", str(function))
