"""Pruning a language model: a small run is read, pruned, and trained on."""

import json
import math
import shutil

import numpy as np
import pytest

from configs import text_small
from experiments import experiment
from experiments import files
from experiments import prune
from experiments import prune_lm
from experiments import workdir as workdirs


def small(path):
  """A config of few weights, on texts of a directory."""
  (path / "texts").mkdir()
  for name in "abcdefgh":
    (path / "texts" / f"{name}.txt").write_text(f"{name} is not none. " * 40)
  config = text_small.get_config()
  config.steps, config.batch_size, config.eval_every = 6, 4, 6
  config.task.path, config.task.glob = str(path / "texts"), "*.txt"
  config.task.sequence_length, config.task.validation_batches = 16, 2
  config.model.width, config.model.heads, config.model.depth = 16, 2, 1
  config.optimizer.learning_rate = 1e-2
  config.optimizer.warmup_steps = 1
  return config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """The directory of a run, as training leaves it, and its loss."""
  path = tmp_path_factory.mktemp("lm")
  config, run = small(path), path / "run"
  parts = experiment.make(config)
  state = parts.init(3)
  workdirs.claim(run, config)
  with workdirs.Checkpoints(run) as checkpoints:
    checkpoints.save(6, state, parts.task.train_iterator(0))
  loss = parts.evaluate(*state)["loss"]
  files.write(run / "summary.json", json.dumps({"validation_loss": loss}))
  return run, loss


@pytest.fixture(scope="module")
def run(trained):
  return trained[0]


@pytest.fixture(scope="module")
def measured(run):
  return prune_lm.Measured(
    run, seeds=2, calibration=8, train_from=("wanda",), steps=3
  )


def test_the_dense_figures_are_the_run_s(trained, measured):
  _, loss = trained
  assert measured.dense["perplexity"] == pytest.approx(math.exp(loss))
  assert measured.dense["bits_per_byte"] == pytest.approx(loss / math.log(2))


def test_calibration_is_training_text_and_differs(measured):
  hashes = measured.about["calibration"]
  assert set(hashes) == {0, 1} and hashes[0] != hashes[1]
  assert [len(batches) for batches in measured.sets] == [2, 2]


def test_all_kept_is_the_dense_model(measured):
  row = measured.row("wanda", ("unstructured", 0.0), 0)
  assert row["error"] == 0
  for name in ("perplexity", "bits_per_byte", "trained"):
    # The same steps under masks of ones.
    assert row[name] == pytest.approx(measured.dense[name], rel=1e-5)


def test_a_pruned_model_is_measured_and_trained_on(measured, tmp_path, capsys):
  at = prune.points(["unstructured", "2:4"], [0.5])
  before = np.asarray(measured.model.blocks[0].up.kernel[...])
  found = prune.run(measured, ["magnitude", "wanda"], at)
  np.testing.assert_array_equal(
    before, measured.model.blocks[0].up.kernel[...]
  )  # fmt: skip
  assert len(found["rows"]) == 2 * 2 * 2
  for row in found["rows"]:
    assert 0 < row["error"] < 1 and row["perplexity"] > 1
    assert ("trained" in row) == (row["method"] == "wanda" and not row["seed"])
    # Three steps on from a model that has not seen any text.
    assert row.get("trained", 0) < row["perplexity"]
  prune.write(found, tmp_path)
  output = capsys.readouterr().out
  for told in (
    "validation sequences (",
    "context: 16 bytes",
    "3 steps on",
    *(f"{s}:{h}" for s, h in found["about"]["calibration"].items()),
  ):
    assert told in output
  assert json.loads((tmp_path / "prune.json").read_text())["rows"]


def test_training_on_keeps_the_masks(measured):
  params, masks = None, None

  def seen(given, under):
    nonlocal params, masks
    params, masks = given, under
    return original(given, under)

  original = measured._trained
  measured._trained = seen
  try:
    measured.row("wanda", ("2:4", 0.5), 0)
  finally:
    measured._trained = original
  for number, of_block in enumerate(masks["blocks"]):
    kernel = np.asarray(params["blocks"][number]["up"]["kernel"])
    np.testing.assert_array_equal(of_block["up"]["kernel"], kernel != 0)
    assert (kernel != 0).mean() == 0.5


def test_other_directories_are_refused(run, tmp_path):
  with pytest.raises(ValueError, match="workdir must hold a finished run"):
    prune_lm.Measured(tmp_path, seeds=1)
  with pytest.raises(ValueError, match=r"batch_size=4, got 6"):
    prune_lm.Measured(run, seeds=1, calibration=6)
  other = tmp_path / "other"
  shutil.copytree(run, other)
  config = json.loads((other / "config.json").read_text())
  config["method"] = {"name": "static", "sparsity": 0.5}
  (other / "config.json").write_text(json.dumps(config))
  with pytest.raises(ValueError, match=r"got transformer and static"):
    prune_lm.Measured(other, seeds=1)
