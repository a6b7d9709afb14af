"""Autoencoders in files: those of SAELens, sparsify and Gemma Scope.

`load` reads any of the three, `save` writes a directory that SAELens loads.
Their encoder kernels are [width, latents], those of sparsify excepted.
"""

from collections.abc import Callable
import functools
import json
import os
import pathlib
from typing import Any
import zipfile

from flax import nnx
import jax.numpy as jnp
import numpy as np

from sparsejax import tensor_files
from sparsejax.sparse_coding import solvers
from sparsejax.sparse_coding import sparsifiers
from sparsejax.sparse_coding.autoencoders import Autoencoder
from sparsejax.sparse_coding.autoencoders import Crosscoder
from sparsejax.sparse_coding.selection import norm_aware

_CONFIG, _SAELENS, _SPARSIFY = (
  "cfg.json",
  "sae_weights.safetensors",
  "sae.safetensors",
)
_GEMMA_SCOPE = "params.npz"


def load(
  path: str | os.PathLike, *, width: int | None = None, dtype=jnp.float32
) -> Autoencoder:
  """Reads an autoencoder or a transcoder that another library trained.

  Args:
    path: a directory of SAELens (cfg.json and sae_weights.safetensors), of
      sparsify (cfg.json and sae.safetensors) or of Gemma Scope (params.npz).
    width: None, or what the inputs must have.
    dtype: floating, of the parameters.

  Returns:
    The module, after `eval()`. What a SAELens file says of top-k with
    activations scaled by the norms of atoms is folded into the parameters, so
    that codes are those of SAELens. Of matching pursuit they are, too, as long
    as an atom has a positive product with what is left; SAELens stops there.

  Raises:
    ValueError: naming the file, for what is missing, damaged, of other shapes
      than it says itself or of another width, and for what this room has not.

  Example:
    >>> import tempfile
    >>> from flax import nnx
    >>> from sparsejax import sparse_coding
    >>> sae = sparse_coding.Autoencoder(
    ...   4, 8, sparse_coding.TopK(2), rngs=nnx.Rngs(0)
    ... )
    >>> with tempfile.TemporaryDirectory() as directory:
    ...   sparse_coding.save(directory, sae)
    ...   found = sparse_coding.load(directory)
    >>> bool((found(jnp.ones((3, 4))) == sae(jnp.ones((3, 4)))).all())
    True
  """
  if not jnp.issubdtype(dtype, jnp.floating):
    raise ValueError(f"dtype must be floating, got {jnp.dtype(dtype).name}")
  path = pathlib.Path(path)
  if (path / _GEMMA_SCOPE).is_file():
    file = path / _GEMMA_SCOPE
    made = _gemma_scope(_arrays(file))
  elif (path / _SPARSIFY).is_file():
    file = path / _SPARSIFY
    made = _sparsify(_Settings(path), tensor_files.read(file)[1])
  elif (path / _SAELENS).is_file():
    file = path / _SAELENS
    made = _saelens(_Settings(path), tensor_files.read(file)[1])
  else:
    raise ValueError(
      f"{path} must have {_SAELENS}, {_SPARSIFY} or {_GEMMA_SCOPE}"
    )
  make, params = made
  # Shapes alone, as all parameters are given.
  graph, shapes = nnx.split(nnx.eval_shape(make))
  autoencoder = nnx.merge(graph, _filled(shapes, params, file, dtype))
  if width not in (None, autoencoder.width):
    raise ValueError(
      f"{file} is for inputs of width {autoencoder.width}, width is {width}"
    )
  autoencoder.eval()
  return autoencoder


def save(path: str | os.PathLike, autoencoder: Autoencoder) -> None:
  """Writes a directory that SAELens loads, as an autoencoder for inference.

  Batch top-k is written with its running threshold, as SAELens does.

  Args:
    path: of the directory, which is made where it is not there; what is there
      of the same names is replaced.
    autoencoder: with ReLU, TopK, BatchTopK, JumpReLU or Gated, or with a solver
      that is `functools.partial(matching_pursuit, k=..., signed=True)`.

  Raises:
    ValueError: for what SAELens has not.
    OSError: the files cannot be written.
  """
  architecture, settings, tensors = _described(autoencoder)
  about = {
    "architecture": architecture,
    "d_in": autoencoder.width,
    "d_sae": autoencoder.latents,
    "dtype": autoencoder.dictionary[...].dtype.name,
    "device": "cpu",
    "apply_b_dec_to_input": autoencoder.centers,
    "normalize_activations": "none",
    "reshape_activations": "none",
    "metadata": {},
  } | settings
  path = pathlib.Path(path)
  path.mkdir(parents=True, exist_ok=True)
  tensor_files.write(
    path / _SAELENS, {n: np.asarray(x) for n, x in tensors.items()}, {}
  )
  (path / _CONFIG).write_text(json.dumps(about, indent=2))


