"""The oracle of sparse recovery: by search, by hand, bounds, and scikit-learn.

data/recovery_authors.json has what others' code gives for inputs drawn by
`normal`.
"""

import functools
import json
import math
import pathlib

from absl.testing import parameterized
import numpy as np
from sklearn import decomposition
from sklearn import linear_model

from tests.oracles import recovery as oracle

AUTHORS = json.loads(
  (pathlib.Path(__file__).parent / "data/recovery_authors.json").read_text()
)["results"]
exact = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-13)
# A minimum found by its value has half of the digits.
found = functools.partial(np.testing.assert_allclose, rtol=0, atol=2e-6)
# Iterations that were stopped, and scikit-learn's own tolerance.
near = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-8)


def normal(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape)


def unit(dictionary):
  return dictionary / np.linalg.norm(dictionary, axis=-1, keepdims=True)


def planted(seed, m, d, k, rows=1):
  """A unit dictionary, codes with k values of size 1 to 2, their signals."""
  rng = np.random.default_rng(seed)
  dictionary = unit(rng.standard_normal((m, d)))
  z = np.zeros((rows, m))
  for row in z:
    where = rng.permutation(m)[:k]
    row[where] = rng.uniform(1, 2, k) * rng.choice([-1, 1], k)
  return dictionary, z, z @ dictionary


VALUES = np.array([-3.0, -1.3, -0.4, 0.0, 0.2, 0.7, 1.1, 1.9, 4.0])


class SearchTest(parameterized.TestCase):
  def test_finds_the_global_minimum(self):
    best = oracle.grid_argmin(
      lambda u: np.cos(3 * u[:, 0]) + 0.1 * u[:, 0], [-4], [4]
    )
    # The left one of the valleys, where sin(3 u) = 0.1 / 3.
    exact(best, -math.pi - math.asin(0.1 / 3) / 3, atol=1e-6)

  def test_two_dimensions(self):
    best = oracle.grid_argmin(
      lambda u: ((u - [0.25, -1.5]) ** 2).sum(-1), [-2, -2], [2, 2], 101
    )
    found(best, [0.25, -1.5])


