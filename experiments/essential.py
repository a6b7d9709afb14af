"""Essential sparsity: how far a pretrained encoder can be pruned for nothing.

  python -m experiments.essential --workdir=runs/essential

The smallest weights of all blocks together are removed at once, and nothing is
trained (the paper fine-tunes the encoders that it prunes; not its Vicuna). The
controls are the same magnitudes under n:8 masks of each layer, and random masks
that leave as many weights in each layer as the magnitudes do. Figures are those
of experiments.prune, and two places of each curve:

- essential: the largest sparsity up to which less than `--loss` of the dense
  model's figure is lost;
- steepest: the middle of the two sparsities between which it falls fastest.

Source: [essential-sparsity] Jaiswal et al., The Emergence of Essential Sparsity
in Large Pre-trained Models: The Weights that Matter.
"""

from collections.abc import Sequence
import itertools
import json
import pathlib
from typing import Any

from absl import app
from absl import flags
from flax import nnx
import jax
import numpy as np
import tqdm

from experiments import files
from experiments import prune
from experiments.procedures import under_masks
from sparsejax import paths
from sparsejax import select
from sparsejax import weights

FIGURES = ("retrieval", "fidelity")
GROUP = 8  # weights of which n are kept
KINDS = ("magnitude", f"n:{GROUP}", "random")


def where(path: str, leaf) -> bool:
  """The weights of linear layers in blocks: no embeddings, biases or norms."""
  return path.startswith("blocks/") and leaf.ndim == 2


def essential(
  sparsities: Sequence[float], values: Sequence[float], loss: float
) -> float:
  """The largest sparsity up to which less than this share of it is lost.

  Args:
    sparsities: rising, from 0.
    values: of which more is better; the first is the dense model's.
    loss: the share of it that may not be lost.

  >>> essential([0, 0.2, 0.4, 0.6], [0.8, 0.8, 0.7, 0.8], 0.01)
  0.2
  """
  found = sparsities[0]
  for sparsity, value in zip(sparsities, values, strict=True):
    if value <= (1 - loss) * values[0]:
      break
    found = sparsity
  return found


def steepest(sparsities: Sequence[float], values: Sequence[float]) -> float:
  """The middle of the two sparsities between which values fall fastest.

  >>> steepest([0, 0.5, 0.75, 1], [1, 0.75, 0.25, 0])
  0.625
  """
  slopes = np.diff(values) / np.diff(sparsities)
  at = int(slopes.argmin())
  return (sparsities[at] + sparsities[at + 1]) / 2


def masks_of(
  params, kind: str, sparsity: float, seed: int = 0
) -> dict[str, Any]:
  """Masks of a kind at a sparsity, which n:8 takes in eighths."""
  dense = under_masks.dense_masks(params)
  if kind == KINDS[1]:
    structure = select.NM(round((1 - sparsity) * GROUP), GROUP)
    leaves, rebuild = paths.named(params)
    found = dict(paths.named(dense)[0])
    for name, leaf in leaves.items():
      if where(name, leaf):
        found[name] = weights.magnitude_pruning(leaf, None, structure).mask
    return rebuild(found)
  masks = under_masks.prune(
    params, dense, sparsity, scope="global", where=where
  )
  if kind == "random":
    return under_masks.shuffled(jax.random.key(seed), masks, where)
  return masks


def runs(sparsities: Sequence[float], seeds: int) -> list[tuple]:
  """(kind, sparsity, seed) of all rows; only chance needs more than a seed."""
  eighths = [1 - n / GROUP for n in range(GROUP - 1, 0, -1)]
  return [
    *(("magnitude", sparsity, 0) for sparsity in sparsities),
    *((KINDS[1], sparsity, 0) for sparsity in eighths),
    *itertools.product(("random",), sparsities, range(seeds)),
  ]


def run(measured: prune.Measured, wanted: Sequence[tuple]) -> dict[str, Any]:
  """All rows, with a progress bar."""
  rows = []
  params = nnx.to_pure_dict(nnx.state(measured.model, nnx.Param))
  with tqdm.tqdm(wanted, unit="model") as bar:
    for kind, sparsity, seed in bar:
      bar.set_description(f"{kind} {sparsity:.1%}")
      masks = masks_of(params, kind, sparsity, seed)
      model, state = (
        nnx.clone(measured.model),
        under_masks.masked(params, masks),
      )
      pure = nnx.state(model, nnx.Param)
      nnx.replace_by_pure_dict(pure, state)
      nnx.update(model, pure)
      about = {"kind": kind, "sparsity": sparsity, "seed": seed}
      about["density"] = under_masks.density(masks, where)
      rows.append(about | measured.figures(model))
  # Nothing is calibrated: of the split there is what evaluates.
  about = {n: x for n, x in measured.about.items() if n != "calibration"}
  about["split"] = about["split"].partition(",")[0]
  return {"about": about, "dense": measured.dense, "rows": rows}


