import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import finetuning
from tests.oracles import finetuning as oracle

RNG = np.random.default_rng(0)
SHAPES = {"a": (4, 5), "b": (7,), "c": (2, 3)}


def drawn():
  return {
    n: jnp.asarray(RNG.integers(-9, 9, s), jnp.float32)
    for n, s in SHAPES.items()
  }


def trained(start, masks):
  other = drawn()
  return {n: jnp.where(masks[n], other[n], p) for n, p in start.items()}


def masks():
  return {n: RNG.random(s) < 0.4 for n, s in SHAPES.items()}


def flat(tree):
  return [np.asarray(tree[n]) for n in SHAPES]


def test_differences_add_up():
  start, first, second = drawn(), masks(), masks()
  task, language = trained(start, first), trained(start, second)
  found = finetuning.delta(task, start, first)
  also = finetuning.delta(language, start, second)
  want = oracle.sparse_difference(flat(start), flat(task), flat(first))
  for n, entries in zip(SHAPES, want, strict=True):
    index = np.asarray(found.choices[n].index).tolist()
    values = found.parts[n].tolist()
    assert list(zip(index, values, strict=True)) == entries
  rest = oracle.sparse_difference(flat(start), flat(language), flat(second))
  compose = jax.jit(finetuning.compose)
  # Integers: sums in f32 are exact.
  got = compose(start, found, also)
  for g, w in zip(
    flat(got), oracle.compose(flat(start), [want, rest]), strict=True
  ):
    np.testing.assert_array_equal(g, w)
  one = compose(start, found)
  for g, w in zip(flat(one), flat(task), strict=True):
    np.testing.assert_array_equal(g, w)
  assert finetuning.compose(start) == start
  grads = jax.grad(lambda s: finetuning.compose(s, found)["a"].sum())(start)
  assert (grads["a"] == 1).all()


def test_any_choice_bf16_and_bits_outside():
  start = jax.tree.map(lambda x: -jnp.abs(x).astype(jnp.bfloat16), drawn())
  chosen = {
    "a": finetuning.Slice(1, 2, 4),
    "c": finetuning.Blocks(np.array([[1, 0]]), (1, 3)),
  }
  tuned = jax.tree.map(lambda x: x * 1.37, start)
  found = finetuning.delta(tuned, start, chosen)
  got = finetuning.compose(start, found)
  outside = {n: np.ones(s, bool) for n, s in SHAPES.items()}
  outside["a"][:, 2:4] = outside["c"][1] = False
  for n, where in outside.items():
    words = [np.asarray(x[n]).view(np.uint16)[where] for x in (got, start)]
    np.testing.assert_array_equal(*words)
    assert got[n].dtype == jnp.bfloat16
  # An f32 difference of bf16 numbers, rounded once, gives them back.
  np.testing.assert_array_equal(got["a"][:, 2:4], tuned["a"][:, 2:4])
  np.testing.assert_array_equal(got["c"][1], tuned["c"][1])


def test_bad_input():
  start = drawn()
  with pytest.raises(ValueError, match="start must be like params"):
    finetuning.delta(start, start | {"a": start["b"]}, {})
  with pytest.raises(ValueError, match="deltas must be made by delta"):
    finetuning.compose(start, start)
  found = finetuning.delta(start, start, {"a": True})
  with pytest.raises(ValueError, match=r"deltas must be of start.*'a'"):
    finetuning.compose({"b": start["b"]}, found)
