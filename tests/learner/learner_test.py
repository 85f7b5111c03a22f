"""Every algorithm of the family agrees with an independent implementation in this file.

The models have few parameters, so that Hessians are dense. All computations are in float64.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import shrinkmeta as sm
from experiments import networks
from shrinkmeta.model import priors

pytestmark = pytest.mark.usefixtures("x64")

T, N, SCALE, STEPS, RATE = 3, 6, 0.5, 4, 0.1
SGD = sm.Inner(optax.sgd(RATE), steps=STEPS)
# Heavy ball: thousands of steps, but quick to compile, and its steps can be differentiated through.
MODE = sm.Inner(optax.sgd(0.05, momentum=0.9), steps=20_000, tol=1e-12)
EXACT = sm.Implicit(curvature="hessian", max_steps=400, tol=1e-13)


def mlp(theta, x):
  h = jnp.tanh(x @ theta["body"]["kernel"] + theta["body"]["bias"])
  return h @ theta["head"]["kernel"] + theta["head"]["bias"]


def conv(theta, x):
  """3 x 3 convolution, tanh, 2 x 2 mean, linear: [N, 4, 4, 1] -> logits [N, 3]."""
  h = networks.conv3x3(x, theta["conv"]["kernel"]) + theta["conv"]["bias"]
  h = jnp.tanh(h).reshape(-1, 2, 2, 2, 2, 3).mean((2, 4))
  return h.reshape(-1, 12) @ theta["head"]["kernel"] + theta["head"]["bias"]


GAUSSIAN, CATEGORICAL = sm.gaussian(mlp, SCALE), sm.categorical(conv)


def mlp_problem(num_tasks=T):
  """(likelihood, params, tasks), with another number of examples in val than in train."""
  rng = np.random.default_rng(0)
  array = lambda *shape: jnp.asarray(0.7 * rng.normal(size=shape))
  params = {
    "body": {"kernel": array(3, 5), "bias": array(5)},
    "head": {"kernel": array(5, 2), "bias": array(2)},
  }
  batch = lambda n: sm.Batch(array(num_tasks, n, 3), 2.0 * array(num_tasks, n, 2))
  return GAUSSIAN, params, sm.Task(batch(N), batch(N + 3))


def conv_problem(num_tasks=2):
  rng = np.random.default_rng(1)
  array = lambda *shape: jnp.asarray(0.7 * rng.normal(size=shape))
  params = {
    "conv": {"kernel": array(3, 3, 1, 3), "bias": array(3)},
    "head": {"kernel": array(12, 3), "bias": array(3)},
  }
  batch = lambda n: sm.Batch(
    2.0 * array(num_tasks, n, 4, 4, 1), jnp.asarray(rng.integers(3, size=(num_tasks, n)))
  )
  return CATEGORICAL, params, sm.Task(batch(N), batch(N + 3))


def mean_nll(theta, batch):
  """Of one example, written out; the mask counts."""
  each = jnp.sum(
    0.5 * ((batch.targets - mlp(theta, batch.inputs)) / SCALE) ** 2
    + jnp.log(SCALE)
    + 0.5 * jnp.log(2 * jnp.pi),
    -1,
  )
  weights = jnp.ones(len(each)) if batch.mask is None else batch.mask
  return jnp.sum(weights * each) / jnp.sum(weights)


def task(tasks, t):
  return jax.tree.map(lambda x: x[t], tasks)


def mean(f, tasks):
  """Mean of f over tasks, in one program."""
  each = jax.jit(jax.vmap(f))
  return jax.tree.map(lambda x: x.mean(0), each(tasks))


def descend(phi, batch, moving=("body", "head"), steps=STEPS):
  theta = phi
  for _ in range(steps):
    grad = jax.grad(mean_nll)(theta, batch)
    theta = {m: optax.tree.add_scale(theta[m], -RATE * (m in moving), grad[m]) for m in theta}
  return theta


def assert_close(got, want, error=1e-8):
  """Norm of the difference over the norm, for every leaf."""
  chex.assert_trees_all_equal_shapes_and_dtypes(got, want)
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
  ):
    off = float(jnp.linalg.norm(a - b)) / max(float(jnp.linalg.norm(b)), 1e-300)
    assert off <= error or bool(jnp.all(a == b)), f"{path}: {off}"


def gradient(learner, params, tasks):
  """meta_gradient at the start, with all inner solves converged where they can."""
  state = learner.init(params)
  grad, metrics = jax.jit(learner.meta_gradient)(state, tasks)
  assert int(metrics.num_failed) == 0
  if learner.algorithm.gradient == "implicit":
    assert bool(metrics.inner.converged.all())
  return grad, metrics


# --- rows without sigma --------------------------------------------------------------------------


def masked(tasks, equal=False):
  """The same tasks, each with another number of examples that count; `equal`: all count."""
  train = jnp.arange(N)[None] < jnp.array([[6], [4], [5]])
  val = jnp.arange(N + 3)[None] < jnp.array([[5], [9], [2]])
  return sm.Task(
    tasks.train._replace(mask=(train | equal).astype(float)),
    tasks.val._replace(mask=(val | equal).astype(float)),
  )


@pytest.mark.parametrize("with_masks, remat", ((False, False), (True, True)))
def test_maml_is_the_derivative_through_the_steps(with_masks, remat):
  likelihood, params, tasks = mlp_problem()
  tasks = masked(tasks) if with_masks else tasks
  inner = sm.Inner(optax.sgd(RATE), steps=STEPS, remat=remat)
  grad, metrics = gradient(sm.maml(likelihood, sm.by_layer(params), inner=inner), params, tasks)
  loss = lambda phi: mean(lambda t: mean_nll(descend(phi, t.train), t.val), tasks)
  value, want = jax.jit(jax.value_and_grad(loss))(params)
  assert_close(grad.phi, want)
  assert_close(metrics.loss, value)
  assert_close(metrics.phi_loss, value)
  np.testing.assert_allclose(metrics.phi_grad_norm, optax.tree.norm(want), rtol=1e-8)


@functools.cache
def fomaml_and_reference():
  """One program for tasks with any masks: FOMAML's gradient, its reference, and MAML's gradient."""
  likelihood, params, _ = mlp_problem()
  labels = sm.by_layer(params)
  learner, second = (make(likelihood, labels, inner=SGD) for make in (sm.fomaml, sm.maml))

  def loss(phi, task):
    moved = jax.tree.map(lambda a, b: jax.lax.stop_gradient(a - b), descend(phi, task.train), phi)
    return mean_nll(optax.tree.add(phi, moved), task.val)

  @jax.jit
  def run(tasks):
    grad, metrics = learner.meta_gradient(learner.init(params), tasks)
    want = mean(lambda t: jax.value_and_grad(loss)(params, t), tasks)
    return grad.phi, metrics, want, second.meta_gradient(second.init(params), tasks)[0].phi

  return run


@pytest.mark.parametrize("equal", (True, False))
def test_fomaml_is_that_with_the_gradients_stopped(equal):
  grad, metrics, (value, want), second_order = fomaml_and_reference()(
    masked(mlp_problem()[2], equal)
  )
  assert int(metrics.num_failed) == 0
  assert_close(grad, want)
  assert_close(metrics.loss, value)
  off = ravel_pytree(optax.tree.sub(grad, second_order))[0]
  assert float(jnp.linalg.norm(off)) > 0.05 * float(optax.tree.norm(grad))


def test_reptile_is_the_mean_way_back():
  likelihood, params, tasks = mlp_problem()
  grad, metrics = gradient(sm.reptile(likelihood, sm.by_layer(params), inner=SGD), params, tasks)

  def one(t):
    theta = descend(params, t.train)
    return optax.tree.sub(params, theta), mean_nll(theta, t.val)

  want, loss = mean(one, tasks)
  assert_close(grad.phi, want)
  assert_close(metrics.loss, loss)
  assert np.isnan(float(metrics.phi_loss))


@pytest.mark.parametrize("head", ("body", "head"))
def test_anil_is_maml_on_the_head_alone(head):
  likelihood, params, tasks = mlp_problem()
  learner = sm.anil(likelihood, sm.by_layer(params), head=head, inner=SGD)
  loss = lambda phi: mean(lambda t: mean_nll(descend(phi, t.train, (head,)), t.val), tasks)
  # Another way round: the body closed over, MAML on a model that has nothing but the head.
  rest, part = {m: params[m] for m in params if m != head}, {head: params[head]}
  only = sm.maml(sm.gaussian(lambda p, x: mlp(rest | p, x), SCALE), sm.by_layer(part), inner=SGD)

  @jax.jit
  def run(tasks):
    train = task(tasks, 0).train
    whole, alone = learner.init(params), only.init(part)
    return (
      (learner.meta_gradient(whole, tasks)[0].phi, learner.adapt(whole, train)[0]),
      jax.grad(loss)(params),
      (only.meta_gradient(alone, tasks)[0].phi, only.adapt(alone, train)[0]),
    )

  (grad, theta), want, (grad_alone, theta_alone) = run(tasks)
  assert_close(grad, want)
  assert_close({head: grad[head]}, grad_alone)
  assert_close({head: theta[head]}, theta_alone)


def test_masks_freeze_to_the_bit():
  likelihood, params, tasks = mlp_problem()
  labels, train = sm.by_layer(params), task(tasks, 0).train
  picked = lambda *m: sm.hand_picked(likelihood, labels, task_specific=m, inner=SGD)
  learners = {
    ("body",): [sm.anil(likelihood, labels, inner=SGD), picked("head")],
    ("head",): [sm.boil(likelihood, labels, inner=SGD), picked("body")],
    ("body", "head"): [
      sm.no_adaptation(likelihood, labels), picked(),
      sm.sigma_imaml(likelihood, labels, init_sigma=0.0, inner=SGD),
    ],
    (): [f(likelihood, labels, inner=SGD) for f in (sm.maml, sm.fine_tuning)],
  }  # fmt: skip
  states = {
    frozen: [learner.init(params) for learner in group] for frozen, group in learners.items()
  }
  run = lambda states: {
    frozen: [f.adapt(s, train)[0] for f, s in zip(group, states[frozen], strict=True)]
    for frozen, group in learners.items()
  }
  for frozen, thetas in jax.jit(run)(states).items():
    for theta in thetas:
      for m in params:
        same = all(map(np.array_equal, jax.tree.leaves(theta[m]), jax.tree.leaves(params[m])))
        assert same == (m in frozen), (frozen, m)


def test_boil_and_hand_picked_are_the_derivative_through_the_steps_of_their_modules():
  likelihood, params, tasks = mlp_problem()
  labels = sm.by_layer(params)
  for learner, moving in (
    (sm.boil(likelihood, labels, inner=SGD), ("body",)),
    (sm.hand_picked(likelihood, labels, task_specific=("head",), inner=SGD), ("head",)),
  ):  # fmt: skip
    loss = lambda phi, moving=moving: mean(
      lambda t: mean_nll(descend(phi, t.train, moving), t.val), tasks
    )
    assert_close(gradient(learner, params, tasks)[0].phi, jax.jit(jax.grad(loss))(params))


@functools.cache
def pooled_and_reference():
  """One program for tasks with any masks: both pooled rows, and what they are to be."""
  likelihood, params, _ = mlp_problem()
  labels = sm.by_layer(params)
  learners = sm.fine_tuning(likelihood, labels, inner=SGD), sm.no_adaptation(likelihood, labels)

  def loss(phi, tasks):
    def one(t):
      counts = [jnp.sum(p.mask) for p in t]
      return sum(n * mean_nll(phi, p) for n, p in zip(counts, t, strict=True)) / sum(counts)

    return mean(one, tasks)

  @jax.jit
  def run(tasks):
    train = task(tasks, 0).train
    free = learners[0].init(params)._replace(log_sigma2={"body": jnp.inf, "head": jnp.inf})
    return (
      [learner.meta_gradient(learner.init(params), tasks) for learner in learners],
      jax.value_and_grad(loss)(params, tasks),
      mean(lambda t: mean_nll(params, t.val), tasks),
      (learners[0].adapt(free, train)[0], descend(params, train)),
    )

  return run


@pytest.mark.parametrize("equal", (True, False))
def test_the_pooled_rows_follow_the_mean_nll_of_all_examples(equal):
  found, (value, want), val, thetas = pooled_and_reference()(masked(mlp_problem()[2], equal))
  for grad, metrics in found:
    assert int(metrics.num_failed) == 0
    assert_close(grad.phi, want)
    assert_close(metrics.phi_loss, value)
    assert_close(metrics.loss, val)
  assert_close(*thetas)


# --- implicit rows -------------------------------------------------------------------------------


def dense_pieces(learner, params, tasks):
  """The meta-gradient, its metrics, and theta_hat [T, D], g [T, D], H [T, D, D] of the tasks."""
  unravel = ravel_pytree(params)[1]
  nll = lambda v, batch: len(batch.targets) * mean_nll(unravel(v), batch)

  def derivatives(theta, one):
    theta = ravel_pytree(theta)[0]
    g = jax.grad(lambda v: mean_nll(unravel(v), one.val))(theta)
    return theta, g, jax.hessian(nll)(theta, one.train)

  @jax.jit
  def run(state):
    thetas, info = learner.adapt_tasks(state, tasks.train)
    return learner.meta_gradient(state, tasks), info, jax.vmap(derivatives)(thetas, tasks)

  (grad, metrics), info, pieces = run(learner.init(params))
  assert int(metrics.num_failed) == 0
  assert bool(info.converged.all()) and bool(metrics.inner.converged.all())
  return grad, metrics, [np.asarray(x) for x in pieces]


def test_imaml_is_the_dense_solution():
  """d/d phi = (I + H / lambda)^-1 g with lambda = 1 / sigma^2."""
  likelihood, params, tasks = mlp_problem()
  learner = sm.imaml(
    likelihood, sm.by_layer(params), inner=MODE, implicit=EXACT, init_sigma=0.6
  )  # fmt: skip
  grad, metrics, (_, g, h) = dense_pieces(learner, params, tasks)
  want = np.linalg.solve(np.eye(g.shape[1]) + 0.6**2 * h, g[..., None])[..., 0]
  assert_close(ravel_pytree(grad.phi)[0], jnp.asarray(want.mean(0)))
  assert all(float(x) == 0.0 for x in grad.log_sigma2.values())  # fixed
  assert bool(metrics.solve.converged.all()) and not bool(metrics.solve.negative_curvature.any())


def test_sigma_imaml_is_the_dense_solution():
  likelihood, params, tasks = mlp_problem()
  labels, sigma = sm.by_layer(params), {"body": 0.3, "head": 0.9}
  learner = sm.sigma_imaml(likelihood, labels, inner=MODE, implicit=EXACT, init_sigma=sigma)
  grad, _, (thetas, g, h) = dense_pieces(learner, params, tasks)
  flat_phi = ravel_pytree(params)[0]
  of_module = lambda values: np.asarray(
    ravel_pytree(jax.tree.map(lambda m, x: jnp.full_like(x, values[m]), labels, params))[0]
  )
  s = of_module(sigma)
  # theta(phi, log s^2): (I + s^2 H) d theta = d phi + (theta - phi)_m d log s_m^2.
  transposed = (np.eye(s.size) + s[:, None] ** 2 * h).swapaxes(1, 2)
  adjoint = np.linalg.solve(transposed, g[..., None])[..., 0]
  assert_close(ravel_pytree(grad.phi)[0], jnp.asarray(adjoint.mean(0)))
  for m in params:
    mine = of_module({name: float(name == m) for name in params})
    want = np.mean((adjoint * (thetas - flat_phi)) @ mine)
    np.testing.assert_allclose(grad.log_sigma2[m], want, rtol=1e-8)


def test_sigma_imaml_with_one_fixed_sigma_is_imaml():
  likelihood, params, tasks = mlp_problem()
  labels = sm.by_layer(params)
  keywords = dict(inner=MODE, implicit=EXACT, init_sigma=0.6, phi_optimizer=optax.sgd(0.1))
  imaml = sm.imaml(likelihood, labels, **keywords)
  fixed = sm.sigma_imaml(likelihood, labels, sigma_optimizer=optax.set_to_zero(), **keywords)
  states = [learner.init(params) for learner in (imaml, fixed)]
  updates = [jax.jit(learner.update) for learner in (imaml, fixed)]
  for _ in range(2):
    states = [update(s, tasks)[0] for update, s in zip(updates, states, strict=True)]
  assert_close(states[1].phi, states[0].phi)
  assert_close(states[1].log_sigma2, states[0].log_sigma2)
  assert float(optax.tree.norm(optax.tree.sub(states[0].phi, params))) > 1e-2


def linear_tasks(num_tasks=T):
  """A strongly convex problem: linear regression with more examples than parameters."""
  rng = np.random.default_rng(4)
  x = jnp.asarray(rng.normal(size=(num_tasks, 20, 5)))
  y = x @ jnp.asarray(rng.normal(size=5)) + jnp.asarray(rng.normal(size=(num_tasks, 20)))
  likelihood = sm.gaussian(lambda p, x: x @ p["w"], SCALE)
  batch = sm.Batch(x, y)
  return likelihood, {"w": jnp.asarray(rng.normal(size=5))}, sm.Task(batch, batch)


def test_sigma_reptile_tends_to_reptile():
  """sigma^2 times its phi gradient, (phi - theta_hat), as sigma grows: the error is O(sigma^-2)."""
  likelihood, params, tasks = linear_tasks()
  labels = {"w": "w"}
  inner = sm.Inner(optax.sgd(0.05, momentum=0.6), steps=2000)
  reptile = gradient(sm.reptile(likelihood, labels, inner=inner), params, tasks)[0].phi
  optimum = jnp.stack([jnp.linalg.lstsq(*task(tasks, t).train[:2])[0] for t in range(T)])
  assert_close(reptile, {"w": params["w"] - optimum.mean(0)})

  @jax.jit
  def scaled(sigma):
    # The same steps in theta: in z the curvature grows with sigma^2.
    inner = sm.Inner(optax.sgd(0.05 / sigma**2, momentum=0.6), steps=2000)
    learner = sm.sigma_reptile(likelihood, labels, inner=inner)
    state = learner.init(params)._replace(log_sigma2={"w": 2 * jnp.log(sigma)})
    return optax.tree.scale(sigma**2, learner.meta_gradient(state, tasks)[0].phi)

  errors = [
    float(optax.tree.norm(optax.tree.sub(scaled(sigma), reptile))) for sigma in (1e2, 1e3, 1e4)
  ]
  errors = np.array(errors) / float(optax.tree.norm(reptile))
  np.testing.assert_allclose(errors[:-1] / errors[1:], 100.0, rtol=5e-3)  # O(1 / sigma^4) left
  assert errors[-1] < 1e-8


@functools.cache
def sigma_reptile_and_marginal(tol):
  """One program for all sigma."""
  likelihood, params, tasks = linear_tasks()
  inner = sm.Inner(sm.lbfgs(), steps=300, tol=tol)
  learner = sm.sigma_reptile(likelihood, {"w": "w"}, inner=inner, implicit=EXACT)

  @jax.jit
  def run(sigma):
    def marginal(phi, one):  # the minimum over theta of J, which Gaussians give in closed form
      x, y, _ = one.train
      r = y - x @ phi["w"]
      cov = SCALE**2 * jnp.eye(20) + sigma**2 * x @ x.T
      constant = 20 * jnp.log(SCALE * jnp.sqrt(2 * jnp.pi))
      return 0.5 * r @ jnp.linalg.solve(cov, r) + constant

    state = learner.init(params)._replace(log_sigma2={"w": 2 * jnp.log(sigma)})
    return (
      learner.meta_gradient(state, tasks),
      mean(lambda t: jax.value_and_grad(marginal)(params, t), tasks),
    )

  return run


@pytest.mark.parametrize("sigma", (1e-6, 0.3, 2.0, 100.0))
def test_sigma_reptile_follows_the_joint(sigma):
  """phi: d/d phi of min_theta -log p(D, theta | phi), a generalised least squares problem."""
  (grad, metrics), (value, want) = sigma_reptile_and_marginal(1e-12 if sigma < 1 else 1e-10)(sigma)
  assert int(metrics.num_failed) == 0 and bool(metrics.inner.converged.all())
  assert_close(metrics.phi_loss, value)
  assert_close(grad.phi, want, 1e-8)


@pytest.mark.parametrize("inner", (
  sm.Inner(optax.sgd(0.01), steps=7, batch_size=8),
  sm.Inner(optax.sgd(0.1), steps=100, tol=0.3),
))  # fmt: skip
@pytest.mark.parametrize("keywords", ({}, {"batching": 2}, {"sigma_gradient": "joint"}))
def test_sigma_reptile_short_of_the_mode(inner, keywords):
  """phi's gradient from G on all examples and from z; the report is that of `adapt`.

  The weight of z is the curvature c along the mode, from phi to theta_hat.
  """
  likelihood, params, tasks = linear_tasks()
  sigma, key = 0.3, jax.random.key(3)
  learner = sm.sigma_reptile(
    likelihood, {"w": "w"}, inner=inner, implicit=EXACT, init_sigma=sigma, **keywords
  )
  state = learner.init(params)
  grad, metrics, (thetas, info) = jax.jit(
    lambda state: (
      *learner.meta_gradient(state, tasks, key),
      learner.adapt_tasks(state, tasks.train, key=key),
    )
  )(state)
  chex.assert_trees_all_close(metrics.inner, info, rtol=1e-9)
  assert not info.grad_norm.max() < 1e-3 and (inner.tol is None or info.converged.all())
  x, y = (np.asarray(part) for part in tasks.train[:2])
  theta, n = np.asarray(thetas["w"]), y.shape[1]
  slope = -np.einsum("tni,tn->ti", x, y - np.einsum("tni,ti->tn", x, theta)) / SCALE**2
  curvature = np.einsum("tni,tnj->tij", x, x) / SCALE**2
  moved = theta - np.asarray(params["w"])
  c = np.einsum("ti,tij,tj->t", moved, curvature, moved) / np.sum(moved**2, 1)
  c = np.maximum(n, c)[:, None]
  want = (slope - c * moved) / (1 + c * sigma**2)
  assert_close(grad.phi["w"], jnp.asarray(want.mean(0)), 1e-8)


@pytest.mark.parametrize("make", (sm.sigma_imaml, sm.empirical_bayes))
def test_what_a_task_draws_when_it_adapts_is_the_same_one_by_one_in_blocks_and_at_once(make):
  likelihood, params, tasks = linear_tasks()
  inner = sm.Inner(optax.sgd(0.01), steps=7, batch_size=8, tol=1e-9)
  whole, blocks = (
    make(likelihood, {"w": "w"}, inner=inner, implicit=EXACT, batching=n) for n in ("vmap", 2)
  )
  state, key = whole.init(params), jax.random.key(3)

  @jax.jit
  def run(state):
    one = whole.adapt(state, task(tasks, 1).train, key=jax.random.fold_in(key, 1))[0]
    return one, [f.adapt_tasks(state, tasks.train, key=key)[0] for f in (whole, blocks)]

  one, thetas = run(state)
  chex.assert_trees_all_close(*thetas, rtol=1e-9)
  assert_close(one["w"], thetas[0]["w"][1])


# --- differences of the whole procedure ----------------------------------------------------------


def with_rows(problem, name):
  """(learner, state, tasks), where the meta-gradient is to be that of the losses."""
  likelihood, params, tasks = {"tanh": mlp_problem, "conv": conv_problem}[problem]()
  labels = sm.by_layer(params)
  sigma = {m: s for m, s in zip(params, (0.3, 0.8), strict=True)}
  if name == "sigma_maml":
    learner = sm.sigma_maml(likelihood, labels, inner=SGD, init_sigma=sigma)
  else:
    learner = getattr(sm, name)(
      likelihood, labels, inner=MODE, implicit=EXACT, init_sigma=sigma
    )  # fmt: skip
  return learner, learner.init(params), tasks


def five_point(f, h):
  """f'(0), with an error of O(h^4)."""
  return (f(-2 * h) - 8 * f(-h) + 8 * f(h) - f(2 * h)) / (12 * h)


