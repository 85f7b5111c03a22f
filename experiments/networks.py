"""Networks of the experiments, in flax. They know nothing of tasks or algorithms."""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.convolution import conv3x3

Norm = Literal["group", "batch"]


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
  """Four blocks of [3 x 3 convolution, norm, 2 x 2 max-pool, ReLU], then a linear head.

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
      x = max_pool(x) if min(x.shape[1:3]) > 1 else x
      x = nn.relu(x)  # after the pool, with which it commutes, a quarter of the work
    return nn.Dense(self.ways, name="head")(x.reshape(x.shape[0], -1))


class Transformer(nn.Module):
  """Pre-norm Transformer: blocks of [causal self-attention, MLP of four times the width].

  Parameters: embed, positions, block_i, norm, head.

  Attributes:
    vocabulary: number of tokens.
    outputs: logits a position; None: one for each token, to predict the next.
    pool: True gives one prediction a sequence, from its mean; False one at every position.
  """

  vocabulary: int
  width: int = 256
  blocks: int = 8
  heads: int = 8
  outputs: int | None = None
  pool: bool = False

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    """int [N, L] -> logits [N, L, outputs], or [N, outputs] with `pool`."""
    positions = self.param("positions", nn.initializers.normal(0.02), (tokens.shape[1], self.width))
    x = nn.Embed(self.vocabulary, self.width, name="embed")(tokens) + positions
    for i in range(self.blocks):
      x = TransformerBlock(self.heads, name=f"block_{i}")(x)
    x = nn.LayerNorm(name="norm")(x)
    x = x.mean(1) if self.pool else x
    return nn.Dense(self.vocabulary if self.outputs is None else self.outputs, name="head")(x)


class TransformerBlock(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x)); [N, L, width] -> [N, L, width]."""

  heads: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    width, causal = x.shape[-1], nn.make_causal_mask(x[..., 0])
    attention = nn.MultiHeadDotProductAttention(self.heads, name="attention")
    x = x + attention(nn.LayerNorm(name="norm_0")(x), mask=causal)
    hidden = nn.gelu(nn.Dense(4 * width, name="mlp_0")(nn.LayerNorm(name="norm_1")(x)))
    return x + nn.Dense(width, name="mlp_1")(hidden)
