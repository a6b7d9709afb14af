"""Names of leaves, across the boxes that parameters come in."""

import dataclasses

from absl.testing import parameterized
from flax import linen as nn
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
import jax
import jax.numpy as jnp

from sparsejax import paths

TREES = st.recursive(
  st.integers(),
  lambda t: (
    st.dictionaries(st.text("abc_", min_size=1, max_size=3), t, max_size=3)
    | st.lists(t, max_size=3)
    | st.tuples(t, t)
  ),
  max_leaves=8,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Pair:
  value: int
  other: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TwoValues:
  value: int
  raw_value: int


class NamedTest(parameterized.TestCase):
  @given(tree=TREES)
  def test_roundtrip(self, tree):
    leaves, rebuild = paths.named(tree)
    self.assertLen(leaves, len(jax.tree.leaves(tree)))
    self.assertEqual(list(leaves.values()), jax.tree.leaves(tree))
    self.assertEqual(rebuild(leaves), tree)
    twice = rebuild({n: 2 * x for n, x in leaves.items()})
    self.assertEqual(twice, jax.tree.map(lambda x: 2 * x, tree))

  def test_names(self):
    tree = {"a": [1, {"kernel": 2}], "b": (3,), "c": None, "d": {}}
    leaves, _ = paths.named(tree)
    self.assertEqual(leaves, {"a/0": 1, "a/1/kernel": 2, "b/0": 3})
    self.assertEqual(list(paths.named(5)[0]), [""])

  def test_rebuild_takes_any_order_and_more_names(self):
    _, rebuild = paths.named({"a": 1, "b": 2})
    self.assertEqual(rebuild({"z": 0, "b": 4, "a": 3}), {"a": 3, "b": 4})
    with self.assertRaises(KeyError):
      rebuild({"a": 1})

  def test_boxes_share_names(self):
    plain = {"Dense_0": {"bias": 0, "kernel": 0}}
    init = nn.with_partitioning(nn.initializers.ones, ("x", None))
    boxed = nn.Dense(2, kernel_init=init).init(
      jax.random.key(0), jnp.ones((1, 3))
    )["params"]
    names = list(paths.named(plain)[0])
    self.assertEqual(list(paths.named({"Dense_0": boxed})[0]), names)

  def test_nnx(self):
    class Model(nnx.Module):
      def __init__(self, rngs):
        self.first = nnx.Linear(2, 3, rngs=rngs)
        self.rest = nnx.List([nnx.Linear(3, 3, rngs=rngs)])

    model = Model(nnx.Rngs(0))
    want = ["first/bias", "first/kernel", "rest/0/bias", "rest/0/kernel"]
    state = nnx.state(model, nnx.Param)
    self.assertEqual(list(paths.named(state)[0]), want)
    self.assertEqual(list(paths.named(nnx.to_pure_dict(state))[0]), want)
    leaves, rebuild = paths.named(state)
    again = rebuild({n: 2 * x for n, x in leaves.items()})
    self.assertEqual(jax.tree.structure(again), jax.tree.structure(state))

  def test_a_key_called_value_is_a_name(self):
    tree = {"query": {"kernel": 1}, "value": {"kernel": 2}, "x": {"value": 3}}
    want = {"query/kernel": 1, "value/kernel": 2, "x/value": 3}
    self.assertEqual(paths.named(tree)[0], want)

  @parameterized.parameters(
    {"tree": {"a/b": 1, "a": {"b": 2}}},
    {"tree": TwoValues(1, 2)},
    {"tree": {"x": Pair(1, 2), "x/other": 3}},
  )
  def test_no_leaf_is_lost(self, tree):
    """Two leaves of one name: told apart or refused, never mixed up."""
    try:
      leaves, rebuild = paths.named(tree)
    except ValueError:
      return
    self.assertLen(leaves, len(jax.tree.leaves(tree)))
    self.assertEqual(rebuild(leaves), tree)


class MatchingTest(parameterized.TestCase):
  NAMES = ("embed", "layers/0/mlp/kernel", "layers/10/mlp/kernel", "out/kernel")

  @parameterized.parameters(
    ({}, {}),
    ({"kernel": 1}, {1: 1, 2: 1, 3: 1}),
    ({"": 1}, {0: 1, 1: 1, 2: 1, 3: 1}),
    ({"mlp": 8, "kernel$": 4}, {1: 8, 2: 8, 3: 4}),
    ({"layers/0/": 1, "layers": 2}, {1: 1, 2: 2}),
    ({"layers/1": None, "^out": 0.5}, {2: None, 3: 0.5}),
    ({r"layers/\d/": 7}, {1: 7}),
    ({"^embed$|^out": 3}, {0: 3, 3: 3}),
  )
  def test_first_pattern_found(self, patterns, want):
    got = paths.matching("rank", patterns, iter(self.NAMES))
    self.assertEqual(got, {self.NAMES[i]: v for i, v in want.items()})

  def test_a_pattern_that_matches_nothing(self):
    patterns = {"kernel": 1, "^mlp": 2}
    with self.assertRaisesRegex(ValueError, r"^rank has a pattern.*'\^mlp'"):
      paths.matching("rank", patterns, self.NAMES)
    with self.assertRaisesRegex(ValueError, r"^where has a pattern"):
      paths.matching("where", {"a": 1}, [])
