import collections

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shrinkmeta as sm

pytestmark = pytest.mark.usefixtures("x64")

LABELS = {"w": "body", "b": "head"}
LINEAR = sm.gaussian(lambda theta, x: x @ theta["w"] + theta["b"])
MODE = sm.Inner(optax.sgd(0.5), 1000)


def problem(make, **keywords):
  rng = np.random.default_rng(0)
  batch = lambda: sm.Batch(
    jnp.array(rng.normal(size=(2, 6, 2))), jnp.array(rng.normal(size=(2, 6)))
  )
  learner = make(LINEAR, LABELS, **keywords)
  state = learner.init({"w": jnp.array([0.3, -0.5]), "b": jnp.array(0.2)})
  return learner, state, sm.Task(batch(), batch())


@pytest.mark.parametrize(
  ("make", "keywords"),
  [
    (sm.sigma_imaml, {"inner": MODE, "init_sigma": 0.6, "implicit": sm.Implicit(tol=1e-12)}),
    (sm.sigma_maml, {"inner": sm.Inner(optax.sgd(0.1), 3)}),
  ],
)
def test_right_gradients_pass(make, keywords):
  check = sm.check_meta_gradient(*problem(make, **keywords))
  # Two directions of phi for each of two modules, and one of sigma.
  assert collections.Counter((r.parameter, r.module) for r in check.rows) == {
    ("phi", "body"): 2,
    ("phi", "head"): 2,
    ("log_sigma2", "body"): 1,
    ("log_sigma2", "head"): 1,
  }
  for row in check.rows:
    assert row.unrolled_error < 1e-7, check
    np.testing.assert_allclose(row.learner, row.differences, rtol=1e-6, atol=1e-9)
  assert len(str(check).splitlines()) == 7


def test_it_shows_what_an_approximation_leaves_out():
  identity = sm.Implicit(solver="identity")
  check = sm.check_meta_gradient(
    *problem(sm.sigma_imaml, inner=MODE, init_sigma=0.6, implicit=identity)
  )
  assert max(row.error for row in check.rows) > 0.1
  for row in check.rows:  # the other two derivatives still agree
    np.testing.assert_allclose(row.unrolled, row.differences, rtol=1e-6)


def test_frozen_modules_have_no_sigma_in_the_table():
  check = sm.check_meta_gradient(
    *problem(
      sm.sigma_imaml, inner=sm.Inner(optax.sgd(0.5), 1), init_sigma={"body": 0.0, "head": 0.6}
    )
  )
  assert [r.module for r in check.rows if r.parameter == "log_sigma2"] == ["head"]


def test_mini_batches_are_the_same_for_all_evaluations():
  inner = sm.Inner(optax.sgd(0.1), 3, batch_size=2)
  learner, state, tasks = problem(sm.sigma_maml, inner=inner)
  check = sm.check_meta_gradient(learner, state, tasks, key=jax.random.key(3))
  for row in check.rows:
    np.testing.assert_allclose(row.learner, row.differences, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("make", [sm.sigma_imaml, sm.sigma_reptile, sm.empirical_bayes])
def test_a_prior_on_sigma_is_part_of_what_is_compared(make):
  keywords = {"inner": MODE, "init_sigma": 0.6, "implicit": sm.Implicit(tol=1e-12)}
  prior = sm.priors.log_normal(0.1, 0.2)
  check = sm.check_meta_gradient(*problem(make, **keywords, log_p_sigma=prior))
  for row in check.rows:
    np.testing.assert_allclose(row.learner, row.differences, rtol=1e-6, atol=1e-9)
  assert any(abs(row.learner) > 0.1 for row in check.rows if row.parameter == "log_sigma2")


def test_sigma_of_joint_has_no_derivative_with_phi_held():
  """Its gradient lets phi follow sigma. The other two columns hold phi."""
  check = sm.check_meta_gradient(
    *problem(sm.sigma_reptile, inner=MODE, init_sigma=0.6, sigma_gradient="joint")
  )
  of_sigma = [row for row in check.rows if row.parameter == "log_sigma2"]
  assert len(of_sigma) == 2
  for row in of_sigma:
    assert np.isfinite(row.learner) and np.isnan([row.unrolled, row.differences, row.error]).all()


@pytest.mark.parametrize(
  ("name", "value", "message"),
  [
    (
      "learner",
      sm.sigma_imaml,
      "learner must be a shrinkmeta.MetaLearner; got the function sigma_imaml",
    ),
    (
      "state",
      {"w": 0.0},
      r"state must be a shrinkmeta.MetaState; got .* Make one: learner.init\(params\)",
    ),
    ("tasks", lambda first, count: None, "tasks must be a shrinkmeta.Task.*; got"),
    ("key", 0, "^key must be a key of random numbers, or None; got 0"),
    ("direction_key", "0", "direction_key must be a key of random numbers"),
  ],
)
def test_wrong_types_are_refused_by_name(name, value, message):
  learner, state, tasks = problem(sm.sigma_maml)
  arguments = {"learner": learner, "state": state, "tasks": tasks} | {name: value}
  with pytest.raises(TypeError, match=message):
    sm.check_meta_gradient(**arguments)
