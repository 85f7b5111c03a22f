"""Check the meta-gradient of a learner on a few tasks, before a long run.

For each module, the check compares three derivatives of the meta-loss: the one that
`learner.meta_gradient` returns, central differences of the whole computation, and forward-mode
differentiation through every inner step. The last one is left out if the inner optimiser has a line
search. A verdict sums up the result.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from shrinkmeta.base import MetaLearner, MetaParams, MetaState, Metrics, check_learner, check_state
from shrinkmeta.checks import scalars, validate
from shrinkmeta.model import modules
from shrinkmeta.model.tasks import Task, num_examples

PyTree = Any
Program = Callable[[MetaState], tuple[MetaParams, dict[str, jax.Array], Metrics]]


class ModuleCheck(NamedTuple):
  """Derivatives of the meta-loss along one direction within one module."""

  parameter: str  # "phi" or "log_sigma2"
  module: str
  direction: str  # phi: "gradient" (the learner's, unit norm) or "random"; log_sigma2: "axis"
  learner: float  # the derivative by `learner.meta_gradient`
  unrolled: float | None  # the derivative through every inner step; None with a line search
  differences: float  # the derivative by central differences
  unrolled_error: float | None  # |learner - unrolled| / |unrolled|
  error: float  # |learner - differences| / |differences|
  uncertainty: float  # |differences - differences with twice the step|


class GradientCheck(NamedTuple):
  """The result of `check_meta_gradient`; `print` shows a table and, as its last line, the verdict.

  Attributes:
    rows: one ModuleCheck for each row of the table.
    verdict: begins with "fine", "off" or "unsure"; see `check_meta_gradient`.
  """

  rows: tuple[ModuleCheck, ...]
  verdict: str

  def __str__(self) -> str:
    shown = [i for i in range(3, 9) if all(row[i] is not None for row in self.rows)]
    titles = (*"   ", "learner", "unrolled", "differences", "err unr.", "err diff.", "+-")
    line = lambda start, cells: (
      "{:<11}{:<20}{:<10}".format(*start) + "".join(f"{cell:>13}" for cell in cells)
    )
    number = lambda i, x: f"{x:.1e}" if i > 5 else f"{x:.5g}"
    head = line(("", "module", "along"), [titles[i] for i in shown])
    body = [line(row[:3], [number(i, row[i]) for i in shown]) for row in self.rows]
    return "\n".join([head, *body, f"verdict: {self.verdict}"])


def check_meta_gradient(
  learner: MetaLearner,
  state: MetaState,
  tasks: Task,
  *,
  key: jax.Array | None = None,
  direction_key: jax.Array | None = None,
  constants: PyTree = None,
) -> GradientCheck:
  """Compare the meta-gradient of a learner with other derivatives of the same loss.

  Central differences measure the program as it runs: they use the theta_hat that the inner loop
  reaches, not the exact mode. For an algorithm with an implicit gradient, the error has three
  sources: theta_hat is not exactly the mode, the linear solve is not exact, and Gauss-Newton leaves
  out a part of the curvature. The verdict is one of

  - "fine": every relative error is below the tolerance: 1e-3 in float64, 3e-2 in float32. For an
    algorithm with an implicit gradient, the mean over tasks of |grad J| is added to the tolerance,
    but at most 0.1. |grad J| bounds |z - z_hat| if the curvature is positive semi-definite.
  - "off": an error is above the tolerance. The verdict names the largest and its likely reason.
  - "unsure": an error is above the tolerance, but the central differences may be wrong: with twice
    the step they change by more than a tenth of that error. Or no derivative could be compared.

  The derivative through every inner step is shown too, but the verdict does not use it. It is left
  out if the inner optimiser has a line search. It can then be far from the derivative of the mode,
  even if the loop ends at the exact mode.

  For reptile the differences of phi are NaN, because reptile does not compute the loss of phi. For
  sigma_gradient="joint" the differences of sigma are NaN: the gradient includes how the optimum of
  phi changes with sigma, but the differences hold phi fixed.

  The program of the meta-gradient compiles once. It runs four times for every row.

  Args:
    learner: the learner to check.
    state: the state at which the derivatives are compared.
    tasks: a few tasks, leaves [T, N, ...].
    key: a random key for Inner.batch_size and Implicit.batch_size. All evaluations use it.
    direction_key: draws a random direction in phi for each module. None is jax.random.key(0).
    constants: replaces state.constants. None keeps them.

  Returns:
    A GradientCheck: the verdict, and per module two rows for phi and, if learned, one for sigma.

  Raises:
    TypeError, ValueError: an argument is wrong; the message names it.

  Example:
    >>> import shrinkmeta as sm
    >>> linear = sm.gaussian(lambda theta, x: x * theta["w"])
    >>> learner = sm.sigma_maml(linear, {"w": "w"}, inner=sm.Inner(optax.sgd(0.1), 1))
    >>> batch = sm.Batch(jnp.ones((2, 4)), jnp.ones((2, 4)))
    >>> check = sm.check_meta_gradient(learner, learner.init({"w": 0.0}), sm.Task(batch, batch))
    >>> [(row.parameter, row.direction, row.unrolled_error < 0.01) for row in check.rows]
    [('phi', 'gradient', True), ('phi', 'random', True), ('log_sigma2', 'axis', True)]
    >>> check.verdict.split(":")[0]
    'fine'
  """
  check_learner("learner", learner)
  check_state("state", state)
  validate.instance("tasks", tasks, Task, "a shrinkmeta.Task(train, val) of a few tasks")
  scalars.key("key", key)
  scalars.key("direction_key", direction_key)
  direction_key = jax.random.key(0) if direction_key is None else direction_key
  start = MetaParams(state.phi, state.log_sigma2)
  state = state if constants is None else state._replace(constants=constants)
  # Constants are an argument: closed over, they would be compiled in.
  compiled = jax.jit(_program(learner, tasks, key))
  program = lambda params: compiled(_moved(state, params))
  grad, _, metrics = program(start)
  slopes = None
  if _unrolled_has_meaning(learner, start.phi):
    losses = lambda state: lambda params: compiled(_moved(state, params))[1]
    slopes = jax.jit(lambda state, v: jax.jvp(losses(state), (start,), (v,))[1])
  dtype = jnp.result_type(jax.tree.leaves(state.phi)[0])
  rows = []
  for parameter, module, along, v in _directions(learner, start, grad, direction_key):
    h = float(jnp.finfo(dtype).eps) ** (1 / 3)
    h *= max(1.0, _module_norm(learner, start, parameter, module))
    losses_at = lambda step, v=v, name=parameter: float(
      program(optax.tree.add_scale(start, step, v))[1][name]
    )
    differences, coarse = ((losses_at(a) - losses_at(-a)) / (2 * a) for a in (h, 2 * h))
    claimed = float(jnp.asarray(optax.tree.vdot(grad, v)))
    unrolled = None if slopes is None else float(slopes(state, v)[parameter])
    of_unrolled = None if unrolled is None else _relative(claimed, unrolled)
    numbers = (claimed, unrolled, differences, of_unrolled, _relative(claimed, differences))
    rows.append(ModuleCheck(parameter, module, along, *numbers, abs(differences - coarse)))
  return GradientCheck(tuple(rows), _verdict(rows, learner, tasks, metrics, dtype))


def _relative(claimed: float, truth: float) -> float:
  """Return |claimed - truth| / |truth|."""
  return abs(claimed - truth) / max(abs(truth), 1e-300)


def _moved(state: MetaState, params: MetaParams) -> MetaState:
  """The state with other parameters."""
  return state._replace(phi=params.phi, log_sigma2=params.log_sigma2)


def _program(learner: MetaLearner, tasks: Task, key: jax.Array | None) -> Program:
  """Build state -> (gradient, {"phi": [], "log_sigma2": []}, metrics).

  The dict holds the losses that phi and log sigma^2 follow. One program computes all three. A
  second program for the losses alone would run faster, but its compilation would take longer than
  all its runs here.
  """
  log_p_sigma = learner.spec.log_p_sigma

  def program(state: MetaState) -> tuple[MetaParams, dict[str, jax.Array], Metrics]:
    grad, metrics = learner.meta_gradient(state, tasks, key)
    followed = metrics.phi_loss if learner.algorithm.phi == "evidence" else metrics.loss
    if log_p_sigma is not None:  # no loss of the metrics contains it; weighed as in `make_learner`
      followed -= log_p_sigma(state.log_sigma2) / _units(learner, tasks, metrics)
    if learner.spec.sigma_gradient == "joint":
      followed *= jnp.nan
    return grad, {"phi": metrics.phi_loss, "log_sigma2": followed}, metrics

  return program


def _unrolled_has_meaning(learner: MetaLearner, phi: PyTree) -> bool:
  """Return whether the inner optimiser has no line search: see `check_meta_gradient`."""
  searching = (
    optax.ScaleByLBFGSState,
    optax.ScaleByZoomLinesearchState,
    optax.ScaleByBacktrackingLinesearchState,
  )
  searches = lambda x: isinstance(x, searching)
  inner = learner.spec.inner
  states = jax.tree.leaves(jax.eval_shape(inner.optimizer.init, phi), is_leaf=searches)
  return not any(map(searches, states))


def _units(learner: MetaLearner, tasks: Task, metrics: Metrics) -> jax.Array:
  """Return the divisor [] of log_p_sigma in the meta-loss.

  For the evidence it is the number of tasks that did not fail, otherwise the number of their
  validation examples.
  """
  if learner.algorithm.phi == "evidence" or tasks.val is None:
    return metrics.num_sound
  count = jax.vmap(lambda batch: num_examples(batch, metrics.loss.dtype))(tasks.val)
  return jnp.sum(jnp.where(metrics.failed, 0.0, count))


def _only(labels: modules.Labels, tree: PyTree, module: str) -> PyTree:
  """Return `tree` with every other module set to 0."""
  return jax.tree.map(lambda label, x: x if label == module else jnp.zeros_like(x), labels, tree)


def _module_norm(learner: MetaLearner, start: MetaParams, parameter: str, module: str) -> float:
  """Return the norm of one module of phi, or 1 for log sigma^2."""
  return (
    float(optax.tree.norm(_only(learner.labels, start.phi, module))) if parameter == "phi" else 1.0
  )


def _directions(
  learner: MetaLearner, start: MetaParams, grad: MetaParams, key: jax.Array
) -> Iterator[tuple[str, str, str, MetaParams]]:
  """Yield (parameter, module, name of the direction, direction) for every comparison."""
  zero = optax.tree.zeros_like(start)
  noise = optax.tree.random_like(key, start.phi)
  for module in modules.names(learner.labels):
    for kind, tree in (("gradient", grad.phi), ("random", noise)):
      part = _only(learner.labels, tree, module)
      norm = optax.tree.norm(part)
      if norm > 0:
        yield "phi", module, kind, zero._replace(phi=optax.tree.scale(1 / norm, part))
  if learner.algorithm.sigma == "learned":
    for module in modules.names(learner.labels):
      if jnp.isfinite(start.log_sigma2[module]):
        axis = zero.log_sigma2 | {module: jnp.ones_like(zero.log_sigma2[module])}
        yield "log_sigma2", module, "axis", zero._replace(log_sigma2=axis)


def _verdict(
  rows: Sequence[ModuleCheck],
  learner: MetaLearner,
  tasks: Task,
  metrics: Metrics,
  dtype: jax.typing.DTypeLike,
) -> str:
  """Return the verdict on the rows: one line that begins with "fine", "off" or "unsure"."""
  tolerance = _tolerance(learner, tasks, metrics, dtype)
  judged = [row for row in rows if math.isfinite(row.differences)]
  skipped = sorted({row.parameter for row in rows} - {row.parameter for row in judged})
  tail = f" Not compared: {', '.join(skipped)}, which has no loss here." if skipped else ""
  if not judged:
    return f"unsure: no derivative could be compared. {_reason(learner, metrics, dtype)}{tail}"
  # Errors are relative. For a derivative near 0 the scale is 1 % of the largest of its parameter.
  largest = {row.parameter: 0.0 for row in judged}
  for row in judged:
    largest[row.parameter] = max(largest[row.parameter], abs(row.differences))
  scales = [max(abs(r.learner), abs(r.differences), 1e-2 * largest[r.parameter]) for r in judged]
  measured = [
    (abs(row.learner - row.differences) / max(scale, 1e-300), row.uncertainty / max(scale, 1e-300))
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
  amount = f"{100 * measured[worst][column]:.2g} % (tolerance {100 * tolerance:.2g} %)"
  reason = _reason(learner, metrics, dtype, unsure=not off)
  if off:
    return f"off: {what} by {amount}{more}. Likely reason: {reason}{tail}"
  return f"unsure: the differences for {what} vary by {amount}{more}. Likely reason: {reason}{tail}"


def _tolerance(
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
