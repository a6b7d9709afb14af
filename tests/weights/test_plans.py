"""Tables of counts: exact at every moment, for every kind of weight."""

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsejax.select import budgets
from sparsejax.select import schedules
from sparsejax.select import structures
from sparsejax.weights import plans
from sparsejax.weights import rules
from tests.oracles import select as oracle

STACK = structures.Axes(stack=(0,))


def shaped(**shapes):
  return {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in shapes.items()}


def plan_of(params, axes=structures.Axes(), where=None, **settings):
  return plans.make_plan(rules.Rule(**settings), params, where, axes)


def kept(plan, row=0):
  """Units of each parameter in all, at one moment."""
  return {
    n: np.asarray(leaf.keep)[min(row, len(leaf.keep) - 1)].tolist()
    for n, leaf in plan.leaves.items()
  }


def flat(tree):
  return {n: np.ravel(x).tolist() for n, x in tree.items()}


class CountsTest(parameterized.TestCase):
  @parameterized.product(
    distribution=["uniform", "uniform_plus", "er", "erk", "erk_plus"],
    density=[0.24, 0.31, 0.52, 0.77, 1.0],
  )
  def test_largest_remainder_over_leaves(self, distribution, density):
    shapes = dict(a=(3, 3, 4, 7), b=(28, 31), c=(31, 5))
    plan = plan_of(
      shaped(**shapes), sparsity=1 - density, distribution=distribution
    )
    sizes = {"a": 252, "b": 868, "c": 155}
    densities = getattr(oracle, distribution)(shapes, density)
    quotas = [round(densities[n] * sizes[n], 6) for n in shapes]
    total = sum(quotas)
    np.testing.assert_allclose(total, density * 1275, atol=1e-4)
    assert total % 1 != 0.5
    want = oracle.largest_remainder(quotas, round(total))
    assert flat(kept(plan)) == {n: [c] for n, c in zip(shapes, want)}

  def test_zero_density(self):
    for distribution in "uniform", "er", "erk", "global":
      plan = plan_of(
        shaped(a=(4, 6), b=(6, 3)), sparsity=1.0, distribution=distribution
      )
      assert flat(kept(plan)) == {"a": [0], "b": [0]}

  def test_each_layer_of_a_stack_is_a_layer(self):
    plan = plan_of(
      shaped(layers=(3, 10, 7), head=(7, 3)),
      axes={"layers": STACK},
      sparsity=0.75,
      distribution="erk",
    )
    shapes = dict(x=(10, 7), y=(10, 7), z=(10, 7), head=(7, 3))
    densities = oracle.erk(shapes, 0.25)
    quotas = [round(densities[n] * np.prod(s), 6) for n, s in shapes.items()]
    assert abs(sum(quotas) - 57.75) < 1e-5
    want = oracle.largest_remainder(quotas, 58)
    assert flat(kept(plan)) == {"layers": want[:3], "head": want[3:]}
    assert plan.leaves["layers"].keep.shape == (1, 3, 1, 1)

  def test_two_stack_axes(self):
    plan = plan_of(
      shaped(w=(2, 8, 3, 4)),
      axes=structures.Axes(stack=(0, 2), input=(1,), output=(3,)),
      sparsity=0.75,
    )
    assert plan.leaves["w"].keep.shape == (1, 2, 1, 3, 1)
    assert set(plan.leaves["w"].keep.ravel()) == {8}

  def test_global(self):
    params = shaped(a=(5, 7), b=(7, 2), bias=(2,))
    plan = plan_of(params, sparsity=0.7, distribution="global")
    assert plan.together
    assert kept(plan) == {"a": 15, "b": 15}  # round(0.3 * 49), of both

  def test_sparsity_by_path(self):
    plan = plan_of(
      shaped(**{"mlp/up": (8, 6), "mlp/down": (6, 8), "out": (8, 3)}),
      sparsity={"up": 0.5, "mlp": schedules.linear(0.0, 1.0, 0, 400)},
      until=400,
      every=100,
    )
    assert plan.steps == (0, 100, 200, 300, 400)
    for row, down in enumerate((48, 36, 24, 12, 0)):
      assert flat(kept(plan, row)) == {
        "mlp/up": [24],
        "mlp/down": [down],
        "out": [24],
      }

  def test_structure_by_path(self):
    plan = plan_of(
      shaped(a=(8, 6), b=(8, 4), c=(6, 6), d=(9, 8)),
      structure={
        "a": structures.NM(1, 4),
        "b": structures.Block((4, 2)),
        "d": structures.ConstantFanIn(),
      },
      sparsity=0.5,
      distribution="uniform",
    )
    # Of every 4; of 4 blocks; of 36 weights; of 9 inputs, of each of 8.
    assert flat(kept(plan)) == {"a": [1], "b": [2], "c": [18], "d": [4]}

  def test_structures_meet_their_target_count(self):
    shape = (12, 8)
    for structure, density in (
      (structures.Unstructured(), 0.4),
      (structures.Block((4, 2)), 0.4),
      (structures.Channel(), 0.4),
      (structures.Channel(0), 0.4),
      (structures.ConstantFanIn(), 0.4),
    ):
      plan = plan_of(
        shaped(w=shape),
        structure=structure,
        sparsity=1 - density,
        distribution="uniform",
      )
      (count,) = flat(kept(plan))["w"]
      groups = 8 if structure.rigid else 1
      got = count * groups * structure.unit_size(shape, structures.Axes())
      assert got == structure.target_count(shape, density), structure

  def test_units_of_one_size_share_a_remainder(self):
    # Blocks of 8 are not exchanged for single weights.
    plan = plan_of(
      shaped(a=(8, 3), b=(4, 4), c=(8, 4)),
      structure={"c": structures.Block((4, 2)), "b": structures.Block((4, 2))},
      sparsity=0.6,
      distribution="uniform",
    )
    counts = {n: c for n, (c,) in flat(kept(plan)).items()}
    assert counts["a"] == 10  # 9.6
    assert (counts["b"], counts["c"]) == (1, 1)  # 0.8 and 1.6 are 2 in all

  def test_a_budget_of_ones_own(self):
    def halves(shapes, density):
      del density
      return {n: 0.5 ** (i + 1) for i, n in enumerate(shapes)}

    plan = plan_of(
      shaped(a=(4, 4), b=(4, 4)), sparsity=0.9, distribution=halves
    )
    assert flat(kept(plan)) == {"a": [8], "b": [4]}


