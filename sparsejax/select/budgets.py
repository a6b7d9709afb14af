"""How one budget is divided among layers.

A budget is a function `(shapes, density) -> densities`: from the shapes of the
layers by name, `(*kernel, inputs, outputs)`, and the density wanted over all of
them, to a density in [0, 1] for each. Layers are in the order of the tree that
holds them. Dicts sort their keys: "first" and "last" are the model's own only
where its names sort so.
"""

from collections.abc import Callable, Mapping
import math
import numbers

Shapes = Mapping[str, tuple[int, ...]]
Budget = Callable[[Shapes, float], dict[str, float]]


def check_share(name: str, value: float) -> None:
  """Raises a ValueError where `value` is not one number in [0, 1]."""
  if not isinstance(value, numbers.Real):
    raise ValueError(f"{name} must be a Python number in [0, 1], got {value!r}")
  if not 0 <= value <= 1:
    raise ValueError(f"{name} must be in [0, 1], got {value}")


def _proportional(
  shapes: Shapes,
  density: float,
  share: Callable[[tuple[int, ...]], float],
  fixed: Mapping[str, float] | None = None,
) -> dict[str, float]:
  """Densities proportional to `share`, capped at 1, that meet the total."""
  check_share("density", density)
  size = {n: math.prod(s) for n, s in shapes.items()}
  out = dict(fixed or {})
  while True:
    free = [n for n in shapes if n not in out]
    left = density * sum(size.values())
    left -= sum(size[n] * d for n, d in out.items())
    if left < -1e-6 * sum(size.values()):
      raise ValueError(
        f"density is too low to keep {sorted(fixed or {})} as dense as the "
        f"distribution asks, got {density}"
      )
    weight = sum(size[n] * share(shapes[n]) for n in free)
    scale = max(left, 0.0) / weight if weight else 0.0
    over = [n for n in free if scale * share(shapes[n]) > 1]
    if not over:
      return {n: out.get(n, scale * share(shapes[n])) for n in shapes}
    out |= dict.fromkeys(over, 1.0)


def uniform(shapes: Shapes, density: float) -> dict[str, float]:
  """The same density everywhere.

  >>> uniform({"a": (2, 3), "b": (4, 4)}, 0.5)
  {'a': 0.5, 'b': 0.5}
  """
  check_share("density", density)
  return dict.fromkeys(shapes, density)


def uniform_plus(shapes: Shapes, density: float) -> dict[str, float]:
  """Uniform, but the first layer dense and the last at least 20% dense.

  Source: Gale et al., The State of Sparsity in Deep Neural Networks, sec. 5.
  """
  if not shapes:
    return {}
  first, *_ = shapes
  *_, last = shapes
  fixed = {first: 1.0}
  plain = _proportional(shapes, density, lambda s: 1.0, fixed)
  if plain[last] < 0.2:
    fixed[last] = 0.2
  return _proportional(shapes, density, lambda s: 1.0, fixed)


def er(shapes: Shapes, density: float) -> dict[str, float]:
  """Erdos-Renyi: density ~ (inputs + outputs) / (inputs * outputs).

  Source: [set] Mocanu et al., Scalable training of artificial neural networks
  with adaptive sparse connectivity, eq. (3).
  """
  return _proportional(
    shapes, density, lambda s: sum(s[-2:]) / (math.prod(s[-2:]) or 1)
  )


def erk(shapes: Shapes, density: float) -> dict[str, float]:
  """Erdos-Renyi-kernel: density ~ sum(shape) / prod(shape).

  Layers that would exceed 1 are dense, and the others are rescaled.

  Source: [rigl] Evci et al., Rigging the Lottery, sec. 3 (1).

  >>> {n: round(d, 3) for n, d in erk({"a": (2, 2), "b": (8, 8)}, 0.5).items()}
  {'a': 1.0, 'b': 0.469}
  """
  return _proportional(shapes, density, lambda s: sum(s) / (math.prod(s) or 1))


def erk_plus(shapes: Shapes, density: float) -> dict[str, float]:
  """Erdos-Renyi-kernel with the last layer dense.

  Source: [random-pruning] Liu et al., The Unreasonable Effectiveness of Random
  Pruning, sec. 3.
  """
  fixed = dict.fromkeys(list(shapes)[-1:], 1.0)
  return _proportional(
    shapes, density, lambda s: sum(s) / (math.prod(s) or 1), fixed
  )


def balanced(shapes: Shapes, density: float) -> dict[str, float]:
  """The same number of weights in every layer.

  Layers that have fewer are dense, and the others share what is left (the
  authors' code leaves it unused, and misses the density).

  Source: [random-pruning-er] Gadhikar et al., Why Random Pruning Is All We Need
  to Start Sparse; the definition is that of the authors' code.

  >>> balanced({"a": (2, 2), "b": (4, 4)}, 0.5)
  {'a': 1.0, 'b': 0.375}
  """
  return _proportional(shapes, density, lambda s: 1 / (math.prod(s) or 1))


def pyramidal(shapes: Shapes, density: float) -> dict[str, float]:
  """Densities q, q^2, q^3 and so on, from the first layer to the last.

  q, in [0, 1], is the one that meets the density.

  Source: [random-pruning-er] Gadhikar et al., Why Random Pruning Is All We Need
  to Start Sparse; the definition is that of the authors' code.

  >>> pyramidal({"a": (2, 2), "b": (4, 4)}, 0.3)
  {'a': 0.5, 'b': 0.25}
  """
  check_share("density", density)
  if density in (0, 1):
    return dict.fromkeys(shapes, float(density))
  sizes = [math.prod(s) for s in shapes.values()]
  low, high = 0.0, 1.0
  for _ in range(100):
    q = (low + high) / 2
    kept = math.fsum(size * q ** (i + 1) for i, size in enumerate(sizes))
    low, high = (q, high) if kept < density * sum(sizes) else (low, q)
  return {n: high ** (i + 1) for i, n in enumerate(shapes)}


BUDGETS: Mapping[str, Budget] = {
  "uniform": uniform,
  "uniform_plus": uniform_plus,
  "er": er,
  "erk": erk,
  "erk_plus": erk_plus,
  "balanced": balanced,
  "pyramidal": pyramidal,
}


def largest_remainder(quotas: Mapping[str, float]) -> dict[str, int]:
  """Integers nearest to `quotas` whose sum is their rounded sum.

  Ties go to the earlier name.

  >>> largest_remainder({"a": 1.5, "b": 2.5, "c": 1.0})
  {'a': 2, 'b': 2, 'c': 1}
  """
  # Rounding first removes float noise from exact quotas such as 0.1 * 30.
  exact = {n: round(q, 6) for n, q in quotas.items()}
  out = {n: math.floor(q) for n, q in exact.items()}
  missing = round(sum(exact.values())) - sum(out.values())
  order = sorted(out, key=lambda n: out[n] - exact[n])  # stable
  for n in order[:missing]:
    out[n] += 1
  return out
