"""Routers: functions of logits, or of ids, that return an `Assignment`.

Choices carry no gradient, weights do. Of equal scores the lower expert, then
the lower token, is chosen. An expert whose logit is -inf is not allowed, and
never chosen. A token goes nowhere, and counts in no loss or statistic, where
it is padding, where nothing is allowed, and where a logit is NaN or +inf;
`metrics` counts the last ones.

Several further routers are one line:

- Switch: `top_k(logits, 1)`.
- Noisy top-k (Shazeer): `top_k(logits + noise * jax.nn.softplus(noise_logits),
  k)` with `noise` of `jax.random.normal`; V-MoE: `noise / num_experts`.
- By modality (mixture of transformers): `by_id(modality, num_experts)`.
- Hash layers: `by_id(table[token_ids], num_experts)`, with
  `table.at[token_ids].get(mode="fill", fill_value=-1)` where an id may be
  beyond the table.
"""

import dataclasses

import jax
from jax import lax
import jax.numpy as jnp

from sparsejax.automatic import automatic
from sparsejax.routing.assignment import Assignment
from sparsejax.routing.balancing import load_error

Array = jax.Array


def top_k(
  logits: Array,
  k: int,
  *,
  scores: str = "softmax",
  renormalize: bool | str = False,
  scale: float = 1.0,
  bias: Array | None = None,
  allowed: Array | None = None,
  forced: Array | None = None,
  groups: tuple[int, int] | None = None,
  group_best: int = 2,
  token_valid: Array | None = None,
  axis_names: tuple[str, ...] = (),
) -> Assignment:
  """Each token goes to the k experts of the highest scores.

  Args:
    logits: floating [tokens, experts].
    k: experts a token goes to.
    scores: "softmax" over the allowed experts, or "sigmoid".
    renormalize: whether the weights of a token are divided by their sum
      (Mixtral's softmax over the chosen). With k = 1 they are constant then;
      with "detached", whose sum has no gradient, they have one (MoA).
    scale: of the weights.
    bias: None, or f32 [experts], added to the scores to choose by, and not to
      the weights. Its cotangent is `load_error`, whatever the loss: with
      `balance_bias`, balancing without an auxiliary loss.
    allowed: None, or bool [experts] or [tokens, experts]: others are as if
      their logits were -inf. Where fewer than k are allowed, edges are left
      invalid.
    forced: None, or bool [experts] or [tokens, experts]: where allowed, chosen
      first, in order, whatever their group; k of them at most.
    groups: None, or (number, kept): experts lie in so many equal groups, and a
      token keeps those whose best scores, with the bias, have the largest sums.
    group_best: how many of a group are summed: 2 as in DeepSeek-V3, 1 as in
      DeepSeek-V2.
    token_valid: None, or bool [tokens]: padding goes nowhere.
    axis_names: mesh axes over which tokens are divided, inside of a
      `shard_map`; of use with `bias` only.

  Returns:
    An Assignment of tokens x k edges, a token's in the order in which they are
    chosen.

  Raises:
    ValueError: for arguments that do not fit each other.

  Example:
    >>> logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.125, 0.125, 0.75]]))
    >>> found = routing.top_k(logits, 2)
    >>> found.expert.tolist(), found.weight[:2].tolist()
    ([0, 1, 2, 0], [0.5, 0.25])

  Source: gshard-topk, Outrageously Large Neural Networks, section 2.1; groups
  and bias: DeepSeek-V3 Technical Report, section 2.1.2.
  """
  logits, token_valid, unsound = _checked(logits, token_valid, allowed)
  tokens, experts = logits.shape
  _between("k", k, 1, experts)
  if scores not in ("softmax", "sigmoid"):
    raise ValueError(f'scores must be "softmax" or "sigmoid", got {scores!r}')
  if renormalize not in (False, True, "detached"):
    raise ValueError(
      f'renormalize must be False, True or "detached", got {renormalize!r}'
    )
  log = jax.nn.log_sigmoid if scores == "sigmoid" else lambda x: x
  share = p = jax.nn.softmax(log(logits))
  if scores == "sigmoid":
    p = jax.nn.sigmoid(logits)
  merit = p
  if bias is not None:
    _fits("bias", bias, jnp.float32, (experts,))
    merit = p + bias
  may = logits > -jnp.inf
  # Rounded, probabilities have ties that logits have not.
  choose_by = jnp.where(may, logits if bias is None else merit, -jnp.inf)
  if groups is not None:
    merit = jnp.where(may, lax.stop_gradient(merit), -jnp.inf)
    inside = _in_best_groups(merit, groups, group_best)
    choose_by = jnp.where(inside, choose_by, -jnp.inf)
  if forced is not None:
    _fits("forced", forced, bool, (experts,), (tokens, experts))
    choose_by = jnp.where(may & forced, jnp.inf, choose_by)
  best, expert = _best(choose_by, k)
  valid = (best > -jnp.inf) & token_valid[:, None]
  found = _token_choice(expert, valid, p, logits, share, token_valid, unsound)
  if renormalize:
    found = _renormalized(found, logits, log, renormalize == "detached")
  weight = found.weight * scale
  if bias is not None:
    weight = _tied(weight, bias, load_error(found, axis_names=axis_names))
  return dataclasses.replace(found, weight=weight)


