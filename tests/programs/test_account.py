"""The whole account of a program: like instructions as one, and what XLA's rule counts."""

from medattn_jax.programs import account, places

TEXT = """HloModule m, is_scheduled=true

%double (p: bf16[16,32]) -> bf16[16,32] {
  %p = bf16[16,32]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %sum = bf16[16,32]{1,0:T(8,128)(2,1)} add(%p, %p)
}

ENTRY %main (a: bf16[16,32], b: f32[300]) -> (bf16[16,32], f32[300]) {
  %a = bf16[16,32]NARROW parameter(0)
  %b = f32[300]{0:T(256)} parameter(1)
  %slice-start = ((bf16[16,32]NARROW), bf16[8,32]NARROW) slice-start(%a)
  %slice-done = bf16[8,32]NARROW slice-done(%slice-start)
  %whole = bf16[16,32]NARROW custom-call(%slice-done), custom_call_target="ConcatBitcast"
  %fusion = bf16[16,32]NARROW fusion(%whole), kind=kLoop, calls=%double, x={"estimated_cycles":"70"}
  %all-reduce = f32[300]{0:T(256)} all-reduce(%b), to_apply=%double
  ROOT %tuple = (bf16[16,32]NARROW, f32[300]{0:T(256)}) tuple(%fusion, %all-reduce)
}
""".replace("NARROW", "{1,0:T(8,128)(2,1)}")


def test_kinds_by_xlas_rule():
  """Rows of 32 lie in tiles of 128, 300 numbers in two of 256; a slice counts as its source."""
  singles = places.of(TEXT, 3, 100).singles
  found = {one.kind: one for one in account.kinds(TEXT, singles)}
  tiles, vector = 2 * 16 * 128, 4 * 512
  assert found["slice-start"].counted == tiles
  assert found["slice-done"].counted == tiles // 2
  assert found["ConcatBitcast"].counted == tiles // 2 + tiles
  assert found["all-reduce"].counted == 2 * vector
  assert found["tuple"].counted == tiles + vector
  assert found["fusion"].counted == found["fusion"].moved == 2 * 2 * 16 * 32
  assert found["slice-start"].moved == 2 * 2 * 8 * 32 and found["ConcatBitcast"].moved == 0
  assert found["fusion"].cost == 70 and "parameter" not in found


def single(cost, moved, path, shape="(f32[4], bf16[8,59,59,32]{3,0,2,1:T(8,128)(2,1)S(1)})"):
  return places.Single(cost, moved, moved // 2, "name", "fusion", shape, "forward", path)


def test_like_instructions_of_like_modules_are_one():
  rows = account.alike([
    single(5, 10, "net/repeat-0/branch1-1/add"), single(7, 20, "net/repeat-11/branch1-1/add"),
    single(100, 2, "net/stem/add"), single(0, 50, "net/repeat-0/branch1-1/add", "f32[7]")])
  assert rows[0].path == "net/stem/add" and rows[0].shape == "bf16[8,59,59,32]"
  assert rows[1] == account.Alike(
    2, 12, 30, 15, "forward", "net/repeat/branch1/add", "fusion", "bf16[8,59,59,32]")
  assert rows[2].shape == "f32[7]"


def test_the_fewest_that_cover_are_listed():
  rows = account.alike([
    single(100, 2, "a"), single(12, 30, "b"), single(0, 50, "c"), single(1, 1, "d")])
  assert [one.path for one in account.covering(rows, 0.8)] == ["a", "b", "c"]
  assert [one.path for one in account.covering(rows, 0.5)] == ["a", "c"]
  assert len(account.covering(rows, 1.0)) == 4
