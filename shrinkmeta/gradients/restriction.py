"""The term that REML (restricted maximum likelihood) adds to the sum of the log evidences.

    P log(2 pi) / 2 - log det(sum_t F_t) / 2
    F_t = X^T (Lambda^-1 + J s^2 J^T)^-1 X,     X = d outputs / d the integrated entries of phi

P is the number of entries of phi in the modules that are integrated out. X is [N C, P], for N
examples with C outputs. J is the derivative of the outputs in theta, Lambda the curvature of -log p
in the outputs, and s is sigma. Add the term to the sum of the log evidences, at the phi that
maximises this sum. For a linear-Gaussian model the result is the restricted log-likelihood: these
entries of phi are integrated out under a flat prior.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from shrinkmeta.arguments import check_types
from shrinkmeta.base import MetaParams
from shrinkmeta.checks import validate
from shrinkmeta.curvature.jacobian import output_curvature, whitened_jacobian
from shrinkmeta.curvature.one_by_one import one_by_one
from shrinkmeta.curvature.solvers import exact
from shrinkmeta.mode.frozen import freeze, merge
from shrinkmeta.mode.task_model import TaskModel, task_model
from shrinkmeta.model import modules
from shrinkmeta.model.likelihood import Likelihood
from shrinkmeta.model.tasks import Batch, check_batch
from shrinkmeta.model.variants import with_constants

PyTree = Any


def restriction(
  likelihood: Likelihood,
  labels: modules.Labels,
  phi: PyTree,
  log_sigma2: Mapping[str, Any],
  batches: Batch,
  integrated: Sequence[str],
  frozen: Iterable[str] = (),
  *,
  constants: PyTree = None,
) -> jax.Array:
  """Return the term that REML adds to the sum of T log evidences.

      P log(2 pi) / 2 - log det(sum_t F_t) / 2,   F_t = X^T (Lambda^-1 + J s^2 J^T)^-1 X

  P is the number of entries of phi in the modules `integrated`. N examples have C outputs each.
  X [N C, P] is the derivative of the outputs with respect to these entries. J [N C, D] is the
  derivative of the outputs with respect to theta. Lambda is the curvature of -log p in the outputs,
  and s is sigma. F_t [P, P] is the information of task t about the entries of phi. For models that
  are not linear-Gaussian the term is an approximation: X, J and Lambda are those at theta = phi.
  The result is differentiable.

  Args:
    likelihood: predict and log_prob.
    labels: the module of every parameter.
    phi: the parameters that all tasks share.
    log_sigma2: {module: [] log sigma_m^2}, finite or -inf.
    batches: training data, leaves [T, N, ...].
    integrated: the modules of phi to integrate out. Do not name a module of variance parameters,
      such as a log scale.
    frozen: modules with sigma = 0, as for `map_estimate`.
    constants: what predict takes as its third argument, or None; it has no derivative.

  Returns:
    a number [] in nats.

  Raises:
    ValueError: `integrated` names a module that does not exist, a sigma is known to be inf, or phi
      has less than 32 bits.

  >>> import jax.numpy as jnp
  >>> import shrinkmeta as sm
  >>> mean = sm.gaussian(lambda theta, x: x * theta["w"])  # two tasks of one example each
  >>> batches = sm.Batch(jnp.ones((2, 1)), jnp.zeros((2, 1)))
  >>> value = sm.restriction(mean, {"w": "w"}, {"w": 0.0}, {"w": 0.0}, batches, ("w",))
  >>> bool(jnp.allclose(value, 0.5 * jnp.log(2 * jnp.pi)))  # F_t = 1 / (1 + 1), their sum is 1
  True
  """
  check_types(likelihood=likelihood)
  known = modules.check_parameters("phi", phi, "log_sigma2", log_sigma2, labels)
  log_s2 = modules.finite_sigma(log_sigma2, "evidence")
  integrated = modules.module_names("integrated", integrated, labels)
  check_batch("batches", batches, ("T", "N"))
  validate.wide(jnp.result_type(jax.tree.leaves(phi)[0]), "A restricted likelihood")
  phi, taken = freeze(phi, log_sigma2, known, labels, frozen)
  bound = with_constants(likelihood, constants)

  def model_of(batch: Batch) -> TaskModel:
    return task_model(bound, labels, MetaParams(phi, log_s2), batch, taken)

  return restriction_of(model_of, batches, integrated)


def _solved(k: jax.Array, b: jax.Array) -> jax.Array:
  """Return K^-1 B for a symmetric K, with all derivatives."""
  held = jax.lax.stop_gradient(k)
  solve = lambda _, b: one_by_one(jnp.linalg.solve)(held, b)
  return jax.lax.custom_linear_solve(lambda z: k @ z, b, solve, symmetric=True)


def restriction_of(model_of: Any, batches: Batch, integrated: Sequence[str]) -> jax.Array:
  """Return `restriction` of T tasks.

  Args:
    model_of: builds the task model of one task from its data.
    batches: training data, leaves [T, N, ...].
    integrated: the modules of phi to integrate out.
  """

  def information(batch: Batch) -> jax.Array:
    model = model_of(batch)
    phi = model.params.phi
    part = jax.tree.map(lambda label, p: p if label in integrated else None, model.labels, phi)
    ones = jax.tree.map(lambda p: jnp.ones([], jnp.result_type(p)), part)
    fixed = lambda part: model.likelihood.predict(merge(part, phi), batch.inputs)
    outputs, x = whitened_jacobian(fixed, part, ones)  # [R, P]
    _, rows = whitened_jacobian(model.outputs_at, model.part, model.white.scale)  # [R, D]
    lam = output_curvature(model.likelihood, outputs, batch)
    blocks = lambda v: v.reshape(*lam.shape[:2], -1)
    weigh = lambda v: jnp.einsum("nij,njd->nid", lam, blocks(v)).reshape(v.shape)
    # With A = J s, X^T (Lambda^-1 + A A^T)^-1 X is the minimum of |X - A Z|^2_Lambda + |Z|^2 over
    # Z, a sum of squares. Woodbury's formula would subtract two terms. With a large sigma they are
    # nearly equal, and float32 would lose the difference.
    with exact():
      inner = jnp.eye(rows.shape[1], dtype=rows.dtype) + rows.T @ weigh(rows)
      z = _solved(inner, rows.T @ weigh(x))
      left = x - rows @ z
      return left.T @ weigh(left) + z.T @ z

  total = jnp.sum(jax.vmap(information)(batches), 0)
  half = jnp.sum(jnp.log(jnp.diag(jnp.linalg.cholesky(total))))
  # phi is NaN if `frozen` contradicts a traced sigma. The derivatives of a linear model do not
  # depend on phi, so the NaN is added to the result here.
  phi = model_of(jax.tree.map(lambda x: x[0], batches)).params.phi
  contradicted = sum(jnp.sum(0.0 * p) for p in jax.tree.leaves(phi))
  return 0.5 * total.shape[0] * jnp.log(2 * jnp.pi) - half + contradicted
