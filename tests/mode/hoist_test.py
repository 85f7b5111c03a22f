"""The cut program has the values and gradients of the whole one, and keeps only what it needs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shrinkmeta.mode.hoist import hoist

pytestmark = pytest.mark.usefixtures("x64")


def problem():
  keys = jax.random.split(jax.random.key(0), 4)
  body = jax.random.normal(keys[0], (7, 6))
  head = {"w": jax.random.normal(keys[1], (6, 3)), "b": jax.random.normal(keys[2], (3,))}
  return body, head, jax.random.normal(keys[3], (5, 7))


def features(body, x):
  return jax.nn.relu(jnp.tanh(x @ body) + 1.0)


def whole(body, head, x):
  return features(body, x) @ head["w"] + head["b"] + x.sum()


def count(jaxpr, name):
  """Equations called `name`, those of inner programs too."""
  total = sum(eqn.primitive.name == name for eqn in jaxpr.eqns)
  for eqn in jaxpr.eqns:
    for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "jaxpr")):
      total += count(value.jaxpr, name) if hasattr(value, "jaxpr") else 0
  return total


@pytest.mark.parametrize("compiled", (False, True))
def test_value_for_other_parameters_and_what_is_left_to_do(compiled):
  body, head, x = problem()
  f = lambda head, x: whole(body, head, x)
  g, kept = hoist(jax.jit(f) if compiled else f, head, x)
  other = jax.tree.map(lambda v: 2.0 * v - 1.0, head)
  np.testing.assert_allclose(g(other, kept), f(other, x), rtol=1e-15)
  assert sorted(v.shape for v in kept) == [(), (5, 6)]  # the sum of x, and the features
  left = jax.make_jaxpr(g)(other, kept).jaxpr
  assert (count(left, "dot_general"), count(left, "tanh")) == (1, 0)


def test_gradients_pass_through_the_features():
  body, head, x = problem()

  def cut(body, head, x):
    g, kept = hoist(lambda head, x: whole(body, head, x), head, x)
    loop = lambda _, h: jax.tree.map(lambda v: v + 0.1 * jnp.sum(jnp.sin(g(h, kept))), h)
    return jnp.sum(g(jax.lax.fori_loop(0, 3, loop, head), kept) ** 2)

  def plain(body, head, x):
    loop = lambda _, h: jax.tree.map(lambda v: v + 0.1 * jnp.sum(jnp.sin(whole(body, h, x))), h)
    return jnp.sum(whole(body, jax.lax.fori_loop(0, 3, loop, head), x) ** 2)

  got = jax.jit(jax.grad(cut, (0, 1, 2)))(body, head, x)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9),
    got,
    jax.grad(plain, (0, 1, 2))(body, head, x),
  )


def test_under_vmap_shared_values_have_no_task_axis():
  body, head, x = problem()
  many = jnp.stack([x, 2.0 * x])

  def one(body, x):
    g, kept = hoist(lambda head, x: features(body, x) @ head["w"] @ body.T[:3], head, x)
    return g(head, kept)

  jaxpr = jax.make_jaxpr(jax.vmap(one, (None, 0)))(body, many).jaxpr
  dots = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "dot_general"]
  assert len(dots) == 3
  assert all(not eqn.params["dimension_numbers"][1][0] for eqn in dots)  # no batched product
  want = jnp.stack([features(body, v) @ head["w"] @ body.T[:3] for v in many])
  np.testing.assert_allclose(jax.vmap(one, (None, 0))(body, many), want, rtol=1e-13)


def test_a_function_called_twice_is_cut_each_time_by_its_own_arguments():
  body, head, x = problem()
  layer = jax.jit(lambda w, x: jnp.tanh(x @ w))
  f = lambda head, x: layer(head["w"], layer(body, x)) + layer(body, x)[:, :3]
  g, kept = hoist(f, head, x)
  np.testing.assert_allclose(g(head, kept), f(head, x), rtol=1e-15)
  assert count(jax.make_jaxpr(g)(head, kept).jaxpr, "dot_general") == 1


def test_what_a_scalar_fills_is_not_kept():
  _, head, x = problem()
  f = lambda head, x: jnp.full((5, 3), jnp.sum(x)) * head["b"] + jnp.arange(3.0)
  g, kept = hoist(f, head, x)
  np.testing.assert_allclose(g(head, kept), f(head, x), rtol=1e-15)
  assert [v.shape for v in kept] == [()]


def test_nothing_to_cut_and_everything_cut():
  body, head, x = problem()
  g, kept = hoist(lambda head, x: x @ head["w"], {"w": body}, x)
  np.testing.assert_array_equal(g({"w": body}, kept), x @ body)
  g, kept = hoist(lambda head, x: features(body, x), head, x)
  np.testing.assert_array_equal(g(head, kept), features(body, x))
  assert len(kept) == 1


def test_another_structure_is_an_error():
  body, head, x = problem()
  g, kept = hoist(lambda head, x: whole(body, head, x), head, x)
  with pytest.raises(ValueError, match="Expected parameters"):
    g({"w": head["w"]}, kept)
