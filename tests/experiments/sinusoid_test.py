"""The command `experiments.sinusoid` in miniature, and its tasks."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

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