def top_p(
  logits: Array,
  p: float,
  k_max: int,
  *,
  renormalize: bool = False,
  token_valid: Array | None = None,
) -> Assignment:
  """Each token goes to as few experts as together have a probability of p.

  Args:
    logits: floating [tokens, experts].
    p: in (0, 1]; the experts of the highest probabilities are taken until their
      sum reaches it, or comes closer than a millionth of it, which is what f32
      cannot tell apart. At 1 all are taken that are allowed.
    k_max: experts a token goes to at most.
    renormalize: whether the weights of a token are divided by their sum.
    token_valid: None, or bool [tokens]: padding goes nowhere.

  Returns:
    An Assignment of tokens x k_max edges; those beyond p are not valid.

  Raises:
    ValueError: for arguments that do not fit each other.

  Example:
    >>> logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.125, 0.125, 0.75]]))
    >>> routing.top_p(logits, 0.7, 3).valid.reshape(2, 3).tolist()
    [[True, True, False], [True, False, False]]

  Source: xmoe, Enhancing Efficiency in Sparse Models with Sparser Selection.
  """
  logits, token_valid, unsound = _checked(logits, token_valid)
  _between("k_max", k_max, 1, logits.shape[1])
  if not 0 < p <= 1:
    raise ValueError(f"p must be in (0, 1], got {p}")
  best, expert = _best(logits, k_max)
  valid = (best > -jnp.inf) & token_valid[:, None]
  if p < 1:
    # Relative to the largest, so that sums of equal ones are exact.
    total = jnp.exp(logits - best[:, :1]).sum(-1, keepdims=True)
    sums = jnp.cumsum(jnp.exp(best - best[:, :1]), -1)
    before = jnp.pad(sums[:, :-1], ((0, 0), (1, 0)))
    valid &= before < p * (1 - 1e-6) * total
  share = jax.nn.softmax(logits)
  found = _token_choice(
    expert, valid, share, logits, share, token_valid, unsound
  )
  return _renormalized(found, logits) if renormalize else found


def dense_to_sparse(
  logits: Array,
  temperature: Array | float,
  threshold: float,
  *,
  gumbel: Array | None = None,
  k_max: int | None = None,
  renormalize: bool = False,
  token_valid: Array | None = None,
) -> Assignment:
  """Each token goes to the experts above a threshold, fewer as it cools.

  Args:
    logits: floating [tokens, experts].
    temperature: positive, of the softmax; from about 2 to 0.3 over training.
      Not checked where it is traced.
    threshold: the probability that an expert must exceed. The best is taken in
      any case.
    gumbel: None, or noise [tokens, experts] of `jax.random.gumbel`.
    k_max: experts a token goes to at most, default all of them.
    renormalize: whether the weights of a token are divided by their sum.
    token_valid: None, or bool [tokens]: padding goes nowhere.

  Returns:
    An Assignment of tokens x k_max edges.

  Raises:
    ValueError: for arguments that do not fit each other.

  Example:
    >>> logits = jnp.array([[2.0, 1.0, 0.0]])
    >>> of = lambda t: routing.dense_to_sparse(logits, t, 0.1).sizes.tolist()
    >>> of(4.0), of(1.0), of(0.3)
    ([1, 1, 1], [1, 1, 0], [1, 0, 0])

  Source: evomoe, EvoMoE: An Evolutional Mixture-of-Experts Training Framework
  via Dense-To-Sparse Gate.
  """
  noisy = logits
  if gumbel is not None:
    _fits("gumbel", gumbel, jnp.floating, logits.shape)
    noisy = logits + gumbel
  noisy, token_valid, unsound = _checked(noisy, token_valid)
  k_max = logits.shape[1] if k_max is None else k_max
  _between("k_max", k_max, 1, logits.shape[1])
  if not 0 <= threshold < 1:
    raise ValueError(f"threshold must be in [0, 1), got {threshold}")
  if isinstance(temperature, int | float) and not temperature > 0:
    raise ValueError(f"temperature must be positive, got {temperature}")
  noisy = noisy / temperature
  p = jax.nn.softmax(noisy)
  best, expert = _best(noisy, k_max)
  above = lax.stop_gradient(jnp.take_along_axis(p, expert, axis=1)) > threshold
  valid = above | (jnp.arange(k_max) == 0)
  valid &= (best > -jnp.inf) & token_valid[:, None]
  logits = jnp.where(token_valid[:, None], logits.astype(jnp.float32), 0)
  found = _token_choice(expert, valid, p, logits, p, token_valid, unsound)
  return _renormalized(found, noisy) if renormalize else found


