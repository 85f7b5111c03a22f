"""N-way K-shot episodes of characters from one writing system, distorted on the device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from experiments.datasets import distortions as distortions_lib
from experiments.datasets.characters import characters as characters_lib
from experiments.datasets.few_shot import by_class, choose
from experiments.datasets.source import Source
from shrinkmeta import Task


@dataclasses.dataclass(frozen=True)
class EpisodeConfig:
  """The shape of an episode, and how far its pictures are distorted."""

  ways: int = 20  # classes, all of one writing system
  shots: int = 5  # train examples of each class
  queries: int = 5  # val examples of each class
  size: int = 16  # height and width of the pictures
  distortions: distortions_lib.Distortions = distortions_lib.Distortions()

  def __post_init__(self):
    for ok, wanted in (
      (self.ways >= 2, "ways >= 2"),
      (self.shots >= 1 and self.queries >= 1, "shots >= 1 and queries >= 1"),
      (self.size >= 4, "size >= 4"),
    ):
      if not ok:
        raise ValueError(f"An episode wants {wanted}; got {self}. Change the EpisodeConfig.")


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("images", "counts", "members", "sizes"),
  meta_fields=("smallest",),
)
@dataclasses.dataclass(frozen=True)
class Pool:
  """K characters on the device, up to R renderings each; S systems of at most C characters."""

  images: jax.Array  # [K, R, H, W] uint8
  counts: jax.Array  # [K] int32
  members: jax.Array  # [S, C] int32, characters of a system, padded with 0
  sizes: jax.Array  # [S] int32, characters that are no padding
  smallest: int  # min(sizes), known at trace time


def device_pool(characters: characters_lib.Characters) -> Pool:
  """Puts `characters` on the default device, or wherever the result is sent by device_put."""
  characters_lib.check(characters)
  sizes = np.bincount(characters.system, minlength=len(characters.systems)).astype(np.int32)
  members = np.zeros((len(sizes), sizes.max()), np.int32)
  for s, size in enumerate(sizes):
    members[s, :size] = np.flatnonzero(characters.system == s)
  return Pool(
    jnp.asarray(characters.images),
    jnp.asarray(characters.counts),
    jnp.asarray(members),
    jnp.asarray(sizes),
    int(sizes.min()),
  )


def source(
  config: EpisodeConfig, characters: characters_lib.Characters, in_turn: bool = False
) -> Source:
  """Return endless episodes of `characters`.

  An episode draws a writing system uniformly, or takes the next one with `in_turn`. It draws `ways`
  distinct characters of the system, and `shots + queries` renderings of each character. Each
  rendering is used once if the character has enough of them. So train and val of Omniglot never
  share a drawing. If it has fewer, renderings are repeated, and train and val may show one
  rendering under two distortions.

  Returns:
    A source of Batch(inputs [T, N, size, size, 1] float32 in [0, 1], ink = 1; targets [T, N] int32
    in [0, ways)), where N is ways * shots for train and ways * queries for val, class by class.
  """
  pool = device_pool(characters)
  if config.ways > pool.smallest:
    raise ValueError(
      f"Episodes want {config.ways} ways, but a writing system has only {pool.smallest} "
      "characters. Lower `ways`, or drop the small systems: "
      f"characters.with_at_least(data, {config.ways})."
    )
  if config.size > min(pool.images.shape[2:]):
    raise ValueError(
      f"Episodes want {config.size} x {config.size} pixels of stored {pool.images.shape[2:]}. "
      "Lower `size`, or load the characters at a larger one."
    )
  draw = _episode_of if in_turn else _episode
  return Source(draw, config, pool, tasks=len(pool.sizes) if in_turn else None)


def _episode(config: EpisodeConfig, pool: Pool, number: jax.Array, key: jax.Array) -> Task:
  del number  # every index is another episode
  system = jax.random.randint(jax.random.split(key, 4)[0], [], 0, pool.sizes.shape[0])
  return _episode_of(config, pool, system, key)


def _episode_of(config: EpisodeConfig, pool: Pool, system: jax.Array, key: jax.Array) -> Task:
  """An episode of one writing system."""
  _, class_key, rendering_key, augment_key = jax.random.split(key, 4)
  classes = pool.members[system, choose(class_key, pool.sizes[system], pool.members.shape[1])]
  classes = classes[: config.ways]  # [ways]
  counts = pool.counts[classes]
  order = jax.vmap(lambda k, n: choose(k, n, pool.images.shape[1]))(
    jax.random.split(rendering_key, config.ways), counts
  )  # [ways, R]
  turns = jnp.arange(config.shots + config.queries) % counts[:, None]
  chosen = jnp.take_along_axis(order, turns, axis=1)  # [ways, shots + queries]
  images = pool.images[classes[:, None], chosen].astype(jnp.float32) / 255.0

  draws = jax.random.uniform(
    augment_key, [*chosen.shape, distortions_lib.DRAWS], minval=-1.0, maxval=1.0
  )
  from_draws = functools.partial(distortions_lib.from_draws, config.distortions)
  drawn = jax.vmap(jax.vmap(from_draws))(draws)
  distort = functools.partial(distortions_lib.distort, config.size)
  images = jax.vmap(jax.vmap(distort))(images, drawn)[..., None]

  return Task(by_class(images[:, : config.shots]), by_class(images[:, config.shots :]))
