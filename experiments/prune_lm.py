"""Prunes a language model in one shot, measures perplexity, and trains it on.

  python -m experiments.train --config=configs/text_small.py --workdir=RUN
  python -m experiments.prune_lm --workdir=RUN --structure=unstructured \
    --structure=2:4

RUN is a finished run of experiments.train of a dense Transformer. Methods,
sparsities and structures are those of experiments/prune.py; the blocks are
pruned, embedding and readout are not. From the masks that the first calibration
set gives `--train_from`, the model is trained on with `keep_masked`, and so is
the dense one. RUN/prune receives the table and a picture.
"""

from collections.abc import Sequence
import json
import math
import pathlib
from typing import Any

from absl import app
from absl import flags
from absl import logging
from flax import nnx
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import tqdm

from experiments import experiment
from experiments import models
from experiments import optimizers
from experiments import prune
from experiments import settings
from experiments import summaries
from experiments import workdir as workdirs
from sparsejax import weights

# Their order of the training text is no run's.
FIRST_SEED = 1_000


class Measured:
  """A trained language model, its validation text, and calibration sets.

  Attributes:
    model: the dense one.
    sets: what its first block reads, by calibration seed.
    about: what the figures are of.
    dense: figures of the dense model.
  """

  def __init__(
    self,
    run: pathlib.Path,
    *,
    seeds: int,
    calibration: int = 128,
    train_from: Sequence[str] = (),
    steps: int = 300,
    learning_rate: float = 1e-3,
  ):
    """Reads a run.

    Args:
      run: its work directory.
      seeds: how many calibration sets.
      calibration: training sequences in each.
      train_from: the methods from whose first masks training goes on.
      steps: of that training.
      learning_rate: its peak, after a tenth of the steps.

    Raises:
      ValueError: the directory has no finished run of a dense Transformer, or
        calibration is not whole batches.
    """
    self.config, self.parts = read(run)
    size = self.config.batch_size
    if calibration < 1 or calibration % size:
      raise ValueError(
        "calibration must be whole batches of the run's "
        f"config.batch_size={size}, got {calibration}"
      )
    params = restored(run, self.config, self.parts)
    shapes = nnx.eval_shape(
      lambda: settings.call(
        "model",
        self.config.model,
        models.MODELS,
        rngs=nnx.Rngs(0),
        **self.parts.task.model,
      )
    )
    self.model = nnx.merge(nnx.graphdef(shapes), params)
    self.sets, hashes = [], {}
    for seed in range(seeds):
      data = self.parts.task.train_iterator(FIRST_SEED + seed)
      texts = [np.asarray(next(data)) for _ in range(calibration // size)]
      hashes[seed] = prune.digest(text.tobytes() for text in texts)
      tokens = [text[:, :-1].astype(np.int32) for text in texts]
      self.sets.append([(self.model.embed(x),) for x in tokens])
    self._train_from, self._steps = train_from, steps
    self._inner = optimizers.adamw(
      steps=steps,
      learning_rate=learning_rate,
      warmup_steps=steps // 10,
      weight_decay=0.1,
    )
    self._init = jax.jit(lambda masks, params: self._masked(masks).init(params))
    self._step = jax.jit(self._one_step)
    self.dense = self._figures(params)
    held = self.parts.task.validation
    of = prune.digest(np.asarray(batch).tobytes() for batch in held)
    task = self.config.task
    self.about = {
      "model": str(run),
      "text": f"{task.path or 'the standard library of Python'}, {task.glob}",
      "split": f"{len(held) * len(held[0])} validation sequences ({of}), "
      f"{calibration} training sequences calibrate each seed",
      "context": f"{task.sequence_length} bytes",
      "calibration": hashes,
    }
    if train_from:
      everything = {"blocks": [ones(block) for block in self.model.blocks]}
      self.dense["trained"] = self._trained(params, everything)
      self.about["trained"] = (
        f"perplexity {steps} steps on (learning rate {learning_rate}, data of "
        "the run's seed), from the masks of calibration seed 0"
      )

  def _figures(self, params):
    loss = self.parts.evaluate(params, None)["loss"]
    return {"perplexity": math.exp(loss), "bits_per_byte": loss / math.log(2)}

  def _masked(self, masks):
    return optax.chain(self._inner, weights.keep_masked(masks))

  def _one_step(self, params, opt_state, batch):
    def loss(params):
      model = nnx.merge(nnx.graphdef(self.model), params)
      return self.parts.task.metrics(model, batch)["loss"]

    # The masks that count are those of the state: one step serves them all.
    everything = {"blocks": [ones(block) for block in self.model.blocks]}
    tx = self._masked(everything)
    updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  def _trained(self, params, masks) -> float:
    """The perplexity after training under masks."""
    opt_state = self._init(masks, params)
    data = self.parts.task.train_iterator(self.config.seed)
    for _ in tqdm.trange(self._steps, unit="step", leave=False, position=1):
      params, opt_state = self._step(params, opt_state, next(data))
    weights.masks(opt_state, params)  # raises where they were not kept
    return self._figures(params)["perplexity"]

  def row(self, name: str, point: prune.Point, seed: int, bar=None) -> dict:
    """Figures of a method, pruned at a point with a calibration set."""
    model, batches = nnx.clone(self.model), self.sets[seed]
    methods = prune.methods_of(name, point, model.blocks, batches)
    masks, error = prune.prune_blocks(model.blocks, batches, methods, bar=bar)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    row = {
      "method": name,
      "structure": point[0],
      "sparsity": point[1],
      "seed": seed,
      "calibration": self.about["calibration"][seed],
      "error": error,
    } | self._figures(params)
    if name in self._train_from and seed == 0:
      row["trained"] = self._trained(params, {"blocks": masks})
    return row


def ones(block: nnx.Module) -> dict[str, Any]:
  """Masks that keep everything."""
  keep = lambda x: np.ones(x.shape, bool)
  return jax.tree.map(keep, nnx.to_pure_dict(nnx.state(block, nnx.Param)))


def read(run: pathlib.Path):
  """The config and the parts of a finished run of a dense Transformer."""
  if not (run / "config.json").exists() or not summaries.read(run):
    raise ValueError(
      f"workdir must hold a finished run of experiments.train, got {run}"
    )
  config = ml_collections.ConfigDict(
    json.loads((run / "config.json").read_text())
  )
  names = config.model.name, config.method.name
  if names != ("transformer", "dense"):
    raise ValueError(
      "workdir must hold a run of model.name=transformer and "
      f"method.name=dense, got {' and '.join(names)} in {run}"
    )
  return config, experiment.make(config)


def restored(run, config, parts) -> dict[str, Any]:
  """The parameters of a run's last checkpoint."""
  like = jax.eval_shape(lambda: parts.init(config.seed))
  data = parts.task.train_iterator(config.seed)
  with workdirs.Checkpoints(run) as checkpoints:
    params, _ = checkpoints.restore(checkpoints.latest(), like, data)
  # Bound to no device, as pruned ones are, or all would be compiled twice.
  return jax.tree.map(jnp.asarray, jax.device_get(params))


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  logging.set_verbosity(logging.WARNING)
  given, at = flags.FLAGS, prune.given_points()
  run = pathlib.Path(given.workdir)
  measured = Measured(
    run,
    seeds=given.seeds,
    calibration=given.calibration,
    train_from=given.train_from if given.steps else (),
    steps=given.steps,
    learning_rate=given.learning_rate,
  )
  prune.write(prune.run(measured, given.method, at), run / "prune")


def define_flags():
  """Flags of what is pruned, and how it is trained on."""
  prune.define_flags()
  flags.DEFINE_multi_enum(
    "train_from",
    ["wanda"],
    list(prune.METHODS),
    "One or more times: methods from whose masks training goes on.",
  )
  flags.DEFINE_integer(
    "steps", 300, "Of that training; 0 for none.", lower_bound=0
  )
  flags.DEFINE_float("learning_rate", 1e-3, "Its peak.", lower_bound=0)


if __name__ == "__main__":
  define_flags()
  flags.DEFINE_string("workdir", None, "A finished run of experiments.train.")
  flags.mark_flag_as_required("workdir")
  app.run(main)
