"""What sparse layers cost in time, against dense ones that do the same.

Contestants run warm and in turn, and each run waits for its result; a figure is
the median of a seed's runs. Nothing here is run by tests but for the shapes.
"""

from collections.abc import Callable, Mapping
import functools
import os
import pathlib

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.sparse

from experiments.bench import condensed as bench
from experiments.bench import timing
from experiments.procedures import mnist1d_mlp
from experiments.tasks import classification
from sparsejax import weights

ROUNDS = 11

# The last layer of a feed-forward block of ViT-B/16, as in SRigL's benchmark.
SHAPE, SPARSITY = (3072, 768), 0.9

WIDTH, DEPTH = 2_048, 3
BLOCK, RANK = 32, 32
STEPS = 200


def about() -> dict[str, str]:
  """The machine that times are of."""
  info, model = pathlib.Path("/proc/cpuinfo"), "unknown"
  if info.exists():
    lines = info.read_text().splitlines()
    models = [x.split(":")[1].strip() for x in lines if x[:10] == "model name"]
    model = models[0] if models else model
  cores = len(os.sched_getaffinity(0))
  return {
    "Machine": f"{model}, {cores} cores, {jax.default_backend()}, float32",
    "Times": f"medians of {ROUNDS} warm, interleaved runs a seed",
  }


def medians(
  contestants: Mapping[str, timing.Contestant], rounds: int
) -> dict[str, float]:
  """Milliseconds of each, run in turn."""
  first, *_ = contestants
  peers = {n: run for n, run in contestants.items() if n != first}
  case = timing.Case("", contestants[first], peers, {})
  found = timing.race(case, rounds)["median_ms"]
  return {first: found.pop("ours"), **found}


def layers(seed: int, shape: tuple[int, int], sparsity: float) -> dict:
  """(function, weights) of each form of one layer, for x [batch, inputs]."""
  weight, kernel = bench.layer.__wrapped__(
    "constant fan-in", shape, sparsity, seed
  )
  # A model that keeps its mask, as while it trains.
  own = jax.random.normal(jax.random.key(seed), shape)
  masked = {"kernel": jnp.where(kernel != 0, kernel, own), "mask": kernel != 0}
  return {
    "condensed": (weights.condensed_matmul, weight),
    "dense": (jnp.matmul, masked["kernel"]),
    "masked": (
      lambda x, w: x @ jnp.where(w["mask"], w["kernel"], 0),
      masked,
    ),
    "csr": (None, scipy.sparse.csr_matrix(np.asarray(kernel).T)),
  }


