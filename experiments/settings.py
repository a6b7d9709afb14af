"""Calls a function with the settings that a part of a config has."""

from collections.abc import Callable, Mapping
import inspect
from typing import Any


def _listed(names) -> str:
  return ", ".join(sorted(names)) or "none"


def check_fields(field: str, got, *, takes, required=()) -> None:
  """Raises ValueError for the first field that is unknown or missing."""
  for name in got:
    if name not in takes:
      raise ValueError(
        f"config.{field}{name} is not a setting here; it takes "
        f"{_listed(takes)}."
      )
  for name in required:
    if name not in got:
      raise ValueError(f"config.{field}{name} is missing; got {_listed(got)}.")


def call(
  field: str,
  settings: Mapping[str, Any],
  choices: Mapping[str, Callable],
  *arguments,
  **given,
) -> Any:
  """Returns `choices[settings["name"]]` called with the other settings.

  Args:
    field: where the settings stand in the config, for errors.
    settings: "name" and what the named function is called with.
    choices: the functions by name.
    *arguments: what each of them is called with besides,
    **given: which a config cannot set; settings are keywords as well.

  Raises:
    ValueError: an unknown name, or a setting that is unknown or missing.
  """
  settings = dict(settings)
  name = settings.pop("name", None)
  if name not in choices:
    raise ValueError(
      f"config.{field}.name is {name!r}; it takes one of {_listed(choices)}."
    )
  function = choices[name]
  # Calling an NNX module has a signature that says nothing.
  shown = function.__init__ if inspect.isclass(function) else function
  takes = {
    parameter.name: parameter
    for parameter in inspect.signature(shown).parameters.values()
    if parameter.kind is parameter.KEYWORD_ONLY
  }
  if unfit := set(given) - set(takes):
    raise ValueError(
      f"config.{field}.name is {name!r}, which does not fit the task: it has "
      f"no {_listed(unfit)}."
    )
  own = {n: p for n, p in takes.items() if n not in given}
  required = [n for n, p in own.items() if p.default is p.empty]
  check_fields(f"{field}.", settings, takes=own, required=required)
  return function(*arguments, **given, **settings)