@functools.cache
def compiled(problem, name):
  """One compiled program for the gradient and all its differences."""
  learner, state, tasks = with_rows(problem, name)

  def run(phi, log_sigma2):
    moved = state._replace(phi=phi, log_sigma2=log_sigma2)
    grad, metrics = learner.meta_gradient(moved, tasks)
    return grad, metrics

  return jax.jit(run), state


@pytest.mark.parametrize(
  ("name", "problem"),
  [
    ("sigma_imaml", "tanh"), ("sigma_reptile", "tanh"), ("sigma_maml", "tanh"),
    ("sigma_imaml", "conv"), ("sigma_maml", "conv"),
  ],
)  # fmt: skip
def test_the_meta_gradient_is_the_difference_quotient(name, problem):
  """phi of a module in a random direction against phi_loss, every log sigma^2 against loss."""
  run, state = compiled(problem, name)
  grad, metrics = run(state.phi, state.log_sigma2)
  assert int(metrics.num_failed) == 0
  if name != "sigma_maml":
    assert bool(metrics.inner.converged.all()) and bool(metrics.solve.converged.all())

  def loss(which, phi=state.phi, log_sigma2=state.log_sigma2):
    metrics = run(phi, log_sigma2)[1]
    if name != "sigma_maml":
      assert bool(metrics.inner.converged.all())
    return float(getattr(metrics, which))

  rng = np.random.default_rng(3)
  for m in state.phi:
    direction = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), state.phi[m])
    direction = optax.tree.scale(1 / optax.tree.norm(direction), direction)
    at = lambda h, m=m, direction=direction: loss(
      "phi_loss", phi=state.phi | {m: optax.tree.add_scale(state.phi[m], h, direction)}
    )
    want, got = five_point(at, 3e-3), float(optax.tree.vdot(grad.phi[m], direction))
    assert abs(got - want) <= 1e-6 * max(abs(want), 0.1 * float(optax.tree.norm(grad.phi[m])))
  for m, value in state.log_sigma2.items():
    at = lambda h, m=m, value=value: loss("loss", log_sigma2=state.log_sigma2 | {m: value + h})
    want = five_point(at, 1e-2)
    np.testing.assert_allclose(grad.log_sigma2[m], want, rtol=1e-6)
    assert abs(want) > 1e-4  # or the comparison would say little


