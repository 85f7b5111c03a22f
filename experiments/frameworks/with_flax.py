"""The network in flax: linen and nnx."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from experiments.frameworks.plain import EPSILON, Shape, Written, pool

PyTree = Any


class Linen(nn.Module):
  """The network, [N, H, W, C] -> [N, outputs]. Parameters: layer_i, norm_i, head."""

  shape: Shape

  @nn.compact
  def __call__(self, x: jax.Array, train: bool, drop: bool) -> jax.Array:
    """Normalise by the batch with `train`; drop features with `drop`."""
    shape = self.shape
    x = x if shape.kind == "cnn" else x.reshape(len(x), -1)
    for i in range(shape.blocks):
      if shape.kind == "cnn":
        x = nn.Conv(shape.features, (3, 3), name=f"layer_{i}")(x)
      else:
        x = nn.Dense(shape.features, name=f"layer_{i}")(x)
      norm = nn.BatchNorm(
        use_running_average=not train,
        momentum=shape.momentum,
        epsilon=EPSILON,
        use_fast_variance=False,
        name=f"norm_{i}",
      )
      x = nn.relu(norm(x))
      x = pool(x) if shape.kind == "cnn" else x
    x = nn.Dropout(shape.dropout, deterministic=not drop)(x.reshape(len(x), -1))
    return nn.Dense(shape.outputs, name="head")(x)


def linen(shape: Shape, params: PyTree) -> Written:
  """Return the network in flax.linen; its parameter tree is that of `plain.start`."""
  net = Linen(shape)
  picture = jnp.zeros((1, *shape.inputs))
  statistics = net.init(jax.random.key(0), picture, True, False)["batch_stats"]

  def apply(
    theta: PyTree, x: jax.Array, statistics: PyTree, key: jax.Array | None, train: bool
  ) -> tuple[jax.Array, PyTree]:
    variables = {"params": theta, "batch_stats": statistics}
    rngs = {} if key is None else {"dropout": key}
    logits, new = net.apply(variables, x, train, bool(rngs), rngs=rngs, mutable=["batch_stats"])
    return logits, new["batch_stats"]

  return Written(params, statistics, apply)


class Nnx(nnx.Module):
  """The network, [N, H, W, C] -> [N, outputs]. Parameters: layer_i, norm_i, head."""

  def __init__(self, shape: Shape, rngs: nnx.Rngs):
    self.shape = shape
    widths = shape.widths()
    for i, width in enumerate(widths[:-1]):
      if shape.kind == "cnn":
        layer = nnx.Conv(width, shape.features, (3, 3), rngs=rngs)
      else:
        layer = nnx.Linear(width, shape.features, rngs=rngs)
      norm = nnx.BatchNorm(
        shape.features,
        momentum=shape.momentum,
        epsilon=EPSILON,
        use_fast_variance=False,
        rngs=rngs,
      )
      setattr(self, f"layer_{i}", layer)
      setattr(self, f"norm_{i}", norm)
    self.dropout = nnx.Dropout(shape.dropout)  # without rngs: the key comes with every call
    self.head = nnx.Linear(widths[-1], shape.outputs, rngs=rngs)

  def __call__(self, x: jax.Array, train: bool, key: jax.Array | None) -> jax.Array:
    """Normalise by the batch with `train`; drop features with a key."""
    shape = self.shape
    x = x if shape.kind == "cnn" else x.reshape(len(x), -1)
    for i in range(shape.blocks):
      x = getattr(self, f"layer_{i}")(x)
      x = nnx.relu(getattr(self, f"norm_{i}")(x, use_running_average=not train))
      x = pool(x) if shape.kind == "cnn" else x
    x = x.reshape(len(x), -1)
    return self.head(self.dropout(x, deterministic=key is None, rngs=key))


def in_nnx(shape: Shape, params: PyTree) -> Written:
  """Return the network in flax.nnx, split into graph, parameters and running statistics."""
  graph, theta, statistics = nnx.split(Nnx(shape, nnx.Rngs(0)), nnx.Param, nnx.BatchStat)
  nnx.replace_by_pure_dict(theta, jax.tree.map(jnp.asarray, params))

  def apply(
    theta: PyTree, x: jax.Array, statistics: PyTree, key: jax.Array | None, train: bool
  ) -> tuple[jax.Array, PyTree]:
    # Without the copy the model shares its Variables with every call.
    model = nnx.merge(graph, theta, statistics, copy=True)
    return model(x, train, key), nnx.state(model, nnx.BatchStat)

  return Written(theta, statistics, apply)
