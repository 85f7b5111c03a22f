"""The network 1-40-40-1, the noise that it learns, and its learner."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

import shrinkmeta as sm

ALGORITHMS = ("empirical_bayes", "sigma_imaml")
_WIDTH = 40


def network(theta: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Return (f [N], log standard deviation of the noise []) for x [N, 1]."""
  h = jnp.tanh(x @ theta["hidden_0"]["kernel"] + theta["hidden_0"]["bias"])
  h = jnp.tanh(h @ theta["hidden_1"]["kernel"] + theta["hidden_1"]["bias"])
  return (h @ theta["out"]["kernel"] + theta["out"]["bias"])[:, 0], theta["log_noise"]


def init(key: jax.Array) -> Any:
  """Return parameters of `network`."""
  sizes = (1, _WIDTH, _WIDTH, 1)
  params: dict[str, Any] = {"log_noise": jnp.zeros([])}
  names, keys = ("hidden_0", "hidden_1", "out"), jax.random.split(key, 3)
  for name, own, n, m in zip(names, keys, sizes[:-1], sizes[1:], strict=True):
    kernels, biases = jax.random.split(own)
    kernel = jax.random.normal(kernels, (n, m)) / n**0.5
    params[name] = {"kernel": kernel, "bias": 0.5 * jax.random.normal(biases, (m,))}
  return params


def make_learner(algorithm: str, params: Any, meta_steps: int) -> sm.MetaLearner:
  """Return the learner; the noise is a module with sigma 0, so all tasks share it."""
  labels = sm.by_path(params, {"log_noise": "noise", "hidden_0": "hidden_0", "hidden_1": "hidden_1",
                               "out": "out"})  # fmt: skip
  sigma = {"noise": 0.0, "hidden_0": 0.3, "hidden_1": 0.3, "out": 0.3}
  rate = optax.cosine_decay_schedule(3e-3, meta_steps, 0.05)
  # Clipping is for phi's optimiser alone (docs/hazards.md#clip-at-zero).
  clipped = optax.chain(optax.clip_by_global_norm(10.0), optax.adam(rate))
  # theta_hat depends on the noise. The evidence accounts for it. The predictive likelihood needs
  # the Hessian for it, as the matrix of Gauss-Newton leaves it out.
  own = {"empirical_bayes": {}, "sigma_imaml": {"implicit": sm.Implicit(curvature="hessian")}}
  return getattr(sm, algorithm)(
    sm.gaussian_with_scale(network),
    labels,
    inner=sm.Inner(sm.lbfgs(), steps=60, tol=1e-3),
    phi_optimizer=clipped,
    sigma_optimizer=optax.adam(1e-2),
    init_sigma=sigma,
    batching="vmap",
    **own[algorithm],
  )
