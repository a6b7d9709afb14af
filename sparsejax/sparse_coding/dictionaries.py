"""The lengths of atoms: kept at one, or moved into the encoder."""

from flax import nnx
import jax
import jax.numpy as jnp
import optax

from sparsejax import masks
from sparsejax import paths
from sparsejax import select
from sparsejax.sparse_coding import autoencoders
from sparsejax.sparse_coding import codes
from sparsejax.sparse_coding import selection
from sparsejax.sparse_coding import sparsifiers

Array = jax.Array

# Each latent by itself.
FOLDING = (
  sparsifiers.ReLU,
  sparsifiers.JumpReLU,
  sparsifiers.Gated,
  sparsifiers.FeatureChoice,
)


def unit_norm(
  inner: optax.GradientTransformation, name: str = "dictionary"
) -> optax.GradientTransformationExtraArgs:
  """An optimizer after whose every step each atom has norm one.

  What of a gradient lies along its atom is taken out before `inner`, which
  would otherwise keep it in its moments, and the atom is scaled after it. It is
  to be the outermost: what changes updates later changes norms, too.

  Args:
    inner: of all parameters.
    name: of the parameters it is for, the last part of their paths. Atoms are
      rows, all sites of a crosscoder's together.

  Returns:
    A transformation; `update` needs the parameters. Those in bf16 have norm one
    as far as bf16 goes, and an atom of zeros stays.

  Raises:
    ValueError: from `init` where no parameter has that name.

  Example:
    >>> tx = unit_norm(optax.sgd(0.5))
    >>> params = {"dictionary": jnp.eye(2)}
    >>> grads = {"dictionary": jnp.array([[3.0, -2.0], [0.0, 1.0]])}
    >>> updates, _ = tx.update(grads, tx.init(params), params)
    >>> params = optax.apply_updates(params, updates)
    >>> jnp.linalg.norm(params["dictionary"], axis=1).round(6).tolist()
    [1.0, 1.0]

  Source: topk-sae, Scaling and evaluating sparse autoencoders, appendix A.1;
  l1-sae, Towards Monosemanticity: Decomposing Language Models With Dictionary
  Learning.
  """
  inner = optax.with_extra_args_support(inner)

  def at_atoms(function, first, *rest):
    """`function` of the leaves of that name; of others the first."""

    def one(path, x, *others):
      ours = paths.name_of(path).split("/")[-1] == name
      return function(x, *others) if ours else x

    return jax.tree_util.tree_map_with_path(one, first, *rest)

  def init(params):
    leaves, _ = paths.named(params)
    if not any(leaf.split("/")[-1] == name for leaf in leaves):
      raise ValueError(f"name must end a path of {list(leaves)}, got {name!r}")
    return inner.init(params)

  def update(grads, state, params=None, **extra):
    if params is None:
      raise ValueError(masks.NO_PARAMS)
    grads = at_atoms(_across, grads, params)
    updates, state = inner.update(grads, state, params, **extra)
    return at_atoms(_to_unit_norm, updates, params), state

  return optax.GradientTransformationExtraArgs(init, update)


def fold_norms(
  autoencoder: autoencoders.Autoencoder,
) -> autoencoders.Autoencoder:
  """The same function with atoms of norm one.

  Each atom is divided by its norm, and its row of the encoder, its biases and
  its threshold are multiplied by it: latents then say how much they add. That
  leaves the reconstruction as it is for ReLU, JumpReLU, Gated and
  FeatureChoice, and for TopK with `score=norm_aware`. Others compare the
  latents of a row with each other, and would choose differently.

  Args:
    autoencoder: with an encoder of its own, not tied.

  Returns:
    A new one.

  Raises:
    ValueError: for one whose reconstruction would change.

  Example:
    >>> from flax import nnx
    >>> from sparsejax import sparse_coding
    >>> sae = sparse_coding.Autoencoder(8, 32, rngs=nnx.Rngs(0))
    >>> sae.dictionary[...] *= 3
    >>> sparse_coding.fold_norms(sae).norms()[0].round(5).item()
    1.0

  Source: llama-scope, Llama Scope: Extracting Millions of Features from
  Llama-3.1-8B with Sparse Autoencoders, section 3.
  """
  kind = autoencoder.sparsifier
  if not isinstance(kind, FOLDING) and not _is_norm_aware(autoencoder):
    raise ValueError(
      "autoencoder must choose each latent by itself or by `norm_aware`, got "
      f"{type(kind).__name__}"
    )
  if autoencoder.kernel is None:
    raise ValueError("autoencoder must have a kernel, got a tied one")
  made = _copy(autoencoder)
  atoms = made.dictionary[...]
  norms = _lengths(atoms)
  made.dictionary[...] = (atoms / norms).astype(atoms.dtype)
  scale = lambda variable, by: variable.set_value(
    (variable[...] * by).astype(variable.dtype)
  )
  scale(made.kernel, norms)
  norms = norms[:, 0]
  if made.encoder_bias is not None:
    scale(made.encoder_bias, norms)
  if isinstance(kind, sparsifiers.JumpReLU):
    made.sparsifier.log_threshold[...] += jnp.log(norms)
  if isinstance(kind, sparsifiers.Gated):
    scale(made.sparsifier.gate_bias, norms)
    scale(made.sparsifier.magnitude_bias, norms)
  return made


