"""Reads the schedule that a TPU's compiler writes for a kernel.

A TPU core runs one bundle of instructions a cycle, except where it stalls. So
a kernel's bundles count its cycles without stalls, and the slots of the units
that are filled in them tell what binds it. Nothing here is a timing: waiting
for a copy, for HBM or for another core is in no schedule.

The compiler writes two files a kernel. `NAME-*-final_bundles.txt` has a line a
bundle: its address, a `>` for each loop around it, instructions such as the
branch `sbr.rel (%p) target = $region5`, and comments such as `Start region 5`.
`NAME-*-final_hlo-static-per-bundle-utilization.txt` has the units' capacities
and a row of filled slots a bundle, in the same order.
`pallas_kernels.aot.compile_for` has them written and read.
"""

from collections.abc import Collection, Iterator, Mapping
import dataclasses
import functools
import pathlib
import re

_BUNDLE = re.compile(r"^ *(?:0x[0-9a-f]+|0) +(?:[A-Z]{2}:)? *:? *((?:> ?)*)\{")
_START = re.compile(r"Start region (\d+)|Start/End empty region (\d+)")
_BRANCH = re.compile(r"sbr\.rel \([^)]*\) target = \$region(\d+)")
_COPY = re.compile(
  r"dma\.(?:hbm_to_vmem|vmem_to_hbm)\b.*?/\*size_in_granules=\*/(\w+|%\w+)"
)
_FILE = re.compile(r"(\d+-(.+))-\d+-final_bundles\.txt")
# A branch takes effect this many bundles later.
_DELAY_SLOTS = 4
# What a copy's size is counted in.
_GRANULE_BYTES = 32


@dataclasses.dataclass(frozen=True)
class Region:
  """A run of bundles: the program, a loop, or a body under a predicate.

  Attributes:
    begin: The position of its first bundle in the program.
    end: The position behind its last bundle.
    loop: Whether it is a loop.
    slots: Filled slots by unit ("MXU", "VALU", ...), the children's included.
    children: The regions nested in it, in order.
  """

  begin: int
  end: int
  loop: bool
  slots: Mapping[str, int]
  children: tuple["Region", ...] = ()

  @property
  def bundles(self) -> int:
    """How many bundles it has, the children's included."""
    return self.end - self.begin

  @property
  def always(self) -> int:
    """How many of its bundles run whenever it does."""
    return self.bundles - sum(child.bundles for child in self.children)

  def own(self, unit: str) -> int:
    """Slots of `unit` filled in the bundles that run whenever it does."""
    return self.slots[unit] - sum(c.slots[unit] for c in self.children)

  def walk(self) -> Iterator["Region"]:
    """This region and every one nested in it, outer ones first."""
    yield self
    for child in self.children:
      yield from child.walk()


@dataclasses.dataclass(frozen=True)
class Schedule:
  """The schedule of one TPU kernel: bundles and slots, not a timing.

  A kernel's **step** is its grid loop: the outermost loop around its hot body,
  or the whole program where there is none. Its **hot body** is the region
  whose own bundles fill the most slots of the MXU (of the VALU in a kernel
  without matrix products). Loops inside a step are counted as if they ran
  once: how often they run is not in the schedule.

  Attributes:
    name: The name of the HLO instruction.
    capacity: Slots in a bundle, by unit.
    root: The whole program.
    copies: For each copy between HBM and VMEM that the kernel issues, the
      position of its bundle and its bytes (None where they are dynamic).
  """

  name: str
  capacity: Mapping[str, int]
  root: Region
  copies: tuple[tuple[int, int | None], ...] = ()

  @functools.cached_property
  def bodies(self) -> tuple[Region, ...]:
    """The regions that do the kernel's kind of work, the hot body first."""
    unit = "MXU" if self.root.slots["MXU"] else "VALU"
    found = [region for region in self.root.walk() if region.own(unit)]
    found.sort(key=lambda region: -region.own(unit))
    return tuple(found) or (self.root,)

  @functools.cached_property
  def _path(self) -> tuple[Region, ...]:
    """The regions from the step to the hot body, both included."""
    hot = self.bodies[0]
    around = [
      region
      for region in self.root.walk()
      if region.begin <= hot.begin and hot.end <= region.end
    ]
    loops = [i for i, region in enumerate(around) if region.loop]
    return tuple(around[loops[0] if loops else 0 :])

  @property
  def step(self) -> Region:
    """The grid loop."""
    return self._path[0]

  @property
  def body(self) -> int:
    """Bundles of the hot body."""
    return self.bodies[0].always

  @property
  def whole_step(self) -> int:
    """Bundles of a step that runs the hot body and no other body.

    The hot body's, and those of the regions around it that run whenever they
    do; not those of bodies beside it, such as the first and the last step's.
    """
    return sum(region.always for region in self._path)

  @property
  def other_bodies(self) -> tuple[int, ...]:
    """Bundles of the other bodies in the step that do the same kind of work."""
    return tuple(
      region.always
      for region in self.bodies[1:]
      if self.step.begin <= region.begin
      and region.end <= self.step.end
      and region not in self._path
    )

  @property
  def mxu_slots(self) -> int:
    """Slots of the MXU that the hot body fills."""
    return self.bodies[0].own("MXU")

  @property
  def mxu_utilization(self) -> float:
    """Filled over all slots of the MXU in the hot body, from 0 to 1."""
    return self.mxu_slots / (self.capacity["MXU"] * max(self.body, 1))

  @property
  def spills(self) -> int:
    """Slots in the whole program that store or load spilled vectors."""
    return self.root.slots["VSTORE:SPILL"] + self.root.slots["VLOAD:FILL"]

  @property
  def copied_bytes(self) -> int | None:
    """Bytes a step copies between HBM and VMEM at the most.

    Every copy of the step is counted once, though a pipeline skips those whose
    block is the same as in the step before, and a loop may issue one again.
    None where a copy's size is known only at run time. An operand that the
    compiler keeps in VMEM is not copied.
    """
    sizes = [
      size
      for position, size in self.copies
      if self.step.begin <= position < self.step.end
    ]
    return None if None in sizes else sum(sizes)


