"""The oracle of routing: sums by hand, einsums, limits, and the authors.

data/routing_authors.json has what others' code gives for inputs drawn by
`normal` and `uniform`, and where their conventions differ.
"""

import functools
import itertools
import json
import math
import pathlib

from absl.testing import parameterized
import numpy as np

from tests.oracles import routing as oracle

AUTHORS = json.loads(
  (pathlib.Path(__file__).parent / "data/routing_authors.json").read_text()
)
RESULTS = AUTHORS["results"]
INF = np.inf
close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6)
exact = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-13)
near = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-8)


def normal(seed, *shape):
  draw = np.random.default_rng(seed).standard_normal(shape)
  return draw.astype(np.float32).astype(np.float64)


def uniform(seed, *shape):
  draw = np.random.default_rng(seed).random(shape)
  return draw.astype(np.float32).astype(np.float64)


def small_bank(seed, experts=3, d=4, h=3, gated=True):
  names = ("up", "gate") if gated else ("up",)
  params = {n: normal(seed + i, experts, d, h) for i, n in enumerate(names)}
  return {**params, "down": normal(seed + 2, experts, h, d)}


def doubling(params, expert, row):
  """Expert e multiplies by e + 1."""
  del params
  return (expert + 1.0) * row


def by_token(assignment):
  """{(token, expert): weight} of the valid edges."""
  return {(t, e): w for _, t, e, w in assignment.edges()}


class PiecesTest(parameterized.TestCase):
  def test_extremes(self):
    self.assertEqual(oracle.sigmoid([-1e4, 0.0, 1e4]).tolist(), [0.0, 0.5, 1.0])
    self.assertEqual(oracle.softplus(-1e4), 0.0)
    self.assertEqual(oracle.logsumexp(np.array([1e4, -INF])), 1e4)
    self.assertEqual(oracle.normal_cdf(INF), 1.0)
    exact(oracle.normal_cdf(1.959963984540054), 0.975)

  def test_activations(self):
    z = np.array([-1.5, 0.0, 0.7])
    exact(oracle.activate(z, "relu"), [0, 0, 0.7])
    exact(oracle.activate(z, "relu2"), [0, 0, 0.49])
    exact(oracle.activate(z, "silu"), z / (1 + np.exp(-z)))
    erf = np.array([z_ * oracle.normal_cdf(z_) for z_ in z])
    np.testing.assert_allclose(oracle.activate(z, "gelu"), erf, atol=2e-3)
    with self.assertRaises(ValueError):
      oracle.activate(z, "swish")


