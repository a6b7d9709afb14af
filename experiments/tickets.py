"""Lottery tickets: networks that iterative magnitude pruning finds.

  python -m experiments.tickets --workdir=runs/tickets

Each round trains, prunes the smallest weights of each layer, and sets the rest
back to what they were at a step of the first training. What is left is trained
again from there (the ticket), from another initialization, and under a random
mask of as many weights.
"""

from collections.abc import Iterator
import json
import pathlib

from absl import app
from absl import flags
import jax
import numpy as np
import tqdm

from experiments import files
from experiments import intervals
from experiments.procedures import mnist1d_mlp
from experiments.procedures import under_masks

WIDTH, DEPTH = 100, 2
STEPS, EARLY = 1_000, 100
ARMS = ("ticket", "reinitialized", "random")


def rounds(
  seed: int,
  *,
  learning_rate: float,
  fraction: float = 0.2,
  number: int = 10,
  rewind: int = 0,
  steps: int = STEPS,
  early: int = EARLY,
  last: bool = False,
) -> Iterator[tuple[float, dict[str, dict[str, float]]]]:
  """The densities of one run of pruning, and the figures of each arm there.

  Args:
    seed: of the initialization, the order of the data and the controls.
    learning_rate: of Adam.
    fraction: as `under_masks.imp` takes it.
    number: of rounds.
    rewind: as `under_masks.imp` takes it.
    steps: of a training, those up to `rewind` among them.
    early: the step of "early_accuracy", counted from the reset.
    last: whether the last round alone is measured.
  """
  setting = mnist1d_mlp.setting(WIDTH, DEPTH)
  order = setting.order(seed, steps)
  compiled = mnist1d_mlp.trainer(WIDTH, DEPTH)

  def train(params, masks, begin, end):
    rows = order[begin:end]
    return compiled(
      params, masks, setting.data, rows, learning_rate=learning_rate
    )[0]

  def figures(params, masks, trained=None):
    # The rate is constant: the beginning of a training is a shorter training.
    soon = train(params, masks, rewind, rewind + early)
    if trained is None:
      trained = train(params, masks, rewind, None)
    end = setting.measure(trained)
    return end | {"early_accuracy": setting.measure(soon)["accuracy"]}

  def begun(seed):
    """Another network at the step that resets go back to."""
    params = setting.init(seed)
    dense = under_masks.dense_masks(params)
    return train(params, dense, 0, rewind) if rewind else params

  found = under_masks.imp(
    train,
    setting.init(seed),
    fraction=fraction,
    rounds=number,
    rewind=rewind,
  )
  for index, step in enumerate(found):
    if index == 0:
      start, other = step.ticket, begun(seed + 1_000_000)
    if last and index < number:
      continue
    key = jax.random.fold_in(jax.random.key(seed), index)
    masks = under_masks.shuffled(key, step.masks)
    yield (
      step.density,
      {
        "ticket": figures(step.ticket, step.masks, step.trained),
        "reinitialized": figures(other, step.masks),
        "random": figures(start, masks),
      },
    )


def measure(seed: int, **settings) -> dict[str, dict[str, float]]:
  """Figures of each arm at the last density."""
  ((_, found),) = rounds(seed, last=True, **settings)
  return found


def table(rows: list[dict]) -> str:
  """Means over seeds, with 95% intervals where there is more than one."""
  figures = list(rows[0]["arms"][ARMS[0]])
  lines = ["density  arm            " + "  ".join(f"{f:>22s}" for f in figures)]
  for density in dict.fromkeys(row["density"] for row in rows):
    for arm in ARMS:
      cells = []
      for figure in figures:
        found = [
          row["arms"][arm][figure] for row in rows if row["density"] == density
        ]
        one = len(found) < 2
        cell = f"{found[0]:.4f}" if one else str(intervals.of_mean(found))
        cells.append(f"{cell:>22s}")
      lines.append(f"{density:7.1%}  {arm:13s}  " + "  ".join(cells))
  return "\n".join(lines)


def draw(rows: list[dict], path: pathlib.Path) -> None:
  """Accuracy over density, a line an arm and a band from least to most."""
  from matplotlib import figure

  page = figure.Figure(figsize=(9, 4), layout="constrained")
  densities = list(dict.fromkeys(row["density"] for row in rows))
  for ax, name in zip(page.subplots(1, 2), ("accuracy", "early_accuracy")):
    for arm in ARMS:
      values = [
        [r["arms"][arm][name] for r in rows if r["density"] == density]
        for density in densities
      ]
      (line,) = ax.plot(densities, [np.mean(v) for v in values], label=arm)
      low, high = zip(*((min(v), max(v)) for v in values))
      ax.fill_between(densities, low, high, color=line.get_color(), alpha=0.2)
    ax.set(xlabel="density", ylabel=name.replace("_", " "), xscale="log")
    shown = densities[:: max(1, len(densities) // 6)]
    ax.set_xticks(shown, [f"{density:.3g}" for density in shown], minor=False)
    ax.minorticks_off()
    ax.invert_xaxis()
    ax.legend()
  page.savefig(path, dpi=150)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  given = flags.FLAGS
  if given.rewind >= given.steps:
    raise app.UsageError(
      f"--rewind takes less than --steps={given.steps}, got {given.rewind}"
    )
  workdir = pathlib.Path(given.workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  rows = []
  with tqdm.tqdm(total=given.seeds * (given.rounds + 1), unit="round") as bar:
    for seed in range(given.seeds):
      for density, arms in rounds(
        seed,
        learning_rate=given.learning_rate,
        fraction=given.fraction,
        number=given.rounds,
        rewind=given.rewind,
        steps=given.steps,
        early=min(given.early, given.steps - given.rewind),
      ):
        rows.append({"seed": seed, "density": density, "arms": arms})
        bar.set_postfix(density=f"{density:.1%}", refresh=False)
        bar.update()
  fields = ("fraction", "rewind", "learning_rate", "steps")
  about = {name: getattr(given, name) for name in fields}
  print(table(rows))
  found = {"about": about, "rows": rows}
  files.write(workdir / "tickets.json", json.dumps(found, indent=2) + "\n")
  draw(rows, workdir / "tickets.png")
  print(
    f"The rows are in {workdir / 'tickets.json'}, a picture in tickets.png."
  )


if __name__ == "__main__":
  flags.DEFINE_string("workdir", "runs/tickets", "Where figures are kept.")
  flags.DEFINE_integer("seeds", 5, "Networks.", lower_bound=1)
  flags.DEFINE_integer("rounds", 15, "Of pruning.", lower_bound=1)
  flags.DEFINE_float("fraction", 0.2, "Of what is left, pruned by a round.")
  flags.DEFINE_integer("steps", STEPS, "Of a training.", lower_bound=1)
  flags.DEFINE_integer("early", EARLY, "Steps of the early accuracy.")
  flags.DEFINE_integer(
    "rewind", 0, "The step that resets go back to.", lower_bound=0
  )
  flags.DEFINE_float("learning_rate", 3e-2, "Of Adam.")
  app.run(main)
