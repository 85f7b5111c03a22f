"""Collect the log record of each update, pass it to the callbacks, and warn of problems in it."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging

from shrinkmeta.base import MetaLearner, MetaState, Metrics
from shrinkmeta.checks import validate
from shrinkmeta.training.callbacks import Callback

PyTree = Any
Evaluate = Callable[[MetaState], Mapping[str, Any]]  # state -> {name: number}


def measured(learner: MetaLearner, state: MetaState, metrics: Metrics) -> dict[str, jax.Array]:
  """Collect the numbers that one update logs.

  Args:
    learner: the learner of the run.
    state: the state after the update.
    metrics: the metrics of the update.

  Returns:
    {name: scalar []}. Every process and every device holds the same values.
  """
  inner, solve = metrics.mean_inner, metrics.mean_solve
  record = {
    "loss": metrics.loss,
    "phi_loss": metrics.phi_loss,
    "sound": metrics.num_sound,
    "phi_grad_norm": metrics.phi_grad_norm,
    "inner_objective": inner.objective,
    "inner_steps": inner.steps,
    "inner_grad_norm": inner.grad_norm,
  }
  if _has_convergence(learner):
    record["converged"] = inner.converged
  if solve is not None:
    record["solve_residual"], record["solve_steps"] = solve.residual, solve.steps
    record["negative_curvature"] = solve.negative_curvature
  if learner.algorithm.sigma != "inf":
    record["sigma_grad_norm"] = optax.tree.norm(metrics.sigma_grad)
    record |= {f"sigma/{m}": jnp.exp(0.5 * value) for m, value in state.log_sigma2.items()}
  return record


def _has_convergence(learner: MetaLearner) -> bool:
  """Return whether the metrics report convergence, which needs the inner loop's gradient norm."""
  return learner.spec.has_mode or learner.spec.inner.tol is not None


class Warnings:
  """Warn once if tasks fail, and once if few inner loops of an implicit gradient converge.

  Args:
    learner: the learner.
    meta_batch: the number of tasks per update.
    first: the number of the first update of this run.
    steps: the number of updates of all runs together. The warning about convergence uses the first
      20 updates of this run.
  """

  def __init__(self, learner: MetaLearner, meta_batch: int, first: int, steps: int):
    self._inner, self._meta_batch, self._first = learner.spec.inner, meta_batch, first
    self._wanted = min(steps - first, 20) if learner.spec.has_mode else 0
    self._converged: list[float] = []
    self._told_of_failures = False
    self._evidence = learner.algorithm.phi == "evidence"

  def see(self, step: int, numbers: Mapping[str, float]) -> None:
    """Check the log record of an update, and log a warning if tasks failed or few loops converged.

    Args:
      step: the number of the update.
      numbers: the log record of the update.
    """
    failed = int(numbers["failed"])
    if 0 < failed < self._meta_batch and not self._told_of_failures:
      self._told_of_failures = True
      logging.warning(
        "%d of %d tasks (%.0f %%) of step %d failed: their loss or gradient is not finite, or they "
        "have no example. Failed tasks take no part in an update. Look for NaN in the inputs, for "
        "labels out of range and for empty tasks, or lower the inner step size or init_sigma. %s"
        'Later failures are not logged here: the log record counts them as "failed".',
        failed,
        self._meta_batch,
        100 * failed / self._meta_batch,
        step,
        "The evidence also needs a log_prob that is concave in the outputs (docs/limits.md). "
        if self._evidence
        else "",
      )
    if len(self._converged) < self._wanted and math.isfinite(numbers["converged"]):
      self._converged.append(numbers["converged"])
      if len(self._converged) == self._wanted:
        self._judge_convergence(numbers)

  def _judge_convergence(self, numbers: Mapping[str, float]) -> None:
    """Log a warning if fewer than half of the inner loops of the first updates converged."""
    first, count, tol = self._first, self._wanted, self._inner.tol
    share = sum(self._converged) / count
    which = f"updates {first} to {first + count - 1}" if first else f"the first {count} updates"
    which = f"update {first}" if count == 1 else which
    if share < 0.5:
      logging.warning(
        "%.0f %% of the inner loops of %s converged. The implicit gradient is that of a "
        "converged loop and has an error elsewhere. At the end of a loop the gradient "
        "norm is %.2g on average; a loop counts as converged at %s or less. Give Inner more steps "
        "(now %d) or a smaller step size, or lower init_sigma. Whether the error matters: double "
        'the steps and compare sigma and the validation loss, as docs/limits.md, "The mode was '
        'not reached", shows.',
        100 * share,
        which,
        numbers["inner_grad_norm"],
        "1e-3 (Inner.tol is None)" if tol is None else f"{tol:g} (Inner.tol)",
        self._inner.steps,
      )


