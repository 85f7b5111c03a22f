"""Omniglot: 1,623 characters of 50 alphabets, each drawn once by each of 20 people.

This module reads the two archives as they are downloaded, without unpacking them to disk.

References: Lake, Salakhutdinov and Tenenbaum, Human-level concept learning through probabilistic
  program induction, Science 350:1332-1338, 2015.
"""

import hashlib
import io
import os
import pathlib
import re
import zipfile

import numpy as np

from experiments.datasets.characters import characters as characters_lib
from experiments.datasets.files import cache, pictures

Characters = characters_lib.Characters

ARCHIVES: tuple[str, str] = ("images_background.zip", "images_evaluation.zip")
COUNTS = {"images_background": (30, 964), "images_evaluation": (20, 659)}  # alphabets, characters
ORIGIN = "https://github.com/brendenlake/omniglot/tree/master/python"
DRAWINGS = 20  # of each character
SIDE = 105  # pixels of a drawing

# Background alphabets for the choice of hyperparameters: the first five of a seeded shuffle,
# sorted(numpy.random.default_rng(0).permutation(background.systems)[:5]).
VALIDATION: tuple[str, ...] = ("Arcadian", "Cyrillic", "Early_Aramaic", "Latin", "Sanskrit")

_VERSION = 1  # of the pictures made here; another number makes caches of the old ones void
_MEMBER = re.compile(r"(images_\w+)/([^/\\]+)/(character\d+)/\d+_(\d+)\.png")


def load(
  data_dir: str | os.PathLike[str], size: int = 32, cache_dir: str | os.PathLike[str] | None = None
) -> tuple[Characters, Characters]:
  """Return the background alphabets, for training, and the evaluation alphabets, for tests.

  Args:
    data_dir: the folder of the two ARCHIVES.
    size: height and width of the pictures in pixels; the files have 105, which are averaged.
    cache_dir: the folder of the cache, see `cache.cached`; "" switches the cache off.

  Returns:
    Two Characters with images [K, 20, size, size]. Ink is 255; in the files it is 0.

  Raises:
    FileNotFoundError: an archive is missing.
    ValueError: an archive is damaged or incomplete, or its pictures are not Omniglot's.
  """
  if not 8 <= size <= SIDE:
    raise ValueError(f"Omniglot wants a size of 8 to {SIDE} pixels; got {size}. Use 32.")
  background, evaluation = (
    _load_archive(pathlib.Path(data_dir) / name, size, cache_dir) for name in ARCHIVES
  )
  return background, evaluation


def _load_archive(
  path: pathlib.Path, size: int, cache_dir: str | os.PathLike[str] | None
) -> Characters:
  try:
    content = path.read_bytes()
  except FileNotFoundError as error:
    raise FileNotFoundError(
      f"Omniglot wants {path}, which does not exist. Download {' and '.join(ARCHIVES)} from "
      f"{ORIGIN} and name their folder: --data_dir, or $SHRINKMETA_DATA/omniglot."
    ) from error
  digest = hashlib.sha256(content).hexdigest()
  filename = f"omniglot_v{_VERSION}_{size}_{digest[:16]}.npz"
  return characters_lib.cached(cache_dir, filename, lambda: _decode(path, content, size))


def _decode(path: pathlib.Path, content: bytes, size: int) -> Characters:
  drawings: dict[tuple[str, str], dict[int, np.ndarray]] = {}
  with cache.damaged(path), zipfile.ZipFile(io.BytesIO(content)) as archive:
    for member in sorted(archive.namelist()):
      # Folders, notes of operating systems and paths that leave the archive do not match.
      if (match := _MEMBER.fullmatch(member)) and match[1] == path.stem:
        _, alphabet, character, drawer = match.groups()
        own = drawings.setdefault((alphabet, character), {})
        if int(drawer) in own:
          raise ValueError(f"{member} is the second drawing of its character by {drawer}")
        own[int(drawer)] = _picture(cache.read_member(archive, member, 2**20), f"{path}, {member}")
  wrong = [f"{'/'.join(name)} has {len(d)}" for name, d in drawings.items() if len(d) != DRAWINGS]
  if wrong or not drawings:
    raise cache.DamagedError(
      f"{path} wants {DRAWINGS} drawings of each character, as {path.stem}/ALPHABET/"
      f"characterNN/IIII_DD.png; of {len(drawings)} characters, {wrong[:3] or 'none is there'}. "
      f"Download it anew from {ORIGIN}."
    )
  systems = tuple(sorted({alphabet for alphabet, _ in drawings}))
  if (found := (len(systems), len(drawings))) != COUNTS[path.stem]:
    raise cache.DamagedError(
      f"{path} wants {COUNTS[path.stem]} alphabets and characters; got {found}. Download it anew "
      f"from {ORIGIN}."
    )
  return Characters(
    images=np.stack(
      [_area_means(np.stack([d[i] for i in sorted(d)]), size) for d in drawings.values()]
    ),
    counts=np.full(len(drawings), DRAWINGS, np.int32),
    system=np.array([systems.index(alphabet) for alphabet, _ in drawings], np.int32),
    systems=systems,
    names=tuple("/".join(name) for name in drawings),
  )


def _picture(content: bytes, where: str) -> np.ndarray:
  """Return [SIDE, SIDE] bool, True for ink, from a PNG with black ink on white paper."""
  image = pictures.decode(content, where)
  if image.shape[:2] != (SIDE, SIDE):
    raise ValueError(f"{where} is {image.shape[1::-1]} pixels and wants {(SIDE, SIDE)}")
  return image.mean(-1) < 128


def _area_means(ink: np.ndarray, size: int) -> np.ndarray:
  """Average [N, SIDE, SIDE] bool to [N, size, size] uint8: 255 times the share of ink in a pixel.

  PIL's box filter is exact only if size divides SIDE. Here cumulative sums are interpolated at the
  edges of the new pixels, and subtracted. A matrix product would also work, but with thousands of
  small products the threads of a BLAS wait for each other while other programs run.
  """
  edges = np.arange(size + 1) * SIDE / size
  old = np.minimum(edges.astype(int), SIDE - 1)
  part = edges - old
  sums = ink
  for axis in (1, 2):
    up_to = np.cumsum(sums, axis=axis, dtype=np.float32 if axis == 2 else np.int32)
    own = np.take(sums, old, axis)
    before = np.take(up_to, old, axis) - own
    at_edges = before + own * np.expand_dims(part, (0, 3 - axis))
    sums = np.diff(at_edges, axis=axis)
  return np.rint(sums * (255.0 * (size / SIDE) ** 2)).astype(np.uint8)
