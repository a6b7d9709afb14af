"""Tests a claim of a paper on a small task, and writes down what came out.

  python -m experiments.fidelity --claim=rigl_set_static_95

Each claim has a page of its own, and all.md has a row for every one whose
result is there. Settings are tuned over the same grid in every arm, on seeds
of their own. Arms are then compared over paired seeds: same initial weights,
same data in the same order. Runs are kept in the work directory and not made
twice, as long as the code is the same.
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
from experiments import comparisons
from experiments import experiment
from experiments import files
from experiments import flops
from experiments import frontier
from experiments import intervals
from experiments import prune
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
    The final validation metrics, and the size and the FLOPs of each run.
  """
  parts = experiment.make(config)
  every = config.eval_every
  if config.steps % every:
    raise ValueError(
      f"config.eval_every={every} must divide config.steps={config.steps}."
    )

  @jax.jit
  def several(state, batches):
    def step(state, batch):
      *state, values = parts.step(*state, batch)
      active = {n: x for n, x in values.items() if n.endswith("_active")}
      return tuple(state), active

    state, active = jax.lax.scan(step, state, batches)
    return state, {f"train_{name}": x.mean() for name, x in active.items()}

  results = []
  for seed in seeds:
    state, data = parts.init(seed), parts.task.train_iterator(seed)
    size, kept = flops.weights(parts, state)
    records = [{"step": 0, "density": kept / size}]
    for step in range(every, config.steps + 1, every):
      batches = [next(data) for _ in range(every)]
      stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
      state, active = several(state, stacked)
      size, kept = flops.weights(parts, state)
      record = {"step": step, "density": kept / size}
      records.append(record | {n: float(x) for n, x in active.items()})
    values = parts.evaluate(*state)
    edges = flops.active([values], "")
    results.append(
      values
      | {
        "training_flops": flops.training(config, parts, state, records),
        "inference_flops": flops.forward(parts, state, edges),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state[0])),
      }
    )
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


def _kept(workdir: pathlib.Path, made: Mapping[str, Any]) -> pathlib.Path:
  """Where the result of a run is kept, by its settings and the code."""
  text = json.dumps({**made, "code": _code()}, sort_keys=True)
  name = hashlib.sha256(text.encode()).hexdigest()[:16]
  return workdir / f"{name}.json"


def cached(config, seeds, workdir: pathlib.Path) -> list[dict[str, float]]:
  """`run`, but for the runs that the work directory has, of this code."""
  paths = {
    seed: _kept(workdir, config.to_dict() | {"seed": seed}) for seed in seeds
  }
  missing = [seed for seed in seeds if not paths[seed].exists()]
  for seed, result in zip(missing, run(config, missing) if missing else ()):
    files.write(paths[seed], json.dumps(result))
  return [json.loads(paths[seed].read_text()) for seed in seeds]


def tuned(arm, claim, workdir) -> dict[str, Any]:
  """The changes of an arm, with the best point of the claim's grid."""
  points = [
    arm | dict(zip(claim.grid, values))
    for values in itertools.product(*claim.grid.values())
  ]
  if len(points) == 1:  # nothing to choose
    return points[0]

  def score(point):
    results = cached(changed(claim.config(), point), TUNING_SEEDS, workdir)
    mean = np.mean([result[claim.metric] for result in results])
    return claims.sign(claim.metric) * mean

  return max(points, key=score)


def test(
  claim: claims.Claim, seeds, workdir: pathlib.Path, progress=iter
) -> dict[str, Any]:
  """Runs what a claim needs, and returns what came out, ready for JSON."""
  _check_seeds(seeds)
  arms, values = {}, {}
  metrics = claims.metrics(claim)
  for name in progress(claim.arms):
    changes = tuned(claim.arms[name], claim, workdir)
    results = cached(changed(claim.config(), changes), seeds, workdir)
    arms[name] = {"tuned": {field: changes[field] for field in claim.grid}}
    for metric in metrics:
      found = [result[metric] for result in results]
      values.setdefault(metric, {})[name] = found
      arms[name][metric] = dataclasses.asdict(intervals.of_mean(found))
    cost = np.mean([result["training_flops"] for result in results])
    arms[name]["training_flops"] = cost
  effects, claimed = [], []
  for pairs, of_paper in ((claim.better, True), (claim.besides, False)):
    for better, worse, *others in pairs:
      metric = others[0] if others else claim.metric
      both = [values[metric][arm] for arm in (better, worse)]
      signed = claims.sign(metric) * np.array(both)
      effect = intervals.of_effect(*signed)
      about = {"better": better, "worse": worse}
      if len(metrics) > 1:
        about |= {"metric": metric, "claimed": of_paper}
      effects.append(about | dataclasses.asdict(effect))
      claimed += [effect] * of_paper
  return {
    "verdict": intervals.verdict(claimed),
    "effects": effects,
    "arms": arms,
    "values": values[claim.metric] if len(metrics) == 1 else values,
    "seeds": list(seeds),
    "jax": jax.__version__,
  }


