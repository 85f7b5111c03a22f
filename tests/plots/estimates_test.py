import numpy as np
import pytest
from scipy import stats

import shrinkmeta as sm
from tests.plots.drawn import check_texts

pytest.importorskip("matplotlib")


def test_estimates_descend_with_their_intervals():
  mean, sd = np.array([0.1, 0.7, -0.4]), np.array([0.1, 0.2, 0.3])
  own = 2 * mean
  names = ["$a$", "b", "c"]
  figure = sm.plots.shrunk_estimates(
    mean, sd, unshrunk=own, names=names, centre=0.1, sigma=0.5, level=0.9
  )
  (ax,) = figure.axes
  assert [t.get_text() for t in ax.get_yticklabels()] == ["b", "$a$", "c"]
  bars = next(iter(ax.containers))
  np.testing.assert_allclose(bars.lines[0].get_xdata(), [0.7, 0.1, -0.4])
  want = np.array(stats.norm.interval(0.9, mean, sd)).T[[1, 0, 2]]
  np.testing.assert_allclose([s[:, 0] for s in bars.lines[2][0].get_segments()], want)
  squares = next(line for line in ax.lines if line.get_marker() == "s")
  np.testing.assert_allclose(squares.get_xdata(), own[[1, 0, 2]])
  check_texts(figure, *names, "90 % interval")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
  "mean, sd, options",
  [
    ([1.0, 2.0], [0.1, np.nan], {"centre": 0.0}),
    ([1.0, 2.0], [0.1, np.inf], {"centre": 1.0}),
    ([1.0, 2.0], [0.1, 0.1], {"centre": -3.0, "sigma": np.inf}),
    ([1.0, 1.0], [1.0, 1.0], {"level": 0.9999}),
  ],
)
def test_every_estimate_and_finite_interval_is_in_the_picture(mean, sd, options):
  mean, sd = np.array(mean), np.array(sd)
  figure = sm.plots.shrunk_estimates(mean, sd, names=["a", "b"], **options)
  figure.draw_without_rendering()
  low, high = figure.axes[0].get_xlim()
  shown = [mean, *stats.norm.interval(options.get("level", 0.95), mean, sd)]
  shown = np.append(np.concatenate(shown), options.get("centre", 1.0))
  shown = shown[np.isfinite(shown)]
  assert low < shown.min() and shown.max() < high


@pytest.mark.parametrize("count", [1, 40, 300])
def test_texts(count):
  mean = np.random.default_rng(0).normal(size=count)
  names = [f"school $number_{i}$ of a town with a long name" for i in range(count)]
  figure = sm.plots.shrunk_estimates(
    0.7 * mean, np.full(count, 0.4), unshrunk=mean, names=names, centre=0.0, sigma=0.6
  )
  assert figure.axes[0].get_title(loc="left").endswith("tasks") == (count > 1)
  check_texts(figure, *(names if count <= 60 else ()), f"{count} task{'s' * (count > 1)}")


@pytest.mark.parametrize(
  "change,words",
  [
    ({"sd": np.array([-1.0, 1.0])}, "sd must not be negative"),
    ({"sd": np.ones(3)}, r"sd must be \[2\]"),
    ({"names": ["a"]}, "names must be 2 strings"),
    ({"sigma": 1.0}, "sigma must not be negative and needs centre"),
    ({"level": 1.0}, "level must lie between 0 and 1"),
  ],
)
def test_refuses_what_does_not_fit(change, words):
  arguments = {"mean": np.zeros(2), "sd": np.ones(2)} | change
  with pytest.raises(ValueError, match=words):
    sm.plots.shrunk_estimates(**arguments)
