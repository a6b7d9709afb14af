"""How evenly experts are used: losses, a bias without a loss, and metrics.

All are functions of an `Assignment`, in f32, over its valid tokens. Under a
sharded `jit` they are of all tokens; inside of a `shard_map` they are with
`axis_names`, the mesh axes over which tokens are divided.
"""

import jax
from jax import lax
import jax.numpy as jnp
import optax

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

  Args:
    found: what a router returned. Shares carry no gradient, probabilities do.
    segments: None, or int32 [tokens]: shares and means are taken in each
      segment alone (a sequence), and the loss is the mean over the segments
      that have valid tokens.
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
  if segments is None:
    segments, num_segments = jnp.zeros(found.num_tokens, jnp.int32), 1
  of_edge = segments[found.token]
  add = lambda x, at: _over(
    jax.ops.segment_sum(x, at, num_segments), axis_names
  )
  one_hot = jax.nn.one_hot(found.expert, found.num_experts)
  edges = add(jnp.where(found.valid[:, None], one_hot, 0), of_edge)
  edges /= jnp.maximum(edges.sum(-1, keepdims=True), 1)
  valid = found.token_valid[:, None]
  p = add(jnp.where(valid, found.probabilities, 0), segments)
  tokens = add(found.token_valid.astype(jnp.float32), segments)
  p /= jnp.maximum(tokens, 1)[:, None]
  loss = found.num_experts * (edges * p).sum(-1)
  some = tokens > 0
  return jnp.where(some, loss, 0).sum() / jnp.maximum(some.sum(), 1)


def z_loss(found: Assignment, *, axis_names: AxisNames = ()) -> Array:
  """The mean of the squared log-sum-exp of the logits.

  >>> routing.z_loss(routing.top_k(jnp.zeros((4, 1)), 1)).item()
  0.0

  Source: gshard-topk, ST-MoE: Designing Stable and Transferable Sparse Expert
  Models, equation 5.
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
  return _variation(_over(_sum_by_expert(found, found.weight), axis_names))


def load(
  logits: Array,
  noise: Array,
  scale: Array | float,
  k: int,
  *,
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
    k: experts a token goes to, fewer than there are.
    token_valid: None, or bool [tokens].
    axis_names: mesh axes over which tokens are divided, in a `shard_map`.

  Returns:
    f32 scalar.

  Raises:
    ValueError: k is not in 1 to experts - 1.

  Source: gshard-topk, Outrageously Large Neural Networks, equations 8 to 10.
  """
  experts = logits.shape[1]
  if not 1 <= k < experts:
    raise ValueError(f"k must be 1 to {experts - 1}, got {k}")
  logits = logits.astype(jnp.float32)
  noisy = logits + noise * scale
  best, _ = lax.top_k(noisy, k + 1)
  # What an expert must exceed to be among the k: of the others, the k-th.
  inside = noisy >= best[:, k - 1 : k]
  bar = jnp.where(inside, best[:, k : k + 1], best[:, k - 1 : k])
  stays = jax.scipy.special.ndtr((logits - bar) / scale)
  if token_valid is not None:
    stays = jnp.where(token_valid[:, None], stays, 0)
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

  Source: moduleformer, ModuleFormer, equation 6.
  """
  mean = _mean_over_tokens(found, found.probabilities, axis_names)
  return entropy(found, axis_names=axis_names) - _entropy(mean)


def concentration(found: Assignment, *, axis_names: AxisNames = ()) -> Array:
  """The entropy of the tokens' mean probabilities, in nats.

  It falls as load gathers on a few experts, so that the others can be removed.

  >>> routing.concentration(routing.top_k(jnp.zeros((4, 2)), 1)).item()
  0.6931471824645996

  Source: moduleformer, ModuleFormer, section 3.4.
  """
  return _entropy(_mean_over_tokens(found, found.probabilities, axis_names))


def load_error(found: Assignment, *, axis_names: AxisNames = ()) -> Array:
  """f32 [experts]: an expert's share of the edges, less an equal share.

  >>> found = routing.top_k(jnp.array([[1.0, 0.0], [2.0, 0.0]]), 1)
  >>> routing.load_error(found).tolist()
  [0.5, -0.5]
  """
  sizes = _over(found.sizes.astype(jnp.float32), axis_names)
  total = sizes.sum()
  return jnp.where(
    total > 0, sizes / jnp.maximum(total, 1) - 1 / found.num_experts, 0
  )


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
  Balancing, equation 3; with the sign: Auxiliary-Loss-Free Load Balancing
  Strategy for Mixture-of-Experts, algorithm 1.
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
    edges: valid edges a valid token;
    unrouted: the share of valid tokens without a valid edge;
    unsound: tokens whose logits hold NaN or +inf.

  >>> found = routing.top_k(jnp.array([[1.0, 0.0], [2.0, 0.0]]), 1)
  >>> routing.metrics(found)["max_violation"].item()
  1.0
  """
  shares = load_error(found, axis_names=axis_names) + 1 / found.num_experts
  number = _over(found.token_valid.sum(dtype=jnp.float32), axis_names)
  edges = _over(found.valid.sum(dtype=jnp.float32), axis_names)
  of_token = jnp.zeros(found.num_tokens, bool).at[found.token].max(found.valid)
  without = _over(
    (found.token_valid & ~of_token).sum(dtype=jnp.float32), axis_names
  )
  number = jnp.maximum(number, 1)
  return {
    "load": shares,
    "max_violation": shares.max() * found.num_experts - 1,
    "entropy": _entropy(shares) / jnp.log(max(found.num_experts, 2)),
    "edges": edges / number,
    "unrouted": without / number,
    "unsound": _over(found.unsound, axis_names),
  }


def _over(x, axis_names):
  return lax.psum(x, axis_names) if axis_names else x


def _mean_over_tokens(found, x, axis_names):
  valid = found.token_valid.reshape(-1, *[1] * (x.ndim - 1))
  total = _over(jnp.where(valid, x, 0).sum(0), axis_names)
  number = _over(found.token_valid.sum(dtype=jnp.float32), axis_names)
  return total / jnp.maximum(number, 1)


def _sum_by_expert(found, x):
  return jnp.zeros(found.num_experts, jnp.float32).at[found.expert].add(x)


def _variation(x):
  mean = x.mean()
  return jnp.where(mean > 0, x.var() / jnp.where(mean > 0, mean, 1) ** 2, 0)


def _entropy(p):
  return -jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1)), 0).sum(-1)
