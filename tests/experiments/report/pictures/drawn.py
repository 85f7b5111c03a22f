"""Helpers that the tests of pictures share."""

import pathlib
import tempfile
from unittest import mock

import numpy as np
from absl.testing import parameterized
from matplotlib import colors, image

from experiments.report.pictures import canvas
from experiments.runs.results import Curve

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


class PictureTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enterContext(mock.patch.object(canvas, "DPI", 80))  # small pictures are quick ones
    self.path = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory())) / "picture.png"

  def picture(self):
    """The pixels drawn, after checks that they are not blank and nothing is cut off."""
    pixels = image.imread(self.path)
    self.assertBetween(np.mean(pixels[..., :3].min(-1) < 0.9), 0.005, 0.8)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    np.testing.assert_array_equal(border, 1.0, "something is cut off at the border")
    return pixels

  def shows(self, pixels, algorithm):
    color = np.array(colors.to_rgb(canvas.hue(algorithm)))
    return bool(np.any(np.abs(pixels[..., :3] - color).max(-1) < 0.01))
