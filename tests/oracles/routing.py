"""Reference definition of routing: routers, losses, dispatch, expert banks.

Everything here is NumPy in float64 with plain loops over tokens, experts and
edges. T tokens, E experts, logits [T, E]. A router returns an `Assignment`, a
list of edges from tokens to experts; `dispatch` runs it through a bank of
experts, given as a function of one row. Compare the expert, token and rank of
valid edges only: those of an invalid edge are in range and mean nothing. Ties
go to the lowest expert, then to the lowest token. To compare with float32,
draw logits from a grid and no further than 10 apart: what is merely close in
float64 may be equal there.

Every router takes `like`, an earlier assignment whose choice it repeats, so
that only the weights depend on the logits: `numerical_gradient` then
differentiates what is smooth while all that is chosen stays fixed.

What the papers leave open and is settled here:

Tokens. A token is counted if it is valid, none of its logits is NaN or +inf,
and at least one is above -inf. A token that is not counted has no valid edge,
uses no capacity and enters no loss or statistic; a valid one with NaN or +inf
is one of nan_tokens. A logit of -inf is an expert that is not allowed: its
probability is 0 and it is never chosen, even where edges are left over. What
is not allowed is masked before NaN is looked for.

Top-k.
- Forced experts come first, in index order, whatever their group; not allowed
  is stronger than forced. Groups limit only the experts that are not forced.
- The score of a group is the sum of its `group_best` best p + bias (2 is
  DeepSeek-V3; 1, the maximum, is DeepSeek-V2) among the experts allowed. A
  group with none allowed comes last.
- Renormalized weights are divided by their sum over the valid edges of the
  token before anything is dropped, without an epsilon (DeepSeek's code has
  1e-20). The sum has a gradient; in the paper on attention heads (MoA) it has
  none, which changes no value.

Expert choice. -inf is never chosen here either. Mixture-of-depths chooses by
the logit, whichever weight it uses: sigmoid saturates and would make ties.

Top-p. The prefix is decided in exact arithmetic on exp(logit - maximum) and
its sum, and a threshold is the decimal number it prints as; so 1 takes every
allowed expert and equal logits give ceil(p * E) exactly. The authors take an
expert when the mass before it is below p, which is the same.

EvoMoE. Chosen is p > threshold, strictly. The weight is the noisy p at the
temperature; the authors have a switch for softmax(logits) on the same set.

BlockFFN. The mean square is over all E, whatever k_max. Edges are in falling
order of relu(logit), not of the weight, whose gain may be negative. Authors:
epsilon 1e-6; the locality loss compares logits before ReLU; the later token
is the target and the earlier one the prediction, each sharpened with 100, and
the gradient goes through both; a pair needs both tokens counted and in one
segment. The chunk loss uses shares of the normalized gates before the gain,
gate / (sum + 1e-5), and 1 - share + 1e-5 in the product; here the epsilon is
an argument, 0 by default. A token that is not counted multiplies by 1; a
chunk with no counted token does not enter the mean.

Balancing. The share of expert e is its valid edges over all valid edges, so k
is the mean number of edges of a token where it varies. It is counted before
capacity drops anything. Probabilities are taken as given; for sigmoid scores
pass normalized(p), as DeepSeek-V3 does, else the loss is not 1 at uniform
load. No valid edge: 0. Per sequence: the mean over segments with a counted
token. V-MoE's code counts the first choice only in its GShard loss; Mixtral's
does not divide by k. The variance of CV^2 is of the population (MoA's code:
of a sample). V-MoE applies importance to softmax(clean logits), Shazeer to
the gates that were chosen.

Smooth load. threshold "excluding" is Shazeer's: the k-th largest noisy logit
of the other experts; with fewer than k others the probability is 1. "kth" is
V-MoE's: the k-th largest of all. Shazeer's deviation is softplus(noise
logits) (tensor2tensor adds 0.01), V-MoE's is 1 / E.

Concentration. The loss of ModuleFormer's finetuning is in no released code;
it is taken as the entropy of the mean probabilities, to be minimized. Its
mutual information has 1e-8 inside of the logarithm of the mean there.

Capacity. Edges of an expert are kept in the order of rank, then priority,
then token. The priority "weight" of a token is the largest weight of its
valid edges. capacity_of reads the factor as the decimal it prints as (100
tokens at 1.1: 110, where floats give 111), and "round" rounds half to even as
V-MoE's code does. What is dropped changes no other weight.

Per chunk. A token whose logits are NaN or +inf stays as it is and is left out
of the mean; a chunk with nothing to average gets 0; an id out of range gets
-inf and so no edge. Hash and modality: an id, or an entry of the table, out
of range gives an invalid edge.

Soft MoE. Tokens that are not counted neither give to a slot nor take from it.

Monet. Scores are normalized over tokens and sub-keys of each head (batch
statistics over the counted tokens, epsilon 1e-5), but the softmax is of the
raw scores. The threshold is the smaller of the normal quantile of 1 - k / N
and the largest normalized score, so at least one remains. Vertical experts:
U1, V11, V12 and b1 belong to i, U2, V21, V22 and b2 to j; horizontal ones:
up to i, down and its bias to j.

MoA and ModuleFormer's attention. The scale is 1 / sqrt(head size). Keys of
invalid tokens are not read, and a query that may read nothing gives zeros.
Stick-breaking begins at the query's own position; what is left of the stick
after the first position belongs to nobody.

REAP. The mean is over the valid edges of the expert, with its weights as the
assignment has them (the authors: softmax, or renormalized by option). An
expert without edges has saliency 0.
"""

