"""What Hugging Face's configs and checkpoints call a model's parts."""

from collections.abc import Collection, Iterable, Mapping
import dataclasses
import re
from typing import Any

# What torch calls the parameters of a module.
_LEAVES = {
  "bias": "bias",
  "embedding": "weight",
  "kernel": "weight",
  "scale": "weight",
}


@dataclasses.dataclass(frozen=True)
class Names:
  """The tensors of a checkpoint, by a module's parameters.

  Attributes:
    modules: theirs by ours, a star for the number of a layer.
    unused: a pattern of the tensors that a checkpoint may hold besides.
    prefix: what a checkpoint with a head puts before the names.
    older: endings of names, and what they are called now.
    tied: names under which a checkpoint may repeat another tensor.
  """

  modules: Mapping[str, str]
  unused: str
  prefix: str = ""
  older: Mapping[str, str] = dataclasses.field(default_factory=dict)
  tied: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def tensor(self, path: str) -> str:
    """The tensor of the parameter at a path of sparsejax.paths.

    A "kernel" [in, out] is stored as its transpose.

    >>> Names({"blocks/*/up": "layer.*.dense"}, "").tensor("blocks/3/up/kernel")
    'layer.3.dense.weight'
    """
    module, leaf = path.rsplit("/", 1)
    name = self.modules[re.sub(r"\d+", "*", module)]
    for number in re.findall(r"\d+", module):
      name = name.replace("*", number, 1)
    return f"{name}.{_LEAVES[leaf]}"

  def current(self, stored: str) -> str:
    """What a tensor that a file calls `stored` is called here."""
    name = stored.removeprefix(self.prefix)
    for old, new in self.older.items():
      if name.endswith(old):
        name = name.removesuffix(old) + new
    return name

  def is_unused(self, name: str) -> bool:
    return re.fullmatch(self.unused, name) is not None


def is_transposed(path: str) -> bool:
  """Whether the tensor of the parameter at a path is its transpose."""
  return path.endswith("/kernel")


def listed(names: Iterable[str], most: int = 5) -> str:
  """The names in order, and how many more there are than `most`.

  >>> listed("edcba", most=2)
  'a, b and 3 more'
  """
  names = sorted(names)
  more = f" and {len(names) - most} more" if len(names) > most else ""
  return ", ".join(names[:most]) + more


def refuse(settings: Mapping[str, Any], **takes: Collection[Any]) -> None:
  """Raises ValueError where a setting is there and none of what is taken."""
  for name, values in takes.items():
    if name in settings and settings[name] not in list(values):
      known = " or ".join(repr(value) for value in values)
      raise ValueError(
        f"{name}={settings[name]!r} is not supported; it takes {known}"
      )


def fields[T](cls: type[T], settings: Mapping[str, Any]) -> T:
  """The dataclass with what the settings have of its fields.

  Raises:
    ValueError: a field that has no default is missing, or one is not of its
      type; integers are 1 or more.
  """
  found = {}
  for field in dataclasses.fields(cls):
    name, kind = field.name, field.type
    if name not in settings:
      if field.default is dataclasses.MISSING:
        raise ValueError(f"{name} is missing")
      continue
    value = found[name] = settings[name]
    if kind is int:
      good, words = type(value) is int and value > 0, "an integer above 0"
    elif kind is float:
      good = type(value) in (int, float) and value > 0
      words = "a number above 0"
    else:
      good, words = isinstance(value, kind), f"a {kind.__name__}"
    if not good:
      raise ValueError(f"{name} must be {words}; got {value!r}")
  return cls(**found)


def check_multiple(**sizes: int) -> None:
  """Raises ValueError where the first is no multiple of the second.

  Args:
    **sizes: two, under the names that a config has for them.
  """
  (whole, a), (part, b) = sizes.items()
  if a % b:
    raise ValueError(f"{whole} must be a multiple of {part}; got {a} and {b}")
