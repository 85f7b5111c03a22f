"""The implicit gradient of adapters, and what a large base as constants adds to an update."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shrinkmeta as sm


def _differences(f, at, direction, step=1e-4):
  """The derivative of f along a direction, by differences of fourth order."""
  move = lambda s: f(jax.tree.map(lambda a, b: a + s * b, at, direction))
  centre = lambda h: (move(h) - move(-h)) / (2 * h)
  return (4 * centre(step) - centre(2 * step)) / 3


@pytest.mark.parametrize("held", [True, False], ids=["A held", "A and B"])
def test_the_implicit_gradient_is_that_of_differences(held, x64):
  keys = jax.random.split(jax.random.key(0), 8)
  normal = lambda key, *shape: jax.random.normal(key, shape, jnp.float64)
  base = {"in": {"kernel": normal(keys[0], 4, 6) / 2}, "out": {"kernel": normal(keys[1], 6, 2) / 2}}
  network = lambda p, x: jnp.tanh(x @ p["in"]["kernel"]) @ p["out"]["kernel"]
  x = normal(keys[2], 3, 16, 4)
  y = network(base, x) + 0.3 * normal(keys[3], 3, 16, 2)
  tasks = sm.Task(sm.Batch(x[:, :8], y[:, :8]), sm.Batch(x[:, 8:], y[:, 8:]))

  drawn = sm.lora.init(keys[4], base, {"kernel": 2})
  leaves, tree = jax.tree.flatten(drawn)
  moved = [a + 0.1 * normal(k, *a.shape) for a, k in zip(leaves, keys[5:], strict=False)]
  adapters, constants = jax.tree.unflatten(tree, moved + leaves[len(moved) :]), base
  if held:
    adapters, a = sm.lora.hold_A(adapters)
    constants = sm.lora.Base(base, a)
  learner = sm.sigma_imaml(
    sm.gaussian(sm.lora.attach(network), scale=0.5),
    sm.lora.labels(adapters),
    inner=sm.Inner(optax.sgd(0.05, momentum=0.9), steps=2_000),
    implicit=sm.Implicit(curvature="hessian", tol=1e-13, max_steps=200),
    init_sigma=0.4,
  )
  state = learner.init(adapters, constants=constants)

  @jax.jit
  def loss(at):
    phi, log_sigma2 = at
    metrics = learner.meta_gradient(state._replace(phi=phi, log_sigma2=log_sigma2), tasks)[1]
    return jnp.mean(metrics.val_nll)

  gradient, metrics = jax.jit(learner.meta_gradient)(state, tasks)
  assert float(jnp.max(metrics.mean_inner.grad_norm)) < 1e-9  # at the modes
  at = (state.phi, state.log_sigma2)
  random = np.random.default_rng(0)
  for part in (0, 1):  # phi, log sigma^2
    along = [jax.tree.map(lambda v: jnp.zeros_like(v), one) for one in at]
    along[part] = jax.tree.map(lambda v: jnp.asarray(random.normal(size=v.shape)), at[part])
    want = _differences(loss, at, tuple(along))
    assert abs(want) > 1e-3  # two zeros would agree
    pairs = zip(jax.tree.leaves(tuple(gradient)[:2]), jax.tree.leaves(along), strict=True)
    np.testing.assert_allclose(sum(jnp.sum(g * d) for g, d in pairs), want, rtol=1e-6)


@pytest.mark.parametrize("make", [sm.sigma_imaml, sm.sigma_maml], ids=["implicit", "unrolled"])
def test_a_base_of_20_million_adds_itself_and_little_more(make):
  """By XLA's plan, for shapes alone: 8 tasks, adapters of rank 8 on five kernels."""
  width, depth, tasks = 2_000, 5, 8
  base = {str(n): jax.ShapeDtypeStruct((width, width), jnp.float32) for n in range(depth)}

  def network(params, x):
    for n in range(depth):
      x = jnp.tanh(x @ params[str(n)])
    return x[:, 0]

  draw = lambda base: sm.lora.init(jax.random.key(0), base, {"": 8})
  adapters = jax.eval_shape(draw, base)
  labels, attached = sm.lora.labels(adapters), sm.lora.attach(network)
  example = lambda *shape: jax.ShapeDtypeStruct((tasks, 16, *shape), jnp.float32)
  batch = sm.Batch(example(width), example())

  def learner_of(predict):
    return make(sm.gaussian(predict), labels, inner=sm.Inner(optax.sgd(0.05), steps=10))

  def needed(update, state, *more):
    task = sm.Task(batch, batch)
    plan = sm.program_cost(jax.jit(update, donate_argnums=0).lower(state, task, *more).compile())
    return plan.arguments + plan.temporaries + plan.outputs

  taking = learner_of(attached)
  closing = lambda base: learner_of(lambda theta, x: attached(theta, x, base))
  state = jax.eval_shape(lambda phi, base: taking.init(phi, constants=base), adapters, base)
  with_base = needed(taking.update, state)
  update = lambda state, task, base: closing(base).update(state, task)
  state = jax.eval_shape(lambda phi, base: closing(base).init(phi), adapters, base)
  size = 4 * depth * width**2
  without = needed(update, state, base) - size
  assert size == 80_000_000 and 1_000_000 < without
  assert size < with_base <= size + 1.3 * without
