"""Tasks of characters from one writing system; tests use systems that training has not seen.

These are the data of the main job, `experiments.glyphs`. The characters are drawn from fonts, or
are Omniglot's.
"""

from collections.abc import Callable

from experiments.datasets.characters import characters, episodes, glyphs, omniglot
from experiments.datasets.files import cache
from experiments.datasets.source import Problem, Protocol

Splits = dict[str, characters.Characters]


def _glyphs(data_dir: cache.Folder | None) -> Splits:
  if data_dir is not None:
    raise ValueError("Glyphs are drawn, not read: leave --data_dir out, or add --dataset=omniglot.")
  everything = glyphs.load()
  return {split: characters.select(everything, names) for split, names in glyphs.SPLITS.items()}


def _omniglot(data_dir: cache.Folder | None) -> Splits:
  background, evaluation = omniglot.load(cache.data_folder("omniglot", data_dir))
  kept = [s for s in background.systems if s not in omniglot.VALIDATION]
  return {
    "train": characters.select(background, kept),
    "validation": characters.select(background, omniglot.VALIDATION),
    "test": evaluation,
  }


DATASETS: dict[str, Callable[[cache.Folder | None], Splits]] = {
  "glyphs": _glyphs,
  "omniglot": _omniglot,
}


def load(dataset: str, ways: int, data_dir: cache.Folder | None = None) -> Splits:
  """Return the train, validation and test systems that have at least `ways` characters.

  Args:
    dataset: one of DATASETS.
    ways: the number of characters in a task.
    data_dir: folder of Omniglot's two archives; default $SHRINKMETA_DATA/omniglot.
  """
  if dataset not in DATASETS:
    raise ValueError(f"dataset is one of {', '.join(DATASETS)}; got {dataset!r}.")
  splits = DATASETS[dataset](data_dir)
  return {split: characters.with_at_least(own, ways) for split, own in splits.items()}


def problem(
  dataset: str = "glyphs",
  ways: int = 20,
  shots: int = 3,
  queries: int = 3,
  size: int = 14,
  data_dir: cache.Folder | None = None,
) -> Problem:
  """Return episodes of one writing system; validation and test take the systems in turn.

  Args:
    dataset: one of DATASETS.
    ways: the number of characters in a task.
    shots: examples of each character to adapt on.
    queries: other examples of each character, to evaluate on.
    size: height and width in pixels.
    data_dir: as for `load`.
  """
  splits = load(dataset, ways, data_dir)
  shape = episodes.EpisodeConfig(ways, shots, queries, size)
  source = lambda split: episodes.source(shape, splits[split], in_turn=split != "train")
  counts = {split: len(own.systems) for split, own in splits.items()}
  protocol = Protocol(
    data=f"{dataset}, a task of one writing system, {size} x {size} pixels",
    split=f"{counts['train']} systems to train, {counts['validation']} validation, "
    f"{counts['test']} test",
    ways=ways,
    shots=shots,
    queries=queries,
    augmentation=str(shape.distortions),
    evaluation="a finite list: episodes of each system in turn, drawn anew in every round",
  )
  return Problem(
    source("train"),
    source("validation"),
    source("test"),
    "categorical",
    ways,
    (size, size, 1),
    protocol,
  )
