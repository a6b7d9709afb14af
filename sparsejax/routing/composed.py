"""Experts composed of two halves: N^2 of them, of the parameters of 2 N.

A token's gates are those of pairs: of N first halves times of N second ones, in
each head. Sums over pairs are taken in an order in which no pair is ever made:
what they cost grows with N.
"""

from collections.abc import Callable
import statistics

from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp

from sparsejax.routing.experts import relu2
from sparsejax.routing.modules import AuxiliaryLoss
from sparsejax.routing.soft import masked_softmax

Array = jax.Array

HORIZONTAL = {"up", "up_bias", "down", "bias"}
VERTICAL = {
  *("up1", "up2", "up_bias1", "up_bias2", "bias1", "bias2"),
  *("down11", "down12", "down21", "down22"),
}


def monet_gates(
  scores: Array,
  k: int,
  *,
  mean: Array | None = None,
  variance: Array | None = None,
  epsilon: float = 1e-5,
  token_valid: Array | None = None,
) -> Array:
  """A softmax over the keys whose normalized scores are about the k highest.

  What stays is decided by a threshold instead of a sort: the quantile that k of
  the keys exceed, were their scores normal. At least the best one stays.

  Args:
    scores: floating [..., heads, keys].
    k: how many of the keys should stay, in the mean.
    mean: None, or f32 [heads], as `monet_statistics` gives it; by default that
      of these scores.
    variance: as mean, given together with it.
    epsilon: added to the variance.
    token_valid: None, or bool [...]: padding counts in no statistic and gets
      zeros. So do tokens whose scores hold NaN or +inf.

  Returns:
    f32, like scores. What stays is chosen without a gradient; the softmax is
    of the scores as they are.

  Raises:
    ValueError: for arguments that do not fit each other.

  Example:
    >>> scores = jnp.array([[[3.0, 3.0, 1.0, 1.0]]])
    >>> routing.monet_gates(scores, 2).tolist()
    [[[0.5, 0.5, 0.0, 0.0]]]

  Source: monet, Monet: Mixture of Monosemantic Experts for Transformers,
  section 3 (adaptive routing with batch normalization).
  """
  scores, may = _checked(scores, token_valid)
  keys = scores.shape[-1]
  if not 1 <= k <= keys:
    raise ValueError(f"k must be 1 to {keys}, got {k}")
  if (mean is None) != (variance is None):
    raise ValueError("variance must be given with mean, got one of them")
  if mean is None:
    mean, variance = monet_statistics(scores, token_valid=token_valid)
  for name, x in (("mean", mean), ("variance", variance)):
    if x.shape != scores.shape[-2:-1]:
      raise ValueError(
        f"{name} must be [{scores.shape[-2]}], got {list(x.shape)}"
      )
  quantile = float("-inf")
  if k < keys:
    quantile = statistics.NormalDist().inv_cdf(1 - k / keys)
  mean, variance = mean[:, None], variance[:, None]
  normal = (scores - mean) * lax.rsqrt(variance + epsilon)
  normal = lax.stop_gradient(jnp.where(may, normal, -jnp.inf))
  stays = normal >= jnp.minimum(quantile, normal.max(-1, keepdims=True))
  return masked_softmax(scores, may & stays)


def monet_statistics(
  scores: Array, *, token_valid: Array | None = None
) -> tuple[Array, Array]:
  """The mean and the variance of each head's scores, without a gradient.

  Args:
    scores: floating [..., heads, keys].
    token_valid: None, or bool [...]: padding does not count.

  Returns:
    Two f32 [heads].

  >>> routing.monet_statistics(jnp.array([[[1.0, 3.0]], [[1.0, 3.0]]]))
  (Array([2.], dtype=float32), Array([1.], dtype=float32))
  """
  scores, may = _checked(scores, token_valid)
  scores = lax.stop_gradient(scores)
  axes = (*range(scores.ndim - 2), scores.ndim - 1)
  number = jnp.maximum(may.sum(axes), 1)
  of = lambda x: jnp.where(may, x, 0).sum(axes) / number
  mean = of(scores)
  return mean, of((scores - mean[:, None]) ** 2)


