"""What a task is: data, a loss, and metrics."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
from typing import Any

import grain
import jax
import numpy as np

Batch = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Task:
  """Data and what is measured on it.

  Attributes:
    train: (seed) -> endless batches, whose order is the seed's.
    validation: batches of one size, so the mean over batches is exact.
    metrics: (model, batch) -> f32 means over the batch; "loss" is trained on.
    model: the settings of a model that the data fixes, as its input size.
    tokens: how many times an example goes through each weight: its length.
  """

  train: Callable[[int], grain.MapDataset]
  validation: Sequence[Batch]
  metrics: Callable[[Any, Batch], dict[str, jax.Array]]
  model: Mapping[str, int]
  tokens: int = 1

  def train_iterator(self, seed: int) -> grain.DatasetIterator:
    """Training batches in order; its state can be saved and restored."""
    # One thread keeps two batches ready.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return iter(self.train(seed).to_iter_dataset(options))


class _ShuffledBatches:
  """Endless batches of a source that takes an array of indices.

  Each epoch has an order of its own, and leaves out the examples that fill
  no batch. Grain's own shuffle takes 40 microseconds for every example.
  """

  def __init__(self, source, batch_size: int, seed: int):
    self._source, self._size, self._seed = source, batch_size, seed
    self._order = functools.lru_cache(maxsize=2)(self._shuffled)

  def __len__(self) -> int:
    return 1 << 40

  def __getitem__(self, index: int) -> Batch:
    batches = max(1, len(self._source) // self._size)
    epoch, batch = divmod(int(index), batches)
    # Where there are fewer examples than a batch takes, they come again.
    order = np.resize(self._order(epoch), max(len(self._source), self._size))
    return self._source[order[batch * self._size :][: self._size]]

  def _shuffled(self, epoch: int) -> np.ndarray:
    generator = np.random.default_rng((self._seed, epoch))
    return generator.permutation(len(self._source))


def endless_batches(source, batch_size: int):
  """Returns `Task.train` for a source that takes an array of indices."""
  return lambda seed: grain.MapDataset.source(
    _ShuffledBatches(source, batch_size, seed)
  )