import dataclasses
import fractions
import math
import statistics

import numpy as np

# --- Pieces


def softmax(z):
  """exp(z) / sum of a vector; all zeros where every entry is -inf.

  >>> softmax([0.0, -np.inf, 0.0]).tolist(), softmax([-np.inf]).tolist()
  ([0.5, 0.0, 0.5], [0.0])
  """
  z = np.asarray(z, np.float64)
  top = z.max()
  if top == -np.inf:
    return np.zeros_like(z)
  return np.exp(z - top) / np.exp(z - top).sum()


def sigmoid(z):
  """1 / (1 + exp(-z)), elementwise, without overflow."""
  z = np.asarray(z, np.float64)
  small = np.exp(-np.abs(z))
  return np.where(z >= 0, 1.0 / (1.0 + small), small / (1.0 + small))


def softplus(z):
  """log(1 + exp(z)), elementwise, without overflow."""
  return np.logaddexp(0.0, z)


def logsumexp(z):
  """log(sum(exp(z))) of a vector."""
  top = np.max(z)
  return top + math.log(np.exp(np.asarray(z) - top).sum())


def normal_cdf(z):
  """The standard normal distribution function of a number."""
  return 0.5 * math.erfc(-z / math.sqrt(2.0))


def row_entropy(p):
  """-sum p log p of a vector, in nats; 0 log 0 is 0."""
  return -sum(v * math.log(v) for v in p if v > 0)


def cv_squared(values):
  """Variance (of the population) over squared mean; 0 where the mean is 0.

  >>> cv_squared([1.0, 3.0]), cv_squared([0.0, 0.0])
  (0.25, 0.0)
  """
  mean = sum(values) / len(values)
  if mean == 0:
    return 0.0
  return sum((v - mean) ** 2 for v in values) / len(values) / mean**2


def _all(flags, size):
  """Flags as bool[size]; None is all True."""
  return np.ones(size, bool) if flags is None else np.asarray(flags, bool)


def _decimal(value):
  """A number as the decimal it prints as, exactly."""
  return fractions.Fraction(repr(float(value)))


# --- Assignments


@dataclasses.dataclass
class Assignment:
  """Edges from tokens to experts.

  rank is the position of the edge among the choices of its token; in expert
  choice, of its expert. metrics: nan_tokens (a count), counted (bool[T]) and
  probabilities ([T, E], zeros for tokens that are not counted).
  """

  token: np.ndarray  # int[n]
  expert: np.ndarray  # int[n]
  weight: np.ndarray  # [n], 0 where not valid
  valid: np.ndarray  # bool[n]
  rank: np.ndarray  # int[n]
  num_tokens: int
  num_experts: int
  metrics: dict

  def edges(self):
    """The valid edges as (edge, token, expert, weight)."""
    for e in range(len(self.token)):
      if self.valid[e]:
        yield e, int(self.token[e]), int(self.expert[e]), self.weight[e]

  def choices(self):
    """For each token its valid experts, in the order of its edges."""
    chosen = [[] for _ in range(self.num_tokens)]
    for _, token, expert, _ in self.edges():
      chosen[token].append(expert)
    return chosen

  def dense(self):
    """The weights as an array [T, E], 0 where there is no valid edge."""
    weights = np.zeros((self.num_tokens, self.num_experts))
    for _, token, expert, weight in self.edges():
      weights[token, expert] += weight
    return weights

  def counts(self):
    """The number of valid edges of each expert, int[E]."""
    counts = np.zeros(self.num_experts, int)
    for _, _, expert, _ in self.edges():
      counts[expert] += 1
    return counts


def _token_choice(chosen, weights, slots, num_experts, metrics):
  """Edge t * slots + r is the r-th choice of token t."""
  rows = []
  for t, experts in enumerate(chosen):
    for r in range(slots):
      if r < len(experts):
        rows.append((t, experts[r], weights[t][r], True, r))
      else:
        rows.append((t, 0, 0.0, False, r))
  return _assignment(rows, len(chosen), num_experts, metrics)


def _assignment(rows, num_tokens, num_experts, metrics):
  token, expert, weight, valid, rank = zip(*rows) if rows else ([],) * 5
  return Assignment(
    np.array(token, int),
    np.array(expert, int),
    np.array(weight, np.float64),
    np.array(valid, bool),
    np.array(rank, int),
    num_tokens,
    num_experts,
    metrics,
  )


def _scale_weights(weights, renormalize, scale=1.0):
  total = sum(weights)
  if renormalize:
    weights = [w / total if total > 0 else 0.0 for w in weights]
  return [scale * w for w in weights]


def _falling(values, candidates):
  """Candidates by falling value, ties by rising index."""
  return sorted(candidates, key=lambda i: (-values[i], i))


def mask_logits(logits, allowed=None):
  """Logits in float64 with -inf where not allowed (bool [E] or [T, E])."""
  logits = np.array(logits, np.float64)
  if allowed is not None:
    logits[~np.broadcast_to(np.asarray(allowed, bool), logits.shape)] = -np.inf
  return logits


def look(logits, token_valid=None):
  """Which tokens are counted (bool[T]) and how many have NaN or +inf."""
  valid = _all(token_valid, len(logits))
  counted = np.zeros(len(logits), bool)
  nan_tokens = 0
  for t, row in enumerate(logits):
    bad = bool(np.isnan(row).any() or (row == np.inf).any())
    nan_tokens += int(valid[t] and bad)
    counted[t] = valid[t] and not bad and bool((row > -np.inf).any())
  return counted, nan_tokens


