"""Measure one configuration of this library, in a process of its own.

A separate process has three advantages. Its peak memory is that of the configuration alone. The
number of host devices can be set before JAX starts. The time from its start to the first finished
update can be measured. `comparison/pairs.py` starts the process.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, cast

import jax

import shrinkmeta as sm
from experiments.benchmarks import flops, measure, report, workloads
from experiments.runs import files, training
from experiments.settings import machine

Batching = Literal["auto", "vmap", "sequential"] | int  # as a learner takes it


@dataclasses.dataclass(frozen=True)
class Config:
  """The settings of one measurement of this library; None takes the workload's own value.

  Attributes:
    steps: the number of inner steps.
    batching: the argument of the learner: "auto", "vmap", "sequential", or the number of tasks that
      run at once.
    devices: the number of host devices; 0 is one for each core.
    moving: "few" adapts the modules that the workload names and freezes the others; "all" adapts
      all.
    cache: the folder of XLA's persistent compilation cache; None switches the cache off.
  """

  workload: str = "w1"
  algorithm: str = "maml"
  seed: int = 0
  tasks: int | None = None
  shots: int | None = None
  steps: int | None = None
  batching: Batching = "auto"
  devices: int = 0
  curvature: Literal["hessian", "gauss_newton"] = "hessian"
  moving: Literal["few", "all"] = "few"
  tiny: bool = False
  repetitions: int = 10
  max_seconds: float = 60.0
  cache: str | None = None

  def __post_init__(self) -> None:
    for field, hint in typing.get_type_hints(Config).items():
      if options := typing.get_args(hint) if typing.get_origin(hint) is Literal else ():
        if getattr(self, field) not in options:
          wanted = ", ".join(map(str, options))
          raise ValueError(f"{field} is one of {wanted}; got {getattr(self, field)!r}.")
    if self.workload not in workloads.WORKLOADS:
      raise ValueError(f"workload must be one of {', '.join(workloads.WORKLOADS)}.")
    algorithms = workloads.WORKLOADS[self.workload].algorithms
    if self.algorithm not in algorithms:
      raise ValueError(
        f"{self.workload} runs {', '.join(algorithms)}; got algorithm {self.algorithm!r}."
      )

  def load(self) -> workloads.Workload:
    """Return the workload with this configuration's changes."""
    workload = workloads.load(self.workload, self.tiny, tasks=self.tasks, shots=self.shots)
    if self.steps is not None:
      workload = dataclasses.replace(workload, steps=self.steps, mode_steps=self.steps)
    return dataclasses.replace(workload, moving=None) if self.moving == "all" else workload


class Step(NamedTuple):
  """A function to compile, with the arguments of its first call on their devices."""

  call: Callable[..., Any]  # (state, tasks, key)
  arguments: tuple[Any, Any, jax.Array]
  feeds_back: bool  # the first result is the next state
  learner: sm.MetaLearner
  problem: workloads.Problem


def place(mesh: jax.sharding.Mesh | None, state: Any, tasks: Any) -> tuple[Any, Any]:
  """Put the state on every device, and split the tasks over the devices, padded as in `sm.fit`."""
  if mesh is None:
    return state, tasks
  share = sm.share_of_tasks(sm.num_tasks(tasks), mesh)[2]
  return sm.place_state(state, mesh), sm.place_tasks(tasks, mesh, share)


def make_step(workload: workloads.Workload, algorithm: str, seed: int, **keywords: Any) -> Step:
  """Return the update of `algorithm`; "adapt" stands for the adaptation of all tasks.

  Args:
    keywords: arguments of `workloads.make_learner`.
  """
  problem = workloads.make_problem(workload, seed)
  mesh = training.host_mesh(workload.tasks)
  learner = workloads.make_learner(workload, algorithm, problem, mesh=mesh, **keywords)
  tasks = problem.tasks
  if algorithm in ("reptile", "adapt"):  # neither judges by a validation part
    tasks = sm.Task(tasks.train, None)
  state, tasks = place(mesh, learner.init(problem.params), tasks)
  key = (
    jax.random.key(seed)
    if mesh is None
    else jax.device_put(jax.random.key(seed), jax.NamedSharding(mesh, jax.P()))
  )
  if algorithm == "adapt":
    adapt = lambda state, tasks, key: learner.adapt_tasks(state, tasks.train)[0]
    return Step(adapt, (state, tasks, key), False, learner, problem)
  update = lambda state, tasks, key: learner.update(state, tasks, key=key)
  return Step(update, (state, tasks, key), True, learner, problem)


