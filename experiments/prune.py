"""Prunes a pretrained encoder in one shot, and measures what is lost.

  python -m experiments.prune --method=wanda --sparsity=0.6 --workdir=runs/prune

Each method is run at each sparsity of each structure with several calibration
sets. A block of the model is calibrated on what the blocks before it give once
they are pruned. Of SliceGPT the sparsity is the share of directions that are
cut. Four figures:

- error: the mean reconstruction error of the layers;
- retrieval: how often a docstring of Python's standard library is nearest to
  its own signature;
- fidelity: the mean cosine between embeddings of the pruned and dense model;
- kept: parameters that are not 0, embeddings too, over those of the dense one.

No text calibrates and evaluates.
"""

from collections.abc import Callable, Iterable, Sequence
import dataclasses
import functools
import hashlib
import json
import pathlib
from typing import Any

from absl import app
from absl import flags
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from experiments import files
from experiments import intervals
from experiments.models import bert
from experiments.models import pretrained
from experiments.models import sliced
from experiments.tasks import docstrings
from sparsejax import capture
from sparsejax import select
from sparsejax import weights

ROWS = 32  # texts of a batch
# Lengths are rounded up to whole steps: fewer shapes to compile.
STEP = 8
STRUCTURES = {
  "unstructured": None,  # the method's own: of a layer, an output or a block
  "2:4": select.NM(2, 4),
  "4:8": select.NM(4, 8),
  "block16": select.Block((16, 16)),
  "block32": select.Block((32, 32)),
}

Point = tuple[str, float]  # a structure and a sparsity


def magnitude(kernel, moments, density, structure):
  del moments
  return weights.magnitude_pruning(kernel, density, structure)


def dsnot(kernel, moments, density, structure):
  start = weights.wanda(kernel, moments, density, structure)
  return weights.dsnot(kernel, moments, start)


METHODS = {
  "magnitude": magnitude,
  "wanda": weights.wanda,
  "dsnot": dsnot,
  "sparsegpt": weights.sparsegpt,
  "owl": weights.wanda,  # at densities of its own, a block each
}
DEFAULT = ["magnitude", "wanda", "dsnot", "sparsegpt"]
SLICEGPT = "slicegpt"  # of the whole model: shapes shrink, there are no masks


def points(structures: Iterable[str], sparsities: Sequence[float]) -> list:
  """Each structure at those of the sparsities that it can have.

  Raises:
    ValueError: a structure can have none, or a sparsity is no share.

  >>> points(["unstructured", "2:4"], [0.5, 0.6])
  [('unstructured', 0.5), ('unstructured', 0.6), ('2:4', 0.5)]
  """
  found = []
  for sparsity in sparsities:
    if not 0 <= sparsity < 1:
      raise ValueError(f"sparsity must be in [0, 1), got {sparsity}")
  for name in dict.fromkeys(structures):
    structure, fit = STRUCTURES[name], list(dict.fromkeys(sparsities))
    if isinstance(structure, select.NM):
      own = 1 - structure.n / structure.m
      fit = [s for s in fit if s == own]
      if not fit:
        raise ValueError(
          f"sparsity must have {own} for the structure {name}, got "
          f"{', '.join(map(str, sparsities))}"
        )
    found += [(name, sparsity) for sparsity in fit]
  return found


def check(names: Iterable[str], points: Iterable[Point]) -> None:
  """Raises ValueError where a method cannot prune by a structure."""
  wrong = {
    "dsnot": (select.Block, "swaps single weights"),
    "owl": (select.NM, "gives blocks of the model densities of their own"),
    SLICEGPT: (select.NM | select.Block, "cuts directions of signals"),
  }
  for name in set(names) & set(wrong):
    kind, reason = wrong[name]
    for structure, _ in points:
      if isinstance(STRUCTURES[structure], kind):
        raise ValueError(
          f"structure must not be {structure} for the method {name}, which "
          f"{reason}"
        )


def digest(parts: Iterable[bytes]) -> str:
  """What tells one set of texts from another."""
  found = hashlib.sha256()
  for part in parts:
    found.update(hashlib.sha256(part).digest())
  return found.hexdigest()[:12]


