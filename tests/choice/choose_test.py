"""choose_modules agrees with closed forms, simulated truths, and learners built for one set."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shrinkmeta as sm
from shrinkmeta.base import MetaParams
from shrinkmeta.choice.choose import choose_modules
from shrinkmeta.choice.losses import SetLosses
from shrinkmeta.choice.path import greedy, paired_error, smallest_good
from shrinkmeta.gradients.total import Shared
from shrinkmeta.model.outputs import check_targets

NAMES, NOISE = ("a", "b", "c"), 0.5
PARAMS = {"a": jnp.array([1.0, -1.0]), "b": jnp.array([0.5]), "c": jnp.array([0.2, 0.1, -0.3])}
SIZES = {"a": 2, "b": 1, "c": 3}
LABELS = sm.by_leaf(PARAMS)


def linear(theta, x):
  return x @ jnp.concatenate([theta[m] for m in NAMES])


def draw(key, count, spread, train=6, val=7):
  """Tasks whose module m has a standard deviation spread[m] around PARAMS."""
  keys = jax.random.split(key, 5)
  thetas = {
    m: PARAMS[m] + spread.get(m, 0.0) * jax.random.normal(keys[i], (count, SIZES[m]))
    for i, m in enumerate(NAMES)
  }
  x = jax.random.normal(keys[3], (count, train + val, 6))
  y = jax.vmap(linear)(thetas, x)
  y += NOISE * jax.random.normal(keys[4], y.shape)
  return sm.Task(sm.Batch(x[:, :train], y[:, :train]), sm.Batch(x[:, train:], y[:, train:]))


# Its program compiles in a fraction of the time of L-BFGS.
DESCENT = sm.Inner(optax.sgd(0.05), steps=300, tol=1e-4)


def make(algorithm=sm.sigma_imaml, params=PARAMS, **settings):
  if algorithm in (sm.sigma_imaml, sm.imaml, sm.empirical_bayes):
    settings = {"inner": DESCENT} | settings
  learner = algorithm(sm.gaussian(linear, NOISE), LABELS, **settings)
  return learner, learner.init(params)


def exact_losses(tasks, sigma, chosen):
  """The losses [T] of a linear-Gaussian model by its normal equations, in NumPy."""
  phi = np.concatenate([np.asarray(PARAMS[m], np.float64) for m in NAMES])
  s = np.concatenate([np.full(SIZES[m], sigma[m] if m in chosen else 0.0) for m in NAMES])
  losses = []
  for x, y, x_val, y_val in zip(*map(np.asarray, (*tasks.train[:2], *tasks.val[:2])), strict=True):
    a = x * s / NOISE
    z = np.linalg.solve(np.eye(6) + a.T @ a, a.T @ (y - x @ phi) / NOISE)
    residual = (y_val - x_val @ (phi + s * z)) / NOISE
    losses.append(np.mean(0.5 * residual**2 + 0.5 * np.log(2 * np.pi) + np.log(NOISE)))
  return np.array(losses)


def test_losses_errors_and_path_are_those_of_the_closed_form(x64):
  sigma = {"a": 0.3, "b": 0.8, "c": 0.2}
  params = jax.tree.map(lambda p: p.astype(jnp.float64), PARAMS)
  tasks = jax.tree.map(
    lambda x: x.astype(jnp.float64), draw(jax.random.key(0), 5, {"b": 1.0, "c": 0.2})
  )
  inner = sm.Inner(optax.sgd(0.1), steps=5_000, tol=1e-12)
  learner, state = make(params=params, init_sigma=sigma, inner=inner)
  found = choose_modules(learner, state, tasks, repeats=0)

  exact = lambda chosen: exact_losses(tasks, sigma, chosen)
  paired = lambda x, y: np.std(x - y, ddof=1) / np.sqrt(5)
  for row, m in zip(found.table, NAMES, strict=True):
    rest = [other for other in NAMES if other != m]
    assert (row.module, row.parameters, row.bytes) == (m, SIZES[m], 8 * SIZES[m])
    assert row.sigma == pytest.approx(sigma[m])
    np.testing.assert_allclose(
      (row.only, row.only_error, row.without, row.without_error),
      (
        exact([m]).mean(),
        paired(exact([m]), exact([])),
        exact(rest).mean(),
        paired(exact(rest), exact(NAMES)),
      ),
      rtol=1e-8,
    )
  path: list[tuple[str, ...]] = [()]
  left = list(NAMES)
  while left:
    best = min(left, key=lambda m: exact([*path[-1], m]).mean())
    left.remove(best)
    path.append((*path[-1], best))
  assert [p.modules for p in found.curve] == path
  best = min(path, key=lambda s: exact(s).mean())
  for p in found.curve:
    np.testing.assert_allclose(p.loss, exact(p.modules).mean(), rtol=1e-8)
    np.testing.assert_allclose(p.error, paired(exact(p.modules), exact(best)), rtol=1e-7)
    count = sum(SIZES[m] for m in p.modules)
    assert (p.parameters, p.bytes, p.share) == (count, 8 * count, count / 6)
    assert np.isnan(p.seconds)
  assert (found.num_sound, found.num_failed) == (5, 0)


def test_moved_is_the_root_mean_square_with_all_modules():
  tasks = draw(jax.random.key(1), 4, {"b": 1.0})
  learner, state = make(init_sigma=0.5)
  found = choose_modules(learner, state, tasks, repeats=0)
  thetas = jax.jit(learner.adapt_tasks)(state, tasks.train)[0]
  for row, one in zip(
    found.table, sm.module_summary(LABELS, PARAMS, state[1], thetas), strict=True
  ):
    np.testing.assert_allclose((row.sigma, row.moved), (one.sigma, one.moved), rtol=1e-5)


@functools.cache
def training():
  learner, state = make(
    phi_optimizer=optax.adam(0.01), sigma_optimizer=optax.adam(0.1), init_sigma=0.3
  )
  return learner, state, jax.jit(learner.update)


@pytest.mark.parametrize("varies", ("b", "c"))
def test_the_module_that_varies_is_chosen_and_the_others_are_not(varies):
  learner, state, update = training()
  for i in range(40):
    state, _ = update(state, draw(jax.random.fold_in(jax.random.key(2), i), 40, {varies: 1.0}))
  new = draw(jax.random.key(3), 60, {varies: 1.0})
  found = choose_modules(learner, state, new, repeats=0)
  assert found.modules == (varies,)
  assert found.curve[1].loss < found.curve[0].loss - 3 * found.curve[0].error


def test_without_spread_between_tasks_no_module_is_chosen():
  learner, state = make(init_sigma=1.0)
  found = choose_modules(learner, state, draw(jax.random.key(4), 60, {}), repeats=0)
  assert found.modules == ()
  assert "no module (0 of 6 parameters)" in str(found)


def test_one_program_serves_all_sets():
  learner, state = make(init_sigma=0.5)
  params = MetaParams(state.phi, state.log_sigma2)
  shared = Shared(params, None, None)
  run = SetLosses(learner, NAMES, shared, draw(jax.random.key(5), 3, {}))
  for size in range(4):
    for chosen in itertools.combinations(NAMES, size):
      run(chosen)
      run(chosen)
  assert len(run.losses) == 8
  assert getattr(run._program, "_cache_size")() == 1  # noqa: B009


def test_the_number_of_traces_does_not_grow_with_the_modules():
  def count(modules):
    calls = []

    def predict(theta, x):
      calls.append(1)
      return jnp.stack([theta[f"m{i}"] * x for i in range(modules)]).sum(0)

    params = {f"m{i}": jnp.zeros(()) for i in range(modules)}
    inner = sm.Inner(optax.sgd(0.1), steps=2)
    learner = sm.sigma_maml(sm.gaussian(predict), sm.by_leaf(params), inner=inner)
    x = jnp.ones((3, 4))
    tasks = sm.Task(sm.Batch(x, x), sm.Batch(x, x))
    found = choose_modules(learner, learner.init(params), tasks, repeats=0)
    assert len(found.curve) == modules + 1
    return len(calls)

  assert count(2) == count(6) > 0


def test_a_second_choice_compiles_nothing():
  calls = []

  def predict(theta, x):
    calls.append(1)
    return theta["a"] + theta["b"] * x

  def counted(run):
    before = len(calls)
    run()
    return len(calls) - before

  params, likelihood = {"a": jnp.zeros(()), "b": jnp.ones(())}, sm.gaussian(predict)
  learner = sm.sigma_maml(likelihood, sm.by_leaf(params), inner=sm.Inner(optax.sgd(0.1), steps=2))
  state, x = learner.init(params), jnp.ones((3, 4))
  tasks = sm.Task(sm.Batch(x, x), sm.Batch(x, x))
  checks = counted(lambda: check_targets(likelihood, "tasks", tasks, params))
  choose = lambda: choose_modules(learner, state, tasks, repeats=0)
  assert counted(choose) > checks == counted(choose)


def same_as_a_learner_built_for(chosen, algorithm, key=None, **settings):
  """The loss of a set in one program, and that of a learner whose other modules are frozen."""
  tasks = draw(jax.random.key(6), 5, {"a": 1.0, "b": 1.0})
  learner, state = make(algorithm, **settings)
  params = MetaParams(state.phi, state.log_sigma2)
  loss = SetLosses(learner, NAMES, Shared(params, key, None), tasks)(chosen)
  if algorithm in (sm.maml, sm.fomaml, sm.reptile, sm.fine_tuning):
    kept, state = make(sm.hand_picked, task_specific=chosen, inner=learner.spec.inner)
  else:
    sigma = {m: 0.4 if m in chosen else 0.0 for m in NAMES}
    kept, state = make(algorithm, **(settings | {"init_sigma": sigma}))

  @jax.jit
  def run(state):
    thetas = sm.merge(kept.adapt_tasks(state, tasks.train, key=key)[0], stacked(state.phi, 5))
    return jax.vmap(nll)(thetas, tasks.val)

  nll = lambda theta, val: -jnp.mean(kept.spec.likelihood.log_prob(linear(theta, val[0]), val[1]))
  np.testing.assert_allclose(loss, run(state), rtol=1e-4)


def stacked(tree, count):
  return jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), tree)


@pytest.mark.parametrize(
  ("algorithm", "chosen"),
  [(sm.maml, ("a",)), (sm.maml, ("b", "c")), (sm.reptile, ("b",)), (sm.fine_tuning, ("a", "c"))],
)
def test_a_set_without_a_prior_is_hand_picked(algorithm, chosen):
  same_as_a_learner_built_for(chosen, algorithm, inner=sm.Inner(optax.adam(0.05), steps=7))


@pytest.mark.parametrize(
  "algorithm", [sm.sigma_imaml, sm.imaml, sm.sigma_maml, sm.meta_sgd, sm.empirical_bayes]
)
def test_a_set_is_a_learner_with_the_others_frozen(algorithm):
  same_as_a_learner_built_for(("a", "c"), algorithm, init_sigma=0.4)


@pytest.mark.parametrize(
  "settings",
  [
    {"batching": 2, "inner": DESCENT},
    {"batching": "sequential", "inner": DESCENT},
    {"inner": sm.Inner(optax.adam(0.1), steps=20, batch_size=2), "key": jax.random.key(7)},
  ],
  ids=["blocks", "sequential", "batch_size"],
)
def test_tasks_run_as_the_learner_runs_them(settings):
  same_as_a_learner_built_for(("b",), sm.sigma_imaml, init_sigma=0.4, **settings)


def test_nothing_moves_in_the_empty_set_with_any_optimiser():
  # L-BFGS without a tolerance goes on from a gradient of exactly 0.
  learner, state = make(init_sigma=0.4, inner=sm.Inner(sm.lbfgs(), steps=5))
  tasks = draw(jax.random.key(8), 3, {})
  found = choose_modules(learner, state, tasks, repeats=0, tolerance=1e9)
  np.testing.assert_allclose(found.curve[0].loss, exact_losses(tasks, {}, ()).mean(), rtol=1e-5)
  assert found.modules == () and found.num_failed == 0


def test_modules_that_the_learner_holds_stay_held():
  tasks = draw(jax.random.key(9), 20, {"a": 1.0, "b": 1.0})
  learner, state = make(init_sigma={"a": 0.0, "b": 1.0, "c": 0.2})
  found = choose_modules(learner, state, tasks, repeats=0)
  assert {m for p in found.curve for m in p.modules} == {"b", "c"}
  held = found.table[0]
  assert (held.sigma, held.moved, held.only) == (0.0, 0.0, found.curve[0].loss)
  assert (held.without, held.only_error, held.without_error) == (found.curve[-1].loss, 0.0, 0.0)


def test_tolerance_is_in_nats():
  tasks = draw(jax.random.key(10), 30, {"a": 0.3, "b": 2.0})
  learner, state = make(init_sigma={"a": 0.3, "b": 2.0, "c": 0.05})
  curve = choose_modules(learner, state, tasks, repeats=0, tolerance=0.0).curve
  losses = [p.loss for p in curve]
  tolerance = losses[1] - min(losses) + 1e-6
  found = choose_modules(learner, state, tasks, repeats=0, tolerance=tolerance)
  first = next(i for i, loss in enumerate(losses) if loss - min(losses) <= tolerance)
  assert found.modules == curve[first].modules
  assert 0 < first < int(np.argmin(losses))  # neither that of no tolerance nor the empty set


def logarithm(theta, x):
  """Not a number where x is negative, or where b has moved above 2."""
  return jnp.where(theta["b"] > 2.0, jnp.nan, jnp.log(x) * theta["a"] + theta["b"])


def log_tasks(x_bad, level_bad):
  """Four tasks; x of the first and the level of the second are given."""
  level = jnp.array([0.5, level_bad, 0.3, -0.4])[:, None]
  x = jnp.tile(jnp.linspace(1.0, 3.0, 5), (4, 1)).at[0, 2].set(x_bad)
  y = jnp.nan_to_num(jnp.log(x)) + level + 0.1 * jnp.cos(7 * jnp.arange(20.0).reshape(4, 5))
  return sm.Task(sm.Batch(jnp.abs(x), y), sm.Batch(x, y))


def test_a_failed_task_is_left_out_of_all_pairs():
  """The first fails with every set, the second with those that hold b."""
  params = {"a": jnp.ones(()), "b": jnp.zeros(())}
  learner = sm.sigma_imaml(
    sm.gaussian(logarithm), sm.by_leaf(params), init_sigma=1.0, inner=DESCENT
  )
  state, tasks = learner.init(params), log_tasks(-1.0, 9.0)
  found = choose_modules(learner, state, tasks, repeats=0)
  assert (found.num_sound, found.num_failed) == (2, 2)
  rest = jax.tree.map(lambda x: x[2:], tasks)
  alone = choose_modules(learner, state, rest, repeats=0)
  assert found.modules == alone.modules
  for one, other in zip((*found.table, *found.curve), (*alone.table, *alone.curve), strict=True):
    numbers = lambda t: [v for v in t if isinstance(v, float)]
    np.testing.assert_allclose(numbers(one), numbers(other), rtol=1e-4, atol=1e-6)
  assert "2 failed tasks left out" in str(found)


def test_a_task_that_fails_at_phi_alone_is_left_out_of_all_pairs():
  """At phi, theta is 0 and 1 - theta is not: the first task's large input overflows there only."""
  level = jnp.array([0.0, 0.9, 1.1, 0.8, 1.2])[:, None]
  x = jnp.tile(jnp.linspace(-1.0, 1.0, 6), (5, 1))
  far = x.at[0, 0].set(1e25)
  params = {"a": jnp.zeros(()), "b": jnp.zeros(())}
  learner = sm.sigma_imaml(
    sm.gaussian(lambda theta, x: x * (1.0 - theta["a"] - 0.9 * theta["b"])),
    sm.by_leaf(params),
    init_sigma=1e3,
    inner=sm.Inner(steps=20),
  )
  tasks = sm.Task(sm.Batch(x, level * x), sm.Batch(far, level * x))
  state = learner.init(params)
  found = choose_modules(learner, state, tasks, repeats=0)
  alone = choose_modules(learner, state, jax.tree.map(lambda x: x[1:], tasks), repeats=0)
  assert (found.num_sound, found.num_failed) == (4, 1) and found.modules == alone.modules
  for one, other in zip((*found.table, *found.curve), (*alone.table, *alone.curve), strict=True):
    numbers = lambda t: [v for v in t if isinstance(v, float)]
    np.testing.assert_allclose(numbers(one), numbers(other), rtol=1e-3, atol=1e-5)


