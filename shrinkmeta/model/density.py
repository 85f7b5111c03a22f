"""The densities of the model: log p(theta | phi), log p(D | theta), and their sums over tasks.

    p(phi, theta_1:T, D | sigma) = p(phi) prod_m prod_t N(theta_mt | phi_m, sigma_m^2 I)
                                          prod_t prod_n p(y_tn | x_tn, theta_t)

There are T tasks (index t) and M modules (index m). Example n of task t has the inputs x_tn and the
targets y_tn. N is the number of examples of one task, padding included.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from shrinkmeta.checks import validate
from shrinkmeta.checks.kinds import parameter_tree
from shrinkmeta.model import modules
from shrinkmeta.model.likelihood import Likelihood, check_likelihood, masked_log_prob
from shrinkmeta.model.tasks import Batch, check_batch

PyTree = Any


def log_prior(
  theta: PyTree, phi: PyTree, log_sigma2: Mapping[str, jax.typing.ArrayLike], labels: modules.Labels
) -> jax.Array:
  """Return the log prior density of one task's parameters, given phi and sigma.

      log p(theta | phi, sigma) = sum_m log N(theta_m; phi_m, sigma_m^2 I)

  The normaliser is included. The prior of a frozen module (log sigma^2 = -inf) is a point mass at
  phi_m. The module adds 0 if theta_m equals phi_m; otherwise the log density is -inf. A free module
  (log sigma^2 = +inf) has an improper flat prior and adds 0. The gradients of both terms are 0.

  Args:
    theta: the parameters of one task, a pytree with the structure and shapes of phi.
    phi: the parameters that all tasks share, a pytree of arrays [...].
    log_sigma2: {module: []}. A module is frozen at -inf and free at +inf.
    labels: the module of every leaf, a pytree of strings with the structure of phi.

  Returns:
    The log density [], in nats.

  Raises:
    TypeError: if an argument is of another type.
    ValueError: if theta, labels or log_sigma2 do not fit phi.

  >>> theta, phi = {"w": jnp.array([1.0, 0.0])}, {"w": jnp.zeros(2)}
  >>> log_prior(theta, phi, {"body": 0.0}, {"w": "body"})  # -1 / 2 - log(2 pi)
  Array(-2.338, dtype=float32)
  """
  parameter_tree("theta", theta)
  modules.check_labels(labels, phi, "phi")
  modules.check_modules("log_sigma2", log_sigma2, labels)
  validate.same_shapes("theta", theta, "phi", phi)

  def leaf(t: jax.Array, p: jax.Array, log_s2: jax.typing.ArrayLike) -> jax.Array:
    dtype = jnp.result_type(t, p, float)  # integers become floats, as log_s2 is one
    t, p, log_s2 = (jnp.asarray(x, dtype) for x in (t, p, log_s2))
    frozen, free = jnp.isneginf(log_s2), jnp.isposinf(log_s2)
    # JAX differentiates both branches of `where`. With inf in the branch that is not used, its
    # gradient is NaN and spoils the sum, so 0 takes the place of inf.
    safe = jnp.where(jnp.isinf(log_s2), 0.0, log_s2)
    # Not (t - p)^2 exp(-safe), which overflows at a larger sigma. And not inf times 0 at t = p.
    half, most = -0.5 * safe, jnp.log(jnp.finfo(dtype).max) - 1.0
    z = (t - p) * jnp.exp(jnp.where(t == p, jnp.minimum(half, most), half))
    normal = -0.5 * jnp.sum(jnp.square(z) + safe + jnp.log(2 * jnp.pi))
    at_phi = jnp.where(jnp.all(t == p), 0.0, -jnp.inf)
    return jnp.where(frozen, at_phi, jnp.where(free, 0.0, normal))

  terms = jax.tree.map(leaf, theta, phi, modules.spread(log_sigma2, labels))
  return sum(jax.tree.leaves(terms), jnp.zeros([], jax.tree.leaves(terms)[0].dtype))


def log_likelihood(likelihood: Likelihood, theta: PyTree, batch: Batch) -> jax.Array:
  """Return the log density of one task's examples, given the parameters of the task.

      log p(D | theta) = sum_n mask_n log p(y_n | x_n, theta)

  Args:
    likelihood: the network and the density of the targets given its outputs.
    theta: the parameters of one task, a pytree of arrays [...].
    batch: the examples, leaves [N, ...].

  Returns:
    The log density [], in nats. It is a sum over the examples, not a mean.

  Raises:
    TypeError: if an argument, or the result of `predict`, is of another type.
    ValueError: if shapes do not fit, or the batch holds NaN or infinite numbers.

  >>> from shrinkmeta.model.likelihood import gaussian
  >>> linear = gaussian(lambda theta, x: x * theta["slope"])
  >>> log_likelihood(linear, {"slope": 1.0}, Batch(jnp.ones(2), jnp.ones(2)))  # -log(2 pi)
  Array(-1.838, dtype=float32)
  """
  check_likelihood("likelihood", likelihood)
  parameter_tree("theta", theta)
  check_batch("batch", batch)
  outputs = likelihood.predict(theta, batch.inputs)
  return masked_log_prob(likelihood, outputs, batch)


def log_predictive(likelihood: Likelihood, thetas: PyTree, batches: Batch) -> jax.Array:
  """Return the predictive log-likelihood of the validation examples of T tasks.

      l_PLL = sum_t log p(D_t^val | theta_t)

  Algorithms with a learned sigma maximise l_PLL over sigma, except `empirical_bayes`.

  Args:
    likelihood: the network and the density of the targets given its outputs.
    thetas: the adapted parameters of the tasks, a pytree with leaves [T, ...].
    batches: the validation examples of the tasks, leaves [T, N, ...].

  Returns:
    The log-likelihood [], in nats. It is a sum over tasks and examples.

  Raises:
    TypeError: if an argument, or the result of `predict`, is of another type.
    ValueError: if shapes do not fit, or a batch holds NaN or infinite numbers.

  >>> from shrinkmeta.model.likelihood import gaussian
  >>> linear = gaussian(lambda theta, x: x * theta["slope"])
  >>> batches = Batch(jnp.ones([2, 3]), jnp.ones([2, 3]))
  >>> log_predictive(linear, {"slope": jnp.ones(2)}, batches)  # -3 log(2 pi)
  Array(-5.514, dtype=float32)
  """
  check_likelihood("likelihood", likelihood)
  parameter_tree("thetas", thetas)
  check_batch("batches", batches, ("T", "N"))
  count = jnp.shape(jax.tree.leaves(batches.targets)[0])[0]
  for name, leaf in validate.leaves_with_names(thetas, "thetas"):
    if jnp.shape(leaf)[:1] != (count,):
      raise ValueError(
        f"{name} must lead with the axis of the {count} tasks in batches; its shape is "
        f"{jnp.shape(leaf)}."
      )
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
  """Return the log joint density of phi, the task parameters and the data, given sigma.

      log p(phi, theta_1:T, D | sigma) =
          log p(phi) + sum_t log p(theta_t | phi, sigma) + sum_t log p(D_t | theta_t)

  Do not maximise this density over (theta, phi, sigma) together: it grows without bound as
  sigma -> 0 at theta = phi. Therefore sigma is learned from `log_predictive` instead.

  Args:
    likelihood: the network and the density of the targets given its outputs.
    labels: the module of every leaf, a pytree of strings with the structure of phi.
    phi: the parameters that all tasks share, a pytree of arrays [...].
    thetas: the parameters of the tasks, a pytree with leaves [T, ...].
    log_sigma2: {module: []}. A module is frozen at -inf and free at +inf.
    batches: the training examples of the tasks, leaves [T, N, ...].
    log_p_phi: phi -> log p(phi) [], such as `priors.normal(scale)`. None is a flat prior, which
      adds 0.

  Returns:
    The log density [], in nats.

  Raises:
    TypeError: if an argument, or the result of `predict`, is of another type.
    ValueError: if shapes do not fit, or a batch holds NaN or infinite numbers.

  >>> from shrinkmeta.model.likelihood import gaussian
  >>> linear, batches = gaussian(lambda theta, x: x * theta["w"]), Batch(*jnp.ones([2, 2, 3]))
  >>> phi, thetas = {"w": jnp.ones([])}, {"w": jnp.ones(2)}
  >>> log_joint(linear, {"w": "body"}, phi, thetas, {"body": 0.0}, batches)  # -4 log(2 pi)
  Array(-7.352, dtype=float32)
  """
  parameter_tree("phi", phi)
  parameter_tree("thetas", thetas)
  if log_p_phi is not None:
    validate.function("log_p_phi", log_p_phi, "phi -> log p(phi) []")
  validate.same_shapes("thetas", thetas, "phi", phi, lead=1)
  prior = jax.vmap(lambda theta: log_prior(theta, phi, log_sigma2, labels))(thetas)
  total = jnp.sum(prior) + log_predictive(likelihood, thetas, batches)
  return total if log_p_phi is None else total + log_p_phi(phi)
