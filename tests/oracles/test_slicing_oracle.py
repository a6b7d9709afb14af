"""The oracle of SliceGPT: algebra, exact cuts, and the authors' results."""

from absl.testing import parameterized
import numpy as np

from tests.oracles import slicing as oracle

INNER = (6, 10, 6, 10)
VOCABULARY, TOKENS, WIDTH, OUTPUTS = 23, 5, 12, 7
# (post, centered): Llama, OPT, BERT, and the one that is left.
KINDS = ((False, False), (False, True), (True, True), (True, False))
WIDTHS = (12, 9, 7, 12, 10)

# The authors' fuse_modules and rotate_and_slice (commit 6b12cde, torch 2.13.0),
# unchanged and in float64, on `network(40, centered)` as a model with their
# interface, cut to 9 of 12: what it puts out for two tokens. The head is cut
# with RMS norms and, by their default, not with layer norms. The RMS network's
# embeddings are centered first, because their code does it anyway.
AUTHORS = {
  False: [
    [-0.278502178, 2.597230497, 1.967094444, 0.010803802, 1.349958650],
    [-0.311911686, 2.991076827, 2.170604194, 0.451500072, 1.285463107],
  ],
  True: [
    [0.248994083, -0.696137429, 1.116515390, 1.376302250, -0.646796890],
    [0.394796660, -0.586511389, 1.126444493, 1.235427181, -0.699326970],
  ],
}


def network(seed, centered, d=WIDTH, rank=None):
  """Parameters whose signals vary more along some directions than others.

  With `rank`, all that is written lies in a space of so many dimensions.
  """
  rng = np.random.default_rng(seed)
  spread = rng.standard_normal((d, d)) * np.exp(-np.arange(d) / 4)[:, None]
  if rank is not None:
    spread[rank:] = 0.0

  def written(*shape):
    return rng.standard_normal((*shape, d)) @ spread / 2

  p = {"embedding": written(VOCABULARY), "positions": written(TOKENS)}
  for k in range(len(INNER) + 1):
    p[f"{k}/gain"] = np.exp(rng.standard_normal(d) / 2)
    if centered:
      p[f"{k}/bias"] = rng.standard_normal(d) / 2
  for k, h in enumerate(INNER):
    p[f"{k}/in"] = rng.standard_normal((d, h)) / np.sqrt(d)
    p[f"{k}/in_bias"] = rng.standard_normal(h) / 2
    p[f"{k}/out"], p[f"{k}/out_bias"] = written(h), written()
  p["head"] = rng.standard_normal((d, OUTPUTS)) / np.sqrt(d)
  p["head_bias"] = rng.standard_normal(OUTPUTS)
  return p


