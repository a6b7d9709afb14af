import dataclasses
import importlib.util
import pathlib
import shutil

import jax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractMesh
from jax.sharding import AxisType
import pytest

from pallas_kernels import aot
from pallas_kernels import schedules

# What libtpu 0.0.50.1 wrote for `matmul` below: two bf16 operands, blocks of
# 128 x 128 x 128, for v6e.
DATA = pathlib.Path(__file__).parent / "data"
BUNDLES = DATA / "1-matmul.1-02-final_bundles.txt"
SLOTS = DATA / "1-matmul.1-00-final_hlo-static-per-bundle-utilization.txt"

Spec = jax.ShapeDtypeStruct


def installed(*modules):
  try:
    return all(importlib.util.find_spec(module) for module in modules)
  except ModuleNotFoundError:
    return False


def needs(*modules):
  """Marks a test that compiles: slow, and skipped without the compiler."""
  reason = "no compiler: pip install 'sparsejax[aot]'"
  missing = not installed("flatbuffers", *modules)

  def mark(test):
    return pytest.mark.slow(pytest.mark.skipif(missing, reason=reason)(test))

  return mark


needs_tpu = needs("libtpu")
needs_gpu = needs("jax_plugins.xla_cuda12")


def matmul(lhs, rhs, block=128):
  """A matrix product whose accumulator is set up and written under pl.when."""

  def kernel(lhs_ref, rhs_ref, out_ref, sums):
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _():
      sums[...] = jnp.zeros_like(sums)

    sums[...] += jnp.dot(
      lhs_ref[...], rhs_ref[...], preferred_element_type=jnp.float32
    )

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
      out_ref[...] = sums[...].astype(out_ref.dtype)

  (m, k), n = lhs.shape, rhs.shape[1]
  square = (block, block)
  vary = jax.typeof(lhs).manual_axis_type
  return pl.pallas_call(
    kernel,
    name="matmul",
    grid=(m // block, n // block, k // block),
    in_specs=[
      pl.BlockSpec(square, lambda i, j, step: (i, step)),
      pl.BlockSpec(square, lambda i, j, step: (step, j)),
    ],
    out_specs=pl.BlockSpec(square, lambda i, j, step: (i, j)),
    out_shape=Spec((m, n), lhs.dtype, manual_axis_type=vary),
    scratch_shapes=[pltpu.VMEM(square, jnp.float32)],
  )(lhs, rhs)


# Operands too large for XLA to keep in VMEM.
LHS = Spec((65536, 2048), jnp.bfloat16)
RHS = Spec((2048, 65536), jnp.bfloat16)


class TestSchedules:
  def test_matmul(self):
    (schedule,) = schedules.read(DATA).values()
    assert schedule.name == "matmul.1"
    assert schedule.capacity["MXU"] == 2
    assert schedule.root.bundles == 215
    step = schedule.step
    assert step.loop and (step.begin, step.end) == (17, 209)
    # The product is under no predicate of its own: its region has the set-up
    # and the output nested in it.
    hot = schedule.bodies[0]
    assert [child.bundles for child in hot.children] == [9, 10]
    assert hot.bundles == 103
    assert schedule.body == 103 - 9 - 10
    assert schedule.whole_step == schedule.body + 192 - 103
    assert schedule.other_bodies == ()
    # A v6e MXU takes eight rows a slot: 16 for the rows, the rest weights.
    assert schedule.mxu_slots == 20
    assert schedule.mxu_utilization == 20 / (2 * 84)
    assert schedule.spills == 0
    # A block of each operand and of the output.
    assert schedule.copied_bytes == 3 * 128 * 128 * 2

  def test_regions_nest(self):
    (schedule,) = schedules.read(DATA).values()
    for region in schedule.root.walk():
      assert 0 < region.always <= region.bundles
      for child in region.children:
        assert region.begin <= child.begin < child.end <= region.end
      for unit, slots in region.slots.items():
        assert 0 <= slots <= schedule.capacity[unit] * region.bundles
        assert region.own(unit) >= 0

  def test_newest_of_one_name_and_other_files_are_passed_over(self, tmp_path):
    for old, new in (
      (BUNDLES, "2-matmul.1-8-final_bundles.txt"),
      (
        SLOTS,
        "2-matmul.1-7-final_hlo-static-per-bundle-utilization.txt",
      ),
    ):
      shutil.copy(old, tmp_path / old.name)
      shutil.copy(old, tmp_path / new)
    (tmp_path / BUNDLES.name).write_text("")
    (tmp_path / "3-matmul.1-1-schedule-analysis_final_bundles.txt").touch()
    (tmp_path / "3-matmul.1-hlo.txt").touch()
    (tmp_path / "3-alone.1-1-final_bundles.txt").touch()
    assert list(schedules.read(tmp_path)) == ["matmul.1"]
    assert not schedules.read(tmp_path, ["another"])

  def test_dynamic_copies_have_no_size(self):
    text = BUNDLES.read_text().replace(
      "/*size_in_granules=*/1024", "/*size_in_granules=*/%s5", 1
    )
    schedule = schedules.parse(text, SLOTS.read_text())
    assert schedule.copied_bytes is None

  @pytest.mark.parametrize("cut", ["", "     0   :  { %1 = snop }"])
  def test_files_that_do_not_fit(self, cut):
    with pytest.raises(ValueError, match=r"bundles of kernel: got [01], and"):
      schedules.parse(cut, SLOTS.read_text())

  def test_unknown_utilization(self):
    with pytest.raises(ValueError, match="no line that begins with MXU"):
      schedules.parse(BUNDLES.read_text(), "VPU")

  def test_program_without_work_or_loops(self):
    capacity = "MXU, VALU, VLOAD:FILL, VSTORE:SPILL\n2 4 3 1\n"
    schedule = schedules.parse(
      "  0   :  { %1 = snop }\n 0x1 :  {}", capacity + "0 0 0 0\n0 0 1 2\n"
    )
    assert (schedule.body, schedule.whole_step) == (2, 2)
    assert schedule.mxu_utilization == 0
    assert schedule.spills == 3


class TestReports:
  def test_ptxas(self, tmp_path):
    report = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'dkv_kernel' for 'sm_90a'
ptxas info    : Function properties for dkv_kernel
    0 bytes stack frame, 28 bytes spill stores, 52 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem
"""
    launch = "gpu.launch_func @dkv dynamic_shared_memory_size %c{}_i32 args()\n"
    for name, size in ("dkv_0", 133120), ("fwd_1", 1024), ("fwd_2", 2048):
      (tmp_path / f"{name}.ptxas").write_text(report)
      log = tmp_path / f"{name}.mlir-passes.log"
      log.write_text("module\n" + launch.format(size))
    found = aot._gpu_kernels(tmp_path)
    assert set(found) == {"dkv", "fwd_1", "fwd_2"}
    kernel = found["dkv"]
    assert (kernel.spill_stores, kernel.spill_loads) == (28, 52)
    assert (kernel.registers, kernel.shared_memory) == (168, 133121)
    assert found["fwd_2"].shared_memory == 2049

  def test_tpu_kernels_are_the_programs_own(self):
    text = (
      '%matmul.1 = bf16[8]{0} custom-call(%x), custom_call_target="{}"'
    ).replace("{0}", "0")
    call = text.replace("{}", "tpu_custom_call")
    assert set(aot._tpu_kernels(DATA, call)) == {"matmul"}
    assert not aot._tpu_kernels(DATA, text.replace("{}", "another"))

  def test_collectives(self):
    text = """
  %a.1 = (bf16[4,8]{1,0:T(8,128)(2,1)}, f32[]) all-reduce(%x, %y), to_apply=%f
  %b = (bf16[2]{0}, bf16[8]{0}, u32[]{:S(2)}) all-gather-start(%z)
  %all-gather-done = bf16[8]{0} all-gather-done(%b)
  %all-gather.7 = pred[3]{0} all-gather(%c), metadata={op_name="all-gather"}
  ROOT %r = s4[3]{0} ragged-all-to-all(%all-gather.7, %all-to-all)
  %fusion = f32[99] fusion(%all-reduce.1)
"""
    compiled = aot.Compiled("v6e:2x2", 4, {}, None, {}, text)
    assert compiled.collectives == {
      "all-gather": aot.Collective(2, 8 * 2 + 3),
      "all-reduce": aot.Collective(1, 4 * 8 * 2 + 4),
      "ragged-all-to-all": aot.Collective(1, 2),
    }
    assert [line.split() for line in str(compiled).splitlines()[-4:]] == [
      ["collective", "count", "results"],
      ["all-gather", "2", "19", "B"],
      ["all-reduce", "1", "68", "B"],
      ["ragged-all-to-all", "1", "2", "B"],
    ]

  def test_tables(self):
    memory = {"argument": 3 << 20, "temp": 0}
    kernels = aot._by_name(schedules.read(DATA))
    compiled = aot.Compiled(
      "v6e:2x2", 4, memory, {"flops": 2e9}, kernels, "HloModule"
    )
    lines = str(compiled).splitlines()
    assert lines[0] == "v6e:2x2, a program over 4 chips"
    assert lines[1] == "memory a chip: argument 3 MiB, temp 0 B"
    assert "2e+09 flops" in lines[2]
    assert lines[3] == "(of kernels their own estimate; of loops one turn)"
    head = "kernel body step other bodies MXU slots MXU spills copied a step"
    assert " ".join(lines[5].split()) == head
    assert " ".join(lines[6].split()) == "matmul 84 173 - 20 12% 0 96 KiB"
    assert len(lines[5]) == len(lines[6])
    assert "HloModule" not in repr(compiled)
    kernel = aot.GPUKernel("dq", 0, 0, 198656, 168)
    compiled = dataclasses.replace(
      compiled, target="h100", chips=1, cost=None, kernels={"dq": kernel}
    )
    lines = str(compiled).splitlines()
    assert lines[0].endswith("1 chip")
    assert " ".join(lines[-1].split()) == "dq 0 B 0 B 194 KiB 168"


def identity(x):
  return x


class TestBadInput:
  @pytest.mark.parametrize(
    "target",
    [
      *(
        "",
        "v6e",
        "v6e:",
        "v6e:2",
        "v6e:2x2x1",
        "v6e:2x",
        "v6e:0x2",
        "v6e:2X2",
      ),
      *("v5p:2x2", "v7:2x2", "V6e:2x2", "h100:", "h100:0", "h100:2x2", "h200"),
      *("tpu", None, 8),
    ],
  )
  def test_target(self, target):
    with pytest.raises(ValueError, match=r"^target: got .*takes "):
      aot.compile_for(identity, Spec((8,), jnp.float32), target=target)

  def test_mesh_of_another_size(self):
    with pytest.raises(ValueError, match=r"^axis_shapes: got \(2,\), 2 chips"):
      aot.make_mesh((2,), ("x",), target="v6e:2x2")
    mesh = aot.make_mesh((4,), ("x",), target="v6e:2x2")
    x = Spec((8,), jnp.float32, sharding=jax.NamedSharding(mesh, jax.P("x")))
    with pytest.raises(
      ValueError, match=r"^mesh: got \(4,\).* the 8 of h100:8"
    ):
      aot.compile_for(identity, x, target="h100:8")

  def test_several_meshes(self):
    x, y = (
      Spec(
        (8,),
        jnp.float32,
        sharding=jax.NamedSharding(
          aot.make_mesh((4,), (name,), target="v6e:2x2"), jax.P(name)
        ),
      )
      for name in "xy"
    )
    with pytest.raises(ValueError, match=r"^mesh: got several.*x: 4 and y: 4"):
      aot.compile_for(jnp.add, x, y, target="v6e:2x2")

  def test_mesh_that_is_none(self):
    with pytest.raises(ValueError, match=r"^mesh: got \(4,\); takes a Mesh"):
      aot.compile_for(identity, Spec((8,), jnp.float32), mesh=(4,))

  @pytest.mark.parametrize("name", ["in_shardings", "out_shardings"])
  def test_shardings(self, name):
    with pytest.raises(ValueError, match=rf"^{name}: got 'x'"):
      aot.compile_for(identity, Spec((8,), jnp.float32), **{name: "x"})

  def test_shardings_of_another_tree(self):
    with pytest.raises(ValueError, match=r"^in_shardings: got a tree"):
      aot.compile_for(
        identity, Spec((8,), jnp.float32), in_shardings=(jax.P(), jax.P())
      )

  @pytest.mark.parametrize(
    ("target", "package"),
    [("v6e:2x2", "libtpu"), ("h100", "jax-cuda12-plugin")],
  )
  def test_missing_compiler(self, target, package, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=rf"{package}.*sparsejax\[aot\]"):
      aot.compile_for(identity, Spec((8,), jnp.float32), target=target)

  def test_crash_says_what_was_printed(self, monkeypatch):
    monkeypatch.setattr(
      aot, "_WORKER", "import os; print('oh no', flush=True); os._exit(3)"
    )
    with pytest.raises(
      RuntimeError, match=r"crashed \(exit status 3\)[^$]*oh no"
    ):
      aot._compile_in_a_worker({"program": b"", "target": "v6e:2x2"})


def test_meshes_know_their_device():
  mesh = aot.make_mesh((2, 2), ("x", "y"), target="v6e:2x2")
  assert mesh.abstract_device.device_kind == "TPU v6 lite"
  assert set(mesh.axis_types) == {AxisType.Explicit}
  mesh = aot.make_mesh((8,), ("x",), (AxisType.Auto,), target="h100:8")
  assert mesh.abstract_device.platform == "gpu"
  assert mesh.abstract_device.num_cores == 132


@needs_tpu
@pytest.mark.parametrize("target", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_kernel_on_every_tpu(target, capfd):
  compiled = aot.compile_for(matmul, LHS, RHS, target=target)
  schedule = compiled.kernels["matmul"]
  assert schedule.copied_bytes == 3 * 128 * 128 * 2
  assert schedule.mxu_slots >= 128 / 8
  assert 0 < schedule.mxu_utilization <= 1
  assert schedule.body < schedule.whole_step < schedule.root.bundles
  assert compiled.memory["argument"] == 2 * 65536 * 2048 * 2
  assert compiled.memory["output"] == 65536 * 65536 * 2
  assert "tpu_custom_call" in compiled.text
  out, err = capfd.readouterr()
  assert not out and not err


@needs_tpu
def test_splash_attention():
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash,
  )
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
  )

  heads, length, block = 4, 4096, 128
  sizes = {
    field.name: block
    for field in dataclasses.fields(splash.BlockSizes)
    if field.name.startswith("block_")
  }
  attend = splash.make_splash_mha(
    masks.MultiHeadMask([masks.CausalMask((length, length))] * heads),
    head_shards=1,
    q_seq_shards=1,
    block_sizes=splash.BlockSizes(**sizes),
  )
  x = Spec((heads, length, 128), jnp.bfloat16)
  loss = lambda *qkv: attend(*qkv).astype(jnp.float32).sum()
  compiled = aot.compile_for(jax.grad(loss, (0, 1, 2)), x, x, x)
  # 228 and 451, 193 and 304, 229 and 377 with libtpu 0.0.50.1. An MXU of 256 x
  # 256 is half filled by each product of a block.
  for name, products, body, step in (
    ("splash_mha_fwd_residuals", 2, 228, 451),
    ("splash_mha_dq_no_residuals", 3, 193, 304),
    ("splash_mha_dkv_no_residuals", 4, 229, 377),
  ):
    kernel = compiled.kernels[name]
    assert kernel.body == pytest.approx(body, rel=0.15)
    assert kernel.whole_step == pytest.approx(step, rel=0.15)
    assert kernel.mxu_slots >= products * block / 8
    assert kernel.spills == 0
  assert str(compiled).count("splash_mha") == 3


@needs_tpu
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_program_over_many_chips(axis_type):
  mesh = aot.make_mesh(
    (16, 16), ("data", "model"), (axis_type,) * 2, target="v6e:16x16"
  )
  at = lambda *spec: jax.NamedSharding(mesh, jax.P(*spec))
  x = Spec((4096, 1024), jnp.bfloat16, sharding=at("data"))
  w = Spec((1024, 8192), jnp.bfloat16, sharding=at(None, "model"))

  def loss(w, x):
    return jnp.square(jnp.tanh(x @ w)).sum()

  compiled = aot.compile_for(jax.grad(loss), w, x, target="v6e:16x16")
  assert compiled.chips == 256
  # The gradient of a shard of the weights, of the rows of all others.
  assert compiled.collectives["all-reduce"].bytes == 1024 * 8192 * 2 // 16
  assert compiled.memory["argument"] == (1024 * 8192 + 4096 * 1024) * 2 // 16
  assert compiled.memory["output"] == 1024 * 8192 * 2 // 16
  assert compiled.cost["flops"] < 1e12


@needs_tpu
@pytest.mark.parametrize("names_mesh", [False, True])
def test_kernel_in_shard_map(names_mesh):
  mesh = aot.make_mesh((4,), ("x",), target="v6e:2x2")

  def product(lhs, rhs):
    local = jax.shard_map(
      lambda lhs, rhs: matmul(lhs, jax.lax.pcast(rhs, "x", to="varying")),
      mesh=mesh if names_mesh else None,
      in_specs=(jax.P("x"), jax.P()),
      out_specs=jax.P("x"),
    )
    return local(lhs, rhs)

  rows = jax.NamedSharding(mesh, jax.P("x"))
  lhs = Spec(LHS.shape, LHS.dtype, sharding=rows)
  compiled = aot.compile_for(product, lhs, RHS, target="v6e:2x2")
  assert compiled.chips == 4
  assert compiled.memory["output"] == 65536 * 65536 * 2 // 4
  assert compiled.kernels["matmul"].mxu_slots >= 16


@needs_tpu
def test_shardings_by_argument():
  mesh = AbstractMesh((2, 2), ("x", "y"), (AxisType.Auto,) * 2)
  tree = {"a": Spec((64, 128), jnp.float32), "b": Spec((128,), jnp.float32)}
  compiled = aot.compile_for(
    lambda tree, x: (tree["a"] + tree["b"] + x, tree),
    tree,
    jnp.ones((64, 1)),
    target="v6e:2x2",
    mesh=mesh,
    in_shardings=({"a": jax.P("x", "y"), "b": jax.P("y")}, None),
    out_shardings=(jax.P("x", "y"), None),
  )
  assert "f32[32,64]" in compiled.text
  assert "f32[64,128]" not in compiled.text


@needs_tpu
def test_arrays_of_this_process():
  mesh = jax.make_mesh((8,), ("x",), (AxisType.Explicit,))
  x = jax.device_put(jnp.ones((64, 128)), jax.NamedSharding(mesh, jax.P("x")))
  with jax.set_mesh(mesh):
    compiled = aot.compile_for(lambda x: x * 2, x, target="v5e:2x4")
  assert compiled.chips == 8
  assert "f32[8,128]" in compiled.text


@needs_tpu
def test_donated_and_static_arguments():
  state = {"w": Spec((1024,), jnp.float32), "step": Spec((), jnp.int32)}

  def step(name, state, x):
    assert name == "plus"
    return {"w": state["w"] + x, "step": state["step"] + 1}, x.sum()

  x = Spec((1024,), jnp.float32)
  jitted = jax.jit(step, static_argnums=0, donate_argnums=1)
  compiled = aot.compile_for(jitted, "plus", state, x)
  assert compiled.memory["alias"] >= 4096
  kept = aot.compile_for(step, "plus", state, x)
  assert kept.memory["alias"] == 0


@needs_tpu
def test_trees_of_any_kind():
  @jax.tree_util.register_dataclass
  @dataclasses.dataclass
  class State:
    w: jax.Array
    key: jax.Array

  def step(state):
    key, more = jax.random.split(state.key)
    return State(state.w + jax.random.normal(more, state.w.shape), key)

  key = jax.eval_shape(lambda: jax.random.key(0))
  state = State(Spec((8, 128), jnp.float32), key)
  assert aot.compile_for(step, state).memory["output"] >= 4096


@needs_tpu
def test_the_targets_branch_is_taken():
  def branches(x):
    kind = jax.sharding.get_abstract_mesh().abstract_device.device_kind
    assert kind == "TPU v5 lite"
    return jax.lax.platform_dependent(
      x, tpu=lambda x: matmul(x, x), default=lambda x: x @ x
    )

  x = Spec((4096, 4096), jnp.bfloat16)
  compiled = aot.compile_for(branches, x, target="v5e:2x2")
  assert set(compiled.kernels) == {"matmul"}


@needs_tpu
def test_what_the_compiler_refuses():
  with pytest.raises(ValueError, match=r"^target: got 'v6e:3x3'.*refuses"):
    aot.compile_for(identity, Spec((8,), jnp.float32), target="v6e:3x3")
  with pytest.raises(jax.errors.JaxRuntimeError, match="Ran out of memory"):
    aot.compile_for(identity, Spec((1 << 40,), jnp.float32))


@needs_tpu
def test_options_and_wide_types():
  with jax.enable_x64(True):
    compiled = aot.compile_for(
      lambda x: x + 1,
      Spec((8, 128), jnp.int64),
      compiler_options={"xla_tpu_scoped_vmem_limit_kib": 32768},
    )
  assert compiled.memory["argument"] == 8192


def gpu_matmul(lhs, rhs):
  from jax.experimental.pallas.ops.gpu import hopper_matmul_mgpu as hopper

  config = hopper.TuningConfig(
    tile_m=128, tile_n=128, tile_k=64, max_concurrent_steps=4
  )
  return hopper.matmul(lhs, rhs, None, config=config)


@needs_gpu
def test_kernel_on_h100(capfd):
  x = Spec((1024, 1024), jnp.float16)
  compiled = aot.compile_for(gpu_matmul, x, x, target="h100")
  assert compiled.cost is None
  assert compiled.memory["argument"] == 2 * 1024 * 1024 * 2
  (kernel,) = compiled.kernels.values()
  assert (kernel.spill_stores, kernel.spill_loads) == (0, 0)
  # Four steps of two 128 x 64 operands at the least.
  assert 4 * 2 * 128 * 64 * 2 <= kernel.shared_memory <= 232448
  assert 0 < kernel.registers <= 255
  assert "spill stores" in str(compiled)
  out, err = capfd.readouterr()
  assert not out and not err


@needs_gpu
def test_program_over_eight_h100s():
  mesh = aot.make_mesh((8,), ("x",), target="h100:8")
  rows = jax.NamedSharding(mesh, jax.P("x"))

  def product(lhs, rhs):
    def local(lhs, rhs):
      out = gpu_matmul(lhs, jax.lax.pcast(rhs, "x", to="varying"))
      return jax.lax.psum(jax.lax.pcast(out, "x", to="varying"), "x")

    specs = (jax.P("x"), jax.P())
    return jax.shard_map(local, in_specs=specs, out_specs=jax.P())(lhs, rhs)

  lhs = Spec((8192, 1024), jnp.float16, sharding=rows)
  rhs = Spec((1024, 1024), jnp.float16)
  compiled = aot.compile_for(product, lhs, rhs, target="h100:8")
  assert compiled.chips == 8
  assert "all-reduce" in compiled.text
  assert len(compiled.kernels) == 1
