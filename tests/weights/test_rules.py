"""Rules that contradict themselves are refused by name."""

from absl.testing import parameterized
import pytest

from sparsejax.select import schedules
from sparsejax.select import structures
from sparsejax.weights import rules
from sparsejax.weights import scores

NM = structures.NM


class RuleTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ("every", dict(every=0), "every must be at least 1, got 0"),
    ("begin", dict(begin=-1), "begin must not be negative, got -1"),
    ("until", dict(until=-1), "until must not be negative, got -1"),
    ("sparsity", dict(sparsity=1.5), r"sparsity must be in \[0, 1\], got 1.5"),
    ("percent", dict(sparsity=90), r"sparsity must be in \[0, 1\], got 90"),
    ("negative", dict(sparsity=-0.1), r"sparsity must be .*got -0.1"),
    ("nan", dict(sparsity=float("nan")), r"sparsity must be .*got nan"),
    (
      "sparsity_by_path",
      dict(sparsity={"a": 0.5, "b": 2.0}),
      r"sparsity must be in \[0, 1\], got 2.0",
    ),
    (
      "unused_distribution",
      dict(sparsity={"a": 0.5}, distribution="erk"),
      "distribution must not be given where sparsity is by path",
    ),
    (
      "unknown_distribution",
      dict(sparsity=0.5, distribution="erkk"),
      "distribution must be .*'erk'.*got 'erkk'",
    ),
    ("grow", dict(grow=scores.gradient), "grow and drop_fraction must"),
    (
      "drop_fraction",
      dict(drop_fraction=schedules.constant(0.3)),
      "grow and drop_fraction must",
    ),
    ("memory", dict(memory=lambda p: p), "memory and remember must"),
    ("leak", dict(leak=schedules.constant(0.3)), "leak must .*dense=True"),
    (
      "backward",
      dict(sparsity=0.5, backward_sparsity=0.2),
      "backward_sparsity must come with dense=True",
    ),
    (
      "backward_range",
      dict(sparsity=0.5, backward_sparsity=-0.2, dense=True),
      "backward_sparsity must be",
    ),
    (
      "backward_above",
      dict(sparsity=0.5, backward_sparsity=0.7, dense=True),
      "backward_sparsity must be",
    ),
    (
      "staged_growth",
      dict(
        structure=((0, NM(2, 4)),),
        grow=scores.gradient,
        drop_fraction=schedules.constant(0.3),
      ),
      "stages .*must not come with grow",
    ),
    (
      "stages",
      dict(structure=((0, structures.Block((2, 2))),)),
      "stages must all be n:m",
    ),
    (
      "stages_backward",
      dict(structure=((0, NM(2, 4)),), backward_sparsity=0.2, dense=True),
      "backward_sparsity must not come with stages",
    ),
  )
  def test_contradictions(self, settings, message):
    with pytest.raises(ValueError, match=message):
      rules.Rule(**settings)

  def test_rules_that_draw_need_a_key(self):
    assert rules.Rule(sparsity=0.5).draws
    assert not rules.Rule(sparsity=0.5, initial=scores.magnitude).draws
    assert not rules.Rule(sparsity=0.5, initial=None).draws
    assert rules.Rule(
      sparsity=0.5,
      initial=None,
      grow=scores.random,
      drop_fraction=0.3,
      until=None,
    ).draws
