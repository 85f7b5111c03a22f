import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from experiments.networks.pooling import max_pool
from tests.experiments.networks.drawn import draw, window_max

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.parametrize("shape", [(2, 4, 4, 3), (2, 5, 5, 3), (1, 2, 3, 1), (3, 7, 4, 2)])
def test_max_pool_equals_a_window_with_gradients_and_hessian_products(shape):
  x, v = draw(*shape), draw(*shape)[..., ::-1]
  np.testing.assert_array_equal(max_pool(x), window_max(x))

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

  for ours, theirs in zip(derivatives(max_pool), derivatives(plain), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-14)
  f = jax.jit(lambda x: jnp.sum(jnp.sin(max_pool(x))))
  check_grads(f, (x,), 2, eps=1e-5, atol=1e-7, rtol=1e-7)


def test_no_derivative_scatters_the_pixels_of_slices():
  """The transpose of a strided slice is a sum of padded arrays, which XLA runs pixel by pixel."""
  x, v = draw(2, 4, 6, 3), draw(2, 4, 6, 3)[..., ::-1]
  grad = jax.grad(lambda x: jnp.sum(jnp.sin(max_pool(x))))
  program = str(jax.make_jaxpr(jax.grad(lambda x: jnp.vdot(grad(x), v)))(x))
  assert "= pad[" not in program


def test_max_pool_under_vmap_scan_and_checkpoint():
  x = draw(3, 2, 5, 4, 2)
  grad = jax.grad(lambda x: jnp.sum(jnp.sin(max_pool(x))))
  product = lambda x: jax.jvp(grad, (x,), (jnp.cos(x),))[1]
  loop = jnp.stack([product(a) for a in x])
  np.testing.assert_allclose(jax.vmap(product)(x), loop, rtol=1e-14)
  np.testing.assert_allclose(jax.lax.map(jax.checkpoint(product), x), loop, rtol=1e-14)
  total = lambda x: jnp.sum(jnp.sin(jax.vmap(max_pool)(x)))
  ours = jax.jvp(jax.grad(total), (x,), (jnp.cos(x),))[1]
  np.testing.assert_allclose(ours, loop, rtol=1e-14)


def test_max_pool_stays_finite_in_second_order_at_ties():
  x = jnp.ones((1, 4, 4, 1))
  grad = jax.jit(jax.grad(lambda x: jnp.sum(jnp.exp(max_pool(x)))))
  np.testing.assert_allclose(grad(x), np.full(x.shape, np.e / 4), rtol=1e-14)
  # the shares of a tie are constant, so along ones the gradient e^y / 4 grows by itself
  np.testing.assert_allclose(jax.jvp(grad, (x,), (x,))[1], grad(x), rtol=1e-14)


def test_pool_before_relu_is_relu_before_pool():
  x = draw(2, 6, 6, 3)
  assert (x < 0).all((1, 2)).sum() == 0 and (max_pool(x) < 0).any()
  relu = jax.nn.relu
  before = lambda x: relu(max_pool(x))
  after = lambda x: max_pool(relu(x))
  np.testing.assert_array_equal(before(x), after(x))
  grads = [jax.grad(lambda x, f=f: jnp.sum(jnp.sin(f(x))))(x) for f in (before, after)]
  np.testing.assert_array_equal(*grads)
