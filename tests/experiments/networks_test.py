import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import networks

pytestmark = pytest.mark.usefixtures("x64")
LAYOUT = ("NHWC", "HWIO", "NHWC")


def lax_conv(x, kernel):
  return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=LAYOUT)


def draw(*shape):
  return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape))


@pytest.mark.parametrize("shape", [(2, 5, 4, 3), (1, 1, 1, 2), (3, 2, 7, 1)])
def test_conv_equals_that_of_lax_with_gradients_and_hessian_products(shape):
  x, kernel = draw(*shape), draw(3, 3, shape[-1], 4)
  v = (draw(*shape) + 1, draw(3, 3, shape[-1], 4) + 1)

  def all_orders(conv):
    loss = lambda x, kernel: jnp.sum(jnp.tanh(conv(x, kernel)))
    grad = jax.grad(loss, (0, 1))
    return conv(x, kernel), grad(x, kernel), jax.jvp(grad, (x, kernel), v)[1]

  for ours, theirs in zip(
    jax.tree.leaves(all_orders(networks.conv3x3)),
    jax.tree.leaves(all_orders(lax_conv)),
    strict=True,
  ):
    np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)


def test_conv_with_a_kernel_for_each_task():
  x, kernel = draw(3, 2, 4, 4, 2), draw(3, 3, 3, 2, 5)
  loop = jnp.stack([lax_conv(x[t], kernel[t]) for t in range(3)])
  np.testing.assert_allclose(jax.vmap(networks.conv3x3)(x, kernel), loop, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("side", [4, 5])
def test_max_pool_equals_a_window(side):
  x = draw(2, side, side, 3)
  window = lambda x: jax.lax.reduce_window(
    x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"
  )
  np.testing.assert_array_equal(networks.max_pool(x), window(x))
  grads = [jax.grad(lambda x, f=f: jnp.sum(jnp.sin(f(x))))(x) for f in (networks.max_pool, window)]
  np.testing.assert_allclose(*grads, rtol=1e-12)


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_network_names_its_modules_and_group_norm_keeps_images_apart(norm):
  net = networks.ConvNet(ways=5, features=4, norm=norm)
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
