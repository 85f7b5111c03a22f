"""Why sigma follows the predictive likelihood: the joint density has no maximum in sigma.

The scalar model is theta_t ~ N(phi, sigma^2), y_tn ~ N(theta_t, 1), with true sigma^2 = 0.49 and
n = 1..N. Let S be the variance of the task means. The stationary points in sigma^2 solve
(1 + N sigma^2)^2 = N^2 S sigma^2. For N S < 4 there are none, and ascent collapses from any start.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shrinkmeta as sm

SIGMA2, NUM_TASKS, N = 0.49, 200, 4
LIKELIHOOD = sm.gaussian(lambda theta, x: jnp.broadcast_to(theta["w"], x.shape))
LABELS = {"w": "w"}


def hierarchical_tasks(seed=0):
  rng = np.random.default_rng(seed)
  theta = 1.5 + np.sqrt(SIGMA2) * rng.normal(size=(NUM_TASKS, 1))
  y = jnp.asarray(theta + rng.normal(size=(NUM_TASKS, 2 * N)))
  x = jnp.zeros((NUM_TASKS, N))
  return sm.Task(sm.Batch(x, y[:, :N]), sm.Batch(x, y[:, N:]))


@pytest.mark.usefixtures("x64")
def test_the_joint_density_collapses():
  """First the profile over (theta, phi), in closed form; then ascent of everything at once."""
  batches = hierarchical_tasks().train
  y = batches.targets.mean(1)
  assert N * float(y.var()) < 4.0

  @jax.jit
  def profile(log_sigma2):
    shrink = 1.0 / (1.0 + 1.0 / (N * jnp.exp(log_sigma2)))
    phi = y.mean()
    thetas = {"w": phi + shrink * (y - phi)}
    density = lambda log_s2: sm.log_joint(
      LIKELIHOOD, LABELS, {"w": phi}, thetas, {"w": log_s2}, batches
    )
    value, slope = jax.value_and_grad(density)(log_sigma2)
    return value, slope

  # By the envelope theorem the profile's slope is that of the density. From 10 down to 1e-12:
  grid = np.log(10.0) * np.arange(1.0, -12.5, -0.5)
  values, slopes = zip(*(map(float, profile(jnp.asarray(g))) for g in grid), strict=True)
  assert all(b > a for a, b in zip(values, values[1:], strict=False))
  # In the end T / 2 for every unit of log sigma^2, without end.
  np.testing.assert_allclose(np.diff(values)[-3:], 0.25 * NUM_TASKS * np.log(10.0), rtol=1e-6)
  np.testing.assert_allclose(slopes[-3:], -0.5 * NUM_TASKS, rtol=1e-6)

  # Gradient ascent from above the true value, with no help from closed forms.
  # In (z, phi, log sigma^2): theta = phi + sigma z, else the density is too stiff to climb.
  @jax.jit
  def ascend(params, opt_state):
    def loss(p):
      thetas = {"w": p["phi"] + jnp.exp(0.5 * p["log_sigma2"]) * p["z"]}
      return -sm.log_joint(
        LIKELIHOOD, LABELS, {"w": p["phi"]}, thetas, {"w": p["log_sigma2"]}, batches
      )

    value, grad = jax.value_and_grad(loss)(params)
    updates, opt_state = optimizer.update(grad, opt_state)
    return optax.apply_updates(params, updates), opt_state, -value

  optimizer = optax.adam(0.03)
  params = {"phi": jnp.zeros([]), "log_sigma2": jnp.zeros([]), "z": jnp.zeros(NUM_TASKS)}
  opt_state, trace = optimizer.init(params), []
  for i in range(3000):
    params, opt_state, value = ascend(params, opt_state)
    if i % 500 == 499:
      trace.append((float(params["log_sigma2"]), float(value)))
  sigmas, densities = np.array(trace).T
  assert (np.diff(sigmas) < -5.0).all() and (np.diff(densities) > 100.0).all()
  assert sigmas[-1] < np.log(SIGMA2) - 50.0


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ("sigma_imaml", "sigma_reptile"))
def test_the_predictive_estimate_recovers_sigma(name):
  """To 3 standard errors, that of log sigma^2 found by the spread of the estimate over 8 sets.

  For comparison: were all theta_t seen, it would be sqrt(2 / 200) = 0.1.
  """
  learner = getattr(sm, name)(
    LIKELIHOOD, LABELS, init_sigma=1.5, implicit=sm.Implicit(solver="cg", max_steps=3, tol=1e-10),
    inner=sm.Inner(optax.sgd(0.4), steps=150, tol=1e-8),
    phi_optimizer=optax.adam(optax.exponential_decay(0.1, 50, 0.5)),
    sigma_optimizer=optax.adam(optax.exponential_decay(0.1, 50, 0.5)),
  )  # fmt: skip
  sets = jax.tree.map(lambda *x: jnp.stack(x), *[hierarchical_tasks(seed) for seed in range(8)])
  update = jax.jit(jax.vmap(learner.update))
  state = jax.vmap(lambda _: learner.init({"w": jnp.zeros([])}))(jnp.arange(8))
  for _ in range(250):
    state, metrics = update(state, sets)
  assert bool(metrics.inner.converged.all()) and bool(metrics.solve.converged.all())
  assert float(jnp.abs(metrics.sigma_grad["w"]).max()) < 1e-4  # stationary
  log_sigma2, phi = np.asarray(state.log_sigma2["w"]), np.asarray(state.phi["w"])
  error = log_sigma2.std(ddof=1)
  assert error < 0.5  # or three of them would say nothing
  assert (np.abs(log_sigma2 - np.log(SIGMA2)) < 3 * error).all()
  assert abs(log_sigma2.mean() - np.log(SIGMA2)) < 3 * error / np.sqrt(8)
  # phi in 4 standard errors: l_MAP averages the task means; l_PLL solves for the phi at which val
  # means equal k times train means plus (1 - k) phi on average, k the shrinkage, and knows less.
  k = N * SIGMA2 / (1 + N * SIGMA2)
  noise = (1 + k**2) / (1 - k) ** 2 / N if name == "sigma_imaml" else 1 / N
  assert (np.abs(phi - 1.5) < 4 * np.sqrt((SIGMA2 + noise) / NUM_TASKS)).all()
