"""N-way K-shot episodes of characters: drawn, distorted and addressed by index on the device.

Episode i of a key is a pure function of `fold_in(key, i)`, so the same index is the same episode
on a laptop and on a pod, whatever the batch it is drawn in.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.datasets import characters as characters_lib
from shrinkmeta import Batch, Task


@dataclasses.dataclass(frozen=True)
class EpisodeConfig:
  """The shape of an episode, and how far its pictures are distorted."""

  ways: int = 20  # classes, all of one writing system
  shots: int = 5  # train examples of each class
  queries: int = 5  # val examples of each class
  size: int = 16  # height and width of the pictures
  rotation_degrees: float = 20.0  # angles are uniform in +- this
  translation: float = 0.1  # uniform in +- this part of the picture, in both directions
  scale: tuple[float, float] = (0.8, 1.2)  # uniform between these
  shear_degrees: float = 10.0  # uniform in +- this
  stroke: float = 0.5  # 0 leaves the strokes, 1 makes them up to a stored pixel thicker or thinner
  augment_val: bool = True  # whether val examples are distorted too

  def __post_init__(self):
    low, high = self.scale
    for ok, wanted in (
      (self.ways >= 2, "ways >= 2"),
      (self.shots >= 1 and self.queries >= 1, "shots >= 1 and queries >= 1"),
      (self.size >= 4, "size >= 4"),
      (0 <= self.rotation_degrees <= 180, "rotation_degrees in [0, 180]"),
      (0 <= self.translation <= 0.5, "translation in [0, 0.5]"),
      (0 < low <= high, "scale (low, high) with 0 < low <= high"),
      (0 <= self.shear_degrees <= 45, "shear_degrees in [0, 45]"),
      (0 <= self.stroke <= 1, "stroke in [0, 1]"),
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
  """Characters on the device: K of them, up to R renderings each, S systems of at most C."""

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


def sample_tasks(
  config: EpisodeConfig, pool: Pool, key: jax.Array, start: jax.typing.ArrayLike, num_tasks: int
) -> Task:
  """Episodes `start` to `start + num_tasks - 1` of `key`.

  An episode draws a writing system uniformly, `ways` distinct characters of it, and
  `shots + queries` renderings of each. These are distinct where a character has as many, so that
  train and val of Omniglot never share a drawing. Where it has fewer, all of them are taken in
  turn, in random order: then train and val may show one rendering under two distortions.

  Args:
    config: static.
    pool: from `device_pool`.
    key: the same for all episodes of a run; it is folded with the index, never split.
    start: [] index of the first episode, may be traced.
    num_tasks: T, static.

  Returns:
    Task of Batch(inputs [T, N, size, size, 1] float32 in [0, 1], ink = 1; targets [T, N] int32 in
    [0, ways)), where N is ways * shots for train and ways * queries for val, class by class.
  """
  if config.ways > pool.smallest:
    raise ValueError(
      f"Episodes want {config.ways} ways, but a writing system of the pool has only "
      f"{pool.smallest} characters. Lower `ways`, or drop the small systems: "
      f"device_pool(characters.with_at_least(data, {config.ways}))."
    )
  if config.size > min(pool.images.shape[2:]):
    raise ValueError(
      f"Episodes want {config.size} x {config.size} pixels of stored {pool.images.shape[2:]}. "
      "Lower `size`, or load the characters at a larger one."
    )
  if num_tasks < 1:
    raise ValueError(f"sample_tasks wants num_tasks >= 1; got {num_tasks}.")
  indices = jnp.asarray(start).astype(jnp.uint32) + jnp.arange(num_tasks, dtype=jnp.uint32)
  return jax.vmap(lambda i: _episode(config, pool, jax.random.fold_in(key, i)))(indices)


def _episode(config: EpisodeConfig, pool: Pool, key: jax.Array) -> Task:
  system_key, class_key, rendering_key, augment_key = jax.random.split(key, 4)
  system = jax.random.randint(system_key, [], 0, pool.sizes.shape[0])
  classes = pool.members[system, _choose(class_key, pool.sizes[system], pool.members.shape[1])]
  classes = classes[: config.ways]  # [ways]
  counts = pool.counts[classes]
  order = jax.vmap(lambda k, n: _choose(k, n, pool.images.shape[1]))(
    jax.random.split(rendering_key, config.ways), counts
  )  # [ways, R]
  turns = jnp.arange(config.shots + config.queries) % counts[:, None]
  chosen = jnp.take_along_axis(order, turns, axis=1)  # [ways, shots + queries]
  images = pool.images[classes[:, None], chosen].astype(jnp.float32) / 255.0

  draws = jax.random.uniform(augment_key, [*chosen.shape, 6], minval=-1.0, maxval=1.0)
  distortions = jax.vmap(jax.vmap(functools.partial(_distortion, config)))(draws)
  if not config.augment_val:
    is_val = jnp.arange(chosen.shape[1]) >= config.shots
    identity = Distortion(jnp.zeros([]), jnp.eye(2), jnp.zeros([2]))
    distortions = jax.tree.map(
      lambda d, same: jnp.where(jnp.expand_dims(is_val, range(1, d.ndim - 1)), same, d),
      distortions,
      identity,
    )
  distort = functools.partial(_distort, config.size)
  images = jax.vmap(jax.vmap(distort))(images, distortions)[..., None]

  def batch(part: jax.Array) -> Batch:
    targets = jnp.repeat(jnp.arange(config.ways, dtype=jnp.int32), part.shape[1])
    return Batch(part.reshape(-1, *part.shape[2:]), targets)

  return Task(batch(images[:, : config.shots]), batch(images[:, config.shots :]))


def _choose(key: jax.Array, count: jax.Array, limit: int) -> jax.Array:
  """[limit] a random order of range(limit) whose first `count` entries are range(count)'s."""
  padding = jnp.arange(limit) >= count
  return jnp.argsort(jax.random.uniform(key, [limit]) + padding)