def probabilities(logits, scores="softmax", token_valid=None):
  """(p [T, E], zeros for tokens not counted; metrics of an assignment)."""
  counted, nan_tokens = look(logits, token_valid)
  p = np.zeros(np.shape(logits))
  for t in range(len(p)):
    if counted[t]:
      p[t] = softmax(logits[t]) if scores == "softmax" else sigmoid(logits[t])
  metrics = {"nan_tokens": nan_tokens, "counted": counted, "probabilities": p}
  return p, metrics


def normalized(p):
  """Each row over its sum; rows of zeros stay."""
  p = np.array(p, np.float64)
  for t in range(len(p)):
    if p[t].sum() > 0:
      p[t] = p[t] / p[t].sum()
  return p


# --- Routers


def top_k(
  logits,
  k,
  *,
  scores="softmax",
  renormalize=False,
  scale=1.0,
  bias=None,
  allowed=None,
  forced=None,
  groups=None,
  group_best=2,
  token_valid=None,
  like=None,
):
  """The k experts of largest p + bias for each token.

  forced: bool [E] or [T, E]. groups: (G, g), g of G equal groups remain.

  >>> routed = top_k([[0.0, 1.0, 1.0]], 2, renormalize=True)
  >>> routed.expert.tolist(), routed.weight.tolist()
  ([1, 2], [0.5, 0.5])
  """
  logits = mask_logits(logits, allowed)
  num_tokens, num_experts = logits.shape
  p, metrics = probabilities(logits, scores, token_valid)
  bias = np.zeros(num_experts) if bias is None else np.asarray(bias, np.float64)
  if forced is None:
    forced = np.zeros(num_experts, bool)
  forced = np.broadcast_to(np.asarray(forced, bool), logits.shape)
  repeated = None if like is None else like.choices()
  chosen, weights = [], []
  for t in range(num_tokens):
    if not metrics["counted"][t]:
      experts = []
    elif repeated is not None:
      experts = repeated[t]
    else:
      merit = p[t] + bias
      may = [e for e in range(num_experts) if logits[t, e] > -np.inf]
      first = [e for e in may if forced[t, e]]
      rest = [e for e in may if not forced[t, e]]
      if groups is not None:
        remaining = _best_groups(merit, may, num_experts, *groups, group_best)
        rest = [e for e in rest if e in remaining]
      experts = (first + _falling(merit, rest))[:k]
    chosen.append(experts)
    weights.append(
      _scale_weights([p[t, e] for e in experts], renormalize, scale)
    )
  return _token_choice(chosen, weights, k, num_experts, metrics)


def _best_groups(merit, may, num_experts, num_groups, keep_groups, group_best):
  """The experts of the best groups."""
  size = num_experts // num_groups
  members = [list(range(i * size, (i + 1) * size)) for i in range(num_groups)]
  score = []
  for group in members:
    allowed = [e for e in group if e in may]
    best = _falling(merit, allowed)[:group_best]
    score.append(sum(merit[e] for e in best) if allowed else -np.inf)
  kept = _falling(score, range(num_groups))[:keep_groups]
  return [e for i in kept for e in members[i]]


def noisy_logits(logits, noise, noise_logits=None):
  """(logits + noise * std, std [T, E]): softplus(noise_logits), or 1 / E."""
  logits = np.asarray(logits, np.float64)
  if noise_logits is None:
    std = np.full(logits.shape, 1.0 / logits.shape[1])
  else:
    std = softplus(np.asarray(noise_logits, np.float64))
  return logits + np.asarray(noise, np.float64) * std, std


def noisy_top_k(logits, k, noise, noise_logits=None, **options):
  """`top_k` of noisy logits; noise [T, E] is standard normal."""
  return top_k(noisy_logits(logits, noise, noise_logits)[0], k, **options)


def switch(logits, **options):
  """The single best expert, its softmax probability as weight."""
  return top_k(logits, 1, **options)


def expert_choice(
  logits, capacity, *, scores="softmax", token_valid=None, like=None
):
  """Each expert takes the tokens of largest p; edge e * capacity + r.

  >>> routed = expert_choice([[0.0, 9.0], [0.0, 9.0], [0.0, 1.0]], 1)
  >>> routed.token.tolist(), routed.expert.tolist()
  ([2, 0], [0, 1])
  """
  logits = np.asarray(logits, np.float64)
  p, metrics = probabilities(logits, scores, token_valid)
  return _expert_choice(logits, p, p, capacity, metrics, like)


def _expert_choice(logits, merit, weight, capacity, metrics, like):
  num_tokens, num_experts = logits.shape
  rows = []
  for e in range(num_experts):
    if like is None:
      may = [
        t
        for t in range(num_tokens)
        if metrics["counted"][t] and logits[t, e] > -np.inf
      ]
      tokens = _falling(merit[:, e], may)[:capacity]
    else:
      tokens = [token for _, token, expert, _ in like.edges() if expert == e]
    for r in range(capacity):
      if r < len(tokens):
        rows.append((tokens[r], e, weight[tokens[r], e], True, r))
      else:
        rows.append((0, e, 0.0, False, r))
  return _assignment(rows, num_tokens, num_experts, metrics)


