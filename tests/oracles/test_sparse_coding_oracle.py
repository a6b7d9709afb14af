"""The oracle of sparse autoencoders: by hand, by identities, by packages.

data/sparse_coding_authors.json has what SAELens 6.54.12, sparsify 1.3.3 and
dictionary_learning 0.1.0 give, with the weights. Where they differ from ours:

SAELens
- `apply_b_dec_to_input` (False for transcoders, and in Gemma Scope's files)
  says whether the encoder sees x - b or x. Without it, our encoder bias is
  theirs plus E b.
- `rescale_acts_by_decoder_norm` (TopK's and BatchTopK's default in training):
  scores and values are pre times the atom's length, and decoding divides by
  it. The same reconstruction as norm-aware scores with plain values; z is
  theirs over the length. A file saved for inference has it folded in, so that
  its atoms have length one, though its cfg.json still says True.
- The auxiliary loss is a plain squared error, not over the residual's
  variance, and the values of dead latents are pre, also where it is negative.
- Gated: the auxiliary loss trains the decoder and its bias too. No b_enc: the
  gate's bias is b_gate.
- JumpReLU: the parameter is theta, not its logarithm; a trained one puts a
  relu first, so that a negative theta acts as 0. "quadratic" is
  2 (l0 - target)^2 / target, a row at a time.
- BatchTopK: int(k * n), as ours; the threshold starts from 0 and not from the
  first batch. Saved as JumpReLU with the threshold in every latent.
- Matryoshka: `mse_loss` is the full width's; `loss` is the sum of all.
- Matching pursuit: negative correlations are 0 instead of taken; stops at
  `residual_threshold` (1e-2) or when the support stays as it was; without
  apply_b_dec_to_input the decoder leaves b out as well.
- `normalize_activations`: "layer_norm" takes the mean from a row and divides by
  its deviation (d - 1 in the denominator, plus 1e-5), "constant_norm_rescale"
  makes its length sqrt(d); both are undone at the end.
  "expected_average_only_in" is a factor that is folded in when it is loaded.
  A transcoder's skip and output know nothing of it.
- `reshape_activations` "hook_z" joins heads: [..., h, d_head] is one row.

sparsify
- x - b before the encoder, but not with `transcode`; there k, the target and a
  skip (x S^T, [d_out, d_in]) are as in ours.
- values are max(pre, 0); one that is 0 is kept and, their backward knowing no
  relu, gets a gradient all the same.
- The auxiliary loss is over the variance of the target, not of the residual,
  and trains the decoder alone: no gradient reaches the encoder.
- groupmax: the largest of each of k neighboring groups.
- With multi_topk the codes and the output returned are those of 4 k; fvu is
  that of k.

dictionary_learning
- Its l1 has no lengths of atoms (they are kept at one).
- The auxiliary loss is ours without the factor n_dead / k_aux.
- JumpReLU does not take b from x, its step's pseudo-derivative looks at
  z and not at pre, and its penalty is (l0 / target - 1)^2.
- TopK's threshold follows the mean over rows of the smallest positive value;
  BatchTopK's counts a batch without a positive value as 0.
- Matryoshka: the sum over levels divided by their number twice, once as
  weights and once as a mean. The threshold's rate is 0.001.
"""

import json
import pathlib

from absl.testing import parameterized
import numpy as np
import pytest

from tests.oracles import sparse_coding as oracle

HERE = pathlib.Path(__file__).parent
FILES = HERE.parent / "sparse_coding/data"
AUTHORS = json.loads((HERE / "data/sparse_coding_authors.json").read_text())
ARRAYS = {k: np.array(v) for k, v in AUTHORS["arrays"].items()}
exact = lambda got, want: np.testing.assert_allclose(got, want, atol=1e-12)
# Their float32 on sums of a few dozen products, and seven digits.
close = lambda got, want: np.testing.assert_allclose(
  got, want, rtol=1e-5, atol=1e-5
)


def normal(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape)


def autoencoder(seed=0, n=7, d=4, m=9):
  """(x, weights) with unit-length atoms."""
  dictionary = normal(seed + 1, m, d)
  dictionary /= oracle.norms(dictionary)[:, None]
  weights = {
    "encoder": normal(seed + 2, m, d),
    "encoder_bias": normal(seed + 3, m),
    "dictionary": dictionary,
    "bias": normal(seed + 4, d),
  }
  return normal(seed, n, d), weights


def cases(*classes):
  """A test for each case of these classes."""
  chosen = [c for c in AUTHORS["cases"] if c["class"] in classes]
  assert {c["class"] for c in chosen} == set(classes)
  return parameterized.parameters(*[(c,) for c in chosen])


def weights_of(case):
  """The arrays of a case under the names of `forward`."""
  weights = {**ARRAYS}
  for name, other in case["weights"].items():
    weights[name] = ARRAYS[other]
  if "skip" not in case["weights"] and not case["settings"].get(
    "skip_connection"
  ):
    weights.pop("skip")
  return weights


