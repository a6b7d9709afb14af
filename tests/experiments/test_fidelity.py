"""Claims: what is run for them, and what is made of it."""

import itertools
import json
import types

import pytest

from experiments import claims
from experiments import fidelity

SMALL = {
  "steps": 20,
  "eval_every": 10,
  "batch_size": 16,
  "task.name": "digits",
  "model.width": 16,
  "model.depth": 1,
  "optimizer.warmup_steps": 2,
}
CLAIM = claims.Claim(
  says="Something.",
  source="Someone",
  arms={
    "static": SMALL | {"method": {"name": "static", "sparsity": 0.9}},
    "dense": SMALL,
  },
  better=(("dense", "static"),),
  grid={"optimizer.learning_rate": (1e-4, 0.3)},
)


def test_a_claim_is_tested_tuned_and_kept(tmp_path, monkeypatch):
  result = fidelity.test(CLAIM, range(5), tmp_path)
  assert set(result["arms"]) == {"static", "dense"}
  assert len(result["values"]["static"]) == len(set(result["seeds"])) == 5
  # Learning at 1e-4 is no learning.
  assert result["arms"]["dense"]["tuned"] == {"optimizer.learning_rate": 0.3}
  (effect,) = result["effects"]
  assert effect["low"] < effect["mean"] < effect["high"]
  costs = {n: arm["training_flops"] for n, arm in result["arms"].items()}
  assert costs["static"] == pytest.approx(0.1 * costs["dense"], rel=0.01)
  # A grid of two on three seeds and then five, for two arms; no run twice.
  assert len(list(tmp_path.iterdir())) == 2 * (2 * 3 + 5)
  monkeypatch.setattr(fidelity, "run", lambda *_: pytest.fail("run twice"))
  assert fidelity.test(CLAIM, range(5), tmp_path) == result
  json.dumps(result)
  card = fidelity.card("a_claim", CLAIM, result)
  assert card.startswith(f"# a_claim: {result['verdict']}\n")
  assert "| dense - static |" in card


def test_runs_of_a_seed_are_equal_and_of_two_are_not():
  config = fidelity.changed(claims.config(), CLAIM.arms["static"])
  first, second = fidelity.run(config, [0, 1])
  assert fidelity.run(config, [1]) == [second]
  assert first != second


@pytest.mark.parametrize("name", claims.CLAIMS)
def test_every_claim_is_well_formed(name):
  claim = claims.CLAIMS[name]
  assert claim.says and claim.source
  for arm in itertools.chain(*claim.better):
    assert arm in claim.arms
  for arm in claim.arms.values():
    config = fidelity.changed(claims.config(), arm)
    assert config.steps % config.eval_every == 0
    fidelity.experiment.make(config)


def test_unknown_claims_and_too_few_seeds_are_refused(tmp_path):
  with pytest.raises(ValueError, match=r"--claim takes one of .*'none_such'"):
    fidelity.chosen("none_such")
  with pytest.raises(ValueError, match=r"--seeds takes 5 or more; got 4"):
    fidelity.test(CLAIM, range(4), tmp_path)


def test_an_unknown_claim_leaves_no_directories(tmp_path, monkeypatch):
  cards, workdir = tmp_path / "cards", tmp_path / "runs"
  given = types.SimpleNamespace(claim="no", cards=cards, workdir=workdir)
  monkeypatch.setattr(fidelity.flags, "FLAGS", given)
  with pytest.raises(ValueError, match=r"--claim takes .* got 'no'"):
    fidelity.main([])
  assert not list(tmp_path.iterdir())


def test_all_stands_for_every_claim():
  assert fidelity.chosen("all") == list(claims.CLAIMS)
  assert fidelity.chosen("erk_uniform") == ["erk_uniform"]
