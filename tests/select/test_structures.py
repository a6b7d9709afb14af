"""Structures: masks against the oracles, counts, exchanges, bad settings."""

import functools
import itertools

from absl.testing import parameterized
from hypothesis import given
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.select import structures
from sparsejax.select import thresholds
from sparsejax.select.structures import Axes
from sparsejax.select.structures import Block
from sparsejax.select.structures import Channel
from sparsejax.select.structures import ConstantFanIn
from sparsejax.select.structures import NM
from sparsejax.select.structures import Unstructured
from tests import common
from tests.oracles import select as oracle
from tests.oracles import weights as weights_oracle

STACKED = Axes(stack=(0,))  # [layers, in, out]
MIDDLE = Axes(stack=(1,), input=(0,), output=(2,))  # [in, layers, out]
QUERY = Axes(input=(0,), output=(1, 2))  # [d, heads, head_dim]
OUT = Axes(input=(0, 1), output=(2,))  # [heads, head_dim, d]


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def mask_of(structure, scores, density, axes=Axes()):
  return structure.mask(scores, density, axes)


@functools.partial(jax.jit, static_argnums=(0, 3))
def mask_at(structure, scores, count, axes=Axes()):
  """As `mask`, with a count that is traced."""
  keys = thresholds.ordered_keys(structure.pool(scores, axes))
  units = structure.select(keys, count, axes)
  return structure.spread(units, scores.shape, axes)


def weights_kept(structure, shape, density, axes=Axes()):
  return structure.target_count(shape, density, axes)


def of_oracle(structure, scores, density):
  """The oracle's mask of one layer [in, out]."""
  s = common.float64(scores)
  match structure:
    case NM(n, m, axis):
      return oracle.nm_mask(s, n, m, -2 if axis is None else axis)
    case Block(shape):
      units = s.size // (shape[0] * shape[1])
      return oracle.block_mask(s, shape, round(density * units))
    case Channel(axis):
      axis = -1 if axis is None else axis
      return oracle.channel_mask(s, axis, round(density * s.shape[axis]))
    case ConstantFanIn():
      fan_in = max(1, round(density * s.shape[0])) if density else 0
      return oracle.constant_fan_in_mask(s, fan_in)
    case Unstructured():
      return oracle.top_k_mask([s], round(density * s.size))[0]


LAYERS = (
  (Unstructured(), (8, 6)),
  (NM(2, 4), (8, 3)),
  (NM(1, 2, axis=1), (3, 6)),
  (Block((2, 3)), (8, 6)),
  (Block((1, 6)), (5, 6)),
  (Channel(), (8, 6)),
  (Channel(axis=0), (8, 6)),
  (ConstantFanIn(), (7, 5)),
)


