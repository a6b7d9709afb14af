"""What a finished run reached and what it cost: summary.json."""

import json
import pathlib
from typing import Any

import jax
import ml_collections

from experiments import experiment
from experiments import files
from experiments import flops
from experiments import workdir as workdirs


def write(
  workdir: pathlib.Path,
  config: ml_collections.ConfigDict,
  parts: experiment.Experiment,
  state: tuple,
  step_seconds: float | None,
) -> None:
  """Writes summary.json, which marks the run as finished.

  Args:
    workdir: of the run; its metrics are read.
    config: of the run.
    parts: what was made of it.
    state: its (params, opt_state).
    step_seconds: what a step took, where it was measured.

  Raises:
    RuntimeError: weights that a mask had removed were found nonzero.
  """
  summary = parts.summary(*state)
  if summary and summary.violations:
    raise RuntimeError(
      f"{summary.violations} weights that a mask had removed are not "
      f"zero, so the run in {workdir} is not what config.method says.\n"
      f"{summary}"
    )
  params, opt_state = state
  records = workdirs.read_metrics(workdir)
  parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
  edges = flops.active(records[-1:], "validation_")
  values = records[-1] | {
    "parameters": parameters,
    "violations": summary.violations if summary else 0,
    "inference_flops": flops.forward(parts, state, edges),
    "training_flops": flops.training(config, parts, state, records),
    "step_seconds": step_seconds,
    "optimizer_state_bytes": sum(
      leaf.nbytes for leaf in jax.tree.leaves(opt_state)
    ),
    "layers": str(summary or ""),
  }
  if edges:
    size, _ = flops.weights(parts, state)
    met, _ = flops.weights(parts, state, edges)
    values["active_parameters"] = parameters - size + met
  text = json.dumps(values, indent=2)
  files.write(workdir / "summary.json", text)


def read(workdir: str | pathlib.Path) -> dict[str, Any] | None:
  """The summary of a finished run, or None."""
  path = pathlib.Path(workdir) / "summary.json"
  if not path.exists():
    return None
  try:
    return json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(
      f"{path} is damaged: {error}; where it is deleted, the next call of "
      "experiments.train writes it again."
    ) from error
