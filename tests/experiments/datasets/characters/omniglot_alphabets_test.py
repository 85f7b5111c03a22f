"""Tests of tasks that are alphabets, on made-up characters and on Omniglot itself."""

import os
from unittest import mock

import chex
import jax
import numpy as np
from absl.testing import absltest, parameterized

from experiments.datasets.characters import characters, omniglot, omniglot_alphabets
from experiments.datasets.source import sample_tasks

KEY = jax.random.key(0)
DATA = os.environ.get("SHRINKMETA_DATA")
SIDE = 6


def made_up(first: int, sizes: tuple[int, ...]) -> characters.Characters:
  """Alphabets number `first` and on; four pixels tell alphabet, character, drawing, all plus 1."""
  k = sum(sizes)
  images = np.zeros((k, 20, SIDE, SIDE), np.uint8)
  system = np.repeat(np.arange(len(sizes)), sizes)
  images[:, :, 0, 0] = 1 + first + system[:, None]
  images[:, :, 0, 1] = 1 + np.concatenate([np.arange(size) for size in sizes])[:, None]
  images[:, :, 0, 2] = 1 + np.arange(20)
  return characters.Characters(
    images,
    np.full(k, 20, np.int32),
    system.astype(np.int32),
    tuple(f"alphabet {first + i:02}" for i in range(len(sizes))),
    tuple(f"character {i}" for i in range(k)),
  )


def load(data_dir, size, cache_dir):
  """In place of `omniglot.load`: 18 alphabets in two archives, one of them too small."""
  del data_dir, cache_dir
  parts = made_up(0, (20, 25, 19, 22, 20, 20, 20)), made_up(7, (20,) * 10 + (30,))
  side = max(size, SIDE)
  pad = ((0, 0), (0, 0), (0, side - SIDE), (0, side - SIDE))
  return tuple(part._replace(images=np.pad(part.images, pad)) for part in parts)


def problem(*args, **kwargs):
  with mock.patch.object(omniglot, "load", load):
    return omniglot_alphabets.problem(*args, data_dir="nowhere", **kwargs)


def small(train=4, shots=15, seed=0):
  """Without augmentation."""
  return problem(train, shots, augment=False, size=SIDE, seed=seed)


def decode(batch, ways=20) -> np.ndarray:
  """(alphabet, character, drawing) [T, ways, n, 3] of undistorted pictures."""
  codes = np.rint(255 * np.asarray(batch.inputs)[..., 0, :3, 0]).astype(int) - 1
  return codes.reshape(len(codes), ways, -1, 3)


