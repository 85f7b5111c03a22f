import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import shrinkmeta as sm
from experiments.networks import convnet, convolution
from shrinkmeta.curvature.products import curvature_product
from shrinkmeta.curvature.solvers import cg

pytestmark = pytest.mark.usefixtures("x64")


def draw(*shape):
  return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape))


def window_max(x):
  return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


@pytest.mark.parametrize("shape", [(2, 4, 4, 3), (2, 5, 5, 3), (1, 2, 3, 1), (3, 7, 4, 2)])
def test_max_pool_equals_a_window_with_gradients_and_hessian_products(shape):
  x, v = draw(*shape), draw(*shape)[..., ::-1]
  np.testing.assert_array_equal(convnet.max_pool(x), window_max(x))

  def derivatives(pool):
    grad = jax.grad(lambda x: jnp.sum(jnp.sin(pool(x))))
    dot = lambda x: jnp.vdot(grad(x), v)
    every = lambda x: (
      grad(x),
      jax.jvp(grad, (x,), (v,))[1],
      jax.grad(dot)(x),
      jax.jvp(pool, (x,), (v,))[1],
    )
    return jax.jit(every)(x)

  def plain(x):
    h, w = shape[1] // 2, shape[2] // 2
    windows = x[:, : 2 * h, : 2 * w].reshape(shape[0], h, 2, w, 2, shape[3])
    return windows.max((2, 4))

  for ours, theirs in zip(derivatives(convnet.max_pool), derivatives(plain), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-14)
  f = jax.jit(lambda x: jnp.sum(jnp.sin(convnet.max_pool(x))))
  check_grads(f, (x,), 2, eps=1e-5, atol=1e-7, rtol=1e-7)


def test_max_pool_under_vmap_scan_and_checkpoint():
  x = draw(3, 2, 5, 4, 2)
  grad = jax.grad(lambda x: jnp.sum(jnp.sin(convnet.max_pool(x))))
  product = lambda x: jax.jvp(grad, (x,), (jnp.cos(x),))[1]
  loop = jnp.stack([product(a) for a in x])
  np.testing.assert_allclose(jax.vmap(product)(x), loop, rtol=1e-14)
  np.testing.assert_allclose(jax.lax.map(jax.checkpoint(product), x), loop, rtol=1e-14)
  total = lambda x: jnp.sum(jnp.sin(jax.vmap(convnet.max_pool)(x)))
  ours = jax.jvp(jax.grad(total), (x,), (jnp.cos(x),))[1]
  np.testing.assert_allclose(ours, loop, rtol=1e-14)


def test_max_pool_stays_finite_in_second_order_at_ties():
  x = jnp.ones((1, 4, 4, 1))
  grad = jax.jit(jax.grad(lambda x: jnp.sum(jnp.exp(convnet.max_pool(x)))))
  np.testing.assert_allclose(grad(x), np.full(x.shape, np.e / 4), rtol=1e-14)
  # the shares of a tie are constant, so along ones the gradient e^y / 4 grows by itself
  np.testing.assert_allclose(jax.jvp(grad, (x,), (x,))[1], grad(x), rtol=1e-14)


def test_pool_before_relu_is_relu_before_pool():
  x = draw(2, 6, 6, 3)
  assert (x < 0).all((1, 2)).sum() == 0 and (convnet.max_pool(x) < 0).any()
  relu = jax.nn.relu
  before = lambda x: relu(convnet.max_pool(x))
  after = lambda x: convnet.max_pool(relu(x))
  np.testing.assert_array_equal(before(x), after(x))
  grads = [jax.grad(lambda x, f=f: jnp.sum(jnp.sin(f(x))))(x) for f in (before, after)]
  np.testing.assert_array_equal(*grads)


