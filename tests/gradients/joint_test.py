"""sigma's gradient through both levels agrees with differences of the whole optimum."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import shrinkmeta as sm
from shrinkmeta.mode.frozen import moving

pytestmark = pytest.mark.usefixtures("x64")

T, N = 4, 9
# Stable up to a curvature of 76; the optimum's is 41.
MODE = sm.Inner(optax.sgd(0.05, momentum=0.9), steps=30_000, tol=1e-13)
CG = sm.Implicit(curvature="hessian", max_steps=2_000, tol=1e-13)
PRIOR = sm.priors.normal(3.0)


def network(theta, x):
  return jnp.tanh(x @ theta["body"]["kernel"] + theta["body"]["bias"]) @ theta["head"]


def problem():
  rng = np.random.default_rng(0)
  array = lambda *shape: jnp.asarray(0.7 * rng.normal(size=shape))
  params = {"body": {"kernel": array(2, 4), "bias": array(4)}, "head": array(4, 1)}
  batch = lambda n: sm.Batch(array(T, n, 2), 2 * array(T, n, 1))
  return sm.gaussian(network, 0.5), sm.by_layer(params), params, sm.Task(batch(N), batch(N + 2))


def zeros():
  return jax.tree.map(lambda p: jnp.zeros((T, *p.shape)), problem()[2])


@functools.cache
def optimum(frozen=()):
  """jit of (log_sigma2, start, steps) -> (phi, z [T], val loss, norm): Newton on all of l_MAP."""
  likelihood, labels, params, tasks = problem()
  unravel = ravel_pytree((params, zeros()))[1]

  def thetas_of(phi, z, log_sigma2):
    scale = {m: 0.0 if m in frozen else jnp.exp(0.5 * log_sigma2[m]) for m in log_sigma2}
    return jax.tree.map(lambda label, p, v: p + scale[label] * v, labels, phi, z)

  def loss(v, log_sigma2):
    phi, z = unravel(v)
    thetas = thetas_of(phi, z, log_sigma2)
    log_p = sm.log_predictive(likelihood, thetas, tasks.train) + PRIOR(phi)
    return -log_p + 0.5 * optax.tree.norm(z, squared=True)

  def newton(log_sigma2, start, steps):
    def step(_, v):
      g, h = jax.grad(loss)(v, log_sigma2), jax.hessian(loss)(v, log_sigma2)
      values, vectors = jnp.linalg.eigh(h)
      p = vectors @ ((vectors.T @ g) / jnp.maximum(jnp.abs(values), 1e-3))
      rates = 0.5 ** jnp.arange(0, 20)
      trial = jax.vmap(lambda r: loss(v - r * p, log_sigma2))(rates)
      # Close to the end the loss no longer tells the rates apart.
      return v - jnp.where(jnp.linalg.norm(g) < 1e-6, 1.0, rates[jnp.argmin(trial)]) * p

    v = jax.lax.fori_loop(0, steps, step, ravel_pytree(start)[0])
    phi, z = unravel(v)
    thetas = thetas_of(phi, z, log_sigma2)
    nll = jax.vmap(lambda th, b: -sm.log_likelihood(likelihood, th, b) / (N + 2))
    return phi, z, jnp.mean(nll(thetas, tasks.val)), jnp.linalg.norm(jax.grad(loss)(v, log_sigma2))

  return jax.jit(newton)


@functools.cache
def learner_for(sigma_gradient, frozen=(), batching="vmap"):
  """(the learner, its meta-gradient under jit)."""
  likelihood, labels, _, _ = problem()
  init_sigma = {"body": 0.4, "head": 0.8} | dict.fromkeys(frozen, 0.0)
  learner = sm.sigma_reptile(
    likelihood,
    labels,
    inner=MODE,
    implicit=CG,
    init_sigma=init_sigma,
    log_p_phi=PRIOR,
    sigma_gradient=sigma_gradient,
    batching=batching,
  )
  return learner, jax.jit(learner.meta_gradient)


@pytest.mark.parametrize("frozen, batching", (((), "vmap"), (("body",), "sequential")))
def test_joint_gradient_is_that_of_the_two_level_optimum(frozen, batching):
  tasks = problem()[3]
  learner, run = learner_for("joint", frozen, batching)
  state = learner.init(problem()[2])
  log_sigma2 = {m: jnp.asarray(2 * np.log(s)) for m, s in (("body", 0.4), ("head", 0.8))}
  phi, z, loss, norm = optimum(frozen)(log_sigma2, (state.phi, zeros()), 60)
  assert float(norm) < 1e-10
  start = learner.no_start(state, T)  # the modes next to this optimum, which has others
  state = state._replace(phi=phi)
  start = start._replace(z=moving(z, learner.labels, frozenset(frozen)))
  grad, metrics = run(state, tasks, None, start)
  np.testing.assert_allclose(metrics.loss, loss, rtol=1e-9)
  assert bool(jnp.all(metrics.solve.converged)) and int(metrics.num_failed) == 0
  h = 1e-4
  for module in log_sigma2:
    if module in frozen:
      assert float(grad.log_sigma2[module]) == 0.0
      continue
    at = lambda k, module=module: float(
      optimum(frozen)(log_sigma2 | {module: log_sigma2[module] + k * h}, (phi, z), 6)[
        2
      ]  # from a neighbour it needs three
    )
    difference = (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * h)
    np.testing.assert_allclose(grad.log_sigma2[module], difference, rtol=1e-6)
  if batching == "vmap":  # the three are three: else this test could not tell them apart
    head = {"joint": float(grad.log_sigma2["head"])}
    for name in ("per_task", "diagonal"):
      other = learner_for(name)[1](state, tasks, None, start)[0]
      head[name] = float(other.log_sigma2["head"])
    assert abs(head["per_task"] / head["joint"] - 1) > 1e-3
    assert abs(head["per_task"] / head["diagonal"] - 1) > 1e-3


@pytest.mark.parametrize("where", ("train", "val"))
def test_a_failed_task_is_left_out_of_the_joint_solve(where):
  likelihood, labels, params, tasks = problem()
  learner, run = learner_for("joint")
  state = learner.init(params)
  rest = jax.tree.map(lambda x: x[1:], tasks)
  part = getattr(tasks, where)
  part = part._replace(targets=part.targets.at[0, 0].set(jnp.nan))
  broken = tasks._replace(**{where: part})
  grad, metrics = run(state, broken, None, learner.no_start(state, T))
  want, _ = run(state, rest, None, learner.no_start(state, T - 1))
  assert int(metrics.num_failed) == 1
  chex.assert_trees_all_close(grad, want, rtol=1e-8)


def test_choices_are_checked():
  likelihood, labels, _, _ = problem()
  with pytest.raises(ValueError, match="sigma_gradient must be"):
    sm.sigma_reptile(likelihood, labels, sigma_gradient="exact")
  with pytest.raises(TypeError, match="sigma_gradient"):
    sm.sigma_imaml(likelihood, labels, sigma_gradient="joint")
