"""Tests of the sinusoids."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from experiments.datasets import sinusoid
from experiments.datasets.source import sample_tasks

KEY = jax.random.key(1)


class SinusoidTest(parameterized.TestCase):
  def test_tasks_are_sinusoids_with_noise(self):
    data = sinusoid.draw(KEY, 2000, None, noise=0.3)
    exact = data.amplitude[:, None] * jnp.sin(data.val.inputs[..., 0] - data.phase[:, None])
    np.testing.assert_allclose((data.val.targets - exact).std(), 0.3, rtol=0.02)
    x = np.concatenate([data.train.inputs.ravel(), data.val.inputs.ravel()])
    for values, low, high in ((data.amplitude, 0.1, 5.0), (data.phase, 0, np.pi), (x, -5.0, 5.0)):
      np.testing.assert_allclose([values.min(), values.max()], [low, high], atol=0.02)
      error = (high - low) / np.sqrt(12 * values.size)  # of the mean of uniform numbers
      np.testing.assert_allclose(values.mean(), (low + high) / 2, atol=4 * error)
    sizes = np.asarray(data.train.mask).sum(1)
    np.testing.assert_array_equal(np.unique(sizes), np.arange(5, 21))

  def test_fewer_shots_are_a_prefix_of_the_same_tasks(self):
    most = sample_tasks(sinusoid.problem(20).test, KEY, 0, count=4)
    for shots in (5, 10):
      got = sample_tasks(sinusoid.problem(shots).test, KEY, 2, count=2)
      chex.assert_shape(got.train.inputs, (2, shots, 1))
      self.assertIsNone(got.train.mask)
      first = jax.tree.map(lambda leaf, n=shots: leaf[2:, :n], most.train)
      chex.assert_trees_all_close(got.train, first, rtol=1e-6)
      chex.assert_trees_all_close(got.val, jax.tree.map(lambda leaf: leaf[2:], most.val), rtol=1e-6)
    chex.assert_shape(most.val.targets, (4, 50))

  def test_without_noise_a_sinusoid_fits(self):
    task = sample_tasks(sinusoid.problem(20).test, KEY, 0, count=8)
    for x, y in zip(task.train.inputs[..., 0], task.train.targets, strict=True):
      waves = np.stack([np.sin(x), np.cos(x)], axis=1)
      np.testing.assert_allclose(waves @ np.linalg.lstsq(waves, y)[0], y, atol=1e-4)

  def test_tasks_of_many_sizes_are_masked(self):
    problem = sinusoid.problem(None, noise=0.1)
    sizes = np.asarray(sample_tasks(problem.train, KEY, 0, count=40).train.mask).sum(1)
    self.assertGreater(len(np.unique(sizes)), 5)
    self.assertEqual((problem.protocol.shots, problem.protocol.ways), ("5-20", None))

  @parameterized.parameters((0, 0.0), (21, 0.0), (5, -1.0))
  def test_refuses(self, shots, noise):
    with self.assertRaisesRegex(ValueError, "Sinusoids want"):
      sinusoid.problem(shots, noise)


if __name__ == "__main__":
  absltest.main()
