"""Networks of the experiments, in flax. They know nothing of tasks or algorithms."""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

Norm = Literal["group", "batch"]


def conv3x3(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """3 x 3 convolution, zero padding: x [N, H, W, C], kernel [3, 3, C, F] -> [N, H, W, F].

  As one matrix product over the nine shifted images. With a kernel for each task, and inside loops,
  XLA runs this and all its derivatives several times faster on a CPU than its own convolution,
  whose transposes leave the one layout that is fast there.
  """
  n, h, w, c = x.shape
  padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  shifted = [padded[:, i : i + h, j : j + w] for i in range(3) for j in range(3)]
  patches = jnp.concatenate(shifted, axis=-1).reshape(n * h * w, 9 * c)
  return (patches @ kernel.reshape(9 * c, -1)).reshape(n, h, w, -1)


def max_pool(x: jax.Array) -> jax.Array:
  """2 x 2 maximum, [N, H, W, C] -> [N, H // 2, W // 2, C].

  A maximum of four strided slices: its gradient is several times cheaper on a CPU than that of a
  windowed reduction.
  """
  x = x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2]
  rows = jnp.maximum(x[:, ::2], x[:, 1::2])
  return jnp.maximum(rows[:, :, ::2], rows[:, :, 1::2])


class Conv(nn.Module):
  """`conv3x3` with its kernel and bias."""

  features: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    shape = (3, 3, x.shape[-1], self.features)
    kernel = self.param("kernel", nn.initializers.he_normal(), shape)
    return conv3x3(x, kernel) + self.param("bias", nn.initializers.zeros, (self.features,))


class BatchStatistics(nn.Module):
  """Batch norm with the statistics of the batch at hand, in training and in testing.

  Predictions for the images of one batch so depend on each other: the transductive protocol.
  """

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    features = x.shape[-1:]
    mean = x.mean((0, 1, 2))
    variance = jnp.square(x - mean).mean((0, 1, 2))
    scale = self.param("scale", nn.initializers.ones, features)
    bias = self.param("bias", nn.initializers.zeros, features)
    return (x - mean) * (scale / jnp.sqrt(variance + 1e-5)) + bias


class ConvNet(nn.Module):
  """Four blocks of [3 x 3 convolution, norm, ReLU, 2 x 2 max-pool], then a linear head.

  A block pools while the image is larger than one pixel. Parameters: conv_i, norm_i, head.

  Attributes:
    ways: number of classes.
    features: channels of every block.
    norm: "group": each image by itself, four groups of channels; "batch": see `BatchStatistics`.
  """

  ways: int
  features: int = 32
  norm: Norm = "group"
  blocks: int = 4

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[N, H, W, C] -> logits [N, ways]."""
    for i in range(self.blocks):
      x = Conv(self.features, name=f"conv_{i}")(x)
      if self.norm == "batch":
        x = BatchStatistics(name=f"norm_{i}")(x)
      else:
        x = nn.GroupNorm(num_groups=4, name=f"norm_{i}")(x)
      x = nn.relu(x)
      x = max_pool(x) if min(x.shape[1:3]) > 1 else x
    return nn.Dense(self.ways, name="head")(x.reshape(x.shape[0], -1))
