"""How seconds, memory and compile time of an update grow with tasks, parameters, steps, examples.

The axis `base` is another update: adapters of rank 8 are the parameters, and a Llama of 1 to 85 M
parameters is constant.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import optax

import shrinkmeta as sm
from experiments.benchmarks import measure, report
from experiments.benchmarks.adapters.problem import Problem, Sizes, log_prob
from experiments.benchmarks.worker import Config, make_step, outcome, place
from experiments.benchmarks.workloads import Workload
from experiments.networks import llama
from experiments.runs import training

# Two hidden layers; steps too small to diverge at any width: a solve that breaks off is fast.
_BASE = Workload("mlp", ("sigma_imaml",), 1, 16, 16, 8, 128, 2, 1e-4, 5, mode_steps=10, cg=5)
AXES = {
  "tasks": (1, 4, 16, 64, 256, 1024, 4096),
  "parameters": (10_000, 40_000, 160_000, 640_000, 2_500_000, 10_000_000, 20_000_000),
  "steps": (1, 3, 10, 30, 100, 300, 1000),
  "examples": (1, 4, 16, 64, 256, 1024),
  "base": (1_000_000, 7_000_000, 26_000_000, 85_000_000),
}
_TINY = {"tasks": (1, 2, 3), "steps": (1, 2, 3), "base": (2_000, 7_000, 20_000)}

# Rows for training, and as many for validation, each of 32 tokens.
_ROWS = Sizes(vocabulary=1_000, examples=8, tasks=4, tokens=32)
_LLAMAS = {  # parameters: the width, the hidden width and the number of layers
  1_000_000: (128, 344, 4),
  7_000_000: (256, 688, 8),
  26_000_000: (512, 1_376, 8),
  85_000_000: (768, 2_048, 12),
  2_000: (8, 16, 2),
  7_000: (16, 48, 2),
  20_000: (32, 64, 2),
}


class _Update(NamedTuple):
  call: Callable[..., Any]
  arguments: tuple[Any, ...]
  size: int  # on its axis


def scaling(config: Config) -> Iterator[report.Record]:
  """Yield the costs at each size, and for each axis the slopes k of seconds and bytes ~ size^k.

  The bytes are XLA's temporaries of an update, on each device.
  """
  for axis, values in (_TINY if config.tiny else AXES).items():
    rows = [_measure(axis, value, config) for value in values]
    yield from rows
    of = lambda field, rows=rows: [row[field] for row in rows]
    slope = lambda field, of=of: measure.loglog_slope(of("size"), of(field))
    medians = [row["seconds"]["median"] for row in rows]
    slopes = {"slope": measure.loglog_slope(of("size"), medians)}
    if all(of("temp_bytes")):
      slopes["slope_of_bytes"] = slope("temp_bytes")
    yield {"axis": axis, **slopes, "slope_of_compile_seconds": slope("compile_seconds")}


def at(axis: str, value: int) -> Workload:
  """The base workload with one size changed."""
  if axis == "parameters":  # width^2 + 4 width + 1 of them
    return dataclasses.replace(_BASE, width=round((value + 3) ** 0.5 - 2))
  name = {"tasks": "tasks", "steps": "mode_steps", "examples": "shots"}[axis]
  return dataclasses.replace(_BASE, **{name: value})


def llama_sizes(parameters: int, tiny: bool) -> Sizes:
  """The sizes of a Llama of about so many parameters."""
  width, hidden, layers = _LLAMAS[parameters]
  rows = dataclasses.replace(_ROWS, vocabulary=20, examples=2, tasks=2, tokens=4)
  heads = max(1, width // 64)
  return dataclasses.replace(
    rows if tiny else _ROWS, width=width, hidden=hidden, layers=layers, heads=heads
  )


def _update(axis: str, value: int, config: Config) -> _Update:
  """The update at one size."""
  if axis == "base":
    return _adapters(llama_sizes(value, config.tiny), config)
  step = make_step(
    at(axis, value), "sigma_imaml", config.seed, batching=config.batching, curvature="gauss_newton"
  )
  size = sum(x.size for x in jax.tree.leaves(step.problem.params))
  return _Update(step.call, step.arguments, size if axis == "parameters" else value)


def _adapters(sizes: Sizes, config: Config) -> _Update:
  """The update of the adapters of a Llama by sigma_imaml: 5 steps of SGD and 5 products with K."""
  problem = Problem(sizes, config.seed)
  predict = sm.lora.attach(lambda params, tokens: llama.apply(problem.config, params, tokens))
  mesh = training.host_mesh(sizes.tasks)
  learner = sm.sigma_imaml(
    sm.Likelihood(predict, log_prob),
    sm.lora.labels(problem.start),
    inner=sm.Inner(optax.sgd(sizes.rate), sizes.steps),
    implicit=sm.Implicit("gauss_newton", max_steps=5, tol=0.0),
    phi_optimizer=optax.sgd(1e-3),
    batching=config.batching,
    mesh=mesh,
  )
  half = sizes.examples // 2
  part = lambda rows: sm.Batch(rows[..., :-1], rows[..., 1:])
  tasks = sm.Task(part(problem.data[:, :half]), part(problem.data[:, half:]))
  state = learner.init(problem.start, constants=problem.base)
  state, tasks = place(mesh, state, tasks)
  size = sum(x.size for x in jax.tree.leaves(problem.base))
  return _Update(lambda state, tasks: learner.update(state, tasks), (state, tasks), size)


def _measure(axis: str, value: int, config: Config) -> report.Record:
  """The record of one size."""
  update = _update(axis, value, config)
  compiled = measure.compile_step(update.call, *update.arguments)
  solved = outcome(compiled.call(*update.arguments)[1])
  steps = {"update": lambda: compiled.call(*update.arguments)}
  timing = measure.time_in_turn(steps, config.repetitions, config.max_seconds)["update"]
  return {
    "axis": axis,
    "size": update.size,
    **measure.timing_fields(timing),
    "trace_seconds": compiled.trace_seconds,
    "compile_seconds": compiled.compile_seconds,
    "temp_bytes": compiled.temp_bytes,
    "solve_steps": solved["solve_steps"],
    "failed_tasks": solved["failed_tasks"],
  }