class MaskTest(parameterized.TestCase):
  @given(data=st.data())
  def test_equals_oracle(self, data):
    structure, shape = data.draw(st.sampled_from(LAYERS))
    # Sums of special values are an oracle's and a mean's own: finite there.
    special = isinstance(structure, NM | ConstantFanIn | Unstructured)
    scores = data.draw(common.score_arrays(shape, special=special))
    if not special:  # exact means
      scores = np.round(scores)
    density = data.draw(st.sampled_from([0.25, 0.5, 0.7]))
    if isinstance(structure, NM):
      density = structure.n / structure.m
    count = structure.group_count(shape, Axes(), density)
    got = mask_at(structure, scores, count)
    self.assertEqual((got.shape, got.dtype), (scores.shape, bool))
    np.testing.assert_array_equal(got, of_oracle(structure, scores, density))

  @parameterized.parameters(
    ((8,), -1, 2, 4),
    ((3, 8), 1, 1, 4),
    ((3, 8), -1, 3, 8),
    ((8, 3), 0, 0, 2),
    ((8, 3), 0, 2, 2),
    ((2, 12, 3), 1, 2, 3),
    ((12, 2, 3), -3, 5, 6),
    ((4, 3), None, 1, 1),
    ((66, 2), 0, 5, 33),  # wide groups are bisected
    ((300, 1), 0, 150, 300),
  )
  def test_nm_along_any_axis(self, shape, axis, n, m):
    rng = np.random.default_rng(0)
    palette = [*common.SPECIAL, *common.PLAIN]
    for _ in range(3):
      scores = rng.choice(palette, shape).astype(np.float32)
      want = oracle.nm_mask(
        common.float64(scores), n, m, -2 if axis is None else axis
      )
      got = mask_of(NM(n, m, axis), scores, n / m)
      np.testing.assert_array_equal(got, want)

  @parameterized.parameters(jnp.bfloat16, jnp.float16)
  def test_nm_of_half_precision(self, dtype):
    rng = np.random.default_rng(1)
    scores = rng.integers(-4, 5, (16, 3)).astype(dtype)
    want = oracle.nm_mask(common.float64(scores), 2, 4, 0)
    np.testing.assert_array_equal(mask_of(NM(2, 4), scores, 0.5), want)

  def test_convolution_kernels(self):
    rng = np.random.default_rng(3)
    scores = common.distinct(rng, (3, 2, 4, 5))  # [h, w, in, out]
    flat = scores.reshape(24, 5)
    for structure in (Unstructured(), ConstantFanIn(), Channel()):
      want = of_oracle(structure, flat, 0.4).reshape(scores.shape)
      got = mask_of(structure, scores, 0.4)
      np.testing.assert_array_equal(got, want)
    got = mask_of(NM(1, 4), scores, 0.25)  # along the inputs
    for at in np.ndindex(3, 2):
      np.testing.assert_array_equal(
        got[at], oracle.nm_mask(scores[at], 1, 4, 0)
      )
    got = mask_of(Block((2, 5)), scores, 0.5)
    want = oracle.block_mask(flat, (2, 5), 6).reshape(scores.shape)
    np.testing.assert_array_equal(got, want)

  def test_attention_kernels(self):
    rng = np.random.default_rng(4)
    scores = common.distinct(rng, (6, 2, 3))
    want = oracle.constant_fan_in_mask(scores.reshape(6, 6), 3)
    got = mask_of(ConstantFanIn(), scores, 0.5, QUERY)
    np.testing.assert_array_equal(got, want.reshape(scores.shape))
    want = oracle.nm_mask(scores, 1, 3, 0)
    np.testing.assert_array_equal(mask_of(NM(1, 3), scores, 1 / 3, QUERY), want)
    scores = scores.reshape(2, 3, 6)
    want = oracle.constant_fan_in_mask(scores.reshape(6, 6), 3)
    got = mask_of(ConstantFanIn(), scores, 0.5, OUT)
    np.testing.assert_array_equal(got, want.reshape(scores.shape))
    want = oracle.channel_mask(scores, 2, 3)
    np.testing.assert_array_equal(mask_of(Channel(), scores, 0.5, OUT), want)
    want = oracle.channel_mask(scores, 0, 1)  # whole heads
    got = mask_of(Channel(axis=0), scores, 0.5, OUT)
    np.testing.assert_array_equal(got, want)

  @parameterized.parameters(
    *itertools.product(
      [Unstructured(), NM(2, 4), Channel(), ConstantFanIn()], [0, 2]
    ),
    (Unstructured(), 1),
    (Block((2, 3)), 0),
  )
  def test_every_layer_of_a_stack_is_on_its_own(self, structure, stack):
    rng = np.random.default_rng(5)
    layers = np.stack([common.distinct(rng, (8, 6)) * 10**i for i in range(3)])
    others = tuple(a for a in range(3) if a != stack)
    axes = Axes(stack=(stack,), input=others[:1], output=others[1:])
    scores = np.moveaxis(layers, 0, stack)
    got = np.moveaxis(mask_of(structure, scores, 0.5, axes), stack, 0)
    for layer, mask in zip(layers, got, strict=True):
      np.testing.assert_array_equal(mask, of_oracle(structure, layer, 0.5))

  def test_two_stack_axes(self):
    rng = np.random.default_rng(6)
    scores = common.distinct(rng, (2, 3, 8, 2))
    axes = Axes(stack=(0, 1))
    for structure in (Unstructured(), ConstantFanIn()):
      got = mask_of(structure, scores, 0.5, axes)
      for at in np.ndindex(2, 3):
        want = of_oracle(structure, scores[at], 0.5)
        np.testing.assert_array_equal(got[at], want)

  @parameterized.parameters(*LAYERS[:2], *LAYERS[3:4], *LAYERS[5:6], LAYERS[7])
  def test_a_count_for_each_layer(self, structure, shape):
    rng = np.random.default_rng(7)
    scores = common.distinct(rng, (3, *shape))
    counts = np.array([1, 0, 2], np.int32)
    stack = Axes((0,), (1,), (2,))
    got = mask_at(structure, scores, counts[:, None, None], stack)
    for layer, n, mask in zip(scores, counts, got, strict=True):
      want = mask_at(structure, layer, n)
      np.testing.assert_array_equal(mask, want)

  @parameterized.parameters(*LAYERS)
  def test_density_zero_and_one(self, structure, shape):
    full, none = structure, structure
    if isinstance(structure, NM):  # n says it
      full, none = NM(4, 4, structure.axis), NM(0, 4, structure.axis)
      shape = (8, 4)
    one = full.group_count(shape, Axes(), 1.0)
    zero = none.group_count(shape, Axes(), 0.0)
    for value in (np.nan, -np.inf, 0.0):
      x = np.full(shape, value, np.float32)
      self.assertTrue(np.all(mask_at(full, x, one)))
      self.assertFalse(np.any(mask_at(none, x, zero)))

  @parameterized.product(
    structure=[Unstructured(), ConstantFanIn()], density=[0, 0.5, 1]
  )
  def test_density_gives_the_count(self, structure, density):
    x = common.distinct(np.random.default_rng(8), (8, 6))
    count = structure.group_count(x.shape, Axes(), density)
    want = mask_at(structure, x, count)
    np.testing.assert_array_equal(mask_of(structure, x, density), want)
    kept = structure.target_count(x.shape, density)
    self.assertEqual(np.sum(want), kept)
    self.assertEqual(kept, 48 * density)

  def test_constant_fan_in_keeps_one_input_at_least(self):
    scores = np.arange(12.0, dtype=np.float32).reshape(6, 2)
    got = mask_of(ConstantFanIn(), scores, 0.001)
    np.testing.assert_array_equal(np.sum(got, 0), [1, 1])

  def test_vectors_and_scalars(self):
    x = np.array([1.0, 4.0, 2.0, 3.0], np.float32)
    for structure in (Unstructured(), Channel(), NM(2, 4)):
      got = mask_of(structure, x, 0.5)
      self.assertEqual(got.tolist(), [False, True, False, True])
    self.assertEqual(mask_of(Unstructured(), np.float32(0), 1.0).shape, ())

  @parameterized.product(
    structure=[
      Unstructured(),
      NM(2, 4),
      Block((2, 2)),
      Channel(),
      ConstantFanIn(),
    ],
    shape=[(0, 4), (4, 0)],
  )
  def test_empty(self, structure, shape):
    self.assertEqual(mask_of(structure, np.zeros(shape), 0.5).shape, shape)
    self.assertEqual(weights_kept(structure, shape, 0.5), 0)

  def test_carries_no_gradient(self):
    def loss(x, structure):
      return jnp.sum(jnp.where(structure.mask(x, 0.5), x, 0))

    x = jnp.arange(16.0).reshape(4, 4)
    for structure in (NM(2, 4), Block((2, 2))):
      got = jax.jit(jax.grad(loss), static_argnums=1)(x, structure)
      np.testing.assert_array_equal(got != 0, mask_of(structure, x, 0.5))


