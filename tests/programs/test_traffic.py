"""The reader of compiled programs: bytes as XLA counts them, and loops as often as they run."""

import jax
import jax.numpy as jnp
import pytest

from medattn_jax.programs import report, traffic


def compiled(function, *shapes):
  arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
  return jax.jit(function).lower(*arrays).compile()


def layers(x, w):
  for _ in range(3):
    x = jax.nn.relu(x @ w) + 1
  return x


def test_without_a_loop_it_agrees_with_xla():
  program = compiled(
    jax.grad(lambda w, x: layers(x, w).sum()), ((256, 256), jnp.float32), ((64, 256), jnp.float32))
  found = sum(traffic.moved(program.as_text()).values())
  assert found == pytest.approx(program.cost_analysis()["bytes accessed"], rel=0.1)


def test_a_loop_counts_as_often_as_it_runs():
  """A hundred products of 256 kB each way; XLA's own count sees one of them."""

  def loop(x, w):
    return jax.lax.fori_loop(0, 100, lambda _, x: jnp.tanh(x @ w), x)

  program = compiled(loop, ((256, 256), jnp.float32), ((256, 256), jnp.float32))
  product = 3 * 256 * 256 * 4
  found = traffic.moved(program.as_text())["f32"]
  assert 100 * product <= found <= 100 * 2.4 * product
  assert program.cost_analysis()["bytes accessed"] < 10 * product


def test_of_what_is_sliced_only_the_slice_counts():
  def product(w, x):
    take = lambda i: jax.lax.dynamic_slice_in_dim(x, i * 64, 64).astype(jnp.float32)
    return jax.lax.fori_loop(0, 32, lambda i, total: total + w @ take(i), jnp.zeros((8, 512)))

  program = compiled(product, ((8, 64), jnp.float32), ((2048, 512), jnp.uint8))
  assert traffic.moved(program.as_text())["u8"] == 2048 * 512


def test_of_an_operand_only_what_a_result_needs_counts():
  """A slice of what is computed number by number; twice the same, and another of the same array."""
  text = """HloModule m

%parts (p: bf16[64,512], q: bf16[64,512], r: bf16[64,512]) -> (bf16[64,32], bf16[64,96]) {
  %p = bf16[64,512]{1,0} parameter(0)
  %w = f32[64,512]{1,0} convert(%p)
  %q = bf16[64,512]{1,0} parameter(1)
  %v = f32[64,512]{1,0} convert(%q)
  %m = f32[64,512]{1,0} multiply(%w, %v)
  %a = f32[64,512]{1,0} add(%m, %w)
  %n = bf16[64,512]{1,0} convert(%a)
  %s = bf16[64,32]{1,0} slice(%n), slice={[0:64], [448:480]}
  %u = bf16[64,96]{1,0} slice(%q), slice={[0:64], [0:96]}
  %r = bf16[64,512]{1,0} parameter(2)
  %z = bf16[] constant(0)
  %t = bf16[512]{0} reduce(%r, %z), dimensions={0}, to_apply=%sum
  ROOT %o = (bf16[64,32]{1,0}, bf16[64,96]{1,0}, bf16[512]{0}) tuple(%s, %u, %t)
}

ENTRY %main (x: bf16[64,512], y: bf16[64,512], z: bf16[64,512]) -> bf16[64,32] {
  %x = bf16[64,512]{1,0} parameter(0)
  %y = bf16[64,512]{1,0} parameter(1)
  %z = bf16[64,512]{1,0} parameter(2)
  ROOT %fusion = (bf16[64,32], bf16[64,96], bf16[512]) fusion(%x, %y, %z), kind=kLoop, calls=%parts
}
"""
  read = 64 * 32 + 64 * (32 + 96) + 64 * 512
  assert traffic.moved(text) == {"bf16": 2 * (read + 64 * 32 + 64 * 96 + 512)}


def test_a_loop_of_unknown_length_is_refused():
  def loop(x):
    return jax.lax.while_loop(lambda x: x.sum() < 3, lambda x: x * 2, x)

  with pytest.raises(traffic.UnknownLoop):
    traffic.moved(compiled(loop, ((16,), jnp.float32)).as_text())


def test_floats_are_found_in_memory_and_not_within_fusions():
  inside = compiled(lambda x: (x.astype(jnp.float32) * 2).sum(), ((512, 512), jnp.uint8))
  copied = compiled(
    lambda x, w: jax.lax.optimization_barrier(x.astype(jnp.float32)) @ w,
    ((512, 512), jnp.uint8), ((512, 8), jnp.float32))
  assert traffic.floats(inside.as_text(), 512 * 512) == []
  assert traffic.floats(copied.as_text(), 512 * 512) == ["f32[512,512]"]


