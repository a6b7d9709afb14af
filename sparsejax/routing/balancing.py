"""How evenly experts are used: losses, a bias without a loss, and metrics.

All are functions of an `Assignment`, in f32, over the tokens that count. Under
a sharded `jit` they are of all tokens; inside of a `shard_map` they are with
`axis_names`, the mesh axes over which tokens are divided.
"""

import jax
from jax import lax
import jax.numpy as jnp
import optax

from sparsejax.automatic import automatic
from sparsejax.routing.assignment import Assignment

Array = jax.Array
AxisNames = tuple[str, ...]


def load_balance(
  found: Assignment,
  *,
  segments: Array | None = None,
  num_segments: int | None = None,
  axis_names: AxisNames = (),
) -> Array:
  """Experts times the sum of (share of edges) x (mean probability): 1 at best.

  Probabilities are those of the assignment, which add up to 1; shares are of
  all edges, so that a token may have any number of them.

  Args:
    found: what a router returned. Shares carry no gradient, probabilities do.
    segments: None, or int32 [tokens]: shares and means are taken in each
      segment alone (a sequence), and the loss is the mean over the segments
      that have tokens that count.
    num_segments: how many there are; given together with `segments`.
    axis_names: mesh axes over which tokens are divided, in a `shard_map`.

  Returns:
    f32 scalar.

  Raises:
    ValueError: segments without their number.

  >>> found = routing.top_k(jnp.zeros((4, 2)), 2)
  >>> routing.load_balance(found).item()
  1.0

  Source: switch, Switch Transformers, equations 4 to 6.
  """
  if (segments is None) != (num_segments is None):
    raise ValueError(
      f"num_segments must be given with segments, got {num_segments}"
    )
  experts = found.num_experts
  if segments is None:
    edges, p = found.sizes[None], found.probabilities.sum(0)[None]
    tokens = found.token_valid.sum()[None]
  else:

    def sums(found, segments):
      add = lambda x, at=segments: jax.ops.segment_sum(x, at, num_segments)
      at = segments[found.token] * experts + found.expert
      edges = jax.ops.segment_sum(
        found.valid.astype(jnp.int32), at, num_segments * experts
      )
      valid = found.token_valid.astype(jnp.int32)
      return edges.reshape(-1, experts), add(found.probabilities), add(valid)

    edges, p, tokens = automatic(sums, found, segments)
  edges, p, tokens = (_over(x, axis_names) for x in (edges, p, tokens))
  edges = edges.astype(jnp.float32)
  share = edges / jnp.maximum(edges.sum(-1, keepdims=True), 1)
  loss = experts * (share * p).sum(-1) / jnp.maximum(tokens, 1)
  return loss.sum() / jnp.maximum((tokens > 0).sum(), 1)


def z_loss(found: Assignment, *, axis_names: AxisNames = ()) -> Array:
  """The mean of the squared log-sum-exp of the logits that are allowed.

  >>> routing.z_loss(routing.top_k(jnp.zeros((4, 1)), 1)).item()
  0.0

  Source: gshard-topk, ST-MoE: Designing Stable and Transferable Sparse Expert
  Models, router z-loss.
  """
  squares = jax.nn.logsumexp(found.logits, -1) ** 2
  return _mean_over_tokens(found, squares, axis_names)


def importance(found: Assignment, *, axis_names: AxisNames = ()) -> Array:
  """The squared coefficient of variation of the experts' summed weights.

  >>> logits = jnp.log(jnp.array([[0.5, 0.5], [0.75, 0.25]]))
  >>> routing.importance(routing.top_k(logits, 2)).round(4).item()
  0.0625

  Source: gshard-topk, Outrageously Large Neural Networks, equations 6 and 7.
  """
  return _variation(_over(found.by_expert(found.weight), axis_names))


