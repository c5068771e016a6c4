"""Targets by name, their environment, and the compilers of chips that are not here."""

import pytest

from medattn_jax.errors import UserError
from medattn_jax.programs import apart, chips


@pytest.mark.parametrize(("text", "chip", "topology", "count", "hosts"), [
  ("v5e", "v5e", "", 1, 1), ("V5E:2x4", "v5e", "2x4", 8, 1), ("v5p:2x2x4", "v5p", "2x2x4", 16, 1),
  ("v6e:16x16", "v6e", "16x16", 256, 1), ("h100", "h100", "", 1, 1), ("h200:8", "h200", "8", 8, 1),
  (" h200:4x8 ", "h200", "4x8", 32, 4), ("cpu:8", "cpu", "8", 8, 1), ("here", "here", "", 1, 1)])
def test_a_target_is_a_chip_and_how_many(text, chip, topology, count, hosts):
  target = chips.target(text)
  assert (target.chip, target.topology) == (chip, topology)
  assert (target.count, target.hosts) == (count, hosts)
  assert chips.target(str(target)) == target


@pytest.mark.parametrize(("text", "said"), [
  ("v5", "did you mean v5"), ("h20", "did you mean h200"), ("", "accepted: v5e"),
  ("v5e:8", "v5e:2x4"), ("v5p:2x2", "v5p:2x2x1"), ("h200:2x2x2", "h200:8"), ("v5e:", "v5e:2x4"),
  ("h200:0", "h200:8"), ("v5e:0x4", "v5e:2x4"), ("cpu:2x2", "cpu:8"), ("here:8", "as in here"),
  ("v5e:2x4;v5p", "v5e:2x4")])
def test_what_is_no_target_is_refused_in_one_line(text, said):
  with pytest.raises(UserError, match=said) as error:
    chips.target(text)
  assert "\n" not in str(error.value) and repr(text) in str(error.value)


def test_a_sheet_is_known_by_the_name_that_jax_gives():
  assert chips.sheet_of("TPU v5 lite") is chips.CHIPS["v5e"]
  assert chips.sheet_of("TPU v5p") is chips.CHIPS["v5p"]
  assert chips.sheet_of("NVIDIA H100 80GB HBM3") is chips.CHIPS["h100"]
  assert chips.sheet_of("NVIDIA H200") is chips.CHIPS["h200"]
  for other in ("cpu", "NVIDIA H100 PCIe", "NVIDIA A100-SXM4-80GB", "TPU v4"):
    assert chips.sheet_of(other) is None


def test_a_peak_is_what_the_clock_makes_of_the_matrix_units():
  """v5e: four units of 128² at 1.5 GHz; v5p: eight at 1.75 GHz."""
  for chip, units in (("v5e", 4), ("v5p", 8)):
    sheet = chips.CHIPS[chip]
    assert sheet.flops == pytest.approx(2 * units * 128**2 * sheet.clock, rel=0.01)


def test_no_cpu_or_device_that_is_here_has_a_sheet_or_lacks_a_plug_in():
  for text in ("cpu:4", "here"):
    target = chips.target(text)
    assert target.sheet is None and chips.missing(target) is None


def test_what_is_missing_is_said_with_what_to_install(monkeypatch):
  monkeypatch.setattr(chips.importlib.util, "find_spec", lambda name: None)
  assert "pip install libtpu" in chips.missing(chips.target("v6e"))
  assert "jax-cuda13-plugin==" in chips.missing(chips.target("h100:8"))
  with pytest.raises(UserError, match="target v5e:2x4: libtpu is not installed"):
    apart.run(str, target=chips.target("v5e:2x4"))


def test_a_cpu_is_split_in_one_place_alone(monkeypatch):
  flags = "--xla_dump_to=here --xla_force_host_platform_device_count=4"
  monkeypatch.setenv("XLA_FLAGS", flags)
  environment = chips.environment(chips.target("cpu:8"))
  assert environment["JAX_NUM_CPU_DEVICES"] == "8"
  assert environment["XLA_FLAGS"] == "--xla_dump_to=here"
  assert "XLA_FLAGS" not in chips.environment(chips.target("here"))


def looked_at(target):
  found = chips.devices(target)
  return [(one.platform, one.device_kind, one.process_index) for one in found]


def of_target(text):
  target = chips.target(text)
  if reason := chips.missing(target):
    pytest.skip(reason)
  return apart.run(looked_at, target, target=target)


def test_a_cpu_has_the_devices_that_are_asked_for():
  assert of_target("cpu:3") == [("cpu", "cpu", 0)] * 3


@pytest.mark.slow  # libtpu may be at work elsewhere
@pytest.mark.parametrize(("text", "kind"), [
  ("v5e:2x4", "TPU v5 lite"), ("v5p:2x2x1", "TPU v5"), ("v6e", "TPU v6 lite")])
def test_tpus_that_are_not_here(text, kind):
  found = of_target(text)
  assert len(found) == chips.target(text).count
  assert {(platform, name) for platform, name, _ in found} == {("tpu", kind)}
  assert chips.sheet_of(kind) is chips.target(text).sheet


@pytest.mark.parametrize(("text", "hosts"), [("h100", 1), ("h200:2x4", 2)])
def test_gpus_that_are_not_here(text, hosts):
  found = of_target(text)
  assert len(found) == chips.target(text).count
  assert len({host for *_, host in found}) == hosts
  assert chips.sheet_of(f"NVIDIA {found[0][1]}") is chips.target(text).sheet


@pytest.mark.slow  # libtpu may be at work elsewhere
def test_a_topology_that_does_not_exist_is_refused():
  with pytest.raises(UserError, match="its compiler refuses it"):
    of_target("v5e:3x7")
