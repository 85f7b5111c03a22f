"""The log record of an update: how it is measured, when it is read, what makes it an error."""

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from shrinkmeta.base import MetaLearner, MetaState, Metrics
from shrinkmeta.training.callbacks import Callback

PyTree = Any


def measured(learner: MetaLearner, state: MetaState, metrics: Metrics) -> dict[str, jax.Array]:
  """Collect the numbers of one update that are logged.

  Args:
    learner: the learner that made the update.
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
  if solve is not None:
    record["solve_residual"], record["solve_steps"] = solve.residual, solve.steps
    record["negative_curvature"] = solve.negative_curvature
  if learner.algorithm.sigma != "inf":
    record["sigma_grad_norm"] = optax.tree.norm(metrics.sigma_grad)
    record |= {f"sigma/{m}": jnp.exp(0.5 * value) for m, value in state.log_sigma2.items()}
  return record


class Reporter:
  """Hand the log records of a run to its callbacks, one update late where that saves time.

  Reading a number from an accelerator waits for the update that computes it. So the loop holds the
  record of an update until it has started the next one.
  """

  def __init__(self, callbacks: Sequence[Callback], meta_batch: int):
    self._callbacks, self._meta_batch = callbacks, meta_batch
    self._held: tuple[int, PyTree] | None = None
    self._last = time.perf_counter()

  def hold(self, step: int, record: PyTree) -> None:
    """Keep the record of `step`, a dict of scalars [] on the device, without reading it."""
    self._held = step, record

  def flush(self, extra: Mapping[str, float] | None = None) -> None:
    """Read the record that is held, if any, add `extra` to it and call the callbacks.

    Raises:
      FloatingPointError: every task of that update failed, or its gradient is not finite.
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
    _check_finite(step, numbers, self._meta_batch)


@contextlib.contextmanager
def reporting(
  callbacks: Sequence[Callback], first: int, steps: int, meta_batch: int
) -> Iterator[Reporter]:
  """Call `begin` of every callback, yield a Reporter, and call `end` also after an error.

  Only process 0 calls callbacks: elsewhere the Reporter has none.
  """
  called = callbacks if jax.process_index() == 0 else ()
  with contextlib.ExitStack() as stack:
    for callback in called:
      callback.begin(first, steps)
      stack.callback(callback.end)
    yield Reporter(called, meta_batch)


def _check_finite(step: int, numbers: Mapping[str, float], meta_batch: int) -> None:
  """Raise FloatingPointError if the update of `step` could not move the state."""
  if numbers["failed"] == meta_batch:
    # Why eps_root: docs/hazards.md#adam-root.
    raise FloatingPointError(
      f"No task of step {step} had a finite loss and gradient, so there is nothing to learn from. "
      "Lower the inner step size or init_sigma, and look for NaN in the tasks; a gradient through "
      "Adam's steps needs eps_root > 0."
    )
  norms = [numbers["phi_grad_norm"], numbers.get("sigma_grad_norm", 0.0)]
  if not all(map(math.isfinite, norms)):
    raise FloatingPointError(
      f"The gradient of step {step} is not finite, though those of its tasks are: look at "
      "log_p_phi and log_p_sigma at the current phi and sigma. The state is the one before this "
      "step."
    )
