import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import routing
from tests.routing import problem


def test_sums_by_expert_and_edges_that_are_kept():
  logits, valid = problem.awkward(0)

  @problem.jit
  def f(logits, kept):
    found = routing.top_k(logits, 2, token_valid=valid)
    found = found.where(kept)
    return found, found.sizes, found.by_expert(found.weight)

  kept = np.arange(2 * problem.TOKENS) % 3 > 0
  found, sizes, sums = f(logits, kept)
  assert not np.asarray(found.valid)[~kept].any()
  assert not np.asarray(found.weight)[~np.asarray(found.valid)].any()
  want = np.zeros((2, problem.EXPERTS))
  for e in np.flatnonzero(found.valid):
    want[0, found.expert[e]] += 1
    want[1, found.expert[e]] += found.weight[e]
  np.testing.assert_array_equal(sizes, want[0])
  assert sizes.dtype == jnp.int32
  problem.close(sums, want[1])
  assert (found.num_tokens, found.num_experts) == logits.shape


@pytest.mark.parametrize("kept", [np.ones(4, bool), np.ones(6)])
def test_errors(kept):
  found = routing.by_id(jnp.zeros(6, int), 2)
  with pytest.raises(ValueError, match=r"^kept must be bool\[6\], got"):
    found.where(kept)
