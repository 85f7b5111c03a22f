import math
from unittest import mock

from absl.testing import absltest, parameterized

from experiments.report.pictures import canvas, sigma_plots
from tests.experiments.report.pictures.drawn import MODULES, PictureTest, curve

DPI = canvas.DPI


class SigmaPlotsTest(PictureTest):
  def test_is_1800_dots_wide(self):
    with mock.patch.object(canvas, "DPI", DPI):
      sigma_plots.sigma_per_module(self.path, [curve("sigma_maml")])
      self.assertEqual(self.picture().shape[1], 1800)

  @parameterized.named_parameters(
    ("finite", {}),
    ("frozen_and_free", {"conv_0": 0.0, "head": math.inf}),
    ("all_frozen", dict.fromkeys(MODULES, 0.0)),
    ("all_free", dict.fromkeys(MODULES, math.inf)),
    ("equal", dict.fromkeys(MODULES, 0.1)),
    ("diverged", {"head": math.nan}),
    ("long_names", {f"encoder/block_{i}/convolution": 0.1 * (i + 1) for i in range(12)}),
  )
  def test_sigma_at_its_limits(self, changes):
    base = curve("sigma_imaml")
    sigma = base.sigma | changes
    history = {f"sigma/{m}": [0.1, s] for m, s in sigma.items()}
    curves = [base._replace(seed=s, sigma=sigma, history=history) for s in (0, 1)]
    curves.append(curve("maml", sigma=dict.fromkeys(MODULES, math.inf)))
    sigma_plots.sigma_per_module(self.path, curves)
    self.assertTrue(self.shows(self.picture(), "sigma_imaml"))
    sigma_plots.sigma_history(self.path, curves)
    self.picture()

  def test_history_of_several_algorithms(self):
    curves = [curve(a, s) for a in ("sigma_imaml", "sigma_maml") for s in (0, 1)]
    short = {k: v[:1] for k, v in curves[0].history.items()}  # a seed cut short
    sigma_plots.sigma_history(self.path, [curves[0]._replace(history=short), *curves[1:]])
    self.picture()

  def test_refuses_what_it_cannot_draw(self):
    with self.assertRaisesRegex(ValueError, "learns sigma; got maml"):
      sigma_plots.sigma_per_module(self.path, [curve("maml")])
    with self.assertRaisesRegex(ValueError, "No log record in runs has a number"):
      sigma_plots.sigma_history(self.path, [curve("sigma_maml", history={"loss": [1.0]})])
    with self.assertRaisesRegex(ValueError, "Record both together"):
      sigma_plots.sigma_history(
        self.path, [curve("sigma_maml", history={"step": [1.0], "sigma/head": [0.1, 0.2]})]
      )


if __name__ == "__main__":
  absltest.main()
