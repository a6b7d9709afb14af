"""Pictures: what is drawn equals what the mask says."""

import jax
import matplotlib
import numpy as np
import pytest

import pallas_kernels as pk
from sparsejax import plots
from tests.kernels import problem

matplotlib.use("Agg")
CAUSAL = pk.Causal()


@pytest.fixture(autouse=True)
def close_figures():
  yield
  matplotlib.pyplot.close("all")


def random_mask(seed=0, rule=None, shape=(2, 3, 5), kv_blocks=6, **fields):
  rng = np.random.default_rng(seed)
  given = dict(
    indices=rng.integers(0, kv_blocks, (*shape, 4)),
    counts=rng.integers(0, 5, shape),
    **fields,
  )
  static = dict(block_q=16, block_kv=16, kv_blocks=kv_blocks, rule=rule)
  return problem.constructor(**static)(given)


def rgb(color):
  return np.rint(255 * np.array(matplotlib.colors.to_rgb(color)))


def drawn(ax):
  return np.asarray(ax.images[0].get_array())


@pytest.mark.parametrize("batch,head", [(0, 0), (1, 2)])
def test_drawn_blocks_are_the_listed_ones(batch, head):
  mask = random_mask()
  ax = plots.block_mask(mask, batch=batch, head=head)
  blocks = np.asarray(mask.blocks())[batch, head]
  want = np.where(blocks[..., None], rgb(plots.COLORS[0]), 255)
  np.testing.assert_array_equal(drawn(ax), want)
  sparsity = 100 * (1 - blocks.mean())
  assert ax.get_title() == f"batch {batch}, head {head}, {sparsity:.1f}% sparse"
  assert ax.get_xlabel() == "key block (of 16)"
  assert ax.get_ylabel() == "query block (of 16)"


