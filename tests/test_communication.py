"""What replicas send each other, and their outer step."""

import functools
import json
import pathlib
import re

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsejax import communication
from tests import common
from tests.oracles import finetuning as oracle

AUTHORS = json.loads(
  (
    pathlib.Path(__file__).parent / "oracles/data/finetuning_authors.json"
  ).read_text()
)["results"]
# Sums of some dozen numbers of size 1 in float32 against float64; their means,
# the table, are added to again.
TOLERANCE = 2e-6
STATIC = ("k", "chunk", "beta", "quantize")


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape)


def close(found, wanted, atol=TOLERANCE):
  np.testing.assert_allclose(common.float64(found), wanted, rtol=0, atol=atol)


@functools.partial(jax.jit, static_argnames=("k", "chunk", "quantize"))
def transmitted(x, k, chunk, quantize=True):
  """What arrives of an array."""
  sent = communication.compress(x, k, chunk=chunk, quantize=quantize)
  return communication.decompress(sent, x.shape, chunk=chunk)


@functools.partial(jax.jit, static_argnames=STATIC)
def outer_step(error, before, after, rate=1.0, **settings):
  """Of replicas along the first axis."""

  def step(error, before, after):
    return communication.outer_step(
      error, before, after, axis_name="replicas", rate=rate, **settings
    )

  return jax.vmap(
    step, in_axes=(0, None, 0), out_axes=(0, None), axis_name="replicas"
  )(error, before, after)


def tree_of(seed, *lead):
  """Leaves of every rank and awkward sizes, one of bfloat16."""
  shapes = {
    "scalar": (),
    "one": (1,),
    "none": (3, 0),
    "vector": (12,),
    "stack": (2, 6, 7),
    "matrix": (12, 10),
  }
  tree = {
    name: jnp.asarray(normal(seed + i, *lead, *shape), jnp.float32)
    for i, (name, shape) in enumerate(shapes.items())
  }
  return tree | {"deep": {"bf16": tree.pop("matrix").astype(jnp.bfloat16)}}


def errors_of(seed, replicas):
  return jax.tree.map(lambda x: x.astype(jnp.float32), tree_of(seed, replicas))