@pytest.mark.parametrize("name", ("sigma_imaml", "sigma_reptile", "sigma_maml"))
@pytest.mark.parametrize("problem", ("tanh", pytest.param("conv", marks=pytest.mark.slow)))
def test_check_meta_gradient_says_that_it_is_right(name, problem):
  learner, state, tasks = with_rows(problem, name)
  check = sm.check_meta_gradient(learner, state, tasks)
  assert {(r.parameter, r.module) for r in check.rows} == {
    (p, m) for p in ("phi", "log_sigma2") for m in state.phi
  }
  for row in check.rows:
    # The checker's step is 6e-6, which divides the 1e-12 or so that the mode is off by.
    assert row.error < 1e-5, check
    assert row.unrolled_error < 1e-6, check


def checked(learner, params, tasks):
  return sm.check_meta_gradient(learner, learner.init(params), tasks).rows


def test_check_meta_gradient_says_that_it_is_wrong():
  likelihood, params, tasks = mlp_problem()
  labels = sm.by_layer(params)
  rows = checked(sm.fomaml(likelihood, labels, inner=SGD), params, tasks)
  assert max(r.error for r in rows) > 0.05
  assert max(r.unrolled_error for r in rows) > 0.05
  maml = sm.maml(likelihood, labels, inner=SGD)
  for row in checked(maml, params, tasks):
    assert row.unrolled_error < 1e-9 and row.error < 1e-5

  def scaled(state, tasks, key=None):
    grad, metrics = maml.meta_gradient(state, tasks, key)
    return optax.tree.scale(1.02, grad), metrics

  for row in checked(maml._replace(meta_gradient=scaled), params, tasks):
    np.testing.assert_allclose([row.error, row.unrolled_error], 0.02, rtol=5e-3)


