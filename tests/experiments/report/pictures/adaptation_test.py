import math
import pathlib
import tempfile
from unittest import mock

import matplotlib.figure
import numpy as np
from absl.testing import absltest, parameterized
from matplotlib import colors, image

from experiments.report.pictures import adaptation, canvas, sigma_plots
from experiments.runs.results import Curve

DPI = canvas.DPI
MODULES: tuple[str, ...] = ("conv_0", "norm_0", "conv_1", "norm_1", "head")


def curve(algorithm, seed=0, steps=(0, 1, 10, 100), num_episodes=5, **changes):
  rng = np.random.default_rng([seed, len(algorithm)])
  shape = (len(steps), num_episodes)
  sigma = dict(zip(MODULES, np.geomspace(0.05, 0.8, 5).tolist(), strict=True))
  history = {f"sigma/{m}": [0.1, s] for m, s in sigma.items()} | {"step": [0.0, 50.0]}
  full = Curve(
    algorithm,
    seed,
    np.array(steps),
    rng.uniform(size=shape),
    rng.uniform(size=shape),
    sigma,
    {},
    {},
    {},
    history,
  )
  return full._replace(**changes)


class PlotsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enterContext(mock.patch.object(canvas, "DPI", 80))  # small pictures are quick ones
    self.path = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory())) / "picture.png"

  def picture(self, height):
    """The pixels drawn, after checks that they are of the promised size and not blank."""
    pixels = image.imread(self.path)
    self.assertEqual(pixels.shape[1], round(canvas.WIDTH * canvas.DPI))
    if height:
      self.assertEqual(pixels.shape[0], round(height * canvas.DPI))
    self.assertBetween(np.mean(pixels[..., :3].min(-1) < 0.9), 0.005, 0.8)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    np.testing.assert_array_equal(border, 1.0, "something is cut off at the border")
    return pixels

  def shows(self, pixels, algorithm):
    color = np.array(colors.to_rgb(canvas.hue(algorithm)))
    return bool(np.any(np.abs(pixels[..., :3] - color).max(-1) < 0.01))

  def test_is_1800_dots_wide(self):
    with mock.patch.object(canvas, "DPI", DPI):
      sigma_plots.sigma_per_module(self.path, [curve("sigma_maml")])
      self.assertEqual(self.picture(3.9).shape[:2], (936, 1800))

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
    self.assertTrue(self.shows(self.picture(3.9), "sigma_imaml"))
    sigma_plots.sigma_history(self.path, curves)
    self.picture(None)

  def test_history_of_several_algorithms(self):
    curves = [curve(a, s) for a in ("sigma_imaml", "sigma_maml") for s in (0, 1)]
    short = {k: v[:1] for k, v in curves[0].history.items()}  # a seed cut short
    sigma_plots.sigma_history(self.path, [curves[0]._replace(history=short), *curves[1:]])
    self.picture(0.7 + 2 * 2.2)

  def test_refuses_what_it_cannot_draw(self):
    with self.assertRaisesRegex(ValueError, "learns sigma; got maml"):
      sigma_plots.sigma_per_module(self.path, [curve("maml")])
    with self.assertRaisesRegex(ValueError, "Record sigma while training"):
      sigma_plots.sigma_history(self.path, [curve("sigma_maml", history={"loss": [1.0]})])
    with self.assertRaisesRegex(ValueError, "got 1 steps"):
      sigma_plots.sigma_history(
        self.path, [curve("sigma_maml", history={"step": [1.0], "sigma/head": [0.1, 0.2]})]
      )
    with self.assertRaisesRegex(ValueError, "at least one Curve"):
      adaptation.adaptation_curves(self.path, [])

  def test_labels_keep_their_distance_order_and_bounds(self):
    y = np.array([0.5, 0.51, 0.0, 0.5, 0.99, 1.0])
    places = canvas.spread(y, 0.1, 0.05, 0.95)
    self.assertGreaterEqual(np.diff(np.sort(places)).min(), 0.1 - 1e-12)
    self.assertBetween(places.min(), 0.05, 0.95)
    self.assertBetween(places.max(), 0.05, 0.95 + 1e-12)
    np.testing.assert_array_equal(np.argsort(places), np.argsort(y, kind="stable"))
    far = np.array([0.2, 0.8, 0.5])
    np.testing.assert_allclose(canvas.spread(far, 0.1, 0.05, 0.95), far)

  def test_scale_keeps_0_and_inf_beyond_the_others(self):
    scale = sigma_plots._sigma_scale(np.array([0.0, 0.1, 0.4, np.inf]))
    placed = scale.place(np.array([0.0, 0.1, 0.4, np.inf]))
    self.assertTrue(np.all(np.isfinite(placed)) and np.all(np.diff(placed) > 0))
    self.assertEqual(placed[1:3].tolist(), [0.1, 0.4])


if __name__ == "__main__":
  absltest.main()
