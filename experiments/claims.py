"""Claims of papers, and the small experiments that test them."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any

import ml_collections

from configs import base
from configs import recall_dense
from configs import sae_minilm
from configs import text_moe
from configs import text_moe_dense
from experiments import tickets
from experiments.procedures import before_training
from experiments.procedures import firing
from experiments.procedures import penalties
from experiments.procedures import soups
from experiments.procedures import timings

# Metrics of which less is better; of all others more is.
LESS = (
  "loss",
  "max_violation",
  "active",
  "dropped",
  "nearest",
  "loss_change",
  "collapsed",
  "density",
  "milliseconds",
  "milliseconds_of_many",
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


def mixtures() -> ml_collections.ConfigDict:
  """The same, of claims about mixtures of experts."""
  config = text_moe.get_config()
  config.steps = 400
  config.batch_size = 8
  return config


def recall() -> ml_collections.ConfigDict:
  """The same, of claims about attention: multi-query associative recall."""
  config = recall_dense.get_config()
  config.steps = 800
  return config


def autoencoders() -> ml_collections.ConfigDict:
  """What claims about autoencoders train; minutes a variant."""
  config = sae_minilm.get_config()
  config.texts, config.latents, config.steps = 4_000, 768, 400
  config.learning_rate = 3e-3
  budgets, alive = (12, 24, 48), {"dead_after": 50_000}
  config.levels = {
    "l1": (1.0, 1.6, 2.6),
    "gated": (1.6, 2.6, 4.2),
    "jump_relu": (0.03, 0.3, 1.5),
    "top_k": budgets,
    "batch_top_k": budgets,
    "matryoshka": (12, 48),
    "ort": (12, 48),
  }
  config.variants = tuple(config.levels)
  config.settings = {
    "jump_relu": {"threshold": 0.8, "bandwidth": 0.5},
    "top_k": alive,
    "batch_top_k": alive,
    "matryoshka": {"sizes": (96, 192, 384, 768), **alive},
    "ort": {"chunks": 2, **alive},
  }
  return config


@dataclasses.dataclass(frozen=True)
class Claim:
  """What a paper says, and what is run to see whether it holds here.

  Attributes:
    says: the claim.
    source: the paper, and where in it.
    differs: how the experiment differs from the paper's.
    arms: what is compared: changes to `config`, by field.
    better: pairs of arms; the first is claimed to be better. By `metric`, or by
      another one that is named behind them.
    grid: values tried in every arm alike, by field, on seeds of their own.
    metric: of the validation data, by which arms are tuned.
    config: makes what all arms begin with.
    besides: as `better`, where the paper claims nothing.
    shows: further metrics, of which nothing is compared.
  """

  says: str
  source: str
  arms: Mapping[str, Mapping[str, Any]]
  better: Sequence[tuple[str, ...]]
  differs: str = (
    "An MLP of two hidden layers on MNIST-1D (4,000 training examples), where "
    "the paper has convolutional networks on images. It is evidence about "
    "this implementation and this scale, not about the paper's."
  )
  grid: Mapping[str, Sequence[Any]] = dataclasses.field(
    default_factory=lambda: {"optimizer.learning_rate": (0.1, 0.3, 1.0)}
  )
  metric: str = "accuracy"
  config: Callable[[], ml_collections.ConfigDict] = config
  besides: Sequence[tuple[str, ...]] = ()
  shows: Sequence[str] = ()


def metrics(claim: Claim) -> list[str]:
  """All metrics that a claim needs; first the one by which arms are tuned."""
  pairs = (*claim.better, *claim.besides)
  others = [metric for pair in pairs for metric in pair[2:]]
  return list(dict.fromkeys((claim.metric, *others, *claim.shows)))


def sign(metric: str) -> int:
  """1 where more is better, -1 where less is."""
  return -1 if metric in LESS else 1


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


@dataclasses.dataclass(frozen=True)
class Frontier:
  """What papers say of sparse autoencoders at equal L0, and where it is tried.

  Attributes:
    says: the claim.
    source: the papers.
    differs: how the experiment differs from the papers'.
    better: variants of experiments/dictionary_training.py, the first claimed to
      be better than the second, and the figure by which.
    at: L0 at which they are compared.
    besides: as `better`, where the papers claim nothing.
    config: makes the config of experiments.dictionary.
  """

  says: str
  source: str
  differs: str
  better: Sequence[tuple[str, str, str]]
  at: Sequence[float]
  config: Callable[[], ml_collections.ConfigDict]
  besides: Sequence[tuple[str, str, str]] = ()


@dataclasses.dataclass(frozen=True)
class Procedure:
  """What a paper says of what is no config, and how it is measured.

  Attributes:
    says: the claim.
    source: the paper, and where in it.
    differs: how the experiment differs from the paper's.
    measure: (seed, **settings) -> the figures of each arm, by name.
    arms: what is compared.
    figures: what is shown of each arm that has it.
    better: pairs of arms, the first claimed to be better, and the figure by
      which.
    besides: the same, where the paper claims nothing.
    grid: settings that are tried in every arm alike, by name, on seeds of their
      own.
    metric: the figure by which arms are tuned.
    ratios: figures that are compared by quotients, as times are.
    about: tells where it was measured.
  """

  says: str
  source: str
  differs: str
  measure: Callable[..., Mapping[str, Mapping[str, float]]]
  arms: Sequence[str]
  figures: Sequence[str]
  better: Sequence[tuple[str, str, str]]
  besides: Sequence[tuple[str, str, str]] = ()
  grid: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
  metric: str = "accuracy"
  ratios: Sequence[str] = ()
  about: Callable[[], Mapping[str, str]] = dict


RIGL = "Evci et al., Rigging the Lottery (2020)"
LAZY = (
  "Li et al., The Lazy Neuron Phenomenon: On Emergence of Activation Sparsity "
  "in Transformers (2022)"
)


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


def _wide(width, wide):
  """An MLP of two hidden layers, wider, and at the FLOPs of the dense one."""
  fixed, both = 1 - width / wide, 1 - (width / wide) ** 2
  sparsity = {"hidden/1": both, "hidden/0|readout": fixed}
  return {"model.width": wide} | _exchanging("rigl", sparsity)


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


TEXT = (
  "A Transformer of width 64 and 2 blocks on the bytes of Python's standard "
  "library, 400 steps of 512 bytes; 8 experts of 128 neurons in the "
  "place of each MLP. The paper's models and runs are far larger. "
)
_AUXILIARY = {"name": "auxiliary", "coefficient": 0.01}


def _top_k(k, **settings):
  return {"name": "top_k", "k": k, **settings}


def _mixtures(**given):
  """A claim about mixtures of experts, by their loss."""
  given["differs"] = TEXT + given["differs"]
  grid = {"optimizer.learning_rate": (5e-3, 1e-2)}
  return Claim(config=mixtures, metric="loss", grid=grid, **given)


def _attention(name, **settings):
  return {"model.attention": {"name": name, **settings}}


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
  "iss_p": Claim(
    says=(
      "Trained sparse from scratch to 95%, a network whose smallest weights "
      "shrink a little after each step (ISS-P) ends better than one where they "
      "become zero (iterative hard thresholding, IHT)."
    ),
    source=(
      "Wang et al., Iterative Soft Shrinkage Learning for Efficient Image "
      "Super-Resolution (2023), section 3 and the ablation of thresholding"
    ),
    differs=(
      "An MLP of two hidden layers on MNIST-1D, where the paper has networks "
      "of super-resolution. Masks are of each layer, chosen after every step, "
      "and fixed for the last quarter of the run. The factor is that of the "
      "authors' scripts."
    ),
    arms={
      name: _method("iss_p", sparsity=0.95, until=1_500, factor=factor)
      for name, factor in {"iss_p": 0.95, "iht": 0.0}.items()
    },
    better=(("iss_p", "iht"), ("iss_p", "iht", "loss")),
  ),
  "sparse_wide": Claim(
    says=(
      "At equal FLOPs a network that is wider by 1 / sqrt(1 - s) and sparse by "
      "s (Sparse Wide), trained with RigL, is better than the dense one."
    ),
    source=(
      "Thangarasa et al., Sparse-IFT: Sparse Iso-FLOP Transformations for "
      "Maximizing Training Efficiency (2023), section 4, ResNets on CIFAR-100 "
      "and ImageNet"
    ),
    differs=(
      "An MLP of two hidden layers of 64 on MNIST-1D against 128 at 75% and "
      "202 at 90%. Inputs and classes cannot be more: the first and the last "
      "layer have the sparsity at which their FLOPs are equal, too, 50% and "
      "68%. Training costs more by the dense gradients that weights grow by, "
      "at one step in 50; a forward pass costs the same."
    ),
    arms={
      "dense": {"model.width": 64},
      "wide_75": _wide(64, 128),
      "wide_90": _wide(64, 202),
    },
    better=(("wide_75", "dense"), ("wide_90", "dense")),
    besides=(("wide_90", "wide_75"),),
    shows=("inference_flops",),
  ),
  "moe_dense": _mixtures(
    says=(
      "At equal steps and equal FLOPs a token, a Transformer whose MLPs are "
      "mixtures of experts has a lower loss than the dense one."
    ),
    source="Fedus et al., Switch Transformers (2022), section 3",
    differs=(
      "The dense arm's MLPs have 256 neurons, as many as the two experts of a "
      "token have together; it lacks the routers, about 1% of the FLOPs. The "
      "paper has tokens go to one expert, and a capacity."
    ),
    arms={
      "moe": {},
      "dense": {"model": text_moe_dense.get_config().model.to_dict()},
    },
    better=(("moe", "dense"),),
    shows=("parameters", "inference_flops"),
  ),
  "moe_bias": _mixtures(
    says=(
      "A bias of the choice, moved against the load (ALF-LB), balances load "
      "without an auxiliary loss: the largest load over the mean, less 1 "
      "(MaxVio), is lower than without balancing and than with the auxiliary "
      "loss, and so is the loss than with the auxiliary loss."
    ),
    source=(
      "Wang et al., Auxiliary-Loss-Free Load Balancing Strategy for "
      "Mixture-of-Experts (2024), table 2; A Theoretical Framework for "
      "Auxiliary-Loss-Free Load Balancing (2025) has its theory"
    ),
    differs=(
      "MaxVio is of validation batches of 512 tokens, the mean over batches "
      "and layers; scores are a softmax, where the first paper has a sigmoid."
    ),
    arms={
      "bias": {"model.balance": {"name": "bias", "rate": 1e-3}},
      "none": {"model.balance": {"name": "none"}},
      "auxiliary": {"model.balance": _AUXILIARY},
    },
    better=(
      ("bias", "none", "max_violation"),
      ("bias", "auxiliary", "max_violation"),
      ("bias", "auxiliary"),
    ),
    besides=(("bias", "none"),),
  ),
  "moe_priority": _mixtures(
    says=(
      "Where experts take half of the edges, a model that drops those of the "
      "lowest weights (batch prioritized routing) has a lower loss than one "
      "that drops those that come last."
    ),
    source=(
      "Riquelme et al., Scaling Vision with Sparse Mixture of Experts (2021), "
      "section 4, images"
    ),
    differs=(
      "The capacity factor is 0.5 in training and in validation. Here the "
      "weights of later bytes decide whether an earlier one is dropped, which "
      "a model that generates could not know; in images nothing comes later. "
      "By position, whole sequences at the end of a batch are dropped."
    ),
    arms={
      priority: {
        "model.capacity_factor": 0.5,
        "model.priority": priority,
        "model.router": _top_k(2),
      }
      for priority in ("weight", "position")
    },
    better=(("weight", "position"),),
    shows=("dropped",),
  ),
  "moe_dense_to_sparse": _mixtures(
    says=(
      "A gate that sends tokens to all experts at first, and by a falling "
      "temperature to about one in the end, has a lower loss after as many "
      "steps than one that sends them to one from the start."
    ),
    source=(
      "Nie et al., EvoMoE: An Evolutional Mixture-of-Experts Training "
      "Framework via Dense-To-Sparse Gate (2021), against Switch"
    ),
    differs=(
      "Without the gate's Gumbel noise, and without the phase in which experts "
      "grow from one. Active is how many experts process a token in the end; "
      "FLOPs are those of all edges in training: the steps are equal, and the "
      "first arm takes more of them."
    ),
    arms={
      "dense_to_sparse": {
        "model.router": {
          "name": "dense_to_sparse",
          "threshold": 0.1,
          "until": 300,
          "begin": 2.0,
          "end": 0.1,
        }
      },
      "top_1": {"model.router": _top_k(1)},
    },
    better=(("dense_to_sparse", "top_1"),),
    shows=("active",),
  ),
  "moe_top_p": _mixtures(
    says=(
      "With many small experts, tokens that go to as few of them as together "
      "have a given probability (XMoE) need fewer for the same quality than "
      "tokens that go to equally many each: with as many, their loss is lower."
    ),
    source=(
      "Yang et al., XMoE: Enhancing Efficiency in Sparse Models with Sparser "
      "Selection (2024)"
    ),
    differs=(
      "But here 32 experts of 32 neurons. What is compared is loss at matched "
      "experts a token: the probability was chosen, on one of the tuning "
      "seeds, so that in the end tokens of the validation data go to about as "
      "many (active). Those of training are in the FLOPs. Weights are the "
      "probabilities in both arms, and nothing is dropped, where the paper has "
      "a capacity."
    ),
    arms={
      name: {"model.experts": 32, "model.hidden": 32, "model.router": router}
      for name, router in {
        "top_p": {"name": "top_p", "p": 0.34},
        "top_k": _top_k(4),
      }.items()
    },
    better=(("top_p", "top_k"),),
    besides=(("top_p", "top_k", "active"),),
  ),
  "attention_recall": Claim(
    says=(
      "Attention that is trained to choose the blocks it reads (MoBA, NSA, "
      "InfLLM-V2) recalls what a window of as many keys cannot."
    ),
    source=(
      "Lu et al., MoBA (2025); Yuan et al., Native Sparse Attention (2025); "
      "InfLLM-V2 (2025); the task is that of Arora et al., Zoology (2023), "
      "section 4"
    ),
    differs=(
      "A Transformer of width 64, 2 blocks and 2 heads on multi-query "
      "associative recall: 16 pairs, then as many keys at power-law gaps, in "
      "128 tokens; 800 steps of 32 sequences at one rate of learning. Before "
      "each attention is a convolution of 2 tokens: with it dense attention "
      "got to 99% in 350 steps, without it to 6% in 800. The papers train "
      "language models. No sparse arm reads more than the window: on average "
      "52 keys (window of 72), 34.5 (MoBA and InfLLM-V2: the own block of 16 "
      "as far as the token, and two more), 51.5 (NSA: means of 4, two blocks "
      "of 16, the last 8), where dense attention reads 64.5. Two blocks of the "
      "window reach all of the sequence, in two hops. Accuracy is that of the "
      "last step, chance is 1 in 64."
    ),
    arms={
      "dense": {},
      "window": _attention("window", keys=72),
      "moba": _attention("moba", block=16, top_k=3),
      "nsa": _attention("nsa", block=16, top_n=2, length=4, stride=4, window=8),
      "infllm": _attention("infllm", block=16, top_k=3, length=8, stride=4),
    },
    better=(("moba", "window"), ("nsa", "window"), ("infllm", "window")),
    besides=(("dense", "moba"), ("dense", "nsa"), ("dense", "infllm")),
    grid={},
    config=recall,
    shows=("parameters", "inference_flops"),
  ),
  "lottery_ticket": Procedure(
    says=(
      "At about 10% density a winning ticket (the mask that iterative "
      "magnitude pruning finds, at the original initialization) gets to a "
      "higher accuracy than the same mask from another initialization and than "
      "a random mask, and learns faster."
    ),
    source=(
      "Frankle and Carbin, The Lottery Ticket Hypothesis (2018), sections 2 "
      "and 3, fully-connected networks on MNIST and convolutional ones on "
      "CIFAR-10"
    ),
    differs=(
      "An MLP of two hidden layers of 100 on MNIST-1D, 1,000 steps of Adam at "
      "a constant rate on 100 examples each, ten rounds of 20% of each layer, "
      "the last one too, which the paper prunes at half the rate. Early "
      "accuracy is after 100 steps. Random masks keep as many weights of "
      "each layer, at the ticket's initialization. All arms see the same data "
      "in one order."
    ),
    measure=tickets.measure,
    arms=tickets.ARMS,
    figures=("accuracy", "early_accuracy", "loss"),
    better=tuple(
      ("ticket", arm, figure)
      for figure in ("accuracy", "early_accuracy")
      for arm in tickets.ARMS[1:]
    ),
    grid={"learning_rate": (1e-2, 3e-2, 1e-1)},
  ),
  "sparse_soups": Procedure(
    says=(
      "After as many cycles of pruning and retraining, a soup (the average of "
      "copies that are retrained from one mask, from which the next cycle "
      "begins) is better than single runs are on average."
    ),
    source=(
      "Zimmer et al., Sparse Model Soups: A Recipe for Improved Pruning via "
      "Model Averaging (2023), section 3, ResNets on CIFAR and ImageNet"
    ),
    differs=(
      "An MLP of two hidden layers of 150 on MNIST-1D: 2,000 steps of SGD, "
      "then three cycles to densities of 50%, 25% and 10% (of all layers "
      "together) and 600 steps each. Three copies differ by the order of the "
      "data and by weight decay (0, 1e-4, 5e-4). A soup takes three times the "
      "steps of a single run; longer is a single run whose cycles are three "
      "times as long."
    ),
    measure=soups.measure,
    arms=("soup", "single", "longer"),
    figures=("loss", "accuracy"),
    better=(("soup", "single", "loss"), ("soup", "single", "accuracy")),
    besides=(("soup", "longer", "loss"), ("soup", "longer", "accuracy")),
    grid={"learning_rate": (0.1, 0.3, 1.0)},
  ),
  "synflow_999": Procedure(
    says=(
      "Pruned to 99.9% before training, a network by SynFlow keeps weights in "
      "all layers and still trains, where SNIP, GraSP and magnitude lose whole "
      "layers, and random masks connect nothing."
    ),
    source=(
      "Tanaka et al., Pruning neural networks without any data by iteratively "
      "conserving synaptic flow (2020), figures 1 and 6, VGG and ResNet on "
      "CIFAR and Tiny ImageNet"
    ),
    differs=(
      "An MLP of four hidden layers of 400 on MNIST-1D, of which 0.1% are 500 "
      "weights; 1,000 steps of Adam. SNIP and GraSP score 1,000 examples in "
      "one shot. All budgets are of all layers together but that of random "
      "masks, which is of each layer. Collapsed are layers without a weight, "
      "connected is the share of weights on a path from input to output."
    ),
    measure=before_training.measure,
    arms=before_training.ARMS,
    figures=("accuracy", "collapsed", "connected", "density"),
    better=(
      *(("synflow", x, "accuracy") for x in before_training.ARMS[1:]),
      *(("synflow", x, "collapsed") for x in before_training.ARMS[1:4]),
    ),
    besides=(("synflow", "random", "collapsed"),),
    grid={"learning_rate": (3e-3, 1e-2)},
  ),
  "hypersparse": Procedure(
    says=(
      "A network trained under a penalty that grows and spares the largest "
      "weights (HyperSparse) loses less when it is pruned than under L1, and "
      "is better after fine-tuning, than without a penalty, too."
    ),
    source=(
      "Glandorf et al., HyperSparse Neural Networks: Shifting Exploration to "
      "Exploitation through Adaptive Regularization (2023), ResNet and VGG on "
      "CIFAR and Tiny ImageNet"
    ),
    differs=(
      "An MLP of two hidden layers of 100 on MNIST-1D: 2,000 steps of SGD from "
      "scratch at a constant rate, in which the penalty grows a hundredfold, "
      "by the same factor each epoch; then the largest 5% of all weights, and "
      "1,000 steps under that mask. Strength is that of the last epoch. Loss "
      "change is the validation loss after pruning less that before; pruned "
      "accuracy is before fine-tuning."
    ),
    measure=penalties.measure,
    arms=penalties.ARMS,
    figures=("loss_change", "accuracy", "pruned_accuracy", "dense_accuracy"),
    better=(
      ("hypersparse", "l1", "loss_change"),
      ("hypersparse", "l1", "accuracy"),
      ("hypersparse", "none", "loss_change"),
      ("hypersparse", "none", "accuracy"),
    ),
    besides=(("hypersparse", "l1", "pruned_accuracy"),),
    grid={"strength": (1e-3, 3e-3, 1e-2, 3e-2)},
  ),
  "pixelfly": Procedure(
    says=(
      "A training step of a network of flat block butterflies and low-rank "
      "terms (Pixelfly) takes less time than one of the dense network, at no "
      "loss of accuracy."
    ),
    source=(
      "Dao et al., Pixelated Butterfly: Simple and Efficient Sparse training "
      "for Neural Network Models (2021), section 5, Mixer, ViT and GPT-2 on a "
      "GPU, up to 2.5 times"
    ),
    differs=(
      "On a CPU, an MLP of three hidden layers of 2,048 on MNIST-1D, batches "
      "of 100, Adam: the second and the third layer are blocks of 32, 7 of the "
      "64 in each column, and a rank of 32. Accuracy is after 200 steps. That "
      "it does not fall cannot be shown by an interval above zero: it is not "
      "counted."
    ),
    measure=timings.pixelfly,
    arms=("pixelfly", "dense"),
    figures=("milliseconds", "accuracy", "loss", "parameters"),
    better=(("pixelfly", "dense", "milliseconds"),),
    besides=(("pixelfly", "dense", "accuracy"),),
    grid={"learning_rate": (1e-3, 3e-3)},
    ratios=("milliseconds",),
    about=timings.about,
  ),
  "srigl_condensed": Procedure(
    says=(
      "At 90% sparsity and batch 1 a condensed layer, of constant fan-in, is "
      "faster on a CPU than the dense one and than an unstructured sparse one."
    ),
    source=(
      "Lasby et al., Dynamic Sparse Training with Structured Sparsity (2023), "
      "section 4.4, the last feed-forward layer of ViT-B/16, 3.6 and 2 times"
    ),
    differs=(
      "A layer of 3072 x 768 as the paper's, with random masks of which no "
      "neuron is ablated. It stays in the cache, which is the dense layer's "
      "luck: of many are as many layers, one behind the other, as have 128 MiB "
      "of dense kernels. Masked multiplies by a mask on the way; csr is SciPy, "
      "on one thread and without a compiler's dispatch."
    ),
    measure=timings.condensed,
    arms=("condensed", "dense", "csr", "masked"),
    figures=("milliseconds", "milliseconds_of_many"),
    better=tuple(
      ("condensed", arm, figure)
      for arm in ("dense", "csr")
      for figure in ("milliseconds", "milliseconds_of_many")
    ),
    besides=(
      ("condensed", "masked", "milliseconds"),
      ("condensed", "masked", "milliseconds_of_many"),
    ),
    ratios=("milliseconds", "milliseconds_of_many"),
    about=timings.about,
  ),
  "lazy_neuron": Procedure(
    says=(
      "As a ReLU Transformer trains, the share of the hidden activations of "
      "its MLPs that is not zero falls from one half, under random labels, "
      "too, and ends lower where MLPs are wider."
    ),
    source=f"{LAZY}, abstract, T5 on text and ViT on images: 3.0% and 6.3%",
    differs=(
      "A Transformer of width 64 and 2 blocks on the bytes of Python's "
      "standard library, 800 steps of 8 sequences of 64 bytes; Adam, 5e-3, "
      "with a cosine. MLPs of 128 neurons are narrow, of 512 wide. Density is "
      "the mean over both blocks on 64 sequences of validation text, at the "
      "start, after a quarter and half of the steps, and at the end. Random is "
      "a narrow one whose targets are random bytes, the same each time, for 32 "
      "sequences that it learns by heart; its density is on those."
    ),
    measure=firing.emergence,
    arms=firing.ARMS,
    figures=("density", "loss"),
    better=(
      ("narrow_end", "narrow_start", "density"),
      ("wide_end", "wide_start", "density"),
      ("random_end", "random_start", "density"),
      ("wide_end", "narrow_end", "density"),
    ),
    besides=(
      ("wide_start", "narrow_start", "density"),
      ("wide_end", "narrow_end", "loss"),
    ),
  ),
  "lazy_top_k": Procedure(
    says=(
      "Trained on partly random labels, a network whose MLPs keep the k "
      "largest hidden activations is better than the dense one."
    ),
    source=f"{LAZY}, abstract, a top-k ViT on ImageNet",
    differs=(
      "An MLP of one hidden layer of 256 on MNIST-1D, of which top-k keeps 16 "
      "(6%) after the ReLU; 40% of the training labels are drawn anew, those "
      "of clean arms are true. Deep arms have two hidden layers, and top-k in "
      "both. 2,000 steps of Adam at a constant rate on 100 examples each, 50 "
      "epochs. Accuracy and loss are of clean validation labels, by which "
      "rates are tuned, too: a low rate is early stopping."
    ),
    measure=firing.noise,
    arms=tuple(firing.MLPS),
    figures=("accuracy", "loss", "training_loss"),
    better=(("top_k", "dense", "accuracy"),),
    besides=(
      ("top_k", "dense", "loss"),
      ("top_k_clean", "dense_clean", "accuracy"),
      ("top_k_clean", "dense_clean", "loss"),
      ("top_k_deep", "dense_deep", "accuracy"),
    ),
    grid={"learning_rate": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)},
  ),
  "sae_frontier": Frontier(
    says=(
      "At equal L0 a JumpReLU or BatchTopK autoencoder explains at least what "
      "a TopK one does, that more than a gated one, and that more than ReLU "
      "with an L1 term. Matryoshka's first latents explain more alone than "
      "those of BatchTopK, and OrtSAE's atoms are farther from each other."
    ),
    source=(
      "Rajamanoharan et al., Gated Sparse Autoencoders (2024) and Jumping "
      "Ahead (2024); Gao et al., Scaling and evaluating sparse autoencoders "
      "(2024); Bussmann et al., BatchTopK (2024) and Matryoshka (2025) Sparse "
      "Autoencoders; OrtSAE (2025)"
    ),
    differs=(
      "768 latents on what the fourth of six blocks of a small encoder of "
      "sentences returns (width 384), 400 steps of 512 tokens: the papers have "
      "residual streams of language models, ten times the latents and more, "
      "and a thousand times the tokens. No variant was tuned but for levels "
      "that lie around the L0 that are compared; the rate of learning is one "
      "for all."
    ),
    better=(
      ("jump_relu", "top_k", "explained"),
      ("batch_top_k", "top_k", "explained"),
      ("top_k", "gated", "explained"),
      ("gated", "l1", "explained"),
      ("matryoshka", "batch_top_k", "prefix"),
      ("ort", "batch_top_k", "nearest"),
    ),
    besides=(
      ("jump_relu", "top_k", "recovered"),
      ("batch_top_k", "top_k", "recovered"),
      ("top_k", "gated", "recovered"),
      ("gated", "l1", "recovered"),
      ("matryoshka", "batch_top_k", "explained"),
      ("ort", "batch_top_k", "explained"),
    ),
    at=(16, 32),
    config=autoencoders,
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
