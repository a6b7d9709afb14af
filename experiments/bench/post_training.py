"""SparseGPT and Wanda over a whole encoder, from tokens to pruned weights.

The peer is the authors' own code: `peers/torch_post_training.py`. What it needs
is written to INPUTS before each row.
"""

from collections.abc import Callable, Iterator
import functools
import pathlib
import time
from typing import Any

from flax import nnx
import jax
import numpy as np

from experiments.bench import timing
from experiments.models import pretrained
from experiments.tasks import docstrings
from sparsejax import capture
from sparsejax import weights

SPARSITY, TEXTS, LENGTH, ROWS = 0.6, 128, 64, 32
EVALUATION = 512  # texts that are kept apart, as in `experiments.prune`
INPUTS = pathlib.Path("runs/bench/post_training.npz")
# The method, whether it needs second moments, and how much faster than the
# authors' code it is meant to be.
METHODS = {
  "sparsegpt": (weights.sparsegpt, True, 1.5),
  "wanda": (weights.wanda, False, 2),
}


def calibration(tokenizer, kind: str) -> tuple[np.ndarray, np.ndarray]:
  """Tokens and which are valid, from short texts to long ones.

  Either docstrings, those of `experiments.prune`, cut to LENGTH; or windows of
  exactly LENGTH over one docstring behind the other, as language models are
  calibrated.
  """
  pairs = docstrings.load()
  order, _ = docstrings.split(
    pairs,
    calibration=len(pairs.docstrings) - EVALUATION,
    evaluation=EVALUATION,
    seed=0,
  )
  tokenizer.enable_truncation(LENGTH)
  tokens, valid = pretrained.encode(
    tokenizer, [pairs.docstrings[i] for i in order], length=LENGTH
  )
  if kind == "windows":
    tokens = tokens[valid][: TEXTS * LENGTH].reshape(TEXTS, LENGTH)
    return tokens, np.ones(tokens.shape, bool)
  order = np.argsort(valid[:TEXTS].sum(1), kind="stable")
  return tokens[order], valid[order]


def batches_of(tokens, valid) -> list[tuple[np.ndarray, np.ndarray]]:
  """Batches of ROWS, as wide as their longest text (to whole eights)."""
  found = []
  for i in range(0, len(tokens), ROWS):
    wide = -(-valid[i : i + ROWS].sum(1).max() // 8) * 8
    found.append((tokens[i : i + ROWS, :wide], valid[i : i + ROWS, :wide]))
  return found


def run(block, batch):
  """What the next block reads: hidden states, and the mask of attention."""
  return block(*batch), batch[1]


def valid_rows(batch):
  return batch[1][:, 0, 0, :]


def keep(number, params, moments):
  """Prunes nothing."""
  return params, moments


class Pruner:
  """Prunes all blocks of an encoder in order."""

  def __init__(self, model, batches):
    self.blocks, self.batches = list(model.blocks), batches
    embeds = nnx.clone(model)
    embeds.blocks = nnx.List([])
    self._embed = nnx.jit(lambda model, tokens: model(tokens))
    self._embeds = embeds

  def __call__(self, update: Callable, second: bool) -> Any:
    """The new blocks, and what else `update` returned."""
    hidden = [
      (self._embed(self._embeds, tokens), valid[:, None, None])
      for tokens, valid in self.batches
    ]
    updated, extras = capture.in_order(
      run, self.blocks, hidden, update, valid=valid_rows, second=second
    )
    return [nnx.state(block) for block in updated], extras


def update_with(method: Callable, spent: list | None = None) -> Callable:
  """Prunes a block; adds the seconds it takes to `spent`."""
  method = functools.partial(method, density=1 - SPARSITY)

  def update(number, params, moments):
    if spent is None:
      return weights.prune(params, moments, method)
    jax.block_until_ready(moments)
    begin = time.perf_counter()
    found = jax.block_until_ready(weights.prune(params, moments, method))
    spent.append(time.perf_counter() - begin)
    return found

  return update


def cases(bandwidth: float) -> Iterator[timing.Case]:
  """Rows; `bandwidth` is not what bounds them."""
  del bandwidth
  for kind, told in (
    ("docstrings", f"docstrings of at most {LENGTH} tokens"),
    ("windows", f"windows of {LENGTH} tokens"),
  ):
    model, tokenizer, _ = pretrained.load("minilm")
    tokens, valid = calibration(tokenizer, kind)
    INPUTS.parent.mkdir(parents=True, exist_ok=True)
    np.savez(
      INPUTS,
      model=str(pretrained.locate("minilm")),
      sparsity=SPARSITY,
      tokens=tokens,
      valid=valid,
    )
    prune = Pruner(model, batches_of(tokens, valid))
    for name, (method, second, target) in METHODS.items():
      yield timing.Case(
        name=f"{name} {SPARSITY:.0%}, all-MiniLM-L6-v2, {len(tokens)} {told}",
        ours=timing.timed(prune, update_with(method), second),
        peers={},
        target={"authors": target},
        note="a block after the other, from tokens to pruned weights",
      )


def facts() -> dict[str, Any]:
  """What the time goes to; the peer prints its own."""
  model, tokenizer, _ = pretrained.load("minilm")
  prune = Pruner(model, batches_of(*calibration(tokenizer, "windows")))
  found = {}
  for name, (method, second, _) in METHODS.items():
    spent = []
    case = timing.Case(
      name=name,
      ours=timing.timed(prune, update_with(method, spent), second),
      # Nothing is chosen, and of the statistics only sums are kept.
      peers={"forward": timing.timed(prune, keep, False)},
      target={},
    )
    spent.clear()
    median = timing.race(case, rounds=3)["median_ms"]
    choosing = 1e3 * sum(spent) / 6  # every round runs twice
    rest = median["ours"] - choosing - median["forward"]
    found[f"{name}, windows"] = (
      f"{median['ours']:.0f} ms: {median['forward']:.0f} forward and sums, "
      f"{rest:.0f} second moments, {choosing:.0f} choosing"
    )
  return found
