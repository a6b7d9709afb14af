"""Solvers against the oracle, scikit-learn, and what is proven of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import linalg
from sklearn import linear_model

from sparsejax import sparse_coding as sc
from tests import common
from tests.kernels import problem
from tests.oracles import recovery as oracle
from tests.routing import pieces

LATENTS, WIDTH = 14, 9
SOLVERS = {
  f.__name__: problem.jit(f, static_argnames=static)
  for static, *functions in (
    ("steps", sc.ista, sc.fista),
    ("k", sc.omp),
    (("k", "signed"), sc.matching_pursuit),
    (("k", "steps"), sc.iht, sc.htp),
    (("rounds", "steps"), sc.learn_dictionary),
  )
  for f in functions
}
# Arguments of one call of each, and those of the oracle.
WEIGHT = 0.3
PENALTIES = {
  "l1": sc.L1(WEIGHT),
  "l0": sc.L0(WEIGHT),
  "lq": sc.Lq(WEIGHT, 0.5),
  "cel0": sc.CEL0(WEIGHT),
  "group": sc.Group(WEIGHT, 2),
}
CALLS = {
  "ista": dict(penalty=PENALTIES["l1"], steps=7),
  "fista": dict(penalty=PENALTIES["l1"], steps=7),
  "omp": dict(k=4),
  "matching_pursuit": dict(k=6),
  "iht": dict(k=3, steps=5),
  "htp": dict(k=3, steps=5),
}
# Those without XLA's top-k, which gathers the rows of all devices.
LOCAL = [name for name in CALLS if name != "htp"]


def draw(seed, rows=(2, 3), latents=LATENTS, width=WIDTH, unit=False):
  """A dictionary and signals, float64; the norms of atoms differ."""
  rng = np.random.default_rng(seed)
  dictionary = rng.normal(size=(latents, width))
  if unit:
    dictionary /= np.linalg.norm(dictionary, axis=1, keepdims=True)
  return dictionary, rng.normal(size=(*rows, width))


def plant(seed, dictionary, rows, k, low=0.5, high=1.5):
  """Codes of k latents of either sign."""
  rng = np.random.default_rng(seed)
  z = np.zeros((rows, len(dictionary)))
  for row in z:
    at = rng.choice(len(row), k, replace=False)
    row[at] = rng.choice([-1, 1], k) * rng.uniform(low, high, k)
  return z


def solve(name, dictionary, signal, **given):
  """In float64."""
  with jax.enable_x64(True):
    got = SOLVERS[name](jnp.array(dictionary), jnp.array(signal), **given)
    assert got.dtype == np.float64
    return np.asarray(got)


def expected(name, dictionary, signal, **given):
  if "penalty" in given:
    given["penalty"] = oracle.penalty("l1", WEIGHT)
  return getattr(oracle, name)(dictionary, signal, **given)


@pytest.mark.parametrize("name", CALLS)
def test_oracle(name):
  for seed in (0, 1):
    dictionary, signal = draw(seed)
    if name != "htp":  # whose split of what they share is open
      dictionary[5] = dictionary[2]
    want = expected(name, dictionary, signal, **CALLS[name])
    got = solve(name, dictionary, signal, **CALLS[name])
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)
    single = (jnp.array(x, jnp.float32) for x in (dictionary, signal))
    got = SOLVERS[name](*single, **CALLS[name])
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", list(PENALTIES))
@pytest.mark.parametrize("solver", ["ista", "fista"])
def test_oracle_of_penalties(solver, name):
  dictionary, signal = draw(2)
  want = getattr(oracle, solver)(
    dictionary, signal, oracle.penalty(name, WEIGHT, size=2), 7
  )
  got = solve(solver, dictionary, signal, penalty=PENALTIES[name], steps=7)
  np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)


def test_settings():
  dictionary, signal = draw(3)
  for name in ("ista", "iht"):
    given = CALLS[name] | dict(step_size=0.01)
    want = expected(name, dictionary, signal, **given)
    got = solve(name, dictionary, signal, **given)
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)
  want = oracle.matching_pursuit(dictionary, signal, 6, signed=True)
  got = solve("matching_pursuit", dictionary, signal, k=6, signed=True)
  np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)
  # One after the other, from where the first ends.
  first = solve("ista", dictionary, signal, **CALLS["ista"])
  got = solve("ista", dictionary, signal, initial=first, **CALLS["ista"])
  given = CALLS["ista"] | dict(steps=14)
  want = expected("ista", dictionary, signal, **given)
  np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)
  for name, given in (
    ("omp", dict(k=0)),
    ("matching_pursuit", dict(k=0)),
    ("htp", dict(k=0, steps=2)),
    ("iht", dict(k=0, steps=2)),
    ("ista", dict(penalty=sc.L1(1.0), steps=0)),
  ):
    np.testing.assert_array_equal(solve(name, *draw(3), **given), 0)


@pytest.mark.parametrize("positive", [False, True])
def test_lasso(positive):
  dictionary, signal = draw(4, rows=(5,), unit=True)
  lasso = linear_model.Lasso(
    alpha=WEIGHT / WIDTH,
    fit_intercept=False,
    positive=positive,
    tol=1e-14,
    max_iter=100_000,
  )
  want = np.array([lasso.fit(dictionary.T, x).coef_ for x in signal])
  assert 0 < (want != 0).mean() < 1
  penalty = sc.L1(WEIGHT, nonnegative=positive)
  for name, steps in (("ista", 5000), ("fista", 1000)):
    got = solve(name, dictionary, signal, penalty=penalty, steps=steps)
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("name", list(PENALTIES))
def test_ista_never_rises(name):
  dictionary, signal = draw(5)
  penalty = PENALTIES[name]

  @problem.jit
  def path(dictionary, signal):
    def step(z, _):
      z = sc.ista(dictionary, signal, penalty, 1, initial=z)
      error = 0.5 * ((signal - z @ dictionary) ** 2).sum(-1)
      return z, error + penalty.value(z)

    start = jnp.zeros((*signal.shape[:-1], LATENTS), signal.dtype)
    return jax.lax.scan(step, start, length=60)[1]

  with jax.enable_x64(True):
    cost = np.asarray(path(dictionary, signal))
  assert (np.diff(cost, axis=0) <= 1e-12).all()
  assert cost[-1].sum() < (signal**2).sum() / 3


def test_fista_keeps_its_bound():
  # Theorem 4.4: 2 L (distance of the start)**2 / (k + 1)**2.
  dictionary, signal = draw(6, rows=(4,))
  penalty = oracle.penalty("l1", WEIGHT)
  cost = functools.partial(oracle.objective, dictionary, signal)
  best = solve("fista", dictionary, signal, penalty=sc.L1(WEIGHT), steps=3000)
  most = 2 * oracle.lipschitz(dictionary) * (best**2).sum(-1)
  over = {"ista": [], "fista": []}
  for steps in (3, 30):
    for name, found in over.items():
      given = dict(penalty=sc.L1(WEIGHT), steps=steps)
      z = solve(name, dictionary, signal, **given)
      found.append(cost(z, penalty) - cost(best, penalty))
    assert (over["fista"][-1] <= most / (steps + 1) ** 2).all()
    assert (over["ista"][-1] <= most / 4 / steps).all()  # Theorem 3.1
  assert (over["fista"][-1] < over["ista"][-1] / 3).all()


@pytest.mark.parametrize("k", [1, 5, WIDTH])
def test_scikit_learns_omp(k):
  dictionary, signal = draw(7, rows=(6,), unit=True)
  model = linear_model.OrthogonalMatchingPursuit(
    n_nonzero_coefs=k, fit_intercept=False
  )
  want = model.fit(dictionary.T, signal.T).coef_
  got = solve("omp", dictionary, signal, k=k)
  np.testing.assert_allclose(got, want, atol=1e-6)
  assert ((got != 0).sum(-1) == k).all()
  # The residual is orthogonal to every atom taken.
  left = (signal - got @ dictionary) @ dictionary.T
  np.testing.assert_allclose(left * (got != 0), 0, atol=1e-12)


def test_exact_recovery():
  # Coherence 1/16: OMP finds up to 8 latents, and IHT and HTP with steps of 1
  # up to 3, for then the restricted isometry constant of 3 k columns is at most
  # (3 k - 1) / 16 = 1/2 < 1/sqrt(3).
  width = 256
  dictionary = np.concatenate([np.eye(width), linalg.hadamard(width) / 16])
  for k, names in ((3, ("omp", "iht", "htp")), (8, ("omp",))):
    z = plant(8, dictionary, 3, k)
    x = jnp.array(z @ dictionary, jnp.float32)
    for name in names:
      given = {} if name == "omp" else dict(steps=30, step_size=1.0)
      w = jnp.array(dictionary, jnp.float32)
      got = SOLVERS[name](w, x, k=k, **given)
      np.testing.assert_allclose(got, z, atol=1e-5)
      np.testing.assert_array_equal(got != 0, z != 0)


@pytest.mark.parametrize("name", ["iht", "htp"])
def test_sparse_at_every_step(name):
  dictionary, signal = draw(10, rows=(20,))
  errors = []
  for steps in (1, 2, 3, 8):
    z = solve(name, dictionary, signal, k=3, steps=steps)
    assert ((z != 0).sum(-1) == 3).all()
    errors.append(((signal - z @ dictionary) ** 2).sum(-1))
  assert (np.diff(errors, axis=0) <= 1e-12).all()


@pytest.mark.parametrize("signed", [False, True])
def test_residuals_of_matching_pursuit(signed):
  dictionary, signal = draw(11, rows=(5,))
  before, size = np.zeros((5, LATENTS)), np.linalg.norm(signal, axis=-1)
  for k in range(1, 4):
    z = solve("matching_pursuit", dictionary, signal, k=k, signed=signed)
    residual = signal - z @ dictionary
    last = dictionary[np.abs(z - before).argmax(-1)]
    np.testing.assert_allclose((residual * last).sum(-1), 0, atol=1e-12)
    assert (np.linalg.norm(residual, axis=-1) < size).all()
    before, size = z, np.linalg.norm(residual, axis=-1)


@pytest.mark.slow
def test_errors_at_equal_numbers_of_latents():
  # Each penalty over a range of weights, and between them by the line: what is
  # left of noisy signals when codes have as many latents as were planted.
  k, rows = 4, 24
  weights = jnp.geomspace(0.01, 1, 13)
  makes = {
    "l1": sc.L1,
    "l0.9": lambda w: sc.Lq(w, 0.9),
    "l0.5": lambda w: sc.Lq(w, 0.5),
    "cel0": sc.CEL0,
    "l0": sc.L0,
  }

  def sweep(make, dictionary, x):
    def of(weight):
      z = sc.ista(dictionary, x, make(weight), 300)
      left = ((z @ dictionary - x) ** 2).sum() / (x**2).sum()
      return (z != 0).sum(-1).mean(), left

    return jax.vmap(of)(weights)

  swept = {
    name: problem.jit(functools.partial(sweep, make))
    for name, make in makes.items()
  }
  every = []
  for seed in range(5):
    dictionary, noise = draw(seed, rows=(rows,), latents=64, width=32)
    dictionary /= np.linalg.norm(dictionary, axis=1, keepdims=True)
    x = plant(seed, dictionary, rows, k) @ dictionary + 0.05 * noise
    left = {}
    for name, run in swept.items():
      count, error = map(
        np.asarray, run(*(jnp.array(a, jnp.float32) for a in (dictionary, x)))
      )
      order = np.argsort(count)
      assert count[order][0] < k < count[order][-1]
      left[name] = np.interp(k, count[order], error[order])
    assert max(left.values()) == left["l1"]
    assert left["cel0"] < left["l1"] / 5
    every.append(list(left.values()))
  l1, l9, l5, cel0, l0 = np.mean(every, axis=0)
  assert cel0 < l5 < l9 < l1 and cel0 < l0


@pytest.mark.parametrize("name", CALLS)
def test_gradients(name):
  # Central differences in float64: the choice does not move with them.
  dictionary, signal = draw(12, rows=(2,), latents=6, width=5)
  given = CALLS[name] | ({"k": 3} if "k" in CALLS[name] else {})
  if "steps" in given:
    # The step would move with the dictionary, and carries no gradient.
    given["step_size"] = 0.05
  scale = np.cos(np.arange(12.0)).reshape(2, 6)

  @problem.jit
  @functools.partial(jax.value_and_grad, argnums=(0, 1))
  def loss(dictionary, signal):
    return (getattr(sc, name)(dictionary, signal, **given) * scale).sum()

  with jax.enable_x64(True):
    at = (dictionary, signal)
    _, got = loss(*at)
    for i in (0, 1):
      want = np.zeros_like(at[i])
      for j in np.ndindex(*want.shape):
        sides = []
        for move in (1e-6, -1e-6):
          moved = [x.copy() for x in at]
          moved[i][j] += move
          sides.append(loss(*moved)[0])
        want[j] = (sides[0] - sides[1]) / 2e-6
      np.testing.assert_allclose(got[i], want, atol=1e-7)
      assert np.abs(want).max() > 0.01


@pytest.mark.parametrize("name", CALLS)
def test_awkward_input(name):
  dictionary, signal = (x.astype(np.float32) for x in draw(13, rows=(4,)))
  dictionary[:10] = 0  # fewer atoms than some ask for
  dictionary[10] = dictionary[11]
  signal[1, 3] = np.nan
  signal[2] = 0
  got = np.asarray(SOLVERS[name](dictionary, signal, **CALLS[name]))
  assert np.isnan(got[1]).all()
  rest = got[[0, 2, 3]]
  assert np.isfinite(rest).all() and (rest[:, :10] == 0).all()
  assert (rest[1] == 0).all() and (rest[0] != 0).any()
  signal[1, 3] = np.inf
  got = SOLVERS[name](dictionary, signal, **CALLS[name])
  assert np.isnan(got[1]).all() and np.isfinite(got[0]).all()
  # Only NaN of the dictionary's own can reach rows that are finite.
  nothing = SOLVERS[name](0 * dictionary, signal, **CALLS[name])
  np.testing.assert_array_equal(nothing[0], 0)


def test_omp_takes_no_more_than_it_needs():
  dictionary, _ = draw(14, latents=200, width=128, unit=True)
  z = plant(14, dictionary, 20, 8)
  w, x = (jnp.array(a, jnp.float32) for a in (dictionary, z @ dictionary))
  got = SOLVERS["omp"](w, x, k=12)
  np.testing.assert_array_equal(got != 0, z != 0)


def test_refit_of_nearly_equal_atoms():
  # f32 leaves four digits at this angle; less than that the ridge may take.
  w = np.array([[1.0, 0.0], [np.cos(0.03), np.sin(0.03)]])
  z = np.array([1.0, -0.5])
  x = jnp.array(z @ w, jnp.float32)
  for name, given in (("omp", {}), ("htp", dict(steps=1))):
    got = SOLVERS[name](jnp.array(w, jnp.float32), x, k=2, **given)
    np.testing.assert_allclose(got, z, atol=1e-3)


def test_matching_pursuit_skips_zeros_for_negative_products():
  w = jnp.array([[0.0, 0.0], [1.0, 0.0]])
  got = SOLVERS["matching_pursuit"](w, jnp.array([-2.0, 1.0]), k=1, signed=True)
  np.testing.assert_array_equal(got, [0, -2])


@pytest.mark.parametrize("name", ["fista", "omp", "matching_pursuit"])
def test_transformations(name):
  f = functools.partial(SOLVERS[name], **CALLS[name])
  before = SOLVERS[name]._cache_size()
  for seed in (15, 16):
    w, x = (jnp.array(a, jnp.float32) for a in draw(seed))
    want = f(w, x)
  assert SOLVERS[name]._cache_size() <= before + 1

  @problem.jit
  def others(w, x):
    g = functools.partial(getattr(sc, name), w, **CALLS[name])
    step = lambda carry, row: (carry, jax.checkpoint(g)(row))
    return jax.vmap(g)(x), jax.lax.scan(step, 0, x)[1]

  for got in others(w, x):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_shapes_and_dtypes():
  w, x = (jnp.array(a, jnp.float32) for a in draw(17))
  want = SOLVERS["omp"](w, x, k=4)
  np.testing.assert_allclose(SOLVERS["omp"](w, x[0, 0], k=4), want[0, 0], 1e-4)
  assert SOLVERS["omp"](w, x[:0], k=4).shape == (0, 3, LATENTS)
  for name, given in CALLS.items():
    low = jax.eval_shape(
      functools.partial(getattr(sc, name), **given), w, x.astype(jnp.bfloat16)
    )
    assert (low.shape, low.dtype) == (want.shape, jnp.bfloat16)


def test_weights_are_not_compiled_in():
  w, x = (jnp.array(a, jnp.float32) for a in draw(17))
  before = None
  for weight in (0.1, 0.2, 0.4):
    SOLVERS["ista"](w, x, sc.L1(weight), steps=3)
    before = before or SOLVERS["ista"]._cache_size()
  assert SOLVERS["ista"]._cache_size() == before


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", common.AXIS_TYPES)
@pytest.mark.parametrize("name", CALLS)
def test_eight_devices(name, axis_type):
  dictionary, signal = draw(18, rows=(8, 2))
  w = jnp.array(dictionary, jnp.float32)
  f = functools.partial(getattr(sc, name), w, **CALLS[name])
  pieces.compare_on_eight_devices(f, signal.astype(np.float32), axis_type)


def test_rows_stay_on_their_devices():
  dictionary, signal = (jnp.array(a, jnp.float32) for a in draw(19, (8,)))
  mesh = jax.make_mesh((8,), ("x",), axis_types=(common.AXIS_TYPES[0],))
  x = common.place(signal, mesh, jax.P("x"))
  w = common.place(dictionary, mesh, jax.P())
  for name in LOCAL:
    f = functools.partial(getattr(sc, name), **CALLS[name])
    compiled = problem.jit(f).lower(w, x).compile()
    assert not common.moved(compiled)
    got = compiled(w, x)
    assert got.sharding.is_equivalent_to(x.sharding, 2)
    np.testing.assert_allclose(
      got, expected(name, dictionary, signal, **CALLS[name]), 1e-3, 1e-4
    )


def test_learns_what_was_planted():
  for seed in (0, 1, 2):
    dictionary, _ = draw(seed, latents=24, width=16, unit=True)
    z = plant(seed, dictionary, 600, 2)
    start, _ = draw(seed + 50, latents=24, width=16)
    learned, codes = SOLVERS["learn_dictionary"](
      jnp.array(start, jnp.float32),
      jnp.array((z @ dictionary).reshape(20, 30, 16), jnp.float32),
      sc.L1(0.1),
      rounds=200,
    )
    assert codes.shape == (20, 30, 24)
    np.testing.assert_allclose(np.linalg.norm(learned, axis=1), 1, rtol=1e-5)
    cosines = np.abs(learned @ dictionary.T).max(0)
    first = start / np.linalg.norm(start, axis=1, keepdims=True)
    assert np.abs(first @ dictionary.T).max(0).mean() < 0.6
    assert cosines.mean() > 0.95


W, X = jnp.ones((5, 3)), jnp.ones((2, 3))


@pytest.mark.parametrize(
  "call,message",
  [
    (lambda: sc.omp(W, X, 4), "k must be an integer from 0 to 3, got 4"),
    (lambda: sc.htp(W, X, 4), "k must be an integer from 0 to 3, got 4"),
    (lambda: sc.iht(W, X, 6), "k must be an integer from 0 to 5, got 6"),
    (lambda: sc.omp(W, X, -1), "k must be an integer from 0 to 3, got -1"),
    (lambda: sc.omp(W, X, 2.0), "k must be an integer from 0 to 3, got 2.0"),
    (lambda: sc.matching_pursuit(W, X, -1), "k must be an integer of at least"),
    (lambda: sc.ista(W, X, sc.L1(1.0), -1), "steps must be an integer of at l"),
    (lambda: sc.iht(W, X, 1, 1.5), "steps must be an integer of at least 0"),
    (lambda: sc.omp(W, X[:, :2], 1), r"signal must be \[..., 3\] as the dict"),
    (lambda: sc.omp(W[0], X, 1), r"dictionary must be \[latents, width\]"),
    (lambda: sc.omp(W[:0], X, 0), r"dictionary must be \[latents, width\]"),
    (lambda: sc.omp(W, X.astype(int), 1), "signal must be floating, got int32"),
    (lambda: sc.omp(W.astype(int), X, 1), "dictionary must be floating"),
    (
      lambda: sc.fista(W, X, sc.L1(1.0), initial=X),
      r"initial must be \[2, 5\], got \[2, 3\]",
    ),
    (
      lambda: sc.learn_dictionary(W, X, sc.L1(1.0), -1),
      "rounds must be an integer of at least 0",
    ),
  ],
)
def test_bad_input(call, message):
  with pytest.raises(ValueError, match=message):
    call()
