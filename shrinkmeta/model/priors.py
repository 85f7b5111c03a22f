"""Priors on sigma, {module: sigma_m}, and on phi, the parameters that all tasks share.

A prior on sigma is a function. Its argument is log_sigma2, {module: []}. Its result is
sum_m log p(sigma_m) [], in nats. The density is that of sigma itself, not that of log sigma. A
frozen module (sigma = 0) or a free one (sigma = inf) has no sigma to estimate and adds 0.

A learner passes 0 in place of log sigma_m^2 = -inf or inf, and takes no gradient there. A prior of
your own must therefore not couple such a module to others.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shrinkmeta.checks import validate
from shrinkmeta.checks.kinds import parameter_tree

PyTree = Any
SigmaPrior = Callable[[Mapping[str, jax.typing.ArrayLike]], jax.Array]


def _sum_over_modules(log_density: Callable[[jax.Array], jax.Array]) -> SigmaPrior:
  """Return the prior that sums a log density over the modules whose sigma is estimated.

  Args:
    log_density: log sigma_m^2 [M] -> log p(sigma_m) [M].
  """

  def log_p(log_sigma2: Mapping[str, jax.typing.ArrayLike]) -> jax.Array:
    validate.instance("log_sigma2", log_sigma2, Mapping, "a dict {module: scalar}")
    for module, value in log_sigma2.items():
      validate.array(f"log_sigma2[{module!r}]", value, "a number")
    if not log_sigma2:
      raise ValueError("log_sigma2 has no modules.")
    log_s2 = jnp.stack([jnp.asarray(x) for x in log_sigma2.values()])
    estimated = ~jnp.isinf(log_s2)
    return jnp.sum(jnp.where(estimated, log_density(jnp.where(estimated, log_s2, 0.0)), 0.0))

  return log_p


def flat() -> SigmaPrior:
  """Return the flat prior on sigma, the improper density log p(sigma) = 0.

  Returns:
    log_sigma2 {module: []} -> 0 [].

  >>> flat()({"body": 0.0, "head": 1.0})
  Array(0., dtype=float32)
  """
  return _sum_over_modules(jnp.zeros_like)


def log_normal(median: float = 1.0, spread: float = 1.0) -> SigmaPrior:
  """Return a log-normal prior on sigma, which keeps every sigma_m near the median.

      log sigma_m ~ N(log median, spread^2)
      log p(sigma) = -((log sigma - log median) / spread)^2 / 2 - log(sigma spread) - log(2 pi) / 2

  Args:
    median: the median of sigma_m, in the unit of theta.
    spread: the standard deviation of log sigma_m. With spread = 1, about two thirds of the
      sigma_m lie within a factor of e of the median.

  Returns:
    log_sigma2 {module: []} -> sum_m log p(sigma_m) [], in nats.

  Raises:
    TypeError: if an argument is not a number.
    ValueError: if an argument is not positive and finite.

  >>> log_normal()({"head": 0.0})  # -log(2 pi) / 2
  Array(-0.919, dtype=float32)
  """
  _positive(median=median, spread=spread)

  def log_density(log_s2: jax.Array) -> jax.Array:
    standard = (0.5 * log_s2 - math.log(median)) / spread
    return -0.5 * jnp.square(standard) - 0.5 * log_s2 - math.log(spread * math.sqrt(2 * math.pi))

  return _sum_over_modules(log_density)


def half_cauchy(scale: float = 1.0) -> SigmaPrior:
  """Return the half-Cauchy prior of the horseshoe: most sigma_m are small, and a few may be large.

      sigma_m ~ C+(0, scale),  log p(sigma) = log(2 / (pi scale)) - log(1 + sigma^2 / scale^2)

  Args:
    scale: the median of sigma_m, in the unit of theta.

  Returns:
    log_sigma2 {module: []} -> sum_m log p(sigma_m) [], in nats.

  Raises:
    TypeError: if `scale` is not a number.
    ValueError: if `scale` is not positive and finite.

  References: Gelman, Prior distributions for variance parameters in hierarchical models, 2006;
    Carvalho, Polson, Scott, The horseshoe estimator for sparse signals, 2010.

  >>> half_cauchy()({"head": 0.0})  # -log pi
  Array(-1.145, dtype=float32)
  """
  _positive(scale=scale)

  def log_density(log_s2: jax.Array) -> jax.Array:
    return math.log(2 / (math.pi * scale)) - jax.nn.softplus(log_s2 - 2 * math.log(scale))

  return _sum_over_modules(log_density)


def exponential(scale: float = 1.0) -> SigmaPrior:
  """Return an exponential prior on sigma, which pulls all sigma_m to 0 with the same force.

      log p(sigma) = -sigma / scale - log scale

  Args:
    scale: the mean of sigma_m, in the unit of theta.

  Returns:
    log_sigma2 {module: []} -> sum_m log p(sigma_m) [], in nats.

  Raises:
    TypeError: if `scale` is not a number.
    ValueError: if `scale` is not positive and finite.

  References: Simpson et al., Penalising model component complexity, 2017, section 3.

  >>> exponential()({"body": 0.0, "head": 0.0})
  Array(-2., dtype=float32)
  """
  _positive(scale=scale)
  return _sum_over_modules(lambda log_s2: -jnp.exp(0.5 * log_s2) / scale - math.log(scale))


def normal(scale: float, centre: PyTree | None = None) -> Callable[[PyTree], jax.Array]:
  """Return a normal prior on phi.

      log p(phi) = sum_i log N(phi_i; centre_i, scale^2)

  Args:
    scale: the standard deviation, in the unit of phi.
    centre: the mean, a pytree of arrays with the structure of phi. None is a mean of 0.

  Returns:
    phi -> log p(phi) [], in nats, the sum over all parameters.

  Raises:
    TypeError: if `scale` is not a number, or `centre` is not a pytree of arrays.
    ValueError: if `scale` is not positive and finite. The function raises ValueError if `phi` has
      another structure or other shapes than `centre`.

  >>> normal(1.0)({"w": jnp.zeros(2)})  # -log(2 pi)
  Array(-1.838, dtype=float32)
  """
  _positive(scale=scale)
  if centre is not None:
    parameter_tree("centre", centre)

  def log_p(phi: PyTree) -> jax.Array:
    parameter_tree("phi", phi)
    if centre is not None:  # of any dtype
      zeros = lambda tree: jax.tree.map(lambda x: np.broadcast_to(0.0, jnp.shape(x)), tree)
      validate.same_shapes("phi", zeros(phi), "the centre of its prior", zeros(centre))
    distance = phi if centre is None else jax.tree.map(jnp.subtract, phi, centre)
    leaf = lambda d: jnp.sum(
      -0.5 * jnp.square(d / scale) - math.log(scale * math.sqrt(2 * math.pi))
    )
    terms = jax.tree.leaves(jax.tree.map(leaf, distance))
    return sum(terms, jnp.zeros([], terms[0].dtype))

  return log_p


def _positive(**values: float) -> None:
  """Raise an error unless every value is a positive, finite number."""
  for name, value in values.items():
    validate.array(name, value, "a positive number")
    known = validate.known(value)
    if known is None or known.ndim or not 0 < known < math.inf:
      raise ValueError(
        f"{name} must be positive, one finite number known outside jit; got {value}."
      )
