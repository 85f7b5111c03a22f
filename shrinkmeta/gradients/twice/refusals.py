"""Errors in the place of derivatives that do not exist."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.dtypes import float0

PyTree = Any


def differentiable_once(name: str, gradient: PyTree) -> PyTree:
  """Return `gradient`, and raise an error if it is differentiated again.

  Without the error JAX would differentiate the steps of the solver. The result would be wrong.

  Args:
    name: the functions that the gradient belongs to, for the error message.
    gradient: the result of a backward pass.

  Raises:
    NotImplementedError: the result is differentiated.
  """

  @jax.custom_jvp
  def once(x: PyTree) -> PyTree:
    return x

  @once.defjvp
  def _(primals: Any, tangents: Any) -> Any:
    raise NotImplementedError(
      f"{name} can be differentiated once. For jax.hessian, or a gradient of a gradient, pass "
      "twice=True to sm.map_estimate or sm.log_evidence. The functions of a learner, such as "
      "adapt, have no second derivative. Take central differences of the gradient g in float64, "
      "(g(x + h) - g(x - h)) / (2 h) with h about 1e-4, and a mode found to Inner(tol=1e-10)."
    )

  leaves, structure = jax.tree.flatten(gradient)
  floats = iter(once([x for x in leaves if x.dtype != float0]))
  return structure.unflatten([x if x.dtype == float0 else next(floats) for x in leaves])


def differentiable_twice(value: jax.Array) -> jax.Array:
  """Return `value`, and raise an error if it is differentiated three times.

  Without the error the third derivative would be wrong: see newton.py.

  Args:
    value: an array whose first and second derivatives are exact.

  Raises:
    NotImplementedError: the result is differentiated three times.

  >>> cube = lambda x: differentiable_twice(x**3)
  >>> float(jax.grad(jax.grad(cube))(2.0))
  12.0
  >>> try:
  ...   jax.grad(jax.grad(jax.grad(cube)))(2.0)
  ... except NotImplementedError as error:
  ...   print(error)
  twice=True has first and second derivatives: there is no third derivative.
  """

  # `same` multiplies the tangent by `one`. The rule of `one` returns `zero` times the tangent. The
  # rule of `zero` raises the error, and JAX calls it for a third derivative only.
  @jax.custom_jvp
  def zero(x: jax.Array) -> jax.Array:
    return jnp.zeros_like(x)

  @zero.defjvp
  def _(primals: Any, tangents: Any) -> Any:
    raise NotImplementedError(
      "twice=True has first and second derivatives: there is no third derivative."
    )

  @jax.custom_jvp
  def one(x: jax.Array) -> jax.Array:
    return jnp.ones_like(x)

  one.defjvp(lambda x, t: (one(*x), zero(*x) * t[0]))

  @jax.custom_jvp
  def same(x: jax.Array) -> jax.Array:
    return x

  same.defjvp(lambda x, t: (same(*x), one(*x) * t[0]))
  return same(value)
