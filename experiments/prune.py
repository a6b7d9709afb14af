"""Prunes a pretrained encoder in one shot, and measures what is lost.

  python -m experiments.prune --method=wanda --sparsity=0.6 --workdir=runs/prune

Each method is run at each sparsity with several calibration sets. A block of
the model is calibrated on what the blocks before it give once they are pruned.
Two figures on functions of Python's standard library, none of which calibrated:

- retrieval: how often a docstring is nearest to its own signature;
- fidelity: the mean cosine between embeddings of the pruned and dense model.
"""

from collections.abc import Callable, Iterator
import functools
import hashlib
import json
import pathlib
from typing import Any

from absl import app
from absl import flags
from flax import nnx
import numpy as np
import tqdm

from experiments import intervals
from experiments.models import bert
from experiments.models import pretrained
from experiments.tasks import docstrings
from sparsejax import capture
from sparsejax import select
from sparsejax import weights

BATCH = 16
STRUCTURES = {
  "unstructured": None,
  "2:4": select.NM(2, 4),
  "4:8": select.NM(4, 8),
}


def magnitude(kernel, moments, density, structure):
  del moments
  return weights.magnitude_pruning(kernel, density, structure)


def dsnot(kernel, moments, density, structure):
  start = weights.wanda(kernel, moments, density, structure)
  group = None if structure is None else structure.m
  return weights.dsnot(kernel, moments, start.mask, group=group)


METHODS = {
  "magnitude": magnitude,
  "wanda": weights.wanda,
  "dsnot": dsnot,
  "sparsegpt": weights.sparsegpt,
}


def call(model, batch):
  """Embeddings of a batch of tokens."""
  return bert.mean_embedding(model(*batch), batch[1])


# Functions of the module, so that all runs share what is compiled of them.
_embed = nnx.jit(call)


def valid(batch):
  return batch[1]


@functools.cache
def in_block(number: int) -> Callable[[str], bool]:
  return lambda name: name.startswith(f"blocks/{number}/")


def embed(model, batches) -> np.ndarray:
  """Embeddings of all texts."""
  return np.concatenate([np.asarray(_embed(model, batch)) for batch in batches])