class TimesTest(parameterized.TestCase):
  def test_a_schedule_is_tabled_at_every_update(self):
    plan = plan_of(
      shaped(a=(16, 8)),
      sparsity=schedules.cubic(0.0, 0.9, 3, 23),
      distribution="uniform",
      begin=3,
      until=23,
      every=4,
    )
    assert plan.steps == (3, 7, 11, 15, 19, 23)
    for row, step in enumerate(plan.steps):
      density = 1 - oracle.cubic(step, 0.0, 0.9, 3, 23)
      assert flat(kept(plan, row)) == {"a": [round(128 * density)]}

  def test_drops_are_a_share_of_the_active(self):
    plan = plan_of(
      shaped(a=(16, 8), b=(8, 8)),
      sparsity=0.75,
      distribution="uniform",
      grow=lambda seen: seen.param,
      drop_fraction=schedules.cosine(0.3, 20),
      every=5,
      until=20,
    )
    for row, step in enumerate((0, 5, 10, 15, 20)):
      share = oracle.cosine(step, 0.3, 20)
      for n, count in ("a", 32), ("b", 16):
        drops = plan.leaves[n].drops
        assert drops[row].ravel().tolist() == [int(count * share)]

  def test_optax_schedules_serve(self):
    plan = plan_of(
      shaped(a=(16, 8)),
      sparsity=optax.linear_schedule(0.0, 1.0, 4),
      every=1,
      until=4,
    )
    got = [flat(kept(plan, row))["a"][0] for row in range(5)]
    assert got == [128, 96, 64, 32, 0]

  def test_equal_rows_are_one(self):
    plan = plan_of(
      shaped(a=(4, 4)), sparsity=schedules.constant(0.5), until=10**6
    )
    assert plan.leaves["a"].keep.shape[0] == 1

  def test_only_numbers_need_no_end(self):
    plan = plan_of(shaped(a=(4, 4)), sparsity=0.5, until=None)
    assert flat(kept(plan)) == {"a": [8]}
    with pytest.raises(ValueError, match="until must be given"):
      plan_of(
        shaped(a=(4, 4)),
        sparsity=schedules.linear(0.0, 0.5, 0, 10),
        until=None,
      )

  def test_backward_counts(self):
    plan = plan_of(
      shaped(a=(4, 4)),
      sparsity=0.75,
      backward_sparsity=0.5,
      distribution="uniform",
      dense=True,
    )
    leaf = plan.leaves["a"]
    assert leaf.keep.item() == 4 and leaf.backward.item() == 8


class WhereTest(parameterized.TestCase):
  def test_by_default(self):
    params = shaped(
      **{
        "dense/kernel": (4, 4),
        "dense/bias": (4,),
        "token_embedder/table": (4, 4),
        "LayerNorm_0/scale": (4, 4),
        "conv/kernel": (3, 3, 4, 4),
      }
    )
    params["ids"] = jax.ShapeDtypeStruct((4, 4), jnp.int32)
    plan = plan_of(params, sparsity=0.5)
    assert set(plan.leaves) == {"dense/kernel", "conv/kernel"}

  def test_a_pattern_or_a_function(self):
    params = shaped(a=(4, 4), b=(4, 4), bias=(4,))
    assert set(plan_of(params, where="b", sparsity=0.5).leaves) == {
      "b",
      "bias",
    }
    plan = plan_of(params, where=lambda n, p: n == "a", sparsity=0.5)
    assert set(plan.leaves) == {"a"}

  def test_every_budget_has_a_name(self):
    for name in budgets.BUDGETS:
      assert plan_of(
        shaped(a=(4, 4), b=(8, 8), c=(8, 4)), sparsity=0.4, distribution=name
      ).leaves