def mixture_of_depths(
  logits, capacity, *, weight="sigmoid", token_valid=None, like=None
):
  """One expert takes the tokens of largest logit [T].

  weight: "sigmoid" of the logit, or "identity", the logit itself.
  """
  logits = np.asarray(logits, np.float64)[:, None]
  p, metrics = probabilities(logits, "sigmoid", token_valid)
  weights = p if weight == "sigmoid" else logits
  return _expert_choice(logits, logits, weights, capacity, metrics, like)


def top_p(logits, p, k_max, *, renormalize=False, token_valid=None, like=None):
  """The smallest prefix of the falling probabilities with mass >= p.

  At most k_max experts and at least one; edges [T * k_max].

  >>> top_p(np.zeros((1, 10)), 0.7, 10).valid.sum()
  np.int64(7)
  """
  logits = np.asarray(logits, np.float64)
  probability, metrics = probabilities(logits, "softmax", token_valid)
  repeated = None if like is None else like.choices()
  chosen, weights = [], []
  for t, row in enumerate(logits):
    experts = []
    if repeated is not None and metrics["counted"][t]:
      experts = repeated[t]
    elif metrics["counted"][t]:
      may = [e for e in range(len(row)) if row[e] > -np.inf]
      mass = [fractions.Fraction(math.exp(v - row.max())) for v in row]
      wanted = _decimal(p) * sum(mass)
      held = fractions.Fraction(0)
      for e in _falling(row, may):
        if experts and (held >= wanted or len(experts) == k_max):
          break
        experts.append(e)
        held += mass[e]
    chosen.append(experts)
    weights.append(
      _scale_weights([probability[t, e] for e in experts], renormalize)
    )
  return _token_choice(chosen, weights, k_max, logits.shape[1], metrics)


def hash_(ids, table, num_experts, *, token_valid=None):
  """Expert table[id] for each token, with weight 1."""
  experts = []
  for i in np.asarray(ids):
    experts.append(int(table[i]) if 0 <= i < len(table) else -1)
  return by_modality(experts, num_experts, token_valid=token_valid)


def by_modality(ids, num_experts, *, token_valid=None):
  """Expert id for each token, with weight 1; none where out of range."""
  valid = _all(token_valid, len(ids))
  chosen = []
  for t, i in enumerate(ids):
    chosen.append([int(i)] if valid[t] and 0 <= i < num_experts else [])
  counted = np.array([bool(c) for c in chosen], bool)
  metrics = {"nan_tokens": 0, "counted": counted, "probabilities": None}
  weights = [[1.0] * len(c) for c in chosen]
  return _token_choice(chosen, weights, 1, num_experts, metrics)


def gumbel_threshold(
  logits,
  gumbel,
  temperature,
  threshold,
  k_max=None,
  *,
  renormalize=False,
  token_valid=None,
  like=None,
):
  """Every expert with p > threshold, and the best one (EvoMoE).

  p = softmax((logits + gumbel) / temperature); edges [T * k_max], k_max = E
  by default, in falling order of p.
  """
  noisy = (np.asarray(logits, np.float64) + gumbel) / temperature
  p, metrics = probabilities(noisy, "softmax", token_valid)
  num_experts = p.shape[1]
  slots = num_experts if k_max is None else k_max
  repeated = None if like is None else like.choices()
  chosen, weights = [], []
  for t in range(len(p)):
    if not metrics["counted"][t]:
      experts = []
    elif repeated is not None:
      experts = repeated[t]
    else:
      may = [e for e in range(num_experts) if noisy[t, e] > -np.inf]
      order = _falling(p[t], may)
      experts = order[:1] + [e for e in order[1:] if p[t, e] > threshold]
      experts = experts[:slots]
    chosen.append(experts)
    weights.append(_scale_weights([p[t, e] for e in experts], renormalize))
  return _token_choice(chosen, weights, slots, num_experts, metrics)


def relu_norm(
  logits, gain, k_max=None, *, eps=1e-6, token_valid=None, like=None
):
  """Every expert with a positive logit, ReLU then RMS norm (BlockFFN).

  metrics["probabilities"] are the shares of the normalized gates.
  """
  logits = np.asarray(logits, np.float64)
  counted, nan_tokens = look(logits, token_valid)
  num_experts = logits.shape[1]
  slots = num_experts if k_max is None else k_max
  repeated = None if like is None else like.choices()
  chosen, weights = [], []
  gates = np.zeros(logits.shape)
  for t in range(len(logits)):
    experts = []
    if counted[t]:
      positive = np.maximum(logits[t], 0.0)
      if positive.any():
        gates[t] = positive / math.sqrt((positive**2).mean() + eps)
      active = [e for e in range(num_experts) if positive[e] > 0]
      experts = _falling(positive, active)[:slots]
      if repeated is not None:
        experts = repeated[t]
    chosen.append(experts)
    weights.append([gates[t, e] * gain[e] for e in experts])
  metrics = {
    "nan_tokens": nan_tokens,
    "counted": counted,
    "probabilities": normalized(gates),
  }
  return _token_choice(chosen, weights, slots, num_experts, metrics)


def soft(logits, *, token_valid=None):
  """(dispatch, combine), both [T, S], for logits [T, S] of tokens and slots.

  dispatch sums to 1 over tokens, combine over slots (Soft MoE).
  """
  logits = np.array(logits, np.float64)
  counted, _ = look(logits, token_valid)
  logits[~counted] = -np.inf
  dispatch_weights = np.zeros(logits.shape)
  combine_weights = np.zeros(logits.shape)
  for s in range(logits.shape[1]):
    dispatch_weights[:, s] = softmax(logits[:, s])
  for t in range(logits.shape[0]):
    combine_weights[t] = softmax(logits[t])
  return dispatch_weights, combine_weights


