"""How the validation loss depends on sigma where phi_hat depends on sigma too.

Under l_MAP both levels are stationary: for the whole of phi and for every task,

    sum_t grad L_t(theta_t) - grad log p(phi) = 0,      s grad L_t(theta_t) + z_t = 0,

with L_t = -log p(D_t | theta) and theta_t = phi + s z_t. (Without a prior, at sigma_m = inf, z_t is
missing from the second, and 1 from K_tt below.) The Jacobian of this system is an
arrowhead: K_phiphi = sum_t C_t, K_phit = C_t s, K_tt = I + s C_t s. With (a, b_1:T) solving

    K (a, b_1:T) = (sum_t g_t, s g_1, ..., s g_T),      g_t = d loss / d theta_t,

the derivative of the loss is d/d log sigma_m^2 = sum_t <b_t, z_t> over the entries of module m:
the formula of `implicit.py`, with b_t in place of w_t. A product with K is one product with C_t a
task, of the direction a + s b_t, and one sum over tasks.

Derivation: the direct part is sum_t <g_t, s z_t>_m / 2, the indirect part
- <a, C_t s z_t>_m / 2 + <b_t, z_t>_m / 2 - <b_t, s C_t s z_t>_m / 2 summed over t; row t of the
system, multiplied by z_t on module m, turns the first, second and fourth into <b_t, z_t>_m / 2.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from shrinkmeta.curvature import solvers
from shrinkmeta.curvature.products import product_of
from shrinkmeta.curvature.solvers import SolveInfo
from shrinkmeta.gradients.implicit import Implicit, MetaParams
from shrinkmeta.mode.frozen import Frozen, merge, moving
from shrinkmeta.mode.task_model import moving_model
from shrinkmeta.mode.whitening import to_theta
from shrinkmeta.model import modules
from shrinkmeta.model.density import masked_log_prob
from shrinkmeta.model.likelihood import Likelihood
from shrinkmeta.model.tasks import Batch, divisor, num_examples

PyTree = Any


def joint_sigma_gradient(
  implicit: Implicit,
  likelihood: Likelihood,
  labels: modules.Labels,
  params: MetaParams,
  batches: Batch,
  z: PyTree,
  g: PyTree,
  *,
  frozen: Frozen = frozenset(),
  log_p_phi: Callable[[PyTree], jax.Array] | None = None,
) -> tuple[dict[str, jax.Array], SolveInfo]:
  """d loss / d log sigma^2, a number a module, and how the one solve went.

  Args:
    implicit: curvature, max_steps, tol and damping; CG solves. The system is singular along
      directions of phi that no task's data determine: CG then stays out of them, as far as
      rounding lets it; a damping or log_p_phi removes them.
    batches: training data, leaves lead with [T].
    z: modes of the modules that move, leaves [T, ...].
    g: d loss / d theta_t, whole trees, leaves [T, ...]; 0 for a task that is to be left out.
    log_p_phi: the prior under which phi is a mode.
  """
  model = moving_model(likelihood, labels, params.phi, params.log_sigma2, frozen)
  s, precision = model.white
  dtype = jnp.result_type(jax.tree.leaves(params.phi)[0])
  # phi's block is larger than the tasks' by about the number of examples: balanced by r, a = r a'.
  count = jnp.sum(jax.vmap(lambda batch: num_examples(batch, dtype))(batches))
  r = jax.lax.rsqrt(divisor(count))

  def direction(a: PyTree, b: PyTree) -> PyTree:
    """r a + s b for one task, the whole tree."""
    ra = optax.tree.scale(r, a)
    moved = jax.tree.map(lambda p, s, v: p + s * v, moving(ra, labels, frozen), s, b)
    return merge(moved, ra)

  def pull(u: PyTree) -> PyTree:
    """s u on the moving part."""
    return jax.tree.map(jnp.multiply, s, moving(u, labels, frozen))

  def outputs_of(thetas: PyTree) -> jax.Array:
    return jax.vmap(lambda theta, batch: likelihood.predict(theta, batch.inputs))(thetas, batches)

  def loss_of_outputs(outputs: jax.Array) -> jax.Array:
    log_p = jax.vmap(lambda f, batch: masked_log_prob(likelihood, f, batch))(outputs, batches)
    return -jnp.sum(log_p)

  thetas = jax.vmap(lambda z: merge(to_theta(model.phi, s, z), params.phi))(z)
  product = product_of(implicit.curvature, outputs_of, loss_of_outputs, thetas)

  def operator(v: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
    a, b = v
    u = product(jax.vmap(direction, (None, 0))(a, b))
    top = jax.tree.map(lambda x: r * jnp.sum(x, 0), u)
    if log_p_phi is not None:
      curved = jax.jvp(jax.grad(log_p_phi), (params.phi,), (optax.tree.scale(r, a),))[1]
      top = optax.tree.add_scale(top, -r, curved)
    rows = jax.tree.map(lambda p, b, v: p * b + v, precision, b, jax.vmap(pull)(u))
    return optax.tree.add_scale((top, rows), implicit.damping, v)

  right = jax.tree.map(lambda x: r * jnp.sum(x, 0), g), jax.vmap(pull)(g)
  (_, b), info = solvers.cg(operator, right, implicit.max_steps, implicit.tol)
  zero = {m: jnp.zeros([], jnp.result_type(v)) for m, v in params.log_sigma2.items()}
  own = jax.tree.map(lambda p, b, z: p * b * z, precision, b, z)
  return zero | modules.gather(own, model.labels), info
