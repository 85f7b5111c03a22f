"""Tests of few-shot Omniglot."""

import os
from unittest import mock

import chex
import jax
import numpy as np
from absl.testing import absltest, parameterized

from experiments.datasets.characters import characters, omniglot, omniglot_few_shot
from experiments.datasets.few_shot import FewShot
from experiments.datasets.source import sample_tasks

KEY = jax.random.key(0)
DATA = os.environ.get("SHRINKMETA_DATA")


def load(data_dir, size, cache_dir):
  """In place of `omniglot.load`: 1,623 characters, whose number two pixels tell."""
  del data_dir, cache_dir
  images = np.zeros((1623, 20, size, size), np.uint8)
  images[..., 0, 0] = 1 + np.arange(1623)[:, None] // 200
  images[..., 0, 1] = 1 + np.arange(1623)[:, None] % 200
  part = lambda at, system: characters.Characters(
    images[at],
    np.full(len(images[at]), 20, np.int32),
    np.zeros(len(images[at]), np.int32),
    (system,),
    tuple(str(i) for i in range(1623))[at],
  )
  return part(slice(0, 964), "background"), part(slice(964, 1623), "evaluation")


def problem(**kwargs):
  with mock.patch.object(omniglot, "load", load):
    return omniglot_few_shot.problem(data_dir="nowhere", size=4, **kwargs)


def classes(source, turned: bool) -> tuple[np.ndarray, np.ndarray]:
  """(characters [T, ways], quarters [T, ways]) of 400 episodes."""
  inputs = np.asarray(sample_tasks(source, KEY, 0, count=400).train.inputs)[..., 0]
  number, quarters = np.full(inputs.shape[:2], -1), np.zeros(inputs.shape[:2], int)
  for k in range(4):
    codes = np.rint(255 * np.rot90(inputs, -k, axes=(2, 3))[..., 0, :2]).astype(int) - 1
    upright = (codes >= 0).all(-1)
    number[upright] = (200 * codes[..., 0] + codes[..., 1])[upright]
    quarters[upright] = k
  assert (number >= 0).all() and (turned or not quarters.any())
  return number, quarters


class SplitTest(parameterized.TestCase):
  def test_parts_are_disjoint(self):
    parts = omniglot_few_shot.split(1623, 0)
    self.assertEqual([len(part) for part in parts], [1100, 100, 423])
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(1623))
    self.assertFalse(np.array_equal(parts[0], omniglot_few_shot.split(1623, 1)[0]))
    with self.assertRaisesRegex(ValueError, "more than 1200"):
      omniglot_few_shot.split(1200, 0)

  @parameterized.parameters(True, False)
  def test_episodes_show_their_part_only_and_turn_it(self, turn_test):
    p = problem(shape=FewShot(5, 1, 2, turns=True), turn_test=turn_test)
    parts = omniglot_few_shot.split(1623, 0)
    for source, part, turned in zip(p[:3], parts, (True, turn_test, turn_test), strict=True):
      number, quarters = classes(source, turned)
      self.assertEmpty(set(number.ravel()) - set(part))
      self.assertTrue(np.all(np.diff(np.sort(number, axis=1)) > 0))
      self.assertLen(np.unique(quarters), 4 if turned else 1)
    self.assertEqual((p.inputs, p.outputs), ((4, 4, 1), 5))
    self.assertStartsWith(
      p.protocol.augmentation, "all classes" if turn_test else "training classes"
    )


@absltest.skipUnless(DATA, "SHRINKMETA_DATA is not set: no Omniglot to read.")
class RealTest(absltest.TestCase):
  def test_shapes(self):
    p = omniglot_few_shot.problem(FewShot(20, 1, 5, turns=True), size=14)
    tasks = sample_tasks(p.test, KEY, 0, count=2)
    chex.assert_shape(tasks.train.inputs, (2, 20, 14, 14, 1))
    chex.assert_shape(tasks.val.inputs, (2, 100, 14, 14, 1))
    self.assertLen(p.test.data.counts, 423)


if __name__ == "__main__":
  absltest.main()
