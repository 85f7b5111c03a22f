import math

import matplotlib.figure
import numpy as np
from absl.testing import absltest, parameterized

from experiments.report.pictures import adaptation
from tests.experiments.report.pictures.drawn import PictureTest, curve


class AdaptationTest(PictureTest):
  @parameterized.named_parameters(
    ("one", ("maml",)),
    ("three", ("sigma_imaml", "reptile", "fine_tuning")),
    (
      "ten",
      (
        "sigma_imaml",
        "reptile",
        "fomaml",
        "maml",
        "imaml",
        "sigma_reptile",
        "sigma_maml",
        "anil",
        "boil",
        "fine_tuning",
      ),
    ),
  )
  def test_adaptation_curves(self, algorithms):
    adaptation.adaptation_curves(self.path, [curve(a, seed) for a in algorithms for seed in (0, 1)])
    pixels = self.picture(6.6)
    for algorithm in algorithms:
      self.assertTrue(self.shows(pixels, algorithm), algorithm)

  @parameterized.named_parameters(
    ("diverged", {"nll": np.array([1.0, 0.1, 50.0, math.inf])[:, None] * np.ones(5)}),
    ("lost", {"nll": np.full((4, 5), math.nan)}),
    ("one_episode", {"num_episodes": 1}),
    ("only_step_0", {"steps": (0,)}),
    ("no_step_0", {"steps": (1, 5)}),
  )
  def test_adaptation_curves_of_odd_runs(self, changes):
    adaptation.adaptation_curves(self.path, [curve("maml", **changes)])
    self.picture(6.6)

  def test_one_diverging_method_flattens_no_other(self):
    figure = matplotlib.figure.Figure()
    for lowest, scale in ((-0.2, "symlog"), (0.1, "log"), (-30.0, "symlog")):
      ax = figure.subplots()
      ax.plot([0, 1], [1e18, lowest], label="maml")
      ax.plot([0, 1], [6_757.0, lowest + 0.5], label="reptile")
      ax.fill_between([0, 1], [-1e18, lowest], [3e18, lowest], alpha=0.1)
      adaptation._scale_nats(ax)
      self.assertEqual(ax.get_yscale(), scale)
      height = lambda y, ax=ax: ax.transAxes.inverted().transform(ax.transData.transform((0, y)))[1]
      self.assertGreater(height(lowest + 0.5) - height(lowest), 0.05 if lowest > -1 else 0.0)
      self.assertGreater(height(6_757.0), 1.0)  # leaves the panel
      inside = [height(tick) for tick in ax.get_yticks()]
      self.assertTrue(all(-1e-6 <= y <= 1 + 1e-6 for y in inside), inside)
      figure.clear()

  def test_adaptation_curves_of_regression_have_no_panel_of_accuracy(self):
    adaptation.adaptation_curves(self.path, [curve("maml", accuracy=np.full((4, 5), math.nan))])
    self.picture(3.3)

  def test_refuses_no_curves(self):
    with self.assertRaisesRegex(ValueError, "at least one Curve"):
      adaptation.adaptation_curves(self.path, [])


if __name__ == "__main__":
  absltest.main()
