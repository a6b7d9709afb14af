"""A bank of LoRA experts, for any router and dispatcher."""

import dataclasses

import jax
import jax.numpy as jnp

import pallas_kernels

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class LoRABank:
  """Experts alpha / rank * (x @ a) @ b, of parameters {"a", "b"}.

  A function of parameters, of rows [m, inputs] and of the sizes of their groups
  int32 [experts]: rows of the first group are the first expert's. It returns
  [m, outputs]. Dispatchers of `sparsejax.routing` take it as it is.

  Attributes:
    alpha: what scales the outputs, over the rank.

  >>> bank = LoRABank(alpha=2.0)
  >>> params = {"a": jnp.ones((2, 3, 1)), "b": jnp.array([[[1.0]], [[5.0]]])}
  >>> bank(params, jnp.ones((3, 3)), jnp.array([1, 2])).tolist()
  [[6.0], [30.0], [30.0]]

  Source: [lora-moe] LoRA experts under a router; [lora] Hu et al., LoRA:
    Low-Rank Adaptation of Large Language Models.
  """

  alpha: float

  def init(
    self,
    key: Array,
    *,
    experts: int,
    inputs: int,
    outputs: int,
    rank: int,
    dtype=jnp.float32,
  ) -> dict[str, Array]:
    """Parameters: a of variance 1 / inputs, and b of 0."""
    for name, value in (("experts", experts), ("rank", rank)):
      if value < 1:
        raise ValueError(f"{name} must be 1 or more, got {value}")
    a = jax.random.normal(key, (experts, inputs, rank), dtype) * inputs**-0.5
    return {
      "a": a.astype(dtype),
      "b": jnp.zeros((experts, rank, outputs), dtype),
    }

  def __call__(
    self, params: dict[str, Array], rows: Array, group_sizes: Array
  ) -> Array:
    a, b = params["a"], params["b"]
    low = pallas_kernels.grouped_matmul(rows, a, group_sizes=group_sizes)
    y = pallas_kernels.grouped_matmul(low, b, group_sizes=group_sizes)
    return self.alpha / a.shape[-1] * y
