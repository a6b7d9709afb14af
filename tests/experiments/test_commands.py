"""The demo and the sweep, short, as they are called."""

import pathlib
import subprocess
import sys
import types

import pytest

from experiments import sweep
from experiments import workdir as workdirs

ROOT = pathlib.Path(__file__).resolve().parents[2]


def call(module, *flags):
  command = [sys.executable, "-m", f"experiments.{module}", *flags]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return done.stdout


@pytest.mark.slow
def test_demo(tmp_path):
  output = call("demo", f"--workdir={tmp_path}", "--steps=24")
  for row in (
    "validation bits/byte",
    "density",
    "training FLOPs",
    "inference FLOPs",
    "step time",
    "optimizer state",
  ):
    assert row in output
  assert (tmp_path / "curves.png").exists()
  for name in ("dense", "rigl"):
    last = workdirs.read_metrics(tmp_path / name)[-1]
    assert last["step"] == 24
    density = {"dense": 1, "rigl": 0.1}[name]
    assert last["density"] == pytest.approx(density, abs=1e-4)
    assert (tmp_path / name / "checkpoints" / "24").is_dir()
    assert list((tmp_path / name / "tensorboard").iterdir())


def test_a_sweep_refuses_configs_of_one_name(tmp_path, monkeypatch):
  configs = ["a/x.py", "b/x.py"]
  given = types.SimpleNamespace(configs=configs, seeds=2, workdir=tmp_path)
  monkeypatch.setattr(sweep.flags, "FLAGS", given)
  with pytest.raises(ValueError, match=r"different names.* got a/x.py, b/x"):
    sweep.main([])
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_sweep(tmp_path):
  flags = ["--seeds=2", f"--workdir={tmp_path}", "--set=steps=40"]
  flags += ["--configs=configs/digits_rigl.py", "--set=method.until=30"]
  output = call("sweep", *flags)
  assert "±" in output
  assert (tmp_path / "curves.png").exists()
  before = (tmp_path / "digits_rigl" / "1" / "metrics.jsonl").stat().st_mtime
  assert call("sweep", *flags) == output
  after = (tmp_path / "digits_rigl" / "1" / "metrics.jsonl").stat().st_mtime
  assert before == after
