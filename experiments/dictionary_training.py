"""Trains sparse autoencoders, those of equal shapes in one program."""

from collections.abc import Callable
import dataclasses
import functools
import inspect
import itertools
import pathlib

from flax import nnx
import grain
import jax
from jax import lax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import tqdm

from experiments import activations
from experiments import workdir as workdirs
from sparsejax import sparse_coding

RAMP = 0.2  # of the steps, over which a weight grows to its level
COOLDOWN = 0.2  # of the steps, over which the learning rate falls to 0


@dataclasses.dataclass(frozen=True)
class Variant:
  """How autoencoders of a kind are made.

  Attributes:
    make: the constructor.
    term: of the loss, whose weight the level is; None where the level is k.
  """

  make: Callable[..., sparse_coding.Autoencoder]
  term: str | None = None

  @property
  def level(self) -> str:
    """What the constructor calls the level."""
    return "k" if self.term is None else "weight"

  @property
  def settings(self) -> tuple[list[str], list[str]]:
    """What else it takes, and what of that it needs."""
    given = ("width", "latents", "settings", self.level)
    found = inspect.signature(self.make).parameters
    takes = {name: x for name, x in found.items() if name not in given}
    needs = [name for name, x in takes.items() if x.default is x.empty]
    return [*takes], needs


@dataclasses.dataclass(frozen=True)
class Program:
  """Trainings of a variant that are compiled as one.

  Attributes:
    variant: name of it.
    levels: each trained with each seed.
    seeds: how many.
  """

  variant: str
  levels: tuple[float, ...]
  seeds: int

  @property
  def name(self) -> str:
    return "_".join([self.variant, *map(str, self.levels)])

  @property
  def size(self) -> int:
    return len(self.levels) * self.seeds

  @property
  def trainings(self) -> list[tuple[str, float, int]]:
    """(variant, level, seed) of each."""
    return [
      (self.variant, *x)
      for x in itertools.product(self.levels, range(self.seeds))
    ]


VARIANTS = {
  "l1": Variant(sparse_coding.l1_sae, "l1_loss"),
  "gated": Variant(sparse_coding.gated_sae, "gate_l1"),
  "jump_relu": Variant(sparse_coding.jump_relu_sae, "l0_loss"),
  "top_k": Variant(sparse_coding.top_k_sae),
  "batch_top_k": Variant(sparse_coding.batch_top_k_sae),
  "hierarchical_top_k": Variant(sparse_coding.hierarchical_top_k_sae),
  "matryoshka": Variant(sparse_coding.matryoshka_sae),
  "mp": Variant(sparse_coding.mp_sae),
  "ort": Variant(sparse_coding.ort_sae),
}


def programs(config: ml_collections.ConfigDict) -> list[Program]:
  """What is compiled: a weight is an argument of a program, k is not."""
  found = []
  for name in config.variants:
    levels = tuple(config.levels[name])
    whole = VARIANTS[name].term is not None
    parts = [levels] if whole else [(level,) for level in levels]
    found += [Program(name, part, config.seeds) for part in parts]
  return found


