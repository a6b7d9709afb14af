"""Compiles any function for TPUs and H100s that are not there.

The real compilers run, on a machine that has only a CPU, and say whether they
take a program, what memory it needs, what its collectives are, and how its
Pallas kernels were scheduled. Nothing runs, and nothing here is a timing::

  from pallas_kernels import aot

  x = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)
  print(aot.compile_for(lambda x: x @ x, x, target="v6e:2x2"))

A program over many chips says where its arrays lie, on a mesh of the target::

  mesh = aot.make_mesh((16, 16), ("data", "model"), target="v6e:16x16")
  rows = jax.NamedSharding(mesh, jax.P("data"))
  x = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16, sharding=rows)
  aot.compile_for(step, x, target="v6e:16x16")

The compilers come with `pip install 'sparsejax[aot]'`. They read their flags
once, from the environment, when they are loaded; so each call compiles in a
process of its own, which takes about two seconds to start. The function is
traced and lowered here, in whatever environment this process has.

On a machine without accelerators jax tries those compilers' devices first and
complains that there are none; JAX_PLATFORMS=cpu keeps it from trying.
"""

from collections.abc import Callable, Iterable, Mapping
import dataclasses
import importlib.util
import math
import os
import pathlib
import pickle
import re
import subprocess
import sys
import tempfile
from typing import Any

import jax
from jax import export
from jax.experimental import topologies
from jax.sharding import AbstractDevice
from jax.sharding import AbstractMesh
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from pallas_kernels import schedules

# What each name is called in jax, the cores a device has, and the axes of a
# slice.
_TPUS = {
  "v5e": ("TPU v5 lite", 1, 2),
  "v5p": ("TPU v5", 2, 3),
  "v6e": ("TPU v6 lite", 1, 2),
}
_H100 = pathlib.Path(__file__).parent / "targets" / "h100.txtpb"
_TAKES = '"v5e:2x2", "v5p:2x2x1", "v6e:16x16" and the like, "h100" or "h100:8"'
# What compiling needs, and the modules of which one has to be there.
_PACKAGES = {
  "tpu": ("libtpu", ("libtpu",)),
  "cuda": (
    "jax-cuda12-plugin",
    ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13"),
  ),
  "either": ("flatbuffers", ("flatbuffers",)),
}
# What Pallas kernels are called in a program.
_KERNELS = (b"tpu_custom_call", b"mosaic_gpu_v2")
# The result and the name of a collective. What runs asynchronously is one
# where it ends: where it begins, results hold the operands as well.
_COLLECTIVE = re.compile(
  r" = (.*?) ((?:ragged-)?all-to-all|all-gather|all-reduce|reduce-scatter|"
  r"collective-permute|collective-broadcast)(?:-done)?\("
)


@dataclasses.dataclass(frozen=True)
class GPUKernel:
  """What ptxas reports of one Mosaic GPU kernel.

  Attributes:
    name: The kernel's name.
    spill_stores: Bytes of registers that a thread spills.
    spill_loads: Bytes that it loads back.
    shared_memory: Bytes of shared memory of a block.
    registers: Registers of a thread. Where a kernel moves registers between
      its warpgroups this is only what it starts with.
  """

  name: str
  spill_stores: int
  spill_loads: int
  shared_memory: int
  registers: int


