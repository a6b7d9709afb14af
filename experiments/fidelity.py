"""Tests a claim of a paper on a small task, and writes down what came out.

  python -m experiments.fidelity --claim=rigl_set_static_95

Settings are tuned over the same grid in every arm, on seeds of their own.
Arms are then compared over paired seeds: same initial weights, same data in
the same order. Runs are kept in the work directory and not made twice, as
long as the code is the same.
"""

from collections.abc import Mapping
import dataclasses
import functools
import hashlib
import itertools
import json
import pathlib
from typing import Any

from absl import app
from absl import flags
import jax
import ml_collections
import numpy as np
import tqdm

import experiments
from experiments import claims
from experiments import experiment
from experiments import flops
from experiments import intervals
from experiments import workdir as workdirs
import sparsejax

TUNING_SEEDS = (1_000, 1_001, 1_002)


def changed(
  config: ml_collections.ConfigDict, changes: Mapping[str, Any]
) -> ml_collections.ConfigDict:
  """A copy of a config with other values in some of its (dotted) fields."""
  config = ml_collections.ConfigDict(config.to_dict())
  for field, value in changes.items():
    *parents, name = field.split(".")
    node = config
    for parent in parents:
      node = node[parent]
    node[name] = value
  return config


def run(config: ml_collections.ConfigDict, seeds) -> list[dict[str, float]]:
  """Trains once for each seed, without files; compiles once for all.

  Returns:
    The final validation metrics and the training FLOPs of each run.
  """
  parts = experiment.make(config)
  every = config.eval_every
  if config.steps % every:
    raise ValueError(
      f"config.eval_every={every} must divide config.steps={config.steps}."
    )

  @jax.jit
  def several(state, batches):
    step = lambda state, batch: (parts.step(*state, batch)[:2], None)
    return jax.lax.scan(step, state, batches)[0]

  results = []
  for seed in seeds:
    state, data = parts.init(seed), parts.task.train_iterator(seed)
    size, kept = flops.weights(parts, state)
    records = [{"step": 0, "density": kept / size}]
    for step in range(every, config.steps + 1, every):
      batches = [next(data) for _ in range(every)]
      stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
      state = several(state, stacked)
      size, kept = flops.weights(parts, state)
      records.append({"step": step, "density": kept / size})
    cost = flops.training(config, parts, state, records)
    results.append(parts.evaluate(*state) | {"training_flops": cost})
  return results


@functools.cache
def _code() -> str:
  """A digest of the code that runs are made with, and of jax's version."""
  digest = hashlib.sha256(jax.__version__.encode())
  for package in (sparsejax, experiments):
    root = pathlib.Path(package.__file__).parent
    for path in sorted(root.rglob("*.py")):
      digest.update(path.read_bytes())
  return digest.hexdigest()


def cached(config, seeds, workdir: pathlib.Path) -> list[dict[str, float]]:
  """`run`, but for the runs that the work directory has, of this code."""
  paths = {}
  for seed in seeds:
    made = config.to_dict() | {"seed": seed, "code": _code()}
    text = json.dumps(made, sort_keys=True)
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    paths[seed] = workdir / f"{name}.json"
  missing = [seed for seed in seeds if not paths[seed].exists()]
  for seed, result in zip(missing, run(config, missing) if missing else ()):
    workdirs.write(paths[seed], json.dumps(result))
  return [json.loads(paths[seed].read_text()) for seed in seeds]


def tuned(arm, claim, workdir) -> dict[str, Any]:
  """The changes of an arm, with the best point of the claim's grid."""
  points = [
    arm | dict(zip(claim.grid, values))
    for values in itertools.product(*claim.grid.values())
  ]

  def score(point):
    results = cached(changed(claims.config(), point), TUNING_SEEDS, workdir)
    return np.mean([result[claim.metric] for result in results])

  return max(points, key=score)


