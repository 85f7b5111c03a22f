import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shrinkmeta as sm

SCALE, RATE, STEPS, TASKS, SHOWN = 0.7, 0.8, 3, 3, 7


REST = {
  "implicit": sm.Implicit(),
  "phi_optimizer": optax.sgd(0.1),
  "sigma_optimizer": optax.sgd(0.1),
}
pytestmark = pytest.mark.usefixtures("x64")


def predict(theta, x):
  return jnp.tanh(x @ theta["w"]) @ theta["v"]


def problem():
  random = np.random.default_rng(0)
  x = random.normal(size=(TASKS, 12, 4))
  y = np.sin(x.sum(-1)) + random.normal(size=(TASKS, 1))
  params = {"w": jnp.asarray(random.normal(size=(4, 5))), "v": jnp.asarray(random.normal(size=5))}
  return params, sm.Task(sm.Batch(x[:, :SHOWN], y[:, :SHOWN]), sm.Batch(x[:, SHOWN:], y[:, SHOWN:]))


def by_hand(phi, log_sigma2, tasks):
  """Mean validation loss after plain gradient descent with the steps RATE sigma_m^2."""

  def nll(theta, batch):
    error = (predict(theta, batch.inputs) - batch.targets) / SCALE
    return jnp.mean(0.5 * error**2) + 0.5 * np.log(2 * np.pi) + np.log(SCALE)

  def one(train, val):
    theta = phi
    for _ in range(STEPS):
      g = jax.grad(nll)(theta, train)
      theta = {m: theta[m] - RATE * jnp.exp(log_sigma2[m]) * g[m] for m in theta}
    return nll(theta, val)

  return jnp.mean(jax.vmap(one)(*tasks))


def learner_of(algorithm, params):
  likelihood = sm.gaussian(predict, scale=SCALE)
  inner = sm.Inner(optax.sgd(RATE), steps=STEPS)
  return algorithm(likelihood, sm.by_leaf(params), inner=inner, init_sigma={"w": 0.3, "v": 0.6})


def test_sigma_squared_is_a_step_size():
  params, tasks = problem()
  learner = learner_of(sm.meta_sgd, params)
  state = learner.init(params)
  by_hand_of = lambda state: jax.value_and_grad(by_hand, (0, 1))(state.phi, state.log_sigma2, tasks)
  run = jax.jit(lambda state: (by_hand_of(state), learner.meta_gradient(state, tasks)))
  (loss, wanted), (found, metrics) = run(state)
  np.testing.assert_allclose(metrics.loss, loss, rtol=1e-10)
  for name in ("w", "v"):
    np.testing.assert_allclose(found.phi[name], wanted[0][name], rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(found.log_sigma2[name], wanted[1][name], rtol=1e-8)


def test_the_prior_is_what_sigma_maml_adds():
  params, tasks = problem()
  with_prior, without = (learner_of(a, params) for a in (sm.sigma_maml, sm.meta_sgd))
  state = without.init(params)
  gradients = lambda state: [f.meta_gradient(state, tasks)[0] for f in (with_prior, without)]
  a, b = jax.jit(gradients)(state)
  assert abs(a.log_sigma2["w"] / b.log_sigma2["w"] - 1) > 1e-3


def test_a_step_size_of_zero_holds_its_module():
  params, tasks = problem()
  likelihood = sm.gaussian(predict, scale=SCALE)
  learner = sm.meta_sgd(likelihood, sm.by_leaf(params), init_sigma={"w": 0.0, "v": 0.6})
  train = jax.tree.map(lambda x: x[0], tasks.train)
  theta, _ = jax.jit(learner.adapt)(learner.init(params), train)
  np.testing.assert_array_equal(theta["w"], params["w"])
  assert np.abs(theta["v"] - params["v"]).max() > 0.01


def test_without_a_prior_there_is_no_mode():
  params, _ = problem()
  for row in (
    sm.Algorithm("learned", "predictive", "implicit", prior=False),
    sm.Algorithm("inf", "map", "none", prior=False),
  ):
    with pytest.raises(ValueError, match="no mode"):
      learner_of(functools.partial(sm.make_learner, row, **REST), params)
