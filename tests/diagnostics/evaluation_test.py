"""`evaluate` equals a written-out loop, its intervals equal scipy's, and it compiles once."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import special, stats

import shrinkmeta as sm
from shrinkmeta.diagnostics import evaluation

INNER = sm.Inner(optax.sgd(1.0), 300, tol=1e-3)


def classes(seed=0, num_tasks=4):
  rng = np.random.default_rng(seed)
  mask = jnp.array(np.arange(8) < 6, jnp.float32) * jnp.ones((num_tasks, 1))
  draw = lambda: sm.Batch(
    jnp.array(rng.normal(size=(num_tasks, 8, 3)), jnp.float32),
    jnp.array(rng.integers(0, 4, (num_tasks, 8))),
    mask,
  )
  return sm.Task(draw(), draw())


def learner_and_state(predict=lambda theta, x: x @ theta["w"] + theta["b"], **keywords):
  params = {"w": jnp.zeros((3, 4)), "b": jnp.zeros(4)}
  keywords = {"inner": INNER} | keywords
  learner = sm.sigma_imaml(sm.categorical(predict), sm.by_leaf(params), **keywords)
  return learner, learner.init(params)


SHARED = learner_and_state()  # one program for several tests
FROZEN = {"init_sigma": {"w": 0.5, "b": 0.0}}


@pytest.mark.parametrize(
  "of",
  [SHARED, *(learner_and_state(**FROZEN, batching=b) for b in ("sequential", 2))],
  ids=("vmap", "sequential, frozen", "2, frozen"),
)
def test_it_is_the_loop_over_tasks_written_out(of):
  learner, state = of
  tasks, adapt = classes(), jax.jit(learner.adapt)
  found = evaluation.evaluate(learner, state, tasks)
  for t in range(4):
    train, val = jax.tree.map(lambda x, t=t: np.asarray(x[t]), tasks)
    theta, info = jax.tree.map(np.asarray, adapt(state, train))
    logits = (val.inputs @ theta["w"] + theta["b"])[:6]
    log_p = special.log_softmax(logits, -1)[np.arange(6), val.targets[:6]]
    np.testing.assert_allclose(found.val_nll[t], -log_p.mean(), rtol=1e-5)
    hits = np.argmax(logits, -1) == val.targets[:6]
    np.testing.assert_allclose(found.accuracy[t], hits.mean(), rtol=1e-6)
    assert found.converged[t] == info.converged
  assert found.share_converged == 1.0 and found.num_failed == 0
  assert str(found).startswith("4 tasks: loss ") and "accuracy" in str(found)


def test_it_compiles_once_for_a_learner_and_shapes():
  traced = []

  def predict(theta, x):
    traced.append(1)
    return x @ theta["w"] + theta["b"]

  learner, state = learner_and_state(predict)
  first = evaluation.evaluate(learner, state, classes(0))
  count = len(traced)
  second = evaluation.evaluate(learner, state._replace(step=state.step + 1), classes(1))
  assert len(traced) == count > 0
  assert not np.allclose(first.val_nll, second.val_nll)
  evaluation.evaluate(learner, state, classes(0, num_tasks=3))
  assert len(traced) > count
  count = len(traced)
  evaluation.evaluate(learner_and_state(predict)[0], state, classes(0))  # another learner
  assert len(traced) > count


@pytest.mark.parametrize("kind", (int, jnp.int32, np.int64, np.array))
def test_steps_replace_those_of_the_learner(kind):
  learner, state = SHARED
  found = evaluation.evaluate(learner, state, classes(), steps=kind(0))
  np.testing.assert_allclose(found.val_nll, np.log(4.0), rtol=1e-5)
  assert found.converged is None and found.share_converged is None
  assert str(found).startswith("4 tasks: loss 1.386") and "converged" not in str(found)


def test_the_interval_is_that_of_a_t_test():
  values = np.random.default_rng(0).normal(size=7)
  found = evaluation.Evaluation(np.append(values, np.nan), None, np.ones(8, bool))
  wanted = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
  np.testing.assert_allclose(found.loss, (values.mean(), *wanted), rtol=1e-10)
  assert found.num_failed == 1
  alone = evaluation.Evaluation(values[:1], None, np.ones(1, bool)).loss
  assert alone.mean == values[0] and np.isnan(alone.low)


def test_the_interval_of_an_accuracy_stays_between_0_and_1():
  good = np.array([1.0, 1.0, 1.0, 0.9])
  found = evaluation.Evaluation(good, good, None).mean_accuracy
  wanted = stats.ttest_1samp(good, 0.0).confidence_interval(0.95)
  np.testing.assert_allclose(found[:2], (good.mean(), wanted.low), rtol=1e-10)
  assert wanted.high > 1.0 and found.high == 1.0
  assert evaluation.Evaluation(good, 1.0 - good, None).mean_accuracy.low == 0.0


def test_a_paired_interval_sees_what_two_intervals_hide():
  rng = np.random.default_rng(0)
  hard, noise = rng.normal(size=(2, 20))
  a = evaluation.Evaluation(hard, None, np.ones(20, bool))
  b = evaluation.Evaluation(hard + 0.1 + 0.01 * noise, None, np.ones(20, bool))
  found = evaluation.paired(a, b)
  wanted = stats.ttest_rel(a.val_nll, b.val_nll).confidence_interval(0.95)
  np.testing.assert_allclose(found.loss[1:], tuple(wanted), rtol=1e-10)
  assert found.loss.high < 0 and a.loss.high > b.loss.low and found.num_tasks == 20
  with pytest.raises(ValueError, match="a has 20 tasks and b has 3: evaluate both on the same"):
    evaluation.paired(a, evaluation.Evaluation(hard[:3], None, np.ones(3, bool)))
  with pytest.raises(TypeError, match="b must be an Evaluation, as shrinkmeta.evaluate returns it"):
    evaluation.paired(a, 1.0)


def test_a_failed_task_is_counted_and_left_out():
  learner, state = SHARED
  tasks = classes()
  far = tasks.train.inputs.at[1].multiply(1e25)  # its second step overflows
  wrong = tasks._replace(train=tasks.train._replace(inputs=far))
  right, found = (evaluation.evaluate(learner, state, x) for x in (tasks, wrong))
  assert found.num_failed == 1 and np.isnan(found.val_nll[1]) and np.isnan(found.accuracy[1])
  np.testing.assert_allclose(found.loss.mean, right.val_nll[[0, 2, 3]].mean(), rtol=1e-5)
  assert str(found).endswith("1 failed")
  assert evaluation.paired(right, found).num_tasks == 3


def test_regression_has_no_accuracy():
  linear = sm.gaussian(lambda theta, x: x * theta["w"])
  learner = sm.maml(linear, {"w": "w"}, inner=sm.Inner(optax.sgd(0.1), 2))
  x = jnp.ones((3, 4))
  tasks = sm.Task(sm.Batch(x, x), sm.Batch(x, x))
  found = evaluation.evaluate(learner, learner.init({"w": 0.0}), tasks)
  assert found.accuracy is None and found.mean_accuracy is None
  np.testing.assert_allclose(found.val_nll, 0.5 * 0.81**2 + 0.5 * np.log(2 * np.pi), rtol=1e-5)


def test_counts_have_no_accuracy():
  """Two parameters of a density of counts look like the logits of two classes."""
  log_prob = lambda f, y: -((y - f[:, 0]) ** 2) - f[:, 1] ** 2
  learner = sm.maml(
    sm.Likelihood(lambda p, x: jnp.stack([x, x * p["w"]], -1), log_prob), {"w": "w"}
  )
  x = jnp.ones((2, 3))
  for largest, none in ((1, False), (2, True)):
    batch = sm.Batch(x, jnp.array([[0, 1, 0], [0, 1, largest]]))
    found = evaluation.evaluate(learner, learner.init({"w": 0.0}), sm.Task(batch, batch))
    assert (found.accuracy is None) == none


def test_evaluate_says_what_needs_validation_data():
  learner = sm.empirical_bayes(sm.gaussian(lambda p, x: x * p["w"]), {"w": "w"})
  tasks = sm.Task(sm.Batch(jnp.ones((2, 3)), jnp.ones((2, 3))), None)
  with pytest.raises(ValueError, match="tasks.val is None. evaluate needs"):
    evaluation.evaluate(learner, learner.init({"w": 0.0}), tasks)


def test_a_density_with_a_scale_has_no_accuracy_for_integer_targets():
  scaled = sm.gaussian_with_scale(lambda theta, x: (x * theta["w"], 0.0 * theta["w"]))
  learner = sm.maml(scaled, {"w": "w"}, inner=sm.Inner(optax.sgd(0.1), 2))
  batch = sm.Batch(jnp.ones((3, 4)), jnp.ones((3, 4), int))
  found = evaluation.evaluate(learner, learner.init({"w": 0.0}), sm.Task(batch, batch))
  assert found.accuracy is None and np.isfinite(found.val_nll).all()


@pytest.mark.parametrize(
  ("name", "value", "message"),
  [
    ("learner", sm.sigma_imaml, "learner must be a learner, as .* returns it; got"),
    ("state", {"w": 0.0}, "state must be a MetaState"),
    ("tasks", [1], "tasks must be a shrinkmeta.Task"),
    ("tasks", classes()._replace(val=None), "needs validation examples"),
    ("steps", (1, 2), "steps must be an integer"),
    ("key", 0, "key must be a key of random numbers, or None"),
  ],
)
def test_wrong_arguments_are_refused_by_name(name, value, message):
  learner, state = SHARED
  arguments = {"learner": learner, "state": state, "tasks": classes()} | {name: value}
  with pytest.raises((TypeError, ValueError), match=message):
    evaluation.evaluate(**arguments)