def _slots(text: str, name: str) -> tuple[dict[str, int], list[list[int]]]:
  """The units' capacities, in order, and a row of filled slots a bundle."""
  lines = text.splitlines()
  at = next((i for i, s in enumerate(lines) if s.startswith("MXU")), None)
  if at is None:
    raise ValueError(f"utilization of {name} has no line that begins with MXU")
  units = [unit.strip() for unit in lines[at].split(",")]
  capacity = dict(zip(units, map(int, lines[at + 1].split())))
  rows = [
    [int(word) for word in line.split()]
    for line in lines[at + 2 :]
    if re.fullmatch(r"[\d ]*\d[\d ]*", line)
  ]
  return capacity, rows


def _bundles(text: str) -> list[tuple[int, str]]:
  """The loop depth and the text of each bundle, with its further lines."""
  found = []
  for line in text.splitlines():
    if match := _BUNDLE.match(line):
      found.append([match[1].count(">"), [line]])
    elif found:
      found[-1][1].append(line)
  return [(depth, " ".join(lines)) for depth, lines in found]


def _spans(bundles: list[tuple[int, str]]) -> dict[tuple[int, int], bool]:
  """Where loops and predicated bodies begin and end; whether it is a loop."""
  starts = {}
  for position, (_, text) in enumerate(bundles):
    for match in _START.finditer(text):
      starts.setdefault(match[1] or match[2], position)
  # A predicated body is what a forward branch jumps over: from behind its
  # delay slots to where the region begins that it jumps to.
  spans = {}
  for position, (_, text) in enumerate(bundles):
    if match := _BRANCH.search(text):
      begin, end = position + 1 + _DELAY_SLOTS, starts.get(match[1], -1)
      if begin < end:
        spans.setdefault((begin, end), False)
  deepest = max((depth for depth, _ in bundles), default=0)
  for least in range(1, deepest + 1):
    begin = None
    for position in range(len(bundles) + 1):
      inside = position < len(bundles) and (
        bundles[position][0] >= least
        # Empty bundles (a branch's delay slots) carry no marks.
        or (begin is not None and "{}" in bundles[position][1])
      )
      if inside and begin is None:
        begin = position
      elif not inside and begin is not None:
        spans[begin, position] = True
        begin = None
  return spans


def parse(bundles: str, utilization: str, name: str = "kernel") -> Schedule:
  """The schedule of one kernel.

  Args:
    bundles: The text of its `final_bundles` file.
    utilization: The text of its
      `final_hlo-static-per-bundle-utilization` file.
    name: What to call it.

  Raises:
    ValueError: If the two do not have equally many bundles, or none.
  """
  capacity, rows = _slots(utilization, name)
  found = _bundles(bundles)
  if not found or len(found) != len(rows):
    raise ValueError(
      f"bundles of {name}: got {len(found)}, and {len(rows)} rows of slots; "
      "takes equally many, and at least one"
    )

  # Spans nest. One that overlaps another (the compiler merged two regions) is
  # left to the region around them.
  size = len(found)
  tree = (0, size, False, [])
  stack = [tree]
  spans = {k: v for k, v in _spans(found).items() if k != (0, size)}
  for (begin, end), loop in sorted(
    spans.items(), key=lambda item: (item[0][0], -item[0][1])
  ):
    while stack[-1][1] <= begin:
      stack.pop()
    if end <= stack[-1][1]:
      node = (begin, end, loop, [])
      stack[-1][3].append(node)
      stack.append(node)

  def region(node) -> Region:
    begin, end, loop, children = node
    slots = [sum(column) for column in zip(*rows[begin:end])]
    return Region(
      begin, end, loop, dict(zip(capacity, slots)), tuple(map(region, children))
    )

  copies = tuple(
    (position, int(match[1]) * _GRANULE_BYTES if match[1].isdigit() else None)
    for position, (_, text) in enumerate(found)
    for match in _COPY.finditer(text)
  )
  return Schedule(name, capacity, region(tree), copies)


def read(
  folder: str | pathlib.Path, names: Collection[str] | None = None
) -> dict[str, Schedule]:
  """The schedules in a folder that a compiler wrote to, by HLO name.

  Of several with one name the newest.

  Args:
    folder: Where the compiler wrote.
    names: Which HLO instructions to read; by default all that were compiled,
      which are not Pallas kernels only.

  Raises:
    ValueError: If a file cannot be read as a schedule.
  """
  found = {}
  for path in sorted(pathlib.Path(folder).iterdir()):
    match = _FILE.fullmatch(path.name)
    if not match or "schedule-analysis" in path.name:
      continue
    if names is not None and match[2] not in names:
      continue
    beside = f"{match[1]}-*-final_hlo-static-per-bundle-utilization.txt"
    slots = sorted(path.parent.glob(beside))
    if slots:
      found[match[2]] = (path, slots[-1])
  return {
    name: parse(path.read_text(), slots.read_text(), name)
    for name, (path, slots) in found.items()
  }
