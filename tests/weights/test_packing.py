"""Packed kernels against the oracle, and there and back bit for bit."""

import hypothesis
from hypothesis import strategies as st
import jax
import ml_dtypes
import numpy as np
import pytest

import pallas_kernels
from sparsejax import select
from sparsejax import weights
from sparsejax.weights import packing
from tests.oracles import storage as oracle

DTYPES = (np.float32, ml_dtypes.bfloat16, np.float16)
FORMATS = ("dense", "bitmask", "nm", "blocks", "constant_fan_in")
# -0.0, an infinity, the smallest subnormal, and a NaN that signals, of each.
SPECIAL = {
  2: (0x8000, 0x7C00, 0x7F80, 1, 0x7C01, 0x7F81, 0xFFF1),
  4: (0x80000000, 0x7F800000, 0x7F810000, 1, 0x7F800001, 0xFFC00007),
}


def kernel(shape, dtype, seed=0):
  """Any bits there are, special ones among them."""
  rng, size = np.random.default_rng(seed), np.dtype(dtype).itemsize
  bits = rng.integers(0, 256, (*shape, size), np.uint8)
  bits = bits.view({2: np.uint16, 4: np.uint32}[size])[..., 0]
  special = rng.random(shape) < 0.5
  bits[special] = np.resize(SPECIAL[size], special.sum())
  return bits.view(dtype)


