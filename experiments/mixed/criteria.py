"""A mixed model as a hierarchical model, and the criteria that a fit may maximise.

A term of the formula is a module of one number: phi is its fixed effect, sigma the standard
deviation between groups, theta_t the group's own value. Terms without a random part have sigma 0;
random terms without a fixed part have phi held at 0. The residual's log standard deviation is a
module with sigma 0, so that all groups share it.

    ml          sum_t log p(y_t | phi, sigma)                      the evidence
    reml        the same, phi of the fixed terms integrated out
    predictive  sum_t log p(y_t^val | theta_hat_t), where half of a group predicts the other half
"""

import functools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import shrinkmeta as sm
from experiments.mixed.formula import Formula

Family = Literal["gaussian", "logistic", "poisson"]
Estimator = Literal["ml", "reml", "predictive"]
LOG_SCALE = "log residual sd"
_EXACT = sm.Implicit(curvature="hessian", max_steps=50, tol=1e-13)


class Model(NamedTuple):
  """A formula and a family as labels and likelihood."""

  likelihood: sm.Likelihood
  labels: dict[str, str]
  formula: Formula
  family: Family


class Parameters(NamedTuple):
  phi: dict[str, Any]
  log_sigma2: dict[str, Any]


def build(formula: Formula, family: Family) -> Model:
  """The model of a formula."""
  terms = tuple(dict.fromkeys(formula.fixed + formula.random))

  def linear(theta: Mapping[str, jax.Array], x: Mapping[str, jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, (theta[term] * x[term] for term in x))

  if family == "gaussian":
    likelihood = sm.gaussian_with_scale(lambda theta, x: (linear(theta, x), theta[LOG_SCALE]))
    terms = (*terms, LOG_SCALE)
  else:
    likelihood = (sm.bernoulli if family == "logistic" else sm.poisson)(linear)
  return Model(likelihood, {term: term for term in terms}, formula, family)


def newton() -> optax.GradientTransformationExtraArgs:
  """Newton's method for a few parameters, steps of 2 at most; one or few if J is quadratic."""

  def init(params: Any) -> optax.OptState:
    del params
    return optax.EmptyState()

  def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
    value_fn, (flat, unravel) = extra["value_fn"], ravel_pytree(params)
    g = ravel_pytree(updates)[0]
    step = jnp.linalg.solve(jax.hessian(lambda v: value_fn(unravel(v)))(flat), g)
    # In whitened coordinates; a longer one may leave the range of a Poisson's exp f.
    return unravel(-step * jnp.minimum(1.0, 2.0 / jnp.linalg.norm(step))), state

  return optax.GradientTransformationExtraArgs(init, update)


INNER = sm.Inner(newton(), steps=50, tol=1e-12)


def _frozen(model: Model, boundary: tuple[str, ...]) -> tuple[str, ...]:
  moving = set(model.formula.random) - set(boundary)
  return tuple(term for term in model.labels if term not in moving)


def log_likelihood(
  model: Model, parameters: Parameters, batches: sm.Batch, boundary: tuple[str, ...] = ()
) -> jax.Array:
  """sum_t log p(y_t | phi, sigma) []."""
  frozen = _frozen(model, boundary)
  if set(frozen) == set(model.labels):  # nothing varies between groups
    one = lambda batch: sm.log_likelihood(model.likelihood, parameters.phi, batch)
    return jnp.sum(jax.vmap(one)(batches))

  def one(batch: sm.Batch) -> jax.Array:
    return sm.log_evidence(
      model.likelihood, model.labels, *parameters, batch, INNER, frozen=frozen
    )[0]

  return jnp.sum(jax.vmap(one)(batches))


def _after(first: jax.Array, then: Parameters) -> Parameters:
  """Return `then`, which XLA cannot use before `first` is known; NaN if `first` is NaN.

  Hazard, jaxlib 0.10.2 on CPUs: under vmap each LAPACK call holds a thread of XLA's pool while it
  waits for others of that pool. On a machine of two cores two such calls side by side wait for
  ever. So the two factorisations of `restricted` must run one after the other.
  """
  return jax.tree.map(lambda x: jnp.where(jnp.isnan(first), jnp.nan, x), then)


def restricted(
  model: Model, parameters: Parameters, batches: sm.Batch, boundary: tuple[str, ...]
) -> jax.Array:
  value = log_likelihood(model, parameters, batches, boundary)
  if not model.formula.fixed:
    return value
  frozen = _frozen(model, boundary)
  if set(frozen) == set(model.labels):
    frozen = _frozen(model, boundary[1:])  # sigma 0 does it, with a module left
  parameters = _after(value, parameters)
  return value + sm.restriction(
    model.likelihood, model.labels, *parameters, batches, model.formula.fixed, frozen
  )


def predictive(
  model: Model, parameters: Parameters, halves: tuple[sm.Batch, sm.Batch], boundary: Any
) -> jax.Array:
  frozen = _frozen(model, boundary)

  def one(train: sm.Batch, val: sm.Batch) -> jax.Array:
    theta = parameters.phi
    if set(frozen) != set(model.labels):
      theta, _ = sm.map_estimate(
        model.likelihood, model.labels, *parameters, train, INNER, _EXACT, frozen=frozen
      )
    return sm.log_likelihood(model.likelihood, theta, val)

  a, b = halves
  return jnp.sum(jax.vmap(one)(a, b)) + jnp.sum(jax.vmap(one)(b, a))


def halves(batches: sm.Batch, key: jax.Array) -> tuple[sm.Batch, sm.Batch]:
  """Return the examples of each group in two random halves, as masks; an odd one goes to either."""
  mask = batches.mask
  assert mask is not None
  keys = jax.random.split(key, 2)
  order = jnp.argsort(jnp.where(mask > 0, jax.random.uniform(keys[0], mask.shape), 2.0), 1)
  place = jnp.argsort(order, 1)
  size = jnp.sum(mask, 1)
  odd = jax.random.bernoulli(keys[1], shape=size.shape) * (size % 2)
  first = (place < (size // 2 + odd)[:, None]) * mask
  return batches._replace(mask=first), batches._replace(mask=mask - first)


def unpack(model: Model, v: jax.Array, boundary: tuple[str, ...]) -> Parameters:
  """(phi, log sigma^2) from the vector: fixed effects, log sigma^2 off the boundary, log sd."""
  fixed = model.formula.fixed
  random = [term for term in model.formula.random if term not in boundary]
  phi = dict.fromkeys(model.labels, jnp.zeros([], v.dtype))
  phi |= {term: v[i] for i, term in enumerate(fixed)}
  log_sigma2 = dict.fromkeys(model.labels, jnp.full([], -jnp.inf, v.dtype))
  log_sigma2 |= {term: v[len(fixed) + i] for i, term in enumerate(random)}
  if LOG_SCALE in model.labels:
    phi[LOG_SCALE] = v[-1]
  return Parameters(phi, log_sigma2)


def to_parameters(
  formula: Formula,
  fixed: Mapping[str, float],
  sd: Mapping[str, float],
  residual: float | None,
) -> Parameters:
  """(phi, log sigma^2) in the units of the data."""
  terms = list(dict.fromkeys(formula.fixed + formula.random))
  phi = {term: jnp.asarray(fixed.get(term, 0.0)) for term in terms}
  with np.errstate(divide="ignore"):
    log_sigma2 = {term: jnp.asarray(2 * np.log(sd.get(term, 0.0))) for term in terms}
  if residual is not None:
    phi[LOG_SCALE], log_sigma2[LOG_SCALE] = jnp.asarray(np.log(residual)), jnp.asarray(-np.inf)
  return Parameters(phi, log_sigma2)