def to_jump_relu(
  autoencoder: autoencoders.Autoencoder,
  x: Array | None = None,
  *,
  threshold: Array | float | None = None,
  bandwidth: float = 0.001,
) -> autoencoders.Autoencoder:
  """One whose latents are active above a threshold, whatever the others do.

  The threshold is one for all latents, or for what they add where the choice
  was `norm_aware` (then `fold_norms` makes it one for all). Found from inputs,
  it lets as many latents through as the choice did: the mean L0 is the same.

  Args:
    autoencoder: with a TopK or a BatchTopK.
    x: inputs [..., width], to find the threshold from.
    threshold: in their place, such as `autoencoder.sparsifier.threshold[...]`
      of a trained BatchTopK.
    bandwidth: as `JumpReLU` takes it.

  Returns:
    A new autoencoder with a JumpReLU.

  Raises:
    ValueError: for another sparsifier, for scores that look at a gradient, or
      for both or neither of inputs and threshold.

  Example:
    >>> from flax import nnx
    >>> from sparsejax import sparse_coding
    >>> sae = sparse_coding.Autoencoder(
    ...   8, 32, sparse_coding.TopK(4), rngs=nnx.Rngs(0)
    ... )
    >>> x = jax.random.normal(jax.random.key(0), (50, 8))
    >>> ((to_jump_relu(sae, x).encode(x) > 0).sum() / 50).item()
    4.0

  Source: llama-scope, Llama Scope: Extracting Millions of Features from
  Llama-3.1-8B with Sparse Autoencoders, section 3; batch-topk-sae, BatchTopK
  Sparse Autoencoders, section 3.
  """
  kind = autoencoder.sparsifier
  if not isinstance(kind, (sparsifiers.TopK, sparsifiers.BatchTopK)):
    raise ValueError(
      f"autoencoder must have a TopK or a BatchTopK, got {type(kind).__name__}"
    )
  norm_aware = _is_norm_aware(autoencoder)
  if autoencoder.score is not None and not norm_aware:
    raise ValueError(
      f"score must be norm_aware or None, got {autoencoder.score}"
    )
  if (x is None) == (threshold is None):
    raise ValueError("x or threshold must be given, and not both")
  norms = _lengths(autoencoder.dictionary[...])[:, 0]
  if x is not None:
    code = _copy(autoencoder).encode(x)  # which may count in a statistic
    z = code.values if isinstance(code, codes.Code) else code
    scores = jax.nn.relu(autoencoder.pre(x)).astype(jnp.float32)
    scores = scores * norms if norm_aware else scores
    threshold = _between(scores, (z != 0).sum())
  # Of a BatchTopK that no batch has set it is -1; what is negative never stays.
  threshold = jnp.maximum(jnp.asarray(threshold, jnp.float32), 0)
  threshold = jnp.broadcast_to(threshold, (autoencoder.latents,))
  made = _copy(autoencoder)
  made.score = None
  made.sparsifier = sparsifiers.JumpReLU(
    autoencoder.latents,
    threshold=threshold / norms if norm_aware else threshold,
    bandwidth=bandwidth,
  )
  return made


def _across(gradient, atoms):
  """A gradient without what lies along its atoms."""
  wide, unit = (x.astype(jnp.float32) for x in (gradient, atoms))
  unit = unit / _lengths(unit)
  along = (wide * unit).sum(-1, keepdims=True)
  return (wide - along * unit).astype(gradient.dtype)


def _to_unit_norm(updates, atoms):
  """Updates after which atoms have norm one."""
  wide = atoms.astype(jnp.float32)
  new = wide + updates.astype(jnp.float32)
  return (new / _lengths(new) - wide).astype(updates.dtype)


def _lengths(atoms):
  """f32 [..., 1], and 1 for an atom of zeros."""
  squares = (atoms.astype(jnp.float32) ** 2).sum(-1, keepdims=True)
  return jnp.sqrt(jnp.where(squares == 0, 1, squares))


def _is_norm_aware(autoencoder):
  return autoencoder.score is selection.norm_aware


def _between(scores, count):
  """What `count` of nonnegative scores are above: 0, or between two of them."""
  last = select.kth_largest(scores, count)  # infinite where count is 0
  following = select.kth_largest(scores, jnp.minimum(count + 1, scores.size))
  following = jnp.where(count < scores.size, following, 0)
  middle = (jnp.minimum(last, 2 * following) + following) / 2
  middle = jnp.where(middle < last, middle, following)
  return jnp.maximum(middle, jnp.finfo(jnp.float32).tiny)


def _copy(autoencoder):
  return nnx.merge(*nnx.split(autoencoder), copy=True)