def everything(source):
  """Every task of a list: decoded train and val."""
  tasks = sample_tasks(source, KEY, 0, count=source.tasks)
  for batch, n in ((tasks.train, tasks.train.targets.shape[1] // 20), (tasks.val, 5)):
    targets = np.repeat(np.arange(20), n)
    np.testing.assert_array_equal(batch.targets, np.tile(targets, (source.tasks, 1)))
  return decode(tasks.train), decode(tasks.val)


def alphabets(source) -> list[int]:
  return [int(a) for a in everything(source)[1][:, 0, 0, 0]]


class SplitTest(parameterized.TestCase):
  @parameterized.parameters(1, 4, 6)
  def test_parts_are_disjoint_and_hold_all_large_alphabets(self, train):
    p = small(train)
    parts = [alphabets(source) for source in (p.train, p.validation, p.test)]
    self.assertEqual([len(part) for part in parts], [train, 7 - train, 10])
    self.assertCountEqual(sum(parts, []), set(range(18)) - {2})

  def test_another_number_of_training_alphabets_keeps_order_and_tasks(self):
    p, q = small(3), small(5)
    order = lambda p: (
      sorted(alphabets(p.train))
      and [
        *map(int, np.asarray(p.train.data)[:, 0, 0, 0, 0]),
        *map(int, np.asarray(p.test.data)[:, 0, 0, 0, 0]),
        *map(int, np.asarray(p.validation.data)[:, 0, 0, 0, 0]),
      ]
    )
    self.assertEqual(order(p), order(q))
    # So what validates at T = 5 is not tested on at T = 3.
    self.assertEmpty(set(alphabets(q.validation)) & set(alphabets(p.test)))
    both = lambda p: np.concatenate([p.train.data, p.test.data, p.validation.data])
    np.testing.assert_array_equal(both(p), both(q))

  def test_the_seed_draws_alphabets_characters_and_drawings(self):
    p, again, other = small(), small(), small(seed=1)
    chex.assert_trees_all_equal(p.train.data, again.train.data)
    self.assertNotEqual(alphabets(p.test), alphabets(other.test))
    shared = set(alphabets(p.test)) & set(alphabets(other.test))
    for alphabet in shared:
      val = [everything(q.test)[1][alphabets(q.test).index(alphabet)] for q in (p, other)]
      self.assertFalse(np.array_equal(*val))

  @parameterized.parameters(
    (dict(train_alphabets=7), "1 to 6 may train.*got train_alphabets = 7"),
    (dict(train_alphabets=0), "got train_alphabets = 0"),
    (dict(shots=16), "shots of 1 to 15"),
    (dict(augment=False, copies=2), "copies"),
    (dict(copies=0), "copies"),
  )
  def test_refuses(self, kwargs, message):
    with self.assertRaisesRegex(ValueError, message):
      problem(**dict(train_alphabets=4, size=SIDE) | kwargs)


class SmallDataTest(parameterized.TestCase):
  def test_a_task_is_20_characters_of_an_alphabet_with_15_and_5_drawings(self):
    for source in small()[:3]:
      train, val = everything(source)
      self.assertEqual(train.shape[1:], (20, 15, 3))
      both = np.concatenate([train, val], axis=2)
      for axis, shape in ((0, (-1, 400)), (1, (-1, 20, 20))):  # one alphabet; one character a class
        same = both[..., axis].reshape(shape if axis == 0 else (len(both), 20, 20))
        np.testing.assert_array_equal(same, same[..., :1] + np.zeros_like(same))
      for task in both:
        self.assertLen(set(task[:, 0, 1]), 20)
      drawings = np.sort(both[..., 2], axis=2)  # each once, in train or in val
      np.testing.assert_array_equal(drawings, np.arange(20) + np.zeros_like(drawings))
      held_out = {tuple(sorted(drawn)) for drawn in val[..., 2].reshape(-1, 5)}
      self.assertGreater(len(held_out), 10)  # drawn for each character

  def test_few_shots_are_a_prefix_of_many_and_are_judged_by_the_same(self):
    full = small().test
    for shots in (1, 2, 3, 5, 10):
      train, val = everything(small(shots=shots).test)
      np.testing.assert_array_equal(train, everything(full)[0][:, :, :shots])
      np.testing.assert_array_equal(val, everything(full)[1])

  def test_relabelled_training_alphabets_are_numbered_anew_in_every_draw_and_no_other(self):
    kept, anew = small(), problem(4, augment=False, relabel=True, size=SIDE)
    for one, other in ((kept.validation, anew.validation), (kept.test, anew.test)):
      chex.assert_trees_all_equal(
        sample_tasks(one, KEY, 0, count=4), sample_tasks(other, KEY, 0, count=4)
      )
    tasks = sample_tasks(anew.train, KEY, 0, count=12)  # three rounds
    train, val = decode(tasks.train), decode(tasks.val)
    np.testing.assert_array_equal(train[:, :, 0, 1], val[:, :, 0, 1])  # alike in both parts
    numbered = {}
    for alphabet, characters_ in zip(train[:, 0, 0, 0], train[:, :, 0, 1], strict=True):
      numbered.setdefault(int(alphabet), set()).add(tuple(map(int, characters_)))
    self.assertEqual([len(orders) for orders in numbered.values()], [3] * 4)
    for orders in numbered.values():
      self.assertLen({tuple(sorted(order)) for order in orders}, 1)  # the same 20 characters
    self.assertIn("numbered anew", anew.protocol.augmentation)

  def test_indices_enumerate_test_alphabets_and_shuffle_training_ones(self):
    p = small()
    tested = decode(sample_tasks(p.test, KEY, 0, count=20).val)
    np.testing.assert_array_equal(tested[:10], tested[10:])
    self.assertLen(set(tested[:10, 0, 0, 0]), 10)
    trained = decode(sample_tasks(p.train, KEY, 0, count=400).val)[:, 0, 0, 0].reshape(100, 4)
    np.testing.assert_array_equal(
      np.sort(trained, axis=1), np.sort(trained[:1], axis=1) + 0 * trained
    )
    self.assertGreater(len(np.unique(trained, axis=0)), 15)  # of 24 orders

  def test_pictures_are_stored_ones_and_rows_all_count(self):
    task = sample_tasks(small(shots=3).test, KEY, 0, count=1)
    self.assertIsNone(task.train.mask)
    self.assertEqual(np.count_nonzero(np.asarray(task.train.inputs)), 60 * 3)


class AugmentationTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.problem = problem(4, shots=2, size=SIDE, copies=3)

  def sample(self, start, count):
    return sample_tasks(self.problem.test, KEY, start, count=count)

  def test_copies_count_as_one_drawing(self):
    task = self.sample(0, 2)
    chex.assert_shape(task.train.inputs, (2, 20 * 2 * 3, SIDE, SIDE, 1))
    np.testing.assert_allclose(np.asarray(task.train.mask).sum(1), 40.0, rtol=1e-6)
    np.testing.assert_array_equal(task.train.targets[0], np.repeat(np.arange(20), 6))
    self.assertIsNone(task.val.mask)
    self.assertEqual(problem(4, size=SIDE).train.config.copies, 7)

  def test_every_picture_is_distorted_anew_also_those_held_out(self):
    task, again = self.sample(0, 1), self.sample(10, 1)  # the same alphabet, another round
    for one, other in zip(task, again, strict=True):
      one, other = (np.asarray(b.inputs).reshape(len(b.targets[0]), -1) for b in (one, other))
      inked = (one.any(1)) & (other.any(1))  # the code may have been moved out
      self.assertGreater(inked.mean(), 0.3)
      self.assertFalse(np.any(np.all(one == other, axis=1)[inked]))
    copies = np.asarray(task.train.inputs).reshape(40, 3, -1)
    inked = copies.any(2).sum(1) >= 2
    self.assertTrue(all(len(np.unique(c, axis=0)) > 1 for c in copies[inked]))

  def test_index_not_batch(self):
    whole, part = self.sample(8, 4), self.sample(10, 2)
    chex.assert_trees_all_close(part, jax.tree.map(lambda leaf: leaf[2:], whole), atol=1e-6)

  def test_protocol(self):
    got = self.problem.protocol._asdict()
    self.assertEqual((got["ways"], got["shots"], got["queries"]), (20, 2, 5))
    self.assertEqual(
      got["augmentation"],
      "rotation ±180°, translation ±0.2, scale 0.8-1.2; 3 copies to adapt on",
    )
    self.assertIn("4 alphabets to train, 3 validation, 10 test of 17", got["split"])
    self.assertEqual(small().protocol.augmentation, "none")


@absltest.skipUnless(DATA, "SHRINKMETA_DATA is not set: no Omniglot to read.")
class RealTest(absltest.TestCase):
  def test_published_numbers(self):
    p = omniglot_alphabets.problem(25, size=14)
    self.assertEqual([s.tasks for s in (p.train, p.validation, p.test)], [25, 11, 10])
    task = sample_tasks(p.test, KEY, 0, count=1)
    chex.assert_shape(task.train.inputs, (1, 2100, 14, 14, 1))
    chex.assert_shape(task.val.inputs, (1, 100, 14, 14, 1))
    self.assertBetween(float(task.train.inputs.mean()), 0.02, 0.2)


if __name__ == "__main__":
  absltest.main()
