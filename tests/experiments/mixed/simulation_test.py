"""On data from a known model, REML is unbiased and its intervals have their coverage."""

import numpy as np
import pytest

from experiments.mixed import simulation


def test_data_sets_have_the_sizes_and_spread_they_should():
  sets = [simulation.draw(0, i) for i in range(30)]
  sizes = np.concatenate([np.bincount(data["g"]) for data in sets])
  assert sizes.shape == (30 * 40,) and sizes.min() == 2 and sizes.max() == 20
  # Level and slope of a group: y = level + slope x, noise 0.8, in the largest groups.
  own = []
  for data in sets:
    for g in range(40):
      rows = data["g"] == g
      if rows.sum() >= 18:
        own.append(np.polyfit(data["x"][rows], data["y"][rows], 1))
  slopes, levels = np.array(own).T
  assert abs(levels.mean() - 0.5) < 0.3 and abs(slopes.mean() + 1.0) < 0.2
  # The spread of estimates is that of the groups and of the noise, 0.8^2 / 19.
  assert levels.var() == pytest.approx(1.0 + 0.64 / 19, rel=0.3)
  assert slopes.var() == pytest.approx(0.36 + 0.64 / 19, rel=0.3)
  np.testing.assert_array_equal(simulation.draw(0, 3)["y"], sets[3]["y"])
  assert simulation.draw(1, 3)["y"][0] != sets[3]["y"][0]


def test_an_estimate_of_zero_has_no_efficiency():
  assert simulation._efficiency(2.0, 4.0) == 0.5
  assert simulation._efficiency(np.inf, np.inf) is simulation._efficiency(1.0, np.inf) is None


@pytest.mark.slow
def test_200_data_sets():
  rows = simulation.run(200, 0, ("ml", "reml"))
  assert len(simulation.text(rows).split("\n")) == len(rows) + 2
  reml = {row["sd"]: row for row in rows if row["estimator"] == "reml"}
  for sd, row in reml.items():
    assert abs(row["median_bias"]) < 0.05, (sd, row)
    assert 0.92 <= row["coverage"] <= 0.98, (sd, row)
    assert row["efficiency"] == 1.0
  assert all(row["not_converged"] == 0 for row in rows), rows


@pytest.mark.slow
def test_all_estimators():  # a fit by the predictive criterion takes as long as 20 others
  rows = simulation.run(20, 0)
  assert {row["estimator"] for row in rows} == set(simulation.ESTIMATORS)
  assert all(row["not_converged"] == 0 for row in rows), rows
  assert all((row["coverage"] is None) == (row["estimator"] == "predictive") for row in rows)
