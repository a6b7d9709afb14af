"""Sparse layers of more weights at the FLOPs of a dense one (Sparse-IFT).

Each module stands where dense layers did: the same inputs and outputs, and as
many multiply-adds by weights that are not zero. Masks are the business of the
optimizer: `sparsities()` says how sparse each kernel must be.
"""

from collections.abc import Callable, Sequence
import itertools
import math
import numbers
import re
from typing import Any

from flax import nnx
import jax
import numpy as np

from sparsejax import costs
from sparsejax import paths
from sparsejax.select import budgets

Array = jax.Array
PyTree = Any
Activation = Callable[[Array], Array]

_PARAMS = ("kernel", "bias")


class IsoFlop(nnx.Module):
  """What the four transformations share: kernels, and how many weights stay.

  A kernel lies in an `nnx.Linear`, so that every method of this room trains it
  and `sparsejax.weights.condense_layers` makes it run sparse. It begins as that
  does; `sparsejax.weights.rescale_fan_in` makes up for what a mask takes away.

  Attributes:
    kept: `((name of a kernel, weights that stay), ...)`.
  """

  kept: tuple[tuple[str, int], ...]

  def _kernels(self) -> dict[str, tuple[int, int]]:
    """Shapes by name, whatever a kernel has become by condensing."""
    return {
      "/".join(map(str, (*path, "kernel"))): (
        module.in_features,
        module.out_features,
      )
      for path, module in nnx.iter_graph(self)
      if isinstance(module, nnx.Linear)
    }

  def sparsities(self, path: str | None = None) -> dict[str, float]:
    """Share of weights to mask, by a pattern of each sparse kernel's path.

    To be given as `sparsity=` to any method that takes patterns: kernels that
    stay dense are left out, and other parameters stay dense too. Several such
    modules of one model each say where they are:
    `model.up.sparsities("up") | model.down.sparsities("down")`.

    Args:
      path: where the module lies in the model whose parameters are trained.
        None fits anywhere, and so also other parameters whose paths end in the
        same names.
    """
    shapes = self._kernels()
    begin = "(^|/)" if path is None else f"^{re.escape(path)}/"
    return {
      f"{begin}{re.escape(name)}$": 1 - count / math.prod(shapes[name])
      for name, count in self.kept
      if count < math.prod(shapes[name])
    }

  def nonzero(self, masks: PyTree | None = None) -> int:
    """Weights of all kernels that are not masked; biases do not count.

    Args:
      masks: boolean, a tree like the module's parameters or part of it; None
        for what `sparsities()` leaves.

    Raises:
      ValueError: a mask is of no parameter of the module, or not of a kernel's
        shape.
    """
    if masks is None:
      return sum(count for _, count in self.kept)
    given, shapes = paths.named(masks)[0], self._kernels()
    own = {f"{n.removesuffix('kernel')}{x}" for n in shapes for x in _PARAMS}
    if other := [n for n in given if n not in own]:
      raise ValueError(
        f"masks must be of the module's own parameters {sorted(own)}, got "
        f"others for {other}"
      )
    total = 0
    for name, shape in shapes.items():
      mask = given.get(name, np.ones(shape, bool))
      if tuple(mask.shape) != shape or mask.dtype != bool:
        raise ValueError(
          f"masks[{name!r}] must be boolean {list(shape)}, got "
          f"{mask.dtype}{list(mask.shape)}"
        )
      total += int(np.sum(mask))
    return total

  def flops(self, masks: PyTree | None = None) -> float:
    """FLOPs of one row of x: two for each weight of `nonzero(masks)`."""
    return costs.weight_flops(self.nonzero(masks))