class SparsifierTest(parameterized.TestCase):
  def test_top_k_is_a_stable_sort(self):
    pre = np.random.default_rng(0).integers(-3, 4, (20, 7)).astype(float)
    order = np.argsort(-pre, axis=1, kind="stable")
    for k in range(9):
      want = np.zeros_like(pre)
      chosen = order[:, :k]
      np.put_along_axis(
        want, chosen, np.take_along_axis(pre, chosen, axis=1), axis=1
      )
      exact(oracle.top_k(pre, k), np.maximum(want, 0))
    exact(oracle.top_k(pre, 7), oracle.relu(pre))
    exact(oracle.top_k(pre, 0), 0)

  def test_scores_choose_and_values_stay(self):
    pre = np.array([[3.0, 2.0, 1.0]])
    exact(oracle.top_k(pre, 1, scores=[[0.0, 5.0, 5.0]]), [[0, 2, 0]])
    # A negative value may win and is then 0.
    exact(oracle.top_k(-pre, 1, scores=[[0.0, 5.0, 1.0]]), 0)

  def test_norms_undo_a_rescaling(self):
    x, weights = autoencoder()
    scale = np.exp(2 * normal(10, 9))
    other = {
      **weights,
      "encoder": weights["encoder"] * scale[:, None],
      "encoder_bias": weights["encoder_bias"] * scale,
      "dictionary": weights["dictionary"] / scale[:, None],
    }
    want = oracle.forward("norm_top_k", weights, x, k=1)
    got = oracle.forward("norm_top_k", other, x, k=1)
    exact(got["x_hat"], want["x_hat"])
    exact(got["z"], want["z"] * scale)
    plain = oracle.forward("top_k", weights, x, k=1)
    exact(want["x_hat"], plain["x_hat"])
    misled = oracle.forward("top_k", other, x, k=1)
    self.assertGreater(np.abs(misled["x_hat"] - plain["x_hat"]).max(), 0.1)

  def test_gradient_scores(self):
    pre, dictionary, pull = normal(0, 5, 8), normal(1, 8, 3), normal(2, 5, 3)
    exact(oracle.gradient_scores(pre, dictionary, pull, 0.0), oracle.relu(pre))
    along = np.abs(pull @ dictionary.T)
    exact(
      oracle.gradient_scores(pre, dictionary, pull, 0.5),
      oracle.relu(pre) * (1 + 0.5 * along),
    )
    scores = oracle.gradient_scores(
      [[1.0, 0.5]], np.eye(2), np.array([[0.0, -2.0]]), 1.0
    )
    exact(scores, [[1.0, 1.5]])
    exact(oracle.top_k([[1.0, 0.5]], 1, scores), [[0, 0.5]])

  def test_a_batch_shares_its_budget(self):
    pre = normal(3, 6, 10)
    for k in (0.5, 1, 2.7, 3.3):
      z = oracle.batch_top_k(pre, k)
      total = int(k * 6)
      self.assertEqual((z > 0).sum(), total)
      exact(z, np.where(pre >= np.sort(pre.ravel())[-total], pre, 0))
    exact(oracle.batch_top_k(pre, 10), oracle.relu(pre))
    exact(oracle.mutual_choice(pre, 0), 0)
    # One row is TopK.
    exact(oracle.batch_top_k(pre[:1], 3), oracle.top_k(pre[:1], 3))

  def test_threshold(self):
    pre = normal(4, 6, 10)
    z = oracle.batch_top_k(pre, 2)
    t = oracle.running_threshold(None, z)
    self.assertEqual(t, z[z > 0].min())
    # Strictly above: the smallest one itself is lost.
    self.assertEqual((oracle.at_threshold(pre, t) > 0).sum(), 11)
    want = t
    for scale in (0.5, 2.0, 3.0):
      t = oracle.running_threshold(t, scale * z, 0.25)
      want += 0.25 * (scale * z[z > 0].min() - want)
    exact(t, want)
    self.assertIsNone(oracle.running_threshold(None, np.zeros((2, 3))))

  def test_feature_choice(self):
    pre = np.random.default_rng(5).integers(-2, 3, (8, 5)).astype(float)
    counts = [0, 1, 3, 8, 2]
    want = oracle.relu(pre)
    for j, c in enumerate(counts):
      want[np.argsort(-want[:, j], kind="stable")[c:], j] = 0
    exact(oracle.feature_choice(pre, counts), want)
    positive = 1 + pre**2
    got = (oracle.feature_choice(positive, counts) > 0).sum(axis=0)
    self.assertEqual(got.tolist(), counts)

  def test_zipf(self):
    rng = np.random.default_rng(6)
    for _ in range(40):
      m, most = int(rng.integers(1, 12)), int(rng.integers(1, 30))
      total = int(rng.integers(0, 200))
      given = {
        "exponent": float(rng.choice([0.0, 0.7, 1.0, 2.3])),
        "offset": float(rng.choice([0.0, 0.5, 3.0])),
        "most": most,
      }
      counts = oracle.zipf_counts(total, m, **given)
      shares = [float(s) for s in oracle.zipf_shares(total, m, **given)]
      self.assertEqual(sum(counts), min(total, m * most))
      self.assertLessEqual(max(counts), most)
      self.assertEqual(counts, sorted(counts, reverse=True))
      self.assertLess(np.abs(np.subtract(counts, shares)).max(), 1)
      # Water-filling: one level makes all the shares.
      i = np.arange(1, m + 1)
      weight = (i + given["offset"]) ** -given["exponent"]
      low, high = 0.0, 1e9
      for _ in range(200):
        level = (low + high) / 2
        filled = np.minimum(most, level * weight).sum()
        low, high = (level, high) if filled < sum(shares) else (low, level)
      np.testing.assert_allclose(
        shares, np.minimum(most, level * weight), rtol=1e-9, atol=1e-9
      )

  def test_zipf_by_hand(self):
    zipf = lambda *given, most: oracle.zipf_counts(
      *given, exponent=1, offset=0, most=most
    )
    self.assertEqual(zipf(25, 4, most=99), [12, 6, 4, 3])
    # 17 are left for 6 : 4 : 3, which is 7.85, 5.23 and 3.92.
    self.assertEqual(zipf(25, 4, most=8), [8, 8, 5, 4])
    # 17 - 7 = 10 for 4 : 3 after a second one is full: 5.71 and 4.29.
    self.assertEqual(zipf(24, 4, most=7), [7, 7, 6, 4])
    # Halves: the lower one gets it.
    self.assertEqual(
      oracle.zipf_counts(3, 2, exponent=0, offset=0, most=9), [2, 1]
    )

  def test_pseudo_derivatives_are_those_of_the_mean(self):
    # With pre spread evenly over the kernel's width around theta = 0.8 the
    # mean of the pseudo-derivative is that of the true mean.
    theta, width, n = np.array([0.8]), 0.5, 10_000
    spread = (np.arange(n) + 0.5) / n * 4 - 1  # density 1/4 on (-1, 3)
    pre, pull = spread[:, None], np.full((n, 1), 1 / n)
    to_pre, to_theta = oracle.step_gradient(pre, theta, width, pull)
    exact(to_pre, 0)
    mean_l0 = lambda t: (3 - t) / 4
    slope = (mean_l0(0.9) - mean_l0(0.7)) / 0.2
    np.testing.assert_allclose(to_theta, slope, atol=2e-3)
    to_pre, to_theta = oracle.jump_relu_gradient(pre, theta, width, pull)
    exact(to_pre, (pre > theta) / n)
    mean_z = lambda t: (9 - t**2) / 8
    slope = (mean_z(0.801) - mean_z(0.799)) / 0.002
    np.testing.assert_allclose(to_theta, slope, atol=2e-3)

  def test_edges_of_the_jump(self):
    theta = np.array([1.0, 1.0, 1.0, 1.0, -2.0])
    pre = np.array([[1.0, 1.25, 1.2, 0.8, -1.0]])
    exact(oracle.jump_relu(pre, theta), [[0, 1.25, 1.2, 0, -1.0]])
    exact(oracle.step(pre, theta), [[0, 1, 1, 0, 1]])
    ones = np.ones((1, 5))
    # Half the width away is outside, theta itself inside.
    to_theta = oracle.step_gradient(pre, theta, 0.5, ones)[1]
    exact(to_theta, [-2, 0, -2, -2, 0])
    to_theta = oracle.jump_relu_gradient(pre, theta, 4.0, 3 * ones)[1]
    exact(to_theta, [-0.75, -0.75, -0.75, -0.75, 1.5])
    self.assertEqual(oracle.l0_loss(pre, theta), 3.0)

  def test_gated(self):
    pre, bias = normal(0, 5, 6), normal(1, 6)
    zero = np.zeros(6)
    exact(oracle.gated(pre, bias, zero, bias), oracle.relu(pre))
    exact(oracle.gated(pre, zero, zero + np.log(3), zero), 3 * oracle.relu(pre))
    # An open gate with no magnitude, and a magnitude behind a closed one.
    exact(oracle.gated([[1.0, -1.0]], [0, 0], [0, 0], [-2.0, 5.0]), [[0, 0]])