CASES = (
  (Unstructured(), (3, 7, 5), STACKED),
  (Block((2, 3)), (3, 8, 6), STACKED),
  (Channel(), (3, 3, 4, 7), Axes()),
  (Channel(), (7, 3, 6), MIDDLE),
  (ConstantFanIn(), (3, 7, 5), STACKED),
  (ConstantFanIn(), (6, 2, 3), QUERY),
)


class TargetCountTest(parameterized.TestCase):
  @given(data=st.data())
  def test_is_met_exactly(self, data):
    structure, shape, axes = data.draw(st.sampled_from(CASES))
    density = data.draw(st.floats(0, 1) | st.sampled_from([0.0, 0.1, 0.9, 1]))
    scores = data.draw(common.score_arrays(shape))
    count = structure.group_count(shape, axes, density)
    got = mask_at(structure, scores, count, axes)
    want = structure.target_count(shape, density, axes)
    self.assertEqual(np.sum(got), want)

  @parameterized.parameters(
    (Unstructured(), (8, 6), 0.25, Axes(), 12),
    (Unstructured(), (3, 8, 6), 0.25, STACKED, 36),
    (Unstructured(), (3, 5), 0.5, Axes(), 8),  # 7.5, half to even
    (Unstructured(), (), 1.0, Axes(), 1),
    (NM(2, 4), (8, 6), 0.5, Axes(), 24),
    (NM(1, 8), (3, 8, 6), 0.125, STACKED, 18),
    (Block((2, 3)), (8, 6), 0.5, Axes(), 24),
    (Block((4, 4)), (3, 8, 8), 0.25, STACKED, 48),
    (Channel(), (8, 6), 0.5, Axes(), 24),
    (Channel(axis=0), (8, 6), 0.25, Axes(), 12),
    (Channel(), (3, 3, 8, 6), 0.5, Axes(), 216),
    (ConstantFanIn(), (8, 6), 0.25, Axes(), 12),
    (ConstantFanIn(), (8, 6), 0.01, Axes(), 6),
    (ConstantFanIn(), (3, 3, 8, 6), 0.25, Axes(), 108),
    (ConstantFanIn(), (6, 2, 3), 0.5, QUERY, 18),
    (ConstantFanIn(), (2, 3, 6), 0.5, OUT, 18),
  )
  def test_values(self, structure, shape, density, axes, want):
    self.assertEqual(structure.target_count(shape, density, axes), want)

  @parameterized.parameters(-0.1, 1.1, float("nan"))
  def test_density_outside_zero_to_one(self, density):
    for structure in (Unstructured(), Channel(), ConstantFanIn(), NM(2, 4)):
      with self.assertRaisesRegex(ValueError, r"^density must be in \[0, 1\]"):
        mask_of(structure, np.zeros((4, 4)), density)
      with self.assertRaisesRegex(ValueError, r"^density must be in \[0, 1\]"):
        structure.target_count((4, 4), density)


