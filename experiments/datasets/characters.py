"""Handwritten or printed characters, sorted by writing system: the container of data sets."""

import os
import pathlib
import uuid
import zipfile
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from absl import logging


class Characters(NamedTuple):
  """K characters of S writing systems, up to R renderings each, H x W pixels."""

  images: np.ndarray  # [K, R, H, W] uint8, 0 = paper, 255 = ink; zero from counts[k] on
  counts: np.ndarray  # [K] int32, renderings of character k, 1 <= counts <= R
  system: np.ndarray  # [K] int32, index into systems
  systems: tuple[str, ...]  # [S] names of the writing systems
  names: tuple[str, ...]  # [K] a readable name of each character


def check(characters: Characters) -> Characters:
  """Returns `characters` as they came, or raises ValueError with the first thing that is wrong."""
  images, counts, system, systems, names = characters
  k = len(names)

  def require(ok: bool, wanted: str, got: object) -> None:
    if not ok:
      raise ValueError(f"Characters want {wanted}; got {got}. Rebuild the data set.")

  require(
    images.ndim == 4 and images.dtype == np.uint8 and len(images) == k,
    f"images [K, R, H, W] uint8 with K = {k} names",
    f"{images.shape} {images.dtype}",
  )
  for name, array in (("counts", counts), ("system", system)):
    require(
      array.shape == (k,) and array.dtype == np.int32,
      f"{name} [{k}] int32",
      f"{array.shape} {array.dtype}",
    )
  require(
    k > 0 and counts.min() >= 1 and counts.max() <= images.shape[1],
    f"1 <= counts <= R = {images.shape[1]} for at least one character",
    counts,
  )
  require(
    np.array_equal(np.unique(system), np.arange(len(systems))),
    f"at least one character in each of {len(systems)} systems",
    np.unique(system),
  )
  require(len(set(systems)) == len(systems), "systems of distinct names", systems)
  inked = images.any(axis=(2, 3))
  require(
    np.array_equal(inked, np.arange(images.shape[1]) < counts[:, None]),
    "ink in each of the first counts[k] renderings and in none beyond",
    f"other in {[names[i] for i in np.flatnonzero(inked.sum(axis=1) != counts)[:5]]}",
  )
  return characters


def select(characters: Characters, systems: Sequence[str]) -> Characters:
  """Keeps the characters of `systems`, which then are numbered in the order given."""
  unknown = sorted(set(systems) - set(characters.systems))
  if unknown or not systems or len(set(systems)) < len(systems):
    raise ValueError(
      f"select wants one or more distinct writing systems; got {list(systems)}, unknown: "
      f"{unknown}. Choose from {list(characters.systems)}."
    )
  renumber = np.full(len(characters.systems), -1, np.int32)
  renumber[[characters.systems.index(s) for s in systems]] = np.arange(len(systems))
  system = renumber[characters.system]
  keep = np.flatnonzero(system >= 0)
  return Characters(
    characters.images[keep],
    characters.counts[keep],
    system[keep],
    tuple(systems),
    tuple(characters.names[i] for i in keep),
  )


def with_at_least(characters: Characters, ways: int) -> Characters:
  """Keeps the writing systems of `ways` characters or more: those that make a `ways`-way task."""
  sizes = np.bincount(characters.system)
  large = [characters.systems[i] for i in np.flatnonzero(sizes >= ways)]
  if not large:
    raise ValueError(
      f"Tasks of {ways} ways want a writing system of as many characters; the largest has "
      f"{sizes.max()}. Lower the number of ways."
    )
  return select(characters, large)


def cached(
  cache_dir: str | os.PathLike[str] | None, filename: str, build: Callable[[], Characters]
) -> Characters:
  """`build()`, kept as `filename` in `cache_dir`.

  Args:
    cache_dir: a folder, made when missing; None stands for `shrinkmeta` in $XDG_CACHE_HOME or
      ~/.cache, and "" for no cache.
    filename: ends in .npz and names all that the result depends on.
    build: called when there is no such file, or one that cannot be read (with a warning).

  Returns:
    Checked characters. A folder that cannot be written to is a warning, no error.
  """
  if cache_dir == "":
    return check(build())
  if cache_dir is None:
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    cache_dir = os.path.join(root, "shrinkmeta")
  path = pathlib.Path(cache_dir) / filename
  try:
    return _read(path)
  except FileNotFoundError:
    pass
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
    logging.warning("Cannot use the cache %s, building its content anew: %s", path, error)
  characters = check(build())
  try:
    _write(path, characters)
  except OSError as error:
    logging.warning("Cannot write the cache %s, so the next start is slow too: %s", path, error)
  return characters


def _read(path: pathlib.Path) -> Characters:
  with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
    images, counts, system, systems, names = (arrays[f] for f in Characters._fields)
  return check(Characters(images, counts, system, tuple(systems.tolist()), tuple(names.tolist())))


def _write(path: pathlib.Path, characters: Characters) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  # Readers see the old file or the whole new one, as a rename within a folder is atomic.
  partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
  try:
    with partial.open("wb") as file:
      np.savez_compressed(file, **characters._asdict())
    os.replace(partial, path)
  finally:
    partial.unlink(missing_ok=True)
