"""The models of the experiments, as Flax NNX modules."""

from experiments.models.mlp import MLP
from experiments.models.transformer import Transformer

MODELS = {"mlp": MLP, "transformer": Transformer}

__all__ = ["MLP", "MODELS", "Transformer"]