# --- update, traces, transformations -------------------------------------------------------------


def test_update_hands_the_meta_gradient_to_optax():
  likelihood, params, tasks = mlp_problem()
  learner = sm.sigma_maml(
    likelihood, sm.by_layer(params), inner=SGD, init_sigma=0.5, phi_optimizer=optax.sgd(0.2),
    sigma_optimizer=optax.sgd(0.7),
  )  # fmt: skip
  state = learner.init(params)
  both = lambda state: (learner.meta_gradient(state, tasks), learner.update(state, tasks))
  (grad, metrics), (new, new_metrics) = jax.jit(both)(state)
  assert_close(new.phi, optax.tree.add_scale(state.phi, -0.2, grad.phi))
  assert_close(new.log_sigma2, optax.tree.add_scale(state.log_sigma2, -0.7, grad.log_sigma2))
  assert int(new.step) == 1
  assert_close(new_metrics.loss, metrics.loss)
  assert all(float(jnp.abs(x)) > 1e-4 for x in grad.log_sigma2.values())


def test_a_prior_whose_gradient_is_no_number_moves_nothing():
  likelihood, params, tasks = mlp_problem()
  for where in ("log_p_phi", "log_p_sigma"):
    # The derivative of a norm at 0.
    prior = lambda tree: -jnp.linalg.norm(0.0 * jax.tree.leaves(tree)[0])
    learner = sm.sigma_maml(likelihood, sm.by_layer(params), inner=SGD, **{where: prior})
    state = learner.init(params)
    new, metrics = jax.jit(learner.update)(state, tasks)
    assert int(metrics.num_failed) == 0 and np.isfinite(metrics.loss)
    chex.assert_trees_all_equal(new._replace(step=state.step), state)
    assert int(new.step) == 1


