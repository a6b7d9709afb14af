"""Layers of which a part is trained, whose backward pass is as small."""

import dataclasses
from typing import Any

from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from sparsejax.automatic import automatic
from sparsejax.finetuning import choices
from sparsejax.finetuning import layers

Array = jax.Array


def partial_matmul(
  x: Array, kernel: Array, part: Array, choice: choices.Choice
) -> Array:
  """x @ kernel with a part of the kernel replaced; only that is trained.

  The gradient by the part is computed from what it needs alone: of a slice of
  inputs, from those inputs; of outputs, from the cotangents of those outputs;
  of blocks, from theirs. (Of single entries it is all of the gradient first.)

  Args:
    x: floating [..., inputs].
    kernel: floating [inputs, outputs]. It is frozen: its gradient is 0.
    part: as `choice.take(kernel)`.
    choice: `Slice`, `Blocks`, `Entries` or `Whole`, see `choose`.

  Returns:
    [..., outputs]. Differentiable in reverse mode by x and the part.

  Raises:
    ValueError: the shapes do not fit.

  >>> from sparsejax.finetuning import Slice
  >>> x, kernel, rows = jnp.arange(4.0), jnp.ones((4, 2)), Slice(0, 1, 2)
  >>> loss = lambda part: partial_matmul(x, kernel, part, rows).sum()
  >>> jax.grad(loss)(jnp.zeros((1, 2))).tolist()
  [[1.0, 1.0]]

  Source: [s2ft] Yang et al., S2FT: Efficient, Scalable and Generalizable LLM
    Fine-tuning by Structured Sparsity, section 3 (partial back-propagation);
    [smt] He et al., Sparse Matrix in Large Language Model Fine-tuning, section
    3, of blocks.
  """
  if kernel.ndim != 2 or not x.ndim or x.shape[-1] != kernel.shape[0]:
    raise ValueError(
      "kernel must be [inputs, outputs] for x [..., inputs], got "
      f"{kernel.shape} for {x.shape}"
    )
  choice.check("kernel", kernel.shape)
  want = jax.eval_shape(choice.take, kernel).shape
  if part.shape != want:
    raise ValueError(f"part must be {want}, got {part.shape}")
  return _matmul(x, lax.stop_gradient(kernel), part, choice)


@jax.custom_vjp
def _matmul(x, kernel, part, choice):
  return x @ choice.put(kernel, part.astype(kernel.dtype))


def _forward(x, kernel, part, choice):
  return _matmul(x, kernel, part, choice), (x, kernel, part, choice)


def _backward(kept, dy):
  x, kernel, part, choice = kept
  small = part.astype(kernel.dtype)
  # Put together once more, rather than kept: parameters are there anyway.
  w = choice.put(kernel, small)
  (dx,) = jax.linear_transpose(lambda x: x @ w, x)(dy)
  d_part = _product(choice, x, dy, kernel, small).astype(part.dtype)
  none = jax.tree.map(lambda i: np.zeros(i.shape, jax.dtypes.float0), choice)
  return dx, jnp.zeros_like(kernel), d_part, none


_matmul.defvjp(_forward, _backward)


def _product(choice, x, dy, kernel, part):
  """The chosen part of x.T @ dy, over all leading dimensions.

  As a transpose of what is linear in the part, it is sharded as JAX shards
  gradients.
  """
  if isinstance(choice, choices.Slice):
    last = choices.Slice(x.ndim - 1, choice.start, choice.stop)
    if choice.axis == 0:
      x = last.take(x)
    else:
      dy = last.take(dy)
    return jax.linear_transpose(lambda part: x @ part, part)(dy)[0]
  if isinstance(choice, choices.Blocks):
    r, c = choice.block

    def blocks(x, dy, index):
      x = x.reshape(*x.shape[:-1], -1, r)[..., index[:, 0], :]
      dy = dy.reshape(*dy.shape[:-1], -1, c)[..., index[:, 1], :]
      return jnp.einsum("...nr,...nc->nrc", x, dy)

    return automatic(blocks, x, dy, choice.index)
  return choice.take(jax.linear_transpose(lambda w: x @ w, kernel)(dy)[0])


class TrainedPart(nnx.Param):
  """The trained part of a kernel that is frozen."""


