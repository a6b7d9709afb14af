"""Slices of rows from every device to every other, on any platform."""

import jax
from jax import lax
import jax.numpy as jnp

Array = jax.Array


def ragged_all_to_all(
  operand: Array,
  output: Array,
  input_offsets: Array,
  send_sizes: Array,
  output_offsets: Array,
  recv_sizes: Array,
  *,
  axis_name: str,
) -> Array:
  """`jax.lax.ragged_all_to_all`, and on CPU, which lacks it, what it does.

  There each slice is padded to the operand's length, so that memory is that
  of the operand times the slices. Differentiable in operand and output, in
  forward and reverse mode.

  Args:
    operand: [N, ...], of which slices are sent.
    output: [M, ...], which received slices overwrite.
    input_offsets: int32 [K]: where slices begin in the operand. K is a multiple
      of the devices; equally many in turn go to each.
    send_sizes: int32 [K], rows of the slices.
    output_offsets: int32 [K]: where slices begin on the devices that they are
      sent to.
    recv_sizes: int32 [K], rows of the slices that come.
    axis_name: of the mesh, inside of a `shard_map`.

  Returns:
    [M, ...].

  Raises:
    ValueError: for shapes that do not fit each other.
  """
  devices = lax.axis_size(axis_name)
  slices = input_offsets.shape
  if len(slices) != 1 or slices[0] % devices:
    raise ValueError(
      f"input_offsets must be [K] for a multiple K of the {devices} devices "
      f"along {axis_name!r}, got {slices}"
    )
  for name, x in (
    ("send_sizes", send_sizes),
    ("output_offsets", output_offsets),
    ("recv_sizes", recv_sizes),
  ):
    if x.shape != slices:
      raise ValueError(f"{name} must be {list(slices)}, got {list(x.shape)}")
  if operand.shape[1:] != output.shape[1:] or operand.dtype != output.dtype:
    raise ValueError(
      f"output must hold rows like the operand's, {operand.dtype}"
      f"{list(operand.shape[1:])}, got {output.dtype}{list(output.shape[1:])}"
    )

  def padded(operand, output, input_offsets, output_offsets, recv_sizes):
    row = jnp.arange(operand.shape[0])
    at = input_offsets[:, None] + row
    parts = operand.at[at].get(mode="fill", fill_value=0)
    swap = lambda x: lax.all_to_all(x, axis_name, 0, 0, tiled=True)
    begin = swap(output_offsets)[:, None]
    to = jnp.where(row < recv_sizes[:, None], begin + row, output.shape[0])
    return output.at[to].set(swap(parts), mode="drop")

  def native(operand, output, input_offsets, output_offsets, recv_sizes):
    return lax.ragged_all_to_all(
      operand,
      output,
      input_offsets,
      send_sizes,
      output_offsets,
      recv_sizes,
      axis_name=axis_name,
    )

  return lax.platform_dependent(
    operand,
    output,
    input_offsets,
    output_offsets,
    recv_sizes,
    cpu=padded,
    default=native,
  )
