"""Tests of photographs, on small files with the published layouts."""

import csv
import io
import os
import pathlib
import pickle
import shutil
import tempfile
import tracemalloc
import zipfile
from unittest import mock

import chex
import jax
import numpy as np
from absl.testing import absltest, parameterized
from PIL import Image

from experiments.datasets import few_shot
from experiments.datasets.files import images, layouts
from experiments.datasets.files.images import Counts
from experiments.datasets.photographs import (
  cifar_fs,
  mini_imagenet,
  photographs,
  tiered_imagenet,
)

CLASSES = {"train": 4, "val": 2, "test": 3}
EACH = 5  # pictures of a class
SIDE = 12


def small(data_set: photographs.DataSet) -> photographs.DataSet:
  """The set as if this little of it had been published."""
  return data_set._replace(
    size=SIDE, counts={s: Counts(k, k * EACH, EACH, EACH) for s, k in CLASSES.items()}
  )


def content(split: str) -> tuple[np.ndarray, list[str]]:
  """(pictures [M, SIDE, SIDE, 3], labels [M]), classes mixed; smooth, so that a JPEG is near."""
  random = np.random.default_rng(list(CLASSES).index(split))
  m = CLASSES[split] * EACH
  corners = random.integers(0, 256, (m, 2, 2, 3)).astype(np.uint8)
  resize = lambda c: np.asarray(Image.fromarray(c).resize((SIDE, SIDE), Image.Resampling.BILINEAR))
  labels = random.permutation(np.repeat(np.arange(CLASSES[split]), EACH))
  return np.stack([resize(c) for c in corners]), [f"{split}_{label}" for label in labels]


def encoded(picture: np.ndarray, kind: str) -> bytes:
  buffer = io.BytesIO()
  Image.fromarray(picture).save(buffer, kind, **({"quality": 95} if kind == "JPEG" else {}))
  return buffer.getvalue()


def numbered(labels) -> list[int]:
  """Labels as numbers, distinct between splits as in the files."""
  parts = [label.split("_") for label in labels]
  return [100 * list(CLASSES).index(split) + int(k) for split, k in parts]


def write_class_dict(folder, split):
  pictures, labels = content(split)
  rows = {name: np.flatnonzero(np.array(labels) == name).tolist() for name in sorted(set(labels))}
  data = {"image_data": pictures, "class_dict": rows}
  (folder / f"mini-imagenet-cache-{split}.pkl").write_bytes(pickle.dumps(data, 2))


def write_category_split(folder, split):
  pictures, labels = content(split)
  name = {"train": "train_phase_train"}.get(split, split)
  data = {b"data": pictures, b"labels": numbered(labels)}
  (folder / f"miniImageNet_category_split_{name}.pickle").write_bytes(pickle.dumps(data))


def write_cifar(folder, split):
  pictures, labels = content(split)
  data = {"data": pictures, "labels": numbered(labels)}
  (folder / f"CIFAR_FS_{split}.pickle").write_bytes(pickle.dumps(data))


def write_pngs(folder, split):
  pictures, labels = content(split)
  # OpenCV returns a column of bytes.
  pngs = [np.frombuffer(encoded(p, "PNG"), np.uint8)[:, None] for p in pictures]
  (folder / f"{split}_images_png.pkl").write_bytes(pickle.dumps(pngs))
  data = {  # numbered from 0 in every split, as in the files
    "label_specific": np.array([int(label.split("_")[1]) for label in labels]),
    "label_general": np.zeros(len(labels), int),
  }
  (folder / f"{split}_labels.pkl").write_bytes(pickle.dumps(data))


def write_npz(folder, split):
  pictures, labels = content(split)
  np.savez(folder / f"{split}_images.npz", images=pictures)
  (folder / f"{split}_labels.pkl").write_bytes(pickle.dumps({"labels": numbered(labels)}))


def write_csv(folder, split, kind="PNG"):
  pictures, labels = content(split)
  names = [f"{split}{m:04}.{kind.lower()}" for m in range(len(labels))]
  with (folder / f"{split}.csv").open("w", newline="") as file:
    csv.writer(file).writerows([("filename", "label"), *zip(names, labels, strict=True)])
  (folder / "images").mkdir(exist_ok=True)
  for name, picture in zip(names, pictures, strict=True):
    (folder / "images" / name).write_bytes(encoded(picture, kind))


