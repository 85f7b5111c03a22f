"""Moving, reshaping or multiplying the low-rank factors equals doing the same to the kernel."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shrinkmeta.adapters import low_rank

SIZES = {"l": 2, "i": 6, "o": 4}


def kernel(axes, shape=None):
  """A kernel with random factors of rank 3; its value is their product, for comparison."""
  shape = shape or [SIZES[kind] for kind in axes]
  a, b = jax.random.key(0), jax.random.key(1)
  of_a, of_b = low_rank.labels_of(axes)
  draw = lambda key, of: jax.random.normal(key, [3 if n < 0 else shape[n] for n in of])
  empty = low_rank.LowRank(jnp.zeros(shape), draw(a, of_a), draw(b, of_b), of_a, of_b, "w")
  return dataclasses.replace(empty, value=low_rank.product_of_factors(empty))


MOVES = {
  "transpose": lambda k: low_rank.transpose(k, {"permutation": (2, 0, 1)}),
  "slice": lambda k: low_rank.cut(
    k, {"start_indices": (1, 1, 0), "limit_indices": (2, 6, 4), "strides": (1, 2, 1)}
  ),
  "dynamic_slice": lambda k: low_rank.dynamic_cut(
    k, {"slice_sizes": (1, 4, 2)}, jnp.array(1), jnp.array(2), jnp.array(1)
  ),
  "rev": lambda k: low_rank.reverse(k, {"dimensions": (0, 2)}),
  "split": lambda k: low_rank.divide(k, {"axis": 1, "sizes": (2, 4)})[1],
  "reshape": lambda k: low_rank.reshape(k, (2, 1, 3, 2, 2, 2, 1)),
  "broadcast_in_dim": lambda k: low_rank.add_axes(
    k, {"shape": (1, 2, 6, 1, 4), "broadcast_dimensions": (1, 2, 4)}
  ),
  "convert_element_type": lambda k: low_rank.cast(k, {"new_dtype": jnp.float32}),
}


@pytest.mark.parametrize("axes", ["lio", "loi"])
@pytest.mark.parametrize("name", MOVES)
def test_the_factors_move_as_the_kernel_does(name, axes):
  moved = MOVES[name](kernel(axes, [2, 6, 4]))
  assert len(moved.axes) == moved.value.ndim
  np.testing.assert_allclose(low_rank.product_of_factors(moved), moved.value, atol=1e-5)


@pytest.mark.parametrize(
  ("shape", "axes", "new", "new_axes"),
  [
    ((4, 6, 5), "iio", (24, 5), "io"),
    ((24, 5), "io", (2, 3, 4, 5), "iiio"),
    ((4, 6, 5), "iio", (8, 3, 5), "iio"),  # the groups overlap
    ((6, 1, 5), "ioo", (6, 5), "io"),
    ((2, 3, 6, 4), "llio", (6, 6, 4), "lio"),
    ((6, 4), "io", (6, 2, 1, 2), "ioio"),  # an axis of size 1 counts as one of the input side
  ],
)
def test_reshapes_within_a_side(shape, axes, new, new_axes):
  moved = low_rank.reshape(kernel(axes, shape), new)
  assert moved.axes == new_axes
  np.testing.assert_allclose(low_rank.product_of_factors(moved), moved.value, atol=1e-5)


@pytest.mark.parametrize("new", [(24,), (8, 3), (2, 12), (4, 6)])
def test_reshapes_across_the_sides(new):
  with pytest.raises(low_rank.NotFollowed, match="across its two sides"):
    low_rank.reshape(kernel("io"), new)


DIMENSIONS = {
  "x W": (((1,), (1,)), ((), ())),
  "over outputs": (((1,), (2,)), ((), ())),
  "over both": (((1, 2), (1, 2)), ((), ())),
  "by layer": (((1,), (1,)), ((0,), (0,))),
  "over layers": (((0, 1), (0, 1)), ((), ())),
  "by input": (((), ()), ((1,), (1,))),
}


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("name", DIMENSIONS)
def test_products_equal_those_with_the_product_of_factors(name, first):
  k = kernel("lio", [2, 4, 4])
  x = jax.random.normal(jax.random.key(2), [2, 4, 4])
  contract, batch = DIMENSIONS[name]
  numbers = (contract[::-1], batch[::-1]) if first else (contract, batch)
  params = {"dimension_numbers": numbers, "precision": None, "preferred_element_type": None}
  got = low_rank.matrix_product(x, k, params, kernel_first=first)
  want = jax.lax.dot_general(*((k.value, x) if first else (x, k.value)), numbers)
  np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize(
  ("a", "b", "layers", "axes"),
  [
    ([5, 2], [2, 3], 0, "io"),
    ([2, 5], [3, 2], 0, "oi"),
    ([5, 2], [2, 5], 0, "io"),  # square: the smaller rank decides
    ([2, 5], [5, 2], 0, "oi"),
    ([3, 3, 4, 2], [2, 6], 0, "iiio"),
    ([2, 4, 3, 3], [6, 2], 0, "oiii"),
    ([5, 2], [2, 3, 4], 0, "ioo"),
    ([7, 5, 2], [7, 2, 3], 1, "lio"),
  ],
)
def test_axes_from_shapes(a, b, layers, axes):
  assert low_rank.axes_of(a, b, layers) == axes
  of_a, of_b = low_rank.labels_of(axes)
  assert a[of_a.index(low_rank.RANK)] == b[of_b.index(low_rank.RANK)] == 2


def test_shapes_without_a_rank():
  for a, b, layers in (([5, 2], [3, 4], 0), ([2, 5, 2], [3, 2, 4], 1), ([2], [2], 1)):
    with pytest.raises(ValueError, match="they share no rank"):
      low_rank.axes_of(a, b, layers)
