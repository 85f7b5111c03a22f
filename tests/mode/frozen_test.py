"""Frozen modules are cut off before tasks run; the numbers are the same, with less work."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shrinkmeta as sm
from shrinkmeta.mode import frozen as partition

pytestmark = pytest.mark.usefixtures("x64")

T, N = 4, 5
LABELS = {"a": {"w": "a", "b": "a"}, "b": {"w": "b"}, "c": {"w": "c", "b": "c"}}
SIGMA = {"a": 0.0, "b": 0.7, "c": 0.0}  # the middle moves: something before it, something after
EVERYWHERE = {"a": 0.5, "b": 0.7, "c": 0.9}


def predict(theta, x):
  h = jnp.tanh(x @ theta["a"]["w"] + theta["a"]["b"])
  h = jnp.sin(h @ theta["b"]["w"])
  return h @ theta["c"]["w"] + theta["c"]["b"]


GAUSSIAN = sm.gaussian(predict, 0.5)


def problem():
  rng = np.random.default_rng(0)
  array = lambda *shape: jnp.asarray(rng.normal(size=shape))
  params = {
    "a": {"w": array(3, 6), "b": array(6)},
    "b": {"w": array(6, 4)},
    "c": {"w": array(4, 2), "b": array(2)},
  }
  rows = [[1.0] * N, [1.0, 0.0] * 2 + [1.0], [1.0] * 2 + [0.0] * 3, [1.0] * 4 + [0.0]]
  mask = jnp.asarray(rows)
  batch = lambda: sm.Batch(array(T, N, 3), array(T, N, 2), mask)
  return params, sm.Task(batch(), batch())


def cut_and_whole(make, **keywords):
  """A learner that cuts a and c off, and one that does not know, with equal states."""
  params, tasks = problem()
  cut = make(GAUSSIAN, LABELS, init_sigma=SIGMA, **keywords)
  whole = make(GAUSSIAN, LABELS, init_sigma=EVERYWHERE, **keywords)
  state = cut.init(params)
  return cut, whole, state, tasks


SGD = sm.Inner(optax.sgd(0.1), 4)
TOL = sm.Inner(optax.sgd(0.1), 50, tol=1e-3)
MINI = sm.Inner(optax.sgd(0.1), 4, batch_size=3)
IMPLICITS = (
  sm.Implicit(tol=1e-12),
  sm.Implicit(tol=1e-12, curvature="hessian"),
  sm.Implicit(solver="dual"),
  sm.Implicit(solver="identity"),
)
close = functools.partial(chex.assert_trees_all_close, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
  "make, keywords",
  [
    *[(sm.sigma_imaml, {"implicit": implicit}) for implicit in IMPLICITS],
    (sm.sigma_imaml, {"inner": TOL, "batching": 2, "implicit": IMPLICITS[0]}),
    (sm.sigma_imaml, {"inner": MINI, "batching": 2, "implicit": IMPLICITS[0]}),
    (sm.sigma_reptile, {"inner": MINI, "batching": 2, "implicit": IMPLICITS[0]}),
    (sm.sigma_maml, {}),
  ],
)
def test_the_cut_learner_has_the_same_gradient(make, keywords):
  cut, whole, state, tasks = cut_and_whole(make, **({"inner": SGD} | keywords))
  key = jax.random.key(0)
  run = lambda state: [learner.meta_gradient(state, tasks, key) for learner in (cut, whole)]
  (grad, metrics), (want, want_metrics) = jax.jit(run)(state)
  # Rows of frozen modules are the exact Hessian's in the cut learner (tests/gradients/
  # frozen_modules_test.py); in the whole one, which does not know them, they are the solve's.
  implicit = keywords.get("implicit", IMPLICITS[1])
  if make is sm.sigma_imaml and implicit.curvature == "gauss_newton":
    moves = {m for m, value in state.log_sigma2.items() if np.isfinite(value)}
    assert moves and moves < set(grad.phi)
    part = lambda g: g._replace(phi={m: g.phi[m] for m in moves})
    close(part(grad), part(want))
  else:
    close(grad, want)
  close(metrics.val_nll, want_metrics.val_nll)
  close(metrics.inner, want_metrics.inner)
  assert all(np.max(np.abs(g)) > 1e-6 for g in jax.tree.leaves(grad.phi))  # phi of all is learnt


def test_gradient_of_a_sum_over_vmapped_tasks_counts_what_is_held_once():
  cut, _, state, tasks = cut_and_whole(sm.sigma_imaml, inner=SGD)

  def loss(phi, task):
    theta, _ = cut.adapt(state._replace(phi=phi), task.train)
    return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(theta))

  def total(phi):
    return jnp.sum(jax.vmap(loss, (None, 0))(phi, tasks))

  each = jax.vmap(jax.grad(loss), (None, 0))
  got, each = jax.jit(lambda phi: (jax.grad(total)(phi), each(phi, tasks)))(state.phi)
  close(got, jax.tree.map(lambda x: jnp.sum(x, 0), each))


@pytest.mark.parametrize("inner, batching", ((TOL, "vmap"), (TOL, 2), (MINI, "sequential")))
def test_the_cut_learner_adapts_the_same(inner, batching):
  cut, whole, state, tasks = cut_and_whole(sm.sigma_imaml, inner=inner, batching=batching)
  key, one = jax.random.key(0), jax.tree.map(lambda x: x[0], tasks.train)
  run = lambda state: [
    (
      learner.adapt(state, one, None, key),
      learner.adapt(state, one, (0, 2, 5), key),
      learner.adapt_tasks(state, tasks.train, key=key),
    )
    for learner in (cut, whole)
  ]
  (*adapted, (thetas, info)), (*wanted, (expected, expected_info)) = jax.jit(run)(state)
  close(adapted, wanted)
  assert thetas["a"] == {"w": None, "b": None} and thetas["b"]["w"].shape == (T, 6, 4)
  close(thetas["b"], expected["b"])
  close(info, expected_info)
  second = lambda tree: jax.tree.map(lambda x: x[1], tree)
  close(sm.merge(second(thetas), state.phi), second(expected))


def test_masks_are_frozen_too():
  params, tasks = problem()
  learner = sm.hand_picked(GAUSSIAN, LABELS, task_specific=("b",), inner=SGD)
  state = learner.init(params)

  def loss(phi):  # every step written out
    def of_task(one):
      mean = lambda theta, batch: -sm.log_likelihood(GAUSSIAN, theta, batch) / batch.mask.sum()
      theta = phi
      for _ in range(SGD.steps):
        grad = jax.grad(mean)(theta, one.train)
        theta = theta | {"b": {"w": theta["b"]["w"] - 0.1 * grad["b"]["w"]}}
      return mean(theta, one.val)

    return jnp.mean(jax.vmap(of_task)(tasks))

  run = lambda state: (learner.meta_gradient(state, tasks)[0].phi, jax.grad(loss)(state.phi))
  close(*jax.jit(run)(state))
  thawed = state._replace(log_sigma2=dict.fromkeys(SIGMA, jnp.inf))
  assert int(jax.jit(learner.update)(thawed, tasks)[1].num_failed) == T
  shrunk = state._replace(log_sigma2=state.log_sigma2 | {"b": 0.0})
  with pytest.raises(ValueError, match="'b' is adapted without a prior here, but its sigma is 1"):
    learner.update(shrunk, tasks)


def test_outside_jit_the_state_tells_what_is_frozen():
  """The same learner, once with the state as an argument of jit, once with it known."""
  _, whole, state, tasks = cut_and_whole(sm.sigma_imaml, inner=SGD)
  one = jax.tree.map(lambda x: x[0], tasks.train)
  program = lambda f, *args: str(jax.make_jaxpr(f)(*args))
  unknown = program(lambda state, batch: whole.adapt(state, batch)[0], state, one)
  known = program(lambda batch: whole.adapt(state, batch)[0], one)
  assert known.count("dot_general") < unknown.count("dot_general")
  chex.assert_trees_all_close(
    whole.adapt(state, one)[0], jax.jit(whole.adapt)(state, one)[0], rtol=1e-9
  )


def flops(jit, f, *args):
  return jit(f).lower(*args).compile().cost_analysis()["flops"]


def test_a_step_costs_what_moves(optimising_jit):
  """XLA counts a loop's body once: features once, and the step of the small head."""
  width = 64
  labels = {name: name for name in ("body", "head")}
  net = sm.gaussian(lambda p, x: jnp.tanh(jnp.tanh(x @ p["body"]) @ p["body"]) @ p["head"])
  params = {"body": jnp.ones((width, width)), "head": jnp.ones((width, 1))}
  batch = sm.Batch(jnp.ones((8, width)), jnp.ones((8, 1)))
  inner = sm.Inner(optax.sgd(0.1), 10)
  cut = sm.sigma_imaml(net, labels, inner=inner, init_sigma={"body": 0.0, "head": 1.0})
  whole = sm.sigma_imaml(net, labels, inner=inner)
  state = cut.init(params)
  run = lambda learner: lambda state, batch: learner.adapt(state, batch)[0]
  forward = 2 * 8 * width * (2 * width + 1)
  assert flops(optimising_jit, run(cut), state, batch) < 1.2 * forward
  assert flops(optimising_jit, run(whole), state, batch) > 2.5 * forward


