"""Handwritten or printed characters in memory, grouped by writing system."""

import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from experiments.datasets.files import cache


class Characters(NamedTuple):
  """K characters of S writing systems, each with up to R renderings of H x W pixels."""

  images: np.ndarray  # [K, R, H, W] uint8, 0 = paper, 255 = ink; zero from counts[k] on
  counts: np.ndarray  # [K] int32, renderings of character k, 1 <= counts <= R
  system: np.ndarray  # [K] int32, index into systems
  systems: tuple[str, ...]  # [S] names of the writing systems
  names: tuple[str, ...]  # [K] a readable name of each character


def check(characters: Characters) -> Characters:
  """Return `characters` unchanged, or raise ValueError that names the first fault."""
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
  """Keep the characters of `systems`; the systems are renumbered in the order given."""
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
  """Keep the writing systems with at least `ways` characters, enough for a `ways`-way task."""
  sizes = np.bincount(characters.system)
  large = [characters.systems[i] for i in np.flatnonzero(sizes >= ways)]
  if not large:
    raise ValueError(
      f"Tasks of {ways} ways want a writing system of as many characters; the largest has "
      f"{sizes.max()}. Lower the number of ways."
    )
  return select(characters, large)


def merge(*parts: Characters) -> Characters:
  """Join parts with different writing systems and equal image shapes."""
  sizes = [len(part.systems) for part in parts]
  offsets = np.cumsum([0, *sizes[:-1]]).astype(np.int32)
  return check(
    Characters(
      np.concatenate([part.images for part in parts]),
      np.concatenate([part.counts for part in parts]),
      np.concatenate([part.system + o for part, o in zip(parts, offsets, strict=True)]),
      tuple(name for part in parts for name in part.systems),
      tuple(name for part in parts for name in part.names),
    )
  )


def cached(
  cache_dir: cache.Folder | None, filename: str, build: Callable[[], Characters]
) -> Characters:
  """Return `build()` after a check, cached as the .npz `filename` in `cache_dir`."""
  return cache.cached(cache_dir, filename, lambda: check(build()), _read, _write)


def _read(path: pathlib.Path) -> Characters:
  with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
    images, counts, system, systems, names = (arrays[f] for f in Characters._fields)
  return check(Characters(images, counts, system, tuple(systems.tolist()), tuple(names.tolist())))


def _write(path: pathlib.Path, characters: Characters) -> None:
  cache.replace(path, lambda file: np.savez_compressed(file, **characters._asdict()))
