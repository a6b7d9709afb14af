"""A mixture of experts, forward and backward, against what else runs one.

The layer is what users call: `routing.MoE` with its default settings, router
included. Times and memory are of this machine.
"""

from collections.abc import Iterator
import functools
import math
from typing import Any

from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from experiments.bench import attention
from experiments.bench import grouped
from experiments.bench import timing
from sparsejax import routing

TOKENS, TOP = grouped.ROWS, grouped.TOP
ALONE = "experts alone, rows in order"
# Experts, width and hidden, and the least time of peers over the layer's. What
# it takes beyond its experts alone is routing, dispatch and combine.
LAYERS = (
  (
    (64, 256, 512),
    {
      "over ragged_dot": 20,
      "one-hot einsums, 1 group": 5,
      "one-hot einsums, 8 groups": 1.2,
      ALONE: 0.8,
    },
  ),
  (
    (8, 512, 1024),
    {"dense layer of equal active FLOPs": 1 / 1.5, ALONE: 0.85},
  ),
)


def ragged(params, rows, sizes):
  """A bank of experts of what JAX has."""
  h = jax.nn.silu(lax.ragged_dot(rows, params["gate"], sizes))
  h *= lax.ragged_dot(rows, params["up"], sizes)
  return lax.ragged_dot(h, params["down"], sizes)


def gshard(params, router, x, *, groups: int):
  """Tokens go to buffers, and come back, by products with one-hot arrays.

  Each group of tokens has buffers of its own, 1.25 times an equal load; what is
  beyond them is dropped.
  """
  experts = router.shape[1]
  x = x.reshape(groups, -1, x.shape[-1])
  size = math.ceil(1.25 * TOP * x.shape[1] / experts)
  weight, expert = lax.top_k(jax.nn.softmax(x @ router), TOP)
  weight /= weight.sum(-1, keepdims=True)
  # All first choices go before the second ones.
  chosen = jax.nn.one_hot(expert.mT, experts)
  place = chosen.reshape(groups, -1, experts).cumsum(1).reshape(chosen.shape)
  slot = jax.nn.one_hot((place * chosen).sum(-1) - 1, size)
  combine = jnp.einsum("gkt,gkte,gktc->gtec", weight.mT, chosen, slot)
  dispatch = (combine > 0).astype(x.dtype)
  rows = jnp.einsum("gtec,gtd->gecd", dispatch, x)
  h = jax.nn.silu(jnp.einsum("gecd,edf->gecf", rows, params["gate"]))
  h *= jnp.einsum("gecd,edf->gecf", rows, params["up"])
  rows = jnp.einsum("gecf,efd->gecd", h, params["down"])
  return jnp.einsum("gtec,gecd->gtd", combine, rows).reshape(-1, x.shape[-1])


def contestants(experts: int, width: int, hidden: int) -> dict[str, tuple]:
  """For each name a function and its arguments: all have gradients."""
  moe = routing.MoE(width, hidden, experts, rngs=nnx.Rngs(0))
  graph, params, rest = nnx.split(moe, nnx.Param, ...)
  bank = jax.tree.map(
    lambda x: x[...],
    moe.experts,
    is_leaf=lambda x: isinstance(x, nnx.Variable),
  )
  router, x = moe.router.kernel[...], grouped.normal(0, TOKENS, width)

  def layer(params, x, rest):
    return nnx.merge(graph, params, rest, copy=True)(x)

  def over_ragged_dot(params, router, x):
    found = routing.top_k(x @ router, TOP, renormalize=True)
    return routing.dropless(x, found, ragged, params)

  def dense(params, x):
    hidden = jax.nn.silu(x @ params["gate"]) * (x @ params["up"])
    return hidden @ params["down"]

  def ordered(params, rows, sizes):
    return routing.FeedForward()(params, rows, sizes)

  found, _ = moe.route(x)
  rows = x[found.token[np.argsort(found.expert, kind="stable")]]
  # All of the active experts' parameters, side by side.
  wide = {
    "gate": jnp.concatenate([*bank["gate"][:TOP]], 1),
    "up": jnp.concatenate([*bank["up"][:TOP]], 1),
    "down": jnp.concatenate([*bank["down"][:TOP]], 0),
  }
  one_hot = lambda groups: functools.partial(gshard, groups=groups)
  return {
    "ours": (layer, (params, x, rest), 2),
    "over ragged_dot": (over_ragged_dot, (bank, router, x), 3),
    "one-hot einsums, 1 group": (one_hot(1), (bank, router, x), 3),
    "one-hot einsums, 8 groups": (one_hot(8), (bank, router, x), 3),
    "dense layer of equal active FLOPs": (dense, (wide, x), 2),
    ALONE: (ordered, (bank, rows, found.sizes), 2),
  }


def cases(bandwidth: float) -> Iterator[timing.Case]:
  """Rows; `bandwidth` is not what bounds them."""
  del bandwidth
  rate = attention.gemm_rate()
  for (experts, width, hidden), targets in LAYERS:
    found = contestants(experts, width, hidden)
    race = {
      name: timing.timed(jax.jit(grouped.with_gradients(call, many)), *args)
      for name, (call, args, many) in found.items()
    }
    yield timing.Case(
      name=f"MoE forward and backward, {experts} experts, {TOKENS} tokens to "
      f"{TOP}, {width} x {hidden}",
      ours=race.pop("ours"),
      peers=race,
      target=targets,
      limit=3 * 3 * 2 * TOKENS * TOP * width * hidden / rate,
      note="limit: the products alone, at the rate of a large one",
    )


def facts() -> dict[str, Any]:
  """Temporary memory of each."""
  (sizes, _), found = LAYERS[0], {}
  for name, (call, args, many) in contestants(*sizes).items():
    run = jax.jit(grouped.with_gradients(call, many))
    temp = run.lower(*args).compile().memory_analysis().temp_size_in_bytes
    found[f"MoE forward and backward, {sizes[0]} experts, {name}"] = (
      f"{temp / 1e6:.0f} MB temporary"
    )
  return found
