"""The studies by name. Each takes a configuration and yields rows, some of which share columns."""

from collections.abc import Callable, Iterator

from absl import logging

from experiments.benchmarks import (
  report,
  study_costs,
  study_modules,
  study_pods,
  study_scaling,
  study_solves,
)
from experiments.benchmarks.worker import Config

STUDIES: dict[str, Callable[[Config], Iterator[report.Record]]] = {
  "scaling": study_scaling.scaling,
  "tolerance": study_solves.tolerance,
  "dual": study_solves.dual,
  "warm": study_solves.warm,
  "sigma_gradient": study_solves.sigma_gradient,
  "frozen": study_modules.frozen,
  "shrinkage": study_modules.shrinkage,
  "memory": study_costs.memory,
  "compile": study_costs.compilation,
  "precision": study_costs.precision,
  "pods": study_pods.pods,
}


def run(name: str, config: Config, keep: Callable[[report.Record], None]) -> str:
  """A table of all rows of a study, each of which is kept as soon as it is measured."""
  rows = []
  for row in STUDIES[name](config):
    keep(row)
    rows.append(row)
    logging.info("%s", {key: report.cell(value) for key, value in row.items()})
  return report.table(rows)
