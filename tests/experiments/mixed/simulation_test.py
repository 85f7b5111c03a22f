"""Data sets from a known model: REML is unbiased, its intervals hold what they say."""

import numpy as np
import pytest

from experiments.mixed import simulation

pytestmark = pytest.mark.usefixtures("x64")


def test_data_sets_have_the_sizes_and_spread_they_should():
  batches = [simulation.draw(0, i) for i in range(30)]
  sizes = np.concatenate([np.asarray(b.mask).sum(1) for b in batches])
  assert batches[0].targets.shape == (40, 20) and sizes.min() == 2 and sizes.max() == 20
  # Level and slope of a group: y = level + slope x, noise 0.8, in the largest groups.
  own = []
  for b in batches:
    for x, y, m in zip(b.inputs["x"], b.targets, b.mask, strict=True):
      rows = np.asarray(m) > 0
      if rows.sum() >= 18:
        own.append(np.polyfit(np.asarray(x)[rows], np.asarray(y)[rows], 1))
  slopes, levels = np.array(own).T
  assert abs(levels.mean() - 0.5) < 0.3 and abs(slopes.mean() + 1.0) < 0.2
  # The spread of estimates is that of the groups and of the noise, 0.8^2 / 19.
  assert levels.var() == pytest.approx(1.0 + 0.64 / 19, rel=0.3)
  assert slopes.var() == pytest.approx(0.36 + 0.64 / 19, rel=0.3)
  np.testing.assert_array_equal(simulation.draw(0, 3).targets, batches[3].targets)
  assert np.any(np.asarray(simulation.draw(1, 3).targets) != np.asarray(batches[3].targets))


def test_an_estimate_of_zero_has_no_efficiency():
  assert simulation._efficiency(2.0, 4.0) == 0.5
  assert simulation._efficiency(np.inf, np.inf) is simulation._efficiency(1.0, np.inf) is None


@pytest.mark.slow
def test_200_data_sets():
  rows = simulation.run(200, 0)
  assert len(simulation.text(rows).split("\n")) == len(rows) + 2
  reml = {row["sd"]: row for row in rows if row["estimator"] == "reml"}
  for sd, row in reml.items():
    assert abs(row["median_bias"]) < 0.05, (sd, row)
    assert 0.92 <= row["coverage"] <= 0.98, (sd, row)
    assert row["efficiency"] == 1.0
  assert all(row["not_converged"] == 0 for row in rows), rows
  assert all((row["coverage"] is None) == (row["estimator"] == "predictive") for row in rows)
