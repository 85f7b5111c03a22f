"""A check of the meta-gradient of a learner, for one model and a few tasks, before a long run.

It compares three derivatives of the meta-loss, module by module: the one that
`learner.meta_gradient` returns, the one through every inner step (in forward mode), and central
differences of the whole procedure.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from shrinkmeta import scalars, validate
from shrinkmeta.base import MetaLearner, MetaParams, MetaState, Metrics, check_learner, check_state
from shrinkmeta.model import modules
from shrinkmeta.model.tasks import Task, num_examples

PyTree = Any


class ModuleCheck(NamedTuple):
  """Three derivatives of the meta-loss along one direction within one module."""

  parameter: str  # "phi" or "log_sigma2"
  module: str
  direction: str  # phi: "gradient" (the learner's, unit norm) or "random"; log_sigma2: "axis"
  learner: float  # the derivative by `learner.meta_gradient`
  unrolled: float  # the derivative through every inner step
  differences: float  # the derivative by central differences
  unrolled_error: float  # |learner - unrolled| / |unrolled|
  error: float  # |learner - differences| / |differences|


class GradientCheck(NamedTuple):
  """The result of `check_meta_gradient`; `print` shows it as a table."""

  rows: tuple[ModuleCheck, ...]  # one row of the table each

  def __str__(self) -> str:
    line = "{:<11}{:<20}{:<10}{:>13}{:>13}{:>13}{:>12}{:>12}".format
    head = line(
      "", "module", "along", "learner", "unrolled", "differences", "err unr.", "err diff."
    )
    body = [
      line(*r[:3], *(f"{x:.5g}" for x in r[3:6]), *(f"{e:.1e}" for e in r[6:])) for r in self.rows
    ]
    return "\n".join([head, *body])


def check_meta_gradient(
  learner: MetaLearner,
  state: MetaState,
  tasks: Task,
  *,
  key: jax.Array | None = None,
  direction_key: jax.Array | None = None,
) -> GradientCheck:
  """Compare the meta-gradient of a learner with two other derivatives of the same loss.

  The derivative through the steps and the differences belong to the program as it runs, with its
  inexact modes. For an implicit algorithm the distance to them shows how far theta_hat is from the
  mode, how good the linear solve is, and what the approximate curvature leaves out.

  The entries of phi are NaN for reptile, whose phi follows no loss. The entries of sigma are NaN
  for sigma_gradient="joint": that gradient lets phi follow sigma, and here phi is held.

  Differences are precise to about 1e-8 in float64 and 1e-2 in float32. With L-BFGS look at the
  differences only: the derivative through its line search and its memory can be far from the
  derivative of the point where the steps end, even if that point is exact.

  Args:
    learner: the learner to check.
    state: the state at which the derivatives are compared.
    tasks: a few tasks, leaves [T, N, ...].
    key: for Inner.batch_size and Implicit.batch_size; the same for all evaluations.
    direction_key: for the random directions. None is jax.random.key(0).

  Returns:
    One row per parameter, module and direction.

  Raises:
    TypeError, ValueError: an argument is wrong; the message names it.

  Example:
    >>> import shrinkmeta as sm
    >>> linear = sm.gaussian(lambda theta, x: x * theta["w"])
    >>> learner = sm.sigma_maml(linear, {"w": "w"}, inner=sm.Inner(optax.sgd(0.1), 1))
    >>> batch = sm.Batch(jnp.ones((2, 4)), jnp.ones((2, 4)))
    >>> check = check_meta_gradient(learner, learner.init({"w": 0.0}), sm.Task(batch, batch))
    >>> [(row.parameter, row.direction, row.unrolled_error < 0.01) for row in check.rows]
    [('phi', 'gradient', True), ('phi', 'random', True), ('log_sigma2', 'axis', True)]
  """
  check_learner("learner", learner)
  check_state("state", state)
  validate.instance("tasks", tasks, Task, "a shrinkmeta.Task(train, val) of a few tasks")
  scalars.key("key", key)
  scalars.key("direction_key", direction_key)
  direction_key = jax.random.key(0) if direction_key is None else direction_key
  start = MetaParams(state.phi, state.log_sigma2)
  grad = jax.jit(learner.meta_gradient)(state, tasks, key)[0]
  losses = jax.jit(_losses(learner, state, tasks, key))
  slopes = jax.jit(lambda v: jax.jvp(losses, (start,), (v,))[1])
  eps = float(jnp.finfo(jnp.result_type(jax.tree.leaves(state.phi)[0])).eps)
  rows = []
  for parameter, module, along, v in _directions(learner, start, grad, direction_key):
    h = eps ** (1 / 3) * max(1.0, _module_norm(learner, start, parameter, module))
    up, down = (losses(optax.tree.add_scale(start, s * h, v))[parameter] for s in (1.0, -1.0))
    claimed = float(jnp.asarray(optax.tree.vdot(grad, v)))
    unrolled, differences = float(slopes(v)[parameter]), (float(up) - float(down)) / (2 * h)
    errors = (abs(claimed - truth) / max(abs(truth), 1e-300) for truth in (unrolled, differences))
    rows.append(ModuleCheck(parameter, module, along, claimed, unrolled, differences, *errors))
  return GradientCheck(tuple(rows))


def _losses(
  learner: MetaLearner, state: MetaState, tasks: Task, key: jax.Array | None
) -> Callable[[MetaParams], dict[str, jax.Array]]:
  """Build (phi, log sigma^2) -> {"phi": [], "log_sigma2": []}, the losses that the two follow."""
  log_p_sigma = learner.spec.log_p_sigma

  def losses(params: MetaParams) -> dict[str, jax.Array]:
    moved = state._replace(phi=params.phi, log_sigma2=params.log_sigma2)
    metrics = learner.meta_gradient(moved, tasks, key)[1]
    followed = metrics.phi_loss if learner.algorithm.phi == "evidence" else metrics.loss
    if log_p_sigma is not None:  # no reported loss holds it; its weight is that of `make_learner`
      followed -= log_p_sigma(params.log_sigma2) / _units(learner, tasks, metrics)
    if learner.spec.sigma_gradient == "joint":
      followed *= jnp.nan
    return {"phi": metrics.phi_loss, "log_sigma2": followed}

  return losses


def _units(learner: MetaLearner, tasks: Task, metrics: Metrics) -> jax.Array:
  """What a prior on sigma is divided by []: the tasks that did not fail, or their val examples."""
  if learner.algorithm.phi == "evidence" or tasks.val is None:
    return metrics.num_sound
  count = jax.vmap(lambda batch: num_examples(batch, metrics.loss.dtype))(tasks.val)
  return jnp.sum(jnp.where(metrics.failed, 0.0, count))


def _only(labels: modules.Labels, tree: PyTree, module: str) -> PyTree:
  """The tree, with every other module set to zero."""
  return jax.tree.map(lambda label, x: x if label == module else jnp.zeros_like(x), labels, tree)


def _module_norm(learner: MetaLearner, start: MetaParams, parameter: str, module: str) -> float:
  """The norm of one module of phi; 1 for log sigma^2."""
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