class CompressTest(parameterized.TestCase):
  def test_sides(self):
    sizes = (1, 2, 7, 63, 64, 65, 96, 100, 127, 128, 768)
    found = [
      jax.eval_shape(
        lambda x: communication.compress(x, 1), jax.ShapeDtypeStruct((n,), "f4")
      ).indices.shape[0]
      for n in sizes
    ]
    wanted = [n // s for n, s in zip(sizes, AUTHORS["loco_split"], strict=True)]
    self.assertEqual(found, wanted)

  def test_against_the_authors(self):
    x = jnp.asarray(normal(25, 6, 8), jnp.float32)
    found = transmitted(x, k=2, chunk=4)
    close(found.ravel(), AUTHORS["loco_4"])

  @parameterized.product(
    case=[((8, 6), 2, 4), ((11,), 3, 4), ((7, 9), 1, 5), ((1,), 1, 64)],
    quantize=[True, False],
  )
  def test_against_the_oracle(self, case, quantize):
    shape, k, chunk = case
    x = normal(len(shape), *shape).astype(np.float32)
    levels = 4 if quantize else None
    sent, _ = oracle.send(x, np.zeros(shape), 0.0, k, chunk, levels)
    close(transmitted(x, k=k, chunk=chunk, quantize=quantize), sent)

  def test_ties(self):
    """Few sizes, so that most chunks cut through equal ones."""
    x = np.random.default_rng(0).integers(-2, 3, (12, 10)).astype(np.float32)
    for k in (1, 5, 19):
      sent, _ = oracle.send(x, np.zeros(x.shape), 0.0, k, 5)
      np.testing.assert_array_equal(
        transmitted(x, k=k, chunk=5, quantize=False), sent
      )

  def test_stacks(self):
    """Each matrix has its chunks, and all of them share a table."""
    x = normal(0, 2, 3, 4, 6).astype(np.float32)
    masks = [oracle.chunked_top_k(m, 2, 3) for m in x.reshape(6, 4, 6)]
    mask = np.reshape(masks, x.shape)
    codes, table = oracle.quantize([float(v) for v in x[mask]])
    wanted = np.zeros(x.shape)
    wanted[mask] = [table[code] for code in codes]
    close(transmitted(x, k=2, chunk=3), wanted)

  def test_a_scalar_is_sent_whole(self):
    close(transmitted(jnp.float32(3.5), k=5, chunk=64), 3.5, atol=0)

  @parameterized.parameters((0,), (3, 0), (0, 3), (0, 4, 4))
  def test_empty(self, *shape):
    sent = communication.compress(jnp.zeros(shape), 2)
    self.assertEqual((sent.indices.size, sent.values.size), (0, 0))
    self.assertEqual(communication.decompress(sent, shape).shape, shape)
    self.assertTrue(np.isfinite(sent.table).all())

  def test_equal_values(self):
    """No deviation: all have one code."""
    close(transmitted(jnp.full((4, 4), 3.0), k=16, chunk=4), 3.0)

  def test_codes_fill_bytes(self):
    """15 chunks, 45 codes."""
    x = normal(3, 9, 5).astype(np.float32)
    sent = communication.compress(x, 3, chunk=3)
    self.assertEqual(sent.indices.shape, (15, 3))
    self.assertEqual(sent.values.shape, (-(-sent.indices.size // 4),))
    self.assertEqual(sent.table.shape, (4,))

  def test_every_index_of_the_largest_chunk(self):
    x = jnp.zeros((256, 256)).at[255, 255].set(2.0).at[128, 0].set(-1.0)
    np.testing.assert_array_equal(
      transmitted(x, k=2, chunk=256, quantize=False), x
    )

  def test_an_index_out_of_range_is_left_out(self):
    sent = communication.compress(jnp.ones(8), 1, chunk=4, quantize=False)
    sent = sent._replace(indices=jnp.array([[4], [1]], jnp.uint16))
    found = communication.decompress(sent, (8,), chunk=4)
    self.assertEqual(found.tolist(), [0, 0, 0, 0, 0, 1, 0, 0])

  def test_nan(self):
    x = jnp.array([1.0, jnp.nan, 3.0, 4.0])
    found = transmitted(x, k=1, chunk=2, quantize=False)
    np.testing.assert_array_equal(found, [0, jnp.nan, 0, 4])
    found = transmitted(x, k=1, chunk=2)
    np.testing.assert_array_equal(found, [0, jnp.nan, 0, jnp.nan])

  @parameterized.parameters(True, False)
  def test_bytes(self, quantize):
    params = tree_of(0)
    sent = [
      communication.compress(x, 3, chunk=4, quantize=quantize)
      for x in jax.tree.leaves(params)
      if x.size
    ]
    self.assertEqual(
      communication.sent_bytes(params, 3, chunk=4, quantize=quantize),
      sum(part.nbytes for part in jax.tree.leaves(sent)),
    )

  def test_bytes_of_a_large_matrix(self):
    """32 of 4096 entries at 18 bits, and the table: 1/224 of f32."""
    x = jax.ShapeDtypeStruct((4096, 4096), jnp.float32)
    found = communication.sent_bytes({"w": x}, 32)
    self.assertEqual(found, 4096 * 32 * 18 // 8 + 16)


class OuterStepTest(parameterized.TestCase):
  @parameterized.parameters(True, False)
  def test_against_the_oracle(self, quantize):
    """Of two leaves; the other tests have stacks and bfloat16."""
    names = ("one", "vector")
    before, after, error = (
      {n: tree[n] for n in names}
      for tree in (tree_of(0), tree_of(10, 3), errors_of(20, 3))
    )
    left, params = outer_step(
      error, before, after, rate=0.7, k=2, chunk=4, beta=0.9, quantize=quantize
    )
    levels = 4 if quantize else None
    for name in names:
      old, new, memory = map(
        common.float64, (before[name], after[name], error[name])
      )
      sent = [
        oracle.send(old - new[r], memory[r], 0.9, 2, 4, levels)
        for r in range(3)
      ]
      close(left[name], [rest for _, rest in sent])
      close(params[name], oracle.outer_step(old, [s for s, _ in sent], 0.7))

  def test_against_the_authors(self):
    """They divide by the number of senders, here by that of replicas."""
    new = jnp.asarray([normal(s, 6, 8) for s in (26, 27, 28)], jnp.float32)
    _, params = outer_step(
      {"w": jnp.zeros((3, 6, 8))},
      {"w": jnp.zeros((6, 8))},
      {"w": new},
      k=2,
      chunk=4,
      quantize=False,
    )
    sent = np.array([transmitted(x, k=2, chunk=4, quantize=False) for x in new])
    senders = np.maximum((sent != 0).sum(0), 1)
    close(3 * params["w"] / senders, np.reshape(AUTHORS["loco_mean"], (6, 8)))

  def test_conservation(self):
    before, after, error = tree_of(0), tree_of(10, 3), errors_of(20, 3)
    left, params = outer_step(error, before, after, k=3, chunk=4)
    for name in ("scalar", "one", "none", "vector", "stack"):
      e = 0.95 * error[name] + before[name] - after[name]
      # What is left is e less what is sent, so only sums are rounded.
      close(before[name] - params[name] + left[name].mean(0), e.mean(0))
    self.assertEqual(params["deep"]["bf16"].dtype, jnp.bfloat16)
    self.assertEqual(left["deep"]["bf16"].dtype, jnp.float32)

  def test_plain_averaging(self):
    """All entries, their values, and no memory."""
    before, after, error = tree_of(0), tree_of(10, 4), errors_of(20, 4)
    left, params = outer_step(
      error, before, after, k=16, chunk=4, beta=0.0, quantize=False
    )
    # Rounded to bfloat16: 8 bits of numbers below 4.
    close(params["deep"].pop("bf16"), after["deep"].pop("bf16").mean(0), 2e-2)
    for name in ("scalar", "one", "none", "vector", "stack"):
      close(params[name], common.float64(after[name]).mean(0))
      self.assertFalse(left[name].any())

  @parameterized.parameters(*common.AXIS_TYPES)
  def test_shards(self, axis_type):
    """As vmap, equal in all replicas; only what is compressed is gathered."""
    spec = jax.P("replicas")
    mesh = jax.make_mesh((8,), ("replicas",), axis_types=(axis_type,))
    before, after, error = tree_of(0), tree_of(10, 8), errors_of(20, 8)
    first = functools.partial(jax.tree.map, lambda x: x[0])

    def replica(error, before, after):
      error, params = communication.outer_step(
        first(error), before, first(after), axis_name="replicas", k=3, chunk=4
      )
      return jax.tree.map(lambda x: x[None], error), params

    step = jax.shard_map(
      replica,
      mesh=mesh,
      in_specs=(spec, jax.P(), spec),
      out_specs=(spec, jax.P()),
    )
    args = [
      jax.device_put(tree, jax.NamedSharding(mesh, s))
      for tree, s in ((error, spec), (before, jax.P()), (after, spec))
    ]
    compiled = jax.jit(step).lower(*args).compile()
    left, params = compiled(*args)
    wanted_left, wanted = outer_step(error, before, after, k=3, chunk=4)
    jax.tree.map(close, left, jax.tree.map(common.float64, wanted_left))
    deep = params["deep"].pop("bf16")
    close(deep, common.float64(wanted["deep"].pop("bf16")), 2e-2)
    jax.tree.map(close, params, jax.tree.map(common.float64, wanted))
    for x in jax.tree.leaves(params):
      copies = [np.asarray(shard.data) for shard in x.addressable_shards]
      for copy in copies[1:]:
        np.testing.assert_array_equal(copy, copies[0])

    lines = re.findall(
      r"= (.*?) (all-\w+(?:-\w+)*|collective-\w+|reduce-scatter)\(",
      compiled.as_text(),
    )
    self.assertEqual({kind for _, kind in lines}, {"all-gather"})
    moved = 0
    for shapes, _ in lines:
      for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
        self.assertIn(dtype, ("u16", "u8", "f32"))
        sizes = [int(n) for n in sizes.split(",")]
        if dtype == "f32":  # a table
          self.assertEqual(sizes[-1], 4)
        width = {"u16": 2, "u8": 1, "f32": 4}[dtype]
        moved += width * np.prod(sizes)
    # The indices of "scalar" and "one" are 0 in both, and gathered once.
    moved += 8 * 2
    self.assertEqual(moved, 8 * communication.sent_bytes(before, 3, chunk=4))

  def test_error_feedback(self):
    """Two replicas pull one entry apart, and send no other without memory."""
    goal = jnp.asarray(normal(0, 8), jnp.float32)
    pull = jnp.zeros((2, 8)).at[:, 0].set(jnp.array([3.0, -3.0]))

    def step(carry, _, beta):
      error, params = carry
      after = params - 0.05 * (params - goal + pull)
      return outer_step(
        error, params, after, k=1, chunk=8, beta=beta, quantize=False
      ), None

    ends = {}
    for beta in (0.0, 0.95):
      start = jnp.zeros((2, 8)), jnp.zeros(8)
      run = functools.partial(step, beta=beta)
      (_, params), _ = jax.jit(
        lambda start, run=run: jax.lax.scan(run, start, length=400)
      )(start)
      ends[beta] = jnp.abs(params - goal)[1:].max()
    self.assertEqual(ends[0.0], jnp.abs(goal)[1:].max())
    self.assertLess(ends[0.95], 0.2 * ends[0.0])

  def test_training(self):
    """Four replicas, five steps of AdamW each between 3% of two bits."""
    replicas, inner = 4, 5
    teacher = normal(0, 32, 16).astype(np.float32)
    inputs = jnp.asarray(normal(1, replicas, 128, 32), jnp.float32)
    targets = inputs @ teacher
    tx = optax.adamw(1e-2, weight_decay=0.0)

    def loss(params, x, y):
      return jnp.mean((x @ params["w"] + params["b"] - y) ** 2)

    def steps(params, state, x, y):
      for _ in range(inner):
        updates, state = tx.update(jax.grad(loss)(params, x, y), state, params)
        params = optax.apply_updates(params, updates)
      return params, state

    def rounds(beta):
      def round_of_a_replica(error, params, state, x, y):
        after, state = steps(params, state, x, y)
        error, params = communication.outer_step(
          error, params, after, axis_name="replicas", k=2, chunk=8, beta=beta
        )
        return error, params, state

      together = jax.vmap(
        round_of_a_replica,
        in_axes=(0, None, 0, 0, 0),
        out_axes=(0, None, 0),
        axis_name="replicas",
      )

      def body(carry, _):
        return together(*carry, inputs, targets), None

      params = {"w": jnp.zeros((32, 16)), "b": jnp.zeros(16)}
      error = jax.tree.map(lambda p: jnp.zeros((replicas, *p.shape)), params)
      state = jax.vmap(lambda _: tx.init(params))(jnp.arange(replicas))
      run = jax.jit(lambda c: jax.lax.scan(body, c, length=150)[0])
      _, params, _ = run((error, params, state))
      return loss(params, inputs, targets).item()

    start = jnp.mean(targets**2).item()
    remembering, forgetting = rounds(0.95), rounds(0.0)
    # Of a loss of 32.7, 0.07 and 30.2 are left; after plain averaging 0.003.
    self.assertLess(remembering, 0.01 * start)
    self.assertGreater(forgetting, 0.5 * start)

  def test_compiled_once(self):
    before, after, error = tree_of(0), tree_of(10, 2), errors_of(20, 2)
    traced = []

    @jax.jit
    def step(error, before, after):
      traced.append(1)
      return outer_step(error, before, after, k=3, chunk=4)

    for _ in range(3):
      error, before = step(error, before, after)
    self.assertEqual(len(traced), 1)


ZEROS = {"w": jnp.zeros((4, 4))}


@pytest.mark.parametrize(
  ("named", "changes"),
  [
    ("k must be in", dict(k=0)),
    ("k must be in", dict(k=4097)),
    ("k must be a known integer", dict(k=1.5)),
    ("chunk must be in", dict(chunk=257)),
    ("chunk must be in", dict(chunk=0)),
    ("beta must be in", dict(beta=1.5)),
    ("before must be floating", dict(before={"w": jnp.zeros((4, 4), int)})),
    ("after must have the leaves", dict(after={"v": jnp.zeros((4, 4))})),
    ("after must have shape", dict(after={"w": jnp.zeros((4, 3))})),
    ("error must have the leaves", dict(error={})),
    ("error must have shape", dict(error={"w": jnp.zeros(16)})),
    (
      "error must be float32",
      dict(error={"w": jnp.zeros((4, 4), jnp.bfloat16)}),
    ),
  ],
)
def test_bad_input(named, changes):
  arguments = dict(error=ZEROS, before=ZEROS, after=ZEROS, k=1) | changes
  trees = [arguments.pop(n) for n in ("error", "before", "after")]
  with pytest.raises(ValueError, match=named):
    communication.outer_step(*trees, axis_name="replicas", **arguments)


def test_bad_input_of_the_parts():
  with pytest.raises(ValueError, match="x must be floating"):
    communication.compress(jnp.arange(4), 1)
  with pytest.raises(ValueError, match="params must be floating"):
    communication.sent_bytes({"w": jnp.arange(4)}, 1)
  sent = communication.compress(jnp.zeros((8, 8)), 1, chunk=4)
  with pytest.raises(ValueError, match="chunks of shape"):
    communication.decompress(sent, (8, 8), chunk=8)
