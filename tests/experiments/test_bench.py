"""The benchmark's bookkeeping; nothing here measures time."""

import sys

from absl.testing import absltest
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from experiments.bench import __main__ as bench
from experiments.bench import post_training
from experiments.bench import sparse_coding
from experiments.bench import timing
from experiments.bench import weights
from experiments.models import bert

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


class PostTrainingTest(absltest.TestCase):
  def test_calibration(self):
    tokenizer = tokenizers.Tokenizer(
      tokenizers.models.WordLevel({"[UNK]": 1}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokens, valid = post_training.calibration(tokenizer, "docstrings")
    lengths = valid.sum(1)
    self.assertEqual(tokens.shape, (128, 64))
    np.testing.assert_array_equal(lengths, np.sort(lengths))
    batches = post_training.batches_of(tokens, valid)
    self.assertLess(batches[0][0].shape[1], 64)
    self.assertEqual(sum(v.sum() for _, v in batches), valid.sum())
    tokens, valid = post_training.calibration(tokenizer, "windows")
    self.assertEqual(tokens.shape, (128, 64))
    self.assertTrue(tokens.all() and valid.all())

  def test_every_block_is_pruned(self):
    config = bert.Config(
      vocab_size=32,
      hidden_size=10,
      num_hidden_layers=2,
      num_attention_heads=2,
      intermediate_size=20,
    )
    model = bert.Bert(config, rngs=nnx.Rngs(0))
    batch = np.arange(24).reshape(2, 12), np.arange(24).reshape(2, 12) % 12 < 9
    prune = post_training.Pruner(model, [batch])
    method, second, _ = post_training.METHODS["wanda"]
    spent = []
    blocks, _ = prune(post_training.update_with(method, spent), second)
    self.assertLen(spent, 2)
    for block in blocks:
      for layer in ("up", "down"):
        kernel = np.asarray(block[layer]["kernel"][...])
        self.assertAlmostEqual((kernel == 0).mean(), 0.6)
    self.assertTrue(np.all(model.blocks[0].up.kernel[...] != 0))


class SparseCodingTest(absltest.TestCase):
  def test_steps_are_the_same(self):
    x = sparse_coding.normal(1, 5, sparse_coding.WIDTH)
    (want, _), loss = jax.jit(sparse_coding.plain)(sparse_coding.start(40), x)
    (got, _), found = jax.jit(sparse_coding.ours)(sparse_coding.start(40), x)
    self.assertAlmostEqual(found / loss, 1, places=5)
    # Adam's first step is a sign times the rate, 0.001, where nothing is tiny.
    differ = jax.tree.map(lambda a, b: (abs(a - b) > 1e-4).mean(), got, want)
    self.assertLess(max(jax.tree.leaves(differ)), 1e-3)

  def test_many_in_one_program(self):
    x = sparse_coding.normal(1, 5, sparse_coding.WIDTH)
    states = [sparse_coding.start(40, seed) for seed in range(2)]
    one = jax.jit(sparse_coding.ours)
    want = [one(state, x)[1] for state in states]
    states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    for run in (sparse_coding.one_by_one, sparse_coding.at_once):
      _, losses = jax.jit(run)(states, x)
      np.testing.assert_allclose(losses, want, rtol=1e-5)


if __name__ == "__main__":
  absltest.main()
