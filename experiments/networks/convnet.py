"""A convolutional network for small pictures."""

from typing import Literal, get_args

import flax.linen as nn
import jax

from experiments.networks.convolution import conv3x3, in_blocks
from experiments.networks.norm import BatchStatistics, batch_norm, fold_norm
from experiments.networks.pooling import max_pool

Norm = Literal["group", "batch", "support"]


class Conv(nn.Module):
  """The kernel and the bias of a `conv3x3`."""

  features: int

  @nn.compact
  def __call__(self, channels: int) -> tuple[jax.Array, jax.Array]:
    shape = (3, 3, channels, self.features)
    kernel = self.param("kernel", nn.initializers.he_normal(), shape)
    return kernel, self.param("bias", nn.initializers.zeros, (self.features,))


_BLOCK = 2**20  # numbers in the convolution of one block of images


def conv_pool(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
  """Return the ReLU of the pooled convolution, computed for a block of images at a time."""
  images = max(1, _BLOCK // (x.shape[1] * x.shape[2] * len(bias)))
  return in_blocks(lambda x: nn.relu(max_pool(conv3x3(x, kernel) + bias)), x, images)


class ConvNet(nn.Module):
  """Four blocks of [3 x 3 convolution, norm, 2 x 2 max-pool, ReLU], then a linear head.

  A block pools while the image is larger than one pixel. Parameters: conv_i, norm_i, head.

  Attributes:
    ways: number of classes.
    features: channels of every block.
    norm: "group" normalises each image by itself, in four groups of channels. "batch" uses
      `BatchStatistics` of all images. "support" uses `BatchStatistics` of the images with a weight
      in `support`.
  """

  ways: int
  features: int = 32
  norm: Norm = "group"
  blocks: int = 4

  @nn.compact
  def __call__(self, x: jax.Array, support: jax.Array | None = None) -> jax.Array:
    """Return logits [N, ways] of images [N, H, W, C]; norm "support" also needs weights [N]."""
    if self.norm not in get_args(Norm):
      raise ValueError(f"norm is one of {', '.join(get_args(Norm))}; got {self.norm!r}.")
    if (self.norm == "support") != (support is not None):
      raise ValueError(
        f"norm is {self.norm!r}, and weights of the support set were "
        f"{'not ' if support is None else ''}given: norm 'support' wants them, and no other does. "
        "experiments.train gives them, with --set=network.norm=support."
      )
    for i in range(self.blocks):
      kernel, bias = Conv(self.features, name=f"conv_{i}")(x.shape[-1])
      if self.norm != "group":
        scale, shift = BatchStatistics(name=f"norm_{i}")(self.features)
        if 9 * x.shape[-1] <= self.features and min(x.shape[1:3]) > 1:
          x = conv_pool(x, *fold_norm(x, kernel, scale, shift, support))
          continue
        x = batch_norm(conv3x3(x, kernel) + bias, scale, shift, support)
      else:
        x = nn.GroupNorm(num_groups=4, name=f"norm_{i}")(conv3x3(x, kernel) + bias)
      x = max_pool(x) if min(x.shape[1:3]) > 1 else x
      x = nn.relu(x)  # ReLU and pool commute; after the pool it is a quarter of the work
    return nn.Dense(self.ways, name="head")(x.reshape(x.shape[0], -1))
