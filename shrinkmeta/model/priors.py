"""Priors on what all tasks share: on sigma, {module: sigma_m}, and on phi.

A prior on sigma is a function of log_sigma2, {module: scalar}, that returns sum_m log p(sigma_m)
[], the density being that of sigma itself, not of its logarithm. A module frozen at sigma = 0 is
fixed, not estimated: it adds 0.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any
SigmaPrior = Callable[[Mapping[str, jax.typing.ArrayLike]], jax.Array]


def _sum_over_modules(log_density: Callable[[jax.Array], jax.Array]) -> SigmaPrior:
  def log_p(log_sigma2: Mapping[str, jax.typing.ArrayLike]) -> jax.Array:
    log_s2 = jnp.stack([jnp.asarray(x) for x in log_sigma2.values()])
    estimated = jnp.isfinite(log_s2)
    return jnp.sum(jnp.where(estimated, log_density(jnp.where(estimated, log_s2, 0.0)), 0.0))

  return log_p


def flat() -> SigmaPrior:
  """No preference: log p = 0 (improper)."""
  return _sum_over_modules(jnp.zeros_like)


def log_normal(median: float = 1.0, spread: float = 1.0) -> SigmaPrior:
  """log sigma_m ~ N(log median, spread^2); keeps every sigma within a few factors of the median.

  log p(sigma) = -((log sigma - log median) / spread)^2 / 2 - log(sigma spread) - log(2 pi) / 2
  """
  _positive(median=median, spread=spread)

  def log_density(log_s2: jax.Array) -> jax.Array:
    standard = (0.5 * log_s2 - math.log(median)) / spread
    return -0.5 * jnp.square(standard) - 0.5 * log_s2 - math.log(spread * math.sqrt(2 * math.pi))

  return _sum_over_modules(log_density)


def half_cauchy(scale: float = 1.0) -> SigmaPrior:
  """sigma_m ~ C+(0, scale), the horseshoe's: most sigma near 0, the heavy tail lets a few be large.

  log p(sigma) = log(2 / (pi scale)) - log(1 + sigma^2 / scale^2)

  References: Gelman, Prior distributions for variance parameters in hierarchical models, 2006;
    Carvalho, Polson, Scott, The horseshoe estimator for sparse signals, 2010.
  """
  _positive(scale=scale)

  def log_density(log_s2: jax.Array) -> jax.Array:
    return math.log(2 / (math.pi * scale)) - jax.nn.softplus(log_s2 - 2 * math.log(scale))

  return _sum_over_modules(log_density)


def exponential(scale: float = 1.0) -> SigmaPrior:
  """sigma_m ~ Exp(mean scale): -sigma / scale - log scale; a constant pull of every sigma to 0.

  References: Simpson et al., Penalising model component complexity, 2017, section 3.
  """
  _positive(scale=scale)
  return _sum_over_modules(lambda log_s2: -jnp.exp(0.5 * log_s2) / scale - math.log(scale))


def normal(scale: float, centre: PyTree | None = None) -> Callable[[PyTree], jax.Array]:
  """A prior on phi: sum over entries of log N(phi_i; centre_i, scale^2); centre None is 0."""
  _positive(scale=scale)

  def log_p(phi: PyTree) -> jax.Array:
    distance = phi if centre is None else jax.tree.map(jnp.subtract, phi, centre)
    leaf = lambda d: jnp.sum(
      -0.5 * jnp.square(d / scale) - math.log(scale * math.sqrt(2 * math.pi))
    )
    terms = jax.tree.leaves(jax.tree.map(leaf, distance))
    return sum(terms, jnp.zeros([], terms[0].dtype))

  return log_p


def _positive(**values: float) -> None:
  for name, value in values.items():
    if not value > 0:
      raise ValueError(f"{name} must be positive; got {value}.")