def test_modules_are_named_one_by_one():
  likelihood, params, _ = mlp_problem()
  with pytest.raises(TypeError, match="task_specific must be a tuple of modules.*got .head."):
    sm.hand_picked(likelihood, sm.by_layer(params), task_specific="head", inner=SGD)


def test_what_a_row_has_no_use_for_is_refused():
  likelihood, params, _ = mlp_problem()
  labels = sm.by_layer(params)
  for name, row in sm.FAMILY.items():
    keywords = {"task_specific": ("head",)} if name == "hand_picked" else {}
    make = functools.partial(getattr(sm, name), likelihood, labels, **keywords)
    if row.sigma != "learned":
      with pytest.raises((ValueError, TypeError), match="log_p_sigma"):
        make(log_p_sigma=priors.half_cauchy())
    if row.phi != "evidence":
      with pytest.raises((ValueError, TypeError), match="log_det"):
        make(log_det=sm.LogDet("lanczos"))


def test_pythons_numbers_are_parameters_that_compile_once():
  linear = sm.gaussian(lambda theta, x: x * theta["w"], 1.0)
  learner = sm.sigma_imaml(linear, {"w": "w"}, inner=SGD)
  part = sm.Batch(jnp.ones((2, 3)), jnp.ones((2, 3)))
  update, state = jax.jit(learner.update), learner.init({"w": 0.0})
  for _ in range(2):
    state, _ = update(state, sm.Task(part, part))
  assert update._cache_size() == 1


