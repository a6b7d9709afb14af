"""Whether the arguments of a call fit each other."""

import jax.numpy as jnp

from pallas_kernels import backends
from pallas_kernels.block_sparse_matmul.weight import BlockSparseWeight


def check(weight, arrays, preferred_element_type, backend, interpret):
  """Raises a ValueError that names the argument.

  `arrays` holds (name, array, name of its last dimension, that size).
  """
  if not isinstance(weight, BlockSparseWeight):
    raise ValueError(
      f"weight is {type(weight).__name__}; it must be a BlockSparseWeight."
    )
  for name, x, last, size in arrays:
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    if not floating or x.ndim < 1 or x.shape[-1] != size:
      raise ValueError(
        f"{name} is {x.dtype}{list(x.shape)}; it must be floating [..., {last}]"
        f", and {last} is {size} for a weight of shape {weight.shape}."
      )
    if x.dtype != weight.values.dtype:
      raise ValueError(
        f"{name} has dtype {x.dtype}, the weight's values "
        f"{weight.values.dtype}; use one."
      )
  leads = [x.shape[:-1] for _, x, _, _ in arrays]
  if leads[0] != leads[-1]:
    raise ValueError(
      f"x has leading dimensions {leads[0]}, y {leads[-1]}; they must agree."
    )
  if not _floating_or_none(preferred_element_type):
    raise ValueError(
      f"preferred_element_type is {preferred_element_type!r}; it must be a "
      "floating dtype, or None for that of x."
    )
  backends.check(backend, interpret)


def _floating_or_none(dtype):
  try:
    return dtype is None or jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
  except TypeError:
    return False
