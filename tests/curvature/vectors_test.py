"""Inner products and norms of trees are those of one long vector."""

import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from experiments.benchmarks import hlo
from shrinkmeta.curvature import vectors


def tree(seed, dtype=jnp.float64, large=vectors._SMALL + 1):
  """Two arrays of one shape, some of others, a scalar, two large arrays of one shape."""
  rng = np.random.default_rng(seed)
  shapes = [(3, 4), (12,), (3, 4), (), (12,), (large,), (large,), (0,)]
  return [{"x": jnp.asarray(rng.normal(size=shape), dtype)} for shape in shapes]


def test_they_are_those_of_one_vector(x64):
  a, b = tree(0), tree(1)
  flat = lambda tree: np.asarray(ravel_pytree(tree)[0])
  np.testing.assert_allclose(vectors.vdot(a, b), flat(a) @ flat(b), rtol=1e-12)
  np.testing.assert_allclose(vectors.norm(a), np.linalg.norm(flat(a)), rtol=1e-12)


def test_dtypes_may_differ_and_are_kept(x64):
  a = tree(0, jnp.float32, 7)
  assert vectors.vdot(a, a).dtype == jnp.float32 == vectors.norm(a).dtype
  mixed = vectors.vdot(a, tree(1, jnp.float64, 7))
  assert mixed.dtype == jnp.float64


@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float16))
def test_sums_of_sixteen_bits_are_not_rounded_on_the_way(dtype):
  """1 + 15 / 2048 has no sixteen bits; added to 1 one by one in them, the others would vanish."""
  a = [jnp.ones(1, dtype), *[jnp.full(8, 2.0**-7, dtype) for _ in range(32)]]
  b = [jnp.ones(1, dtype), *[jnp.full(8, 2.0**-5, dtype) for _ in range(32)]]
  want = 1 + 256 * 2.0**-12
  assert float(vectors.vdot(a, b)) == pytest.approx(want, rel=float(jnp.finfo(dtype).eps))


def test_an_entry_that_is_not_finite_shows():
  a = tree(0, jnp.float32, 7)
  a[4]["x"] = a[4]["x"].at[3].set(jnp.nan)
  assert np.isnan(float(vectors.norm(a)))
  a[4]["x"] = a[4]["x"].at[3].set(1e30)
  assert np.isposinf(float(vectors.norm(a)))  # the square overflows


def test_an_empty_tree_has_norm_0():
  assert float(vectors.norm({})) == 0.0


def test_trees_of_different_sizes_are_refused():
  with pytest.raises(ValueError, match="longer"):
    vectors.vdot([jnp.ones(2)], [jnp.ones(2), jnp.ones(2)])


def test_arrays_of_one_shape_cost_one_sum(optimising_jit):
  kernels = lambda count: hlo.kernels(
    optimising_jit(vectors.vdot)
    .lower(*2 * [[jnp.ones(64) for _ in range(count)]])
    .compile()
    .as_text()
  ).total()
  assert kernels(2) == kernels(14) <= 3


SPLIT = """
import jax
jax.config.update("jax_num_cpu_devices", 4)
import jax.numpy as jnp, numpy as np
from experiments.benchmarks import hlo
from shrinkmeta.curvature import vectors

mesh = jax.sharding.Mesh(np.array(jax.devices()), ("d",))
assert mesh.size == 4
specs = (jax.P("d", None), jax.P(None, "d"))
large = jnp.ones([vectors._SMALL // 128, 256])
arrays = [jax.device_put(large, jax.NamedSharding(mesh, spec)) for spec in specs]
compiled = jax.jit(vectors.vdot).lower(arrays, arrays).compile()
assert float(compiled(arrays, arrays)) == 2 * large.size
kinds = {kind for kind, _ in hlo.collectives(compiled.as_text())}
assert kinds == {"all-reduce"}, kinds
"""


def test_arrays_split_over_devices_are_not_moved():
  """Large arrays of one shape, split along different axes, are summed where they are."""
  root = str(pathlib.Path(__file__).parents[2])
  subprocess.run(
    [sys.executable, "-c", SPLIT], check=True, env=os.environ | {"PYTHONPATH": root}, cwd=root
  )
