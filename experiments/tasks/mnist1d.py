"""MNIST-1D: ten noisy, shifted and sheared line shapes of 40 points."""

import functools
import random

from mnist1d import data
import numpy as np

from experiments.tasks import classification
from experiments.tasks import task


@functools.cache  # seconds
def _generate(examples: int, seed: int) -> dict[str, np.ndarray]:
  arguments = data.get_dataset_args()
  arguments.num_samples, arguments.seed = examples, seed
  # The package draws from the global generators: leave them as they were.
  states = np.random.get_state(), random.getstate()
  made = data.make_dataset(arguments)
  np.random.set_state(states[0])
  random.setstate(states[1])
  return made


def make(
  *, batch_size: int, examples: int = 5_000, data_seed: int = 42
) -> task.Task:
  """Four fifths of the examples are for training.

  Args:
    batch_size: examples a training step.
    examples: how many are generated; a multiple of ten, at least 50.
    data_seed: of the generated data; 42 and 5,000 give the published set.
  """
  if examples < 50 or examples % 10:
    raise ValueError(
      "config.task.examples takes a multiple of ten, at least 50; got "
      f"{examples}."
    )
  made = _generate(examples, data_seed)
  return classification.make(
    classification.Examples(made["x"], made["y"]),
    classification.Examples(made["x_test"], made["y_test"]),
    batch_size=batch_size,
  )
