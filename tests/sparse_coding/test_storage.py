"""Files of other libraries, read to what these make of them, and written."""

import functools
import json
import pathlib
import shutil

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import sparse_coding
from sparsejax import tensor_files

DATA = pathlib.Path(__file__).parent / "data"
AUTHORS = pathlib.Path(__file__).parents[1] / "oracles" / "data"
FOUND = json.loads((AUTHORS / "sparse_coding_authors.json").read_text())
FILES = {
  file["path"].removesuffix("/params.npz"): file for file in FOUND["files"]
}
SKIPS = "sparsify/skip_transcoder"  # SAELens has no top-k that skips
X = np.array(FOUND["arrays"]["x"], np.float32)


def dense(code):
  return code.dense() if isinstance(code, sparse_coding.Code) else code


@pytest.mark.parametrize("name", FILES)
def test_equals_the_library_that_wrote_it(name):
  sae = sparse_coding.load(DATA / name)
  z, x_hat = np.array(FILES[name]["z"]), np.array(FILES[name]["x_hat"])
  np.testing.assert_allclose(dense(sae.encode(X)), z, atol=1e-5)
  np.testing.assert_allclose(sae(X), x_hat, atol=1e-5)


@pytest.mark.parametrize(
  "name", [n for n in FILES if n != "sparsify/skip_transcoder"]
)
def test_written_and_read_again(name, tmp_path):
  sae = sparse_coding.load(DATA / name)
  sparse_coding.save(tmp_path / "made", sae)
  again = sparse_coding.load(tmp_path / "made")
  np.testing.assert_allclose(
    dense(again.encode(X)), dense(sae.encode(X)), atol=1e-6
  )
  np.testing.assert_allclose(again(X), sae(X), atol=1e-6)


@pytest.mark.parametrize(
  "name", [n for n in FILES if n.startswith("sae_lens") and "batch" not in n]
)
def test_writes_the_tensors_and_settings_of_saelens(name, tmp_path):
  sparse_coding.save(tmp_path, sparse_coding.load(DATA / name))
  written, theirs = (
    tensor_files.read(path / "sae_weights.safetensors")[1]
    for path in (tmp_path, DATA / name)
  )
  about, settings = (
    json.loads((path / "cfg.json").read_text())
    for path in (tmp_path, DATA / name)
  )
  assert about["architecture"] == settings["architecture"]
  assert set(settings) - {"metadata"} <= set(about)
  assert {n: x.shape for n, x in written.items()} == {
    n: x.shape for n, x in theirs.items()
  }
  if "rescaled" not in name:
    for tensor, x in theirs.items():
      np.testing.assert_allclose(written[tensor], x, rtol=1e-6)


def test_batch_top_k_is_written_with_its_threshold(tmp_path):
  sae = sparse_coding.Autoencoder(
    6, 16, sparse_coding.BatchTopK(2), rngs=nnx.Rngs(0)
  )
  sae.loss(X)
  sae.eval()
  sparse_coding.save(tmp_path, sae)
  again = sparse_coding.load(tmp_path)
  assert isinstance(again.sparsifier, sparse_coding.JumpReLU)
  np.testing.assert_allclose(again(X), sae(X), atol=1e-6)


def test_norm_aware_choice_is_kept(tmp_path):
  sae = sparse_coding.Autoencoder(
    6,
    16,
    sparse_coding.TopK(2),
    score=sparse_coding.norm_aware,
    rngs=nnx.Rngs(0),
  )
  scale = jnp.linspace(0.2, 3, 16)[:, None]
  sae.dictionary[...] *= scale
  sae.kernel[...] = jax.random.normal(jax.random.key(0), (16, 6))
  sparse_coding.save(tmp_path, sae)
  again = sparse_coding.load(tmp_path)
  np.testing.assert_array_equal(again.encode(X).indices, sae.encode(X).indices)
  np.testing.assert_allclose(again(X), sae(X), atol=1e-5)


def test_a_loaded_one_trains():
  sae = sparse_coding.load(DATA / "sae_lens/topk")
  sae.train()
  loss, _ = nnx.value_and_grad(lambda sae: sae.loss(X), has_aux=True)(sae)[0]
  assert np.isfinite(loss)
  assert sae.idle[...].max() == len(X)


def test_in_another_dtype():
  sae = sparse_coding.load(DATA / "gemma_scope", dtype=jnp.bfloat16)
  assert sae.dictionary[...].dtype == jnp.bfloat16
  assert sae.idle[...].dtype == jnp.int32


@pytest.fixture
def copied(tmp_path):
  shutil.copytree(DATA / "sae_lens/topk", tmp_path / "topk")
  return tmp_path / "topk"


def change(directory, **fields):
  path = directory / "cfg.json"
  settings = json.loads(path.read_text())
  settings.update(fields)
  path.write_text(json.dumps(settings))