@pytest.mark.parametrize("side,features,block", [(9, 32, 2**20), (6, 9, 4 * 6 * 6 * 9), (4, 8, 1)])
def test_network_equals_a_plain_one_with_gradients_and_hessian_products(
  side, features, block, monkeypatch
):
  """The same network written with the ordinary convolution, a windowed maximum, ReLU before it.

  The norm folded into the first convolution, in one block, in two with images to spare; not folded.
  """
  monkeypatch.setattr(convnet, "_BLOCK", block)
  net = convnet.ConvNet(ways=5, features=features, norm="batch", blocks=2)
  x = draw(6, side, side, 1)
  params = net.init(jax.random.key(0), x)["params"]
  params = jax.tree.map(lambda p: p + 0.1 * draw(*p.shape), params)

  def plain(params, x):
    for i in range(2):
      conv, norm = params[f"conv_{i}"], params[f"norm_{i}"]
      x = jax.lax.conv_general_dilated(
        x, conv["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
      )
      x = x + conv["bias"]
      x = (x - x.mean((0, 1, 2))) / jnp.sqrt(x.var((0, 1, 2)) + 1e-5)
      x = jax.nn.relu(x * norm["scale"] + norm["bias"])
      x = window_max(x) if x.shape[1] > 1 else x
    return x.reshape(len(x), -1) @ params["head"]["kernel"] + params["head"]["bias"]

  @functools.partial(jax.jit, static_argnums=0)
  def derivatives(predict, params):
    loss = lambda p: -jnp.mean(jax.nn.log_softmax(predict(p, x))[jnp.arange(6), jnp.arange(6) % 5])
    grad = jax.grad(loss)
    v = jax.tree.map(jnp.cos, params)
    return (
      predict(params, x),
      grad(params),
      jax.grad(
        lambda p: sum(
          jnp.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, (grad(p), v)), strict=True)
        )
      )(params),
    )

  ours = derivatives(lambda p, x: net.apply({"params": p}, x), params)
  for a, b in zip(*map(jax.tree.leaves, (ours, derivatives(plain, params))), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype,tolerance", [(jnp.float32, 1e-6), (jnp.bfloat16, 5e-3)])
def test_folded_norm_in_lower_precisions(dtype, tolerance):
  """Beyond float32 nothing is lost but by rounding what comes in and what goes out."""
  random = np.random.default_rng(0)
  x = jnp.asarray(random.uniform(size=(20, 28, 28, 1)), dtype)
  kernel = jnp.asarray(random.normal(size=(3, 3, 1, 64)), jnp.float64)
  kernel = kernel.at[..., :32].add(-kernel[..., :32].mean((0, 1, 2))).astype(dtype)  # edge filters
  outputs = convnet.conv3x3(x.astype(jnp.float64), kernel.astype(jnp.float64))
  want = kernel.astype(jnp.float64) / jnp.sqrt(outputs.var((0, 1, 2)) + 1e-5)
  folded, bias = convnet.fold_norm(x, kernel, jnp.ones(64, dtype), jnp.zeros(64, dtype))
  assert folded.dtype == bias.dtype == dtype
  np.testing.assert_allclose(folded.astype(jnp.float64), want, rtol=tolerance)


@pytest.mark.parametrize("features", [16, 2])  # the first norm folded into its convolution, or not
def test_statistics_of_the_support_are_those_of_its_images_alone(features):
  x, weights = draw(7, 8, 8, 1), jnp.array([1.0, 1.0, 0.0, 1.0, 0.5, 0.5, 0.0])
  net = convnet.ConvNet(ways=3, features=features, norm="support", blocks=2)
  params = {"params": net.init(jax.random.key(0), x, weights)["params"]}
  params = jax.tree.map(lambda p: p + 0.1 * draw(*p.shape), params)
  outputs = net.apply(params, x, weights)
  all_alike = convnet.ConvNet(ways=3, features=features, norm="batch", blocks=2)
  # An image twice with half the weight is one image.
  twice, rows = x.at[5].set(x[4]), jnp.array([0, 1, 3, 4])
  wanted = all_alike.apply(params, x[rows])
  np.testing.assert_allclose(net.apply(params, twice, weights)[rows], wanted, rtol=1e-10)
  ones = net.apply(params, x, jnp.ones(7))
  np.testing.assert_allclose(ones, all_alike.apply(params, x), rtol=1e-10)
  # No image out of the support is seen by any other.
  other = net.apply(params, x.at[2].add(1.0), weights)
  np.testing.assert_array_equal(
    other[jnp.array([0, 1, 3, 4, 5, 6])], outputs[jnp.array([0, 1, 3, 4, 5, 6])]
  )
  assert (other[2] != outputs[2]).all()
  with pytest.raises(ValueError, match="norm is 'support', and weights .* were not given"):
    net.apply(params, x)
  with pytest.raises(ValueError, match="group, batch, support; got 'layer'"):
    convnet.ConvNet(ways=3, norm="layer").init(jax.random.key(0), x)  # pyright: ignore


def test_folded_norm_where_the_variance_is_zero_but_for_rounding():
  x = 1e4 * draw(1, 2, 2, 1)
  under = convnet.conv3x3(x, jnp.eye(9).reshape(3, 3, 1, 9)).reshape(4, 9)
  silent = jnp.linalg.svd(under - under.mean(0))[2][4:]  # filters with a constant output
  kernel = (draw(64, 5) @ silent).T.reshape(3, 3, 1, 64).astype(jnp.float32)
  ones = jnp.ones(64, jnp.float32)
  folded, bias = convnet.fold_norm(x.astype(jnp.float32), kernel, ones, ones)
  assert jnp.isfinite(folded).all() and jnp.isfinite(bias).all()


def test_memory_of_a_linearised_network(monkeypatch, optimising_jit):
  """XLA's temporaries of a solve, in outputs of the first convolution, [64, 16, 16, 32].

  Without the norm folded into that convolution, or without blocks of its images, without bytes for
  masks, or without blocks of Winograd's transforms, they are 3.5 to 5.9.
  """
  for module in (convnet, convolution):
    monkeypatch.setattr(module, "_BLOCK", 2**14)
  net = convnet.ConvNet(ways=4, features=32, norm="batch", blocks=2)
  x = jax.ShapeDtypeStruct((64, 16, 16, 1), jnp.float32)
  params = jax.eval_shape(net.init, jax.random.key(0), x)["params"]
  params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32), params)
  likelihood = sm.categorical(lambda theta, x: net.apply({"params": theta}, x))

  def solve(theta, v, batch):
    product = curvature_product("gauss_newton", likelihood, theta, batch)
    return cg(lambda v: jax.tree.map(jnp.add, v, product(v)), v, max_steps=3, tol=0.0)[0]

  batch = sm.Batch(x, jax.ShapeDtypeStruct((64,), jnp.int32))
  with jax.default_device(jax.devices("cpu")[0]):
    compiled = optimising_jit(solve).lower(params, params, batch).compile()
  assert 0 < compiled.memory_analysis().temp_size_in_bytes < 2.8 * 4 * 64 * 16 * 16 * 32


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_network_names_its_modules_and_group_norm_keeps_images_apart(norm):
  net = convnet.ConvNet(ways=5, features=4, norm=norm)
  x = draw(6, 8, 8, 1)
  variables = net.init(jax.random.key(0), x)
  assert set(variables["params"]) == {f"{k}_{i}" for k in ("conv", "norm") for i in range(4)} | {
    "head"
  }
  logits = net.apply(variables, x)
  assert logits.shape == (6, 5)
  alone = net.apply(variables, x[:1])
  apart = np.allclose(alone, logits[:1], rtol=1e-6)
  assert apart == (norm == "group")  # batch statistics are the transductive choice


def test_a_module_is_a_layer_or_a_block_with_its_norm():
  net = convnet.ConvNet(3, features=4, norm="batch", blocks=2)
  params = net.init(jax.random.key(0), jnp.zeros((1, 4, 4, 1)))["params"]
  assert convnet.modules(params, "layer") == sm.by_layer(params)
  blocks = convnet.modules(params, "block")
  assert jax.tree.structure(blocks) == jax.tree.structure(params)
  assert {layer: set(own.values()) for layer, own in blocks.items()} == {
    "conv_0": {"block_0"}, "norm_0": {"block_0"}, "conv_1": {"block_1"}, "norm_1": {"block_1"},
    "head": {"head"},
  }  # fmt: skip
  mlp = convnet.MLP(1).init(jax.random.key(0), jnp.zeros((1, 2)))["params"]
  assert convnet.modules(mlp, "block") == convnet.modules(mlp, "layer")
  with pytest.raises(ValueError, match="modules is one of layer, block; got 'net'"):
    convnet.modules(params, "net")  # pyright: ignore[reportArgumentType]
