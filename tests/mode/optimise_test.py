"""Every optimiser finds theta_hat of a ridge regression, whose mode has a closed form."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shrinkmeta as sm
from shrinkmeta.mode.optimise import draw, draw_at_end, posterior_mode
from shrinkmeta.model.likelihood import mean_nll
from tests.task_models import model_of

pytestmark = pytest.mark.usefixtures("x64")

LINEAR = sm.gaussian(lambda theta, x: x @ theta["w"])
N, D, SIGMA = 8, 3, 0.6


def problem(seed=0, tasks=None):
  rng = np.random.default_rng(seed)
  lead = () if tasks is None else (tasks,)
  batch = sm.Batch(
    jnp.array(rng.normal(size=(*lead, N, D))), jnp.array(rng.normal(size=(*lead, N)))
  )
  return {"w": jnp.array([0.5, -1.0, 2.0])}, batch


def eager_solve(inner, phi, batch, sigma=SIGMA, likelihood=LINEAR, **keywords):
  found = posterior_mode(inner, model_of(likelihood, phi, batch, sigma), **keywords)
  return found.z, found.info


@functools.cache
def program(inner, likelihood, steps):
  run = lambda phi, batch, sigma, key: eager_solve(
    inner, phi, batch, sigma, likelihood, key=key, steps=steps
  )
  return jax.jit(run)


def solve(inner, phi, batch, sigma=SIGMA, likelihood=LINEAR, key=None, steps=None):
  return program(inner, likelihood, steps)(phi, batch, sigma, key)


def objective(phi, batch):
  return model_of(LINEAR, phi, batch, SIGMA).objective


def mode(phi, batch, sigma=SIGMA):
  x, residual = np.asarray(batch.inputs), batch.targets - batch.inputs @ phi["w"]
  return np.linalg.solve(np.eye(D) + sigma**2 * x.T @ x, sigma * x.T @ residual)


@pytest.mark.parametrize(
  "optimizer",
  [
    optax.sgd(0.5),
    optax.sgd(optax.cosine_decay_schedule(0.8, 4000, alpha=0.3), momentum=0.5),
    optax.adam(optax.exponential_decay(0.1, 100, 0.8)),
    sm.lbfgs(),
    optax.chain(optax.sgd(0.5), optax.contrib.reduce_on_plateau(patience=50, factor=0.9)),
  ],
  ids=["sgd", "momentum, schedule", "adam, schedule", "lbfgs", "reduce_on_plateau"],
)
def test_optimisers_find_the_mode(optimizer):
  phi, batch = problem()
  z, info = solve(sm.Inner(optimizer, 2000, tol=1e-9), phi, batch)
  np.testing.assert_allclose(z["w"], mode(phi, batch), atol=1e-7)
  assert info.converged and 0 < info.steps < 2000


def test_polyak_steps_use_the_value():
  """Its step is f / |grad f|^2 and so needs `value`; f's minimum must be 0."""
  half = sm.Likelihood(LINEAR.predict, lambda f, y: -0.5 * jnp.square(y - f))
  phi, batch = problem()
  batch = batch._replace(targets=batch.inputs @ jnp.array([1.0, 2.0, 3.0]))
  inner = sm.Inner(optax.polyak_sgd(max_learning_rate=10.0), 2000, tol=1e-6)
  z, info = solve(inner, phi, batch, jnp.inf, half)
  np.testing.assert_allclose(phi["w"] + z["w"], [1.0, 2.0, 3.0], atol=1e-4)
  assert info.converged


def test_one_step_in_theta_and_in_z():
  phi, batch = problem()
  grad = jax.grad(lambda p: -sm.log_likelihood(LINEAR, p, batch))(phi)["w"] / N
  one = sm.Inner(optax.sgd(0.1), 1)
  z, _ = solve(one, phi, batch, sigma=np.inf)
  np.testing.assert_allclose(phi["w"] + z["w"], phi["w"] - 0.1 * grad, rtol=1e-12)
  z, _ = solve(one, phi, batch)
  np.testing.assert_allclose(SIGMA * z["w"], -0.1 * SIGMA**2 * grad, rtol=1e-12)


