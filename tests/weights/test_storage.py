"""Files of sparse models: there and back, what fails, and the report."""

import builtins
import json
import os
import stat

from flax import nnx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
from safetensors import numpy as numpy_files

from sparsejax import select
from sparsejax import weights
from sparsejax.weights import storage
from tests import common
from tests.oracles import storage as oracle

K, N = 24, 16


def model(dtype=np.float32, seed=0):
  """Parameters and masks: a layer of each format, one not masked, one whole."""
  rng = np.random.default_rng(seed)
  draw = rng.random((K, N))
  masks = {
    "any": draw < 0.3,
    "nm": np.asarray(select.NM(2, 4).mask(jnp.asarray(draw))),
    "blocks": np.kron(rng.random((6, 2)) < 0.5, np.ones((4, 8))) > 0,
    "fan_in": draw.argsort(0).argsort(0) < 2,
  }
  params = {}
  for name, mask in masks.items():
    bits = rng.integers(0, 256, (K, N, np.dtype(dtype).itemsize), np.uint8)
    w = bits.view(dtype)[..., 0]
    w[rng.random((K, N)) < 0.2] = -0.0
    w = np.where(mask, w, np.zeros((), dtype))
    params[name] = {"kernel": w, "bias": rng.random(N).astype(dtype)}
  params["norm"] = {"scale": np.ones(N, np.float32), "steps": np.array(7)}
  masks = {name: {"kernel": mask} for name, mask in masks.items()}
  masks["norm"] = {"scale": np.ones(N, bool)}
  return params, masks


FORMATS = {
  "any": "bitmask",
  "nm": select.NM(2, 4),
  "blocks": select.Block((4, 8)),
  "fan_in": select.ConstantFanIn(),
}


def same(got, want):
  assert got.shape == want.shape and got.dtype == want.dtype
  if got.dtype.itemsize in (2, 4):
    got, want = oracle.words(np.asarray(got)), oracle.words(np.asarray(want))
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("formats", ["auto", FORMATS], ids=["auto", "named"])
@pytest.mark.parametrize(
  "dtype", [np.float32, ml_dtypes.bfloat16, np.float16], ids=str
)
def test_there_and_back(tmp_path, dtype, formats):
  params, masks = model(dtype)
  path = tmp_path / "sparse.safetensors"
  report = weights.save(path, params, masks, formats)
  if formats is FORMATS:
    found = [report.layers[f"{n}/kernel"].format for n in FORMATS]
    assert found == ["bitmask", "nm", "blocks", "constant_fan_in"]
  flat, flat_masks = weights.load(path)
  assert set(flat) == {
    f"{layer}/{leaf}" for layer, of in params.items() for leaf in of
  }
  assert set(flat_masks) == {
    f"{layer}/{leaf}" for layer, of in masks.items() for leaf in of
  }
  for name, x in flat.items():
    layer, leaf = name.split("/")
    same(x, params[layer][leaf])
  for name, mask in flat_masks.items():
    layer, leaf = name.split("/")
    np.testing.assert_array_equal(mask, masks[layer][leaf])
  # By name they may be saved again, and give the same file.
  data = path.read_bytes()
  weights.save(path, flat, flat_masks, formats)
  assert path.read_bytes() == data
  assert os.listdir(tmp_path) == ["sparse.safetensors"]


def test_a_model_comes_back(tmp_path):
  net = nnx.Linear(K, N, rngs=nnx.Rngs(0))
  mask = np.arange(K)[:, None] % 12 == np.arange(N) % 12
  net.kernel[...] = jnp.asarray(np.where(mask, net.kernel[...], 0))
  params = nnx.state(net, nnx.Param)
  path = tmp_path / "a file.safetensors"
  weights.save(path, params, {"kernel": mask}, select.ConstantFanIn())
  other = nnx.clone(net)
  other.kernel[...] = jnp.asarray(np.ones((K, N), np.float32))
  found, masks = weights.load(path, like=nnx.state(other, nnx.Param))
  nnx.update(other, found)
  same(other.kernel[...], params["kernel"][...])
  same(other.bias[...], net.bias[...])
  assert masks["bias"][...].all() and masks["bias"].shape == (N,)
  fast = weights.condense_layers(
    other, nnx.to_pure_dict(masks), select.ConstantFanIn()
  )
  assert fast.kernel.shape == (2, N)


