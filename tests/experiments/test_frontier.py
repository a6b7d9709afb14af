"""Curves over L0 are read at the same places, and paired by seed."""

import numpy as np
import pytest

from experiments import claims
from experiments import dictionary
from experiments import frontier

CLAIM = claims.Frontier(
  says="Some are better.",
  source="A paper",
  differs="All is made up.",
  better=(("a", "b", "explained"), ("a", "b", "nearest")),
  besides=(("b", "a", "explained"),),
  at=(16, 64),
  config=None,
)


def row(variant, level, seed, l0, **figures):
  rest = dict.fromkeys(dictionary.COLUMNS, 0.5)
  own = {"variant": variant, "level": level, "seed": seed, "l0": l0}
  return rest | own | figures


def made(gain):
  """Two variants; a explains more by `gain`, and its atoms are farther."""
  rows = []
  for seed in range(5):
    for l0 in (8, 32):
      low = 0.1 * np.log2(l0) + 0.01 * seed
      rows.append(row("b", l0, seed, l0, explained=low, nearest=0.6))
      # Of other L0, as levels that are weights give.
      high = 0.1 * np.log2(l0 + 2) + 0.01 * seed + gain * (1 + seed / 100)
      rows.append(row("a", l0, seed, l0 + 2, explained=high, nearest=0.3))
  return rows


def test_a_curve_is_a_line_over_the_logarithm():
  rows = [row("a", 1, 0, 40, explained=0.8), row("a", 1, 0, 10, explained=0.6)]
  assert frontier.read_at(rows, "explained", 20) == pytest.approx(0.7)
  assert np.isnan(frontier.read_at(rows, "explained", 41))
  assert np.isnan(frontier.read_at(rows, "explained", 9))


@pytest.mark.parametrize(
  "gain, word", [(0.1, "holds"), (-0.1, "does not hold")]
)
def test_effects_are_read_at_equal_l0(gain, word):
  found = frontier.compared(CLAIM, made(gain), range(5))
  first, beyond, nearest, _, other, _ = found["effects"]
  assert first["verdict"] == word
  assert first["mean"] == pytest.approx(gain * 1.02, rel=1e-2)
  assert beyond["verdict"] == "not reached"  # b ends at 32
  assert nearest["mean"] == pytest.approx(0.3)  # of which less is better
  assert other["mean"] == pytest.approx(-first["mean"]) and not other["claimed"]
  count = {"holds": 1 + (gain > 0), "does not hold": int(gain < 0)}
  for said, number in count.items():
    assert f"{said} {number}" in found["verdict"]
  assert found["verdict"].endswith("of 4")


def test_the_card_shows_every_effect_and_figure():
  result = frontier.compared(CLAIM, made(0.1), range(5)) | {
    "about": {"model": "none"},
    "bounds": {"ablated": {"retrieval": 0.125}},
    "rows": made(0.1),
    "seeds": list(range(5)),
    "jax": "0",
  }
  card = frontier.card("a_claim", CLAIM, result)
  assert "| a, b | explained | holds: 0.1020 [" in card
  assert "| (b, a) | explained | does not hold: -0.1020 [" in card
  assert "| a | 8 | 10.0000 [10.0000, 10.0000] |" in card
  assert "| ablated | |" in card and "0.1250" in card
  rows = [line for line in card.splitlines() if line.startswith("| ")]
  assert len({line.count("|") for line in rows[:5]}) == 1