class SettingsTest(parameterized.TestCase):
  def test_equal_by_value(self):
    make = lambda: [
      Unstructured(), NM(2, 4), NM(2, 4, 0), NM(1, 4), Block((2, 4)),
      Block((4, 2)), Channel(), Channel(0), ConstantFanIn(),
      ConstantFanIn(0.3),
    ]  # fmt: skip
    for a, b in zip(make(), make(), strict=True):
      self.assertEqual((a, hash(a), repr(a)), (b, hash(b), repr(b)))
    for a, b in itertools.combinations(make(), 2):
      self.assertNotEqual(a, b)
    self.assertLen(set(make() + make()), 10)
    self.assertEqual(hash(Axes(stack=(0,))), hash(STACKED))

  def test_equal_settings_share_a_program(self):
    run = jax.jit(lambda s, x: s.mask(x, 0.5), static_argnums=0)
    for _ in range(2):
      run(NM(2, 4), jnp.ones((4, 2)))
    self.assertEqual(run._cache_size(), 1)

  @parameterized.parameters(
    (lambda: NM(5, 4), "n must be"),
    (lambda: NM(-1, 4), "n must be"),
    (lambda: NM(0, 0), "n must be"),
    (lambda: NM(1.5, 4), "n must be"),
    (lambda: Block((2, 0)), "shape must be"),
    (lambda: Block((2,)), "shape must be"),
    (lambda: Block((2, 2, 2)), "shape must be"),
    (lambda: ConstantFanIn(-0.1), "ablate must be"),
    (lambda: ConstantFanIn(1.1), "ablate must be"),
  )
  def test_bad_structures(self, make, message):
    with self.assertRaisesRegex(ValueError, message):
      make()

  @parameterized.parameters(
    (NM(2, 4), (6, 4), Axes(), "m must divide"),
    (NM(2, 4, axis=1), (4, 6), Axes(), "m must divide"),
    (NM(2, 4), (), Axes(), "m must divide"),
    (NM(2, 4, axis=2), (4, 4), Axes(), "axis must be in"),
    (Block((2, 4)), (4, 6), Axes(), "shape .* must divide"),
    (Block((3, 2)), (4, 6), Axes(), "shape .* must divide"),
    (Block((2, 2)), (4,), Axes(), "shape .* must divide"),
    (Channel(), (), Axes(), "must have an axis"),
    (Channel(axis=-3), (4, 4), Axes(), "axis must be in"),
    (ConstantFanIn(), (4,), Axes(), "input and output axes"),
    (ConstantFanIn(), (), Axes(), "input and output axes"),
    # A layer of a stack is on its own: no unit or group spans several.
    (NM(2, 4, axis=0), (4, 4, 4), STACKED, "axis"),
    (Channel(axis=0), (4, 4, 4), STACKED, "axis"),
    (Block((2, 2)), (4, 4, 4), MIDDLE, "last two axes"),
  )
  def test_structures_that_do_not_fit(self, structure, shape, axes, message):
    with self.assertRaisesRegex(ValueError, message):
      structure.target_count(shape, 0.5, axes)
    with self.assertRaisesRegex(ValueError, message):
      mask_of(structure, np.zeros(shape, np.float32), 0.5, axes)

  def test_scores_that_are_not_floating(self):
    with self.assertRaisesRegex(ValueError, "scores must be floating"):
      mask_of(Unstructured(), np.zeros((4, 4), np.int32), 0.5)


