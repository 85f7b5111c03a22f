"""The densities of the model: log p(theta | phi), log p(D | theta), and their sums over tasks.

p(phi, theta_1:T, D | sigma) = p(phi) prod_m prod_t N(theta_mt | phi_m, sigma_m^2 I)
                                      prod_t prod_n p(x_tn | theta_t)
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from shrinkmeta import validate
from shrinkmeta.model import modules
from shrinkmeta.model.likelihood import Likelihood
from shrinkmeta.model.tasks import Batch, check_batch, divisor, num_examples, weights

PyTree = Any


def log_prior(
  theta: PyTree, phi: PyTree, log_sigma2: Mapping[str, jax.typing.ArrayLike], labels: modules.Labels
) -> jax.Array:
  """sum_m log N(theta_m; phi_m, sigma_m^2 I), the normaliser included. Returns [].

  A frozen module (log sigma^2 = -inf) is a point mass at phi: it adds 0 where theta equals phi, and
  makes the density -inf elsewhere. A free one (+inf) has no prior, the improper flat one, and adds
  0. Gradients of both are zero.
  """
  modules.check_labels(labels, phi)
  modules.check_modules("log_sigma2", log_sigma2, labels)
  validate.same_shapes("theta", theta, "phi", phi)

  def leaf(t: jax.Array, p: jax.Array, log_s2: jax.typing.ArrayLike) -> jax.Array:
    t, p = jnp.asarray(t), jnp.asarray(p)
    log_s2 = jnp.asarray(log_s2, t.dtype)
    frozen, free = jnp.isneginf(log_s2), jnp.isposinf(log_s2)
    safe = jnp.where(jnp.isinf(log_s2), 0.0, log_s2)  # keeps untaken branches' gradients finite
    z = (t - p) * jnp.exp(-0.5 * safe)  # exp(-safe) would overflow sooner
    normal = -0.5 * jnp.sum(jnp.square(z) + safe + jnp.log(2 * jnp.pi))
    at_phi = jnp.where(jnp.all(t == p), 0.0, -jnp.inf)
    return jnp.where(frozen, at_phi, jnp.where(free, 0.0, normal))

  terms = jax.tree.map(leaf, theta, phi, modules.spread(log_sigma2, labels))
  return sum(jax.tree.leaves(terms), jnp.zeros([], jax.tree.leaves(terms)[0].dtype))


def log_likelihood(likelihood: Likelihood, theta: PyTree, batch: Batch) -> jax.Array:
  """sum_n log p(x_n | theta) over the unmasked examples. Returns []."""
  check_batch("batch", batch)
  outputs = likelihood.predict(theta, batch.inputs)
  return masked_log_prob(likelihood, outputs, batch)


def masked_log_prob(likelihood: Likelihood, outputs: jax.Array, batch: Batch) -> jax.Array:
  """sum_n mask_n log p(y_n | outputs_n). Returns [].

  Padding is 0 before and after log_prob: an overflow there would make the gradient NaN, 0 * inf,
  and a target there may be anything.
  """
  log_prob = likelihood.log_prob(*without_padding((outputs, batch.targets), batch))
  want = jnp.shape(jax.tree.leaves(batch.targets)[0])[:1]
  if jnp.shape(log_prob) != want:
    raise ValueError(
      f"Likelihood.log_prob must return one number an example, shape {want}; it returned shape "
      f"{jnp.shape(log_prob)}. Sum over the trailing axes."
    )
  if batch.mask is None:
    return jnp.sum(log_prob)
  mask = weights(batch, log_prob.dtype)
  return jnp.sum(jnp.where(mask != 0, mask * log_prob, 0.0))  # whatever padding yields counts 0


def mean_nll(likelihood: Likelihood, theta: PyTree, batch: Batch) -> jax.Array:
  """Return the mean over examples of -log p(x_n | theta), nats per example [].

  Args:
    likelihood: predict and log_prob.
    theta: the parameters of one task.
    batch: its examples, without the T axis.

  Raises:
    ValueError: data or predict promote the outputs to another dtype than that of theta.
  """
  log_p = masked_log_prob(likelihood, likelihood.predict(theta, batch.inputs), batch)
  dtype = jnp.result_type(jax.tree.leaves(theta)[0])
  if log_p.dtype != dtype:
    raise ValueError(
      f"log p(D | theta) is {log_p.dtype}, the parameters are {dtype}: data or predict promote it. "
      f"Cast inputs and targets to {dtype}, or the parameters to {log_p.dtype}."
    )
  return -log_p / divisor(num_examples(batch, log_p.dtype))


def without_padding(tree: PyTree, batch: Batch) -> PyTree:
  """Leaves [N, ...], 0 in place of padding, which may be anything."""
  if batch.mask is None:
    return tree
  keep = weights(batch, bool)
  clear = lambda x: jnp.where(keep.reshape(-1, *[1] * (jnp.ndim(x) - 1)), x, jnp.zeros_like(x))
  return jax.tree.map(clear, tree)


def log_predictive(likelihood: Likelihood, thetas: PyTree, batches: Batch) -> jax.Array:
  """l_PLL = sum_t log p(D_t^val | theta_t); thetas and batches lead with [T]. Returns []."""
  check_batch("batches", batches, ("T", "N"))
  return jnp.sum(
    jax.vmap(lambda theta, batch: log_likelihood(likelihood, theta, batch))(thetas, batches)
  )


def log_joint(
  likelihood: Likelihood,
  labels: modules.Labels,
  phi: PyTree,
  thetas: PyTree,
  log_sigma2: Mapping[str, jax.typing.ArrayLike],
  batches: Batch,
  log_p_phi: Callable[[PyTree], jax.Array] | None = None,
) -> jax.Array:
  """log p(phi, theta_1:T, D | sigma); thetas and batches lead with [T]. Returns [].

  Jointly over (theta, phi, sigma) this grows without bound as sigma -> 0 with theta = phi: sigma
  is learnt from `log_predictive` instead.

  Args:
    log_p_phi: phi -> log p(phi) []; None is the improper flat prior, 0.
  """
  validate.same_shapes("thetas", thetas, "phi", phi, lead=1)
  prior = jax.vmap(lambda theta: log_prior(theta, phi, log_sigma2, labels))(thetas)
  total = jnp.sum(prior) + log_predictive(likelihood, thetas, batches)
  return total if log_p_phi is None else total + log_p_phi(phi)
