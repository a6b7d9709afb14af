"""The training loop, which can be stopped anywhere and resumed."""

from collections.abc import Callable, Iterator
import contextlib
import pathlib
import signal
import statistics
import time

import jax
import ml_collections
import tqdm

from experiments import experiment
from experiments import flops
from experiments import report
from experiments import summaries
from experiments import workdir as workdirs

Record = tuple[int, dict[str, float]]


def train(
  config: ml_collections.ConfigDict,
  workdir: str | pathlib.Path,
  *,
  stopped: Callable[[], bool] = lambda: False,
) -> Iterator[Record]:
  """Trains, and yields each (step, metrics) as it is logged.

  Args:
    config: as configs/base.py begins it.
    workdir: where the run is kept; a run of the same config is resumed, and
      a finished one yields nothing.
    stopped: asked after every step; where true, a checkpoint is written and
      the iterator ends.

  Raises:
    ValueError: a field of the config is wrong, or the work directory holds
      another run or a damaged one.
    RuntimeError: weights that a mask had removed were found nonzero.
  """
  workdir = pathlib.Path(workdir)
  parts = experiment.make(config)
  workdirs.claim(workdir, config)
  if summaries.read(workdir):
    return
  with contextlib.ExitStack() as stack:
    checkpoints = stack.enter_context(workdirs.Checkpoints(workdir))
    data = parts.task.train_iterator(config.seed)
    params, opt_state = parts.init(config.seed)
    start = checkpoints.latest()
    if start is not None:
      like = jax.eval_shape(lambda: (params, opt_state))
      params, opt_state = checkpoints.restore(start, like, data)
      check_records(config, workdir, start)
    metrics = workdirs.Metrics(workdir, after=-1 if start is None else start)
    stack.enter_context(metrics)

    def evaluated():
      values = parts.evaluate(params, opt_state)
      size, kept = flops.weights(parts, (params, opt_state))
      values = {f"validation_{name}": v for name, v in values.items()}
      return values | {"density": kept / size}

    if start is None:
      start, values = 0, evaluated()
      metrics.write(0, values)
      yield 0, values
    seconds = []  # a step, measured between two records
    began, counted = time.perf_counter(), start
    for step in range(start + 1, config.steps + 1):
      params, opt_state, trained = parts.step(params, opt_state, next(data))
      last = step == config.steps
      values = {}
      if step % config.log_every == 0 or last:
        values = {f"train_{name}": float(v) for name, v in trained.items()}
        seconds.append((time.perf_counter() - began) / (step - counted))
      if step % config.eval_every == 0 or last:
        values |= evaluated()
      if values:
        metrics.write(step, values)
      # After the metrics: what a checkpoint has behind it is on record.
      stop = stopped()
      if stop or last or step % config.checkpoint_every == 0:
        checkpoints.save(step, (params, opt_state), data)
      if values:
        yield step, values
        began, counted = time.perf_counter(), step
      if stop and not last:
        return
    report.loads(workdir / "routing.png", workdirs.read_metrics(workdir))
    # The first stretch has the compilation in it.
    step_seconds = statistics.median(seconds[1:]) if seconds[1:] else None
    state = params, opt_state
    summaries.write(workdir, config, parts, state, step_seconds)


def check_records(
  config: ml_collections.ConfigDict, workdir: pathlib.Path, step: int
) -> None:
  """Raises ValueError where a record up to a checkpoint's step is missing."""
  kept = {record["step"] for record in workdirs.read_metrics(workdir)}
  for due in range(step + 1):
    logged = due % config.log_every == 0 or due % config.eval_every == 0
    if logged and due not in kept:
      raise ValueError(
        f"{workdir / 'metrics.jsonl'} has no record of step {due}, and the "
        f"run would go on from step {step} without it; nothing was changed. "
        "Put the file back, or begin in another directory."
      )


def stop_on_sigterm() -> Callable[[], bool]:
  """From now on SIGTERM only makes the returned function say True."""
  received = []
  signal.signal(signal.SIGTERM, lambda *_: received.append(True))
  return lambda: bool(received)


def show(bar: tqdm.tqdm, record: Record) -> None:
  """Moves a progress bar to the step, with the metrics known by now."""
  step, values = record
  bar.metrics = getattr(bar, "metrics", {}) | values
  names = ("train_loss", "validation_loss", "density")
  known = {n: f"{bar.metrics[n]:.3f}" for n in names if n in bar.metrics}
  bar.set_postfix(known, refresh=False)
  bar.update(step - bar.n)