@dataclasses.dataclass(frozen=True)
class Collective:
  """What a program sends between chips in one way, such as "all-gather".

  Attributes:
    count: How many instructions there are.
    bytes: Of their results on a chip. Of a "ragged-all-to-all" that is the room
      for what comes, however much comes.
  """

  count: int
  bytes: int


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What the compiler made of a program; `print` shows it as a table.

  Attributes:
    target: What it was compiled for.
    chips: Over how many chips the program runs.
    memory: Bytes on each chip, by "argument", "output", "alias" (of donated
      arguments, which are also outputs), "temp" and "generated_code".
    cost: What XLA counts a chip to do, such as "flops" and "bytes accessed".
      Of a Pallas kernel it takes the kernel's own estimate (those here are of
      full lists and groups) or counts nothing, and of a loop it counts the body
      as if it ran once. None on GPUs.
    kernels: The Pallas kernels by name, each kernel once however often it is
      called: `schedules.Schedule` on TPUs, `GPUKernel` on GPUs. Where several
      have one name, a number is left behind it.
    text: The compiled program as HLO text.
    collectives: What chips send each other, by name. What is in a loop counts
      as if it ran once.
  """

  target: str
  chips: int
  memory: Mapping[str, int]
  cost: Mapping[str, float] | None
  kernels: Mapping[str, schedules.Schedule | GPUKernel]
  text: str = dataclasses.field(repr=False)

  @property
  def collectives(self) -> dict[str, Collective]:
    found = {}
    for result, name in _COLLECTIVE.findall(self.text):
      before = found.get(name, Collective(0, 0))
      found[name] = Collective(
        before.count + 1, before.bytes + _bytes_of(result)
      )
    return dict(sorted(found.items()))

  def __str__(self) -> str:
    lines = [f"{self.target}, a program over {_count(self.chips, 'chip')}"]
    sizes = ", ".join(f"{k} {_bytes(v)}" for k, v in self.memory.items())
    lines.append(f"memory a chip: {sizes}")
    if self.cost:
      flops = self.cost.get("flops", 0)
      moved = _bytes(self.cost.get("bytes accessed", 0))
      lines.append(f"cost a chip: {flops:.3g} flops, {moved} accessed")
      lines.append("(of kernels their own estimate; of loops one turn)")
    if self.collectives:
      rows = [
        (name, str(c.count), _bytes(c.bytes))
        for name, c in self.collectives.items()
      ]
      lines += ["", *_table([("collective", "count", "results"), *rows])]
    on_tpu = [k for k in self.kernels.values() if not isinstance(k, GPUKernel)]
    if on_tpu:
      head = "kernel,body,step,other bodies,MXU slots,MXU,spills,copied a step"
      rows = [
        (
          name,
          str(k.body),
          str(k.whole_step),
          " ".join(map(str, k.other_bodies)) or "-",
          str(k.mxu_slots),
          f"{k.mxu_utilization:.0%}",
          str(k.spills),
          "dynamic" if k.copied_bytes is None else _bytes(k.copied_bytes),
        )
        for name, k in self.kernels.items()
      ]
      lines += ["", *_table([tuple(head.split(",")), *rows])]
      lines.append("bundles (cycles without stalls): a schedule, not a timing")
    elif self.kernels:
      head = "kernel,spill stores,spill loads,shared memory,registers"
      rows = [
        (
          name,
          _bytes(k.spill_stores),
          _bytes(k.spill_loads),
          _bytes(k.shared_memory),
          str(k.registers),
        )
        for name, k in self.kernels.items()
      ]
      lines += ["", *_table([tuple(head.split(",")), *rows])]
    return "\n".join(lines)


def _count(number: int, noun: str) -> str:
  return f"{number} {noun}{'' if number == 1 else 's'}"


def _bytes(number: float) -> str:
  for unit in "B", "KiB", "MiB", "GiB":
    if number < 1024 or unit == "GiB":
      break
    number /= 1024
  return f"{number:.3g} {unit}" if number < 1000 else f"{number:.0f} {unit}"


def _bytes_of(shape: str) -> int:
  """Of what a program says of a result, such as "(f32[8,2], pred[4])"."""
  total = 0
  for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", shape):
    bits = re.search(r"\d+", dtype)
    number = math.prod(int(size) for size in sizes.split(",") if size)
    total += -(-number * (int(bits[0]) if bits else 8) // 8)
  return total


def _table(rows: list[tuple[str, ...]]) -> list[str]:
  """Lines of columns: the first one flush left, the others flush right."""
  widths = [max(map(len, column)) for column in zip(*rows)]
  return [
    "  ".join(
      cell.rjust(width) if i else cell.ljust(width)
      for i, (cell, width) in enumerate(zip(row, widths))
    )
    for row in rows
  ]


@dataclasses.dataclass(frozen=True)
class _Target:
  """A parsed target name; `topology` are get_topology_desc's arguments."""

  name: str
  platform: str
  device: AbstractDevice
  chips: int
  topology: Mapping[str, str]


