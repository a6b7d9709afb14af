"""The optimizers of a config, and the methods that wrap them."""

from collections.abc import Mapping
import inspect
from typing import Any

import jax
import optax

from experiments import settings
from sparsejax import routing
from sparsejax import weights


def _schedule(learning_rate, warmup_steps, steps):
  """Linear warmup, then a cosine down to a tenth of the peak."""
  return optax.warmup_cosine_decay_schedule(
    0.0 if warmup_steps else learning_rate,
    learning_rate,
    warmup_steps,
    max(steps, warmup_steps + 1),
    end_value=learning_rate / 10,
  )


def adamw(
  *,
  steps: int,
  learning_rate: float,
  warmup_steps: int = 0,
  weight_decay: float = 0.0,
  b1: float = 0.9,
  b2: float = 0.999,
  clip: float = 1.0,
) -> optax.GradientTransformation:
  """AdamW, after clipping by the global norm."""
  schedule = _schedule(learning_rate, warmup_steps, steps)
  return optax.chain(
    optax.clip_by_global_norm(clip),
    optax.adamw(schedule, b1=b1, b2=b2, weight_decay=weight_decay),
  )


def sgd(
  *,
  steps: int,
  learning_rate: float,
  warmup_steps: int = 0,
  weight_decay: float = 0.0,
  momentum: float = 0.9,
  clip: float = 1.0,
) -> optax.GradientTransformation:
  """SGD with momentum; weight decay is a part of the gradient."""
  schedule = _schedule(learning_rate, warmup_steps, steps)
  return optax.chain(
    optax.clip_by_global_norm(clip),
    optax.add_decayed_weights(weight_decay),
    optax.sgd(schedule, momentum=momentum),
  )


OPTIMIZERS = {"adamw": adamw, "sgd": sgd}


def dense(inner: optax.GradientTransformation) -> optax.GradientTransformation:
  """No sparsity: the optimizer as it is."""
  return inner


METHODS = {
  "dense": dense,
  "dst_ee": weights.dst_ee,
  "gradual_magnitude": weights.gradual_magnitude,
  "iss_p": weights.iss_p,
  "mask_decay": weights.mask_decay,
  "rigl": weights.rigl,
  "set_": weights.set_,
  "sparse_evolutionary": weights.sparse_evolutionary,
  "sr_ste": weights.sr_ste,
  "srigl": weights.srigl,
  "static": weights.static,
  "structure_decay": weights.structure_decay,
  "top_kast": weights.top_kast,
}


def make(
  optimizer: Mapping[str, Any],
  method: Mapping[str, Any],
  *,
  steps: int,
  key: jax.Array,
  balance_rate: float | None = None,
) -> optax.GradientTransformation:
  """The optimizer of a config, wrapped by its method.

  Args:
    optimizer: `config.optimizer`.
    method: `config.method`.
    steps: how long the learning-rate schedule is.
    key: of the method's random choices, where it makes any.
    balance_rate: None, or how far a step moves the `balance_bias` of mixtures
      of experts, which the optimizer and its method then do not see.
  """
  # Settings by pattern, as the sparsity may be, are mappings again.
  method = getattr(method, "to_dict", lambda: method)()
  inner = settings.call("optimizer", optimizer, OPTIMIZERS, steps=steps)
  function = METHODS.get(method.get("name"), dense)
  draws = "key" in inspect.signature(function).parameters
  given = {"key": key} if draws else {}
  tx = settings.call("method", method, METHODS, inner, **given)
  if balance_rate is None:
    return tx
  own = {"balance_bias": routing.balance_bias(balance_rate), "others": tx}
  return optax.partition(own, _labels)


def _labels(params):
  of = lambda path, _: (
    "balance_bias" if "balance_bias" in jax.tree_util.keystr(path) else "others"
  )
  return jax.tree.map_with_path(of, params)


def step(opt_state: optax.OptState) -> jax.Array:
  """How many updates were made: the count of the learning rate's schedule."""
  schedules = lambda path, _: (
    getattr(path[-1], "tuple_name", None) == "ScaleByScheduleState"
  )
  return optax.tree.get(opt_state, "count", filtering=schedules)