def curve(found: dict[str, Any], kind: str, figure: str) -> tuple[list, list]:
  """Sparsities, from 0, and the mean figure at each of them."""
  values = {0.0: [found["dense"][figure]]}
  for row in found["rows"]:
    if row["kind"] == kind and row["sparsity"] > 0:
      values.setdefault(row["sparsity"], []).append(row[figure])
  at = sorted(values)
  return at, [float(np.mean(values[sparsity])) for sparsity in at]


def drops(found: dict[str, Any], loss: float) -> list[dict[str, Any]]:
  """Where each curve falls."""
  return [
    {
      "kind": kind,
      "figure": figure,
      "essential": essential(*curve(found, kind, figure), loss),
      "steepest": steepest(*curve(found, kind, figure)),
    }
    for kind in KINDS
    for figure in FIGURES
  ]


def table(found: dict[str, Any]) -> str:
  """The figures by sparsity, and where they fall."""
  lines = [
    "; ".join(f"{name}: {value}" for name, value in found["about"].items()),
    f"{'kind':10s} sparsity " + "".join(f"{f:>11s}" for f in FIGURES),
  ]
  for kind in KINDS:
    columns = [curve(found, kind, figure) for figure in FIGURES]
    for i, sparsity in enumerate(columns[0][0]):
      cells = "".join(f"{values[i]:11.4f}" for _, values in columns)
      lines.append(f"{kind:10s} {sparsity:8.1%} " + cells)
  lines.append(f"\n{'kind':10s} {'figure':10s} essential  steepest")
  for row in found["drops"]:
    lines.append(
      f"{row['kind']:10s} {row['figure']:10s} {row['essential']:9.1%} "
      f"{row['steepest']:9.1%}"
    )
  return "\n".join(lines)


def draw(found: dict[str, Any], path: pathlib.Path) -> None:
  """Figures over sparsity; a dashed line where less than the loss is lost."""
  from matplotlib import figure as figures

  page = figures.Figure(figsize=(10, 4), layout="constrained")
  for ax, name in zip(page.subplots(1, len(FIGURES)), FIGURES, strict=True):
    for i, kind in enumerate(KINDS):
      ax.plot(*curve(found, kind, name), f"C{i}o-", markersize=3, label=kind)
    for i, kind in enumerate(KINDS):
      (row,) = (
        r for r in found["drops"] if (r["kind"], r["figure"]) == (kind, name)
      )
      ax.axvline(row["essential"], color=f"C{i}", linestyle="--", alpha=0.5)
    ax.set(xlabel="sparsity", ylabel=name)
    ax.legend()
  page.savefig(path, dpi=150)


def given_sparsities(texts: Sequence[str]) -> list[float]:
  """What a flag has, rising.

  Raises:
    ValueError: something is no share between 0 and 1, or there are none.
  """
  try:
    found = sorted({float(text) for text in texts})
  except ValueError:
    found = []
  if not found or not all(0 < sparsity < 1 for sparsity in found):
    raise ValueError(
      "--sparsity takes numbers between 0 and 1, without them; got "
      f"{','.join(texts)}"
    )
  return found


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  given = flags.FLAGS
  sparsities = given_sparsities(given.sparsity)
  measured = prune.Measured(
    given.model, seeds=1, calibration=1, evaluation=given.evaluation
  )
  found = run(measured, runs(sparsities, given.seeds))
  found |= {"loss": given.loss, "drops": drops(found, given.loss)}
  print(table(found))
  workdir = pathlib.Path(given.workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  files.write(workdir / "essential.json", json.dumps(found, indent=2) + "\n")
  draw(found, workdir / "essential.png")
  print(f"The rows are in {workdir / 'essential.json'}, a picture beside them.")


if __name__ == "__main__":
  grid = [f"{i / 20:.2f}" for i in range(1, 20)]
  flags.DEFINE_string("model", "minilm", "minilm, a directory, or a hub name.")
  flags.DEFINE_list("sparsity", grid, "Shares removed.")
  flags.DEFINE_integer("seeds", 2, "Random masks.", lower_bound=1)
  flags.DEFINE_integer("evaluation", 512, "Pairs.", lower_bound=2)
  flags.DEFINE_float(
    "loss", 0.01, "Of a figure, lost.", lower_bound=0, upper_bound=1
  )
  flags.DEFINE_string("workdir", "runs/essential", "Where figures are kept.")
  app.run(main)