def _check_seeds(seeds):
  if len(seeds) < 5:
    raise ValueError(f"--seeds takes 5 or more; got {len(seeds)}.")


def test_pruning(
  claim: claims.Pruning, seeds, workdir: pathlib.Path, progress=iter, **setting
) -> dict[str, Any]:
  """Prunes as a claim needs it, and returns what came out, ready for JSON.

  Args:
    claim: what is tested.
    seeds: of calibration sets: 0, 1, ...
    workdir: keeps the rows.
    progress: wraps what is iterated over.
    **setting: as `prune.Measured` takes it; by default MiniLM.
  """
  _check_seeds(seeds)
  setting = {"source": "minilm", "seeds": len(seeds)} | setting
  measured = prune.Measured(**setting)
  rows = []
  runs = dict.fromkeys(
    (name, point) for pair, point, _ in _pairs(claim) for name in pair
  )
  order = list(prune.METHODS)
  for name, point in progress(sorted(runs, key=lambda x: order.index(x[0]))):
    for seed in seeds:
      made = {**setting, "method": name, "point": point, "seed": seed}
      path = _kept(workdir, made)
      if not path.exists():
        row = measured.row(name, point, seed)
        files.write(path, json.dumps(row))
      rows.append(json.loads(path.read_text()))
  return compared(claim, rows) | {
    "about": measured.about,
    "dense": measured.dense,
    "rows": rows,
    "seeds": list(seeds),
    "jax": jax.__version__,
  }


def test_frontier(
  claim: claims.Frontier, seeds, workdir: pathlib.Path, progress=iter
) -> dict[str, Any]:
  """Trains autoencoders as a claim needs them, and returns what came out."""
  _check_seeds(seeds)
  kept = _kept(workdir, claim.config().to_dict() | {"seeds": len(seeds)})
  return frontier.test(claim, seeds, kept.with_suffix(""), progress)


def test_procedure(
  claim: claims.Procedure, seeds, workdir: pathlib.Path, progress=iter
) -> dict[str, Any]:
  """Measures what a claim needs, and returns what came out."""
  _check_seeds(seeds)
  name = f"{claim.measure.__module__}.{claim.measure.__qualname__}"

  def measured(seed, settings):
    made = {"measure": name, "settings": settings, "seed": seed}
    path = _kept(workdir, made | {"about": claim.about()})
    if not path.exists():
      files.write(path, json.dumps(claim.measure(seed, **settings)))
    return json.loads(path.read_text())

  return comparisons.test(claim, seeds, TUNING_SEEDS, measured, progress)


def _pairs(claim: claims.Pruning) -> list[tuple]:
  """Pairs of methods, points, and whether anything is claimed of them."""
  return [
    (pair, point, claimed)
    for pairs, claimed in ((claim.better, True), (claim.besides, False))
    for pair, points in pairs.items()
    for point in points
  ]


def compared(claim: claims.Pruning, rows) -> dict[str, Any]:
  """The effects that rows show, and how many of those claimed hold."""
  groups = prune.grouped({"rows": rows})
  effects, verdicts = [], []
  for (better, worse), point, claimed in _pairs(claim):
    at = {"better": better, "worse": worse, "claimed": claimed}
    effects.append(at | {"structure": point[0], "sparsity": point[1]})
    for metric, sign in claim.metrics.items():
      values = [
        [sign * row[metric] for row in groups[name, *point]]
        for name in (better, worse)
      ]
      effect = intervals.of_effect(*values)
      word = intervals.WORDS[intervals.verdict([effect])]
      effects[-1][metric] = dataclasses.asdict(effect) | {"verdict": word}
      verdicts += [word] * claimed
  count = ", ".join(
    f"{w} {verdicts.count(w)}" for w in intervals.WORDS.values()
  )
  return {"verdict": f"{count} of {len(verdicts)}", "effects": effects}


