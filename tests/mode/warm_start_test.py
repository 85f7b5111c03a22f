"""Recurring tasks start where they ended: fewer steps, and the same mode and gradient."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shrinkmeta as sm
from shrinkmeta.curvature import solvers

pytestmark = pytest.mark.usefixtures("x64")

T, N, D = 4, 30, 12
LABELS = {"w": "w", "b": "b", "c": "c"}
INNER = sm.Inner(optax.sgd(0.1, momentum=0.8), 5000, tol=1e-10)
IMPLICIT = sm.Implicit(max_steps=100, tol=1e-10)


def predict(theta, x):
  return jnp.tanh(x @ theta["w"]) + theta["b"] + theta["c"]


def problem(implicit=IMPLICIT, **keywords):
  rng = np.random.default_rng(0)
  array = lambda *shape: jnp.asarray(rng.normal(size=shape))
  learner = sm.sigma_imaml(
    sm.gaussian(predict), LABELS, inner=INNER, implicit=implicit, phi_optimizer=optax.sgd(1e-2),
    sigma_optimizer=optax.sgd(1e-2), init_sigma={"w": 0.5, "b": 1.0, "c": 0.0}, **keywords,
  )  # fmt: skip
  state = learner.init({"w": 0.3 * array(D), "b": array(), "c": array()})
  batch = lambda: sm.Batch(array(T, N, D), array(T, N))
  return learner, state, sm.Task(batch(), batch())


@pytest.mark.parametrize("batching", ("vmap", "sequential", 2))
def test_a_task_that_returns_costs_less_and_gives_the_same(batching):
  learner, state, tasks = problem(batching=batching)
  gradient = jax.jit(learner.meta_gradient)
  cold, cold_metrics = gradient(state, tasks)
  assert cold_metrics.warm is None
  first, metrics = gradient(state, tasks, warm=learner.no_start(state, T))
  chex.assert_trees_all_close(first, cold, rtol=1e-8)
  assert metrics.warm.z["c"] is None  # frozen
  again, again_metrics = gradient(state, tasks, warm=metrics.warm)
  chex.assert_trees_all_close(again, cold, rtol=1e-7)
  assert np.all(np.asarray(again_metrics.inner.steps) == 0)  # begins at the mode
  assert np.all(np.asarray(again_metrics.solve.steps) == 1)  # the product that finds it solved


def test_after_a_small_move_a_start_saves_steps():
  learner, state, tasks = problem(sm.Implicit(max_steps=100, tol=1e-3))
  gradient = jax.jit(learner.meta_gradient)
  warm = gradient(state, tasks, warm=learner.no_start(state, T))[1].warm
  moved = state._replace(phi=jax.tree.map(lambda p: p + 1e-4, state.phi))
  near, from_zero = gradient(moved, tasks, warm=warm)[1], gradient(moved, tasks)[1]
  assert np.all(near.inner.steps < from_zero.inner.steps)
  assert np.all(near.solve.steps < from_zero.solve.steps)


def test_a_buffer_of_recurring_tasks():
  learner, state, tasks = problem()
  buffer = learner.no_start(state, 10)
  ids = jnp.array([7, 2, 0, 5])
  _, metrics = jax.jit(learner.update)(state, tasks, warm=buffer.take(ids))
  buffer = buffer.put(ids, metrics.warm)
  chex.assert_trees_all_equal(buffer.take(ids), metrics.warm)
  assert all(not np.any(x[jnp.array([1, 3, 4, 6, 8, 9])]) for x in jax.tree.leaves(buffer))
  donating = jax.jit(sm.WarmStart.put, donate_argnums=0)
  chex.assert_trees_all_equal(donating(learner.no_start(state, 10), ids, metrics.warm), buffer)


def test_a_failed_task_begins_anew():
  learner, state, tasks = problem()
  bad = tasks.train.inputs.at[1, 0, 0].set(jnp.nan)
  broken = tasks._replace(train=tasks.train._replace(inputs=bad))
  start = jax.tree.map(lambda x: x + 0.1, learner.no_start(state, T))
  warm = jax.jit(learner.update)(state, broken, warm=start)[1].warm
  assert all(not np.any(x[1]) and np.all(np.isfinite(x)) for x in jax.tree.leaves(warm))


def test_cg_from_a_start():
  rng = np.random.default_rng(0)
  a = rng.normal(size=(40, 40))
  matrix, b = jnp.asarray(a @ a.T + np.eye(40)), jnp.asarray(rng.normal(size=40))
  solution = jnp.linalg.solve(matrix, b)
  operator = lambda v: (matrix @ v, v[:7])

  def solve(start, steps=200):
    w, beside, info = solvers.cg(operator, b, steps, 1e-9, start)
    np.testing.assert_allclose(beside, w[:7], rtol=1e-9, atol=1e-12)
    return w, info

  near, info = solve(solution * (1 + 1e-6))
  np.testing.assert_allclose(near, solution, rtol=1e-6)
  assert bool(info.converged) and int(info.steps) < int(solve(None)[1].steps)
  far, info = solve(1e3 * solution)  # further off than 0: taken as 0
  np.testing.assert_array_equal(far, solve(None)[0])
  assert int(info.steps) == int(solve(None)[1].steps) + 1
  w, info = solve(jnp.full(40, jnp.nan), steps=50)  # no start at all
  assert np.all(np.isfinite(w))


def test_errors():
  learner, state, tasks = problem()
  with pytest.raises(ValueError, match="has 3 tasks; the update has 4"):
    learner.update(state, tasks, warm=learner.no_start(state, 3))
  with pytest.raises(TypeError, match="must be a shrinkmeta.WarmStart"):
    learner.update(state, tasks, warm=state.phi)
  whole = jax.tree.map(lambda p: jnp.zeros((T, *p.shape)), state.phi)
  with pytest.raises(ValueError, match="'c' is in warm.z and not in the moving part of phi"):
    learner.update(state, tasks, warm=sm.WarmStart(whole, whole))
  maml = sm.maml(sm.gaussian(predict), LABELS)
  with pytest.raises(ValueError, match="warm start is for algorithms with an implicit gradient"):
    maml.update(maml.init(state.phi), tasks, warm=learner.no_start(state, T))
