"""How many units each layer keeps at each mask update: tables of integers.

Computed in Python while tracing, in double precision, so counts are exact and
the compiled program only looks them up.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import math
import re
from typing import Any

import jax
import numpy as np

from sparsejax import paths
from sparsejax import sharding
from sparsejax.select import budgets
from sparsejax.select import structures
from sparsejax.weights import rules

# A pattern, a function, a tree of masks (`source_network`), or None.
Where = str | Callable[[str, Any], bool] | Any | None
AxesByPath = structures.Axes | Mapping[str, structures.Axes]

_LEFT_DENSE = re.compile("embed|norm", re.IGNORECASE)


def default_where(path: str, leaf: Any) -> bool:
  """Floating arrays of two or more axes, but embeddings and norms."""
  floating = jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating)
  return floating and leaf.ndim >= 2 and not _LEFT_DENSE.search(path)


def sparse_names(params: Mapping[str, Any], where: Where) -> list[str]:
  """The parameters that `where` (a pattern or a function) selects."""
  if where is not None and not isinstance(where, str) and not callable(where):
    raise ValueError(f"where must be a pattern or a function, got {where!r}")
  if isinstance(where, str):
    chosen = paths.matching("where", {where: True}, params) if params else {}
    names = [n for n in params if n in chosen]
  else:
    names = [n for n, p in params.items() if (where or default_where)(n, p)]
  if params and not names:
    raise ValueError(
      "where must select at least one weight, got none of "
      f"{[(n, tuple(p.shape)) for n, p in params.items()]}"
    )
  for n in names:
    if not jax.numpy.issubdtype(params[n].dtype, jax.numpy.floating):
      raise ValueError(
        f"where must select floating arrays, got {n!r} of {params[n].dtype}"
      )
  return names


def source_network(where: Where) -> tuple[Where, dict[str, Any] | None]:
  """`where` without masks, and the masks by name where it is a tree of them.

  A mask of ones restricts nothing: it names a parameter only where that is
  sparse by default, so that the masks of a whole model leave biases dense.
  """
  if where is None or isinstance(where, str) or callable(where):
    return where, None
  network = paths.named(where)[0]
  for n, m in network.items():
    if not hasattr(m, "dtype") or m.dtype != bool:
      raise ValueError(
        "where must be a pattern, a function, or a tree of boolean masks, got "
        f"{getattr(m, 'dtype', repr(m))} for {n!r}"
      )
    if isinstance(m, (jax.core.Tracer, jax.ShapeDtypeStruct)):
      raise ValueError(
        f"where must be concrete masks, made outside of jit, got {m} for {n!r}"
      )
  if not network:
    raise ValueError(f"where must have masks, got {where!r}")
  with jax.ensure_compile_time_eval():  # also where a method is made in jit
    restricting = {n for n, m in network.items() if not bool(m.all())}

  def named(path, leaf):
    return path in network and (
      path in restricting or default_where(path, leaf)
    )

  return named, network


def source_of(
  network: Mapping[str, Any] | None, params: Mapping[str, Any]
) -> dict[str, Any]:
  """The masks of a source network, sharded as these parameters are."""
  out = {}
  for n, m in (network or {}).items() if params else ():
    shape = tuple(params[n].shape) if n in params else None
    if shape != m.shape:
      raise ValueError(
        f"where[{n!r}] must be the mask of a parameter, got shape {m.shape} "
        f"for a parameter of shape {shape}"
      )
    m = sharding.like(jax.numpy.asarray(m), params[n])
    out[n] = jax.numpy.ones_like(params[n], bool) & m
  return out


@dataclasses.dataclass(frozen=True)
class Leaf:
  """One sparse parameter.

  Attributes:
    axes: its dimension numbers.
    structures: its structure in each stage; most have one.
    keep: units each group keeps, int32 `[ticks | 1, ...]`; the rest broadcasts
      against its groups.
    drops: units of a layer that an update exchanges, likewise, or None.
    backward: units each group keeps in the backward mask, likewise, or None.
  """

  axes: structures.Axes
  structures: tuple[structures.Structure, ...]
  keep: np.ndarray
  drops: np.ndarray | None
  backward: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Plan:
  """The sparse parameters by name, when masks change, and the shared budget.

  Attributes:
    leaves: by name.
    steps: step of each mask update that is tabled; the last one's row serves
      those after it.
    stages: step at which each stage of structures begins.
    together: whether all leaves are one group ("global"); `keep` and `drops` of
      the first leaf are then of all.
  """

  leaves: dict[str, Leaf]
  steps: tuple[int, ...]
  stages: tuple[int, ...]
  together: bool


def _value(setting: Any, step: int) -> Any:
  """A schedule's value as a Python number, also inside a trace."""
  if not callable(setting):
    return setting
  with jax.ensure_compile_time_eval():
    return float(setting(step))