def test_duplicated_examples_change_nothing_without_a_prior():
  phi, batch = problem()
  twice = jax.tree.map(lambda x: jnp.concatenate([x, x]), batch)
  inner = sm.Inner(optax.adam(0.1), 20)
  once, again = (solve(inner, phi, b, sigma=np.inf)[0]["w"] for b in (batch, twice))
  np.testing.assert_allclose(again, once, rtol=1e-12)
  once, again = (solve(inner, phi, b)[0]["w"] for b in (batch, twice))
  assert np.abs(again - once).max() > 1e-3  # with a prior more data count for more


def test_padding_changes_nothing():
  phi, batch = problem()
  pad = lambda x: jnp.concatenate([x, jnp.full([3, *x.shape[1:]], 1e3)])
  padded = jax.tree.map(pad, batch)._replace(mask=jnp.arange(N + 3) < N)
  inner = sm.Inner(optax.sgd(0.1), 5)
  (z, info), (z_padded, info_padded) = (solve(inner, phi, b) for b in (batch, padded))
  np.testing.assert_allclose(z_padded["w"], z["w"], rtol=1e-12)
  np.testing.assert_allclose(info_padded.objective, info.objective, rtol=1e-12)


def test_stops_exactly_at_the_tolerance():
  phi, batch = problem()
  gradient = jax.jit(jax.grad(objective(phi, batch)))
  grad = lambda z: gradient(z, batch)
  norms, z = [], {"w": jnp.zeros([D])}
  while not norms or norms[-1] > 1e-3:
    norms.append(float(jnp.linalg.norm(grad(z)["w"])))
    z = {"w": z["w"] - 0.2 * grad(z)["w"]}
  want = len(norms) - 1  # steps until the norm first is at or below tol
  assert want > 5
  _, info = solve(sm.Inner(optax.sgd(0.2), 1000, tol=1e-3), phi, batch)
  assert info.steps == want and info.converged
  np.testing.assert_allclose(info.grad_norm, norms[-1], rtol=1e-9)
  _, info = solve(sm.Inner(optax.sgd(0.2), want - 2, tol=1e-3), phi, batch)
  assert info.steps == want - 2 and not info.converged
  np.testing.assert_allclose(info.grad_norm, norms[want - 2], rtol=1e-9)


def test_info_without_tolerance():
  phi, batch = problem()
  z, info = solve(sm.Inner(optax.sgd(0.2), 7), phi, batch)
  value, grad = jax.value_and_grad(objective(phi, batch))(z, batch)
  theta = {"w": phi["w"] + SIGMA * z["w"]}
  joint = sm.log_likelihood(LINEAR, theta, batch) - 0.5 * jnp.sum(z["w"] ** 2)
  np.testing.assert_allclose(info.objective, -joint / N, rtol=1e-12)
  np.testing.assert_allclose(info.objective, value, rtol=1e-12)
  np.testing.assert_allclose(info.grad_norm, jnp.linalg.norm(grad["w"]), rtol=1e-12)
  assert info.steps == 7


def test_no_steps():
  phi, batch = problem()
  for inner in (sm.Inner(optax.sgd(0.2), 0), sm.Inner(optax.sgd(0.2), 0, tol=1e-3)):
    z, info = solve(inner, phi, batch)
    assert info.steps == 0 and not z["w"].any()


@pytest.mark.parametrize(
  ("optimizer", "tol"),
  [
    (optax.sgd(optax.linear_schedule(0.3, 0.0, 20), momentum=0.9), None),
    (optax.adam(0.1), None),
    (sm.lbfgs(), None),
    (optax.sgd(0.2), 1e-2),
  ],
  ids=["schedule", "adam", "lbfgs", "tolerance"],
)
def test_a_tuple_of_steps_is_as_many_runs(optimizer, tol):
  phi, batch = problem()
  inner = sm.Inner(optimizer, 100, tol)
  zs, infos = solve(inner, phi, batch, steps=(0, 1, 4, 15))
  assert zs["w"].shape == (4, D)
  one = jax.jit(lambda steps: eager_solve(inner, phi, batch, steps=steps))
  for i, steps in enumerate((0, 1, 4, 15)):
    z, info = one(steps)
    np.testing.assert_allclose(zs["w"][i], z["w"], rtol=1e-12, atol=1e-12)
    assert infos.steps[i] == info.steps
    np.testing.assert_allclose(infos.objective[i], info.objective, rtol=1e-12)


