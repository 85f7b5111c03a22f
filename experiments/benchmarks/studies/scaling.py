"""How the seconds of an update grow with tasks, parameters, inner steps and examples."""

import dataclasses
from collections.abc import Iterator

import jax

from experiments.benchmarks import measure, report
from experiments.benchmarks.worker import Config, Step, make_step, outcome
from experiments.benchmarks.workloads import Workload

# Two hidden layers; steps too small to diverge at any width: a solve that breaks off is fast.
_BASE = Workload("mlp", ("sigma_imaml",), 1, 16, 16, 8, 128, 2, 1e-4, 5, mode_steps=10, cg=5)
AXES = {
  "tasks": (1, 2, 4, 8, 16, 32, 64, 128, 256),
  "parameters": (10_000, 40_000, 160_000, 640_000, 2_500_000, 10_000_000, 20_000_000),
  "steps": (1, 3, 10, 30, 100, 300, 1000),
  "examples": (1, 4, 16, 64, 256, 1024),
}
_TINY = {"tasks": (1, 2, 3), "steps": (1, 2, 3)}


def at(axis: str, value: int) -> Workload:
  """The base workload with one size changed."""
  if axis == "parameters":  # width^2 + 4 width + 1 of them
    return dataclasses.replace(_BASE, width=round((value + 3) ** 0.5 - 2))
  name = {"tasks": "tasks", "steps": "mode_steps", "examples": "shots"}[axis]
  return dataclasses.replace(_BASE, **{name: value})


def scaling(config: Config) -> Iterator[report.Record]:
  """Yield the seconds at each size, and for each axis the slope k of seconds ~ size^k."""
  for axis, values in (_TINY if config.tiny else AXES).items():
    sizes, seconds = [], []
    for value in values:
      step = make_step(
        at(axis, value),
        "sigma_imaml",
        config.seed,
        batching=config.batching,
        curvature="gauss_newton",
      )
      size = sum(x.size for x in jax.tree.leaves(step.problem.params))
      size = size if axis == "parameters" else value
      timing, solved = _time(step, config)
      sizes.append(size)
      seconds.append(measure.spread(timing.seconds).median)
      yield {"axis": axis, "size": size, **measure.timing_fields(timing), "solve_steps": solved}
    yield {"axis": axis, "slope": measure.loglog_slope(sizes, seconds)}


def _time(step: Step, config: Config) -> tuple[measure.Timing, float]:
  compiled = measure.compile_step(step.call, *step.arguments).call
  solved = outcome(compiled(*step.arguments)[1])["solve_steps"]
  steps = {"update": lambda: compiled(*step.arguments)}
  return measure.time_in_turn(steps, config.repetitions, config.max_seconds)["update"], solved
