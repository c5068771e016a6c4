"""Any file: a photograph with the right colours, or the true reason why not; never a wait."""

from __future__ import annotations

import os
import resource
import socket
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from medattn_jax.data import preprocess
from medattn_jax.data.preprocess import BadImage

WIDTH, HEIGHT = 120, 90


@pytest.fixture(scope="module")
def picture(make):
  return make.eye_picture(WIDTH, HEIGHT)


def png(width: int, height: int, bits: int = 8, colour: int = 2) -> bytes:
  """A PNG whose header promises width x height, with a thousand bytes of pixels."""

  def chunk(kind, content):
    body = kind + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

  header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
  return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))
          + chunk(b"IEND", b""))


@pytest.mark.parametrize("kind, mode, tolerance", [
  ("PNG", "RGB", 0), ("BMP", "RGB", 0), ("TIFF", "RGB", 0), ("PPM", "RGB", 0),
  ("JPEG2000", "RGB", 0), ("WEBP", "RGB", 0), ("JPEG", "RGB", 12), ("MPO", "RGB", 12),
  ("PNG", "RGBA", 0), ("WEBP", "RGBA", 0), ("TIFF", "CMYK", 1), ("JPEG", "CMYK", 12),
  ("JPEG", "YCbCr", 12), ("GIF", "P", 40), ("PNG", "P", 40),
])  # fmt: skip
def test_formats_and_modes_keep_their_colours(picture, make, kind, mode, tolerance):
  image = Image.fromarray(picture)
  image = image.quantize(256) if mode == "P" else image.convert(mode)
  options = {"JPEG": {"subsampling": 0}, "MPO": {"subsampling": 0, "quality": 95},
             "WEBP": {"lossless": True}}.get(kind, {})
  got = preprocess.decode_photograph(make.encoded(image, kind, **options))
  assert got.dtype == np.uint8 and got.shape == picture.shape
  # Per colour: exchanged or inverted ones are far off.
  assert np.abs(got.astype(int) - picture).mean((0, 1)).max() <= tolerance / 3
  assert np.percentile(np.abs(got.astype(int) - picture), 99) <= tolerance


def test_gray_is_gray_in_8_and_16_bits(picture, make):
  gray = picture[..., 0]
  for array, kind in (
    (gray, "PNG"), (gray, "JPEG"), (gray.astype(np.uint16) * 257, "PNG"),
    (gray.astype(np.uint16) * 257, "TIFF"), (gray.astype(np.int32) * 257, "TIFF"),
  ):  # fmt: skip
    got = preprocess.decode_photograph(make.encoded(Image.fromarray(array), kind))
    assert (got[..., :1] == got).all()
    tolerance = 12 if kind == "JPEG" else 0  # 16 bits are scaled, not clipped
    assert np.abs(got[..., 0].astype(int) - gray).max() <= tolerance
  got = preprocess.decode_photograph(make.encoded(Image.fromarray(gray).convert("LA"), "PNG"))
  np.testing.assert_array_equal(got[..., 1], gray)