class Distortion(NamedTuple):
  """What happens to one picture, with coordinates (y, x) centred and in units of its side.

  What was at p is then found at scale * R(angle) @ [[1, 0], [shear, 1]] @ p + shift.
  """

  stroke: jax.Array  # [] in [-1, 1], thinner or thicker
  inverse: jax.Array  # [2, 2] from where something is to where it was, after the shift
  shift: jax.Array  # [2]


def _distortion(config: EpisodeConfig, draws: jax.Array) -> Distortion:
  """The distortion that `draws` [6], each in [-1, 1], stand for."""
  stroke, angle, shear, scale = draws[:4]
  low, high = config.scale
  scale = 0.5 * (low + high) + 0.5 * (high - low) * scale
  angle = jnp.deg2rad(config.rotation_degrees) * angle
  shear = jnp.tan(jnp.deg2rad(config.shear_degrees) * shear)
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  unshear = jnp.stack([jnp.ones_like(shear), jnp.zeros_like(shear), -shear, jnp.ones_like(shear)])
  unrotate = jnp.stack([cos, sin, -sin, cos])
  inverse = unshear.reshape(2, 2) @ unrotate.reshape(2, 2) / scale
  return Distortion(config.stroke * stroke, inverse, config.translation * draws[4:])


def _distort(size: int, image: jax.Array, distortion: Distortion) -> jax.Array:
  """One picture [H, W] -> [size, size], strokes first, then the affine map."""
  thick = _thicken(image, distortion.stroke)
  return _resample(thick, size, distortion.inverse, distortion.shift)


def _thicken(image: jax.Array, amount: jax.Array) -> jax.Array:
  """Blends an image [H, W] with its grey dilation (amount 1) or erosion (amount -1), 3 x 3."""
  sign = jnp.where(amount < 0, -1.0, 1.0)  # erosion is dilation of the negative
  wide = sign * image
  for window in ((3, 1), (1, 3)):
    wide = jax.lax.reduce_window(wide, -jnp.inf, jax.lax.max, window, (1, 1), "SAME")
  return image + jnp.abs(amount) * (sign * wide - image)


def _resample(image: jax.Array, size: int, inverse: jax.Array, shift: jax.Array) -> jax.Array:
  """[size, size] pixels of an image [H, W] moved by a `Distortion`; outside of it is paper."""
  # A mean over as many stored pixels as a new one covers comes before sampling, against aliasing.
  # A product of matrices, as XLA fuses plain sums into the sampling and redoes them for each pixel.
  width = max(1, round(image.shape[0] / size))
  means = [jnp.tri(n + width - 1, n) - jnp.tri(n + width - 1, n, -width) for n in image.shape]
  smooth = jnp.linalg.multi_dot(
    [means[0] / width, image, means[1].T / width], precision=jax.lax.Precision.HIGHEST
  )
  grid = (jnp.arange(size) + 0.5) / size - 0.5
  y, x = jnp.meshgrid(grid - shift[0], grid - shift[1], indexing="ij")
  y, x = (inverse[i, 0] * y + inverse[i, 1] * x for i in (0, 1))
  # Pixel i is centred at (i + 1/2) / H - 1/2; the padded mean has its pixels (width - 1) / 2 on.
  rows, columns = (
    (p + 0.5) * n - 0.5 + 0.5 * (width - 1) for p, n in ((y, image.shape[0]), (x, image.shape[1]))
  )
  return jax.scipy.ndimage.map_coordinates(smooth, [rows, columns], order=1, mode="constant")


def contact_sheet(task: Task) -> np.ndarray:
  """One episode as a grey picture [height, width] uint8: a class a row, train left, val right.

  For looking at: `PIL.Image.fromarray(contact_sheet(task)).save("episode.png")`.
  """
  if np.ndim(task.train.inputs) != 4:
    raise ValueError(
      f"contact_sheet wants one task with inputs [N, H, W, 1]; got {task.train.inputs.shape}. "
      "Of a batch of tasks take one: jax.tree.map(lambda leaf: leaf[0], tasks)."
    )
  sides = []
  for batch in task:
    images = np.asarray(batch.inputs)[..., 0]
    ways = int(np.max(np.asarray(batch.targets))) + 1
    images = images[np.argsort(np.asarray(batch.targets), kind="stable")]
    cells = np.pad(1.0 - images, ((0, 0), (0, 1), (0, 1)), constant_values=0.7)
    n, height, width = cells.shape
    sheet = cells.reshape(ways, n // ways, height, width).transpose(0, 2, 1, 3)
    sides.append(sheet.reshape(ways * height, -1))
  gap = np.zeros((len(sides[0]), 3))
  return np.rint(255 * np.clip(np.hstack([sides[0], gap, sides[1]]), 0, 1)).astype(np.uint8)
