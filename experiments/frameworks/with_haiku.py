"""The network in haiku: a function of parameters and state, made by `transform_with_state`."""

from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp

from experiments.frameworks.plain import EPSILON, Shape, Written, pool

PyTree = Any


def build(shape: Shape, params: PyTree) -> Written:
  """Return the network in haiku, whose leaves are w, b, scale and offset."""

  def forward(x: jax.Array, train: bool, drop: bool) -> jax.Array:
    x = x if shape.kind == "cnn" else x.reshape(len(x), -1)
    for i in range(shape.blocks):
      if shape.kind == "cnn":
        x = hk.Conv2D(shape.features, 3, name=f"layer_{i}")(x)
      else:
        x = hk.Linear(shape.features, name=f"layer_{i}")(x)
      norm = hk.BatchNorm(True, True, decay_rate=shape.momentum, eps=EPSILON, name=f"norm_{i}")
      x = jax.nn.relu(norm(x, is_training=train))
      x = pool(x) if shape.kind == "cnn" else x
    x = x.reshape(len(x), -1)
    x = hk.dropout(hk.next_rng_key(), shape.dropout, x) if drop else x
    return hk.Linear(shape.outputs, name="head")(x)

  net = hk.transform_with_state(forward)
  picture = jnp.zeros((1, *shape.inputs))
  own, state = net.init(jax.random.key(0), picture, True, False)
  names = {"w": "kernel", "b": "bias", "scale": "scale", "offset": "bias"}
  theta = {
    layer: {
      name: jnp.asarray(params[layer][names[name]]).reshape(old.shape) for name, old in of.items()
    }
    for layer, of in own.items()
  }

  def apply(
    theta: PyTree, x: jax.Array, state: PyTree, key: jax.Array | None, train: bool
  ) -> tuple[jax.Array, PyTree]:
    return net.apply(theta, state, key, x, train, key is not None)

  return Written(theta, state, apply)