@pytest.mark.parametrize("dtype", (None, np.int64, np.uint32, np.int16))
def test_traced_steps_do_not_recompile(dtype):
  phi, batch = problem()
  traces = []

  @jax.jit
  def run(steps):
    traces.append(steps)
    return eager_solve(sm.Inner(optax.sgd(0.1)), phi, batch, steps=steps)

  for steps in (0, 3, 9):
    z, info = run(steps if dtype is None else dtype(steps))
    want, _ = solve(sm.Inner(optax.sgd(0.1), steps), phi, batch)
    np.testing.assert_allclose(z["w"], want["w"], rtol=1e-12)
    assert info.steps == steps
  assert len(traces) == 1


@pytest.mark.parametrize("tol", [None, 1e-2])
def test_vmap_is_a_loop(tol):
  """With a tolerance tasks end at different steps; a finished one must not move on."""
  phi, batches = problem(tasks=3)
  run = lambda b: solve(sm.Inner(optax.adam(0.1), 60, tol), phi, b)
  zs, infos = jax.jit(jax.vmap(run))(batches)
  for t in range(3):
    z, info = run(jax.tree.map(lambda x, t=t: x[t], batches))
    np.testing.assert_allclose(zs["w"][t], z["w"], rtol=1e-9)
    assert infos.steps[t] == info.steps
  assert tol is None or len(set(infos.steps.tolist())) > 1


def test_remat_gives_the_same_gradient():
  phi, batch = problem()

  def loss(phi, log_sigma2, inner):
    sigma = jnp.exp(0.5 * jnp.asarray(log_sigma2))
    z, _ = solve(inner, phi, batch, sigma)
    return jnp.sum((phi["w"] + sigma * z["w"]) ** 3)

  inner = sm.Inner(optax.adam(0.1), 6)
  plain, remat = (
    jax.jit(lambda phi, s, inner=inner: jax.grad(loss, (0, 1))(phi, s, inner))(phi, -0.5)
    for inner in (inner, dataclasses.replace(inner, remat=True))
  )
  np.testing.assert_allclose(remat[0]["w"], plain[0]["w"], rtol=1e-12)
  np.testing.assert_allclose(remat[1], plain[1], rtol=1e-12)
  h = 1e-6
  difference = (loss(phi, -0.5 + h, inner) - loss(phi, -0.5 - h, inner)) / (2 * h)
  np.testing.assert_allclose(plain[1], difference, rtol=1e-6)


def test_draw():
  rows = jnp.arange(10)
  mask = jnp.array([1, 0, 1, 1, 0, 1, 1, 0, 1, 0])
  seen = set()
  for seed in range(20):
    mini = draw(jax.random.key(seed), sm.Batch(rows, rows, mask), 4)
    drawn = mini.inputs.tolist()
    assert len(set(drawn)) == 4 and all(mask[r] for r in drawn)  # no repetition, no padding
    assert mini.mask.sum() == 4
    np.testing.assert_array_equal(mini.targets, mini.inputs)
    seen |= set(drawn)
  assert seen == {0, 2, 3, 5, 6, 8}
  mini = draw(jax.random.key(0), sm.Batch(rows, rows, mask), 8)  # padding only when all are drawn
  assert mini.mask.sum() == 6 and len(set(mini.inputs.tolist())) == 8


def test_mini_batches():
  phi, batch = problem()
  inner = sm.Inner(optax.sgd(0.1), 4, batch_size=3)
  run = lambda seed, **kw: solve(inner, phi, batch, key=jax.random.key(seed), **kw)[0]["w"]
  np.testing.assert_array_equal(run(0), run(0))
  assert np.abs(run(0) - run(1)).max() > 1e-4
  # Steps draw afresh: with one draw for all, the gradients would be those of three fixed rows.
  starts = jnp.stack([run(0, steps=s) for s in (1, 2)])
  redrawn = [draw(jax.random.fold_in(jax.random.key(0), s), batch, 3) for s in (0, 1)]
  assert set(redrawn[0].targets.tolist()) != set(redrawn[1].targets.tolist())
  loss = objective(phi, batch)
  z = jnp.zeros([D])
  for start, mini in zip(starts, redrawn, strict=True):
    z = z - 0.1 * jax.grad(loss)({"w": z}, mini)["w"]
    np.testing.assert_allclose(start, z, rtol=1e-12)
  # All rows in a mini-batch are the full batch.
  whole = solve(dataclasses.replace(inner, batch_size=N), phi, batch, key=jax.random.key(0))[0]
  full = solve(sm.Inner(optax.sgd(0.1), 4), phi, batch)[0]
  np.testing.assert_allclose(whole["w"], full["w"], rtol=1e-12)