class Reporter:
  """Pass the log records of a run to its callbacks, one update late on an accelerator.

  Reading a number from an accelerator waits for the update that computes it. So the training loop
  holds the log record of an update until it has started the next update.
  """

  def __init__(self, callbacks: Sequence[Callback], meta_batch: int, warnings: Warnings | None):
    self._callbacks, self._meta_batch, self._warnings = callbacks, meta_batch, warnings
    self._held: tuple[int, PyTree] | None = None
    self._last = time.perf_counter()

  def hold(self, step: int, record: PyTree) -> None:
    """Keep the log record of `step`, {name: scalar []} on the device, without reading it."""
    self._held = step, record

  def flush(self, extra: Mapping[str, float] | None = None) -> None:
    """Read the held log record, add `extra` to it, and call the callbacks.

    Without a held log record the method does nothing.

    Raises:
      FloatingPointError: every task of the update failed, or its gradient is not finite.
    """
    if self._held is None:
      return
    (step, record), self._held = self._held, None
    numbers = {name: float(value) for name, value in jax.device_get(record).items()}
    numbers["failed"] = self._meta_batch - numbers.pop("sound")
    now = time.perf_counter()
    numbers |= {"seconds": now - self._last, **(extra or {})}
    self._last = now
    for callback in self._callbacks:
      callback.record(step, numbers)
    if self._warnings is not None:
      self._warnings.see(step, numbers)
    _check_finite(step, numbers, self._meta_batch)


@contextlib.contextmanager
def reporting(
  learner: MetaLearner, callbacks: Sequence[Callback], first: int, steps: int, meta_batch: int
) -> Iterator[Reporter]:
  """Call `begin` of every callback, yield a Reporter, and call `end`, even after an error.

  An exception of an `end` is logged. It replaces neither the result of the run nor the exception
  that ended it. KeyboardInterrupt and SystemExit are raised, after the `end` of every callback.

  Only process 0 calls callbacks and warns. In other processes the Reporter does neither.
  """
  called, warnings = (), None
  if jax.process_index() == 0:
    called, warnings = callbacks, Warnings(learner, meta_batch, first, steps)
  with contextlib.ExitStack() as stack:
    for number, callback in enumerate(called):
      callback.begin(first, steps)
      stack.callback(_end, number, callback)
    yield Reporter(called, meta_batch, warnings)


def _end(number: int, callback: Callback) -> None:
  """Call `end` of callbacks[number], and log its exception."""
  try:
    callback.end()
  except Exception:  # code of the user can raise anything, and the trained state is worth more
    logging.exception(
      "The end of callbacks[%d], %s, failed. The training itself is not affected, but what this "
      "callback writes may be incomplete.",
      number,
      getattr(callback.end, "__qualname__", callback.end),
    )


def _check_finite(step: int, numbers: Mapping[str, float], meta_batch: int) -> None:
  """Raise FloatingPointError if every task of `step` failed or its gradient is not finite."""
  if numbers["failed"] == meta_batch:
    # docs/hazards.md#adam-root explains why Adam needs eps_root.
    raise FloatingPointError(
      f"No task of step {step} had a finite loss and gradient, so there is nothing to learn from. "
      "Lower the inner step size or init_sigma, and look for NaN in the tasks; a gradient through "
      "Adam's steps needs eps_root > 0, and the evidence a log_prob that is concave in the outputs."
    )
  norms = [numbers["phi_grad_norm"], numbers.get("sigma_grad_norm", 0.0)]
  if not all(map(math.isfinite, norms)):
    raise FloatingPointError(
      f"The gradient of step {step} is not finite, though those of its tasks are: look at "
      "log_p_phi and log_p_sigma at the current phi and sigma. With `restricted`, the tasks of an "
      "update must determine every entry of phi in these modules: take more tasks, or leave a "
      "module out. The state is the one before this step."
    )


class Evaluation(NamedTuple):
  """The function that evaluates a state, and how often `fit` calls it."""

  function: Evaluate | None
  every: int  # updates
  best: str | None

  def due(self, done: int) -> bool:
    """Return whether to evaluate the state after `done` updates."""
    return self.function is not None and done % self.every == 0

  def __call__(self, state: MetaState) -> dict[str, float]:
    """Return {"eval/<name>": float}, or raise an error if a value or the name `best` is wrong."""
    assert self.function is not None
    found = self.function(state)
    validate.instance("evaluate(state)", found, Mapping, "a dict {name: number}")
    extra = {}
    for name, value in found.items():
      try:
        extra[f"eval/{name}"] = _number(value)
      except TypeError as error:
        raise TypeError(f"evaluate(state)[{name!r}] must be a number; got {value!r}.") from error
    if self.best is not None and f"eval/{self.best}" not in extra:
      raise ValueError(f"best is {self.best!r}, but evaluate gives {sorted(extra)}.")
    return extra


def _number(value: Any) -> float:
  """Convert a number of Python, NumPy or JAX to a float; raise TypeError for other values."""
  if isinstance(value, (str, bytes)) or np.ndim(value) != 0:
    raise TypeError(f"{type(value).__name__} is no number")
  return float(value)
