"""Augmented few-shot character recognition that needs no download: tasks are writing systems.

Classes are characters. Examples are their renderings in the fonts of every matplotlib installation
(DejaVu and STIX General). The renderings are made once and cached. A character is kept if at least
two fonts draw it differently and none draws it as another character of its system. Other fonts of
matplotlib are left out: Computer Modern has encodings of its own, and the others draw symbols only.
Four sets of signs (arrows, operators, symbols, dingbats) are not writing systems, but add classes
to training.
"""

import os
import unicodedata
from collections.abc import Mapping, Sequence
from typing import cast

import matplotlib
import numpy as np
import PIL
from matplotlib import ft2font
from PIL import Image, ImageFont

from experiments.datasets.characters import characters as characters_lib

Characters = characters_lib.Characters

FONTS: tuple[str, ...] = (
  "DejaVuSans",
  "DejaVuSans-Bold",
  "DejaVuSans-Oblique",
  "DejaVuSans-BoldOblique",
  "DejaVuSerif",
  "DejaVuSerif-Bold",
  "DejaVuSerif-Italic",
  "DejaVuSerif-BoldItalic",
  "DejaVuSansMono",
  "DejaVuSansMono-Bold",
  "DejaVuSansMono-Oblique",
  "DejaVuSansMono-BoldOblique",
  "STIXGeneral",
  "STIXGeneralBol",
  "STIXGeneralItalic",
  "STIXGeneralBolIta",
)

# Name: (Unicode categories, (first, last) code points). Capitals and small letters are systems of
# their own, since c and C are the same shape once each fills its picture.
RANGES: Mapping[str, tuple[str, tuple[tuple[int, int], ...]]] = {
  "Latin capital": ("Lu", ((0x41, 0x5A), (0xC6, 0xDE))),
  "Latin small": ("Ll", ((0x61, 0x7A), (0xDF, 0xFE))),
  "Latin extended capital": ("Lu", ((0x100, 0x24F),)),
  "Latin extended small": ("Ll", ((0x100, 0x24F),)),
  "Phonetic": ("Ll", ((0x250, 0x2AF),)),
  "Greek capital": ("Lu", ((0x370, 0x3FF),)),
  "Greek small": ("Ll", ((0x370, 0x3FF),)),
  "Cyrillic capital": ("Lu", ((0x400, 0x481),)),
  "Cyrillic small": ("Ll", ((0x400, 0x481),)),
  "Cyrillic extended capital": ("Lu", ((0x48A, 0x52F), (0xA640, 0xA697))),
  "Cyrillic extended small": ("Ll", ((0x48A, 0x52F), (0xA640, 0xA697))),
  "Armenian capital": ("Lu", ((0x531, 0x556),)),
  "Armenian small": ("Ll", ((0x561, 0x586),)),
  "Hebrew": ("Lo", ((0x5D0, 0x5EA),)),
  "Arabic": ("Lo", ((0x621, 0x64A),)),
  "N'Ko": ("Lo", ((0x7CA, 0x7EA),)),
  "Lao": ("Lo", ((0xE81, 0xEC4),)),
  "Georgian asomtavruli": ("Lu", ((0x10A0, 0x10C5),)),
  "Georgian mkhedruli": ("Lo Ll", ((0x10D0, 0x10FA),)),
  "Georgian nuskhuri": ("Ll", ((0x2D00, 0x2D25),)),
  "Canadian syllabics": ("Lo", ((0x1401, 0x1676),)),
  "Ogham": ("Lo", ((0x1681, 0x169A),)),
  "Tifinagh": ("Lo", ((0x2D30, 0x2D67),)),
  "Lisu": ("Lo", ((0xA4D0, 0xA4F7),)),
  "Old Italic": ("Lo", ((0x10300, 0x1031F),)),
  "Script": ("Lu Ll", ((0x1D49C, 0x1D4CF),)),
  "Script bold": ("Lu Ll", ((0x1D4D0, 0x1D503),)),
  "Fraktur bold": ("Lu Ll", ((0x1D56C, 0x1D59F),)),
  "Double-struck": ("Lu Ll", ((0x1D538, 0x1D56B),)),
  "Arrows": ("So Sm", ((0x2190, 0x21FF),)),
  "Operators": ("Sm", ((0x2200, 0x22FF),)),
  "Symbols": ("So", ((0x2600, 0x26FF),)),
  "Dingbats": ("So", ((0x2701, 0x27BE),)),
}