def _by_name(name: str, setting: Any, names: list[str]) -> dict[str, Any]:
  if isinstance(setting, Mapping):
    return paths.matching(name, setting, names)
  return dict.fromkeys(names, setting)


def axes_by_name(
  axes: AxesByPath, names: list[str]
) -> dict[str, structures.Axes]:
  """The dimension numbers of each parameter, by pattern or for all."""
  for one in axes.values() if isinstance(axes, Mapping) else [axes]:
    if not isinstance(one, structures.Axes):
      raise ValueError(
        "axes must be select.Axes(...), or a mapping from path patterns to "
        f"them, got {axes!r}"
      )
  given = _by_name("axes", axes, names)
  return {n: given.get(n, structures.Axes()) for n in names}


def _rows(table: list[Any]) -> np.ndarray:
  """Rows of integers, one where all are equal."""
  rows = np.asarray(table, np.int32)
  return rows[:1] if (rows == rows[:1]).all() else rows


def _steps(rule: rules.Rule) -> tuple[int, ...]:
  given = rule.sparsity
  sparsities = given.values() if isinstance(given, Mapping) else [given]
  if not any(callable(s) for s in (*sparsities, rule.drop_fraction)):
    return (rule.begin,)
  if rule.until is None:
    raise ValueError("until must be given with a schedule, got None")
  last = max(rule.until, rule.begin)
  return tuple(range(rule.begin, last + 1, rule.every))


def make_plan(
  rule: rules.Rule,
  params: Mapping[str, Any],
  where: Where,
  axes: AxesByPath,
) -> Plan:
  """Tables the counts of `rule` for parameters of these shapes."""
  names = sparse_names(params, where)
  stages = (0,)
  if rule.staged:
    stages = tuple(step for step, _ in rule.structure)
    found = {n: tuple(s for _, s in rule.structure) for n in names}
  else:
    found = _by_name("structure", rule.structure, names)
    missing = structures.Unstructured()
    found = {n: (found.get(n, missing),) for n in names}
  at = axes_by_name(axes, names)
  shape = {n: tuple(params[n].shape) for n in names}
  for n in names:
    if math.prod(shape[n]) >= 2**31:
      raise ValueError(
        f"{n} must have fewer than 2**31 weights, got shape {shape[n]}"
      )
    for s in found[n]:
      try:
        at[n].of(len(shape[n]))
        s.check(shape[n], at[n])
      except ValueError as error:
        raise ValueError(f"structure of {n}: {error}") from error

  together = rule.distribution == "global" and bool(names)
  given = _by_name("sparsity", rule.sparsity, names)
  free = [n for n in names if not isinstance(found[n][0], structures.NM)]
  _check_sparsity(rule, free, names, found, together)
  budget = functools.lru_cache(maxsize=None)(
    lambda sparsities: _counts(
      rule,
      dict(zip(free, sparsities, strict=True)),
      {n: found[n][0] for n in free},
      at,
      shape,
    )
  )

  steps = _steps(rule)
  keep: dict[str, list[Any]] = {n: [] for n in names}
  drops: dict[str, list[Any]] = {n: [] for n in names}
  for step in steps:
    sparsities = tuple(_value(given.get(n, 0.0), step) for n in free)
    for n, s in zip(free, sparsities, strict=True):
      if not 0 <= s <= 1:
        raise ValueError(
          f"sparsity of {n} at step {step} must be in [0, 1], got {s}"
        )
    counts = budget(sparsities)
    if rule.grow is not None:
      fraction = _value(rule.drop_fraction, step)
      if not 0 <= fraction <= 1:
        raise ValueError(
          f"drop_fraction at step {step} must be in [0, 1], got {fraction}"
        )
    for n in names:
      s = found[n][0]
      count = counts.get(n)
      if count is None:
        count = np.int32(s.n)  # n:m, which no budget changes
      keep[n].append(count)
      if rule.grow is not None:
        units = count * _groups(s, shape[n], at[n], together)
        drops[n].append(np.floor(units * fraction).astype(np.int32))
  backward = {n: None for n in names}
  if rule.backward_sparsity is not None:
    back = budget(tuple(rule.backward_sparsity for _ in free))
    backward = {n: _rows([back.get(n, keep[n][0])]) for n in names}
  leaves = {
    n: Leaf(
      at[n],
      found[n],
      _rows(keep[n]),
      _rows(drops[n]) if rule.grow is not None else None,
      backward[n],
    )
    for n in names
  }
  return Plan(leaves, steps, stages, together)


