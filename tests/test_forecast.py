"""What a page's step costs a target: read from the program that the target's compiler makes."""

import pathlib

import jax
import pytest

from medattn_jax import config, forecast
from medattn_jax.errors import UserError
from medattn_jax.programs import chips, roofline

PAGES = pathlib.Path(__file__).parent / "pages"


def page(name="tiny_map", **changed):
  keys = [(key.replace("__", "."), value) for key, value in changed.items()]
  return config.load_page(str(PAGES / f"{name}.py"), keys)


def here(changed=None, phase="frozen", devices=2, **how):
  target = chips.target(f"cpu:{devices}")
  return forecast.here(
    page(**(changed or {})), phase, target, jax.devices()[:devices], **how)


@pytest.fixture(scope="module")
def once():
  return here(largest=3)


@pytest.fixture(scope="module")
def accumulated():
  return here({"phases__frozen__accumulation": "3"})


def test_a_step_of_a_cpu_has_memory_collectives_and_operations(once):
  assert (once.devices, once.images, once.phase) == (2, 16, "frozen")
  assert once.report.counts == {"all-reduce": 1} and once.report.donated == once.leaves
  assert once.unread == 0 and once.fits and once.needs == once.report.peak < once.memory
  assert once.bound is None and once.rate is None and once.cycles is None
  assert once.places.unit == "bytes" and len(once.places.singles) == 3
  assert once.places.total == once.accessed == once.hbm
  row = once.row()
  assert row["target"] == "cpu:2" and row["batch"] == 16 and "model" not in row


@pytest.mark.slow
def test_rounds_count_as_often_as_they_run(once, accumulated):
  """Three small batches an update: XLA's own count would see one of them."""
  assert accumulated.images == 3 * once.images
  assert accumulated.flops == pytest.approx(3 * once.flops, rel=0.1)
  assert 2 * once.accessed < accumulated.accessed < 4 * once.accessed
  assert accumulated.report.flops < 1.5 * once.flops
  assert accumulated.report.counts == {"all-reduce": 1}
  assert not any(one.inside for one in accumulated.report.collectives)


def test_a_chip_makes_a_time_of_it(once):
  sheet = chips.CHIPS["v5e"]
  bound = roofline.bound(once.flops, once.hbm, 1e6, 1, 2, sheet)
  timed = once._replace(target=chips.target("v5e:1x2"), bound=bound)
  assert timed.rate == pytest.approx(16 / bound.seconds)
  model = timed.row()["model"]
  assert model["step_ms"] == pytest.approx(1e3 * bound.seconds)
  assert model["images_per_second_per_chip"] == pytest.approx(8 / bound.seconds)


def test_a_gpu_needs_a_margin_that_its_compiler_does_not_know_of(once):
  of = lambda target, needs: once._replace(
    target=chips.target(target), needs=needs, memory=1000).fits
  assert of("h200", 919) and not of("h200", 921)
  assert of("cpu:2", 1000) and not of("cpu:2", 1001)
  assert of("v5e", 1001)  # its compiler would have refused it
  assert not once._replace(target=chips.target("v5e"), report=None).fits


@pytest.mark.parametrize(("text", "needs"), [
  ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
   "(240.00G) exceeds available HBM (15.75G).", 240 * 2**30),
  ("XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 512.50M of "
   "15.75G hbm.", int(512.5 * 2**20)),
  ("RESOURCE_EXHAUSTED: something else", None)])
def test_what_a_compiler_that_refuses_says_it_needs(text, needs):
  assert forecast._needed(text) == needs


def test_a_batch_that_does_not_divide_is_refused():
  with pytest.raises(UserError, match="16 images does not divide over 3 devices"):
    here(devices=3)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["v5e:2x4", "h200:8"])
def test_the_compilers_of_chips_that_are_not_here(target, tmp_path, monkeypatch):
  monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  target = chips.target(target)
  if reason := chips.missing(target):
    pytest.skip(reason)
  keep = tmp_path / "program.txt"
  found = forecast.of(page("tiny", data__batch_size="16"), "joint", target, 3, 4, str(keep))
  assert set(found.report.counts) == {"all-reduce"} and set(found.report.wire) == {"f32"}
  assert found.report.counts["all-reduce"] <= (2 if target.tpu else 1)
  assert not any(one.inside for one in found.report.collectives)
  assert found.report.donated == found.leaves
  assert found.fits and found.needs < 1e9
  assert found.bound.seconds > 0 and found.flops > 1e7
  assert 1e7 < found.hbm <= found.accessed
  assert found.places.unit == ("cycles" if target.tpu else "bytes")
  text = keep.read_text()
  assert text.startswith("HloModule")
  assert target.tpu or ("__cublas" in text and "__triton_gemm" not in text)


@pytest.mark.slow
def test_a_tpu_refuses_what_has_no_room(monkeypatch):
  monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  target = chips.target("v5e")
  if reason := chips.missing(target):
    pytest.skip(reason)
  found = forecast.of(page(data__batch_size="60000", data__full_size="96", data__image_size="96"),
                      "frozen", target)
  assert not found.fits and found.report is None and found.needs > found.memory


@pytest.mark.slow
def test_a_gpus_program_keeps_what_it_is_written_to_keep():
  """Beyond the memory too: the peak grows as the batch does."""
  target = chips.target("h200")
  if reason := chips.missing(target):
    pytest.skip(reason)
  small, large = (
    forecast.of(page("tiny", data__batch_size=f"{images}", data__full_size="192",
                     data__image_size="192"), "joint", target)
    for images in (3_200, 64_000))
  assert small.fits and not large.fits
  assert large.needs == pytest.approx(20 * small.needs, rel=0.05)