@pytest.mark.parametrize(
  "at",
  [
    {},
    dict(q_positions=np.arange(75)[::-1], kv_positions=np.arange(96) // 3),
  ],
)
@pytest.mark.parametrize("rule", [CAUSAL, pk.Window(20, 3)])
def test_blocks_that_a_rule_cuts(rule, at):
  mask = random_mask(1, rule)
  ax = plots.block_mask(mask, **at)
  q = np.pad(at.get("q_positions", np.arange(80)), (0, -75 % 16 * bool(at)),
             mode="edge")  # fmt: skip
  k = at.get("kv_positions", np.arange(96))
  allowed = np.asarray(rule(q[:, None], k[None])).reshape(5, 16, 6, 16)
  colors = dict(
    skipped=rgb(plots.SKIPPED), cut=rgb(plots.CUT), whole=rgb(plots.COLORS[0])
  )
  blocks = np.asarray(mask.blocks())[0, 0]
  for i, j in np.ndindex(5, 6):
    here = allowed[i, :, j]
    kind = "whole" if here.all() else "cut" if here.any() else "skipped"
    want = colors[kind] if blocks[i, j] else 255
    np.testing.assert_array_equal(drawn(ax)[i, j], want)
  assert {x.get_text() for x in ax.get_legend().get_texts()} <= {
    "whole",
    "cut by the rule",
    "skipped by the rule",
  }


def test_members_are_a_shade():
  words = np.zeros((1, 1, 1, 1, 16), np.uint32)
  words[..., :4] |= 1  # a quarter reads slot 0
  words |= 2  # all read slot 1, and none slot 2
  mask = pk.BlockMask(
    [[[[0, 1, 2]]]], block_q=16, block_kv=16, kv_blocks=4, members=words
  )
  ax = plots.block_mask(mask)
  few, all_, none, unlisted = drawn(ax)[0].astype(int)
  np.testing.assert_array_equal(all_, rgb(plots.COLORS[0]))
  assert (all_ < few).all() and (few < none).all() and (none < unlisted).all()
  texts = [x.get_text() for x in ax.get_legend().get_texts()]
  assert texts == ["whole", "1 in 4 queries"]
  pale = ax.get_legend().get_patches()[1].get_facecolor()
  np.testing.assert_allclose(few, 255 * np.array(pale[:3]), atol=1)


def test_levels_are_colors():
  level = np.arange(5)[None, None, None]
  mask = pk.BlockMask(
    level, block_q=16, block_kv=16, kv_blocks=5, level=level, rule=CAUSAL
  )
  last = np.arange(100, 116)
  ax = plots.block_mask(mask, q_positions=last)
  want = [rgb(x) for x in (*plots.COLORS, plots.COLORS[-1])]
  np.testing.assert_array_equal(drawn(ax)[0], want)
  texts = [x.get_text() for x in ax.get_legend().get_texts()]
  assert texts == [f"level {i}" for i in range(5)]
  cut = drawn(plots.block_mask(mask, q_positions=last - 70))[0, 2]
  both = (rgb(plots.COLORS[2]) + rgb(plots.CUT)) / 2
  np.testing.assert_allclose(cut, both, atol=1)


def test_columns_are_lines():
  columns = np.array([[8, 40], [8, -1], [-1, -1], [8, 95], [8, 95]])
  mask = random_mask(shape=(1, 1, 5), columns=columns[None, None], rule=CAUSAL)
  kept = np.asarray(mask.columns)[0, 0]
  ax = plots.block_mask(mask)
  (lines,) = ax.collections
  found = set()
  for (x, top), (same, bottom) in lines.get_segments():
    assert x == same
    key = round((x + 0.5) * 16 - 0.5)
    rows = np.arange(top + 0.5, bottom).astype(int)
    found |= {(int(row), key) for row in rows}
  assert found == {(i, k) for i, row in enumerate(kept) for k in row if k >= 0}
  assert "column" in [x.get_text() for x in ax.get_legend().get_texts()]


def test_thousands_of_blocks():
  """A pixel is a square of blocks; none is lost, and the axes count blocks."""
  n = 1300
  blocks = np.zeros((n, n), bool)
  blocks[1000, 7] = blocks[1299, 1299] = True
  blocks[300:303, 600:603] = True
  mask = pk.BlockMask.from_blocks(blocks, block_q=16, block_kv=16)
  ax = plots.block_mask(mask)
  image = drawn(ax)
  assert image.shape == (434, 434, 3)
  full = {(100, 200): 1, (333, 2): 1 / 3, (433, 433): 1 / 3}
  for at in np.argwhere((image < 255).any(-1)):
    share = full.pop(tuple(at.tolist()))
    want = 255 - share * (255 - rgb(plots.COLORS[0]))
    np.testing.assert_allclose(image[tuple(at)], want, atol=1)
  assert not full
  assert ax.get_xlim() == (-0.5, n - 0.5) and ax.get_ylim() == (n - 0.5, -0.5)
  ax.figure.canvas.draw()


def test_into_axes_and_without_legend():
  _, axes = matplotlib.pyplot.subplots(1, 2)
  mask = random_mask(shape=(1, 1, 5))  # shared: any head may be asked for
  assert plots.block_mask(mask, ax=axes[0], head=7, legend=False) is axes[0]
  assert axes[0].get_legend() is None
  assert axes[0].get_title().startswith("head 7")
  assert not axes[1].images


def test_nothing_listed():
  mask = pk.BlockMask.from_blocks(
    np.zeros((3, 2), bool), block_q=16, block_kv=16
  )
  ax = plots.block_mask(mask)
  assert (drawn(ax) == 255).all() and ax.get_legend() is None
  assert ax.get_title() == "head 0, 100.0% sparse"


@pytest.mark.parametrize("log", [False, True])
def test_attention_mass(log):
  mask = random_mask(2)
  mass = np.random.default_rng(0).random((2, 3, 5, 4))
  mass[1, 1, :, 0] = 0
  ax = plots.attention_mass(mask, mass, batch=1, head=1, log=log)
  want = np.full((5, 6), np.nan)
  for i in range(5):
    for c in range(mask.counts[1, 1, i]):
      if mass[1, 1, i, c] or not log:
        want[i, mask.indices[1, 1, i, c]] = mass[1, 1, i, c]
  image = ax.images[0].get_array()
  np.testing.assert_array_equal(image.filled(np.nan), want)
  assert ax.get_title() == "batch 1, head 1, mass of listed blocks"
  ax.figure.canvas.draw()


def test_mass_of_heads_that_share_their_lists():
  mask = random_mask(3, shape=(1, 1, 5))
  mass = np.arange(2 * 3 * 5 * 4.0).reshape(2, 3, 5, 4)
  ax = plots.attention_mass(mask, mass, batch=1, head=2)
  image = ax.images[0].get_array()
  listed = np.asarray(mask.listed)[0, 0]
  assert set(image.compressed()) == set(mass[1, 2][listed])


@pytest.mark.parametrize(
  "draw,match",
  [
    (lambda mask: plots.block_mask(mask, head=3), "head is 3"),
    (lambda mask: plots.block_mask(mask, batch=-1), "batch is -1"),
    (lambda mask: plots.block_mask(mask.indices), "must be a BlockMask"),
    (lambda mask: jax.jit(plots.block_mask)(mask), "mask is traced"),
    (
      lambda mask: plots.attention_mass(mask, np.ones((2, 3, 5, 3))),
      "mass has shape",
    ),
    (
      lambda mask: plots.block_mask(
        random_mask(rule=CAUSAL), q_positions=np.arange(99)
      ),
      "q_positions has shape",
    ),
  ],
)
def test_wrong_arguments(draw, match):
  with pytest.raises(ValueError, match=match):
    draw(random_mask())


def trace_of(steps=6, experts=3, **lines):
  load = np.random.default_rng(0).dirichlet(np.ones(experts), steps)
  return {"load": load, "max_violation": experts * load.max(-1) - 1, **lines}


def test_routing_trace():
  dropped, neighbors = np.linspace(0, 0.5, 6), np.full(6, 0.25)
  trace = trace_of(dropped=dropped, neighbors=neighbors, other=np.ones(6))
  left, middle, right = plots.routing_trace(trace)
  # What is stacked reaches 1 everywhere, in bands as high as the loads.
  edges = [band.get_paths()[0].vertices for band in left.collections]
  assert len(edges) == 3
  top = {x: max(y for a, y in edges[-1] if a == x) for x in range(6)}
  np.testing.assert_allclose(list(top.values()), 1)
  first = {x: max(y for a, y in edges[0] if a == x) for x in range(6)}
  np.testing.assert_allclose(list(first.values()), trace["load"][:, 0])
  np.testing.assert_array_equal(
    middle.lines[0].get_ydata(), trace["max_violation"]
  )
  drawn = {line.get_label(): line.get_ydata() for line in right.lines}
  np.testing.assert_array_equal(drawn.pop("dropped edges"), dropped)
  np.testing.assert_array_equal(
    drawn.pop("same choice as the neighbor"), neighbors
  )
  assert not drawn and left.get_xlabel() == "step"


def test_routing_trace_of_one_step_in_given_axes():
  _, axes = matplotlib.pyplot.subplots(1, 3)
  assert plots.routing_trace(trace_of(steps=1), axes=axes) is axes
  assert axes[2].get_legend() is None


def test_routing_trace_refuses():
  trace = trace_of()
  with pytest.raises(ValueError, match=r"must have \['load'\], got"):
    plots.routing_trace({"max_violation": trace["max_violation"]})
  with pytest.raises(ValueError, match=r"entropy \[steps\], got \[6, 3\]"):
    plots.routing_trace({**trace, "entropy": np.ones(5)})
