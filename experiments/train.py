"""Trains what a config describes, and resumes where it was stopped.

  python -m experiments.train --config=configs/text_rigl.py \
    --config.sparsity=0.95 --workdir=runs/rigl_95

The work directory receives config.json, metrics.jsonl, TensorBoard events,
Orbax checkpoints, and at the end summary.json. The same command resumes a
run that was killed, and it ends as if it never had been.
"""

import pathlib

from absl import app
from absl import flags
from absl import logging
from ml_collections import config_flags
import tqdm

from experiments import report
from experiments import summaries
from experiments import training


def main(argv):
  del argv
  logging.set_verbosity(logging.WARNING)  # Orbax tells of every file it moves
  config, workdir = flags.FLAGS.config, pathlib.Path(flags.FLAGS.workdir)
  stopped = training.stop_on_sigterm()
  with tqdm.tqdm(total=config.steps, unit="step", mininterval=0.5) as bar:
    for record in training.train(config, workdir, stopped=stopped):
      training.show(bar, record)
  if summary := summaries.read(workdir):
    if summary["layers"]:
      print("All parameters, biases and embeddings included:")
      print(summary["layers"], end="\n\n")
    print(report.table({workdir.name: [summary]}))
  else:
    print(f"Stopped; the same command resumes the run in {workdir}.")


if __name__ == "__main__":
  config_flags.DEFINE_config_file(
    "config",
    None,
    "What to train: a file with a get_config().",
    # A setting that a config file leaves at its default can be given too; one
    # that does not exist is refused where it is read, with what there is.
    accept_new_attributes=True,
    lock_config=False,
  )
  flags.DEFINE_string("workdir", None, "Where the run is kept.")
  flags.mark_flags_as_required(["config", "workdir"])
  app.run(main)