def pruning_card(
  name: str, claim: claims.Pruning, result: Mapping[str, Any]
) -> str:
  """What came out of pruning as a page of Markdown."""
  metrics, about = list(claim.metrics), result["about"]
  hashes = ", ".join(f"{s}: {h}" for s, h in about["calibration"].items())
  head = lambda first: [
    f"| {first} | " + " | ".join(metrics) + " |",
    "| --- " * (len(metrics) + 1) + "|",
  ]
  lines = [
    f"# {name}: {result['verdict']}",
    "",
    f"**The papers say.** {claim.says} ({claim.source}.)",
    "",
    f"**What was run.** {claim.differs}",
    f"{len(result['seeds'])} calibration sets, the same for all methods; "
    "brackets are 95% t-intervals over them. The model and the pairs that "
    "evaluate it are one: intervals say nothing of other models and texts.",
    "",
    f"Model: {about['model']}. Text: {about['text']}. Split: {about['split']}. "
    f"Context: {about['context']}. Calibration, hash by seed: {hashes}.",
    "",
    "Effects are how much better the first is, whatever the metric: the claim "
    "holds where the interval is above zero, does not where it is below, and "
    "is undecided where zero is in it. One interval in twenty is wrong by "
    "chance. Of pairs in brackets nothing is claimed, and they do not count.",
    "",
    *head("first, second"),
  ]
  for effect in result["effects"]:
    pair = f"{effect['better']}, {effect['worse']}"
    pair += f": {effect['structure']} {effect['sparsity']:.0%}"
    cells = [
      f"{effect[m]['verdict']}: {intervals.Interval.of(effect[m])}"
      for m in metrics
    ]
    pair = pair if effect["claimed"] else f"({pair})"
    lines.append(f"| {pair} | " + " | ".join(cells) + " |")
  dense = [f"{result['dense'].get(m, 0.0):.4f}" for m in metrics]
  lines += ["", *head("method"), "| dense | " + " | ".join(dense) + " |"]
  for (method, structure, sparsity), rows in prune.grouped(result).items():
    found = [intervals.of_mean([row[m] for row in rows]) for m in metrics]
    cells = [str(interval) for interval in found]
    at = f"{method}: {structure} {sparsity:.0%}"
    lines.append(f"| {at} | " + " | ".join(cells) + " |")
  lines += [
    "",
    f"jax {result['jax']}; `python -m experiments.fidelity --claim={name}`",
    "",
  ]
  return "\n".join(lines)


def _tuning(claim):
  if not claim.grid:
    return "No arm was tuned"
  return (
    f"Every arm was tuned over {json.dumps(dict(claim.grid))} on "
    f"{len(TUNING_SEEDS)} seeds of their own"
  )


def card(name: str, claim: claims.Claim, result: Mapping[str, Any]) -> str:
  """What came out as a page of Markdown."""
  metrics, seeds = claims.metrics(claim), len(result["seeds"])
  lines = [
    f"# {name}: {result['verdict']}",
    "",
    f"**The paper says.** {claim.says} ({claim.source}.)",
    "",
    f"**What was run.** {claim.differs}",
    f"{_tuning(claim)}; {seeds} paired seeds compare the arms. Brackets are "
    "95% t-intervals.",
    "",
    f"| arm | validation {' | '.join(metrics)} | training FLOPs | tuned |",
    "| --- | " + "--- | " * len(metrics) + "--- | --- |",
  ]
  for arm, values in result["arms"].items():
    cells = " | ".join(
      comparisons.shown_mean(values[metric]) for metric in metrics
    )
    lines.append(
      f"| {arm} | {cells} | {values['training_flops']:.3g} | "
      f"{json.dumps(values['tuned'])} |"
    )
  compared = dict.fromkeys(
    e.get("metric", claim.metric) for e in result["effects"]
  )
  less = [metric for metric in compared if claims.sign(metric) < 0]
  lines += [
    "",
    f"| effect | {' | '.join(compared)} |",
    "| --- |" + " --- |" * len(compared),
  ]
  pairs = {}
  for effect in result["effects"]:
    cell = comparisons.shown_mean(effect)
    if len(compared) > 1:  # the verdict is of all metrics together
      interval = intervals.Interval.of(effect)
      cell = f"{intervals.WORDS[intervals.verdict([interval])]}: {cell}"
    if not effect.get("claimed", True):
      cell = f"({cell})"
    pair = pairs.setdefault((effect["better"], effect["worse"]), {})
    pair[effect.get("metric", claim.metric)] = cell
  for pair, cells in pairs.items():
    row = " | ".join(cells.get(metric, "") for metric in compared)
    lines.append(f"| {(', ' if less else ' - ').join(pair)} | {row} |")
  lines.append("")
  if less:
    lines.append(
      "Effects are how much better the first is, whatever the metric: of "
      f"{' and '.join(less)} less is better."
    )
  if not all(effect.get("claimed", True) for effect in result["effects"]):
    lines.append(
      "Of effects in brackets nothing is claimed, and they do not count."
    )
  lines += [
    "Reproduced means that every interval of an effect is above zero, not "
    "reproduced that one is below. FLOPs are counted as if zeros cost nothing.",
    f"jax {result['jax']}; `python -m experiments.fidelity --claim={name}"
    + ("`" if seeds == 10 else f" --seeds={seeds}`"),
    "",
  ]
  return "\n".join(lines)


