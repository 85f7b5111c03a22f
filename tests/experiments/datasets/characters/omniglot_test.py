"""Tests of the Omniglot reader, on small archives with the layout of the real ones."""

import io
import os
import pathlib
import shutil
import tempfile
import zipfile
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized
from PIL import Image

from experiments.datasets.characters import omniglot

PUBLISHED = omniglot.COUNTS  # in tests of small archives other ones stand there


def drawing(seed: int, side: int = omniglot.SIDE) -> np.ndarray:
  """[side, side] bool, True = paper, with a black bar somewhere."""
  paper = np.ones((side, side), bool)
  row = 10 + 5 * (seed % 15)
  paper[row : row + 5, 20:80] = False
  return paper


def png(paper: np.ndarray) -> bytes:
  buffer = io.BytesIO()
  Image.fromarray(paper).save(buffer, "PNG")
  return buffer.getvalue()


def write_archive(
  path: str,
  top: str,
  alphabets: dict[str, int],
  drawers: int = 20,
  extra: dict[str, bytes] | None = None,
  side: int = omniglot.SIDE,
) -> None:
  """Characters number `alphabets[name]`; the bar of a drawing tells character and drawer apart."""
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr(f"{top}/", b"")
    number = 0
    for alphabet, size in alphabets.items():
      for c in range(1, size + 1):
        number += 1
        # Written last drawer first, as the order in an archive means nothing.
        for d in range(drawers, 0, -1):
          archive.writestr(
            f"{top}/{alphabet}/character{c:02}/{number:04}_{d:02}.png",
            png(drawing(number + d, side)),
          )
    for name, content in (extra or {}).items():
      archive.writestr(name, content)


class OmniglotTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = self.enterContext(tempfile.TemporaryDirectory())
    self.background, self.evaluation = (
      os.path.join(self.folder, name) for name in omniglot.ARCHIVES
    )
    counts = {"images_background": (2, 5), "images_evaluation": (1, 2)}
    self.enterContext(mock.patch.object(omniglot, "COUNTS", counts))
    write_archive(self.background, "images_background", {"Greek": 3, "Arcadian": 2})
    write_archive(self.evaluation, "images_evaluation", {"Angelic": 2})

  def test_pictures_are_inverted_area_means_in_the_order_of_drawers(self):
    train, test = omniglot.load(self.folder, size=21, cache_dir="")
    self.assertEqual(train.images.shape, (5, 20, 21, 21))
    self.assertEqual(test.images.shape, (2, 20, 21, 21))
    self.assertEqual(train.systems, ("Arcadian", "Greek"))
    np.testing.assert_array_equal(train.system, [0, 0, 1, 1, 1])
    self.assertEqual(train.names[2], "Greek/character01")
    np.testing.assert_array_equal(train.counts, 20)
    ink = 255.0 * ~drawing(1 + 7)  # the first character written, drawer 7
    want = ink.reshape(21, 5, 21, 5).mean(axis=(1, 3))
    np.testing.assert_array_equal(train.images[2, 6], np.rint(want))  # 25 pixels: never halfway

  def test_a_size_that_does_not_divide_keeps_the_ink(self):
    train, _ = omniglot.load(self.folder, size=32, cache_dir="")
    np.testing.assert_allclose(
      train.images[2, 6].mean(), 255.0 * np.mean(~drawing(1 + 7)), rtol=0.005
    )

  def test_foreign_and_escaping_members_are_ignored(self):
    rogue = png(drawing(0))
    write_archive(
      self.evaluation,
      "images_evaluation",
      {"Angelic": 2},
      extra={
        "../../images_evaluation/Angelic/character09/0009_01.png": rogue,
        "images_evaluation/../character09/x.png": rogue,
        "/images_evaluation/Angelic/character09/0009_01.png": rogue,
        "__MACOSX/images_evaluation/Angelic/character01/._0001_01.png": b"resource fork",
        "images_evaluation/Angelic/.DS_Store": b"",
      },
    )
    _, test = omniglot.load(self.folder, cache_dir="")
    self.assertEqual(test.names, ("Angelic/character01", "Angelic/character02"))
    self.assertCountEqual(os.listdir(self.folder), omniglot.ARCHIVES)

  def test_cache_follows_the_content_of_the_archive(self):
    cache = self.enterContext(tempfile.TemporaryDirectory())
    first, _ = omniglot.load(self.folder, 16, cache)
    self.assertLen(os.listdir(cache), 2)
    again, _ = omniglot.load(self.folder, 16, cache)
    np.testing.assert_array_equal(first.images, again.images)
    self.assertLen(os.listdir(cache), 2)
    write_archive(self.background, "images_background", {"Latin": 4, "Runes": 1})
    changed, _ = omniglot.load(self.folder, 16, cache)
    self.assertEqual(changed.systems, ("Latin", "Runes"))
    self.assertLen(os.listdir(cache), 3)

  def test_missing_archive_says_what_to_do(self):
    os.remove(self.evaluation)
    with self.assertRaisesRegex(FileNotFoundError, r"images_evaluation\.zip.*Download.*data_dir"):
      omniglot.load(self.folder, cache_dir="")

  @parameterized.parameters(0, 1000, 20000, -30)
  def test_truncated_archive(self, length):
    path = pathlib.Path(self.background)
    path.write_bytes(path.read_bytes()[:length])
    with self.assertRaisesRegex(ValueError, r"images_background\.zip.*Download it anew"):
      omniglot.load(self.folder, cache_dir="")

  def test_damaged_member(self):
    path = pathlib.Path(self.background)
    content = bytearray(path.read_bytes())
    at = content.index(b"IDAT")
    content[at + 10] ^= 0xFF
    path.write_bytes(bytes(content))
    with self.assertRaisesRegex(ValueError, "Download it anew"):
      omniglot.load(self.folder, cache_dir="")

  def test_any_damage_is_refused_with_the_name_of_the_file(self):
    path = pathlib.Path(self.background)
    whole = path.read_bytes()
    at = whole.index(b"PK\x01\x02", whole.index(b"PK\x01\x02") + 1)  # of a drawing
    # A password, an unknown compression, another checksum, other places.
    for offset, value in ((8, 1), (10, 77), (16, 1), (42, 255), (45, 255)):
      damaged = bytearray(whole)
      damaged[at + offset] ^= value
      path.write_bytes(damaged)
      with self.assertRaisesRegex(ValueError, rf"^{path}.*Download it anew"):
        omniglot.load(self.folder, cache_dir="")

  @parameterized.parameters(
    dict(drawers=19, message="has 19"),
    dict(side=28, message="28, 28"),
    dict(alphabets={}, message="none is there"),
    dict(alphabets={"Latin": 5}, message=r"wants \(2, 5\) alphabets and characters; got \(1, 5\)"),
    dict(
      alphabets={"Latin": 1},
      message="0002_01.png is the second drawing of its character by 01",
      extra={"images_background/Latin/character01/0002_01.png": png(drawing(3))},
    ),
    dict(
      alphabets={"Latin": 1},
      message="not whole",
      extra={"images_background/Latin/character02/0001_01.png": b"no picture"},
    ),
  )
  def test_other_content_is_refused(self, message, alphabets=None, **kwargs):
    alphabets = {"Latin": 2} if alphabets is None else alphabets
    write_archive(self.background, "images_background", alphabets, **kwargs)
    with self.assertRaisesRegex(ValueError, message):
      omniglot.load(self.folder, cache_dir="")

  def test_one_archive_under_the_name_of_the_other_is_refused(self):
    """Else the test would be the alphabets trained on."""
    shutil.copy(self.background, self.evaluation)
    with self.assertRaisesRegex(ValueError, "as images_evaluation/ALPHABET.*none is there"):
      omniglot.load(self.folder, cache_dir="")

  @parameterized.parameters(4, 106)
  def test_sizes_out_of_range(self, size):
    with self.assertRaisesRegex(ValueError, f"got {size}"):
      omniglot.load(self.folder, size)

  def test_the_real_archives(self):
    root = os.environ.get("SHRINKMETA_DATA")
    if not root:
      self.skipTest("SHRINKMETA_DATA is not set: no $SHRINKMETA_DATA/omniglot/*.zip to read.")
    with mock.patch.object(omniglot, "COUNTS", PUBLISHED):
      train, test = omniglot.load(os.path.join(root, "omniglot"), cache_dir="")
    self.assertLen(train.systems, 30)
    self.assertLen(test.systems, 20)
    self.assertEqual(train.images.shape, (964, 20, 32, 32))
    self.assertEqual(test.images.shape, (659, 20, 32, 32))
    self.assertEmpty(set(omniglot.VALIDATION) - set(train.systems))
    self.assertGreaterEqual(
      min(np.sum(train.system == train.systems.index(s)) for s in omniglot.VALIDATION), 20
    )


if __name__ == "__main__":
  absltest.main()
