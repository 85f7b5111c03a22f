"""Omniglot with one alphabet as a task: long adaptation with augmentation, or small data without.

The protocol is that of Leap and WarpGrad. It takes the alphabets with 20 characters or more, and
shuffles them by a seed. The first T are for training, the next 10 for tests, and the rest for
validation. A task is one alphabet with 20 fixed characters. It has 15 fixed drawings of each
character to adapt on, and 5 others to evaluate on. Every picture is rotated, moved and scaled at
random whenever it is used, also in the evaluation.

What differs from the original:
- The original distorts every batch anew. Here each draw of a task makes `copies` distorted copies
  of its drawings, and mini-batches (`sm.Inner(batch_size=20)`) come from these copies. The default
  is 7 copies, because 100 steps of 20 pictures use each of 300 drawings 6.7 times. Steps draw with
  replacement, so about 1,290 of 2,000 drawn pictures are distinct. Later steps use the same 2,100
  copies. In exchange, the objective of a task is one fixed function with a mode, which the implicit
  gradients need. A pass over all data of a task costs `copies` times as much.
- The mask gives each copy the weight 1 / copies, so that the likelihood counts 300 examples.
  `batch_size` must then be at least `copies`.
- Pictures are resampled bilinearly, and pixels outside a picture are paper. The original takes the
  nearest pixel, and pixels outside are black, the colour of ink. Ink is 1 here and 0 in the
  original.
- The original holds out the first 5 listed drawings of a character. Here a seed draws the 5.
- Here each training alphabet occurs once in every round, and the order is random. In the original,
  alphabets are distinct within a meta-batch only.

Without augmentation (`augment=False`) nothing in a task is random, and `copies` is 1. A task takes
the first K of the 15 drawings, so the data for K = 5 are a part of the data for K = 10.

References: Flennerhag et al., Transferring knowledge across learning processes, ICLR 2019, and
  Meta-learning with warped gradient descent, ICLR 2020.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from experiments.datasets import distortions
from experiments.datasets.characters import characters, omniglot
from experiments.datasets.few_shot import by_class
from experiments.datasets.files import cache
from experiments.datasets.source import Problem, Protocol, Source
from shrinkmeta import Batch, Task

WAYS = 20
DRAWINGS = 15  # of a character to adapt on
HELD_OUT = 5  # others to evaluate on
TEST = 10  # alphabets
COPIES = 7
AUGMENTATION = distortions.Distortions(
  rotation_degrees=180.0, translation=0.2, scale=(0.8, 1.2), shear_degrees=0.0, stroke=0.0
)


@dataclasses.dataclass(frozen=True)
class _Config:
  shots: int
  size: int
  copies: int
  augmentation: distortions.Distortions | None
  relabel: bool


def problem(
  train_alphabets: int = 25,
  shots: int = DRAWINGS,
  augment: bool = True,
  relabel: bool = False,
  size: int = 28,
  copies: int | None = None,
  seed: int = 0,
  data_dir: cache.Folder | None = None,
  cache_dir: cache.Folder | None = None,
) -> Problem:
  """Return tasks of 20 characters of one alphabet; validation or test task i is alphabet i.

  Settings chosen on the validation alphabets of one T may be used for any smaller T, whose test
  alphabets are not among these. But the trials of the search may have trained on its test
  alphabets. With T = 25 in the trials and T = 10 in the run, they trained on all of them. No
  network and no score of a trial is kept. Still, the rates were then chosen with the help of test
  alphabets.

  Args:
    train_alphabets: T, from 1 to the number of alphabets with 20 characters minus 11.
    shots: K, the number of drawings of each character to adapt on, 1 to 15.
    augment: whether pictures are distorted, both to adapt on and to evaluate on.
    relabel: whether the characters of a training alphabet are numbered anew in every draw. If they
      keep their numbers, phi can memorise all training alphabets.
    size: height and width in pixels.
    copies: the number of distorted copies of each drawing to adapt on; the default is 7 with
      `augment` and 1 without.
    seed: fixes the order of the alphabets, their 20 characters, and the drawings held out.
    data_dir: the folder of Omniglot's two archives; default $SHRINKMETA_DATA/omniglot.
    cache_dir: see `cache.cached`.
  """
  copies = (COPIES if augment else 1) if copies is None else copies
  for ok, wanted, got in (
    (1 <= shots <= DRAWINGS, f"shots of 1 to {DRAWINGS}", shots),
    (copies >= 1 and (augment or copies == 1), "copies >= 1, and 1 without augmentation", copies),
  ):
    if not ok:
      raise ValueError(f"An alphabet wants {wanted}; got {got}.")
  # Distorted pictures are sampled from stored ones twice as large, against blur.
  folder = cache.data_folder("omniglot", data_dir)
  stored = min(2 * size, omniglot.SIDE) if augment else size
  names, drawings = arrange(characters.merge(*omniglot.load(folder, stored, cache_dir)), seed)
  if not 1 <= train_alphabets < len(names) - TEST:
    raise ValueError(
      f"Of {len(names)} alphabets 1 to {len(names) - TEST - 1} may train, {TEST} test and the rest "
      f"validate; got train_alphabets = {train_alphabets}."
    )
  augmentation = AUGMENTATION if augment else None

  def source(part: np.ndarray, train: bool) -> Source:
    config = _Config(shots, size, copies, augmentation, relabel and train)
    return Source(_task, config, jnp.asarray(part), len(part), shuffle=train)

  train, test, validation = np.split(drawings, [train_alphabets, train_alphabets + TEST])
  protocol = Protocol(
    data=f"Omniglot, a task an alphabet, {size} x {size} pixels",
    split=f"{len(train)} alphabets to train, {len(validation)} validation, {TEST} test of "
    f"{len(names)} with {WAYS} characters or more, seed {seed}",
    ways=WAYS,
    shots=shots,
    queries=HELD_OUT,
    augmentation=(f"{augmentation}; {copies} copies to adapt on" if augmentation else "none")
    + ("; training alphabets numbered anew" if relabel else ""),
    evaluation="a finite list: each validation or test alphabet once, then again"
    + (", distorted anew" if augment else ""),
  )
  return Problem(
    source(train, True),
    source(validation, False),
    source(test, False),
    "categorical",
    WAYS,
    (size, size, 1),
    protocol,
  )


def arrange(data: characters.Characters, seed: int) -> tuple[tuple[str, ...], np.ndarray]:
  """Return (names [A], drawings [A, 20, 20, H, W]) of the large enough alphabets, shuffled.

  Each alphabet has 20 random characters, each with its 20 drawings in random order. The first 15
  are to adapt on. The result depends on the seed only, and not on the number of training alphabets.
  """
  data = characters.with_at_least(data, WAYS)
  if data.images.shape[1] != DRAWINGS + HELD_OUT or data.counts.min() < DRAWINGS + HELD_OUT:
    raise ValueError(
      f"An alphabet wants {DRAWINGS + HELD_OUT} drawings of each character; got {data.counts}."
    )
  random = np.random.default_rng(seed)
  names = sorted(data.systems)
  drawings = []
  for name in names:
    own = np.flatnonzero(data.system == data.systems.index(name))
    chosen = random.permutation(own)[:WAYS]
    order = random.permuted(np.tile(np.arange(DRAWINGS + HELD_OUT), (WAYS, 1)), axis=1)
    drawings.append(data.images[chosen[:, None], order])
  order = random.permutation(len(names))
  return tuple(names[i] for i in order), np.stack(drawings)[order]


def _task(config: _Config, drawings: jax.Array, number: jax.Array, key: jax.Array) -> Task:
  images = drawings[number].astype(jnp.float32) / 255.0  # [20, 20, H, W]
  if config.relabel:
    images = jax.random.permutation(jax.random.fold_in(key, 2), images)
  train_key, val_key = jax.random.split(key)
  shown = jnp.repeat(images[:, : config.shots], config.copies, axis=1)
  train = _batch(config, train_key, shown)
  if config.copies > 1:
    train = train._replace(mask=jnp.full(train.targets.shape, 1.0 / config.copies))
  return Task(train, _batch(config, val_key, images[:, DRAWINGS:]))


def _batch(config: _Config, key: jax.Array, images: jax.Array) -> Batch:
  """Return drawings [20, n, H, W] as a Batch of distorted pictures."""
  ways, n, *stored = images.shape
  flat = images.reshape(ways * n, *stored)
  flat = distortions.randomly(key, config.augmentation, flat, config.size)
  return by_class(flat.reshape(ways, n, config.size, config.size, 1))