# Functions of the module, so that all runs share what is compiled of them.


def through(block, batch):
  """The next block's batch: what this one gives for (x, *others)."""
  return block(*batch), *batch[1:]


_error = jax.jit(weights.reconstruction_error)


def prune_blocks(
  blocks: Sequence[nnx.Module],
  batches: list[tuple],
  methods: Sequence[Callable],
  valid: Callable | None = None,
  bar: tqdm.tqdm | None = None,
) -> tuple[list[Any], float]:
  """Prunes blocks in place, each on what those before it then give.

  Args:
    blocks: modules of one kind, which take (x, *others) and return x.
    batches: what the first of them takes, batch by batch.
    methods: as `weights.prune` takes it, one for each block.
    valid: as `capture.moments` takes it.
    bar: is moved by one for each block.

  Returns:
    The masks of each block's parameters, and the mean reconstruction error of
    the layers.

  Raises:
    ValueError: naming the layer, where a method cannot prune it.
  """
  masks, errors = [], []

  def update(number, params, moments):
    try:
      after, mask = weights.prune(params, moments, methods[number])
    except ValueError as error:  # names a layer of the block
      raise ValueError(f"blocks/{number}/{error}") from error
    old, new = kernels(params), kernels(after)
    errors.extend(_error(old[n], new[n], moments[n]) for n in moments)
    masks.append(nnx.to_pure_dict(mask))
    if bar is not None:
      bar.update()
    return after, None

  pruned, _ = capture.in_order(through, blocks, batches, update, valid=valid)
  for block, found in zip(blocks, pruned, strict=True):
    nnx.update(block, nnx.state(found, nnx.Param))
  return masks, float(np.mean(errors))


def kernels(state) -> dict[str, jax.Array]:
  """The arrays of a state by name."""
  return {
    "/".join(map(str, path)): x[...] for path, x in nnx.to_flat_state(state)
  }


def methods_of(
  name: str,
  point: Point,
  blocks: Sequence[nnx.Module],
  batches: list[tuple],
  valid: Callable | None = None,
) -> list[Callable]:
  """What each block is pruned with; OWL looks at the dense model first."""
  structure, sparsity = point
  chosen = STRUCTURES[structure]
  density = None if isinstance(chosen, select.NM) else 1 - sparsity
  densities = [density] * len(blocks)
  if name == "owl":
    densities = owl_densities(blocks, batches, density, valid)
  return [
    functools.partial(METHODS[name], density=density, structure=chosen)
    for density in densities
  ]


def owl_densities(blocks, batches, density, valid=None) -> list[float]:
  """Densities of blocks by the Wanda scores of all their weights."""

  def scores(number, params, moments):
    del number
    found = [
      weights.wanda_scores(kernel, moments[name]).ravel()
      for name, kernel in kernels(params).items()
      if name in moments
    ]
    return params, jnp.concatenate(found)

  _, found = capture.in_order(
    through, blocks, batches, scores, valid=valid, second=False
  )
  by_block = {str(number): x for number, x in enumerate(found)}
  return list(weights.owl(by_block, density).values())


@dataclasses.dataclass(frozen=True)
class Texts:
  """Tokens and which of them are valid, in batches of texts of like length.

  Attributes:
    batches: (tokens, valid), int32 and bool [rows, length].
    order: which text each row is, over all batches; rows beyond are padding.
  """

  batches: list[tuple[np.ndarray, np.ndarray]]
  order: np.ndarray