class SparseWide(IsoFlop):
  """Sparse Wide: a perceptron whose hidden layers are 1 / sqrt(1 - s) as wide.

  A kernel between hidden layers so has 1 / (1 - s) as many weights, and at
  sparsity s as many that are not zero. Inputs and outputs stay as they are: the
  first and the last kernel grow by 1 / sqrt(1 - s) only and are as much less
  sparse. (The paper widens whole networks, whose ends alone are such.) Each
  keeps exactly as many weights as the dense kernel has.

  Attributes:
    layers: nnx.List of nnx.Linear.
    widths: inputs, hidden widths and outputs, as they are.

  Args:
    in_features: size of the last axis of x.
    hidden: width of the hidden layer of the dense block, or widths of several.
    out_features: size of the result's.
    sparsity: the paper's s, in [0, 1). 0 is the dense block.
    activation: between the layers.
    multiple: hidden widths are multiples of it, so that blocks divide them
      (but for s = 0, which is the dense block).
    rngs: `nnx.Rngs` with a stream "params".
    options: further ones of each `nnx.Linear`: `use_bias`, `dtype`,
      `kernel_init` ...

  Raises:
    ValueError: sparsity is not in [0, 1), or there is no hidden layer.

  Source: [sparse-ift] Thangarasa et al., Sparse Iso-FLOP Transformations for
    Maximizing Training Efficiency, Sparse Wide.

  >>> from flax import nnx
  >>> block = weights.SparseWide(8, 16, 4, sparsity=0.75, rngs=nnx.Rngs(0))
  >>> block.widths, block.nonzero(), 8 * 16 + 16 * 4
  ((8, 32, 4), 192, 192)
  >>> tx = weights.rigl(
  ...   optax.adam(1e-3),
  ...   sparsity=block.sparsities(),
  ...   until=1000,
  ...   key=jax.random.key(0),
  ... )
  """

  def __init__(
    self,
    in_features: int,
    hidden: int | Sequence[int],
    out_features: int,
    *,
    sparsity: float,
    activation: Activation = jax.nn.relu,
    multiple: int = 1,
    rngs: nnx.Rngs,
    **options: Any,
  ):
    _check(sparsity, multiple)
    hidden = hidden if isinstance(hidden, Sequence) else (hidden,)
    if not hidden:
      raise ValueError("hidden must have at least one width, got none")
    wide = tuple(self._wide(h, sparsity, multiple) for h in hidden)
    self.widths = (in_features, *wide, out_features)
    self.activation = activation
    self.layers = nnx.List(
      nnx.Linear(a, b, rngs=rngs, **options)
      for a, b in itertools.pairwise(self.widths)
    )
    dense = itertools.pairwise((in_features, *hidden, out_features))
    self.kept = tuple(
      (f"layers/{i}/kernel", a * b) for i, (a, b) in enumerate(dense)
    )

  @staticmethod
  def _wide(width, sparsity, multiple):
    if not sparsity:
      return width
    wide = multiple * round(width / math.sqrt(1 - sparsity) / multiple)
    return max(wide, multiple * math.ceil(width / multiple))

  def __call__(self, x: Array) -> Array:
    """[..., in_features] to [..., out_features]."""
    *inner, last = self.layers
    for layer in inner:
      x = self.activation(layer(x))
    return last(x)


class SparseParallel(IsoFlop):
  """Sparse Parallel: the sum of 1 / (1 - s) sparse layers, not one dense.

  `y = sum over branches of activation(x @ kernel + bias)`. There is a whole
  number of branches, 1 / (1 - s) rounded, and together they keep exactly as
  many weights as the dense layer has: for s of 1/2, 2/3, 3/4 ... each branch
  has sparsity s.

  Without an activation the sum is one linear layer that trains otherwise. (The
  authors' code has a batch norm in each branch, then the sum, then relu.)

  Attributes:
    branches: nnx.List of nnx.Linear.

  Args:
    in_features: size of the last axis of x.
    out_features: size of the result's.
    sparsity: the paper's s, in [0, 1). 0 is the dense layer.
    activation: after each branch, before the sum; None for none.
    rngs: `nnx.Rngs` with a stream "params".
    options: further ones of each `nnx.Linear`.

  Raises:
    ValueError: sparsity is not in [0, 1).

  Source: [sparse-ift] Thangarasa et al., Sparse Iso-FLOP Transformations for
    Maximizing Training Efficiency, Sparse Parallel.

  >>> from flax import nnx
  >>> layer = weights.SparseParallel(8, 6, sparsity=0.75, rngs=nnx.Rngs(0))
  >>> len(layer.branches), layer.nonzero(), layer(jnp.ones((3, 8))).shape
  (4, 48, (3, 6))
  """

  def __init__(
    self,
    in_features: int,
    out_features: int,
    *,
    sparsity: float,
    activation: Activation | None = None,
    rngs: nnx.Rngs,
    **options: Any,
  ):
    _check(sparsity)
    many = round(1 / (1 - sparsity))
    self.activation = activation
    self.branches = nnx.List(
      nnx.Linear(in_features, out_features, rngs=rngs, **options)
      for _ in range(many)
    )
    each, more = divmod(in_features * out_features, many)
    self.kept = tuple(
      (f"branches/{i}/kernel", each + (i < more)) for i in range(many)
    )

  def __call__(self, x: Array) -> Array:
    """[..., in_features] to [..., out_features]."""
    out = [branch(x) for branch in self.branches]
    if self.activation is not None:
      out = [self.activation(y) for y in out]
    return sum(out[1:], start=out[0])