@pytest.mark.parametrize(
  "fields, says",
  [
    ({"architecture": "temporal"}, "architecture must be one of"),
    ({"d_sae": 15}, r"dictionary must be \[15, 6\], got \[16, 6\]"),
    ({"d_in": True}, "d_in must be a positive integer, got True"),
    ({"k": 17}, "k must be up to 16, got 17"),
    ({"k": None}, "k must be a positive integer, got None"),
    ({"architecture": "standard", "d_in": 5}, r"must be \[5\], got \[6\]"),
    ({"normalize_activations": "layer_norm"}, "normalize_activations must be"),
    ({"architecture": "gated"}, "gate_bias|no place"),
    (
      {
        "architecture": "skip_transcoder",
        "d_out": 6,
        "apply_b_dec_to_input": False,
      },
      "skip must be",
    ),
  ],
)
def test_settings_that_do_not_fit(copied, fields, says):
  change(copied, **fields)
  with pytest.raises(ValueError, match=says):
    sparse_coding.load(copied)(X)


def test_damaged_files(copied, tmp_path):
  with pytest.raises(ValueError, match="width 6, width is 7"):
    sparse_coding.load(copied, width=7)
  with pytest.raises(ValueError, match="must have sae_weights"):
    sparse_coding.load(tmp_path / "nothing")
  with pytest.raises(ValueError, match="dtype must be floating"):
    sparse_coding.load(copied, dtype=jnp.int32)
  (copied / "cfg.json").write_text("{")
  with pytest.raises(ValueError, match=r"cfg.json is no JSON"):
    sparse_coding.load(copied)
  (copied / "cfg.json").unlink()
  with pytest.raises(ValueError, match=r"cfg.json cannot be read"):
    sparse_coding.load(copied)
  shutil.copy(DATA / "sae_lens/topk/cfg.json", copied)
  weights = copied / "sae_weights.safetensors"
  weights.write_bytes(weights.read_bytes()[:-8])
  with pytest.raises(ValueError, match="truncated"):
    sparse_coding.load(copied)
  (tmp_path / "params.npz").write_bytes(b"PK no zip")
  with pytest.raises(ValueError, match="truncated, damaged or no npz"):
    sparse_coding.load(tmp_path)


def test_pickles_are_refused(tmp_path):
  np.savez(tmp_path / "params.npz", W_dec=np.array([{}], object))
  with pytest.raises(ValueError, match="damaged or no npz"):
    sparse_coding.load(tmp_path)


def test_what_saelens_has_not(tmp_path):
  crosscoder = sparse_coding.Crosscoder(2, 3, 8, rngs=nnx.Rngs(0))
  choice = sparse_coding.FeatureChoice(jnp.ones(8))
  chosen = sparse_coding.Autoencoder(6, 8, choice, rngs=nnx.Rngs(0))
  for autoencoder, says in ((crosscoder, "Crosscoder"), (chosen, "Choice")):
    with pytest.raises(ValueError, match=says):
      sparse_coding.save(tmp_path, autoencoder)


@pytest.mark.parametrize(
  "name, fields, says",
  [
    ("sae_lens/standard", {"activation_fn_str": "topk"}, "activation_fn_str"),
    ("sae_lens/transcoder", {"apply_b_dec_to_input": True}, "apply_b_dec"),
    ("sparsify/topk", {"signed": True}, "signed must be one of"),
    ("sparsify/topk", {"k": 17}, "k must be up to 16, got 17"),
  ],
)
def test_settings_that_mean_something_else(name, fields, says, tmp_path):
  directory = shutil.copytree(DATA / name, tmp_path / "copy")
  change(directory, **fields)
  with pytest.raises(ValueError, match=says):
    sparse_coding.load(directory)


def test_only_matching_pursuit_as_saelens_has_it(tmp_path):
  unsigned = functools.partial(sparse_coding.matching_pursuit, k=2)
  sae = sparse_coding.Autoencoder(6, 8, solver=unsigned, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="signed=True"):
    sparse_coding.save(tmp_path, sae)
  sae = sparse_coding.mp_sae(6, 8, 2, rngs=nnx.Rngs(0))
  sae.dictionary[...] *= 2
  with pytest.raises(ValueError, match="must have norm 1"):
    sparse_coding.save(tmp_path, sae)
  path = shutil.copytree(DATA / "sae_lens/matching_pursuit", tmp_path / "long")
  tensors = tensor_files.read(path / "sae_weights.safetensors")[1]
  tensors["W_dec"] = 2 * tensors["W_dec"]
  tensor_files.write(path / "sae_weights.safetensors", tensors, {})
  with pytest.raises(ValueError, match="norm 1"):
    sparse_coding.load(path)


def test_scores_that_saelens_has_not(tmp_path):
  sae = sparse_coding.gradient_sae(6, 8, 2, beta=1.0, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="score"):
    sparse_coding.save(tmp_path, sae)


@pytest.mark.parametrize("kind", ["empty", "array"])
def test_files_that_are_no_archives(kind, tmp_path):
  path = tmp_path / "params.npz"
  path.touch()
  if kind == "array":
    with path.open("wb") as file:
      np.save(file, np.zeros(3))
  with pytest.raises(ValueError, match=r"params\.npz is .* no npz"):
    sparse_coding.load(tmp_path)