class AxesTest(parameterized.TestCase):
  @parameterized.parameters(
    (Axes(), (5, 7), (5, 7)),
    (Axes(), (3, 2, 5, 7), (3, 2, 5, 7)),
    (Axes(), (7,), (7,)),
    (Axes(), (), ()),
    (STACKED, (12, 5, 7), (5, 7)),
    (MIDDLE, (5, 12, 7), (5, 7)),
    (QUERY, (5, 2, 3), (5, 6)),
    (OUT, (2, 3, 5), (6, 5)),
    (Axes((0, 1), (2,), (3, 4)), (4, 6, 5, 2, 3), (5, 6)),
    (Axes((0,), (-2,), (-1,)), (12, 3, 3, 5, 7), (3, 3, 5, 7)),
    (Axes((), (1,), (0,)), (7, 5), (5, 7)),  # torch's
  )
  def test_layer_shape(self, axes, shape, want):
    self.assertEqual(axes.layer_shape(shape), want)

  def test_parts(self):
    axes = Axes((0,), (-2,), (-1,))
    self.assertEqual(axes.of(5), Axes((0,), (3,), (4,)))
    self.assertEqual(axes.of(5).of(5), axes.of(5))
    self.assertEqual(axes.layer(5), (1, 2, 3, 4))
    self.assertEqual(axes.fan_in(5), (1, 2, 3))
    self.assertEqual(axes.stack_shape((12, 3, 3, 5, 7)), (12,))
    self.assertEqual(QUERY.fan_in(3), (0,))
    self.assertEqual(OUT.fan_in(3), (0, 1))

  @parameterized.parameters(
    (Axes(stack=(1,)), 2, "each axis once"),
    (Axes(input=(0, 0)), 2, "each axis once"),
    (Axes(stack=(0,)), 2, "each axis once"),
    (Axes(input=(2,)), 2, "axis must be in"),
    (Axes(stack=(0,)), 1, "axis must be in"),
  )
  def test_bad(self, axes, ndim, message):
    with self.assertRaisesRegex(ValueError, message):
      axes.of(ndim)


@functools.partial(jax.jit, static_argnums=(0, 6))
def exchange(structure, w, g, on, drops, count, axes=Axes()):
  """What a rule does: pools scores, exchanges units, spreads them."""
  keys = lambda x: thresholds.ordered_keys(structure.pool(jnp.abs(x), axes))
  units = structure.pool(on.astype(jnp.float32), axes) > 0
  new = structure.exchange(units, keys(w), keys(g), drops, count, axes)
  return structure.spread(new, w.shape, axes)


@st.composite
def exchanges(draw, shape, fan_in=None):
  """Weights, gradients, a mask (with a fan-in) and how many to drop."""
  rng = np.random.default_rng(draw(st.integers(0, 999)))
  w, g = common.distinct(rng, shape), common.distinct(rng, shape)
  if fan_in is None:
    count = draw(st.integers(0, w.size))
    on = rng.permutation(w.size).reshape(shape) < count
  else:
    order = rng.permuted(np.arange(w.size).reshape(shape), axis=0)
    on = np.argsort(order, axis=0) < fan_in
  drop = draw(st.integers(0, int(on.sum())))
  return np.where(on, w, 0), g, on, drop