def batches_of(tokenizer, texts, length: int) -> list:
  """Tokens and which of them are valid, in batches of equal shape."""
  tokenizer.enable_truncation(length)
  tokens, valid = pretrained.encode(tokenizer, texts, length=length)
  rows = -(-len(texts) // BATCH) * BATCH - len(texts)
  tokens, valid = (np.pad(x, [(0, rows), (0, 0)]) for x in (tokens, valid))
  return [
    (tokens[i : i + BATCH], valid[i : i + BATCH])
    for i in range(0, len(tokens), BATCH)
  ]


def retrieval(signatures: np.ndarray, texts: np.ndarray) -> float:
  """The share of docstrings whose nearest signature is their own."""
  nearest = (texts @ signatures.T).argmax(1)
  return float((nearest == np.arange(len(texts))).mean())


def prune_in_order(
  model: bert.Bert, batches, method: Callable, bar: tqdm.tqdm | None = None
) -> tuple[bert.Bert, float]:
  """A pruned copy, and the mean reconstruction error of its layers."""
  graph, params = nnx.split(nnx.clone(model))
  errors = []
  for number in range(len(model.blocks)):
    moments = capture.moments(
      call,
      nnx.merge(graph, params),
      batches,
      where=in_block(number),
      valid=valid,
    )
    before = params
    params, _ = weights.prune(params, moments, method)
    errors += [
      float(weights.reconstruction_error(old, new, moments[name]))
      for name, old, new in changed(before, params, moments)
    ]
    if bar is not None:
      bar.update()
  return nnx.merge(graph, params), float(np.mean(errors))


def changed(before, after, moments) -> Iterator[tuple[str, Any, Any]]:
  """Kernels before and after, by the names that there are moments of."""
  named = lambda tree: {
    "/".join(map(str, path)): x[...]
    for path, x in nnx.to_flat_state(tree)
  }  # fmt: skip
  old, new = named(before), named(after)
  return ((name, old[name], new[name]) for name in moments)


def measure(
  source: str,
  names: list[str],
  sparsities: list[float],
  structure: str,
  seeds: int,
  calibration: int,
  evaluation: int,
  length: int,
) -> dict[str, Any]:
  """Rows of a table, and what they are figures of."""
  model, tokenizer, _ = pretrained.load(source)
  if not isinstance(model, bert.Bert):
    raise ValueError(f"model must be an encoder (BERT), got {source!r}")
  pairs = docstrings.load()
  pick = lambda texts, chosen: [texts[i] for i in chosen]
  _, held = docstrings.split(
    pairs, calibration=calibration, evaluation=evaluation, seed=0
  )
  sides = [
    batches_of(tokenizer, pick(texts, held), length)
    for texts in (pairs.signatures, pairs.docstrings)
  ]
  dense = [embed(model, side)[:evaluation] for side in sides]
  rows, sets = [], []
  for seed in range(seeds):
    chosen, _ = docstrings.split(
      pairs, calibration=calibration, evaluation=evaluation, seed=seed
    )
    texts = pick(pairs.docstrings, chosen)
    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()[:12]
    sets.append((seed, digest, batches_of(tokenizer, texts, length)))
  total = len(names) * len(sparsities) * seeds * len(model.blocks)
  with tqdm.tqdm(total=total, unit="block") as bar:
    for name in names:
      for sparsity in sparsities:
        for seed, digest, batches in sets:
          bar.set_description(f"{name} {sparsity:.0%} seed {seed}")
          chosen = STRUCTURES[structure]
          density = 1 - sparsity if chosen is None else None
          method = functools.partial(
            METHODS[name], density=density, structure=chosen
          )
          pruned, error = prune_in_order(model, batches, method, bar)
          found = [embed(pruned, side)[:evaluation] for side in sides]
          rows.append({
            "method": name,
            "sparsity": sparsity,
            "seed": seed,
            "calibration": digest,
            "error": error,
            "retrieval": retrieval(*found),
            "fidelity": float((found[1] * dense[1]).sum(1).mean()),
          })  # fmt: skip
  return {
    "model": source,
    "structure": structure,
    "text": pairs.source,
    "evaluation": f"{evaluation} pairs, the same for all seeds",
    "calibration": f"{calibration} docstrings of others a seed",
    "context": length,
    "dense": {"retrieval": retrieval(*dense)},
    "rows": rows,
  }


def table(found: dict[str, Any]) -> str:
  """Means over calibration sets with 95% intervals."""
  lines = [
    f"{found['model']}, {found['structure']}; {found['text']}; evaluated on "
    f"{found['evaluation']}; calibrated on {found['calibration']}; at most "
    f"{found['context']} tokens",
    f"dense: retrieval {found['dense']['retrieval']:.3f}",
    f"{'method':10s} {'sparsity':>8s} {'error':>22s} {'retrieval':>22s} "
    f"{'fidelity':>22s}  calibration",
  ]
  groups = {}
  for row in found["rows"]:
    groups.setdefault((row["method"], row["sparsity"]), []).append(row)
  for (method, sparsity), rows in groups.items():
    cells = [spread([row[key] for row in rows])
             for key in ("error", "retrieval", "fidelity")]  # fmt: skip
    hashes = " ".join(f"{row['seed']}:{row['calibration']}" for row in rows)
    lines.append(
      f"{method:10s} {sparsity:8.0%} {cells[0]:>22s} {cells[1]:>22s} "
      f"{cells[2]:>22s}  {hashes}"
    )
  return "\n".join(lines)


def spread(values: list[float]) -> str:
  """A mean and its interval over calibration sets."""
  if len(values) < 2:
    return f"{values[0]:.3f}"
  found = intervals.of_mean(values)
  return f"{found.mean:.3f} [{found.low:.3f}, {found.high:.3f}]"


def draw(found: dict[str, Any], path: pathlib.Path) -> None:
  """Retrieval and fidelity over sparsity."""
  from matplotlib import figure

  page = figure.Figure(figsize=(9, 3.5), layout="constrained")
  for ax, key in zip(page.subplots(1, 2), ("retrieval", "fidelity")):
    for name in dict.fromkeys(row["method"] for row in found["rows"]):
      rows = [row for row in found["rows"] if row["method"] == name]
      at = sorted({row["sparsity"] for row in rows})
      of = lambda s, rows=rows, key=key: [
        row[key] for row in rows if row["sparsity"] == s
      ]
      ax.plot(at, [np.mean(of(s)) for s in at], marker="o", label=name)
      ax.fill_between(
        at, [min(of(s)) for s in at], [max(of(s)) for s in at], alpha=0.2
      )
    if key in found["dense"]:
      ax.axhline(
        found["dense"][key], color="gray", linestyle=":", label="dense"
      )
    ax.set(xlabel="sparsity", ylabel=key)
    ax.legend()
  page.savefig(path, dpi=150)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  given = flags.FLAGS
  sparsities = [0.5] if given.structure != "unstructured" else given.sparsity
  found = measure(
    given.model,
    given.method,
    [float(s) for s in sparsities],
    given.structure,
    given.seeds,
    given.calibration,
    given.evaluation,
    given.length,
  )
  print(table(found))
  workdir = pathlib.Path(given.workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  (workdir / "prune.json").write_text(json.dumps(found, indent=2) + "\n")
  draw(found, workdir / "prune.png")
  print(f"The table is in {workdir / 'prune.json'}, a picture in prune.png.")


def define_flags():
  flags.DEFINE_string("model", "minilm", "minilm, a directory, or a hub name.")
  flags.DEFINE_multi_enum("method", list(METHODS), list(METHODS), "Methods.")
  flags.DEFINE_list("sparsity", ["0.5", "0.6", "0.7"], "Shares pruned.")
  flags.DEFINE_enum(
    "structure", "unstructured", list(STRUCTURES), "What may be chosen."
  )
  flags.DEFINE_integer("seeds", 3, "Calibration sets.", lower_bound=1)
  flags.DEFINE_integer("calibration", 128, "Texts a set.", lower_bound=1)
  flags.DEFINE_integer("evaluation", 512, "Pairs.", lower_bound=2)
  flags.DEFINE_integer("length", 64, "Tokens of a text.", lower_bound=2)
  flags.DEFINE_string("workdir", "runs/prune", "Where figures are kept.")


if __name__ == "__main__":
  define_flags()
  app.run(main)
