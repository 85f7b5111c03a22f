"""The cost of a learned sigma, and the time that frozen modules save."""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp

import shrinkmeta as sm
from experiments.benchmarks import measure, report, workloads
from experiments.benchmarks.worker import Config, make_step
from experiments.networks.modules import network_order


def frozen(config: Config) -> Iterator[report.Record]:
  """Time adaptation of all modules, and of the last two with the others frozen at phi.

  A third learner adapts all modules, but sigma = 0 for the frozen ones is given as data. It
  computes the same result as the second without splitting the parameters. The results must agree to
  rounding.
  """
  workload = workloads.load("w1", config.tiny, tasks=config.tasks, shots=config.shots)
  steps = config.steps or (3 if config.tiny else 100)
  # A rate at which random data do not make the steps chaotic: results are to be compared.
  workload = dataclasses.replace(workload, mode_steps=steps, rate=0.02)
  every = make_step(workload, "sigma_imaml", config.seed, batching=config.batching)
  last = tuple(network_order(set(jax.tree.leaves(every.problem.labels)))[-2:])
  few = make_step(
    dataclasses.replace(workload, moving=last), "sigma_imaml", config.seed, batching=config.batching
  )
  state, tasks, _ = few.arguments
  ways = {
    "all modules": (every.learner, every.arguments[0]),
    f"{', '.join(last)}": (few.learner, state),
    "the same, not split": (every.learner, state),
  }
  calls = {}
  for name, (learner, at) in ways.items():
    adapt = lambda s, t, learner=learner: learner.adapt_tasks(s, t)[0]
    compiled = measure.compile_step(adapt, at, tasks.train).call
    calls[name] = lambda compiled=compiled, at=at: compiled(at, tasks.train)
  whole, split, traced = (sm.merge(call(), state.phi) for call in calls.values())
  difference = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), split, traced)
  moved = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), traced, state.phi)
  timings = measure.time_in_turn(calls, config.repetitions, config.max_seconds)
  reference = timings["all modules"].seconds
  for name, timing in timings.items():
    ratio = measure.ratios(reference, timing.seconds)._asdict()
    yield {"task_specific": name, **measure.timing_fields(timing), "times_faster": ratio}
  yield {
    "task_specific": "split against not split",
    "largest_difference": max(map(float, jax.tree.leaves(difference))),
    "largest_move": max(map(float, jax.tree.leaves(moved))),
  }


def shrinkage(config: Config) -> Iterator[report.Record]:
  """Time an update with learned sigma against the same update with fixed sigma."""
  workload = workloads.load("w1", config.tiny, tasks=config.tasks, shots=config.shots)
  calls = {}
  for name in ("sigma_imaml", "imaml"):
    step = make_step(
      workload, name, config.seed, batching=config.batching, curvature=config.curvature
    )
    compiled = measure.compile_step(step.call, *step.arguments).call
    calls[name] = lambda compiled=compiled, step=step: compiled(*step.arguments)
  timings = measure.time_in_turn(calls, config.repetitions, config.max_seconds)
  for name, timing in timings.items():
    yield {"algorithm": name, **measure.timing_fields(timing)}
  ratio = measure.ratios(timings["sigma_imaml"].seconds, timings["imaml"].seconds)
  yield {"algorithm": "ratio, sigma_imaml / imaml", "seconds": ratio._asdict()}