# As a TPU's compiler writes it: S(1) is its VMEM.
ON_CHIP = """HloModule m

%add (p: f32[64,128], q: f32[64,128]) -> (f32[64,128], f32[64,128]) {
  %p = f32[64,128]{1,0} parameter(0)
  %q = f32[64,128]{1,0} parameter(1)
  %a = f32[64,128]{1,0} add(%p, %q)
  %m = f32[64,128]{1,0} multiply(%p, %q)
  ROOT %t = (f32[64,128]{1,0}, f32[64,128]{1,0}) tuple(%a, %m)
}

ENTRY %main (x: f32[64,128], w: f32[512,128]) -> f32[64,128] {
  %x = f32[64,128]{1,0} parameter(0)
  %w = f32[512,128]{1,0} parameter(1)
  %cs = (f32[64,128]{1,0:S(1)}, f32[64,128]{1,0}, u32[]{:S(2)}) copy-start(%x)
  %c = f32[64,128]{1,0:S(1)} copy-done(%cs)
  %ss = ((f32[512,128]{1,0}), f32[64,128]{1,0:S(1)}, s32[]) slice-start(%w), slice={[0:64], [0:128]}
  %s = f32[64,128]{1,0:S(1)} slice-done(%ss)
  %f = (f32[64,128]{1,0:S(1)}, f32[64,128]{1,0}) fusion(%c, %s), kind=kLoop, calls=%add
  %near = f32[64,128]{1,0:S(1)} get-tuple-element(%f), index=0
  %far = f32[64,128]{1,0} get-tuple-element(%f), index=1
  ROOT %sum = f32[64,128]{1,0} add(%near, %far)
}
"""


def test_what_stays_within_the_chip_is_told_from_what_passes_its_pins():
  each = 4 * 64 * 128
  assert traffic.moved(ON_CHIP) == {"f32": 11 * each}
  far = {one.name: sum(bytes.values()) // each
         for one, _, bytes in traffic.each(ON_CHIP, near=traffic.VMEM)}
  assert far == {"cs": 1, "ss": 1, "f": 1, "sum": 2}


def test_a_fusions_result_may_be_several_itself():
  """A reduction of two arrays at once beside what is written whole."""
  text = """HloModule m

%both (a: f32[], b: f32[], c: f32[], d: f32[]) -> (f32[], f32[]) {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  %c = f32[] parameter(2)
  %d = f32[] parameter(3)
  %e = f32[] add(%a, %c)
  %f = f32[] add(%b, %d)
  ROOT %g = (f32[], f32[]) tuple(%e, %f)
}

%sums (p: bf16[64,128]) -> ((f32[128], f32[128]), bf16[64,128]) {
  %p = bf16[64,128]{1,0} parameter(0)
  %w = f32[64,128]{1,0} convert(%p)
  %z = f32[] constant(0)
  %r = (f32[128]{0}, f32[128]{0}) reduce(%w, %w, %z, %z), dimensions={0}, to_apply=%both
  %n = bf16[64,128]{1,0} negate(%p)
  ROOT %t = ((f32[128]{0}, f32[128]{0}), bf16[64,128]{1,0}) tuple(%r, %n)
}

ENTRY %main (x: bf16[64,128]) -> ((f32[128], f32[128]), bf16[64,128]) {
  %x = bf16[64,128]{1,0} parameter(0)
  ROOT %fusion = ((f32[128]{0}, f32[128]{0}), bf16[64,128]{1,0}) fusion(%x), kind=kLoop, calls=%sums
}
"""
  assert traffic.moved(text) == {"bf16": 2 * 2 * 64 * 128, "f32": 2 * 4 * 128}


def looping(name, end, inside):
  """A computation `name`, as a TPU's compiler writes them, that runs `inside` `end` times."""
  state = "(s32[]{:T(128)}, f32[64]{0:T(128)})"
  return f"""
%{name}_cond (p.{name}: (s32[], f32[64])) -> pred[] {{
  %end.{name} = s32[]{{:T(128)}} constant({end}), metadata={{op_name="jit(local)/while/cond/lt"}}
  %p.{name} = {state} parameter(0)
  %i.{name} = s32[]{{:T(128)}} get-tuple-element(%p.{name}), index=0
  ROOT %lt.{name} = pred[]{{:T(512)}} compare(%i.{name}, %end.{name}), direction=LT
}}

%{name}_body (q.{name}: (s32[], f32[64])) -> (s32[], f32[64]) {{
  %q.{name} = {state} parameter(0)
  {inside}
  ROOT %t.{name} = {state} tuple(%q.{name})
}}
"""


def test_a_tpus_loops_run_as_often_as_their_conditions_say():
  state = "(s32[]{:T(128)}, f32[64]{0:T(128)})"
  loop = lambda name, given: (
    f"%w.{name} = {state} while(%{given}), condition=%{name}_cond, body=%{name}_body")
  add = '%y = f32[64]{0:T(128)} add(%x, %x), backend_config={"estimated_cycles":"10"}'
  text = (
    "HloModule m\n" + looping("inner", 4, f"%x = f32[64]{{0:T(128)}} parameter(1)\n  {add}")
    + looping("outer", 3, loop("inner", "q.outer"))
    + f"\nENTRY %main (q: (s32[], f32[64])) -> f32[64] {{\n  %q = {state} parameter(0)\n"
    f"  %x = f32[64]{{0:T(128)}} parameter(1)\n  {loop('outer', 'q')}\n"
    f"  ROOT {add.replace('10', '100')}\n}}\n")
  assert traffic.moved(text) == {"f32": (3 * 4 + 1) * 3 * 4 * 64}
  assert traffic.repeats(text) == 13 / 2
  assert [(one.times, one.cycles) for one in report.costs(text)] == [(12, 120), (1, 100)]
  never = text.replace("constant(3)", "constant(0)")
  assert traffic.repeats(never) == 1 and [one.times for one in report.costs(never)] == [1]
  unsure = text.replace("constant(3)", "parameter(1)")
  with pytest.raises(traffic.UnknownLoop):
    traffic.moved(unsure)
