"""Whitened coordinates z, with theta = phi + s z and a prior of unit variance.

For finite sigma_m, s = sigma_m and -log p(z) = |z|^2 / 2. Nothing is divided by sigma. sigma_m = 0
keeps the module at phi exactly. Where the curvature C is positive semi-definite, no eigenvalue of
K = I + s C s is below 1. For sigma_m = inf there is no prior: s = 1 and z = theta - phi. So one
code path serves every algorithm.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from shrinkmeta.model import modules

PyTree = Any


class Whitening(NamedTuple):
  """The coordinates theta = phi + scale * z, with log p(z) = -precision |z|^2 / 2.

  Both fields are trees with one scalar [] for each leaf of theta. Where log sigma^2 is Python's
  inf, they hold the Python floats 1.0 and 0.0 and not arrays. The prior is then known to be absent
  before anything is compiled, and its terms are not computed.
  """

  scale: PyTree  # leaves []: sigma_m, 0 where frozen, 1 where sigma_m is inf
  precision: PyTree  # leaves []: 1, or 0 where sigma_m is inf or there is no prior


def whitening(
  log_sigma2: Mapping[str, jax.typing.ArrayLike],
  labels: modules.Labels,
  dtype: jax.typing.DTypeLike,
  prior: bool = True,
) -> Whitening:
  """Return the coordinates for log_sigma2 {module: []}.

  They are differentiable in log_sigma2, also at -inf and +inf.

  With prior=False sigma only sets the unit of z: gradient descent of rate a in z is gradient
  descent of rate a sigma^2 in theta.
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
  """Return whether sigma is known to be inf before compilation."""
  return isinstance(log_s2, float) and log_s2 == math.inf
