"""Attention on eight devices equals attention on one, and gathers nothing."""

import functools
import math
import re

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
import numpy as np
import pytest

import pallas_kernels

P = jax.P
B, S, H, HKV, D, BLOCK, SLOTS = 2, 128, 4, 2, 16, 16, 3
BLOCKS = S // BLOCK
CAUSAL = pallas_kernels.Causal()


def make(lead, rule=CAUSAL, columns=False, members=False, level=False):
  """q, k, v, sinks and a mask whose lists have these leading dimensions."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
  more = {}
  if columns:
    more["columns"] = rng.integers(-1, S, (*lead, BLOCKS, 20))
  if members:
    words = rng.integers(0, 2**SLOTS, (*lead, BLOCKS, 1, BLOCK))
    more["members"] = words.astype(np.uint32)
  if level:
    more["level"] = rng.integers(0, 3, (*lead, BLOCKS, SLOTS))
  mask = pallas_kernels.BlockMask(
    rng.integers(0, BLOCKS, (*lead, BLOCKS, SLOTS)),
    rng.integers(0, SLOTS + 1, (*lead, BLOCKS)),
    block_q=BLOCK,
    block_kv=BLOCK,
    kv_blocks=BLOCKS,
    rule=rule,
    **more,
  )
  arrays = normal(B, S, H, D), normal(B, S, HKV, D), normal(B, S, HKV, D)
  return *arrays, normal(H), mask


@functools.partial(jax.jit, static_argnums=0)
def both(attend, q, k, v, sinks, mask):
  """Output, log-sum-exp and all gradients."""

  def loss(q, k, v, sinks):
    out, lse = attend(q, k, v, sinks, mask)
    finite = jnp.where(jnp.isfinite(lse), lse, 0)
    return (out**2).mean() + finite.mean(), (out, lse)

  grads, outs = jax.grad(loss, (0, 1, 2, 3), has_aux=True)(q, k, v, sinks)
  return outs, grads


def on_one(q, k, v, sinks, mask, **more):
  return pallas_kernels.block_sparse_attention(
    q, k, v, mask, sinks=sinks, return_lse=True, **more
  )


def moved(text):
  """Elements of the largest array that a collective gathers or moves."""
  found = re.findall(
    r"\w+\[([\d,]*)\]\S* (?:all-gather|all-to-all|collective-permute)", text
  )
  return max((math.prod(map(int, x.split(","))) for x in found), default=0)


class UnderJitTest(parameterized.TestCase):
  @parameterized.parameters(AxisType.Auto, AxisType.Explicit)
  def test_shards_of_batch_heads_and_queries(self, axes):
    self.check(axes, (1, 4), P("x", "z", "y"), P("x", None, "y"))

  @parameterized.product(
    axes=(AxisType.Auto, AxisType.Explicit),
    call=(
      ((2, 4), P("x", None, "y"), P("x", None, "y")),
      ((1, 1), P(None, ("x", "z")), P()),
    ),
  )
  @pytest.mark.slow
  def test_shards_of_some(self, axes, call):
    self.check(axes, *call)

  def test_shards_of_the_mask(self):
    self.check_mask(AxisType.Explicit, P(None, None, "z"))

  @parameterized.product(
    axes=(AxisType.Auto, AxisType.Explicit),
    of_mask=(P("x"), P("x", "y", "z")),
  )
  @pytest.mark.slow
  def test_shards_of_the_mask_and(self, axes, of_mask):
    self.check_mask(axes, of_mask)

  def check_mask(self, axes, of_mask):
    self.check(axes, (2, 4), P("x", "z", "y"), P("x", None, "y"), of_mask)

  @pytest.mark.slow
  def test_shards_of_a_mask_with_everything(self):
    """Its columns go with the keys, which every query may read."""
    features = dict(columns=True, members=True, level=True)
    of_q, of_k, of_mask = P("x", "z", "y"), P("x", None, "y"), P("x", "y", "z")
    columns = 2 * 4 * BLOCKS * 32
    self.check(
      AxisType.Explicit, (2, 4), of_q, of_k, of_mask, columns, **features
    )

  def check(self, axes, lead, of_q, of_k, of_mask=None, most=H, **features):
    q, k, v, sinks, mask = make(lead, **features)
    want = both(on_one, q, k, v, sinks, mask)
    mesh = jax.make_mesh((2, 2, 2), ("x", "y", "z"), axis_types=(axes,) * 3)
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    args = (put(q, of_q), put(k, of_k), put(v, of_k), put(sinks, P()))
    mask = jax.tree.map(lambda x: put(x, of_mask or P()), mask)
    with jax.set_mesh(mesh):
      compiled = both.lower(on_one, *args, mask).compile()
      got = compiled(*args, mask)
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, atol=1e-5), got, want
    )
    # The output and the gradients lie as q and k do.
    (out, _), (dq, dk, *_) = got
    for x, like in ((out, args[0]), (dq, args[0]), (dk, args[1])):
      self.assertTrue(x.sharding.is_equivalent_to(like.sharding, x.ndim))
    # Nothing but the gradient of the sinks, which all devices hold.
    self.assertLessEqual(moved(compiled.as_text()), most)

  def test_vmap_over_shards(self):
    q, k, v, sinks, mask = make((2, 4))
    twice = lambda tree: jax.tree.map(lambda x: jnp.stack([x, x]), tree)
    attend = jax.vmap(on_one, in_axes=(0, 0, 0, None, 0))
    want = on_one(q, k, v, sinks, mask)[0]
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, P(None, None, "x"))
    got = jax.jit(attend)(
      jax.device_put(twice(q), rows), *twice((k, v)), sinks, twice(mask)
    )
    for each in got[0]:
      np.testing.assert_allclose(each, want, atol=1e-5)


class UnderShardMapTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.mesh = jax.make_mesh(
      (4, 2), ("s", "h"), axis_types=(AxisType.Auto,) * 2
    )

  def lists(self, mask):
    head = "h" if mask.counts.shape[1] > 1 else None
    return jax.tree.map(lambda _: P(None, head, "s"), mask)

  def test_a_ring_over_the_keys(self):
    self.check_ring((2, 4), {})

  @parameterized.named_parameters(
    ("shared", (1, 1), {"rule": None}),
    ("members", (1, 4), {"members": True}),
    ("columns", (1, 1), {"columns": True}),
    ("all", (2, 4), {"columns": True, "members": True, "level": True}),
  )
  @pytest.mark.slow
  def test_a_ring_with(self, lead, features):
    self.check_ring(lead, features)

  def check_ring(self, lead, features):
    q, k, v, sinks, mask = make(lead, **features)
    want = both(on_one, q, k, v, sinks, mask)
    rows = P(None, "s", "h")

    def attend(q, k, v, sinks, mask):
      return pallas_kernels.ring_attention(
        q, k, v, mask, axis_name="s", sinks=sinks, return_lse=True
      )

    ring = jax.shard_map(
      attend,
      mesh=self.mesh,
      in_specs=(rows, rows, rows, P("h"), self.lists(mask)),
      out_specs=(rows, rows),
      check_vma=True,
    )
    compiled = both.lower(ring, q, k, v, sinks, mask).compile()
    got = compiled(q, k, v, sinks, mask)
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, atol=1e-5), got, want
    )

  @parameterized.named_parameters(
    ("heads_alone", None, {"rule": None}), ("queries", "s", {})
  )
  def test_shards_of_the_caller(self, along, features):
    q, k, v, sinks, mask = make((1, 4), **features)
    want = both(on_one, q, k, v, sinks, mask)
    of_q, of_k = P(None, along, "h"), P(None, None, "h")

    def attend(q, k, v, sinks, mask):
      more = {}
      if along:
        here = jax.lax.axis_index(along) * q.shape[1]
        more["q_positions"] = here + jnp.arange(q.shape[1])
      return on_one(q, k, v, sinks, mask, **more)

    lists = jax.tree.map(lambda _: P(None, "h", along), mask)
    sharded = jax.shard_map(
      attend,
      mesh=self.mesh,
      in_specs=(of_q, of_k, of_k, P("h"), lists),
      out_specs=(of_q, of_q),
      check_vma=True,
    )
    got = both(sharded, q, k, v, sinks, mask)
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, atol=1e-5), got, want
    )

  def test_lists_by_key_block_of_all_queries(self):
    self.check_transposed("block_sparse_attention")

  @pytest.mark.slow
  def test_lists_by_key_block_in_a_ring(self):
    self.check_transposed("ring_attention")

  def check_transposed(self, name):
    """Lists by key block of all queries are not used for a shard of them."""
    q, k, v, sinks, mask = make((1, 1), rule=None)
    want = both(on_one, q, k, v, sinks, mask)
    rows, made = P(None, "s"), mask.with_transpose(H, HKV)
    kernel, keys = getattr(pallas_kernels, name), P()
    options = dict(backend="tpu", interpret=True, return_lse=True)
    if name == "ring_attention":
      keys, options["axis_name"] = rows, "s"
    sharded = jax.shard_map(
      lambda q, k, v, sinks, mask: kernel(
        q, k, v, mask, sinks=sinks, **options
      ),
      mesh=self.mesh,
      in_specs=(rows, keys, keys, P(), P(None, None, "s")),
      out_specs=(rows, rows),
      check_vma=False,  # Pallas's interpreter does not pass it
    )
    got = both(sharded, q, k, v, sinks, made)
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, atol=1e-5), got, want
    )

  def test_a_ring_of_shards_that_are_no_blocks(self):
    q, k, v, sinks, mask = make((1, 1))
    with self.assertRaisesRegex(ValueError, "k 24 on each device"):
      jax.shard_map(
        lambda q: pallas_kernels.ring_attention(
          q, k[:, :24], v[:, :24], mask, axis_name="s"
        ),
        mesh=self.mesh,
        in_specs=P(),
        out_specs=P(),
      )(q)
    del sinks


if __name__ == "__main__":
  absltest.main()
