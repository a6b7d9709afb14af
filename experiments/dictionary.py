"""Trains sparse autoencoders on a model's activations, and compares them.

  python -m experiments.dictionary --config=configs/sae_minilm.py \
    --workdir=runs/sae_minilm

Each variant is trained at each of its levels (k, or the weight of a term of the
loss) with each seed, on what a block of an encoder returns. The seed draws the
first dictionary and the order of the rows, the same for all variants. Of each
autoencoder are told, on texts that none was trained on,

- l0: active latents of a token;
- explained: the share of the variance about the mean token;
- dead: the share of latents that no token activates;
- cosine: of embeddings of docstrings to the model's own, where the
  reconstruction takes the place of what the block returns;
- recovered: the share that is won back of what the cosine loses where the mean
  token takes that place;
- retrieval: how often a docstring is nearest to its own signature then;
- prefix: the share of the variance that the first quarter of the latents
  explains, with the others left out;
- nearest: the largest cosine of an atom with another one, on average.

The work directory receives the activations, the autoencoder of each training as
SAELens keeps it, results.jsonl, table.txt, frontier.png, and a page of latents
for each variant. The same command resumes: finished trainings stay, and one
that was stopped goes on from its last checkpoint.
"""

from collections.abc import Callable, Mapping, Sequence
import inspect
import json
import pathlib
import shutil
import sys
from typing import Any

from absl import app
from absl import flags
from absl import logging
import ml_collections
from ml_collections import config_flags
import numpy as np
import tqdm

from experiments import activations
from experiments import dictionary_figures
from experiments import dictionary_page
from experiments import dictionary_training
from experiments import files
from experiments import prune
from experiments import settings
from experiments import training
from experiments import workdir as workdirs
from experiments.models import bert
from experiments.models import pretrained
from experiments.tasks import docstrings
from experiments.tasks import text
from sparsejax import sparse_coding

COUNTS = (
  "batch_size",
  "checkpoint_every",
  "latents",
  "length",
  "log_every",
  "pairs",
  "seeds",
  "steps",
  "texts",
)
FIELDS = (
  *COUNTS,
  "dtype",
  "layer",
  "learning_rate",
  "levels",
  "model",
  "page",
  "settings",
  "variants",
)
PAGE = ("l0", "latents", "passages")
COLUMNS = (
  "l0",
  "explained",
  "dead",
  "recovered",
  "cosine",
  "retrieval",
  "prefix",
  "nearest",
)

Rows = dict[tuple[str, float, int], dict[str, Any]]


def check(config: ml_collections.ConfigDict) -> None:
  """Raises ValueError where a field is unknown, missing or out of range."""
  settings.check_fields("", config, takes=FIELDS, required=FIELDS)
  for field in COUNTS:
    if config[field] < 1:
      raise ValueError(f"config.{field} takes 1 or more; got {config[field]}.")
  settings.check_fields("page.", config.page, takes=PAGE, required=PAGE)
  for name, value in config.page.items():
    whole = name != "l0"
    if not _is_positive(value, whole):
      raise ValueError(
        f"config.page.{name} takes {_kind(whole)} above 0; got {value!r}."
      )
  variants = dictionary_training.VARIANTS
  # Those that are not chosen may stay.
  settings.check_fields("levels.", config.levels, takes=variants)
  settings.check_fields("settings.", config.settings, takes=variants)
  for name in config.variants:
    if name not in variants:
      raise ValueError(
        f"config.variants has {name!r}; it takes {', '.join(variants)}."
      )
    variant = variants[name]
    takes, needs = variant.settings
    own = config.settings.get(name, {})
    field = f"settings.{name}."
    settings.check_fields(field, own, takes=takes, required=needs)
    levels = tuple(config.levels.get(name, ()))
    most = config.latents if variant.level == "k" else np.inf
    # A k that is one on average is a float there.
    parameter = inspect.signature(variant.make).parameters[variant.level]
    whole = parameter.annotation is int
    if not levels or not all(
      _is_positive(x, whole) and x <= most for x in levels
    ):
      raise ValueError(
        f"config.levels.{name} takes {_kind(whole)} above 0, which as k are at "
        f"most config.latents={config.latents}; got {levels}."
      )


def _is_positive(value, whole):
  return isinstance(value, int if whole else (int, float)) and value > 0


def _kind(whole):
  return "integers" if whole else "numbers"