def test_a_task_with_an_infinite_training_loss_at_phi_is_left_out():
  """Its gradient is 0, so its loop takes no step."""

  def log_prob(output, target):
    return jnp.where(target > 99.0, -jnp.inf, -0.5 * (output - target) ** 2)

  tasks = draw(jax.random.key(0), 4, {"a": 1.0})
  spoilt = tasks.train.targets.at[1].set(100.0)
  tasks = tasks._replace(train=tasks.train._replace(targets=spoilt))
  learner = sm.sigma_imaml(sm.Likelihood(linear, log_prob), LABELS, inner=DESCENT)
  state = learner.init(PARAMS)
  _, metrics = jax.jit(learner.update)(state, tasks)
  assert metrics.failed.tolist() == [False, True, False, False]
  assert int(metrics.inner.steps[1]) == 0
  found = choose_modules(learner, state, tasks, tolerance=0.01)
  assert (found.num_sound, found.num_failed) == (3, 1)


def test_tasks_that_all_fail_are_an_error():
  params = {"a": jnp.ones(()), "b": jnp.full((), 3.0)}
  learner = sm.sigma_imaml(sm.gaussian(logarithm), sm.by_leaf(params), inner=DESCENT)
  with pytest.raises(ValueError, match="Every task fails .* 4 of 4 tasks fail"):
    choose_modules(learner, learner.init(params), log_tasks(1.5, 0.1), repeats=0)