def load(
  logits: Array,
  noise: Array,
  scale: Array | float,
  k: int,
  *,
  threshold: str = "excluding",
  token_valid: Array | None = None,
  axis_names: AxisNames = (),
) -> Array:
  """The squared coefficient of variation of the experts' expected load.

  What an expert's load would be if its noise alone were drawn again: that has
  gradients, where the number of tokens that chose it has none.

  Args:
    logits: floating [tokens, experts], without noise.
    noise: standard normal [tokens, experts], as it was drawn.
    scale: positive, what the noise is multiplied by; [tokens, experts] or a
      scalar.
    k: experts a token goes to.
    threshold: what an expert must exceed to stay: "excluding", the k-th largest
      noisy logit of the others (Shazeer), or "kth", that of all (V-MoE).
    token_valid: None, or bool [tokens].
    axis_names: mesh axes over which tokens are divided, in a `shard_map`.

  Returns:
    f32 scalar.

  Raises:
    ValueError: for arguments that do not fit each other.

  >>> logits, noise = jnp.array([[4.0, 0.0]]), jnp.zeros((1, 2))
  >>> routing.load(logits, noise, 1.0, 1).round(3).item()
  1.0

  Source: gshard-topk, Outrageously Large Neural Networks, equations 8 to 11;
  "kth": v-moe, Scaling Vision with Sparse Mixture of Experts, load loss.
  """
  experts = logits.shape[1]
  if not 1 <= k <= experts:
    raise ValueError(f"k must be 1 to {experts}, got {k}")
  if threshold not in ("excluding", "kth"):
    raise ValueError(
      f'threshold must be "excluding" or "kth", got {threshold!r}'
    )
  if noise.shape != logits.shape:
    raise ValueError(
      f"noise must be {list(logits.shape)}, got {list(noise.shape)}"
    )
  logits = logits.astype(jnp.float32)
  noisy = logits + noise * scale
  counted = (noisy < jnp.inf).all(-1) & (noisy > -jnp.inf).any(-1)
  if token_valid is not None:
    counted &= token_valid
  # Again, for the gradient of what does not count has a NaN where that has one.
  logits, noise, scale = (
    jnp.where(counted[:, None], x, 0) for x in (logits, noise, scale)
  )
  noisy = logits + noise * scale
  best, _ = lax.top_k(noisy, min(k + 1, experts))
  bar = jnp.broadcast_to(best[:, k - 1 : k], noisy.shape)
  if threshold == "excluding":
    others = best[:, k:] if k < experts else -jnp.inf
    bar = jnp.where(noisy >= bar, others, bar)
  # Without a bar it stays; what is not allowed does not.
  plain = counted[:, None] & (logits > -jnp.inf) & (bar > -jnp.inf)
  above = jnp.where(plain, logits, 0) - jnp.where(plain, bar, 0)
  above /= jnp.where(plain, scale, 1)
  stays = jnp.where(
    plain,
    jax.scipy.special.ndtr(above),
    counted[:, None] & (logits > -jnp.inf),
  )
  return _variation(_over(stays.sum(0), axis_names))


def entropy(found: Assignment, *, axis_names: AxisNames = ()) -> Array:
  """The mean entropy of the tokens' probabilities, in nats.

  >>> routing.entropy(routing.top_k(jnp.zeros((4, 2)), 1)).item()
  0.6931471824645996
  """
  return _mean_over_tokens(found, _entropy(found.probabilities), axis_names)


def mutual_information(
  found: Assignment, *, axis_names: AxisNames = ()
) -> Array:
  """Minus the information that tokens and experts have of each other, in nats.

  The mean entropy of the tokens' probabilities, less the entropy of their mean:
  -log(experts) for sure choices in equal shares, 0 at uniform probabilities.

  >>> logits = jnp.array([[50.0, 0.0], [0.0, 50.0]])
  >>> routing.mutual_information(routing.top_k(logits, 1)).item()
  -0.6931471824645996

  Source: moduleformer, ModuleFormer, mutual information loss.
  """
  mean = _mean_over_tokens(found, found.probabilities, axis_names)
  return entropy(found, axis_names=axis_names) - _entropy(mean)


def concentration(found: Assignment, *, axis_names: AxisNames = ()) -> Array:
  """The entropy of the tokens' mean probabilities, in nats.

  It falls as load gathers on a few experts, so that the others can be removed.

  >>> routing.concentration(routing.top_k(jnp.zeros((4, 2)), 1)).item()
  0.6931471824645996

  Source: moduleformer, ModuleFormer, load concentration.
  """
  return _entropy(_mean_over_tokens(found, found.probabilities, axis_names))


