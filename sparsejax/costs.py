"""What a choice costs, counted: FLOPs that remain, if zeros cost nothing.

Counts, not times: hardware that computes the zeros saves none of them.
"""

import math


def weight_flops(nonzero: float, applications: float = 1) -> float:
  """FLOPs of a layer's forward pass: a multiplication and an addition each.

  Args:
    nonzero: active weights.
    applications: how often each is used: tokens of a dense layer, positions of
      a convolution.

  >>> weight_flops(1000, applications=4)
  8000
  """
  return 2 * nonzero * applications


def training_flops(
  dense: float, sparse: float, *, every: float = math.inf
) -> float:
  """FLOPs of a mean training step, forward and backward, of masked weights.

  A step computes a forward pass, the gradient of activations and that of
  weights, each as large as a forward pass. The weights' gradient is dense
  where masked weights need theirs: in one step after `every` sparse ones.

  Args:
    dense: forward FLOPs of the dense model.
    sparse: forward FLOPs of the masked model.
    every: sparse steps for each dense gradient: infinite for fixed masks and
      random growth, the interval for RigL, 0 for straight-through rules.

  Returns:
    FLOPs a step: `3 sparse` for an infinite `every`, and
    `(3 sparse every + 2 sparse + dense) / (every + 1)` otherwise.

  Raises:
    ValueError: `every` is negative.

  Source: [rigl] Evci et al., Rigging the Lottery, appendix on FLOPs.

  >>> training_flops(100, 10), training_flops(100, 10, every=0)
  (30, 120.0)
  """
  if every < 0:
    raise ValueError(f"every must not be negative, got {every}")
  if math.isinf(every):
    return 3 * sparse
  return (3 * sparse * every + 2 * sparse + dense) / (every + 1)
