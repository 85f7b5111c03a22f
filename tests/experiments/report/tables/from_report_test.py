"""The CSV files of a result page have the numbers of the report's tables."""

import subprocess
import sys

import numpy as np
import pytest

from experiments.report.statistics import average_seeds, interval
from experiments.report.tables import comparison, cost, sigma
from results import build, from_report
from tests.experiments.report.curves import curve

SIGMA = {"head": 0.5, "conv_0": 0.02, "norm_0": 0.25}


@pytest.fixture
def curves():
  own = [curve(seed=s, sigma={m: (1 + s) * v for m, v in SIGMA.items()}) for s in (0, 1)]
  return [*own, *(curve("maml", s) for s in (0, 1))]


def write(curves, folder):
  """Return {name of a file: its records} of what the script writes."""
  own = [c for c in curves if c.algorithm == "sigma_imaml"]
  held = [c._replace(sigma={**c.sigma, "conv_0": 0.0}, nll=c.nll + 0.25) for c in own]
  arms = {"sigma_imaml": {"inner": "adam", "inner_steps": 3}, "maml": {"trials": 8}}
  parts = [*comparison.tables(curves, 1), sigma.sigma_table(own)]
  parts += ["Chosen on: validation tasks", sigma.freezing_table(own, {0.1: held})]
  parts += ["Reported on: test tasks", sigma.freezing_table(own, {0.1: own})]
  parts += [cost.cost_table(curves, 4, arms), cost.settings_table(arms)]
  (folder / "tables_1.md").write_text("\n\n".join(part.rstrip() for part in parts) + "\n")
  command = [sys.executable, from_report.__file__, folder / "tables_1.md", folder / "page"]
  subprocess.run(command, check=True)
  return {file.name: build.read(file)[1] for file in (folder / "page").iterdir()}


def test_files_have_the_numbers_of_the_curves(curves, tmp_path):
  found = write(curves, tmp_path)
  names = {"accuracy", "nll", "differences_sigma_imaml", "sigma", "sigma_agreement", "freezing"}
  assert set(found) == {f"{name}.csv" for name in names | {"cost", "settings"}}

  accuracy, nll = average_seeds(curves, "accuracy"), average_seeds(curves, "nll")
  assert len(found["nll.csv"]) == 6
  for one in found["nll.csv"]:
    mean, half = interval(nll[one["algorithm"]][[0, 1, 10].index(int(one["step"]))])
    assert (one["nll_nats_per_example"], one["nll_nats_per_example_ci95"]) == (
      f"{mean:.3f}",
      f"{half:.3f}",
    )
  (one,) = found["differences_sigma_imaml.csv"]
  mean, half = interval(100 * (accuracy["sigma_imaml"][1] - accuracy["maml"][1]))
  assert (one["algorithm"], one["rival"], one["step"]) == ("sigma_imaml", "maml", "1")
  assert float(one["accuracy_difference_points"]) == pytest.approx(mean, abs=0.006)
  assert float(one["accuracy_difference_points_ci95"]) == pytest.approx(half, abs=0.006)
  best = np.argmin(nll["maml"].mean(1))
  assert one["nll_difference_nats_per_example_rival_at_its_best_step"] == str([0, 1, 10][best])

  assert [one["module"] for one in found["sigma.csv"]] == ["head", "norm_0", "conv_0"]
  assert float(found["sigma.csv"][0]["sigma"]) == pytest.approx(0.5 * 2**0.5, abs=0.006)
  assert found["sigma_agreement.csv"] == [
    {"algorithm": "sigma_imaml", "rank_correlation": "1.00", "log_sigma_correlation": "1.00"}
  ]
  chosen, reported = found["freezing.csv"]
  assert (chosen["split"], chosen["nll_difference_nats_per_example"]) == ("validation", "0.250")
  assert (reported["split"], reported["nll_difference_nats_per_example"]) == ("test", "0.000")
  assert chosen["task_specific_modules"] == "norm_0, head"
  assert [one["trials"] for one in found["settings.csv"]] == ["", "8"]
  assert found["settings.csv"][0]["inner_optimizer"] == "adam"
  assert [one["train_seconds"] for one in found["cost.csv"]] == ["1.5", "1.5"]


def test_a_file_without_tables_of_a_report_is_refused(tmp_path):
  (tmp_path / "other.md").write_text("| a | b |\n|---|---|\n| 1 | 2 |\n")
  command = [sys.executable, from_report.__file__, tmp_path / "other.md", tmp_path / "page"]
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 2 and "other.md has no table of a report" in done.stderr
  assert not (tmp_path / "page").exists()


def test_a_run_that_diverged_is_nan(curves, tmp_path):
  curves[-1] = curves[-1]._replace(nll=np.full((3, 6), np.inf))
  (one,) = (r for r in write(curves, tmp_path)["nll.csv"][3:4])
  assert (one["algorithm"], one["nll_nats_per_example"], one["nll_nats_per_example_ci95"]) == (
    "maml",
    "nan",
    "",
  )