class ProxTest(parameterized.TestCase):
  @parameterized.product(
    setting=[
      ("none", {}),
      ("l1", {}),
      ("l0", {}),
      ("lq", {"q": 0.5}),
      ("lq", {"q": 0.2}),
      ("lq", {"q": 2 / 3}),
      ("lq", {"q": 0.9}),
      ("cel0", {"norm": 1.0}),
      ("cel0", {"norm": 0.6}),
      ("cel0", {"norm": 2.5}),
      ("cel0", {"norm": 0.0}),
    ],
    t=[0.3, 1.0],
    nonnegative=[False, True],
  )
  def test_minimizes(self, setting, t, nonnegative):
    name, options = setting
    penalty = oracle.penalty(name, 0.8, nonnegative=nonnegative, **options)
    got = penalty.prox(VALUES, t)
    for v, u in zip(VALUES, got):
      want = oracle.prox_by_search(penalty.value, [v], t, nonnegative)[0]
      found(u, want, err_msg=f"{name} of {v}")
      if nonnegative:
        self.assertGreaterEqual(u, 0)
    # Odd, and 0 at 0.
    if not nonnegative:
      exact(penalty.prox(-VALUES, t), -got)
    self.assertEqual(got[3], 0)

  @parameterized.product(
    v=[(0.3, 0.4), (3.0, -4.0), (-0.1, 2.0), (0.0, 0.0), (-1.0, -2.0)],
    nonnegative=[False, True],
  )
  def test_group(self, v, nonnegative):
    penalty = oracle.penalty("group", 0.9, size=2, nonnegative=nonnegative)
    want = oracle.prox_by_search(penalty.value, v, 0.7, nonnegative)
    found(penalty.prox(np.array(v), 0.7), want, atol=1e-5)

  def test_groups_of_one_are_l1(self):
    exact(oracle.group(VALUES, 0.5, 1), oracle.soft(VALUES, 0.5))

  def test_groups_are_apart(self):
    v = normal(0, 6)
    want = np.concatenate([oracle.group(g, 0.8, 3) for g in (v[:3], v[3:])])
    exact(oracle.group(v, 0.8, 3), want)

  def test_nonnegative_by_hand(self):
    prox = oracle.penalty("l1", 2.0, nonnegative=True).prox
    exact(prox(VALUES, 0.5), np.maximum(VALUES - 1.0, 0.0))

  def test_soft_solves_its_equation(self):
    u = oracle.soft(VALUES, 0.6)
    gap = VALUES - u
    exact(gap[u != 0], 0.6 * np.sign(u[u != 0]))
    self.assertTrue((np.abs(gap[u == 0]) <= 0.6).all())

  def test_hard_keeps_beyond_its_threshold(self):
    t, edge = 0.5, 1.0  # sqrt(2 t)
    v = [edge, -edge, np.nextafter(edge, 2), -1.5]
    exact(oracle.hard(v, t), [0, 0, v[2], -1.5])

  @parameterized.parameters(0.1, 0.4, 0.5, 2 / 3, 0.95)
  def test_lq_threshold(self, q):
    t = 0.7
    threshold, jump = oracle.lq_threshold(t, q)
    # Both points are equally good there, and the slope is 0 at the jump.
    exact(threshold**2 / 2, (jump - threshold) ** 2 / 2 + t * jump**q)
    exact(jump - threshold + t * q * jump ** (q - 1), 0, atol=1e-12)
    below, at, above = oracle.lq(
      [threshold * (1 - 1e-9), threshold, threshold * (1 + 1e-9)], t, q
    )
    self.assertEqual((below, at), (0.0, 0.0))
    np.testing.assert_allclose(above, jump, rtol=1e-6)

  @parameterized.parameters(0.1, 0.5, 2 / 3, 0.9)
  def test_lq_takes_the_larger_root(self, q):
    v = np.linspace(1.5, 6, 30)
    u = oracle.lq(v, 0.4, q)
    exact(u - v + 0.4 * q * u ** (q - 1), 0, atol=1e-12)
    # Beyond where the objective bends upwards.
    self.assertTrue((1 + 0.4 * q * (q - 1) * u ** (q - 2) > 0).all())

  def test_half_in_closed_form(self):
    v = np.linspace(-5, 5, 81)
    for t in (0.1, 1.0, 2.5):
      exact(oracle.half(v, t), oracle.lq(v, t, 0.5), atol=1e-12)

  def test_lq_towards_its_ends(self):
    v = VALUES
    near(oracle.lq(v, 0.3, 1 - 1e-10), oracle.soft(v, 0.3))
    near(oracle.lq(v, 0.3, 1e-10), oracle.hard(v, 0.3))

  def test_no_step(self):
    for name in ("l1", "l0", "lq", "cel0", "group"):
      exact(oracle.penalty(name, 1.0).prox(VALUES, 0.0), VALUES)

  def test_cel0(self):
    weight, norm = 0.5, 2.0
    edge = math.sqrt(2 * weight) / norm
    exact(
      oracle.cel0_value([0.0, edge / 2, edge, 9.0, -edge], weight, norm),
      [0, 0.75 * weight, weight, weight, weight],
    )
    # Never above l0, and its slope at 0 is norm sqrt(2 weight).
    slope = oracle.cel0_value(1e-9, weight, norm) / 1e-9
    np.testing.assert_allclose(slope, norm * math.sqrt(2 * weight), rtol=1e-6)
    # A step of 1 / norm^2 and beyond: hard.
    for t in (1 / norm**2, 1.0):
      exact(
        oracle.cel0(VALUES, t, weight, norm), oracle.hard(VALUES, t * weight)
      )

  def test_cel0_norms(self):
    norms = np.linspace(0, 2, len(VALUES))
    want = [oracle.cel0(v, 0.4, 0.3, n) for v, n in zip(VALUES, norms)]
    exact(oracle.cel0(VALUES, 0.4, 0.3, norms), want)

  def test_cel0_has_the_minimum_of_l0(self):
    # One atom: the least of both objectives is the same, at the same code.
    for x in (0.3, 0.9, 1.6):
      for norm in (0.5, 1.7):
        atom = np.array([[norm]])
        best = {}
        for name in ("l0", "cel0"):
          p = oracle.penalty(name, 0.5, norm=norm)

          def cost(z, p=p, atom=atom, x=x):
            return np.array([oracle.objective(atom, [x], r, p) for r in z])

          u = oracle.grid_argmin(cost, [-5], [5])
          candidates = [u, np.zeros(1)]
          best[name] = min(float(cost(c[None])[0]) for c in candidates)
        np.testing.assert_allclose(best["l0"], best["cel0"], atol=1e-9)


