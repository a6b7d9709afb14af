"""From a config to what trains: a task, a model, an optimizer, two steps."""

from collections.abc import Callable
import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from experiments import models
from experiments import optimizers
from experiments import settings
from experiments import tasks
from sparsejax import weights

FIELDS = (
  "batch_size",
  "checkpoint_every",
  "eval_every",
  "log_every",
  "method",
  "model",
  "optimizer",
  "seed",
  "steps",
  "task",
)
COUNTS = ("batch_size", "checkpoint_every", "eval_every", "log_every", "steps")


@dataclasses.dataclass(frozen=True)
class Experiment:
  """The parts of a run; its state is (params, opt_state), dicts of arrays.

  Attributes:
    task: the data and the metrics.
    init: (seed) -> state.
    step: (params, opt_state, batch) -> (params, opt_state, metrics); the
      first two are donated.
    evaluate: (params, opt_state) -> validation metrics as floats.
    masks: (params, opt_state) -> bools like the parameters, ones where dense.
    summary: (params, opt_state) -> the method's own, or None for dense.
    other_flops: of a forward pass of one example, beyond the weights.
  """

  task: tasks.Task
  init: Callable
  step: Callable
  evaluate: Callable
  masks: Callable
  summary: Callable
  other_flops: float


def check(config: ml_collections.ConfigDict) -> None:
  """Raises ValueError where a field is unknown, missing or out of range."""
  # A config may have `sparsity` at the top, which its method follows, since
  # it is what one changes most: --config.sparsity=0.95.
  follows = "sparsity" in config.get("method", {})
  takes = FIELDS + ("sparsity",) * follows
  settings.check_fields("", config, takes=takes, required=FIELDS)
  for field in COUNTS:
    if config[field] < 1:
      raise ValueError(f"config.{field} takes 1 or more; got {config[field]}.")
  if "sparsity" in config and config.sparsity != config.method.sparsity:
    raise ValueError(
      f"config.sparsity={config.sparsity} and config.method.sparsity="
      f"{config.method.sparsity} differ; set the first alone."
    )


def make(config: ml_collections.ConfigDict) -> Experiment:
  """The experiment of a config, as configs/base.py begins it.

  Raises:
    ValueError: naming the field that is wrong, and what it takes.
  """
  check(config)
  task = settings.call(
    "task", config.task, tasks.TASKS, batch_size=config.batch_size
  )

  def model(seed):
    given = {"rngs": nnx.Rngs(jax.random.key(seed))} | task.model
    return settings.call("model", config.model, models.MODELS, **given)

  def optimizer(seed):
    key = jax.random.fold_in(jax.random.key(seed), 1)
    given = {"steps": config.steps, "key": key}
    given["balance_rate"] = getattr(shapes, "balance_rate", None)
    return optimizers.make(config.optimizer, config.method, **given)

  @jax.jit  # one program, not hundreds
  def init(seed):
    params = nnx.to_pure_dict(nnx.state(model(seed), nnx.Param))
    opt_state = optimizer(seed).init(params)
    return seen(params, opt_state), opt_state

  # Each seed's optimizer differs in its initial state alone.
  shapes = nnx.eval_shape(lambda: model(0))
  tx = optimizer(config.seed)
  # Beside the parameters a mixture has the step of training, and what a call
  # says of itself, which no call reads.
  graph, _, steps, rest = nnx.split(shapes, nnx.Param, models.Step, ...)
  if config.method.name == "dense":
    seen = lambda params, opt_state: params
    masks = lambda params, _: jax.tree.map(lambda p: jnp.ones(p.shape), params)
    summary = lambda params, opt_state: None
  else:
    seen = lambda params, opt_state: weights.sparse_params(opt_state, params)
    masks = lambda params, opt_state: weights.masks(opt_state, params)
    summary = lambda params, opt_state: weights.summary(opt_state, params)

  def measured(params, opt_state, batch):
    zeros = lambda x: jnp.zeros(x.shape, x.dtype)
    model = nnx.merge(
      graph,
      params,
      jax.tree.map(lambda _: optimizers.step(opt_state), steps),
      jax.tree.map(zeros, rest),
    )
    values = task.metrics(model, batch)
    return values | models.reported(model)

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params, opt_state, batch):
    def loss(params):
      values = measured(params, opt_state, batch)
      return values["loss"] + values.get("auxiliary_loss", 0), values

    grad = jax.grad(loss, has_aux=True)
    grads, values = grad(seen(params, opt_state))
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, values

  @jax.jit
  def evaluate_batch(params, opt_state, batch):
    return measured(seen(params, opt_state), opt_state, batch)

  def evaluate(params, opt_state):
    values = [evaluate_batch(params, opt_state, b) for b in task.validation]
    mean = lambda *leaves: float(np.mean(leaves))
    return jax.tree.map(mean, *values)

  return Experiment(
    task=task,
    init=init,
    step=step,
    evaluate=evaluate,
    masks=jax.jit(masks),
    summary=summary,
    other_flops=shapes.other_flops(task.tokens),
  )
