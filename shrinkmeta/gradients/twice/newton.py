"""The mode of one task with exact first and second derivatives, by Newton's method.

Let p be everything that the mode depends on: phi, sigma, the data, and the floats that the
likelihood closes over. z*(p) is the mode, where grad_z J(z, p) = 0. K is the Hessian of J in z. The
loop finds z*(p) at one value of p. Its result z_0, and K close to z_0, are then numbers without a
derivative. Two Newton steps with this constant K have the derivatives:

    z_1 = z_0 - K^-1 grad J(z_0, p),      z_2 = z_1 - K^-1 grad J(z_1, p)

Change p by a small h. The error of z_0 is then O(h), because z_0 is constant and the mode moves.
Each step multiplies the error by 1 - K^-1 H, where H is the mean Hessian of J between z and z*.
This factor is O(h) too, because H = K at h = 0. So the errors of z_1 and z_2 are O(h^2) and O(h^3).
Hence z_1 has the exact first derivative, and z_2 also has the exact second derivative. The third
derivative would be wrong, so it raises an error. JAX never differentiates K or the solve.

K is a dense matrix. If K is not positive definite up to rounding, the steps do not exist, and the
result is NaN. In float32 this includes a K that is nearly singular beside its diagonal.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from shrinkmeta.base import InnerInfo, MetaParams
from shrinkmeta.checks import validate
from shrinkmeta.config import Implicit, Inner
from shrinkmeta.curvature.closed_over import Consts
from shrinkmeta.curvature.one_by_one import one_by_one
from shrinkmeta.curvature.solvers import exact
from shrinkmeta.gradients.twice.refusals import differentiable_twice
from shrinkmeta.mode.optimise import Steps, converged, posterior_mode
from shrinkmeta.mode.task_model import TaskModel
from shrinkmeta.model.tasks import Batch

PyTree = Any

# The largest number of task-specific parameters. K [D, D], and the D derivatives of the network
# that make it, must fit into memory.
MOST_PARAMETERS = 1_000

# Newton steps that only improve z_0. The second step computes K where the error of z is the square
# of the loop's error. The error of the second derivative is proportional to that of K.
_POLISHING = 2


def check_twice(inner: Inner, implicit: Implicit, key: jax.Array | None) -> None:
  """Raise ValueError if a setting of one derivative contradicts twice=True.

  Args:
    inner: how the mode is found.
    implicit: how one derivative is computed.
    key: the random key of the caller, or None.
  """
  settings = (  # name, whether it is right, what it must be, what it is
    ("Inner.batch_size", inner.batch_size is None, "None", inner.batch_size),
    ("Implicit.batch_size", implicit.batch_size is None, "None", implicit.batch_size),
    ("Implicit.damping", implicit.damping == 0.0, "0", implicit.damping),
    ("Implicit.solver", implicit.solver != "identity", "another solver", '"identity"'),
    ("key", key is None, "None", "a random key"),
  )
  for name, right, wanted, came in settings:
    if not right:
      raise ValueError(
        "twice=True takes all examples, the exact Hessian and no random numbers. So "
        f"{name} must be {wanted}: it is {came}. Change it, or leave twice=False."
      )


def newton_mode(
  inner: Inner,
  model_of: Callable[[MetaParams, Batch, Consts], TaskModel],
  params: MetaParams,
  batch: Batch,
  consts: Consts,
  steps: Steps = None,
) -> tuple[TaskModel, PyTree, InnerInfo]:
  """Return (the task model, z_2, info), where z_2 has exact first and second derivatives.

  Args:
    inner: how the mode is found.
    model_of: (params, batch, consts) -> the task model.
    params: phi and log sigma^2.
    batch: the task's training data.
    consts: what the likelihood depends on beside its arguments: see `open_likelihood`.
    steps: replaces inner.steps.

  Returns:
    the task model at the arguments; z_2, a part, NaN if K is not positive definite; and an
    InnerInfo at z_0, without derivatives, whose steps are those of the loop alone.

  Raises:
    ValueError: there are more than MOST_PARAMETERS task-specific parameters, or their dtype has
      less than 32 bits.
  """
  held = model_of(*jax.lax.stop_gradient((params, batch, consts)))
  held = held.hoisted() if held.frozen else held
  size = sum(x.size for x in jax.tree.leaves(held.part))
  if size > MOST_PARAMETERS:
    raise ValueError(
      f"twice=True is for at most {MOST_PARAMETERS} task-specific parameters, because it makes "
      f"their Hessian as a matrix; there are {size}. Freeze modules (sigma = 0), or leave "
      "twice=False and take differences of the gradient."
    )
  mode = posterior_mode(inner, held, steps=steps, info_at_end=False)
  start, unravel = ravel_pytree(mode.z)
  validate.wide(start.dtype, "A second derivative")

  def slope(model: TaskModel, z: jax.Array) -> jax.Array:  # grad J [D]
    return model.n * ravel_pytree(model.value_and_grad(unravel(z), model.batch)[1])[0]

  def polish(_: int, at: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    both = lambda z: (slope(held, z),) * 2
    k, g = jax.jacfwd(both, has_aux=True)(at[0])
    inverse = _inverse(k)
    return at[0] - _times(inverse, g), inverse

  none = jnp.zeros((size, size), start.dtype)
  end = jax.lax.fori_loop(0, _POLISHING, polish, (start, none))
  z, inverse = jax.lax.stop_gradient(end)

  value, g = held.value_and_grad(unravel(z), held.batch)
  norm = optax.tree.norm(g)
  info = InnerInfo(mode.info.steps, value, norm, converged(inner, norm))

  model = model_of(params, batch, consts)
  z = jax.lax.fori_loop(0, 2, lambda _, z: z - _times(inverse, slope(model, z)), z)
  return model, unravel(differentiable_twice(z)), jax.lax.stop_gradient(info)


@one_by_one
def _inverse(k: jax.Array) -> jax.Array:
  """Return K^-1 [D, D]; NaN if K is not positive definite up to rounding."""
  root = jnp.linalg.cholesky(k)
  # L_ii^2 / K_ii is the share of K_ii that remains after the rows before row i are projected out.
  rounding = k.shape[0] * jnp.finfo(k.dtype).eps
  definite = jnp.all(jnp.square(jnp.diag(root)) > rounding * jnp.diag(k))
  with exact():
    inverse = jax.scipy.linalg.cho_solve((root, True), jnp.eye(k.shape[0], dtype=k.dtype))
  return jnp.where(definite, inverse, jnp.nan)


def _times(matrix: jax.Array, vector: jax.Array) -> jax.Array:
  with exact():
    return matrix @ vector
