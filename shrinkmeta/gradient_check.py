"""Is the meta-gradient right for this model, these tasks, this learner? Ask before a long run.

Three derivatives of one loss, module by module: what `learner.meta_gradient` returns, the
derivative through every inner step (forward mode), and central differences of the whole procedure.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from shrinkmeta.base import MetaLearner, MetaParams, MetaState, Metrics
from shrinkmeta.model import modules
from shrinkmeta.model.tasks import Task, num_examples

PyTree = Any


class ModuleCheck(NamedTuple):
  """Derivatives of the meta-loss along one direction within one module."""

  parameter: str  # "phi" or "log_sigma2"
  module: str
  direction: str  # of phi: "gradient" (the learner's own, unit norm) or "random"; of sigma: "axis"
  learner: float
  unrolled: float
  differences: float
  unrolled_error: float  # |learner - unrolled| / |unrolled|
  error: float  # |learner - differences| / |differences|


class GradientCheck(NamedTuple):
  """What `check_meta_gradient` found; print it for a table."""

  rows: tuple[ModuleCheck, ...]

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
  """Compares `learner.meta_gradient` with two derivatives of the loss it claims to follow.

  The unrolled derivative and the differences belong to the program as it runs, inexact modes
  included; so for an implicit row the distance to them tells how far theta_hat is from the mode,
  how good the solve is, and what the curvature neglects or a sample of it leaves out. phi of
  reptile follows no loss: its rows are NaN. So are those of sigma with sigma_gradient="joint",
  which follows the loss where phi has settled anew, and here phi is held. Differences are precise
  to about 1e-8 in float64 and 1e-2 in float32.

  After L-BFGS trust the differences alone: a derivative through its line search and memory of past
  steps need not be near that of the point they end in, even where that point is exact.

  Args:
    state, tasks: where to compare; a few tasks do.
    key: for what Inner.batch_size and Implicit.batch_size draw; the same for all evaluations.
    direction_key: for the random directions; None is jax.random.key(0).
  """
  direction_key = jax.random.key(0) if direction_key is None else direction_key
  start, log_p_sigma = MetaParams(state.phi, state.log_sigma2), learner.spec.log_p_sigma
  grad = jax.jit(learner.meta_gradient)(state, tasks, key)[0]

  def loss_of_each(params: MetaParams) -> dict[str, jax.Array]:
    moved = state._replace(phi=params.phi, log_sigma2=params.log_sigma2)
    metrics = learner.meta_gradient(moved, tasks, key)[1]
    followed = metrics.phi_loss if learner.algorithm.phi == "evidence" else metrics.loss
    if log_p_sigma is not None:  # reported in no loss, see `make_learner` for its weight
      followed -= log_p_sigma(params.log_sigma2) / _units(learner, tasks, metrics)
    if learner.spec.sigma_gradient == "joint":
      followed *= jnp.nan
    return {"phi": metrics.phi_loss, "log_sigma2": followed}

  losses = jax.jit(loss_of_each)
  slopes = jax.jit(lambda v: jax.jvp(losses, (start,), (v,))[1])
  rows = []
  for parameter, module, along, v in _directions(learner, start, grad, direction_key):
    dtype = jnp.result_type(jax.tree.leaves(state.phi)[0])
    h = float(jnp.finfo(dtype).eps) ** (1 / 3) * max(
      1.0, _module_norm(learner, start, parameter, module)
    )
    up, down = (losses(optax.tree.add_scale(start, s * h, v)) for s in (1.0, -1.0))
    pick = lambda loss, parameter=parameter: float(loss[parameter])
    claimed = float(jnp.asarray(optax.tree.vdot(grad, v)))
    unrolled, differences = pick(slopes(v)), (pick(up) - pick(down)) / (2 * h)
    error = lambda truth, claimed=claimed: abs(claimed - truth) / max(abs(truth), 1e-300)
    rows.append(
      ModuleCheck(
        parameter,
        module,
        along,
        claimed,
        unrolled,
        differences,
        error(unrolled),
        error(differences),
      )
    )
  return GradientCheck(tuple(rows))


def _units(learner: MetaLearner, tasks: Task, metrics: Metrics) -> jax.Array:
  """What a prior on sigma is divided by: sound tasks, or their validation examples []."""
  if learner.algorithm.phi == "evidence" or tasks.val is None:
    return metrics.num_sound
  count = jax.vmap(lambda batch: num_examples(batch, metrics.loss.dtype))(tasks.val)
  return jnp.sum(jnp.where(metrics.failed, 0.0, count))


def _only(labels: modules.Labels, tree: PyTree, module: str) -> PyTree:
  """The tree with all other modules zero."""
  return jax.tree.map(lambda label, x: x if label == module else jnp.zeros_like(x), labels, tree)


def _module_norm(learner: MetaLearner, start: MetaParams, parameter: str, module: str) -> float:
  return (
    float(optax.tree.norm(_only(learner.labels, start.phi, module))) if parameter == "phi" else 1.0
  )


def _directions(
  learner: MetaLearner, start: MetaParams, grad: MetaParams, key: jax.Array
) -> Iterator[tuple[str, str, str, MetaParams]]:
  """(parameter, module, kind, direction) for all that is compared."""
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