def _parse(target: str) -> _Target:
  bad = ValueError(f"target: got {target!r}; takes {_TAKES}")
  if not isinstance(target, str):
    raise bad
  name, colon, size = target.partition(":")
  if name == "h100" and re.fullmatch(r"[1-9]\d*", size if colon else "1"):
    chips = int(size or 1)
    text = _H100.read_text()
    described = re.search(r'device_description_str: "(.*)"', text)
    cores = re.search(r"core_count: (\d+)", text)
    device = AbstractDevice(
      device_kind=described[1], num_cores=int(cores[1]), platform="gpu"
    )
    topology = {
      "platform": "cuda",
      "topology_name": "h100",
      "topology": f"1x1x{chips}",
      "target_config": text,
    }
    return _Target(target, "cuda", device, chips, topology)
  if name not in _TPUS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", size):
    raise bad
  kind, cores, axes = _TPUS[name]
  sizes = [int(word) for word in size.split("x")]
  if len(sizes) != axes:
    raise ValueError(
      f"target: got {target!r}; takes {axes} sizes for a {name}, such as "
      f"{name}:{'x'.join('221'[:axes])}"
    )
  device = AbstractDevice(device_kind=kind, num_cores=cores, platform="tpu")
  topology = {"platform": "tpu", "topology_name": target}
  return _Target(target, "tpu", device, math.prod(sizes), topology)


def _require_compiler(platform: str) -> None:
  def there(module):
    try:
      return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package around it
      return False

  missing = [
    package
    for package, modules in (_PACKAGES[platform], _PACKAGES["either"])
    if not any(map(there, modules))
  ]
  if missing:
    raise ImportError(
      f"compiling for this target needs {' and '.join(missing)}: "
      "pip install 'sparsejax[aot]'"
    )


def make_mesh(
  axis_shapes: Iterable[int],
  axis_names: Iterable[str],
  axis_types: Iterable[AxisType] | None = None,
  *,
  target: str,
) -> AbstractMesh:
  """A mesh of the target's chips, to write shardings on.

  Args:
    axis_shapes: The sizes of its axes; their product is the target's chips.
    axis_names: Their names.
    axis_types: Their types; all Explicit by default, as in `jax.make_mesh`.
    target: Such as "v6e:16x16", as in `compile_for`.

  Raises:
    ValueError: If the target is none, or has another number of chips.
  """
  described = _parse(target)
  sizes = tuple(axis_shapes)
  _check_size(sizes, described, "axis_shapes")
  names = tuple(axis_names)
  types = (
    (AxisType.Explicit,) * len(names)
    if axis_types is None
    else tuple(axis_types)
  )
  return AbstractMesh(sizes, names, types, abstract_device=described.device)


def _check_size(sizes: tuple[int, ...], target: _Target, name: str) -> None:
  if math.prod(sizes) not in (1, target.chips):
    raise ValueError(
      f"{name}: got {sizes}, {_count(math.prod(sizes), 'chip')} in all; takes "
      f"1 or the {target.chips} of {target.name}"
    )


def _is_array(leaf: Any) -> bool:
  return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _is_sharding(leaf: Any) -> bool:
  return leaf is None or isinstance(leaf, jax.sharding.Sharding | PartitionSpec)


def _find_mesh(
  mesh: Mesh | AbstractMesh | None, shardings: list[Any], target: _Target
) -> AbstractMesh:
  """The one mesh that is meant, of the target's devices."""
  found = {
    (m.axis_sizes, m.axis_names, m.axis_types)
    for m in [mesh, *(getattr(s, "mesh", None) for s in shardings)]
    if m is not None and not m.empty
  }
  if len(found) > 1:
    meshes = " and ".join(
      ", ".join(f"{n}: {s}" for n, s in zip(names, sizes))
      for sizes, names, _ in sorted(found, key=str)
    )
    raise ValueError(
      f"mesh: got several, in it or in the shardings ({meshes}); takes one, "
      "with the same axes and axis types everywhere"
    )
  sizes, names, types = (
    found.pop() if found else ((1,), ("chip",), (AxisType.Auto,))
  )
  _check_size(sizes, target, "mesh")
  return AbstractMesh(sizes, names, types, abstract_device=target.device)


def _place(sharding: Any, mesh: AbstractMesh) -> NamedSharding | None:
  """The same sharding on the target's mesh."""
  if isinstance(sharding, PartitionSpec):
    return NamedSharding(mesh, sharding)
  if not isinstance(sharding, NamedSharding) or sharding.mesh.empty:
    # One device of this process, or nothing said.
    return None
  # The host's memory of a target is only what is called so: on a CPU every
  # array's memory is some host's.
  kind = sharding.memory_kind
  return NamedSharding(
    mesh,
    sharding.spec,
    memory_kind=kind if kind == "pinned_host" else None,
  )


