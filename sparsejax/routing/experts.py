"""Banks of experts: functions of parameters, of rows and of their groups."""

from collections.abc import Callable
import dataclasses
import functools
from typing import ClassVar

from flax import nnx
import jax
import jax.numpy as jnp

import pallas_kernels
from sparsejax import sharding

Array = jax.Array


def relu2(x: Array) -> Array:
  """The square of relu(x), an activation.

  >>> routing.relu2(jnp.array([-2.0, 3.0])).tolist()
  [0.0, 9.0]

  Source: Primer: Searching for Efficient Transformers for Language Modeling.
  """
  return jnp.square(jax.nn.relu(x))


@dataclasses.dataclass(frozen=True)
class FeedForward:
  """Experts of two layers: down(activation(up(x))).

  Parameters are a dict: "up" [experts, d, hidden], "down" [experts, hidden, d],
  and, for gated experts, "gate" like "up": down(activation(gate(x)) * up(x)),
  which is SwiGLU with `jax.nn.silu` and ReGLU with `jax.nn.relu`. Each may have
  a bias: "up_bias", "gate_bias" [experts, hidden], "down_bias" [experts, d].

  Attributes:
    activation: elementwise; one object for all calls.
    gated: whether `init` makes a gate. Calls go by the parameters they get.
    biased: whether `init` makes biases, of 0.

  Example:
    >>> bank = routing.FeedForward(jax.nn.relu)
    >>> params = bank.init(jax.random.key(0), experts=2, width=4, hidden=8)
    >>> found = routing.top_k(jnp.zeros((3, 2)), 1)
    >>> routing.dropless(jnp.ones((3, 4)), found, bank, params).shape
    (3, 4)
  """

  fuses: ClassVar[bool] = True
  activation: Callable[[Array], Array] = jax.nn.silu
  gated: bool = True
  biased: bool = False

  def init(
    self,
    key: Array,
    *,
    experts: int,
    width: int,
    hidden: int,
    gated: bool | None = None,
    dtype=jnp.float32,
  ) -> dict[str, Array]:
    """Parameters of variance 1 / inputs; `gated` in place of the attribute."""
    normal = jax.nn.initializers.lecun_normal(
      in_axis=1, out_axis=2, batch_axis=0
    )
    shapes = {"up": (width, hidden), "down": (hidden, width)}
    if self.gated if gated is None else gated:
      shapes["gate"] = (width, hidden)
    keys = jax.random.split(key, len(shapes))
    params = {
      name: normal(k, (experts, *shape), dtype)
      for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    if self.biased:
      params |= {
        f"{name}_bias": jnp.zeros((experts, n), dtype)
        for name, (_, n) in shapes.items()
      }
    return params

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
    """Rows [m, d] to [m, d]; or as `grouped_matmul` gathers and scatters.

    Raises:
      ValueError: params have other names.
    """
    check_names(params)
    product = functools.partial(
      pallas_kernels.grouped_matmul, group_sizes=group_sizes
    )

    def with_bias(y, name, edges, **options):
      """Beside y, the row 1 of each edge times its expert's bias."""
      if f"{name}_bias" not in params:
        return y
      one = jnp.ones((len(edges), 1), edges.dtype)
      if sharding.is_explicit(edges):
        by_edge = jax.typeof(edges).sharding.spec[0]
        one = jax.sharding.reshard(one, jax.P(by_edge))
      return y + product(one, params[f"{name}_bias"][:, None], **options)

    if {"up_bias", "gate_bias"}.isdisjoint(params):
      hidden = product(
        rows,
        params["up"],
        rhs_gate=params.get("gate"),
        activation=self.activation,
        gather=gather,
      )
    else:

      def layer(name):
        y = product(rows, params[name], gather=gather)
        return with_bias(y, name, y)

      if "gate" in params:
        hidden = self.activation(layer("gate")) * layer("up")
      else:
        hidden = self.activation(layer("up"))
    place = dict(scatter=scatter, num_rows=num_rows, row_scale=row_scale)
    y = product(hidden, params["down"], **place)
    return with_bias(y, "down", hidden, **place)


NAMES = {"up", "down", "gate", "up_bias", "down_bias", "gate_bias"}


def check_names(params):
  """Raises a ValueError where params are not those of `FeedForward`."""
  names, bare = set(params), {name.removesuffix("_bias") for name in params}
  if not {"up", "down"} <= names <= NAMES or not bare <= names:
    raise ValueError(
      'params must have "up", "down" and perhaps "gate", and perhaps a bias of '
      f'each, such as "up_bias", got {sorted(names)}'
    )


class SharedExpert(nnx.Module):
  """A feed-forward network for all tokens, beside the routed ones.

  To be given to `MoE` as `shared`.

  Args:
    width: of tokens.
    hidden: of the network.
    activation: elementwise; one object for all calls.
    gated: whether the network is: SwiGLU with `jax.nn.silu`.
    output_gate: whether the output is multiplied by sigmoid(x @ weight), one
      number a token.
    param_dtype: of the parameters.
    rngs: for the initial parameters.

  Example:
    >>> from flax import nnx
    >>> rngs = nnx.Rngs(0)
    >>> shared = routing.SharedExpert(4, 8, output_gate=True, rngs=rngs)
    >>> moe = routing.MoE(4, 8, experts=3, shared=shared, rngs=rngs)
    >>> moe(jnp.ones((2, 5, 4))).shape
    (2, 5, 4)

  Source: DeepSeekMoE: Towards Ultimate Expert Specialization in
  Mixture-of-Experts Language Models, section 3.2; the gate: time-moe, Time-MoE:
  Billion-Scale Time Series Foundation Models with Mixture of Experts.
  """

  def __init__(
    self,
    width: int,
    hidden: int,
    *,
    activation: Callable[[Array], Array] = jax.nn.silu,
    gated: bool = True,
    output_gate: bool = False,
    param_dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    params = FeedForward().init(
      rngs.params(),
      experts=1,
      width=width,
      hidden=hidden,
      gated=gated,
      dtype=param_dtype,
    )
    self.params = nnx.data({k: nnx.Param(v[0]) for k, v in params.items()})
    weight = None
    if output_gate:
      normal = jax.nn.initializers.lecun_normal()
      weight = nnx.Param(normal(rngs.params(), (width, 1), param_dtype))
    self.output_gate = weight
    self.activation = activation

  def __call__(self, x: Array) -> Array:
    """Floating [..., width], like x."""
    of = {k: v[...].astype(x.dtype) for k, v in self.params.items()}
    hidden = x @ of["up"]
    if "gate" in of:
      hidden *= self.activation(x @ of["gate"])
    else:
      hidden = self.activation(hidden)
    y = hidden @ of["down"]
    if self.output_gate is not None:
      y *= jax.nn.sigmoid(x @ self.output_gate[...].astype(x.dtype))
    return y