def chosen(name: str) -> list[str]:
  """The claims that a name stands for: itself, those it begins, or all."""
  if name == "all" or name in claims.CLAIMS:
    return list(claims.CLAIMS) if name == "all" else [name]
  if found := [known for known in claims.CLAIMS if known.startswith(name)]:
    return found
  raise ValueError(
    f"--claim takes one of {', '.join(claims.CLAIMS)}, what some of them begin "
    f"with, or all; got {name!r}."
  )


def main_effect(claim, result: Mapping[str, Any]) -> str:
  """The first effect that is claimed, in a line."""
  found = next(e for e in result["effects"] if e.get("claimed", True))
  pair = f"{found['better']}, {found['worse']}"
  if "structure" in found:  # of pruning: some metrics at one point
    metric = next(n for n, x in found.items() if isinstance(x, Mapping))
    at = f"{found['structure']} {found['sparsity']:.0%}"
    return f"{pair}: {metric} at {at} {comparisons.shown(found[metric])}"
  if "l0" in found:
    effect = comparisons.shown(found) if "mean" in found else found["verdict"]
    return f"{pair}: {found['figure']} at L0 {found['l0']:g} {effect}"
  metric = found.get("metric", claim.metric)
  return f"{pair}: {metric.replace('_', ' ')} {comparisons.shown(found)}"


def overview(cards: pathlib.Path) -> str:
  """A row for each claim whose result is among the cards."""
  lines = [
    "# All claims",
    "",
    "The effect is the first of those that are claimed: how much better the "
    "first is than the second, with its 95% interval; with an x, how many "
    "times. The page of a claim has the others, and what was run.",
    "",
    "| claim | verdict | effect |",
    "| --- | --- | --- |",
  ]
  for name, claim in claims.CLAIMS.items():
    path = cards / f"{name}.json"
    if path.exists():
      result = json.loads(path.read_text())
      lines.append(
        f"| [{name}]({name}.md): {claim.says} | {result['verdict']} | "
        f"{main_effect(claim, result)} |"
      )
  return "\n".join([*lines, ""])


# How a claim is tested, the page of what came out, and how many seeds it takes.
KINDS = {
  claims.Claim: (test, card, 10),
  claims.Frontier: (test_frontier, frontier.card, 5),
  claims.Procedure: (test_procedure, comparisons.card, 10),
  claims.Pruning: (test_pruning, pruning_card, 5),
}


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
    progress = lambda arms, name=name: tqdm.tqdm(arms, desc=name)
    run_it, page, seeds = KINDS[type(claim)]
    seeds = range(flags.FLAGS.seeds or seeds)
    result = run_it(claim, seeds, workdir, progress)
    files.write(cards / f"{name}.json", json.dumps(result, indent=2))
    files.write(cards / f"{name}.md", page(name, claim, result))
    files.write(cards / "all.md", overview(cards))
    print(f"{name}: {result['verdict']} ({cards / name}.md)")


if __name__ == "__main__":
  names = ", ".join(claims.CLAIMS)
  flags.DEFINE_string(
    "claim", "all", f"One of {names}, what some begin with, or all."
  )
  flags.DEFINE_integer(
    "seeds",
    None,
    "Paired seeds, five or more; default 10, or 5 of pruning and frontiers.",
  )
  flags.DEFINE_string("workdir", "runs/fidelity", "Keeps the runs.")
  flags.DEFINE_string("cards", "docs/claims", "Where results go.")
  app.run(main)