def test_a_row_without_sigma_takes_none():
  likelihood, params, _ = mlp_problem()
  keywords = dict(inner=SGD, implicit=sm.Implicit(), phi_optimizer=SGD.optimizer)
  keywords |= dict(sigma_optimizer=SGD.optimizer, init_sigma=0.3)
  with pytest.raises(ValueError, match="init_sigma must be 0 or inf if .*; got .*0.3"):
    sm.make_learner(sm.FAMILY["maml"], likelihood, sm.by_layer(params), **keywords)


ALL = (
  "maml", "fomaml", "imaml", "reptile", "sigma_maml", "sigma_imaml", "sigma_reptile", "anil",
  "boil", "meta_sgd", "fine_tuning", "no_adaptation",
)  # fmt: skip


def short(name, likelihood, labels, **keywords):
  """Any row with few steps, for what does not ask for convergence."""
  inner = {} if name == "no_adaptation" else dict(inner=SGD)
  return getattr(sm, name)(likelihood, labels, **inner, **keywords)


@pytest.mark.parametrize("name", ALL)
def test_updates_are_one_trace(name):
  """The new state has the types of the old one, so that jit finds its program again."""
  likelihood, params, tasks = mlp_problem()
  learner = short(name, likelihood, sm.by_layer(params))
  state = learner.init(params)
  new, _ = jax.eval_shape(learner.update, state, tasks)
  kind = lambda x: (x.shape, x.dtype, x.weak_type)
  assert jax.tree.map(kind, new) == jax.tree.map(lambda x: kind(jax.typeof(x)), state)