def per_chunk(logits, chunk_ids, num_chunks, *, token_valid=None):
  """The mean logits of each chunk, given to all of its tokens, [T, E]."""
  logits = np.asarray(logits, np.float64)
  counted, _ = look(logits, token_valid)
  out = np.full(logits.shape, -np.inf)
  for c in range(num_chunks):
    inside = [t for t in range(len(logits)) if chunk_ids[t] == c]
    mean = np.zeros(logits.shape[1])
    for t in inside:
      if counted[t]:
        mean = mean + logits[t]
    mean = mean / max(1, sum(counted[t] for t in inside))
    for t in inside:
      bad = np.isnan(logits[t]).any() or (logits[t] == np.inf).any()
      out[t] = logits[t] if bad else mean
  return out


# --- Losses and balancing


def load_balance(assignment, p, segments=None):
  """E * sum over experts of (share of valid edges) * (mean probability).

  segments [T]: the mean over segments of the loss inside each.
  """
  counted = assignment.metrics["counted"]
  if segments is None:
    segments = np.zeros(assignment.num_tokens, int)
  names = sorted({int(s) for s, c in zip(segments, counted) if c})
  losses = []
  for name in names:
    tokens = [t for t in np.flatnonzero(counted) if segments[t] == name]
    counts = np.zeros(assignment.num_experts)
    for _, token, expert, _ in assignment.edges():
      counts[expert] += token in tokens
    loss = 0.0
    for e in range(assignment.num_experts):
      mean_p = sum(p[t][e] for t in tokens) / len(tokens)
      if counts.sum() > 0:
        loss += counts[e] / counts.sum() * mean_p
    losses.append(assignment.num_experts * loss)
  return sum(losses) / len(losses) if losses else 0.0


def load_balance_gradient(assignment, p):
  """The gradient of `load_balance` (one segment) in p, [T, E]."""
  counted = assignment.metrics["counted"]
  counts = assignment.counts()
  gradient = np.zeros(np.shape(p))
  if counts.sum() > 0:
    share = counts / counts.sum()
    gradient[counted] = assignment.num_experts * share / counted.sum()
  return gradient


def z(logits, *, allowed=None, token_valid=None):
  """The mean over counted tokens of logsumexp(logits)^2."""
  logits = mask_logits(logits, allowed)
  counted, _ = look(logits, token_valid)
  values = [logsumexp(logits[t]) ** 2 for t in np.flatnonzero(counted)]
  return sum(values) / len(values) if values else 0.0


def z_gradient(logits, *, token_valid=None):
  """The gradient of `z` in the logits: 2 * logsumexp * p / tokens."""
  logits = np.asarray(logits, np.float64)
  counted, _ = look(logits, token_valid)
  gradient = np.zeros(logits.shape)
  for t in np.flatnonzero(counted):
    gradient[t] = 2 * logsumexp(logits[t]) * softmax(logits[t])
  return gradient / max(1, counted.sum())


def importance(weights, *, counted=None):
  """CV^2 over experts of the sum of weights [T, E] over counted tokens."""
  weights = np.asarray(weights, np.float64)
  counted = _all(counted, len(weights))
  sums = [
    sum(weights[t, e] for t in np.flatnonzero(counted))
    for e in range(weights.shape[1])
  ]
  return cv_squared(sums)


def stay_probability(clean, noisy, std, k, threshold="excluding"):
  """P(expert e stays among the k best if its noise is drawn again), [T, E]."""
  clean = np.asarray(clean, np.float64)
  std = np.broadcast_to(np.asarray(std, np.float64), clean.shape)
  stays = np.zeros(clean.shape)
  for t, e in np.ndindex(*clean.shape):
    rivals = [
      noisy[t][i] for i in range(clean.shape[1]) if threshold == "kth" or i != e
    ]
    rivals = sorted(rivals, reverse=True)
    bar = rivals[k - 1] if len(rivals) >= k else -np.inf
    if clean[t, e] > -np.inf:
      stays[t, e] = normal_cdf((clean[t, e] - bar) / std[t, e])
  return stays


def load(clean, noisy, std, k, *, threshold="excluding", token_valid=None):
  """CV^2 of the smooth load of Shazeer ("excluding") or V-MoE ("kth")."""
  clean = np.asarray(clean, np.float64)
  noisy = np.asarray(noisy, np.float64)
  counted, _ = look(noisy, token_valid)
  where = np.flatnonzero(counted)
  std = np.broadcast_to(np.asarray(std, np.float64), clean.shape)
  return importance(
    stay_probability(clean[where], noisy[where], std[where], k, threshold)
  )


def entropy(p, *, counted=None):
  """The mean entropy of the counted rows of p, in nats."""
  rows = [row for row, c in zip(p, _all(counted, len(p))) if c]
  return sum(row_entropy(row) for row in rows) / len(rows) if rows else 0.0


def concentration(p, *, counted=None):
  """The entropy of the mean of the counted rows of p, in nats."""
  rows = [np.asarray(row) for row, c in zip(p, _all(counted, len(p))) if c]
  return row_entropy(sum(rows) / len(rows)) if rows else 0.0


