"""Metrics of codes and dictionaries, against the oracle and known mistakes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
import numpy as np
import pytest
import scipy.optimize

from sparsejax import sparse_coding
from sparsejax.sparse_coding import Code
from sparsejax.sparse_coding import Statistics
from tests import common
from tests.kernels import problem
from tests.oracles import sparse_metrics as oracle

assert_close = functools.partial(
  np.testing.assert_allclose, rtol=1e-5, atol=1e-6
)
density = problem.jit(sparse_coding.density)
add = problem.jit(lambda found, *batch: found.add(*batch))


def draw(seed, rows=(9,), k=3, latents=7, width=4):
  """x, a reconstruction, a Code with zeros and signs, and it dense."""
  rng = np.random.default_rng(seed)
  x, noise = rng.normal(size=(2, *rows, width)).astype(np.float32)
  shuffled = np.argsort(rng.random((*rows, latents)), -1)[..., :k]
  values = rng.normal(size=(*rows, k)).astype(np.float32)
  values[rng.random(values.shape) < 0.3] = 0
  code = Code(jnp.array(values), jnp.array(shuffled, jnp.int32), latents)
  return x + 2, x + 2 + 0.3 * noise, code, np.asarray(code.dense())


SHAPES = [((9,), 3), ((2, 5), 7), ((1,), 1), ((4,), 0)]


@pytest.mark.parametrize("rows,k", SHAPES)
def test_how_often_latents_are_active(rows, k):
  _, _, code, dense = draw(0, rows, k)
  flat = dense.reshape(-1, 7)
  want = oracle.density(flat)
  for given in (code, dense):
    assert_close(sparse_coding.l0(given), oracle.l0(flat))
    got = density(given)
    assert_close(got, want)
    dead = sparse_coding.dead_fraction(got)
    assert_close(dead, oracle.dead_fraction(want))
    dead = sparse_coding.dead_fraction(got, 0.15)
    assert_close(dead, oracle.dead_fraction(want, 0.15))
    often = sparse_coding.dense_fraction(got, 0.3)
    assert_close(often, oracle.dense_fraction(want, 0.3))


def test_fidelity():
  x, x_hat, _, _ = draw(1, (3, 5))
  flat = x.reshape(-1, 4), x_hat.reshape(-1, 4)
  for name in ("explained_variance", "shrinkage"):
    got = problem.jit(getattr(sparse_coding, name))(x, x_hat)
    assert_close(got, getattr(oracle, name)(*flat))
  losses = 2.0, 2.7, 5.0
  assert_close(
    sparse_coding.loss_recovered(*losses), oracle.loss_recovered(*losses)
  )
  half = jnp.asarray(x, jnp.bfloat16), jnp.asarray(x_hat, jnp.bfloat16)
  got = sparse_coding.explained_variance(*half)
  assert got.dtype == jnp.float32
  assert_close(got, oracle.explained_variance(*flat), rtol=0.02)


def test_the_mean_explains_nothing():
  """About zero, the mean of rows far from zero would explain nearly all."""
  x = 7 + np.random.default_rng(2).normal(size=(500, 3)).astype(np.float32)
  x_hat = np.broadcast_to(x.mean(0), x.shape)
  about_zero = 1 - ((x - x_hat) ** 2).sum() / (x**2).sum()
  assert about_zero > 0.97
  assert_close(sparse_coding.explained_variance(x, x_hat), 0, atol=1e-5)
  halfway = (x + x_hat) / 2
  got = sparse_coding.explained_variance(x, halfway)
  assert_close(got, 0.75, rtol=1e-4)


def test_ratios_of_sums_over_batches():
  """Small batches that are far apart vary little, each about its own mean."""
  rng = np.random.default_rng(3)
  centers = rng.normal(size=(6, 1, 4)) * 5
  x = (centers + rng.normal(size=(6, 8, 4))).astype(np.float32)
  x_hat = (x + rng.normal(size=x.shape)).astype(np.float32)
  found = Statistics.zeros(4, 7)
  for batch in zip(x, x_hat):
    found = add(found, *batch, np.zeros((8, 7), np.float32))
  want = oracle.explained_variance(x.reshape(-1, 4), x_hat.reshape(-1, 4))
  assert_close(found.explained_variance, want)
  of_batches = [oracle.explained_variance(*batch) for batch in zip(x, x_hat)]
  assert want > 0.9 and np.mean(of_batches) < 0.2
  # Losses, too: one batch at which ablating costs little would count most.
  clean, ablated = np.array([1.0, 1.0]), np.array([1.01, 9.0])
  spliced = np.array([1.1, 2.0])
  got = sparse_coding.loss_recovered(clean, spliced, ablated)
  assert_close(got, (10.01 - 3.1) / (10.01 - 2))
  assert np.mean((ablated - spliced) / (ablated - clean)) < -4


def test_reconstructions_of_scaled_inputs():
  """Both scaled change nothing; one of them scaled is another question."""
  x, x_hat, _, _ = draw(4, (50,))
  want = sparse_coding.explained_variance(x, x_hat)
  got = sparse_coding.explained_variance(0.1 * x, 0.1 * x_hat)
  assert_close(got, want, rtol=1e-4)
  assert sparse_coding.explained_variance(x, 0.1 * x_hat) < 0 < want


@pytest.mark.parametrize("kind", ["code", "dense"])
def test_statistics_are_those_of_all_valid_rows(kind):
  batches, kept = [], []
  for seed in range(3):
    x, x_hat, code, dense = draw(seed, (2, 5))
    valid = np.random.default_rng(seed).random((2, 5)) < 0.7
    x[~valid], x_hat[~valid] = np.nan, np.inf
    batches.append((x, x_hat, code if kind == "code" else dense, valid))
    kept.append((x[valid], x_hat[valid], dense[valid]))
  found = Statistics.zeros(4, 7)
  for batch in batches:
    found = add(found, *batch)
  x, x_hat, z = (np.concatenate(rows) for rows in zip(*kept))
  assert found.rows == len(x) < 30
  assert_close(found.l0, oracle.l0(z))
  assert_close(found.density, oracle.density(z))
  assert_close(found.explained_variance, oracle.explained_variance(x, x_hat))
  assert_close(found.shrinkage, oracle.shrinkage(x, x_hat))
  assert_close(found.mean, x.mean(0))
  # All at once, in a scan.
  stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *batches)
  step = lambda found, batch: (found.add(*batch), None)
  again, _ = jax.lax.scan(step, Statistics.zeros(4, 7), stacked)
  jax.tree.map(assert_close, again, found)
  none = add(Statistics.zeros(4, 7), *batches[0][:3], np.zeros((2, 5), bool))
  jax.tree.map(np.testing.assert_array_equal, none, Statistics.zeros(4, 7))


def test_statistics_of_rows_far_from_zero():
  rng = np.random.default_rng(5)
  x = (3000 + rng.normal(size=(4, 100, 2))).astype(np.float32)
  x_hat = x + rng.normal(size=x.shape).astype(np.float32) / 2
  found = Statistics.zeros(2, 1)
  for batch in zip(x, x_hat):
    found = add(found, *batch, np.ones((100, 1), np.float32))
  want = oracle.explained_variance(x.reshape(-1, 2), x_hat.reshape(-1, 2))
  # x itself is rounded to 1e-4 of what it varies by.
  assert_close(found.explained_variance, want, rtol=2e-3)


@pytest.mark.parametrize("spec", [("x",), (None, "x"), ("y", "x")])
def test_explicit_rows(spec):
  mesh = common.mesh_of(AxisType.Explicit)
  x, x_hat, code, dense = draw(6, (8, 4))
  place = functools.partial(common.place, mesh=mesh, spec=jax.P(*spec))
  placed = jax.tree.map(place, (x, x_hat, code, dense))
  for i in (2, 3):
    want = Statistics.zeros(4, 7).add(x, x_hat, (code, dense)[i - 2])
    got = add(Statistics.zeros(4, 7), *placed[:2], placed[i])
    jax.tree.map(assert_close, got, want)
  got = problem.jit(sparse_coding.description_length, static_argnums=1)(
    placed[2], 0.5
  )
  assert_close(got, oracle.description_length(dense.reshape(-1, 7), 0.5))


@pytest.mark.parametrize("sizes", [(3, 5), (5, 3)])
def test_mcc(sizes):
  rng = np.random.default_rng(7)
  mcc = problem.jit(sparse_coding.mcc)
  for _ in range(3):
    a, b = (rng.normal(size=(n, 6)).astype(np.float32) for n in sizes)
    assert_close(mcc(a, b), oracle.mcc(a, b))
  a[0] = 0  # an atom of length 0 is like no other
  assert_close(mcc(a, b), oracle.mcc(a, b))
  few = min(sizes)
  a[:few] = -2 * b[:few][::-1]
  assert_close(mcc(a, b), 1)


def test_mcc_of_many_atoms():
  rng = np.random.default_rng(8)
  a, b = (rng.normal(size=(n, 6)).astype(np.float32) for n in (40, 25))
  cosines = np.abs(oracle.cosines(a, b))
  pairs = scipy.optimize.linear_sum_assignment(-cosines)
  greedy = cosines.max(0).mean()  # what is not one to one
  got = problem.jit(sparse_coding.mcc)(a, b)
  assert_close(got, cosines[pairs].mean())
  assert got < greedy - 1e-3


ABSORPTION = ("absorption", "absorption_fraction")


@pytest.mark.parametrize("name", ABSORPTION)
def test_absorption(name):
  f, define = getattr(sparse_coding, name), getattr(oracle, name)
  strict = {} if name == "absorption" else {"most": 1}
  measures = {
    "code": ({}, problem.jit(f)),
    "dense": (
      dict(share_threshold=0.1, **strict),
      problem.jit(functools.partial(f, share_threshold=0.1, **strict)),
    ),
  }
  found = []
  for seed in range(12):
    rng = np.random.default_rng(seed)
    x, _, code, dense = draw(seed, (20,), k=2, width=3)
    code, dense = dataclasses.replace(code, values=abs(code.values)), abs(dense)
    dictionary = rng.normal(size=(7, 3)).astype(np.float32)
    dictionary[3] = 0
    probe = rng.normal(size=3).astype(np.float32)
    args = dictionary, probe, rng.random(20) < 0.8
    main = [[], [4], [1, 5]][seed % 3]
    padded = np.array([*main, 99, 99])[:2]  # there is no latent 99
    for given, (kind, (options, measure)) in zip(
      (code, dense), measures.items()
    ):
      want = define(x, dense, *args, main, **options)
      assert_close(measure(x, given, *args, padded), want, err_msg=kind)
      found.append(want)
  assert sum(0 < share < 1 for share in found) > 12
  nowhere = measure(x, dense, *args[:2], np.zeros(20, bool), padded)
  assert np.isnan(nowhere)
  got = f(x, code, *args, [])
  assert_close(got, define(x, dense, *args, []))


@problem.jit
def measure(*args):
  return [getattr(sparse_coding, name)(*args, [0]) for name in ABSORPTION]


def test_a_child_that_absorbs_its_parent():
  parent, child = np.eye(2, dtype=np.float32)
  present = np.array([True, True, True, False])
  x = np.array([parent, parent + child, parent + child, child])
  right = np.array([[1, 0], [1, 1], [1, 1], [0, 1]], np.float32)
  hole = np.array([[1, 0], [0, 1], [0, 1], [0, 1]], np.float32)
  both = np.array([[1, 0], [0.25, 1.5], [0, 1], [0, 1]], np.float32)
  apart, joined = np.eye(2), np.array([parent, parent + child])
  for z, dictionary, whole, part in [
    (right, apart, 0, 0),
    (hole, joined, 2 / 3, 2 / 3),
    (both, joined, 1 / 3, (0.75 + 1) / 3),
  ]:
    args = x, z, dictionary.astype(np.float32), 3 * parent, present
    assert_close(measure(*args), (whole, part))


def test_equal_absorbers():
  """Of two that give alike the first counts, which is not aligned."""
  dictionary = np.array([[0, 1], [1, 99], [1, 0]], np.float32)
  code = Code(jnp.ones((1, 2)), jnp.array([[2, 1]]), 3)
  args = np.array([1.0, 0.0]), np.array([True])
  x = np.array([[1.0, 0.0]], np.float32)
  for given in (code, np.asarray(code.dense())):
    got, _ = measure(x, given, dictionary, *args)
    want = oracle.absorption(x, code.dense(), dictionary, *args, [0])
    assert got == want == 0


@pytest.mark.parametrize("rows,k", SHAPES)
def test_description_length(rows, k):
  _, _, code, dense = draw(9, rows, k)
  length = problem.jit(sparse_coding.description_length, static_argnums=1)
  for bin in (0.5, 4.0):
    want = oracle.description_length(dense.reshape(-1, 7), bin)
    assert_close(length(code, bin), want)
    assert_close(length(dense, bin), want)


def test_ablate():
  _, _, code, dense = draw(10)
  want = dense * (np.arange(7) != 2) * (np.arange(7) != 6)
  for latents in ([2, 6], np.array([6, 2])):
    np.testing.assert_array_equal(sparse_coding.ablate(dense, latents), want)
    got = sparse_coding.ablate(code, latents)
    np.testing.assert_array_equal(got.dense(), want)
  one = problem.jit(sparse_coding.ablate)(code, 3)
  assert not one.dense()[:, 3].any()
  same = sparse_coding.ablate(dense, np.zeros(0, int))
  np.testing.assert_array_equal(same, dense)


def test_errors():
  x, x_hat, code, dense = draw(11)
  with pytest.raises(ValueError, match="same shape"):
    sparse_coding.explained_variance(x, x_hat[:1])
  with pytest.raises(ValueError, match="same shape"):
    sparse_coding.shrinkage(x, x_hat[0])
  with pytest.raises(ValueError, match="same batches"):
    sparse_coding.loss_recovered(1.0, np.ones(2), 3.0)
  with pytest.raises(ValueError, match="dictionary and truth"):
    sparse_coding.mcc(x, x[:, :2])
  with pytest.raises(ValueError, match="bin must be positive"):
    sparse_coding.description_length(code, 0)
  with pytest.raises(ValueError, match="latents must be integers"):
    sparse_coding.ablate(code, [0.5])
  with pytest.raises(ValueError, match="rows of x"):
    Statistics.zeros(4, 7).add(x, x_hat, dense[:1])
  with pytest.raises(ValueError, match="rows of x"):
    Statistics.zeros(4, 7).add(x, x_hat, code, np.ones(2, bool))
  good = (x, code, np.ones((7, 4)), np.ones(4), np.ones(9, bool), [0])
  for place, wrong, message in [
    (1, dense[:3], "rows of x"),
    (2, np.ones((7, 5)), "width of x"),
    (3, np.ones(3), "width of x"),
    (4, np.ones(9), "present, which is bool"),
    (5, [0.5], "main must be integers"),
  ]:
    args = [wrong if i == place else arg for i, arg in enumerate(good)]
    for name in ABSORPTION:
      with pytest.raises(ValueError, match=message):
        getattr(sparse_coding, name)(*args)
  with pytest.raises(ValueError, match="share_threshold"):
    sparse_coding.absorption(*good, share_threshold=0)
  with pytest.raises(ValueError, match="most must be"):
    sparse_coding.absorption_fraction(*good, most=0)


def test_counts_do_not_stop():
  found = sparse_coding.Statistics.zeros(2, 3)
  found = dataclasses.replace(
    found, rows=jnp.int32(2**24), active=jnp.full(3, 2**24, jnp.int32)
  )
  x = jnp.ones((1, 2))
  found = found.add(x, x, jnp.ones((1, 3)))
  assert found.rows == 2**24 + 1 and (found.active == 2**24 + 1).all()


def test_ablation_of_latents_that_there_are_not():
  for latents in ([-1], [3]):
    with pytest.raises(ValueError, match="latents must be from 0 to 2"):
      sparse_coding.ablate(jnp.ones((1, 3)), latents)