class PartIndex(nnx.Variable):
  """Where the trained part lies; no optimizer changes it."""


class PartialDot(nnx.Module):
  """The `dot_general` of a layer of whose kernel a part is trained.

  Attributes:
    part: TrainedPart, as `take` gives it.
    index: PartIndex of entries or blocks, or None.
  """

  def __init__(self, part: Array, choice: choices.Choice):
    index = None
    if hasattr(choice, "index"):
      index = PartIndex(jnp.array(choice.index))
      choice = dataclasses.replace(choice, index=None)
    # Copies: a part that is the whole kernel is another array, as donation of a
    # model needs it.
    self.part, self.index = TrainedPart(jnp.array(part)), nnx.data(index)
    self.fixed = nnx.static(choice)

  @property
  def choice(self) -> choices.Choice:
    """Where the part lies."""
    if self.index is None:
      return self.fixed
    return dataclasses.replace(self.fixed, index=self.index[...])

  def __call__(
    self, x: Array, kernel: Array, dimension_numbers: Any, **options: Any
  ) -> Array:
    del dimension_numbers  # those of Linear
    if unused := {n: v for n, v in options.items() if v is not None}:
      raise ValueError(f"a layer with a trained part takes no {unused}")
    return partial_matmul(x, kernel, self.part[...], self.choice)


def add_parts(model: nnx.Module, chosen: Any) -> nnx.Module:
  """A copy of a model in which parts of kernels are trained, and no more.

  Differentiate and optimize the Variables of kind `TrainedPart`:

    nnx.Optimizer(model, tx, wrt=finetuning.TrainedPart)
    nnx.grad(loss, argnums=nnx.DiffState(0, finetuning.TrainedPart))

  so that no other gradient is computed, and these from what they need alone.

  Args:
    model: any module that holds `nnx.Linear`; its arrays are shared, so that
      to donate the copy takes the model's.
    chosen: as in `choose`, of kernels of `nnx.Linear`, for
      `nnx.state(model, nnx.Param)`.

  Returns:
    The copy: its layers have a `PartialDot` as `dot_general`; their kernels and
    all else stay where they are.

  Raises:
    ValueError: as `choose`; for what is no kernel of an `nnx.Linear`, or of one
      that has a `dot_general` of its own. When the layer is called, if it has
      a precision or a preferred_element_type.

  >>> from sparsejax.finetuning import Slice
  >>> model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
  >>> tuned = add_parts(model, {"kernel": Slice(0, 1, 3)})
  >>> nnx.state(tuned, TrainedPart)["dot_general"]["part"].shape
  (2, 2)

  Source: [s2ft, smt] see `partial_matmul`.
  """
  model = nnx.clone(model)
  params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  found = choices.by_name(chosen, params)
  for name, layer in layers.linears(model).items():
    choice = found.pop(f"{name}/kernel".removeprefix("/"), None)
    if choice is not None:
      part = choice.take(layer.kernel[...])
      layers.set_dot(name, layer, PartialDot(part, choice))
  if found:
    raise ValueError(
      f"chosen must be of kernels of nnx.Linear, got {sorted(found)}"
    )
  return model


def merge_parts(model: nnx.Module) -> nnx.Module:
  """A copy of a model whose trained parts are in the kernels.

  Args:
    model: as `add_parts` returns it, perhaps trained.

  Returns:
    The copy: the modules of before. Kernels are bit-equal to those before but
    for the parts.

  Raises:
    ValueError: no layer has a trained part.

  >>> from sparsejax.finetuning import Slice
  >>> model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
  >>> tuned = add_parts(model, {"kernel": Slice(0, 1, 3)})
  >>> bool((merge_parts(tuned).kernel[...] == model.kernel[...]).all())
  True

  Source: [s2ft, smt] see `partial_matmul`.
  """
  model = nnx.clone(model)
  count = 0
  for layer in layers.linears(model).values():
    dot = layer.dot_general
    if isinstance(dot, PartialDot):
      part = dot.part[...].astype(layer.kernel.dtype)
      layer.kernel[...] = dot.choice.put(layer.kernel[...], part)
      layers.plain_dot(layer)
      count += 1
  if not count:
    raise ValueError("model must have trained parts, got none: see add_parts")
  return model
