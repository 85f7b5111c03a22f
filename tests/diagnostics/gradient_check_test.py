import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shrinkmeta as sm

pytestmark = pytest.mark.usefixtures("x64")

LABELS = {"w": "body", "b": "head"}
LINEAR = sm.gaussian(lambda theta, x: x @ theta["w"] + theta["b"])
MODE = sm.Inner(optax.sgd(1.0, momentum=0.3), 200)


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
  assert len(str(check).splitlines()) == 8
  assert check.verdict.startswith("fine: 6 derivatives agree") and "unrolled" in str(check)
  assert str(check).endswith(f"\nverdict: {check.verdict}")


def test_it_shows_what_an_approximation_leaves_out():
  identity = sm.Implicit(solver="identity")
  check = sm.check_meta_gradient(
    *problem(sm.sigma_imaml, inner=MODE, init_sigma=0.6, implicit=identity)
  )
  assert max(row.error for row in check.rows) > 0.1
  for row in check.rows:  # the other two derivatives still agree
    np.testing.assert_allclose(row.unrolled, row.differences, rtol=1e-6)
  assert check.verdict.startswith("off: ")
  assert check.verdict.endswith('Likely reason: solver="identity" leaves the curvature out.')


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
  ("inner", "shown"),
  [
    (sm.Inner(sm.lbfgs(), 10), False),
    (dataclasses.replace(MODE, tol=1e-10), True),
  ],
)
def test_the_unrolled_derivative_is_shown_where_it_means_something(inner, shown):
  check = sm.check_meta_gradient(*problem(sm.sigma_imaml, inner=inner, init_sigma=0.6))
  assert ("unrolled" in str(check)) is shown
  assert {row.unrolled is None for row in check.rows} == {not shown}
  assert check.verdict.startswith("fine"), check


def test_one_program_is_traced_for_all_differences():
  traced = []

  def predict(theta, x):
    traced.append(1)
    return x @ theta["w"] + theta["b"]

  _, state, tasks = problem(sm.sigma_imaml)
  inner = sm.Inner(optax.sgd(0.5), 30, tol=1e-6)
  make = lambda: sm.sigma_imaml(sm.gaussian(predict), LABELS, inner=inner)
  jax.jit(make().meta_gradient).lower(state, tasks)
  once = len(traced)
  sm.check_meta_gradient(make(), state, tasks)
  assert len(traced) == 2 * once + 2 > 2  # 2: the targets of train and val are checked


def test_the_verdict_blames_loops_that_end_early_and_frozen_modules_have_no_sigma():
  inner, sigma = sm.Inner(optax.sgd(0.05), 2), {"body": 0.0, "head": 0.6}
  check = sm.check_meta_gradient(*problem(sm.sigma_imaml, inner=inner, init_sigma=sigma))
  assert [r.module for r in check.rows if r.parameter == "log_sigma2"] == ["head"]
  assert check.verdict.startswith("off: "), check
  assert "the inner loops of 2 of 2 tasks are short of their mode" in check.verdict
  assert "Give Inner more steps" in check.verdict


def test_the_verdict_blames_solves_that_end_early():
  implicit = sm.Implicit(max_steps=1, tol=1e-12)
  check = sm.check_meta_gradient(
    *problem(sm.sigma_imaml, inner=MODE, init_sigma=0.6, implicit=implicit)
  )
  assert check.verdict.startswith("off: "), check
  assert "the linear solves of 2 of 2 tasks are short of Implicit.tol" in check.verdict


def test_the_verdict_blames_first_order_gradients():
  check = sm.check_meta_gradient(*problem(sm.fomaml, inner=sm.Inner(optax.sgd(0.1), 3)))
  assert check.verdict.startswith("off: phi of module "), check
  assert "leaves out second derivatives" in check.verdict


def test_the_verdict_blames_gauss_newton_for_a_network_that_is_not_linear():
  bent = sm.gaussian(lambda theta, x: jnp.sin(3.0 * x @ theta["w"]) + theta["b"])
  _, state, tasks = problem(sm.sigma_imaml)
  inner = sm.Inner(optax.sgd(0.2, momentum=0.5), 1000, tol=1e-12)
  verdicts = [
    sm.check_meta_gradient(
      sm.sigma_imaml(bent, LABELS, inner=inner, init_sigma=0.3, implicit=implicit), state, tasks
    ).verdict
    for implicit in (sm.Implicit(), sm.Implicit(curvature="hessian", tol=1e-10))
  ]
  assert verdicts[0].startswith("off: ") and "Gauss-Newton leaves out" in verdicts[0]
  assert verdicts[1].startswith("fine: ")


def test_the_verdict_names_what_is_wrong_and_by_how_much():
  learner, state, tasks = problem(sm.sigma_maml, inner=sm.Inner(optax.sgd(0.1), 3))

  def wrong(state, tasks, key=None):
    grad, metrics = learner.meta_gradient(state, tasks, key)
    scaled = grad.log_sigma2 | {"head": 1.25 * grad.log_sigma2["head"]}
    return grad._replace(log_sigma2=scaled), metrics

  verdict = sm.check_meta_gradient(learner._replace(meta_gradient=wrong), state, tasks).verdict
  assert verdict.startswith(
    "off: log_sigma2 of module 'head' along 'axis' by 20 % of the larger value (tolerance 0.1 %). "
    "Likely reason: none"
  )


def test_a_loss_that_jumps_leaves_the_verdict_unsure():
  """The outputs go in steps of 4e-6: two step sizes see two different slopes."""
  stairs = lambda f: f + jax.lax.stop_gradient(jnp.round(f * 2.5e5) / 2.5e5 - f)
  rough = sm.gaussian(lambda theta, x: stairs(x @ theta["w"] + theta["b"]))
  _, state, tasks = problem(sm.maml)
  learner = sm.maml(rough, LABELS, inner=sm.Inner(optax.sgd(0.1), 1))
  verdict = sm.check_meta_gradient(learner, state, tasks).verdict
  assert verdict.startswith("unsure: the differences for ")
  assert "the loss has a kink near this state" in verdict


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