class _Settings:
  """A cfg.json, whose fields are asked for by name."""

  def __init__(self, directory: pathlib.Path):
    self.file = directory / _CONFIG
    try:
      self.fields = json.loads(self.file.read_text())
    except OSError as error:
      raise ValueError(f"{self.file} cannot be read: {error}") from error
    except ValueError as error:
      raise ValueError(f"{self.file} is no JSON: {error}") from error
    if not isinstance(self.fields, dict):
      raise ValueError(f"{self.file} must hold fields by name")

  def size(self, field: str, most: int | None = None) -> int:
    """A positive integer."""
    value = self.fields.get(field)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
      raise ValueError(
        f"{self.file}: {field} must be a positive integer, got {value!r}"
      )
    if most is not None and value > most:
      raise ValueError(
        f"{self.file}: {field} must be up to {most}, got {value}"
      )
    return value

  def one_of(self, field: str, default: Any, values) -> Any:
    """One of the values that this room has a meaning for."""
    value = self.fields.get(field, default)
    if value not in values:
      raise ValueError(
        f"{self.file}: {field} must be one of {list(values)}, got {value!r}"
      )
    return value


def _saelens(settings, tensors):
  """How to make the module, and its parameters by name."""
  kind = settings.one_of("architecture", None, tuple(_SPARSIFIERS))
  settings.one_of("normalize_activations", "none", ("none", None, False))
  # Of files before SAELens 6, where it could be top-k.
  for field in ("activation_fn", "activation_fn_str"):
    settings.one_of(field, "relu", ("relu",))
  # What is reshaped are heads, which the caller's last axis already joins.
  settings.one_of("reshape_activations", "none", ("none", "hook_z"))
  width, latents = settings.size("d_in"), settings.size("d_sae")
  transcoder, skip = "transcoder" in kind, "skip" in kind
  outputs = settings.size("d_out") if transcoder else None
  centers = settings.one_of(
    "apply_b_dec_to_input",
    not transcoder,
    (False,) if transcoder else (True, False),
  )
  params = {
    "dictionary": tensors.pop("W_dec", None),
    "bias": tensors.pop("b_dec", None),
  }
  given = {}
  if kind == "matching_pursuit":
    settings.one_of("residual_threshold", 0.0, (0.0,))
    settings.one_of("stop_on_duplicate_support", False, (False,))
    steps = settings.size("max_iterations")
    _check_unit(settings.file, params["dictionary"])
    given["solver"] = functools.partial(
      solvers.matching_pursuit, k=steps, signed=True
    )
  else:
    params["kernel"] = _transposed(tensors.pop("W_enc", None))
    for theirs, ours in _BIASES.items():
      if theirs in tensors:
        params[ours] = tensors.pop(theirs)
    if "threshold" in tensors:
      threshold = tensors.pop("threshold")
      params["sparsifier/log_threshold"] = _log_threshold(threshold)
  if skip:
    params["skip"] = _transposed(tensors.pop("W_skip", None))
  if kind == "topk" and settings.one_of(
    "rescale_acts_by_decoder_norm", False, (True, False)
  ):
    _fold(params)
  _refuse_rest(settings.file.with_name(_SAELENS), tensors)

  def make():
    sparsifier = _SPARSIFIERS[kind]
    made = Autoencoder(
      width,
      latents,
      None if sparsifier is None else sparsifier(settings, latents),
      outputs=outputs,
      skip=skip,
      rngs=nnx.Rngs(0),
      **given,
    )
    made.centers = centers
    return made

  return make, params


_BIASES = {
  "b_enc": "encoder_bias",
  "b_gate": "sparsifier/gate_bias",
  "b_mag": "sparsifier/magnitude_bias",
  "r_mag": "sparsifier/log_scale",
}

