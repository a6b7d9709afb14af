"""Experts made of what is trained: of a dense network, or of other experts.

All are functions of parameters as `FeedForward` has them: a dense network's are
{"up": [d, hidden], "down": [hidden, d]}, perhaps "gate", and perhaps biases,
"up_bias", "gate_bias" [hidden] and "down_bias" [d]; a bank's have a leading
dimension of experts. To put a bank into a module:

  moe.experts = nnx.data(jax.tree.map(nnx.Param, params))
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax import select
from sparsejax.routing.experts import check_names

Array = jax.Array


def upcycle(params: Any, experts: int) -> Any:
  """A bank of copies of a dense network.

  With weights that sum to 1 for each token, whatever the router, a mixture of
  them equals the network.

  Args:
    params: a pytree of arrays, of any kind of network.
    experts: how many copies.

  Returns:
    The pytree with arrays [experts, ...].

  Raises:
    ValueError: experts is not positive.

  Example:
    >>> dense = {"up": jnp.ones((4, 8)), "down": jnp.ones((8, 4))}
    >>> bank, params = routing.FeedForward(), routing.upcycle(dense, 3)
    >>> found = routing.top_k(jnp.zeros((2, 3)), 2, renormalize=True)
    >>> x = jnp.ones((2, 4))
    >>> y = routing.dropless(x, found, bank, params)
    >>> bool(jnp.allclose(y, jax.nn.silu(x @ dense["up"]) @ dense["down"]))
    True

  Source: sparse-upcycling, Sparse Upcycling: Training Mixture-of-Experts from
  Dense Checkpoints: copies, a fresh router, combine weights normalized.
  """
  _positive(experts)
  copies = lambda x: jnp.broadcast_to(x, (experts, *jnp.shape(x)))
  return jax.tree.map(copies, params)


def masked_copies(params: Any, experts: int, density: float, key: Array) -> Any:
  """A bank of copies, in each of which other random entries are 0.

  They begin alike and differ enough for a router to tell them apart. What is 0
  is trained as all else is.

  Args:
    params: a pytree of arrays.
    experts: how many copies.
    density: the share of each array's entries that is kept, rounded to a
      number of them, drawn anew for each expert and array.
    key: for the draws.

  Returns:
    The pytree with arrays [experts, ...].

  Raises:
    ValueError: experts is not positive, or density not in [0, 1].

  Example:
    >>> dense = {"up": jnp.ones((4, 8)), "down": jnp.ones((8, 4))}
    >>> params = routing.masked_copies(dense, 3, 0.75, jax.random.key(0))
    >>> params["up"].sum((1, 2)).tolist()
    [24.0, 24.0, 24.0]

  Source: evomoe, EvoMoE: An Evolutional Mixture-of-Experts Training Framework
  via Dense-To-Sparse Gate, its expert-diversify phase.
  """
  if not 0 <= density <= 1:
    raise ValueError(f"density must be in [0, 1], got {density}")
  copies, tree = jax.tree.flatten(upcycle(params, experts))
  masked = []
  for x, k in zip(copies, jax.random.split(key, len(copies)), strict=True):
    count = round(density * x[0].size)
    draws = jax.random.uniform(k, x.shape)
    kept = select.top_k_mask(draws, count, axis=tuple(range(1, x.ndim)))
    masked.append(jnp.where(kept, x, 0))
  return jax.tree.unflatten(tree, masked)


def neuron_split(
  params: dict[str, Array], experts: int, *, order: Array | None = None
) -> dict[str, Array]:
  """A bank whose experts share out the hidden neurons of a dense network.

  With all experts chosen, at weights of 1, their sum equals the network. Of a
  bias of the output each expert has an equal share.

  Args:
    params: of the dense network, see above.
    experts: how many; they divide the neurons.
    order: None, or int [hidden], a permutation: the first hidden / experts of
      these neurons are the first expert's, and so on. By default neighbors stay
      together; a clustering of neurons is given as the order that it makes.

  Returns:
    {"up": [experts, d, hidden / experts], ...}.

  Raises:
    ValueError: for parameters or an order that do not fit, and if experts do
      not divide the neurons.

  Example:
    >>> dense = {"up": jnp.arange(4.0)[None], "down": jnp.ones((4, 1))}
    >>> params = routing.neuron_split(dense, 2, order=jnp.array([0, 2, 1, 3]))
    >>> params["up"].tolist()
    [[[0.0, 2.0]], [[1.0, 3.0]]]
    >>> found = routing.top_k(jnp.zeros((1, 2)), 2, renormalize=True, scale=2.0)
    >>> bank = routing.FeedForward(jax.nn.relu)
    >>> routing.dropless(jnp.ones((1, 1)), found, bank, params).tolist()
    [[6.0]]

  Source: MoEfication: Transformer Feed-forward Layers are Mixtures of Experts
  (parts of neurons); xmoe, Enhancing Efficiency in Sparse Models with Sparser
  Selection (small experts of a network that is split).
  """
  _positive(experts)
  check_names(params)
  width, hidden = params["up"].shape
  out = params["down"].shape[-1]
  shapes = {"down": (hidden, out), "down_bias": (out,)}
  shapes |= dict.fromkeys(("up_bias", "gate_bias"), (hidden,))
  for name, x in params.items():
    wanted = shapes.get(name, (width, hidden))
    if x.shape != wanted:
      raise ValueError(
        f"params must have {name} {list(wanted)}, got {list(x.shape)}"
      )
  if hidden % experts:
    raise ValueError(
      f"experts must divide the {hidden} hidden neurons, got {experts}"
    )
  order = jnp.arange(hidden) if order is None else jnp.asarray(order)
  if order.shape != (hidden,) or not jnp.issubdtype(order.dtype, jnp.integer):
    raise ValueError(
      f"order must be integer[{hidden}], got {order.dtype}{list(order.shape)}"
    )
  order = order.reshape(experts, -1)

  def part(name, x):
    if name == "down_bias":
      return jnp.broadcast_to(x / experts, (experts, out)).astype(x.dtype)
    if name in ("up", "gate"):  # [d, experts, part] to [experts, d, part]
      return x[:, order].swapaxes(0, 1)
    return x[order]

  return {name: part(name, x) for name, x in params.items()}


def aggregate(
  banks: Sequence[Any], routers: Sequence[Array]
) -> tuple[Any, Array]:
  """One mixture with the experts of several, and one router over all of them.

  What else the models have must be one of theirs, or a mean of them.

  Args:
    banks: parameters of each mixture's experts: pytrees of [experts, ...].
    routers: the kernel of each mixture's router, [d, experts].

  Returns:
    The bank of all experts and the router's kernel [d, all experts]: the first
    experts are those of the first mixture, and so are their logits.

  Raises:
    ValueError: for banks and routers that do not fit each other.

  Example:
    >>> one, two = {"up": jnp.zeros((2, 4, 8))}, {"up": jnp.ones((3, 4, 8))}
    >>> params, kernel = routing.aggregate(
    ...   [one, two], [jnp.zeros((4, 2)), jnp.ones((4, 3))]
    ... )
    >>> params["up"].shape, kernel[0].tolist()
    ((5, 4, 8), [0.0, 0.0, 1.0, 1.0, 1.0])

  Source: zcode-m3-moe, Scalable and Efficient MoE Training for Multitask
  Multilingual Models: aggregation of experts. The paper is silent on scales:
  logits of routers that were trained apart need not be comparable.
  """
  if len(banks) != len(routers) or not banks:
    raise ValueError(
      f"routers must be as many as banks, got {len(routers)} and {len(banks)}"
    )
  for bank, kernel in zip(banks, routers, strict=True):
    found = {x.shape[0] for x in jax.tree.leaves(bank)}
    if kernel.ndim != 2 or found != {kernel.shape[1]}:
      raise ValueError(
        "routers must be [d, experts] of their banks, got "
        f"{list(kernel.shape)} for banks of {sorted(found)}"
      )
  try:
    params = jax.tree.map(lambda *x: jnp.concatenate(x), *banks)
    return params, jnp.concatenate(routers, axis=1)
  except (TypeError, ValueError) as e:
    raise ValueError(f"banks must be alike but for experts: {e}") from e


def _positive(experts):
  if experts < 1:
    raise ValueError(f"experts must be 1 or more, got {experts}")