def test(
  claim: claims.Claim, seeds, workdir: pathlib.Path, progress=iter
) -> dict[str, Any]:
  """Runs what a claim needs, and returns what came out, ready for JSON."""
  if len(seeds) < 5:
    raise ValueError(f"--seeds takes 5 or more; got {len(seeds)}.")
  arms, values = {}, {}
  for name in progress(claim.arms):
    changes = tuned(claim.arms[name], claim, workdir)
    results = cached(changed(claims.config(), changes), seeds, workdir)
    values[name] = [result[claim.metric] for result in results]
    arms[name] = {
      "tuned": {field: changes[field] for field in claim.grid},
      claim.metric: dataclasses.asdict(intervals.of_mean(values[name])),
      "training_flops": np.mean([r["training_flops"] for r in results]),
    }
  effects = {
    (better, worse): intervals.of_effect(values[better], values[worse])
    for better, worse in claim.better
  }
  return {
    "verdict": intervals.verdict(list(effects.values())),
    "effects": [
      {"better": better, "worse": worse} | dataclasses.asdict(effect)
      for (better, worse), effect in effects.items()
    ],
    "arms": arms,
    "values": values,
    "seeds": list(seeds),
    "jax": jax.__version__,
  }


def card(name: str, claim: claims.Claim, result: Mapping[str, Any]) -> str:
  """What came out as a page of Markdown."""
  metric = claim.metric
  shown = lambda v: f"{v['mean']:.4f} [{v['low']:.4f}, {v['high']:.4f}]"
  lines = [
    f"# {name}: {result['verdict']}",
    "",
    f"**The paper says.** {claim.says} ({claim.source}.)",
    "",
    f"**What was run.** {claim.differs}",
    f"Every arm was tuned over {json.dumps(dict(claim.grid))} on "
    f"{len(TUNING_SEEDS)} seeds of their own; {len(result['seeds'])} paired "
    "seeds compare the arms. Brackets are 95% t-intervals.",
    "",
    f"| arm | validation {metric} | training FLOPs | tuned |",
    "| --- | --- | --- | --- |",
  ]
  for arm, values in result["arms"].items():
    lines.append(
      f"| {arm} | {shown(values[metric])} | {values['training_flops']:.3g} | "
      f"{json.dumps(values['tuned'])} |"
    )
  lines += ["", f"| effect | {metric} |", "| --- | --- |"]
  for effect in result["effects"]:
    pair = f"{effect['better']} - {effect['worse']}"
    lines.append(f"| {pair} | {shown(effect)} |")
  lines += [
    "",
    "Reproduced means that every interval of an effect is above zero, not "
    "reproduced that one is below. FLOPs are counted as if zeros cost nothing.",
    f"jax {result['jax']}; `python -m experiments.fidelity --claim={name}`",
    "",
  ]
  return "\n".join(lines)


def chosen(name: str) -> list[str]:
  """The claims that a name stands for: itself, or all of them."""
  if name != "all" and name not in claims.CLAIMS:
    raise ValueError(
      f"--claim takes one of {', '.join(claims.CLAIMS)}, or all; got {name!r}."
    )
  return list(claims.CLAIMS) if name == "all" else [name]


def main(argv):
  del argv
  names = chosen(flags.FLAGS.claim)
  cards, workdir = (
    pathlib.Path(flags.FLAGS.cards),
    pathlib.Path(flags.FLAGS.workdir),
  )
  for directory in (cards, workdir):
    directory.mkdir(parents=True, exist_ok=True)
  for name in names:
    claim = claims.CLAIMS[name]
    progress = lambda arms, name=name: tqdm.tqdm(arms, desc=name, unit="arm")
    result = test(claim, range(flags.FLAGS.seeds), workdir, progress)
    workdirs.write(cards / f"{name}.json", json.dumps(result, indent=2))
    workdirs.write(cards / f"{name}.md", card(name, claim, result))
    print(f"{name}: {result['verdict']} ({cards / name}.md)")


if __name__ == "__main__":
  names = ", ".join(claims.CLAIMS)
  flags.DEFINE_string("claim", "all", f"One of {names}, or all.")
  flags.DEFINE_integer("seeds", 10, "Paired seeds, five or more.")
  flags.DEFINE_string("workdir", "runs/fidelity", "Keeps the runs.")
  flags.DEFINE_string("cards", "docs/claims", "Where results go.")
  app.run(main)
