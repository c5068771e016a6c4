"""analysis.contact_sheets: every picture is there, in its place, with its words."""

import io

import numpy as np
import pytest
from PIL import Image

from medattn_jax.analysis import contact_sheets, figures


@pytest.mark.parametrize("count", [1, 8, 11])
def test_pictures_stand_in_rows(count):
  rng = np.random.default_rng(0)
  colours = rng.integers(0, 255, (count, 3))
  pictures = np.tile(colours[:, None, None], (1, 9, 9, 1)).astype(np.uint8)
  names = [f"{at:03}_left" for at in range(count)]
  page = contact_sheets.sheet(
    pictures, names, ["a" * 40] * count, title="group 3 of 9", about="$\\frac{$ 視網膜",
    framed=None)
  image = np.asarray(Image.open(io.BytesIO(figures.png(page, dpi=100))).convert("RGB"))
  for at, colour in enumerate(colours):
    row, column = divmod(at, 8)
    middle = (62 + row * (contact_sheets.TILE + contact_sheets.GAP + 26) + 60,
              contact_sheets.GAP + column * (contact_sheets.TILE + contact_sheets.GAP) + 60)
    assert np.abs(image[middle].astype(int) - colour).max() <= 2
  words = [text.get_text() for text in page.axes[0].texts]
  assert words[:2] == ["group 3 of 9", "$\\frac{$ 視網膜"]
  assert words[2::2] == [name.replace("_", " ") for name in names]
  assert all(len(word) < 30 for word in words[3::2])
