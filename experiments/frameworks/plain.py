"""The network in plain functions, its first parameters, and the interface of every framework.

Each block is a layer, batch norm and ReLU. The layers of an MLP are dense. The layers of a CNN are
3 x 3 convolutions, each followed by the mean over 2 x 2 pixels. Dropout and a dense head come last.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any
EPSILON = 1e-5  # added to the variance of batch norm


@dataclasses.dataclass(frozen=True)
class Shape:
  """The sizes of the network that every framework builds.

  Attributes:
    kind: "mlp" or "cnn".
    inputs: the shape of one picture: height, width and channels.
    outputs: number of classes.
    features: the number of features of every block.
    blocks: the number of blocks.
    dropout: the probability that a feature before the head is dropped.
    momentum: the weight of the old running statistics. Unless it is 0, haiku and equinox weigh the
      first updates differently from flax, because they correct the bias of the start.
  """

  kind: str
  inputs: tuple[int, ...]
  outputs: int
  features: int = 8
  blocks: int = 2
  dropout: float = 0.0
  momentum: float = 0.0

  def widths(self) -> list[int]:
    """The numbers of inputs of each block and of the head."""
    height, width, channels = self.inputs
    if self.kind == "mlp":
      return [height * width * channels, *[self.features] * self.blocks]
    pixels = (height // 2**self.blocks) * (width // 2**self.blocks)
    return [channels, *[self.features] * (self.blocks - 1), pixels * self.features]


class Written(NamedTuple):
  """A network in one framework.

  `apply(theta, x, statistics, key, train)` returns (logits [N, outputs], new running statistics).
  With `train`, batch norm uses the statistics of the batch, and updates the running ones with them.
  Without a key nothing is dropped.
  """

  params: PyTree
  statistics: PyTree
  apply: Callable[[PyTree, jax.Array, PyTree, jax.Array | None, bool], tuple[jax.Array, PyTree]]


def start(shape: Shape, seed: int) -> dict[str, dict[str, np.ndarray]]:
  """Draw the first parameters; a kernel of a convolution is [3, 3, inputs, features]."""
  rng = np.random.default_rng(seed)
  params: dict[str, dict[str, np.ndarray]] = {}
  for i, width in enumerate(shape.widths()):
    last = i == shape.blocks
    size = (width, shape.outputs if last else shape.features)
    size = (3, 3, *size) if shape.kind == "cnn" and not last else size
    kernel = rng.normal(0.0, (2.0 / np.prod(size[:-1])) ** 0.5, size)
    params["head" if last else f"layer_{i}"] = {
      "kernel": kernel.astype(np.float32),
      "bias": np.zeros(size[-1], np.float32),
    }
    if not last:
      ones, zeros = np.ones(shape.features, np.float32), np.zeros(shape.features, np.float32)
      params[f"norm_{i}"] = {"scale": ones, "bias": zeros}
  return params


def pool(x: jax.Array) -> jax.Array:
  """Mean over 2 x 2 pixels of [N, H, W, C]; an odd last row or column is left out."""
  n, h, w, c = x.shape
  return x[:, : h // 2 * 2, : w // 2 * 2].reshape(n, h // 2, 2, w // 2, 2, c).mean((2, 4))


def build(shape: Shape, params: PyTree) -> Written:
  """Return the network in plain functions."""
  first = {
    f"norm_{i}": {"mean": jnp.zeros(shape.features), "var": jnp.ones(shape.features)}
    for i in range(shape.blocks)
  }

  def apply(
    theta: PyTree, x: jax.Array, statistics: PyTree, key: jax.Array | None, train: bool
  ) -> tuple[jax.Array, PyTree]:
    new = {}
    x = x if shape.kind == "cnn" else x.reshape(len(x), -1)
    for i in range(shape.blocks):
      layer, norm, old = theta[f"layer_{i}"], theta[f"norm_{i}"], statistics[f"norm_{i}"]
      x = _convolution(x, layer["kernel"]) if shape.kind == "cnn" else x @ layer["kernel"]
      x = x + layer["bias"]
      axes = tuple(range(x.ndim - 1))
      own = {"mean": x.mean(axes), "var": x.var(axes)}
      keep = lambda old, own: shape.momentum * old + (1 - shape.momentum) * own
      new[f"norm_{i}"] = jax.tree.map(keep, old, own)
      mean, var = (own if train else old).values()
      x = (x - mean) * jax.lax.rsqrt(var + EPSILON) * norm["scale"] + norm["bias"]
      x = jax.nn.relu(x)
      x = pool(x) if shape.kind == "cnn" else x
    x = x.reshape(len(x), -1)
    if key is not None:
      kept = jax.random.bernoulli(key, 1 - shape.dropout, x.shape)
      x = jnp.where(kept, x / (1 - shape.dropout), 0.0)
    return x @ theta["head"]["kernel"] + theta["head"]["bias"], new

  return Written(params, first, apply)


def _convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
  layout = ("NHWC", "HWIO", "NHWC")
  return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout)
