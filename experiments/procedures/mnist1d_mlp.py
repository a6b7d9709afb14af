"""MNIST-1D and an MLP as pure functions: what procedures train in seconds."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

from flax import nnx
import jax
import numpy as np
import optax

from experiments.models import mlp
from experiments.procedures import under_masks
from experiments.tasks import mnist1d
from experiments.tasks import task

BATCH = 100


@dataclasses.dataclass(frozen=True)
class Setting:
  """Data and a model.

  Attributes:
    data: training examples, arrays [examples, ...].
    validation: likewise.
    init: (seed) -> parameters, a dict of arrays.
    apply: (params, features) -> logits.
    loss: (params, batch) -> the mean cross-entropy.
    measure: (params) -> {"accuracy", "loss"} of the validation data.
  """

  data: task.Batch
  validation: task.Batch
  init: Callable[[int], Any]
  apply: Callable
  loss: Callable
  measure: Callable[[Any], dict[str, float]]

  def order(self, seed: int, steps: int) -> np.ndarray:
    """Rows of the data for each step, int32 [steps, BATCH], by epochs."""
    rows = len(self.data["labels"])
    generator = np.random.default_rng(seed)
    epochs = -(-steps * BATCH // rows)
    order = [generator.permutation(rows) for _ in range(epochs)]
    order = np.concatenate(order)[: steps * BATCH]
    return order.reshape(steps, BATCH).astype(np.int32)

  def batch(self, seed: int, size: int) -> task.Batch:
    """Training examples, drawn without replacement."""
    rows = np.random.default_rng((seed, 1)).permutation(
      len(self.data["labels"])
    )[:size]
    return {name: x[rows] for name, x in self.data.items()}


@functools.cache  # one setting for all seeds: what it compiles is kept
def setting(
  width: int, depth: int, examples: int = 5_000, top_k: int = 0
) -> Setting:
  """An MLP of `depth` hidden layers on MNIST-1D."""
  made = mnist1d.make(batch_size=examples * 4 // 5, examples=examples)
  data, (validation,) = made.train(0)[0], made.validation

  def model(seed):
    rngs = nnx.Rngs(jax.random.key(seed))
    return mlp.MLP(
      width=width, depth=depth, top_k=top_k, rngs=rngs, **made.model
    )

  graph, _ = nnx.split(nnx.eval_shape(lambda: model(0)))

  def apply(params, features):
    return nnx.merge(graph, params)(features)

  def metrics(params, batch):
    return made.metrics(functools.partial(apply, params), batch)

  measured = jax.jit(lambda params: metrics(params, validation))
  return Setting(
    data=data,
    validation=validation,
    init=jax.jit(lambda seed: nnx.to_pure_dict(nnx.state(model(seed)))),
    apply=apply,
    loss=lambda params, batch: metrics(params, batch)["loss"],
    measure=lambda params: {n: float(x) for n, x in measured(params).items()},
  )


def adam(learning_rate) -> optax.GradientTransformation:
  """Adam at a constant rate."""
  return optax.chain(
    optax.scale_by_adam(), optax.scale_by_learning_rate(learning_rate)
  )


def sgd(steps: int) -> Callable:
  """SGD with momentum, a tenth of warmup, and a cosine down to zero."""
  shape = optax.warmup_cosine_decay_schedule(0, 1, max(1, steps // 10), steps)

  def optimizer(learning_rate, weight_decay=0.0):
    return optax.chain(
      optax.clip_by_global_norm(1.0),
      optax.add_decayed_weights(weight_decay),
      optax.trace(0.9),
      optax.scale_by_schedule(lambda count: -learning_rate * shape(count)),
    )

  return optimizer


@functools.cache
def trainer(width: int, depth: int, schedule: int | None = None) -> Callable:
  """`under_masks.trainer` of a setting: Adam, or SGD for so many steps."""
  optimizer = adam if schedule is None else sgd(schedule)
  return under_masks.trainer(setting(width, depth).loss, optimizer)
