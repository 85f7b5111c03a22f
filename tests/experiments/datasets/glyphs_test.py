"""Tests of the characters rendered from matplotlib's fonts, and of their container."""

import os
import stat
import tempfile

import numpy as np
from absl.testing import absltest, parameterized

from experiments.datasets import characters, glyphs


def small(num_systems: int = 2, per_system: int = 3) -> characters.Characters:
  """Systems "s0", "s1", ... of characters whose first pixel is their number."""
  k = num_systems * per_system
  images = np.zeros((k, 2, 4, 4), np.uint8)
  images[:, 0, 0, 0] = 1 + np.arange(k)
  return characters.Characters(
    images,
    np.ones(k, np.int32),
    np.repeat(np.arange(num_systems, dtype=np.int32), per_system),
    tuple(f"s{i}" for i in range(num_systems)),
    tuple(f"c{i}" for i in range(k)),
  )


class CharactersTest(parameterized.TestCase):
  def test_select_renumbers_in_the_order_given(self):
    chosen = characters.check(characters.select(small(3), ["s2", "s0"]))
    self.assertEqual(chosen.systems, ("s2", "s0"))
    self.assertEqual(chosen.names, ("c0", "c1", "c2", "c6", "c7", "c8"))
    np.testing.assert_array_equal(chosen.system, [1, 1, 1, 0, 0, 0])
    np.testing.assert_array_equal(chosen.images[:, 0, 0, 0], [1, 2, 3, 7, 8, 9])

  @parameterized.parameters((["s0", "nowhere"],), ([],), (["s0", "s0"],))
  def test_select_refuses(self, systems):
    with self.assertRaisesRegex(ValueError, "'s0', 's1'"):
      characters.select(small(), systems)

  def test_with_at_least_drops_small_systems(self):
    data = small(3, 4)
    data = data._replace(system=np.array([0] * 6 + [1] * 2 + [2] * 4, np.int32))
    self.assertEqual(characters.with_at_least(data, 4).systems, ("s0", "s2"))
    with self.assertRaises(ValueError):
      characters.with_at_least(data, 7)

  @parameterized.parameters(
    ("images", np.zeros((6, 2, 4, 4), np.float32)),
    ("images", np.zeros((6, 2, 4, 4), np.uint8)),  # no ink
    ("images", np.ones((6, 2, 4, 4), np.uint8)),  # ink beyond counts
    ("counts", np.zeros(6, np.int32)),
    ("counts", np.ones(6, np.int64)),
    ("system", np.zeros(6, np.int32)),  # nothing in s1
    ("names", ("a",)),
  )
  def test_check_refuses(self, field, value):
    characters.check(small())
    with self.assertRaisesRegex(ValueError, "Characters want"):
      characters.check(small()._replace(**{field: value}))


class CacheTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = self.enterContext(tempfile.TemporaryDirectory())
    self.path = os.path.join(self.folder, "sub", "x.npz")
    self.builds = 0

  def load(self, cache_dir=None):
    def build():
      self.builds += 1
      return small()

    cache_dir = os.path.dirname(self.path) if cache_dir is None else cache_dir
    return characters.cached(cache_dir, "x.npz", build)

  def test_second_time_is_read_back(self):
    first, second = self.load(), self.load()
    self.assertEqual(self.builds, 1)
    self.assertEqual(second[3:], first[3:])
    for a, b in zip(first[:3], second[:3], strict=True):
      np.testing.assert_array_equal(a, b)
      self.assertEqual(a.dtype, b.dtype)
    self.assertEqual(os.listdir(os.path.dirname(self.path)), ["x.npz"])

  @parameterized.parameters(0, 10, 300, -30)
  def test_a_truncated_file_is_rebuilt(self, length):
    self.load()
    with open(self.path, "rb") as file:
      content = file.read()
    with open(self.path, "wb") as file:
      file.write(content[:length])
    with self.assertLogs("absl", "WARNING"):
      self.load()
    self.assertEqual(self.builds, 2)
    self.load()
    self.assertEqual(self.builds, 2)

  def test_flipped_bytes_are_noticed(self):
    self.load()
    with open(self.path, "r+b") as file:
      file.seek(120)
      file.write(b"\xff" * 20)
    with self.assertLogs("absl", "WARNING"):
      np.testing.assert_array_equal(self.load().images, small().images)

  def test_a_folder_that_cannot_be_made_is_a_warning(self):
    file = self.enterContext(tempfile.NamedTemporaryFile()).name
    with self.assertLogs("absl", "WARNING"):
      np.testing.assert_array_equal(self.load(file).images, small().images)

  def test_empty_name_means_no_cache(self):
    self.load(""), self.load("")
    self.assertEqual(self.builds, 2)
    self.assertFalse(os.path.exists("x.npz"))

  def test_default_folder_follows_xdg(self):
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = self.folder
    try:
      characters.cached(None, "x.npz", small)
    finally:
      os.environ.pop("XDG_CACHE_HOME")
      if before is not None:
        os.environ["XDG_CACHE_HOME"] = before
    mode = os.stat(os.path.join(self.folder, "shrinkmeta", "x.npz")).st_mode
    self.assertTrue(mode & stat.S_IRUSR)


class GlyphsTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.size = 24
    cls.data = glyphs.load("", cls.size)

  def test_splits_are_disjoint_and_cover_all_that_is_drawn(self):
    parts = [name for split in glyphs.SPLITS.values() for name in split]
    self.assertLen(parts, len(set(parts)))
    self.assertCountEqual(parts, self.data.systems)
    self.assertCountEqual(parts, glyphs.RANGES)
    self.assertGreaterEqual(len(glyphs.SPLITS["validation"]), 2)
    self.assertGreaterEqual(len(glyphs.SPLITS["test"]), 5)

  def test_every_system_makes_a_20_way_task(self):
    sizes = np.bincount(self.data.system)
    self.assertGreaterEqual(sizes.min(), 20)
    self.assertGreaterEqual(self.data.counts.min(), 2)
    alphabet = dict(zip(self.data.systems, sizes, strict=True))
    self.assertGreaterEqual(alphabet["Latin capital"], 26)
    self.assertEqual(alphabet["Georgian asomtavruli"], 38)

  def test_renderings_are_centred_whole_and_distinct(self):
    edge = np.ones((self.size, self.size), bool)
    edge[2:-2, 2:-2] = False
    for images, count, _, name in zip(*self.data[:3], self.data.names, strict=True):
      self.assertLen({image.tobytes() for image in images[:count]}, count, name)
      self.assertFalse(images[:, edge].any(), name)
      for image in images[:count]:
        for axis in (0, 1):
          where = np.flatnonzero(image.any(axis))
          self.assertLessEqual(abs(where[0] + where[-1] - self.size + 1), 1, name)

  def test_no_two_characters_of_a_system_look_alike(self):
    for system in range(len(self.data.systems)):
      seen = {}
      for k in np.flatnonzero(self.data.system == system):
        for image in self.data.images[k, : self.data.counts[k]]:
          other = seen.setdefault(image.tobytes(), k)
          self.assertEqual(other, k, (self.data.names[other], self.data.names[k]))

  def test_distances(self):
    a, b = np.array([[3, 4]], np.uint8), np.array([[0, 4]], np.uint8)
    got = glyphs.distances([{"f": a, "g": a}, {"f": a, "g": b}, {"h": a}])
    np.testing.assert_allclose(got[0, 1], (0.0 + 3.0 / 4.0) / 2.0)
    np.testing.assert_allclose(got, got.T)
    self.assertEqual(got[0, 2], np.inf)
    np.testing.assert_array_equal(np.diag(got), 0.0)

  def test_composed_letters_are_left_out(self):
    points = glyphs.code_points("Latin extended capital")
    self.assertNotIn(0x100, points)  # A with macron
    self.assertIn(0x141, points)  # L with stroke, which is no composition
    self.assertIn(0x1D538, glyphs.code_points("Double-struck"))

  def test_a_tiny_size_is_refused(self):
    with self.assertRaisesRegex(ValueError, "got 4"):
      glyphs.load("", 4)


if __name__ == "__main__":
  absltest.main()
