"""The launcher: runs end as they would uninterrupted, or say what is wrong."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import types

import pytest

from configs import digits_rigl
from experiments import experiment
from experiments import files
from experiments import summaries
from experiments import training
from experiments import workdir as workdirs

ROOT = pathlib.Path(__file__).resolve().parents[2]


def tiny(**fields):
  config = digits_rigl.get_config()
  config.steps = 12
  config.log_every = 2
  config.eval_every = config.checkpoint_every = 4
  config.model.width, config.model.depth = 16, 1
  config.method.every, config.method.until = 3, 9
  config.update_from_flattened_dict(fields)
  return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("run")
  return workdir, list(training.train(tiny(), workdir))


def test_a_run_leaves_what_it_promises(finished):
  workdir, records = finished
  assert [step for step, _ in records] == [0, 2, 4, 6, 8, 10, 12]
  lines = workdirs.read_metrics(workdir)
  assert lines == [{"step": step} | values for step, values in records]
  assert list((workdir / "tensorboard").glob("events*"))
  assert (workdir / "checkpoints" / "12").is_dir()
  summary = summaries.read(workdir)
  assert summary["violations"] == 0
  assert summary["density"] == pytest.approx(0.1, abs=1e-3)
  # A hidden layer and the readout, a tenth of them kept.
  size = 64 * 16 + 16 * 10
  assert summary["inference_flops"] == 2 * round(0.1 * size)
  sparse = 3 * summary["inference_flops"] * 64 * 12
  assert sparse < summary["training_flops"] < 2 * sparse


def test_a_finished_run_is_not_trained_again(finished):
  workdir, _ = finished
  assert not list(training.train(tiny(), workdir))


def test_equal_seeds_give_equal_runs_and_others_do_not(finished, tmp_path):
  _, records = finished
  assert list(training.train(tiny(), tmp_path / "same")) == records
  assert list(training.train(tiny(seed=1), tmp_path / "other")) != records


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"stepz": 1}, r"config.stepz is not a setting here; it takes batch_size"),
    ({"method.evry": 1}, r"config.method.evry .* takes .*distribution, drop_"),
    ({"method.name": "rigl2"}, r"config.method.name is 'rigl2'; .* rigl, "),
    ({"method.name": "static"}, r"config.method.(until|drop_fraction) is not"),
    ({"optimizer.name": "sgdm"}, r"config.optimizer.name is .* one of adamw"),
    ({"optimizer.lr": 1.0}, r"config.optimizer.lr .* learning_rate"),
    ({"task.name": "iris"}, r"config.task.name is 'iris'; .* digits, "),
    ({"task.path": ""}, r"config.task.path is not a setting here"),
    ({"model.name": "transformer"}, r"config.model.name .* does not fit"),
    ({"model.heads": 2}, r"config.model.heads .* takes depth, top_k, width"),
    ({"method.sparsity": 1.5}, r"sparsity"),
    ({"batch_size": 0}, r"config.batch_size takes 1 or more; got 0"),
  ],
)
def test_a_wrong_field_is_named(fields, message):
  config = tiny()
  with config.unlocked(), pytest.raises(ValueError, match=message):
    for path, value in fields.items():
      *parents, name = path.split(".")
      node = config
      for parent in parents:
        node = node[parent]
      node[name] = value
    experiment.make(config)


def test_a_missing_field_is_named():
  config = tiny()
  del config.method.until
  with pytest.raises(ValueError, match=r"config.method.until is missing"):
    experiment.make(config)


def test_another_config_is_refused(finished):
  workdir, _ = finished
  with pytest.raises(ValueError, match=r"config.model.width=16, .* has 32"):
    next(training.train(tiny(**{"model.width": 32}), workdir))


def test_what_a_run_did_not_write_is_left_alone(tmp_path):
  notes = tmp_path / "metrics.jsonl"
  notes.write_text("mine")
  with pytest.raises(ValueError, match=r"no config.json"):
    next(training.train(tiny(), tmp_path))
  assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
  assert notes.read_text() == "mine"


def contents(directory):
  files = [p for p in directory.rglob("*") if p.is_file()]
  return {p.relative_to(directory): p.read_bytes() for p in files}


def unfinished(finished, tmp_path):
  """A copy of the finished run that still has its last step to make."""
  shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
  (tmp_path / "summary.json").unlink()
  return tmp_path


def test_a_foreign_checkpoint_is_refused(finished, tmp_path):
  workdir = unfinished(finished, tmp_path)
  config = tiny(**{"model.width": 32})
  files.write(workdir / "config.json", config.to_json())
  before = contents(workdir)
  message = (
    r"checkpoints/12 is not a checkpoint .* delete it to go on from step 8"
    r".* \(\(16,\), 'float32'\)"
  )
  with pytest.raises(ValueError, match=message):
    next(training.train(config, workdir))
  assert contents(workdir) == before


@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_a_damaged_checkpoint_is_refused(damage, finished, tmp_path):
  workdir = unfinished(finished, tmp_path)
  state = workdir / "checkpoints" / "12" / "state"
  files = [p for p in state.rglob("*") if p.is_file()]
  largest = max(files, key=lambda path: path.stat().st_size)
  data = bytearray(largest.read_bytes())
  data[len(data) // 2] ^= 16
  largest.write_bytes(data[: len(data) // 2] if damage == "cut" else data)
  before = contents(workdir)
  message = r"checkpoints/12 is not a checkpoint .* go on from step 8"
  with pytest.raises(ValueError, match=message) as refused:
    next(training.train(tiny(), workdir))
  assert "\n" not in str(refused.value)
  assert contents(workdir) == before
  if damage == "cut":  # once: does it go on from there?
    shutil.rmtree(workdir / "checkpoints" / "12")
    assert list(training.train(tiny(), workdir)) == finished[1][5:]


@pytest.mark.parametrize("kept", [0, 4])
def test_metrics_that_were_cut_are_not_resumed(kept, finished, tmp_path):
  workdir = unfinished(finished, tmp_path)
  lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
  (workdir / "metrics.jsonl").write_text("".join(lines[len(lines) - kept :]))
  before = contents(workdir)
  with pytest.raises(ValueError, match=r"metrics.jsonl has no .* of step 0"):
    next(training.train(tiny(), workdir))
  assert contents(workdir) == before


@pytest.mark.parametrize("name", ["", "checkpoints"])
def test_a_file_in_place_of_a_directory_is_refused(name, tmp_path):
  workdir = tmp_path / "run"
  if name:
    workdirs.claim(workdir, tiny())
  (workdir / name).write_text("mine")
  before = contents(tmp_path)
  with pytest.raises(ValueError, match=rf"--workdir=.*run/?{name} is a file"):
    next(training.train(tiny(), workdir))
  assert contents(tmp_path) == before


def test_a_damaged_summary_is_named(tmp_path):
  (tmp_path / "summary.json").write_text('{"step": ')
  with pytest.raises(ValueError, match=r"summary.json is damaged"):
    summaries.read(tmp_path)


def test_a_line_cut_off_by_a_kill_is_dropped(tmp_path):
  lines = '{"step": 0, "a": 1.5}\n{"step": 2, "a": 2.5}\n{"step": 4, "a'
  (tmp_path / "metrics.jsonl").write_text(lines)
  with workdirs.Metrics(tmp_path, after=0) as metrics:
    metrics.write(1, {"a": 3.5})
  kept = [{"step": 0, "a": 1.5}, {"step": 1, "a": 3.5}]
  assert workdirs.read_metrics(tmp_path) == kept


def launch(workdir):
  command = [sys.executable, "-m", "experiments.train"]
  command += ["--config=configs/digits_rigl.py", f"--workdir={workdir}"]
  command += ["--config.steps=300", "--config.checkpoint_every=40"]
  command += ["--config.method.until=200", "--config.log_every=1"]
  command += ["--config.model.depth=1"]
  return subprocess.Popen(
    command,
    cwd=ROOT,
    env=os.environ
    | {
      "JAX_PLATFORMS": "cpu",
      # Four processes compile the same programs.
      "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "compiled"),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    },
    stderr=subprocess.DEVNULL,
    stdout=subprocess.PIPE,
    text=True,
  )


def stop(workdir, step, signal_number):
  process = launch(workdir)
  while process.poll() is None:
    lines = workdirs.read_metrics(workdir)
    if lines and lines[-1]["step"] >= step:
      process.send_signal(signal_number)
      break
    time.sleep(0.01)
  output, _ = process.communicate(timeout=120)
  return process.returncode, output


def finish(workdir):
  process = launch(workdir)
  process.communicate(timeout=300)
  assert process.returncode == 0
  checksum = json.loads(
    (workdir / "checkpoints" / "300" / "checksum" / "metadata").read_text()
  )
  return (workdir / "metrics.jsonl").read_bytes(), checksum


def test_a_run_that_was_killed_ends_as_if_it_never_had_been(tmp_path):
  code, _ = stop(tmp_path / "killed", 97, signal.SIGKILL)
  assert code == -signal.SIGKILL
  code, output = stop(tmp_path / "killed", 161, signal.SIGTERM)
  assert code == 0
  assert "resumes the run" in output
  assert finish(tmp_path / "killed") == finish(tmp_path / "whole")


def test_a_run_whose_masks_were_broken_fails(finished, tmp_path):
  workdir = unfinished(finished, tmp_path)
  parts = experiment.make(tiny())
  broken = types.SimpleNamespace(violations=3)
  parts = dataclasses.replace(parts, summary=lambda *_: broken)
  with pytest.raises(RuntimeError, match=r"3 weights .* are not zero"):
    summaries.write(workdir, tiny(), parts, parts.init(0), None)
  assert summaries.read(workdir) is None
