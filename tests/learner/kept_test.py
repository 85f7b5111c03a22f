"""Compiled programs live as long as their learner, and every function that needs one reuses it."""

import copy
import gc
import weakref

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import shrinkmeta as sm

X = jax.random.normal(jax.random.key(0), (4, 6))
TASKS = sm.Task(sm.Batch(X, 0.5 * X), sm.Batch(X, 0.3 * X))
INNER = sm.Inner(optax.sgd(0.1), 2)


class Counted:
  """x w, and the number of times that it was traced inside a program of the learner."""

  def __init__(self):
    self.traces = 0

  def __call__(self, theta, x):
    self.traces += 1
    return x * theta["w"]


def learner_of(predict):
  learner = sm.sigma_imaml(sm.gaussian(predict), {"w": "w"}, inner=INNER)
  return learner, learner.init({"w": jnp.array(0.0)})


USES = {
  "fit": lambda learner, state: sm.fit(learner, state, TASKS, 2, meta_batch=2),
  "fit in parts": lambda learner, state: sm.fit(
    learner, state, TASKS, 2, meta_batch=4, micro_batches=2, key=jax.random.key(0)
  ),
  "evaluate": lambda learner, state: sm.evaluate(learner, state, TASKS),
  "check_meta_gradient": lambda learner, state: sm.check_meta_gradient(learner, state, TASKS),
}


# How often each traces the network to check the targets of train and of val.
CHECKS = {"fit": 2, "fit in parts": 4, "evaluate": 0, "check_meta_gradient": 2}


@pytest.mark.parametrize("name", USES)
def test_the_second_call_traces_the_network_only_to_check_the_targets(name):
  use, predict = USES[name], Counted()
  learner, state = learner_of(predict)
  first = use(learner, state)
  compiled = predict.traces - CHECKS[name]
  second = use(learner, state._replace(phi={"w": jnp.array(0.5, jnp.float32)}))
  assert compiled > 0 and predict.traces == compiled + 2 * CHECKS[name]
  assert str(first) != str(second)  # the state is an argument of the program
  use(learner_of(predict)[0], state)  # equal settings, another learner
  assert predict.traces == 2 * compiled + 3 * CHECKS[name]


class Model:
  """A model that holds the learner of its own method, as classes of users do."""

  def __init__(self):
    self.learner, self.state = learner_of(self.predict)

  def predict(self, theta, x):
    return x * theta["w"]


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_programs_go_with_their_learner(use):
  predict = Counted()
  learner, state = learner_of(predict)
  use(learner, state)
  alive = weakref.ref(predict)
  del predict, learner
  gc.collect()
  assert alive() is None


@pytest.mark.parametrize("name", [name for name in USES if name != "evaluate"])
def test_programs_go_with_a_model_that_holds_its_learner(name):
  """JAX keeps such a model after `evaluate`, as after jax.jit(learner.adapt): until it clears."""
  use, model = USES[name], Model()
  use(model.learner, model.state)
  alive = weakref.ref(model)
  del model
  gc.collect()
  assert alive() is None


def test_copies_of_a_learner_keep_their_own_programs():
  learner, state = learner_of(Counted())
  sm.fit(learner, state, TASKS, 1, meta_batch=2)
  assert len(learner.spec.programs) == 1
  again = copy.deepcopy(learner)
  assert not again.spec.programs and not learner.keep(state, ["w"])[0].spec.programs
  assert "function" not in repr(learner.spec.programs)
  chex.assert_trees_all_equal(
    sm.fit(again, state, TASKS, 1, meta_batch=2), sm.fit(learner, state, TASKS, 1, meta_batch=2)
  )


def test_the_key_is_an_argument_of_the_program():
  inner = sm.Inner(optax.sgd(0.1), 2, batch_size=2)
  learner = sm.sigma_imaml(sm.gaussian(lambda theta, x: x * theta["w"]), {"w": "w"}, inner=inner)
  state = learner.init({"w": jnp.array(0.0)})
  fitted = lambda seed: sm.fit(learner, state, TASKS, 3, meta_batch=4, key=jax.random.key(seed))
  one, other, again = fitted(1), fitted(2), fitted(1)
  assert one.phi["w"] == again.phi["w"] != other.phi["w"]


def test_running_statistics_are_those_of_this_call():
  """Refresh is no argument of a program, so another one must not find the first one's."""
  learner = sm.reptile(sm.gaussian(lambda theta, x, c: x * theta["w"] + c), {"w": "w"}, inner=INNER)
  state = learner.init({"w": jnp.array(0.0)}, constants=jnp.array(0.0))
  fitted = lambda f: sm.fit(learner, state, TASKS, 1, meta_batch=2, refresh=f).constants

  class Add:
    __hash__ = None  # like the classes of flax.struct

    def __init__(self, step):
      self.step = step

    def __call__(self, phi, inputs, constants):
      return constants + self.step

  add = Add(1.0)
  assert float(fitted(add)) == 1.0
  add.step = 2.0
  assert float(fitted(add)) == 2.0
  assert float(sm.fit(learner, state, TASKS, 1, meta_batch=2).constants) == 0.0


def test_a_learner_with_a_function_of_the_callers_runs_that_function():
  learner, state = learner_of(lambda theta, x: x * theta["w"])
  sm.fit(learner, state, TASKS, 1, meta_batch=2)

  def still(state, tasks, key=None):
    _, metrics = learner.update(state, tasks, key)
    return state._replace(step=state.step + 1), metrics

  fitted = sm.fit(learner._replace(update=still), state, TASKS, 2, meta_batch=2)
  assert int(fitted.step) == 2 and float(fitted.phi["w"]) == 0.0