def test_transparent_parts_are_black(picture, make):
  image = Image.fromarray(np.maximum(picture, 60)).convert("RGBA")
  alpha = np.full((HEIGHT, WIDTH), 255, np.uint8)
  alpha[:, :30] = 0
  image.putalpha(Image.fromarray(alpha))
  got = preprocess.decode_photograph(make.encoded(image, "PNG"))
  assert not got[:, :30].any()
  np.testing.assert_array_equal(got[:, 30:], np.maximum(picture, 60)[:, 30:])
  palette = Image.fromarray(picture).quantize(8)
  clear = palette.getpixel((60, 45))
  got = preprocess.decode_photograph(make.encoded(palette, "PNG", transparency=clear))
  assert not got[45, 60].any() and got.any()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation, turn", [
  (1, lambda a: a), (3, lambda a: a[::-1, ::-1]), (6, lambda a: np.rot90(a, -1)),
  (8, np.rot90), (2, lambda a: a[:, ::-1]),
])  # fmt: skip
def test_exif_orientation_is_obeyed(picture, make, kind, orientation, turn):
  exif = Image.Exif()
  exif[0x0112] = orientation
  options = {"lossless": True} if kind == "WEBP" else {}
  got = preprocess.decode_photograph(make.encoded(picture, kind, exif=exif, **options))
  expected = turn(picture)
  assert got.shape == expected.shape
  assert np.abs(got.astype(int) - expected).mean() < 4


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP"])
def test_of_several_frames_the_first_is_taken(picture, make, kind):
  options = {"lossless": True} if kind == "WEBP" else {}
  content = make.encoded(picture, kind, save_all=True,
                         append_images=[Image.fromarray(255 - picture)], **options)
  got = preprocess.decode_photograph(content)
  assert np.abs(got.astype(int) - picture).mean() < 8
  assert preprocess.has_more_frames(content)
  assert not preprocess.has_more_frames(make.encoded(picture, kind))


