"""Whitened coordinates: theta = phi + s * z, in which every sigma is as easy as any other.

For finite sigma_m, s = sigma_m and the prior is |z|^2 / 2: nothing is divided by sigma, sigma = 0
holds the module at phi exactly, and the Hessian I + s H s is well conditioned for any mix of
sigma. For sigma_m = inf there is no prior: s = 1 and z is theta - phi itself. One code path so
serves every row of the family.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from shrinkmeta import modules

PyTree = Any


class Whitening(NamedTuple):
  """theta = phi + scale * z with log p(z) = -precision |z|^2 / 2, each a tree of scalars."""

  scale: PyTree  # leaves []: sigma_m, 0 where frozen, 1 where sigma_m is inf
  precision: PyTree  # leaves []: 1, or 0 where sigma_m is inf


def whitening(
  log_sigma2: Mapping[str, jax.typing.ArrayLike],
  labels: modules.Labels,
  dtype: jax.typing.DTypeLike,
) -> Whitening:
  """The coordinates for log_sigma2 {module: scalar}; differentiable at -inf and +inf too."""
  log_s2 = modules.spread({m: jnp.asarray(v, dtype) for m, v in log_sigma2.items()}, labels)
  free = jax.tree.map(jnp.isposinf, log_s2)
  scale = jax.tree.map(lambda v, f: jnp.exp(0.5 * jnp.where(f, 0.0, v)), log_s2, free)
  return Whitening(scale, jax.tree.map(lambda f: jnp.where(f, 0.0, 1.0).astype(dtype), free))


def to_theta(phi: PyTree, scale: PyTree, z: PyTree) -> PyTree:
  """theta = phi + scale * z."""
  return jax.tree.map(lambda p, s, v: p + s * v, phi, scale, z)