# By SAELens's architecture, of its settings and the number of latents.
_RELU = lambda settings, latents: sparsifiers.ReLU()
_JUMP_RELU = lambda settings, latents: sparsifiers.JumpReLU(latents)
_SPARSIFIERS: dict[str, Callable | None] = {
  "standard": _RELU,
  "topk": lambda settings, latents: sparsifiers.TopK(
    settings.size("k", latents)
  ),
  "jumprelu": _JUMP_RELU,
  "gated": lambda settings, latents: sparsifiers.Gated(latents),
  "matching_pursuit": None,
  "transcoder": _RELU,
  "skip_transcoder": _RELU,
  "jumprelu_transcoder": _JUMP_RELU,
  "jumprelu_skip_transcoder": _JUMP_RELU,
}


def _sparsify(settings, tensors):
  """How to make the module, and its parameters by name."""
  settings.one_of("activation", "topk", ("topk",))
  settings.one_of("signed", False, (False,))
  width = settings.size("d_in")
  latents = settings.fields.get("num_latents") or (
    width * settings.size("expansion_factor")
  )
  k = settings.size("k", latents)
  transcodes = settings.one_of("transcode", False, (True, False))
  skip = settings.one_of("skip_connection", False, (True, False))
  params = {
    "dictionary": tensors.pop("W_dec", None),
    "bias": tensors.pop("b_dec", None),
    "kernel": tensors.pop("encoder.weight", None),
    "encoder_bias": tensors.pop("encoder.bias", None),
  }
  if skip:
    params["skip"] = _transposed(tensors.pop("W_skip", None))
  _refuse_rest(settings.file.with_name(_SPARSIFY), tensors)

  def make():
    made = Autoencoder(
      width, latents, sparsifiers.TopK(k), skip=skip, rngs=nnx.Rngs(0)
    )
    made.centers = not transcodes
    return made

  return make, params


def _gemma_scope(tensors):
  """How to make the module, and its parameters by name."""
  dictionary = tensors.get("W_dec")
  if dictionary is None or dictionary.ndim != 2:
    raise ValueError(f"{_GEMMA_SCOPE} must have W_dec [latents, width]")
  latents, width = dictionary.shape
  params = {
    "dictionary": tensors.pop("W_dec"),
    "bias": tensors.pop("b_dec", None),
    "kernel": _transposed(tensors.pop("W_enc", None)),
    "encoder_bias": tensors.pop("b_enc", None),
  }
  threshold = tensors.pop("threshold", None)
  if threshold is not None:
    threshold = _log_threshold(threshold)
  params["sparsifier/log_threshold"] = threshold
  _refuse_rest(_GEMMA_SCOPE, tensors)

  def make():
    made = Autoencoder(
      width, latents, sparsifiers.JumpReLU(latents), rngs=nnx.Rngs(0)
    )
    made.centers = False
    return made

  return make, params


def _fold(params):
  """Parameters of the same function and choice, with atoms of unit norm."""
  if any(params.get(n) is None for n in ("dictionary", "kernel")):
    return  # what is missing is said later
  norms = np.linalg.norm(params["dictionary"], axis=1)
  params["dictionary"] = params["dictionary"] / norms[:, None]
  params["kernel"] = params["kernel"] * norms[:, None]
  if params.get("encoder_bias") is not None:
    params["encoder_bias"] = params["encoder_bias"] * norms


def _check_unit(where, atoms):
  """SAELens's matching pursuit takes products with atoms as they are."""
  if atoms is None:
    return  # which is said later
  norms = np.linalg.norm(atoms, axis=-1)
  if not np.allclose(norms, 1, atol=1e-3):
    raise ValueError(
      f"{where}: atoms of matching pursuit must have norm 1, got {norms.min()} "
      f"to {norms.max()}"
    )


def _log_threshold(threshold):
  # Theirs also drop what is negative, whatever the threshold.
  with np.errstate(divide="ignore"):
    return np.log(np.maximum(threshold, 0))


def _transposed(x):
  return None if x is None else x.T


def _refuse_rest(file, tensors):
  if tensors:
    raise ValueError(f"{file} has tensors without a meaning: {sorted(tensors)}")


def _arrays(file):
  """What a npz file holds; pickles are refused."""
  try:
    found = np.load(file, allow_pickle=False)
    if not isinstance(found, np.lib.npyio.NpzFile):
      raise ValueError("an array, and no archive of some")
    with found:
      return {name: found[name] for name in found.files}
  except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
    raise ValueError(
      f"{file} is truncated, damaged or no npz: {error}"
    ) from error


