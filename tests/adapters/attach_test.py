"""Networks with attached adapters equal networks with merged ones, and copy no kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shrinkmeta.adapters import lora
from tests.adapters.networks import KEY, NAMES, close, networks, problem, random_like


def subjaxprs(jaxpr):
  """A jaxpr and all that its equations hold."""
  yield jaxpr
  for eqn in jaxpr.eqns:
    for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        yield from subjaxprs(inner)


def shapes(jaxpr):
  return {v.aval.shape for j in subjaxprs(jaxpr) for eqn in j.eqns for v in eqn.outvars}


@pytest.mark.parametrize("name", NAMES)
def test_attached_equals_merged_in_float32(name):
  predict, params, x, adapters = problem(name)

  @jax.jit
  def outputs():
    merged = lora.merge(params, adapters, alpha=3.0)
    got = lora.attach(predict, alpha=3.0)(adapters, x, params)
    return got, predict(merged, x), predict(params, x)

  got, want, base = outputs()
  close(got, want, jnp.float32)
  assert jnp.abs(got - base).max() > 1e-2  # the adapters do something


@pytest.mark.parametrize("name", NAMES)
def test_derivatives_equal_those_of_the_merged_network(name, x64):
  predict, params, x, adapters = problem(name, jnp.float64)
  attached, direction = lora.attach(predict), random_like(adapters, seed=8)

  def results(outputs):
    loss = lambda adapters, x: jnp.sum(jnp.sin(outputs(adapters, x)))
    gradient = jax.grad(loss, (0, 1))
    square = lambda a: sum(jnp.sum(g**2) for g in jax.tree.leaves(gradient(a, x)))
    first, second = jax.jvp(lambda a: gradient(a, x), (adapters,), (direction,))
    third = jax.grad(square)(adapters) if name in ("dense", "linen scan") else ()
    return outputs(adapters, x), first, second, third

  @jax.jit
  def both():
    merged = lambda a, x: predict(lora.merge(params, a), x)
    return results(lambda a, x: attached(a, x, params)), results(merged)

  close(*both(), jnp.float64)


@pytest.mark.parametrize("name", ["dense", "nnx", "linen scan"])
def test_adapters_at_the_start_change_nothing(name):
  predict, params, x, rules = networks(jnp.float32)[name]()
  adapters = lora.init(KEY, params, rules)
  got, want = jax.jit(lambda: (lora.attach(predict)(adapters, x, params), predict(params, x)))()
  if "scan" in name:  # the base's loop and the adapted one round differently
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)
  else:
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", NAMES)
def test_no_task_has_a_copy_of_a_kernel(name):
  predict, params, x, adapters = problem(name)
  num_tasks = 11  # no other size
  many = jax.tree.map(lambda a: np.stack([a * (1 + t) for t in range(num_tasks)]), adapters)
  attached = lora.attach(predict)
  loss = lambda a, x, params: jnp.sum(attached(a, x, params) ** 2)

  def products(a, x, params):  # a gradient and a product with the Hessian
    return jax.jvp(lambda a: jax.grad(loss)(a, x, params), (a,), (a,))

  tasks = jax.vmap(products, (0, None, None))
  factors = {x.shape[1:] for x in jax.tree.leaves(many)}
  kernels = {x.shape for x in jax.tree.leaves(params) if x.ndim > 1}
  kernels |= {shape[1:] for shape in kernels if name in ("plain", "linen scan", "nnx scan")}
  kernels -= {k for k in kernels for f in factors if sorted(k) == sorted(f)}
  assert kernels
  sizes = {int(np.prod(shape)) * num_tasks for shape in kernels}
  found = shapes(jax.make_jaxpr(tasks)(many, x, params).jaxpr)
  assert any(shape[:1] == (num_tasks,) for shape in found)
  for shape in found:
    copy = any(sorted(shape) == sorted((num_tasks, *kernel)) for kernel in kernels)
    assert not copy, shape
  merged = jax.vmap(lambda a: predict(lora.merge(params, a), x))
  assert sizes & {int(np.prod(s)) for s in shapes(jax.make_jaxpr(merged)(many).jaxpr)}


def test_vmap_over_tasks_is_a_loop():
  predict, params, x, adapters = problem("dense")
  many = jax.tree.map(lambda a: jnp.stack([a, 2.0 * a]), adapters)
  attached = lora.attach(predict)
  got = jax.jit(jax.vmap(attached, (0, None, None)))(many, x, params)
  for t in range(2):
    close(got[t], attached(jax.tree.map(lambda a, t=t: a[t], many), x, params), jnp.float32)


def test_kernels_with_the_output_first():
  w, bias = random_like(jnp.ones([5, 5])), jnp.ones([5])
  predict = lambda params, x: params["w"] @ x + params["bias"]  # one example, as in equinox
  params = {"w": w, "bias": bias}
  adapters = random_like(lora.init(KEY, params, {"w": (2, "oi")}))
  a, b = adapters["w"]["A"], adapters["w"]["B"]  # [2, 5], [5, 2]
  x = jnp.arange(5.0)
  want = (w + 0.5 * b @ a) @ x + bias
  np.testing.assert_allclose(lora.attach(predict, alpha=1.0)(adapters, x, params), want, rtol=1e-5)


@pytest.mark.parametrize("shape", ((4, 1), (1, 6), (1, 1)))
@pytest.mark.parametrize("spec", ("HWIO", "HWOI"))
def test_a_dense_kernel_of_one_channel_as_a_convolution(shape, spec):
  """reshape cannot know which side an axis of size 1 belongs to."""

  def predict(params, x):
    window = params["w"][None, None]
    return jax.lax.conv_general_dilated(
      x, window, (1, 1), "SAME", dimension_numbers=("NHWC", spec, "NHWC")
    )

  params = {"w": random_like(jnp.ones(shape))}
  adapters = random_like(lora.init(KEY, params, {"w": 1}), seed=2)
  x = random_like(jnp.ones([2, 3, 3, shape[spec.index("I") - 2]]), seed=3)
  want = predict(lora.merge(params, adapters), x)
  np.testing.assert_allclose(lora.attach(predict)(adapters, x, params), want, rtol=1e-5, atol=1e-6)


def test_precision_follows_the_network():
  predict, params, x, adapters = problem("dense")
  small = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
  got = lora.attach(predict)(adapters, x.astype(jnp.bfloat16), small)
  assert got.dtype == jnp.bfloat16
  want = lora.attach(predict)(adapters, x, params)
  np.testing.assert_allclose(got.astype(jnp.float32), want, atol=0.05)
  cast = lambda params, x: predict(jax.tree.map(lambda p: p.astype(jnp.bfloat16), params), x)
  found = jax.make_jaxpr(lora.attach(cast))(adapters, x.astype(jnp.bfloat16), params).jaxpr
  products = [e for j in subjaxprs(found) for e in j.eqns if e.primitive.name == "dot_general"]
  assert len(products) == 6
  assert all(v.aval.dtype == jnp.bfloat16 for e in products for v in e.invars)


W = {"w": jnp.ones([3, 3]), "v": jnp.ones([3, 3])}


@pytest.mark.parametrize(
  ("predict", "use"),
  [
    (lambda p, x: x @ (p["w"] * 2.0), "`mul`"),
    (lambda p, x: p["w"][jnp.array([0, 2])] @ x.T, "`gather`"),
    (lambda p, x: jnp.linalg.norm(p["w"]) * x, "`mul`"),
    (lambda p, x: x @ p["w"].reshape(9)[:3], "a reshape .* across its two sides"),
    (lambda p, x: x @ (p["v"] @ p["w"]), "`dot_general` together with the adapted kernel"),
    (lambda p, x: x @ jnp.broadcast_to(p["w"], (2, 3, 3))[0], "a broadcast"),
    (lambda p, x: x @ jax.lax.stop_gradient(p["w"]), "`stop_gradient`"),
    (lambda p, x: jax.jit(lambda w: x @ jnp.exp(w))(p["w"]), "`exp`"),
    (
      lambda p, x: jax.lax.scan(lambda w, _: (w.T, x @ w), p["w"], None, 2)[1],
      "the carry of a loop",
    ),
    (
      lambda p, x: jax.lax.cond(True, lambda w: w, lambda w: w.T, p["w"]) @ x.T,
      "outputs of a branch",
    ),
  ],
)
def test_uses_that_are_not_followed(predict, use):
  adapters = lora.init(KEY, W, {"w": 1, "v": 1})
  with pytest.raises(
    ValueError, match=rf"The adapted kernel '[vw]' enters .*{use}.*Leave '[vw]' out"
  ):
    lora.attach(predict)(adapters, jnp.ones([2, 3]), W)


def test_while_and_unused_results():
  def predict(params, x):
    unused = params["w"] ** 2  # no output needs it
    del unused
    go_on = lambda c: jnp.sum(c[0] @ c[1]) < 100.0
    return jax.lax.while_loop(
      go_on, lambda c: (c[0] @ c[1] + params["v"][0, 0], c[1]), (x, params["w"])
    )[0]

  adapters = random_like(lora.init(KEY, W, {"w": 1}))
  x = jnp.ones([2, 3])
  got = lora.attach(predict)(adapters, x, W)
  np.testing.assert_allclose(got, predict(lora.merge(W, adapters), x), rtol=1e-5)


def test_kernels_without_a_product():
  adapters = lora.init(KEY, W, {"w": 1, "v": 1})
  with pytest.raises(ValueError, match="uses the adapted kernel 'v' in no product"):
    lora.attach(lambda p, x: x @ p["w"])(adapters, jnp.ones([2, 3]), W)
  with pytest.raises(ValueError, match="returns the adapted kernel 'v'"):
    predict = lambda p, x: (x @ p["w"] @ p["v"], p["v"])
    lora.attach(predict)(adapters, jnp.ones([2, 3]), W)


def test_equinox():
  eqx = pytest.importorskip("equinox", reason="equinox is not installed")
  one, two = jax.random.split(KEY)
  net = [eqx.nn.Conv2d(3, 5, 3, groups=1, key=one), eqx.nn.MLP(5, 2, 7, 2, key=two)]
  params, static = eqx.partition(net, eqx.is_inexact_array)

  def predict(params, x):
    conv, mlp = eqx.combine(params, static)
    return jax.vmap(lambda x: mlp(jnp.tanh(conv(x)).mean((1, 2))))(x)

  rules = {"^0/weight": (2, "oiii"), "layers/.*weight": (2, "oi")}
  adapters = random_like(lora.init(KEY, params, rules))
  x = random_like(jnp.ones([4, 3, 6, 6]))
  got = lora.attach(predict)(adapters, x, params)
  np.testing.assert_allclose(got, predict(lora.merge(params, adapters), x), atol=1e-5)
  assert jnp.abs(got - predict(params, x)).max() > 1e-2


def test_haiku():
  hk = pytest.importorskip("haiku", reason="dm-haiku is not installed")
  net = lambda x: hk.nets.MLP([7, 2])(jnp.tanh(hk.Conv2D(5, 3)(x)).mean((1, 2)))
  net = hk.without_apply_rng(hk.transform(net))
  x = random_like(jnp.ones([4, 6, 6, 3]))
  params = net.init(KEY, x)
  adapters = random_like(lora.init(KEY, params, {"/w$": 2}))
  got = lora.attach(net.apply)(adapters, x, params)
  np.testing.assert_allclose(got, net.apply(lora.merge(params, adapters), x), atol=1e-5)
  assert jnp.abs(got - net.apply(params, x)).max() > 1e-2


def test_scopes_and_modules_keep_their_names():
  from flax import linen as nn

  class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
      with jax.named_scope("first_half"):
        x = jnp.tanh(nn.Dense(4, name="inner")(x))
      return nn.Dense(2, name="outer")(x)

  net, x = Network(), jnp.ones([3, 5])
  params = net.init(KEY, x)["params"]
  adapters = random_like(lora.init(KEY, params, {"kernel": 1}))
  attached = lora.attach(lambda p, x: net.apply({"params": p}, x))
  text = jax.jit(attached).lower(adapters, x, params).as_text(debug_info=True)
  for name in ("first_half/inner/dot_general", "outer/dot_general"):
    assert name in text