def mutual_information(p, *, counted=None):
  """Mean entropy of rows minus entropy of the mean row (ModuleFormer).

  >>> round(float(mutual_information(np.eye(4))) + math.log(4), 12)
  0.0
  """
  return entropy(p, counted=counted) - concentration(p, counted=counted)


def locality(logits, *, steepness=100.0, segments=None, token_valid=None):
  """BlockFFN's activation locality: cross-entropy between neighbors.

  Of each pair the later token is the target, the earlier the prediction;
  the mean over pairs and experts. The gradient goes through both.
  """
  logits = np.asarray(logits, np.float64)
  counted, _ = look(logits, token_valid)
  if segments is None:
    segments = np.zeros(len(logits), int)
  terms = []
  for t in range(1, len(logits)):
    if counted[t - 1] and counted[t] and segments[t - 1] == segments[t]:
      for e in range(logits.shape[1]):
        prediction = steepness * logits[t - 1, e]
        target = float(sigmoid(steepness * logits[t, e]))
        terms.append(
          target * softplus(-prediction) + (1 - target) * softplus(prediction)
        )
  return sum(terms) / len(terms) if terms else 0.0


def gate_shares(logits, *, norm_eps=0.0, eps=0.0, token_valid=None):
  """relu(logits) over its sum, [T, E]; rows of zeros stay.

  norm_eps and eps are the authors' epsilons: 1e-6 inside of the RMS norm that
  comes first, 1e-5 added to the sum.
  """
  logits = np.asarray(logits, np.float64)
  counted, _ = look(logits, token_valid)
  shares = np.zeros(logits.shape)
  for t in np.flatnonzero(counted):
    gates = np.maximum(logits[t], 0.0)
    if gates.sum() > 0:
      gates = gates / math.sqrt((gates**2).mean() + norm_eps)
      shares[t] = gates / (gates.sum() + eps)
  return shares


def chunk_sparsity(shares, chunk_ids, *, counted=None, eps=0.0):
  """BlockFFN's chunk loss: the mean probability that an expert is active.

  1 - product over the tokens of a chunk of (1 - share), averaged over chunks
  and experts.
  """
  counted = _all(counted, len(shares))
  terms = []
  for c in sorted({int(i) for i, yes in zip(chunk_ids, counted) if yes}):
    tokens = [t for t in np.flatnonzero(counted) if chunk_ids[t] == c]
    for e in range(np.shape(shares)[1]):
      idle = 1.0
      for t in tokens:
        idle *= 1.0 - shares[t][e] + eps
      terms.append(1.0 - idle)
  return sum(terms) / len(terms) if terms else 0.0


def load_error(assignment):
  """Share of the valid edges minus 1 / E, [E]: the gradient of a bias."""
  counts = assignment.counts()
  if counts.sum() == 0:
    return np.zeros(len(counts))
  return counts / counts.sum() - 1.0 / len(counts)


def update_bias(bias, assignment, rate, rule="sign"):
  """bias - rate * sign(error), or - rate * error ("proportional").

  The sign is of whole numbers: 0 at exactly the mean load.
  """
  counts = assignment.counts()
  if rule == "sign":
    step = np.sign(counts * len(counts) - counts.sum())
  else:
    step = load_error(assignment)
  return np.asarray(bias, np.float64) - rate * step


# --- Dispatch


