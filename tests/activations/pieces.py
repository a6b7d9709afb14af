"""What tests of activations share: draws, and comparisons."""

import numpy as np

from tests import common
from tests.kernels import problem

jit = problem.jit


def draw(seed, *shape):
  """Normal, f32."""
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def close(got, want, tolerance=1e-5):
  """Sums of a few dozen f32 terms of size one are right to about 1e-6."""
  np.testing.assert_allclose(
    common.float64(got), want, rtol=tolerance, atol=tolerance
  )