def test_arrays_are_placed_as_those_they_are_like(tmp_path):
  mesh = common.mesh_of(jax.sharding.AxisType.Auto)
  on = lambda x: jax.device_put(x, jax.NamedSharding(mesh, jax.P("x", "y")))
  params, masks = {"w": on(jnp.eye(16))}, {"w": on(jnp.eye(16) > 0)}
  path = tmp_path / "sharded.safetensors"
  weights.save(path, params, masks)
  for x in (params, jax.eval_shape(lambda: params)):
    found, found_masks = weights.load(path, like=x)
    same(found["w"], params["w"])
    np.testing.assert_array_equal(found_masks["w"], masks["w"])
    want = getattr(x["w"], "sharding", None)
    for got in (found["w"], found_masks["w"]):
      assert want is None or got.sharding == want


def test_what_other_parameters_hold(tmp_path):
  params = {
    "flag": np.array([True, False]),
    "counts": np.arange(5, dtype=np.int8),
    "wide": np.array([1.5, np.nan]),
    "complex": np.array([1j], np.complex64),
    "none": np.zeros((0, 3), np.float32),
    "scalar": np.float32(-0.0),
    "transposed": np.arange(6.0).reshape(2, 3).T,
    "a.values": np.ones(1),
    "a": np.zeros(2),
  }
  path = tmp_path / "x"
  weights.save(path, params, {})
  found, masks = weights.load(path)
  assert masks == {}
  for name, x in params.items():
    assert found[name].dtype == x.dtype and found[name].shape == x.shape
    assert found[name].tobytes() == x.tobytes(), name


def test_the_file_is_read_by_others(tmp_path):
  params, masks = model()
  path = tmp_path / "sparse.safetensors"
  weights.save(path, params, masks, FORMATS)
  tensors = numpy_files.load_file(path)
  shape = (K, N)
  arrays = lambda layer: {
    name.rsplit(".", 1)[1]: x
    for name, x in tensors.items()
    if name.startswith(f"{layer}/kernel.")
  }
  w, mask = oracle.from_bitmask(arrays("any"), shape)
  same(w, params["any"]["kernel"])
  np.testing.assert_array_equal(mask, masks["any"]["kernel"])
  same(oracle.from_nm(arrays("nm"), shape, 2, 4), params["nm"]["kernel"])
  same(oracle.from_blocks(arrays("blocks"), shape), params["blocks"]["kernel"])
  found = {"outputs": None} | arrays("fan_in")
  same(oracle.from_constant_fan_in(found, shape), params["fan_in"]["kernel"])
  with safetensors.safe_open(path, "numpy") as file:
    about = json.loads(file.metadata()["sparsejax"])["params"]["nm/kernel"]
  assert about.pop("crc32").keys() == {"values", "metadata"}
  assert about == {
    "format": "nm",
    "n": 2,
    "m": 4,
    "shape": [K, N],
    "dtype": "float32",
    "masked": True,
  }


@pytest.fixture
def saved(tmp_path):
  params, masks = model()
  path = tmp_path / "sparse.safetensors"
  weights.save(path, params, masks, FORMATS)
  return path


def refused(path, *parts, **options):
  with pytest.raises(ValueError) as raised:
    weights.load(path, **options)
  for part in (path, *parts):
    assert str(part) in str(raised.value)


@pytest.mark.parametrize("kept", [0, 5, 100, 3000, -1])
def test_truncated(saved, kept):
  saved.write_bytes(saved.read_bytes()[:kept])
  refused(saved, "truncated, damaged or no safetensors file")