def relu(
  logits: Array,
  gain: Array | None = None,
  *,
  epsilon: float = 1e-6,
  k_max: int | None = None,
  token_valid: Array | None = None,
) -> Assignment:
  """Each token goes to the experts whose logits are positive.

  Weights are relu(logits) over their root mean square, times a gain.

  Args:
    logits: floating [tokens, experts].
    gain: None, or floating [experts].
    epsilon: positive, added to the mean square.
    k_max: experts a token goes to at most, default all of them.
    token_valid: None, or bool [tokens]: padding goes nowhere.

  Returns:
    An Assignment of tokens x k_max edges.

  Raises:
    ValueError: for arguments that do not fit each other.

  Example:
    >>> found = routing.relu(jnp.array([[3.0, -1.0, 0.0, 3.0]]))
    >>> found.sizes.tolist(), found.weight.round(3).tolist()
    ([1, 0, 0, 1], [1.4140000343322754, 1.4140000343322754, 0.0, 0.0])

  Source: blockffn, BlockFFN: Towards End-Side Acceleration-Friendly
  Mixture-of-Experts with Chunk-Level Activation Sparsity, section 3.1.
  """
  logits, token_valid, unsound = _checked(logits, token_valid)
  k_max = logits.shape[1] if k_max is None else k_max
  _between("k_max", k_max, 1, logits.shape[1])
  if not epsilon > 0:
    raise ValueError(f"epsilon must be positive, got {epsilon}")
  gate = jax.nn.relu(logits)
  weight = gate * lax.rsqrt((gate**2).mean(-1, keepdims=True) + epsilon)
  if gain is not None:
    _fits("gain", gain, jnp.floating, logits.shape[1:])
    weight *= gain.astype(jnp.float32)
  best, expert = _best(gate, k_max)
  valid = (best > 0) & token_valid[:, None]
  total = gate.sum(-1, keepdims=True)
  share = gate / jnp.where(total > 0, total, 1)
  return _token_choice(
    expert, valid, weight, logits, share, token_valid, unsound
  )


def expert_choice(
  logits: Array,
  capacity: int,
  *,
  scores: str = "softmax",
  token_valid: Array | None = None,
) -> Assignment:
  """Each expert takes the tokens of the highest scores.

  A token may go to no expert, or to several. Whether a token is taken depends
  on later ones too: as it stands not for models that generate.

  Args:
    logits: floating [tokens, experts].
    capacity: tokens an expert takes.
    scores: "softmax" over the experts, "sigmoid", or "identity" (the logits).
    token_valid: None, or bool [tokens]: padding is not taken.

  Returns:
    An Assignment of experts x capacity edges, an expert's in falling order of
    scores. Where there are fewer valid tokens, edges are left invalid.

  Raises:
    ValueError: for arguments that do not fit each other.

  Example:
    A mixture of depths has one expert, the block, which others skip:

    >>> logits = jnp.array([[0.0], [2.0], [1.0], [-1.0]])
    >>> routing.expert_choice(logits, 2, scores="sigmoid").token.tolist()
    [1, 2]

  Source: expert-choice, Mixture-of-Experts with Expert Choice Routing;
  mixture-of-depths, Mixture-of-Depths, section 3.
  """
  logits, token_valid, unsound = _checked(logits, token_valid)
  tokens, experts = logits.shape
  _between("capacity", capacity, 1, tokens)
  of = {
    "softmax": jax.nn.softmax,
    "sigmoid": jax.nn.sigmoid,
    "identity": lambda x: x,
  }
  if scores not in of:
    raise ValueError(f"scores must be one of {', '.join(of)}, got {scores!r}")
  p = of[scores](logits)
  log = jax.nn.log_sigmoid if scores == "sigmoid" else lambda x: x
  share = jnp.where(token_valid[:, None], jax.nn.softmax(log(logits)), 0)
  may = (logits > -jnp.inf) & token_valid[:, None]
  by = jnp.where(may, p if scores == "softmax" else logits, -jnp.inf)

  def take(by, p):
    best, token = _best(by.T, capacity)
    return best, token, jnp.take_along_axis(p.T, token, axis=1)

  best, token, weight = automatic(take, by, p)
  valid = best > -jnp.inf
  across = lambda x: jnp.broadcast_to(x, (experts, capacity)).reshape(-1)
  return Assignment(
    token=token.reshape(-1),
    expert=across(jnp.arange(experts)[:, None]),
    rank=across(jnp.arange(capacity)),
    weight=jnp.where(valid, weight, 0).reshape(-1),
    valid=valid.reshape(-1),
    logits=logits,
    probabilities=share,
    token_valid=token_valid,
    unsound=unsound,
    choices=None,
  )