class Training:
  """The trainings of a program: their state, and a step of all of them."""

  def __init__(
    self, program: Program, config: ml_collections.ConfigDict, mean: np.ndarray
  ):
    """Draws the dictionaries.

    Args:
      program: what is trained.
      config: as configs/sae_minilm.py has it.
      mean: [width], of the rows, at which the bias begins.
    """
    variant = VARIANTS[program.variant]
    self.trainings = program.trainings
    levels = jnp.array([level for _, level, _ in self.trainings], jnp.float32)
    seeds = jnp.array([seed for *_, seed in self.trainings])
    # A program of several levels has them as weights.
    made = functools.partial(
      variant.make,
      len(mean),
      config.latents,
      **{variant.level: program.levels[0]},
      **config.settings.get(program.variant, {}),
    )

    def new(seed):
      sae = made(rngs=nnx.Rngs(jax.random.key(seed)))
      sae.bias[...] = jnp.asarray(mean, sae.bias.dtype)
      _, params, rest = nnx.split(sae, nnx.Param, ...)
      return nnx.to_pure_dict(params), nnx.to_pure_dict(rest)

    self.graph = nnx.graphdef(nnx.eval_shape(lambda: made(rngs=nnx.Rngs(0))))
    cooldown = round(COOLDOWN * config.steps)
    rate = optax.linear_schedule(
      config.learning_rate, 0, cooldown, config.steps - cooldown
    )
    tx = sparse_coding.unit_norm(optax.adam(rate))

    @jax.jit
    def init():
      params, rest = jax.vmap(new)(seeds)
      return params, rest, jax.vmap(tx.init)(params)

    ramp = lambda step: jnp.minimum(step / (RAMP * config.steps), 1)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, x, number):
      key = jax.random.fold_in(jax.random.key(0), number)

      def one(training):
        (params, rest, opt), level, seed = training
        weights = variant.term and {variant.term: level * ramp(number)}

        def loss(params):
          sae = nnx.merge(self.graph, params, rest)
          total, parts = sae.loss(x[seed], key=key, weights=weights)
          _, _, after = nnx.split(sae, nnx.Param, ...)
          return total, (nnx.to_pure_dict(after), parts)

        grads, (after, parts) = jax.grad(loss, has_aux=True)(params)
        updates, opt = tx.update(grads, opt, params)
        params = optax.apply_updates(params, updates)
        return (params, after, opt), parts

      # One by one: what a condition leaves out is not computed, and memory is
      # that of one training.
      return lax.map(one, (state, levels, seeds))

    self.state, self.step = init(), step

  def autoencoder(self, number: int) -> sparse_coding.Autoencoder:
    """That of a training, as it is used after training."""
    params, rest, _ = jax.tree.map(lambda x: x[number], self.state)
    sae = nnx.merge(self.graph, params, rest)
    sae.eval()
    return sae


def batches(
  store: activations.Store, size: int, seeds: int
) -> grain.DatasetIterator:
  """Endless batches f32 [seeds, size, width], each seed's in its own order."""
  each = [store.batches(size, seed) for seed in range(seeds)]
  both = grain.experimental.ZipMapDataset(each).map(np.stack)
  options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
  return iter(both.to_iter_dataset(options))


def train(
  program: Program,
  config: ml_collections.ConfigDict,
  store: activations.Store,
  mean: np.ndarray,
  workdir: pathlib.Path,
  *,
  bar: tqdm.tqdm,
  stopped: Callable[[], bool],
) -> Training | None:
  """Trains a program from its last checkpoint on; None where it was stopped.

  Args:
    program: what is trained.
    config: as configs/sae_minilm.py has it.
    store: the rows.
    mean: [width], of them.
    workdir: of the program: checkpoints, and the terms of losses by step.
    bar: is moved by one for each step of each training.
    stopped: asked after every step; where true, a checkpoint is written.

  Raises:
    ValueError: a checkpoint is damaged.
  """
  trained = Training(program, config, mean)
  data = batches(store, config.batch_size, config.seeds)
  with workdirs.Checkpoints(workdir) as checkpoints:
    start = checkpoints.latest() or 0
    if start:
      like = jax.eval_shape(lambda: trained.state)
      trained.state = checkpoints.restore(start, like, data)
    bar.update(start * program.size)
    with workdirs.Metrics(workdir, after=start) as metrics:
      for number in range(start + 1, config.steps + 1):
        x = next(data)
        trained.state, parts = trained.step(trained.state, x, number)
        last = number == config.steps
        if number % config.log_every == 0 or last:
          metrics.write(number, named(trained.trainings, parts))
        bar.update(program.size)
        stop = stopped() and not last
        if stop or last or number % config.checkpoint_every == 0:
          checkpoints.save(number, trained.state, data)
        if stop:
          return None
  return trained


def named(trainings, parts) -> dict[str, float]:
  """The terms of the losses, by level, seed and name."""
  return {
    f"{level}_seed_{seed}_{name}": float(values[i])
    for name, values in jax.device_get(parts).items()
    for i, (_, level, seed) in enumerate(trainings)
  }
