"""How dense each layer is to be: OWL."""

from collections.abc import Mapping

import jax

from sparsejax.select import budgets

Array = jax.Array


def owl(
  scores: Mapping[str, Array],
  density: float,
  *,
  spread: float = 0.08,
  outlier: float = 5.0,
) -> dict[str, float]:
  """Densities by layer: more where more scores are outliers.

  A layer's share of scores above `outlier` times their mean says where in
  [density - spread, density + spread] its density lies; then all are shifted,
  so that their mean, weighted by size, is the density.

  Args:
    scores: what `wanda_scores` gives, by layer; concrete.
    density: over all layers.
    spread: half of the interval.
    outlier: see above.

  Returns:
    Densities by layer.

  Raises:
    ValueError: a density would leave [0, 1].

  Example:
    >>> scores = {"a": jnp.array([1.0] * 15 + [9.0]), "b": jnp.ones(16)}
    >>> weights.owl(scores, 0.5, spread=0.25, outlier=4.0)
    {'a': 0.75, 'b': 0.25}

  Source: owl, Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce
  for Pruning LLMs to High Sparsity, section 3.
  """
  budgets.check_share("density", density)
  shares = {
    name: float((x > outlier * x.mean()).mean()) for name, x in scores.items()
  }
  least, most = min(shares.values()), max(shares.values())
  if least == most:
    return dict.fromkeys(scores, density)
  at = {n: spread * (2 * (x - least) / (most - least) - 1)
        for n, x in shares.items()}  # fmt: skip
  size = {name: x.size for name, x in scores.items()}
  mean = sum(size[n] * x for n, x in at.items()) / sum(size.values())
  found = {name: density + x - mean for name, x in at.items()}
  for name, x in found.items():
    if not 0 <= x <= 1:
      raise ValueError(
        f"spread must leave densities in [0, 1], got {spread} with density "
        f"{density}: {name} would have {x:.3f}"
      )
  return found
