"""The export of a pruned encoder: its files, and what it prints."""

import json
import types

from absl import app
from flax import nnx
import numpy as np
import pytest
import tokenizers

from experiments import export
from experiments import prune
from experiments.models import bert
from experiments.models import pretrained
from experiments.tasks import docstrings
from sparsejax import paths
from sparsejax import tensor_files
from sparsejax import weights

WORDS = ("gives", "the", "of", "x", "and", "nothing", "than", "mean", "sum")
SETTINGS = {
  "model_type": "bert",
  "vocab_size": 40,
  "hidden_size": 32,
  "num_hidden_layers": 1,
  "num_attention_heads": 2,
  "intermediate_size": 32,  # kernels of one shape: little to compile
  "max_position_embeddings": 16,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """A directory of a small encoder, and ten texts of few words."""
  directory = tmp_path_factory.mktemp("source")
  (directory / "config.json").write_text(json.dumps(SETTINGS))
  vocabulary = {word: i for i, word in enumerate(["[UNK]", *WORDS])}
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]")
  )
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  tokenizer.save(str(directory / "tokenizer.json"))
  config = bert.Config.read(SETTINGS)
  shapes = nnx.eval_shape(lambda: bert.Bert(config, rngs=nnx.Rngs(0)))
  rng, tensors = np.random.default_rng(0), {}
  for path, x in paths.named(nnx.state(shapes, nnx.Param))[0].items():
    shape = x.shape[::-1] if path.endswith("kernel") else x.shape
    values = rng.standard_normal(shape).astype(np.float32)
    tensors[bert.Bert.NAMES.tensor(path)] = values
  tensor_files.write(directory / "model.safetensors", tensors, {})
  texts = [" ".join((WORDS * 3)[i : i + 2 + i // 2]) for i in range(10)]
  pairs = docstrings.Pairs(tuple(texts), tuple(texts), "words")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(docstrings, "load", lambda: pairs)
    patch.setattr(prune, "ROWS", 4)
    yield directory


@pytest.fixture(scope="module")
def before(source):
  """The source's arrays."""
  return arrays(pretrained.load(source).model)


def arrays(model):
  leaves, _ = paths.named(nnx.state(model, nnx.Param))
  return {path: np.asarray(x) for path, x in leaves.items()}


def run(monkeypatch, source, out, **changes):
  given = {
    "model": str(source),
    "method": "magnitude",
    "sparsity": 0.5,
    "structure": "unstructured",
    "format": "auto",
    "calibration": 4,
    "length": 16,
    "seed": 0,
    "out": str(out),
  }
  given = types.SimpleNamespace(**given | changes)
  monkeypatch.setattr(export.flags, "FLAGS", given)
  export.main([])


@pytest.mark.parametrize(
  "changes, stored",
  [
    ({}, "bitmask"),
    ({"format": "dense"}, "dense"),
    ({"method": "wanda", "structure": "2:4"}, "nm"),
    ({"method": "wanda", "format": "constant_fan_in"}, "constant_fan_in"),
    ({"structure": "block16", "format": "block16"}, "blocks"),
  ],
  ids=str,
)
def test_an_export(
  source, before, tmp_path, monkeypatch, capsys, changes, stored
):
  out = tmp_path / "out"
  run(monkeypatch, source, out, **changes)
  printed = capsys.readouterr().out
  rows = [line.split() for line in printed.splitlines()]
  formats = {row[0]: row[1] for row in rows if row and "/kernel" in row[0]}
  assert len(formats) == 6 and set(formats.values()) == {stored}
  # Both are one model, of the source's embeddings and half of its kernels.
  dense = arrays(pretrained.load(out / "dense").model)
  params, masks = weights.load(out / "sparse.safetensors")
  assert dense.keys() == params.keys() == before.keys()
  for path, x in dense.items():
    assert x.tobytes() == params[path].tobytes()
    if path in formats:
      assert masks[path].mean() == 0.5 and not x[~masks[path]].any()
      np.testing.assert_array_equal(x[masks[path]], before[path][masks[path]])
    else:
      np.testing.assert_array_equal(x, before[path])
      assert masks.get(path, np.True_).all()
  for file in ("sparse.safetensors", "dense/model.safetensors"):
    size = (out / file).stat().st_size
    assert f"{size:,} bytes: {out / file}" in printed
  # What the error is of.
  for told in ("text: words", "4 docstrings", "16 tokens", "seed:hash: 0:"):
    assert told in printed


def test_what_is_refused(source, tmp_path, monkeypatch):
  (tmp_path / "file").touch()
  for changes, error, message in (
    ({"out": tmp_path}, app.UsageError, "exists"),
    ({"out": tmp_path / "file"}, app.UsageError, "exists"),
    ({"structure": "2:4", "sparsity": 0.6}, ValueError, "must have 0.5"),
    ({"structure": "block16", "method": "dsnot"}, ValueError, "single weights"),
    ({"calibration": 20}, ValueError, "calibration and evaluation"),
  ):
    with pytest.raises(error, match=message):
      run(monkeypatch, source, **{"out": tmp_path / "out"} | changes)
  with pytest.raises(app.UsageError, match="unknown arguments"):
    export.main(["export", "more"])
  assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_format_that_the_masks_are_not_of(source, tmp_path, monkeypatch):
  message = r"blocks/0/\w+/\w+/kernel: mask must keep at most 2"
  with pytest.raises(ValueError, match=message):
    run(monkeypatch, source, tmp_path / "out", format="2:4")
  assert not list(tmp_path.iterdir())
