import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

import shrinkmeta as sm
from shrinkmeta.plots import reliability
from tests.plots.drawn import check_texts

pytest.importorskip("matplotlib")


def predictions():
  rng = np.random.default_rng(0)
  logits = 1.5 * rng.normal(size=(500, 4)).astype(np.float32)
  targets = np.array([rng.choice(4, p=special.softmax(0.6 * row)) for row in logits])
  return logits, targets, rng.integers(0, 3, 500)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_points_give_the_calibration_error(weighted):
  logits, targets, weights = predictions()
  mask = weights if weighted else None
  figure = sm.plots.reliability_diagram(jnp.asarray(logits), targets, mask, bins=10)
  (ax,) = figure.axes
  points = next(c.lines[0] for c in ax.containers if hasattr(c, "lines"))
  share = np.array([bar.get_height() for bar in ax.patches])
  assert share.sum() == pytest.approx(1.0)
  x, y = points.get_xdata(), points.get_ydata()
  want = float(sm.calibration(jnp.asarray(logits), jnp.asarray(targets), mask, 10).ece)
  assert np.sum(share[share > 0] * np.abs(x - y)) == pytest.approx(want, abs=1e-5)
  check_texts(figure, f"{want:.3f}", "confidence")


@pytest.mark.parametrize("scale", [0.001, 1.0, 3.0])
def test_the_unit_of_the_weights_does_not_matter(scale):
  logits, targets, weights = predictions()
  drawn = []
  for mask in (weights, scale * weights):
    (ax,) = sm.plots.reliability_diagram(logits, targets, mask).axes
    bars = next(c.lines[2][0] for c in ax.containers if hasattr(c, "lines"))
    drawn.append(([bar.get_height() for bar in ax.patches], bars.get_segments()))
    assert ax.get_title(loc="left").endswith(f", {np.sum(weights > 0)} predictions")
  for one, other in zip(*drawn, strict=True):
    np.testing.assert_allclose(one, other, atol=1e-6)


def test_the_interval_is_that_of_the_effective_number():
  log_p = np.log(np.tile([0.8, 0.2], (6, 1)))
  targets, weights = np.array([0, 1, 0, 0, 0, 1]), np.array([1.0, 2.0, 0.5, 0.0, 0.0, 1.5])
  for mask in (weights, (weights > 0).astype(float)):
    (ax,) = sm.plots.reliability_diagram(log_p, targets, mask).axes
    bars = next(c.lines[2][0] for c in ax.containers if hasattr(c, "lines"))
    share, n = mask @ (targets == 0) / mask.sum(), mask.sum() ** 2 / np.sum(mask**2)
    np.testing.assert_allclose(bars.get_segments()[0][:, 1], reliability._wilson(share, n))
  assert n == 4.0  # weights of 0 and 1 count predictions


def test_intervals_are_those_of_wilson():
  proportion = pytest.importorskip("statsmodels.stats.proportion")
  count, n = np.array([0, 3, 7, 10]), np.array([10, 10, 30, 10])
  want = proportion.proportion_confint(count, n, method="wilson")
  np.testing.assert_allclose(reliability._wilson(count / n, n), want, atol=1e-12)


def test_an_empty_mask_draws_no_point():
  logits, targets, weights = predictions()
  figure = sm.plots.reliability_diagram(logits, targets, 0 * weights)
  check_texts(figure, "0 predictions")