def test_ten_updates_are_one_trace():
  likelihood, params, tasks = mlp_problem()
  learner = short("sigma_maml", likelihood, sm.by_layer(params))
  chex.clear_trace_counter()
  update = jax.jit(chex.assert_max_traces(learner.update, n=1))
  adapt = jax.jit(chex.assert_max_traces(learner.adapt, n=1))
  state = learner.init(params)
  for i in range(10):
    state, metrics = update(state, jax.tree.map(lambda x, i=i: x * (1 + 0.01 * i), tasks))
    adapt(state, task(tasks, i % T).train)
  assert int(state.step) == 10 and np.isfinite(float(metrics.loss))


@pytest.mark.parametrize("name", ALL)
def test_vmap_sequence_and_loop_over_tasks_agree(name):
  likelihood, params, tasks = mlp_problem()
  labels = sm.by_layer(params)
  tasks = masked(tasks)
  run = {}
  for batching in ("vmap", "sequential"):
    learner = short(name, likelihood, labels, batching=batching)
    gradient = jax.jit(learner.meta_gradient)
    run[batching] = lambda tasks, f=gradient, state=learner.init(params): f(state, tasks)
  # T times the same task: its own gradient, and its own metrics T times.
  each = [
    run["vmap"](jax.tree.map(lambda x, t=t: np.repeat(x[t : t + 1], T, 0), tasks)) for t in range(T)
  ]
  want_grad = jax.tree.map(lambda *x: sum(x) / T, *[g for g, _ in each])
  stack = lambda name: jax.tree.map(
    lambda *x: jnp.stack([value[0] for value in x]), *[getattr(m, name) for _, m in each]
  )
  for grad, metrics in (f(tasks) for f in run.values()):
    assert_close(grad, want_grad, 1e-10)
    assert_close(metrics.val_nll, stack("val_nll"), 1e-10)
    assert_close(metrics.inner.objective, stack("inner").objective, 1e-10)
    assert_close(metrics.loss, stack("val_nll").mean(), 1e-10)
    np.testing.assert_array_equal(metrics.failed, np.zeros(T, bool))
    if metrics.solve is not None:
      want = stack("solve")
      np.testing.assert_allclose(
        metrics.solve.residual, want.residual, 0, 1e-13
      )  # of a direct solve
      np.testing.assert_array_equal(metrics.solve.steps, want.steps)


