"""Prunes a pretrained encoder in one shot, and writes it to files.

  python -m experiments.export --method=wanda --sparsity=0.6 --out=runs/export

The directory then has

- sparse.safetensors: what is left, with its masks, for `weights.load`;
- dense/: the same with its zeros, for transformers and `pretrained.load`.

What that saves is printed, and whether anything is faster.
"""

import pathlib
from typing import Any

from absl import app
from absl import flags
from flax import nnx
import tqdm

from experiments import files
from experiments import prune
from experiments.models import bert
from experiments.models import pretrained
from experiments.tasks import docstrings
from sparsejax import select
from sparsejax import weights
from sparsejax.weights import storage

FORMATS = {
  "auto": "auto",
  "dense": "dense",
  "bitmask": "bitmask",
  "constant_fan_in": select.ConstantFanIn(),
} | {name: x for name, x in prune.STRUCTURES.items() if x is not None}


def pruned(
  source: str,
  method: str,
  point: prune.Point,
  *,
  calibration: int,
  length: int,
  seed: int,
) -> tuple[bert.Bert, dict[str, Any], float, dict[str, Any]]:
  """A model, its masks, the mean error of its layers, and what that is of.

  Args:
    source: as `pretrained.load` takes it.
    method: of prune.METHODS.
    point: a structure and a sparsity.
    calibration: how many docstrings.
    length: of a text in tokens, at most.
    seed: of the choice of docstrings.

  Raises:
    ValueError: the model is no encoder, or the method cannot prune so.
  """
  prune.check([method], [point])
  model, tokenizer, _ = pretrained.load(source)
  if not isinstance(model, bert.Bert):
    raise ValueError(f"model must be an encoder (BERT), got {source!r}")
  pairs = docstrings.load()
  # As many are left out as the pruning experiment evaluates.
  held = min(512, len(pairs.docstrings) - calibration)
  chosen, _ = docstrings.split(
    pairs, calibration=calibration, evaluation=held, seed=seed
  )
  texts = [pairs.docstrings[i] for i in chosen]
  batches = prune.first_inputs(
    model, prune.batches_of(tokenizer, texts, length)
  )
  methods = prune.methods_of(
    method, point, model.blocks, batches, prune.valid_rows
  )
  with tqdm.tqdm(total=len(model.blocks), desc=method, unit="block") as bar:
    masks, error = prune.prune_blocks(
      model.blocks, batches, methods, prune.valid_rows, bar
    )
  about = {
    "model": source,
    "text": pairs.source,
    "split": f"{calibration} docstrings calibrate, and are what error is of",
    "context": f"{length} tokens at most",
    "calibration": {seed: prune.digest(text.encode() for text in texts)},
  }
  return model, {"blocks": dict(enumerate(masks))}, error, about


def write(
  out: pathlib.Path,
  model: bert.Bert,
  masks: dict[str, Any],
  source: str,
  format: storage.Format,
) -> weights.StorageReport:
  """Writes both forms into a directory, which is made all at once."""
  params = nnx.state(model, nnx.Param)
  with files.new_directory(out.absolute()) as partial:
    # First, since masks may not be of the format.
    report = weights.save(partial / "sparse.safetensors", params, masks, format)
    pretrained.save(partial / "dense", model, source)
  return report


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  given, out = flags.FLAGS, pathlib.Path(flags.FLAGS.out)
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise app.UsageError(f"--out={out} exists; give one that does not")
  (point,) = prune.points([given.structure], [given.sparsity])
  model, masks, error, about = pruned(
    given.model,
    given.method,
    point,
    calibration=given.calibration,
    length=given.length,
    seed=given.seed,
  )
  report = write(out, model, masks, given.model, FORMATS[given.format])
  print(report)
  print(prune.heading({"about": about}))
  print(f"mean reconstruction error of the layers: {error:.3f}")
  for file in ("sparse.safetensors", "dense/model.safetensors"):
    print(f"{(out / file).stat().st_size:>13,} bytes: {out / file}")


if __name__ == "__main__":
  flags.DEFINE_string("model", "minilm", "minilm, a directory, or a hub name.")
  flags.DEFINE_enum("method", "wanda", list(prune.METHODS), "The method.")
  flags.DEFINE_float("sparsity", 0.6, "Share pruned.")
  flags.DEFINE_enum(
    "structure", "unstructured", list(prune.STRUCTURES), "What may be chosen."
  )
  flags.DEFINE_enum("format", "auto", list(FORMATS), "Of sparse.safetensors.")
  flags.DEFINE_integer("calibration", 128, "Texts.", lower_bound=1)
  flags.DEFINE_integer("length", 64, "Tokens of a text.", lower_bound=2)
  flags.DEFINE_integer("seed", 0, "Of the choice of texts.")
  flags.DEFINE_string("out", None, "The directory to make.", required=True)
  app.run(main)
