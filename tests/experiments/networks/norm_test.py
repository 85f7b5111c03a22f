import jax.numpy as jnp
import numpy as np
import pytest

from experiments.networks import conv3x3
from experiments.networks.norm import fold_norm
from tests.experiments.networks.drawn import draw

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.parametrize("dtype,tolerance", [(jnp.float32, 1e-6), (jnp.bfloat16, 5e-3)])
def test_folded_norm_in_lower_precisions(dtype, tolerance):
  """Beyond float32 nothing is lost but by rounding what comes in and what goes out."""
  random = np.random.default_rng(0)
  x = jnp.asarray(random.uniform(size=(20, 28, 28, 1)), dtype)
  kernel = jnp.asarray(random.normal(size=(3, 3, 1, 64)), jnp.float64)
  kernel = kernel.at[..., :32].add(-kernel[..., :32].mean((0, 1, 2))).astype(dtype)  # edge filters
  outputs = conv3x3(x.astype(jnp.float64), kernel.astype(jnp.float64))
  want = kernel.astype(jnp.float64) / jnp.sqrt(outputs.var((0, 1, 2)) + 1e-5)
  folded, bias = fold_norm(x, kernel, jnp.ones(64, dtype), jnp.zeros(64, dtype))
  assert folded.dtype == bias.dtype == dtype
  np.testing.assert_allclose(folded.astype(jnp.float64), want, rtol=tolerance)


def test_folded_norm_where_the_variance_is_zero_but_for_rounding():
  x = 1e4 * draw(1, 2, 2, 1)
  under = conv3x3(x, jnp.eye(9).reshape(3, 3, 1, 9)).reshape(4, 9)
  silent = jnp.linalg.svd(under - under.mean(0))[2][4:]  # filters with a constant output
  kernel = (draw(64, 5) @ silent).T.reshape(3, 3, 1, 64).astype(jnp.float32)
  ones = jnp.ones(64, jnp.float32)
  folded, bias = fold_norm(x.astype(jnp.float32), kernel, ones, ones)
  assert jnp.isfinite(folded).all() and jnp.isfinite(bias).all()
