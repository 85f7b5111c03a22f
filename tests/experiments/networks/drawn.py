"""Random arrays and a reference that the tests of networks share."""

import jax
import jax.numpy as jnp
import numpy as np


def draw(*shape):
  """Return random numbers that depend on the shape alone."""
  return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape))


def window_max(x):
  """Return the 2 x 2 maximum by a windowed reduction."""
  return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