def monet_losses(
  gates1: Array, gates2: Array, *, token_valid: Array | None = None
) -> tuple[Array, Array]:
  """Losses of the gates: for even, and for sure choices of the halves.

  Uniformity is minus the mean logarithm of the keys' mean gates, log(N) at
  best; ambiguity what the largest gate of a head is short of 1. Both are means
  over heads, and over both halves. Means are over the tokens that count.

  Args:
    gates1: floating [..., heads, N], as `monet_gates` gives them.
    gates2: as gates1, of the other half.
    token_valid: None, or bool [...]: padding does not count. Neither does a
      token whose gates are all 0.

  Returns:
    Uniformity and ambiguity, f32 scalars.

  Raises:
    ValueError: for arguments that do not fit each other.

  Example:
    >>> gates = jnp.array([[[1.0, 0.0]], [[0.0, 1.0]]])
    >>> [round(x.item(), 3) for x in routing.monet_losses(gates, gates)]
    [0.693, 0.0]

  Source: monet, Monet: Mixture of Monosemantic Experts for Transformers,
  equations 16 and 17. A key that no token chose counts as one of a mean gate of
  1e-6, where the paper's logarithm has no value; no gradient reaches it.
  """
  if gates2.shape != gates1.shape:
    raise ValueError(
      f"gates2 must be {list(gates1.shape)} as gates1, got {list(gates2.shape)}"
    )
  uniformity, ambiguity = [], []
  for name, gates in (("gates1", gates1), ("gates2", gates2)):
    gates, may = _checked(gates, token_valid, name)
    counted = may.all((-1, -2)) & (gates != 0).any((-1, -2))
    number = jnp.maximum(counted.sum(), 1)
    axes = tuple(range(gates.ndim - 2))
    gates = jnp.where(counted[..., None, None], gates, 0)
    mean = jnp.maximum(gates.sum(axes) / number, 1e-6)
    uniformity.append(-jnp.log(mean).mean())
    short = jnp.where(counted[..., None], 1 - gates.max(-1), 0)
    ambiguity.append(short.sum(axes).mean() / number)
  return sum(uniformity) / 2, sum(ambiguity) / 2


def monet_horizontal(
  x: Array,
  gates1: Array,
  gates2: Array,
  params: dict[str, Array],
  *,
  activation: Callable[[Array], Array] = relu2,
  removed: Array | None = None,
) -> Array:
  """Expert (i, j) has the first layer i and the second layer j.

  Args:
    x: floating [..., d].
    gates1: floating [..., heads, N], of first layers.
    gates2: as gates1, of second layers.
    params: "up" [N, d, m], "up_bias" [N, m], "down" [N, m, d2], "bias" [N, d2].
    activation: elementwise.
    removed: None, or int [n, 2]: pairs (i, j) that are left out, by subtracting
      what they add. Pairs that do not exist, such as (-1, -1), are ignored.

  Returns:
    [..., d2] in the dtype of x: the sum over heads and pairs of gates1[i] x
    gates2[j] x expert(x). Zeros where all gates1 are 0.

  Raises:
    ValueError: for arguments that do not fit each other.

  Example:
    Four experts of two layers each:

    >>> params = {
    ...   "up": jnp.array([[[1.0]], [[2.0]]]),
    ...   "up_bias": jnp.zeros((2, 1)),
    ...   "down": jnp.array([[[1.0]], [[10.0]]]),
    ...   "bias": jnp.zeros((2, 1)),
    ... }
    >>> gates = jnp.array([[0.0, 1.0]])
    >>> routing.monet_horizontal(jnp.ones(1), gates, gates, params).tolist()
    [40.0]

  Source: monet, Monet: Mixture of Monosemantic Experts for Transformers,
  equations 6 to 12 (horizontal expert decomposition).
  """
  x, g1, g2, params = _gated(x, gates1, gates2, params, HORIZONTAL)
  hidden = _layer(x, params["up"], params["up_bias"], activation)
  mixed = _mixture(g1, hidden)
  y = _down(g2, mixed, params["down"])
  y += _weights(g1, g2) @ params["bias"]
  if removed is None:
    return y
  gate, i, j = _pairs(g1, g2, removed)
  out = jnp.einsum("...rm,rmd->...rd", hidden[..., i, :], params["down"][j])
  return y - jnp.einsum("...r,...rd->...d", gate, out + params["bias"][j])


