"""The derivative of the validation loss with respect to sigma, through both phi_hat and theta_hat.

Under l_MAP both levels are stationary: for the whole of phi and for every task,

    sum_t grad L_t(theta_t) - grad log p(phi) = 0,      s grad L_t(theta_t) + z_t = 0,

with L_t = -log p(D_t | theta) and theta_t = phi + s z_t. (At sigma_m = inf there is no prior: the
term z_t and the identity in K_tt below are absent.) The Jacobian of this system is an arrowhead:
K_phiphi = sum_t C_t, K_phit = C_t s, K_tt = I + s C_t s, with C_t the curvature of L_t. (A prior on
phi adds the curvature of -log p(phi) to K_phiphi.) With (a, b_1:T) solving

    K (a, b_1:T) = (sum_t g_t, s g_1, ..., s g_T),      g_t = d loss / d theta_t,

the derivative of the loss is d/d log sigma_m^2 = sum_t <b_t, z_t> over the entries of module m:
the formula of `implicit.py`, with b_t in place of w_t. A product with K is one product with C_t a
task, of the direction a + s b_t, and one sum over tasks.

All of phi is an unknown of this system, frozen modules included. So Gauss-Newton approximates every
block of K, which stays positive semi-definite; curvature="hessian" is exact.

Derivation: the direct part is sum_t <g_t, s z_t>_m / 2, the indirect part
- <a, C_t s z_t>_m / 2 + <b_t, z_t>_m / 2 - <b_t, s C_t s z_t>_m / 2 summed over t; row t of the
system, multiplied by z_t on module m, turns the first, second and fourth into <b_t, z_t>_m / 2.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from shrinkmeta.base import SolveInfo
from shrinkmeta.config import Implicit
from shrinkmeta.curvature import solvers
from shrinkmeta.curvature.products import curvature_product
from shrinkmeta.mode.frozen import merge
from shrinkmeta.mode.task_model import TaskModel
from shrinkmeta.model.likelihood import masked_log_prob
from shrinkmeta.model.tasks import Batch, divisor, num_examples

PyTree = Any


def joint_sigma_gradient(
  implicit: Implicit,
  model: TaskModel,
  batches: Batch,
  z: PyTree,
  g: PyTree,
  *,
  log_p_phi: Callable[[PyTree], jax.Array] | None = None,
) -> tuple[dict[str, jax.Array], SolveInfo]:
  """Return d loss / d log sigma^2, {module: []}, and how the one solve over all tasks went.

  Args:
    implicit: curvature, max_steps, tol and damping; CG solves. The system is singular along
      directions of phi that no task's data determine. CG then stays out of them, as far as
      rounding lets it; a damping or log_p_phi removes them.
    model: the task model of any of the tasks: its phi, sigma and modules are those of all.
    batches: training data, leaves [T, N, ...].
    z: the modes, trees like phi with None for frozen modules, leaves [T, ...].
    g: d loss / d theta_t, trees like phi, leaves [T, ...]; 0 for a task that is to be left out.
    log_p_phi: the prior under which phi is a mode.
  """
  phi, likelihood = model.params.phi, model.likelihood
  # phi's block is larger than the tasks' by about the number of examples: balanced by r, a = r a'.
  count = jnp.sum(jax.vmap(lambda batch: num_examples(batch, model.n.dtype))(batches))
  r = jax.lax.rsqrt(divisor(count))

  def direction(a: PyTree, b: PyTree) -> PyTree:
    """Return r a + s b for one task, the whole tree."""
    ra = optax.tree.scale(r, a)
    return merge(jax.tree.map(jnp.add, model.cut(ra), model.scaled(b)), ra)

  def outputs_of(thetas: PyTree) -> jax.Array:
    return jax.vmap(lambda theta, batch: likelihood.predict(theta, batch.inputs))(thetas, batches)

  def loss_of(outputs: jax.Array) -> jax.Array:
    log_p = jax.vmap(lambda f, batch: masked_log_prob(likelihood, f, batch))(outputs, batches)
    return -jnp.sum(log_p)

  thetas = jax.vmap(model.theta)(z)
  product = curvature_product(implicit.curvature, outputs_of, loss_of, thetas)

  def operator(v: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
    a, b = v
    u = product(jax.vmap(direction, (None, 0))(a, b))
    top = jax.tree.map(lambda x: r * jnp.sum(x, 0), u)
    if log_p_phi is not None:
      curved = jax.jvp(jax.grad(log_p_phi), (phi,), (optax.tree.scale(r, a),))[1]
      top = optax.tree.add_scale(top, -r, curved)
    rows = jax.vmap(lambda b, u: model.k_product(b, model.cut(u), implicit.damping))(b, u)
    return optax.tree.add_scale(top, implicit.damping, a), rows

  of_phi = jax.tree.map(lambda x: r * jnp.sum(x, 0), g)
  right = of_phi, jax.vmap(lambda g: model.scaled(model.cut(g)))(g)
  (_, b), info = solvers.cg(operator, right, implicit.max_steps, implicit.tol)
  own = jax.tree.map(lambda p, b, z: p * b * z, model.white.precision, b, z)
  return model.by_module(own), info
