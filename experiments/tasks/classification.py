"""A classification task made of arrays in memory."""

import numpy as np
import optax

from experiments.tasks import task


class Examples:
  """Features [n, d] f32 and labels [n] int32 as a source of examples."""

  def __init__(self, features: np.ndarray, labels: np.ndarray):
    self.features = features.astype(np.float32)
    self.labels = labels.astype(np.int32)

  def __len__(self) -> int:
    return len(self.labels)

  def __getitem__(self, index) -> task.Batch:
    return {"features": self.features[index], "labels": self.labels[index]}


def metrics(model, batch):
  """Mean cross-entropy in nats, and the share of right answers."""
  logits, labels = model(batch["features"]), batch["labels"]
  loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  right = logits.argmax(-1) == labels
  return {"loss": loss.mean(), "accuracy": right.mean()}


def make(train: Examples, validation: Examples, *, batch_size):
  """A Task; the labels are 0 to the highest of the training examples."""
  return task.Task(
    train=task.endless_batches(train, batch_size),
    validation=[validation[:]],
    metrics=metrics,
    model={
      "inputs": train.features.shape[-1],
      "classes": int(train.labels.max()) + 1,
    },
  )
