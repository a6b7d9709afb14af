"""Files and directories that are there whole, or not at all."""

from collections.abc import Iterator
import contextlib
import os
import pathlib
import shutil
import uuid


def write(path: pathlib.Path, text: str) -> None:
  """Replaces a file at once: a kill leaves the old one or the new one."""
  partial = path.with_name(path.name + ".partial")
  partial.write_text(text)
  os.replace(partial, path)


@contextlib.contextmanager
def new_directory(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """A directory to write into, which gets its name when all is written.

  Raises:
    OSError: at the end, where something that is not empty has the name.
  """
  partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
  try:
    partial.mkdir(parents=True)
    yield partial
    partial.rename(path)
  finally:
    shutil.rmtree(partial, ignore_errors=True)