def test_each_damaged_byte_is_found(saved):
  params, _ = weights.load(saved)
  data = bytearray(saved.read_bytes())
  rng = np.random.default_rng(0)
  header = 8 + int.from_bytes(data[:8], "little")
  for at in [
    *rng.integers(0, header, 200),
    *rng.integers(header, len(data), 50),
  ]:
    spoilt = bytearray(data)
    spoilt[at] ^= 1 << int(rng.integers(7))
    saved.write_bytes(spoilt)
    try:
      found, _ = weights.load(saved)
    except ValueError as error:
      assert str(saved) in str(error)
      continue
    # What is said of a parameter may have been changed into what fits too.
    assert at < header
    for name in set(found) & set(params):
      same(found[name], params[name])


def test_missing_and_foreign_files(saved, tmp_path):
  refused(tmp_path / "nowhere", "is missing")
  refused(tmp_path, "is missing, or no file")
  numpy_files.save_file({"w": np.ones(2)}, saved)
  refused(saved, "not written by sparsejax.weights.save")
  numpy_files.save_file(
    {}, saved, {"sparsejax": '{"version": 2, "params": {}}'}
  )
  refused(saved, "is of version 2; this sparsejax reads 1")
  for text in ("{", "[]", '{"version": 1}', '{"version": 1, "params": 3}'):
    numpy_files.save_file({}, saved, {"sparsejax": text})
    refused(saved, "damaged")
  for about in (
    3,
    {"crc32": {"values": 0}, "masked": False},
    {"crc32": {}, "masked": False, "format": "dense"},
    {"crc32": [], "masked": False},
  ):
    text = json.dumps({"version": 1, "params": {"w": about}})
    numpy_files.save_file({}, saved, {"sparsejax": text})
    refused(saved, "is damaged: w: ")


def test_another_model(saved):
  params, _ = model()
  refused(saved, "norm/steps is int64[], got None", like={
    **params, "norm": {"scale": params["norm"]["scale"]}
  })  # fmt: skip
  refused(
    saved, "more is None, got float64[2]", like=params | {"more": np.ones(2)}
  )
  params["any"]["kernel"] = np.zeros((N, K), np.float32)
  refused(
    saved, "any/kernel is float32[24, 16], got float32[16, 24]", like=params
  )


def save(path, mask=None, formats="auto", **params):
  params = params or {"w": np.eye(4)}
  masks = {} if mask is None else {"w": mask}
  return weights.save(path, params, masks, formats)


HALF = np.eye(4, dtype=bool)


@pytest.mark.parametrize(
  "arguments, message",
  [
    (dict(mask=~HALF), "w: 4 weights that its mask excludes are not zero"),
    (dict(mask=HALF, w=np.full((4, 4), np.nan)), "w: 12 weights that"),
    (dict(mask=HALF[:2]), r"masks\['w'\] must be a boolean mask .* \(4, 4\)"),
    (dict(mask=HALF * 1), r"masks\['w'\] must be a boolean mask"),
    (dict(mask=HALF, v=np.ones(3)), r"masks\['w'\] must .* shape None"),
    (dict(mask=HALF, formats="csr"), "w: format must be"),
    (dict(mask=HALF, formats={"v": "dense"}), "formats has a pattern"),
    (dict(mask=HALF, formats={"w": select.Block((2, 2))}), "w: mask must be"),
    (dict(mask=HALF, formats=select.NM(1, 3)), "w: m must divide"),
    (dict(w=jax.random.key(0)), "w: "),
    (dict(w=np.array(["a"])), "w: safetensors has no dtype <U1"),
    (dict(w=np.ones(2, ml_dtypes.int4)), "w: safetensors has no dtype int4"),
  ],
)
def test_what_cannot_be_saved(tmp_path, arguments, message):
  with pytest.raises(ValueError, match=message):
    save(tmp_path / "x", **arguments)
  assert not os.listdir(tmp_path)


def test_dense_keeps_what_a_mask_excludes(tmp_path):
  path, w = tmp_path / "x", np.arange(16.0).reshape(4, 4)
  save(path, HALF, "dense", w=w)
  params, masks = weights.load(path)
  same(params["w"], w)
  np.testing.assert_array_equal(masks["w"], HALF)


def test_tracers_are_refused(tmp_path):
  for call in (
    lambda x: save(tmp_path / "x", x > 0),
    lambda x: save(tmp_path / "x", w=x),
  ):
    with pytest.raises(ValueError, match="w"):
      jax.jit(call)(jnp.eye(4))