# Scripts that borrow shapes from each other (Latin, Greek, Cyrillic, Lisu, mathematics) all train.
# Simple shapes recur all the same: of 288 renderings to test on 20 are within 0.3 of one to train
# on, 13 of Tifinagh (YADD is a Latin E), 5 of Hebrew; 9 of them are the same to the pixel.
SPLITS: Mapping[str, tuple[str, ...]] = {
  "train": (
    "Latin capital",
    "Latin small",
    "Latin extended capital",
    "Latin extended small",
    "Phonetic",
    "Greek capital",
    "Greek small",
    "Cyrillic capital",
    "Cyrillic small",
    "Cyrillic extended capital",
    "Cyrillic extended small",
    "Canadian syllabics",
    "Lisu",
    "Script",
    "Script bold",
    "Fraktur bold",
    "Double-struck",
    "Arrows",
    "Operators",
    "Symbols",
    "Dingbats",
  ),
  "validation": ("Armenian capital", "Armenian small", "N'Ko", "Old Italic"),
  "test": (
    "Arabic",
    "Georgian asomtavruli",
    "Georgian mkhedruli",
    "Georgian nuskhuri",
    "Hebrew",
    "Lao",
    "Ogham",
    "Tifinagh",
  ),
}

MIN_CHARACTERS = 20  # of a writing system
MIN_RENDERINGS = 2  # of a character, all different
MIN_DISTANCE = 0.3  # of two characters of a system, see `distances`

_VERSION = 2  # of the renderings; another number makes caches of the old ones void
_EM = 96  # pixels per em of the outlines before they are brought to size


def load(cache_dir: str | os.PathLike[str] | None = None, size: int = 32) -> Characters:
  """Return the writing systems of all splits; select one by `characters.select` and SPLITS.

  Args:
    cache_dir: the folder of the cache, see `cache.cached`; "" switches the cache off.
    size: height and width of the renderings in pixels.

  Returns:
    Characters with images [K, R, size, size], where R <= len(FONTS).
  """
  if size < 8:
    raise ValueError(f"Renderings want a size of at least 8 pixels; got {size}. Use 32.")
  versions = f"matplotlib{matplotlib.__version__}_pillow{PIL.__version__}"  # fonts, and who draws
  filename = f"glyphs_v{_VERSION}_{size}_{versions}.npz"
  return characters_lib.cached(cache_dir, filename, lambda: _build(size))


def code_points(system: str) -> list[int]:
  """Return the code points of one of RANGES, without composed letters such as A with a macron."""
  categories, ranges = RANGES[system]
  points = [u for first, last in ranges for u in range(first, last + 1)]
  # An alphabet of mathematics is "<font>" of plain letters: another shape, hence a character.
  return [
    u
    for u in points
    if unicodedata.category(chr(u)) in categories.split()
    and unicodedata.decomposition(chr(u)).split(" ")[0] in ("", "<font>")
  ]


def render(font: ImageFont.FreeTypeFont, text: str, size: int) -> np.ndarray:
  """Return one glyph as [size, size] uint8, centred by its bounding box; zeros if it has no ink.

  The longer side fills 3/4 of the picture if the glyph is at least as large as the font's H. That
  of a smaller glyph is shorter, by the square root of the ratio of the two sizes. So small letters
  differ from large ones.
  """
  canvas = np.zeros((size, size), np.uint8)
  mask = font.getmask(text, mode="L")
  box = mask.getbbox()
  if box is None:
    return canvas
  ink = Image.frombytes("L", mask.size, bytes(cast(Sequence[int], mask))).crop(box)
  capital = font.getmask("H", mode="L").size[1]
  longer = 0.75 * size * min(1.0, max(ink.size) / capital) ** 0.5
  width, height = (max(1, round(side * longer / max(ink.size))) for side in ink.size)
  top, left = (size - height) // 2, (size - width) // 2
  # Unlike PIL's box filter, this one gives all strokes the same width at any ratio of sizes.
  small = ink.resize((width, height), Image.Resampling.HAMMING)
  canvas[top : top + height, left : left + width] = np.asarray(small)
  return canvas