def by_id(
  ids: Array, num_experts: int, *, token_valid: Array | None = None
) -> Assignment:
  """Each token goes to the expert that is named, with a weight of 1.

  Args:
    ids: integer [tokens], such as the modality of a token, or a table's entry
      for it. A token whose id is out of range goes nowhere.
    num_experts: how many there are.
    token_valid: None, or bool [tokens]: padding goes nowhere.

  Returns:
    An Assignment of one edge a token.

  Raises:
    ValueError: for arguments that do not fit each other.

  Example:
    >>> routing.by_id(jnp.array([0, 1, 1, 7]), 2).sizes.tolist()
    [1, 2]

  Source: hash-routing, Hash Layers For Large Sparse Models;
  mixture-of-transformers, Mixture-of-Transformers.
  """
  if ids.ndim != 1 or not jnp.issubdtype(ids.dtype, jnp.integer):
    raise ValueError(
      f"ids must be integer [tokens], got {ids.dtype}{list(ids.shape)}"
    )
  _between("num_experts", num_experts, 1, None)
  one_hot = jax.nn.one_hot(ids, num_experts, dtype=jnp.float32)
  _, wanted, _ = _checked(one_hot, token_valid)
  token_valid = wanted & (ids >= 0) & (ids < num_experts)
  expert = jnp.clip(ids, 0, num_experts - 1).astype(jnp.int32)[:, None]
  return _token_choice(
    expert,
    token_valid[:, None],
    one_hot,
    one_hot,
    one_hot,
    token_valid,
    (wanted & ~token_valid).sum(),
  )


def per_chunk(
  logits: Array,
  chunk: Array,
  num_chunks: int,
  *,
  token_valid: Array | None = None,
) -> Array:
  """The mean logits of each chunk, for all of its tokens.

  What any router makes of them is one choice a chunk, or a sample. A token
  whose logits hold NaN or +inf keeps them, and does not count.

  Args:
    logits: floating [tokens, experts].
    chunk: int32 [tokens]: which chunk a token is of; where that is out of
      range, logits are -inf.
    num_chunks: how many there are.
    token_valid: None, or bool [tokens]: padding does not count.

  Returns:
    f32 [tokens, experts].

  Raises:
    ValueError: for arguments that do not fit each other.

  Example:
    >>> logits = jnp.array([[1.0, 0.0], [3.0, 0.0], [0.0, 5.0]])
    >>> routing.per_chunk(logits, jnp.array([0, 0, 1]), 2).tolist()
    [[2.0, 0.0], [2.0, 0.0], [0.0, 5.0]]
  """
  clean, counted, _ = _checked(logits, token_valid)
  _fits("chunk", chunk, jnp.integer, logits.shape[:1])
  _between("num_chunks", num_chunks, 1, None)

  def mean(logits, counted, chunk):
    chunk = jnp.where((chunk < 0) | (chunk >= num_chunks), num_chunks, chunk)
    add = lambda x: jax.ops.segment_sum(x, chunk, num_chunks)
    total = add(logits) / jnp.maximum(add(counted), 1)[:, None]
    return total.at[chunk].get(mode="fill", fill_value=-jnp.inf)

  out = automatic(mean, clean, counted.astype(jnp.float32), chunk, out=clean)
  return jnp.where(_sound(logits)[:, None], out, logits.astype(jnp.float32))


