"""Check the meta-gradient of a learner on a few tasks, before a long run.

For each module, the check compares three derivatives of the meta-loss: the one that
`learner.meta_gradient` returns, central differences of the whole computation, and forward-mode
differentiation through every inner step. The last one is left out if the inner optimiser has a line
search. A verdict sums up the result.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from shrinkmeta.base import MetaLearner, MetaParams, MetaState, Metrics, check_learner, check_state
from shrinkmeta.checks import scalars, validate
from shrinkmeta.diagnostics.verdict import ModuleCheck, tolerance_of, verdict_on
from shrinkmeta.learner.kept import kept
from shrinkmeta.learner.sigma import of_finite
from shrinkmeta.mode.frozen import check_own
from shrinkmeta.model import modules
from shrinkmeta.model.outputs import check_targets
from shrinkmeta.model.tasks import Task, check_tasks, num_examples
from shrinkmeta.model.variants import with_constants

PyTree = Any
Program = Callable[[MetaState], tuple[MetaParams, dict[str, jax.Array], Metrics]]
Slopes = Callable[[MetaState, MetaParams], dict[str, jax.Array]]


class GradientCheck(NamedTuple):
  """The result of `check_meta_gradient`; `print` shows a table and, as its last line, the verdict.

  Attributes:
    rows: one ModuleCheck for each row of the table.
    verdict: begins with "fine", "off" or "unsure"; see `check_meta_gradient`.
  """

  rows: tuple[ModuleCheck, ...]
  verdict: str

  def __str__(self) -> str:
    shown = [i for i in range(3, 9) if any(row[i] is not None for row in self.rows)]
    titles = (*"   ", "learner", "unrolled", "differences", "err unr.", "err diff.", "+-")
    line = lambda start, cells: (
      "{:<11}{:<20}{:<10}".format(*start) + "".join(f"{cell:>13}" for cell in cells)
    )
    number = lambda i, x: "" if x is None else f"{x:.1e}" if i > 5 else f"{x:.5g}"
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
  out if the inner optimiser has a line search: it can then be far from the derivative of the mode,
  even if the loop ends at the exact mode. It is also left out for fine_tuning and no_adaptation,
  whose updates take no inner steps, and for reptile, whose phi follows no loss function.

  For reptile the central differences in phi are NaN, because reptile computes no loss of phi. For
  sigma_gradient="joint" those in sigma are NaN. There the learner's gradient includes how the
  optimum of phi changes with sigma, but central differences hold phi fixed.

  Two programs compile: one for the meta-gradient and the losses, and one for the derivative through
  every inner step. For every row of the table the first program runs twice. It runs four times if
  the derivatives in the row do not agree.

  Args:
    learner: the learner to check.
    state: the state at which the derivatives are compared.
    tasks: a few tasks, leaves [T, N, ...].
    key: a random key for Inner.batch_size and Implicit.batch_size. All evaluations use it.
    direction_key: draws a random direction in phi for each module. None is jax.random.key(0).
    constants: replaces state.constants. None keeps them.

  Returns:
    A GradientCheck: the verdict, and for each module two rows for phi, or one if its gradient is 0.
    If sigma is learned, each module with a finite log sigma^2 also has a row for sigma.

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
  check_own(learner.spec, state.log_sigma2)
  if learner.spec.clip is not None:
    raise ValueError(
      "A clipped gradient is the derivative of no loss: check the learner that sm.clip_tasks was "
      "given, before it clips."
    )
  validate.instance("tasks", tasks, Task, "a shrinkmeta.Task(train, val) of a few tasks")
  scalars.key("key", key)
  scalars.key("direction_key", direction_key)
  direction_key = jax.random.key(0) if direction_key is None else direction_key
  phi, log_sigma2 = jax.tree.map(jnp.asarray, (state.phi, state.log_sigma2))
  state = state._replace(phi=phi, log_sigma2=log_sigma2)
  state = state if constants is None else state._replace(constants=constants)
  check_tasks(tasks, needs_val=learner.spec.needs_validation)
  check_targets(with_constants(learner.spec.likelihood, state.constants), "tasks", tasks, state.phi)
  programs = kept(learner, _programs)
  program = lambda state: programs.losses(state, tasks, key)
  grad, _, metrics = program(state)
  dtype = jnp.result_type(jax.tree.leaves(state.phi)[0])
  tolerance = tolerance_of(learner, tasks, metrics, dtype)
  meaning = _unrolled_has_meaning(learner, state.phi)
  slopes = (lambda state, v: programs.slopes(state, v, tasks, key)) if meaning else None
  directions = _directions(learner, state, grad, direction_key)
  rows = [_compared(learner, state, program, slopes, grad, tolerance, *one) for one in directions]
  return GradientCheck(tuple(rows), verdict_on(rows, learner, metrics, dtype, tolerance))


def _compared(
  learner: MetaLearner,
  state: MetaState,
  program: Program,
  slopes: Slopes | None,
  grad: MetaParams,
  tolerance: float,
  parameter: str,
  module: str,
  along: str,
  v: MetaParams,
) -> ModuleCheck:
  """Compute one row: the derivatives along v."""
  dtype = jnp.result_type(jax.tree.leaves(state.phi)[0])
  h = float(jnp.finfo(dtype).eps) ** (1 / 3)
  h *= max(1.0, _norm(_only(learner.labels, state.phi, module))) if parameter == "phi" else 1.0
  loss_at = lambda step: float(program(_moved(state, v, step))[1][parameter])
  slope = lambda h: (loss_at(h) - loss_at(-h)) / (2 * h)
  claimed, differences = _dot(grad, v), slope(h)
  unrolled = None if slopes is None else float(slopes(state, _tangent(state, v))[parameter])
  unrolled_error = None if unrolled is None else _relative(claimed, unrolled)
  error = _relative(claimed, differences)
  uncertainty = None if error <= tolerance else abs(differences - slope(2 * h))
  return ModuleCheck(
    parameter, module, along, claimed, unrolled, differences, unrolled_error, error, uncertainty
  )


def _relative(claimed: float, truth: float) -> float:
  """Return |claimed - truth| / |truth|."""
  return abs(claimed - truth) / max(abs(truth), 1e-300)


# A direction is a MetaParams of NumPy arrays, with None where it is 0. JAX would compile a program
# for every shape.


def _moved(state: MetaState, v: MetaParams, step: float) -> MetaState:
  """Return the state with parameters + step * v, where the old ones were, in their dtype."""

  def leaf(v: Any, old: Any) -> Any:
    if v is None:
      return old
    new = np.asarray(np.asarray(old, np.float64) + step * v, old.dtype)
    return jax.device_put(new, old.sharding if old.committed else None)

  moved = jax.tree.map(leaf, v, _params(state), is_leaf=_is_none)
  return state._replace(phi=moved.phi, log_sigma2=moved.log_sigma2)


def _tangent(state: MetaState, v: MetaParams) -> MetaParams:
  """Return v as JAX wants a tangent: zeros for None, in the dtype of the parameters."""
  whole = lambda v, old: (
    old if old is None else np.asarray(np.zeros(np.shape(old)) if v is None else v, old.dtype)
  )
  return jax.tree.map(whole, v, _params(state), is_leaf=_is_none)


def _dot(grad: MetaParams, v: MetaParams) -> float:
  """Return the inner product of a gradient and a direction."""
  product = lambda v, g: 0.0 if v is None else float(np.sum(np.asarray(g, np.float64) * v))
  return sum(jax.tree.leaves(jax.tree.map(product, v, grad, is_leaf=_is_none)))


def _params(state: MetaState) -> MetaParams:
  """The parameters of a state."""
  return MetaParams(state.phi, state.log_sigma2)


def _is_none(x: Any) -> bool:
  return x is None


class _Programs(NamedTuple):
  """The compiled programs of a learner."""

  losses: Callable[..., tuple[MetaParams, dict[str, jax.Array], Metrics]]
  slopes: Callable[..., dict[str, jax.Array]]


def _programs(learner: MetaLearner) -> _Programs:
  """Build the two programs; both take (..., tasks, key) after their own arguments.

  losses: state -> (gradient, {"phi": [], "log_sigma2": []}, metrics). The dict holds the losses
  that phi and log sigma^2 follow. One program computes all three. A second program for the losses
  alone would run faster, but its compilation would take longer than all its runs here.

  slopes: (state, direction) -> the slope of each loss, by forward-mode differentiation.
  """
  log_p_sigma = learner.spec.log_p_sigma

  @jax.jit
  def losses(
    state: MetaState, tasks: Task, key: jax.Array | None
  ) -> tuple[MetaParams, dict[str, jax.Array], Metrics]:
    grad, metrics = learner.meta_gradient(state, tasks, key)
    followed = metrics.phi_loss if learner.algorithm.phi == "evidence" else metrics.loss
    if log_p_sigma is not None:  # no loss of the metrics contains it; weighed as in `make_learner`
      followed -= of_finite(log_p_sigma)(state.log_sigma2) / _units(learner, tasks, metrics)
    if learner.spec.sigma_gradient == "joint":
      followed *= jnp.nan
    return grad, {"phi": metrics.phi_loss, "log_sigma2": followed}, metrics

  @jax.jit
  def slopes(
    state: MetaState, v: MetaParams, tasks: Task, key: jax.Array | None
  ) -> dict[str, jax.Array]:
    at = lambda params: state._replace(phi=params.phi, log_sigma2=params.log_sigma2)
    return jax.jvp(lambda params: losses(at(params), tasks, key)[1], (_params(state),), (v,))[1]

  return _Programs(losses, slopes)


def _unrolled_has_meaning(learner: MetaLearner, phi: PyTree) -> bool:
  """Return whether the derivative through every inner step says something: see the public one."""
  algorithm, inner = learner.algorithm, learner.spec.inner
  if algorithm.phi == "pooled" or algorithm[1:3] == ("map", "none"):
    return False
  searching = (
    optax.ScaleByLBFGSState,
    optax.ScaleByZoomLinesearchState,
    optax.ScaleByBacktrackingLinesearchState,
  )
  searches = lambda x: isinstance(x, searching)
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
  """Return one module of `tree` as NumPy arrays, with None in every other module."""
  mine = lambda label, x: np.asarray(x, np.float64) if label == module else None
  return jax.tree.map(mine, labels, tree)


def _norm(tree: PyTree) -> float:
  """Return the norm of a tree of NumPy arrays."""
  return math.sqrt(sum(float(np.sum(x * x)) for x in jax.tree.leaves(tree)))


def _directions(
  learner: MetaLearner, state: MetaState, grad: MetaParams, key: jax.Array
) -> Iterator[tuple[str, str, str, MetaParams]]:
  """Yield (parameter, module, name of the direction, direction) for every comparison."""
  still: dict[str, Any] = {module: None for module in state.log_sigma2}
  nothing = jax.tree.map(lambda _: None, state.phi)
  rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())
  for module in modules.names(learner.labels):
    steepest = _only(learner.labels, grad.phi, module)
    noise = jax.tree.map(lambda x: rng.normal(size=np.shape(x)), steepest)
    for kind, part in (("gradient", steepest), ("random", noise)):
      norm = _norm(part)
      if norm > 0:
        unit = jax.tree.map(lambda x, norm=norm: x / norm, part)
        yield "phi", module, kind, MetaParams(unit, dict(still))
  if learner.algorithm.sigma == "learned":
    for module in modules.names(learner.labels):
      if np.isfinite(state.log_sigma2[module]):
        axis: Any = still | {module: np.ones([])}
        yield "log_sigma2", module, "axis", MetaParams(nothing, axis)