class EncoderTest(parameterized.TestCase):
  def test_matching_pursuit(self):
    x, weights = autoencoder()
    dictionary, bias = weights["dictionary"], weights["bias"]
    last = np.inf
    for k in range(5):
      z, chosen, residual = oracle.matching_pursuit(x, dictionary, bias, k)
      exact(z @ dictionary + residual + bias, x)
      self.assertLessEqual((residual**2).sum(), last)
      last = (residual**2).sum()
      if k:
        exact((residual * dictionary[chosen[:, -1]]).sum(axis=1), 0)
      self.assertLessEqual((z != 0).sum(axis=1).max(), k)

  def test_matching_pursuit_by_hand(self):
    z, chosen, residual = oracle.matching_pursuit(
      np.array([[3.0, 1.0, -2.0]]), np.eye(3), np.zeros(3), 3
    )
    # The largest, not the largest in magnitude: 0 comes before -2.
    self.assertEqual(chosen.tolist(), [[0, 1, 0]])
    exact(z, [[3, 1, 0]])
    exact(residual, [[0, 0, -2]])
    z, chosen, _ = oracle.matching_pursuit(
      np.array([[-2.0, -1.0]]), np.eye(2), np.zeros(2), 1
    )
    self.assertEqual((chosen.item(), z.tolist()), (1, [[0, -1]]))
    # An atom comes again: 120 degrees apart, each brings back the other.
    atoms = np.array([[1.0, 0.0], [-0.5, np.sqrt(0.75)]])
    x = np.array([[0.5, np.sqrt(0.75) - 0.01]])
    z, chosen, _ = oracle.matching_pursuit(x, atoms, np.zeros(2), 4)
    self.assertEqual(chosen.tolist(), [[0, 1, 0, 1]])
    self.assertEqual((z > 0).tolist(), [[True, True]])

  def test_ista(self):
    x, weights = autoencoder()
    dictionary = weights["dictionary"]
    exact(oracle.ista(x, dictionary, 0.3, 0), 0)
    exact(
      oracle.ista(x, dictionary, 0.3, 1, step_size=0.5),
      np.maximum(0.5 * (x @ dictionary.T - 0.3), 0),
    )
    z = oracle.ista(x, dictionary, 0.3, 20_000)
    # Optimal: the slope of the error is -weight where active, above elsewhere.
    slope = (z @ dictionary - x) @ dictionary.T
    np.testing.assert_allclose(slope[z > 0], -0.3, atol=1e-9)
    self.assertGreater(slope[z == 0].min(), -0.3 - 1e-9)
    # A step of 1 / L never goes up.
    codes = [oracle.ista(x, dictionary, 0.3, steps) for steps in range(20)]
    values = [
      oracle.squared_error(x, z @ dictionary) / 2 + 0.3 * z.sum() / len(x)
      for z in codes
    ]
    self.assertLess(np.diff(values).max(), 0)
    # Orthonormal atoms: one step of length 1 is the solution.
    exact(oracle.ista(x, np.eye(4), 0.3, 1, 1.0), np.maximum(x - 0.3, 0))

  @parameterized.parameters(
    "relu", "top_k", "batch_top_k", "jump_relu", "gated"
  )
  def test_forward_is_matrix_products(self, architecture):
    x, weights = autoencoder()
    weights |= {
      "theta": np.abs(normal(5, 9)),
      "log_scale": normal(6, 9),
      "magnitude_bias": normal(7, 9),
      "skip": normal(8, 4, 4),
    }
    settings = {"k": 2} if "top_k" in architecture else {}
    for transcoder in (False, True):
      got = oracle.forward(
        architecture, weights, x, transcoder=transcoder, **settings
      )
      centered = x if transcoder else x - weights["bias"]
      pre = centered @ weights["encoder"].T + weights["encoder_bias"]
      exact(got["pre"], pre)
      mask = got["z"] != 0
      if architecture == "gated":
        value = np.exp(weights["log_scale"]) * (pre - weights["encoder_bias"])
        value += weights["magnitude_bias"]
        exact(mask, (pre > 0) & (value > 0))
      else:
        value = pre
      exact(got["z"][mask], value[mask])
      want = got["z"] @ weights["dictionary"] + weights["bias"]
      exact(got["x_hat"], want + x @ weights["skip"].T)


