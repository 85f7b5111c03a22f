"""Every study runs in miniature, and its computed numbers are right."""

import math

import jax
import numpy as np
import pytest

from experiments.benchmarks.adapters.problem import document
from experiments.benchmarks.studies import index, scaling, solves
from experiments.benchmarks.worker import Config
from experiments.networks import llama

# These read what programs compiled with XLA's defaults hold, cost and round.
OF_XLA = ("memory", "compile", "parts", "precision", "pods")


@pytest.mark.parametrize(
  "name", [pytest.param(n, marks=pytest.mark.slow) if n in OF_XLA else n for n in index.STUDIES]
)
def test_study(name, monkeypatch):
  if name in OF_XLA:
    monkeypatch.setenv("XLA_FLAGS", "")  # of processes that studies start
  config = Config("w3", "reptile", tiny=True, repetitions=2, max_seconds=1.0)
  rows = []
  table = index.run(name, config, rows.append)
  assert rows and len(table.split("\n")) == len(rows) + 1
  if name == "frozen":
    assert rows[-1]["largest_difference"] < 1e-5 < rows[-1]["largest_move"]
  if name == "tolerance":
    assert rows[0]["phi_degrees"] == 0 and all(np.isfinite(row["sigma_degrees"]) for row in rows)
  if name == "precision":
    same, half, other = (row["phi_degrees"] for row in rows)
    assert same == 0 < half < other
  if name == "pods":
    assert rows[0]["bytes_a_device"] == rows[0]["bytes_a_device_at_10_L"]
    assert rows[0]["phi_and_sigma_bytes"] < rows[0]["all_reduce_bytes"]
  if name == "parts":
    nested = "network, value", "network, gradient", "meta-gradient of one task", "update"
    found = {(row["program"], row["part"]): row for row in rows}
    for program in {program for program, _ in found}:
      operations = [found[program, part]["operations"] for part in nested]
      assert operations == sorted(set(operations)) and found[program, "update"]["kernels"] > 0
  if name == "warm":
    assert rows[-1]["inner_steps_warm"] <= rows[-1]["inner_steps_cold"]


def test_angle():
  a, b = {"x": np.array([1.0, 0.0]), "y": np.array([0.0])}, {"x": np.ones(2), "y": np.zeros(1)}
  np.testing.assert_allclose(solves.angle(a, b), (45.0, 0.5**0.5))
  tiny = {"x": np.array([1.0, 1e-9]), "y": np.array([0.0])}
  np.testing.assert_allclose(solves.angle(tiny, a)[0], np.degrees(1e-9), rtol=1e-6)


@pytest.mark.parametrize("size", scaling.AXES["parameters"])
def test_growing_network(size):
  width = scaling.at("parameters", size).width
  assert width**2 + 4 * width + 1 == pytest.approx(size, rel=0.02)


@pytest.mark.parametrize("size", scaling.AXES["base"])
def test_growing_base(size):
  shapes = llama.shapes(llama.config_of(document(scaling.llama_sizes(size, tiny=False))))
  leaves = jax.tree.leaves(shapes, is_leaf=lambda x: isinstance(x, tuple))
  assert sum(map(math.prod, leaves)) == pytest.approx(size, rel=0.06)