class ExchangeTest(parameterized.TestCase):
  @given(case=exchanges((5, 7)))
  def test_unstructured_is_rigl(self, case):
    w, g, on, drop = case
    want = weights_oracle.rigl_update(w, g, on, drop)
    got = exchange(Unstructured(), w, g, on, drop, on.sum())
    np.testing.assert_array_equal(got, want)

  @given(case=exchanges((5, 7)), scale=st.sampled_from([0.0, np.nan]))
  def test_ties_and_bad_gradients(self, case, scale):
    w, g, on, drop = case
    w, g = np.sign(w), np.where(g > 0, g, scale).astype(np.float32)
    want = weights_oracle.rigl_update(w, g, on, drop)
    got = exchange(Unstructured(), w, g, on, drop, on.sum())
    np.testing.assert_array_equal(got, want)

  @given(case=exchanges((3, 4)))
  def test_blocks_are_rigl_on_blocks(self, case):
    w, g, on, drop = case
    wide = lambda x: np.repeat(np.repeat(x, 2, 0), 3, 1)
    want = wide(weights_oracle.rigl_update(w, g, on, drop))
    args = (wide(w), wide(g), wide(on), drop, on.sum())
    got = exchange(Block((2, 3)), *args)
    np.testing.assert_array_equal(got, want)

  @given(case=exchanges((1, 7)))
  def test_channels_are_rigl_on_channels(self, case):
    w, g, on, drop = case
    tall = lambda x: np.repeat(x, 4, 0)
    want = tall(weights_oracle.rigl_update(w, g, on, drop))
    got = exchange(Channel(), tall(w), tall(g), tall(on), drop, on.sum())
    np.testing.assert_array_equal(got, want)

  @given(data=st.data())
  def test_layers_of_a_stack(self, data):
    cases = [data.draw(exchanges((5, 3))) for _ in range(2)]
    w, g, on, drop = (np.stack(x) for x in zip(*cases, strict=True))
    count = on.sum((1, 2), keepdims=True)
    drops = drop.astype(np.int32)[:, None, None]
    got = exchange(Unstructured(), w, g, on, drops, count, STACKED)
    for (w, g, on, drop), mask in zip(cases, got, strict=True):
      want = weights_oracle.rigl_update(w, g, on, drop)
      np.testing.assert_array_equal(mask, want)

  def test_a_budget_that_grows_and_shrinks(self):
    w = np.array([[4.0, 3.0, 2.0, 0.0, 0.0, 0.0]], np.float32)
    g = np.array([[0.0, 0.0, 0.0, 1.0, 3.0, 2.0]], np.float32)
    more = exchange(Unstructured(), w, g, w != 0, 1, 4)
    np.testing.assert_array_equal(np.flatnonzero(more), [0, 1, 4, 5])

  @given(case=exchanges((8, 3), fan_in=2))
  def test_nm_keeps_n_of_m(self, case):
    w, g, on, drop = case
    on = oracle.nm_mask(np.where(on, np.abs(w), np.abs(g) / 99), 2, 4, 0)
    drop = min(drop, int(on.sum()))
    w = np.where(on, common.distinct(np.random.default_rng(drop), w.shape), 0)
    got = exchange(NM(2, 4), w, g, on, drop, 2)
    stay = np.where(on, np.abs(w), -np.inf)
    (kept,) = oracle.top_k_mask([stay], int(on.sum()) - drop)
    # Two of four are on before, so that no group has kept too many.
    want = oracle.nm_mask(np.where(kept, np.inf, np.abs(g)), 2, 4, 0)
    np.testing.assert_array_equal(got, want)

  def test_nm_groups_that_have_too_many(self):
    w = np.array([[4.0], [3.0], [2.0], [1.0]], np.float32)
    g = np.array([[0.0], [0.0], [9.0], [9.0]], np.float32)
    got = exchange(NM(2, 4), w, g, np.ones((4, 1), bool), 1, 2)
    self.assertEqual(got.ravel().tolist(), [True, True, False, False])

  @given(data=st.data())
  def test_fan_in_is_srigl(self, data):
    fan_in = data.draw(st.sampled_from([1, 2, 3]))
    gamma = data.draw(st.sampled_from([0.0, 0.5, 1.0]))
    w, g, on, drop = data.draw(exchanges((6, 5), fan_in))
    want, live, new_fan_in = weights_oracle.srigl_update(
      w, g, on, drop, gamma, fan_in
    )
    got = exchange(ConstantFanIn(gamma), w, g, on, drop, fan_in)
    np.testing.assert_array_equal(got, want)
    per_neuron = np.asarray(got).sum(0)
    self.assertEqual(set(np.flatnonzero(per_neuron)), set(live))
    self.assertEqual(set(per_neuron[live].tolist()), {new_fan_in})

  @given(data=st.data())
  def test_fan_in_after_ablation(self, data):
    """Neurons that are gone may return where their gradients are salient."""
    w, g, on, drop = data.draw(exchanges((6, 5), 2))
    first, *_ = weights_oracle.srigl_update(w, g, on, drop, 1.0, 2)
    w = np.where(first, np.abs(g), 0).astype(np.float32)
    g = g[::-1, ::-1]
    drop = min(drop, int(first.sum()))
    want, *_ = weights_oracle.srigl_update(w, g, first, drop, 0.5, 2)
    got = exchange(ConstantFanIn(0.5), w, g, first, drop, 2)
    np.testing.assert_array_equal(got, want)

  def test_fan_in_of_a_stack_and_of_merged_axes(self):
    rng = np.random.default_rng(9)
    w, g = common.distinct(rng, (2, 6, 4)), common.distinct(rng, (2, 6, 4))
    on = np.stack([oracle.constant_fan_in_mask(np.abs(x), 3) for x in w])
    w = np.where(on, w, 0)
    want = [
      weights_oracle.srigl_update(*layer, 5, 0.5, 3)[0]
      for layer in zip(w, g, on, strict=True)
    ]
    structure = ConstantFanIn(0.5)
    got = exchange(structure, w, g, on, 5, 3, STACKED)
    np.testing.assert_array_equal(got, want)
    split = [x[0].reshape(6, 2, 2) for x in (w, g, on)]
    got = exchange(structure, *split, 5, 3, QUERY)
    np.testing.assert_array_equal(np.reshape(got, (6, 4)), want[0])


