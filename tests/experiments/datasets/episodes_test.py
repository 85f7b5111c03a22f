"""Tests of the episode sampler."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from experiments.datasets import characters, episodes

PLAIN = episodes.EpisodeConfig(
  ways=3,
  shots=2,
  queries=3,
  size=8,
  rotation_degrees=0.0,
  translation=0.0,
  scale=(1.0, 1.0),
  shear_degrees=0.0,
  stroke=0.0,
)


AUGMENTED = episodes.EpisodeConfig(ways=3, shots=2, queries=3, size=8)
SAMPLE = jax.jit(episodes.sample_tasks, static_argnums=(0, 4))  # compiled once for all tests


def coded(sizes=(4, 6), renderings=5, side=8) -> characters.Characters:
  """Constant pictures, whose value tells the character and the rendering."""
  k = sum(sizes)
  values = 1 + np.arange(k * renderings, dtype=np.uint8).reshape(k, renderings)
  images = np.broadcast_to(values[..., None, None], (k, renderings, side, side)).copy()
  return characters.Characters(
    images,
    np.full(k, renderings, np.int32),
    np.repeat(np.arange(len(sizes)), sizes).astype(np.int32),
    tuple("abcdefgh"[: len(sizes)]),
    tuple(f"c{i}" for i in range(k)),
  )


def decode(batch, renderings=5):
  """(characters [...], renderings [...]) of undistorted coded pictures [..., H, W, 1]."""
  codes = np.rint(255 * np.asarray(batch.inputs)[..., 4, 4, 0]).astype(int) - 1
  return codes // renderings, codes % renderings


def blobs(side=32) -> jnp.ndarray:
  """Two soft spots [side, side], one above and one below to the right."""
  y, x = jnp.meshgrid(*2 * [(jnp.arange(side) + 0.5) / side - 0.5], indexing="ij")
  return jnp.exp(-((y + 0.1) ** 2 + x**2) / 0.005) + jnp.exp(
    -((y - 0.15) ** 2 + (x - 0.1) ** 2) / 0.005
  )


def plain_resample(image, size):
  return episodes._resample(image, size, jnp.eye(2), jnp.zeros(2))


def centre(image):
  """Centre of mass (y, x), as a part of the side, from the middle."""
  image = np.asarray(image, np.float64)
  grid = (np.arange(len(image)) + 0.5) / len(image) - 0.5
  return np.array([image.sum(1) @ grid, image.sum(0) @ grid]) / image.sum()


class DrawTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.pool = episodes.device_pool(coded())
    self.key = jax.random.key(1)

  def plain(self, pool=None, start=0):
    """64 undistorted episodes as characters and renderings [64, ways, shots or queries]."""
    tasks = SAMPLE(PLAIN, pool or self.pool, self.key, start, 64)
    np.testing.assert_array_equal(tasks.train.targets, np.tile([0, 0, 1, 1, 2, 2], (64, 1)))
    np.testing.assert_array_equal(tasks.val.targets, np.tile(np.repeat(range(3), 3), (64, 1)))
    return [[codes.reshape(64, 3, -1) for codes in decode(batch)] for batch in tasks]

  def test_shapes_types_and_range(self):
    tasks = SAMPLE(AUGMENTED, self.pool, self.key, 0, 3)
    chex.assert_shape(tasks.train.inputs, (3, 6, 8, 8, 1))
    chex.assert_shape(tasks.train.targets, (3, 6))
    chex.assert_shape(tasks.val.inputs, (3, 9, 8, 8, 1))
    chex.assert_type([tasks.train.inputs, tasks.train.targets], [jnp.float32, jnp.int32])
    self.assertIsNone(tasks.train.mask)
    self.assertGreaterEqual(jnp.min(tasks.train.inputs), 0.0)
    self.assertLessEqual(jnp.max(tasks.train.inputs), 1.0 + 1e-6)

  def test_classes_are_distinct_characters_of_one_system(self):
    (train, _), (val, _) = self.plain()
    classes = train[:, :, 0]
    np.testing.assert_array_equal(train, np.repeat(classes[..., None], 2, axis=-1))
    np.testing.assert_array_equal(val, np.repeat(classes[..., None], 3, axis=-1))
    for one in classes:
      self.assertLen(set(one), 3)
      self.assertIn(set(one >= 4), ({False}, {True}))
    self.assertEqual(set(classes.ravel()), set(range(10)))

  def test_systems_and_labels_are_uniform(self):
    classes = np.concatenate([self.plain(start=64 * i)[0][0][:, :, 0] for i in range(40)])
    small = classes[:, 0] < 4
    self.assertAlmostEqual(small.mean(), 0.5, delta=4 * 0.5 / np.sqrt(len(small)))
    for way in range(3):
      share = np.bincount(classes[small, way], minlength=4)[:4] / small.sum()
      np.testing.assert_allclose(share, 0.25, atol=5 * np.sqrt(0.25 * 0.75 / small.sum()))

  def test_train_and_val_share_no_rendering_where_there_are_enough(self):
    (_, train), (_, val) = self.plain()
    both = np.sort(np.concatenate([train, val], axis=-1), axis=-1)
    np.testing.assert_array_equal(both, np.broadcast_to(np.arange(5), both.shape))
    self.assertLen(np.unique(train.reshape(-1, 2), axis=0), 20)  # all ordered pairs of five

  def test_few_renderings_are_taken_in_turn_and_never_beyond_counts(self):
    data = coded()
    images = data.images.copy()
    images[:, 3:] = 0
    data = data._replace(images=images, counts=np.full(10, 3, np.int32))
    (_, train), (_, val) = self.plain(episodes.device_pool(data))
    taken = np.concatenate([train, val], axis=-1)
    np.testing.assert_array_equal(
      np.sort(taken[..., :3], axis=-1), np.broadcast_to(np.arange(3), taken[..., :3].shape)
    )
    np.testing.assert_array_equal(taken[..., 3:], taken[..., :2])

  def test_an_episode_depends_on_key_and_index_only(self):
    sample = functools.partial(SAMPLE, AUGMENTED, self.pool)
    one, two, alone = (sample(self.key, *a) for a in ((10, 3), (12, 3), (12, 1)))
    for a, b in ((one, 2), (two, 0)):
      got = jax.tree.map(lambda leaf, b=b: leaf[b : b + 1], a)
      chex.assert_trees_all_equal(got.train.targets, alone.train.targets)
      chex.assert_trees_all_close(got, alone, atol=1e-6)
    self.assertFalse(np.allclose(one.train.inputs[0], one.train.inputs[1], atol=1e-3))
    other = sample(jax.random.key(2), 10, 3)
    self.assertFalse(np.allclose(one.train.inputs, other.train.inputs, atol=1e-3))

  def test_start_may_be_traced_inside_a_loop(self):
    def body(start, _):
      return start + 1, episodes.sample_tasks(AUGMENTED, self.pool, self.key, start, 1)

    _, tasks = jax.jit(lambda: jax.lax.scan(body, jnp.int32(10), length=3))()
    want = SAMPLE(AUGMENTED, self.pool, self.key, 10, 3)
    chex.assert_trees_all_close(jax.tree.map(lambda leaf: leaf[:, 0], tasks), want, atol=1e-6)

  def test_val_may_stay_undistorted(self):
    stored = np.random.default_rng(0).integers(1, 255, (10, 5, 8, 8), dtype=np.uint8)
    pool = episodes.device_pool(coded()._replace(images=stored))
    task = SAMPLE(dataclasses.replace(AUGMENTED, augment_val=False), pool, self.key, 0, 1)
    stored = stored.reshape(-1, 64) / 255.0
    for batch, same in ((task.train, False), (task.val, True)):
      off = np.abs(np.asarray(batch.inputs).reshape(-1, 1, 64) - stored).max(axis=2).min(axis=1)
      np.testing.assert_array_equal(off < 1e-5, same)

  @parameterized.parameters(
    dict(ways=1),
    dict(queries=0),
    dict(shots=0),
    dict(size=2),
    dict(scale=(1.2, 0.8)),
    dict(scale=(0.0, 1.0)),
    dict(stroke=1.5),
    dict(rotation_degrees=-1.0),
    dict(translation=0.9),
    dict(shear_degrees=80.0),
  )
  def test_config_refuses(self, **kwargs):
    with self.assertRaisesRegex(ValueError, f"{next(iter(kwargs))}.*Change the EpisodeConfig"):
      episodes.EpisodeConfig(**kwargs)

  @parameterized.parameters(
    (dict(ways=5), 1, "5 ways.*only 4"), (dict(size=9), 1, "9 x 9"), ({}, 0, "num_tasks")
  )
  def test_sampling_refuses_while_tracing(self, change, num_tasks, message):
    config = dataclasses.replace(PLAIN, **change)
    with self.assertRaisesRegex(ValueError, message):
      jax.eval_shape(
        functools.partial(episodes.sample_tasks, config, num_tasks=num_tasks),
        self.pool,
        self.key,
        start=0,
      )

  def test_the_remedy_for_small_systems_works(self):
    pool = episodes.device_pool(characters.with_at_least(coded(), 5))
    tasks = jax.eval_shape(
      functools.partial(episodes.sample_tasks, dataclasses.replace(PLAIN, ways=5), num_tasks=8),
      pool,
      self.key,
      start=0,
    )
    chex.assert_shape(tasks.train.inputs, (8, 10, 8, 8, 1))


class DistortionTest(parameterized.TestCase):
  @parameterized.parameters(8, 16, 32)
  def test_no_distortion_is_the_area_mean(self, size):
    image = jax.random.uniform(jax.random.key(0), [32, 32])
    f = 32 // size
    want = image.reshape(size, f, size, f).mean(axis=(1, 3))
    np.testing.assert_allclose(plain_resample(image, size), want, atol=1e-6)

  def distort(self, size=16, **kwargs):
    """One draw of extreme values, which `kwargs` give in units of the configuration."""
    names = ("stroke", "angle", "shear", "scale", "down", "right")
    draws = jnp.array([kwargs.get(name, 0.0) for name in names])
    distortion = episodes._distortion(episodes.EpisodeConfig(), draws)
    return episodes._distort(size, blobs(), distortion)

  def test_translation_and_scale(self):
    start = centre(self.distort())
    np.testing.assert_allclose(centre(self.distort(down=1.0)), start + [0.1, 0.0], atol=1e-3)
    np.testing.assert_allclose(centre(self.distort(right=-1.0)), start + [0.0, -0.1], atol=1e-3)
    for sign, scale in ((-1.0, 0.8), (1.0, 1.2)):
      got = self.distort(scale=sign)
      np.testing.assert_allclose(got.sum() / self.distort().sum(), scale**2, rtol=0.02)
      np.testing.assert_allclose(centre(got), scale * start, atol=2e-3)

  @parameterized.parameters(-1.0, 1.0)
  def test_rotation_and_shear_move_the_centre_as_the_matrix_says(self, sign):
    y, x = centre(self.distort(size=32))
    angle = np.deg2rad(20.0 * sign)
    want = [np.cos(angle) * y - np.sin(angle) * x, np.sin(angle) * y + np.cos(angle) * x]
    np.testing.assert_allclose(centre(self.distort(size=32, angle=sign)), want, atol=2e-3)
    want = [y, x + np.tan(np.deg2rad(10.0 * sign)) * y]
    np.testing.assert_allclose(centre(self.distort(size=32, shear=sign)), want, atol=2e-3)

  def test_strokes(self):
    square = jnp.zeros((9, 9)).at[3:6, 3:6].set(1.0)
    for amount, ink in ((0.0, 9.0), (1.0, 25.0), (-1.0, 1.0), (0.5, 17.0), (-0.5, 5.0)):
      got = episodes._thicken(square, jnp.float32(amount))
      np.testing.assert_allclose(got.sum(), ink, rtol=1e-6)
    np.testing.assert_array_equal(episodes._thicken(jnp.ones((4, 4)), jnp.float32(-1.0)), 1.0)

  def test_outside_is_paper(self):
    image = jnp.ones((32, 32))
    got = episodes._resample(image, 16, jnp.eye(2), jnp.array([0.5, 0.0]))
    np.testing.assert_allclose(got[:7], 0.0, atol=1e-6)
    np.testing.assert_allclose(got[9:, 2:-2], 1.0, atol=1e-6)


class ContactSheetTest(absltest.TestCase):
  def test_rows_are_classes(self):
    pool = episodes.device_pool(coded())
    tasks = SAMPLE(PLAIN, pool, jax.random.key(0), 0, 64)
    task = jax.tree.map(lambda leaf: leaf[0], tasks)
    sheet = episodes.contact_sheet(task)
    self.assertEqual(sheet.shape, (3 * 9, 2 * 9 + 3 + 3 * 9))
    self.assertEqual(sheet.dtype, np.uint8)
    codes = np.rint(255 * np.asarray(task.train.inputs)[:, 4, 4, 0]).reshape(3, 2)
    np.testing.assert_array_equal(255 - sheet[4::9, 4:18:9], codes)
    codes = np.rint(255 * np.asarray(task.val.inputs)[:, 4, 4, 0]).reshape(3, 3)
    np.testing.assert_array_equal(255 - sheet[4::9, 25::9], codes)
    with self.assertRaisesRegex(ValueError, "one task"):
      episodes.contact_sheet(tasks)


if __name__ == "__main__":
  absltest.main()