def _filled(shapes, params, file, dtype):
  """The state with parameters in place of shapes; counters begin at 0."""
  params = dict(params)

  def fill(path, leaf):
    if not isinstance(leaf, nnx.Param):
      return leaf.replace(jnp.zeros(leaf.shape, leaf.dtype))
    name = "/".join(map(str, path))
    x = params.pop(name, None)
    if x is None or x.shape != leaf.shape:
      got = "nothing" if x is None else list(x.shape)
      raise ValueError(f"{file}: {name} must be {list(leaf.shape)}, got {got}")
    return leaf.replace(jnp.asarray(x, dtype))

  state = nnx.map_state(fill, shapes)
  left = [name for name, x in params.items() if x is not None]
  if left:
    raise ValueError(f"{file} has {left}, which its settings have no place for")
  return state


def _described(autoencoder):
  """SAELens's architecture, settings and tensors."""
  if isinstance(autoencoder, Crosscoder):
    raise ValueError("autoencoder is a Crosscoder, which SAELens has not")
  sparsifier = autoencoder.sparsifier
  dictionary = autoencoder.dictionary[...]
  tensors = {"W_dec": dictionary, "b_dec": autoencoder.bias[...]}
  if autoencoder.solver is not None:
    solver = autoencoder.solver
    ours = getattr(solver, "func", None) is solvers.matching_pursuit
    if not (ours and solver.keywords.get("signed") and autoencoder.centers):
      raise ValueError(
        f"autoencoder has the solver {solver}, SAELens a matching_pursuit with "
        "signed=True, of centered inputs"
      )
    _check_unit("autoencoder", np.asarray(dictionary, np.float32))
    settings = {
      "max_iterations": solver.keywords["k"],
      "residual_threshold": 0.0,
      "stop_on_duplicate_support": False,
    }
    return "matching_pursuit", settings, tensors
  tensors["W_enc"] = autoencoder._kernel().T
  settings = {}
  if autoencoder.encoder_bias is not None:
    tensors["b_enc"] = autoencoder.encoder_bias[...]
  if isinstance(sparsifier, sparsifiers.JumpReLU):
    kind, tensors["threshold"] = "jumprelu", sparsifier.threshold
  elif isinstance(sparsifier, sparsifiers.BatchTopK):
    kind = "jumprelu"
    threshold = jnp.maximum(sparsifier.threshold[...], 0)
    tensors["threshold"] = jnp.full(autoencoder.latents, threshold)
  elif isinstance(sparsifier, sparsifiers.TopK):
    kind = "topk"
    aware = autoencoder.score is norm_aware
    if autoencoder.score is not None and not aware:
      raise ValueError(
        f"autoencoder has the score {autoencoder.score}, SAELens `norm_aware` "
        "or none"
      )
    settings = {"k": sparsifier.k, "rescale_acts_by_decoder_norm": aware}
  elif isinstance(sparsifier, sparsifiers.Gated):
    kind = "gated"
    for theirs, ours in _BIASES.items():
      if ours.startswith("sparsifier/"):
        tensors[theirs] = getattr(sparsifier, ours.split("/")[1])[...]
  elif isinstance(sparsifier, sparsifiers.ReLU):
    kind = "standard"
  else:
    raise ValueError(
      f"autoencoder has the sparsifier {type(sparsifier).__name__}, which "
      "SAELens has not"
    )
  return _transcoder(autoencoder, kind, settings, tensors)


def _transcoder(autoencoder, kind, settings, tensors):
  """The same as a transcoder's, where it is one."""
  skip = autoencoder.skip is not None
  if not skip and autoencoder.outputs == autoencoder.width:
    return kind, settings, tensors
  names = {"standard": "", "jumprelu": "jumprelu_"}
  if kind not in names:
    raise ValueError(f"autoencoder is a transcoder with {kind}: not in SAELens")
  if autoencoder.centers:
    # Theirs never subtract the bias: the encoder's then does.
    tensors["b_enc"] = tensors["b_enc"] - tensors["b_dec"] @ tensors["W_enc"]
  if skip:
    tensors["W_skip"] = autoencoder.skip[...].T
  settings |= {"d_out": autoencoder.outputs, "apply_b_dec_to_input": False}
  return (
    names[kind] + ("skip_" if skip else "") + "transcoder",
    settings,
    tensors,
  )
