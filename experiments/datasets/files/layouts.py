"""The file layouts in which sets of photographs are passed around.

| layout | files |
|---|---|
| class_dict | a pickle {image_data: [M, h, w, 3], class_dict: {class: rows}} a split |
| data_labels | a pickle {data: [M, h, w, 3], labels: [M]} a split |
| png_pickle | a pickle of M encoded PNGs, and one {label_specific or labels: [M]} a split |
| npz | an .npz with images [M, h, w, 3], and the same pickle of labels, a split |
| csv | train.csv, val.csv, test.csv of filename,label, and images/ or images.zip beside them |

Colours come in the order of the file: OpenCV, with which some were made, puts blue first.
"""

import collections
import functools
import hashlib
import pathlib
import zipfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.datasets.files import cache, images, pickles
from experiments.datasets.files.images import Listing

SPLITS = ("train", "val", "test")
_PICTURE = 2**26  # bytes of an encoded photograph, and more than enough


class Layout(NamedTuple):
  """The files of each split, and how they are read."""

  read: Callable[..., Listing]  # of the paths of a split's files
  files: dict[str, tuple[str, ...]]  # split -> names


def layout(read: Callable[..., Listing], *patterns: str, **renamed: str) -> Layout:
  """File names are `patterns` with {} for the split, or for what `renamed` calls it."""
  return Layout(read, {s: tuple(p.format(renamed.get(s, s)) for p in patterns) for s in SPLITS})


CSV = (layout(lambda *paths: csv(*paths), "{}.csv", "images"),
       layout(lambda *paths: csv(*paths), "{}.csv", "images.zip"))  # fmt: skip


def class_dict(path: pathlib.Path) -> Listing:
  """A pickle {image_data, class_dict}."""
  pixels, rows = _entries(path, pickles.load(path), "image_data", "class_dict")
  pixels = _pixels(path, pixels)
  labels = np.full(len(pixels), "", object)
  for name, own in rows.items() if isinstance(rows, dict) else ():
    own = own.tolist() if isinstance(own, np.ndarray) else own
    if not isinstance(own, list | tuple) or not all(
      isinstance(row, int | np.integer) and 0 <= row < len(pixels) for row in own
    ):
      raise ValueError(
        f"{path}: class {name!r} wants rows of 0 to {len(pixels) - 1}; got {own!s:.80}."
      )
    own = np.array(own, int)
    labels[own] = str(name)
  if not all(labels):
    raise ValueError(f"{path}: {sum(labels == '')} images are in no class of its class_dict.")
  return Listing(labels.tolist(), pixels.__getitem__)


def data_labels(path: pathlib.Path) -> Listing:
  """A pickle {data, labels}."""
  pixels, labels = _entries(path, pickles.load(path), "data", "labels")
  pixels = _pixels(path, pixels)
  return Listing(_labels(path, labels, len(pixels)), pixels.__getitem__)


def png_pickle(images_path: pathlib.Path, labels_path: pathlib.Path) -> Listing:
  """A pickle of encoded PNGs, each an array of bytes, and one of labels."""
  encoded = pickles.load(images_path)
  if not isinstance(encoded, list | np.ndarray):
    raise ValueError(f"{images_path} wants a list of PNGs; got {type(encoded).__name__}.")

  def read(m: int) -> np.ndarray:
    with cache.damaged(f"{images_path}, PNG {m}"):
      content = np.asarray(encoded[m])
      if content.dtype != np.uint8:
        raise ValueError(f"bytes [n] uint8 wanted, got {content.dtype}")
      return images.decode(content.tobytes())

  return Listing(_specific(labels_path, len(encoded)), read)


def npz(images_path: pathlib.Path, labels_path: pathlib.Path) -> Listing:
  """An .npz with decoded images, and a pickle of labels."""
  with (
    cache.damaged(images_path),
    images_path.open("rb") as file,
    np.load(file, allow_pickle=False) as arrays,
  ):
    pixels = arrays["images"]
  pixels = _pixels(images_path, pixels)
  return Listing(_specific(labels_path, len(pixels)), pixels.__getitem__)


def csv(path: pathlib.Path, pictures: pathlib.Path) -> Listing:
  """filename,label rows under a header, and a folder or zip of the pictures."""
  rows = cache.read_csv(path, ("filename", "label"))
  check_distinct(path, [row["filename"] for row in rows])
  read = _from_folder(pictures) if pictures.is_dir() else from_zip(pictures)
  return Listing([row["label"] for row in rows], lambda m: read(rows[m]["filename"]))


