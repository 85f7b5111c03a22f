"""Factorise many matrices one after another on a CPU, where a batch of them can hang.

On a CPU, XLA splits the factorisations of a batch over its pool of threads. Batches that run at the
same time, in one program or on several devices, can wait for each other's threads
(docs/hazards.md#lapack-threads). A factorisation of one matrix waits for nothing.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def one_by_one(f: Callable[..., PyTree]) -> Callable[..., PyTree]:
  """Return f, which under `jax.vmap` runs on a CPU for one matrix after another.

  On other devices it runs for the whole batch at once. Pass it constants, or what
  `jax.lax.stop_gradient` returned: it has no reverse mode, and forward mode can be wrong without an
  error (findings/jax_custom_vmap_gradient.sh).

  Args:
    f: a function of arrays, which factorises one matrix.

  >>> norm = one_by_one(lambda a: jnp.linalg.svd(a, compute_uv=False)[0])
  >>> jax.vmap(norm)(jnp.stack([jnp.eye(2), 3 * jnp.eye(2)]))
  Array([1., 3.], dtype=float32)
  """
  alone = jax.custom_batching.custom_vmap(f)

  @alone.def_vmap
  def batch(size: int, batched: Any, *args: Any) -> tuple[PyTree, PyTree]:
    fill = lambda x, own: x if own else jnp.broadcast_to(x, (size, *jnp.shape(x)))
    args = jax.tree.map(fill, args, tuple(batched))
    in_turn = lambda *args: jax.lax.map(lambda one: alone(*one), args)
    out = jax.lax.platform_dependent(*args, cpu=in_turn, default=jax.vmap(f))
    return out, jax.tree.map(lambda _: True, out)

  return alone


@one_by_one
def eigh(a: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Return the eigenvalues [n] of a symmetric A [n, n], ascending, and eigenvectors as columns."""
  return tuple(jnp.linalg.eigh(a))