def test_batches_at_the_end_hold_every_example_once():
  rows = jnp.arange(10)
  batch = sm.Batch(rows, rows, jnp.array([1, 0, 1, 1, 0, 1, 1, 0, 1, 0.5]))
  orders = set()
  for seed in range(5):
    batches = draw_at_end(jax.random.key(seed), batch, 3)
    assert batches.inputs.shape == (4, 3)
    total = np.zeros(10)
    np.add.at(total, batches.inputs.ravel(), batches.mask.ravel())
    np.testing.assert_array_equal(total, batch.mask)
    assert len(set(batches.inputs[-1].tolist())) == 3  # filled up with others, and no one twice
    assert set(batches.inputs[:2].ravel().tolist()) == {0, 2, 3, 5, 6, 8, 9} - set(
      batches.inputs[2].tolist()
    )  # padding comes last
    orders.add(tuple(batches.inputs[:2].ravel().tolist()))
  assert len(orders) == 5


@pytest.mark.parametrize("weight", (1.0, 0.3))  # 0.3: the examples of a batch weigh less than one
@pytest.mark.parametrize("size", (3, 4, N))
def test_the_report_of_mini_batches_is_of_all_examples(size, weight):
  phi, batch = problem()
  batch = batch._replace(mask=weight * jnp.array([1, 0, 1, 1, 1, 0, 1, 1.0]))
  inner, key = sm.Inner(optax.sgd(0.1), 4, batch_size=size), jax.random.key(0)
  z, info = solve(inner, phi, batch, key=key)
  value, grad = jax.jit(jax.value_and_grad(objective(phi, batch)))(z, batch)
  np.testing.assert_allclose(info.objective, value, rtol=1e-12)
  np.testing.assert_allclose(info.grad_norm, optax.tree.norm(grad), rtol=1e-12)


def test_the_report_sees_the_statistics_that_steps_see():
  """Outputs that depend on the mean of their batch: the report is of batches, not of the whole."""
  centred = sm.gaussian(lambda theta, x: (x - x.mean(0)) @ theta["w"])
  phi, batch = problem()
  inner, key = sm.Inner(optax.sgd(0.1), 0, batch_size=4), jax.random.key(2)
  _, info = solve(inner, phi, batch, likelihood=centred, key=key)
  order = draw_at_end(key, batch, 4)
  of = lambda theta: jnp.mean(jax.vmap(lambda mini: mean_nll(centred, theta, mini))(order))
  np.testing.assert_allclose(info.objective, of(phi), rtol=1e-12)
  grad = SIGMA * jax.grad(of)(phi)["w"]
  np.testing.assert_allclose(info.grad_norm, jnp.linalg.norm(grad), rtol=1e-12)
  assert abs(mean_nll(centred, phi, batch) - of(phi)) > 1e-2


def test_mini_batch_gradients_are_unbiased():
  """The mean over draws of the estimated objective is the objective."""
  phi, batch = problem()
  loss, z = objective(phi, batch), {"w": jnp.ones([D])}
  keys = jax.random.split(jax.random.key(0), 4000)
  estimates = jax.vmap(lambda k: loss(z, draw(k, batch, 3)))(keys)
  error = estimates.std() / len(keys) ** 0.5
  assert abs(estimates.mean() - loss(z, batch)) < 4 * error