@pytest.mark.parametrize("step", ["save_file", "fsync", "replace"])
def test_a_failure_leaves_the_old_file(saved, monkeypatch, step):
  before = saved.read_bytes()

  def fail(*arguments, **options):
    if step == "save_file":  # some of it was written
      arguments[1].write_bytes(before[:99])
    raise OSError("no space left")

  monkeypatch.setattr(numpy_files if step == "save_file" else os, step, fail)
  with pytest.raises(OSError, match="no space left"):
    save(saved)
  monkeypatch.undo()
  assert saved.read_bytes() == before
  assert os.listdir(saved.parent) == [saved.name]


def test_places_that_cannot_be_written(tmp_path):
  for path in (tmp_path / "nowhere" / "x", tmp_path):
    with pytest.raises(OSError, match=str(path)):
      save(path)
  assert not os.listdir(tmp_path)


def test_a_file_has_the_usual_permissions(tmp_path):
  (tmp_path / "usual").touch()
  save(tmp_path / "x")
  modes = [stat.S_IMODE((tmp_path / n).stat().st_mode) for n in ("x", "usual")]
  assert modes[0] == modes[1]


def test_without_safetensors(saved, monkeypatch):
  imported = builtins.__import__

  def without(name, *arguments):
    if name.startswith("safetensors"):
      raise ImportError(name)
    return imported(name, *arguments)

  monkeypatch.setattr(builtins, "__import__", without)
  for call in (lambda: weights.load(saved), lambda: save(saved)):
    with pytest.raises(ValueError, match="pip install safetensors"):
      call()


def test_the_report():
  params, masks = model()
  report = weights.storage_report(params, masks, FORMATS)
  rows = {name: report.layers[f"{name}/kernel"] for name in FORMATS}
  for name, row in rows.items():
    mask = masks[name]["kernel"]
    assert row.dense_bytes == 4 * K * N and row.dense_flops == 2 * K * N
    assert row.flops == 2 * mask.sum()
  kept = masks["any"]["kernel"].sum()
  assert rows["any"].bytes == 4 * kept + N * K // 8 + 8 * N + 16
  assert rows["nm"].bytes == (4 * K // 2 + K // 8) * N
  assert rows["fan_in"].bytes == 2 * N * (4 + 2)
  assert rows["any"].runs == rows["nm"].runs == "no faster: computed as dense"
  assert rows["blocks"].runs == rows["fan_in"].runs
  assert rows["blocks"].runs == "by condense: depends on the batch"
  bias = report.layers["any/bias"]
  assert (bias.format, bias.bytes, bias.flops) == ("dense", 4 * N, None)
  total = report.total
  assert total.dense_bytes == 4 * (4 * K * N + 5 * N) + 8
  assert total.bytes == sum(row.bytes for row in report.layers.values())
  assert total.dense_flops == 8 * K * N
  assert total.flops == sum(row.flops for row in rows.values())
  lines = str(report).splitlines()
  assert [line.split()[0] for line in lines[1:5]] == [
    "any/kernel", "blocks/kernel", "fan_in/kernel", "nm/kernel"
  ]  # fmt: skip
  assert lines[0].endswith("on cpu")
  assert lines[5].startswith("(6 others)") and lines[6].startswith("total")
  assert f"{total.bytes:,}" in lines[6] and f"{total.flops:,.0f}" in lines[6]
  assert "experiments.bench --only=condensed" in lines[-1]


def test_reports_of_what_condense_does_not_run():
  params, masks = {"w": np.eye(64)}, {"w": np.eye(64, dtype=bool)}
  text = str(weights.storage_report(params, masks, "bitmask"))
  assert "no faster: computed as dense" in text and "bench" not in text
  text = str(weights.storage_report(params, {}))
  assert "(1 others)" in text and "faster" not in text
  text = str(weights.storage_report({"w": np.zeros((0, 4))}, {}))
  assert "100.0%" in text


def test_other_backends_were_not_measured():
  assert storage._runs("blocks", "gpu") == "by condense: not measured on gpu"
  assert storage._runs("nm", "tpu") == "no faster: computed as dense"