class LossTest(parameterized.TestCase):
  def test_errors(self):
    x, x_hat = normal(0, 6, 3), normal(1, 6, 3)
    exact(oracle.squared_error(x, x_hat), 3 * ((x - x_hat) ** 2).mean())
    mean = np.broadcast_to(x.mean(axis=0), x.shape)
    self.assertAlmostEqual(oracle.normalized_error(x, mean), 1.0)
    # About the mean: a shift of both changes nothing.
    exact(
      oracle.normalized_error(x + 5, x_hat + 5),
      oracle.normalized_error(x, x_hat),
    )
    # A ratio of sums: a row of no variance about the mean does no harm.
    exact(oracle.normalized_error([[0], [1], [2]], [[0], [2], [2]]), 0.5)
    exact(oracle.l1([[1.0, -2.0], [0.0, 1.0]], [[3.0, 4.0], [0.0, 1.0]]), 4.0)

  def test_gated(self):
    x, weights = autoencoder()
    dictionary, bias = weights["dictionary"], weights["bias"]
    weights |= {"log_scale": np.zeros(9)}
    weights |= {"magnitude_bias": weights["encoder_bias"]}
    out = oracle.forward("gated", weights, x)
    error, sparsity, auxiliary = oracle.gated_losses(
      x, out["pre"], out["z"], dictionary, bias, dictionary, bias
    )
    # With nothing in the magnitudes the gate reconstructs the same.
    exact(error, auxiliary)
    exact(sparsity, oracle.l1(out["z"], dictionary))
    slope = oracle.gradient(
      lambda b: oracle.gated_losses(
        x, out["pre"], 0 * out["z"], dictionary, b, dictionary, bias
      )[2],
      bias,
    )
    exact(slope, 0)

  def test_dead_auxiliary(self):
    pre = np.array([[1.0, 5.0, -1.0], [2.0, 9.0, 3.0]])
    error = np.array([[1.0, 1.0], [3.0, -1.0]])
    atoms = np.array([[1.0, 0.0], [7.0, 7.0], [0.0, 1.0]])
    is_dead = oracle.dead([10, 0, 11], 10)
    self.assertEqual(is_dead.tolist(), [True, False, True])
    # The best of the dead: 1 * (1, 0) and 3 * (0, 1); spread 2 + 2.
    got = oracle.dead_auxiliary(error, pre, atoms, is_dead)
    exact(got, (0 + 1 + 9 + 16) / 4)
    # Both of them: 1, max(-1, 0); 2, 3.
    got = oracle.dead_auxiliary(error, pre, atoms, is_dead, k_aux=2)
    exact(got, (0 + 1 + 1 + 16) / 4)
    # Fewer than k_aux are dead: in proportion.
    got = oracle.dead_auxiliary(error, pre, atoms, is_dead, k_aux=8)
    exact(got, (0 + 1 + 1 + 16) / 4 * 2 / 8)
    self.assertEqual(oracle.dead_auxiliary(error, pre, atoms, [False] * 3), 0)

  def test_perfect_dead_latents(self):
    atoms = normal(0, 5, 4)
    pre = np.abs(normal(1, 6, 5))
    error = oracle.top_k(pre, 5) @ atoms
    everyone = np.ones(5, bool)
    exact(oracle.dead_auxiliary(error, pre, atoms, everyone, 5), 0)
    exact(
      oracle.zipf_auxiliary(error, pre, atoms, np.zeros(5), np.ones(5), 2),
      oracle.dead_auxiliary(error, pre, atoms, everyone, 2),
    )

  def test_nested(self):
    x, weights = autoencoder()
    dictionary, bias = weights["dictionary"], weights["bias"]
    out = oracle.forward("batch_top_k", weights, x, k=3)
    full = oracle.squared_error(x, out["x_hat"])
    z, pre = out["z"], out["pre"]
    exact(oracle.nested_prefixes(x, z, dictionary, bias, [9]), full)
    want = 0.0
    for size in (2, 5, 9):
      cut = z * (np.arange(9) < size)
      want += oracle.squared_error(x, cut @ dictionary + bias)
    exact(oracle.nested_prefixes(x, z, dictionary, bias, [2, 5, 9]), want)

    one = oracle.forward("top_k", weights, x, k=3)
    exact(
      oracle.nested_budgets(x, pre, dictionary, bias, [3], [1.0]),
      oracle.squared_error(x, one["x_hat"]),
    )
    every = range(1, 5)
    mean = oracle.nested_budgets(x, pre, dictionary, bias, every, [0.25] * 4)
    z = oracle.top_k(pre, 4)
    exact(oracle.all_budgets(x, z, dictionary, bias, 4), mean)
    # By prefix sums of z_j d_j in falling order.
    order = np.argsort(-z, axis=1)[:, :4]
    parts = np.take_along_axis(z, order, axis=1)[..., None] * dictionary[order]
    left = (x - bias)[:, None] - np.cumsum(parts, axis=1)
    exact(mean, (left**2).sum(axis=2).mean())

  def test_orthogonality(self):
    w = normal(0, 6, 4)
    unit = w / oracle.norms(w)[:, None]
    cosines = unit @ unit.T - 9 * np.eye(6)
    exact(
      oracle.orthogonality(w, range(6), 1), (cosines.max(axis=1) ** 2).mean()
    )
    # Chunks of the permutation's order.
    order = [4, 0, 2, 5, 1, 3]
    want = [
      (cosines[np.ix_(c, c)].max(axis=1) ** 2).sum()
      for c in (order[:3], order[3:])
    ]
    exact(oracle.orthogonality(w, order, 2), sum(want) / 6)
    # Opposite atoms are not alike; the largest cosine is -1, its square 1.
    exact(oracle.orthogonality([[1.0, 0], [-1.0, 0]], [0, 1], 1), 1)
    exact(oracle.orthogonality([[1.0, 0], [-1.0, 0], [0, 1]], range(3), 1), 0)
    with self.assertRaisesRegex(ValueError, "6 atoms in 4"):
      oracle.orthogonality(w, range(6), 4)

  def test_flops(self):
    z = np.abs(normal(0, 6, 5))
    even = np.full_like(z, z.mean())
    self.assertLess(oracle.flops(even), oracle.flops(z))
    exact(oracle.flops(-z), (z.mean(axis=0) ** 2).sum())


