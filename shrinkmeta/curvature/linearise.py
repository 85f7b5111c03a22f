"""The network linearised at a point: the products J v and J^T u, with J = d f / d theta.

Forward mode computes J v. An operation with a `jax.custom_vjp` has a rule for J^T u alone. There,
J v is the transpose of the linear function u -> J^T u.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Jaxpr, jaxprs_in_params

PyTree = Any


def linearise(
  f: Callable[[PyTree], PyTree], theta: PyTree
) -> tuple[PyTree, Callable[[PyTree], PyTree], Callable[[PyTree], PyTree]]:
  """Return (f(theta), the function v -> J v, the function u -> J^T u).

  Args:
    f: theta -> outputs.
    theta: the point at which J is taken, a pytree of arrays [...].

  >>> square = jax.custom_vjp(lambda x: x**2)
  >>> square.defvjp(lambda x: (x**2, x), lambda x, u: (2.0 * x * u,))
  >>> outputs, jvp, vjp = linearise(square, 3.0)
  >>> float(outputs), float(jvp(1.0)), float(vjp(1.0))
  (9.0, 6.0, 6.0)
  """
  outputs, jvp = jax.linearize(f, theta)
  if not _lacks_forward_mode(jax.make_jaxpr(jvp)(theta).jaxpr):
    vjp = jax.linear_transpose(jvp, theta)
    return outputs, jvp, lambda u: vjp(u)[0]
  outputs, vjp = jax.vjp(f, theta)
  transposed = jax.linear_transpose(lambda u: vjp(u)[0], outputs)
  return outputs, lambda v: transposed(v)[0], lambda u: vjp(u)[0]


def _lacks_forward_mode(jaxpr: Jaxpr) -> bool:
  """Return whether an operation of a linear function can only be transposed."""
  # The name is JAX's own for the linear part of a custom_vjp: docs/hazards.md#jaxpr-names.
  inside = lambda eqn: any(map(_lacks_forward_mode, jaxprs_in_params(eqn.params)))
  return any(eqn.primitive.name == "custom_lin" or inside(eqn) for eqn in jaxpr.eqns)
