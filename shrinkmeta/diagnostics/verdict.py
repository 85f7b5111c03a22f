"""The verdict of `check_meta_gradient`: fine, off or unsure, and the likely reason."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from shrinkmeta.base import MetaLearner, Metrics
from shrinkmeta.model.tasks import Task, num_examples


class ModuleCheck(NamedTuple):
  """Derivatives of the meta-loss along one direction within one module."""

  parameter: str  # "phi" or "log_sigma2"
  module: str
  direction: str  # phi: "gradient" (the learner's, unit norm) or "random"; log_sigma2: "axis"
  learner: float  # the derivative by `learner.meta_gradient`
  unrolled: float | None  # the derivative through every inner step; None if left out
  differences: float  # the derivative by central differences
  unrolled_error: float | None  # |learner - unrolled| / |unrolled|
  error: float  # |learner - differences| / |differences|
  uncertainty: (
    float | None
  )  # |differences - those with twice the step|; None if the error is within the tolerance


def verdict_on(
  rows: Sequence[ModuleCheck],
  learner: MetaLearner,
  metrics: Metrics,
  dtype: jax.typing.DTypeLike,
  tolerance: float,
) -> str:
  """Return the verdict on the rows: one line that begins with "fine", "off" or "unsure"."""
  judged = [row for row in rows if math.isfinite(row.differences)]
  tail = _left_out(rows, learner, metrics)
  if not judged:
    no_loss = learner.algorithm[1:3] == ("map", "none")
    reason = "" if no_loss else " " + _reason(learner, metrics, dtype)
    return f"unsure: no derivative could be compared.{reason}{tail}"
  # Errors are relative. For a derivative near 0 the scale is 1 % of the largest of its parameter.
  largest = {row.parameter: 0.0 for row in judged}
  for row in judged:
    largest[row.parameter] = max(largest[row.parameter], abs(row.differences))
  scales = [max(abs(r.learner), abs(r.differences), 1e-2 * largest[r.parameter]) for r in judged]
  measured = [
    (
      abs(row.learner - row.differences) / max(scale, 1e-300),
      (row.uncertainty or 0.0) / max(scale, 1e-300),
    )
    for row, scale in zip(judged, scales, strict=True)
  ]
  beyond = [i for i, (error, _) in enumerate(measured) if not error <= tolerance]
  off = [i for i in beyond if not measured[i][1] > 0.1 * measured[i][0]]
  unsure = [i for i in beyond if i not in off]
  if not off and not unsure:
    largest_error = max(error for error, _ in measured)
    return (
      f"fine: {len(judged)} derivatives agree with central differences. The largest error is "
      f"{largest_error:.1e}, the tolerance {tolerance:.1e}.{tail}"
    )
  found, column = (off, 0) if off else (unsure, 1)
  worst = max(found, key=lambda i: measured[i][column] if math.isfinite(judged[i].learner) else 9e9)
  row, others = judged[worst], len(found) - 1
  more = f", and {others} other row{'s' * (others > 1)}" if others else ""
  what = f"{row.parameter} of module {row.module!r} along {row.direction!r}"
  percent = lambda x: f"{100 * x:.2g} %" if x < 0.995 else f"{100 * x:.0f} %"
  larger = max(abs(row.learner), abs(row.differences))
  small = larger < scales[worst]
  of = f"1 % of the largest {row.parameter} row" if small else "the larger value"
  amount = f"{percent(measured[worst][column])} of {of} (tolerance {percent(tolerance)})"
  reason = _reason(learner, metrics, dtype, unsure=not off)
  if off:
    return f"off: {what} by {amount}{more}. Likely reason: {reason}{tail}"
  return f"unsure: the differences for {what} vary by {amount}{more}. Likely reason: {reason}{tail}"


def _left_out(rows: Sequence[ModuleCheck], learner: MetaLearner, metrics: Metrics) -> str:
  """Return the end of a verdict: which parameters and tasks it does not speak of, and why."""
  missing = {r.parameter for r in rows} - {r.parameter for r in rows if np.isfinite(r.differences)}
  failed, tail = int(np.sum(metrics.failed)), ""
  if learner.algorithm[1:3] == ("map", "none"):
    tail = " Not compared: phi, because phi - theta_hat is the gradient of no loss."
  elif learner.spec.sigma_gradient == "joint" and "log_sigma2" in missing:
    tail = " Not compared: log_sigma2, because its gradient lets phi follow sigma."
  elif missing and failed < np.size(metrics.failed):
    tail = f" Not compared: {', '.join(sorted(missing))}, because a loss is not finite nearby."
  if failed:
    tail += f" Left out: {failed} of {np.size(metrics.failed)} tasks, which failed."
  return tail


def tolerance_of(
  learner: MetaLearner, tasks: Task, metrics: Metrics, dtype: jax.typing.DTypeLike
) -> float:
  """Return the largest relative error that passes.

  It depends on the precision of `dtype`, and on how far the inner loops are from their modes.
  """
  base = {8: 1e-3, 4: 3e-2}.get(jnp.dtype(dtype).itemsize, 0.2)
  if not learner.spec.has_mode:
    return base
  count = jax.vmap(lambda batch: num_examples(batch, metrics.loss.dtype))(tasks.train)
  # In whitened coordinates K >= I if C >= 0. Then |grad J| bounds |z - z_hat|.
  norms = np.asarray(count * metrics.inner.grad_norm, np.float64)[~np.asarray(metrics.failed)]
  distance = float(norms.mean()) if norms.size else math.inf
  return base + (min(0.1, distance) if math.isfinite(distance) else 0.1)


def _reason(
  learner: MetaLearner, metrics: Metrics, dtype: jax.typing.DTypeLike, unsure: bool = False
) -> str:
  """Return the likely reason why gradient and differences disagree, in a sentence or two."""
  spec, inner, solve = learner.spec, metrics.inner, metrics.solve
  sound = ~np.asarray(metrics.failed)
  share = lambda flags: f"{int(np.sum(~np.asarray(flags)[sound]))} of {int(sound.sum())}"
  mean = lambda values: float(np.mean(np.asarray(values, np.float64)[sound]))
  if not sound.all():
    return (
      f"{int((~sound).sum())} of {sound.size} tasks failed: their loss or gradient is not finite."
    )
  if spec.has_mode and not np.all(inner.converged):
    return (
      f"the inner loops of {share(inner.converged)} tasks are short of their mode: grad_norm is "
      f"{mean(inner.grad_norm):.1e} on average, the tolerance {spec.inner.tol or 1e-3:.0e}. Give "
      "Inner more steps, or lower init_sigma."
    )
  rough = (
    f"central differences are rough in {jnp.dtype(dtype).name}: check in float64, with "
    'jax.config.update("jax_enable_x64", True).'
  )
  if unsure:
    odd = "the loss has a kink near this state (ReLU, max), or does not repeat its values."
    return rough if jnp.dtype(dtype).itemsize < 8 else odd
  if spec.algorithm.gradient == "first_order":
    return "this algorithm takes d theta_hat / d phi = I, and so leaves out second derivatives."
  if spec.has_mode and solve is not None:
    if spec.implicit.solver == "identity":
      return 'solver="identity" leaves the curvature out.'
    if not np.all(solve.converged):
      return (
        f"the linear solves of {share(solve.converged)} tasks are short of Implicit.tol: the "
        f"residual is {mean(solve.residual):.1e} on average. Give Implicit more max_steps."
      )
    if spec.implicit.batch_size is not None:
      return "Implicit.batch_size takes the curvature of a few examples."
    if spec.implicit.damping:
      return f"Implicit.damping={spec.implicit.damping} adds to the curvature."
    if spec.implicit.curvature == "gauss_newton":
      return (
        "Gauss-Newton leaves out the second derivatives of a network that is not linear. "
        'Implicit(curvature="hessian") keeps them: try it if the error is too large.'
      )
  if jnp.dtype(dtype).itemsize < 8:
    return rough
  return "none of the settings explains it: the gradient is wrong, or the loss has a kink here."
