"""Tests of the episode sampler."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from experiments.datasets import distortions
from experiments.datasets.characters import characters, episodes
from experiments.datasets.source import sample_tasks

PLAIN = episodes.EpisodeConfig(
  ways=3,
  shots=2,
  queries=3,
  size=8,
  distortions=distortions.Distortions(0.0, 0.0, (1.0, 1.0), 0.0, 0.0),
)


AUGMENTED = episodes.EpisodeConfig(ways=3, shots=2, queries=3, size=8)


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


class DrawTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.key = jax.random.key(1)

  def plain(self, data=None, start=0):
    """64 undistorted episodes as characters and renderings [64, ways, shots or queries]."""
    tasks = sample_tasks(episodes.source(PLAIN, data or coded()), self.key, start, 64)
    np.testing.assert_array_equal(tasks.train.targets, np.tile([0, 0, 1, 1, 2, 2], (64, 1)))
    np.testing.assert_array_equal(tasks.val.targets, np.tile(np.repeat(range(3), 3), (64, 1)))
    return [[codes.reshape(64, 3, -1) for codes in decode(batch)] for batch in tasks]

  def test_shapes_types_and_range(self):
    tasks = sample_tasks(episodes.source(AUGMENTED, coded()), self.key, 0, 3)
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

  def test_systems_in_turn_each_round_with_other_characters(self):
    source = episodes.source(PLAIN, coded(sizes=(6, 7, 9)), in_turn=True)
    self.assertEqual(source.tasks, 3)
    found = decode(sample_tasks(source, self.key, 0, 12).val)[0].reshape(12, -1)
    system = np.digitize(found, (6, 13))
    np.testing.assert_array_equal(system, np.tile([0, 1, 2], 4)[:, None] + 0 * system)
    self.assertLen({tuple(row) for row in found}, 12)

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
    (_, train), (_, val) = self.plain(data)
    taken = np.concatenate([train, val], axis=-1)
    np.testing.assert_array_equal(
      np.sort(taken[..., :3], axis=-1), np.broadcast_to(np.arange(3), taken[..., :3].shape)
    )
    np.testing.assert_array_equal(taken[..., 3:], taken[..., :2])

  def test_an_episode_depends_on_key_and_index_only(self):
    sample = functools.partial(sample_tasks, episodes.source(AUGMENTED, coded()))
    one, two, alone = (sample(self.key, *a) for a in ((10, 3), (12, 3), (12, 1)))
    for a, b in ((one, 2), (two, 0)):
      got = jax.tree.map(lambda leaf, b=b: leaf[b : b + 1], a)
      chex.assert_trees_all_equal(got.train.targets, alone.train.targets)
      chex.assert_trees_all_close(got, alone, atol=1e-6)
    self.assertFalse(np.allclose(one.train.inputs[0], one.train.inputs[1], atol=1e-3))
    other = sample(jax.random.key(2), 10, 3)
    self.assertFalse(np.allclose(one.train.inputs, other.train.inputs, atol=1e-3))

  def test_start_may_be_traced_inside_a_loop(self):
    source = episodes.source(AUGMENTED, coded())

    def body(start, _):
      return start + 1, source.sample(self.key, start, 1)

    _, tasks = jax.jit(lambda: jax.lax.scan(body, jnp.int32(10), length=3))()
    want = sample_tasks(source, self.key, 10, 3)
    chex.assert_trees_all_close(jax.tree.map(lambda leaf: leaf[:, 0], tasks), want, atol=1e-6)

  @parameterized.parameters(
    dict(ways=1),
    dict(queries=0),
    dict(shots=0),
    dict(size=2),
  )
  def test_config_refuses(self, **kwargs):
    with self.assertRaisesRegex(ValueError, f"{next(iter(kwargs))}.*Change the EpisodeConfig"):
      episodes.EpisodeConfig(**kwargs)

  @parameterized.parameters((dict(ways=5), "5 ways.*only 4"), (dict(size=9), "9 x 9"))
  def test_source_refuses(self, change, message):
    with self.assertRaisesRegex(ValueError, message):
      episodes.source(dataclasses.replace(PLAIN, **change), coded())

  def test_the_remedy_for_small_systems_works(self):
    source = episodes.source(
      dataclasses.replace(PLAIN, ways=5), characters.with_at_least(coded(), 5)
    )
    tasks = jax.eval_shape(lambda: source.sample(self.key, 0, 8))
    chex.assert_shape(tasks.train.inputs, (8, 10, 8, 8, 1))


if __name__ == "__main__":
  absltest.main()