def test_seconds_are_measured_for_every_set():
  learner, state = make(sm.sigma_maml, inner=sm.Inner(optax.sgd(0.1), steps=2))
  found = choose_modules(learner, state, draw(jax.random.key(11), 3, {}), repeats=2)
  assert found.curve[0].seconds == 0.0
  assert all(0 < p.seconds < 60 for p in found.curve[1:])
  assert "seconds/task" in str(found)


def test_ties_go_to_the_module_with_fewer_parameters():
  path = greedy(lambda chosen: 1.0, NAMES, SIZES)
  assert path == ((), ("b",), ("b", "a"), ("b", "a", "c"))


def test_the_paired_error_and_the_smallest_set_by_hand():
  # Differences 1, 2, 6: mean 3, squares 4 + 1 + 9 = 14, variance 7.
  error = paired_error(np.array([2.0, 4.0, 9.0]), np.array([1.0, 2.0, 3.0]))
  assert error == pytest.approx(np.sqrt(7 / 3))
  assert np.isnan(paired_error(np.ones(1), np.zeros(1)))
  assert smallest_good([3.0, 1.2, 1.0, 1.1], [0.5, 0.1, 0.0, 0.2], None) == 2
  assert smallest_good([3.0, 1.2, 1.0, 1.1], [0.5, 0.3, 0.0, 0.2], None) == 1
  assert smallest_good([3.0, 1.2, 1.0, 1.1], [0.5, 0.1, 0.0, 0.2], 2.0) == 0
  assert smallest_good([3.0, 1.0], [np.nan, np.nan], None) == 1


