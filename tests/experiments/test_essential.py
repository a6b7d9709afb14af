"""Essential sparsity: masks of a whole encoder, and where curves fall."""

import functools
import json
import types

from flax import nnx
import numpy as np
import pytest

from experiments import essential
from experiments import prune
from experiments.models import bert
from experiments.procedures import under_masks

CONFIG = bert.Config(
  vocab_size=8,
  hidden_size=16,
  num_hidden_layers=2,
  num_attention_heads=2,
  intermediate_size=24,
  max_position_embeddings=8,
)


@functools.cache
def model():
  return bert.Bert(CONFIG, rngs=nnx.Rngs(0))


@functools.cache
def params():
  return nnx.to_pure_dict(nnx.state(model(), nnx.Param))


def pruned(tree):
  """The weights that may be pruned, one behind the other, and all others."""
  leaves = essential.paths.named(tree)[0]
  own = [n for n, p in params_by_name().items() if essential.where(n, p)]
  others = [leaves[n] for n in leaves if n not in own]
  return [np.asarray(leaves[n]) for n in own], others


@functools.cache
def params_by_name():
  return essential.paths.named(params())[0]


def test_what_is_pruned_is_the_linear_layers_of_blocks():
  own, others = pruned(params())
  assert len(own) == 2 * 6  # query, key, value, output, and two of the MLP
  assert sum(x.size for x in own) == 2 * (4 * 16 * 16 + 2 * 16 * 24)
  assert len(others) > 12


def test_magnitudes_are_ranked_in_all_blocks_together():
  masks, others = pruned(essential.masks_of(params(), "magnitude", 0.3))
  sizes = np.abs(np.concatenate([x.ravel() for x in pruned(params())[0]]))
  kept = np.concatenate([m.ravel() for m in masks])
  assert kept.sum() == len(sizes) - int(0.3 * len(sizes) + 0.5)
  assert sizes[kept].min() >= sizes[~kept].max()
  assert all(m.all() for m in others)


def test_random_masks_keep_as_many_of_each_layer():
  counts = [
    m.sum() for m in pruned(essential.masks_of(params(), "magnitude", 0.6))[0]
  ]
  masks = [essential.masks_of(params(), "random", 0.6, seed) for seed in (0, 1)]
  for found in masks:
    assert [m.sum() for m in pruned(found)[0]] == counts
  first, second = (pruned(found)[0] for found in masks)
  assert any((a != b).any() for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("n", [1, 6])
def test_n_of_8_keeps_n_of_each_group(n):
  masks, others = pruned(essential.masks_of(params(), "n:8", 1 - n / 8))
  for mask in masks:
    groups = mask.reshape(-1, 8, mask.shape[1])
    assert (groups.sum(1) == n).all()
  assert all(m.all() for m in others)


def test_runs_have_a_seed_where_nothing_is_drawn():
  found = essential.runs([0.5, 0.9], seeds=3)
  assert [r for r in found if r[0] == "magnitude"] == [
    ("magnitude", 0.5, 0),
    ("magnitude", 0.9, 0),
  ]
  assert [r[1] for r in found if r[0] == "n:8"] == [i / 8 for i in range(1, 8)]
  assert len([r for r in found if r[0] == "random"]) == 6


@pytest.mark.parametrize(
  ("values", "expected"),
  [
    ([1.0, 0.991, 0.995, 0.98], 0.4),
    ([1.0, 0.99, 1.0, 1.0], 0.0),  # a share that is lost is not less than it
    ([1.0, 1.0, 1.0, 1.0], 0.6),
    ([0.5, 0.496, 0.4, 0.5], 0.2),  # what comes back later does not count
  ],
)
def test_essential_is_before_the_first_loss(values, expected):
  assert essential.essential([0, 0.2, 0.4, 0.6], values, 0.01) == expected


def test_a_cliff_is_found_where_it_is():
  at = [i / 20 for i in range(20)]
  values = [1 / (1 + np.exp(40 * (x - 0.62))) for x in at]
  assert essential.steepest(at, values) == pytest.approx(0.625)
  assert essential.essential(at, values, 0.01) == 0.5


class Measured:
  """Stands for prune.Measured: a figure that falls with what is masked."""

  def __init__(self, source, *, seeds, calibration, evaluation):
    assert (source, seeds, calibration, evaluation) == ("small", 1, 1, 7)
    self.model = model()
    self.about = {"model": "none", "calibration": {0: "abc"}}
    self.about["split"] = "7 pairs evaluate all seeds, 1 docstring calibrates"
    self.dense = {"retrieval": 1.0, "fidelity": 1.0, "kept": 1.0}

  def figures(self, model):
    leaves = pruned(nnx.to_pure_dict(nnx.state(model, nnx.Param)))[0]
    own = np.concatenate([x.ravel() for x in leaves])
    full = np.concatenate([x.ravel() for x in pruned(params())[0]])
    left = float((own**2).sum() / (full**2).sum())
    return {"retrieval": left, "fidelity": left**0.5, "kept": 0.5}


def test_a_run_writes_a_table_and_a_picture(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(prune, "Measured", Measured)
  given = types.SimpleNamespace(
    sparsity=["0.8", "0.2"],
    model="small",
    evaluation=7,
    seeds=2,
    loss=0.05,
    workdir=str(tmp_path / "found"),
  )
  monkeypatch.setattr(essential.flags, "FLAGS", given)
  essential.main(["essential"])
  found = json.loads((tmp_path / "found" / "essential.json").read_text())
  assert len(found["rows"]) == 2 + 7 + 4
  split = "7 pairs evaluate all seeds"
  assert found["about"] == {"model": "none", "split": split}
  rows = {(r["kind"], r["sparsity"], r["seed"]): r for r in found["rows"]}
  for sparsity in (0.2, 0.8):
    largest = rows["magnitude", sparsity, 0]["retrieval"]
    for seed in range(2):  # the smallest have less in them than others
      assert rows["random", sparsity, seed]["retrieval"] < largest
    density = rows["magnitude", sparsity, 0]["density"]
    assert density == pytest.approx(1 - sparsity, abs=1e-3)
  assert rows["n:8", 0.5, 0]["density"] == 0.5
  drops = {(d["kind"], d["figure"]): d for d in found["drops"]}
  assert len(drops) == 6
  assert drops["magnitude", "retrieval"]["essential"] == 0.2
  assert drops["random", "retrieval"]["essential"] == 0.0
  printed = capsys.readouterr().out
  assert "magnitude     20.0%" in printed and "essential  steepest" in printed
  assert (tmp_path / "found" / "essential.png").stat().st_size > 10_000
  # The dense model is as it was.
  for now, before in zip(
    pruned(nnx.to_pure_dict(nnx.state(model(), nnx.Param)))[0],
    pruned(params())[0],
    strict=True,
  ):
    np.testing.assert_array_equal(now, before)


@pytest.mark.parametrize("given", ["", "0,0.5", "0.5,1", "half"])
def test_sparsities_are_between_0_and_1(given):
  with pytest.raises(ValueError, match=r"--sparsity takes numbers between 0"):
    essential.given_sparsities(given.split(","))


def test_sparsities_rise():
  assert essential.given_sparsities(["0.5", "0.25", "0.5"]) == [0.25, 0.5]


def test_density_is_of_what_is_pruned():
  masks = essential.masks_of(params(), "n:8", 0.25)
  assert under_masks.density(masks, essential.where) == 0.75
