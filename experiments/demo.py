"""Trains a dense and a 90% sparse Transformer side by side on real text.

  python -m experiments.demo --workdir=runs/demo

Both read the same bytes in the same order: Python's own standard library.
The sparse one is RigL's, with an Erdős-Rényi budget. It takes minutes; the
same command resumes a run that was stopped.
"""

import pathlib

from absl import app
from absl import flags
from absl import logging
import tqdm

from configs import text_dense
from configs import text_rigl
from experiments import report
from experiments import summaries
from experiments import training
from experiments import workdir as workdirs


def small(config, steps):
  """The same experiment, sized for two cores and minutes."""
  config.steps = steps
  config.eval_every = max(1, steps // 12)
  config.checkpoint_every = max(1, steps // 3)
  config.task.sequence_length = 64
  config.task.validation_batches = 16
  config.model.depth = 2
  config.optimizer.learning_rate = 1e-2
  config.optimizer.warmup_steps = steps // 10
  if config.method.name == "rigl":
    config.method.every = max(1, steps // 24)
    config.method.until = 3 * steps // 4
  return config


def main(argv):
  del argv
  logging.set_verbosity(logging.WARNING)
  steps, workdir = flags.FLAGS.steps, pathlib.Path(flags.FLAGS.workdir)
  configs = {
    "dense": small(text_dense.get_config(), steps),
    "rigl": small(text_rigl.get_config(), steps),
  }
  stopped = training.stop_on_sigterm()
  runs = {
    name: training.train(config, workdir / name, stopped=stopped)
    for name, config in configs.items()
  }
  bars = {
    name: tqdm.tqdm(total=steps, desc=name, unit="step", position=place)
    for place, name in enumerate(runs)
  }
  # In turns, so that both have met the same other work on the machine.
  while runs:
    for name in list(runs):
      if (record := next(runs[name], None)) is None:
        del runs[name]
        continue
      training.show(bars[name], record)
  for bar in bars.values():
    bar.close()
  finished = {
    name: [(summaries.read(path), workdirs.read_metrics(path))]
    for name, path in ((name, workdir / name) for name in configs)
  }
  if any(summary is None for ((summary, _),) in finished.values()):
    print(f"Stopped; the same command resumes the runs in {workdir}.")
    return
  print(report.compare(workdir, finished, "validation_bits_per_byte"))
  print(f"The curves are in {workdir / 'curves.png'}; each run has a directory")
  print("of metrics.jsonl, TensorBoard events and Orbax checkpoints beside it.")


if __name__ == "__main__":
  flags.DEFINE_string("workdir", "runs/demo", "Where it is kept.")
  flags.DEFINE_integer("steps", 720, "Training steps of each.")
  app.run(main)
