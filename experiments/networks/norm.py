"""Batch norm, and batch norm folded into the convolution before it."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

_EPSILON = 1e-5  # beside the variance


class BatchStatistics(nn.Module):
  """Scale and shift of a batch norm with the statistics of the batch, in training and in testing.

  Where they are those of all its images, predictions for the images of one batch depend on each
  other: the transductive protocol.
  """

  @nn.compact
  def __call__(self, features: int) -> tuple[jax.Array, jax.Array]:
    scale = self.param("scale", nn.initializers.ones, (features,))
    return scale, self.param("bias", nn.initializers.zeros, (features,))


def batch_norm(
  x: jax.Array, scale: jax.Array, shift: jax.Array, weights: jax.Array | None = None
) -> jax.Array:
  """x [N, H, W, C] with mean `shift` and standard deviation `scale`, both [C], over N, H, W.

  Args:
    weights: [N] of the images in mean and standard deviation; None: all alike.
  """
  dtype = x.dtype
  x = x.astype(jnp.promote_types(dtype, jnp.float32))  # sums of many numbers of 8 bits are none

  def mean(x: jax.Array) -> jax.Array:
    if weights is None:
      return x.mean((0, 1, 2))
    return jnp.sum(_normalised(weights, x.dtype)[:, None] * x.mean((1, 2)), 0)

  x = x - mean(x)
  variance = mean(x * x)  # of `square` the derivative would hold 2 x beside x
  return (x * (scale / jnp.sqrt(variance + _EPSILON)) + shift).astype(dtype)


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

  A convolution is linear in the 9 C numbers under its kernel, so their mean m and covariance S tell
  the statistics of its outputs, m k and k^T S k: pays where 9 C is small. A bias would drop out.
  """
  h, w, c = x.shape[1:]
  # k^T S k of an edge filter cancels, so no 8 bits here, and no 10 as in products on GPUs.
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
  factor = scale / jnp.sqrt(jnp.maximum(variance, 0.0) + _EPSILON)  # rounding may leave less than 0
  folded, bias = (k * factor).reshape(kernel.shape), shift - times(mean, k) * factor
  return folded.astype(kernel.dtype), bias.astype(shift.dtype)