class TopKTest(parameterized.TestCase):
  def test_by_hand(self):
    logits = np.log([[4.0, 3.0, 2.0, 1.0]])
    routed = oracle.top_k(logits, 2, scale=10.0)
    self.assertEqual(routed.expert.tolist(), [0, 1])
    self.assertEqual(routed.rank.tolist(), [0, 1])
    exact(routed.weight, [4.0, 3.0])
    exact(oracle.top_k(logits, 2, renormalize=True).weight, [4 / 7, 3 / 7])
    exact(oracle.top_k(logits, 1, scores="sigmoid").weight, 4 / 5)
    exact(oracle.switch(logits).weight, 0.4)

  def test_ties_take_the_lowest_experts(self):
    routed = oracle.top_k(np.zeros((2, 5)), 3)
    self.assertEqual(routed.expert.tolist(), [0, 1, 2] * 2)

  def test_bias_chooses_and_does_not_weigh(self):
    logits = np.log([[4.0, 3.0, 2.0, 1.0]])
    routed = oracle.top_k(logits, 2, bias=[0, -1, 0, 1])
    self.assertEqual(routed.expert.tolist(), [3, 0])
    exact(routed.weight, [0.1, 0.4])

  def test_not_allowed(self):
    logits = np.log([[4.0, 3.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    routed = oracle.top_k(
      logits, 3, allowed=[[False, True, True, True], [False, True] * 2]
    )
    self.assertEqual(routed.choices(), [[1, 2, 3], [1, 3]])
    self.assertEqual(routed.valid.tolist(), [True] * 5 + [False])
    exact(routed.weight, [3 / 6, 2 / 6, 1 / 6, 0.5, 0.5, 0.0])
    # A bias does not bring back what is not allowed.
    routed = oracle.top_k(logits, 1, allowed=[0, 1, 1, 1], bias=[99, 0, 0, 0])
    self.assertEqual(routed.expert.tolist(), [1, 1])

  def test_forced(self):
    logits = np.log([[4.0, 3.0, 2.0, 1.0]])
    routed = oracle.top_k(logits, 2, forced=[0, 0, 0, 1])
    self.assertEqual(routed.expert.tolist(), [3, 0])
    exact(routed.weight, [0.1, 0.4])
    routed = oracle.top_k(logits, 2, forced=[0, 1, 1, 1])
    self.assertEqual(routed.expert.tolist(), [1, 2])
    routed = oracle.top_k(
      logits, 2, forced=[[0, 0, 1, 0]], allowed=[1, 1, 0, 1]
    )
    self.assertEqual(routed.expert.tolist(), [0, 1])

  def test_groups(self):
    p = np.array([[0.30, 0.02, 0.16, 0.17, 0.15, 0.20]])
    # Sums of two: 0.32, 0.33, 0.35. Maxima: 0.30, 0.17, 0.20.
    groups = functools.partial(oracle.top_k, np.log(p), 3)
    self.assertEqual(groups(groups=(3, 1)).choices(), [[5, 4]])
    self.assertEqual(groups(groups=(3, 2)).choices(), [[5, 3, 2]])
    one = groups(groups=(3, 2), group_best=1)
    self.assertEqual(one.choices(), [[0, 5, 4]])
    forced = groups(groups=(3, 1), forced=[0, 1, 0, 0, 0, 0])
    self.assertEqual(forced.choices(), [[1, 5, 4]])
    # Groups of one expert: the best experts.
    self.assertEqual(groups(groups=(6, 2)).choices(), [[0, 5]])

  def test_group_with_one_allowed(self):
    logits = np.log([[3.0, 3.0, 4.0, 4.0]])
    routed = oracle.top_k(logits, 2, groups=(2, 1), allowed=[1, 1, 1, 0])
    self.assertEqual(routed.choices(), [[0, 1]])
    # The bias of what is not allowed does not speak for its group.
    routed = oracle.top_k(
      logits, 2, groups=(2, 1), allowed=[1, 1, 1, 0], bias=[0, 0, 0, 9]
    )
    self.assertEqual(routed.choices(), [[0, 1]])

  def test_nan_and_infinities(self):
    logits = normal(100, 6, 3)
    logits[1, 0] = np.nan
    logits[2, 1] = INF
    logits[3] = -INF
    logits[4, 2] = -INF
    logits[5, 0] = np.nan
    valid = [True] * 5 + [False]
    routed = oracle.top_k(logits, 3, token_valid=valid)
    self.assertEqual([len(c) for c in routed.choices()], [3, 0, 0, 0, 2, 0])
    self.assertEqual(routed.metrics["nan_tokens"], 2)
    self.assertEqual(
      routed.metrics["counted"].tolist(), [True] + [False] * 3 + [True, False]
    )
    self.assertTrue(np.isfinite(routed.weight).all())
    alone = oracle.top_k(logits[[0, 4]], 3)
    exact(routed.dense()[[0, 4]], alone.dense())
    p = routed.metrics["probabilities"]
    exact(
      oracle.load_balance(routed, p),
      oracle.load_balance(alone, alone.metrics["probabilities"]),
    )
    exact(oracle.z(logits, token_valid=valid), oracle.z(logits[[0, 4]]))

  def test_nan_where_not_allowed_is_nothing(self):
    routed = oracle.top_k([[np.nan, 0.0, 1.0]], 1, allowed=[0, 1, 1])
    self.assertEqual(routed.expert.tolist(), [2])
    self.assertEqual(routed.metrics["nan_tokens"], 0)

  def test_weights_that_sum_to_zero(self):
    routed = oracle.top_k([[-1e4, -1e4]], 1, scores="sigmoid", renormalize=True)
    self.assertEqual(routed.weight.tolist(), [0.0])
    self.assertTrue(routed.valid.all())

  def test_no_tokens(self):
    routed = oracle.top_k(np.zeros((0, 3)), 2)
    self.assertEqual(routed.weight.shape, (0,))
    self.assertEqual(oracle.load_balance(routed, np.zeros((0, 3))), 0.0)

  def test_mixtral(self):
    logits = normal(1, 24, 8)
    authors = RESULTS["mixtral_router"]
    routed = oracle.top_k(logits, 2, renormalize=True)
    self.assertEqual(routed.expert.reshape(24, 2).tolist(), authors["experts"])
    close(routed.weight.reshape(24, 2), authors["weights"])
    p = routed.metrics["probabilities"]
    close(2 * oracle.load_balance(routed, p), authors["loss"])
    valid = np.ones(24, bool)
    valid[[0, 5, 17, 23]] = False
    masked = oracle.top_k(logits, 2, token_valid=valid)
    close(2 * oracle.load_balance(masked, p), authors["loss_masked"])

  def test_olmoe(self):
    routed = oracle.top_k(normal(1, 24, 8), 3)
    authors = RESULTS["olmoe_router"]
    self.assertEqual(routed.expert.reshape(24, 3).tolist(), authors["experts"])
    close(routed.weight.reshape(24, 3), authors["weights"])

  @parameterized.parameters(
    (
      "deepseek_v3_router",
      dict(scores="sigmoid", renormalize=True, scale=2.5, bias=0.3),
    ),
    ("deepseek_v2_router", dict(scale=1.5, group_best=1)),
  )
  def test_deepseek(self, name, options):
    options = dict(options)
    if "bias" in options:
      options["bias"] = options["bias"] * normal(7, 16)
    routed = oracle.top_k(normal(6, 12, 16), 4, groups=(4, 2), **options)
    authors = RESULTS[name]
    got = by_token(routed)
    expected = {
      (t, e): w
      for t in range(12)
      for e, w in zip(authors["experts"][t], authors["weights"][t])
    }
    self.assertEqual(sorted(got), sorted(expected))
    close([got[i] for i in sorted(got)], [expected[i] for i in sorted(got)])

  def test_moduleformer(self):
    routed = oracle.top_k(normal(1, 24, 8), 2)
    authors = RESULTS["moduleformer"]
    self.assertEqual(routed.expert.reshape(24, 2).tolist(), authors["experts"])
    close(routed.weight.reshape(24, 2), authors["weights"])


class OtherRoutersTest(parameterized.TestCase):
  def test_noisy(self):
    logits, noise = normal(101, 5, 4), normal(102, 5, 4)
    noisy, std = oracle.noisy_logits(logits, noise)
    exact(noisy, logits + noise / 4)
    exact(std, np.full((5, 4), 0.25))
    routed = oracle.noisy_top_k(logits, 2, noise, normal(103, 5, 4))
    same = oracle.top_k(
      logits + noise * np.log(1 + np.exp(normal(103, 5, 4))), 2
    )
    self.assertEqual(routed.expert.tolist(), same.expert.tolist())
    exact(routed.weight, same.weight)

  def test_expert_choice_by_hand(self):
    logits = np.log([[1.0, 3.0], [2.0, 2.0], [2.0, 2.0], [3.0, 1.0]])
    routed = oracle.expert_choice(logits, 2)
    self.assertEqual(routed.token.tolist(), [3, 1, 0, 1])
    self.assertEqual(routed.expert.tolist(), [0, 0, 1, 1])
    self.assertEqual(routed.rank.tolist(), [0, 1, 0, 1])
    exact(routed.weight, [0.75, 0.5, 0.75, 0.5])

  def test_expert_choice_with_few_tokens(self):
    logits = np.zeros((5, 2))
    logits[1] = np.nan
    logits[2, 0] = -INF
    routed = oracle.expert_choice(logits, 4, token_valid=[1, 1, 1, 1, 0])
    self.assertEqual(routed.valid.tolist(), [1, 1, 0, 0, 1, 1, 1, 0])
    self.assertEqual(routed.token[routed.valid].tolist(), [0, 3, 2, 0, 3])
    self.assertEqual(routed.metrics["nan_tokens"], 1)

  def test_mixture_of_depths(self):
    logits = np.array([1.0, 50.0, -2.0, 60.0, np.nan, -INF])
    routed = oracle.mixture_of_depths(logits, 3)
    self.assertEqual(routed.token.tolist(), [3, 1, 0])
    exact(routed.weight, oracle.sigmoid([60.0, 50.0, 1.0]))
    raw = oracle.mixture_of_depths(logits, 5, weight="identity")
    self.assertEqual(raw.valid.tolist(), [True] * 4 + [False])
    exact(raw.weight, [60.0, 50.0, 1.0, -2.0, 0.0])

  def test_top_p_by_hand(self):
    logits = np.log([[1.0, 5.0, 2.0, 2.0]])
    for p, experts in (
      (0.0, [1]),
      (0.5, [1]),
      (0.51, [1, 2]),
      (0.7, [1, 2]),
      (0.9, [1, 2, 3]),
      (0.91, [1, 2, 3, 0]),
      (1.0, [1, 2, 3, 0]),
    ):
      # log and exp blur the sums.
      got = oracle.top_p(logits, p - 1e-9 if p not in (0, 1) else p, 4)
      self.assertEqual(got.choices(), [experts], p)
    capped = oracle.top_p(logits, 1.0, 2, renormalize=True)
    self.assertEqual(capped.choices(), [[1, 2]])
    exact(capped.weight, [5 / 7, 2 / 7])

  @parameterized.parameters(1, 3, 7, 10, 24)
  def test_top_p_of_a_uniform_router(self, experts):
    for percent in range(0, 101):
      p = percent / 100
      got = oracle.top_p(np.full((1, experts), 0.3), p, experts)
      wanted = max(1, -(-percent * experts // 100))
      self.assertEqual(got.valid.sum(), wanted, p)

  def test_top_p_is_minimal(self):
    logits = 2 * normal(104, 20, 6)
    logits[3, 2] = -INF
    routed = oracle.top_p(logits, 0.8, 6)
    p = routed.metrics["probabilities"]
    for t, chosen in enumerate(routed.choices()):
      mass = {
        n: max(p[t, list(s)].sum() for s in itertools.combinations(range(6), n))
        for n in range(1, 7)
      }
      smallest = min(n for n in mass if mass[n] >= 0.8)
      self.assertLen(chosen, smallest)
      exact(p[t, chosen].sum(), mass[smallest])
    self.assertLen(oracle.top_p(logits, 1.0, 6).choices()[3], 5)
    one_hot = oracle.top_p(1e3 * np.eye(6), 0.99, 6)
    self.assertEqual(one_hot.choices(), [[e] for e in range(6)])

  def test_xmoe(self):
    routed = oracle.top_p(1.5 * normal(36, 10, 6), 0.7, 6)
    authors = RESULTS["xmoe"]
    close(routed.dense(), authors["weights"])
    self.assertAlmostEqual(routed.valid.sum() / 10, authors["want"], places=6)
    first = oracle.switch(1.5 * normal(36, 10, 6))
    p = first.metrics["probabilities"]
    close(oracle.load_balance(first, p), authors["aux"])

  def test_hash_and_modality(self):
    routed = oracle.hash_([2, 0, 3, 2], [1, 0, 2], 3)
    self.assertEqual(routed.choices(), [[2], [1], [], [2]])
    self.assertEqual(routed.weight.tolist(), [1.0, 1.0, 0.0, 1.0])
    routed = oracle.by_modality([1, -1, 2, 0], 2, token_valid=[1, 1, 1, 0])
    self.assertEqual(routed.choices(), [[1], [], [], []])

  def test_gumbel_threshold(self):
    logits = np.log([[6.0, 3.0, 1.0]])
    gumbel = np.log([[1.0, 1.0, 4.0]])  # 6, 3, 4 of 13
    routed = oracle.gumbel_threshold(logits, gumbel, 1.0, 0.25)
    self.assertEqual(routed.choices(), [[0, 2]])
    exact(routed.weight, [6 / 13, 4 / 13, 0.0])
    sharp = oracle.gumbel_threshold(logits, gumbel, 0.5, 0.3, renormalize=True)
    exact(sharp.weight, [1, 0, 0])
    even = oracle.gumbel_threshold(np.zeros((1, 4)), np.zeros((1, 4)), 1, 0.25)
    self.assertEqual(even.choices(), [[0]])
    # The best stays whatever the threshold; in the limit it is top-1.
    cold = oracle.gumbel_threshold(logits, 0 * gumbel, 1e-3, 2.0, 2)
    self.assertEqual(cold.choices(), [[0]])
    exact(cold.weight, [1, 0])

  def test_evomoe(self):
    authors = RESULTS["evomoe"]
    logits = 2.5 * normal(39, 10, 6)
    routed = oracle.gumbel_threshold(
      logits, np.array(authors["gumbel"]), 0.7, 0.001
    )
    close(routed.dense(), authors["noisy_weights"])
    chosen = routed.dense() > 0
    self.assertFalse(chosen.all())
    softmax = oracle.probabilities(logits)[0]
    close(chosen * softmax, authors["softmax_weights"])

  def test_relu_norm(self):
    gain = [1.0, 1.0, -2.0]
    routed = oracle.relu_norm(
      [[3.0, -1.0, 4.0], [-1.0, 0.0, -2.0]], gain, eps=0
    )
    self.assertEqual(routed.choices(), [[2, 0], []])
    rms = math.sqrt(25 / 3)
    exact(routed.weight[:2], [-8 / rms, 3 / rms])
    self.assertTrue(routed.metrics["counted"].all())
    capped = oracle.relu_norm([[3.0, -1.0, 4.0]], gain, 1, eps=0)
    exact(capped.weight, [-8 / rms])

  def test_blockffn(self):
    logits = normal(17, 16, 6)
    logits[3] = -abs(logits[3])
    authors = RESULTS["blockffn"]
    routed = oracle.relu_norm(logits, 1 + 0.3 * normal(18, 6))
    close(routed.dense(), authors["weights"])
    shares = oracle.gate_shares(logits, norm_eps=1e-6, eps=1e-5)
    chunks = np.arange(16) // 4
    loss = oracle.chunk_sparsity(shares, chunks, eps=1e-5)
    close(loss, authors["chunk"])
    counted = np.arange(16) < 14
    loss = oracle.chunk_sparsity(shares, chunks, counted=counted, eps=1e-5)
    close(loss, authors["chunk_masked"], atol=2e-5)
    exactly = oracle.chunk_sparsity(oracle.gate_shares(logits), chunks)
    np.testing.assert_allclose(exactly, authors["chunk"], atol=1e-4)
    segments = [0] * 9 + [1] * 7
    for steepness, expected in authors["locality"].items():
      loss = functools.partial(
        oracle.locality, steepness=float(steepness), segments=segments
      )
      close(loss(logits), expected["loss"])
      gradient = oracle.numerical_gradient(loss, logits, 1e-6)
      close(gradient, expected["gradient"], atol=1e-5)

  def test_locality_pairs(self):
    logits = normal(105, 6, 3)
    equal = np.tile(20 * np.sign(logits[:1]), (6, 1))
    self.assertLess(oracle.locality(equal), 1e-12)
    # Only the pairs (0, 1) and (4, 5) are left.
    got = oracle.locality(
      logits, segments=[0, 0, 0, 0, 1, 1], token_valid=[1, 1, 0, 1, 1, 1]
    )
    parts = [oracle.locality(logits[:2]), oracle.locality(logits[4:])]
    exact(got, sum(parts) / 2)
    self.assertEqual(oracle.locality(logits[:1]), 0.0)

  def test_chunk_sparsity_limits(self):
    one = np.tile([[0.0, 1.0, 0.0, 0.0]], (4, 1))
    self.assertEqual(oracle.chunk_sparsity(one, [0, 0, 1, 1]), 0.25)
    self.assertEqual(oracle.chunk_sparsity(np.eye(4), [0] * 4), 1.0)
    self.assertEqual(oracle.chunk_sparsity(np.eye(4), [0, 1, 2, 3]), 0.25)

  def test_gate_shares(self):
    logits = [[3.0, -1.0], [-1.0, 0.0], [1.0, 3.0]]
    shares = oracle.gate_shares(logits, token_valid=[1, 1, 0])
    exact(shares, [[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    # 3 / sqrt(4.5 + 4.5) = 1.
    shares = oracle.gate_shares(logits, norm_eps=4.5, eps=1.0)
    exact(shares[0], [0.5, 0.0])

  def test_soft(self):
    logits = normal(106, 5, 6)
    valid = np.array([1, 1, 0, 1, 1], bool)
    dispatch, combine = oracle.soft(logits, token_valid=valid)
    exact(dispatch.sum(0), np.ones(6))
    exact(combine.sum(1), valid)
    self.assertFalse(dispatch[2].any() or combine[2].any())
    x, params = normal(107, 5, 4), small_bank(108)
    x[2] = np.nan
    y = oracle.soft_mixture(x, logits, 3, oracle.ffn, params, token_valid=valid)
    slots = np.einsum("ts,td->sd", dispatch[valid], x[valid])
    hidden = [
      oracle.activate(slots[s] @ params["gate"][s // 2], "silu")
      * (slots[s] @ params["up"][s // 2])
      @ params["down"][s // 2]
      for s in range(6)
    ]
    exact(y, combine @ np.array(hidden))

  def test_soft_authors(self):
    x, mu = normal(52, 1, 6, 4)[0], normal(53, 4, 3, 2).reshape(4, 6)
    x = x / np.sqrt((x**2).sum(1, keepdims=True) + 1e-6)
    mu = mu / np.sqrt((mu**2).sum(0) + 1e-6)
    dispatch, combine = oracle.soft(2.0 * x @ mu)
    close(dispatch, RESULTS["vmoe"]["soft"]["dispatch"])
    close(combine, RESULTS["vmoe"]["soft"]["combine"])

  def test_per_chunk(self):
    logits = normal(109, 6, 2)
    logits[1, 0] = np.nan
    out = oracle.per_chunk(
      logits, [0, 0, 0, 2, 2, 7], 3, token_valid=[1, 1, 1, 0, 0, 1]
    )
    mean = (logits[0] + logits[2]) / 2
    exact(out[[0, 2]], [mean, mean])
    self.assertTrue(np.isnan(out[1]).any())
    self.assertEqual(out[3:5].tolist(), [[0, 0], [0, 0]])
    routed = oracle.top_k(out, 1)
    self.assertEqual(routed.valid.tolist(), [1, 0, 1, 1, 1, 0])


class LossesTest(parameterized.TestCase):
  def test_load_balance_is_one_at_uniform_load(self):
    logits = np.log(np.ones((6, 3)) + 1e-3 * np.eye(3)[[0, 1, 2, 0, 1, 2]])
    for k in (1, 2, 3):
      routed = oracle.top_k(logits, k)
      p = routed.metrics["probabilities"]
      exact(oracle.load_balance(routed, p), 1.0, rtol=1e-9)
    worst = oracle.switch(99 * np.eye(3)[[0] * 4])
    p = worst.metrics["probabilities"]
    exact(oracle.load_balance(worst, p), 3.0)

  def test_load_balance_of_sigmoid_scores(self):
    routed = oracle.top_k(np.ones((4, 4)), 4, scores="sigmoid")
    p = oracle.normalized(routed.metrics["probabilities"])
    exact(oracle.load_balance(routed, p), 1.0)

  def test_load_balance_where_the_number_of_edges_varies(self):
    routed = oracle.top_p(np.log([[8.0, 1, 1], [1, 1.0, 1]]), 0.7, 3)
    self.assertEqual(routed.counts().tolist(), [2, 1, 1])
    p = routed.metrics["probabilities"]
    mean = p.mean(0)
    expected = 3 * (0.5 * mean[0] + 0.25 * mean[1] + 0.25 * mean[2])
    exact(oracle.load_balance(routed, p), expected)

  def test_segments(self):
    logits = normal(110, 9, 4)
    routed = oracle.top_k(logits, 2)
    p = routed.metrics["probabilities"]
    parts = []
    for where in (slice(0, 4), slice(4, 9)):
      part = oracle.top_k(logits[where], 2)
      parts.append(oracle.load_balance(part, part.metrics["probabilities"]))
    got = oracle.load_balance(routed, p, segments=[3] * 4 + [1] * 5)
    exact(got, np.mean(parts))

  def test_switch_authors(self):
    authors = RESULTS["switch_router"]
    logits = normal(8, 2, 10, 4)
    losses = []
    for group, dispatch, weights in zip(
      logits, authors["dispatch"], authors["weights"]
    ):
      routed = oracle.switch(group)
      close(routed.weight, weights)
      kept = oracle.keep(routed, 3)
      got = np.zeros((10, 4), int)
      for edge, token, expert, _ in routed.edges():
        got[token, expert] = kept[edge]
      self.assertEqual(got.tolist(), dispatch)
      p = routed.metrics["probabilities"]
      losses.append(oracle.load_balance(routed, p))
    close(np.mean(losses), authors["loss"])
    close(oracle.z(logits.reshape(20, 4)), authors["z_loss"])

  def test_moduleformer(self):
    logits = normal(1, 24, 8)
    routed = oracle.top_k(logits, 2)
    p = routed.metrics["probabilities"]
    authors = RESULTS["moduleformer"]
    close(oracle.mutual_information(p), authors["mi_loss"])
    close(
      oracle.load_balance(routed, p) + 0.1 * oracle.z(logits),
      authors["switch_and_tenth_z"],
    )

  def test_moa(self):
    logits = normal(1, 24, 8)
    routed = oracle.top_k(logits, 2)
    authors = RESULTS["moa_losses"]
    p = routed.metrics["probabilities"]
    close(oracle.load_balance(routed, p), authors["switch"])
    close(oracle.z(logits), authors["z"])
    # Their variance is that of a sample.
    close(oracle.importance(routed.dense()) * 8 / 7, authors["cv"])

  def test_vmoe(self):
    clean = normal(50, 24, 8)
    clean[:, 2] += 1
    noisy, std = oracle.noisy_logits(clean, normal(51, 24, 8))
    authors = RESULTS["vmoe"]["losses"]
    close(
      oracle.importance(oracle.probabilities(clean)[0]), authors["importance"]
    )
    load = oracle.load(clean, noisy, std, 2, threshold="kth")
    close(load, authors["load"])
    first = oracle.switch(noisy)
    p = first.metrics["probabilities"]
    close(oracle.load_balance(first, p), authors["gshard"])
    # Through the clean logits and the threshold, some of the tokens.
    gradient = oracle.numerical_gradient(
      lambda some: oracle.load(
        np.concatenate([some, clean[3:]]),
        np.concatenate([some, clean[3:]]) + normal(51, 24, 8) / 8,
        std,
        2,
        threshold="kth",
      ),
      clean[:3],
    )
    close(gradient, authors["load_gradient"][:3])

  def test_stay_probability_is_a_frequency(self):
    rng = np.random.default_rng(111)
    clean = rng.standard_normal((1, 5))
    noisy, std = oracle.noisy_logits(
      clean, rng.standard_normal((1, 5)), rng.standard_normal((1, 5))
    )
    got = oracle.stay_probability(clean, noisy, std, 2)[0]
    for e in range(5):
      again = np.tile(noisy, (40000, 1))
      again[:, e] = clean[0, e] + rng.standard_normal(40000) * std[0, e]
      stays = (again > again[:, [e]]).sum(1) < 2
      self.assertLess(abs(stays.mean() - got[e]), 0.015)

  def test_stay_probability_limits(self):
    clean = normal(112, 3, 4)
    exact(oracle.stay_probability(clean, clean, 0.1, 4), np.ones((3, 4)))
    self.assertEqual(oracle.load(clean, clean, 0.1, 4), 0.0)
    clean[:, 1] = -INF
    stays = oracle.stay_probability(clean, clean, 1e-6, 2)
    exact(stays[:, 1], np.zeros(3))
    exact(stays.sum(1), np.full(3, 2.0))
    stays = oracle.stay_probability(clean, clean, 0.1, 4)
    exact(stays, np.tile([1.0, 0.0, 1.0, 1.0], (3, 1)))

  def test_importance(self):
    exact(oracle.importance([[1.0, 0.0], [2.0, 1.0]]), (1 / 2) ** 2)
    counted = [True, False]
    self.assertEqual(oracle.importance([[1, 1], [9, 0]], counted=counted), 0.0)
    self.assertEqual(oracle.importance(np.zeros((2, 2))), 0.0)

  def test_information(self):
    even = np.full((5, 4), 0.25)
    self.assertAlmostEqual(oracle.mutual_information(even), 0.0)
    exact(oracle.entropy(even), math.log(4))
    self.assertEqual(oracle.concentration(np.eye(4)[[2, 2]]), 0.0)
    exact(oracle.concentration(np.eye(4)), math.log(4))
    self.assertEqual(oracle.entropy(np.eye(4), counted=[0, 0, 1, 1]), 0.0)

  def test_bias_balances(self):
    logits = normal(113, 200, 6)
    logits[:, 0] += 2
    bias = np.zeros(6)
    worst = []
    for _ in range(40):
      routed = oracle.top_k(logits, 2, bias=bias)
      worst.append(routed.counts().max() / (200 * 2 / 6))
      error = oracle.load_error(routed)
      self.assertAlmostEqual(error.sum(), 0.0)
      bias = oracle.update_bias(bias, routed, 0.5, "proportional")
    self.assertGreater(worst[0], 2.0)
    self.assertLess(worst[-1], 1.1)

  def test_sign_of_the_error(self):
    routed = oracle.by_modality([0, 0, 1, 2, 2, 2, 2, 0, 1, 1], 4)
    self.assertEqual(routed.counts().tolist(), [3, 3, 4, 0])
    got = oracle.update_bias(np.zeros(4), routed, 0.1)
    exact(got, [-0.1, -0.1, -0.1, 0.1])
    even = oracle.by_modality([0, 1, 2, 2], 3, token_valid=[1, 1, 1, 0])
    self.assertEqual(
      oracle.update_bias(np.ones(3), even, 0.1).tolist(), [1] * 3
    )
    none = oracle.by_modality([5, 5], 3)
    self.assertEqual(oracle.load_error(none).tolist(), [0, 0, 0])


class DispatchTest(parameterized.TestCase):
  def test_by_hand(self):
    x = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    routed = oracle.top_k(
      np.log([[3.0, 1.0], [1.0, 1.0], [1.0, 3.0]]), 2, token_valid=[1, 1, 0]
    )
    y = oracle.dispatch(x, routed, doubling, None)
    exact(y, [[1.25, 2.5], [4.5, 6.0], [0.0, 0.0]])
    kept = oracle.keep(routed, 1)
    self.assertEqual(kept.tolist(), [1, 1, 0, 0, 0, 0])
    self.assertEqual(oracle.dropped(routed, kept), 0.5)
    y = oracle.dispatch(x, routed, doubling, None, kept)
    exact(y, [[1.25, 2.5], [0.0, 0.0], [0.0, 0.0]])

  def test_first_choices_come_first(self):
    # Token 0 has expert 1 second, token 2 has it first.
    logits = np.array([[2.0, 1.0], [2.0, 1.0], [1.0, 2.0]])
    routed = oracle.top_k(logits, 2)
    kept = oracle.keep(routed, 1)
    self.assertEqual(kept.tolist(), [1, 0, 0, 0, 1, 0])

  def test_priorities(self):
    logits = np.array([[1.0, 0.0], [3.0, 0.0], [2.0, 0.0], [3.0, 0.0]])
    routed = oracle.switch(logits)
    for priority, expected in (
      ("position", [1, 1, 0, 0]),
      ("weight", [0, 1, 0, 1]),
      ("random", [1, 0, 1, 0]),
    ):
      kept = oracle.keep(routed, 2, priority, uniform=[0.7, 0.2, 0.9, 0.3])
      self.assertEqual(kept.tolist(), expected)
    kept = oracle.keep(routed, 2, "random", uniform=[0.5] * 4)
    self.assertEqual(kept.tolist(), [1, 1, 0, 0])

  def test_padding_uses_no_capacity(self):
    routed = oracle.switch(np.zeros((4, 2)), token_valid=[0, 1, 0, 1])
    self.assertEqual(oracle.keep(routed, 2).tolist(), [0, 1, 0, 1])

  def test_expert_choice_keeps_the_best(self):
    routed = oracle.expert_choice(normal(114, 6, 2), 4)
    kept = oracle.keep(routed, 3)
    self.assertEqual(kept.tolist(), [1, 1, 1, 0] * 2)

  @parameterized.parameters("position", "weight")
  def test_vmoe(self, priority):
    clean = normal(50, 24, 8)
    clean[:, 2] += 1
    authors = RESULTS["vmoe"]
    routed = oracle.noisy_top_k(clean, 2, normal(51, 24, 8))
    self.assertEqual(routed.expert.reshape(24, 2).tolist(), authors["experts"])
    close(routed.weight.reshape(24, 2), authors["weights"])
    kept = oracle.keep(routed, 4, priority)
    got = np.zeros((24, 8), int)
    for edge, token, expert, _ in routed.edges():
      got[token, expert] = kept[edge]
    self.assertEqual(got.tolist(), authors["kept_" + priority])
    self.assertGreater(oracle.dropped(routed, kept), 0.3)

  def test_vmoe_expert_choice(self):
    clean = normal(50, 24, 8)
    clean[:, 2] += 1
    noisy, _ = oracle.noisy_logits(clean, normal(51, 24, 8))
    routed = oracle.expert_choice(noisy, 5)
    expected = RESULTS["vmoe"]["expert_choice"]
    self.assertEqual(routed.token.reshape(8, 5).tolist(), expected)

  def test_random_token_selection(self):
    logits = normal(38, 12, 4)
    logits[:, 1] += 1
    authors = RESULTS["deepspeed_random"]
    routed = oracle.switch(logits)
    self.assertEqual(routed.expert.tolist(), authors["experts"])
    numbers = uniform(37, 12, 4)[np.arange(12), routed.expert]
    kept = oracle.keep(routed, 3, "random", numbers)
    self.assertEqual(kept.astype(int).tolist(), authors["kept"])
    p = routed.metrics["probabilities"]
    close(oracle.load_balance(routed, p), authors["aux"])

  def test_capacities(self):
    for tokens, experts, factor, how, expected, multiple in RESULTS["vmoe"][
      "capacities"
    ]:
      got = oracle.capacity_of(
        tokens, experts, factor, rounding=how, multiple_of=multiple or 1
      )
      self.assertEqual(got, expected)
    self.assertEqual(oracle.capacity_of(10, 4, 1.5, 2), 8)

  @parameterized.product(
    gated=(False, True), activation=("relu", "gelu", "silu")
  )
  def test_equal_to_one_hot_einsum(self, gated, activation):
    x, logits, params = normal(115, 7, 4), normal(116, 7, 3), small_bank(117)
    if not gated:
      del params["gate"]
    bank = functools.partial(oracle.ffn, activation=activation)
    routed = oracle.top_k(logits, 2)
    kept = oracle.keep(routed, 3)
    y = oracle.dispatch(x, routed, bank, params, kept)
    masked = oracle.Assignment(**{**vars(routed), "valid": routed.valid & kept})
    hidden = np.einsum("td,edh->teh", x, params["up"])
    if gated:
      gate = np.einsum("td,edh->teh", x, params["gate"])
      hidden = oracle.activate(gate, activation) * hidden
    else:
      hidden = oracle.activate(hidden, activation)
    outputs = np.einsum("teh,ehd->ted", hidden, params["down"])
    exact(y, np.einsum("te,ted->td", masked.dense(), outputs))

  def test_bank_rows(self):
    rows, params = normal(118, 6, 4), small_bank(119)
    out = oracle.bank_rows(oracle.ffn, params, rows, [2, 0, 3])
    exact(out[4], oracle.ffn(params, 2, rows[4]))
    exact(out[1], oracle.ffn(params, 0, rows[1]))
    self.assertFalse(out[5].any())

  def test_nan_stays_where_it_is_not_read(self):
    x = normal(120, 3, 4)
    x[1] = np.nan
    routed = oracle.switch(normal(121, 3, 3), token_valid=[1, 0, 1])
    y = oracle.dispatch(x, routed, oracle.ffn, small_bank(122))
    self.assertTrue(np.isfinite(y).all())

  def test_mixtral_block(self):
    authors = RESULTS["mixtral_block"]
    gate_up = normal(3, 5, 8, 6).transpose(0, 2, 1)
    arrays = {
      "x": normal(5, 9, 6),
      "router": normal(2, 5, 6),
      "down": normal(4, 5, 6, 4).transpose(0, 2, 1),
    }

    def route(a, like):
      logits = a["x"] @ a["router"].T
      return oracle.top_k(logits, 2, renormalize=True, like=like)

    def layer(a, assignment, kept):
      params = {
        "gate": gate_up[..., :4],
        "up": gate_up[..., 4:],
        "down": a["down"],
      }
      return oracle.dispatch(a["x"], assignment, oracle.ffn, params, kept)

    y, gradients = oracle.layer_gradients(route, layer, arrays)
    tolerant = functools.partial(close, rtol=1e-4, atol=1e-3)
    close(y, authors["y"], atol=1e-5)
    tolerant(gradients["x"], authors["dx"])
    tolerant(gradients["router"], authors["drouter"])
    tolerant(gradients["down"][0].T, authors["ddown"])

  def test_reap(self):
    outputs, logits = normal(40, 5, 12, 3), normal(41, 12, 5)
    logits[:, 4] -= 9

    def bank(params, expert, row):
      return params[expert, int(row[0])]

    index = np.arange(12.0)[:, None]
    for name, renormalize in (("plain", False), ("renormalized", True)):
      routed = oracle.top_k(logits, 2, renormalize=renormalize)
      got = oracle.reap(index, routed, bank, outputs)
      close(got, RESULTS["reap"][name])
      self.assertEqual(got[4], 0.0)


class AttentionTest(parameterized.TestCase):
  def jetmoe(self):
    kv = normal(12, 8, 6)
    params = {
      "query": normal(9, 4, 4, 6).transpose(0, 2, 1),
      "output": normal(10, 4, 6, 4).transpose(0, 2, 1),
      "key": kv[:4].T,
      "value": kv[4:].T,
    }
    return normal(13, 7, 6), normal(11, 4, 6).T, params

  def test_jetmoe(self):
    x, router, params = self.jetmoe()
    routed = oracle.top_k(x @ router, 2, renormalize=True)
    y = oracle.attention_experts(x, routed, params)
    close(y, RESULTS["jetmoe_attention"]["y"], atol=1e-5)
    y = oracle.attention_experts(x, routed, params, causal=False)
    close(y, RESULTS["jetmoe_attention"]["y_whole"], atol=1e-5)

  def test_all_heads_are_multi_head_attention(self):
    x, _, params = self.jetmoe()
    routed = oracle.top_k(np.zeros((7, 4)), 4)
    y = oracle.attention_experts(x, routed, params, causal=False)
    q = np.einsum("td,edh->eth", x, params["query"])
    logits = np.einsum("eth,sh->ets", q, x @ params["key"]) / 2
    a = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    heads = np.einsum("ets,sh->eth", a, x @ params["value"])
    exact(y, np.einsum("eth,ehd->td", heads, params["output"]) / 4)

  def test_invalid_keys(self):
    x, router, params = self.jetmoe()
    x[0] = np.nan
    valid = np.arange(7) > 0
    routed = oracle.top_k(x @ router, 2, token_valid=valid)
    y = oracle.attention_experts(x, routed, params, token_valid=valid)
    rest = oracle.top_k(x[1:] @ router, 2)
    exact(y[1:], oracle.attention_experts(x[1:], rest, params))
    self.assertFalse(y[0].any())
    nothing = oracle.attention_experts(
      x, oracle.top_k(np.zeros((7, 4)), 2), params, token_valid=np.zeros(7)
    )
    self.assertFalse(nothing.any())

  def test_stick_breaking(self):
    authors = RESULTS["moduleformer"]
    q, k, v = normal(14, 6, 3), normal(15, 6, 3), normal(16, 6, 3)
    logits = q @ k.T / math.sqrt(3)
    for i in range(6):
      weights = oracle.stick_breaking(logits[i, : i + 1])
      close(weights, authors["attention"][i][: i + 1])
      close(weights @ v[: i + 1], authors["y"][i])
      left = np.prod(1 - oracle.sigmoid(logits[i, : i + 1]))
      exact(weights.sum(), 1 - left)

  def test_stick_breaking_experts(self):
    x, router, params = self.jetmoe()
    routed = oracle.switch(x @ router)
    y = oracle.attention_experts(x, routed, params, kind="stick_breaking")
    e = routed.expert[0]
    logit = x[0] @ params["query"][e] @ (x[0] @ params["key"]) / 2
    first = oracle.sigmoid(logit) * (x[0] @ params["value"])
    exact(y[0], routed.weight[0] * first @ params["output"][e])

  def test_unselected_experts_have_no_gradient(self):
    x, router, params = self.jetmoe()
    x = x[:2]
    route = lambda a, like: oracle.top_k(a["x"] @ router, 1, like=like)
    layer = lambda a, routed, kept: oracle.attention_experts(
      a["x"], routed, {**params, "output": a["output"]}, kept
    )
    arrays = {"x": x, "output": params["output"]}
    _, gradients = oracle.layer_gradients(route, layer, arrays)
    used = oracle.switch(x @ router).counts() > 0
    self.assertFalse(gradients["output"][~used].any())
    self.assertTrue(gradients["output"][used].any())


class OtherBanksTest(parameterized.TestCase):
  def test_stem(self):
    x = normal(123, 3, 4)
    params = {
      "gate": normal(124, 4, 5),
      "table": normal(125, 6, 5),
      "down": normal(126, 5, 4),
    }
    y = oracle.stem(x, [2, 6, 0], params)
    gate = x @ params["gate"]
    hidden = gate / (1 + np.exp(-gate)) * params["table"][[2, 0, 0]]
    exact(y[[0, 2]], (hidden @ params["down"])[[0, 2]])
    self.assertFalse(y[1].any())

  def monet(self):
    """x, both gates, and the parameters of both kinds."""
    x = normal(21, 5, 4)
    gates = [
      oracle.monet_gates((x @ normal(seed, 8, 4).T).reshape(5, 2, 4), 1)
      for seed in (19, 20)
    ]
    columns = lambda seed, m: normal(seed, 4 * m, 4).reshape(4, m, 4)
    rows = lambda seed, d, m: normal(seed, d, 4 * m).reshape(d, 4, m)
    horizontal = {
      "up": columns(22, 6).transpose(0, 2, 1),
      "up_bias": normal(23, 24).reshape(4, 6),
      "down": rows(24, 4, 6).transpose(1, 2, 0),
      "bias": normal(25, 4, 4),
    }
    vertical = {
      "up1": columns(26, 3).transpose(0, 2, 1),
      "up_bias1": normal(27, 12).reshape(4, 3),
      "up2": columns(28, 3).transpose(0, 2, 1),
      "up_bias2": normal(29, 12).reshape(4, 3),
      "bias1": normal(34, 4, 2),
      "bias2": normal(35, 4, 2),
    }
    for i, name in enumerate(("down11", "down12", "down21", "down22")):
      vertical[name] = rows(30 + i, 2, 3).transpose(1, 2, 0)
    return x, gates, horizontal, vertical

  def test_monet_authors(self):
    x, (g1, g2), horizontal, vertical = self.monet()
    authors = RESULTS["monet"]
    close(g1, authors["g1"])
    close(g2, authors["g2"])
    for name, expert, params in (
      ("horizontal", oracle.monet_horizontal, horizontal),
      ("vertical", oracle.monet_vertical, vertical),
    ):
      y = oracle.monet(x, g1, g2, expert, params)
      np.testing.assert_allclose(y, authors[name], rtol=1e-5, atol=1e-4)
      part = oracle.monet(x, g1, g2, expert, params, removed=[(1, 2)])
      gate = (g1[:, :, 1] * g2[:, :, 2]).sum(1)
      alone = [expert(params, 1, 2, row) for row in x]
      exact(y - part, gate[:, None] * alone, atol=1e-10)

  def test_monet_gates(self):
    scores = normal(127, 400, 2, 8)
    gates = oracle.monet_gates(scores, 2)
    exact(gates.sum(-1), np.ones((400, 2)))
    self.assertLess(abs((gates > 0).mean() - 2 / 8), 0.03)
    exact(oracle.monet_gates(scores, 8)[0, 0], oracle.softmax(scores[0, 0]))
    # A threshold that nothing reaches leaves the best.
    strict = oracle.monet_gates(scores, 2, mean=[99, 99], variance=[1, 1])
    exact(strict, scores == scores.max(-1, keepdims=True))
    scores[7] = np.nan
    gates = oracle.monet_gates(scores, 2)
    self.assertFalse(gates[7].any())
    self.assertTrue(np.isfinite(gates).all())


class GradientsTest(parameterized.TestCase):
  def test_softmax_and_sigmoid(self):
    logits, ct = normal(128, 4), normal(129, 4)
    for forward, backward in (
      (oracle.softmax, oracle.softmax_gradient),
      (oracle.sigmoid, oracle.sigmoid_gradient),
    ):
      numerical = oracle.numerical_gradient(
        lambda a, forward=forward: forward(a) @ ct, logits
      )
      near(backward(forward(logits), ct), numerical)

  def test_renormalize(self):
    weights, ct = uniform(130, 4), normal(131, 4)
    numerical = oracle.numerical_gradient(lambda w: w @ ct / w.sum(), weights)
    near(oracle.renormalize_gradient(weights, ct), numerical)
    self.assertEqual(oracle.renormalize_gradient([0.0], [1.0]).tolist(), [0.0])

  def test_losses(self):
    logits = normal(132, 5, 3)
    valid = np.array([1, 1, 0, 1, 1], bool)
    fixed = oracle.top_k(logits, 2, token_valid=valid)
    p = fixed.metrics["probabilities"]
    numerical = oracle.numerical_gradient(
      lambda a: oracle.load_balance(fixed, a), p
    )
    near(oracle.load_balance_gradient(fixed, p), numerical)
    numerical = oracle.numerical_gradient(
      lambda a: oracle.z(a, token_valid=valid), logits
    )
    near(oracle.z_gradient(logits, token_valid=valid), numerical)

  @parameterized.parameters(
    "top_k",
    "renormalized",
    "sigmoid",
    "noisy",
    "expert_choice",
    "depths",
    "top_p",
    "gumbel",
    "relu",
  )
  def test_choice_is_repeated(self, name):
    logits, noise = normal(133, 6, 4), normal(134, 6, 4)
    routers = {
      "top_k": lambda a, like: oracle.top_k(a, 2, like=like),
      "renormalized": lambda a, like: oracle.top_k(
        a, 2, renormalize=True, scale=2.0, bias=[0.3, 0, 0, 0], like=like
      ),
      "sigmoid": lambda a, like: oracle.top_k(
        a, 2, scores="sigmoid", groups=(2, 1), like=like
      ),
      "noisy": lambda a, like: oracle.noisy_top_k(a, 2, noise, like=like),
      "expert_choice": lambda a, like: oracle.expert_choice(a, 2, like=like),
      "depths": lambda a, like: oracle.mixture_of_depths(a[:, 0], 3, like=like),
      "top_p": lambda a, like: oracle.top_p(
        a, 0.7, 3, renormalize=True, like=like
      ),
      "gumbel": lambda a, like: oracle.gumbel_threshold(
        a, noise, 0.7, 0.1, like=like
      ),
      "relu": lambda a, like: oracle.relu_norm(a, np.ones(4), 3, like=like),
    }
    route = routers[name]
    first = route(logits, None)
    again = route(logits, first)
    for field in ("token", "expert", "weight", "valid", "rank"):
      np.testing.assert_array_equal(
        getattr(first, field), getattr(again, field)
      )
    # Other logits would choose otherwise, and do not.
    moved = route(np.abs(logits[::-1]) + 0.1, first)
    np.testing.assert_array_equal(moved.valid, first.valid)
    np.testing.assert_array_equal(
      moved.expert[moved.valid], first.expert[first.valid]
    )

  def test_layer_by_the_chain_rule(self):
    x, logits, params = normal(135, 5, 4), normal(136, 5, 3), small_bank(137)
    route = lambda a, like: oracle.top_k(
      a["logits"], 2, renormalize=True, like=like
    )
    layer = lambda a, routed, kept: oracle.dispatch(
      a["x"], routed, oracle.ffn, {**params, "down": a["down"]}, kept
    )
    arrays = {"logits": logits, "x": x, "down": params["down"]}
    y, gradients = oracle.layer_gradients(
      route, layer, arrays, capacity=2, priority="weight"
    )
    fixed = route(arrays, None)
    kept = oracle.keep(fixed, 2, "weight")
    self.assertLess(kept.sum(), 10)
    by_weight = oracle.weight_gradient(
      x, fixed, oracle.ffn, params, 2 * y, kept
    )
    p = fixed.metrics["probabilities"]
    dp = np.zeros((5, 3))
    for t in range(5):
      edges = [2 * t, 2 * t + 1]
      experts = fixed.expert[edges]
      dp[t, experts] = oracle.renormalize_gradient(
        p[t, experts], by_weight[edges]
      )
    near(gradients["logits"], oracle.softmax_gradient(p, dp))
    down = np.zeros_like(params["down"])
    for edge, token, e, weight in fixed.edges():
      if kept[edge]:
        gate = oracle.activate(x[token] @ params["gate"][e], "silu")
        hidden = gate * (x[token] @ params["up"][e])
        down[e] += weight * np.outer(hidden, 2 * y[token])
    near(gradients["down"], down)
    lost = [t for t in range(5) if not kept[[2 * t, 2 * t + 1]].any()]
    self.assertFalse(gradients["x"][lost].any())


class AuthorsTest(parameterized.TestCase):
  def test_inputs_are_the_same(self):
    self.assertAlmostEqual(
      normal(1, 24, 8).sum(), AUTHORS["sums"]["normal"], places=5
    )
    self.assertAlmostEqual(
      uniform(37, 12, 4).sum(), AUTHORS["sums"]["uniform"], places=5
    )
