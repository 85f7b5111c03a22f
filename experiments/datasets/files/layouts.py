"""The file layouts in which sets of photographs are published.

| layout | files of each split |
|---|---|
| class_dict | a pickle {image_data: [M, h, w, 3], class_dict: {class: rows}} |
| data_labels | a pickle {data: [M, h, w, 3], labels: [M]} |
| png_pickle | a pickle of M encoded pictures, and one {label_specific or labels: [M]} |
| npz | an .npz with images [M, h, w, 3], and the same pickle of labels |
| csv | a table SPLIT.csv of filename,label; all splits share images/ or images.zip |

Instead of an array [M, h, w, 3], a pickle may hold M encoded PNGs or JPEGs, each as bytes or as an
array of bytes. The order of the colours is that of the file. Files made with OpenCV have blue
first.
"""

import collections
import functools
import hashlib
import pathlib
import posixpath
import zipfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.datasets.files import cache, pickles, pictures
from experiments.datasets.files.images import Listing

SPLITS = ("train", "val", "test")
_PICTURE = 2**26  # bytes of an encoded photograph, and more than enough


class Layout(NamedTuple):
  """The files of each split, and how they are read."""

  read: Callable[..., Listing]  # of the paths of a split's files
  files: dict[str, tuple[str, ...]]  # split -> names


def layout(read: Callable[..., Listing], *patterns: str, **renamed: str) -> Layout:
  """Return a layout; in `patterns` {} is the split, under the name that `renamed` gives it."""
  return Layout(read, {s: tuple(p.format(renamed.get(s, s)) for p in patterns) for s in SPLITS})


CSV = (layout(lambda *paths: csv(*paths), "{}.csv", "images"),
       layout(lambda *paths: csv(*paths), "{}.csv", "images.zip"))  # fmt: skip


def class_dict(path: pathlib.Path) -> Listing:
  """A pickle {image_data, class_dict}."""
  content, rows = _entries(path, pickles.load(path), "image_data", "class_dict")
  count, read = _pictures(path, content)
  labels = np.full(count, "", object)
  for name, own in rows.items() if isinstance(rows, dict) else ():
    own = own.tolist() if isinstance(own, np.ndarray) else own
    if not isinstance(own, list | tuple) or not all(
      isinstance(row, int | np.integer) and 0 <= row < count for row in own
    ):
      raise ValueError(f"{path}: class {name!r} wants rows of 0 to {count - 1}; got {own!s:.80}.")
    own = np.array(own, int)
    if len(twice := own[labels[own] != ""]):
      raise ValueError(
        f"{path}: picture {twice[0]} is in the classes {labels[twice[0]]!r} and {name!r}. Keep it "
        "in one of them."
      )
    labels[own] = str(name).strip()
  if not all(labels):
    raise ValueError(f"{path}: {sum(labels == '')} images are in no class of its class_dict.")
  return Listing(labels.tolist(), read)


def data_labels(path: pathlib.Path) -> Listing:
  """A pickle {data, labels}."""
  content, labels = _entries(path, pickles.load(path), "data", "labels")
  count, read = _pictures(path, content)
  return Listing(_labels(path, labels, count), read)


def png_pickle(images_path: pathlib.Path, labels_path: pathlib.Path) -> Listing:
  """A pickle of encoded PNGs or JPEGs, and one of labels."""
  count, read = _pictures(images_path, pickles.load(images_path))
  return Listing(_specific(labels_path, count), read)


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
  """Tables with filename,label rows under a header, and a folder or zip of the pictures."""
  rows = cache.read_csv(path, ("filename", "label"))
  if unlabelled := [row["filename"] for row in rows if not row["label"].strip()]:
    raise ValueError(f"{path}: {unlabelled[0]!r} has no label. Give it one, or leave it out.")
  zipped = not pictures.is_dir()
  check_distinct(path, [row["filename"] for row in rows], zipped)
  read = from_zip(pictures) if zipped else _from_folder(pictures)
  return Listing([row["label"].strip() for row in rows], lambda m: read(rows[m]["filename"]))


def check_distinct(path: pathlib.Path, names: Sequence[str], zipped: bool) -> None:
  """Raise ValueError if a table has a picture twice: train and val might share it.

  Args:
    path: the table.
    names: the pictures of its rows.
    zipped: whether the pictures are in a zip, see `from_zip`.
  """
  counts = collections.Counter(_picture(name, zipped) for name in names)
  if twice := [name for name, count in counts.items() if count > 1]:
    raise ValueError(f"{path} has {twice[0]!r} more than once. Download it anew.")


def check_splits(folder: pathlib.Path, chosen: Layout) -> None:
  """Raise ValueError if a layout of CSV has a picture in two splits, which share their pictures."""
  if chosen not in CSV:
    return  # every split has files of its own
  found: dict[str, pathlib.Path] = {}
  for split in SPLITS:
    table, pictures = (folder / name for name in chosen.files[split])
    own = cache.read_csv(table, ("filename", "label"))
    names = {_picture(row["filename"], not pictures.is_dir()) for row in own}
    if shared := sorted(names & set(found)):
      raise ValueError(
        f"{shared[0]!r} is a picture of {found[shared[0]]} and of {table}: it would be trained on "
        "and tested with. Download both tables anew."
      )
    found |= dict.fromkeys(names, table)


def _picture(name: str, zipped: bool) -> str:
  """Return one text for all names of a picture; in a zip it also has a name without images/."""
  name = posixpath.normpath(name)
  return name.removeprefix("images/") if zipped else name


