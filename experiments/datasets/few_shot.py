"""N-way K-shot episodes of picture classes, drawn on the device."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.datasets.source import Source
from shrinkmeta import Batch, Task


@dataclasses.dataclass(frozen=True)
class FewShot:
  """The shape of an episode."""

  ways: int = 5  # distinct classes
  shots: int = 1  # train pictures of each class
  queries: int = 15  # val pictures of each class, none of them a train picture
  turns: bool = False  # each class of an episode turned by 0, 90, 180 or 270 degrees


class Pool(NamedTuple):
  """K classes on the device; class k has the pictures starts[k] to starts[k] + counts[k] - 1."""

  images: jax.Array  # [M, H, W, C] uint8
  starts: jax.Array  # [K] int32
  counts: jax.Array  # [K] int32


@dataclasses.dataclass(frozen=True)
class _Config:
  shape: FewShot
  most: int  # pictures of the largest class


def source(shape: FewShot, images: np.ndarray, counts: np.ndarray) -> Source:
  """Return endless episodes.

  An episode draws `ways` distinct classes, labels them in random order, and draws
  `shots + queries` distinct pictures of each. With `turns`, all pictures of a class are turned by
  the same random multiple of 90 degrees. This makes 4 K classes out of K, and no
  episode has two classes that are turns of each other.

  Args:
    shape: the shape of the episodes.
    images: [M, H, W, C] uint8, class by class.
    counts: [K], the number of pictures of each class; the sum is M.

  Returns:
    A source of Batch(inputs [T, N, H, W, C] float32 in [0, 1], targets [T, N] int32 in [0, ways)),
    where N is ways * shots for train and ways * queries for val, class by class.
  """
  counts = np.asarray(counts, np.int32)
  need = shape.shots + shape.queries
  for ok, wanted, got in (
    (images.ndim == 4 and images.dtype == np.uint8, "images [M, H, W, C] uint8", images.shape),
    (counts.ndim == 1 and counts.sum() == len(images), "counts that sum to M", counts.sum()),
    (2 <= shape.ways <= len(counts), f"2 to {len(counts)} ways, the number of classes", shape),
    (shape.shots >= 1 and shape.queries >= 1, "shots >= 1 and queries >= 1", shape),
    (counts.min() >= need, f"{need} = shots + queries pictures of a class", counts.min()),
    (
      not shape.turns or images.shape[1] == images.shape[2],
      "square pictures to turn",
      images.shape,
    ),
  ):
    if not ok:
      raise ValueError(f"Episodes want {wanted}; got {got}. Change the FewShot, or the data.")
  starts = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int32)
  pool = Pool(jnp.asarray(images), jnp.asarray(starts), jnp.asarray(counts))
  return Source(_episode, _Config(shape, int(counts.max())), pool)


def _episode(config: _Config, pool: Pool, number: jax.Array, key: jax.Array) -> Task:
  del number  # every index is another episode
  shape = config.shape
  class_key, picture_key, turn_key = jax.random.split(key, 3)
  classes = jax.random.permutation(class_key, len(pool.counts))[: shape.ways]
  order = jax.vmap(lambda k, count: choose(k, count, config.most))(
    jax.random.split(picture_key, shape.ways), pool.counts[classes]
  )
  chosen = pool.starts[classes][:, None] + order[:, : shape.shots + shape.queries]
  images = pool.images[chosen].astype(jnp.float32) / 255.0
  if shape.turns:
    images = jax.vmap(turn)(images, jax.random.randint(turn_key, [shape.ways], 0, 4))
  return Task(by_class(images[:, : shape.shots]), by_class(images[:, shape.shots :]))


def turn(images: jax.Array, quarters: jax.Array) -> jax.Array:
  """Turn [..., H, H, C] counter-clockwise by `quarters` [] times 90 degrees, 0 to 3."""
  turned = [functools.partial(jnp.rot90, k=k, axes=(-3, -2)) for k in range(4)]
  return jax.lax.switch(quarters, turned, images)


def by_class(images: jax.Array) -> Batch:
  """Return pictures [ways, n, ...] as a Batch of ways * n examples, labelled by the first axis."""
  ways, n, *rest = images.shape
  targets = jnp.repeat(jnp.arange(ways, dtype=jnp.int32), n)
  return Batch(images.reshape(ways * n, *rest), targets)


def choose(key: jax.Array, count: jax.Array, limit: int) -> jax.Array:
  """Return a random order of range(limit), [limit], that begins with the numbers below `count`."""
  padding = jnp.arange(limit) >= count
  return jnp.argsort(jax.random.uniform(key, [limit]) + padding)
