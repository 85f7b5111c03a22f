"""The network in equinox, whose models are pytrees of parameters."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from experiments.frameworks.plain import EPSILON, Shape, Written, pool

PyTree = Any
_BATCH = "batch"  # the name of the axis over which batch norm takes its statistics


class Equinox(eqx.Module):
  """The network for one picture, [H, W, C] -> [outputs]; `jax.vmap` adds the axis of the batch."""

  layers: list[Any]
  norms: list[Any]
  dropout: eqx.nn.Dropout
  head: eqx.nn.Linear
  shape: Shape = eqx.field(static=True)

  def __init__(self, shape: Shape, key: jax.Array):
    widths, features = shape.widths(), shape.features
    if shape.kind == "cnn":
      layer = lambda width: eqx.nn.Conv2d(width, features, 3, padding=1, key=key)
    else:
      layer = lambda width: eqx.nn.Linear(width, features, key=key)
    norm = lambda: eqx.nn.BatchNorm(
      features, _BATCH, EPSILON, momentum=shape.momentum, mode="batch"
    )
    self.layers = [layer(width) for width in widths[:-1]]
    self.norms = [norm() for _ in widths[:-1]]
    self.dropout = eqx.nn.Dropout(shape.dropout)
    self.head = eqx.nn.Linear(widths[-1], shape.outputs, key=key)
    self.shape = shape

  def __call__(
    self, x: jax.Array, state: eqx.nn.State, key: jax.Array | None, train: bool
  ) -> tuple[jax.Array, eqx.nn.State]:
    """Return the logits of one picture and the new state of batch norm."""
    cnn = self.shape.kind == "cnn"
    x = x.transpose(2, 0, 1) if cnn else x.reshape(-1)  # equinox wants channels first
    for layer, norm in zip(self.layers, self.norms, strict=True):
      x, state = norm(layer(x), state, inference=not train)
      x = jax.nn.relu(x)
      x = pool(x.transpose(1, 2, 0)[None])[0].transpose(2, 0, 1) if cnn else x
    x = (x.transpose(1, 2, 0) if cnn else x).reshape(-1)
    return self.head(self.dropout(x, key=key, inference=key is None)), state


def build(shape: Shape, params: PyTree) -> Written:
  """Return the network in equinox; the features are the first axis of its kernels."""
  model, state = eqx.nn.make_with_state(Equinox)(shape, jax.random.key(0))
  dense = lambda own: (own["kernel"].T, own["bias"])
  conv = lambda own: (own["kernel"].transpose(3, 2, 0, 1), own["bias"][:, None, None])
  layer = conv if shape.kind == "cnn" else dense
  new = []
  for i in range(shape.blocks):
    norm = params[f"norm_{i}"]
    new += [*layer(params[f"layer_{i}"]), norm["scale"], norm["bias"]]
  new += dense(params["head"])
  pairs = lambda model: [
    *(part for pair in zip(model.layers, model.norms, strict=True) for part in pair),
    model.head,
  ]
  where = lambda model: [leaf for part in pairs(model) for leaf in (part.weight, part.bias)]
  model = eqx.tree_at(where, model, [jnp.asarray(leaf) for leaf in new])
  theta, static = eqx.partition(model, eqx.is_inexact_array)

  def apply(
    theta: PyTree, x: jax.Array, state: PyTree, key: jax.Array | None, train: bool
  ) -> tuple[jax.Array, PyTree]:
    network = eqx.combine(theta, static)
    # A State cannot be read any more once it is updated. A copy leaves the one of the caller alone.
    state = jax.tree.map(lambda leaf: leaf, state)
    keys = None if key is None else jax.random.split(key, len(x))
    one = lambda x, state, key: network(x, state, key, train)
    axes = (0, None, None if key is None else 0)
    return jax.vmap(one, axes, (0, None), axis_name=_BATCH)(x, state, keys)

  return Written(theta, state, apply)