def _broadcast(name: str, prefix: Any, tree: Any) -> list[Any]:
  """A leaf of `prefix` for every leaf of `tree`."""
  try:
    return jax.tree.leaves(
      jax.tree.map(
        lambda leaf, below: jax.tree.map(lambda _: _Box(leaf), below),
        prefix,
        tree,
        is_leaf=_is_sharding,
      ),
      is_leaf=lambda leaf: isinstance(leaf, _Box),
    )
  except ValueError as error:
    raise ValueError(
      f"{name}: got a tree that does not fit; takes a sharding or partition "
      f"spec for each array, or for a whole subtree ({error})"
    ) from error


@dataclasses.dataclass(frozen=True)
class _Box:
  """Keeps None and partition specs from being taken for trees."""

  value: Any


def _donated(fn: Callable, args: tuple, arrays: list[Any]) -> list[int]:
  """Which of the arrays a jitted function was told it may overwrite."""
  if not hasattr(fn, "trace"):
    return []
  donated = []
  infos = iter(jax.tree.leaves(fn.trace(*args).args_info))
  # Its arguments are the arrays in their order, with scalars between them.
  for position, array in enumerate(arrays):
    for info in infos:
      if (info.shape, info.dtype) == (array.shape, array.dtype):
        if info.donated:
          donated.append(position)
        break
  return donated


def compile_for(
  fn: Callable,
  *avals: Any,
  target: str = "v6e:2x2",
  mesh: Mesh | AbstractMesh | None = None,
  in_shardings: Any = None,
  out_shardings: Any = None,
  compiler_options: Mapping[str, str | bool | int] | None = None,
) -> Compiled:
  """Compiles a function for a target and reports what came of it.

  Pallas kernels are lowered for the target's device, whatever this process
  has: inside of `fn`, `jax.lax.platform_dependent` takes the target's branch
  and `jax.sharding.get_abstract_mesh().abstract_device` is the target's
  device. (`jax.default_backend()` is not: it tells where this process runs.)

  Args:
    fn: A function, jitted or not. Of a jitted one static and donated arguments
      are kept; shardings that `jax.jit` was given are not seen, so give them
      here. Host callbacks, `jax.debug.print` too, cannot be compiled so.
    avals: Its arguments: trees of arrays or of `jax.ShapeDtypeStruct`. Only
      shapes, dtypes and shardings are read. What is no array is a constant.
    target: "v5e:2x2", "v5p:2x2x1", "v6e:16x16" (a slice of any size that there
      is), "h100" or "h100:8" (80 GB, SXM).
    mesh: The mesh of the program's chips: all those of the target, or one. By
      default that of the shardings; one chip where there are none. Only its
      axes count, and its devices are replaced by the target's. It is the
      context's mesh while `fn` is traced, so `jax.shard_map` needs no mesh; one
      that names its mesh takes it from `make_mesh`.
    in_shardings: In place of the avals' own: a tree of `NamedSharding`, or of
      `PartitionSpec` on `mesh`, as in `jax.jit`. Arrays for which neither
      says anything are replicated.
    out_shardings: The same for the results; where nothing is said the compiler
      chooses.
    compiler_options: XLA's options, as in `jax.jit`.

  Raises:
    ValueError: If an argument is none of these, or the compiler knows no such
      slice.
    ImportError: If the compiler is not installed.
    jax.errors.JaxRuntimeError: With the compiler's message, where it refuses
      the program.
    RuntimeError: If the compiler crashes, with the end of what it printed.
  """
  described = _parse(target)
  if mesh is not None and not isinstance(mesh, Mesh | AbstractMesh):
    raise ValueError(
      f"mesh: got {mesh!r}; takes a Mesh, an AbstractMesh or None"
    )
  leaves, tree = jax.tree.flatten(avals)
  arrays = [leaf for leaf in leaves if _is_array(leaf)]
  wanted = [getattr(array, "sharding", None) for array in arrays]
  if in_shardings is not None:
    boxes = _broadcast("in_shardings", in_shardings, avals)
    boxes = [box for box, leaf in zip(boxes, leaves) if _is_array(leaf)]
    wanted = [
      old if box.value is None else box.value for old, box in zip(wanted, boxes)
    ]
  outs = jax.tree.leaves(out_shardings, is_leaf=_is_sharding)
  for name, shardings in ("in_shardings", wanted), ("out_shardings", outs):
    for sharding in shardings:
      if not _is_sharding(sharding):
        raise ValueError(
          f"{name}: got {sharding!r}; takes NamedShardings, PartitionSpecs "
          "and None"
        )
  on = _find_mesh(mesh, wanted + outs, described)
  _require_compiler(described.platform)

  arrays = [
    jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=_place(s, on))
    for a, s in zip(arrays, wanted)
  ]

  def arguments(arrays):
    filled = iter(arrays)
    return tree.unflatten(
      next(filled) if _is_array(leaf) else leaf for leaf in leaves
    )

  # Flat arguments and results: trees of the caller's own kinds need not be
  # known to the worker.
  def flat(*arrays):
    return tuple(jax.tree.leaves(fn(*arguments(arrays))))

  with jax.sharding.use_abstract_mesh(on):
    args = arguments(arrays)
    flat_outs = None
    if out_shardings is not None:
      results = jax.eval_shape(fn, *args)
      boxes = _broadcast("out_shardings", out_shardings, results)
      flat_outs = tuple(_place(box.value, on) for box in boxes)
    exported = export.export(
      jax.jit(flat, out_shardings=flat_outs),
      platforms=[described.platform],
      # What is exported lives for one call, so nothing must stay stable.
      disabled_checks=[export.DisabledSafetyCheck.custom_call("ALL")],
    )(*arrays)
    donated = _donated(fn, args, arrays)
  return _compile_in_a_worker(
    {
      "target": target,
      "program": bytes(exported.serialize()),
      "mesh": (on.axis_sizes, on.axis_names, [t.name for t in on.axis_types]),
      "donated": donated,
      "options": dict(compiler_options or {}),
      "x64": bool(jax.config.jax_enable_x64),
    }
  )


