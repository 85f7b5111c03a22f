"""Few-shot sets of photographs: found on disk, checked against published counts, and cached."""

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
  """Return the train, val and test classes, which are disjoint.

  Args:
    data_set: the published facts, against which the counts are checked.
    data_dir: the folder of the files; default $SHRINKMETA_DATA/NAME.
    size: height and width in pixels; default the published one.
    cache_dir: the folder of the cache, see `cache.cached`; "" switches it off. The name of a cached
      file has `layouts.digest` of the files in it.

  Raises:
    FileNotFoundError: the folder has no layout of this set.
    ValueError: a file is damaged, has other counts than published, or is an unsafe pickle.
  """
  folder = cache.data_folder(data_set.name, data_dir)
  size = data_set.size if size is None else size
  layout = _layout(data_set, folder)
  layouts.check_splits(folder, layout)
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
  check_disjoint(data_set.title, result)
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


def check_disjoint(title: str, splits: Mapping[str, Images]) -> None:
  """Raise ValueError if a class is in two splits."""
  named = [{name.strip() for name in part.names} for part in splits.values()]
  shared = (named[0] & named[1]) | (named[0] & named[2]) | (named[1] & named[2])
  if shared:
    raise ValueError(f"{title} wants splits without a class in common; got {sorted(shared)[:5]}.")


def problem(
  title: str, splits: Mapping[str, Images], shape: few_shot.FewShot, chosen_by: str
) -> Problem:
  """Return N-way K-shot episodes of all classes of a split.

  Args:
    title: the name of the data in results.
    splits: the classes for train, val and test.
    shape: the shape of the episodes.
    chosen_by: the author or method of the split.
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
  """Return N-way K-shot episodes of the published split; `load` describes the arguments."""
  splits = load(data_set, data_dir, size, cache_dir)
  return problem(data_set.title, splits, shape, "the standard split")