class ShardedTest(parameterized.TestCase):
  @parameterized.product(
    case=[
      (NM(2, 4), (16, 6), jax.P("x", "y"), Axes()),
      (NM(2, 4), (12, 6), jax.P("x", "y"), Axes()),  # groups straddle shards
      (NM(2, 4, axis=1), (12, 4), jax.P("x", "y"), Axes()),
      (Block((2, 2)), (16, 8), jax.P("x", "y"), Axes()),
      (Channel(), (16, 8), jax.P("x", "y"), Axes()),
      (ConstantFanIn(), (12, 8), jax.P("x", "y"), Axes()),
      (Unstructured(), (4, 12, 8), jax.P("x", None, "y"), STACKED),
    ],
    axis_type=common.AXIS_TYPES,
  )
  def test_equals_one_device(self, case, axis_type):
    structure, shape, spec, axes = case
    rng = np.random.default_rng(10)
    scores = rng.integers(-9, 9, shape).astype(np.float32)
    want = mask_of(structure, scores, 0.5, axes)
    mesh = common.mesh_of(axis_type)
    run = jax.jit(lambda x: structure.mask(x, 0.5, axes))
    with jax.set_mesh(mesh):
      a = common.place(scores, mesh, spec)
      compiled = run.lower(a).compile()
      got = compiled(a)
    np.testing.assert_array_equal(got, want)
    local = jax.NamedSharding(mesh, spec).shard_shape(shape)
    try:
      structure.check(local, axes)
    except ValueError:
      pass  # units straddle shards: something has to move
    else:
      self.assertEmpty(common.moved(compiled))
    if axis_type == jax.sharding.AxisType.Explicit:
      self.assertTrue(got.sharding.is_equivalent_to(a.sharding, a.ndim))


def test_every_structure_is_tested():
  tested = {type(s) for s, *_ in LAYERS}
  assert tested == set(structures.Structure.__subclasses__())