def test_what_is_no_photograph_is_rejected_with_its_reason(picture, make):
  jpeg, whole = make.encoded(picture), make.encoded(picture, "PNG")
  for content, reason in (
    (jpeg[: len(jpeg) // 2], "damaged.*truncated"),
    (jpeg[:-40], "damaged.*truncated"),
    (whole[: len(whole) // 2], "damaged.*truncated"),
    (make.encoded(picture, "TIFF")[:-3000], "damaged"),
    (make.encoded(picture, "BMP")[:-3000], "damaged"),
    (whole[:40], "damaged|known format"),
    (b"<!DOCTYPE html><html>404</html>", "web page"),
    (b" ", "known format"),
    (bytes(5000), "known format"),
    (bytes(128) + b"DICM" + bytes(500), "DICOM"),
    (make.encoded(picture, "EPS"), "known format"),  # PIL would start Ghostscript
    (make.encoded(picture, "PDF"), "known format"),
    (make.encoded(Image.fromarray(picture[..., 0].astype(np.float32)), "TIFF"), "kind F"),
    (make.encoded(Image.new("RGB", (1, 1)), "PNG"), "1x1"),
    (make.encoded(Image.new("RGB", (20000, 20)), "PNG"), "20000x20"),
    (make.encoded(Image.new("RGB", (2000, 100)), "PNG"), "too thin"),
    (png(60000, 60000), "more than 64000000"),
    (png(20000, 20000), "more than 64000000"),
    (png(9000, 9000), "9000x9000.*more than"),
    (png(5000, 5000), "damaged"),  # promises more than there is
    (jpeg + b"\xff\xda" * 300, "scans"),
  ):
    with pytest.raises(BadImage, match=reason):
      preprocess.decode_photograph(content)


def test_only_what_is_decoded_counts_as_a_scan(picture, make, monkeypatch):
  """A profile may hold any bytes; a flood of comments is not searched to its end."""
  jpeg = make.encoded(picture, icc_profile=b"\xff\xda" * 60_000)
  assert preprocess.decode_photograph(jpeg).shape == picture.shape
  flood = jpeg[:2] + b"\xff\xfe\x00\x02" * 4_000_000 + jpeg[2:]
  begun = time.process_time()
  with pytest.raises(BadImage, match="more than 10000 parts"):
    preprocess.decode_photograph(flood)
  assert time.process_time() - begun < 5
  several = make.encoded(picture, progressive=True)
  scans = several.count(b"\xff\xda")
  monkeypatch.setattr(preprocess, "MAX_SCANS", scans)
  preprocess.decode_photograph(several)
  monkeypatch.setattr(preprocess, "MAX_SCANS", scans - 1)
  with pytest.raises(BadImage, match=f"more than {scans - 1} scans"):
    preprocess.decode_photograph(several)


def test_a_promised_bomb_costs_no_memory(tmp_path):
  for name, content in (("a.png", png(60000, 60000)), ("b.png", png(7000, 7000, 16, 6))):
    (tmp_path / name).write_bytes(content)
    # In a process of its own, with an address space the decoded picture would not fit into.
    code = (
      "import resource, sys\n"
      "from medattn_jax.data import preprocess\n"
      "resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))\n"
      "try: preprocess.load_photograph(sys.argv[1])\n"
      "except preprocess.BadImage as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / name],
                          env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
                          capture_output=True, text=True, check=True, timeout=60)
    assert "more than" in done.stdout or "damaged" in done.stdout
  assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 2 << 20  # kilobytes


def test_what_is_no_plain_file_is_refused_without_waiting(tmp_path):
  (tmp_path / "folder.jpg").mkdir()
  os.mkfifo(tmp_path / "pipe.jpg")
  listener = socket.socket(socket.AF_UNIX)
  here = os.open(".", os.O_RDONLY)
  try:
    os.chdir(tmp_path)  # a socket's path may have 108 characters
    listener.bind("socket.jpg")
  finally:
    os.fchdir(here)
    os.close(here)
    listener.close()
  (tmp_path / "empty.jpg").write_bytes(b"")
  (tmp_path / "device.jpg").symlink_to("/dev/zero")
  with open(tmp_path / "vast.jpg", "wb") as file:
    file.truncate(1 << 40)
  for name, reason in (
    ("folder", "a folder"), ("pipe", "a pipe"), ("socket", "a socket"), ("empty", "empty"),
    ("device", "a device"), ("vast", "more than"), ("absent", "cannot be opened: No such file"),
  ):  # fmt: skip
    with pytest.raises(BadImage, match=reason):
      preprocess.load_photograph(tmp_path / f"{name}.jpg")


def test_links_may_not_leave_the_folder(tmp_path, picture, make):
  folder = tmp_path / "in"
  folder.mkdir()
  (folder / "a.jpg").write_bytes(make.encoded(picture))
  (tmp_path / "secret.jpg").write_bytes(make.encoded(picture))
  (folder / "inside.jpg").symlink_to("a.jpg")
  (folder / "outside.jpg").symlink_to("../secret.jpg")
  (folder / "dangling.jpg").symlink_to("nothing.jpg")
  (folder / "loop.jpg").symlink_to("loop.jpg")
  assert preprocess.resolve(folder / "inside.jpg", folder) == (folder / "a.jpg").resolve()
  for name, reason in (("outside", "outside of in"), ("dangling", "link to nothing"),
                       ("loop", "loop"), ("absent", "missing")):
    with pytest.raises(BadImage, match=reason):
      preprocess.resolve(folder / f"{name}.jpg", folder)


@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (260, 200), (120, 90)])
def test_the_black_border_goes_and_the_disc_fills_the_square(make, shape):
  width, height = shape
  square = preprocess.prepare_photograph(make.eye_picture(width, height), 96)
  assert square.shape == (96, 96, 3) and square.flags.c_contiguous
  lit = square.max(axis=2) > 20
  for axis in (0, 1):
    there = np.flatnonzero(lit.any(axis=axis))
    assert there[0] <= 1 and there[-1] >= 94
  again = preprocess.prepare_photograph(square, 96)
  assert np.abs(again.astype(int) - square).mean() < 1  # what is cropped stays as it is


def test_noise_specks_and_a_dark_exposure_do_not_mislead_the_crop(make):
  picture = np.zeros((220, 320, 3), np.uint8)
  picture[20:200, 70:250] = make.eye_picture(180, 180)
  clean = preprocess.field_of_view(picture)
  noise = np.random.default_rng(0).integers(0, 7, picture.shape, dtype=np.uint8)
  picture = np.maximum(picture, noise)
  picture[5, 300], picture[210, 10] = 255, 255
  assert np.abs(np.subtract(preprocess.field_of_view(picture), clean)).max() <= 2
  dark = (picture * 0.25).astype(np.uint8)
  assert np.abs(np.subtract(preprocess.field_of_view(dark), clean)).max() <= 4


def test_a_cut_disc_is_centred_and_padded(make):
  wide = make.eye_picture(200, 200)[50:150]  # cameras cut the top and bottom
  square = preprocess.prepare_photograph(wide, 80)
  rows = np.flatnonzero((square.max(axis=2) > 20).any(axis=1))
  assert abs((rows[0] + rows[-1]) / 2 - 39.5) <= 1 and 40 < len(rows) < 50
  np.testing.assert_allclose(preprocess.prepare_photograph(square, 80), square, atol=12)


def test_resizing_is_antialiased():
  stripes = np.zeros((1024, 1024, 3), np.uint8)
  stripes[:, ::2] = 200  # beyond what 64 pixels can show: the mean is right, any other is aliasing
  small = preprocess.prepare_photograph(stripes, 64)
  assert np.abs(small[4:-4, 4:-4].astype(int) - 100).max() <= 3


def test_black_is_no_photograph():
  with pytest.raises(BadImage, match="wholly black"):
    preprocess.prepare_photograph(np.full((100, 100, 3), 3, np.uint8), 64)
  spot = np.zeros((200, 200, 3), np.uint8)
  spot[50:60, 50:60] = 255
  with pytest.raises(BadImage, match="black"):
    preprocess.prepare_photograph(spot, 64)


def test_an_aligned_image_is_fitted_and_never_cropped():
  """Gray and colour each way; as it is where it fits; resized as a whole where it does not."""
  rng = np.random.default_rng(0)
  gray = rng.integers(0, 255, (24, 24), np.uint8)
  colour = rng.integers(0, 255, (24, 24, 3), np.uint8)
  fit = preprocess.fit_aligned
  np.testing.assert_array_equal(fit(gray, 24, 1), gray[..., None])
  np.testing.assert_array_equal(fit(gray[..., None], 24, 3), np.stack([gray] * 3, -1))
  np.testing.assert_array_equal(fit(colour, 24, 3), colour)
  weighted = colour @ [0.299, 0.587, 0.114]
  assert np.abs(fit(colour, 24, 1)[..., 0] - weighted).max() <= 0.51
  framed = np.zeros((96, 48), np.uint8)
  framed[40:60, 20:30] = 200
  found = fit(framed, 24, 1)[..., 0]
  assert found.shape == (24, 24) and found.max() > 150
  np.testing.assert_allclose(np.argwhere(found > 100).mean(0), (12, 12), atol=0.6)
  assert not fit(np.zeros((50, 50), np.uint8), 24, 1).any()  # black is no reason
  for shape, why in (((20, 24), "at least 24"), ((200, 30, 3), "too thin")):
    with pytest.raises(BadImage, match=why):
      fit(np.zeros(shape, np.uint8), 24, 1)


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind, width, height, frame", [
  ("JPEG", 200, 120, "cropped"), ("JPEG", 100, 160, "cropped"), ("TIFF", 200, 120, "cropped"),
  ("JPEG", 100, 160, "whole"),
])  # fmt: skip
def test_a_box_stays_on_its_lesion(make, kind, width, height, frame, turn):
  """Cropped, padded, resized or stretched, and turned by EXIF, in each of its eight ways."""
  y0, x0, y1, x1 = box = (height // 2 - 31, width // 2 + 9, height // 2 - 12, width // 2 + 21)
  image = np.pad(make.eye_picture(width, height), ((7, 0), (0, 13), (0, 0)))
  image[height // 2 + 25 :] = 0  # so that what is kept is no square
  image[y0:y1, x0:x1] = (0, 0, 255)
  exif = Image.Exif()
  exif[0x0112] = turn
  content = make.encoded(image, kind, exif=exif, **({"subsampling": 0} if kind == "JPEG" else {}))
  upright = preprocess.decode_photograph(content)
  whole = (0, upright.shape[0], 0, upright.shape[1])
  edges = whole if frame == "whole" else preprocess.field_of_view(upright)
  tall, wide = edges[1] - edges[0], edges[3] - edges[2]
  assert tall != wide and (frame == "whole" or all(np.not_equal(edges, whole).reshape(2, 2).any(1)))
  placement = preprocess.Placement(
    preprocess.orientation(content), *upright.shape[:2], *edges, frame == "cropped")
  assert placement.orientation == turn
  assert preprocess.Placement.parse(str(placement)) == placement
  for size in (64, 333):
    prepared = (preprocess.fit_aligned(upright, size, 3) if frame == "whole" else
                preprocess.prepare_photograph(upright, size)).astype(int)
    blue = prepared[..., 2] > prepared[..., 0] + 60
    rows, columns = (np.flatnonzero(blue.any(axis=axis)) for axis in (1, 0))
    (placed, _), inside = placement.place([box, (0, 0, 3, width)], size)
    assert placed.dtype == np.float32 and list(inside) == [True, frame == "whole"]
    got = [rows[0], columns[0], rows[-1] + 1, columns[-1] + 1]
    np.testing.assert_allclose(placed, got, atol=0.5 + 1.1 * size / min(tall, wide))
  # What reaches into the border ends where that does.
  (everything, *_), _ = placement.place([(0, 0, 10**6, 10**6)], 100)
  assert everything.min() >= 0 and everything.max() == pytest.approx(100)


def test_a_turn_that_is_none_is_none(make, picture):
  assert preprocess.orientation(make.encoded(picture)) == 1
  for number in (0, 9, 77):
    exif = Image.Exif()
    exif[0x0112] = number
    content = make.encoded(picture, exif=exif)
    assert preprocess.orientation(content) == 1
    assert preprocess.decode_photograph(content).shape == picture.shape
  assert preprocess.orientation(b"no picture") == 1


def test_masks_of_every_kind_are_where_they_are_bright(make):
  lit = np.zeros((60, 90), bool)
  lit[10:20, 30:50] = True
  palette = Image.fromarray(lit.astype(np.uint8), "P")
  palette.putpalette([0, 0, 0, 255, 0, 0] + [0] * 762)
  coloured = np.where(lit[..., None], np.uint8([128, 0, 0]), np.uint8(0))
  exif = Image.Exif()
  exif[0x0112] = 6
  for image, kind, options in (
    (palette, "TIFF", {"compression": "tiff_lzw"}), (Image.fromarray(lit), "TIFF", {}),
    (Image.fromarray(lit * np.uint8(1)), "PNG", {}), (Image.fromarray(coloured), "PNG", {}),
    (Image.fromarray(coloured).convert("RGBA"), "PNG", {}),
    (Image.fromarray(lit * np.uint8(255)), "BMP", {}),
    (Image.fromarray(lit * np.uint8(255)), "PNG", {"exif": exif}),
  ):  # fmt: skip
    np.testing.assert_array_equal(preprocess.decode_mask(make.encoded(image, kind, **options)), lit)
  assert not preprocess.decode_mask(make.encoded(np.zeros((40, 40), np.uint8), "PNG")).any()
  with pytest.raises(BadImage, match="no picture"):
    preprocess.decode_mask(b"no mask")


@pytest.mark.parametrize("owner, name", [(Image, "open"), (Image.Image, "convert")])
def test_memory_that_is_short_is_no_damage(picture, make, monkeypatch, owner, name):
  def short(*_, **__):
    raise MemoryError

  content = make.encoded(picture, "BMP")
  monkeypatch.setattr(owner, name, short)
  with pytest.raises(BadImage, match="needs more memory than there is"):
    preprocess.decode_photograph(content)
