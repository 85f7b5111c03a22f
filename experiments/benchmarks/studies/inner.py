"""The cost of each optimiser that finds the mode of a task, on problems of the library's own."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import shrinkmeta as sm
from experiments.benchmarks import report
from experiments.benchmarks.worker import Config
from experiments.datasets import sinusoid
from experiments.datasets.characters import writing_systems
from experiments.networks import MLP, ConvNet

Made = tuple[sm.Likelihood, Any, sm.Batch]  # likelihood, parameters, training data of T tasks

# One rate serves all problems, as that of a default must.
OPTIMISERS: dict[str, Callable[[], optax.GradientTransformation]] = {
  "lbfgs": sm.lbfgs,
  "optax.lbfgs": optax.lbfgs,
  "momentum": lambda: optax.sgd(0.1, momentum=0.9),
  "adam": lambda: optax.adam(0.05),
}


def _linear(tasks: int) -> Made:
  """The example of README.md: all tasks share the slope, and each has its own level."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(tasks, 8, 2))
  y = x @ [2.0, -1.0] + rng.normal(size=(tasks, 1)) + rng.normal(size=(tasks, 8))
  params = {"slope": jnp.zeros(2), "level": jnp.zeros(())}
  predict = lambda p, x: x @ p["slope"] + p["level"]
  return sm.gaussian(predict), params, sm.Batch(jnp.float32(x), jnp.float32(y))


def _mixed(tasks: int) -> Made:
  """A mixed model whose predictor has another unit: y ~ days + (1 + days | subject)."""
  rng = np.random.default_rng(0)
  days = np.broadcast_to(np.arange(10.0), (tasks, 10))
  slope, level = 10 + 6 * rng.normal(size=(tasks, 1)), 250 + 25 * rng.normal(size=(tasks, 1))
  y = level + slope * days + 25 * rng.normal(size=(tasks, 10))
  params = {"slope": jnp.float32(0.4), "level": jnp.float32(10.0)}  # in units of the noise
  predict = lambda p, x: x * p["slope"] + p["level"]
  return sm.gaussian(predict), params, sm.Batch(jnp.float32(days), jnp.float32(y / 25))


def _sinusoid(tasks: int) -> Made:
  """Ten examples of a sinusoid, and an MLP 1-40-40-1."""
  problem = sinusoid.problem()
  batch = problem.train.sample(jax.random.key(0), 0, tasks).train
  net = MLP(1)
  params = net.init(jax.random.key(1), batch.inputs[0])["params"]
  apply: Any = net.apply
  return problem.likelihood(lambda p, x: apply({"params": p}, x)[..., 0]), params, batch


def _glyphs(tasks: int) -> Made:
  """Five characters, two examples each, a small network with batch norm."""
  problem = writing_systems.problem(ways=5, shots=2, queries=1)
  batch = problem.train.sample(jax.random.key(0), 0, tasks).train
  net = ConvNet(5, features=8, norm="batch", blocks=2)
  params = net.init(jax.random.key(1), batch.inputs[0])["params"]
  apply: Any = net.apply
  return problem.likelihood(lambda p, x: apply({"params": p}, x)), params, batch


PROBLEMS = {"ten lines": _linear, "mixed model": _mixed, "sinusoid": _sinusoid, "glyphs": _glyphs}


def inner(config: Config) -> Iterator[report.Record]:
  """Yield the seconds to compile and to solve, the steps and the final gradient norm.

  There is one record for each optimiser and problem. Seconds are processor time, so that other work
  on the machine does not count. A run ends at a gradient norm of 1e-4 nats per example, or after
  200 steps.
  """
  tasks, steps = (2, 5) if config.tiny else (config.tasks or 8, 200)
  problems = dict(list(PROBLEMS.items())[:2]) if config.tiny else PROBLEMS
  for problem, make in problems.items():
    likelihood, params, batch = make(tasks)
    for name, optimizer in OPTIMISERS.items():
      learner = sm.sigma_imaml(
        likelihood, sm.by_layer(params), inner=sm.Inner(optimizer(), steps, tol=1e-4)
      )
      state = learner.init(params)
      started = time.process_time()
      solve = jax.jit(learner.adapt_tasks).lower(state, batch).compile()
      compiled = time.process_time()
      jax.block_until_ready(solve(state, batch))
      run = time.process_time()
      _, info = jax.block_until_ready(solve(state, batch))
      yield {
        "problem": problem,
        "optimiser": name,
        "compile_cpu_seconds": compiled - started,
        "solve_cpu_seconds": time.process_time() - run,
        "steps": float(info.steps.mean()),
        "converged": float(info.converged.mean()),
        "gradient_norm": float(jnp.median(info.grad_norm)),
        "objective": float(info.objective.mean()),
      }
