"""LoRA: what changes of a kernel is a product of two thin matrices."""

from typing import Any

from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp

from sparsejax.finetuning import layers

Array = jax.Array

_DRAW = nnx.initializers.variance_scaling(1.0, "fan_in", "normal")


class LoRA(nnx.Module):
  """The `dot_general` of a layer: x @ kernel + alpha / rank * (x @ a) @ b.

  With dropout, in each call inputs of a and outputs of b are left out, all of
  the rank together, and what is kept is divided by 1 - dropout of both: the
  mean over calls is that without. `model.eval()` turns it off, `model.train()`
  on. (The paper says nothing of a division; its ensemble, at test time, is the
  mean output of several calls in training mode.)

  Attributes:
    a: nnx.LoRAParam [inputs, rank], normal of variance 1 / inputs at the start.
    b: nnx.LoRAParam [rank, outputs], 0 at the start.

  Args:
    inputs: of the layer.
    outputs: of the layer.
    rank: of the change.
    alpha: what scales it, over the rank.
    dropout: the share of inputs, and of outputs, that are left out in a call.
    param_dtype: of a and b.
    rngs: draws a ("params"), and what is left out ("dropout").

  Raises:
    ValueError: rank is not positive, or dropout not in [0, 1).

  >>> layer = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
  >>> tuned = add_lora(layer, rank=1, rngs=nnx.Rngs(1))
  >>> x = jnp.ones((3, 4))
  >>> bool((tuned(x) == layer(x)).all()), tuned.dot_general.a.shape
  (True, (4, 1))

  Source: [lora] Hu et al., LoRA: Low-Rank Adaptation of Large Language Models,
    section 4.1; [lora-dropout] Lin et al., LoRA Dropout as a Sparsity
    Regularizer for Overfitting Control.
  """

  def __init__(
    self,
    inputs: int,
    outputs: int,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
  ):
    if rank < 1:
      raise ValueError(f"rank must be 1 or more, got {rank}")
    if not 0 <= dropout < 1:
      raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    self.scale = alpha / rank
    self.a = nnx.LoRAParam(_DRAW(rngs.params(), (inputs, rank), param_dtype))
    self.b = nnx.LoRAParam(jnp.zeros((rank, outputs), param_dtype))
    # One mask of inputs and one of outputs, for all ranks alike.
    drop = lambda rank_axis: nnx.data(
      nnx.Dropout(dropout, broadcast_dims=(rank_axis,), rngs=rngs)
      if dropout
      else None
    )
    self.drop_inputs, self.drop_outputs = drop(1), drop(0)

  def factors(self) -> tuple[Array, Array]:
    """a and b as a call sees them, with what is left out at 0."""
    a, b = self.a[...], self.b[...]
    if self.drop_inputs is None:
      return a, b
    return self.drop_inputs(a), self.drop_outputs(b)

  def delta(self) -> Array:
    """alpha / rank * a @ b, f32 [inputs, outputs], with nothing left out."""
    a, b = (x[...].astype(jnp.float32) for x in (self.a, self.b))
    return self.scale * jnp.matmul(a, b, precision=lax.Precision.HIGHEST)

  def __call__(
    self, x: Array, kernel: Array, dimension_numbers: Any, **options: Any
  ) -> Array:
    y = lax.dot_general(x, kernel, dimension_numbers, **options)
    a, b = self.factors()
    low = (x @ a.astype(x.dtype)) @ b.astype(x.dtype)
    return y + (self.scale * low).astype(y.dtype)


def add_lora(
  model: nnx.Module,
  *,
  where: str = "",
  rank: int,
  alpha: float | None = None,
  dropout: float = 0.0,
  rngs: nnx.Rngs,
) -> nnx.Module:
  """A copy of a model whose linear layers have a low-rank change beside them.

  Differentiate and optimize the Variables of kind `nnx.LoRAParam`:

    nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
    nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))

  so that nothing else has a gradient or a state.

  Args:
    model: any module that holds `nnx.Linear`. What multiplies otherwise, as
      `nnx.LinearGeneral` in `nnx.MultiHeadAttention` does, stays as it is.
    where: a regular expression, searched for in the paths of its linear layers
      ("blocks/0/attention/out"); by default all of them.
    rank: of the change.
    alpha: what scales it, over the rank; by default the rank, a scale of 1.
    dropout: see `LoRA`.
    rngs: draws the first factors, and what is left out.

  Returns:
    The copy, the same function as the model: a `LoRA` is the `dot_general` of
    those layers; their kernels, and all else, stay where they are.

  Raises:
    ValueError: as `LoRA`; `where` matches no layer, or one that has a
      `dot_general` of its own or a stack of kernels (add inside of `nnx.vmap`).

  >>> model = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), nnx.relu)
  >>> tuned = add_lora(model, where="layers/0", rank=2, rngs=nnx.Rngs(1))
  >>> sum(p.size for p in jax.tree.leaves(nnx.state(tuned, nnx.LoRAParam)))
  16

  Source: [lora] Hu et al., LoRA: Low-Rank Adaptation of Large Language Models.
  """
  model = nnx.clone(model)
  for name, layer in layers.matching(model, where).items():
    if layer.kernel.ndim != 2:
      raise ValueError(
        f"{name}: its kernel must be [inputs, outputs], got "
        f"{layer.kernel.shape}: add inside of nnx.vmap"
      )
    lora = LoRA(
      layer.in_features,
      layer.out_features,
      rank=rank,
      alpha=rank if alpha is None else alpha,
      dropout=dropout,
      param_dtype=layer.kernel.dtype,
      rngs=rngs,
    )
    layers.set_dot(name, layer, lora)
  return model


def merge_lora(model: nnx.Module) -> nnx.Module:
  """A copy of a model with the changes added to its kernels, as fast as before.

  Args:
    model: as `add_lora` returns it, perhaps trained.

  Returns:
    The copy: the modules of before. Sums are in f32, rounded to the kernels'
    dtype once; nothing is left out by dropout.

  Raises:
    ValueError: no layer has a LoRA.

  >>> layer = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
  >>> tuned = add_lora(layer, rank=1, rngs=nnx.Rngs(1))
  >>> bool((merge_lora(tuned).kernel[...] == layer.kernel[...]).all())
  True

  Source: [lora] Hu et al., LoRA: Low-Rank Adaptation of Large Language Models,
    section 4.1.
  """
  model = nnx.clone(model)
  count = 0
  for layer in layers.linears(model).values():
    if isinstance(layer.dot_general, LoRA):
      kernel = layer.kernel[...]
      total = kernel.astype(jnp.float32) + layer.dot_general.delta()
      layer.kernel[...] = total.astype(kernel.dtype)
      layers.plain_dot(layer)
      count += 1
  if not count:
    raise ValueError("model must have a LoRA, got none: see add_lora")
  return model
