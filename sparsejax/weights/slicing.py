"""SliceGPT's algebra: a signal in fewer directions, and kernels that fit it.

A signal x [..., d] that layers read and write becomes x @ q [..., r], where the
columns of q [d, r] are its r directions of most energy: the first columns of a
`rotation`. Kernels are cut to match; with r = d the model computes what it did.

A norm must be an RMS norm without parameters, which commutes with a rotation:
its gain and shift go into what reads it, and a layer norm is an RMS norm of a
signal that was centered by what wrote it. After cutting it still divides by
sqrt(sum(x^2) / d), with the d of before.
"""

import jax
import jax.numpy as jnp

from sparsejax.capture import Moments

Array = jax.Array


def rotation(moments: Moments) -> tuple[Array, Array]:
  """The directions of a signal, those of most energy first.

  Args:
    moments: of the signal, with `second` [d, d].

  Returns:
    q, f32 [d, d], orthogonal, a direction a column: the eigenvectors of
    `second`, in each of which the entry of largest magnitude is positive. And
    energies, f32 [d]: the mean square of the signal along each.

  Raises:
    ValueError: the moments have no `second`.

  Example:
    >>> from sparsejax.capture import Moments
    >>> x = jnp.array([[8.0, 6.0], [-3.0, 4.0]])
    >>> q, energies = weights.rotation(Moments.zeros(2).add(x))
    >>> jnp.round(10 * q).tolist(), jnp.round(energies, 1).tolist()
    ([[8.0, -6.0], [6.0, 8.0]], [50.0, 12.5])

  Source: slicegpt, SliceGPT: Compress Large Language Models by Deleting Rows
  and Columns, section 3.3.
  """
  if moments.second is None:
    raise ValueError("moments must have second, got None: capture them with it")
  energies, q = jnp.linalg.eigh(moments.second)
  energies, q = energies[::-1], q[:, ::-1]
  largest = jnp.abs(q).argmax(0)
  signs = jnp.sign(jnp.take_along_axis(q, largest[None], 0))
  return q * signs, jnp.maximum(energies, 0)


def slice_width(width: int, sparsity: float, multiple: int = 8) -> int:
  """How many directions of a signal are left.

  Args:
    width: of the signal.
    sparsity: share of the directions to cut, in [0, 1).
    multiple: what is left is rounded down to whole multiples, as matrices then
      multiply faster; where that were none, or nothing is cut, it is not.

  Returns:
    An int in [1, width].

  Raises:
    ValueError: an argument is out of range, or nothing would be left.

  Example:
    >>> weights.slice_width(100, 0.25), weights.slice_width(100, 0.25, 1)
    (72, 75)
  """
  if not 0 <= sparsity < 1:
    raise ValueError(f"sparsity must be in [0, 1), got {sparsity}")
  if multiple < 1:
    raise ValueError(f"multiple must be 1 or more, got {multiple}")
  left = width - round(sparsity * width)
  if left < 1:
    raise ValueError(
      f"sparsity must leave a direction of {width}, got {sparsity}"
    )
  if left == width or left < multiple:
    return left
  return left - left % multiple


def slice_inputs(
  kernel: Array,
  bias: Array | None,
  q: Array,
  gain: Array | None = None,
  shift: Array | None = None,
) -> tuple[Array, Array | None]:
  """A layer that reads a signal by way of a norm, for the cut signal.

  Args:
    kernel: floating [d, outputs].
    bias: None, or [outputs].
    q: the directions that are left, [d, r].
    gain: None, or [d]: what the norm multiplied by.
    shift: None, or [d]: what the norm added.

  Returns:
    The kernel, f32 [r, outputs], and the bias, f32 [outputs]; None where there
    was neither bias nor shift.

  Example:
    >>> kernel, q = jnp.array([[1.0], [3.0]]), jnp.array([[0.0], [1.0]])
    >>> gain, shift = jnp.array([1.0, 2.0]), jnp.array([1.0, 1.0])
    >>> kernel, bias = weights.slice_inputs(kernel, None, q, gain, shift)
    >>> kernel.tolist(), bias.tolist()
    ([[6.0]], [4.0])

  Source: slicegpt, SliceGPT: Compress Large Language Models by Deleting Rows
  and Columns, section 3.
  """
  kernel = _f32(kernel)
  bias = None if bias is None else _f32(bias)
  if shift is not None:
    shift = _dot(_f32(shift), kernel)
    bias = shift if bias is None else bias + shift
  if gain is not None:
    kernel = _f32(gain)[:, None] * kernel
  return _dot(q.T, kernel), bias


def slice_outputs(table: Array, q: Array, *, centered: bool = False) -> Array:
  """What writes to a signal, for the cut signal.

  Args:
    table: floating [..., d]: a kernel, its bias, or embeddings.
    q: the directions that are left, [d, r].
    centered: whether a layer norm reads the signal: the mean is taken off.

  Returns:
    f32 [..., r].

  Example:
    >>> q = jnp.array([[1.0], [0.0]])
    >>> weights.slice_outputs(jnp.array([3.0, 1.0]), q).tolist()
    [3.0]
    >>> weights.slice_outputs(jnp.array([3.0, 1.0]), q, centered=True).tolist()
    [1.0]

  Source: slicegpt, SliceGPT: Compress Large Language Models by Deleting Rows
  and Columns, section 3.
  """
  table = _f32(table)
  if centered:
    table = table - table.mean(-1, keepdims=True)
  return _dot(table, q)


def slice_residual(
  q: Array,
  next_q: Array,
  gain: Array | None = None,
  *,
  centered: bool = False,
) -> Array:
  """What takes a cut signal past a layer, to the directions of the next one.

  Args:
    q: the directions of the signal, [d, r].
    next_q: those of the signal that it is added to, [d, r'].
    gain: None, or [d]: where the residual is what a norm puts out (as in BERT),
      what this multiplied by. What it added goes to the layer's bias.
    centered: whether a layer norm reads what it is added to.

  Returns:
    A kernel, f32 [r, r']; without gain or centering, and nothing cut, a
    rotation.

  Example:
    >>> q = jnp.eye(2)
    >>> weights.slice_residual(q, q[:, :1], jnp.array([2.0, 1.0])).tolist()
    [[2.0], [0.0]]

  Source: slicegpt, SliceGPT: Compress Large Language Models by Deleting Rows
  and Columns, section 3.3; with a gain, which is not in the paper, for networks
  whose norms are behind the sum.
  """
  kernel, _ = slice_inputs(jnp.eye(len(q)), None, q, gain)
  return slice_outputs(kernel, next_q, centered=centered)


def _f32(x):
  return x.astype(jnp.float32)


def _dot(x, y):
  return jnp.matmul(x, y, precision="highest")
