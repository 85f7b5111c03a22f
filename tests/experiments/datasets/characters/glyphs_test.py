"""Tests of the characters rendered from matplotlib's fonts."""

import numpy as np
from absl.testing import absltest, parameterized

from experiments.datasets.characters import glyphs


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