def write_zip(folder, split):
  write_csv(folder, split)
  with zipfile.ZipFile(folder / "images.zip", "a") as archive:
    for file in sorted((folder / "images").iterdir()):
      archive.write(file, f"images/{file.name}" if split == "val" else file.name)
  shutil.rmtree(folder / "images")


LAYOUTS = {
  "class_dict": (mini_imagenet, write_class_dict),
  "category_split": (mini_imagenet, write_category_split),
  "csv": (mini_imagenet, write_csv),
  "zip": (mini_imagenet, write_zip),
  "pngs": (tiered_imagenet, write_pngs),
  "npz": (tiered_imagenet, write_npz),
  "cifar": (cifar_fs, write_cifar),
}


class PhotographsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.cache = self.enterContext(tempfile.TemporaryDirectory())

  def write(self, layout: str):
    """Files of all splits; returns the set."""
    module, write = LAYOUTS[layout]
    for split in CLASSES:
      write(self.folder, split)
    return small(module.DATA_SET)

  def load(self, data_set, **kwargs):
    return photographs.load(data_set, self.folder, cache_dir=self.cache, **kwargs)

  @parameterized.parameters(*LAYOUTS)
  def test_layouts_are_read_class_by_class_and_cached(self, layout):
    data_set = self.write(layout)
    first = self.load(data_set)
    with mock.patch.object(images, "build", side_effect=AssertionError("read again")):
      again = self.load(data_set)
    for split, parts in first.items():
      pictures, labels = content(split)
      order = np.argsort(labels, kind="stable")
      for found in (parts, again[split]):
        np.testing.assert_array_equal(found.images, pictures[order])
        np.testing.assert_array_equal(found.counts, [EACH] * CLASSES[split])
        self.assertLen(set(found.names), CLASSES[split])
      self.assertIsInstance(again[split].images, np.memmap)
    self.assertLen(os.listdir(self.cache), 6)

  def test_a_jpeg_is_near(self):
    for split in CLASSES:
      write_csv(self.folder, split, "JPEG")
    got = self.load(small(mini_imagenet.DATA_SET))["test"]
    pictures, labels = content("test")
    off = got.images.astype(float) - pictures[np.argsort(labels, kind="stable")]
    self.assertLess(np.abs(off).mean(), 6.0)

  def test_another_size(self):
    got = self.load(self.write("csv"), size=6)["train"].images
    self.assertEqual(got.shape, (20, 6, 6, 3))
    pictures, labels = content("train")
    want = pictures[np.argsort(labels, kind="stable")].reshape(20, 6, 2, 6, 2, 3).mean((2, 4))
    self.assertLess(np.abs(got - want).mean(), 4.0)

  def test_the_cache_follows_the_files(self):
    data_set = self.write("cifar")
    self.load(data_set)
    pictures, labels = content("val")
    data = {"data": 255 - pictures, "labels": numbered(labels)}
    path = self.folder / "CIFAR_FS_val.pickle"
    path.write_bytes(pickle.dumps(data))
    os.utime(path, ns=(1, 1))  # as if written at another time
    got = self.load(data_set)["val"].images
    np.testing.assert_array_equal(got, 255 - pictures[np.argsort(labels, kind="stable")])

  @parameterized.parameters(".npy", ".npz")
  def test_a_truncated_cache_is_rebuilt(self, suffix):
    data_set = self.write("cifar")
    self.load(data_set)
    path = next(p for p in pathlib.Path(self.cache).iterdir() if p.suffix == suffix)
    path.write_bytes(path.read_bytes()[:-40])
    with self.assertLogs("absl", "WARNING"):
      got = self.load(data_set)["train"].images
    pictures, labels = content("train")
    np.testing.assert_array_equal(got, pictures[np.argsort(labels, kind="stable")])

  def test_a_damaged_cache_is_rebuilt(self):
    data_set = self.write("cifar")
    self.load(data_set)
    path = next(pathlib.Path(self.cache).glob("*train*.npy"))
    whole = path.read_bytes()
    path.write_bytes(whole[:500] + bytes(1000) + whole[1500:])
    with self.assertLogs("absl", "WARNING") as logs:
      got = self.load(data_set)["train"].images
    self.assertIn("checksum", logs.output[0])
    pictures, labels = content("train")
    np.testing.assert_array_equal(got, pictures[np.argsort(labels, kind="stable")])
    self.assertEqual(path.read_bytes(), whole)

  def test_missing_files_are_named(self):
    self.write("pngs")
    (self.folder / "val_labels.pkl").unlink()
    with self.assertRaisesRegex(FileNotFoundError, "val_images_png.pkl.*or train_images.npz.*csv"):
      self.load(small(tiered_imagenet.DATA_SET))
    with mock.patch.dict(os.environ), self.assertRaisesRegex(FileNotFoundError, "SHRINKMETA_DATA"):
      os.environ.pop("SHRINKMETA_DATA", None)
      photographs.load(mini_imagenet.DATA_SET)

  def test_other_counts_than_published_are_refused(self):
    data_set = self.write("cifar")
    for want, message in (
      (Counts(5, 20, 5, 5), "20 images of 5 classes, 5 of each; got 20 images of 4 classes, 5"),
      (Counts(4, 21, 5, 5), "21 images of 4"),
      (Counts(4, 20, 6, 6), "6 of each; got"),
      (Counts(4, 20, 1, 4), "1-4 of each; got"),
    ):
      with self.assertRaisesRegex(ValueError, f"CIFAR_FS_train.pickle, wants .*{message}"):
        self.load(data_set._replace(counts=data_set.counts | {"train": want}))
    with self.assertRaisesRegex(ValueError, "CIFAR-FS.*wants 38400 images of 64 classes, 600"):
      self.load(cifar_fs.DATA_SET)
    self.assertEmpty(os.listdir(self.cache))

  def test_splits_share_no_class(self):
    data_set = self.write("cifar")
    shutil.copy(self.folder / "CIFAR_FS_train.pickle", self.folder / "CIFAR_FS_test.pickle")
    counts = data_set.counts | {"test": data_set.counts["train"]}
    with self.assertRaisesRegex(ValueError, "a class in common.*'0000'"):
      self.load(data_set._replace(counts=counts))

  def test_hostile_pickles_are_refused(self):
    data_set = self.write("class_dict")
    marker = self.folder / "marker"

    class Hostile:
      def __reduce__(self):
        return os.system, (f"touch {marker}",)

    path = self.folder / "mini-imagenet-cache-train.pkl"
    path.write_bytes(pickle.dumps({"image_data": Hostile(), "class_dict": {}}))
    with self.assertRaisesRegex(ValueError, f"{path} asks for the global .*system"):
      self.load(data_set)
    self.assertFalse(marker.exists())

  @parameterized.parameters(
    ([1, 2], "wants a dict"),
    ({"data": 1}, "'labels'. not in .'data'"),
    ({"data": np.zeros((2, 3), np.uint8), "labels": [0, 1]}, r"images .M, h, w, 3. uint8"),
    (
      {"data": np.zeros((2, 3, 3, 3)), "labels": [0, 1]},
      r"uint8, or M encoded pictures; got .*float64",
    ),
    ({"data": np.zeros((2, 3, 3, 3), np.uint8), "labels": [0]}, r"labels .2., one an image"),
  )
  def test_other_content_is_refused(self, data, message):
    data_set = self.write("cifar")
    path = self.folder / "CIFAR_FS_train.pickle"
    path.write_bytes(pickle.dumps(data))
    with self.assertRaisesRegex(ValueError, f"{path}.*{message}"):
      self.load(data_set)

  def test_one_long_text_does_not_lengthen_all(self):
    data_set = self.write("cifar")
    path = self.folder / "CIFAR_FS_train.pickle"
    texts = ["a" * 1_000_000, *("b" for _ in range(19))]
    path.write_bytes(pickle.dumps({"data": content("train")[0], "labels": texts}))
    tracemalloc.start()
    self.addCleanup(tracemalloc.stop)
    self.assertEqual(list(layouts.data_labels(path).labels), texts)
    self.assertLess(tracemalloc.get_traced_memory()[1], 10_000_000)
    path.write_bytes(pickle.dumps({"data": texts, "labels": list(range(20))}))
    with self.assertRaisesRegex(ValueError, f"{path}.*damaged"):
      self.load(data_set)
    self.assertLess(tracemalloc.get_traced_memory()[1], 20_000_000)

  @parameterized.parameters(
    ({"a": [0, 1, 2]}, "2 images are in no class"),
    ({"a": [0, 1, 2, 3, 5]}, "rows of 0 to 4"),
    ({"a": [-1, 1, 2, 3, 4]}, "rows of 0 to 4"),
    ({"a": ["0"]}, "rows of 0 to 4"),
    ({"a": [0, 1, 2], "b": [2, 3, 4]}, "picture 2 is in the classes 'a' and 'b'"),
  )
  def test_a_class_dict_must_cover_its_images(self, rows, message):
    path = self.folder / "x.pkl"
    data = {"image_data": np.zeros((5, 3, 3, 3), np.uint8), "class_dict": rows}
    path.write_bytes(pickle.dumps(data))
    with self.assertRaisesRegex(ValueError, message):
      layouts.class_dict(path)

  @parameterized.parameters(
    "../secret.png", "/etc/hostname", "a/../../secret.png", "..\\secret.png", "", "link.png"
  )
  def test_names_stay_below_the_pictures(self, name):
    data_set = self.write("csv")
    (self.folder / "secret.png").write_bytes(encoded(content("val")[0][0], "PNG"))
    (self.folder / "images" / "link.png").symlink_to(self.folder / "secret.png")
    path = self.folder / "val.csv"
    path.write_text(path.read_text().replace("val0003.png", name))
    with self.assertRaisesRegex(ValueError, f"no file in {self.folder}/images"):
      self.load(data_set)

  @parameterized.parameters("csv", "zip", "pngs", "npz")
  def test_damaged_pictures(self, layout):
    data_set = self.write(layout)
    damaged = {
      "csv": "images/train0002.png", "zip": "images.zip", "pngs": "train_images_png.pkl",
      "npz": "train_images.npz",
    }[layout]  # fmt: skip
    path = self.folder / damaged
    content = bytearray(path.read_bytes())
    at = content.index(b"IDAT") + 8 if b"IDAT" in content else len(content) // 3
    content[at : at + 20] = bytes(20)
    path.write_bytes(bytes(content))
    with self.assertRaisesRegex(ValueError, "damaged or not whole|no whole pickle"):
      self.load(data_set)

  @parameterized.product(layout=["csv", "zip", "pngs", "npz"], compressed=[False, True])
  def test_any_damage_is_refused_with_the_name_of_the_file(self, layout, compressed):
    module, _ = LAYOUTS[layout]
    self.write(layout)
    if compressed and layout == "npz":
      np.savez_compressed(self.folder / "train_images.npz", images=content("train")[0])
    name = {
      "csv": "train.csv", "zip": "images.zip", "pngs": "train_images_png.pkl",
      "npz": "train_images.npz",
    }[layout]  # fmt: skip
    chosen = next(
      one
      for one in module.DATA_SET.layouts
      if all((self.folder / n).exists() for n in one.files["train"])
    )
    whole = (self.folder / name).read_bytes()
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(150):
      damaged = bytearray(whole)
      # The last part of a zip tells where its members are and how they are compressed.
      at = random.integers(random.choice([0, len(damaged) * 9 // 10]), len(damaged))
      damaged[at] = random.integers(256)
      (self.folder / name).write_bytes(damaged[: at or 1] if random.random() < 0.1 else damaged)
      try:
        listing = chosen.read(*(self.folder / n for n in chosen.files["train"]))
        for m in range(len(listing.labels)):
          listing.read(m)
      except ValueError as error:
        self.assertIn(str(self.folder), str(error))
        refused += 1
    self.assertGreater(refused, 10)

  def test_csv_needs_its_header(self):
    data_set = self.write("csv")
    path = self.folder / "train.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    with self.assertRaisesRegex(ValueError, "header filename,label"):
      self.load(data_set)

  def test_a_picture_comes_once(self):
    data_set = self.write("csv")
    path = self.folder / "train.csv"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], lines[1], *lines[3:]]))
    name = lines[1].split(",")[0]
    with self.assertRaisesRegex(ValueError, f"{path} has '{name}' more than once"):
      self.load(data_set)

  @parameterized.product(layout=["csv", "zip"], name=["{}", "./{}", "a/../{}"])
  def test_a_picture_is_in_one_split(self, layout, name):
    data_set = self.write(layout)
    first = (self.folder / "train.csv").read_text().splitlines()[1].split(",")[0]
    path = self.folder / "test.csv"
    path.write_text(path.read_text().replace("test0001.png", name.format(first)))
    message = f"'{first}' is a picture of {self.folder}/train.csv and of {path}"
    with self.assertRaisesRegex(ValueError, message):
      self.load(data_set)

  @parameterized.parameters(("csv", "./{}"), ("zip", "images/{}"))
  def test_a_picture_comes_once_under_any_name(self, layout, other):
    data_set = self.write(layout)
    path = self.folder / "val.csv"
    lines = path.read_text().splitlines(keepends=True)
    name, label = lines[1].split(",")
    path.write_text("".join([*lines[:2], f"{other.format(name)},{label}", *lines[3:]]))
    with self.assertRaisesRegex(ValueError, f"{path} has '{name}' more than once"):
      self.load(data_set)

  @parameterized.parameters("csv", "class_dict")
  def test_spaces_around_a_label_make_no_other_class(self, layout):
    data_set = self.write(layout)
    if layout == "csv":
      path = self.folder / "test.csv"
      path.write_text(path.read_text().replace("test_0", " train_0"))
    else:
      path = self.folder / "mini-imagenet-cache-test.pkl"
      data = pickle.loads(path.read_bytes())
      data["class_dict"][" train_0"] = data["class_dict"].pop("test_0")
      path.write_bytes(pickle.dumps(data))
    with self.assertRaisesRegex(ValueError, "a class in common; got .'train_0'"):
      self.load(data_set)

  def test_a_missing_member(self):
    data_set = self.write("zip")
    path = self.folder / "test.csv"
    path.write_text(path.read_text().replace("test0001.png", "other.png"))
    with self.assertRaisesRegex(ValueError, "images.zip wants a member 'other.png'"):
      self.load(data_set)

  def test_problem(self):
    splits = self.load(self.write("cifar"))
    shape = few_shot.FewShot(2, 1, 3)
    p = photographs.problem("CIFAR-FS", splits, shape, "the standard split")
    for source, split in zip(p[:3], CLASSES, strict=True):
      task = source.sample(jax.random.key(0), 0, 3)
      chex.assert_shape(task.val.inputs, (3, 6, SIDE, SIDE, 3))
      shown = np.rint(255 * np.asarray(task.val.inputs)).astype(np.uint8).reshape(18, -1)
      stored = {picture.tobytes() for picture in splits[split].images}
      self.assertTrue(all(picture.tobytes() in stored for picture in shown))
    self.assertEqual(p.inputs, (SIDE, SIDE, 3))
    self.assertIn("4 classes to train, 2 validation, 3 test, the standard", p.protocol.split)

  def test_published_counts(self):
    for module, classes, total in (
      (mini_imagenet, [64, 16, 20], 60_000),
      (tiered_imagenet, [351, 97, 160], 779_165),
      (cifar_fs, [64, 16, 20], 60_000),
    ):
      counts = module.DATA_SET.counts.values()
      self.assertEqual([c.classes for c in counts], classes)
      self.assertEqual(sum(c.images for c in counts), total)


class ImagesTest(absltest.TestCase):
  def test_a_picture_must_have_colours(self):
    for wrong in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3))):
      listing = images.Listing(["a"], lambda m, wrong=wrong: wrong)
      with self.assertRaisesRegex(ValueError, r"\[h, w, 3\] uint8"):
        images.build(listing, 4, "x")


if __name__ == "__main__":
  absltest.main()