def batches_of(tokenizer, texts: Sequence[str], length: int) -> Texts:
  """Texts, cut to `length` tokens."""
  tokenizer.enable_truncation(length)
  tokens, valid = pretrained.encode(tokenizer, texts)
  order = np.argsort(valid.sum(1), kind="stable")
  batches = []
  for begin in range(0, len(order), ROWS):
    rows = order[begin : begin + ROWS]
    longest = valid[rows].sum(1).max()
    # Not beyond `length`: the model may have learned no more positions.
    wide = min(-(-longest // STEP) * STEP, length)
    pad = [(0, ROWS - len(rows)), (0, max(0, wide - tokens.shape[1]))]
    batches.append(tuple(np.pad(x[rows, :wide], pad) for x in (tokens, valid)))
  return Texts(batches, order)


@nnx.jit
def _embed(model, tokens, valid):
  return bert.mean_embedding(model(tokens, valid), valid)


def embed(model: bert.Bert, texts: Texts) -> np.ndarray:
  """Embeddings of all texts [texts, width]."""
  rows = np.concatenate([_embed(model, *batch) for batch in texts.batches])
  found = np.empty((len(texts.order), rows.shape[1]), rows.dtype)
  found[texts.order] = rows[: len(texts.order)]
  return found


@nnx.jit
def _run(model, tokens, valid):
  return model(tokens, valid)


def first_inputs(model: bert.Bert, texts: Texts) -> list[tuple]:
  """What the first block reads: hidden states, and the mask of attention."""
  embeds = nnx.clone(model)
  embeds.blocks = nnx.List([])
  return [
    (_run(embeds, tokens, valid), valid[:, None, None, :])
    for tokens, valid in texts.batches
  ]


def valid_rows(batch):
  """Which of the hidden states are no padding."""
  return batch[1][:, 0, 0, :]


def retrieval(signatures: np.ndarray, texts: np.ndarray) -> float:
  """The share of docstrings whose nearest signature is their own."""
  nearest = (texts @ signatures.T).argmax(1)
  return float((nearest == np.arange(len(texts))).mean())


def parameters(model: nnx.Module) -> int:
  """How many are not 0."""
  leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
  return sum(int(np.count_nonzero(x)) for x in leaves)


class Measured:
  """A dense encoder, texts to calibrate and to evaluate it, and their names.

  Attributes:
    about: what the figures are of.
    dense: figures of the dense model.
  """

  def __init__(
    self,
    source: str,
    *,
    seeds: int,
    calibration: int = 128,
    evaluation: int = 512,
    length: int = 64,
  ):
    """Reads the model and the texts.

    Args:
      source: as `pretrained.load` takes it.
      seeds: how many calibration sets.
      calibration: docstrings in each.
      evaluation: pairs, the same for all seeds.
      length: of a text in tokens, at most.

    Raises:
      ValueError: the model is no encoder, or there are not enough pairs.
    """
    self.model, tokenizer, _ = pretrained.load(source)
    if not isinstance(self.model, bert.Bert):
      raise ValueError(f"model must be an encoder (BERT), got {source!r}")
    pairs = docstrings.load()
    pick = lambda texts, chosen: [texts[i] for i in chosen]
    self.sets, self._texts, hashes = [], [], {}
    for seed in range(seeds):
      chosen, held = docstrings.split(
        pairs, calibration=calibration, evaluation=evaluation, seed=seed
      )
      texts = pick(pairs.docstrings, chosen)
      hashes[seed] = digest(text.encode() for text in texts)
      self._texts.append(batches_of(tokenizer, texts, length))
      self.sets.append(first_inputs(self.model, self._texts[-1]))
    sides = [pick(x, held) for x in (pairs.signatures, pairs.docstrings)]
    self._sides = [batches_of(tokenizer, texts, length) for texts in sides]
    self._dense = self._embeddings(self.model)
    self.dense = {"retrieval": retrieval(*self._dense)}
    self.dense |= {"fidelity": 1.0, "kept": 1.0}
    self._found = {}
    of = digest(text.encode() for side in sides for text in side)
    self.about = {
      "model": source,
      "text": pairs.source,
      "split": f"{evaluation} pairs ({of}) evaluate all seeds, "
      f"{calibration} docstrings of others calibrate each",
      "context": f"{length} tokens at most",
      "calibration": hashes,
    }

  def _embeddings(self, model):
    return [embed(model, side) for side in self._sides]

  def row(self, name: str, point: Point, seed: int, bar=None) -> dict:
    """Figures of a method, pruned at a point with a calibration set."""
    model, errors = self._pruned(name, point, seed, bar)
    # Magnitudes see no text: the model is the same with all sets.
    at = (name, point, 0 if name == "magnitude" else seed)
    if at not in self._found:
      self._found[at] = self.figures(model)
    return {
      "method": name,
      "structure": point[0],
      "sparsity": point[1],
      "seed": seed,
      "calibration": self.about["calibration"][seed],
      **errors,
    } | self._found[at]

  def figures(self, model: nnx.Module) -> dict[str, float]:
    """What a model, like the dense one, is worth beside it."""
    signatures, texts = self._embeddings(model)
    return {
      "retrieval": retrieval(signatures, texts),
      "fidelity": float((texts * self._dense[1]).sum(1).mean()),
      "kept": parameters(model) / parameters(self.model),
    }

  def _pruned(self, name, point, seed, bar):
    """A model, and the error of its layers where they are as many as before."""
    if name == SLICEGPT:
      batches = self._texts[seed].batches
      model = sliced.slice_(self.model, batches, point[1]).model
      if bar is not None:
        bar.update(len(self.model.blocks))
      return model, {}
    model, batches = nnx.clone(self.model), self.sets[seed]
    methods = methods_of(name, point, model.blocks, batches, valid_rows)
    _, error = prune_blocks(model.blocks, batches, methods, valid_rows, bar)
    return model, {"error": error}


def run(measured, names: Sequence[str], points: Sequence[Point]) -> dict:
  """All rows of a table, with a progress bar.

  Args:
    measured: a `Measured`, or what has its attributes.
    names: of methods.
    points: where each is run.
  """
  check(names, points)
  runs = [
    (name, point, seed)
    for name in names
    for point in points
    for seed in range(len(measured.sets))
  ]
  rows, blocks = [], len(measured.model.blocks)
  with tqdm.tqdm(total=len(runs) * blocks, unit="block") as bar:
    for name, point, seed in runs:
      bar.set_description(f"{name} {point[0]} {point[1]:.0%} seed {seed}")
      rows.append(measured.row(name, point, seed, bar))
  return {"about": measured.about, "dense": measured.dense, "rows": rows}


def heading(found: dict[str, Any]) -> str:
  """What the figures are of: model, text, split, context, seeds and hashes."""
  about = dict(found["about"])
  hashes = " ".join(f"{s}:{h}" for s, h in about.pop("calibration").items())
  told = "; ".join(f"{name}: {value}" for name, value in about.items())
  return f"{told}\ncalibration, seed:hash: {hashes}"


def metrics(found: dict[str, Any]) -> list[str]:
  """The names of the figures; not every row has each of them."""
  return ["error", *found["dense"]]


def grouped(found: dict[str, Any]) -> dict[tuple, list[dict]]:
  """Rows by method and point."""
  groups = {}
  for row in found["rows"]:
    at = row["method"], row["structure"], row["sparsity"]
    groups.setdefault(at, []).append(row)
  return groups


def table(found: dict[str, Any]) -> str:
  """Means over calibration sets with 95% intervals."""
  names = metrics(found)
  lines = [
    heading(found),
    f"{'method':10s} {'structure':12s} sparsity "
    + " ".join(f"{name:>22s}" for name in names),
    f"{'dense':10s} {'-':12s} {'0%':>8s} "
    + " ".join(f"{found['dense'].get(name, 0):22.3f}" for name in names),
  ]
  for (method, structure, sparsity), rows in grouped(found).items():
    cells = [
      spread([row[name] for row in rows if name in row]) for name in names
    ]
    structure = "-" if method == SLICEGPT else structure
    lines.append(
      f"{method:10s} {structure:12s} {sparsity:8.0%} "
      + " ".join(f"{cell:>22s}" for cell in cells)
    )
  return "\n".join(lines)


def spread(values: list[float]) -> str:
  """A mean and its interval over calibration sets."""
  if len(values) < 2:
    return f"{values[0]:.3f}" if values else "-"
  found = intervals.of_mean(values)
  return f"{found.mean:.3f} [{found.low:.3f}, {found.high:.3f}]"


def draw(found: dict[str, Any], path: pathlib.Path) -> None:
  """The figures over sparsity: a method's color, a structure's marker."""
  from matplotlib import figure

  names = metrics(found)
  page = figure.Figure(figsize=(4.5 * len(names), 4), layout="constrained")
  curves = {}
  for (method, structure, sparsity), rows in grouped(found).items():
    curves.setdefault((method, structure), {})[sparsity] = rows
  methods = list(dict.fromkeys(method for method, _ in curves))
  markers = dict(zip(STRUCTURES, "osD^v", strict=True))
  panels = page.subplots(1, len(names))
  for ax, name in zip(panels, names):
    for (method, structure), curve in curves.items():
      values = {
        sparsity: [row[name] for row in curve[sparsity] if name in row]
        for sparsity in sorted(curve)
      }
      at = [sparsity for sparsity, found in values.items() if found]
      of = lambda reduce, at=at, values=values: [reduce(values[s]) for s in at]
      color = f"C{methods.index(method)}"
      label = method if structure == "unstructured" else f"{method} {structure}"
      marker = markers[structure]
      ax.plot(at, of(np.mean), marker=marker, color=color, label=label)
      ax.fill_between(at, of(min), of(max), alpha=0.2, color=color)
    if name in found["dense"]:
      ax.axhline(
        found["dense"][name], color="gray", linestyle=":", label="dense"
      )
    ax.set(xlabel="sparsity", ylabel=name.replace("_", " "))
  handles, labels = panels[-1].get_legend_handles_labels()
  page.legend(handles, labels, loc="outside right center", fontsize=8)
  page.suptitle(heading(found), fontsize=6)
  page.savefig(path, dpi=150)


def write(found: dict[str, Any], workdir: str | pathlib.Path) -> None:
  """Prints the table, and keeps it and a picture."""
  print(table(found))
  workdir = pathlib.Path(workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  files.write(workdir / "prune.json", json.dumps(found, indent=2) + "\n")
  draw(found, workdir / "prune.png")
  print(f"The table is in {workdir / 'prune.json'}, a picture in prune.png.")


def given_points() -> list[Point]:
  """The points that the flags ask for."""
  try:
    sparsities = [float(sparsity) for sparsity in flags.FLAGS.sparsity]
  except ValueError as error:
    raise ValueError(
      f"sparsity must be numbers, got {','.join(flags.FLAGS.sparsity)}"
    ) from error
  found = points(flags.FLAGS.structure, sparsities)
  check(flags.FLAGS.method, found)
  return found


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  given, at = flags.FLAGS, given_points()
  measured = Measured(
    given.model,
    seeds=given.seeds,
    calibration=given.calibration,
    evaluation=given.evaluation,
    length=given.length,
  )
  write(run(measured, given.method, at), given.workdir)


def define_flags(methods: Iterable[str] = tuple(METHODS)):
  """Flags of what is pruned, and how."""
  flags.DEFINE_multi_enum(
    "method", DEFAULT, list(methods), "One or more times: the methods."
  )
  flags.DEFINE_list("sparsity", ["0.5", "0.6", "0.7"], "Shares pruned.")
  flags.DEFINE_multi_enum(
    "structure",
    ["unstructured"],
    list(STRUCTURES),
    "One or more times: what may be chosen.",
  )
  flags.DEFINE_integer("seeds", 3, "Calibration sets.", lower_bound=1)
  flags.DEFINE_integer("calibration", 128, "Texts a set.", lower_bound=1)


if __name__ == "__main__":
  define_flags([*METHODS, SLICEGPT])
  flags.DEFINE_string("model", "minilm", "minilm, a directory, or a hub name.")
  flags.DEFINE_integer("evaluation", 512, "Pairs.", lower_bound=2)
  flags.DEFINE_integer("length", 64, "Tokens of a text.", lower_bound=2)
  flags.DEFINE_string("workdir", "runs/prune", "Where figures are kept.")
  app.run(main)
