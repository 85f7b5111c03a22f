import math

import numpy as np
from absl.testing import absltest, parameterized
from scipy import stats

from experiments.report.statistics import interval
from experiments.report.tables import comparison
from tests.experiments.report.curves import curve, rows


class ComparisonTest(parameterized.TestCase):
  def test_accuracy_is_the_mean_over_seeds(self):
    curves = [curve("maml", seed, accuracy=np.full((3, 6), 0.5 + 0.1 * seed)) for seed in (0, 1)]
    table = comparison.accuracy_table(curves)
    self.assertEqual(rows(table.split("Negative")[0])["maml"], ["55.0 ± 0.0"] * 3)
    self.assertIn("6 episodes, each the mean of 2 seeds", table)

  def test_a_mean_of_one_run_that_diverged_is_called_so_and_a_huge_one_stays_short(self):
    nll = np.ones((3, 6))
    nll[1, 0], nll[2] = math.inf, 2.34e17
    table = comparison.accuracy_table([curve("boil", nll=nll)])
    found = rows(table.split("Negative")[1])["boil"]
    self.assertEqual(found, ["1.000 ± 0.000", "diverged", "2.3e+17 ± 0.0e+00"])
    paired = comparison.paired_table([curve("boil", nll=nll), curve()], step=1)
    self.assertEqual(rows(paired)["boil"][1], "diverged")

  def test_paired_difference_is_narrower_than_its_parts(self):
    hard = np.linspace(0.1, 0.8, 6) * np.ones((3, 1))  # tasks differ far more than algorithms
    noise = np.array([0.0, 0.01, 0.02, 0.0, 0.01, 0.02])
    ours = curve(accuracy=hard + 0.1 + noise, nll=hard)
    rival = curve("reptile", accuracy=hard, nll=hard + 0.25)
    cells = rows(comparison.paired_table([rival, ours]))
    half = 100 * stats.t.ppf(0.975, 5) * noise.std(ddof=1) / math.sqrt(6)
    self.assertEqual(cells["reptile"][:2], [f"+11.00 ± {half:.2f}", "-0.250 ± 0.000"])
    self.assertNotIn("sigma_imaml", cells)

  def test_paired_with_a_rival_that_stopped_where_it_was_best(self):
    """In each measure at a step of its own; one at which it had diverged is none."""
    at = lambda *values: np.array(values)[:, None] * np.ones(6)
    ours = curve(accuracy=at(0.1, 0.7, 0.6), nll=at(3.0, 1.0, 1.25))
    rival = curve("maml", accuracy=at(0.2, 0.5, 0.4), nll=at(1.5, math.inf, 2.0))
    cells = rows(comparison.paired_table([ours, rival]))["maml"]
    wanted = ["+20.00 ± 0.00", "-0.750 ± 0.000", "+10.00 ± 0.00 (1)", "-0.250 ± 0.000 (0)"]
    self.assertEqual(cells, wanted)
    regression = [c._replace(accuracy=np.full((3, 6), np.nan)) for c in (ours, rival)]
    cells = rows(comparison.paired_table(regression))["maml"]
    self.assertEqual(cells, [wanted[1], wanted[3]])

  def test_paired_at_another_step(self):
    a, b = curve(), curve("maml")
    mean, half = interval(100 * (b.accuracy[1] - a.accuracy[1]))
    cells = rows(comparison.paired_table([a, b], reference="maml", step=1))
    self.assertEqual(cells["sigma_imaml"][0], f"{mean:+.2f} ± {half:.2f}")

  def test_overfitting(self):
    accuracy = np.array([0.2, 0.8, 0.7])[:, None] * np.ones(6)
    cells = rows(comparison.overfitting_table([curve("maml", accuracy=accuracy)]))
    self.assertEqual(cells["maml"], ["1", "80.0 ± 0.0", "70.0 ± 0.0", "-10.00 ± 0.00"])

  @parameterized.named_parameters(
    ("none", [], "at least one"),
    ("episodes", [curve(), curve("maml", num_episodes=5)], "6 episodes.*5 episodes for maml"),
    ("steps", [curve(), curve("maml", steps=np.array([0, 1, 9]))], r"\[0, 1, 10\].*\[0, 1, 9\]"),
    ("twice", [curve(), curve()], "two of sigma_imaml, seed 0"),
  )
  def test_refuses_what_cannot_be_compared(self, curves, message):
    for table in (comparison.accuracy_table, comparison.paired_table, comparison.overfitting_table):
      with self.assertRaisesRegex(ValueError, message):
        table(curves)

  def test_refuses_an_unknown_reference_or_step(self):
    with self.assertRaisesRegex(ValueError, "one of maml; got 'sigma_imaml'"):
      comparison.paired_table([curve("maml")])
    with self.assertRaisesRegex(ValueError, "got 10. Pass a position"):
      comparison.paired_table([curve()], step=10)


if __name__ == "__main__":
  absltest.main()
