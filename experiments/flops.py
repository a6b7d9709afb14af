"""Operations of a masked model, counted: a zero weight costs nothing.

A multiplication and an addition are two operations. Biases, norms and
softmaxes are left out, and so are experts that a token does not go to.
"""

from collections.abc import Mapping, Sequence
import re

import jax
import ml_collections
import numpy as np

from experiments import experiment
from sparsejax import costs


def weights(
  parts: experiment.Experiment,
  state,
  edges: Mapping[str, float] | None = None,
) -> tuple[float, float]:
  """How many weights inputs are multiplied with, and how many are kept.

  Args:
    parts: of the experiment.
    state: its (params, opt_state).
    edges: None to count all experts, or what `active` returns, to count what
      a token meets.
  """
  masks = jax.device_get(parts.masks(*state))
  leaves, _ = jax.tree_util.tree_flatten_with_path(masks)
  size = kept = 0
  for path, mask in leaves:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    # Rows of an embedding are looked up; `other_flops` has what attention
    # methods have of their own.
    if mask.ndim < 2 or "embed" in name or "/attend/" in name:
      continue
    share = 1
    layer = re.match(r"blocks/(\d+)/mixture/experts/", name)
    if layer and edges is not None:
      share = edges[f"layer_{layer[1]}_active"] / len(mask)
    size += share * mask.size
    kept += share * int(mask.sum())
  return size, kept


def active(
  records: Sequence[Mapping[str, float]], prefix: str
) -> dict[str, float]:
  """The mean "layer_0_active", edges a token that were run, of each layer."""
  layers = re.compile(f"{prefix}(layer_\\d+_active)")
  values = {}
  for record in records:
    for name, value in record.items():
      if layer := layers.fullmatch(name):
        values.setdefault(layer[1], []).append(value)
  return {name: float(np.mean(found)) for name, found in values.items()}


def forward(
  parts: experiment.Experiment, state, edges: Mapping[str, float] | None = None
) -> float:
  """Operations of one example's forward pass; `edges` are as in `weights`."""
  _, kept = weights(parts, state, edges)
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
    records: its metrics, with "step", and the "density" at some of them; with
      mixtures of experts "train_layer_0_active", too. Where those have masks,
      their density is taken as that of all weights.
  """
  known = [record for record in records if "density" in record]
  steps = [record["step"] for record in known]
  density = [record["density"] for record in known]
  # What a record tells held since the one before it: exactly so where masks
  # change no more often than there are records.
  mean = np.average(density[1:], weights=np.diff(steps))
  # What of the experts was run, which are all of the weights elsewhere.
  size, _ = weights(parts, state, active(records, "train_"))
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
  # These compute with all weights, then with few.
  if method.name in ("iss_p", "mask_decay"):
    fading = min(1, method.until / config.steps)
    return fading * 3 + (1 - fading) * sparse
  if method.name in ("sr_ste", "structure_decay"):  # gradients of all weights
    return costs.training_flops(1, density, every=0)
  return sparse