def directional(f, x, direction, step=1e-6):
  return (f(x + step * direction) - f(x - step * direction)) / (2 * step)


class AuthorsTest(parameterized.TestCase):
  """What the packages give, and how it is said in ours."""

  def same_gradients(self, case, f, skip=(), key="gradients"):
    """f(weights) is the loss; along three directions for each weight."""
    weights = weights_of(case)
    for name, slope in case[key].items():
      if name in skip:
        continue
      for seed in range(3):
        direction = normal(seed, *np.shape(slope))
        got = directional(
          lambda w, name=name: f({**weights, name: w}),
          weights[name],
          direction,
        )
        want = (slope * direction).sum()
        scale = 1 + np.abs(slope * direction).sum()
        self.assertLess(abs(got - want), 1e-5 * scale, msg=name)

  def same_codes(self, case, got, scale=1.0):
    close(got["z"] * scale, case["z"])
    close(got["x_hat"], case["x_hat"])

  @cases("StandardTrainingSAE")
  def test_standard(self, case):
    x, weight = ARRAYS["x"], case["coefficients"]["l1"]
    loose = not case["settings"]["apply_b_dec_to_input"]

    def losses(weights):
      out = oracle.forward("relu", weights, x, transcoder=loose)
      sparsity = oracle.l1(out["z"], weights["dictionary"])
      return oracle.squared_error(x, out["x_hat"]), weight * sparsity

    weights = weights_of(case)
    got = oracle.forward("relu", weights, x, transcoder=loose)
    self.same_codes(case, got)
    close(got["pre"], case["pre"])
    close(losses(weights), [case["losses"][k] for k in ("mse_loss", "l1_loss")])
    self.same_gradients(case, lambda w: sum(losses(w)))
    if loose:
      # The same as ours with E b in the encoder's bias.
      shift = weights["encoder"] @ weights["bias"]
      weights["encoder_bias"] = weights["encoder_bias"] + shift
      self.same_codes(case, oracle.forward("relu", weights, x))

  @cases("GatedTrainingSAE", "GatedSAETrainer")
  def test_gated(self, case):
    x, ours = ARRAYS["x"], weights_of(case)
    frozen = case["package"] == "dictionary-learning"
    weight = 0.25

    def losses(weights):
      out = oracle.forward("gated", weights, x)
      live = ours if frozen else weights
      error, sparsity, auxiliary = oracle.gated_losses(
        x,
        out["pre"],
        out["z"],
        weights["dictionary"],
        weights["bias"],
        live["dictionary"],
        live["bias"],
      )
      if frozen:  # no lengths of atoms
        sparsity = oracle.relu(out["pre"]).sum(axis=1).mean()
      return error, weight * sparsity, auxiliary

    self.same_codes(case, oracle.forward("gated", ours, x))
    theirs = list(case["losses"].values())[:3]
    if frozen:
      theirs[1] *= weight
    close(losses(ours), theirs)
    self.same_gradients(case, lambda w: sum(losses(w)))

  def saelens_auxiliary(self, case, error, pre, dictionary):
    """Not over the variance, and of pre as it is."""
    dead, d = case["dead"], error.shape[1]
    left = np.array(error)
    for row in range(len(pre)):
      for i in oracle.best([pre[row, j] for j in dead], d // 2):
        left[row] -= pre[row, dead[i]] * dictionary[dead[i]]
    scale = min(1.0, len(dead) / (d // 2))
    return scale * (left**2).sum(axis=1).mean()

  @cases(
    "TopKTrainingSAE", "BatchTopKTrainingSAE", "MatryoshkaBatchTopKTrainingSAE"
  )
  def test_top_k(self, case):
    x, ours, settings = ARRAYS["x"], weights_of(case), case["settings"]
    rescaled = settings["rescale_acts_by_decoder_norm"]
    batch = "Batch" in case["class"]
    kind = "norm_top_k" if rescaled else "batch_top_k" if batch else "top_k"
    run = lambda weights: oracle.forward(kind, weights, x, k=settings["k"])
    widths = settings.get("matryoshka_widths", [16])
    frozen = x - run(ours)["x_hat"]

    def losses(weights):
      out, atoms = run(weights), weights["dictionary"]
      pre = out["pre"]
      if rescaled:
        pre = pre * oracle.norms(atoms)
        atoms = atoms / oracle.norms(atoms)[:, None]
      return (
        oracle.nested_prefixes(
          x, out["z"], weights["dictionary"], weights["bias"], widths
        ),
        self.saelens_auxiliary(case, frozen, pre, atoms),
      )

    out = run(ours)
    norms = oracle.norms(ours["dictionary"]) if rescaled else 1.0
    self.same_codes(case, out, norms)
    close(out["pre"] * norms, case["pre"])
    theirs = dict(case["losses"])
    auxiliary = theirs.pop("auxiliary_reconstruction_loss")
    close(losses(ours), (sum(theirs.values()), auxiliary))
    close(sum(losses(ours)), case["loss"])
    self.same_gradients(case, lambda w: sum(losses(w)))
    # Ours are those of max(pre, 0), over the variance of the residual.
    is_dead = np.isin(np.arange(16), case["dead"])
    spread = ((frozen - frozen.mean(axis=0)) ** 2).sum(axis=1).mean()
    clipped = oracle.relu(out["pre"])
    close(
      oracle.dead_auxiliary(frozen, clipped, ours["dictionary"], is_dead)
      * spread,
      self.saelens_auxiliary(case, frozen, clipped, ours["dictionary"]),
    )

  @cases("BatchTopKTrainingSAE")
  def test_saelens_threshold(self, case):
    ours, settings = weights_of(case), case["settings"]
    threshold = 0.0  # ours would start at the first batch's
    for scale, want in zip(case["scales"], case["thresholds"], strict=True):
      z = oracle.forward(
        "batch_top_k", ours, scale * ARRAYS["x"], k=settings["k"]
      )["z"]
      threshold = oracle.running_threshold(
        threshold, z, settings["topk_threshold_lr"]
      )
      close(threshold, want)

  @cases("JumpReLUTrainingSAE", "JumpReluTrainer")
  def test_jump_relu(self, case):
    x, ours, settings = ARRAYS["x"], weights_of(case), case["settings"]
    theta, width = ours["theta"], settings.get("jumprelu_bandwidth", 0.5)
    loose = case["class"] == "JumpReluTrainer"
    run = lambda w: oracle.forward("jump_relu", w, x, transcoder=loose)
    out = run(ours)
    self.same_codes(case, out)
    l0 = oracle.step(out["pre"], theta).sum(axis=1)
    n = len(x)
    if loose:
      target = settings["target_l0"]
      penalty = 0.25 * (l0.mean() / target - 1) ** 2
      # Of the mean, and of z.
      pull = np.full((n, 1), 0.5 * (l0.mean() / target - 1) / target / n)
      stepped = out["z"]
    elif settings["jumprelu_sparsity_loss_mode"] == "quadratic":
      target = settings["target_l0"]
      penalty = 0.25 * (2 / target * (l0 - target) ** 2).mean()
      pull = (0.25 * 4 / target * (l0 - target) / n)[:, None]
      stepped = out["pre"]
    else:
      penalty = 0.25 * oracle.l0_loss(out["pre"], theta)
      pull = np.full((n, 1), 0.25 / n)
      stepped = out["pre"]
    error = oracle.squared_error(x, out["x_hat"])
    close(
      [error, error + penalty], [*case["losses"].values()][:1] + [case["loss"]]
    )
    pull = np.broadcast_to(pull, l0.shape + theta.shape)
    to_theta = oracle.step_gradient(stepped, theta, width, pull)[1]
    to_z = 2 / n * (out["x_hat"] - x) @ ours["dictionary"].T
    to_theta += oracle.jump_relu_gradient(out["pre"], theta, width, to_z)[1]
    close(to_theta, case["gradients"]["theta"])
    self.same_gradients(
      case,
      lambda w: oracle.squared_error(x, run(w)["x_hat"]),
      skip=["theta"],
    )

  @cases("MatchingPursuitTrainingSAE")
  def test_matching_pursuit(self, case):
    x, k = ARRAYS["x"], case["settings"]["max_iterations"]
    run = lambda w: oracle.forward("matching_pursuit", w, x, k=k)
    got = run(weights_of(case))
    self.same_codes(case, got)
    loss = lambda w: oracle.squared_error(x, run(w)["x_hat"])
    close(loss(weights_of(case)), case["loss"])
    self.same_gradients(case, loss)

  @cases(
    "Transcoder",
    "SkipTranscoder",
    "JumpReLUTranscoder",
    "JumpReLUSkipTranscoder",
  )
  def test_transcoder(self, case):
    kind = "jump_relu" if "JumpReLU" in case["class"] else "relu"
    self.same_codes(
      case,
      oracle.forward(kind, weights_of(case), ARRAYS["x"], transcoder=True),
    )

  @cases("StandardSAE")
  def test_normalized_activations(self, case):
    x = ARRAYS["x"]
    if case["settings"]["normalize_activations"] == "layer_norm":
      center = x.mean(axis=1, keepdims=True)
      scale = x.std(axis=1, keepdims=True, ddof=1)
      rows = (x - center) / (scale + 1e-5)
    else:
      center = 0.0
      scale = np.linalg.norm(x, axis=1, keepdims=True) / np.sqrt(6)
      rows = x / scale
    got = oracle.forward("relu", weights_of(case), rows)
    close(got["z"], case["z"])
    close(got["x_hat"] * scale + center, case["x_hat"])

  @cases("SparseCoder")
  def test_sparsify(self, case):
    x, ours, settings = ARRAYS["x"], weights_of(case), case["settings"]
    k, coder = settings["k"], settings["transcode"]
    kind = {"topk": "top_k", "groupmax": "group_max"}[settings["activation"]]
    target = ARRAYS["target"] if coder else x
    variance = ((target - target.mean(axis=0)) ** 2).sum()
    run = lambda w, k=k: oracle.forward(kind, w, x, k=k, transcoder=coder)
    out = run(ours)
    # With multi_topk what comes out is that of 4 k.
    self.same_codes(case, run(ours, 4 * k) if settings["multi_topk"] else out)
    fvu = lambda w: oracle.normalized_error(target, run(w)["x_hat"])
    close(fvu(ours), case["losses"]["fvu"])
    if ((out["z"] > 0).sum(axis=1) == k).all():
      self.same_gradients(case, fvu)
    else:
      self.same_gradients(case, fvu, skip=["encoder", "encoder_bias", "bias"])
      # A chosen 0 has a gradient there and none in ours.
      with self.assertRaises(AssertionError):
        self.same_gradients(case, fvu)
    if settings["multi_topk"]:
      close(
        oracle.normalized_error(target, run(ours, 4 * k)["x_hat"]),
        case["losses"]["multi_topk_fvu"],
      )
    if case["dead"]:
      error = target - out["x_hat"]
      is_dead = np.isin(np.arange(16), case["dead"])
      spread = ((error - error.mean(axis=0)) ** 2).sum()
      auxiliary = lambda w: (
        spread
        / variance
        * oracle.dead_auxiliary(error, out["pre"], w["dictionary"], is_dead)
      )
      close(auxiliary(ours), case["losses"]["auxk_loss"])
      if "auxk_gradients" in case:
        self.same_gradients(case, auxiliary, key="auxk_gradients")

  @cases("StandardTrainer")
  def test_dictionary_learning_standard(self, case):
    x = ARRAYS["x"]

    def loss(weights):
      out = oracle.forward("relu", weights, x)
      sparsity = out["z"].sum(axis=1).mean()
      return oracle.squared_error(x, out["x_hat"]) + 0.25 * sparsity

    ours = weights_of(case)
    out = oracle.forward("relu", ours, x)
    self.same_codes(case, out)
    # Atoms of length one: their l1 is ours.
    close(
      oracle.l1(out["z"], ours["dictionary"]), case["losses"]["sparsity_loss"]
    )
    close(loss(ours), case["loss"])
    self.same_gradients(case, loss)

  @cases("TopKTrainer", "BatchTopKTrainer", "MatryoshkaBatchTopKTrainer")
  def test_dictionary_learning_top_k(self, case):
    x, ours, k = ARRAYS["x"], weights_of(case), case["settings"]["k"]
    kind = "top_k" if case["class"] == "TopKTrainer" else "batch_top_k"
    run = lambda weights: oracle.forward(kind, weights, x, k=k)
    sizes = [16]
    if "group_fractions" in case["settings"]:
      fractions = case["settings"]["group_fractions"]
      sizes = (np.cumsum(fractions) * 16).astype(int)
    is_dead = np.isin(np.arange(16), case["dead"])
    frozen = x - run(ours)["x_hat"]

    def losses(weights):
      out = run(weights)
      given = weights["dictionary"], weights["bias"], sizes
      return (
        # Each level has the weight 1 / levels, and then there is a mean.
        oracle.nested_prefixes(x, out["z"], *given) / len(sizes) ** 2,
        oracle.dead_auxiliary(
          frozen, out["pre"], weights["dictionary"], is_dead
        ),
      )

    self.same_codes(case, run(ours))
    total = lambda w: losses(w)[0] + losses(w)[1] / 32
    close(total(ours), case["loss"])
    close(losses(ours)[1], case["losses"]["auxk_loss"])
    if len(sizes) == 1:
      close(losses(ours)[0], case["losses"]["l2_loss"])
    self.same_gradients(case, total)
    z = run(ours)["z"]
    if kind == "top_k":
      smallest = np.mean([row[row > 0].min() for row in z])
    else:
      smallest = oracle.running_threshold(None, z)
    close(smallest, case["thresholds"][0])


SAELENS = {
  "encoder": "W_enc",
  "encoder_bias": "b_enc",
  "dictionary": "W_dec",
  "bias": "b_dec",
  "theta": "threshold",
  "log_scale": "r_mag",
  "magnitude_bias": "b_mag",
  "skip": "W_skip",
}


@pytest.mark.parametrize("file", AUTHORS["files"], ids=lambda f: f["path"])
def test_files(file):
  """What lies in the files gives what the packages gave for it."""
  path, x = FILES / file["path"], ARRAYS["x"]
  if path.suffix == ".npz":
    loaded = {k: np.float64(v) for k, v in np.load(path).items()}
    config = {"architecture": "jumprelu", "apply_b_dec_to_input": False}
  else:
    safetensors = pytest.importorskip("safetensors.numpy")
    (stored,) = path.glob("*.safetensors")
    loaded = safetensors.load_file(stored)
    config = json.loads((path / "cfg.json").read_text())
    assert stored.stat().st_size < 20_000
  loaded = {k: np.float64(v) for k, v in loaded.items()}
  if "encoder.weight" in loaded:
    loaded["W_enc"] = loaded.pop("encoder.weight").T
    loaded["b_enc"] = loaded.pop("encoder.bias")
    config |= {"architecture": "topk"}
    config |= {"apply_b_dec_to_input": not config["transcode"]}
  if "b_gate" in loaded:
    loaded["b_enc"] = loaded.pop("b_gate")
  weights = {k: loaded.pop(v) for k, v in SAELENS.items() if v in loaded}
  assert not loaded
  if "encoder" in weights:
    weights["encoder"] = weights["encoder"].T

  kind = config["architecture"].replace("_", "").replace("skip", "")
  kind, settings = {
    "standard": ("relu", {}),
    "transcoder": ("relu", {}),
    "gated": ("gated", {}),
    "topk": ("top_k", {"k": config.get("k")}),
    "jumprelu": ("jump_relu", {}),
    "jumprelutranscoder": ("jump_relu", {}),
    "matchingpursuit": (
      "matching_pursuit",
      {"k": config.get("max_iterations")},
    ),
  }[kind]
  if kind != "matching_pursuit":
    settings["transcoder"] = not config["apply_b_dec_to_input"]
  scale = 1.0
  if config.get("rescale_acts_by_decoder_norm"):
    scale, kind = oracle.norms(weights["dictionary"]), "norm_top_k"
    # One of the two was folded before it was saved.
    assert np.allclose(scale, 1.0) == (path.name == "topk_rescaled")
  if path.name == "batchtopk":
    kind, settings["threshold"] = "at_threshold", weights["theta"][0]
  got = oracle.forward(kind, weights, x, **settings)
  close(got["z"] * scale, file["z"])
  close(got["x_hat"], file["x_hat"])