def locality(
  found: Assignment,
  *,
  steepness: float = 100.0,
  segments: Array | None = None,
) -> Array:
  """How unlike the experts of neighbors are: falls as they grow alike.

  The cross-entropy between sigmoid(steepness x logits) of each token, the
  prediction, and of the next one, the target; the mean over pairs and experts.
  Both have gradients. To be used with `relu`, for which logits above 0 are
  experts that are active.

  Args:
    found: what a router returned.
    steepness: of the sigmoid.
    segments: None, or int32 [tokens], such as the number of a sequence: tokens
      of different ones are no neighbors.

  Returns:
    f32 scalar. Inside of a `shard_map` it is of the device's own pairs.

  >>> logits = jnp.array([[1.0, -1.0], [1.0, -1.0], [-1.0, 1.0]])
  >>> routing.locality(routing.relu(logits)).item()
  50.0

  Source: blockffn, BlockFFN: Towards End-Side Acceleration-Friendly
  Mixture-of-Experts with Chunk-Level Activation Sparsity, equation 4.
  """
  if segments is None:
    segments = jnp.zeros_like(found.token_valid, jnp.int32)

  def mean(logits, counted, segments):
    pair = counted[:-1] & counted[1:] & (segments[:-1] == segments[1:])
    allowed = (logits > -jnp.inf)[:-1] & (logits > -jnp.inf)[1:]
    keep = pair[:, None] & allowed
    first, second = (
      steepness * jnp.where(keep, x, 0) for x in (logits[:-1], logits[1:])
    )
    target = jax.nn.sigmoid(second)
    loss = jax.nn.softplus(first) - target * first
    total = jnp.where(keep, loss, 0).sum() / logits.shape[1]
    return total / jnp.maximum(pair.sum(), 1)

  return automatic(mean, found.logits, found.token_valid, segments)


def chunk_sparsity(found: Assignment, size: int) -> Array:
  """How many of the experts a chunk of tokens needs, as a mean probability.

  Of an expert 1 - the product over the chunk of (1 - probability), the mean
  over chunks and experts. Chunks without a token that counts do not enter.

  Args:
    found: what a router returned, such as `relu`.
    size: tokens of a chunk, which divides those there are.

  Returns:
    f32 scalar.

  Raises:
    ValueError: size does not divide the tokens.

  >>> logits = jnp.array([[1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])
  >>> routing.chunk_sparsity(routing.relu(logits), 2).item()
  0.625

  Source: blockffn, BlockFFN: Towards End-Side Acceleration-Friendly
  Mixture-of-Experts with Chunk-Level Activation Sparsity, equation 5.
  """
  tokens, experts = found.probabilities.shape
  if size < 1 or tokens % size:
    raise ValueError(f"size must divide the {tokens} tokens, got {size}")

  def mean(p, counted):
    idle = jnp.prod(1 - p.reshape(-1, size, experts), axis=1)
    some = counted.reshape(-1, size).any(-1)
    total = jnp.where(some, (1 - idle).mean(-1), 0).sum()
    return total / jnp.maximum(some.sum(), 1)

  return automatic(mean, found.probabilities, found.token_valid)


def progressive_k(
  layer: int, step: Array | int, *, early: tuple[int, ...], late: int, at: int
) -> Array | int:
  """How many experts a token goes to in a layer, early and late in training.

  The lower layers, whose load is harder to balance, begin with more experts.

  Args:
    layer: number of the layer, from 0.
    step: of training, an int or a traced scalar.
    early: experts before step `at` in the first layers; the others have `late`.
    late: experts from step `at` on, in all layers.
    at: step.

  Returns:
    An int for an int: a new one compiles anew, with fewer edges. For a traced
    step int32, which shapes cannot depend on; compiled once with the largest k,
    later edges are cut off, `found.where(found.rank < k)`.

  >>> k = lambda step: [
  ...   progressive_k(layer, step, early=(8, 4, 2), late=1, at=900)
  ...   for layer in range(4)
  ... ]
  >>> k(0), k(900)
  ([8, 4, 2, 1], [1, 1, 1, 1])

  Source: sigma-moe-tiny, Sigma-Moe-Tiny Technical Report, progressive
  sparsification schedule.
  """
  first = early[layer] if layer < len(early) else late
  if isinstance(step, int):
    return first if step < at else late
  return jnp.where(step < at, first, late)


