import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shrinkmeta as sm
from experiments.networks import convnet, convolution
from shrinkmeta.curvature.solvers import cg
from tests.experiments.networks.drawn import draw, window_max
from tests.task_models import model_of

pytestmark = pytest.mark.usefixtures("x64")


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
    product = model_of(likelihood, theta, batch).product("gauss_newton")
    operator = lambda v: (jax.tree.map(jnp.add, v, product(v)), None)
    return cg(operator, v, max_steps=3, tol=0.0).w

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
