"""Static masks known from their shape: butterflies and random graphs.

NumPy arrays, made once; `sparsejax.weights.keep_masked` trains under them.
"""

import numpy as np


def flat_block_butterfly(
  shape: tuple[int, int], block: int, max_stride: int | None = None
) -> np.ndarray:
  """Blocks (i, j) with i = j or i xor j a power of two, as one sum.

  The product of butterfly factors, flattened to first order: n log n blocks.
  Where the blocks of the two axes differ in number, the square pattern of the
  smaller number is stretched along the longer axis.

  Args:
    shape: rows and columns of the weight; `block` divides both.
    block: rows and columns of a block.
    max_stride: the largest i xor j, a power of two (the paper's maximum stride
      is twice that); None for all that fit.

  Returns:
    A boolean array of `shape`.

  Raises:
    ValueError: block does not divide shape, or max_stride is no power of two.

  Source: [pixelfly] Dao et al., Pixelated Butterfly, sec. 3.2.

  >>> flat_block_butterfly((4, 4), 1, max_stride=1).astype(int)
  array([[1, 1, 0, 0],
         [1, 1, 0, 0],
         [0, 0, 1, 1],
         [0, 0, 1, 1]])
  """
  if len(shape) != 2 or block < 1 or shape[0] % block or shape[1] % block:
    raise ValueError(f"block must divide both axes, got {block} for {shape}")
  if max_stride is not None and (
    max_stride < 1 or max_stride & (max_stride - 1)
  ):
    raise ValueError(f"max_stride must be a power of two, got {max_stride}")
  rows, columns = shape[0] // block, shape[1] // block
  size = min(rows, columns)
  if not size:
    return np.zeros(shape, bool)
  if max(rows, columns) % size:
    raise ValueError(
      "shape must have blocks along one axis that divide those along the "
      f"other, got {rows} x {columns} blocks"
    )
  i, j = np.indices((size, size))
  apart = i ^ j
  keep = (apart & (apart - 1)) == 0  # zero and the powers of two
  if max_stride is not None:
    keep &= apart <= max_stride
  keep = keep.repeat(rows // size, 0).repeat(columns // size, 1)
  return keep.repeat(block, 0).repeat(block, 1)


def random_graph(shape: tuple[int, int], degree: int, seed: int) -> np.ndarray:
  """Every output reads `degree` inputs drawn without replacement.

  Args:
    shape: inputs and outputs.
    degree: inputs of each output, at most all of them.
    seed: of NumPy's generator.

  Returns:
    A boolean array of `shape`, `degree` True in every column.

  Raises:
    ValueError: degree is out of range.

  Source: Prabhu et al., Deep Expander Networks, sec. 3.

  >>> random_graph((8, 3), 2, seed=0).sum(0)
  array([2, 2, 2])
  """
  inputs, outputs = shape
  if not 0 <= degree <= inputs:
    raise ValueError(f"degree must be in [0, {inputs}], got {degree}")
  draws = np.random.default_rng(seed).random((inputs, outputs))
  return draws.argsort(0).argsort(0) < degree
