"""Compares sparse autoencoders at equal L0, where papers claim an order.

Each seed of a variant has one autoencoder a level, and so a curve of a figure
over L0. Curves are read at the same L0, as lines over its logarithm, and the
difference of two of them is paired by seed.
"""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np

from experiments import claims
from experiments import comparisons
from experiments import dictionary
from experiments import intervals


def read_at(rows: Sequence[Mapping], figure: str, l0: float) -> float:
  """A figure at an L0 between those of the rows of one seed; else NaN.

  >>> rows = [{"l0": 10, "explained": 0.6}, {"l0": 40, "explained": 0.8}]
  >>> round(read_at(rows, "explained", 20), 3), read_at(rows, "explained", 50)
  (0.7, nan)
  """
  found = sorted((np.log(max(row["l0"], 1e-9)), row[figure]) for row in rows)
  places, values = zip(*found)
  value = np.interp(np.log(l0), places, values, left=np.nan, right=np.nan)
  return float(value)


def curves(
  rows: Sequence[Mapping], variant: str, seeds: Iterable[int]
) -> list[list[Mapping]]:
  """The rows of a variant, by seed."""
  own = [row for row in rows if row["variant"] == variant]
  return [[row for row in own if row["seed"] == seed] for seed in seeds]


def compared(
  claim: claims.Frontier, rows: Sequence[Mapping], seeds: Sequence[int]
) -> dict[str, Any]:
  """The effects that rows show, and how many of those claimed hold."""
  effects, verdicts = [], []
  pairs = [(*pair, True) for pair in claim.better]
  pairs += [(*pair, False) for pair in claim.besides]
  for better, worse, figure, claimed in pairs:
    sign = -1 if figure in claims.LESS else 1
    for l0 in claim.at:
      values = [
        [sign * read_at(rows, figure, l0) for rows in curves(rows, name, seeds)]
        for name in (better, worse)
      ]
      about = {"better": better, "worse": worse, "figure": figure, "l0": l0}
      about["claimed"] = claimed
      if np.isnan(values).any():  # a curve does not get there
        effects.append(about | {"verdict": "not reached"})
      else:
        effect = intervals.of_effect(*values)
        word = intervals.WORDS[intervals.verdict([effect])]
        effects.append(about | dataclasses.asdict(effect) | {"verdict": word})
      verdicts += [effects[-1]["verdict"]] * claimed
  words = [*intervals.WORDS.values(), "not reached"]
  count = ", ".join(f"{word} {verdicts.count(word)}" for word in words)
  return {"verdict": f"{count} of {len(verdicts)}", "effects": effects}


def test(
  claim: claims.Frontier, seeds, workdir: pathlib.Path, progress=iter
) -> dict[str, Any]:
  """Trains what a claim needs, and returns what came out, ready for JSON.

  Args:
    claim: what is tested.
    seeds: 0, 1, ...
    workdir: keeps the trainings.
    progress: unused; the trainings have a bar of their own.
  """
  del progress
  config = claim.config()
  config.seeds = len(seeds)
  found = dictionary.run(config, workdir)
  return compared(claim, found["rows"], seeds) | {
    "about": found["about"],
    "bounds": found["bounds"],
    "rows": found["rows"],
    "seeds": list(seeds),
    "jax": jax.__version__,
  }


def card(name: str, claim: claims.Frontier, result: Mapping[str, Any]) -> str:
  """What came out as a page of Markdown."""
  about = "; ".join(f"{name}: {x}" for name, x in result["about"].items())
  lines = [
    f"# {name}: {result['verdict']}",
    "",
    f"**The papers say.** {claim.says} ({claim.source}.)",
    "",
    f"**What was run.** {claim.differs}",
    f"{len(result['seeds'])} paired seeds, which draw the dictionary and the "
    "order of the tokens; brackets are 95% t-intervals over them. They say "
    "nothing of other models, sites or texts.",
    "",
    f"{about}.",
    "",
    "Effects are how much better the first is, whatever the figure: the claim "
    "holds where the interval is above zero, does not where it is below, and "
    "is undecided where zero is in it. One interval in twenty is wrong by "
    "chance. Of pairs in brackets nothing is claimed, and they do not count.",
    "",
    "| first, second | figure | "
    + comparisons.table_row(f"at L0 {x:g}" for x in claim.at),
    "| --- " * (len(claim.at) + 2) + "|",
  ]
  pairs = {}
  for effect in result["effects"]:
    word = effect["verdict"]
    cell = (
      word
      if "mean" not in effect
      else f"{word}: {intervals.Interval.of(effect)}"
    )
    pair = f"{effect['better']}, {effect['worse']}"
    pair = pair if effect["claimed"] else f"({pair})"
    pairs.setdefault((pair, effect["figure"]), []).append(cell)
  for (pair, figure), cells in pairs.items():
    lines.append(f"| {pair} | {figure} | " + comparisons.table_row(cells))
  figures = [*dictionary.COLUMNS]
  lines += [
    "",
    "| variant | level | " + comparisons.table_row(figures),
    "| --- " * (len(figures) + 2) + "|",
  ]
  for bound, kept in result["bounds"].items():
    cells = [f"{kept[c]:.4f}" if c in kept else "" for c in figures]
    lines.append(f"| {bound} | | " + comparisons.table_row(cells))
  for (variant, level), rows in dictionary.grouped(result["rows"]).items():
    cells = [str(intervals.of_mean([row[c] for row in rows])) for c in figures]
    lines.append(f"| {variant} | {level:g} | " + comparisons.table_row(cells))
  lines += [
    "",
    f"jax {result['jax']}; `python -m experiments.fidelity --claim={name}`",
    "",
  ]
  return "\n".join(lines)
