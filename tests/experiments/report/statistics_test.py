import math

import numpy as np
from absl.testing import absltest, parameterized
from scipy import stats

from experiments.report import statistics


class IntervalTest(parameterized.TestCase):
  def test_three_values_by_hand(self):
    mean, half = statistics.interval(np.array([1.0, 2.0, 3.0]))
    self.assertEqual(mean, 2.0)
    self.assertAlmostEqual(half, 4.302653 / math.sqrt(3), places=6)  # t_{2, 0.975}, s = 1

  @parameterized.parameters(0.5, 0.95, 0.99)
  def test_is_the_interval_of_scipy(self, level):
    values = np.random.default_rng(0).normal(size=20)
    mean, half = statistics.interval(values, level)
    low, high = stats.ttest_1samp(values, 0.0).confidence_interval(level)
    np.testing.assert_allclose([mean - half, mean + half], [low, high], rtol=1e-12)

  def test_seeds_are_averaged_within_an_episode(self):
    values = np.random.default_rng(0).normal(size=(4, 9))
    self.assertEqual(statistics.interval(values), statistics.interval(values.mean(0)))

  def test_covers_the_mean_as_often_as_it_says(self):
    values = np.random.default_rng(0).normal(size=(1000, 5))
    covered = [abs(mean) <= half for mean, half in map(statistics.interval, values)]
    self.assertBetween(np.mean(covered), 0.93, 0.97)

  def test_one_episode_tells_nothing_of_others(self):
    self.assertEqual(statistics.interval(np.array([0.5])), (0.5, math.inf))

  def test_a_diverged_episode_shows(self):
    mean, half = statistics.interval(np.array([1.0, math.inf]))
    self.assertEqual(mean, math.inf)
    self.assertTrue(math.isnan(half))

  def test_refuses_other_shapes(self):
    for values in (np.ones((2, 2, 2)), np.ones(0), np.ones(())):
      with self.assertRaisesRegex(ValueError, r"\[seeds, E\]"):
        statistics.interval(values)


if __name__ == "__main__":
  absltest.main()