def monet_vertical(
  x: Array,
  gates1: Array,
  gates2: Array,
  params: dict[str, Array],
  *,
  activation: Callable[[Array], Array] = relu2,
  removed: Array | None = None,
) -> Array:
  """Expert (i, j) has the halves i and j of the hidden layer and of the output.

  Args:
    x: floating [..., d].
    gates1: floating [..., heads, N], of first halves.
    gates2: as gates1, of second halves.
    params: "up1", "up2" [N, d, m] and "up_bias1", "up_bias2" [N, m]; "down11"
      and "down12" [N, m, d2 / 2], from both hidden halves to the first half of
      the output, and "bias1" [N, d2 / 2], all of i; "down21", "down22" and
      "bias2" of j, to the second half.
    activation: elementwise.
    removed: as of `monet_horizontal`.

  Returns:
    [..., d2] in the dtype of x, as of `monet_horizontal`.

  Raises:
    ValueError: for arguments that do not fit each other.

  Source: monet, Monet: Mixture of Monosemantic Experts for Transformers,
  equations 13 to 15 (vertical expert decomposition).
  """
  x, g1, g2, params = _gated(x, gates1, gates2, params, VERTICAL)
  a = _layer(x, params["up1"], params["up_bias1"], activation)
  b = _layer(x, params["up2"], params["up_bias2"], activation)
  w1, w2 = _weights(g2, g1), _weights(g1, g2)  # summed over the other half
  own = lambda w, hidden, down: jnp.einsum(
    "...nm,nmd->...d", w[..., None] * hidden, down
  )
  first = own(w1, a, params["down11"]) + w1 @ params["bias1"]
  first += _down(g1, _mixture(g2, b), params["down12"])
  second = own(w2, b, params["down22"]) + w2 @ params["bias2"]
  second += _down(g2, _mixture(g1, a), params["down21"])
  if removed is not None:
    gate, i, j = _pairs(g1, g2, removed)
    a, b = a[..., i, :], b[..., j, :]
    for_pairs = lambda hidden, down: jnp.einsum(
      "...rm,rmd->...rd", hidden, down
    )
    out1 = for_pairs(a, params["down11"][i]) + for_pairs(b, params["down12"][i])
    out2 = for_pairs(a, params["down21"][j]) + for_pairs(b, params["down22"][j])
    total = lambda out: jnp.einsum("...r,...rd->...d", gate, out)
    first -= total(out1 + params["bias1"][i])
    second -= total(out2 + params["bias2"][j])
  return jnp.concatenate([first, second], -1)


class BatchStatistics(nnx.Variable):
  """Running means and variances of a router's scores."""