def check_distinct(path: pathlib.Path, names: Sequence[str]) -> None:
  """ValueError where a table has a picture twice: an episode could train on it and judge by it."""
  if len(set(names)) < len(names):
    twice = next(name for name, count in collections.Counter(names).items() if count > 1)
    raise ValueError(f"{path} has {twice!r} more than once. Download it anew.")


def _from_folder(folder: pathlib.Path) -> Callable[[str], np.ndarray]:
  root = folder.resolve()

  def read(name: str) -> np.ndarray:
    file = (root / name).resolve()  # neither "..", a root nor a link leads out of the folder
    if not file.is_relative_to(root) or not file.is_file():
      raise ValueError(f"{name!r} of a .csv is no file in {folder}. Download the images anew.")
    with cache.damaged(file):
      return images.decode(file.read_bytes())

  return read


def from_zip(path: pathlib.Path) -> Callable[[str], np.ndarray]:
  """name -> picture, of a zip of pictures, at its top or in images/; nothing is unpacked."""
  with cache.damaged(path):
    archive = zipfile.ZipFile(path)
  members = set(archive.namelist())

  def read(name: str) -> np.ndarray:
    member = next((m for m in (name, f"images/{name}") if m in members), None)
    if member is None:
      raise ValueError(f"{path} wants a member {name!r} or images/{name}. Download it anew.")
    with cache.damaged(f"{path}, {member}"):
      return images.decode(cache.read_member(archive, member, _PICTURE))

  return read


@functools.cache
def _sha256(path: pathlib.Path, changed: int) -> bytes:
  del changed  # the time: a file is hashed again if it changes while a program runs
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").digest()


def digest(files: Sequence[pathlib.Path]) -> str:
  """sha256 of the files' content; of a folder of pictures, of their names and sizes."""
  total = hashlib.sha256()
  for file in files:
    if file.is_dir():
      inside = ((p.relative_to(file).as_posix(), p.stat().st_size) for p in file.rglob("*"))
      total.update(repr(sorted(inside)).encode())
    else:
      total.update(_sha256(file, file.stat().st_mtime_ns))
  return total.hexdigest()


def _entries(path: pathlib.Path, content: Any, *keys: str) -> tuple[Any, ...]:
  if not isinstance(content, dict):
    raise ValueError(f"{path} wants a dict with {keys}; got {type(content).__name__}.")
  found = {k.decode("latin1") if isinstance(k, bytes) else k: v for k, v in content.items()}
  if missing := set(keys) - set(found):
    raise ValueError(f"{path} wants a dict with {keys}; {sorted(missing)} not in {list(found)}.")
  return tuple(found[key] for key in keys)


def _pixels(path: pathlib.Path, pixels: Any) -> np.ndarray:
  if isinstance(pixels, list):
    with cache.damaged(path):  # no other dtype, in which a few pictures might become large
      pixels = np.stack(pixels, dtype=np.uint8, casting="equiv")
  pixels = np.asarray(pixels)
  if pixels.ndim != 4 or pixels.shape[3] != 3 or pixels.dtype != np.uint8:
    raise ValueError(f"{path} wants images [M, h, w, 3] uint8; got {pixels.shape} {pixels.dtype}.")
  return pixels


def _labels(path: pathlib.Path, labels: Any, count: int) -> list[str]:
  # No array of a list: one long text in it would make every label as long.
  labels = labels.tolist() if isinstance(labels, np.ndarray) else labels
  if not isinstance(labels, list | tuple) or len(labels) != count:
    got = len(labels) if isinstance(labels, list | tuple) else type(labels).__name__
    raise ValueError(f"{path} wants labels [{count}], one an image; got {got}.")
  if all(isinstance(label, int | np.integer) for label in labels):
    return [f"{label:04d}" for label in labels]  # in the order of numbers, also as text
  if not all(isinstance(label, str | bytes | int | np.generic) for label in labels):
    raise ValueError(f"{path} wants labels that are numbers or text.")
  return [str(label) for label in labels]


def _specific(path: pathlib.Path, count: int) -> list[str]:
  """Labels of classes, not of their superclasses, under either of two names.

  The published files number "label_specific" from 0 in every split: files' names tell them apart.
  """
  content = pickles.load(path)
  key = "label_specific" if isinstance(content, dict) and "labels" not in content else "labels"
  (labels,) = _entries(path, content, key)
  names = _labels(path, labels, count)
  return names if key == "labels" else [f"{path.stem}_{name}" for name in names]
