"""The models of the experiments, as Flax NNX modules."""

from experiments.models.mlp import MLP
from experiments.models.moe import MoETransformer
from experiments.models.moe import reported
from experiments.models.moe import Step
from experiments.models.transformer import Transformer

MODELS = {
  "mlp": MLP,
  "moe_transformer": MoETransformer,
  "transformer": Transformer,
}

__all__ = [
  "MLP",
  "MODELS",
  "MoETransformer",
  "Step",
  "Transformer",
  "reported",
]
