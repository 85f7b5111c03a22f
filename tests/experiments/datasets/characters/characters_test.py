"""Tests of `Characters`, and of its cache."""

import os
import stat
import tempfile

import numpy as np
from absl.testing import absltest, parameterized

from experiments.datasets.characters import characters


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

  def test_merge_numbers_systems_one_after_the_other(self):
    first, other = small(2), small(3)
    other = other._replace(systems=("a", "b", "c"))
    both = characters.merge(first, other)
    self.assertEqual(both.systems, ("s0", "s1", "a", "b", "c"))
    np.testing.assert_array_equal(both.system, np.repeat(range(5), 3))
    np.testing.assert_array_equal(both.images[:, 0, 0, 0], [*range(1, 7), *range(1, 10)])
    with self.assertRaisesRegex(ValueError, "distinct names"):
      characters.merge(first, small(3))

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


if __name__ == "__main__":
  absltest.main()
