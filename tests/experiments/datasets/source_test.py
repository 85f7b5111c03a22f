"""Tests of tasks by index, and of a problem's protocol."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import shrinkmeta as sm
from experiments.datasets.source import Problem, Protocol, Source, pooled, sample_tasks

KEY = jax.random.key(3)


def draw(config, data, number, key):
  """A task of three rows that tells its number and draws from its key."""
  noise = jax.random.normal(key, [3])
  batch = sm.Batch(noise, jnp.full([3], config) + data[number % len(data)])
  return sm.Task(batch, batch._replace(inputs=noise + 1.0))


def source(tasks=None, shuffle=False) -> Source:
  return Source(draw, 100, 10 * jnp.arange(7), tasks, shuffle)


def numbers(of: Source, start: int, count: int, key=KEY) -> np.ndarray:
  targets = np.asarray(sample_tasks(of, key, start, count=count).train.targets)
  np.testing.assert_array_equal(targets, targets[:, :1] + np.zeros((1, 3)))
  return (targets[:, 0] - 100) // 10


class SourceTest(parameterized.TestCase):
  @parameterized.parameters((None, False), (5, False), (5, True))
  def test_a_task_depends_on_key_and_index_only(self, tasks, shuffle):
    of = source(tasks, shuffle)
    whole = sample_tasks(of, KEY, 0, count=14)
    for start, count in ((0, 3), (3, 7), (11, 1)):
      part = jax.tree.map(lambda leaf, s=start, n=count: leaf[s : s + n], whole)
      chex.assert_trees_all_equal(sample_tasks(of, KEY, start, count=count), part)
    self.assertLen(np.unique(whole.train.inputs), 14 * 3)
    other = sample_tasks(of, jax.random.key(4), 0, count=14)
    self.assertFalse(np.any(other.train.inputs == whole.train.inputs))

  def test_the_key_of_a_task_is_folded_with_its_index(self):
    want = jax.random.normal(jax.random.fold_in(KEY, 9), [3])
    np.testing.assert_array_equal(sample_tasks(source(), KEY, 8, count=2).train.inputs[1], want)

  def test_a_list_is_run_through_in_rounds(self):
    np.testing.assert_array_equal(numbers(source(5), 0, 12), np.arange(12) % 5)
    found = numbers(source(5, shuffle=True), 0, 500).reshape(100, 5)
    np.testing.assert_array_equal(np.sort(found, axis=1), np.tile(np.arange(5), (100, 1)))
    self.assertGreater(len(np.unique(found, axis=0)), 50)  # of 120 orders
    other = numbers(source(5, shuffle=True), 0, 500, jax.random.key(4)).reshape(100, 5)
    self.assertLess(np.mean(np.all(found == other, axis=1)), 0.1)

  def test_start_may_be_traced(self):
    got = jax.lax.map(lambda i: source().sample(KEY, i, 1), jnp.arange(4, 6))
    want = sample_tasks(source(), KEY, 4, count=2)
    chex.assert_trees_all_close(jax.tree.map(lambda leaf: leaf[:, 0], got), want)

  def test_data_are_arguments_of_a_program(self):
    of = Source(draw, 100, jnp.arange(10_000))
    lowered = sample_tasks.lower(of, KEY, 0, count=1)
    self.assertIn("tensor<10000xi32>", lowered.as_text().split("->")[0])

  @parameterized.parameters((None, None), (None, 0.5), (1.0, 0.5))
  def test_pooled_tasks_adapt_on_both_parts(self, *weights):
    def masked(*arguments):
      parts = zip(draw(*arguments), weights, strict=True)
      return sm.Task(*(b._replace(mask=None if w is None else jnp.full(3, w)) for b, w in parts))

    of = dataclasses.replace(source(), draw=masked)
    apart, joined = (sample_tasks(one, KEY, 2, count=4) for one in (of, of.mapped(pooled)))
    both = [np.concatenate(x, axis=1) for x in zip(apart.train[:2], apart.val[:2], strict=True)]
    chex.assert_trees_all_equal(list(joined.train[:2]), both)
    chex.assert_trees_all_equal(joined.val[:2], apart.val[:2])
    if weights == (None, None):
      self.assertIsNone(joined.train.mask)
    else:
      want = np.repeat([1.0 if w is None else w for w in weights], 3)
      np.testing.assert_array_equal(joined.train.mask, np.tile(want, (4, 1)))

  def test_no_tasks_are_refused(self):
    with self.assertRaisesRegex(ValueError, "count >= 1"):
      source().sample(KEY, 0, 0)


class ProblemTest(absltest.TestCase):
  def test_likelihoods(self):
    protocol = Protocol("d", "s", None, 1, 1, "none", "e")
    problem = Problem(source(), source(), source(), "categorical", 2, (1,), protocol)
    logits = jnp.array([[0.0, jnp.log(3.0)]])
    log_p = problem.likelihood(lambda _, x: x).log_prob(logits, jnp.array([1]))
    np.testing.assert_allclose(log_p, np.log([0.75]), rtol=1e-6)
    problem = problem._replace(kind="gaussian", scale=2.0)
    log_p = problem.likelihood(lambda _, x: x).log_prob(jnp.array([1.0]), jnp.array([4.0]))
    np.testing.assert_allclose(log_p, [-(1.5**2) / 2 - np.log(2 * np.sqrt(2 * np.pi))], rtol=1e-6)
    self.assertEqual(list(protocol._asdict())[:3], ["data", "split", "ways"])


if __name__ == "__main__":
  absltest.main()