def measure_config(config: Config, began: float | None = None) -> report.Record:
  """Return all measurements of one configuration as a flat record.

  Args:
    began: `time.time()` at the start of this process; the time to the first update counts from it.
  """
  workload = config.load()
  step = make_step(
    workload,
    config.algorithm,
    config.seed,
    batching=config.batching,
    curvature=config.curvature,
  )
  compiled = measure.compile_step(step.call, *step.arguments)
  result = jax.block_until_ready(compiled.call(*step.arguments))
  cold = None if began is None else time.time() - began
  state, tasks, key = step.arguments
  carried = [result[0] if step.feeds_back else state]

  def once() -> Any:
    result = compiled.call(carried[0], tasks, key)
    if step.feeds_back:
      carried[0] = result[0]
    return result

  timing = measure.time_in_turn({"step": once}, config.repetitions, config.max_seconds)["step"]
  peak = measure.peak_memory()  # before the matrix product, which is no part of it
  useful = flops.step(workload, config.algorithm, config.curvature)
  record = {
    "library": "shrinkmeta",
    "config": dataclasses.asdict(config) | {"sizes": dataclasses.asdict(workload)},
    "seed": config.seed,
    **report.environment(),
    **measure.timing_fields(timing),
    "trace_seconds": compiled.trace_seconds,
    "compile_seconds": compiled.compile_seconds,
    "cold_start_seconds": cold,
    "peak_rss_bytes": peak,
    "temp_bytes": compiled.temp_bytes,
    "xla_flops_loops_once": compiled.xla_flops,
    "useful_flops": useful,
    "useful_gflops": useful / measure.spread(timing.seconds).median / 1e9,
    "matmul_gflops": measure.matmul_rate(256 if config.tiny else 2048),
  }
  return record | (outcome(result[1]) if step.feeds_back else {})


def outcome(metrics: sm.Metrics) -> report.Record:
  """Return the loss, steps, products and failed tasks of an update."""
  metrics = cast(sm.Metrics, jax.device_get(metrics))
  mean = lambda x: float(x.mean())
  fields = {"loss": float(metrics.loss), "failed_tasks": int(metrics.num_failed)}
  if metrics.solve is not None:
    fields |= {
      "solve_steps": mean(metrics.solve.steps),
      "solve_residual": mean(metrics.solve.residual),
      "negative_curvature_tasks": int(metrics.solve.negative_curvature.sum()),
    }
  return fields | {"inner_steps": mean(metrics.inner.steps)}


def spawn(config: Config) -> report.Record:
  """Run `measure_config` in a new process, and return its record."""
  payload = json.dumps({"config": dataclasses.asdict(config), "began": time.time()})
  arguments = ["-m", "experiments.benchmarks", f"--worker={payload}"]
  return run_python(arguments, f"The measurement of {config}")


def run_python(arguments: list[str], what: str) -> report.Record:
  """Run Python, and return the record in its last line of output; `what` names it in errors."""
  root = str(pathlib.Path(__file__).absolute().parents[2])
  paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
  done = subprocess.run(
    [sys.executable, *arguments],
    env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    capture_output=True,
    text=True,
    check=False,
  )
  if done.returncode:
    raise RuntimeError(f"{what} failed:\n{done.stderr[-3000:]}")
  return json.loads(done.stdout.splitlines()[-1])


def main(payload: str) -> None:
  """Print the record of one configuration as a line; `spawn` starts the process that calls this."""
  request: Mapping[str, Any] = json.loads(payload)
  config = Config(**request["config"])
  machine.start_jax(config.devices, config.cache or "")
  print(files.strict_json(measure_config(config, request["began"])), flush=True)