def load_error(found: Assignment, *, axis_names: AxisNames = ()) -> Array:
  """f32 [experts]: an expert's share of the edges, less an equal share.

  >>> found = routing.top_k(jnp.array([[1.0, 0.0], [2.0, 0.0]]), 1)
  >>> routing.load_error(found).tolist()
  [0.5, -0.5]
  """
  sizes = _over(found.sizes, axis_names)
  total = sizes.sum().astype(jnp.float32)
  # Exactly 0 at an equal share, also where division is not exact.
  error = sizes.astype(jnp.float32) * found.num_experts - total
  return error / (jnp.maximum(total, 1) * found.num_experts)


def balance_bias(
  rate: optax.ScalarOrSchedule = 1e-3, *, proportional: bool = False
) -> optax.GradientTransformation:
  """Moves the bias of `top_k` against the load error.

  The bias's gradient is the load error; this lowers it for experts that have
  more than their share. To be given the bias alone, by `optax.partition`, with
  no weight decay.

  Args:
    rate: how far a step moves it, or a schedule.
    proportional: by rate x error x experts, instead of rate x sign(error).

  Returns:
    A transformation of gradients.

  Example:
    >>> tx = routing.balance_bias(0.5)
    >>> error = jnp.array([0.2, -0.2, 0.0])
    >>> updates, _ = tx.update(error, tx.init(error))
    >>> updates.tolist()
    [-0.5, 0.5, -0.0]

  Source: alf-lb, A Theoretical Framework for Auxiliary-Loss-Free Load
  Balancing; with the sign: Auxiliary-Loss-Free Load Balancing Strategy for
  Mixture-of-Experts.
  """
  of = lambda error: error * len(error) if proportional else jnp.sign(error)
  direction = optax.stateless(lambda updates, params: jax.tree.map(of, updates))
  return optax.chain(direction, optax.scale_by_learning_rate(rate))


def metrics(
  found: Assignment, *, axis_names: AxisNames = ()
) -> dict[str, Array]:
  """What to log of an assignment.

  Returns:
    load: f32 [experts], shares of the valid edges;
    max_violation: the largest load over an equal one, less 1 (MaxVio);
    entropy: of the loads, over its maximum: 1 where they are equal;
    edges: valid edges a token that counts;
    unrouted: the share of the tokens that count without a valid edge;
    unsound: tokens whose logits hold NaN or +inf.

  >>> found = routing.top_k(jnp.array([[1.0, 0.0], [2.0, 0.0]]), 1)
  >>> routing.metrics(found)["max_violation"].item()
  1.0
  """
  number = lambda x: _over(x.sum(), axis_names).astype(jnp.float32)
  sizes = _over(found.sizes, axis_names).astype(jnp.float32)
  edges, experts = sizes.sum(), found.num_experts
  shares = sizes / jnp.maximum(edges, 1)
  tokens = jnp.maximum(number(found.token_valid), 1)
  routed = automatic(
    lambda found: (
      jnp.zeros(found.num_tokens, bool).at[found.token].max(found.valid).sum()
    ),
    found,
  )
  return {
    "load": shares,
    "max_violation": jnp.where(edges > 0, shares.max() * experts - 1, 0),
    "entropy": _entropy(shares) / jnp.log(max(experts, 2)),
    "edges": edges / tokens,
    "unrouted": number(found.token_valid.sum() - routed) / tokens,
    "unsound": _over(found.unsound, axis_names),
  }


def _over(x, axis_names):
  return lax.psum(x, axis_names) if axis_names else x


def _mean_over_tokens(found, x, axis_names):
  valid = found.token_valid.reshape(-1, *[1] * (x.ndim - 1))
  total = _over(jnp.where(valid, x, 0).sum(0), axis_names)
  number = _over(found.token_valid.sum(dtype=jnp.float32), axis_names)
  return total / jnp.maximum(number, 1)


def _variation(x):
  mean = x.mean()
  return jnp.where(mean != 0, x.var() / jnp.where(mean != 0, mean, 1) ** 2, 0)


def _entropy(p):
  return -jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1)), 0).sum(-1)
