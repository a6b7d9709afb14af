"""Sparse model soups against the runs they could have been."""

import numpy as np

from experiments.procedures import mnist1d_mlp
from experiments.procedures import under_masks

WIDTH, DEPTH = 150, 2
DENSE, RETRAIN = 2_000, 600  # steps
FRACTIONS = (0.5, 0.5, 0.6)  # of what is left
DECAYS = (0.0, 1e-4, 5e-4)  # of weights, a copy each


def measure(
  seed: int, *, learning_rate: float, dense: int = DENSE, retrain: int = RETRAIN
) -> dict[str, dict[str, float]]:
  """Figures of each arm after all cycles of pruning.

  Args:
    seed: of the initialization and of the order of the data.
    learning_rate: of SGD with momentum, at its peak.
    dense: steps of the training before the first pruning.
    retrain: steps of a copy in a phase.

  Returns:
    Of the soup; of single runs of pruning, a mean over as many as the soup has
    copies, of their orders and weight decays; and of one whose phases take as
    many steps as all copies of the soup have together.
  """
  setting, copies = mnist1d_mlp.setting(WIDTH, DEPTH), len(DECAYS)
  compiled = {
    steps: mnist1d_mlp.trainer(WIDTH, DEPTH, steps)
    for steps in (dense, retrain, copies * retrain)
  }

  def trained(params, masks, steps, order, decay):
    return compiled[steps](
      params,
      masks,
      setting.data,
      setting.order(order, steps),
      learning_rate=learning_rate,
      weight_decay=decay,
    )[0]

  def pruned(copies, steps, first=0):
    def train(params, masks, phase, copy):
      own = seed + 100_000 * (1 + first + copy) + 10_000 * phase
      return trained(params, masks, steps, own, DECAYS[first + copy])

    *_, last = under_masks.soups(
      train, start, fractions=FRACTIONS, copies=copies
    )
    return setting.measure(last.params)

  params = setting.init(seed)
  start = trained(
    params, under_masks.dense_masks(params), dense, seed, DECAYS[1]
  )
  single = [pruned(1, retrain, first) for first in range(copies)]
  return {
    "soup": pruned(copies, retrain),
    "single": {
      n: float(np.mean([run[n] for run in single])) for n in single[0]
    },
    "longer": pruned(1, copies * retrain, 1),
  }