def _from_folder(folder: pathlib.Path) -> Callable[[str], np.ndarray]:
  root = folder.resolve()

  def read(name: str) -> np.ndarray:
    file = (root / name).resolve()  # neither "..", a root nor a link leads out of the folder
    if not file.is_relative_to(root) or not file.is_file():
      raise ValueError(f"{name!r} of a .csv is no file in {folder}. Download the images anew.")
    with cache.damaged(file):
      content = file.read_bytes()
    return pictures.decode(content, file)

  return read


def from_zip(path: pathlib.Path) -> Callable[[str], np.ndarray]:
  """Return a function from names to pictures of a zip, which is not unpacked.

  The pictures lie at its top or in images/.
  """
  with cache.damaged(path):
    archive = zipfile.ZipFile(path)
  members = set(archive.namelist())

  def read(name: str) -> np.ndarray:
    member = next((m for m in (name, f"images/{name}") if m in members), None)
    if member is None:
      raise ValueError(f"{path} wants a member {name!r} or images/{name}. Download it anew.")
    with cache.damaged(f"{path}, {member}"):
      content = cache.read_member(archive, member, _PICTURE)
    return pictures.decode(content, f"{path}, {member}")

  return read


@functools.cache
def _sha256(path: pathlib.Path, changed: int) -> bytes:
  del changed  # the time: a file is hashed again if it changes while a program runs
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").digest()


def digest(files: Sequence[pathlib.Path]) -> str:
  """Return the SHA-256 of the content of files; for a folder, of the names and sizes in it."""
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


def _pictures(path: pathlib.Path, content: Any) -> tuple[int, Callable[[int], np.ndarray]]:
  """Return M, and a function m -> picture [h, w, 3] uint8, of arrays or encoded pictures."""
  if isinstance(content, np.ndarray) and content.dtype.kind in "OS":
    content = content.tolist()
  if not isinstance(content, list) or not (content and _encoded(content[0]) is not None):
    pixels = _pixels(path, content)
    return len(pixels), pixels.__getitem__
  encoded = content

  def read(m: int) -> np.ndarray:
    if (one := _encoded(encoded[m])) is None:
      raise cache.DamagedError(
        f"{path}, picture {m}: wanted a PNG or JPEG as bytes or as an array of bytes [n] uint8; "
        f"got {_kind(encoded[m])}. Save it as bytes."
      )
    return pictures.decode(one, f"{path}, picture {m}")

  return len(encoded), read


def _encoded(value: Any) -> bytes | None:
  """Return the bytes of an encoded picture; None if `value` is anything else."""
  if isinstance(value, bytes | bytearray):
    return bytes(value)
  if isinstance(value, str):  # bytes of Python 2, a byte a character
    return value.encode("latin1") if value.startswith(("\x89PNG", "\xff\xd8")) else None
  if not isinstance(value, np.ndarray) or value.dtype != np.uint8:
    return None
  # OpenCV returns a column of bytes.
  return value.tobytes() if value.ndim and value.size == value.shape[0] else None


def _kind(value: Any) -> str:
  if isinstance(value, np.ndarray):
    return f"an array {value.shape} of {value.dtype}"
  return type(value).__name__


def _pixels(path: pathlib.Path, pixels: Any) -> np.ndarray:
  if isinstance(pixels, list):
    with cache.damaged(path):  # no other dtype, in which a few pictures might become large
      pixels = np.stack(pixels, dtype=np.uint8, casting="equiv")
  pixels = np.asarray(pixels)
  if pixels.ndim != 4 or pixels.shape[3] != 3 or pixels.dtype != np.uint8:
    raise ValueError(
      f"{path} wants images [M, h, w, 3] uint8, or M encoded pictures; got "
      f"{pixels.shape} {pixels.dtype}."
    )
  return pixels


def _labels(path: pathlib.Path, labels: Any, count: int) -> list[str]:
  # No array of a list: one long text in it would make every label as long.
  labels = labels.tolist() if isinstance(labels, np.ndarray) else labels
  if not isinstance(labels, list | tuple) or len(labels) != count:
    got = len(labels) if isinstance(labels, list | tuple) else type(labels).__name__
    raise ValueError(f"{path} wants labels [{count}], one an image; got {got}.")
  return [_label(path, m, label) for m, label in enumerate(labels)]


def _label(path: pathlib.Path, m: int, label: Any) -> str:
  """Return the name of a class; numbers are padded with zeros, so that they sort in their order."""
  label = label.item() if isinstance(label, np.generic) else label
  label = label.decode("latin1") if isinstance(label, bytes) else label
  if (
    isinstance(label, float) and label.is_integer()
  ):  # as spreadsheets and NaN-able columns have it
    label = int(label)
  if isinstance(label, int) and label >= 0:
    return f"{label:04d}"
  if isinstance(label, str) and label.strip():
    return label.strip()
  raise ValueError(
    f"{path} wants labels that are text or whole numbers from 0; that of picture {m} is "
    f"{label!r:.40}. Leave pictures without a class out."
  )


def _specific(path: pathlib.Path, count: int) -> list[str]:
  """Return the labels of classes, not of superclasses, under either of two names.

  The published files number "label_specific" from 0 in every split. So the name of the file becomes
  a part of the class's name.
  """
  content = pickles.load(path)
  key = "label_specific" if isinstance(content, dict) and "labels" not in content else "labels"
  (labels,) = _entries(path, content, key)
  names = _labels(path, labels, count)
  return names if key == "labels" else [f"{path.stem}_{name}" for name in names]
