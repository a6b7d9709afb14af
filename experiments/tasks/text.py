"""Language modeling on the bytes of text files.

The default text is on every machine that runs this: the source of Python's
standard library.
"""

from collections.abc import Iterator
import hashlib
import math
import pathlib
import sysconfig

import jax.numpy as jnp
import numpy as np
import optax

from experiments.tasks import task

# Installed packages lie inside the standard library's directory.
_NOT_THE_LIBRARY = ("site-packages", "dist-packages")


class Windows:
  """Windows [length + 1] of a text uint8 [n]; each starts at the last end.

  The one byte more makes inputs and targets of `length` each.
  """

  def __init__(self, text: np.ndarray, length: int):
    self.text, self.length = text, length

  def __len__(self) -> int:
    return max(0, (len(self.text) - 1) // self.length)

  def __getitem__(self, index: np.ndarray) -> np.ndarray:
    starts = np.asarray(index) * self.length
    return self.text[starts[..., None] + np.arange(self.length + 1)]


def metrics(model, batch):
  """Mean cross-entropy of the next byte in nats and in bits."""
  logits = model(batch[:, :-1])
  loss = optax.softmax_cross_entropy_with_integer_labels(
    logits, batch[:, 1:].astype(jnp.int32)
  ).mean()
  return {"loss": loss, "bits_per_byte": loss / math.log(2)}


def _hash(name: str) -> bytes:
  return hashlib.sha256(name.encode()).digest()


def is_validation(name: str) -> bool:
  """Whether the file of this relative path is in the validation tenth."""
  return _hash(name)[0] % 10 == 0


def _files(directory: pathlib.Path, glob: str) -> Iterator[pathlib.Path]:
  for parent, directories, files in directory.walk():
    directories[:] = [d for d in directories if d not in _NOT_THE_LIBRARY]
    for file in files:
      path = parent / file
      if path.match(glob) and path.is_file():
        yield path


def _join(parts: list[bytes]) -> np.ndarray:
  # A zero byte ends each file.
  return np.frombuffer(b"".join(part + b"\0" for part in parts), np.uint8)


def read(path: str = "", glob: str = "*.py") -> tuple[np.ndarray, np.ndarray]:
  """The training and the validation text, uint8 each.

  Args:
    path: a directory, whose files are split by a hash of their relative
      paths, at least one for each side; or a file, whose last tenth is for
      validation, as is that of a directory's only file; or "", Python's
      standard library.
    glob: which files of a directory.

  Raises:
    ValueError: nothing is there.
  """
  root = pathlib.Path(path or sysconfig.get_path("stdlib"))
  if not root.is_dir() and not root.is_file():
    raise ValueError(
      f"config.task.path takes a directory or a file; {str(root)!r} is none."
    )
  # Sorted by name: the order in which a file system lists is its own.
  found = [root] if root.is_file() else _files(root, glob)
  files = {path.relative_to(root).as_posix(): path for path in found}
  if not files:
    raise ValueError(
      f"config.task.path: {str(root)!r} holds no file that matches "
      f"config.task.glob={glob!r}."
    )
  if len(files) == 1:
    (path,) = files.values()
    text = np.frombuffer(path.read_bytes(), np.uint8)
    return tuple(np.split(text, [len(text) - len(text) // 10]))
  validation = {name for name in files if is_validation(name)}
  if len(validation) in (0, len(files)):  # the side without a file gets one
    validation ^= {min(files, key=_hash)}
  split = {False: [], True: []}
  for name in sorted(files):
    split[name in validation].append(files[name].read_bytes())
  return _join(split[False]), _join(split[True])


def _evaluation_batches(windows: Windows, batches: int, size: int):
  count = min(len(windows), batches * size)
  size = min(size, count)
  count -= count % size
  chosen = np.linspace(0, len(windows) - 1, count).astype(int)
  return list(windows[chosen.reshape(-1, size)])


def make(
  *,
  batch_size: int,
  path: str,
  glob: str,
  sequence_length: int,
  validation_batches: int,
) -> task.Task:
  """Predicting each next byte; batches are uint8 [batch, sequence + 1].

  Args:
    batch_size: sequences a training step.
    path: as `read` takes it.
    glob: as `read` takes it.
    sequence_length: bytes that a sequence predicts.
    validation_batches: at most this many, spread evenly over the text.
  """
  for name, value in dict(
    sequence_length=sequence_length, validation_batches=validation_batches
  ).items():
    if value < 1:
      raise ValueError(f"config.task.{name} takes 1 or more; got {value}.")
  parts = {}
  for name, part in zip(("training", "validation"), read(path, glob)):
    parts[name] = Windows(part, sequence_length)
    if not len(parts[name]):
      raise ValueError(
        f"config.task.path={path!r}: the {name} text has {len(part)} bytes, "
        f"too few for one sequence of config.task.sequence_length="
        f"{sequence_length} (a directory is split by file, a file by place)."
      )
  return task.Task(
    train=task.endless_batches(parts["training"], batch_size),
    validation=_evaluation_batches(
      parts["validation"], validation_batches, batch_size
    ),
    metrics=metrics,
    model={"vocabulary": 256},
    tokens=sequence_length,
  )