def distances(drawn: Sequence[Mapping[str, np.ndarray]]) -> np.ndarray:
  """Return ||a - b|| / min(||a||, ||b||) [n, n] of n characters, each {font: rendering [H, W]}.

  An entry is the mean over the fonts that draw both characters. It is inf if no font does.
  """
  total, shared = np.zeros((2, len(drawn), len(drawn)))
  for font in sorted({font for renderings in drawn for font in renderings}):
    who = [i for i, renderings in enumerate(drawn) if font in renderings]
    x = np.stack([drawn[i][font].ravel().astype(np.float32) for i in who])
    norms = np.sum(x**2, axis=1)
    squares = np.maximum(norms[:, None] + norms - 2.0 * x @ x.T, 0.0)
    total[np.ix_(who, who)] += np.sqrt(squares / np.minimum(norms[:, None], norms))
    shared[np.ix_(who, who)] += 1
  return np.where(shared > 0, total / np.maximum(shared, 1), np.inf)


def _build(size: int) -> Characters:
  fonts = {name: _open_font(name) for name in FONTS}
  renderings, counts, system, names = [], [], [], []
  systems = [name for name in RANGES if any(name in split for split in SPLITS.values())]
  for index, name in enumerate(systems):
    drawn = _draw_system(name, fonts, size)
    if len(drawn) < MIN_CHARACTERS:
      raise ValueError(
        f"Writing system {name!r} wants {MIN_CHARACTERS} characters; the fonts of matplotlib "
        f"{matplotlib.__version__} draw {len(drawn)}. Install another matplotlib."
      )
    for point, images in drawn.items():
      renderings.append(np.pad(images, ((0, len(FONTS) - len(images)), (0, 0), (0, 0))))
      counts.append(len(images))
      system.append(index)
      names.append(f"U+{point:04X} {unicodedata.name(chr(point))}")
  return Characters(
    np.stack(renderings),
    np.array(counts, np.int32),
    np.array(system, np.int32),
    tuple(systems),
    tuple(names),
  )


def _open_font(name: str) -> tuple[frozenset[int], ImageFont.FreeTypeFont]:
  """Return the font and the code points that it draws; PIL does not report them."""
  path = os.path.join(matplotlib.get_data_path(), "fonts", "ttf", name + ".ttf")
  font = ImageFont.truetype(path, _EM, layout_engine=ImageFont.Layout.BASIC)
  return frozenset(ft2font.FT2Font(path).get_charmap()), font


def _draw_system(
  name: str, fonts: Mapping[str, tuple[frozenset[int], ImageFont.FreeTypeFont]], size: int
) -> dict[int, np.ndarray]:
  """Return distinct renderings [r, size, size] by code point; later look-alikes are left out."""
  candidates: dict[int, dict[str, np.ndarray]] = {}
  for point in code_points(name):
    drawn = {
      font_name: render(font, chr(point), size)
      for font_name, (covered, font) in fonts.items()
      if point in covered
    }
    # An oblique font may carry an upright copy, which would count as another rendering.
    distinct = {image.tobytes(): font_name for font_name, image in drawn.items() if image.any()}
    if len(distinct) >= MIN_RENDERINGS:
      candidates[point] = {font_name: drawn[font_name] for font_name in distinct.values()}
  points, drawn = list(candidates), list(candidates.values())
  between = distances(drawn)
  kept: list[int] = []
  seen: set[bytes] = set()
  for i, renderings in enumerate(drawn):
    pixels = {image.tobytes() for image in renderings.values()}
    if np.all(between[i, kept] >= MIN_DISTANCE) and not pixels & seen:
      kept.append(i)
      seen |= pixels
  return {points[i]: np.stack(list(drawn[i].values())) for i in kept}
