"""The command `experiments.sinusoid` in miniature, and its tasks."""

import json
import math
import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from experiments.intervals import judge

ROOT = pathlib.Path(__file__).absolute().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ("empirical_bayes", "sigma_imaml"))
def test_binary(tmp_path, algorithm):
  command = [sys.executable, "-m", "experiments.sinusoid", f"--out={tmp_path}", "--meta_steps=75",
             "--tasks=8", "--test_tasks=20", f"--algorithm={algorithm}"]  # fmt: skip
  optimised = os.environ | {"XLA_FLAGS": ""}  # it runs for longer than it compiles
  done = subprocess.run(
    command, cwd=ROOT, env=optimised, capture_output=True, text=True, timeout=600
  )
  assert done.returncode == 0, done.stderr[-3000:]
  found = json.loads((tmp_path / "sinusoid.json").read_text())
  assert [row["shots"] for row in found["rows"]] == [5, 10, 20]
  assert (tmp_path / "sinusoid.png").stat().st_size > 20_000
  for row in found["rows"]:
    assert 0.7 < row["coverage"]["0.95"] <= 1.0
    assert row["coverage"]["0.5"] < row["coverage"]["0.8"] < row["coverage"]["0.95"]
    assert row["coverage"]["0.95"] > row["coverage_without_posterior"]
  assert "| 20 |" in done.stdout


def test_half_widths_are_those_of_students_t(monkeypatch):
  """By a network that predicts 0 ± 2.5 everywhere."""

  def constant(state, train, inputs):
    zeros = jnp.zeros(inputs.shape[:2])
    return judge.Judged(zeros, zeros + 2.5 / 1.96, jnp.float32(0.3), jnp.ones(len(zeros)))

  draw, targets = judge.draw, []

  def drawn(*given):
    data = draw(*given)
    targets.append(np.asarray(data.val.targets))
    return data

  monkeypatch.setattr(judge, "draw", drawn)
  found = judge.evaluate(constant, None, 4, 0)
  for row, y in zip(found, targets, strict=True):
    covered = (np.abs(y) < 2.5).mean(1)
    wanted = stats.t.ppf(0.975, 3) * covered.std(ddof=1) / 2
    assert row["coverage_95_half_width"] == pytest.approx(wanted, rel=1e-4) and wanted > 0
  one = judge.evaluate(constant, None, 1, 0)
  assert one[0]["coverage_95_half_width"] == math.inf  # the table has ± inf
