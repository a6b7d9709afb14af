"""A multilayer perceptron."""

import itertools

from flax import nnx
import jax

from sparsejax import activations


class MLP(nnx.Module):
  """`depth` hidden layers of `width` with ReLU, and a linear readout.

  Called with features [..., inputs], it returns logits [..., classes]. With
  `top_k` above 0, so many of each hidden layer's activations are kept.
  """

  def __init__(
    self,
    *,
    inputs: int,
    classes: int,
    width: int,
    depth: int,
    top_k: int = 0,
    rngs: nnx.Rngs,
  ):
    he = nnx.initializers.he_normal()
    self.top_k = top_k
    sizes = [inputs] + [width] * depth
    self.hidden = nnx.List(
      nnx.Linear(size_in, size_out, kernel_init=he, rngs=rngs)
      for size_in, size_out in itertools.pairwise(sizes)
    )
    self.readout = nnx.Linear(sizes[-1], classes, rngs=rngs)

  def __call__(self, features: jax.Array) -> jax.Array:
    for layer in self.hidden:
      features = nnx.relu(layer(features))
      if self.top_k:
        features = activations.top_k(features, self.top_k)
    return self.readout(features)

  def other_flops(self, tokens: int) -> float:
    """Operations on an example beyond the weights."""
    del tokens
    return 0.0
