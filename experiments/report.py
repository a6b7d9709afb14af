"""Runs side by side: a table of their summaries, a picture of their curves."""

from collections.abc import Callable, Mapping, Sequence
import pathlib
import re
from typing import Any

import matplotlib
import numpy as np

from experiments import intervals
from sparsejax import plots
from sparsejax import routing

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib import ticker

NOTE = """\
FLOPs are counted, not measured: a zero weight costs nothing in them. This
hardware computed with dense matrices whatever the masks, as it does unless
kernels skip the zeros, so no step was faster for them."""
MIXTURES = """\
Of a mixture of experts, those that a token goes to count, and no others."""

Summaries = Mapping[str, Sequence[Mapping[str, Any]]]
Records = Sequence[Mapping[str, float]]


def _units(value: float) -> str:
  for prefix in ("", " k", " M", " G", " T"):
    if value < 1_000:
      return f"{value:.4g}{prefix}"
    value /= 1_000
  return f"{value:.4g} P"


ROWS = {
  "validation_loss": ("validation loss (nats)", "{:.4f}".format),
  "validation_bits_per_byte": ("validation bits/byte", "{:.4f}".format),
  "validation_accuracy": ("validation accuracy", "{:.4f}".format),
  "density": ("density (no embeddings, biases)", "{:.4f}".format),
  "parameters": ("parameters", _units),
  "active_parameters": ("parameters that a token meets", _units),
  "validation_active": ("experts a token", "{:.2f}".format),
  "validation_dropped": ("dropped edges", "{:.4f}".format),
  "validation_max_violation": ("largest load / mean - 1", "{:.3f}".format),
  "training_flops": ("training FLOPs", _units),
  "inference_flops": ("inference FLOPs an example", _units),
  "step_seconds": ("step time (ms)", lambda s: f"{1e3 * s:.1f}"),
  "optimizer_state_bytes": ("optimizer state (bytes)", _units),
}


def _cell(values: Sequence[float | None], shown: Callable) -> str:
  if None in values:
    return "-"
  if len(values) == 1 or len(set(values)) == 1:
    return shown(values[0])
  interval = intervals.of_mean(values)
  return f"{shown(interval.mean)} ± {shown(interval.high - interval.mean)}"


def table(runs: Summaries) -> str:
  """A column for each name, a row for each number that they have.

  Args:
    runs: the summaries of one run or of several seeds by name; several are
      shown as their mean and half of its 95% interval.
  """
  rows = [["", *runs]]
  for name, (title, shown) in ROWS.items():
    columns = [[s.get(name) for s in summaries] for summaries in runs.values()]
    if any(value is not None for column in columns for value in column):
      rows.append([title, *(_cell(column, shown) for column in columns)])
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = []
  for title, *cells in rows:
    padded = map(str.rjust, cells, widths[1:])
    lines.append("  ".join([title.ljust(widths[0]), *padded]))
  rule = "-" * len(lines[0])
  mixtures = any("active_parameters" in s for of in runs.values() for s in of)
  notes = [NOTE, MIXTURES] if mixtures else [NOTE]
  return "\n".join([lines[0], rule, *lines[1:], "", *notes])


def _points(records: Records, metric: str) -> tuple[list, list]:
  points = [(r["step"], r[metric]) for r in records if metric in r]
  if not points:
    raise ValueError(f"no record has the metric {metric!r}.")
  return tuple(map(list, zip(*points, strict=True)))


def curves(
  path: str | pathlib.Path,
  runs: Mapping[str, Sequence[Records]],
  metric: str,
  *,
  step_flops: Mapping[str, float],
) -> None:
  """Draws a metric over steps, and over counted training FLOPs.

  Args:
    path: of the PNG.
    runs: the records of one run or of several seeds by name; of several the
      mean and its 95% interval are drawn.
    metric: what is drawn.
    step_flops: of a mean step of each name.
  """
  figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
  for name, seeds in runs.items():
    steps, _ = _points(seeds[0], metric)
    values = np.array([_points(records, metric)[1] for records in seeds])
    for panel, unit in zip(panels, (1, step_flops[name]), strict=True):
      x = np.array(steps) * unit
      (line,) = panel.plot(x, values.mean(0), label=name)
      if len(seeds) > 1:
        found = [intervals.of_mean(column) for column in values.T]
        band = [i.low for i in found], [i.high for i in found]
        panel.fill_between(x, *band, color=line.get_color(), alpha=0.2)
  panels[0].set(xlabel="step", ylabel=metric.replace("_", " "))
  panels[1].set(xlabel="training FLOPs, if zeros cost nothing")
  for panel in panels:
    panel.grid(alpha=0.3)
    panel.legend()
  figure.tight_layout()
  figure.savefig(path, dpi=120)
  plt.close(figure)


def _routed(record: Mapping[str, float], layer: int) -> dict[str, Any]:
  """What one layer did, as `plots.routing_trace` takes it."""
  prefix = f"train_layer_{layer}_"
  names = [n.removeprefix(prefix) for n in record if n.startswith(prefix)]
  experts = sum(re.fullmatch(r"load_\d+", name) is not None for name in names)
  load = [record[f"{prefix}load_{expert}"] for expert in range(experts)]
  kept = {"max_violation", "entropy", "dropped"} & set(names)
  return {"load": load} | {name: record[prefix + name] for name in kept}


def loads(path: str | pathlib.Path, records: Records) -> None:
  """Draws what mixtures of experts did over a run, where it has any.

  Args:
    path: of the PNG, with a row for each layer.
    records: of a run.
  """
  known = [r for r in records if "train_layer_0_max_violation" in r]
  if not known:
    return
  steps = [record["step"] for record in known]
  layers = sum(
    re.fullmatch(r"train_layer_\d+_max_violation", name) is not None
    for name in known[0]
  )
  figure, rows = plt.subplots(
    layers, 3, figsize=(11, 2.8 * layers), layout="constrained", squeeze=False
  )
  # The axes count records.
  step = lambda i, _: f"{steps[int(i)]:,}" if 0 <= i < len(steps) else ""
  for layer, axes in enumerate(rows):
    trace = routing.stack_traces(_routed(record, layer) for record in known)
    plots.routing_trace(trace, axes=axes)
    axes[0].set_title(f"layer {layer}", loc="left")
    for ax in axes:
      ax.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
      ax.xaxis.set_major_formatter(step)
  figure.savefig(path, dpi=120)
  plt.close(figure)


def compare(
  workdir: pathlib.Path,
  runs: Mapping[str, Sequence[tuple[Mapping[str, Any], Records]]],
  metric: str,
) -> str:
  """Writes curves.png and table.txt into a directory; returns the table.

  Args:
    workdir: where they are written.
    runs: (summary, records) of each seed, by name.
    metric: what the curves are of.
  """
  summaries = {n: [s for s, _ in seeds] for n, seeds in runs.items()}
  records = {n: [r for _, r in seeds] for n, seeds in runs.items()}
  step_flops = {
    n: np.mean([s["training_flops"] / s["step"] for s in seeds])
    for n, seeds in summaries.items()
  }
  curves(workdir / "curves.png", records, metric, step_flops=step_flops)
  text = table(summaries)
  (workdir / "table.txt").write_text(text + "\n")
  return text
