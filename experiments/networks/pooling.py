"""2 x 2 max-pooling whose derivatives are cheap on a CPU."""

import jax
import jax.numpy as jnp


def _windows(x: jax.Array) -> jax.Array:
  """[N, H, W, C] -> [N, H // 2, 2, W // 2, 2, C]."""
  n, h, w, c = x.shape
  return x[:, : h // 2 * 2, : w // 2 * 2].reshape(n, h // 2, 2, w // 2, 2, c)


@jax.custom_jvp
def max_pool(x: jax.Array) -> jax.Array:
  """2 x 2 maximum, [N, H, W, C] -> [N, H // 2, W // 2, C].

  It is a maximum of four strided slices. Its derivative is a weighted sum over each window, with
  weight 1 at the maximum and 0 elsewhere; pixels that tie share the weight. The gradient is then
  one product for each pixel. On a CPU this is several times cheaper than the gradient of a windowed
  reduction or of the four slices (docs/hazards.md#pooling-gradients). A derivative stores the
  weights of a window in one byte.
  """
  a, b, c, d = _quarters(x)
  return jnp.maximum(jnp.maximum(a, c), jnp.maximum(b, d))


@max_pool.defjvp
def _max_pool_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
  (x,), (tangent,) = primals, tangents
  # `max_pool` itself, so that a second derivative has this rule too. With `checkpoint` the bytes
  # are stored, not the weights computed from them.
  return max_pool(x), jax.checkpoint(_weighted_sum, prevent_cse=False)(_weights(x), tangent)


def _quarters(x: jax.Array) -> list[jax.Array]:
  """Return the four pixels of each window, row by row."""
  x = x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2]
  return [x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]


def _weights(x: jax.Array) -> jax.Array:
  """Return a byte for each window: two bits for each pixel, which stand for 0, 1/4, 1/2 and 1."""
  a, b, c, d = _quarters(x)
  twice = lambda a, b: (a >= b).astype(jnp.uint8) + (a > b).astype(jnp.uint8)  # the weight of a
  ac, bd = twice(a, c), twice(b, d)
  left = twice(jnp.maximum(a, c), jnp.maximum(b, d))
  four_times = [ac * left, bd * (2 - left), (2 - ac) * left, (2 - bd) * (2 - left)]  # 0, 1, 2 or 4
  bits = [jnp.minimum(weight, 3) << 2 * i for i, weight in enumerate(four_times)]
  return bits[0] | bits[1] | bits[2] | bits[3]


def _weighted_sum(weights: jax.Array, x: jax.Array) -> jax.Array:
  """Return the sum over each window of x with the weights in the bits of `weights`."""
  shift = jnp.array([[0, 2], [4, 6]], jnp.uint8)[:, None, :, None]
  bits = weights[:, :, None, :, None] >> shift & 3
  weight = jnp.where(bits == 3, 1.0, bits.astype(x.dtype) / 4)
  return jnp.where(bits == 0, 0.0, weight * _windows(x)).sum((2, 4))