def batch(seed, size=8):
  """(tokens [B, T], mixing [T, T], valid [B, T])."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, VOCABULARY, (size, TOKENS))
  mixing = np.tril(rng.random((TOKENS, TOKENS)))
  valid = np.arange(TOKENS) < rng.integers(2, TOKENS + 1, (size, 1))
  return tokens, mixing / mixing.sum(1, keepdims=True), valid


def widths_of(r):
  return (r,) * (len(INNER) + 1)


def orthogonal(seed, d=WIDTH):
  return np.linalg.qr(np.random.default_rng(seed).standard_normal((d, d)))[0]


class RotationTest(parameterized.TestCase):
  def test_diagonalises_in_order(self):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((50, 9)) @ rng.standard_normal((9, 9)) + 1.0
    second = oracle.second_moments(x)
    np.testing.assert_allclose(second, x.T @ x / 50, rtol=1e-12)
    q, energies = oracle.rotation(second)
    np.testing.assert_allclose(q.T @ q, np.eye(9), atol=1e-12)
    np.testing.assert_allclose(q.T @ second @ q, np.diag(energies), atol=1e-11)
    self.assertTrue((np.diff(energies) < 0).all())
    largest = np.abs(q).argmax(0)
    self.assertTrue((q[largest, np.arange(9)] > 0).all())
    # The sign is the table's, not the solver's.
    again, _ = oracle.rotation((-q) @ np.diag(energies) @ (-q).T)
    np.testing.assert_allclose(again, q, atol=1e-9)

  def test_damping_moves_energies_only(self):
    x = np.random.default_rng(1).standard_normal((40, 6)) * np.arange(1, 7)
    second = oracle.second_moments(x)
    q, energies = oracle.rotation(second)
    added = 0.01 * second.diagonal().mean()
    damped, more = oracle.rotation(second + added * np.eye(6))
    np.testing.assert_allclose(damped, q, atol=1e-9)
    np.testing.assert_allclose(more, energies + added, rtol=1e-12)

  def test_what_is_cut_is_the_least_that_can_be(self):
    rng = np.random.default_rng(2)
    x = rng.standard_normal((60, 8)) @ rng.standard_normal((8, 8))
    q, energies = oracle.rotation(oracle.second_moments(x))

    def lost(q, r):
      return ((x - x @ oracle.projection(q, r)) ** 2).sum(1).mean()

    for r in range(9):
      np.testing.assert_allclose(lost(q, r), energies[r:].sum(), atol=1e-10)
      if 0 < r < 8:
        for seed in range(10):
          self.assertLess(lost(q, r), lost(orthogonal(seed, 8), r))

  def test_valid_tokens_only(self):
    rng = np.random.default_rng(3)
    x = rng.standard_normal((4, 5, 6))
    valid = rng.random((4, 5)) < 0.5
    x[~valid] = np.nan
    got = oracle.second_moments(x, valid)
    np.testing.assert_allclose(got, oracle.second_moments(x[valid]), rtol=1e-12)

  def test_rms_commutes(self):
    x, q = np.random.default_rng(4).standard_normal((3, WIDTH)), orthogonal(5)
    rotated = oracle.rms(x @ q, eps=1e-3) @ q.T
    np.testing.assert_allclose(rotated, oracle.rms(x, eps=1e-3), atol=1e-12)


class NetworkTest(parameterized.TestCase):
  def both(self, post, centered, widths, *, seed=10, rank=None, signal="norm"):
    """(the whole network's output, that of the sliced, its parameters, qs)."""
    kind = dict(post=post, centered=centered)
    p = network(seed, centered, rank=rank)
    tokens, mixing, valid = batch(seed + 1)
    found = oracle.rotations(
      p, tokens, mixing, widths, valid=valid, signal=signal, **kind
    )
    qs = [q for q, _ in found]
    small = oracle.sliced(p, qs, widths, **kind)
    whole = oracle.dense(p, tokens, mixing, **kind)
    cut = oracle.run(small, tokens, mixing, WIDTH, post=post)
    projections = [oracle.projection(*a) for a in zip(qs, widths, strict=True)]
    projected = oracle.dense(p, tokens, mixing, projections=projections, **kind)
    np.testing.assert_allclose(cut, projected, rtol=1e-9, atol=1e-10)
    return whole, cut, small, found

  @parameterized.product(kind=KINDS, signal=("norm", "stream"))
  def test_nothing_cut(self, kind, signal):
    whole, cut, *_ = self.both(*kind, widths_of(WIDTH), signal=signal)
    np.testing.assert_allclose(cut, whole, atol=1e-10)

  @parameterized.product(kind=KINDS)
  def test_any_orthogonal_matrix_changes_nothing(self, kind):
    post, centered = kind
    p, (tokens, mixing, _) = network(12, centered), batch(13)
    qs = [orthogonal(k) for k in range(oracle.norms(p))]
    small = oracle.sliced(p, qs, widths_of(WIDTH), post=post, centered=centered)
    np.testing.assert_allclose(
      oracle.run(small, tokens, mixing, WIDTH, post=post),
      oracle.dense(p, tokens, mixing, post=post, centered=centered),
      atol=1e-10,
    )

  @parameterized.product(kind=KINDS, signal=("norm", "stream"))
  def test_cut_is_projected_and_smaller(self, kind, signal):
    post, _ = kind
    for widths in (WIDTHS, widths_of(8), (1, 12, 2, 3, 4)):
      whole, cut, small, _ = self.both(*kind, widths, signal=signal)
      self.assertGreater(np.abs(cut - whole).max(), 1e-3)
      self.assertEqual(
        sum(x.size for x in small.values()),
        oracle.parameter_count(
          widths, INNER, VOCABULARY, TOKENS, OUTPUTS, post
        ),
      )
      r, then = widths[1], widths[2]
      self.assertEqual(small["1/in"].shape, (r, INNER[1]))
      self.assertEqual(small["1/out"].shape, (INNER[1], then))
      self.assertEqual(small["1/residual"].shape, (r, then))

  @parameterized.product(kind=KINDS)
  def test_directions_without_energy(self, kind):
    # Without `post` all signals lie in five dimensions; a norm's gain and bias
    # leads out of them, so with `post` only the first does.
    post = kind[0]
    widths = (5, *widths_of(WIDTH)[1:]) if post else widths_of(5)
    whole, cut, small, found = self.both(*kind, widths, rank=5)
    np.testing.assert_allclose(cut, whole, atol=1e-9)
    self.assertEqual(small["embedding"].shape, (VOCABULARY, 5))
    np.testing.assert_allclose(found[0][1][5:], 0.0, atol=1e-12)
    if not post:
      less = self.both(*kind, widths_of(4), rank=5)[1]
      self.assertEqual(np.allclose(less, whole, atol=1e-3), False)

  @parameterized.parameters(False, True)
  def test_a_layer_norm_has_one_direction_to_spare(self, post):
    widths = widths_of(WIDTH - 1)
    whole, cut, _, found = self.both(post, True, widths)
    np.testing.assert_allclose(cut, whole, atol=1e-10)
    for q, energies in found:
      np.testing.assert_allclose(energies[-1], 0.0, atol=1e-12)
      np.testing.assert_allclose(q[:, -1], WIDTH**-0.5, atol=1e-9)

  def test_what_must_not_be_left_out(self):
    """The original width in the norm; the centering of the residual's bias."""
    p, (tokens, mixing, valid) = network(20, True), batch(21)
    kind = dict(post=True, centered=True)
    widths = widths_of(9)
    found = oracle.rotations(p, tokens, mixing, widths, valid=valid, **kind)
    small = oracle.sliced(p, [q for q, _ in found], widths, **kind)
    right = oracle.run(small, tokens, mixing, WIDTH, post=True)
    wrong = oracle.run(small, tokens, mixing, 9, post=True)
    self.assertGreater(np.abs(right - wrong).max(), 0.1)
    qs = [orthogonal(k) for k in range(5)]
    small = oracle.sliced(p, qs, widths_of(WIDTH), **kind)
    small["1/residual_bias"] = p["1/bias"] @ qs[2]
    wrong = oracle.run(small, tokens, mixing, WIDTH, post=True)
    whole = oracle.dense(p, tokens, mixing, **kind)
    self.assertGreater(np.abs(whole - wrong).max(), 0.1)

  def test_signs_do_not_matter(self):
    p, (tokens, mixing, valid) = network(22, True), batch(23)
    kind = dict(post=True, centered=True)
    found = oracle.rotations(p, tokens, mixing, WIDTHS, valid=valid, **kind)
    outputs = []
    for sign in (1.0, -1.0):
      signs = np.where(np.arange(WIDTH) % 2, sign, 1.0)
      small = oracle.sliced(p, [q * signs for q, _ in found], WIDTHS, **kind)
      outputs.append(oracle.run(small, tokens, mixing, WIDTH, post=True))
    np.testing.assert_allclose(*outputs, atol=1e-10)

  def test_found_in_order(self):
    """Rotation k is that of a network cut ahead of norm k, and not at it."""
    p, (tokens, mixing, valid) = network(24, False), batch(25)
    one = oracle.rotations(p, tokens, mixing, (12, 6, 6, 6, 6), valid=valid)
    two = oracle.rotations(p, tokens, mixing, (12, 6, 2, 6, 6), valid=valid)
    for k in range(3):
      np.testing.assert_array_equal(one[k][0], two[k][0])
    self.assertFalse(np.allclose(one[3][1], two[3][1], rtol=1e-3))

  @parameterized.product(kind=KINDS)
  def test_better_than_other_directions(self, kind):
    post, centered = kind
    errors = {"found": [], "random": [], "none": []}
    widths = widths_of(WIDTH * 3 // 4)
    for seed in range(30, 36):
      whole, cut, *_ = self.both(*kind, widths, seed=seed)
      errors["found"].append(((cut - whole) ** 2).mean())
      p, (tokens, mixing, _) = network(seed, centered), batch(seed + 1)
      for name in ("random", "none"):
        q = orthogonal(seed) if name == "random" else np.eye(WIDTH)
        small = oracle.sliced(
          p, [q] * len(widths), widths, post=post, centered=centered
        )
        other = oracle.run(small, tokens, mixing, WIDTH, post=post)
        errors[name].append(((other - whole) ** 2).mean())
    for name in ("random", "none"):
      self.assertLess(np.mean(errors["found"]), np.mean(errors[name]))

  @parameterized.parameters(False, True)
  def test_authors(self, centered):
    p, (tokens, mixing, valid) = network(40, centered), batch(41)
    if not centered:
      for name in ("embedding", "positions"):
        p[name] = p[name] @ oracle.centering(WIDTH)
    widths = (9, 9, 9, 9, WIDTH if centered else 9)
    outputs = {}
    for signal in ("stream", "norm"):
      found = oracle.rotations(
        p,
        tokens,
        mixing,
        widths,
        valid=valid,
        signal=signal,
        centered=centered,
      )
      qs = [q for q, _ in found]
      small = oracle.sliced(p, qs, widths, centered=centered)
      outputs[signal] = oracle.run(small, tokens, mixing, WIDTH)[0, :2, :5]
    np.testing.assert_allclose(outputs["stream"], AUTHORS[centered], atol=2e-9)
    self.assertGreater(np.abs(outputs["norm"] - AUTHORS[centered]).max(), 1e-3)

  def test_wrong_arguments_are_refused(self):
    p, (tokens, mixing, _) = network(26, False), batch(27)
    with self.assertRaises(ValueError):
      oracle.rotations(p, tokens, mixing, WIDTHS, signal="input")
    with self.assertRaises(ValueError):
      oracle.sliced(p, [np.eye(WIDTH)] * 4, WIDTHS[:4])
