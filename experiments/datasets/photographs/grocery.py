"""Grocery Store at 84 x 84: smartphone photographs of fruit, vegetables and cartons, 81 classes.

The task is hard, because many classes differ only in the print on a carton. The split into 47/13/21
classes comes with the files, and no coarse class is in two parts. The original split is by
photograph. Here all photographs of a class are used.

References: Klasson, Zhang and Kjellstrom, A hierarchical grocery store image dataset with visual
  and semantic labels, WACV 2019.
"""

import pathlib

from experiments.datasets import few_shot
from experiments.datasets.files import cache, images, layouts
from experiments.datasets.files.images import Counts, Images, Listing
from experiments.datasets.photographs import photographs
from experiments.datasets.source import Problem

COUNTS = {
  "train": Counts(47, 3_113, 35, 143),
  "val": Counts(13, 1_119, 48, 134),
  "test": Counts(21, 1_189, 40, 97),
}
SIZE = 84  # pixels in the files

_VERSION = 2  # of the pictures made here; another number makes caches of the old ones void
_FILES = ("classes.csv", "index.csv", "images.zip")


def load(
  data_dir: cache.Folder | None = None,
  size: int = SIZE,
  cache_dir: cache.Folder | None = None,
) -> dict[str, Images]:
  """Return the train, val and test classes.

  Args:
    data_dir: the folder of classes.csv, index.csv and images.zip; default
      $SHRINKMETA_DATA/grocery84.
    size: height and width in pixels; 32 suits a CPU.
    cache_dir: see `cache.cached`; "" switches the cache off.
  """
  folder = cache.data_folder("grocery84", data_dir)
  files = [folder / name for name in _FILES]
  if missing := [str(file) for file in files if not file.is_file()]:
    raise FileNotFoundError(f"Grocery Store wants {', '.join(missing)}. Give another data_dir.")
  digest = layouts.digest(files)[:16]
  result = {}
  for split in layouts.SPLITS:
    name = f"grocery_{split}_v{_VERSION}_{size}_{digest}"
    result[split] = images.cached(cache_dir, name, lambda s=split: _build(folder, s, size))
  photographs.check_disjoint("Grocery Store", result)
  return result


def _build(folder: pathlib.Path, split: str, size: int) -> Images:
  table = cache.read_csv(folder / "classes.csv", ("fine_label", "fine_name", "few_shot_split"))
  classes = {row["fine_label"]: row for row in table}
  rows = cache.read_csv(folder / "index.csv", ("member", "fine_label"))
  layouts.check_distinct(folder / "index.csv", [row["member"] for row in rows], zipped=True)
  with cache.damaged(f"{folder}/index.csv or classes.csv"):  # a label in one of them only
    chosen = [r for r in rows if classes[r["fine_label"]]["few_shot_split"] == split]
    name = lambda label: f"{int(label):02} {classes[label]['fine_name']}"
    labels = [name(row["fine_label"]) for row in chosen]
  images.check_counts(f"Grocery Store, {folder}, {split},", labels, COUNTS[split])
  read = layouts.from_zip(folder / "images.zip")
  listing = Listing(labels, lambda m: read(chosen[m]["member"]))
  return images.build(listing, size, f"grocery {split}")


def problem(
  shape: few_shot.FewShot = few_shot.FewShot(),
  data_dir: cache.Folder | None = None,
  size: int = SIZE,
  cache_dir: cache.Folder | None = None,
) -> Problem:
  """Return N-way K-shot episodes; `load` describes the arguments."""
  splits = load(data_dir, size, cache_dir)
  return photographs.problem("Grocery Store", splits, shape, "seeded, by coarse class")