def split(
  config: ml_collections.ConfigDict,
) -> tuple[dict[str, list[str]], list[list[str]]]:
  """Texts to train and to validate on, and signatures and docstrings of pairs.

  No text is in two of them: a tenth of the texts validates, by their hashes.
  """
  pairs = docstrings.load()
  _, held = docstrings.split(
    pairs, calibration=1, evaluation=config.pairs, seed=0
  )
  sides = [[x[i] for i in held] for x in (pairs.signatures, pairs.docstrings)]
  compared = set(sides[1])
  texts = [x for x in activations.paragraphs() if x not in compared]
  order = np.random.default_rng(0).permutation(len(texts))[: config.texts]
  found = {"training": [], "validation": []}
  for i in order:
    is_validation = text.is_validation(texts[i])
    found["validation" if is_validation else "training"].append(texts[i])
  return found, sides


def run(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  *,
  stopped: Callable[[], bool] = lambda: False,
) -> dict[str, Any] | None:
  """All trainings and their figures, with a progress bar.

  Args:
    config: as configs/sae_minilm.py has it.
    workdir: of this config, or new.
    stopped: asked after every step; where true, a checkpoint is written.

  Returns:
    What `table` takes; None where it was stopped.

  Raises:
    ValueError: a field of the config is wrong, or the directory holds something
      else.
  """
  check(config)
  loaded = pretrained.load(config.model)
  if not isinstance(loaded.model, bert.Bert):
    raise ValueError(f"config.model takes an encoder; got {config.model!r}.")
  workdirs.claim(workdir, config)
  texts, sides = split(config)
  stores = {
    name: activations.collect(
      workdir / "activations" / name,
      loaded,
      config.layer,
      chosen,
      length=config.length,
      dtype=config.dtype,
    )
    for name, chosen in texts.items()
  }
  mean = stores["training"].mean()
  figures = dictionary_figures.Figures(
    loaded, stores["validation"], sides, mean
  )
  rows, every = read(workdir), dictionary_training.programs(config)
  steps = config.steps * sum(program.size for program in every)
  with tqdm.tqdm(total=steps, unit="step", smoothing=0) as bar:
    for program in every:
      bar.set_description(program.name)
      if all(at in rows for at in program.trainings):
        bar.update(config.steps * program.size)
        continue
      place = workdir / "programs" / program.name
      trained = dictionary_training.train(
        program,
        config,
        stores["training"],
        mean,
        place,
        bar=bar,
        stopped=stopped,
      )
      if trained is None:
        return None
      for number, at in enumerate(program.trainings):
        bar.set_postfix_str(f"measures {number + 1} of {program.size}")
        sae = trained.autoencoder(number)
        sparse_coding.save(kept_at(workdir, *at), sae)
        names = dict(zip(("variant", "level", "seed"), at))
        rows[at] = names | figures.of(sae)
      bar.set_postfix_str("")
      lines = "".join(json.dumps(row) + "\n" for row in rows.values())
      files.write(workdir / "results.jsonl", lines)
      shutil.rmtree(place / "checkpoints")
  tokens = {name: len(store) for name, store in stores.items()}
  about = {
    "model": config.model,
    "layer": config.layer,
    "text": f"docstrings and the language reference of Python "
    f"{sys.version.split()[0]} ({stores['training'].meta['about']['text']})",
    "tokens": f"{tokens['training']} to train on, {tokens['validation']} to "
    "validate",
    "latents": f"{config.latents} of width {stores['training'].width}",
    "training": f"{config.steps} steps of {config.batch_size} tokens",
  }
  wanted = [at for program in every for at in program.trainings]
  return {
    "about": about,
    "bounds": figures.bounds,
    "rows": [rows[at] for at in wanted],
    "validation": (stores["validation"], texts["validation"]),
    "tokenizer": loaded.tokenizer,
  }


def kept_at(
  workdir: pathlib.Path, variant: str, level: float, seed: int
) -> pathlib.Path:
  """Where the autoencoder of a training is."""
  return workdir / "autoencoders" / f"{variant}_{level}_{seed}"


def read(workdir: pathlib.Path) -> Rows:
  """The rows of finished trainings."""
  path = workdir / "results.jsonl"
  if not path.exists():
    return {}
  try:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {(r["variant"], r["level"], r["seed"]): r for r in rows}
  except (ValueError, KeyError) as error:
    raise ValueError(f"{path} is damaged: {error!r}") from error


