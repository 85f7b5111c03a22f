"""learner.keep equals a new learner, and keeps phi, sigma and the states of the optimisers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shrinkmeta as sm
from shrinkmeta.mode.frozen import check_own

NAMES = ("body", "head", "level")
PARAMS = {"body": jnp.array([0.5, -0.5]), "head": jnp.ones(()), "level": jnp.zeros(())}
LABELS = sm.by_leaf(PARAMS)
LIKELIHOOD = sm.gaussian(lambda p, x: jnp.tanh(x @ p["body"]) * p["head"] + p["level"], 0.3)


def draw(key, count=4):
  keys = jax.random.split(key, 2)
  x = jax.random.normal(keys[0], (count, 10, 2))
  y = jnp.tanh(x[..., 0]) + jax.random.normal(keys[1], (count, 1))
  return sm.Task(sm.Batch(x[:, :5], y[:, :5]), sm.Batch(x[:, 5:], y[:, 5:]))


# Its program compiles in a fraction of the time of L-BFGS.
DESCENT = sm.Inner(optax.sgd(0.1), steps=30, tol=1e-4)


def trained(algorithm, updates=2, **settings):
  """A learner, and a state whose numbers are all away from those of the start."""
  inner = sm.Inner(optax.sgd(0.1), steps=3) if algorithm is sm.maml else DESCENT
  learner = algorithm(LIKELIHOOD, LABELS, **({"inner": inner} | settings))
  move = lambda x: x + 0.01 * updates if jnp.issubdtype(x.dtype, jnp.floating) else x + updates
  return learner, jax.tree.map(move, learner.init(PARAMS))


FINITE = (
  sm.sigma_imaml,
  sm.imaml,
  sm.sigma_reptile,
  sm.sigma_maml,
  sm.meta_sgd,
  sm.empirical_bayes,
)


@pytest.mark.parametrize("algorithm", FINITE)
def test_a_kept_learner_takes_the_update_of_one_built_anew(algorithm):
  unrolled = algorithm in (sm.sigma_maml, sm.meta_sgd)
  inner = sm.Inner(optax.sgd(0.1), steps=3) if unrolled else DESCENT
  learner, state = trained(algorithm, init_sigma=0.4, inner=inner)
  kept, begin = learner.keep(state, ["head", "level"])
  sigma = {m: float(jnp.exp(0.5 * state.log_sigma2[m])) for m in NAMES} | {"body": 0.0}
  anew = algorithm(LIKELIHOOD, LABELS, init_sigma=sigma, inner=inner)
  same = anew.init(PARAMS)._replace(
    phi=state.phi,
    log_sigma2=state.log_sigma2 | {"body": jnp.float32(-jnp.inf)},
    opt_state=state.opt_state,
    step=state.step,
  )
  tasks = draw(jax.random.key(9))
  ours, metrics = jax.jit(kept.update)(begin, tasks)
  theirs, wanted = jax.jit(anew.update)(same, tasks)
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)
  np.testing.assert_array_equal(metrics.val_nll, wanted.val_nll)
  assert kept.spec.frozen == anew.spec.frozen == {"body"}
  assert kept.spec.sigma == pytest.approx(anew.spec.sigma)
  assert kept.algorithm == learner.algorithm


def test_without_a_prior_it_is_hand_picked():
  learner, state = trained(sm.maml, phi_optimizer=optax.adam(0.1))
  kept, begin = learner.keep(state, ("level",))
  settings = {"phi_optimizer": optax.adam(0.1), "inner": learner.spec.inner}
  anew = sm.hand_picked(LIKELIHOOD, LABELS, task_specific=("level",), **settings)
  same = state._replace(log_sigma2=anew.init(PARAMS).log_sigma2)
  tasks = draw(jax.random.key(9))
  ours, theirs = jax.jit(kept.update)(begin, tasks)[0], jax.jit(anew.update)(same, tasks)[0]
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_frozen_modules_have_no_task_axis_and_phi_goes_on():
  learner, state = trained(sm.sigma_imaml, sigma_optimizer=optax.adamw(0.1))
  kept, begin = learner.keep(state, {"head"})
  jax.tree.map(np.testing.assert_array_equal, begin.phi, state.phi)
  jax.tree.map(np.testing.assert_array_equal, begin.opt_state, state.opt_state)
  assert int(begin.step) == 2 and begin.log_sigma2["head"] == state.log_sigma2["head"]
  tasks = draw(jax.random.key(9))
  thetas, _ = jax.eval_shape(kept.adapt_tasks, begin, tasks.train)
  assert thetas["body"] is None and thetas["level"] is None and thetas["head"].shape == (4,)
  after, metrics = jax.jit(kept.update)(begin, tasks)
  assert int(metrics.num_failed) == 0
  assert np.all(np.asarray(after.phi["body"]) != np.asarray(begin.phi["body"]))
  assert np.isneginf(after.log_sigma2["body"]) and np.isneginf(after.log_sigma2["level"])
  assert after.log_sigma2["head"] != begin.log_sigma2["head"]


def test_it_is_the_same_learner_where_all_modules_are_kept():
  learner, state = trained(sm.sigma_imaml)
  kept, begin = learner.keep(state, NAMES)
  tasks = draw(jax.random.key(9))
  ours, theirs = jax.jit(kept.update)(begin, tasks)[0], jax.jit(learner.update)(state, tasks)[0]
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_it_keeps_again():
  learner, state = trained(sm.sigma_imaml)
  kept, begin = learner.keep(state, ("head", "level"))
  again, last = kept.keep(begin, ["head"])
  once, same = learner.keep(state, ["head"])
  assert again.spec.sigma == once.spec.sigma
  jax.tree.map(np.testing.assert_array_equal, last, same)
  with pytest.raises(ValueError, match="'body' is frozen"):
    kept.keep(begin, ["body"])


@pytest.mark.parametrize("algorithm", (sm.sigma_imaml, sm.maml))
def test_the_state_from_before_keep_is_refused_before_anything_compiles(algorithm):
  learner = algorithm(LIKELIHOOD, LABELS)
  state, tasks = learner.init(PARAMS), draw(jax.random.key(9))
  kept, _ = learner.keep(state, ["level"])
  thetas = {m: jnp.zeros((2, *PARAMS[m].shape)) for m in NAMES}
  calls = {
    "evaluate": lambda: sm.evaluate(kept, state, tasks),
    "fit": lambda: sm.fit(kept, state, tasks, 2, meta_batch=2),
    "choose_modules": lambda: sm.choose_modules(kept, state, tasks),
    "check_meta_gradient": lambda: sm.check_meta_gradient(kept, state, tasks),
    "deltas": lambda: sm.deltas(kept, state, thetas, ["ann", "bob"]),
    "update": lambda: kept.update(state, tasks),
    "adapt_tasks": lambda: kept.adapt_tasks(state, tasks.train),
    "keep": lambda: kept.keep(state, ["level"]),
  }
  sigma = "0.3" if algorithm is sm.sigma_imaml else "inf"
  words = f"Module 'body' is .* here, but its sigma is {sigma}.*state that learner.keep returned"
  for call in calls.values():
    with pytest.raises(ValueError, match=words):
      call()


def test_a_state_may_hold_modules_that_its_learner_does_not_hold():
  learner = sm.maml(LIKELIHOOD, LABELS)
  with pytest.raises(ValueError, match="adapted without a prior here, but its sigma is 0"):
    check_own(learner.spec, learner.init(PARAMS).log_sigma2 | {"body": -jnp.inf})
  learner = sm.sigma_imaml(LIKELIHOOD, LABELS)
  check_own(learner.spec, learner.init(PARAMS).log_sigma2 | {"body": -jnp.inf})


def test_fit_goes_on_with_it(tmp_path):
  learner, state = trained(sm.sigma_imaml)
  kept, begin = learner.keep(state, ["level"])
  tasks = lambda first, count: draw(jax.random.fold_in(jax.random.key(1), first), count)
  checkpoints = sm.Checkpoints(tmp_path)
  end = sm.fit(kept, begin, tasks, 4, meta_batch=4, checkpoints=checkpoints)
  assert int(end.step) == 4
  jax.tree.map(np.testing.assert_array_equal, sm.restore(checkpoints, kept, begin), end)


@pytest.mark.parametrize(
  "modules,kind,words",
  [
    ("head", TypeError, "modules must be a sequence of modules.*got 'head'"),
    (None, TypeError, "modules must be a sequence of modules.*got None"),
    ({"head": 1.0}, TypeError, "modules must be a sequence of modules"),
    ([1], TypeError, "modules must be .* it holds 1"),
    (["head", "tail"], ValueError, "'tail', which is no module; they are"),
    ((), ValueError, "modules is empty.*sm.no_adaptation"),
  ],
)
def test_wrong_modules_are_named(modules, kind, words):
  learner, state = trained(sm.sigma_imaml, updates=0)
  with pytest.raises(kind, match=words):
    learner.keep(state, modules)


def test_wrong_states_are_named():
  learner, state = trained(sm.sigma_imaml, updates=0)
  with pytest.raises(TypeError, match="state must be a shrinkmeta.MetaState"):
    learner.keep(PARAMS, ["head"])
  with pytest.raises(TypeError, match="keep reads sigma.*outside jit"):
    jax.jit(lambda state: learner.keep(state, ["head"])[1].phi)(state)
