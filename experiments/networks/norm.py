"""Batch norm, and batch norm folded into the convolution before it."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

_EPSILON = 1e-5  # beside the variance


class BatchStatistics(nn.Module):
  """Scale and shift of a batch norm that uses the statistics of the batch, in tests too.

  With statistics of all images of a batch, the prediction for one image depends on the others. This
  is the transductive protocol.
  """

  @nn.compact
  def __call__(self, features: int) -> tuple[jax.Array, jax.Array]:
    scale = self.param("scale", nn.initializers.ones, (features,))
    return scale, self.param("bias", nn.initializers.zeros, (features,))


def batch_norm(
  x: jax.Array, scale: jax.Array, shift: jax.Array, weights: jax.Array | None = None
) -> jax.Array:
  """Return x [N, H, W, C] with mean `shift` and standard deviation `scale`, both [C], over N, H, W.

  Args:
    weights: [N], the weights of the images in the statistics; None stands for equal weights.
  """
  dtype = x.dtype
  x = x.astype(jnp.promote_types(dtype, jnp.float32))  # 8 bits are too few for long sums

  def mean(x: jax.Array) -> jax.Array:
    if weights is None:
      return x.mean((0, 1, 2))
    return jnp.sum(_normalised(weights, x.dtype)[:, None] * x.mean((1, 2)), 0)

  x = x - mean(x)  # before squares: docs/hazards.md#fast-variance
  variance = mean(x * x)  # the derivative of `square` would keep 2 x as well as x
  return (x * (scale * jax.lax.rsqrt(variance + _EPSILON)) + shift).astype(dtype)


def _normalised(weights: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
  return weights.astype(dtype) / jnp.sum(weights, dtype=dtype)


def fold_norm(
  x: jax.Array,
  kernel: jax.Array,
  scale: jax.Array,
  shift: jax.Array,
  weights: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """(k', b') with conv3x3(x, k') + b' = batch_norm(conv3x3(x, kernel), scale, shift, weights).

  A convolution is linear in the 9 C numbers under its kernel. If their mean is m and their
  covariance S, its outputs have mean m k and variance k^T S k. This is fast if 9 C is small. The
  convolution needs no bias, because the norm would cancel it.
  """
  h, w, c = x.shape[1:]
  # Terms of k^T S k cancel for an edge filter. So neither bfloat16 (8 bits) will do, nor TF32 (10
  # bits), which GPUs use for products of float32 (docs/hazards.md#rounded-products).
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  times = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
  x, k = x.astype(dtype), kernel.astype(dtype).reshape(9 * c, -1)
  padded = jnp.pad(jnp.moveaxis(x, 3, 0), ((0, 0), (0, 0), (1, 1), (1, 1)))
  under = [padded[:, :, i : i + h, j : j + w] for i in range(3) for j in range(3)]
  under = jnp.stack(under).reshape(9 * c, -1)
  if weights is None:
    mean = under.mean(1)
    covariance = times(under - mean[:, None], (under - mean[:, None]).T) / under.shape[1]
  else:
    each = jnp.repeat(_normalised(weights, dtype) / (h * w), h * w)
    mean = times(under, each)
    covariance = times(each * (under - mean[:, None]), (under - mean[:, None]).T)
  variance = jnp.sum(k * times(covariance, k), 0)
  variance = jnp.maximum(variance, 0.0)  # rounding may make it negative
  factor = scale * jax.lax.rsqrt(variance + _EPSILON)
  folded, bias = (k * factor).reshape(kernel.shape), shift - times(mean, k) * factor
  return folded.astype(kernel.dtype), bias.astype(shift.dtype)
