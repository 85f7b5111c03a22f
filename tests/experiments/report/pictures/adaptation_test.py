import math
from unittest import mock

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
    pixels = self.picture()
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
    self.picture()

  def test_adaptation_curves_of_regression_have_no_panel_of_accuracy(self):
    curves = [curve("maml", accuracy=np.full((4, 5), math.nan))]
    with mock.patch.object(adaptation, "save") as save:
      adaptation.adaptation_curves(self.path, curves)
    (ax,) = save.call_args.args[1].axes
    self.assertIn("Loss on new tasks", ax.get_title(loc="left") + ax.get_ylabel())

  def test_refuses_no_curves(self):
    with self.assertRaisesRegex(ValueError, "at least one Curve"):
      adaptation.adaptation_curves(self.path, [])


if __name__ == "__main__":
  absltest.main()