def _csr(matrices, x) -> timing.Contestant:
  """SciPy's products of sparse matrices and a vector, on one thread."""

  def run(vector):
    for matrix in matrices:
      y = matrix @ vector
      if len(matrices) > 1:
        vector = np.tile(y / np.abs(y).max(), len(vector) // len(y))
    return y

  return timing.timed(run, np.asarray(x[0]))


@functools.cache
def _many(shape, sparsity, memory):
  """Layers that no cache holds, one behind the other."""
  count = max(1, memory // (4 * shape[0] * shape[1]))
  made = [layers(1_000 + i, shape, sparsity) for i in range(count)]
  x = jax.random.normal(jax.random.key(2), (1, shape[0]))
  found = {}
  for arm, (function, _) in made[0].items():
    kernels = [forms[arm][1] for forms in made]
    if function is None:
      found[arm] = _csr(kernels, x)
      continue

    @jax.jit
    def chain(x, kernels, function=function):
      for w in kernels:
        y = function(x, w)
        # Each layer waits for the one before it.
        x = jnp.tile(y / jnp.abs(y).max(), shape[0] // shape[1])
      return x

    found[arm] = timing.timed(chain, x, kernels)
  return found


def condensed(
  seed: int,
  *,
  shape: tuple[int, int] = SHAPE,
  sparsity: float = SPARSITY,
  memory: int = bench.MODEL,
  rounds: int = ROUNDS,
) -> dict[str, dict[str, float]]:
  """Milliseconds of one input through a layer, and through many of them.

  Args:
    seed: of the weights and the mask of the one layer.
    shape: inputs and outputs; the first a multiple of the second.
    sparsity: of the mask, which has constant fan-in.
    memory: bytes of the many layers' dense kernels.
    rounds: runs of each form.
  """
  x = jax.random.normal(jax.random.key(seed), (1, shape[0]))
  one = {
    arm: _csr([weight], x)
    if function is None
    else timing.timed(jax.jit(function), x, weight)
    for arm, (function, weight) in layers(seed, shape, sparsity).items()
  }
  found = {n: {"milliseconds": t} for n, t in medians(one, rounds).items()}
  many = medians(_many(shape, sparsity, memory), rounds)
  for arm, time in many.items():
    found[arm]["milliseconds_of_many"] = time
  return found


class Perceptron(nnx.Module):
  """Hidden layers of one width, of which all but the first are `layer`s."""

  def __init__(
    self, inputs: int, classes: int, width: int, depth: int, layer, rngs
  ):
    self.first = nnx.Linear(inputs, width, rngs=rngs)
    self.hidden = nnx.List(
      layer(width, width, rngs=rngs) for _ in range(depth - 1)
    )
    self.readout = nnx.Linear(width, classes, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    x = nnx.relu(self.first(x))
    for layer in self.hidden:
      x = nnx.relu(layer(x))
    return self.readout(x)


@functools.cache
def _compiled(arm: str, width: int, depth: int) -> tuple[Callable, ...]:
  """init(seed), step, train and measure of a network of one kind of layers."""
  setting = mnist1d_mlp.setting(8, 1)  # its data
  layer = nnx.Linear
  if arm == "pixelfly":
    layer = functools.partial(weights.Pixelfly, block=BLOCK, rank=RANK)

  def model(seed):
    rngs = nnx.Rngs(jax.random.key(seed))
    return Perceptron(40, 10, width, depth, layer, rngs)

  graph, _, rest = nnx.split(nnx.eval_shape(lambda: model(0)), nnx.Param, ...)

  def metrics(params, batch):
    return classification.metrics(nnx.merge(graph, params, rest), batch)

  def tx(rate):
    return mnist1d_mlp.adam(rate)

  def init(seed):
    params = nnx.to_pure_dict(nnx.state(model(seed), nnx.Param))
    return params, tx(0.0).init(params)

  def step(params, opt_state, batch, rate):
    grads = jax.grad(lambda p: metrics(p, batch)["loss"])(params)
    updates, opt_state = tx(rate).update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  def train(state, order, rate):
    def rows(state, rows):
      batch = jax.tree.map(lambda x: x[rows], data)
      return step(*state, batch, rate), None

    data = jax.tree.map(jnp.asarray, dict(setting.data))
    return jax.lax.scan(rows, state, order)[0]

  validated = lambda params: metrics(params, setting.validation)
  return tuple(map(jax.jit, (init, step, train, validated)))


@functools.cache  # arms that learn at other rates were still timed in turn
def _steps(seed: int, width: int, depth: int, rounds: int) -> dict[str, float]:
  """Milliseconds of a training step of each arm."""
  setting, contestants = mnist1d_mlp.setting(8, 1), {}
  rows = setting.order(seed, 1)[0]
  batch = {n: jnp.asarray(x[rows]) for n, x in setting.data.items()}
  for arm in ("pixelfly", "dense"):
    init, step, *_ = _compiled(arm, width, depth)
    contestants[arm] = timing.timed(step, *init(seed), batch, 1e-3)
  return medians(contestants, rounds)


def pixelfly(
  seed: int,
  *,
  learning_rate: float,
  width: int = WIDTH,
  depth: int = DEPTH,
  steps: int = STEPS,
  rounds: int = ROUNDS,
) -> dict[str, dict[str, float]]:
  """Milliseconds of a training step, and the accuracy after equal steps.

  Args:
    seed: of the initialization and of the order of the data.
    learning_rate: of Adam.
    width: of the hidden layers.
    depth: how many there are; all but the first differ between the arms.
    steps: of a training.
    rounds: steps of each that are timed.
  """
  setting, found = mnist1d_mlp.setting(8, 1), {}
  order = setting.order(seed, steps)
  for arm, time in _steps(seed, width, depth, rounds).items():
    init, _, train, validated = _compiled(arm, width, depth)
    params, _ = train(init(seed), order, learning_rate)
    found[arm] = {n: float(x) for n, x in validated(params).items()}
    found[arm]["parameters"] = sum(x.size for x in jax.tree.leaves(params))
    found[arm]["milliseconds"] = time
  return found