class SparseFactorized(IsoFlop):
  """Sparse Factorized: two sparse kernels through more inner features.

  `y = activation(x @ down) @ up + bias` by `in * out / ((1 - s) (in + out))`
  inner features, rounded up as in the authors' code. Both kernels together keep
  exactly as many weights as the dense layer has.

  Below s = 1/2 (of a square layer) the product has a low rank. At s = 0 it is
  not made: the dense layer is.

  Attributes:
    down: nnx.Linear without bias to the inner features, or None at s = 0.
    up: nnx.Linear from them.

  Args:
    in_features: size of the last axis of x.
    out_features: size of the result's.
    sparsity: the paper's s, in [0, 1). 0 is the dense layer.
    activation: of the inner features; None for none. The authors' code has
      both, there with a batch norm before it.
    multiple: the inner features are a multiple of it, so that blocks divide
      them.
    use_bias: whether `up` has a bias.
    rngs: `nnx.Rngs` with a stream "params".
    options: further ones of each `nnx.Linear`.

  Raises:
    ValueError: sparsity is not in [0, 1).

  Source: [sparse-ift] Thangarasa et al., Sparse Iso-FLOP Transformations for
    Maximizing Training Efficiency, Sparse Factorized.

  >>> from flax import nnx
  >>> layer = weights.SparseFactorized(8, 8, sparsity=0.75, rngs=nnx.Rngs(0))
  >>> layer.down.kernel.shape, layer.nonzero()
  ((8, 16), 64)
  """

  def __init__(
    self,
    in_features: int,
    out_features: int,
    *,
    sparsity: float,
    activation: Activation | None = None,
    multiple: int = 1,
    use_bias: bool = True,
    rngs: nnx.Rngs,
    **options: Any,
  ):
    _check(sparsity, multiple)
    self.activation = activation
    total, both = in_features * out_features, in_features + out_features
    inner = 0
    if sparsity and total:
      inner = multiple * math.ceil(total / ((1 - sparsity) * both) / multiple)
    width = inner if inner else in_features
    self.down = nnx.data(None)
    if inner:
      self.down = nnx.Linear(
        in_features, inner, use_bias=False, rngs=rngs, **options
      )
    self.up = nnx.Linear(
      width, out_features, use_bias=use_bias, rngs=rngs, **options
    )
    # Each by its share of the weights.
    sizes = {"up/kernel": width * out_features}
    if inner:
      sizes["down/kernel"] = in_features * inner
    share = min(1.0, total / max(sum(sizes.values()), 1))
    self.kept = tuple(
      budgets.largest_remainder(
        {n: share * x for n, x in sizes.items()}
      ).items()
    )

  def __call__(self, x: Array) -> Array:
    """[..., in_features] to [..., out_features]."""
    if self.down is not None:
      x = self.down(x)
      x = x if self.activation is None else self.activation(x)
    return self.up(x)


class SparseDoped(IsoFlop):
  """Sparse Doped: a sparse kernel beside a dense product of low rank.

  `y = x @ sparse + x @ down @ up + bias`. The rank is `s in out / (in + out)`,
  rounded down as in the authors' code. The sparse kernel keeps the weights that
  the product leaves of the dense layer's, so that together there are exactly as
  many: sparsity s, or by the rounding somewhat less. Where the rank is 0, as at
  s = 0, it is the dense layer.

  Attributes:
    sparse: nnx.Linear.
    down: nnx.Linear [in_features, rank] without bias, or None at rank 0.
    up: nnx.Linear [rank, out_features], likewise.

  Args:
    in_features: size of the last axis of x.
    out_features: size of the result's.
    sparsity: the paper's s, in [0, 1).
    use_bias: whether `sparse` has a bias.
    rngs: `nnx.Rngs` with a stream "params".
    options: further ones of each `nnx.Linear`.

  Raises:
    ValueError: sparsity is not in [0, 1).

  Source: [sparse-ift] Thangarasa et al., Sparse Iso-FLOP Transformations for
    Maximizing Training Efficiency, Sparse Doped.

  >>> from flax import nnx
  >>> layer = weights.SparseDoped(8, 8, sparsity=0.5, rngs=nnx.Rngs(0))
  >>> layer.down.kernel.shape, layer.nonzero(), layer.sparsities()
  ((8, 2), 64, {'(^|/)sparse/kernel$': 0.5})
  """

  def __init__(
    self,
    in_features: int,
    out_features: int,
    *,
    sparsity: float,
    use_bias: bool = True,
    rngs: nnx.Rngs,
    **options: Any,
  ):
    _check(sparsity)
    total, both = in_features * out_features, in_features + out_features
    rank = math.floor(sparsity * total / both) if both else 0
    linear = lambda a, b, bias: nnx.Linear(
      a, b, use_bias=bias, rngs=rngs, **options
    )
    self.sparse = linear(in_features, out_features, use_bias)
    self.down = self.up = nnx.data(None)
    self.kept = (("sparse/kernel", total - rank * both),)
    if rank:
      self.down = linear(in_features, rank, False)
      self.up = linear(rank, out_features, False)
      self.kept += (
        ("down/kernel", in_features * rank),
        ("up/kernel", rank * out_features),
      )

  def __call__(self, x: Array) -> Array:
    """[..., in_features] to [..., out_features]."""
    y = self.sparse(x)
    return y if self.down is None else y + self.up(self.down(x))


def _check(sparsity, multiple=1):
  budgets.check_share("sparsity", sparsity)
  if sparsity == 1:
    raise ValueError("sparsity must be in [0, 1), got 1")
  if not isinstance(multiple, numbers.Integral) or multiple < 1:
    raise ValueError(f"multiple must be a positive integer, got {multiple!r}")
