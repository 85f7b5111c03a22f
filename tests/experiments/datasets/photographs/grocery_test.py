"""Tests of the Grocery Store photographs."""

import csv
import io
import os
import pathlib
import tempfile
import zipfile
from unittest import mock

import chex
import jax
import numpy as np
from absl.testing import absltest
from PIL import Image

from experiments.datasets.few_shot import FewShot
from experiments.datasets.files.images import Counts
from experiments.datasets.photographs import grocery
from experiments.datasets.source import Source

DATA = os.environ.get("SHRINKMETA_DATA")
SMALL = {s: Counts(2, 6, 3, 3) for s in ("train", "val", "test")}


def jpeg(grey: int) -> bytes:
  buffer = io.BytesIO()
  Image.fromarray(np.full((8, 8, 3), grey, np.uint8)).save(buffer, "JPEG", quality=95)
  return buffer.getvalue()


def write(folder: pathlib.Path) -> None:
  """Two classes of three pictures in each part; a picture's grey tells class and number."""
  classes, index = [], []
  with zipfile.ZipFile(folder / "images.zip", "w") as archive:
    for label in range(6):
      split = list(SMALL)[label // 2]
      classes.append([label, f"Fruit-{label}", label // 2, "Fruit", 3, split])
      for m in range(3):
        member = f"{label:02}_Fruit-{label}/test_{m}.jpg"
        archive.writestr(member, jpeg(40 * label + 10 * m))
        index.append([member, label, label // 2, "test"])
  names = ["fine_label", "fine_name", "coarse_label", "coarse_name", "images", "few_shot_split"]
  for name, rows in (
    ("classes", [names, *classes]),
    ("index", [["member", "fine_label", "coarse_label", "original_split"], *index]),
  ):
    with (folder / f"{name}.csv").open("w", newline="") as file:
      csv.writer(file).writerows(rows)


class GroceryTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    write(self.folder)

  def load(self):
    with mock.patch.object(grocery, "COUNTS", SMALL):
      return grocery.load(self.folder, size=8, cache_dir="")

  def test_classes_go_to_their_split(self):
    for i, part in enumerate(self.load().values()):
      self.assertEqual(
        part.names, (f"{2 * i:02} Fruit-{2 * i}", f"{2 * i + 1:02} Fruit-{2 * i + 1}")
      )
      np.testing.assert_array_equal(part.counts, [3, 3])
      want = 80 * i + np.array([0, 10, 20, 40, 50, 60])
      np.testing.assert_allclose(part.images.mean((1, 2, 3)), want, atol=2)

  def test_spaces_around_a_label_make_no_other_class(self):
    for name, old, new in (("classes", "4,Fruit-4", " 0,Fruit-0"), ("index", "jpg,4,", "jpg, 0,")):
      path = self.folder / f"{name}.csv"
      path.write_text(path.read_text().replace(old, new))
    with self.assertRaisesRegex(ValueError, "a class in common; got .'00 Fruit-0'"):
      self.load()

  def test_missing_and_other_content(self):
    with self.assertRaisesRegex(ValueError, "test, wants 1189 images of 21 classes|train, wants"):
      grocery.load(self.folder, cache_dir="")
    (self.folder / "index.csv").unlink()
    with self.assertRaisesRegex(FileNotFoundError, "index.csv.*data_dir"):
      self.load()

  def test_damaged_tables_are_named(self):
    for name, change, message in (
      ("classes", lambda s: s[:-12], "wants 6 columns in each row"),
      ("index", lambda s: s[:-9], "wants 4 columns in each row"),
      (
        "index",
        lambda s: s.replace(b"fine_label", b"fine_labem"),
        "wants columns under the header",
      ),
      ("index", lambda s: s.replace(b"_0.jpg,1,", b"_0.jpg,77,"), "or classes.csv: .*'77'"),
      ("index", lambda s: s.replace(b"test_1.jpg", b"test_0.jpg"), "_0.jpg' more than once"),
      ("classes", lambda s: s.replace(b"Fruit-3", b"Fr\xffit-3"), "UnicodeDecodeError"),
    ):
      path = self.folder / f"{name}.csv"
      whole = path.read_bytes()
      path.write_bytes(change(whole))
      self.assertNotEqual(path.read_bytes(), whole)
      with self.assertRaisesRegex(ValueError, f"^{self.folder}/{name}.csv.*{message}"):
        self.load()
      path.write_bytes(whole)


@absltest.skipUnless(DATA, "SHRINKMETA_DATA is not set: no Grocery Store to read.")
class RealTest(absltest.TestCase):
  def test_problem(self):
    with tempfile.TemporaryDirectory() as cache:
      p = grocery.problem(FewShot(5, 1, 4), size=16, cache_dir=cache)
    task = jax.jit(Source.sample, static_argnames="count")(p.test, jax.random.key(0), 0, count=2)
    chex.assert_shape(task.train.inputs, (2, 5, 16, 16, 3))
    chex.assert_shape(task.val.inputs, (2, 20, 16, 16, 3))
    self.assertIn("47 classes to train, 13 validation, 21 test", p.protocol.split)


if __name__ == "__main__":
  absltest.main()