def capacity_of(
  num_tokens, num_experts, factor, k=1, *, rounding="ceil", multiple_of=1
):
  """factor * k * num_tokens / num_experts, rounded, then up to a multiple.

  >>> capacity_of(100, 1, 1.1), capacity_of(20, 8, 1.0, rounding="round")
  (110, 2)
  """
  share = _decimal(factor) * k * num_tokens / num_experts
  whole = math.ceil(share) if rounding == "ceil" else round(share)
  return -(-whole // multiple_of) * multiple_of


def keep(assignment, capacity=None, priority="position", uniform=None):
  """Which edges are processed, bool[n]; capacity None keeps all valid ones.

  priority: "position", "weight" (the largest weight of the token, falling) or
  "random" (uniform [T], falling).
  """
  if capacity is None:
    return assignment.valid.copy()
  value = np.zeros(assignment.num_tokens)
  if priority == "random":
    value = np.asarray(uniform, np.float64)
  elif priority == "weight":
    value = np.full(assignment.num_tokens, -np.inf)
    for _, token, _, weight in assignment.edges():
      value[token] = max(value[token], weight)
  kept = np.zeros(len(assignment.valid), bool)
  for wanted in range(assignment.num_experts):
    queue = []
    for edge, token, expert, _ in assignment.edges():
      if expert == wanted:
        queue.append((assignment.rank[edge], -value[token], token, edge))
    for *_, edge in sorted(queue)[:capacity]:
      kept[edge] = True
  return kept


def dropped(assignment, kept):
  """The share of the valid edges that is not kept; 0 without valid edges."""
  return (assignment.valid & ~kept).sum() / max(1, assignment.valid.sum())


def dispatch(x, assignment, bank, params, kept=None):
  """y [T, d2]: the sum over the kept edges of weight * expert(x[token]).

  bank(params, expert, row) is one row through one expert; kept is all valid
  edges by default (dropless).
  """
  x = np.asarray(x, np.float64)
  kept = assignment.valid if kept is None else kept
  y = np.zeros((len(x), len(bank(params, 0, np.zeros(x.shape[1])))))
  for edge, token, expert, weight in assignment.edges():
    if kept[edge]:
      y[token] += weight * bank(params, expert, x[token])
  return y


def soft_mixture(x, logits, num_experts, bank, params, *, token_valid=None):
  """Soft MoE: slots are mixtures of tokens, outputs are mixtures of slots.

  Slot s, of S = num_experts * n, belongs to expert s // n.
  """
  x = np.asarray(x, np.float64)
  to_slots, from_slots = soft(logits, token_valid=token_valid)
  num_slots = to_slots.shape[1]
  y = 0.0
  for s in range(num_slots):
    row = np.zeros(x.shape[1])
    for t in range(len(x)):
      if to_slots[t, s] > 0:  # so that NaN in an invalid token stays there
        row = row + to_slots[t, s] * x[t]
    out = bank(params, s // (num_slots // num_experts), row)
    y = y + from_slots[:, s, None] * out
  return y


# --- Expert banks


def activate(z, name):
  """relu, relu2 (its square), gelu (in its tanh form) or silu."""
  if name == "relu":
    return np.maximum(z, 0.0)
  if name == "relu2":
    return np.maximum(z, 0.0) ** 2
  if name == "gelu":
    inner = math.sqrt(2.0 / math.pi) * (z + 0.044715 * z**3)
    return 0.5 * z * (1.0 + np.tanh(inner))
  if name == "silu":
    return z * sigmoid(z)
  raise ValueError(f"activation {name}")


def ffn(params, expert, row, activation="silu"):
  """down(act(row up)), or with a gate down(act(row gate) * (row up)).

  params: up [E, d, h], down [E, h, d2] and perhaps gate [E, d, h].
  """
  hidden = row @ params["up"][expert]
  if "gate" in params:
    hidden = activate(row @ params["gate"][expert], activation) * hidden
  else:
    hidden = activate(hidden, activation)
  return hidden @ params["down"][expert]


def bank_rows(bank, params, rows, group_sizes):
  """Rows [m, d] sorted by expert; rows behind the last group give zeros."""
  rows = np.asarray(rows, np.float64)
  out = np.zeros((len(rows), len(bank(params, 0, np.zeros(rows.shape[1])))))
  begin = 0
  for expert, size in enumerate(group_sizes):
    for i in range(begin, begin + size):
      out[i] = bank(params, expert, rows[i])
    begin += size
  return out


def stick_breaking(logits):
  """Weights of keys 0 .. i for the query at i, from their logits.

  From the last to the first, each takes its sigmoid's part of what is left.

  >>> stick_breaking([0.0, 0.0, 0.0]).tolist()
  [0.125, 0.25, 0.5]
  """
  logits = np.asarray(logits, np.float64)
  weights = np.zeros(len(logits))
  left = 1.0
  for j in reversed(range(len(logits))):
    weights[j] = left * sigmoid(logits[j])
    left *= float(sigmoid(-logits[j]))
  return weights


def attention_experts(
  x,
  assignment,
  params,
  kept=None,
  *,
  kind="softmax",
  causal=True,
  token_valid=None,
):
  """Attention heads as experts: own queries and outputs, shared keys, values.

  params: query [E, d, h], output [E, h, d2], key [d, h], value [d, h].
  kind: "softmax" (MoA) or "stick_breaking" (ModuleFormer, causal).
  """
  x = np.asarray(x, np.float64)
  kept = assignment.valid if kept is None else kept
  valid = _all(token_valid, len(x))
  y = np.zeros((len(x), params["output"].shape[-1]))
  for edge, token, expert, weight in assignment.edges():
    if not kept[edge]:
      continue
    last = token if causal else len(x) - 1
    reads = [j for j in range(last + 1) if valid[j]]
    if not reads:
      continue
    query = x[token] @ params["query"][expert]
    logits = [
      query @ (x[j] @ params["key"]) / math.sqrt(len(query)) for j in reads
    ]
    a = softmax(logits) if kind == "softmax" else stick_breaking(logits)
    mixed = sum(a[i] * (x[j] @ params["value"]) for i, j in enumerate(reads))
    y[token] += weight * (mixed @ params["output"][expert])
  return y


def stem(x, ids, params, activation="silu"):
  """down(act(x gate) * table[id]) (STEM); zeros where the id is unknown.

  params: gate [d, h], table [V, h], down [h, d2].
  """
  x = np.asarray(x, np.float64)
  y = np.zeros((len(x), params["down"].shape[1]))
  for t, i in enumerate(ids):
    if 0 <= i < len(params["table"]):
      hidden = activate(x[t] @ params["gate"], activation) * params["table"][i]
      y[t] = hidden @ params["down"]
  return y


def monet_gates(
  scores, k, *, mean=None, variance=None, eps=1e-5, token_valid=None
):
  """Gates [T, H, N] of raw scores [T, H, N] of H heads over N sub-keys.

  mean, variance [H]: running statistics; those of the batch by default.
  """
  scores = np.asarray(scores, np.float64)
  num_tokens, heads, keys = scores.shape
  counted, _ = look(scores.reshape(num_tokens, -1), token_valid)
  quantile = -np.inf
  if k < keys:
    quantile = statistics.NormalDist().inv_cdf(1.0 - k / keys)
  gates = np.zeros(scores.shape)
  for h in range(heads):
    seen = scores[counted, h]
    center = seen.mean() if mean is None else mean[h]
    spread = seen.var() if variance is None else variance[h]
    for t in np.flatnonzero(counted):
      normal = (scores[t, h] - center) / math.sqrt(spread + eps)
      stays = normal >= min(quantile, normal.max())
      gates[t, h] = softmax(np.where(stays, scores[t, h], -np.inf))
  return gates


def monet_horizontal(params, i, j, row, activation="relu2"):
  """Expert (i, j): act(row up_i + up_bias_i) down_j + bias_j.

  params: up [N, d, m], up_bias [N, m], down [N, m, d2], bias [N, d2].
  """
  hidden = activate(row @ params["up"][i] + params["up_bias"][i], activation)
  return hidden @ params["down"][j] + params["bias"][j]


def monet_vertical(params, i, j, row, activation="relu2"):
  """Expert (i, j): both halves of the hidden layer and of the output joined.

  params: up1, up2 [N, d, m], up_bias1, up_bias2 [N, m], down11, down12,
  down21, down22 [N, m, d2 / 2], bias1, bias2 [N, d2 / 2].
  """
  a = activate(row @ params["up1"][i] + params["up_bias1"][i], activation)
  b = activate(row @ params["up2"][j] + params["up_bias2"][j], activation)
  first = a @ params["down11"][i] + b @ params["down12"][i]
  second = a @ params["down21"][j] + b @ params["down22"][j]
  return np.concatenate(
    [first + params["bias1"][i], second + params["bias2"][j]]
  )


def monet(x, gates1, gates2, expert, params, *, removed=()):
  """Sum over heads and pairs (i, j) of gates1_i gates2_j expert_ij(x_t).

  expert is `monet_horizontal` or `monet_vertical`; gates are [T, H, N];
  removed: pairs (i, j) that are left out.
  """
  x = np.asarray(x, np.float64)
  num_tokens, heads, keys = np.shape(gates1)
  rows = []
  for t in range(num_tokens):
    y = 0.0
    for i in range(keys):
      for j in range(keys):
        if (i, j) not in removed:
          gate = sum(gates1[t][h][i] * gates2[t][h][j] for h in range(heads))
          y = y + gate * expert(params, i, j, x[t])
    rows.append(y)
  return np.array(rows)


def reap(x, assignment, bank, params):
  """For each expert the mean over its edges of weight * norm of its output."""
  x = np.asarray(x, np.float64)
  total = np.zeros(assignment.num_experts)
  for _, token, expert, weight in assignment.edges():
    output = bank(params, expert, x[token])
    total[expert] += weight * math.sqrt((output**2).sum())
  return total / np.maximum(1, assignment.counts())


# --- Gradients


def numerical_gradient(function, array, step=1e-5):
  """The gradient of function(array) -> number, by central differences.

  >>> numerical_gradient(lambda a: (a**2).sum(), np.array([3.0])).round(6)
  array([6.])
  """
  array = np.array(array, np.float64)
  gradient = np.zeros(array.shape)
  for where in np.ndindex(*array.shape):
    middle = array[where]
    array[where] = middle + step
    above = function(array)
    array[where] = middle - step
    below = function(array)
    array[where] = middle
    gradient[where] = (above - below) / (2 * step)
  return gradient


def numerical_gradients(function, arrays, step=1e-5):
  """The gradients of function(dict) -> number in every array of the dict."""
  gradients = {}
  for name in arrays:
    gradients[name] = numerical_gradient(
      lambda a, name=name: function({**arrays, name: a}), arrays[name], step
    )
  return gradients


def layer_gradients(route, layer, arrays, **capacity):
  """Gradients of the sum of squares of a layer's output, choices held fixed.

  Args:
    route: route(arrays, like) -> Assignment; like is None or an assignment
      whose choice is to be repeated.
    layer: layer(arrays, assignment, kept) -> y, such as `dispatch` or
      `attention_experts` on some of the arrays.
    arrays: all that is differentiated, by name.
    **capacity: passed to `keep`, once.

  Returns:
    y, and a dict of gradients.
  """
  fixed = route(arrays, None)
  kept = keep(fixed, **capacity)

  def loss(changed):
    y = layer(changed, route(changed, fixed), kept)
    return (y**2).sum()

  return layer(arrays, fixed, kept), numerical_gradients(loss, arrays)


def weight_gradient(x, assignment, bank, params, cotangent, kept=None):
  """The gradient of `dispatch` in each edge's weight: cotangent . expert(x).

  0 for edges that are not kept. [n]
  """
  kept = assignment.valid if kept is None else kept
  gradient = np.zeros(len(assignment.weight))
  for edge, token, expert, _ in assignment.edges():
    if kept[edge]:
      gradient[edge] = cotangent[token] @ bank(params, expert, x[token])
  return gradient


def softmax_gradient(p, cotangent):
  """The gradient in the logits of rows p = softmax(logits)."""
  p, cotangent = np.asarray(p), np.asarray(cotangent)
  return p * (cotangent - (p * cotangent).sum(-1, keepdims=True))


def sigmoid_gradient(p, cotangent):
  """The gradient in the logits of p = sigmoid(logits)."""
  return np.asarray(p) * (1.0 - np.asarray(p)) * np.asarray(cotangent)


def renormalize_gradient(weights, cotangent):
  """The gradient in weights of weights / sum(weights), for one token."""
  weights, cotangent = np.asarray(weights), np.asarray(cotangent)
  total = weights.sum()
  if total == 0:
    return np.zeros(len(weights))
  return (cotangent - (weights / total) @ cotangent) / total
