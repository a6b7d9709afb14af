"""Safetensors files: written whole or not at all, read with plain errors."""

from collections.abc import Mapping
import os
import pathlib
import uuid

import numpy as np


def write(
  path: pathlib.Path,
  tensors: Mapping[str, np.ndarray],
  metadata: Mapping[str, str],
) -> None:
  """Writes a safetensors file beside its place, and moves it there.

  Raises:
    ValueError: there is no package safetensors.
    OSError: it cannot be written; what was there stays.
  """
  safetensors = package()
  partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
  try:
    partial.touch()
    mode = partial.stat().st_mode  # safetensors' own files are the user's alone
    try:
      # It takes no array that is not in row-major order, and does not say so.
      tensors = {n: np.asarray(x, order="C") for n, x in tensors.items()}
      safetensors.numpy.save_file(tensors, partial, dict(metadata))
    except safetensors.SafetensorError as error:
      raise OSError(f"{path} cannot be written: {error}") from error
    partial.chmod(mode)
    with partial.open("rb+") as file:
      os.fsync(file.fileno())
    os.replace(partial, path)
  finally:
    partial.unlink(missing_ok=True)


def read(path: pathlib.Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
  """The metadata and the tensors of a safetensors file.

  Raises:
    ValueError: naming the file and what is wrong with it; or there is no
      package safetensors.
  """
  if not path.is_file():
    raise ValueError(f"{path} is missing, or no file")
  safetensors = package()
  try:
    with safetensors.safe_open(path, "numpy") as file:
      names = file.keys()
      return file.metadata() or {}, {n: file.get_tensor(n) for n in names}
  except safetensors.SafetensorError as error:
    raise ValueError(
      f"{path} is truncated, damaged or no safetensors file: {error}"
    ) from error


def package():
  """The package safetensors; ValueError where there is none."""
  try:
    import safetensors
    import safetensors.numpy
  except ImportError as error:
    raise ValueError(
      "safetensors files take a package: pip install safetensors"
    ) from error
  return safetensors
