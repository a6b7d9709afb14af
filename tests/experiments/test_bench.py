"""The benchmark's bookkeeping; nothing here measures time."""

import sys

from absl.testing import absltest

from experiments.bench import __main__ as bench
from experiments.bench import timing
from experiments.bench import weights

PEER = """
import json, sys
seconds = iter([9.0, 9.0, 3.0, 9.0, 5.0, 9.0, 4.0])
print(sys.argv[1], file=sys.stderr)
for line in sys.stdin:
  print(json.dumps({"seconds": next(seconds)}), flush=True)
"""


class RaceTest(absltest.TestCase):
  def test_medians_and_ratios_of_interleaved_runs(self):
    # The first of each pair is not counted.
    order, ours = [], iter([99.0, 1.0, 99.0, 4.0, 99.0, 2.0])
    theirs = iter([0.0, 8.0, 0.0, 6.0, 0.0, 7.0])
    case = timing.Case(
      name="case",
      ours=lambda: order.append("ours") or next(ours),
      peers={"peer": lambda: order.append("peer") or next(theirs)},
      target={"peer": 2},
      limit=0.5,
    )
    result = timing.race(case, rounds=3)
    self.assertEqual(order, ["ours", "ours", "peer", "peer"] * 3)
    self.assertEqual(result["median_ms"], {"ours": 2000.0, "peer": 7000.0})
    self.assertEqual(result["ratio"], {"peer": 3.5})
    self.assertEqual(result["limit_ms"], 500.0)
    self.assertIn("3.50x, aim 2x", bench.row(result))

  def test_a_peer_in_another_process(self):
    peer = timing.Peer(f"{sys.executable} -c '{PEER}'", "case")
    case = timing.Case("case", lambda: 2.0, {}, {})
    result = timing.race(bench.with_peers(case, {"other": peer}), rounds=3)
    peer.close()
    self.assertEqual(result["median_ms"]["other"], 4000.0)  # none of the 9s

  def test_a_peer_that_ends(self):
    with self.assertRaisesRegex(RuntimeError, "peer ended with 3"):
      timing.Peer(f"{sys.executable} -c 'raise SystemExit(3)'", "case")

  def test_mask_state(self):
    bits = weights.mask_bits()
    self.assertEqual(bits["bits per maskable weight"], 1.0)


if __name__ == "__main__":
  absltest.main()
