"""Compute Laplace's posterior of one task at its mode; `posterior.py` has the formulas."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from shrinkmeta.arguments import check_types
from shrinkmeta.base import MetaParams
from shrinkmeta.checks import validate
from shrinkmeta.checks.kinds import parameter_tree
from shrinkmeta.curvature.jacobian import by_example, indefinite, one_output_array
from shrinkmeta.curvature.lanczos import lanczos
from shrinkmeta.curvature.solvers import exact, thin_svd
from shrinkmeta.devices.keys import same_in_any_batch
from shrinkmeta.mode.frozen import freeze
from shrinkmeta.mode.task_model import TaskModel, task_model
from shrinkmeta.model import modules
from shrinkmeta.model.likelihood import Likelihood
from shrinkmeta.model.tasks import Batch, check_batch
from shrinkmeta.model.variants import with_constants
from shrinkmeta.uncertainty.posterior import Posterior

PyTree = Any


def posterior(
  likelihood: Likelihood,
  labels: modules.Labels,
  phi: PyTree,
  log_sigma2: Mapping[str, jax.typing.ArrayLike],
  theta: PyTree,
  batch: Batch,
  *,
  rank: int | None = None,
  limit: int = 2**24,
  key: jax.Array | None = None,
  frozen: Iterable[str] = (),
  constants: PyTree = None,
) -> Posterior:
  """Return Laplace's posterior of one task around its mode `theta`.

      z | D ~ N(z_hat, (I + s C s)^-1),   theta = phi + s z

  s has the value sigma_m at every parameter of module m, and C is the Gauss-Newton curvature at the
  mode. The curvature has a factor A [R, D] with s C s = A^T A, where R counts the outputs of all
  examples and D the adapted parameters.

  Args:
    likelihood: predict and log_prob.
    labels: the module of every parameter.
    phi: the parameters that all tasks share.
    log_sigma2: {module: [] log sigma_m^2}, finite, or -inf for frozen modules.
    theta: the mode, from `map_estimate` or `learner.adapt`.
    batch: the data of the task, without the T axis; for many tasks use `jax.vmap`.
    rank: the number of Lanczos steps. The variance of z is reduced in this many directions. In all
      others it stays 1, as in the prior. The derivative of a covariance then takes the directions
      as exact; it was 1 % off on a small network. None: exact if A has at most `limit` entries,
      else 64.
    limit: the largest number of entries of A for which rank=None is exact.
    key: draws the vector from which Lanczos begins; None is `jax.random.key(0)`.
    frozen: modules with sigma = 0, as for `map_estimate`. Under jit they are not left out unless
      they are named: A then has columns for them, and may exceed `limit`.
    constants: what predict takes as its third argument, or None; it has no derivative.

  Returns:
    a Posterior.

  Raises:
    TypeError, ValueError: an argument has the wrong type, the arguments do not fit each other, or a
      sigma is known to be inf.

  >>> import jax, jax.numpy as jnp
  >>> import shrinkmeta as sm
  >>> mean = sm.gaussian(lambda theta, x: x * theta["w"])  # noise 1, prior N(0, 1), 3 examples
  >>> batch = sm.Batch(jnp.ones(3), jnp.array([0.0, 1.0, 2.0]))
  >>> theta, _ = sm.map_estimate(mean, {"w": "w"}, {"w": 0.0}, {"w": 0.0}, batch)
  >>> found = sm.posterior(mean, {"w": "w"}, {"w": 0.0}, {"w": 0.0}, theta, batch)
  >>> float(found.predictive(jnp.ones(1)).variance[0])  # 1 / (1 + 3)
  0.25
  """
  check_types(likelihood=likelihood, key=key)
  parameter_tree("theta", theta)
  known = modules.check_parameters("phi", phi, "log_sigma2", log_sigma2, labels)
  phi, theta = jax.tree.map(jnp.asarray, (phi, theta))
  dtype = jnp.result_type(jax.tree.leaves(phi)[0])
  log_s2 = modules.finite_sigma(log_sigma2, "posterior of this kind")
  validate.same_shapes("theta", theta, "phi", phi)
  check_batch("batch", batch)
  rank = None if rank is None else validate.integer("rank", rank, least=1)
  limit = validate.integer("limit", limit, least=0)
  theta, taken = freeze(theta, log_sigma2, known, labels, frozen)
  at_mode = MetaParams(theta, {m: v.astype(dtype) for m, v in log_s2.items()})
  model = task_model(with_constants(likelihood, constants), labels, at_mode, batch, taken)
  outputs = jax.eval_shape(model.outputs_at, model.part)
  one_output_array(outputs)
  size = sum(x.size for x in jax.tree.leaves(model.part))
  if rank is None and outputs.size * size > limit:
    rank = 64
  exact = rank is None
  if exact:
    basis, values = _exact(model)
  else:
    key = jax.random.key(0) if key is None else same_in_any_batch(key)
    basis, values = _low_rank(model, rank, key)
  scale = model.white.scale
  return Posterior(theta, scale, basis, values, batch, *likelihood, constants, exact)


def _exact(model: TaskModel) -> tuple[jax.Array, jax.Array]:
  """Return (V [R, D], lambda [R]) from the singular value decomposition of A."""
  factor = model.factor()
  _, singular, basis = thin_svd(jax.lax.stop_gradient(factor.a))
  with exact():
    along = factor.rows @ basis.T
  held = jnp.sum(along * by_example(factor.lam, along), 0)  # lambda; its derivative holds V
  values = jnp.square(singular) + (held - jax.lax.stop_gradient(held))
  return basis, jnp.where(factor.negative, jnp.nan, values)


def _low_rank(model: TaskModel, rank: int, key: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Return (V [rank, D], lambda [rank]) from `rank` products with s C s."""
  flat, unravel = ravel_pytree(model.part)
  curved = model.product("gauss_newton")

  def product(v: jax.Array) -> jax.Array:
    return ravel_pytree(model.scaled(curved(model.scaled(unravel(v)))))[0]

  krylov = lanczos(product, jax.random.normal(key, flat.shape, flat.dtype), rank)
  values, vectors = krylov.eigh()
  values = jnp.where(indefinite(values), jnp.nan, jnp.maximum(values, 0.0))
  with exact():
    return vectors.T @ krylov.basis, values