class Monet(nnx.Module):
  """N^2 small experts in the place of a feed-forward network.

  Two linear routers score N halves in each head; see `monet_gates`. After
  `model.eval()` statistics are the running ones. The paper shares a router
  among several layers: `gates` are of one, and may be given to others.

  Args:
    width: of tokens.
    hidden: of an expert: of each half, where the kind is "vertical".
    keys: N.
    heads: of the routers.
    k: how many of the keys stay, about.
    kind: "horizontal" or "vertical".
    activation: elementwise.
    momentum: of the running statistics: what is kept at each call.
    loss_weight: None, or what `monet_losses` are multiplied by, for
      `auxiliary_loss` to sum up. The paper's is 1e-3.
    param_dtype: of the experts' parameters; the routers' are f32.
    rngs: for the initial parameters.

  Example:
    >>> from flax import nnx
    >>> model = routing.Monet(4, 2, keys=8, heads=2, k=2, rngs=nnx.Rngs(0))
    >>> model(jnp.ones((3, 5, 4))).shape
    (3, 5, 4)

  Source: monet, Monet: Mixture of Monosemantic Experts for Transformers;
  losses: equation 18.
  """

  def __init__(
    self,
    width: int,
    hidden: int,
    keys: int,
    *,
    heads: int,
    k: int,
    kind: str = "horizontal",
    activation: Callable[[Array], Array] = relu2,
    momentum: float = 0.9,
    loss_weight: float | None = None,
    param_dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    if kind not in ("horizontal", "vertical"):
      raise ValueError(f'kind must be "horizontal" or "vertical", got {kind!r}')
    if kind == "vertical" and width % 2:
      raise ValueError(f'width must be even with kind="vertical", got {width}')
    linear = jax.nn.initializers.lecun_normal(in_axis=0, out_axis=(1, 2, 3))
    self.router = nnx.Param(
      linear(rngs.params(), (width, 2, heads, keys), jnp.float32)
    )
    normal = jax.nn.initializers.lecun_normal(
      in_axis=1, out_axis=2, batch_axis=0
    )
    half = width // 2
    if kind == "horizontal":
      shapes = {"up": (width, hidden), "down": (hidden, width)}
      biases = {"up_bias": hidden, "bias": width}
    else:
      shapes = dict.fromkeys(("up1", "up2"), (width, hidden))
      downs = ("down11", "down12", "down21", "down22")
      shapes |= dict.fromkeys(downs, (hidden, half))
      biases = dict.fromkeys(("up_bias1", "up_bias2"), hidden)
      biases |= dict.fromkeys(("bias1", "bias2"), half)
    params = {
      name: normal(rngs.params(), (keys, *shape), param_dtype)
      for name, shape in shapes.items()
    }
    params |= {
      name: jnp.zeros((keys, size), param_dtype)
      for name, size in biases.items()
    }
    self.experts = nnx.data(jax.tree.map(nnx.Param, params))
    self.mean = BatchStatistics(jnp.zeros((2, heads)))
    self.variance = BatchStatistics(jnp.ones((2, heads)))
    self.k = k
    self.kind = kind
    self.activation = activation
    self.momentum = momentum
    self.loss_weight = loss_weight
    if loss_weight is not None:
      self.loss = AuxiliaryLoss(jnp.zeros(()))
    self.use_running_average = False

  def __call__(
    self,
    x: Array,
    *,
    token_valid: Array | None = None,
    removed: Array | None = None,
    gates: tuple[Array, Array] | None = None,
  ) -> Array:
    """Floating [..., width], like x.

    `removed` as of `monet_horizontal`; `gates` those of another layer, which
    take the place of its own and are in that one's losses.
    """
    if gates is None:
      gates = self.gates(x, token_valid=token_valid)
      if self.loss_weight is not None:
        losses = monet_losses(*gates, token_valid=token_valid)
        self.loss[...] = self.loss_weight * sum(losses)
    gates1, gates2 = gates
    params = {name: p[...].astype(x.dtype) for name, p in self.experts.items()}
    of = monet_horizontal if self.kind == "horizontal" else monet_vertical
    return of(
      x, gates1, gates2, params, activation=self.activation, removed=removed
    )

  def gates(
    self, x: Array, *, token_valid: Array | None = None
  ) -> tuple[Array, Array]:
    """Both halves' gates, f32 [..., heads, keys]."""
    if token_valid is not None:
      x = jnp.where(token_valid[..., None], x, 0)
    scores = jnp.einsum(
      "...d,dchn->c...hn",
      x.astype(jnp.float32),
      self.router[...],
      precision="highest",
    )
    found, means, variances = [], [], []
    for c in range(2):
      mean, variance = self.mean[...][c], self.variance[...][c]
      if not self.use_running_average:
        now = monet_statistics(scores[c], token_valid=token_valid)
        # Only these stay; in this call the statistics are its own.
        m = self.momentum
        means.append(m * mean + (1 - m) * now[0])
        variances.append(m * variance + (1 - m) * now[1])
        mean, variance = now
      found.append(
        monet_gates(
          scores[c],
          self.k,
          mean=mean,
          variance=variance,
          token_valid=token_valid,
        )
      )
    if means:
      self.mean[...], self.variance[...] = map(jnp.stack, (means, variances))
    return tuple(found)


def _checked(scores, token_valid, name="scores"):
  """f32 scores without NaN or +inf, and which of them may stay."""
  if scores.ndim < 2 or not jnp.issubdtype(scores.dtype, jnp.floating):
    raise ValueError(
      f"{name} must be floating [..., heads, keys], got {scores.dtype}"
      f"{list(scores.shape)}"
    )
  scores = scores.astype(jnp.float32)
  valid = (scores < jnp.inf).all((-1, -2))  # false for NaN, too
  if token_valid is not None:
    if token_valid.shape != valid.shape or token_valid.dtype != bool:
      raise ValueError(
        f"token_valid must be bool{list(valid.shape)}, got {token_valid.dtype}"
        f"{list(token_valid.shape)}"
      )
    valid &= token_valid
  may = valid[..., None, None] & (scores > -jnp.inf)
  return jnp.where(may, scores, 0), may


def _gated(x, gates1, gates2, params, names):
  if set(params) != names:
    raise ValueError(
      f"params must have {', '.join(sorted(names))}, got {sorted(params)}"
    )
  keys = len(next(iter(params.values())))
  for name, gates in (("gates1", gates1), ("gates2", gates2)):
    heads = gates1.shape[-2] if gates1.ndim > 1 else 0
    if gates.shape != (*x.shape[:-1], heads, keys):
      raise ValueError(
        f"{name} must be [..., heads, {keys}] of x {list(x.shape)}, got "
        f"{list(gates.shape)}"
      )
  params = jax.tree.map(jnp.asarray, params)
  some = (gates1 != 0).any((-1, -2))
  x = jnp.where(some[..., None], x, 0)  # padding may hold anything
  return x, gates1.astype(x.dtype), gates2.astype(x.dtype), params


def _layer(x, up, bias, activation):
  return activation(jnp.einsum("...d,ndm->...nm", x, up) + bias)


def _mixture(gates, hidden):
  """What a head makes of all halves, [..., heads, m]."""
  return jnp.einsum("...hn,...nm->...hm", gates, hidden)


def _down(gates, mixed, down):
  """Through the second layers, each with the mixtures of its heads."""
  each = jnp.einsum("...hn,...hm->...nm", gates, mixed)
  return jnp.einsum("...nm,nmd->...d", each, down)


def _weights(others, gates):
  """Gates times the sums of the other half's, over heads: [..., N]."""
  return jnp.einsum("...h,...hn->...n", others.sum(-1), gates)


def _pairs(gates1, gates2, removed):
  """The gates of pairs, [..., n], and their two indices."""
  if (
    removed.ndim != 2
    or removed.shape[1] != 2
    or not (jnp.issubdtype(removed.dtype, jnp.integer))
  ):
    raise ValueError(
      f"removed must be integer[n, 2], got {removed.dtype}{list(removed.shape)}"
    )
  keys = gates1.shape[-1]
  exists = ((removed >= 0) & (removed < keys)).all(-1)
  same = (removed[:, None] == removed).all(-1)
  exists &= ~jnp.tril(same, -1).any(-1)  # a pair is subtracted once
  i, j = jnp.clip(removed, 0, keys - 1).T
  gate = (gates1[..., i] * gates2[..., j]).sum(-2)
  return jnp.where(exists, gate, 0), i, j
