"""Decode pictures as a person sees them: upright, on white paper, 8 bits a colour."""

import io

import numpy as np
from PIL import Image, ImageOps

from experiments.datasets.files import cache

_DEEP = ("I;16", "I;16L", "I;16B", "I")  # 16 bits of grey, as Pillow reads them from a PNG
_PLAIN = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK")  # what Pillow converts to RGB as seen


def decode(content: bytes, where: object) -> np.ndarray:
  """Decode a PNG or JPEG.

  Args:
    content: the encoded picture.
    where: path of the file, for errors.

  Returns:
    [h, w, 3] uint8. EXIF rotations are applied, transparent pixels become white, and 16-bit grey is
    scaled to 8 bits.

  Raises:
    cache.DamagedError: the content is not a PNG or JPEG, is damaged, or has a mode that these
      formats lack.
  """
  with cache.damaged(where):
    try:
      image = Image.open(io.BytesIO(content), formats=("PNG", "JPEG"))
    except Image.UnidentifiedImageError as error:
      raise cache.DamagedError(
        f"{where}: damaged or not whole, or neither a PNG nor a JPEG; its first bytes are "
        f"{content[:8]!r}. Download it anew, or save it as a PNG."
      ) from error
    with image:
      return as_seen(image, where)


def as_seen(image: Image.Image, where: object) -> np.ndarray:
  """Return an opened picture as [h, w, 3] uint8; see `decode`."""
  try:
    image = ImageOps.exif_transpose(image)
  except SyntaxError:  # Pillow cannot read the EXIF data: viewers show the picture as it lies
    image.load()
  if image.mode in _DEEP:
    grey = np.asarray(image).astype(np.int64)
    grey = np.where(grey == image.info.get("transparency", -1), 65_535, grey)
    return np.repeat(np.rint(grey / 257.0).astype(np.uint8)[..., None], 3, -1)
  if image.mode not in _PLAIN:
    raise cache.DamagedError(
      f"{where}: pictures of mode {image.mode!r} are not read; wanted one of "
      f"{', '.join((*_PLAIN, *_DEEP))}. Save it as an RGB PNG."
    )
  if image.has_transparency_data:
    paper = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(paper, image.convert("RGBA"))
  return np.asarray(image.convert("RGB"))
