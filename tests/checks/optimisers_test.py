"""Optimisers get what they need: theta if sigma is inf, the loss, and a gradient through steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shrinkmeta as sm
from shrinkmeta.checks import optimisers

LINEAR = sm.gaussian(lambda theta, x: x * theta["w"])
PARAMS = {"w": jnp.array([5.0])}
PLATEAU = optax.chain(optax.adam(1e-2), optax.contrib.reduce_on_plateau(patience=2))
TASKS = sm.Task(*[sm.Batch(jnp.ones((3, 4)), jnp.ones((3, 4)))] * 2)


@pytest.mark.parametrize("name", ["maml", "fomaml", "reptile", "fine_tuning"])
@pytest.mark.parametrize(
  ("optimizer", "x"),
  [
    (optax.adamw(0.1, weight_decay=0.5), jnp.zeros(4)),
    (optax.lamb(0.1), jnp.ones(4)),
    (optax.adafactor(0.1), jnp.ones(4)),
    (optax.sgd(0.1), jnp.ones(4)),
  ],
  ids=["adamw", "lamb", "adafactor", "sgd"],
)
def test_without_a_prior_the_optimiser_moves_theta_itself(name, optimizer, x):
  def steps():
    def step(_, carry):
      theta, state = carry
      grad = {"w": jnp.mean(x * (x * theta["w"] - 3.0 * x), keepdims=True)}
      step, state = optimizer.update(grad, state, theta)
      return optax.apply_updates(theta, step), state

    return jax.lax.fori_loop(0, 10, step, (PARAMS, optimizer.init(PARAMS)))[0]

  learner = getattr(sm, name)(LINEAR, sm.by_leaf(PARAMS), inner=sm.Inner(optimizer, steps=10))
  run = jax.jit(lambda state: (learner.adapt(state, sm.Batch(x, 3.0 * x))[0], steps()))
  found, want = run(learner.init(PARAMS))
  np.testing.assert_allclose(found["w"], want["w"], rtol=1e-5)
  assert abs(want["w"] - PARAMS["w"]) > 1e-3


@pytest.mark.parametrize("name", ["sigma_imaml", "empirical_bayes"])
def test_an_outer_optimiser_is_given_the_loss(name):
  learner = getattr(sm, name)(
    LINEAR,
    sm.by_leaf(PARAMS),
    inner=sm.Inner(optax.sgd(0.1), steps=3),
    phi_optimizer=PLATEAU,
    sigma_optimizer=PLATEAU,
  )
  state, metrics = jax.jit(learner.update)(learner.init(PARAMS), TASKS)
  loss = metrics.phi_loss if name == "empirical_bayes" else metrics.loss
  np.testing.assert_allclose(state.opt_state.phi[-1].best_value, metrics.phi_loss, rtol=1e-6)
  np.testing.assert_allclose(state.opt_state.log_sigma2[-1].best_value, loss, rtol=1e-6)


@pytest.mark.parametrize("which", ["phi_optimizer", "sigma_optimizer"])
def test_an_outer_line_search_is_refused(which):
  with pytest.raises(ValueError, match=f"{which}.*line search.*optax.adam"):
    sm.sigma_imaml(LINEAR, sm.by_leaf(PARAMS), **{which: optax.lbfgs()})


def test_reptile_has_no_loss_for_an_optimiser():
  with pytest.raises(ValueError, match="phi_optimizer needs the loss"):
    sm.reptile(LINEAR, sm.by_leaf(PARAMS), phi_optimizer=optax.polyak_sgd())


@pytest.mark.parametrize("name", ["maml", "sigma_maml", "meta_sgd", "anil", "boil", "hand_picked"])
def test_a_line_search_is_refused_where_the_gradient_goes_through_the_steps(name):
  keywords = {
    "hand_picked": {"task_specific": ("w",)},
    "anil": {"head": "w"},
    "boil": {"head": "b"},
  }
  labels = {"w": "w", "b": "b"}
  make = lambda inner: getattr(sm, name)(LINEAR, labels, inner=inner, **keywords.get(name, {}))
  with pytest.raises(ValueError, match=r"Inner\.optimizer.*optax\.sgd"):
    make(sm.Inner(steps=5))
  assert make(sm.Inner(optax.adam(0.1), steps=5)).spec.inner.steps == 5


def test_targets_out_of_range_are_refused_before_they_are_traced():
  likelihood = sm.categorical(lambda theta, x: x @ theta["w"])
  labels = jnp.array([[1, 5], [1, 2]])
  learner = sm.fine_tuning(likelihood, {"w": "w"}, inner=sm.Inner(optax.sgd(0.1), 1))
  state = learner.init({"w": jnp.zeros((3, 5))})
  good, bad = sm.Batch(jnp.ones((2, 2, 3)), labels % 5), sm.Batch(jnp.ones((2, 2, 3)), labels)
  with pytest.raises(ValueError, match=r"tasks.val: labels must lie in 0\.\.4"):
    learner.update(state, sm.Task(good, bad))
  with pytest.raises(ValueError, match="batches: labels"):
    learner.adapt_tasks(state, bad)
  tasks = sm.Task(bad, good)
  compiled = {
    "tasks.train": lambda: sm.evaluate(learner, state, tasks),
    r"tasks\(0, 2\).train": lambda: sm.fit(learner, state, tasks, 1, meta_batch=2),
    "tasks.train: labels": lambda: sm.check_meta_gradient(learner, state, tasks),
    "tasks.train: labels must": lambda: sm.choose_modules(learner, state, tasks, tolerance=0.1),
  }
  for message, call in compiled.items():
    with pytest.raises(ValueError, match=message):
      call()
  masked = bad._replace(mask=jnp.array([[1, 0], [1, 1]]))  # padding may hold any label
  assert int(learner.update(state, sm.Task(good, masked))[1].num_failed) == 0
  assert int(jax.jit(learner.update)(state, sm.Task(good, bad))[1].num_failed) == 1


def test_a_line_search_that_may_not_end_is_told(caplog):
  optimisers.warn_if_endless(sm.lbfgs(), PARAMS)
  optimisers.warn_if_endless(optax.adam(0.1), PARAMS)
  assert not caplog.records
  optimisers.warn_if_endless(optax.chain(optax.clip(1.0), optax.lbfgs()), PARAMS)
  assert "take Inner(sm.lbfgs())" in caplog.text