def test_optimiser_state_is_of_the_moving_modules():
  cut, _, state, tasks = cut_and_whole(sm.sigma_imaml, inner=SGD)
  sizes = []

  def spy(updates, opt_state, params=None):
    sizes.append(sum(x.size for x in jax.tree.leaves(updates)))
    return updates, opt_state

  inner = sm.Inner(optax.GradientTransformation(lambda _: (), spy), 2)
  cut = sm.sigma_imaml(GAUSSIAN, LABELS, init_sigma=SIGMA, inner=inner)
  cut.adapt(state, jax.tree.map(lambda x: x[0], tasks.train))
  assert set(sizes) == {24}  # b alone


def test_a_state_that_thaws_a_frozen_module_is_an_error_or_fails_the_tasks():
  cut, whole, state, tasks = cut_and_whole(sm.sigma_imaml, inner=SGD)
  warm = state._replace(log_sigma2={m: jnp.zeros([]) for m in SIGMA})
  with pytest.raises(
    ValueError, match="'a' is kept at phi here, but its sigma is 1. .*another learner"
  ):
    cut.update(warm, tasks)
  new, metrics = jax.jit(cut.update)(warm, tasks)
  assert int(metrics.num_failed) == T
  chex.assert_trees_all_equal(new.phi, warm.phi)
  assert int(jax.jit(whole.update)(warm, tasks)[1].num_failed) == 0