@pytest.mark.parametrize("batching", ("vmap", "sequential"))
def test_a_compiled_update_of_a_convolutional_learner_repeats_itself(batching, optimising_jit):
  """50 calls on one input, to the bit: a compiled solve was once seen to give NaN at random."""
  with jax.enable_x64(False):
    net = networks.ConvNet(ways=3, features=4, blocks=1)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(4, 9, 8, 8, 1)), jnp.float32)
    labels = jnp.asarray(rng.integers(3, size=(4, 9)), jnp.int32)
    params = net.init(jax.random.key(0), images[0])["params"]
    learner = sm.sigma_imaml(
      sm.categorical(lambda p, x: net.apply({"params": p}, x)), sm.by_layer(params),
      inner=sm.Inner(optax.sgd(0.1), steps=5), implicit=sm.Implicit(solver="cg", max_steps=10),
      batching=batching,
    )  # fmt: skip
    tasks = sm.Task(sm.Batch(images, labels), sm.Batch(images[:, ::-1], labels[:, ::-1]))
    update, state = optimising_jit(learner.update), learner.init(params)
    first = jax.device_get(update(state, tasks))
    chex.assert_tree_all_finite(first)
    for _ in range(49):
      again = jax.device_get(update(state, tasks))
      for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(first), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
  ("names", "head"), [(("conv", "head", "norm"), "head"), (("layer_10", "layer_9"), "layer_10")]
)
def test_the_head_is_the_module_of_that_name_or_the_last_by_path(names, head):
  labels = {name: name for name in names}
  anil, boil = (make(GAUSSIAN, labels).spec.sigma for make in (sm.anil, sm.boil))
  assert {name for name, sigma in anil.items() if sigma} == {head}
  assert {name for name, sigma in boil.items() if sigma} == set(names) - {head}


def test_a_fresh_state_may_be_donated_with_any_optimiser():
  batch = sm.Batch(jnp.ones((2, 4)), jnp.ones((2, 4)))
  for optimizer in (optax.contrib.prodigy(1.0), optax.add_noise(0.1, 0.5, jax.random.key(0))):
    likelihood = sm.gaussian(lambda theta, x: x * theta["w"])
    learner = sm.maml(likelihood, {"w": "w"}, phi_optimizer=optimizer)
    update = jax.jit(learner.update, donate_argnums=0)
    state, _ = update(learner.init({"w": 0.0}), sm.Task(batch, batch))
    assert jnp.isfinite(state.phi["w"])
