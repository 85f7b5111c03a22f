"""Studies of the linear solve of the implicit gradient: its tolerance, method and start."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import shrinkmeta as sm
from experiments.benchmarks import measure, report, workloads
from experiments.benchmarks.worker import Config, Step, make_step, outcome, place
from experiments.runs import training

_TOLERANCES = (1e-1, 3e-2, 1e-2, 1e-3, 1e-4)
_COUNTS = (1, 2, 5, 10)
_CONVERGED = 1e-6  # about what float32 reaches


class _Trained(NamedTuple):
  """A workload after a few updates, because gradients of a random network are not typical."""

  workload: workloads.Workload
  step: Step
  update: Callable[..., Any]  # compiled: (state, tasks, key)
  state: sm.MetaState


def _train(
  config: Config, name: str = "w1", prior: float | None = None, **keywords: Any
) -> _Trained:
  changes = {"tasks": config.tasks, "shots": config.shots, "prior": prior}
  workload = workloads.load(name, config.tiny, **changes)
  step = _step(workload, config, phi_optimizer=optax.adam(1e-3), **keywords)
  state, tasks, key = step.arguments
  compiled = measure.compile_step(step.call, *step.arguments).call
  for _ in range(2 if config.tiny else 20):
    state, _ = jax.block_until_ready(compiled(state, tasks, key))
  return _Trained(workload, step, compiled, state)


def _step(workload: workloads.Workload, config: Config, **keywords: Any) -> Step:
  keywords = {"curvature": "gauss_newton", "batching": config.batching} | keywords
  return make_step(workload, "sigma_imaml", config.seed, **keywords)


def angle(a: Any, b: Any) -> tuple[float, float]:
  """Return the angle between two trees in degrees, also if it is tiny, and |a| / |b|."""
  a, b = (np.asarray(ravel_pytree(tree)[0], float) for tree in (a, b))
  norms = np.linalg.norm(a), np.linalg.norm(b)
  chord = np.linalg.norm(a / norms[0] - b / norms[1])
  return float(np.degrees(2 * np.arcsin(min(1.0, chord / 2)))), float(norms[0] / norms[1])


def against(grad: sm.MetaParams, exact: sm.MetaParams) -> report.Record:
  """Return the angles and norm ratios of a meta-gradient to the exact one."""
  phi, sigma = angle(grad.phi, exact.phi), angle(grad.log_sigma2, exact.log_sigma2)
  return {
    "phi_degrees": phi[0],
    "phi_norm_ratio": phi[1],
    "sigma_degrees": sigma[0],
    "sigma_norm_ratio": sigma[1],
  }


def tolerance(config: Config) -> Iterator[report.Record]:
  """Compare meta-gradients for several CG tolerances and step counts with the converged one."""
  trained = _train(config)
  settings = {"converged": sm.Implicit(max_steps=300, tol=_CONVERGED)}
  settings |= {f"tol {tol:g}": sm.Implicit(max_steps=300, tol=tol) for tol in _TOLERANCES}
  settings |= {f"{count} steps": sm.Implicit(max_steps=count, tol=0.0) for count in _COUNTS}
  if config.tiny:
    settings = {name: settings[name] for name in ("converged", "tol 0.01", "2 steps")}
  calls = _meta_gradients(trained, config, settings)
  results = {name: jax.block_until_ready(call()) for name, call in calls.items()}
  timings = measure.time_in_turn(calls, config.repetitions, config.max_seconds)
  exact = results["converged"][0]
  for name, (grad, metrics) in results.items():
    yield {
      "solve": name,
      **against(grad, exact),
      **_solve_fields(metrics),
      **measure.timing_fields(timings[name]),
    }


def _meta_gradients(trained: _Trained, config: Config, settings: dict[str, sm.Implicit]) -> dict:
  """Return {name: a call of the compiled meta-gradient with that implicit setting}."""
  _, tasks, key = trained.step.arguments
  calls = {}
  for name, implicit in settings.items():
    learner = _step(trained.workload, config, implicit=implicit).learner
    gradient = lambda state, tasks, key, learner=learner: learner.meta_gradient(state, tasks, key)
    compiled = measure.compile_step(gradient, trained.state, tasks, key).call
    calls[name] = lambda compiled=compiled: compiled(trained.state, tasks, key)
  return calls


def _solve_fields(metrics: sm.Metrics) -> report.Record:
  fields = outcome(metrics)
  return {key: fields[key] for key in ("solve_steps", "solve_residual")}


def dual(config: Config) -> Iterator[report.Record]:
  """Time the dual solve against CG that runs to the same residual."""
  trained = _train(config)
  settings = {"none": sm.Implicit(solver="identity"), "dual": sm.Implicit(solver="dual")}
  calls = _meta_gradients(trained, config, settings)
  reached = float(jnp.median(calls["dual"]()[1].solve.residual))
  same = sm.Implicit(max_steps=300, tol=max(reached, _CONVERGED))
  calls |= _meta_gradients(trained, config, {"cg": same})
  timings = measure.time_in_turn(calls, config.repetitions, config.max_seconds)
  without = timings["none"].seconds
  for name, timing in timings.items():
    row = {"solver": name, **measure.timing_fields(timing)}
    if name != "none":
      each = [
        (a - b) / trained.workload.tasks for a, b in zip(timing.seconds, without, strict=True)
      ]
      row |= {"seconds_a_solve": measure.spread(each)._asdict(), **_solve_fields(calls[name]()[1])}
    yield row
  fast = measure.ratios(timings["cg"].seconds, timings["dual"].seconds)
  yield {"solver": "ratio of updates, cg / dual", "seconds": fast._asdict()}


def warm(config: Config) -> Iterator[report.Record]:
  """Count the steps of recurring tasks from zero, and from where the last meta-step ended.

  The tasks are sinusoids with a stronger prior. W1 is unsuitable: with batch statistics, ReLU and
  max-pool, its objective at N = 5 has kinks, at which no optimiser reaches a tolerance.
  """
  inner = sm.Inner(sm.lbfgs(), steps=100, tol=5e-2)
  implicit = sm.Implicit(max_steps=100, tol=1e-3)
  trained = _train(config, "w3", prior=10.0, inner=inner, implicit=implicit)
  learner, (_, tasks, key), state = trained.step.learner, trained.step.arguments, trained.state
  start = learner.no_start(state, sm.num_tasks(tasks))
  start = place(training.host_mesh(trained.workload.tasks), state, start)[1]
  warm_update = measure.compile_step(
    lambda s, t, w: learner.update(s, t, warm=w), state, tasks, start
  ).call
  for step in range(3 if config.tiny else 15):
    cold = outcome(trained.update(state, tasks, key)[1])
    state, metrics = jax.block_until_ready(warm_update(state, tasks, start))
    start, hot = metrics.warm, outcome(metrics)
    yield {
      "meta_step": step,
      "inner_steps_cold": cold["inner_steps"],
      "inner_steps_warm": hot["inner_steps"],
      "cg_steps_cold": cold["solve_steps"],
      "cg_steps_warm": hot["solve_steps"],
      "loss_cold": cold["loss"],
      "loss_warm": hot["loss"],
    }


def sigma_gradient(config: Config) -> Iterator[report.Record]:
  """Compare the three settings of `sigma_gradient` where phi follows l_MAP.

  The tasks are sinusoids, and phi is at its optimum for a fixed sigma. There "joint" is the
  derivative of the whole procedure. So the difference of the other two from it is their error.
  """
  workload = workloads.load("w3", config.tiny, tasks=config.tasks, shots=config.shots)
  problem = workloads.make_problem(workload, config.seed)
  steps = 3 if config.tiny else 4_000
  rate = optax.cosine_decay_schedule(1e-2, steps, 1e-3)

  def learner(name: Any) -> sm.MetaLearner:
    return sm.sigma_reptile(
      problem.likelihood,
      problem.labels,
      inner=sm.Inner(optax.sgd(2e-2, momentum=0.9), steps=100, tol=1e-3),
      implicit=sm.Implicit(max_steps=3_000, tol=1e-3),
      phi_optimizer=optax.adam(rate),
      sigma_optimizer=optax.set_to_zero(),
      init_sigma=0.3,
      log_p_phi=sm.priors.normal(1.0),
      sigma_gradient=name,
      batching="vmap",
    )

  names = ("joint", "per_task", "diagonal")
  learners = {name: learner(name) for name in names}
  state = learners["diagonal"].init(problem.params)
  warm = learners["diagonal"].no_start(state, workload.tasks)
  update = jax.jit(lambda s, w: learners["diagonal"].update(s, problem.tasks, warm=w))
  for _ in range(steps):
    state, metrics = update(state, warm)
    warm = metrics.warm
  calls = {}
  for name, each in learners.items():
    gradient = lambda state, tasks, warm, each=each: each.meta_gradient(state, tasks, warm=warm)
    compiled = measure.compile_step(gradient, state, problem.tasks, warm).call
    calls[name] = lambda compiled=compiled: compiled(state, problem.tasks, warm)
  results = {name: jax.block_until_ready(call()) for name, call in calls.items()}
  timings = measure.time_in_turn(calls, config.repetitions, config.max_seconds)
  exact = results["joint"][0].log_sigma2
  for name, (grad, metrics) in results.items():
    degrees, ratio = angle(grad.log_sigma2, exact)
    yield {
      "sigma_gradient": name,
      "cosine": float(np.cos(np.radians(degrees))),
      "norm_ratio": ratio,
      "signs_right": int(sum(np.sign(grad.log_sigma2[m]) == np.sign(exact[m]) for m in exact)),
      "modules": len(exact),
      "phi_grad_norm": float(metrics.phi_grad_norm),
      **_solve_fields(metrics),
      **measure.timing_fields(timings[name]),
    }
