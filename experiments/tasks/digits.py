"""Handwritten digits of 8x8 pixels, which scikit-learn carries."""

import numpy as np
from sklearn import datasets

from experiments.tasks import classification
from experiments.tasks import task


def make(*, batch_size: int) -> task.Task:
  """1,437 training and 360 validation images, 64 features each.

  Args:
    batch_size: images a training step.
  """
  features, labels = datasets.load_digits(return_X_y=True)
  order = np.random.default_rng(0).permutation(len(labels))
  features, labels = features[order] / 8 - 1, labels[order]
  return classification.make(
    classification.Examples(features[360:], labels[360:]),
    classification.Examples(features[:360], labels[:360]),
    batch_size=batch_size,
  )