@functools.cache
def nine_tasks_in_b():
  learner, state = make(init_sigma=0.5)
  return choose_modules(learner, state, draw(jax.random.key(12), 9, {"b": 2.0}), repeats=0)


def test_the_text_has_a_line_for_each_module_and_each_set():
  found = nine_tasks_in_b()
  top, table, curve = str(found).split("\n\n")
  assert top.startswith("Task-specific: b (1 of 6 parameters).")
  assert [line.split()[0] for line in table.splitlines()] == ["module", *NAMES]
  assert [line.split()[0] for line in curve.splitlines()] == ["task-specific", "none", *"+++"]
  starred = [line for line in curve.splitlines() if "*" in line]
  assert len(starred) == 1 and starred[0].startswith("+ b")
  assert "seconds" not in curve


TASKS = draw(jax.random.key(13), 3, {})
ONE = jax.tree.map(lambda x: x[:1], TASKS)


@pytest.mark.parametrize(
  "change,kind,words",
  [
    ({"learner": "sigma_imaml"}, TypeError, "learner must be a learner"),
    ({"state": PARAMS}, TypeError, "state must be a MetaState"),
    ({"tasks": TASKS.train}, TypeError, "tasks must be a shrinkmeta.Task"),
    ({"tasks": TASKS._replace(val=None)}, ValueError, "tasks.val is None. choose_modules"),
    ({"tolerance": "small"}, TypeError, "tolerance must be a number; got 'small'"),
    ({"tolerance": -0.1}, ValueError, "tolerance must not be negative"),
    ({"tolerance": float("nan")}, ValueError, "tolerance must not be negative"),
    ({"repeats": 1.5}, TypeError, "repeats must be an integer"),
    ({"repeats": -1}, ValueError, "repeats must be at least 0"),
    ({"tasks": ONE}, ValueError, "One task without a failure gives no standard error"),
  ],
  ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_named(change, kind, words):
  learner, state = make()
  arguments = {"learner": learner, "state": state, "tasks": TASKS} | change
  with pytest.raises(kind, match=words):
    choose_modules(**arguments)


def test_one_task_and_a_tolerance_are_enough():
  learner, state = make()
  found = choose_modules(learner, state, ONE, tolerance=1e6, repeats=0)
  assert found.modules == () and np.isnan(found.curve[0].error)
  assert " - " in str(found)


def test_a_learner_in_which_nothing_moves_is_refused():
  learner, state = make(sm.no_adaptation)
  with pytest.raises(ValueError, match="Every module of this learner is frozen"):
    choose_modules(learner, state, TASKS)


def test_it_does_not_run_under_jit():
  learner, state = make()
  with pytest.raises(TypeError, match="outside jit"):
    jax.jit(lambda state: choose_modules(learner, state, TASKS).curve[0].loss)(state)


def test_mini_batches_need_a_key():
  learner, state = make(inner=sm.Inner(optax.sgd(0.1), steps=2, batch_size=2))
  with pytest.raises(ValueError, match="key"):
    choose_modules(learner, state, TASKS)


def test_a_key_gives_the_draws_of_evaluate():
  learner, state = make(sm.maml, inner=sm.Inner(optax.sgd(0.05), steps=3, batch_size=2))
  tasks = draw(jax.random.key(3), 4, {"a": 1.0})
  for impl in ("threefry2x32", "rbg"):
    key = jax.random.key(1, impl=impl)
    found = choose_modules(learner, state, tasks, tolerance=0.0, key=key, repeats=0)
    whole = next(point.loss for point in found.curve if len(point.modules) == 3)
    want = sm.evaluate(learner, state, tasks, key=key).val_nll.mean()
    np.testing.assert_allclose(whole, want, rtol=1e-5)
  with pytest.raises(TypeError, match="key must be"):
    choose_modules(learner, state, tasks, tolerance=0.0, key=0, repeats=0)


def test_two_tasks_of_which_one_fails():
  learner, state = make()
  tasks = draw(jax.random.key(3), 2, {"a": 1.0})
  far = jnp.array([1.0, 1e30])[:, None]
  tasks = tasks._replace(val=tasks.val._replace(targets=tasks.val.targets * far))
  with pytest.raises(ValueError, match="One task without a failure gives no standard error"):
    choose_modules(learner, state, tasks, tolerance=None, repeats=0)
