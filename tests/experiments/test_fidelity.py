"""Claims: what is run for them, and what is made of it."""

import dataclasses
import inspect
import itertools
import json
import types

import pytest

from experiments import claims
from experiments import comparisons
from experiments import dictionary
from experiments import fidelity
from experiments import prune

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
METRICS = {
  *("accuracy", "loss"),  # of tasks, and of mixtures of experts:
  *("active", "dropped", "max_violation"),
  *("inference_flops", "parameters"),  # of any run
}


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


def test_a_claim_of_two_metrics_says_what_less_is(tmp_path, monkeypatch):
  def run(config, seeds):
    good = config.model.width == 8
    return [
      {
        "loss": (1 if good else 2) + seed,
        "active": 2.0 if good else 1.0 + seed / 100,
        "accuracy": 0.5 + 0.25 * good,
        "parameters": 123,
        "training_flops": 10.0,
      }
      for seed in seeds
    ]

  monkeypatch.setattr(fidelity, "run", run)
  claim = claims.Claim(
    says="Something.",
    source="Someone",
    arms={"good": {"model.width": 8}, "bad": {"model.width": 4}},
    better=(("good", "bad"), ("good", "bad", "accuracy")),
    besides=(("good", "bad", "active"),),
    metric="loss",
    grid={"optimizer.learning_rate": (0.1,)},
    shows=("parameters",),
    config=lambda: claims.config(),
  )
  result = fidelity.test(claim, range(5), tmp_path)
  # More experts a token, of which less is better, is claimed by nobody.
  assert result["verdict"] == "reproduced"
  loss, accuracy, active = result["effects"]
  assert loss["mean"] == pytest.approx(1) and loss["metric"] == "loss"
  assert accuracy["mean"] == pytest.approx(0.25) and accuracy["claimed"]
  assert active["mean"] == pytest.approx(-0.98) and not active["claimed"]
  assert result["values"]["accuracy"]["bad"] == [0.5] * 5
  json.dumps(result)
  card = fidelity.card("a_claim", claim, result)
  for line in (
    "| arm | validation loss | accuracy | active | parameters | training FLOPs",
    "| effect | loss | accuracy | active |",
    "| 123 | 10 |",
    "of loss and active less is better",
    "Of effects in brackets nothing is claimed",
  ):
    assert line in card
  (row,) = [line for line in card.splitlines() if "| good, bad |" in line]
  assert row.startswith(
    "| good, bad | holds: 1 | holds: 0.25 | (does not hold: -0.98"
  )


def test_a_run_of_mixtures_counts_what_was_run(tmp_path):
  (tmp_path / "a").write_text("0123456789" * 200)
  changes = {
    "steps": 4,
    "eval_every": 2,
    "batch_size": 2,
    "task.path": str(tmp_path / "a"),
    "task.sequence_length": 7,
    "task.validation_batches": 1,
    "model.width": 8,
    "model.heads": 2,
    "model.depth": 1,
    "model.hidden": 8,
    "optimizer.warmup_steps": 0,
  }
  config = fidelity.changed(claims.mixtures(), changes)
  (result,) = fidelity.run(config, [0])
  assert result["active"] == 2
  # Attention, a router, two experts of eight, the readout; and the scores.
  weights = 4 * 8 * 8 + 8 * 8 + 2 * 2 * 8 * 8 + 8 * 256
  attention = 2 * 28 * 2 * 8
  assert result["inference_flops"] == 2 * 7 * weights + attention
  assert result["training_flops"] == 3 * result["inference_flops"] * 2 * 4
  embedding, norms = 256 * 8, 3 * 8
  idle = 6 * 2 * 8 * 8
  assert result["parameters"] == weights + embedding + norms + idle


