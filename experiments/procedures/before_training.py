"""Masks chosen before training: what they collapse, and what then trains."""

import functools

import jax
import jax.numpy as jnp

from experiments.procedures import mnist1d_mlp
from experiments.procedures import under_masks
from sparsejax import weights

WIDTH, DEPTH = 400, 4
SPARSITY, STEPS = 0.999, 1_000
EXAMPLES = 1_000  # that scores of a loss are of
ARMS = ("synflow", "snip", "grasp", "magnitude", "random")


@functools.cache
def _chosen(width: int, depth: int, sparsity: float):
  """(params, batch, key) -> masks by each method, compiled together."""
  setting = mnist1d_mlp.setting(width, depth)
  ones = jnp.ones((1, setting.data["features"].shape[-1]))
  absolute = lambda params: jax.tree.map(jnp.abs, params)

  @jax.jit
  def choose(params, batch, key):
    given = {"sparsity": sparsity}
    return {
      "synflow": weights.synflow(setting.apply, params, ones, **given),
      "snip": weights.snip(setting.loss, params, batch, **given),
      "grasp": weights.grasp(setting.loss, params, batch, **given),
      "magnitude": weights.choose_masks(absolute(params), **given),
      "random": weights.random_masks(
        key, params, sparsity=sparsity, distribution="uniform"
      ),
    }

  return choose


def kernels(masks) -> list[jax.Array]:
  """Masks of the weights [inputs, outputs], from the first layer on."""
  layers = masks["hidden"]
  ordered = [layers[name] for name in sorted(layers, key=int)]
  return [layer["kernel"] for layer in [*ordered, masks["readout"]]]


def collapsed(masks) -> int:
  """How many layers have no weight left."""
  return sum(not bool(kernel.any()) for kernel in kernels(masks))


def connected(masks) -> float:
  """The share of the weights left that lie on a path from input to output."""
  layers = [kernel.astype(bool) for kernel in kernels(masks)]
  reached, before = jnp.ones(len(layers[0]), bool), []
  for kernel in layers:
    before.append(reached)
    reached = (kernel & reached[:, None]).any(0)
  used, count = jnp.ones(layers[-1].shape[1], bool), 0
  for kernel, reached in zip(reversed(layers), reversed(before), strict=True):
    live = kernel & reached[:, None] & used
    count += int(live.sum())
    used = (kernel & used).any(1)
  return count / max(1, sum(int(kernel.sum()) for kernel in layers))


def measure(
  seed: int,
  *,
  learning_rate: float,
  width: int = WIDTH,
  depth: int = DEPTH,
  sparsity: float = SPARSITY,
  steps: int = STEPS,
) -> dict[str, dict[str, float]]:
  """Figures of each arm: its masks', and those of a training under them.

  Args:
    seed: of the initialization, of the examples and of the random masks.
    learning_rate: of Adam.
    width: of the MLP.
    depth: its hidden layers.
    sparsity: of all layers together, and of each layer of random masks.
    steps: of the training.
  """
  setting = mnist1d_mlp.setting(width, depth)
  params, order = setting.init(seed), setting.order(seed, steps)
  batch = setting.batch(seed, EXAMPLES)
  key = jax.random.key(seed)
  found = {}
  for arm, masks in _chosen(width, depth, sparsity)(params, batch, key).items():
    trained, _ = mnist1d_mlp.trainer(width, depth)(
      params, masks, setting.data, order, learning_rate=learning_rate
    )
    found[arm] = setting.measure(trained) | {
      "collapsed": collapsed(masks),
      "connected": connected(masks),
      "density": under_masks.density(masks),
    }
  return found
