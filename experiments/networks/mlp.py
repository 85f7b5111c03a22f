"""A network of dense layers."""

from typing import Literal

import flax.linen as nn
import jax


class MLP(nn.Module):
  """Two hidden layers, [N, D] -> [N, outputs]. Parameters: hidden_0, hidden_1, out."""

  outputs: int
  width: int = 40
  activation: Literal["relu", "tanh"] = "relu"

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    for i in range(2):
      x = getattr(nn, self.activation)(nn.Dense(self.width, name=f"hidden_{i}")(x))
    return nn.Dense(self.outputs, name="out")(x)
