"""Operations of a masked model, counted: a zero weight costs nothing.

A multiplication and an addition are two operations. Biases, norms and
softmaxes are left out.
"""

from collections.abc import Mapping, Sequence

import jax
import ml_collections
import numpy as np

from experiments import experiment
from sparsejax import costs


def weights(parts: experiment.Experiment, state) -> tuple[int, int]:
  """How many weights inputs are multiplied with, and how many are kept."""
  masks = jax.device_get(parts.masks(*state))
  leaves, _ = jax.tree_util.tree_flatten_with_path(masks)
  matrices = [
    mask
    for path, mask in leaves
    # Rows of an embedding are looked up.
    if mask.ndim > 1 and "embed" not in jax.tree_util.keystr(path)
  ]
  size = sum(mask.size for mask in matrices)
  return size, sum(int(mask.sum()) for mask in matrices)


def forward(parts: experiment.Experiment, state) -> float:
  """Operations of one example's forward pass."""
  _, kept = weights(parts, state)
  tokens = parts.task.tokens
  return 2.0 * kept * tokens + parts.other_flops


def training(
  config: ml_collections.ConfigDict,
  parts: experiment.Experiment,
  state,
  records: Sequence[Mapping[str, float]],
) -> float:
  """Operations of a whole run, without its evaluations.

  Args:
    config: of the run.
    parts: what was made of it.
    state: its (params, opt_state).
    records: its metrics, with "step", and the "density" at some of them.
  """
  known = [record for record in records if "density" in record]
  steps = [record["step"] for record in known]
  density = [record["density"] for record in known]
  # What a record tells held since the one before it: exactly so where masks
  # change no more often than there are records.
  mean = np.average(density[1:], weights=np.diff(steps))
  size, _ = weights(parts, state)
  step = _step(config, mean) * 2 * size * parts.task.tokens
  step += 3 * parts.other_flops
  return float(step * config.batch_size * config.steps)


def _step(config: ml_collections.ConfigDict, density: float) -> float:
  """What a step costs, where the dense forward pass costs one."""
  method = config.method
  sparse = costs.training_flops(1, density)
  if method.name in ("dst_ee", "rigl", "srigl"):  # these grow by gradients
    growing = min(1, method.until / config.steps)
    grows = costs.training_flops(1, density, every=method.every - 1)
    return growing * grows + (1 - growing) * sparse
  if method.name == "top_kast":  # gradients of a superset
    return costs.training_flops(1 - method.backward_sparsity, density, every=0)
  if method.name == "mask_decay":  # computes with all weights, then with few
    fading = min(1, method.until / config.steps)
    return fading * 3 + (1 - fading) * sparse
  if method.name in ("sr_ste", "structure_decay"):  # gradients of all weights
    return costs.training_flops(1, density, every=0)
  return sparse
