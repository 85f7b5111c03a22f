"""Tests of episodes of classes."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from experiments.datasets import few_shot
from experiments.datasets.few_shot import FewShot
from experiments.datasets.source import sample_tasks

KEY = jax.random.key(0)
COUNTS = np.array([5, 9, 4, 6, 7])
CLASS = np.repeat(np.arange(5), COUNTS)  # of picture m


def coded(side=4) -> np.ndarray:
  """Pictures whose first channel is constant and tells their number; no other one is symmetric."""
  images = np.random.default_rng(0).integers(0, 256, (COUNTS.sum(), side, side, 3), np.uint8)
  images[..., 0] = np.arange(COUNTS.sum())[:, None, None]
  return images


def decode(batch, ways: int) -> np.ndarray:
  """Numbers of the pictures [T, ways, n]."""
  codes = np.rint(255 * np.asarray(batch.inputs)[..., 0]).astype(int)
  np.testing.assert_array_equal(codes, codes[..., :1, :1] + np.zeros_like(codes))
  return codes[..., 0, 0].reshape(len(codes), ways, -1)


class EpisodeTest(parameterized.TestCase):
  def test_classes_and_pictures_are_distinct_and_uniform(self):
    tasks = sample_tasks(few_shot.source(FewShot(3, 1, 3), coded(), COUNTS), KEY, 0, count=2000)
    chex.assert_shape(tasks.train.inputs, (2000, 3, 4, 4, 3))
    chex.assert_type([tasks.train.inputs, tasks.train.targets], [jnp.float32, jnp.int32])
    np.testing.assert_array_equal(tasks.train.targets, np.tile([0, 1, 2], (2000, 1)))
    np.testing.assert_array_equal(tasks.val.targets, np.tile(np.repeat(range(3), 3), (2000, 1)))
    train, val = decode(tasks.train, 3), decode(tasks.val, 3)
    both = np.concatenate([train, val], axis=-1)
    self.assertTrue(np.all(np.diff(np.sort(both, axis=-1)) > 0))  # no picture twice
    classes = CLASS[both]
    np.testing.assert_array_equal(classes, classes[..., :1] + np.zeros_like(classes))
    self.assertTrue(np.all(np.diff(np.sort(classes[..., 0], axis=-1)) > 0))
    for way in range(3):
      share = np.bincount(classes[:, way, 0], minlength=5) / 2000
      np.testing.assert_allclose(share, 0.2, atol=5 * (0.2 * 0.8 / 2000) ** 0.5)
    shown = np.bincount(train.ravel(), minlength=COUNTS.sum())
    expected = 3 * 2000 / 5 / COUNTS[CLASS]
    np.testing.assert_array_less(np.abs(shown - expected), 5 * expected**0.5)

  def test_pictures_are_the_stored_ones(self):
    tasks = sample_tasks(few_shot.source(FewShot(2, 1, 2), coded(), COUNTS), KEY, 0, count=20)
    numbers = decode(tasks.val, 2).reshape(20, 4)
    np.testing.assert_allclose(tasks.val.inputs, coded()[numbers] / 255.0, rtol=1e-6)

  def test_index_not_batch(self):
    source = few_shot.source(FewShot(3, 1, 2, turns=True), coded(), COUNTS)
    whole = sample_tasks(source, KEY, 0, count=6)
    part = sample_tasks(source, KEY, 4, count=2)
    chex.assert_trees_all_equal(part, jax.tree.map(lambda leaf: leaf[4:], whole))

  def test_a_class_is_turned_as_a_whole(self):
    source = few_shot.source(FewShot(3, 1, 2, turns=True), coded(), COUNTS)
    tasks = sample_tasks(source, KEY, 0, count=100)
    stored = coded() / 255.0
    quarters = []
    for train, val in zip(*(np.asarray(part.inputs) for part in tasks[:2]), strict=True):
      shown = np.concatenate([train.reshape(3, 1, 4, 4, 3), val.reshape(3, 2, 4, 4, 3)], axis=1)
      for pictures in shown:
        turns = set()
        for picture in pictures:
          original = stored[int(np.rint(255 * picture[0, 0, 0]))]
          near = [np.abs(np.rot90(original, k) - picture).max() < 1e-6 for k in range(4)]
          self.assertEqual(sum(near), 1)
          turns.add(near.index(True))
        self.assertLen(turns, 1)
        quarters += turns
    share = np.bincount(quarters, minlength=4) / len(quarters)
    np.testing.assert_allclose(share, 0.25, atol=5 * (0.25 * 0.75 / 300) ** 0.5)

  @parameterized.parameters(0, 1, 2, 3)
  def test_turn_is_rot90(self, quarters):
    images = np.random.default_rng(0).normal(size=(2, 5, 5, 1))
    got = few_shot.turn(jnp.asarray(images), jnp.int32(quarters))
    np.testing.assert_allclose(got, np.rot90(images, quarters, axes=(1, 2)), rtol=1e-6)

  @parameterized.parameters(
    (FewShot(6, 1, 1), coded(), "2 to 5 ways"),
    (FewShot(1, 1, 1), coded(), "2 to 5 ways"),
    (FewShot(2, 1, 4), coded(), "5 = shots .* got 4"),
    (FewShot(2, 0, 1), coded(), "shots >= 1"),
    (FewShot(2, 1, 1, turns=True), coded()[:, 1:], "square"),
    (FewShot(2, 1, 1), coded()[1:], "sum to M"),
    (FewShot(2, 1, 1), coded() / 255.0, "uint8"),
  )
  def test_refuses(self, shape, images, message):
    with self.assertRaisesRegex(ValueError, message):
      few_shot.source(shape, images, COUNTS)


if __name__ == "__main__":
  absltest.main()
