"""Whitened coordinates: theta = phi + s * z, in which every sigma is as easy as any other.

For finite sigma_m, s = sigma_m and the prior is |z|^2 / 2: nothing is divided by sigma, sigma = 0
holds the module at phi exactly, and the Hessian I + s H s is well conditioned for any mix of
sigma. For sigma_m = inf there is no prior: s = 1 and z is theta - phi itself. One code path so
serves every row of the family.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from shrinkmeta.model import modules

PyTree = Any


class Whitening(NamedTuple):
  """theta = phi + scale * z with log p(z) = -precision |z|^2 / 2, each a tree of scalars.

  The number 1.0 and the number 0.0, not arrays, where log sigma^2 is the number inf: known before
  anything is compiled, so that the prior's share is not even computed. Nor is it without a prior.
  """

  scale: PyTree  # leaves []: sigma_m, 0 where frozen, 1 where sigma_m is inf
  precision: PyTree  # leaves []: 1, or 0 where sigma_m is inf or there is no prior


def whitening(
  log_sigma2: Mapping[str, jax.typing.ArrayLike],
  labels: modules.Labels,
  dtype: jax.typing.DTypeLike,
  prior: bool = True,
) -> Whitening:
  """The coordinates for log_sigma2 {module: scalar}; differentiable at -inf and +inf too.

  Without a prior sigma is no more than the unit of z, and a step of gradient descent of rate a in z
  is one of rate a sigma^2 in theta.
  """
  log_s2 = jax.tree.map(lambda module: log_sigma2[module], labels)

  def scale(v: jax.typing.ArrayLike) -> jax.Array | float:
    if _is_free(v):
      return 1.0
    v = jnp.asarray(v, dtype)
    return jnp.exp(0.5 * jnp.where(jnp.isposinf(v), 0.0, v))

  def precision(v: jax.typing.ArrayLike) -> jax.Array | float:
    return 0.0 if _is_free(v) or not prior else jnp.where(jnp.isposinf(v), 0.0, 1.0).astype(dtype)

  return Whitening(jax.tree.map(scale, log_s2), jax.tree.map(precision, log_s2))


def _is_free(log_s2: jax.typing.ArrayLike) -> bool:
  return isinstance(log_s2, float) and log_s2 == math.inf
