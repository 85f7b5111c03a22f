"""Pictures of every mode decode as a person sees them."""

import io

import numpy as np
import pytest
from PIL import Image

from experiments.datasets.files import cache, pictures

SEEN = np.full((32, 24), 255, np.uint8)  # dark above, white in the middle, grey below
SEEN[:8], SEEN[20:] = 0, 128
GREY = Image.fromarray(SEEN)
DEEP = Image.fromarray(SEEN.astype(np.uint16) * 257)
INK = Image.fromarray(255 - SEEN)  # the alpha channel of black ink
BLACK = Image.new("L", GREY.size, 0)


def turned(orientation):
  exif = Image.Exif()
  exif[0x0112] = orientation
  return exif


def saved(image, kind="PNG", **options):
  buffer = io.BytesIO()
  image.save(buffer, kind, **options)
  return buffer.getvalue()


# As a phone that is held upright stores it: lying on its side, with EXIF data that say so.
ON_ITS_SIDE = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}

CONTENT = {
  "grey": saved(GREY),
  "colours": saved(GREY.convert("RGB")),
  "16-bit grey": saved(DEEP),
  "ink in the alpha channel of grey": saved(Image.merge("LA", (BLACK, INK))),
  "ink in the alpha channel of colours": saved(Image.merge("RGBA", (*[BLACK] * 3, INK))),
  "white is a transparent grey": saved(Image.fromarray(np.where(SEEN == 255, 7, SEEN)),
                                       transparency=7),
  "white is a transparent 16-bit grey": saved(
    Image.fromarray(np.where(SEEN == 255, 7, SEEN.astype(np.uint16) * 257)), transparency=7),
  "palette": saved(GREY.convert("P")),
  "CMYK": saved(GREY.convert("RGB").convert("CMYK"), "JPEG", quality=100),
  **{f"JPEG, turned {n}": saved(GREY.transpose(t), "JPEG", quality=100, exif=turned(n))
     for n, t in ON_ITS_SIDE.items()},
  **{f"PNG, turned {n}": saved(GREY.transpose(t), exif=turned(n)) for n, t in ON_ITS_SIDE.items()},
  "16-bit grey, turned 6": saved(
    Image.fromarray(np.rot90(SEEN).astype(np.uint16) * 257), exif=turned(6)),
  "EXIF data that cannot be read": saved(GREY, exif=b"garbage-here"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTENT)
def test_a_picture_is_what_is_seen(name):
  got = pictures.decode(CONTENT[name], "x.png")
  assert got.dtype == np.uint8 and got.flags.c_contiguous
  np.testing.assert_allclose(
    got, np.stack([SEEN] * 3, -1), atol=2 if b"JFIF" in CONTENT[name] else 0
  )


def test_black_and_white():
  got = pictures.decode(saved(Image.fromarray(SEEN > 0)), "x.png")
  np.testing.assert_array_equal(got, np.stack([255 * (SEEN > 0)] * 3, -1))


def test_half_transparent_ink_is_grey():
  image = Image.merge("RGBA", (BLACK, BLACK, BLACK, Image.new("L", GREY.size, 51)))
  np.testing.assert_array_equal(pictures.decode(saved(image), "x.png"), 204)


@pytest.mark.parametrize(
  "content, message",
  (
    (b"GIF89a, which is not read", "neither a PNG nor a JPEG; its first bytes are b'GIF89a, '"),
    (saved(GREY)[:60], "damaged or not whole"),
    (b"", "its first bytes are b''"),
  ),
)  # fmt: skip
def test_what_cannot_be_read_is_named(content, message):
  with pytest.raises(cache.DamagedError, match=f"^a.zip, x.png: .*{message}"):
    pictures.decode(content, "a.zip, x.png")


def test_an_unknown_mode_is_named():
  with pytest.raises(ValueError, match="^x.tif: pictures of mode 'F' are not read; wanted one of"):
    pictures.as_seen(Image.new("F", (4, 4)), "x.tif")