def example(format, shape, density=0.4, seed=0):
  """(a mask, the format's argument)."""
  rng, (inputs, outputs) = np.random.default_rng(seed), shape
  draw = rng.random(shape)
  if format == "nm":
    m = next(m for m in (4, 3, 8, 2, 1) if inputs % m == 0)
    n = -(-m // 2)
    groups = draw.reshape(inputs // m, m, outputs)
    mask = (groups.argsort(1).argsort(1) < n) & (groups < 2 * density)
    return mask.reshape(shape), select.NM(n, m)
  if format == "blocks":
    block = tuple(next(d for d in (4, 3, 1) if s % d == 0) for s in shape)
    few = rng.random([s // d for s, d in zip(shape, block)]) < density
    return np.kron(few, np.ones(block)).astype(bool), select.Block(block)
  if format == "constant_fan_in":
    mask = draw.argsort(0).argsort(0) < round(density * inputs)
    return mask & (rng.random(outputs) < 0.8), select.ConstantFanIn()
  return draw < density, format


def argument_of(settings):
  """What `pack` takes for a description."""
  given = dict(settings)
  name = given.pop("format")
  structures = {
    "nm": select.NM,
    "blocks": lambda block: select.Block(tuple(block)),
    "constant_fan_in": select.ConstantFanIn,
  }
  return structures[name](**given) if name in structures else name


def words(x):
  return oracle.words(np.asarray(x))


def same(packed, w, mask):
  """Packed is of w and mask, to the bit."""
  got, found = weights.unpack(packed)
  assert got.dtype == w.dtype and found.dtype == bool
  keep = packed.description["format"] == "dense"
  np.testing.assert_array_equal(
    words(got), words(w) if keep else np.where(mask, words(w), 0)
  )
  np.testing.assert_array_equal(found, mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("format", FORMATS[1:])
@pytest.mark.parametrize("shape", [(12, 5), (9, 8), (8, 3), (0, 4), (4, 0)])
def test_arrays_are_the_oracles(format, dtype, shape):
  w = kernel(shape, dtype)
  mask, argument = example(format, shape)
  settings = {"nm": ("n", "m"), "blocks": ("shape",)}.get(format, ())
  settings = [getattr(argument, name) for name in settings]
  want = getattr(oracle, format)(w, mask, *settings)
  want = {name: x for name, x in want.items() if x is not None}
  packed = weights.pack(w, mask, argument)
  # Beyond the oracle's: which values fill up, and are not the mask's.
  extra = {"used"} if format == "nm" and not is_full(mask, argument) else set()
  assert set(packed.arrays) == set(want) | extra
  for name, x in want.items():
    got = packed.arrays[name]
    assert got.dtype == x.dtype and got.flags.c_contiguous
    of_words = words if x.dtype == dtype else np.asarray
    np.testing.assert_array_equal(of_words(got), of_words(x), name)
  # Each reads what the other wrote.
  settings = [] if format == "blocks" else settings
  read = getattr(oracle, f"from_{format}")
  read = read({"outputs": None} | packed.arrays, shape, *settings)
  read, found = read if format == "bitmask" else (read, mask)
  np.testing.assert_array_equal(words(read), np.where(mask, words(w), 0))
  np.testing.assert_array_equal(found, mask)
  got, _ = weights.unpack(weights.Packed(want, packed.description))
  np.testing.assert_array_equal(words(got), np.where(mask, words(w), 0))


def is_full(mask, structure):
  inputs, outputs = mask.shape
  groups = mask.reshape(inputs // structure.m, structure.m, outputs)
  return (groups.sum(1) == structure.n).all()


@hypothesis.given(
  format=st.sampled_from(FORMATS),
  dtype=st.sampled_from(DTYPES),
  inputs=st.integers(1, 33),
  outputs=st.integers(1, 17),
  density=st.sampled_from([0.0, 0.05, 0.5, 0.95, 1.0]),
  seed=st.integers(0, 9),
)
def test_there_and_back(format, dtype, inputs, outputs, density, seed):
  shape = inputs, outputs
  w = kernel(shape, dtype, seed)
  mask, argument = example(format, shape, density, seed)
  same(weights.pack(w, mask, argument), w, mask)
  tried = {}
  for size, settings in packing.sizes(mask, w.itemsize):
    packed = weights.pack(w, mask, argument_of(settings))
    same(packed, w, mask)
    assert packed.nbytes == size, settings
    name = settings["format"]
    tried[name] = min(size, tried.get(name, size))
  best = weights.pack(w, mask, "auto")
  same(best, w, mask)
  assert best.nbytes == min(tried.values())
  if getattr(argument, "m", 2) in (2, 4, 8, 16):
    assert best.nbytes <= weights.pack(w, mask, argument).nbytes


@pytest.mark.parametrize(
  "mask, want",
  [
    (np.ones((16, 8), bool), {"format": "dense"}),
    (np.arange(128).reshape(16, 8) > 0, {"format": "dense"}),
    (example("bitmask", (32, 32))[0], {"format": "bitmask"}),
    (
      np.arange(128).reshape(16, 8) < 32,
      {"format": "blocks", "block": [4, 8]},
    ),
    (example("nm", (64, 64), 1)[0], {"format": "nm", "n": 2, "m": 4}),
    (
      example("blocks", (64, 64))[0],
      {"format": "blocks", "block": [4, 4]},
    ),
    (np.eye(64, dtype=bool), {"format": "constant_fan_in"}),
  ],
)
def test_auto_finds_what_the_mask_is_of(mask, want):
  packed = weights.pack(kernel(mask.shape, np.float32), mask, "auto")
  shape = {"shape": list(mask.shape), "dtype": "float32"}
  assert packed.description == want | shape


@pytest.mark.parametrize("shape", [(), (7,), (3, 4, 5), (2, 3, 4, 5), (0, 3)])
def test_a_bitmask_takes_any_shape(shape):
  w = kernel(shape, np.float32)
  mask = np.random.default_rng(0).random(shape) < 0.5
  for format in ("auto", "bitmask", "dense", select.Unstructured()):
    same(weights.pack(w, mask, format), w, mask)


@pytest.mark.parametrize("m", [1, 5, 8, 17, 300])
@pytest.mark.parametrize("some", [0, 1, 2], ids=["none", "one", "nearly all"])
def test_any_m(m, some):
  n = (0, 1, m - 1)[some]
  shape = (2 * m, 3)
  order = np.random.default_rng(m).random((2, m, 3)).argsort(1).argsort(1)
  mask, w = (order < n).reshape(shape), kernel(shape, np.float16)
  packed = weights.pack(w, mask, select.NM(n, m))
  assert "used" not in packed.arrays
  same(packed, w, mask)
  sparser = mask.copy()
  sparser[m:] = False
  same(weights.pack(w, sparser, select.NM(n, m)), w, sparser)


def test_wide_kernels_number_their_inputs_in_int32():
  for inputs, dtype in ((2**16, np.uint16), (2**16 + 1, np.int32)):
    mask = np.zeros((inputs, 2), bool)
    mask[-1] = True
    packed = weights.pack(mask.astype(np.float32), mask, select.ConstantFanIn())
    assert packed.arrays["inputs"].dtype == dtype
    same(packed, mask.astype(np.float32), mask)


@pytest.mark.parametrize("format", ["blocks", "constant_fan_in"])
def test_arrays_are_those_that_run(format):
  """Whoever reads a file can make of it what `condense` makes."""
  mask, argument = example(format, (24, 16))
  w = np.where(mask, np.arange(1.0, 1 + mask.size).reshape(mask.shape), 0)
  w = w.astype(np.float32)
  arrays = weights.pack(w, mask, argument).arrays
  if format == "blocks":
    want = pallas_kernels.BlockSparseWeight.from_dense(w, mask, argument.shape)
  else:
    want = weights.CondensedWeight.from_dense(w, mask)
  for name, x in arrays.items():
    np.testing.assert_array_equal(x, getattr(want, name), name)


HALF = np.eye(4, dtype=bool)
ONES = np.ones((4, 4), np.float32)


@pytest.mark.parametrize(
  "kernel, mask, format, message",
  [
    (ONES, HALF, "csr", "format must be .*, got 'csr'"),
    (ONES, HALF, select.Channel(), "format must be .*, got Channel"),
    (ONES, HALF, select.NM(1, 4, axis=1), "must choose among inputs"),
    (ONES, HALF[:2], "bitmask", r"mask must be bool\[4, 4\], got bool\[2, 4"),
    (ONES, HALF * 1, "bitmask", r"mask must be bool\[4, 4\], got int64"),
    (ONES, ~HALF, select.NM(2, 4), "keep at most 2 of every 4 inputs, got 3"),
    (ONES, HALF, select.NM(1, 3), "m must divide the inputs, got m=3"),
    (ONES, HALF, select.Block((2, 2)), r"whole blocks of \(2, 2\)"),
    (ONES, HALF, select.Block((3, 2)), "must divide"),
    (
      ONES,
      np.tri(4, dtype=bool),
      select.ConstantFanIn(),
      "constant fan-in, got columns of 1 to 4 entries",
    ),
    (ONES[0], HALF[0], select.ConstantFanIn(), r"\[inputs, outputs\] for cons"),
  ],
)
def test_what_cannot_be_packed(kernel, mask, format, message):
  with pytest.raises(ValueError, match=message):
    weights.pack(kernel, mask, format)


def test_tracers_are_refused():
  with pytest.raises(ValueError, match="mask must be concrete"):
    jax.jit(lambda mask: weights.pack(ONES, mask, "bitmask"))(HALF)


SPOILT = [
  ("bitmask", "shape", lambda x: x[::-1] + 1, "shape must be"),
  ("bitmask", "compressed", lambda x: x[:-1], "compressed must be"),
  ("bitmask", "compressed", lambda x: x.view(np.int32), "compressed must"),
  ("bitmask", "bitmask", lambda x: x[:, :-1], "bitmask must be"),
  ("bitmask", "bitmask", lambda x: x | 1, "must be"),
  ("bitmask", "row_offsets", lambda x: x[::-1], "row_offsets must be"),
  ("nm", "metadata", lambda x: x * 0, "metadata must increase"),
  ("nm", "metadata", lambda x: x[:-1], "metadata must be"),
  ("nm", "values", lambda x: x[:-1], "values must be"),
  ("nm", "used", lambda x: x[:-1], "used must be"),
  ("blocks", "indices", lambda x: x - 9, "indices must lie"),
  ("blocks", "indices", lambda x: x + 9, "indices must lie"),
  ("blocks", "counts", lambda x: x - 9, "must be"),
  ("blocks", "counts", lambda x: x[:-1], "counts must be"),
  ("blocks", "values", lambda x: x[1:], "values must be"),
  ("constant_fan_in", "inputs", lambda x: x + 24, "inputs must lie"),
  ("constant_fan_in", "inputs", lambda x: x.astype(np.int32), "inputs must be"),
  ("constant_fan_in", "outputs", lambda x: x - 9, "outputs must lie"),
  ("constant_fan_in", "values", lambda x: x[1:], "must be"),
]


@pytest.mark.parametrize("format, name, spoil, message", SPOILT)
def test_spoilt_arrays(format, name, spoil, message):
  mask, argument = example(format, (24, 16))
  packed = weights.pack(kernel(mask.shape, np.float32), mask, argument)
  packed.arrays[name] = spoil(packed.arrays[name])
  with pytest.raises(ValueError, match=message):
    weights.unpack(packed)


@pytest.mark.parametrize(
  "change",
  [
    {"format": "csr"},
    {"dtype": "float33"},
    {"dtype": "float16"},
    {"shape": [24]},
    {"shape": "ab"},
    {"m": 0},
    {"m": 5},
    {"n": 3},
    {"k": 1},
    {"n": None},
  ],
  ids=str,
)
def test_spoilt_descriptions(change):
  mask, argument = example("nm", (24, 16))
  packed = weights.pack(kernel(mask.shape, np.float32), mask, argument)
  packed.description.update(change)
  with pytest.raises(ValueError):
    weights.unpack(packed)
  del packed.description["shape"]
  with pytest.raises(ValueError, match="shape"):
    weights.unpack(packed)