def test_mini_batches_with_weights_are_unbiased():
  """The means over draws of J / N and of its gradient are those of all examples."""
  phi, batch = problem()
  batch = batch._replace(mask=jnp.asarray(np.random.default_rng(1).uniform(0.05, 3.0, N)))
  model, z = model_of(LINEAR, phi, batch, SIGMA), {"w": jnp.ones([D])}

  def estimate(k):
    mini = draw(k, batch, 3)
    value, grad = model.value_and_grad(z, mini)
    return jnp.concatenate([jnp.stack([value, model.objective(z, mini)]), grad["w"]])

  estimates = jax.vmap(estimate)(jax.random.split(jax.random.key(0), 4000))
  value, grad = model.value_and_grad(z, batch)
  exact = np.array([value, value, *grad["w"]])
  error = np.std(estimates, 0) / len(estimates) ** 0.5
  assert np.all(np.abs(np.mean(estimates, 0) - exact) < 4 * error)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: sm.Inner(steps=-1), r"Inner.steps must be at least 0; got -1"),
    (lambda: sm.Inner(tol=0.0), r"Inner.tol must be positive, or None"),
    (lambda: sm.Inner(tol=float("nan")), r"Inner.tol must be positive"),
    (lambda: sm.Inner(batch_size=0), r"Inner.batch_size must be at least 1; got 0"),
  ],
)
def test_a_wrong_inner(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_wrong_calls():
  phi, batch = problem()
  with pytest.raises(ValueError, match=r"pass key=jax.random.key"):
    eager_solve(sm.Inner(batch_size=2), phi, batch)
  with pytest.raises(ValueError, match=r"batch_size is 9, but the task has 8 rows"):
    eager_solve(sm.Inner(batch_size=9), phi, batch, key=jax.random.key(0))
  with pytest.raises(ValueError, match=r"steps must be at least 0; got -2"):
    eager_solve(sm.Inner(), phi, batch, steps=-2)
  for steps in ((), (3, 2), (1, 1)):
    with pytest.raises(ValueError, match=r"increasing integers"):
      eager_solve(sm.Inner(), phi, batch, steps=steps)
  for steps in ((-1, 2), (1, 2.5), [1, 2], "5", 2.5, jnp.ones(2, jnp.int32)):
    with pytest.raises((TypeError, ValueError), match=r"steps.* (must be|are) .*; got"):
      eager_solve(sm.Inner(), phi, batch, steps=steps)


@pytest.mark.parametrize(
  ("keywords", "message"),
  [
    ({"curvature": "fisher"}, r'"gauss_newton" or "hessian"; got \'fisher\''),
    ({"solver": "gmres"}, r"solver must be .*got 'gmres'"),
    ({"solver": "dual", "curvature": "hessian"}, r'use curvature="gauss_newton"'),
    ({"max_steps": 0}, r"max_steps must be at least 1; got 0"),
    ({"tol": -1.0}, r"tol must not be negative"),
    ({"damping": float("nan")}, r"damping must not be negative"),
  ],
)
def test_a_wrong_implicit(keywords, message):
  with pytest.raises(ValueError, match=message):
    sm.Implicit(**keywords)


def test_steps_that_are_numpy_integers_under_x64():
  linear = sm.gaussian(lambda theta, x: x * theta["w"])
  phi, batch = {"w": jnp.zeros([])}, sm.Batch(jnp.ones(3), jnp.arange(3.0))
  learner = sm.maml(linear, {"w": "w"}, inner=sm.Inner(optax.sgd(0.1), 3))
  state = learner.init(phi)
  chex.assert_trees_all_equal(
    learner.adapt(state, batch, np.int64(5)), learner.adapt(state, batch, 5)
  )
  with pytest.raises(ValueError, match="must be at least 0; got -1"):
    learner.adapt(state, batch, np.int32(-1))


def test_weights_below_one_in_all_weigh_as_they_say():
  """Examples alike, each of weight 0.1: a mini-batch has the mode of all."""
  x, y = jnp.ones([4, 1]), jnp.full([4], 2.0)
  batch = sm.Batch(x, y, jnp.full([4], 0.1))
  linear = sm.gaussian(lambda theta, x: x[:, 0] * theta["w"])
  np.testing.assert_allclose(
    mean_nll(linear, {"w": jnp.zeros([])}, batch), 0.5 * 4.0 + 0.5 * np.log(2 * np.pi), rtol=1e-6
  )
  for size in (None, 1):
    inner = sm.Inner(optax.sgd(0.2), steps=100, batch_size=size)
    theta, _ = sm.map_estimate(
      linear, {"w": "w"}, {"w": 0.0}, {"w": 0.0}, batch, inner, key=jax.random.key(0)
    )
    np.testing.assert_allclose(theta["w"], 0.4 * 2.0 / (0.4 + 1.0), rtol=1e-5)


def test_the_gradient_of_one_batch_stops_nothing():
  """phi fits the first example to the last bit; a loop that drew it first would end there."""
  x, y = jnp.ones([4, 1]), jnp.array([0.0, 5.0, 5.0, 5.0])
  batch = sm.Batch(x, y)
  linear = sm.gaussian(lambda theta, x: x[:, 0] * theta["w"])
  inner = sm.Inner(optax.sgd(0.1), steps=30, tol=1e-4, batch_size=1)
  run = jax.jit(
    lambda key: sm.map_estimate(linear, {"w": "w"}, {"w": 0.0}, {"w": 0.0}, batch, inner, key=key)
  )
  for seed in range(8):
    theta, info = run(jax.random.key(seed))
    assert info.steps == 30 and theta["w"] > 1.0 and not info.converged


def test_the_report_has_a_forward_derivative_with_and_without_a_tolerance():
  phi, batch = problem()

  def objective(scale, tol, info_at_end):
    model = model_of(LINEAR, jax.tree.map(lambda x: scale * x, phi), batch, SIGMA)
    mode = posterior_mode(sm.Inner(optax.sgd(0.1), 3, tol), model, info_at_end=info_at_end)
    return mode.info.objective

  want = jax.jacfwd(objective)(1.0, None, True)
  assert abs(float(want)) > 0.01
  for info_at_end in (True, False):
    np.testing.assert_allclose(jax.jacfwd(objective)(1.0, 1e-9, info_at_end), want, rtol=1e-9)


def test_lbfgs_evaluates_only_the_points_of_its_line_search():
  """The first point, and each point of a search: with an exact fit every search takes its first."""
  seen = []

  def predict(theta, x):
    jax.debug.callback(lambda: seen.append(1))
    return x @ theta["w"]

  phi, batch = problem()
  model = model_of(sm.gaussian(predict), phi, batch, SIGMA)
  for inner in (sm.Inner(sm.lbfgs(), 100, 1e-6), sm.Inner(sm.lbfgs(), 3, 1e-9)):
    found = jax.jit(lambda: posterior_mode(inner, model))()  # noqa: B023
    jax.effects_barrier()
    assert len(seen) == int(found.info.steps) + 1
    value, grad = model.value_and_grad(found.z, batch)
    np.testing.assert_allclose(found.info.objective, value, rtol=1e-12)
    np.testing.assert_allclose(found.info.grad_norm, optax.tree.norm(grad), rtol=1e-6, atol=1e-14)
    jax.effects_barrier()
    seen.clear()


@pytest.mark.parametrize("info_at_end", [True, False])
def test_a_loop_with_a_tolerance_evaluates_no_point_twice(info_at_end):
  """L steps visit L + 1 points; the last one is measured once, for the test and for the report."""
  seen = []

  def predict(theta, x):
    jax.debug.callback(lambda: seen.append(1))
    return x @ theta["w"]

  phi, batch = problem()
  model = model_of(sm.gaussian(predict), phi, batch, SIGMA)
  for tol, until in ((1e-2, 100), (1e-6, 3), (1e3, 100)):
    inner = sm.Inner(optax.sgd(0.3), until, tol)
    found = jax.jit(lambda: posterior_mode(inner, model, info_at_end=info_at_end))()  # noqa: B023
    jax.effects_barrier()
    assert len(seen) == int(found.info.steps) + 1
    value, grad = model.value_and_grad(found.z, batch)
    np.testing.assert_allclose(found.info.objective, value, rtol=1e-12)
    np.testing.assert_allclose(found.info.grad_norm, optax.tree.norm(grad), rtol=1e-6, atol=1e-15)
    assert bool(found.info.converged) == (until == 100)
    jax.effects_barrier()
    seen.clear()