class IstaTest(parameterized.TestCase):
  @parameterized.product(
    name=["l1", "l0", "lq", "cel0", "group"], nonnegative=[False, True]
  )
  def test_never_rises(self, name, nonnegative):
    dictionary, x = normal(1, 8, 5), normal(2, 5)
    norms = np.linalg.norm(dictionary, axis=-1)
    p = oracle.penalty(name, 0.1, nonnegative=nonnegative, norm=norms, size=2)
    path = oracle.ista_path(dictionary, x, p, 60)
    costs = [oracle.objective(dictionary, x, z, p) for z in path]
    self.assertTrue((np.diff(costs) <= 1e-12).all())
    self.assertLess(costs[-1], costs[0])

  @parameterized.product(solver=["ista", "fista"], nonnegative=[False, True])
  def test_lasso(self, solver, nonnegative):
    dictionary, x, weight = normal(3, 7, 6), normal(4, 4, 6), 0.7
    p = oracle.penalty("l1", weight, nonnegative=nonnegative)
    got = getattr(oracle, solver)(dictionary, x, p, 6000)
    lasso = linear_model.Lasso(
      alpha=weight / 6,
      fit_intercept=False,
      positive=nonnegative,
      tol=1e-14,
      max_iter=100000,
    ).fit(dictionary.T, x.T)
    near(got, lasso.coef_)
    self.assertTrue(0 < np.mean(got != 0) < 1)

  def test_lasso_conditions(self):
    dictionary, x, weight = normal(5, 9, 6), normal(6, 6), 0.5
    z = oracle.fista(dictionary, x, oracle.penalty("l1", weight), 5000)
    slope = dictionary @ (x - z @ dictionary)
    near(slope[z != 0], weight * np.sign(z[z != 0]))
    self.assertTrue((np.abs(slope[z == 0]) <= weight).all())

  @parameterized.parameters("lasso_cd", "lasso_lars")
  def test_sparse_encode(self, algorithm):
    dictionary, x = unit(normal(7, 6, 5)), normal(8, 3, 5)
    want = decomposition.sparse_encode(
      x, dictionary, algorithm=algorithm, alpha=0.3, max_iter=100000
    )
    got = oracle.fista(dictionary, x, oracle.penalty("l1", 0.3), 4000)
    # sparse_encode has no tolerance to set; coordinate descent stops at 1e-4.
    np.testing.assert_allclose(
      got, want, atol=2e-3 if "cd" in algorithm else 1e-8
    )

  def test_lasso_lars(self):
    dictionary, x = normal(9, 6, 5), normal(10, 5)
    want = linear_model.LassoLars(alpha=0.2 / 5, fit_intercept=False)
    want = want.fit(dictionary.T, x).coef_
    got = oracle.fista(dictionary, x, oracle.penalty("l1", 0.2), 5000)
    near(got, want)

  def test_bounds(self):
    # Beck and Teboulle, theorems 3.1 and 4.4.
    dictionary, x = normal(11, 10, 6), normal(12, 6)
    p, size = oracle.penalty("l1", 0.2), oracle.lipschitz(dictionary)
    best = oracle.fista(dictionary, x, p, 20000)
    least = oracle.objective(dictionary, x, best, p)
    far = (best**2).sum()
    for path, bound in (
      (oracle.ista_path, lambda k: size * far / (2 * k)),
      (oracle.fista_path, lambda k: 2 * size * far / (k + 1) ** 2),
    ):
      for k, z in enumerate(path(dictionary, x, p, 100)):
        gap = oracle.objective(dictionary, x, z, p) - least
        if k:
          self.assertLessEqual(gap, bound(k) + 1e-12)

  def test_first_steps(self):
    # FISTA's first step is ISTA's, and its second extrapolates by 0 too.
    dictionary, x, p = (
      normal(13, 5, 4),
      normal(14, 4),
      oracle.penalty("l1", 0.1),
    )
    a = oracle.ista_path(dictionary, x, p, 3)
    b = oracle.fista_path(dictionary, x, p, 3)
    exact(a[:3], b[:3])
    self.assertGreater(np.abs(a[3] - b[3]).max(), 1e-6)

  def test_no_penalty_is_least_squares(self):
    dictionary, x = normal(15, 3, 6), normal(16, 6)
    got = oracle.fista(dictionary, x, oracle.penalty("none", 0.0), 2000)
    near(got, np.linalg.lstsq(dictionary.T, x, rcond=None)[0])

  def test_orthonormal_dictionary(self):
    # One step of size 1 is the answer, whatever the penalty.
    q = np.linalg.qr(normal(17, 6, 6))[0]
    x = normal(18, 6)
    for name in ("l1", "l0", "lq", "cel0", "group"):
      p = oracle.penalty(name, 0.3, size=3)
      exact(oracle.ista(q, x, p, 1), p.prox(q @ x, 1.0))
      exact(oracle.ista(q, x, p, 9), p.prox(q @ x, 1.0), atol=1e-12)

  def test_large_weight_gives_nothing(self):
    dictionary, x = normal(19, 6, 4), normal(20, 4)
    weight = np.abs(dictionary @ x).max()
    for solver in (oracle.ista, oracle.fista):
      self.assertFalse(
        solver(dictionary, x, oracle.penalty("l1", weight), 5).any()
      )
      self.assertTrue(
        solver(dictionary, x, oracle.penalty("l1", weight * 0.99), 5).any()
      )

  def test_shapes_and_step_size(self):
    dictionary, x = normal(21, 6, 4), normal(22, 2, 3, 4)
    p = oracle.penalty("l1", 0.1)
    got = oracle.ista(dictionary, x, p, 4)
    self.assertEqual(got.shape, (2, 3, 6))
    exact(got[1, 2], oracle.ista(dictionary, x[1, 2], p, 4))
    step = 1 / np.linalg.svd(dictionary)[1][0] ** 2
    exact(got, oracle.ista(dictionary, x, p, 4, step))
    exact(oracle.ista(dictionary, x, p, 0), np.zeros((2, 3, 6)))
    self.assertEqual(oracle.objective(dictionary, x, got, p).shape, (2, 3))


