import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import shrinkmeta as sm
from shrinkmeta.adapters import lora

KEY = jax.random.key(0)


def random_like(tree, seed=1, scale=0.3):
  """A tree of normal numbers with the shapes and dtypes of `tree`."""
  leaves, structure = jax.tree.flatten(tree)
  keys = jax.random.split(jax.random.key(seed), len(leaves))
  draws = [
    scale * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)
  ]
  return jax.tree.unflatten(structure, draws)


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


class Dense(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(3, name="head")(nn.tanh(nn.Dense(7, name="body")(x)))


class ConvNet(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.tanh(nn.Conv(6, (3, 3), strides=2, name="conv_0")(x))
    x = nn.tanh(nn.Conv(8, (3, 3), feature_group_count=2, name="grouped")(x))
    x = nn.tanh(nn.ConvTranspose(4, (2, 2), name="up")(x))
    x = nn.tanh(nn.ConvTranspose(4, (2, 2), transpose_kernel=True, name="turned")(x))
    return nn.Dense(2, name="head")(x.mean((1, 2)))


class Attention(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = x + nn.MultiHeadDotProductAttention(2, name="attention")(x)
    return nn.Conv(3, (3,), name="conv")(x)


class Stacked(nn.Module):
  @nn.compact
  def __call__(self, x):
    layer = nn.remat(Layer)
    scanned = nn.scan(layer, {"params": 0}, split_rngs={"params": True}, length=3)
    return scanned(name="layers")(x, None)[0]


class Layer(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    return x + nn.tanh(nn.Dense(5, name="dense")(x)), None


class Mlp(nnx.Module):
  def __init__(self, rngs):
    self.body = nnx.Linear(5, 7, rngs=rngs)
    self.layers = nnx.List([nnx.Linear(7, 7, rngs=rngs) for _ in range(2)])
    self.head = nnx.Linear(7, 3, rngs=rngs)

  def __call__(self, x):
    x = jnp.tanh(self.body(x))
    for layer in self.layers:
      x = jnp.tanh(layer(x))
    return self.head(x)


@nnx.split_rngs(splits=3)
@nnx.vmap
def nnx_layers(rngs):
  return nnx.Linear(5, 5, rngs=rngs)


def linen(net, x, rules):
  params = random_like(net.init(KEY, x), seed=2)
  return lambda params, x: net.apply(params, x), params, x, rules


def by_nnx(dtype):
  graph, params = nnx.split(Mlp(nnx.Rngs(0)), nnx.Param)
  params = jax.tree.map(lambda x: x.astype(dtype), params)
  predict = lambda params, x: nnx.merge(graph, params, copy=True)(x)
  return predict, params, jnp.ones([4, 5], dtype), {"body/kernel": 2, r"layers/\d/kernel": 3}


def nnx_scan(dtype):
  graph, params = nnx.split(nnx_layers(nnx.Rngs(0)), nnx.Param)
  params = jax.tree.map(lambda x: x.astype(dtype), params)

  def predict(params, x):
    step = nnx.scan(
      lambda x, layer: x + jnp.tanh(layer(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
    )
    return step(x, nnx.merge(graph, params, copy=True))

  return predict, params, jnp.ones([4, 5], dtype), {"kernel": 2}


def plain(dtype):
  """A kernel moves and multiplies in every way that is followed."""

  @jax.custom_jvp
  def custom(x, w):
    return x @ w

  custom.defjvp(lambda p, t: (custom(*p), t[0] @ p[1] + p[0] @ t[1]))
  other = jax.custom_vjp(lambda x, w: x @ w)
  other.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, c: (c @ r[1].T, r[0].T @ c))

  def predict(params, x):
    w, layers = params["w"], jnp.copy(params["layers"])  # [6, 6], [3, 6, 6]
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    w = jax.lax.with_sharding_constraint(jax.lax.optimization_barrier(w), device)
    positive, index = x.sum() > 0, jnp.argmax(x[0]) % 3
    x = jnp.tanh(custom(x, w) + other(x, w.T))
    x = jnp.tanh(jnp.einsum("oi,ni->no", w, x) + x @ w[::-1, :])
    x = jnp.tanh(jax.checkpoint(lambda x: x @ w.reshape(2, 3, 1, 6).reshape(6, 6))(x))
    x = jnp.tanh(jax.lax.scan(lambda x, w: (jax.jit(jnp.dot)(jnp.tanh(x), w), None), x, layers)[0])
    x = jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=2)[0]
    x = x + jnp.einsum("lnd,lde->ne", jnp.stack([x] * 3), layers) @ layers[1]
    x = jax.lax.cond(positive, lambda x, w: x @ w, lambda x, w: x @ w.T, x, w)
    q, k = jnp.split(w, 2, 1)
    x = jnp.tanh(jnp.concatenate([x @ q, jnp.dot(x, k[None])[:, 0]], -1))
    return jnp.tanh(x @ layers[index]) @ w[:, :2]

  params = {"w": jnp.zeros([6, 6], dtype), "layers": jnp.zeros([3, 6, 6], dtype)}
  return (
    predict,
    random_like(params, 3),
    random_like(jnp.ones([4, 6], dtype)),
    {"w": 2, "layers": 1},
  )


def networks(dtype):
  images = random_like(jnp.ones([2, 6, 6, 4], dtype), seed=5, scale=1.0)
  vectors = random_like(jnp.ones([4, 5], dtype), seed=6, scale=1.0)
  words = random_like(jnp.ones([2, 5, 4], dtype), seed=7, scale=1.0)
  heads = {"(query|key|value)/kernel": (2, "ioo"), "(out|conv)/kernel": (2, "iio")}
  return {
    "dense": lambda: linen(Dense(), vectors, {"kernel": 2}),
    "conv": lambda: linen(ConvNet(), images, {"kernel": 2}),
    "attention": lambda: linen(Attention(), words, heads),
    "linen scan": lambda: linen(Stacked(), vectors, {"kernel": 2}),
    "nnx": lambda: by_nnx(dtype),
    "nnx scan": lambda: nnx_scan(dtype),
    "plain": lambda: plain(dtype),
  }


NAMES = tuple(networks(jnp.float32))


def problem(name, dtype=jnp.float32):
  """(predict, params, inputs, adapters with B away from 0)."""
  predict, params, x, rules = networks(dtype)[name]()
  params = jax.tree.map(lambda p: p.astype(dtype), params)
  return predict, params, x, random_like(lora.init(KEY, params, rules), seed=4)


def close(got, want, dtype):
  tolerance = 1e-12 if dtype == jnp.float64 else 1e-5
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    scale = max(1.0, float(jnp.abs(b).max()))
    np.testing.assert_allclose(a / scale, b / scale, rtol=0, atol=tolerance)


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
  got, want = lora.attach(predict)(adapters, x, params), predict(params, x)
  if "scan" in name:  # the base's loop and the adapted one round differently
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)
  else:
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", NAMES)
def test_no_task_has_a_copy_of_a_kernel(name):
  predict, params, x, adapters = problem(name)
  num_tasks = 11  # no other size
  many = jax.tree.map(lambda a: jnp.stack([a * (1 + t) for t in range(num_tasks)]), adapters)
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


def test_a_is_orthonormal_and_b_is_zero():
  params = {
    "dense": jnp.ones([9, 4]),
    "conv": jnp.ones([3, 3, 2, 5]),
    "layers": jnp.ones([2, 6, 4]),
  }
  params |= {"torch": jnp.ones([4, 9]), "heads": jnp.ones([6, 2, 3]), "bias": jnp.ones([4])}
  rules = {"torch": (3, "oi"), "heads": (2, "ioo"), "dense|conv|layers": 3}
  adapters = lora.init(KEY, params, rules)
  assert jax.tree.map(jnp.shape, adapters) == {
    "dense": {"A": (9, 3), "B": (3, 4)},
    "conv": {"A": (3, 3, 2, 3), "B": (3, 5)},
    "layers": {"A": (2, 6, 3), "B": (2, 3, 4)},
    "torch": {"A": (3, 9), "B": (4, 3)},
    "heads": {"A": (6, 2), "B": (2, 2, 3)},
  }
  assert not any(kernel["B"].any() for kernel in adapters.values())
  flat = lambda a: a.reshape(-1, a.shape[-1])
  for a in (adapters["dense"]["A"], flat(adapters["conv"]["A"]), adapters["torch"]["A"].T):
    np.testing.assert_allclose(a.T @ a, np.eye(3), atol=1e-6)
  first, second = adapters["layers"]["A"]
  np.testing.assert_allclose(second.T @ second, np.eye(3), atol=1e-6)
  assert jnp.abs(first - second).max() > 0.1
  b = random_like(adapters["conv"]["B"])
  merged = lora.merge({"conv": params["conv"]}, {"conv": {**adapters["conv"], "B": b}}, alpha=6.0)
  norm = jnp.linalg.norm(merged["conv"] - params["conv"])  # |Delta W| = (alpha / r) |B|
  np.testing.assert_allclose(norm, 2.0 * jnp.linalg.norm(b), rtol=1e-5)
  halves = lora.init(KEY, params, {"dense": 3}, dtype=jnp.bfloat16)["dense"]
  assert halves["A"].dtype == halves["B"].dtype == jnp.bfloat16


def test_kernels_with_the_output_first():
  w, bias = random_like(jnp.ones([5, 5])), jnp.ones([5])
  predict = lambda params, x: params["w"] @ x + params["bias"]  # one example, as in equinox
  params = {"w": w, "bias": bias}
  adapters = random_like(lora.init(KEY, params, {"w": (2, "oi")}))
  a, b = adapters["w"]["A"], adapters["w"]["B"]  # [2, 5], [5, 2]
  x = jnp.arange(5.0)
  want = (w + 0.5 * b @ a) @ x + bias
  np.testing.assert_allclose(lora.attach(predict, alpha=1.0)(adapters, x, params), want, rtol=1e-5)


def test_held_a_is_a_constant():
  predict, params, x, adapters = problem("dense")
  moving, fixed = lora.hold_A(adapters)
  assert jax.tree.leaves(lora.labels(moving)) == ["params/body/kernel", "params/head/kernel"]
  got = lora.attach(predict)(moving, x, lora.Base(params, fixed))
  np.testing.assert_array_equal(got, lora.attach(predict)(adapters, x, params))
  for one, two in zip(
    jax.tree.leaves(lora.merge(lora.Base(params, fixed), moving)),
    jax.tree.leaves(lora.merge(params, adapters)),
    strict=True,
  ):
    np.testing.assert_array_equal(one, two)
  with pytest.raises(ValueError, match=r"'params/body/kernel' has no 'A'.*lora.Base"):
    lora.attach(predict)(moving, x, params)
  with pytest.raises(ValueError, match="Both trees of adapters have 'B'"):
    lora.join(moving, moving)


def test_labels_name_kernels_and_layers():
  predict, params, x, adapters = problem("linen scan")
  split = lora.split_layers(adapters)
  kernel = "params/layers/dense/kernel"
  assert set(jax.tree.leaves(lora.labels(adapters))) == {kernel}
  assert set(jax.tree.leaves(lora.labels(split))) == {f"{kernel}/[{n}]" for n in range(3)}
  assert lora.labels(split) == sm.by_layer(split)
  rules = {r"\[0\]": "first", ".*": "rest"}
  assert set(jax.tree.leaves(sm.by_path(split, rules))) == {"first", "rest"}
  assert jax.tree.leaves(lora.labels(adapters, train_A=False)) == ["A", kernel]
  np.testing.assert_array_equal(
    lora.attach(predict)(split, x, params), lora.attach(predict)(adapters, x, params)
  )
  stacked = lora.stack_layers(split)
  jax.tree.map(np.testing.assert_array_equal, stacked, adapters)
  del split["params"]["layers"]["dense"]["kernel"]["[1]"]
  with pytest.raises(ValueError, match=r"layers \[0, 2\]; expected every layer"):
    lora.attach(predict)(split, x, params)


def test_a_learner_moves_adapters_only():
  predict, params, x, _ = problem("dense")
  adapters = lora.init(KEY, params, {"kernel": 2})
  attached = lora.attach(predict)
  likelihood = sm.gaussian(lambda theta, x: attached(theta, x, params), 0.1)
  batch = sm.Batch(jnp.stack([x] * 2), jnp.stack([jnp.ones([4, 3]), -jnp.ones([4, 3])]))
  learner = sm.sigma_maml(likelihood, lora.labels(adapters))
  state = learner.init(adapters)
  state, metrics = jax.jit(learner.update)(state, sm.Task(batch, batch))
  assert sorted(state.log_sigma2) == ["params/body/kernel", "params/head/kernel"]
  assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(state.phi))


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


@pytest.mark.parametrize(
  ("rules", "error", "message"),
  [
    ({"kernel": 2}, ValueError, r"rule 'kernel' finds no path.*\['a', 'bias', 'deep'\]"),
    ({"^a": 1, "a$": 2}, ValueError, r"rule 'a\$' finds only paths that earlier rules take"),
    ({"bias": 1}, ValueError, r"finds 'bias', which is no kernel.*\(3,\)"),
    ({"a": 0}, ValueError, "must be a rank >= 1"),
    ({"a": True}, ValueError, "must be a rank >= 1"),
    ({"a": 4}, ValueError, "wants rank 4.*5 inputs and 3 outputs"),
    ({"a": (1, "iio")}, ValueError, "one letter for each axis"),
    ({"a": (1, "xy")}, ValueError, "one letter for each axis"),
    ({"deep": 1}, ValueError, r"shape \(2, 2, 2, 2, 2\)"),
    ({}, TypeError, "rules must be a dict"),
    (3, TypeError, "rules must be a dict"),
  ],
)
def test_wrong_rules(rules, error, message):
  params = {"a": jnp.ones([5, 3]), "bias": jnp.ones([3]), "deep": jnp.ones([2] * 5)}
  with pytest.raises(error, match=message):
    lora.init(KEY, params, rules)


def test_wrong_adapters():
  x, adapters = jnp.ones([2, 3]), lora.init(KEY, W, {"w": 1})
  attached = lora.attach(lambda p, x: x @ p["w"])
  with pytest.raises(ValueError, match="'other', which constants lack"):
    attached({"other": adapters["w"]}, x, W)
  with pytest.raises(ValueError, match="'other', which params lack"):
    lora.merge(W, {"other": adapters["w"]})
  with pytest.raises(ValueError, match=r"w/A \(4, 1\) and w/B \(1, 3\) do not fit the kernel"):
    attached({"w": {"A": jnp.ones([4, 1]), "B": jnp.ones([1, 3])}}, x, W)
  with pytest.raises(ValueError, match="they share no rank"):
    attached({"w": {"A": jnp.ones([3, 1]), "B": jnp.ones([2, 4])}}, x, W)
  with pytest.raises(ValueError, match="for the adapters of T tasks use jax.vmap"):
    attached(jax.tree.map(lambda a: jnp.stack([a] * 4), adapters), x, W)
  with pytest.raises(TypeError, match="adapters must be a dict nested by path.*got ArrayImpl"):
    attached(jnp.ones([3]), x, W)
  with pytest.raises(TypeError, match="constants/act is no array.*eqx.partition"):
    attached(adapters, x, {**W, "act": jnp.tanh})
  with pytest.raises(ValueError, match='"A" is the module of every A'):
    lora.labels({"A": adapters["w"]}, train_A=False)
  with pytest.raises(TypeError, match="alpha must be a number"):
    lora.merge(W, adapters, alpha="1")
  with pytest.raises(TypeError, match="predict must be a function"):
    lora.attach(W)


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
