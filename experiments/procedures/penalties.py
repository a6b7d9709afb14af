"""Training under a penalty that grows, then pruning: what it costs."""

import functools

import jax
import jax.numpy as jnp
import optax

from experiments.procedures import mnist1d_mlp
from experiments.procedures import under_masks
from sparsejax import weights

WIDTH, DEPTH = 100, 2
SPARSITY = 0.95
STEPS, FINE_TUNING = 2_000, 1_000
EPOCH = 40  # steps, with 4,000 examples
TIMES = 100  # by which the penalty grows
ARMS = ("hypersparse", "l1", "none")


def add_l1(strength) -> optax.GradientTransformation:
  """Adds the gradient of the sum of absolute weights, but biases'."""

  def update(updates, state, params):
    slope = lambda u, p: (
      u + strength(state.count) * jnp.sign(p) if p.ndim >= 2 else u
    )
    count = optax.safe_increment(state.count)
    return jax.tree.map(slope, updates, params), state._replace(count=count)

  init = lambda _: optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))
  return optax.GradientTransformation(init, update)


PENALTIES = {
  "hypersparse": functools.partial(weights.add_hypersparse, sparsity=SPARSITY),
  "l1": add_l1,
  "none": lambda _: optax.identity(),
}


@functools.cache
def trainer(arm: str, steps: int):
  """`under_masks.trainer` of SGD at a constant rate under a penalty."""

  def optimizer(learning_rate, strength):
    # Up to `strength` in the last epoch, by the same factor in each.
    last = max(1, (steps - 1) // EPOCH)
    rise = lambda count: strength * TIMES ** ((count // EPOCH) / last - 1.0)
    return optax.chain(
      optax.clip_by_global_norm(1.0),  # of the loss alone
      PENALTIES[arm](rise),
      optax.sgd(learning_rate, momentum=0.9),
    )

  return under_masks.trainer(mnist1d_mlp.setting(WIDTH, DEPTH).loss, optimizer)


def measure(
  seed: int,
  *,
  strength: float,
  learning_rate: float = 0.1,
  steps: int = STEPS,
  fine_tuning: int = FINE_TUNING,
) -> dict[str, dict[str, float]]:
  """Figures of each arm: after pruning, and after fine-tuning.

  Args:
    seed: of the initialization and of the order of the data.
    strength: of the penalty in its last epoch; a hundredth in the first.
    learning_rate: of SGD, constant; in fine-tuning its peak.
    steps: under the penalty.
    fine_tuning: steps under the mask.
  """
  setting = mnist1d_mlp.setting(WIDTH, DEPTH)
  params, order = setting.init(seed), setting.order(seed, steps)
  dense, found = under_masks.dense_masks(params), {}
  for arm in ARMS:
    before, _ = trainer(arm, steps)(
      params,
      dense,
      setting.data,
      order,
      learning_rate=learning_rate,
      strength=strength,
    )
    masks = under_masks.prune(before, dense, SPARSITY, scope="global")
    pruned = under_masks.masked(before, masks)
    tuned, _ = mnist1d_mlp.trainer(WIDTH, DEPTH, fine_tuning)(
      pruned,
      masks,
      setting.data,
      setting.order(seed + 1_000_000, fine_tuning),
      learning_rate=learning_rate,
    )
    dense_values, values = setting.measure(before), setting.measure(pruned)
    found[arm] = setting.measure(tuned) | {
      "dense_accuracy": dense_values["accuracy"],
      "pruned_accuracy": values["accuracy"],
      "loss_change": values["loss"] - dense_values["loss"],
    }
  return found
