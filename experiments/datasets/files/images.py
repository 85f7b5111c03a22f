"""Classes of pictures in memory, and their cache."""

import pathlib
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import tqdm
from PIL import Image

from experiments.datasets.files import cache


class Images(NamedTuple):
  """M pictures of K classes, sorted by class."""

  images: np.ndarray  # [M, H, W, 3] uint8; read from a cache it is mapped, not loaded
  counts: np.ndarray  # [K] int32, pictures of each class
  names: tuple[str, ...]  # [K]


class Counts(NamedTuple):
  """The published numbers of classes and images of one split."""

  classes: int
  images: int
  least: int  # images of a class
  most: int


class Listing(NamedTuple):
  """Pictures in files, which are not decoded yet."""

  labels: Sequence[str]  # [M] the name of each picture's class
  read: Callable[[int], np.ndarray]  # m -> picture [h, w, 3] uint8


def check_counts(where: str, labels: Sequence[str], want: Counts) -> None:
  """Raise ValueError unless the numbers of labels and of classes are those of `want`."""
  sizes = np.unique(np.asarray(labels), return_counts=True)[1] if len(labels) else np.zeros(1, int)
  got = Counts(len(sizes), len(labels), int(sizes.min()), int(sizes.max()))
  if got[:2] != want[:2] or got.least < want.least or got.most > want.most:
    raise ValueError(
      f"{where} wants {_words(want)}; got {_words(got)}. It is another data set, or not whole: "
      "download it anew."
    )


def _words(counts: Counts) -> str:
  span = {counts.least, counts.most}
  each = "-".join(map(str, sorted(span)))
  return f"{counts.images} images of {counts.classes} classes, {each} of each"


def build(listing: Listing, size: int, title: str) -> Images:
  """Decode a listing and resize its pictures to size x size, whatever their proportions.

  Classes are sorted by name; the pictures of a class keep their order.
  """
  names, label = np.unique(np.asarray(listing.labels), return_inverse=True)
  order = np.argsort(label, kind="stable")
  images = np.empty((len(order), size, size, 3), np.uint8)
  for row, m in enumerate(tqdm.tqdm(order, desc=title, unit="image", mininterval=1.0)):
    images[row] = _resized(listing.read(int(m)), size)
  return Images(images, np.bincount(label).astype(np.int32), tuple(names.tolist()))


def _resized(image: np.ndarray, size: int) -> np.ndarray:
  if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
    raise ValueError(f"A picture wants [h, w, 3] uint8; got {image.shape} {image.dtype}.")
  if image.shape[:2] == (size, size):
    return image
  return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.LANCZOS))


def cached(cache_dir: cache.Folder | None, name: str, make: Callable[[], Images]) -> Images:
  """Return `make()`, cached as NAME.npz (counts, names, crc32) and NAME.npy (images).

  The file of images is mapped into memory, so that a set may be larger than memory. `cache.cached`
  describes the folder.
  """
  return cache.cached(cache_dir, f"{name}.npz", make, _read, _write)


def _read(path: pathlib.Path) -> Images:
  with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
    counts, names, crc32 = arrays["counts"], tuple(arrays["names"].tolist()), arrays["crc32"]
  images = np.load(path.with_suffix(".npy"), mmap_mode="r", allow_pickle=False)
  right = images.ndim == 4 and images.dtype == np.uint8 and images.flags.c_contiguous
  if not right or len(images) != counts.sum() or len(names) != len(counts):
    raise ValueError(f"{images.shape} {images.dtype}, {counts.sum()} counted, {len(names)} names")
  if _crc32(images) != crc32:
    raise ValueError(f"{path.with_suffix('.npy')} has another checksum than when it was written")
  return Images(images, counts, names)


def _write(path: pathlib.Path, content: Images) -> None:
  # The small file comes last: if it exists, the large one is complete.
  cache.replace(path.with_suffix(".npy"), lambda file: np.save(file, content.images))
  small = {
    "counts": content.counts,
    "names": np.array(content.names),
    "crc32": np.uint32(_crc32(content.images)),
  }
  cache.replace(path, lambda file: np.savez(file, **small))


def _crc32(images: np.ndarray) -> int:
  """Return a checksum of shape and content; unlike members of an .npz, an .npy has none.

  One core checks 3 GB a second, even in a file larger than memory. All of it is read anyway when
  the pictures go to the device.
  """
  return zlib.crc32(np.ascontiguousarray(images).data, zlib.crc32(repr(images.shape).encode()))
