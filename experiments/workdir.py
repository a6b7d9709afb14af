"""What a run keeps in its work directory: config, metrics, checkpoints."""

from collections.abc import Mapping
import json
import pathlib
from typing import Any
import zlib

from etils import epath
import grain
import jax
import ml_collections
import orbax.checkpoint as ocp
import tensorboardX

from experiments import files


def _flat(config: Mapping[str, Any], prefix: str = "config") -> dict[str, Any]:
  fields = {}
  for name, value in config.items():
    path = f"{prefix}.{name}"
    nested = isinstance(value, Mapping)
    fields |= _flat(value, path) if nested else {path: value}
  return fields


def claim(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> None:
  """Writes the config into a new work directory, or compares it with its own.

  Raises:
    ValueError: the directory is none, has a run of another config, or files
      of another program; nothing is changed then.
  """
  for directory in (workdir, workdir / "checkpoints"):
    if directory.exists() and not directory.is_dir():
      raise ValueError(
        f"--workdir={workdir} cannot hold a run: {directory} is a file, and "
        "not a directory."
      )
  path = workdir / "config.json"
  # Through JSON: a tuple becomes a list, as it will be when read back.
  text = json.dumps(config.to_dict(), indent=2, sort_keys=True)
  if not path.exists():
    if any((workdir / n).exists() for n in ("checkpoints", "metrics.jsonl")):
      raise ValueError(
        f"--workdir={workdir} holds checkpoints or metrics but no "
        "config.json, so they are not of this run; give another directory."
      )
    workdir.mkdir(parents=True, exist_ok=True)
    files.write(path, text)
    return
  try:
    kept, new = _flat(json.loads(path.read_text())), _flat(json.loads(text))
  except (ValueError, AttributeError) as error:
    raise ValueError(f"{path} is not a config: {error}") from error
  absent = "no such field"
  for field in sorted(kept | new):
    a, b = kept.get(field, absent), new.get(field, absent)
    if a != b:
      raise ValueError(
        f"--workdir={workdir} holds a run with {field}={a!r}, and this one "
        f"has {b!r}; give another directory, or the same config to resume."
      )


class Metrics:
  """metrics.jsonl, one object a step, and the same as TensorBoard events."""

  def __init__(self, workdir: pathlib.Path, after: int):
    """Drops what was written beyond step `after`, to be made again."""
    path = workdir / "metrics.jsonl"
    kept = [line for line in read_metrics(workdir) if line["step"] <= after]
    files.write(path, "".join(json.dumps(line) + "\n" for line in kept))
    self._file = path.open("a")
    self._events = tensorboardX.SummaryWriter(
      str(workdir / "tensorboard"), purge_step=after + 1
    )

  def write(self, step: int, values: Mapping[str, float]) -> None:
    self._file.write(json.dumps({"step": step} | values) + "\n")
    self._file.flush()
    for name, value in values.items():
      self._events.add_scalar(name, value, step)

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._file.close()
    self._events.close()


def read_metrics(workdir: pathlib.Path) -> list[dict[str, float]]:
  """The lines of metrics.jsonl; a last one that a kill cut off is dropped."""
  path = pathlib.Path(workdir) / "metrics.jsonl"
  if not path.exists():
    return []
  *lines, _ = path.read_text().split("\n")
  try:
    return [json.loads(line) for line in lines]
  except ValueError as error:
    raise ValueError(f"{path} is damaged: {error}") from error


def _checksum(state) -> int:
  checksum = 0
  for leaf in jax.tree.leaves(jax.device_get(state)):
    checksum = zlib.crc32(leaf.tobytes(), checksum)
  return checksum


def _leaves(tree) -> dict[str, tuple]:
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): (
      tuple(leaf.shape),
      str(leaf.dtype),
    )
    for path, leaf in leaves
  }


class Checkpoints:
  """Checkpoints of a train state and of the place in the data."""

  def __init__(self, workdir: pathlib.Path):
    self.path = epath.Path(workdir.absolute() / "checkpoints")
    # Saving at once and not in the background: the state is donated to the
    # next step, and a small model is written in a tenth of a second.
    options = ocp.CheckpointManagerOptions(
      max_to_keep=2, enable_async_checkpointing=False
    )
    # Named here, so that what is in a checkpoint can be asked before.
    handlers = {
      "state": ocp.StandardCheckpointHandler(),
      "data": grain.checkpoint.CheckpointHandler(),
      "checksum": ocp.JsonCheckpointHandler(),
    }
    self._manager = ocp.CheckpointManager(
      self.path, options=options, item_handlers=handlers
    )

  def latest(self) -> int | None:
    """The step of the newest checkpoint, or None."""
    return self._manager.latest_step()

  def save(self, step: int, state, data: grain.DatasetIterator) -> None:
    """Saves a pytree of arrays and the iterator's state, all or nothing."""
    if step == self.latest():
      return
    arguments = ocp.args.Composite(
      state=ocp.args.StandardSave(state),
      data=grain.checkpoint.CheckpointSave(data),
      checksum=ocp.args.JsonSave({"crc32": _checksum(state)}),
    )
    self._manager.save(step, args=arguments)

  def restore(self, step: int, like, data: grain.DatasetIterator):
    """Returns the state of that step, and moves the iterator to its place.

    Args:
      step: of the checkpoint.
      like: a pytree of arrays or their shapes, of the state's structure.
      data: the iterator that is moved.

    Raises:
      ValueError: the checkpoint is damaged or of another model.
    """
    try:
      return self._restore(step, like, data)
    except Exception as error:
      older = max((s for s in self._manager.all_steps() if s < step), default=0)
      hint = f" (if so, delete it to go on from step {older})" if older else ""
      reason, *_ = str(error).split("\n")  # Orbax tells pages
      raise ValueError(
        f"{self.path / str(step)} is not a checkpoint of this run, or it is "
        f"damaged{hint}; nothing was changed. {type(error).__name__}: {reason}"
      ) from error

  def _restore(self, step, like, data):
    # Compared here, since Orbax converts a dtype that differs.
    kept = _leaves(self._manager.item_metadata(step)["state"])
    wanted = _leaves(like)
    for path in sorted(kept | wanted):
      if kept.get(path) != wanted.get(path):
        raise ValueError(
          f"{path} has (shape, dtype) {kept.get(path)}, and the model "
          f"takes {wanted.get(path)}."
        )
    arguments = ocp.args.Composite(
      state=ocp.args.StandardRestore(like),
      data=grain.checkpoint.CheckpointRestore(data),
      checksum=ocp.args.JsonRestore(),
    )
    restored = self._manager.restore(step, args=arguments)
    # The files have no checksum of their data.
    if _checksum(restored["state"]) != restored["checksum"]["crc32"]:
      raise ValueError("The data differ from their checksum.")
    return restored["state"]

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._manager.close()
