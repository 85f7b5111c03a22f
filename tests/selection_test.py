"""One of three layers varies between simulated tasks; sigma_imaml finds the layer and its sigma.

phi starts at random, not at the truth. Every meta-step has new tasks.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shrinkmeta as sm

SIZES, NOISE, SIGMA, SEEDS = (4, 8, 8, 4), 0.1, 0.3, 6
NUM_TASKS, N, META_STEPS = 16, 32, 300
LAYERS = tuple(f"layer_{i}" for i in range(3))


def draw_network(key, gain):
  keys = jax.random.split(key, 6)
  return {
    layer: {
      "kernel": gain * jax.random.normal(keys[2 * i], (a, b)) / np.sqrt(a),
      "bias": 0.3 * gain * jax.random.normal(keys[2 * i + 1], (b,)),
    }
    for i, (layer, a, b) in enumerate(zip(LAYERS, SIZES[:-1], SIZES[1:], strict=True))
  }


def predict(theta, x):
  for layer in LAYERS[:-1]:
    x = jnp.tanh(x @ theta[layer]["kernel"] + theta[layer]["bias"])
  return x @ theta[LAYERS[-1]]["kernel"] + theta[LAYERS[-1]]["bias"]


def draw_tasks(key, truth, spread):
  """theta = truth + spread[i] * normal in layer i; NUM_TASKS tasks of N + N examples."""
  theta_key, x_key, y_key = jax.random.split(key, 3)
  noise = jax.vmap(lambda k: optax.tree.random_like(k, truth))(
    jax.random.split(theta_key, NUM_TASKS)
  )
  thetas = {
    layer: jax.tree.map(lambda t, e, s=s: t + s * e, truth[layer], noise[layer])
    for layer, s in zip(LAYERS, spread, strict=True)
  }
  x = jax.random.normal(x_key, (NUM_TASKS, 2 * N, SIZES[0]))
  y = jax.vmap(predict)(thetas, x)
  y += NOISE * jax.random.normal(y_key, y.shape)
  return sm.Task(sm.Batch(x[:, :N], y[:, :N]), sm.Batch(x[:, N:], y[:, N:]))


@pytest.mark.slow
def test_the_layer_that_varies_is_found(optimising_jit):
  params = draw_network(jax.random.key(0), 1.0)
  learner = sm.sigma_imaml(
    sm.gaussian(predict, NOISE),
    sm.by_layer(params),
    inner=sm.Inner(sm.lbfgs(), steps=30, tol=1e-3),
    implicit=sm.Implicit(max_steps=100, tol=1e-3),
    phi_optimizer=optax.chain(
      optax.clip_by_global_norm(1.0),
      optax.adam(optax.cosine_decay_schedule(0.02, META_STEPS, 0.05)),
    ),
    sigma_optimizer=optax.adam(0.1),
    init_sigma=0.3,
  )
  seeds = jnp.arange(SEEDS)
  key = lambda use, seed: jax.random.fold_in(jax.random.key(use), seed)
  truth = jax.vmap(lambda s: draw_network(key(1, s), 1.5))(seeds)
  state = jax.vmap(lambda s: learner.init(draw_network(key(2, s), 1.0)))(seeds)
  spread = SIGMA * jax.nn.one_hot(seeds % 3, 3)

  @optimising_jit  # it runs for longer than it compiles
  def update(step, state):
    def one(seed, truth, spread, state):
      tasks = draw_tasks(jax.random.fold_in(key(3, seed), step), truth, spread)
      return learner.update(state, tasks)[0]

    return jax.vmap(one)(seeds, truth, spread, state)

  for step in range(META_STEPS):
    state = update(step, state)
  sigma = np.exp(0.5 * np.stack([state.log_sigma2[layer] for layer in LAYERS], axis=1))
  planted = np.arange(SEEDS) % 3
  own = sigma[np.arange(SEEDS), planted]
  others = np.where(planted[:, None] == np.arange(3), 0.0, sigma).max(1)
  assert (own > others).all(), sigma
  assert (own >= 10 * others).sum() >= SEEDS - 1, sigma
  # Modes are not quite reached in 30 steps, which widens sigma; within a half of the truth.
  np.testing.assert_array_less(np.abs(np.log(own / SIGMA)), np.log(1.5), err_msg=str(sigma))
