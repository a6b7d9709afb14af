"""Banks of experts: functions of parameters, of rows and of their groups."""

from collections.abc import Callable
import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

import pallas_kernels

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class FeedForward:
  """Experts of two layers: down(activation(up(x))).

  Parameters are a dict: "up" [experts, d, hidden], "down" [experts, hidden, d],
  and, for gated experts, "gate" like "up": down(activation(gate(x)) * up(x)),
  which is SwiGLU with `jax.nn.silu` and ReGLU with `jax.nn.relu`.

  Attributes:
    activation: elementwise; one object for all calls.

  Example:
    >>> bank = routing.FeedForward(jax.nn.relu)
    >>> params = bank.init(jax.random.key(0), experts=2, width=4, hidden=8)
    >>> found = routing.top_k(jnp.zeros((3, 2)), 1)
    >>> routing.dropless(jnp.ones((3, 4)), found, bank, params).shape
    (3, 4)
  """

  fuses: ClassVar[bool] = True
  activation: Callable[[Array], Array] = jax.nn.silu

  def init(
    self,
    key: Array,
    *,
    experts: int,
    width: int,
    hidden: int,
    gated: bool = True,
    dtype=jnp.float32,
  ) -> dict[str, Array]:
    """Parameters of variance 1 / inputs."""
    normal = jax.nn.initializers.lecun_normal(
      in_axis=1, out_axis=2, batch_axis=0
    )
    shapes = {"up": (width, hidden), "down": (hidden, width)}
    if gated:
      shapes["gate"] = (width, hidden)
    keys = jax.random.split(key, len(shapes))
    return {
      name: normal(k, (experts, *shape), dtype)
      for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }

  def __call__(
    self,
    params: dict[str, Array],
    rows: Array,
    group_sizes: Array,
    *,
    gather: Array | None = None,
    scatter: Array | None = None,
    num_rows: int | None = None,
    row_scale: Array | None = None,
  ) -> Array:
    """Rows [m, d] to [m, d]; or as `grouped_matmul` gathers and scatters."""
    hidden = pallas_kernels.grouped_matmul(
      rows,
      params["up"],
      group_sizes,
      rhs_gate=params.get("gate"),
      activation=self.activation,
      gather=gather,
    )
    return pallas_kernels.grouped_matmul(
      hidden,
      params["down"],
      group_sizes,
      scatter=scatter,
      num_rows=num_rows,
      row_scale=row_scale,
    )
