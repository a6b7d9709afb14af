"""Runs the benchmarks: a table, and JSON.

  python -m experiments.bench --only=select --out=bench.json
  python -m experiments.bench --only=grouped --case="8 groups" --rounds=21
  python -m experiments.bench --peer='torch=/env/bin/python peer.py'

A peer is a program in an environment of its own; `timing.Peer` says what it
must do. It takes part in every case, and may exit at those it does not know.
"""

import json
import os
import pathlib
import time

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
from tqdm import auto as tqdm

from experiments.bench import activations
from experiments.bench import attention
from experiments.bench import condensed
from experiments.bench import decode
from experiments.bench import grouped
from experiments.bench import post_training
from experiments.bench import routing
from experiments.bench import schedules
from experiments.bench import select
from experiments.bench import selection
from experiments.bench import sparse_coding
from experiments.bench import timing
from experiments.bench import weights

_ROOMS = {
  "select": select,
  "weights": weights,
  "activations": activations,
  "attention": attention,
  "decode": decode,
  "selection": selection,
  "condensed": condensed,
  "grouped": grouped,
  "routing": routing,
  "post_training": post_training,
  "schedules": schedules,
  "sparse_coding": sparse_coding,
}
_ONLY = flags.DEFINE_multi_enum("only", None, list(_ROOMS), "Rooms to run.")
_CASE = flags.DEFINE_string("case", "", "What a case's name must contain.")
_OUT = flags.DEFINE_string("out", None, "Where to write JSON.")
_PEER = flags.DEFINE_multi_string("peer", [], "name=command of a peer.")
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Runs of each.", lower_bound=1)


def read_bandwidth() -> float:
  """Bytes per second of a vectorized read of 64 MiB (the best of ten)."""
  x = jnp.zeros((2**21, 8), jnp.uint32)
  run = timing.timed(jax.jit(lambda x: jnp.max(x, 0)), x)
  return x.nbytes / min(run() for _ in range(10))


def with_peers(case: timing.Case, peers: dict[str, timing.Peer]) -> timing.Case:
  """The case with peers of other processes."""
  return timing.Case(
    case.name,
    case.ours,
    {**case.peers, **peers},
    case.target,
    case.limit,
    case.note,
  )


def row(result: dict) -> str:
  """A result as lines of text."""
  ours = result["median_ms"]["ours"]
  limit = result["limit_ms"]
  lines = [f"{result['case']}: {ours:.1f} ms"]
  if limit is not None:
    lines[0] += f" (limit {limit:.1f} ms)"
  for name, ratio in result["ratio"].items():
    target = result["target"].get(name)
    aim = "" if target is None else f", aim {target:.2g}x"
    lines.append(
      f"  {name}: {result['median_ms'][name]:.1f} ms, {ratio:.2f}x{aim}"
    )
  return "\n".join(lines)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  commands = {}
  for given in _PEER.value:
    name, equals, command = given.partition("=")
    if not (name and equals and command):
      raise app.UsageError(f"--peer takes name=command, got {given!r}")
    commands[name] = command
  bandwidth = read_bandwidth()
  results, facts = [], {}
  for room in _ONLY.value or _ROOMS:
    for case in tqdm.tqdm(_ROOMS[room].cases(bandwidth), room, leave=False):
      if _CASE.value not in case.name:
        continue
      peers = {}
      for name, command in commands.items():
        try:
          peers[name] = timing.Peer(command, case.name)
        except RuntimeError as error:
          tqdm.tqdm.write(f"{name} takes no part in {case.name!r}: {error}")
      results.append(timing.race(with_peers(case, peers), _ROUNDS.value))
      tqdm.tqdm.write(row(results[-1]))
      for peer in peers.values():
        peer.close()
    if _CASE.value:
      continue  # facts belong to no case, and take long
    for name, fact in _ROOMS[room].facts().items():
      facts[name] = fact
      print(f"{name}: {fact}")
  if _OUT.value:
    report = {
      "date": time.strftime("%Y-%m-%d"),
      "jax": jax.__version__,
      "platform": jax.default_backend(),
      "cpus": os.cpu_count(),
      "read_bytes_per_second": bandwidth,
      "results": results,
      "facts": facts,
    }
    pathlib.Path(_OUT.value).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
  app.run(main)