def grouped(rows: Sequence[Mapping]) -> dict[tuple[str, float], list[Mapping]]:
  """Rows of all seeds, by variant and level."""
  groups = {}
  for row in rows:
    groups.setdefault((row["variant"], row["level"]), []).append(row)
  return groups


def table(found: Mapping[str, Any]) -> str:
  """Means over seeds with 95% intervals, under what bounds them."""
  lines = ["; ".join(f"{name}: {x}" for name, x in found["about"].items())]
  show = lambda *cells: (
    f"{cells[0]:14s} {cells[1]!s:>8s} "
    + " ".join(f"{cell:>23s}" for cell in cells[2:])
  )
  lines.append(show("variant", "level", *COLUMNS))
  for name, kept in found["bounds"].items():
    cells = [f"{kept[c]:.3f}" if c in kept else "-" for c in COLUMNS]
    lines.append(show(name, "-", *cells))
  for (variant, level), rows in grouped(found["rows"]).items():
    cells = [prune.spread([row[c] for row in rows]) for c in COLUMNS]
    lines.append(show(variant, level, *cells))
  return "\n".join(lines)


def draw(found: Mapping[str, Any], path: pathlib.Path) -> None:
  """What is explained and what is recovered over L0, a line a variant."""
  from matplotlib import figure

  page = figure.Figure(figsize=(10, 4.5), layout="constrained")
  groups = grouped(found["rows"])
  panels = page.subplots(1, 2)
  titles = {
    "explained": "explained variance",
    "recovered": "cosine of embeddings that is recovered",
  }
  for ax, (column, title) in zip(panels, titles.items()):
    for variant in dict.fromkeys(name for name, _ in groups):
      of = lambda key, variant=variant: np.array(
        [
          [row[key] for row in rows]
          for (name, _), rows in groups.items()
          if name == variant
        ]
      )
      l0, values = of("l0").mean(1), of(column)
      order = l0.argsort()
      l0, values = l0[order], values[order]
      (line,) = ax.plot(l0, values.mean(1), marker="o", label=variant)
      band = values.min(1), values.max(1)
      ax.fill_between(l0, *band, alpha=0.2, color=line.get_color())
    ax.set(xlabel="active latents of a token", ylabel=title)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.grid(alpha=0.3)
  panels[0].legend()
  page.suptitle(
    "Means over seeds; bands from the least to the most", fontsize=9
  )
  page.savefig(path, dpi=150)


def best(rows: Sequence[Mapping], variant: str, l0: float) -> Mapping:
  """Of the level whose L0 is nearest, the seed that recovers most."""
  groups = [own for (n, _), own in grouped(rows).items() if n == variant]
  mean = lambda own: np.mean([row["l0"] for row in own])
  own = min(groups, key=lambda own: abs(mean(own) - l0))
  return max(own, key=lambda row: row["recovered"])


def write(
  found: Mapping[str, Any], page: Mapping[str, Any], workdir: pathlib.Path
) -> None:
  """Prints the table, and keeps it, a picture, and pages of latents."""
  shown = table(found)
  print(shown)
  files.write(workdir / "table.txt", shown + "\n")
  draw(found, workdir / "frontier.png")
  for variant in dict.fromkeys(row["variant"] for row in found["rows"]):
    row = best(found["rows"], variant, page["l0"])
    at = row["variant"], row["level"], row["seed"]
    html = dictionary_page.page(
      f"{at[0]} at {at[1]}, seed {at[2]}",
      sparse_coding.load(kept_at(workdir, *at)),
      *found["validation"],
      found["tokenizer"],
      latents=page["latents"],
      passages=page["passages"],
    )
    files.write(workdir / f"latents_{variant}.html", html)
  print(f"Rows, a picture and pages of latents are in {workdir}.")


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  logging.set_verbosity(logging.WARNING)  # Orbax tells of every file it moves
  config, workdir = flags.FLAGS.config, pathlib.Path(flags.FLAGS.workdir)
  found = run(config, workdir, stopped=training.stop_on_sigterm())
  if found is None:
    print(f"Stopped; the same command resumes in {workdir}.")
  else:
    write(found, config.page, workdir)


if __name__ == "__main__":
  config_flags.DEFINE_config_file(
    "config",
    None,
    "What to train, and on what: a file with a get_config().",
    # Levels and settings of variants that the file does not name.
    accept_new_attributes=True,
    lock_config=False,
  )
  flags.DEFINE_string("workdir", None, "Where everything is kept.")
  flags.mark_flags_as_required(["config", "workdir"])
  app.run(main)