def test_with_everything_frozen_nothing_is_cut():
  assert partition.frozen_modules({"a": -jnp.inf, "b": -np.inf}) == frozenset()
  assert partition.frozen_modules({"a": -jnp.inf, "b": 0.0}) == {"a"}
  params, tasks = problem()
  learner = sm.sigma_imaml(GAUSSIAN, LABELS, init_sigma=0.0, inner=SGD)
  theta, _ = jax.jit(learner.adapt)(learner.init(params), jax.tree.map(lambda x: x[0], tasks.train))
  chex.assert_trees_all_equal(theta, params)


def test_map_estimate_with_frozen_modules():
  """Its derivative, phi of the frozen ones included, against the one without the cut."""
  params, tasks = problem()
  one = jax.tree.map(lambda x: x[0], tasks.train)
  sigma2 = {"a": -jnp.inf, "b": jnp.log(0.5), "c": -jnp.inf}

  def loss(frozen, phi, log_sigma2, batch):
    theta, _ = sm.map_estimate(
      GAUSSIAN, LABELS, phi, log_sigma2, batch, TOL, IMPLICITS[1], frozen=frozen
    )
    return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(theta))

  gradient = lambda frozen, *args: jax.grad(functools.partial(loss, frozen), (0, 1))(*args)
  run = lambda *args: [gradient(frozen, *args) for frozen in (("a", "c"), ())]
  close(*jax.jit(run)(params, jax.tree.map(jnp.asarray, sigma2), one))


@pytest.mark.parametrize("names", [("b", "typo"), "b", ("ab",)])
def test_frozen_names_modules_or_is_an_error(names):
  params = {"a": jnp.ones(2), "b": jnp.ones([])}
  likelihood = sm.gaussian(lambda theta, x: x @ theta["a"] + theta["b"])
  batch = sm.Batch(jnp.ones([3, 2]), jnp.ones(3))
  log_sigma2, labels = {"a": 0.0, "b": -jnp.inf}, sm.by_leaf(params)
  for call in (sm.map_estimate, sm.log_evidence):
    with pytest.raises((TypeError, ValueError), match=r"frozen (must be a tuple|has '.*no module)"):
      call(likelihood, labels, params, log_sigma2, batch, frozen=names)


def test_modules_said_to_be_frozen_whose_sigma_is_not_0_are_refused():
  """One of them or all of them; where sigma is traced the result is no number."""
  linear, labels = sm.gaussian(lambda theta, x: x * theta["w"] + theta["b"]), {"w": "w", "b": "b"}
  phi, batch = {"w": jnp.zeros([]), "b": jnp.zeros([])}, sm.Batch(jnp.ones(3), jnp.arange(3.0))
  moves = {"w": jnp.zeros([]), "b": jnp.zeros([])}
  tasks = jax.tree.map(lambda x: x[None], batch)
  calls = (
    lambda s, names: sm.map_estimate(linear, labels, phi, s, batch, frozen=names)[0]["w"],
    lambda s, names: sm.log_evidence(linear, labels, phi, s, batch, frozen=names)[0],
    lambda s, names: sm.restriction(linear, labels, phi, s, tasks, ["w"], frozen=names),
  )
  for call in calls:
    for names in (("w",), ("w", "b")):
      with pytest.raises(ValueError, match="Module '(b|w)' is kept at phi.*leave the module out"):
        call(moves, names)
      assert np.isnan(jax.jit(lambda s, call=call, names=names: call(s, names))(moves))