def _check_sparsity(rule, free, names, found, together):
  if free and rule.sparsity is None:
    raise ValueError(
      f"sparsity must be given for {free}: their structure leaves it open"
    )
  if names and not free and rule.sparsity is not None:
    raise ValueError(
      "sparsity must be None where every structure is n:m, which fixes it, "
      f"got {rule.sparsity}"
    )
  if not free and rule.distribution is not None and names:
    raise ValueError(
      "distribution must be None where every structure is n:m, got "
      f"{rule.distribution!r}"
    )
  kinds = {found[n][0] for n in names}
  if together and (len(kinds) > 1 or any(k.rigid for k in kinds)):
    raise ValueError(
      'distribution="global" must have one structure without fixed groups '
      f"for all weights, got {sorted(map(repr, kinds))}"
    )


def _groups(structure, shape, axes, together):
  """Groups in a layer: what a layer keeps is this many times what each does."""
  if together or not structure.rigid:
    return 1
  layer = math.prod(axes.layer_shape(shape))
  return layer // (structure.group_size(shape, axes) or 1)


def _densities(rule, sparsity, axes, shape):
  """The slots of each leaf, and the density of each slot, at one moment."""
  # A stack's layers enter the budget one by one, under names of their own.
  layers = {n: math.prod(axes[n].stack_shape(shape[n])) for n in sparsity}
  slots = {
    n: [f"{n}[{i}]" for i in range(layers[n])] if layers[n] > 1 else [n]
    for n in sparsity
  }
  if isinstance(rule.sparsity, Mapping):
    return slots, {slot: 1 - sparsity[n] for n in slots for slot in slots[n]}
  divide = rule.distribution or "erk"
  divide = budgets.BUDGETS[divide] if isinstance(divide, str) else divide
  shapes = {
    slot: axes[n].layer_shape(shape[n]) for n in slots for slot in slots[n]
  }
  try:
    density = divide(shapes, 1 - next(iter(sparsity.values()), 0))
  except ValueError as error:
    raise ValueError(f"distribution={rule.distribution!r}: {error}") from error
  for slot in shapes:
    if not 0 <= density.get(slot, -1) <= 1:
      raise ValueError(
        f"distribution must give {slot!r} a density in [0, 1], got "
        f"{density.get(slot)}"
      )
  return slots, density


def densities(
  rule: rules.Rule,
  params: Mapping[str, Any],
  names: list[str],
  axes: AxesByPath,
) -> dict[str, np.ndarray]:
  """The exact density of each layer, in an array that broadcasts to it.

  For rules of one sparsity that is no schedule, or of one by path.
  """
  shape = {n: tuple(params[n].shape) for n in names}
  at = axes_by_name(axes, names)
  sparsity = _by_name("sparsity", rule.sparsity, names)
  sparsity = {n: sparsity.get(n, 0.0) for n in names}
  slots, density = _densities(rule, sparsity, at, shape)
  return {
    n: _by_layer([density[s] for s in slots[n]], shape[n], at[n]) for n in names
  }


def _by_layer(values, shape, axes):
  """One value a layer of a stack, shaped to broadcast against the weights."""
  stack = axes.of(len(shape)).stack
  return np.asarray(values).reshape(
    [d if a in stack else 1 for a, d in enumerate(shape)]
  )


def _counts(rule, sparsity, structure, axes, shape):
  """Units per group of each leaf, at one moment."""
  unit = {n: s.unit_size(shape[n], axes[n]) or 1 for n, s in structure.items()}
  size = {
    n: math.prod(axes[n].layer_shape(shape[n])) // unit[n] for n in sparsity
  }
  layers = {n: math.prod(axes[n].stack_shape(shape[n])) for n in sparsity}
  if rule.distribution == "global":
    total = {n: size[n] * layers[n] for n in sparsity}
    if sum(total.values()) >= 2**31:
      raise ValueError(
        'distribution="global" must rank fewer than 2**31 units, got '
        f"{sum(total.values())}"
      )
    kept = round((1 - next(iter(sparsity.values()), 0)) * sum(total.values()))
    return dict.fromkeys(sparsity, np.int32(kept))

  slots, density = _densities(rule, sparsity, axes, shape)
  out, quotas = {}, {one: {} for one in sorted(set(unit.values()))}
  for n, s in structure.items():
    if s.rigid:
      counts = {s.group_count(shape[n], axes[n], density[i]) for i in slots[n]}
      if len(counts) > 1:
        raise ValueError(
          f"distribution must give all layers of the stack {n!r} one density "
          f"under {s}, got group sizes {sorted(counts)}"
        )
      out[n] = np.int32(counts.pop())
    else:
      quotas[unit[n]] |= {slot: density[slot] * size[n] for slot in slots[n]}
  # Units of one size are rounded together, so that their sum is met.
  whole = {}
  for same in quotas.values():
    whole |= budgets.largest_remainder(same)
  for n in structure.keys() - out.keys():
    count = np.asarray([whole[slot] for slot in slots[n]], np.int32)
    out[n] = _by_layer(count, shape[n], axes[n])
  return out
