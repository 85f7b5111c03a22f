"""One measurement runs from end to end in miniature; no test here depends on time."""

import json
import math

import pytest

from experiments.benchmarks import worker, workloads
from experiments.benchmarks.worker import Config
from experiments.runs import files

FIELDS = (
  "trace_seconds compile_seconds cold_start_seconds peak_rss_bytes temp_bytes xla_flops_loops_once "
  "useful_flops useful_gflops matmul_gflops own_cores"
).split()
EVERY = [(w, a) for w, load in workloads.WORKLOADS.items() for a in load.algorithms]


def check(workload: str, algorithm: str) -> None:
  config = Config(workload, algorithm, tiny=True, repetitions=2, max_seconds=0.5, seed=5)
  record = json.loads(files.strict_json(worker.measure_config(config, began=0.0)))
  for name in FIELDS:
    assert math.isfinite(record[name]) and record[name] > 0, name
  assert record["seconds"]["low"] <= record["seconds"]["median"] <= record["seconds"]["high"]
  assert record["config"]["sizes"]["net"] and record["seed"] == 5 and record["jax"]
  if algorithm == "adapt":
    return
  assert record["failed_tasks"] == 0 and record["inner_steps"] >= 2
  assert (record["loss"] is None) == (algorithm == "reptile")  # it sees no validation part
  if algorithm in ("imaml", "sigma_imaml"):
    full = record["solve_steps"] == workloads.load(workload, tiny=True).cg
    assert full != (record["negative_curvature_tasks"] > 0)  # where a solve stops early


@pytest.mark.parametrize("algorithm", ["maml", "sigma_imaml"])
def test_sinusoids(algorithm):
  check("w3", algorithm)


@pytest.mark.slow
@pytest.mark.parametrize("workload, algorithm", EVERY)
def test_every_algorithm(workload, algorithm):
  check(workload, algorithm)


@pytest.mark.slow
def test_in_a_process_of_its_own():
  record = worker.spawn(Config("w3", "reptile", tiny=True, repetitions=1, devices=1))
  assert record["devices"] == 1 and 0 < record["cold_start_seconds"] < 600
  with pytest.raises(RuntimeError, match="sideways"):
    worker.spawn(Config("w3", "maml", tiny=True, batching="sideways"))  # type: ignore[arg-type]


def test_what_a_workload_does_not_run():
  with pytest.raises(ValueError, match="w2 runs imaml, sigma_imaml, maml; got algorithm 'reptile'"):
    Config("w2", "reptile")
