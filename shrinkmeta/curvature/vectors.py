"""Inner products and norms of trees, seen as one vector.

XLA compiles each sum of an array as a function of its own. So the products of small arrays of one
shape are added first. Then one sum serves all of them.
"""

import collections
import functools
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any

_SMALL = 2**16  # entries; larger arrays may be split over devices, each in its own way


def vdot(a: PyTree, b: PyTree) -> jax.Array:
  """Return <a, b> [], the sum of the products of the entries of two trees of floats.

  Sums of 16 bits are taken in 32 and rounded once.

  >>> float(vdot({"u": jnp.array([1.0, 2.0]), "v": 3.0}, {"u": jnp.array([1.0, 1.0]), "v": 2.0}))
  9.0
  """
  groups = collections.defaultdict(list)
  for i, (x, y) in enumerate(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)):
    wide = jnp.promote_types(jnp.result_type(x, y), jnp.float32)
    x, y = jnp.asarray(x, wide), jnp.asarray(y, wide)
    groups[(x.shape, wide) if x.size <= _SMALL else i].append((x, y))
  sums = [_sum_of_products(group) for group in groups.values()]
  dtype = jnp.result_type(*jax.tree.leaves((a, b)) or [float])
  return functools.reduce(jnp.add, sums or [jnp.zeros([])]).astype(dtype)


def _sum_of_products(group: list[tuple[jax.Array, jax.Array]]) -> jax.Array:
  """Return the sum of <x, y> [] over pairs of arrays of one shape."""
  if len(group) > 1:
    return jnp.sum(functools.reduce(jnp.add, [x * y for x, y in group]))
  x, y = group[0]
  # `jnp.vdot` makes vectors of x and y, and gathers arrays that are split over devices by columns
  # (findings/jax_vdot_gathers.sh).
  return jnp.tensordot(x, y, x.ndim, precision=jax.lax.Precision.HIGHEST)


def norm(tree: PyTree) -> jax.Array:
  """Return sqrt(<x, x>) [] of a tree of floats.

  >>> float(norm({"u": jnp.array([3.0]), "v": 4.0}))
  5.0
  """
  return jnp.sqrt(vdot(tree, tree))
