"""Interleaved timing: every contestant in turn, twice, round after round.

Ratios of medians of interleaved runs hold where the machine's speed drifts;
times of separate runs do not.
"""

from collections.abc import Callable, Mapping
import contextlib
import dataclasses
import json
import shlex
import statistics
import subprocess
import time
from typing import Any

import jax

Contestant = Callable[[], float]  # runs once, returns seconds


@dataclasses.dataclass(frozen=True)
class Case:
  """One row of the table.

  Attributes:
    name: what is measured.
    ours: the contestant that the ratios are of.
    peers: contestants by name.
    target: for each peer, the least ratio peer / ours that is aimed at.
    limit: seconds that the machine's memory alone would need, or None.
    note: what a reader must know.
  """

  name: str
  ours: Contestant
  peers: Mapping[str, Contestant]
  target: Mapping[str, float]
  limit: float | None = None
  note: str = ""


def timed(function: Callable, *args: Any) -> Contestant:
  """A contestant that calls a jitted function and waits for its result.

  Where a call is short, a run is as many as take 20 ms, and what it returns is
  their mean: a single one may meet threads that sleep.
  """

  def calls(count: int) -> float:
    begin = time.perf_counter()
    for _ in range(count):
      jax.block_until_ready(function(*args))
    return (time.perf_counter() - begin) / count

  calls(1)  # compiles
  count = min(max(int(0.02 / calls(1)), 1), 100)
  return lambda: calls(count)


class Peer:
  """A contestant in another process, of any language and environment.

  The command is started once with the case's name as its last argument. It
  prepares, and then for each line on its standard input runs once and prints a
  JSON object with "seconds" on a line. It exits when its input ends.
  """

  def __init__(self, command: str, case: str):
    self._process = subprocess.Popen(
      [*shlex.split(command), case],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
    self()  # the first run may compile

  def __call__(self) -> float:
    with contextlib.suppress(BrokenPipeError):  # told by the missing answer
      self._process.stdin.write("run\n")
      self._process.stdin.flush()
    line = self._process.stdout.readline()
    if not line:
      raise RuntimeError(f"peer ended with {self._process.wait()}")
    return json.loads(line)["seconds"]

  def close(self) -> None:
    """Ends the process."""
    with contextlib.suppress(BrokenPipeError):
      self._process.stdin.close()
    self._process.wait()


def race(case: Case, rounds: int) -> dict[str, Any]:
  """Runs all contestants of a case in turn, and compares medians."""
  contestants = {"ours": case.ours, **case.peers}
  seconds = {name: [] for name in contestants}
  for _ in range(rounds):
    for name, run in contestants.items():
      # The first run of a turn finds the memory and the threads as the one
      # before left them, and is not counted.
      run()
      seconds[name].append(run())
  median = {name: statistics.median(s) for name, s in seconds.items()}
  return {
    "case": case.name,
    "median_ms": {name: 1e3 * s for name, s in median.items()},
    "spread": {n: max(s) / min(s) for n, s in seconds.items()},
    "ratio": {n: median[n] / median["ours"] for n in case.peers},
    "target": dict(case.target),
    "limit_ms": None if case.limit is None else 1e3 * case.limit,
    "note": case.note,
    "rounds": rounds,
  }