class PursuitTest(parameterized.TestCase):
  @parameterized.parameters(1, 2, 3, 5)
  def test_omp_is_that_of_scikit_learn(self, k):
    dictionary, x = unit(normal(23, 12, 8)), normal(24, 5, 8)
    got = oracle.omp(dictionary, x, k)
    fit = linear_model.OrthogonalMatchingPursuit(
      n_nonzero_coefs=k, fit_intercept=False
    ).fit(dictionary.T, x.T)
    near(got, fit.coef_)
    want = decomposition.sparse_encode(
      x, dictionary, algorithm="omp", n_nonzero_coefs=k
    )
    near(got, want)
    self.assertTrue(((got != 0).sum(-1) == k).all())

  def test_omp_normalizes(self):
    # Long atoms are not preferred; scikit-learn, given atoms that are not
    # unit, would prefer them.
    dictionary, x = unit(normal(25, 9, 6)), normal(26, 6)
    scale = np.exp(normal(27, 9))
    a = oracle.omp(dictionary, x, 3)
    b = oracle.omp(dictionary * scale[:, None], x, 3)
    near(a, b * scale)
    c = oracle.matching_pursuit(dictionary, x, 4)
    d = oracle.matching_pursuit(dictionary * scale[:, None], x, 4)
    exact(c, d * scale)

  def test_omp_residual(self):
    dictionary, x = normal(28, 9, 6), normal(29, 6)
    errors = []
    for support, z in oracle.omp_path(dictionary, x, 6):
      r = x - z @ dictionary
      exact(dictionary[support] @ r, 0, atol=1e-10)
      self.assertLen(set(support), len(support))
      errors.append(r @ r)
    self.assertTrue((np.diff(errors) <= 1e-12).all())
    exact(errors[-1], 0, atol=1e-10)

  def test_recovery(self):
    dictionary, z, x = planted(30, 12, 60, 3, rows=4)
    gram = np.abs(dictionary @ dictionary.T - np.eye(12))
    # Tropp, Greed is good: k atoms are found if k < (1 + 1 / coherence) / 2,
    # and here even without.
    near(oracle.omp(dictionary, x, 3), z)
    self.assertLess(gram.max(), 0.5)
    near(oracle.iht(dictionary, x, 3, 400), z)
    near(oracle.htp(dictionary, x, 3, 10), z)
    q = np.linalg.qr(normal(31, 6, 6))[0]
    code = np.array([0, 2.0, 0, 0, -1.0, 0])
    for solve in (oracle.omp, oracle.matching_pursuit):
      near(solve(q, code @ q, 2), code)
    exact(oracle.iht(q, code @ q, 2, 1), code, atol=1e-12)

  def test_omp_by_hand(self):
    dictionary = np.array([[1.0, 0, 0], [0.6, 0.8, 0], [0, 0, 1.0]])
    x = np.array([1.0, 1.0, 0.5])
    # Correlations 1, 1.4, 0.5; the residual (0.16, -0.12, 0.5) of the second
    # atom has 0.16 and 0.5; then least squares on atoms 1 and 2.
    path = oracle.omp_path(dictionary, x, 2)
    self.assertEqual([p[0] for p in path], [[], [1], [1, 2]])
    exact(path[2][1], [0, 1.4, 0.5])

  def test_matching_pursuit(self):
    dictionary, x = unit(normal(32, 7, 5)), normal(33, 5)
    before = x
    for j, z, r in oracle.matching_pursuit_path(dictionary, x, 12):
      exact(r, x - z @ dictionary, atol=1e-12)
      exact(dictionary[j] @ r, 0, atol=1e-12)
      self.assertEqual(j, np.argmax(np.abs(dictionary @ before)))
      # The energy is that of the coefficient and of what remains.
      exact(before @ before, (dictionary[j] @ before) ** 2 + r @ r)
      before = r

  def test_an_atom_twice(self):
    dictionary = np.array([[1.0, 0.0], [0.8, 0.6]])
    atoms = [
      j for j, *_ in oracle.matching_pursuit_path(dictionary, [1.0, 0.2], 3)
    ]
    self.assertEqual(atoms, [0, 1, 0])

  def test_signed(self):
    dictionary = np.array([[1.0, 0.0], [0.0, 1.0]])
    x = np.array([-2.0, 1.0])
    exact(oracle.matching_pursuit(dictionary, x, 1), [-2, 0])
    exact(oracle.matching_pursuit(dictionary, x, 1, signed=True), [0, 1])
    # Then all that is left is 0 or below: the largest is 0, atom 1 again.
    exact(oracle.matching_pursuit(dictionary, x, 3, signed=True), [0, 1])

  def test_ties_and_nothing(self):
    dictionary = np.array([[0.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    x = np.array([1.0, 1.0])
    self.assertEqual(oracle.omp_path(dictionary, x, 1)[1][0], [1])
    exact(oracle.matching_pursuit(dictionary, x, 1), [0, 1, 0, 0])
    for solve in (oracle.omp, oracle.matching_pursuit):
      exact(solve(dictionary, x, 0), np.zeros(4))
      exact(solve(dictionary, np.zeros(2), 2), np.zeros(4))
    # Nothing is left after one atom, and still none is taken twice.
    path = oracle.omp_path(np.eye(3), np.array([0.0, 2.0, 0.0]), 3)
    self.assertEqual(path[3][0], [1, 0, 2])
    exact(path[3][1], [0, 2, 0])
    self.assertEqual(oracle.largest([0.0, 1.0, -1.0, 1.0], 2), [1, 2])


class ThresholdingTest(parameterized.TestCase):
  def test_always_sparse_and_descends(self):
    dictionary, x = normal(34, 12, 8), normal(35, 8)
    path = oracle.iht_path(dictionary, x, 3, 50)
    costs = [float(oracle.objective(dictionary, x, z)) for z in path]
    self.assertTrue(all((z != 0).sum() <= 3 for z in path))
    self.assertTrue((np.diff(costs) <= 1e-12).all())

  def test_fixed_point(self):
    # Blumensath and Davies: the slope vanishes on the support, and elsewhere is
    # at most the smallest value / step.
    dictionary, x = normal(36, 12, 8), normal(37, 8)
    t = 1 / oracle.lipschitz(dictionary)
    z = oracle.iht(dictionary, x, 3, 5000)
    slope = dictionary @ (x - z @ dictionary)
    near(slope[z != 0], 0)
    self.assertLessEqual(
      np.abs(slope[z == 0]).max() * t, np.abs(z[z != 0]).min() + 1e-9
    )

  def test_htp_refits(self):
    dictionary, x = normal(38, 12, 8), normal(39, 8)
    for z in oracle.iht_path(dictionary, x, 3, 10, refit=True)[1:]:
      slope = dictionary @ (x - z @ dictionary)
      exact(slope[z != 0], 0, atol=1e-10)
    # A support that repeats is the end.
    path = oracle.iht_path(dictionary, x, 3, 40, refit=True)
    exact(path[-1], path[-2], atol=1e-12)

  def test_htp_is_no_worse_than_iht(self):
    dictionary, z, x = planted(40, 20, 30, 4)
    x = x + 0.05 * normal(41, *x.shape)
    a = oracle.objective(dictionary, x, oracle.iht(dictionary, x, 4, 300))
    b = oracle.objective(dictionary, x, oracle.htp(dictionary, x, 4, 30))
    self.assertLessEqual(b[0], a[0] + 1e-9)
    del z

  def test_all_latents(self):
    dictionary, x = normal(42, 4, 6), normal(43, 6)
    want = np.linalg.lstsq(dictionary.T, x, rcond=None)[0]
    near(oracle.htp(dictionary, x, 4, 1), want)
    near(oracle.iht(dictionary, x, 4, 3000), want)


class AuthorsTest(parameterized.TestCase):
  def test_proxop(self):
    v, want = np.linspace(-4, 4, 41), AUTHORS["proxop"]
    near(oracle.cel0(v, 0.6, 0.5, 0.8), want["cel0_0.8"])
    near(oracle.cel0(v, 0.6, 0.5, 2.5), want["cel0_2.5"])
    near(oracle.cel0_value(v, 0.5, 0.8), want["cel0_value"])
    near(oracle.hard(v, 0.6), want["l0"])
    for q in (0.3, 0.5, 0.7):
      near(oracle.lq(v, 0.6, q), want[f"root_{q}"])

  def test_skglm(self):
    v, want = np.linspace(-4, 4, 41), AUTHORS["skglm"]
    near(oracle.half(v, 0.6), want["half"])
    near(oracle.lq(v, 0.6, 2 / 3), want["two_thirds"])
    block = np.array([1.0, -2.0, 0.5])
    near(oracle.group(block, 0.9, 3), want["block"])
    prox = oracle.penalty("group", 0.9, size=3, nonnegative=True).prox
    near(prox(block, 1.0), want["block_positive"])

  @parameterized.product(
    solver=["ista", "fista"],
    kind=[("soft", "l1", 0.2), ("hard", "l0", 0.2), ("half", "lq", 0.1)],
  )
  def test_pylops(self, solver, kind):
    # Its objective is twice ours, so that 0.4 there is a weight of 0.2, and its
    # half threshold for t is the prox of t / 2 |u|^(1/2).
    threshold, name, weight = kind
    got = getattr(oracle, solver)(
      normal(150, 9, 6), normal(151, 6), oracle.penalty(name, weight), 25
    )
    near(got, AUTHORS["pylops"][f"{solver}_{threshold}"])

  def test_overcomplete(self):
    # Its codes are float32.
    dictionary, x = unit(normal(152, 10, 6)), normal(153, 4, 6)
    got = oracle.matching_pursuit(dictionary, x, 5, signed=True)
    want = AUTHORS["overcomplete"]
    np.testing.assert_allclose(got, want["matching_pursuit"], atol=1e-6)
    residual = x - got @ dictionary
    np.testing.assert_allclose(residual, want["residual"], atol=1e-6)