# What the worker runs; the folder and the path to import from are arguments.
_WORKER = """
import sys
folder, *sys.path[:] = sys.argv[1:]
from pallas_kernels import aot
aot._work(folder)
"""


def _environment(folder: pathlib.Path, dump: bool) -> dict[str, str]:
  """The worker's environment; compilers write their dumps into `folder`."""

  def and_more(name, flags):
    return " ".join([os.environ.get(name, ""), *flags]).strip()

  environment = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    # A program out of the cache would leave no dumps.
    "JAX_ENABLE_COMPILATION_CACHE": "0",
    # Keeps libtpu from asking a network for the machine's TPU; any names do.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
    # Its lock keeps processes from sharing a chip; there is no chip here.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # Nothing can be timed without the card.
    "XLA_FLAGS": and_more("XLA_FLAGS", ["--xla_gpu_autotune_level=0"]),
  }
  if dump:
    environment["LIBTPU_INIT_ARGS"] = and_more(
      "LIBTPU_INIT_ARGS",
      [
        f"--xla_jf_dump_to={folder}",
        "--xla_jf_dump_llo_text=true",
        # Of some seventy stages the last one; all take thrice the time.
        "--xla_jf_dump_llo_pass_label_regex=final_.*",
      ],
    )
    environment["MOSAIC_GPU_DUMP_TO"] = str(folder)
    environment["MOSAIC_GPU_DUMP_PTXAS"] = "1"
  return environment


def _compile_in_a_worker(request: dict[str, Any]) -> Compiled:
  with tempfile.TemporaryDirectory(prefix="pallas_kernels_aot_") as name:
    folder = pathlib.Path(name)
    dump = folder / "dump"
    dump.mkdir()
    (folder / "request").write_bytes(pickle.dumps(request))
    has_kernels = any(k in request["program"] for k in _KERNELS)
    with (folder / "output").open("wb") as output:
      status = subprocess.run(
        [sys.executable, "-c", _WORKER, str(folder), *sys.path],
        env=_environment(dump, has_kernels),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
      ).returncode
    reply = folder / "reply"
    if not reply.exists():
      said = (folder / "output").read_text(errors="replace")[-4000:]
      raise RuntimeError(
        f"the compiler for {request['target']} crashed (exit status {status}); "
        f"it printed:\n{said}"
      )
    kind, answer = pickle.loads(reply.read_bytes())
    if kind == "target":
      raise ValueError(
        f"target: got {request['target']!r}, which its compiler refuses "
        f"({answer}); takes {_TAKES}"
      )
    if kind == "program":
      raise jax.errors.JaxRuntimeError(answer)
    kernels = _tpu_kernels(dump, answer["text"]) | _gpu_kernels(dump)
  return Compiled(kernels=kernels, **answer)


