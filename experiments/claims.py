"""Claims of papers, and the small experiments that test them."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import ml_collections

from configs import base


@dataclasses.dataclass(frozen=True)
class Claim:
  """What a paper says, and what is run to see whether it holds here.

  Attributes:
    says: the claim.
    source: the paper, and where in it.
    differs: how the experiment differs from the paper's.
    arms: what is compared: changes to `config`, by field.
    better: pairs of arms; the first is claimed to be better.
    grid: values tried in every arm alike, by field, on seeds of their own.
    metric: of the validation data; the higher, the better.
  """

  says: str
  source: str
  arms: Mapping[str, Mapping[str, Any]]
  better: Sequence[tuple[str, str]]
  differs: str = (
    "An MLP of two hidden layers on MNIST-1D (4,000 training examples), where "
    "the paper has convolutional networks on images. It is evidence about "
    "this implementation and this scale, not about the paper's."
  )
  grid: Mapping[str, Sequence[Any]] = dataclasses.field(
    default_factory=lambda: {"optimizer.learning_rate": (0.1, 0.3, 1.0)}
  )
  metric: str = "accuracy"


@dataclasses.dataclass(frozen=True)
class Pruning:
  """What papers say of pruning in one shot, and where it is tried.

  Attributes:
    says: the claim.
    source: the papers.
    differs: how the experiment differs from the papers'.
    better: pairs of methods of experiments/prune.py, the first claimed to be
      better, and the points (structure, sparsity) where it is.
    besides: the same, where the papers claim nothing.
    metrics: what is compared, and 1 where more is better, -1 where less is.
  """

  says: str
  source: str
  differs: str
  better: Mapping[tuple[str, str], Sequence[tuple[str, float]]]
  besides: Mapping[tuple[str, str], Sequence[tuple[str, float]]] = (
    dataclasses.field(default_factory=dict)
  )
  metrics: Mapping[str, int] = dataclasses.field(
    default_factory=lambda: {"error": -1, "retrieval": 1, "fidelity": 1}
  )


def config() -> ml_collections.ConfigDict:
  """What all arms begin with: seconds a run."""
  config = base.get_config()
  config.steps = 2_000
  config.batch_size = 128
  config.eval_every = 100
  config.task = {"name": "mnist1d"}
  config.model = {"name": "mlp", "width": 256, "depth": 2}
  config.optimizer = {
    "name": "sgd",
    "learning_rate": 0.1,
    "warmup_steps": 100,
    "weight_decay": 5e-4,
  }
  return config


RIGL = "Evci et al., Rigging the Lottery (2020)"


def _method(name, **settings):
  return {"method": {"name": name, **settings}}


def _exchanging(name, sparsity, **settings):
  """SET and RigL exchange 30% of the weights, for three quarters of a run."""
  own = {"every": 50, "until": 1_500, "drop_fraction": 0.3}
  return _method(name, sparsity=sparsity, **own | settings)


def _rigl_set_static(sparsity):
  return Claim(
    says=(
      f"At {sparsity:.0%} sparsity, growing weights by their gradients (RigL) "
      "is better than growing them at random (SET), and that is better than "
      "a random mask that never changes (static)."
    ),
    source=f"{RIGL}, ResNet-50 on ImageNet, there at 80% and 90%",
    arms={
      "rigl": _exchanging("rigl", sparsity),
      "set": _exchanging("set_", sparsity),
      "static": _method("static", sparsity=sparsity),
    },
    better=(("rigl", "set"), ("set", "static")),
  )


def _sr_ste(n, m):
  return Claim(
    says=(
      f"Training {n}:{m} sparse weights, pulling masked weights to zero "
      "(SR-STE) is better than the plain straight-through estimator (STE)."
    ),
    source=(
      "Zhou et al., Learning N:M Fine-grained Structured Sparse Neural "
      "Networks From Scratch (2021), image classification"
    ),
    arms={
      "sr_ste": _method("sr_ste", n=n, m=m, decay=2e-4),
      "ste": _method("sr_ste", n=n, m=m, decay=0.0),
    },
    better=(("sr_ste", "ste"),),
  )


_HALVES = (("unstructured", 0.5), ("2:4", 0.5), ("4:8", 0.5))
_MORE = (("unstructured", 0.6), ("unstructured", 0.7))

CLAIMS = {
  "rigl_set_static_95": _rigl_set_static(0.95),
  "rigl_set_static_98": _rigl_set_static(0.98),
  "sr_ste_1_4": _sr_ste(1, 4),
  "sr_ste_1_8": _sr_ste(1, 8),
  "erk_uniform": Claim(
    says=(
      "At 98% sparsity, RigL with the Erdős-Rényi-kernel division of the "
      "budget among layers is better than with the same density in each."
    ),
    source=f"{RIGL}, ResNet-50 on ImageNet, there at 80% to 96.5%",
    arms={
      "erk": _exchanging("rigl", 0.98, distribution="erk"),
      "uniform": _exchanging("rigl", 0.98, distribution="uniform"),
    },
    better=(("erk", "uniform"),),
  ),
  "gmp_rigl": Claim(
    says=(
      "At 90% sparsity and equal training FLOPs, RigL is better than gradual "
      "magnitude pruning."
    ),
    source=f"{RIGL}, abstract",
    arms={
      "rigl": {"steps": 5_350, "eval_every": 50}
      | _method("rigl", sparsity=0.9, every=50, until=4_000, drop_fraction=0.3),
      "gradual": {"eval_every": 50}
      | _method(
        "gradual_magnitude",
        sparsity=0.9,
        begin=0,
        until=1_500,
        every=50,
        distribution="erk",
      ),
    },
    better=(("rigl", "gradual"),),
  ),
  "one_shot_order": Pruning(
    says=(
      "Pruned in one shot, a model loses no more by SparseGPT than by Wanda, "
      "and less by Wanda than by magnitude. At 60% and more, DSnoT from "
      "Wanda's mask loses less than Wanda, and at 70% Wanda loses less where "
      "blocks with more outliers keep more (OWL)."
    ),
    source=(
      "Frantar and Alistarh, SparseGPT (2023); Sun et al., A Simple and "
      "Effective Pruning Approach for Large Language Models (2023); Zhang et "
      "al., Dynamic Sparse No Training (2023); Yin et al., Outlier Weighed "
      "Layerwise Sparsity (2023)"
    ),
    differs=(
      "An encoder of 6 blocks, all-MiniLM-L6-v2, where the papers have "
      "decoders of billions of parameters and perplexity. Error is the mean "
      "over layers of the squared change of their outputs, over their "
      "squares; retrieval is how often a docstring is nearest to its own "
      "signature; fidelity is the mean cosine of docstrings' embeddings to "
      "the dense model's. Unstructured is what each method does: magnitude "
      "chooses within a layer, Wanda within an output, SparseGPT within 128 "
      "inputs."
    ),
    better={
      ("sparsegpt", "wanda"): _HALVES + _MORE,
      ("wanda", "magnitude"): _HALVES + _MORE,
      ("dsnot", "wanda"): _MORE,
      ("owl", "wanda"): _MORE[1:],
    },
    besides={("dsnot", "wanda"): _HALVES},
  ),
}
