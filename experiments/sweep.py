"""Runs configs times seeds, and compares them in a table and a picture.

  python -m experiments.sweep --seeds=3 --workdir=runs/sweep \
    --configs=configs/text_dense.py,configs/text_rigl.py --set=steps=1000

Each run is a process of its own with a directory of its own. The same command
goes on with what is not finished.
"""

import itertools
import pathlib
import subprocess
import sys

from absl import app
from absl import flags
import tqdm

from experiments import report
from experiments import summaries
from experiments import workdir as workdirs


def train(config: str, seed: int, fields: list[str], workdir) -> None:
  """Makes or finishes a run."""
  command = [sys.executable, "-m", "experiments.train", f"--config={config}"]
  command += [f"--config.seed={seed}", f"--workdir={workdir}"]
  command += [f"--config.{field}" for field in fields]
  done = subprocess.run(command, capture_output=True, text=True)
  if done.returncode or summaries.read(workdir) is None:
    raise RuntimeError(
      f"{' '.join(command)} did not finish:\n{done.stderr[-2_000:]}"
    )


def main(argv):
  del argv
  if flags.FLAGS.seeds < 2:
    raise ValueError(f"--seeds takes 2 or more; got {flags.FLAGS.seeds}.")
  stems = [pathlib.Path(config).stem for config in flags.FLAGS.configs]
  if len(set(stems)) < len(stems):
    raise ValueError(
      "--configs takes files of different names, which their runs are kept "
      f"under; got {', '.join(flags.FLAGS.configs)}."
    )
  workdir, metric = pathlib.Path(flags.FLAGS.workdir), flags.FLAGS.metric
  runs = {
    stem: [
      (config, seed, workdir / stem / str(seed))
      for seed in range(flags.FLAGS.seeds)
    ]
    for stem, config in zip(stems, flags.FLAGS.configs)
  }
  for run in tqdm.tqdm([*itertools.chain(*runs.values())], unit="run"):
    config, seed, directory = run
    train(config, seed, flags.FLAGS.set, directory)
  finished = {
    name: [
      (summaries.read(path), workdirs.read_metrics(path)) for *_, path in seeds
    ]
    for name, seeds in runs.items()
  }
  print(report.compare(workdir, finished, metric))
  print(f"The curves of {metric} are in {workdir / 'curves.png'}.")


if __name__ == "__main__":
  flags.DEFINE_list("configs", None, "Config files.")
  flags.DEFINE_integer("seeds", 3, "How many of each: 0, 1, ...")
  flags.DEFINE_multi_string("set", [], "field=value, for all of them.")
  flags.DEFINE_string("workdir", "runs/sweep", "Where runs are kept.")
  flags.DEFINE_string("metric", "validation_loss", "What is compared.")
  flags.mark_flag_as_required("configs")
  app.run(main)