def _by_name(kernels: Mapping[str, Any]) -> dict[str, Any]:
  """The same without the number behind a name, where one has the name."""
  plain = {name: re.sub(r"[._]\d+$", "", name) for name in kernels}
  named = list(plain.values())
  return {
    plain[name] if named.count(plain[name]) == 1 else name: kernel
    for name, kernel in kernels.items()
  }


def _tpu_kernels(
  folder: pathlib.Path, text: str
) -> dict[str, schedules.Schedule]:
  """The schedules of the program's Pallas kernels.

  Of equal kernels the compiler writes one.
  """
  calls = re.findall(r'%(\S+) = .*custom_call_target="tpu_custom_call"', text)
  return _by_name(schedules.read(folder, calls))


def _gpu_kernels(folder: pathlib.Path) -> dict[str, GPUKernel]:
  """What ptxas reported, and the shared memory that is asked for at launch."""
  found = {}
  for path in sorted(folder.glob("*.ptxas")):
    report = path.read_text()
    spills = re.search(
      r"(\d+) bytes spill stores, (\d+) bytes spill loads", report
    )
    registers = re.search(r"Used (\d+) registers", report)
    if not spills or not registers:
      continue
    static = re.search(r"(\d+) bytes smem", report)
    dynamic = None
    with path.with_suffix(".mlir-passes.log").open() as passes:
      for line in passes:
        if dynamic := re.search(r"dynamic_shared_memory_size %c(\d+)", line):
          break
    shared = sum(int(match[1]) for match in (static, dynamic) if match)
    found[path.stem] = GPUKernel(
      path.stem, int(spills[1]), int(spills[2]), shared, int(registers[1])
    )
  return _by_name(found)


def _work(name: str) -> None:
  """The worker: compiles the request in a folder and leaves a reply there."""
  folder = pathlib.Path(name)
  request = pickle.loads((folder / "request").read_bytes())
  reply = _compile(request)
  # In one piece: a reply that is there is whole.
  (folder / "unfinished").write_bytes(pickle.dumps(reply))
  (folder / "unfinished").rename(folder / "reply")


def _compile(request: dict[str, Any]) -> tuple[str, Any]:
  """("compiled", Compiled's fields), or what was refused and the message."""
  target = _parse(request["target"])
  if target.platform == "cuda":
    # Points XLA to the library that Mosaic GPU kernels are linked with.
    from jax.experimental.pallas import mosaic_gpu  # noqa: F401
  jax.config.update("jax_enable_x64", request["x64"])
  try:
    devices = topologies.get_topology_desc(**target.topology).devices
  except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
    return "target", str(error)
  sizes, names, types = request["mesh"]
  mesh = jax.make_mesh(
    sizes,
    names,
    tuple(AxisType[name] for name in types),
    devices=devices[: math.prod(sizes)],
  )
  exported = export.deserialize(bytearray(request["program"]))
  replicated = NamedSharding(mesh, PartitionSpec())
  jitted = jax.jit(
    lambda *arrays: exported.call(*arrays),
    in_shardings=tuple(
      replicated if sharding is None else sharding
      for sharding in exported.in_shardings_jax(mesh)
    ),
    out_shardings=tuple(exported.out_shardings_jax(mesh)),
    donate_argnums=tuple(request["donated"]),
  )
  avals = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in exported.in_avals]
  try:
    compiled = jitted.lower(*avals).compile(request["options"])
  except jax.errors.JaxRuntimeError as error:
    return "program", str(error)
  stats = compiled.memory_analysis()
  memory = ("argument", "output", "alias", "temp", "generated_code")
  cost = compiled.cost_analysis()
  return "compiled", {
    "target": request["target"],
    "chips": mesh.size,
    "memory": {
      name: getattr(stats, f"{name}_size_in_bytes") for name in memory
    },
    "cost": None if cost is None else dict(cost),
    "text": compiled.as_text(),
  }
