"""Few-shot sets of photographs: found on disk, checked against published counts, cached."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from absl import logging

from experiments.datasets import few_shot
from experiments.datasets.files import cache, images, layouts
from experiments.datasets.files.images import Counts, Images
from experiments.datasets.files.layouts import Layout
from experiments.datasets.source import Problem, Protocol

_VERSION = 2  # of the pictures made here; another number makes caches of the old ones void


class DataSet(NamedTuple):
  """The published facts of a data set."""

  name: str  # of its folder and of caches
  title: str
  origin: str  # where to download it
  size: int  # height and width of the pictures in pixels
  counts: Mapping[str, Counts]  # of train, val and test
  layouts: Sequence[Layout]  # tried in this order


def load(
  data_set: DataSet,
  data_dir: cache.Folder | None = None,
  size: int | None = None,
  cache_dir: cache.Folder | None = None,
) -> dict[str, Images]:
  """The train, val and test classes, which are disjoint.

  Args:
    data_set: whose counts are verified.
    data_dir: its folder; default $SHRINKMETA_DATA/NAME.
    size: height and width in pixels; default the published one.
    cache_dir: where the arrays are kept, under a name with `layouts.digest` of the files, see
      `cache.cached`; "" for nowhere.

  Raises:
    FileNotFoundError: no layout of the set is in the folder.
    ValueError: a file is broken, holds other counts than published, or is an unsafe pickle.
  """
  folder = cache.data_folder(data_set.name, data_dir)
  size = data_set.size if size is None else size
  layout = _layout(data_set, folder)
  result = {}
  for split in layouts.SPLITS:
    files = [folder / name for name in layout.files[split]]
    title = f"{data_set.name} {split}"

    def make(split: str = split, files: list[pathlib.Path] = files, title: str = title) -> Images:
      listing = layout.read(*files)
      images.check_counts(f"{data_set.title}, {files[0]},", listing.labels, data_set.counts[split])
      return images.build(listing, size, title)

    name = f"{data_set.name}_{split}_v{_VERSION}_{size}_{layouts.digest(files)[:16]}"
    result[split] = images.cached(cache_dir, name, make)
  _check_disjoint(data_set.title, result)
  return result


def _layout(data_set: DataSet, folder: pathlib.Path) -> Layout:
  for layout in data_set.layouts:
    if all((folder / name).exists() for names in layout.files.values() for name in names):
      logging.info("%s: reading %s in %s", data_set.title, ", ".join(layout.files["train"]), folder)
      return layout
  wanted = "; or ".join(
    ", ".join(dict.fromkeys(name for names in layout.files.values() for name in names))
    for layout in data_set.layouts
  )
  raise FileNotFoundError(
    f"{data_set.title} wants in {folder}: {wanted}. See {data_set.origin}, or give another "
    "data_dir."
  )


def _check_disjoint(title: str, splits: Mapping[str, Images]) -> None:
  named = [set(part.names) for part in splits.values()]
  shared = (named[0] & named[1]) | (named[0] & named[2]) | (named[1] & named[2])
  if shared:
    raise ValueError(f"{title} wants splits without a class in common; got {sorted(shared)[:5]}.")


def problem(
  title: str, splits: Mapping[str, Images], shape: few_shot.FewShot, chosen_by: str
) -> Problem:
  """N-way K-shot episodes of all classes of a split.

  Args:
    title: of the data.
    splits: train, val and test.
    shape: of the episodes.
    chosen_by: who or what split the classes.
  """
  train, validation, test = (
    few_shot.source(shape, splits[s].images, splits[s].counts) for s in layouts.SPLITS
  )
  inputs = splits["train"].images.shape[1:]
  classes = [len(splits[s].names) for s in layouts.SPLITS]
  protocol = Protocol(
    data=f"{title}, {inputs[0]} x {inputs[1]} pixels",
    split=f"{classes[0]} classes to train, {classes[1]} validation, {classes[2]} test, {chosen_by}",
    ways=shape.ways,
    shots=shape.shots,
    queries=shape.queries,
    augmentation="none",
    evaluation="endless episodes of the validation or test classes, by index",
  )
  return Problem(train, validation, test, "categorical", shape.ways, inputs, protocol)


def standard(
  data_set: DataSet,
  shape: few_shot.FewShot = few_shot.FewShot(),  # noqa: B008 (frozen)
  data_dir: cache.Folder | None = None,
  size: int | None = None,
  cache_dir: cache.Folder | None = None,
) -> Problem:
  """N-way K-shot episodes of the published split; arguments as for `load`."""
  splits = load(data_set, data_dir, size, cache_dir)
  return problem(data_set.title, splits, shape, "the standard split")
