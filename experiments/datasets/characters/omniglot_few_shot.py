"""Few-shot Omniglot: 1,200 characters for training and 423 for tests, all alphabets mixed.

The split is a seeded shuffle of all 1,623 characters. Published figures use other shuffles, which
were not published. The last 100 of the 1,200 characters are for validation, as in MAML, and 1,100
are for training.

A character turned by 90, 180 or 270 degrees is a class of its own. No two classes of an episode are
turns of one character, as in MAML. Reptile allows it in training. MAML also turns test characters,
and Reptile does not (`turn_test=False`).

References: Santoro et al., Meta-learning with memory-augmented neural networks, ICML 2016. Vinyals
  et al., Matching networks for one shot learning, NeurIPS 2016.
"""

import dataclasses

import numpy as np

from experiments.datasets import few_shot
from experiments.datasets.characters import characters, omniglot
from experiments.datasets.files import cache
from experiments.datasets.source import Problem, Protocol, Source

TRAIN = 1_200  # characters, those for validation included
VALIDATION = 100


def problem(
  shape: few_shot.FewShot = few_shot.FewShot(queries=15, turns=True),
  size: int = 28,
  turn_test: bool = True,
  seed: int = 0,
  data_dir: cache.Folder | None = None,
  cache_dir: cache.Folder | None = None,
) -> Problem:
  """Return N-way K-shot episodes.

  Args:
    shape: the shape of the episodes; with `turns` a character makes four classes.
    size: height and width in pixels.
    turn_test: False keeps validation and test characters upright.
    seed: fixes the split.
    data_dir: the folder of Omniglot's two archives; default $SHRINKMETA_DATA/omniglot.
    cache_dir: see `cache.cached`.
  """
  folder = cache.data_folder("omniglot", data_dir)
  data = characters.merge(*omniglot.load(folder, size, cache_dir))
  train, validation, test = split(len(data.names), seed)
  upright = dataclasses.replace(shape, turns=shape.turns and turn_test)

  def source(chosen: np.ndarray, shape: few_shot.FewShot) -> Source:
    images = data.images[chosen].reshape(-1, size, size, 1)
    return few_shot.source(shape, images, data.counts[chosen])

  turned = {True: "all classes turned", False: "training classes turned"}[turn_test]
  protocol = Protocol(
    data=f"Omniglot, all alphabets mixed, {size} x {size} pixels",
    split=f"{len(train)} characters to train, {len(validation)} validation, {len(test)} test, "
    f"seed {seed}",
    ways=shape.ways,
    shots=shape.shots,
    queries=shape.queries,
    augmentation=f"{turned} by multiples of 90°" if shape.turns else "none",
    evaluation="endless episodes of the validation or test characters, by index",
  )
  return Problem(
    source(train, shape),
    source(validation, upright),
    source(test, upright),
    "categorical",
    shape.ways,
    (size, size, 1),
    protocol,
  )


def split(characters: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Return the characters for training, validation and tests."""
  if characters <= TRAIN:
    raise ValueError(f"Few-shot Omniglot wants more than {TRAIN} characters; got {characters}.")
  order = np.random.default_rng(seed).permutation(characters)
  train, validation, test = np.split(order, [TRAIN - VALIDATION, TRAIN])
  return train, validation, test