def _checked(logits, token_valid, allowed=None):
  """f32 logits without NaN or +inf, which tokens count, how many are unsound.

  Of tokens that do not count whatever stands there, and its gradient, is cut
  off.
  """
  if (
    logits.ndim != 2
    or not logits.shape[1]
    or not jnp.issubdtype(logits.dtype, jnp.floating)
  ):
    raise ValueError(
      f"logits must be floating [tokens, experts], got {logits.dtype}"
      f"{list(logits.shape)}"
    )
  if token_valid is None:
    token_valid = jnp.ones_like(logits[:, 0], bool)
  _fits("token_valid", token_valid, bool, logits.shape[:1])
  logits = logits.astype(jnp.float32)
  if allowed is not None:
    _fits("allowed", allowed, bool, logits.shape[1:], logits.shape)
    logits = jnp.where(allowed, logits, -jnp.inf)
  sound = _sound(logits)
  unsound = (token_valid & ~sound).sum()
  token_valid = token_valid & sound & (logits > -jnp.inf).any(-1)
  return jnp.where(token_valid[:, None], logits, 0), token_valid, unsound


def _sound(logits):
  return (logits < jnp.inf).all(-1)  # false for NaN, too


def _best(x, k):
  """The k largest of each row, and where; of equal ones the first."""
  x = lax.stop_gradient(x)
  return lax.top_k(jnp.where(x == 0, 0, x), k)  # to which -0 is less than 0


def _in_best_groups(scores, groups, group_best):
  tokens, experts = scores.shape
  number, kept = groups
  if number < 1 or experts % number or not 1 <= kept <= number:
    raise ValueError(
      f"groups must be (number, kept), whose number divides {experts} experts "
      f"and is no less than kept, got {groups}"
    )
  _between("group_best", group_best, 1, None)
  grouped = scores.reshape(tokens, number, -1)
  best, _ = lax.top_k(grouped, min(group_best, grouped.shape[-1]))
  # A group of one allowed expert has the sum of that.
  of_group = jnp.where(best > -jnp.inf, best, 0).sum(-1)
  of_group = jnp.where(best[..., 0] > -jnp.inf, of_group, -jnp.inf)
  _, chosen = _best(of_group, kept)
  keep = (chosen[:, :, None] == jnp.arange(number)).any(1)
  return jnp.repeat(keep, experts // number, axis=1)


def _token_choice(expert, valid, weights, logits, share, token_valid, unsound):
  """Edges [tokens, k] as an Assignment."""
  tokens, k = expert.shape
  across = lambda x: jnp.broadcast_to(x, (tokens, k)).reshape(-1)
  weight = jnp.take_along_axis(weights, expert, axis=1)
  return Assignment(
    token=across(jnp.arange(tokens)[:, None]),
    expert=expert.reshape(-1),
    rank=across(jnp.arange(k)),
    weight=jnp.where(valid, weight, 0).reshape(-1),
    valid=valid.reshape(-1),
    logits=logits,
    probabilities=jnp.where(token_valid[:, None], share, 0),
    token_valid=token_valid,
    unsound=unsound,
    choices=k,
  )


def _renormalized(found, logits, log=lambda x: x, detached=False):
  """Weights over their sum, for weights in proportion to exp(log(logits)).

  From logarithms, since all of a token's weights may be too small for f32.
  """
  expert, valid = (
    x.reshape(-1, found.choices) for x in (found.expert, found.valid)
  )
  of_edge = jnp.take_along_axis(logits, expert, axis=1)
  of_edge = log(jnp.where(valid, of_edge, 0))
  some = valid.any(-1, keepdims=True)
  weight = jax.nn.softmax(jnp.where(valid | ~some, of_edge, -jnp.inf))
  weight = jnp.where(valid, weight, 0).reshape(-1)
  if detached:  # the same numbers, with the gradient of weight / fixed sum
    p = found.weight
    ratio = p / lax.stop_gradient(jnp.where(p > 0, p, 1))
    weight = lax.stop_gradient(weight) * jnp.where(p > 0, ratio, 1)
  return dataclasses.replace(found, weight=weight)


@jax.custom_vjp
def _tied(weight, bias, error):
  """The weight; but the bias's cotangent is the error."""
  del bias, error
  return weight


def _tied_fwd(weight, bias, error):
  del bias
  return weight, error


def _tied_bwd(error, cotangent):
  return cotangent, error, jnp.zeros_like(error)


_tied.defvjp(_tied_fwd, _tied_bwd)


def _between(name, value, low, high):
  if value < low or (high is not None and value > high):
    top = "" if high is None else f" to {high}"
    more = " or more" if high is None else ""
    raise ValueError(f"{name} must be {low}{top}{more}, got {value}")


def _fits(name, x, dtype, *shapes):
  kinds = {bool: jnp.bool_}.get(dtype, dtype)
  if x.shape not in shapes or not jnp.issubdtype(x.dtype, kinds):
    kind = getattr(dtype, "__name__", str(dtype))
    wanted = " or ".join(f"{kind}{list(shape)}" for shape in shapes)
    raise ValueError(f"{name} must be {wanted}, got {x.dtype}{list(x.shape)}")