class Figures:
  """Stands for a pruned model: figures that a claim can be read off."""

  def __init__(self, source, *, seeds):
    assert (source, seeds) == ("minilm", 5)
    self.dense = {"retrieval": 0.5}
    self.about = {
      "model": "none",
      "text": "no text",
      "split": "6 pairs",
      "context": "8 tokens",
      "calibration": dict(enumerate("abcde")),
    }

  def row(self, name, point, seed):
    sign = {"wanda": 1, "dsnot": -1}[name] * (-1) ** (seed // 2)
    return {
      "method": name,
      "structure": point[0],
      "sparsity": point[1],
      "seed": seed,
      "error": {"wanda": 0.3, "dsnot": 0.2}[name],  # DSnoT is better,
      "retrieval": 0.4 + 0.1 * (name == "wanda") + seed / 100,  # and worse,
      "fidelity": 0.5 + 0.1 * sign * (seed % 2),  # and neither
    }


def test_a_claim_of_pruning_is_tested_and_kept(tmp_path, monkeypatch):
  monkeypatch.setattr(prune, "Measured", Figures)
  points = (("unstructured", 0.5), ("2:4", 0.5))
  claim = claims.Pruning(
    says="Something.",
    source="Someone",
    differs="All.",
    better={("dsnot", "wanda"): points},
    besides={("wanda", "dsnot"): points[:1]},
  )
  result = fidelity.test_pruning(claim, range(5), tmp_path)
  assert result["verdict"] == "holds 2, does not hold 2, undecided 2 of 6"
  first, second, third = result["effects"]
  assert first["structure"] == "unstructured" and second["structure"] == "2:4"
  assert [e["claimed"] for e in result["effects"]] == [True, True, False]
  assert third["error"]["mean"] == -first["error"]["mean"]
  # Less error is better: effects are positive where the first is.
  assert first["error"]["low"] == pytest.approx(0.1)
  assert first["retrieval"]["high"] == pytest.approx(-0.1)
  assert first["fidelity"]["verdict"] == "undecided"
  assert len(result["rows"]) == len(list(tmp_path.iterdir())) == 2 * 2 * 5
  monkeypatch.setattr(Figures, "row", lambda *_: pytest.fail("run twice"))
  assert fidelity.test_pruning(claim, range(5), tmp_path) == result
  json.dumps(result)
  card = fidelity.pruning_card("a_claim", claim, result)
  assert card.startswith("# a_claim: holds 2, does not hold 2")
  assert "| dsnot, wanda: 2:4 50% | holds: 0.1000 [0.1000, 0.1000] |" in card
  assert "| (wanda, dsnot: unstructured 50%) | does not hold: -0.1" in card
  assert "| wanda: 2:4 50% | 0.3000 [0.3000, 0.3000] |" in card
  for told in ("6 pairs", "8 tokens", "3: d", "no text"):
    assert told in card
  with pytest.raises(ValueError, match=r"--seeds takes 5 or more; got 4"):
    fidelity.test_pruning(claim, range(4), tmp_path)


def measure(seed, *, rate):
  """Good is better by 0.1 to 0.3 and twice as fast; rate 2 is best for bad."""
  bad = {"accuracy": (0.5 if rate == 2 else 0.4) + seed / 1e4}
  bad |= {"milliseconds": 4.0 + seed % 3}
  good = {"accuracy": 0.7 - 0.1 * rate + (seed % 3) / 10, "loss": 1.0}
  return {"good": good | {"milliseconds": bad["milliseconds"] / 2}, "bad": bad}


PROCEDURE = claims.Procedure(
  says="Something.",
  source="Someone",
  differs="All.",
  measure=measure,
  arms=("good", "bad"),
  figures=("accuracy", "milliseconds", "loss"),
  better=(("good", "bad", "accuracy"), ("good", "bad", "milliseconds")),
  besides=(("bad", "good", "milliseconds"),),
  grid={"rate": (1, 2)},
  ratios=("milliseconds",),
  about=lambda: {"machine": "none"},
)


def test_a_procedure_is_tuned_measured_and_kept(tmp_path):
  result = fidelity.test_procedure(PROCEDURE, range(5), tmp_path)
  assert result["verdict"] == "reproduced"
  # Each arm has its own best setting: 1 for the good one, 2 for the bad one.
  tuned = {name: arm["tuned"]["rate"] for name, arm in result["arms"].items()}
  assert tuned == {"good": 1, "bad": 2}
  seeds = range(5)
  assert result["values"]["bad"]["accuracy"] == [0.5 + s / 1e4 for s in seeds]
  accuracy, time, back = result["effects"]
  expected = [0.6 + (s % 3) / 10 - 0.5 - s / 1e4 for s in seeds]
  assert accuracy["mean"] == pytest.approx(sum(expected) / 5)
  assert accuracy["low"] > 0 and not accuracy["ratio"]
  # Less time is better: twice as fast with every seed, and back.
  assert (time["mean"], time["low"]) == pytest.approx((1, 1))
  assert back["high"] == pytest.approx(-0.5) and not back["claimed"]
  # Three seeds and then five, at two rates; none is measured twice.
  assert len(list(tmp_path.iterdir())) == 2 * (3 + 5)
  json.dumps(result)
  card = comparisons.card("a_claim", PROCEDURE, result)
  for line in (
    "# a_claim: reproduced",
    "machine: none.",
    "| good | 0.6800 [",
    '| {"rate": 1} |',
    "2.00x [2.00, 2.00]",
    "| bad, good |  | (does not hold: 0.50x [0.50, 0.50]) |",
    "Of effects in brackets nothing is claimed",
    "--seeds=5`",
  ):
    assert line in card, line
  with pytest.raises(ValueError, match=r"--seeds takes 5 or more; got 4"):
    fidelity.test_procedure(PROCEDURE, range(4), tmp_path)


def test_a_procedure_without_a_grid_is_measured_once_a_seed(tmp_path):
  calls = []

  def plain(seed):
    calls.append(seed)
    return measure(seed, rate=1)

  claim = dataclasses.replace(PROCEDURE, measure=plain, grid={})
  result = fidelity.test_procedure(claim, range(5), tmp_path)
  assert calls == list(range(5))
  assert fidelity.test_procedure(claim, range(5), tmp_path) == result
  assert calls == list(range(5))  # kept
  assert "Nothing was tuned" in comparisons.card("a_claim", claim, result)


def test_a_figure_that_is_equal_in_all_pairs_is_undecided(tmp_path):
  claim = dataclasses.replace(
    PROCEDURE, measure=lambda seed: {a: {"accuracy": 1} for a in PROCEDURE.arms}
  )
  claim = dataclasses.replace(
    claim, better=PROCEDURE.better[:1], besides=(), grid={}
  )
  result = fidelity.test_procedure(claim, range(5), tmp_path)
  assert result["verdict"] == "undecided"


def test_the_overview_has_a_row_for_each_result_that_is_there(
  tmp_path, monkeypatch
):
  known = {
    "one": PROCEDURE,
    "two": claims.CLAIMS["one_shot_order"],
    "three": claims.CLAIMS["sae_frontier"],
    "four": CLAIM,
    "five": CLAIM,  # has not been run
  }
  effect = {"mean": 1.0, "low": 0.5, "high": 1.5}
  pair = {"better": "a", "worse": "b"}
  effects = {
    "one": pair | {"metric": "milliseconds", "ratio": True} | effect,
    "two": pair | {"structure": "2:4", "sparsity": 0.5, "error": effect},
    "three": pair | {"figure": "explained", "l0": 16, "verdict": "not reached"},
    "four": pair | effect,
    "gone": pair | effect,  # is no claim any more
  }
  for name, found in effects.items():
    idle = found | {"claimed": False, "better": "z"}
    result = {"verdict": f"as {name}", "effects": [idle, found]}
    (tmp_path / f"{name}.json").write_text(json.dumps(result))
  monkeypatch.setattr(claims, "CLAIMS", known)
  page = fidelity.overview(tmp_path)
  rows = [line for line in page.splitlines() if line.startswith("| [")]
  says = [claim.says for claim in known.values()]
  assert rows == [
    f"| [one](one.md): {says[0]} | as one | "
    "a, b: milliseconds 2.00x [1.50, 2.50] |",
    f"| [two](two.md): {says[1]} | as two | "
    "a, b: error at 2:4 50% 1.0000 [0.5000, 1.5000] |",
    f"| [three](three.md): {says[2]} | as three | "
    "a, b: explained at L0 16 not reached |",
    f"| [four](four.md): {says[3]} | as four | "
    "a, b: accuracy 1.0000 [0.5000, 1.5000] |",
  ]


def test_a_claim_run_alone_leaves_the_rows_of_the_others(tmp_path, monkeypatch):
  others = {"one": PROCEDURE, "two": dataclasses.replace(PROCEDURE)}
  monkeypatch.setattr(claims, "CLAIMS", others)
  for name in ("two", "one"):
    given = types.SimpleNamespace(
      claim=name, cards=tmp_path / "cards", workdir=tmp_path / "runs", seeds=5
    )
    monkeypatch.setattr(fidelity.flags, "FLAGS", given)
    fidelity.main([])
  rows = (tmp_path / "cards" / "all.md").read_text()
  assert rows.index("[one](one.md)") < rows.index("[two](two.md)")
  assert {path.name for path in (tmp_path / "cards").iterdir()} == {
    *("all.md", "one.json", "one.md", "two.json", "two.md")
  }


@pytest.mark.parametrize("name", claims.CLAIMS)
def test_every_claim_is_well_formed(name):
  claim = claims.CLAIMS[name]
  assert claim.says and claim.source
  if isinstance(claim, claims.Pruning):
    for names, points in [*claim.better.items(), *claim.besides.items()]:
      prune.check(names, points)
      assert set(names) <= set(prune.METHODS)
      for structure, sparsity in points:
        assert prune.points([structure], [sparsity])
    return
  if isinstance(claim, claims.Frontier):
    config = claim.config()
    dictionary.check(config)
    for *pair, figure in itertools.chain(claim.better, claim.besides):
      assert set(pair) <= set(config.variants)
      assert figure in dictionary.COLUMNS
    return
  if isinstance(claim, claims.Procedure):
    for *pair, figure in itertools.chain(claim.better, claim.besides):
      assert set(pair) <= set(claim.arms) and figure in claim.figures
    assert set(claim.ratios) <= set(claim.figures)
    inspect.signature(claim.measure).bind(0, **dict.fromkeys(claim.grid))
    return
  for first, second, *_ in itertools.chain(claim.better, claim.besides):
    assert {first, second} <= set(claim.arms)
  assert set(claims.metrics(claim)) <= METRICS
  for arm in claim.arms.values():
    config = fidelity.changed(claim.config(), arm)
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


def test_names_stand_for_claims():
  assert fidelity.chosen("all") == list(claims.CLAIMS)
  assert fidelity.chosen("one_shot") == ["one_shot_order"]
  assert fidelity.chosen("sr_ste") == ["sr_ste_1_4", "sr_ste_1_8"]
  assert fidelity.chosen("erk_uniform") == ["erk_uniform"]
