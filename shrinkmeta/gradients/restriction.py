"""What REML adds to the evidence: some modules of phi are integrated out too.

    sum_t log p(D_t | phi, sigma) + P log(2 pi) / 2 - log det(sum_t F_t) / 2
    F_t = X^T (Lambda^-1 + J s^2 J^T)^-1 X,     X = d outputs / d the integrated entries of phi

For a linear-Gaussian model phi is thereby integrated out under a flat prior: where phi is its
maximiser, the sum is the restricted likelihood.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from shrinkmeta.arguments import check_types
from shrinkmeta.base import MetaParams
from shrinkmeta.curvature.jacobian import output_curvature, whitened_jacobian
from shrinkmeta.curvature.solvers import exact
from shrinkmeta.mode.frozen import freeze, merge
from shrinkmeta.mode.task_model import TaskModel, task_model
from shrinkmeta.model import modules
from shrinkmeta.model.likelihood import Likelihood
from shrinkmeta.model.tasks import Batch, check_batch

PyTree = Any


def restriction(
  likelihood: Likelihood,
  labels: modules.Labels,
  phi: PyTree,
  log_sigma2: Mapping[str, Any],
  batches: Batch,
  integrated: Sequence[str],
  frozen: Iterable[str] = (),
) -> jax.Array:
  """Return what REML adds to the sum of T log evidences: P log(2 pi) / 2 - log det(sum_t F_t) / 2.

  F_t = X^T (Lambda^-1 + J s^2 J^T)^-1 X, [P, P], is what task t tells about the P entries of phi in
  the modules `integrated`. For models that are not linear-Gaussian this is Laplace's approximation,
  taken at theta = phi. It is differentiable.

  Args:
    likelihood: predict and log_prob.
    labels: the module of every parameter.
    phi: the parameters that all tasks share.
    log_sigma2: {module: [] log sigma_m^2}, finite or -inf.
    batches: training data, leaves [T, N, ...].
    integrated: modules of phi. A variance parameter, such as a log scale, is none of them.
    frozen: modules to leave out of the work, as for `map_estimate`.

  Returns:
    a number [] in nats.

  Raises:
    ValueError: `integrated` names what is no module, or a sigma is known to be inf.

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
  phi, taken = freeze(phi, log_sigma2, known, labels, frozen)

  def model_of(batch: Batch) -> TaskModel:
    return task_model(likelihood, labels, MetaParams(phi, log_s2), batch, taken)

  return restriction_of(model_of, batches, integrated)


def restriction_of(model_of: Any, batches: Batch, integrated: Sequence[str]) -> jax.Array:
  """Return `restriction` of tasks [T, ...] whose task models are `model_of(batch)`."""

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
    # X^T (Lambda^-1 + A A^T)^-1 X, the least of |X - A Z|^2_Lambda + |Z|^2: a sum of squares, where
    # Woodbury's difference would lose in float32 what a large sigma leaves of it.
    with exact():
      inner = jnp.eye(rows.shape[1], dtype=rows.dtype) + rows.T @ weigh(rows)
      z = jnp.linalg.solve(inner, rows.T @ weigh(x))
      left = x - rows @ z
      return left.T @ weigh(left) + z.T @ z

  total = jnp.sum(jax.vmap(information)(batches), 0)
  half = jnp.sum(jnp.log(jnp.diag(jnp.linalg.cholesky(total))))
  # phi is NaN where `frozen` contradicts a traced sigma, which a linear model would not show.
  phi = model_of(jax.tree.map(lambda x: x[0], batches)).params.phi
  contradicted = sum(jnp.sum(0.0 * p) for p in jax.tree.leaves(phi))
  return 0.5 * total.shape[0] * jnp.log(2 * jnp.pi) - half + contradicted
