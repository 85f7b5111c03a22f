"""A module with sigma = inf has no prior; this is the limit of a wide prior."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shrinkmeta as sm

pytestmark = pytest.mark.usefixtures("x64")

LABELS = {"a": "a", "b": "b"}
LINEAR = sm.gaussian(lambda theta, x: x[:, :2] @ theta["a"] + x[:, 2] * theta["b"])
MODE = sm.Inner(optax.sgd(0.3, momentum=0.8), steps=600, tol=1e-12)
EXACT = sm.Implicit(curvature="hessian", max_steps=200, tol=1e-13)
PRIOR = sm.priors.normal(1.0)


def problem(num_tasks=4):
  rng = np.random.default_rng(0)
  part = lambda n: sm.Batch(
    jnp.array(rng.normal(size=(num_tasks, n, 3))), jnp.array(rng.normal(size=(num_tasks, n)))
  )
  params = {"a": jnp.array([0.4, -0.7]), "b": jnp.array(1.3)}
  return params, sm.Task(part(5), part(6))


def inner_of(sigma_b):
  """MODE with steps in z_b for which sigma_b^2 is no curvature."""
  unit = 1.0 if np.isinf(sigma_b) else sigma_b**-2
  rescaled = optax.stateless(lambda grad, _: grad | {"b": unit * grad["b"]})
  return dataclasses.replace(MODE, optimizer=optax.chain(rescaled, MODE.optimizer))


@functools.cache
def gradient(make, sigma_b, sigma_gradient=None):
  params, tasks = problem()
  joint = {} if sigma_gradient is None else {"sigma_gradient": "joint", "log_p_phi": PRIOR}
  sigma = {"a": 0.6, "b": sigma_b}
  learner = make(LINEAR, LABELS, inner=inner_of(sigma_b), implicit=EXACT, init_sigma=sigma, **joint)
  return jax.jit(learner.meta_gradient)(learner.init(params), tasks)


@pytest.mark.parametrize(
  "of", [(sm.sigma_imaml,), (sm.sigma_reptile,), (sm.sigma_reptile, "joint")]
)
def test_gradients_and_losses_are_the_limit_of_a_wide_prior(of):
  make, *how = of
  free, free_metrics = gradient(make, np.inf, *how)
  wide, wide_metrics = gradient(make, 1e4, *how)
  assert np.all(free_metrics.inner.grad_norm < 1e-10)
  # The prior of a wide module is off by theta^2 / sigma^2: about 1e-8.
  chex.assert_trees_all_close(free.phi, wide.phi, rtol=0.0, atol=3e-7)
  np.testing.assert_allclose(free.log_sigma2["a"], wide.log_sigma2["a"], rtol=1e-6)
  assert float(free.log_sigma2["b"]) == 0.0
  np.testing.assert_allclose(free_metrics.phi_loss, wide_metrics.phi_loss, rtol=1e-6)
  assert abs(float(free.log_sigma2["a"])) > 1e-3


def test_phi_of_a_free_module_has_no_say_where_it_follows_l_map():
  free, _ = gradient(sm.sigma_reptile, np.inf)
  assert abs(float(free.phi["b"])) < 1e-9 < np.abs(free.phi["a"]).max()


@pytest.mark.parametrize("make", [sm.sigma_imaml, sm.sigma_reptile])
def test_gradients_are_those_of_the_losses(make):
  params, tasks = problem()
  sigma = {"a": 0.6, "b": float("inf")}
  learner = make(LINEAR, LABELS, inner=MODE, implicit=EXACT, init_sigma=sigma)
  check = sm.check_meta_gradient(learner, learner.init(params), tasks)
  found = 0
  for row in check.rows:
    if not (row.parameter == "phi" and row.module == "b"):  # on which little or nothing depends
      np.testing.assert_allclose(row.learner, row.differences, rtol=1e-6, err_msg=str(check))
      found += 1
  assert found >= 3


def test_sigma_that_is_not_finite_stays_under_weight_decay():
  params, tasks = problem()
  sigma = {"a": 0.6, "b": float("inf")}
  for other in (float("inf"), 0.0):
    learner = sm.sigma_imaml(
      LINEAR, LABELS, inner=MODE, init_sigma=sigma | {"b": other}, sigma_optimizer=optax.adamw(0.01)
    )
    state, update = learner.init(params), jax.jit(learner.update)
    for _ in range(2):
      state, metrics = update(state, tasks)
    assert int(metrics.num_failed) == 0
    assert float(state.log_sigma2["b"]) == (np.inf if other else -np.inf)
    assert float(state.log_sigma2["a"]) != 2 * np.log(0.6)


def test_what_needs_a_prior_says_so():
  params, tasks = problem()
  batch = jax.tree.map(lambda x: x[0], tasks.train)
  free = {"a": 0.0, "b": jnp.inf}
  dual = sm.Implicit(solver="dual")
  with pytest.raises(ValueError, match=r"'b'.*is \+inf.*no dual solve: use solver=.cg"):
    sm.map_estimate(LINEAR, LABELS, params, free, batch, MODE, dual)
  with pytest.raises(ValueError, match=r"'b'.*no dual solve"):
    sm.sigma_imaml(LINEAR, LABELS, implicit=dual, init_sigma={"a": 1.0, "b": float("inf")})
  with pytest.raises(ValueError, match=r"'b'.*no posterior"):
    sm.posterior(LINEAR, LABELS, params, free, params, batch)
  with pytest.raises(ValueError, match=r"'b'.*no evidence"):
    sm.restriction(LINEAR, LABELS, params, free, tasks.train, ("a",))

  def loss(log_sigma2):  # under jit nobody knows: NaN, not a number that is wrong
    theta, _ = sm.map_estimate(LINEAR, LABELS, params, log_sigma2, batch, MODE, dual)
    return jnp.sum(theta["a"])

  slope = jax.jit(jax.grad(loss))
  assert np.isnan(slope({m: jnp.asarray(v) for m, v in free.items()})["a"])
  assert np.isfinite(slope({"a": jnp.zeros([]), "b": jnp.zeros([])})["a"])
