"""Networks of the experiments, in flax. They know nothing of tasks or algorithms."""

import functools
import re
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

import shrinkmeta as sm
from experiments.networks.convolution import conv3x3, in_blocks

Cut = Literal["layer", "block"]
Norm = Literal["group", "batch", "support"]


def _quarters(x: jax.Array) -> list[jax.Array]:
  """The four pixels under each 2 x 2 window, row by row."""
  x = x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2]
  return [x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]


def _order(a: jax.Array, b: jax.Array) -> jax.Array:
  """0: a < b, 1: a = b, 2: a > b."""
  return (a >= b).astype(jnp.uint8) + (a > b).astype(jnp.uint8)


@jax.custom_jvp
def max_pool(x: jax.Array) -> jax.Array:
  """2 x 2 maximum, [N, H, W, C] -> [N, H // 2, W // 2, C].

  A maximum of four strided slices: its gradient is several times cheaper on a CPU than that of a
  windowed reduction. A derivative holds one byte a window: which of its pixels are the maximum.
  Pixels that tie share it.
  """
  a, b, c, d = _quarters(x)
  return jnp.maximum(jnp.maximum(a, c), jnp.maximum(b, d))


@max_pool.defjvp
def _max_pool_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
  a, b, c, d = _quarters(primals[0])
  left, right = jnp.maximum(a, c), jnp.maximum(b, d)
  orders = _order(a, c) | _order(b, d) << 2 | _order(left, right) << 4
  # Under `checkpoint` the bytes are what is kept, and not the masks that they unfold to.
  tangent = jax.checkpoint(_pick, prevent_cse=False)(orders, tangents[0])
  return jnp.maximum(left, right), tangent


def _pick(orders: jax.Array, x: jax.Array) -> jax.Array:
  """Of every window of x the pixel, or the mean of those, that `orders` points to."""

  def larger(shift: int, a: jax.Array, b: jax.Array) -> jax.Array:
    order = orders >> shift & 3
    return jnp.where(order == 1, (a + b) / 2, jnp.where(order == 2, a, b))

  a, b, c, d = _quarters(x)
  return larger(4, larger(0, a, c), larger(2, b, d))


class Conv(nn.Module):
  """Kernel and bias of a `conv3x3`."""

  features: int

  @nn.compact
  def __call__(self, channels: int) -> tuple[jax.Array, jax.Array]:
    shape = (3, 3, channels, self.features)
    kernel = self.param("kernel", nn.initializers.he_normal(), shape)
    return kernel, self.param("bias", nn.initializers.zeros, (self.features,))


class BatchStatistics(nn.Module):
  """Scale and shift of a batch norm with the statistics of the batch, in training and in testing.

  Where they are those of all its images, predictions for the images of one batch depend on each
  other: the transductive protocol.
  """

  @nn.compact
  def __call__(self, features: int) -> tuple[jax.Array, jax.Array]:
    scale = self.param("scale", nn.initializers.ones, (features,))
    return scale, self.param("bias", nn.initializers.zeros, (features,))


_EPSILON = 1e-5  # beside the variance


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


_BLOCK = 2**20  # numbers of a block's convolution


def conv_pool(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
  """ReLU of the pooled convolution, a block of images at a time: all of it no memory ever holds."""
  images = max(1, _BLOCK // (x.shape[1] * x.shape[2] * len(bias)))
  return in_blocks(lambda x: nn.relu(max_pool(conv3x3(x, kernel) + bias)), x, images)


class ConvNet(nn.Module):
  """Four blocks of [3 x 3 convolution, norm, 2 x 2 max-pool, ReLU], then a linear head.

  A block pools while the image is larger than one pixel. Parameters: conv_i, norm_i, head.

  Attributes:
    ways: number of classes.
    features: channels of every block.
    norm: "group": each image by itself, four groups of channels; "batch": `BatchStatistics` of all
      images; "support": `BatchStatistics` of the images that `support` weighs.
  """

  ways: int
  features: int = 32
  norm: Norm = "group"
  blocks: int = 4

  @nn.compact
  def __call__(self, x: jax.Array, support: jax.Array | None = None) -> jax.Array:
    """[N, H, W, C], and with norm "support" weights [N] -> logits [N, ways]."""
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
      x = nn.relu(x)  # after the pool, with which it commutes, a quarter of the work
    return nn.Dense(self.ways, name="head")(x.reshape(x.shape[0], -1))


def modules(params: Any, cut: Cut) -> Any:
  """Labels: which parameters of a network share one sigma.

  Args:
    cut: "layer": conv_i and norm_i are two modules; "block": they are one, block_i. Where there is
      no norm the two are the same.
  """
  if cut not in get_args(Cut):
    raise ValueError(f"modules is one of {', '.join(get_args(Cut))}; got {cut!r}.")
  layers = sm.by_layer(params)
  if cut == "layer":
    return layers
  return jax.tree.map(lambda name: re.sub("^(conv|norm)_", "block_", name), layers)


class MLP(nn.Module):
  """Two hidden layers of ReLU; [N, D] -> [N, outputs]. Parameters: hidden_0, hidden_1, out."""

  outputs: int
  width: int = 40

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    for i in range(2):
      x = nn.relu(nn.Dense(self.width, name=f"hidden_{i}")(x))
    return nn.Dense(self.outputs, name="out")(x)


class Transformer(nn.Module):
  """Pre-norm Transformer: blocks of [causal self-attention, MLP of four times the width].

  Parameters: embed, positions, block_i, norm, head.

  Attributes:
    vocabulary: number of tokens, and of outputs at every position: logits of the next.
  """

  vocabulary: int
  width: int = 256
  blocks: int = 8
  heads: int = 8

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    """int [N, L] -> logits [N, L, vocabulary]."""
    positions = self.param("positions", nn.initializers.normal(0.02), (tokens.shape[1], self.width))
    x = nn.Embed(self.vocabulary, self.width, name="embed")(tokens) + positions
    for i in range(self.blocks):
      x = TransformerBlock(self.heads, name=f"block_{i}")(x)
    x = nn.LayerNorm(name="norm")(x)
    return nn.Dense(self.vocabulary, name="head")(x)


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
