"""R-Sparse against loops, its limits, and where a split is worth it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import activations
from tests import common
from tests.activations import pieces
from tests.oracles import activations as oracle

KERNEL, X = pieces.draw(0, 7, 5), pieces.draw(1, 6, 7)


@pieces.jit
def run(x, kernel, fit, cotangent):
  y, back = jax.vjp(lambda x: activations.r_sparse(x, kernel, fit), x)
  return y, back(cotangent)[0], fit.strong(x)


def fitted(sparsity, share):
  fit = lambda kernel, x: activations.r_sparse_fit(
    kernel, x, sparsity=sparsity, share=share
  )
  return pieces.jit(fit)(KERNEL, X)


@pytest.mark.parametrize("sparsity,share", [(0.3, 0.6), (0.5, 1.0), (0.2, 0.0)])
def test_it_equals_a_loop(sparsity, share):
  fit = fitted(sparsity, share)
  _, rank, zeros = oracle.r_sparse_budget(7, 5, sparsity, share)
  assert fit.left.shape == (7, rank) and fit.right.shape == (rank, 5)
  scale = oracle.r_sparse_scale(KERNEL) if rank else np.ones(7)
  pieces.close(fit.scale, scale)
  exact = oracle.kth_smallest(X * scale, zeros)
  # Of 42 sizes the quantile lies between two neighbors.
  np.testing.assert_allclose(fit.threshold, exact, 0.15)
  y, gradient, strong = run(X, KERNEL, fit, np.ones((6, 5), np.float32))
  threshold = float(fit.threshold)
  pieces.close(y, oracle.r_sparse(X, KERNEL, threshold, rank, scale))
  low = oracle.low_rank(KERNEL, rank)
  used = np.where((np.asarray(strong) != 0)[..., None], KERNEL, low)
  pieces.close(gradient, used.sum(-1))


def test_nothing_weak_and_the_full_rank_are_dense():
  fit = fitted(0.0, 1.0)
  assert fit.threshold == 0 and fit.left.shape[1] == 0
  pieces.close(run(X, KERNEL, fit, np.ones((6, 5)))[0], X @ KERNEL)
  u, s, vt = np.linalg.svd(KERNEL, full_matrices=False)
  full = activations.RSparse(jnp.float32(np.inf), jnp.ones(7), u * s, vt)
  y, _, strong = run(X, KERNEL, full, np.ones((6, 5)))
  assert not strong.any()
  pieces.close(y, X @ KERNEL)


def test_a_split_is_best_of_heavy_tails_and_decaying_spectra():
  u, _ = np.linalg.qr(pieces.draw(2, 64, 64))
  v, _ = np.linalg.qr(pieces.draw(3, 64, 64))
  kernel = (u * 0.75 ** np.arange(64)) @ v.T
  x = pieces.draw(4, 256, 64) ** 3
  share, errors = activations.r_sparse_search(
    jnp.asarray(kernel), jnp.asarray(x), sparsity=0.7
  )
  assert 0 < share < 1
  assert errors.min() < 0.7 * min(errors[0], errors[-1])


@pytest.mark.parametrize("sparsity", [0.0, 0.37, 1.0])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_budget_equals_the_authors(sparsity, share):
  for shape in (10, 8), (1, 1), (4096, 11008):
    got = activations.r_sparse_budget(*shape, sparsity, share)
    assert got == oracle.r_sparse_budget(*shape, sparsity, share)
    rows, rank, _ = got
    spent = rows * shape[1] + rank * sum(shape)
    # int of a product that rounding made a little too large.
    assert spent <= shape[0] * shape[1] * (1 - sparsity) * (1 + 1e-9)


@pytest.mark.parametrize("axis_type", common.AXIS_TYPES)
def test_eight_devices(axis_type):
  mesh = common.mesh_of(axis_type)
  kernel, x = pieces.draw(21, 8, 6), pieces.draw(22, 4, 8)
  fit = lambda kernel, x: activations.r_sparse_fit(kernel, x, sparsity=0.4)
  with jax.set_mesh(mesh):
    rows = common.place(kernel, mesh, jax.P("x", "y"))
    placed = common.place(x, mesh, jax.P(None, "x"))
    got = jax.jit(fit)(rows, placed)
  want = fit(kernel, x)
  pieces.close(got.threshold, want.threshold)
  # Either sign of a pair of singular vectors will do.
  pieces.close(got.left @ got.right, want.left @ want.right)


def test_bad_input():
  with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\], got 2"):
    activations.r_sparse_budget(2, 2, 2, 0.5)
  with pytest.raises(ValueError, match="share must be in"):
    activations.r_sparse_fit(KERNEL, X, sparsity=0.5, share=-1.0)
  with pytest.raises(ValueError, match="kernel and x must be"):
    activations.r_sparse_fit(KERNEL.T, X, sparsity=0.5)
  with pytest.raises(ValueError, match="x, kernel and fit must be"):
    activations.r_sparse(X[:, :3], KERNEL, fitted(0.5, 1.0))
  with pytest.raises(ValueError, match="shares must hold at least one"):
    activations.r_sparse_search(KERNEL, X, sparsity=0.5, shares=())
