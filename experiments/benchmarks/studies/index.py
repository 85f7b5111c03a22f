"""The studies by name. Each study takes a configuration and yields the records of its table."""

from collections.abc import Callable, Iterator

from absl import logging

from experiments.benchmarks import report
from experiments.benchmarks.studies import compiling, costs, inner, modules, pods, scaling, solves
from experiments.benchmarks.worker import Config

STUDIES: dict[str, Callable[[Config], Iterator[report.Record]]] = {
  "scaling": scaling.scaling,
  "tolerance": solves.tolerance,
  "dual": solves.dual,
  "warm": solves.warm,
  "sigma_gradient": solves.sigma_gradient,
  "frozen": modules.frozen,
  "shrinkage": modules.shrinkage,
  "memory": costs.memory,
  "compile": compiling.compilation,
  "parts": compiling.parts,
  "precision": costs.precision,
  "inner": inner.inner,
  "pods": pods.pods,
}


def run(name: str, config: Config, keep: Callable[[report.Record], None]) -> str:
  """Run a study and return its table; `keep` takes each record as soon as it is measured."""
  rows = []
  for row in STUDIES[name](config):
    keep(row)
    rows.append(row)
    logging.info("%s", {key: report.cell(value) for key, value in row.items()})
  return report.table(rows)
