"""Tests claims whose arms are measured by a function, not by a config.

A seed's figures of all arms come from one call, so that arms share what they
have in common. Effects are paired by seed: differences, or quotients where
figures are times.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import itertools
import json
from typing import Any

import jax
import numpy as np

from experiments import claims
from experiments import intervals

Found = Mapping[str, Mapping[str, float]]  # of an arm, by figure


def points(claim: claims.Procedure) -> list[dict[str, Any]]:
  """Settings that are tried in every arm."""
  values = itertools.product(*claim.grid.values())
  return [dict(zip(claim.grid, chosen)) for chosen in values]


def tuned(
  claim: claims.Procedure,
  measured: Callable[[int, Mapping], Found],
  seeds: Sequence[int],
  progress: Callable = iter,
) -> dict[str, dict[str, Any]]:
  """Each arm's best point of the grid, by `claim.metric` on these seeds."""
  tried = points(claim)
  if len(tried) == 1:  # nothing to choose
    return {arm: tried[0] for arm in claim.arms}
  runs = list(itertools.product(range(len(tried)), seeds))
  found = [measured(seed, tried[i]) for i, seed in progress(runs)]
  scores = {arm: np.zeros(len(tried)) for arm in claim.arms}
  for (i, _), arms in zip(runs, found, strict=True):
    for arm in claim.arms:
      scores[arm][i] += claims.sign(claim.metric) * arms[arm][claim.metric]
  return {arm: tried[int(x.argmax())] for arm, x in scores.items()}


def effect(
  claim: claims.Procedure, values: Mapping, pair: Sequence[str]
) -> dict[str, Any]:
  """How much better the first of a pair is, by a figure."""
  better, worse, figure = pair
  sign, both = claims.sign(figure), [values[arm][figure] for arm in pair[:2]]
  ratio = figure in claim.ratios
  if ratio:
    found = intervals.of_effect(*(sign * np.log(both)))
    found = intervals.Interval(*np.expm1(dataclasses.astuple(found)).tolist())
  else:
    found = intervals.of_effect(*(sign * np.array(both)))
  about = {"better": better, "worse": worse, "metric": figure, "ratio": ratio}
  return about | dataclasses.asdict(found)


def test(
  claim: claims.Procedure,
  seeds: Sequence[int],
  tuning: Sequence[int],
  measured: Callable[[int, Mapping], Found],
  progress: Callable = iter,
) -> dict[str, Any]:
  """Measures what a claim needs, and returns what came out, ready for JSON.

  Args:
    claim: what is tested.
    seeds: by which arms are paired.
    tuning: other seeds, on which settings are chosen.
    measured: (seed, settings) -> figures of each arm.
    progress: wraps what is iterated over.
  """
  chosen = tuned(claim, measured, tuning, progress)
  values = {arm: {} for arm in claim.arms}
  for seed in progress(list(seeds)):
    for point in points(claim):
      own = [arm for arm in claim.arms if chosen[arm] == point]
      found = measured(seed, point) if own else {}
      for arm in own:
        for figure, value in found[arm].items():
          values[arm].setdefault(figure, []).append(float(value))
  effects = [
    effect(claim, values, pair) | {"claimed": claimed}
    for pairs, claimed in ((claim.better, True), (claim.besides, False))
    for pair in pairs
  ]
  claimed = [intervals.Interval.of(e) for e in effects if e["claimed"]]
  return {
    "verdict": intervals.verdict(claimed),
    "effects": effects,
    "arms": {
      arm: {"tuned": chosen[arm]}
      | {f: dataclasses.asdict(intervals.of_mean(x)) for f, x in own.items()}
      for arm, own in values.items()
    },
    "values": values,
    "about": dict(claim.about()),
    "seeds": list(seeds),
    "jax": jax.__version__,
  }


def shown(found: Mapping[str, Any]) -> str:
  """An effect: a difference, or how many times better."""
  if not found.get("ratio"):
    return str(intervals.Interval.of(found))
  mean, low, high = (1 + found[name] for name in ("mean", "low", "high"))
  return f"{mean:.2f}x [{low:.2f}, {high:.2f}]"


def card(name: str, claim: claims.Procedure, result: Mapping[str, Any]) -> str:
  """What came out as a page of Markdown."""
  count = len(result["seeds"])
  grid = {name: list(values) for name, values in claim.grid.items()}
  tuning = "Nothing was tuned"
  if grid:
    tuning = (
      f"Every arm was tuned over {json.dumps(grid)} by {claim.metric}, on "
      "seeds of their own"
    )
  figures = [f for f in claim.figures if any(f in x for x in _arms(result))]
  lines = [
    f"# {name}: {result['verdict']}",
    "",
    f"**The paper says.** {claim.says} ({claim.source}.)",
    "",
    f"**What was run.** {claim.differs}",
    f"{tuning}; {count} paired seeds compare the arms. Brackets are 95% "
    "t-intervals.",
    "",
    *(f"{what}: {told}." for what, told in result["about"].items()),
    *([""] if result["about"] else []),
    "| arm | " + table_row([f.replace("_", " ") for f in figures] + ["tuned"]),
    "| --- " * (len(figures) + 2) + "|",
  ]
  for arm, found in result["arms"].items():
    cells = [shown_mean(found.get(figure)) for figure in figures]
    lines.append(
      f"| {arm} | " + table_row([*cells, json.dumps(found["tuned"])])
    )
  compared = list(dict.fromkeys(e["metric"] for e in result["effects"]))
  lines += [
    "",
    "| first, second | " + table_row(f.replace("_", " ") for f in compared),
    "| --- " * (len(compared) + 1) + "|",
  ]
  pairs = {}
  for found in result["effects"]:
    word = intervals.WORDS[intervals.verdict([intervals.Interval.of(found)])]
    cell = f"{word}: {shown(found)}"
    pair = pairs.setdefault((found["better"], found["worse"]), {})
    pair[found["metric"]] = cell if found["claimed"] else f"({cell})"
  for pair, cells in pairs.items():
    row = table_row(cells.get(figure, "") for figure in compared)
    lines.append(f"| {', '.join(pair)} | {row}")
  lines += [
    "",
    "Effects are how much better the first is, whatever the figure"
    + (
      ": with an x, how many times (means of logarithms)."
      if any(found["ratio"] for found in result["effects"])
      else "."
    ),
  ]
  if not all(found["claimed"] for found in result["effects"]):
    lines.append(
      "Of effects in brackets nothing is claimed, and they do not count."
    )
  lines += [
    "Reproduced means that every interval of an effect that is claimed shows "
    "the first to be better, not reproduced that one shows it to be worse.",
    f"jax {result['jax']}; `python -m experiments.fidelity --claim={name}"
    + ("`" if count == 10 else f" --seeds={count}`"),
    "",
  ]
  return "\n".join(lines)


def _arms(result: Mapping[str, Any]) -> Iterable[Mapping]:
  return result["arms"].values()


def shown_mean(found: Mapping[str, float] | None) -> str:
  """A mean and its interval, or the one value; nothing where there is none."""
  if found is None:
    return ""
  if found["low"] == found["high"]:  # what all seeds have
    return f"{found['mean']:,.10g}"
  return str(intervals.Interval.of(found))


def table_row(values: Iterable[str]) -> str:
  """The cells of a row of a table, but for what begins it."""
  return " | ".join(values) + " |"
