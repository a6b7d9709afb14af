import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import finetuning
from tests.oracles import finetuning as oracle


@pytest.mark.parametrize("tolerance", [0.0, 1e-5, 0.5])
def test_update_sparsity(tolerance):
  rng = np.random.default_rng(0)
  before = [rng.normal(size=s).astype(np.float32) for s in ((3, 5), (7,), ())]
  # Changes far from every tolerance, so that f32 and f64 agree.
  change = rng.choice([0.0, 1e-6, 1e-3, 1.0], (3, 3, 5))
  after = [
    (b + c.ravel()[: b.size].reshape(b.shape)).astype(np.float32)
    for b, c in zip(before, change, strict=True)
  ]
  got = finetuning.update_sparsity(before, after, tolerance=tolerance)
  want = oracle.update_sparsity(before, after, tolerance)
  np.testing.assert_allclose(got, want, rtol=1e-6)  # of an f32 quotient
  masks = finetuning.update_masks(before, after, tolerance=tolerance)
  for m, b, a in zip(masks, before, after, strict=True):
    np.testing.assert_array_equal(m, oracle.update_mask(b, a, tolerance))


def test_limits_and_bf16():
  x = {"w": jnp.arange(5.0, dtype=jnp.bfloat16), "b": jnp.zeros((0, 3))}
  assert finetuning.update_sparsity(x, x) == 1
  assert finetuning.update_sparsity(x, x | {"w": x["w"] + 1}) == 0
  nan = x | {"w": x["w"].at[0].set(jnp.nan)}
  assert finetuning.update_sparsity(x, nan) == jnp.float32(0.8)


def test_infinities_that_stay_are_no_change():
  x = jnp.array([jnp.inf, -jnp.inf, 1.0, jnp.nan])
  assert finetuning.update_masks(x, x).tolist() == [0, 0, 0, 1]
  assert finetuning.update_masks(x, -x).tolist() == [1, 1, 1, 1]


def test_bad_input():
  x = jnp.zeros((2, 3))
  with pytest.raises(ValueError, match="after must be like before"):
    finetuning.update_sparsity({"w": x}, {"w": x.T})
  with pytest.raises(ValueError, match="after must be like before"):
    finetuning.update_sparsity({"w": x}, {"v": x})
  with pytest.raises(ValueError, match="tolerance must be at least 0, got -1"):
    finetuning.update_sparsity(x, x, tolerance=-1)
  with pytest.raises(ValueError, match="before must have entries"):
    finetuning.update_sparsity({}, {})
